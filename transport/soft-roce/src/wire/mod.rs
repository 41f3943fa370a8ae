//! The RoCEv2 wire format: what one UDP payload on port 4791 means.
//!
//! ```text
//! IPv4 20 | UDP 8 | BTH 12 | extended headers | payload | pad 0..3 | ICRC 4
//!                 '------------------ UDP payload -----------------------'
//! ```
//!
//! [`Packet::parse`] reads a UDP payload, [`Headers::emit`] writes one, [`icrc`] protects it. Every
//! multi-byte field is big endian, the ICRC alone is little endian.
//!
//! Stated as absences: this module knows no socket, clock, queue pair or memory region. It
//! allocates nothing, and no byte sequence can make it panic.

mod aeth;
mod atomic_eth;
mod bth;
mod deth;
mod grh;
mod headers;
pub mod icrc;
mod number;
mod opcode;
mod packet;
mod pretty;
mod reth;
mod timer;

use std::net::{IpAddr, Ipv6Addr};

pub use aeth::{Aeth, NakCode, Syndrome};
pub use atomic_eth::AtomicEth;
pub use bth::{Bth, DEFAULT_PKEY, pkey_matches};
pub use deth::Deth;
pub use grh::{GRH_LEN, grh, grh_addresses, ipv4_header, ipv6_header};
pub use headers::Headers;
pub use number::{Psn, Qpn};
pub use opcode::{ExtHeaders, Opcode, OpcodeInfo, Operation, PayloadLen, Transport};
pub use packet::{Malformed, Packet};
pub use reth::Reth;
pub use timer::{ack_timeout_ns, rnr_timer_ns};

/// UDP port of RoCEv2.
pub const ROCE_PORT: u16 = 4791;

/// Largest path MTU, in bytes of payload per packet.
pub const MTU_MAX: usize = 4096;

/// Largest UDP payload: BTH, RETH, ImmDt, a full payload and the ICRC. (A datagram has a DETH, which
/// is shorter than a RETH.)
pub const UDP_PAYLOAD_MAX: usize =
    Bth::LEN + Reth::LEN + headers::IMM_LEN + MTU_MAX + icrc::ICRC_LEN;

const _: () = assert!(UDP_PAYLOAD_MAX == 4132 && Deth::LEN < Reth::LEN);

/// The address as IPv6, an IPv4 address mapped: the form in which GIDs name it.
pub fn to_ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// Bytes of zero that follow a payload of `payload_len` bytes so that the ICRC is aligned.
pub const fn pad_count(payload_len: usize) -> usize {
    payload_len.wrapping_neg() & 3
}

#[cfg(test)]
mod tests;
