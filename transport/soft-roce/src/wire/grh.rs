//! What stands in front of a received datagram: 40 bytes that show where it came from.
//!
//! On InfiniBand they are the packet's global route header (GRH), which is laid out as an IPv6 header.
//! RoCEv2 puts the IP header there: an IPv6 header fills the place, an IPv4 header its end.
//!
//! ```text
//! IPv6: | IPv6 header 40                     |
//! IPv4: | undefined 20    | IPv4 header 20   |
//! ```

use std::net::Ipv4Addr;

use super::icrc::ICRC_LEN;
use super::{Packet, pad_count};

/// Bytes in front of a received datagram.
pub const GRH_LEN: usize = 40;

/// Bytes of an IPv4 header without options, and of a UDP header.
const IPV4_LEN: usize = 20;
const UDP_LEN: usize = 8;

const TTL: u8 = 64;
const PROTOCOL_UDP: u8 = 17;

/// The bytes in front of a datagram that came by IPv4, as [`ipv4_header`] knows them; zeros before.
pub fn ipv4_grh(src: Ipv4Addr, dst: Ipv4Addr, packet: &Packet<'_>) -> [u8; GRH_LEN] {
    let payload_len = packet.payload.len();
    let udp_payload_len = packet.headers.len() + payload_len + pad_count(payload_len) + ICRC_LEN;
    let mut grh = [0; GRH_LEN];
    grh[GRH_LEN - IPV4_LEN..].copy_from_slice(&ipv4_header(src, dst, 0, udp_payload_len));
    grh
}

/// Sender and receiver of a datagram that came by IPv4, from the bytes that this device put in front of
/// it; `None` for others.
pub fn ipv4_addresses(grh: &[u8; GRH_LEN]) -> Option<(Ipv4Addr, Ipv4Addr)> {
    let (before, header) = grh.split_at(GRH_LEN - IPV4_LEN);
    if before[0] != 0 || header[0] != 0x45 {
        return None;
    }
    let address = |at: usize| Ipv4Addr::from(std::array::from_fn::<u8, 4, _>(|i| header[at + i]));
    Some((address(12), address(16)))
}

/// The IPv4 header of a packet, as the kernel writes it for this device: DF, TTL 64, no options.
///
/// A socket does not show the header it received: what the sender chose otherwise stays unknown.
///
/// # Panics
///
/// If the packet is longer than an IPv4 packet can be.
pub fn ipv4_header(
    src: Ipv4Addr,
    dst: Ipv4Addr,
    identification: u16,
    udp_payload_len: usize,
) -> [u8; IPV4_LEN] {
    let len =
        u16::try_from(IPV4_LEN + UDP_LEN + udp_payload_len).expect("packets are below 64 KiB");
    let mut out = [0; IPV4_LEN];
    out[0] = 0x45;
    out[2..4].copy_from_slice(&len.to_be_bytes());
    out[4..6].copy_from_slice(&identification.to_be_bytes());
    out[6] = 0x40;
    out[8] = TTL;
    out[9] = PROTOCOL_UDP;
    out[12..16].copy_from_slice(&src.octets());
    out[16..].copy_from_slice(&dst.octets());
    let checksum = internet_checksum(&out);
    out[10..12].copy_from_slice(&checksum.to_be_bytes());
    out
}

/// The one's complement sum of RFC 1071 over an even number of bytes.
fn internet_checksum(bytes: &[u8]) -> u16 {
    bytes.chunks_exact(2).fold(u16::MAX, |sum, pair| {
        // Subtracting in one's complement: a borrow goes round to the lowest bit.
        let (sum, borrow) = sum.overflowing_sub(u16::from_be_bytes([pair[0], pair[1]]));
        sum.wrapping_sub(u16::from(borrow))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_of_a_captured_acknowledge_is_rebuilt() {
        // From kernel rxe, whose identification is its own.
        let captured = [
            0x45, 0, 0, 0x30, 0xe0, 0x89, 0x40, 0, 0x40, 0x11, 0x46, 0x1f, 10, 9, 0, 1, 10, 9, 0, 2,
        ];
        let (src, dst) = ([10, 9, 0, 1].into(), [10, 9, 0, 2].into());
        assert_eq!(ipv4_header(src, dst, 0xe089, 20), captured);
        let mut grh = [0; GRH_LEN];
        grh[20..].copy_from_slice(&captured);
        assert_eq!(ipv4_addresses(&grh), Some((src, dst)));
        grh[0] = 0x60;
        assert_eq!(ipv4_addresses(&grh), None, "the end of an IPv6 header");
    }
}
