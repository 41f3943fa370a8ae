//! The records inside a batch, as views.

use super::TimestampType;
use super::error::{BatchError, RecordFault};
use super::header::BatchHeader;
use super::varint::Cursor;

/// Least bytes of a record: length, attributes, two deltas, two lengths and the header count.
const RECORD_LEN_MIN: usize = 7;

/// One record; key, value and headers are views into the batch.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Offset in the log.
    pub offset: i64,
    /// Milliseconds since 1970: the batch's if the leader's clock counts, else the record's own.
    pub timestamp: i64,
    /// The key, if the record has one; may be empty.
    pub key: Option<&'a [u8]>,
    /// The value; `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    headers: &'a [u8],
    headers_count: u32,
}

impl<'a> Record<'a> {
    /// Iterates over the headers in the producer's order; a key may occur more than once.
    pub fn headers(&self) -> HeaderIter<'a> {
        HeaderIter {
            cursor: Cursor::new(self.headers),
            remaining: self.headers_count,
        }
    }
}

/// One header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader<'a> {
    /// The key: UTF-8 by Kafka's rule, which nothing enforces.
    pub key: &'a [u8],
    /// The value, if the header has one.
    pub value: Option<&'a [u8]>,
}

/// Iterator over a record's headers, which have been checked already.
#[derive(Debug, Clone)]
pub struct HeaderIter<'a> {
    cursor: Cursor<'a>,
    remaining: u32,
}

impl<'a> Iterator for HeaderIter<'a> {
    type Item = RecordHeader<'a>;

    fn next(&mut self) -> Option<RecordHeader<'a>> {
        self.remaining = self.remaining.checked_sub(1)?;
        // The bytes were walked once when the record was read, so this does not end early.
        header(&mut self.cursor).ok()
    }
}

/// Iterator over the records of one batch; ends after the first error.
///
/// After the last record it checks that no byte is left.
#[derive(Debug, Clone)]
pub struct RecordIter<'a> {
    cursor: Cursor<'a>,
    base_offset: i64,
    base_timestamp: i64,
    log_append_time: Option<i64>,
    last_offset_delta: i32,
    /// Least offset delta that the next record may have.
    next_offset_delta: i64,
    index: u32,
    count: u32,
    finished: bool,
}

impl<'a> RecordIter<'a> {
    pub(super) fn new(header: &BatchHeader, body: &'a [u8]) -> Result<Self, BatchError> {
        let most = body.len() / RECORD_LEN_MIN;
        let records_count = header.records_count;
        let count = match u32::try_from(records_count) {
            Ok(count) if count as usize <= most => count,
            _ => {
                return Err(BatchError::RecordsCount {
                    records_count,
                    most,
                });
            }
        };
        let log_append_time = match header.attributes.timestamp_type() {
            TimestampType::CreateTime => None,
            TimestampType::LogAppendTime => Some(header.max_timestamp),
        };
        Ok(Self {
            cursor: Cursor::new(body),
            base_offset: header.base_offset,
            base_timestamp: header.base_timestamp,
            log_append_time,
            last_offset_delta: header.last_offset_delta,
            next_offset_delta: 0,
            index: 0,
            count,
            finished: false,
        })
    }

    fn record(&mut self) -> Result<Record<'a>, RecordFault> {
        let len = self.cursor.len()?;
        let mut fields = Cursor::new(self.cursor.take(len)?);
        let _attributes = fields.byte()?;
        let timestamp_delta = fields.varlong()?;
        let offset_delta = self.offset_delta(fields.varint()?)?;
        let key = fields.nullable_bytes()?;
        let value = fields.nullable_bytes()?;
        let (headers, headers_count) = headers(&mut fields)?;
        if !fields.is_empty() {
            return Err(RecordFault::Size);
        }
        // Deltas wrap as the producer's subtraction did.
        let timestamp = self.base_timestamp.wrapping_add(timestamp_delta);
        Ok(Record {
            offset: self.base_offset + offset_delta,
            timestamp: self.log_append_time.unwrap_or(timestamp),
            key,
            value,
            headers,
            headers_count,
        })
    }

    fn offset_delta(&mut self, delta: i32) -> Result<i64, RecordFault> {
        if delta > self.last_offset_delta || i64::from(delta) < self.next_offset_delta {
            return Err(RecordFault::OffsetDelta);
        }
        self.next_offset_delta = i64::from(delta) + 1;
        Ok(i64::from(delta))
    }
}

impl<'a> Iterator for RecordIter<'a> {
    type Item = Result<Record<'a>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let index = self.index;
        let result = if index < self.count {
            self.index += 1;
            self.record()
        } else if self.cursor.is_empty() {
            self.finished = true;
            return None;
        } else {
            Err(RecordFault::TrailingBytes)
        };
        self.finished = result.is_err();
        Some(result.map_err(|cause| BatchError::Record { index, cause }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // One more than the records: the complaint about trailing bytes.
        (0, Some((self.count - self.index) as usize + 1))
    }
}

/// Walks all headers once, so that iterating over them later cannot fail.
fn headers<'a>(fields: &mut Cursor<'a>) -> Result<(&'a [u8], u32), RecordFault> {
    let count = u32::try_from(fields.varint()?).map_err(|_| RecordFault::Length)?;
    let start = fields.rest();
    // Each header takes two bytes at least, so a false count ends at the end of the record.
    for _ in 0..count {
        header(fields)?;
    }
    Ok((&start[..start.len() - fields.rest().len()], count))
}

fn header<'a>(cursor: &mut Cursor<'a>) -> Result<RecordHeader<'a>, RecordFault> {
    let key_len = cursor.len()?;
    let key = cursor.take(key_len)?;
    let value = cursor.nullable_bytes()?;
    Ok(RecordHeader { key, value })
}
