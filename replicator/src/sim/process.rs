//! A process: the replicas of all partitions, and what happens to them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::appends::{Stalled, Waiting};
use super::events::{Happening, ProcessEvent};
use super::jobs::{Jobs, Registered, WriterJob};
use super::registry::Client;
use super::sessions::{Incoming, Link};
use super::storage::WriteError;
use super::{Machine, Site, Violation, World};
use crate::coordinator::{Event, Member};
use crate::image::ImageId;
use crate::replica::Replica;

/// How long a successor is waited for.
const HAND_OVER_NS: u64 = 1_500_000_000;

/// A partition that a process holds.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) replica: Replica,
    /// Who asked last, whom the follower follows, and whom it granted something.
    pub(super) asker: Option<Incoming>,
    pub(super) leader: Option<Incoming>,
    pub(super) granted_to: Option<Incoming>,
    /// Where a leader writes tails.
    pub(super) table: Option<(u64, u32)>,
    pub(super) images: BTreeMap<ImageId, Registered>,
    /// Names for images that are made for consumers, and which of them has which.
    pub(super) loaded_count: u64,
    pub(super) granted: BTreeMap<usize, ImageId>,
    /// The files hold what is about to be cut: nothing of them is granted.
    pub(super) is_closed: bool,
    /// Up to where segments have been asked to be removed.
    pub(super) asked_start: i64,
    /// It is being handed over, with a log that ends here.
    pub(super) handed_at: Option<i64>,
    pub(super) stalled: Stalled,
    pub(super) waiting: VecDeque<Waiting>,
    timer: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Process {
    pub(super) incarnation: u64,
    pub(super) held: Vec<Held>,
    pub(super) client: Client,
    pub(super) is_paused: bool,
    pub(super) inbox: VecDeque<ProcessEvent>,
    /// Our lanes to other nodes, and theirs to us.
    pub(super) links: BTreeMap<usize, Link>,
    pub(super) incoming: BTreeMap<usize, Incoming>,
    pub(super) jobs: Jobs,
    /// It ends as soon as it leads nothing any more.
    pub(super) is_stopping: bool,
}

impl Held {
    fn new(replica: Replica) -> Self {
        Self {
            replica,
            asker: None,
            leader: None,
            granted_to: None,
            table: None,
            images: BTreeMap::new(),
            loaded_count: 0,
            granted: BTreeMap::new(),
            is_closed: false,
            asked_start: 0,
            handed_at: None,
            stalled: Stalled::new(),
            waiting: VecDeque::new(),
            timer: None,
        }
    }

    /// Where the log starts and ends.
    pub(super) fn offsets(&mut self) -> (i64, i64) {
        match self.replica.leader() {
            Some(leader) => (
                leader.log().log_start_offset(),
                leader.log().log_end_offset(),
            ),
            None => {
                let follower = self.replica.follower().expect("it is one or the other");
                (follower.log_start_offset(), follower.log_end_offset())
            }
        }
    }

    pub(super) fn high_watermark(&self) -> i64 {
        let leader = self.replica.leader().map(|leader| leader.high_watermark());
        let follower = self.replica.follower().map(|f| f.high_watermark());
        leader.or(follower).unwrap_or(0)
    }
}

impl World {
    /// Starts a process on a machine: recovery first. With a full disk it is tried again.
    pub(super) fn start(&mut self, n: usize) -> Result<(), Violation> {
        let memory_id = self.machines[n].memory_id;
        let me = Member {
            node: node_id(n),
            memory_id,
        };
        self.sessions += 1;
        let incarnation = self.sessions;
        let mut held = Vec::new();
        for partition in 0..self.oracles.len() {
            let site = Site { node: n, partition };
            let seen = match self.recover(site) {
                Ok(seen) => seen,
                Err(WriteError::Full) => {
                    self.note(|| format!("{site} is not recovered: its disk is full"));
                    self.schedule(200_000_000, Happening::Start { node: n });
                    return Ok(());
                }
                Err(cause) => return Err(Violation(format!("{site} does not start: {cause}"))),
            };
            self.check_recovered(site)?;
            let disk = &self.store(site).disk;
            let (epoch, stored) = (disk.leader_epoch().max(seen), disk.stored());
            self.note(|| format!("{site} starts, epoch {epoch}: {stored:?}"));
            let replica = Replica::new(self.plan.replica, me, incarnation, epoch, stored);
            held.push(Held::new(replica));
        }
        self.verbs.start(n);
        self.machines[n].process = Some(Process {
            incarnation,
            held,
            client: Client::new(self.now),
            is_paused: false,
            inbox: VecDeque::new(),
            links: BTreeMap::new(),
            incoming: BTreeMap::new(),
            jobs: Jobs::default(),
            is_stopping: false,
        });
        let me = (n, incarnation);
        for to in (0..self.machines.len()).filter(|to| *to != n) {
            self.tell_later(1_000_000, me, ProcessEvent::Connect { to });
        }
        self.watch_from_now(n);
        self.tell_later(0, me, ProcessEvent::Beat);
        self.tell_later(self.plan.sweep_ns, me, ProcessEvent::Sweep);
        self.with_process(n, |_, _| Ok(()))
    }

