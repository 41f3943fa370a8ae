//! Datagrams: one queue pair and many peers, what arrives, and what is dropped without a word.

use std::time::{Duration, Instant};

use transport::{
    AddressHandle, AddressVector, AsyncEvent, Completion, CompletionQueue, Context,
    DatagramInitAttr, DatagramQp, Destination, Done, Error, GRH_LEN, Gather, GidEntry, LocalBuffer,
    ProtectionDomain, Psn, Qkey, QpAttributes, QpState, QueuePair, Reset, SendFlags,
    SharedReceiveQueue, Source, WcOpcode, WcStatus,
};

use crate::harness::{PATIENCE, SIGNALED, config, open, pattern};

const QKEY: Qkey = Qkey(0x1111_1111);

/// A device with a queue pair for datagrams, ready to send.
struct Node {
    qp: DatagramQp,
    /// Where its receives come from, if shared.
    srq: Option<SharedReceiveQueue>,
    cq: CompletionQueue,
    pd: ProtectionDomain,
    context: Context,
    port: u8,
    gid: GidEntry,
    polled: Vec<Completion>,
}

fn init_attr(port: u8) -> DatagramInitAttr {
    DatagramInitAttr {
        port,
        pkey_index: 0,
        qkey: QKEY,
    }
}

fn ready(qp: DatagramQp<Reset>, port: u8) -> DatagramQp {
    let qp = qp.init(&init_attr(port)).unwrap();
    let qp = qp.ready_to_receive().unwrap();
    qp.ready_to_send(Psn::random().unwrap()).unwrap()
}

fn create(
    pd: &ProtectionDomain,
    cq: &CompletionQueue,
    srq: Option<&SharedReceiveQueue>,
) -> DatagramQp<Reset> {
    let capabilities = config().capabilities;
    match srq {
        Some(srq) => QueuePair::create_datagram_with_srq(pd, cq, cq, srq, &capabilities),
        None => QueuePair::create_datagram(pd, cq, cq, &capabilities),
    }
    .unwrap()
}

impl Node {
    fn new() -> Option<Node> {
        Self::with(|_| None)
    }

    /// One that takes its receives from a shared queue, of which other queue pairs may be made.
    fn sharing() -> Option<Node> {
        Self::with(|pd| Some(SharedReceiveQueue::create(pd, 16, 4).unwrap()))
    }

    fn with(create_srq: fn(&ProtectionDomain) -> Option<SharedReceiveQueue>) -> Option<Node> {
        let context = open()?;
        let port = context.active_port().unwrap().port_num;
        let pd = ProtectionDomain::alloc(&context).unwrap();
        let cq = CompletionQueue::create(&context, 256, None).unwrap();
        let srq = create_srq(&pd);
        let qp = create(&pd, &cq, srq.as_ref());
        let qp = ready(qp, port);
        let gid = context.best_gid(port).unwrap();
        Some(Node {
            qp,
            srq,
            cq,
            pd,
            context,
            port,
            gid,
            polled: Vec::new(),
        })
    }

    fn path_to(&self, peer: &Node) -> AddressVector {
        AddressVector {
            port: self.port,
            sgid_index: u8::try_from(self.gid.index).unwrap(),
            dgid: Some(peer.gid.gid),
            dlid: peer.context.port(peer.port).unwrap().lid,
            sl: 0,
            hop_limit: 64,
            traffic_class: 0,
            flow_label: 0,
        }
    }

    fn to(&self, peer: &Node) -> Destination {
        Destination {
            handle: AddressHandle::create(&self.pd, &self.path_to(peer)).unwrap(),
            qpn: peer.qp.qpn(),
            qkey: QKEY,
        }
    }

    fn message_len_max(&self) -> usize {
        let port = self.context.port(self.port).unwrap();
        port.active_mtu.unwrap().bytes()
    }

    fn buffer(&self, bytes: &[u8]) -> LocalBuffer {
        // A buffer of no bytes is the end of a longer one.
        let mut buffer = self.pd.alloc_local(bytes.len() + 1).unwrap();
        buffer.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        buffer.split_to(bytes.len()).unwrap()
    }

