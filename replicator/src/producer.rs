//! A client that appends records over the control connection.
//!
//! Records gather into one batch per partition. A batch is sent when it has reached
//! [`ProducerConfig::batch_size`] or its first record is [`ProducerConfig::linger`] old; several are
//! under way to each leader at a time, at most [`ProducerConfig::in_flight_max`]. Keyed records go
//! where Kafka's murmur2 partitioner sends them, others round robin.
//!
//! ```text
//! send(key, value) -> partition's batch --full or old--> Append -> leader
//!                                        in flight <= max         |
//!          acknowledged(partition) <---------------- Appended <---+ committed as `acks` asks
//! ```
//!
//! This is the simple produce path of the command line and the tests: a broker appends to the library
//! directly. There is no thread behind it: time passes only inside its methods.
//!
//! When a partition's leader changes, the new one is asked for, and gets what the old one has not taken. A
//! batch whose answer was lost may be in the log; it is sent again only if
//! [`ProducerConfig::resends_unknown`] says so. After an error the producer is of no use.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use thiserror::Error;

use crate::cluster::Cluster;
use crate::control::{
    Acks, Append, BATCH_LEN_MAX, Connection, ControlError, ErrorCode, ErrorReply, Hello, Message,
};
use crate::leaders::Leaders;
use crate::record::BatchBuilder;
use crate::record::partitioner::partition_for_key;

/// How often nodes are asked who leads, while a batch waits for that.
const ASK_INTERVAL: Duration = Duration::from_millis(20);
/// How long leaders may be out of reach when a producer begins.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// How a [`Producer`] gathers and sends.
#[derive(Debug, Clone)]
pub struct ProducerConfig {
    /// When the leader answers.
    pub acks: Acks,
    /// A batch of this many bytes is sent; it may be longer by its last record.
    pub batch_size: usize,
    /// A batch older than this is sent by [`Producer::poll`] or the next record of its partition.
    pub linger: Duration,
    /// Most unanswered batches per leader.
    pub in_flight_max: usize,
    /// How long a batch may take, with all attempts to send it.
    pub request_timeout: Duration,
    /// Whether a batch is sent again that may be in the log already, because its leader died or lost its
    /// leadership before it answered: no record is lost then, and some may be there twice.
    pub resends_unknown: bool,
}

impl Default for ProducerConfig {
    /// Acknowledged by all in-sync replicas, batches of 64 KiB, 5 ms, 8 in flight, 30 s, nothing twice.
    fn default() -> Self {
        Self {
            acks: Acks::Replicated,
            batch_size: 64 << 10,
            linger: Duration::from_millis(5),
            in_flight_max: 8,
            request_timeout: Duration::from_secs(30),
            resends_unknown: false,
        }
    }
}

/// Appends records to one topic.
#[derive(Debug)]
pub struct Producer {
    cluster: Cluster,
    topic: String,
    config: ProducerConfig,
    batch_len_max: usize,
    partitions: Vec<PartitionBatch>,
    leaders: Leaders,
    links: Vec<Link>,
    /// Batches that no leader has, oldest first, and why.
    homeless: VecDeque<(InFlight, ProducerError)>,
    /// When to ask again who leads.
    ask_at: Instant,
    next_partition: u32,
    next_correlation: u64,
}

/// The batch of one partition that is being gathered.
#[derive(Debug)]
struct PartitionBatch {
    builder: BatchBuilder,
    opened: Instant,
    acknowledged: Option<i64>,
}

/// The connection to a node that leads partitions.
#[derive(Debug)]
struct Link {
    node: u32,
    connection: Connection,
    in_flight: VecDeque<InFlight>,
    /// A batch was not taken: the node takes no more on this connection.
    is_barred: bool,
}

/// A batch built and not acknowledged.
#[derive(Debug)]
struct InFlight {
    partition: u32,
    correlation: u64,
    record_count: usize,
    /// When it was sent first.
    sent: Instant,
    append: Message,
}

