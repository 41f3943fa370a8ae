//! Completion queues.
//!
//! # Safety
//!
//! `CqInner` owns one `ibv_cq` until it is dropped, and holds its channel and context. Queue pairs hold
//! an `Arc` of it, so it is destroyed after them. Nothing but its number is stored in `cq_context`.
#![allow(unsafe_code, reason = "calls the verbs table and reads completions")]

use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdma_core_bindings as ffi;

use crate::device::{Context, ContextInner};
use crate::error::{Error, Result};
use crate::events::{ChannelInner, CompletionChannel};
use crate::types::{Qpn, Rkey, WcOpcode, WcStatus};
use crate::work::{Completion, Origin, Wc};

/// The most completions that one [`CompletionQueue::poll`] takes.
pub const POLL_MAX: usize = 32;

/// What rxe sets instead of `IBV_WC_WITH_INV`: the flag's number inside the kernel. To programs that bit
/// means a correct IP checksum, which no connection reports.
const KERNEL_WC_WITH_INVALIDATE: u32 = 4;

/// Numbers completion queues; 0 is none.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A completion queue. Clones share it; several threads may poll it.
#[derive(Clone)]
pub struct CompletionQueue(pub(crate) Arc<CqInner>);

pub(crate) struct CqInner {
    pub(crate) context: Arc<ContextInner>,
    channel: Option<Arc<ChannelInner>>,
    cq: NonNull<ffi::ibv_cq>,
    id: u64,
    entries: Mutex<Entries>,
}

/// Looked at and changed when queue pairs come and go, and when the queue is resized.
struct Entries {
    capacity: usize,
    /// Entries promised to queue pairs, so that the queue does not overflow: a request makes at most one
    /// completion, and its place in the send or receive queue is free only when that has been polled. What a
    /// destroyed queue pair left unpolled is not counted.
    reserved: usize,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`).
unsafe impl Send for CqInner {}
// SAFETY: as above; `ibv_poll_cq` locks the queue.
unsafe impl Sync for CqInner {}

impl CompletionQueue {
    /// Creates a completion queue of at least `cqe` entries.
    ///
    /// It needs one entry for each send and receive request that the queue pairs on it can have
    /// outstanding. With a `channel` one can sleep until there is a completion.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`]: `EINVAL` for 0 entries or more than `max_cqe`.
    ///
    /// # References
    ///
    /// `ibv_create_cq(3)`.
    pub fn create(
        context: &Context,
        cqe: usize,
        channel: Option<&CompletionChannel>,
    ) -> Result<CompletionQueue> {
        let context = Arc::clone(&context.0);
        let channel = channel.map(|channel| Arc::clone(&channel.0));
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let cqe = signed(cqe)?;
        let cq_context = ptr::without_provenance_mut(usize::try_from(id).unwrap_or(0));
        let raw_channel = channel
            .as_ref()
            .map_or(ptr::null_mut(), |channel| channel.as_ptr());
        // SAFETY: an open context, and a live channel of it or none; the context word is only a number.
        let cq =
            unsafe { (context.verbs.create_cq)(context.as_ptr(), cqe, cq_context, raw_channel, 0) };
        let cq = NonNull::new(cq).ok_or_else(|| context.last_error("ibv_create_cq"))?;
        // SAFETY: just made by the table; `cqe` is what was granted.
        let granted = unsafe { (*cq.as_ptr()).cqe };
        if let Some(channel) = &channel {
            channel.add_queue();
        }
        let entries = Entries {
            capacity: usize::try_from(granted).unwrap_or(0),
            reserved: 0,
        };
        Ok(CompletionQueue(Arc::new(CqInner {
            context,
            channel,
            cq,
            id,
            entries: Mutex::new(entries),
        })))
    }

    /// Its number, unique in this process; what a [`CompletionChannel`] calls it.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// How many entries it has.
    pub fn capacity(&self) -> usize {
        self.0.entries().capacity
    }

    /// Changes how many entries it has, to at least `cqe`. Completions in it stay.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if more are promised to its queue pairs, else [`Error::Verb`], `EINVAL` also if more
    /// completions wait; nothing has changed. Not every device can do it.
    ///
    /// # References
    ///
    /// `ibv_resize_cq(3)`.
    pub fn resize(&self, cqe: usize) -> Result<()> {
        self.0.resize(cqe)
    }

    /// Appends up to [`POLL_MAX`] completions to `completions`, and returns how many.
    ///
    /// Allocates only if `completions` has to grow: keep it and drain it.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`] if the queue is broken; its queue pairs are then in ERR.
    ///
    /// # References
    ///
    /// `ibv_poll_cq(3)`.
    pub fn poll(&self, completions: &mut Vec<Completion>) -> Result<usize> {
        const ENTRIES: i32 = 32;
        const _: () = assert!(ENTRIES as usize == POLL_MAX);
        let mut entries = [const { MaybeUninit::<ffi::ibv_wc>::uninit() }; POLL_MAX];
        // SAFETY: a live queue, and room for `POLL_MAX` entries.
        let count =
            unsafe { ffi::ibv_poll_cq(self.0.as_ptr(), ENTRIES, entries.as_mut_ptr().cast()) };
        let Ok(count) = usize::try_from(count) else {
            return self
                .0
                .context
                .check("ibv_poll_cq", count.saturating_neg())
                .map(|()| 0);
        };
        for entry in entries.iter().take(count) {
            // SAFETY: the device filled the first `count` entries.
            let entry = unsafe { entry.assume_init_ref() };
            completions.push(Completion {
                wc: read_wc(entry),
                cq_id: self.0.id,
            });
        }
        Ok(count)
    }

    /// Asks the channel for an event at the next completion, or with `solicited_only` at the next
    /// completion that is solicited or has failed. One event per arming.
    ///
    /// A completion that was already there raises no event: poll once more after arming, before waiting.
    ///
    /// # Errors
    ///
    /// [`Error::CannotWait`] if the queue was created without a channel, else [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_req_notify_cq(3)`.
    pub fn arm(&self, solicited_only: bool) -> Result<()> {
        if self.0.channel.is_none() {
            return Err(Error::CannotWait {
                reason: "it was created without a channel",
            });
        }
        // SAFETY: a live queue with a channel.
        let errno = unsafe { ffi::ibv_req_notify_cq(self.0.as_ptr(), i32::from(solicited_only)) };
        self.0.context.check("ibv_req_notify_cq", errno)
    }

    /// Polls, and sleeps up to `timeout` if there is nothing; returns how many completions were appended.
    ///
    /// Arms, polls again and only then sleeps, so that no completion is slept through. For a queue alone on
    /// its channel; with several, wait on the [`CompletionChannel`].
    ///
    /// # Errors
    ///
    /// As [`CompletionQueue::poll`], and [`Error::CannotWait`].
    pub fn poll_or_wait(
        &self,
        completions: &mut Vec<Completion>,
        timeout: Duration,
    ) -> Result<usize> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let count = self.poll(completions)?;
            if count > 0 {
                return Ok(count);
            }
            self.arm(false)?;
            let count = self.poll(completions)?;
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if count > 0 || left.is_some_and(|left| left.is_zero()) {
                return Ok(count);
            }
            self.0.own_channel()?.wait(left)?;
        }
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue")
            .field("id", &self.0.id)
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}