    /// Posts a receive for a message of `len` bytes.
    fn post_recv(&mut self, wr_id: u64, len: usize) {
        let buffer = self.buffer(&vec![0xa5; GRH_LEN + len]);
        match &self.srq {
            Some(srq) => srq.post_recv(wr_id, buffer).unwrap(),
            None => self.qp.post_recv(wr_id, buffer).unwrap(),
        }
    }

    fn send<'a>(&mut self, wr_id: u64, source: impl Gather<'a>, to: &Destination) {
        let mut chain = self.qp.start_send();
        chain.send(wr_id, source, to, SIGNALED).unwrap();
        chain.submit().unwrap();
        let done = self.next();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::Success));
        assert_eq!(done.opcode, WcOpcode::Send);
        assert!(done.sender.is_none());
    }

    fn next(&mut self) -> Done {
        let deadline = Instant::now() + PATIENCE;
        while self.polled.is_empty() {
            assert!(
                Instant::now() < deadline,
                "no completion within {PATIENCE:?}"
            );
            if self.cq.poll(&mut self.polled).unwrap() == 0 {
                std::thread::yield_now();
            }
        }
        self.qp.complete(self.polled.remove(0)).unwrap()
    }

    /// Waits for the receive `wr_id`, and returns it with the bytes of its message.
    fn received(&mut self, wr_id: u64) -> (Done, Vec<u8>) {
        let done = self.next();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::Success));
        assert_eq!(done.opcode, WcOpcode::Recv);
        let bytes = done.buffer.as_ref().unwrap().as_slice();
        let bytes = bytes[GRH_LEN..][..done.byte_len as usize].to_vec();
        (done, bytes)
    }

    fn expect_nothing(&mut self) {
        let deadline = Instant::now() + Duration::from_millis(30);
        while Instant::now() < deadline {
            self.cq.poll(&mut self.polled).unwrap();
            assert!(self.polled.is_empty(), "unexpected: {:?}", self.polled);
        }
    }
}

fn nodes<const N: usize>() -> Option<[Node; N]> {
    let nodes: Option<Vec<Node>> = (0..N).map(|_| Node::new()).collect();
    nodes?.try_into().ok()
}

#[test]
fn a_datagram_of_any_length_tells_its_sender() {
    let Some([mut near, mut far]) = nodes() else {
        return;
    };
    let to = near.to(&far);
    let max = near.message_len_max();
    for (seed, len) in (1..).zip([0, 1, 2, 3, 4, 5, 63, 64, 255, 1000, max - 1, max]) {
        let bytes = pattern(seed, len);
        far.post_recv(9, len);
        near.send(1, Source::Local(near.buffer(&bytes)), &to);
        let (done, message) = far.received(9);
        assert!(message == bytes, "{len} bytes differ");
        assert_eq!(done.imm, None);
        let sender = done.sender.unwrap();
        assert_eq!(
            (sender.qpn, sender.gid),
            (near.qp.qpn(), Some(near.gid.gid))
        );
    }
}

