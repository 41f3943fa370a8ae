//! Writes a batch to where it will stay, if that is no memory that a program may borrow.

use super::builder::{NewRecord, header_of};
use super::header::{CRC_RANGE_START, HEADER_LEN};
use super::varint::varlong_len;

/// Builds one uncompressed batch in pieces, which the caller writes one behind the other, behind room for
/// the header; that is known at the end.
///
/// As [`BatchBuilder`](super::BatchBuilder), without a buffer for the batch: a value goes from where it is to
/// where it will stay.
#[derive(Debug)]
pub struct InPlaceBuilder {
    limit: usize,
    len: usize,
    count: i32,
    base_timestamp: i64,
    max_timestamp: i64,
    /// Over what is behind the header.
    body_crc: u32,
    /// What is around a value.
    scratch: Vec<u8>,
}

impl InPlaceBuilder {
    /// Creates a builder of a batch of at most `limit` bytes, header included.
    ///
    /// # Panics
    ///
    /// If `limit` is less than a batch header or does not fit Kafka's length field.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        assert!(limit >= HEADER_LEN, "a batch holds its header");
        assert!(
            i32::try_from(limit).is_ok(),
            "a batch's length is a positive i32"
        );
        Self {
            limit,
            len: HEADER_LEN,
            count: 0,
            base_timestamp: -1,
            max_timestamp: -1,
            body_crc: 0,
            scratch: Vec::new(),
        }
    }

    /// Appends a record, unless the batch would become longer than its limit: gives its bytes to `put`, in
    /// pieces. Returns whether it did.
    #[must_use]
    pub fn append(
        &mut self,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&[u8], Option<&[u8]>)],
        mut put: impl FnMut(&[u8]),
    ) -> bool {
        let base_timestamp = if self.count == 0 {
            timestamp
        } else {
            self.base_timestamp
        };
        let record = NewRecord {
            timestamp_delta: timestamp.wrapping_sub(base_timestamp),
            offset_delta: self.count,
            key,
            value,
            headers,
        };
        let body_len = record.body_len();
        let len = varlong_len(body_len as i64) + body_len;
        if len > self.limit - self.len {
            return false;
        }
        let value = value.unwrap_or_default();
        if self.scratch.len() < len - value.len() {
            self.scratch.resize(len - value.len(), 0);
        }
        let before = record.put_before_value(&mut self.scratch, body_len);
        let behind = record.put_headers(&mut self.scratch[before..]);
        let (before, behind) = self.scratch[..before + behind].split_at(before);
        for piece in [before, value, behind] {
            self.body_crc = crc32c::crc32c_append(self.body_crc, piece);
            put(piece);
        }
        self.len += len;
        self.max_timestamp = if self.count == 0 {
            timestamp
        } else {
            self.max_timestamp.max(timestamp)
        };
        self.base_timestamp = base_timestamp;
        self.count += 1;
        true
    }

    /// Says whether there is no record yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the number of records so far.
    #[must_use]
    pub fn records_count(&self) -> usize {
        self.count.cast_unsigned() as usize
    }

    /// Returns the bytes of the batch so far, header included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the header of the batch as it is; offset 0 and leader epoch -1 until a leader calls
    /// [`stamp`](super::stamp).
    ///
    /// # Panics
    ///
    /// If there is no record: a batch has at least one.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_LEN] {
        assert!(!self.is_empty(), "a batch has at least one record");
        let timestamps = (self.base_timestamp, self.max_timestamp);
        let mut header = header_of(self.len, self.count, timestamps);
        let mut bytes = [0; HEADER_LEN];
        header.emit(&mut bytes);
        let of_header = crc32c::crc32c(&bytes[CRC_RANGE_START..]);
        header.crc = crc32c::crc32c_combine(of_header, self.body_crc, self.len - HEADER_LEN);
        header.emit(&mut bytes);
        bytes
    }
}
