//! Real processes: `farlog serve` for each node, and etcd.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use replicator::cluster::Cluster;
use replicator::control::{
    Connection, Hello, ListOffsets, Message, MetadataRequest, PartitionMetadata,
};
use replicator::segment::{SegmentFile, list_segments, partition_dir, segment_path};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::check::Files;
use crate::etcd::Etcd;
use crate::network::Network;
use crate::plan::{Fault, Step};

/// How long a node may take to answer; there are others.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);

/// A time, as much longer as `FARLOG_SLOWNESS` says that this machine is slower than a common one.
pub(crate) fn patient(time: Duration) -> Duration {
    let slowness = std::env::var("FARLOG_SLOWNESS");
    time * slowness.map_or(1, |text| text.parse().unwrap())
}

pub(crate) struct Nodes {
    pub(crate) cluster: Cluster,
    pub(crate) network: Network,
    /// `None`: each partition's leader is the one of the cluster file, and stays.
    etcd: Option<Etcd>,
    /// Those that run, or are stopped.
    children: BTreeMap<u32, Child>,
    stopped: BTreeSet<u32>,
    dir: TempDir,
    shm: TempDir,
    is_kept: bool,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            let _ = child.kill(); // it may have been killed already
            let _ = child.wait();
        }
        if thread::panicking() {
            self.show_logs();
            self.dir.disable_cleanup(self.is_kept);
            self.shm.disable_cleanup(self.is_kept);
        }
    }
}

impl Nodes {
    /// `None` where there is no etcd. With `FARLOG_CHAOS_STATIC` leaders are fixed and none is needed.
    pub(crate) fn start(nodes_count: u32, topics: &str) -> Option<Self> {
        let network = Network::new(nodes_count);
        let (address, command) = network.etcd();
        let etcd = match std::env::var_os("FARLOG_CHAOS_STATIC") {
            Some(_) => None,
            None => Some(Etcd::start_at(&address, command)?),
        };
        let dir = TempDir::new().unwrap();
        let mut text = String::from("name = 'chaos'\n");
        for id in 1..=nodes_count {
            let (address, device) = network.node(id);
            text += &format!("[[nodes]]\nid = {id}\naddress = '{address}'\ndevice = '{device}'\n");
        }
        text += topics;
        fs::write(dir.path().join("cluster.toml"), &text).unwrap();
        let mut nodes = Self {
            cluster: Cluster::parse(&text, Path::new("cluster.toml")).unwrap(),
            network,
            etcd,
            children: BTreeMap::new(),
            stopped: BTreeSet::new(),
            shm: TempDir::new_in("/dev/shm").unwrap(),
            dir,
            is_kept: std::env::var_os("FARLOG_KEEP").is_some(),
        };
        (1..=nodes_count).for_each(|node| nodes.start_node(node));
        Some(nodes)
    }

    fn ids(&self) -> Vec<u32> {
        self.cluster.nodes().iter().map(|node| node.id).collect()
    }

    /// Whether another node may come to lead.
    pub(crate) fn has_elections(&self) -> bool {
        self.etcd.is_some()
    }

    fn path(&self, name: &str, node: u32) -> PathBuf {
        self.dir.path().join(format!("{name}-{node}"))
    }

    fn start_node(&mut self, node: u32) {
        let log = |name| {
            let mut options = fs::OpenOptions::new();
            let opened = options
                .create(true)
                .append(true)
                .open(self.path(name, node));
            opened.unwrap()
        };
        let farlog = env!("CARGO_BIN_EXE_farlog");
        let coordinator = match &self.etcd {
            Some(etcd) => format!("etcd:{}", etcd.url()),
            None => "static".to_owned(),
        };
        let child = self
            .network
            .command_at_node(node, farlog)
            .args(["serve", "--exit-with-stdin", "--node", &node.to_string()])
            .arg("--cluster")
            .arg(self.dir.path().join("cluster.toml"))
            .arg("--data-dir")
            .arg(self.path("data", node))
            .arg("--shm-dir")
            .arg(self.shm.path().join(node.to_string()))
            .args(["--coordinator", &coordinator])
            .env_remove("FARLOG_DEVICE")
            .env(
                "FARLOG_LOG",
                std::env::var("FARLOG_LOG").unwrap_or("info".to_owned()),
            )
            .stdin(Stdio::piped())
            .stdout(log("out"))
            .stderr(log("log"))
            .spawn()
            .unwrap();
        self.children.insert(node, child);
    }

