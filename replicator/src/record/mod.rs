//! Kafka record batches, version 2: the bytes that log, image, wire and file have in common.
//!
//! A batch is a fixed header of 61 bytes, big endian, and the records behind it:
//!
//! ```text
//! byte  0        8             12              16     17     21          23                 27
//!       +--------+-------------+---------------+------+------+-----------+------------------+
//!       | base   | batch       | partition     | magic| crc  | attributes| last_offset      |
//!       | offset | length      | leader_epoch  | = 2  |      |           | _delta           |
//!       | i64    | i32         | i32           | i8   | u32  | i16       | i32              |
//!       +--------+-------------+---------------+------+------+-----------+------------------+
//!       27              35             43            51              53             57        61
//!       +---------------+--------------+-------------+---------------+--------------+---------+
//!       | base          | max          | producer_id | producer_epoch| base_sequence| records |
//!       | _timestamp    | _timestamp   |             |               |              | _count  |
//!       | i64           | i64          | i64         | i16           | i32          | i32     |
//!       +---------------+--------------+-------------+---------------+--------------+---------+
//!       61
//!       +--------- records_count times, compressed as a whole if attributes say so ------------+
//!       | length varint | attributes i8 | timestamp_delta varlong | offset_delta varint         |
//!       | key_len varint (-1: null) | key | value_len varint (-1: null) | value                 |
//!       | headers_count varint | { key_len varint | key | value_len varint | value } ...        |
//!       +--------------------------------------------------------------------------------------+
//! ```
//!
//! - `batch_length` counts what follows it: the batch occupies `12 + batch_length` bytes.
//! - The CRC-32C covers byte 21 to the end. What the leader assigns lies before it, so
//!   [`stamp`] gives a batch its place in the log without touching the checksum. For the same
//!   reason a verified CRC says nothing about base offset, length or epoch.
//! - `attributes`: bits 0-2 codec, bit 3 timestamp type, bit 4 transactional, bit 5 control,
//!   bit 6 delete horizon.
//! - Integers named varint are zigzag encoded, 7 bits a byte, least significant first.
//!
//! What this module does not do: it knows no file, no network and no log. Nothing here allocates
//! by a number found in the bytes, and no bytes make it panic: [`BatchView`] borrows, and
//! [`BatchView::decompress`] stops at the limit it is given.
//!
//! ```
//! use replicator::record::{BatchBuilder, BatchView, stamp};
//!
//! let mut builder = BatchBuilder::new(16 * 1024);
//! assert!(builder.append(1_700_000_000_000, Some(b"N14228"), Some(b"EWR,IAH"), &[]));
//! let mut bytes = builder.build().to_vec();
//! stamp(&mut bytes, 5194, 3);
//!
//! let (batch, rest) = BatchView::parse(&bytes)?;
//! assert!(rest.is_empty());
//! batch.verify_crc()?;
//! let record = batch.records()?.next().unwrap()?;
//! assert_eq!((record.offset, record.value), (5194, Some(b"EWR,IAH".as_slice())));
//! # Ok::<(), replicator::record::BatchError>(())
//! ```
//!
//! # References
//!
//! Kafka protocol guide, "Record Batch" and "Record"; KIP-98, KIP-534.

mod batch;
mod builder;
mod compression;
mod control;
mod error;
mod header;
mod in_place;
mod iter;
pub mod partitioner;
#[cfg(test)]
mod tests;
mod varint;

pub use batch::{BatchView, batch_len, stamp};
pub use builder::BatchBuilder;
pub use compression::Compression;
pub use control::ControlRecord;
pub use error::{BatchError, RecordFault};
pub use header::{
    Attributes, BATCH_LEN_PREFIX, BatchHeader, CRC_RANGE_START, HEADER_LEN, STAMPED_LEN,
    TimestampType,
};
pub use in_place::InPlaceBuilder;
pub use iter::{HeaderIter, Record, RecordHeader, RecordIter};
