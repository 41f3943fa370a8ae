//! A consumer: rounds of RDMA READs, in the thread that polls.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use transport::{
    Completion, CompletionChannel, CompletionQueue, Context, DeviceSelector, LocalBuffer,
    ProtectionDomain,
};

use super::session::{ROUND_MAX, Reading, Session};
use crate::cluster::Cluster;
use crate::consumer::FetchFault;
use crate::leaders::Leaders;
use crate::record::BatchView;

/// A round without news is followed by a pause: at first, and at most.
pub(super) const PAUSE: (Duration, Duration) =
    (Duration::from_micros(50), Duration::from_millis(10));
/// A round's completions are polled for this long before the thread sleeps.
const SPIN: Duration = Duration::from_micros(100);
/// A round's completions come within this time, or the queue pair is given up.
const ROUND_TIMEOUT: Duration = Duration::from_secs(10);

/// How long replicas may be out of reach when a consumer begins, and how often they are tried.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// Where to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartOffset {
    /// At the first record there is.
    Earliest,
    /// Behind the last record committed now.
    Latest,
    /// At this offset.
    Offset(i64),
    /// At the first record that is not older than this, in milliseconds since 1970.
    Timestamp(i64),
}

/// Why nothing can be consumed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConsumerError {
    /// The cluster file has no such topic.
    #[error("the cluster file has no topic `{topic}`")]
    UnknownTopic {
        /// The topic asked for.
        topic: String,
    },
    /// The topic has no such partition, or the replica asked for does not hold it.
    #[error(
        "partition {partition} of topic `{topic}` is on nodes {replicas:?}; choose one of them"
    )]
    UnknownPartition {
        /// The topic.
        topic: String,
        /// The partition asked for.
        partition: u32,
        /// Who holds it.
        replicas: Vec<u32>,
    },
    /// The offset to start at does not exist.
    #[error(
        "offset {offset} of partition {partition} is outside of the committed log, {earliest} to {latest}"
    )]
    OffsetOutOfRange {
        /// The partition.
        partition: u32,
        /// The offset asked for.
        offset: i64,
        /// The first offset there is.
        earliest: i64,
        /// One past the last committed offset.
        latest: i64,
    },
    /// A replica cannot be reached, or could not be for long enough.
    #[error("node {node}: {cause}")]
    Replica {
        /// The replica.
        node: u32,
        /// Why.
        cause: String,
    },
    /// A replica's memory is no log, or does not reach back as far.
    #[error("node {node}, partition {partition}: {fault}")]
    Fetch {
        /// The replica.
        node: u32,
        /// The partition.
        partition: u32,
        /// What is wrong.
        fault: FetchFault,
    },
    /// The device, or memory for it.
    #[error(transparent)]
    Transport(#[from] transport::Error),
}

/// Reads the committed records of a topic out of replicas' memory.
///
/// Each partition is read from one replica, its leader unless told otherwise. When that goes away, the leader
/// then or another replica takes its place; one that was asked for by name is tried again for a while. Use
/// it from one thread.
#[derive(Debug)]
pub struct Consumer {
    device: Device,
    cluster: Cluster,
    topic: String,
    leaders: Leaders,
    /// The caller chose the replica.
    is_pinned: bool,
    sessions: Vec<Session>,
    /// What the last poll found: session, partition in it, bytes of its data.
    ready: Vec<(usize, usize, Range<usize>)>,
    completions: Vec<Completion>,
    pause: Duration,
}

#[derive(Debug)]
pub(super) struct Device {
    pub(super) context: Context,
    pub(super) pd: ProtectionDomain,
    pub(super) cq: CompletionQueue,
    _channel: CompletionChannel,
    started_at: Instant,
}

/// Committed batches, lent until the next poll.
#[derive(Debug)]
pub struct Fetch<'a> {
    consumer: &'a Consumer,
}

impl Fetch<'_> {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.consumer.ready.is_empty()
    }

    /// How many bytes the batches have.
    #[must_use]
    pub fn byte_len(&self) -> usize {
        self.consumer
            .ready
            .iter()
            .map(|(_, _, range)| range.len())
            .sum()
    }

    /// The batches with their partition, in order for each partition: views of the registered buffer that
    /// they were read into.
    ///
    /// The first batch after a start at an offset may begin before it: skip records below the offset.
    pub fn batches(&self) -> impl Iterator<Item = (u32, BatchView<'_>)> {
        self.consumer
            .ready
            .iter()
            .flat_map(|(session, slot, range)| {
                let reading = &self.consumer.sessions[*session].partitions[*slot];
                let data = reading
                    .data_buffer
                    .as_ref()
                    .map_or(&[][..], LocalBuffer::as_slice);
                let mut rest = &data[range.clone()];
                std::iter::from_fn(move || {
                    let (batch, behind) = BatchView::parse(rest).ok()?;
                    rest = behind;
                    Some((reading.partition, batch))
                })
            })
    }
}

