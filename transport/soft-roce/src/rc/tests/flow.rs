//! Waiting: for receives, for answers, for a place in the window, for earlier requests.

use super::*;
use crate::wire::rnr_timer_ns;

const SEND: SendOp = SendOp::Send { imm: None };

/// Times at which A sent anything.
fn times(pair: &Pair) -> Vec<u64> {
    pair.sent
        .iter()
        .filter(|sent| sent.from == A)
        .map(|sent| sent.at)
        .collect()
}

#[test]
fn a_send_waits_for_a_receive() {
    for len in [8, 700] {
        let mut pair = Pair::new();
        let sge = pair.nodes[A].sge(0, len);
        pair.nodes[A].write(0, &pattern(1, len));
        pair.nodes[A].post_send(1, SEND, &[sge]);
        pair.drive_until(1_000_000);
        pair.expect_sends(&[]);
        let recv = pair.nodes[B].sge(0, len);
        pair.nodes[B].post_recv(2, &[recv]);
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS)]);
        pair.expect_receives(&[(2, SUCCESS)]);
        assert_eq!(pair.nodes[B].read(0, len), pattern(1, len));
        // 0, 644 us, 1288 us: the wait of the attribute and a round trip.
        let mut starts = times(&pair);
        starts.dedup();
        let round = rnr_timer_ns(12) + 2 * LATENCY_NS;
        assert_eq!(starts, [0, round, 2 * round]);
    }
}

#[test]
fn nothing_is_placed_before_there_is_a_receive() {
    for len in [8, 700] {
        let mut pair = Pair::new();
        let sge = pair.nodes[A].sge(0, len);
        pair.nodes[A].write(0, &pattern(1, len));
        let op = SendOp::Write {
            remote: pair.nodes[B].remote(0),
            imm: Some([1; 4]),
        };
        pair.nodes[A].post_send(1, op, &[sge]);
        pair.drive_until(1_000_000);
        let last_packet = len.saturating_sub(1) / 256 * 256;
        assert_eq!(
            pair.nodes[B].read(last_packet, len - last_packet),
            vec![0; len - last_packet]
        );
        pair.nodes[B].post_recv(2, &[]);
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS)]);
        pair.expect_receives(&[(2, SUCCESS)]);
        assert_eq!(pair.nodes[B].read(0, len), pattern(1, len));
    }
}

#[test]
fn rnr_retries_are_counted() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        rnr_retry: 2,
        ..*attr
    });
    let sge = pair.nodes[A].sge(0, 8);
    pair.nodes[A].post_send(1, SEND, &[sge]);
    pair.nodes[A].post_send(2, SEND, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, WcStatus::RnrRetryExcErr), (2, FLUSHED)]);
    pair.expect_states(QpState::Err, QpState::Rts);
    let firsts = pair
        .sent
        .iter()
        .filter(|s| s.from == A && s.psn() == FIRST_PSN)
        .count();
    assert_eq!(firsts, 3, "once, and two retries");
    assert_eq!(pair.nodes[A].qp.counters().rcvd_rnr_err, 3);
}

#[test]
fn rnr_retry_seven_is_without_end() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        rnr_retry: 7,
        ..*attr
    });
    let sge = pair.nodes[A].sge(0, 8);
    pair.nodes[A].post_send(1, SEND, &[sge]);
    pair.drive_until(100_000_000);
    pair.expect_sends(&[]);
    assert!(pair.counts[A] > 100);
    let recv = pair.nodes[B].sge(0, 8);
    pair.nodes[B].post_recv(1, &[recv]);
    pair.drive_until(200_000_000);
    pair.expect_sends(&[(1, WcStatus::Success)]);
}

#[test]
fn rnr_stops_the_whole_queue_but_not_what_was_before() {
    let mut pair = Pair::new();
    let (sge, op) = (pair.nodes[A].sge(0, 8), write_op(pair.nodes[B].remote(0)));
    pair.nodes[A].post_send(1, op, &[sge]);
    pair.nodes[A].post_send(2, SEND, &[sge]);
    pair.nodes[A].post_send(3, op, &[sge]);
    pair.drive_until(rnr_timer_ns(12));
    pair.expect_sends(&[(1, SUCCESS)]);
    assert_eq!(
        pair.counts,
        [3, 1],
        "the WRITE behind draws no NAK of its own"
    );
    let recv = pair.nodes[B].sge(0, 8);
    pair.nodes[B].post_recv(1, &[recv]);
    pair.drive();
    pair.expect_sends(&[(2, SUCCESS), (3, SUCCESS)]);
}

