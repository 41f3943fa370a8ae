//! How each function reports failure, and what it says of the device.

use std::mem;
use std::ptr;

use rdma_core_bindings::*;
use soft_roce::wire::to_ipv6;
use soft_roce::{SoftConfig, SoftDevice};

use crate::support::*;

/// One end without a connection.
fn end() -> End {
    End::new(Options::default())
}

#[test]
fn the_list_shows_live_devices_and_the_device_is_what_it_says() {
    let device = device();
    let name = device.name();
    let mut context = open(&device);
    let listed = context.device;
    assert_eq!(name_of(listed), name);
    // SAFETY: the context keeps it alive.
    let ibv_device {
        node_type,
        transport_type,
        ..
    } = unsafe { *listed };
    assert_eq!(node_type, IBV_NODE_CA);
    assert_eq!(transport_type, IBV_TRANSPORT_IB);
    // SAFETY: as above.
    assert_ne!(unsafe { (verbs().get_device_guid)(listed) }, 0);
    let index_of = verbs().get_device_index.unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { index_of(listed) }, -1);
    drop(device);
    // The context alone keeps it alive.
    assert!(listed_names().contains(&name));
    assert_eq!(context.destroy(), 0);
    assert!(!listed_names().contains(&name), "its last user has gone");
    // SAFETY: NULL is no list.
    unsafe { (verbs().free_device_list)(ptr::null_mut()) };
}

#[test]
fn the_same_address_is_the_same_device_and_free_again_afterwards() {
    let first = device();
    let config = SoftConfig {
        address: Some(first.address()),
        ..SoftConfig::default()
    };
    let again = SoftDevice::bind(config.clone()).expect("this process has it");
    assert_eq!(ptr::from_ref(&*first), ptr::from_ref(&*again));
    drop((first, again));
    for _ in 0..20 {
        SoftDevice::bind(config.clone()).expect("its socket is closed with the last handle");
    }
}

#[test]
fn an_address_of_another_machine_is_refused_by_name() {
    let config = SoftConfig {
        address: Some([192, 0, 2, 1].into()),
        ..SoftConfig::default()
    };
    let error = SoftDevice::bind(config).expect_err("TEST-NET-1 is nobody's");
    assert!(error.to_string().contains("192.0.2.1"), "{error}");
}

#[test]
fn devices_on_another_port_are_a_world_of_their_own() {
    let address = [127, 77, 1, 9].into();
    let on = |port| {
        let config = SoftConfig {
            address: Some(address),
            port: Some(port),
            ..SoftConfig::default()
        };
        SoftDevice::bind(config).expect("the port is free on this address")
    };
    let (first, second) = (on(40_791), on(40_792));
    assert_ne!(ptr::from_ref(&*first), ptr::from_ref(&*second));
}

#[test]
fn the_context_is_extended_and_its_attributes_are_those_of_roce() {
    let end = end();
    // SAFETY: a live context.
    assert!(!unsafe { verbs_get_ctx(end.context.ptr()) }.is_null());
    let attr = device_attr(&end.context);
    assert_eq!((attr.phys_port_cnt, attr.max_pkeys), (1, 1));
    assert_ne!(
        attr.vendor_id, 0,
        "programs take 0 for an answer that is missing"
    );
    assert_eq!(attr.atomic_cap, IBV_ATOMIC_HCA);
    assert!(attr.max_qp >= 1024 && attr.max_qp_rd_atom == 128 && attr.max_cqe >= 65_536);
    let mut attr_ex = ibv_device_attr_ex::default();
    let context = end.context.ptr();
    // SAFETY: a live context and a place for the result.
    let result = unsafe { ibv_query_device_ex(verbs(), context, ptr::null(), &raw mut attr_ex) };
    assert_eq!((result, attr_ex.orig_attr.max_qp), (0, attr.max_qp));
    assert_eq!(attr_ex.phys_port_cnt_ex, 1);
    let port = port_attr(&end.context, 1).unwrap();
    assert_eq!(
        (port.state, port.active_mtu),
        (IBV_PORT_ACTIVE, IBV_MTU_4096)
    );
    assert_eq!((port.gid_tbl_len, port.pkey_tbl_len), (16, 1));
    assert_eq!(u32::from(port.link_layer), IBV_LINK_LAYER_ETHERNET);
    assert_eq!(port_attr(&end.context, 2).err(), Some(libc::EINVAL));
}

