//! The I/O thread: it owns the lanes and their completion queue, and executes the engines' commands.
//!
//! One turn polls completions, takes what other threads have sent, does what time asks for, and then
//! pumps every partition that something happened to: its commands are executed and its chains posted.
//! A turn without work spins for a moment, then yields, then sleeps on the completion channel and the
//! queues' eventfd until the next time that an engine asked for.

mod coordination;
mod dispatch;
mod finish;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use transport::{Completion, CompletionChannel, Qpn};

use self::finish::Finishing;
use super::connections::ControlSender;
use super::deadlines::Deadlines;
use super::events::{AppendRequest, Event, EventReceiver};
use super::lane::{CHAIN_WR, Lane, Outbox, ask_follower, lane_fault, post_chain};
use super::partition::{Held, Jobs, Propose};
use super::shared::Shared;
use super::views::Shown;
use super::workers::HelperJob;
use super::writer::WriterJob;
use crate::coordinator::Coordinator;

/// Events and appends taken in one turn at most, so that completions are not kept waiting.
const TURN_MAX: usize = 64;
/// A turn without work spins this long after the last one with work, then yields, then sleeps.
const SPIN: Duration = Duration::from_micros(20);
const YIELD: Duration = Duration::from_micros(100);
/// A job waits this long for memory before it fails, in nanoseconds.
const MEMORY_WAIT_NS: u64 = 2_000_000_000;
/// What a consumer has asked for stays in memory this long, though others wait for room to read.
const MEMORY_LENT_NS: u64 = 1_000_000_000;
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
    /// When each partition wants to be looked at, as of its last pumping.
    deadlines: Deadlines<u64>,
    /// Partitions that take no more appends for the moment.
    stalled: BTreeSet<usize>,
    helper: Outbox<HelperJob>,
    writer: Outbox<WriterJob>,
    /// Jobs that wait for memory, and since when.
    short: Vec<(u64, HelperJob)>,
    timer: u64,
    /// The lanes of others into us: session, and the way to answer what they ask.
    askers: HashMap<u32, (u64, ControlSender)>,
    /// What was proposed before the coordinator came.
    early_proposals: Vec<(usize, Propose)>,
    finishing: Option<Finishing>,
    /// Of each partition, what its view shows.
    shown: Vec<Option<Shown>>,
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
            // All, for their first deadlines.
            dirty: (0..count).collect(),
            is_dirty: vec![true; count],
            deadlines: Deadlines::new(count),
            stalled: BTreeSet::new(),
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
            finishing: None,
            shown: vec![None; count],
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
            self.tick();
            is_work |= self.pump();
            self.go_on_finishing();
            if is_work {
                last_work = Instant::now();
            } else {
                self.idle(last_work.elapsed())?;
            }
        }
        self.end();
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
        if count > 0 {
            self.touch_waiting();
        }
        Ok(count > 0)
    }

    /// Has partitions pumped that wait for room on a lane, as many as there is room for a chain of each.
    fn touch_waiting(&mut self) {
        for index in 0..self.lanes.len() {
            let lane = &self.lanes[index];
            let count = lane.waiting.len().min(lane.qp.send_room() / CHAIN_WR);
            for _ in 0..count {
                if let Some(partition) = self.lanes[index].waiting.pop_front() {
                    self.touch(partition);
                }
            }
        }
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
        let (node, session) = (lane.node, lane.session);
        let now = self.shared.now();
        if let Some(held) = &mut self.partitions[partition] {
            held.acknowledged(now, node, session, leader_epoch);
        }
        self.touch(partition);
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
        if let Some(partition) = self.release_oldest(job.is_for_appends()) {
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

    /// Lets the oldest image go that is kept for readers only; says of which partition. What consumers have
    /// asked for stays for a while, unless appends need the room.
    fn release_oldest(&mut self, is_for_appends: bool) -> Option<usize> {
        let lent_until = match is_for_appends {
            true => u64::MAX,
            false => self.shared.now().saturating_sub(MEMORY_LENT_NS),
        };
        let held = self.partitions.iter().enumerate();
        let held = held.filter_map(|(partition, held)| Some((partition, held.as_ref()?)));
        let candidates = held.flat_map(|(partition, held)| {
            let retired = held.retired_since().map(|since| (since, partition, false));
            let lent = held.lent_since().filter(|since| *since <= lent_until);
            retired
                .into_iter()
                .chain(lent.map(|since| (since, partition, true)))
        });
        let (_, partition, is_lent) = candidates.min()?;
        self.with(partition, |held, jobs| match is_lent {
            true => held.release_lent(jobs),
            false => held.release_retired(),
        });
        Some(partition)
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

    fn take_appends(&mut self) -> bool {
        for taken in 0..TURN_MAX {
            // While a partition can take no more, producers wait in the bounded queue.
            if !self.stalled.is_empty() {
                return taken > 0;
            }
            let Ok(request) = self.queues.appends.try_recv() else {
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
        self.note_stall(partition);
    }

    fn note_stall(&mut self, partition: usize) {
        if self.partitions[partition]
            .as_ref()
            .is_some_and(Held::is_stalled)
        {
            self.stalled.insert(partition);
        } else if !self.stalled.is_empty() {
            self.stalled.remove(&partition);
        }
    }

    /// Does what is due, for a turn's worth of partitions.
    fn tick(&mut self) {
        let now = self.shared.now();
        if now < self.timer {
            return;
        }
        self.helper.flush();
        self.writer.flush();
        for (since, job) in std::mem::take(&mut self.short) {
            self.make_room(since, job);
        }
        let shared = Arc::clone(&self.shared);
        for _ in 0..TURN_MAX {
            let Some(partition) = self.deadlines.pop(now) else {
                break;
            };
            let tail = || shared.table.entry(partition).tail;
            self.with(partition, |held, jobs| held.tick(now, tail, jobs));
        }
        self.arm_timer();
    }

    fn arm_timer(&mut self) {
        let sleep_max = u64::try_from(SLEEP_MAX.as_nanos()).unwrap_or(u64::MAX);
        let latest = self.shared.now() + sleep_max;
        self.timer = self.deadlines.first().unwrap_or(latest).min(latest);
        let is_waiting = !self.helper.waiting.is_empty() || !self.writer.waiting.is_empty();
        if is_waiting || !self.short.is_empty() || self.finishing.is_some() {
            self.timer = self.timer.min(self.shared.now() + 1_000_000);
        }
    }

    /// Executes what the partitions want that something happened to; says whether that was anything.
    fn pump(&mut self) -> bool {
        if self.dirty.is_empty() {
            return false;
        }
        let mut is_work = false;
        let mut dirty = std::mem::take(&mut self.dirty);
        for partition in dirty.drain(..) {
            self.is_dirty[partition] = false;
            is_work |= self.pump_partition(partition);
        }
        // What became dirty meanwhile is pumped in the next turn.
        dirty.append(&mut self.dirty);
        self.dirty = dirty;
        self.arm_timer();
        is_work
    }

    fn pump_partition(&mut self, partition: usize) -> bool {
        let Some(held) = &mut self.partitions[partition] else {
            return false;
        };
        let now = self.shared.now();
        let mut jobs = Jobs::default();
        let mut is_work = held.execute(now, &self.shared, partition, &mut jobs);
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
                if lane.qp.send_room() < CHAIN_WR {
                    lane.wait(partition);
                    break;
                }
                let Some(post) = leader.poll_post(now, follower) else {
                    break;
                };
                is_work = true;
                if let Err(error) = post_chain(lane, partition, &post, held.source(&post)) {
                    broken = Some((index, error.to_string()));
                    break;
                }
            }
        }
        if held.replica.leader().is_some() {
            // Posting may have freed cold images or asked for the next ones.
            is_work |= held.execute(now, &self.shared, partition, &mut jobs);
            for (node, ask) in jobs.asks.drain(..) {
                let epoch = held.epoch();
                ask_follower(&mut self.lanes, &self.shared, partition, node, epoch, ask);
            }
        }
        self.deadlines.set(partition, held.poll_timeout());
        let shown = &mut self.shown[partition];
        self.shared.views.show(partition, held, shown);
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
        self.note_stall(partition);
        is_work
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
        self.dirty.is_empty() && (!self.stalled.is_empty() || self.queues.appends.is_empty())
    }
}
