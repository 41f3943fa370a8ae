//! Reads a partition's directory after a crash.
//!
//! Every batch is read and must have a valid CRC, begin at the next offset, and carry a leader
//! epoch that does not fall and that `leader-epoch-checkpoint` agrees with. What a crash during an
//! append leaves is damage at the very end: it is cut off and reported. Anything else is refused.
//! All checks come first: a refused directory is as it was.

use std::path::{Path, PathBuf};

use crate::record::{BatchHeader, BatchView, HEADER_LEN};

use super::checkpoint::{
    EpochEntry, read_leader_epochs, replace_file, sync_dir, write_leader_epochs,
};
use super::error::{IoOp, SegmentError, SegmentFault};
use super::index::IndexBuilder;
use super::layout::{LEADER_EPOCH_CHECKPOINT, SegmentFile, list_segments, segment_path};
use super::reader::{SegmentReader, read_if_exists};
use super::storage::{OpenMode, Storage};
use super::writer::SegmentOptions;

/// What a partition's directory holds.
#[derive(Debug)]
pub struct Recovery {
    /// The segments in order of their offsets; the last one can be resumed.
    pub segments: Vec<RecoveredSegment>,
    /// The first offset that counts.
    pub log_start_offset: i64,
    /// The offset that the next batch gets. Below the log start offset if less than that is left.
    pub log_end_offset: i64,
    /// The leader epochs that begin in the log or at its end, and their first offsets.
    pub epochs: Vec<EpochEntry>,
    /// Leader epochs of the checkpoint that begin behind the end of the files. They are still in it:
    /// whether the log goes on in memory is not known here.
    pub epochs_beyond: Vec<EpochEntry>,
    /// What was cut off at the end, if anything.
    pub torn: Option<TornTail>,
    /// Index and checkpoint files that were missing or wrong and have been written anew.
    pub rebuilt: Vec<PathBuf>,
}

/// One segment, read and found valid.
#[derive(Debug)]
pub struct RecoveredSegment {
    /// The offset that it begins with.
    pub base_offset: i64,
    /// The offset after its last record.
    pub next_offset: i64,
    /// Bytes of its log.
    pub len: u64,
    pub(super) index_len: u64,
    pub(super) time_index_len: u64,
    pub(super) indexes: IndexBuilder,
}

impl RecoveredSegment {
    /// Returns the largest timestamp in it, -1 if there is none.
    pub fn max_timestamp(&self) -> i64 {
        self.indexes.max_timestamp()
    }
}

/// Bytes that an append cut short had left at the end of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TornTail {
    /// The segment file.
    pub path: PathBuf,
    /// Where the bytes began: the file's length now.
    pub position: u64,
    /// How many they were.
    pub dropped_len: u64,
    /// Why they are not part of the log.
    pub fault: SegmentFault,
    /// Where they are kept; `None` if they were all zero.
    pub kept: Option<PathBuf>,
}

impl std::fmt::Display for TornTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            path,
            position,
            dropped_len,
            fault,
            kept,
        } = self;
        write!(
            f,
            "{} cut off at position {position}, {dropped_len} bytes dropped: {fault}",
            path.display()
        )?;
        match kept {
            Some(kept) => write!(f, "; they are kept in {}", kept.display()),
            None => Ok(()),
        }
    }
}

/// Reads and repairs the directory of a partition; a missing one is an empty partition.
///
/// `log_start_offset` is what is stored of it, 0 if nothing is: records below are there only until their
/// segment is removed.
///
/// Reads every byte of the log once. Afterwards indexes and epochs agree with the log, and
/// [`SegmentWriter::resume`](super::SegmentWriter::resume) continues the last segment.
///
/// # Errors
///
/// - [`SegmentError::Contradiction`] or [`SegmentError::EpochMismatch`] if this is not what a
///   crash leaves. Nothing has been changed.
/// - [`SegmentError::Checkpoint`] or [`SegmentError::Name`] for files in a foreign format.
/// - [`SegmentError::Io`].
pub fn recover(
    dir: &Path,
    log_start_offset: i64,
    options: &SegmentOptions,
) -> Result<Recovery, SegmentError> {
    let base_offsets = list_segments(dir)?;
    let epochs = Epochs::read(dir.join(LEADER_EPOCH_CHECKPOINT))?;
    let mut scan = Scan::new(dir, &base_offsets, log_start_offset, epochs, options);
    let mut scanned = Vec::new();
    scan.segments(&base_offsets, &mut scanned)?;
    scan.repair(scanned)
}

