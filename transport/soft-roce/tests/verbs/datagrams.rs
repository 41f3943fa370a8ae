//! Queue pairs for datagrams and address handles.

use std::mem;
use std::ptr;

use rdma_core_bindings::*;
use soft_roce::wire::{grh_addresses, ipv6_header, to_ipv6};

use crate::support::*;

const QKEY: u32 = 0x1111_1111;
const GRH: usize = 40;
const INIT_MASK: u32 = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY;

/// A queue pair for datagrams of `end`, in RESET.
fn datagram_qp(end: &End) -> Qp {
    let mut init = end.init_attr();
    init.qp_type = IBV_QPT_UD;
    create_qp(&end.pd, &mut init).unwrap()
}

/// A device whose queue pair is for datagrams, in RESET.
fn new_end() -> End {
    with_datagrams(End::new(Options::default()))
}

/// The same end with a queue pair for datagrams, in RESET.
fn with_datagrams(mut end: End) -> End {
    end.qp = datagram_qp(&end);
    end
}

/// The same, ready to send.
fn ready_end() -> End {
    ready(new_end())
}

fn ready(end: End) -> End {
    make_ready(&end);
    end
}

fn make_ready(end: &End) {
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
}

/// The way to a device.
fn way_to(end: &End) -> ibv_ah_attr {
    rtr_attr(end.device.address(), 0).ah_attr
}

/// An address handle of `from` that leads to `to`.
fn handle(from: &End, to: &End) -> Ah {
    create_ah(&from.pd, way_to(to)).unwrap()
}

fn datagram(wr_id: u64, opcode: ibv_wr_opcode, to: &Ah, qpn: u32) -> ibv_send_wr {
    let mut request = wr(wr_id, opcode);
    request.wr.ud.ah = to.ptr();
    request.wr.ud.remote_qpn = qpn;
    request.wr.ud.remote_qkey = QKEY;
    request
}

/// The bytes in front of the data received at `byte_offset`.
fn grh_at(end: &End, byte_offset: usize) -> ibv_grh {
    let bytes: [u8; GRH] = end.memory.read(byte_offset, GRH).try_into().unwrap();
    // SAFETY: integers and GIDs, which any bytes are.
    unsafe { mem::transmute(bytes) }
}

/// The way back to a sender: 0, or the result and errno.
fn init_ah(context: &Context, mut wc: ibv_wc, mut grh: ibv_grh) -> Result<ibv_ah_attr, (i32, i32)> {
    let mut attr = ibv_ah_attr::default();
    let init = verbs().init_ah_from_wc;
    clear_errno();
    // SAFETY: a live context, a completion, a header and a place for the result.
    match unsafe { init(context.ptr(), 1, &raw mut wc, &raw mut grh, &raw mut attr) } {
        0 => Ok(attr),
        result => Err((result, errno())),
    }
}

