//! A partition that the node holds: its engine, its images, and who waits for what.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use hdrhistogram::Histogram;
use transport::SharedRegion;

use super::connections::ControlSender;
use super::events::{AppendRequest, ReplyTo};
use super::io::{image_grant, refuse_image};
use super::memory::{Image, ImageSpec, Purpose};
use super::shared::Shared;
use super::workers::{ColdRequest, HelperJob, Loaded, Made, WriterJob};
use crate::control::{Acks, Appended, ErrorCode, ErrorReply, Grant, ImageRequest};
use crate::follower::{self, Drain, Fault, Follower};
use crate::image::{ImageId, Mark};
use crate::leader::{self, FollowerState, GrantAsk, GrantReply, Leader, Post};
use crate::partition::{AppendError, DrainJob};
use crate::table::{BASE_OFFSET_UNKNOWN, Descriptor, ImageLocation, Tail};

/// Batches that wait for an image at most, beside those in the queue.
const STALLED_MAX: usize = 64;
/// Batches that wait for their commit at most, per partition; more are refused.
const UNCOMMITTED_MAX: usize = 65_536;

/// What a partition wants other threads to do.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    pub(super) helper: Vec<HelperJob>,
    pub(super) writer: Vec<WriterJob>,
    /// Grant requests, by the follower's node.
    pub(super) asks: Vec<(u32, GrantAsk)>,
}

/// A partition that the node holds.
#[derive(Debug)]
pub(super) enum Held {
    Leader(Box<LeaderPartition>),
    Follower(Box<FollowerPartition>),
}

/// Images that consumers asked for, so that they stay readable: by connection.
#[derive(Debug, Default)]
struct Readers {
    waiting: HashMap<u64, ControlSender>,
    granted: HashMap<u64, Arc<Image>>,
}

#[derive(Debug)]
struct Uncommitted {
    base_offset: i64,
    end_offset: i64,
    received_at: Instant,
    /// Who waits for the commit.
    reply: Option<(u64, ReplyTo)>,
}

/// A partition that the node leads.
#[derive(Debug)]
pub(super) struct LeaderPartition {
    pub(super) engine: Leader,
    images: HashMap<ImageId, Arc<Image>>,
    stalled: VecDeque<AppendRequest>,
    uncommitted: VecDeque<Uncommitted>,
    pub(super) latency: Histogram<u64>,
    /// Why the last lane to each follower ended.
    pub(super) lane_errors: HashMap<u32, String>,
    pub(super) fault: Option<String>,
    readers: Readers,
    descriptors: u32,
    checkpointed: i64,
    dir: PathBuf,
}

/// A partition that the node follows.
#[derive(Debug)]
pub(super) struct FollowerPartition {
    pub(super) engine: Follower,
    images: HashMap<ImageId, Arc<Image>>,
    /// The leader's connection, its session, and the request to be answered.
    leader: Option<(u64, ControlSender)>,
    correlation: u64,
    readers: Readers,
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
            latency,
            lane_errors: HashMap::new(),
            fault: None,
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

    pub(super) fn stalled_count(&self) -> usize {
        self.stalled.len()
    }

    pub(super) fn acknowledged(&mut self, now: u64, node: u32, session: u64) {
        if let Some(follower) = self.engine.follower_on(node) {
            self.engine.handle_completion(now, follower, session);
        }
    }

    pub(super) fn lane_up(&mut self, node: u32, session: u64) {
        if let Some(follower) = self.engine.follower_on(node) {
            self.engine.handle_lane_up(follower, session);
        }
    }

    pub(super) fn lane_down(&mut self, node: u32, session: u64, cause: &str) -> bool {
        let Some(follower) = self.engine.follower_on(node) else {
            return false;
        };
        let is_news = *self.engine.follower(follower).1 != FollowerState::Down;
        if is_news || !self.lane_errors.contains_key(&node) {
            self.lane_errors.insert(node, cause.to_owned());
        }
        self.engine.handle_lane_down(follower, session);
        true
    }

    /// The registration that a chain's bytes are sent from.
    pub(super) fn source(&self, post: &Post) -> Option<&Arc<SharedRegion>> {
        let data = post.data.as_ref()?;
        self.images.get(&data.image_id)?.replication()
    }

