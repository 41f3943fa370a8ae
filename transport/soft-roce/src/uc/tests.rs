//! Two connected queue pairs, whose every packet a test may carry, lose or repeat.

#![allow(
    unsafe_code,
    reason = "registers and inspects memory that the queue pairs write"
)]

use std::net::{Ipv4Addr, SocketAddr};

use proptest::prelude::*;

use super::*;
use crate::copy;
use crate::mr_table::{Bind, Key, Pd, Region, WindowType};
use crate::qp::Mtu;
use crate::srq::{SrqNumber, SrqRef};
use crate::wire::{Headers, Opcode, ROCE_PORT, Reth};
use crate::work::{Data, Remote, SendFlags, Sge, WcOpcode};

const A: usize = 0;
const B: usize = 1;
const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3)),
];
const MEMORY_LEN: usize = 1 << 20;
const MTU_LEN: u32 = 256;
const MTU: usize = MTU_LEN as usize;
const PD: Pd = Pd(7);
/// Two packets short of the wrap.
const FIRST_PSN: Psn = Psn::new(0xff_fffe);
const IMM: [u8; 4] = [1, 2, 3, 4];
/// Where B receives, in its memory.
const TARGET: usize = 64 * 1024;

const INIT: AttrMask = AttrMask::PKEY_INDEX
    .union(AttrMask::PORT)
    .union(AttrMask::ACCESS_FLAGS);
const RTR: AttrMask = AttrMask::AV
    .union(AttrMask::PATH_MTU)
    .union(AttrMask::DEST_QPN)
    .union(AttrMask::RQ_PSN);

fn qpn(index: usize) -> Qpn {
    Qpn::new(0x11 + u32::try_from(index).unwrap())
}

/// A queue pair with memory of its own, which its requests name by byte offset.
struct Node {
    index: usize,
    qp: Qp,
    srq: Option<SharedReceiveQueue>,
    mem: MrTable,
    memory: Box<[u64]>,
    key: Key,
    tx: TxBuf,
}

impl Node {
    /// A queue pair in RTS.
    fn new(index: usize) -> Self {
        let mut node = Self::taking_from(index, None);
        node.make_ready();
        node
    }

    fn taking_from(index: usize, srq: Option<SrqRef>) -> Self {
        let mut mem = MrTable::new(index as u64);
        let mut memory = vec![0; MEMORY_LEN / 8].into_boxed_slice();
        let region = Region {
            pd: PD,
            base: memory.as_mut_ptr().cast(),
            iova: 0,
            len: MEMORY_LEN as u64,
            access: AccessFlags::all(),
        };
        // SAFETY: `memory` lives as long as `mem` and is touched through `copy` only.
        let key = unsafe { mem.register(region) }.unwrap();
        let config = QpConfig {
            pd: PD,
            max_send_wr: 16,
            max_recv_wr: 16,
            max_send_sge: 2,
            max_recv_sge: 2,
            max_inline: 600,
            sq_sig_all: true,
            window_max: 16,
            srq,
        };
        Node {
            index,
            qp: Qp::new(qpn(index), config),
            srq: srq.map(|_| SharedReceiveQueue::new(8, 2)),
            mem,
            memory,
            key,
            tx: TxBuf::new(SocketAddr::new(ADDRESSES[index], ROCE_PORT)),
        }
    }

    fn make_ready(&mut self) {
        for (state, mask) in [
            (QpState::Init, INIT),
            (QpState::Rtr, RTR),
            (QpState::Rts, AttrMask::SQ_PSN),
        ] {
            self.modify(state, mask).unwrap();
        }
    }

    fn modify(&mut self, to: QpState, mask: AttrMask) -> Result<(), InvalidTransition> {
        let attr = Attr {
            state: to,
            cur_state: self.qp.state(),
            access: AccessFlags::REMOTE_WRITE,
            path_mtu: Mtu::Mtu256,
            dest_qpn: qpn(1 - self.index),
            remote: ADDRESSES[1 - self.index],
            rq_psn: FIRST_PSN,
            sq_psn: FIRST_PSN,
            en_sqd_async_notify: true,
            ..Attr::default()
        };
        self.qp.modify(&attr, mask | AttrMask::STATE)
    }

