//! Receive requests from a shared receive queue.

use super::*;
use crate::srq::SrqNumber;

/// The domain of the shared queue: another one than the queue pair's.
const SRQ_PD: Pd = Pd(8);
const SEND: SendOp = SendOp::Send { imm: None };

/// A pair whose B takes its receives from a shared queue of `max_wr` requests, and the key of its
/// buffers.
fn shared_pair(max_wr: usize) -> (Pair, Key) {
    let mut pair = Pair::new();
    let srq = SrqRef {
        number: SrqNumber(3),
        pd: SRQ_PD,
    };
    let config = QpConfig {
        max_recv_wr: 0,
        srq: Some(srq),
        ..config()
    };
    let node = &mut pair.nodes[B];
    node.qp = Qp::new(node.qp.qpn(), config);
    node.srq = Some(SharedReceiveQueue::new(max_wr, config.max_recv_sge));
    to_rts(&mut node.qp, &attr(B, Mtu::Mtu256));
    let key = node.register(0, MEMORY_LEN, AccessFlags::LOCAL_WRITE, SRQ_PD);
    (pair, key)
}

impl Node {
    fn srq(&mut self) -> &mut SharedReceiveQueue {
        self.srq.as_mut().expect("the node has one")
    }

    fn post_shared(&mut self, wr_id: u64, lkey: Key, byte_offset: usize, len: usize) {
        let sge = Sge {
            lkey,
            ..self.sge(byte_offset, len)
        };
        let sges = &[sge];
        self.srq().post(&RecvWr { wr_id, sges }).unwrap();
    }
}

#[test]
fn messages_take_requests_in_order_one_at_a_time() {
    let (mut pair, key) = shared_pair(8);
    for wr_id in 0..8 {
        pair.nodes[B].post_shared(wr_id, key, 4096 * usize::try_from(wr_id).unwrap(), 1000);
    }
    // One, two and four packets; the WRITE takes a request without using its buffers.
    let lengths = [10, 300, 1000];
    for (wr_id, len) in (0..).zip(lengths) {
        let sges = [pair.nodes[A].sge(0, len)];
        pair.nodes[A].post_send(wr_id, SEND, &sges);
    }
    let write = SendOp::Write {
        remote: pair.nodes[B].remote(100_000),
        imm: Some(*b"imm!"),
    };
    pair.nodes[A].write(0, &[7; 1000]);
    let sges = [pair.nodes[A].sge(0, 600)];
    pair.nodes[A].post_send(3, write, &sges);
    pair.drive();
    let received: Vec<_> = pair.nodes[B]
        .completions
        .iter()
        .map(|(_, wc)| (wc.wr_id, wc.opcode, wc.byte_len))
        .collect();
    let recv = WcOpcode::Recv;
    assert_eq!(
        received,
        [
            (0, recv, 10),
            (1, recv, 300),
            (2, recv, 1000),
            (3, WcOpcode::RecvRdmaWithImm, 600)
        ]
    );
    assert_eq!(pair.nodes[B].srq().waiting(), 4);
    assert_eq!(pair.nodes[B].read(4096 * 2, 1000), [7; 1000]);
    assert_eq!(pair.nodes[B].read(4096 * 3, 8), [0; 8]);
    assert_eq!(pair.nodes[A].statuses(Queue::Send).len(), 4);
}

#[test]
fn an_empty_queue_is_an_rnr_nak_for_each_kind() {
    let imm = Some([1, 2, 3, 4]);
    for (len, is_write) in [(100, false), (1000, false), (100, true), (1000, true)] {
        let (mut pair, key) = shared_pair(4);
        let op = if is_write {
            let remote = pair.nodes[B].remote(8192);
            SendOp::Write { remote, imm }
        } else {
            SEND
        };
        pair.nodes[A].write(0, &[9; 1000]);
        let sges = [pair.nodes[A].sge(0, len)];
        pair.nodes[A].post_send(1, op, &sges);
        pair.drive_until(500_000);
        assert!(pair.nodes[B].qp.counters().send_rnr_err > 0);
        assert!(pair.nodes[B].completions.is_empty());
        pair.nodes[B].post_shared(5, key, 0, 1000);
        pair.drive();
        assert_eq!(
            pair.nodes[B].statuses(Queue::Recv),
            [(5, WcStatus::Success)]
        );
        assert_eq!(
            pair.nodes[A].statuses(Queue::Send),
            [(1, WcStatus::Success)]
        );
        assert_eq!(pair.nodes[B].srq().waiting(), 0, "repetition takes no more");
    }
}

#[test]
fn the_limit_is_undercut_by_taking() {
    let (mut pair, key) = shared_pair(4);
    for wr_id in 0..4 {
        pair.nodes[B].post_shared(wr_id, key, 0, 64);
    }
    let attr = crate::srq::SrqAttr {
        limit: 3,
        ..*pair.nodes[B].srq().attr()
    };
    let mask = crate::srq::SrqAttrMask::LIMIT;
    pair.nodes[B].srq().modify(&attr, mask).unwrap();
    for (wr_id, is_reached) in [(0, false), (1, true), (2, false)] {
        pair.nodes[A].post_send(wr_id, SEND, &[]);
        pair.drive();
        assert_eq!(pair.nodes[B].srq().take_limit_event(), is_reached);
    }
}

