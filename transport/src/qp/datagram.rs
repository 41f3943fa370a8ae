//! Queue pairs for datagrams: one reaches many, without a connection.
//!
//! ```text
//!   create_datagram() ─▶ init() ─▶ ready_to_receive() ─▶ ready_to_send()
//! ```

use std::marker::PhantomData;
use std::sync::Arc;

use rdma_core_bindings as ffi;

use super::queue::Held;
use super::send::{SendChain, immediate};
use super::{Init, QpAttributes, QpCapabilities, QpInner, QueuePair, Reset, Rtr, Rts};
use crate::ah::Destination;
use crate::cq::CompletionQueue;
use crate::device::Context;
use crate::error::{Failed, Result};
use crate::pd::ProtectionDomain;
use crate::srq::SharedReceiveQueue;
use crate::types::{Psn, Qkey, QpState, SendFlags};
use crate::work::{Gather, check_pd};

/// Unreliable datagrams: a message is one packet, to any queue pair that has its Q_Key. It may be lost, and
/// its completion says only that it was sent.
#[derive(Debug)]
pub struct Datagram;

/// A queue pair for datagrams, ready to send unless another state is named.
///
/// A message carries at most the port's active MTU ([`PortAttr::active_mtu`](crate::PortAttr::active_mtu)).
/// A receive needs room for [`GRH_LEN`](crate::GRH_LEN) bytes more, which come first in its buffers; a
/// datagram that does not fit, or meets no receive, is dropped without a word. [`Done`](crate::Done) tells
/// the message's own length, and who sent it.
///
/// A send that fails moves the queue pair to SQE, on kernel rxe to ERR. From SQE,
/// [`modify`](QueuePair::modify) to RTS resumes.
///
/// ```
/// use transport::{
///     AddressHandle, AddressVector, CompletionQueue, Context, DatagramInitAttr, Destination, GRH_LEN,
///     ProtectionDomain, Psn, QpCapabilities, Qkey, QueuePair, SendFlags, Source,
/// };
///
/// let context = Context::open(&"soft".parse()?)?;
/// let pd = ProtectionDomain::alloc(&context)?;
/// let cq = CompletionQueue::create(&context, 1024, None)?;
/// let port = context.active_port()?.port_num;
/// let qkey = Qkey(0x1234);
///
/// let qp = QueuePair::create_datagram(&pd, &cq, &cq, &QpCapabilities::default())?;
/// let qp = qp.init(&DatagramInitAttr { port, pkey_index: 0, qkey })?;
/// let qp = qp.ready_to_receive()?;
/// let mut qp = qp.ready_to_send(Psn::random()?)?;
///
/// // To itself, for the sake of the example.
/// let gid = context.best_gid(port)?;
/// let path = AddressVector {
///     port,
///     sgid_index: u8::try_from(gid.index)?,
///     dgid: Some(gid.gid),
///     dlid: 0,
///     sl: 0,
///     hop_limit: 64,
///     traffic_class: 0,
///     flow_label: 0,
/// };
/// let handle = AddressHandle::create(&pd, &path)?;
/// let to = Destination { handle, qpn: qp.qpn(), qkey };
///
/// qp.post_recv(1, pd.alloc_local(GRH_LEN + 64)?)?;
/// let mut chain = qp.start_send();
/// chain.send(2, Source::Inline(b"hello"), &to, SendFlags::SIGNALED)?;
/// chain.submit()?;
///
/// let mut completions = Vec::new();
/// while completions.len() < 2 {
///     cq.poll(&mut completions)?;
/// }
/// for completion in completions {
///     let done = qp.complete(completion)?;
///     if let (Some(sender), Some(buffer)) = (done.sender, done.buffer) {
///         assert_eq!((sender.qpn, sender.gid), (qp.qpn(), Some(gid.gid)));
///         assert_eq!(&buffer.as_slice()[GRH_LEN..][..done.byte_len as usize], b"hello");
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub type DatagramQp<S = Rts> = QueuePair<S, Datagram>;

/// Attributes of RESET to INIT of a queue pair for datagrams.
#[derive(Debug, Clone)]
pub struct DatagramInitAttr {
    /// The port, from 1.
    pub port: u8,
    /// Index into the partition key table; 0 is the default partition.
    pub pkey_index: u16,
    /// What datagrams must carry to be received.
    pub qkey: Qkey,
}

impl QueuePair<Reset, Datagram> {
    /// Creates a queue pair for datagrams whose completions go to the two queues, which may be one.
    ///
    /// # Errors
    ///
    /// As [`QueuePair::create`].
    ///
    /// # References
    ///
    /// `ibv_create_qp(3)`.
    pub fn create_datagram(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        capabilities: &QpCapabilities,
    ) -> Result<Self> {
        let qp_type = ffi::IBV_QPT_UD;
        let inner = QpInner::create(&pd.0, &send_cq.0, &recv_cq.0, None, capabilities, qp_type)?;
        Ok(QueuePair {
            inner: Box::new(inner),
            kind: PhantomData,
        })
    }

