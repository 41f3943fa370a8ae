//! Control-plane messages over TCP.
//!
//! Everything that is not bulk data travels here: greeting, queue pair end points, grants of memory,
//! offset look-ups, and a simple produce path. One TCP connection is one session between two
//! processes; when it closes, both sides destroy the queue pairs that were set up over it.
//!
//! ```text
//!  0        4      6         8
//! | length | type | version | body (length - 4 bytes) ...      little endian, length <= 1 MiB
//! ```
//!
//! `length` counts what follows it. Strings, byte strings and lists carry a `u32` count which is checked
//! against the bytes that are really there, so a peer cannot make us allocate more than it has sent.
//! Kafka batches and IB end points are opaque byte strings here.
//!
//! [`Connection`] greets with [`Hello`], agrees on a version and splits into a [`MessageReader`] and a
//! [`MessageWriter`]. This module knows no verbs, no log and no cluster state.

mod codec;
mod connection;
mod error;
mod listener;
mod message;

pub use codec::Malformed;
pub use connection::{Connection, MessageReader, MessageWriter};
pub use error::ControlError;
pub use listener::{Incoming, Listener};
pub use message::{
    Acks, Append, Appended, CutKind, Durable, ErrorCode, ErrorReply, Grant, GrantRequest, Hello,
    ImageGrant, ImageRequest, Lane, LaneReady, ListOffsets, ListOffsetsReply, LogEnd, Message,
    Metadata, MetadataRequest, Open, Opened, OpenedEntry, PartitionMetadata, Purpose, Revoke,
    Revoked, Role, Status, StatusRequest, Sync, Truncate,
};

/// The oldest protocol version this build speaks.
pub const VERSION_MIN: u16 = 1;
/// The newest protocol version this build speaks.
pub const VERSION_MAX: u16 = 2;
/// The version that brought fencing, and with it fail-over: leaders and followers speak no older one to
/// each other. Clients may.
pub const VERSION_FENCING: u16 = 2;
/// The largest frame on the wire after its length field, in bytes.
pub const FRAME_LEN_MAX: usize = 1 << 20;
/// The largest record batch one [`Append`] carries, in bytes: a frame less room for the other fields.
pub const BATCH_LEN_MAX: usize = FRAME_LEN_MAX - 4096;

#[cfg(test)]
mod tests;
