//! Queue pairs for datagrams and address handles.

use std::mem;
use std::ptr;

use rdma_core_bindings::*;

use crate::support::*;

const QKEY: u32 = 0x1111_1111;
const GRH: usize = 40;
const INIT_MASK: u32 = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY;

/// A device whose queue pair is for datagrams, in RESET.
fn new_end() -> End {
    let mut end = End::new(Options::default());
    let mut init = end.init_attr();
    init.qp_type = IBV_QPT_UD;
    unsafe {
        assert_eq!((verbs().destroy_qp)(end.qp), 0);
        end.qp = (verbs().create_qp)(end.pd, &raw mut init);
    }
    assert!(!end.qp.is_null(), "create_qp: errno {}", errno());
    end
}

/// The same, ready to send.
fn ready_end() -> End {
    let end = new_end();
    let mut attr = zeroed_attr();
    attr.port_num = 1;
    attr.qkey = QKEY;
    for (state, mask) in [
        (IBV_QPS_INIT, INIT_MASK),
        (IBV_QPS_RTR, IBV_QP_STATE),
        (IBV_QPS_RTS, IBV_QP_STATE | IBV_QP_SQ_PSN),
    ] {
        attr.qp_state = state;
        assert_eq!(end.modify(&mut attr, mask), 0);
    }
    end
}

/// The way to a device.
fn way_to(end: &End) -> ibv_ah_attr {
    rtr_attr(end.device.address(), 0).ah_attr
}

/// An address handle, destroyed when dropped.
struct Handle(*mut ibv_ah);

impl Handle {
    fn new(end: &End, mut attr: ibv_ah_attr) -> Self {
        let ah = unsafe { (verbs().create_ah)(end.pd, &raw mut attr) };
        assert!(!ah.is_null(), "create_ah: errno {}", errno());
        Self(ah)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        assert_eq!(unsafe { (verbs().destroy_ah)(self.0) }, 0);
    }
}

fn datagram(wr_id: u64, opcode: ibv_wr_opcode, to: &Handle, qpn: u32) -> ibv_send_wr {
    let mut request = wr(wr_id, opcode);
    request.wr.ud.ah = to.0;
    request.wr.ud.remote_qpn = qpn;
    request.wr.ud.remote_qkey = QKEY;
    request
}

/// The bytes in front of the data received at `byte_offset`.
fn grh_at(end: &End, byte_offset: usize) -> ibv_grh {
    let bytes: [u8; GRH] = end.memory.read(byte_offset, GRH).try_into().unwrap();
    unsafe { mem::transmute(bytes) }
}

#[test]
fn one_sender_reaches_many_and_each_can_answer() {
    let a = ready_end();
    let others = [ready_end(), ready_end(), ready_end()];
    a.memory.write(0, b"to everyone");
    for (wr_id, b) in (1..).zip(&others) {
        assert_eq!(b.post_recv(wr_id, 100, GRH + 64), 0);
        let handle = Handle::new(&a, way_to(b));
        let mut request = datagram(wr_id, IBV_WR_SEND_WITH_IMM, &handle, b.qpn());
        request.__bindgen_anon_1.imm_data = 0x0102_0304_u32.to_be();
        assert_eq!(a.post_one(request, 0, 11), 0);
        // Posted requests do not need the handle any more.
        drop(handle);
        assert_eq!(a.wait_ok(wr_id).opcode, IBV_WC_SEND);

        let mut wc = b.wait_ok(wr_id);
        assert_eq!((wc.opcode, wc.byte_len as usize), (IBV_WC_RECV, GRH + 11));
        assert_eq!(wc.wc_flags, IBV_WC_GRH | IBV_WC_WITH_IMM);
        assert_eq!((wc.src_qp, wc.qp_num), (a.qpn(), b.qpn()));
        assert_eq!(
            unsafe { wc.__bindgen_anon_1.imm_data },
            0x0102_0304_u32.to_be()
        );
        assert_eq!(b.memory.read(100 + GRH, 11), b"to everyone");

        let mut grh = grh_at(b, 100);
        let mut attr = zeroed_attr().ah_attr;
        let back = unsafe {
            let init = verbs().init_ah_from_wc;
            assert_eq!(
                init(b.context, 1, &raw mut wc, &raw mut grh, &raw mut attr),
                0
            );
            Handle((verbs().create_ah_from_wc)(
                b.pd,
                &raw mut wc,
                &raw mut grh,
                1,
            ))
        };
        let expected = a.device.address().to_ipv6_mapped().octets();
        assert_eq!(unsafe { attr.grh.dgid.raw }, expected);
        assert_eq!((attr.is_global, attr.port_num), (1, 1));
        assert!(!back.0.is_null());
        assert_eq!(a.post_recv(100 + wr_id, 500, GRH + 64), 0);
        b.memory.write(0, b"answer");
        let answer = datagram(9, IBV_WR_SEND, &back, wc.src_qp);
        assert_eq!(b.post_one(answer, 0, 6), 0);
        b.wait_ok(9);
        let wc = a.wait_ok(100 + wr_id);
        assert_eq!((wc.src_qp, wc.wc_flags), (b.qpn(), IBV_WC_GRH));
        assert_eq!(a.memory.read(500 + GRH, 6), b"answer");
    }
}

