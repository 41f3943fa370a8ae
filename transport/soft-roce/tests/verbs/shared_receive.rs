//! Shared receive queues.

use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdma_core_bindings::*;

use crate::support::*;

/// A shared receive queue of `end` with room for `max_wr` requests.
fn create_srq(end: &End, max_wr: u32) -> *mut ibv_srq {
    let mut init: ibv_srq_init_attr = unsafe { mem::zeroed() };
    init.attr.max_wr = max_wr;
    init.attr.max_sge = 4;
    let srq = unsafe { (verbs().create_srq)(end.pd, &raw mut init) };
    assert!(!srq.is_null(), "create_srq: errno {}", errno());
    srq
}

/// Replaces the queue pair of `end`, which is not connected, by one that takes from `srq`.
fn use_srq(end: &mut End, srq: *mut ibv_srq) {
    assert_eq!(unsafe { (verbs().destroy_qp)(end.qp) }, 0);
    end.qp = create_sharing_qp(end, srq);
}

fn create_sharing_qp(end: &End, srq: *mut ibv_srq) -> *mut ibv_qp {
    let mut init = end.init_attr();
    init.srq = srq;
    let qp = unsafe { (verbs().create_qp)(end.pd, &raw mut init) };
    assert!(!qp.is_null(), "create_qp: errno {}", errno());
    assert_eq!((init.cap.max_recv_wr, init.cap.max_recv_sge), (0, 0));
    qp
}

fn connect(a: &End, b: &End) {
    a.connect(b.device.address(), b.qpn());
    b.connect(a.device.address(), a.qpn());
}

fn post(end: &End, srq: *mut ibv_srq, wr_id: u64, byte_offset: usize, len: usize) -> i32 {
    let mut sge = end.sge(byte_offset, len);
    let mut wr = ibv_recv_wr {
        wr_id,
        next: ptr::null_mut(),
        sg_list: &raw mut sge,
        num_sge: 1,
    };
    let mut bad_wr = ptr::null_mut();
    unsafe { ibv_post_srq_recv(srq, &raw mut wr, &raw mut bad_wr) }
}

fn query(srq: *mut ibv_srq) -> (u32, u32, u32) {
    let mut attr: ibv_srq_attr = unsafe { mem::zeroed() };
    assert_eq!(unsafe { (verbs().query_srq)(srq, &raw mut attr) }, 0);
    (attr.max_wr, attr.max_sge, attr.srq_limit)
}

fn modify(srq: *mut ibv_srq, max_wr: u32, srq_limit: u32, mask: u32) -> i32 {
    let mut attr = ibv_srq_attr {
        max_wr,
        max_sge: 0,
        srq_limit,
    };
    unsafe { (verbs().modify_srq)(srq, &raw mut attr, mask.cast_signed()) }
}

fn destroy(srq: *mut ibv_srq) {
    assert_eq!(unsafe { (verbs().destroy_srq)(srq) }, 0);
}

fn async_event(end: &End) -> ibv_async_event {
    let mut event: ibv_async_event = unsafe { mem::zeroed() };
    let result = unsafe { (verbs().get_async_event)(end.context, &raw mut event) };
    assert_eq!(result, 0, "errno {}", errno());
    event
}

/// Two queue pairs of one device, each with a peer of its own, take from one queue.
#[test]
fn queue_pairs_take_requests_in_the_order_of_arrival() {
    let (mut one, mut two) = (End::new(Options::default()), End::new(Options::default()));
    let mut target = End::new(Options::default());
    let srq = create_srq(&target, 64);
    use_srq(&mut target, srq);
    let first = target.qp;
    connect(&one, &target);
    let second = create_sharing_qp(&target, srq);
    target.qp = second;
    connect(&two, &target);
    for wr_id in 0..20 {
        assert_eq!(
            post(
                &target,
                srq,
                wr_id,
                1000 * usize::try_from(wr_id).unwrap(),
                1000
            ),
            0
        );
    }
    let qpns = [first, second].map(|qp| unsafe { (*qp).qp_num });
    for wr_id in 0..20_u64 {
        let (from, qpn) = match wr_id % 3 {
            0 => (&mut two, qpns[1]),
            _ => (&mut one, qpns[0]),
        };
        let len = 40 * usize::try_from(wr_id).unwrap();
        let bytes = pattern(len, u8::try_from(wr_id).unwrap());
        from.memory.write(0, &bytes);
        assert_eq!(from.post_one(wr(wr_id, IBV_WR_SEND), 0, len), 0);
        from.wait_ok(wr_id);
        let wc = target.wait_ok(wr_id);
        assert_eq!((wc.qp_num, wc.byte_len as usize), (qpn, len));
        assert_eq!(
            target
                .memory
                .read(1000 * usize::try_from(wr_id).unwrap(), len),
            bytes
        );
    }
    assert_eq!(
        unsafe { (verbs().destroy_srq)(srq) },
        libc::EBUSY,
        "two queue pairs use it"
    );
    assert_eq!(unsafe { (verbs().destroy_qp)(first) }, 0);
    assert_eq!(unsafe { (verbs().destroy_srq)(srq) }, libc::EBUSY);
    assert_eq!(unsafe { (verbs().destroy_qp)(second) }, 0);
    target.qp = ptr::null_mut();
    destroy(srq);
}

