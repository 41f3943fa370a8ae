//! Control connections: messages in order, late or never, and ends that learn of the other's end.

use std::collections::VecDeque;

use super::events::{Happening, ProcessEvent};
use super::{Violation, World};
use crate::control::ErrorCode;
use crate::coordinator::{Member, MemoryId};
use crate::epoch::{Cut, Report};
use crate::image::ImageId;
use crate::leader::{GrantAsk, GrantReply};

/// A control message.
#[derive(Clone, Debug)]
pub(super) enum Control {
    Lane {
        session: u64,
    },
    LaneReady {
        session: u64,
        memory_id: MemoryId,
    },
    /// About a partition.
    Of(usize, Matter),
    /// The sender has closed.
    Fin,
}

/// What is asked, answered or told about a partition.
#[derive(Clone, Debug)]
pub(super) enum Matter {
    RevokeRequest {
        epoch: (i32, i64),
    },
    TruncateRequest {
        leader_epoch: i32,
        cut: Cut,
    },
    GrantRequest {
        leader_epoch: i32,
        ask: GrantAsk,
    },
    SyncRequest {
        offset: i64,
    },
    Report(Report),
    Grant(GrantReply),
    Refused {
        image_id: Option<ImageId>,
        code: ErrorCode,
        cause: String,
    },
    Durable(i64),
    LogEnd {
        member: Member,
        last_epoch: i32,
        log_end_offset: i64,
    },
}

/// One end of a connection.
#[derive(Debug)]
struct End {
    node: usize,
    incarnation: u64,
    is_open: bool,
    /// Sent to this end and kept in the network while its nodes are cut off from each other.
    held: VecDeque<Control>,
    last_due: u64,
}

/// A connection between two processes; the first end has opened it.
#[derive(Debug)]
pub(super) struct Connection {
    ends: [End; 2],
}

impl World {
    /// Opens a connection from a process to whatever process a node has.
    pub(super) fn open(&mut self, from: (usize, u64), to: usize) -> Option<usize> {
        if self.is_cut(from.0, to) {
            return None;
        }
        let incarnation = self.machines[to].process.as_ref()?.incarnation;
        let end = |node, incarnation| End {
            node,
            incarnation,
            is_open: true,
            held: VecDeque::new(),
            last_due: 0,
        };
        let ends = [end(from.0, from.1), end(to, incarnation)];
        self.connections.push(Connection { ends });
        Some(self.connections.len() - 1)
    }

    /// The node at the other side of a connection, and its process.
    pub(super) fn peer(&self, connection: usize, node: usize) -> (usize, u64) {
        let side = 1 - self.side_of(connection, node);
        let end = &self.connections[connection].ends[side];
        (end.node, end.incarnation)
    }

    fn side_of(&self, connection: usize, node: usize) -> usize {
        usize::from(self.connections[connection].ends[0].node != node)
    }

    /// Sends a message from a node to the other end.
    pub(super) fn send(&mut self, connection: usize, node: usize, message: Control) {
        let side = self.side_of(connection, node);
        if !self.connections[connection].ends[side].is_open {
            return;
        }
        let delay = self.plan.weather.message(&mut self.rng);
        let end = &mut self.connections[connection].ends[1 - side];
        end.last_due = end.last_due.max(self.now + delay);
        let at = end.last_due;
        let side = 1 - side;
        self.agenda.push(
            at,
            Happening::Frame {
                connection,
                side,
                message,
            },
        );
    }

    /// Closes a node's end; the other one learns of it.
    pub(super) fn close(&mut self, connection: usize, node: usize) {
        self.send(connection, node, Control::Fin);
        let side = self.side_of(connection, node);
        self.connections[connection].ends[side].is_open = false;
    }

    /// A message has arrived at one side.
    pub(super) fn deliver(
        &mut self,
        connection: usize,
        side: usize,
        message: Control,
    ) -> Result<(), Violation> {
        let [a, b] = &self.connections[connection].ends;
        let is_cut = self.is_cut(a.node, b.node);
        let end = &mut self.connections[connection].ends[side];
        if !end.is_open {
            return Ok(());
        }
        if is_cut {
            end.held.push_back(message);
            return Ok(());
        }
        let to = (end.node, end.incarnation);
        let node = to.0;
        self.note(|| format!("node {node} receives on connection {connection}: {message:?}"));
        let end = &mut self.connections[connection].ends[side];
        if matches!(message, Control::Fin) {
            end.is_open = false;
            return self.tell(to, ProcessEvent::Closed { connection });
        }
        self.tell(
            to,
            ProcessEvent::Frame {
                connection,
                message,
            },
        )
    }

    /// One side gives up if the other one is cut off or has gone without a word.
    pub(super) fn time_out(&mut self, connection: usize, side: usize) -> Result<(), Violation> {
        let ends = &self.connections[connection].ends;
        let other = &ends[1 - side];
        if !ends[side].is_open || other.is_open && !self.is_cut(ends[0].node, ends[1].node) {
            return Ok(());
        }
        self.expect_time_out(connection, 1 - side);
        let end = &mut self.connections[connection].ends[side];
        end.is_open = false;
        let to = (end.node, end.incarnation);
        let node = to.0;
        self.note(|| format!("node {node} gives up connection {connection}"));
        self.tell(to, ProcessEvent::Closed { connection })
    }

    /// All connections of a process end, with a word to the other side unless the power has gone.
    pub(super) fn close_all_of(&mut self, node: usize, incarnation: u64, is_silent: bool) {
        let is_its = |end: &End| (end.node, end.incarnation) == (node, incarnation) && end.is_open;
        for connection in 0..self.connections.len() {
            let Some(side) = self.connections[connection].ends.iter().position(is_its) else {
                continue;
            };
            if is_silent {
                self.connections[connection].ends[side].is_open = false;
            } else {
                self.close(connection, node);
            }
            // Also if the word does not get through.
            self.expect_time_out(connection, 1 - side);
        }
    }

    fn expect_time_out(&mut self, connection: usize, side: usize) {
        let delay = self.rng.spread(200_000_000, 3_000_000_000);
        self.schedule(delay, Happening::TimedOut { connection, side });
    }

    /// Two nodes are cut off from each other: some ends will notice, if it lasts.
    pub(super) fn cut_connections(&mut self, a: usize, b: usize) {
        for connection in self.open_connections(a, b) {
            for side in 0..2 {
                if self.rng.chance(70) {
                    self.expect_time_out(connection, side);
                }
            }
        }
    }

    /// Two nodes reach each other again: what the network holds arrives.
    pub(super) fn heal_connections(&mut self, a: usize, b: usize) {
        for connection in self.open_connections(a, b) {
            for side in 0..2 {
                let end = &mut self.connections[connection].ends[side];
                // Before whatever was sent behind them.
                for message in std::mem::take(&mut end.held) {
                    self.agenda.push(
                        self.now,
                        Happening::Frame {
                            connection,
                            side,
                            message,
                        },
                    );
                }
            }
        }
    }

    /// Those of which at least one end is open.
    fn open_connections(&self, a: usize, b: usize) -> Vec<usize> {
        let is_between = |c: &Connection| {
            let nodes = [c.ends[0].node, c.ends[1].node];
            c.ends.iter().any(|end| end.is_open) && (nodes == [a, b] || nodes == [b, a])
        };
        let all = self.connections.iter().enumerate();
        all.filter(|(_, c)| is_between(c)).map(|(i, _)| i).collect()
    }
}
