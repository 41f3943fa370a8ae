//! A partition that the node leads.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use hdrhistogram::Histogram;
use transport::SharedRegion;

use super::events::{AppendRequest, ReplyTo};
use super::files::StorageFault;
use super::lane::Ask;
use super::memory::{Image, ImageSpec, Purpose};
use super::partition::{Jobs, Readers, descriptor};
use super::shared::Shared;
use super::workers::{HelperJob, WriterJob};
use crate::control::{Acks, Appended, ErrorCode, ErrorReply};
use crate::coordinator::MemoryId;
use crate::image::ImageId;
use crate::leader::{self, FollowerState, Leader, Post};
use crate::partition::AppendError;

/// Batches that wait for an image at most, beside those in the queue.
const STALLED_MAX: usize = 64;
/// Batches that wait for their commit at most, per partition; more are refused.
const UNCOMMITTED_MAX: usize = 65_536;

/// Until members are agreed on with the memory they have, all have the same.
pub(super) const FIXED_MEMORY: MemoryId = MemoryId([0; 16]);

#[derive(Debug)]
struct Uncommitted {
    base_offset: i64,
    end_offset: i64,
    received_at: Instant,
    /// Who waits for the commit.
    reply: Option<(u64, ReplyTo)>,
    /// It waits for the device, too.
    is_durable: bool,
}

/// An answer that must not be sent before the tail is written: a crash in between would lose the record.
#[derive(Debug)]
struct Accepted {
    reply_to: ReplyTo,
    correlation: u64,
    base_offset: i64,
}

/// A partition that the node leads.
#[derive(Debug)]
pub(super) struct LeaderPartition {
    pub(super) engine: Leader,
    pub(super) images: HashMap<ImageId, Arc<Image>>,
    pub(super) stalled: VecDeque<AppendRequest>,
    uncommitted: VecDeque<Uncommitted>,
    accepted: Vec<Accepted>,
    pub(super) latency: Histogram<u64>,
    /// Why the last lane to each follower ended.
    pub(super) lane_errors: HashMap<u32, String>,
    /// Why the last attempt to make an image failed. Appends that need one are refused meanwhile.
    image_fault: Option<String>,
    /// Why the files do not take bytes, or do not keep them.
    pub(super) storage_fault: Option<StorageFault>,
    /// Everything below is on our own device.
    pub(super) durable_offset: i64,
    pub(super) readers: Readers,
    descriptors: u32,
    checkpointed: i64,
    dir: PathBuf,
}

impl LeaderPartition {
    pub(super) fn new(engine: Leader, dir: PathBuf) -> Self {
        let latency = Histogram::new(3).expect("three digits are allowed");
        Self {
            engine,
            images: HashMap::new(),
            stalled: VecDeque::new(),
            uncommitted: VecDeque::new(),
            accepted: Vec::new(),
            latency,
            lane_errors: HashMap::new(),
            image_fault: None,
            storage_fault: None,
            durable_offset: 0,
            readers: Readers::default(),
            descriptors: 0,
            checkpointed: -1,
            dir,
        }
    }

    /// The leader epoch, and the offset at which it starts.
    pub(super) fn epoch(&self) -> (i32, i64) {
        let log = self.engine.log();
        (log.leader_epoch(), log.epoch_start_offset())
    }

    /// What is wrong, if anything is.
    pub(super) fn fault(&self) -> Option<String> {
        let storage = self.storage_fault.as_ref().map(ToString::to_string);
        self.image_fault.clone().or(storage)
    }

    /// The files do not take bytes, or do not keep them. Who waits for the device hears it now if there is no
    /// hope.
    pub(super) fn storage_failed(&mut self, fault: StorageFault) {
        if self.storage_fault.as_ref() != Some(&fault) {
            tracing::error!(dir = %self.dir.display(), %fault, "segment files");
        }
        if let StorageFault::Poisoned(_) = fault {
            let waiting = self
                .uncommitted
                .iter_mut()
                .filter(|append| append.is_durable);
            for (correlation, reply_to) in waiting.filter_map(|append| append.reply.take()) {
                let cause = format!("whether the records will last is unknown: {fault}");
                refuse(&reply_to, correlation, ErrorCode::STORAGE, cause);
            }
        }
        self.storage_fault = Some(fault);
    }

