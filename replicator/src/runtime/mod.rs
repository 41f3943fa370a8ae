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
//!
//! # Embedding
//!
//! A broker starts a [`Node`], with a cluster that it has read from a file or built in code and a coordinator
//! of ours or [of its own](crate::coordinator::CoordinatorConfig::own), and does the rest by [`Partition`]s:
//!
//! | a broker's | is |
//! | --- | --- |
//! | produce path | [`Partition::append`], or [`try_append`](Partition::try_append) where a thread must not block |
//! | the same without a copy | [`Partition::reserve`] |
//! | waiting for `acks` | [`Pending`]: a wait, a poll, or a future of whichever executor |
//! | fetch path | [`Partition::read`] from the local replica; its clients' [`Consumer`]s read by RDMA |
//! | ListOffsets | [`Partition::offsets`], [`Partition::offset_of_timestamp`] |
//! | metadata | [`Partition::view`] now, [`Node::changes`] from now on |
//! | monitoring | [`Node::status`], [`Node::check`] |
//! | orderly end | [`Node::shutdown`] |
//!
//! None of the broker's code runs on the node's threads, but for the wakers of its futures.
//!
//! ```
//! use replicator::cluster::{Cluster, NodeSpec, TopicSpec};
//! use replicator::control::Acks;
//! use replicator::coordinator::CoordinatorConfig;
//! use replicator::record::{BatchBuilder, BatchView};
//! use replicator::runtime::{Node, NodeConfig};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (data, memory) = (tempfile::tempdir()?, tempfile::tempdir_in("/dev/shm")?);
//! # let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
//! let nodes = vec![NodeSpec::new(1, port.to_string())];
//! let topics = vec![TopicSpec::new("flights", vec![vec![1]])];
//! let node = Node::start(NodeConfig {
//!     cluster: Cluster::new("docs", nodes, topics)?,
//!     node_id: 1,
//!     data_dir: data.path().to_owned(),
//!     shm_dir: memory.path().to_owned(),
//!     device: transport::DeviceSelector::Soft(None),
//!     coordinator: CoordinatorConfig::Static,
//! })?;
//! let partition = node.partition("flights", 0)?;
//! let mut changes = node.changes();
//! while !partition.view().is_leader {
//!     changes.next_timeout(Duration::from_secs(1));
//! }
//!
//! let mut records = BatchBuilder::new(partition.batch_len_max());
//! assert!(records.append(1_700_000_000_000, None, Some(b"LH400"), &[]));
//! let pending = partition.append(&mut records, Acks::Replicated)?;
//! assert_eq!(pending.wait()?, 0); // Or `pending.await?`.
//!
//! let mut bytes = Vec::new();
//! partition.read(0, 1 << 20, &mut bytes)?;
//! let (batch, _) = BatchView::parse(&bytes)?;
//! assert_eq!(batch.records_count(), 1);
//! node.shutdown(Duration::from_secs(10))?;
//! # Ok(())
//! # }
//! ```
//!
//! `examples/embedded_broker` is a whole broker of that kind, of three nodes that change their leader.

mod append;
mod checkpoints;
mod cold;
mod connections;
mod connector;
mod deadlines;
mod error;
mod events;
#[cfg(test)]
mod fence_tests;
mod fetch;
mod files;
#[cfg(test)]
mod files_tests;
mod handle;
mod io;
mod lane;
mod leading;
mod limits;
mod memory;
#[cfg(test)]
mod memory_tests;
mod node;
mod partition;
mod pending;
mod read;
mod recovery;
mod reserve;
mod salvage;
mod serve;
mod session;
mod shared;
mod status;
mod survivors;
#[cfg(test)]
mod survivors_tests;
mod views;
mod watch;
mod workers;
mod writer;

pub use append::{AppendError, IntoBatch, TryAppendError};
pub use error::NodeError;
pub use fetch::{Consumer, ConsumerError, Fetch, StartOffset};
pub use handle::Partition;
pub use node::{Node, NodeConfig};
pub use pending::Pending;
pub use read::{Offsets, ReadError};
pub use reserve::{RESERVATION_TIME, Reservation};
pub use salvage::PartitionSalvage;
pub use status::{FollowerStatus, Latency, NodeStatus, PartitionStatus, StorageStatus};
pub use views::{Change, Changes, PartitionView};
