//! What a person reads when a command fails.

use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use replicator::cluster::{Cluster, ClusterError};
use replicator::control::{ControlError, ErrorCode};
use replicator::producer::ProducerError;
use replicator::record::BatchError;
use replicator::runtime::{ConsumerError, NodeError};

/// The command failed: what was attempted, why it failed, and what to do about it.
#[derive(Debug)]
pub(crate) struct CliError {
    what: String,
    cause: String,
    help: Option<String>,
    exit_code: u8,
}

impl CliError {
    /// Data are not what they should be.
    pub(crate) const MISMATCH: u8 = 3;
    /// A process of the demo died.
    pub(crate) const CHILD_DIED: u8 = 4;

    /// An error with exit status 1. `what` is the thing or the attempt, such as `cannot read FILE`.
    pub(crate) fn new(what: impl Display, cause: impl Display) -> Self {
        Self {
            what: what.to_string(),
            cause: cause.to_string(),
            help: None,
            exit_code: 1,
        }
    }

    /// Says what to do.
    pub(crate) fn help(self, help: impl Display) -> Self {
        Self {
            help: Some(help.to_string()),
            ..self
        }
    }

    /// Adds a line to what is said about what to do.
    pub(crate) fn and_help(self, line: impl Display) -> Self {
        let help = match self.help {
            Some(help) => format!("{help}\n{line}"),
            None => line.to_string(),
        };
        Self {
            help: Some(help),
            ..self
        }
    }

    /// Sets the exit status.
    pub(crate) fn exit_code(self, exit_code: u8) -> Self {
        Self { exit_code, ..self }
    }

    /// What failed and why, in one line.
    pub(crate) fn headline(&self) -> String {
        format!("{}: {}", self.what, self.cause)
    }

    /// Prints the error to standard error and returns the exit status.
    pub(crate) fn report(self) -> ExitCode {
        eprintln!("farlog: {}", self.headline());
        for line in self.help.iter().flat_map(|help| help.lines()) {
            eprintln!("  help: {line}");
        }
        ExitCode::from(self.exit_code)
    }
}

impl From<ClusterError> for CliError {
    fn from(error: ClusterError) -> Self {
        let help = match &error {
            ClusterError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                "--cluster names the file that all processes of the cluster share"
            }
            ClusterError::Read { .. } => "the file must be readable UTF-8 text",
            _ => "correct the file; all processes of the cluster must read the same one",
        };
        Self::new("cannot use the cluster", error).help(help)
    }
}

impl From<ControlError> for CliError {
    fn from(error: ControlError) -> Self {
        let help = control_help(&error);
        Self::new("control connection", error).help(help)
    }
}

impl From<ProducerError> for CliError {
    fn from(error: ProducerError) -> Self {
        let help = match &error {
            ProducerError::UnknownTopic { .. } => "name a topic of the cluster file".to_owned(),
            ProducerError::RecordTooLarge { .. } => {
                "raise the topic's image_size in the cluster file (a batch is at most half an image, and never \
                 more than 1 MiB), or split the record"
                    .to_owned()
            }
            ProducerError::Control { source, .. } => control_help(source).to_owned(),
            ProducerError::Unknown { .. } => {
                "look at the end of the log before the input is appended again; --resend-unknown resends such batches, so \
                 that some records may be there twice"
                    .to_owned()
            }
            ProducerError::NoLeader { .. } => {
                "see that the replicas of the topic run, and that they reach their coordinator".to_owned()
            }
            ProducerError::Refused { code: ErrorCode::NOT_ENOUGH_REPLICAS, .. } => {
                "see that as many replicas run as the topic's min_isr asks for".to_owned()
            }
            ProducerError::Refused { code: ErrorCode::NOT_LEADER, .. } => {
                "start the nodes and the producer with the same cluster file".to_owned()
            }
            ProducerError::Timeout { node, .. } => format!(
                "a follower may be down, so that nothing commits: see that all replicas run, and the log of node {node}"
            ),
            _ => "see the log of that node (FARLOG_LOG=debug farlog serve ...)".to_owned(),
        };
        Self::new("cannot append", error).help(help)
    }
}

impl From<NodeError> for CliError {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Control(error) => error.into(),
            NodeError::Directory { .. } | NodeError::Segment(_) => Self::new("cannot serve", error)
                .help("see that the directory exists, is writable and has room; `farlog dump` shows a segment"),
            NodeError::Coordinator(_) => Self::new("cannot serve", error).help(
                "--coordinator chooses who decides which replica leads: static, or etcd:http://HOST:PORT",
            ),
            NodeError::Transport(_) => Self::new("cannot serve", error).help(DEVICE_HELP),
            _ => Self::new("cannot serve", error),
        }
    }
}

impl From<ConsumerError> for CliError {
    fn from(error: ConsumerError) -> Self {
        let help = match &error {
            ConsumerError::UnknownTopic { .. } => "name a topic of the cluster file",
            ConsumerError::UnknownPartition { .. } => {
                "see the topic's replicas in the cluster file"
            }
            ConsumerError::OffsetOutOfRange { .. } => {
                "start at earliest, latest, or an offset between them"
            }
            ConsumerError::Replica { .. } => {
                "see that the node runs (farlog serve --node ID ...), or read another one with --from-replica"
            }
            ConsumerError::Fetch { .. } => "read another replica with --from-replica",
            _ => DEVICE_HELP,
        };
        Self::new("cannot consume", error).help(help)
    }
}

impl From<BatchError> for CliError {
    fn from(error: BatchError) -> Self {
        Self::new("a fetched batch cannot be read", error).exit_code(Self::MISMATCH)
    }
}

const DEVICE_HELP: &str =
    "`farlog devices` shows the devices and what ails them; --device soft needs no hardware";

fn control_help(error: &ControlError) -> &'static str {
    match error {
        ControlError::AddressInUse { .. } => {
            "stop that process (ss -ltnp shows it), or give the node another port in the cluster file"
        }
        ControlError::Bind { .. } => "give the node an address of this machine in the cluster file",
        ControlError::Connect { .. } => {
            "start the node first (farlog serve --node ID ...), or correct its address in the cluster file"
        }
        ControlError::WrongNode { .. } | ControlError::ClusterMismatch { .. } => {
            "start all processes with the same cluster file"
        }
        ControlError::UnsupportedVersion { .. } => "upgrade the older side",
        ControlError::NoHello { .. } | ControlError::Malformed { .. } => {
            "see that the address in the cluster file is a farlog node's and not another service's"
        }
        _ => "see whether the node still runs, and its log",
    }
}

/// Reads the cluster file and finds a topic in it.
pub(crate) fn load_topic(path: &std::path::Path, topic: &str) -> Result<Cluster, CliError> {
    let cluster = Cluster::load(path)?;
    if cluster.topic(topic).is_none() {
        let known: Vec<_> = cluster
            .topics()
            .iter()
            .map(|topic| topic.name.as_str())
            .collect();
        let cause = format!("{} has no such topic", path.display());
        let help = format!("its topics are: {}", known.join(", "));
        return Err(CliError::new(format!("topic `{topic}`"), cause).help(help));
    }
    Ok(cluster)
}
