//! What every coordinator keeps to: one suite for those on real storage and for the simulation's model.

use std::time::Duration;

use super::{
    Agreed, Answer, Coordinator, Event, Member, MemoryId, PartitionKey, PartitionState,
    Registration,
};

/// How long an event may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long nothing must come.
const QUIET: Duration = Duration::from_millis(300);

/// Where things are agreed on; nodes join it.
pub(crate) trait Place {
    /// Starts a node's coordinator.
    fn join(&mut self, registration: Registration) -> Box<dyn Seat>;

    /// From now on what `node` proposes is lost, or carried out and its answer lost, until
    /// [`Place::mend`].
    fn lose(&mut self, node: u32, what: Loss);

    /// Undoes [`Place::lose`].
    fn mend(&mut self, node: u32);
}

/// What gets lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loss {
    Requests,
    Answers,
}

/// One node at the place.
pub(crate) trait Seat {
    fn coordinator(&mut self) -> &mut dyn Coordinator;

    /// The next event that comes within a time.
    fn next(&mut self, within: Duration) -> Option<Event>;
}

pub(crate) fn member(node: u32) -> Member {
    Member {
        node,
        memory_id: MemoryId([u8::try_from(node).unwrap(); 16]),
    }
}

/// Node `node` of a cluster of nodes 1 and 2 with two partitions, each of which one of them prefers.
pub(crate) fn registration(node: u32) -> Registration {
    let key = |number, replicas: &[u32]| PartitionKey {
        topic: "t".to_owned(),
        number,
        replicas: replicas.to_vec(),
    };
    Registration {
        cluster: "conformance".to_owned(),
        member: member(node),
        incarnation: 1,
        address: format!("127.0.0.1:700{node}"),
        partitions: vec![key(0, &[1, 2]), key(1, &[2, 1])],
    }
}

/// Node 1 leads partition 0, in an epoch.
pub(crate) fn led(leader_epoch: i32, isr: &[u32]) -> PartitionState {
    PartitionState {
        leader: Some(1),
        leader_epoch,
        isr: isr.iter().map(|&node| member(node)).collect(),
        replicas: vec![1, 2],
    }
}

/// A seat, and what it has been told.
pub(crate) struct Node {
    seat: Box<dyn Seat>,
    ticket: u64,
    revision: i64,
    /// The state of partition 0 that was told last.
    told: Option<Agreed>,
    beats: bool,
}

impl Node {
    pub(crate) fn new(seat: Box<dyn Seat>) -> Self {
        Self {
            seat,
            ticket: 0,
            revision: -1,
            told: None,
            beats: true,
        }
    }

