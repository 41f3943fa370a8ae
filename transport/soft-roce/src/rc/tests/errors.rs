//! Who sees what when something is wrong, and what happens to everything else that was posted.

use super::*;
use crate::wire::{NakCode, Reth};

const NO_EVENT: &[AsyncEvent] = &[];

/// Asserts the last packet that B sent.
#[track_caller]
pub(super) fn expect_nak(pair: &Pair, code: NakCode, psn: Psn) {
    let last = pair
        .sent
        .iter()
        .rfind(|sent| sent.from == B)
        .expect("B answered");
    let answer = (last.syndrome(), last.psn());
    assert_eq!(
        answer,
        (Some(Syndrome::Nak(code)), psn),
        "trace:\n{}",
        pair.trace()
    );
}

/// Posts `op` from A to B, then a WRITE that can only be flushed, and checks what comes of it.
#[track_caller]
pub(super) fn expect_refusal(pair: &mut Pair, op: SendOp, len: usize, code: NakCode) {
    let before = pair.nodes[B].read(0, MEMORY_LEN);
    let sge = pair.nodes[A].sge(0, len);
    let behind = write_op(pair.nodes[B].remote(0));
    pair.nodes[A].write(0, &pattern(1, len));
    pair.nodes[A].post_send(1, op, &[sge]);
    pair.nodes[A].post_send(2, behind, &[sge]);
    pair.nodes[B].post_recv(8, &[]);
    pair.drive();
    let (status, event) = match code {
        NakCode::RemoteAccess => (WcStatus::RemAccessErr, AsyncEvent::QpAccessErr),
        _ => (WcStatus::RemInvReqErr, AsyncEvent::QpReqErr),
    };
    expect_nak(pair, code, FIRST_PSN);
    pair.expect_sends(&[(1, status), (2, FLUSHED)]);
    pair.expect_receives(&[(8, FLUSHED)]);
    pair.expect_states(QpState::Err, QpState::Err);
    assert_eq!(pair.nodes[B].events, [event]);
    assert_eq!(pair.nodes[A].events, NO_EVENT);
    assert_eq!(
        pair.nodes[B].read(0, MEMORY_LEN),
        before,
        "nothing was executed"
    );
}

pub(super) fn ops(remote: Remote) -> [SendOp; 4] {
    [
        write_op(remote),
        SendOp::Read { remote },
        SendOp::FetchAdd { remote, add: 1 },
        SendOp::CompareSwap {
            remote,
            compare: 0,
            swap: 1,
        },
    ]
}

#[test]
fn unknown_stale_and_foreign_keys_are_access_errors() {
    for index in 0..4 {
        let mut pair = Pair::new();
        let op = ops(Remote {
            addr: IOVA,
            rkey: Key(0xdead_beef),
        })[index];
        expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);

        let mut pair = Pair::new();
        let stale = pair.nodes[B].register(0, 4096, ALL_RIGHTS, Pd(7));
        pair.nodes[B].mem.deregister(stale).unwrap();
        pair.nodes[B].register(0, 4096, ALL_RIGHTS, Pd(7));
        let op = ops(Remote {
            addr: IOVA,
            rkey: stale,
        })[index];
        expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);

        let mut pair = Pair::new();
        let rkey = pair.nodes[B].register(0, 4096, ALL_RIGHTS, Pd(8));
        let op = ops(Remote { addr: IOVA, rkey })[index];
        expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);
    }
}

#[test]
fn bounds_hold_at_both_ends_and_across_the_wrap() {
    let end = IOVA + 4096;
    for addr in [
        IOVA + 800,
        end - 7,
        end,
        end + 1,
        end + (1 << 40),
        u64::MAX - 7,
        0,
    ] {
        for index in 0..4 {
            let mut pair = Pair::new();
            let rkey = pair.nodes[B].register(1024, 3072, ALL_RIGHTS, Pd(7));
            // Atomics only go to multiples of 8.
            let addr = if index < 2 { addr } else { addr & !7 };
            if index >= 2 && addr == end - 8 {
                continue;
            }
            let op = ops(Remote { addr, rkey })[index];
            expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);
        }
    }
}

#[test]
fn a_long_write_is_refused_before_its_first_byte() {
    let mut pair = Pair::new();
    let rkey = pair.nodes[B].register(0, 999, ALL_RIGHTS, Pd(7));
    let op = write_op(Remote { addr: IOVA, rkey });
    expect_refusal(&mut pair, op, 1000, NakCode::RemoteAccess);
}

