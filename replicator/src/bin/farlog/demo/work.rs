//! The demo's worker: one phase after the other, measured.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::ChildStdout;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use replicator::cluster::Cluster;
use replicator::control::{Connection, Hello, Message, StatusRequest};
use serde_json::Value;

use super::append::{Appended, Appending};
use super::children::cpu_time;
use super::consumer::{self, ConsumerReport};
use super::frames::{self, Frame};
use super::report::{Cpu, Device, Fetch, Latency, Report};
use super::setup::TOPIC;
use super::verify::{Verified, Verifier, expectations};
use crate::error::CliError;
use crate::input::Input;
use crate::produce::Acks;

const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
const PIPE_BUFFER_LEN: usize = 256 << 10;

/// What to do.
pub(crate) struct Plan {
    pub(crate) input: Input,
    pub(crate) key_column: Option<usize>,
    pub(crate) has_header: bool,
    pub(crate) acks: Acks,
    pub(crate) followers: u32,
    pub(crate) cluster_file: PathBuf,
    /// Where the segment files are, for the report.
    pub(crate) data_dir: String,
}

/// The ends through which the processes are heard and told.
pub(crate) struct Outlets {
    /// Pid and standard output of each node, the leader first.
    pub(crate) nodes: Vec<(u32, ChildStdout)>,
    pub(crate) consumer_pid: u32,
    pub(crate) consumer: ChildStdout,
}

/// What the worker says to the thread that watches the processes and holds their standard inputs.
pub(crate) enum Event {
    /// A line for the consumer.
    TellConsumer(String),
    /// The worker is done.
    Done(Result<Box<Report>, CliError>),
}

/// Shows that something moves, and what is being done.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heartbeat(Arc<(AtomicU64, Mutex<&'static str>)>);

impl Heartbeat {
    pub(crate) fn count(&self) -> u64 {
        self.0.0.load(Ordering::Relaxed)
    }

    pub(crate) fn phase(&self) -> &'static str {
        *self.0.1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts only; no other memory is published by it.
    pub(crate) fn beat(&self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, phase: &'static str) {
        *self.0.1.lock().unwrap_or_else(PoisonError::into_inner) = phase;
        self.beat();
    }
}

/// Starts the worker; the last event it sends is [`Event::Done`].
pub(crate) fn spawn(
    plan: Plan,
    outlets: Outlets,
    heartbeat: Heartbeat,
) -> Result<Receiver<Event>, CliError> {
    let (sender, receiver) = unbounded();
    start_thread("demo", move || {
        let result = work(plan, outlets, &heartbeat, &sender).map(Box::new);
        let _ = sender.send(Event::Done(result)); // nobody listens once the demo has failed elsewhere
    })?;
    Ok(receiver)
}

fn start_thread(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), CliError> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
    thread
        .map(drop)
        .map_err(|error| CliError::new("cannot start a thread", error))
}

/// One line per phase, for whoever watches.
pub(crate) fn say(line: &str) {
    eprintln!("demo: {line}");
}

fn work(
    plan: Plan,
    mut outlets: Outlets,
    heartbeat: &Heartbeat,
    events: &Sender<Event>,
) -> Result<Report, CliError> {
    let cluster = Cluster::load(&plan.cluster_file)?;
    let partitions = cluster
        .topic(TOPIC)
        .map_or(0, |topic| topic.partition_count());

    heartbeat.enter("while the nodes start");
    let started = Instant::now();
    let node_devices = wait_until_ready(&mut outlets.nodes, heartbeat)?;
    say(&format!(
        "{} nodes are up after {:.2} s",
        node_devices.len(),
        started.elapsed().as_secs_f64()
    ));

    tell_consumer(events, consumer::START.to_owned());
    heartbeat.enter("while records are appended");
    let (expectations, verifier, on_the_way) = expectations(plan.key_column, partitions);
    let comparing = Comparing::start(
        verifier,
        outlets.consumer,
        heartbeat.clone(),
        events.clone(),
    )?;
    let appending = Appending::connect(
        &cluster,
        plan.acks,
        expectations,
        on_the_way,
        heartbeat.clone(),
    )?;
    let watched = watched(&outlets.nodes, outlets.consumer_pid);
    let cpu_before = cpu_times(&watched);
    let appended = appending.run(&plan.input, plan.has_header, partitions)?;
    let cpu = cpu_used(&watched, &cpu_before);
    let committed = Instant::now();
    say(&format!(
        "{} records are committed after {:.2} s",
        appended.records,
        appended.time.as_secs_f64()
    ));

    heartbeat.enter("while the consumer reads");
    let ends: Vec<_> = appended.ends.iter().map(i64::to_string).collect();
    tell_consumer(events, ends.join(" "));
    let compared = comparing.wait()?;
    if compared.verified.records != appended.records {
        let cause = format!(
            "{} of {} records came back",
            compared.verified.records, appended.records
        );
        return Err(CliError::new("the consumer", cause).exit_code(CliError::MISMATCH));
    }
    let status = leader_status(&cluster)?;
    say(&format!(
        "all of them came back; each of {} replicas was read again",
        compared.report.replicas.len()
    ));
    report(
        plan,
        &appended,
        compared,
        committed,
        cpu,
        node_devices,
        &status,
    )
}

