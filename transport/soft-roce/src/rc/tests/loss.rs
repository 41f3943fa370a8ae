//! Lost, repeated, damaged and late packets, one at a time and systematically.

use super::*;
use crate::wire::{NakCode, Reth};

/// One exchange of every operation: posted, driven, and checked to the byte.
const SCENARIO_LEN: usize = 700;

fn post_scenario(pair: &mut Pair) {
    let [a, b] = &mut pair.nodes;
    a.write(0, &pattern(1, SCENARIO_LEN));
    b.write(10_000, &pattern(2, SCENARIO_LEN));
    b.write(20_000, &5u64.to_le_bytes());
    for wr_id in 0..2 {
        let sge = b.sge(
            30_000 + usize::try_from(wr_id).unwrap() * 1000,
            SCENARIO_LEN,
        );
        b.post_recv(wr_id, &[sge]);
    }
    let source = a.sge(0, SCENARIO_LEN);
    let imm = Some([1, 2, 3, 4]);
    a.post_send(0, SendOp::Send { imm: None }, &[source]);
    a.post_send(1, write_op(b.remote(0)), &[source]);
    a.post_send(
        2,
        SendOp::Read {
            remote: b.remote(10_000),
        },
        &[a.sge(10_000, SCENARIO_LEN)],
    );
    a.post_send(
        3,
        SendOp::FetchAdd {
            remote: b.remote(20_000),
            add: 3,
        },
        &[a.sge(20_000, 8)],
    );
    a.post_send(
        4,
        SendOp::Write {
            remote: b.remote(1000),
            imm,
        },
        &[source],
    );
    let swap = SendOp::CompareSwap {
        remote: b.remote(20_000),
        compare: 8,
        swap: 100,
    };
    a.post_send(5, swap, &[a.sge(20_008, 8)]);
}

#[track_caller]
fn check_scenario(pair: &mut Pair, what: &str) {
    let context = format!("{what}\n{}", pair.trace());
    let [a, b] = &mut pair.nodes;
    let sends = a.statuses(Queue::Send);
    assert_eq!(
        sends,
        [0, 1, 2, 3, 4, 5].map(|wr_id| (wr_id, SUCCESS)),
        "{context}"
    );
    let receives: Vec<_> = b
        .completions
        .iter()
        .map(|(_, wc)| (wc.wr_id, wc.opcode, wc.imm))
        .collect();
    let with_imm = (1, WcOpcode::RecvRdmaWithImm, Some([1, 2, 3, 4]));
    assert_eq!(receives, [(0, WcOpcode::Recv, None), with_imm], "{context}");
    for place in [30_000, 0, 1000] {
        assert_eq!(
            b.read(place, SCENARIO_LEN),
            pattern(1, SCENARIO_LEN),
            "{place}: {context}"
        );
    }
    assert_eq!(
        a.read(10_000, SCENARIO_LEN),
        pattern(2, SCENARIO_LEN),
        "{context}"
    );
    assert_eq!(a.read(20_000, 8), 5u64.to_le_bytes(), "{context}");
    assert_eq!(a.read(20_008, 8), 8u64.to_le_bytes(), "{context}");
    assert_eq!(b.read(20_000, 8), 100u64.to_le_bytes(), "{context}");
    pair.expect_states(QpState::Rts, QpState::Rts);
}

/// Packets that each side sends in the scenario when nothing goes wrong.
fn packet_counts() -> [usize; 2] {
    let mut pair = Pair::new();
    post_scenario(&mut pair);
    pair.drive();
    check_scenario(&mut pair, "no fault");
    pair.counts
}

/// Applies `fate` to each packet of each side in turn.
fn hit_each(fate: Fate) {
    let counts = packet_counts();
    for from in [A, B] {
        for index in 0..counts[from] {
            let mut pair = Pair::new().filtered(move |sent| {
                if sent.from == from && sent.index == index {
                    fate
                } else {
                    Fate::Deliver
                }
            });
            post_scenario(&mut pair);
            pair.drive();
            check_scenario(&mut pair, &format!("{fate:?} on packet {index} of {from}"));
        }
    }
}

