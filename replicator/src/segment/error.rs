//! What can go wrong with a partition's files.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::record::BatchError;

use super::layout::parse_partition_dir;

/// Why an operation on a partition's files failed; each names the file.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The file system refused; a retry helps once the cause is gone.
    #[error("cannot {op} {}{}: {source}{}", path.display(), at(*position), remedy(source))]
    Io {
        /// What was attempted.
        op: IoOp,
        /// The file or directory.
        path: PathBuf,
        /// Byte position in the file, where there is one.
        position: Option<u64>,
        /// The system's answer.
        source: io::Error,
    },
    /// Bytes to append, or read from a segment, are not the batches they should be.
    #[error("{} at position {position}: {fault}", path.display())]
    Damaged {
        /// The segment file.
        path: PathBuf,
        /// Where the batch at fault begins.
        position: u64,
        /// What is wrong with it.
        fault: SegmentFault,
    },
    /// Records follow damage, so this is no append cut short by a crash. Nothing was changed.
    #[error(
        "{} at position {position}: {fault}; yet {evidence}. No crash during an append leaves \
         this, so nothing was changed. Move {} away and let this replica copy the partition from \
         another one; where there is none, `{}` says what would be lost by going on without the rest",
        path.display(),
        path.parent().unwrap_or(path).display(),
        recover_command(path.parent().unwrap_or(path))
    )]
    Contradiction {
        /// The segment file.
        path: PathBuf,
        /// Where the damage begins.
        position: u64,
        /// What is wrong there.
        fault: SegmentFault,
        /// What shows that it is not the end of the log.
        evidence: String,
    },
    /// Log and `leader-epoch-checkpoint` disagree. Nothing was changed.
    #[error(
        "{} says that offset {offset} belongs to leader epoch {expected}, {} has epoch {found} \
         there. Nothing was changed. Copy the partition from another replica; if the log is the \
         one to trust, `{}` rebuilds the checkpoint from it",
        checkpoint.display(), log.display(),
        recover_command(log.parent().unwrap_or(log))
    )]
    EpochMismatch {
        /// The checkpoint file.
        checkpoint: PathBuf,
        /// The segment file.
        log: PathBuf,
        /// Base offset of the batch.
        offset: i64,
        /// Epoch by the checkpoint, -1 if it begins later.
        expected: i32,
        /// Epoch in the batch.
        found: i32,
    },
    /// A checkpoint file is not in Kafka's format.
    #[error("{} line {line}: {cause}; restore the file from a backup or remove it", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong.
        cause: String,
    },
    /// Files and log memory together hold less than what a checkpoint or a tail says, although the memory
    /// is that of the last run. Nothing was changed.
    #[error(
        "{}: the log ends at offset {log_end_offset}, yet {evidence}. A crash does not leave this while the \
         log memory is intact, so the node does not start. Move the directory away and let this replica \
         copy the partition from another one; where there is none, `{}` says what would be lost",
        dir.display(),
        recover_command(dir)
    )]
    Missing {
        /// The partition's directory.
        dir: PathBuf,
        /// One past the last offset found.
        log_end_offset: i64,
        /// What says that there should be more.
        evidence: String,
    },
    /// A log is never cut off below its start.
    #[error("{}: cannot truncate to offset {offset}, the log starts at {log_start_offset}", dir.display())]
    BelowLogStart {
        /// The partition's directory.
        dir: PathBuf,
        /// The offset asked for, or the start of the batch that contains it.
        offset: i64,
        /// The first offset.
        log_start_offset: i64,
    },
    /// A name is not the one of a segment file.
    #[error(
        "{} is not a segment: the name must be 20 digits, the base offset, and .log, .index or \
         .timeindex", path.display()
    )]
    Name {
        /// The name.
        path: PathBuf,
    },
    /// A segment would outgrow the 32-bit positions and offsets of its indexes.
    #[error("{} cannot grow past 2 GiB or 2^31 offsets: roll to a new segment", path.display())]
    Full {
        /// The segment file.
        path: PathBuf,
    },
}

/// What is wrong at one place of a segment.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentFault {
    /// The bytes are no batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The batch does not begin where the one before it ends.
    #[error("batch begins at offset {found}, {expected} is next")]
    Offset {
        /// The next offset.
        expected: i64,
        /// The batch's base offset.
        found: i64,
    },
    /// The leader epoch is lower than the one of the batch before.
    #[error("batch has leader epoch {found}, lower than {previous} before it")]
    Epoch {
        /// The epoch before.
        previous: i32,
        /// The batch's epoch.
        found: i32,
    },
    /// An entry of an index is not higher than the one before it, or cut off.
    #[error("index entry does not rise, or is cut off")]
    IndexEntry,
}

/// What was attempted on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoOp {
    /// Creating a file or directory.
    Create,
    /// Opening a file.
    Open,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// `fsync` or `fdatasync`.
    Sync,
    /// Cutting off.
    Truncate,
    /// Renaming.
    Rename,
    /// Removing.
    Remove,
}

impl fmt::Display for IoOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Truncate => "truncate",
            Self::Rename => "rename",
            Self::Remove => "remove",
        })
    }
}

impl SegmentError {
    /// Turns the system's answer into an error that names `path`.
    pub(super) fn io(op: IoOp, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            op,
            path: path.to_owned(),
            position: None,
            source,
        }
    }

    /// As [`io`](Self::io), with the place in the file.
    pub(super) fn io_at(op: IoOp, path: &Path, position: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            op,
            path: path.to_owned(),
            position: Some(position),
            source,
        }
    }

    /// Says whether the file system is out of space or quota or a limit is reached, so that making room helps.
    pub fn is_out_of_space(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        let no_room = [Errno::NOSPC, Errno::DQUOT, Errno::FBIG];
        errno(source).is_some_and(|errno| no_room.contains(&errno))
    }
}

/// The command that tells what a repair of a partition's directory would lose, and then does it.
fn recover_command(dir: &Path) -> String {
    let data_dir = dir.parent().unwrap_or(Path::new(".")).display();
    match parse_partition_dir(dir) {
        Some((topic, partition)) => {
            format!("farlog recover --data-dir {data_dir} --topic {topic} --partition {partition}")
        }
        None => format!("farlog recover --data-dir {data_dir} --topic ... --partition ..."),
    }
}

fn errno(error: &io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

fn at(position: Option<u64>) -> String {
    position.map_or(String::new(), |position| format!(" at position {position}"))
}

/// What to do about an errno, where that is known.
fn remedy(error: &io::Error) -> &'static str {
    match errno(error) {
        Some(Errno::NOSPC) => {
            ". Free space on that file system; what was appended before is unharmed"
        }
        Some(Errno::DQUOT) => ". Raise the quota; what was appended before is unharmed",
        Some(Errno::IO) => {
            ". The device failed: check it (dmesg), do not trust what was not synced before, and \
             copy the partition from another replica"
        }
        Some(Errno::ROFS) => {
            ". The file system is read-only: remount it, or choose another directory"
        }
        Some(Errno::ACCESS | Errno::PERM) => ". Check owner and mode of the data directory",
        Some(Errno::FBIG) => ". Raise the file size limit (ulimit -f)",
        Some(Errno::MFILE | Errno::NFILE) => ". Raise the limit on open files (ulimit -n)",
        _ => "",
    }
}
