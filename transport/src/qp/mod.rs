//! Queue pairs: connections and datagrams, whose states are types.
//!
//! ```text
//!              init()              ready_to_receive()         ready_to_send()
//!   create ─▶ QueuePair<Reset> ─▶ QueuePair<Init> ─▶ QueuePair<Rtr> ─▶ QueuePair<Rts> = ReadyQp
//!   post_recv      no                  yes                yes               yes
//!   start_send     no                  no                 no                yes
//! ```
//!
//! Those for datagrams, and those whose connection is unreliable, go the same way with other attributes:
//! see [`DatagramQp`] and [`UnreliableQp`].
//!
//! What does not follow this order is seen at run time: a queue pair in ERR is still a `ReadyQp` whose
//! requests are flushed, and [`QueuePair::query`] tells its state.
//!
//! # Safety
//!
//! `QpInner` owns one `ibv_qp` until it is dropped, and holds its protection domain, completion queues and shared
//! receive queue, which owns what the receives that it takes from there point to.
//! Every posted request's memory is in `send` or `recv` ([`queue::Outstanding`]), or with the call that is
//! just posting it, until its completion, or a later one of the same queue, has been polled, or until
//! `ibv_destroy_qp` has returned 0; if that fails it is kept for ever. A forgotten queue pair is never
//! dropped and so frees nothing.
#![allow(unsafe_code, reason = "calls the verbs table")]

mod attr;
mod datagram;
mod queue;
mod recv;
mod send;
mod staging;
mod transition;
mod unreliable;
mod window;

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rdma_core_bindings as ffi;

pub use attr::{AddressVector, InitAttr, QpAttributes, QpCapabilities, QpStatus, RtrAttr, RtsAttr};
pub use datagram::{Datagram, DatagramInitAttr, DatagramQp};
pub(crate) use queue::{RECEIVE_BIT, Released, TAG_SHIFT};
pub(crate) use recv::{RECV_SGE_MAX, ScatterList};
pub use send::SendChain;
pub use transition::Diagnosis;
pub use unreliable::{Unreliable, UnreliableQp, UnreliableRtrAttr};

use crate::ah::{GRH_LEN, Sender};
use crate::cq::{CompletionQueue, CqInner};
use crate::device::Context;
use crate::error::{Error, Failed, Result};
use crate::mr::MESSAGE_LEN_MAX;
use crate::mw::MwInner;
use crate::pd::{PdInner, ProtectionDomain};
use crate::srq::{SharedReceiveQueue, SrqInner};
use crate::types::{QpState, Qpn};
use crate::work::{Completion, Done, check_pd};
use queue::Outstanding;
use staging::Staging;

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Reset {}
    impl Sealed for super::Init {}
    impl Sealed for super::Rtr {}
    impl Sealed for super::Rts {}
    impl Sealed for super::Connected {}
    impl Sealed for super::Unreliable {}
    impl Sealed for super::Datagram {}
}

/// A state that a queue pair was brought to.
pub trait State: sealed::Sealed {}

/// A state in which receives may be posted.
pub trait CanReceive: State {}

/// As created.
#[derive(Debug)]
pub struct Reset;
/// Receives may be posted; nothing is processed.
#[derive(Debug)]
pub struct Init;
/// Ready to receive.
#[derive(Debug)]
pub struct Rtr;
/// Ready to send.
#[derive(Debug)]
pub struct Rts;

impl State for Reset {}
impl State for Init {}
impl State for Rtr {}
impl State for Rts {}
impl CanReceive for Init {}
impl CanReceive for Rtr {}
impl CanReceive for Rts {}

/// How a queue pair talks to others.
pub trait Service: sealed::Sealed {}

/// Reliable connection: with one peer, nothing lost, in order.
#[derive(Debug)]
pub struct Connected;

impl Service for Connected {}
impl Service for Unreliable {}
impl Service for Datagram {}

/// A service with one peer, reliable or not.
pub trait Connection: Service {}

impl Connection for Connected {}
impl Connection for Unreliable {}

