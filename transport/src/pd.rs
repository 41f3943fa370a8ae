//! Protection domains: which keys and queue pairs belong together.
//!
//! # Safety
//!
//! `PdInner` owns one `ibv_pd` until it is dropped, and keeps its context open. Registrations and queue
//! pairs hold an `Arc` of it, so it is freed after them.
#![allow(unsafe_code, reason = "calls the verbs table")]

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_core_bindings as ffi;

use crate::device::{Context, ContextInner};
use crate::error::Result;
use crate::memory::Mapping;
use crate::mr::{self, LocalBuffer, SharedRegion};
use crate::mw::{MemoryWindow, WindowType};
use crate::types::AccessFlags;

/// A protection domain. Clones share it; it is freed when the last object made in it is gone.
///
/// A peer that knows a key can use it only through a queue pair of the same domain: give peers that must
/// not reach each other's grants domains of their own.
#[derive(Clone)]
pub struct ProtectionDomain(pub(crate) Arc<PdInner>);

pub(crate) struct PdInner {
    pub(crate) context: Arc<ContextInner>,
    pd: NonNull<ffi::ibv_pd>,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`).
unsafe impl Send for PdInner {}
// SAFETY: as above.
unsafe impl Sync for PdInner {}

impl ProtectionDomain {
    /// Allocates a protection domain on a device.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`](crate::Error::Verb).
    ///
    /// # References
    ///
    /// `ibv_alloc_pd(3)`.
    pub fn alloc(context: &Context) -> Result<ProtectionDomain> {
        let context = Arc::clone(&context.0);
        // SAFETY: an open context of this table.
        let pd = unsafe { (context.verbs.alloc_pd)(context.as_ptr()) };
        let pd = NonNull::new(pd).ok_or_else(|| context.last_error("ibv_alloc_pd"))?;
        Ok(ProtectionDomain(Arc::new(PdInner { context, pd })))
    }

    /// The device.
    pub fn context(&self) -> Context {
        Context(Arc::clone(&self.0.context))
    }

    /// Registers `range` of `mapping`, to be granted to peers with `access` or to be sent from.
    ///
    /// Peers and work requests address its first byte as `iova`, or as where it lies in this process if
    /// that is `None`. Choose addresses that are never used twice and a recycled key meets an old address.
    /// The device may touch the bytes until [`SharedRegion::deregister`] has returned.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`](crate::Error::OutOfBounds), or [`Error::Register`](crate::Error::Register)
    /// with what to do: raise RLIMIT_MEMLOCK, use memory that can be pinned, or add the missing right.
    ///
    /// # References
    ///
    /// `ibv_reg_mr(3)`, `ibv_reg_mr_iova(3)`.
    pub fn register(
        &self,
        mapping: &Arc<Mapping>,
        range: Range<usize>,
        access: AccessFlags,
        iova: Option<u64>,
    ) -> Result<SharedRegion> {
        mr::register(self, mapping, range, access, iova)
    }

    /// Allocates a memory window, which is bound later: `alloc_mw::<Type2>()`.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`](crate::Error::Verb); `EOPNOTSUPP` from a device without windows, whose
    /// [`max_mw`](crate::DeviceAttr::max_mw) is 0.
    ///
    /// # References
    ///
    /// `ibv_alloc_mw(3)`.
    pub fn alloc_mw<T: WindowType>(&self) -> Result<MemoryWindow<T>> {
        MemoryWindow::alloc(self)
    }

    /// Allocates and registers `len` bytes that are never granted to peers, zeroed.
    ///
    /// Take pieces of it with [`LocalBuffer::split_to`]: one registration for many buffers.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory) or [`Error::Register`](crate::Error::Register).
    pub fn alloc_local(&self, len: usize) -> Result<LocalBuffer> {
        mr::alloc_local(self, len)
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProtectionDomain")
            .field("device", &self.0.context.name())
            .finish_non_exhaustive()
    }
}

impl PdInner {
    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_pd {
        self.pd.as_ptr()
    }
}

impl Drop for PdInner {
    fn drop(&mut self) {
        let freed = self.context.destroy_dropped(|| {
            // SAFETY: everything made in the domain held an `Arc` of it, so nothing is left.
            let errno = unsafe { (self.context.verbs.dealloc_pd)(self.as_ptr()) };
            self.context.check_destroyed("ibv_dealloc_pd", errno)
        });
        if !freed {
            std::mem::forget(Arc::clone(&self.context));
        }
    }
}
