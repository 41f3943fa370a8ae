//! What happens, and when: the virtual clock's queue.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::clients::Append;
use super::control::Control;
use crate::coordinator::{Answer, Event, PartitionState};

/// Something that happens to a process; it waits while the process stands still.
#[derive(Debug)]
pub(super) enum ProcessEvent {
    /// Its timer, as armed for this moment.
    Timer { at: u64 },
    /// The worker that makes images is done with its first job.
    Helped,
    /// The worker that writes files is.
    Written,
    /// Chains on the lane to a node are acknowledged.
    Completed {
        to: usize,
        session: u64,
        epochs: Vec<i32>,
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
    Decided { ticket: u64, answer: Answer },
    /// No answer has come to a proposal.
    NoAnswer { ticket: u64 },
    /// The coordinator tells something.
    Coordinator(Event),
}

/// What happens next in the world.
#[derive(Debug)]
pub(super) enum Happening {
    Process {
        node: usize,
        incarnation: u64,
        event: ProcessEvent,
    },
    Place {
        lane: usize,
    },
    Ack {
        lane: usize,
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

    pub(super) fn pop_until(&mut self, deadline: u64) -> Option<(u64, Happening)> {
        let Reverse(next) = self.heap.peek()?;
        if next.at > deadline {
            return None;
        }
        let Reverse(next) = self.heap.pop()?;
        Some((next.at, next.happening))
    }
}
