//! Unreliable connections: what arrives when nothing is lost, and what is dropped without a word.

use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::{
    AccessFlags, AddressVector, Completion, CompletionQueue, Context, Done, GidEntry, InitAttr,
    LocalBuffer, Mapping, Mtu, ProtectionDomain, Psn, QpState, Qpn, QueuePair, Remote, Reset,
    SharedRegion, Source, UnreliableQp, UnreliableRtrAttr, WcOpcode, WcStatus,
};

use crate::harness::{ALL, PATIENCE, SIGNALED, SIZES, config, open, pattern};

/// Longest message of these tests: one that no receiver has too little room for.
const LEN_MAX: usize = 65_537;
const REGION_LEN: usize = 128 * 1024;

/// A device with memory, and what a queue pair on it needs.
struct Host {
    cq: CompletionQueue,
    region: Arc<SharedRegion>,
    image: Arc<Mapping>,
    pd: ProtectionDomain,
    context: Context,
    port: u8,
    gid: GidEntry,
}

impl Host {
    fn new() -> Option<Host> {
        let context = open()?;
        let port = context.active_port().unwrap().port_num;
        let pd = ProtectionDomain::alloc(&context).unwrap();
        let cq = CompletionQueue::create(&context, 256, None).unwrap();
        let image = Mapping::anonymous(REGION_LEN).unwrap();
        let access = ALL | AccessFlags::MW_BIND;
        let region = pd.register(&image, 0..REGION_LEN, access, None).unwrap();
        let gid = context.best_gid(port).unwrap();
        Some(Host {
            cq,
            region: Arc::new(region),
            image,
            pd,
            context,
            port,
            gid,
        })
    }

    fn create(&self) -> UnreliableQp<Reset> {
        let capabilities = config().capabilities;
        QueuePair::create_unreliable(&self.pd, &self.cq, &self.cq, &capabilities).unwrap()
    }

    fn path_to(&self, peer: &Host) -> AddressVector {
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
}

/// One end of an unreliable connection.
struct Node {
    qp: UnreliableQp,
    host: Host,
    polled: Vec<Completion>,
}

impl Node {
    fn connect(qp: UnreliableQp<Reset>, host: Host, peer: (&Host, Qpn), psns: [Psn; 2]) -> Node {
        let init = InitAttr {
            port: host.port,
            pkey_index: 0,
            access: ALL,
        };
        let qp = qp.init(&init).unwrap();
        let rtr = UnreliableRtrAttr {
            path: host.path_to(peer.0),
            path_mtu: Mtu::Mtu1024,
            dest_qpn: peer.1,
            rq_psn: psns[1],
        };
        let qp = qp.ready_to_receive(&rtr).unwrap();
        let qp = qp.ready_to_send(psns[0]).unwrap();
        Node {
            qp,
            host,
            polled: Vec::new(),
        }
    }

    fn buffer(&self, bytes: &[u8]) -> LocalBuffer {
        // A buffer of no bytes is the end of a longer one.
        let mut buffer = self.host.pd.alloc_local(bytes.len() + 1).unwrap();
        buffer.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        buffer.split_to(bytes.len()).unwrap()
    }

    fn post_recv(&mut self, wr_id: u64, len: usize) {
        let buffer = self.buffer(&vec![0xa5; len]);
        self.qp.post_recv(wr_id, buffer).unwrap();
    }

    fn remote(&self, byte_offset: u64) -> Remote {
        self.host.region.remote().at(byte_offset)
    }

    fn send(&mut self, wr_id: u64, bytes: &[u8], imm: Option<[u8; 4]>) {
        let source = Source::Local(self.buffer(bytes));
        let mut chain = self.qp.start_send();
        match imm {
            Some(imm) => chain.send_imm(wr_id, source, imm, SIGNALED),
            None => chain.send(wr_id, source, SIGNALED),
        }
        .unwrap();
        chain.submit().unwrap();
        assert_eq!(self.expect(wr_id).opcode, WcOpcode::Send);
    }

    fn write(&mut self, wr_id: u64, bytes: &[u8], remote: Remote, imm: Option<[u8; 4]>) {
        let source = Source::Local(self.buffer(bytes));
        let mut chain = self.qp.start_send();
        match imm {
            Some(imm) => chain.write_imm(wr_id, source, remote, imm, SIGNALED),
            None => chain.write(wr_id, source, remote, SIGNALED),
        }
        .unwrap();
        chain.submit().unwrap();
        assert_eq!(self.expect(wr_id).opcode, WcOpcode::RdmaWrite);
    }

    fn next(&mut self) -> Done {
        let deadline = Instant::now() + PATIENCE;
        while self.polled.is_empty() {
            assert!(
                Instant::now() < deadline,
                "no completion within {PATIENCE:?}"
            );
            if self.host.cq.poll(&mut self.polled).unwrap() == 0 {
                std::thread::yield_now();
            }
        }
        self.qp.complete(self.polled.remove(0)).unwrap()
    }

    fn expect(&mut self, wr_id: u64) -> Done {
        let done = self.next();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::Success));
        done
    }

    fn expect_nothing(&mut self) {
        let deadline = Instant::now() + Duration::from_millis(30);
        while Instant::now() < deadline {
            self.host.cq.poll(&mut self.polled).unwrap();
            assert!(self.polled.is_empty(), "unexpected: {:?}", self.polled);
        }
    }

    fn image_bytes(&self, byte_offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.host.image.read_at(byte_offset, &mut bytes).unwrap();
        bytes
    }
}