#[test]
fn a_wrong_key_and_a_missing_receive_are_silence() {
    let (a, b) = (ready_end(), ready_end());
    let to = Handle::new(&a, way_to(&b));
    assert_eq!(a.post_one(datagram(1, IBV_WR_SEND, &to, b.qpn()), 0, 8), 0);
    a.wait_ok(1);
    // It is dropped here, before a receive is posted.
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(b.poll().is_none());
    assert_eq!(b.post_recv(5, 0, 200), 0);
    let mut request = datagram(2, IBV_WR_SEND, &to, b.qpn());
    request.wr.ud.remote_qkey = QKEY + 1;
    assert_eq!(a.post_one(request, 0, 8), 0);
    assert_eq!(a.post_one(datagram(3, IBV_WR_SEND, &to, b.qpn()), 0, 16), 0);
    a.wait_ok(2);
    a.wait_ok(3);
    assert_eq!(b.wait_ok(5).byte_len as usize, GRH + 16);
    assert!(b.poll().is_none());
}

#[test]
fn a_failed_send_shows_as_sqe_and_rts_resumes() {
    let (a, b) = (ready_end(), ready_end());
    let to = Handle::new(&a, way_to(&b));
    let mut sge = a.sge(0, 8);
    sge.lkey ^= 0x0100_0000;
    let mut request = datagram(1, IBV_WR_SEND, &to, b.qpn());
    request.sg_list = &raw mut sge;
    request.num_sge = 1;
    assert_eq!(a.post(&mut request), 0);
    let wc = a.wait();
    assert_eq!((wc.wr_id, wc.status), (1, IBV_WC_LOC_PROT_ERR));
    assert_eq!(a.state(), IBV_QPS_SQE);
    let mut request = datagram(2, IBV_WR_SEND, &to, b.qpn());
    assert_eq!(a.post(&mut request), 0);
    assert_eq!(a.wait().status, IBV_WC_WR_FLUSH_ERR);
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_RTS;
    attr.cur_qp_state = IBV_QPS_SQE;
    assert_eq!(a.modify(&mut attr, IBV_QP_STATE | IBV_QP_CUR_STATE), 0);
    assert_eq!(b.post_recv(5, 0, 200), 0);
    assert_eq!(a.post(&mut datagram(3, IBV_WR_SEND, &to, b.qpn())), 0);
    a.wait_ok(3);
    b.wait_ok(5);
}

