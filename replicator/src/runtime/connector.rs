//! Connections to the nodes that we share partitions with, each with a lane: opened again whenever one ends.
//!
//! Any of us may come to lead what we share, so a lane is there before it is needed. The connection also
//! tells when the other process has died: it ends, and the next attempt, which follows at once, is refused.
//! A connection that ends alone says nothing, since each side closes it when its lane breaks.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use transport::connect::{EndPoint, Prepared};

use super::connections::{STOP_INTERVAL, receive, spawn_writer};
use super::events::Event;
use super::shared::{Shared, lane_config};
use crate::control::{
    Connection, ControlError, Lane, Message, MessageReader, Purpose, VERSION_FENCING,
};
use crate::coordinator::MemoryId;

/// How long a follower may take to answer a lane.
const LANE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to reach a node: at first, and at most.
const RECONNECT_DELAY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// After one that lasted this long, the next attempt follows at once again.
const STEADY: Duration = Duration::from_millis(100);

/// However short a lane lasted, the first attempt after it follows within this time: it tells whether the other
/// process is gone, and somebody may have to take over from it.
const DEATH_DELAY_MAX: Duration = Duration::from_millis(20);

/// Why there is no lane.
struct NoLane {
    cause: String,
    /// There was one.
    was_up: bool,
    /// Nobody listens at the node's address.
    is_refused: bool,
}

impl<T: ToString> From<T> for NoLane {
    fn from(cause: T) -> Self {
        Self {
            cause: cause.to_string(),
            was_up: false,
            is_refused: false,
        }
    }
}

/// Keeps a lane to a node until we stop.
pub(super) fn run_connector(shared: &Arc<Shared>, node: u32) {
    let mut delay = RECONNECT_DELAY.0;
    let mut reported = String::new();
    while !shared.is_stopping() {
        let session = shared.next_session();
        let begun = Instant::now();
        let no_lane = match keep_lane(shared, node, session) {
            Ok(()) => return,
            Err(no_lane) => no_lane,
        };
        let (cause, was_up) = (no_lane.cause, no_lane.was_up);
        if begun.elapsed() > STEADY {
            delay = RECONNECT_DELAY.0;
        }
        if cause != reported {
            tracing::warn!(node, %cause, "no lane");
            reported.clone_from(&cause);
        }
        if shared
            .events
            .send(Event::LaneDown {
                node,
                session,
                cause,
                is_gone: no_lane.is_refused,
            })
            .is_err()
        {
            return;
        }
        let wait = if was_up {
            delay.min(DEATH_DELAY_MAX)
        } else {
            delay
        };
        let until = Instant::now() + wait;
        while Instant::now() < until && !shared.is_stopping() {
            thread::sleep(wait.min(STOP_INTERVAL));
        }
        delay = (delay * 2).min(RECONNECT_DELAY.1);
    }
}

/// Connects a lane and hands on what the node says; returns why it ended.
fn keep_lane(shared: &Arc<Shared>, node: u32, session: u64) -> Result<(), NoLane> {
    let spec = shared
        .cluster
        .node(node)
        .ok_or("it is not in the cluster file")?;
    let connection =
        Connection::connect_node(&spec.address, node, &shared.hello).map_err(no_connection)?;
    if connection.version() < VERSION_FENCING {
        return Err("it is of an older version, which cannot fence: upgrade it".into());
    }
    let memory_id = MemoryId(connection.hello().memory_id);
    let (mut reader, writer) = connection.split();
    let control = spawn_writer(writer)?;
    let (pd, cq) = (&shared.domains.replication, &shared.cq);
    let prepared = Prepared::create(pd, cq, cq, &lane_config())?;
    control.send(Lane {
        correlation: session,
        session,
        purpose: Purpose::Replication,
        end_point: prepared.end_point().encode().to_vec(),
    });
    let remote = match reader.receive_timeout(LANE_TIMEOUT) {
        Ok(Some(Message::LaneReady(ready))) if ready.session == session => {
            EndPoint::decode(&ready.end_point)?
        }
        Ok(Some(Message::Error(error))) => return Err(error.message.into()),
        Ok(Some(other)) => {
            return Err(format!("it answered with message type {}", other.kind()).into());
        }
        Ok(None) => return Err(format!("it does not answer within {LANE_TIMEOUT:?}").into()),
        Err(error) => return Err(error.into()),
    };
    let qp = Box::new(prepared.connect(&remote)?);
    let up = Event::LaneUp {
        node,
        session,
        memory_id,
        qp,
        control: control.clone(),
    };
    shared.events.send(up).map_err(|_| "the node is stopping")?;
    tracing::info!(node, session, "lane is up");
    let ended = hand_on(shared, node, session, &mut reader);
    control.close();
    ended.map_err(|no_lane| NoLane {
        was_up: true,
        ..no_lane
    })
}

/// Hands on what the node says on its lane's connection; returns why that ended, if not because we stop.
fn hand_on(
    shared: &Shared,
    node: u32,
    session: u64,
    reader: &mut MessageReader,
) -> Result<(), NoLane> {
    loop {
        let event = match receive(shared, reader)? {
            Some(Message::Grant(grant)) => Event::Granted {
                node,
                session,
                grant,
            },
            Some(Message::Durable(durable)) => Event::FollowerDurable {
                node,
                session,
                durable,
            },
            Some(Message::Revoked(revoked)) => Event::Reported {
                node,
                session,
                revoked,
            },
            Some(Message::Error(error)) => Event::GrantRefused {
                node,
                session,
                error,
            },
            Some(other) => return Err(format!("it sent message type {}", other.kind()).into()),
            None => return Ok(()),
        };
        shared
            .events
            .send(event)
            .map_err(|_| "the node is stopping")?;
    }
}

fn no_connection(error: ControlError) -> NoLane {
    let is_refused = matches!(
        &error,
        ControlError::Connect { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused
    );
    NoLane {
        is_refused,
        ..error.into()
    }
}