fn tell_consumer(events: &Sender<Event>, line: String) {
    let _ = events.send(Event::TellConsumer(line)); // nobody listens once the demo has failed elsewhere
}

/// Waits until each node has said that it is ready; returns their devices.
fn wait_until_ready(
    nodes: &mut [(u32, ChildStdout)],
    heartbeat: &Heartbeat,
) -> Result<Vec<String>, CliError> {
    let mut devices = Vec::new();
    for (index, (_, stdout)) in nodes.iter_mut().enumerate() {
        let mut line = String::new();
        // A node says this one line and nothing else, so nothing is lost with this reader's buffer.
        BufReader::new(stdout)
            .read_line(&mut line)
            .map_err(|error| CliError::new(format!("node {}", index + 1), error))?;
        let Some((_, device)) = line.trim_end().rsplit_once("device ") else {
            let cause = format!("it did not say that it is ready, but {line:?}");
            return Err(CliError::new(format!("node {}", index + 1), cause));
        };
        devices.push(device.to_owned());
        heartbeat.beat();
    }
    Ok(devices)
}

/// The thread that compares what the consumer hands back.
struct Comparing(Receiver<Compared>);

/// The outcome of the comparison.
struct Compared {
    verified: Verified,
    /// When the last record was there.
    complete: Instant,
    report: ConsumerReport,
}

impl Comparing {
    /// A difference goes to the watcher at once: the worker may be waiting for something else.
    fn start(
        verifier: Verifier,
        output: ChildStdout,
        heartbeat: Heartbeat,
        events: Sender<Event>,
    ) -> Result<Self, CliError> {
        let (sender, receiver) = bounded(1);
        start_thread("compare", move || {
            let _ = match compare(verifier, output, &heartbeat) {
                Ok(compared) => sender.send(compared).is_ok(),
                Err(error) => events.send(Event::Done(Err(error))).is_ok(),
            }; // nobody listens once the demo has failed elsewhere
        })?;
        Ok(Self(receiver))
    }

    fn wait(self) -> Result<Compared, CliError> {
        let gone = |_| CliError::new("the comparison", "it ended early");
        self.0.recv().map_err(gone)
    }
}

fn compare(
    mut verifier: Verifier,
    output: ChildStdout,
    heartbeat: &Heartbeat,
) -> Result<Compared, CliError> {
    let mut input = BufReader::with_capacity(PIPE_BUFFER_LEN, output);
    let mut complete = Instant::now();
    loop {
        let frame = frames::read(&mut input)
            .map_err(|error| CliError::new("cannot read from the consumer", error))?;
        heartbeat.beat();
        match frame {
            Some(Frame::Record(record)) => {
                verifier.check(&record)?;
                complete = Instant::now();
            }
            Some(Frame::Progress) => {}
            Some(Frame::Report(json)) => {
                let report = serde_json::from_slice(&json)
                    .map_err(|error| CliError::new("the consumer's report", error))?;
                return Ok(Compared {
                    verified: verifier.finish()?,
                    complete,
                    report,
                });
            }
            None => {
                return Err(CliError::new(
                    "the consumer",
                    "it closed its output before it had everything",
                ));
            }
        }
    }
}