#[test]
fn posting_to_the_queue_pair_is_refused() {
    let (mut pair, _) = shared_pair(4);
    let wr = RecvWr {
        wr_id: 1,
        sges: &[],
    };
    assert_eq!(
        pair.nodes[B].qp.post_recv(&wr),
        Err(PostError::SharedReceives)
    );
}

/// To ERR in the middle of a message: its request is flushed, the others stay for other queue pairs.
#[test]
fn only_the_request_in_progress_is_flushed() {
    let (mut pair, key) = shared_pair(4);
    for wr_id in 0..4 {
        pair.nodes[B].post_shared(wr_id, key, 0, 2000);
    }
    // The second packet of the message is lost for ever.
    pair = pair.filtered(|sent| match sent.opcode() {
        Opcode::SendMiddle => Fate::Drop,
        _ => Fate::Deliver,
    });
    let sges = [pair.nodes[A].sge(0, 2000)];
    pair.nodes[A].post_send(1, SEND, &sges);
    pair.drive_until(20_000);
    assert_eq!(pair.nodes[B].srq().waiting(), 3);
    let to_err = Attr {
        state: QpState::Err,
        ..Attr::default()
    };
    let node = &mut pair.nodes[B];
    node.qp.modify(&to_err, AttrMask::STATE).unwrap();
    let (queue, wc) = node.qp.poll_completion().unwrap();
    assert_eq!(
        (queue, wc.wr_id, wc.status),
        (Queue::Recv, 0, WcStatus::WrFlushErr)
    );
    assert_eq!(node.qp.poll_completion(), None);
    node.events.clear();
    node.collect();
    assert_eq!(node.events, [AsyncEvent::LastWqeReached]);
    assert_eq!(node.srq().waiting(), 3);
    // Once in a life.
    node.qp.modify(&to_err, AttrMask::STATE).unwrap();
    assert_eq!(node.qp.poll_event(), None);
    move_to(
        &mut node.qp,
        &Attr::default(),
        QpState::Reset,
        AttrMask::STATE,
    );
    node.qp.modify(&to_err, AttrMask::STATE).unwrap();
    assert_eq!(node.qp.poll_event(), Some(AsyncEvent::LastWqeReached));
}

/// Each way in which a request from the shared queue itself, or its message, ends the connection.
#[test]
fn a_failure_completes_one_request() {
    // (length of the buffer, whether its key is good, status at B, status at A)
    let cases = [
        (99, true, WcStatus::LocLenErr, WcStatus::RemInvReqErr),
        (100, false, WcStatus::LocProtErr, WcStatus::RemOpErr),
    ];
    for (len, is_key_good, at_b, at_a) in cases {
        let (mut pair, key) = shared_pair(4);
        // The queue pair's own domain is not the shared queue's.
        let key = if is_key_good { key } else { pair.nodes[B].key };
        pair.nodes[B].post_shared(1, key, 0, len);
        pair.nodes[B].post_shared(2, key, 0, len);
        let sges = [pair.nodes[A].sge(0, 100)];
        pair.nodes[A].post_send(1, SEND, &sges);
        pair.drive();
        assert_eq!(pair.nodes[B].statuses(Queue::Recv), [(1, at_b)]);
        assert_eq!(pair.nodes[A].statuses(Queue::Send), [(1, at_a)]);
        assert!(
            pair.nodes[B].events.contains(&AsyncEvent::LastWqeReached),
            "{:?}",
            pair.nodes[B].events
        );
        assert_eq!(pair.nodes[B].srq().waiting(), 1);
    }
}

/// A peer's wrong key is no business of the requests that wait.
#[test]
fn a_refused_write_leaves_the_queue_alone() {
    let (mut pair, key) = shared_pair(4);
    pair.nodes[B].post_shared(1, key, 0, 100);
    let mut remote = pair.nodes[B].remote(0);
    remote.rkey.0 ^= 0x100;
    let sges = [pair.nodes[A].sge(0, 100)];
    pair.nodes[A].post_send(1, SendOp::Write { remote, imm: None }, &sges);
    pair.drive();
    assert_eq!(
        pair.nodes[A].statuses(Queue::Send),
        [(1, WcStatus::RemAccessErr)]
    );
    assert!(pair.nodes[B].statuses(Queue::Recv).is_empty());
    let events = &pair.nodes[B].events;
    assert!(events.contains(&AsyncEvent::LastWqeReached), "{events:?}");
    assert!(events.contains(&AsyncEvent::QpAccessErr), "{events:?}");
    assert_eq!(pair.nodes[B].srq().waiting(), 1);
}
