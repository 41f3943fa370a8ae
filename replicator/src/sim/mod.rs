//! Simulation: a cluster in one thread, on a virtual clock, where everything goes wrong that can.
//!
//! A seed decides all: two to four nodes with the real engines, one to three partitions on each, a
//! coordinator, producers, consumers, how long things take, and which disasters befall whom.
//!
//! ```text
//!   Machine     a clock that is wrong, and per partition files (synced or not) and shared memory
//!   Process     a replica per partition, registrations, two workers; ends at any moment, or stands still
//!   Verbs       lanes that all partitions of two nodes share: WRITEs placed, acknowledged late or never
//!   Connection  control messages in order, late or never
//!   Registry    the coordinator: compare-and-swap, leases, late watches, answers that are lost
//!   Oracle      what the outside knows: batches sent, acknowledged, delivered, removed by retention
//! ```
//!
//! Most seeds run on a [model](operations) of verbs that knows requests, one in fifty on the
//! [packets](packets) of software devices; the [same programs](conformance) run on both.
//!
//! Processes crash, machines lose power, one or all, nodes and coordinator are cut off from each other,
//! lanes fail, disks are slow, full or broken, there is no memory for images, or it is taken away, leaders
//! hand over and stop, retention removes segments, consumers begin anew. What is checked, by bytes and
//! offsets and besides that nothing panics:
//!
//! - What is acknowledged as replicated, or delivered to a consumer, is in the memory or the files of
//!   every member of the ISR at that moment; what is acknowledged as durable, on its device.
//! - None of that ever becomes another batch, or none, unless retention removes it; if all memory is lost at
//!   once, nothing durable.
//! - Retention removes only what every member of the ISR has had; nobody says that records are lost unless all
//!   memory was.
//! - One node at most leads, and acknowledges, in an epoch. It hands over to one that has all that it had.
//! - Consumers get what producers sent, with dense offsets, in order and once, and their high watermark never
//!   falls. They are told that the log starts later if it does, and only then.
//! - A member of the ISR that starts again still has all that is committed.
//! - Once nothing goes wrong any more, the run comes to rest: each partition has one leader, everybody is in
//!   sync, the files of all replicas are equal byte for byte, and consumers have got everything.
//!
//! [`faults`](crate::faults) shows that the checks bite. `scripts/simulate cluster` runs any number of seeds.
//!
//! Not simulated: what the runtime does between engines and verbs (`runtime/`), in which a consumer that starts
//! by a timestamp looks it up, and reads several partitions at once.

mod appends;
mod check;
mod clients;
mod commands;
mod control;
mod disaster;
mod events;
mod jobs;
mod operations;
mod packets;
mod plan;
mod process;
mod random;
mod readers;
mod registry;
mod sessions;
mod storage;
mod verbs;

use std::collections::BTreeSet;
use std::fmt;

use crate::coordinator::MemoryId;

use check::{Oracle, demand};
use clients::{Consumer, Producer};
use control::Connection;
use events::{Agenda, Happening};
use plan::Plan;
use process::Process;
use random::Rng;
use registry::Registry;
use sessions::Lane;
use storage::Store;
use verbs::Verbs;

/// How long a run may take to come to rest, in steps of this length.
const REST_STEP_NS: u64 = 500_000_000;
const REST_STEPS_MAX: u64 = 240;
/// One seed in so many runs on the packets of the software device, which takes long.
const SEEDS_PER_PACKETS: u64 = 50;
/// Things that happen in a run at most.
const HAPPENINGS_MAX: u64 = 1_000_000;

/// A claim that did not hold.
#[derive(Debug)]
struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What runs did.
#[derive(Clone, Copy, Debug, Default)]
struct Stats {
    happenings: u64,
    answered: u64,
    refused: u64,
    committed: u64,
    delivered: u64,
    crashes: u64,
    power_losses: u64,
    blackouts: u64,
    elections: u64,
    isr_changes: u64,
    pauses: u64,
    cuts: u64,
    lost_lanes: u64,
    hand_overs: u64,
    retentions: u64,
    evictions: u64,
    /// Consumers that were told that what they want is gone.
    told: u64,
    cold_reads: u64,
    disasters: u64,
}

