//! What a seed has in store, and the world that it begins with.

use std::collections::BTreeSet;

use super::check::Oracle;
use super::clients::{Consumer, Producer, Start};
use super::events::{Agenda, Happening};
use super::operations::Operations;
use super::packets::Packets;
use super::process::node_id;
use super::random::Rng;
use super::registry::Registry;
use super::storage::{IMAGE_LEN, SEGMENT_LEN, Store};
use super::verbs::Verbs;
use super::{Clock, Machine, Options, SEEDS_PER_PACKETS, Stats, Violation, World};
use crate::control::Acks;
use crate::coordinator::{Member, MemoryId};
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
    pub(super) fn new(rng: &mut Rng) -> Self {
        Self {
            flight_max: rng.pick(&[5_000, 50_000, 1_000_000]),
            message_max: rng.pick(&[100_000, 1_000_000, 20_000_000]),
            late_percent: rng.pick(&[0, 1, 5]),
        }
    }

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
    /// How long faults go on, and at least how many there are.
    pub(super) length_ns: u64,
    pub(super) disasters_min: u64,
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
    /// Only what takes a log apart goes wrong: crashes, cuts, lost lanes, processes that stand still.
    pub(super) is_narrow: bool,
    /// Now and then all machines lose power at once.
    pub(super) has_blackouts: bool,
    /// How many bytes of files retention keeps, and how often it looks.
    pub(super) retention_len: usize,
    pub(super) sweep_ns: u64,
    /// A fence withdraws keys, and the lane goes on to serve other partitions; otherwise it destroys the lane.
    pub(super) is_fence_of_keys: bool,
}

impl Plan {
    fn new(rng: &mut Rng, disasters_min: u64) -> Self {
        let weather = Weather::new(rng);
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
        let is_narrow = rng.chance(40);
        let is_uniform = rng.chance(if is_narrow { 60 } else { 25 });
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
            disasters_min,
            pace_ns,
            consume_ns: rng.pick(&[1_000_000, 10_000_000, 100_000_000]),
            disaster_ns: pace_ns * rng.pick(&[10, 40, 1_000]),
            value_len_max,
            is_uniform,
            sync_percent: rng.pick(&[2, 20, 80]),
            is_narrow,
            has_blackouts: !is_narrow && rng.chance(15),
            retention_len: rng.pick(&[usize::MAX, 4 * IMAGE_LEN as usize, IMAGE_LEN as usize]),
            sweep_ns: rng.pick(&[50_000_000, 500_000_000]),
            is_fence_of_keys: rng.chance(50),
        }
    }
}

impl Plan {
    /// Nothing goes wrong and nothing is sent, unless a test does it.
    fn quiet(min_isr: usize) -> Self {
        let log = LogConfig {
            images_max: 4,
            retired_max: 2,
            ..LogConfig::new(IMAGE_LEN, SEGMENT_LEN)
        };
        let leader = LeaderConfig {
            window_len: 1_500,
            chains_max: 3,
            chain_len_max: 1_000,
            drain_len: 2_000,
            lag_max_ns: 200_000_000,
            min_isr,
            ..LeaderConfig::default()
        };
        let replica = ReplicaConfig {
            leader,
            ..ReplicaConfig::new(log)
        };
        Self {
            weather: Weather {
                flight_max: 50_000,
                message_max: 1_000_000,
                late_percent: 0,
            },
            replica,
            length_ns: 0,
            disasters_min: 0,
            pace_ns: 20_000_000,
            consume_ns: 1_000_000,
            disaster_ns: 1_000_000_000,
            is_uniform: false,
            value_len_max: 300,
            sync_percent: 20,
            is_narrow: true,
            has_blackouts: false,
            retention_len: usize::MAX,
            sweep_ns: 500_000_000,
            is_fence_of_keys: true,
        }
    }
}

