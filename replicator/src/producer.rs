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
//! directly. There is no thread behind it: time passes only inside its methods. Nothing is sent twice,
//! since a batch whose answer was lost may be in the log: after an error the producer is of no use.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use thiserror::Error;

use crate::cluster::Cluster;
use crate::control::{
    Acks, Append, BATCH_LEN_MAX, Connection, ControlError, ErrorCode, ErrorReply, Hello, Message,
};
use crate::record::BatchBuilder;
use crate::record::partitioner::partition_for_key;

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
    /// How long an answer may take.
    pub request_timeout: Duration,
}

impl Default for ProducerConfig {
    /// Acknowledged by all in-sync replicas, batches of 64 KiB, 5 ms, 8 in flight, 30 s.
    fn default() -> Self {
        Self {
            acks: Acks::Replicated,
            batch_size: 64 << 10,
            linger: Duration::from_millis(5),
            in_flight_max: 8,
            request_timeout: Duration::from_secs(30),
        }
    }
}

/// Appends records to one topic.
#[derive(Debug)]
pub struct Producer {
    topic: String,
    config: ProducerConfig,
    batch_len_max: usize,
    partitions: Vec<PartitionBatch>,
    leaders: Vec<Leader>,
    next_partition: u32,
    next_correlation: u64,
}

/// The batch of one partition that is being gathered.
#[derive(Debug)]
struct PartitionBatch {
    /// Index into [`Producer::leaders`].
    leader: usize,
    builder: BatchBuilder,
    opened: Instant,
    acknowledged: Option<i64>,
}

#[derive(Debug)]
struct Leader {
    node: u32,
    connection: Connection,
    in_flight: VecDeque<InFlight>,
}

/// A batch sent and not answered.
#[derive(Debug)]
struct InFlight {
    correlation: u64,
    partition: u32,
    record_count: usize,
    sent: Instant,
}

impl Producer {
    /// Connects to every leader of the topic.
    ///
    /// # Errors
    ///
    /// [`ProducerError::UnknownTopic`], or [`ProducerError::Control`] if a leader cannot be reached.
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
        let mut leaders: Vec<Leader> = Vec::new();
        let mut partitions = Vec::new();
        for replicas in &spec.replicas {
            let node = replicas[0];
            let leader = match leaders.iter().position(|leader| leader.node == node) {
                Some(leader) => leader,
                None => {
                    leaders.push(Leader::connect(cluster, node)?);
                    leaders.len() - 1
                }
            };
            partitions.push(PartitionBatch {
                leader,
                builder: BatchBuilder::new(batch_len_max),
                opened: Instant::now(),
                acknowledged: None,
            });
        }
        Ok(Self {
            topic: topic.to_owned(),
            config,
            batch_len_max,
            partitions,
            leaders,
            next_partition: 0,
            next_correlation: 1,
        })
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
        for leader in 0..self.leaders.len() {
            while self.take_answer(leader, Duration::ZERO)? {}
        }
        Ok(())
    }

    /// Sends everything and waits until it is acknowledged.
    ///
    /// # Errors
    ///
    /// [`ProducerError::Refused`] if a leader did not take a batch, [`ProducerError::Timeout`] if it
    /// does not answer, [`ProducerError::Control`] if the connection broke.
    pub fn flush(&mut self) -> Result<(), ProducerError> {
        self.send_batches_older_than(Duration::ZERO)?;
        for leader in 0..self.leaders.len() {
            while !self.leaders[leader].in_flight.is_empty() {
                self.wait_answer(leader)?;
            }
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
        let leader = self.partitions[partition as usize].leader;
        while self.take_answer(leader, Duration::ZERO)? {}
        while self.leaders[leader].in_flight.len() >= self.config.in_flight_max {
            self.wait_answer(leader)?;
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
        let leader = &mut self.leaders[leader];
        leader.in_flight.push_back(InFlight {
            correlation,
            partition,
            record_count: batch.builder.records_count(),
            sent: Instant::now(),
        });
        batch.builder.clear();
        leader.send(&append.into())
    }

    /// Waits for one answer as long as the oldest batch may take.
    fn wait_answer(&mut self, leader: usize) -> Result<(), ProducerError> {
        let timeout = self.config.request_timeout;
        let oldest = self.leaders[leader].in_flight.front();
        let waited = oldest.map_or(Duration::ZERO, |batch| batch.sent.elapsed());
        if self.take_answer(leader, timeout.saturating_sub(waited))? {
            return Ok(());
        }
        let node = self.leaders[leader].node;
        Err(ProducerError::Timeout { node, timeout })
    }

    /// Takes one answer if one comes within `timeout`.
    fn take_answer(&mut self, leader: usize, timeout: Duration) -> Result<bool, ProducerError> {
        let leader = &mut self.leaders[leader];
        if leader.in_flight.is_empty() {
            return Ok(false);
        }
        match leader.receive(timeout)? {
            None => Ok(false),
            Some(Message::Appended(answer)) => {
                let batch = leader.take_in_flight(answer.correlation)?;
                let next_offset = answer
                    .base_offset
                    .saturating_add_unsigned(batch.record_count as u64);
                self.partitions[batch.partition as usize].acknowledged = Some(next_offset);
                Ok(true)
            }
            Some(Message::Error(ErrorReply {
                code,
                correlation,
                message,
            })) => {
                let partition = leader
                    .take_in_flight(correlation)
                    .ok()
                    .map(|batch| batch.partition);
                Err(ProducerError::Refused {
                    node: leader.node,
                    partition,
                    code,
                    message,
                })
            }
            Some(other) => Err(ProducerError::Unexpected {
                node: leader.node,
                kind: other.kind(),
            }),
        }
    }
}

impl Leader {
    fn connect(cluster: &Cluster, node: u32) -> Result<Self, ProducerError> {
        let address = &cluster
            .node(node)
            .expect("replicas of a cluster are nodes")
            .address;
        let connection = Connection::connect_node(address, node, &Hello::client(cluster.hash()))
            .map_err(|source| ProducerError::Control { node, source })?;
        Ok(Self {
            node,
            connection,
            in_flight: VecDeque::new(),
        })
    }

    fn send(&mut self, message: &Message) -> Result<(), ProducerError> {
        let node = self.node;
        self.connection
            .send(message)
            .map_err(|source| ProducerError::Control { node, source })
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Message>, ProducerError> {
        let node = self.node;
        self.connection
            .receive_timeout(timeout)
            .map_err(|source| ProducerError::Control { node, source })
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
    /// The connection to a leader could not be set up, or broke.
    #[error("leader node {node}: {source}")]
    Control {
        /// The leader.
        node: u32,
        /// The cause.
        source: ControlError,
    },
}

fn of_partition(partition: Option<u32>) -> String {
    partition
        .map(|partition| format!(" of partition {partition}"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
