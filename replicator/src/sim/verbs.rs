//! Verbs, one operation at a time: keys and what they open, lanes and the requests on them.
//!
//! A lane places its requests in order, each whole or in two pieces with anything else in between. Its end
//! cuts the piece that is under way: the sender's error, its death, the target's deregistration or the
//! queue pair's destruction there. What the network holds already may still land after the sender's end.

use std::collections::{BTreeMap, VecDeque};

use super::events::{Happening, ProcessEvent};
use super::{Violation, World};
use crate::image::ImageId;

/// Keys are used again after so many others; addresses are not.
const KEYS_COUNT: u64 = 61;
/// Between two registrations.
const GUARD_LEN: u64 = 1 << 20;
/// How long a sender repeats a request that nobody acknowledges.
const RETRY_NS: u64 = 300_000_000;
/// Between two repetitions.
const REPEAT_NS: u64 = 40_000_000;

/// What lies behind a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    Image(ImageId),
    Table,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    addr: u64,
    len: u64,
    backing: Backing,
    is_writable: bool,
}

/// The registrations of a process.
#[derive(Debug, Default)]
pub(super) struct Nic {
    count: u64,
    regions: BTreeMap<u32, Region>,
}

impl Nic {
    /// Registers memory at an address that was never used before; returns address and key.
    pub(super) fn register(&mut self, backing: Backing, len: u64, is_writable: bool) -> (u64, u32) {
        let key = loop {
            self.count += 1;
            let key = u32::try_from(self.count % KEYS_COUNT + 1).expect("a small number");
            if !self.regions.contains_key(&key) {
                break key;
            }
        };
        let addr = (1 << 40) + self.count * GUARD_LEN;
        let region = Region {
            addr,
            len,
            backing,
            is_writable,
        };
        self.regions.insert(key, region);
        (addr, key)
    }

    /// The memory behind a key has another name now.
    pub(super) fn rename(&mut self, key: u32, backing: Backing) {
        if let Some(region) = self.regions.get_mut(&key) {
            region.backing = backing;
        }
    }

    pub(super) fn deregister(&mut self, key: u32) {
        self.regions.remove(&key);
    }

    /// What `len` bytes at an address are, and where in it.
    pub(super) fn resolve(
        &self,
        key: u32,
        addr: u64,
        len: usize,
        is_write: bool,
    ) -> Option<(Backing, usize)> {
        let region = self.regions.get(&key)?;
        let at = addr.checked_sub(region.addr)?;
        let is_inside = at + len as u64 <= region.len;
        (is_inside && (region.is_writable || !is_write))
            .then_some((region.backing, usize::try_from(at).ok()?))
    }
}

/// An RDMA WRITE on its way.
#[derive(Debug)]
pub(super) struct WorkRequest {
    pub(super) addr: u64,
    pub(super) rkey: u32,
    pub(super) bytes: Vec<u8>,
    /// The epoch that its completion is of, if it is signalled.
    pub(super) epoch: Option<i32>,
}

/// Two queue pairs: one node writes into another's memory.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) session: u64,
    /// The processes that the queue pairs belong to.
    pub(super) sender: u64,
    pub(super) receiver: u64,
    pub(super) has_sender: bool,
    pub(super) has_receiver: bool,
    posted: VecDeque<WorkRequest>,
    /// Bytes of the first request that have landed.
    placed_len: usize,
    /// Placed and signalled, acknowledgement on its way.
    unacked: VecDeque<i32>,
    /// Pieces that may still land after the sender's end.
    on_the_wire: usize,
    is_placing: bool,
    is_acking: bool,
    give_up_at: Option<u64>,
}

impl Lane {
    pub(super) fn new(from: (usize, u64), to: (usize, u64), session: u64) -> Self {
        Self {
            from: from.0,
            to: to.0,
            session,
            sender: from.1,
            receiver: to.1,
            has_sender: true,
            has_receiver: true,
            posted: VecDeque::new(),
            placed_len: 0,
            unacked: VecDeque::new(),
            on_the_wire: 0,
            is_placing: false,
            is_acking: false,
            give_up_at: None,
        }
    }
}

impl World {
    pub(super) fn post(&mut self, lane: usize, requests: Vec<WorkRequest>) {
        self.lanes[lane].posted.extend(requests);
        self.go_on(lane);
    }

    /// Sees to it that something happens on a lane where something can.
    fn go_on(&mut self, l: usize) {
        let lane = &mut self.lanes[l];
        if !lane.posted.is_empty() && !lane.is_placing {
            lane.is_placing = true;
            // What nobody sends again may be held up anywhere.
            let is_held_up = !lane.has_sender && self.rng.chance(30);
            let held_up = if is_held_up {
                self.rng.spread(1_000_000, 1_500_000_000)
            } else {
                0
            };
            let delay = held_up + self.plan.weather.flight(&mut self.rng);
            self.schedule(delay, Happening::Place { lane: l });
        }
        let lane = &mut self.lanes[l];
        if !lane.unacked.is_empty() && !lane.is_acking {
            lane.is_acking = true;
            let delay = self.plan.weather.flight(&mut self.rng);
            self.schedule(delay, Happening::Ack { lane: l });
        }
    }

