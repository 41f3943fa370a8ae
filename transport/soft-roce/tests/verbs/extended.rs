//! Extended completion queues and queue pairs.

use std::mem;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdma_core_bindings::*;

use crate::support::*;

/// The operations of a context that programs call inline.
fn ops(end: &End) -> &verbs_context {
    unsafe { &*verbs_get_ctx(end.context) }
}

fn cq_attr(cqe: u32) -> ibv_cq_init_attr_ex {
    let mut attr: ibv_cq_init_attr_ex = unsafe { mem::zeroed() };
    attr.cqe = cqe;
    attr.wc_flags = IBV_WC_STANDARD_FLAGS.into();
    attr
}

fn qp_attr(end: &End, send_ops: u32) -> ibv_qp_init_attr_ex {
    let plain = end.init_attr();
    let mut attr: ibv_qp_init_attr_ex = unsafe { mem::zeroed() };
    attr.send_cq = plain.send_cq;
    attr.recv_cq = plain.recv_cq;
    attr.cap = plain.cap;
    attr.qp_type = plain.qp_type;
    attr.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
    attr.pd = end.pd;
    attr.send_ops_flags = send_ops.into();
    attr
}

/// Replaces the end's queues by an extended completion queue and an extended queue pair on it.
fn extend(end: &mut End, send_ops: u32) -> (*mut ibv_cq_ex, *mut ibv_qp_ex) {
    unsafe {
        assert_eq!((verbs().destroy_qp)(end.qp), 0);
        assert_eq!((verbs().destroy_cq)(end.cq), 0);
        let create_cq_ex = ops(end).create_cq_ex.expect("it is offered");
        let cq_ex = create_cq_ex(end.context, &mut cq_attr(256));
        assert!(!cq_ex.is_null(), "create_cq_ex: errno {}", errno());
        end.cq = cq_ex.cast();
        let create_qp_ex = ops(end).create_qp_ex.expect("it is offered");
        end.qp = create_qp_ex(end.context, &mut qp_attr(end, send_ops));
        assert!(!end.qp.is_null(), "create_qp_ex: errno {}", errno());
        let qp_ex = verbs().qp_to_qp_ex.expect("the table has no gap")(end.qp);
        assert!(ptr::eq(qp_ex.cast(), end.qp));
        (cq_ex, qp_ex)
    }
}

/// Two connected ends, the first of them with extended queues.
fn extended_pair(send_ops: u32) -> (End, End, *mut ibv_cq_ex, *mut ibv_qp_ex) {
    let (mut a, b) = (End::new(Options::default()), End::new(Options::default()));
    let (cq_ex, qp_ex) = extend(&mut a, send_ops);
    a.connect(b.device.address(), b.qpn());
    b.connect(a.device.address(), a.qpn());
    (a, b, cq_ex, qp_ex)
}

/// Waits until `start_poll` finds a completion.
fn start_poll(cq_ex: *mut ibv_cq_ex) {
    let start = Instant::now();
    let mut attr = ibv_poll_cq_attr { comp_mask: 0 };
    loop {
        match unsafe { (*cq_ex).start_poll.unwrap()(cq_ex, &raw mut attr) } {
            0 => return,
            error => assert_eq!(error, libc::ENOENT),
        }
        assert!(start.elapsed() < PATIENCE, "no completion");
    }
}

fn identify(qp_ex: *mut ibv_qp_ex, wr_id: u64, wr_flags: u32) {
    unsafe {
        (*qp_ex).wr_id = wr_id;
        (*qp_ex).wr_flags = wr_flags;
    }
}