#[test]
fn datagrams_are_gathered_and_scattered_with_immediates() {
    let Some([mut near, mut far]) = nodes() else {
        return;
    };
    let to = near.to(&far);
    let header = far.buffer(&[0xa5; GRH_LEN]);
    let parts = [header, far.buffer(&[0xa5; 3]), far.buffer(&[0xa5; 100])];
    far.qp.post_recv(9, parts).unwrap();
    let mut chain = near.qp.start_send();
    let parts = [Source::Inline(b"in"), Source::Inline(b"line")];
    chain
        .send_imm(1, parts, &to, [0xff, 0, 0, 7], SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    assert!(near.next().is_success());
    let done = far.next();
    assert_eq!((done.byte_len, done.imm), (6, Some([0xff, 0, 0, 7])));
    assert_eq!(done.sender.unwrap().qpn, near.qp.qpn());
    assert_eq!(done.more[0].as_ref().unwrap().as_slice(), b"inl");
    let rest = done.more[1].as_ref().unwrap().as_slice();
    assert_eq!(rest[..4], *b"ine\xa5");

    let parts = [near.buffer(b"two "), near.buffer(b"parts")].map(Source::Local);
    far.post_recv(10, 9);
    near.send(2, parts, &to);
    assert_eq!(far.received(10).1, b"two parts");
}

#[test]
fn one_reaches_many_and_each_answers() {
    let Some([mut center, mut first, mut second, mut third]) = nodes() else {
        return;
    };
    for (index, node) in (0..).zip([&mut first, &mut second, &mut third]) {
        node.post_recv(9, 64);
        let to = center.to(node);
        center.send(index, Source::Inline(b"who are you?"), &to);
        // The device keeps what it needs of the handle.
        drop(to);
        let (done, message) = node.received(9);
        assert_eq!(message, b"who are you?");
        let sender = done.sender.unwrap();
        let back = Destination {
            handle: AddressHandle::from_completion(&node.pd, node.port, &sender).unwrap(),
            qpn: sender.qpn,
            qkey: QKEY,
        };
        center.post_recv(100 + index, 64);
        let answer = index.to_be_bytes();
        node.send(1, Source::Inline(&answer), &back);
        let (done, message) = center.received(100 + index);
        assert_eq!(message, answer);
        let sender = done.sender.unwrap();
        assert_eq!(
            (sender.qpn, sender.gid),
            (node.qp.qpn(), Some(node.gid.gid))
        );
    }
}

#[test]
fn what_nobody_takes_is_dropped_without_a_word() {
    let Some([mut near, mut far]) = nodes() else {
        return;
    };
    let to = near.to(&far);
    let wrong_key = Destination {
        qkey: Qkey(QKEY.0 + 1),
        ..to.clone()
    };
    near.send(1, Source::Inline(b"no receive"), &to);
    far.expect_nothing();
    far.post_recv(9, 64);
    near.send(2, Source::Inline(b"wrong key"), &wrong_key);
    far.expect_nothing();
    near.send(3, Source::Inline(b"right"), &to);
    assert_eq!(far.received(9).1, b"right");
    far.expect_nothing();
}

/// A datagram that does not fit is dropped, and its receive, shared or not, takes the next one. (Kernel rxe
/// 6.1 fails the receive and moves to ERR; later ones drop.)
#[test]
fn a_receive_too_small_waits_on() {
    for far in [Node::new(), Node::sharing()] {
        let (Some(mut near), Some(mut far)) = (Node::new(), far) else {
            return;
        };
        let to = near.to(&far);
        far.post_recv(9, 4);
        near.send(1, Source::Inline(b"five!"), &to);
        near.send(2, Source::Inline(b"four"), &to);
        if far.context.name().starts_with("rxe") {
            let done = far.next();
            assert!(matches!(
                done.status,
                WcStatus::LocQpOpErr | WcStatus::Success
            ));
        } else {
            assert_eq!(far.received(9).1, b"four");
        }
    }
}

#[test]
fn a_message_beyond_the_mtu_is_refused() {
    let Some(mut node) = Node::new() else { return };
    let to = node.to(&node);
    let len = node.message_len_max() + 1;
    let source = Source::Local(node.buffer(&vec![0; len]));
    let mut chain = node.qp.start_send();
    let error = chain.send(1, source, &to, SIGNALED).unwrap_err();
    let Error::MessageTooLong { len: told, max } = error else {
        panic!("{error}")
    };
    assert_eq!((told, max), (len, len - 1));
    assert!(chain.is_empty());
}

#[test]
fn handles_belong_to_a_domain_and_a_port() {
    let Some(mut node) = Node::new() else { return };
    let path = node.path_to(&node);
    let other = ProtectionDomain::alloc(&node.context).unwrap();
    let to = Destination {
        handle: AddressHandle::create(&other, &path).unwrap(),
        ..node.to(&node)
    };
    let mut chain = node.qp.start_send();
    let error = chain.send(1, Source::Inline(b"x"), &to, SIGNALED);
    assert!(
        matches!(error, Err(Error::WrongProtectionDomain)),
        "{error:?}"
    );
    drop(chain);
    for wrong in [
        AddressVector { port: 99, ..path },
        AddressVector { dgid: None, ..path },
    ] {
        let error = AddressHandle::create(&node.pd, &wrong).unwrap_err();
        let Error::Verb { source, .. } = &error else {
            panic!("{error}")
        };
        let invalid = std::io::ErrorKind::InvalidInput;
        assert_eq!(source.kind(), invalid, "{error}");
    }
}

#[test]
fn the_key_can_be_changed_and_shows() {
    let Some([mut near, mut far]) = nodes() else {
        return;
    };
    let old = near.to(&far);
    let new = Destination {
        qkey: Qkey(0x2222),
        ..old.clone()
    };
    far.post_recv(9, 64);
    let attributes = QpAttributes {
        qkey: Some(new.qkey),
        ..QpAttributes::default()
    };
    far.qp.modify(QpState::Rts, &attributes).unwrap();
    let status = far.qp.query().unwrap();
    assert_eq!((status.state, status.qkey), (QpState::Rts, new.qkey));
    near.send(1, Source::Inline(b"old"), &old);
    near.send(2, Source::Inline(b"new"), &new);
    assert_eq!(far.received(9).1, b"new");
}

/// Kernel rxe puts the key into the packet as it was named, highest bit and all, so nobody with an ordinary
/// key takes it.
#[test]
fn the_highest_bit_asks_for_the_own_key() {
    let Some([mut near, mut far]) = nodes() else {
        return;
    };
    let to = Destination {
        qkey: Qkey(0x8000_0000),
        ..near.to(&far)
    };
    far.post_recv(9, 64);
    near.send(1, Source::Inline(b"hello"), &to);
    if near.context.name().starts_with("rxe") {
        return far.expect_nothing();
    }
    assert_eq!(far.received(9).1, b"hello");
}

#[test]
fn missing_and_surplus_attributes_are_named() {
    let Some(context) = open() else { return };
    let port = context.active_port().unwrap().port_num;
    let pd = ProtectionDomain::alloc(&context).unwrap();
    let cq = CompletionQueue::create(&context, 256, None).unwrap();
    let mut qp = QueuePair::create_datagram(&pd, &cq, &cq, &config().capabilities).unwrap();
    let without_key = QpAttributes {
        port: Some(port),
        pkey_index: Some(0),
        ..QpAttributes::default()
    };
    let error = qp.modify(QpState::Init, &without_key).unwrap_err();
    assert!(error.to_string().contains("QKEY missing"), "{error}");
    let qp = qp.init(&init_attr(port)).unwrap();
    let mut qp = qp.ready_to_receive().unwrap();
    let error = qp
        .modify(QpState::Rts, &QpAttributes::default())
        .unwrap_err();
    assert!(error.to_string().contains("SQ_PSN missing"), "{error}");
    let as_connection = QpAttributes {
        sq_psn: Psn::new(1),
        timeout: Some(14),
        ..QpAttributes::default()
    };
    let error = qp.modify(QpState::Rts, &as_connection).unwrap_err();
    assert!(error.to_string().contains("TIMEOUT not allowed"), "{error}");
    assert_eq!(qp.query().unwrap().state, QpState::Rtr);
}

#[test]
fn error_flushes_and_reset_starts_anew() {
    let Some([mut near, mut far]) = nodes() else {
        return;
    };
    far.post_recv(8, 64);
    far.post_recv(9, 64);
    far.qp.to_error().unwrap();
    for wr_id in [8, 9] {
        let done = far.next();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::WrFlushErr));
        assert!(done.sender.is_none() && done.buffer.is_some());
    }
    let to = near.to(&far);
    near.send(1, Source::Inline(b"too early"), &to);
    far.expect_nothing();

    far.qp = ready(far.qp.reset().unwrap(), far.port);
    far.post_recv(10, 64);
    near.send(2, Source::Inline(b"again"), &to);
    assert_eq!(far.received(10).1, b"again");
}

