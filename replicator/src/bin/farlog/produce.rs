//! `farlog produce`: lines of a file into a topic.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use crossbeam::channel::RecvTimeoutError;
use indicatif::{HumanBytes, HumanCount};
use replicator::control;
use replicator::producer::{Producer, ProducerConfig, ProducerError};

use crate::error::{CliError, load_topic};
use crate::input::{Input, KeyColumn, Lot};
use crate::progress;

/// Append lines to a topic, one record per line
///
/// Each line becomes the value of a record. With --key-column a field of the comma-separated line
/// becomes the record's key: records with the same key go to the same partition (by Kafka's murmur2)
/// and stay in order. Records without a key go round robin. gzip input is recognised.
#[derive(Args)]
#[command(after_help = "\
Examples:
  farlog produce --cluster c.toml --topic flights flights.csv.gz
  farlog produce --cluster c.toml --topic flights --header --key-column 12 flights.csv
  echo hello | farlog produce --cluster c.toml --topic greetings")]
pub(crate) struct ProduceArgs {
    /// Cluster file
    #[arg(long, value_name = "FILE")]
    cluster: PathBuf,
    /// Topic to append to
    #[arg(long, value_name = "NAME")]
    topic: String,
    /// Column of comma-separated lines that is the record key, counted from 1
    #[arg(long, value_name = "N", value_parser = parse_column)]
    key_column: Option<usize>,
    /// The first line names the columns and is no record
    #[arg(long)]
    header: bool,
    /// When an append counts
    #[arg(long, value_enum, default_value_t = Acks::Replicated)]
    acks: Acks,
    /// Send a batch again that may be in the log already, because its leader died before it answered: no
    /// record is lost then, and some may be there twice
    #[arg(long)]
    resend_unknown: bool,
    /// File to read, - for standard input
    #[arg(value_name = "FILE", default_value = "-")]
    input: PathBuf,
}

/// When an append counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Acks {
    /// Once it is in the leader's log
    Leader,
    /// Once it is in the memory of every in-sync replica
    Replicated,
}

impl From<Acks> for control::Acks {
    fn from(acks: Acks) -> Self {
        match acks {
            Acks::Leader => Self::Leader,
            Acks::Replicated => Self::Replicated,
        }
    }
}

/// A column number, counted from 1.
pub(crate) fn parse_column(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("columns are counted from 1".to_owned()),
        Ok(column) => Ok(column),
        Err(error) => Err(format!("{error}")),
    }
}

pub(crate) fn run(args: &ProduceArgs) -> Result<(), CliError> {
    let cluster = load_topic(&args.cluster, &args.topic)?;
    let input = Input::open(&args.input)?;
    let config = ProducerConfig {
        acks: args.acks.into(),
        resends_unknown: args.resend_unknown,
        ..ProducerConfig::default()
    };
    let linger = config.linger;
    let producer = Producer::connect(&cluster, &args.topic, config)?;
    let mut appender = Appender {
        producer,
        keys: KeyColumn::new(args.key_column),
        skip: usize::from(args.header),
        records: 0,
        bytes: 0,
    };
    let started = Instant::now();
    appender
        .append_all(&input, linger, started)
        .map_err(|failure| {
            let error = match failure {
                Failure::Producer(error) => return error,
                Failure::Record(error) => error,
            };
            // What was read before is appended all the same, if the leaders still take it.
            match appender.producer.flush() {
                Ok(()) => error.and_help(format!(
                    "the {} records before it are appended",
                    appender.records
                )),
                Err(_) => error,
            }
        })?;
    let summary = appender.summary(started.elapsed());
    eprintln!(
        "appended {summary} from {} to topic `{}`",
        input.name, args.topic
    );
    Ok(())
}

/// Why appending ends early.
enum Failure {
    /// A record cannot be read or sent; the producer is usable.
    Record(CliError),
    /// The producer is of no use any more, and what became of its last batches is unknown.
    Producer(CliError),
}

impl From<CliError> for Failure {
    fn from(error: CliError) -> Self {
        Self::Record(error)
    }
}

impl From<ProducerError> for Failure {
    fn from(error: ProducerError) -> Self {
        match error {
            ProducerError::RecordTooLarge { .. } => Self::Record(error.into()),
            _ => Self::Producer(error.into()),
        }
    }
}

struct Appender {
    producer: Producer,
    keys: KeyColumn,
    /// First lines that are no records.
    skip: usize,
    records: u64,
    bytes: u64,
}

impl Appender {
    fn append_all(
        &mut self,
        input: &Input,
        linger: Duration,
        started: Instant,
    ) -> Result<(), Failure> {
        let progress = progress::line();
        loop {
            match input.lots.recv_timeout(linger) {
                Ok(lot) => self.append(&lot?)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.producer.poll()?;
            progress.set_message(self.summary(started.elapsed()));
        }
        progress.finish_and_clear();
        Ok(self.producer.flush()?)
    }

    fn append(&mut self, lot: &Lot) -> Result<(), Failure> {
        let skip = std::mem::take(&mut self.skip);
        self.keys.skip(skip);
        for line in lot.lines().skip(skip) {
            let key = self.keys.key_of(line)?;
            self.producer.send(key.as_deref(), Some(line))?;
            self.records += 1;
            self.bytes += line.len() as u64;
        }
        Ok(())
    }

    fn summary(&self, elapsed: Duration) -> String {
        format!(
            "{} records, {} in {:.1} s",
            HumanCount(self.records),
            HumanBytes(self.bytes),
            elapsed.as_secs_f64()
        )
    }
}