impl Consumer {
    /// Opens partitions of a topic for reading; an empty list means all of them.
    ///
    /// # Errors
    ///
    /// [`ConsumerError`] if the topic, a partition or the offset does not exist, if a replica cannot be
    /// reached for 5 s, or for want of a device.
    pub fn open(
        cluster: &Cluster,
        topic: &str,
        partitions: &[u32],
        start: StartOffset,
        device: &DeviceSelector,
        from_replica: Option<u32>,
    ) -> Result<Self, ConsumerError> {
        let Some(spec) = cluster.topic(topic) else {
            return Err(ConsumerError::UnknownTopic {
                topic: topic.to_owned(),
            });
        };
        let all: Vec<u32> = (0..spec.partition_count()).collect();
        let wanted = if partitions.is_empty() {
            &all
        } else {
            partitions
        };
        if let Some(&partition) = wanted.iter().find(|&&partition| {
            let replicas = spec.replicas_of(partition);
            replicas.is_empty() || from_replica.is_some_and(|node| !replicas.contains(&node))
        }) {
            return Err(ConsumerError::UnknownPartition {
                topic: topic.to_owned(),
                partition,
                replicas: spec.replicas_of(partition).to_vec(),
            });
        }
        let mut consumer = Self {
            device: Device::open(device, wanted.len())?,
            cluster: cluster.clone(),
            topic: topic.to_owned(),
            leaders: Leaders::new(cluster, topic),
            is_pinned: from_replica.is_some(),
            sessions: Vec::new(),
            ready: Vec::new(),
            completions: Vec::new(),
            pause: PAUSE.0,
        };
        let begun = Instant::now();
        loop {
            // Without an answer those are tried that were known last, at first the preferred leaders.
            let _ = consumer.leaders.refresh(cluster);
            match consumer.begin(wanted, start, from_replica) {
                // A leader that has just died has a successor in a moment.
                Err(ConsumerError::Replica { .. }) if begun.elapsed() < CONNECT_PATIENCE => {
                    consumer.sessions.clear();
                    thread::sleep(CONNECT_INTERVAL);
                }
                result => return result.map(|()| consumer),
            }
        }
    }

    /// Connects to the partitions' leaders, or to the one replica that is wanted.
    fn begin(
        &mut self,
        wanted: &[u32],
        start: StartOffset,
        from_replica: Option<u32>,
    ) -> Result<(), ConsumerError> {
        let spec = self.cluster.topic(&self.topic);
        let mut by_node: Vec<(u32, Vec<u32>)> = Vec::new();
        for &partition in wanted {
            let preferred = spec.and_then(|spec| spec.preferred_leader_of(partition));
            let leader = self.leaders.of(partition).or(preferred);
            let node = from_replica.or(leader).unwrap_or_default();
            match by_node.iter_mut().find(|(known, _)| *known == node) {
                Some((_, list)) => list.push(partition),
                None => by_node.push((node, vec![partition])),
            }
        }
        for (node, partitions) in by_node {
            let mut session = Session::new(node, &partitions, wanted.len());
            session.connect(&self.device, &self.cluster, &self.topic)?;
            session.seek(&self.topic, start)?;
            self.sessions.push(session);
        }
        Ok(())
    }

    /// The name of the device in use.
    #[must_use]
    pub fn device(&self) -> &str {
        self.device.context.name()
    }

    /// The first offset of a partition that has not been returned.
    #[must_use]
    pub fn position(&self, partition: u32) -> Option<i64> {
        self.reading(partition)
            .map(|reading| reading.cursor.offset())
    }

    /// The high watermark of a partition as last seen.
    #[must_use]
    pub fn high_watermark(&self, partition: u32) -> Option<i64> {
        self.reading(partition)
            .map(|reading| reading.cursor.high_watermark())
    }

    fn reading(&self, partition: u32) -> Option<&Reading> {
        let mut all = self.sessions.iter().flat_map(|session| &session.partitions);
        all.find(|reading| reading.partition == partition)
    }

