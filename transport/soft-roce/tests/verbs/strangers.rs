//! Datagrams made by hand: from somebody who is no peer, and from a peer in another partition.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use rdma_core_bindings::*;
use soft_roce::link::TxBuf;
use soft_roce::wire::{Headers, Opcode, Packet, Psn, Qpn, ROCE_PORT, Reth};

use crate::support::*;

struct Stranger {
    socket: UdpSocket,
    address: SocketAddr,
}

impl Stranger {
    /// On a free address of the loopback interface.
    fn new() -> Self {
        let socket = (1..255)
            .map(|host| SocketAddrV4::new(Ipv4Addr::new(127, 250, 1, host), ROCE_PORT))
            .find_map(|address| UdpSocket::bind(address).ok())
            .expect("a free loopback address");
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let address = socket.local_addr().unwrap();
        Self { socket, address }
    }

    /// A packet as a peer would send it, ICRC included.
    fn packet(&self, to: &End, headers: &Headers, payload: &[u8]) -> Vec<u8> {
        let mut tx = TxBuf::new(self.address);
        assert!(
            tx.push(to.device.address(), headers, payload.len(), |bytes| {
                bytes.copy_from_slice(payload);
                true
            })
        );
        let (_, bytes) = tx.packets().next().expect("just pushed");
        bytes.to_vec()
    }

    fn send(&self, to: &End, bytes: &[u8]) {
        let to = SocketAddr::new(to.device.address(), ROCE_PORT);
        self.socket.send_to(bytes, to).unwrap();
    }

    fn expect_no_answer(&self) {
        let timeout = Duration::from_millis(50);
        self.socket.set_read_timeout(Some(timeout)).unwrap();
        let mut bytes = [0; 2048];
        let error = self.socket.recv_from(&mut bytes).unwrap_err();
        assert!(matches!(
            error.kind(),
            ErrorKind::WouldBlock | ErrorKind::TimedOut
        ));
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
}

/// A WRITE that would be good from the peer.
fn write_to(end: &End, qpn: u32) -> Headers {
    let mut headers = Headers::new(Opcode::WriteOnly, Qpn::new(qpn), Psn::new(0xff_fffe));
    headers.reth = Some(Reth {
        va: end.at(0),
        rkey: end.rkey(),
        dma_len: 8,
    });
    headers.bth.ack_req = true;
    headers
}

fn expect_untouched(a: &End, b: &End) {
    assert_eq!(b.memory.read(0, 64), [0; 64]);
    assert_eq!(b.state(), IBV_QPS_RTS);
    a.memory.write(0, &pattern(1000, 7));
    assert_eq!(a.post_one(rdma(1, IBV_WR_RDMA_WRITE, b, 1000), 0, 1000), 0);
    a.wait_ok(1);
    assert_eq!(b.memory.read(1000, 1000), pattern(1000, 7));
}

#[test]
fn nobody_but_the_peer_reaches_a_queue_pair() {
    let (a, b) = pair(Options::default());
    let stranger = Stranger::new();
    // The right number with the wrong address, numbers of nobody, and the special ones.
    for qpn in [b.qpn(), b.qpn() ^ 1, b.qpn() ^ 0x80_0000, 0, 1, 0xff_ffff] {
        let packet = stranger.packet(&b, &write_to(&b, qpn), &[9; 8]);
        stranger.send(&b, &packet);
    }
    stranger.expect_no_answer();
    expect_untouched(&a, &b);
}

#[test]
fn damaged_and_truncated_datagrams_are_dropped() {
    let (a, b) = pair(Options::default());
    let stranger = Stranger::new();
    let whole = stranger.packet(&b, &write_to(&b, b.qpn()), &[9; 8]);
    for len in 0..whole.len() {
        stranger.send(&b, &whole[..len]);
    }
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        stranger.send(&b, &damaged);
    }
    let mut longer = whole;
    longer.resize(5000, 0);
    stranger.send(&b, &longer);
    stranger.expect_no_answer();
    expect_untouched(&a, &b);
}

/// The rule of the specification: the same partition, and not two limited members.
#[test]
fn the_port_counts_packets_of_other_partitions() {
    let end = End::new(Options::default());
    let peer = Stranger::new();
    end.to_init();
    end.to_rtr(peer.address.ip(), 0x77);
    let bad_pkeys = || {
        let attr = port_attr(&end.context, 1).unwrap();
        (attr.pkey_tbl_len, attr.bad_pkey_cntr)
    };
    assert_eq!(bad_pkeys(), (1, 0));
    let mut headers = write_to(&end, end.qpn());
    for pkey in [0x1234, 0x9234, 0x8000, 0] {
        headers.bth.pkey = pkey;
        peer.send(&end, &peer.packet(&end, &headers, &[9; 8]));
    }
    // The first answer is to the first packet of the partition, which arrives behind the others.
    for (psn, pkey) in [(0xff_fffe, 0x7fff), (0xff_ffff, 0xffff)] {
        headers.bth.pkey = pkey;
        headers.bth.psn = Psn::new(psn);
        peer.send(&end, &peer.packet(&end, &headers, &[7; 8]));
        let mut answer = [0; 64];
        let (len, _) = peer.socket.recv_from(&mut answer).expect("an ACK");
        let ack = Packet::parse(&answer[..len]).unwrap().headers.bth;
        assert_eq!((ack.opcode, ack.psn), (Opcode::Acknowledge, Psn::new(psn)));
    }
    assert_eq!(end.memory.read(0, 8), [7; 8]);
    assert_eq!(bad_pkeys(), (1, 4));
}
