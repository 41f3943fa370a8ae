//! The appending half of the demo: lines of the input into the topic.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;
use indicatif::{HumanCount, ProgressBar};
use replicator::cluster::Cluster;
use replicator::producer::{Producer, ProducerConfig};

use super::setup::TOPIC;
use super::verify::{Expectations, OnTheWay};
use super::work::Heartbeat;
use crate::error::CliError;
use crate::input::{Input, Lot};
use crate::produce::Acks;
use crate::progress;

/// Appending pauses while more than this is appended and not yet verified.
const UNVERIFIED_BYTES_MAX: u64 = 256 << 20;
const PAUSE: Duration = Duration::from_millis(1);

/// Appends lines and notes them as expected.
pub(crate) struct Appending {
    producer: Producer,
    expectations: Expectations,
    on_the_way: Arc<OnTheWay>,
    heartbeat: Heartbeat,
    linger: Duration,
    bar: ProgressBar,
    bytes: u64,
}

/// What was appended and committed.
pub(crate) struct Appended {
    pub(crate) records: u64,
    /// Bytes of the lines, without line feeds.
    pub(crate) bytes: u64,
    /// From the first line to the last acknowledgement.
    pub(crate) time: Duration,
    /// The end offset of each partition.
    pub(crate) ends: Vec<i64>,
}

impl Appending {
    pub(crate) fn connect(
        cluster: &Cluster,
        acks: Acks,
        expectations: Expectations,
        on_the_way: Arc<OnTheWay>,
        heartbeat: Heartbeat,
    ) -> Result<Self, CliError> {
        let config = ProducerConfig {
            acks: acks.into(),
            ..ProducerConfig::default()
        };
        let linger = config.linger;
        let producer = Producer::connect(cluster, TOPIC, config)?;
        Ok(Self {
            producer,
            expectations,
            on_the_way,
            heartbeat,
            linger,
            bar: progress::line(),
            bytes: 0,
        })
    }

    /// Appends the whole input and waits until it is acknowledged.
    pub(crate) fn run(
        mut self,
        input: &Input,
        has_header: bool,
        partitions: u32,
    ) -> Result<Appended, CliError> {
        let mut started = None;
        let mut skip = usize::from(has_header);
        loop {
            match input.lots.recv_timeout(self.linger) {
                Ok(lot) => {
                    started.get_or_insert_with(Instant::now);
                    self.append(lot?, std::mem::take(&mut skip))?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.producer.poll()?;
            self.heartbeat.beat();
        }
        self.producer.flush()?;
        self.bar.finish_and_clear();
        let records = self.expectations.line_count();
        if records == 0 {
            return Err(CliError::new(&input.name, "it has no record")
                .help("give an input with at least one line"));
        }
        Ok(Appended {
            records,
            bytes: self.bytes,
            time: started.map(|started| started.elapsed()).unwrap_or_default(),
            ends: (0..partitions)
                .map(|partition| self.producer.acknowledged(partition).unwrap_or(0))
                .collect(),
        })
    }

    fn append(&mut self, lot: Lot, skip: usize) -> Result<(), CliError> {
        while self.on_the_way.bytes() > UNVERIFIED_BYTES_MAX {
            self.producer.poll()?;
            thread::sleep(PAUSE);
        }
        let lot = Arc::new(lot);
        for planned in self.expectations.plan(&lot, skip)? {
            let line = lot.line(planned.index);
            let partition = self.producer.send(planned.key.as_deref(), Some(line))?;
            if partition != planned.partition {
                let cause = format!(
                    "the producer chose partition {partition}, expected was {}",
                    planned.partition
                );
                return Err(CliError::new("partitioning", cause).exit_code(CliError::MISMATCH));
            }
            self.bytes += line.len() as u64;
        }
        let (appended, verified) = (self.expectations.line_count(), self.on_the_way.verified());
        self.bar.set_message(format!(
            "{} appended, {} verified",
            HumanCount(appended),
            HumanCount(verified)
        ));
        Ok(())
    }
}