/// A queue pair that was brought to state `S`, reliably connected unless it is an [`UnreliableQp`] or a
/// [`DatagramQp`].
///
/// It owns what its posted requests point to. Use it from one thread at a time; it may move.
///
/// Sending before the queue pair is ready does not compile:
///
/// ```compile_fail,E0599
/// fn too_early(mut qp: transport::QueuePair<transport::Init>) {
///     qp.start_send();
/// }
/// ```
///
/// nor does receiving before INIT:
///
/// ```compile_fail,E0599
/// fn too_early(mut qp: transport::QueuePair<transport::Reset>, buffer: transport::LocalBuffer) {
///     let _ = qp.post_recv(1, buffer);
/// }
/// ```
///
/// nor using the old state after a transition:
///
/// ```compile_fail,E0382
/// fn stale(qp: transport::QueuePair<transport::Reset>, attr: &transport::InitAttr) {
///     let _ = qp.init(attr);
///     let _ = qp.init(attr);
/// }
/// ```
///
/// nor touching a buffer that the device has:
///
/// ```compile_fail,E0382
/// fn too_late(mut qp: transport::ReadyQp, buffer: transport::LocalBuffer) {
///     let _ = qp.post_recv(1, buffer);
///     buffer.as_slice();
/// }
/// ```
///
/// nor releasing a request twice by one completion:
///
/// ```compile_fail,E0382
/// fn twice(mut qp: transport::ReadyQp, completion: transport::Completion) {
///     let _ = qp.complete(completion);
///     let _ = qp.complete(completion);
/// }
/// ```
pub struct QueuePair<S: State, T: Service = Connected> {
    inner: Box<QpInner>,
    kind: PhantomData<(S, T)>,
}

/// A connected queue pair that can send.
pub type ReadyQp = QueuePair<Rts>;

pub(crate) struct QpInner {
    pd: Arc<PdInner>,
    send_cq: Arc<CqInner>,
    recv_cq: Arc<CqInner>,
    /// Where its receives come from, if not from `recv`.
    srq: Option<Arc<SrqInner>>,
    qp: NonNull<ffi::ibv_qp>,
    qpn: Qpn,
    capabilities: QpCapabilities,
    qp_type: ffi::ibv_qp_type,
    /// The longest message in bytes.
    message_len_max: usize,
    /// False once `ibv_destroy_qp` has returned 0.
    is_live: bool,
    send: Outstanding,
    recv: Outstanding,
    staging: Staging,
    /// Distinguishes it from every other queue pair of the process, also from one with its number.
    tag: u64,
    /// The windows bound on it.
    windows: Vec<Weak<MwInner>>,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`); the raw pointers in
// `staging` point into itself and are written anew for each call.
unsafe impl Send for QpInner {}
// SAFETY: as above; posting and completing need `&mut`.
unsafe impl Sync for QpInner {}

/// [`GRH_LEN`] as completions count bytes.
const GRH: u32 = 40;
const _: () = assert!(GRH as usize == GRH_LEN);

/// Numbers queue pairs and shared receive queues, so that their request numbers differ; see [`queue`].
static NEXT_TAG: AtomicU64 = AtomicU64::new(1);

/// A tag for the requests of a queue.
pub(crate) fn next_tag() -> u64 {
    NEXT_TAG.fetch_add(1, Ordering::Relaxed)
}

impl QueuePair<Reset> {
    /// Creates a reliably connected queue pair whose completions go to the two queues, which may be one.
    ///
    /// Only requests flagged [`SIGNALED`](crate::SendFlags::SIGNALED) complete in success. Exactly as many
    /// requests as `capabilities` says can be outstanding, even if the device would take more.
    ///
    /// # Errors
    ///
    /// [`Error::CompletionQueueTooSmall`] if a completion queue could overflow; [`Error::WrongDevice`];
    /// [`Error::CreateQp`] tells which capability is beyond the device's limits.
    ///
    /// # References
    ///
    /// `ibv_create_qp(3)`.
    pub fn create(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        capabilities: &QpCapabilities,
    ) -> Result<QueuePair<Reset>> {
        let qp_type = ffi::IBV_QPT_RC;
        let inner = QpInner::create(&pd.0, &send_cq.0, &recv_cq.0, None, capabilities, qp_type)?;
        Ok(QueuePair {
            inner: Box::new(inner),
            kind: PhantomData,
        })
    }

    /// Creates a queue pair that takes its receives from `srq`; the capabilities for receives do not matter.
    ///
    /// The completion queue for receives needs as many entries as `srq` holds requests, once for all queue pairs
    /// that share both.
    ///
    /// # Errors
    ///
    /// As [`create`](QueuePair::create), and [`Error::WrongProtectionDomain`] if `srq` is of another domain:
    /// adapters look its buffers up in its own, kernel rxe in the queue pair's.
    ///
    /// # References
    ///
    /// `ibv_create_qp(3)`.
    pub fn create_with_srq(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        srq: &SharedReceiveQueue,
        capabilities: &QpCapabilities,
    ) -> Result<QueuePair<Reset>> {
        let qp_type = ffi::IBV_QPT_RC;
        let (send_cq, recv_cq, srq) = (&send_cq.0, &recv_cq.0, &srq.0);
        let inner = QpInner::create_with_srq(&pd.0, send_cq, recv_cq, srq, capabilities, qp_type)?;
        Ok(QueuePair {
            inner: Box::new(inner),
            kind: PhantomData,
        })
    }
}

impl<T: Connection> QueuePair<Reset, T> {
    /// RESET to INIT: chooses the port and what peers may do at all.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`], with the queue pair in its old state.
    pub fn init(self, attr: &InitAttr) -> Result<QueuePair<Init, T>, Failed<Self>> {
        self.transition(QpState::Init, &attr.attributes())
    }
}

