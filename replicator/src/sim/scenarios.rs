//! Fail-over, fencing and truncation, one step after the other, in a world where nothing else happens.

use super::events::ProcessEvent;
use super::*;
use crate::control::Acks;
use crate::coordinator::PartitionState;

const MS: u64 = 1_000_000;

impl World {
    /// A world that has come to rest; node 0 leads and all are in sync.
    fn settled(nodes: usize, min_isr: usize) -> Self {
        let mut world = Self::quiet(nodes, min_isr);
        world.settle();
        let state = world.state();
        assert_eq!((state.leader, state.isr.len()), (Some(0), nodes));
        world
    }

    fn settle(&mut self) {
        for _ in 0..REST_STEPS_MAX {
            self.wait(100);
            if self.is_at_rest() {
                return self.check_end().expect("what was promised");
            }
        }
        panic!("it does not come to rest: {:?}", self.unrest());
    }

    fn wait(&mut self, ms: u64) {
        self.pass_until(self.now + ms * MS)
            .expect("what was promised");
    }

    fn state(&self) -> &PartitionState {
        &self.registry.agreed[0].state
    }

    /// Appends a batch at a node and waits for a while; returns whether it was acknowledged, or nothing if
    /// there is no answer.
    fn append_and_wait(&mut self, n: usize, acks: Acks) -> Option<bool> {
        let before = self.stats;
        self.send_append_to(0, n, acks);
        self.wait(20);
        let (answered, refused) = (before.answered, before.refused);
        match (self.stats.answered - answered, self.stats.refused - refused) {
            (1, 0) => Some(true),
            (0, 1) => Some(false),
            (0, 0) => None,
            other => panic!("one append has {other:?} answers"),
        }
    }

    fn is_acknowledged(&mut self, n: usize) -> bool {
        self.append_and_wait(n, Acks::Replicated) == Some(true)
    }

    fn kill(&mut self, n: usize) {
        self.end_process(n, false);
    }

    fn start_again(&mut self, n: usize) {
        self.start(n).expect("what was promised");
    }

    /// Cuts a node off from all others and from the coordinator, or lets it reach them again.
    fn isolate(&mut self, n: usize, is_cut: bool) {
        for other in (0..=self.machines.len()).filter(|other| *other != n) {
            let pair = (n.min(other), n.max(other));
            if is_cut {
                self.cuts.insert(pair);
                self.verbs.set_cut(pair.0, pair.1, true);
                self.cut_connections(pair.0, pair.1);
            } else {
                self.heal(pair.0, pair.1);
            }
        }
    }

    fn hand_over_from(&mut self, n: usize) {
        let process = self.machines[n].process.as_ref();
        let incarnation = process.expect("it runs").incarnation;
        self.tell((n, incarnation), ProcessEvent::HandOver)
            .expect("what was promised");
    }
}

#[test]
fn a_new_partition_gets_a_leader_and_an_isr() {
    let mut world = World::settled(3, 1);
    assert_eq!(world.state().leader_epoch, 1);
    assert!(world.is_acknowledged(0));
    world.settle();
}

#[test]
fn a_killed_leader_is_replaced_and_comes_back_as_a_follower() {
    let mut world = World::settled(3, 1);
    assert!((0..5).all(|_| world.is_acknowledged(0)));
    world.send_append_to(0, 0, Acks::Replicated);
    world.kill(0);
    world.wait(1000);
    let state = world.state();
    assert_eq!((state.leader, state.isr.len()), (Some(1), 2), "{state:?}");
    assert!(world.is_acknowledged(1));
    world.start_again(0);
    world.settle();
    assert_eq!(world.state().leader, Some(1));
}

#[test]
fn a_leader_that_restarts_leads_in_a_new_epoch() {
    let mut world = World::settled(1, 1);
    assert!(world.is_acknowledged(0));
    world.kill(0);
    world.start_again(0);
    world.settle();
    assert_eq!(world.state().leader_epoch, 2);
}

