//! The coordinator: one state per partition changed by compare-and-swap, leases, and watches that come late.
//!
//! It is never wrong and often out of reach. A proposal may be lost, arrive when nobody waits for its
//! answer any more, or be agreed on without an answer. A watch tells every change in order, some time later;
//! after a gap it tells only the newest.

use std::collections::BTreeSet;

use super::events::{Happening, ProcessEvent};
use super::{Site, Violation, World, demand};
use crate::coordinator::{Agreed, Answer, Event, Member, PartitionState};

/// How long a lease lasts.
const LEASE_NS: u64 = 400_000_000;
/// Between two keep-alives.
const BEAT_NS: u64 = 100_000_000;
/// How long a node waits for the answer to a proposal.
const ANSWER_TIMEOUT_NS: u64 = 1_000_000_000;

#[derive(Clone, Copy, Debug)]
struct Session {
    incarnation: u64,
    member: Member,
    expires_at: u64,
}

/// What the coordinator knows.
#[derive(Debug)]
pub(super) struct Registry {
    /// By partition.
    pub(super) agreed: Vec<Agreed>,
    /// By node.
    sessions: Vec<Option<Session>>,
    /// By node: what is told next must not arrive before this.
    told_at: Vec<u64>,
    /// By node: it has missed something.
    is_behind: Vec<bool>,
    /// Proposals on their way, with their partition.
    flying: Vec<(usize, PartitionState)>,
}

/// A process's side of it.
#[derive(Debug)]
pub(super) struct Client {
    /// The proposals that answers are waited for: partition and ticket.
    pending: BTreeSet<(usize, u64)>,
    /// When the keep-alive was sent that the lease rests on.
    renewed_at: u64,
    is_lost: bool,
}

impl Registry {
    /// Every node has every partition, and each partition prefers another leader.
    pub(super) fn new(members: &[Member], partitions: usize) -> Self {
        let agreed = |partition| {
            let mut isr = members.to_vec();
            isr.rotate_left(partition % members.len());
            let state = PartitionState {
                leader: None,
                leader_epoch: 0,
                replicas: isr.iter().map(|member| member.node).collect(),
                isr,
            };
            Agreed { state, revision: 1 }
        };
        let count = members.len();
        Self {
            agreed: (0..partitions).map(agreed).collect(),
            sessions: vec![None; count],
            told_at: vec![0; count],
            is_behind: vec![true; count],
            flying: Vec::new(),
        }
    }

    /// The ISRs that are agreed, or may be without anybody proposing anything more.
    pub(super) fn possible_isrs(&self) -> impl Iterator<Item = &[Member]> {
        let flying = self.flying.iter().map(|(_, state)| state);
        let states = flying.chain(self.agreed.iter().map(|agreed| &agreed.state));
        states.map(|state| &state.isr[..])
    }

    fn live(&self) -> Vec<Member> {
        self.sessions
            .iter()
            .flatten()
            .map(|session| session.member)
            .collect()
    }
}

impl Client {
    pub(super) fn new(now: u64) -> Self {
        Self {
            pending: BTreeSet::new(),
            renewed_at: now,
            is_lost: false,
        }
    }
}

impl World {
    /// The coordinator's number among the nodes.
    fn registry_node(&self) -> usize {
        self.machines.len()
    }

    fn is_out_of_reach(&self, n: usize) -> bool {
        self.is_cut(n, self.registry_node())
    }

    /// A process shows that it makes progress, and looks whether its lease has run out.
    pub(super) fn beat(
        &mut self,
        n: usize,
        incarnation: u64,
        client: &mut Client,
    ) -> Option<Event> {
        self.tell_later(BEAT_NS, (n, incarnation), ProcessEvent::Beat);
        if !self.is_out_of_reach(n) {
            let delay = self.plan.weather.message(&mut self.rng);
            let sent_at = self.now;
            self.schedule(
                delay,
                Happening::KeepAlive {
                    node: n,
                    incarnation,
                    sent_at,
                },
            );
        }
        // The process's own clock may be off, so it may think so too early or too late.
        let is_over = self.now > client.renewed_at + LEASE_NS;
        let is_news = is_over && !client.is_lost;
        client.is_lost |= is_over;
        is_news.then(|| Event::SessionLost {
            cause: "the lease has run out".to_owned(),
        })
    }

