//! Executes the engines' commands on a device and a clock.
//!
//! ```text
//!   acceptor ---> control connections ---.          .---> helper: make, register, remove images
//!   connectors (lanes to followers) -----+--> I/O --+---> writer: drain to files, checkpoints
//!                         bounded queues            '---> control connections (answers)
//! ```
//!
//! - The I/O thread owns the lanes we post on, their completion queue, and the engines.
//! - Nothing registers memory, touches files or waits for a peer on the I/O thread.
//! - Queue pairs that only answer (a leader's into us, a consumer's) belong to the control connection
//!   they were set up over and are destroyed with it. No CPU of ours takes part in what they do.
//! - Every queue is bounded. Appends that find the log waiting for an image wait in theirs, and then in
//!   the producers' connections. If the image cannot be made they are refused, until one can.

mod checkpoints;
mod cold;
mod connections;
mod connector;
mod error;
mod events;
mod fetch;
mod files;
#[cfg(test)]
mod files_tests;
mod following;
mod io;
mod lane;
mod leading;
mod memory;
#[cfg(test)]
mod memory_tests;
mod node;
mod partition;
mod recovery;
mod salvage;
mod serve;
mod session;
mod shared;
mod status;
mod survivors;
#[cfg(test)]
mod survivors_tests;
mod watch;
mod workers;
mod writer;

pub use error::NodeError;
pub use fetch::{Consumer, ConsumerError, Fetch, StartOffset};
pub use node::{Node, NodeConfig, PendingAppend};
pub use salvage::PartitionSalvage;
pub use status::{FollowerStatus, Latency, NodeStatus, PartitionStatus, StorageStatus};