    fn sge(&self, byte_offset: usize, len: usize) -> Sge {
        Sge {
            addr: byte_offset as u64,
            length: u32::try_from(len).unwrap(),
            lkey: self.key,
        }
    }

    fn post(&mut self, wr_id: u64, op: SendOp, byte_offset: usize, len: usize) {
        let sges = [
            self.sge(byte_offset, len / 3),
            self.sge(byte_offset + len / 3, len - len / 3),
        ];
        self.try_post(wr_id, op, Data::Gather(&sges)).unwrap();
    }

    fn try_post(&mut self, wr_id: u64, op: SendOp, data: Data<'_>) -> Result<(), PostError> {
        let flags = SendFlags::SOLICITED;
        self.qp.post_send(&SendWr {
            wr_id,
            op,
            data,
            flags,
        })
    }

    fn post_recv(&mut self, wr_id: u64, byte_offset: usize, len: usize) {
        let sges = [self.sge(byte_offset, len)];
        let wr = RecvWr { wr_id, sges: &sges };
        match &mut self.srq {
            Some(srq) => srq.post(&wr).unwrap(),
            None => self.qp.post_recv(&wr).unwrap(),
        }
    }

    /// Sends what is due, and returns the packets.
    fn send(&mut self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        loop {
            let is_more = self.qp.poll_transmit(&mut self.mem, &mut self.tx);
            packets.extend(self.tx.packets().map(|(_, bytes)| bytes.to_vec()));
            self.tx.clear();
            if !is_more {
                return packets;
            }
        }
    }

    fn take(&mut self, udp_payload: &[u8]) {
        self.take_from(ADDRESSES[1 - self.index], udp_payload);
    }

    fn take_from(&mut self, source: IpAddr, udp_payload: &[u8]) {
        let packet = Packet::parse(udp_payload).unwrap();
        self.qp
            .handle_packet(source, &packet, &mut self.mem, self.srq.as_mut());
        assert_eq!(self.send().len(), 0, "nothing is ever answered");
    }

    fn completions(&mut self) -> Vec<(Queue, Wc)> {
        std::iter::from_fn(|| self.qp.poll_completion()).collect()
    }

    fn statuses(&mut self) -> Vec<(u64, WcStatus)> {
        let completions = self.completions();
        completions
            .iter()
            .map(|(_, wc)| (wc.wr_id, wc.status))
            .collect()
    }

    fn write(&mut self, byte_offset: usize, bytes: &[u8]) {
        assert!(byte_offset + bytes.len() <= MEMORY_LEN);
        let at = self.memory.as_mut_ptr().cast::<u8>();
        // SAFETY: inside `memory`.
        unsafe { copy::write_shared(at.wrapping_add(byte_offset), bytes) };
    }

    fn read(&self, byte_offset: usize, len: usize) -> Vec<u8> {
        assert!(byte_offset + len <= MEMORY_LEN);
        let at = self.memory.as_ptr().cast::<u8>();
        let mut bytes = vec![0; len];
        // SAFETY: inside `memory`.
        unsafe { copy::read_shared(&mut bytes, at.wrapping_add(byte_offset)) };
        bytes
    }
}

fn pair() -> [Node; 2] {
    [Node::new(A), Node::new(B)]
}

/// Carries everything that A has to send to B.
fn carry([a, b]: &mut [Node; 2]) {
    for packet in a.send() {
        b.take(&packet);
    }
}

fn pattern(len: usize, salt: u8) -> Vec<u8> {
    (0..len).map(|i| i.to_le_bytes()[0] ^ salt).collect()
}

fn to_target(b: &Node, byte_offset: usize) -> Remote {
    Remote {
        addr: (TARGET + byte_offset) as u64,
        rkey: b.key,
    }
}

const SEND: SendOp = SendOp::Send { imm: None };

/// A packet from A, with whatever headers.
fn packet(headers: &Headers, payload: &[u8]) -> Vec<u8> {
    let mut tx = TxBuf::new(SocketAddr::new(ADDRESSES[A], ROCE_PORT));
    let fill = |bytes: &mut [u8]| {
        bytes.copy_from_slice(payload);
        true
    };
    assert!(tx.push(ADDRESSES[B], headers, payload.len(), fill));
    tx.packets().next().unwrap().1.to_vec()
}

