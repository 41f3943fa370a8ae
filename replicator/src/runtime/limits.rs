//! How many files a node has open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::error::NodeError;

/// Of each partition: the log and the two indexes that are written.
const FILES_PER_PARTITION: u64 = 3;
/// Beside them at least: directories, the device, a few connections.
const OTHER_FILES_MIN: u64 = 64;
/// Beside them, for many connections and other work in the process.
const OTHER_FILES: u64 = 1024;

/// Sees to it that the process may open as many files as the partitions need.
///
/// The soft limit, 1024 nearly everywhere for the sake of `select(2)`, is raised to the hard one if it is too
/// low.
pub(super) fn allow_open_files(partitions_count: usize) -> Result<(), NodeError> {
    let of_partitions = FILES_PER_PARTITION * partitions_count as u64;
    let limits = getrlimit(Resource::Nofile);
    let mut limit = limits.current;
    if limit.is_some_and(|limit| limit < of_partitions + OTHER_FILES) {
        let raised = Rlimit {
            current: limits.maximum,
            maximum: limits.maximum,
        };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            limit = limits.maximum;
        }
    }
    let needed = of_partitions + OTHER_FILES_MIN;
    match limit {
        Some(limit) if limit < needed => Err(NodeError::OpenFiles {
            partitions_count,
            needed,
            limit,
        }),
        _ => Ok(()),
    }
}