    /// Reads the files, and copies to them what memory holds beyond; returns the epoch that memory tells.
    fn recover(&mut self, site: Site) -> Result<i32, WriteError> {
        let store = self.store_mut(site);
        store.disk.recover().map_err(WriteError::Wrong)?;
        let tail = store.memory.drain(&mut store.disk)?;
        let told = tail.map_or(0, |tail| tail.high_watermark);
        store
            .disk
            .set_high_watermark(store.disk.high_watermark.max(told));
        Ok(tail.map_or(0, |tail| tail.leader_epoch))
    }

    /// Ends a process at any moment: what it had under way is done in part or not at all.
    pub(super) fn end_process(&mut self, n: usize, is_power_loss: bool) {
        let Some(process) = self.machines[n].process.take() else {
            return;
        };
        self.tear_job(n, &process.jobs);
        self.verbs.end(self.now, n);
        self.close_all_of(n, process.incarnation, is_power_loss);
    }

    /// A process ends in an orderly way: what memory holds is in the files afterwards, and synced.
    pub(super) fn stop(&mut self, n: usize, incarnation: u64) {
        let Machine { process, .. } = &mut self.machines[n];
        if process.take_if(|p| p.incarnation == incarnation).is_none() {
            return;
        }
        self.note(|| format!("node {n} stops"));
        self.verbs.end(self.now, n);
        self.close_all_of(n, incarnation, false);
        for store in &mut self.machines[n].stores {
            // Otherwise memory stays as it is, as after a crash.
            if store.disk.check().is_ok()
                && let Ok(Some(tail)) = store.memory.drain(&mut store.disk)
            {
                store.disk.sync();
                store.disk.set_high_watermark(tail.high_watermark);
            }
        }
        let delay = self.rng.spread(1_000_000, 3_000_000_000);
        self.schedule(delay, Happening::Start { node: n });
    }

    /// Something happens to a process; it learns of it once it runs.
    pub(super) fn tell(
        &mut self,
        (n, incarnation): (usize, u64),
        event: ProcessEvent,
    ) -> Result<(), Violation> {
        let Some(process) = &mut self.machines[n].process else {
            return Ok(());
        };
        if process.incarnation != incarnation {
            return Ok(());
        }
        if process.is_paused {
            process.inbox.push_back(event);
            return Ok(());
        }
        self.with_process(n, |world, process| world.handle(n, process, event))
    }

    pub(super) fn tell_later(&mut self, delay: u64, to: (usize, u64), event: ProcessEvent) {
        let (node, incarnation) = to;
        self.schedule(
            delay,
            Happening::Process {
                node,
                incarnation,
                event,
            },
        );
    }

    /// Does something in a process, and then all that its engines want.
    pub(super) fn with_process(
        &mut self,
        n: usize,
        body: impl FnOnce(&mut Self, &mut Process) -> Result<(), Violation>,
    ) -> Result<(), Violation> {
        let mut process = self.machines[n].process.take().expect("the process runs");
        let done = body(self, &mut process).and_then(|()| self.pump(n, &mut process));
        self.machines[n].process = Some(process);
        done
    }

    pub(super) fn handle(
        &mut self,
        n: usize,
        p: &mut Process,
        event: ProcessEvent,
    ) -> Result<(), Violation> {
        let now = self.local_now(n);
        match event {
            ProcessEvent::Timer { partition, at } => {
                let held = &mut p.held[partition];
                if held.timer.take_if(|armed| *armed == at).is_some() {
                    let memory = &self.machines[n].stores[partition].memory;
                    held.replica.handle_tick(now, || memory.tail());
                }
            }
            ProcessEvent::Helped => self.helped(n, p, now)?,
            ProcessEvent::Written => self.written(n, p, now)?,
            ProcessEvent::Completed {
                to,
                session,
                chains,
            } => {
                for chain in chains {
                    if let Some(leader) = p.held[chain.partition].replica.leader_mut()
                        && let Some(follower) = leader.follower_on(node_id(to))
                    {
                        leader.handle_completion(now, follower, session, chain.leader_epoch);
                    }
                }
            }
            ProcessEvent::LaneFailed { to, session } => self.lose_link(n, p, now, to, session),
            ProcessEvent::Connect { to } => self.connect(n, p, to),
            ProcessEvent::Unanswered { connection } => self.unanswered(n, p, now, connection),
            ProcessEvent::Frame {
                connection,
                message,
            } => self.receive(n, p, now, connection, message)?,
            ProcessEvent::Closed { connection } => self.closed(n, p, now, connection),
            ProcessEvent::Append(append) => self.append(n, p, now, append)?,
            ProcessEvent::Beat => {
                let event = self.beat(n, p.incarnation, &mut p.client);
                hear(p, now, event);
            }
            ProcessEvent::Renewed { sent_at } => {
                let event = self.renewed(n, &mut p.client, sent_at);
                hear(p, now, event);
            }
            ProcessEvent::Decided {
                partition,
                ticket,
                answer,
            } => {
                let event = self.decided(&mut p.client, (partition, ticket), answer);
                hear(p, now, event);
            }
            ProcessEvent::NoAnswer { partition, ticket } => {
                let event = self.no_answer(n, &mut p.client, (partition, ticket));
                hear(p, now, event);
            }
            ProcessEvent::Coordinator(event) => hear(p, now, Some(event)),
            ProcessEvent::Sweep => self.sweep(n, p),
            ProcessEvent::HandOver => self.hand_over(n, p, now),
        }
        Ok(())
    }