    fn signal(&self, node: u32, signal: Signal) {
        if let Some(child) = self.children.get(&node) {
            // It may have ended by itself, which `heal` looks at.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    fn kill(&mut self, node: u32) {
        if let Some(mut child) = self.children.remove(&node) {
            child.kill().unwrap();
            child.wait().unwrap();
            self.stopped.remove(&node);
        }
    }

    /// Does what the plan says; what does not fit the present state has no effect.
    pub(crate) fn apply(&mut self, step: Step) {
        match (step.fault, step.is_begin) {
            (Fault::Kill(node), true) => self.kill(node),
            (Fault::KillAll, true) => self.ids().into_iter().for_each(|node| self.kill(node)),
            (Fault::End(node), true) => self.signal(node, Signal::TERM),
            (Fault::Reboot(node), true) => {
                self.kill(node);
                fs::remove_dir_all(self.shm.path().join(node.to_string())).unwrap();
            }
            (Fault::Kill(node) | Fault::End(node) | Fault::Reboot(node), false) => {
                self.restart(node);
            }
            (Fault::KillAll, false) => self.ids().into_iter().for_each(|node| self.restart(node)),
            (Fault::Stop(node), true) => {
                self.signal(node, Signal::STOP);
                self.stopped.insert(node);
            }
            (Fault::Stop(node), false) => {
                self.signal(node, Signal::CONT);
                self.stopped.remove(&node);
            }
            (Fault::StopEtcd, is_begin) => {
                let signal = if is_begin { Signal::STOP } else { Signal::CONT };
                self.etcd.as_ref().inspect(|etcd| etcd.signal(signal));
            }
            (Fault::Cut(cut), true) => self.network.begin(cut),
            (Fault::Cut(cut), false) => self.network.end(cut),
        }
    }

    /// Starts a node that does not run. One that has ended by itself was told to, perhaps before it could take that
    /// for a request, or says that it found no etcd when it started.
    fn restart(&mut self, node: u32) {
        if let Some(child) = self.children.get_mut(&node) {
            let Some(status) = child.try_wait().unwrap() else {
                return;
            };
            let log = fs::read_to_string(self.path("log", node)).unwrap();
            let last = log.lines().rev().take(4).collect::<Vec<_>>().join("\n");
            let was_told = status.success() || status.signal() == Some(Signal::TERM.as_raw());
            assert!(
                was_told || last.contains("etcd"),
                "node {node} has ended: {status}: {last}"
            );
        }
        self.start_node(node);
    }

    /// Waits until all nodes say of all partitions that all replicas are in sync.
    pub(crate) fn wait_in_sync(&mut self, patience: Duration) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            self.ids().into_iter().for_each(|node| self.restart(node));
            let waiting = self.not_in_sync();
            let Some(waiting) = waiting else {
                return Ok(());
            };
            if begun.elapsed() > patience {
                return Err(format!("after {patience:?} {waiting}"));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn not_in_sync(&self) -> Option<String> {
        for topic in self.cluster.topics() {
            for node in self.ids() {
                let Some(partitions) = metadata(&self.cluster, node, &topic.name) else {
                    return Some(format!("node {node} does not answer"));
                };
                let is_behind =
                    |p: &PartitionMetadata| p.leader == 0 || p.isr.len() < p.replicas.len();
                if let Some(found) = partitions.into_iter().find(is_behind) {
                    return Some(format!(
                        "node {node} says of topic `{}`: {found:?}",
                        topic.name
                    ));
                }
            }
        }
        None
    }

    /// The segment files of a partition on a node.
    pub(crate) fn files(&self, node: u32, topic: &str, partition: u32) -> Files {
        let dir = partition_dir(&self.path("data", node), topic, partition);
        let bases = list_segments(&dir).unwrap_or_default();
        let read = |base| {
            let path = segment_path(&dir, base, SegmentFile::Log);
            (format!("{base:020}"), fs::read(path).unwrap_or_default())
        };
        bases.into_iter().map(read).collect()
    }

    /// An orderly end of all of them.
    pub(crate) fn end(&mut self) {
        for node in self.ids() {
            self.signal(node, Signal::TERM);
        }
        for (node, mut child) in std::mem::take(&mut self.children) {
            let status = child.wait().unwrap();
            assert!(status.success(), "node {node} ends with {status}");
        }
    }

    fn show_logs(&self) {
        for node in self.ids() {
            let log = fs::read_to_string(self.path("log", node)).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(60)..];
            eprintln!("--- node {node}\n{}", last.join("\n"));
        }
        if self.is_kept {
            eprintln!(
                "kept: {} and {}",
                self.dir.path().display(),
                self.shm.path().display()
            );
        }
    }
}

pub(crate) fn connect(cluster: &Cluster, node: u32) -> Option<Connection> {
    let hello = Hello::client(cluster.hash());
    let address = &cluster.node(node)?.address;
    Connection::connect_node_within(address, node, &hello, patient(ANSWER_TIMEOUT)).ok()
}

/// One question to a node, on a connection of its own.
fn ask(cluster: &Cluster, node: u32, question: impl Into<Message>) -> Option<Message> {
    let mut connection = connect(cluster, node)?;
    connection.send(&question.into()).ok()?;
    connection.receive_timeout(patient(ANSWER_TIMEOUT)).ok()?
}

pub(crate) fn metadata(
    cluster: &Cluster,
    node: u32,
    topic: &str,
) -> Option<Vec<PartitionMetadata>> {
    let question = MetadataRequest {
        correlation: 1,
        topic: topic.to_owned(),
    };
    match ask(cluster, node, question)? {
        Message::Metadata(metadata) => Some(metadata.partitions),
        _ => None,
    }
}

/// The leader of partition 0 and its epoch: whoever knows the newest epoch says so.
pub(crate) fn find_leader(cluster: &Cluster, topic: &str) -> Option<(u32, i32)> {
    let nodes = cluster.nodes().iter();
    let told = nodes.filter_map(|node| metadata(cluster, node.id, topic)?.into_iter().next());
    let newest = told.max_by_key(|partition| partition.leader_epoch)?;
    (newest.leader != 0).then_some((newest.leader, newest.leader_epoch))
}

/// The high watermark of partition 0, as its leader tells it.
pub(crate) fn high_watermark(cluster: &Cluster, topic: &str) -> Option<i64> {
    let (leader, _) = find_leader(cluster, topic)?;
    high_watermark_of(cluster, leader, topic)
}

/// The same, of a node that is believed to lead.
pub(crate) fn high_watermark_of(cluster: &Cluster, node: u32, topic: &str) -> Option<i64> {
    let question = ListOffsets {
        correlation: 1,
        topic: topic.to_owned(),
        partition: 0,
        timestamp: ListOffsets::LATEST,
    };
    match ask(cluster, node, question)? {
        Message::ListOffsetsReply(reply) => Some(reply.offset),
        _ => None,
    }
}
