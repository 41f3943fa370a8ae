//! What a node says of itself.

use std::path::PathBuf;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::leading::Leading;
use super::partition::Held;
use super::shared::Shared;
use crate::leader::{FollowerState, Leader};

/// A node's state at one moment; serialised as the JSON of a `Status` message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeStatus {
    /// The node's id.
    pub node: u32,
    /// Which start of the node it is: nanoseconds since 1970.
    pub incarnation: u64,
    /// Its device.
    pub device: String,
    /// Where its segment files are.
    pub data_dir: PathBuf,
    /// Its log memory was lost before this start: records that were not in the files are gone here.
    pub is_memory_lost: bool,
    /// Seconds of CPU time of the whole process.
    pub cpu_seconds: f64,
    /// Bytes of the images in its memory.
    pub images_len: u64,
    /// How many images those are.
    pub images_count: u64,
    /// Bytes of images that are registered; those that are registered twice count twice.
    pub registered_len: u64,
    /// From append to commit, over all partitions it leads; absent before the first commit.
    pub commit_latency_us: Option<Latency>,
    /// The partitions it holds.
    pub partitions: Vec<PartitionStatus>,
}

/// Percentiles in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Latency {
    /// How many batches.
    pub count: u64,
    /// The median.
    pub p50: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
    /// 999 of 1000 are at most this.
    pub p999: f64,
    /// The largest.
    pub max: f64,
}

impl Latency {
    pub(super) fn of(histogram: &Histogram<u64>) -> Option<Self> {
        #[expect(
            clippy::cast_precision_loss,
            reason = "microseconds for a person to read"
        )]
        let us = |ns: u64| ns as f64 / 1000.0;
        (!histogram.is_empty()).then(|| Self {
            count: histogram.len(),
            p50: us(histogram.value_at_quantile(0.5)),
            p99: us(histogram.value_at_quantile(0.99)),
            p999: us(histogram.value_at_quantile(0.999)),
            max: us(histogram.max()),
        })
    }
}

/// A partition's state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PartitionStatus {
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: u32,
    /// Whether the node leads it.
    pub is_leader: bool,
    /// Who is agreed to lead it, as far as the node has heard.
    pub leader: Option<u32>,
    /// The nodes agreed to be in sync, as far as the node has heard.
    pub isr: Vec<u32>,
    /// The nodes that hold it, the preferred leader first.
    pub replicas: Vec<u32>,
    /// The leader epoch.
    pub leader_epoch: i32,
    /// The first offset.
    pub log_start_offset: i64,
    /// One past the last offset.
    pub log_end_offset: i64,
    /// Records below are committed, as far as the node knows.
    pub high_watermark: i64,
    /// Records below are in the segment files.
    pub drained_offset: i64,
    /// Records below are on the device.
    pub durable_offset: i64,
    /// The files take bytes and keep them. If not, `fault` says why, and nothing is acknowledged as durable.
    pub storage: StorageStatus,
    /// Appends that wait for an image.
    pub stalled_appends: usize,
    /// What is wrong, if anything is.
    pub fault: Option<String>,
    /// Its segment files.
    pub segment_dir: PathBuf,
    /// From append to commit on the leader.
    pub commit_latency_us: Option<Latency>,
    /// The followers, as the leader sees them.
    pub followers: Vec<FollowerStatus>,
}

/// Whether files take bytes and keep them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StorageStatus {
    /// They do.
    Works,
    /// There is no room. It is tried again; nothing is lost meanwhile.
    Full,
    /// The device failed. Nothing more is written until the node is restarted.
    Poisoned,
}

/// A follower as its leader sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FollowerStatus {
    /// Its node.
    pub node: u32,
    /// What it is doing, or why it cannot be served.
    pub state: String,
    /// Whether it gets what is appended.
    pub is_streaming: bool,
    /// One past the last offset it has acknowledged.
    pub log_end_offset: i64,
    /// Why the last lane to it ended, if one has.
    pub last_error: Option<String>,
}

