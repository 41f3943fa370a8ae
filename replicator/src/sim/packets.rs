//! Verbs, packet by packet: the software device's queue pairs on a network that loses and reorders.
//!
//! Each process has a [`Device`]. What it registers lies in the device's memory, where peers' requests are
//! executed; whatever changes there is told as placed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use soft_roce::mr_table::{AccessFlags, Key};
use soft_roce::simulation::{Device, Packet, Peer};
use soft_roce::wire::{Psn, Qpn};
use soft_roce::work::{Remote, SendOp, Wc, WcStatus};

use super::plan::Weather;
use super::random::Rng;
use super::verbs::{Backing, Chain, Outcome, Verbs, WorkRequest};

/// Memory is used in pieces of this length, for registrations and for what is to be sent.
const SLOT_LEN: usize = 4096;
const SLOTS_COUNT: usize = 1024;
/// Requests on a lane at most.
const SEND_WR_MAX: usize = 128;
/// Between two registrations.
const GUARD_LEN: u64 = 1 << 20;
/// A lane's sender gives up after 6 repetitions, each after 4.096 us * 2^13.
const TIMEOUT: u8 = 13;
const RETRY_COUNT: u8 = 6;
/// Of a hundred packets, so many are lost, and so many overtaken by others.
const LOSS_PERCENT: usize = 1;
const OVERTAKEN_PERCENT: usize = 2;

/// Memory that is registered, perhaps more than once.
#[derive(Debug)]
struct Memory {
    slot: usize,
    /// What it holds, as far as has been told.
    known: Vec<u8>,
    keys: BTreeSet<u32>,
    is_writable: bool,
}

#[derive(Debug)]
struct Registration {
    addr: u64,
    len: u64,
    backing: Backing,
}

/// A node, with the device of its process.
#[derive(Debug)]
struct Node {
    device: Option<Device>,
    free_slots: Vec<usize>,
    memories: Vec<(Backing, Memory)>,
    registrations: BTreeMap<u32, Registration>,
}

#[derive(Debug)]
struct Posted {
    wr_id: u64,
    slot: usize,
    signal: Option<Chain>,
}

#[derive(Debug)]
struct Lane {
    from: usize,
    to: usize,
    sender: Option<Qpn>,
    receiver: Option<Qpn>,
    posted: VecDeque<Posted>,
    has_failed: bool,
}

/// The packet-level model.
#[derive(Debug)]
pub(super) struct Packets {
    rng: Rng,
    weather: Weather,
    is_calm: bool,
    nodes: Vec<Node>,
    lanes: Vec<Lane>,
    cuts: BTreeSet<(usize, usize)>,
    /// Queue pairs that nothing reaches any more.
    unreached: BTreeSet<(usize, Qpn)>,
    /// Packets on their way, by the time they arrive and the order in which they were sent.
    flights: BTreeMap<(u64, u64), Packet>,
    launched: u64,
    /// When the last packet from one node to another one arrives.
    last_arrivals: BTreeMap<(usize, usize), u64>,
    registered: u64,
    posted: u64,
    /// What has happened and not been told.
    outcomes: Vec<Outcome>,
}

impl Packets {
    pub(super) fn new(rng: Rng, weather: Weather, nodes: usize) -> Self {
        let node = || Node {
            device: None,
            free_slots: Vec::new(),
            memories: Vec::new(),
            registrations: BTreeMap::new(),
        };
        Self {
            rng,
            weather,
            is_calm: false,
            nodes: (0..nodes).map(|_| node()).collect(),
            lanes: Vec::new(),
            cuts: BTreeSet::new(),
            unreached: BTreeSet::new(),
            flights: BTreeMap::new(),
            launched: 0,
            last_arrivals: BTreeMap::new(),
            registered: 0,
            posted: 0,
            outcomes: Vec::new(),
        }
    }

    /// Lets a device do what it can, and takes what comes of it.
    fn drive(&mut self, now: u64, node: usize) {
        let Some(device) = &mut self.nodes[node].device else {
            return;
        };
        device.drive(now);
        let (sent, completions) = (device.take_sent(), device.completions());
        for packet in sent {
            self.launch(now, node, packet);
        }
        for wc in completions {
            self.complete(node, &wc);
        }
    }