#[test]
fn the_compat_query_writes_no_more_than_old_programs_have_room_for() {
    let end = end();
    let mut port = ibv_port_attr {
        port_cap_flags2: 0xa5a5,
        ..Default::default()
    };
    let place = (&raw mut port).cast();
    // SAFETY: a live context and a place for the result.
    let result = unsafe { (verbs().query_port)(end.context.ptr(), 1, place) };
    assert_eq!(
        (result, port.state, port.port_cap_flags2),
        (0, IBV_PORT_ACTIVE, 0xa5a5)
    );
}

#[test]
fn the_gid_is_the_mapped_address() {
    let end = end();
    let context = end.context.ptr();
    let expected = to_ipv6(end.device.address()).octets();
    let query_gid = |index| {
        let mut gid = ibv_gid::default();
        clear_errno();
        // SAFETY: a live context and a place for the result.
        let result = unsafe { (verbs().query_gid)(context, 1, index, &raw mut gid) };
        (result, errno(), gid_bytes(gid))
    };
    assert_eq!(query_gid(0), (0, 0, expected));
    // Nothing is in the other places of the table.
    assert_eq!(query_gid(15), (0, 0, [0; 16]));
    assert_eq!(query_gid(16), (-1, libc::EINVAL, [0; 16]));
    assert_eq!(query_gid(-1), (-1, libc::EINVAL, [0; 16]));
    let query_gid_ex = |index| {
        let mut entry = ibv_gid_entry::default();
        // SAFETY: as above.
        let result = unsafe { ibv_query_gid_ex(verbs(), context, 1, index, &raw mut entry, 0) };
        (result, entry)
    };
    let (result, entry) = query_gid_ex(0);
    assert_eq!((result, gid_bytes(entry.gid)), (0, expected));
    assert_eq!(entry.gid_type, IBV_GID_TYPE_ROCE_V2);
    assert_ne!(entry.ndev_ifindex, 0);
    assert_eq!(query_gid_ex(15).0, libc::ENODATA);
    assert_eq!(query_gid_ex(16).0, libc::EINVAL);
    let query_gid_table = |room, flags| {
        let mut table = [ibv_gid_entry::default(); 4];
        let first = table.as_mut_ptr();
        // SAFETY: a live context and places for the results.
        let result = unsafe { ibv_query_gid_table(verbs(), context, first, room, flags) };
        (result, gid_bytes(table[0].gid))
    };
    assert_eq!(query_gid_table(4, 0), (1, expected));
    let einval = -isize::try_from(libc::EINVAL).unwrap();
    let (no_room, _) = query_gid_table(0, 0);
    assert_eq!(no_room, einval, "no room for the only entry");
    assert_eq!(query_gid_table(4, 1).0, einval);
    let query_pkey = |index| {
        let mut pkey = 0;
        // SAFETY: a live context and a place for the result.
        let result = unsafe { (verbs().query_pkey)(context, 1, index, &raw mut pkey) };
        (result, u16::from_be(pkey))
    };
    assert_eq!(query_pkey(0), (0, 0xffff));
    assert_eq!(query_pkey(1).0, -1);
    let index_of = verbs().get_pkey_index.unwrap();
    // SAFETY: a live context.
    let index_of = |pkey: u16| unsafe { index_of(context, 1, pkey.to_be()) };
    assert_eq!((index_of(0xffff), index_of(0x1234)), (0, -1));
}

#[test]
fn nothing_is_destroyed_before_its_children() {
    let mut end = End::new(Options {
        with_channel: true,
        ..Options::default()
    });
    assert_eq!(end.pd.destroy(), libc::EBUSY);
    assert_eq!(end.cq.destroy(), libc::EBUSY);
    let channel = end.channel.as_mut().expect("asked for");
    assert_eq!(channel.destroy(), libc::EBUSY);
}