    /// Has the segments looked at that retention may remove.
    fn sweep(&mut self, n: usize, p: &mut Process) {
        for partition in 0..p.held.len() {
            let site = Site { node: n, partition };
            if let Some(leader) = p.held[partition].replica.leader() {
                let high_watermark = leader.high_watermark();
                self.write(site, p, WriterJob::Sweep { high_watermark });
            }
        }
        let me = (n, p.incarnation);
        self.tell_later(self.plan.sweep_ns, me, ProcessEvent::Sweep);
    }

    /// Gives away what it leads.
    fn hand_over(&mut self, n: usize, p: &mut Process, now: u64) {
        for (partition, held) in p.held.iter_mut().enumerate() {
            if held.replica.hand_over(now, now + HAND_OVER_NS) {
                let (_, log_end) = held.offsets();
                held.handed_at = Some(log_end);
                self.note(|| format!("node {n} hands over partition {partition} at {log_end}"));
            }
        }
    }

    /// The time that a node's clock shows.
    pub(super) fn local_now(&self, n: usize) -> u64 {
        self.machines[n].clock.local(self.now)
    }

    /// Executes what the engines want until they want nothing, and arms the timers.
    fn pump(&mut self, n: usize, p: &mut Process) -> Result<(), Violation> {
        let now = self.local_now(n);
        let mut unsettled: BTreeSet<usize> = (0..p.held.len()).collect();
        while let Some(partition) = unsettled.pop_first() {
            let site = Site { node: n, partition };
            self.commit(site, p, now)?;
            let mut is_progress = false;
            while let Some(command) = p.held[partition].replica.poll_command(now) {
                is_progress = true;
                self.obey(site, p, command)?;
            }
            self.follow_log_start(site, p);
            if is_progress || self.post_all(site, p, now) {
                unsettled.insert(partition);
            } else {
                self.arm(site, p);
            }
        }
        let is_leading = p.held.iter().any(|held| held.replica.leader().is_some());
        if p.is_stopping && !is_leading {
            p.is_stopping = false;
            let incarnation = p.incarnation;
            let stop = Happening::Stop {
                node: n,
                incarnation,
            };
            self.schedule(1_000_000, stop);
        }
        Ok(())
    }

    fn arm(&mut self, site: Site, p: &mut Process) {
        let Site { node, partition } = site;
        let incarnation = p.incarnation;
        let held = &mut p.held[partition];
        let Some(due) = held.replica.poll_timeout() else {
            return;
        };
        let at = self.machines[node].clock.global(due).max(self.now + 1);
        if held.timer.is_none_or(|armed| at < armed) {
            held.timer = Some(at);
            let event = ProcessEvent::Timer { partition, at };
            self.agenda.push(
                at,
                Happening::Process {
                    node,
                    incarnation,
                    event,
                },
            );
        }
    }

    /// Removes the segments that the leader has removed, once the own files reach so far.
    fn follow_log_start(&mut self, site: Site, p: &mut Process) {
        let held = &mut p.held[site.partition];
        if let Some(follower) = held.replica.follower() {
            let offset = follower.leader_log_start_offset();
            if offset > held.asked_start && offset <= follower.drained_offset() {
                held.asked_start = offset;
                self.write(site, p, WriterJob::StartAt(offset));
            }
        }
    }
}

/// The coordinator has told something.
fn hear(p: &mut Process, now: u64, event: Option<Event>) {
    let Some(event) = event else { return };
    match event {
        Event::Changed { partition, agreed } => {
            p.held[partition].replica.handle_changed(now, agreed);
        }
        Event::Answered {
            partition,
            ticket,
            answer,
        } => p.held[partition]
            .replica
            .handle_answered(now, ticket, answer),
        Event::Nodes { live } => {
            for held in &mut p.held {
                held.replica.handle_nodes(now, live.clone());
            }
        }
        Event::SessionLost { .. } | Event::SessionBack => {
            let has_session = matches!(event, Event::SessionBack);
            for held in &mut p.held {
                held.replica.handle_session(now, has_session);
            }
        }
    }
}

pub(super) fn node_id(n: usize) -> u32 {
    u32::try_from(n).expect("few nodes")
}