#[test]
fn the_timer_rests_during_an_rnr_wait() {
    // T is 131 us, the wait 491 ms: a running timer would use up all retries meanwhile.
    let adjust = |_, attr: &Attr| Attr {
        timeout: 5,
        min_rnr_timer: 31,
        retry_cnt: 1,
        ..*attr
    };
    let mut pair = Pair::with(config(), adjust);
    let sge = pair.nodes[A].sge(0, 8);
    pair.nodes[A].post_send(1, SEND, &[sge]);
    pair.drive_until(400_000_000);
    assert_eq!(pair.counts[A], 1);
    let recv = pair.nodes[B].sge(0, 8);
    pair.nodes[B].post_recv(1, &[recv]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
}

/// Asserts that the first wait is the timeout of 4.096 us * 2^10, and each later one that or up to twice as
/// long.
#[track_caller]
fn assert_waits(times: &[u64]) {
    const TIMEOUT_NS: u64 = 4_194_304;
    let waits: Vec<u64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(waits[0], TIMEOUT_NS);
    let allowed = TIMEOUT_NS..2 * TIMEOUT_NS;
    assert!(waits.iter().all(|wait| allowed.contains(wait)), "{waits:?}");
}

#[test]
fn silence_is_answered_by_retries_then_an_error() {
    for (retry_cnt, sends) in [(0, 1), (2, 3), (7, 8)] {
        let mut pair =
            Pair::with(config(), |_, attr| Attr { retry_cnt, ..*attr }).filtered(|_| Fate::Drop);
        let (sge, op) = (pair.nodes[A].sge(0, 8), write_op(pair.nodes[B].remote(0)));
        pair.nodes[A].post_send(1, op, &[sge]);
        pair.drive();
        pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
        let mut times = times(&pair);
        assert_eq!(times.len(), sends);
        times.push(pair.now);
        assert_waits(&times);
    }
}

#[test]
fn timeout_zero_never_fires() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        timeout: 0,
        ..*attr
    })
    .filtered(|_| Fate::Drop);
    let (sge, op) = (pair.nodes[A].sge(0, 8), write_op(pair.nodes[B].remote(0)));
    pair.nodes[A].post_send(1, op, &[sge]);
    pair.drive_until(u64::MAX - 1);
    pair.expect_sends(&[]);
    assert_eq!(pair.counts[A], 1);
}

#[test]
fn progress_reloads_the_retries() {
    // Each of the twenty packets is lost three times in a row; retry_cnt 3 suffices.
    let mut losses = std::collections::HashMap::new();
    let mut pair = Pair::with(config(), |_, attr| Attr {
        retry_cnt: 3,
        ..*attr
    });
    pair = pair.filtered(move |sent| {
        let count = losses.entry(sent.psn().get()).or_insert(0);
        *count += 1;
        if sent.from == A && *count <= 3 {
            Fate::Drop
        } else {
            Fate::Deliver
        }
    });
    let (sge, op) = (pair.nodes[A].sge(0, 8), write_op(pair.nodes[B].remote(0)));
    for wr_id in 0..20 {
        pair.nodes[A].post_send(wr_id, op, &[sge]);
        pair.drive();
        pair.expect_sends(&[(wr_id, SUCCESS)]);
    }
}

#[test]
fn reads_in_flight_are_limited() {
    for limit in 1..=4u8 {
        let mut pair = Pair::with(config(), |_, attr| Attr {
            max_rd_atomic: limit,
            max_dest_rd_atomic: limit,
            ..*attr
        });
        let remote = pair.nodes[B].remote(0);
        for wr_id in 0..8 {
            let sge = pair.nodes[A].sge(64, 8);
            let op = match wr_id % 2 {
                0 => SendOp::Read { remote },
                _ => SendOp::FetchAdd { remote, add: 1 },
            };
            pair.nodes[A].post_send(wr_id, op, &[sge]);
        }
        pair.transmit();
        assert_eq!(pair.counts[A], limit.into());
        pair.drive();
        pair.expect_sends(&[0, 1, 2, 3, 4, 5, 6, 7].map(|wr_id| (wr_id, SUCCESS)));
        assert_eq!(pair.counts[A], 8);
    }
}

#[test]
fn a_fence_waits_for_earlier_reads() {
    for (flags, at_once) in [(SendFlags::FENCE, 1), (SendFlags::empty(), 2)] {
        let mut pair = Pair::new();
        let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8));
        pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
        let flags = flags | SendFlags::SIGNALED;
        let wr = SendWr {
            wr_id: 2,
            op: write_op(remote),
            data: Data::Gather(&[sge]),
            flags,
        };
        pair.nodes[A].qp.post_send(&wr).unwrap();
        pair.transmit();
        assert_eq!(pair.counts[A], at_once);
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
    }
}

