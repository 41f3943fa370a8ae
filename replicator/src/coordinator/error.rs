//! Why a coordinator cannot be used.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::segment::SegmentError;

/// Why a coordinator cannot be started. Once started it only tells events.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CoordinatorError {
    /// The static coordinator's file is not what it has written, or belongs to another node or cluster.
    #[error("{path}: {cause}", path = .path.display())]
    StateFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The static coordinator's file cannot be read or written.
    #[error(transparent)]
    Files(#[from] SegmentError),
    /// An end point cannot be used as it is given.
    #[error("etcd end point `{url}`: {cause}")]
    EndPoint {
        /// The end point.
        url: String,
        /// The cause.
        cause: String,
    },
    /// etcd does not answer, or not as it should.
    #[error("{0}")]
    Etcd(String),
    /// A key of etcd holds what is no partition's state.
    #[error("etcd key {key}: {cause}")]
    Value {
        /// The key.
        key: String,
        /// The cause.
        cause: String,
    },
    /// A broker's own coordinator cannot be started.
    #[error("{0}")]
    Own(String),
    /// The coordinator's thread cannot be started.
    #[error("cannot start the coordinator's thread: {0}")]
    Thread(io::Error),
}
