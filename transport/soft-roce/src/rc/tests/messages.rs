//! Every operation at every interesting length, without faults: bytes, completions and packets.

use super::*;

/// Where A's and B's data start; odd, so that nothing is aligned by luck.
const AT_A: usize = 1001;
const AT_B: usize = 130_003;

fn lengths(mtu: usize) -> impl Iterator<Item = usize> {
    [
        0,
        1,
        3,
        4,
        5,
        mtu - 1,
        mtu,
        mtu + 1,
        2 * mtu,
        2 * mtu + 1,
        20 * mtu + 7,
    ]
    .into_iter()
}

const MTUS: [Mtu; 5] = [
    Mtu::Mtu256,
    Mtu::Mtu512,
    Mtu::Mtu1024,
    Mtu::Mtu2048,
    Mtu::Mtu4096,
];

/// `len` bytes at `byte_offset` in up to four odd pieces, one of them empty.
fn pieces(node: &Node, byte_offset: usize, len: usize) -> [Sge; 4] {
    let first = len.min(3);
    let second = (len - first) / 2;
    let third = len - first - second;
    [
        node.sge(byte_offset, first),
        node.sge(byte_offset + first, second),
        node.sge(0, 0),
        node.sge(byte_offset + first + second, third),
    ]
}

fn pair(mtu: Mtu) -> Pair {
    Pair::with(config(), |_, attr| Attr {
        path_mtu: mtu,
        ..*attr
    })
}

/// Runs `op` with `len` bytes at every MTU and length and gives the pair to `check`.
fn for_each(op: impl Fn(&Pair) -> SendOp, check: impl Fn(&mut Pair, usize)) {
    for mtu in MTUS {
        for len in lengths(mtu.bytes()) {
            let mut pair = pair(mtu);
            pair.nodes[A].write(AT_A, &pattern(1, len));
            pair.nodes[B].write(AT_B, &pattern(2, len));
            let receive = pieces(&pair.nodes[B], AT_B, len);
            pair.nodes[B].post_recv(77, &receive);
            let op = op(&pair);
            let sges = pieces(&pair.nodes[A], AT_A, len);
            pair.nodes[A].post_send(5, op, &sges);
            pair.drive();
            check(&mut pair, len);
            pair.expect_states(QpState::Rts, QpState::Rts);
        }
    }
}

fn receive_wc(pair: &Pair) -> Wc {
    let [(Queue::Recv, wc)] = pair.nodes[B].completions[..] else {
        panic!(
            "one receive completion, not {:?}",
            pair.nodes[B].completions
        );
    };
    wc
}

#[test]
fn send_is_received_in_pieces() {
    for imm in [None, Some([1, 2, 3, 4])] {
        for_each(
            |_| SendOp::Send { imm },
            |pair, len| {
                assert_eq!(pair.nodes[B].read(AT_B, len), pattern(1, len));
                let wc = receive_wc(pair);
                assert_eq!(
                    (wc.wr_id, wc.status, wc.opcode),
                    (77, SUCCESS, WcOpcode::Recv)
                );
                assert_eq!((wc.byte_len as usize, wc.imm), (len, imm));
                assert_eq!((wc.qpn, wc.src_qp), (Qpn::new(0x12), Qpn::new(0x11)));
                pair.expect_sends(&[(5, SUCCESS)]);
            },
        );
    }
}

#[test]
fn write_is_silent_at_the_peer() {
    for_each(
        |pair| write_op(pair.nodes[B].remote(AT_B)),
        |pair, len| {
            assert_eq!(pair.nodes[B].read(AT_B, len), pattern(1, len));
            assert_eq!(pair.nodes[B].completions, [], "no completion at the target");
            pair.expect_sends(&[(5, SUCCESS)]);
        },
    );
}

#[test]
fn write_with_immediate_takes_a_receive_and_leaves_its_buffer_alone() {
    let imm = Some([9, 8, 7, 6]);
    for_each(
        |pair| SendOp::Write {
            remote: pair.nodes[B].remote(0),
            imm,
        },
        |pair, len| {
            assert_eq!(pair.nodes[B].read(0, len), pattern(1, len));
            assert_eq!(pair.nodes[B].read(AT_B, len), pattern(2, len));
            let wc = receive_wc(pair);
            assert_eq!((wc.wr_id, wc.opcode), (77, WcOpcode::RecvRdmaWithImm));
            assert_eq!((wc.byte_len as usize, wc.imm), (len, imm));
            pair.expect_sends(&[(5, SUCCESS)]);
        },
    );
}

#[test]
fn read_brings_the_bytes() {
    for_each(
        |pair| SendOp::Read {
            remote: pair.nodes[B].remote(AT_B),
        },
        |pair, len| {
            assert_eq!(pair.nodes[A].read(AT_A, len), pattern(2, len));
            let (_, wc) = pair.nodes[A].completions[0];
            assert_eq!((wc.opcode, wc.byte_len as usize), (WcOpcode::RdmaRead, len));
            pair.expect_sends(&[(5, SUCCESS)]);
            let sent = pair.sent.iter().filter(|sent| sent.from == B);
            assert_eq!(sent.map(|sent| sent.payload_len).sum::<usize>(), len);
        },
    );
}

