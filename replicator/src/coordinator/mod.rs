//! Who leads a partition and who is in sync: agreed on elsewhere, changed by compare-and-swap.
//!
//! A [`Coordinator`] keeps one [`PartitionState`] per partition, and knows which nodes are alive. It
//! decides nothing: nodes propose, and a proposal holds only if nobody else has changed the state since
//! the revision it is based on. So at most one node leads in an epoch, whatever clocks say; leases only
//! say when it is time to propose.
//!
//! ```text
//!   node --- propose(expected revision, state) ---> coordinator        at most one wins
//!   node <-- Answered: Accepted | Conflict | Unknown ---'
//!   node <-- Changed { partition, agreed }, Nodes { live } --- coordinator     to every node
//! ```
//!
//! | coordinator | where | elections | for |
//! | --- | --- | --- | --- |
//! | [`StaticCoordinator`] | a file of the node that the cluster file makes the leader | none | one leader that never moves |
//! | `etcd`, feature `etcd` | one key per partition, compared by `mod_revision` | by any replica | fail-over |
//! | [`CoordinatorConfig::own`] | wherever a broker keeps its metadata | as it likes | brokers with a quorum of their own |
//!
//! A partition that nobody has led yet is kept as offline, in epoch 0, with an empty in-sync set: it has
//! no record, so any of its replicas may lead it, and all of them that are alive then are in sync. The
//! preferred leader, the first of `replicas`, comes first if it is alive.

mod config;
#[cfg(test)]
#[cfg_attr(
    not(feature = "etcd"),
    allow(dead_code, reason = "a file has no second node and no session")
)]
pub(crate) mod conformance;
mod error;
#[cfg(feature = "etcd")]
pub mod etcd;
mod state;
mod static_file;

pub use config::{CoordinatorConfig, OwnCoordinator, Sink};
pub use error::CoordinatorError;
pub use static_file::StaticCoordinator;

use std::fmt;

use serde::{Deserialize, Serialize};

/// Names the memory that a node's log images are in; another one means that the old one is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemoryId(pub [u8; 16]);

/// A partition of the cluster file; events name it by its index there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionKey {
    /// Its topic.
    pub topic: String,
    /// Its number in the topic.
    pub number: u32,
    /// Its replicas in the cluster file, the preferred leader first.
    pub replicas: Vec<u32>,
}

impl PartitionKey {
    /// The state of a partition that nobody has led yet.
    fn offline(&self) -> PartitionState {
        PartitionState {
            leader: None,
            leader_epoch: 0,
            isr: Vec::new(),
            replicas: self.replicas.clone(),
        }
    }
}

impl fmt::Display for PartitionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "partition {} of topic `{}`", self.number, self.topic)
    }
}

/// What a node tells its coordinator of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The cluster's name in the cluster file.
    pub cluster: String,
    /// The node and its memory.
    pub member: Member,
    /// Raised by every start of the node.
    pub incarnation: u64,
    /// Its control address.
    pub address: String,
    /// All partitions of the cluster file, in its order.
    pub partitions: Vec<PartitionKey>,
}

/// A replica that is in sync: it held every acknowledged record, in this memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Member {
    /// The node.
    pub node: u32,
    /// Its memory.
    pub memory_id: MemoryId,
}

/// What the cluster has agreed on about one partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionState {
    /// The node that leads; `None` while the partition is offline.
    pub leader: Option<u32>,
    /// Raised by one whenever a node starts to lead, also when it is the same one again.
    pub leader_epoch: i32,
    /// The replicas that hold every acknowledged record. Never empty once there was a leader: the last
    /// member stays even when it is gone.
    pub isr: Vec<Member>,
    /// All nodes that hold the partition, the preferred leader first.
    pub replicas: Vec<u32>,
}

/// A state, and the revision that a proposal to change it must name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The state.
    pub state: PartitionState,
    /// Grows with every change of the state.
    pub revision: i64,
}

/// What became of a proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is what is agreed now, under this revision.
    Accepted {
        /// The new revision.
        revision: i64,
    },
    /// Somebody else was first: this is what is agreed.
    Conflict(Agreed),
    /// It may have been accepted or not, and may still be: nothing may be assumed until
    /// [`Event::Changed`] tells a revision above the one that the proposal named. Then it is decided.
    Unknown {
        /// What went wrong.
        cause: String,
    },
}

/// What a coordinator tells a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A partition's newest state: once for each partition at the start, and after each change, whoever
    /// proposed it. Revisions may be told again, and never fall.
    Changed {
        /// Its index in the cluster file.
        partition: usize,
        /// What is agreed.
        agreed: Agreed,
    },
    /// The answer to a proposal of ours.
    Answered {
        /// The partition.
        partition: usize,
        /// The proposal's number.
        ticket: u64,
        /// What became of it.
        answer: Answer,
    },
    /// The nodes that are alive, with the memory each one has: a reason to propose, never a proof.
    Nodes {
        /// All of them, in no order.
        live: Vec<Member>,
    },
    /// Our own session has ended: others may take over what we lead. We lead on only until a
    /// proposal of theirs is agreed, and acknowledge nothing meanwhile.
    SessionLost {
        /// Why.
        cause: String,
    },
    /// A session is there again.
    SessionBack,
}

/// The way to the place where things are agreed. Events come to the sink that the coordinator was
/// started with, from a thread of its own.
pub trait Coordinator: Send {
    /// Proposes a state for a partition; [`Event::Answered`] with the same ticket follows.
    ///
    /// It is agreed only if the revision is still `expected_revision`. Returns at once.
    fn propose(
        &mut self,
        partition: usize,
        ticket: u64,
        expected_revision: i64,
        state: PartitionState,
    );

    /// Says that the node's main loop makes progress; without it the session ends when its lease does.
    fn beat(&mut self);

    /// Whether another replica may come to lead, so that a node which shuts down waits for a successor.
    fn has_elections(&self) -> bool {
        true
    }
}
