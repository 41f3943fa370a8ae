//! What a simulation asks of verbs: keys and what they open, lanes and the WRITEs on them.
//!
//! Two models answer: [`operations`](super::operations) places requests one by one, whole or in part, and is
//! fast; [`packets`](super::packets) is made of the software device's own queue pairs, packet by packet, and
//! is slow. The same random programs run on both, and keep the two [honest](super::conformance). A model
//! touches no memory and no clock: it says when it has something to do, and then what has happened.
//!
//! | in | out |
//! | --- | --- |
//! | `start`, `end`: a node's process, with all that it has registered | |
//! | `register`, `deregister`, `resolve` | |
//! | `connect`, `post` | `Placed`, `Acked` |
//! | `end_sender`, `end_receiver`, `lose`, `set_cut` | `Failed` |

use std::fmt::Debug;

use crate::image::ImageId;

/// What lies behind a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    Image { partition: usize, id: ImageId },
    Table { partition: usize },
}

/// What a completion is of: a partition's chain, in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) partition: usize,
    pub(super) leader_epoch: i32,
}

/// An RDMA WRITE.
#[derive(Clone, Debug)]
pub(super) struct WorkRequest {
    pub(super) addr: u64,
    pub(super) rkey: u32,
    pub(super) bytes: Vec<u8>,
    /// Signalled, if it is the last one of a chain.
    pub(super) signal: Option<Chain>,
}

/// Something has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Bytes have landed in a node's memory.
    Placed {
        node: usize,
        backing: Backing,
        at: usize,
        bytes: Vec<u8>,
    },
    /// Chains on a lane are acknowledged, in their order.
    Acked { lane: usize, chains: Vec<Chain> },
    /// A lane's sender is in ERR: what has not been acknowledged has an unknown outcome.
    Failed { lane: usize },
}

/// A model of verbs. Nodes have one process at a time; lanes are numbered in the order of their making.
pub(super) trait Verbs: Debug {
    /// A process begins on a node; it has registered nothing.
    fn start(&mut self, node: usize);

    /// The process of a node ends at `now`, and its registrations and queue pairs with it. What its lanes
    /// have sent may still land.
    fn end(&mut self, now: u64, node: usize);

    /// Registers memory, which holds `bytes` now, at an address that was never used before; returns address
    /// and key.
    fn register(
        &mut self,
        node: usize,
        backing: Backing,
        bytes: &[u8],
        is_writable: bool,
    ) -> (u64, u32);

    /// The node's own CPU has written to memory that may be registered.
    fn store(&mut self, node: usize, backing: Backing, at: usize, bytes: &[u8]);

    /// Once this has returned, nothing is placed by the key any more.
    fn deregister(&mut self, node: usize, key: u32);

    /// The memory behind a key has another name now.
    fn rename(&mut self, node: usize, key: u32, backing: Backing);

    /// What `len` bytes at an address are, and where in it, for reading.
    fn resolve(&self, node: usize, key: u32, addr: u64, len: usize) -> Option<(Backing, usize)>;

    /// Connects a queue pair of one node's process with one of another's.
    fn connect(&mut self, from: usize, to: usize) -> usize;

    fn post(&mut self, now: u64, lane: usize, requests: Vec<WorkRequest>);

    fn has_sender(&self, lane: usize) -> bool;

    /// The sender's queue pair is destroyed. What it has sent may still land.
    fn end_sender(&mut self, now: u64, lane: usize);

    /// The receiver's queue pair is destroyed: once this has returned, nothing lands by it.
    fn end_receiver(&mut self, lane: usize);

    /// So much is lost on a lane that its sender gives up.
    fn lose(&mut self, now: u64, lane: usize);

    /// Two nodes do not reach each other, or do again.
    fn set_cut(&mut self, a: usize, b: usize, is_cut: bool);

    /// From now on nothing is lost or late.
    fn calm(&mut self);

    /// When `advance` must be called next.
    fn next_due(&self) -> Option<u64>;

    /// Does what is due at `now`.
    fn advance(&mut self, now: u64) -> Vec<Outcome>;
}
