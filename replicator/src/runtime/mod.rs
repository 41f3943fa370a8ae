//! Executes the engines' commands on a device and a clock.
//!
//! ```text
//!   acceptor ---> control connections ---.          .---> helper: make, register, remove images
//!   connectors (lanes to other nodes) ---+--> I/O --+---> writer: drain to files, checkpoints
//!   coordinator's thread ----------------'          +---> coordinator: proposals, beat
//!                         bounded queues            '---> control connections (answers)
//! ```
//!
//! - The I/O thread owns the lanes we post on, their completion queue, the engines, and the coordinator,
//!   which it tells in every turn that it makes progress.
//! - Which role a partition plays changes while the node runs: [`replica`](crate::replica) says when. Images
//!   and files outlive roles; a fence copies what is in memory to the files before another role begins.
//! - What a leader may write is registered for itself: each image, and each entry of the table. A fence
//!   deregisters both, on the helper. The queue pair of the lane stays, since it may serve other partitions.
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
#[cfg(test)]
mod fence_tests;
mod fetch;
mod files;
#[cfg(test)]
mod files_tests;
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
