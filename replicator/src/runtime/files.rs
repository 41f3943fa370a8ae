//! A partition's files: recovered at start; appended to, synced and cut by the writer thread.
//!
//! An error while writing or syncing leaves the files in one of two states, both of which a node's status
//! shows. *Full*: there was no room, the bytes are still in memory, and the same write is tried again.
//! *Poisoned*: the device failed. After a failed `fdatasync` the kernel may have dropped pages and calls
//! them clean, so neither a later success nor what is read back vouches for them. Nothing more is written
//! until a restart, which writes again what had not been synced.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use transport::Mapping;

use super::error::NodeError;
use super::memory::Image;
use crate::cluster::{Flush, Retention};
use crate::epoch::{Cut, EpochCache};
use crate::follower::Fault;
use crate::image::{FilePlace, ImageId};
use crate::partition::Stored;
use crate::record::BatchView;
use crate::scan::{self, LogEnd};
use crate::segment::{
    EpochEntry, LEADER_EPOCH_CHECKPOINT, RecoveredSegment, SegmentError, SegmentFile,
    SegmentOptions, SegmentReader, SegmentWriter, recover, remove_below, segment_path, start_anew,
    truncate, write_leader_epochs,
};
use crate::table::Tail;

/// The writer's side of one partition's directory.
#[derive(Debug)]
pub(super) struct PartitionFiles {
    dir: PathBuf,
    options: SegmentOptions,
    flush: Flush,
    writer: Option<SegmentWriter>,
    /// The segments before the one that is written.
    sealed: VecDeque<SealedSegment>,
    epochs: Vec<EpochEntry>,
    /// Of the checkpoint, behind the end of the files: the records may be in memory.
    epochs_beyond: Vec<EpochEntry>,
    log_start_offset: i64,
    log_end_offset: i64,
    /// Everything below is on the device.
    durable_offset: i64,
    unsynced: Option<Unsynced>,
    poison: Option<String>,
    /// Exists while what is read from the files cannot be trusted; in memory, which ends with the page
    /// cache that it is about.
    marker: PathBuf,
}

#[derive(Debug, Clone, Copy)]
struct SealedSegment {
    base_offset: i64,
    len: u64,
    max_timestamp: i64,
}

/// Bytes that have been written and not synced.
#[derive(Debug, Clone, Copy)]
struct Unsynced {
    since: Instant,
    len: u64,
}

/// What a partition's files are like at start, apart from what they hold.
#[derive(Debug, Clone)]
pub(super) struct FilesConfig {
    pub(super) dir: PathBuf,
    pub(super) marker: PathBuf,
    pub(super) flush: Flush,
    pub(super) options: SegmentOptions,
}

/// Why files do not take bytes, or do not keep them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StorageFault {
    /// There is no room: it may be tried again, and nothing is lost meanwhile.
    Full(String),
    /// The device failed: nothing more is written until a restart.
    Poisoned(String),
}

impl fmt::Display for StorageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(cause) => write!(f, "no room for the log, it is tried again: {cause}"),
            Self::Poisoned(cause) => write!(
                f,
                "poisoned, nothing more is written until the node is restarted: {cause}"
            ),
        }
    }
}

