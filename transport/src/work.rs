//! What is posted and what comes back.

use std::ops::Range;
use std::sync::Arc;

use rdma_core_bindings as ffi;

use crate::ah::Sender;
use crate::error::{Error, Result};
use crate::memory::check_range;
use crate::mr::{LocalBuffer, SharedRegion};
use crate::pd::PdInner;
use crate::types::{Qpn, Rkey, WcOpcode, WcStatus};

/// The most `LocalBuffer`s one request can hold, and give back in [`Done`].
pub const LOCAL_BUFFERS_MAX: usize = 4;

/// Where the bytes of a SEND or WRITE come from.
#[derive(Debug)]
pub enum Source<'a> {
    /// A range of a region, in bytes from its start. The request holds the `Arc` until it is released;
    /// what the bytes are when the device reads them, perhaps several times, is up to the owner.
    Shared(&'a Arc<SharedRegion>, Range<usize>),
    /// A whole buffer, owned by the request until its completion gives it back.
    Local(LocalBuffer),
    /// Bytes copied into the request when it is added to the chain, at most `max_inline_data`.
    Inline(&'a [u8]),
}

impl Source<'_> {
    /// How many bytes it is.
    pub fn len(&self) -> usize {
        match self {
            Source::Shared(_, range) => range.end.saturating_sub(range.start),
            Source::Local(buffer) => buffer.len(),
            Source::Inline(bytes) => bytes.len(),
        }
    }

    /// True for no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A registered part as a scatter/gather entry; the caller has checked it.
    pub(crate) fn sge(&self) -> Result<ffi::ibv_sge> {
        match self {
            Source::Shared(region, range) => region.sge(range),
            Source::Local(buffer) => buffer.sge(),
            Source::Inline(_) => Err(Error::MixedInline),
        }
    }

    /// Refuses what the device would, before it ends the queue pair over it.
    pub(crate) fn check(&self, pd: &Arc<PdInner>) -> Result<()> {
        match self {
            Source::Shared(region, range) => {
                check_range("a region", region.len(), range.start, self.len())?;
                check_pd(pd, region.pd())
            }
            Source::Local(buffer) => check_pd(pd, buffer.pd()),
            Source::Inline(_) => Ok(()),
        }
    }
}

pub(crate) fn check_pd(queue_pair: &Arc<PdInner>, memory: &Arc<PdInner>) -> Result<()> {
    if Arc::ptr_eq(queue_pair, memory) {
        Ok(())
    } else {
        Err(Error::WrongProtectionDomain)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Source<'_> {}
    impl<const N: usize> Sealed for [super::Source<'_>; N] {}
    impl Sealed for super::LocalBuffer {}
    impl<const N: usize> Sealed for [super::LocalBuffer; N] {}
}

/// One [`Source`], or an array of them that the device gathers into one message.
pub trait Gather<'a>: sealed::Sealed {
    #[doc(hidden)]
    fn sources(&self) -> &[Source<'a>];
    #[doc(hidden)]
    fn into_sources(self) -> impl Iterator<Item = Source<'a>>;
}

impl<'a> Gather<'a> for Source<'a> {
    fn sources(&self) -> &[Source<'a>] {
        std::slice::from_ref(self)
    }

    fn into_sources(self) -> impl Iterator<Item = Source<'a>> {
        std::iter::once(self)
    }
}

impl<'a, const N: usize> Gather<'a> for [Source<'a>; N] {
    fn sources(&self) -> &[Source<'a>] {
        self
    }

    fn into_sources(self) -> impl Iterator<Item = Source<'a>> {
        self.into_iter()
    }
}

/// One [`LocalBuffer`], or an array of them over which the device scatters one message.
pub trait Scatter: sealed::Sealed {
    #[doc(hidden)]
    fn buffers(&self) -> &[LocalBuffer];
    #[doc(hidden)]
    fn into_buffers(self) -> impl Iterator<Item = LocalBuffer>;
}