#[test]
fn any_packet_may_be_lost() {
    hit_each(Fate::Drop);
}

#[test]
fn any_packet_may_come_twice() {
    hit_each(Fate::Duplicate);
}

#[test]
fn any_packet_may_be_damaged() {
    for bit in [0, 3, 40, 95, 96, 127, 160, 1000] {
        hit_each(Fate::Corrupt { bit });
    }
}

#[test]
fn any_packet_may_be_late() {
    for ns in [1, 10, LATENCY_NS, 5 * LATENCY_NS, 3_000_000, 50_000_000] {
        hit_each(Fate::Delay { ns });
    }
}

#[test]
fn any_two_packets_may_be_lost() {
    let counts = packet_counts();
    let all: Vec<(usize, usize)> = [A, B]
        .into_iter()
        .flat_map(|from| (0..counts[from]).map(move |i| (from, i)))
        .collect();
    for first in &all {
        for second in &all {
            let lost = [*first, *second];
            let mut pair = Pair::new().filtered(move |sent| {
                if lost.contains(&(sent.from, sent.index)) {
                    Fate::Drop
                } else {
                    Fate::Deliver
                }
            });
            post_scenario(&mut pair);
            pair.drive();
            check_scenario(&mut pair, &format!("{lost:?} lost"));
        }
    }
}

#[test]
fn every_answer_may_be_lost_once() {
    let mut seen = Vec::new();
    let mut pair = Pair::new().filtered(move |sent| {
        let answer = (sent.from, sent.psn(), sent.opcode());
        if sent.from == A || seen.contains(&answer) {
            return Fate::Deliver;
        }
        seen.push(answer);
        Fate::Drop
    });
    post_scenario(&mut pair);
    pair.drive();
    check_scenario(&mut pair, "each answer lost once");
}

#[test]
fn a_sequence_nak_resumes_inside_the_message() {
    let mut pair = Pair::new().losing(A, &[1]);
    let sge = pair.nodes[A].sge(0, 4 * 256);
    pair.nodes[A].post_send(1, write_op(pair.nodes[B].remote(0)), &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    use Opcode::{WriteFirst, WriteLast, WriteMiddle};
    let first_try = [WriteFirst, WriteMiddle, WriteMiddle, WriteLast];
    let retry = [WriteMiddle, WriteMiddle, WriteLast];
    assert_eq!(pair.opcodes(A), [&first_try[..], &retry[..]].concat());
    let naks: Vec<_> = pair.sent.iter().filter(|sent| sent.from == B).collect();
    assert_eq!(
        naks[0].syndrome(),
        Some(Syndrome::Nak(crate::wire::NakCode::PsnSequence))
    );
    assert_eq!(
        naks[0].psn(),
        FIRST_PSN + 1,
        "a sequence NAK carries the expected PSN"
    );
    assert_eq!(
        naks.len(),
        3,
        "a NAK for the gap, an ACK when it closes, one at the end"
    );
    assert!(pair.now < 100_000, "no timer was needed");
}

#[test]
fn a_lost_read_response_is_asked_for_from_the_gap_on() {
    let mut pair = Pair::new().losing(B, &[1]);
    pair.nodes[B].write(0, &pattern(1, 1000));
    let remote = pair.nodes[B].remote(0);
    let sge = pair.nodes[A].sge(0, 1000);
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    assert_eq!(pair.nodes[A].read(0, 1000), pattern(1, 1000));
    let again = pair
        .sent
        .iter()
        .filter(|sent| sent.from == A)
        .nth(1)
        .unwrap();
    let reth = again.headers.reth.unwrap();
    assert_eq!(
        (again.psn(), reth.va, reth.dma_len),
        (FIRST_PSN + 1, remote.addr + 256, 744)
    );
    assert!(pair.now < 100_000, "no timer was needed");
}

#[test]
fn a_read_resumed_with_middle_or_last_is_accepted() {
    for from_psn in 1..4 {
        // The answer to the repeated READ is rewritten as kernel rxe sends it.
        let mut pair = Pair::new().filtered(move |sent| {
            if sent.from == B && sent.index >= from_psn {
                Fate::Drop
            } else {
                Fate::Deliver
            }
        });
        let data = pattern(6, 1000);
        let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 1000));
        pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
        pair.drive_until(1_000_000);
        for index in 0..4 {
            let psn = FIRST_PSN + u32::try_from(index).unwrap();
            let opcode = if index == 3 {
                Opcode::ReadResponseLast
            } else {
                Opcode::ReadResponseMiddle
            };
            let mut headers = Headers::new(opcode, Qpn::new(0x11), psn);
            headers.aeth = (index == 3).then_some(Aeth {
                syndrome: Syndrome::ACK,
                msn: 1,
            });
            let bytes = &data[index * 256..1000.min(index * 256 + 256)];
            pair.inject_built(A, &headers, bytes);
        }
        pair.expect_sends(&[(1, SUCCESS)]);
        assert_eq!(
            pair.nodes[A].read(from_psn * 256, 200),
            data[from_psn * 256..][..200]
        );
    }
}