fn opcodes(packets: &[Vec<u8>]) -> Vec<Opcode> {
    let opcode = |packet: &Vec<u8>| Packet::parse(packet).unwrap().headers.bth.opcode;
    packets.iter().map(opcode).collect()
}

#[test]
fn messages_of_every_length_arrive_across_the_wrap() {
    let mut pair = pair();
    let lens = [0, 1, 3, 4, MTU - 1, MTU, MTU + 1, 2 * MTU, 5 * MTU + 1];
    let mut wr_id = 0;
    for len in lens {
        for imm in [None, Some(IMM)] {
            let bytes = pattern(len, 0x5a);
            let [a, b] = &mut pair;
            a.write(0, &bytes);
            for op in [
                SendOp::Send { imm },
                SendOp::Write {
                    remote: to_target(b, 8),
                    imm,
                },
            ] {
                let [a, b] = &mut pair;
                wr_id += 1;
                b.write(TARGET, &vec![0xa5; len + 16]);
                let is_send = matches!(op, SendOp::Send { .. });
                let takes_receive = is_send || imm.is_some();
                if takes_receive {
                    b.post_recv(wr_id, TARGET + 8, len);
                }
                a.post(wr_id, op, 0, len);
                let packets = a.send();
                assert_eq!(packets.len(), len.div_ceil(MTU).max(1));
                assert_eq!(a.statuses(), [(wr_id, WcStatus::Success)], "sent is done");
                packets.iter().for_each(|packet| b.take(packet));
                let completions = b.completions();
                assert_eq!(completions.len(), usize::from(takes_receive));
                for (_, wc) in completions {
                    assert_eq!((wc.wr_id, wc.status), (wr_id, WcStatus::Success));
                    let opcode = if is_send {
                        WcOpcode::Recv
                    } else {
                        WcOpcode::RecvRdmaWithImm
                    };
                    assert_eq!((wc.opcode, wc.byte_len as usize), (opcode, len));
                    assert_eq!((wc.imm, wc.src_qp), (imm, qpn(A)));
                    assert!(wc.is_solicited && !wc.has_grh);
                }
                let placed = b.read(TARGET, len + 16);
                assert_eq!(placed[8..8 + len], bytes);
                assert_eq!(
                    (&placed[..8], &placed[8 + len..]),
                    (&[0xa5; 8][..], &[0xa5; 8][..])
                );
            }
        }
    }
    let counters = *pair[B].qp.counters();
    assert_eq!(counters.rcvd_pkts, pair[A].qp.counters().sent_pkts);
    assert_eq!((counters.out_of_seq_request, counters.dropped_pkts), (0, 0));
}

#[test]
fn packets_are_of_this_transport_and_ask_for_no_ack() {
    use Opcode::*;
    let mut a = Node::new(A);
    let remote = Remote {
        addr: 0x1000,
        rkey: Key(5),
    };
    a.post(1, SendOp::Send { imm: Some(IMM) }, 0, 3 * MTU);
    a.post(2, SEND, 0, 2 * MTU);
    a.post(3, SEND, 0, 1);
    a.post(4, SendOp::Send { imm: Some(IMM) }, 0, 1);
    let write = |imm| SendOp::Write { remote, imm };
    a.post(5, write(Some(IMM)), 0, 3 * MTU);
    a.post(6, write(None), 0, 2 * MTU);
    a.post(7, write(None), 0, 1);
    a.try_post(8, write(Some(IMM)), Data::Inline(&[7; 600]))
        .unwrap();
    let packets = a.send();
    let expected = [
        UcSendFirst,
        UcSendMiddle,
        UcSendLastImm,
        UcSendFirst,
        UcSendLast,
        UcSendOnly,
        UcSendOnlyImm,
        UcWriteFirst,
        UcWriteMiddle,
        UcWriteLastImm,
        UcWriteFirst,
        UcWriteLast,
        UcWriteOnly,
        UcWriteFirst,
        UcWriteMiddle,
        UcWriteLastImm,
    ];
    assert_eq!(opcodes(&packets), expected);
    let mut psn = FIRST_PSN;
    for packet in &packets {
        let headers = Packet::parse(packet).unwrap().headers;
        assert_eq!((headers.bth.psn, headers.bth.dest_qp), (psn, qpn(B)));
        assert!(!headers.bth.ack_req);
        assert_eq!(headers.bth.is_solicited, headers.bth.opcode.info().is_last);
        psn = psn.next();
    }
    let reth = Packet::parse(&packets[7]).unwrap().headers.reth;
    let expected = Reth {
        va: 0x1000,
        rkey: 5,
        dma_len: 3 * MTU_LEN,
    };
    assert_eq!(reth, Some(expected));
}

