//! Verbs, one operation at a time.
//!
//! A lane places its requests in order, each whole or in two pieces with anything else in between. Its end
//! cuts the piece that is under way: the sender's error, its death, the target's deregistration or the
//! queue pair's destruction there. What the network holds already may still land after the sender's end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::plan::Weather;
use super::random::Rng;
use super::verbs::{Backing, Chain, Outcome, Verbs, WorkRequest};

/// Keys are used again after so many others; addresses are not.
const KEYS_COUNT: u64 = 251;
/// Between two registrations.
const GUARD_LEN: u64 = 1 << 20;
/// How long a sender repeats a request that nobody acknowledges.
const RETRY_NS: u64 = 300_000_000;
/// Between two repetitions.
const REPEAT_NS: u64 = 40_000_000;
/// From a failure to the completions that tell it.
const FAILURE_NS: u64 = 10_000;

#[derive(Clone, Copy, Debug)]
struct Region {
    addr: u64,
    len: u64,
    backing: Backing,
    is_writable: bool,
}

/// The registrations of a node's process. Addresses and keys are not used again by the next one.
#[derive(Debug, Default)]
struct Nic {
    count: u64,
    regions: BTreeMap<u32, Region>,
}

impl Nic {
    fn resolve(&self, key: u32, addr: u64, len: usize, is_write: bool) -> Option<(Backing, usize)> {
        let region = self.regions.get(&key)?;
        let at = addr.checked_sub(region.addr)?;
        let is_inside = at + len as u64 <= region.len;
        (is_inside && (region.is_writable || !is_write))
            .then_some((region.backing, usize::try_from(at).ok()?))
    }
}

/// Two queue pairs: one node writes into another's memory.
#[derive(Debug)]
struct Lane {
    from: usize,
    to: usize,
    has_sender: bool,
    has_receiver: bool,
    posted: VecDeque<WorkRequest>,
    /// Bytes of the first request that have landed.
    placed_len: usize,
    /// Placed and signalled, acknowledgement on its way.
    unacked: VecDeque<Chain>,
    /// Pieces that may still land after the sender's end.
    on_the_wire: usize,
    is_placing: bool,
    is_acking: bool,
    give_up_at: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Place(usize),
    Ack(usize),
    Fail(usize),
}

/// The operation-level model.
#[derive(Debug)]
pub(super) struct Operations {
    rng: Rng,
    weather: Weather,
    nics: Vec<Nic>,
    lanes: Vec<Lane>,
    cuts: BTreeSet<(usize, usize)>,
    /// By time and, at the same time, in the order of scheduling.
    agenda: BTreeMap<(u64, u64), Due>,
    scheduled: u64,
}

impl Operations {
    pub(super) fn new(rng: Rng, weather: Weather, nodes: usize) -> Self {
        Self {
            rng,
            weather,
            nics: (0..nodes).map(|_| Nic::default()).collect(),
            lanes: Vec::new(),
            cuts: BTreeSet::new(),
            agenda: BTreeMap::new(),
            scheduled: 0,
        }
    }

    fn schedule(&mut self, at: u64, due: Due) {
        self.scheduled += 1;
        self.agenda.insert((at, self.scheduled), due);
    }

    fn is_cut(&self, lane: &Lane) -> bool {
        let (a, b) = (lane.from, lane.to);
        self.cuts.contains(&(a.min(b), a.max(b)))
    }

    /// Sees to it that something happens on a lane where something can.
    fn go_on(&mut self, now: u64, l: usize) {
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
            let delay = held_up + self.weather.flight(&mut self.rng);
            self.schedule(now + delay, Due::Place(l));
        }
        let lane = &mut self.lanes[l];
        if !lane.unacked.is_empty() && !lane.is_acking {
            lane.is_acking = true;
            let delay = self.weather.flight(&mut self.rng);
            self.schedule(now + delay, Due::Ack(l));
        }
    }

    /// The target's NIC places the next piece.
    fn place(&mut self, now: u64, l: usize) -> Option<Outcome> {
        let lane = &mut self.lanes[l];
        lane.is_placing = false;
        let request = lane.posted.front()?;
        if !lane.has_sender && lane.on_the_wire == 0 {
            lane.posted.clear();
            return None;
        }
        let left = request.bytes.len() - lane.placed_len;
        let lane = &self.lanes[l];
        if !lane.has_receiver || self.is_cut(lane) {
            self.repeat(now, l, true);
            return None;
        }
        let is_torn = !lane.has_sender && lane.on_the_wire == 1 || self.rng.chance(8);
        let len = if is_torn {
            self.rng.below(left + 1)
        } else {
            left
        };
        let placed = self.put(l, len);
        if placed.is_none() {
            self.lanes[l].has_receiver = false;
            self.fail(now, l);
            return None;
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
            lane.unacked.extend(done.signal.filter(|_| lane.has_sender));
        }
        self.go_on(now, l);
        placed
    }

    /// Places `len` bytes of a lane's first request; `None` if the key does not open that memory.
    fn put(&self, l: usize, len: usize) -> Option<Outcome> {
        let lane = &self.lanes[l];
        let request = lane.posted.front()?;
        // Rights and bounds are those of the whole request.
        let whole = request.bytes.len();
        let (backing, at) = self.nics[lane.to].resolve(request.rkey, request.addr, whole, true)?;
        let piece = &request.bytes[lane.placed_len..lane.placed_len + len];
        Some(Outcome::Placed {
            node: lane.to,
            backing,
            at: at + lane.placed_len,
            bytes: piece.to_vec(),
        })
    }

    /// Nobody answers: the request is repeated for a while.
    fn repeat(&mut self, now: u64, l: usize, is_placing: bool) {
        let lane = &mut self.lanes[l];
        if !lane.has_sender {
            lane.posted.clear();
        } else if *lane.give_up_at.get_or_insert(now + RETRY_NS) <= now {
            self.fail(now, l);
        } else if is_placing {
            lane.is_placing = true;
            self.schedule(now + REPEAT_NS, Due::Place(l));
        } else {
            lane.is_acking = true;
            self.schedule(now + REPEAT_NS, Due::Ack(l));
        }
    }

    /// Acknowledgements arrive.
    fn acknowledge(&mut self, now: u64, l: usize) -> Option<Outcome> {
        let lane = &mut self.lanes[l];
        lane.is_acking = false;
        if !lane.has_sender || lane.unacked.is_empty() {
            return None;
        }
        let lane = &self.lanes[l];
        if self.is_cut(lane) {
            self.repeat(now, l, false);
            return None;
        }
        let count = 1 + self.rng.below(lane.unacked.len());
        let lane = &mut self.lanes[l];
        let chains = lane.unacked.drain(..count).collect();
        lane.give_up_at = None;
        self.go_on(now, l);
        Some(Outcome::Acked { lane: l, chains })
    }

    /// The sender's queue pair enters ERR: its process learns that all requests have ended, and not how.
    fn fail(&mut self, now: u64, l: usize) {
        if self.lanes[l].has_sender {
            self.end_sender(now, l);
            self.schedule(now + FAILURE_NS, Due::Fail(l));
        }
    }
}

