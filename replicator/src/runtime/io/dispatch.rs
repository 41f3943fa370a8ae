//! What other threads have sent, given to the partitions and lanes that it is about.

use std::collections::{HashMap, VecDeque};

use transport::ReadyQp;

use super::Io;
use crate::control::{CutKind, GrantRequest, ImageRequest};
use crate::coordinator::{Member, MemoryId};
use crate::epoch::{Cut, Report};
use crate::image::{FilePlace, ImageId};
use crate::leader::{GrantAsk, GrantReply};
use crate::runtime::connections::ControlSender;
use crate::runtime::events::Event;
use crate::runtime::lane::Lane;
use crate::runtime::memory::{ImageSpec, Purpose};
use crate::runtime::partition::{Asker, Held};
use crate::runtime::status::status;
use crate::runtime::workers::HelperJob;
use crate::runtime::writer::WriterJob;

impl Io {
    pub(super) fn handle(&mut self, event: Event) {
        let now = self.shared.now();
        match event {
            Event::ImageMade {
                partition,
                id,
                made,
            } => {
                self.with(partition, |held, _| held.image_made(now, id, made));
            }
            Event::SourceLoaded {
                partition,
                follower,
                id,
                loaded,
            } => {
                self.with(partition, |held, _| {
                    held.source_loaded(now, follower, id, loaded);
                });
            }
            Event::ReadLoaded {
                partition,
                request,
                loaded,
            } => {
                self.with(partition, |held, jobs| {
                    held.read_loaded(now, request, loaded, jobs)
                });
            }
            Event::LeaderDrained {
                partition,
                job,
                result,
            } => {
                self.with(partition, |held, _| held.leader_drained(now, &job, result));
            }
            Event::FollowerDrained {
                partition,
                job,
                result,
            } => {
                self.with(partition, |held, _| {
                    held.follower_drained(now, &job, result)
                });
            }
            Event::Durable { partition, offset } => {
                self.with(partition, |held, _| held.durable(offset));
            }
            Event::StorageFailed { partition, fault } => {
                self.with(partition, |held, _| held.storage_failed(fault));
            }
            Event::LogStart { partition, offset } => {
                self.with(partition, |held, _| held.log_start(now, offset));
            }
            Event::MemoryShort { job } => self.make_room(now, *job),
            Event::LaneUp {
                node,
                session,
                memory_id,
                qp,
                control,
            } => self.lane_up(node, session, memory_id, qp, control),
            Event::LaneDown {
                node,
                session,
                cause,
                is_gone,
            } => {
                match self.lane_of(node, session) {
                    Some(index) => self.lose_lane(index, &cause),
                    None => self.report_lane_down(node, session, &cause),
                }
                if is_gone {
                    self.with_all(|held| held.peer(now, node, true));
                }
            }
            Event::Granted {
                node,
                session,
                grant,
            } => {
                let Some((partition, Some(image_id))) =
                    self.answered(node, session, grant.correlation)
                else {
                    return;
                };
                let reply = GrantReply {
                    image_id,
                    addr: grant.addr,
                    rkey: grant.rkey,
                    len: grant.len,
                    entry_addr: grant.table_addr,
                    entry_rkey: grant.table_rkey,
                    log_end_offset: grant.log_end_offset,
                    byte_position: u32::try_from(grant.byte_position).unwrap_or(u32::MAX),
                };
                self.with(partition, |held, _| {
                    held.granted(now, node, session, &reply)
                });
            }
            Event::GrantRefused {
                node,
                session,
                error,
            } => {
                if let Some((partition, id)) = self.answered(node, session, error.correlation) {
                    tracing::warn!(node, cause = %error.message, "a follower refuses");
                    let refusal = (error.code, error.message);
                    self.with(partition, |held, _| {
                        held.replica.handle_refused(now, node, session, id, refusal);
                    });
                }
            }
            Event::LogEndTold { node, log_end } => {
                let found = self
                    .shared
                    .held_partition(&log_end.topic, log_end.partition);
                if let Some(partition) = found {
                    let member = Member {
                        node,
                        memory_id: MemoryId(log_end.memory_id),
                    };
                    self.with(partition, |held, _| {
                        let (epoch, end) = (log_end.last_epoch, log_end.log_end_offset);
                        held.replica.handle_log_end(now, member, epoch, end);
                    });
                }
            }
            Event::Reported {
                node,
                session,
                revoked,
            } => {
                let answered = self.answered(node, session, revoked.correlation);
                if let Some((partition, None)) = answered {
                    let report = Report {
                        log_end_offset: revoked.log_end_offset,
                        epochs: revoked.epochs,
                    };
                    self.with(partition, |held, _| held.reported(node, session, &report));
                }
            }
            Event::RevokeAsked {
                node,
                session,
                request,
            } => {
                let asked = self.asked(node, session, &request.topic, request.partition);
                if let Some((partition, control)) = asked {
                    let epoch = (request.leader_epoch, request.epoch_start_offset);
                    let asker = Asker {
                        session,
                        correlation: request.correlation,
                        control,
                    };
                    self.with(partition, |held, _| held.revoke_asked(now, asker, epoch));
                    self.pump_partition(partition);
                }
            }
            Event::TruncateAsked {
                node,
                session,
                request,
            } => {
                let asked = self.asked(node, session, &request.topic, request.partition);
                if let Some((partition, control)) = asked {
                    let cut = match request.kind {
                        CutKind::TruncateTo => Cut::TruncateTo(request.offset),
                        CutKind::RestartAt => Cut::RestartAt(request.offset),
                    };
                    let asker = Asker {
                        session,
                        correlation: request.correlation,
                        control,
                    };
                    self.with(partition, |held, _| {
                        held.truncate_asked(asker, request.leader_epoch, cut);
                    });
                    self.pump_partition(partition);
                }
            }
            Event::SyncAsked {
                node,
                session,
                request,
            } => {
                let asked = self.asked(node, session, &request.topic, request.partition);
                if let Some((partition, _)) = asked {
                    let tail = self.shared.table.entry(partition).tail;
                    self.with(partition, |held, _| {
                        held.sync_asked(now, session, request.offset, tail);
                    });
                }
            }
            Event::FollowerDurable {
                node,
                session,
                durable,
            } => {
                let found = self
                    .shared
                    .held_partition(&durable.topic, durable.partition);
                if let Some(partition) = found {
                    self.with(partition, |held, _| {
                        held.follower_durable(node, session, durable.offset);
                    });
                }
            }
            Event::Revoked { partition, result } => {
                self.with(partition, |held, _| held.revoked(now, result));
            }
            Event::Withdrawn { partition, cut } => {
                let held = self.partitions[partition].as_ref();
                if held.is_some_and(|held| held.is_cutting(cut)) {
                    self.writer.send(WriterJob::Cut { partition, cut });
                }
            }
            Event::Stored {
                partition,
                is_cut,
                result,
            } => {
                self.with(partition, |held, _| held.stored(now, is_cut, result));
            }
            Event::LeaderLane {
                node,
                session,
                control,
            } => {
                self.askers.insert(node, (session, control));
            }
            Event::GrantAsked {
                node,
                session,
                request,
            } => self.grant_asked(node, session, request),
            Event::ImageAsked {
                connection,
                control,
                partition,
                request,
            } => {
                self.image_asked(connection, control, partition, &request);
            }
            Event::Filled { partition, fill } => {
                self.with(partition, |held, _| held.filled(now, fill));
            }
            Event::Unreserved {
                partition,
                number,
                is_touched,
            } => {
                self.with(partition, |held, _| {
                    held.unreserved(now, number, is_touched)
                });
            }
            Event::LocateAsked {
                partition,
                offset,
                reply,
            } => {
                let tail = self.shared.table.entry(partition).tail;
                self.with(partition, |held, _| {
                    held.look(now, tail);
                    // Whoever asked may have gone.
                    let _ = reply.try_send(held.locate(offset));
                });
            }
            Event::Disconnected { connection } => {
                let is_reader = |held: &Held| held.is_reader(connection);
                let reading: Vec<_> = (0..self.partitions.len())
                    .filter(|&p| self.partitions[p].as_ref().is_some_and(is_reader))
                    .collect();
                for partition in reading {
                    self.with(partition, |held, jobs| held.disconnected(connection, jobs));
                }
            }
            Event::CoordinatorStarted(started) => {
                self.coordinator = Some(started.0);
                for (partition, proposal) in std::mem::take(&mut self.early_proposals) {
                    self.propose(partition, proposal);
                }
            }
            Event::Finish { patience, done } => self.finish(patience, done),
            Event::Coordinator(event) => self.coordinated(event),
            Event::Status(reply) => {
                // Whoever asked may have gone.
                let _ = reply.try_send(status(&self.shared, &self.partitions));
            }
            Event::Shutdown => {}
        }
    }