impl PartitionFiles {
    /// Reads and repairs the directory.
    ///
    /// What the last run could not sync is written again: the page cache, if it still has it, calls it
    /// clean although the device may not have it.
    pub(super) fn recover(config: FilesConfig, log_start_offset: i64) -> Result<Self, NodeError> {
        let FilesConfig {
            dir,
            marker,
            flush,
            options,
        } = config;
        fs::create_dir_all(&dir).map_err(|source| NodeError::directory(&dir, source))?;
        let mut recovery = recover(&dir, log_start_offset, &options)?;
        if let Some(torn) = &recovery.torn {
            tracing::warn!(%torn, "an append had been cut short");
        }
        for path in &recovery.rebuilt {
            tracing::info!(path = %path.display(), "rebuilt from the log");
        }
        let last = recovery.segments.pop();
        if let Some(last) = last.as_ref().filter(|_| marker.exists()) {
            tracing::warn!(dir = %dir.display(), "the last run could not sync the log; it is written again");
            rewrite(&dir, last.base_offset, &options)?;
        }
        let sealed = recovery.segments.iter().map(SealedSegment::of).collect();
        let writer = last
            .map(|segment| SegmentWriter::resume(&dir, segment, &options))
            .transpose()?;
        let mut files = Self {
            dir,
            options,
            flush,
            writer,
            sealed,
            epochs: recovery.epochs,
            epochs_beyond: recovery.epochs_beyond,
            log_start_offset: recovery.log_start_offset,
            log_end_offset: recovery.log_end_offset,
            durable_offset: 0,
            unsynced: None,
            poison: None,
            marker,
        };
        if files.log_end_offset < files.log_start_offset {
            files.restart_at(files.log_start_offset)?;
        }
        files.leave_empty_segment()?;
        files.sync_now()?;
        remove_if_exists(&files.marker)?;
        Ok(files)
    }

