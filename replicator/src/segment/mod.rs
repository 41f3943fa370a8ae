//! A partition's log in files, in Kafka's formats: what Kafka's tools read, and what they write.
//!
//! ```text
//! DATA_DIR/
//!   replication-offset-checkpoint        high watermarks, "topic partition offset" a line
//!   log-start-offset-checkpoint          the same for the first offset that counts
//!   flights-0/                           one directory per partition: TOPIC-PARTITION
//!     leader-epoch-checkpoint            "epoch start_offset" a line
//!     00000000000000000000.log           record batches back to back, base offset as name
//!     00000000000000000000.index         sparse: offset -> position in the .log
//!     00000000000000000000.timeindex     sparse: timestamp -> offset
//!     00000000000000005194.log           the next segment begins where the last one ends
//! ```
//!
//! | file         | entry                                                            | bytes |
//! | ------------ | ---------------------------------------------------------------- | ----- |
//! | `.index`     | last offset of a batch minus base offset i32, its position i32   | 8     |
//! | `.timeindex` | largest timestamp so far i64, last offset of its batch - base i32 | 12    |
//!
//! Both are big endian and rise strictly. An entry is written for a batch before which more than
//! `index_interval_bytes` bytes have passed since the last entry; a sealed segment's `.timeindex`
//! ends with the segment's largest timestamp.
//!
//! - [`SegmentWriter`] appends byte ranges of whole batches: what images hold, in their order.
//! - [`SegmentReader`] finds offsets and timestamps and reads.
//! - [`recover`](recover()) reads a directory after a crash. Records are never dropped silently: bytes
//!   that were cut off while being appended are truncated, kept aside and reported; damage with valid
//!   records behind it is refused, and nothing is changed. A [`Salvage`] gives up what follows it.
//! - [`truncate`](truncate()) cuts the log's end off, [`remove_below`] takes whole segments off its start.
//! - Every change goes through a [`Storage`], so that tests can crash or fail between any two.
//!
//! What this module does not do: it decides neither when to sync nor when to roll, and it knows
//! neither images nor replicas.

mod checkpoint;
mod error;
#[cfg(test)]
pub(crate) mod fault;
mod index;
mod layout;
mod reader;
mod recover;
mod salvage;
mod storage;
#[cfg(test)]
mod tests;
mod truncate;
#[cfg(test)]
mod truncate_tests;
mod writer;

pub(crate) use checkpoint::replace_file;
pub use checkpoint::{
    EpochEntry, PartitionOffsets, read_leader_epochs, read_partition_offsets, write_leader_epochs,
    write_partition_offsets,
};
pub use error::{IoOp, SegmentError, SegmentFault};
pub use index::{INDEX_ENTRY_LEN, IndexEntry, TIME_INDEX_ENTRY_LEN, TimeIndexEntry};
pub use layout::{
    HIGH_WATERMARK_CHECKPOINT, LEADER_EPOCH_CHECKPOINT, LOG_START_CHECKPOINT, SegmentFile,
    list_segments, parse_partition_dir, parse_segment_path, partition_dir, segment_path,
};
pub use reader::{BatchPosition, BatchScanner, SegmentReader};
pub use recover::{RecoveredSegment, Recovery, TornTail, recover};
pub use salvage::Salvage;
pub use storage::{Disk, OpenMode, Storage};
pub use truncate::{Truncated, remove_below, start_anew, truncate};
pub use writer::{SegmentOptions, SegmentWriter};