/// The receive of a broken message, be it a SEND or a WRITE, serves the next.
#[test]
fn a_message_that_lost_a_packet_is_dropped_and_the_next_arrives() {
    for lost in 0..4 {
        for is_write in [false, true] {
            let mut pair = pair();
            let [a, b] = &mut pair;
            let imm = Some(IMM);
            let op = if is_write {
                let remote = to_target(b, 0);
                SendOp::Write { remote, imm }
            } else {
                SendOp::Send { imm }
            };
            a.write(0, &pattern(4 * MTU, 1));
            a.write(4 * MTU, &pattern(4 * MTU, 2));
            b.post_recv(9, TARGET, 4 * MTU);
            a.post(1, op, 0, 4 * MTU);
            a.post(2, op, 4 * MTU, 4 * MTU);
            let mut packets = a.send();
            packets.remove(lost);
            packets.iter().for_each(|packet| b.take(packet));
            let [(_, wc)] = b.completions()[..] else {
                panic!("one of the two is complete")
            };
            assert_eq!((wc.wr_id, wc.byte_len), (9, 4 * MTU_LEN));
            assert_eq!(b.read(TARGET, 4 * MTU), pattern(4 * MTU, 2));
            // The packets behind the gap but of the same message are dropped.
            let behind = [3, 2, 1, 0][lost];
            let expected = Counters {
                rcvd_pkts: 7,
                out_of_seq_request: 1,
                broken_msgs: u64::from(lost > 0),
                dropped_pkts: behind,
                ..Counters::default()
            };
            assert_eq!(*b.qp.counters(), expected, "lost {lost}");
        }
    }
}

#[test]
fn a_start_inside_a_message_gives_that_up() {
    let mut pair = pair();
    let [a, b] = &mut pair;
    a.write(0, &pattern(700, 3));
    b.post_recv(9, TARGET, 700);
    a.post(1, SEND, 0, 700);
    a.post(2, SEND, 0, 5);
    let packets = a.send();
    b.take(&packets[0]);
    // The same start once more, then another message: what is repeated is a message anew.
    b.take(&packets[0]);
    assert_eq!(b.statuses(), []);
    b.take(&packets[3]);
    assert_eq!(b.statuses(), [(9, WcStatus::Success)]);
    assert_eq!(b.qp.counters().broken_msgs, 2);
    b.post_recv(10, TARGET, 5);
    b.take(&packets[3]);
    assert_eq!(b.statuses(), [(10, WcStatus::Success)]);
    // Ends without a start, in sequence or not.
    b.take(&packets[2]);
    b.take(&packets[1]);
    assert_eq!(b.statuses(), []);
    assert_eq!(b.qp.counters().dropped_pkts, 2);
}

