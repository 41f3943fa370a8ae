//! Simulation: a few whole devices in one thread, a virtual clock, and a network at its worst.
//!
//! A seed decides everything: two to five devices, the connections between them (several per device,
//! some of a device with itself), every request, and what befalls every packet. An oracle knows what
//! memory must hold after each completion:
//!
//! ```text
//!   Direction    requests of one queue pair, and the only one to change its target at the other end
//!   Pending      a request: what it brings back, what it leaves in the target, how it must end
//!   History      operations on a word on which all queue pairs contend; see `words`
//!   Access       whether the memory window to a target is open; see `windows`
//!   Receives     receive requests of one queue pair, and Pool, those that several share
//!   Letter       a datagram; see `letters`
//!   Node::model  every byte of a device's memory, as completed requests left it
//! ```
//!
//! What is checked, besides that nothing panics:
//!
//! - Each request completes once, in order, with the status and fields it must have; flushed ones too.
//! - READs, receives and atomics bring the right bytes; what a completed WRITE, or one that a receive
//!   announces, has written lies in its place at that moment.
//! - Atomics were executed exactly once, in an order that time allows.
//! - Requests beyond a region, with a wrong key or with a revoked one are refused, and end the
//!   connection; a target does not change once its key is revoked.
//! - A window's target does not change from when it was closed until it is opened again.
//! - No byte is changed that nobody was granted.
//! - Shared receives are taken in order, each by one queue pair, and the event of their limit comes once.
//! - Datagrams may be lost, but arrive once, whole, with a right key only, behind their packet's header.
//! - A drained queue pair tells so once, and begins nothing; one that was reset and connected anew has no
//!   memory of what was, and packets of its former life have no effect.
//! - Completion queues that overrun tell so once, and end all queue pairs that report to them.
//! - Connections fail for a reason only: a request refused, a key revoked, a device that died, a queue
//!   pair moved to ERR, an overrun, no receive within all tries, a storm of losses.
//! - Every run comes to rest.
//!
//! [`faults`](crate::faults) shows that the checks bite. `scripts/simulate` runs any number of seeds.

/// Fails with the text unless the claim holds.
macro_rules! demand {
    ($claim:expr, $($text:tt)+) => {
        if !$claim {
            return Err(Violation(format!($($text)+)));
        }
    };
}

mod build;
mod check;
mod letters;
mod lives;
mod net;
mod overrun;
mod random;
mod receives;
mod windows;
mod words;
mod work;

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;

use crate::device::CompletionQueue;
use crate::mr_table::Key;
use crate::qp::{Attr, AttrMask, QpState};
use crate::rc::AckTime;
use crate::virtual_device::VirtualDevice;
use crate::wire::{Psn, Qpn};
use letters::{Letter, Mailbox};
use net::{Net, Strikes, Weather};
use random::Rng;
use receives::Pool;
use words::History;
use work::{Direction, SLOTS};

/// From the turn that held an ACK to the next one.
const HOLD_NS: u64 = 20_000;
/// Turns after which a run counts as endless.
const TURNS_MAX: u64 = 300_000;

/// A claim that did not hold.
#[derive(Debug)]
struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
struct Stats {
    requests: u64,
    completions: u64,
    letters: u64,
    letters_received: u64,
    turns: u64,
    failed_connections: u64,
    strikes: Strikes,
}

impl Stats {
    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.completions += other.completions;
        self.letters += other.letters;
        self.letters_received += other.letters_received;
        self.turns += other.turns;
        self.failed_connections += other.failed_connections;
        self.strikes.add(&other.strikes);
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            requests,
            completions,
            letters,
            letters_received,
            failed_connections,
            strikes,
            ..
        } = self;
        write!(
            f,
            "{requests} requests, {completions} completions, {failed_connections} connections \
             ended; {letters_received} of {letters} datagrams received; {strikes}"
        )
    }
}

/// What a seed has in store.
#[derive(Clone, Copy, Debug)]
struct Plan {
    weather: Weather,
    /// So many packets are lost that retries may run out.
    is_storm: bool,
    /// Requests of ten thousand that must be refused.
    misdeeds: usize,
    /// Acts of a thousand that revoke a key, fail a queue pair or end a device.
    disasters: usize,
    /// Acts of a thousand that drain, resume or reset a queue pair.
    unrest: usize,
    /// A node has a completion queue that overruns.
    has_small_cq: bool,
    /// Bytes of the longest message.
    len_max: usize,
    /// Nodes exchange datagrams too.
    has_mailboxes: bool,
    /// Posts and polls of the applications.
    acts: usize,
}

