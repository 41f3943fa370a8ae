//! Known packets, and what one flipped bit does to each.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::wire::Packet;

/// Captured IP packets: from the first byte of the IP header to the end of the ICRC.
const VECTORS: [(&str, &str); 7] = [
    (
        "rxe, IPv4, NAK 62",
        "45000030e08940004011461f0a0900010a090002c12112b7001c00001100ffff000000110000010062000000\
         fc519e54",
    ),
    (
        "rxe, IPv4, READ Response Only 8 B",
        "45000038f3e74000401132b90a0900010a090002c24212b7002400001000ffff00000011000001001f000001\
         5a5a5a5a5a5a5a5a580461f3",
    ),
    (
        "rxe, IPv4, WRITE Only 16 B",
        "4500004cf8e7400040112da50a0900010a090002c29712b7003800000a00ffff0000001180fffffe00007f00\
         0000000000004242000000105a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5ae968d0bd",
    ),
    (
        "rxe, IPv6, ACK",
        "60000000001c1140fd000009000000000000000000000001fd000009000000000000000000000002c13212b7\
         001c00001100ffff00000011000001001f000001b5a2e451",
    ),
    (
        "rxe, IPv6, SEND Only 5 B, pad 3",
        "6000000000201140fd000009000000000000000000000001fd000009000000000000000000000002c13212b7\
         002000000430ffff00000011800002076162636465000000d237acff",
    ),
    (
        "Scapy's regression test, IPv4, UC SEND Only, TOS 1",
        "45010040047840004011b4d5c0a80007c0a80007c00012b7002caca22460ffff000000d300cf17104630818b\
         e28935d90e9a95505401be885e50000078f353f3",
    ),
    (
        "socket peer, identification 0",
        "4500004c0000400040113c9c7f0000027f00000312b712b7003800000a40ffff000000118000010000000000\
         00001000000042420000001068656c6c6f2066726f6d2075736572215f5b4bba",
    ),
];

/// A captured packet taken apart.
struct Captured {
    flow: Flow,
    identification: u16,
    udp_payload: Vec<u8>,
}

fn unhex(hex: &str) -> Vec<u8> {
    let nibbles: Vec<u8> = hex
        .chars()
        .map(|c| u8::try_from(c.to_digit(16).unwrap()).unwrap())
        .collect();
    nibbles
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

fn capture(hex: &str) -> Captured {
    let bytes = unhex(hex);
    let udp_start = if bytes[0] >> 4 == 4 {
        IPV4_HEADER_LEN
    } else {
        IPV6_HEADER_LEN
    };
    let (ip, udp) = bytes.split_at(udp_start);
    let port = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
    let flow = if udp_start == IPV4_HEADER_LEN {
        let address = |at: usize| Ipv4Addr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).unwrap());
        Flow::V4 {
            src: SocketAddrV4::new(address(12), port(0)),
            dst: SocketAddrV4::new(address(16), port(2)),
        }
    } else {
        let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).unwrap());
        Flow::V6 {
            src: SocketAddrV6::new(address(8), port(0), 0, 0),
            dst: SocketAddrV6::new(address(24), port(2), 0, 0),
        }
    };
    Captured {
        flow,
        identification: u16::from_be_bytes([ip[4], ip[5]]),
        udp_payload: udp[UDP_HEADER_LEN..].to_vec(),
    }
}

fn captures() -> impl Iterator<Item = (&'static str, Captured)> {
    VECTORS.iter().map(|(name, hex)| (*name, capture(hex)))
}

#[test]
fn captured_packets_have_the_icrc_computed_here() {
    for (name, packet) in captures() {
        assert!(
            packet
                .flow
                .is_exact(packet.identification, &packet.udp_payload),
            "{name}"
        );
        let mut sealed = packet.udp_payload.clone();
        let end = sealed.len();
        sealed[end - ICRC_LEN..].fill(0xa5);
        packet.flow.seal(packet.identification, &mut sealed);
        assert_eq!(sealed, packet.udp_payload, "{name}");
    }
}

#[test]
fn an_unknown_identification_is_solved_for() {
    for (name, packet) in captures() {
        let Flow::V4 { .. } = packet.flow else {
            continue;
        };
        for guess in [0, 1, 0xffff, packet.identification] {
            let solved = packet.flow.verify(guess, &packet.udp_payload);
            assert_eq!(solved, Some(packet.identification), "{name}, guess {guess}");
        }
    }
}

/// The switches' byte may change on the way, every other bit may not.
#[test]
fn one_flipped_bit_is_refused_unless_it_is_masked() {
    for (name, packet) in captures() {
        for bit in 0..packet.udp_payload.len() * 8 {
            let mut bytes = packet.udp_payload.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let is_masked = bit / 8 == 4;
            assert_eq!(
                packet.flow.is_exact(packet.identification, &bytes),
                is_masked,
                "{name} {bit}"
            );
            // One bit flipped behind the identification never looks like another identification.
            let solved = packet.flow.verify(0, &bytes);
            assert_eq!(solved.is_some(), is_masked, "{name}, bit {bit}");
        }
    }
}