#[test]
fn each_right_is_needed_on_the_region() {
    let rights = [
        AccessFlags::REMOTE_WRITE,
        AccessFlags::REMOTE_READ,
        AccessFlags::REMOTE_ATOMIC,
    ];
    for (index, right) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
        let mut pair = Pair::new();
        let rkey = pair.nodes[B].register(0, 4096, ALL_RIGHTS - rights[right], Pd(7));
        let op = ops(Remote { addr: IOVA, rkey })[index];
        expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);
    }
}

#[test]
fn each_right_is_needed_on_the_queue_pair() {
    let rights = [
        AccessFlags::REMOTE_WRITE,
        AccessFlags::REMOTE_READ,
        AccessFlags::REMOTE_ATOMIC,
    ];
    for (index, right) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
        let access = ALL_RIGHTS - rights[right];
        let mut pair = Pair::with(config(), |_, attr| Attr { access, ..*attr });
        let op = ops(pair.nodes[B].remote(0))[index];
        expect_refusal(&mut pair, op, 8, NakCode::InvalidRequest);
    }
}

#[test]
fn a_responder_without_resources_refuses_reads_and_atomics() {
    for index in 1..4 {
        let mut pair = Pair::with(config(), |_, attr| Attr {
            max_dest_rd_atomic: 0,
            ..*attr
        });
        let op = ops(pair.nodes[B].remote(0))[index];
        expect_refusal(&mut pair, op, 8, NakCode::InvalidRequest);
    }
}

#[test]
fn more_reads_than_agreed_are_refused() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        max_dest_rd_atomic: 1,
        ..*attr
    });
    let (remote, sge) = (pair.nodes[B].remote(0), pair.nodes[A].sge(0, 8));
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.nodes[A].post_send(2, SendOp::Read { remote }, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS), (2, WcStatus::RemInvReqErr)]);
}

#[test]
fn an_atomic_needs_an_aligned_word() {
    let mut pair = Pair::new();
    let base = pair.nodes[B]
        .memory
        .as_mut_ptr()
        .cast::<u8>()
        .wrapping_add(4);
    let region = Region {
        pd: Pd(7),
        base,
        iova: 0x8000,
        len: 64,
        access: ALL_RIGHTS,
    };
    // SAFETY: inside the node's memory; see `Node::new`.
    let rkey = unsafe { pair.nodes[B].mem.register(region) }.unwrap();
    let op = SendOp::FetchAdd {
        remote: Remote { addr: 0x8000, rkey },
        add: 1,
    };
    expect_refusal(&mut pair, op, 8, NakCode::InvalidRequest);
}

#[test]
fn a_send_too_long_for_its_receive_fails_on_both_sides() {
    for len in [101, 256, 700] {
        let mut pair = Pair::new();
        let small = pair.nodes[B].sge(0, 100);
        pair.nodes[B].post_recv(1, &[small]);
        pair.nodes[B].post_recv(2, &[small]);
        let sge = pair.nodes[A].sge(0, len);
        pair.nodes[A].post_send(1, SendOp::Send { imm: None }, &[sge]);
        pair.drive();
        pair.expect_sends(&[(1, WcStatus::RemInvReqErr)]);
        pair.expect_receives(&[(1, WcStatus::LocLenErr), (2, FLUSHED)]);
        pair.expect_states(QpState::Err, QpState::Err);
    }
}

#[test]
fn a_receive_into_bad_memory_fails_on_both_sides() {
    let mut pair = Pair::new();
    let mut sge = pair.nodes[B].sge(0, 1000);
    sge.lkey = pair.nodes[B].register(0, 1000, AccessFlags::REMOTE_READ, Pd(7));
    pair.nodes[B].post_recv(1, &[sge]);
    let sge = pair.nodes[A].sge(0, 700);
    pair.nodes[A].post_send(1, SendOp::Send { imm: None }, &[sge]);
    pair.drive();
    expect_nak(&pair, NakCode::RemoteOperational, FIRST_PSN);
    pair.expect_sends(&[(1, WcStatus::RemOpErr)]);
    pair.expect_receives(&[(1, WcStatus::LocProtErr)]);
    pair.expect_states(QpState::Err, QpState::Err);
}

