//! Parse and emit against each other, against captured bytes and against hostile ones.

use proptest::prelude::*;

use super::icrc::ICRC_LEN;
use super::*;

/// Headers with the values that `seed` gives to exactly the headers `opcode` calls for.
fn headers(opcode: Opcode, flags: u8, pkey: u16, qpn: u32, psn: u32, seed: [u64; 3]) -> Headers {
    let has = opcode.info().headers;
    let [a, b, c] = seed;
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap();
    let [syndrome, ..] = b.to_be_bytes();
    let mut headers = Headers::new(opcode, Qpn::new(qpn), Psn::new(psn));
    headers.bth.is_solicited = flags & 1 != 0;
    headers.bth.is_migrated = flags & 2 != 0;
    headers.bth.fecn = flags & 4 != 0;
    headers.bth.becn = flags & 8 != 0;
    headers.bth.ack_req = flags & 16 != 0;
    headers.bth.pkey = pkey;
    headers.deth = has.contains(ExtHeaders::DETH).then_some(Deth {
        qkey: low(a),
        src_qp: Qpn::new(low(c)),
    });
    headers.reth = has.contains(ExtHeaders::RETH).then_some(Reth {
        va: a,
        rkey: low(b),
        dma_len: low(c),
    });
    headers.atomic_eth = has.contains(ExtHeaders::ATOMIC_ETH).then_some(AtomicEth {
        va: a,
        rkey: low(b),
        swap_add: b,
        compare: c,
    });
    headers.aeth = has.contains(ExtHeaders::AETH).then_some(Aeth {
        syndrome: Syndrome::from_u8(syndrome),
        msn: low(c) >> 8,
    });
    headers.atomic_ack = has.contains(ExtHeaders::ATOMIC_ACK).then_some(a);
    headers.imm = has
        .contains(ExtHeaders::IMM)
        .then_some(low(b).to_be_bytes());
    headers.ieth = has.contains(ExtHeaders::IETH).then_some(low(c));
    headers
}

/// The UDP payload of a packet, its ICRC left as garbage.
fn emit(headers: &Headers, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0xa5; headers.len()];
    assert_eq!(headers.emit(&mut bytes), headers.len());
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&[0; 3][..usize::from(headers.bth.pad_count)]);
    bytes.extend_from_slice(&[0xa5; ICRC_LEN]);
    bytes
}

fn any_headers() -> impl Strategy<Value = Headers> {
    let opcode = prop::sample::select(&Opcode::ALL[..]);
    (
        opcode,
        0u8..32,
        any::<u16>(),
        any::<u32>(),
        any::<u32>(),
        any::<[u64; 3]>(),
    )
        .prop_map(|(opcode, flags, pkey, qpn, psn, seed)| {
            headers(opcode, flags, pkey, qpn, psn, seed)
        })
}

#[test]
fn a_write_with_immediate_has_the_specification_s_bytes() {
    let mut headers = Headers::new(Opcode::WriteOnlyImm, Qpn::new(0x11), Psn::new(0xff_fffe));
    headers.bth.ack_req = true;
    headers.bth.is_solicited = true;
    headers.bth.pad_count = 3;
    headers.reth = Some(Reth {
        va: 0x7f00_0000_1234,
        rkey: 0x4242,
        dma_len: 5,
    });
    headers.imm = Some([1, 2, 3, 4]);
    let expected = [
        0x0b, 0xf0, 0xff, 0xff, 0, 0, 0, 0x11, 0x80, 0xff, 0xff, 0xfe, // BTH
        0, 0, 0x7f, 0, 0, 0, 0x12, 0x34, 0, 0, 0x42, 0x42, 0, 0, 0, 5, // RETH
        1, 2, 3, 4, // ImmDt
        b'h', b'e', b'l', b'l', b'o', 0, 0, 0, // payload, pad
        0xa5, 0xa5, 0xa5, 0xa5, // ICRC
    ];
    assert_eq!(emit(&headers, b"hello"), expected);
    let packet = Packet::parse(&expected).unwrap();
    assert_eq!(
        packet,
        Packet {
            headers,
            payload: b"hello"
        }
    );
    assert!(packet.is_padded_right());
    assert_eq!(
        packet.to_string(),
        "RDMA WRITE Only w/ Immediate qp=000011 psn=fffffe va=0x7f0000001234 rkey=0x4242 \
         dma_len=5 imm=0x01020304 ack_req solicited len=5"
    );
}

#[test]
fn a_datagram_with_immediate_has_the_specification_s_bytes() {
    let mut headers = Headers::new(Opcode::UdSendOnlyImm, Qpn::new(0x11), Psn::new(7));
    headers.bth.pad_count = 2;
    headers.deth = Some(Deth {
        qkey: 0x1122_3344,
        src_qp: Qpn::new(0x0a_0b0c),
    });
    headers.imm = Some([1, 2, 3, 4]);
    let mut expected = [
        0x65, 0x60, 0xff, 0xff, 0, 0, 0, 0x11, 0, 0, 0, 7, // BTH
        0x11, 0x22, 0x33, 0x44, 0, 0x0a, 0x0b, 0x0c, // DETH
        1, 2, 3, 4, // ImmDt
        b'h', b'i', 0, 0, // payload, pad
        0xa5, 0xa5, 0xa5, 0xa5, // ICRC
    ];
    assert_eq!(emit(&headers, b"hi"), expected);
    // The reserved byte means nothing.
    expected[16] = 0xff;
    let packet = Packet::parse(&expected).unwrap();
    assert_eq!((packet.headers, packet.payload), (headers, &b"hi"[..]));
    assert_eq!(
        packet.to_string(),
        "UD SEND Only w/ Immediate qp=000011 psn=000007 qkey=0x11223344 src_qp=0a0b0c \
         imm=0x01020304 len=2"
    );
}

