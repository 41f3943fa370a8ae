//! The fixed header of a batch: where each field lies, and its values.

use super::Compression;
use super::error::BatchError;

// Each place follows from the one before it; the sum is checked below.
const BASE_OFFSET: usize = 0;
const BATCH_LENGTH: usize = BASE_OFFSET + size_of::<i64>();
const PARTITION_LEADER_EPOCH: usize = BATCH_LENGTH + size_of::<i32>();
const MAGIC: usize = PARTITION_LEADER_EPOCH + size_of::<i32>();
const CRC: usize = MAGIC + size_of::<i8>();
const ATTRIBUTES: usize = CRC + size_of::<u32>();
const LAST_OFFSET_DELTA: usize = ATTRIBUTES + size_of::<i16>();
const BASE_TIMESTAMP: usize = LAST_OFFSET_DELTA + size_of::<i32>();
const MAX_TIMESTAMP: usize = BASE_TIMESTAMP + size_of::<i64>();
const PRODUCER_ID: usize = MAX_TIMESTAMP + size_of::<i64>();
const PRODUCER_EPOCH: usize = PRODUCER_ID + size_of::<i64>();
const BASE_SEQUENCE: usize = PRODUCER_EPOCH + size_of::<i16>();
const RECORDS_COUNT: usize = BASE_SEQUENCE + size_of::<i32>();

/// Bytes of the fixed header: 61.
pub const HEADER_LEN: usize = RECORDS_COUNT + size_of::<i32>();
/// Bytes from the start of a batch that tell its length: 12.
pub const BATCH_LEN_PREFIX: usize = PARTITION_LEADER_EPOCH;
/// First byte that the batch's CRC-32C covers: 21.
pub const CRC_RANGE_START: usize = ATTRIBUTES;
/// Bytes at the start of a batch that its own CRC leaves out: 21, base offset to CRC.
pub const STAMPED_LEN: usize = CRC_RANGE_START;

pub(super) const MAGIC_V2: i8 = 2;

const _: () = assert!(HEADER_LEN == 61);
const _: () = assert!(BATCH_LEN_PREFIX == 12);
const _: () = assert!(MAGIC == 16 && CRC == 17 && CRC_RANGE_START == 21);

/// What the timestamps of a batch mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestampType {
    /// The producer's clock when it created the record.
    CreateTime,
    /// The leader's clock when it appended the batch; all records share it.
    LogAppendTime,
}

/// The attribute bits of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes(
    /// The bits as stored.
    pub u16,
);

impl Attributes {
    const CODEC: u16 = 0b111;
    const LOG_APPEND_TIME: u16 = 1 << 3;
    /// Bit of a batch that belongs to a transaction.
    pub const TRANSACTIONAL: u16 = 1 << 4;
    /// Bit of a batch whose records are for brokers and clients, not for applications.
    pub const CONTROL: u16 = 1 << 5;
    const DELETE_HORIZON: u16 = 1 << 6;

    /// Returns the codec of the records.
    ///
    /// # Errors
    ///
    /// [`BatchError::UnknownCodec`] for 5, 6 and 7.
    pub fn compression(self) -> Result<Compression, BatchError> {
        Compression::from_bits((self.0 & Self::CODEC) as u8)
    }

    /// Returns what the timestamps mean.
    pub fn timestamp_type(self) -> TimestampType {
        if self.0 & Self::LOG_APPEND_TIME == 0 {
            TimestampType::CreateTime
        } else {
            TimestampType::LogAppendTime
        }
    }

    /// Says whether the batch belongs to a transaction.
    pub fn is_transactional(self) -> bool {
        self.0 & Self::TRANSACTIONAL != 0
    }

    /// Says whether the records are control records.
    pub fn is_control(self) -> bool {
        self.0 & Self::CONTROL != 0
    }

    /// Says whether the base timestamp is the time after which tombstones may be dropped (KIP-534).
    pub fn has_delete_horizon(self) -> bool {
        self.0 & Self::DELETE_HORIZON != 0
    }
}

/// The values of a batch header, all 61 bytes.
///
/// Field names and meanings are Kafka's; timestamps are milliseconds since 1970, -1 is "none" for
/// producer id, producer epoch, base sequence and leader epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Offset of the first record, assigned by the leader.
    pub base_offset: i64,
    /// Bytes behind this field.
    pub batch_length: i32,
    /// Epoch of the leader that appended the batch, assigned by the leader.
    pub partition_leader_epoch: i32,
    /// Format version, 2.
    pub magic: i8,
    /// CRC-32C of everything from `attributes` on.
    pub crc: u32,
    /// Codec, timestamp type and kind.
    pub attributes: Attributes,
    /// Offset of the last record minus `base_offset`.
    pub last_offset_delta: i32,
    /// Timestamp that record timestamps are relative to.
    pub base_timestamp: i64,
    /// Largest timestamp of the batch.
    pub max_timestamp: i64,
    /// Id of an idempotent or transactional producer.
    pub producer_id: i64,
    /// Epoch of that producer.
    pub producer_epoch: i16,
    /// Sequence number of the first record.
    pub base_sequence: i32,
    /// Number of records.
    pub records_count: i32,
}