    /// The network takes a packet in, or loses it.
    fn launch(&mut self, now: u64, from: usize, packet: Packet) {
        let to = node_at(packet.dst());
        if !self.is_calm && self.rng.chance(LOSS_PERCENT) {
            return;
        }
        let at = now + self.weather.flight(&mut self.rng);
        let last = self.last_arrivals.entry((from, to)).or_default();
        let is_overtaken = !self.is_calm && self.rng.chance(OVERTAKEN_PERCENT);
        let at = if is_overtaken { at } else { at.max(*last) };
        *last = at.max(*last);
        self.launched += 1;
        self.flights.insert((at, self.launched), packet);
    }

    /// A packet arrives, unless its way is cut.
    fn arrive(&mut self, now: u64, packet: Packet) {
        let (from, to) = (node_at(packet.src()), node_at(packet.dst()));
        let is_cut = self.cuts.contains(&(from.min(to), from.max(to)));
        if is_cut || self.unreached.contains(&(to, packet.dst_qpn())) {
            return;
        }
        if let Some(device) = &mut self.nodes[to].device {
            device.deliver(packet);
            self.drive(now, to);
            self.note_changes(to);
        }
    }

    /// Tells what peers have written.
    fn note_changes(&mut self, node: usize) {
        let Node {
            device: Some(device),
            memories,
            ..
        } = &mut self.nodes[node]
        else {
            return;
        };
        for (backing, memory) in memories.iter_mut().filter(|(_, m)| m.is_writable) {
            let bytes = device.read(range_of(memory.slot, memory.known.len()));
            let differs = |(now, before): (&u8, &u8)| now != before;
            let mut pairs = bytes.iter().zip(&memory.known);
            let Some(first) = pairs.clone().position(differs) else {
                continue;
            };
            let last = pairs.rposition(differs).expect("there is one");
            memory.known[first..=last].copy_from_slice(&bytes[first..=last]);
            self.outcomes.push(Outcome::Placed {
                node,
                backing: *backing,
                at: first,
                bytes: bytes[first..=last].to_vec(),
            });
        }
    }

    /// A completion of a lane's sender.
    fn complete(&mut self, node: usize, wc: &Wc) {
        let is_its = |lane: &Lane| lane.from == node && lane.sender == Some(wc.qpn);
        let Some(l) = self.lanes.iter().position(is_its) else {
            return;
        };
        let lane = &mut self.lanes[l];
        if wc.status != WcStatus::Success {
            if !std::mem::replace(&mut lane.has_failed, true) {
                self.outcomes.push(Outcome::Failed { lane: l });
            }
            return;
        }
        let mut chains = Vec::new();
        while let Some(posted) = lane.posted.pop_front() {
            self.nodes[node].free_slots.push(posted.slot);
            chains.extend(posted.signal);
            if posted.wr_id == wc.wr_id {
                break;
            }
        }
        self.outcomes.push(Outcome::Acked { lane: l, chains });
    }

    /// The memory behind a backing, if it is registered.
    fn memory(&mut self, node: usize, backing: Backing) -> Option<&mut Memory> {
        let mut memories = self.nodes[node].memories.iter_mut();
        memories.find(|(its, _)| *its == backing).map(|(_, m)| m)
    }
}

impl Verbs for Packets {
    fn start(&mut self, node: usize) {
        let seed = self.rng.next();
        let device = Device::new(address_of(node), seed, SLOT_LEN * SLOTS_COUNT);
        self.nodes[node] = Node {
            device: Some(device),
            free_slots: (0..SLOTS_COUNT).collect(),
            memories: Vec::new(),
            registrations: BTreeMap::new(),
        };
    }

