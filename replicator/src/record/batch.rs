//! A batch in bytes that somebody else owns.

use std::borrow::Cow;

use super::error::{BatchError, RecordFault};
use super::header::{
    Attributes, BATCH_LEN_PREFIX, BatchHeader, CRC_RANGE_START, HEADER_LEN, STAMPED_LEN,
    batch_length, put_assigned, total_len,
};
use super::iter::RecordIter;
use super::{Compression, TimestampType};

/// Returns the bytes that the batch with this prefix occupies.
///
/// # Errors
///
/// [`BatchError::Length`] if the field cannot be a batch's.
pub fn batch_len(prefix: &[u8; BATCH_LEN_PREFIX]) -> Result<usize, BatchError> {
    total_len(batch_length(prefix))
}

/// Gives a batch its place in the log: base offset and leader epoch.
///
/// Both lie outside the range of the batch's CRC, which stays valid.
///
/// # Panics
///
/// If `batch` is shorter than a batch header; parse it first.
pub fn stamp(batch: &mut [u8], base_offset: i64, leader_epoch: i32) {
    let header = batch
        .first_chunk_mut()
        .expect("a batch is at least its header long");
    put_assigned(header, base_offset, leader_epoch);
}

/// One record batch, borrowed; its header is known to be consistent, its records are not.
#[derive(Debug, Clone, Copy)]
pub struct BatchView<'a> {
    header: BatchHeader,
    bytes: &'a [u8],
}

impl<'a> BatchView<'a> {
    /// Splits the first batch off `bytes` and returns it with what follows it.
    ///
    /// Checks what the header can tell: magic, length, offsets, count. Neither checksum nor records
    /// are looked at: see [`verify_crc`](Self::verify_crc) and [`records`](Self::records).
    ///
    /// # Errors
    ///
    /// [`BatchError::Incomplete`] if more bytes could make it a batch, otherwise as
    /// [`BatchHeader::check`].
    pub fn parse(bytes: &'a [u8]) -> Result<(BatchView<'a>, &'a [u8]), BatchError> {
        let available = bytes.len();
        let first = bytes
            .first_chunk::<HEADER_LEN>()
            .ok_or(BatchError::Incomplete {
                needed: HEADER_LEN,
                available,
            })?;
        let header = BatchHeader::read(first);
        let needed = header.check()?;
        let (bytes, rest) = bytes
            .split_at_checked(needed)
            .ok_or(BatchError::Incomplete { needed, available })?;
        Ok((BatchView { header, bytes }, rest))
    }

