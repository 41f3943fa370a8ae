//! Queue pair states: every transition, what may be posted and heard in each, draining, reuse.

use super::*;

const STATES: [QpState; 6] = [
    QpState::Reset,
    QpState::Init,
    QpState::Rtr,
    QpState::Rts,
    QpState::Sqd,
    QpState::Err,
];

/// A queue pair moved to `state` by the shortest way.
fn qp_in(state: QpState) -> Qp {
    let mut qp = Qp::new(Qpn::new(0x11), config());
    let attr = attr(A, Mtu::Mtu1024);
    let path = [
        (QpState::Init, TO_INIT),
        (QpState::Rtr, TO_RTR),
        (QpState::Rts, TO_RTS),
        (QpState::Sqd, AttrMask::STATE),
        (QpState::Err, AttrMask::STATE),
    ];
    for (next, mask) in path {
        if qp.state() != state {
            move_to(&mut qp, &attr, next, mask);
        }
    }
    assert_eq!(qp.state(), state);
    qp
}

fn single_bits() -> impl Iterator<Item = AttrMask> {
    (0..21).map(|bit| AttrMask::from_bits_retain(1 << bit))
}

/// The table as it is accepted: for each pair of states the attributes that must and may be given.
fn accepted_table() -> String {
    let mut table = String::new();
    for from in STATES {
        for to in STATES {
            let Some(required) = required(from, to) else {
                continue;
            };
            let may = single_bits().filter(|bit| {
                !required.contains(*bit) && modify(from, to, required | *bit).is_ok()
            });
            let may = may.fold(AttrMask::empty(), AttrMask::union);
            let must = required - AttrMask::STATE;
            table += &format!("{from:?} -> {to:?} [{}] ({})\n", names(must), names(may));
        }
    }
    table
}

fn names(mask: AttrMask) -> String {
    mask.iter_names()
        .map(|(name, _)| name)
        .collect::<Vec<_>>()
        .join(" ")
}

fn modify(from: QpState, to: QpState, mask: AttrMask) -> Result<(), InvalidTransition> {
    let mut qp = qp_in(from);
    let before = *qp.attr();
    let attr = Attr {
        state: to,
        cur_state: from,
        ..attr(A, Mtu::Mtu1024)
    };
    let result = qp.modify(&attr, mask);
    if result.is_err() {
        assert_eq!(*qp.attr(), before, "a refused modify changes nothing");
    }
    result
}

/// The attributes without which the transition is refused, found by adding what it reports missing.
fn required(from: QpState, to: QpState) -> Option<AttrMask> {
    let mut mask = AttrMask::STATE;
    loop {
        match modify(from, to, mask) {
            Ok(()) => return Some(mask),
            Err(InvalidTransition::Missing { missing, .. }) => mask |= missing,
            Err(InvalidTransition::NoSuchTransition { .. }) => return None,
            Err(other) => panic!("{from:?} -> {to:?}: {other}"),
        }
    }
}

#[test]
fn transitions_and_attributes_are_those_of_the_table() {
    let expected = "\
Reset -> Reset [] ()
Reset -> Init [ACCESS_FLAGS PKEY_INDEX PORT] ()
Reset -> Err [] ()
Init -> Reset [] ()
Init -> Init [] (ACCESS_FLAGS PKEY_INDEX PORT)
Init -> Rtr [AV PATH_MTU RQ_PSN MIN_RNR_TIMER MAX_DEST_RD_ATOMIC DEST_QPN] \
(ACCESS_FLAGS PKEY_INDEX ALT_PATH)
Init -> Err [] ()
Rtr -> Reset [] ()
Rtr -> Rts [TIMEOUT RETRY_CNT RNR_RETRY MAX_QP_RD_ATOMIC SQ_PSN] \
(CUR_STATE ACCESS_FLAGS ALT_PATH MIN_RNR_TIMER PATH_MIG_STATE)
Rtr -> Err [] ()
Rts -> Reset [] ()
Rts -> Rts [] (CUR_STATE ACCESS_FLAGS ALT_PATH MIN_RNR_TIMER PATH_MIG_STATE)
Rts -> Sqd [] (EN_SQD_ASYNC_NOTIFY)
Rts -> Err [] ()
Sqd -> Reset [] ()
Sqd -> Rts [] (CUR_STATE ACCESS_FLAGS ALT_PATH MIN_RNR_TIMER PATH_MIG_STATE)
Sqd -> Sqd [] (ACCESS_FLAGS PKEY_INDEX PORT AV TIMEOUT RETRY_CNT RNR_RETRY MAX_QP_RD_ATOMIC \
ALT_PATH MIN_RNR_TIMER MAX_DEST_RD_ATOMIC PATH_MIG_STATE)
Sqd -> Err [] ()
Err -> Reset [] ()
Err -> Err [] ()
";
    assert_eq!(accepted_table(), expected);
}