#[test]
fn refusals_are_silent_counted_and_leave_the_connection_alone() {
    let mut pair = pair();
    let [a, b] = &mut pair;
    b.write(TARGET, &[0xa5; 1024]);
    let write = |addr: usize, rkey| SendOp::Write {
        remote: Remote {
            addr: addr as u64,
            rkey,
        },
        imm: None,
    };
    // No receive, one too small, a wrong key, a range that ends beyond the region.
    a.post(1, SEND, 0, 2 * MTU);
    carry(&mut pair);
    let [a, b] = &mut pair;
    b.post_recv(9, TARGET, 2 * MTU);
    a.post(2, SEND, 0, 2 * MTU + 1);
    a.post(3, write(TARGET, Key(b.key.0 ^ 1)), 0, 3 * MTU);
    a.post(4, write(MEMORY_LEN - 5, b.key), 0, 6);
    carry(&mut pair);
    let [a, b] = &mut pair;
    let expected = Counters {
        rcvd_pkts: 9,
        no_receive: 1,
        too_long: 1,
        access_viol: 2,
        // What follows the refused packets; the SEND broke with its last.
        broken_msgs: 1,
        dropped_pkts: 3,
        ..Counters::default()
    };
    assert_eq!(*b.qp.counters(), expected);
    // Lengths that contradict the place in the message, or what was announced.
    let mut psn = b.qp.expected;
    let mut push = |b: &mut Node, opcode, dma_len: Option<u32>, len: usize| {
        let mut headers = Headers::new(opcode, qpn(B), psn);
        headers.reth = dma_len.map(|dma_len| Reth {
            va: TARGET as u64,
            rkey: b.key.0,
            dma_len,
        });
        psn = psn.next();
        b.take(&packet(&headers, &vec![0; len]));
    };
    push(b, Opcode::UcSendFirst, None, MTU - 1);
    push(b, Opcode::UcSendOnly, None, MTU + 1);
    push(b, Opcode::UcWriteOnly, Some(9), 8);
    push(b, Opcode::UcWriteOnly, Some((1 << 31) + 1), 8);
    push(b, Opcode::UcWriteFirst, Some(MTU_LEN), MTU);
    assert_eq!(b.qp.counters().dropped_pkts, 3 + 5);
    assert_eq!(b.read(TARGET + 2 * MTU, 512), [0xa5; 512]);
    // The right to write taken from the queue pair.
    let none = Attr::default();
    b.qp.modify(&none, AttrMask::ACCESS_FLAGS).unwrap();
    a.post(5, write(TARGET, b.key), 0, 4);
    // The receive was never lost.
    a.post(6, SEND, 0, 2 * MTU);
    carry(&mut pair);
    let [a, b] = &mut pair;
    assert_eq!(b.qp.counters().access_viol, 3);
    assert_eq!(b.statuses(), [(9, WcStatus::Success)]);
    assert_eq!(a.qp.state(), QpState::Rts);
    assert_eq!(b.qp.state(), QpState::Rts);
    assert_eq!(a.statuses().len(), 6);
}

#[test]
fn packets_of_others_are_dropped() {
    let mut b = Node::new(B);
    b.post_recv(9, TARGET, 64);
    let only = |opcode| packet(&Headers::new(opcode, qpn(B), FIRST_PSN), b"hello");
    b.take(&only(Opcode::SendOnly));
    b.take_from(ADDRESSES[B], &only(Opcode::UcSendOnly));
    let read = Headers {
        reth: Some(Reth {
            va: 0,
            rkey: b.key.0,
            dma_len: 8,
        }),
        ..Headers::new(Opcode::ReadRequest, qpn(B), FIRST_PSN)
    };
    b.take(&packet(&read, &[]));
    assert_eq!((b.qp.counters().dropped_pkts, b.statuses()), (3, vec![]));
    b.take(&only(Opcode::UcSendOnly));
    assert_eq!(b.statuses(), [(9, WcStatus::Success)]);
}

#[test]
fn other_requests_are_refused_when_posted() {
    let mut a = Node::new(A);
    let remote = Remote {
        addr: 0,
        rkey: Key(1),
    };
    let sges = [a.sge(0, 8)];
    for op in [
        SendOp::Read { remote },
        SendOp::FetchAdd { remote, add: 1 },
        SendOp::CompareSwap {
            remote,
            compare: 0,
            swap: 1,
        },
        SendOp::SendInvalidate { rkey: Key(1) },
    ] {
        let result = a.try_post(1, op, Data::Gather(&sges));
        assert_eq!(result, Err(PostError::WrongService));
    }
}

#[test]
fn a_failed_send_stops_the_queue_until_it_is_resumed() {
    let mut pair = pair();
    let [a, b] = &mut pair;
    b.post_recv(9, TARGET, 4 * MTU);
    b.post_recv(10, TARGET, 4 * MTU);
    a.post(1, SEND, 0, 4);
    // Its second packet reaches beyond the region.
    a.post(2, SEND, MEMORY_LEN - MTU - 1, 3 * MTU);
    a.post(3, SEND, 0, 4);
    carry(&mut pair);
    let [a, b] = &mut pair;
    assert_eq!(a.qp.state(), QpState::Sqe);
    a.post(4, SEND, 0, 4);
    assert_eq!(
        a.statuses(),
        [
            (1, WcStatus::Success),
            (2, WcStatus::LocProtErr),
            (3, WcStatus::WrFlushErr),
            (4, WcStatus::WrFlushErr)
        ]
    );
    assert_eq!(b.statuses(), [(9, WcStatus::Success)]);
    a.modify(QpState::Rts, AttrMask::CUR_STATE).unwrap();
    a.post(5, SEND, 0, 4);
    carry(&mut pair);
    let [a, b] = &mut pair;
    assert_eq!(a.statuses(), [(5, WcStatus::Success)]);
    assert_eq!(b.statuses(), [(10, WcStatus::Success)], "after a gap");
    assert_eq!(b.qp.counters().broken_msgs, 1);
}

