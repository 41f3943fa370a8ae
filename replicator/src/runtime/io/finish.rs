//! An orderly end: appends are answered, and leadership is given away.

use std::time::Duration;

use crossbeam::channel::Sender;

use super::Io;
use crate::control::ErrorCode;
use crate::runtime::partition::Held;

/// A node that is to end.
pub(super) struct Finishing {
    /// From then on it is not waited for appends before others shall lead.
    hand_over_at: u64,
    until: u64,
    is_handing_over: bool,
    /// Who waits for it sees this dropped.
    _done: Sender<()>,
}

impl Io {
    /// Takes no more appends, and begins to wait for those that were taken.
    pub(super) fn finish(&mut self, patience: Duration, done: Sender<()>) {
        let now = self.shared.now();
        let patience = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        self.with_all(Held::close);
        self.finishing = Some(Finishing {
            hand_over_at: now.saturating_add(patience / 2),
            until: now.saturating_add(patience),
            is_handing_over: false,
            _done: done,
        });
        self.arm_timer();
    }

    /// Gives up what we lead once all that was appended is acknowledged, and is done once others lead.
    pub(super) fn go_on_finishing(&mut self) {
        let Some(finishing) = &mut self.finishing else {
            return;
        };
        let now = self.shared.now();
        let is_appending = self.partitions.iter().flatten().any(Held::is_appending);
        let has_elections = self.coordinator.as_ref().is_some_and(|c| c.has_elections());
        // A member of the ISR that does not answer keeps nobody from leading who has everything.
        if !finishing.is_handing_over && (!is_appending || now >= finishing.hand_over_at) {
            finishing.is_handing_over = true;
            let until = finishing.until;
            if has_elections {
                self.with_all(|held| {
                    held.replica.hand_over(now, until);
                });
                return;
            }
        }
        let mut held = self.partitions.iter().flatten();
        // A leader without another member in sync has nobody to hand over to.
        let has_heir = |held: &Held| held.replica.leader().is_some_and(|l| l.isr().len() > 1);
        let is_leading = has_elections && held.any(has_heir);
        if now >= finishing.until || !is_appending && !is_leading {
            self.finishing = None;
        }
    }

    /// Answers whoever still waits.
    pub(super) fn end(&mut self) {
        let cause = "the node has ended";
        for request in self.queues.appends.try_iter() {
            request.refuse(ErrorCode::SHUTTING_DOWN, cause.to_owned());
        }
        for held in self.partitions.iter_mut().flatten() {
            held.leading.stop(cause);
        }
    }
}
