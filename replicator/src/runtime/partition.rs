//! A partition that the node holds: its engine, its images, and who waits for what.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use transport::{Remote, SharedRegion};

use super::connections::ControlSender;
use super::events::{AppendRequest, ReplyTo};
use super::files::StorageFault;
use super::lane::Ask;
use super::leading::{Leading, refuse};
use super::memory::{Image, ImageSpec, Purpose};
use super::shared::Shared;
use super::workers::{ColdRequest, HelperJob, Loaded, Made};
use super::writer::WriterJob;
use crate::control::{Durable, ErrorCode, Grant, ImageGrant, ImageRequest, LogEnd, Revoked};
use crate::coordinator::PartitionState;
use crate::epoch::{Cut, Report};
use crate::follower::{self, Drain, Fault};
use crate::image::{HeaderCrc, ImageId, Mark};
use crate::leader::{self, GrantAsk, GrantReply, Post};
use crate::partition::{DrainJob, Stored};
use crate::replica::{self, Replica};
use crate::table::{BASE_OFFSET_UNKNOWN, Descriptor, ImageLocation, Tail};

/// Images by their names, whichever role of ours has made them: names hold the epoch, so they differ.
pub(super) type Images = HashMap<ImageId, Arc<Image>>;

/// What a partition wants others to do.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    pub(super) helper: Vec<HelperJob>,
    pub(super) writer: Vec<WriterJob>,
    /// Requests, by the follower's node.
    pub(super) asks: Vec<(u32, Ask)>,
    pub(super) proposals: Vec<Propose>,
    /// What to tell other replicas, by node.
    pub(super) log_ends: Vec<(u32, LogEnd)>,
    /// It leads no more, or somebody else was given the leadership: a shutdown may go on.
    pub(super) has_stopped: bool,
}

/// A proposal to the coordinator.
#[derive(Debug)]
pub(super) struct Propose {
    pub(super) ticket: u64,
    pub(super) expected_revision: i64,
    pub(super) state: PartitionState,
}

/// A partition that the node holds.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) replica: Replica,
    pub(super) images: Images,
    pub(super) leading: Leading,
    /// The leader that asked last, and its request.
    asker: Option<Asker>,
    /// The one before, until it is clear that the last one is not refused.
    earlier_asker: Option<Asker>,
    readers: Readers,
    descriptors: u32,
    checkpointed: i64,
    /// Up to where the writer has been told to remove segments.
    asked_start: i64,
    /// Everything below is on our device.
    durable_offset: i64,
    min_isr: usize,
    /// Nodes whose processes are gone.
    gone: BTreeSet<u32>,
    dir: PathBuf,
}

/// A leader that waits for an answer of ours.
#[derive(Debug)]
pub(super) struct Asker {
    pub(super) session: u64,
    pub(super) correlation: u64,
    pub(super) control: ControlSender,
}

/// Images that consumers asked for, so that they stay readable: by connection.
#[derive(Debug, Default)]
struct Readers {
    waiting: HashMap<u64, ControlSender>,
    granted: HashMap<u64, Arc<Image>>,
    /// The files hold what is about to be cut: nothing of them is granted.
    is_closed: bool,
}

impl Held {
    pub(super) fn new(replica: Replica, min_isr: usize, dir: PathBuf) -> Self {
        Self {
            replica,
            images: HashMap::new(),
            leading: Leading::new(),
            asker: None,
            earlier_asker: None,
            readers: Readers::default(),
            descriptors: 0,
            checkpointed: -1,
            asked_start: 0,
            durable_offset: 0,
            min_isr,
            gone: BTreeSet::new(),
            dir,
        }
    }

    /// The leader epoch, and the offset at which it starts.
    pub(super) fn epoch(&self) -> (i32, i64) {
        match (self.replica.leader(), self.replica.follower()) {
            (Some(leader), _) => {
                let log = leader.log();
                (log.leader_epoch(), log.epoch_start_offset())
            }
            (_, Some(follower)) => follower.granted_epoch(),
            (None, None) => (0, 0),
        }
    }

    pub(super) fn is_stalled(&self) -> bool {
        !self.leading.stalled.is_empty()
    }

