//! A partition that the node holds: its engine, its images, and who waits for what.

mod execute;
mod readers;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use transport::SharedRegion;

use self::readers::Readers;
use super::append::AppendError;
use super::connections::ControlSender;
use super::events::{AppendRequest, Fill, ReplyTo};
use super::files::StorageFault;
use super::lane::Ask;
use super::leading::Leading;
use super::memory::Image;
use super::workers::{HelperJob, Loaded, Made};
use super::writer::WriterJob;
use crate::control::{ErrorCode, LogEnd};
use crate::coordinator::PartitionState;
use crate::epoch::{Cut, Report};
use crate::follower::{Drain, Fault};
use crate::image::{ImageId, Mark};
use crate::leader::{self, GrantAsk, GrantReply, Post};
use crate::partition::{DrainJob, Stored};
use crate::replica::Replica;
use crate::table::Tail;

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

    /// Whether nothing more can be taken for it, until something that waits for room has got it.
    pub(super) fn is_stalled(&self) -> bool {
        self.leading.is_stalled()
    }

    /// Whether appends wait for their answer.
    pub(super) fn is_appending(&self) -> bool {
        self.leading.is_appending()
    }

    /// Takes no more appends.
    pub(super) fn close(&mut self) {
        if let Some(leader) = self.replica.leader_mut() {
            leader.set_closed(true);
        }
    }

    pub(super) fn append(&mut self, now: u64, request: AppendRequest) {
        if matches!(&request.reply_to, ReplyTo::Connection(control) if control.is_barred()) {
            let cause = "a batch before it on this connection was not taken".to_owned();
            request.refuse(ErrorCode::OUT_OF_ORDER, cause);
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
        request.refuse(ErrorCode::NOT_LEADER, cause);
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

    pub(super) fn poll_timeout(&self) -> Option<u64> {
        let dues = [
            self.replica.poll_timeout(),
            self.leading.reservation_due(),
            self.readers.due(),
        ];
        dues.into_iter().flatten().min()
    }

    pub(super) fn tick(&mut self, now: u64, tail: impl FnOnce() -> Option<Tail>, jobs: &mut Jobs) {
        self.replica.handle_tick(now, tail);
        self.readers.take_back_overdue(now, jobs);
        if let Some(leader) = self.replica.leader_mut() {
            self.leading.expire_reservation(now, leader);
        }
    }

    /// Somebody has filled what was reserved.
    pub(super) fn filled(&mut self, now: u64, fill: Fill) {
        match self.replica.leader_mut() {
            Some(leader) => self.leading.fill(now, leader, &self.images, fill),
            None => {
                let cause = "the node leads the partition no more".to_owned();
                fill.reply.send(Err(AppendError::NotLeader(cause)));
            }
        }
    }

    /// Somebody does without what was reserved.
    pub(super) fn unreserved(&mut self, now: u64, number: u64, is_touched: bool) {
        if let Some(leader) = self.replica.leader_mut() {
            self.leading.unreserve(now, leader, number, is_touched);
        }
    }

    /// The registration that a chain's bytes are sent from.
    pub(super) fn source(&self, post: &Post) -> Option<&Arc<SharedRegion>> {
        let data = post.data.as_ref()?;
        self.images.get(&data.image_id)?.source()
    }
}
