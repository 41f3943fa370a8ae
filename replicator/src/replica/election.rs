//! What is proposed, and when.

use super::{Aim, Command, Replica, Role};
use crate::coordinator::{Member, PartitionState};
use crate::faults::{Fault, is_injected};

impl Replica {
    /// Proposes what should be agreed on, if anything should and no proposal is under way.
    pub(super) fn consider(&mut self, now: u64) {
        self.expire_hand_over(now);
        let is_waiting = |retry_at: Option<u64>| retry_at.is_none_or(|at| now < at);
        let is_proposed = self.proposal.as_ref().map(|p| is_waiting(p.retry_at));
        if !self.has_session || is_proposed == Some(true) {
            if let Role::Leader(leader) = &mut self.role {
                leader.defer_isr_look(now);
            }
            return;
        }
        let Some(state) = self.agreed.as_ref().map(|agreed| agreed.state.clone()) else {
            return;
        };
        match &mut self.role {
            Role::Leader(leader) => {
                let successor = self.hand_over.and_then(|_| leader.successor());
                if let Some(successor) = successor {
                    self.propose_successor(now, successor, state);
                    return;
                }
                // Nobody is ready: whoever lags must not keep those from it who could be.
                let is_unsettled = self.proposal.is_some();
                let wanted = leader.wanted_isr(now);
                // An unknown outcome is settled by agreeing on something, even on the same again.
                let unsettled = || is_unsettled.then(|| leader.isr().to_vec());
                if let Some(isr) = wanted.or_else(unsettled) {
                    self.propose(now, Aim::Isr, PartitionState { isr, ..state });
                }
            }
            Role::Follower(_) if self.won.is_some() => {}
            Role::Follower(_) => self.consider_leading(now, &state),
        }
    }

    fn propose_successor(&mut self, now: u64, successor: Member, state: PartitionState) {
        let state = PartitionState {
            leader: Some(successor.node),
            leader_epoch: state.leader_epoch + 1,
            ..state
        };
        self.propose(now, Aim::HandOver(successor.node), state);
    }

    fn expire_hand_over(&mut self, now: u64) {
        if self.hand_over.is_some_and(|deadline| deadline <= now) {
            self.hand_over = None;
            if let Role::Leader(leader) = &mut self.role {
                leader.set_closed(false);
            }
        }
    }

    /// Takes no more appends, and gives the leadership to a member of the ISR once that has everything.
    /// [`Command::HandedOver`] follows; if it has not by `deadline`, appends are taken again.
    ///
    /// Returns whether it leads.
    pub fn hand_over(&mut self, now: u64, deadline: u64) -> bool {
        let Role::Leader(leader) = &mut self.role else {
            return false;
        };
        leader.set_closed(true);
        self.hand_over = Some(deadline);
        self.advance(now);
        true
    }

    /// The operator wants this node to lead although it is not in sync: acknowledged records that it does
    /// not have are lost. It has an effect only while the partition has no living leader.
    pub fn elect_unclean(&mut self, now: u64) {
        self.is_unclean = true;
        self.advance(now);
    }

    fn consider_leading(&mut self, now: u64, state: &PartitionState) {
        if !self.is_vacant(state) {
            self.vacant_since = None;
            self.announce_due = None;
            return;
        }
        let since = *self.vacant_since.get_or_insert(now);
        if !self.is_candidate(state) {
            let is_candidate = self.is_unclean || self.has_most(now, state);
            if is_candidate {
                let me = vec![self.me];
                self.propose_leading(now, state, me, true);
            }
            return;
        }
        if now >= since + self.rank(state) * self.config.stagger_ns {
            let trusted = state.isr.iter().copied();
            let mut isr: Vec<Member> = trusted
                .filter(|member| member.node != self.me.node && self.is_alive(member))
                .collect();
            isr.insert(0, self.me);
            self.propose_leading(now, state, isr, false);
        }
    }

    fn propose_leading(
        &mut self,
        now: u64,
        state: &PartitionState,
        isr: Vec<Member>,
        is_unclean: bool,
    ) {
        let state = PartitionState {
            leader: Some(self.me.node),
            leader_epoch: state.leader_epoch + 1,
            isr,
            replicas: state.replicas.clone(),
        };
        self.propose(now, Aim::Lead { is_unclean }, state);
    }

