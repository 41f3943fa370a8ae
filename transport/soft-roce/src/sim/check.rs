//! The checks of a simulation: completions against what was posted, memory against the model.

use std::ops::Range;

use rdma_core_bindings::{IBV_EVENT_CQ_ERR, IBV_EVENT_SQ_DRAINED, IBV_EVENT_SRQ_LIMIT_REACHED};

use super::receives::RECEIVE;
use super::work::{Outcome, Pending, Receipt, Returns, SLOTS, WORDS, slots_len};
use super::{Connection, Violation, World};
use crate::device::{ContextEvent, Element};
use crate::qp::QpState;
use crate::virtual_device::word_of;
use crate::wire::rnr_timer_ns;
use crate::work::{Wc, WcOpcode, WcStatus};

impl World {
    /// Polls the completion queues of a node, and judges what has completed.
    pub(super) fn poll(&mut self, n: usize) -> Result<(), Violation> {
        let mut completions = Vec::new();
        self.note_overruns()?;
        for cq in &self.nodes[n].cqs {
            cq.pop(usize::MAX, |_, wc| completions.push(*wc));
        }
        for wc in completions {
            self.stats.completions += 1;
            self.judge(n, &wc)
                .map_err(|violation| Violation(format!("node {n}, {wc}: {}", violation.0)))?;
        }
        while let Some(event) = self.nodes[n].device.next_event() {
            self.judge_event(n, event)
                .map_err(|violation| Violation(format!("node {n}, {event:?}: {}", violation.0)))?;
        }
        self.abandon_unheard(n);
        self.check_limit(n)
    }

    fn judge(&mut self, n: usize, wc: &Wc) -> Result<(), Violation> {
        let mailbox = self.nodes[n].mailbox.as_ref();
        if mailbox.is_some_and(|mailbox| mailbox.qpn == wc.qpn) {
            return self.judge_letter(n, wc);
        }
        match self.routes.get(&(n, wc.qpn)).copied() {
            None => Err(Violation("a completion of no queue pair".into())),
            Some(d) if wc.wr_id & RECEIVE == 0 => self.judge_send(d, wc),
            Some(d) => self.judge_receive(d ^ 1, wc),
        }
    }