    /// Returns committed batches; none if there are no new ones within `timeout`.
    ///
    /// # Errors
    ///
    /// [`ConsumerError::Replica`] if a replica has been out of reach for 15 s, [`ConsumerError::Fetch`] if
    /// its memory is damaged. What was returned before stays valid; polling again tries again.
    pub fn poll(&mut self, timeout: Duration) -> Result<Fetch<'_>, ConsumerError> {
        let deadline = Instant::now() + timeout;
        self.ready.clear();
        loop {
            let is_idle = self.round()?;
            if !self.ready.is_empty() {
                self.pause = PAUSE.0;
                return Ok(Fetch { consumer: self });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Fetch { consumer: self });
            }
            if is_idle {
                thread::sleep(self.pause.min(left));
                self.pause = (self.pause * 2).min(PAUSE.1);
            } else {
                self.pause = PAUSE.0;
            }
        }
    }

    /// One round over all sessions. Says whether nothing more can be expected at once.
    fn round(&mut self) -> Result<bool, ConsumerError> {
        self.move_on();
        for session in &mut self.sessions {
            session.prepare(&self.device, &self.cluster, &self.topic)?;
        }
        self.collect()?;
        let mut is_idle = true;
        for (number, session) in self.sessions.iter_mut().enumerate() {
            is_idle &= session.finish(number, &self.device, &mut self.ready)?;
        }
        Ok(is_idle)
    }

    /// Has what a node served that is out of reach served by others.
    fn move_on(&mut self) {
        let failed = self.sessions.iter().position(Session::has_failed);
        let Some(failed) = failed.filter(|_| !self.is_pinned) else {
            return;
        };
        // Another node is asked next time.
        let _ = self.leaders.refresh(&self.cluster);
        let mut lost = self.sessions.swap_remove(failed);
        let mut by_node: Vec<(u32, Vec<Reading>)> = Vec::new();
        for reading in std::mem::take(&mut lost.partitions) {
            let node = self.another_replica(reading.partition, lost.node());
            match by_node.iter_mut().find(|(known, _)| *known == node) {
                Some((_, readings)) => readings.push(reading),
                None => by_node.push((node, vec![reading])),
            }
        }
        for (node, readings) in by_node {
            tracing::info!(from = lost.node(), to = node, "another replica is read");
            self.sessions.push(lost.moved(node, readings));
        }
    }

    /// The partition's leader, or if that is the one that is lost, the next of the replicas.
    fn another_replica(&self, partition: u32, lost: u32) -> u32 {
        let leader = self.leaders.of(partition).filter(|&leader| leader != lost);
        let spec = self.cluster.topic(&self.topic);
        let replicas = spec.map_or(&[][..], |spec| spec.replicas_of(partition));
        let behind = replicas.iter().skip_while(|&&node| node != lost).nth(1);
        leader
            .or(behind.copied())
            .or(replicas.first().copied())
            .unwrap_or(lost)
    }

    /// Waits for the completions of the round.
    fn collect(&mut self) -> Result<(), ConsumerError> {
        let begun = Instant::now();
        while self.sessions.iter().any(Session::is_waiting) {
            let mut completions = std::mem::take(&mut self.completions);
            let waited = begun.elapsed();
            if waited < SPIN {
                if self.device.cq.poll(&mut completions)? == 0 {
                    thread::yield_now();
                }
            } else {
                self.device
                    .cq
                    .poll_or_wait(&mut completions, Duration::from_millis(100))?;
            }
            for completion in completions.drain(..) {
                let owner = self
                    .sessions
                    .iter_mut()
                    .find(|session| session.owns(&completion));
                if let Some(session) = owner {
                    session.complete(completion);
                }
            }
            self.completions = completions;
            if waited > ROUND_TIMEOUT {
                for session in self
                    .sessions
                    .iter_mut()
                    .filter(|session| session.is_waiting())
                {
                    session.lose(&format!("reads do not complete within {ROUND_TIMEOUT:?}"));
                }
            }
        }
        Ok(())
    }
}

impl Device {
    fn open(selector: &DeviceSelector, partitions_count: usize) -> Result<Self, transport::Error> {
        let context = Context::open(selector)?;
        let pd = ProtectionDomain::alloc(&context)?;
        let channel = CompletionChannel::create(&context)?;
        // Twice what all sessions post: a new queue pair may come up before the old one is gone.
        let cqe = 4 * (2 * partitions_count + 2);
        let cq = CompletionQueue::create(&context, cqe, Some(&channel))?;
        Ok(Self {
            context,
            pd,
            cq,
            _channel: channel,
            started_at: Instant::now(),
        })
    }

    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.started_at.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Two READs for each partition of a round.
pub(super) fn send_wr(partitions_count: usize) -> u32 {
    u32::try_from(2 * partitions_count.clamp(1, ROUND_MAX)).unwrap_or(u32::MAX)
}
