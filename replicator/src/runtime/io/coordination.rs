//! What the coordinator says and is asked, and giving leadership away.

use std::time::Instant;

use crossbeam::channel::Sender;

use super::Io;
use crate::coordinator;
use crate::runtime::partition::{Held, Propose};

impl Io {
    pub(super) fn coordinated(&mut self, event: coordinator::Event) {
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

    pub(super) fn propose(&mut self, partition: usize, proposal: Propose) {
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
    pub(super) fn hand_over(&mut self, deadline: Instant, done: Sender<()>) {
        let now = self.shared.now();
        let left = deadline.saturating_duration_since(Instant::now());
        let until = now + u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
        self.with_all(|held| {
            held.replica.hand_over(now, until);
        });
        self.handing_over = Some((until, done));
        self.end_hand_over();
    }

    pub(super) fn end_hand_over(&mut self) {
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
}