/// A message longer than the transmit buffer is cut off by SQD, and finished.
#[test]
fn in_sqd_what_was_begun_is_finished() {
    let mut a = Node::new(A);
    let len = MEMORY_LEN / 2;
    a.post(1, SEND, 0, len);
    a.post(2, SEND, 0, 1);
    assert!(a.qp.poll_transmit(&mut a.mem, &mut a.tx));
    let begun = a.tx.packets().count();
    a.tx.clear();
    a.modify(QpState::Sqd, AttrMask::EN_SQD_ASYNC_NOTIFY)
        .unwrap();
    assert!(a.qp.is_draining());
    assert_eq!(a.qp.poll_event(), None);
    assert_eq!(begun + a.send().len(), len / MTU);
    assert!(!a.qp.is_draining());
    assert_eq!(a.qp.poll_event(), Some(AsyncEvent::SqDrained));
    assert_eq!(a.qp.poll_event(), None);
    assert_eq!(a.statuses(), [(1, WcStatus::Success)]);
    a.modify(QpState::Rts, AttrMask::empty()).unwrap();
    assert_eq!(a.send().len(), 1);
    a.modify(QpState::Sqd, AttrMask::EN_SQD_ASYNC_NOTIFY)
        .unwrap();
    assert_eq!(a.qp.poll_event(), Some(AsyncEvent::SqDrained), "at once");
}

#[test]
fn err_flushes_and_reset_forgets() {
    let mut b = Node::new(B);
    b.post_recv(9, TARGET, 1024);
    b.post_recv(10, TARGET, 1024);
    let first = Headers::new(Opcode::UcSendFirst, qpn(B), FIRST_PSN);
    b.take(&packet(&first, &[0; MTU]));
    b.modify(QpState::Err, AttrMask::empty()).unwrap();
    b.post(3, SEND, 0, 1);
    let flushed = [3, 9, 10].map(|wr_id| (wr_id, WcStatus::WrFlushErr));
    assert_eq!(b.statuses(), flushed);
    let only = packet(&Headers::new(Opcode::UcSendOnly, qpn(B), FIRST_PSN), &[]);
    b.post_recv(11, TARGET, 1024);
    b.take(&only);
    assert_eq!(b.statuses(), [(11, WcStatus::WrFlushErr)]);

    let mut b = Node::new(B);
    b.post_recv(9, TARGET, 1024);
    b.take(&packet(&first, &[0; MTU]));
    b.post(3, SEND, 0, 1);
    b.modify(QpState::Reset, AttrMask::empty()).unwrap();
    assert_eq!((b.statuses(), b.send().len()), (vec![], 0));
    b.make_ready();
    b.post_recv(12, TARGET, 1024);
    b.take(&only);
    assert_eq!(b.statuses(), [(12, WcStatus::Success)], "as new");
}

#[test]
fn a_receive_that_cannot_be_written_to_ends_the_connection() {
    let mut b = Node::new(B);
    let sges = [Sge {
        lkey: Key(b.key.0 ^ 1),
        ..b.sge(0, 8)
    }];
    let wr = RecvWr {
        wr_id: 9,
        sges: &sges,
    };
    b.qp.post_recv(&wr).unwrap();
    let only = Headers::new(Opcode::UcSendOnly, qpn(B), FIRST_PSN);
    b.take(&packet(&only, b"hello"));
    assert_eq!(b.statuses(), [(9, WcStatus::LocProtErr)]);
    assert_eq!(b.qp.state(), QpState::Err);
}