    /// Bytes have been written; poison stays.
    pub(super) fn storage_works(&mut self) {
        if let Some(StorageFault::Full(_)) = self.storage_fault {
            self.storage_fault = None;
        }
    }

    pub(super) fn image_made(&mut self, now: u64, id: ImageId, image: Arc<Image>) {
        if self.image_fault.take().is_some() {
            tracing::warn!(dir = %self.dir.display(), "the leader has an image again");
        }
        self.images.insert(id, image);
        self.engine.handle_image_ready(now, id);
    }

    /// Each attempt names another file: only the first failure of a row is logged.
    pub(super) fn image_failed(&mut self, now: u64, id: ImageId, cause: String) {
        if self.image_fault.is_none() {
            let dir = self.dir.display();
            tracing::error!(%dir, %cause, "no image for the leader; it tries again every second");
        }
        self.image_fault = Some(cause);
        self.engine.handle_image_failed(now, id);
    }

    pub(super) fn stalled_count(&self) -> usize {
        self.stalled.len()
    }

    pub(super) fn acknowledged(&mut self, now: u64, node: u32, session: u64, leader_epoch: i32) {
        if let Some(follower) = self.engine.follower_on(node) {
            self.engine
                .handle_completion(now, follower, session, leader_epoch);
        }
    }

    pub(super) fn lane_up(&mut self, node: u32, session: u64) {
        if let Some(follower) = self.engine.follower_on(node) {
            self.engine.handle_lane_up(follower, session, FIXED_MEMORY);
        }
    }

    pub(super) fn lane_down(&mut self, now: u64, node: u32, session: u64, cause: &str) -> bool {
        let Some(follower) = self.engine.follower_on(node) else {
            return false;
        };
        let is_news = *self.engine.follower(follower).1 != FollowerState::Down;
        if is_news || !self.lane_errors.contains_key(&node) {
            self.lane_errors.insert(node, cause.to_owned());
        }
        self.engine.handle_lane_down(now, follower, session);
        true
    }

    /// The registration that a chain's bytes are sent from.
    pub(super) fn source(&self, post: &Post) -> Option<&Arc<SharedRegion>> {
        let data = post.data.as_ref()?;
        self.images.get(&data.image_id)?.source()
    }

    pub(super) fn append(&mut self, now: u64, request: AppendRequest) {
        if request.acks == Acks::Durable
            && let Some(fault) = &self.storage_fault
        {
            let (reply_to, correlation) = (&request.reply_to, request.correlation);
            refuse(reply_to, correlation, ErrorCode::STORAGE, fault.to_string());
            return;
        }
        if !self.stalled.is_empty() || self.is_full() {
            self.stall(request);
        } else if let Err(request) = self.try_append(now, request) {
            self.stall(*request);
        }
    }

    fn stall(&mut self, request: AppendRequest) {
        if self.stalled.len() < STALLED_MAX {
            self.stalled.push_back(request);
            return;
        }
        let cause = "the partition waits for its followers".to_owned();
        refuse(
            &request.reply_to,
            request.correlation,
            ErrorCode::OUT_OF_RESOURCES,
            cause,
        );
    }

    /// Appends and copies the bytes; gives the request back if its image is still being made.
    fn try_append(
        &mut self,
        now: u64,
        mut request: AppendRequest,
    ) -> Result<(), Box<AppendRequest>> {
        let placement = match self.engine.append(now, request.acks, &mut request.batch) {
            Ok(placement) => placement,
            Err(AppendError::NoImage) if self.image_fault.is_none() => {
                return Err(Box::new(request));
            }
            Err(error) => {
                let code = super::serve::append_error_code(&error);
                let cause = match (&error, &self.image_fault) {
                    (AppendError::NoImage, Some(cause)) => cause.clone(),
                    _ => error.to_string(),
                };
                refuse(&request.reply_to, request.correlation, code, cause);
                return Ok(());
            }
        };
        let image = &self.images[&placement.image_id];
        image
            .mapping()
            .write_at(placement.byte_position as usize, request.batch.as_bytes())
            .expect("a placement lies inside of its image");
        let mut reply = Some((request.correlation, request.reply_to));
        if request.acks == Acks::Leader {
            self.accept(reply.take(), placement.base_offset);
        }
        let is_durable = request.acks == Acks::Durable;
        self.uncommitted.push_back(Uncommitted {
            base_offset: placement.base_offset,
            end_offset: placement.end_offset,
            received_at: request.received_at,
            reply,
            is_durable,
        });
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.uncommitted.len() >= UNCOMMITTED_MAX
    }

