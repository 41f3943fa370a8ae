//! States, transitions, and what the device says about wrong ones.

use std::time::Duration;

use transport::{
    AccessFlags, AddressVector, AsyncEvent, CompletionQueue, Context, Error, GidEntry, InitAttr,
    Mtu, ProtectionDomain, Psn, QpAttributes, QpCapabilities, QpState, Qpn, QueuePair, ReadyQp,
    Reset, RtrAttr, RtsAttr, SendFlags, Source, State, WcStatus,
};

use crate::differences::{Difference, Maker};
use crate::harness::{ALL, End, IMAGE_LEN, PATIENCE, SIGNALED, open, pair, pattern};

/// A device with what queue pairs need.
struct Bench {
    context: Context,
    pd: ProtectionDomain,
    cq: CompletionQueue,
    port: u8,
    gid: GidEntry,
}

impl Bench {
    fn new() -> Option<Bench> {
        let context = open()?;
        let pd = ProtectionDomain::alloc(&context).unwrap();
        let cq = CompletionQueue::create(&context, 512, None).unwrap();
        let port = context.active_port().unwrap().port_num;
        let gid = context.best_gid(port).unwrap();
        Some(Bench {
            context,
            pd,
            cq,
            port,
            gid,
        })
    }

    fn create(&self) -> QueuePair<Reset> {
        QueuePair::create(&self.pd, &self.cq, &self.cq, &QpCapabilities::default()).unwrap()
    }

    fn init_attr(&self) -> InitAttr {
        InitAttr {
            port: self.port,
            pkey_index: 0,
            access: ALL,
        }
    }

    fn rtr_attr(&self, peer: Qpn, psn: Psn) -> RtrAttr {
        let path = AddressVector {
            port: self.port,
            sgid_index: u8::try_from(self.gid.index).unwrap(),
            dgid: Some(self.gid.gid),
            dlid: self.context.port(self.port).unwrap().lid,
            sl: 0,
            hop_limit: 64,
            traffic_class: 0,
            flow_label: 0,
        };
        RtrAttr {
            path,
            path_mtu: Mtu::Mtu1024,
            dest_qpn: peer,
            rq_psn: psn,
            max_dest_rd_atomic: 4,
            min_rnr_timer: 12,
        }
    }

    fn connect(&self, qp: QueuePair<Reset>, peer: Qpn, psn: Psn) -> ReadyQp {
        let qp = qp.init(&self.init_attr()).unwrap();
        let qp = qp.ready_to_receive(&self.rtr_attr(peer, psn)).unwrap();
        qp.ready_to_send(&rts_attr(psn)).unwrap()
    }
}

fn rts_attr(psn: Psn) -> RtsAttr {
    RtsAttr {
        timeout: 14,
        retry_cnt: 6,
        rnr_retry: 6,
        sq_psn: psn,
        max_rd_atomic: 4,
    }
}

fn psn(value: u32) -> Psn {
    Psn::new(value).unwrap()
}

#[test]
fn each_state_shows() {
    let Some(bench) = Bench::new() else { return };
    let qp = bench.create();
    assert_eq!(qp.query().unwrap().state, QpState::Reset);
    let qp = qp.init(&bench.init_attr()).unwrap();
    let status = qp.query().unwrap();
    assert_eq!((status.state, status.port), (QpState::Init, bench.port));
    let peer = qp.qpn();
    let qp = qp.ready_to_receive(&bench.rtr_attr(peer, psn(77))).unwrap();
    let status = qp.query().unwrap();
    assert_eq!((status.state, status.dest_qpn), (QpState::Rtr, peer));
    assert_eq!((status.rq_psn, status.path_mtu), (77, Some(Mtu::Mtu1024)));
    let mut qp = qp.ready_to_send(&rts_attr(psn(78))).unwrap();
    let status = qp.query().unwrap();
    assert_eq!((status.state, status.sq_psn), (QpState::Rts, 78));
    assert_eq!(
        (status.timeout, status.retry_cnt, status.rnr_retry),
        (14, 6, 6)
    );
    assert_eq!((status.max_rd_atomic, status.max_dest_rd_atomic), (4, 4));
    qp.to_error().unwrap();
    assert_eq!(qp.query().unwrap().state, QpState::Err);
    let qp = qp.reset().unwrap();
    assert_eq!(qp.query().unwrap().state, QpState::Reset);
}

