//! Memory windows: a part of a region, granted to a peer and revoked, without registering anything.
//!
//! ```text
//!          bind                     revoke, completed
//!   Free ───────▶ Bound ──▶ (revoking) ───────────▶ Free         any ── free, drop ──▶ gone
//! ```
//!
//! A region's key serves whoever has a queue pair in the protection domain, and revoking it means
//! deregistering the whole. A window has a key and rights of its own, costs one request to grant and one to
//! revoke, and a window of type 2 serves a single queue pair: what is meant for one peer is of no use to
//! another who learns the key.
//!
//! | | [`Type1`] | [`Type2`] |
//! | --- | --- | --- |
//! | serves | every queue pair of its domain | the queue pair it was bound on |
//! | bound by | [`ReadyQp::bind_mw`] | [`SendChain::bind_mw`] |
//! | revoked by | [`ReadyQp::unbind_mw`] | [`SendChain::invalidate`], or the peer's [`SendChain::send_invalidate`] |
//! | also revoked by | being freed or dropped | the same, and with its queue pair |
//!
//! [`ReadyQp::bind_mw`]: crate::QueuePair::bind_mw
//! [`ReadyQp::unbind_mw`]: crate::QueuePair::unbind_mw
//! [`SendChain::bind_mw`]: crate::SendChain::bind_mw
//! [`SendChain::invalidate`]: crate::SendChain::invalidate
//! [`SendChain::send_invalidate`]: crate::SendChain::send_invalidate
//!
//! # Safety
//!
//! `MwInner` owns one `ibv_mw` until `Binding::Gone`. While it may be bound it holds its region, whose
//! registration therefore outlives the binding. Requests that name the window hold an `Arc` of it.
//! The public `rkey` of the window is written under the lock of `state` only.
#![allow(unsafe_code, reason = "calls the verbs table")]

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdma_core_bindings as ffi;

use crate::error::{Error, Failed, Result};
use crate::memory::check_range;
use crate::mr::SharedRegion;
use crate::pd::{PdInner, ProtectionDomain};
use crate::types::{AccessFlags, Remote, Rkey, WcStatus};
use crate::work::check_pd;

mod sealed {
    pub trait Sealed {
        const CODE: u32;
    }
    impl Sealed for super::Type1 {
        const CODE: u32 = rdma_core_bindings::IBV_MW_TYPE_1;
    }
    impl Sealed for super::Type2 {
        const CODE: u32 = rdma_core_bindings::IBV_MW_TYPE_2;
    }
}

/// How a window is bound and whom it serves; `ibv_mw_type`.
pub trait WindowType: sealed::Sealed {}

/// A window for every queue pair of its protection domain.
#[derive(Debug)]
pub struct Type1;
/// A window for the queue pair that it is bound on (type 2B).
#[derive(Debug)]
pub struct Type2;

impl WindowType for Type1 {}
impl WindowType for Type2 {}

/// A memory window. It keeps its protection domain and, while it may be bound, its region alive.
///
/// A key that was revoked is refused from then on, until the window has been bound another 256 times:
/// only the lowest 8 bits of its key change. Allocate a new window rather than bind one so often, if old
/// keys are in hands that must not use them.
///
/// A window of one type is not bound as the other:
///
/// ```compile_fail,E0308
/// fn wrong(qp: &mut transport::ReadyQp, window: &transport::MemoryWindow<transport::Type1>) {
///     let _ = qp.start_send().invalidate(1, window, transport::SendFlags::SIGNALED);
/// }
/// ```
pub struct MemoryWindow<T: WindowType> {
    pub(crate) inner: Arc<MwInner>,
    window_type: PhantomData<T>,
}

impl<T: WindowType> MemoryWindow<T> {
    pub(crate) fn alloc(pd: &ProtectionDomain) -> Result<MemoryWindow<T>> {
        let pd = Arc::clone(&pd.0);
        // SAFETY: a live protection domain.
        let mw = unsafe { ffi::ibv_alloc_mw(pd.as_ptr(), T::CODE) };
        let mw = NonNull::new(mw).ok_or_else(|| pd.context.last_error("ibv_alloc_mw"))?;
        // SAFETY: just made by the table; a public field is read.
        let key = Rkey(unsafe { (*mw.as_ptr()).rkey });
        let state = Mutex::new(State {
            key,
            binding: Binding::Free,
        });
        Ok(MemoryWindow {
            inner: Arc::new(MwInner { pd, mw, state }),
            window_type: PhantomData,
        })
    }

    /// The key that peers use, if the window is bound or about to be.
    pub fn rkey(&self) -> Option<Rkey> {
        let state = self.inner.state();
        matches!(state.binding, Binding::Bound(_)).then_some(state.key)
    }

