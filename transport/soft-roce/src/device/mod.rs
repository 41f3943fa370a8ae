//! The software device: what it owns, who may touch it, and who drives it.
//!
//! ```text
//! SoftDevice ---owns---> thread
//!     |                    |
//!     +-----> Shared <-----+          application threads: poll_cq, post_send, modify, dereg_mr, ...
//!               |  Mutex<Engine>          |
//!               |     queue pairs, regions, link
//!               +-- wake, drive counter   +--> CompletionQueue, EventQueue: small locks of their own
//! ```
//!
//! One mutex guards all protocol state, and every copy from or to registered memory runs under it:
//! that is why deregistering a region is an exact fence. Order of locks: engine, completion ring,
//! event queue.
//!
//! # Who drives
//!
//! Whoever polls. [`SoftDevice::poll`] looks into its completion queue and, when that is empty,
//! drives the engine itself if nobody else holds it: one thread, no hand-over, a round trip of a few
//! microseconds. Posting sends at once. The device's own [thread](self::thread) drives when nobody
//! has polled for some tens of microseconds, and sleeps when nothing arrives: a peer's READ or WRITE
//! needs nobody here to be awake.
//!
//! A drive by an application may hold an ACK for the next turn, its next call or the thread's, so
//! that the application sees what came before the ACK costs it a send.

mod capture;
mod clock;
mod cq;
mod engine;
mod events;
pub(crate) mod limits;
mod process;
mod qp;
mod qp_table;
mod registry;
mod srq_table;
mod thread;
mod timers;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use rdma_core_bindings::{IBV_NODE_CA, IBV_TRANSPORT_IB, ibv_device};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use thiserror::Error;

pub(crate) use cq::{Armed, CompletionQueue};
pub(crate) use engine::{Engine, Reports};
pub(crate) use events::{AckGate, ContextEvent, Element, EventQueue, lock};
pub(crate) use process::Process;
pub(crate) use qp::Service;
pub(crate) use qp_table::QP_COUNT_MAX;
pub(crate) use registry::live_devices;
pub(crate) use srq_table::SrqReports;

use self::capture::{SIZE_VARIABLE, captured};
use self::clock::Clock;
use self::engine::Turn;
use self::thread::DeviceThread;
use crate::link::{self, Interface, Link, UdpLink};
use crate::mr_table::Pd;
use crate::qp::{Attr, AttrMask, Mtu, QpConfig};
use crate::rc::{AckTime, Counters};
use crate::wire::Qpn;
use crate::work::Wc;

/// Bytes of the largest packet besides IP header and payload: UDP, BTH, RETH, immediate, ICRC.
const PACKET_OVERHEAD_LEN: usize = 8 + 12 + 16 + 4 + 4;

/// Drives by applications of which one, if it finds nothing, offers the core to other threads: an
/// offer costs about as much as a drive, for nothing if nobody wants the core.
const DRIVES_PER_YIELD: u64 = 4;

/// How to start a software device.
#[derive(Clone, Debug, Default)]
pub struct SoftConfig {
    /// The device's IPv4 or IPv6 address, one of this machine; `None` takes a free one of 127.0.0.0/8.
    pub address: Option<IpAddr>,
    /// The UDP port of this device and all its peers; `None` takes `FARLOG_SOFT_PORT`, or 4791.
    pub port: Option<u16>,
    /// Where to write every packet as pcapng; `None` takes `FARLOG_PCAP`, if set.
    pub pcap: Option<PathBuf>,
    /// Bytes after which the capture begins another file, keeping the one before; `None` takes
    /// `FARLOG_PCAP_SIZE` (a number of bytes, or of `k`, `M`, `G`), if set, and else sets no limit.
    pub pcap_len_max: Option<u64>,
}

/// Why a software device did not start.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// Its address or port is not to be had.
    #[error(transparent)]
    Link(#[from] link::BindError),
    /// The packet capture cannot be written.
    #[error("cannot write packets to {}: name a writable file in FARLOG_PCAP, or unset it", path.display())]
    Pcap {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The environment variable holds no size.
    #[error(
        "{SIZE_VARIABLE} is {value:?}, not a size: write bytes, or 500k, 100M, 2G, or unset it"
    )]
    BadPcapSize {
        /// What it holds.
        value: String,
    },
    /// The operating system has no thread or descriptor left for it.
    #[error(
        "cannot start the device's thread: raise the limits on processes and open files (ulimit -u, -n)"
    )]
    Thread(#[source] io::Error),
}