impl Verbs for Operations {
    fn start(&mut self, node: usize) {
        self.nics[node].regions.clear();
    }

    fn end(&mut self, now: u64, node: usize) {
        self.nics[node].regions.clear();
        for l in 0..self.lanes.len() {
            if self.lanes[l].to == node {
                self.end_receiver(l);
            }
            if self.lanes[l].from == node {
                self.end_sender(now, l);
            }
        }
    }

    fn register(
        &mut self,
        node: usize,
        backing: Backing,
        bytes: &[u8],
        is_writable: bool,
    ) -> (u64, u32) {
        let nic = &mut self.nics[node];
        let key = loop {
            nic.count += 1;
            let key = u32::try_from(nic.count % KEYS_COUNT + 1).expect("a small number");
            if !nic.regions.contains_key(&key) {
                break key;
            }
        };
        let addr = (1 << 40) + nic.count * GUARD_LEN;
        let region = Region {
            addr,
            len: bytes.len() as u64,
            backing,
            is_writable,
        };
        nic.regions.insert(key, region);
        (addr, key)
    }

    fn store(&mut self, _node: usize, _backing: Backing, _at: usize, _bytes: &[u8]) {}

    fn deregister(&mut self, node: usize, key: u32) {
        self.nics[node].regions.remove(&key);
    }

    fn rename(&mut self, node: usize, key: u32, backing: Backing) {
        if let Some(region) = self.nics[node].regions.get_mut(&key) {
            region.backing = backing;
        }
    }

    fn resolve(&self, node: usize, key: u32, addr: u64, len: usize) -> Option<(Backing, usize)> {
        self.nics[node].resolve(key, addr, len, false)
    }

    fn connect(&mut self, from: usize, to: usize) -> usize {
        self.lanes.push(Lane {
            from,
            to,
            has_sender: true,
            has_receiver: true,
            posted: VecDeque::new(),
            placed_len: 0,
            unacked: VecDeque::new(),
            on_the_wire: 0,
            is_placing: false,
            is_acking: false,
            give_up_at: None,
        });
        self.lanes.len() - 1
    }

    fn post(&mut self, now: u64, lane: usize, requests: Vec<WorkRequest>) {
        if self.lanes[lane].has_sender {
            self.lanes[lane].posted.extend(requests);
            self.go_on(now, lane);
        }
    }

    fn has_sender(&self, lane: usize) -> bool {
        self.lanes[lane].has_sender
    }

    fn end_sender(&mut self, now: u64, l: usize) {
        let on_the_wire = self.rng.below(5);
        let lane = &mut self.lanes[l];
        if std::mem::replace(&mut lane.has_sender, false) {
            lane.on_the_wire = on_the_wire;
            lane.unacked.clear();
            self.go_on(now, l);
        }
    }

    fn end_receiver(&mut self, lane: usize) {
        self.lanes[lane].has_receiver = false;
    }

    fn lose(&mut self, now: u64, lane: usize) {
        self.fail(now, lane);
    }

    fn set_cut(&mut self, a: usize, b: usize, is_cut: bool) {
        let pair = (a.min(b), a.max(b));
        if is_cut {
            self.cuts.insert(pair);
        } else {
            self.cuts.remove(&pair);
        }
    }

    fn calm(&mut self) {}

    fn next_due(&self) -> Option<u64> {
        self.agenda.keys().next().map(|(at, _)| *at)
    }

    fn advance(&mut self, now: u64) -> Vec<Outcome> {
        let Some(first) = self.agenda.first_entry().filter(|due| due.key().0 <= now) else {
            return Vec::new();
        };
        let outcome = match first.remove() {
            Due::Place(l) => self.place(now, l),
            Due::Ack(l) => self.acknowledge(now, l),
            Due::Fail(lane) => Some(Outcome::Failed { lane }),
        };
        outcome.into_iter().collect()
    }
}
