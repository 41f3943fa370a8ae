//! The I/O thread: it owns the lanes and their completion queue, and executes the engines' commands.
//!
//! One turn polls completions, takes what other threads have sent, does what time asks for, and then
//! pumps every partition that something happened to: its commands are executed and its chains posted.
//! A turn without work spins for a moment, then yields, then sleeps on the completion channel and the
//! queues' eventfd until the next time that an engine asked for.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use transport::{Completion, CompletionChannel, Qpn, ReadyQp};

use super::connections::ControlSender;
use super::events::{AppendRequest, Event, EventReceiver};
use super::lane::{Lane, Outbox, ask_follower, lane_fault, post_chain};
use super::memory::{ImageSpec, Purpose};
use super::partition::{Asker, Held, Jobs, Propose};
use super::shared::Shared;
use super::workers::HelperJob;
use super::writer::WriterJob;
use crate::control::{CutKind, GrantRequest, ImageRequest};
use crate::coordinator::{self, Coordinator, Member, MemoryId};
use crate::epoch::{Cut, Report};
use crate::image::{FilePlace, ImageId};
use crate::leader::{GrantAsk, GrantReply};

/// Events and appends taken in one turn at most, so that completions are not kept waiting.
const TURN_MAX: usize = 64;
/// A turn without work spins this long after the last one with work, then yields, then sleeps.
const SPIN: Duration = Duration::from_micros(20);
const YIELD: Duration = Duration::from_micros(100);
/// A job waits this long for memory before it fails, in nanoseconds.
const MEMORY_WAIT_NS: u64 = 2_000_000_000;
/// The I/O thread sleeps this long at most: the coordinator must see it alive several times within the
/// shortest lease.
const SLEEP_MAX: Duration = Duration::from_millis(250);

/// The I/O thread's state.
pub(super) struct Io {
    shared: Arc<Shared>,
    queues: EventReceiver,
    channel: CompletionChannel,
    completions: Vec<Completion>,
    lanes: Vec<Lane>,
    partitions: Vec<Option<Held>>,
    /// Partitions to be pumped.
    dirty: Vec<usize>,
    is_dirty: Vec<bool>,
    helper: Outbox<HelperJob>,
    writer: Outbox<WriterJob>,
    /// Jobs that wait for memory, and since when.
    short: Vec<(u64, HelperJob)>,
    timer: u64,
    /// The lanes of others into us: session, and the way to answer what they ask.
    askers: HashMap<u32, (u64, ControlSender)>,
    /// What was proposed before the coordinator came.
    early_proposals: Vec<(usize, Propose)>,
    /// Until when others are waited for that shall lead, and who waits for it.
    handing_over: Option<(u64, Sender<()>)>,
    /// Last, so that it is dropped when the queues are gone: its thread may wait for room in them.
    coordinator: Option<Box<dyn Coordinator>>,
}

impl Io {
    pub(super) fn new(
        shared: Arc<Shared>,
        queues: EventReceiver,
        channel: CompletionChannel,
        partitions: Vec<Option<Held>>,
        helper: Sender<HelperJob>,
        writer: Sender<WriterJob>,
    ) -> Self {
        let count = partitions.len();
        Self {
            shared,
            queues,
            channel,
            completions: Vec::new(),
            lanes: Vec::new(),
            partitions,
            dirty: Vec::with_capacity(count),
            is_dirty: vec![false; count],
            helper: Outbox {
                sender: helper,
                waiting: VecDeque::new(),
            },
            writer: Outbox {
                sender: writer,
                waiting: VecDeque::new(),
            },
            short: Vec::new(),
            timer: 0,
            askers: HashMap::new(),
            early_proposals: Vec::new(),
            handing_over: None,
            coordinator: None,
        }
    }

    /// Runs until it is told to shut down, or the completion queue breaks.
    pub(super) fn run(mut self) -> Result<(), transport::Error> {
        let mut last_work = Instant::now();
        loop {
            if let Some(coordinator) = &mut self.coordinator {
                coordinator.beat();
            }
            let mut is_work = self.poll_completions()?;
            match self.take_events() {
                Some(is_some) => is_work |= is_some,
                None => break,
            }
            is_work |= self.take_appends();
            is_work |= self.tick();
            is_work |= self.pump();
            if is_work {
                last_work = Instant::now();
            } else {
                self.idle(last_work.elapsed())?;
            }
        }
        Ok(())
    }

