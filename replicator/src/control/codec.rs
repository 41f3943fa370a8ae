//! How one field is laid out in a message body.

use thiserror::Error;

/// Why the bytes of a frame are not a message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The length field exceeds [`FRAME_LEN_MAX`](super::FRAME_LEN_MAX) or is shorter than a frame's head.
    #[error("frame length {0} is outside 4 to {max} bytes", max = super::FRAME_LEN_MAX)]
    FrameLen(usize),
    /// No message has this type number.
    #[error("unknown message type {0}")]
    UnknownType(u16),
    /// The message is encoded in a version this build does not read.
    #[error("message type {kind} has version {version}, this build reads {min} to {max}",
            min = super::VERSION_MIN, max = super::VERSION_MAX)]
    Version {
        /// The type number.
        kind: u16,
        /// The version found.
        version: u16,
    },
    /// A field ends after the end of the body.
    #[error("body ends inside field `{0}`")]
    Truncated(&'static str),
    /// A field holds a value outside its range.
    #[error("field `{0}` holds a value outside its range")]
    Value(&'static str),
    /// Bytes follow the last field.
    #[error("{0} bytes follow the last field")]
    Trailing(usize),
}

/// The bytes of a body not yet decoded.
pub(super) struct Body<'a>(pub(super) &'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self
            .0
            .split_at_checked(len)
            .ok_or(Malformed::Truncated(field))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], Malformed> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(Malformed::Truncated(field))?;
        self.0 = rest;
        Ok(*head)
    }
}

/// A value with one encoding. `decode` never allocates more than the body holds.
pub(super) trait Field: Sized {
    fn encode(&self, out: &mut Vec<u8>);
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed>;
}

macro_rules! integer_field {
    ($($int:ty),*) => { $(
        impl Field for $int {
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
                Ok(<$int>::from_le_bytes(body.array(field)?))
            }
        }
    )* };
}
integer_field!(u8, u16, u32, u64, i32, i64);

impl Field for [u8; 16] {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        body.array(field)
    }
}

impl Field for String {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_count(self.len(), out);
        out.extend_from_slice(self.as_bytes());
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        let len = u32::decode(body, field)? as usize;
        let bytes = body.take(len, field)?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| Malformed::Value(field))
    }
}

impl Field for Vec<u8> {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_count(self.len(), out);
        out.extend_from_slice(self);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        let len = u32::decode(body, field)? as usize;
        body.take(len, field).map(<[u8]>::to_vec)
    }
}

impl Field for Vec<u32> {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_list(self, out);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        decode_list(body, field)
    }
}

pub(super) fn encode_list<T: Field>(items: &[T], out: &mut Vec<u8>) {
    encode_count(items.len(), out);
    items.iter().for_each(|item| item.encode(out));
}

/// Grows as items are found: the count alone reserves nothing.
pub(super) fn decode_list<T: Field>(
    body: &mut Body<'_>,
    field: &'static str,
) -> Result<Vec<T>, Malformed> {
    let count = u32::decode(body, field)?;
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(T::decode(body, field)?);
    }
    Ok(items)
}

fn encode_count(count: usize, out: &mut Vec<u8>) {
    // A body that large is refused when the frame is closed; the count then never reaches the wire.
    u32::try_from(count).unwrap_or(u32::MAX).encode(out);
}

/// Declares message structs whose fields are encoded and decoded in the order of declaration, so that
/// the two directions cannot disagree.
macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty),* }

        impl Field for $name {
            fn encode(&self, out: &mut Vec<u8>) {
                $(Field::encode(&self.$field, out);)*
            }
            fn decode(body: &mut Body<'_>, _field: &'static str) -> Result<Self, Malformed> {
                Ok(Self { $($field: Field::decode(body, stringify!($field))?),* })
            }
        }
    )* };
}
pub(super) use messages;
