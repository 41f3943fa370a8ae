//! Ends of connections: peers that die, every cause of ERR, and what may still arrive afterwards.

use super::*;
use crate::wire::NakCode;

const SEND: SendOp = SendOp::Send { imm: None };
const REQUESTS: u64 = 6;

/// One request of every kind, each of several packets where it can be, and receives for them.
fn post_all(pair: &mut Pair) {
    let [a, b] = &mut pair.nodes;
    a.write(0, &pattern(1, 700));
    b.write(10_000, &pattern(2, 700));
    for wr_id in 0..2 {
        let sge = b.sge(20_000, 700);
        b.post_recv(wr_id, &[sge]);
    }
    let (source, word) = (a.sge(0, 700), a.sge(30_000, 8));
    let remote = b.remote(0);
    let imm = Some([0; 4]);
    let read_into = a.sge(10_000, 700);
    let remote_data = b.remote(10_000);
    let remote_word = b.remote(40_000);
    a.post_send(0, SEND, &[source]);
    a.post_send(
        1,
        SendOp::Read {
            remote: remote_data,
        },
        &[read_into],
    );
    a.post_send(2, write_op(remote), &[source]);
    let add = SendOp::FetchAdd {
        remote: remote_word,
        add: 1,
    };
    a.post_send(3, add, &[word]);
    a.post_send(4, SendOp::Write { remote, imm }, &[source]);
    a.post_send(5, write_op(remote), &[source]);
}

/// Asserts that each request of A completed once, in order: with success up to one that gets `status`, behind
/// which all are flushed. Returns how many succeeded.
#[track_caller]
fn expect_one_failure(pair: &mut Pair, status: WcStatus) -> u64 {
    let sends = pair.nodes[A].statuses(Queue::Send);
    let done = sends
        .iter()
        .filter(|(_, status)| *status == SUCCESS)
        .count() as u64;
    let expected: Vec<(u64, WcStatus)> = (0..REQUESTS)
        .map(|wr_id| match wr_id.cmp(&done) {
            std::cmp::Ordering::Less => (wr_id, SUCCESS),
            std::cmp::Ordering::Equal => (wr_id, status),
            std::cmp::Ordering::Greater => (wr_id, FLUSHED),
        })
        .collect();
    assert_eq!(sends, expected, "trace:\n{}", pair.trace());
    done
}

/// The wire is cut behind each packet in turn: A reports what is done, then one failure, then the rest.
#[test]
fn a_peer_may_die_at_any_point() {
    let mut whole = Pair::new();
    post_all(&mut whole);
    whole.drive();
    whole.expect_sends(&[0, 1, 2, 3, 4, 5].map(|wr_id| (wr_id, SUCCESS)));
    let total = whole.sent.len();
    let mut succeeded = Vec::new();
    for alive in 0..total {
        let mut count = 0;
        let mut pair = Pair::new().filtered(move |_| {
            count += 1;
            if count > alive {
                Fate::Drop
            } else {
                Fate::Deliver
            }
        });
        post_all(&mut pair);
        pair.drive();
        // All may be done with the last packets of a peer that was repeating itself.
        if pair.nodes[A].qp.state() == QpState::Rts {
            pair.expect_sends(&[0, 1, 2, 3, 4, 5].map(|wr_id| (wr_id, SUCCESS)));
            continue;
        }
        let done = expect_one_failure(&mut pair, WcStatus::RetryExcErr);
        // What A was told is true.
        if done > 1 {
            assert_eq!(pair.nodes[A].read(10_000, 700), pattern(2, 700));
            assert_eq!(pair.nodes[B].read(20_000, 700), pattern(1, 700));
        }
        if done > 3 {
            assert_eq!(pair.nodes[B].read(40_000, 8), 1_u64.to_le_bytes());
        }
        succeeded.push(done);
    }
    assert_eq!(succeeded.first(), Some(&0));
    assert!(succeeded.last() >= Some(&4), "{succeeded:?}");
    assert!(succeeded.is_sorted(), "{succeeded:?}");
}

