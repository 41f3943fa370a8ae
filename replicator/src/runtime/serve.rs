//! Connections that peers opened: requests are answered here, or become events.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crossbeam::channel::bounded;
use transport::connect::{EndPoint, Prepared};
use transport::{AccessFlags, CompletionQueue, ProtectionDomain, ReadyQp};

use super::append::error_code;
use super::connections::{ControlSender, STOP_INTERVAL, receive, spawn, spawn_writer};
use super::events::{AppendRequest, Event, ReplyTo, Work};
use super::shared::{PartitionInfo, PassiveLane, Shared, passive_config};
use crate::control::{
    Append, Connection, ErrorCode, Lane, LaneReady, ListOffsets, ListOffsetsReply, Listener,
    Message, Metadata, MetadataRequest, Open, Opened, OpenedEntry, PartitionMetadata, Purpose,
    Role, Status, VERSION_FENCING,
};
use crate::coordinator::PartitionState;
use crate::partition::CheckedBatch;

/// Connections served at once at most.
const CONNECTIONS_MAX: usize = 512;
/// Queue pairs of one consumer connection at most.
const CONSUMER_LANES_MAX: usize = 4;
/// Longest JSON of a status.
const STATUS_LEN_MAX: usize = 1 << 19;

/// One connection that a peer opened.
struct Served<'a> {
    shared: &'a Shared,
    number: u64,
    role: Role,
    version: u16,
    peer_node: u32,
    control: ControlSender,
    /// Queue pairs of a consumer, by session.
    lanes: Vec<(u64, ReadyQp)>,
    /// The session of a leader's lane.
    session: u64,
}