#[test]
fn a_bad_source_fails_alone_after_what_was_before_it() {
    let mut pair = Pair::new();
    let good = pair.nodes[A].sge(0, 700);
    let bad = [
        Sge {
            lkey: Key(1),
            ..good
        },
        Sge {
            addr: IOVA + MEMORY_LEN as u64 - 699,
            ..good
        },
        Sge {
            lkey: pair.nodes[A].register(0, 4096, ALL_RIGHTS, Pd(1)),
            ..good
        },
    ];
    for bad in bad {
        let mut pair = Pair::new();
        let op = write_op(pair.nodes[B].remote(0));
        pair.nodes[A].post_send(1, op, &[good]);
        pair.nodes[A].post_send(2, op, &[bad]);
        pair.nodes[A].post_send(3, op, &[good]);
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS), (2, WcStatus::LocProtErr), (3, FLUSHED)]);
        pair.expect_states(QpState::Err, QpState::Rts);
    }
}

#[test]
fn a_read_into_bad_memory_fails_locally() {
    for index in 1..4 {
        let mut pair = Pair::new();
        let op = ops(pair.nodes[B].remote(0))[index];
        let mut sge = pair.nodes[A].sge(0, 8);
        sge.lkey = pair.nodes[A].register(0, 4096, AccessFlags::REMOTE_READ, Pd(7));
        pair.nodes[A].post_send(1, op, &[sge]);
        pair.drive();
        pair.expect_sends(&[(1, WcStatus::LocProtErr)]);
        pair.expect_states(QpState::Err, QpState::Rts);
    }
}

/// A's answers are forged: `op` is posted, its packets are lost, and `forge` answers.
fn forge(op: fn(Remote) -> SendOp, forge: impl Fn(&mut Headers) -> usize) -> WcStatus {
    let mut pair = Pair::new().filtered(|_| Fate::Drop);
    let op = op(pair.nodes[B].remote(0));
    let sge = pair.nodes[A].sge(0, if op.is_atomic() { 8 } else { 300 });
    pair.nodes[A].post_send(1, op, &[sge]);
    pair.drive_until(10_000);
    let mut headers = Headers::new(Opcode::ReadResponseFirst, Qpn::new(0x11), FIRST_PSN);
    headers.aeth = Some(Aeth {
        syndrome: Syndrome::ACK,
        msn: 1,
    });
    let len = forge(&mut headers);
    pair.inject_built(A, &headers, &pattern(1, len));
    pair.drive_until(20_000);
    pair.expect_states(QpState::Err, QpState::Rts);
    let [(_, wc)] = pair.nodes[A].completions[..] else {
        panic!("one completion")
    };
    wc.status
}

#[test]
fn responses_of_the_wrong_length_or_kind_are_refused() {
    let read: fn(Remote) -> SendOp = |remote| SendOp::Read { remote };
    assert_eq!(forge(read, |_| 255), WcStatus::LocLenErr, "a short First");
    let only = |headers: &mut Headers| {
        headers.bth.opcode = Opcode::ReadResponseOnly;
        256
    };
    assert_eq!(
        forge(read, only),
        WcStatus::LocLenErr,
        "the end comes too soon"
    );
    let atomic_ack = |headers: &mut Headers| {
        headers.bth.opcode = Opcode::AtomicAcknowledge;
        headers.atomic_ack = Some(1);
        0
    };
    assert_eq!(
        forge(read, atomic_ack),
        WcStatus::BadRespErr,
        "an atomic's answer to a READ"
    );
    assert_eq!(
        forge(write_op, |_| 256),
        WcStatus::BadRespErr,
        "a READ response to a WRITE"
    );
    let add: fn(Remote) -> SendOp = |remote| SendOp::FetchAdd { remote, add: 1 };
    assert_eq!(
        forge(add, |_| 256),
        WcStatus::BadRespErr,
        "a READ response to an atomic"
    );
}

/// Hands B, which expects `FIRST_PSN`, the packets given, and expects the last to be refused.
#[track_caller]
fn expect_invalid(packets: &[(Headers, usize)]) {
    let mut pair = Pair::new();
    let sge = pair.nodes[B].sge(0, 4096);
    pair.nodes[B].post_recv(1, &[sge]);
    for (index, (headers, len)) in packets.iter().enumerate() {
        let mut headers = *headers;
        headers.bth.psn = FIRST_PSN + u32::try_from(index).unwrap();
        if let Some(reth) = &mut headers.reth {
            reth.rkey = pair.nodes[B].key.0;
            reth.va = IOVA;
        }
        pair.expect_states(QpState::Rts, QpState::Rts);
        pair.inject_built(B, &headers, &pattern(1, *len));
    }
    pair.drive();
    let last = FIRST_PSN + u32::try_from(packets.len() - 1).unwrap();
    expect_nak(&pair, NakCode::InvalidRequest, last);
    pair.expect_states(QpState::Rts, QpState::Err);
    pair.expect_receives(&[(1, FLUSHED)]);
    assert_eq!(pair.nodes[B].events, [AsyncEvent::QpReqErr]);
}

