//! Real processes under load that are killed, stopped and cut off at random; then what they have is compared
//! with what they have said.
//!
//! ```text
//! round:  faults of the seed, under load -> all is healed -> all in sync -> no new appends -> checks
//! ```
//!
//! Rounds go on for `FARLOG_SECONDS`; the default keeps a test run short. The seed of the first one is
//! `FARLOG_SEED` or random, each next one has the next seed. What a seed decides is the faults and their times,
//! not what real processes make of them: a failure may take several runs of its seed to come again. After some
//! rounds the nodes end in order, and others begin with empty directories.
//!
//! | topic | appended by | checked |
//! | --- | --- | --- |
//! | `leader`, `replicated`, `durable` | a client that tries each append once | acknowledged: there, at its offset; refused: not there; unknown: at most once |
//! | `again` | the library's producer, which sends again what has an unknown outcome | there, in order, perhaps more than once |
//!
//! All replicas' files must be equal, and consumers that read along must have read the same, once and in order:
//! one of each topic, and of one topic one for each replica. Others begin when a round has ended.
//!
//! `FARLOG_KEEP` keeps the nodes' directories after a failure. Where root may make network namespaces each node
//! has its own and may be cut off; `FARLOG_REQUIRE_NETNS` makes their absence an error. For other devices and an
//! emulated machine see `FARLOG_CHAOS_NODES`, `FARLOG_CHAOS_STATIC` and `FARLOG_SLOWNESS` in the modules.
#![cfg(feature = "etcd")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use replicator::control::Acks;
use transport::DeviceSelector;

#[path = "../common/etcd.rs"]
#[allow(dead_code, reason = "the coordinator's tests use more of it")]
mod etcd;

mod check;
mod load;
mod network;
mod nodes;
mod plan;
mod random;
mod readers;

use check::{Found, Violation};
use load::{Appender, Persistent, Switch};
use nodes::{Nodes, patient};
use plan::Plan;
use readers::{Observer, Reader};

const NODES: u32 = 3;
/// How long anything may take once nothing fails any more.
const PATIENCE: Duration = Duration::from_secs(45);
/// Rounds before the nodes begin anew.
const ROUNDS: u32 = 5;

const TOPICS: [(&str, Acks, &str); 3] = [
    ("leader", Acks::Leader, "[1, 2, 3]"),
    ("replicated", Acks::Replicated, "[2, 3, 1]"),
    ("durable", Acks::Durable, "[3, 1, 2]"),
];
/// The topic of the library's producer.
const AGAIN: (&str, &str) = ("again", "[1, 3, 2]");
/// The topic that is read from each replica.
const READ_EVERYWHERE: &str = "replicated";

fn check_reader(reader: &Reader, logs: &[(String, Vec<Found>)]) -> Result<(), Violation> {
    let of_topic = logs.iter().find(|(topic, _)| *topic == reader.topic);
    let (_, log) = of_topic.expect("all topics are checked");
    let read = reader.read_to(log.len(), patient(PATIENCE))?;
    check::check_read(log, &read, true)
        .map_err(|Violation(cause)| Violation(format!("{}: {cause}", reader.name)))
}

/// A cluster, and those who use it.
struct World {
    // First of all, so that clients end before the nodes.
    switch: Arc<Switch>,
    appenders: Vec<Appender>,
    producer: Persistent,
    readers: Vec<Reader>,
    observer: Observer,
    /// Of consumers that begin late.
    late_device: DeviceSelector,
    rounds: usize,
    nodes: Nodes,
}

impl Drop for World {
    fn drop(&mut self) {
        self.switch.is_over.store(true, Ordering::Relaxed);
    }
}

impl World {
    fn start() -> Option<Self> {
        let mut topics = String::new();
        let all = TOPICS.map(|(name, _, replicas)| (name, replicas));
        for (name, replicas) in all.into_iter().chain([AGAIN]) {
            // Small images and segments, so that much of it happens at their borders.
            topics += &format!(
                "[[topics]]\nname = '{name}'\npartitions = 1\nreplicas = {replicas}\nimage_size = 65536\n\
                 segment_size = 262144\nlag_max_ms = {}\n",
                patient(Duration::from_secs(1)).as_millis()
            );
        }
        let mut nodes = Nodes::start(NODES, &topics)?;
        nodes.wait_in_sync(patient(PATIENCE)).unwrap();
        let cluster = nodes.cluster.clone();
        let mut reader = |topic, replica| {
            Reader::start(&cluster, topic, replica, &nodes.network.client_device())
        };
        let mut readers: Vec<_> = TOPICS.map(|(topic, ..)| reader(topic, None)).into();
        readers.push(reader(AGAIN.0, None));
        readers.extend((1..=NODES).map(|node| reader(READ_EVERYWHERE, Some(node))));
        let switch = Arc::new(Switch::default());
        let appender = |(topic, acks, _)| Appender::start(&cluster, topic, acks, &switch);
        Some(Self {
            appenders: TOPICS.map(appender).into(),
            producer: Persistent::start(&cluster, AGAIN.0, &switch),
            observer: Observer::start(&cluster),
            late_device: nodes.network.client_device(),
            rounds: 0,
            switch,
            readers,
            nodes,
        })
    }

