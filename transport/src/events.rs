//! Completion channels and asynchronous events: what a thread can sleep on.
//!
//! # Safety
//!
//! `ChannelInner` owns one `ibv_comp_channel` until it is dropped; completion queues on it hold an `Arc`.
//! An event names its object by pointer. The object cannot be destroyed before the event is acknowledged
//! (`ibv_destroy_cq`, `ibv_destroy_qp` and `ibv_destroy_srq` wait for that), so it may be read until then and not after.
#![allow(
    unsafe_code,
    reason = "calls the verbs table and reads the objects that events name"
)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rdma_core_bindings as ffi;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use crate::device::{Context, ContextInner};
use crate::error::{Error, Result};
use crate::types::Qpn;

/// A channel that becomes readable when an armed completion queue gets a completion.
///
/// Clones share it. To sleep without missing anything: poll, arm ([`CompletionQueue::arm`]), poll again,
/// and only if that found nothing wait for the channel.
///
/// [`CompletionQueue::arm`]: crate::CompletionQueue::arm
#[derive(Clone)]
pub struct CompletionChannel(pub(crate) Arc<ChannelInner>);

pub(crate) struct ChannelInner {
    context: Arc<ContextInner>,
    channel: NonNull<ffi::ibv_comp_channel>,
    /// How many completion queues are on it; a statistic that decides who may wait where.
    queues: AtomicUsize,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`).
unsafe impl Send for ChannelInner {}
// SAFETY: as above.
unsafe impl Sync for ChannelInner {}

impl CompletionChannel {
    /// Creates a channel.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`], usually for want of file descriptors.
    ///
    /// # References
    ///
    /// `ibv_create_comp_channel(3)`.
    pub fn create(context: &Context) -> Result<CompletionChannel> {
        let context = Arc::clone(&context.0);
        // SAFETY: an open context of this table.
        let channel = unsafe { (context.verbs.create_comp_channel)(context.as_ptr()) };
        let channel =
            NonNull::new(channel).ok_or_else(|| context.last_error("ibv_create_comp_channel"))?;
        let inner = ChannelInner {
            context,
            channel,
            queues: AtomicUsize::new(0),
        };
        prepare_descriptor(&inner.context, inner.fd())?;
        Ok(CompletionChannel(Arc::new(inner)))
    }

    /// Takes one event, sleeping up to `timeout` (`None`: for ever), and returns the
    /// [`id`](crate::CompletionQueue::id) of the queue that had been armed, or `None` after the timeout.
    ///
    /// The event is acknowledged. Arm the queue again before polling it and sleeping again.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_get_cq_event(3)`.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<u64>> {
        self.0.wait(timeout)
    }
}

impl AsFd for CompletionChannel {
    /// Readable when there is an event; non-blocking.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
}

impl fmt::Debug for CompletionChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionChannel")
            .field("device", &self.0.context.name())
            .finish_non_exhaustive()
    }
}

impl ChannelInner {
    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_comp_channel {
        self.channel.as_ptr()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is live, and `fd` is written only by its creation.
        let fd = unsafe { (*self.as_ptr()).fd };
        // SAFETY: open for as long as the channel, which `self` keeps.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    pub(crate) fn add_queue(&self) {
        self.queues.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn remove_queue(&self) {
        self.queues.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn queue_count(&self) -> usize {
        self.queues.load(Ordering::Relaxed)
    }

    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Result<Option<u64>> {
        wait_for(&self.context, self.fd(), timeout, || self.try_event())
    }

    fn try_event(&self) -> io::Result<u64> {
        let mut cq = ptr::null_mut();
        let mut cq_context = ptr::null_mut();
        let verbs = self.context.verbs;
        // SAFETY: a live channel and places for the results; its descriptor does not block.
        let ret = unsafe { (verbs.get_cq_event)(self.as_ptr(), &raw mut cq, &raw mut cq_context) };
        if ret != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the event was just read and not yet acknowledged, so the queue still exists.
        unsafe { (verbs.ack_cq_events)(cq, 1) };
        Ok(cq_context.addr() as u64)
    }
}

impl Drop for ChannelInner {
    fn drop(&mut self) {
        let destroyed = self.context.destroy_dropped(|| {
            // SAFETY: the completion queues on it held an `Arc` of it, so none is left.
            let errno = unsafe { (self.context.verbs.destroy_comp_channel)(self.as_ptr()) };
            self.context
                .check_destroyed("ibv_destroy_comp_channel", errno)
        });
        if !destroyed {
            std::mem::forget(Arc::clone(&self.context));
        }
    }
}

/// Something that happened to a device, a port or an object, outside of any work request.
///
/// Not every device raises every event (kernel rxe raises few): never depend on one alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AsyncEvent {
    /// The completion queue with this id overflowed or broke; its queue pairs are lost.
    CqErr(u64),
    /// The queue pair broke and is in ERR.
    QpFatal(Qpn),
    /// The queue pair got an invalid request and is in ERR.
    QpReqErr(Qpn),
    /// The queue pair got a request without the right to it and is in ERR.
    QpAccessErr(Qpn),
    /// The first packet arrived at the queue pair in RTR.
    CommEst(Qpn),
    /// The send queue of the queue pair in SQD is drained.
    SqDrained(Qpn),
    /// The queue pair is in ERR, and the last receive that it took from a shared receive queue is done.
    QpLastWqeReached(Qpn),
    /// Fewer receives than its limit wait in the shared receive queue with this id; set the limit again.
    SrqLimitReached(u64),
    /// The shared receive queue with this id broke.
    SrqErr(u64),
    /// The device is broken; close it.
    DeviceFatal,
    /// The port became ACTIVE.
    PortActive(u8),
    /// The port is no longer ACTIVE.
    PortErr(u8),
    /// The port's GID table changed: choose the GID anew before the next connection.
    GidChange(u8),
    /// Another event of the verbs number, which this version does not act on.
    Other(u32),
}

/// The asynchronous events of a device. Each event is delivered once: have one reader per device.
#[derive(Debug)]
pub struct AsyncEvents {
    context: Context,
}

impl Context {
    /// The device's asynchronous events.
    pub fn async_events(&self) -> AsyncEvents {
        AsyncEvents {
            context: self.clone(),
        }
    }
}

impl AsyncEvents {
    /// Takes one event, sleeping up to `timeout` (`None`: for ever); `None` after the timeout.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_get_async_event(3)`.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<AsyncEvent>> {
        wait_for(&self.context.0, self.as_fd(), timeout, || self.try_event())
    }

