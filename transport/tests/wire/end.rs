//! One side of the test, and its end of one connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::connect::{ConnectConfig, EndPoint, Prepared, exchange};
use transport::{
    AccessFlags, CompletionQueue, Context, Done, LocalBuffer, Mapping, Mtu, ProtectionDomain, Psn,
    QpCapabilities, ReadyQp, Remote, Rkey, SendChain, SendFlags, SharedRegion, WcOpcode, WcStatus,
};

use crate::control::Control;
use crate::differences::Maker;

/// How long a completion may take on an emulated machine behind a lossy network.
const PATIENCE: Duration = Duration::from_secs(60);

/// Every right there is.
pub(crate) const ALL: AccessFlags = AccessFlags::LOCAL_WRITE
    .union(AccessFlags::REMOTE_WRITE)
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_ATOMIC);

pub(crate) const SIGNALED: SendFlags = SendFlags::SIGNALED;

/// This process.
pub(crate) struct Side {
    pub(crate) control: Control,
    pub(crate) is_connector: bool,
    pub(crate) mtu: Mtu,
    /// The network loses, repeats or damages packets.
    pub(crate) is_lossy: bool,
    pub(crate) maker: Maker,
    pub(crate) peer_maker: Maker,
    /// Requests and receives that have completed.
    pub(crate) completions: u64,
    pub(crate) context: Context,
    pd: ProtectionDomain,
}

impl Side {
    pub(crate) fn new(context: Context, control: Control, is_connector: bool) -> Side {
        let pd = ProtectionDomain::alloc(&context).expect("a protection domain");
        let maker = Maker::of(&context);
        Side {
            control,
            is_connector,
            mtu: Mtu::Mtu1024,
            is_lossy: false,
            maker,
            peer_maker: maker,
            completions: 0,
            context,
            pd,
        }
    }

    /// What connections of this test usually are.
    pub(crate) fn config(&self) -> ConnectConfig {
        ConnectConfig {
            access: ALL,
            capabilities: QpCapabilities {
                max_send_wr: 64,
                max_recv_wr: 64,
                max_send_sge: 4,
                max_recv_sge: 4,
                max_inline_data: 64,
            },
            path_mtu: Some(self.mtu),
            // Waits of 123 ms: a receive that comes late comes in time.
            min_rnr_timer: 27,
            // Seven times 268 ms: on an emulated CPU, rxe with much to send answers late.
            timeout: 16,
            ..ConnectConfig::default()
        }
    }

    /// Connects a queue pair and an image of `image_len` bytes with those of the peer, which does the
    /// same.
    pub(crate) fn connect(
        &mut self,
        config: &ConnectConfig,
        image_len: usize,
        access: AccessFlags,
    ) -> End {
        let half = self.prepare(config, image_len, access);
        let own = half.prepared.end_point();
        let peer = exchange(&mut self.control.stream, &own).expect("end points");
        let Remote { addr, rkey } = half.region.remote();
        let mut end = self.finish(half, &peer);
        self.control.send([addr, u64::from(rkey.0)]);
        // Behind these, both are ready.
        let [addr, rkey] = self.control.receive();
        let rkey = Rkey(u32::try_from(rkey).expect("a key of 32 bits"));
        end.remote = Remote { addr, rkey };
        end
    }

    /// Two ends on this device that are connected to each other.
    pub(crate) fn connect_to_itself(&self, image_len: usize) -> [End; 2] {
        let config = self.config();
        let [a, b] = [(); 2].map(|()| self.prepare(&config, image_len, ALL));
        let points = [&b, &a].map(|peer| (peer.prepared.end_point(), peer.region.remote()));
        let [(b_point, b_image), (a_point, a_image)] = points;
        let mut ends = [self.finish(a, &b_point), self.finish(b, &a_point)];
        ends[0].remote = b_image;
        ends[1].remote = a_image;
        ends
    }

    fn prepare(&self, config: &ConnectConfig, image_len: usize, access: AccessFlags) -> Half {
        let cq = CompletionQueue::create(&self.context, 256, None).expect("a completion queue");
        let image = Mapping::anonymous(image_len).expect("memory");
        let region = self.pd.register(&image, 0..image_len, access, None);
        let prepared = Prepared::create(&self.pd, &cq, &cq, config).expect("a queue pair");
        Half {
            cq,
            image,
            region: region.expect("a registration"),
            prepared,
        }
    }

    /// Connects a queue pair; where the peer's image is remains to be told.
    fn finish(&self, half: Half, peer: &EndPoint) -> End {
        let Half {
            cq,
            image,
            region,
            prepared,
        } = half;
        let qp = prepared.connect(peer).expect("a connection");
        let path_mtu = qp.query().expect("its attributes").path_mtu;
        assert_eq!(path_mtu, Some(self.mtu), "the network's MTU is too small");
        End {
            qp,
            remote: region.remote(),
            region: Arc::new(region),
            image,
            sent: VecDeque::new(),
            received: VecDeque::new(),
            completions: 0,
            cq,
            pd: self.pd.clone(),
        }
    }

    /// A connection of the usual kind.
    pub(crate) fn connect_plain(&mut self, image_len: usize) -> End {
        self.connect(&self.config(), image_len, ALL)
    }
}

/// An end that knows no peer yet.
struct Half {
    cq: CompletionQueue,
    image: Arc<Mapping>,
    region: SharedRegion,
    prepared: Prepared,
}

