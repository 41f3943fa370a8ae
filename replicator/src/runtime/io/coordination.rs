//! What the coordinator says and is asked.

use super::Io;
use crate::coordinator;
use crate::runtime::partition::Propose;

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
}
