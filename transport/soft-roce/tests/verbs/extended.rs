//! Extended completion queues and queue pairs.

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdma_core_bindings::*;

use crate::support::*;

fn cq_attr(cqe: u32) -> ibv_cq_init_attr_ex {
    ibv_cq_init_attr_ex {
        cqe,
        wc_flags: IBV_WC_STANDARD_FLAGS.into(),
        ..Default::default()
    }
}

fn qp_attr(end: &End, send_ops: u32) -> ibv_qp_init_attr_ex {
    let plain = end.init_attr();
    ibv_qp_init_attr_ex {
        send_cq: plain.send_cq,
        recv_cq: plain.recv_cq,
        cap: plain.cap,
        qp_type: plain.qp_type,
        comp_mask: IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
        pd: end.pd.ptr(),
        send_ops_flags: send_ops.into(),
        ..Default::default()
    }
}

fn qp_to_qp_ex(qp: &Qp) -> *mut ibv_qp_ex {
    let qp_to_qp_ex = verbs().qp_to_qp_ex.expect("the table has no gap");
    // SAFETY: a live queue pair.
    unsafe { qp_to_qp_ex(qp.ptr()) }
}

/// An extended completion queue, which its end owns.
#[derive(Clone, Copy)]
struct CqEx<'a>(&'a Cq);

impl CqEx<'_> {
    fn ptr(self) -> *mut ibv_cq_ex {
        self.0.ptr().cast()
    }

    /// Calls one of its functions that take nothing else.
    fn call<T>(self, function: fn(&ibv_cq_ex) -> CqFunction<T>) -> T {
        // SAFETY: a live queue that was made by `create_cq_ex`.
        let function = function(unsafe { &*self.ptr() }).expect("it is offered");
        // SAFETY: as above; what it reads is of the completion at which the poll has arrived.
        unsafe { function(self.ptr()) }
    }

    /// The completion at which the poll has arrived.
    fn current(self) -> (u64, ibv_wc_status) {
        // SAFETY: as above; only this thread moves the poll on.
        let cq = unsafe { &*self.ptr() };
        (cq.wr_id, cq.status)
    }

    fn start_poll(self, comp_mask: u32) -> c_int {
        let mut attr = ibv_poll_cq_attr { comp_mask };
        // SAFETY: as above.
        let start_poll = unsafe { (*self.ptr()).start_poll }.expect("it is offered");
        // SAFETY: as above, with attributes.
        unsafe { start_poll(self.ptr(), &raw mut attr) }
    }

    /// Waits until `start_poll` finds a completion.
    fn wait_poll(self) {
        let start = Instant::now();
        loop {
            match self.start_poll(0) {
                0 => return,
                error => assert_eq!(error, libc::ENOENT),
            }
            assert!(start.elapsed() < PATIENCE, "no completion");
        }
    }
}

type CqFunction<T> = Option<unsafe extern "C" fn(*mut ibv_cq_ex) -> T>;
type QpFunction<T> = Option<unsafe extern "C" fn(*mut ibv_qp_ex) -> T>;

/// An extended queue pair, which its end owns.
#[derive(Clone, Copy)]
struct QpEx<'a>(&'a Qp);

