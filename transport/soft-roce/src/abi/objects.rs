//! The objects handed out to the application.
//!
//! Each begins with (the context: contains) the public struct of `<infiniband/verbs.h>`, is made by
//! `Box::into_raw` of the whole and from then on used through `&` only, until the one call that
//! destroys it. The public struct is in an `UnsafeCell`, because C code on the other side may write
//! it; this side reads nothing from it.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::mem::offset_of;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rdma_core_bindings::{
    ibv_ah, ibv_comp_channel, ibv_context, ibv_cq, ibv_cq_ex, ibv_mr, ibv_mw, ibv_pd, ibv_qp,
    ibv_qp_ex, ibv_qp_init_attr, ibv_srq, ibv_wc, verbs_context,
};
use rustix::io::Errno;

use super::qp_ex::Staged;
use super::session::Session;
use crate::device::{AckGate, CompletionQueue, ContextEvent, EventQueue, Process, SoftDevice};
use crate::mr_table::{Key, Pd as PdNumber, WindowType};
use crate::srq::SrqNumber;
use crate::wire::Qpn;

/// A struct that is handed out as a pointer to its public part.
///
/// # Safety
///
/// The implementor is `#[repr(C)]` and has a `Public` at byte `OFFSET`.
pub(super) unsafe trait Object: Sized {
    /// The struct of `<infiniband/verbs.h>`.
    type Public;
    /// Where in the object it is.
    const OFFSET: usize = 0;
}

/// An open device.
#[repr(C)]
pub(super) struct Context {
    pub(super) verbs: UnsafeCell<verbs_context>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) events: Arc<EventQueue<ContextEvent>>,
    pub(super) children: Children,
}

/// A protection domain.
#[repr(C)]
pub(super) struct Pd {
    pub(super) public: UnsafeCell<ibv_pd>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) events: Arc<EventQueue<ContextEvent>>,
    pub(super) context: *mut ibv_context,
    pub(super) number: PdNumber,
    pub(super) children: Children,
    pub(super) _parent: ChildOf,
}

/// An address handle.
#[repr(C)]
pub(super) struct Ah {
    pub(super) public: UnsafeCell<ibv_ah>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) pd: PdNumber,
    pub(super) address: IpAddr,
    pub(super) _parent: ChildOf,
}

/// A memory region.
#[repr(C)]
pub(super) struct Mr {
    pub(super) public: UnsafeCell<ibv_mr>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) key: Key,
    pub(super) parent: Mutex<ChildOf>,
}

/// A memory window.
#[repr(C)]
pub(super) struct Mw {
    pub(super) public: UnsafeCell<ibv_mw>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) window_type: WindowType,
    /// The key of the last bind posted by `ibv_bind_mw`, or the first.
    pub(super) rkey: AtomicU32,
    pub(super) _parent: ChildOf,
}

impl Mw {
    /// A key of the window: the index is right, the tag may be outdated.
    pub(super) fn key(&self) -> Key {
        // Relaxed: the index never changes.
        Key(self.rkey.load(Ordering::Relaxed))
    }
}

/// A completion channel.
#[repr(C)]
pub(super) struct CompChannel {
    pub(super) public: UnsafeCell<ibv_comp_channel>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) events: Arc<EventQueue<usize>>,
    pub(super) children: Children,
    pub(super) _parent: ChildOf,
}

/// A completion queue. The extended struct begins with the plain one, and is there for every queue.
#[repr(C)]
pub(super) struct Cq {
    pub(super) public: UnsafeCell<ibv_cq_ex>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) queue: Arc<CompletionQueue>,
    pub(super) cq_context: *mut c_void,
    /// The completion that an extended poll shows.
    pub(super) current: Session<Option<ibv_wc>>,
    pub(super) children: Children,
    pub(super) _parents: (ChildOf, Option<ChildOf>),
}

/// A shared receive queue.
#[repr(C)]
pub(super) struct Srq {
    pub(super) public: UnsafeCell<ibv_srq>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) number: SrqNumber,
    pub(super) pd: PdNumber,
    pub(super) max_sge: u32,
    /// Asynchronous events handed out and not acknowledged.
    pub(super) gate: Arc<AckGate>,
    pub(super) children: Children,
    pub(super) _parent: ChildOf,
}