    /// Creates a queue pair for datagrams that takes its receives from `srq`; the capabilities for receives do
    /// not matter.
    ///
    /// A datagram takes a request out only if it goes into it.
    ///
    /// # Errors
    ///
    /// As [`QueuePair::create_with_srq`].
    ///
    /// # References
    ///
    /// `ibv_create_qp(3)`.
    pub fn create_datagram_with_srq(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        srq: &SharedReceiveQueue,
        capabilities: &QpCapabilities,
    ) -> Result<Self> {
        let qp_type = ffi::IBV_QPT_UD;
        let (send_cq, recv_cq, srq) = (&send_cq.0, &recv_cq.0, &srq.0);
        let inner = QpInner::create_with_srq(&pd.0, send_cq, recv_cq, srq, capabilities, qp_type)?;
        Ok(QueuePair {
            inner: Box::new(inner),
            kind: PhantomData,
        })
    }

    /// RESET to INIT: chooses the port and the key.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`](crate::Error::Modify) or [`Error::Verb`](crate::Error::Verb), with the queue pair in
    /// its old state.
    pub fn init(
        mut self,
        attr: &DatagramInitAttr,
    ) -> Result<QueuePair<Init, Datagram>, Failed<Self>> {
        let attributes = QpAttributes {
            port: Some(attr.port),
            pkey_index: Some(attr.pkey_index),
            qkey: Some(attr.qkey),
            ..QpAttributes::default()
        };
        let context = Context(Arc::clone(&self.inner.pd.context));
        // A port that does not exist is for the transition to refuse, which can say so best.
        if let Ok(port) = context.port(attr.port)
            && let Some(mtu) = port.active_mtu
        {
            self.inner.message_len_max = mtu.bytes();
        }
        self.transition(QpState::Init, &attributes)
    }
}

impl QueuePair<Init, Datagram> {
    /// INIT to RTR: datagrams are received from now on.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`](crate::Error::Modify), with the queue pair in its old state.
    pub fn ready_to_receive(self) -> Result<QueuePair<Rtr, Datagram>, Failed<Self>> {
        self.transition(QpState::Rtr, &QpAttributes::default())
    }
}

impl QueuePair<Rtr, Datagram> {
    /// RTR to RTS: datagrams may be sent from now on, numbered from `sq_psn`, which nobody checks.
    ///
    /// # Errors
    ///
    /// [`Error::Modify`](crate::Error::Modify), with the queue pair in its old state.
    pub fn ready_to_send(self, sq_psn: Psn) -> Result<DatagramQp, Failed<Self>> {
        let attributes = QpAttributes {
            sq_psn: Some(sq_psn),
            ..QpAttributes::default()
        };
        self.transition(QpState::Rts, &attributes)
    }
}

impl SendChain<'_, Datagram> {
    /// Appends a datagram, at most the port's active MTU long, into the next receive of `to`.
    ///
    /// Completes when it has been sent, whether or not anybody receives it.
    ///
    /// # Errors
    ///
    /// See [`SendChain`]; [`Error::WrongProtectionDomain`](crate::Error::WrongProtectionDomain) also for an
    /// address handle of another domain. A `LocalBuffer` in `source` is dropped then; ask
    /// [`SendChain::room`] first.
    ///
    /// # References
    ///
    /// `ibv_post_send(3)`.
    pub fn send<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        to: &Destination,
        flags: SendFlags,
    ) -> Result<()> {
        self.stage(wr_id, source, to, None, flags)
    }

    /// Appends a datagram with an immediate.
    ///
    /// # Errors
    ///
    /// As [`SendChain::send`](SendChain::<Datagram>::send).
    pub fn send_imm<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        to: &Destination,
        imm: [u8; 4],
        flags: SendFlags,
    ) -> Result<()> {
        self.stage(wr_id, source, to, Some(imm), flags)
    }

    fn stage<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        to: &Destination,
        imm: Option<[u8; 4]>,
        flags: SendFlags,
    ) -> Result<()> {
        let handle = &to.handle.0;
        check_pd(&self.qp.pd, &handle.pd)?;
        let (opcode, more) = match imm {
            None => (ffi::IBV_WR_SEND, Default::default()),
            Some(imm) => (ffi::IBV_WR_SEND_WITH_IMM, immediate(imm)),
        };
        let target = ffi::ibv_send_wr__bindgen_ty_2 {
            ud: ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_3 {
                ah: handle.as_ptr(),
                remote_qpn: to.qpn.get(),
                remote_qkey: to.qkey.0,
            },
        };
        self.qp
            .stage_gather(wr_id, opcode, target, more, source, flags)?;
        self.qp.send.hold(Held::Address(Arc::clone(handle)));
        Ok(())
    }
}