/// Many messages in one receive batch: each takes a request, none is lost.
#[test]
fn a_burst_takes_as_many_requests_as_it_has_messages() {
    let (a, mut b) = (End::new(Options::default()), End::new(Options::default()));
    let srq = create_srq(&b, 64);
    use_srq(&mut b, srq);
    connect(&a, &b);
    for round in 0..20 {
        for wr_id in 0..60 {
            assert_eq!(post(&b, srq, wr_id, 0, 64), 0);
        }
        let mut requests: Vec<_> = (0..60).map(|wr_id| wr(wr_id, IBV_WR_SEND)).collect();
        for index in 1..requests.len() {
            requests[index - 1].next = &raw mut requests[index];
        }
        assert_eq!(a.post(&mut requests[0]), 0);
        for wr_id in 0..60 {
            assert_eq!(b.wait_ok(wr_id).byte_len, 0, "round {round}");
        }
        for wr_id in 0..60 {
            a.wait_ok(wr_id);
        }
    }
    assert_eq!(unsafe { (verbs().destroy_qp)(b.qp) }, 0);
    b.qp = ptr::null_mut();
    destroy(srq);
}

#[test]
fn sizes_are_checked_and_reported() {
    let end = End::new(Options::default());
    let mut attr: ibv_device_attr = unsafe { mem::zeroed() };
    assert_eq!(
        unsafe { (verbs().query_device)(end.context, &raw mut attr) },
        0
    );
    assert!(attr.max_srq > 0 && attr.max_srq_wr >= attr.max_qp_wr && attr.max_srq_sge > 0);
    assert_ne!(attr.device_cap_flags & IBV_DEVICE_SRQ_RESIZE, 0);
    let too_many_wr = attr.max_srq_wr.cast_unsigned() + 1;
    let too_many_sge = attr.max_srq_sge.cast_unsigned() + 1;
    for (max_wr, max_sge) in [(0, 1), (too_many_wr, 1), (4, too_many_sge)] {
        let mut init: ibv_srq_init_attr = unsafe { mem::zeroed() };
        (init.attr.max_wr, init.attr.max_sge) = (max_wr, max_sge);
        let srq = unsafe { (verbs().create_srq)(end.pd, &raw mut init) };
        assert!(srq.is_null());
        assert_eq!(errno(), libc::EINVAL);
    }
    assert!(unsafe { (verbs().create_srq)(end.pd, ptr::null_mut()) }.is_null());
    assert_eq!(errno(), libc::EINVAL);

    let srq = create_srq(&end, 5);
    assert_eq!(query(srq), (5, 4, 0));
    for wr_id in 0..5 {
        assert_eq!(post(&end, srq, wr_id, 0, 8), 0);
    }
    assert_eq!(post(&end, srq, 5, 0, 8), libc::ENOMEM);
    let (max_wr, limit) = (IBV_SRQ_MAX_WR, IBV_SRQ_LIMIT);
    assert_eq!(modify(srq, 4, 0, max_wr), libc::EINVAL, "5 wait");
    assert_eq!(modify(srq, 0, 6, limit), libc::EINVAL, "above max_wr");
    assert_eq!(modify(srq, too_many_wr, 0, max_wr), libc::EINVAL);
    assert_eq!(modify(srq, 10, 0, 4), libc::EINVAL, "no such attribute");
    assert_eq!(modify(srq, 10, 11, max_wr | limit), libc::EINVAL);
    assert_eq!(query(srq), (5, 4, 0), "all or nothing");
    assert_eq!(modify(srq, 10, 10, max_wr | limit), 0);
    assert_eq!(query(srq), (10, 4, 10));
    assert_eq!(post(&end, srq, 5, 0, 8), 0);
    assert_eq!(
        unsafe { (verbs().modify_srq)(srq, ptr::null_mut(), 0) },
        libc::EINVAL
    );
    assert_eq!(
        unsafe { (verbs().dealloc_pd)(end.pd) },
        libc::EBUSY,
        "the queue is of the domain"
    );
    destroy(srq);
}