    pub(super) fn append(&mut self, now: u64, request: AppendRequest) {
        if matches!(&request.reply_to, ReplyTo::Connection(control) if control.is_barred()) {
            let cause = "a batch before it on this connection was not taken".to_owned();
            let (reply_to, correlation) = (&request.reply_to, request.correlation);
            refuse(reply_to, correlation, ErrorCode::OUT_OF_ORDER, cause);
            return;
        }
        if let Some(leader) = self.replica.leader_mut() {
            self.leading.append(now, leader, &self.images, request);
            return;
        }
        let agreed = self.replica.agreed();
        let cause = match agreed.and_then(|agreed| agreed.state.leader) {
            Some(node) => format!("the node follows the partition, which node {node} leads"),
            None => "the node follows the partition, which nobody leads".to_owned(),
        };
        refuse(
            &request.reply_to,
            request.correlation,
            ErrorCode::NOT_LEADER,
            cause,
        );
    }

    pub(super) fn image_made(&mut self, now: u64, id: ImageId, made: Made) {
        match made {
            Ok((image, filled)) => {
                self.leading.image_made();
                self.images.insert(id, image);
                self.replica.handle_image_ready(now, id, filled);
            }
            Err(cause) => {
                if self.replica.leader().is_some() {
                    self.leading.image_failed(cause.clone());
                } else {
                    tracing::error!(%cause, "no image for the follower");
                }
                self.replica.handle_image_failed(now, id, cause);
            }
        }
    }

    pub(super) fn source_loaded(&mut self, now: u64, follower: usize, id: ImageId, loaded: Loaded) {
        match loaded {
            Ok((image, state)) => {
                self.images.insert(id, image);
                self.replica.handle_cold_loaded(follower, state);
            }
            Err(cause) => {
                let leader = self.replica.leader_mut();
                if let Some(leader) = leader.filter(|l| follower < l.followers_count()) {
                    leader.handle_cold_failed(now, follower, id, cause);
                }
            }
        }
    }

    pub(super) fn leader_drained(
        &mut self,
        now: u64,
        job: &DrainJob,
        result: Result<(), StorageFault>,
    ) {
        match &result {
            Ok(()) => self.leading.storage_works(),
            Err(fault) => self.leading.storage_failed(fault.clone()),
        }
        if let Some(leader) = self.replica.leader_mut() {
            match result {
                Ok(()) => leader.handle_drained(now, job.image_id, job.to),
                Err(_) => leader.handle_drain_failed(now),
            }
        }
    }

    pub(super) fn follower_drained(&mut self, now: u64, job: &Drain, result: Result<Mark, Fault>) {
        let Some(follower) = self.replica.follower_mut() else {
            return;
        };
        match result {
            Ok(end) => {
                self.leading.storage_works();
                follower.handle_drained(now, job, end);
            }
            Err(fault) => {
                if follower.fault() != Some(&fault) {
                    tracing::error!(%fault, "the replica is not drained");
                }
                follower.handle_drain_failed(now, fault);
            }
        }
    }

    /// Everything below `offset` is on the device.
    pub(super) fn durable(&mut self, offset: i64) {
        self.durable_offset = offset;
        if let Some(leader) = self.replica.leader_mut() {
            leader.handle_synced(offset);
        } else if let Some(follower) = self.replica.follower_mut() {
            follower.handle_synced(offset);
        }
    }

    /// The leader of the session waits until everything below `offset` is on the device.
    pub(super) fn sync_asked(&mut self, now: u64, session: u64, offset: i64, tail: Option<Tail>) {
        if let Some(follower) = self.replica.follower_mut() {
            follower.handle_sync_request(now, session, offset, tail);
        }
    }

    /// A follower has everything below `offset` on its device.
    pub(super) fn follower_durable(&mut self, node: u32, session: u64, offset: i64) {
        if let Some(leader) = self.replica.leader_mut()
            && let Some(follower) = leader.follower_on(node)
        {
            leader.handle_durable(follower, session, offset);
        }
    }

    /// The files cannot be written or synced, or the log could not be cut.
    pub(super) fn storage_failed(&mut self, fault: StorageFault) {
        if let Some(leader) = self.replica.leader_mut() {
            leader.handle_sync_failed();
        } else if let Some(follower) = self.replica.follower_mut() {
            follower.handle_sync_failed(fault.to_string());
        }
        self.leading.storage_failed(fault);
    }

    /// What is wrong with the files, if anything is.
    pub(super) fn storage_fault(&self) -> Option<&StorageFault> {
        self.leading.storage_fault.as_ref()
    }

    /// Everything below is on the device.
    pub(super) fn durable_offset(&self) -> i64 {
        self.durable_offset
    }

    /// Segments below `offset` are gone.
    pub(super) fn log_start(&mut self, now: u64, offset: i64) {
        if let Some(leader) = self.replica.leader_mut() {
            leader.handle_log_start(now, offset);
        } else if let Some(follower) = self.replica.follower_mut() {
            follower.handle_log_start(offset);
        }
    }

