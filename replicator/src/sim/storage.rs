//! What a machine keeps: segment files, and the shared memory that its log's tail lies in.
//!
//! Files keep what was written when a process ends, and only what was synced when the power goes.
//! Memory outlives a process and is lost with the power, with its name.

use std::collections::BTreeMap;
use std::fmt;

use super::jobs::keeps_old_bytes;
use super::random::Rng;
use crate::epoch::{Cut, EpochCache, EpochEntry};
use crate::faults::{Fault, is_injected};
use crate::image::{FilePlace, ImageId, ImageState, Mark};
use crate::partition::Stored;
use crate::record::BatchView;
use crate::scan::{self, LogEnd};
use crate::table::{Descriptor, ENTRY_LEN, Entry, ImageLocation, Tail, tail_byte_offset};

/// Bytes of an image.
pub(super) const IMAGE_LEN: u32 = 4096;
/// Most bytes of a segment.
pub(super) const SEGMENT_LEN: u64 = 3 * IMAGE_LEN as u64;

/// The batch that begins at `at`, if a header is there.
pub(super) fn batch_at(bytes: &[u8], at: usize) -> Option<BatchView<'_>> {
    BatchView::parse(bytes.get(at..)?)
        .ok()
        .map(|(batch, _)| batch)
}

/// The bytes of the batch that begins with offset `base_offset`, found by lengths alone.
pub(super) fn find_batch(bytes: &[u8], base_offset: i64) -> Option<&[u8]> {
    let mut at = 0;
    loop {
        let prefix: &[u8; 12] = bytes.get(at..)?.first_chunk()?;
        let (offset, length) = prefix.split_first_chunk::<8>().expect("longer than that");
        let length: &[u8; 4] = length.first_chunk().expect("four bytes are left");
        let len = usize::try_from(i32::from_be_bytes(*length)).ok()?;
        if len == 0 {
            return None;
        }
        let end = at + 12 + len;
        if i64::from_be_bytes(*offset) == base_offset {
            return bytes.get(at..end);
        }
        at = end;
    }
}

/// The mark after the batches in `bytes` from `from` on: to their end, or to byte `to`.
pub(super) fn walk(bytes: &[u8], from: Mark, to: Option<u32>) -> Result<Mark, String> {
    let mut mark = from;
    while to.is_none_or(|to| mark.byte_position < to) {
        let Some(batch) = batch_at(bytes, mark.byte_position as usize) else {
            break;
        };
        if batch.base_offset() != mark.end_offset {
            break;
        }
        batch.verify_crc().map_err(|error| error.to_string())?;
        let len = u32::try_from(batch.len()).expect("an image holds it");
        mark = mark.after(batch.stamped_bytes(), len, batch.next_offset());
    }
    Ok(mark)
}

/// A segment file.
#[derive(Clone, Debug, Default)]
pub(super) struct File {
    pub(super) bytes: Vec<u8>,
    /// So many of them survive a power loss for certain.
    synced: usize,
}

/// Why bytes are not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum WriteError {
    /// It is tried again; nothing is lost meanwhile.
    Full,
    /// The device has failed: nothing more is written until the node starts again.
    Poisoned,
    /// The bytes do not belong there.
    Wrong(String),
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the disk is full"),
            Self::Poisoned => f.write_str("the device has failed"),
            Self::Wrong(cause) => f.write_str(cause),
        }
    }
}

/// The files of a partition.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) segments: BTreeMap<i64, File>,
    /// The checkpoints, which are written as a whole and synced.
    pub(super) high_watermark: i64,
    start_offset: i64,
    /// Which epoch wrote what, and the one begun last.
    epochs: EpochCache,
    end_offset: i64,
    pub(super) is_full: bool,
    pub(super) is_poisoned: bool,
}

impl Disk {
    pub(super) fn new() -> Self {
        Self {
            segments: BTreeMap::new(),
            high_watermark: 0,
            start_offset: 0,
            epochs: EpochCache::default(),
            end_offset: 0,
            is_full: false,
            is_poisoned: false,
        }
    }

    pub(super) fn log_start_offset(&self) -> i64 {
        self.start_offset
    }

