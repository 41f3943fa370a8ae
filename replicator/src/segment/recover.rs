//! Reads a partition's directory after a crash.
//!
//! Every batch is read and must have a valid CRC, begin at the next offset, and carry a leader
//! epoch that does not fall and that `leader-epoch-checkpoint` agrees with. What a crash during an
//! append leaves is damage at the very end: it is cut off and reported. Anything else is refused.
//! All checks come first: a refused directory is as it was.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use crate::record::{BatchHeader, BatchView, HEADER_LEN};

use super::checkpoint::{EpochEntry, read_leader_epochs, replace_file, write_leader_epochs};
use super::error::{IoOp, SegmentError, SegmentFault};
use super::index::IndexBuilder;
use super::layout::{LEADER_EPOCH_CHECKPOINT, SegmentFile, list_segments, segment_path};
use super::reader::{SegmentReader, read_if_exists};
use super::writer::{SegmentOptions, sync_dir};

/// What a partition's directory holds.
#[derive(Debug)]
pub struct Recovery {
    /// The segments in order of their offsets; the last one can be resumed.
    pub segments: Vec<RecoveredSegment>,
    /// The first offset that is there, 0 if there is no segment.
    pub log_start_offset: i64,
    /// The offset that the next batch gets.
    pub log_end_offset: i64,
    /// The leader epochs and their first offsets, as the checkpoint has them now.
    pub epochs: Vec<EpochEntry>,
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
}

impl std::fmt::Display for TornTail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            path,
            position,
            dropped_len,
            fault,
        } = self;
        write!(
            f,
            "{} cut off at position {position}, {dropped_len} bytes dropped: {fault}",
            path.display()
        )
    }
}

/// Reads and repairs the directory of a partition; a missing one is an empty partition.
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
pub fn recover(dir: &Path, options: SegmentOptions) -> Result<Recovery, SegmentError> {
    let base_offsets = list_segments(dir)?;
    let mut scan = Scan::new(dir, &base_offsets, options)?;
    let mut scanned = Vec::new();
    for (number, &base_offset) in base_offsets.iter().enumerate() {
        let next_base_offset = base_offsets.get(number + 1).copied();
        scanned.push(scan.segment(base_offset, next_base_offset)?);
    }
    scan.repair(scanned)
}

struct Scan<'d> {
    dir: &'d Path,
    options: SegmentOptions,
    next_offset: i64,
    log_start_offset: i64,
    epochs: Epochs,
    torn: Option<TornTail>,
}

struct Scanned {
    base_offset: i64,
    next_offset: i64,
    len: u64,
    indexes: IndexBuilder,
}

impl<'d> Scan<'d> {
    fn new(
        dir: &'d Path,
        base_offsets: &[i64],
        options: SegmentOptions,
    ) -> Result<Self, SegmentError> {
        let log_start_offset = base_offsets.first().copied().unwrap_or(0);
        Ok(Self {
            dir,
            options,
            next_offset: log_start_offset,
            log_start_offset,
            epochs: Epochs::read(dir.join(LEADER_EPOCH_CHECKPOINT))?,
            torn: None,
        })
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
        self.epochs.check(path, batch, contradiction)?;
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
    fn repair(self, scanned: Vec<Scanned>) -> Result<Recovery, SegmentError> {
        let mut rebuilt = Vec::new();
        if let Some(torn) = &self.torn {
            cut_off(torn)?;
        }
        let mut segments = Vec::new();
        let count = scanned.len();
        for (number, mut segment) in scanned.into_iter().enumerate() {
            if number + 1 < count {
                segment.indexes.put_time_entry();
            }
            segments.push(segment.write_indexes(self.dir, &mut rebuilt)?);
        }
        let epochs = self.epochs.finish(self.next_offset, &mut rebuilt)?;
        if !rebuilt.is_empty() {
            sync_dir(self.dir)?;
        }
        Ok(Recovery {
            segments,
            log_start_offset: self.log_start_offset,
            log_end_offset: self.next_offset,
            epochs,
            torn: self.torn,
            rebuilt,
        })
    }
}

impl Scanned {
    /// Compares the index files with what the log asks for and replaces those that differ.
    fn write_indexes(
        mut self,
        dir: &Path,
        rebuilt: &mut Vec<PathBuf>,
    ) -> Result<RecoveredSegment, SegmentError> {
        let mut write = |file, bytes: &[u8]| {
            let path = segment_path(dir, self.base_offset, file);
            if !path.exists() || read_if_exists(&path)? != bytes {
                replace_file(&path, bytes)?;
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

fn cut_off(torn: &TornTail) -> Result<(), SegmentError> {
    let file = OpenOptions::new().write(true).open(&torn.path);
    let file = file.map_err(SegmentError::io(IoOp::Open, &torn.path))?;
    file.set_len(torn.position).map_err(SegmentError::io_at(
        IoOp::Truncate,
        &torn.path,
        torn.position,
    ))?;
    file.sync_all()
        .map_err(SegmentError::io(IoOp::Sync, &torn.path))
}

/// The leader epochs: those of the checkpoint, continued by those of the log.
struct Epochs {
    path: PathBuf,
    stored: Vec<EpochEntry>,
    /// `stored`, and behind it what only the log knows.
    entries: Vec<EpochEntry>,
    /// Epoch of the last batch.
    last: i32,
}

impl Epochs {
    fn read(path: PathBuf) -> Result<Self, SegmentError> {
        let stored = read_leader_epochs(&path)?;
        Ok(Self {
            path,
            entries: stored.clone(),
            stored,
            last: -1,
        })
    }

    /// Checks a batch's epoch; -1 stands for a batch that no leader stamped.
    fn check(
        &mut self,
        log: &Path,
        batch: &BatchView<'_>,
        contradiction: impl Fn(SegmentFault) -> SegmentError,
    ) -> Result<(), SegmentError> {
        let (previous, found) = (self.last, batch.partition_leader_epoch());
        if found < previous {
            return Err(contradiction(SegmentFault::Epoch { previous, found }));
        }
        self.last = found;
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

    /// Drops epochs that begin behind the log's end and stores the rest if it has changed.
    fn finish(
        mut self,
        log_end_offset: i64,
        rebuilt: &mut Vec<PathBuf>,
    ) -> Result<Vec<EpochEntry>, SegmentError> {
        self.entries
            .retain(|entry| entry.start_offset <= log_end_offset);
        if self.entries != self.stored {
            write_leader_epochs(&self.path, &self.entries)?;
            rebuilt.push(self.path);
        }
        Ok(self.entries)
    }
}
