//! A process: a replica's engines, and what executes their commands.

use std::collections::{BTreeMap, VecDeque};

use super::check::Acker;
use super::clients::Append;
use super::control::Control;
use super::events::{Happening, ProcessEvent};
use super::jobs::{HelperJob, Jobs, Registered, WriterJob};
use super::registry::Client;
use super::sessions::{Incoming, Link};
use super::verbs::{Backing, Nic, WorkRequest};
use super::{Machine, Violation, World};
use crate::control::Acks;
use crate::coordinator::{Event, Member};
use crate::image::ImageId;
use crate::leader::{self, Post};
use crate::partition::AppendError;
use crate::replica::{self, Replica};
use crate::table::{BASE_OFFSET_UNKNOWN, ENTRY_LEN, ImageLocation};
use crate::{follower, leader::Leader};

/// Appends that wait for an image at most.
const STALLED_MAX: usize = 8;

/// A batch that is appended and not answered yet.
#[derive(Debug)]
struct Waiting {
    append: Append,
    base_offset: i64,
    end_offset: i64,
}

#[derive(Debug)]
pub(super) struct Process {
    pub(super) incarnation: u64,
    pub(super) nic: Nic,
    pub(super) replica: Replica,
    pub(super) client: Client,
    pub(super) is_paused: bool,
    pub(super) inbox: VecDeque<ProcessEvent>,
    /// Our lanes to other nodes, and theirs to us.
    pub(super) links: BTreeMap<usize, Link>,
    pub(super) incoming: BTreeMap<usize, Incoming>,
    /// Who asked last, whom the follower follows, and whom it granted something.
    pub(super) asker: Option<Incoming>,
    pub(super) leader: Option<Incoming>,
    pub(super) granted_to: Option<Incoming>,
    /// Where a leader writes tails.
    pub(super) table: Option<(u64, u32)>,
    pub(super) images: BTreeMap<ImageId, Registered>,
    pub(super) jobs: Jobs,
    /// Names for images that are made for consumers.
    pub(super) loaded_count: u64,
    pub(super) granted: BTreeMap<usize, ImageId>,
    timer: Option<u64>,
    stalled: VecDeque<Append>,
    waiting: VecDeque<Waiting>,
}

impl World {
    /// Starts a process on a machine: recovery first.
    pub(super) fn start(&mut self, n: usize) -> Result<(), Violation> {
        let Machine { disk, memory, .. } = &mut self.machines[n];
        let read = disk.recover().and_then(|()| memory.drain(disk));
        let tail = read.map_err(|cause| Violation(format!("node {n} does not start: {cause}")))?;
        let known = disk
            .high_watermark
            .max(tail.map_or(0, |tail| tail.high_watermark));
        disk.high_watermark = known.min(disk.log_end_offset());
        let epoch = disk
            .leader_epoch()
            .max(tail.map_or(0, |tail| tail.leader_epoch));
        let stored = disk.stored();
        let me = Member {
            node: node_id(n),
            memory_id: memory.id,
        };
        self.check_recovered(n)?;
        self.sessions += 1;
        let incarnation = self.sessions;
        self.note(|| format!("node {n} starts, epoch {epoch}: {stored:?}"));
        let replica = Replica::new(self.plan.replica, me, incarnation, epoch, stored);
        self.machines[n].process = Some(Process {
            incarnation,
            nic: Nic::default(),
            replica,
            client: Client::new(self.now),
            is_paused: false,
            inbox: VecDeque::new(),
            links: BTreeMap::new(),
            incoming: BTreeMap::new(),
            asker: None,
            leader: None,
            granted_to: None,
            table: None,
            images: BTreeMap::new(),
            jobs: Jobs::default(),
            loaded_count: 0,
            granted: BTreeMap::new(),
            timer: None,
            stalled: VecDeque::new(),
            waiting: VecDeque::new(),
        });
        let me = (n, incarnation);
        for to in (0..self.machines.len()).filter(|to| *to != n) {
            self.tell_later(1_000_000, me, ProcessEvent::Connect { to });
        }
        self.watch_from_now(n);
        self.tell_later(0, me, ProcessEvent::Beat);
        self.with_process(n, |_, _| Ok(()))
    }