    /// Since when the oldest image that nobody needs has been kept for readers only, if there is one.
    pub(super) fn retired_since(&self) -> Option<u64> {
        match (self.replica.leader(), self.replica.follower()) {
            (Some(leader), _) => leader.retired_since(),
            (_, Some(follower)) => follower.retired_since(),
            (None, None) => None,
        }
    }

    /// Lets the oldest image go that is kept for readers only.
    pub(super) fn release_retired(&mut self) {
        if let Some(leader) = self.replica.leader_mut() {
            leader.release_retired();
        } else if let Some(follower) = self.replica.follower_mut() {
            follower.release_retired();
        }
    }

    pub(super) fn acknowledged(&mut self, now: u64, node: u32, session: u64, leader_epoch: i32) {
        if let Some(leader) = self.replica.leader_mut()
            && let Some(follower) = leader.follower_on(node)
        {
            leader.handle_completion(now, follower, session, leader_epoch);
        }
    }

    pub(super) fn lane_down(&mut self, now: u64, node: u32, session: u64, cause: &str) {
        if let Some(leader) = self.replica.leader()
            && let Some(follower) = leader.follower_on(node)
        {
            let is_news = *leader.follower(follower).1 != leader::FollowerState::Down;
            let errors = &mut self.leading.lane_errors;
            if is_news || !errors.contains_key(&node) {
                errors.insert(node, cause.to_owned());
            }
        }
        self.replica.handle_lane_down(now, node, session);
    }

    /// A node's process is gone, or is there again.
    pub(super) fn peer(&mut self, now: u64, node: u32, is_gone: bool) {
        if is_gone {
            self.gone.insert(node);
            self.replica.handle_peer_down(now, node);
        } else {
            self.gone.remove(&node);
            self.replica.handle_peer_up(now, node);
        }
        self.mark_gone(node);
    }

    /// Without a node that is gone enough may be in sync: then nobody needs to wait until it has lagged for
    /// long.
    fn mark_gone(&mut self, node: u32) {
        if let Some(leader) = self.replica.leader_mut()
            && let Some(follower) = leader.follower_on(node)
        {
            let is_dispensable = leader.isr().len() > self.min_isr;
            leader.set_hung(follower, is_dispensable && self.gone.contains(&node));
        }
    }

    pub(super) fn granted(&mut self, now: u64, node: u32, session: u64, reply: &GrantReply) {
        if let Some(leader) = self.replica.leader_mut()
            && let Some(follower) = leader.follower_on(node)
        {
            leader.handle_grant(now, follower, session, reply);
        }
    }

    /// A follower has revoked or truncated, and says what it holds.
    pub(super) fn reported(&mut self, node: u32, session: u64, report: &Report) {
        if let Some(leader) = self.replica.leader_mut()
            && let Some(follower) = leader.follower_on(node)
        {
            leader.handle_report(follower, session, report);
        }
    }

    /// A leader asks something. What it is told at once is told before another one asks.
    fn note_asker(&mut self, asker: Asker) -> u64 {
        let session = asker.session;
        self.earlier_asker = self.asker.replace(asker);
        session
    }

    /// A leader asks for the fence.
    pub(super) fn revoke_asked(&mut self, now: u64, asker: Asker, epoch: (i32, i64)) {
        let session = self.note_asker(asker);
        self.replica.handle_revoke_request(now, session, epoch);
    }

    /// A leader has found where the logs part.
    pub(super) fn truncate_asked(&mut self, asker: Asker, leader_epoch: i32, cut: Cut) {
        let session = self.note_asker(asker);
        self.replica
            .handle_truncate_request(session, leader_epoch, cut);
    }

    /// A leader asks for an image.
    pub(super) fn grant_asked(
        &mut self,
        now: u64,
        asker: Asker,
        leader_epoch: i32,
        ask: GrantAsk,
        tail: Option<Tail>,
    ) {
        let session = self.note_asker(asker);
        self.replica
            .handle_grant_request(now, session, leader_epoch, ask, tail);
    }

    /// The grants are withdrawn, or could not be.
    pub(super) fn revoked(&mut self, now: u64, result: Result<(), String>) {
        if let Err(cause) = &result {
            tracing::error!(%cause, "grants cannot be withdrawn; it is tried again");
        }
        self.replica.handle_revoked(now, result.is_ok());
    }

