//! Simulation: a cluster in one thread, on a virtual clock, where everything goes wrong that can.
//!
//! A seed decides all: two to four nodes with the real engines, a coordinator, producers, consumers, how
//! long things take, and which disasters befall whom. The engines' commands are executed on an
//! operation-level model:
//!
//! ```text
//!   Machine     a clock that is wrong, files (synced or not), shared memory; survives its process
//!   Process     a replica, registrations, two workers; ends at any moment, or stands still
//!   Lane        WRITEs placed in order, whole or in part, acknowledged late or never
//!   Connection  control messages in order, late or never
//!   Registry    the coordinator: compare-and-swap, leases, late watches, answers that are lost
//!   Oracle      what the outside knows: batches sent, acknowledged, delivered
//! ```
//!
//! Processes crash, machines lose power, one or all, nodes and coordinator are cut off from each other,
//! lanes fail, disks are slow. What is checked, by bytes and offsets and besides that nothing panics:
//!
//! - What is acknowledged as replicated, or delivered to a consumer, is in the memory or the files of
//!   every member of the ISR at that moment; what is acknowledged as durable, on its device.
//! - None of that ever becomes another batch, or none; if all memory is lost at once, nothing durable.
//! - One node at most leads, and acknowledges, in an epoch.
//! - Consumers get what producers sent, with dense offsets, in order and once, and their high watermark never
//!   falls.
//! - A member of the ISR that starts again still has all that is committed.
//! - Once nothing goes wrong any more, the run comes to rest: one leader, everybody in sync, the files of all
//!   replicas equal byte for byte, and consumers have got everything.
//!
//! [`faults`](crate::faults) shows that the checks bite. `scripts/simulate cluster` runs any number of seeds.
//!
//! One partition is simulated: what partitions do to each other on a shared lane is not.

mod check;
mod clients;
mod control;
mod disaster;
mod events;
mod jobs;
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

use check::{Oracle, demand};
use clients::{Consumer, Producer};
use control::Connection;
use events::{Agenda, Happening};
use plan::Plan;
use process::Process;
use random::Rng;
use registry::Registry;
use storage::{Disk, Memory};
use verbs::Lane;

/// How long a run may take to come to rest, in steps of this length.
const REST_STEP_NS: u64 = 500_000_000;
const REST_STEPS_MAX: u64 = 240;
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
    committed: u64,
    delivered: u64,
    crashes: u64,
    power_losses: u64,
    elections: u64,
    isr_changes: u64,
    pauses: u64,
    cuts: u64,
    lost_lanes: u64,
}

impl Stats {
    fn add(&mut self, other: &Self) {
        self.happenings += other.happenings;
        self.answered += other.answered;
        self.committed += other.committed;
        self.delivered += other.delivered;
        self.crashes += other.crashes;
        self.power_losses += other.power_losses;
        self.elections += other.elections;
        self.isr_changes += other.isr_changes;
        self.pauses += other.pauses;
        self.cuts += other.cuts;
        self.lost_lanes += other.lost_lanes;
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            happenings,
            answered,
            committed,
            delivered,
            crashes,
            power_losses,
            elections,
            isr_changes,
            pauses,
            cuts,
            lost_lanes,
        } = self;
        write!(
            f,
            "{happenings} happenings, {answered} appends answered, {committed} committed, {delivered} batches \
             delivered; {elections} elections, {isr_changes} changes of the ISR; {crashes} crashes, {power_losses} power losses, {pauses} pauses, {cuts} cuts, \
             {lost_lanes} lanes lost"
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
    disk: Disk,
    memory: Memory,
    process: Option<Process>,
    is_disk_slow: bool,
}

struct World {
    now: u64,
    rng: Rng,
    plan: Plan,
    agenda: Agenda,
    machines: Vec<Machine>,
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
    oracle: Oracle,
    stats: Stats,
    is_traced: bool,
}

impl World {
    /// Lets everything go wrong for a while, then everything come to rest, and judges.
    fn run(&mut self) -> Result<(), Violation> {
        self.pass_until(self.plan.length_ns)?;
        self.calm_down()?;
        for _ in 0..REST_STEPS_MAX {
            self.pass_until(self.now + REST_STEP_NS)?;
            if self.is_at_rest() {
                return self.check_end();
            }
        }
        let unrest = self.unrest();
        Err(Violation(format!(
            "the run does not come to rest: {unrest}"
        )))
    }

    /// Lets time pass.
    fn pass_until(&mut self, deadline: u64) -> Result<(), Violation> {
        while let Some((at, happening)) = self.agenda.pop_until(deadline) {
            self.now = at;
            self.stats.happenings += 1;
            demand!(
                self.stats.happenings < HAPPENINGS_MAX,
                "the run does not end"
            );
            self.happen(happening)?;
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
            Happening::Place { lane } => self.place(lane)?,
            Happening::Ack { lane } => self.acknowledge(lane)?,
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
                ticket,
                expected_revision,
                state,
            } => {
                self.decide(node, incarnation, ticket, expected_revision, state)?;
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
        }
        Ok(())
    }

    fn schedule(&mut self, delay: u64, happening: Happening) {
        self.agenda.push(self.now + delay, happening);
    }

    fn is_cut(&self, a: usize, b: usize) -> bool {
        self.cuts.contains(&(a.min(b), a.max(b)))
    }

    /// Whether a node counts as in sync: it has the memory that it was in sync with.
    fn is_member(&self, n: usize) -> bool {
        let id = self.machines[n].memory.id;
        let mut isr = self.registry.agreed.state.isr.iter();
        isr.any(|member| member.node as usize == n && member.memory_id == id)
    }

    fn is_at_rest(&mut self) -> bool {
        self.unrest().is_empty()
    }

    /// What has not come to rest.
    fn unrest(&mut self) -> String {
        let mut end = None;
        let mut leaders = 0;
        for (n, machine) in self.machines.iter_mut().enumerate() {
            let Some(process) = &mut machine.process else {
                return format!("node {n} is down");
            };
            let (log_end, high_watermark, drained) = if let Some(l) = process.replica.leader_mut() {
                leaders += 1;
                (
                    l.log().log_end_offset(),
                    l.high_watermark(),
                    l.log().drained_offset(),
                )
            } else if let Some(f) = process.replica.follower_mut() {
                (f.log_end_offset(), f.high_watermark(), f.drained_offset())
            } else {
                return format!("node {n} has no role");
            };
            let end = *end.get_or_insert(log_end);
            if (log_end, high_watermark, drained) != (end, end, end) {
                return format!(
                    "node {n} ends at {log_end}, {drained} drained, HW {high_watermark}, node 0 at {end}"
                );
            }
        }
        if leaders != 1 {
            return format!("{leaders} nodes lead");
        }
        if (0..self.machines.len()).any(|n| !self.is_member(n)) {
            return format!("the ISR is {:?}", self.registry.agreed.state.isr);
        }
        let end = end.unwrap_or(0);
        let behind = self
            .consumers
            .iter()
            .position(|consumer| consumer.offset() != end);
        behind.map_or_else(String::new, |i| {
            format!("consumer {i} is at {} of {end}", self.consumers[i].offset())
        })
    }

    /// Says what happens, if anybody listens.
    fn note(&self, text: impl FnOnce() -> String) {
        if self.is_traced {
            println!("{:>12.6} {}", self.now as f64 / 1e9, text());
        }
    }
}

/// Runs one seed.
fn run(seed: u64, is_traced: bool) -> Result<Stats, Violation> {
    let mut world = World::new(seed, is_traced)?;
    world.run()?;
    Ok(world.stats)
}

#[cfg(test)]
mod tests;