#[test]
fn null_is_an_error_by_each_convention() {
    unsafe {
        assert!((verbs().create_srq)(ptr::null_mut(), ptr::null_mut()).is_null());
        assert_eq!(errno(), libc::EINVAL);
        let attr = ptr::null_mut();
        assert_eq!((verbs().modify_srq)(ptr::null_mut(), attr, 0), libc::EINVAL);
        assert_eq!((verbs().query_srq)(ptr::null_mut(), attr), libc::EINVAL);
        assert_eq!((verbs().destroy_srq)(ptr::null_mut()), libc::EINVAL);
    }
}

#[test]
fn a_chain_is_posted_up_to_the_request_that_fails() {
    let end = End::new(Options::default());
    let srq = create_srq(&end, 8);
    let mut sges = [end.sge(0, 8); 5];
    let mut requests = [1, 2, 5, 1].map(|num_sge| ibv_recv_wr {
        wr_id: 0,
        next: ptr::null_mut(),
        sg_list: sges.as_mut_ptr(),
        num_sge,
    });
    for index in 1..4 {
        requests[index - 1].next = &raw mut requests[index];
    }
    let mut bad_wr = ptr::null_mut();
    let first = requests.as_mut_ptr();
    let result = unsafe { ibv_post_srq_recv(srq, first, &raw mut bad_wr) };
    assert_eq!(result, libc::EINVAL);
    assert_eq!(bad_wr, first.wrapping_add(2));
    // Two are in.
    assert_eq!(modify(srq, 2, 0, IBV_SRQ_MAX_WR), 0);
    assert_eq!(modify(srq, 1, 0, IBV_SRQ_MAX_WR), libc::EINVAL);
    destroy(srq);
}

#[test]
fn the_queue_pair_itself_takes_no_receives() {
    let mut end = End::new(Options::default());
    let srq = create_srq(&end, 8);
    use_srq(&mut end, srq);
    end.to_init();
    assert_eq!(end.post_recv(1, 0, 8), libc::EINVAL);
    let mut attr = zeroed_attr();
    let mut init = end.init_attr();
    let mask = IBV_QP_STATE.cast_signed();
    let result = unsafe { (verbs().query_qp)(end.qp, &raw mut attr, mask, &raw mut init) };
    assert_eq!((result, init.srq), (0, srq));
    assert_eq!(unsafe { (*end.qp).srq }, srq);
    assert_eq!(unsafe { (verbs().destroy_qp)(end.qp) }, 0);
    end.qp = ptr::null_mut();
    destroy(srq);
}

#[test]
fn a_queue_of_another_device_is_refused() {
    let (one, two) = (End::new(Options::default()), End::new(Options::default()));
    let srq = create_srq(&two, 8);
    let mut init = one.init_attr();
    init.srq = srq;
    assert!(unsafe { (verbs().create_qp)(one.pd, &raw mut init) }.is_null());
    assert_eq!(errno(), libc::EINVAL);
    destroy(srq);
}

#[test]
fn the_limit_raises_one_event_that_destroying_waits_for() {
    let (a, mut b) = (End::new(Options::default()), End::new(Options::default()));
    let srq = create_srq(&b, 8);
    use_srq(&mut b, srq);
    connect(&a, &b);
    for wr_id in 0..8 {
        assert_eq!(post(&b, srq, wr_id, 0, 8), 0);
    }
    assert_eq!(modify(srq, 0, 7, IBV_SRQ_LIMIT), 0);
    for wr_id in 0..3 {
        assert_eq!(query(srq).2, if wr_id < 2 { 7 } else { 0 });
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, 8), 0);
        b.wait_ok(wr_id);
    }
    let mut event = loop {
        let mut event = async_event(&b);
        if event.event_type != IBV_EVENT_COMM_EST {
            break event;
        }
        unsafe { (verbs().ack_async_event)(&raw mut event) };
    };
    assert_eq!(event.event_type, IBV_EVENT_SRQ_LIMIT_REACHED);
    assert_eq!(unsafe { event.element.srq }, srq);
    assert_eq!(unsafe { (verbs().destroy_qp)(b.qp) }, 0);
    b.qp = ptr::null_mut();

    let is_destroyed = AtomicBool::new(false);
    let handle = srq.expose_provenance();
    std::thread::scope(|scope| {
        let is_destroyed = &is_destroyed;
        scope.spawn(move || {
            destroy(ptr::with_exposed_provenance_mut(handle));
            is_destroyed.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            !is_destroyed.load(Ordering::SeqCst),
            "its event is not acknowledged yet"
        );
        unsafe { (verbs().ack_async_event)(&raw mut event) };
    });
}