/// Two connected ends whose numbering is about to wrap.
fn pair() -> Option<[Node; 2]> {
    let (near, far) = (Host::new()?, Host::new()?);
    let (near_qp, far_qp) = (near.create(), far.create());
    let qpns = [near_qp.qpn(), far_qp.qpn()];
    let psns = [Psn::new(0xff_fff0).unwrap(), Psn::random().unwrap()];
    let back = [psns[1], psns[0]];
    let near_node = Node::connect(near_qp, near, (&far, qpns[1]), psns);
    let far_node = Node::connect(far_qp, far, (&near_node.host, qpns[0]), back);
    Some([near_node, far_node])
}

#[test]
fn messages_of_every_size_arrive() {
    let Some([mut near, mut far]) = pair() else {
        return;
    };
    for (seed, len) in (1..).zip(SIZES.into_iter().filter(|len| *len <= LEN_MAX)) {
        let bytes = pattern(seed, len);
        let imm = seed.is_multiple_of(2).then_some([0xff, 0, 0, 7]);
        far.post_recv(9, len);
        near.send(1, &bytes, imm);
        let done = far.expect(9);
        assert_eq!(
            (done.opcode, done.byte_len as usize, done.imm),
            (WcOpcode::Recv, len, imm)
        );
        assert!(done.buffer.unwrap().as_slice() == bytes, "SEND of {len}");

        let bytes = pattern(seed + 100, len);
        far.post_recv(10, 0);
        let remote = far.remote(16);
        near.write(2, &bytes, remote, None);
        near.write(3, b"", remote, Some([1, 2, 3, 4]));
        let done = far.expect(10);
        assert_eq!(
            (done.opcode, done.byte_len, done.imm),
            (WcOpcode::RecvRdmaWithImm, 0, Some([1, 2, 3, 4]))
        );
        assert!(far.image_bytes(16, len) == bytes, "WRITE of {len}");
    }
}

#[test]
fn a_write_with_immediate_tells_its_length() {
    let Some([mut near, mut far]) = pair() else {
        return;
    };
    far.post_recv(9, 0);
    let bytes = pattern(5, 5000);
    near.write(1, &bytes, far.remote(64), Some([9, 8, 7, 6]));
    let done = far.expect(9);
    assert_eq!((done.byte_len, done.imm), (5000, Some([9, 8, 7, 6])));
    assert!(far.image_bytes(64, 5000) == bytes);
}

#[test]
fn what_the_peer_refuses_is_dropped_without_a_word() {
    let Some([mut near, mut far]) = pair() else {
        return;
    };
    near.send(1, &pattern(1, 3000), None);
    far.expect_nothing();
    far.post_recv(9, 5000);
    let mut wrong = far.remote(0);
    wrong.rkey.0 ^= 0xff;
    near.write(2, &pattern(2, 3000), wrong, None);
    near.write(
        3,
        &pattern(3, 3000),
        far.remote(REGION_LEN as u64 - 8),
        None,
    );
    far.expect_nothing();
    near.send(4, &pattern(4, 5000), None);
    let done = far.expect(9);
    assert!(done.buffer.unwrap().as_slice() == pattern(4, 5000));
    assert!(far.image_bytes(0, REGION_LEN).iter().all(|byte| *byte == 0));
    for node in [&near, &far] {
        assert_eq!(node.qp.query().unwrap().state, QpState::Rts);
    }
}

#[test]
fn a_window_opens_to_the_peer() {
    let Some([mut near, mut far]) = pair() else {
        return;
    };
    if far.host.context.attr().unwrap().max_mw == 0 {
        eprintln!("skipped: the device has no memory windows");
        return;
    }
    let window = far.host.pd.alloc_mw().unwrap();
    let region = Arc::clone(&far.host.region);
    let mut chain = far.qp.start_send();
    let rights = AccessFlags::REMOTE_WRITE;
    let remote = chain
        .bind_mw(5, &window, &region, 4096..8192, rights, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    assert_eq!(far.expect(5).opcode, WcOpcode::BindMw);
    far.post_recv(9, 0);
    near.write(1, &pattern(7, 4096), remote, Some([0; 4]));
    far.expect(9);
    assert!(far.image_bytes(4096, 4096) == pattern(7, 4096));
    let mut other_tag = remote;
    other_tag.rkey.0 ^= 1;
    near.write(2, &pattern(8, 4096), other_tag, None);
    far.expect_nothing();
    assert!(far.image_bytes(4096, 4096) == pattern(7, 4096));
    // rxe (6.1) holds an access to the bounds of the region below, not to those of the window.
    if !far.host.context.name().starts_with("rxe") {
        near.write(3, &pattern(9, 4096), remote.at(1), None);
        far.expect_nothing();
        assert_eq!(far.image_bytes(8192, 1), [0]);
    }
}

#[test]
fn err_flushes_both_queues() {
    let Some([mut near, mut far]) = pair() else {
        return;
    };
    far.post_recv(9, 16);
    far.post_recv(10, 16);
    far.qp.to_error().unwrap();
    for wr_id in [9, 10] {
        let done = far.next();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::WrFlushErr));
    }
    near.send(1, b"nobody hears", None);
    far.expect_nothing();
}
