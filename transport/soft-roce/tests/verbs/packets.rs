//! Every operation, at every length class and path MTU. The bytes are checked here, the packets by
//! `.ci/packets`, which runs this test with `FARLOG_PCAP` set.

use rdma_core_bindings::*;

use crate::support::*;
use crate::windows::{alloc, bind_wr, info, invalidate_wr};

const MTUS: [(u32, usize); 5] = [
    (IBV_MTU_256, 256),
    (IBV_MTU_512, 512),
    (IBV_MTU_1024, 1024),
    (IBV_MTU_2048, 2048),
    (IBV_MTU_4096, 4096),
];
/// Where the peer receives, and what it gives.
const RECEIVED: usize = 20_000;
const REMOTE: usize = 40_000;

/// Around every boundary of padding and segmentation.
fn lengths(mtu: usize) -> [usize; 12] {
    [
        0,
        1,
        2,
        3,
        4,
        5,
        mtu - 1,
        mtu,
        mtu + 1,
        2 * mtu,
        2 * mtu + 1,
        3 * mtu + 2,
    ]
}

fn pair_at(mtu: u32) -> (End, End) {
    let options = Options {
        mr_access: ALL | IBV_ACCESS_MW_BIND,
        ..Options::default()
    };
    let ends = (End::new(options), End::new(options));
    for (end, peer) in [(&ends.0, &ends.1), (&ends.1, &ends.0)] {
        end.to_init();
        let mut attr = rtr_attr(peer.device.address(), peer.qpn());
        attr.path_mtu = mtu;
        assert_eq!(end.modify(&mut attr, RTR_MASK), 0);
        end.to_rts();
    }
    ends
}

/// Sends `len` bytes with `opcode`, and checks where they arrive.
fn exchange(a: &End, b: &End, opcode: ibv_wr_opcode, len: usize) {
    let bytes = pattern(len, opcode.to_le_bytes()[0]);
    let takes_receive = !matches!(opcode, IBV_WR_RDMA_WRITE | IBV_WR_RDMA_READ);
    if takes_receive {
        assert_eq!(b.post_recv(9, RECEIVED, 16_384), 0);
    }
    let (source, target) = match opcode {
        IBV_WR_RDMA_READ => (b, a),
        _ => (a, b),
    };
    let (from, to) = match opcode {
        IBV_WR_RDMA_READ => (REMOTE, 0),
        IBV_WR_SEND | IBV_WR_SEND_WITH_IMM => (0, RECEIVED),
        _ => (0, REMOTE),
    };
    source.memory.write(from, &bytes);
    let mut request = match opcode {
        IBV_WR_SEND | IBV_WR_SEND_WITH_IMM => wr(1, opcode),
        _ => rdma(1, opcode, b, REMOTE),
    };
    request.__bindgen_anon_1.imm_data = 0x0102_0304_u32.to_be();
    assert_eq!(a.post_one(request, 0, len), 0);
    a.wait_ok(1);
    if takes_receive {
        assert_eq!(b.wait_ok(9).byte_len as usize, len);
    }
    assert_eq!(target.memory.read(to, len), bytes, "{len} bytes");
}

/// Sends `len` bytes, and revokes a window with them.
fn send_and_invalidate(a: &End, b: &End, len: usize) {
    let mw = alloc(b, IBV_MW_TYPE_2);
    let (mut request, rkey) = bind_wr(5, &mw, info(b, REMOTE, 100));
    assert_eq!(b.post(&mut request), 0);
    b.wait_ok(5);
    assert_eq!(b.post_recv(9, RECEIVED, 16_384), 0);
    let request = invalidate_wr(1, IBV_WR_SEND_WITH_INV, rkey);
    assert_eq!(a.post_one(request, 0, len), 0);
    a.wait_ok(1);
    assert_eq!(b.wait_ok(9).wc_flags, IBV_WC_WITH_INV);
}

#[test]
fn every_operation_at_every_length_and_mtu() {
    for (mtu, mtu_len) in MTUS {
        let (a, b) = pair_at(mtu);
        for opcode in [
            IBV_WR_SEND,
            IBV_WR_SEND_WITH_IMM,
            IBV_WR_RDMA_WRITE,
            IBV_WR_RDMA_WRITE_WITH_IMM,
            IBV_WR_RDMA_READ,
        ] {
            for len in lengths(mtu_len) {
                exchange(&a, &b, opcode, len);
            }
        }
        for len in [0, 5, 2 * mtu_len + 1] {
            send_and_invalidate(&a, &b, len);
        }
        for opcode in [IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_CMP_AND_SWP] {
            let mut request = wr(1, opcode);
            request.wr.atomic.remote_addr = b.at(REMOTE);
            request.wr.atomic.rkey = b.rkey();
            request.wr.atomic.compare_add = 1;
            let before = b.memory.load(REMOTE);
            assert_eq!(a.post_one(request, 0, 8), 0);
            a.wait_ok(1);
            assert_eq!(a.memory.load(0), before);
        }
    }
}
