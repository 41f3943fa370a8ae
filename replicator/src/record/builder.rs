//! Writes a batch in place into a buffer that is used again for the next.

use super::header::{
    Attributes, BATCH_LEN_PREFIX, BatchHeader, CRC_RANGE_START, HEADER_LEN, MAGIC_V2,
};
use super::varint::{put_varlong, varint_len, varlong_len};

/// Builds one uncompressed batch after another in a buffer of its own.
///
/// The offsets are 0, 1, 2, ... and the leader epoch -1 until a leader calls
/// [`stamp`](super::stamp). The buffer has the limit's length from the start, so that appending
/// neither grows nor clears it; the system backs with memory what is used of it.
#[derive(Debug)]
pub struct BatchBuilder {
    /// Room for the header, the records so far, room for more.
    buffer: Box<[u8]>,
    /// Bytes of the header and of the records so far.
    len: usize,
    count: i32,
    base_timestamp: i64,
    max_timestamp: i64,
}

impl BatchBuilder {
    /// Creates a builder whose batches are at most `limit` bytes long, header included.
    ///
    /// # Panics
    ///
    /// If `limit` is not more than a batch header or does not fit Kafka's length field.
    pub fn new(limit: usize) -> Self {
        assert!(limit > HEADER_LEN, "a batch holds its header and a record");
        assert!(
            i32::try_from(limit).is_ok(),
            "a batch's length is a positive i32"
        );
        Self {
            buffer: vec![0; limit].into_boxed_slice(),
            len: HEADER_LEN,
            count: 0,
            base_timestamp: -1,
            max_timestamp: -1,
        }
    }

    /// Appends a record, unless the batch would become longer than its limit.
    ///
    /// `timestamp` is in milliseconds since 1970. Headers keep their order and may repeat a key.
    /// Returns whether the record is in the batch; a record that does not fit an
    /// [empty](Self::is_empty) builder fits none.
    #[must_use]
    pub fn append(
        &mut self,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&[u8], Option<&[u8]>)],
    ) -> bool {
        let base_timestamp = if self.is_empty() {
            timestamp
        } else {
            self.base_timestamp
        };
        let timestamp_delta = timestamp.wrapping_sub(base_timestamp);
        let record = NewRecord {
            timestamp_delta,
            offset_delta: self.count,
            key,
            value,
            headers,
        };
        let body_len = record.body_len();
        let len = varlong_len(body_len as i64) + body_len;
        let Some(out) = self.buffer[self.len..].get_mut(..len) else {
            return false;
        };

        let mut at = record.put_before_value(out, body_len);
        let value = value.unwrap_or_default();
        out[at..at + value.len()].copy_from_slice(value);
        at += value.len();
        at += record.put_headers(&mut out[at..]);
        debug_assert_eq!(at, len);

        self.len += len;
        self.base_timestamp = base_timestamp;
        self.max_timestamp = if self.is_empty() {
            timestamp
        } else {
            self.max_timestamp.max(timestamp)
        };
        self.count += 1;
        true
    }

    /// Completes the batch and returns it; [`clear`](Self::clear) starts the next.
    ///
    /// # Panics
    ///
    /// If the builder is empty: a producer's batch has at least one record.
    pub fn build(&mut self) -> &[u8] {
        assert!(!self.is_empty(), "a batch has at least one record");
        let timestamps = (self.base_timestamp, self.max_timestamp);
        let mut header = header_of(self.len, self.count, timestamps);
        self.put_header(&header);
        header.crc = crc32c::crc32c(&self.buffer[CRC_RANGE_START..self.len]);
        self.put_header(&header);
        &self.buffer[..self.len]
    }

    /// Forgets the records and keeps the buffer.
    pub fn clear(&mut self) {
        self.len = HEADER_LEN;
        self.count = 0;
    }

    /// Says whether the batch has no record yet.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns the number of records so far.
    pub fn records_count(&self) -> usize {
        self.count.cast_unsigned() as usize
    }

    /// Returns the bytes of the batch so far, header included.
    pub fn len(&self) -> usize {
        self.len
    }

    fn put_header(&mut self, header: &BatchHeader) {
        header.emit(
            self.buffer
                .first_chunk_mut()
                .expect("the limit is more than a header"),
        );
    }
}

/// A record to be written, in its batch.
pub(super) struct NewRecord<'a> {
    pub(super) timestamp_delta: i64,
    pub(super) offset_delta: i32,
    pub(super) key: Option<&'a [u8]>,
    pub(super) value: Option<&'a [u8]>,
    pub(super) headers: &'a [(&'a [u8], Option<&'a [u8]>)],
}

impl NewRecord<'_> {
    /// Bytes that the record's own length field counts.
    #[inline]
    pub(super) fn body_len(&self) -> usize {
        1 + varlong_len(self.timestamp_delta)
            + varint_len(self.offset_delta)
            + nullable_len(self.key)
            + nullable_len(self.value)
            + varlong_len(self.headers.len() as i64)
            + self
                .headers
                .iter()
                .map(|(k, v)| nullable_len(Some(k)) + nullable_len(*v))
                .sum::<usize>()
    }

    /// Writes what comes before the bytes of the value, and returns how many bytes that took.
    #[inline]
    pub(super) fn put_before_value(&self, out: &mut [u8], body_len: usize) -> usize {
        let mut at = put_varlong(out, body_len as i64);
        out[at] = 0; // Attributes of a record: none are defined.
        at += 1;
        at += put_varlong(&mut out[at..], self.timestamp_delta);
        at += put_varlong(&mut out[at..], i64::from(self.offset_delta));
        at += put_nullable(&mut out[at..], self.key);
        at + put_varlong(&mut out[at..], length_field(self.value))
    }

    /// Writes what comes behind the value, and returns how many bytes that took.
    #[inline]
    pub(super) fn put_headers(&self, out: &mut [u8]) -> usize {
        let mut at = put_varlong(out, self.headers.len() as i64);
        for (key, value) in self.headers {
            at += put_nullable(&mut out[at..], Some(key));
            at += put_nullable(&mut out[at..], *value);
        }
        at
    }
}

/// The header of a batch of `len` bytes before it has a CRC and a place.
pub(super) fn header_of(len: usize, count: i32, timestamps: (i64, i64)) -> BatchHeader {
    let length = i32::try_from(len - BATCH_LEN_PREFIX);
    BatchHeader {
        base_offset: 0,
        batch_length: length.expect("the limit fits an i32"),
        partition_leader_epoch: -1,
        magic: MAGIC_V2,
        crc: 0,
        attributes: Attributes::default(),
        last_offset_delta: count - 1,
        base_timestamp: timestamps.0,
        max_timestamp: timestamps.1,
        producer_id: -1,
        producer_epoch: -1,
        base_sequence: -1,
        records_count: count,
    }
}

/// Writes nullable bytes behind their length and returns how many bytes that took.
#[inline]
fn put_nullable(out: &mut [u8], bytes: Option<&[u8]>) -> usize {
    let at = put_varlong(out, length_field(bytes));
    let bytes = bytes.unwrap_or_default();
    out[at..at + bytes.len()].copy_from_slice(bytes);
    at + bytes.len()
}

/// The length of nullable bytes as its field says it.
fn length_field(bytes: Option<&[u8]>) -> i64 {
    bytes.map_or(-1, |bytes| bytes.len() as i64)
}

/// Bytes that nullable bytes occupy, length field included.
fn nullable_len(bytes: Option<&[u8]>) -> usize {
    varlong_len(length_field(bytes)) + bytes.map_or(0, <[u8]>::len)
}
