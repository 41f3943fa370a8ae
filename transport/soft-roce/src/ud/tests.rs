//! Two queue pairs whose packets a test carries, and states, drops and flushes of each.

#![allow(
    unsafe_code,
    reason = "registers and inspects memory that the queue pairs write"
)]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::prelude::*;

use super::*;
use crate::copy;
use crate::mr_table::{AccessFlags, Key, Pd, Region};
use crate::srq::{SrqNumber, SrqRef};
use crate::wire::{ROCE_PORT, grh_addresses, ipv6_header};
use crate::work::{Data, Sge};

const A: usize = 0;
const B: usize = 1;
const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3)),
];
const QKEY: u32 = 0x1111_1111;
const MEMORY_LEN: usize = 16 * 1024;
const MTU: Mtu = Mtu::Mtu1024;
const PD: Pd = Pd(7);

const STATES: [QpState; 7] = [
    QpState::Reset,
    QpState::Init,
    QpState::Rtr,
    QpState::Rts,
    QpState::Sqd,
    QpState::Sqe,
    QpState::Err,
];

/// A queue pair with memory of its own, which its requests name by byte offset.
struct Node {
    qp: Qp,
    srq: Option<SharedReceiveQueue>,
    mem: MrTable,
    memory: Box<[u64]>,
    key: Key,
    tx: TxBuf,
    address: IpAddr,
}

impl Node {
    /// A queue pair in RTS.
    fn new(index: usize) -> Self {
        let mut node = Self::in_reset(index);
        node.bring_to(QpState::Rts);
        node
    }

    fn in_reset(index: usize) -> Self {
        Self::taking_from(index, None)
    }

    fn taking_from(index: usize, srq: Option<SrqRef>) -> Self {
        let mut mem = MrTable::new(index as u64);
        let mut memory = vec![0; MEMORY_LEN / 8].into_boxed_slice();
        let region = Region {
            pd: srq.map_or(PD, |srq| srq.pd),
            base: memory.as_mut_ptr().cast(),
            iova: 0,
            len: MEMORY_LEN as u64,
            access: AccessFlags::LOCAL_WRITE,
        };
        // SAFETY: `memory` lives as long as `mem` and is touched through `copy` only.
        let key = unsafe { mem.register(region) }.unwrap();
        let address = ADDRESSES[index];
        let config = QpConfig {
            pd: PD,
            max_send_wr: 8,
            max_recv_wr: 8,
            max_send_sge: 2,
            max_recv_sge: 2,
            max_inline: 16,
            sq_sig_all: false,
            window_max: 16,
            srq,
        };
        let port = Port { address, mtu: MTU };
        Node {
            qp: Qp::new(Qpn::new(0x11 + u32::try_from(index).unwrap()), config, port),
            srq: srq.map(|_| SharedReceiveQueue::new(8, 2)),
            mem,
            memory,
            key,
            tx: TxBuf::new(SocketAddr::new(address, ROCE_PORT)),
            address,
        }
    }

    /// Moves through the states up to `state`; to SQE by a request that fails.
    fn bring_to(&mut self, state: QpState) {
        let init = AttrMask::PKEY_INDEX | AttrMask::PORT | AttrMask::QKEY;
        let path = [
            (QpState::Init, init),
            (QpState::Rtr, AttrMask::empty()),
            (QpState::Rts, AttrMask::SQ_PSN),
            (state, AttrMask::empty()),
        ];
        for (next, mask) in path {
            if self.qp.state() == state {
                return;
            }
            if next == QpState::Sqe {
                let nowhere = self.to(B);
                self.post(0, nowhere, &[self.sge(MEMORY_LEN, 1)]);
                self.send();
            } else {
                self.modify(next, mask).unwrap();
            }
        }
    }

    fn modify(&mut self, to: QpState, mask: AttrMask) -> Result<(), InvalidTransition> {
        let attr = Attr {
            state: to,
            cur_state: self.qp.state(),
            qkey: QKEY,
            sq_psn: Psn::new(0xff_ffff),
            en_sqd_async_notify: true,
            ..Attr::default()
        };
        self.qp.modify(&attr, mask | AttrMask::STATE)
    }

