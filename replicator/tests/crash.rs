//! `kill -9` of every process under load, and a restart on the same data: nothing acknowledged is lost, in
//! the terms of each acknowledgement level.
//!
//! `FARLOG_CRASH_ROUNDS=100` runs longer than the short form.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use replicator::cluster::Cluster;
use replicator::consumer::{Consumer, StartOffset};
use replicator::control::Acks;
use replicator::producer::{Producer, ProducerConfig};
use tempfile::TempDir;
use transport::DeviceSelector;

const PATIENCE: Duration = Duration::from_secs(60);

/// One topic for each level. Small images, so that a crash may come during a roll.
const TOPICS: [(&str, Acks, &str); 3] = [
    ("leader", Acks::Leader, "[1, 2]"),
    ("replicated", Acks::Replicated, "[1, 2]"),
    ("durable", Acks::Durable, "[1, 2]"),
];

struct Nodes {
    cluster: Cluster,
    file: String,
    data: TempDir,
    memory: TempDir,
    running: Vec<Child>,
}

impl Nodes {
    fn new() -> Self {
        let ports = [0, 0].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
        let mut text = String::new();
        for (id, port) in (1..).zip(&ports) {
            let address = port.local_addr().unwrap();
            text += &format!("[[nodes]]\nid = {id}\naddress = '{address}'\ndevice = 'soft'\n");
        }
        for (name, _, replicas) in TOPICS {
            text += &format!(
                "[[topics]]\nname = '{name}'\npartitions = 1\nreplicas = {replicas}\n\
                 image_size = 65536\nsegment_size = 262144\n"
            );
        }
        let data = TempDir::new().unwrap();
        let file = data.path().join("cluster.toml");
        fs::write(&file, &text).unwrap();
        Self {
            cluster: Cluster::parse(&text, Path::new("cluster.toml")).unwrap(),
            file: file.display().to_string(),
            data,
            memory: TempDir::new_in("/dev/shm").unwrap(),
            running: Vec::new(),
        }
    }

    fn start(&mut self) {
        for id in ["1", "2"] {
            let mut child = Command::new(env!("CARGO_BIN_EXE_farlog"))
                .args(["serve", "--node", id, "--cluster", &self.file, "--data-dir"])
                .arg(self.data.path().join(id))
                .arg("--shm-dir")
                .arg(self.memory.path().join(id))
                .env_remove("FARLOG_DEVICE")
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            let stdout = child.stdout.take().unwrap();
            BufReader::new(stdout).read_line(&mut line).unwrap();
            self.running.push(child);
            assert!(line.contains("is ready"), "node {id} does not start");
        }
    }

    /// Kills every process, the first one at random, `pause` apart.
    fn kill(&mut self, is_reversed: bool, pause: Duration) {
        if is_reversed {
            self.running.reverse();
        }
        for mut child in self.running.drain(..) {
            child.kill().unwrap();
            thread::sleep(pause);
            child.wait().unwrap();
        }
    }

    /// All records of a topic up to `count` of them.
    fn read(&self, topic: &str, count: usize) -> Vec<String> {
        let device = DeviceSelector::Soft(None);
        let start = StartOffset::Earliest;
        let mut consumer = Consumer::open(&self.cluster, topic, &[], start, &device, None).unwrap();
        let mut records = Vec::new();
        let begun = Instant::now();
        while records.len() < count {
            assert!(
                begun.elapsed() < PATIENCE,
                "{topic}: {} of {count} records are back",
                records.len()
            );
            let fetch = consumer.poll(Duration::from_millis(100)).unwrap();
            for (_, batch) in fetch.batches() {
                for record in batch.records().unwrap() {
                    let record = record.unwrap();
                    let expected = i64::try_from(records.len()).unwrap();
                    assert_eq!(record.offset, expected, "{topic}: offsets are dense");
                    let value = String::from_utf8(record.value.unwrap().to_vec()).unwrap();
                    records.push(value);
                }
            }
        }
        records
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.kill(false, Duration::ZERO);
    }
}

/// Appends `ROUND-0`, `ROUND-1`, ... until the leader is gone; returns the offset of the last record that
/// was acknowledged.
fn append_until_killed(cluster: &Cluster, topic: &str, acks: Acks, round: usize) -> Option<i64> {
    let config = ProducerConfig {
        acks,
        batch_size: 512,
        linger: Duration::ZERO,
        request_timeout: Duration::from_secs(10),
        ..ProducerConfig::default()
    };
    let mut producer = Producer::connect(cluster, topic, config).unwrap();
    let filler = "x".repeat(100);
    for number in 0.. {
        let value = format!("{round}-{number}-{filler}");
        if producer.send(None, Some(value.as_bytes())).is_err() {
            break;
        }
    }
    producer.acknowledged(0).map(|next| next - 1)
}

/// What was appended in a round is there without a gap, and reaches to the acknowledged offset.
fn check(topic: &str, records: &[String], round: usize, acknowledged: i64) {
    let last = usize::try_from(acknowledged).unwrap();
    let prefix = format!("{round}-");
    let first = records
        .iter()
        .position(|value| value.starts_with(&prefix))
        .unwrap_or_else(|| panic!("{topic}: nothing of round {round} is there"));
    assert!(first <= last);
    for (number, value) in records[first..=last].iter().enumerate() {
        assert!(
            value.starts_with(&format!("{round}-{number}-")),
            "{topic}: offset {} of round {round} is {value:.20}",
            first + number
        );
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn nothing_acknowledged_is_lost_when_every_process_is_killed() {
    let rounds = std::env::var("FARLOG_CRASH_ROUNDS");
    let rounds = rounds.map_or(3, |rounds| rounds.parse().unwrap());
    let mut nodes = Nodes::new();
    for round in 0..rounds {
        nodes.start();
        let load = Duration::from_millis(500 + random() % 1000);
        let pause = Duration::from_micros(random() % 20_000);
        let is_reversed = random().is_multiple_of(2);
        println!("round {round}: load {load:?}, pause {pause:?}, reversed {is_reversed}");
        let cluster = nodes.cluster.clone();
        let acknowledged = thread::scope(|scope| {
            let producers = TOPICS.map(|(topic, acks, _)| {
                let cluster = &cluster;
                scope.spawn(move || append_until_killed(cluster, topic, acks, round))
            });
            thread::sleep(load);
            nodes.kill(is_reversed, pause);
            producers.map(|producer| producer.join().unwrap())
        });
        nodes.start();
        for ((topic, ..), acknowledged) in TOPICS.into_iter().zip(acknowledged) {
            let last = acknowledged.unwrap_or_else(|| panic!("{topic}: nothing was acknowledged"));
            println!("round {round}: {topic} acknowledged up to {last}");
            let records = nodes.read(topic, usize::try_from(last).unwrap() + 1);
            check(topic, &records, round, last);
        }
        nodes.kill(is_reversed, pause);
    }
}