/// A software RDMA device: RoCEv2 over UDP, one IPv4 or IPv6 address per device.
///
/// Found in the device list of [`verbs`](crate::verbs) under its [`name`](Self::name) while it lives:
/// as long as this handle, or a context opened from it.
#[derive(Debug)]
#[repr(C)]
pub struct SoftDevice {
    /// First, so that its address is the device's.
    public: ibv_device,
    shared: Arc<Shared>,
    /// `None` only while the device is being dropped.
    thread: Option<DeviceThread>,
    _registration: registry::Registration,
    interface: Interface,
    process: Process,
}

/// What the device's thread and the application's threads share.
#[derive(Debug)]
struct Shared {
    engine: Mutex<Engine>,
    clock: Clock,
    address: IpAddr,
    /// Threads that wait in the engine's lock; those that drive let them go first.
    waiting: AtomicU32,
    /// How often an application has driven the engine; see [`thread`].
    app_drives: AtomicU64,
    /// When the device's thread will look by itself; see [`thread`].
    sleep_until: AtomicU64,
    /// Wakes the device's thread.
    wake: OwnedFd,
    is_stopping: AtomicBool,
}

impl SoftDevice {
    /// Starts a device, or returns the one that this process already has at the same address.
    ///
    /// Without an address each call starts another device.
    ///
    /// # Errors
    ///
    /// [`BindError`]; most likely that another process has the address.
    pub fn bind(config: SoftConfig) -> Result<Arc<Self>, BindError> {
        let port = config.port.map_or_else(link::port_from_env, Ok)?;
        let address = config.address.map(|address| address.to_canonical());
        registry::find_or_insert(address, port, || {
            let udp = UdpLink::bind(address, port)?;
            Self::start(captured(udp, config.pcap, config.pcap_len_max)?)
        })
    }

    /// The name in the device list and on command lines: `soft@` and the address.
    #[must_use]
    pub fn name(&self) -> String {
        name_of(self.shared.address)
    }

