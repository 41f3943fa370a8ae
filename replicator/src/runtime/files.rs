//! A partition's files: recovered at start, appended to by the writer thread, read for cold images.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use transport::Mapping;

use super::error::NodeError;
use super::memory::{Image, image_files, read_entry};
use crate::epoch::{Cut, EpochCache};
use crate::follower::{Fault, Fill};
use crate::image::{FilePlace, ImageId, ImageState, Mark};
use crate::partition::Stored;
use crate::record::BatchView;
use crate::scan::{self, LogEnd};
use crate::segment::{
    BatchPosition, EpochEntry, LEADER_EPOCH_CHECKPOINT, SegmentError, SegmentOptions,
    SegmentReader, SegmentWriter, list_segments, recover, write_leader_epochs,
};
use crate::table::Tail;

/// The writer's side of one partition's directory.
#[derive(Debug)]
pub(super) struct PartitionFiles {
    dir: PathBuf,
    writer: Option<SegmentWriter>,
    epochs: Vec<EpochEntry>,
    log_start_offset: i64,
    log_end_offset: i64,
}

/// What a start found of one partition.
#[derive(Debug, Clone)]
pub(super) struct Recovered {
    pub(super) stored: Stored,
    /// The highest leader epoch seen, 0 if there is none.
    pub(super) leader_epoch: i32,
}

impl PartitionFiles {
    /// Reads and repairs the directory.
    pub(super) fn recover(dir: &Path) -> Result<Self, NodeError> {
        fs::create_dir_all(dir).map_err(|source| NodeError::directory(dir, source))?;
        let mut recovery = recover(dir, SegmentOptions::default())?;
        if let Some(torn) = &recovery.torn {
            tracing::warn!(%torn, "an append had been cut short");
        }
        let last = recovery.segments.pop();
        let writer = last
            .map(|segment| SegmentWriter::resume(dir, segment))
            .transpose()?;
        Ok(Self {
            dir: dir.to_owned(),
            writer,
            epochs: recovery.epochs,
            log_start_offset: recovery.log_start_offset,
            log_end_offset: recovery.log_end_offset,
        })
    }

    /// What the files hold.
    pub(super) fn stored(&self, high_watermark: i64) -> Stored {
        Stored {
            log_start_offset: self.log_start_offset,
            log_end_offset: self.log_end_offset,
            high_watermark,
            epochs: EpochCache::new(self.epochs.iter().copied()),
            end_place: self.end_place(),
        }
    }

    /// Copies to the files what the images have beyond them: up to the tail, and what has arrived behind it.
    pub(super) fn scan(
        &mut self,
        images: &[(ImageId, Arc<Image>)],
        leader_epoch: i32,
        tail: Option<&Tail>,
    ) -> Result<(), Fault> {
        let read = |image: &Image| {
            let mut copy = vec![0; image.mapping().len()];
            let read = image.mapping().read_at(0, &mut copy);
            read.map(|()| copy)
                .map_err(|error| Fault::Corrupt(error.to_string()))
        };
        let mut images: Vec<_> = images.iter().collect();
        images.sort_by_key(|(id, _)| Reverse(*id));
        let mut is_progress = true;
        while std::mem::take(&mut is_progress) {
            for (id, image) in &images {
                let copy = read(image)?;
                if self.continue_with((*id, image.starts_segment()), &copy, leader_epoch, tail)? {
                    is_progress = true;
                    break;
                }
            }
        }
        scan::check_end(self.log_end(), tail).map_err(|error| Fault::Corrupt(error.to_string()))
    }

    fn log_end(&self) -> LogEnd {
        LogEnd {
            offset: self.log_end_offset,
            epoch: self.leader_epoch(),
        }
    }

    pub(super) fn log_end_offset(&self) -> i64 {
        self.log_end_offset
    }

    pub(super) fn leader_epoch(&self) -> i32 {
        self.epochs.last().map_or(0, |entry| entry.epoch)
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
        write_leader_epochs(&self.dir.join(LEADER_EPOCH_CHECKPOINT), &self.epochs)
    }