    /// Whether anything can be written.
    pub(super) fn check(&self) -> Result<(), WriteError> {
        match (self.is_poisoned, self.is_full) {
            (true, _) => Err(WriteError::Poisoned),
            (_, true) => Err(WriteError::Full),
            _ => Ok(()),
        }
    }

    pub(super) fn log_end_offset(&self) -> i64 {
        self.end_offset
    }

    /// The highest epoch of a record or a start to lead.
    pub(super) fn leader_epoch(&self) -> i32 {
        self.epochs.latest_epoch().unwrap_or(0)
    }

    /// Where the files end.
    pub(super) fn end_place(&self) -> FilePlace {
        match self.segments.last_key_value() {
            Some((&segment_base_offset, file)) => FilePlace {
                segment_base_offset,
                file_position: file.bytes.len() as u64,
            },
            None => FilePlace {
                segment_base_offset: self.end_offset,
                file_position: 0,
            },
        }
    }

    pub(super) fn set_high_watermark(&mut self, offset: i64) {
        self.high_watermark = offset.clamp(self.start_offset, self.end_offset);
    }

    /// Appends whole batches at their place; a segment before a new one is synced.
    pub(super) fn append(&mut self, place: FilePlace, bytes: &[u8]) -> Result<(), WriteError> {
        self.check()?;
        let end = self.end_place();
        if place != end && place != end.next(self.end_offset, true) {
            return Err(WriteError::Wrong(format!(
                "bytes for {place:?} while the files end at {end:?}"
            )));
        }
        if place.segment_base_offset != end.segment_base_offset {
            self.sync();
        }
        let mut at = 0;
        while let Some(batch) = batch_at(bytes, at) {
            if batch.base_offset() != self.end_offset {
                let (found, due) = (batch.base_offset(), self.end_offset);
                return Err(WriteError::Wrong(format!(
                    "offset {found} written where {due} is due"
                )));
            }
            self.epochs
                .note(batch.partition_leader_epoch(), batch.base_offset());
            self.end_offset = batch.next_offset();
            at += batch.len();
        }
        let file = self.segments.entry(place.segment_base_offset).or_default();
        file.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// An append that the end of the process cut short.
    pub(super) fn tear(&mut self, place: FilePlace, bytes: &[u8]) {
        let end = self.end_place();
        let is_rolled = place == end.next(self.end_offset, true) && place != end;
        // A device that has failed cannot sync the segment before a new one.
        if place == end || is_rolled && !self.is_poisoned {
            if is_rolled {
                self.sync();
            }
            let file = self.segments.entry(place.segment_base_offset).or_default();
            file.bytes.extend_from_slice(bytes);
        }
    }

    /// What is written survives a power loss from now on, unless the device has failed.
    pub(super) fn sync(&mut self) {
        if !self.is_poisoned {
            self.sync_all();
        }
    }

    fn sync_all(&mut self) {
        for file in self.segments.values_mut() {
            file.synced = file.bytes.len();
        }
    }

    /// Where retention lets the log start if it is to keep `len_max` bytes: behind whole segments below the
    /// high watermark, never behind the one that is written.
    pub(super) fn retention_point(&self, len_max: usize, high_watermark: i64) -> i64 {
        let mut len: usize = self.segments.values().map(|file| file.bytes.len()).sum();
        let ends = self.segments.keys().skip(1);
        let mut point = self.start_offset;
        for (file, &end) in self.segments.values().zip(ends) {
            len -= file.bytes.len();
            let is_lax = is_injected(Fault::RetentionBeyondHw);
            if end > high_watermark && !is_lax || len < len_max {
                break;
            }
            point = point.max(end);
        }
        point
    }

    /// The log starts at an offset: first in the checkpoint, then segments of which all is below go, never
    /// the last one. A crash leaves some of them.
    pub(super) fn start_at(&mut self, offset: i64) {
        self.start_offset = self.start_offset.max(offset);
        self.epochs.start_at(self.start_offset);
        self.remove_below_start();
    }

    /// A crash in the middle of it.
    pub(super) fn tear_start(&mut self, offset: i64) {
        self.start_offset = self.start_offset.max(offset);
    }

    fn remove_below_start(&mut self) {
        while let Some(next) = self.segments.keys().nth(1)
            && *next <= self.start_offset
        {
            self.segments.pop_first();
        }
    }

    /// Loses part of what is not synced.
    pub(super) fn lose_power(&mut self, rng: &mut Rng) {
        self.segments.retain(|_, file| {
            let unsynced = file.bytes.len() - file.synced;
            let kept = if rng.chance(50) {
                0
            } else {
                rng.below(unsynced + 1)
            };
            file.bytes.truncate(file.synced + kept);
            !file.bytes.is_empty()
        });
    }

    /// What a start does: reads everything, and cuts off what is torn at the end. What the last run could not
    /// sync is written again.
    pub(super) fn recover(&mut self) -> Result<(), String> {
        self.is_poisoned = false;
        self.remove_below_start();
        let first = self.segments.keys().next().copied();
        let mut next_offset = first.unwrap_or(self.start_offset);
        let count = self.segments.len();
        let mut epochs = EpochCache::default();
        for (number, (&base_offset, file)) in self.segments.iter_mut().enumerate() {
            if base_offset != next_offset {
                return Err(format!(
                    "segment {base_offset} follows offset {next_offset}"
                ));
            }
            let mut at = 0;
            while let Some(batch) = batch_at(&file.bytes, at)
                && batch.verify_crc().is_ok()
            {
                if batch.base_offset() != next_offset {
                    let found = batch.base_offset();
                    return Err(format!("offset {found} in the files, {next_offset} is due"));
                }
                let epoch = batch.partition_leader_epoch();
                let last = epochs.latest_epoch().unwrap_or(-1);
                if epoch < last {
                    return Err(format!("epoch {epoch} in the files behind {last}"));
                }
                epochs.note(epoch, next_offset);
                next_offset = batch.next_offset();
                at += batch.len();
            }
            if at < file.bytes.len() && number + 1 < count {
                return Err(format!("segment {base_offset} is torn and not the last"));
            }
            file.bytes.truncate(at);
            file.synced = file.synced.min(at);
        }
        // A crash right after a roll: others may go on in the segment before.
        if count > 1 {
            let last = self.segments.last_entry();
            if let Some(last) = last.filter(|last| last.get().bytes.is_empty()) {
                last.remove();
            }
        }
        // The epoch begun last may have no record yet.
        let begun = self.epochs.entries().last().copied();
        self.epochs = epochs;
        self.end_offset = next_offset;
        if next_offset < self.start_offset {
            self.restart_at(self.start_offset);
        }
        self.epochs.start_at(self.start_offset);
        if let Some(begun) = begun.filter(|begun| begun.start_offset <= self.end_offset) {
            self.epochs.note(begun.epoch, begun.start_offset);
        }
        self.sync();
        Ok(())
    }

    fn restart_at(&mut self, offset: i64) {
        self.segments.clear();
        (self.start_offset, self.end_offset) = (offset, offset);
        self.epochs = EpochCache::default();
    }

    /// A leader epoch begins.
    pub(super) fn begin_epoch(&mut self, entry: EpochEntry) {
        self.epochs.assign(entry.epoch, entry.start_offset);
    }

    /// What a replica is told.
    pub(super) fn stored(&self) -> Stored {
        Stored {
            log_start_offset: self.log_start_offset(),
            log_end_offset: self.end_offset,
            high_watermark: self.high_watermark,
            epochs: self.epochs.clone(),
            end_place: self.end_place(),
        }
    }

    /// Removes the end of the log, or all of it.
    pub(super) fn cut(&mut self, cut: Cut) -> Result<(), WriteError> {
        self.check()?;
        match cut {
            Cut::TruncateTo(to) if to < self.start_offset => {
                let start = self.start_offset;
                return Err(WriteError::Wrong(format!(
                    "a cut to {to}, the log starts at {start}"
                )));
            }
            Cut::TruncateTo(to) => {
                self.segments.retain(|base_offset, _| *base_offset < to);
                if let Some(mut last) = self.segments.last_entry() {
                    let bytes = &mut last.get_mut().bytes;
                    let mut at = 0;
                    while let Some(batch) =
                        batch_at(bytes, at).filter(|batch| batch.base_offset() < to)
                    {
                        if batch.next_offset() > to {
                            let cause = format!("a cut to {to}, inside of a batch");
                            return Err(WriteError::Wrong(cause));
                        }
                        at += batch.len();
                    }
                    bytes.truncate(at);
                }
                self.end_offset = to;
                self.epochs.truncate_to(to);
            }
            Cut::RestartAt(offset) => self.restart_at(offset),
        }
        self.high_watermark = self.high_watermark.min(self.end_offset);
        self.sync();
        Ok(())
    }

    /// Batches from the one that holds `offset` on, as a cold image holds them, and where they are; `None`
    /// if the files do not hold it.
    pub(super) fn load(
        &self,
        id: ImageId,
        offset: i64,
        limit_offset: i64,
    ) -> Option<(ImageState, Vec<u8>)> {
        let (&segment_base_offset, file) = self.segments.range(..=offset).next_back()?;
        let mut at = 0;
        while batch_at(&file.bytes, at)?.next_offset() <= offset {
            at += batch_at(&file.bytes, at)?.len();
        }
        let place = FilePlace {
            segment_base_offset,
            file_position: at as u64,
        };
        let base_offset = batch_at(&file.bytes, at)?.base_offset();
        let mut state = ImageState::new(id, base_offset, place, IMAGE_LEN);
        let mut bytes = Vec::new();
        while let Some(batch) = batch_at(&file.bytes, at) {
            let len = u32::try_from(batch.len()).expect("an image holds it");
            if !state.has_room(len) || batch.base_offset() >= limit_offset {
                break;
            }
            state.push(batch.stamped_bytes(), len, batch.next_offset());
            bytes.extend_from_slice(batch.as_bytes());
            at += batch.len();
        }
        state.seal();
        (!bytes.is_empty()).then_some((state, bytes))
    }

    /// Bytes that an image starts with.
    pub(super) fn read(&self, place: FilePlace, len: u32) -> Option<Vec<u8>> {
        if len == 0 {
            return Some(Vec::new());
        }
        let file = self.segments.get(&place.segment_base_offset)?;
        let from = usize::try_from(place.file_position).ok()?;
        Some(file.bytes.get(from..from + len as usize)?.to_vec())
    }

    /// The batch that begins with an offset; with `is_synced`, only if it survives a power loss.
    pub(super) fn find(&self, base_offset: i64, is_synced: bool) -> Option<&[u8]> {
        let (_, file) = self.segments.range(..=base_offset).next_back()?;
        let len = if is_synced {
            file.synced
        } else {
            file.bytes.len()
        };
        find_batch(&file.bytes[..len], base_offset)
    }

    /// All bytes of the segments that begin at `from` or later.
    pub(super) fn all_from(&self, from: i64) -> Vec<u8> {
        let files = self.segments.range(from..).map(|(_, file)| file);
        files.flat_map(|file| file.bytes.iter().copied()).collect()
    }
}

/// An image in shared memory.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    pub(super) starts_segment: bool,
    /// Made from the files for somebody who reads: nothing of the log is only here.
    pub(super) is_cold: bool,
}