    /// The address, which is the device's identity on the network.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.shared.address
    }

    /// What happened so far at all connections of the device together.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.engine().rc_counters()
    }

    fn start(link: Box<dyn Link>) -> Result<Self, BindError> {
        Process::watch_forks();
        let local = link.local_addr();
        let address = local.ip();
        let socket = link.fd().try_clone_to_owned().map_err(BindError::Thread)?;
        let shared = Arc::new(Shared {
            engine: Mutex::new(Engine::new(link, random())),
            clock: Clock::start(),
            address,
            waiting: AtomicU32::new(0),
            app_drives: AtomicU64::new(0),
            sleep_until: AtomicU64::new(0),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| BindError::Thread(errno.into()))?,
            is_stopping: AtomicBool::new(false),
        });
        let thread = DeviceThread::start(Arc::clone(&shared), socket).map_err(BindError::Thread)?;
        tracing::debug!(%address, "software device started");
        Ok(Self {
            public: public_part(address),
            shared,
            thread: Some(thread),
            _registration: registry::Registration::new(address, local.port()),
            interface: Interface::of(address),
            process: Process::this(),
        })
    }

    /// Takes completions of `cq`, driving the engine if there are none.
    pub(crate) fn poll(
        &self,
        cq: &CompletionQueue,
        count_max: usize,
        mut take: impl FnMut(usize, &Wc),
    ) -> Result<usize, Errno> {
        let count = cq.pop(count_max, &mut take);
        if count > 0 || count_max == 0 {
            return Ok(count);
        }
        let may_yield = self
            .shared
            .drive_for_app()
            .is_none_or(|(turn, drives)| turn.received == 0 && drives % DRIVES_PER_YIELD == 0);
        let count = cq.pop(count_max, take);
        if count == 0 {
            if cq.is_overrun() {
                return Err(Errno::IO);
            }
            if may_yield {
                // Callers poll in a loop, and the peer may need this very core to answer.
                rustix::thread::sched_yield();
            }
        }
        Ok(count)
    }

    /// Locks the engine and sends what `post` has queued.
    pub(crate) fn post<T>(&self, post: impl FnOnce(&mut Engine) -> T) -> T {
        let mut engine = self.engine();
        let result = post(&mut engine);
        let now = self.shared.clock.now();
        let has_more = engine.serve(now, AckTime::Now);
        self.shared.leave(engine, now, has_more);
        result
    }

    /// Locks the engine for a call that sends nothing.
    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.shared.wait_for_engine()
    }

    /// Tells the device's thread that the application is about to sleep until a completion comes.
    pub(crate) fn expect_sleep(&self) {
        self.shared.wake_watcher();
    }

    /// Number of a new protection domain.
    pub(crate) fn allocate_pd(&self) -> Pd {
        self.engine().allocate_pd()
    }

    pub(crate) fn attach(&self, events: &Arc<EventQueue<ContextEvent>>) {
        self.engine().attach(Arc::clone(events));
    }

    pub(crate) fn detach(&self, events: &Arc<EventQueue<ContextEvent>>) {
        self.engine().detach(events);
    }

    /// Creates a queue pair in RESET.
    pub(crate) fn create_qp(
        &self,
        service: Service,
        config: QpConfig,
        reports: Reports,
    ) -> Result<Qpn, Errno> {
        let qpn = self.engine().create_qp(service, config, reports);
        qpn.ok_or(Errno::NOMEM)
    }

    /// Changes attributes and state of a queue pair.
    pub(crate) fn modify_qp(&self, qpn: Qpn, attr: &Attr, mask: AttrMask) -> Result<(), Errno> {
        self.post(|engine| {
            // A held ACK would be lost.
            engine.serve(self.shared.clock.now(), AckTime::Now);
            engine.modify_qp(qpn, attr, mask)
        })
        .map_err(|error| {
            tracing::debug!(qp = qpn.get(), %error, "queue pair not modified");
            Errno::INVAL
        })
    }

    /// The present attributes of a queue pair, and whether its send queue is draining.
    pub(crate) fn query_qp(&self, qpn: Qpn) -> Result<(Attr, bool), Errno> {
        let mut engine = self.engine();
        let qp = engine.qp(qpn).ok_or(Errno::INVAL)?;
        Ok((*qp.attr(), qp.is_draining()))
    }

    /// Destroys a queue pair: when this returns, nothing that its requests point to is touched any
    /// more, and all its events are acknowledged.
    pub(crate) fn destroy_qp(&self, qpn: Qpn) -> Result<(), Errno> {
        let reports = self.post(|engine| {
            // A held ACK would be lost.
            engine.serve(self.shared.clock.now(), AckTime::Now);
            engine.destroy_qp(qpn)
        });
        let reports = reports.ok_or(Errno::INVAL)?;
        // Without the lock: the acknowledgement may take as long as the application likes.
        reports.gate.wait_all_acked();
        Ok(())
    }

    /// Stops the device for good after a panic.
    pub(crate) fn fatal(&self, cause: &str) {
        self.shared.fatal(cause);
    }

    /// Whether the device was started by this process, and not by one that it was forked from.
    pub(crate) fn is_ours(&self) -> bool {
        self.process == Process::this()
    }

    /// Name of the address among GUIDs, in network byte order: the EUI-64 of [`mac_of`](Self::mac_of).
    pub(crate) fn node_guid(&self) -> u64 {
        let [a, b, c, d, e, f] = Self::mac_of(self.shared.address);
        u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]).to_be()
    }

    /// A locally administered Ethernet address that belongs to an IPv4 address alone, or to an IPv6
    /// address: two that differ within 32 adjacent bits, as most of a network do, have different ones.
    pub(crate) fn mac_of(address: IpAddr) -> [u8; 6] {
        let (family, [a, b, c, d]) = match address {
            IpAddr::V4(address) => (0x52, address.octets()),
            IpAddr::V6(address) => (0x56, crc32fast::hash(&address.octets()).to_be_bytes()),
        };
        [0x02, family, a, b, c, d]
    }

    /// Index of the network interface that has the address, 0 if unknown.
    pub(crate) fn interface_index(&self) -> u32 {
        self.interface.index
    }

    /// The largest path MTU whose packets pass the interface unfragmented.
    pub(crate) fn active_mtu(&self) -> Mtu {
        let ip_len = if self.shared.address.is_ipv4() {
            20
        } else {
            40
        };
        let room = (self.interface.mtu as usize).saturating_sub(ip_len + PACKET_OVERHEAD_LEN);
        let mtus = [Mtu::Mtu4096, Mtu::Mtu2048, Mtu::Mtu1024, Mtu::Mtu512];
        mtus.into_iter()
            .find(|mtu| mtu.bytes() <= room)
            .unwrap_or(Mtu::Mtu256)
    }
}