#[test]
fn a_queue_shows_its_completions_one_by_one() {
    let ops = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM;
    let (a, b, cq_ex, _) = extended_pair(ops);
    for wr_id in 1..=3 {
        assert_eq!(a.post_recv(wr_id, 0, 64), 0);
    }
    b.post_one(wr(11, IBV_WR_SEND), 0, 8);
    let mut with_imm = wr(12, IBV_WR_SEND_WITH_IMM);
    with_imm.__bindgen_anon_1.imm_data = 0xabcd_u32.to_be();
    b.post_one(with_imm, 0, 24);
    b.wait_ok(11);
    b.wait_ok(12);

    start_poll(cq_ex);
    unsafe {
        let cq = &*cq_ex;
        assert_eq!((cq.wr_id, cq.status), (1, IBV_WC_SUCCESS));
        assert_eq!(cq.read_opcode.unwrap()(cq_ex), IBV_WC_RECV);
        assert_eq!(cq.read_byte_len.unwrap()(cq_ex), 8);
        assert_eq!(cq.read_wc_flags.unwrap()(cq_ex), 0);
        assert_eq!(cq.read_qp_num.unwrap()(cq_ex), a.qpn());
        assert_eq!(cq.read_src_qp.unwrap()(cq_ex), b.qpn());
    }
    // Both have arrived, for their sender has the acknowledgements.
    assert_eq!(unsafe { (*cq_ex).next_poll.unwrap()(cq_ex) }, 0);
    unsafe {
        let cq = &*cq_ex;
        assert_eq!((cq.wr_id, cq.status), (2, IBV_WC_SUCCESS));
        assert_eq!(cq.read_byte_len.unwrap()(cq_ex), 24);
        assert_eq!(cq.read_wc_flags.unwrap()(cq_ex), IBV_WC_WITH_IMM);
        assert_eq!(cq.read_imm_data.unwrap()(cq_ex), 0xabcd_u32.to_be());
        assert_eq!(cq.next_poll.unwrap()(cq_ex), libc::ENOENT);
        cq.end_poll.unwrap()(cq_ex);
    }
    // An empty poll begins no session, and the plain poll works beside.
    assert!(a.poll().is_none());
    let mut attr = ibv_poll_cq_attr { comp_mask: 0 };
    for _ in 0..2 {
        let empty = unsafe { (*cq_ex).start_poll.unwrap()(cq_ex, &raw mut attr) };
        assert_eq!(empty, libc::ENOENT);
    }
    attr.comp_mask = 1;
    let unknown = unsafe { (*cq_ex).start_poll.unwrap()(cq_ex, &raw mut attr) };
    assert_eq!(unknown, libc::EINVAL);
}

#[test]
fn another_thread_waits_for_the_end_of_a_poll() {
    let (a, b, cq_ex, _) = extended_pair(IBV_QP_EX_WITH_SEND);
    for wr_id in [1, 2] {
        assert_eq!(a.post_recv(wr_id, 0, 64), 0);
        b.post_one(wr(wr_id, IBV_WR_SEND), 0, 8);
        b.wait_ok(wr_id);
    }
    start_poll(cq_ex);
    let has_ended = Arc::new(AtomicBool::new(false));
    let address = cq_ex.expose_provenance();
    let other = std::thread::spawn({
        let has_ended = Arc::clone(&has_ended);
        move || {
            let cq_ex = ptr::with_exposed_provenance_mut::<ibv_cq_ex>(address);
            start_poll(cq_ex);
            assert!(has_ended.load(Ordering::SeqCst), "two polls at once");
            let wr_id = unsafe { (*cq_ex).wr_id };
            unsafe { (*cq_ex).end_poll.unwrap()(cq_ex) };
            wr_id
        }
    });
    // Time for the other thread to do wrong.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(unsafe { (*cq_ex).wr_id }, 1);
    has_ended.store(true, Ordering::SeqCst);
    unsafe { (*cq_ex).end_poll.unwrap()(cq_ex) };
    assert_eq!(other.join().unwrap(), 2);
}