/// A device and what the oracle knows of it.
struct Node {
    device: VirtualDevice,
    cqs: Vec<Arc<CompletionQueue>>,
    /// The key of all memory, for local use.
    local_key: Key,
    words: Range<usize>,
    words_key: Key,
    histories: Vec<History>,
    /// Receives that queue pairs share, and the queue pair for datagrams.
    pool: Option<Pool>,
    mailbox: Option<Mailbox>,
    /// What the memory must hold, as far as completions tell.
    model: Vec<u8>,
    is_alive: bool,
    /// When an ACK that was held is due.
    owed_turn: Option<u64>,
    /// Its first completion queue is small.
    has_small_cq: bool,
    /// Events of overrun completion queues.
    cq_errors: usize,
}

/// Two queue pairs; their directions are `2 * i` and `2 * i + 1`.
#[derive(Clone, Copy, Debug, Default)]
struct Connection {
    /// Something has happened that may end it.
    can_fail: bool,
    /// The direction whose queue pair is in RESET, to be connected anew.
    reset: Option<usize>,
    /// A completion queue of one of its ends has overrun: nobody learns what becomes of its requests.
    is_unheard: bool,
    /// The numbers of the first packets, if it was connected before.
    psns: Option<[Psn; 2]>,
    /// How often its ends try again where no receive is posted; 7 is without end.
    rnr_retry: u8,
    /// How long they wait each time.
    rnr_timer: u8,
}

struct World {
    now: u64,
    ticks: u64,
    rng: Rng,
    plan: Plan,
    net: Net,
    nodes: Vec<Node>,
    connections: Vec<Connection>,
    directions: Vec<Direction>,
    letters: Vec<Letter>,
    /// Which direction's requests a queue pair of a node sends.
    routes: HashMap<(usize, Qpn), usize>,
    addresses: HashMap<IpAddr, usize>,
    resets: usize,
    /// Applications look at their completions after every turn.
    is_watchful: bool,
    stats: Stats,
}

impl Node {
    /// Writes bytes that the application owns.
    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.device.write(at, bytes);
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Takes what lies there for right: nobody can know it.
    fn adopt(&mut self, range: Range<usize>) {
        let held = self.device.read(range.clone());
        self.model[range].copy_from_slice(&held);
    }
}

impl World {
    /// Runs the applications, then lets everything come to rest, and judges.
    fn run(&mut self) -> Result<(), Violation> {
        for _ in 0..self.plan.acts {
            let pause = self.rng.next() % 30_000;
            self.pass_until(self.now + pause)?;
            self.act()?;
        }
        self.is_watchful = true;
        self.settle()?;
        loop {
            let done = self.stats.completions;
            for d in 0..self.directions.len() {
                if self.is_receiving(d) {
                    self.post_receives(d, SLOTS);
                }
            }
            self.pass_until(u64::MAX)?;
            for n in 0..self.nodes.len() {
                self.poll(n)?;
            }
            if self.stats.completions == done {
                break;
            }
        }
        self.send_last_letters()?;
        self.check_end()
    }

    /// Whether receives of direction `d` wait for messages, and are not flushed at once.
    fn is_receiving(&mut self, d: usize) -> bool {
        let (to, qpn) = (self.directions[d].to, self.directions[d ^ 1].qpn);
        self.nodes[to].device.state(qpn) == QpState::Rts
    }

    /// One act of the applications.
    fn act(&mut self) -> Result<(), Violation> {
        let d = self.rng.below(self.directions.len());
        let receives = self.rng.below(4);
        self.post_receives(d, receives);
        for _ in 0..self.rng.below(5) {
            self.post_random(d);
        }
        let is_paused =
            self.directions[d].held_from.is_some() || self.connections[d / 2].reset.is_some();
        if self.rng.below(1000) < self.plan.unrest || is_paused && self.rng.chance(20) {
            self.disturb(d)?;
        }
        if self.rng.below(1000) < self.plan.disasters {
            self.strike(d)?;
        }
        let n = self.rng.below(self.nodes.len());
        self.post_mailbox(n, receives);
        for _ in 0..self.rng.below(3) {
            self.post_letter(n);
        }
        self.poll(n)
    }