    /// The target's NIC places the next piece.
    pub(super) fn place(&mut self, l: usize) -> Result<(), Violation> {
        self.lanes[l].is_placing = false;
        let lane = &self.lanes[l];
        let (from, to) = (lane.from, lane.to);
        let Some(request) = lane.posted.front() else {
            return Ok(());
        };
        if !lane.has_sender && lane.on_the_wire == 0 {
            self.lanes[l].posted.clear();
            return Ok(());
        }
        if !lane.has_receiver || self.is_cut(from, to) {
            self.repeat(l, true);
            return Ok(());
        }
        let left = request.bytes.len() - lane.placed_len;
        let is_torn = !lane.has_sender && lane.on_the_wire == 1 || self.rng.chance(8);
        let len = if is_torn {
            self.rng.below(left + 1)
        } else {
            left
        };
        if !self.put(l, len) {
            self.note(|| format!("lane {from}->{to}: access error"));
            self.lanes[l].has_receiver = false;
            self.fail_lane(l);
            return Ok(());
        }
        let lane = &mut self.lanes[l];
        lane.give_up_at = None;
        lane.placed_len += len;
        lane.on_the_wire = lane.on_the_wire.saturating_sub(1);
        if lane
            .posted
            .front()
            .is_some_and(|request| request.bytes.len() == lane.placed_len)
        {
            let done = lane.posted.pop_front().expect("there is one");
            lane.placed_len = 0;
            lane.unacked.extend(done.epoch.filter(|_| lane.has_sender));
        }
        self.go_on(l);
        Ok(())
    }

    /// Places `len` bytes of a lane's first request; false if the key does not open that memory.
    fn put(&mut self, l: usize, len: usize) -> bool {
        let lane = &self.lanes[l];
        let machine = &mut self.machines[lane.to];
        let (Some(request), Some(process)) = (lane.posted.front(), &machine.process) else {
            return false;
        };
        let nic = &process.nic;
        // Rights and bounds are those of the whole request.
        let found = nic.resolve(request.rkey, request.addr, request.bytes.len(), true);
        let Some((backing, at)) = found else {
            return false;
        };
        let piece = &request.bytes[lane.placed_len..lane.placed_len + len];
        let at = at + lane.placed_len;
        let memory = &mut machine.memory;
        let target = match backing {
            Backing::Table => &mut memory.entry[..],
            Backing::Image(id) => match memory.images.get_mut(&id) {
                Some(image) => &mut image.bytes[..],
                None => return false,
            },
        };
        target[at..at + len].copy_from_slice(piece);
        true
    }

    /// Nobody answers: the request is repeated for a while.
    fn repeat(&mut self, l: usize, is_placing: bool) {
        let give_up_at = self.now + RETRY_NS;
        let lane = &mut self.lanes[l];
        if !lane.has_sender {
            lane.posted.clear();
        } else if *lane.give_up_at.get_or_insert(give_up_at) <= self.now {
            self.fail_lane(l);
        } else if is_placing {
            lane.is_placing = true;
            self.schedule(REPEAT_NS, Happening::Place { lane: l });
        } else {
            lane.is_acking = true;
            self.schedule(REPEAT_NS, Happening::Ack { lane: l });
        }
    }

    /// Acknowledgements arrive.
    pub(super) fn acknowledge(&mut self, l: usize) -> Result<(), Violation> {
        let lane = &mut self.lanes[l];
        lane.is_acking = false;
        if !lane.has_sender || lane.unacked.is_empty() {
            return Ok(());
        }
        let (from, to, sender, session) = (lane.from, lane.to, lane.sender, lane.session);
        if self.is_cut(from, to) {
            self.repeat(l, false);
            return Ok(());
        }
        let count = 1 + self.rng.below(self.lanes[l].unacked.len());
        let lane = &mut self.lanes[l];
        let epochs = lane.unacked.drain(..count).collect();
        lane.give_up_at = None;
        self.go_on(l);
        let event = ProcessEvent::Completed {
            to,
            session,
            epochs,
        };
        self.tell((from, sender), event)
    }

    /// The sender's queue pair enters ERR: its process learns that all requests have ended, and not how.
    pub(super) fn fail_lane(&mut self, l: usize) {
        let Lane {
            from,
            sender,
            to,
            session,
            has_sender,
            ..
        } = self.lanes[l];
        if has_sender {
            self.end_sender(l);
            let event = ProcessEvent::LaneFailed { to, session };
            self.tell_later(10_000, (from, sender), event);
        }
    }

    /// The sender's queue pair is gone; the network may hold pieces of what it posted.
    pub(super) fn end_sender(&mut self, l: usize) {
        let on_the_wire = self.rng.below(5);
        let lane = &mut self.lanes[l];
        if std::mem::replace(&mut lane.has_sender, false) {
            lane.on_the_wire = on_the_wire;
            lane.unacked.clear();
        }
    }

    /// The receiver's queue pair is destroyed: nothing lands from now on.
    pub(super) fn end_receiver(&mut self, l: usize) {
        self.lanes[l].has_receiver = false;
    }

    /// All lanes that end with a process.
    pub(super) fn end_lanes_of(&mut self, node: usize, incarnation: u64) {
        for l in 0..self.lanes.len() {
            let lane = &self.lanes[l];
            if (lane.to, lane.receiver) == (node, incarnation) {
                self.end_receiver(l);
            }
            let lane = &self.lanes[l];
            if (lane.from, lane.sender) == (node, incarnation) {
                self.end_sender(l);
            }
        }
    }
}
