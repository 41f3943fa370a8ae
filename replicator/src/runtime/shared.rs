//! What all threads of a node know.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use transport::connect::ConnectConfig;
use transport::{AccessFlags, CompletionQueue, Context, QpCapabilities, ReadyQp};

use super::checkpoints::PartitionName;
use super::events::EventSender;
use super::handle::Partition;
use super::memory::{Domains, Table};
use super::views::Views;
use crate::cluster::{Cluster, Flush, Retention};
use crate::control::Hello;
use crate::coordinator::{Agreed, PartitionKey, PartitionState};
use crate::partition::LogConfig;
use crate::segment::partition_dir;

/// One partition of the cluster, whether the node holds it or not.
#[derive(Debug)]
pub(super) struct PartitionInfo {
    pub(super) topic: String,
    pub(super) number: u32,
    /// The nodes that hold it, its leader first.
    pub(super) replicas: Vec<u32>,
    pub(super) config: LogConfig,
    pub(super) min_isr: u32,
    pub(super) lag_max: Duration,
    pub(super) dir: PathBuf,
    pub(super) flush: Flush,
    pub(super) retention: Retention,
}

impl PartitionInfo {
    pub(super) fn name(&self) -> PartitionName {
        (self.topic.clone(), self.number)
    }

    pub(super) fn key(&self) -> PartitionKey {
        PartitionKey {
            topic: self.topic.clone(),
            number: self.number,
            replicas: self.replicas.clone(),
        }
    }

    pub(super) fn batch_len_max(&self) -> usize {
        self.config.image_len as usize / 2
    }
}

/// All partitions in the order of the cluster file, which is the order of the table on every node.
pub(super) fn partitions(cluster: &Cluster, data_dir: &std::path::Path) -> Vec<PartitionInfo> {
    let of_topic = |topic: &crate::cluster::TopicSpec| {
        let config = LogConfig::new(topic.image_size, topic.segment_size);
        let info = |number| PartitionInfo {
            topic: topic.name.clone(),
            number,
            replicas: topic.replicas_of(number).to_vec(),
            config,
            min_isr: topic.min_isr,
            lag_max: topic.lag_max,
            dir: partition_dir(data_dir, &topic.name, number),
            flush: topic.flush,
            retention: topic.retention,
        };
        (0..topic.partition_count()).map(info).collect::<Vec<_>>()
    };
    cluster.topics().iter().flat_map(of_topic).collect()
}

/// A queue pair that a leader writes through.
#[derive(Debug)]
pub(super) struct PassiveLane {
    pub(super) session: u64,
    pub(super) connection: u64,
    #[expect(dead_code, reason = "kept so that the peer's requests are answered")]
    pub(super) qp: ReadyQp,
}

/// What all threads of a node know.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) node: u32,
    pub(super) cluster: Cluster,
    pub(super) hello: Hello,
    pub(super) data_dir: PathBuf,
    pub(super) is_memory_lost: bool,
    pub(super) partitions: Vec<PartitionInfo>,
    /// The newest state of each partition that the coordinator has told, for those who ask.
    pub(super) agreed: Mutex<Vec<Option<PartitionState>>>,
    /// What this process is told of each partition.
    pub(super) views: Arc<Views>,
    /// The handles of those that the node holds.
    pub(super) handles: Vec<Option<Partition>>,
    pub(super) index: HashMap<(String, u32), usize>,
    pub(super) context: Context,
    pub(super) domains: Domains,
    pub(super) table: Table,
    /// Of the lanes that we post on.
    pub(super) cq: CompletionQueue,
    /// Of the queue pairs that only answer; it stays empty.
    pub(super) passive_cq: CompletionQueue,
    pub(super) events: EventSender,
    /// The lanes of leaders into our memory, by their node.
    pub(super) passive_lanes: Mutex<HashMap<u32, PassiveLane>>,
    pub(super) is_stopping: AtomicBool,
    pub(super) last_session: AtomicU64,
    pub(super) started_at: Instant,
}

/// Nanoseconds since 1970; 0 if the clock is before that.
pub(super) fn unix_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl Shared {
    /// The index of a partition that the node holds.
    pub(super) fn held_partition(&self, topic: &str, number: u32) -> Option<usize> {
        let index = *self.index.get(&(topic.to_owned(), number))?;
        self.is_held(index).then_some(index)
    }

    /// The handle of a partition that the node holds.
    pub(super) fn handle(&self, topic: &str, number: u32) -> Option<&Partition> {
        let index = *self.index.get(&(topic.to_owned(), number))?;
        self.handles[index].as_ref()
    }

    pub(super) fn is_held(&self, index: usize) -> bool {
        self.partitions[index].replicas.contains(&self.node)
    }

    pub(super) fn note_agreed(&self, partition: usize, agreed: &Agreed) {
        let mut all = self
            .agreed
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        all[partition] = Some(agreed.state.clone());
    }

    /// The epoch that we lead a partition in, or are about to, as far as the coordinator has told.
    pub(super) fn elected_in(&self, partition: usize) -> Option<i32> {
        let all = self
            .agreed
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let state = all[partition].as_ref()?;
        (state.leader == Some(self.node)).then_some(state.leader_epoch)
    }

    /// The nodes that hold a partition which we hold too.
    pub(super) fn peer_nodes(&self) -> Vec<u32> {
        let held = (0..self.partitions.len()).filter(|&index| self.is_held(index));
        let mut nodes: Vec<u32> = held
            .flat_map(|index| self.partitions[index].replicas.iter().copied())
            .filter(|&node| node != self.node)
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// A session that is higher than any before, also than those before the last start.
    pub(super) fn next_session(&self) -> u64 {
        let now = unix_ns();
        let next = |last: u64| Some(now.max(last + 1));
        let update = self
            .last_session
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        update.map_or(now, |last| now.max(last + 1))
    }

    /// The engines' clock: nanoseconds since the start.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.started_at.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }
}

/// Send requests of a lane: two for each chain, and then some.
pub(super) const LANE_SEND_WR: u32 = 512;
/// A tail travels inside of its request.
const TAIL_INLINE: u32 = 64;

/// How a leader connects a lane to a follower.
pub(super) fn lane_config() -> ConnectConfig {
    ConnectConfig {
        access: AccessFlags::empty(),
        capabilities: QpCapabilities {
            max_send_wr: LANE_SEND_WR,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: TAIL_INLINE,
        },
        ..ConnectConfig::default()
    }
}

/// How the side that only answers connects; `access` is what the peer may do.
pub(super) fn passive_config(access: AccessFlags) -> ConnectConfig {
    ConnectConfig {
        access,
        capabilities: QpCapabilities {
            max_send_wr: 1,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        },
        ..ConnectConfig::default()
    }
}