/// Asks for a transition that must be refused with a diagnosis that says `why`, and changes nothing.
fn expect_refused<S: State>(
    qp: &mut QueuePair<S>,
    to: QpState,
    attributes: &QpAttributes,
    why: &str,
) {
    let before = qp.query().unwrap().state;
    let error = qp.modify(to, attributes).expect_err(why);
    let Error::Modify {
        diagnosis, from, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(*from, before);
    assert!(
        diagnosis.to_string().contains(why),
        "{diagnosis}, and not {why}"
    );
    assert_eq!(qp.query().unwrap().state, before);
}

#[test]
fn forbidden_transitions_change_nothing() {
    let Some(bench) = Bench::new() else { return };
    let none = QpAttributes::default();
    let mut qp = bench.create();
    for to in [QpState::Rtr, QpState::Rts, QpState::Sqd] {
        expect_refused(&mut qp, to, &none, "cannot go from RESET");
    }
    let mut qp = qp.init(&bench.init_attr()).unwrap();
    for to in [QpState::Rts, QpState::Sqd] {
        expect_refused(&mut qp, to, &none, "cannot go from INIT");
    }
    let peer = qp.qpn();
    let mut qp = qp.ready_to_receive(&bench.rtr_attr(peer, psn(0))).unwrap();
    for to in [QpState::Init, QpState::Rtr, QpState::Sqd] {
        expect_refused(&mut qp, to, &none, "cannot go from RTR");
    }
    let mut qp = qp.ready_to_send(&rts_attr(psn(0))).unwrap();
    for to in [QpState::Init, QpState::Rtr] {
        expect_refused(&mut qp, to, &none, "cannot go from RTS");
    }
    qp.to_error().unwrap();
    for to in [QpState::Init, QpState::Rtr, QpState::Rts, QpState::Sqd] {
        expect_refused(&mut qp, to, &none, "cannot go from ERR");
    }
}

fn init_attributes(bench: &Bench) -> QpAttributes {
    QpAttributes {
        port: Some(bench.port),
        pkey_index: Some(0),
        access: Some(AccessFlags::empty()),
        ..QpAttributes::default()
    }
}

fn rtr_attributes(bench: &Bench, peer: Qpn) -> QpAttributes {
    let rtr = bench.rtr_attr(peer, psn(0));
    QpAttributes {
        path: Some(rtr.path),
        path_mtu: Some(rtr.path_mtu),
        dest_qpn: Some(peer),
        rq_psn: Some(psn(0)),
        max_dest_rd_atomic: Some(1),
        min_rnr_timer: Some(1),
        ..QpAttributes::default()
    }
}

fn rts_attributes() -> QpAttributes {
    QpAttributes {
        timeout: Some(14),
        retry_cnt: Some(6),
        rnr_retry: Some(6),
        sq_psn: Some(psn(0)),
        max_rd_atomic: Some(1),
        ..QpAttributes::default()
    }
}

/// Attributes as they must be, and ways to spoil them, each with what the diagnosis says.
type Spoilers = [(&'static str, fn(&mut QpAttributes))];

fn expect_each_refused<S: State>(
    qp: &mut QueuePair<S>,
    to: QpState,
    good: &QpAttributes,
    spoilers: &Spoilers,
) {
    for (why, spoil) in spoilers {
        let mut attributes = good.clone();
        spoil(&mut attributes);
        expect_refused(qp, to, &attributes, why);
    }
    qp.modify(to, good).unwrap();
}

#[test]
fn missing_and_surplus_attributes_are_named() {
    let Some(bench) = Bench::new() else { return };
    let mut qp = bench.create();
    let good = init_attributes(&bench);
    expect_each_refused(
        &mut qp,
        QpState::Init,
        &good,
        &[
            ("PORT missing", |a| a.port = None),
            ("PKEY_INDEX missing", |a| a.pkey_index = None),
            ("ACCESS_FLAGS missing", |a| a.access = None),
            ("TIMEOUT not allowed", |a| a.timeout = Some(14)),
            ("PATH_MTU not allowed", |a| a.path_mtu = Some(Mtu::Mtu256)),
        ],
    );
    let good = rtr_attributes(&bench, qp.qpn());
    expect_each_refused(
        &mut qp,
        QpState::Rtr,
        &good,
        &[
            ("AV missing", |a| a.path = None),
            ("PATH_MTU missing", |a| a.path_mtu = None),
            ("DEST_QPN missing", |a| a.dest_qpn = None),
            ("RQ_PSN missing", |a| a.rq_psn = None),
            ("MAX_DEST_RD_ATOMIC missing", |a| {
                a.max_dest_rd_atomic = None
            }),
            ("MIN_RNR_TIMER missing", |a| a.min_rnr_timer = None),
            ("SQ_PSN not allowed", |a| a.sq_psn = Psn::new(1)),
            ("RETRY_CNT not allowed", |a| a.retry_cnt = Some(1)),
        ],
    );
    let good = rts_attributes();
    expect_each_refused(
        &mut qp,
        QpState::Rts,
        &good,
        &[
            ("TIMEOUT missing", |a| a.timeout = None),
            ("RETRY_CNT missing", |a| a.retry_cnt = None),
            ("RNR_RETRY missing", |a| a.rnr_retry = None),
            ("SQ_PSN missing", |a| a.sq_psn = None),
            ("MAX_QP_RD_ATOMIC missing", |a| a.max_rd_atomic = None),
            ("PORT not allowed", |a| a.port = Some(1)),
            ("DEST_QPN not allowed", |a| a.dest_qpn = Qpn::new(5)),
        ],
    );
    let good = QpAttributes {
        access: Some(ALL),
        ..QpAttributes::default()
    };
    expect_each_refused(
        &mut qp,
        QpState::Rts,
        &good,
        &[
            ("TIMEOUT not allowed", |a| a.timeout = Some(10)),
            ("RQ_PSN not allowed", |a| a.rq_psn = Psn::new(1)),
        ],
    );
}

#[test]
fn values_beyond_the_device_are_named() {
    let Some(bench) = Bench::new() else { return };
    let mut qp = bench.create();
    let wrong_port = QpAttributes {
        port: Some(99),
        ..init_attributes(&bench)
    };
    expect_refused(
        &mut qp,
        QpState::Init,
        &wrong_port,
        "the device has ports 1 to",
    );
    let qp = qp.init(&bench.init_attr()).unwrap();
    let peer = qp.qpn();
    let mut qp = qp.ready_to_receive(&bench.rtr_attr(peer, psn(0))).unwrap();
    let limit = bench.context.attr().unwrap().max_qp_init_rd_atom;
    let Some(beyond) = limit.checked_add(1) else {
        return;
    };
    let attributes = QpAttributes {
        max_rd_atomic: Some(beyond),
        ..rts_attributes()
    };
    let why = format!("max_rd_atomic {beyond} exceeds {limit}");
    expect_refused(&mut qp, QpState::Rts, &attributes, &why);
}

#[test]
fn a_failed_transition_gives_the_queue_pair_back() {
    let Some(bench) = Bench::new() else { return };
    let qp = bench.create();
    let qpn = qp.qpn();
    let failed = qp
        .init(&InitAttr {
            port: 99,
            ..bench.init_attr()
        })
        .unwrap_err();
    let qp = failed.value;
    assert_eq!((qp.qpn(), qp.query().unwrap().state), (qpn, QpState::Reset));
    let qp = qp.init(&bench.init_attr()).unwrap();
    let qp = qp.ready_to_receive(&bench.rtr_attr(qpn, psn(0))).unwrap();
    let for_ever = RtsAttr {
        retry_cnt: 7,
        ..rts_attr(psn(0))
    };
    let failed = qp.ready_to_send(&for_ever).unwrap_err();
    assert!(
        matches!(
            *failed.error,
            Error::Parameter {
                name: "retry_cnt",
                ..
            }
        ),
        "{failed}"
    );
    failed.value.ready_to_send(&rts_attr(psn(0))).unwrap();
}

#[test]
fn capabilities_beyond_the_device_are_named() {
    let Some(bench) = Bench::new() else { return };
    let limit = bench.context.attr().unwrap().max_sge;
    let greedy = QpCapabilities {
        max_send_sge: limit + 1,
        ..QpCapabilities::default()
    };
    let error = QueuePair::create(&bench.pd, &bench.cq, &bench.cq, &greedy).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("max_send_sge {} exceeds", limit + 1)),
        "{text}"
    );
}

#[test]
fn sequence_numbers_wrap() {
    let Some(bench) = Bench::new() else { return };
    let image = transport::Mapping::anonymous(IMAGE_LEN).unwrap();
    let region = bench.pd.register(&image, 0..IMAGE_LEN, ALL, None).unwrap();
    let (near, far) = (bench.create(), bench.create());
    let (near_qpn, far_qpn) = (near.qpn(), far.qpn());
    let mut near = bench.connect(near, far_qpn, psn(0x00ff_fffe));
    let _far = bench.connect(far, near_qpn, psn(0x00ff_fffe));
    let bytes = pattern(1, 10_000);
    let mut source = bench.pd.alloc_local(bytes.len()).unwrap();
    source.as_mut_slice().copy_from_slice(&bytes);
    let into = bench.pd.alloc_local(bytes.len()).unwrap();
    let mut chain = near.start_send();
    chain
        .write(
            1,
            Source::Local(source),
            region.remote(),
            SendFlags::empty(),
        )
        .unwrap();
    chain.read(2, into, region.remote(), SIGNALED).unwrap();
    chain.submit().unwrap();
    let mut completions = Vec::new();
    let deadline = std::time::Instant::now() + crate::harness::PATIENCE;
    while bench.cq.poll(&mut completions).unwrap() == 0 {
        assert!(std::time::Instant::now() < deadline, "no completion");
    }
    let done = near.complete(completions.remove(0)).unwrap();
    assert_eq!((done.wr_id, done.status), (2, WcStatus::Success));
    assert!(done.buffer.unwrap().as_slice() == bytes);
}

#[test]
fn reset_empties_the_queues_without_completions_and_starts_anew() {
    let Some(bench) = Bench::new() else { return };
    let (near, far) = (bench.create(), bench.create());
    let (near_qpn, far_qpn) = (near.qpn(), far.qpn());
    let mut near = bench.connect(near, far_qpn, psn(5));
    let far = bench.connect(far, near_qpn, psn(5));
    for wr_id in 0..4 {
        near.post_recv(wr_id, bench.pd.alloc_local(64).unwrap())
            .unwrap();
    }
    let near = near.reset().unwrap();
    let far = far.reset().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mut completions = Vec::new();
    assert_eq!(
        bench.cq.poll(&mut completions).unwrap(),
        0,
        "{completions:?}"
    );

    let mut near = bench.connect(near, far_qpn, psn(900));
    let mut far = bench.connect(far, near_qpn, psn(900));
    near.post_recv(7, bench.pd.alloc_local(64).unwrap())
        .unwrap();
    let mut chain = far.start_send();
    chain.send(8, Source::Inline(b"again"), SIGNALED).unwrap();
    chain.submit().unwrap();
    let deadline = std::time::Instant::now() + crate::harness::PATIENCE;
    while completions.len() < 2 {
        assert!(std::time::Instant::now() < deadline, "{completions:?}");
        bench.cq.poll(&mut completions).unwrap();
    }
    for completion in completions {
        let qp = if completion.qpn() == near_qpn {
            &mut near
        } else {
            &mut far
        };
        let done = qp.complete(completion).unwrap();
        assert!(done.is_success(), "{}", done.status);
        if let Some(buffer) = done.buffer {
            assert_eq!(
                (done.wr_id, &buffer.as_slice()[..5]),
                (7, b"again".as_slice())
            );
        }
    }
}

#[test]
fn rights_can_be_taken_back_while_connected() {
    let Some(mut pair) = pair() else { return };
    assert!(pair.near.write(b"yes", pair.far.remote(0)).is_success());
    let attributes = QpAttributes {
        access: Some(AccessFlags::REMOTE_READ),
        ..QpAttributes::default()
    };
    pair.far.qp.modify(QpState::Rts, &attributes).unwrap();
    let done = pair.near.write(b"no!", pair.far.remote(0));
    assert_eq!(done.status, WcStatus::RemInvReqErr);
    assert_eq!(pair.far.image_bytes(0, 3), b"yes");
}

/// SQD: what was begun ends, an event says so, what is posted waits, and attributes may change meanwhile.
#[test]
fn a_drained_queue_holds_requests_until_it_is_resumed() {
    let Some(mut pair) = pair() else { return };
    let events = pair.near.context.async_events();
    let region = pair.near.region.clone();
    let remote = pair.far.remote(0);
    let post = |near: &mut End, wr_id, len| {
        let mut chain = near.qp.start_send();
        let source = Source::Shared(&region, 0..len);
        chain.write(wr_id, source, remote, SIGNALED).unwrap();
        chain.submit().unwrap();
    };
    post(&mut pair.near, 1, 1 << 20);
    let drain = QpAttributes {
        en_sqd_async_notify: Some(true),
        ..QpAttributes::default()
    };
    pair.near.qp.modify(QpState::Sqd, &drain).unwrap();
    pair.near.expect(1);
    let near = pair.near.qp.qpn();
    loop {
        match events.wait(Some(PATIENCE)).unwrap() {
            Some(AsyncEvent::CommEst(_)) => {}
            event => {
                assert_eq!(event, Some(AsyncEvent::SqDrained(near)));
                break;
            }
        }
    }
    assert_eq!(pair.near.qp.query().unwrap().state, QpState::Sqd);

    post(&mut pair.near, 2, 8);
    pair.near.expect_nothing();
    let patience = QpAttributes {
        timeout: Some(15),
        retry_cnt: Some(5),
        ..QpAttributes::default()
    };
    pair.near.qp.modify(QpState::Sqd, &patience).unwrap();
    pair.near
        .qp
        .modify(QpState::Rts, &QpAttributes::default())
        .unwrap();
    // Kernel rxe 6.1 looks at a resumed queue only when something more is posted.
    let is_resumed = pair.near.has_completion(Duration::from_secs(1));
    assert!(is_resumed || !pair.near.context.is_soft(), "not resumed");
    post(&mut pair.near, 3, 8);
    pair.near.expect(2);
    pair.near.expect(3);
    let status = pair.near.qp.query().unwrap();
    assert_eq!(
        (status.state, status.timeout, status.retry_cnt),
        (QpState::Rts, 15, 5)
    );
}

#[test]
fn sending_in_reset_is_refused() {
    let Some(mut pair) = pair() else { return };
    pair.near
        .qp
        .modify(QpState::Reset, &QpAttributes::default())
        .unwrap();
    let region = pair.near.region.clone();
    let mut chain = pair.near.qp.start_send();
    chain
        .write(
            1,
            Source::Shared(&region, 0..9),
            pair.far.remote(0),
            SIGNALED,
        )
        .unwrap();
    let error = chain.submit().unwrap_err();
    let Error::Post { accepted, .. } = error else {
        panic!("{error}")
    };
    // What was taken counts as posted and keeps its memory.
    Difference::PostInResetTaken.check(Maker::of(&pair.near.context), accepted > 0);
    assert_eq!(pair.near.qp.sends_outstanding(), accepted);
    assert_eq!(std::sync::Arc::strong_count(&region), 2 + accepted);
}