    fn touch(&mut self, partition: usize) {
        if !std::mem::replace(&mut self.is_dirty[partition], true) {
            self.dirty.push(partition);
        }
    }

    fn poll_completions(&mut self) -> Result<bool, transport::Error> {
        let mut completions = std::mem::take(&mut self.completions);
        let count = self.shared.cq.poll(&mut completions)?;
        for completion in completions.drain(..) {
            self.complete(completion);
        }
        self.completions = completions;
        Ok(count > 0)
    }

    fn complete(&mut self, completion: Completion) {
        let qpn = completion.qpn();
        let Some(index) = self.lane_index(qpn) else {
            return;
        };
        let lane = &mut self.lanes[index];
        // A completion of a queue pair that is gone, whose number this one has now, is refused here.
        let Ok(done) = lane.qp.complete(completion) else {
            return;
        };
        let Some((partition, leader_epoch)) = lane.posted.pop_front() else {
            return;
        };
        if !done.is_success() {
            let cause = lane_fault(done.status, partition, &self.shared);
            self.lose_lane(index, &cause);
            return;
        }
        let (node, session, was_full) =
            (lane.node, lane.session, std::mem::take(&mut lane.is_full));
        let now = self.shared.now();
        if let Some(held) = &mut self.partitions[partition] {
            held.acknowledged(now, node, session, leader_epoch);
        }
        self.touch(partition);
        if was_full {
            (0..self.partitions.len()).for_each(|partition| self.touch(partition));
        }
    }

