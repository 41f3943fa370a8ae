//! Receive requests of a simulation: those of one queue pair, and those that several share.

use std::collections::BTreeMap;
use std::ops::Range;

use super::random::Rng;
use super::work::{SGE_MAX, SLOTS, pieces};
use super::{Violation, World};
use crate::device::Element;
use crate::mr_table::Key;
use crate::qp::QpState;
use crate::srq::{SrqAttr, SrqAttrMask, SrqRef};
use crate::virtual_device::VirtualDevice;
use crate::wire::Qpn;
use crate::work::{RecvWr, Sge};

/// Marks the names of receive requests.
pub(super) const RECEIVE: u64 = 1 << 63;
/// Marks the names of shared ones.
const SHARED: u64 = 1 << 62;
/// Shared receives of a node: what wait, and what went with queue pairs that failed or were reset.
pub(super) const POOL_SLOTS: usize = 4 * SLOTS;

/// The receive requests of one queue pair, which complete in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receives {
    pub(super) start: usize,
    /// Bytes of each buffer.
    pub(super) slot_len: usize,
    posted: u64,
    done: u64,
}

impl Receives {
    pub(super) fn new(start: usize, slot_len: usize) -> Self {
        Self {
            start,
            slot_len,
            posted: 0,
            done: 0,
        }
    }

    /// Posts requests to `qpn` until `target` wait, or there is no room.
    pub(super) fn post(
        &mut self,
        device: &mut VirtualDevice,
        qpn: Qpn,
        key: Key,
        rng: &mut Rng,
        target: usize,
    ) {
        let target = target.min(SLOTS) as u64;
        while self.outstanding_count() < target {
            let wr_id = self.posted | RECEIVE;
            let at = self.slot(wr_id);
            let sges: Vec<Sge> = pieces(rng, at.start, at.len())
                .map(|(at, len)| device.sge(at, len, key))
                .collect();
            let posted = device.engine.post_recv(qpn, &RecvWr { wr_id, sges: &sges });
            posted.expect("there is room");
            self.posted += 1;
        }
    }

    /// The buffer of a request that completes now; `None` if another one should.
    pub(super) fn finish(&mut self, wr_id: u64) -> Option<Range<usize>> {
        let is_next = wr_id == self.done | RECEIVE && self.done < self.posted;
        is_next.then(|| {
            self.done += 1;
            self.slot(wr_id)
        })
    }

    /// The buffers of requests that wait or are in use.
    pub(super) fn outstanding(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let receives = *self;
        (self.done..self.posted).map(move |number| receives.slot(number))
    }

    pub(super) fn outstanding_count(&self) -> u64 {
        self.posted - self.done
    }

    /// Every request is gone without a completion.
    pub(super) fn forget(&mut self) {
        self.done = self.posted;
    }

    fn slot(&self, wr_id: u64) -> Range<usize> {
        let number = usize::try_from(wr_id & !RECEIVE).expect("few requests");
        let start = self.start + number % SLOTS * self.slot_len.next_multiple_of(8);
        start..start + self.slot_len
    }
}

/// The receive requests that queue pairs of one node share. They are taken in order, and complete on
/// whichever queue pair has taken them.
pub(super) struct Pool {
    pub(super) srq: SrqRef,
    start: usize,
    slot_len: usize,
    posted: u64,
    /// Requests that wait or are in use, and their slots.
    out: BTreeMap<u64, usize>,
    free: Vec<usize>,
    /// The limit whose event is awaited; 0 if none is.
    limit: usize,
    /// Requests that may have gone without a completion.
    pub(super) lost_max: usize,
}

impl Pool {
    pub(super) fn new(srq: SrqRef, start: usize, slot_len: usize) -> Self {
        Self {
            srq,
            start,
            slot_len,
            posted: 0,
            out: BTreeMap::new(),
            free: (0..POOL_SLOTS).rev().collect(),
            limit: 0,
            lost_max: 0,
        }
    }

    /// The buffer of a request that completes now; `None` if it is not posted.
    pub(super) fn finish(&mut self, wr_id: u64) -> Option<Range<usize>> {
        let slot = self.out.remove(&wr_id)?;
        self.free.push(slot);
        Some(self.buffer(slot))
    }

    fn buffer(&self, slot: usize) -> Range<usize> {
        let start = self.start + slot * self.slot_len.next_multiple_of(8);
        start..start + self.slot_len
    }
}