    /// True if the window can be bound: it never was, or its revocation has completed and its queue pair
    /// was given the completion.
    pub fn is_free(&self) -> bool {
        matches!(self.inner.state().binding, Binding::Free)
    }

    /// Frees the window, bound or not: when this has returned `Ok`, no peer changes or sees a byte through
    /// it any more, and its key is refused. Dropping does the same, but can only report a failure.
    ///
    /// # Errors
    ///
    /// [`Error::Destroy`], with the window, which is as it was and may be tried again.
    ///
    /// # References
    ///
    /// `ibv_dealloc_mw(3)`.
    pub fn free(self) -> Result<(), Failed<Self>> {
        self.inner.free().map_err(|error| Failed::new(self, error))
    }
}

impl<T: WindowType> fmt::Debug for MemoryWindow<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.inner.state();
        f.debug_struct("MemoryWindow")
            .field("rkey", &state.key)
            .field("binding", &state.binding)
            .finish_non_exhaustive()
    }
}

pub(crate) struct MwInner {
    pd: Arc<PdInner>,
    mw: NonNull<ffi::ibv_mw>,
    state: Mutex<State>,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`).
unsafe impl Send for MwInner {}
// SAFETY: as above; what changes is behind the mutex.
unsafe impl Sync for MwInner {}

struct State {
    /// The window's key, once all posted requests have been executed.
    key: Rkey,
    binding: Binding,
}

/// What is known of a window.
enum Binding {
    Free,
    /// Bound, or a bind is on its way.
    Bound(Grant),
    /// A revocation is on its way, or a request was flushed that may or may not have been executed.
    /// Revoking what is free is an error on all devices, and fatal to some: so nothing is tried.
    Uncertain(Grant),
    /// `ibv_dealloc_mw` has returned 0.
    Gone,
}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Binding::Free => "Free",
            Binding::Bound(_) => "Bound",
            Binding::Uncertain(_) => "Uncertain",
            Binding::Gone => "Gone",
        })
    }
}

/// What a window is bound to.
struct Grant {
    region: Arc<SharedRegion>,
    /// The queue pair that it serves, by its tag; none for type 1.
    owner: Option<u64>,
    /// The key from before, which is the window's again if the bind fails.
    previous: Rkey,
}

impl MwInner {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pd(&self) -> &Arc<PdInner> {
        &self.pd
    }

    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_mw {
        self.mw.as_ptr()
    }

    /// Refuses what the device would, before it ends the queue pair over it; then the window counts as
    /// bound. Returns the grant, under the key that a window of type 2 is to have, and the request's part.
    pub(crate) fn begin_bind(
        &self,
        owner: Option<u64>,
        region: &Arc<SharedRegion>,
        range: &Range<usize>,
        access: AccessFlags,
    ) -> Result<(Remote, ffi::ibv_mw_bind_info)> {
        check_pd(&self.pd, region.pd())?;
        let len = range.end.saturating_sub(range.start);
        check_range("a region", region.len(), range.start, len)?;
        check_rights(region, access)?;
        if len == 0 {
            return Err(Error::WindowNotBound {
                reason: "a window has at least one byte",
            });
        }
        let mut state = self.state();
        let reason = match state.binding {
            Binding::Free => None,
            Binding::Bound(_) => Some("it is bound; revoke it first"),
            Binding::Uncertain(_) => Some(
                "its revocation has not completed, or failed; poll the completion, or free the window",
            ),
            Binding::Gone => Some("it was freed, or its queue pair destroyed"),
        };
        if let Some(reason) = reason {
            return Err(Error::WindowNotBound { reason });
        }
        let previous = state.key;
        self.publish(&state);
        state.key = Rkey(ffi::ibv_inc_rkey(previous.0));
        state.binding = Binding::Bound(Grant {
            region: Arc::clone(region),
            owner,
            previous,
        });
        let addr = region.addr() + range.start as u64;
        let remote = Remote {
            addr,
            rkey: state.key,
        };
        let info = ffi::ibv_mw_bind_info {
            mr: region.mr_ptr(),
            addr,
            length: len as u64,
            mw_access_flags: access.intersection(remote_rights()).bits(),
        };
        Ok((remote, info))
    }

    /// From now on the window counts as being revoked. Returns its key, and what an unbinding request says.
    pub(crate) fn begin_revoke(&self, owner: Option<u64>) -> Result<(Rkey, ffi::ibv_mw_bind_info)> {
        let mut state = self.state();
        let reason = match &state.binding {
            Binding::Bound(grant) if grant.owner == owner => None,
            Binding::Bound(_) => Some("it was bound on another queue pair"),
            Binding::Free => Some("it is not bound"),
            Binding::Uncertain(_) => Some("it is being revoked, or its last request was flushed"),
            Binding::Gone => Some("it was freed, or its queue pair destroyed"),
        };
        if let Some(reason) = reason {
            return Err(Error::WindowNotRevoked { reason });
        }
        self.publish(&state);
        let binding = std::mem::replace(&mut state.binding, Binding::Gone);
        let mut info = ffi::ibv_mw_bind_info::default();
        if let Binding::Bound(grant) = binding {
            // Some providers look at the region even if no byte of it is bound.
            info.mr = grant.region.mr_ptr();
            state.binding = Binding::Uncertain(grant);
        }
        Ok((state.key, info))
    }

    /// Gives the provider the key that the device has: the application keeps it up to date.
    fn publish(&self, state: &State) {
        // SAFETY: the window is live, and its public part is touched under the lock only.
        unsafe { (*self.as_ptr()).rkey = state.key.0 };
    }

    /// Takes over the key that `ibv_bind_mw` chose, and returns it.
    pub(crate) fn take_key(&self) -> Rkey {
        let mut state = self.state();
        // SAFETY: as in `publish`.
        state.key = Rkey(unsafe { (*self.as_ptr()).rkey });
        state.key
    }

    /// The peer's SEND has revoked `rkey`; true if that was this window's.
    pub(crate) fn was_revoked(&self, rkey: Rkey) -> bool {
        let mut state = self.state();
        let is_this = state.key == rkey && !matches!(state.binding, Binding::Gone);
        if is_this {
            state.binding = Binding::Free;
        }
        is_this
    }

    /// Whether it was bound through the queue pair of this tag, as far as is known.
    pub(crate) fn serves(&self, tag: u64) -> bool {
        match &self.state().binding {
            Binding::Bound(grant) | Binding::Uncertain(grant) => grant.owner == Some(tag),
            Binding::Free | Binding::Gone => false,
        }
    }

    /// Frees the window; on failure it is as it was.
    pub(crate) fn free(&self) -> Result<()> {
        let mut state = self.state();
        if matches!(state.binding, Binding::Gone) {
            return Ok(());
        }
        // SAFETY: the window is live, and after success `Gone` keeps everybody from it.
        let errno = unsafe { ffi::ibv_dealloc_mw(self.as_ptr()) };
        self.pd.context.check_destroyed("ibv_dealloc_mw", errno)?;
        state.binding = Binding::Gone;
        Ok(())
    }
}

impl Drop for MwInner {
    fn drop(&mut self) {
        let context = Arc::clone(&self.pd.context);
        if context.destroy_dropped(|| self.free()) {
            return;
        }
        std::mem::forget(Arc::clone(&self.pd));
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        std::mem::forget(std::mem::replace(&mut state.binding, Binding::Gone));
    }
}

/// A posted request that changes a window, from staging until its outcome is known.
pub(crate) struct WindowChange {
    pub(crate) window: Arc<MwInner>,
    pub(crate) is_bind: bool,
}

impl WindowChange {
    /// The request never reached the device.
    pub(crate) fn undo(self) {
        let mut state = self.window.state();
        state.binding = match std::mem::replace(&mut state.binding, Binding::Free) {
            Binding::Bound(grant) | Binding::Uncertain(grant) if self.is_bind => {
                state.key = grant.previous;
                Binding::Free
            }
            Binding::Uncertain(grant) => Binding::Bound(grant),
            other => other,
        };
    }

    /// The request has completed.
    pub(crate) fn finish(self, status: WcStatus) {
        match (status, self.is_bind) {
            (WcStatus::Success, true) => {}
            (WcStatus::Success, false) => self.set_free(),
            (WcStatus::MwBindErr, true) => self.undo(),
            _ => self.lose(),
        }
    }

    /// Whether the request was executed will never be known.
    pub(crate) fn lose(&self) {
        let mut state = self.window.state();
        state.binding = match std::mem::replace(&mut state.binding, Binding::Free) {
            Binding::Bound(grant) => Binding::Uncertain(grant),
            other => other,
        };
    }

    fn set_free(&self) {
        let mut state = self.window.state();
        if matches!(state.binding, Binding::Uncertain(_)) {
            state.binding = Binding::Free;
        }
    }
}

/// What a window can grant.
fn remote_rights() -> AccessFlags {
    AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_READ | AccessFlags::REMOTE_ATOMIC
}

fn check_rights(region: &SharedRegion, access: AccessFlags) -> Result<()> {
    let mut needed = AccessFlags::MW_BIND;
    if access.intersects(AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC) {
        needed |= AccessFlags::LOCAL_WRITE;
    }
    let missing = needed.difference(region.access());
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::WindowRights { missing })
}