impl QpEx<'_> {
    fn ptr(self) -> *mut ibv_qp_ex {
        self.0.ptr().cast()
    }

    fn functions(&self) -> &ibv_qp_ex {
        // SAFETY: a live queue pair that was made by `create_qp_ex`.
        unsafe { &*self.ptr() }
    }

    /// Calls one of its functions that take nothing else.
    fn call<T>(self, function: fn(&ibv_qp_ex) -> QpFunction<T>) -> T {
        let function = function(self.functions()).expect("it is offered");
        // SAFETY: a live queue pair.
        unsafe { function(self.ptr()) }
    }

    fn identify(self, wr_id: u64, wr_flags: u32) {
        // SAFETY: a live queue pair; these fields are the application's.
        unsafe { (*self.ptr()).wr_id = wr_id };
        // SAFETY: as above.
        unsafe { (*self.ptr()).wr_flags = wr_flags };
    }

    /// Begins a request on `byte_offset` of the peer's memory that takes nothing else.
    fn on(
        self,
        function: fn(&ibv_qp_ex) -> Option<unsafe extern "C" fn(*mut ibv_qp_ex, u32, u64)>,
        peer: &End,
        byte_offset: usize,
    ) {
        let function = function(self.functions()).expect("it is offered");
        // SAFETY: a live queue pair and numbers.
        unsafe { function(self.ptr(), peer.rkey(), peer.at(byte_offset)) };
    }

    fn set_sge(self, sge: ibv_sge) {
        let set = self.functions().wr_set_sge.expect("it is offered");
        // SAFETY: a live queue pair and numbers.
        unsafe { set(self.ptr(), sge.lkey, sge.addr, sge.length) };
    }

    fn set_sge_list(self, sges: &mut [ibv_sge]) {
        let set = self.functions().wr_set_sge_list.expect("it is offered");
        // SAFETY: a live queue pair and pieces, which the call copies.
        unsafe { set(self.ptr(), sges.len(), sges.as_mut_ptr()) };
    }

    fn set_inline_data(self, bytes: &mut [u8]) {
        let set = self.functions().wr_set_inline_data;
        let set = set.expect("it is offered");
        // SAFETY: a live queue pair and bytes, which the call copies.
        unsafe { set(self.ptr(), bytes.as_mut_ptr().cast(), bytes.len()) };
    }
}

/// Replaces the end's queues by an extended completion queue and an extended queue pair on it.
fn extend(end: &mut End, send_ops: u32) {
    assert_eq!((end.qp.destroy(), end.cq.destroy()), (0, 0));
    end.cq = create_cq_ex(&end.context, &mut cq_attr(256)).unwrap();
    end.qp = create_qp_ex(&end.context, &mut qp_attr(end, send_ops)).unwrap();
    assert!(ptr::eq(qp_to_qp_ex(&end.qp).cast(), end.qp.ptr()));
}

/// Two connected ends, the first of them with extended queues.
fn extended_pair(send_ops: u32) -> (End, End) {
    let (mut a, b) = (End::new(Options::default()), End::new(Options::default()));
    extend(&mut a, send_ops);
    connect(&a, &b);
    (a, b)
}

#[test]
fn a_queue_shows_its_completions_one_by_one() {
    let ops = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM;
    let (a, b) = extended_pair(ops);
    let cq = CqEx(&a.cq);
    for wr_id in 1..=3 {
        assert_eq!(a.post_recv(wr_id, 0, 64), 0);
    }
    b.post_one(wr(11, IBV_WR_SEND), 0, 8);
    let mut with_imm = wr(12, IBV_WR_SEND_WITH_IMM);
    with_imm.__bindgen_anon_1.imm_data = 0xabcd_u32.to_be();
    b.post_one(with_imm, 0, 24);
    b.wait_ok(11);
    b.wait_ok(12);

    cq.wait_poll();
    assert_eq!(cq.current(), (1, IBV_WC_SUCCESS));
    assert_eq!(cq.call(|cq| cq.read_opcode), IBV_WC_RECV);
    assert_eq!(cq.call(|cq| cq.read_byte_len), 8);
    assert_eq!(cq.call(|cq| cq.read_wc_flags), 0);
    assert_eq!(cq.call(|cq| cq.read_qp_num), a.qpn());
    assert_eq!(cq.call(|cq| cq.read_src_qp), b.qpn());
    // Both have arrived, for their sender has the acknowledgements.
    assert_eq!(cq.call(|cq| cq.next_poll), 0);
    assert_eq!(cq.current(), (2, IBV_WC_SUCCESS));
    assert_eq!(cq.call(|cq| cq.read_byte_len), 24);
    assert_eq!(cq.call(|cq| cq.read_wc_flags), IBV_WC_WITH_IMM);
    assert_eq!(cq.call(|cq| cq.read_imm_data), 0xabcd_u32.to_be());
    assert_eq!(cq.call(|cq| cq.next_poll), libc::ENOENT);
    cq.call(|cq| cq.end_poll);
    // An empty poll begins no session, and the plain poll works beside.
    assert!(a.poll().is_none());
    assert_eq!(
        (cq.start_poll(0), cq.start_poll(0)),
        (libc::ENOENT, libc::ENOENT)
    );
    assert_eq!(cq.start_poll(1), libc::EINVAL, "an unknown attribute");
}

