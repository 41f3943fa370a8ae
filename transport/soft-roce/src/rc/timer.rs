//! The requester's two timers and the retries they spend.

use super::attr::Attr;
use crate::wire::{ack_timeout_ns, rnr_timer_ns};

/// `rnr_retry` that stands for retrying without end. (`retry_cnt` has no such value.)
const RNR_RETRY_INFINITE: u8 = 7;

/// Deadlines in nanoseconds of the caller's clock, and retries left.
#[derive(Debug, Default)]
pub(super) struct Timers {
    /// When the oldest unanswered packet counts as lost.
    retransmit: Option<u64>,
    /// Until when the send queue rests after an RNR NAK.
    rnr_wait: Option<u64>,
    retries_left: u8,
    rnr_retries_left: u8,
}

/// What a passed deadline means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expired {
    /// No answer in time.
    Retransmit,
    /// The peer may have posted a receive by now.
    RnrWait,
}

impl Timers {
    /// Stops both timers and reloads the retries.
    pub(super) fn reset(&mut self, attr: &Attr) {
        *self = Timers::default();
        self.reload(attr);
    }

    /// Progress was made: all retries are available again.
    pub(super) fn reload(&mut self, attr: &Attr) {
        self.retries_left = attr.retry_cnt;
        self.rnr_retries_left = attr.rnr_retry;
    }

    /// The earliest deadline.
    pub(super) fn next(&self) -> Option<u64> {
        // The retransmission timer rests while an RNR wait is pending.
        self.rnr_wait.or(self.retransmit)
    }

    /// Which timer, if any, has passed its deadline; it is stopped.
    pub(super) fn expire(&mut self, now: u64) -> Option<Expired> {
        self.next().filter(|deadline| *deadline <= now)?;
        if self.rnr_wait.take().is_some() {
            return Some(Expired::RnrWait);
        }
        self.retransmit = None;
        Some(Expired::Retransmit)
    }

    /// Starts the retransmission timer unless it runs.
    pub(super) fn arm_retransmit(&mut self, now: u64, attr: &Attr) {
        if self.retransmit.is_none() {
            self.restart_retransmit(now, attr);
        }
    }

    /// Starts the retransmission timer afresh.
    pub(super) fn restart_retransmit(&mut self, now: u64, attr: &Attr) {
        self.retransmit = ack_timeout_ns(attr.timeout).map(|timeout| now.saturating_add(timeout));
    }

    /// Stops the retransmission timer.
    pub(super) fn stop_retransmit(&mut self) {
        self.retransmit = None;
    }

    /// Whether the send queue rests after an RNR NAK.
    pub(super) fn is_rnr_waiting(&self) -> bool {
        self.rnr_wait.is_some()
    }

    /// Spends one retry; false if none was left.
    pub(super) fn spend_retry(&mut self) -> bool {
        let left = self.retries_left.checked_sub(1);
        self.retries_left = left.unwrap_or(0);
        left.is_some()
    }

    /// Spends one RNR retry and starts the wait that timer `code` asks for; false if none was left.
    pub(super) fn start_rnr_wait(&mut self, now: u64, code: u8) -> bool {
        if self.rnr_retries_left != RNR_RETRY_INFINITE {
            let Some(left) = self.rnr_retries_left.checked_sub(1) else {
                return false;
            };
            self.rnr_retries_left = left;
        }
        self.retransmit = None;
        self.rnr_wait = Some(now.saturating_add(rnr_timer_ns(code)));
        true
    }
}
