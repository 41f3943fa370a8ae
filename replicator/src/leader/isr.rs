//! Who is in sync, what is committed, and what is on every device.

use super::progress::Progress;
use super::{Command, Leader};
use crate::control::Acks;
use crate::coordinator::{Member, MemoryId};
use crate::faults::{Fault, is_injected};
use crate::partition::AppendError;

/// Who takes part in a partition, as agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// We ourselves, the leader.
    pub me: Member,
    /// The ISR, ourselves included.
    pub isr: Vec<Member>,
    /// All nodes that hold the partition, we among them.
    pub replicas: Vec<u32>,
}

/// The ISR, agreed and proposed, and what it has on its devices.
#[derive(Debug)]
pub(super) struct Isr {
    me: Member,
    stored: Vec<Member>,
    /// Every proposal that may still come to be agreed on.
    proposed: Vec<Vec<Member>>,
    /// Why nothing is appended or acknowledged.
    suspended: Option<&'static str>,
    /// Appends are refused; what has been appended goes on.
    is_closed: bool,
    /// Something has happened that may change the wanted ISR.
    pub(super) is_look_due: bool,
    looked_at: u64,
    /// Below this offset everything is on our own device, on every member's, and should be.
    own_durable: i64,
    durable: i64,
    sync_wanted: i64,
    is_syncing: bool,
}

impl Isr {
    pub(super) fn new(membership: &Membership) -> Self {
        Self {
            me: membership.me,
            stored: membership.isr.clone(),
            proposed: Vec::new(),
            suspended: None,
            is_closed: false,
            is_look_due: true,
            looked_at: 0,
            own_durable: 0,
            durable: 0,
            sync_wanted: 0,
            is_syncing: false,
        }
    }

    /// The stored ISR and every proposed one: who must have a record before it is committed.
    fn maximal(&self) -> impl Iterator<Item = &Member> {
        let unwise = is_injected(Fault::HwOnProposedShrink) && !self.proposed.is_empty();
        let stored = self.stored.iter().filter(move |_| !unwise);
        stored.chain(self.proposed.iter().flatten())
    }
}

impl Leader {
    /// The ISR that is agreed on.
    #[must_use]
    pub fn isr(&self) -> &[Member] {
        &self.isr.stored
    }

    /// An ISR is agreed on, under a new revision: whatever was proposed before is settled.
    pub fn set_isr(&mut self, now: u64, isr: Vec<Member>) {
        self.isr.stored = isr;
        self.isr.proposed.clear();
        self.isr.is_look_due = true;
        self.advance_high_watermark(now);
        self.request_syncs();
    }

    /// An ISR is being proposed. Until it is settled a record needs the members of both.
    pub fn isr_proposed(&mut self, now: u64, isr: &[Member]) {
        self.isr.proposed.push(isr.to_vec());
        self.advance_high_watermark(now);
    }

    /// The nodes that hold the partition have changed.
    pub fn set_replicas(&mut self, now: u64, replicas: &[u32]) {
        for follower in &mut self.followers {
            follower.is_replica = replicas.contains(&follower.node);
        }
        for &node in replicas {
            if node != self.isr.me.node && self.follower_on(node).is_none() {
                self.followers.push(Progress::new(now, node));
            }
        }
        self.isr.is_look_due = true;
    }

    /// Whether the CPU of a follower stands still: it is not in sync then, whatever its NIC acknowledges.
    pub fn set_hung(&mut self, follower: usize, is_hung: bool) {
        self.followers[follower].is_hung = is_hung;
        self.isr.is_look_due = true;
    }

    /// Stops, or lets go on, appends and acknowledgements: without a session we may have been replaced.
    pub fn set_suspended(&mut self, now: u64, cause: Option<&'static str>) {
        self.isr.suspended = cause;
        self.isr.is_look_due = true;
        self.advance_high_watermark(now);
    }

    /// Takes no more appends, or takes them again: the partition is about to be handed over.
    pub fn set_closed(&mut self, is_closed: bool) {
        self.isr.is_closed = is_closed;
    }

    /// A member of the ISR that has everything we have, to hand the partition over to.
    #[must_use]
    pub fn successor(&self) -> Option<Member> {
        let end = self.log.log_end_offset();
        let is_hasty = is_injected(Fault::HandOverUnready);
        let has_all =
            |f: &&Progress| (f.has_caught_up(end) || is_hasty) && !f.is_hung && f.is_replica;
        let members = self.followers.iter().filter(has_all);
        members
            .filter_map(|f| Some(member(f.node, f.memory_id?)))
            .find(|member| self.isr.stored.contains(member))
    }

