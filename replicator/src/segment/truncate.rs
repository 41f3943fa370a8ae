//! Cuts a partition's directory at its end, or takes segments away at its start.
//!
//! The order of steps is such that a crash between any two leaves a directory that
//! [`recover`](super::recover()) accepts, with a log that ends at the offset asked for or later: epochs
//! first (a checkpoint may lag behind the log, never be ahead of it), then whole segments, the last one
//! first, each on the device before the next, then the segment that the log ends in, its indexes last.
//! To finish what a crash has interrupted, truncate again.

use std::path::Path;

use super::checkpoint::{EpochEntry, read_leader_epochs, sync_dir, write_leader_epochs};
use super::error::{IoOp, SegmentError};
use super::index::IndexBuilder;
use super::layout::{LEADER_EPOCH_CHECKPOINT, SegmentFile, list_segments, segment_path};
use super::reader::SegmentReader;
use super::recover::{RecoveredSegment, Scanned, cut_off};
use super::storage::Storage;
use super::writer::SegmentOptions;

/// What a truncation has left.
#[derive(Debug)]
pub struct Truncated {
    /// The offset that the next batch gets.
    pub log_end_offset: i64,
    /// The segment that the log ends in, to be resumed; `None` if there is none.
    pub last: Option<RecoveredSegment>,
    /// The leader epochs that are left.
    pub epochs: Vec<EpochEntry>,
}

/// Cuts the log off at `offset`, as Kafka does: a batch that `offset` is inside of goes as a whole, and
/// so do leader epochs that begin at `offset` or later.
///
/// A segment that would be left empty is removed, unless it is the first one. An offset at or beyond the
/// log end offset changes nothing but the epochs. May be called again after an error or a crash.
///
/// No writer may be open on the directory.
///
/// # Errors
///
/// - [`SegmentError::BelowLogStart`]; nothing is changed.
/// - [`SegmentError::Damaged`] if the way to the offset is not made of batches; nothing is changed.
/// - [`SegmentError::Io`].
pub fn truncate(
    dir: &Path,
    log_start_offset: i64,
    offset: i64,
    options: &SegmentOptions,
) -> Result<Truncated, SegmentError> {
    let storage = &*options.storage;
    let base_offsets = list_segments(dir)?;
    let kept = base_offsets.partition_point(|&base| base < offset);
    let kept = kept.max(1).min(base_offsets.len());
    let cut = match base_offsets[..kept].last() {
        Some(&base_offset) => Some(find_cut(dir, base_offset, offset, options)?),
        None => None,
    };
    let log_end_offset = cut.as_ref().map_or(offset, |cut| cut.next_offset);
    if log_end_offset.min(offset) < log_start_offset {
        return Err(SegmentError::BelowLogStart {
            dir: dir.to_owned(),
            offset: log_end_offset.min(offset),
            log_start_offset,
        });
    }

    let epochs = truncate_epochs(storage, dir, |epochs| {
        epochs.retain(|entry| entry.start_offset < offset);
    })?;
    for &base_offset in base_offsets[kept..].iter().rev() {
        remove_segment(storage, dir, base_offset)?;
    }
    let last = cut.map(|cut| finish_cut(dir, cut, storage)).transpose()?;
    Ok(Truncated {
        log_end_offset,
        last,
        epochs,
    })
}

/// Removes all segments and epochs: the log goes on, empty, at `log_start_offset`, which the caller has
/// stored in the checkpoint of log start offsets. Otherwise as [`truncate`].
///
/// # Errors
///
/// [`SegmentError::Io`].
pub fn start_anew(dir: &Path, options: &SegmentOptions) -> Result<(), SegmentError> {
    let storage = &*options.storage;
    truncate_epochs(storage, dir, Vec::clear)?;
    for base_offset in list_segments(dir)?.into_iter().rev() {
        remove_segment(storage, dir, base_offset)?;
    }
    Ok(())
}

/// Removes the segments of which every record is below `log_start_offset`, never the last one; returns
/// how many they were. Of the epochs, those are left that records at or behind that offset have.
///
/// The caller has stored the offset in the checkpoint of log start offsets, so that a crash leaves
/// segments that are removed later, and no records that come back.
///
/// # Errors
///
/// [`SegmentError::Io`]. May be called again.
pub fn remove_below(
    dir: &Path,
    log_start_offset: i64,
    options: &SegmentOptions,
) -> Result<usize, SegmentError> {
    let storage = &*options.storage;
    let base_offsets = list_segments(dir)?;
    let is_below = |pair: &&[i64]| pair[1] <= log_start_offset;
    let removed = base_offsets.windows(2).take_while(is_below).count();
    for &base_offset in &base_offsets[..removed] {
        remove_segment(storage, dir, base_offset)?;
    }
    truncate_epochs(storage, dir, |epochs| {
        let begun = epochs.partition_point(|entry| entry.start_offset <= log_start_offset);
        if let Some(last) = begun.checked_sub(1) {
            epochs.drain(..last);
            epochs[0].start_offset = log_start_offset;
        }
    })?;
    Ok(removed)
}

/// Where a segment is to be cut off.
struct Cut {
    base_offset: i64,
    next_offset: i64,
    len: u64,
    is_shorter: bool,
    indexes: IndexBuilder,
}

fn find_cut(
    dir: &Path,
    base_offset: i64,
    offset: i64,
    options: &SegmentOptions,
) -> Result<Cut, SegmentError> {
    let reader = SegmentReader::open(dir, base_offset)?;
    let mut batches = reader.batches(0)?;
    let mut cut = Cut {
        base_offset,
        next_offset: base_offset,
        len: 0,
        is_shorter: false,
        indexes: IndexBuilder::new(base_offset, options.index_interval_bytes),
    };
    while let Some((position, batch)) = batches.next_batch()? {
        if batch.next_offset() > offset {
            cut.is_shorter = true;
            break;
        }
        cut.indexes.observe(batch.header(), position, batch.len());
        cut.len = position + batch.len() as u64;
        cut.next_offset = batch.next_offset();
    }
    Ok(cut)
}

fn finish_cut(
    dir: &Path,
    cut: Cut,
    storage: &dyn Storage,
) -> Result<RecoveredSegment, SegmentError> {
    if cut.is_shorter {
        let log = segment_path(dir, cut.base_offset, SegmentFile::Log);
        cut_off(storage, &log, cut.len)?;
    }
    let scanned = Scanned {
        base_offset: cut.base_offset,
        next_offset: cut.next_offset,
        len: cut.len,
        indexes: cut.indexes,
    };
    scanned.write_indexes(dir, storage, &mut Vec::new())
}

fn truncate_epochs(
    storage: &dyn Storage,
    dir: &Path,
    change: impl FnOnce(&mut Vec<EpochEntry>),
) -> Result<Vec<EpochEntry>, SegmentError> {
    let path = dir.join(LEADER_EPOCH_CHECKPOINT);
    let stored = read_leader_epochs(&path)?;
    let mut epochs = stored.clone();
    change(&mut epochs);
    if epochs != stored {
        write_leader_epochs(storage, &path, &epochs)?;
    }
    Ok(epochs)
}

/// Removes a segment's files, the log last: without it, the others would belong to nothing.
fn remove_segment(storage: &dyn Storage, dir: &Path, base_offset: i64) -> Result<(), SegmentError> {
    for file in [SegmentFile::Index, SegmentFile::TimeIndex, SegmentFile::Log] {
        let path = segment_path(dir, base_offset, file);
        match storage.remove(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => result.map_err(SegmentError::io(IoOp::Remove, &path))?,
        }
    }
    sync_dir(storage, dir)
}
