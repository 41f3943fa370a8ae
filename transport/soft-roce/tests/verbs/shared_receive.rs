//! Shared receive queues.

use std::mem;
use std::ptr;

use rdma_core_bindings::*;

use crate::support::*;

/// An end, not connected, whose queue pairs take from a shared queue for `max_wr` requests.
fn sharing_end(options: Options, max_wr: u32) -> End {
    let mut end = End::new(options);
    end.srq = Some(create_srq(&end.pd, max_wr, 4).unwrap());
    let mut init = end.init_attr();
    end.qp = create_qp(&end.pd, &mut init).unwrap();
    assert_eq!((init.cap.max_recv_wr, init.cap.max_recv_sge), (0, 0));
    end
}

fn srq(end: &mut End) -> &mut Srq {
    end.srq.as_mut().expect("a sharing end")
}

fn post(end: &End, wr_id: u64, byte_offset: usize, len: usize) -> i32 {
    let mut sges = [end.sge(byte_offset, len)];
    let srq = end.srq.as_ref().expect("a sharing end");
    post_srq_recv(srq, &mut recv_wr(wr_id, &mut sges)).0
}

fn query(srq: &Srq) -> (u32, u32, u32) {
    let mut attr = ibv_srq_attr::default();
    // SAFETY: a live queue and a place for the result.
    let result = unsafe { (verbs().query_srq)(srq.ptr(), &raw mut attr) };
    assert_eq!(result, 0);
    (attr.max_wr, attr.max_sge, attr.srq_limit)
}

fn modify(srq: &Srq, max_wr: u32, srq_limit: u32, mask: u32) -> i32 {
    let mut attr = ibv_srq_attr {
        max_wr,
        max_sge: 0,
        srq_limit,
    };
    // SAFETY: a live queue and attributes.
    unsafe { (verbs().modify_srq)(srq.ptr(), &raw mut attr, mask.cast_signed()) }
}

/// Two queue pairs of one device, each with a peer of its own, take from one queue.
#[test]
fn queue_pairs_take_requests_in_the_order_of_arrival() {
    let (mut one, mut two) = (End::new(Options::default()), End::new(Options::default()));
    let mut target = sharing_end(Options::default(), 64);
    connect(&one, &target);
    let second = target.create_qp();
    let mut first = mem::replace(&mut target.qp, second);
    connect(&two, &target);
    for (wr_id, place) in (0..20).zip((0..).step_by(1000)) {
        assert_eq!(post(&target, wr_id, place, 1000), 0);
    }
    let qpns = [first.qp_num, target.qpn()];
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
        let place = 1000 * usize::try_from(wr_id).unwrap();
        assert_eq!(target.memory.read(place, len), bytes);
    }
    assert_eq!(
        srq(&mut target).destroy(),
        libc::EBUSY,
        "two queue pairs use it"
    );
    assert_eq!(first.destroy(), 0);
    assert_eq!(srq(&mut target).destroy(), libc::EBUSY);
    assert_eq!(target.qp.destroy(), 0);
    assert_eq!(srq(&mut target).destroy(), 0);
}

