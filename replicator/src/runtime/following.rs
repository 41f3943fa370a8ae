//! A partition that the node follows.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::connections::ControlSender;
use super::files::StorageFault;
use super::memory::{Image, ImageSpec, Purpose};
use super::partition::{Jobs, Readers, descriptor};
use super::shared::Shared;
use super::workers::{HelperJob, WriterJob};
use crate::control::{Durable, Grant, Revoked};
use crate::epoch::Report;
use crate::follower::{self, Follower};
use crate::image::{HeaderCrc, ImageId};
use crate::table::Tail;

/// A partition that the node follows.
#[derive(Debug)]
pub(super) struct FollowerPartition {
    pub(super) engine: Follower,
    pub(super) images: HashMap<ImageId, Arc<Image>>,
    /// The leader's connection, its session, and the request to be answered.
    pub(super) leader: Option<(u64, ControlSender)>,
    pub(super) correlation: u64,
    pub(super) readers: Readers,
    descriptors: u32,
    checkpointed: i64,
    /// Up to where the writer has been told to remove segments.
    asked_start: i64,
    /// Everything below is on our device.
    pub(super) durable_offset: i64,
    pub(super) storage_fault: Option<StorageFault>,
    dir: PathBuf,
}

impl FollowerPartition {
    pub(super) fn new(engine: Follower, dir: PathBuf) -> Self {
        let engine_start = engine.log_start_offset();
        Self {
            engine,
            images: HashMap::new(),
            leader: None,
            correlation: 0,
            readers: Readers::default(),
            descriptors: 0,
            checkpointed: -1,
            asked_start: engine_start,
            durable_offset: 0,
            storage_fault: None,
            dir,
        }
    }

    pub(super) fn execute(&mut self, shared: &Shared, partition: usize, jobs: &mut Jobs) {
        while let Some(command) = self.engine.poll_command() {
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
                } => {
                    self.grant(
                        shared,
                        partition,
                        image_id,
                        len,
                        log_end_offset,
                        byte_position,
                    );
                }
                follower::Command::Refuse { code, cause, .. } => {
                    if let Some((_, control)) = &self.leader {
                        control.refuse(self.correlation, code, cause);
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
                    // Consumers that were granted one of its images read no further in it.
                    let images = self.readers.take_granted();
                    jobs.helper.push(HelperJob::Withdraw { images });
                    jobs.writer.push(WriterJob::Cut { partition, cut });
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
                    if let Some((session, control)) = &self.leader {
                        let info = &shared.partitions[partition];
                        control.send(Durable {
                            topic: info.topic.clone(),
                            partition: info.number,
                            session: *session,
                            offset,
                        });
                    }
                }
                follower::Command::WriteTail(tail) => {
                    write_tails(shared, partition, &tail);
                }
                follower::Command::Describe { current, next } => {
                    self.descriptors = self.descriptors.wrapping_add(1);
                    let len = self.engine.image_len();
                    let epoch = self.engine.granted_epoch();
                    let line =
                        descriptor(&self.images, len, self.descriptors, epoch, current, next);
                    shared.table.write_descriptor(partition, &line.encode());
                }
                follower::Command::Drain(job) => {
                    let image = Arc::clone(&self.images[&job.image_id]);
                    jobs.writer.push(WriterJob::Follower {
                        partition,
                        image,
                        job,
                    });
                }
                follower::Command::Release(id) => {
                    jobs.helper
                        .extend(self.images.remove(&id).map(HelperJob::Drop));
                }
            }
        }
        let offset = self.engine.high_watermark();
        if std::mem::replace(&mut self.checkpointed, offset) != offset {
            jobs.writer.push(WriterJob::HighWatermark {
                partition,
                offset,
                is_leader: false,
            });
        }
        let offset = self.engine.leader_log_start_offset();
        // Segments below it go once the files reach it.
        if offset > self.asked_start && offset <= self.engine.drained_offset() {
            self.asked_start = offset;
            jobs.writer.push(WriterJob::StartAt { partition, offset });
        }
    }

    /// Claims nothing but the epoch.
    fn empty_tail(&self) -> Tail {
        Tail {
            image_id: ImageId::default(),
            session: 0,
            leader_epoch: self.engine.leader_epoch(),
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
        let Some((_, control)) = &self.leader else {
            return;
        };
        let info = &shared.partitions[partition];
        control.send(Revoked {
            correlation: self.correlation,
            topic: info.topic.clone(),
            partition: info.number,
            leader_epoch: self.engine.leader_epoch(),
            log_end_offset: report.log_end_offset,
            epochs: report.epochs,
        });
    }

    fn grant(
        &self,
        shared: &Shared,
        partition: usize,
        image_id: ImageId,
        len: u32,
        log_end_offset: i64,
        byte_position: u32,
    ) {
        let Some((_, control)) = &self.leader else {
            return;
        };
        let region = self
            .images
            .get(&image_id)
            .and_then(|image| image.writable());
        let (addr, rkey) = match &region {
            Some(region) if len > 0 => (region.addr(), region.rkey().0),
            _ => (0, 0),
        };
        let (table_addr, table_rkey) = shared.table.writable_entry(partition);
        let info = &shared.partitions[partition];
        control.send(Grant {
            correlation: self.correlation,
            topic: info.topic.clone(),
            partition: info.number,
            leader_epoch: self.engine.leader_epoch(),
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
