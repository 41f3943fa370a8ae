//! Unreliable connections: SEND and WRITE to one peer, which answers nothing.
//!
//! ```text
//!   create_unreliable() ─▶ init() ─▶ ready_to_receive() ─▶ ready_to_send()
//! ```

use std::marker::PhantomData;

use rdma_core_bindings as ffi;

use super::{
    AddressVector, Init, QpAttributes, QpCapabilities, QpInner, QueuePair, Reset, Rtr, Rts,
};
use crate::cq::CompletionQueue;
use crate::error::{Failed, Result};
use crate::pd::ProtectionDomain;
use crate::srq::SharedReceiveQueue;
use crate::types::{Mtu, Psn, QpState, Qpn};

/// Unreliable connection: with one peer, in order, but a message may be lost. Its completion says only that
/// it was sent.
#[derive(Debug)]
pub struct Unreliable;

/// An unreliably connected queue pair, ready to send unless another state is named.
///
/// A message that loses a packet, meets no receive, does not fit it or may not write where it wants to is
/// dropped without a word, and its receive serves the next. What a WRITE that broke off has placed stays.
/// Nothing slows the sender down: more than the peer can take in is lost.
///
/// A send that fails moves the queue pair to SQE, on kernel rxe to ERR. From SQE,
/// [`modify`](QueuePair::modify) to RTS resumes.
///
/// ```
/// use transport::{
///     AccessFlags, AddressVector, CompletionQueue, Context, InitAttr, Mtu, ProtectionDomain, Psn,
///     QpCapabilities, QueuePair, SendFlags, Source, UnreliableRtrAttr,
/// };
///
/// let context = Context::open(&"soft".parse()?)?;
/// let pd = ProtectionDomain::alloc(&context)?;
/// let cq = CompletionQueue::create(&context, 1024, None)?;
/// let port = context.active_port()?.port_num;
/// let gid = context.best_gid(port)?;
///
/// let qp = QueuePair::create_unreliable(&pd, &cq, &cq, &QpCapabilities::default())?;
/// let qp = qp.init(&InitAttr { port, pkey_index: 0, access: AccessFlags::REMOTE_WRITE })?;
/// // Connected to itself, for the sake of the example.
/// let psn = Psn::random()?;
/// let dest_qpn = qp.qpn();
/// let qp = qp.ready_to_receive(&UnreliableRtrAttr {
///     path: AddressVector {
///         port,
///         sgid_index: u8::try_from(gid.index)?,
///         dgid: Some(gid.gid),
///         dlid: 0,
///         sl: 0,
///         hop_limit: 64,
///         traffic_class: 0,
///         flow_label: 0,
///     },
///     path_mtu: Mtu::Mtu1024,
///     dest_qpn,
///     rq_psn: psn,
/// })?;
/// let mut qp = qp.ready_to_send(psn)?;
///
/// qp.post_recv(1, pd.alloc_local(64)?)?;
/// let mut chain = qp.start_send();
/// chain.send(2, Source::Inline(b"hello"), SendFlags::SIGNALED)?;
/// chain.submit()?;
///
/// let mut completions = Vec::new();
/// while completions.len() < 2 {
///     cq.poll(&mut completions)?;
/// }
/// for completion in completions {
///     if let Some(buffer) = qp.complete(completion)?.buffer {
///         assert_eq!(&buffer.as_slice()[..5], b"hello");
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// READ, atomics and SEND with invalidate need a reliable connection:
///
/// ```compile_fail,E0599
/// fn read(qp: &mut transport::UnreliableQp, into: transport::LocalBuffer, from: transport::Remote) {
///     let _ = qp.start_send().read(1, into, from, transport::SendFlags::SIGNALED);
/// }
/// ```
pub type UnreliableQp<S = Rts> = QueuePair<S, Unreliable>;

/// Attributes of INIT to RTR of an unreliably connected queue pair.
#[derive(Debug, Clone)]
pub struct UnreliableRtrAttr {
    /// The way to the peer.
    pub path: AddressVector,
    /// Payload of full packets; equal on both sides.
    pub path_mtu: Mtu,
    /// The peer's queue pair.
    pub dest_qpn: Qpn,
    /// The peer's starting sequence number.
    pub rq_psn: Psn,
}

impl QueuePair<Reset, Unreliable> {
    /// Creates an unreliably connected queue pair whose completions go to the two queues, which may be one.
    ///
    /// # Errors
    ///
    /// As [`QueuePair::create`].
    ///
    /// # References
    ///
    /// `ibv_create_qp(3)`.
    pub fn create_unreliable(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        capabilities: &QpCapabilities,
    ) -> Result<Self> {
        let qp_type = ffi::IBV_QPT_UC;
        let inner = QpInner::create(&pd.0, &send_cq.0, &recv_cq.0, None, capabilities, qp_type)?;
        Ok(QueuePair {
            inner: Box::new(inner),
            kind: PhantomData,
        })
    }

    /// Creates an unreliably connected queue pair that takes its receives from `srq`; the capabilities for
    /// receives do not matter.
    ///
    /// A receive whose message broke off waits for the next message of this queue pair; on kernel rxe it
    /// completes with an error.
    ///
    /// # Errors
    ///
    /// As [`QueuePair::create_with_srq`].
    ///
    /// # References
    ///
    /// `ibv_create_qp(3)`.
    pub fn create_unreliable_with_srq(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        srq: &SharedReceiveQueue,
        capabilities: &QpCapabilities,
    ) -> Result<Self> {
        let qp_type = ffi::IBV_QPT_UC;
        let (send_cq, recv_cq, srq) = (&send_cq.0, &recv_cq.0, &srq.0);
        let inner = QpInner::create_with_srq(&pd.0, send_cq, recv_cq, srq, capabilities, qp_type)?;
        Ok(QueuePair {
            inner: Box::new(inner),
            kind: PhantomData,
        })
    }
}

impl QueuePair<Init, Unreliable> {
    /// INIT to RTR: chooses the peer, whose messages are received from now on.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`](crate::Error::Modify), with the queue pair in its old state.
    pub fn ready_to_receive(
        self,
        attr: &UnreliableRtrAttr,
    ) -> Result<QueuePair<Rtr, Unreliable>, Failed<Self>> {
        let attributes = QpAttributes {
            path: Some(attr.path),
            path_mtu: Some(attr.path_mtu),
            dest_qpn: Some(attr.dest_qpn),
            rq_psn: Some(attr.rq_psn),
            ..QpAttributes::default()
        };
        self.transition(QpState::Rtr, &attributes)
    }
}

impl QueuePair<Rtr, Unreliable> {
    /// RTR to RTS: messages may be sent from now on, their packets numbered from `sq_psn`.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`](crate::Error::Modify), with the queue pair in its old state.
    pub fn ready_to_send(self, sq_psn: Psn) -> Result<UnreliableQp, Failed<Self>> {
        let attributes = QpAttributes {
            sq_psn: Some(sq_psn),
            ..QpAttributes::default()
        };
        self.transition(QpState::Rts, &attributes)
    }
}