#[test]
fn the_window_starts_at_sixteen_packets_and_opens() {
    let mut pair = Pair::new();
    let len = 200 * 256;
    let (sge, op) = (pair.nodes[A].sge(0, len), write_op(pair.nodes[B].remote(0)));
    pair.nodes[A].post_send(1, op, &[sge]);
    let mut bursts = Vec::new();
    while pair.nodes[A].completions.is_empty() {
        let before = pair.counts[A];
        pair.transmit();
        bursts.push(pair.counts[A] - before);
        pair.now += LATENCY_NS;
        pair.deliver();
    }
    bursts.retain(|burst| *burst > 0);
    assert_eq!(bursts[..3], [16, 32, 64], "slow start up to the maximum");
    assert!(bursts.iter().all(|burst| *burst <= 64));
}

#[test]
fn read_responses_stay_within_the_window() {
    let mut pair = Pair::new();
    let len = 200 * 256;
    let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, len));
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.transmit();
    pair.now += LATENCY_NS;
    pair.deliver();
    pair.transmit();
    assert_eq!(pair.counts, [1, 16]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
}

#[test]
fn a_full_transmit_buffer_is_no_loss() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        path_mtu: Mtu::Mtu4096,
        ..*attr
    });
    let len = MEMORY_LEN / 2;
    pair.nodes[A].write(0, &pattern(1, len));
    let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, len));
    for wr_id in 0..4 {
        pair.nodes[A].post_send(wr_id, op, &[sge]);
    }
    pair.drive();
    pair.expect_sends(&[0, 1, 2, 3].map(|wr_id| (wr_id, SUCCESS)));
    assert_eq!(pair.nodes[B].read(0, len), pattern(1, len));
    assert_eq!(pair.nodes[A].qp.counters().completer_retry_err, 0);
}

#[test]
fn the_queue_pair_may_be_unsignalled_altogether() {
    let mut pair = Pair::new();
    let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, 8));
    for round in 0..100 {
        let flags = if round % 10 == 9 {
            SendFlags::SIGNALED
        } else {
            SendFlags::empty()
        };
        let wr = SendWr {
            wr_id: round,
            op,
            data: Data::Gather(&[sge]),
            flags,
        };
        pair.nodes[A].qp.post_send(&wr).unwrap();
        pair.drive();
    }
    let signalled = [9, 19, 29, 39, 49, 59, 69, 79, 89, 99];
    pair.expect_sends(&signalled.map(|wr_id| (wr_id, SUCCESS)));
}

/// A pair whose B holds ACKs, just after a WRITE of `len` bytes has reached B.
fn written_and_held(len: usize) -> Pair {
    let mut pair = Pair::new();
    pair.nodes[B].ack_time = AckTime::WithNextTurn;
    let (sge, remote) = (pair.nodes[A].sge(0, len), pair.nodes[B].remote(0));
    pair.nodes[A].write(0, &pattern(3, len));
    pair.nodes[A].post_send(1, write_op(remote), &[sge]);
    pair.drive_until(LATENCY_NS);
    assert_eq!(pair.nodes[B].read(0, len), pattern(3, len));
    pair
}

#[test]
fn a_held_ack_goes_behind_the_answer() {
    let mut pair = written_and_held(8);
    assert!(pair.nodes[B].qp.holds_ack());
    assert_eq!(pair.opcodes(B), []);
    let (sge, remote) = (pair.nodes[B].sge(0, 8), pair.nodes[A].remote(0));
    pair.nodes[B].post_send(2, write_op(remote), &[sge]);
    pair.transmit();
    assert_eq!(pair.opcodes(B), [Opcode::WriteOnly, Opcode::Acknowledge]);
    assert!(!pair.nodes[B].qp.holds_ack());
    pair.drive_until(2 * LATENCY_NS);
    pair.expect_sends(&[(1, SUCCESS)]);
}

#[test]
fn a_held_ack_goes_in_the_next_turn_alone() {
    let mut pair = written_and_held(8);
    assert_eq!(pair.opcodes(B), []);
    pair.transmit();
    assert_eq!(pair.opcodes(B), [Opcode::Acknowledge]);
    assert!(!pair.nodes[B].qp.holds_ack());
    pair.drive_until(2 * LATENCY_NS);
    pair.expect_sends(&[(1, SUCCESS)]);
}

#[test]
fn an_ack_of_several_packets_does_not_wait() {
    let pair = written_and_held(4 * 256);
    assert_eq!(pair.opcodes(B), [Opcode::Acknowledge]);
    let pair = written_and_held(3 * 256);
    assert_eq!(pair.opcodes(B), []);
}

#[test]
fn a_response_takes_an_ack_s_place() {
    let mut pair = Pair::new();
    pair.nodes[B].ack_time = AckTime::WithNextTurn;
    let (sge, remote) = (pair.nodes[A].sge(0, 8), pair.nodes[B].remote(0));
    pair.nodes[A].post_send(1, write_op(remote), &[sge]);
    pair.nodes[A].post_send(2, SendOp::Read { remote }, &[sge]);
    pair.drive();
    assert_eq!(pair.opcodes(B), [Opcode::ReadResponseOnly]);
    assert!(!pair.nodes[B].qp.holds_ack());
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
}

