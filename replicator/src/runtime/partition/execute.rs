//! What the replica's engine wants, given to those who do it.

use std::sync::Arc;

use super::{Held, Images, Jobs, Propose};
use crate::control::{Durable, Grant, LogEnd, Revoked};
use crate::epoch::Report;
use crate::follower;
use crate::image::{HeaderCrc, ImageId};
use crate::leader;
use crate::replica;
use crate::runtime::lane::Ask;
use crate::runtime::memory::{ImageSpec, Purpose};
use crate::runtime::shared::Shared;
use crate::runtime::workers::HelperJob;
use crate::runtime::writer::WriterJob;
use crate::table::{BASE_OFFSET_UNKNOWN, Descriptor, ImageLocation, Tail};

impl Held {
    /// Executes the engine's commands; what others have to do is left in `jobs`. Says whether there were any.
    pub(in crate::runtime) fn execute(
        &mut self,
        now: u64,
        shared: &Shared,
        partition: usize,
        jobs: &mut Jobs,
    ) -> bool {
        let mut is_work = false;
        if let Some(leader) = self.replica.leader_mut() {
            self.leading.settle(now, leader, &self.images);
        }
        while let Some(command) = self.replica.poll_command(now) {
            is_work = true;
            match command {
                replica::Command::Leader(command) => self.lead(command, shared, partition, jobs),
                replica::Command::Follower(command) => {
                    self.follow(command, shared, partition, jobs);
                }
                replica::Command::Propose {
                    ticket,
                    expected_revision,
                    state,
                } => jobs.proposals.push(Propose {
                    ticket,
                    expected_revision,
                    state,
                }),
                replica::Command::StartedLeading {
                    leader_epoch,
                    start_offset,
                } => {
                    let dir = self.dir.display();
                    tracing::info!(%dir, leader_epoch, start_offset, "the node leads");
                    for node in self.gone.clone() {
                        self.mark_gone(node);
                    }
                }
                replica::Command::StoppedLeading { leader, cause } => {
                    let dir = self.dir.display();
                    tracing::warn!(%dir, ?leader, %cause, "the node leads no more");
                    self.leading.stop(&cause);
                }
                replica::Command::HandedOver(node) => {
                    tracing::info!(dir = %self.dir.display(), node, "the leadership is handed over");
                }
                replica::Command::AnnounceLogEnd {
                    nodes,
                    last_epoch,
                    log_end_offset,
                } => {
                    let info = &shared.partitions[partition];
                    let log_end = LogEnd {
                        topic: info.topic.clone(),
                        partition: info.number,
                        memory_id: shared.hello.memory_id,
                        last_epoch,
                        log_end_offset,
                    };
                    let told = nodes.into_iter().map(|node| (node, log_end.clone()));
                    jobs.log_ends.extend(told);
                }
                replica::Command::Lost(what) => {
                    tracing::error!(dir = %self.dir.display(), "{what}");
                }
                replica::Command::ReleaseImage(id) => self.release(id, jobs),
            }
        }
        self.earlier_asker = None;
        self.leading.answer();
        self.checkpoint(partition, jobs);
        is_work
    }

    fn checkpoint(&mut self, partition: usize, jobs: &mut Jobs) {
        let (is_leader, offset) = match (self.replica.leader(), self.replica.follower()) {
            (Some(leader), _) => (true, leader.high_watermark()),
            (_, Some(follower)) => (false, follower.high_watermark()),
            (None, None) => return,
        };
        if std::mem::replace(&mut self.checkpointed, offset) != offset {
            jobs.writer.push(WriterJob::HighWatermark {
                partition,
                offset,
                is_leader,
            });
        }
        if let Some(follower) = self.replica.follower() {
            let offset = follower.leader_log_start_offset();
            // Segments below it go once the files reach it.
            if offset > self.asked_start && offset <= follower.drained_offset() {
                self.asked_start = offset;
                jobs.writer.push(WriterJob::StartAt { partition, offset });
            }
        }
    }

    fn release(&mut self, id: ImageId, jobs: &mut Jobs) {
        jobs.helper
            .extend(self.images.remove(&id).map(HelperJob::Drop));
    }