fn packet(opcode: Opcode, dma_len: u32) -> Headers {
    let mut headers = Headers::new(opcode, Qpn::new(0x12), FIRST_PSN);
    let has = opcode.info().headers;
    headers.reth = has.contains(crate::wire::ExtHeaders::RETH).then_some(Reth {
        va: 0,
        rkey: 0,
        dma_len,
    });
    headers.imm = has.contains(crate::wire::ExtHeaders::IMM).then_some([0; 4]);
    headers.ieth = has.contains(crate::wire::ExtHeaders::IETH).then_some(0);
    headers
}

#[test]
fn packets_out_of_their_message_s_order_are_invalid() {
    use Opcode::*;
    for alone in [
        SendMiddle,
        SendLast,
        SendLastImm,
        WriteMiddle,
        WriteLast,
        WriteLastImm,
    ] {
        expect_invalid(&[(packet(alone, 0), 256)]);
    }
    for inside in [SendFirst, SendOnly, WriteFirst, WriteMiddle, WriteLast] {
        expect_invalid(&[(packet(SendFirst, 0), 256), (packet(inside, 300), 256)]);
    }
    for inside in [WriteFirst, WriteOnly, SendMiddle, SendLast] {
        expect_invalid(&[(packet(WriteFirst, 600), 256), (packet(inside, 256), 256)]);
    }
    expect_invalid(&[(packet(WriteFirst, 600), 256), (packet(ReadRequest, 8), 0)]);
}

#[test]
fn packets_of_the_wrong_length_are_invalid() {
    use Opcode::*;
    expect_invalid(&[(packet(SendFirst, 0), 255)]);
    expect_invalid(&[(packet(SendFirst, 0), 257)]);
    expect_invalid(&[(packet(SendOnly, 0), 257)]);
    expect_invalid(&[(packet(WriteOnly, 256), 255)]);
    expect_invalid(&[(packet(WriteOnly, 8), 12)]);
    expect_invalid(&[(packet(WriteFirst, 256), 256)]);
    expect_invalid(&[(packet(WriteFirst, 300), 255)]);
    expect_invalid(&[(packet(WriteFirst, 300), 256), (packet(WriteLast, 0), 0)]);
    expect_invalid(&[(packet(WriteFirst, 300), 256), (packet(WriteLast, 0), 43)]);
    expect_invalid(&[(packet(WriteFirst, 300), 256), (packet(WriteLast, 0), 45)]);
    expect_invalid(&[
        (packet(WriteFirst, 512), 256),
        (packet(WriteMiddle, 0), 256),
    ]);
    expect_invalid(&[(packet(ReadRequest, 8), 4)]);
    expect_invalid(&[(packet(WriteFirst, (1 << 31) + 1), 256)]);
    expect_invalid(&[(packet(ReadRequest, (1 << 31) + 1), 0)]);
}

/// 2^31 bytes are a legal message; what is wrong here is the range.
#[test]
fn the_longest_message_is_legal() {
    for (opcode, len) in [(Opcode::WriteFirst, 256), (Opcode::ReadRequest, 0)] {
        let mut pair = Pair::new();
        let mut headers = packet(opcode, 1 << 31);
        headers.reth = headers.reth.map(|reth| Reth {
            rkey: pair.nodes[B].key.0,
            va: IOVA,
            ..reth
        });
        pair.inject_built(B, &headers, &pattern(1, len));
        pair.drive();
        expect_nak(&pair, NakCode::RemoteAccess, FIRST_PSN);
    }
}

#[test]
fn what_does_not_belong_to_the_connection_is_dropped() {
    let mut pair = Pair::new();
    let headers = packet(Opcode::SendOnly, 0);
    let mut tx = TxBuf::new(SocketAddr::new(ADDRESSES[A], ROCE_PORT));
    tx.push(ADDRESSES[B], &headers, 0, |_| true);
    let packet = tx.packets().next().unwrap().1.to_vec();
    let node = &mut pair.nodes[B];
    let foreign = IpAddr::from([127, 0, 0, 9]);
    node.qp
        .handle_packet(0, foreign, &Packet::parse(&packet).unwrap(), &mut node.mem);
    pair.drive();
    assert_eq!(pair.sent.len(), 0);
    assert_eq!(pair.nodes[B].qp.counters().dropped_pkts, 1);
}