#[test]
fn a_nak_does_not_wait() {
    let mut pair = Pair::new();
    pair.nodes[B].ack_time = AckTime::WithNextTurn;
    let sge = pair.nodes[A].sge(0, 8);
    pair.nodes[A].post_send(1, SEND, &[sge]);
    pair.drive_until(LATENCY_NS);
    assert_eq!(pair.opcodes(B), [Opcode::Acknowledge]);
    assert!(!pair.nodes[B].qp.holds_ack());
}

#[test]
fn a_window_that_shrinks_under_packets_in_flight_does_not_stall() {
    const MTU_LEN: usize = 4096;
    let len = 60 * MTU_LEN;
    let mut pair = Pair::with(config(), |_, attr| Attr {
        path_mtu: Mtu::Mtu4096,
        ..*attr
    });
    let (sge, remote) = (pair.nodes[A].sge(0, len), pair.nodes[B].remote(0));
    for wr_id in 1..4 {
        pair.nodes[A].post_send(wr_id, write_op(remote), &[sge]);
    }
    pair.drive();
    assert!(pair.nodes[A].qp.requester.window.size() > 40);
    let begin = pair.sent.len();
    let packet = pair.nodes[A].sge(0, MTU_LEN);
    pair.nodes[A].post_send(4, write_op(remote), &[packet]);
    pair.nodes[A].post_send(5, write_op(remote), &[sge]);
    // The buffer fills up behind the 32nd packet, of which the first and the 17th asked for an ACK.
    let node = &mut pair.nodes[A];
    let is_more = node
        .qp
        .poll_transmit(pair.now, &mut node.mem, &mut node.tx, AckTime::Now);
    assert!(is_more);
    let asked = pair.counts[A] + 17;
    // Later than the rest, or the ACK would speak for them too.
    pair.filter = Box::new(move |sent| match (sent.from, sent.index >= asked) {
        (A, true) => Fate::Delay { ns: 50_000 },
        _ => Fate::Deliver,
    });
    pair.send_off(A);
    assert!(!pair.sent[begin..].last().unwrap().headers.bth.ack_req);
    pair.nodes[A].qp.set_window_share(4 * MTU_LEN);
    pair.drive();
    assert_eq!(pair.nodes[A].qp.counters().retry_timeout, 0);
    assert_eq!(
        pair.nodes[A].statuses(Queue::Send),
        [1, 2, 3, 4, 5].map(|id| (id, SUCCESS))
    );
    // One packet beyond the smaller window asks; from then on the window holds.
    let mut in_flight = pair.sent[begin..].iter().filter(|sent| sent.from == A);
    assert!(in_flight.nth(32).unwrap().headers.bth.ack_req);
}

#[test]
fn answers_that_come_to_take_longer_are_waited_for() {
    const TIMEOUT_NS: u64 = 4_096 << 5;
    let mut pair = Pair::with(config(), |_, attr| Attr {
        timeout: 5,
        ..*attr
    });
    let (sge, remote) = (pair.nodes[A].sge(0, 8), pair.nodes[B].remote(0));
    let retries = |pair: &Pair| pair.nodes[A].qp.counters().retry_timeout;
    for delay_ns in (0..4 * TIMEOUT_NS).step_by(10_000) {
        pair.filter = Box::new(move |sent| match sent.from {
            A => Fate::Deliver,
            _ => Fate::Delay { ns: delay_ns },
        });
        pair.nodes[A].post_send(1, write_op(remote), &[sge]);
        pair.drive();
        let is_possible = delay_ns + 2 * LATENCY_NS < 4 * TIMEOUT_NS;
        assert_eq!(
            retries(&pair) == 0,
            is_possible,
            "answers after {delay_ns} ns"
        );
    }
    assert!(
        pair.nodes[A]
            .statuses(Queue::Send)
            .iter()
            .all(|(_, status)| *status == SUCCESS)
    );
}

#[test]
fn no_answer_is_waited_for_less_than_the_timeout() {
    let mut pair = Pair::new();
    let (sge, remote) = (pair.nodes[A].sge(0, 8), pair.nodes[B].remote(0));
    for wr_id in 0..20 {
        pair.nodes[A].post_send(wr_id, write_op(remote), &[sge]);
        pair.drive();
    }
    let begin = pair.sent.len();
    pair.filter = Box::new(|_| Fate::Drop);
    pair.nodes[A].post_send(20, write_op(remote), &[sge]);
    pair.drive();
    let times: Vec<u64> = pair.sent[begin..].iter().map(|sent| sent.at).collect();
    assert_waits(&times);
    assert_eq!(times.len(), 7, "once, and six retries");
}