impl Producer {
    /// Connects to every leader of the topic.
    ///
    /// # Errors
    ///
    /// [`ProducerError::UnknownTopic`], or [`ProducerError::Control`] if no leader can be reached within
    /// the request's time.
    pub fn connect(
        cluster: &Cluster,
        topic: &str,
        config: ProducerConfig,
    ) -> Result<Self, ProducerError> {
        let spec = cluster
            .topic(topic)
            .ok_or_else(|| ProducerError::UnknownTopic {
                topic: topic.to_owned(),
            })?;
        let batch_len_max = spec.batch_len_max().min(BATCH_LEN_MAX);
        let batch = |_| PartitionBatch {
            builder: BatchBuilder::new(batch_len_max),
            opened: Instant::now(),
            acknowledged: None,
        };
        let mut producer = Self {
            cluster: cluster.clone(),
            topic: topic.to_owned(),
            config,
            batch_len_max,
            partitions: (0..spec.partition_count()).map(batch).collect(),
            leaders: Leaders::new(cluster, topic),
            links: Vec::new(),
            homeless: VecDeque::new(),
            ask_at: Instant::now(),
            next_partition: 0,
            next_correlation: 1,
        };
        for partition in 0..producer.partition_count() {
            producer.connect_leader(partition)?;
        }
        Ok(producer)
    }

    fn connect_leader(&mut self, partition: u32) -> Result<(), ProducerError> {
        let begun = Instant::now();
        while let Err(error) = self.link_to(partition) {
            let patience = self.config.request_timeout.min(CONNECT_PATIENCE);
            if !error.may_pass() || begun.elapsed() >= patience {
                return Err(error);
            }
            // That node may be as dead as the leader: another one is asked next time.
            let _ = self.leaders.refresh(&self.cluster);
            thread::sleep(ASK_INTERVAL);
        }
        Ok(())
    }

    /// The connection to the partition's leader, made if need be.
    fn link_to(&mut self, partition: u32) -> Result<usize, ProducerError> {
        let Some(node) = self.leaders.of(partition) else {
            return Err(ProducerError::NoLeader { partition });
        };
        if let Some(index) = self.links.iter().position(|link| link.node == node) {
            return Ok(index);
        }
        self.links.push(Link::connect(&self.cluster, node)?);
        Ok(self.links.len() - 1)
    }