/// The kernel ends what is left when a device is closed; `ib_send_bw` leaves a completion queue, and
/// reported a failed close.
#[test]
fn closing_a_device_ends_what_is_left() {
    let options = Options {
        timeout: 8,
        retry_cnt: 1,
        ..Options::default()
    };
    let (a, mut b) = pair(options);
    assert_eq!(b.context.destroy(), 0);
    a.memory.write(0, b"too late");
    a.post_one(rdma(1, IBV_WR_RDMA_WRITE, &b, 0), 0, 8);
    assert_eq!(a.wait().status, IBV_WC_RETRY_EXC_ERR);
    assert_eq!(b.memory.load(0), 0);
    // Its objects are of no use and may not be destroyed any more.
    mem::forget(b);
}

#[test]
#[allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "one call after the other, all for one reason"
)]
fn null_is_an_error_by_each_convention_and_never_followed() {
    // SAFETY: NULL is what each of them must refuse.
    unsafe {
        clear_errno();
        assert!((verbs().open_device)(ptr::null_mut()).is_null());
        assert_eq!(errno(), libc::EINVAL);
        assert_eq!((verbs().close_device)(ptr::null_mut()), -1);
        assert!((verbs().alloc_pd)(ptr::null_mut()).is_null());
        assert_eq!((verbs().dealloc_pd)(ptr::null_mut()), libc::EINVAL);
        assert!((verbs().reg_mr)(ptr::null_mut(), ptr::null_mut(), 8, 0).is_null());
        assert_eq!((verbs().dereg_mr)(ptr::null_mut()), libc::EINVAL);
        assert!((verbs().create_comp_channel)(ptr::null_mut()).is_null());
        assert_eq!(
            (verbs().destroy_comp_channel)(ptr::null_mut()),
            libc::EINVAL
        );
        let cq = (verbs().create_cq)(ptr::null_mut(), 1, ptr::null_mut(), ptr::null_mut(), 0);
        assert!(cq.is_null());
        assert_eq!((verbs().resize_cq)(ptr::null_mut(), 1), libc::EINVAL);
        assert_eq!((verbs().destroy_cq)(ptr::null_mut()), libc::EINVAL);
        assert!((verbs().create_qp)(ptr::null_mut(), ptr::null_mut()).is_null());
        assert_eq!(
            (verbs().modify_qp)(ptr::null_mut(), ptr::null_mut(), 0),
            libc::EINVAL
        );
        assert_eq!((verbs().destroy_qp)(ptr::null_mut()), libc::EINVAL);
        clear_errno();
        assert!((verbs().create_ah)(ptr::null_mut(), ptr::null_mut()).is_null());
        assert_eq!(errno(), libc::EINVAL);
        assert_eq!((verbs().destroy_ah)(ptr::null_mut()), libc::EINVAL);
        assert_eq!(
            (verbs().get_async_event)(ptr::null_mut(), ptr::null_mut()),
            -1
        );
        assert!((verbs().get_device_name)(ptr::null_mut()).is_null());
        assert_eq!((verbs().get_device_guid)(ptr::null_mut()), 0);
    }
}

#[test]
fn registration_checks_rights_and_range() {
    let end = end();
    let memory = Memory::new(4096);
    let register = |len: usize, access: u32| match reg_mr(&end.pd, memory.addr(), len, access) {
        Ok(mr) => {
            assert_eq!((mr.addr.cast(), mr.length), (memory.addr(), len));
            assert_eq!(mr.lkey, mr.rkey);
            0
        }
        Err(error) => error,
    };
    assert_eq!(register(4096, ALL), 0);
    assert_eq!(register(4096, 0), 0, "local reading needs no right");
    assert_eq!(
        register(4096, LOCAL | IBV_ACCESS_RELAXED_ORDERING),
        0,
        "a hint"
    );
    assert_eq!(register(4096, IBV_ACCESS_REMOTE_WRITE), libc::EINVAL);
    assert_eq!(register(4096, IBV_ACCESS_REMOTE_ATOMIC), libc::EINVAL);
    assert_ne!(register(usize::MAX, ALL), 0, "beyond the address space");
    assert_eq!(
        register(4096, LOCAL | IBV_ACCESS_ON_DEMAND),
        libc::EINVAL,
        "no ODP here"
    );
    // The second page of the address space is mapped by nobody.
    let unmapped = ptr::without_provenance_mut(4096);
    let refused = reg_mr(&end.pd, unmapped, 4096, ALL);
    assert_eq!(refused.err(), Some(libc::EFAULT));
}

