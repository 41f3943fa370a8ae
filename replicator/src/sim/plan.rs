//! What a seed has in store, and the world that it begins with.

use std::collections::BTreeSet;

use super::clients::{Consumer, Producer};
use super::events::{Agenda, Happening};
use super::process::node_id;
use super::random::Rng;
use super::registry::Registry;
use super::storage::{Disk, IMAGE_LEN, Memory, SEGMENT_LEN};
use super::{Clock, Machine, Stats, Violation, World};
use crate::control::Acks;
use crate::coordinator::Member;
use crate::leader::LeaderConfig;
use crate::partition::LogConfig;
use crate::replica::ReplicaConfig;

/// How long things travel, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    flight_max: u64,
    message_max: u64,
    /// Of a hundred messages and requests, those that take much longer.
    late_percent: usize,
}

impl Weather {
    /// A request on a lane, or its acknowledgement.
    pub(super) fn flight(&self, rng: &mut Rng) -> u64 {
        let most = if rng.chance(self.late_percent) {
            100 * self.flight_max
        } else {
            self.flight_max
        };
        rng.spread(1_000, most)
    }

    /// A control message.
    pub(super) fn message(&self, rng: &mut Rng) -> u64 {
        let most = if rng.chance(self.late_percent) {
            100 * self.message_max
        } else {
            self.message_max
        };
        rng.spread(20_000, most)
    }
}

/// What a seed has in store.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) weather: Weather,
    pub(super) replica: ReplicaConfig,
    /// How long faults go on.
    pub(super) length_ns: u64,
    /// Between two appends of a producer, at most.
    pub(super) pace_ns: u64,
    /// Between two rounds of a consumer that finds something, at most.
    pub(super) consume_ns: u64,
    /// Between two disasters, at most.
    pub(super) disaster_ns: u64,
    /// All batches have one record and the same length.
    pub(super) is_uniform: bool,
    pub(super) value_len_max: usize,
    /// Of a hundred writes to files, those that are synced.
    pub(super) sync_percent: usize,
    /// Now and then all machines lose power at once.
    pub(super) has_blackouts: bool,
    /// A fence withdraws keys, and the lane goes on to serve other partitions; otherwise it destroys the lane.
    pub(super) is_fence_of_keys: bool,
}

impl Plan {
    fn new(rng: &mut Rng) -> Self {
        let weather = Weather {
            flight_max: rng.pick(&[5_000, 50_000, 1_000_000]),
            message_max: rng.pick(&[100_000, 1_000_000, 20_000_000]),
            late_percent: rng.pick(&[0, 1, 5]),
        };
        let log = LogConfig {
            images_max: 4,
            retired_max: rng.pick(&[1, 2, 6]),
            grace_ns: 2_000_000_000,
            ..LogConfig::new(IMAGE_LEN, SEGMENT_LEN)
        };
        let leader = LeaderConfig {
            window_len: rng.pick(&[600, 1_500, 8_000]),
            chains_max: 1 + rng.below(5),
            chain_len_max: rng.pick(&[300, 1_000, 4_000]),
            drain_len: rng.pick(&[600, 2_000]),
            lag_max_ns: rng.pick(&[200_000_000, 2_000_000_000]),
            min_isr: 1 + rng.below(2),
            ..LeaderConfig::default()
        };
        let replica = ReplicaConfig {
            leader,
            ..ReplicaConfig::new(log)
        };
        // Batches of equal length leave old bytes where new ones could be.
        let is_uniform = rng.chance(25);
        let lens = if is_uniform {
            [20, 600, 1_900]
        } else {
            [50, 300, 900]
        };
        let value_len_max = rng.pick(&lens);
        let pace_ns = rng.pick(&[5_000_000, 20_000_000, 60_000_000]);
        Self {
            weather,
            replica,
            length_ns: rng.spread(20, 200) * pace_ns,
            pace_ns,
            consume_ns: rng.pick(&[1_000_000, 10_000_000, 100_000_000]),
            disaster_ns: pace_ns * rng.pick(&[10, 40, 1_000]),
            value_len_max,
            is_uniform,
            sync_percent: rng.pick(&[2, 20, 80]),
            has_blackouts: rng.chance(10),
            is_fence_of_keys: rng.chance(50),
        }
    }
}

impl World {
    /// The world of a seed.
    pub(super) fn new(seed: u64, is_traced: bool) -> Result<Self, Violation> {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(&mut rng);
        let count = 2 + rng.below(3);
        let machines = (0..count).map(|_| Machine {
            clock: Clock::new(&mut rng),
            disk: Disk::new(),
            memory: Memory::new(&mut rng),
            process: None,
            is_disk_slow: false,
        });
        let machines: Vec<_> = machines.collect();
        let producers = (0..1 + rng.below(3)).map(|_| {
            Producer::new(rng.pick(&[
                Acks::Leader,
                Acks::Replicated,
                Acks::Replicated,
                Acks::Durable,
            ]))
        });
        let producers: Vec<_> = producers.collect();
        let consumers = (0..1 + rng.below(3)).map(|_| {
            let node = rng.below(count);
            Consumer::new(node, rng.chance(50))
        });
        let consumers: Vec<_> = consumers.collect();
        let members = machines.iter().enumerate().map(|(n, machine)| Member {
            node: node_id(n),
            memory_id: machine.memory.id,
        });
        let registry = Registry::new(members.collect());
        let mut world = Self {
            now: 0,
            rng,
            plan,
            agenda: Agenda::default(),
            machines,
            lanes: Vec::new(),
            connections: Vec::new(),
            cuts: BTreeSet::new(),
            sessions: 0,
            producers,
            consumers,
            registry,
            is_calm: false,
            oracle: super::check::Oracle::default(),
            stats: Stats::default(),
            is_traced,
        };
        world.note(|| format!("{plan:?}"));
        for n in 0..world.machines.len() {
            world.start(n)?;
        }
        for producer in 0..world.producers.len() {
            world.schedule(5_000_000, Happening::Producer { producer });
        }
        for consumer in 0..world.consumers.len() {
            world.schedule(5_000_000, Happening::Consumer { consumer });
        }
        world.schedule(plan.disaster_ns, Happening::Disaster);
        Ok(world)
    }
}