/// The shared memory that a partition has.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    pub(super) images: BTreeMap<ImageId, Image>,
    pub(super) entry: [u8; ENTRY_LEN],
    descriptors: u32,
    /// Images let go, to be used again.
    free: Vec<Vec<u8>>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self {
            images: BTreeMap::new(),
            entry: [0; ENTRY_LEN],
            descriptors: 0,
            free: Vec::new(),
        }
    }

    pub(super) fn make(&mut self, id: ImageId, fill: &[u8], starts_segment: bool, is_cold: bool) {
        let mut bytes = self.free.pop().unwrap_or_default();
        if !keeps_old_bytes() {
            bytes.clear();
        }
        bytes.resize(IMAGE_LEN as usize, 0);
        bytes[..fill.len()].copy_from_slice(fill);
        let image = Image {
            bytes,
            starts_segment,
            is_cold,
        };
        self.images.insert(id, image);
    }

    pub(super) fn release(&mut self, id: ImageId) {
        self.free
            .extend(self.images.remove(&id).map(|image| image.bytes));
    }

    /// An image is not part of the log any more.
    pub(super) fn rename(&mut self, id: ImageId, name: ImageId) {
        if let Some(image) = self.images.remove(&id) {
            self.images.insert(
                name,
                Image {
                    is_cold: true,
                    ..image
                },
            );
        }
    }

    pub(super) fn tail(&self) -> Option<Tail> {
        Entry::decode(&self.entry).tail
    }

    pub(super) fn put_tail(&mut self, sequence: u32, tail: &Tail) {
        let at = tail_byte_offset(sequence);
        let line = tail.encode();
        self.entry[at..at + line.len()].copy_from_slice(&line);
    }

    pub(super) fn describe(
        &mut self,
        (leader_epoch, epoch_start_offset): (i32, i64),
        current: Option<ImageLocation>,
        next: Option<ImageLocation>,
    ) {
        self.descriptors += 1;
        let descriptor = Descriptor {
            image_len_log2: u8::try_from(IMAGE_LEN.ilog2()).expect("below 32"),
            sequence: self.descriptors,
            leader_epoch,
            epoch_start_offset,
            current,
            next,
        };
        let line = descriptor.encode();
        self.entry[..line.len()].copy_from_slice(&line);
    }

    /// The batch that begins with an offset, in an image that is part of the log.
    pub(super) fn find(&self, base_offset: i64) -> impl Iterator<Item = &[u8]> {
        let images = self.images.values().filter(|image| !image.is_cold);
        images.filter_map(move |image| find_batch(&image.bytes, base_offset))
    }

    /// Copies to the files what memory holds beyond them, and removes it.
    pub(super) fn drain(&mut self, disk: &mut Disk) -> Result<Option<Tail>, WriteError> {
        let tail = self.tail();
        if let Some(tail) = &tail {
            self.scan(disk, tail.leader_epoch, Some(tail))?;
        }
        self.images.clear();
        self.entry = [0; ENTRY_LEN];
        Ok(tail)
    }

    /// Copies to the files what the images hold beyond them: up to the tail, and what has arrived behind it.
    pub(super) fn scan(
        &self,
        disk: &mut Disk,
        leader_epoch: i32,
        tail: Option<&Tail>,
    ) -> Result<(), WriteError> {
        let end = |disk: &Disk| LogEnd {
            offset: disk.log_end_offset(),
            epoch: disk.leader_epoch(),
        };
        let mut is_progress = true;
        while std::mem::take(&mut is_progress) {
            // Of two images with batches of the same offsets, the one with the later name is of the later
            // epoch.
            for (id, image) in self.images.iter().rev().filter(|(_, image)| !image.is_cold) {
                let found = scan::continue_log(*id, &image.bytes, end(disk), leader_epoch, tail);
                let range = found.map_err(wrong)?.range;
                if range.is_empty() {
                    continue;
                }
                let is_start = range.start == 0 && image.starts_segment;
                let place = disk.end_place().next(disk.log_end_offset(), is_start);
                disk.append(place, &image.bytes[range])?;
                is_progress = true;
                break;
            }
        }
        scan::check_end(end(disk), tail).map_err(wrong)
    }
}

fn wrong(error: scan::ScanError) -> WriteError {
    WriteError::Wrong(error.to_string())
}

/// A partition's files and memory on a machine.
#[derive(Clone, Debug)]
pub(super) struct Store {
    pub(super) disk: Disk,
    pub(super) memory: Memory,
}

impl Store {
    pub(super) fn new() -> Self {
        Self {
            disk: Disk::new(),
            memory: Memory::new(),
        }
    }

    /// Whether a batch is here: in memory, or in the files.
    pub(super) fn holds(&self, base_offset: i64, batch: &[u8], is_durable: bool) -> bool {
        let on_disk = self.disk.find(base_offset, is_durable) == Some(batch);
        on_disk || !is_durable && self.memory.find(base_offset).any(|found| found == batch)
    }

    /// How far the log reaches here, in memory or in the files.
    pub(super) fn reach(&self) -> i64 {
        let tail = self.memory.tail().map_or(0, |tail| tail.log_end_offset);
        self.disk.log_end_offset().max(tail)
    }
}