#[test]
fn queue_pairs_get_what_they_ask_for_or_nothing() {
    let end = end();
    let create = |change: fn(&mut ibv_qp_init_attr)| {
        let mut init = end.init_attr();
        change(&mut init);
        create_qp(&end.pd, &mut init).map(|_| init.cap.max_send_wr)
    };
    assert_eq!(create(|_| {}), Ok(64));
    assert_eq!(
        create(|init| init.cap.max_send_wr = 10_000_000),
        Err(libc::EINVAL)
    );
    assert_eq!(
        create(|init| init.cap.max_recv_sge = 1000),
        Err(libc::EINVAL)
    );
    assert_eq!(
        create(|init| init.cap.max_inline_data = 1 << 20),
        Err(libc::EINVAL)
    );
    assert_eq!(
        create(|init| init.send_cq = ptr::null_mut()),
        Err(libc::EINVAL)
    );
    assert_eq!(
        create(|init| init.qp_type = IBV_QPT_RAW_PACKET),
        Err(libc::EOPNOTSUPP)
    );
}

#[test]
fn transitions_that_do_not_exist_are_einval_and_change_nothing() {
    let end = end();
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_RTS;
    assert_eq!(end.modify(&mut attr, IBV_QP_STATE), libc::EINVAL);
    assert_eq!(end.state(), IBV_QPS_RESET);
    end.to_init();
    let address = end.device.address();
    let mut attr = rtr_attr(address, end.qpn());
    assert_eq!(
        end.modify(&mut attr, RTR_MASK & !IBV_QP_AV),
        libc::EINVAL,
        "no path"
    );
    attr.ah_attr.is_global = 0;
    assert_eq!(
        end.modify(&mut attr, RTR_MASK),
        libc::EINVAL,
        "RoCE paths are global"
    );
    attr.ah_attr.is_global = 1;
    attr.path_mtu = 9;
    assert_eq!(end.modify(&mut attr, RTR_MASK), libc::EINVAL, "no such MTU");
    attr.path_mtu = IBV_MTU_1024;
    attr.ah_attr.grh.dgid.raw = [0xfe; 16];
    assert_eq!(
        end.modify(&mut attr, RTR_MASK),
        libc::EINVAL,
        "an IPv6 address"
    );
    assert_eq!(end.state(), IBV_QPS_INIT);
    end.to_rtr(address, end.qpn());
    end.to_rts();
    assert_eq!(end.state(), IBV_QPS_RTS);
    assert_eq!(end.qp.state, IBV_QPS_RTS);
}

#[test]
fn query_shows_what_modify_set() {
    let (a, b) = pair(Options::default());
    let (attr, init) = query_qp(&a.qp, u32::MAX);
    assert_eq!((attr.qp_state, attr.path_mtu), (IBV_QPS_RTS, IBV_MTU_4096));
    assert_eq!(
        (attr.dest_qp_num, attr.rq_psn, attr.sq_psn),
        (b.qpn(), 0xff_fffe, 0xff_fffe)
    );
    assert_eq!((attr.timeout, attr.retry_cnt, attr.rnr_retry), (14, 6, 6));
    assert_eq!((attr.max_rd_atomic, attr.max_dest_rd_atomic), (8, 8));
    assert_eq!((attr.qp_access_flags, attr.min_rnr_timer), (ALL, 12));
    let remote = to_ipv6(b.device.address()).octets();
    assert_eq!(gid_bytes(attr.ah_attr.grh.dgid), remote);
    assert_eq!((init.cap.max_send_wr, init.cap.max_inline_data), (64, 256));
    assert_eq!(init.send_cq, a.cq.ptr());
}