/// Many messages in one receive batch: each takes a request, none is lost.
#[test]
fn a_burst_takes_as_many_requests_as_it_has_messages() {
    let a = End::new(Options::default());
    let b = sharing_end(Options::default(), 64);
    connect(&a, &b);
    for round in 0..20 {
        for wr_id in 0..60 {
            assert_eq!(post(&b, wr_id, 0, 64), 0);
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
}

#[test]
fn sizes_are_checked_and_reported() {
    let end = End::new(Options::default());
    let attr = device_attr(&end.context);
    assert!(attr.max_srq > 0 && attr.max_srq_wr >= attr.max_qp_wr && attr.max_srq_sge > 0);
    assert_ne!(attr.device_cap_flags & IBV_DEVICE_SRQ_RESIZE, 0);
    let too_many_wr = attr.max_srq_wr.cast_unsigned() + 1;
    let too_many_sge = attr.max_srq_sge.cast_unsigned() + 1;
    for (max_wr, max_sge) in [(0, 1), (too_many_wr, 1), (4, too_many_sge)] {
        let refused = create_srq(&end.pd, max_wr, max_sge);
        assert_eq!(refused.err(), Some(libc::EINVAL));
    }
    clear_errno();
    // SAFETY: NULL for the attributes must be refused.
    assert!(unsafe { (verbs().create_srq)(end.pd.ptr(), ptr::null_mut()) }.is_null());
    assert_eq!(errno(), libc::EINVAL);

    let mut end = sharing_end(Options::default(), 5);
    assert_eq!(query(srq(&mut end)), (5, 4, 0));
    for wr_id in 0..5 {
        assert_eq!(post(&end, wr_id, 0, 8), 0);
    }
    assert_eq!(post(&end, 5, 0, 8), libc::ENOMEM);
    let (max_wr, limit) = (IBV_SRQ_MAX_WR, IBV_SRQ_LIMIT);
    assert_eq!(modify(srq(&mut end), 4, 0, max_wr), libc::EINVAL, "5 wait");
    assert_eq!(
        modify(srq(&mut end), 0, 6, limit),
        libc::EINVAL,
        "above max_wr"
    );
    assert_eq!(modify(srq(&mut end), too_many_wr, 0, max_wr), libc::EINVAL);
    assert_eq!(
        modify(srq(&mut end), 10, 0, 4),
        libc::EINVAL,
        "no such attribute"
    );
    assert_eq!(modify(srq(&mut end), 10, 11, max_wr | limit), libc::EINVAL);
    assert_eq!(query(srq(&mut end)), (5, 4, 0), "all or nothing");
    assert_eq!(modify(srq(&mut end), 10, 10, max_wr | limit), 0);
    assert_eq!(query(srq(&mut end)), (10, 4, 10));
    assert_eq!(post(&end, 5, 0, 8), 0);
    // SAFETY: NULL for the attributes must be refused.
    let result = unsafe { (verbs().modify_srq)(srq(&mut end).ptr(), ptr::null_mut(), 0) };
    assert_eq!(result, libc::EINVAL);
    // A region and a queue pair are of the domain too.
    assert_eq!((end.qp.destroy(), end.mr.destroy()), (0, 0));
    assert_eq!(end.pd.destroy(), libc::EBUSY, "the queue is of the domain");
    assert_eq!((srq(&mut end).destroy(), end.pd.destroy()), (0, 0));
}

#[test]
fn null_is_an_error_by_each_convention() {
    let (srq, attr) = (ptr::null_mut(), ptr::null_mut());
    clear_errno();
    // SAFETY: NULL must be refused, as below.
    assert!(unsafe { (verbs().create_srq)(ptr::null_mut(), ptr::null_mut()) }.is_null());
    assert_eq!(errno(), libc::EINVAL);
    // SAFETY: as above.
    let modified = unsafe { (verbs().modify_srq)(srq, attr, 0) };
    // SAFETY: as above.
    let queried = unsafe { (verbs().query_srq)(srq, attr) };
    // SAFETY: as above.
    let destroyed = unsafe { (verbs().destroy_srq)(srq) };
    assert_eq!([modified, queried, destroyed], [libc::EINVAL; 3]);
}

#[test]
fn a_chain_is_posted_up_to_the_request_that_fails() {
    let end = End::new(Options::default());
    let srq = create_srq(&end.pd, 8, 4).unwrap();
    let mut sges = [end.sge(0, 8); 5];
    let mut requests = [1, 2, 5, 1].map(|num_sge| recv_wr(0, &mut sges[..num_sge]));
    for index in 1..4 {
        requests[index - 1].next = &raw mut requests[index];
    }
    let first = requests.as_mut_ptr();
    let (result, bad_wr) = post_srq_recv(&srq, first);
    assert_eq!(result, libc::EINVAL);
    assert_eq!(bad_wr, first.wrapping_add(2));
    // Two are in.
    assert_eq!(modify(&srq, 2, 0, IBV_SRQ_MAX_WR), 0);
    assert_eq!(modify(&srq, 1, 0, IBV_SRQ_MAX_WR), libc::EINVAL);
}

#[test]
fn the_queue_pair_itself_takes_no_receives() {
    let mut end = sharing_end(Options::default(), 8);
    end.to_init();
    assert_eq!(end.post_recv(1, 0, 8), libc::EINVAL);
    let (_, init) = query_qp(&end.qp, IBV_QP_STATE);
    assert_eq!((init.srq, end.qp.srq), (end.qp.srq, srq(&mut end).ptr()));
}

#[test]
fn a_queue_of_another_device_is_refused() {
    let (one, two) = (End::new(Options::default()), End::new(Options::default()));
    let srq = create_srq(&two.pd, 8, 4).unwrap();
    let mut init = one.init_attr();
    init.srq = srq.ptr();
    let refused = create_qp(&one.pd, &mut init);
    assert_eq!(refused.err(), Some(libc::EINVAL));
}

#[test]
fn the_limit_raises_one_event_that_destroying_waits_for() {
    let a = End::new(Options::default());
    let mut b = sharing_end(Options::default(), 8);
    connect(&a, &b);
    for wr_id in 0..8 {
        assert_eq!(post(&b, wr_id, 0, 8), 0);
    }
    assert_eq!(modify(srq(&mut b), 0, 7, IBV_SRQ_LIMIT), 0);
    for wr_id in 0..3 {
        assert_eq!(query(srq(&mut b)).2, if wr_id < 2 { 7 } else { 0 });
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, 8), 0);
        b.wait_ok(wr_id);
    }
    let event = loop {
        let event = AsyncEvent::wait(&b.context).unwrap();
        if event.event_type() != IBV_EVENT_COMM_EST {
            break event;
        }
    };
    assert_eq!(event.event_type(), IBV_EVENT_SRQ_LIMIT_REACHED);
    assert!(event.is_about(srq(&mut b)));
    assert_eq!(b.qp.destroy(), 0);
    expect_destruction_to_wait_for(event, srq(&mut b));
}