    /// The next event for which `wanted` yields something; those before are only checked.
    pub(crate) fn wait<T>(&mut self, what: &str, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
        let mut waited = Duration::ZERO;
        let step = Duration::from_millis(20);
        while waited < PATIENCE {
            if self.beats {
                self.seat.coordinator().beat();
            }
            let Some(event) = self.seat.next(step) else {
                waited += step;
                continue;
            };
            self.check(&event);
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
        panic!("{what}: not within {PATIENCE:?}");
    }

    /// Takes what comes until nothing does for a while.
    pub(crate) fn quiet(&mut self) {
        while let Some(event) = self.seat.next(QUIET) {
            self.check(&event);
        }
    }

    /// Revisions of a partition never fall.
    fn check(&mut self, event: &Event) {
        let agreed = match event {
            Event::Changed {
                partition: 0,
                agreed,
            }
            | Event::Answered {
                partition: 0,
                answer: Answer::Conflict(agreed),
                ..
            } => agreed,
            _ => return,
        };
        assert!(
            agreed.revision >= self.revision,
            "{event:?} after revision {}",
            self.revision
        );
        self.revision = agreed.revision;
        if matches!(event, Event::Changed { .. }) {
            self.told = Some(agreed.clone());
        }
    }

    /// The next state of partition 0 that is told.
    pub(crate) fn changed(&mut self) -> Agreed {
        self.wait("a state of partition 0", |event| match event {
            Event::Changed {
                partition: 0,
                agreed,
            } => Some(agreed.clone()),
            _ => None,
        })
    }

    pub(crate) fn propose(&mut self, expected_revision: i64, state: PartitionState) -> Answer {
        self.ticket += 1;
        let ours = self.ticket;
        let coordinator = self.seat.coordinator();
        coordinator.propose(0, ours, expected_revision, state);
        self.wait("an answer", |event| match event {
            Event::Answered {
                partition,
                ticket,
                answer,
            } => {
                assert_eq!((*partition, *ticket), (0, ours), "{event:?}");
                Some(answer.clone())
            }
            _ => None,
        })
    }

    pub(crate) fn accept(&mut self, expected_revision: i64, state: PartitionState) -> i64 {
        match self.propose(expected_revision, state) {
            Answer::Accepted { revision } => {
                assert!(revision > expected_revision);
                revision
            }
            other => panic!("not accepted: {other:?}"),
        }
    }

    fn live(&mut self, wanted: &[u32]) {
        let mut wanted: Vec<Member> = wanted.iter().map(|&node| member(node)).collect();
        wanted.sort();
        self.wait(&format!("nodes {wanted:?}"), |event| match event {
            Event::Nodes { live } => {
                let mut live = live.clone();
                live.sort();
                (live == wanted).then_some(())
            }
            _ => None,
        });
    }
}

fn join(place: &mut dyn Place, node: u32) -> Node {
    Node::new(place.join(registration(node)))
}

/// A partition that nobody has led is offline and empty, and told once at the start.
pub(crate) fn first_states_are_told(place: &mut dyn Place) {
    let mut node = join(place, 1);
    let first = node.changed();
    let fresh = PartitionState {
        leader: None,
        leader_epoch: 0,
        isr: Vec::new(),
        replicas: vec![1, 2],
    };
    assert_eq!(first.state, fresh);
    node.wait("a state of partition 1", |event| {
        matches!(event, Event::Changed { partition: 1, .. }).then_some(())
    });
}

/// Of two proposals for one revision one holds, and the other one's answer says what does.
pub(crate) fn one_proposal_wins(place: &mut dyn Place) {
    let mut node = join(place, 1);
    let first = node.changed().revision;
    let won = node.accept(first, led(1, &[1, 2]));
    let newest = Agreed {
        state: led(1, &[1, 2]),
        revision: won,
    };
    assert_eq!(node.propose(first, led(1, &[1])), Answer::Conflict(newest));
    let next = node.accept(won, led(1, &[1]));
    // Who has proposed it is told, too.
    assert_eq!(decided(&mut node, won).state, led(1, &[1]));
    assert_eq!(
        node.propose(won, led(2, &[1])),
        Answer::Conflict(Agreed {
            state: led(1, &[1]),
            revision: next,
        })
    );
    node.quiet();
}

/// What is agreed outlives the coordinator.
pub(crate) fn states_survive_a_restart(place: &mut dyn Place) {
    let mut node = join(place, 1);
    let first = node.changed().revision;
    let revision = node.accept(first, led(3, &[1, 2]));
    drop(node);
    let mut node = join(place, 1);
    let agreed = node.changed();
    assert_eq!(agreed.state, led(3, &[1, 2]));
    assert!(agreed.revision >= revision);
    node.accept(agreed.revision, led(4, &[1]));
}

/// A proposal that did not arrive is undecided at first, and void once its revision is passed.
pub(crate) fn a_lost_request_is_void(place: &mut dyn Place) {
    let mut node = join(place, 1);
    let first = node.changed().revision;
    let held = node.accept(first, led(1, &[1, 2]));
    node.quiet();
    place.lose(1, Loss::Requests);
    let answer = node.propose(held, led(1, &[1]));
    let Answer::Unknown { cause } = answer else {
        panic!("nothing can have come through: {answer:?}");
    };
    assert!(!cause.is_empty());
    place.mend(1);
    let decided = decided(&mut node, held);
    assert_eq!(decided.state, led(1, &[1, 2]));
    // The loser's revision is gone for good.
    assert!(matches!(
        node.propose(held, led(1, &[1])),
        Answer::Conflict(_)
    ));
    node.accept(decided.revision, led(1, &[1]));
}

/// A proposal whose answer did not arrive is undecided at first, and then told as agreed.
pub(crate) fn a_lost_answer_is_told_later(place: &mut dyn Place) {
    let mut node = join(place, 1);
    let first = node.changed().revision;
    let held = node.accept(first, led(1, &[1, 2]));
    node.quiet();
    place.lose(1, Loss::Answers);
    let answer = node.propose(held, led(1, &[1]));
    assert!(matches!(answer, Answer::Unknown { .. }), "{answer:?}");
    place.mend(1);
    let decided = decided(&mut node, held);
    assert_eq!(decided.state, led(1, &[1]));
    node.accept(decided.revision, led(2, &[1]));
}

/// The first state beyond a revision; it may be told before an answer.
fn decided(node: &mut Node, undecided: i64) -> Agreed {
    loop {
        match &node.told {
            Some(told) if told.revision > undecided => return told.clone(),
            _ => node.changed(),
        };
    }
}

/// Of two nodes that propose at once one wins, and both are told the same.
pub(crate) fn two_nodes_agree(place: &mut dyn Place) {
    let (mut one, mut two) = (join(place, 1), join(place, 2));
    let mut revision = one.changed().revision;
    assert_eq!(two.changed().revision, revision);
    for round in 1..=20 {
        let takes = PartitionState {
            leader: Some(2),
            ..led(round, &[1, 2])
        };
        one.seat
            .coordinator()
            .propose(0, 0, revision, led(round, &[1, 2]));
        two.seat.coordinator().propose(0, 0, revision, takes);
        let is_accepted = |node: &mut Node| {
            node.wait("an answer", |event| match event {
                Event::Answered { answer, .. } => Some(matches!(answer, Answer::Accepted { .. })),
                _ => None,
            })
        };
        let leader = match (is_accepted(&mut one), is_accepted(&mut two)) {
            (true, false) => 1,
            (false, true) => 2,
            both => panic!("{both:?} in round {round}"),
        };
        let told = decided(&mut one, revision);
        assert_eq!(told, decided(&mut two, revision));
        assert_eq!(
            (told.state.leader, told.state.leader_epoch),
            (Some(leader), round)
        );
        revision = told.revision;
    }
}

/// Every node is told every change, in order; one that joins later begins with the newest.
pub(crate) fn changes_reach_everyone_in_order(place: &mut dyn Place) {
    let (mut one, mut two) = (join(place, 1), join(place, 2));
    let mut revision = one.changed().revision;
    two.changed();
    for epoch in 1..=50 {
        revision = one.accept(revision, led(epoch, &[1]));
    }
    let mut epochs = Vec::new();
    while epochs.last() != Some(&50) {
        epochs.push(two.changed().state.leader_epoch);
    }
    assert!(epochs.is_sorted(), "{epochs:?}");
    assert_eq!(join(place, 2).changed().state, led(50, &[1]));
}

/// Nodes come and go; one that does not beat is gone for the others, and knows it.
pub(crate) fn a_node_that_does_not_beat_is_lost(place: &mut dyn Place) {
    let mut one = join(place, 1);
    one.live(&[1]);
    let mut two = join(place, 2);
    two.live(&[1, 2]);
    one.live(&[1, 2]);
    two.beats = false;
    one.live(&[1]);
    two.wait("the end of the session", |event| {
        matches!(event, Event::SessionLost { cause } if cause.contains("progress")).then_some(())
    });
    two.beats = true;
    two.wait("a session", |event| {
        matches!(event, Event::SessionBack).then_some(())
    });
    one.live(&[1, 2]);
    drop(two);
    one.live(&[1]);
}