/// What ends a connection, and the status of the request that it ends at.
#[test]
fn every_cause_of_error_completes_each_request_once() {
    type Cause = fn(&mut Pair);
    let causes: [(&str, WcStatus, Cause); 7] = [
        ("modify", FLUSHED, |pair| {
            let err = Attr {
                state: QpState::Err,
                ..Attr::default()
            };
            pair.nodes[A].qp.modify(&err, AttrMask::STATE).unwrap();
        }),
        ("fail", FLUSHED, |pair| {
            pair.nodes[A].qp.fail(AsyncEvent::QpFatal);
        }),
        ("silence", WcStatus::RetryExcErr, |pair| {
            pair.filter = Box::new(|_| Fate::Drop);
        }),
        ("the peer's invalid request", FLUSHED, |pair| {
            let psn = Psn::new(0x1000);
            let headers = Headers::new(Opcode::SendMiddle, Qpn::new(0x11), psn);
            pair.inject_built(A, &headers, &[0; 256]);
        }),
        ("NAK 61", WcStatus::RemInvReqErr, |pair| {
            refuse(pair, NakCode::InvalidRequest);
        }),
        ("NAK 62", WcStatus::RemAccessErr, |pair| {
            refuse(pair, NakCode::RemoteAccess);
        }),
        ("NAK 63", WcStatus::RemOpErr, |pair| {
            refuse(pair, NakCode::RemoteOperational);
        }),
    ];
    for (what, status, cause) in causes {
        let mut pair = Pair::new().filtered(|sent| match sent.from {
            A => Fate::Drop,
            _ => Fate::Deliver,
        });
        for wr_id in 100..103 {
            pair.nodes[A].post_recv(wr_id, &[]);
        }
        post_all(&mut pair);
        pair.transmit();
        cause(&mut pair);
        // Posted afterwards, flushed too.
        pair.drive();
        assert_eq!(pair.nodes[A].qp.state(), QpState::Err, "{what}");
        let sge = pair.nodes[A].sge(0, 8);
        pair.nodes[A].post_recv(103, &[sge]);
        pair.drive();
        let receives: Vec<_> = pair.nodes[A]
            .completions
            .iter()
            .filter(|(queue, _)| *queue == Queue::Recv)
            .map(|(_, wc)| (wc.wr_id, wc.status))
            .collect();
        assert_eq!(
            receives,
            [100, 101, 102, 103].map(|wr_id| (wr_id, FLUSHED)),
            "{what}"
        );
        assert_eq!(expect_one_failure(&mut pair, status), 0, "{what}");
        assert_eq!(pair.nodes[A].qp.poll_timeout(), None, "{what}");
    }
}

/// B's NAK of the oldest packet, whatever B thinks.
fn refuse(pair: &mut Pair, code: NakCode) {
    let mut nak = Headers::new(Opcode::Acknowledge, Qpn::new(0x11), FIRST_PSN);
    let syndrome = Syndrome::Nak(code);
    nak.aeth = Some(Aeth { syndrome, msn: 0 });
    pair.inject_built(A, &nak, &[]);
}

/// B goes to ERR in the midst of A's messages: each of its receives completes once, and A hears no more.
#[test]
fn receives_are_flushed_while_the_peer_still_sends() {
    for until in 0..12 {
        let mut pair = Pair::new();
        let recv = pair.nodes[B].sge(0, 1000);
        (0..8).for_each(|wr_id| pair.nodes[B].post_recv(wr_id, &[recv]));
        let sge = pair.nodes[A].sge(0, 600);
        (0..8).for_each(|wr_id| pair.nodes[A].post_send(wr_id, SEND, &[sge]));
        pair.drive_until(until * LATENCY_NS / 2);
        let err = Attr {
            state: QpState::Err,
            ..Attr::default()
        };
        pair.nodes[B].qp.modify(&err, AttrMask::STATE).unwrap();
        pair.nodes[B].collect();
        let bytes = pair.nodes[B].read(0, 1000);
        pair.drive();
        let receives = pair.nodes[B].statuses(Queue::Recv);
        let received = receives
            .iter()
            .filter(|(_, status)| *status == SUCCESS)
            .count();
        let expected: Vec<_> = (0..8)
            .map(|wr_id| {
                (
                    wr_id as u64,
                    if wr_id < received { SUCCESS } else { FLUSHED },
                )
            })
            .collect();
        assert_eq!(receives, expected);
        assert_eq!(pair.nodes[B].read(0, 1000), bytes, "nothing arrives in ERR");
    }
}

/// The NAK that ended B is lost: A asks again, hears nothing, and gives up.
#[test]
fn a_lost_fatal_nak_is_found_out_by_the_timer() {
    let mut pair = Pair::new().losing(B, &[0]);
    let mut remote = pair.nodes[B].remote(0);
    remote.rkey.0 ^= 0x100;
    let sge = pair.nodes[A].sge(0, 8);
    pair.nodes[A].post_send(1, write_op(remote), &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
    pair.expect_states(QpState::Err, QpState::Err);
    assert_eq!(pair.counts[B], 1, "B says nothing after it");
}

#[test]
fn a_response_beyond_a_read_is_an_implied_nak() {
    let mut pair = Pair::new().losing(B, &[0]);
    let remote = pair.nodes[B].remote(0);
    pair.nodes[B].write(0, &pattern(4, 64));
    for wr_id in 0..3 {
        let sge = pair.nodes[A].sge(1000 * usize::try_from(wr_id).unwrap(), 64);
        pair.nodes[A].post_send(wr_id, SendOp::Read { remote }, &[sge]);
    }
    pair.drive();
    pair.expect_sends(&[0, 1, 2].map(|wr_id| (wr_id, SUCCESS)));
    for place in [0, 1000, 2000] {
        assert_eq!(pair.nodes[A].read(place, 64), pattern(4, 64));
    }
    assert!(pair.now < 100_000, "no timer was needed");
    assert_eq!(pair.nodes[A].qp.counters().completer_retry_err, 1);
}

#[test]
fn more_atomics_than_agreed_are_refused_and_not_executed() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        max_dest_rd_atomic: 1,
        ..*attr
    });
    let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8));
    for wr_id in 0..3 {
        pair.nodes[A].post_send(wr_id, SendOp::FetchAdd { remote, add: 1 }, &[sge]);
    }
    pair.drive();
    pair.expect_sends(&[(0, SUCCESS), (1, WcStatus::RemInvReqErr), (2, FLUSHED)]);
    assert_eq!(pair.nodes[B].read(0, 8), 1_u64.to_le_bytes());
}

