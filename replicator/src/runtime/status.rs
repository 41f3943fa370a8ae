//! What a node says of itself.

use std::path::PathBuf;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

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