    fn lead(
        &mut self,
        command: leader::Command,
        shared: &Shared,
        partition: usize,
        jobs: &mut Jobs,
    ) {
        let node_of = |follower: usize| {
            let leader = self.replica.leader()?;
            (follower < leader.followers_count()).then(|| leader.follower(follower).0)
        };
        let ask = |follower, ask| node_of(follower).map(|node| (node, ask));
        match command {
            leader::Command::MakeImage {
                id,
                len,
                starts_segment,
            } => {
                let spec = ImageSpec {
                    partition,
                    id,
                    len,
                    starts_segment,
                    purpose: Purpose::Leader,
                };
                let dir = self.dir.clone();
                jobs.helper.push(HelperJob::Make {
                    spec,
                    fill: None,
                    dir,
                });
            }
            leader::Command::ReleaseImage(id) => self.release(id, jobs),
            leader::Command::RequestRevoke { follower } => {
                jobs.asks.extend(ask(follower, Ask::Revoke));
            }
            leader::Command::RequestTruncate { follower, cut } => {
                jobs.asks.extend(ask(follower, Ask::Truncate(cut)));
            }
            leader::Command::RequestGrant {
                follower,
                ask: wanted,
            } => jobs.asks.extend(ask(follower, Ask::Grant(wanted))),
            leader::Command::BeginEpoch(entry) => {
                jobs.writer.push(WriterJob::BeginEpoch {
                    partition,
                    epoch: entry.epoch,
                });
            }
            leader::Command::RequestSync { follower, offset } => {
                jobs.asks.extend(ask(follower, Ask::Sync(offset)));
            }
            leader::Command::Sync(offset) => {
                jobs.writer.push(WriterJob::Sync { partition, offset });
            }
            leader::Command::LoadCold {
                follower,
                id,
                offset,
                limit_offset,
            } => {
                let spec = ImageSpec {
                    partition,
                    id,
                    len: shared.partitions[partition].config.image_len,
                    starts_segment: false,
                    purpose: Purpose::ColdSource,
                };
                let dir = self.dir.clone();
                jobs.helper.push(HelperJob::LoadSource {
                    spec,
                    follower,
                    offset,
                    limit_offset,
                    dir,
                });
            }
            leader::Command::Describe { current, next } => {
                self.describe(shared, partition, Some(current), next);
            }
            leader::Command::PublishTail(tail) => {
                shared
                    .table
                    .write_tail(partition, tail.sequence, &tail.encode());
            }
            leader::Command::Drain(job) => {
                let image = Arc::clone(&self.images[&job.image_id]);
                jobs.writer.push(WriterJob::Leader {
                    partition,
                    image,
                    job,
                });
            }
        }
    }

    fn follow(
        &mut self,
        command: follower::Command,
        shared: &Shared,
        partition: usize,
        jobs: &mut Jobs,
    ) {
        match command {
            follower::Command::MakeImage {
                id,
                len,
                fill,
                starts_segment,
            } => {
                let spec = ImageSpec {
                    partition,
                    id,
                    len,
                    starts_segment,
                    purpose: Purpose::Follower,
                };
                let dir = self.dir.clone();
                jobs.helper.push(HelperJob::Make { spec, fill, dir });
            }
            follower::Command::Grant {
                image_id,
                len,
                log_end_offset,
                byte_position,
            } => self.grant(
                shared,
                partition,
                (image_id, len),
                log_end_offset,
                byte_position,
            ),
            follower::Command::Refuse { code, cause, .. } => {
                if let Some(asker) = &self.asker {
                    asker.control.refuse(asker.correlation, code, cause);
                }
                // One that is refused at once does not get the answer that another one waits for.
                if let Some(earlier) = self.earlier_asker.take() {
                    self.asker = Some(earlier);
                }
            }
            follower::Command::Revoke => {
                let images = self.images.values().cloned().collect();
                jobs.helper.push(HelperJob::Revoke { partition, images });
            }
            follower::Command::Scan { leader_epoch } => {
                let images = self.images.iter();
                let images = images.map(|(id, image)| (*id, Arc::clone(image))).collect();
                jobs.writer.push(WriterJob::Scan {
                    partition,
                    leader_epoch,
                    tail: shared.table.entry(partition).tail,
                    images,
                });
            }
            follower::Command::Cut(cut) => {
                // A crash in the middle of the cut must find no tail that says more than is left.
                write_tails(shared, partition, &self.empty_tail());
                // Consumers read no further in what they were granted, and are granted nothing before the end.
                self.readers.is_closed = true;
                let images = self.readers.take_all();
                jobs.helper.push(HelperJob::Withdraw {
                    partition,
                    cut,
                    images,
                });
            }
            follower::Command::Report(report) => self.report(shared, partition, report),
            follower::Command::Lost(from, to) => {
                let dir = self.dir.display();
                tracing::error!(%dir, from, to, "committed records are lost: the leader does not have them");
            }
            follower::Command::Sync(offset) => {
                jobs.writer.push(WriterJob::Sync { partition, offset });
            }
            follower::Command::Durable(offset) => {
                if let Some(asker) = &self.asker {
                    let info = &shared.partitions[partition];
                    asker.control.send(Durable {
                        topic: info.topic.clone(),
                        partition: info.number,
                        session: asker.session,
                        offset,
                    });
                }
            }
            follower::Command::WriteTail(tail) => {
                write_tails(shared, partition, &tail);
            }
            follower::Command::Describe { current, next } => {
                self.describe(shared, partition, current, next);
            }
            follower::Command::Drain(job) => {
                let image = Arc::clone(&self.images[&job.image_id]);
                jobs.writer.push(WriterJob::Follower {
                    partition,
                    image,
                    job,
                });
            }
            follower::Command::Release(id) => self.release(id, jobs),
        }
    }