/// A queue pair in ERR says so after its last completion, and leaves the requests to the others.
#[test]
fn a_queue_pair_in_error_leaves_the_requests_to_others() {
    let (mut a, mut b) = (End::new(Options::default()), End::new(Options::default()));
    let srq = create_srq(&b, 8);
    use_srq(&mut b, srq);
    connect(&a, &b);
    let (first_a, first_b) = (a.qp, b.qp);
    a.qp = a.create_qp();
    b.qp = create_sharing_qp(&b, srq);
    connect(&a, &b);
    for wr_id in 0..3 {
        assert_eq!(post(&b, srq, wr_id, 0, 8), 0);
    }
    // Too long for its request.
    let second = (
        mem::replace(&mut a.qp, first_a),
        mem::replace(&mut b.qp, first_b),
    );
    assert_eq!(a.post_one(wr(7, IBV_WR_SEND), 0, 9), 0);
    assert_eq!(a.wait().status, IBV_WC_REM_INV_REQ_ERR);
    let mut events = Vec::new();
    while !events.contains(&IBV_EVENT_QP_LAST_WQE_REACHED) {
        let mut event = async_event(&b);
        if event.event_type == IBV_EVENT_QP_LAST_WQE_REACHED {
            assert_eq!(unsafe { event.element.qp }, first_b);
        }
        events.push(event.event_type);
        unsafe { (verbs().ack_async_event)(&raw mut event) };
    }
    let wc = b.poll().expect("completions come before the event");
    assert_eq!((wc.wr_id, wc.status), (0, IBV_WC_LOC_LEN_ERR));
    assert!(b.poll().is_none());
    assert_eq!(b.state(), IBV_QPS_ERR);

    (a.qp, b.qp) = second;
    for wr_id in 1..3 {
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, 8), 0);
        assert_eq!(b.wait_ok(wr_id).qp_num, b.qpn());
        a.wait_ok(wr_id);
    }
    for qp in [first_a, first_b, b.qp] {
        assert_eq!(unsafe { (verbs().destroy_qp)(qp) }, 0);
    }
    b.qp = ptr::null_mut();
    destroy(srq);
}

/// Requests of many queue pairs on one device, small queue, RNR while it is empty: all arrive.
#[test]
fn a_queue_that_runs_empty_makes_peers_wait() {
    let options = Options {
        rnr_retry: 7,
        ..Options::default()
    };
    let (mut a, mut b) = (End::new(options), End::new(options));
    let srq = create_srq(&b, 4);
    use_srq(&mut b, srq);
    connect(&a, &b);
    let first = (a.qp, b.qp);
    let mut pairs = vec![first];
    for _ in 0..7 {
        (a.qp, b.qp) = (a.create_qp(), create_sharing_qp(&b, srq));
        connect(&a, &b);
        pairs.push((a.qp, b.qp));
    }
    for (index, (qp, _)) in pairs.iter().enumerate() {
        a.qp = *qp;
        for count in 0..10 {
            let byte = u8::try_from(index).unwrap();
            a.memory.write(index, &[byte]);
            assert_eq!(a.post_one(wr(count, IBV_WR_SEND), index, 1), 0);
        }
    }
    let mut seen = vec![0; pairs.len()];
    for wr_id in 0..80_u64 {
        let place = usize::try_from(wr_id).unwrap();
        assert_eq!(post(&b, srq, wr_id, place, 1), 0);
        let wc = b.wait_ok(wr_id);
        let index = usize::from(b.memory.read(place, 1)[0]);
        assert_eq!(wc.qp_num, unsafe { (*pairs[index].1).qp_num });
        seen[index] += 1;
    }
    assert_eq!(seen, vec![10; pairs.len()]);
    for _ in 0..80 {
        assert_eq!(a.wait().status, IBV_WC_SUCCESS);
    }
    for (qa, qb) in &pairs[1..] {
        assert_eq!(unsafe { (verbs().destroy_qp)(*qa) }, 0);
        assert_eq!(unsafe { (verbs().destroy_qp)(*qb) }, 0);
    }
    assert_eq!(unsafe { (verbs().destroy_qp)(first.1) }, 0);
    (a.qp, b.qp) = (first.0, ptr::null_mut());
    destroy(srq);
}