    /// Ends a process at any moment: what it had under way is done in part or not at all.
    pub(super) fn end_process(&mut self, n: usize, is_power_loss: bool) {
        let Some(process) = self.machines[n].process.take() else {
            return;
        };
        self.tear_job(n, &process.jobs);
        self.end_lanes_of(n, process.incarnation);
        self.close_all_of(n, process.incarnation, is_power_loss);
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
        let now = self.machines[n].clock.local(self.now);
        match event {
            ProcessEvent::Timer { at } => {
                if p.timer == Some(at) {
                    p.timer = None;
                    self.tick(n, p, now);
                }
            }
            ProcessEvent::Helped => self.helped(n, p, now)?,
            ProcessEvent::Written => self.written(n, p, now)?,
            ProcessEvent::Completed {
                to,
                session,
                epochs,
            } => {
                if let Some(leader) = p.replica.leader_mut()
                    && let Some(follower) = leader.follower_on(node_id(to))
                {
                    for epoch in epochs {
                        leader.handle_completion(now, follower, session, epoch);
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
                self.hear(p, now, event);
            }
            ProcessEvent::Renewed { sent_at } => {
                let event = self.renewed(n, &mut p.client, sent_at);
                self.hear(p, now, event);
            }
            ProcessEvent::Decided { ticket, answer } => {
                let event = self.decided(&mut p.client, ticket, answer);
                self.hear(p, now, event);
            }
            ProcessEvent::NoAnswer { ticket } => {
                let event = self.no_answer(n, &mut p.client, ticket);
                self.hear(p, now, event);
            }
            ProcessEvent::Coordinator(event) => self.hear(p, now, Some(event)),
        }
        Ok(())
    }

    /// The coordinator has told something.
    fn hear(&mut self, p: &mut Process, now: u64, event: Option<Event>) {
        match event {
            None => {}
            Some(Event::Changed { agreed, .. }) => p.replica.handle_changed(now, agreed),
            Some(Event::Answered { ticket, answer, .. }) => {
                p.replica.handle_answered(now, ticket, answer)
            }
            Some(Event::Nodes { live }) => p.replica.handle_nodes(now, live),
            Some(Event::SessionLost { .. }) => p.replica.handle_session(now, false),
            Some(Event::SessionBack) => p.replica.handle_session(now, true),
        }
    }

    fn tick(&mut self, n: usize, p: &mut Process, now: u64) {
        let memory = &self.machines[n].memory;
        p.replica.handle_tick(now, || memory.tail());
    }

    // Appends.

    fn append(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        append: Append,
    ) -> Result<(), Violation> {
        if p.stalled.len() >= STALLED_MAX {
            self.answer(n, &append, Err(()));
        } else if p.stalled.is_empty() {
            self.try_append(n, p, now, append)?;
        } else {
            p.stalled.push_back(append);
        }
        Ok(())
    }

    /// Appends a batch, or stalls it until there is an image; says whether others may follow.
    fn try_append(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        mut append: Append,
    ) -> Result<bool, Violation> {
        let Some(leader) = p.replica.leader_mut() else {
            self.answer(n, &append, Err(()));
            return Ok(true);
        };
        let placement = match leader.append(now, append.acks, &mut append.batch) {
            Ok(placement) => placement,
            Err(AppendError::NoImage) => {
                p.stalled.push_front(append);
                return Ok(false);
            }
            Err(AppendError::NotLeader(_) | AppendError::NotEnoughReplicas { .. }) => {
                self.answer(n, &append, Err(()));
                return Ok(true);
            }
            Err(error) => return Err(Violation(format!("an append failed: {error}"))),
        };
        let bytes = append.batch.as_bytes();
        let at = placement.byte_position as usize;
        let memory = &mut self.machines[n].memory;
        let image = memory
            .images
            .get_mut(&placement.image_id)
            .expect("it is being appended to");
        image.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let (producer, number, offset) = (append.producer, append.number, placement.base_offset);
        self.note(|| {
            format!("node {n}: append {number} of producer {producer} at offset {offset}")
        });
        self.oracle.appended(append.batch.as_bytes());
        p.waiting.push_back(Waiting {
            append,
            base_offset: placement.base_offset,
            end_offset: placement.end_offset,
        });
        Ok(true)
    }

    /// Answers those whose records are where they were asked to be.
    fn commit(&mut self, n: usize, p: &mut Process, now: u64) -> Result<(), Violation> {
        loop {
            let Some(leader) = p.replica.leader_mut() else {
                return Ok(());
            };
            let (replicated, durable) = (leader.high_watermark(), leader.durable_offset());
            let acker = Acker {
                node: n,
                epoch: leader.log().leader_epoch(),
            };
            let is_done = |waiting: &Waiting| match waiting.append.acks {
                Acks::Leader => true,
                Acks::Replicated => waiting.end_offset <= replicated,
                Acks::Durable => waiting.end_offset <= durable,
            };
            while let Some(at) = p.waiting.iter().position(is_done) {
                let done = p.waiting.remove(at).expect("found above");
                let bytes = done.append.batch.as_bytes();
                self.check_acked(acker, done.base_offset, done.append.acks, bytes)?;
                self.answer(n, &done.append, Ok(done.base_offset));
            }
            let Some(append) = p.stalled.pop_front() else {
                return Ok(());
            };
            if !self.try_append(n, p, now, append)? {
                return Ok(());
            }
        }
    }

    /// The node leads no more: whoever waits is told so.
    fn stop_leading(&mut self, n: usize, p: &mut Process) {
        let waiting = p.waiting.drain(..).map(|waiting| waiting.append);
        for append in waiting.chain(p.stalled.drain(..)).collect::<Vec<_>>() {
            self.answer(n, &append, Err(()));
        }
    }

    // Commands.

    /// Executes what the engines want until they want nothing, and arms the timer.
    fn pump(&mut self, n: usize, p: &mut Process) -> Result<(), Violation> {
        let now = self.machines[n].clock.local(self.now);
        loop {
            self.commit(n, p, now)?;
            let mut is_progress = false;
            while let Some(command) = p.replica.poll_command(now) {
                is_progress = true;
                self.obey(n, p, command)?;
            }
            if !is_progress && !self.post_all(n, p, now) {
                break;
            }
        }
        if let Some(due) = p.replica.poll_timeout() {
            let at = self.machines[n].clock.global(due).max(self.now + 1);
            if p.timer.is_none_or(|armed| at < armed) {
                p.timer = Some(at);
                let (node, incarnation) = (n, p.incarnation);
                let event = ProcessEvent::Timer { at };
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
        Ok(())
    }

    /// Posts what can be posted; says whether anything was.
    fn post_all(&mut self, n: usize, p: &mut Process, now: u64) -> bool {
        let Some(leader) = p.replica.leader_mut() else {
            return false;
        };
        let mut is_any = false;
        for (&to, link) in &p.links {
            let (Some(lane), Some(follower)) = (link.lane, leader.follower_on(node_id(to))) else {
                continue;
            };
            while let Some(post) = leader.poll_post(now, follower) {
                is_any = true;
                self.post_chain(n, lane, post);
            }
        }
        is_any
    }

    fn post_chain(&mut self, n: usize, lane: usize, post: Post) {
        let mut requests = Vec::with_capacity(2);
        if let Some(data) = post.data {
            let image = &self.machines[n].memory.images[&data.image_id];
            let range = data.range.start as usize..data.range.end as usize;
            requests.push(WorkRequest {
                addr: data.remote_addr,
                rkey: data.rkey,
                bytes: image.bytes[range].to_vec(),
                epoch: None,
            });
        }
        requests.push(WorkRequest {
            addr: post.tail_addr,
            rkey: post.tail_rkey,
            bytes: post.tail.to_vec(),
            epoch: Some(post.leader_epoch),
        });
        self.post(lane, requests);
    }

    fn obey(
        &mut self,
        n: usize,
        p: &mut Process,
        command: replica::Command,
    ) -> Result<(), Violation> {
        match command {
            replica::Command::Leader(command) => self.obey_leader(n, p, command),
            replica::Command::Follower(command) => return self.obey_follower(n, p, command),
            replica::Command::Propose {
                ticket,
                expected_revision,
                state,
            } => {
                let number = (ticket, expected_revision);
                self.propose(n, p.incarnation, &mut p.client, number, state);
            }
            replica::Command::StartedLeading {
                leader_epoch,
                start_offset,
            } => {
                self.note(|| {
                    format!("node {n} leads in epoch {leader_epoch} from offset {start_offset}")
                });
                self.check_started(n, leader_epoch)?;
            }
            replica::Command::StoppedLeading { cause, .. } => {
                self.note(|| format!("node {n} leads no more: {cause}"));
                self.stop_leading(n, p);
            }
            replica::Command::AnnounceLogEnd {
                nodes,
                last_epoch,
                log_end_offset,
            } => {
                let memory_id = self.machines[n].memory.id;
                let member = Member {
                    node: node_id(n),
                    memory_id,
                };
                for to in nodes {
                    if let Some(link) = p.links.get(&(to as usize)) {
                        let message = Control::LogEnd {
                            member,
                            last_epoch,
                            log_end_offset,
                        };
                        self.send(link.connection, n, message);
                    }
                }
            }
            replica::Command::Lost(cause) => {
                self.note(|| format!("node {n} has lost records: {cause}"))
            }
            replica::Command::HandedOver(_) => {}
            replica::Command::ReleaseImage(id) => self.help(n, p, HelperJob::Release(id)),
        }
        Ok(())
    }

    fn obey_leader(&mut self, n: usize, p: &mut Process, command: leader::Command) {
        match command {
            leader::Command::MakeImage {
                id, starts_segment, ..
            } => {
                self.help(
                    n,
                    p,
                    HelperJob::Make {
                        id,
                        fill: None,
                        starts_segment,
                    },
                );
            }
            leader::Command::ReleaseImage(id) => self.help(n, p, HelperJob::Release(id)),
            leader::Command::BeginEpoch(entry) => self.write(n, p, WriterJob::BeginEpoch(entry)),
            leader::Command::RequestRevoke { follower } => {
                let epoch =
                    leader_of(p).map(|l| (l.log().leader_epoch(), l.log().epoch_start_offset()));
                let epoch = epoch.expect("a leader has asked");
                self.ask(n, p, follower, Control::RevokeRequest { epoch });
            }
            leader::Command::RequestTruncate { follower, cut } => {
                let leader_epoch = epoch_of(p);
                self.ask(
                    n,
                    p,
                    follower,
                    Control::TruncateRequest { leader_epoch, cut },
                );
            }
            leader::Command::RequestSync { follower, offset } => {
                self.ask(n, p, follower, Control::SyncRequest { offset });
            }
            leader::Command::RequestGrant { follower, ask } => {
                let leader_epoch = epoch_of(p);
                self.ask(n, p, follower, Control::GrantRequest { leader_epoch, ask });
            }
            leader::Command::Sync(offset) => self.write(n, p, WriterJob::LeaderSync(offset)),
            leader::Command::LoadCold {
                follower,
                id,
                offset,
                limit_offset,
            } => {
                self.help(
                    n,
                    p,
                    HelperJob::LoadCold {
                        follower,
                        id,
                        offset,
                        limit_offset,
                    },
                );
            }
            leader::Command::Describe { current, next } => {
                let epoch =
                    leader_of(p).map(|l| (l.log().leader_epoch(), l.log().epoch_start_offset()));
                self.describe(n, p, epoch.unwrap_or_default(), Some(current), next);
            }
            leader::Command::PublishTail(tail) => {
                self.machines[n].memory.put_tail(tail.sequence, &tail);
            }
            leader::Command::Drain(job) => self.write(n, p, WriterJob::Leader(job)),
        }
    }

    fn ask(&mut self, n: usize, p: &mut Process, follower: usize, message: Control) {
        let Some(leader) = p.replica.leader_mut() else {
            return;
        };
        let to = leader.follower(follower).0 as usize;
        if let Some(link) = p.links.get(&to) {
            self.send(link.connection, n, message);
        }
    }

    fn obey_follower(
        &mut self,
        n: usize,
        p: &mut Process,
        command: follower::Command,
    ) -> Result<(), Violation> {
        match command {
            follower::Command::Revoke => self.help(n, p, HelperJob::Revoke),
            follower::Command::Scan { leader_epoch } => {
                self.write(n, p, WriterJob::Scan { leader_epoch })
            }
            follower::Command::Cut(cut) => {
                self.help(n, p, HelperJob::Withdraw);
                self.write(n, p, WriterJob::Cut(cut));
            }
            follower::Command::Sync(offset) => self.write(n, p, WriterJob::FollowerSync(offset)),
            follower::Command::Report(report) => self.reply(n, p, Control::Report(report)),
            follower::Command::Durable(offset) => self.reply(n, p, Control::Durable(offset)),
            follower::Command::Lost(from, to) => {
                self.note(|| format!("node {n} loses offsets {from} to {to}"))
            }
            follower::Command::MakeImage {
                id,
                fill,
                starts_segment,
                ..
            } => {
                self.help(
                    n,
                    p,
                    HelperJob::Make {
                        id,
                        fill,
                        starts_segment,
                    },
                );
            }
            follower::Command::Grant {
                image_id,
                len,
                log_end_offset,
                byte_position,
            } => {
                let held = (log_end_offset, byte_position);
                return self.grant(n, p, image_id, len, held);
            }
            follower::Command::Refuse {
                image_id,
                code,
                cause,
            } => {
                self.refuse(
                    n,
                    p,
                    Control::Refused {
                        image_id,
                        code,
                        cause,
                    },
                );
            }
            follower::Command::WriteTail(tail) => {
                let memory = &mut self.machines[n].memory;
                memory.put_tail(0, &tail);
                memory.put_tail(1, &tail);
            }
            follower::Command::Describe { current, next } => {
                let epoch = p.replica.follower_mut().map(|f| f.granted_epoch());
                self.describe(n, p, epoch.unwrap_or_default(), current, next);
            }
            follower::Command::Drain(job) => self.write(n, p, WriterJob::Follower(job)),
            follower::Command::Release(id) => self.help(n, p, HelperJob::Release(id)),
        }
        Ok(())
    }

    fn describe(
        &mut self,
        n: usize,
        p: &Process,
        epoch: (i32, i64),
        current: Option<(ImageId, i64)>,
        next: Option<ImageId>,
    ) {
        let location = |id: ImageId, base_offset| {
            let (addr, rkey) = p.images.get(&id)?.read;
            Some(ImageLocation {
                addr,
                base_offset,
                rkey,
            })
        };
        let current = current.and_then(|(id, base_offset)| location(id, base_offset));
        let next = next.and_then(|id| location(id, BASE_OFFSET_UNKNOWN));
        self.machines[n].memory.describe(epoch, current, next);
    }

    /// The right to write an image, which a leader is granted.
    pub(super) fn register_for_writing(&self, p: &mut Process, id: ImageId) -> Option<(u64, u32)> {
        let image = p.images.get_mut(&id)?;
        let len = u64::from(super::storage::IMAGE_LEN);
        let nic = &mut p.nic;
        Some(
            *image
                .write
                .get_or_insert_with(|| nic.register(Backing::Image(id), len, true)),
        )
    }

    pub(super) fn register_table(&self, p: &mut Process) -> (u64, u32) {
        let nic = &mut p.nic;
        *p.table
            .get_or_insert_with(|| nic.register(Backing::Table, ENTRY_LEN as u64, true))
    }
}

fn leader_of(p: &mut Process) -> Option<&mut Leader> {
    p.replica.leader_mut()
}

fn epoch_of(p: &mut Process) -> i32 {
    leader_of(p)
        .expect("a leader has asked")
        .log()
        .leader_epoch()
}

pub(super) fn node_id(n: usize) -> u32 {
    u32::try_from(n).expect("few nodes")
}