    /// A keep-alive reaches the coordinator.
    pub(super) fn keep_alive(&mut self, n: usize, incarnation: u64, sent_at: u64) {
        let (expires_at, memory_id) = (self.now + LEASE_NS, self.machines[n].memory_id);
        let before = self.registry.sessions[n];
        let is_running = self.machines[n]
            .process
            .as_ref()
            .is_some_and(|p| p.incarnation == incarnation);
        if !is_running || self.is_out_of_reach(n) {
            return;
        }
        let node = u32::try_from(n).expect("few nodes");
        let member = Member { node, memory_id };
        self.registry.sessions[n] = Some(Session {
            incarnation,
            member,
            expires_at,
        });
        self.schedule(LEASE_NS, Happening::Expire { node: n });
        if before.is_none_or(|before| before.incarnation != incarnation) {
            self.tell_nodes();
        }
        if std::mem::take(&mut self.registry.is_behind[n]) {
            self.tell_all_to(n);
        }
        let delay = self.plan.weather.message(&mut self.rng);
        self.tell_later(delay, (n, incarnation), ProcessEvent::Renewed { sent_at });
    }

    pub(super) fn renewed(&mut self, n: usize, client: &mut Client, sent_at: u64) -> Option<Event> {
        if self.is_out_of_reach(n) {
            return None;
        }
        client.renewed_at = client.renewed_at.max(sent_at);
        std::mem::take(&mut client.is_lost).then_some(Event::SessionBack)
    }

    /// A lease may have run out.
    pub(super) fn expire(&mut self, n: usize) {
        if self.registry.sessions[n].is_some_and(|session| session.expires_at <= self.now) {
            self.note(|| format!("the lease of node {n} runs out"));
            self.registry.sessions[n] = None;
            self.tell_nodes();
        }
    }

    /// A process has started: it is told everything first.
    pub(super) fn watch_from_now(&mut self, n: usize) {
        self.registry.is_behind[n] = true;
    }

    fn tell_nodes(&mut self) {
        for n in 0..self.machines.len() {
            let live = self.registry.live();
            self.watch(n, Event::Nodes { live });
        }
    }

    fn tell_all_to(&mut self, n: usize) {
        for (partition, agreed) in self.registry.agreed.clone().into_iter().enumerate() {
            self.watch(n, Event::Changed { partition, agreed });
        }
        let live = self.registry.live();
        self.watch(n, Event::Nodes { live });
    }

    /// Tells a node, some time later and in order.
    fn watch(&mut self, n: usize, event: Event) {
        let Some(process) = &self.machines[n].process else {
            self.registry.is_behind[n] = true;
            return;
        };
        let incarnation = process.incarnation;
        let late = if self.rng.chance(3) {
            self.rng.between(0, 1_500_000_000)
        } else {
            0
        };
        let delay = late + self.plan.weather.message(&mut self.rng);
        let at = self.registry.told_at[n].max(self.now + delay);
        self.registry.told_at[n] = at;
        self.agenda.push(
            at,
            Happening::Watched {
                node: n,
                incarnation,
                event,
            },
        );
    }

    /// A watch reaches its node, or does not.
    pub(super) fn watched(
        &mut self,
        n: usize,
        incarnation: u64,
        event: Event,
    ) -> Result<(), Violation> {
        if self.is_out_of_reach(n) {
            self.registry.is_behind[n] = true;
            return Ok(());
        }
        self.tell((n, incarnation), ProcessEvent::Coordinator(event))
    }

