//! Unreliable connections.

use rdma_core_bindings::*;

use crate::support::*;

const INIT_MASK: u32 = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
const UC_RTR_MASK: u32 =
    IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;

/// A device whose queue pair is for an unreliable connection, in RESET.
fn new_end() -> End {
    let mut end = End::new(Options::default());
    let mut init = end.init_attr();
    init.qp_type = IBV_QPT_UC;
    end.qp = create_qp(&end.pd, &mut init).unwrap();
    end
}

fn connect_to(end: &End, peer: &End) {
    end.to_init();
    let mut attr = rtr_attr(peer.device.address(), peer.qpn());
    assert_eq!(end.modify(&mut attr, UC_RTR_MASK), 0);
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_RTS;
    attr.sq_psn = 0xff_fffe;
    assert_eq!(end.modify(&mut attr, IBV_QP_STATE | IBV_QP_SQ_PSN), 0);
}

fn unreliable_pair() -> (End, End) {
    let (a, b) = (new_end(), new_end());
    connect_to(&a, &b);
    connect_to(&b, &a);
    (a, b)
}

#[test]
fn sends_and_writes_arrive_with_their_immediates() {
    let (a, b) = unreliable_pair();
    for (wr_id, len) in (1..).zip([0, 1, 4095, 4096, 4097, 60_001]) {
        for opcode in [
            IBV_WR_SEND,
            IBV_WR_SEND_WITH_IMM,
            IBV_WR_RDMA_WRITE_WITH_IMM,
        ] {
            let bytes = pattern(len, opcode.to_le_bytes()[0]);
            a.memory.write(0, &bytes);
            assert_eq!(b.post_recv(wr_id, 100_000, 65_536), 0);
            let mut request = rdma(wr_id, opcode, &b, 200_000);
            let has_imm = opcode != IBV_WR_SEND;
            if has_imm {
                request.__bindgen_anon_1.imm_data = 0x0102_0304_u32.to_be();
            }
            assert_eq!(a.post_one(request, 0, len), 0);
            let sent = a.wait_ok(wr_id);
            let received = b.wait_ok(wr_id);
            assert_eq!(
                (received.byte_len as usize, received.src_qp),
                (len, a.qpn())
            );
            assert_eq!(received.wc_flags, if has_imm { IBV_WC_WITH_IMM } else { 0 });
            let is_write = opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
            let (place, expected) = if is_write {
                (200_000, (IBV_WC_RDMA_WRITE, IBV_WC_RECV_RDMA_WITH_IMM))
            } else {
                (100_000, (IBV_WC_SEND, IBV_WC_RECV))
            };
            assert_eq!((sent.opcode, received.opcode), expected);
            if has_imm {
                assert_eq!(imm_data(&received), 0x0102_0304_u32.to_be());
            }
            assert_eq!(b.memory.read(place, len), bytes);
        }
    }
}

#[test]
fn what_the_peer_refuses_nobody_hears_of() {
    let (a, b) = unreliable_pair();
    let mut wrong_key = rdma(1, IBV_WR_RDMA_WRITE, &b, 0);
    wrong_key.wr.rdma.rkey = b.rkey() ^ 1;
    assert_eq!(a.post_one(wrong_key, 0, 5000), 0);
    a.wait_ok(1);
    // No receive is posted.
    assert_eq!(a.post_one(wr(2, IBV_WR_SEND), 0, 5000), 0);
    a.wait_ok(2);
    let last = rdma(3, IBV_WR_RDMA_WRITE, &b, 64);
    a.memory.store(0, 77);
    assert_eq!(a.post_one(last, 0, 8), 0);
    a.wait_ok(3);
    let begun = std::time::Instant::now();
    while b.memory.load(64) != 77 {
        assert!(begun.elapsed() < PATIENCE, "the last WRITE arrives");
        assert!(b.poll().is_none());
    }
    assert_eq!((a.state(), b.state()), (IBV_QPS_RTS, IBV_QPS_RTS));
    assert_eq!(b.memory.read(0, 64), [0; 64]);
}

