//! Decompression of a batch's records, bounded by the caller.

use std::fmt;
use std::io::{self, Read};

use super::error::BatchError;

/// Codec of a batch's records, numbered as in the attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Stored as they are.
    None = 0,
    /// RFC 1952, one or more members.
    Gzip = 1,
    /// Raw snappy blocks in xerial's framing, or one raw block.
    Snappy = 2,
    /// LZ4 frames.
    Lz4 = 3,
    /// Zstandard frames.
    Zstd = 4,
}

impl Compression {
    pub(super) fn from_bits(codec: u8) -> Result<Self, BatchError> {
        match codec {
            0 => Ok(Self::None),
            1 => Ok(Self::Gzip),
            2 => Ok(Self::Snappy),
            3 => Ok(Self::Lz4),
            4 => Ok(Self::Zstd),
            codec => Err(BatchError::UnknownCodec { codec }),
        }
    }

    /// Decompresses `body` to at most `limit` bytes.
    pub(super) fn decompress(self, body: &[u8], limit: usize) -> Result<Vec<u8>, BatchError> {
        match self {
            Self::None => self.read_all(body, limit),
            Self::Gzip => self.read_all(flate2::read::MultiGzDecoder::new(body), limit),
            Self::Snappy => snappy(body, limit),
            Self::Lz4 => self.read_all(lz4_flex::frame::FrameDecoder::new(body), limit),
            Self::Zstd => self.zstd(body, limit),
        }
    }

    /// One frame after another, as the reference decoder reads a stream.
    fn zstd(self, mut body: &[u8], limit: usize) -> Result<Vec<u8>, BatchError> {
        let mut out = Vec::new();
        while !body.is_empty() {
            let frame = ruzstd::decoding::StreamingDecoder::new(&mut body)
                .map_err(|cause| self.failed(&cause))?;
            out.append(&mut self.read_all(frame, limit - out.len())?);
        }
        Ok(out)
    }

    /// Reads to the end or one byte past the limit, whichever comes first.
    fn read_all(self, from: impl Read, limit: usize) -> Result<Vec<u8>, BatchError> {
        let mut out = Vec::new();
        let mut bounded = from.take((limit as u64).saturating_add(1));
        bounded
            .read_to_end(&mut out)
            .map_err(|cause: io::Error| self.failed(&cause))?;
        if out.len() > limit {
            return Err(BatchError::LimitExceeded { codec: self, limit });
        }
        Ok(out)
    }

    fn failed(self, cause: &dyn fmt::Display) -> BatchError {
        BatchError::Decompress {
            codec: self,
            cause: cause.to_string(),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// Start of a stream of xerial's snappy-java, behind which stand two version numbers.
const XERIAL_MAGIC: [u8; 8] = [0x82, b'S', b'N', b'A', b'P', b'P', b'Y', 0];
const XERIAL_HEADER_LEN: usize = XERIAL_MAGIC.len() + 2 * size_of::<i32>();

/// Snappy as Kafka's clients write it: xerial blocks behind their lengths, or one raw block.
fn snappy(body: &[u8], limit: usize) -> Result<Vec<u8>, BatchError> {
    let mut out = Vec::new();
    if !body.starts_with(&XERIAL_MAGIC) {
        snappy_block(body, limit, &mut out)?;
        return Ok(out);
    }
    let mut rest = body;
    while !rest.is_empty() {
        // Concatenated streams repeat the header; no block is as long as the magic would be.
        if rest.starts_with(&XERIAL_MAGIC) {
            rest = rest.get(XERIAL_HEADER_LEN..).ok_or_else(snappy_cut_off)?;
            continue;
        }
        let (len, blocks) = rest.split_first_chunk().ok_or_else(snappy_cut_off)?;
        let len = u32::from_be_bytes(*len) as usize;
        let (block, behind) = blocks.split_at_checked(len).ok_or_else(snappy_cut_off)?;
        snappy_block(block, limit, &mut out)?;
        rest = behind;
    }
    Ok(out)
}

/// Appends one raw block to `out`.
fn snappy_block(block: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<(), BatchError> {
    /// No snappy element yields more bytes per byte than a copy of 64 bytes in 3.
    const RATIO_MAX: usize = 64 / 3 + 1;

    let codec = Compression::Snappy;
    let len = snap::raw::decompress_len(block).map_err(|cause| codec.failed(&cause))?;
    if len > limit - out.len() {
        return Err(BatchError::LimitExceeded { codec, limit });
    }
    if len > block.len().saturating_mul(RATIO_MAX) {
        return Err(codec.failed(&format_args!(
            "{len} bytes cannot come from {}",
            block.len()
        )));
    }
    let start = out.len();
    out.resize(start + len, 0);
    let mut decoder = snap::raw::Decoder::new();
    decoder
        .decompress(block, &mut out[start..])
        .map_err(|cause| codec.failed(&cause))?;
    Ok(())
}

fn snappy_cut_off() -> BatchError {
    Compression::Snappy.failed(&"a block is cut off")
}
