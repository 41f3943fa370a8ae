//! Why a node does not run.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::control::ControlError;
use crate::coordinator::CoordinatorError;
use crate::segment::SegmentError;

/// Why a node cannot start, or has stopped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The cluster file does not name the node.
    #[error("the cluster file has no node {node}; its nodes are {known}")]
    UnknownNode {
        /// The node asked for.
        node: u32,
        /// The nodes there are.
        known: String,
    },
    /// Another process uses the directory.
    #[error(
        "{path} is in use by another process: stop that one, or give this node a directory of its own",
        path = .path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// A directory or file of the node cannot be used.
    #[error("{path}: {source}", path = .path.display())]
    Directory {
        /// The directory or file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The process may not open as many files as its partitions need.
    #[error(
        "{partitions_count} partitions need about {needed} open files, the hard limit is {limit}: raise it \
         (`ulimit -Hn`, or LimitNOFILE of the service)"
    )]
    OpenFiles {
        /// Partitions that the node holds.
        partitions_count: usize,
        /// Files that are open at once.
        needed: u64,
        /// How many may be.
        limit: u64,
    },
    /// Device, memory or queue pairs.
    #[error(transparent)]
    Transport(#[from] transport::Error),
    /// Segment files or checkpoints.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The control address.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The coordinator.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// A thread cannot be started.
    #[error("cannot start the {name} thread: {source}")]
    Thread {
        /// Which one.
        name: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A thread of the node has ended although nobody asked it to.
    #[error("the node has stopped: {0}; see its log")]
    Stopped(String),
    /// What log memory holds cannot be copied to the files; the memory is kept.
    #[error("{dir}: {cause}", dir = .dir.display())]
    Storage {
        /// The partition's directory.
        dir: PathBuf,
        /// The cause.
        cause: String,
    },
    /// The node does not hold the partition.
    #[error("node {node} does not hold partition {partition} of topic `{topic}`")]
    UnknownPartition {
        /// The node.
        node: u32,
        /// The topic asked for.
        topic: String,
        /// The partition asked for.
        partition: u32,
    },
}

impl NodeError {
    pub(super) fn storage(dir: &Path, fault: &impl fmt::Display) -> Self {
        Self::Storage {
            dir: dir.to_owned(),
            cause: fault.to_string(),
        }
    }

    pub(super) fn directory(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Directory {
            path: path.into(),
            source,
        }
    }
}
