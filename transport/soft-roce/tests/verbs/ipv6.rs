//! Connections between two queue pairs of one device on `::1`: a machine has no other IPv6 address for
//! sure.

use rdma_core_bindings::*;
use soft_roce::wire::to_ipv6;
use soft_roce::{SoftConfig, SoftDevice};

use crate::support::*;

fn ipv6_pair() -> Option<(End, End)> {
    let device = ipv6_device()?;
    let [a, b] = [device.clone(), device].map(|device| End::on(device, Options::default()));
    Some(connected(a, b))
}

#[test]
fn every_operation_arrives() {
    let Some((a, b)) = ipv6_pair() else {
        return;
    };
    for (wr_id, len) in (1..).zip([0, 1, 4095, 4096, 4097, 300_001]) {
        let bytes = pattern(len, 7);
        a.memory.write(0, &bytes);
        let write = rdma(wr_id, IBV_WR_RDMA_WRITE, &b, 16);
        assert_eq!(a.post_one(write, 0, len), 0);
        a.wait_ok(wr_id);
        assert_eq!(b.memory.read(16, len), bytes, "WRITE of {len} bytes");

        let read = rdma(wr_id, IBV_WR_RDMA_READ, &b, 16);
        assert_eq!(a.post_one(read, 500_000, len), 0);
        a.wait_ok(wr_id);
        assert_eq!(a.memory.read(500_000, len), bytes, "READ of {len} bytes");

        assert_eq!(b.post_recv(100 + wr_id, 400_000, 400_000), 0);
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, len), 0);
        a.wait_ok(wr_id);
        assert_eq!(b.wait_ok(100 + wr_id).byte_len as usize, len);
        assert_eq!(b.memory.read(400_000, len), bytes, "SEND of {len} bytes");
    }
    b.memory.store(8, 40);
    let mut add = wr(50, IBV_WR_ATOMIC_FETCH_AND_ADD);
    add.wr.atomic.remote_addr = b.at(8);
    add.wr.atomic.rkey = b.rkey();
    add.wr.atomic.compare_add = 2;
    assert_eq!(a.post_one(add, 64, 8), 0);
    a.wait_ok(50);
    assert_eq!((a.memory.load(64), b.memory.load(8)), (40, 42));

    let mut wrong_key = rdma(51, IBV_WR_RDMA_WRITE, &b, 0);
    wrong_key.wr.rdma.rkey = b.rkey() ^ 0x0100_0000;
    assert_eq!(a.post_one(wrong_key, 0, 8), 0);
    assert_eq!(a.wait().status, IBV_WC_REM_ACCESS_ERR);
}

#[test]
fn the_address_is_the_gid() {
    let Some(device) = ipv6_device() else {
        return;
    };
    assert_eq!(device.name(), "soft@::1");
    let end = End::on(device, Options::default());
    let address = to_ipv6(end.device.address()).octets();
    let mut entry = ibv_gid_entry::default();
    // SAFETY: a live context and a place for the result.
    let result = unsafe { ibv_query_gid_ex(verbs(), end.context.ptr(), 1, 0, &raw mut entry, 0) };
    assert_eq!((result, entry.gid_type), (0, IBV_GID_TYPE_ROCE_V2));
    assert_eq!(gid_bytes(entry.gid), address);
    assert_ne!(entry.ndev_ifindex, 0, "the loopback interface");
    let port = port_attr(&end.context, 1).unwrap();
    assert_eq!(port.active_mtu, IBV_MTU_4096);

    end.to_init();
    let mut attr = rtr_attr([127, 0, 0, 1].into(), end.qpn());
    let result = end.modify(&mut attr, RTR_MASK);
    assert_eq!(result, libc::EINVAL, "a peer without IPv6 is out of reach");
    attr.ah_attr.grh.dgid.raw = [0; 16];
    let result = end.modify(&mut attr, RTR_MASK);
    assert_eq!(result, libc::EINVAL, "no address");
    end.to_rtr(end.device.address(), end.qpn());
    let (shown, _) = query_qp(&end.qp, u32::MAX);
    assert_eq!(gid_bytes(shown.ah_attr.grh.dgid), address);
}

#[test]
fn a_mapped_address_is_its_ipv4_address() {
    let first = device();
    let config = SoftConfig {
        address: Some(to_ipv6(first.address()).into()),
        ..SoftConfig::default()
    };
    let second = SoftDevice::bind(config).unwrap();
    assert_eq!(second.name(), first.name());
}