#[test]
fn a_window_opens_and_closes_in_the_order_of_the_send_queue() {
    let mut pair = pair();
    let [a, b] = &mut pair;
    let window = b.mem.alloc_window(PD, WindowType::Type2).unwrap();
    let rkey = Key(window.0 ^ 5);
    let bind = Bind {
        rkey,
        region: b.key,
        addr: TARGET as u64,
        len: 64,
        access: AccessFlags::REMOTE_WRITE,
        is_zero_based: false,
    };
    let none = Data::Gather(&[]);
    b.try_post(1, SendOp::BindWindow(bind), none).unwrap();
    assert_eq!(b.send().len(), 0);
    let write = |addr: usize| SendOp::Write {
        remote: Remote {
            addr: addr as u64,
            rkey,
        },
        imm: None,
    };
    a.write(0, &[7; 8]);
    a.post(1, write(TARGET + 56), 0, 8);
    a.post(2, write(TARGET + 57), 0, 8);
    carry(&mut pair);
    let [a, b] = &mut pair;
    assert_eq!(b.read(TARGET + 56, 9), [7, 7, 7, 7, 7, 7, 7, 7, 0]);
    assert_eq!(b.qp.counters().access_viol, 1);
    b.try_post(2, SendOp::LocalInvalidate { rkey }, none)
        .unwrap();
    b.send();
    a.post(3, write(TARGET), 0, 8);
    carry(&mut pair);
    let b = &mut pair[B];
    assert_eq!(
        (b.read(TARGET, 8), b.qp.counters().access_viol),
        (vec![0; 8], 2)
    );
    // It is gone, so it cannot be invalidated again; what follows is flushed.
    b.try_post(3, SendOp::LocalInvalidate { rkey }, none)
        .unwrap();
    b.post(4, SEND, 0, 1);
    b.send();
    assert_eq!(
        b.statuses(),
        [
            (1, WcStatus::Success),
            (2, WcStatus::Success),
            (3, WcStatus::LocQpOpErr),
            (4, WcStatus::WrFlushErr)
        ]
    );
}

#[test]
fn a_shared_receive_of_a_broken_message_serves_the_next() {
    let srq = SrqRef {
        number: SrqNumber(1),
        pd: PD,
    };
    let mut b = Node::taking_from(B, Some(srq));
    b.make_ready();
    let mut a = Node::new(A);
    b.post_recv(9, TARGET, 2 * MTU);
    b.post_recv(10, TARGET, 2 * MTU);
    a.post(1, SEND, 0, 2 * MTU);
    a.post(2, SEND, 0, 2 * MTU);
    let packets = a.send();
    b.take(&packets[0]);
    b.take(&packets[2]);
    b.take(&packets[3]);
    assert_eq!(b.statuses(), [(9, WcStatus::Success)]);
    b.take(&packets[2]);
    assert_eq!(b.statuses(), []);
    b.modify(QpState::Err, AttrMask::empty()).unwrap();
    assert_eq!(b.statuses(), [(10, WcStatus::WrFlushErr)]);
    assert_eq!(b.qp.poll_event(), Some(AsyncEvent::LastWqeReached));
}

#[test]
fn the_first_packet_in_rtr_tells_that_the_connection_is_made() {
    let mut b = Node::taking_from(B, None);
    b.modify(QpState::Init, INIT).unwrap();
    b.modify(QpState::Rtr, RTR).unwrap();
    let only = packet(&Headers::new(Opcode::UcSendOnly, qpn(B), FIRST_PSN), &[]);
    b.take(&only);
    b.take(&only);
    assert_eq!(b.qp.poll_event(), Some(AsyncEvent::CommEst));
    assert_eq!(b.qp.poll_event(), None);
}