/// Kernel rxe once gave up long messages at 5 % loss: it takes a second NAK, and gives back the retry that
/// the first one cost, only after an ACK, and asks for none before the end of the message.
#[test]
fn the_packet_that_closes_a_gap_is_acknowledged() {
    let mut pair = Pair::new();
    let Remote { addr: va, rkey } = pair.nodes[B].remote(0);
    // What arrives together of ten packets, of which rxe asks for an ACK of the last only. The middle lot
    // closes a gap and opens another.
    for numbers in [&[0, 1, 3][..], &[2, 3, 4, 6], &[5]] {
        for number in numbers {
            let opcode = if *number == 0 {
                Opcode::WriteFirst
            } else {
                Opcode::WriteMiddle
            };
            let mut headers = Headers::new(opcode, Qpn::new(0x12), FIRST_PSN + *number);
            headers.reth = (*number == 0).then_some(Reth {
                va,
                rkey: rkey.0,
                dma_len: 10 * 256,
            });
            pair.inject_built(B, &headers, &[7; 256]);
        }
        pair.drive();
    }
    let answers: Vec<_> = pair
        .sent
        .iter()
        .filter(|sent| sent.from == B)
        .map(|sent| (sent.psn().distance(FIRST_PSN), sent.syndrome().unwrap()))
        .collect();
    let nak = Syndrome::Nak(NakCode::PsnSequence);
    let expected = [(2, nak), (4, Syndrome::ACK), (5, nak), (5, Syndrome::ACK)];
    assert_eq!(answers, expected, "trace:\n{}", pair.trace());
}

/// Kernel rxe takes a plain ACK at the PSN of a READ or atomic for its answer: a FETCH_ADD whose answer was
/// lost once completed with a buffer that nobody had written, because a SEND before it came again.
#[test]
fn a_repeated_send_is_not_acknowledged_past_a_read_or_atomic() {
    for op in ["READ", "FETCH_ADD"] {
        let mut pair = Pair::new();
        let recv = pair.nodes[B].sge(5000, 100);
        pair.nodes[B].post_recv(1, &[recv]);
        let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8));
        pair.nodes[A].post_send(1, SendOp::Send { imm: None }, &[sge]);
        let answered = match op {
            "READ" => SendOp::Read { remote },
            _ => SendOp::FetchAdd { remote, add: 1 },
        };
        pair.nodes[A].post_send(2, answered, &[sge]);
        pair.nodes[A].post_send(3, write_op(remote), &[sge]);
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS), (3, SUCCESS)]);
        let before = pair.sent.len();
        for number in [0, 2] {
            let repeated = pair.sent[number].headers;
            assert_eq!(repeated.bth.psn, FIRST_PSN + u32::try_from(number).unwrap());
            pair.inject_built(B, &repeated, &[0; 8]);
            pair.drive();
        }
        let psns: Vec<_> = pair.sent[before..].iter().map(Sent::psn).collect();
        assert_eq!(psns, [FIRST_PSN, FIRST_PSN + 2], "{op}: {}", pair.trace());
    }
}