    /// Appends whole batches at their place; the segment is rolled if the place is in a new one.
    pub(super) fn append(&mut self, place: FilePlace, bytes: &[u8]) -> Result<(), SegmentError> {
        // First, so that nothing can fail once the bytes count as appended.
        self.note_epochs(bytes)?;
        let base_offset = place.segment_base_offset;
        if self
            .writer
            .as_ref()
            .is_none_or(|writer| writer.base_offset() != base_offset)
        {
            if let Some(full) = &mut self.writer {
                full.seal()?;
            }
            self.writer = Some(SegmentWriter::create(
                &self.dir,
                base_offset,
                SegmentOptions::default(),
            )?);
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
        let mut epochs = Vec::new();
        let mut last = self.epochs.last().map_or(-1, |entry| entry.epoch);
        while let Ok((batch, rest)) = BatchView::parse(bytes) {
            let epoch = batch.partition_leader_epoch();
            if epoch > last {
                last = epoch;
                let start_offset = batch.base_offset();
                epochs.push(EpochEntry {
                    epoch,
                    start_offset,
                });
            }
            bytes = rest;
        }
        if epochs.is_empty() {
            return Ok(());
        }
        let all = [&self.epochs[..], &epochs].concat();
        write_leader_epochs(&self.dir.join(LEADER_EPOCH_CHECKPOINT), &all)?;
        self.epochs = all;
        Ok(())
    }

    /// Waits until the bytes are on the device.
    pub(super) fn sync(&self) -> Result<(), SegmentError> {
        self.writer.as_ref().map_or(Ok(()), SegmentWriter::sync)
    }

    /// Copies to the files what the memory of the last run holds beyond them: all up to its newest tail.
    pub(super) fn drain_memory(
        &mut self,
        shm_dir: &Path,
        table: &Mapping,
        partition: usize,
    ) -> Result<Option<Tail>, NodeError> {
        let tail = read_entry(table, partition).tail;
        let mut images = Vec::new();
        for file in image_files(shm_dir)? {
            if file.partition == partition {
                images.push((file.id, file.starts_segment, file.path));
            }
        }
        if let Some(tail) = &tail
            && let Err(error) = self.scan_files(&mut images, tail)?
        {
            let dir = self.dir.display();
            tracing::error!(%dir, %error, "log memory does not hold all that its tail says");
        }
        for (.., path) in images {
            fs::remove_file(&path).map_err(|source| NodeError::directory(path, source))?;
        }
        Ok(tail)
    }

    /// As [`PartitionFiles::scan`], of images that are files now.
    fn scan_files(
        &mut self,
        images: &mut [(ImageId, bool, PathBuf)],
        tail: &Tail,
    ) -> Result<Result<(), Fault>, NodeError> {
        // Of two images with batches of the same offsets, the one with the later name is of the later
        // epoch.
        images.sort_by_key(|(id, ..)| Reverse(*id));
        let mut is_progress = true;
        while std::mem::take(&mut is_progress) {
            for (id, starts_segment, path) in &*images {
                let mapping = Mapping::open_shm(path)?;
                let mut copy = vec![0; mapping.len()];
                mapping.read_at(0, &mut copy)?;
                let image = (*id, *starts_segment);
                match self.continue_with(image, &copy, tail.leader_epoch, Some(tail)) {
                    Ok(true) => {
                        is_progress = true;
                        break;
                    }
                    Ok(false) => {}
                    Err(fault) => return Ok(Err(fault)),
                }
            }
        }
        let complete = scan::check_end(self.log_end(), Some(tail));
        Ok(complete.map_err(|error| Fault::Corrupt(error.to_string())))
    }

    /// Appends the batches of an image that continue the files; says whether there were any.
    fn continue_with(
        &mut self,
        (id, starts_segment): (ImageId, bool),
        copy: &[u8],
        ceiling: i32,
        tail: Option<&Tail>,
    ) -> Result<bool, Fault> {
        let found = scan::continue_log(id, copy, self.log_end(), ceiling, tail);
        let range = found
            .map_err(|error| Fault::Corrupt(error.to_string()))?
            .range;
        if range.is_empty() {
            return Ok(false);
        }
        let is_start = range.start == 0 && starts_segment;
        let place = self.end_place().next(self.log_end_offset, is_start);
        self.append(place, &copy[range])
            .map_err(|error| Fault::Files(error.to_string()))?;
        Ok(true)
    }

    /// Cuts the log.
    pub(super) fn cut(&mut self, cut: Cut) -> Result<(), String> {
        // TODO: cut the files. Until then a follower that diverges stays fenced, and says so.
        Err(format!("segment files cannot be cut yet: {cut:?}"))
    }
}

/// Walks whole, valid batches of `bytes`, which begin at `from`; stops at the first that is not one, or
/// does not continue the offsets.
pub(super) fn walk(bytes: &[u8], from: Mark) -> Result<Mark, String> {
    let mut mark = from;
    let start = from.byte_position;
    loop {
        let at = (mark.byte_position - start) as usize;
        let Ok((batch, _)) = BatchView::parse(&bytes[at..]) else {
            return Ok(mark);
        };
        if batch.base_offset() != mark.end_offset {
            return Ok(mark);
        }
        batch
            .verify_crc()
            .map_err(|error| format!("the batch at offset {}: {error}", mark.end_offset))?;
        let len = u32::try_from(batch.len()).map_err(|_| "a batch is too long".to_owned())?;
        mark = mark.after(batch.stamped_bytes(), len, batch.next_offset());
    }
}

/// Bytes of a segment file that fit an image.
#[derive(Debug)]
pub(super) struct ColdBytes {
    pub(super) state: ImageState,
    pub(super) bytes: Vec<u8>,
}

/// Reads whole batches from the one that holds `offset` on: of one segment, as many as fit an image,
/// and none at or beyond `limit_offset`.
pub(super) fn read_cold(
    dir: &Path,
    id: ImageId,
    offset: i64,
    limit_offset: i64,
    image_len: u32,
) -> Result<ColdBytes, String> {
    let segments = list_segments(dir).map_err(|error| error.to_string())?;
    let Some(&segment) = segments.iter().rev().find(|base| **base <= offset) else {
        return Err(format!("offset {offset} is below the first segment"));
    };
    let reader = SegmentReader::open(dir, segment).map_err(|error| error.to_string())?;
    let found = reader
        .position_of(offset)
        .map_err(|error| error.to_string())?;
    let Some(BatchPosition {
        position,
        base_offset,
        ..
    }) = found
    else {
        return Err(format!(
            "offset {offset} is beyond the end of segment {segment}"
        ));
    };
    let mut bytes = vec![0; image_len as usize];
    let len = reader
        .read_at(position, &mut bytes)
        .map_err(|error| error.to_string())?;
    bytes.truncate(len);
    let place = FilePlace {
        segment_base_offset: segment,
        file_position: position,
    };
    let mut state = ImageState::new(id, base_offset, place, image_len);
    let mut at = 0;
    while let Ok((batch, _)) = BatchView::parse(&bytes[at..]) {
        if batch.base_offset() >= limit_offset || batch.base_offset() != state.end().end_offset {
            break;
        }
        let len = u32::try_from(batch.len()).map_err(|_| "a batch is too long".to_owned())?;
        state.push(batch.stamped_bytes(), len, batch.next_offset());
        at += batch.len();
    }
    if at == 0 {
        return Err(format!("no batch at byte {position} of segment {segment}"));
    }
    state.seal();
    bytes.truncate(at);
    Ok(ColdBytes { state, bytes })
}

/// Reads the bytes that a follower's image begins with.
pub(super) fn read_fill(dir: &Path, fill: &Fill) -> Result<(Vec<u8>, Mark), String> {
    let mut bytes = vec![0; fill.len as usize];
    if fill.len > 0 {
        let reader = SegmentReader::open(dir, fill.place.segment_base_offset)
            .map_err(|error| error.to_string())?;
        let len = reader
            .read_at(fill.place.file_position, &mut bytes)
            .map_err(|error| error.to_string())?;
        bytes.truncate(len);
    }
    let end = walk(&bytes, Mark::start(fill.base_offset))?;
    Ok((bytes, end))
}
