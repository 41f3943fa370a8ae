//! Two connected ends, and how to wait for what they do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::connect::{ConnectConfig, Prepared};
use transport::{
    AccessFlags, Completion, CompletionQueue, Context, DeviceSelector, Done, LocalBuffer, Mapping,
    ProtectionDomain, QpCapabilities, ReadyQp, Remote, SendFlags, SharedRegion, Source, WcStatus,
};

/// How long anything may take; an emulated machine is slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The length of each end's image.
pub(crate) const IMAGE_LEN: usize = 4 << 20;

/// Every right there is.
pub(crate) const ALL: AccessFlags = AccessFlags::LOCAL_WRITE
    .union(AccessFlags::REMOTE_WRITE)
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_ATOMIC);

pub(crate) const SIGNALED: SendFlags = SendFlags::SIGNALED;

/// Message lengths around everything that matters to segmentation and padding.
pub(crate) const SIZES: [usize; 20] = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    63,
    64,
    255,
    257,
    1023,
    1024,
    1025,
    4096,
    4097,
    8193,
    65_537,
    1 << 20,
];

/// Opens the device under test, or tells why the test is skipped.
pub(crate) fn open() -> Option<Context> {
    let name = std::env::var("FARLOG_TEST_DEVICE").unwrap_or_else(|_| "soft".to_owned());
    let selector: DeviceSelector = name.parse().expect("FARLOG_TEST_DEVICE");
    match Context::open(&selector) {
        Ok(context) => Some(context),
        // The software device needs nothing, so nothing excuses its absence.
        Err(error) if matches!(selector, DeviceSelector::Soft(_)) => panic!("{error}"),
        Err(error) if std::env::var_os("FARLOG_REQUIRE_DEVICE").is_some_and(|v| v == "1") => {
            panic!("device {name} is required: {error}")
        }
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// One end of a connection.
pub(crate) struct End {
    pub(crate) qp: ReadyQp,
    pub(crate) cq: CompletionQueue,
    pub(crate) region: Arc<SharedRegion>,
    pub(crate) image: Arc<Mapping>,
    pub(crate) pd: ProtectionDomain,
    pub(crate) context: Context,
    polled: Vec<Completion>,
}

/// Two ends connected with each other.
pub(crate) struct Pair {
    pub(crate) near: End,
    pub(crate) far: End,
}

/// What both ends of a test usually are.
pub(crate) fn config() -> ConnectConfig {
    ConnectConfig {
        access: ALL,
        capabilities: QpCapabilities {
            max_send_wr: 64,
            max_recv_wr: 64,
            max_send_sge: 4,
            max_recv_sge: 4,
            max_inline_data: 64,
        },
        ..ConnectConfig::default()
    }
}

/// A connection with every right at both ends.
pub(crate) fn pair() -> Option<Pair> {
    pair_with(&config(), &config(), ALL)
}

/// A connection between ends of these kinds, with these rights on the images.
pub(crate) fn pair_with(
    near: &ConnectConfig,
    far: &ConnectConfig,
    access: AccessFlags,
) -> Option<Pair> {
    let (near, far) = (
        Half::new(open()?, near, access),
        Half::new(open()?, far, access),
    );
    let (near_end, far_end) = (near.prepared.end_point(), far.prepared.end_point());
    Some(Pair {
        near: near.connect(&far_end),
        far: far.connect(&near_end),
    })
}

/// An end without its peer.
pub(crate) struct Half {
    pub(crate) prepared: Prepared,
    cq: CompletionQueue,
    region: SharedRegion,
    image: Arc<Mapping>,
    pd: ProtectionDomain,
    context: Context,
}

impl Half {
    pub(crate) fn new(context: Context, config: &ConnectConfig, access: AccessFlags) -> Half {
        let pd = ProtectionDomain::alloc(&context).unwrap();
        let cq = CompletionQueue::create(&context, 256, None).unwrap();
        let image = Mapping::anonymous(IMAGE_LEN).unwrap();
        let region = pd.register(&image, 0..IMAGE_LEN, access, None).unwrap();
        let prepared = Prepared::create(&pd, &cq, &cq, config).unwrap();
        Half {
            prepared,
            cq,
            region,
            image,
            pd,
            context,
        }
    }

    pub(crate) fn connect(self, peer: &transport::connect::EndPoint) -> End {
        End {
            qp: self.prepared.connect(peer).unwrap(),
            cq: self.cq,
            region: Arc::new(self.region),
            image: self.image,
            pd: self.pd,
            context: self.context,
            polled: Vec::new(),
        }
    }
}

impl End {
    /// Waits for the next completion of this end's queue pair.
    pub(crate) fn next(&mut self) -> Done {
        let completion = self.next_completion();
        self.qp.complete(completion).unwrap()
    }

    pub(crate) fn next_completion(&mut self) -> Completion {
        assert!(
            self.has_completion(PATIENCE),
            "no completion within {PATIENCE:?}"
        );
        self.polled.remove(0)
    }

    /// Polls until there is a completion, at most `timeout`.
    pub(crate) fn has_completion(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.polled.is_empty() && Instant::now() < deadline {
            if self.cq.poll(&mut self.polled).unwrap() == 0 {
                std::thread::yield_now();
            }
        }
        !self.polled.is_empty()
    }

    /// Waits for the next completion, which must be that of `wr_id` in success.
    pub(crate) fn expect(&mut self, wr_id: u64) -> Done {
        let done = self.next();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::Success));
        done
    }

    /// Waits for the next completion, which must be that of `wr_id` with one of the statuses.
    pub(crate) fn expect_error(&mut self, wr_id: u64, statuses: &[WcStatus]) -> Done {
        let done = self.next();
        assert_eq!(done.wr_id, wr_id, "{}", done.status);
        assert!(
            statuses.contains(&done.status),
            "{} is none of {statuses:?}",
            done.status
        );
        done
    }

    /// Looks for a while whether there is a completion, which there must not be.
    pub(crate) fn expect_nothing(&mut self) {
        let is_quiet = !self.has_completion(Duration::from_millis(30));
        assert!(is_quiet, "unexpected: {:?}", self.polled);
    }

    /// The bytes of this end's image.
    pub(crate) fn image_bytes(&self, byte_offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.image.read_at(byte_offset, &mut bytes).unwrap();
        bytes
    }

    /// A registered buffer of this end, filled with `bytes`.
    pub(crate) fn buffer(&self, bytes: &[u8]) -> LocalBuffer {
        // A buffer of no bytes is the end of a longer one.
        let mut buffer = self.pd.alloc_local(bytes.len() + 1).unwrap();
        buffer.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        buffer.split_to(bytes.len()).unwrap()
    }

    /// What the peer needs to reach `byte_offset` of this end's image.
    pub(crate) fn remote(&self, byte_offset: usize) -> Remote {
        self.region.remote().at(byte_offset as u64)
    }

    /// Posts one WRITE and waits until it is done.
    pub(crate) fn write(&mut self, bytes: &[u8], remote: Remote) -> Done {
        let source = Source::Local(self.buffer(bytes));
        let mut chain = self.qp.start_send();
        chain.write(1, source, remote, SIGNALED).unwrap();
        chain.submit().unwrap();
        self.next()
    }

    /// Posts one READ and waits until it is done.
    pub(crate) fn read(&mut self, len: usize, remote: Remote) -> Done {
        let into = self.buffer(&vec![0xa5; len]);
        let mut chain = self.qp.start_send();
        chain.read(2, into, remote, SIGNALED).unwrap();
        chain.submit().unwrap();
        self.next()
    }
}

/// Bytes that differ from each other and for each `seed`.
pub(crate) fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        // Xorshift: cheap, and without the period of a counter.
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[1]
    };
    std::iter::repeat_with(next).take(len).collect()
}