    fn describe(
        &mut self,
        shared: &Shared,
        partition: usize,
        current: Option<(ImageId, i64)>,
        next: Option<ImageId>,
    ) {
        self.descriptors = self.descriptors.wrapping_add(1);
        let line = descriptor(
            &self.images,
            shared.partitions[partition].config.image_len,
            self.descriptors,
            self.epoch(),
            current,
            next,
        );
        shared.table.write_descriptor(partition, &line.encode());
    }

    /// Claims nothing but the epoch.
    fn empty_tail(&self) -> Tail {
        Tail {
            image_id: ImageId::default(),
            session: 0,
            leader_epoch: self.replica.leader_epoch(),
            sequence: 0,
            log_end_offset: 0,
            high_watermark: 0,
            log_start_offset: 0,
            byte_position: 0,
            header_crc: HeaderCrc::default(),
            flags: 0,
        }
    }

    fn report(&self, shared: &Shared, partition: usize, report: Report) {
        let Some(asker) = &self.asker else { return };
        let info = &shared.partitions[partition];
        asker.control.send(Revoked {
            correlation: asker.correlation,
            topic: info.topic.clone(),
            partition: info.number,
            leader_epoch: self.replica.leader_epoch(),
            log_end_offset: report.log_end_offset,
            epochs: report.epochs,
        });
    }

    fn grant(
        &self,
        shared: &Shared,
        partition: usize,
        (image_id, len): (ImageId, u32),
        log_end_offset: i64,
        byte_position: u32,
    ) {
        let Some(asker) = &self.asker else { return };
        let image = self.images.get(&image_id).filter(|_| len > 0);
        let region = image.and_then(|image| image.writable());
        let (addr, rkey) = region.map_or((0, 0), |region| (region.addr(), region.rkey().0));
        let (table_addr, table_rkey) = shared.table.writable_entry(partition).unwrap_or((0, 0));
        let info = &shared.partitions[partition];
        asker.control.send(Grant {
            correlation: asker.correlation,
            topic: info.topic.clone(),
            partition: info.number,
            leader_epoch: self.replica.leader_epoch(),
            image_id: image_id.0,
            addr,
            rkey,
            len,
            table_addr,
            table_rkey,
            log_end_offset,
            byte_position: byte_position.into(),
        });
    }
}

/// Writes both slots, so that what was there is gone.
fn write_tails(shared: &Shared, partition: usize, tail: &Tail) {
    let line = tail.encode();
    for sequence in [tail.sequence.wrapping_add(1), tail.sequence] {
        shared.table.write_tail(partition, sequence, &line);
    }
}

fn descriptor(
    images: &Images,
    image_len: u32,
    sequence: u32,
    epoch: (i32, i64),
    current: Option<(ImageId, i64)>,
    next: Option<ImageId>,
) -> Descriptor {
    let location = |id: ImageId, base_offset| {
        let region = images.get(&id)?.readable()?;
        Some(ImageLocation {
            addr: region.addr(),
            base_offset,
            rkey: region.rkey().0,
        })
    };
    Descriptor {
        image_len_log2: u8::try_from(image_len.ilog2()).unwrap_or(0),
        sequence,
        leader_epoch: epoch.0,
        epoch_start_offset: epoch.1,
        current: current.and_then(|(id, base_offset)| location(id, base_offset)),
        next: next.and_then(|id| location(id, BASE_OFFSET_UNKNOWN)),
    }
}