    /// What a scan or a cut has left.
    pub(super) fn stored(&mut self, now: u64, is_cut: bool, result: Result<Stored, Fault>) {
        if let Err(fault) = &result {
            tracing::error!(%fault, is_cut, "the replica cannot be fenced");
        }
        self.readers.is_closed &= result.is_err();
        if is_cut {
            self.replica.handle_cut(now, result);
        } else {
            self.replica.handle_scanned(now, result);
        }
    }

    /// Whether the cut is still wanted: not if another leader has begun a fence meanwhile.
    pub(super) fn is_cutting(&self, cut: Cut) -> bool {
        let follower = self.replica.follower();
        follower.is_some_and(|follower| follower.is_cutting(cut))
    }

    /// A follower looks at its newest tail.
    pub(super) fn look(&mut self, now: u64, tail: Option<Tail>) {
        if let Some(follower) = self.replica.follower_mut() {
            follower.handle_entry(now, tail);
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
        let (log_start, log_end) = self.offsets();
        if self.readers.is_closed {
            refuse_image(&control, correlation, CUT);
            return;
        }
        if !(log_start..=log_end).contains(&offset) {
            let cause = format!("offset {offset} is outside of the log, {log_start} to {log_end}");
            refuse_image(&control, correlation, &cause);
            return;
        }
        let live = self.image_of_offset(offset).and_then(|(id, mark)| {
            let image = self.images.get(&id)?;
            Some((id, mark, Arc::clone(image)))
        });
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
                    let old = self.readers.granted.insert(connection, image);
                    jobs.helper.extend(old.map(HelperJob::Drop));
                }
            }
            None => {
                self.readers.waiting.insert(connection, control);
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

    /// Where the log starts and ends.
    fn offsets(&self) -> (i64, i64) {
        match (self.replica.leader(), self.replica.follower()) {
            (Some(leader), _) => {
                let log = leader.log();
                (log.log_start_offset(), log.log_end_offset())
            }
            (_, Some(follower)) => (follower.log_start_offset(), follower.log_end_offset()),
            (None, None) => (0, 0),
        }
    }

    /// The image in memory that holds an offset, and where in it to read from.
    fn image_of_offset(&self, offset: i64) -> Option<(ImageId, Mark)> {
        if let Some(leader) = self.replica.leader() {
            let state = leader.log().image_of_offset(offset)?;
            return Some((state.id(), state.mark_for_offset(offset)));
        }
        let (id, base_offset) = self.replica.follower()?.image_of_offset(offset)?;
        Some((id, Mark::start(base_offset)))
    }

    pub(super) fn read_loaded(&mut self, request: ColdRequest, loaded: Loaded, jobs: &mut Jobs) {
        let readers = &mut self.readers;
        let Some(control) = readers.waiting.remove(&request.connection) else {
            jobs.helper
                .extend(loaded.ok().map(|(image, _)| HelperJob::Drop(image)));
            return;
        };
        let loaded = match loaded {
            // Its bytes may be those that the cut removes.
            Ok((image, _)) if readers.is_closed => {
                jobs.helper.push(HelperJob::Drop(image));
                Err(CUT.to_owned())
            }
            loaded => loaded,
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
        let readers = &mut self.readers;
        readers.waiting.remove(&connection);
        jobs.helper
            .extend(readers.granted.remove(&connection).map(HelperJob::Drop));
    }

    pub(super) fn poll_timeout(&self) -> Option<u64> {
        self.replica.poll_timeout()
    }

    pub(super) fn tick(&mut self, now: u64, tail: impl FnOnce() -> Option<Tail>) {
        self.replica.handle_tick(now, tail);
    }

    /// The registration that a chain's bytes are sent from.
    pub(super) fn source(&self, post: &Post) -> Option<&Arc<SharedRegion>> {
        let data = post.data.as_ref()?;
        self.images.get(&data.image_id)?.source()
    }

    /// Executes the engine's commands; what others have to do is left in `jobs`.
    pub(super) fn execute(&mut self, now: u64, shared: &Shared, partition: usize, jobs: &mut Jobs) {
        if let Some(leader) = self.replica.leader_mut() {
            self.leading.settle(now, leader, &self.images);
        }
        while let Some(command) = self.replica.poll_command(now) {
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
                    jobs.has_stopped = true;
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
                let images = self.readers.granted.drain().map(|(_, image)| image);
                let images = images.collect();
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
/// Why no image is granted for the moment.
const CUT: &str = "the log is being cut to its leader's";

fn refuse_image(control: &ControlSender, correlation: u64, cause: &str) {
    control.refuse(correlation, ErrorCode::OFFSET_OUT_OF_RANGE, cause);
}
