//! The requester's two timers and the retries they spend.
//!
//! The attribute's timeout T is the application's, so nothing is sent again before it. The specification
//! lets a device take up to 4 T to notice a loss; that room is used where answers take longer than T, as
//! they do on a machine with more threads than cores: a packet sent again for nothing costs a retry.

use crate::faults::{Fault, is_injected};
use crate::qp::Attr;
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
    round_trip: RoundTrip,
    retries_left: u8,
    rnr_retries_left: u8,
}

/// How long answers take, smoothed as for TCP (RFC 6298), in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
struct RoundTrip {
    mean: u64,
    /// Mean distance from the mean.
    deviation: u64,
}

impl RoundTrip {
    fn sample(&mut self, ns: u64) {
        if self.mean == 0 {
            (self.mean, self.deviation) = (ns, ns / 2);
            return;
        }
        self.deviation = (3 * self.deviation + self.mean.abs_diff(ns)) / 4;
        self.mean = (7 * self.mean + ns) / 8;
    }

    /// A time that few answers exceed; 0 if none was measured.
    fn longest(&self) -> u64 {
        self.mean + 4 * self.deviation
    }
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
        self.retransmit = ack_timeout_ns(attr.timeout).map(|timeout| {
            let wait = self.round_trip.longest().clamp(timeout, 4 * timeout);
            let wait = wait.max(timeout + self.spread(timeout, attr));
            now.saturating_add(wait)
        });
    }

    /// How much longer to wait after a retry that brought nothing: less than one timeout.
    ///
    /// Queue pairs that lost their packets to the same full buffer would else fill it again together.
    fn spread(&self, timeout: u64, attr: &Attr) -> u64 {
        let retries = attr.retry_cnt.saturating_sub(self.retries_left);
        if retries == 0 {
            return 0;
        }
        // As good as random: connections differ in their numbers, and these in the retries.
        let numbers = attr.sq_psn.get() ^ attr.dest_qpn.get() << 8 ^ u32::from(retries);
        let fraction = numbers.wrapping_mul(0x9e37_79b1) >> 16;
        (timeout * u64::from(fraction)) >> 16
    }

    /// An answer took `ns`.
    pub(super) fn answered_after(&mut self, ns: u64) {
        // An hour: no answer takes longer, and sums of it do not overflow.
        self.round_trip.sample(ns.min(3_600_000_000_000));
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
    pub(super) fn start_rnr_wait(&mut self, now: u64, code: u8, attr: &Attr) -> bool {
        if self.rnr_retries_left != RNR_RETRY_INFINITE {
            let Some(left) = self.rnr_retries_left.checked_sub(1) else {
                return false;
            };
            self.rnr_retries_left = left;
        }
        // The peer has answered: losses spread over a long wait are not a silent peer.
        self.retries_left = attr.retry_cnt;
        self.retransmit = None;
        let wait = if is_injected(Fault::ShortRnrWait) {
            0
        } else {
            rnr_timer_ns(code)
        };
        self.rnr_wait = Some(now.saturating_add(wait));
        true
    }
}