    /// Returns the values of the header.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// Returns the whole batch, header included.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Returns the 21 bytes that the batch's CRC does not cover: base offset to CRC.
    pub fn stamped_bytes(&self) -> &'a [u8; STAMPED_LEN] {
        self.bytes
            .first_chunk()
            .expect("a view is at least a header long")
    }

    /// Returns the records as stored: compressed if the attributes say so.
    pub fn body(&self) -> &'a [u8] {
        &self.bytes[HEADER_LEN..]
    }

    /// Returns the bytes that the batch occupies, header included; never 0.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a batch is at least its header long"
    )]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Returns the offset of the first record.
    pub fn base_offset(&self) -> i64 {
        self.header.base_offset
    }

    /// Returns the offset of the last record.
    pub fn last_offset(&self) -> i64 {
        self.header.base_offset + i64::from(self.header.last_offset_delta)
    }

    /// Returns the offset that the batch after this one begins with.
    pub fn next_offset(&self) -> i64 {
        self.last_offset() + 1
    }

    /// Returns the epoch of the leader that appended the batch, -1 if none did.
    pub fn partition_leader_epoch(&self) -> i32 {
        self.header.partition_leader_epoch
    }

    /// Returns the number of records.
    pub fn records_count(&self) -> u32 {
        // Not negative: the header has been checked.
        self.header.records_count.cast_unsigned()
    }

    /// Returns the attribute bits.
    pub fn attributes(&self) -> Attributes {
        self.header.attributes
    }

    /// Returns the codec of the records.
    ///
    /// # Errors
    ///
    /// [`BatchError::UnknownCodec`].
    pub fn compression(&self) -> Result<Compression, BatchError> {
        self.header.attributes.compression()
    }

    /// Returns the largest timestamp in the batch, in milliseconds since 1970, -1 if it has none.
    pub fn max_timestamp(&self) -> i64 {
        self.header.max_timestamp
    }

    /// Computes the CRC-32C of the batch's bytes from the attributes on.
    pub fn compute_crc(&self) -> u32 {
        crc32c::crc32c(&self.bytes[CRC_RANGE_START..])
    }

    /// Compares the stored CRC-32C with the one of the bytes.
    ///
    /// # Errors
    ///
    /// [`BatchError::Crc`] with both values if they differ.
    pub fn verify_crc(&self) -> Result<(), BatchError> {
        let (stored, computed) = (self.header.crc, self.compute_crc());
        if stored == computed {
            Ok(())
        } else {
            Err(BatchError::Crc { stored, computed })
        }
    }

    /// Iterates over the records of a batch that is not compressed.
    ///
    /// # Errors
    ///
    /// - [`BatchError::Compressed`] if it is: use [`decompress`](Self::decompress) and
    ///   [`records_from`](Self::records_from).
    /// - [`BatchError::RecordsCount`] if the batch is too short for as many records as it claims.
    pub fn records(&self) -> Result<RecordIter<'a>, BatchError> {
        match self.compression()? {
            Compression::None => self.records_from(self.body()),
            codec => Err(BatchError::Compressed { codec }),
        }
    }

    /// Iterates over the records in `body`, which [`decompress`](Self::decompress) returned.
    ///
    /// # Errors
    ///
    /// [`BatchError::RecordsCount`] if `body` is too short for as many records as the header claims.
    pub fn records_from<'b>(&self, body: &'b [u8]) -> Result<RecordIter<'b>, BatchError> {
        RecordIter::new(&self.header, body)
    }

    /// Returns the records as plain bytes: borrowed if they are stored so, else decompressed.
    ///
    /// Allocates `limit` bytes at most, whatever the batch claims.
    ///
    /// # Errors
    ///
    /// [`BatchError::UnknownCodec`], [`BatchError::Decompress`], or [`BatchError::LimitExceeded`]
    /// if the records are longer than `limit` bytes.
    pub fn decompress(&self, limit: usize) -> Result<Cow<'a, [u8]>, BatchError> {
        match self.compression()? {
            Compression::None => Ok(Cow::Borrowed(self.body())),
            codec => codec.decompress(self.body(), limit).map(Cow::Owned),
        }
    }

    /// Checks everything that a leader must know before it appends the batch.
    ///
    /// Header, CRC, and every record: offset deltas 0, 1, 2, ... up to the last offset delta.
    /// Compressed records are decompressed to at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// The first fault found, as [`verify_crc`](Self::verify_crc),
    /// [`decompress`](Self::decompress) and [`RecordIter`] report it.
    pub fn check_appendable(&self, limit: usize) -> Result<(), BatchError> {
        self.verify_crc()?;
        let most = self.header.last_offset_delta.cast_unsigned() as usize + 1;
        if self.records_count() as usize != most {
            let records_count = self.header.records_count;
            return Err(BatchError::RecordsCount {
                records_count,
                most,
            });
        }
        let body = self.decompress(limit)?;
        for (index, record) in (0u32..).zip(self.records_from(&body)?) {
            // As many records as offsets, each higher than the one before: any gap shows here.
            if record?.offset != self.base_offset() + i64::from(index) {
                return Err(BatchError::Record {
                    index,
                    cause: RecordFault::NotSequential,
                });
            }
        }
        Ok(())
    }

    /// Returns what the timestamps mean.
    pub fn timestamp_type(&self) -> TimestampType {
        self.header.attributes.timestamp_type()
    }
}