impl QueuePair<Init> {
    /// INIT to RTR: chooses the peer, whose requests are answered from now on.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`], with the queue pair in its old state.
    pub fn ready_to_receive(self, attr: &RtrAttr) -> Result<QueuePair<Rtr>, Failed<Self>> {
        self.transition(QpState::Rtr, &attr.attributes())
    }
}

impl QueuePair<Rtr> {
    /// RTR to RTS: requests may be sent from now on.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] for `retry_cnt` above 6 (7 means for ever on some devices), else
    /// [`Error::Modify`]; with the queue pair in its old state.
    pub fn ready_to_send(self, attr: &RtsAttr) -> Result<ReadyQp, Failed<Self>> {
        if let Err(error) = attr.check() {
            return Err(Failed::new(self, error));
        }
        self.transition(QpState::Rts, &attr.attributes())
    }
}

impl<S: State, T: Service> QueuePair<S, T> {
    /// Its number, which the peer needs to connect.
    pub fn qpn(&self) -> Qpn {
        self.inner.qpn
    }

    /// The device.
    pub fn context(&self) -> Context {
        Context(Arc::clone(&self.inner.pd.context))
    }

    /// How many requests and parts it takes.
    pub fn capabilities(&self) -> &QpCapabilities {
        &self.inner.capabilities
    }

    /// Asks the device for its state and attributes. A queue pair that met an error is in ERR.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_query_qp(3)`.
    pub fn query(&self) -> Result<QpStatus> {
        self.inner.query()
    }

    /// Asks for another state or other attributes, without a change of type: to ERR, to SQD and back to RTS,
    /// RTS to RTS with other rights or another key.
    ///
    /// Any pair of states may be asked for; the device refuses what the specification forbids.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`] says which attribute is missing or not allowed; nothing has changed then.
    ///
    /// # References
    ///
    /// `ibv_modify_qp(3)`.
    pub fn modify(&mut self, to: QpState, attributes: &QpAttributes) -> Result<()> {
        self.inner.modify(to, attributes)
    }

