//! The limits on retries, and how long each wait is.

use super::*;
use crate::wire::NakCode;

const SEND: SendOp = SendOp::Send { imm: None };

/// The waits that the timer codes of RNR NAKs ask for, in units of 10 us, as the specification lists them.
const RNR_WAITS: [u64; 32] = [
    65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024,
    1_536, 2_048, 3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152,
];
/// From a packet to its answer.
const ROUND_TRIP_NS: u64 = 2 * LATENCY_NS;

fn adjusted(change: impl Fn(&mut Attr)) -> Pair {
    Pair::with(config(), |_, attr| {
        let mut attr = *attr;
        change(&mut attr);
        attr
    })
}

/// When A sent the packet with the first PSN.
fn times(pair: &Pair) -> Vec<u64> {
    pair.sent
        .iter()
        .filter(|sent| sent.from == A && sent.psn() == FIRST_PSN)
        .map(|sent| sent.at)
        .collect()
}

/// Posts a message of one packet without bytes.
fn post(pair: &mut Pair, op: SendOp) {
    pair.nodes[A].post_send(1, op, &[]);
}

#[test]
fn each_rnr_timer_code_waits_as_long_as_it_says() {
    for (code, wait) in (0..).zip(RNR_WAITS) {
        let mut pair = adjusted(|attr| (attr.min_rnr_timer, attr.rnr_retry) = (code, 1));
        post(&mut pair, SEND);
        pair.drive();
        let again = ROUND_TRIP_NS + wait * 10_000;
        assert_eq!(times(&pair), [0, again], "code {code}");
        assert_eq!(pair.now, again + ROUND_TRIP_NS, "code {code}");
        pair.expect_sends(&[(1, WcStatus::RnrRetryExcErr)]);
    }
}

#[test]
fn each_count_of_rnr_retries_is_spent_to_the_last() {
    for rnr_retry in 0..7 {
        let mut pair = adjusted(|attr| attr.rnr_retry = rnr_retry);
        post(&mut pair, SEND);
        pair.drive();
        pair.expect_sends(&[(1, WcStatus::RnrRetryExcErr)]);
        let turn = ROUND_TRIP_NS + 640_000;
        let expected: Vec<u64> = (0..=u64::from(rnr_retry)).map(|i| i * turn).collect();
        assert_eq!(times(&pair), expected, "rnr_retry {rnr_retry}");
    }
}

