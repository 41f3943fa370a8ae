//! `farlog demo`: a leader, followers and a consumer as processes of their own, real data through
//! all of them, and a comparison of what comes out with what went in.
//!
//! ```text
//!            +--- lines ---> leader ==RDMA WRITE==> follower, follower
//!   parent --+                  ^                       ^
//!            +<-- frames --- consumer ==RDMA READ======+
//! ```
//!
//! The main thread watches the processes, so that a death ends the demo at once whatever the worker
//! thread waits for; the worker appends, and a third thread compares what the consumer hands back.

mod append;
mod children;
pub(crate) mod consumer;
mod frames;
mod report;
mod setup;
mod verify;
mod work;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use transport::DeviceSelector;

use crate::error::CliError;
use crate::input::{BUNDLED_KEY_COLUMN, Input};
use crate::produce::{Acks, parse_column};
use children::{Process, Processes};
use report::Report;
use setup::{Layout, TOPIC};
use work::{Event, Heartbeat, Outlets, Plan};

/// How often the processes are looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// The demo is given up when nothing at all has moved for this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// A worker's error is often the effect of a death that shows a moment later.
const DEATH_GRACE: Duration = Duration::from_millis(500);

/// Replicate real data over RDMA between processes, and check that nothing is lost or reordered
///
/// Starts a leader, followers and a consumer as separate processes, appends the input (one record per
/// line), and verifies that the consumer got exactly the input: every partition in order, every key in
/// one partition. Then the whole log is fetched again from each replica and compared byte for byte.
/// Without --input a bundled file is used: all departures from New York City in January 2013, keyed
/// by the aircraft's tail number. Everything stays on this machine.
#[derive(Args)]
#[command(after_help = "\
Examples:
  farlog demo
  farlog demo --input flights-2013.csv.gz --header --key-column 12 --partitions 6
  farlog demo --device rxe0 --json
  seq 1000000 | farlog demo --input - --followers 1 --data-dir ./demo-data

Kill one of the processes (ps shows them) while a long input runs, to see it noticed.")]
pub(crate) struct DemoArgs {
    /// File to append, one record per line, - for standard input; gzip is recognised
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Column of comma-separated lines that is the record key, counted from 1
    #[arg(long, value_name = "N", value_parser = parse_column)]
    key_column: Option<usize>,
    /// The first line names the columns and is no record
    #[arg(long)]
    header: bool,
    /// Partitions of the topic
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    partitions: u32,
    /// Followers of the leader
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=16))]
    followers: u32,
    /// When an append counts
    #[arg(long, value_enum, default_value_t = Acks::Replicated)]
    acks: Acks,
    /// Device of all processes: auto, soft, or a name that `farlog devices` shows
    #[arg(long, env = "FARLOG_DEVICE", default_value = "auto")]
    device: DeviceSelector,
    /// Directory for the segment files, the cluster file and the logs; new or empty
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Print the report as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &DemoArgs) -> Result<(), CliError> {
    let device = shared_device(&args.device)?;
    let (input, key_column, has_header) = match &args.input {
        Some(path) => (Input::open(path)?, args.key_column, args.header),
        None => (
            Input::bundled()?,
            args.key_column.or(Some(BUNDLED_KEY_COLUMN)),
            true,
        ),
    };
    // From here on an interruption has to end processes and free log memory.
    let (sender, signals) = bounded(1);
    crate::signals::forward(sender)
        .map_err(|error| CliError::new("cannot watch signals", error))?;
    let layout = Layout::create(
        args.data_dir.as_deref(),
        1 + args.followers,
        args.partitions,
        &device,
    )?;
    let plan = Plan {
        input,
        key_column,
        has_header,
        acks: args.acks,
        followers: args.followers,
        cluster_file: layout.cluster_file.clone(),
        data_dir: layout.data_dir.display().to_string(),
    };
    let mut processes = Processes::default();
    let outlets = start(&layout, &mut processes, args.acks, &device)?;
    let heartbeat = Heartbeat::default();
    let result = work::spawn(plan, outlets, heartbeat.clone())
        .and_then(|worker| watch(&mut processes, &worker, &signals, &heartbeat));
    if let Err(error) = &result {
        // An orderly end takes the nodes a moment: whoever watches learns the cause first.
        work::say(&format!("{}; ending the processes", error.headline()));
    }
    let killed = processes.end();
    let mut report = result?;
    if !killed.is_empty() {
        let cause = "it did not shut down within 5 s and was killed";
        return Err(CliError::new(killed.join(", "), cause).help(format!(
            "its log is in {}; the records were verified before",
            layout.data_dir.display()
        )));
    }
    report.segments = layout.segments(1);
    let text = if args.json {
        serde_json::to_string_pretty(&report)
            .map_err(|error| CliError::new("cannot write JSON", error))?
            + "\n"
    } else {
        report.text()
    };
    crate::print(&text)
}

