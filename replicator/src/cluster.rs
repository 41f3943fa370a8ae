//! The cluster file: which nodes there are, and who leads and follows what.
//!
//! ```toml
//! name = "demo"                # optional: the cluster's name at its coordinator
//!
//! [[nodes]]
//! id = 1
//! address = "127.0.0.1:7001"   # control connections
//! device = "auto"              # optional: auto, soft, soft@ADDRESS, or a name such as mlx5_0
//! memory = 8_589_934_592       # optional: most bytes of log images; without it, any number
//!
//! [[nodes]]
//! id = 2
//! address = "127.0.0.1:7002"
//!
//! [[topics]]
//! name = "flights"
//! partitions = 3
//! replicas = [1, 2]            # of every partition; the first one leads if it can
//! min_isr = 2                  # optional: replicas that must hold a record before it is committed
//! lag_max_ms = 10_000          # optional: a replica that lags longer is in sync no more
//! image_size = 8_388_608       # optional: bytes of a log image, a power of two
//! segment_size = 1_073_741_824 # optional: bytes of a segment file, a multiple of image_size
//! flush = "never"              # optional: when records are synced to the device, see [`Flush`]
//! retention_bytes = 10_000_000_000  # optional: of a partition; without it, any number
//! retention_ms = 604_800_000   # optional: without it, records are kept for ever
//! ```
//!
//! Instead of `replicas`, `partition_replicas = [[1, 2], [2, 1], [1, 2]]` names them per partition.
//! Unknown keys are refused. Every process of a cluster reads the same file: [`Cluster::hash`] is
//! compared when they greet.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use thiserror::Error;

/// Default size of a log image in bytes.
pub const IMAGE_SIZE_DEFAULT: u32 = 8 << 20;
/// Smallest image: two batches of a page each.
pub const IMAGE_SIZE_MIN: u32 = 64 << 10;
/// Largest image.
pub const IMAGE_SIZE_MAX: u32 = 1 << 30;
/// Default size of a segment file in bytes, as Kafka's.
pub const SEGMENT_SIZE_DEFAULT: u64 = 1 << 30;
/// Default of [`TopicSpec::lag_max`]: Kafka's `replica.lag.time.max.ms` before it became 30 s.
pub const LAG_MAX_DEFAULT: Duration = Duration::from_secs(10);
/// A shorter one would take a replica out for a pause that means nothing.
pub const LAG_MAX_MIN: Duration = Duration::from_millis(100);
/// Default of [`TopicSpec::min_isr`] where there are as many replicas.
pub const MIN_ISR_DEFAULT: u32 = 2;
/// A cluster's name if the file has none.
pub const NAME_DEFAULT: &str = "default";
/// Largest segment file: Kafka's indexes hold file positions as `i32`.
pub const SEGMENT_SIZE_MAX: u64 = (1 << 31) - 1;
/// Most partitions of one topic.
pub const PARTITIONS_MAX: u32 = 10_000;
/// Longest name of a topic or cluster in bytes, as Kafka's.
const NAME_LEN_MAX: usize = 249;

/// A validated cluster file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    name: String,
    nodes: Vec<NodeSpec>,
    topics: Vec<TopicSpec>,
}

/// One node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct NodeSpec {
    /// Its number, at least 1.
    pub id: u32,
    /// Where it takes control connections, `host:port`.
    pub address: String,
    /// Which device it uses when it is not told otherwise.
    #[serde(default = "device_default")]
    pub device: String,
    /// Most bytes of log images it may hold; `None` for any number.
    pub memory: Option<u64>,
}

/// One topic of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicSpec {
    /// Its name.
    pub name: String,
    /// The node ids that hold each partition; the first one is its preferred leader.
    pub replicas: Vec<Vec<u32>>,
    /// Size of a log image in bytes, a power of two.
    pub image_size: u32,
    /// Size at which a segment file rolls, in bytes; a multiple of `image_size`.
    pub segment_size: u64,
    /// When records are synced to the device.
    pub flush: Flush,
    /// How long records are kept.
    pub retention: Retention,
    /// How many replicas, the leader among them, must be in sync for records to be committed. Two unless
    /// the file says otherwise, or one if a partition has but one replica.
    pub min_isr: u32,
    /// How long a replica may lag behind its leader, or be out of its reach, before it is proposed out of
    /// the in-sync set.
    pub lag_max: Duration,
}