#[test]
fn transitions_need_and_take_what_the_table_says() {
    use InvalidTransition::{Missing, NoSuchTransition, Unexpected};
    let bits = || AttrMask::all().iter().filter(|bit| bit.bits() < 1 << 21);
    for (from, to, required) in [
        (QpState::Reset, QpState::Init, INIT),
        (QpState::Init, QpState::Rtr, RTR),
        (QpState::Rtr, QpState::Rts, AttrMask::SQ_PSN),
    ] {
        let in_from = || {
            let mut node = Node::taking_from(A, None);
            for (state, mask) in [(QpState::Init, INIT), (QpState::Rtr, RTR)] {
                if node.qp.state() != from {
                    node.modify(state, mask).unwrap();
                }
            }
            node
        };
        for bit in bits().filter(|bit| required.contains(*bit)) {
            let mut node = in_from();
            let result = node.modify(to, required.difference(bit));
            let missing = bit;
            assert_eq!(result, Err(Missing { from, to, missing }));
            assert_eq!(node.qp.state(), from);
        }
        // What only reliable connections and datagrams have.
        for bit in [
            AttrMask::TIMEOUT,
            AttrMask::RETRY_CNT,
            AttrMask::RNR_RETRY,
            AttrMask::MAX_QP_RD_ATOMIC,
            AttrMask::MAX_DEST_RD_ATOMIC,
            AttrMask::MIN_RNR_TIMER,
            AttrMask::QKEY,
        ] {
            let result = in_from().modify(to, required | bit);
            let unexpected = bit;
            assert_eq!(
                result,
                Err(Unexpected {
                    from,
                    to,
                    unexpected
                })
            );
        }
        in_from().modify(to, required).unwrap();
    }
    let mut node = Node::new(A);
    let (from, to) = (QpState::Rts, QpState::Rtr);
    let result = node.modify(to, RTR);
    assert_eq!(result, Err(NoSuchTransition { from, to }));
    node.modify(QpState::Rts, AttrMask::ACCESS_FLAGS).unwrap();
}

proptest! {
    /// Whatever is lost, exactly the messages of which nothing was are received, whole and in order.
    #[test]
    fn what_arrives_whole_is_received(
        lens in prop::collection::vec(0usize..5 * MTU, 1..12),
        losses in prop::collection::vec(prop::bool::weighted(0.2), 60),
    ) {
        let mut pair = pair();
        let [a, b] = &mut pair;
        let mut expected = Vec::new();
        let mut losses = losses.into_iter();
        for (wr_id, len) in (0..).zip(&lens) {
            a.write(0, &pattern(*len, wr_id));
            b.post_recv(wr_id.into(), TARGET + 2048 * usize::from(wr_id), 5 * MTU);
            a.post(wr_id.into(), SEND, 0, *len);
            let mut is_whole = true;
            for packet in a.send() {
                if losses.next().unwrap_or(false) {
                    is_whole = false;
                } else {
                    b.take(&packet);
                }
            }
            if is_whole {
                expected.push(pattern(*len, wr_id));
            }
        }
        let received: Vec<_> = b
            .completions()
            .iter()
            .map(|(_, wc)| {
                let place = TARGET + 2048 * usize::try_from(wc.wr_id).unwrap();
                b.read(place, wc.byte_len as usize)
            })
            .collect();
        prop_assert_eq!(received, expected);
    }

    /// Packets in any order with any content change only what the key grants, and end in no panic.
    #[test]
    fn any_packets_keep_to_what_is_granted(
        steps in prop::collection::vec((0u8..12, 0u32..4, 0u64..600, 0u32..600, 0usize..300), 1..60),
    ) {
        let mut b = Node::taking_from(B, None);
        b.make_ready();
        let len = 512;
        let access = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE;
        let base = b.memory.as_mut_ptr().cast::<u8>().wrapping_add(TARGET);
        let region = Region { pd: PD, base, iova: 0, len, access };
        // SAFETY: inside `memory`, which lives as long as `mem`.
        let granted = unsafe { b.mem.register(region) }.unwrap();
        for wr_id in 0..8 {
            b.post_recv(wr_id, TARGET + 512, 512);
        }
        for (opcode, psn, va, dma_len, payload_len) in steps {
            let opcode = Opcode::from_u8(0x20 + opcode).unwrap();
            let mut headers = Headers::new(opcode, qpn(B), b.qp.expected + psn / 3);
            let has = opcode.info().headers;
            headers.reth = has.contains(crate::wire::ExtHeaders::RETH).then_some(Reth {
                va,
                rkey: granted.0,
                dma_len,
            });
            headers.imm = has.contains(crate::wire::ExtHeaders::IMM).then_some(IMM);
            b.take(&packet(&headers, &vec![0xff; payload_len]));
        }
        let memory = b.read(0, MEMORY_LEN);
        prop_assert!(memory[..TARGET].iter().all(|byte| *byte == 0));
        prop_assert!(memory[TARGET + 1024..].iter().all(|byte| *byte == 0));
    }
}