    /// Removes a last segment without a whole batch, which a crash right after a roll leaves: others may go
    /// on in the segment before, and replicas have the same segments.
    fn leave_empty_segment(&mut self) -> Result<(), SegmentError> {
        let is_empty = self.writer.as_ref().is_some_and(|last| last.is_empty());
        if is_empty && !self.sealed.is_empty() {
            // The epoch begun last has no record, and is known all the same.
            let epochs = self.epochs.clone();
            self.truncate_to(self.log_end_offset)?;
            self.epochs = epochs;
            self.write_epochs()?;
        }
        Ok(())
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn log_start_offset(&self) -> i64 {
        self.log_start_offset
    }

    pub(super) fn log_end_offset(&self) -> i64 {
        self.log_end_offset
    }

    /// Everything below is on the device.
    pub(super) fn durable_offset(&self) -> i64 {
        self.durable_offset
    }

    pub(super) fn leader_epoch(&self) -> i32 {
        self.epochs.last().map_or(0, |entry| entry.epoch)
    }

    /// What the files hold.
    pub(super) fn stored(&self, high_watermark: i64) -> Stored {
        Stored {
            log_start_offset: self.log_start_offset,
            log_end_offset: self.log_end_offset,
            high_watermark: high_watermark.clamp(self.log_start_offset, self.log_end_offset),
            epochs: EpochCache::new(self.epochs.iter().copied()),
            end_place: self.end_place(),
        }
    }

    fn log_end(&self) -> LogEnd {
        LogEnd {
            offset: self.log_end_offset,
            epoch: self.leader_epoch(),
        }
    }

    /// Copies to the files what images, which nobody can write to, have beyond them: up to the tail, and what
    /// has arrived behind it. `ceiling` is the highest epoch that anything can be of.
    pub(super) fn scan(
        &mut self,
        images: &[(ImageId, Arc<Image>)],
        ceiling: i32,
        tail: Option<&Tail>,
    ) -> Result<(), Fault> {
        let mut images: Vec<_> = images.iter().collect();
        // Of two images with batches of the same offsets, the one with the later name is of the later epoch.
        images.sort_by_key(|(id, _)| Reverse(*id));
        let mut is_progress = true;
        while std::mem::take(&mut is_progress) {
            for (id, image) in &images {
                let place = (*id, image.starts_segment());
                if self.continue_with(place, image.mapping(), ceiling, tail)? {
                    is_progress = true;
                    break;
                }
            }
        }
        scan::check_end(self.log_end(), tail).map_err(|error| Fault::Corrupt(error.to_string()))
    }

    /// Appends the batches of an image that continue the files; says whether there were any.
    pub(super) fn continue_with(
        &mut self,
        (id, starts_segment): (ImageId, bool),
        image: &Mapping,
        ceiling: i32,
        tail: Option<&Tail>,
    ) -> Result<bool, Fault> {
        let corrupt = |cause: String| Fault::Corrupt(cause);
        let mut copy = vec![0; image.len()];
        image
            .read_at(0, &mut copy)
            .map_err(|error| corrupt(error.to_string()))?;
        let found = scan::continue_log(id, &copy, self.log_end(), ceiling, tail);
        let range = found.map_err(|error| corrupt(error.to_string()))?.range;
        if range.is_empty() {
            return Ok(false);
        }
        let is_start = range.start == 0 && starts_segment;
        let place = self.end_place().next(self.log_end_offset, is_start);
        self.append(place, &copy[range])
            .map_err(|fault| Fault::Files(fault.to_string()))?;
        Ok(true)
    }

    /// Leader epochs of the checkpoint that begin behind the log's end.
    pub(super) fn epochs_beyond(&self) -> &[EpochEntry] {
        let known = self
            .epochs_beyond
            .partition_point(|entry| entry.start_offset <= self.log_end_offset);
        &self.epochs_beyond[known..]
    }

    /// Now that all that memory held is in the files: epochs that begin behind the log's end are given up.
    pub(super) fn settle_epochs(&mut self) -> Result<(), SegmentError> {
        let end = self.log_end_offset;
        let beyond = std::mem::take(&mut self.epochs_beyond);
        if beyond.is_empty() {
            return Ok(());
        }
        let last = self.leader_epoch();
        let kept = beyond
            .into_iter()
            .filter(|entry| entry.start_offset <= end && entry.epoch > last);
        self.epochs.extend(kept);
        self.write_epochs()
    }

    /// Where the files end.
    pub(super) fn end_place(&self) -> FilePlace {
        match &self.writer {
            Some(writer) => FilePlace {
                segment_base_offset: writer.base_offset(),
                file_position: writer.len(),
            },
            None => FilePlace {
                segment_base_offset: self.log_end_offset,
                file_position: 0,
            },
        }
    }

    /// Begins a leader epoch at the log end offset.
    pub(super) fn begin_epoch(&mut self, epoch: i32) -> Result<(), SegmentError> {
        let start_offset = self.log_end_offset;
        self.epochs
            .retain(|entry| entry.start_offset < start_offset);
        self.epochs.push(EpochEntry {
            epoch,
            start_offset,
        });
        self.write_epochs()
    }

    fn write_epochs(&self) -> Result<(), SegmentError> {
        let path = self.dir.join(LEADER_EPOCH_CHECKPOINT);
        write_leader_epochs(&*self.options.storage, &path, &self.epochs)
    }

    /// Appends whole batches at their place; the segment is rolled if the place is in a new one.
    ///
    /// With the policy `each` they are on the device afterwards.
    pub(super) fn append(&mut self, place: FilePlace, bytes: &[u8]) -> Result<(), StorageFault> {
        self.check_poison()?;
        let appended = self.try_append(place, bytes);
        appended.map_err(|error| self.failed(error))?;
        let unsynced = self.unsynced.get_or_insert(Unsynced {
            since: Instant::now(),
            len: 0,
        });
        unsynced.len += bytes.len() as u64;
        if self.flush == Flush::Each {
            self.sync()?;
        }
        Ok(())
    }

    fn try_append(&mut self, place: FilePlace, bytes: &[u8]) -> Result<(), SegmentError> {
        // First, so that nothing can fail once the bytes count as appended.
        self.note_epochs(bytes)?;
        let base_offset = place.segment_base_offset;
        let is_rolled = |writer: &SegmentWriter| writer.base_offset() != base_offset;
        if self.writer.as_ref().is_none_or(is_rolled) {
            if let Some(full) = &mut self.writer {
                full.seal()?;
                self.durable_offset = self.log_end_offset;
                self.unsynced = None;
            }
            let next = SegmentWriter::create(&self.dir, base_offset, &self.options)?;
            let full = self.writer.replace(next);
            self.sealed.extend(full.map(|full| SealedSegment {
                base_offset: full.base_offset(),
                len: full.len(),
                max_timestamp: full.max_timestamp(),
            }));
        }
        let writer = self.writer.as_mut().expect("created above");
        assert_eq!(
            writer.len(),
            place.file_position,
            "bytes are drained in their order"
        );
        writer.append(bytes)?;
        self.log_end_offset = writer.next_offset();
        Ok(())
    }

    /// Keeps the epoch checkpoint as new as the log; an entry without its records is dropped by the next
    /// recovery.
    fn note_epochs(&mut self, mut bytes: &[u8]) -> Result<(), SegmentError> {
        let before = self.epochs.len();
        let mut last = self.epochs.last().map_or(-1, |entry| entry.epoch);
        while let Ok((batch, rest)) = BatchView::parse(bytes) {
            let epoch = batch.partition_leader_epoch();
            if epoch > last {
                last = epoch;
                let start_offset = batch.base_offset();
                self.epochs.push(EpochEntry {
                    epoch,
                    start_offset,
                });
            }
            bytes = rest;
        }
        if self.epochs.len() == before {
            return Ok(());
        }
        self.write_epochs()
            .inspect_err(|_| self.epochs.truncate(before))
    }

    /// When the policy wants the next sync, if it wants one.
    pub(super) fn sync_due(&self) -> Option<Instant> {
        let unsynced = self.unsynced.filter(|_| self.poison.is_none())?;
        match self.flush {
            Flush::Never | Flush::Each => None,
            Flush::Every { bytes, .. } if unsynced.len >= bytes => Some(unsynced.since),
            Flush::Every { interval_ms, .. } => {
                Some(unsynced.since + Duration::from_millis(interval_ms))
            }
        }
    }

    /// Waits until all that has been written is on the device; returns the durable offset.
    pub(super) fn sync(&mut self) -> Result<i64, StorageFault> {
        self.check_poison()?;
        let synced = self.sync_now();
        synced.map_err(|error| self.failed(error))?;
        Ok(self.durable_offset)
    }

    fn sync_now(&mut self) -> Result<(), SegmentError> {
        if let Some(writer) = &self.writer {
            writer.sync()?;
        }
        self.unsynced = None;
        self.durable_offset = self.log_end_offset;
        Ok(())
    }

    fn check_poison(&self) -> Result<(), StorageFault> {
        match &self.poison {
            Some(cause) => Err(StorageFault::Poisoned(cause.clone())),
            None => Ok(()),
        }
    }

    /// Judges an error: poison stays.
    fn failed(&mut self, error: SegmentError) -> StorageFault {
        let cause = error.to_string();
        if error.is_out_of_space() {
            return StorageFault::Full(cause);
        }
        tracing::error!(dir = %self.dir.display(), %cause, "the partition's files are poisoned");
        if let Err(error) = fs::write(&self.marker, &cause) {
            let path = self.marker.display();
            tracing::error!(%path, %error, "the next start will not know that the log was not synced");
        }
        self.poison = Some(cause.clone());
        StorageFault::Poisoned(cause)
    }

    /// Cuts the log at its end, or lets it begin anew; returns where it ends then.
    ///
    /// Checkpoints of offsets above that are the caller's to lower first, and memory that holds records
    /// beyond is the caller's to give up first: a crash in between must not find them.
    pub(super) fn cut(&mut self, cut: Cut) -> Result<i64, StorageFault> {
        self.check_poison()?;
        let done = match cut {
            Cut::TruncateTo(offset) => self.truncate_to(offset),
            Cut::RestartAt(offset) => self.restart_at(offset),
        };
        match done {
            Ok(()) => Ok(self.log_end_offset),
            // What is left is whole, but not what the books say.
            Err(error) => {
                let fault = self.failed(error);
                self.poison.get_or_insert_with(|| fault.to_string());
                self.check_poison().and(Ok(0))
            }
        }
    }

    fn truncate_to(&mut self, offset: i64) -> Result<(), SegmentError> {
        self.writer = None;
        let truncated = truncate(&self.dir, self.log_start_offset, offset, &self.options)?;
        let resume = |segment| SegmentWriter::resume(&self.dir, segment, &self.options);
        self.writer = truncated.last.map(resume).transpose()?;
        self.epochs = truncated.epochs;
        self.log_end_offset = self.log_end_offset.min(truncated.log_end_offset);
        self.durable_offset = self.durable_offset.min(self.log_end_offset);
        let base_offset = self.end_place().segment_base_offset;
        self.sealed
            .retain(|segment| segment.base_offset < base_offset);
        Ok(())
    }

    fn restart_at(&mut self, offset: i64) -> Result<(), SegmentError> {
        self.writer = None;
        start_anew(&self.dir, &self.options)?;
        self.sealed.clear();
        self.epochs.clear();
        self.unsynced = None;
        self.log_start_offset = offset;
        self.log_end_offset = offset;
        self.durable_offset = offset;
        Ok(())
    }

    /// Where retention lets the log start: behind whole segments below the high watermark, never behind
    /// the one that is written. By age as Kafka does: a segment goes if its newest record is too old, by
    /// size if what stays is still enough.
    pub(super) fn retention_point(
        &self,
        retention: Retention,
        high_watermark: i64,
        now: SystemTime,
    ) -> i64 {
        let mut point = self.log_start_offset;
        let sealed_len: u64 = self.sealed.iter().map(|segment| segment.len).sum();
        let mut len = sealed_len + self.writer.as_ref().map_or(0, SegmentWriter::len);
        let next = self
            .sealed
            .iter()
            .skip(1)
            .map(|segment| segment.base_offset);
        let ends = next.chain(self.writer.as_ref().map(SegmentWriter::base_offset));
        for (segment, end) in self.sealed.iter().zip(ends) {
            let is_too_much = retention
                .bytes
                .is_some_and(|bytes| len.saturating_sub(segment.len) >= bytes);
            let is_too_old = retention
                .ms
                .is_some_and(|ms| segment.is_older_than(ms, now, &self.dir));
            if end > high_watermark || !(is_too_much || is_too_old) {
                break;
            }
            len -= segment.len;
            point = point.max(end);
        }
        point
    }

    /// Removes segments of which all is below `offset`, which has been checkpointed as the log's start.
    pub(super) fn start_at(&mut self, offset: i64) -> Result<(), StorageFault> {
        self.check_poison()?;
        self.log_start_offset = self.log_start_offset.max(offset);
        let removed = remove_below(&self.dir, self.log_start_offset, &self.options);
        let removed = removed.map_err(|error| self.failed(error))?;
        self.sealed.drain(..removed.min(self.sealed.len()));
        let begun = self
            .epochs
            .partition_point(|entry| entry.start_offset <= self.log_start_offset);
        if let Some(last) = begun.checked_sub(1) {
            self.epochs.drain(..last);
            self.epochs[0].start_offset = self.log_start_offset;
        }
        Ok(())
    }
}

impl SealedSegment {
    fn of(segment: &RecoveredSegment) -> Self {
        Self {
            base_offset: segment.base_offset,
            len: segment.len,
            max_timestamp: segment.max_timestamp(),
        }
    }

    /// A segment without timestamps is as old as its file, as for Kafka.
    fn is_older_than(&self, ms: u64, now: SystemTime, dir: &Path) -> bool {
        let newest = match u64::try_from(self.max_timestamp) {
            Ok(timestamp) => Some(UNIX_EPOCH + Duration::from_millis(timestamp)),
            Err(_) => {
                let log = segment_path(dir, self.base_offset, SegmentFile::Log);
                fs::metadata(log).and_then(|file| file.modified()).ok()
            }
        };
        let age = newest.and_then(|newest| now.duration_since(newest).ok());
        age.is_some_and(|age| age > Duration::from_millis(ms))
    }
}

/// Writes the bytes of a log file over themselves, so that the next sync writes them to the device.
fn rewrite(dir: &Path, base_offset: i64, options: &SegmentOptions) -> Result<(), SegmentError> {
    let reader = SegmentReader::open(dir, base_offset)?;
    reader.rewrite(&*options.storage)
}

pub(super) fn remove_if_exists(path: &Path) -> Result<(), NodeError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(NodeError::directory(path, error))
        }
        _ => Ok(()),
    }
}