    /// The queue pair of node `index`, by a key that fits.
    fn to(&self, index: usize) -> Destination {
        Destination {
            pd: PD,
            address: ADDRESSES[index],
            qpn: Qpn::new(0x11 + u32::try_from(index).unwrap()),
            qkey: QKEY,
        }
    }

    fn sge(&self, byte_offset: usize, len: usize) -> Sge {
        Sge {
            addr: byte_offset as u64,
            length: u32::try_from(len).unwrap(),
            lkey: self.key,
        }
    }

    fn post(&mut self, wr_id: u64, to: Destination, sges: &[Sge]) {
        let op = SendOp::Datagram { to, imm: None };
        self.post_op(wr_id, op, Data::Gather(sges)).unwrap();
    }

    fn post_op(&mut self, wr_id: u64, op: SendOp, data: Data<'_>) -> Result<(), PostError> {
        let flags = SendFlags::SIGNALED | SendFlags::SOLICITED;
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
        assert!(!self.qp.poll_transmit(&self.mem, &mut self.tx));
        let packets = self.tx.packets().map(|(_, bytes)| bytes.to_vec()).collect();
        self.tx.clear();
        packets
    }

    fn take(&mut self, source: IpAddr, udp_payload: &[u8]) {
        let packet = Packet::parse(udp_payload).unwrap();
        self.qp
            .handle_packet(source, &packet, &self.mem, self.srq.as_mut());
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
fn carry([a, b]: &mut [Node; 2]) -> usize {
    let packets = a.send();
    for packet in &packets {
        b.take(a.address, packet);
    }
    packets.len()
}

#[test]
fn a_datagram_arrives_behind_its_grh() {
    let mut pair = pair();
    for (wr_id, len) in (1..).zip([0, 1, 3, 4, 1023, 1024]) {
        let bytes: Vec<u8> = (0..len).map(|i: usize| i.to_le_bytes()[0] ^ 0x5a).collect();
        let [a, b] = &mut pair;
        a.write(0, &bytes);
        b.write(8, &[0xa5; 2000]);
        b.post_recv(wr_id + 100, 8, GRH_LEN + len);
        let imm = (len % 2 == 1).then_some([1, 2, 3, 4]);
        let sges = [a.sge(0, len / 3), a.sge(len / 3, len - len / 3)];
        let op = SendOp::Datagram { to: a.to(B), imm };
        a.post_op(wr_id, op, Data::Gather(&sges)).unwrap();
        assert_eq!(carry(&mut pair), 1);
        let [a, b] = &mut pair;
        assert_eq!(a.statuses(), [(wr_id, WcStatus::Success)]);
        let [(Queue::Recv, wc)] = b.completions()[..] else {
            panic!("one receive")
        };
        assert_eq!((wc.wr_id, wc.status), (wr_id + 100, WcStatus::Success));
        assert_eq!(wc.byte_len as usize, GRH_LEN + len);
        assert_eq!((wc.src_qp, wc.imm), (Qpn::new(0x11), imm));
        assert!(wc.has_grh && wc.is_solicited);
        let placed = b.read(8, GRH_LEN + len + 1);
        let (grh, rest) = placed.split_first_chunk().unwrap();
        assert_eq!(grh_addresses(grh), Some((ADDRESSES[A], ADDRESSES[B])));
        assert_eq!(grh[..20], [0; 20]);
        let ip_len = 20 + 8 + 12 + 8 + 4 * usize::from(imm.is_some()) + len.next_multiple_of(4) + 4;
        assert_eq!(usize::from(u16::from_be_bytes([grh[22], grh[23]])), ip_len);
        assert_eq!((&rest[..len], rest[len]), (&bytes[..], 0xa5));
    }
}

#[test]
fn over_ipv6_the_header_itself_stands_in_front() {
    let mut b = Node::new(B);
    b.post_recv(9, 0, 200);
    let [src, dst] = [1, 2].map(|host| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host));
    let port = Port {
        address: dst.into(),
        mtu: MTU,
    };
    b.qp.port = port;
    let mut a = Node::new(A);
    let sge = a.sge(0, 5);
    a.post(1, a.to(B), &[sge]);
    let packet = a.send().remove(0);
    b.take(src.into(), &packet);
    assert_eq!(b.statuses(), [(9, WcStatus::Success)]);
    assert_eq!(b.read(0, GRH_LEN), ipv6_header(src, dst, packet.len()));
}

#[test]
fn numbers_go_up_from_sq_psn_and_nobody_is_asked_to_acknowledge() {
    let mut a = Node::new(A);
    for wr_id in 0..3 {
        a.post(wr_id, a.to(B), &[]);
    }
    let packets = a.send();
    let psns = packets.iter().map(|packet| {
        let bth = Packet::parse(packet).unwrap().headers.bth;
        assert!(!bth.ack_req && bth.is_solicited);
        bth.psn.get()
    });
    assert_eq!(psns.collect::<Vec<_>>(), [0xff_ffff, 0, 1]);
}

#[test]
fn what_does_not_fit_is_dropped_and_the_receive_waits_on() {
    let mut pair = pair();
    let to = pair[A].to(B);
    let wrong_key = Destination { qkey: 5, ..to };
    let sges = [pair[A].sge(0, 10)];
    pair[A].post(1, to, &sges);
    carry(&mut pair);
    pair[B].post_recv(9, 0, GRH_LEN + 9);
    pair[A].post(2, to, &sges);
    pair[A].post(3, wrong_key, &[]);
    assert_eq!(carry(&mut pair), 2);
    let connections = {
        let headers = Headers::new(Opcode::SendOnly, to.qpn, Psn::new(0));
        let tx = &mut pair[A].tx;
        assert!(tx.push(to.address, &headers, 0, |_| true));
        pair[A].send()
    };
    pair[B].take(ADDRESSES[A], &connections[0]);
    assert_eq!(pair[B].statuses(), []);
    let expected = Counters {
        rcvd_pkts: 4,
        no_receive: 1,
        too_long: 1,
        qkey_viol: 1,
        dropped_pkts: 1,
        ..Counters::default()
    };
    assert_eq!(*pair[B].qp.counters(), expected);
    let shorter = [pair[A].sge(0, 9)];
    pair[A].post(4, to, &shorter);
    carry(&mut pair);
    assert_eq!(pair[B].statuses(), [(9, WcStatus::Success)]);
    let statuses = [1, 2, 3, 4].map(|wr_id| (wr_id, WcStatus::Success));
    assert_eq!(pair[A].statuses(), statuses, "a sender learns nothing");
}

#[test]
fn each_state_hears_what_it_should() {
    let packet = {
        let mut a = Node::new(A);
        a.post(1, a.to(B), &[]);
        a.send().remove(0)
    };
    for state in STATES {
        let mut b = Node::in_reset(B);
        b.bring_to(state);
        let is_posted = {
            let sges = [b.sge(0, GRH_LEN)];
            b.qp.post_recv(&RecvWr {
                wr_id: 9,
                sges: &sges,
            })
            .is_ok()
        };
        assert_eq!(is_posted, state != QpState::Reset);
        b.take(ADDRESSES[A], &packet);
        let is_received = b.statuses().contains(&(9, WcStatus::Success));
        let hears = [QpState::Rtr, QpState::Rts, QpState::Sqd, QpState::Sqe];
        assert_eq!(is_received, hears.contains(&state), "{state:?}");
    }
}

#[test]
fn the_highest_bit_asks_for_the_own_key() {
    let mut pair = pair();
    pair[B].post_recv(9, 0, GRH_LEN);
    let to = Destination {
        qkey: OWN_QKEY | 0x123,
        ..pair[A].to(B)
    };
    pair[A].post(1, to, &[]);
    carry(&mut pair);
    assert_eq!(pair[B].statuses(), [(9, WcStatus::Success)]);
}

#[test]
fn a_message_beyond_the_mtu_is_not_sent_and_no_error() {
    let mut pair = pair();
    pair[B].post_recv(9, 0, 8192);
    let (to, sges) = (pair[A].to(B), [pair[A].sge(0, MTU.bytes() + 1)]);
    pair[A].post(1, to, &sges);
    assert_eq!(carry(&mut pair), 0);
    assert_eq!(pair[A].statuses(), [(1, WcStatus::Success)]);
    assert_eq!(pair[A].qp.state(), QpState::Rts);
}

#[test]
fn a_failed_send_stops_sends_alone_until_rts() {
    let mut pair = pair();
    let to = pair[A].to(B);
    let outside = [pair[A].sge(MEMORY_LEN - 1, 2)];
    pair[A].post(1, to, &[]);
    pair[A].post(2, to, &outside);
    pair[A].post(3, to, &[]);
    assert_eq!(carry(&mut pair), 1);
    assert_eq!(pair[A].qp.state(), QpState::Sqe);
    pair[A].post(4, to, &[]);
    assert_eq!(carry(&mut pair), 0);
    // Completions may be taken late: what was posted until now is flushed all the same.
    pair[A].modify(QpState::Rts, AttrMask::CUR_STATE).unwrap();
    pair[A].post(5, to, &[]);
    assert_eq!(carry(&mut pair), 0);
    let statuses = [
        (1, WcStatus::Success),
        (2, WcStatus::LocProtErr),
        (3, WcStatus::WrFlushErr),
        (4, WcStatus::WrFlushErr),
    ];
    assert_eq!(pair[A].statuses(), statuses);
    assert_eq!(carry(&mut pair), 1);
    assert_eq!(pair[A].statuses(), [(5, WcStatus::Success)]);
}

#[test]
fn an_address_handle_of_another_domain_is_of_no_use() {
    let mut a = Node::new(A);
    let to = Destination {
        pd: Pd(8),
        ..a.to(B)
    };
    a.post(1, to, &[]);
    assert!(a.send().is_empty());
    assert_eq!(a.statuses(), [(1, WcStatus::LocQpOpErr)]);
    assert_eq!(a.qp.state(), QpState::Sqe);
}

#[test]
fn a_receive_that_cannot_be_written_ends_the_queue_pair() {
    let mut pair = pair();
    pair[B].post_recv(8, MEMORY_LEN - GRH_LEN, GRH_LEN + 8);
    pair[B].post_recv(9, 0, 100);
    let (to, sges) = (pair[A].to(B), [pair[A].sge(0, 8)]);
    pair[A].post(1, to, &sges);
    carry(&mut pair);
    let statuses = [(8, WcStatus::LocProtErr), (9, WcStatus::WrFlushErr)];
    assert_eq!(pair[B].statuses(), statuses);
    assert_eq!(pair[B].qp.state(), QpState::Err);
}

/// A pair of which B takes its receives from a shared queue of another domain.
fn sharing_pair() -> [Node; 2] {
    let srq = SrqRef {
        number: SrqNumber(0),
        pd: Pd(8),
    };
    let mut b = Node::taking_from(B, Some(srq));
    b.bring_to(QpState::Rts);
    [Node::new(A), b]
}

#[test]
fn a_shared_request_is_taken_only_by_a_datagram_that_fits() {
    let mut pair = sharing_pair();
    let to = pair[A].to(B);
    let wrong_key = Destination { qkey: 5, ..to };
    let waiting = |b: &Node| b.srq.as_ref().unwrap().waiting();
    let sges = [pair[A].sge(0, 10)];
    pair[A].write(0, b"0123456789");
    pair[A].post(1, to, &sges);
    carry(&mut pair);
    pair[B].post_recv(8, 8, GRH_LEN + 9);
    pair[B].post_recv(9, 1008, GRH_LEN + 9);
    pair[A].post(2, to, &sges);
    pair[A].post(3, wrong_key, &[]);
    carry(&mut pair);
    assert_eq!((waiting(&pair[B]), pair[B].statuses()), (2, vec![]));
    let counters = *pair[B].qp.counters();
    let seen = (counters.no_receive, counters.too_long, counters.qkey_viol);
    assert_eq!(seen, (1, 1, 1));
    let shorter = [pair[A].sge(1, 9)];
    for wr_id in [8, 9] {
        pair[A].post(wr_id, to, &shorter);
        carry(&mut pair);
        let b = &mut pair[B];
        assert_eq!(b.statuses(), [(wr_id, WcStatus::Success)]);
        let byte_offset = if wr_id == 8 { 8 } else { 1008 };
        assert_eq!(b.read(byte_offset + GRH_LEN, 9), b"123456789");
    }
    assert_eq!(waiting(&pair[B]), 0);
    let wr = RecvWr {
        wr_id: 1,
        sges: &[],
    };
    assert_eq!(pair[B].qp.post_recv(&wr), Err(PostError::SharedReceives));
}

#[test]
fn an_error_costs_no_shared_request_but_the_one_in_use_and_says_so_once() {
    for is_by_a_bad_buffer in [true, false] {
        let mut pair = sharing_pair();
        pair[B].post_recv(8, MEMORY_LEN - GRH_LEN, GRH_LEN + 8);
        pair[B].post_recv(9, 0, 100);
        let (to, sges) = (pair[A].to(B), [pair[A].sge(0, 8)]);
        let mut expected = vec![];
        if is_by_a_bad_buffer {
            pair[A].post(1, to, &sges);
            carry(&mut pair);
            expected.push((8, WcStatus::LocProtErr));
        } else {
            pair[B].modify(QpState::Err, AttrMask::empty()).unwrap();
        }
        pair[A].post(2, to, &sges);
        carry(&mut pair);
        let b = &mut pair[B];
        let left = 2 - expected.len();
        assert_eq!(b.statuses(), expected);
        assert_eq!(b.srq.as_ref().unwrap().waiting(), left);
        assert_eq!(b.qp.poll_event(), Some(AsyncEvent::LastWqeReached));
        b.modify(QpState::Err, AttrMask::empty()).unwrap();
        assert_eq!(b.qp.poll_event(), None);
        b.modify(QpState::Reset, AttrMask::empty()).unwrap();
        b.bring_to(QpState::Err);
        assert_eq!(b.qp.poll_event(), Some(AsyncEvent::LastWqeReached));
    }
}

#[test]
fn draining_is_done_at_once_and_holds_later_sends_back() {
    let mut a = Node::new(A);
    a.modify(QpState::Sqd, AttrMask::EN_SQD_ASYNC_NOTIFY)
        .unwrap();
    assert_eq!(a.qp.poll_event(), Some(AsyncEvent::SqDrained));
    a.post(1, a.to(B), &[]);
    assert!(a.send().is_empty() && a.statuses().is_empty());
    a.modify(QpState::Rts, AttrMask::empty()).unwrap();
    assert_eq!(a.send().len(), 1);
    assert_eq!(a.statuses(), [(1, WcStatus::Success)]);
}

#[test]
fn err_flushes_both_queues_and_reset_forgets_them() {
    for (to, expected) in [
        (
            QpState::Err,
            &[(2, WcStatus::WrFlushErr), (1, WcStatus::WrFlushErr)][..],
        ),
        (QpState::Reset, &[]),
    ] {
        let mut a = Node::new(A);
        a.post_recv(1, 0, 100);
        a.post(2, a.to(B), &[]);
        a.modify(to, AttrMask::empty()).unwrap();
        assert!(a.send().is_empty());
        assert_eq!(a.statuses(), expected);
    }
}

#[test]
fn only_datagrams_are_posted_and_only_where_sends_are_allowed() {
    let is_sending = |state| {
        matches!(
            state,
            QpState::Rts | QpState::Sqd | QpState::Sqe | QpState::Err
        )
    };
    for state in STATES {
        let mut a = Node::in_reset(A);
        a.bring_to(state);
        let op = SendOp::Datagram {
            to: a.to(B),
            imm: None,
        };
        let result = a.post_op(1, op, Data::Inline(b"inline"));
        assert_eq!(result.is_ok(), is_sending(state), "{state:?}");
    }
    let result = Node::new(A).post_op(1, SendOp::Send { imm: None }, Data::Gather(&[]));
    assert_eq!(result, Err(PostError::WrongService));
}

/// For each pair of states the attributes that must and may be given besides the state.
#[test]
fn transitions_and_attributes_are_those_of_the_table() {
    let mut table = String::new();
    for from in STATES {
        for to in STATES {
            let modify = |mask| {
                let mut node = Node::in_reset(A);
                node.bring_to(from);
                node.modify(to, mask)
            };
            let mut required = AttrMask::empty();
            while let Err(InvalidTransition::Missing { missing, .. }) = modify(required) {
                required |= missing;
            }
            if modify(required).is_err() {
                continue;
            }
            let single = (1..21).map(|bit| AttrMask::from_bits_retain(1 << bit));
            let optional = single
                .filter(|bit| !required.contains(*bit) && modify(required | *bit).is_ok())
                .fold(AttrMask::empty(), AttrMask::union);
            let names = |mask: AttrMask| {
                let names: Vec<_> = mask.iter_names().map(|(name, _)| name).collect();
                names.join(" ")
            };
            table += &format!(
                "{from:?} -> {to:?} [{}] ({})\n",
                names(required),
                names(optional)
            );
        }
    }
    let expected = "\
Reset -> Reset [] ()
Reset -> Init [PKEY_INDEX PORT QKEY] ()
Reset -> Err [] ()
Init -> Reset [] ()
Init -> Init [] (PKEY_INDEX PORT QKEY)
Init -> Rtr [] (PKEY_INDEX QKEY)
Init -> Err [] ()
Rtr -> Reset [] ()
Rtr -> Rts [SQ_PSN] (CUR_STATE QKEY)
Rtr -> Err [] ()
Rts -> Reset [] ()
Rts -> Rts [] (CUR_STATE QKEY)
Rts -> Sqd [] (EN_SQD_ASYNC_NOTIFY)
Rts -> Err [] ()
Sqd -> Reset [] ()
Sqd -> Rts [] (CUR_STATE QKEY)
Sqd -> Sqd [] (PKEY_INDEX QKEY)
Sqd -> Err [] ()
Sqe -> Reset [] ()
Sqe -> Rts [] (CUR_STATE QKEY)
Sqe -> Err [] ()
Err -> Reset [] ()
Err -> Err [] ()
";
    assert_eq!(table, expected);
}

proptest! {
    /// Any packet that parses: nothing but a datagram with the right key changes memory, and never
    /// beyond the receive.
    #[test]
    fn hostile_packets_change_only_what_was_posted(
        opcode in prop::sample::select(&Opcode::ALL[..]),
        has_key: bool,
        pad in 0u8..4,
        mut bytes in proptest::collection::vec(any::<u8>(), 40..2000),
        capacity in 0usize..1500,
    ) {
        bytes[0] = opcode.to_u8();
        bytes[1] = pad << 4;
        bytes[2..4].copy_from_slice(&DEFAULT_PKEY.to_be_bytes());
        if has_key {
            bytes[12..16].copy_from_slice(&QKEY.to_be_bytes());
        }
        let mut b = Node::new(B);
        b.post_recv(9, 0, capacity);
        let Ok(packet) = Packet::parse(&bytes) else {
            // The pad of a packet as short as its headers.
            return Ok(());
        };
        b.qp.handle_packet(ADDRESSES[A], &packet, &b.mem, None);
        let is_received = b.statuses() == [(9, WcStatus::Success)];
        let fits = packet.payload.len() <= MTU.bytes().min(capacity.wrapping_sub(GRH_LEN));
        let expected = has_key
            && packet.headers.deth.is_some()
            && packet.is_padded_right()
            && capacity >= GRH_LEN
            && fits;
        prop_assert_eq!(is_received, expected);
        let written = if is_received { GRH_LEN + packet.payload.len() } else { 0 };
        prop_assert!(b.read(written, 3000).iter().all(|byte| *byte == 0));
    }
}