/// The sequence number `count` before numbers start again at 0.
pub(crate) fn psn_before_wrap(count: u32) -> Psn {
    Psn::new((1 << 24) - count).expect("below 2^24")
}

/// An end of a connection.
pub(crate) struct End {
    pub(crate) qp: ReadyQp,
    /// The start of the peer's image.
    pub(crate) remote: Remote,
    pub(crate) region: Arc<SharedRegion>,
    pub(crate) image: Arc<Mapping>,
    /// Completions polled and not yet expected, each queue in its order.
    sent: VecDeque<Done>,
    received: VecDeque<Done>,
    /// Requests and receives that have completed and were not counted yet.
    completions: u64,
    cq: CompletionQueue,
    pd: ProtectionDomain,
}

impl End {
    /// Posts what `add` adds to a chain.
    pub(crate) fn post(&mut self, add: impl FnOnce(&mut SendChain<'_>)) {
        let mut chain = self.qp.start_send();
        add(&mut chain);
        chain.submit().expect("requests are posted");
    }

    /// Posts a receive of `len` bytes.
    pub(crate) fn post_recv(&mut self, wr_id: u64, len: usize) {
        let into = self.buffer(&vec![0xa5; len]);
        self.qp.post_recv(wr_id, into).expect("a receive is posted");
    }

    pub(crate) fn poll(&mut self) {
        let mut completions = Vec::new();
        self.cq.poll(&mut completions).expect("polling");
        for completion in completions {
            self.completions += 1;
            let is_receive = completion.is_receive();
            let done = self.qp.complete(completion).expect("an own completion");
            if is_receive {
                self.received.push_back(done);
            } else {
                self.sent.push_back(done);
            }
        }
    }

    fn next(&mut self, is_receive: bool) -> Done {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let queue = if is_receive {
                &mut self.received
            } else {
                &mut self.sent
            };
            if let Some(done) = queue.pop_front() {
                return done;
            }
            let name = if is_receive { "receive" } else { "send" };
            assert!(
                Instant::now() < deadline,
                "no completion of the {name} queue within {PATIENCE:?}"
            );
            self.poll();
            if self.sent.is_empty() && self.received.is_empty() {
                // rxe works in this machine's kernel: two programs that spin would take its cores away.
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Waits for the next completion of the send queue, whatever it says.
    pub(crate) fn next_sent(&mut self) -> Done {
        self.next(false)
    }

    /// Waits for the next completion of the receive queue, whatever it says.
    pub(crate) fn next_received(&mut self) -> Done {
        self.next(true)
    }

    /// Waits for the next completion of the send queue, which must be this one in success.
    pub(crate) fn expect_sent(&mut self, wr_id: u64, opcode: WcOpcode) -> Done {
        let done = self.next_sent();
        assert_eq!(
            (done.wr_id, done.status, done.opcode),
            (wr_id, WcStatus::Success, opcode)
        );
        done
    }

    /// Waits for the next receive, which must be this one in success.
    pub(crate) fn expect_received(
        &mut self,
        wr_id: u64,
        opcode: WcOpcode,
        byte_len: usize,
        imm: Option<[u8; 4]>,
    ) -> Done {
        let done = self.next_received();
        assert_eq!(
            (done.wr_id, done.status, done.opcode, done.imm),
            (wr_id, WcStatus::Success, opcode, imm)
        );
        assert_eq!(done.byte_len as usize, byte_len);
        done
    }

    /// How many completions there were since the last call.
    pub(crate) fn take_completions(&mut self) -> u64 {
        std::mem::take(&mut self.completions)
    }

    /// There is no completion but those that were expected.
    pub(crate) fn expect_nothing(&mut self) {
        self.poll();
        assert!(
            self.sent.is_empty() && self.received.is_empty(),
            "unexpected: {:?} {:?}",
            self.sent,
            self.received
        );
    }

    /// A registered buffer that holds `bytes`.
    pub(crate) fn buffer(&self, bytes: &[u8]) -> LocalBuffer {
        // A buffer of no bytes is the end of a longer one.
        let mut buffer = self.pd.alloc_local(bytes.len() + 1).expect("memory");
        buffer.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        buffer.split_to(bytes.len()).expect("it is longer")
    }

    /// Three neighbouring buffers, of which the one in the middle has `len` bytes: what strays from it
    /// changes the others.
    pub(crate) fn guarded(&self, len: usize) -> [LocalBuffer; 3] {
        let mut rest = self.buffer(&vec![0xa5; GUARD_LEN + len + GUARD_LEN]);
        let before = rest.split_to(GUARD_LEN).expect("it is longer");
        let middle = rest.split_to(len).expect("it is longer");
        [before, middle, rest]
    }

    pub(crate) fn image_bytes(&self, byte_offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.image
            .read_at(byte_offset, &mut bytes)
            .expect("inside of the image");
        bytes
    }

    pub(crate) fn fill_image(&self, byte_offset: usize, bytes: &[u8]) {
        self.image
            .write_at(byte_offset, bytes)
            .expect("inside of the image");
    }
}

/// Bytes on either side of what is written to, which must stay `0xa5`.
pub(crate) const GUARD_LEN: usize = 16;

/// Bytes that differ from each other and for each `seed`; both sides know them.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        // Xorshift: cheap, and without the period of a counter.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[2]
    };
    std::iter::repeat_with(next).take(len).collect()
}