impl Stats {
    fn add(&mut self, other: &Self) {
        self.happenings += other.happenings;
        self.answered += other.answered;
        self.refused += other.refused;
        self.committed += other.committed;
        self.delivered += other.delivered;
        self.crashes += other.crashes;
        self.power_losses += other.power_losses;
        self.blackouts += other.blackouts;
        self.elections += other.elections;
        self.isr_changes += other.isr_changes;
        self.pauses += other.pauses;
        self.cuts += other.cuts;
        self.lost_lanes += other.lost_lanes;
        self.hand_overs += other.hand_overs;
        self.retentions += other.retentions;
        self.evictions += other.evictions;
        self.told += other.told;
        self.cold_reads += other.cold_reads;
        self.disasters += other.disasters;
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            happenings,
            answered,
            refused,
            committed,
            delivered,
            crashes,
            power_losses,
            blackouts,
            elections,
            isr_changes,
            pauses,
            cuts,
            lost_lanes,
            hand_overs,
            retentions,
            evictions,
            told,
            cold_reads,
            disasters,
        } = self;
        write!(
            f,
            "{happenings} happenings, {answered} appends answered and {refused} refused, {committed} committed, {delivered} batches \
             delivered, {cold_reads} images loaded for consumers, who were told {told} times that the log starts \
             later; {elections} elections, {hand_overs} hand-overs, {isr_changes} changes of the ISR, {retentions} \
             times segments removed, {evictions} evictions; {disasters} disasters, of which {crashes} crashes, \
             {power_losses} power losses, {blackouts} of all nodes, {pauses} pauses, {cuts} cuts, {lost_lanes} lanes lost"
        )
    }
}

/// A clock that is off by some, and runs too fast or too slow.
#[derive(Clone, Copy, Debug)]
struct Clock {
    skew_ns: u64,
    /// Nanoseconds that it counts in a million.
    rate: u64,
}

impl Clock {
    fn new(rng: &mut Rng) -> Self {
        Self {
            skew_ns: rng.next() % 10_000_000_000,
            rate: rng.between(990_000, 1_010_000),
        }
    }

    fn local(self, now: u64) -> u64 {
        self.skew_ns + now / 1_000_000 * self.rate + now % 1_000_000 * self.rate / 1_000_000
    }

    /// The first moment at which the clock shows `local` or more.
    fn global(self, local: u64) -> u64 {
        let elapsed = local.saturating_sub(self.skew_ns);
        let mut now = elapsed / self.rate * 1_000_000 + elapsed % self.rate * 1_000_000 / self.rate;
        while self.local(now) < local {
            now += 1;
        }
        now
    }
}

/// A machine, with or without a process.
#[derive(Debug)]
struct Machine {
    clock: Clock,
    memory_id: MemoryId,
    /// By partition.
    stores: Vec<Store>,
    process: Option<Process>,
    is_disk_slow: bool,
    is_short_of_memory: bool,
}

/// A partition on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Site {
    node: usize,
    partition: usize,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}, partition {}", self.node, self.partition)
    }
}

struct World {
    now: u64,
    rng: Rng,
    plan: Plan,
    agenda: Agenda,
    machines: Vec<Machine>,
    verbs: Box<dyn Verbs>,
    lanes: Vec<Lane>,
    connections: Vec<Connection>,
    /// Pairs of nodes that do not reach each other, lower number first.
    cuts: BTreeSet<(usize, usize)>,
    /// Numbers given to processes and sessions.
    sessions: u64,
    producers: Vec<Producer>,
    consumers: Vec<Consumer>,
    registry: Registry,
    /// Nothing goes wrong any more, and nothing is sent.
    is_calm: bool,
    /// By partition.
    oracles: Vec<Oracle>,
    stats: Stats,
    is_traced: bool,
}

impl World {
    /// Lets everything go wrong for a while, then everything come to rest, and judges.
    fn run(&mut self) -> Result<(), Violation> {
        self.pass_until(self.plan.length_ns)?;
        while self.stats.disasters < self.plan.disasters_min {
            self.pass_until(self.now + self.plan.disaster_ns)?;
        }
        self.calm_down()?;
        for _ in 0..REST_STEPS_MAX {
            self.pass_until(self.now + REST_STEP_NS)?;
            if self.is_at_rest() {
                return self.check_end();
            }
        }
        let unrest = self.unrest().unwrap_or_default();
        Err(Violation(format!(
            "the run does not come to rest: {unrest}"
        )))
    }

    /// Lets time pass.
    fn pass_until(&mut self, deadline: u64) -> Result<(), Violation> {
        loop {
            let dues = [self.agenda.next_due(), self.verbs.next_due()];
            let next = dues.into_iter().flatten().min();
            let Some(next) = next.filter(|next| *next <= deadline) else {
                break;
            };
            self.now = self.now.max(next);
            self.stats.happenings += 1;
            demand!(
                self.stats.happenings
                    < HAPPENINGS_MAX + self.plan.disasters_min * HAPPENINGS_MAX / 20,
                "the run does not end"
            );
            for outcome in self.verbs.advance(self.now) {
                self.land(outcome)?;
            }
            if let Some(happening) = self.agenda.pop_due(self.now) {
                self.happen(happening)?;
            }
        }
        self.now = deadline;
        Ok(())
    }

