//! Invariant CRC: the last four bytes of every packet.
//!
//! CRC-32 of Ethernet over eight bytes of ones, the IP and UDP headers and the UDP payload, with the
//! fields that routers and switches may change (type of service, TTL, checksums, congestion marks)
//! set to ones. It is stored little endian.
//!
//! # The field a socket does not show
//!
//! Over IPv4 the CRC covers the identification of the IP header, and a UDP socket shows that field to
//! neither its sender nor its receiver. A sender knows it all the same (an unconnected socket that
//! forbids fragmentation sends 0, and 0, 1, 2, ... in the segments of one GSO call). A receiver tries
//! a guess first; where the guess fails, [`Flow::verify`] solves for the identification, which the
//! CRC's linearity makes cheap: with `n` bytes from the identification to the end,
//!
//! ```text
//! received ^ computed = (sent ^ guessed identification) * x^(8 n)   modulo the CRC's polynomial
//! ```
//!
//! so dividing by that power must leave a word whose upper sixteen bits are zero. What remains is a
//! check of 16 bits where the guess failed, and of 32 bits where it held or the network is IPv6.
//!
//! # References
//!
//! InfiniBand Architecture Specification, volume 1, "Invariant CRC", and annex A17 (RoCEv2).

use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use crc32fast::Hasher;

use super::{Bth, to_ipv6};

/// Bytes of the ICRC.
pub const ICRC_LEN: usize = 4;

const UDP_HEADER_LEN: usize = 8;
const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
const UDP_PROTOCOL: u8 = 17;
/// Do not fragment, offset 0.
const DF: [u8; 2] = [0x40, 0];

/// CRC-32 of the eight bytes of ones that stand for the InfiniBand local route header.
const LRH_CRC: u32 = !0xdebb_20e3;

/// Where a packet comes from and goes to: the part of the ICRC that is not in the UDP payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// Over IPv4.
    V4 {
        /// Sender.
        src: SocketAddrV4,
        /// Receiver.
        dst: SocketAddrV4,
    },
    /// Over IPv6; the identification is ignored.
    V6 {
        /// Sender.
        src: SocketAddrV6,
        /// Receiver.
        dst: SocketAddrV6,
    },
}

impl Flow {
    /// The flow between two addresses.
    ///
    /// Of two families, which no packet connects, the IPv4 address counts as its IPv4-mapped one.
    pub fn new(src: SocketAddr, dst: SocketAddr) -> Self {
        match (src, dst) {
            (SocketAddr::V4(src), SocketAddr::V4(dst)) => Self::V4 { src, dst },
            (src, dst) => Self::V6 {
                src: mapped(src),
                dst: mapped(dst),
            },
        }
    }

    /// Computes the ICRC of the UDP payload `covered`, which ends before the ICRC.
    ///
    /// # Panics
    ///
    /// If `covered` does not fit a datagram.
    pub fn compute(&self, identification: u16, covered: &[u8]) -> u32 {
        let udp_len = UDP_HEADER_LEN + covered.len() + ICRC_LEN;
        let udp_len = u16::try_from(udp_len).expect("a UDP payload is shorter than 64 KiB");
        match self {
            Self::V4 { src, dst } => hash(&ipv4(src, dst, identification, udp_len), covered),
            Self::V6 { src, dst } => hash(&ipv6(src, dst, udp_len), covered),
        }
    }

    /// Writes the ICRC into the last four bytes of `udp_payload`.
    ///
    /// # Panics
    ///
    /// If `udp_payload` is shorter than four bytes or does not fit a datagram.
    pub fn seal(&self, identification: u16, udp_payload: &mut [u8]) {
        let (covered, icrc) = udp_payload.split_at_mut(udp_payload.len() - ICRC_LEN);
        icrc.copy_from_slice(&self.compute(identification, covered).to_le_bytes());
    }

    /// Checks the ICRC at the end of `udp_payload`, with the identification known or guessed.
    ///
    /// Returns the identification the packet was sent with, or `None` if no identification makes the
    /// ICRC right: the packet is to be dropped.
    pub fn verify(&self, guess: u16, udp_payload: &[u8]) -> Option<u16> {
        let difference = self.difference(guess, udp_payload)?;
        match (difference, self) {
            (0, _) => Some(guess),
            (_, Self::V4 { .. }) => {
                solve(difference, udp_payload.len() - ICRC_LEN).map(|delta| guess ^ delta)
            }
            (_, Self::V6 { .. }) => None,
        }
    }

    /// Checks the ICRC at the end of `udp_payload` with a known identification: all 32 bits.
    pub fn is_exact(&self, identification: u16, udp_payload: &[u8]) -> bool {
        self.difference(identification, udp_payload) == Some(0)
    }

    /// Received ICRC xor computed ICRC; `None` if the bytes cannot be a packet.
    fn difference(&self, identification: u16, udp_payload: &[u8]) -> Option<u32> {
        let (covered, icrc) = udp_payload.split_last_chunk()?;
        if covered.len() < Bth::LEN || covered.len() > UDP_COVERED_MAX {
            return None;
        }
        Some(u32::from_le_bytes(*icrc) ^ self.compute(identification, covered))
    }
}

/// Longest covered UDP payload: what the 16-bit length of an IPv4 packet leaves.
const UDP_COVERED_MAX: usize = u16::MAX as usize - IPV4_HEADER_LEN - UDP_HEADER_LEN - ICRC_LEN;

