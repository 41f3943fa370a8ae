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
use super::partition::{Held, Jobs};
use super::shared::Shared;
use super::workers::{HelperJob, WriterJob};
use crate::control::{CutKind, GrantRequest, ImageRequest};
use crate::epoch::{Cut, Report};
use crate::coordinator::{self, Coordinator};
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
        if let Some(Held::Leader(leader)) = &mut self.partitions[partition] {
            leader.acknowledged(now, node, session, leader_epoch);
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
        for partition in 0..self.partitions.len() {
            if let Some(Held::Leader(leader)) = &mut self.partitions[partition]
                && leader.lane_down(now, node, session, cause)
            {
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
                self.with(partition, |held, jobs| held.image_made(now, id, made, jobs));
            }
            Event::SourceLoaded {
                partition,
                follower,
                id,
                loaded,
            } => {
                self.with(partition, |held, jobs| {
                    held.source_loaded(now, follower, id, loaded, jobs)
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
                memory_id: _,
                qp,
                control,
            } => self.lane_up(node, session, qp, control),
            Event::LaneDown {
                node,
                session,
                cause,
                is_gone: _,
            } => match self.lane_of(node, session) {
                Some(index) => self.lose_lane(index, &cause),
                None => self.report_lane_down(node, session, &cause),
            },
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
                    let cause = error.message;
                    self.with(partition, |held, _| match id {
                        Some(id) => held.grant_refused(now, node, session, id, cause),
                        None => held.refused(now, node, session, cause),
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
                if let Some(partition) = self.led_by(node, &request.topic, request.partition) {
                    let epoch = (request.leader_epoch, request.epoch_start_offset);
                    self.with(partition, |held, _| {
                        held.revoke_asked(session, request.correlation, epoch);
                    });
                }
            }
            Event::TruncateAsked {
                node,
                session,
                request,
            } => {
                if let Some(partition) = self.led_by(node, &request.topic, request.partition) {
                    let cut = match request.kind {
                        CutKind::TruncateTo => Cut::TruncateTo(request.offset),
                        CutKind::RestartAt => Cut::RestartAt(request.offset),
                    };
                    self.with(partition, |held, _| {
                        held.truncate_asked(
                            session,
                            request.correlation,
                            request.leader_epoch,
                            cut,
                        );
                    });
                }
            }
            Event::SyncAsked {
                node,
                session,
                request,
            } => {
                if let Some(partition) = self.led_by(node, &request.topic, request.partition) {
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
            } => self.leader_lane(node, session, &control),
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
            Event::CoordinatorStarted(started) => self.coordinator = Some(started.0),
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

    fn lane_up(&mut self, node: u32, session: u64, qp: Box<ReadyQp>, control: ControlSender) {
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
        for partition in 0..self.partitions.len() {
            if let Some(Held::Leader(leader)) = &mut self.partitions[partition] {
                leader.lane_up(node, session);
                self.touch(partition);
            }
        }
    }

    fn leader_lane(&mut self, node: u32, session: u64, control: &ControlSender) {
        let shared = Arc::clone(&self.shared);
        for (partition, info) in shared.partitions.iter().enumerate() {
            if info.leader() == node {
                self.with(partition, |held, _| held.leader_lane(session, control));
            }
        }
    }

    /// The index of a partition that a node leads and we hold.
    fn led_by(&self, node: u32, topic: &str, number: u32) -> Option<usize> {
        let found = self.shared.held_partition(topic, number);
        let found = found.filter(|&p| self.shared.partitions[p].leader() == node);
        if found.is_none() {
            tracing::warn!(node, %topic, partition = number, "not its leader");
        }
        found
    }

    fn grant_asked(&mut self, node: u32, session: u64, request: GrantRequest) {
        let now = self.shared.now();
        let Some(partition) = self.led_by(node, &request.topic, request.partition) else {
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
        self.with(partition, |held, _| {
            held.grant_asked(
                now,
                session,
                request.correlation,
                request.leader_epoch,
                ask,
                tail,
            );
        });
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
        tracing::debug!(?event, "coordinator");
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
            ask_follower(
                &mut self.lanes,
                &self.shared,
                partition,
                node,
                held.epoch(),
                ask,
            );
        }
        let mut broken = None;
        if let Held::Leader(leader) = held {
            for (index, lane) in self.lanes.iter_mut().enumerate() {
                let Some(follower) = leader.engine.follower_on(lane.node) else {
                    continue;
                };
                loop {
                    if lane.qp.send_room() < 2 {
                        lane.is_full = true;
                        break;
                    }
                    let Some(post) = leader.engine.poll_post(now, follower) else {
                        break;
                    };
                    if let Err(error) = post_chain(lane, partition, &post, leader.source(&post)) {
                        broken = Some((index, error.to_string()));
                        break;
                    }
                }
            }
            // Posting may have freed cold images or asked for the next ones.
            leader.execute(now, &self.shared, partition, &mut jobs);
            for (node, ask) in jobs.asks.drain(..) {
                ask_follower(
                    &mut self.lanes,
                    &self.shared,
                    partition,
                    node,
                    leader.epoch(),
                    ask,
                );
            }
        }
        jobs.helper
            .into_iter()
            .for_each(|job| self.helper.send(job));
        jobs.writer
            .into_iter()
            .for_each(|job| self.writer.send(job));
        if let Some((index, cause)) = broken {
            self.lose_lane(index, &cause);
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