fn serve(shared: &Shared, number: u64, connection: Connection) {
    let (hello, version) = (connection.hello().clone(), connection.version());
    let (mut reader, writer) = connection.split();
    let peer = reader.peer_addr();
    let control = match spawn_writer(writer) {
        Ok(control) => control,
        Err(error) => {
            tracing::warn!(%peer, %error, "connection refused");
            return;
        }
    };
    let mut served = Served {
        shared,
        number,
        role: hello.role,
        version,
        peer_node: hello.node,
        control,
        lanes: Vec::new(),
        session: 0,
    };
    let end = loop {
        match receive(shared, &mut reader) {
            Ok(Some(message)) => {
                if served.handle(message).is_err() {
                    break None;
                }
            }
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    if let Some(error) = end {
        tracing::debug!(%peer, %error, "control connection ended");
    }
    served.end();
}

/// The I/O thread has ended.
struct Ended;

impl<T> From<crossbeam::channel::SendError<T>> for Ended {
    fn from(_: crossbeam::channel::SendError<T>) -> Self {
        Self
    }
}

impl Served<'_> {
    fn handle(&mut self, message: Message) -> Result<(), Ended> {
        let events = &self.shared.events;
        match message {
            Message::Lane(lane) => match lane.purpose {
                Purpose::Replication => self.replication_lane(&lane)?,
                Purpose::Consumer => self.consumer_lane(&lane),
            },
            Message::Revoke(request) => events.send(Event::RevokeAsked {
                node: self.peer_node,
                session: self.session,
                request,
            })?,
            Message::Truncate(request) => events.send(Event::TruncateAsked {
                node: self.peer_node,
                session: self.session,
                request,
            })?,
            Message::Sync(request) => events.send(Event::SyncAsked {
                node: self.peer_node,
                session: self.session,
                request,
            })?,
            Message::GrantRequest(request) => events.send(Event::GrantAsked {
                node: self.peer_node,
                session: self.session,
                request,
            })?,
            Message::LogEnd(log_end) => events.send(Event::LogEndTold {
                node: self.peer_node,
                log_end,
            })?,
            Message::Open(open) => self.open(&open),
            Message::ImageRequest(request) => {
                match self
                    .shared
                    .held_partition(&request.topic, request.partition)
                {
                    Some(partition) => events.send(Event::ImageAsked {
                        connection: self.number,
                        control: self.control.clone(),
                        partition,
                        request,
                    })?,
                    None => self.unknown(request.correlation, &request.topic, request.partition),
                }
            }
            Message::ListOffsets(request) => self.list_offsets(&request),
            Message::Append(append) => self.append(append)?,
            Message::MetadataRequest(request) => self.metadata(&request),
            Message::StatusRequest(request) => self.status(request.correlation)?,
            Message::Error(error) => {
                tracing::warn!(node = self.peer_node, message = %error.message, "the peer reports an error");
            }
            other => {
                let cause = format!("message type {} is no request", other.kind());
                self.control.refuse(0, ErrorCode::INVALID_REQUEST, cause);
            }
        }
        Ok(())
    }

    fn unknown(&self, correlation: u64, topic: &str, partition: u32) {
        let cause = format!(
            "node {} does not hold partition {partition} of topic `{topic}`",
            self.shared.node
        );
        self.control
            .refuse(correlation, ErrorCode::UNKNOWN_TOPIC_OR_PARTITION, cause);
    }

    /// A leader connects: its old queue pair is destroyed before the new one answers.
    fn replication_lane(&mut self, lane: &Lane) -> Result<(), Ended> {
        if self.role != Role::Node {
            let cause = "only a node replicates";
            self.control
                .refuse(lane.correlation, ErrorCode::INVALID_REQUEST, cause);
            return Ok(());
        }
        if self.version < VERSION_FENCING {
            let cause = "it is of an older version, which cannot fence: upgrade it";
            self.control
                .refuse(lane.correlation, ErrorCode::UNSUPPORTED_VERSION, cause);
            return Ok(());
        }
        let shared = self.shared;
        let mut lanes = shared
            .passive_lanes
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        if lanes
            .get(&self.peer_node)
            .is_some_and(|old| old.session >= lane.session)
        {
            let cause = format!("session {} is not newer than the present one", lane.session);
            self.control
                .refuse(lane.correlation, ErrorCode::INVALID_REQUEST, cause);
            return Ok(());
        }
        lanes.remove(&self.peer_node);
        let (pd, cq) = (&shared.domains.replication, &shared.passive_cq);
        match answer_lane(pd, cq, lane, AccessFlags::REMOTE_WRITE) {
            Ok((qp, ready)) => {
                self.session = lane.session;
                let passive = PassiveLane {
                    session: lane.session,
                    connection: self.number,
                    qp,
                };
                lanes.insert(self.peer_node, passive);
                drop(lanes);
                shared.events.send(Event::LeaderLane {
                    node: self.peer_node,
                    session: lane.session,
                    control: self.control.clone(),
                })?;
                self.control.send(ready);
            }
            Err(error) => self.refuse_lane(lane, &error),
        }
        Ok(())
    }

    fn consumer_lane(&mut self, lane: &Lane) {
        self.lanes.retain(|(session, _)| *session != lane.session);
        if self.lanes.len() >= CONSUMER_LANES_MAX {
            let cause = format!("more than {CONSUMER_LANES_MAX} lanes on one connection");
            self.control
                .refuse(lane.correlation, ErrorCode::OUT_OF_RESOURCES, cause);
            return;
        }
        let (pd, cq) = (&self.shared.domains.consumer, &self.shared.passive_cq);
        match answer_lane(pd, cq, lane, AccessFlags::REMOTE_READ) {
            Ok((qp, ready)) => {
                self.lanes.push((lane.session, qp));
                self.control.send(ready);
            }
            Err(error) => self.refuse_lane(lane, &error),
        }
    }

    fn refuse_lane(&self, lane: &Lane, error: &transport::Error) {
        tracing::warn!(peer = self.peer_node, %error, "no lane");
        let cause = format!("node {}: {error}", self.shared.node);
        self.control
            .refuse(lane.correlation, ErrorCode::OUT_OF_RESOURCES, cause);
    }

    fn open(&self, open: &Open) {
        let shared = self.shared;
        let topic = shared.cluster.topic(&open.topic);
        let all: Vec<u32> = (0..topic.map_or(0, |topic| topic.partition_count())).collect();
        let wanted = if open.partitions.is_empty() {
            &all
        } else {
            &open.partitions
        };
        let mut entries = Vec::new();
        for &partition in wanted {
            let Some(index) = shared.held_partition(&open.topic, partition) else {
                if open.partitions.is_empty() {
                    continue;
                }
                self.unknown(open.correlation, &open.topic, partition);
                return;
            };
            let (entry_addr, rkey) = shared.table.readable_entry(index);
            let descriptor = shared.table.entry(index).descriptor;
            let leader_epoch = descriptor.map_or(-1, |descriptor| descriptor.leader_epoch);
            entries.push(OpenedEntry {
                partition,
                entry_addr,
                rkey,
                leader_epoch,
            });
        }
        if entries.is_empty() {
            self.unknown(open.correlation, &open.topic, 0);
            return;
        }
        self.control.send(Opened {
            correlation: open.correlation,
            entries,
        });
    }

    fn list_offsets(&self, request: &ListOffsets) {
        let correlation = request.correlation;
        let Some(partition) = self.shared.handle(&request.topic, request.partition) else {
            self.unknown(correlation, &request.topic, request.partition);
            return;
        };
        let found = match request.timestamp {
            ListOffsets::LATEST => match self.committed(partition.index()) {
                Some(offset) => Ok((offset, -1)),
                None => {
                    let (code, cause) = (
                        ErrorCode::OFFSET_NOT_AVAILABLE,
                        "how far the log is committed is not known yet",
                    );
                    self.control.refuse(correlation, code, cause);
                    return;
                }
            },
            ListOffsets::EARLIEST => partition.offsets().map(|o| (o.log_start_offset, -1)),
            timestamp => {
                let found = partition.offset_of_timestamp(timestamp);
                found.map(|found| found.unwrap_or((-1, -1)))
            }
        };
        match found {
            Ok((offset, timestamp)) => {
                self.control.send(ListOffsetsReply {
                    correlation,
                    offset,
                    timestamp,
                });
            }
            Err(error) => {
                self.control
                    .refuse(correlation, ErrorCode::INTERNAL, error.to_string());
            }
        }
    }

    /// The high watermark, once it cannot seem to fall: see [`Entry::committed`](crate::table::Entry::committed).
    fn committed(&self, partition: usize) -> Option<i64> {
        let entry = self.shared.table.entry(partition);
        let elected_in = self.shared.elected_in(partition);
        // Elected and not leading yet, the entry is still that of the follower before.
        let is_of_before = |epoch| {
            entry
                .descriptor
                .is_none_or(|found| found.leader_epoch < epoch)
        };
        entry
            .committed()
            .filter(|_| !elected_in.is_some_and(is_of_before))
    }

    fn append(&self, append: Append) -> Result<(), Ended> {
        let received_at = Instant::now();
        let shared = self.shared;
        let Append {
            correlation,
            topic,
            partition,
            acks,
            batch,
        } = append;
        let Some(index) = shared.held_partition(&topic, partition) else {
            self.unknown(correlation, &topic, partition);
            return Ok(());
        };
        let info = &shared.partitions[index];
        match CheckedBatch::new(batch, info.batch_len_max()) {
            Ok(batch) => shared.events.append(AppendRequest {
                partition: index,
                acks,
                work: Work::Batch(batch),
                correlation,
                reply_to: ReplyTo::Connection(self.control.clone()),
                received_at,
            })?,
            Err(error) => self
                .control
                .refuse(correlation, error_code(&error), error.to_string()),
        }
        Ok(())
    }

    fn metadata(&self, request: &MetadataRequest) {
        let shared = self.shared;
        let agreed = shared
            .agreed
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        let of_topic = shared.partitions.iter().zip(&*agreed);
        let partitions: Vec<_> = of_topic
            .filter(|(info, _)| info.topic == request.topic)
            .map(|(info, agreed)| partition_metadata(info, agreed.as_ref()))
            .collect();
        if partitions.is_empty() {
            self.unknown(request.correlation, &request.topic, 0);
            return;
        }
        self.control.send(Metadata {
            correlation: request.correlation,
            partitions,
        });
    }

    fn status(&self, correlation: u64) -> Result<(), Ended> {
        let (sender, receiver) = bounded(1);
        self.shared.events.send(Event::Status(sender))?;
        let status = receiver.recv().map_err(|_| Ended)?;
        match serde_json::to_string(&status) {
            Ok(json) if json.len() <= STATUS_LEN_MAX => {
                self.control.send(Status { correlation, json })
            }
            Ok(_) => {
                self.control
                    .refuse(correlation, ErrorCode::INTERNAL, "the status is too long")
            }
            Err(error) => self
                .control
                .refuse(correlation, ErrorCode::INTERNAL, error.to_string()),
        }
        Ok(())
    }

    /// The connection is over, and with it its queue pairs.
    fn end(self) {
        let mut lanes = self
            .shared
            .passive_lanes
            .lock()
            .unwrap_or_else(|error| error.into_inner());
        lanes.retain(|_, lane| lane.connection != self.number);
        drop(lanes);
        // Fails only when the I/O thread is gone, and with it all that it held for us.
        let _ = self.shared.events.send(Event::Disconnected {
            connection: self.number,
        });
    }
}

fn partition_metadata(info: &PartitionInfo, agreed: Option<&PartitionState>) -> PartitionMetadata {
    let isr = agreed.map_or(&[][..], |state| &state.isr);
    PartitionMetadata {
        partition: info.number,
        leader: agreed.and_then(|state| state.leader).unwrap_or(0),
        leader_epoch: agreed.map_or(-1, |state| state.leader_epoch),
        isr: isr.iter().map(|member| member.node).collect(),
        replicas: agreed.map_or_else(|| info.replicas.clone(), |state| state.replicas.clone()),
    }
}

/// The queue pair that answers a peer's, which may do what `access` says.
pub(super) fn answer_lane(
    pd: &ProtectionDomain,
    cq: &CompletionQueue,
    lane: &Lane,
    access: AccessFlags,
) -> transport::Result<(ReadyQp, LaneReady)> {
    let remote = EndPoint::decode(&lane.end_point)?;
    let prepared = Prepared::create(pd, cq, cq, &passive_config(access))?;
    let end_point = prepared.end_point().encode().to_vec();
    let qp = prepared.connect(&remote)?;
    let ready = LaneReady {
        correlation: lane.correlation,
        session: lane.session,
        end_point,
    };
    Ok((qp, ready))
}

/// Accepts connections until the node stops.
pub(super) fn run_acceptor(shared: &Arc<Shared>, listener: &Listener) {
    let served = Arc::new(());
    let mut number = 0;
    while !shared.is_stopping() {
        let incoming = match listener.accept_timeout(STOP_INTERVAL) {
            Ok(Some(incoming)) => incoming,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                thread::sleep(STOP_INTERVAL);
                continue;
            }
        };
        if Arc::strong_count(&served) > CONNECTIONS_MAX {
            tracing::warn!(peer = %incoming.peer_addr(), "refused: too many connections");
            continue;
        }
        number += 1;
        let (shared, served) = (Arc::clone(shared), Arc::clone(&served));
        let run = move || {
            let peer = incoming.peer_addr();
            match incoming.handshake(&shared.hello) {
                Ok(connection) => serve(&shared, number, connection),
                Err(error) => tracing::warn!(%peer, %error, "connection refused"),
            }
            drop(served);
        };
        if let Err(error) = spawn("control", run) {
            tracing::warn!(%error, "connection refused");
        }
    }
}