#[test]
fn what_the_device_cannot_tell_or_do_is_not_supported() {
    let end = End::new(Options::default());
    let create_cq_ex = ops(&end).create_cq_ex.expect("it is offered");
    let refused = |attr: &mut ibv_cq_init_attr_ex| {
        let cq = unsafe { create_cq_ex(end.context, attr) };
        assert!(cq.is_null());
        errno()
    };
    let mut attr = cq_attr(16);
    attr.wc_flags = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP.into();
    assert_eq!(refused(&mut attr), libc::EOPNOTSUPP);
    let mut attr = cq_attr(16);
    attr.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS;
    attr.flags = IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN;
    assert_eq!(refused(&mut attr), libc::EOPNOTSUPP);
    assert_eq!(refused(&mut cq_attr(0)), libc::EINVAL);
    assert_eq!(refused(&mut cq_attr(u32::MAX)), libc::EINVAL);

    let create_qp_ex = ops(&end).create_qp_ex.expect("it is offered");
    let refused = |attr: &mut ibv_qp_init_attr_ex| {
        let qp = unsafe { create_qp_ex(end.context, attr) };
        assert!(qp.is_null());
        errno()
    };
    let mut attr = qp_attr(&end, IBV_QP_EX_WITH_ATOMIC_WRITE);
    assert_eq!(refused(&mut attr), libc::EOPNOTSUPP);
    let mut attr = qp_attr(&end, IBV_QP_EX_WITH_SEND);
    attr.comp_mask |= IBV_QP_INIT_ATTR_XRCD;
    assert_eq!(refused(&mut attr), libc::EOPNOTSUPP);
    attr.comp_mask = IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
    assert_eq!(refused(&mut attr), libc::EINVAL);

    let qp_to_qp_ex = verbs().qp_to_qp_ex.expect("the table has no gap");
    let plain = unsafe { qp_to_qp_ex(end.qp) };
    assert!(plain.is_null(), "created without send operations");
}

#[test]
fn requests_of_every_kind_are_posted_together() {
    let ops = IBV_QP_EX_WITH_RDMA_WRITE
        | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
        | IBV_QP_EX_WITH_RDMA_READ
        | IBV_QP_EX_WITH_SEND
        | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
        | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD;
    let (a, b, _, qp_ex) = extended_pair(ops);
    a.memory.write(0, &pattern(3000, 7));
    b.memory.store(8000, 5);
    for wr_id in [1, 2] {
        assert_eq!(b.post_recv(wr_id, 9000, 64), 0);
    }
    let qp = unsafe { &*qp_ex };
    let sge = |byte_offset, len| {
        let sge = a.sge(byte_offset, len);
        (sge.lkey, sge.addr, sge.length)
    };
    unsafe {
        qp.wr_start.unwrap()(qp_ex);
        identify(qp_ex, 1, 0);
        qp.wr_rdma_write.unwrap()(qp_ex, b.rkey(), b.at(0));
        let mut pieces = [a.sge(0, 1000), a.sge(1000, 2000)];
        qp.wr_set_sge_list.unwrap()(qp_ex, 2, pieces.as_mut_ptr());

        identify(qp_ex, 2, 0);
        qp.wr_rdma_write_imm.unwrap()(qp_ex, b.rkey(), b.at(4000), 77u32.to_be());
        let mut text = *b"inline bytes";
        qp.wr_set_inline_data.unwrap()(qp_ex, text.as_mut_ptr().cast(), text.len());
        // Copied already: changing the source changes nothing.
        text.fill(b'x');

        identify(qp_ex, 3, 0);
        qp.wr_send.unwrap()(qp_ex);
        let (mut one, mut two) = (*b"two ", *b"parts");
        let parts = [
            ibv_data_buf {
                addr: one.as_mut_ptr().cast(),
                length: one.len(),
            },
            ibv_data_buf {
                addr: two.as_mut_ptr().cast(),
                length: two.len(),
            },
        ];
        qp.wr_set_inline_data_list.unwrap()(qp_ex, parts.len(), parts.as_ptr());

        identify(qp_ex, 4, 0);
        qp.wr_atomic_fetch_add.unwrap()(qp_ex, b.rkey(), b.at(8000), 10);
        let (lkey, addr, length) = sge(10_000, 8);
        qp.wr_set_sge.unwrap()(qp_ex, lkey, addr, length);

        identify(qp_ex, 5, 0);
        qp.wr_atomic_cmp_swp.unwrap()(qp_ex, b.rkey(), b.at(8000), 15, 99);
        let (lkey, addr, length) = sge(10_008, 8);
        qp.wr_set_sge.unwrap()(qp_ex, lkey, addr, length);

        identify(qp_ex, 6, IBV_SEND_SIGNALED | IBV_SEND_FENCE);
        qp.wr_rdma_read.unwrap()(qp_ex, b.rkey(), b.at(8000));
        let (lkey, addr, length) = sge(10_016, 8);
        qp.wr_set_sge.unwrap()(qp_ex, lkey, addr, length);
        assert_eq!(qp.wr_complete.unwrap()(qp_ex), 0);
    }
    a.wait_ok(6);
    assert!(a.poll().is_none(), "the others were not signalled");
    assert_eq!(b.memory.read(0, 3000), pattern(3000, 7));
    assert_eq!(b.memory.read(4000, 12), b"inline bytes");
    assert_eq!(b.memory.read(9000, 9), b"two parts");
    assert_eq!(
        [
            a.memory.load(10_000),
            a.memory.load(10_008),
            a.memory.load(10_016)
        ],
        [5, 15, 99]
    );
    let imm = b.wait_ok(1);
    assert_eq!(unsafe { imm.__bindgen_anon_1.imm_data }, 77u32.to_be());
    assert_eq!(b.wait_ok(2).byte_len, 9);
}