#[test]
fn an_atomic_and_its_answer_show_their_values() {
    let seed = [0x1000, 0x1f00_0000_0000_0002, 0x300];
    let lines = [
        Opcode::FetchAdd,
        Opcode::AtomicAcknowledge,
        Opcode::SendOnlyInvalidate,
    ]
    .map(|opcode| headers(opcode, 2, DEFAULT_PKEY, 1, 2, seed).to_string());
    let expected = [
        "Fetch & Add qp=000001 psn=000002 va=0x1000 rkey=0x2 swap_add=0x1f00000000000002 \
         compare=0x300",
        "Atomic Acknowledge qp=000001 psn=000002 ack msn=3 original=0x1000",
        "SEND Only w/ Invalidate qp=000001 psn=000002 invalidate=0x300",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn a_packet_cut_anywhere_before_its_payload_is_truncated() {
    for opcode in Opcode::ALL {
        let headers = headers(opcode, 2, DEFAULT_PKEY, 1, 2, [1, 2, 3]);
        let bytes = emit(&headers, &[]);
        for have in 0..bytes.len() {
            let need = if have < Bth::LEN + ICRC_LEN {
                Bth::LEN + ICRC_LEN
            } else {
                bytes.len()
            };
            let expected = Err(Malformed::Truncated { need, have });
            assert_eq!(Packet::parse(&bytes[..have]), expected, "{opcode:?}");
        }
        assert_eq!(
            Packet::parse(&bytes),
            Ok(Packet {
                headers,
                payload: &[]
            })
        );
    }
}

#[test]
fn reserved_opcodes_and_versions_are_refused() {
    let mut bytes = emit(
        &Headers::new(Opcode::SendOnly, Qpn::new(1), Psn::new(2)),
        &[],
    );
    for opcode in 0..=u8::MAX {
        bytes[0] = opcode;
        if Opcode::from_u8(opcode).is_none() {
            assert_eq!(Packet::parse(&bytes), Err(Malformed::Opcode(opcode)));
        }
    }
    for version in 1..16 {
        bytes[1] = 0x40 | version;
        assert_eq!(Packet::parse(&bytes), Err(Malformed::Version(version)));
    }
}

#[test]
fn pad_larger_than_what_is_there_is_refused_and_wrong_pad_is_told() {
    let mut headers = Headers::new(Opcode::SendOnly, Qpn::new(1), Psn::new(2));
    for pad_count in 0..4 {
        headers.bth.pad_count = pad_count;
        for have in 0..8 {
            let mut bytes = vec![0; headers.len() + have + ICRC_LEN];
            headers.emit(&mut bytes);
            match Packet::parse(&bytes) {
                Ok(packet) => {
                    assert_eq!(packet.payload.len(), have - usize::from(pad_count));
                    assert_eq!(packet.is_padded_right(), have % 4 == 0);
                }
                Err(error) => {
                    assert!(have < usize::from(pad_count));
                    assert_eq!(error, Malformed::Pad { pad_count, have });
                }
            }
        }
    }
}

#[test]
fn payload_rules_follow_the_path_mtu() {
    for mtu in [256, 512, 1024, 2048, 4096] {
        let allowed = |rule: PayloadLen| [0, 1, mtu - 1, mtu, mtu + 1].map(|n| rule.allows(n, mtu));
        assert_eq!(
            allowed(PayloadLen::Zero),
            [true, false, false, false, false]
        );
        assert_eq!(allowed(PayloadLen::Mtu), [false, false, false, true, false]);
        assert_eq!(
            allowed(PayloadLen::OneToMtu),
            [false, true, true, true, false]
        );
        assert_eq!(
            allowed(PayloadLen::ZeroToMtu),
            [true, true, true, true, false]
        );
    }
}

proptest! {
    #[test]
    fn what_is_emitted_parses_to_itself(
        mut headers in any_headers(),
        payload in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        headers.bth.pad_count = u8::try_from(pad_count(payload.len())).unwrap();
        let bytes = emit(&headers, &payload);
        prop_assert_eq!(bytes.len() % 4, 0);
        let packet = Packet::parse(&bytes);
        prop_assert_eq!(packet, Ok(Packet { headers, payload: &payload[..] }));
        prop_assert!(packet.unwrap().is_padded_right());
    }

    #[test]
    fn any_bytes_parse_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
        let _ = Packet::parse(&bytes).map(|packet| packet.to_string());
    }

    /// Bytes that get past the first checks, so that the later ones see hostile input too.
    #[test]
    fn any_body_behind_a_known_opcode_parses_or_is_refused(
        opcode in prop::sample::select(&Opcode::ALL[..]),
        pad in 0u8..4,
        mut bytes in proptest::collection::vec(any::<u8>(), 2..80),
    ) {
        bytes[0] = opcode.to_u8();
        bytes[1] = pad << 4;
        match Packet::parse(&bytes) {
            Ok(packet) => {
                let len = packet.headers.len() + packet.payload.len() + usize::from(pad) + ICRC_LEN;
                prop_assert_eq!(len, bytes.len());
            }
            Err(error) => prop_assert!(bytes.len() < opcode.header_len() + usize::from(pad) + ICRC_LEN, "{}", error),
        }
    }
}