    /// Moves to ERR: every outstanding request completes with
    /// [`WrFlushErr`](crate::WcStatus::WrFlushErr).
    ///
    /// # Errors
    ///
    /// [`Error::Modify`].
    pub fn to_error(&mut self) -> Result<()> {
        self.inner.modify(QpState::Err, &QpAttributes::default())
    }

    /// Moves back to RESET: outstanding requests vanish without completions. What they held is kept until
    /// the queue pair is destroyed.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`], with the queue pair as it was.
    pub fn reset(self) -> Result<QueuePair<Reset, T>, Failed<Self>> {
        self.transition(QpState::Reset, &QpAttributes::default())
    }

    /// Takes what a completion of this queue pair stands for, and releases what its request, and the
    /// unsignalled ones before it, held; buffers of those are dropped.
    ///
    /// # Errors
    ///
    /// [`Error::ForeignCompletion`] if it belongs to another queue pair, or to a request that a later
    /// completion has already released: hand completions over in the order polled. A destroyed queue pair can
    /// leave completions behind, and the device may give its number to a new one: ignore the error then.
    pub fn complete(&mut self, completion: Completion) -> Result<Done> {
        self.inner.complete(completion)
    }

    /// Destroys the queue pair. When this has returned `Ok` no packet from or to it moves a byte.
    ///
    /// Memory windows bound on it are freed first, and cannot be bound again.
    ///
    /// Dropping does the same, but can only report a failure, not return it.
    ///
    /// # Errors
    ///
    /// [`Error::Destroy`], with the queue pair, which may be tried again.
    ///
    /// # References
    ///
    /// `ibv_destroy_qp(3)`.
    pub fn destroy(mut self) -> Result<(), Failed<Self>> {
        self.inner
            .destroy()
            .map_err(|error| Failed::new(self, error))
    }

    fn transition<N: State>(
        mut self,
        to: QpState,
        attributes: &QpAttributes,
    ) -> Result<QueuePair<N, T>, Failed<Self>> {
        match self.inner.modify(to, attributes) {
            Ok(()) => Ok(QueuePair {
                inner: self.inner,
                kind: PhantomData,
            }),
            Err(error) => Err(Failed::new(self, error)),
        }
    }
}

impl<S: State, T: Service> fmt::Debug for QueuePair<S, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair")
            .field("qpn", &self.inner.qpn)
            .field("device", &self.inner.pd.context.name())
            .finish_non_exhaustive()
    }
}

impl QpInner {
    fn create(
        pd: &Arc<PdInner>,
        send_cq: &Arc<CqInner>,
        recv_cq: &Arc<CqInner>,
        srq: Option<&Arc<SrqInner>>,
        capabilities: &QpCapabilities,
        qp_type: ffi::ibv_qp_type,
    ) -> Result<QpInner> {
        let is_same_device = |cq: &CqInner| Arc::ptr_eq(&cq.context, &pd.context);
        if !is_same_device(send_cq) || !is_same_device(recv_cq) {
            return Err(Error::WrongDevice);
        }
        let (send_wr, recv_wr) = (
            capabilities.max_send_wr as usize,
            capabilities.max_recv_wr as usize,
        );
        send_cq.reserve(send_wr)?;
        if let Err(error) = reserve_receives(recv_cq, srq, recv_wr) {
            send_cq.release(send_wr);
            return Err(error);
        }
        let shared = srq.map(Arc::as_ref);
        let created = create_qp(pd, send_cq, recv_cq, shared, capabilities, qp_type);
        let (qp, qpn) = created.inspect_err(|_| {
            send_cq.release(send_wr);
            release_receives(recv_cq, srq, recv_wr);
        })?;
        let tag = next_tag();
        let (send_sge, recv_sge) = (
            capabilities.max_send_sge as usize,
            capabilities.max_recv_sge as usize,
        );
        Ok(QpInner {
            pd: Arc::clone(pd),
            send_cq: Arc::clone(send_cq),
            recv_cq: Arc::clone(recv_cq),
            srq: srq.cloned(),
            qp,
            qpn,
            capabilities: *capabilities,
            qp_type,
            message_len_max: MESSAGE_LEN_MAX,
            is_live: true,
            // A datagram holds its address handle besides.
            send: Outstanding::new(tag, 0, send_wr, send_sge + 1),
            recv: Outstanding::new(tag, RECEIVE_BIT, recv_wr, recv_sge),
            staging: Staging::new(capabilities),
            tag,
            windows: Vec::new(),
        })
    }

