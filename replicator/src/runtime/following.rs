//! A partition that the node follows.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::connections::ControlSender;
use super::memory::{Image, ImageSpec, Purpose};
use super::partition::{Jobs, Readers, descriptor};
use super::shared::Shared;
use super::workers::{HelperJob, WriterJob};
use crate::control::{Grant, Revoked};
use crate::epoch::Report;
use crate::follower::{self, Follower};
use crate::image::ImageId;

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
    dir: PathBuf,
}

impl FollowerPartition {
    pub(super) fn new(engine: Follower, dir: PathBuf) -> Self {
        Self {
            engine,
            images: HashMap::new(),
            leader: None,
            correlation: 0,
            readers: Readers::default(),
            descriptors: 0,
            checkpointed: -1,
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
                    jobs.writer.push(WriterJob::Cut { partition, cut });
                }
                follower::Command::Report(report) => self.report(shared, partition, report),
                follower::Command::Lost(from, to) => {
                    let dir = self.dir.display();
                    tracing::error!(%dir, from, to, "committed records are lost: the leader does not have them");
                }
                // No leader asks for it.
                follower::Command::Sync(_) | follower::Command::Durable(_) => {}
                follower::Command::WriteTail(tail) => {
                    let line = tail.encode();
                    shared
                        .table
                        .write_tail(partition, tail.sequence.wrapping_add(1), &line);
                    shared.table.write_tail(partition, tail.sequence, &line);
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
            jobs.writer
                .push(WriterJob::HighWatermark { partition, offset });
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
            .and_then(|image| image.replication());
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