#[test]
fn address_handles_need_a_way_that_exists() {
    let end = ready_end();
    let good = way_to(&end);
    let refused = |change: fn(&mut ibv_ah_attr)| {
        let mut attr = good;
        change(&mut attr);
        let ah = unsafe { (verbs().create_ah)(end.pd, &raw mut attr) };
        assert!(ah.is_null());
        errno()
    };
    assert_eq!(refused(|attr| attr.is_global = 0), libc::EINVAL);
    assert_eq!(refused(|attr| attr.port_num = 2), libc::EINVAL);
    assert_eq!(refused(|attr| attr.grh.sgid_index = 1), libc::EINVAL);
    assert_eq!(refused(|attr| attr.grh.dgid.raw = [0xff; 16]), libc::EINVAL);
    assert!(unsafe { (verbs().create_ah)(end.pd, ptr::null_mut()) }.is_null());
    let mut attr: ibv_device_attr = unsafe { mem::zeroed() };
    assert_eq!(
        unsafe { (verbs().query_device)(end.context, &raw mut attr) },
        0
    );
    assert!(attr.max_ah > 1000);

    let pd = unsafe { (verbs().alloc_pd)(end.context) };
    let mut attr = good;
    let ah = unsafe { (verbs().create_ah)(pd, &raw mut attr) };
    assert_eq!(unsafe { ((*ah).context, (*ah).pd) }, (end.context, pd));
    assert_eq!(unsafe { (verbs().dealloc_pd)(pd) }, libc::EBUSY);
    assert_eq!(unsafe { (verbs().destroy_ah)(ah) }, 0);
    assert_eq!(unsafe { (verbs().dealloc_pd)(pd) }, 0);
}

#[test]
fn only_an_ip_header_tells_the_way_back() {
    let end = ready_end();
    let mut wc: ibv_wc = unsafe { mem::zeroed() };
    let mut grh: ibv_grh = unsafe { mem::zeroed() };
    let mut attr = zeroed_attr().ah_attr;
    for (flags, expected) in [(0, libc::EINVAL), (IBV_WC_GRH, libc::EPROTONOSUPPORT)] {
        wc.wc_flags = flags;
        let init = verbs().init_ah_from_wc;
        let result = unsafe { init(end.context, 1, &raw mut wc, &raw mut grh, &raw mut attr) };
        assert_eq!((result, errno()), (-1, expected));
        let create = verbs().create_ah_from_wc;
        assert!(unsafe { create(end.pd, &raw mut wc, &raw mut grh, 1) }.is_null());
        assert_eq!(errno(), expected);
    }
}

#[test]
fn attributes_are_those_of_datagrams() {
    let end = new_end();
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_INIT;
    attr.port_num = 1;
    attr.qkey = QKEY;
    let connections = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
    assert_eq!(end.modify(&mut attr, connections), libc::EINVAL);
    assert_eq!(
        end.modify(&mut attr, INIT_MASK & !IBV_QP_QKEY),
        libc::EINVAL
    );
    assert_eq!(end.modify(&mut attr, INIT_MASK), 0);
    let (mut shown, mut init) = (zeroed_attr(), end.init_attr());
    let result = unsafe { (verbs().query_qp)(end.qp, &raw mut shown, -1, &raw mut init) };
    assert_eq!(result, 0);
    assert_eq!((shown.qp_state, shown.qkey), (IBV_QPS_INIT, QKEY));
    assert_eq!(init.qp_type, IBV_QPT_UD);
}

#[test]
fn nothing_but_datagrams_is_posted() {
    let (a, b) = (ready_end(), ready_end());
    let to = Handle::new(&a, way_to(&b));
    for opcode in [
        IBV_WR_RDMA_WRITE,
        IBV_WR_RDMA_READ,
        IBV_WR_ATOMIC_FETCH_AND_ADD,
        IBV_WR_SEND_WITH_INV,
    ] {
        let mut request = datagram(1, opcode, &to, b.qpn());
        assert_eq!(a.post(&mut request), libc::EINVAL);
    }
    let nowhere = mem::ManuallyDrop::new(Handle(ptr::null_mut()));
    let mut request = datagram(1, IBV_WR_SEND, &nowhere, b.qpn());
    assert_eq!(a.post(&mut request), libc::EINVAL);
}