/// What each process is told: an address of the software device holds one process only.
fn shared_device(device: &DeviceSelector) -> Result<String, CliError> {
    match device {
        DeviceSelector::Soft(Some(_)) => Err(CliError::new(
            format!("device {device}"),
            "an address of the software device belongs to one process, and the demo has several",
        )
        .help("use --device soft: each process takes a free address of its own")),
        _ => Ok(device.to_string()),
    }
}

/// Starts all processes and returns the ends through which they are heard and told.
fn start(
    layout: &Layout,
    processes: &mut Processes,
    acks: Acks,
    device: &str,
) -> Result<Outlets, CliError> {
    let cluster_file = layout.cluster_file.display().to_string();
    let mut nodes = Vec::new();
    for node in 1..=layout.nodes {
        let (name, loss) = match (node, acks) {
            (1, _) => ("the leader, node 1".to_owned(), LEADER_LOSS),
            (_, Acks::Replicated) => (format!("the follower, node {node}"), FOLLOWER_LOSS),
            (_, Acks::Leader) => (
                format!("the follower, node {node}"),
                FOLLOWER_LOSS_ACKS_LEADER,
            ),
        };
        let args = [
            "serve",
            "--node",
            &node.to_string(),
            "--cluster",
            &cluster_file,
            "--data-dir",
            &layout.node_dir(node).display().to_string(),
            "--shm-dir",
            &layout
                .shm_dir
                .join(format!("node-{node}"))
                .display()
                .to_string(),
            "--device",
            device,
            "--exit-with-stdin",
        ];
        let log = layout.data_dir.join(format!("node-{node}.stderr"));
        let (process, stdout) = Process::spawn(name, loss, &args.map(str::to_owned), log)?;
        nodes.push((process.pid(), stdout));
        processes.push(process);
    }
    let args = [
        "demo-consumer",
        "--cluster",
        &cluster_file,
        "--topic",
        TOPIC,
        "--device",
        device,
    ];
    let log = layout.data_dir.join("consumer.stderr");

    let (process, stdout) = Process::spawn(
        CONSUMER.to_owned(),
        CONSUMER_LOSS,
        &args.map(str::to_owned),
        log,
    )?;
    let outlets = Outlets {
        nodes,
        consumer_pid: process.pid(),
        consumer: stdout,
    };
    processes.push(process);
    Ok(outlets)
}

const CONSUMER: &str = "the consumer";
const LEADER_LOSS: &str = "without its leader a partition takes no records; what was acknowledged is in the \
                           followers' memory (fail-over comes with a coordinator)";
const FOLLOWER_LOSS: &str = "with acks replicated nothing commits until all in-sync replicas have it; what was \
                             acknowledged before is in the memory of the others";
const FOLLOWER_LOSS_ACKS_LEADER: &str = "the leader goes on without it, but nothing commits that it has not; the \
                                         demo compares all replicas and needs them all";
const CONSUMER_LOSS: &str =
    "the log is not harmed: consumers only read; a new consumer can start at any offset";

/// Waits for the worker's result, the death of a process, an interruption, or a standstill.
fn watch(
    processes: &mut Processes,
    worker: &Receiver<Event>,
    signals: &Receiver<&'static str>,
    heartbeat: &Heartbeat,
) -> Result<Box<Report>, CliError> {
    let mut last_beat = (heartbeat.count(), Instant::now());
    loop {
        match worker.recv_timeout(WATCH_INTERVAL) {
            Ok(Event::TellConsumer(line)) => processes.tell(CONSUMER, &line)?,
            Ok(Event::Done(Ok(report))) => return Ok(report),
            Ok(Event::Done(Err(error))) => {
                return Err(processes.death_within(DEATH_GRACE).unwrap_or(error));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(CliError::new("the demo's worker thread", "it panicked")
                    .help("please report this"));
            }
        }
        if let Some(death) = processes.death() {
            return Err(death);
        }
        if let Ok(signal) = signals.try_recv() {
            return Err(CliError::new(
                "the demo",
                format!("it was interrupted by {signal}"),
            ));
        }
        if heartbeat.count() != last_beat.0 {
            last_beat = (heartbeat.count(), Instant::now());
        } else if last_beat.1.elapsed() > STALL_TIMEOUT {
            let cause = format!(
                "nothing has moved for {STALL_TIMEOUT:?} {}",
                heartbeat.phase()
            );
            return Err(CliError::new("the demo is stuck", cause).help(
                "the logs of the processes are in the data directory; FARLOG_LOG=debug makes them \
                 say more",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_for_several_processes_is_refused() {
        assert!(shared_device(&"soft@127.0.0.9".parse().unwrap()).is_err());
        assert_eq!(shared_device(&"soft".parse().unwrap()).unwrap(), "soft");
    }
}
