//! `farlog serve`: one node of a cluster.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::Args;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use replicator::cluster::{Cluster, NodeSpec};
use replicator::coordinator::CoordinatorConfig;
use replicator::runtime::{Node, NodeConfig};
use transport::DeviceSelector;

use crate::error::CliError;
use crate::signals;

/// How long a node that is told to end waits for appends, and for others to lead what it leads.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);
/// How often the node is asked whether it still works.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// Run one node of a cluster, in the foreground
///
/// The node leads the partitions whose replicas begin with its id in the cluster file, and follows
/// the others that name it. With etcd as coordinator any replica that is in sync may come to lead: the
/// first one only begins, and an orderly end hands over what the node leads. It prints one line when it is ready, and shuts down in order on SIGINT
/// (Ctrl-C) and SIGTERM. Its log memory stays in shared memory, so that a restart continues where it
/// ended; segment files are in the data directory.
#[derive(Args)]
#[command(after_help = "\
A cluster file of two nodes:
  [[nodes]]
  id = 1
  address = \"127.0.0.1:7001\"

  [[nodes]]
  id = 2
  address = \"127.0.0.1:7002\"

  [[topics]]
  name = \"flights\"
  partitions = 3
  replicas = [1, 2]

Start each node in a terminal of its own:
  farlog serve --node 1 --cluster c.toml --data-dir /tmp/farlog/node-1
  farlog serve --node 2 --cluster c.toml --data-dir /tmp/farlog/node-2")]
pub(crate) struct ServeArgs {
    /// Id of this node in the cluster file
    #[arg(long, value_name = "ID")]
    node: u32,
    /// Cluster file
    #[arg(long, value_name = "FILE")]
    cluster: PathBuf,
    /// Directory of the segment files
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Directory of the log memory, on tmpfs or hugetlbfs [default: one in /dev/shm, named after the
    /// data directory]
    #[arg(long, value_name = "DIR")]
    shm_dir: Option<PathBuf>,
    /// Device: auto, soft, soft@ADDRESS, or a name that `farlog devices` shows [default: as the cluster
    /// file says]
    #[arg(long, env = "FARLOG_DEVICE")]
    device: Option<DeviceSelector>,
    /// Who decides which replica leads: static, as the cluster file says, or etcd:URL[,URL...], whose
    /// end points belong to one etcd cluster
    #[arg(long, value_name = "static|etcd:URL", default_value_t)]
    coordinator: CoordinatorConfig,
    /// Shut down when standard input ends, for a process that supervises this one
    #[arg(long)]
    exit_with_stdin: bool,
}

pub(crate) fn run(args: &ServeArgs) -> Result<(), CliError> {
    let cluster = Cluster::load(&args.cluster)?;
    let Some(node) = cluster.node(args.node).cloned() else {
        let ids: Vec<_> = cluster
            .nodes()
            .iter()
            .map(|node| node.id.to_string())
            .collect();
        let cause = format!("{} has no such node", args.cluster.display());
        let help = format!("its nodes are: {}", ids.join(", "));
        return Err(CliError::new(format!("node {}", args.node), cause).help(help));
    };
    let shm_dir = match &args.shm_dir {
        Some(dir) => dir.clone(),
        None => default_shm_dir(&args.data_dir)?,
    };
    let config = NodeConfig {
        device: device(args, &node)?,
        cluster,
        node_id: args.node,
        data_dir: args.data_dir.clone(),
        shm_dir,
        coordinator: args.coordinator.clone(),
    };
    // Before the node starts: from now on a signal means an orderly end.
    let stop = stop_requests(args.exit_with_stdin)
        .map_err(|error| CliError::new("cannot watch signals", error))?;
    let running = Node::start(config)?;
    crate::print(&format!(
        "node {} is ready on {}, device {}\n",
        node.id,
        node.address,
        running.device()
    ))?;
    loop {
        match stop.recv_timeout(WATCH_INTERVAL) {
            Err(RecvTimeoutError::Timeout) => running.check()?,
            Ok(reason) => {
                tracing::info!(node = args.node, %reason, "shutting down");
                return Ok(running.shutdown(SHUTDOWN_PATIENCE)?);
            }
            Err(RecvTimeoutError::Disconnected) => unreachable!("the signal thread never ends"),
        }
    }
}

/// The device asked for, else the node's in the cluster file.
fn device(args: &ServeArgs, node: &NodeSpec) -> Result<DeviceSelector, CliError> {
    match &args.device {
        Some(device) => Ok(device.clone()),
        None => node.device.parse().map_err(|error| {
            let what = format!("node {} of {}", node.id, args.cluster.display());
            CliError::new(what, error).help("correct its device in the cluster file")
        }),
    }
}

/// A directory on tmpfs that belongs to the data directory: another one for each, and the same one
/// after a restart.
fn default_shm_dir(data_dir: &Path) -> Result<PathBuf, CliError> {
    let absolute = std::path::absolute(data_dir)
        .map_err(|error| CliError::new(format!("cannot use {}", data_dir.display()), error))?;
    let name = absolute
        .to_string_lossy()
        .trim_matches('/')
        .replace('/', "-");
    Ok(Path::new("/dev/shm").join(format!("farlog-{name}")))
}

/// Yields a reason when a signal or the end of standard input asks us to stop.
fn stop_requests(with_stdin: bool) -> io::Result<Receiver<&'static str>> {
    let (sender, receiver) = bounded(1);
    if with_stdin {
        watch_stdin(sender.clone())?;
    }
    signals::forward(sender)?;
    Ok(receiver)
}

fn watch_stdin(sender: Sender<&'static str>) -> io::Result<()> {
    let run = move || {
        let mut bytes = [0; 64];
        while io::stdin().read(&mut bytes).is_ok_and(|len| len > 0) {}
        let _ = sender.try_send("standard input ended"); // as above
    };
    thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(run)
        .map(drop)
}