#[test]
fn requests_that_need_answers_are_einval() {
    let (a, b) = unreliable_pair();
    for opcode in [
        IBV_WR_RDMA_READ,
        IBV_WR_ATOMIC_FETCH_AND_ADD,
        IBV_WR_ATOMIC_CMP_AND_SWP,
        IBV_WR_SEND_WITH_INV,
    ] {
        let request = rdma(1, opcode, &b, 0);
        assert_eq!(a.post_one(request, 0, 8), libc::EINVAL, "opcode {opcode}");
    }
}

#[test]
fn states_take_no_attributes_of_retries_and_reads() {
    let (a, b) = (new_end(), new_end());
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_INIT;
    attr.port_num = 1;
    let no_access = INIT_MASK & !IBV_QP_ACCESS_FLAGS;
    assert_eq!(a.modify(&mut attr, no_access), libc::EINVAL);
    a.to_init();
    let mut attr = rtr_attr(b.device.address(), b.qpn());
    assert_eq!(a.modify(&mut attr, RTR_MASK), libc::EINVAL, "as for RC");
    assert_eq!(a.modify(&mut attr, UC_RTR_MASK), 0);
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_RTS;
    let mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
    let einval = libc::EINVAL;
    assert_eq!(a.modify(&mut attr, mask | IBV_QP_TIMEOUT), einval);
    assert_eq!(a.modify(&mut attr, mask), 0);
    let (attr, init) = query_qp(&a.qp, IBV_QP_STATE);
    assert_eq!((attr.qp_state, init.qp_type), (IBV_QPS_RTS, IBV_QPT_UC));
    assert_eq!((attr.dest_qp_num, attr.timeout), (b.qpn(), 0));
}

#[test]
fn a_send_that_fails_ends_in_sqe_and_the_queue_resumes() {
    let (a, b) = unreliable_pair();
    assert_eq!(b.post_recv(9, 0, 64), 0);
    let len = a.memory.len();
    assert_eq!(a.post_one(wr(1, IBV_WR_SEND), len - 4, 8), 0);
    let failed = a.wait();
    assert_eq!((failed.wr_id, failed.status), (1, IBV_WC_LOC_PROT_ERR));
    assert_eq!(a.state(), IBV_QPS_SQE);
    assert_eq!(a.post_one(wr(2, IBV_WR_SEND), 0, 8), 0);
    assert_eq!(a.wait().status, IBV_WC_WR_FLUSH_ERR);
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_RTS;
    assert_eq!(a.modify(&mut attr, IBV_QP_STATE), 0);
    assert_eq!(a.post_one(wr(3, IBV_WR_SEND), 0, 8), 0);
    a.wait_ok(3);
    b.wait_ok(9);
}

/// A queue pair made with `ibv_create_qp_ex` has the functions that exist here, and no others.
#[test]
fn extended_queue_pairs_post_what_the_service_has() {
    let end = End::new(Options::default());
    let offered = [
        IBV_QP_EX_WITH_SEND,
        IBV_QP_EX_WITH_SEND_WITH_IMM,
        IBV_QP_EX_WITH_RDMA_WRITE,
        IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM,
        IBV_QP_EX_WITH_LOCAL_INV,
        IBV_QP_EX_WITH_BIND_MW,
    ];
    let others = [
        IBV_QP_EX_WITH_RDMA_READ,
        IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD,
        IBV_QP_EX_WITH_SEND_WITH_INV,
    ];
    let create = |ops: u32| {
        let plain = end.init_attr();
        let mut init = ibv_qp_init_attr_ex {
            send_cq: plain.send_cq,
            recv_cq: plain.recv_cq,
            cap: plain.cap,
            qp_type: IBV_QPT_UC,
            comp_mask: IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
            pd: end.pd.ptr(),
            send_ops_flags: ops.into(),
            ..Default::default()
        };
        create_qp_ex(&end.context, &mut init).map(drop)
    };
    assert_eq!(create(offered.iter().fold(0, |all, op| all | op)), Ok(()));
    for op in others {
        assert_eq!(create(op), Err(libc::EOPNOTSUPP));
    }
}