    fn try_event(&self) -> io::Result<AsyncEvent> {
        let context = &self.context.0;
        let mut event = ffi::ibv_async_event::default();
        // SAFETY: an open context and a place for the result; its descriptor does not block.
        let ret = unsafe { (context.verbs.get_async_event)(context.as_ptr(), &raw mut event) };
        if ret != 0 {
            return Err(io::Error::last_os_error());
        }
        let read = read_event(&event);
        // SAFETY: just read, acknowledged once.
        unsafe { (context.verbs.ack_async_event)(&raw mut event) };
        Ok(read)
    }
}

impl AsFd for AsyncEvents {
    /// Readable when there is an event; non-blocking.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.context.0.async_fd()
    }
}

/// Reads an event that is not yet acknowledged.
fn read_event(event: &ffi::ibv_async_event) -> AsyncEvent {
    match event.event_type {
        ffi::IBV_EVENT_CQ_ERR => AsyncEvent::CqErr(event_cq(event)),
        ffi::IBV_EVENT_QP_FATAL => AsyncEvent::QpFatal(event_qpn(event)),
        ffi::IBV_EVENT_QP_REQ_ERR => AsyncEvent::QpReqErr(event_qpn(event)),
        ffi::IBV_EVENT_QP_ACCESS_ERR => AsyncEvent::QpAccessErr(event_qpn(event)),
        ffi::IBV_EVENT_COMM_EST => AsyncEvent::CommEst(event_qpn(event)),
        ffi::IBV_EVENT_SQ_DRAINED => AsyncEvent::SqDrained(event_qpn(event)),
        ffi::IBV_EVENT_QP_LAST_WQE_REACHED => AsyncEvent::QpLastWqeReached(event_qpn(event)),
        ffi::IBV_EVENT_SRQ_LIMIT_REACHED => AsyncEvent::SrqLimitReached(event_srq(event)),
        ffi::IBV_EVENT_SRQ_ERR => AsyncEvent::SrqErr(event_srq(event)),
        ffi::IBV_EVENT_DEVICE_FATAL => AsyncEvent::DeviceFatal,
        ffi::IBV_EVENT_PORT_ACTIVE => AsyncEvent::PortActive(event_port(event)),
        ffi::IBV_EVENT_PORT_ERR => AsyncEvent::PortErr(event_port(event)),
        ffi::IBV_EVENT_GID_CHANGE => AsyncEvent::GidChange(event_port(event)),
        other => AsyncEvent::Other(other),
    }
}

fn event_qpn(event: &ffi::ibv_async_event) -> Qpn {
    // SAFETY: events of this type name a queue pair.
    let qp = unsafe { event.element.qp };
    // SAFETY: the queue pair exists until the event is acknowledged (module docs).
    Qpn::from_device(unsafe { (*qp).qp_num })
}

fn event_cq(event: &ffi::ibv_async_event) -> u64 {
    // SAFETY: events of this type name a completion queue.
    let cq = unsafe { event.element.cq };
    // SAFETY: the completion queue exists until the event is acknowledged (module docs).
    unsafe { (*cq).cq_context }.addr() as u64
}

fn event_srq(event: &ffi::ibv_async_event) -> u64 {
    // SAFETY: events of this type name a shared receive queue.
    let srq = unsafe { event.element.srq };
    // SAFETY: the shared receive queue exists until the event is acknowledged (module docs).
    unsafe { (*srq).srq_context }.addr() as u64
}

fn event_port(event: &ffi::ibv_async_event) -> u8 {
    // SAFETY: events of this type name a port.
    let port = unsafe { event.element.port_num };
    u8::try_from(port).unwrap_or(0)
}

/// Takes an event with `try_event` as soon as there is one.
fn wait_for<T>(
    context: &ContextInner,
    fd: BorrowedFd<'_>,
    timeout: Option<Duration>,
    try_event: impl Fn() -> io::Result<T>,
) -> Result<Option<T>> {
    let failed = |source| Error::Verb {
        verb: "waiting for an event",
        device: context.name().to_owned(),
        source,
    };
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        match try_event() {
            Ok(event) => return Ok(Some(event)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(None);
        }
        // A duration beyond what the kernel can count is as good as for ever.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            left.as_ref(),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// Makes a descriptor of the library non-blocking, and closed in spawned programs.
pub(crate) fn prepare_descriptor(context: &ContextInner, fd: BorrowedFd<'_>) -> Result<()> {
    let prepare = || {
        fcntl_setfd(fd, fcntl_getfd(fd)? | FdFlags::CLOEXEC)?;
        fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)
    };
    prepare().map_err(|errno| Error::Verb {
        verb: "fcntl",
        device: context.name().to_owned(),
        source: errno.into(),
    })
}