/// When appended records are synced to the device, beside the requests for it by `acks=durable`.
///
/// `flush = "never"`, `flush = "each"`, or `flush = { interval_ms = 1000, bytes = 1_048_576 }`: Kafka's
/// `flush.ms`, and in place of `flush.messages` a number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "FlushFile")]
pub enum Flush {
    /// When the operating system pleases; Kafka's default.
    #[default]
    Never,
    /// With every write to the segment file.
    Each,
    /// At the latest after this time, or when this many bytes have been written.
    Every {
        /// In milliseconds.
        interval_ms: u64,
        /// Of log.
        bytes: u64,
    },
}

/// How long records are kept: `retention_bytes` and `retention_ms`, with Kafka's meaning. Whole segments
/// below the high watermark are removed, never the one that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// A segment goes if this many bytes stay without it.
    pub bytes: Option<u64>,
    /// A segment goes if its newest record is older than this, in milliseconds.
    pub ms: Option<u64>,
}

impl NodeSpec {
    /// A node that takes any device and any amount of memory; set the other fields if need be.
    #[must_use]
    pub fn new(id: u32, address: impl Into<String>) -> Self {
        Self {
            id,
            address: address.into(),
            device: device_default(),
            memory: None,
        }
    }
}

impl TopicSpec {
    /// A topic with as many partitions as there are lists of replicas, and what the cluster file leaves out
    /// by default; set the other fields if need be.
    #[must_use]
    pub fn new(name: impl Into<String>, replicas: Vec<Vec<u32>>) -> Self {
        Self {
            name: name.into(),
            min_isr: MIN_ISR_DEFAULT.min(fewest(&replicas)),
            replicas,
            image_size: IMAGE_SIZE_DEFAULT,
            segment_size: SEGMENT_SIZE_DEFAULT,
            flush: Flush::default(),
            retention: Retention::default(),
            lag_max: LAG_MAX_DEFAULT,
        }
    }

    /// How many partitions the topic has.
    pub fn partition_count(&self) -> u32 {
        u32::try_from(self.replicas.len()).expect("validated to be at most PARTITIONS_MAX")
    }

    /// The replicas of a partition, its leader first; empty if there is no such partition.
    pub fn replicas_of(&self, partition: u32) -> &[u32] {
        self.replicas
            .get(partition as usize)
            .map_or(&[], Vec::as_slice)
    }

    /// The node that leads a partition if it can.
    pub fn preferred_leader_of(&self, partition: u32) -> Option<u32> {
        self.replicas_of(partition).first().copied()
    }

    /// The largest batch the topic takes, in bytes: half an image.
    pub fn batch_len_max(&self) -> usize {
        self.image_size as usize / 2
    }
}

impl Cluster {
    /// A cluster that is built in code. Every process of it must build the same one.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Definition`].
    pub fn new(
        name: impl Into<String>,
        nodes: Vec<NodeSpec>,
        topics: Vec<TopicSpec>,
    ) -> Result<Self, ClusterError> {
        Self::validated(name.into(), nodes, topics)
            .map_err(|message| ClusterError::Definition { message })
    }

    fn validated(
        name: String,
        nodes: Vec<NodeSpec>,
        topics: Vec<TopicSpec>,
    ) -> Result<Self, String> {
        validate_name(&name).map_err(|cause| format!("name = {name:?}: {cause}"))?;
        let mut ids = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for node in &nodes {
            validate_node(node)?;
            if !ids.insert(node.id) {
                return Err(format!("node id {} is given twice", node.id));
            }
            if !addresses.insert(&node.address) {
                return Err(format!(
                    "node {}: address {} is another node's already",
                    node.id, node.address
                ));
            }
        }
        let mut names = BTreeSet::new();
        for topic in &topics {
            if !names.insert(&topic.name) {
                return Err(format!("topic `{}` is given twice", topic.name));
            }
            let validated = topic.validate(&ids);
            validated.map_err(|cause| format!("topic `{}`: {cause}", topic.name))?;
        }
        Ok(Self {
            name,
            nodes,
            topics,
        })
    }

