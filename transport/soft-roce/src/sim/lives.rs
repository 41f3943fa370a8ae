//! What befalls a queue pair in a simulation that goes on: it is drained and resumed, or reset and
//! connected anew while packets of its former life are still on their way.

use super::windows::Access;
use super::work::Pending;
use super::{Violation, World};
use crate::qp::{Attr, AttrMask, QpState};
use crate::wire::Qpn;
use crate::work::WcOpcode;

impl World {
    /// Drains, resumes or resets what direction `d` is sent through.
    pub(super) fn disturb(&mut self, d: usize) -> Result<(), Violation> {
        if self.connections[d / 2].reset.is_some() {
            return self.reconnect(d / 2);
        }
        if self.directions[d].held_from.is_some() {
            return self.resume(d);
        }
        if self.rng.chance(60) {
            self.drain(d);
            return Ok(());
        }
        self.reset(d)
    }

    /// Ends every pause: queue pairs send again.
    pub(super) fn settle(&mut self) -> Result<(), Violation> {
        for d in 0..self.directions.len() {
            self.resume(d)?;
        }
        for c in 0..self.connections.len() {
            self.reconnect(c)?;
        }
        Ok(())
    }

    /// RTS to SQD: what is begun is finished, what is posted from now on waits.
    fn drain(&mut self, d: usize) {
        let direction = &mut self.directions[d];
        let node = &mut self.nodes[direction.from];
        if !node.is_alive || node.device.state(direction.qpn) != QpState::Rts {
            return;
        }
        let attr = Attr {
            state: QpState::Sqd,
            en_sqd_async_notify: true,
            ..Attr::default()
        };
        let mask = AttrMask::STATE | AttrMask::EN_SQD_ASYNC_NOTIFY;
        let moved = node.device.engine.modify_qp(direction.qpn, &attr, mask);
        moved.expect("RTS opens on SQD");
        direction.held_from = Some(direction.posted);
        direction.is_drain_awaited = true;
        let from = direction.from;
        self.serve(from);
    }

    /// SQD to RTS. If all that was begun is finished, the event has told so.
    fn resume(&mut self, d: usize) -> Result<(), Violation> {
        if self.directions[d].held_from.is_none() {
            return Ok(());
        }
        let (from, qpn) = (self.directions[d].from, self.directions[d].qpn);
        self.poll(from)?;
        let node = &mut self.nodes[from];
        let direction = &mut self.directions[d];
        direction.held_from = None;
        let is_told = !std::mem::take(&mut direction.is_drain_awaited);
        if !node.is_alive || node.device.state(qpn) != QpState::Sqd {
            return Ok(());
        }
        let qp = node.device.engine.qp(qpn).expect("nobody destroyed it");
        demand!(
            is_told || qp.is_draining(),
            "direction {d}: the queue is drained, and nobody was told"
        );
        let attr = Attr {
            state: QpState::Rts,
            ..Attr::default()
        };
        let moved = node.device.engine.modify_qp(qpn, &attr, AttrMask::STATE);
        moved.expect("SQD opens on RTS");
        self.serve(from);
        Ok(())
    }

    /// The queue pair is drained, and says so once.
    pub(super) fn judge_drained(&mut self, n: usize, handle: usize) -> Result<(), Violation> {
        let qpn = Qpn::new(u32::try_from(handle).expect("its number"));
        let d = self.routes.get(&(n, qpn)).copied();
        let direction = d.map(|d| &mut self.directions[d]);
        let is_awaited =
            direction.is_some_and(|direction| std::mem::take(&mut direction.is_drain_awaited));
        demand!(is_awaited, "nobody asked for this event");
        Ok(())
    }

    /// Resets the queue pair that direction `d` is sent through: it forgets all that was posted. The
    /// other end learns of it later.
    fn reset(&mut self, d: usize) -> Result<(), Violation> {
        let c = d / 2;
        let ends = [d, d ^ 1].map(|d| self.directions[d].from);
        let is_over = ends.iter().any(|n| !self.nodes[*n].is_alive)
            || self.resets == RESETS_MAX
            || self.connections[c].is_unheard;
        if is_over {
            return Ok(());
        }
        self.resets += 1;
        self.connections[c].can_fail = true;
        self.connections[c].reset = Some(d);
        self.reset_end(d)
    }

    fn reset_end(&mut self, d: usize) -> Result<(), Violation> {
        let (from, qpn) = (self.directions[d].from, self.directions[d].qpn);
        // A held ACK would be lost. What has completed is known then, and the rest never completes.
        self.serve(from);
        self.poll(from)?;
        let engine = &mut self.nodes[from].device.engine;
        let attr = Attr::default();
        let moved = engine.modify_qp(qpn, &attr, AttrMask::STATE);
        moved.expect("RESET is open from every state");
        self.serve(from);
        let node = &mut self.nodes[from];
        let direction = &mut self.directions[d];
        direction.abandon(node);
        direction.is_doomed = false;
        direction.held_from = None;
        direction.is_drain_awaited = false;
        let heard = &mut self.directions[d ^ 1];
        for buffer in heard.receives.outstanding() {
            node.adopt(buffer);
        }
        heard.receives.forget();
        if let Some(pool) = node.pool.as_mut().filter(|_| heard.is_shared) {
            pool.lost_max += 1;
        }
        Ok(())
    }

    /// Resets the other end too, and connects both anew. From here on nothing of the former life may
    /// have any effect, though its packets are still on their way.
    fn reconnect(&mut self, c: usize) -> Result<(), Violation> {
        let Some(first) = self.connections[c].reset.take() else {
            return Ok(());
        };
        let second = first ^ 1;
        let ends = [first, second].map(|d| self.directions[d].from);
        if ends.iter().any(|n| !self.nodes[*n].is_alive) {
            return Ok(());
        }
        self.reset_end(second)?;
        if self.connections[c].is_unheard {
            return Ok(());
        }
        for d in [first, second] {
            self.check_target(d)?;
            self.check_closed(d)?;
            self.begin_anew(d);
        }
        self.connections[c].can_fail = self.plan.is_storm;
        self.establish(c);
        Ok(())
    }

    /// Direction `d` has no past: its target is what it holds now, whatever became of the requests.
    fn begin_anew(&mut self, d: usize) {
        let direction = &mut self.directions[d];
        let node = &mut self.nodes[direction.to];
        node.adopt(direction.target.clone());
        direction.ahead = node.device.read(direction.target.clone());
        direction.resets += 1;
        direction.doubtful.clear();
        direction.receipts.clear();
        direction.first_error = None;
        direction.closed = None;
        let is_lost = direction.is_losing_key() || direction.access != Access::Open;
        direction.is_revoking = false;
        direction.revoked = None;
        if is_lost {
            self.grant(d);
        }
    }
}

/// Resets of one run: each may take shared receives along.
pub(super) const RESETS_MAX: usize = 6;

impl Pending {
    /// Whether it brings something into its own buffer.
    pub(super) fn is_rd_atomic(&self) -> bool {
        use WcOpcode::{CompSwap, FetchAdd, RdmaRead};
        matches!(self.opcode, RdmaRead | CompSwap | FetchAdd)
    }
}
