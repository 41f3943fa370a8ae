//! Memory windows of a simulation: who has opened the target of a direction, until when.
//!
//! ```text
//!             BIND posted          BIND complete
//!   Closed ----------------> Opening -----------> Open
//!      ^                                           | LOCAL_INV posted at the target's end, or
//!      '------------------- Closing <--------------' SEND_WITH_INV at the other
//!        it has completed, or arrived
//! ```
//!
//! BIND and LOCAL_INV are posted by the end that has the target, so in the opposite direction. Only while
//! a window is open requests use it; while it is closed the target does not change.

use super::work::{Draft, SLOTS};
use super::{Violation, World};
use crate::mr_table::{Bind, Key};
use crate::qp::QpState;
use crate::virtual_device::REMOTE_RIGHTS;
use crate::work::SendOp;

/// Whether the target of a direction is open to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Open,
    Opening,
    Closing,
    Closed,
}

/// What a request does to a window of its own side, which is the opposite direction's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowAct {
    /// Opens it under this key.
    Bind(Key),
    Invalidate,
}

impl World {
    /// A request in direction `d` that opens or closes a window to the target at its own end, now and then.
    pub(super) fn draft_window_act(&mut self, d: usize) -> Option<Draft> {
        let granted = &self.directions[d ^ 1];
        if !granted.is_window || granted.revoked.is_some() || granted.is_revoking {
            return None;
        }
        let is_unused = !granted.pending.iter().any(|request| request.needs_key);
        match granted.access {
            Access::Closed if self.rng.chance(30) => Some(self.draft_bind(d)),
            Access::Open if is_unused && self.rng.chance(5) => {
                self.directions[d ^ 1].access = Access::Closing;
                Some(self.draft_invalidate(d))
            }
            _ => None,
        }
    }

    /// Opens the targets of connection `c` that wait for it.
    pub(super) fn open_windows(&mut self, c: usize) {
        for d in [2 * c, 2 * c + 1] {
            let granted = &self.directions[d ^ 1];
            if granted.is_window && granted.access == Access::Closed {
                let draft = self.draft_bind(d);
                self.post(d, draft);
            }
        }
    }

    /// Closes the target of direction `d` whatever is under way, if its end can still do so; false if not.
    pub(super) fn revoke_window(&mut self, d: usize) -> bool {
        let opposite = &self.directions[d ^ 1];
        let node = &mut self.nodes[opposite.from];
        let can_post = opposite.pending.len() < SLOTS
            && !opposite.is_doomed
            && node.device.state(opposite.qpn) == QpState::Rts;
        let direction = &mut self.directions[d];
        if !can_post || direction.access != Access::Open || direction.is_revoking {
            return false;
        }
        direction.is_revoking = true;
        let draft = self.draft_invalidate(d ^ 1);
        self.post(d ^ 1, draft);
        true
    }

    fn draft_bind(&mut self, d: usize) -> Draft {
        let granted = &mut self.directions[d ^ 1];
        granted.access = Access::Opening;
        let tag = granted.key.0.wrapping_add(1) & 0xff;
        let rkey = Key(granted.key.0 & !0xff | tag);
        let device = &self.nodes[granted.to].device;
        let bind = Bind {
            rkey,
            region: granted.below,
            addr: device.remote(granted.target.start, rkey).addr,
            len: granted.target.len() as u64,
            access: REMOTE_RIGHTS,
            is_zero_based: false,
        };
        Draft::on_window(SendOp::BindWindow(bind), WindowAct::Bind(rkey))
    }

    fn draft_invalidate(&self, d: usize) -> Draft {
        let rkey = self.directions[d ^ 1].key;
        Draft::on_window(SendOp::LocalInvalidate { rkey }, WindowAct::Invalidate)
    }

    /// A request in direction `d` has done this.
    pub(super) fn window_acted(&mut self, d: usize, act: WindowAct) -> Result<(), Violation> {
        match act {
            WindowAct::Invalidate => self.close(d ^ 1),
            WindowAct::Bind(key) => {
                self.check_closed(d ^ 1)?;
                let granted = &mut self.directions[d ^ 1];
                granted.closed = None;
                granted.key = key;
                granted.access = Access::Open;
                Ok(())
            }
        }
    }

    /// The target of direction `d` is closed, and does not change any more.
    pub(super) fn close(&mut self, d: usize) -> Result<(), Violation> {
        self.check_target(d)?;
        let direction = &mut self.directions[d];
        let node = &self.nodes[direction.to];
        let held = node.device.read(direction.target.clone());
        direction.access = Access::Closed;
        if std::mem::take(&mut direction.is_revoking) {
            direction.revoked = Some(held);
        } else {
            direction.closed = Some(held);
        }
        Ok(())
    }

    /// A target that is closed, or whose key is revoked, is as it was then.
    pub(super) fn check_closed(&self, d: usize) -> Result<(), Violation> {
        let direction = &self.directions[d];
        let node = &self.nodes[direction.to];
        let held = node.device.read(direction.target.clone());
        let kept = direction.closed.iter().chain(&direction.revoked);
        for kept in kept {
            demand!(
                held == *kept,
                "the target of direction {d} has changed while it was closed"
            );
        }
        Ok(())
    }
}