#[test]
fn each_required_attribute_is_missed_alone() {
    for from in STATES {
        for to in STATES {
            let Some(required) = required(from, to) else {
                continue;
            };
            for missing in (required - AttrMask::STATE).iter() {
                let error = InvalidTransition::Missing { from, to, missing };
                assert_eq!(modify(from, to, required - missing), Err(error));
            }
        }
    }
}

#[test]
fn values_out_of_range_are_refused() {
    type Change = fn(&mut Attr);
    let wrong: [(AttrMask, QpState, AttrMask, Change); 9] = [
        (AttrMask::PORT, QpState::Reset, TO_INIT, |attr| {
            attr.port = 2
        }),
        (AttrMask::PKEY_INDEX, QpState::Reset, TO_INIT, |attr| {
            attr.pkey_index = 1
        }),
        (AttrMask::MIN_RNR_TIMER, QpState::Init, TO_RTR, |attr| {
            attr.min_rnr_timer = 32
        }),
        (
            AttrMask::MAX_DEST_RD_ATOMIC,
            QpState::Init,
            TO_RTR,
            |attr| attr.max_dest_rd_atomic = 129,
        ),
        (AttrMask::TIMEOUT, QpState::Rtr, TO_RTS, |attr| {
            attr.timeout = 32
        }),
        (AttrMask::RETRY_CNT, QpState::Rtr, TO_RTS, |attr| {
            attr.retry_cnt = 8
        }),
        (AttrMask::RNR_RETRY, QpState::Rtr, TO_RTS, |attr| {
            attr.rnr_retry = 8
        }),
        (AttrMask::MAX_QP_RD_ATOMIC, QpState::Rtr, TO_RTS, |attr| {
            attr.max_rd_atomic = 129
        }),
        (
            AttrMask::MIN_RNR_TIMER,
            QpState::Rts,
            AttrMask::MIN_RNR_TIMER,
            |attr| {
                attr.min_rnr_timer = 255;
            },
        ),
    ];
    for (attribute, from, mask, change) in wrong {
        let mut qp = qp_in(from);
        let next = STATES[STATES.iter().position(|state| *state == from).unwrap() + 1];
        let mut attr = Attr {
            state: next,
            ..attr(A, Mtu::Mtu1024)
        };
        change(&mut attr);
        assert_eq!(
            qp.modify(&attr, mask),
            Err(InvalidTransition::OutOfRange(attribute))
        );
        assert_eq!(qp.state(), from);
    }
}

#[test]
fn a_wrong_current_state_is_refused() {
    let mut qp = qp_in(QpState::Rts);
    let attr = Attr {
        cur_state: QpState::Rtr,
        ..attr(A, Mtu::Mtu1024)
    };
    let error = InvalidTransition::WrongCurrentState {
        actual: QpState::Rts,
        claimed: QpState::Rtr,
    };
    assert_eq!(qp.modify(&attr, AttrMask::CUR_STATE), Err(error));
}

#[test]
fn attributes_change_only_when_given() {
    let mut qp = qp_in(QpState::Rts);
    let before = *qp.attr();
    let access = AccessFlags::REMOTE_READ;
    let attr = Attr {
        access,
        min_rnr_timer: 30,
        ..Attr::default()
    };
    qp.modify(&attr, AttrMask::ACCESS_FLAGS).unwrap();
    assert_eq!(*qp.attr(), Attr { access, ..before });
}

#[test]
fn posting_depends_on_the_state() {
    for state in STATES {
        let mut qp = qp_in(state);
        let remote = Remote {
            addr: 0,
            rkey: Key(0),
        };
        let data = Data::Gather(&[]);
        let wr = SendWr {
            wr_id: 1,
            op: write_op(remote),
            data,
            flags: SendFlags::empty(),
        };
        let takes_sends = matches!(state, QpState::Rts | QpState::Sqd | QpState::Err);
        let refused = Err(PostError::InvalidState);
        let expected = if takes_sends { Ok(()) } else { refused };
        assert_eq!(qp.post_send(&wr), expected, "{state:?}");
        let expected = if state == QpState::Reset {
            refused
        } else {
            Ok(())
        };
        assert_eq!(
            qp.post_recv(&RecvWr {
                wr_id: 1,
                sges: &[]
            }),
            expected,
            "{state:?}"
        );
    }
}

