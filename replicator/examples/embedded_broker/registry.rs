//! The broker's own coordinator: a table in this process, changed by compare-and-swap.
//!
//! A real broker has its metadata quorum behind it. What the nodes rely on is the same: one proposal for a
//! revision wins, and everybody is told, in order.

use std::collections::BTreeMap;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use replicator::coordinator::{
    Agreed, Answer, Coordinator, CoordinatorConfig, CoordinatorError, Event, Member,
    PartitionState, Registration, Sink,
};

/// Shared by all nodes of the process.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    partitions: Vec<Agreed>,
    /// The nodes that run: their memory, and the way to the thread that tells them.
    nodes: BTreeMap<u32, (Member, Sender<Event>)>,
}

impl Registry {
    /// The coordinator of a node's configuration.
    pub(crate) fn coordinator(self: &Arc<Self>) -> CoordinatorConfig {
        let registry = Arc::clone(self);
        CoordinatorConfig::own(move |registration, sink| registry.join(&registration, sink))
    }

    fn join(
        self: &Arc<Self>,
        registration: &Registration,
        mut sink: Sink,
    ) -> Result<Box<dyn Coordinator>, CoordinatorError> {
        let (events, told) = channel();
        // The sink may wait while its node is busy: nobody else waits with it.
        thread::Builder::new()
            .name("registry".to_owned())
            .spawn(move || told.into_iter().for_each(&mut sink))
            .map_err(CoordinatorError::Thread)?;
        let mut state = self.state();
        if state.partitions.is_empty() {
            let offline = registration.partitions.iter().map(|partition| Agreed {
                state: PartitionState {
                    leader: None,
                    leader_epoch: 0,
                    isr: Vec::new(),
                    replicas: partition.replicas.clone(),
                },
                revision: 0,
            });
            state.partitions = offline.collect();
        }
        for (partition, agreed) in state.partitions.iter().enumerate() {
            let agreed = agreed.clone();
            // The thread ends with this sender.
            let _ = events.send(Event::Changed { partition, agreed });
        }
        let node = registration.member.node;
        state.nodes.insert(node, (registration.member, events));
        state.tell_nodes();
        drop(state);
        Ok(Box::new(Joined {
            registry: Arc::clone(self),
            node,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tell(&self, node: u32, event: Event) {
        if let Some((_, events)) = self.nodes.get(&node) {
            // Fails only when the node has gone, and nobody wants to know.
            let _ = events.send(event);
        }
    }

    fn tell_nodes(&self) {
        let live: Vec<Member> = self.nodes.values().map(|(member, _)| *member).collect();
        for &node in self.nodes.keys() {
            self.tell(node, Event::Nodes { live: live.clone() });
        }
    }
}

/// What one node holds of the registry.
struct Joined {
    registry: Arc<Registry>,
    node: u32,
}

impl Coordinator for Joined {
    fn propose(
        &mut self,
        partition: usize,
        ticket: u64,
        expected_revision: i64,
        proposed: PartitionState,
    ) {
        let mut state = self.registry.state();
        let agreed = &mut state.partitions[partition];
        let is_accepted = agreed.revision == expected_revision;
        if is_accepted {
            agreed.state = proposed;
            agreed.revision += 1;
        }
        let agreed = agreed.clone();
        let answer = if is_accepted {
            let revision = agreed.revision;
            Answer::Accepted { revision }
        } else {
            Answer::Conflict(agreed.clone())
        };
        state.tell(
            self.node,
            Event::Answered {
                partition,
                ticket,
                answer,
            },
        );
        if is_accepted {
            for &node in state.nodes.keys() {
                let agreed = agreed.clone();
                state.tell(node, Event::Changed { partition, agreed });
            }
        }
    }

    /// A process that hangs takes all of its nodes with it: there is nobody to lead instead.
    fn beat(&mut self) {}
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut state = self.registry.state();
        state.nodes.remove(&self.node);
        state.tell_nodes();
    }
}