/// The status of a node, put together on the I/O thread.
pub(super) fn status(shared: &Shared, partitions: &[Option<Held>]) -> NodeStatus {
    let mut latency = Histogram::new(3).expect("three digits are allowed");
    for held in partitions.iter().flatten() {
        // Both histograms grow as they need to.
        let _ = latency.add(&held.leading.latency);
    }
    let with_index = partitions.iter().enumerate();
    let books = &shared.domains.books;
    NodeStatus {
        node: shared.node,
        incarnation: shared.hello.incarnation,
        device: shared.context.name().to_owned(),
        data_dir: shared.data_dir.clone(),
        is_memory_lost: shared.is_memory_lost,
        cpu_seconds: cpu_seconds(),
        images_len: books.images_len(),
        images_count: books.images_count(),
        registered_len: books.registered_len(),
        commit_latency_us: Latency::of(&latency),
        partitions: with_index
            .filter_map(|(index, held)| Some(partition_status(shared, index, held.as_ref()?)))
            .collect(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "seconds for a person to read")]
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn partition_status(shared: &Shared, index: usize, held: &Held) -> PartitionStatus {
    let info = &shared.partitions[index];
    let tail = shared.table.entry(index).tail;
    let agreed = held.replica.agreed().map(|agreed| &agreed.state);
    let mut status = PartitionStatus {
        topic: info.topic.clone(),
        partition: info.number,
        is_leader: false,
        leader: agreed.and_then(|state| state.leader),
        isr: agreed
            .map(|state| state.isr.iter().map(|member| member.node).collect())
            .unwrap_or_default(),
        replicas: agreed.map_or_else(|| info.replicas.clone(), |state| state.replicas.clone()),
        leader_epoch: held.epoch().0,
        log_start_offset: 0,
        log_end_offset: 0,
        high_watermark: 0,
        drained_offset: 0,
        durable_offset: held.durable_offset(),
        storage: StorageStatus::of(held.storage_fault()),
        stalled_appends: 0,
        fault: None,
        segment_dir: info.dir.clone(),
        commit_latency_us: None,
        followers: Vec::new(),
    };
    let (replica, leading) = (&held.replica, &held.leading);
    match (replica.leader(), replica.follower()) {
        (Some(leader), _) => {
            let log = leader.log();
            status.is_leader = true;
            status.log_start_offset = log.log_start_offset();
            status.log_end_offset = log.log_end_offset();
            status.high_watermark = leader.high_watermark();
            status.drained_offset = log.drained_offset();
            status.stalled_appends = leading.stalled.len();
            status.fault = leading.fault();
            status.commit_latency_us = Latency::of(&leading.latency);
            status.followers = (0..leader.followers_count())
                .map(|f| follower_status(leader, leading, f))
                .collect();
        }
        (_, Some(engine)) => {
            // The tail is newer than the last look at it, and not yet checked.
            let told = tail.filter(|tail| tail.leader_epoch == engine.leader_epoch());
            status.log_start_offset = engine.log_start_offset();
            status.log_end_offset = told
                .map_or(0, |tail| tail.log_end_offset)
                .max(engine.log_end_offset());
            status.high_watermark = told
                .map_or(0, |tail| tail.high_watermark)
                .max(engine.high_watermark());
            status.drained_offset = engine.drained_offset();
            let storage = held.storage_fault().map(ToString::to_string);
            status.fault = engine.fault().map(ToString::to_string).or(storage);
        }
        (None, None) => {}
    }
    status
}

fn follower_status(leader: &Leader, leading: &Leading, follower: usize) -> FollowerStatus {
    let (node, state, acked) = leader.follower(follower);
    FollowerStatus {
        node,
        state: state.to_string(),
        is_streaming: *state == FollowerState::Streaming,
        log_end_offset: acked,
        last_error: leading.lane_errors.get(&node).cloned(),
    }
}
