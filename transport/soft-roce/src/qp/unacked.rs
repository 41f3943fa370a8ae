//! The send queue of a queue pair whose requests nobody acknowledges.
//!
//! A request is done as soon as its last packet is written. Why one fails is always local, so the queue
//! alone stops, in SQE: what is posted until SQE is left is flushed.

use super::queue::{SendQueue, SendWqe};
use super::{QpConfig, QpState};
use crate::work::WcStatus;

/// The sending half of a queue pair without acknowledgements.
#[derive(Debug)]
pub(crate) struct UnackedSends {
    /// Requests before `sq.done` are sent, those behind it are not.
    pub(crate) sq: SendQueue,
    /// Why the request at `sq.done` failed.
    failure: Option<WcStatus>,
    /// Position before which requests are flushed: they were posted before SQE was left.
    flush_end: u64,
}

impl UnackedSends {
    pub(crate) fn new(config: &QpConfig) -> Self {
        UnackedSends {
            sq: SendQueue::new(config),
            failure: None,
            flush_end: 0,
        }
    }

    /// Position of the request that is sent next, if there is one.
    pub(crate) fn next(&self) -> Option<u64> {
        (self.sq.done >= self.flush_end && self.sq.done < self.sq.tail).then_some(self.sq.done)
    }

    /// To SQE: the request at `sq.done` has failed.
    pub(crate) fn fail(&mut self, status: WcStatus) {
        self.failure = Some(status);
    }

    /// From SQE to RTS: what is posted from now on is sent.
    pub(crate) fn resume(&mut self) {
        self.flush_end = self.sq.tail;
    }

    /// To RESET: forgets everything.
    pub(crate) fn clear(&mut self) {
        self.sq.clear();
        self.failure = None;
    }

    /// Takes the next completed request, or in `state` flushed one, and how it ended.
    pub(crate) fn poll_completion(&mut self, state: QpState) -> Option<(SendWqe, WcStatus)> {
        if let Some(wqe) = self.sq.pop_done() {
            return Some((wqe, WcStatus::Success));
        }
        let is_flushing =
            matches!(state, QpState::Err | QpState::Sqe) || self.sq.done < self.flush_end;
        if !is_flushing {
            return None;
        }
        let wqe = self.sq.pop_flushed()?;
        Some((wqe, self.failure.take().unwrap_or(WcStatus::WrFlushErr)))
    }
}
