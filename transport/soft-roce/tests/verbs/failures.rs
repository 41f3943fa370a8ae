//! What goes wrong, and who sees it how.

use std::time::{Duration, Instant};

use rdma_core_bindings::*;

use crate::support::*;

/// The writer's status for one refused request, with both queue pairs in ERR afterwards.
fn refused(a: &End, b: &End, request: ibv_send_wr, len: usize) -> ibv_wc_status {
    assert_eq!(a.post_one(request, 0, len), 0);
    let wc = a.wait();
    assert_eq!(wc.wr_id, request.wr_id);
    assert_eq!(a.state(), IBV_QPS_ERR, "the requester failed");
    assert_eq!(b.state(), IBV_QPS_ERR, "the responder failed");
    wc.status
}

#[test]
fn a_wrong_rkey_is_a_remote_access_error() {
    let (a, b) = pair(Options::default());
    let mut request = rdma(1, IBV_WR_RDMA_WRITE, &b, 0);
    request.wr.rdma.rkey = b.rkey() ^ 0x5a00;
    assert_eq!(refused(&a, &b, request, 64), IBV_WC_REM_ACCESS_ERR);
    assert_eq!(b.wait_event(), IBV_EVENT_QP_ACCESS_ERR);
}

#[test]
fn out_of_bounds_is_a_remote_access_error_and_writes_nothing() {
    let (a, b) = pair(Options::default());
    a.memory.write(0, &pattern(128, 1));
    let end = b.memory.len();
    let before = b.memory.read(end - 64, 64);
    let request = rdma(1, IBV_WR_RDMA_WRITE, &b, end - 64);
    assert_eq!(refused(&a, &b, request, 65), IBV_WC_REM_ACCESS_ERR);
    assert_eq!(b.memory.read(end - 64, 64), before);
}

#[test]
fn each_missing_right_of_the_region_is_a_remote_access_error() {
    for (opcode, right, len) in [
        (IBV_WR_RDMA_WRITE, IBV_ACCESS_REMOTE_WRITE, 64),
        (IBV_WR_RDMA_READ, IBV_ACCESS_REMOTE_READ, 64),
        (IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_ACCESS_REMOTE_ATOMIC, 8),
    ] {
        let (a, b) = pair(Options {
            mr_access: ALL & !right,
            ..Options::default()
        });
        let mut request = rdma(1, opcode, &b, 0);
        if opcode == IBV_WR_ATOMIC_FETCH_AND_ADD {
            request.wr.atomic.remote_addr = b.at(0);
            request.wr.atomic.rkey = b.rkey();
        }
        assert_eq!(
            refused(&a, &b, request, len),
            IBV_WC_REM_ACCESS_ERR,
            "opcode {opcode}"
        );
    }
}

#[test]
fn an_operation_that_the_queue_pair_does_not_grant_is_an_invalid_request() {
    let (a, b) = pair(Options {
        qp_access: ALL & !IBV_ACCESS_REMOTE_READ,
        ..Options::default()
    });
    let request = rdma(1, IBV_WR_RDMA_READ, &b, 0);
    assert_eq!(refused(&a, &b, request, 64), IBV_WC_REM_INV_REQ_ERR);
}

#[test]
fn a_region_of_another_domain_is_refused() {
    let (a, b) = pair(Options::default());
    let memory = Memory::new(4096);
    let domain = alloc_pd(&b.context);
    let mr = reg_mr(&domain, memory.addr(), memory.len(), ALL).unwrap();
    let mut request = wr(1, IBV_WR_RDMA_WRITE);
    request.wr.rdma.remote_addr = memory.addr().addr() as u64;
    request.wr.rdma.rkey = mr.rkey;
    assert_eq!(refused(&a, &b, request, 64), IBV_WC_REM_ACCESS_ERR);
}

#[test]
fn a_deregistered_key_stays_refused_after_its_memory_is_registered_anew() {
    let (a, mut b) = pair(Options::default());
    let (stale, stale_rkey) = (rdma(1, IBV_WR_RDMA_WRITE, &b, 0), b.rkey());
    assert_eq!(b.mr.destroy(), 0);
    b.mr = reg_mr(&b.pd, b.memory.addr(), b.memory.len(), ALL).unwrap();
    assert_ne!(b.rkey(), stale_rkey, "keys are not reused");
    assert_eq!(refused(&a, &b, stale, 64), IBV_WC_REM_ACCESS_ERR);
}

#[test]
fn a_wrong_lkey_fails_locally() {
    let (a, b) = pair(Options::default());
    let mut sge = a.sge(0, 64);
    sge.lkey ^= 0x0101_0100;
    let mut request = rdma(1, IBV_WR_RDMA_WRITE, &b, 0);
    request.sg_list = &raw mut sge;
    request.num_sge = 1;
    assert_eq!(a.post(&mut request), 0);
    assert_eq!(a.wait().status, IBV_WC_LOC_PROT_ERR);
    assert_eq!(a.state(), IBV_QPS_ERR);
    assert_eq!(b.state(), IBV_QPS_RTS, "the peer never heard of it");
}