    fn create_with_srq(
        pd: &Arc<PdInner>,
        send_cq: &Arc<CqInner>,
        recv_cq: &Arc<CqInner>,
        srq: &Arc<SrqInner>,
        capabilities: &QpCapabilities,
        qp_type: ffi::ibv_qp_type,
    ) -> Result<QpInner> {
        check_pd(pd, &srq.pd)?;
        let capabilities = QpCapabilities {
            max_recv_wr: 0,
            max_recv_sge: 0,
            ..*capabilities
        };
        QpInner::create(pd, send_cq, recv_cq, Some(srq), &capabilities, qp_type)
    }

    fn as_ptr(&self) -> *mut ffi::ibv_qp {
        self.qp.as_ptr()
    }

    fn query(&self) -> Result<QpStatus> {
        let context = &self.pd.context;
        let mut attr = ffi::ibv_qp_attr::default();
        let mut init_attr = ffi::ibv_qp_init_attr::default();
        let mask = attr::QUERY_MASK.cast_signed();
        // SAFETY: a live queue pair and places for the results.
        let errno = unsafe {
            (context.verbs.query_qp)(self.as_ptr(), &raw mut attr, mask, &raw mut init_attr)
        };
        context.check("ibv_query_qp", errno)?;
        Ok(QpStatus::from_ffi(&attr))
    }

    fn modify(&mut self, to: QpState, attributes: &QpAttributes) -> Result<()> {
        let (mut attr, mask) = attributes.to_ffi(to);
        // SAFETY: a live queue pair; the attributes are plain values.
        let errno = unsafe {
            (self.pd.context.verbs.modify_qp)(self.as_ptr(), &raw mut attr, mask.cast_signed())
        };
        if errno != 0 {
            return Err(self.modify_error(to, attributes, mask, errno));
        }
        if to == QpState::Reset {
            self.send.retire();
            self.recv.retire();
        }
        Ok(())
    }

    fn modify_error(&self, to: QpState, attributes: &QpAttributes, mask: u32, errno: i32) -> Error {
        let context = Context(Arc::clone(&self.pd.context));
        let from = self
            .query()
            .map_or(QpState::Unknown(u32::MAX), |status| status.state);
        let mut diagnosis = transition::diagnose(self.qp_type, from, to, mask);
        attributes.check_limits(&context, &mut diagnosis);
        Error::Modify {
            device: context.name().to_owned(),
            qpn: self.qpn,
            from,
            to,
            diagnosis,
            source: io::Error::from_raw_os_error(errno),
        }
    }

    fn complete(&mut self, completion: Completion) -> Result<Done> {
        let Completion { wc, cq_id } = completion;
        let is_receive = wc.request & RECEIVE_BIT != 0;
        let cq = if is_receive {
            &self.recv_cq
        } else {
            &self.send_cq
        };
        let foreign = Error::ForeignCompletion {
            completion: wc.qpn,
            qpn: self.qpn,
        };
        if wc.qpn != self.qpn || cq_id != cq.id() {
            return Err(foreign);
        }
        let Some(released) = self.release(wc.request) else {
            return Err(foreign);
        };
        if let Some(change) = released.window {
            change.finish(wc.status);
        }
        if let Some(rkey) = wc.invalidated {
            self.window_revoked(rkey);
        }
        let is_datagram = self.qp_type == ffi::IBV_QPT_UD
            && wc.request & RECEIVE_BIT != 0
            && wc.status.is_success();
        let (sender, grh_len) = if is_datagram {
            let buffers = released.buffers.iter().flatten();
            (Some(Sender::read(wc.origin, buffers)), GRH)
        } else {
            (None, 0)
        };
        let [buffer, more @ ..] = released.buffers;
        Ok(Done {
            wr_id: released.wr_id,
            status: wc.status,
            opcode: wc.opcode,
            byte_len: wc.byte_len.saturating_sub(grh_len),
            imm: wc.imm,
            invalidated: wc.invalidated,
            sender,
            vendor_err: wc.vendor_err,
            buffer,
            more,
        })
    }