    fn happen(&mut self, happening: Happening) -> Result<(), Violation> {
        match happening {
            Happening::Process {
                node,
                incarnation,
                event,
            } => self.tell((node, incarnation), event)?,
            Happening::Frame {
                connection,
                side,
                message,
            } => self.deliver(connection, side, message)?,
            Happening::TimedOut { connection, side } => self.time_out(connection, side)?,
            Happening::Answer {
                producer,
                number,
                result,
            } => self.answered(producer, number, result),
            Happening::Producer { producer } => self.produce(producer),
            Happening::Consumer { consumer } => self.consume(consumer)?,
            Happening::KeepAlive {
                node,
                incarnation,
                sent_at,
            } => self.keep_alive(node, incarnation, sent_at),
            Happening::Expire { node } => self.expire(node),
            Happening::Propose {
                node,
                incarnation,
                partition,
                ticket,
                expected_revision,
                state,
            } => {
                let site = Site { node, partition };
                self.decide(site, incarnation, (ticket, expected_revision), state)?;
            }
            Happening::Watched {
                node,
                incarnation,
                event,
            } => self.watched(node, incarnation, event)?,
            Happening::Disaster => self.strike(),
            Happening::Start { node } => self.start(node)?,
            Happening::Resume { node } => self.resume(node)?,
            Happening::Heal { a, b } => self.heal(a, b),
            Happening::QuickDisk { node } => self.machines[node].is_disk_slow = false,
            Happening::Room { node } => self.set_full(node, false),
            Happening::Memory { node } => self.machines[node].is_short_of_memory = false,
            Happening::Stop { node, incarnation } => self.stop(node, incarnation),
        }
        Ok(())
    }

    fn schedule(&mut self, delay: u64, happening: Happening) {
        self.agenda.push(self.now + delay, happening);
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cuts.contains(&(a.min(b), a.max(b)))
    }

    fn store(&self, site: Site) -> &Store {
        &self.machines[site.node].stores[site.partition]
    }

    fn store_mut(&mut self, site: Site) -> &mut Store {
        &mut self.machines[site.node].stores[site.partition]
    }

    /// Whether a node counts as in sync: it has the memory that it was in sync with.
    fn is_member(&self, site: Site) -> bool {
        let id = self.machines[site.node].memory_id;
        let mut isr = self.registry.agreed[site.partition].state.isr.iter();
        isr.any(|member| member.node as usize == site.node && member.memory_id == id)
    }

    fn is_at_rest(&mut self) -> bool {
        self.unrest().is_none()
    }

    /// What has not come to rest.
    fn unrest(&mut self) -> Option<String> {
        (0..self.oracles.len()).find_map(|partition| self.unrest_of(partition))
    }

    fn unrest_of(&mut self, partition: usize) -> Option<String> {
        let mut leading = Vec::new();
        let mut ends = Vec::new();
        for (node, machine) in self.machines.iter_mut().enumerate() {
            let site = Site { node, partition };
            let Some(process) = &mut machine.process else {
                return Some(format!("node {node} is down"));
            };
            let held = &mut process.held[partition];
            let drained = match (held.replica.leader(), held.replica.follower()) {
                (Some(leader), _) => {
                    leading.push(leader.log().log_start_offset());
                    leader.log().drained_offset()
                }
                (_, follower) => follower.map_or(0, |follower| follower.drained_offset()),
            };
            let (start, end) = held.offsets();
            ends.push((site, start, end, drained, held.high_watermark()));
        }
        let &[start] = &leading[..] else {
            return Some(format!(
                "partition {partition}: {} nodes lead",
                leading.len()
            ));
        };
        let end = ends[0].2;
        let is_there = |of: &&(Site, i64, i64, i64, i64)| {
            of.1 < start || (of.2, of.3, of.4) != (end, end, end)
        };
        if let Some((site, ..)) = ends.iter().find(is_there) {
            return Some(format!(
                "{site} is not where others are (start, end, drained, high watermark): {ends:?}"
            ));
        }
        let mut sites = (0..self.machines.len()).map(|node| Site { node, partition });
        if !sites.all(|site| self.is_member(site)) {
            let isr = &self.registry.agreed[partition].state.isr;
            return Some(format!("the ISR of partition {partition} is {isr:?}"));
        }
        let mut consumers = self.consumers.iter().enumerate();
        let is_behind = |consumer: &Consumer| {
            consumer.partition() == partition && consumer.offset() != Some(end)
        };
        let (i, behind) = consumers.find(|(_, consumer)| is_behind(consumer))?;
        Some(format!("consumer {i} is at {:?} of {end}", behind.offset()))
    }

    /// Says what happens, if anybody listens.
    fn note(&self, text: impl FnOnce() -> String) {
        if self.is_traced {
            println!("{:>12.6} {}", self.now as f64 / 1e9, text());
        }
    }
}

/// How a seed is run.
#[derive(Clone, Copy, Debug, Default)]
struct Options {
    /// At least so many things go wrong.
    disasters_min: u64,
    /// Packet by packet, whatever the seed; otherwise one seed in [`SEEDS_PER_PACKETS`] is.
    is_by_packets: bool,
    is_traced: bool,
}

/// Runs one seed.
fn run(seed: u64, options: Options) -> Result<Stats, Violation> {
    let mut world = World::new(seed, options)?;
    world.run()?;
    Ok(world.stats)
}

mod conformance;
mod scenarios;
mod tests;
