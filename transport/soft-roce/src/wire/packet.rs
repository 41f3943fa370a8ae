//! One packet, seen in the UDP payload that carries it.

use thiserror::Error;

use super::icrc::ICRC_LEN;
use super::{Headers, pad_count};

/// Why a UDP payload is not a packet of a connection or a datagram. Such a packet is dropped silently.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Malformed {
    /// The payload ends before its headers and ICRC do.
    #[error("packet of {have} bytes, at least {need} needed for its headers and ICRC")]
    Truncated {
        /// Bytes the packet needs at least.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// The transport header version is not 0.
    #[error("transport header version {0}, only 0 is known")]
    Version(u8),
    /// The opcode is reserved or of another transport.
    #[error("opcode {0:#04x} is none of a connection's or a datagram's")]
    Opcode(u8),
    /// The pad count exceeds the bytes between the headers and the ICRC.
    #[error("pad count {pad_count} but only {have} bytes behind the headers")]
    Pad {
        /// Pad bytes the BTH claims.
        pad_count: u8,
        /// Bytes there are.
        have: usize,
    },
}

/// A parsed packet: its headers, and its payload still in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet<'a> {
    /// The BTH and the extended headers.
    pub headers: Headers,
    /// Payload without pad and ICRC.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Reads a UDP payload, ICRC included but not checked: that is [`icrc`](super::icrc)'s part.
    ///
    /// # Errors
    ///
    /// [`Malformed`] names the rule the bytes break. Payload lengths against the path MTU, and pad
    /// counts that are merely wrong ([`Packet::is_padded_right`]), are the responder's to judge:
    /// they deserve a NAK, not silence.
    pub fn parse(udp_payload: &'a [u8]) -> Result<Self, Malformed> {
        let have = udp_payload.len();
        let covered = &udp_payload[..have.saturating_sub(ICRC_LEN)];
        let (headers, rest) = Headers::parse(covered).map_err(|error| match error {
            Malformed::Truncated { need, .. } => Malformed::Truncated {
                need: need + ICRC_LEN,
                have,
            },
            other => other,
        })?;
        let pad = headers.bth.pad_count;
        let payload_len = rest
            .len()
            .checked_sub(usize::from(pad))
            .ok_or(Malformed::Pad {
                pad_count: pad,
                have: rest.len(),
            })?;
        Ok(Self {
            headers,
            payload: &rest[..payload_len],
        })
    }

    /// Whether the pad count is the one that aligns this payload to four bytes.
    pub fn is_padded_right(&self) -> bool {
        usize::from(self.headers.bth.pad_count) == pad_count(self.payload.len())
    }
}
