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
        let mut out = Vec::new();
        match self {
            Self::None => self.read_all(body, limit, &mut out)?,
            Self::Gzip => {
                self.read_all(flate2::read::MultiGzDecoder::new(body), limit, &mut out)?;
            }
            Self::Snappy => snappy(body, limit, &mut out)?,
            Self::Lz4 => {
                self.read_all(lz4_flex::frame::FrameDecoder::new(body), limit, &mut out)?;
            }
            Self::Zstd => {
                // One frame after another, as the reference decoder reads a stream.
                let mut rest = body;
                while !rest.is_empty() {
                    let frame = ruzstd::decoding::StreamingDecoder::new(&mut rest)
                        .map_err(|cause| self.failed(&cause))?;
                    self.read_all(frame, limit, &mut out)?;
                }
            }
        }
        Ok(out)
    }

    /// Reads to the end or until `out` is one byte longer than the limit, whichever comes first.
    fn read_all(self, from: impl Read, limit: usize, out: &mut Vec<u8>) -> Result<(), BatchError> {
        let most = (limit - out.len()) as u64;
        let mut bounded = from.take(most.saturating_add(1));
        bounded
            .read_to_end(out)
            .map_err(|cause: io::Error| self.failed(&cause))?;
        if out.len() > limit {
            return Err(BatchError::LimitExceeded { codec: self, limit });
        }
        Ok(())
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
fn snappy(body: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<(), BatchError> {
    if !body.starts_with(&XERIAL_MAGIC) {
        return snappy_block(body, limit, out);
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
        snappy_block(block, limit, out)?;
        rest = behind;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LIMIT: usize = 1 << 20;

    fn text() -> Vec<u8> {
        (0..5000)
            .flat_map(|i| format!("EWR,IAH,{i};").into_bytes())
            .collect()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        ruzstd::encoding::compress_to_vec(data, level)
    }

    fn snappy_raw(data: &[u8]) -> Vec<u8> {
        snap::raw::Encoder::new().compress_vec(data).unwrap()
    }

    fn xerial(data: &[u8]) -> Vec<u8> {
        let mut out = XERIAL_MAGIC.to_vec();
        out.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 1]);
        for chunk in data.chunks(32 << 10) {
            let block = snappy_raw(chunk);
            out.extend_from_slice(&u32::try_from(block.len()).unwrap().to_be_bytes());
            out.extend_from_slice(&block);
        }
        out
    }

    type Encode = fn(&[u8]) -> Vec<u8>;
    const ENCODERS: [(Compression, Encode); 5] = [
        (Compression::Gzip, gzip),
        (Compression::Snappy, snappy_raw),
        (Compression::Snappy, xerial),
        (Compression::Lz4, lz4),
        (Compression::Zstd, zstd),
    ];

    #[test]
    fn every_codec_stops_at_its_limit_and_not_before() {
        let data = text();
        for (codec, encode) in ENCODERS {
            let bytes = encode(&data);
            assert_eq!(
                codec.decompress(&bytes, LIMIT).as_ref(),
                Ok(&data),
                "{codec}"
            );
            assert_eq!(
                codec.decompress(&bytes, data.len()).as_ref(),
                Ok(&data),
                "{codec}"
            );
            let limit = data.len() - 1;
            let error = BatchError::LimitExceeded { codec, limit };
            assert_eq!(codec.decompress(&bytes, limit), Err(error));
        }
    }

    #[test]
    fn concatenated_streams_are_one() {
        let (first, second) = (text(), b"end".to_vec());
        let both = [first.clone(), second.clone()].concat();
        for (codec, encode) in [ENCODERS[0], ENCODERS[2], ENCODERS[4]] {
            let bytes = [encode(&first), encode(&second)].concat();
            assert_eq!(
                codec.decompress(&bytes, LIMIT).as_ref(),
                Ok(&both),
                "{codec}"
            );
            let limit = both.len() - 1;
            let error = BatchError::LimitExceeded { codec, limit };
            assert_eq!(codec.decompress(&bytes, limit), Err(error));
        }
    }

    #[test]
    fn damaged_streams_are_refused_or_short() {
        let data = text();
        for (codec, encode) in ENCODERS {
            let bytes = encode(&data);
            for cut in (0..bytes.len().min(400)).step_by(7) {
                if let Ok(short) = codec.decompress(&bytes[..cut], LIMIT) {
                    assert!(
                        short.len() < data.len() && data.starts_with(&short),
                        "{codec} {cut}"
                    );
                }
            }
            for at in (0..bytes.len().min(400)).step_by(3) {
                let mut flipped = bytes.clone();
                flipped[at] ^= 0x40;
                if let Ok(out) = codec.decompress(&flipped, LIMIT) {
                    assert!(out.len() <= LIMIT);
                }
            }
        }
    }

    /// A snappy block may claim 4 GiB in five bytes: nothing is allocated for it.
    #[test]
    fn a_claimed_length_is_not_believed() {
        let claim = [0xff, 0xff, 0xff, 0xff, 0x0f, 0];
        let result = Compression::Snappy.decompress(&claim, usize::MAX);
        assert!(
            matches!(result, Err(BatchError::Decompress { .. })),
            "{result:?}"
        );
    }
}
