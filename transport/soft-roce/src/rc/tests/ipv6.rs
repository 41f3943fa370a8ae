//! A pair on an IPv6 network.

use std::net::Ipv6Addr;

use super::*;

const ADDRESSES_V6: [IpAddr; 2] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 2)),
];

fn pair() -> Pair {
    Pair::between(ADDRESSES_V6, config(), |_, attr| *attr)
}

/// Of each message's packets the second is lost once, and one is damaged.
#[test]
fn messages_survive_loss_and_damage() {
    let mut pair = pair().filtered(|sent| match sent.index {
        1 => Fate::Drop,
        4 => Fate::Corrupt { bit: 200 },
        _ => Fate::Deliver,
    });
    let bytes = pattern(3, 2000);
    pair.nodes[A].write(0, &bytes);
    pair.nodes[B].post_recv(9, &[pair.nodes[B].sge(100_000, 3000)]);
    let (sge, target) = (pair.nodes[A].sge(0, 2000), pair.nodes[B].remote(5));
    let back = pair.nodes[A].sge(50_000, 2000);
    pair.nodes[A].post_send(1, write_op(target), &[sge]);
    pair.nodes[A].post_send(2, SendOp::Read { remote: target }, &[back]);
    pair.nodes[A].post_send(3, SendOp::Send { imm: None }, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS), (3, SUCCESS)]);
    pair.expect_receives(&[(9, SUCCESS)]);
    assert_eq!(pair.nodes[B].read(5, 2000), bytes);
    assert_eq!(pair.nodes[A].read(50_000, 2000), bytes);
    assert_eq!(pair.nodes[B].read(100_000, 2000), bytes);
}

#[test]
fn only_the_peer_s_address_is_listened_to() {
    let mut pair = pair();
    let IpAddr::V6(peer) = ADDRESSES_V6[A] else {
        panic!("an IPv6 address");
    };
    let mut octets = peer.octets();
    octets[0] ^= 1;
    for stranger in [IpAddr::from(octets), ADDRESSES[A]] {
        let headers = Headers::new(Opcode::SendOnly, Qpn::new(0x12), FIRST_PSN);
        let mut tx = TxBuf::new(SocketAddr::new(ADDRESSES_V6[A], ROCE_PORT));
        tx.push(ADDRESSES_V6[B], &headers, 0, |_| true);
        let bytes = tx.packets().next().unwrap().1.to_vec();
        let packet = Packet::parse(&bytes).unwrap();
        let node = &mut pair.nodes[B];
        node.qp.handle_packet(0, stranger, &packet, &mut node.mem);
    }
    pair.drive();
    assert_eq!(pair.sent.len(), 0);
    assert_eq!(pair.nodes[B].qp.counters().dropped_pkts, 2);
}