/// A copy of a WRITE arrives long after its place was written anew.
#[test]
fn a_late_copy_does_not_bring_old_bytes_back() {
    let mut pair = Pair::new();
    let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, 100));
    for seed in 1..4 {
        pair.nodes[A].write(0, &pattern(seed, 100));
        pair.nodes[A].post_send(seed.into(), op, &[sge]);
        pair.drive();
    }
    let first = pair.sent[0].headers;
    pair.inject_built(B, &first, &pattern(1, 100));
    pair.drive();
    assert_eq!(pair.nodes[B].read(0, 100), pattern(3, 100));
    assert_eq!(pair.nodes[B].qp.counters().duplicate_request, 1);
}

/// Answers of every kind, at a queue pair in each state that takes none.
#[test]
fn answers_find_nobody_before_rts_and_after_an_error() {
    use Opcode::{
        Acknowledge, AtomicAcknowledge, ReadResponseFirst, ReadResponseLast, ReadResponseMiddle,
        ReadResponseOnly,
    };
    for state in [QpState::Reset, QpState::Init, QpState::Rtr, QpState::Err] {
        let mut pair = Pair::new();
        let mut qp = Qp::new(Qpn::new(0x11), config());
        let mut path = vec![(QpState::Init, TO_INIT), (QpState::Rtr, TO_RTR)];
        match state {
            QpState::Reset => path.clear(),
            QpState::Init => path.truncate(1),
            QpState::Err => path.push((QpState::Err, AttrMask::STATE)),
            _ => {}
        }
        for (to, mask) in path {
            move_to(&mut qp, &attr(A, Mtu::Mtu256), to, mask);
        }
        pair.nodes[A].qp = qp;
        let before = pair.nodes[A].read(0, MEMORY_LEN);
        let answers = [
            (Acknowledge, 0),
            (AtomicAcknowledge, 0),
            (ReadResponseFirst, 256),
            (ReadResponseMiddle, 256),
            (ReadResponseLast, 10),
            (ReadResponseOnly, 10),
        ];
        for (opcode, len) in answers {
            let mut headers = Headers::new(opcode, Qpn::new(0x11), FIRST_PSN);
            let syndrome = Syndrome::ACK;
            headers.aeth = (opcode != ReadResponseMiddle).then_some(Aeth { syndrome, msn: 1 });
            headers.atomic_ack = (opcode == AtomicAcknowledge).then_some(7);
            pair.inject_built(A, &headers, &vec![9; len]);
        }
        pair.drive();
        let node = &pair.nodes[A];
        assert_eq!(node.qp.state(), state);
        assert_eq!(node.qp.counters().dropped_pkts, 6, "{state:?}");
        assert!(node.completions.is_empty() && node.events.is_empty());
        assert!(node.read(0, MEMORY_LEN) == before);
        assert!(pair.sent.is_empty(), "nobody is answered");
    }
}

/// SQD is for changing attributes between two requests; the READ that was begun still comes whole.
#[test]
fn attributes_changed_in_sqd_hold_afterwards() {
    let mut pair = Pair::new();
    pair.nodes[B].write(0, &pattern(5, 8000));
    let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8000));
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.transmit();
    let sqd = Attr {
        state: QpState::Sqd,
        en_sqd_async_notify: true,
        timeout: 8,
        retry_cnt: 0,
        ..Attr::default()
    };
    let mask = AttrMask::STATE | AttrMask::EN_SQD_ASYNC_NOTIFY;
    pair.nodes[A].qp.modify(&sqd, mask).unwrap();
    pair.nodes[A].post_send(2, write_op(remote), &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    assert_eq!(pair.nodes[A].read(0, 8000), pattern(5, 8000));
    assert_eq!(pair.nodes[A].events, [AsyncEvent::SqDrained]);
    let mask = AttrMask::STATE | AttrMask::TIMEOUT | AttrMask::RETRY_CNT;
    pair.nodes[A].qp.modify(&sqd, mask).unwrap();
    let rts = Attr {
        state: QpState::Rts,
        ..Attr::default()
    };
    pair.nodes[A].qp.modify(&rts, AttrMask::STATE).unwrap();
    pair = pair.filtered(|_| Fate::Drop);
    let start = pair.now;
    pair.drive();
    pair.expect_sends(&[(2, WcStatus::RetryExcErr)]);
    assert_eq!(
        pair.now - start,
        4_096 << 8,
        "the new timeout, and no retry"
    );
}
