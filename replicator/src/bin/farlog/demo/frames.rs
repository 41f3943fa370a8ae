//! What the demo's consumer process writes to its standard output: every record, exactly.
//!
//! ```text
//! record:  0 u8 | partition u32 | offset i64 | key length i32 (-1: none) | value length i32 | key | value
//! report:  1 u8 | length i32 | JSON                                        (little endian)
//! progress: 2 u8
//! ```

use std::io::{self, Read, Write};

const RECORD: u8 = 0;
const REPORT: u8 = 1;
const PROGRESS: u8 = 2;
/// Longer keys, values and reports cannot come from our own consumer.
const FIELD_LEN_MAX: usize = 16 << 20;

/// What the consumer process has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A record it fetched.
    Record(FetchedRecord),
    /// It is at work on what yields no records.
    Progress,
    /// Its closing report, as JSON.
    Report(Vec<u8>),
}

/// One record with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FetchedRecord {
    pub(crate) partition: u32,
    pub(crate) offset: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
}

pub(crate) fn write_record(
    out: &mut impl Write,
    partition: u32,
    offset: i64,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
) -> io::Result<()> {
    out.write_all(&[RECORD])?;
    out.write_all(&partition.to_le_bytes())?;
    out.write_all(&offset.to_le_bytes())?;
    out.write_all(&nullable_len(key)?.to_le_bytes())?;
    out.write_all(&nullable_len(value)?.to_le_bytes())?;
    out.write_all(key.unwrap_or_default())?;
    out.write_all(value.unwrap_or_default())
}

pub(crate) fn write_report(out: &mut impl Write, json: &[u8]) -> io::Result<()> {
    out.write_all(&[REPORT])?;
    out.write_all(&nullable_len(Some(json))?.to_le_bytes())?;
    out.write_all(json)
}

pub(crate) fn write_progress(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[PROGRESS])?;
    out.flush()
}

/// The next frame; `None` where the stream ends between two frames.
pub(crate) fn read(input: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut kind = [0];
    if input.read(&mut kind)? == 0 {
        return Ok(None);
    }
    match kind[0] {
        RECORD => {
            let partition = u32::from_le_bytes(array(input)?);
            let offset = i64::from_le_bytes(array(input)?);
            let key_len = i32::from_le_bytes(array(input)?);
            let value_len = i32::from_le_bytes(array(input)?);
            let key = nullable(input, key_len)?;
            let value = nullable(input, value_len)?;
            Ok(Some(Frame::Record(FetchedRecord {
                partition,
                offset,
                key,
                value,
            })))
        }
        REPORT => {
            let len = i32::from_le_bytes(array(input)?);
            Ok(Some(Frame::Report(
                nullable(input, len)?.unwrap_or_default(),
            )))
        }
        PROGRESS => Ok(Some(Frame::Progress)),
        other => Err(invalid(format!("frame type {other}"))),
    }
}

fn nullable_len(bytes: Option<&[u8]>) -> io::Result<i32> {
    match bytes {
        None => Ok(-1),
        Some(bytes) if bytes.len() <= FIELD_LEN_MAX => {
            Ok(i32::try_from(bytes.len()).expect("bounded above"))
        }
        Some(bytes) => Err(invalid(format!("field of {} bytes", bytes.len()))),
    }
}

fn nullable(input: &mut impl Read, len: i32) -> io::Result<Option<Vec<u8>>> {
    let Ok(len) = usize::try_from(len) else {
        return Ok(None);
    };
    if len > FIELD_LEN_MAX {
        return Err(invalid(format!("field of {len} bytes")));
    }
    let mut bytes = vec![0; len];
    input.read_exact(&mut bytes)?;
    Ok(Some(bytes))
}

fn array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were() {
        let mut bytes = Vec::new();
        write_record(&mut bytes, 2, 77, Some(b""), Some(b"a\nb\xff")).unwrap();
        write_record(&mut bytes, 0, i64::MAX, None, None).unwrap();
        write_progress(&mut bytes).unwrap();
        write_report(&mut bytes, b"{}").unwrap();
        let mut input = bytes.as_slice();
        let first = FetchedRecord {
            partition: 2,
            offset: 77,
            key: Some(vec![]),
            value: Some(b"a\nb\xff".to_vec()),
        };
        assert_eq!(read(&mut input).unwrap(), Some(Frame::Record(first)));
        let second = FetchedRecord {
            partition: 0,
            offset: i64::MAX,
            key: None,
            value: None,
        };
        assert_eq!(read(&mut input).unwrap(), Some(Frame::Record(second)));
        assert_eq!(read(&mut input).unwrap(), Some(Frame::Progress));
        assert_eq!(
            read(&mut input).unwrap(),
            Some(Frame::Report(b"{}".to_vec()))
        );
        assert_eq!(read(&mut input).unwrap(), None);
    }

    #[test]
    fn a_stream_that_ends_inside_a_frame_is_an_error() {
        let mut bytes = Vec::new();
        write_record(&mut bytes, 2, 77, Some(b"key"), Some(b"value")).unwrap();
        for len in 1..bytes.len() {
            assert!(read(&mut &bytes[..len]).is_err(), "{len}");
        }
        assert!(read(&mut &[9u8][..]).is_err());
    }
}
