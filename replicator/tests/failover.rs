//! Real processes with etcd: the leader is killed or stopped under load. Nothing acknowledged is lost, and
//! the cluster goes on by itself.
//!
//! Prints how long it takes from the blow to the next acknowledged append: the distribution, and the slowest with
//! the time at which the client had found the new leader. `FARLOG_TRIALS` says how often; the default keeps a
//! test run short. What the figures say is worth most for a release build on a quiet machine.
#![cfg(feature = "etcd")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use replicator::cluster::Cluster;
use replicator::consumer::StartOffset;
use replicator::control::{
    Acks, Append, Connection, Hello, Message, MetadataRequest, PartitionMetadata,
};
use replicator::record::BatchBuilder;
use replicator::runtime::Consumer;
use rustix::process::{Pid, Signal, kill_process};
use transport::DeviceSelector;

#[path = "common/etcd.rs"]
#[allow(dead_code, reason = "the coordinator's tests use more of it")]
mod etcd;

use etcd::{Etcd, free_port};

const NODES: u32 = 3;
const PATIENCE: Duration = Duration::from_secs(30);

struct Processes {
    dir: tempfile::TempDir,
    shm: tempfile::TempDir,
    cluster: Cluster,
    children: BTreeMap<u32, Child>,
    coordinator: String,
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            let _ = child.kill(); // it may have been killed already
            let _ = child.wait();
        }
        if thread::panicking() {
            for node in 1..=NODES {
                eprintln!("--- node {node}\n{}", self.log(node));
            }
        }
    }
}

impl Processes {
    fn start(etcd: &Etcd) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut text = String::from("name = 'failover'\n");
        for id in 1..=NODES {
            let port = free_port();
            text +=
                &format!("[[nodes]]\nid = {id}\naddress = '127.0.0.1:{port}'\ndevice = 'soft'\n");
        }
        text += "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1, 2, 3]\nimage_size = 1048576\n\
                 segment_size = 16777216\nlag_max_ms = 1000\n";
        fs::write(dir.path().join("cluster.toml"), &text).unwrap();
        let mut processes = Self {
            cluster: Cluster::parse(&text, Path::new("cluster.toml")).unwrap(),
            shm: tempfile::tempdir_in("/dev/shm").unwrap(),
            dir,
            children: BTreeMap::new(),
            coordinator: format!("etcd:{}", etcd.url()),
        };
        (1..=NODES).for_each(|node| processes.start_node(node));
        processes
    }

    fn start_node(&mut self, node: u32) {
        let path = |name: String| self.dir.path().join(name);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path(format!("log-{node}")))
            .unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_farlog"))
            .args(["serve", "--node", &node.to_string(), "--cluster"])
            .arg(path("cluster.toml".to_owned()))
            .arg("--data-dir")
            .arg(path(format!("data-{node}")))
            .arg("--shm-dir")
            .arg(self.shm.path().join(node.to_string()))
            .args(["--coordinator", &self.coordinator])
            .env_remove("FARLOG_DEVICE")
            .env("FARLOG_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        self.children.insert(node, child);
        assert!(line.contains("is ready"), "{line:?}: {}", self.log(node));
    }

    fn log(&self, node: u32) -> String {
        fs::read_to_string(self.dir.path().join(format!("log-{node}"))).unwrap_or_default()
    }

    fn signal(&self, node: u32, signal: Signal) {
        let pid = Pid::from_child(&self.children[&node]);
        kill_process(pid, signal).unwrap();
    }

    fn reap(&mut self, node: u32) {
        self.children.remove(&node).unwrap().wait().unwrap();
    }

    /// Waits until all are in sync under one leader, which it names: whoever knows the newest epoch says so.
    fn wait_in_sync(&self) -> u32 {
        let begun = Instant::now();
        let mut seen = None;
        while begun.elapsed() < PATIENCE {
            let told = self
                .children
                .keys()
                .map(|&node| metadata(&self.cluster, node));
            // One that was stopped a moment ago may not have heard of it yet.
            seen = told
                .flatten()
                .max_by_key(|partition| partition.leader_epoch);
            if let Some(partition) = &seen
                && partition.isr.len() == NODES as usize
                && partition.leader != 0
            {
                return partition.leader;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!("not all in sync: {seen:?}");
    }
}

fn connect(cluster: &Cluster, node: u32) -> Option<Connection> {
    let hello = Hello::client(cluster.hash());
    let address = &cluster.node(node).unwrap().address;
    Connection::connect_node_within(address, node, &hello, Duration::from_millis(100)).ok()
}

fn metadata(cluster: &Cluster, node: u32) -> Option<PartitionMetadata> {
    let mut connection = connect(cluster, node)?;
    let request = MetadataRequest {
        correlation: 1,
        topic: "t".to_owned(),
    };
    connection.send(&request.into()).ok()?;
    match connection
        .receive_timeout(Duration::from_millis(100))
        .ok()?
    {
        Some(Message::Metadata(metadata)) => metadata.partitions.into_iter().next(),
        _ => None,
    }
}

/// Appends one record after the other, each as soon as the one before is answered.
struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<Mutex<Vec<Acknowledged>>>,
    thread: thread::JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct Acknowledged {
    offset: i64,
    value: u64,
    /// When the leader was found that took it.
    found: Instant,
    sent: Instant,
    answered: Instant,
}

/// From a blow to the next acknowledged append.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Outage {
    whole: Duration,
    /// Until the client had found the new leader.
    found: Duration,
}