    /// A process proposes a state.
    pub(super) fn propose(
        &mut self,
        site: Site,
        incarnation: u64,
        client: &mut Client,
        (ticket, expected_revision): (u64, i64),
        state: PartitionState,
    ) {
        let Site { node: n, partition } = site;
        self.note(|| {
            format!(
                "{site} proposes, at revision {expected_revision}: {}",
                Brief(&state)
            )
        });
        client.pending.insert((partition, ticket));
        self.tell_later(
            ANSWER_TIMEOUT_NS,
            (n, incarnation),
            ProcessEvent::NoAnswer { partition, ticket },
        );
        if self.is_out_of_reach(n) || self.rng.chance(2) {
            return;
        }
        let late = if self.rng.chance(3) {
            self.rng.between(0, 2_500_000_000)
        } else {
            0
        };
        let delay = late + self.plan.weather.message(&mut self.rng);
        self.registry.flying.push((partition, state.clone()));
        let happening = Happening::Propose {
            node: n,
            incarnation,
            partition,
            ticket,
            expected_revision,
            state,
        };
        self.schedule(delay, happening);
    }

    /// A proposal reaches the coordinator.
    pub(super) fn decide(
        &mut self,
        site: Site,
        incarnation: u64,
        (ticket, expected_revision): (u64, i64),
        state: PartitionState,
    ) -> Result<(), Violation> {
        let Site { node: n, partition } = site;
        let flying = &mut self.registry.flying;
        let landed = flying
            .iter()
            .position(|other| *other == (partition, state.clone()));
        landed.map(|landed| flying.swap_remove(landed));
        let agreed = &self.registry.agreed[partition];
        let answer = if expected_revision == agreed.revision {
            let before = &agreed.state;
            demand!(
                state.leader_epoch >= before.leader_epoch,
                "{site} proposes an epoch that falls"
            );
            demand!(
                state.leader == before.leader
                    || state.leader.is_none()
                    || state.leader_epoch > before.leader_epoch,
                "{site} proposes another leader in the same epoch"
            );
            demand!(!state.isr.is_empty(), "{site} proposes an empty ISR");
            let revision = expected_revision + 1;
            self.note(|| {
                format!(
                    "partition {partition}, revision {revision}, agreed: {}",
                    Brief(&state)
                )
            });
            self.stats.elections += u64::from(state.leader_epoch > before.leader_epoch);
            self.stats.isr_changes += u64::from(state.isr != before.isr);
            let agreed = Agreed { state, revision };
            self.registry.agreed[partition] = agreed.clone();
            for n in 0..self.machines.len() {
                let agreed = agreed.clone();
                self.watch(n, Event::Changed { partition, agreed });
            }
            Answer::Accepted { revision }
        } else {
            Answer::Conflict(agreed.clone())
        };
        if !self.is_out_of_reach(n) && !self.rng.chance(3) {
            let delay = self.plan.weather.message(&mut self.rng);
            self.tell_later(
                delay,
                (n, incarnation),
                ProcessEvent::Decided {
                    partition,
                    ticket,
                    answer,
                },
            );
        }
        Ok(())
    }

    /// The answer to a proposal reaches its node: if it still waits.
    pub(super) fn decided(
        &mut self,
        client: &mut Client,
        (partition, ticket): (usize, u64),
        answer: Answer,
    ) -> Option<Event> {
        let is_awaited = client.pending.remove(&(partition, ticket));
        is_awaited.then_some(Event::Answered {
            partition,
            ticket,
            answer,
        })
    }

    /// No answer has come: what is agreed is read again.
    pub(super) fn no_answer(
        &mut self,
        n: usize,
        client: &mut Client,
        (partition, ticket): (usize, u64),
    ) -> Option<Event> {
        if !client.pending.remove(&(partition, ticket)) {
            return None;
        }
        if self.is_out_of_reach(n) {
            self.registry.is_behind[n] = true;
        } else {
            self.tell_all_to(n);
        }
        let cause = "there is no answer".to_owned();
        Some(Event::Answered {
            partition,
            ticket,
            answer: Answer::Unknown { cause },
        })
    }
}

/// A state in a few words.
struct Brief<'a>(&'a PartitionState);

impl std::fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let PartitionState {
            leader,
            leader_epoch,
            isr,
            ..
        } = self.0;
        write!(f, "leader {leader:?}, epoch {leader_epoch}, ISR")?;
        isr.iter().try_for_each(|member| {
            let [a, b, ..] = member.memory_id.0;
            write!(f, " {}/{a:02x}{b:02x}", member.node)
        })
    }
}
