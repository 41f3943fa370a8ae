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

mod connections;
mod connector;
mod error;
mod events;
mod fetch;
mod files;
mod following;
mod io;
mod lane;
mod leading;
mod memory;
mod node;
mod partition;
mod recovery;
mod serve;
mod session;
mod shared;
mod status;
mod watch;
mod workers;

pub use error::NodeError;
pub use fetch::{Consumer, ConsumerError, Fetch, StartOffset};
pub use node::{Node, NodeConfig, PendingAppend};
pub use status::{FollowerStatus, Latency, NodeStatus, PartitionStatus};
