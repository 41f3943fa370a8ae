//! Completion queues: a bounded ring, and the one event per arming.
//!
//! The ring has a lock of its own, so that an application can take completions while another thread
//! drives the device. Order of locks: device, ring, event queue.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use rdma_core_bindings::IBV_EVENT_CQ_ERR;

use super::events::{AckGate, ContextEvent, Element, EventQueue, lock};
use crate::wire::Qpn;
use crate::work::{Wc, WcStatus};

/// A completion queue, shared by the application's handle and the queue pairs that report to it.
#[derive(Debug)]
pub(crate) struct CompletionQueue {
    ring: Mutex<Ring>,
    channel: Option<Arc<EventQueue<usize>>>,
    context_events: Arc<EventQueue<ContextEvent>>,
    /// Completion events handed out and not acknowledged.
    pub(crate) comp_gate: Arc<AckGate>,
    /// Asynchronous events handed out and not acknowledged.
    pub(crate) async_gate: Arc<AckGate>,
}

#[derive(Debug)]
struct Ring {
    completions: VecDeque<Wc>,
    capacity: usize,
    armed: Armed,
    is_overrun: bool,
    /// The application's handle, by which events name this queue.
    handle: usize,
}

/// What raises the next completion event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Armed {
    /// Nothing: not armed, or the event of the last arming was raised.
    No,
    /// A solicited or failed completion.
    Solicited,
    /// Any completion.
    Any,
}

impl CompletionQueue {
    /// An empty queue for `capacity` completions, which reports to `channel` when armed.
    pub(crate) fn new(
        capacity: usize,
        channel: Option<Arc<EventQueue<usize>>>,
        context_events: Arc<EventQueue<ContextEvent>>,
    ) -> Self {
        Self {
            ring: Mutex::new(Ring {
                completions: VecDeque::with_capacity(capacity),
                capacity,
                armed: Armed::No,
                is_overrun: false,
                handle: 0,
            }),
            channel,
            context_events,
            comp_gate: Arc::default(),
            async_gate: Arc::default(),
        }
    }

    /// Tells the queue by which address the application knows it, before it is used.
    pub(crate) fn set_handle(&self, handle: usize) {
        lock(&self.ring).handle = handle;
    }

    /// Adds a completion. Returns false if the queue has overrun, now or before: the completion is
    /// lost, and the queue pair that reported it must go to ERR.
    #[must_use]
    pub(crate) fn push(&self, wc: Wc) -> bool {
        let mut ring = lock(&self.ring);
        if ring.is_overrun {
            return false;
        }
        if ring.completions.len() == ring.capacity {
            ring.is_overrun = true;
            let element = Element::Cq(ring.handle);
            let event = ContextEvent {
                event_type: IBV_EVENT_CQ_ERR,
                element,
            };
            self.context_events
                .push(Some(Arc::clone(&self.async_gate)), event);
            return false;
        }
        ring.completions.push_back(wc);
        if ring.armed.is_raised_by(&wc) {
            ring.armed = Armed::No;
            if let Some(channel) = &self.channel {
                channel.push(Some(Arc::clone(&self.comp_gate)), ring.handle);
            }
        }
        true
    }

    /// Passes the oldest completions to `take`, at most `count_max`, and returns how many there were.
    pub(crate) fn pop(&self, count_max: usize, mut take: impl FnMut(usize, &Wc)) -> usize {
        let mut ring = lock(&self.ring);
        let count = count_max.min(ring.completions.len());
        for (index, wc) in ring.completions.drain(..count).enumerate() {
            take(index, &wc);
        }
        count
    }

    /// Asks for an event at the next completion. An arming for any completion is not weakened by one
    /// for solicited ones.
    pub(crate) fn arm(&self, armed: Armed) {
        let mut ring = lock(&self.ring);
        if ring.armed != Armed::Any {
            ring.armed = armed;
        }
    }

    /// Whether an overrun has lost completions.
    pub(crate) fn is_overrun(&self) -> bool {
        lock(&self.ring).is_overrun
    }

    /// Changes the capacity. Returns false if more completions wait than would fit.
    #[must_use]
    pub(crate) fn resize(&self, capacity: usize) -> bool {
        let mut ring = lock(&self.ring);
        let waiting = ring.completions.len();
        if waiting > capacity {
            return false;
        }
        ring.completions.reserve_exact(capacity - waiting);
        ring.capacity = capacity;
        true
    }

    /// Drops the completions of a queue pair that no longer exists, or is as new.
    pub(crate) fn forget_qp(&self, qpn: Qpn) {
        lock(&self.ring).completions.retain(|wc| wc.qpn != qpn);
    }

    /// Ends the queue's events: removes the unread ones and waits until the read ones are
    /// acknowledged.
    pub(crate) fn retire(&self) {
        if let Some(channel) = &self.channel {
            channel.forget(&self.comp_gate);
        }
        self.context_events.forget(&self.async_gate);
        self.comp_gate.wait_all_acked();
        self.async_gate.wait_all_acked();
    }
}

impl Armed {
    fn is_raised_by(self, wc: &Wc) -> bool {
        match self {
            Self::No => false,
            Self::Solicited => wc.is_solicited || wc.status != WcStatus::Success,
            Self::Any => true,
        }
    }
}
