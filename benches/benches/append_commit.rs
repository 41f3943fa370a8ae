//! How long from an append to its commit, and how many bytes a second commit?
//!
//! A leader and one or two followers, each a node of its own with a software device of its own, all in
//! this process: on fewer cores than nodes the scheduler is part of the figure. `64 B` appends a batch
//! of one record and waits until all replicas have it. `16 KiB, 16 in flight` keeps sixteen batches
//! under way. The large batches compare the two ways of appending: `copied` into the log image by the I/O
//! thread, and filled `in place` by the thread that appends. Followers receive by one-sided WRITEs of data and tail. Expected on idle cores: the round
//! trip of a WRITE (see `write_vs_tcp`) plus two hand-overs between threads.

use std::collections::VecDeque;
use std::error::Error;
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use replicator::cluster::Cluster;
use replicator::control::Acks;
use replicator::coordinator::CoordinatorConfig;
use replicator::record::BatchBuilder;
use replicator::runtime::{Node, NodeConfig, Partition, Pending, Reservation};
use tempfile::TempDir;
use transport::DeviceSelector;

const TOPIC: &str = "bench";
const IN_FLIGHT: usize = 16;
const TIMESTAMP: i64 = 1_700_000_000_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .sample_size(20)
        .configure_from_args();
    for followers in [1, 2] {
        let replicas = Replicas::start(1 + followers)?;
        let mut group = criterion.benchmark_group(format!("append_commit/{followers} followers"));
        let small = batch(64, 1);
        group.throughput(Throughput::Elements(1));
        group.bench_function("64 B", |b| b.iter(|| replicas.append(&small)));
        let large = batch(1000, 16);
        group.throughput(Throughput::Bytes(large.len() as u64));
        group.bench_function(format!("16 KiB, {IN_FLIGHT} in flight"), |b| {
            b.iter_custom(|count| replicas.pipelined(count, |leader| copied(leader, &large)));
        });
        for records in [256, 1024] {
            compare_in_place(&mut group, &replicas, records);
        }
        group.finish();
        replicas.stop()?;
    }
    criterion.final_summary();
    Ok(())
}

/// The same batch of `records` KiB copied by the I/O thread, and filled in place.
fn compare_in_place(group: &mut BenchmarkGroup<'_, WallTime>, replicas: &Replicas, records: usize) {
    let encoded = batch(1000, records);
    group.throughput(Throughput::Bytes(encoded.len() as u64));
    group.bench_function(format!("{records} KiB, encoded, copied"), |b| {
        b.iter_custom(|count| replicas.pipelined(count, |leader| copied(leader, &encoded)));
    });
    group.bench_function(format!("{records} KiB, encoded, in place"), |b| {
        let append = |leader: &Partition| {
            let mut room = reserved(leader, encoded.len());
            room.write_all(&encoded).expect("there is room for it");
            room.commit().expect("a sound batch")
        };
        b.iter_custom(|count| replicas.pipelined(count, append));
    });
    let value = [0x5a; 1000];
    group.bench_function(format!("{records} KiB, records, copied"), |b| {
        let mut builder = BatchBuilder::new(2 << 20);
        let mut append = |leader: &Partition| {
            for _ in 0..records {
                assert!(builder.append(TIMESTAMP, None, Some(&value), &[]));
            }
            let appended = leader.append(&mut builder, Acks::Replicated);
            appended.expect("a sound batch")
        };
        b.iter_custom(|count| replicas.pipelined(count, &mut append));
    });
    group.bench_function(format!("{records} KiB, records, in place"), |b| {
        let append = |leader: &Partition| {
            let mut room = reserved(leader, encoded.len());
            for _ in 0..records {
                assert!(room.append(TIMESTAMP, None, Some(&value), &[]));
            }
            room.commit().expect("there is a record")
        };
        b.iter_custom(|count| replicas.pipelined(count, append));
    });
}

/// Appends bytes that belong to somebody else, such as a connection's buffer.
fn copied(leader: &Partition, batch: &[u8]) -> Pending<i64> {
    let appended = leader.append(batch.to_vec(), Acks::Replicated);
    appended.expect("a sound batch")
}

fn reserved(leader: &Partition, len: usize) -> Reservation {
    let reserved = leader.reserve(len, Acks::Replicated);
    let room = reserved.expect("the node runs").wait();
    room.expect("there is room, or will be")
}

/// A batch of `records` with values of `value_len` bytes.
fn batch(value_len: usize, records: usize) -> Vec<u8> {
    let mut builder = BatchBuilder::new(1 << 20);
    let value = vec![0x5a; value_len];
    for _ in 0..records {
        assert!(builder.append(TIMESTAMP, None, Some(&value), &[]));
    }
    builder.build().to_vec()
}

/// The nodes, and what they keep.
struct Replicas {
    leader: Partition,
    nodes: Vec<Node>,
    _data: TempDir,
    _memory: TempDir,
}

impl Replicas {
    fn start(count: u32) -> Result<Replicas, Box<dyn Error>> {
        // Ports are taken all at once, so that they differ.
        let ports = (0..count)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<Vec<_>, _>>()?;
        let mut text = String::new();
        for (id, port) in (1..).zip(&ports) {
            let address = port.local_addr()?;
            text += &format!("[[nodes]]\nid = {id}\naddress = \"{address}\"\ndevice = \"soft\"\n");
        }
        let ids: Vec<u32> = (1..=count).collect();
        text += &format!("[[topics]]\nname = \"{TOPIC}\"\npartitions = 1\nreplicas = {ids:?}\n");
        drop(ports);
        let cluster = Cluster::parse(&text, Path::new("benchmark"))?;
        let (data, memory) = (TempDir::new()?, TempDir::new_in("/dev/shm")?);
        let start = |&node_id: &u32| {
            Node::start(NodeConfig {
                cluster: cluster.clone(),
                node_id,
                data_dir: data.path().join(node_id.to_string()),
                shm_dir: memory.path().join(node_id.to_string()),
                device: DeviceSelector::Soft(None),
                coordinator: CoordinatorConfig::Static,
            })
        };
        let nodes = ids.iter().map(start).collect::<Result<Vec<_>, _>>()?;
        Ok(Replicas {
            leader: nodes[0].partition(TOPIC, 0)?,
            nodes,
            _data: data,
            _memory: memory,
        })
    }

    fn append(&self, batch: &[u8]) -> i64 {
        let appended = self.leader.append(batch.to_vec(), Acks::Replicated);
        appended
            .expect("a sound batch")
            .wait()
            .expect("all replicas run")
    }

    /// Appends `count` batches in this way with a window of them uncommitted, and returns how long that took.
    fn pipelined(
        &self,
        count: u64,
        mut append: impl FnMut(&Partition) -> Pending<i64>,
    ) -> Duration {
        let mut pending = VecDeque::with_capacity(IN_FLIGHT);
        let begun = Instant::now();
        for _ in 0..count {
            if pending.len() == IN_FLIGHT
                && let Some(oldest) = pending.pop_front()
            {
                committed(oldest);
            }
            pending.push_back(append(&self.leader));
        }
        pending.into_iter().for_each(committed);
        begun.elapsed()
    }

    fn stop(self) -> Result<(), Box<dyn Error>> {
        for node in self.nodes {
            node.shutdown(Duration::ZERO)?;
        }
        Ok(())
    }
}

fn committed(append: Pending<i64>) {
    append.wait().expect("all replicas run");
}