    fn release(&mut self, request: u64) -> Option<Released> {
        match &self.srq {
            _ if request & RECEIVE_BIT == 0 => self.send.release(request),
            Some(srq) => srq.release(request),
            None => self.recv.release(request),
        }
    }

    /// Destroys the queue pair; on failure it still exists, and so must everything it uses.
    fn destroy(&mut self) -> Result<()> {
        self.free_windows()?;
        let context = &self.pd.context;
        // SAFETY: the queue pair is live, and after success `is_live` keeps everybody from it.
        let errno = unsafe { (context.verbs.destroy_qp)(self.as_ptr()) };
        context.check_destroyed("ibv_destroy_qp", errno)?;
        self.is_live = false;
        self.send_cq.release(self.capabilities.max_send_wr as usize);
        let recv_wr = self.capabilities.max_recv_wr as usize;
        release_receives(&self.recv_cq, self.srq.as_ref(), recv_wr);
        Ok(())
    }
}

impl Drop for QpInner {
    fn drop(&mut self) {
        let context = Arc::clone(&self.pd.context);
        if !self.is_live || context.destroy_dropped(|| self.destroy()) {
            return;
        }
        self.send.leak();
        self.recv.leak();
        std::mem::forget(Arc::clone(&self.pd));
        std::mem::forget((Arc::clone(&self.send_cq), Arc::clone(&self.recv_cq)));
        std::mem::forget(self.srq.clone());
    }
}

/// Promises entries of `recv_cq` to the receives of one more queue pair.
fn reserve_receives(
    recv_cq: &Arc<CqInner>,
    srq: Option<&Arc<SrqInner>>,
    recv_wr: usize,
) -> Result<()> {
    match srq {
        Some(srq) => srq.attach(recv_cq),
        None => recv_cq.reserve(recv_wr),
    }
}

fn release_receives(recv_cq: &Arc<CqInner>, srq: Option<&Arc<SrqInner>>, recv_wr: usize) {
    match srq {
        Some(srq) => srq.detach(recv_cq),
        None => recv_cq.release(recv_wr),
    }
}

fn create_qp(
    pd: &Arc<PdInner>,
    send_cq: &CqInner,
    recv_cq: &CqInner,
    srq: Option<&SrqInner>,
    capabilities: &QpCapabilities,
    qp_type: ffi::ibv_qp_type,
) -> Result<(NonNull<ffi::ibv_qp>, Qpn)> {
    let mut init_attr = ffi::ibv_qp_init_attr {
        send_cq: send_cq.as_ptr(),
        recv_cq: recv_cq.as_ptr(),
        srq: srq.map_or(ptr::null_mut(), SrqInner::as_ptr),
        cap: capabilities.to_ffi(),
        qp_type,
        ..Default::default()
    };
    // SAFETY: the domain and the queues are live, and of one device (the shared queue is of the same domain).
    let qp = unsafe { (pd.context.verbs.create_qp)(pd.as_ptr(), &raw mut init_attr) };
    let Some(qp) = NonNull::new(qp) else {
        let source = io::Error::last_os_error();
        let context = Context(Arc::clone(&pd.context));
        let diagnosis = capabilities.diagnose(&context);
        let device = context.name().to_owned();
        return Err(Error::CreateQp {
            device,
            diagnosis,
            source,
        });
    };
    // SAFETY: just made by the table; its number never changes.
    let qp_num = unsafe { (*qp.as_ptr()).qp_num };
    Ok((qp, Qpn::from_device(qp_num)))
}