    /// Adds a record to its partition's batch and returns the partition. Blocks while too many batches
    /// are unanswered.
    ///
    /// # Errors
    ///
    /// [`ProducerError::RecordTooLarge`] leaves the producer usable; any other may also concern an
    /// earlier record, and ends its use.
    pub fn send(&mut self, key: Option<&[u8]>, value: Option<&[u8]>) -> Result<u32, ProducerError> {
        let partition = self.partition_of(key);
        if !self.append(partition, key, value) {
            if !self.partitions[partition as usize].builder.is_empty() {
                self.send_batch(partition)?;
            }
            if !self.append(partition, key, value) {
                return Err(ProducerError::RecordTooLarge {
                    record_len: key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len),
                    batch_len_max: self.batch_len_max,
                });
            }
        }
        let batch = &self.partitions[partition as usize];
        if batch.builder.len() >= self.config.batch_size
            || batch.opened.elapsed() >= self.config.linger
        {
            self.send_batch(partition)?;
        }
        Ok(partition)
    }

    /// Sends the batches that are old enough and takes the answers that have come. To be called now
    /// and then by who does not call [`Producer::send`] all the time.
    ///
    /// # Errors
    ///
    /// As [`Producer::flush`].
    pub fn poll(&mut self) -> Result<(), ProducerError> {
        self.send_batches_older_than(self.config.linger)?;
        self.rehome()?;
        self.take_answers()
    }

    /// Sends everything and waits until it is acknowledged.
    ///
    /// # Errors
    ///
    /// [`ProducerError::Refused`] if a leader did not take a batch and never will,
    /// [`ProducerError::Timeout`] if it does not answer in time, [`ProducerError::Unknown`] if the
    /// connection broke before it did. A batch that was not taken because its leader has changed goes to
    /// the new one.
    pub fn flush(&mut self) -> Result<(), ProducerError> {
        self.send_batches_older_than(Duration::ZERO)?;
        while !self.homeless.is_empty() || self.links.iter().any(|link| !link.in_flight.is_empty())
        {
            self.wait()?;
        }
        Ok(())
    }

    /// The offset after the partition's last acknowledged record of this producer, if there is one.
    pub fn acknowledged(&self, partition: u32) -> Option<i64> {
        self.partitions.get(partition as usize)?.acknowledged
    }

    fn partition_of(&mut self, key: Option<&[u8]>) -> u32 {
        let count = self.partition_count();
        match key {
            Some(key) => partition_for_key(key, count),
            None => {
                let partition = self.next_partition;
                self.next_partition = (partition + 1) % count;
                partition
            }
        }
    }

    fn partition_count(&self) -> u32 {
        u32::try_from(self.partitions.len()).expect("a cluster file bounds partitions")
    }

    fn append(&mut self, partition: u32, key: Option<&[u8]>, value: Option<&[u8]>) -> bool {
        let batch = &mut self.partitions[partition as usize];
        if batch.builder.is_empty() {
            batch.opened = Instant::now();
        }
        batch.builder.append(now_ms(), key, value, &[])
    }

    fn send_batches_older_than(&mut self, age: Duration) -> Result<(), ProducerError> {
        for partition in 0..self.partition_count() {
            let batch = &self.partitions[partition as usize];
            if !batch.builder.is_empty() && batch.opened.elapsed() >= age {
                self.send_batch(partition)?;
            }
        }
        Ok(())
    }

    fn send_batch(&mut self, partition: u32) -> Result<(), ProducerError> {
        self.take_answers()?;
        while self.is_full(partition) {
            self.wait()?;
        }
        let correlation = self.next_correlation;
        self.next_correlation += 1;
        let batch = &mut self.partitions[partition as usize];
        let append = Append {
            correlation,
            topic: self.topic.clone(),
            partition,
            acks: self.config.acks,
            batch: batch.builder.build().to_vec(),
        };
        let built = InFlight {
            partition,
            correlation,
            record_count: batch.builder.records_count(),
            sent: Instant::now(),
            append: append.into(),
        };
        batch.builder.clear();
        self.dispatch(built)
    }

    /// Whether as many batches wait for the partition's leader as may.
    fn is_full(&self, partition: u32) -> bool {
        let leader = self.leaders.of(partition);
        let link = self.links.iter().find(|link| Some(link.node) == leader);
        let in_flight = link.map_or(0, |link| link.in_flight.len());
        in_flight.max(self.homeless.len()) >= self.config.in_flight_max
    }

    /// Sends a batch to its partition's leader, or keeps it until there is one.
    fn dispatch(&mut self, batch: InFlight) -> Result<(), ProducerError> {
        // Behind another one of the partition that waits, it waits too, so that their order stays.
        let partition = batch.partition;
        if self
            .homeless
            .iter()
            .any(|(other, _)| other.partition == partition)
        {
            self.keep(batch, ProducerError::NoLeader { partition });
            return Ok(());
        }
        let index = match self.link_to(partition) {
            Ok(index) => index,
            Err(error) => {
                self.keep(batch, error);
                return Ok(());
            }
        };
        let link = &mut self.links[index];
        if link.is_barred {
            self.keep(batch, ProducerError::NoLeader { partition });
            return Ok(());
        }
        link.in_flight.push_back(batch);
        let batch = link.in_flight.back().expect("it was pushed just now");
        match link.connection.send(&batch.append) {
            Ok(()) => Ok(()),
            Err(source) => self.lose(index, source),
        }
    }

    /// A connection broke: what was on its way may have been appended or not.
    fn lose(&mut self, index: usize, source: ControlError) -> Result<(), ProducerError> {
        let link = self.links.swap_remove(index);
        self.ask_at = Instant::now();
        if link.in_flight.is_empty() {
            return Ok(());
        }
        let (node, count) = (link.node, link.in_flight.len());
        if !self.config.resends_unknown {
            return Err(ProducerError::Unknown {
                node,
                count,
                source,
            });
        }
        for batch in link.in_flight {
            let partition = batch.partition;
            self.keep(batch, ProducerError::NoLeader { partition });
        }
        Ok(())
    }

    /// Keeps a batch until somebody takes it, in the order in which batches were built.
    fn keep(&mut self, batch: InFlight, error: ProducerError) {
        let is_older = |(other, _): &(InFlight, _)| other.correlation < batch.correlation;
        let place = self.homeless.partition_point(is_older);
        self.homeless.insert(place, (batch, error));
    }

    /// Asks who leads, and sends what waits for a leader.
    fn rehome(&mut self) -> Result<(), ProducerError> {
        if self.homeless.is_empty() || Instant::now() < self.ask_at {
            return Ok(());
        }
        // What a connection has taken is answered first: it comes before what it has not.
        if self
            .links
            .iter()
            .any(|link| link.is_barred && !link.in_flight.is_empty())
        {
            return Ok(());
        }
        self.links.retain(|link| !link.is_barred);
        self.ask_at = Instant::now() + ASK_INTERVAL;
        // Another node is asked next time.
        let _ = self.leaders.refresh(&self.cluster);
        for (batch, error) in std::mem::take(&mut self.homeless) {
            if batch.sent.elapsed() >= self.config.request_timeout {
                return Err(error);
            }
            self.dispatch(batch)?;
        }
        Ok(())
    }

    /// Waits a moment for something to happen, as long as the oldest batch may take.
    fn wait(&mut self) -> Result<(), ProducerError> {
        self.rehome()?;
        let timeout = self.config.request_timeout;
        for index in 0..self.links.len() {
            let link = &self.links[index];
            let Some(oldest) = link.in_flight.front() else {
                continue;
            };
            let left = timeout.saturating_sub(oldest.sent.elapsed());
            let node = link.node;
            if self.take_answer(index, left.min(ASK_INTERVAL))? {
                return Ok(());
            }
            if left.is_zero() {
                return Err(ProducerError::Timeout { node, timeout });
            }
        }
        if self.links.iter().all(|link| link.in_flight.is_empty()) {
            thread::sleep(self.ask_at.saturating_duration_since(Instant::now()));
        }
        Ok(())
    }

    fn take_answers(&mut self) -> Result<(), ProducerError> {
        // From the last on: a connection that is lost gives its place to the last one.
        for index in (0..self.links.len()).rev() {
            while index < self.links.len() && self.take_answer(index, Duration::ZERO)? {}
        }
        Ok(())
    }

    /// Takes one answer if one comes within `timeout`; says whether anything happened.
    fn take_answer(&mut self, index: usize, timeout: Duration) -> Result<bool, ProducerError> {
        let link = &mut self.links[index];
        if link.in_flight.is_empty() {
            return Ok(false);
        }
        let node = link.node;
        match link.connection.receive_timeout(timeout) {
            Ok(None) => Ok(false),
            Ok(Some(Message::Appended(answer))) => {
                let batch = link.take_in_flight(answer.correlation)?;
                let next_offset = answer
                    .base_offset
                    .saturating_add_unsigned(batch.record_count as u64);
                self.partitions[batch.partition as usize].acknowledged = Some(next_offset);
                Ok(true)
            }
            Ok(Some(Message::Error(error))) => self.refused(index, error).map(|()| true),
            Ok(Some(other)) => {
                let kind = other.kind();
                Err(ProducerError::Unexpected { node, kind })
            }
            Err(source) => self.lose(index, source).map(|()| true),
        }
    }

    /// A batch was not taken. If another leader may take it, or this one later, it waits for that.
    fn refused(&mut self, index: usize, error: ErrorReply) -> Result<(), ProducerError> {
        let link = &mut self.links[index];
        let batch = link.take_in_flight(error.correlation).ok();
        let refused = ProducerError::Refused {
            node: link.node,
            partition: batch.as_ref().map(|batch| batch.partition),
            code: error.code,
            message: error.message,
        };
        match batch {
            Some(batch) if error.code.is_retriable() || self.may_resend(error.code) => {
                self.links[index].is_barred = true;
                self.keep(batch, refused);
                Ok(())
            }
            _ => Err(refused),
        }
    }

    fn may_resend(&self, code: ErrorCode) -> bool {
        code == ErrorCode::OUTCOME_UNKNOWN && self.config.resends_unknown
    }
}