impl World {
    /// The world of a seed.
    pub(super) fn new(seed: u64, options: Options) -> Result<Self, Violation> {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(&mut rng, options.disasters_min);
        let nodes = 2 + rng.below(3);
        let partitions = if plan.is_narrow { 1 } else { 1 + rng.below(3) };
        let is_by_packets = options.is_by_packets || seed % SEEDS_PER_PACKETS == 49;
        let mut world = Self::of(plan, (nodes, partitions), is_by_packets, rng);
        world.is_traced = options.is_traced;
        for i in 0..partitions + world.rng.below(3) {
            let all = [Acks::Leader, Acks::Replicated, Acks::Durable].map(Some);
            let acks = world.rng.pick(&[all[0], all[1], all[1], all[2], None]);
            world.producers.push(Producer::new(i % partitions, acks));
        }
        for i in 0..partitions + world.rng.below(3) {
            let starts = [
                Start::Earliest,
                Start::Earliest,
                Start::Latest,
                Start::Anywhere,
            ];
            let (node, start) = (world.rng.below(nodes), world.rng.pick(&starts));
            let is_faithful = world.rng.chance(50);
            let consumer = Consumer::new(i % partitions, node, is_faithful, start);
            world.consumers.push(consumer);
        }
        world.start_all()?;
        Ok(world)
    }

    /// A world in which a test decides what happens; a consumer reads everything.
    pub(super) fn quiet(nodes: usize, min_isr: usize) -> Self {
        let plan = Plan::quiet(min_isr);
        let mut world = Self::of(plan, (nodes, 1), false, Rng::new(0));
        world.is_calm = true;
        world.producers.push(Producer::new(0, None));
        world
            .consumers
            .push(Consumer::new(0, 0, false, Start::Earliest));
        world.start_all().expect("nothing has happened yet");
        world
    }

    fn of(
        plan: Plan,
        (nodes, partitions): (usize, usize),
        is_by_packets: bool,
        mut rng: Rng,
    ) -> Self {
        let machines = (0..nodes).map(|_| Machine {
            clock: Clock::new(&mut rng),
            memory_id: new_memory_id(&mut rng),
            stores: (0..partitions).map(|_| Store::new()).collect(),
            process: None,
            is_disk_slow: false,
            is_short_of_memory: false,
        });
        let machines: Vec<_> = machines.collect();
        let members = machines.iter().enumerate().map(|(n, machine)| Member {
            node: node_id(n),
            memory_id: machine.memory_id,
        });
        let members: Vec<_> = members.collect();
        let (own_rng, weather) = (Rng::new(rng.next()), plan.weather);
        let verbs: Box<dyn Verbs> = if is_by_packets {
            Box::new(Packets::new(own_rng, weather, nodes))
        } else {
            Box::new(Operations::new(own_rng, weather, nodes))
        };
        Self {
            now: 0,
            rng,
            plan,
            agenda: Agenda::default(),
            machines,
            verbs,
            lanes: Vec::new(),
            connections: Vec::new(),
            cuts: BTreeSet::new(),
            sessions: 0,
            producers: Vec::new(),
            consumers: Vec::new(),
            registry: Registry::new(&members, partitions),
            is_calm: false,
            oracles: (0..partitions).map(|_| Oracle::default()).collect(),
            stats: Stats::default(),
            is_traced: false,
        }
    }

    fn start_all(&mut self) -> Result<(), Violation> {
        let plan = self.plan;
        self.note(|| format!("{plan:?}"));
        for n in 0..self.machines.len() {
            self.start(n)?;
        }
        for producer in 0..self.producers.len() {
            self.schedule(5_000_000, Happening::Producer { producer });
        }
        for consumer in 0..self.consumers.len() {
            self.schedule(5_000_000, Happening::Consumer { consumer });
        }
        self.schedule(plan.disaster_ns, Happening::Disaster);
        Ok(())
    }
}

pub(super) fn new_memory_id(rng: &mut Rng) -> MemoryId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&rng.next().to_le_bytes());
    MemoryId(id)
}