#[test]
fn another_thread_waits_for_the_end_of_a_poll() {
    let (a, b) = extended_pair(IBV_QP_EX_WITH_SEND);
    let cq = CqEx(&a.cq);
    for wr_id in [1, 2] {
        assert_eq!(a.post_recv(wr_id, 0, 64), 0);
        b.post_one(wr(wr_id, IBV_WR_SEND), 0, 8);
        b.wait_ok(wr_id);
    }
    cq.wait_poll();
    let has_ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            cq.wait_poll();
            assert!(has_ended.load(Ordering::SeqCst), "two polls at once");
            let (wr_id, _) = cq.current();
            cq.call(|cq| cq.end_poll);
            wr_id
        });
        // Time for the other thread to do wrong.
        std::thread::sleep(Duration::from_millis(50));
        let (wr_id, _) = cq.current();
        has_ended.store(true, Ordering::SeqCst);
        cq.call(|cq| cq.end_poll);
        assert_eq!(wr_id, 1);
        assert_eq!(other.join().unwrap(), 2);
    });
}

#[test]
fn what_the_device_cannot_tell_or_do_is_not_supported() {
    let end = End::new(Options::default());
    let refused = |attr: &mut ibv_cq_init_attr_ex| create_cq_ex(&end.context, attr).err();
    let mut attr = cq_attr(16);
    attr.wc_flags = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP.into();
    assert_eq!(refused(&mut attr), Some(libc::EOPNOTSUPP));
    let mut attr = cq_attr(16);
    attr.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS;
    attr.flags = IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN;
    assert_eq!(refused(&mut attr), Some(libc::EOPNOTSUPP));
    assert_eq!(refused(&mut cq_attr(0)), Some(libc::EINVAL));
    assert_eq!(refused(&mut cq_attr(u32::MAX)), Some(libc::EINVAL));

    let refused = |attr: &mut ibv_qp_init_attr_ex| create_qp_ex(&end.context, attr).err();
    let mut attr = qp_attr(&end, IBV_QP_EX_WITH_ATOMIC_WRITE);
    assert_eq!(refused(&mut attr), Some(libc::EOPNOTSUPP));
    let mut attr = qp_attr(&end, IBV_QP_EX_WITH_SEND);
    attr.comp_mask |= IBV_QP_INIT_ATTR_XRCD;
    assert_eq!(refused(&mut attr), Some(libc::EOPNOTSUPP));
    attr.comp_mask = IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
    assert_eq!(refused(&mut attr), Some(libc::EINVAL));

    let plain = qp_to_qp_ex(&end.qp);
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
    let (a, b) = extended_pair(ops);
    a.memory.write(0, &pattern(3000, 7));
    b.memory.store(8000, 5);
    for wr_id in [1, 2] {
        assert_eq!(b.post_recv(wr_id, 9000, 64), 0);
    }
    let qp = QpEx(&a.qp);
    qp.call(|qp| qp.wr_start);
    qp.identify(1, 0);
    qp.on(|qp| qp.wr_rdma_write, &b, 0);
    qp.set_sge_list(&mut [a.sge(0, 1000), a.sge(1000, 2000)]);

    qp.identify(2, 0);
    let write_imm = qp.functions().wr_rdma_write_imm.unwrap();
    // SAFETY: a live queue pair and numbers, here and below.
    unsafe { write_imm(qp.ptr(), b.rkey(), b.at(4000), 77u32.to_be()) };
    let mut text = *b"inline bytes";
    qp.set_inline_data(&mut text);
    // Copied already: changing the source changes nothing.
    text.fill(b'x');

    qp.identify(3, 0);
    qp.call(|qp| qp.wr_send);
    let (mut one, mut two) = (*b"two ", *b"parts");
    let part = |bytes: &mut [u8]| ibv_data_buf {
        addr: bytes.as_mut_ptr().cast(),
        length: bytes.len(),
    };
    let parts = [part(&mut one), part(&mut two)];
    let set_list = qp.functions().wr_set_inline_data_list.unwrap();
    // SAFETY: as above, and parts with their bytes, which the call copies.
    unsafe { set_list(qp.ptr(), parts.len(), parts.as_ptr()) };

    qp.identify(4, 0);
    let fetch_add = qp.functions().wr_atomic_fetch_add.unwrap();
    // SAFETY: as above.
    unsafe { fetch_add(qp.ptr(), b.rkey(), b.at(8000), 10) };
    qp.set_sge(a.sge(10_000, 8));

    qp.identify(5, 0);
    let cmp_swp = qp.functions().wr_atomic_cmp_swp.unwrap();
    // SAFETY: as above.
    unsafe { cmp_swp(qp.ptr(), b.rkey(), b.at(8000), 15, 99) };
    qp.set_sge(a.sge(10_008, 8));

    qp.identify(6, IBV_SEND_SIGNALED | IBV_SEND_FENCE);
    qp.on(|qp| qp.wr_rdma_read, &b, 8000);
    qp.set_sge(a.sge(10_016, 8));
    assert_eq!(qp.call(|qp| qp.wr_complete), 0);
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
    assert_eq!(imm_data(&imm), 77u32.to_be());
    assert_eq!(b.wait_ok(2).byte_len, 9);
}

