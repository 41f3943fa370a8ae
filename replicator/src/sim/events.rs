//! What happens, and when: the virtual clock's queue.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::clients::Append;
use super::control::Control;
use super::verbs::Chain;
use crate::coordinator::{Answer, Event, PartitionState};

/// Something that happens to a process; it waits while the process stands still.
#[derive(Debug)]
pub(super) enum ProcessEvent {
    /// A partition's timer, as armed for this moment.
    Timer { partition: usize, at: u64 },
    /// The worker that makes images is done with its first job.
    Helped,
    /// The worker that writes files is.
    Written,
    /// Chains on the lane to a node are acknowledged.
    Completed {
        to: usize,
        session: u64,
        chains: Vec<Chain>,
    },
    /// The lane to a node has failed.
    LaneFailed { to: usize, session: u64 },
    /// It is time to connect to a node.
    Connect { to: usize },
    /// A connection is this long without the answer due.
    Unanswered { connection: usize },
    /// A control message.
    Frame { connection: usize, message: Control },
    /// A connection has ended.
    Closed { connection: usize },
    /// A producer's batch.
    Append(Append),
    /// It is time to show the coordinator that we live.
    Beat,
    /// The lease rests on the keep-alive sent at this moment.
    Renewed { sent_at: u64 },
    /// The answer to a proposal.
    Decided {
        partition: usize,
        ticket: u64,
        answer: Answer,
    },
    /// No answer has come to a proposal.
    NoAnswer { partition: usize, ticket: u64 },
    /// The coordinator tells something.
    Coordinator(Event),
    /// It is time to look after retention.
    Sweep,
    /// What it leads is to be led by others.
    HandOver,
}

/// What happens next in the world.
#[derive(Debug)]
pub(super) enum Happening {
    Process {
        node: usize,
        incarnation: u64,
        event: ProcessEvent,
    },
    Frame {
        connection: usize,
        side: usize,
        message: Control,
    },
    /// An end of a connection gives up, if the other one is still out of reach.
    TimedOut {
        connection: usize,
        side: usize,
    },
    Answer {
        producer: usize,
        number: u64,
        result: Result<i64, ()>,
    },
    Producer {
        producer: usize,
    },
    Consumer {
        consumer: usize,
    },
    KeepAlive {
        node: usize,
        incarnation: u64,
        sent_at: u64,
    },
    Expire {
        node: usize,
    },
    Propose {
        node: usize,
        incarnation: u64,
        partition: usize,
        ticket: u64,
        expected_revision: i64,
        state: PartitionState,
    },
    Watched {
        node: usize,
        incarnation: u64,
        event: Event,
    },
    Disaster,
    Start {
        node: usize,
    },
    Resume {
        node: usize,
    },
    Heal {
        a: usize,
        b: usize,
    },
    QuickDisk {
        node: usize,
    },
    /// A full disk has room again.
    Room {
        node: usize,
    },
    /// Images can be made again.
    Memory {
        node: usize,
    },
    /// A process ends in an orderly way.
    Stop {
        node: usize,
        incarnation: u64,
    },
}

#[derive(Debug)]
struct Scheduled {
    at: u64,
    /// Breaks ties in the order of scheduling.
    number: u64,
    happening: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// Everything that is going to happen.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    heap: BinaryHeap<Reverse<Scheduled>>,
    count: u64,
}

impl Agenda {
    pub(super) fn push(&mut self, at: u64, happening: Happening) {
        self.count += 1;
        let number = self.count;
        self.heap.push(Reverse(Scheduled {
            at,
            number,
            happening,
        }));
    }

    pub(super) fn next_due(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse(next)| next.at)
    }

    pub(super) fn pop_due(&mut self, now: u64) -> Option<Happening> {
        self.next_due().filter(|due| *due <= now)?;
        self.heap.pop().map(|Reverse(next)| next.happening)
    }
}