impl Scatter for LocalBuffer {
    fn buffers(&self) -> &[LocalBuffer] {
        std::slice::from_ref(self)
    }

    fn into_buffers(self) -> impl Iterator<Item = LocalBuffer> {
        std::iter::once(self)
    }
}

impl<const N: usize> Scatter for [LocalBuffer; N] {
    fn buffers(&self) -> &[LocalBuffer] {
        self
    }

    fn into_buffers(self) -> impl Iterator<Item = LocalBuffer> {
        self.into_iter()
    }
}

/// A completion as the queue gave it. Give it to its queue pair
/// ([`QueuePair::complete`](crate::QueuePair::complete)), in the order polled, to get at the request.
///
/// Dropping one releases nothing: a later completion of the same queue does, or the end of the queue pair.
#[derive(Debug)]
#[must_use = "its queue pair releases the request when it is given the completion"]
pub struct Completion {
    pub(crate) wc: Wc,
    /// Which completion queue it was polled from; ids are unique in the process.
    pub(crate) cq_id: u64,
}

/// The fields of `ibv_wc` that this crate uses.
#[derive(Debug)]
pub(crate) struct Wc {
    /// The number that [`crate::qp`] gave the request.
    pub(crate) request: u64,
    pub(crate) status: WcStatus,
    pub(crate) opcode: WcOpcode,
    pub(crate) byte_len: u32,
    pub(crate) imm: Option<[u8; 4]>,
    pub(crate) invalidated: Option<Rkey>,
    pub(crate) vendor_err: u32,
    pub(crate) qpn: Qpn,
    pub(crate) origin: Origin,
}

/// Where a datagram came from, as far as `ibv_wc` tells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    pub(crate) src_qp: Qpn,
    pub(crate) has_grh: bool,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}

impl Completion {
    /// Whose request it was.
    pub fn qpn(&self) -> Qpn {
        self.wc.qpn
    }

    /// How it ended.
    pub fn status(&self) -> WcStatus {
        self.wc.status
    }

    /// Which operation it was; only meaningful in success.
    pub fn opcode(&self) -> WcOpcode {
        self.wc.opcode
    }

    /// The key of a window of this side that the peer's SEND has revoked.
    pub fn invalidated(&self) -> Option<Rkey> {
        self.wc.invalidated
    }

    /// True if it comes from the receive queue, in failure too.
    pub fn is_receive(&self) -> bool {
        self.wc.request & crate::qp::RECEIVE_BIT != 0
    }
}

/// A finished work request.
#[derive(Debug)]
pub struct Done {
    /// The number it was posted with.
    pub wr_id: u64,
    /// How it ended.
    pub status: WcStatus,
    /// Which operation it was; only meaningful in success.
    pub opcode: WcOpcode,
    /// Bytes received by a receive, or fetched by a READ; only meaningful in success. Of a datagram, the
    /// length of its message, without the [`GRH_LEN`](crate::GRH_LEN) bytes in front of it.
    pub byte_len: u32,
    /// The immediate that the peer sent, as it was on the wire.
    pub imm: Option<[u8; 4]>,
    /// The key of a window of this side that the peer's SEND has revoked.
    pub invalidated: Option<Rkey>,
    /// Who sent the datagram that was received; `None` for everything else.
    pub sender: Option<Sender>,
    /// What the vendor says about a failure; 0 if nothing.
    pub vendor_err: u32,
    /// The first, usually only, buffer that the request held. After a failed READ or receive its bytes are
    /// garbage.
    pub buffer: Option<LocalBuffer>,
    /// The further buffers of a request with several, in order.
    pub more: [Option<LocalBuffer>; LOCAL_BUFFERS_MAX - 1],
}

impl Done {
    /// True if the request succeeded.
    pub fn is_success(&self) -> bool {
        self.status.is_success()
    }
}