    /// The partition that a leader asks about, and the way back to it; `None` unless it is the one of the
    /// present lane: a request that was on its way when the lane was replaced is void.
    fn asked(
        &self,
        node: u32,
        session: u64,
        topic: &str,
        number: u32,
    ) -> Option<(usize, ControlSender)> {
        let (present, control) = self.askers.get(&node)?;
        if *present != session {
            return None;
        }
        let partition = self.shared.held_partition(topic, number)?;
        Some((partition, control.clone()))
    }

    /// Which partition, and image, a follower's answer is about.
    fn answered(
        &mut self,
        node: u32,
        session: u64,
        correlation: u64,
    ) -> Option<(usize, Option<ImageId>)> {
        let index = self.lane_of(node, session)?;
        self.lanes[index].asked.remove(&correlation)
    }

    fn grant_asked(&mut self, node: u32, session: u64, request: GrantRequest) {
        let now = self.shared.now();
        let asked = self.asked(node, session, &request.topic, request.partition);
        let Some((partition, control)) = asked else {
            return;
        };
        let ask = GrantAsk {
            image_id: ImageId(request.image_id),
            base_offset: request.base_offset,
            place: FilePlace {
                segment_base_offset: request.segment_base_offset,
                file_position: request.file_position,
            },
            image_len: request.image_len,
        };
        let tail = self.shared.table.entry(partition).tail;
        let asker = Asker {
            session,
            correlation: request.correlation,
            control,
        };
        self.with(partition, |held, _| {
            held.grant_asked(now, asker, request.leader_epoch, ask, tail);
        });
        self.pump_partition(partition);
    }

