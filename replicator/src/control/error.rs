//! What can go wrong on a control connection.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;

use super::{ErrorCode, Malformed};

/// A control connection could not be set up, or broke.
///
/// After any of these but [`ControlError::TooLarge`] the connection is of no further use.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Another socket listens on the address already.
    #[error("cannot listen on {address}: another process holds this port")]
    AddressInUse {
        /// The address as it was given.
        address: String,
    },
    /// The address cannot be listened on, for another reason.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address as it was given.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// Nobody answered at the address.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// The address as it was given.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// Somebody else answered at a node's address.
    #[error("{address} is node {found}, the cluster file says node {expected}")]
    WrongNode {
        /// The address as it was given.
        address: String,
        /// The node id of the cluster file.
        expected: u32,
        /// The node id that answered; 0 is a client.
        found: u32,
    },
    /// The two sides speak no common version.
    #[error("{peer} speaks protocol versions {min} to {max}, this build {our_min} to {our_max}",
            our_min = super::VERSION_MIN, our_max = super::VERSION_MAX)]
    UnsupportedVersion {
        /// The peer.
        peer: SocketAddr,
        /// The oldest version it speaks.
        min: u16,
        /// The newest version it speaks.
        max: u16,
    },
    /// The two sides read different cluster files.
    #[error("{peer} was started with a different cluster file")]
    ClusterMismatch {
        /// The peer.
        peer: SocketAddr,
    },
    /// The peer reported an error and means to close the connection.
    #[error("{peer} refused: {message} [{code}]")]
    Refused {
        /// The peer.
        peer: SocketAddr,
        /// Why.
        code: ErrorCode,
        /// The cause in the peer's words.
        message: String,
    },
    /// The peer's first message was not a [`Hello`](super::Hello).
    #[error("{peer} did not greet: its first message has type {kind}; is it a farlog node?")]
    NoHello {
        /// The peer.
        peer: SocketAddr,
        /// The type number found.
        kind: u16,
    },
    /// The peer sent what is not a message.
    #[error("{peer} sent a malformed message: {source}")]
    Malformed {
        /// The peer.
        peer: SocketAddr,
        /// What is wrong with it.
        source: Malformed,
    },
    /// Our own message does not fit a frame; nothing was sent.
    #[error("message of {len} bytes exceeds a frame of {max} bytes", max = super::FRAME_LEN_MAX)]
    TooLarge {
        /// Length of the frame it would take.
        len: usize,
    },
    /// The peer did not answer, or did not take our bytes, in time.
    #[error("{peer} did not {action} within {timeout:?}")]
    Timeout {
        /// The peer.
        peer: SocketAddr,
        /// What was waited for.
        action: &'static str,
        /// How long.
        timeout: Duration,
    },
    /// The connection is closed, in order or because the peer died.
    #[error("{peer} closed the connection")]
    Closed {
        /// The peer.
        peer: SocketAddr,
    },
    /// The connection broke.
    #[error("connection to {peer} broke: {source}")]
    Io {
        /// The peer.
        peer: SocketAddr,
        /// The cause.
        source: io::Error,
    },
}