/// What it lacks by then is not in the leader's memory any more.
#[test]
fn a_member_that_is_gone_is_proposed_out_and_catches_up_from_the_files() {
    let mut world = World::settled(2, 1);
    world.kill(1);
    assert_eq!(world.append_and_wait(0, Acks::Replicated), None);
    world.wait(500);
    assert_eq!((world.state().isr.len(), world.stats.answered), (1, 1));
    assert!((0..200).all(|_| world.is_acknowledged(0)));
    world.start_again(1);
    world.settle();
}

#[test]
fn appends_are_refused_while_too_few_are_in_sync() {
    let mut world = World::settled(2, 2);
    world.kill(1);
    world.wait(500);
    assert_eq!(world.state().isr.len(), 1);
    assert_eq!(world.append_and_wait(0, Acks::Replicated), Some(false));
    assert_eq!(world.append_and_wait(0, Acks::Leader), Some(true));
    world.start_again(1);
    world.settle();
    assert!(world.is_acknowledged(0));
}

/// It does not know that it has been replaced, and its records are nobody's.
#[test]
fn a_leader_that_is_cut_off_takes_nothing_and_is_truncated() {
    let mut world = World::settled(3, 1);
    world.isolate(0, true);
    assert_eq!(world.append_and_wait(0, Acks::Leader), Some(true));
    assert_eq!(world.append_and_wait(0, Acks::Replicated), None);
    world.wait(1000);
    assert_eq!(world.append_and_wait(0, Acks::Leader), Some(false));
    assert_eq!(world.state().leader, Some(1));
    assert!(world.is_acknowledged(1));
    world.isolate(0, false);
    world.settle();
    assert_eq!(
        world.stats.refused, 2,
        "one of unknown outcome, one that was not taken"
    );
}

#[test]
fn a_durable_append_waits_for_every_device() {
    let mut world = World::settled(2, 1);
    assert_eq!(world.append_and_wait(0, Acks::Durable), Some(true));
    world.machines[1].is_short_of_memory = true;
    world.set_full(1, true);
    assert_eq!(world.append_and_wait(0, Acks::Replicated), Some(true));
    assert_eq!(world.append_and_wait(0, Acks::Durable), None);
    world.set_full(1, false);
    world.machines[1].is_short_of_memory = false;
    world.settle();
    assert_eq!(world.stats.answered, 3);
}

#[test]
fn a_leader_hands_over_to_a_member_that_has_everything() {
    let mut world = World::settled(2, 1);
    world.send_append_to(0, 0, Acks::Replicated);
    world.wait(1);
    world.hand_over_from(0);
    world.settle();
    assert_eq!((world.state().leader, world.stats.hand_overs), (Some(1), 1));
}

/// There is nobody to hand over to: what has been appended is committed all the same, once the member that is
/// gone is out, and nothing is due at once for ever.
#[test]
fn a_hand_over_does_not_stop_the_isr() {
    let mut world = World::settled(2, 1);
    world.kill(1);
    assert_eq!(world.append_and_wait(0, Acks::Replicated), None);
    world.hand_over_from(0);
    world.wait(1000);
    assert_eq!((world.state().isr.len(), world.stats.answered), (1, 1));
    assert_eq!(world.state().leader, Some(0));
}

#[test]
fn a_node_that_has_lost_its_memory_does_not_lead() {
    let mut world = World::settled(2, 1);
    assert!(world.is_acknowledged(0));
    world.cut_power(1);
    world.kill(0);
    world.start_again(1);
    world.wait(3000);
    assert_eq!(world.state().leader, Some(0), "offline until it is back");
    world.start_again(0);
    world.settle();
}

#[test]
fn when_all_have_lost_their_memory_the_one_with_most_leads() {
    let mut world = World::settled(3, 1);
    assert!((0..20).all(|_| world.is_acknowledged(0)));
    assert_eq!(world.append_and_wait(0, Acks::Durable), Some(true));
    let epoch = world.state().leader_epoch;
    world.black_out();
    world.settle();
    assert!(world.state().leader_epoch > epoch);
    let leader = world.state().leader.expect("there is one");
    assert!(world.is_acknowledged(leader as usize));
}