#[test]
fn malformed_requests_are_refused_and_change_nothing() {
    let mut qp = qp_in(QpState::Rts);
    let sge = Sge {
        addr: 0,
        length: 8,
        lkey: Key(0),
    };
    let remote = Remote {
        addr: 8,
        rkey: Key(0),
    };
    let odd = Remote {
        addr: 9,
        rkey: Key(0),
    };
    let add = |remote| SendOp::FetchAdd { remote, add: 1 };
    let long = Sge {
        length: u32::MAX,
        ..sge
    };
    let half = Sge {
        length: 1 << 30,
        ..sge
    };
    let cases = [
        (
            add(odd),
            Data::Gather(&[sge]),
            PostError::BadAtomic { len: 8, addr: 9 },
        ),
        (
            add(remote),
            Data::Gather(&[sge, sge]),
            PostError::BadAtomic { len: 16, addr: 8 },
        ),
        (
            add(remote),
            Data::Inline(&[0; 8]),
            PostError::InlineNotAllowed,
        ),
        (
            SendOp::Read { remote },
            Data::Inline(&[0; 8]),
            PostError::InlineNotAllowed,
        ),
        (
            write_op(remote),
            Data::Inline(&[0; 65]),
            PostError::InlineTooLong { len: 65, max: 64 },
        ),
        (
            write_op(remote),
            Data::Gather(&[sge; 5]),
            PostError::TooManySge { count: 5, max: 4 },
        ),
        (
            write_op(remote),
            Data::Gather(&[long]),
            PostError::MessageTooLong {
                len: u32::MAX.into(),
            },
        ),
        (
            write_op(remote),
            Data::Gather(&[half, half, sge]),
            PostError::MessageTooLong {
                len: MAX_MESSAGE_LEN + 8,
            },
        ),
    ];
    for (op, data, error) in cases {
        let wr = SendWr {
            wr_id: 1,
            op,
            data,
            flags: SendFlags::SIGNALED,
        };
        assert_eq!(qp.post_send(&wr), Err(error));
    }
    let too_many = RecvWr {
        wr_id: 1,
        sges: &[sge; 5],
    };
    assert_eq!(
        qp.post_recv(&too_many),
        Err(PostError::TooManySge { count: 5, max: 4 })
    );
    qp.fail(AsyncEvent::QpFatal);
    assert_eq!(qp.poll_completion(), None, "nothing had been queued");
    assert_eq!(qp.poll_event(), Some(AsyncEvent::QpFatal));
}

#[test]
fn queues_take_what_they_were_made_for() {
    let small = QpConfig {
        max_send_wr: 5,
        max_recv_wr: 3,
        ..config()
    };
    let mut pair = Pair::with(small, |_, attr| *attr);
    let op = write_op(pair.nodes[B].remote(0));
    let data = Data::Gather(&[]);
    let wr = SendWr {
        wr_id: 1,
        op,
        data,
        flags: SendFlags::SIGNALED,
    };
    let recv = RecvWr {
        wr_id: 1,
        sges: &[],
    };
    for _ in 0..3 {
        for _ in 0..5 {
            pair.nodes[A].qp.post_send(&wr).unwrap();
        }
        assert_eq!(pair.nodes[A].qp.post_send(&wr), Err(PostError::Full));
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS); 5]);
    }
    for _ in 0..3 {
        pair.nodes[A].qp.post_recv(&recv).unwrap();
    }
    assert_eq!(pair.nodes[A].qp.post_recv(&recv), Err(PostError::Full));
}

#[test]
fn reads_need_max_rd_atomic() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        max_rd_atomic: 0,
        ..*attr
    });
    let op = SendOp::Read {
        remote: pair.nodes[B].remote(0),
    };
    let wr = SendWr {
        wr_id: 1,
        op,
        data: Data::Gather(&[]),
        flags: SendFlags::SIGNALED,
    };
    assert_eq!(
        pair.nodes[A].qp.post_send(&wr),
        Err(PostError::RdAtomicDisabled)
    );
}

#[test]
fn rtr_answers_and_reports_the_first_packet() {
    let mut pair = Pair::new();
    let mut qp = Qp::new(Qpn::new(0x12), config());
    move_to(&mut qp, &attr(B, Mtu::Mtu256), QpState::Init, TO_INIT);
    move_to(&mut qp, &attr(B, Mtu::Mtu256), QpState::Rtr, TO_RTR);
    pair.nodes[B].qp = qp;
    let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, 8));
    pair.nodes[A].post_send(1, op, &[sge]);
    pair.nodes[A].post_send(2, op, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
    assert_eq!(pair.nodes[B].events, [AsyncEvent::CommEst]);
    let mut ghost = Headers::new(Opcode::Acknowledge, Qpn::new(0x12), Psn::new(0x1000));
    ghost.aeth = Some(Aeth {
        syndrome: Syndrome::ACK,
        msn: 0,
    });
    pair.inject_built(B, &ghost, &[]);
    assert_eq!(
        pair.nodes[B].qp.counters().dropped_pkts,
        1,
        "no responses in RTR"
    );
}