    fn judge_event(&mut self, n: usize, event: ContextEvent) -> Result<(), Violation> {
        match event.event_type {
            IBV_EVENT_SRQ_LIMIT_REACHED => self.judge_limit_event(n, event.element),
            IBV_EVENT_SQ_DRAINED => match event.element {
                Element::Qp(handle) => self.judge_drained(n, handle),
                _ => Err(Violation("it is a queue pair's event".into())),
            },
            IBV_EVENT_CQ_ERR => {
                self.nodes[n].cq_errors += 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn judge_send(&mut self, d: usize, wc: &Wc) -> Result<(), Violation> {
        let is_first_error = self.directions[d].first_error.is_none();
        let is_success = wc.status == WcStatus::Success;
        demand!(is_first_error || !is_success, "success behind an error");
        // Before the first error, requests that were not signalled succeed in silence.
        let request = loop {
            let Some(request) = self.directions[d].pending.pop_front() else {
                return Err(Violation("a completion too many".into()));
            };
            if request.wr_id == wc.wr_id {
                break request;
            }
            demand!(
                is_first_error && !request.is_signaled,
                "request {} should have completed first",
                request.wr_id
            );
            self.succeed(d, request)?;
        };
        if !is_success {
            return self.fail(d, request, wc.status);
        }
        let held_from = self.directions[d].held_from;
        demand!(
            held_from.is_none_or(|first| request.wr_id < first),
            "it was posted to a drained queue"
        );
        demand!(request.is_signaled, "it was not signalled");
        demand!(wc.opcode == request.opcode, "it was {:?}", request.opcode);
        demand!(
            wc.byte_len as usize == request.len,
            "it had {} bytes",
            request.len
        );
        self.succeed(d, request)
    }

    /// A request has succeeded: its effects must be there.
    fn succeed(&mut self, d: usize, request: Pending) -> Result<(), Violation> {
        demand!(
            request.outcome == Outcome::Good,
            "{request} succeeded, which must be refused"
        );
        if let Some(act) = request.window {
            return self.window_acted(d, act);
        }
        let when = self.tick();
        let direction = &self.directions[d];
        let at = direction.source_slot(request.wr_id, request.len);
        let from = &mut self.nodes[direction.from];
        match &request.returns {
            Returns::Nothing => {}
            Returns::Bytes(bytes) => {
                let found = from.device.read(at.clone());
                demand!(found == *bytes, "{request} brought other bytes");
                from.model[at].copy_from_slice(&found);
            }
            Returns::Word { word, number } => {
                let found = from.device.read(at.clone());
                from.model[at].copy_from_slice(&found);
                let value = word_of(&found);
                self.nodes[direction.to].histories[*word].complete(*number, when, value);
            }
        }
        let direction = &self.directions[d];
        if let Some((at, bytes)) = &request.change {
            let start = direction.target.start + at;
            self.nodes[direction.to].model[start..start + bytes.len()].copy_from_slice(bytes);
            self.check_placed(d, request.wr_id, *at, bytes)?;
        }
        Ok(())
    }

    /// A request has failed: that must have been possible, and what it did is not known.
    fn fail(&mut self, d: usize, request: Pending, status: WcStatus) -> Result<(), Violation> {
        if status == WcStatus::RnrRetryExcErr {
            self.check_starved(d, &request)?;
        }
        demand!(
            self.can_fail(d / 2),
            "a connection failed that had no reason to"
        );
        let peer_is_silent = self.is_silent(d);
        let direction = &mut self.directions[d];
        let is_possible = match status {
            WcStatus::WrFlushErr => true,
            _ if direction.first_error.is_some() => false,
            // A READ that is repeated after its key was revoked gets no answer.
            WcStatus::RetryExcErr if request.opcode == WcOpcode::RdmaRead => {
                peer_is_silent || request.needs_key && direction.is_losing_key()
            }
            WcStatus::RetryExcErr => peer_is_silent,
            WcStatus::RnrRetryExcErr => request.outcome != Outcome::Unreached,
            WcStatus::RemAccessErr if request.outcome == Outcome::Good => {
                request.needs_key && direction.is_losing_key()
            }
            _ => request.outcome == Outcome::Refused(status),
        };
        demand!(is_possible, "{request} cannot end so");
        direction.first_error.get_or_insert(status);
        let from = &mut self.nodes[direction.from];
        let state = from.device.state(direction.qpn);
        demand!(state == QpState::Err, "a request failed in state {state:?}");
        // Of a READ that is refused, earlier pieces may have been good. What lies behind an error
        // brings nothing.
        if request.outcome != Outcome::Unreached && request.is_rd_atomic() {
            from.adopt(direction.source_slot(request.wr_id, request.len));
        }
        direction.doubtful.push(request);
        Ok(())
    }

    /// Whether the other end may have ceased to answer.
    fn is_silent(&mut self, d: usize) -> bool {
        let (to, qpn) = (self.directions[d].to, self.directions[d ^ 1].qpn);
        let node = &mut self.nodes[to];
        let hears = matches!(node.device.state(qpn), QpState::Rts | QpState::Sqd);
        self.plan.is_storm || !node.is_alive || !hears
    }

    /// Whether something has happened that may end connection `c`.
    pub(super) fn can_fail(&mut self, c: usize) -> bool {
        if self.connections[c].rnr_retry < 7 && !self.connections[c].can_fail {
            let ends =
                [2 * c, 2 * c + 1].map(|d| (self.directions[d].from, self.directions[d].qpn));
            let has_failed =
                |(n, qpn): &(usize, _)| self.nodes[*n].device.state(*qpn) == QpState::Err;
            self.connections[c].can_fail = ends.iter().any(has_failed);
        }
        self.connections[c].can_fail
    }

    /// A request has failed for want of a receive: all tries were made, and each wait lasted.
    fn check_starved(&self, d: usize, request: &Pending) -> Result<(), Violation> {
        let Connection {
            rnr_retry,
            rnr_timer,
            ..
        } = self.connections[d / 2];
        demand!(
            rnr_retry < 7 && request.takes_receive,
            "{request} waits without end, or needs no receive"
        );
        let waited = self.now - request.posted_at;
        demand!(
            waited >= u64::from(rnr_retry) * rnr_timer_ns(rnr_timer),
            "{request} failed after {waited} ns"
        );
        Ok(())
    }

    fn judge_receive(&mut self, d: usize, wc: &Wc) -> Result<(), Violation> {
        let buffer = self.take_receive(d, wc.wr_id)?;
        let direction = &mut self.directions[d];
        let qpn = direction.qpn;
        if wc.status == WcStatus::WrFlushErr {
            self.nodes[direction.to].adopt(buffer);
            demand!(
                self.can_fail(d / 2),
                "a connection failed that had no reason to"
            );
            return Ok(());
        }
        let to = direction.to;
        let Some(receipt) = direction.receipts.pop_front() else {
            return Err(Violation("a message that nobody sent".into()));
        };
        let Receipt {
            wr_id,
            opcode,
            byte_len,
            imm,
            invalidated,
            is_solicited,
            bytes,
            placed,
        } = receipt;
        let told = (wc.status, wc.opcode, wc.byte_len as usize, wc.imm);
        let right = (WcStatus::Success, opcode, byte_len, imm);
        demand!(told == right, "it should be {right:?}");
        let told = (wc.is_solicited, wc.src_qp, wc.invalidated);
        let right = (is_solicited, qpn, invalidated);
        demand!(
            told == right,
            "solicited, sender, invalidated: it should be {right:?}"
        );
        if invalidated.is_some() {
            self.close(d)?;
        }
        if let Some(bytes) = bytes {
            let at = buffer.start..buffer.start + byte_len;
            let node = &mut self.nodes[to];
            demand!(
                node.device.read(at.clone()) == bytes,
                "the bytes received are not those sent"
            );
            node.model[at].copy_from_slice(&bytes);
        }
        match placed {
            Some((at, bytes)) => self.check_placed(d, wr_id, at, &bytes),
            None => Ok(()),
        }
    }

    /// The buffer of the receive that has completed for direction `d`.
    fn take_receive(&mut self, d: usize, wr_id: u64) -> Result<Range<usize>, Violation> {
        let direction = &mut self.directions[d];
        let taken = match &mut self.nodes[direction.to].pool {
            Some(pool) if direction.is_shared => {
                let is_later = std::mem::replace(&mut direction.last_shared, wr_id) < wr_id;
                pool.finish(wr_id).filter(|_| is_later)
            }
            _ => direction.receives.finish(wr_id),
        };
        taken.ok_or_else(|| Violation("another receive should have completed".into()))
    }

    /// What request `wr_id` has written to the target must be there, or what a later one wrote.
    fn check_placed(&self, d: usize, wr_id: u64, at: usize, bytes: &[u8]) -> Result<(), Violation> {
        let direction = &self.directions[d];
        let node = &self.nodes[direction.to];
        let start = direction.target.start + at;
        let found = node.device.read(start..start + bytes.len());
        if found == bytes {
            return Ok(());
        }
        let is_complete = direction
            .pending
            .front()
            .is_none_or(|oldest| oldest.wr_id > wr_id);
        for (i, (found, written)) in found.iter().zip(bytes).enumerate() {
            let later = direction.pending.iter().chain(&direction.doubtful);
            let is_later = later
                .filter(|request| request.wr_id > wr_id)
                .any(|request| request.may_leave(at + i, *found));
            let is_later = is_later || is_complete && node.model[start + i] == *found;
            demand!(
                found == written || is_later,
                "byte {} of what request {wr_id} wrote is not in its place",
                at + i
            );
        }
        Ok(())
    }

    /// Checks the target before its key is revoked, and keeps it: it may not change any more.
    pub(super) fn keep_revoked(&mut self, d: usize) -> Result<(), Violation> {
        self.check_target(d)?;
        let direction = &mut self.directions[d];
        let held = self.nodes[direction.to]
            .device
            .read(direction.target.clone());
        direction.revoked = Some(held);
        Ok(())
    }

    /// Each byte of the target is what completed requests left, or what others may have written.
    pub(super) fn check_target(&self, d: usize) -> Result<(), Violation> {
        let direction = &self.directions[d];
        let node = &self.nodes[direction.to];
        let found = node.device.read(direction.target.clone());
        let model = &node.model[direction.target.clone()];
        if found == model {
            return Ok(());
        }
        for (at, (found, model)) in found.iter().zip(model).enumerate() {
            let mut others = direction.pending.iter().chain(&direction.doubtful);
            demand!(
                found == model || others.any(|request| request.may_leave(at, *found)),
                "byte {at} of the target is {found:#x}, which nobody wrote"
            );
        }
        Ok(())
    }

    /// Everything is at rest: all must be done, and every byte what it should be.
    pub(super) fn check_end(&mut self) -> Result<(), Violation> {
        for d in 0..self.directions.len() {
            self.check_direction_end(d)
                .map_err(|violation| Violation(format!("direction {d}: {}", violation.0)))?;
        }
        for n in 0..self.nodes.len() {
            self.check_pool_end(n)
                .and_then(|()| self.check_cq_errors(n))
                .and_then(|()| self.check_node_end(n))
                .map_err(|violation| Violation(format!("node {n}: {}", violation.0)))?;
        }
        Ok(())
    }

    fn check_direction_end(&mut self, d: usize) -> Result<(), Violation> {
        let direction = &self.directions[d];
        let (from, to) = (direction.from, direction.to);
        let is_alive = self.nodes[from].is_alive;
        let state = self.nodes[from].device.state(direction.qpn);
        let can_fail = self.can_fail(d / 2);
        demand!(
            can_fail || state == QpState::Rts,
            "the queue pair is in {state:?}"
        );
        if is_alive {
            let direction = &self.directions[d];
            let left = direction.pending.len();
            demand!(
                direction.first_error.is_none() || left == 0,
                "{left} requests were not flushed"
            );
            demand!(
                state == QpState::Err || !direction.is_doomed,
                "a request that must be refused was not"
            );
            // The last ones, if they were not signalled, have succeeded in silence.
            while let Some(request) = self.directions[d].pending.pop_front() {
                let number = request.wr_id;
                demand!(!request.is_signaled, "request {number} never completed");
                self.succeed(d, request)?;
            }
            demand!(
                self.directions[d].receipts.is_empty() || can_fail,
                "messages were not received"
            );
        }
        let direction = &self.directions[d];
        let receiver = &mut self.nodes[to];
        let state = receiver.device.state(self.directions[d ^ 1].qpn);
        let left = direction.receives.outstanding_count();
        demand!(
            !receiver.is_alive || state != QpState::Err || left == 0,
            "{left} receives were not flushed"
        );
        self.check_target(d)?;
        let direction = &self.directions[d];
        let held = self.nodes[to].device.read(direction.target.clone());
        self.check_closed(d)?;
        if direction.revoked.is_none() && !can_fail {
            demand!(
                held == direction.ahead,
                "the target is not what was written"
            );
        }
        Ok(())
    }

    /// The words' histories hold, and no byte is changed that nobody was granted.
    fn check_node_end(&mut self, n: usize) -> Result<(), Violation> {
        let node = &mut self.nodes[n];
        for word in 0..WORDS {
            let at = node.words.start + 8 * word;
            let held = node.device.read(at..at + 8);
            let last = word_of(&held);
            node.histories[word].check(last)?;
        }
        node.adopt(node.words.clone());
        for (d, direction) in self.directions.iter().enumerate() {
            if direction.to == n {
                node.adopt(direction.target.clone());
            }
            // A receive buffer in use, and what unfinished requests were to bring, hold anything.
            let is_unfinished = self.connections[d / 2].can_fail;
            if direction.to == n && is_unfinished {
                for buffer in direction.receives.outstanding() {
                    node.adopt(buffer);
                }
            }
            if direction.from == n {
                for request in &direction.pending {
                    if request.is_rd_atomic() {
                        node.adopt(direction.source_slot(request.wr_id, request.len));
                    }
                }
            }
        }
        let held = node.device.read(0..node.model.len());
        let changed = held.iter().zip(&node.model).position(|(a, b)| a != b);
        match changed {
            None => Ok(()),
            Some(at) => Err(Violation(format!(
                "byte {at} is changed, which nobody was granted: {}",
                self.place(n, at)
            ))),
        }
    }

    /// What lies at a byte of a node's memory.
    fn place(&self, n: usize, at: usize) -> String {
        let within = |start: usize, len: usize| (start..start + len).contains(&at);
        for (d, direction) in self.directions.iter().enumerate() {
            let receives = direction.receives.start;
            let slots = slots_len(direction.len_max);
            let slot = |start: usize| (at - start) / (slots / SLOTS);
            if direction.from == n && within(direction.sources, slots) {
                return format!("buffer {} of direction {d}", slot(direction.sources));
            }
            if direction.to == n && within(receives, slots) {
                return format!("receive {} of direction {d}", slot(receives));
            }
        }
        "a guard".into()
    }
}

impl Pending {
    /// Whether this request may have left `byte` at `at` of the target.
    fn may_leave(&self, at: usize, byte: u8) -> bool {
        self.outcome == Outcome::Good
            && self.change.as_ref().is_some_and(|(start, bytes)| {
                at.checked_sub(*start)
                    .and_then(|i| bytes.get(i))
                    .is_some_and(|written| *written == byte)
            })
    }
}