    pub(super) fn check_appendable(&self, acks: Acks) -> Result<(), AppendError> {
        if let Some(cause) = self.isr.suspended {
            return Err(AppendError::NotLeader(cause));
        }
        if self.isr.is_closed {
            let cause = "the node is handing the partition over";
            return Err(AppendError::NotLeader(cause));
        }
        let (in_sync, min_isr) = (self.isr.stored.len(), self.config.min_isr);
        if acks != Acks::Leader && in_sync < min_isr {
            return Err(AppendError::NotEnoughReplicas { in_sync, min_isr });
        }
        Ok(())
    }

    /// The ISR as it should be, if that is not the agreed one.
    ///
    /// Out goes a member that for [`lag_max_ns`](super::LeaderConfig::lag_max_ns) has not had everything
    /// that we had at some moment of that time, whether it is slow or has no lane; at once one whose CPU
    /// stands still, that has lost its memory, lacks committed records, or holds the partition no more. In
    /// comes a replica that has everything that is committed, up to the start of our epoch at least.
    ///
    /// What is returned is to be proposed at once, see [`Leader::isr_proposed`].
    pub fn wanted_isr(&mut self, now: u64) -> Option<Vec<Member>> {
        self.isr.is_look_due = false;
        self.isr.looked_at = now;
        self.note_caught_up(now);
        if self.isr.suspended.is_some() {
            return None;
        }
        let stored = self.isr.stored.iter().copied();
        let mut wanted: Vec<Member> = stored
            .filter(|member| *member == self.isr.me || self.is_in_sync(now, member))
            .collect();
        for f in self.followers.iter().filter(|f| self.may_join(f)) {
            let joiner = f.memory_id.map(|memory_id| member(f.node, memory_id));
            wanted.extend(joiner.filter(|joiner| !self.isr.stored.contains(joiner)));
        }
        (wanted != self.isr.stored).then_some(wanted)
    }

    /// Whether [`Leader::wanted_isr`] should be asked without delay.
    #[must_use]
    pub fn is_isr_look_due(&self) -> bool {
        self.isr.is_look_due
    }

    /// The ISR cannot be changed now: it is looked at again later.
    pub(crate) fn defer_isr_look(&mut self, now: u64) {
        self.isr.is_look_due = false;
        self.isr.looked_at = now;
    }

    fn is_in_sync(&self, now: u64, member: &Member) -> bool {
        let Some(f) = self.progress_of(member) else {
            // Not connected yet, or connected with another memory.
            let f = self.followers.iter().find(|f| f.node == member.node);
            return f
                .is_some_and(|f| f.is_replica && f.memory_id.is_none() && !self.is_late(now, f));
        };
        f.is_replica && !f.is_hung && !f.is_lossy && !self.is_late(now, f)
    }

    fn is_late(&self, now: u64, f: &Progress) -> bool {
        !f.has_caught_up(self.log.log_end_offset())
            && now >= f.caught_up_at.saturating_add(self.config.lag_max_ns)
    }

    fn may_join(&self, f: &Progress) -> bool {
        let needed = self.high_watermark.max(self.log.epoch_start_offset());
        f.has_caught_up(needed) && f.is_replica && !f.is_hung
    }

    /// When [`Leader::wanted_isr`] may have news without an event.
    pub(super) fn isr_due(&self) -> Option<u64> {
        let (end, lag_max) = (self.log.log_end_offset(), self.config.lag_max_ns);
        let lagging = self.followers.iter().filter(|f| {
            let is_member = self.isr.stored.iter().any(|m| m.node == f.node);
            is_member && !f.has_caught_up(end)
        });
        let due = lagging
            .map(|f| f.caught_up_at.saturating_add(lag_max))
            .min()?;
        // What was proposed may have been refused: then it is looked at again, after a while.
        Some(due.max(self.isr.looked_at.saturating_add(lag_max / 16)))
    }

    /// Everything that is in memory everywhere is noted as such, before there is more.
    pub(super) fn note_caught_up(&mut self, now: u64) {
        let end = self.log.log_end_offset();
        for f in &mut self.followers {
            if f.has_caught_up(end) {
                f.caught_up_at = now;
                f.goal = (end, now);
            }
        }
    }