#[test]
fn a_packet_of_another_flow_is_refused() {
    for (name, packet) in captures() {
        let Flow::V4 { src, dst } = packet.flow else {
            continue;
        };
        let other = |address: &SocketAddrV4| {
            SocketAddrV4::new(
                Ipv4Addr::from_bits(address.ip().to_bits() ^ 1),
                address.port(),
            )
        };
        for flow in [
            Flow::V4 {
                src: other(&src),
                dst,
            },
            Flow::V4 {
                src,
                dst: other(&dst),
            },
            Flow::V4 {
                src: SocketAddrV4::new(*src.ip(), src.port() ^ 1),
                dst,
            },
        ] {
            assert_eq!(
                flow.verify(packet.identification, &packet.udp_payload),
                None,
                "{name}"
            );
        }
    }
}

#[test]
fn captured_packets_parse_to_what_they_are() {
    let lines: Vec<String> = captures()
        .map(|(_, packet)| match Packet::parse(&packet.udp_payload) {
            Ok(packet) => packet.to_string(),
            Err(error) => error.to_string(),
        })
        .collect();
    let expected = [
        "Acknowledge qp=000011 psn=000100 nak RemoteAccess msn=0 len=0",
        "RDMA READ Response Only qp=000011 psn=000100 ack msn=1 len=8",
        "RDMA WRITE Only qp=000011 psn=fffffe va=0x7f0000000000 rkey=0x4242 dma_len=16 ack_req len=16",
        "Acknowledge qp=000011 psn=000100 ack msn=1 len=0",
        "SEND Only qp=000011 psn=000207 ack_req len=5",
        "UC SEND Only qp=0000d3 psn=cf1710 len=18",
        "RDMA WRITE Only qp=000011 psn=000100 va=0x1000 rkey=0x4242 dma_len=16 ack_req len=16",
    ];
    assert_eq!(lines, expected);
}

/// The definition, bit by bit, over packets long enough for the fast paths of the CRC.
#[test]
fn long_packets_have_the_crc_the_definition_gives() {
    let src = SocketAddrV4::new(Ipv4Addr::new(10, 9, 0, 1), 0xc121);
    let dst = SocketAddrV4::new(Ipv4Addr::new(10, 9, 0, 2), 4791);
    for len in [16, 127, 128, 1040, 4124, 4128] {
        let mut bytes = vec![0xff; 8];
        bytes.extend_from_slice(&[0x45, 0xff]);
        bytes.extend_from_slice(&u16::try_from(len + 32).unwrap().to_be_bytes());
        bytes.extend_from_slice(&[0x12, 0x34, 0x40, 0, 0xff, 17, 0xff, 0xff]);
        bytes.extend_from_slice(&[10, 9, 0, 1, 10, 9, 0, 2, 0xc1, 0x21, 0x12, 0xb7]);
        bytes.extend_from_slice(&u16::try_from(len + 12).unwrap().to_be_bytes());
        bytes.extend_from_slice(&[0xff, 0xff]);
        let covered: Vec<u8> = (0..=u8::MAX).cycle().skip(7).take(len).collect();
        bytes.extend_from_slice(&covered);
        bytes[8 + 28 + 4] = 0xff;
        let crc = bytes.iter().fold(u32::MAX, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ (POLYNOMIAL * (crc & 1))
            })
        });
        assert_eq!(
            Flow::V4 { src, dst }.compute(0x1234, &covered),
            !crc,
            "{len} bytes"
        );
    }
}

/// The product of the power and its inverse is one, for every length a datagram can have.
#[test]
fn inverse_powers_divide() {
    let mut power = ONE;
    for bytes in 0..=usize::from(u16::MAX) {
        assert_eq!(multiply(power, inverse_power(bytes)), ONE, "{bytes}");
        power = multiply(power, ONE >> 8);
    }
}

proptest! {
    #[test]
    fn any_identification_and_length_is_solved(
        identification: u16,
        guess: u16,
        src: u32,
        dst: u32,
        mut payload in proptest::collection::vec(any::<u8>(), 16..4200),
    ) {
        let address = |bits| SocketAddrV4::new(Ipv4Addr::from_bits(bits), 4791);
        let flow = Flow::V4 { src: address(src), dst: address(dst) };
        flow.seal(identification, &mut payload);
        prop_assert_eq!(flow.verify(guess, &payload), Some(identification));
    }

    #[test]
    fn any_bytes_are_judged_without_a_panic(
        guess: u16,
        payload in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4791);
        let verdict = Flow::V4 { src: address, dst: address }.verify(guess, &payload);
        prop_assert!(verdict.is_none() || payload.len() >= 16);
    }
}
