//! Zigzag variable-length integers of at most 5 (`i32`) or 10 (`i64`) bytes.

use super::error::RecordFault;

/// Bytes that `value` occupies as a varint.
pub(crate) const fn varint_len(value: i32) -> usize {
    varlong_len(value as i64)
}

/// Bytes that `value` occupies as a varlong.
pub(crate) const fn varlong_len(value: i64) -> usize {
    // Seven bits a byte; `| 1` because zero takes a byte too.
    let bits = 64 - (zigzag(value) | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

/// Writes `value` to the start of `out` and returns its length; `out` has room for it.
#[inline]
pub(crate) fn put_varlong(out: &mut [u8], value: i64) -> usize {
    let mut rest = zigzag(value);
    let mut len = 0;
    while rest >= 0x80 {
        out[len] = (rest & 0x7f) as u8 | 0x80;
        rest >>= 7;
        len += 1;
    }
    out[len] = (rest & 0x7f) as u8;
    len + 1
}

/// A place in a record's bytes; every read is bounded by what is left.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.bytes
    }

    pub(crate) fn is_empty(self) -> bool {
        self.bytes.is_empty()
    }

    #[inline]
    pub(crate) fn byte(&mut self) -> Result<u8, RecordFault> {
        let (&first, rest) = self.bytes.split_first().ok_or(RecordFault::CutOff)?;
        self.bytes = rest;
        Ok(first)
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], RecordFault> {
        let (taken, rest) = self
            .bytes
            .split_at_checked(len)
            .ok_or(RecordFault::CutOff)?;
        self.bytes = rest;
        Ok(taken)
    }

    #[inline]
    pub(crate) fn varint(&mut self) -> Result<i32, RecordFault> {
        i32::try_from(self.varlong()?).map_err(|_| RecordFault::Varint)
    }

    #[inline]
    pub(crate) fn varlong(&mut self) -> Result<i64, RecordFault> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            // The tenth byte holds bit 63 alone.
            if shift == 63 && byte > 1 {
                return Err(RecordFault::Varint);
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
            }
        }
        Err(RecordFault::Varint)
    }

    /// A length that must not be negative.
    pub(crate) fn len(&mut self) -> Result<usize, RecordFault> {
        usize::try_from(self.varint()?).map_err(|_| RecordFault::Length)
    }

    /// Bytes behind their length; -1 is null.
    pub(crate) fn nullable_bytes(&mut self) -> Result<Option<&'a [u8]>, RecordFault> {
        match self.varint()? {
            -1 => Ok(None),
            len => {
                let len = usize::try_from(len).map_err(|_| RecordFault::Length)?;
                self.take(len).map(Some)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_encodings() {
        // Kafka protocol guide, "VARINT": zigzag as Protocol Buffers.
        for (value, bytes) in [
            (0, &[0x00][..]),
            (-1, &[0x01]),
            (1, &[0x02]),
            (63, &[0x7e]),
            (-64, &[0x7f]),
            (64, &[0x80, 0x01]),
            (8191, &[0xfe, 0x7f]),
            (8192, &[0x80, 0x80, 0x01]),
            (i64::from(i32::MAX), &[0xfe, 0xff, 0xff, 0xff, 0x0f]),
            (i64::from(i32::MIN), &[0xff, 0xff, 0xff, 0xff, 0x0f]),
        ] {
            let mut out = [0xa5; 10];
            let len = put_varlong(&mut out, value);
            assert_eq!(&out[..len], bytes, "{value}");
            assert_eq!(len, varlong_len(value));
            assert!(out[len..].iter().all(|&b| b == 0xa5));
            assert_eq!(Cursor::new(bytes).varlong(), Ok(value));
        }
    }

    #[test]
    fn too_long_or_too_large() {
        assert_eq!(Cursor::new(&[0x80; 11]).varlong(), Err(RecordFault::Varint));
        assert_eq!(Cursor::new(&[0x80; 3]).varlong(), Err(RecordFault::CutOff));
        let mut tenth = [0xff; 10];
        tenth[9] = 2;
        assert_eq!(Cursor::new(&tenth).varlong(), Err(RecordFault::Varint));
        let beyond_i32 = [0x80, 0x80, 0x80, 0x80, 0x10];
        assert_eq!(Cursor::new(&beyond_i32).varint(), Err(RecordFault::Varint));
    }

    proptest! {
        #[test]
        fn round_trip(value: i64, small: i32) {
            let mut out = [0; 10];
            let len = put_varlong(&mut out, value);
            prop_assert_eq!(len, varlong_len(value));
            let mut cursor = Cursor::new(&out[..len]);
            prop_assert_eq!(cursor.varlong(), Ok(value));
            prop_assert!(cursor.is_empty());
            let len = put_varlong(&mut out, i64::from(small));
            prop_assert_eq!(len, varint_len(small));
            prop_assert_eq!(Cursor::new(&out[..len]).varint(), Ok(small));
        }
    }
}