/// A queue pair. The extended struct begins with the plain one, and is there for every queue pair.
#[repr(C)]
pub(super) struct Qp {
    pub(super) public: UnsafeCell<ibv_qp_ex>,
    pub(super) device: Arc<SoftDevice>,
    pub(super) qpn: Qpn,
    /// What it was created with, capacities as granted.
    pub(super) init: ibv_qp_init_attr,
    /// Asynchronous events handed out and not acknowledged.
    pub(super) gate: Arc<AckGate>,
    /// Requests of an extended post.
    pub(super) staged: Session<Staged>,
    pub(super) _parents: ([ChildOf; 3], Option<ChildOf>),
}

// SAFETY: `repr(C)`, the public struct is inside the first field, at the offset named.
unsafe impl Object for Context {
    type Public = ibv_context;
    const OFFSET: usize = offset_of!(verbs_context, context);
}
// SAFETY: `repr(C)`, the public struct is first.
unsafe impl Object for Pd {
    type Public = ibv_pd;
}
// SAFETY: `repr(C)`, the public struct is first.
unsafe impl Object for Ah {
    type Public = ibv_ah;
}
// SAFETY: `repr(C)`, the public struct is first.
unsafe impl Object for Mr {
    type Public = ibv_mr;
}
// SAFETY: `repr(C)`, the public struct is first.
unsafe impl Object for Mw {
    type Public = ibv_mw;
}
// SAFETY: `repr(C)`, the public struct is first.
unsafe impl Object for CompChannel {
    type Public = ibv_comp_channel;
}
// SAFETY: `repr(C)`, the extended struct is first, and the public one first in that.
unsafe impl Object for Cq {
    type Public = ibv_cq;
}
// SAFETY: `repr(C)`, the public struct is first.
unsafe impl Object for Srq {
    type Public = ibv_srq;
}
// SAFETY: `repr(C)`, the extended struct is first, and the public one first in that.
unsafe impl Object for Qp {
    type Public = ibv_qp;
}

/// An object with the process that it was made in: a forked child holds a copy that no thread serves.
#[repr(C)]
struct HandedOut<O> {
    object: O,
    process: Process,
}

/// Gives an object away; [`object`] borrows it and [`take_back`] ends it.
pub(super) fn hand_out<O: Object>(object: O) -> *mut O::Public {
    let process = Process::this();
    Box::into_raw(Box::new(HandedOut { object, process }))
        .wrapping_byte_add(O::OFFSET)
        .cast()
}

/// The object behind a pointer of the application.
///
/// # Errors
///
/// `EINVAL` for NULL, and in a forked child for an object of the parent.
///
/// # Safety
///
/// `public` is NULL or came from [`hand_out`] of the same kind of object, which is not destroyed
/// before `'a` ends.
pub(super) unsafe fn object<'a, O: Object>(public: *mut O::Public) -> Result<&'a O, Errno> {
    let whole = public.wrapping_byte_sub(O::OFFSET).cast::<HandedOut<O>>();
    if public.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller vouches that `hand_out` made the pointer, hence that `whole` is the
    // object, and that it lives; nobody ever forms a `&mut` to it.
    let whole = unsafe { &*whole };
    if whole.process != Process::this() {
        return Err(Errno::INVAL);
    }
    Ok(&whole.object)
}

/// Ends an object's life as something the application holds.
///
/// # Safety
///
/// `public` came from [`hand_out`] of the same kind of object and no one uses it any more.
pub(super) unsafe fn take_back<O: Object>(public: *mut O::Public) -> O {
    let whole = public.wrapping_byte_sub(O::OFFSET).cast::<HandedOut<O>>();
    // SAFETY: `hand_out` made the pointer by `Box::into_raw`, and the caller gives up the last use.
    unsafe { Box::from_raw(whole) }.object
}

/// How many objects were made from this one and still exist.
#[derive(Clone, Debug, Default)]
pub(super) struct Children(Arc<AtomicU32>);

impl Children {
    /// Counts one more child, until the result is dropped.
    pub(super) fn adopt(&self) -> ChildOf {
        // Relaxed: the count publishes nothing. That a parent is not destroyed while a child is
        // being made from it is the application's part.
        self.0.fetch_add(1, Ordering::Relaxed);
        ChildOf(self.clone())
    }

    /// `EBUSY` while there is a child.
    pub(super) fn check_none(&self) -> Result<(), Errno> {
        if self.0.load(Ordering::Relaxed) == 0 {
            Ok(())
        } else {
            Err(Errno::BUSY)
        }
    }
}

/// A child's claim on its parent.
#[derive(Debug)]
pub(super) struct ChildOf(Children);

impl Drop for ChildOf {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