#[test]
fn many_datagrams_come_in_order_of_their_receives() {
    const COUNT: u64 = 32;
    let Some([mut near, mut far]) = nodes() else {
        return;
    };
    let to = near.to(&far);
    for wr_id in 0..COUNT {
        far.post_recv(wr_id, 256);
    }
    let mut chain = near.qp.start_send();
    for wr_id in 0..COUNT {
        let bytes = wr_id.to_be_bytes();
        let flags = if wr_id + 1 == COUNT {
            SIGNALED
        } else {
            SendFlags::empty()
        };
        chain
            .send(wr_id, Source::Inline(&bytes), &to, flags)
            .unwrap();
    }
    chain.submit().unwrap();
    assert_eq!(near.next().wr_id, COUNT - 1);
    // Between two queue pairs of one machine nothing is lost, and nothing overtakes.
    for wr_id in 0..COUNT {
        assert_eq!(far.received(wr_id).1, wr_id.to_be_bytes());
    }
    near.expect_nothing();
}

/// Two queue pairs of one node take from one queue, each what is sent to it, in the order of arrival.
#[test]
fn queue_pairs_share_receives() {
    let (Some(mut near), Some(mut far)) = (Node::new(), Node::sharing()) else {
        return;
    };
    let other = create(&far.pd, &far.cq, far.srq.as_ref());
    let mut other = ready(other, far.port);
    let mut to = near.to(&far);
    let wrong_key = Destination {
        qkey: Qkey(QKEY.0 + 1),
        ..to.clone()
    };
    let room = |far: &Node| far.srq.as_ref().unwrap().room();
    near.send(1, Source::Inline(b"no receive"), &to);
    far.expect_nothing();
    (0..8).for_each(|wr_id| far.post_recv(wr_id, 64));
    near.send(2, Source::Inline(b"wrong key"), &wrong_key);
    far.expect_nothing();
    assert_eq!(room(&far), 8);
    for wr_id in 0..8_u64 {
        if wr_id % 3 == 0 {
            std::mem::swap(&mut far.qp, &mut other);
            to.qpn = far.qp.qpn();
        }
        near.send(wr_id, Source::Inline(&wr_id.to_be_bytes()), &to);
        let (done, message) = far.received(wr_id);
        assert_eq!(message, wr_id.to_be_bytes());
        assert_eq!(done.sender.unwrap().qpn, near.qp.qpn());
    }
    assert_eq!(room(&far), 16);
    near.send(3, Source::Inline(b"no receive is left"), &to);
    far.expect_nothing();
    let failed = far.qp.post_recv(1, far.buffer(&[0; GRH_LEN])).unwrap_err();
    assert!(matches!(*failed.error, Error::SharedReceives), "{failed}");
}