impl World {
    /// Posts receives for direction `d` until `target` wait, or there is no room.
    pub(super) fn post_receives(&mut self, d: usize, target: usize) {
        let qpn = self.directions[d ^ 1].qpn;
        let direction = &mut self.directions[d];
        let to = direction.to;
        let node = &mut self.nodes[to];
        let is_unheard = self.connections[d / 2].is_unheard;
        if !node.is_alive || is_unheard || node.device.state(qpn) == QpState::Reset {
            return;
        }
        if direction.is_shared {
            return self.post_shared(to, target);
        }
        let receives = &mut direction.receives;
        receives.post(&mut node.device, qpn, node.local_key, &mut self.rng, target);
        self.serve(to);
    }

    /// Posts shared receives of node `n` until `target` wait, and now and then asks for an event when
    /// few are left.
    pub(super) fn post_shared(&mut self, n: usize, target: usize) {
        let node = &mut self.nodes[n];
        let Some(pool) = &mut node.pool else {
            return;
        };
        while node.device.srq(pool.srq.number).waiting() < target.min(SLOTS) {
            let Some(slot) = pool.free.pop() else {
                break;
            };
            let wr_id = pool.posted | RECEIVE | SHARED;
            let at = pool.buffer(slot);
            let sges: Vec<Sge> = pieces(&mut self.rng, at.start, at.len())
                .map(|(at, len)| node.device.sge(at, len, node.local_key))
                .collect();
            let srq = &mut node.device.srq(pool.srq.number);
            let posted = srq.post(&RecvWr { wr_id, sges: &sges });
            posted.expect("there is room");
            pool.posted += 1;
            pool.out.insert(wr_id, slot);
        }
        // Not while the event of the last time waits to be read.
        let limit = node.device.srq(pool.srq.number).attr().limit;
        if limit == pool.limit && self.rng.chance(10) {
            let attr = SrqAttr {
                max_wr: POOL_SLOTS,
                max_sge: SGE_MAX,
                limit: self.rng.below(SLOTS),
            };
            let srq = &mut node.device.srq(pool.srq.number);
            let armed = srq.modify(&attr, SrqAttrMask::LIMIT);
            armed.expect("the limit is below the size");
            pool.limit = attr.limit;
        }
    }

    /// The event of a node's limit has come.
    pub(super) fn judge_limit_event(
        &mut self,
        n: usize,
        element: Element,
    ) -> Result<(), Violation> {
        let pool = self.nodes[n].pool.as_mut();
        let is_awaited = pool.is_some_and(|pool| {
            let is_it = element == Element::Srq(pool.srq.number.0 as usize);
            is_it && std::mem::take(&mut pool.limit) > 0
        });
        if is_awaited {
            Ok(())
        } else {
            Err(Violation("a limit event that nobody asked for".into()))
        }
    }

    /// Whether the event of the limit has come if, and only if, the queue says so.
    pub(super) fn check_limit(&mut self, n: usize) -> Result<(), Violation> {
        let node = &mut self.nodes[n];
        let Some(pool) = &node.pool else {
            return Ok(());
        };
        let limit = node.device.srq(pool.srq.number).attr().limit;
        if limit == pool.limit {
            return Ok(());
        }
        Err(Violation(format!(
            "the limit is {limit}, and its event has not come"
        )))
    }

    /// At the end: of the requests that have not completed, all wait but those that a queue pair took
    /// for a message that never ended.
    pub(super) fn check_pool_end(&mut self, n: usize) -> Result<(), Violation> {
        let held_max = self.unfinished_shared(n);
        let node = &mut self.nodes[n];
        let Some(pool) = &node.pool else {
            return Ok(());
        };
        let waiting = node.device.srq(pool.srq.number).waiting();
        let held = pool.out.len() - waiting;
        if held > held_max + pool.lost_max {
            return Err(Violation(format!(
                "{held} shared receives were taken and never completed"
            )));
        }
        // Who knows which they are.
        let held: Vec<Range<usize>> = match held {
            0 => Vec::new(),
            _ => pool.out.values().map(|slot| pool.buffer(*slot)).collect(),
        };
        for buffer in held {
            node.adopt(buffer);
        }
        Ok(())
    }

    /// Queue pairs of node `n` that may hold a shared receive for ever: what fails flushes it, but for a
    /// message whose sender has failed.
    fn unfinished_shared(&mut self, n: usize) -> usize {
        let ends = 0..self.directions.len();
        ends.filter(|d| {
            let direction = &self.directions[*d];
            direction.to == n && direction.is_shared && self.connections[d / 2].can_fail
        })
        .count()
    }
}