    fn append(&mut self, now: u64, request: AppendRequest) {
        if !self.stalled.is_empty() || self.uncommitted.len() >= UNCOMMITTED_MAX {
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

    /// Appends and copies the bytes; gives the request back if there is no image.
    fn try_append(
        &mut self,
        now: u64,
        mut request: AppendRequest,
    ) -> Result<(), Box<AppendRequest>> {
        let placement = match self.engine.append(now, &mut request.batch) {
            Ok(placement) => placement,
            Err(AppendError::NoImage) => return Err(Box::new(request)),
            Err(error) => {
                let code = super::connections::append_error_code(&error);
                refuse(
                    &request.reply_to,
                    request.correlation,
                    code,
                    error.to_string(),
                );
                return Ok(());
            }
        };
        let image = &self.images[&placement.image_id];
        image
            .mapping()
            .write_at(placement.byte_position as usize, request.batch.as_bytes())
            .expect("a placement lies inside of its image");
        let is_waiting = request.acks == Acks::Replicated;
        let reply = (request.correlation, request.reply_to);
        if !is_waiting {
            accept(&reply.1, reply.0, placement.base_offset);
        }
        self.uncommitted.push_back(Uncommitted {
            base_offset: placement.base_offset,
            end_offset: placement.end_offset,
            received_at: request.received_at,
            reply: is_waiting.then_some(reply),
        });
        Ok(())
    }

    fn unstall(&mut self, now: u64) {
        while let Some(request) = self.stalled.pop_front() {
            if let Err(request) = self.try_append(now, request) {
                self.stalled.push_front(*request);
                return;
            }
        }
    }

    /// Answers those whose records are committed now.
    fn commit(&mut self) {
        let high_watermark = self.engine.high_watermark();
        while let Some(first) = self.uncommitted.front()
            && first.end_offset <= high_watermark
        {
            let Some(done) = self.uncommitted.pop_front() else {
                return;
            };
            let elapsed = u64::try_from(done.received_at.elapsed().as_nanos()).unwrap_or(u64::MAX);
            // It grows as it needs to, which `saturating_record` would not let it.
            let _ = self.latency.record(elapsed);
            if let Some((correlation, reply_to)) = done.reply {
                accept(&reply_to, correlation, done.base_offset);
            }
        }
    }

    /// Executes the engine's commands.
    pub(super) fn execute(&mut self, now: u64, shared: &Shared, partition: usize, jobs: &mut Jobs) {
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
                leader::Command::RequestGrant { follower, ask } => {
                    jobs.asks.push((self.engine.follower(follower).0, ask));
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
                        current,
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
    }

    fn checkpoint(&mut self, partition: usize, jobs: &mut Jobs) {
        let offset = self.engine.high_watermark();
        if std::mem::replace(&mut self.checkpointed, offset) != offset {
            jobs.writer
                .push(WriterJob::HighWatermark { partition, offset });
        }
    }
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

    fn execute(&mut self, shared: &Shared, partition: usize, jobs: &mut Jobs) {
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
                follower::Command::CopyTail(tail) => {
                    let line = tail.encode();
                    shared
                        .table
                        .write_tail(partition, tail.sequence.wrapping_add(1), &line);
                    shared.table.write_tail(partition, tail.sequence, &line);
                }
                follower::Command::Describe { current, next } => {
                    self.descriptors = self.descriptors.wrapping_add(1);
                    let len = self.engine.image_len();
                    let epoch = (self.engine.leader_epoch(), self.engine.epoch_start_offset());
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
        let (addr, rkey) = match region {
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

impl Held {
    /// The leader epoch, and the offset at which it starts.
    pub(super) fn epoch(&self) -> (i32, i64) {
        match self {
            Self::Leader(leader) => leader.epoch(),
            Self::Follower(follower) => (
                follower.engine.leader_epoch(),
                follower.engine.epoch_start_offset(),
            ),
        }
    }

    pub(super) fn is_stalled(&self) -> bool {
        matches!(self, Self::Leader(leader) if !leader.stalled.is_empty())
    }

    pub(super) fn append(&mut self, now: u64, request: AppendRequest) {
        match self {
            Self::Leader(leader) => leader.append(now, request),
            Self::Follower(_) => {
                let cause = "the node follows the partition".to_owned();
                refuse(
                    &request.reply_to,
                    request.correlation,
                    ErrorCode::NOT_LEADER,
                    cause,
                );
            }
        }
    }

    pub(super) fn image_made(&mut self, now: u64, id: ImageId, made: Made, _jobs: &mut Jobs) {
        match (self, made) {
            (Self::Leader(leader), Ok((image, _))) => {
                leader.fault = None;
                leader.images.insert(id, image);
                leader.engine.handle_image_ready(now, id);
            }
            (Self::Leader(leader), Err(cause)) => {
                tracing::error!(%cause, "no image for the leader");
                leader.fault = Some(cause);
                leader.engine.handle_image_failed(now, id);
            }
            (Self::Follower(follower), Ok((image, filled))) => {
                follower.images.insert(id, image);
                follower.engine.handle_image_ready(now, id, filled);
            }
            (Self::Follower(follower), Err(cause)) => {
                tracing::error!(%cause, "no image for the follower");
                follower.engine.handle_image_failed(now, id, cause);
            }
        }
    }

    pub(super) fn source_loaded(
        &mut self,
        now: u64,
        follower: usize,
        id: ImageId,
        loaded: Loaded,
        _jobs: &mut Jobs,
    ) {
        let Self::Leader(leader) = self else { return };
        match loaded {
            Ok((image, state)) => {
                leader.images.insert(id, image);
                leader.engine.handle_cold_loaded(follower, state);
            }
            Err(cause) => leader.engine.handle_cold_failed(now, follower, id, cause),
        }
    }

    pub(super) fn leader_drained(&mut self, now: u64, job: &DrainJob, result: Result<(), String>) {
        let Self::Leader(leader) = self else { return };
        match result {
            Ok(()) => leader.engine.handle_drained(now, job.image_id, job.to),
            Err(cause) => {
                tracing::error!(%cause, "segment files cannot be written");
                leader.fault = Some(cause);
                leader.engine.handle_drain_failed(now);
            }
        }
    }

    pub(super) fn follower_drained(&mut self, now: u64, job: &Drain, result: Result<Mark, Fault>) {
        let Self::Follower(follower) = self else {
            return;
        };
        match result {
            Ok(end) => follower.engine.handle_drained(now, job, end),
            Err(fault) => {
                tracing::error!(%fault, "the replica is not drained");
                follower.engine.handle_drain_failed(now, fault);
            }
        }
    }

    pub(super) fn granted(&mut self, now: u64, node: u32, session: u64, reply: &GrantReply) {
        let Self::Leader(leader) = self else { return };
        if let Some(follower) = leader.engine.follower_on(node) {
            leader.engine.handle_grant(now, follower, session, reply);
        }
    }

    pub(super) fn grant_refused(
        &mut self,
        now: u64,
        node: u32,
        session: u64,
        id: ImageId,
        cause: String,
    ) {
        let Self::Leader(leader) = self else { return };
        tracing::warn!(follower = node, %cause, "grant refused");
        if let Some(follower) = leader.engine.follower_on(node) {
            leader
                .engine
                .handle_grant_refused(now, follower, session, id, cause);
        }
    }

    pub(super) fn leader_lane(
        &mut self,
        now: u64,
        session: u64,
        control: &ControlSender,
        tail: Option<Tail>,
    ) {
        let Self::Follower(follower) = self else {
            return;
        };
        follower.leader = Some((session, control.clone()));
        follower.engine.handle_lane(now, session, tail);
    }

    pub(super) fn grant_asked(
        &mut self,
        now: u64,
        session: u64,
        correlation: u64,
        epoch: (i32, i64),
        ask: GrantAsk,
        tail: Option<Tail>,
    ) {
        let Self::Follower(follower) = self else {
            return;
        };
        // A request that was on its way when the lane was replaced is void.
        if follower
            .leader
            .as_ref()
            .is_some_and(|(present, _)| *present == session)
        {
            follower.correlation = correlation;
            follower.engine.handle_grant_request(now, epoch, ask, tail);
        }
    }

    /// A follower looks at its newest tail.
    pub(super) fn look(&mut self, now: u64, tail: Option<Tail>) {
        if let Self::Follower(follower) = self {
            follower.engine.handle_entry(now, tail);
        }
    }

    /// A consumer asks for the image that holds an offset: one in memory, or a copy of file bytes.
    pub(super) fn image_asked(
        &mut self,
        connection: u64,
        control: ControlSender,
        request: &ImageRequest,
        jobs: &mut Jobs,
        load: impl FnOnce(ColdRequest, i64) -> HelperJob,
    ) {
        let correlation = request.correlation;
        let offset = request.offset;
        let (log_start, log_end) = match self {
            Self::Leader(leader) => {
                let log = leader.engine.log();
                (log.log_start_offset(), log.log_end_offset())
            }
            Self::Follower(follower) => (
                follower.engine.log_start_offset(),
                follower.engine.log_end_offset(),
            ),
        };
        if !(log_start..=log_end).contains(&offset) {
            let cause = format!("offset {offset} is outside of the log, {log_start} to {log_end}");
            refuse_image(&control, correlation, &cause);
            return;
        }
        let live = match self {
            Self::Leader(leader) => leader
                .engine
                .log()
                .image_of_offset(offset)
                .and_then(|state| {
                    let image = leader.images.get(&state.id())?;
                    Some((state.id(), state.mark_for_offset(offset), Arc::clone(image)))
                }),
            Self::Follower(follower) => {
                follower
                    .engine
                    .image_of_offset(offset)
                    .and_then(|(id, base_offset)| {
                        Some((
                            id,
                            Mark::start(base_offset),
                            Arc::clone(follower.images.get(&id)?),
                        ))
                    })
            }
        };
        match live {
            Some((id, mark, image)) => {
                let from = mark.byte_position;
                let grant = image.readable().map(|region| {
                    let len = u32::try_from(region.len()).unwrap_or(u32::MAX) - from;
                    let remote = region.remote().at(from.into());
                    image_grant(
                        correlation,
                        request.partition,
                        id,
                        (mark.end_offset, log_end),
                        remote,
                        len,
                    )
                });
                if let Some(grant) = grant {
                    control.send(grant);
                    let old = self.readers().granted.insert(connection, image);
                    jobs.helper.extend(old.map(HelperJob::Drop));
                }
            }
            None => {
                self.readers().waiting.insert(connection, control);
                jobs.helper.push(load(
                    ColdRequest {
                        connection,
                        correlation,
                    },
                    offset,
                ));
            }
        }
    }

    fn readers(&mut self) -> &mut Readers {
        match self {
            Self::Leader(leader) => &mut leader.readers,
            Self::Follower(follower) => &mut follower.readers,
        }
    }

    pub(super) fn read_loaded(&mut self, request: ColdRequest, loaded: Loaded, jobs: &mut Jobs) {
        let readers = self.readers();
        let Some(control) = readers.waiting.remove(&request.connection) else {
            jobs.helper
                .extend(loaded.ok().map(|(image, _)| HelperJob::Drop(image)));
            return;
        };
        match loaded {
            Ok((image, state)) => {
                let Some(region) = image.readable() else {
                    return;
                };
                let offsets = (state.base_offset(), state.end().end_offset);
                // Only the bytes read are granted: what follows them is in another image.
                let len = state.end().byte_position;
                let (id, remote) = (state.id(), region.remote());
                control.send(image_grant(
                    request.correlation,
                    0,
                    id,
                    offsets,
                    remote,
                    len,
                ));
                let old = readers.granted.insert(request.connection, image);
                jobs.helper.extend(old.map(HelperJob::Drop));
            }
            Err(cause) => refuse_image(&control, request.correlation, &cause),
        }
    }

    pub(super) fn disconnected(&mut self, connection: u64, jobs: &mut Jobs) {
        let readers = self.readers();
        readers.waiting.remove(&connection);
        jobs.helper
            .extend(readers.granted.remove(&connection).map(HelperJob::Drop));
    }

    pub(super) fn poll_timeout(&self) -> Option<u64> {
        match self {
            Self::Leader(leader) => leader.engine.poll_timeout(),
            Self::Follower(follower) => follower.engine.poll_timeout(),
        }
    }

    pub(super) fn tick(&mut self, now: u64, tail: impl FnOnce() -> Option<Tail>) {
        match self {
            Self::Leader(leader) => leader.engine.handle_tick(now),
            Self::Follower(follower) => {
                if follower.engine.wants_entry(now) {
                    follower.engine.handle_entry(now, tail());
                }
                follower.engine.handle_tick(now);
            }
        }
    }

    /// Executes the engine's commands; grant requests and jobs are left in `jobs`.
    pub(super) fn execute(&mut self, now: u64, shared: &Shared, partition: usize, jobs: &mut Jobs) {
        match self {
            Self::Leader(leader) => {
                leader.execute(now, shared, partition, jobs);
                leader.checkpoint(partition, jobs);
            }
            Self::Follower(follower) => follower.execute(shared, partition, jobs),
        }
    }
}

fn descriptor(
    images: &HashMap<ImageId, Arc<Image>>,
    image_len: u32,
    sequence: u32,
    epoch: (i32, i64),
    current: (ImageId, i64),
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
        current: location(current.0, current.1),
        next: next.and_then(|id| location(id, BASE_OFFSET_UNKNOWN)),
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

fn refuse(reply_to: &ReplyTo, correlation: u64, code: ErrorCode, message: String) {
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