/// The man page: when `ibv_wr_complete` fails, none of the requests has been posted.
#[test]
fn a_failed_or_aborted_batch_posts_nothing() {
    let (a, b, _, qp_ex) = extended_pair(IBV_QP_EX_WITH_RDMA_WRITE);
    let qp = unsafe { &*qp_ex };
    let write = |wr_id: u64, count: usize| unsafe {
        identify(qp_ex, wr_id, IBV_SEND_SIGNALED);
        qp.wr_rdma_write.unwrap()(qp_ex, b.rkey(), b.at(0));
        let mut pieces = vec![a.sge(0, 8); count];
        qp.wr_set_sge_list.unwrap()(qp_ex, count, pieces.as_mut_ptr());
    };
    a.memory.write(0, b"not sent");
    unsafe {
        // The second request has more pieces than the queue pair allows.
        qp.wr_start.unwrap()(qp_ex);
        write(1, 1);
        write(2, 5);
        assert_eq!(qp.wr_complete.unwrap()(qp_ex), libc::EINVAL);

        qp.wr_start.unwrap()(qp_ex);
        write(3, 1);
        qp.wr_abort.unwrap()(qp_ex);

        // One more than the queue takes.
        qp.wr_start.unwrap()(qp_ex);
        for wr_id in 0..=u64::from(a.options.max_send_wr) {
            write(wr_id, 1);
        }
        assert_eq!(qp.wr_complete.unwrap()(qp_ex), libc::ENOMEM);

        // More inline data than the queue pair allows, and data for no request.
        qp.wr_start.unwrap()(qp_ex);
        write(4, 1);
        let mut long = [0u8; 257];
        qp.wr_set_inline_data.unwrap()(qp_ex, long.as_mut_ptr().cast(), long.len());
        assert_eq!(qp.wr_complete.unwrap()(qp_ex), libc::EINVAL);
        qp.wr_start.unwrap()(qp_ex);
        qp.wr_set_sge.unwrap()(qp_ex, 0, 0, 0);
        assert_eq!(qp.wr_complete.unwrap()(qp_ex), libc::EINVAL);
    }
    // What is posted now is the first that is sent, with the PSN that the peer expects.
    a.memory.write(0, b"sent now");
    unsafe {
        qp.wr_start.unwrap()(qp_ex);
        write(5, 1);
        assert_eq!(qp.wr_complete.unwrap()(qp_ex), 0);
    }
    a.wait_ok(5);
    assert!(a.poll().is_none());
    assert_eq!(b.memory.read(0, 8), b"sent now");
}