/// What would have to be given up for [`recover`] to succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Obstacle {
    /// Index of the segment that the log must end in, among those there are.
    pub(super) segment: usize,
    /// Where in that segment.
    pub(super) position: u64,
    /// What is wrong there.
    pub(super) cause: String,
}

/// Finds the first place that [`recover`] refuses, whatever the checkpoint of leader epochs says; before
/// it, the offset that the log ends with there, or at all.
pub(super) fn find_obstacle(
    dir: &Path,
    options: &SegmentOptions,
) -> Result<(i64, Option<Obstacle>), SegmentError> {
    let base_offsets = list_segments(dir)?;
    let mut scan = Scan::new(dir, &base_offsets, 0, Epochs::default(), options);
    let Err(error) = scan.segments(&base_offsets, &mut Vec::new()) else {
        return Ok((scan.next_offset, None));
    };
    let SegmentError::Contradiction {
        path,
        position,
        fault,
        ..
    } = &error
    else {
        return Err(error);
    };
    let is_of = |&base: &i64| segment_path(dir, base, SegmentFile::Log) == *path;
    match base_offsets.iter().position(is_of) {
        Some(segment) => {
            let cause = format!("{} at position {position}: {fault}", path.display());
            let obstacle = Obstacle {
                segment,
                position: *position,
                cause,
            };
            Ok((scan.next_offset, Some(obstacle)))
        }
        None => Err(error),
    }
}