#[test]
fn an_ack_beyond_a_read_is_an_implied_nak() {
    // The READ's only response is lost; the WRITE behind it is acknowledged.
    let mut pair = Pair::new().losing(B, &[0]);
    let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8));
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.nodes[A].post_send(2, write_op(remote), &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
    use Opcode::{ReadRequest, WriteOnly};
    assert_eq!(
        pair.opcodes(A),
        [ReadRequest, WriteOnly, ReadRequest],
        "the WRITE is not repeated"
    );
    assert!(pair.now < 100_000, "no timer was needed");
}

#[test]
fn a_duplicate_atomic_is_answered_and_not_repeated() {
    let mut pair = Pair::new().losing(B, &[0, 1]);
    let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8));
    pair.nodes[B].write(0, &10u64.to_le_bytes());
    pair.nodes[A].post_send(1, SendOp::FetchAdd { remote, add: 1 }, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    assert_eq!(pair.nodes[A].read(0, 8), 10u64.to_le_bytes());
    assert_eq!(pair.nodes[B].read(0, 8), 11u64.to_le_bytes());
    assert_eq!(pair.nodes[B].qp.counters().duplicate_request, 2);
}

#[test]
fn a_read_is_not_replayed_from_a_deregistered_region() {
    let mut pair = Pair::new().filtered(|sent| {
        if sent.from == B {
            Fate::Drop
        } else {
            Fate::Deliver
        }
    });
    let key = pair.nodes[B].register(0, 1000, ALL_RIGHTS, Pd(7));
    let remote = Remote {
        addr: IOVA,
        rkey: key,
    };
    let sge = pair.nodes[A].sge(0, 1000);
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.drive_until(1_000_000);
    let answers = pair.counts[B];
    assert_eq!(answers, 4);
    pair.nodes[B].mem.deregister(key).unwrap();
    pair.drive();
    pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
    assert_eq!(pair.counts[B], answers, "not a byte more is sent");
    pair.expect_states(QpState::Err, QpState::Rts);
}

/// The network repeats a READ request, which arrives in one batch with the next READ. Answering the
/// first one again took the only place there was, and the next READ was refused as one too many.
#[test]
fn a_stray_read_does_not_take_the_place_of_the_next() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        max_rd_atomic: 1,
        max_dest_rd_atomic: 1,
        ..*attr
    });
    let remote = pair.nodes[B].remote(0);
    let sge = pair.nodes[A].sge(0, 100);
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    let mut read = pair.sent[0].headers;
    pair.inject_built(B, &read, &[]);
    read.bth.psn = read.bth.psn.next();
    pair.inject_built(B, &read, &[]);
    pair.drive();
    pair.expect_states(QpState::Rts, QpState::Rts);
    assert_eq!(pair.opcodes(B), [Opcode::ReadResponseOnly; 2]);
}

#[test]
fn duplicates_change_nothing() {
    let mut pair = Pair::new();
    let recv = pair.nodes[B].sge(5000, 100);
    pair.nodes[B].post_recv(1, &[recv]);
    pair.nodes[B].post_recv(2, &[recv]);
    let sge = pair.nodes[A].sge(0, 100);
    pair.nodes[A].post_send(1, write_op(pair.nodes[B].remote(0)), &[sge]);
    pair.nodes[A].post_send(2, SendOp::Send { imm: None }, &[sge]);
    pair.drive();
    let first = pair.sent[0].headers;
    let second = pair.sent[1].headers;
    pair.nodes[B].write(0, &pattern(9, 100));
    pair.nodes[B].write(5000, &pattern(9, 100));
    pair.inject_built(B, &first, &pattern(1, 100));
    pair.inject_built(B, &second, &pattern(1, 100));
    pair.drive();
    assert_eq!(pair.nodes[B].read(0, 100), pattern(9, 100));
    assert_eq!(pair.nodes[B].read(5000, 100), pattern(9, 100));
    pair.expect_receives(&[(1, SUCCESS)]);
    let last = pair.sent.last().unwrap();
    assert_eq!(
        (last.opcode(), last.psn()),
        (Opcode::Acknowledge, FIRST_PSN + 1),
        "the newest PSN"
    );
    assert_eq!(last.headers.aeth.unwrap().msn, 2);
}