impl CqInner {
    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_cq {
        self.cq.as_ptr()
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    fn own_channel(&self) -> Result<&ChannelInner> {
        match &self.channel {
            Some(channel) if channel.queue_count() == 1 => Ok(channel),
            Some(_) => Err(Error::CannotWait {
                reason: "other queues share its channel; wait on the channel",
            }),
            None => Err(Error::CannotWait {
                reason: "it was created without a channel",
            }),
        }
    }

    /// Promises `needed` entries to a queue pair.
    pub(crate) fn reserve(&self, needed: usize) -> Result<()> {
        let mut entries = self.entries();
        let capacity = entries.capacity;
        let free = capacity - entries.reserved;
        if needed > free {
            return Err(Error::CompletionQueueTooSmall {
                capacity,
                free,
                needed,
            });
        }
        entries.reserved += needed;
        Ok(())
    }

    /// Takes a promise back.
    pub(crate) fn release(&self, count: usize) {
        self.entries().reserved -= count;
    }

    fn resize(&self, cqe: usize) -> Result<()> {
        let signed = signed(cqe)?;
        // Locked until the device has answered, so that no promise comes in between.
        let mut entries = self.entries();
        if cqe < entries.reserved {
            return Err(Error::Parameter {
                name: "cqe",
                value: cqe as u64,
                reason: "more entries are promised to the queue pairs on it",
            });
        }
        // SAFETY: a live queue.
        let errno = unsafe { (self.context.verbs.resize_cq)(self.as_ptr(), signed) };
        self.context.check("ibv_resize_cq", errno)?;
        // SAFETY: a live queue, whose size is written by the call above and by no other, under the lock.
        let granted = unsafe { (*self.as_ptr()).cqe };
        entries.capacity = usize::try_from(granted).unwrap_or(0);
        Ok(())
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Nothing that can panic leaves them half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CqInner {
    fn drop(&mut self) {
        let destroyed = self.context.destroy_dropped(|| {
            // SAFETY: the queue pairs on it held an `Arc` of it, and its events are acknowledged as soon
            // as they are read, so nobody uses it.
            let errno = unsafe { (self.context.verbs.destroy_cq)(self.as_ptr()) };
            self.context.check_destroyed("ibv_destroy_cq", errno)
        });
        if !destroyed {
            std::mem::forget((Arc::clone(&self.context), self.channel.clone()));
        } else if let Some(channel) = &self.channel {
            channel.remove_queue();
        }
    }
}

fn signed(cqe: usize) -> Result<i32> {
    i32::try_from(cqe).map_err(|_| Error::Parameter {
        name: "cqe",
        value: cqe as u64,
        reason: "no device has that many entries",
    })
}

fn read_wc(wc: &ffi::ibv_wc) -> Wc {
    // In a failed completion only the request, status, queue pair and vendor error are valid.
    let is_success = wc.status == ffi::IBV_WC_SUCCESS;
    let has_imm = is_success && wc.wc_flags & ffi::IBV_WC_WITH_IMM != 0;
    let has_key = is_success
        && !has_imm
        && wc.opcode == ffi::IBV_WC_RECV
        && wc.wc_flags & (ffi::IBV_WC_WITH_INV | KERNEL_WC_WITH_INVALIDATE) != 0;
    // SAFETY: both views of the union are four plain bytes.
    let imm = unsafe { wc.__bindgen_anon_1.imm_data };
    // SAFETY: as above.
    let key = unsafe { wc.__bindgen_anon_1.invalidated_rkey };
    Wc {
        request: wc.wr_id,
        status: WcStatus::from_code(wc.status),
        opcode: WcOpcode::from_code(wc.opcode),
        byte_len: wc.byte_len,
        imm: has_imm.then(|| u32::from_be(imm).to_be_bytes()),
        invalidated: has_key.then_some(Rkey(key)),
        vendor_err: wc.vendor_err,
        qpn: Qpn::from_device(wc.qp_num),
        origin: Origin {
            src_qp: Qpn::from_device(wc.src_qp),
            has_grh: wc.wc_flags & ffi::IBV_WC_GRH != 0,
            slid: wc.slid,
            sl: wc.sl,
            dlid_path_bits: wc.dlid_path_bits,
        },
    }
}