/// Whether the checkpoint of leader epochs agrees with the log up to `log_end_offset`, or all of it.
pub(super) fn epochs_agree(
    dir: &Path,
    options: &SegmentOptions,
    log_end_offset: i64,
) -> Result<bool, SegmentError> {
    let base_offsets = list_segments(dir)?;
    let epochs = match Epochs::read(dir.join(LEADER_EPOCH_CHECKPOINT)) {
        Ok(epochs) => epochs,
        Err(SegmentError::Checkpoint { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    let mut scan = Scan::new(dir, &base_offsets, 0, epochs, options);
    match scan.segments(&base_offsets, &mut Vec::new()) {
        Err(SegmentError::EpochMismatch { offset, .. }) => Ok(offset >= log_end_offset),
        Ok(()) | Err(SegmentError::Contradiction { .. }) => Ok(true),
        Err(error) => Err(error),
    }
}

struct Scan<'d> {
    dir: &'d Path,
    options: &'d SegmentOptions,
    next_offset: i64,
    log_start_offset: i64,
    epochs: Epochs,
    torn: Option<TornTail>,
}

/// A segment whose batches have been read.
pub(super) struct Scanned {
    pub(super) base_offset: i64,
    pub(super) next_offset: i64,
    pub(super) len: u64,
    pub(super) indexes: IndexBuilder,
}

impl<'d> Scan<'d> {
    fn new(
        dir: &'d Path,
        base_offsets: &[i64],
        log_start_offset: i64,
        epochs: Epochs,
        options: &'d SegmentOptions,
    ) -> Self {
        let first = base_offsets.first().copied().unwrap_or(log_start_offset);
        Self {
            dir,
            options,
            next_offset: first,
            log_start_offset: log_start_offset.max(first),
            epochs,
            torn: None,
        }
    }

    /// Reads one segment after the other; stops at the first that is refused.
    fn segments(
        &mut self,
        base_offsets: &[i64],
        scanned: &mut Vec<Scanned>,
    ) -> Result<(), SegmentError> {
        for (number, &base_offset) in base_offsets.iter().enumerate() {
            let next = base_offsets.get(number + 1).copied();
            scanned.push(self.segment(base_offset, next)?);
        }
        Ok(())
    }

    /// Reads one segment to its end or, if it is the last one, to its torn tail.
    fn segment(&mut self, base_offset: i64, next: Option<i64>) -> Result<Scanned, SegmentError> {
        let reader = SegmentReader::open(self.dir, base_offset)?;
        let mut indexes = IndexBuilder::new(base_offset, self.options.index_interval_bytes);
        let mut batches = reader.batches(0)?;
        let torn = loop {
            match batches.next_batch() {
                Ok(None) => break None,
                Ok(Some((position, batch))) => match batch.verify_crc() {
                    Ok(()) => {
                        self.place(reader.path(), position, &batch)?;
                        check_reach(&reader, &indexes, position, &batch)?;
                        indexes.observe(batch.header(), position, batch.len());
                    }
                    Err(error) => break Some((position, error.into())),
                },
                Err(SegmentError::Damaged {
                    position, fault, ..
                }) => break Some((position, fault)),
                Err(error) => return Err(error),
            }
        };
        let end = reader.len()?;
        let len = torn.as_ref().map_or(end, |(position, _)| *position);
        if let Some((position, fault)) = torn {
            let path = reader.path().to_owned();
            if let Some(evidence) = self.evidence(&reader, position, next)? {
                return Err(SegmentError::Contradiction {
                    path,
                    position,
                    fault,
                    evidence,
                });
            }
            self.torn = Some(TornTail {
                path,
                position,
                dropped_len: end - position,
                fault,
                kept: None,
            });
        }
        if let Some(next) = next.filter(|&next| next != self.next_offset) {
            return Err(SegmentError::Contradiction {
                path: segment_path(self.dir, next, SegmentFile::Log),
                position: 0,
                fault: SegmentFault::Offset {
                    expected: self.next_offset,
                    found: next,
                },
                evidence: "it is there, and the segment before it ends without damage".to_owned(),
            });
        }
        Ok(Scanned {
            base_offset,
            next_offset: self.next_offset,
            len,
            indexes,
        })
    }

    /// Checks a batch with a valid CRC against everything before it.
    fn place(
        &mut self,
        path: &Path,
        position: u64,
        batch: &BatchView<'_>,
    ) -> Result<(), SegmentError> {
        let contradiction = |fault| SegmentError::Contradiction {
            path: path.to_owned(),
            position,
            fault,
            evidence: "the batch's CRC is valid".to_owned(),
        };
        let (expected, found) = (self.next_offset, batch.base_offset());
        if expected != found {
            return Err(contradiction(SegmentFault::Offset { expected, found }));
        }
        // Epochs of records that no longer count have been taken off the checkpoint.
        if found >= self.log_start_offset {
            self.epochs.check(path, batch, contradiction)?;
        }
        self.next_offset = batch.next_offset();
        Ok(())
    }

    /// What shows that the damage at `position` is not the end of the log.
    fn evidence(
        &self,
        reader: &SegmentReader,
        position: u64,
        next: Option<i64>,
    ) -> Result<Option<String>, SegmentError> {
        if let Some(next) = next {
            return Ok(Some(format!(
                "a segment follows that begins at offset {next}"
            )));
        }
        let found = find_batch(reader, position + 1, self.next_offset)?;
        Ok(found.map(|(position, offset)| {
            format!("position {position} has a valid batch that begins at offset {offset}")
        }))
    }

    /// Changes the files, now that all of them have been read.
    fn repair(mut self, scanned: Vec<Scanned>) -> Result<Recovery, SegmentError> {
        let storage = &*self.options.storage;
        let mut rebuilt = Vec::new();
        if let Some(torn) = &mut self.torn {
            torn.kept = keep_aside(storage, &torn.path, torn.position)?;
            cut_off(storage, &torn.path, torn.position)?;
        }
        let mut segments = Vec::new();
        let count = scanned.len();
        for (number, mut segment) in scanned.into_iter().enumerate() {
            if number + 1 < count {
                segment.indexes.put_time_entry();
            }
            segments.push(segment.write_indexes(self.dir, storage, &mut rebuilt)?);
        }
        let (epochs, epochs_beyond) =
            self.epochs
                .finish(self.next_offset, storage, &mut rebuilt)?;
        Ok(Recovery {
            segments,
            log_start_offset: self.log_start_offset,
            log_end_offset: self.next_offset,
            epochs,
            epochs_beyond,
            torn: self.torn,
            rebuilt,
        })
    }
}

impl Scanned {
    /// Compares the index files with what the log asks for and replaces those that differ.
    pub(super) fn write_indexes(
        mut self,
        dir: &Path,
        storage: &dyn Storage,
        rebuilt: &mut Vec<PathBuf>,
    ) -> Result<RecoveredSegment, SegmentError> {
        let mut write = |file, bytes: &[u8]| {
            let path = segment_path(dir, self.base_offset, file);
            if !path.exists() || read_if_exists(&path)? != bytes {
                replace_file(storage, &path, bytes)?;
                rebuilt.push(path);
            }
            Ok(bytes.len() as u64)
        };
        let index_len = write(SegmentFile::Index, &self.indexes.offsets)?;
        let time_index_len = write(SegmentFile::TimeIndex, &self.indexes.times)?;
        self.indexes.offsets.clear();
        self.indexes.times.clear();
        Ok(RecoveredSegment {
            base_offset: self.base_offset,
            next_offset: self.next_offset,
            len: self.len,
            index_len,
            time_index_len,
            indexes: self.indexes,
        })
    }
}

/// Refuses a segment that its own indexes could not describe.
fn check_reach(
    reader: &SegmentReader,
    indexes: &IndexBuilder,
    position: u64,
    batch: &BatchView<'_>,
) -> Result<(), SegmentError> {
    let is_reached =
        indexes.relative(batch.last_offset()).is_some() && i32::try_from(position).is_ok();
    if is_reached {
        Ok(())
    } else {
        Err(SegmentError::Full {
            path: reader.path().to_owned(),
        })
    }
}

/// Looks for a valid batch that could continue the log, at any position from `position` on.
///
/// A header must fit before a CRC is computed, so that random bytes cost little.
fn find_batch(
    reader: &SegmentReader,
    position: u64,
    next_offset: i64,
) -> Result<Option<(u64, i64)>, SegmentError> {
    const WINDOW_LEN: usize = 1 << 20;

    let end = reader.len()?;
    let mut window = vec![0; WINDOW_LEN + HEADER_LEN];
    let mut start = position;
    while start < end {
        let len = reader.read_at(start, &mut window)?;
        for (at, bytes) in window[..len].windows(HEADER_LEN).enumerate() {
            let header = BatchHeader::read(bytes.first_chunk().expect("a window is a header long"));
            if header.magic != 2 || header.base_offset < next_offset {
                continue;
            }
            let at = start + at as u64;
            let Ok(len) = header.check() else { continue };
            if at + len as u64 <= end && batch_is_valid(reader, at)? {
                return Ok(Some((at, header.base_offset)));
            }
        }
        start += WINDOW_LEN as u64;
    }
    Ok(None)
}

fn batch_is_valid(reader: &SegmentReader, position: u64) -> Result<bool, SegmentError> {
    match reader.batches(position)?.next_batch() {
        Ok(batch) => Ok(batch.is_some_and(|(_, batch)| batch.verify_crc().is_ok())),
        Err(SegmentError::Damaged { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Copies the bytes of a log file from `position` on to a file beside it, named after where they were
/// and what they are; returns its path, or `None` if there are only zeros.
pub(super) fn keep_aside(
    storage: &dyn Storage,
    log: &Path,
    position: u64,
) -> Result<Option<PathBuf>, SegmentError> {
    let reader = SegmentReader::open_file(log)?;
    let mut chunk = vec![0; 1 << 20];
    let (mut at, mut end, mut crc) = (position, position, 0);
    loop {
        let len = reader.read_at(at, &mut chunk)?;
        if let Some(last) = chunk[..len].iter().rposition(|&byte| byte != 0) {
            end = at + last as u64 + 1;
        }
        crc = crc32c::crc32c_append(crc, &chunk[..len]);
        at += len as u64;
        if len < chunk.len() {
            break;
        }
    }
    if end == position {
        return Ok(None);
    }
    let path = log.with_extension(format!("{position}-{crc:08x}.torn"));
    let file = storage
        .open(&path, OpenMode::Empty)
        .map_err(SegmentError::io(IoOp::Create, &path))?;
    let mut at = position;
    while at < end {
        let read = reader.read_at(at, &mut chunk)? as u64;
        let len = read.min(end - at);
        let bytes = &chunk[..usize::try_from(len).expect("within the chunk")];
        storage
            .write_at(&file, bytes, at - position)
            .map_err(SegmentError::io_at(IoOp::Write, &path, at - position))?;
        at += len;
    }
    storage
        .sync(&file)
        .map_err(SegmentError::io(IoOp::Sync, &path))?;
    sync_dir(storage, path.parent().unwrap_or(&path))?;
    Ok(Some(path))
}

/// Cuts a log file off, and waits until that is on the device.
pub(super) fn cut_off(
    storage: &dyn Storage,
    log: &Path,
    position: u64,
) -> Result<(), SegmentError> {
    let file = storage
        .open(log, OpenMode::Existing)
        .map_err(SegmentError::io(IoOp::Open, log))?;
    storage
        .set_len(&file, position)
        .map_err(SegmentError::io_at(IoOp::Truncate, log, position))?;
    storage
        .sync(&file)
        .map_err(SegmentError::io(IoOp::Sync, log))
}

/// The leader epochs: those of the checkpoint, continued by those of the log.
#[derive(Default)]
struct Epochs {
    path: PathBuf,
    stored: Vec<EpochEntry>,
    /// `stored`, and behind it what only the log knows.
    entries: Vec<EpochEntry>,
    /// Epoch of the last batch, `None` before the first one.
    last: Option<i32>,
}

impl Epochs {
    fn read(path: PathBuf) -> Result<Self, SegmentError> {
        let stored = read_leader_epochs(&path)?;
        Ok(Self {
            path,
            entries: stored.clone(),
            stored,
            last: None,
        })
    }

    /// Checks a batch's epoch; -1 stands for a batch that no leader stamped.
    fn check(
        &mut self,
        log: &Path,
        batch: &BatchView<'_>,
        contradiction: impl Fn(SegmentFault) -> SegmentError,
    ) -> Result<(), SegmentError> {
        let (previous, found) = (self.last.unwrap_or(-1), batch.partition_leader_epoch());
        if found < previous {
            return Err(contradiction(SegmentFault::Epoch { previous, found }));
        }
        self.last = Some(found);
        let offset = batch.base_offset();
        let behind = self
            .entries
            .partition_point(|entry| entry.start_offset <= offset);
        let expected = behind
            .checked_sub(1)
            .map_or(-1, |index| self.entries[index].epoch);
        if found == expected {
            return Ok(());
        }
        // The checkpoint may lag behind the log by whole epochs; it cannot be ahead or between.
        if found > expected && behind == self.entries.len() {
            self.entries.push(EpochEntry {
                epoch: found,
                start_offset: offset,
            });
            return Ok(());
        }
        Err(SegmentError::EpochMismatch {
            checkpoint: self.path.clone(),
            log: log.to_owned(),
            offset,
            expected,
            found,
        })
    }

    /// Stores epochs that only the log knew. Separates those that begin behind its end.
    fn finish(
        mut self,
        log_end_offset: i64,
        storage: &dyn Storage,
        rebuilt: &mut Vec<PathBuf>,
    ) -> Result<(Vec<EpochEntry>, Vec<EpochEntry>), SegmentError> {
        if self.entries != self.stored {
            write_leader_epochs(storage, &self.path, &self.entries)?;
            rebuilt.push(self.path);
        }
        let within = self
            .entries
            .partition_point(|entry| entry.start_offset <= log_end_offset);
        let beyond = self.entries.split_off(within);
        Ok((self.entries, beyond))
    }
}