impl Load {
    fn start(cluster: &Cluster) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(Mutex::new(Vec::new()));
        let (cluster, stopped, noted) = (
            cluster.clone(),
            Arc::clone(&stop),
            Arc::clone(&acknowledged),
        );
        let thread = thread::spawn(move || {
            let mut leader: Option<Connection> = None;
            let mut value = 0;
            let mut found = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                let Some(connection) = &mut leader else {
                    leader = find_leader(&cluster);
                    found = Instant::now();
                    continue;
                };
                // Another value for each attempt: one whose outcome is unknown is not tried again.
                value += 1;
                let sent = Instant::now();
                match append(connection, value) {
                    Some(offset) => noted.lock().unwrap().push(Acknowledged {
                        offset,
                        value,
                        found,
                        sent,
                        answered: Instant::now(),
                    }),
                    None => leader = None,
                }
            }
        });
        Self {
            stop,
            acknowledged,
            thread,
        }
    }

    /// How long after `blow` a record was acknowledged that was not on its way before.
    fn time_to_next(&self, blow: Instant) -> Outage {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let all = self.acknowledged.lock().unwrap();
            let next = all.iter().rev().take_while(|one| one.sent > blow).last();
            if let Some(next) = next {
                return Outage {
                    whole: next.answered - blow,
                    found: next.found.saturating_duration_since(blow),
                };
            }
            drop(all);
            thread::sleep(Duration::from_millis(1));
        }
        panic!("nothing is acknowledged for {PATIENCE:?}");
    }

    fn end(self) -> Vec<Acknowledged> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        Arc::try_unwrap(self.acknowledged)
            .unwrap()
            .into_inner()
            .unwrap()
    }
}

/// Asks every node, and believes the newest epoch.
fn find_leader(cluster: &Cluster) -> Option<Connection> {
    let told = cluster
        .nodes()
        .iter()
        .filter_map(|node| metadata(cluster, node.id));
    let newest = told.max_by_key(|partition| partition.leader_epoch)?;
    (newest.leader != 0).then(|| connect(cluster, newest.leader))?
}

fn append(connection: &mut Connection, value: u64) -> Option<i64> {
    let mut builder = BatchBuilder::new(1 << 12);
    assert!(builder.append(
        1_700_000_000_000,
        None,
        Some(value.to_string().as_bytes()),
        &[]
    ));
    let append = Append {
        correlation: value,
        topic: "t".to_owned(),
        partition: 0,
        acks: Acks::Replicated,
        batch: builder.build().to_vec(),
    };
    connection.send(&append.into()).ok()?;
    // A stopped leader keeps its connections: the client has to look elsewhere at some time.
    match connection
        .receive_timeout(Duration::from_millis(200))
        .ok()?
    {
        Some(Message::Appended(appended)) => Some(appended.base_offset),
        _ => None,
    }
}

/// Reads along from the first record, through every change of the leader. Offsets must be dense.
struct Reader {
    /// It reads until it has this many.
    wanted: Arc<AtomicUsize>,
    thread: thread::JoinHandle<Vec<String>>,
}