#[test]
fn atomics_return_what_they_found() {
    let mut pair = Pair::new();
    pair.nodes[B].write(64, &40u64.to_le_bytes());
    let remote = pair.nodes[B].remote(64);
    let ops = [
        SendOp::FetchAdd { remote, add: 2 },
        SendOp::CompareSwap {
            remote,
            compare: 42,
            swap: 7,
        },
        SendOp::CompareSwap {
            remote,
            compare: 42,
            swap: 8,
        },
        SendOp::FetchAdd {
            remote,
            add: u64::MAX,
        },
    ];
    for (index, op) in ops.into_iter().enumerate() {
        let sge = pair.nodes[A].sge(index * 8, 8);
        pair.nodes[A].post_send(index as u64, op, &[sge]);
    }
    pair.drive();
    pair.expect_sends(&[(0, SUCCESS), (1, SUCCESS), (2, SUCCESS), (3, SUCCESS)]);
    let found = [0, 1, 2, 3].map(|index| pair.nodes[A].read(index * 8, 8));
    assert_eq!(
        found,
        [40u64, 42, 7, 7].map(|value| value.to_le_bytes().to_vec())
    );
    assert_eq!(pair.nodes[B].read(64, 8), 6u64.to_le_bytes());
}

#[test]
fn zero_length_needs_no_key() {
    let mut pair = Pair::new();
    let nowhere = Remote {
        addr: 3,
        rkey: Key(0),
    };
    pair.nodes[A].post_send(1, write_op(nowhere), &[]);
    pair.nodes[A].post_send(2, SendOp::Read { remote: nowhere }, &[]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
}

#[test]
fn inline_data_are_taken_at_once() {
    let mut pair = Pair::new();
    let mut bytes = pattern(3, 64);
    let op = write_op(pair.nodes[B].remote(AT_B));
    let wr = SendWr {
        wr_id: 1,
        op,
        data: Data::Inline(&bytes),
        flags: SendFlags::SIGNALED,
    };
    pair.nodes[A].qp.post_send(&wr).unwrap();
    bytes.fill(0);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    assert_eq!(pair.nodes[B].read(AT_B, 64), pattern(3, 64));
}

#[test]
fn segmentation_follows_the_path_mtu() {
    let mut pair = Pair::new();
    let sge = pair.nodes[A].sge(0, 600);
    let imm = Some([0; 4]);
    pair.nodes[B].post_recv(1, &[]);
    let remote = pair.nodes[B].remote(0);
    pair.nodes[A].post_send(1, SendOp::Write { remote, imm }, &[sge]);
    pair.drive();
    use Opcode::{WriteFirst, WriteLastImm, WriteMiddle};
    assert_eq!(pair.opcodes(A), [WriteFirst, WriteMiddle, WriteLastImm]);
    let sent: Vec<&Sent> = pair.sent.iter().filter(|sent| sent.from == A).collect();
    assert_eq!(
        sent.iter().map(|s| s.payload_len).collect::<Vec<_>>(),
        [256, 256, 88]
    );
    let psns = [0xff_fffe, 0xff_ffff, 0].map(Psn::new);
    assert_eq!(sent.iter().map(|s| s.psn()).collect::<Vec<_>>(), psns);
    assert_eq!(sent[0].headers.reth.unwrap().dma_len, 600);
    let asks = sent
        .iter()
        .map(|s| s.headers.bth.ack_req)
        .collect::<Vec<_>>();
    assert_eq!(asks, [false, false, true]);
}

#[test]
fn solicited_travels_with_the_last_packet() {
    let mut pair = Pair::new();
    let sge = pair.nodes[B].sge(0, 600);
    pair.nodes[B].post_recv(1, &[sge]);
    pair.nodes[B].post_recv(2, &[sge]);
    let sge = pair.nodes[A].sge(0, 600);
    let op = SendOp::Send { imm: None };
    for flags in [SendFlags::SOLICITED, SendFlags::empty()] {
        let wr = SendWr {
            wr_id: 1,
            op,
            data: Data::Gather(&[sge]),
            flags,
        };
        pair.nodes[A].qp.post_send(&wr).unwrap();
    }
    pair.drive();
    let solicited: Vec<bool> = pair.nodes[B]
        .completions
        .iter()
        .map(|(_, wc)| wc.is_solicited)
        .collect();
    assert_eq!(solicited, [true, false]);
    pair.expect_sends(&[]);
}

#[test]
fn one_ack_answers_a_batch() {
    let mut pair = Pair::new();
    for wr_id in 0..5 {
        let op = write_op(pair.nodes[B].remote(0));
        let sge = pair.nodes[A].sge(0, 8);
        pair.nodes[A].post_send(wr_id, op, &[sge]);
    }
    pair.drive();
    pair.expect_sends(&[0, 1, 2, 3, 4].map(|wr_id| (wr_id, SUCCESS)));
    assert_eq!(pair.opcodes(B), [Opcode::Acknowledge]);
    assert_eq!(pair.nodes[B].qp.counters().ack_deferred, 4);
}

#[test]
fn a_write_is_seen_by_the_read_behind_it() {
    let mut pair = Pair::new();
    let data = pattern(4, 1000);
    pair.nodes[A].write(0, &data);
    let remote = pair.nodes[B].remote(0);
    let (from, into) = (pair.nodes[A].sge(0, 1000), pair.nodes[A].sge(5000, 1000));
    pair.nodes[A].post_send(1, write_op(remote), &[from]);
    pair.nodes[A].post_send(2, SendOp::Read { remote }, &[into]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
    assert_eq!(pair.nodes[A].read(5000, 1000), data);
}