/// A queue pair in ERR says so after its last completion, and leaves the requests to the others.
#[test]
fn a_queue_pair_in_error_leaves_the_requests_to_others() {
    let mut a = End::new(Options::default());
    let mut b = sharing_end(Options::default(), 8);
    connect(&a, &b);
    let mut others = (a.create_qp(), b.create_qp());
    let exchange = |a: &mut End, b: &mut End, others: &mut (Qp, Qp)| {
        mem::swap(&mut a.qp, &mut others.0);
        mem::swap(&mut b.qp, &mut others.1);
    };
    exchange(&mut a, &mut b, &mut others);
    connect(&a, &b);
    exchange(&mut a, &mut b, &mut others);
    for wr_id in 0..3 {
        assert_eq!(post(&b, wr_id, 0, 8), 0);
    }
    // Too long for its request.
    assert_eq!(a.post_one(wr(7, IBV_WR_SEND), 0, 9), 0);
    assert_eq!(a.wait().status, IBV_WC_REM_INV_REQ_ERR);
    loop {
        let event = AsyncEvent::wait(&b.context).unwrap();
        if event.event_type() == IBV_EVENT_QP_LAST_WQE_REACHED {
            assert!(event.is_about(&b.qp));
            break;
        }
    }
    let wc = b.poll().expect("completions come before the event");
    assert_eq!((wc.wr_id, wc.status), (0, IBV_WC_LOC_LEN_ERR));
    assert!(b.poll().is_none());
    assert_eq!(b.state(), IBV_QPS_ERR);

    exchange(&mut a, &mut b, &mut others);
    for wr_id in 1..3 {
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, 8), 0);
        assert_eq!(b.wait_ok(wr_id).qp_num, b.qpn());
        a.wait_ok(wr_id);
    }
}

/// Requests of many queue pairs on one device, small queue, RNR while it is empty: all arrive.
#[test]
fn a_queue_that_runs_empty_makes_peers_wait() {
    let options = Options {
        rnr_retry: 7,
        ..Options::default()
    };
    let mut a = End::new(options);
    let mut b = sharing_end(options, 4);
    connect(&a, &b);
    let mut pairs = Vec::new();
    for _ in 0..7 {
        let (qa, qb) = (a.create_qp(), b.create_qp());
        pairs.push((mem::replace(&mut a.qp, qa), mem::replace(&mut b.qp, qb)));
        connect(&a, &b);
    }
    let send_ten = |a: &End, index: usize| {
        a.memory.write(index, &[u8::try_from(index).unwrap()]);
        for count in 0..10 {
            assert_eq!(a.post_one(wr(count, IBV_WR_SEND), index, 1), 0);
        }
    };
    let mut qpns = vec![b.qpn()];
    send_ten(&a, 0);
    for (index, (qa, qb)) in (1..).zip(&mut pairs) {
        qpns.push(qb.qp_num);
        mem::swap(&mut a.qp, qa);
        send_ten(&a, index);
    }
    let mut seen = vec![0; qpns.len()];
    for wr_id in 0..80_u64 {
        let place = usize::try_from(wr_id).unwrap();
        assert_eq!(post(&b, wr_id, place, 1), 0);
        let wc = b.wait_ok(wr_id);
        let index = usize::from(b.memory.read(place, 1)[0]);
        assert_eq!(wc.qp_num, qpns[index]);
        seen[index] += 1;
    }
    assert_eq!(seen, vec![10; qpns.len()]);
    for _ in 0..80 {
        assert_eq!(a.wait().status, IBV_WC_SUCCESS);
    }
}