#[test]
fn posting_refuses_what_cannot_be_done() {
    let (a, b) = pair(Options::default());
    let post = |mut request: ibv_send_wr, lens: &[usize]| {
        let mut sges: Vec<_> = lens.iter().map(|len| a.sge(0, *len)).collect();
        request.sg_list = sges.as_mut_ptr();
        request.num_sge = i32::try_from(sges.len()).unwrap();
        a.post(&mut request)
    };
    let write = rdma(1, IBV_WR_RDMA_WRITE, &b, 0);
    assert_eq!(post(write, &[8; 5]), libc::EINVAL, "too many pieces");
    let inline = ibv_send_wr {
        send_flags: IBV_SEND_INLINE,
        ..write
    };
    assert_eq!(post(inline, &[257]), libc::EINVAL, "inline too long");
    assert_eq!(
        post(inline, &[2000]),
        libc::EINVAL,
        "inline longer than the device has"
    );
    let read = ibv_send_wr {
        send_flags: IBV_SEND_INLINE,
        ..rdma(1, IBV_WR_RDMA_READ, &b, 0)
    };
    assert_eq!(
        post(read, &[8]),
        libc::EINVAL,
        "a READ delivers into memory"
    );
    let mut atomic = wr(1, IBV_WR_ATOMIC_FETCH_AND_ADD);
    atomic.wr.atomic.remote_addr = b.at(4);
    assert_eq!(post(atomic, &[8]), libc::EINVAL, "misaligned");
    assert_eq!(post(wr(1, IBV_WR_BIND_MW), &[]), libc::EINVAL, "no window");
    assert_eq!(post(wr(1, 99), &[]), libc::EINVAL);
    let mut negative = write;
    negative.num_sge = -1;
    assert_eq!(a.post(&mut negative), libc::EINVAL);
    assert!(a.poll().is_none());
    let fresh = end();
    assert_eq!(
        fresh.post(&mut wr(1, IBV_WR_SEND)),
        libc::EINVAL,
        "in RESET"
    );
    assert_eq!(fresh.post_recv(1, 0, 8), libc::EINVAL, "in RESET");
    fresh.to_init();
    assert_eq!(fresh.post_recv(1, 0, 8), 0);
}

#[test]
fn completion_queues_are_bounded_and_can_be_resized() {
    let end = end();
    for (cqe, vector) in [(0, 0), (-1, 0), (i32::MAX, 0), (1, 1)] {
        let refused = create_cq(&end.context, cqe, None, vector);
        assert_eq!(refused.err(), Some(libc::EINVAL));
    }
    assert!(end.cq.cqe >= 256);
    assert_eq!(resize_cq(&end.cq, 1000), 0);
    assert!(end.cq.cqe >= 1000);
    assert_eq!(resize_cq(&end.cq, 0), libc::EINVAL);
}

#[test]
fn what_the_device_does_not_have_says_so() {
    let end = end();
    let qp = end.qp.ptr();
    // SAFETY: a live queue pair, as below.
    let attached = unsafe { (verbs().attach_mcast)(qp, ptr::null(), 0) };
    assert_eq!(attached, libc::EOPNOTSUPP);
    let set_ece = verbs().set_ece.unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { set_ece(qp, ptr::null_mut()) }, libc::EOPNOTSUPP);
    let extended = verbs().qp_to_qp_ex.unwrap();
    // SAFETY: as above.
    assert!(unsafe { extended(qp) }.is_null());
    // SAFETY: needs nothing.
    assert_eq!(unsafe { (verbs().fork_init)() }, 0);
}

#[test]
#[allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "one call after the other, all for one reason"
)]
fn names_are_never_null() {
    // SAFETY: functions of numbers.
    unsafe {
        assert_eq!(text((verbs().wc_status_str)(IBV_WC_SUCCESS)), "success");
        assert_eq!(text((verbs().wc_status_str)(4711)), "unknown");
        assert_eq!(text((verbs().port_state_str)(IBV_PORT_ACTIVE)), "active");
        assert_eq!(text((verbs().node_type_str)(-1)), "unknown");
        assert_eq!(
            text((verbs().event_type_str)(IBV_EVENT_CQ_ERR)),
            "completion queue error"
        );
        assert_eq!((verbs().rate_to_mbps)(IBV_RATE_100_GBPS), 103_125);
        assert_eq!((verbs().mult_to_ibv_rate)(4), IBV_RATE_10_GBPS);
        assert_eq!((verbs().mult_to_ibv_rate)(-1), IBV_RATE_MAX);
    }
}