#[test]
fn reset_init_and_err_hear_nothing() {
    for state in [QpState::Reset, QpState::Init, QpState::Err] {
        let mut pair = Pair::new();
        pair.nodes[B].qp = qp_in(state);
        let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, 8));
        pair.nodes[A].write(0, &[1; 8]);
        pair.nodes[A].post_send(1, op, &[sge]);
        pair.drive();
        pair.expect_sends(&[(1, WcStatus::RetryExcErr)]);
        assert_eq!(pair.counts[B], 0);
        assert_eq!(pair.nodes[B].read(0, 8), [0; 8]);
        assert_eq!(pair.nodes[B].qp.state(), state);
    }
}

#[test]
fn draining_finishes_what_was_begun_and_holds_the_rest() {
    let mut pair = Pair::new();
    let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, 700));
    pair.nodes[A].post_send(1, op, &[sge]);
    pair.nodes[A].post_send(2, op, &[sge]);
    pair.transmit();
    let sqd = Attr {
        state: QpState::Sqd,
        en_sqd_async_notify: true,
        ..Attr::default()
    };
    let mask = AttrMask::STATE | AttrMask::EN_SQD_ASYNC_NOTIFY;
    pair.nodes[A].qp.modify(&sqd, mask).unwrap();
    pair.nodes[A].post_send(3, op, &[sge]);
    assert!(pair.nodes[A].qp.is_draining());
    assert_eq!(pair.nodes[A].events, []);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
    assert_eq!(pair.nodes[A].events, [AsyncEvent::SqDrained]);
    assert!(!pair.nodes[A].qp.is_draining());
    let rts = Attr {
        state: QpState::Rts,
        ..Attr::default()
    };
    pair.nodes[A].qp.modify(&rts, AttrMask::STATE).unwrap();
    pair.drive();
    pair.expect_sends(&[(3, SUCCESS)]);
}

#[test]
fn draining_an_idle_queue_is_reported_at_once() {
    let mut pair = Pair::new();
    let sqd = Attr {
        state: QpState::Sqd,
        en_sqd_async_notify: true,
        ..Attr::default()
    };
    let mask = AttrMask::STATE | AttrMask::EN_SQD_ASYNC_NOTIFY;
    pair.nodes[A].qp.modify(&sqd, mask).unwrap();
    assert_eq!(pair.nodes[A].qp.poll_event(), Some(AsyncEvent::SqDrained));
    assert_eq!(pair.nodes[A].qp.poll_event(), None);
}

#[test]
fn reset_forgets_everything_without_completions() {
    let mut pair = Pair::new().filtered(|_| Fate::Drop);
    let (op, sge) = (write_op(pair.nodes[B].remote(0)), pair.nodes[A].sge(0, 8));
    pair.nodes[A].post_send(1, op, &[sge]);
    pair.nodes[A].post_recv(1, &[sge]);
    pair.drive_until(1_000);
    let reset = Attr {
        state: QpState::Reset,
        ..Attr::default()
    };
    pair.nodes[A].qp.modify(&reset, AttrMask::STATE).unwrap();
    pair.drive();
    assert_eq!(pair.nodes[A].completions, []);
    assert_eq!(pair.nodes[A].qp.poll_timeout(), None);
    assert_eq!(*pair.nodes[A].qp.attr(), Attr::default());
}

/// A connection is broken, reset and made again while packets of its old life still arrive.
#[test]
fn a_second_life_ignores_the_first() {
    let mut pair = Pair::new();
    let bad = Remote {
        addr: 0,
        rkey: Key(9),
    };
    let sge = pair.nodes[A].sge(0, 700);
    pair.nodes[A].post_send(1, write_op(bad), &[sge]);
    pair.drive();
    pair.expect_states(QpState::Err, QpState::Err);
    pair.nodes[A].completions.clear();
    let reset = Attr {
        state: QpState::Reset,
        ..Attr::default()
    };
    for (index, node) in pair.nodes.iter_mut().enumerate() {
        node.qp.modify(&reset, AttrMask::STATE).unwrap();
        let fresh = Attr {
            sq_psn: Psn::new([0x50_0000, 0x60_0000][index]),
            rq_psn: Psn::new([0x60_0000, 0x50_0000][index]),
            ..attr(index, Mtu::Mtu256)
        };
        to_rts(&mut node.qp, &fresh);
    }
    let old = pair.sent.clone();
    for sent in old {
        pair.inject_built(1 - sent.from, &sent.headers, &pattern(9, sent.payload_len));
    }
    pair.nodes[A].write(0, &pattern(1, 700));
    let op = write_op(pair.nodes[B].remote(0));
    pair.nodes[A].post_send(2, op, &[sge]);
    pair.drive();
    pair.expect_sends(&[(2, SUCCESS)]);
    assert_eq!(pair.nodes[B].read(0, 700), pattern(1, 700));
}