    fn end(&mut self, _now: u64, node: usize) {
        self.nodes[node].device = None;
        self.nodes[node].memories.clear();
        self.nodes[node].registrations.clear();
        for lane in &mut self.lanes {
            if lane.from == node {
                lane.sender = None;
            }
            if lane.to == node {
                lane.receiver = None;
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
        assert!(bytes.len() <= SLOT_LEN, "it fits a slot");
        self.registered += 1;
        let addr = (1 << 40) + self.registered * GUARD_LEN;
        if self.memory(node, backing).is_none() {
            let node = &mut self.nodes[node];
            let slot = node.free_slots.pop().expect("there are many slots");
            let memory = Memory {
                slot,
                known: bytes.to_vec(),
                keys: BTreeSet::new(),
                is_writable: false,
            };
            node.memories.push((backing, memory));
        }
        self.store(node, backing, 0, bytes);
        let memory = self.memory(node, backing).expect("it is there");
        memory.is_writable |= is_writable;
        let (slot, len) = (memory.slot, bytes.len());
        let access = if is_writable {
            AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE
        } else {
            AccessFlags::REMOTE_READ
        };
        let device = self.nodes[node]
            .device
            .as_mut()
            .expect("a process registers");
        let Key(key) = device.register(range_of(slot, len), addr, access);
        self.memory(node, backing)
            .expect("as above")
            .keys
            .insert(key);
        let registration = Registration {
            addr,
            len: len as u64,
            backing,
        };
        self.nodes[node].registrations.insert(key, registration);
        (addr, key)
    }

    fn store(&mut self, node: usize, backing: Backing, at: usize, bytes: &[u8]) {
        let Some(memory) = self.memory(node, backing) else {
            return;
        };
        memory.known[at..at + bytes.len()].copy_from_slice(bytes);
        let start = range_of(memory.slot, 0).start + at;
        if let Some(device) = &mut self.nodes[node].device {
            device.write(start, bytes);
        }
    }

    fn deregister(&mut self, node: usize, key: u32) {
        let node = &mut self.nodes[node];
        let Some(registration) = node.registrations.remove(&key) else {
            return;
        };
        if let Some(device) = &mut node.device {
            device.deregister(Key(key));
        }
        let is_its = |(backing, _): &(Backing, Memory)| *backing == registration.backing;
        if let Some(i) = node.memories.iter().position(is_its) {
            let memory = &mut node.memories[i].1;
            memory.keys.remove(&key);
            if memory.keys.is_empty() {
                let (_, memory) = node.memories.swap_remove(i);
                node.free_slots.push(memory.slot);
            }
        }
    }

    fn rename(&mut self, node: usize, key: u32, backing: Backing) {
        let node = &mut self.nodes[node];
        if let Some(registration) = node.registrations.get_mut(&key) {
            let before = std::mem::replace(&mut registration.backing, backing);
            let mut memories = node.memories.iter_mut();
            if let Some(memory) = memories.find(|(its, _)| *its == before) {
                memory.0 = backing;
            }
        }
    }

    fn resolve(&self, node: usize, key: u32, addr: u64, len: usize) -> Option<(Backing, usize)> {
        let registration = self.nodes[node].registrations.get(&key)?;
        let at = addr.checked_sub(registration.addr)?;
        let is_inside = at + len as u64 <= registration.len;
        is_inside.then_some((registration.backing, usize::try_from(at).ok()?))
    }

    fn connect(&mut self, from: usize, to: usize) -> usize {
        let mut ends = [None; 2];
        for (end, node) in ends.iter_mut().zip([from, to]) {
            let device = self.nodes[node].device.as_mut();
            *end = device.map(|device| device.create_qp(SEND_WR_MAX));
        }
        let mut psn = || Psn::new(u32::try_from(self.rng.below(1 << 24)).expect("24 bits"));
        let psns = [psn(), psn()];
        if let [Some(sender), Some(receiver)] = ends {
            let both = [(from, sender, to, receiver), (to, receiver, from, sender)];
            for (i, (node, own, peer, qpn)) in both.into_iter().enumerate() {
                let peer = Peer {
                    address: address_of(peer),
                    qpn,
                    psns: [psns[i], psns[1 - i]],
                };
                let device = self.nodes[node]
                    .device
                    .as_mut()
                    .expect("it has the queue pair");
                device.connect(own, peer, TIMEOUT, RETRY_COUNT);
            }
        }
        self.lanes.push(Lane {
            from,
            to,
            sender: ends[0],
            receiver: ends[1],
            posted: VecDeque::new(),
            has_failed: false,
        });
        self.lanes.len() - 1
    }

    fn post(&mut self, now: u64, l: usize, requests: Vec<WorkRequest>) {
        let lane = &mut self.lanes[l];
        let node = &mut self.nodes[lane.from];
        let (Some(qpn), Some(device)) = (lane.sender, node.device.as_mut()) else {
            return;
        };
        for request in requests {
            self.posted += 1;
            let wr_id = self.posted;
            let slot = node.free_slots.pop().expect("there are many slots");
            let local = range_of(slot, request.bytes.len());
            device.write(local.start, &request.bytes);
            let remote = Remote {
                addr: request.addr,
                rkey: Key(request.rkey),
            };
            let op = SendOp::Write { remote, imm: None };
            lane.posted.push_back(Posted {
                wr_id,
                slot,
                signal: request.signal,
            });
            let is_taken = device.post(qpn, wr_id, op, local, request.signal.is_some());
            assert!(is_taken, "a leader posts no more than a lane takes");
        }
        let from = lane.from;
        self.drive(now, from);
    }

    fn has_sender(&self, lane: usize) -> bool {
        let lane = &self.lanes[lane];
        lane.sender.is_some() && !lane.has_failed
    }

    fn end_sender(&mut self, _now: u64, l: usize) {
        let lane = &mut self.lanes[l];
        let Some(qpn) = lane.sender.take() else {
            return;
        };
        let node = &mut self.nodes[lane.from];
        if let Some(device) = &mut node.device {
            device.destroy_qp(qpn);
        }
        node.free_slots
            .extend(lane.posted.drain(..).map(|posted| posted.slot));
    }

    fn end_receiver(&mut self, l: usize) {
        let lane = &mut self.lanes[l];
        if let Some(qpn) = lane.receiver.take()
            && let Some(device) = &mut self.nodes[lane.to].device
        {
            device.destroy_qp(qpn);
        }
    }

    fn lose(&mut self, _now: u64, l: usize) {
        let lane = &self.lanes[l];
        let ends = [(lane.from, lane.sender), (lane.to, lane.receiver)];
        for (node, qpn) in ends {
            self.unreached.extend(qpn.map(|qpn| (node, qpn)));
        }
    }

    fn set_cut(&mut self, a: usize, b: usize, is_cut: bool) {
        let pair = (a.min(b), a.max(b));
        if is_cut {
            self.cuts.insert(pair);
        } else {
            self.cuts.remove(&pair);
        }
    }

    fn calm(&mut self) {
        self.is_calm = true;
        self.unreached.clear();
    }

    fn next_due(&self) -> Option<u64> {
        if !self.outcomes.is_empty() {
            return Some(0);
        }
        let devices = self.nodes.iter().filter_map(|node| node.device.as_ref());
        let deadlines = devices.filter_map(Device::next_deadline).min();
        let arrival = self.flights.keys().next().map(|(at, _)| *at);
        deadlines.into_iter().chain(arrival).min()
    }

    fn advance(&mut self, now: u64) -> Vec<Outcome> {
        if let Some(first) = self.flights.first_entry().filter(|f| f.key().0 <= now) {
            let packet = first.remove();
            self.arrive(now, packet);
        }
        for node in 0..self.nodes.len() {
            let device = self.nodes[node].device.as_ref();
            let due = device.and_then(Device::next_deadline);
            if due.is_some_and(|due| due <= now) {
                self.drive(now, node);
            }
        }
        // What has landed was there before anybody heard of it.
        self.outcomes
            .sort_by_key(|outcome| !matches!(outcome, Outcome::Placed { .. }));
        std::mem::take(&mut self.outcomes)
    }
}

fn address_of(node: usize) -> IpAddr {
    let last = u8::try_from(node + 1).expect("few nodes");
    IpAddr::from([10, 0, 0, last])
}

fn node_at(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(v4) => usize::from(v4.octets()[3]) - 1,
        IpAddr::V6(_) => unreachable!("nodes have IPv4 addresses"),
    }
}

fn range_of(slot: usize, len: usize) -> std::ops::Range<usize> {
    slot * SLOT_LEN..slot * SLOT_LEN + len
}
