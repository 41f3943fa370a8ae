//! A cluster of nodes in one process, each on a software device of its own.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use replicator::cluster::Cluster;
use replicator::consumer::{Consumer, StartOffset};
use replicator::control::Acks;
use replicator::coordinator::CoordinatorConfig;
use replicator::record::BatchBuilder;
use replicator::runtime::{AppendError, Node, NodeConfig, NodeStatus, PartitionStatus, Pending};
use tempfile::TempDir;
use transport::DeviceSelector;

/// How long anything may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long a node waits for appends and successors when it is shut down.
pub(crate) const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);

/// A cluster file, directories, and the nodes that run.
pub(crate) struct TestCluster {
    pub(crate) cluster: Cluster,
    pub(crate) nodes: Vec<Option<Node>>,
    data: TempDir,
    memory: TempDir,
}

impl TestCluster {
    /// Nodes 1 to `nodes_count`; `topics` is the part of the cluster file that follows the nodes.
    pub(crate) fn start(nodes_count: u32, topics: &str) -> Self {
        let mut cluster = Self::prepare(nodes_count, topics);
        (1..=nodes_count).for_each(|node| cluster.start_node(node));
        cluster.wait_in_sync();
        cluster
    }

    /// Waits until every partition is led by a node that runs, with all its replicas in sync.
    pub(crate) fn wait_in_sync(&self) {
        eventually("all in sync", || {
            let running = self.nodes.iter().flatten();
            let held = running.flat_map(|node| node.status().unwrap().partitions);
            let (led, followed): (Vec<_>, Vec<_>) = held.partition(|partition| partition.is_leader);
            let is_led = |partition: &PartitionStatus| {
                led.iter().any(|other| {
                    (&other.topic, other.partition) == (&partition.topic, partition.partition)
                })
            };
            led.iter().all(|p| p.isr.len() == p.replicas.len()) && followed.iter().all(is_led)
        });
    }

    pub(crate) fn prepare(nodes_count: u32, topics: &str) -> Self {
        Self::prepare_with(nodes_count, "", topics)
    }

    /// As `prepare`, with further keys for every node.
    pub(crate) fn prepare_with(nodes_count: u32, node_keys: &str, topics: &str) -> Self {
        // Ports are taken all at once, so that they differ.
        let ports: Vec<_> = (0..nodes_count)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let mut text = String::new();
        for (id, port) in (1..).zip(&ports) {
            let address = port.local_addr().unwrap();
            text += &format!(
                "[[nodes]]\nid = {id}\naddress = \"{address}\"\ndevice = \"soft\"\n{node_keys}\n"
            );
        }
        text += topics;
        drop(ports);
        Self {
            cluster: Cluster::parse(&text, Path::new("test.toml")).unwrap(),
            nodes: (0..nodes_count).map(|_| None).collect(),
            data: TempDir::new().unwrap(),
            memory: TempDir::new_in("/dev/shm").unwrap(),
        }
    }

    pub(crate) fn data_dir(&self, node: u32) -> PathBuf {
        self.data.path().join(node.to_string())
    }

    pub(crate) fn shm_dir(&self, node: u32) -> PathBuf {
        self.memory.path().join(node.to_string())
    }

    pub(crate) fn config(&self, node: u32) -> NodeConfig {
        NodeConfig {
            cluster: self.cluster.clone(),
            node_id: node,
            data_dir: self.data_dir(node),
            shm_dir: self.shm_dir(node),
            device: DeviceSelector::Soft(None),
            coordinator: CoordinatorConfig::Static,
        }
    }

    pub(crate) fn start_node(&mut self, node: u32) {
        self.nodes[node as usize - 1] = Some(Node::start(self.config(node)).unwrap());
    }

    pub(crate) fn stop_node(&mut self, node: u32) {
        if let Some(node) = self.nodes[node as usize - 1].take() {
            node.shutdown(SHUTDOWN_PATIENCE).unwrap();
        }
    }

    pub(crate) fn node(&self, node: u32) -> &Node {
        self.nodes[node as usize - 1].as_ref().unwrap()
    }

    pub(crate) fn status(&self, node: u32) -> NodeStatus {
        self.node(node).status().unwrap()
    }

    pub(crate) fn consumer(
        &self,
        topic: &str,
        start: StartOffset,
        replica: Option<u32>,
    ) -> Consumer {
        let device = DeviceSelector::Soft(None);
        Consumer::open(&self.cluster, topic, &[], start, &device, replica).unwrap()
    }

    /// The segment files of a partition, joined.
    pub(crate) fn log_bytes(&self, node: u32, topic: &str, partition: u32) -> Vec<u8> {
        let dir = self.data_dir(node).join(format!("{topic}-{partition}"));
        let mut files: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .collect();
        files.sort();
        // Retention may have removed one meanwhile.
        let read = |path| match std::fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            result => result.unwrap(),
        };
        files.iter().flat_map(read).collect()
    }
}

/// Appending to a partition by its name.
pub(crate) trait NodeExt {
    /// As [`Partition::append`](replicator::runtime::Partition::append).
    fn submit(
        &self,
        topic: &str,
        partition: u32,
        batch: Vec<u8>,
        acks: Acks,
    ) -> Result<Pending<i64>, AppendError>;

    /// The same, and waits for the answer.
    fn append(
        &self,
        topic: &str,
        partition: u32,
        batch: Vec<u8>,
        acks: Acks,
    ) -> Result<i64, AppendError> {
        self.submit(topic, partition, batch, acks)?.wait()
    }
}

impl NodeExt for Node {
    fn submit(
        &self,
        topic: &str,
        partition: u32,
        batch: Vec<u8>,
        acks: Acks,
    ) -> Result<Pending<i64>, AppendError> {
        let partition = self.partition(topic, partition);
        partition.expect("the node holds it").append(batch, acks)
    }
}

/// A batch of records whose values are `prefix` and a number.
pub(crate) fn batch(prefix: &str, records: u32, value_len: usize) -> Vec<u8> {
    let mut builder = BatchBuilder::new(1 << 20);
    for i in 0..records {
        let mut value = format!("{prefix}-{i}-").into_bytes();
        value.resize(value.len().max(value_len), b'x');
        assert!(builder.append(1_700_000_000_000, None, Some(&value), &[]));
    }
    builder.build().to_vec()
}

/// Waits until `done`.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Polls until `count` records have come; returns partition, offset and value of each.
pub(crate) fn consume(consumer: &mut Consumer, count: usize) -> Vec<(u32, i64, Vec<u8>)> {
    let begun = Instant::now();
    let mut records = Vec::new();
    while records.len() < count {
        assert!(
            begun.elapsed() < PATIENCE,
            "{} of {count} records",
            records.len()
        );
        let fetch = consumer.poll(Duration::from_millis(100)).unwrap();
        for (partition, batch) in fetch.batches() {
            for record in batch.records().unwrap() {
                let record = record.unwrap();
                records.push((partition, record.offset, record.value.unwrap().to_vec()));
            }
        }
    }
    records
}
