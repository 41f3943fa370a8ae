//! Connections to followers, each with a lane: opened again whenever one ends.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use transport::connect::{EndPoint, Prepared};

use super::connections::{receive, spawn_writer};
use super::events::Event;
use super::shared::{Shared, lane_config};
use crate::control::{Connection, Lane, Message, Purpose};

/// How long a follower may take to answer a lane.
const LANE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to reach a follower: at first, and at most.
const RECONNECT_DELAY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Keeps a lane to a follower until the node stops.
pub(super) fn run_connector(shared: &Arc<Shared>, node: u32) {
    let mut delay = RECONNECT_DELAY.0;
    let mut reported = String::new();
    while !shared.is_stopping() {
        let session = shared.next_session();
        let begun = Instant::now();
        let cause = match keep_lane(shared, node, session) {
            Ok(()) => return,
            Err(cause) => cause,
        };
        if begun.elapsed() > RECONNECT_DELAY.1 {
            delay = RECONNECT_DELAY.0;
        }
        if cause != reported {
            tracing::warn!(follower = node, %cause, "no lane to the follower");
            reported.clone_from(&cause);
        }
        if shared
            .events
            .send(Event::LaneDown {
                node,
                session,
                cause,
            })
            .is_err()
        {
            return;
        }
        let until = Instant::now() + delay;
        while Instant::now() < until && !shared.is_stopping() {
            thread::sleep(RECONNECT_DELAY.0);
        }
        delay = (delay * 2).min(RECONNECT_DELAY.1);
    }
}

/// Connects a lane and hands on what the follower says; returns why it ended.
fn keep_lane(shared: &Arc<Shared>, node: u32, session: u64) -> Result<(), String> {
    let spec = shared
        .cluster
        .node(node)
        .ok_or("it is not in the cluster file")?;
    let connection = Connection::connect_node(&spec.address, node, &shared.hello)
        .map_err(|error| error.to_string())?;
    let (mut reader, writer) = connection.split();
    let control = spawn_writer(writer).map_err(|error| error.to_string())?;
    let ended = "the node is stopping";
    let (pd, cq) = (&shared.domains.replication, &shared.cq);
    let prepared =
        Prepared::create(pd, cq, cq, &lane_config()).map_err(|error| error.to_string())?;
    control.send(Lane {
        correlation: session,
        session,
        purpose: Purpose::Replication,
        end_point: prepared.end_point().encode().to_vec(),
    });
    let remote = match reader.receive_timeout(LANE_TIMEOUT) {
        Ok(Some(Message::LaneReady(ready))) if ready.session == session => {
            EndPoint::decode(&ready.end_point).map_err(|error| error.to_string())?
        }
        Ok(Some(Message::Error(error))) => return Err(error.message),
        Ok(Some(other)) => return Err(format!("it answered with message type {}", other.kind())),
        Ok(None) => return Err(format!("it does not answer within {LANE_TIMEOUT:?}")),
        Err(error) => return Err(error.to_string()),
    };
    let qp = Box::new(
        prepared
            .connect(&remote)
            .map_err(|error| error.to_string())?,
    );
    let up = Event::LaneUp {
        node,
        session,
        qp,
        control: control.clone(),
    };
    shared.events.send(up).map_err(|_| ended)?;
    tracing::info!(follower = node, session, "lane is up");
    loop {
        let event = match receive(shared, &mut reader).map_err(|error| error.to_string())? {
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
            Some(other) => return Err(format!("it sent message type {}", other.kind())),
            None => {
                control.close();
                return Ok(());
            }
        };
        shared.events.send(event).map_err(|_| ended)?;
    }
}
