//! What stands in front of a received datagram: 40 bytes that show where it came from.
//!
//! On InfiniBand they are the packet's global route header (GRH), which is laid out as an IPv6 header.
//! RoCEv2 puts the IP header there: an IPv6 header fills the place, an IPv4 header its end.
//!
//! ```text
//! IPv6: | IPv6 header 40                     |
//! IPv4: | undefined 20    | IPv4 header 20   |
//! ```

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::icrc::ICRC_LEN;
use super::{Packet, pad_count, to_ipv6};

/// Bytes in front of a received datagram.
pub const GRH_LEN: usize = 40;

/// Bytes of an IP header without options, and of a UDP header.
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const UDP_LEN: usize = 8;

const TTL: u8 = 64;
const PROTOCOL_UDP: u8 = 17;

/// The bytes in front of a datagram, as [`ipv4_header`] and [`ipv6_header`] know them; zeros before the
/// former.
pub fn grh(src: IpAddr, dst: IpAddr, packet: &Packet<'_>) -> [u8; GRH_LEN] {
    let payload_len = packet.payload.len();
    let udp_payload_len = packet.headers.len() + payload_len + pad_count(payload_len) + ICRC_LEN;
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut grh = [0; GRH_LEN];
            grh[GRH_LEN - IPV4_LEN..].copy_from_slice(&ipv4_header(src, dst, 0, udp_payload_len));
            grh
        }
        (src, dst) => ipv6_header(to_ipv6(src), to_ipv6(dst), udp_payload_len),
    }
}

/// Sender and receiver of a datagram, from the bytes that this device put in front of it; `None` for
/// others.
pub fn grh_addresses(grh: &[u8; GRH_LEN]) -> Option<(IpAddr, IpAddr)> {
    match (grh[0] >> 4, grh[GRH_LEN - IPV4_LEN]) {
        (6, _) => {
            let address = |at: usize| Ipv6Addr::from(octets::<16>(grh, at)).into();
            Some((address(8), address(24)))
        }
        (0, 0x45) => {
            let address = |at: usize| Ipv4Addr::from(octets::<4>(grh, at)).into();
            Some((address(32), address(36)))
        }
        _ => None,
    }
}

fn octets<const N: usize>(grh: &[u8; GRH_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|i| grh[at + i])
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

/// The IPv6 header of a packet, as the kernel writes it for this device, but for the flow label: hop
/// limit 64, no extensions.
///
/// # Panics
///
/// If the packet is longer than an IPv6 packet can be.
pub fn ipv6_header(src: Ipv6Addr, dst: Ipv6Addr, udp_payload_len: usize) -> [u8; IPV6_LEN] {
    let len = u16::try_from(UDP_LEN + udp_payload_len).expect("packets are below 64 KiB");
    let mut out = [0; IPV6_LEN];
    out[0] = 0x60;
    out[4..6].copy_from_slice(&len.to_be_bytes());
    out[6] = PROTOCOL_UDP;
    out[7] = TTL;
    out[8..24].copy_from_slice(&src.octets());
    out[24..].copy_from_slice(&dst.octets());
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
        let [src, dst] = [1, 2].map(|host| Ipv4Addr::new(10, 9, 0, host));
        assert_eq!(ipv4_header(src, dst, 0xe089, 20), captured);
        let mut grh = [0; GRH_LEN];
        grh[20..].copy_from_slice(&captured);
        assert_eq!(grh_addresses(&grh), Some((src.into(), dst.into())));
        grh[0] = 0x45;
        assert_eq!(grh_addresses(&grh), None, "no device writes this");
    }

    #[test]
    fn the_ipv6_header_of_a_captured_acknowledge_is_rebuilt() {
        // From kernel rxe.
        let mut captured = [0; GRH_LEN];
        captured[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0x1c, 0x11, 0x40]);
        captured[8..12].copy_from_slice(&[0xfd, 0, 0, 9]);
        captured[23] = 1;
        captured[24..28].copy_from_slice(&[0xfd, 0, 0, 9]);
        captured[39] = 2;
        let [src, dst] = [1, 2].map(|host| Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, host));
        assert_eq!(ipv6_header(src, dst, 20), captured);
        // An IPv4 header seems to begin in the middle of an address.
        captured[20] = 0x45;
        let src = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0x4500, 1);
        assert_eq!(grh_addresses(&captured), Some((src.into(), dst.into())));
    }
}