#[test]
fn a_send_longer_than_the_receive_fails_both_ends() {
    let (a, b) = pair(Options::default());
    assert_eq!(b.post_recv(7, 0, 100), 0);
    assert_eq!(a.post_one(wr(1, IBV_WR_SEND), 0, 101), 0);
    assert_eq!(a.wait().status, IBV_WC_REM_INV_REQ_ERR);
    let received = b.wait();
    assert_eq!((received.wr_id, received.status), (7, IBV_WC_LOC_LEN_ERR));
}

#[test]
fn no_receive_is_retried_and_then_reported() {
    let (a, b) = pair(Options {
        rnr_retry: 2,
        ..Options::default()
    });
    assert_eq!(a.post(&mut wr(1, IBV_WR_SEND)), 0);
    assert_eq!(a.wait().status, IBV_WC_RNR_RETRY_EXC_ERR);
    assert_eq!(b.state(), IBV_QPS_RTS);
}

#[test]
fn a_receive_posted_in_time_ends_the_waiting() {
    let (a, b) = pair(Options {
        rnr_retry: 7,
        ..Options::default()
    });
    assert_eq!(a.post_one(wr(1, IBV_WR_SEND), 0, 64), 0);
    std::thread::sleep(Duration::from_millis(20));
    assert!(a.poll().is_none());
    assert_eq!(b.post_recv(2, 0, 64), 0);
    a.wait_ok(1);
    b.wait_ok(2);
}

#[test]
fn a_peer_that_is_gone_is_reported_after_the_retries() {
    let options = Options {
        timeout: 10,
        retry_cnt: 2,
        ..Options::default()
    };
    let (a, mut b) = pair(options);
    assert_eq!(b.qp.destroy(), 0);
    let start = Instant::now();
    assert_eq!(a.post_one(rdma(1, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
    assert_eq!(a.wait().status, IBV_WC_RETRY_EXC_ERR);
    // 4.096 us * 2^10, three times.
    assert!(
        start.elapsed() >= Duration::from_millis(12),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn an_error_flushes_everything_behind_it_once_and_in_order() {
    let (a, b) = pair(Options::default());
    for wr_id in 50..53 {
        assert_eq!(a.post_recv(wr_id, 0, 64), 0);
    }
    let mut bad = rdma(0, IBV_WR_RDMA_WRITE, &b, 0);
    bad.wr.rdma.rkey = b.rkey() ^ 0x5a00;
    assert_eq!(a.post_one(bad, 0, 64), 0);
    for wr_id in 1..10 {
        let mut request = rdma(wr_id, IBV_WR_RDMA_WRITE, &b, 0);
        request.send_flags = 0;
        assert_eq!(a.post_one(request, 0, 64), 0);
    }
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    while sent.len() + received.len() < 13 {
        let wc = a.wait();
        if wc.wr_id < 50 {
            sent.push(wc)
        } else {
            received.push(wc)
        }
    }
    assert_eq!(sent[0].status, IBV_WC_REM_ACCESS_ERR);
    assert!(sent[1..].iter().all(|wc| wc.status == IBV_WC_WR_FLUSH_ERR));
    assert!(
        sent.iter().map(|wc| wc.wr_id).eq(0..10),
        "silent ones too, in order"
    );
    assert!(received.iter().map(|wc| wc.wr_id).eq(50..53));
    assert!(received.iter().all(|wc| wc.status == IBV_WC_WR_FLUSH_ERR));
    assert_eq!(
        a.post_one(rdma(77, IBV_WR_RDMA_WRITE, &b, 0), 0, 64),
        0,
        "posting goes on"
    );
    let late = a.wait();
    assert_eq!((late.wr_id, late.status), (77, IBV_WC_WR_FLUSH_ERR));
    assert!(a.poll().is_none());
}

#[test]
fn reset_drops_what_was_posted_and_the_queue_pair_serves_again() {
    let (a, b) = pair(Options {
        rnr_retry: 7,
        ..Options::default()
    });
    assert_eq!(a.post(&mut wr(1, IBV_WR_SEND)), 0);
    for end in [&a, &b] {
        let mut attr = zeroed_attr();
        attr.qp_state = IBV_QPS_RESET;
        assert_eq!(end.modify(&mut attr, IBV_QP_STATE), 0);
        assert!(end.poll().is_none(), "RESET completes nothing");
    }
    connect(&a, &b);
    assert_eq!(a.post_one(rdma(2, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
    a.wait_ok(2);
}

#[test]
fn destroying_with_work_outstanding_returns_and_leaves_nothing() {
    let (mut a, b) = pair(Options {
        rnr_retry: 7,
        ..Options::default()
    });
    for wr_id in 0..20 {
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, 5000), 0);
        assert_eq!(a.post_recv(wr_id, 0, 64), 0);
    }
    assert_eq!(a.qp.destroy(), 0);
    assert!(
        a.poll().is_none(),
        "a destroyed queue pair has no completions"
    );
    drop(b);
}