#[test]
fn one_sender_reaches_many_and_each_can_answer() {
    let a = ready_end();
    let others = [ready_end(), ready_end(), ready_end()];
    a.memory.write(0, b"to everyone");
    for (wr_id, b) in (1..).zip(&others) {
        assert_eq!(b.post_recv(wr_id, 100, GRH + 64), 0);
        let handle = handle(&a, b);
        let mut request = datagram(wr_id, IBV_WR_SEND_WITH_IMM, &handle, b.qpn());
        request.__bindgen_anon_1.imm_data = 0x0102_0304_u32.to_be();
        assert_eq!(a.post_one(request, 0, 11), 0);
        // Posted requests do not need the handle any more.
        drop(handle);
        assert_eq!(a.wait_ok(wr_id).opcode, IBV_WC_SEND);

        let wc = b.wait_ok(wr_id);
        assert_eq!((wc.opcode, wc.byte_len as usize), (IBV_WC_RECV, GRH + 11));
        assert_eq!(wc.wc_flags, IBV_WC_GRH | IBV_WC_WITH_IMM);
        assert_eq!((wc.src_qp, wc.qp_num), (a.qpn(), b.qpn()));
        assert_eq!(imm_data(&wc), 0x0102_0304_u32.to_be());
        assert_eq!(b.memory.read(100 + GRH, 11), b"to everyone");

        let grh = grh_at(b, 100);
        let attr = init_ah(&b.context, wc, grh).unwrap();
        let back = create_ah_from_wc(&b.pd, wc, grh).unwrap();
        let expected = to_ipv6(a.device.address()).octets();
        assert_eq!(gid_bytes(attr.grh.dgid), expected);
        assert_eq!((attr.is_global, attr.port_num), (1, 1));
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
fn over_ipv6_the_header_itself_stands_in_front() {
    let Some(device) = ipv6_device() else {
        return;
    };
    let end = ready(with_datagrams(End::on(device, Options::default())));
    let address = end.device.address();
    let to = handle(&end, &end);
    end.memory.write(0, b"to myself");
    assert_eq!(end.post_recv(5, 100, GRH + 64), 0);
    let request = datagram(1, IBV_WR_SEND, &to, end.qpn());
    assert_eq!(end.post_one(request, 0, 9), 0);
    let (send, mut receive) = (end.wait(), end.wait());
    if send.opcode == IBV_WC_RECV {
        receive = send;
    }
    assert_eq!((receive.wr_id, receive.wc_flags), (5, IBV_WC_GRH));
    assert_eq!(end.memory.read(100 + GRH, 9), b"to myself");
    // BTH, DETH, payload, pad, ICRC.
    let header = ipv6_header(to_ipv6(address), to_ipv6(address), 12 + 8 + 9 + 3 + 4);
    assert_eq!(end.memory.read(100, GRH), header);
    assert_eq!(grh_addresses(&header), Some((address, address)));

    let mut attr = init_ah(&end.context, receive, grh_at(&end, 100)).unwrap();
    assert_eq!(gid_bytes(attr.grh.dgid), to_ipv6(address).octets());
    attr.grh.dgid.raw = to_ipv6([127, 0, 0, 1].into()).octets();
    assert_eq!(create_ah(&end.pd, attr).err(), Some(libc::EINVAL));
}

#[test]
fn a_wrong_key_and_a_missing_receive_are_silence() {
    let (a, b) = (ready_end(), ready_end());
    let to = handle(&a, &b);
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
    let to = handle(&a, &b);
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
        create_ah(&end.pd, attr).err()
    };
    assert_eq!(refused(|attr| attr.is_global = 0), Some(libc::EINVAL));
    assert_eq!(refused(|attr| attr.port_num = 2), Some(libc::EINVAL));
    assert_eq!(refused(|attr| attr.grh.sgid_index = 1), Some(libc::EINVAL));
    assert_eq!(
        refused(|attr| attr.grh.dgid.raw = [0xff; 16]),
        Some(libc::EINVAL)
    );
    // SAFETY: NULL for the attributes must be refused.
    assert!(unsafe { (verbs().create_ah)(end.pd.ptr(), ptr::null_mut()) }.is_null());
    assert!(device_attr(&end.context).max_ah > 1000);

    let mut pd = alloc_pd(&end.context);
    let mut ah = create_ah(&pd, good).unwrap();
    assert_eq!((ah.context, ah.pd), (end.context.ptr(), pd.ptr()));
    assert_eq!(pd.destroy(), libc::EBUSY);
    assert_eq!((ah.destroy(), pd.destroy()), (0, 0));
}

#[test]
fn only_an_ip_header_tells_the_way_back() {
    let end = ready_end();
    let grh = ibv_grh::default();
    for (wc_flags, expected) in [(0, libc::EINVAL), (IBV_WC_GRH, libc::EPROTONOSUPPORT)] {
        let wc = ibv_wc {
            wc_flags,
            ..Default::default()
        };
        let refused = init_ah(&end.context, wc, grh);
        assert_eq!(refused.err(), Some((-1, expected)));
        let refused = create_ah_from_wc(&end.pd, wc, grh);
        assert_eq!(refused.err(), Some(expected));
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
    let (shown, init) = query_qp(&end.qp, u32::MAX);
    assert_eq!((shown.qp_state, shown.qkey), (IBV_QPS_INIT, QKEY));
    assert_eq!(init.qp_type, IBV_QPT_UD);
}

#[test]
fn nothing_but_datagrams_is_posted() {
    let (a, b) = (ready_end(), ready_end());
    let to = handle(&a, &b);
    for opcode in [
        IBV_WR_RDMA_WRITE,
        IBV_WR_RDMA_READ,
        IBV_WR_ATOMIC_FETCH_AND_ADD,
        IBV_WR_SEND_WITH_INV,
    ] {
        let mut request = datagram(1, opcode, &to, b.qpn());
        assert_eq!(a.post(&mut request), libc::EINVAL);
    }
    let mut request = datagram(1, IBV_WR_SEND, &to, b.qpn());
    request.wr.ud.ah = ptr::null_mut();
    assert_eq!(a.post(&mut request), libc::EINVAL);
}

/// Two queue pairs of one device take from one queue, and the one that fails leaves the rest to the other.
#[test]
fn a_shared_request_is_for_the_datagram_that_fits_it() {
    let a = ready_end();
    let mut b = End::new(Options::default());
    b.srq = Some(create_srq(&b.pd, 8, 4).unwrap());
    b.qp = datagram_qp(&b);
    make_ready(&b);
    let other = datagram_qp(&b);
    let mut first = mem::replace(&mut b.qp, other);
    make_ready(&b);
    let (to, qpns) = (handle(&a, &b), [first.qp_num, b.qpn()]);
    let srq = b.srq.as_ref().unwrap();
    for (wr_id, byte_offset) in (0..3).zip([100, 200, 300]) {
        let mut sges = [b.sge(byte_offset, GRH + 8)];
        assert_eq!(post_srq_recv(srq, &mut recv_wr(wr_id, &mut sges)).0, 0);
    }
    let mut wrong_key = datagram(7, IBV_WR_SEND, &to, qpns[0]);
    wrong_key.wr.ud.remote_qkey = QKEY + 1;
    assert_eq!(a.post_one(wrong_key, 0, 8), 0);
    let too_long = datagram(8, IBV_WR_SEND, &to, qpns[0]);
    assert_eq!(a.post_one(too_long, 0, 9), 0);
    a.memory.write(0, b"it fits.");
    for (wr_id, qpn) in [(0, qpns[0]), (1, qpns[1])] {
        assert_eq!(a.post_one(datagram(9, IBV_WR_SEND, &to, qpn), 0, 8), 0);
        let wc = b.wait_ok(wr_id);
        assert_eq!((wc.qp_num, wc.byte_len as usize), (qpn, GRH + 8));
        let byte_offset = 100 * (1 + usize::try_from(wr_id).unwrap());
        assert_eq!(b.memory.read(byte_offset + GRH, 8), b"it fits.");
    }
    mem::swap(&mut b.qp, &mut first);
    assert_eq!(b.post_recv(1, 0, 64), libc::EINVAL);
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_ERR;
    assert_eq!(b.modify(&mut attr, IBV_QP_STATE), 0);
    let event = AsyncEvent::wait(&b.context).unwrap();
    assert_eq!(event.event_type(), IBV_EVENT_QP_LAST_WQE_REACHED);
    assert!(event.is_about(&b.qp));
    assert!(b.poll().is_none(), "nothing is flushed");
    drop(event);
    let request = datagram(9, IBV_WR_SEND, &to, qpns[1]);
    assert_eq!(a.post_one(request, 0, 8), 0);
    assert_eq!(b.wait_ok(2).qp_num, qpns[1]);
}