impl Drop for SoftDevice {
    /// Ends the thread first: after that nobody drives, and the socket closes with the last part of
    /// `shared`, which is dropped before the registration lets the address be bound again.
    fn drop(&mut self) {
        if !self.is_ours() {
            // The thread is the parent's.
            std::mem::forget(self.thread.take());
        }
        if let Some(thread) = self.thread.take() {
            self.shared.is_stopping.store(true, Ordering::Release);
            self.shared.wake_thread();
            thread.join();
        }
    }
}

impl Shared {
    /// Drives the engine for a polling application, or returns `None` if someone else has it.
    ///
    /// The number is that of earlier drives.
    fn drive_for_app(&self) -> Option<(Turn, u64)> {
        // A thread that waits in the lock is not woken fast enough to win against a polling loop.
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let mut engine = self.try_engine()?;
        let now = self.clock.now();
        // Only while the thread watches the polls: who polls now and then would have it woken, or the
        // peer wait.
        let ack_time = if self.sleep_until.load(Ordering::Relaxed) == 0 {
            AckTime::WithNextTurn
        } else {
            AckTime::Now
        };
        let turn = engine.drive(now, ack_time);
        // Relaxed: a count, compared with itself; see `thread`.
        let drives = self.app_drives.fetch_add(1, Ordering::Relaxed);
        self.leave(engine, now, turn.has_more);
        Some((turn, drives))
    }

    /// Gives the engine back. Wakes the device's thread if something is due before it would look:
    /// whoever posted or polled may do neither again for long.
    fn leave(&self, engine: MutexGuard<'_, Engine>, now: u64, has_more: bool) {
        let due = if has_more {
            Some(now)
        } else {
            engine.next_deadline()
        };
        // Written under the lock by the thread before it sleeps, and here: see `thread`.
        let is_late = due.is_some_and(|due| due < self.sleep_until.load(Ordering::Relaxed));
        if is_late {
            self.sleep_until.store(0, Ordering::Relaxed);
        }
        drop(engine);
        if is_late {
            self.wake_thread();
        }
    }

    fn try_engine(&self) -> Option<MutexGuard<'_, Engine>> {
        match self.engine.try_lock() {
            Ok(engine) => Some(engine),
            // A panic under the lock has stopped the device, or is about to.
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn wait_for_engine(&self) -> MutexGuard<'_, Engine> {
        if let Some(engine) = self.try_engine() {
            return engine;
        }
        // Relaxed: a hint to the threads that drive, which leave the lock between turns anyway.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let engine = lock(&self.engine);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        engine
    }

    fn fatal(&self, cause: &str) {
        tracing::error!(address = %self.address, "{cause}: the software device stops");
        lock(&self.engine).die();
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the kernel hands out random bytes once it has booted");
    u64::from_le_bytes(bytes)
}

fn name_of(address: IpAddr) -> String {
    format!("soft@{address}")
}

fn public_part(address: IpAddr) -> ibv_device {
    let mut name = [0; 64];
    // At most 44 bytes; the rest stays the end of the string.
    for (to, byte) in name.iter_mut().zip(name_of(address).bytes()) {
        *to = byte.cast_signed();
    }
    ibv_device {
        _ops: Default::default(),
        node_type: IBV_NODE_CA,
        transport_type: IBV_TRANSPORT_IB,
        name,
        dev_name: name,
        dev_path: [0; 256],
        ibdev_path: [0; 256],
    }
}
