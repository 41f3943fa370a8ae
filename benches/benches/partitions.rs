//! What do many partitions cost?
//!
//! One pair of nodes, each with a software device of its own, all in this process, with 1, 100 and 1,000
//! partitions in turn: start until all replicas are in sync; CPU time while nothing happens; appends of one
//! small batch at a time to partitions in turn, each waited for; the same with many on their way; and the
//! memory, registrations and open files that it takes. Expected: what an append costs and what idling costs
//! does not grow with the number of partitions; the start and the memory do.
//!
//! Other numbers of partitions can be given behind `--`.

use std::collections::VecDeque;
use std::env;
use std::error::Error;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use benches::machine::Machine;
use benches::process_cpu_time;
use hdrhistogram::Histogram;
use replicator::cluster::Cluster;
use replicator::control::Acks;
use replicator::coordinator::CoordinatorConfig;
use replicator::record::BatchBuilder;
use replicator::runtime::{Node, NodeConfig, Partition, Pending};
use tempfile::TempDir;
use transport::DeviceSelector;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const TOPIC: &str = "bench";
const COUNTS: [u32; 3] = [1, 100, 1000];
/// How long each part is measured.
const SHARE: Duration = Duration::from_secs(4);
/// Appends on their way at once in the part that is about throughput.
const IN_FLIGHT: usize = 64;
const VALUE_LEN: usize = 100;
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    let given: Vec<u32> = env::args().filter_map(|arg| arg.parse().ok()).collect();
    let counts = if given.is_empty() {
        &COUNTS[..]
    } else {
        &given
    };
    println!("{}", Machine::describe());
    println!(
        "{:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>11} {:>8} {:>8} {:>6}",
        "partitions",
        "start s",
        "idle CPU",
        "p50 us",
        "p99 us",
        "CPU us",
        "appends/s",
        "CPU us",
        "RSS MiB",
        "reg. MiB",
        "files"
    );
    for &count in counts {
        measure(count)?;
    }
    Ok(())
}

fn measure(count: u32) -> Result<()> {
    let begun = Instant::now();
    let mut pair = Pair::start(count)?;
    let start = begun.elapsed();
    // Every partition has been used, and is at rest, when all is in the files and the followers look seldom.
    pair.append_pipelined(2 * u64::from(count));
    while !pair.is_drained()? {
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(Duration::from_secs(6));

    let cpu_before = process_cpu_time();
    thread::sleep(SHARE);
    let idle = (process_cpu_time() - cpu_before).as_secs_f64() / SHARE.as_secs_f64();

    let mut latency = Histogram::<u64>::new(3)?;
    let (begun, cpu_before) = (Instant::now(), process_cpu_time());
    while begun.elapsed() < SHARE {
        let sent = Instant::now();
        pair.append();
        latency.record(u64::try_from(sent.elapsed().as_nanos())?)?;
    }
    let cpu_alone = per(process_cpu_time() - cpu_before, latency.len());

    let (begun, cpu_before, mut appends) = (Instant::now(), process_cpu_time(), 0);
    while begun.elapsed() < SHARE {
        appends += pair.append_pipelined(10_000);
    }
    let rate = per_second(appends, begun.elapsed());
    let cpu_crowd = per(process_cpu_time() - cpu_before, appends);

    let registered: u64 = pair
        .nodes
        .iter()
        .map(|node| Ok(node.status()?.registered_len))
        .sum::<Result<u64>>()?;
    println!(
        "{count:>10} {:>9.2} {:>8.2}% {:>9.1} {:>9.1} {cpu_alone:>9.1} {rate:>11.0} {cpu_crowd:>11.1} {:>8} {:>8} \
         {:>6}",
        start.as_secs_f64(),
        idle * 100.0,
        micros(latency.value_at_quantile(0.5)),
        micros(latency.value_at_quantile(0.99)),
        resident_mib()?,
        registered >> 20,
        fs::read_dir("/proc/self/fd")?.count(),
    );
    pair.stop()
}

#[expect(clippy::cast_precision_loss, reason = "for a person to read")]
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "for a person to read")]
fn per(cpu_time: Duration, count: u64) -> f64 {
    cpu_time.as_secs_f64() * 1e6 / count as f64
}