fn mapped(address: SocketAddr) -> SocketAddrV6 {
    SocketAddrV6::new(to_ipv6(address.ip()), address.port(), 0, 0)
}

/// Hashes the IP and UDP headers and then `covered`, its switches' byte as ones.
///
/// All that is short goes in one call: a call costs as much as hashing some fifty bytes.
fn hash(ip_udp: &[u8], covered: &[u8]) -> u32 {
    let (bth, rest) = covered.split_at(Bth::LEN.min(covered.len()));
    let mut head = [0; IPV6_HEADER_LEN + UDP_HEADER_LEN + Bth::LEN];
    let head = &mut head[..ip_udp.len() + Bth::LEN];
    head[..ip_udp.len()].copy_from_slice(ip_udp);
    head[ip_udp.len()..][..bth.len()].copy_from_slice(bth);
    // FECN, BECN and six reserved bits.
    head[ip_udp.len() + 4] = 0xff;
    let mut hasher = Hasher::new_with_initial(LRH_CRC);
    hasher.update(&head[..ip_udp.len() + bth.len()]);
    hasher.update(rest);
    hasher.finalize()
}

fn ipv4(
    src: &SocketAddrV4,
    dst: &SocketAddrV4,
    identification: u16,
    udp_len: u16,
) -> [u8; IPV4_HEADER_LEN + UDP_HEADER_LEN] {
    let mut out = [0xff; IPV4_HEADER_LEN + UDP_HEADER_LEN];
    let total_len = udp_len.saturating_add(20);
    out[0] = 0x45;
    out[2..4].copy_from_slice(&total_len.to_be_bytes());
    out[4..6].copy_from_slice(&identification.to_be_bytes());
    out[6..8].copy_from_slice(&DF);
    out[9] = UDP_PROTOCOL;
    out[12..16].copy_from_slice(&src.ip().octets());
    out[16..20].copy_from_slice(&dst.ip().octets());
    udp(&mut out[20..], src.port(), dst.port(), udp_len);
    out
}

fn ipv6(
    src: &SocketAddrV6,
    dst: &SocketAddrV6,
    udp_len: u16,
) -> [u8; IPV6_HEADER_LEN + UDP_HEADER_LEN] {
    let mut out = [0xff; IPV6_HEADER_LEN + UDP_HEADER_LEN];
    out[0] = 0x6f;
    out[4..6].copy_from_slice(&udp_len.to_be_bytes());
    out[6] = UDP_PROTOCOL;
    out[8..24].copy_from_slice(&src.ip().octets());
    out[24..40].copy_from_slice(&dst.ip().octets());
    udp(&mut out[40..], src.port(), dst.port(), udp_len);
    out
}

/// Fills a UDP header; the checksum stays ones.
fn udp(out: &mut [u8], src_port: u16, dst_port: u16, udp_len: u16) {
    out[..2].copy_from_slice(&src_port.to_be_bytes());
    out[2..4].copy_from_slice(&dst_port.to_be_bytes());
    out[4..6].copy_from_slice(&udp_len.to_be_bytes());
}

/// The identification bits that explain `difference`, if they explain it exactly.
///
/// In the CRC's reflected order the word that starts at the identification holds it in its low 16
/// bits, first byte lowest, and the flags above it.
fn solve(difference: u32, covered_len: usize) -> Option<u16> {
    // The identification's word, the 12 bytes of IP header and 8 of UDP header behind it.
    let word = multiply(difference, inverse_power(24 + covered_len));
    let [first, second, flags, offset] = word.to_le_bytes();
    (flags == 0 && offset == 0).then_some(u16::from_be_bytes([first, second]))
}

/// The CRC's polynomial in reflected order: bit 31 is x^0, bit 0 is x^31, x^32 is left out.
const POLYNOMIAL: u32 = 0xedb8_8320;
const ONE: u32 = 1 << 31;

/// x^-(8 * `bytes`) modulo the polynomial, for `bytes` below 2^17.
fn inverse_power(bytes: usize) -> u32 {
    (0..INVERSE_POWERS.len())
        .filter(|bit| bytes >> bit & 1 != 0)
        .fold(ONE, |product, bit| multiply(product, INVERSE_POWERS[bit]))
}

/// x^-(8 * 2^i).
const INVERSE_POWERS: [u32; 17] = {
    let mut powers = [ONE; 17];
    let mut shift = 0;
    while shift < 8 {
        // Times x is (b >> 1) ^ POLYNOMIAL for odd b; this is its inverse.
        let is_reduced = powers[0] & ONE != 0;
        powers[0] = if is_reduced {
            (powers[0] ^ POLYNOMIAL) << 1 | 1
        } else {
            powers[0] << 1
        };
        shift += 1;
    }
    let mut i = 1;
    while i < powers.len() {
        powers[i] = multiply(powers[i - 1], powers[i - 1]);
        i += 1;
    }
    powers
};

/// Product modulo the polynomial, in reflected order.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 32;
    while bit > 0 {
        bit -= 1;
        product ^= b & (a >> bit & 1).wrapping_neg();
        b = b >> 1 ^ POLYNOMIAL & (b & 1).wrapping_neg();
    }
    product
}

#[cfg(test)]
mod tests;