impl BatchHeader {
    /// Reads the fields as they are, without judging them.
    pub fn read(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            base_offset: i64::from_be_bytes(field(bytes, BASE_OFFSET)),
            batch_length: i32::from_be_bytes(field(bytes, BATCH_LENGTH)),
            partition_leader_epoch: i32::from_be_bytes(field(bytes, PARTITION_LEADER_EPOCH)),
            magic: i8::from_be_bytes(field(bytes, MAGIC)),
            crc: u32::from_be_bytes(field(bytes, CRC)),
            attributes: Attributes(u16::from_be_bytes(field(bytes, ATTRIBUTES))),
            last_offset_delta: i32::from_be_bytes(field(bytes, LAST_OFFSET_DELTA)),
            base_timestamp: i64::from_be_bytes(field(bytes, BASE_TIMESTAMP)),
            max_timestamp: i64::from_be_bytes(field(bytes, MAX_TIMESTAMP)),
            producer_id: i64::from_be_bytes(field(bytes, PRODUCER_ID)),
            producer_epoch: i16::from_be_bytes(field(bytes, PRODUCER_EPOCH)),
            base_sequence: i32::from_be_bytes(field(bytes, BASE_SEQUENCE)),
            records_count: i32::from_be_bytes(field(bytes, RECORDS_COUNT)),
        }
    }

    /// Writes the fields as they are.
    pub fn emit(&self, out: &mut [u8; HEADER_LEN]) {
        put(out, BASE_OFFSET, self.base_offset.to_be_bytes());
        put(out, BATCH_LENGTH, self.batch_length.to_be_bytes());
        put(
            out,
            PARTITION_LEADER_EPOCH,
            self.partition_leader_epoch.to_be_bytes(),
        );
        put(out, MAGIC, self.magic.to_be_bytes());
        put(out, CRC, self.crc.to_be_bytes());
        put(out, ATTRIBUTES, self.attributes.0.to_be_bytes());
        put(out, LAST_OFFSET_DELTA, self.last_offset_delta.to_be_bytes());
        put(out, BASE_TIMESTAMP, self.base_timestamp.to_be_bytes());
        put(out, MAX_TIMESTAMP, self.max_timestamp.to_be_bytes());
        put(out, PRODUCER_ID, self.producer_id.to_be_bytes());
        put(out, PRODUCER_EPOCH, self.producer_epoch.to_be_bytes());
        put(out, BASE_SEQUENCE, self.base_sequence.to_be_bytes());
        put(out, RECORDS_COUNT, self.records_count.to_be_bytes());
    }

    /// Returns the bytes of the whole batch, after checking what a header can tell alone.
    ///
    /// # Errors
    ///
    /// [`BatchError::Magic`], [`BatchError::Length`], [`BatchError::Offsets`] or
    /// [`BatchError::RecordsCount`]: whatever follows, this is no batch.
    pub fn check(&self) -> Result<usize, BatchError> {
        if self.magic != MAGIC_V2 {
            return Err(BatchError::Magic { magic: self.magic });
        }
        let len = total_len(self.batch_length)?;
        let impossible = BatchError::Offsets {
            base_offset: self.base_offset,
            last_offset_delta: self.last_offset_delta,
        };
        // One more than the last offset is the next offset: it must exist, too.
        let next = self
            .base_offset
            .checked_add(i64::from(self.last_offset_delta) + 1);
        if self.base_offset < 0 || self.last_offset_delta < 0 || next.is_none() {
            return Err(impossible);
        }
        // Compaction leaves fewer records than offsets, never more.
        let most = self.last_offset_delta.cast_unsigned() as usize + 1;
        match usize::try_from(self.records_count) {
            Ok(count) if count <= most => Ok(len),
            _ => Err(BatchError::RecordsCount {
                records_count: self.records_count,
                most,
            }),
        }
    }
}

/// Bytes of a batch whose length field says `batch_length`.
pub(super) fn total_len(batch_length: i32) -> Result<usize, BatchError> {
    match usize::try_from(batch_length) {
        Ok(length) if length >= HEADER_LEN - BATCH_LEN_PREFIX => Ok(BATCH_LEN_PREFIX + length),
        _ => Err(BatchError::Length { batch_length }),
    }
}

/// The length field of a prefix.
pub(super) fn batch_length(prefix: &[u8; BATCH_LEN_PREFIX]) -> i32 {
    i32::from_be_bytes(field(prefix, BATCH_LENGTH))
}

/// Writes what the leader assigns.
pub(super) fn put_assigned(out: &mut [u8; HEADER_LEN], base_offset: i64, leader_epoch: i32) {
    put(out, BASE_OFFSET, base_offset.to_be_bytes());
    put(out, PARTITION_LEADER_EPOCH, leader_epoch.to_be_bytes());
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    // The callers' arrays are longer than any field's end.
    bytes[at..at + N].try_into().expect("N bytes were sliced")
}

fn put<const N: usize>(out: &mut [u8; HEADER_LEN], at: usize, value: [u8; N]) {
    out[at..at + N].copy_from_slice(&value);
}