#[test]
fn a_queue_pair_in_error_leaves_shared_receives_to_others() {
    let (Some(mut near), Some(mut far)) = (Node::new(), Node::sharing()) else {
        return;
    };
    let events = far.context.async_events();
    far.post_recv(9, 64);
    let failed = far.qp.qpn();
    far.qp.to_error().unwrap();
    far.expect_nothing();
    match events.wait(Some(Duration::from_secs(1))).unwrap() {
        Some(event) => assert_eq!(event, AsyncEvent::QpLastWqeReached(failed)),
        // Kernel rxe has the event from 6.2 on.
        None => assert!(!far.context.is_soft(), "no event"),
    }
    let other = create(&far.pd, &far.cq, far.srq.as_ref());
    far.qp = ready(other, far.port);
    let to = near.to(&far);
    near.send(1, Source::Inline(b"still here"), &to);
    assert_eq!(far.received(9).1, b"still here");
}

#[test]
fn a_shared_queue_of_another_domain_is_refused() {
    let Some(node) = Node::sharing() else { return };
    let other = ProtectionDomain::alloc(&node.context).unwrap();
    let (cq, srq) = (&node.cq, node.srq.as_ref().unwrap());
    let refused = QueuePair::create_datagram_with_srq(&other, cq, cq, srq, &config().capabilities);
    assert!(matches!(refused, Err(Error::WrongProtectionDomain)));
}