impl Link {
    fn connect(cluster: &Cluster, node: u32) -> Result<Self, ProducerError> {
        let unreachable = |source| ProducerError::Control { node, source };
        let spec = cluster
            .node(node)
            .ok_or(ProducerError::UnknownNode { node })?;
        let hello = Hello::client(cluster.hash());
        let connection =
            Connection::connect_node(&spec.address, node, &hello).map_err(unreachable)?;
        Ok(Self {
            node,
            connection,
            in_flight: VecDeque::new(),
            is_barred: false,
        })
    }

    fn take_in_flight(&mut self, correlation: u64) -> Result<InFlight, ProducerError> {
        let index = self
            .in_flight
            .iter()
            .position(|batch| batch.correlation == correlation);
        index.and_then(|index| self.in_flight.remove(index)).ok_or(
            ProducerError::UnknownCorrelation {
                node: self.node,
                correlation,
            },
        )
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Records could not be appended.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProducerError {
    /// The cluster file has no such topic.
    #[error("the cluster file has no topic `{topic}`")]
    UnknownTopic {
        /// The topic asked for.
        topic: String,
    },
    /// The record alone exceeds the largest batch; nothing was appended.
    #[error(
        "record of {record_len} bytes does not fit the topic's largest batch of {batch_len_max} bytes"
    )]
    RecordTooLarge {
        /// Bytes of key and value.
        record_len: usize,
        /// Bytes of the largest batch, header and record framing included.
        batch_len_max: usize,
    },
    /// A leader did not take a batch.
    #[error("node {node} refused a batch{}: {message} [{code}]", of_partition(*.partition))]
    Refused {
        /// The leader.
        node: u32,
        /// The batch's partition, if the error concerns one batch.
        partition: Option<u32>,
        /// Why.
        code: ErrorCode,
        /// The cause in the leader's words.
        message: String,
    },
    /// A leader did not answer. Whether its unanswered batches are in the log is unknown.
    #[error("node {node} did not acknowledge a batch within {timeout:?}")]
    Timeout {
        /// The leader.
        node: u32,
        /// How long was waited.
        timeout: Duration,
    },
    /// A leader sent something that answers no append.
    #[error("node {node} sent message type {kind} to a producer")]
    Unexpected {
        /// The leader.
        node: u32,
        /// The type number.
        kind: u16,
    },
    /// A leader answered a batch that was not sent.
    #[error("node {node} answered batch {correlation}, which is not in flight")]
    UnknownCorrelation {
        /// The leader.
        node: u32,
        /// What it answered.
        correlation: u64,
    },
    /// A connection broke before batches were answered. Whether they are in the log is unknown.
    #[error(
        "leader node {node}: {source}; whether the last {count} batches are in the log is unknown"
    )]
    Unknown {
        /// The leader.
        node: u32,
        /// How many batches.
        count: usize,
        /// The cause.
        source: ControlError,
    },
    /// No node leads a partition, as far as those know that answer.
    #[error("partition {partition} has no leader")]
    NoLeader {
        /// The partition.
        partition: u32,
    },
    /// The leader is not in the cluster file.
    #[error("the leader, node {node}, is not in the cluster file")]
    UnknownNode {
        /// The leader.
        node: u32,
    },
    /// The connection to a leader could not be set up.
    #[error("leader node {node}: {source}")]
    Control {
        /// The leader.
        node: u32,
        /// The cause.
        source: ControlError,
    },
}

impl ProducerError {
    /// Whether a leader that is out of reach may come back, or another one take its place.
    fn may_pass(&self) -> bool {
        use ControlError::{Closed, Connect, Io, Timeout};
        match self {
            Self::NoLeader { .. } => true,
            Self::Control { source, .. } => matches!(
                source,
                Connect { .. } | Closed { .. } | Io { .. } | Timeout { .. }
            ),
            _ => false,
        }
    }
}

fn of_partition(partition: Option<u32>) -> String {
    partition
        .map(|partition| format!(" of partition {partition}"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