/// The man page: when `ibv_wr_complete` fails, none of the requests has been posted.
#[test]
fn a_failed_or_aborted_batch_posts_nothing() {
    let (a, b) = extended_pair(IBV_QP_EX_WITH_RDMA_WRITE);
    let qp = QpEx(&a.qp);
    let write = |wr_id: u64, count: usize| {
        qp.identify(wr_id, IBV_SEND_SIGNALED);
        qp.on(|qp| qp.wr_rdma_write, &b, 0);
        qp.set_sge_list(&mut vec![a.sge(0, 8); count]);
    };
    let start = || qp.call(|qp| qp.wr_start);
    let complete = || qp.call(|qp| qp.wr_complete);
    a.memory.write(0, b"not sent");
    // The second request has more pieces than the queue pair allows.
    start();
    write(1, 1);
    write(2, 5);
    assert_eq!(complete(), libc::EINVAL);

    start();
    write(3, 1);
    qp.call(|qp| qp.wr_abort);

    // One more than the queue takes.
    start();
    for wr_id in 0..=u64::from(a.options.max_send_wr) {
        write(wr_id, 1);
    }
    assert_eq!(complete(), libc::ENOMEM);

    // More inline data than the queue pair allows, and data for no request.
    start();
    write(4, 1);
    qp.set_inline_data(&mut [0; 257]);
    assert_eq!(complete(), libc::EINVAL);
    start();
    qp.set_sge(ibv_sge::default());
    assert_eq!(complete(), libc::EINVAL);
    // What is posted now is the first that is sent, with the PSN that the peer expects.
    a.memory.write(0, b"sent now");
    start();
    write(5, 1);
    assert_eq!(complete(), 0);
    a.wait_ok(5);
    assert!(a.poll().is_none());
    assert_eq!(b.memory.read(0, 8), b"sent now");
}