    fn lane_index(&self, qpn: Qpn) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.qp.qpn() == qpn)
    }

    /// A lane is broken: its connection is closed, so that the connector makes a new one.
    fn lose_lane(&mut self, index: usize, cause: &str) {
        let lane = self.lanes.swap_remove(index);
        tracing::warn!(follower = lane.node, session = lane.session, %cause, "lane lost");
        lane.control.close();
        self.report_lane_down(lane.node, lane.session, cause);
    }

    fn report_lane_down(&mut self, node: u32, session: u64, cause: &str) {
        let now = self.shared.now();
        self.with_all(|held| held.lane_down(now, node, session, cause));
    }

    /// Lets all partitions handle something.
    fn with_all(&mut self, mut handle: impl FnMut(&mut Held)) {
        for partition in 0..self.partitions.len() {
            if let Some(held) = &mut self.partitions[partition] {
                handle(held);
                self.touch(partition);
            }
        }
    }

    /// Takes a turn's events; `None` if the node shall end.
    fn take_events(&mut self) -> Option<bool> {
        for taken in 0..TURN_MAX {
            match self.queues.events.try_recv() {
                Ok(Event::Shutdown) => return None,
                Ok(event) => self.handle(event),
                Err(_) => return Some(taken > 0),
            }
        }
        Some(true)
    }

    fn handle(&mut self, event: Event) {
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
                    held.read_loaded(request, loaded, jobs)
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
            Event::Disconnected { connection } => {
                for partition in 0..self.partitions.len() {
                    self.with(partition, |held, jobs| held.disconnected(connection, jobs));
                }
            }
            Event::CoordinatorStarted(started) => {
                self.coordinator = Some(started.0);
                for (partition, proposal) in std::mem::take(&mut self.early_proposals) {
                    self.propose(partition, proposal);
                }
            }
            Event::HandOver { deadline, done } => self.hand_over(deadline, done),
            Event::Coordinator(event) => self.coordinated(event),
            Event::Status(reply) => {
                // Whoever asked may have gone.
                let _ = reply.try_send(super::status::status(&self.shared, &self.partitions));
            }
            Event::Shutdown => {}
        }
    }

    /// Lets the oldest image go that is kept for readers only, and has the job tried again. Without such an
    /// image the job waits a while: one that is being drained will become such an image.
    fn make_room(&mut self, since: u64, job: HelperJob) {
        if job
            .spec()
            .is_none_or(|spec| self.shared.domains.books.has_room(spec.len))
        {
            self.helper.send(job);
            return;
        }
        let partitions = self.partitions.iter().enumerate();
        let retired = partitions.filter_map(|(p, held)| Some((held.as_ref()?.retired_since()?, p)));
        if let Some((_, partition)) = retired.min() {
            self.with(partition, |held, _| held.release_retired());
            self.pump_partition(partition);
            self.helper.send(job);
            return;
        }
        if self.shared.now() - since < MEMORY_WAIT_NS {
            self.short.push((since, job));
            self.arm_timer();
            return;
        }
        let cause = format!(
            "the node's images take {} bytes, its limit is {}: raise `memory` of the node in the cluster \
             file, or lower image_size",
            self.shared.domains.books.images_len(),
            self.shared.domains.books.limit()
        );
        if let Some(event) = job.fail(cause) {
            self.handle(event);
        }
    }

    /// Lets a partition handle something, and has it pumped.
    fn with(&mut self, partition: usize, handle: impl FnOnce(&mut Held, &mut Jobs)) {
        let Some(held) = &mut self.partitions[partition] else {
            return;
        };
        let mut jobs = Jobs::default();
        handle(held, &mut jobs);
        jobs.helper
            .into_iter()
            .for_each(|job| self.helper.send(job));
        self.touch(partition);
    }

    fn lane_of(&self, node: u32, session: u64) -> Option<usize> {
        self.lanes
            .iter()
            .position(|lane| lane.node == node && lane.session == session)
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
            is_full: false,
        });
        let now = self.shared.now();
        self.with_all(|held| {
            held.peer(now, node, false);
            held.replica.handle_lane_up(now, node, session, memory_id);
        });
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
            held.image_asked(connection, control, request, jobs, |request, offset| {
                HelperJob::LoadRead {
                    spec,
                    request,
                    offset,
                    dir,
                }
            });
        });
    }

    fn coordinated(&mut self, event: coordinator::Event) {
        use coordinator::Event as Told;
        tracing::debug!(?event, "coordinator");
        let now = self.shared.now();
        match event {
            Told::Changed { partition, agreed } => {
                self.with(partition, |held, _| {
                    held.replica.handle_changed(now, agreed)
                });
            }
            Told::Answered {
                partition,
                ticket,
                answer,
            } => self.with(partition, |held, _| {
                held.replica.handle_answered(now, ticket, answer);
            }),
            Told::Nodes { live } => {
                self.with_all(|held| held.replica.handle_nodes(now, live.clone()));
            }
            Told::SessionLost { .. } => {
                self.with_all(|held| held.replica.handle_session(now, false));
            }
            Told::SessionBack => self.with_all(|held| held.replica.handle_session(now, true)),
        }
    }

    fn propose(&mut self, partition: usize, proposal: Propose) {
        let Some(coordinator) = &mut self.coordinator else {
            // What it has told already came before it did itself.
            self.early_proposals.push((partition, proposal));
            return;
        };
        let Propose {
            ticket,
            expected_revision,
            state,
        } = proposal;
        coordinator.propose(partition, ticket, expected_revision, state);
    }

    /// Gives up what we lead; `done` is dropped once we lead nothing.
    fn hand_over(&mut self, deadline: Instant, done: Sender<()>) {
        let now = self.shared.now();
        let left = deadline.saturating_duration_since(Instant::now());
        let until = now + u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
        self.with_all(|held| {
            held.replica.hand_over(now, until);
        });
        self.handing_over = Some((until, done));
        self.end_hand_over();
    }

    fn end_hand_over(&mut self) {
        let Some((until, _)) = &self.handing_over else {
            return;
        };
        let mut held = self.partitions.iter().flatten();
        // A leader without another member in sync has nobody to hand over to.
        let has_heir = |held: &Held| held.replica.leader().is_some_and(|l| l.isr().len() > 1);
        if self.shared.now() >= *until || !held.any(has_heir) {
            self.handing_over = None;
        }
    }

    fn take_appends(&mut self) -> bool {
        for taken in 0..TURN_MAX {
            // While a partition waits for an image, producers wait in the bounded queue.
            let is_stalled = self.partitions.iter().flatten().any(Held::is_stalled);
            let Some(request) = (!is_stalled)
                .then(|| self.queues.appends.try_recv().ok())
                .flatten()
            else {
                return taken > 0;
            };
            self.append(request);
        }
        true
    }

    fn append(&mut self, request: AppendRequest) {
        let now = self.shared.now();
        let partition = request.partition;
        self.with(partition, |held, _| held.append(now, request));
    }

    /// Does what is due.
    fn tick(&mut self) -> bool {
        let now = self.shared.now();
        if now < self.timer {
            return false;
        }
        self.helper.flush();
        self.writer.flush();
        for (since, job) in std::mem::take(&mut self.short) {
            self.make_room(since, job);
        }
        self.end_hand_over();
        let shared = Arc::clone(&self.shared);
        for partition in 0..self.partitions.len() {
            let Some(held) = &mut self.partitions[partition] else {
                continue;
            };
            if held.poll_timeout().is_some_and(|due| due <= now) {
                held.tick(now, || shared.table.entry(partition).tail);
                self.touch(partition);
            }
        }
        self.arm_timer();
        false
    }

    fn arm_timer(&mut self) {
        let sleep_max = u64::try_from(SLEEP_MAX.as_nanos()).unwrap_or(u64::MAX);
        let due = self
            .partitions
            .iter()
            .flatten()
            .filter_map(Held::poll_timeout)
            .min();
        let latest = self.shared.now() + sleep_max;
        self.timer = due.unwrap_or(latest).min(latest);
        let is_waiting = !self.helper.waiting.is_empty() || !self.writer.waiting.is_empty();
        if is_waiting || !self.short.is_empty() {
            self.timer = self.timer.min(self.shared.now() + 1_000_000);
        }
    }

    /// Executes what the partitions want that something happened to.
    fn pump(&mut self) -> bool {
        if self.dirty.is_empty() {
            return false;
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        for partition in dirty.drain(..) {
            self.is_dirty[partition] = false;
            self.pump_partition(partition);
        }
        // What became dirty meanwhile is pumped in the next turn.
        dirty.append(&mut self.dirty);
        self.dirty = dirty;
        self.arm_timer();
        true
    }

    fn pump_partition(&mut self, partition: usize) {
        let Some(held) = &mut self.partitions[partition] else {
            return;
        };
        let now = self.shared.now();
        let mut jobs = Jobs::default();
        held.execute(now, &self.shared, partition, &mut jobs);
        for (node, ask) in jobs.asks.drain(..) {
            let epoch = held.epoch();
            ask_follower(&mut self.lanes, &self.shared, partition, node, epoch, ask);
        }
        let mut broken = None;
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            while let Some(leader) = held.replica.leader_mut() {
                let Some(follower) = leader.follower_on(lane.node) else {
                    break;
                };
                if lane.qp.send_room() < 2 {
                    lane.is_full = true;
                    break;
                }
                let Some(post) = leader.poll_post(now, follower) else {
                    break;
                };
                if let Err(error) = post_chain(lane, partition, &post, held.source(&post)) {
                    broken = Some((index, error.to_string()));
                    break;
                }
            }
        }
        if held.replica.leader().is_some() {
            // Posting may have freed cold images or asked for the next ones.
            held.execute(now, &self.shared, partition, &mut jobs);
            for (node, ask) in jobs.asks.drain(..) {
                let epoch = held.epoch();
                ask_follower(&mut self.lanes, &self.shared, partition, node, epoch, ask);
            }
        }
        jobs.helper
            .into_iter()
            .for_each(|job| self.helper.send(job));
        jobs.writer
            .into_iter()
            .for_each(|job| self.writer.send(job));
        for (node, log_end) in jobs.log_ends {
            if let Some(lane) = self.lanes.iter().find(|lane| lane.node == node) {
                lane.control.send(log_end);
            }
        }
        for proposal in jobs.proposals {
            self.propose(partition, proposal);
        }
        if let Some((index, cause)) = broken {
            self.lose_lane(index, &cause);
        }
        if jobs.has_stopped {
            self.end_hand_over();
        }
    }

    /// Nothing to do: spin, yield or sleep.
    fn idle(&mut self, since: Duration) -> Result<(), transport::Error> {
        if since < SPIN {
            std::hint::spin_loop();
            return Ok(());
        }
        if since < YIELD {
            std::thread::yield_now();
            return Ok(());
        }
        self.shared.cq.arm(false)?;
        self.queues.waker.announce_sleep();
        if !self.poll_completions()? && self.queues.events.is_empty() && self.can_sleep() {
            let ns = self.timer.saturating_sub(self.shared.now());
            let timeout = Timespec {
                tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(1),
                tv_nsec: i64::try_from(ns % 1_000_000_000).unwrap_or(0),
            };
            let mut fds = [
                PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.queues.waker.as_fd(), PollFlags::IN),
            ];
            // A signal only wakes us early.
            let _ = poll(&mut fds, Some(&timeout));
        }
        self.queues.waker.clear();
        // Takes and acknowledges the event that the arming may have caused.
        while self.channel.wait(Some(Duration::ZERO))?.is_some() {}
        Ok(())
    }

    fn can_sleep(&self) -> bool {
        let is_stalled = self.partitions.iter().flatten().any(Held::is_stalled);
        self.dirty.is_empty() && (is_stalled || self.queues.appends.is_empty())
    }
}