    /// A follower has acknowledged something.
    pub(super) fn note_progress(&mut self, now: u64, follower: usize) {
        let end = self.log.log_end_offset();
        let f = &mut self.followers[follower];
        let (goal, since) = f.goal;
        if f.has_caught_up(end) {
            f.caught_up_at = now;
            f.goal = (end, now);
        } else if f.acked >= goal {
            f.caught_up_at = f.caught_up_at.max(since);
            f.goal = (end, now);
        }
        if self.may_join(&self.followers[follower]) {
            let f = &mut self.followers[follower];
            f.is_lossy = false;
            let is_member = self.isr.stored.iter().any(|m| m.node == f.node);
            self.isr.is_look_due |= !is_member && self.isr.proposed.is_empty();
        }
    }

    /// What is known of a member: nothing if its node has another memory now.
    fn progress_of(&self, member: &Member) -> Option<&Progress> {
        let f = self.followers.iter().find(|f| f.node == member.node)?;
        let is_member =
            f.memory_id == Some(member.memory_id) || is_injected(Fault::MemberWithoutMemoryElected);
        is_member.then_some(f)
    }

    /// Advances the high watermark to what every member of the maximal ISR has.
    pub(super) fn advance_high_watermark(&mut self, now: u64) {
        let is_enough = self.isr.stored.len() >= self.config.min_isr;
        if self.isr.suspended.is_some() || !is_enough {
            return;
        }
        let end = self.log.log_end_offset();
        let acked = |member: &Member| match self.progress_of(member) {
            _ if *member == self.isr.me => end,
            Some(f) => f.acked,
            None => -1,
        };
        let members = self.isr.maximal().map(acked);
        let mut committed = members.min().unwrap_or(-1).min(end);
        if is_injected(Fault::AckBeforeAllIsr) {
            let acked = self.followers.iter().map(|f| f.acked).max();
            committed = acked.unwrap_or(end).min(end);
        }
        if is_injected(Fault::HwBeyondLeo) && committed > self.high_watermark {
            committed += 1;
        }
        if committed > self.high_watermark {
            self.high_watermark = committed;
            self.is_tail_due = true;
            for follower in &mut self.followers {
                follower
                    .watermark_due
                    .get_or_insert(now + self.config.watermark_delay_ns);
            }
        }
        self.advance_durable();
    }

    /// Records below this offset are committed, and on the device of every member of the ISR.
    #[must_use]
    pub fn durable_offset(&self) -> i64 {
        self.isr.durable
    }

    fn advance_durable(&mut self) {
        let durable = |member: &Member| match self.progress_of(member) {
            _ if *member == self.isr.me => self.isr.own_durable,
            Some(f) => f.durable,
            None => -1,
        };
        let everywhere = self.isr.maximal().map(durable).min().unwrap_or(-1);
        self.isr.durable = self.isr.durable.max(everywhere.min(self.high_watermark));
    }

    /// An append waits until everything below `end_offset` is on every device.
    pub(super) fn want_durable(&mut self, now: u64, end_offset: i64) {
        self.isr.sync_wanted = end_offset;
        self.drain_due = Some(now);
    }

    /// Asks for syncs that are wanted and not under way.
    pub(super) fn request_syncs(&mut self) {
        let wanted = self.isr.sync_wanted;
        if wanted <= self.isr.durable {
            return;
        }
        let drained = self.log.drained_offset();
        if self.isr.own_durable < wanted && drained >= wanted && !self.isr.is_syncing {
            self.isr.is_syncing = true;
            self.commands.push_back(Command::Sync(drained));
        }
        let members: Vec<u32> = self.isr.maximal().map(|member| member.node).collect();
        for (follower, f) in self.followers.iter_mut().enumerate() {
            let is_asked = f.sync_asked >= wanted || f.durable >= wanted;
            if members.contains(&f.node) && f.has_caught_up(wanted) && !is_asked {
                f.sync_asked = f.acked;
                let offset = f.acked;
                self.commands
                    .push_back(Command::RequestSync { follower, offset });
            }
        }
    }

    /// Everything below `offset` is on our device.
    pub fn handle_synced(&mut self, offset: i64) {
        self.isr.is_syncing = false;
        self.isr.own_durable = self.isr.own_durable.max(offset);
        self.advance_durable();
        self.request_syncs();
    }

    /// Our device could not be written; it is asked again when more is drained.
    pub fn handle_sync_failed(&mut self) {
        self.isr.is_syncing = false;
    }

    /// A follower says that everything below `offset` is on its device.
    pub fn handle_durable(&mut self, follower: usize, session: u64, offset: i64) {
        let f = &mut self.followers[follower];
        if f.session == session {
            f.durable = f.durable.max(offset.min(f.acked));
            self.advance_durable();
        }
    }
}

fn member(node: u32, memory_id: MemoryId) -> Member {
    Member { node, memory_id }
}