#[test]
fn ghost_and_stale_answers_mean_nothing() {
    let mut pair = Pair::new().filtered(|sent| {
        if sent.from == A {
            Fate::Drop
        } else {
            Fate::Deliver
        }
    });
    let sge = pair.nodes[A].sge(0, 8);
    pair.nodes[A].post_send(1, write_op(pair.nodes[B].remote(0)), &[sge]);
    pair.drive_until(10_000);
    use crate::wire::NakCode;
    for psn in [
        FIRST_PSN.prev(),
        FIRST_PSN + 1,
        FIRST_PSN + 1000,
        FIRST_PSN + (1 << 23),
    ] {
        for syndrome in [
            Syndrome::ACK,
            Syndrome::Rnr { timer: 1 },
            Syndrome::Nak(NakCode::PsnSequence),
            Syndrome::Nak(NakCode::RemoteAccess),
        ] {
            let mut headers = Headers::new(Opcode::Acknowledge, Qpn::new(0x11), psn);
            headers.aeth = Some(Aeth { syndrome, msn: 0 });
            pair.inject_built(A, &headers, &[]);
        }
    }
    let mut reserved = Headers::new(Opcode::Acknowledge, Qpn::new(0x11), FIRST_PSN);
    reserved.aeth = Some(Aeth {
        syndrome: Syndrome::Reserved(0x45),
        msn: 0,
    });
    pair.inject_built(A, &reserved, &[]);
    pair.drive_until(20_000);
    pair.expect_sends(&[]);
    pair.expect_states(QpState::Rts, QpState::Rts);
    assert_eq!(pair.nodes[A].qp.counters().dropped_pkts, 17);
}

/// Up to 2^23 - 1 ahead a packet is early, from there on it is old.
#[test]
fn half_the_sequence_space_separates_early_from_old() {
    for (ahead, is_early) in [
        (1, true),
        ((1 << 23) - 1, true),
        (1 << 23, false),
        (0xff_ffff, false),
    ] {
        let mut pair = Pair::new();
        let mut headers = Headers::new(Opcode::WriteOnly, Qpn::new(0x12), FIRST_PSN + ahead);
        let rkey = pair.nodes[B].key.0;
        headers.reth = Some(crate::wire::Reth {
            va: IOVA,
            rkey,
            dma_len: 8,
        });
        pair.inject_built(B, &headers, &[1; 8]);
        pair.drive();
        assert_eq!(pair.nodes[B].read(0, 8), [0; 8], "executed neither way");
        let sequence_nak = Syndrome::Nak(crate::wire::NakCode::PsnSequence);
        let expected = if is_early {
            (FIRST_PSN, sequence_nak)
        } else {
            (FIRST_PSN.prev(), Syndrome::ACK)
        };
        assert_eq!(
            (pair.sent[0].psn(), pair.sent[0].syndrome().unwrap()),
            expected
        );
    }
}

#[test]
fn marks_that_routers_and_other_stacks_set_have_no_effect() {
    let mut pair = Pair::new();
    let mut headers = Headers::new(Opcode::WriteOnly, Qpn::new(0x12), FIRST_PSN);
    let rkey = pair.nodes[B].key.0;
    headers.reth = Some(crate::wire::Reth {
        va: IOVA,
        rkey,
        dma_len: 8,
    });
    headers.bth.is_migrated = !headers.bth.is_migrated;
    headers.bth.fecn = true;
    headers.bth.becn = true;
    headers.bth.pkey = 0x7fff;
    headers.bth.ack_req = true;
    pair.inject_built(B, &headers, &[1; 8]);
    pair.drive();
    assert_eq!(pair.nodes[B].read(0, 8), [1; 8]);
    assert_eq!(pair.sent[0].syndrome(), Some(Syndrome::ACK));
}