    fn pause(&self, is_paused: bool) {
        self.switch.is_paused.store(is_paused, Ordering::Relaxed);
    }

    fn round(&mut self, seed: u64) -> Result<(), Violation> {
        let (has_cuts, has_elections) = (self.nodes.network.has_cuts(), self.nodes.has_elections());
        let plan = Plan::new(seed, NODES, has_cuts, has_elections);
        println!("seed {seed}");
        let begun = Instant::now();
        for step in plan.0 {
            let due = begun + Duration::from_millis(step.at_ms);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            println!("  {step}");
            self.nodes.apply(step);
        }
        let healed = Instant::now();
        self.nodes
            .wait_in_sync(patient(PATIENCE))
            .map_err(Violation)?;
        let in_sync = healed.elapsed();
        self.pause(true);
        let records = self.check()?;
        self.pause(false);
        println!(
            "  in sync after {in_sync:.1?}; {records} records checked, {:?} appends acknowledged, {:.1?} in all",
            self.appenders
                .iter()
                .map(Appender::acknowledged_count)
                .collect::<Vec<_>>(),
            begun.elapsed()
        );
        Ok(())
    }

    /// Compares everything, while nothing is appended; returns how many records there are.
    fn check(&mut self) -> Result<usize, Violation> {
        let mut logs = Vec::new();
        for appender in &self.appenders {
            let attempts = appender.attempts(patient(PATIENCE));
            let topic = &appender.topic;
            let log = self.settled_log(topic)?;
            let (_, epoch) = nodes::find_leader(&self.nodes.cluster, topic).unwrap_or_default();
            check::check_appends(appender.acks, &log, &attempts, epoch)
                .map_err(|Violation(cause)| Violation(format!("topic `{topic}`: {cause}")))?;
            logs.push((topic.clone(), log));
        }
        let sent = self.producer.sent(patient(PATIENCE)).map_err(Violation)?;
        let log = self.settled_log(&self.producer.topic)?;
        check::check_resent(&log, sent.count, sent.acknowledged)?;
        logs.push((self.producer.topic.clone(), log));
        for reader in &self.readers {
            check_reader(reader, &logs)?;
        }
        // Others begin with the first record, which has to come from the files of a node chosen by the round.
        for ((topic, _), node) in logs.iter().zip((1..=NODES).cycle().skip(self.rounds)) {
            let cluster = &self.nodes.cluster;
            let reader = Reader::start(cluster, topic, Some(node), &self.late_device);
            check_reader(&reader, &logs)?;
        }
        self.rounds += 1;
        self.observer.check()?;
        Ok(logs.iter().map(|(_, log)| log.len()).sum())
    }

    /// The log of a topic, once all replicas' files hold it alike.
    fn settled_log(&self, topic: &str) -> Result<Vec<Found>, Violation> {
        let begun = Instant::now();
        loop {
            let files = |node| (node, self.nodes.files(node, topic, 0));
            let replicas: Vec<_> = (1..=NODES).map(files).collect();
            // What is on its way to a file may be there in part, or in one of them only.
            let checked = check::check_replicas(&replicas).and_then(|()| {
                let log = check::read_log(&replicas[0].1)?;
                check::check_end(&log, nodes::high_watermark(&self.nodes.cluster, topic))?;
                Ok(log)
            });
            match checked {
                Err(Violation(cause)) if begun.elapsed() > patient(PATIENCE) => {
                    return Err(Violation(format!("topic `{topic}`: {cause}")));
                }
                Err(_) => thread::sleep(Duration::from_millis(200)),
                Ok(log) => return Ok(log),
            }
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Nothing acknowledged is lost, whatever happens.
#[test]
fn chaos() {
    let seconds = Duration::from_secs(number("FARLOG_SECONDS").unwrap_or(25));
    let mut seed = number("FARLOG_SEED").unwrap_or_else(|| {
        let mut bytes = [0; 4];
        getrandom::fill(&mut bytes).unwrap();
        u32::from_le_bytes(bytes).into()
    });
    let begun = Instant::now();
    while begun.elapsed() < seconds {
        let Some(mut world) = World::start() else {
            return;
        };
        for _ in 0..ROUNDS {
            if let Err(violation) = world.round(seed) {
                panic!(
                    "{violation}\nseed {seed}; to replay it: FARLOG_SEED={seed} FARLOG_SECONDS=1 cargo test -p \
                     replicator --features etcd --test chaos -- --nocapture"
                );
            }
            seed += 1;
            if begun.elapsed() >= seconds {
                break;
            }
        }
        world.pause(true);
        world.nodes.end();
    }
}
