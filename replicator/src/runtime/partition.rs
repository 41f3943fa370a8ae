//! A partition that the node holds: its engine, its images, and who waits for what.

use std::collections::HashMap;
use std::sync::Arc;

use super::connections::ControlSender;
use super::events::AppendRequest;
use super::files::StorageFault;
use super::following::FollowerPartition;
use super::lane::Ask;
use super::leading::{LeaderPartition, refuse};
use super::memory::Image;
use super::shared::Shared;
use super::workers::{ColdRequest, HelperJob, Loaded, Made, WriterJob};
use crate::control::{ErrorCode, ImageGrant, ImageRequest};
use crate::epoch::{Cut, Report};
use crate::follower::{Drain, Fault, Follower};
use crate::image::{ImageId, Mark};
use crate::leader::{GrantAsk, GrantReply};
use crate::partition::{DrainJob, Stored};
use crate::table::{BASE_OFFSET_UNKNOWN, Descriptor, ImageLocation, Tail};
use transport::Remote;

/// What a partition wants other threads to do.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    pub(super) helper: Vec<HelperJob>,
    pub(super) writer: Vec<WriterJob>,
    /// Requests, by the follower's node.
    pub(super) asks: Vec<(u32, Ask)>,
}

/// A partition that the node holds.
#[derive(Debug)]
pub(super) enum Held {
    Leader(Box<LeaderPartition>),
    Follower(Box<FollowerPartition>),
}

/// Images that consumers asked for, so that they stay readable: by connection.
#[derive(Debug, Default)]
pub(super) struct Readers {
    waiting: HashMap<u64, ControlSender>,
    granted: HashMap<u64, Arc<Image>>,
}

impl Readers {
    /// The images that consumers were granted, which they are not any more.
    pub(super) fn take_granted(&mut self) -> Vec<Arc<Image>> {
        self.granted.drain().map(|(_, image)| image).collect()
    }
}

