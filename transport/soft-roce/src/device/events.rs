//! Event queues behind a file descriptor, and the acknowledgements that destroying an object waits
//! for.
//!
//! A completion channel and the asynchronous events of a context are the same thing here: a bounded
//! queue, and an eventfd in semaphore mode whose count is the number of queued events. So the
//! descriptor is readable exactly when an event waits, `O_NONBLOCK` set by the application does what
//! the man pages say, and several readers each get one event.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rdma_core_bindings::ibv_event_type;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read, write};

/// Events one queue holds. Each object raises few before its owner must act on it, so reaching the
/// bound means that nobody reads.
const EVENT_COUNT_MAX: usize = 16 * 1024;

/// One more, as an eventfd counts.
#[allow(
    clippy::host_endian_bytes,
    reason = "an eventfd counts in the host's order"
)]
pub(super) const ONE: [u8; 8] = 1u64.to_ne_bytes();

/// What an asynchronous event is about, as [`ibv_async_event`](rdma_core_bindings::ibv_async_event)
/// shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContextEvent {
    /// Which event.
    pub(crate) event_type: ibv_event_type,
    /// Whom it concerns.
    pub(crate) element: Element,
}

/// The object an asynchronous event names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    /// A completion queue, by the address handed to the application.
    Cq(usize),
    /// A queue pair, by the address handed to the application.
    Qp(usize),
    /// A shared receive queue, by the address handed to the application.
    Srq(usize),
    /// The device as a whole.
    Device,
}

/// Counts the events of one object that were handed out and not yet acknowledged.
#[derive(Debug, Default)]
pub(crate) struct AckGate {
    unacked: Mutex<u32>,
    all_acked: Condvar,
}

impl AckGate {
    fn hand_out(&self) {
        *lock(&self.unacked) += 1;
    }

    /// Takes back `count` events. More than were handed out is the application's mistake and counts
    /// as all of them.
    pub(crate) fn ack(&self, count: u32) {
        let mut unacked = lock(&self.unacked);
        *unacked = unacked.saturating_sub(count);
        if *unacked == 0 {
            self.all_acked.notify_all();
        }
    }

    /// Blocks until every event handed out has been acknowledged.
    pub(crate) fn wait_all_acked(&self) {
        let mut unacked = lock(&self.unacked);
        while *unacked > 0 {
            unacked = self
                .all_acked
                .wait(unacked)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A queue of events that an application waits for through a descriptor.
#[derive(Debug)]
pub(crate) struct EventQueue<T> {
    fd: OwnedFd,
    queue: Mutex<VecDeque<(Option<Arc<AckGate>>, T)>>,
}

impl<T> EventQueue<T> {
    /// An empty queue; its descriptor blocks and is closed on exec.
    pub(crate) fn new() -> Result<Self, Errno> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE)?;
        Ok(Self {
            fd,
            queue: Mutex::new(VecDeque::new()),
        })
    }

    /// Adds an event of the object behind `gate` and wakes one reader.
    pub(crate) fn push(&self, gate: Option<Arc<AckGate>>, event: T) {
        let mut queue = lock(&self.queue);
        if queue.len() == EVENT_COUNT_MAX {
            tracing::warn!("event queue full: {EVENT_COUNT_MAX} events unread, dropping one");
            return;
        }
        queue.push_back((gate, event));
        drop(queue);
        // The queue holds the event before the count says so: whoever reads a count finds an event.
        if let Err(errno) = write(&self.fd, &ONE) {
            tracing::error!("cannot signal an event: {errno}");
        }
    }

    /// Takes the oldest event, if one waits.
    #[cfg(test)]
    pub(crate) fn try_next(&self) -> Option<T> {
        let (_, event) = lock(&self.queue).pop_front()?;
        read(&self.fd, &mut [0u8; 8]).expect("as many were counted as queued");
        Some(event)
    }

    /// Takes the oldest event, waiting for one unless the application has set `O_NONBLOCK`.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the descriptor does not block and nothing waits, `EINTR` if a signal came first.
    pub(crate) fn next(&self) -> Result<T, Errno> {
        loop {
            read(&self.fd, &mut [0u8; 8])?;
            let mut queue = lock(&self.queue);
            // Empty when the object of the counted event was destroyed meanwhile: wait for another.
            if let Some((gate, event)) = queue.pop_front() {
                // Under the queue's lock, so that `forget` either removes the event or sees it out.
                if let Some(gate) = gate {
                    gate.hand_out();
                }
                return Ok(event);
            }
        }
    }

    /// Removes the unread events of the object behind `gate`: the object is being destroyed.
    pub(crate) fn forget(&self, gate: &Arc<AckGate>) {
        lock(&self.queue)
            .retain(|(owner, _)| !owner.as_ref().is_some_and(|o| Arc::ptr_eq(o, gate)));
    }
}

impl<T> AsFd for EventQueue<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Locks, also after a panic elsewhere: every critical section of this crate that can panic is
/// followed by the device's fatal state, which needs the lock.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
