//! Why bytes are not a record batch.

use super::Compression;

/// Why bytes are not a usable record batch, version 2.
///
/// Each variant is a fault of the bytes, never of the caller's timing: reading the same bytes
/// again gives the same answer. Only [`BatchError::Incomplete`] can heal, by more bytes.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// The bytes end before the batch does.
    #[error("record batch needs {needed} bytes, {available} are there: it is cut off")]
    Incomplete {
        /// Bytes that the batch occupies, or that its header does when not even that is there.
        needed: usize,
        /// Bytes given.
        available: usize,
    },
    /// The format version is not 2.
    #[error(
        "record batch has magic {magic}, not 2: not a batch, or an older message format \
         (rewrite it with a producer of Kafka 0.11 or later)"
    )]
    Magic {
        /// The value found.
        magic: i8,
    },
    /// The length field is smaller than the header that it must cover.
    #[error("record batch length {batch_length} is less than the 49 bytes of its own header")]
    Length {
        /// The value found.
        batch_length: i32,
    },
    /// Base offset and last offset delta do not describe a range of offsets.
    #[error(
        "record batch offsets are impossible: base offset {base_offset}, last offset delta \
         {last_offset_delta}"
    )]
    Offsets {
        /// The base offset found.
        base_offset: i64,
        /// The delta found.
        last_offset_delta: i32,
    },
    /// The record count is negative or more than the batch has room or offsets for.
    #[error(
        "record batch claims {records_count} records, at most {most} can be in it: the header \
         is damaged or forged"
    )]
    RecordsCount {
        /// The value found.
        records_count: i32,
        /// The most that length and offsets allow.
        most: usize,
    },
    /// The stored CRC-32C differs from the one of the bytes.
    #[error(
        "record batch CRC-32C is {computed:#010x} over its bytes, its header says {stored:#010x}: \
         the bytes changed after they were written; take the batch from another replica"
    )]
    Crc {
        /// The value in the header.
        stored: u32,
        /// The value of the bytes.
        computed: u32,
    },
    /// The codec number is none that Kafka defines.
    #[error(
        "record batch names compression codec {codec}; none, gzip, snappy, lz4 and zstd are 0 to 4"
    )]
    UnknownCodec {
        /// The value of attribute bits 0 to 2.
        codec: u8,
    },
    /// The records are compressed, and the call wants them plain.
    #[error("records are compressed with {codec}: decompress the batch first")]
    Compressed {
        /// The codec.
        codec: Compression,
    },
    /// The compressed bytes do not decompress.
    #[error("records do not decompress with {codec}: {cause}")]
    Decompress {
        /// The codec.
        codec: Compression,
        /// What the codec reports.
        cause: String,
    },
    /// The records decompress to more than the caller allows.
    #[error(
        "records decompress with {codec} to more than {limit} bytes; raise the limit if they are trusted"
    )]
    LimitExceeded {
        /// The codec.
        codec: Compression,
        /// The caller's limit in bytes.
        limit: usize,
    },
    /// A record inside the batch is malformed.
    #[error("record {index} of the batch is malformed: {cause}")]
    Record {
        /// Position in the batch, from 0.
        index: u32,
        /// What is wrong.
        cause: RecordFault,
    },
}

/// What is wrong with one record.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    /// The bytes end inside the record.
    #[error("it is cut off")]
    CutOff,
    /// An integer is longer than its type allows.
    #[error("a variable-length integer has too many bytes")]
    Varint,
    /// A length is below -1, or -1 where null is not allowed.
    #[error("a length is negative")]
    Length,
    /// The record's fields end before or after its length says.
    #[error("its fields do not fill its length")]
    Size,
    /// The offset delta is outside the batch or does not rise.
    #[error("its offset delta is outside the batch or does not rise")]
    OffsetDelta,
    /// The record count is reached and bytes are left.
    #[error("bytes are left behind the last record")]
    TrailingBytes,
    /// The offsets of a batch to be appended are not 0, 1, 2, ...
    #[error("its offset delta is not its position, as a new batch requires")]
    NotSequential,
}