impl Held {
    /// The leader epoch, and the offset at which it starts.
    pub(super) fn epoch(&self) -> (i32, i64) {
        match self {
            Self::Leader(leader) => leader.epoch(),
            Self::Follower(follower) => follower.engine.granted_epoch(),
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
                leader.image_made(now, id, image);
            }
            (Self::Leader(leader), Err(cause)) => leader.image_failed(now, id, cause),
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

    pub(super) fn leader_drained(
        &mut self,
        now: u64,
        job: &DrainJob,
        result: Result<(), StorageFault>,
    ) {
        let Self::Leader(leader) = self else { return };
        match result {
            Ok(()) => {
                leader.storage_works();
                leader.engine.handle_drained(now, job.image_id, job.to);
            }
            Err(fault) => {
                leader.storage_failed(fault);
                leader.engine.handle_drain_failed(now);
            }
        }
    }

    pub(super) fn follower_drained(&mut self, now: u64, job: &Drain, result: Result<Mark, Fault>) {
        let Self::Follower(follower) = self else {
            return;
        };
        match result {
            Ok(end) => {
                if let Some(StorageFault::Full(_)) = follower.storage_fault {
                    follower.storage_fault = None;
                }
                follower.engine.handle_drained(now, job, end);
            }
            Err(fault) => {
                if follower.engine.fault() != Some(&fault) {
                    tracing::error!(%fault, "the replica is not drained");
                }
                follower.engine.handle_drain_failed(now, fault);
            }
        }
    }

    /// Everything below `offset` is on the device.
    pub(super) fn durable(&mut self, offset: i64) {
        match self {
            Self::Leader(leader) => {
                leader.durable_offset = offset;
                leader.engine.handle_synced(offset);
            }
            Self::Follower(follower) => {
                follower.durable_offset = offset;
                follower.engine.handle_synced(offset);
            }
        }
    }

    /// The leader of the session waits until everything below `offset` is on the device.
    pub(super) fn sync_asked(&mut self, now: u64, session: u64, offset: i64, tail: Option<Tail>) {
        if let Self::Follower(follower) = self {
            follower
                .engine
                .handle_sync_request(now, session, offset, tail);
        }
    }

    /// A follower has everything below `offset` on its device.
    pub(super) fn follower_durable(&mut self, node: u32, session: u64, offset: i64) {
        let Self::Leader(leader) = self else { return };
        if let Some(follower) = leader.engine.follower_on(node) {
            leader.engine.handle_durable(follower, session, offset);
        }
    }

    /// The files cannot be written or synced, or the log could not be cut.
    pub(super) fn storage_failed(&mut self, fault: StorageFault) {
        match self {
            Self::Leader(leader) => {
                leader.engine.handle_sync_failed();
                leader.storage_failed(fault);
            }
            Self::Follower(follower) => {
                if follower.storage_fault.as_ref() != Some(&fault) {
                    tracing::error!(%fault, "the replica's segment files");
                }
                follower.engine.handle_sync_failed(fault.to_string());
                follower.storage_fault = Some(fault);
            }
        }
    }

    /// What is wrong with the files, if anything is.
    pub(super) fn storage_fault(&self) -> Option<&StorageFault> {
        match self {
            Self::Leader(leader) => leader.storage_fault.as_ref(),
            Self::Follower(follower) => follower.storage_fault.as_ref(),
        }
    }

    /// Everything below is on the device.
    pub(super) fn durable_offset(&self) -> i64 {
        match self {
            Self::Leader(leader) => leader.durable_offset,
            Self::Follower(follower) => follower.durable_offset,
        }
    }

    /// Segments below `offset` are gone.
    pub(super) fn log_start(&mut self, now: u64, offset: i64) {
        match self {
            Self::Leader(leader) => leader.engine.handle_log_start(now, offset),
            Self::Follower(follower) => follower.engine.handle_log_start(offset),
        }
    }

    /// Since when the oldest image that nobody needs has been kept for readers only, if there is one.
    pub(super) fn retired_since(&self) -> Option<u64> {
        match self {
            Self::Leader(leader) => leader.engine.retired_since(),
            Self::Follower(follower) => follower.engine.retired_since(),
        }
    }

    /// Lets the oldest image go that is kept for readers only.
    pub(super) fn release_retired(&mut self) {
        match self {
            Self::Leader(leader) => leader.engine.release_retired(),
            Self::Follower(follower) => follower.engine.release_retired(),
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

    /// A follower has revoked or truncated, and says what it holds.
    pub(super) fn reported(&mut self, node: u32, session: u64, report: &Report) {
        let Self::Leader(leader) = self else { return };
        if let Some(follower) = leader.engine.follower_on(node) {
            leader.engine.handle_report(follower, session, report);
        }
    }

    /// A follower will not revoke or truncate.
    pub(super) fn refused(&mut self, now: u64, node: u32, session: u64, cause: String) {
        let Self::Leader(leader) = self else { return };
        tracing::warn!(follower = node, %cause, "the follower refuses");
        if let Some(follower) = leader.engine.follower_on(node) {
            leader.engine.handle_refused(now, follower, session, cause);
        }
    }

    pub(super) fn leader_lane(&mut self, session: u64, control: &ControlSender) {
        if let Self::Follower(follower) = self {
            follower.leader = Some((session, control.clone()));
        }
    }

    /// A leader asks for the fence; `None` unless it is the one of the present lane.
    fn asked(&mut self, session: u64, correlation: u64) -> Option<&mut Follower> {
        let Self::Follower(follower) = self else {
            return None;
        };
        // A request that was on its way when the lane was replaced is void.
        let (present, _) = follower.leader.as_ref()?;
        if *present != session {
            return None;
        }
        follower.correlation = correlation;
        Some(&mut follower.engine)
    }

    pub(super) fn revoke_asked(&mut self, session: u64, correlation: u64, epoch: (i32, i64)) {
        if let Some(engine) = self.asked(session, correlation) {
            engine.handle_revoke_request(session, epoch);
        }
    }

    pub(super) fn truncate_asked(
        &mut self,
        session: u64,
        correlation: u64,
        leader_epoch: i32,
        cut: Cut,
    ) {
        if let Some(engine) = self.asked(session, correlation) {
            engine.handle_truncate_request(session, leader_epoch, cut);
        }
    }

    /// The grants of a follower are withdrawn, or could not be.
    pub(super) fn revoked(&mut self, now: u64, result: Result<(), String>) {
        let Self::Follower(follower) = self else {
            return;
        };
        match result {
            Ok(()) => follower.engine.handle_revoked(),
            Err(cause) => {
                tracing::error!(%cause, "grants cannot be withdrawn; it is tried again");
                follower.engine.handle_revoke_failed(now);
            }
        }
    }

    /// What a scan or a cut has left.
    pub(super) fn stored(&mut self, now: u64, is_cut: bool, result: Result<Stored, Fault>) {
        let Self::Follower(follower) = self else {
            return;
        };
        match result {
            Ok(stored) if is_cut => follower.engine.handle_cut(stored),
            Ok(stored) => follower.engine.handle_scanned(now, stored),
            Err(fault) => {
                tracing::error!(%fault, is_cut, "the replica cannot be fenced");
                if is_cut {
                    follower.engine.handle_cut_failed(now, fault);
                } else {
                    follower.engine.handle_scan_failed(now, fault);
                }
            }
        }
    }

    pub(super) fn grant_asked(
        &mut self,
        now: u64,
        session: u64,
        correlation: u64,
        leader_epoch: i32,
        ask: GrantAsk,
        tail: Option<Tail>,
    ) {
        if let Some(engine) = self.asked(session, correlation) {
            engine.handle_grant_request(now, session, leader_epoch, ask, tail);
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

pub(super) fn descriptor(
    images: &HashMap<ImageId, Arc<Image>>,
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

/// The answer to a consumer that asked for an image.
fn image_grant(
    correlation: u64,
    partition: u32,
    id: ImageId,
    offsets: (i64, i64),
    remote: Remote,
    len: u32,
) -> ImageGrant {
    ImageGrant {
        correlation,
        partition,
        image_id: id.0,
        base_offset: offsets.0,
        next_offset: offsets.1,
        addr: remote.addr,
        rkey: remote.rkey.0,
        len,
    }
}

/// A consumer's request that cannot be met.
fn refuse_image(control: &ControlSender, correlation: u64, cause: &str) {
    control.refuse(correlation, ErrorCode::OFFSET_OUT_OF_RANGE, cause);
}