#[test]
fn everything_posted_is_flushed_once_and_in_order() {
    let mut pair = Pair::new().filtered(|_| Fate::Drop);
    let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, 700));
    for wr_id in 0..4 {
        // Unsignalled requests complete too when they do not succeed.
        let data = Data::Gather(&[sge]);
        let wr = SendWr {
            wr_id,
            op,
            data,
            flags: SendFlags::empty(),
        };
        pair.nodes[A].qp.post_send(&wr).unwrap();
        pair.nodes[A].post_recv(100 + wr_id, &[]);
    }
    pair.drive_until(5_000);
    let err = Attr {
        state: QpState::Err,
        ..Attr::default()
    };
    pair.nodes[A].qp.modify(&err, AttrMask::STATE).unwrap();
    pair.nodes[A].post_send(4, op, &[sge]);
    pair.nodes[A].post_recv(104, &[]);
    pair.drive();
    let all = std::mem::take(&mut pair.nodes[A].completions);
    for (queue, base) in [(Queue::Send, 0), (Queue::Recv, 100)] {
        let ended: Vec<(u64, WcStatus)> = all
            .iter()
            .filter(|(of, _)| *of == queue)
            .map(|(_, wc)| (wc.wr_id, wc.status))
            .collect();
        assert_eq!(ended, [0, 1, 2, 3, 4].map(|wr_id| (base + wr_id, FLUSHED)));
    }
    assert!(
        all.iter().all(|(_, wc)| wc.is_solicited),
        "errors wake solicited-only waiters"
    );
}

#[test]
fn successes_before_a_failure_stay_successes() {
    let mut pair = Pair::new();
    let sge = pair.nodes[A].sge(0, 8);
    let good = pair.nodes[B].remote(0);
    let bad = Remote {
        rkey: Key(1),
        ..good
    };
    pair.nodes[A].post_send(1, write_op(good), &[sge]);
    pair.nodes[A].post_send(2, SendOp::Read { remote: good }, &[sge]);
    pair.nodes[A].post_send(3, write_op(good), &[sge]);
    pair.nodes[A].post_send(4, write_op(bad), &[sge]);
    pair.nodes[A].post_send(5, SendOp::Read { remote: good }, &[sge]);
    pair.drive();
    let refused = (4, WcStatus::RemAccessErr);
    pair.expect_sends(&[
        (1, SUCCESS),
        (2, SUCCESS),
        (3, SUCCESS),
        refused,
        (5, FLUSHED),
    ]);
}

#[test]
fn a_message_cut_off_by_an_error_flushes_its_receive() {
    let mut pair = Pair::new().filtered(|sent| {
        if sent.from == A && sent.index == 1 {
            Fate::Drop
        } else {
            Fate::Deliver
        }
    });
    let recv = pair.nodes[B].sge(0, 1000);
    pair.nodes[B].post_recv(1, &[recv]);
    let sge = pair.nodes[A].sge(0, 600);
    pair.nodes[A].post_send(1, SendOp::Send { imm: None }, &[sge]);
    pair.drive_until(LATENCY_NS);
    let err = Attr {
        state: QpState::Err,
        ..Attr::default()
    };
    pair.nodes[B].qp.modify(&err, AttrMask::STATE).unwrap();
    pair.drive();
    pair.expect_receives(&[(1, FLUSHED)]);
    pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
}

#[test]
fn a_key_revoked_between_request_and_response_ends_the_read() {
    let mut pair = Pair::new();
    let rkey = pair.nodes[B].register(0, 1000, ALL_RIGHTS, Pd(7));
    let sge = pair.nodes[A].sge(0, 1000);
    let remote = Remote { addr: IOVA, rkey };
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.transmit();
    pair.now += LATENCY_NS;
    pair.deliver();
    pair.nodes[B].mem.deregister(rkey).unwrap();
    pair.drive();
    assert_eq!(pair.opcodes(B), [Opcode::Acknowledge], "no data leave");
    pair.expect_sends(&[(1, WcStatus::RemAccessErr)]);
    pair.expect_states(QpState::Err, QpState::Err);
    assert_eq!(pair.nodes[B].events, [AsyncEvent::QpAccessErr]);
}