/// An hour of RNR NAKs, half a second apart, costs `rnr_retry` 7 nothing.
#[test]
fn infinite_rnr_retries_outlast_an_hour() {
    const HOUR_NS: u64 = 3_600_000_000_000;
    let mut pair = adjusted(|attr| (attr.min_rnr_timer, attr.rnr_retry) = (31, 7));
    post(&mut pair, SEND);
    pair.drive_until(HOUR_NS);
    pair.expect_sends(&[]);
    assert_eq!(
        times(&pair).len() as u64,
        HOUR_NS / (491_520_000 + ROUND_TRIP_NS) + 1
    );
    pair.nodes[B].post_recv(1, &[]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
}

/// On a network that loses every third answer, a long wait for a receive spent the retries of timeouts one
/// by one, and `rnr_retry` 7 ended after some seconds with the peer answering all the time.
#[test]
fn losses_spread_over_a_long_rnr_wait_cost_nothing() {
    let mut pair = adjusted(|attr| (attr.retry_cnt, attr.rnr_retry) = (1, 7));
    pair = pair.filtered(|sent| match (sent.from, sent.index % 3) {
        (B, 2) => Fate::Drop,
        _ => Fate::Deliver,
    });
    post(&mut pair, SEND);
    pair.drive_until(10_000_000_000);
    pair.expect_sends(&[]);
    pair.nodes[B].post_recv(1, &[]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
}

#[test]
fn each_timeout_waits_by_its_formula() {
    for timeout in 1..=31 {
        let mut pair =
            adjusted(|attr| (attr.timeout, attr.retry_cnt) = (timeout, 1)).filtered(|_| Fate::Drop);
        post(&mut pair, SEND);
        pair.drive();
        let wait = 4_096 << timeout;
        assert_eq!(times(&pair), [0, wait], "timeout {timeout}");
        // A repeated timeout is spread.
        assert!(
            (2 * wait..3 * wait).contains(&pair.now),
            "timeout {timeout}"
        );
        pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
    }
}

/// 7 is a count like the others, not "for ever" as in rxe.
#[test]
fn each_count_of_retries_is_spent_to_the_last() {
    for retry_cnt in 0..=7 {
        let mut pair = adjusted(|attr| attr.retry_cnt = retry_cnt).filtered(|_| Fate::Drop);
        post(&mut pair, SEND);
        pair.drive();
        pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
        assert_eq!(times(&pair).len(), usize::from(retry_cnt) + 1);
    }
}

/// A peer that answers every packet with a sequence NAK makes no progress either. One NAK is heard for each
/// transmission, so the timer, which ends the deafness, is what spends the rest.
#[test]
fn sequence_naks_without_progress_spend_the_retries() {
    let mut pair = adjusted(|attr| attr.retry_cnt = 3).filtered(|sent| match sent.from {
        A => Fate::Drop,
        _ => Fate::Deliver,
    });
    post(&mut pair, SEND);
    for _ in 0..100 {
        pair.drive_until(pair.now + 1_000_000);
        let mut nak = Headers::new(Opcode::Acknowledge, Qpn::new(0x11), FIRST_PSN);
        let syndrome = Syndrome::Nak(NakCode::PsnSequence);
        nak.aeth = Some(Aeth { syndrome, msn: 0 });
        pair.inject_built(A, &nak, &[]);
    }
    pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
    assert_eq!(times(&pair).len(), 4);
}

/// The response to a READ is lost for ever, while what is behind it is acknowledged again and again.
#[test]
fn implied_naks_without_progress_spend_the_retries() {
    let mut pair = adjusted(|attr| attr.retry_cnt = 3).filtered(|sent| match sent.opcode() {
        Opcode::ReadResponseOnly => Fate::Drop,
        _ => Fate::Deliver,
    });
    let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8));
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.nodes[A].post_send(2, write_op(remote), &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, WcStatus::RetryExcErr), (2, FLUSHED)]);
    assert_eq!(times(&pair).len(), 4);
}

/// The first RNR NAK is lost and the timer makes up for it; the first repetition is lost too, and the timer
/// runs again although an RNR NAK came before. Each kind of retry has a count of its own, and a peer that has
/// answered with an RNR NAK is not silent: all retries after timeouts are available again.
#[test]
fn rnr_and_timeouts_do_not_spend_each_other_s_retries() {
    for (retry_cnt, rnr_retry, is_enough) in [(2, 1, true), (1, 7, true), (7, 0, false)] {
        let mut pair = adjusted(|attr| {
            (attr.retry_cnt, attr.rnr_retry) = (retry_cnt, rnr_retry);
        });
        pair = pair.filtered(|sent| match (sent.from, sent.index) {
            (B, 0) | (A, 2) => Fate::Drop,
            _ => Fate::Deliver,
        });
        post(&mut pair, SEND);
        // T is 4.19 ms: sent at 0 and T, NAK, wait, lost, sent again after another T or up to two.
        pair.drive_until(9_000_000);
        if is_enough {
            pair.expect_sends(&[]);
            pair.nodes[B].post_recv(1, &[]);
            pair.drive();
            pair.expect_sends(&[(1, SUCCESS)]);
            let (timeout, wait) = (4_194_304, ROUND_TRIP_NS + 640_000);
            let again = timeout + wait;
            assert_eq!(times(&pair)[..3], [0, timeout, again]);
            let last = times(&pair)[3];
            assert!(
                (again + timeout..again + 2 * timeout).contains(&last),
                "{last}"
            );
        } else {
            pair.drive();
            pair.expect_sends(&[(1, WcStatus::RnrRetryExcErr)]);
        }
    }
}