    fn unstall(&mut self, now: u64) {
        while !self.is_full()
            && let Some(request) = self.stalled.pop_front()
        {
            if let Err(request) = self.try_append(now, request) {
                self.stalled.push_front(*request);
                return;
            }
        }
    }

    /// Answers those whose records are committed now.
    fn commit(&mut self) {
        let high_watermark = self.engine.high_watermark();
        let durable_offset = self.engine.durable_offset();
        while let Some(first) = self.uncommitted.front()
            && first.end_offset <= high_watermark
            && (!first.is_durable || first.end_offset <= durable_offset)
        {
            let Some(done) = self.uncommitted.pop_front() else {
                return;
            };
            let elapsed = u64::try_from(done.received_at.elapsed().as_nanos()).unwrap_or(u64::MAX);
            // It grows as it needs to, which `saturating_record` would not let it.
            let _ = self.latency.record(elapsed);
            self.accept(done.reply, done.base_offset);
        }
    }

    fn accept(&mut self, reply: Option<(u64, ReplyTo)>, base_offset: i64) {
        self.accepted
            .extend(reply.map(|(correlation, reply_to)| Accepted {
                reply_to,
                correlation,
                base_offset,
            }));
    }

    /// Executes the engine's commands.
    pub(super) fn execute(&mut self, now: u64, shared: &Shared, partition: usize, jobs: &mut Jobs) {
        // What is committed makes room for what waits, which may be committed at once.
        self.commit();
        self.unstall(now);
        self.commit();
        while let Some(command) = self.engine.poll_command() {
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
                leader::Command::ReleaseImage(id) => {
                    jobs.helper
                        .extend(self.images.remove(&id).map(HelperJob::Drop));
                }
                leader::Command::RequestRevoke { follower } => {
                    let node = self.engine.follower(follower).0;
                    jobs.asks.push((node, Ask::Revoke));
                }
                leader::Command::RequestTruncate { follower, cut } => {
                    let node = self.engine.follower(follower).0;
                    jobs.asks.push((node, Ask::Truncate(cut)));
                }
                leader::Command::RequestGrant { follower, ask } => {
                    let node = self.engine.follower(follower).0;
                    jobs.asks.push((node, Ask::Grant(ask)));
                }
                leader::Command::BeginEpoch(entry) => {
                    jobs.writer.push(WriterJob::BeginEpoch {
                        partition,
                        epoch: entry.epoch,
                    });
                }
                leader::Command::RequestSync { follower, offset } => {
                    let node = self.engine.follower(follower).0;
                    jobs.asks.push((node, Ask::Sync(offset)));
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
                        len: self.engine.log().config().image_len,
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
                    let epoch = self.epoch();
                    self.descriptors = self.descriptors.wrapping_add(1);
                    let config = self.engine.log().config();
                    let line = descriptor(
                        &self.images,
                        config.image_len,
                        self.descriptors,
                        epoch,
                        Some(current),
                        next,
                    );
                    shared.table.write_descriptor(partition, &line.encode());
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
        for done in self.accepted.drain(..) {
            accept(&done.reply_to, done.correlation, done.base_offset);
        }
    }

    pub(super) fn checkpoint(&mut self, partition: usize, jobs: &mut Jobs) {
        let offset = self.engine.high_watermark();
        if std::mem::replace(&mut self.checkpointed, offset) != offset {
            jobs.writer.push(WriterJob::HighWatermark {
                partition,
                offset,
                is_leader: true,
            });
        }
    }
}

fn accept(reply_to: &ReplyTo, correlation: u64, base_offset: i64) {
    match reply_to {
        ReplyTo::Connection(control) => {
            control.send(Appended {
                correlation,
                base_offset,
                log_append_time: -1,
            });
        }
        // Whoever asked may have gone.
        ReplyTo::Local(sender) => drop(sender.try_send(Ok(base_offset))),
    }
}

pub(super) fn refuse(reply_to: &ReplyTo, correlation: u64, code: ErrorCode, message: String) {
    match reply_to {
        ReplyTo::Connection(control) => control.refuse(correlation, code, message),
        ReplyTo::Local(sender) => {
            drop(sender.try_send(Err(ErrorReply {
                code,
                correlation,
                message,
            })));
        }
    }
}
