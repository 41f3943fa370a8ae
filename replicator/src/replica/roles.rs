//! From what is agreed to the role: leading, following, and the way between them.

use super::{Aim, Command, NO_SESSION, Replica, Role};
use crate::coordinator::Agreed;
use crate::follower::{self, Follower};
use crate::leader::{self, Leader, Membership};
use crate::partition::{Log, Stored};

impl Replica {
    /// Takes over what is agreed, if it is news.
    pub(super) fn adopt(&mut self, now: u64, agreed: Agreed) {
        let known = self.agreed.as_ref().map(|known| known.revision);
        if known.is_some_and(|known| known >= agreed.revision) {
            return;
        }
        let settled = self
            .proposal
            .take_if(|p| p.expected_revision < agreed.revision);
        let state = agreed.state.clone();
        self.agreed = Some(agreed);
        self.log_ends.clear();
        self.announce_due = None;
        let me = self.me;
        match &mut self.role {
            Role::Leader(leader)
                if state.leader == Some(me.node)
                    && state.leader_epoch == leader.log().leader_epoch() =>
            {
                leader.set_replicas(now, &state.replicas);
                leader.set_isr(now, state.isr);
            }
            Role::Leader(_) => {
                let cause = match state.leader {
                    Some(node) => format!("node {node} leads in epoch {}", state.leader_epoch),
                    None => "the partition is offline".to_owned(),
                };
                self.step_down(cause);
                if let Some(Aim::HandOver(successor)) = settled.map(|p| p.aim)
                    && state.leader == Some(successor)
                {
                    self.commands.push_back(Command::HandedOver(successor));
                }
            }
            Role::Follower(follower) => {
                // Whoever wrote it: we have waited for this epoch, and nobody else leads in it.
                let is_ours = state.leader == Some(me.node) && state.isr.contains(&me);
                let won = settled.filter(|p| is_ours && p.state.leader_epoch == state.leader_epoch);
                if let Some(Aim::Lead { is_unclean }) = won.map(|p| p.aim) {
                    self.won = Some((state.leader_epoch, is_unclean));
                } else if self.won.is_some_and(|(won, _)| won != state.leader_epoch) {
                    self.won = None;
                }
                follower.fence(state.leader_epoch);
                self.vacant_since = None;
            }
        }
    }

    /// Goes on to whatever is possible now.
    pub(super) fn advance(&mut self, now: u64) {
        if let (Role::Follower(follower), Some((epoch, is_unclean))) = (&self.role, self.won) {
            if follower.leader_epoch() > epoch {
                self.won = None;
            } else if follower.is_fenced_at(epoch) {
                self.lead(now, epoch, is_unclean);
            }
        }
        self.consider(now);
    }

    /// Begins to lead: the own memory is fenced, its tail read.
    fn lead(&mut self, now: u64, leader_epoch: i32, is_unclean: bool) {
        let (Role::Follower(follower), Some(agreed)) = (&mut self.role, &self.agreed) else {
            return;
        };
        self.won = None;
        self.is_unclean = false;
        let stored = follower.stored();
        let due = now + self.config.log.grace_ns;
        self.retired
            .extend(follower.image_ids().map(|id| (due, id)));
        while let Some(command) = follower.poll_command() {
            // There is no leader any more to be answered.
            let is_answer = matches!(
                command,
                follower::Command::Grant { .. }
                    | follower::Command::Refuse { .. }
                    | follower::Command::Report(_)
            );
            if !is_answer {
                self.commands.push_back(Command::Follower(command));
            }
        }
        let end = stored.log_end_offset;
        if is_unclean {
            self.commands.push_back(Command::Lost(format!(
                "node {} leads in epoch {leader_epoch} without having been in sync: acknowledged records from \
                 offset {end} on, if there were any, are lost",
                self.me.node
            )));
        }
        let membership = Membership {
            me: self.me,
            isr: agreed.state.isr.clone(),
            replicas: agreed.state.replicas.clone(),
        };
        let log = Log::new(self.config.log, leader_epoch, &stored);
        let mut leader = Leader::new(
            now,
            self.config.leader,
            log,
            self.incarnation,
            stored.high_watermark,
            &membership,
        );
        leader.set_suspended(now, (!self.has_session).then_some(NO_SESSION));
        for (&node, &(session, memory_id)) in &self.lanes {
            if let Some(follower) = leader.follower_on(node) {
                leader.handle_lane_up(follower, session, memory_id);
            }
        }
        self.commands.push_back(Command::StartedLeading {
            leader_epoch,
            start_offset: end,
        });
        self.role = Role::Leader(Box::new(leader));
    }

    /// Leads no more. What is in memory is read once more, then it follows.
    pub(super) fn step_down(&mut self, cause: String) {
        let Role::Leader(leader) = &mut self.role else {
            return;
        };
        for image in leader.cold_image_ids() {
            self.commands.push_back(Command::ReleaseImage(image));
        }
        while let Some(command) = leader.poll_command() {
            if let leader::Command::ReleaseImage(id) = command {
                self.commands.push_back(Command::ReleaseImage(id));
            }
        }
        let log = leader.log();
        let stored = Stored {
            log_start_offset: log.log_start_offset(),
            log_end_offset: log.log_end_offset(),
            high_watermark: leader.high_watermark(),
            epochs: log.epochs().clone(),
            end_place: log.end_place(),
        };
        let images: Vec<_> = log.image_ids().collect();
        let mut follower =
            Follower::after_leading(self.config.log, log.leader_epoch(), stored, images);
        let state = self.agreed.as_ref().map(|agreed| &agreed.state);
        follower.fence(state.map_or(0, |state| state.leader_epoch));
        let is_other = |node: &u32| *node != self.me.node;
        let leader = state.and_then(|state| state.leader).filter(is_other);
        self.commands
            .push_back(Command::StoppedLeading { leader, cause });
        self.role = Role::Follower(Box::new(follower));
        self.hand_over = None;
        self.vacant_since = None;
        let _ = self.proposal.take_if(|p| p.aim == Aim::Isr);
    }
}