    fn is_vacant(&self, state: &PartitionState) -> bool {
        let Some(leader) = state.leader else {
            return true;
        };
        // A leader that has lost its memory cannot lead, however alive its node is.
        let member = state.isr.iter().find(|member| member.node == leader);
        leader == self.me.node || !member.is_some_and(|member| self.is_alive(member))
    }

    /// Whether a member is there, with the memory that it is a member by.
    fn is_alive(&self, member: &Member) -> bool {
        let live = self.live.as_ref();
        live.is_none_or(|live| live.contains(member)) && !self.dead.contains(&member.node)
    }

    /// Whether we have everything that was acknowledged: in a partition that nobody has led, everybody has.
    fn is_candidate(&self, state: &PartitionState) -> bool {
        let is_new = state.isr.is_empty() && state.replicas.contains(&self.me.node);
        let is_lax = is_injected(Fault::MemberWithoutMemoryElected);
        let mut isr = state.isr.iter();
        is_new || isr.any(|m| *m == self.me || is_lax && m.node == self.me.node)
    }

    /// How many living candidates come before us: the order is that of the replicas, so that they do not all
    /// propose at once.
    fn rank(&self, state: &PartitionState) -> u64 {
        let before = state
            .replicas
            .iter()
            .take_while(|&&node| node != self.me.node);
        let is_candidate = |node: &&u32| {
            let is_new = state.isr.is_empty() && !self.dead.contains(*node);
            let mut isr = state.isr.iter();
            is_new || isr.any(|member| member.node == **node && self.is_alive(member))
        };
        before.filter(is_candidate).count() as u64
    }

    /// When something is proposed, or told, if nothing happens before.
    pub(super) fn proposal_due(&self) -> Option<u64> {
        if !self.has_session || self.won.is_some() {
            return None;
        }
        let retry_at = match &self.proposal {
            Some(proposal) => proposal.retry_at?,
            None => 0,
        };
        if let Role::Leader(_) = &self.role {
            return (retry_at > 0).then_some(retry_at);
        }
        // Without a vacancy nothing is proposed again, whatever became of it.
        let state = &self.agreed.as_ref()?.state;
        let due = if self.is_candidate(state) {
            self.vacant_since? + self.rank(state) * self.config.stagger_ns
        } else {
            self.announce_due?
        };
        Some(due.max(retry_at))
    }

    /// Whether all members have lost their memory, all have told what their files hold, and ours hold most.
    ///
    /// Tells the others what ours hold while it waits.
    fn has_most(&mut self, now: u64, state: &PartitionState) -> bool {
        let Some(live) = &self.live else { return false };
        let Role::Follower(follower) = &self.role else {
            return false;
        };
        let memory_of = |node: u32| live.iter().find(|m| m.node == node).map(|m| m.memory_id);
        let is_lost = |m: &Member| memory_of(m.node).is_some_and(|now| now != m.memory_id);
        let is_concerned = state.isr.iter().any(|m| m.node == self.me.node);
        let epoch = follower.leader_epoch();
        if !is_concerned || !state.isr.iter().all(is_lost) || !follower.is_fenced_at(epoch) {
            self.announce_due = None;
            return false;
        }
        let stored = follower.stored();
        let ours = (
            stored.epochs.latest_epoch().unwrap_or(-1),
            stored.log_end_offset,
        );
        let others = state.isr.iter().map(|m| m.node);
        let others: Vec<u32> = others.filter(|&node| node != self.me.node).collect();
        let told = others.iter().map(|node| {
            let told = self.log_ends.get(node)?;
            (memory_of(*node) == Some(told.memory_id)).then_some((
                told.last_epoch,
                told.log_end_offset,
                *node,
            ))
        });
        let told: Option<Vec<_>> = told.collect();
        if self.announce_due.is_none_or(|due| due <= now) {
            self.announce_due = Some(now + self.config.retry_delay_ns);
            self.commands.push_back(Command::AnnounceLogEnd {
                nodes: others,
                last_epoch: ours.0,
                log_end_offset: ours.1,
            });
        }
        let place = |node: u32| state.replicas.iter().position(|&replica| replica == node);
        let is_less = |&(epoch, end, node): &(i32, i64, u32)| {
            (epoch, end) < ours || (epoch, end) == ours && place(node) > place(self.me.node)
        };
        told.is_some_and(|told| told.iter().all(is_less))
    }
}