/// The processes whose CPU time is reported.
fn watched(nodes: &[(u32, ChildStdout)], consumer_pid: u32) -> Vec<(String, u32)> {
    let nodes = nodes
        .iter()
        .enumerate()
        .map(|(index, (pid, _))| (node_name(index), *pid));
    nodes
        .chain([("consumer".to_owned(), consumer_pid)])
        .collect()
}

fn node_name(index: usize) -> String {
    match index {
        0 => "leader, node 1".to_owned(),
        _ => format!("follower, node {}", index + 1),
    }
}

fn cpu_times(watched: &[(String, u32)]) -> Vec<Duration> {
    watched
        .iter()
        .map(|(_, pid)| cpu_time(*pid).unwrap_or_default())
        .collect()
}

fn cpu_used(watched: &[(String, u32)], before: &[Duration]) -> Vec<Cpu> {
    let used = cpu_times(watched)
        .into_iter()
        .zip(before)
        .map(|(now, before)| now.saturating_sub(*before));
    let named = watched.iter().zip(used);
    named
        .map(|((process, _), used)| Cpu {
            process: process.clone(),
            seconds: used.as_secs_f64(),
        })
        .collect()
}

/// What the leader says of itself.
fn leader_status(cluster: &Cluster) -> Result<Value, CliError> {
    let node = &cluster.nodes()[0];
    let mut connection =
        Connection::connect_node(&node.address, node.id, &Hello::client(cluster.hash()))?;
    connection.send(&StatusRequest { correlation: 1 }.into())?;
    match connection.receive_timeout(STATUS_TIMEOUT)? {
        Some(Message::Status(status)) => serde_json::from_str(&status.json)
            .map_err(|error| CliError::new("the leader's status", error)),
        other => Err(CliError::new(
            "the leader's status",
            format!("it answered {other:?}"),
        )),
    }
}

fn report(
    plan: Plan,
    appended: &Appended,
    compared: Compared,
    committed: Instant,
    cpu: Vec<Cpu>,
    node_devices: Vec<String>,
    status: &Value,
) -> Result<Report, CliError> {
    let seconds = appended.time.as_secs_f64().max(1e-9);
    let mut fetches = Vec::new();
    for replica in &compared.report.replicas {
        let name = node_name(replica.node.saturating_sub(1) as usize);
        if !replica.is_identical || replica.records != appended.records {
            let cause = format!(
                "its {} records are not byte for byte what was fetched first",
                replica.records
            );
            return Err(CliError::new(name, cause).exit_code(CliError::MISMATCH));
        }
        let mb_per_second = replica.bytes as f64 / 1e6 / replica.seconds.max(1e-9);
        fetches.push(Fetch {
            replica: name,
            records: replica.records,
            mb_per_second,
        });
    }
    let mut devices: Vec<_> = node_devices
        .into_iter()
        .enumerate()
        .map(|(index, device)| Device {
            process: node_name(index),
            device,
        })
        .collect();
    devices.push(Device {
        process: "consumer".to_owned(),
        device: compared.report.device,
    });
    Ok(Report {
        input: plan.input.name,
        records: appended.records,
        bytes: appended.bytes,
        partitions: u32::try_from(appended.ends.len()).unwrap_or(u32::MAX),
        keys: plan.key_column.map(|_| compared.verified.keys),
        followers: plan.followers,
        acks: match plan.acks {
            Acks::Leader => "leader",
            Acks::Replicated => "replicated",
        },
        append_seconds: seconds,
        records_per_second: appended.records as f64 / seconds,
        append_mb_per_second: appended.bytes as f64 / 1e6 / seconds,
        commit_latency_us: commit_latency(status),
        consumer_lag_seconds: compared
            .complete
            .saturating_duration_since(committed)
            .as_secs_f64(),
        fetches,
        cpu,
        devices,
        data_dir: plan.data_dir,
        segments: Vec::new(),
    })
}

fn commit_latency(status: &Value) -> Option<Latency> {
    let latency = status.get("commit_latency_us")?;
    let of = |name| latency.get(name).and_then(Value::as_f64);
    Some(Latency {
        p50: of("p50")?,
        p99: of("p99")?,
        p999: of("p999")?,
    })
}