    /// Reads and validates a cluster file.
    ///
    /// # Errors
    ///
    /// [`ClusterError`], which names the file and, where there is one, the line.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ClusterError> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(|source| ClusterError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// As [`Cluster::load`] for text already read; `path` appears in errors only.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Syntax`] or [`ClusterError::Invalid`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ClusterError> {
        let file: ClusterFile = toml::from_str(text).map_err(|error| ClusterError::Syntax {
            path: path.to_owned(),
            line: error
                .span()
                .map_or(1, |span| 1 + text[..span.start].matches('\n').count()),
            message: error.message().to_owned(),
        })?;
        file.validate().map_err(|message| ClusterError::Invalid {
            path: path.to_owned(),
            message,
        })
    }

    /// Its name at the coordinator.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The nodes, in the order of the file.
    pub fn nodes(&self) -> &[NodeSpec] {
        &self.nodes
    }

    /// The topics, in the order of the file.
    pub fn topics(&self) -> &[TopicSpec] {
        &self.topics
    }

    /// The node with this id.
    pub fn node(&self, id: u32) -> Option<&NodeSpec> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// The topic with this name.
    pub fn topic(&self, name: &str) -> Option<&TopicSpec> {
        self.topics.iter().find(|topic| topic.name == name)
    }

    /// A number that two processes compare to see that they read the same cluster: FNV-1a over what
    /// they must agree on. Devices are each node's own business. Never 0.
    pub fn hash(&self) -> u64 {
        let mut hash = Fnv1a::new();
        // Files of before there were names keep their hash.
        if self.name != NAME_DEFAULT {
            hash.text("name").text(&self.name);
        }
        for node in &self.nodes {
            hash.text("node").number(node.id.into()).text(&node.address);
        }
        for topic in &self.topics {
            hash.text("topic")
                .text(&topic.name)
                .number(topic.image_size.into())
                .number(topic.segment_size);
            for replicas in &topic.replicas {
                hash.number(replicas.len() as u64);
                replicas.iter().for_each(|&node| {
                    hash.number(node.into());
                });
            }
        }
        hash.0.max(1)
    }
}

/// A cluster file cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// The file cannot be read.
    #[error("cluster file {path}: {source}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not TOML, has an unknown key, lacks one, or holds a value of the wrong type.
    #[error("cluster file {path}, line {line}: {message}", path = .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The cause; for an unknown key it names the known ones.
        message: String,
    },
    /// A cluster built in code is not valid.
    #[error("the cluster is not valid: {message}")]
    Definition {
        /// The cause.
        message: String,
    },
    /// The values contradict each other.
    #[error("cluster file {path}: {message}", path = .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The cause.
        message: String,
    },
}