#[expect(clippy::cast_precision_loss, reason = "for a person to read")]
fn per_second(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

/// The memory of this process that is resident, shared pages included.
fn resident_mib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib.ok_or("no VmRSS")?.parse::<u64>()? >> 10)
}

/// A leader and a follower.
struct Pair {
    nodes: Vec<Node>,
    partitions: Vec<Partition>,
    next: usize,
    batch: Vec<u8>,
    _data: TempDir,
    _memory: TempDir,
}

impl Pair {
    /// Starts both, and waits until all replicas are in sync.
    fn start(partitions_count: u32) -> Result<Pair> {
        // Ports are taken at once, so that they differ.
        let ports = [
            TcpListener::bind("127.0.0.1:0")?,
            TcpListener::bind("127.0.0.1:0")?,
        ];
        let mut text = format!(
            "[[topics]]\nname = \"{TOPIC}\"\npartitions = {partitions_count}\nreplicas = [1, 2]\n\
             image_size = 65_536\nsegment_size = 16_777_216\n"
        );
        for (id, port) in (1..).zip(&ports) {
            let address = port.local_addr()?;
            text += &format!("[[nodes]]\nid = {id}\naddress = \"{address}\"\ndevice = \"soft\"\n");
        }
        drop(ports);
        let cluster = Cluster::parse(&text, Path::new("benchmark"))?;
        let (data, memory) = (TempDir::new()?, TempDir::new_in("/dev/shm")?);
        let start = |node_id: u32| {
            Node::start(NodeConfig {
                cluster: cluster.clone(),
                node_id,
                data_dir: data.path().join(node_id.to_string()),
                shm_dir: memory.path().join(node_id.to_string()),
                device: DeviceSelector::Soft(None),
                coordinator: CoordinatorConfig::Static,
            })
        };
        let nodes = vec![start(1)?, start(2)?];
        while !is_in_sync(&nodes[0])? {
            thread::sleep(Duration::from_millis(10));
        }
        let mut builder = BatchBuilder::new(4096);
        assert!(builder.append(1_700_000_000_000, None, Some(&[0x5a; VALUE_LEN]), &[]));
        Ok(Pair {
            partitions: nodes[0].partitions().collect(),
            nodes,
            next: 0,
            batch: builder.build().to_vec(),
            _data: data,
            _memory: memory,
        })
    }

    fn is_drained(&self) -> Result<bool> {
        let is_drained = |node: &Node| -> Result<bool> {
            let mut partitions = node.status()?.partitions.into_iter();
            Ok(partitions.all(|p| p.log_end_offset > 0 && p.drained_offset == p.log_end_offset))
        };
        Ok(is_drained(&self.nodes[0])? && is_drained(&self.nodes[1])?)
    }

    fn submit(&mut self) -> Pending<i64> {
        let partition = &self.partitions[self.next];
        // A stride that has no factor in common with the counts: neighbours do not follow each other.
        self.next = (self.next + 7) % self.partitions.len();
        let submitted = partition.append(self.batch.clone(), Acks::Replicated);
        submitted.expect("a sound batch")
    }

    fn append(&mut self) {
        let append = self.submit();
        append.wait().expect("both replicas run");
    }

    /// Appends `count` batches with a window of them uncommitted; returns how many.
    fn append_pipelined(&mut self, count: u64) -> u64 {
        let mut pending = VecDeque::with_capacity(IN_FLIGHT);
        for _ in 0..count {
            if pending.len() == IN_FLIGHT
                && let Some(oldest) = pending.pop_front()
            {
                committed(oldest);
            }
            pending.push_back(self.submit());
        }
        pending.into_iter().for_each(committed);
        count
    }

    fn stop(self) -> Result<()> {
        for node in self.nodes {
            node.shutdown(SHUTDOWN_PATIENCE)?;
        }
        Ok(())
    }
}

fn is_in_sync(leader: &Node) -> Result<bool> {
    let status = leader.status()?;
    let mut partitions = status.partitions.iter();
    Ok(partitions.all(|partition| partition.is_leader && partition.isr.len() == 2))
}

fn committed(append: Pending<i64>) {
    append.wait().expect("both replicas run");
}