impl Reader {
    fn start(cluster: &Cluster) -> Self {
        let wanted = Arc::new(AtomicUsize::new(usize::MAX));
        let (cluster, until) = (cluster.clone(), Arc::clone(&wanted));
        let thread = thread::spawn(move || {
            let device = DeviceSelector::Soft(None);
            let mut consumer =
                Consumer::open(&cluster, "t", &[], StartOffset::Earliest, &device, None).unwrap();
            let mut values = Vec::new();
            let mut last_news = Instant::now();
            while values.len() < until.load(Ordering::Relaxed) {
                assert!(last_news.elapsed() < PATIENCE, "{} records", values.len());
                for (_, batch) in consumer.poll(Duration::from_millis(100)).unwrap().batches() {
                    last_news = Instant::now();
                    for record in batch.records().unwrap() {
                        let record = record.unwrap();
                        assert_eq!(record.offset, i64::try_from(values.len()).unwrap());
                        values.push(String::from_utf8(record.value.unwrap().to_vec()).unwrap());
                    }
                }
            }
            values
        });
        Self { wanted, thread }
    }

    /// Every acknowledged record must be what was read at its offset.
    fn check(self, acknowledged: &[Acknowledged]) {
        let last = acknowledged.iter().map(|one| one.offset).max().unwrap();
        let wanted = usize::try_from(last).unwrap() + 1;
        self.wanted.store(wanted, Ordering::Relaxed);
        let values = self.thread.join().unwrap();
        for one in acknowledged {
            let found = &values[usize::try_from(one.offset).unwrap()];
            assert_eq!(*found, one.value.to_string(), "offset {}", one.offset);
        }
    }
}

/// How often, if the environment does not say.
fn trials(default: u32) -> u32 {
    std::env::var("FARLOG_TRIALS").map_or(default, |text| text.parse().unwrap())
}

/// Strikes the leader again and again, and prints how long each one took. Returns the longest; `None` where
/// there is no etcd.
fn strike(
    what: &str,
    trials: u32,
    signal: Signal,
    then: fn(&mut Processes, u32),
) -> Option<Outage> {
    let etcd = Etcd::start()?;
    let mut processes = Processes::start(&etcd);
    processes.wait_in_sync();
    let reader = Reader::start(&processes.cluster);
    let load = Load::start(&processes.cluster);
    let mut outages = Vec::new();
    for _ in 0..trials {
        let leader = processes.wait_in_sync();
        // It is under load by now.
        load.time_to_next(Instant::now());
        let blow = Instant::now();
        processes.signal(leader, signal);
        outages.push(load.time_to_next(blow));
        then(&mut processes, leader);
    }
    processes.wait_in_sync();
    let acknowledged = load.end();
    reader.check(&acknowledged);
    outages.sort();
    let at = |percent: usize| outages[(outages.len() * percent).div_ceil(100) - 1].whole;
    println!(
        "{what}: {} records, {} trials, until the next is acknowledged: least {:.0?}, p50 {:.0?}, p90 {:.0?}, \
         p99 {:.0?}, most {:.0?}",
        acknowledged.len(),
        outages.len(),
        outages[0].whole,
        at(50),
        at(90),
        at(99),
        at(100),
    );
    for Outage { whole, found } in outages.iter().rev().take(3) {
        println!(
            "{what}: one of the slowest, {whole:.0?}: the new leader was found after {found:.0?}"
        );
    }
    outages.last().copied()
}

/// The control connections of a process that dies are closed: nobody waits for its lease.
#[test]
fn a_killed_leader_is_replaced_at_once() {
    let most = strike("kill -9", trials(10), Signal::KILL, |processes, node| {
        processes.reap(node);
        processes.start_node(node);
    });
    assert!(
        most.is_none_or(|most| most.whole < Duration::from_millis(2500)),
        "{most:?}"
    );
}

/// An orderly end gives the leadership away first.
#[test]
fn a_leader_that_ends_hands_over() {
    let most = strike("SIGTERM", trials(5), Signal::TERM, |processes, node| {
        processes.reap(node);
        processes.start_node(node);
    });
    assert!(
        most.is_none_or(|most| most.whole < Duration::from_millis(2500)),
        "{most:?}"
    );
}

/// A process that hangs keeps its connections and loses its lease; when it goes on, it acknowledges nothing
/// as the leader that it no longer is.
#[test]
fn a_stopped_leader_is_replaced_when_its_lease_ends() {
    let most = strike("SIGSTOP", trials(3), Signal::STOP, |processes, node| {
        processes.signal(node, Signal::CONT);
    });
    assert!(
        most.is_none_or(|most| most.whole < Duration::from_millis(5000)),
        "{most:?}"
    );
}
