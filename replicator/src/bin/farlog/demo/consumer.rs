//! The demo's consumer process: `farlog demo-consumer`, started by `farlog demo` only.
//!
//! It follows the topic from the start and hands every record to its parent. Once told where the log
//! ends, it reads everything again from each replica in turn, as fast as it can, and reports.

use std::io::{self, BufRead, BufWriter, Write};
use std::path::PathBuf;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use crossbeam::channel::{Receiver, unbounded};
use replicator::cluster::Cluster;
use replicator::record::BatchView;
use replicator::runtime::{Consumer, StartOffset};
use serde::{Deserialize, Serialize};

use transport::DeviceSelector;

use super::frames;
use crate::error::{CliError, load_topic};

/// The parent's first line: the nodes are up. Its second one holds the end offset of each partition.
pub(crate) const START: &str = "start";
/// How long a poll waits for records.
const POLL_TIMEOUT: Duration = Duration::from_millis(10);
/// A replica that yields nothing for this long will not.
const REREAD_TIMEOUT: Duration = Duration::from_secs(20);
/// How often the parent hears from us while it gets no records.
const SAY_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Args)]
pub(crate) struct DemoConsumerArgs {
    #[arg(long)]
    cluster: PathBuf,
    #[arg(long)]
    topic: String,
    #[arg(long)]
    device: DeviceSelector,
}

/// What the consumer reports at the end.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ConsumerReport {
    pub(crate) device: String,
    pub(crate) replicas: Vec<ReplicaRead>,
}

/// Everything read once more from one replica.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ReplicaRead {
    pub(crate) node: u32,
    pub(crate) records: u64,
    /// Bytes of record batches.
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    /// The batches are those that were fetched first, byte for byte.
    pub(crate) is_identical: bool,
}

pub(crate) fn run(args: &DemoConsumerArgs) -> Result<(), CliError> {
    let cluster = load_topic(&args.cluster, &args.topic)?;
    let parent = watch_parent()?;
    if parent.recv().as_deref() != Ok(START) {
        return Err(CliError::new(
            "demo-consumer",
            "it is started by `farlog demo` only",
        ));
    }
    let session = Session {
        cluster,
        topic: args.topic.clone(),
        device: args.device.clone(),
    };
    let mut out = BufWriter::with_capacity(256 << 10, io::stdout().lock());
    let (device, first, ends) = session.follow(&parent, &mut out)?;
    let mut replicas = Vec::new();
    for node in session.replicas() {
        replicas.push(session.reread(node, &ends, &first, &mut out)?);
    }
    let report = serde_json::to_vec(&ConsumerReport { device, replicas })
        .map_err(|error| CliError::new("cannot write the report", error))?;
    frames::write_report(&mut out, &report)
        .and_then(|()| out.flush())
        .map_err(write_failed)?;
    loop {
        thread::park(); // the parent ends us by closing our standard input
    }
}

fn write_failed(error: io::Error) -> CliError {
    CliError::new("cannot write to the parent process", error)
}

/// Ends this process when the parent is gone; until then yields the lines it sends.
fn watch_parent() -> Result<Receiver<String>, CliError> {
    let (sender, receiver) = unbounded();
    let run = move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let _ = sender.send(line); // nobody listens once this process is done
        }
        process::exit(0);
    };
    let thread = thread::Builder::new().name("parent".to_owned()).spawn(run);
    thread
        .map(|_| receiver)
        .map_err(|error| CliError::new("cannot start a thread", error))
}

struct Session {
    cluster: Cluster,
    topic: String,
    device: DeviceSelector,
}

/// What was read of one partition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    next_offset: i64,
    crc: u32,
}

impl Session {
    fn open(&self, from_replica: Option<u32>) -> Result<Consumer, CliError> {
        let start = StartOffset::Earliest;
        let all = &[];
        Ok(Consumer::open(
            &self.cluster,
            &self.topic,
            all,
            start,
            &self.device,
            from_replica,
        )?)
    }

    fn partition_count(&self) -> usize {
        self.cluster
            .topic(&self.topic)
            .map_or(0, |topic| topic.replicas.len())
    }

    fn replicas(&self) -> Vec<u32> {
        self.cluster
            .topic(&self.topic)
            .map(|topic| topic.replicas_of(0).to_vec())
            .unwrap_or_default()
    }

    /// Hands over records as they commit, until the parent has said where the log ends and we are there.
    fn follow(
        &self,
        parent: &Receiver<String>,
        out: &mut impl Write,
    ) -> Result<(String, Vec<Seen>, Vec<i64>), CliError> {
        let mut consumer = self.open(None)?;
        let device = consumer.device().to_owned();
        let mut seen = vec![Seen::default(); self.partition_count()];
        let mut known_ends = None;
        loop {
            let fetch = consumer.poll(POLL_TIMEOUT)?;
            let mut is_idle = true;
            for (partition, batch) in fetch.batches() {
                is_idle = false;
                note(&mut seen[partition as usize], &batch);
                for record in batch.records()? {
                    let record = record?;
                    frames::write_record(out, partition, record.offset, record.key, record.value)
                        .map_err(write_failed)?;
                }
            }
            if is_idle {
                out.flush().map_err(write_failed)?;
            }
            if let Ok(line) = parent.try_recv() {
                known_ends = Some(parse_ends(&line)?);
            }
            if let Some(ends) = known_ends.take_if(|ends| is_at(&seen, ends)) {
                out.flush().map_err(write_failed)?;
                return Ok((device, seen, ends));
            }
        }
    }

    /// Reads everything again from one replica and compares.
    fn reread(
        &self,
        node: u32,
        ends: &[i64],
        first: &[Seen],
        out: &mut impl Write,
    ) -> Result<ReplicaRead, CliError> {
        let mut consumer = self.open(Some(node))?;
        let mut seen = vec![Seen::default(); first.len()];
        let (mut records, mut bytes) = (0, 0);
        let started = Instant::now();
        let (mut progress, mut said) = (started, started);
        while !is_at(&seen, ends) {
            let fetch = consumer.poll(POLL_TIMEOUT)?;
            for (partition, batch) in fetch.batches() {
                note(&mut seen[partition as usize], &batch);
                records += u64::from(batch.records_count());
                bytes += batch.len() as u64;
                progress = Instant::now();
            }
            if said.elapsed() > SAY_INTERVAL {
                frames::write_progress(out).map_err(write_failed)?;
                said = Instant::now();
            }
            if progress.elapsed() > REREAD_TIMEOUT {
                let cause = format!(
                    "it yields no more records within {REREAD_TIMEOUT:?}; read to {seen:?}, ends {ends:?}"
                );
                return Err(CliError::new(format!("replica node {node}"), cause));
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        Ok(ReplicaRead {
            node,
            records,
            bytes,
            seconds,
            is_identical: seen == first,
        })
    }
}

fn parse_ends(line: &str) -> Result<Vec<i64>, CliError> {
    let ends = line
        .split_ascii_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>();
    ends.map_err(|error| CliError::new("the end offsets from the parent process", error))
}

fn note(seen: &mut Seen, batch: &BatchView<'_>) {
    seen.next_offset = batch.next_offset();
    seen.crc = crc32c::crc32c_append(seen.crc, batch.as_bytes());
}

fn is_at(seen: &[Seen], ends: &[i64]) -> bool {
    seen.iter()
        .zip(ends)
        .all(|(seen, end)| seen.next_offset >= *end)
}