fn device_default() -> String {
    "auto".to_owned()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClusterFile {
    #[serde(default = "name_default")]
    name: String,
    nodes: Vec<NodeSpec>,
    #[serde(default)]
    topics: Vec<TopicFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TopicFile {
    name: String,
    partitions: u32,
    replicas: Option<Vec<u32>>,
    partition_replicas: Option<Vec<Vec<u32>>>,
    #[serde(default = "image_size_default")]
    image_size: u32,
    #[serde(default = "segment_size_default")]
    segment_size: u64,
    #[serde(default)]
    flush: Flush,
    retention_bytes: Option<u64>,
    retention_ms: Option<u64>,
    min_isr: Option<u32>,
    lag_max_ms: Option<u64>,
}

fn name_default() -> String {
    NAME_DEFAULT.to_owned()
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FlushFile {
    Word(String),
    Every(FlushEvery),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FlushEvery {
    interval_ms: Option<u64>,
    bytes: Option<u64>,
}

impl TryFrom<FlushFile> for Flush {
    type Error = String;

    fn try_from(file: FlushFile) -> Result<Self, String> {
        match file {
            FlushFile::Word(word) if word == "never" => Ok(Self::Never),
            FlushFile::Word(word) if word == "each" => Ok(Self::Each),
            FlushFile::Every(FlushEvery {
                interval_ms: None,
                bytes: None,
            }) => Err("flush = {} says nothing: give interval_ms, bytes or both".to_owned()),
            FlushFile::Every(FlushEvery { interval_ms, bytes }) => Ok(Self::Every {
                interval_ms: interval_ms.unwrap_or(FLUSH_INTERVAL_MAX_MS),
                bytes: bytes.unwrap_or(u64::MAX),
            }),
            FlushFile::Word(word) => Err(format!(
                "flush = \"{word}\" is none of \"never\", \"each\", {{ interval_ms = ..., bytes = ... }}"
            )),
        }
    }
}

/// A flush interval that is as good as none: a hundred years.
const FLUSH_INTERVAL_MAX_MS: u64 = 100 * 365 * 24 * 3_600_000;

fn image_size_default() -> u32 {
    IMAGE_SIZE_DEFAULT
}

fn segment_size_default() -> u64 {
    SEGMENT_SIZE_DEFAULT
}

impl ClusterFile {
    fn validate(self) -> Result<Cluster, String> {
        let spec = |topic: TopicFile| {
            let name = topic.name.clone();
            let spec = topic.into_spec();
            spec.map_err(|cause| format!("topic `{name}`: {cause}"))
        };
        let topics = self
            .topics
            .into_iter()
            .map(spec)
            .collect::<Result<_, _>>()?;
        Cluster::validated(self.name, self.nodes, topics)
    }
}

fn validate_node(node: &NodeSpec) -> Result<(), String> {
    if node.id == 0 {
        return Err("node id 0 is reserved for clients: number nodes from 1".to_owned());
    }
    let has_port = node.address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if has_port {
        Ok(())
    } else {
        Err(format!(
            "node {}: address `{}` is not host:port",
            node.id, node.address
        ))
    }
}

impl TopicFile {
    fn into_spec(self) -> Result<TopicSpec, String> {
        validate_partitions(self.partitions as usize)?;
        let replicas = match (self.replicas, self.partition_replicas) {
            (Some(replicas), None) => vec![replicas; self.partitions as usize],
            (None, Some(lists)) if lists.len() == self.partitions as usize => lists,
            (None, Some(lists)) => {
                return Err(format!(
                    "partition_replicas has {} lists for {} partitions",
                    lists.len(),
                    self.partitions
                ));
            }
            _ => return Err("give either replicas or partition_replicas".to_owned()),
        };
        let defaults = TopicSpec::new(self.name, replicas);
        Ok(TopicSpec {
            image_size: self.image_size,
            segment_size: self.segment_size,
            flush: self.flush,
            retention: Retention {
                bytes: self.retention_bytes,
                ms: self.retention_ms,
            },
            min_isr: self.min_isr.unwrap_or(defaults.min_isr),
            lag_max: self
                .lag_max_ms
                .map_or(LAG_MAX_DEFAULT, Duration::from_millis),
            ..defaults
        })
    }
}

impl TopicSpec {
    fn validate(&self, ids: &BTreeSet<u32>) -> Result<(), String> {
        validate_name(&self.name)?;
        validate_partitions(self.replicas.len())?;
        let image_size = self.image_size;
        if !image_size.is_power_of_two() || !(IMAGE_SIZE_MIN..=IMAGE_SIZE_MAX).contains(&image_size)
        {
            return Err(format!(
                "image_size = {image_size} is not a power of two from {IMAGE_SIZE_MIN} to {IMAGE_SIZE_MAX}"
            ));
        }
        let is_multiple = self.segment_size.is_multiple_of(u64::from(image_size));
        if !is_multiple || !(1..=SEGMENT_SIZE_MAX).contains(&self.segment_size) {
            return Err(format!(
                "segment_size = {} is not a multiple of image_size = {image_size} up to {SEGMENT_SIZE_MAX}",
                self.segment_size
            ));
        }
        for (partition, replicas) in self.replicas.iter().enumerate() {
            validate_replicas(replicas, ids)
                .map_err(|cause| format!("partition {partition}: {cause}"))?;
        }
        let (min_isr, fewest) = (self.min_isr, fewest(&self.replicas));
        if !(1..=fewest).contains(&min_isr) {
            return Err(format!(
                "min_isr = {min_isr} is outside 1 to {fewest}, the replicas of a partition"
            ));
        }
        if self.lag_max < LAG_MAX_MIN {
            return Err(format!(
                "lag_max_ms = {} is below {}",
                self.lag_max.as_millis(),
                LAG_MAX_MIN.as_millis()
            ));
        }
        Ok(())
    }
}

/// The fewest replicas that a partition has.
fn fewest(replicas: &[Vec<u32>]) -> u32 {
    let fewest = replicas.iter().map(Vec::len).min().unwrap_or(0);
    u32::try_from(fewest).unwrap_or(u32::MAX)
}

fn validate_partitions(count: usize) -> Result<(), String> {
    if (1..=PARTITIONS_MAX as usize).contains(&count) {
        return Ok(());
    }
    Err(format!(
        "partitions = {count} is outside 1 to {PARTITIONS_MAX}"
    ))
}

fn validate_replicas(replicas: &[u32], ids: &BTreeSet<u32>) -> Result<(), String> {
    if replicas.is_empty() {
        return Err("it has no replica: the first one leads".to_owned());
    }
    let mut seen = BTreeSet::new();
    for id in replicas {
        if !ids.contains(id) {
            let known: Vec<_> = ids.iter().map(u32::to_string).collect();
            return Err(format!(
                "replica {id} is not a node; nodes are {}",
                known.join(", ")
            ));
        }
        if !seen.insert(id) {
            return Err(format!("replica {id} is given twice"));
        }
    }
    Ok(())
}

/// Kafka's rule for topics, which name directories; a cluster's name is part of keys.
fn validate_name(name: &str) -> Result<(), String> {
    let is_legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > NAME_LEN_MAX || matches!(name, "." | "..") {
        return Err(format!(
            "a name has 1 to {NAME_LEN_MAX} characters and is neither `.` nor `..`"
        ));
    }
    match name.chars().find(|&c| !is_legal(c)) {
        Some(c) => Err(format!(
            "{c:?} is not allowed in a name: use letters, digits, `.`, `_` and `-`"
        )),
        None => Ok(()),
    }
}

struct Fnv1a(u64);

impl Fnv1a {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self
    }

    fn number(&mut self, number: u64) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.number(text.len() as u64).bytes(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: &str = "
        [[nodes]]
        id = 1
        address = \"127.0.0.1:7001\"
        [[nodes]]
        id = 2
        address = \"127.0.0.1:7002\"
        device = \"rxe0\"
        ";

    fn parse(text: &str) -> Result<Cluster, String> {
        Cluster::parse(text, Path::new("c.toml")).map_err(|error| error.to_string())
    }

    fn with_topic(topic: &str) -> Result<Cluster, String> {
        parse(&format!("{NODES}\n[[topics]]\n{topic}"))
    }

    #[test]
    fn reads_nodes_and_topics() {
        let cluster = with_topic("name = 't'\npartitions = 3\nreplicas = [2, 1]").unwrap();
        assert_eq!(cluster.node(1).unwrap().device, "auto");
        assert_eq!(cluster.node(2).unwrap().device, "rxe0");
        let topic = cluster.topic("t").unwrap();
        assert_eq!(topic.partition_count(), 3);
        assert_eq!(topic.preferred_leader_of(2), Some(2));
        assert_eq!(topic.preferred_leader_of(3), None);
        assert_eq!(
            (topic.image_size, topic.segment_size),
            (IMAGE_SIZE_DEFAULT, SEGMENT_SIZE_DEFAULT)
        );
        assert_eq!((topic.min_isr, topic.lag_max), (2, LAG_MAX_DEFAULT));
        assert_eq!(cluster.name(), "default");
    }

    #[test]
    fn a_cluster_may_be_built_in_code() {
        let nodes = || {
            let mut second = NodeSpec::new(2, "127.0.0.1:7002");
            second.device = "rxe0".to_owned();
            vec![NodeSpec::new(1, "127.0.0.1:7001"), second]
        };
        let topic = TopicSpec::new("t", vec![vec![2, 1]; 3]);
        let built = Cluster::new(NAME_DEFAULT, nodes(), vec![topic.clone()]).unwrap();
        let read = with_topic("name = 't'\npartitions = 3\nreplicas = [2, 1]").unwrap();
        assert_eq!(built, read);
        let mut strict = topic.clone();
        strict.min_isr = 3;
        for (topics, cause) in [
            (vec![strict], "min_isr = 3"),
            (vec![topic.clone(), topic], "given twice"),
            (vec![TopicSpec::new("t", vec![vec![7]])], "replica 7"),
            (vec![TopicSpec::new("t", Vec::new())], "partitions = 0"),
        ] {
            let error = Cluster::new("c", nodes(), topics).unwrap_err().to_string();
            assert!(error.contains(cause), "{error}");
        }
    }

    #[test]
    fn commitment_is_the_topics_choice() {
        let topic = "name = 't'\npartitions = 1\nreplicas = [1, 2]\nmin_isr = 1\nlag_max_ms = 500";
        let cluster = parse(&format!("name = 'c'\n{NODES}\n[[topics]]\n{topic}")).unwrap();
        let topic = cluster.topic("t").unwrap();
        assert_eq!(
            (topic.min_isr, topic.lag_max),
            (1, Duration::from_millis(500))
        );
        assert_eq!(cluster.name(), "c");
        // A partition with one replica can have no more in sync.
        let single = "name = 't'\npartitions = 2\npartition_replicas = [[1, 2], [2]]";
        assert_eq!(with_topic(single).unwrap().topic("t").unwrap().min_isr, 1);
    }

    #[test]
    fn replicas_may_differ_per_partition() {
        let cluster =
            with_topic("name = 't'\npartitions = 2\npartition_replicas = [[1, 2], [2]]").unwrap();
        assert_eq!(cluster.topic("t").unwrap().replicas_of(1), [2]);
    }

    #[test]
    fn flush_and_retention_are_kafkas_by_default_and_as_told_else() {
        let topic = |keys: &str| {
            let text = format!("name = 't'\npartitions = 1\nreplicas = [1]\n{keys}");
            with_topic(&text).map(|cluster| cluster.topic("t").unwrap().clone())
        };
        let default = topic("").unwrap();
        assert_eq!(default.flush, Flush::Never);
        assert_eq!(default.retention, Retention::default());
        let kept = topic("retention_bytes = 5\nretention_ms = 6").unwrap();
        assert_eq!(
            (kept.retention.bytes, kept.retention.ms),
            (Some(5), Some(6))
        );
        assert_eq!(topic("flush = 'each'").unwrap().flush, Flush::Each);
        let every = |interval_ms, bytes| Flush::Every { interval_ms, bytes };
        for (text, flush) in [
            ("{ interval_ms = 20, bytes = 9 }", every(20, 9)),
            ("{ interval_ms = 20 }", every(20, u64::MAX)),
            ("{ bytes = 9 }", every(FLUSH_INTERVAL_MAX_MS, 9)),
        ] {
            assert_eq!(topic(&format!("flush = {text}")).unwrap().flush, flush);
        }
        for wrong in ["'sometimes'", "{}", "{ ms = 5 }", "5"] {
            topic(&format!("flush = {wrong}")).unwrap_err();
        }
    }

    #[test]
    fn unknown_key_is_named_with_file_line_and_the_known_ones() {
        let message = parse("[[nodes]]\nid = 1\nadress = 'x'\n").unwrap_err();
        for part in ["c.toml", "line 3", "`adress`", "`address`", "`device`"] {
            assert!(message.contains(part), "{part} is missing in: {message}");
        }
    }

    #[test]
    fn wrong_type_and_broken_toml_name_the_line() {
        assert!(
            parse("[[nodes]]\nid = 'one'\naddress = 'a:1'")
                .unwrap_err()
                .contains("line 2")
        );
        assert!(parse("[[nodes]]\nid = \n").unwrap_err().contains("line 2"));
    }

    #[test]
    fn contradictions_are_refused() {
        let duplicate = format!("{NODES}\n[[nodes]]\nid = 2\naddress = 'h:1'");
        assert!(
            parse(&duplicate)
                .unwrap_err()
                .contains("node id 2 is given twice")
        );
        assert!(
            parse("[[nodes]]\nid = 1\naddress = 'host'")
                .unwrap_err()
                .contains("not host:port")
        );
        assert!(
            parse("[[nodes]]\nid = 0\naddress = 'h:1'")
                .unwrap_err()
                .contains("number nodes from 1")
        );
        assert!(
            parse(&format!("name = 'a/b'\n{NODES}"))
                .unwrap_err()
                .contains("'/' is not allowed")
        );
        for (topic, cause) in [
            (
                "name='t'\npartitions=1\nreplicas=[3]",
                "replica 3 is not a node; nodes are 1, 2",
            ),
            (
                "name='t'\npartitions=1\nreplicas=[1,1]",
                "replica 1 is given twice",
            ),
            ("name='t'\npartitions=1\nreplicas=[]", "no replica"),
            (
                "name='t'\npartitions=1",
                "either replicas or partition_replicas",
            ),
            (
                "name='t'\npartitions=2\npartition_replicas=[[1]]",
                "1 lists for 2 partitions",
            ),
            ("name='t'\npartitions=0\nreplicas=[1]", "partitions = 0"),
            (
                "name='../t'\npartitions=1\nreplicas=[1]",
                "'/' is not allowed",
            ),
            ("name='..'\npartitions=1\nreplicas=[1]", "neither"),
            (
                "name='t'\npartitions=1\nreplicas=[1]\nimage_size=3000000",
                "power of two",
            ),
            (
                "name='t'\npartitions=1\nreplicas=[1]\nsegment_size=100",
                "multiple of image_size",
            ),
            (
                "name='t'\npartitions=1\nreplicas=[1,2]\nmin_isr=3",
                "min_isr = 3 is outside 1 to 2",
            ),
            (
                "name='t'\npartitions=1\nreplicas=[1,2]\nmin_isr=0",
                "min_isr = 0",
            ),
            (
                "name='t'\npartitions=1\nreplicas=[1,2]\nlag_max_ms=99",
                "lag_max_ms = 99 is below 100",
            ),
            (
                "name='t'\npartitions=1\nreplicas=[1]\nsegment_size=4294967296",
                "up to 2147483647",
            ),
        ] {
            let message = with_topic(topic).unwrap_err();
            assert!(message.contains(cause), "{topic:?} says: {message}");
        }
    }

    #[test]
    fn hash_follows_what_processes_must_agree_on() {
        let topic = "name = 't'\npartitions = 2\nreplicas = [1, 2]";
        let hash = with_topic(topic).unwrap().hash();
        // A constant, because processes of different builds compare it.
        assert_eq!(hash, 0x276be0658761d654);
        assert_eq!(
            hash,
            with_topic(&format!("{topic} # a comment")).unwrap().hash()
        );
        assert_ne!(
            hash,
            with_topic(&topic.replace("[1, 2]", "[2, 1]"))
                .unwrap()
                .hash()
        );
        assert_ne!(
            hash,
            with_topic(&topic.replace("= 2", "= 3")).unwrap().hash()
        );
    }
}
