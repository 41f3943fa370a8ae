//! The sparse indexes of a segment: entries, lookup, and which batches get one.

use crate::record::BatchHeader;

/// Bytes of an entry in `.index`.
pub const INDEX_ENTRY_LEN: usize = 8;
/// Bytes of an entry in `.timeindex`.
pub const TIME_INDEX_ENTRY_LEN: usize = 12;

/// Says that a batch with this last offset begins at this position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexEntry {
    /// Last offset of the batch minus the segment's base offset.
    pub relative_offset: i32,
    /// Position of the batch in the `.log` file, in bytes.
    pub position: i32,
}

/// Says that no record up to this offset has a later timestamp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeIndexEntry {
    /// Largest timestamp so far, in milliseconds since 1970.
    pub timestamp: i64,
    /// Last offset of the batch that has it, minus the segment's base offset.
    pub relative_offset: i32,
}

impl IndexEntry {
    /// Reads one entry.
    pub fn read(bytes: &[u8; INDEX_ENTRY_LEN]) -> Self {
        let (relative_offset, position) = bytes.split_first_chunk().expect("8 bytes are 4 and 4");
        Self {
            relative_offset: i32::from_be_bytes(*relative_offset),
            position: i32::from_be_bytes(position.try_into().expect("8 bytes are 4 and 4")),
        }
    }

    /// Reads the entries that rise strictly; a file preallocated by Kafka has zeros behind them.
    pub fn read_all(bytes: &[u8]) -> Vec<Self> {
        let mut entries: Vec<Self> = Vec::new();
        for entry in bytes.as_chunks().0.iter().map(Self::read) {
            let rises = entries.last().is_none_or(|last| {
                entry.relative_offset > last.relative_offset && entry.position > last.position
            });
            if !rises || entry.relative_offset < 0 || entry.position < 0 {
                break;
            }
            entries.push(entry);
        }
        entries
    }
}

impl TimeIndexEntry {
    /// Reads one entry.
    pub fn read(bytes: &[u8; TIME_INDEX_ENTRY_LEN]) -> Self {
        let (timestamp, offset) = bytes.split_first_chunk().expect("12 bytes are 8 and 4");
        Self {
            timestamp: i64::from_be_bytes(*timestamp),
            relative_offset: i32::from_be_bytes(offset.try_into().expect("12 bytes are 8 and 4")),
        }
    }

    /// Reads the entries that rise strictly; a file preallocated by Kafka has zeros behind them.
    pub fn read_all(bytes: &[u8]) -> Vec<Self> {
        let mut entries: Vec<Self> = Vec::new();
        for entry in bytes.as_chunks().0.iter().map(Self::read) {
            let rises = entries.last().is_none_or(|last| {
                entry.timestamp > last.timestamp && entry.relative_offset > last.relative_offset
            });
            if !rises || entry.timestamp < 0 || entry.relative_offset < 0 {
                break;
            }
            entries.push(entry);
        }
        entries
    }
}

/// Decides which batches get entries and collects their bytes until they are written.
///
/// One rule for the writer and for recovery, so that a rebuilt index equals the lost one.
#[derive(Debug, Clone)]
pub(super) struct IndexBuilder {
    base_offset: i64,
    interval_bytes: u32,
    bytes_since_entry: u64,
    max_timestamp: i64,
    offset_of_max_timestamp: i64,
    last_time_entry: i64,
    /// Entries of `.index` not yet written.
    pub(super) offsets: Vec<u8>,
    /// Entries of `.timeindex` not yet written.
    pub(super) times: Vec<u8>,
}

impl IndexBuilder {
    pub(super) fn new(base_offset: i64, interval_bytes: u32) -> Self {
        Self {
            base_offset,
            interval_bytes,
            bytes_since_entry: 0,
            max_timestamp: -1,
            offset_of_max_timestamp: base_offset,
            last_time_entry: -1,
            offsets: Vec::new(),
            times: Vec::new(),
        }
    }

    /// Takes note of a batch of `len` bytes at `position`, both within the limits of
    /// [`relative`](Self::relative).
    pub(super) fn observe(&mut self, header: &BatchHeader, position: u64, len: usize) {
        let last_offset = header.base_offset + i64::from(header.last_offset_delta);
        if header.max_timestamp > self.max_timestamp {
            self.max_timestamp = header.max_timestamp;
            self.offset_of_max_timestamp = last_offset;
        }
        if self.bytes_since_entry > u64::from(self.interval_bytes) {
            let offset = self
                .relative(last_offset)
                .expect("the caller checked the offset");
            let position = i32::try_from(position).expect("the caller checked the position");
            self.offsets.extend_from_slice(&offset.to_be_bytes());
            self.offsets.extend_from_slice(&position.to_be_bytes());
            self.put_time_entry();
            self.bytes_since_entry = 0;
        }
        self.bytes_since_entry += len as u64;
    }

    /// Adds the segment's largest timestamp to `.timeindex`, as its last entry.
    pub(super) fn put_time_entry(&mut self) {
        if self.max_timestamp > self.last_time_entry {
            let offset = self.relative(self.offset_of_max_timestamp);
            let offset = offset.expect("the offset was observed");
            self.times
                .extend_from_slice(&self.max_timestamp.to_be_bytes());
            self.times.extend_from_slice(&offset.to_be_bytes());
            self.last_time_entry = self.max_timestamp;
        }
    }

    /// The offset as an index stores it, `None` if it is too far from the base offset.
    pub(super) fn relative(&self, offset: i64) -> Option<i32> {
        i32::try_from(offset.checked_sub(self.base_offset)?).ok()
    }

    pub(super) fn max_timestamp(&self) -> i64 {
        self.max_timestamp
    }
}