    /// A disaster befalls direction `d`, or the device at its other end.
    fn strike(&mut self, d: usize) -> Result<(), Violation> {
        let Direction { from, to, qpn, .. } = self.directions[d];
        let is_reset = self.connections[d / 2].reset.is_some();
        if !self.nodes[from].is_alive || !self.nodes[to].is_alive || is_reset {
            return Ok(());
        }
        match self.rng.below(4) {
            0 | 1 if self.directions[d].is_window => {
                if self.revoke_window(d) {
                    self.connections[d / 2].can_fail = true;
                }
            }
            0 | 1 if self.directions[d].revoked.is_none() => {
                self.connections[d / 2].can_fail = true;
                self.keep_revoked(d)?;
                let key = self.directions[d].key;
                let regions = &mut self.nodes[to].device.engine.regions;
                regions.deregister(key).expect("it is registered");
            }
            2 => {
                self.connections[d / 2].can_fail = true;
                let attr = Attr {
                    state: QpState::Err,
                    ..Attr::default()
                };
                let engine = &mut self.nodes[from].device.engine;
                let moved = engine.modify_qp(qpn, &attr, AttrMask::STATE);
                moved.expect("ERR is open from every state");
                self.serve(from);
            }
            _ => {
                self.nodes[to].is_alive = false;
                for d in 0..self.directions.len() {
                    if self.directions[d].to == to {
                        self.connections[d / 2].can_fail = true;
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets time pass until nothing can happen before `deadline`.
    fn pass_until(&mut self, deadline: u64) -> Result<(), Violation> {
        while let Some(next) = self.next_event().filter(|next| *next <= deadline) {
            self.now = self.now.max(next);
            while let Some(frame) = self.net.pop_arrived(self.now) {
                let n = self.addresses[&frame.dst];
                self.nodes[n].device.port.deliver(frame);
            }
            for n in 0..self.nodes.len() {
                self.turn(n)?;
            }
        }
        if deadline != u64::MAX {
            self.now = deadline;
        }
        Ok(())
    }

    fn next_event(&self) -> Option<u64> {
        let living = self.nodes.iter().filter(|node| node.is_alive);
        let timers = living
            .clone()
            .filter_map(|node| node.device.engine.next_deadline());
        let owed = living.filter_map(|node| node.owed_turn);
        timers.chain(owed).chain(self.net.next_arrival()).min()
    }

    /// Drives a device for which something waits.
    fn turn(&mut self, n: usize) -> Result<(), Violation> {
        let node = &mut self.nodes[n];
        if !node.is_alive {
            node.device.port.drop_incoming();
            return Ok(());
        }
        let due = [node.owed_turn, node.device.engine.next_deadline()];
        let is_due = due.into_iter().flatten().any(|due| due <= self.now);
        if !is_due && !node.device.port.has_incoming() {
            return Ok(());
        }
        let ack_time = if node.owed_turn.is_none() && self.rng.chance(50) {
            node.owed_turn = Some(self.now + HOLD_NS);
            AckTime::WithNextTurn
        } else {
            node.owed_turn = None;
            AckTime::Now
        };
        loop {
            let node = &mut self.nodes[n];
            let turn = node.device.engine.drive(self.now, ack_time);
            self.hand_over(n);
            self.stats.turns += 1;
            if self.stats.turns > TURNS_MAX {
                return Err(Violation("the run does not come to rest".into()));
            }
            if turn.received == 0 && !turn.has_more {
                break;
            }
        }
        if self.is_watchful {
            self.poll(n)?;
            self.post_shared(n, SLOTS);
        } else if self.rng.chance(30) {
            self.poll(n)?;
        }
        Ok(())
    }

    /// Sends what was posted.
    fn serve(&mut self, n: usize) {
        while self.nodes[n].device.engine.serve(self.now, AckTime::Now) {
            self.hand_over(n);
        }
        self.hand_over(n);
    }

    /// Gives the network what a device has sent.
    fn hand_over(&mut self, n: usize) {
        for frame in self.nodes[n].device.port.take_sent() {
            self.net.send(self.now, frame);
        }
    }

    /// The next moment: no two things that applications see or do have the same.
    fn tick(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Runs one seed.
fn run(seed: u64) -> Result<Stats, Violation> {
    let mut world = World::new(seed);
    world.run()?;
    let failed = world
        .directions
        .chunks(2)
        .filter(|pair| pair.iter().any(|direction| direction.first_error.is_some()));
    Ok(Stats {
        requests: world
            .directions
            .iter()
            .map(|direction| direction.posted)
            .sum(),
        failed_connections: failed.count() as u64,
        letters: world.letters.len() as u64,
        strikes: world.net.strikes,
        ..world.stats
    })
}

#[cfg(test)]
mod tests;