    fn image_asked(
        &mut self,
        connection: u64,
        control: ControlSender,
        partition: usize,
        request: &ImageRequest,
    ) {
        let info = &self.shared.partitions[partition];
        let dir = info.dir.clone();
        let spec = ImageSpec {
            partition,
            id: ImageId::default(),
            len: info.config.image_len,
            starts_segment: false,
            purpose: Purpose::ColdRead,
        };
        let (now, tail) = (self.shared.now(), self.shared.table.entry(partition).tail);
        self.with(partition, |held, jobs| {
            held.look(now, tail);
            held.image_asked(
                now,
                connection,
                control,
                request,
                jobs,
                |request, offset| HelperJob::LoadRead {
                    spec,
                    request,
                    offset,
                    dir,
                },
            );
        });
    }

    fn lane_up(
        &mut self,
        node: u32,
        session: u64,
        memory_id: MemoryId,
        qp: Box<ReadyQp>,
        control: ControlSender,
    ) {
        if let Some(old) = self.lanes.iter().position(|lane| lane.node == node) {
            self.lose_lane(old, "a newer lane takes its place");
        }
        self.lanes.push(Lane {
            node,
            session,
            qp,
            control,
            posted: VecDeque::new(),
            asked: HashMap::new(),
            last_correlation: 0,
            waiting: VecDeque::new(),
        });
        let now = self.shared.now();
        self.with_all(|held| {
            held.peer(now, node, false);
            held.replica.handle_lane_up(now, node, session, memory_id);
        });
    }
}
