//! Fail-over, fencing and truncation, step by step and in any order.

use proptest::prelude::*;

use super::Random;
use super::cluster::Cluster;
use crate::faults::{self, Fault};

/// A cluster in which node 1 leads and all are in sync.
fn settled(count: u32) -> Cluster {
    let mut cluster = Cluster::new(count, 1);
    cluster.heal();
    cluster.check_healed().unwrap();
    assert_eq!(cluster.agreed.state.leader, Some(1));
    cluster
}

#[test]
fn a_new_partition_gets_a_leader_and_an_isr() {
    let mut cluster = settled(3);
    assert_eq!(cluster.agreed.state.leader_epoch, 1);
    assert!(cluster.append(0, 3, 10));
    cluster.heal();
    cluster.check_healed().unwrap();
    assert_eq!(cluster.acknowledged.len(), 1);
}

#[test]
fn a_killed_leader_is_replaced_and_comes_back_as_a_follower() {
    let mut cluster = settled(3);
    for _ in 0..5 {
        assert!(cluster.append(0, 1, 100));
    }
    cluster.kill(1, 7);
    cluster.expire(1, false);
    for step in 0..2000 {
        if !cluster.step(step) {
            cluster.tick(20);
        }
    }
    let state = cluster.agreed.state.clone();
    assert_eq!((state.leader, state.isr.len()), (Some(2), 2), "{state:?}");
    assert!(cluster.append(0, 1, 100));
    cluster.heal();
    cluster.check_healed().unwrap();
    assert_eq!(cluster.agreed.state.leader, Some(2));
    assert!(cluster.lost.is_empty(), "{:?}", cluster.lost);
}

#[test]
fn a_leader_that_restarts_leads_in_a_new_epoch() {
    let mut cluster = settled(1);
    assert!(cluster.append(0, 1, 100));
    cluster.kill(1, 0);
    cluster.heal();
    cluster.check_healed().unwrap();
    assert_eq!(cluster.agreed.state.leader_epoch, 2);
    assert_eq!(cluster.truth.len(), cluster.nodes[&1].files.all().len());
}

#[test]
fn a_member_that_is_gone_is_proposed_out_and_may_come_back() {
    let mut cluster = settled(2);
    cluster.kill(2, 0);
    assert!(cluster.append(0, 1, 10));
    for _ in 0..100 {
        cluster.tick(100);
        while cluster.step(0) {}
    }
    assert_eq!(cluster.agreed.state.isr.len(), 1);
    assert_eq!(cluster.acknowledged.len(), 1, "one member is enough");
    cluster.heal();
    cluster.check_healed().unwrap();
}

#[test]
fn a_proposed_shrink_does_not_count_before_it_is_agreed() {
    let mut cluster = settled(2);
    cluster.kill(2, 0);
    assert!(cluster.append(0, 1, 10));
    cluster.tick(10_000);
    assert_eq!(cluster.proposals.len(), 1);
    assert!(cluster.acknowledged.is_empty());
    while cluster.step(0) {}
    assert_eq!(cluster.acknowledged.len(), 1);
}

#[test]
fn appends_are_refused_while_too_few_are_in_sync() {
    let mut cluster = Cluster::new(2, 2);
    cluster.heal();
    assert!(cluster.append(0, 1, 10));
    cluster.kill(2, 0);
    for _ in 0..100 {
        cluster.tick(100);
        while cluster.step(0) {}
    }
    assert_eq!(cluster.agreed.state.isr.len(), 1);
    assert!(!cluster.append(0, 1, 10));
    assert!(
        cluster.acknowledged.is_empty(),
        "one of two is not enough to commit"
    );
    cluster.heal();
    cluster.check_healed().unwrap();
    assert!(cluster.append(0, 1, 10));
}

#[test]
fn a_leader_without_a_session_takes_and_acknowledges_nothing() {
    let mut cluster = settled(2);
    assert!(cluster.append(0, 1, 10));
    let now = cluster.now;
    let replica = cluster.nodes.get_mut(&1).unwrap().replica.as_mut();
    replica.unwrap().handle_session(now, false);
    while cluster.step(0) {}
    assert!(cluster.acknowledged.is_empty());
    assert!(!cluster.append(0, 1, 10));
    cluster.renew(1);
    while cluster.step(0) {}
    assert_eq!(cluster.acknowledged.len(), 1);
    assert!(cluster.append(0, 1, 10));
}

#[test]
fn a_leader_hands_over_to_a_member_that_has_everything() {
    let mut cluster = settled(2);
    assert!(cluster.append(0, 1, 10));
    let deadline = cluster.now + 100_000;
    let now = cluster.now;
    let replica = cluster.nodes.get_mut(&1).unwrap().replica.as_mut();
    assert!(replica.unwrap().hand_over(now, deadline));
    assert!(!cluster.append(0, 1, 10), "it takes no more appends");
    cluster.heal();
    cluster.check_healed().unwrap();
    assert_eq!(cluster.nodes[&1].handed_over, Some(2));
    assert_eq!(cluster.agreed.state.leader, Some(2));
    assert_eq!(cluster.acknowledged.len(), 1);
}

/// There is nobody to hand over to: what has been appended is committed all the same, once the member that is
/// gone is out, and nothing is due at once for ever.
#[test]
fn a_hand_over_does_not_stop_the_isr() {
    let mut cluster = settled(2);
    cluster.kill(2, 0);
    assert!(cluster.append(0, 1, 10));
    let deadline = cluster.now + 1_000_000;
    let now = cluster.now;
    let replica = cluster.nodes.get_mut(&1).unwrap().replica.as_mut();
    assert!(replica.unwrap().hand_over(now, deadline));
    for _ in 0..200 {
        cluster.tick(100);
        while cluster.step(0) {}
    }
    assert_eq!(cluster.acknowledged.len(), 1);
    assert_eq!(cluster.agreed.state.isr.len(), 1, "the others are gone");
    let replica = cluster.nodes[&1].replica.as_ref().unwrap();
    assert!(replica.poll_timeout().is_none_or(|due| due > cluster.now));
}

#[test]
fn a_node_that_has_lost_its_memory_does_not_lead() {
    let mut cluster = settled(2);
    assert!(cluster.append(0, 1, 10));
    cluster.heal();
    // Node 2 loses its memory, and then node 1 dies.
    cluster.lose_memory(2);
    cluster.kill(1, 0);
    cluster.expire(1, false);
    cluster.start(2);
    for step in 0..2000 {
        if !cluster.step(step) {
            cluster.tick(20);
        }
    }
    assert_eq!(
        cluster.agreed.state.leader,
        Some(1),
        "offline until it is back"
    );
    cluster.heal();
    cluster.check_healed().unwrap();
}

#[test]
fn when_all_have_lost_their_memory_the_one_with_most_leads() {
    let mut cluster = settled(3);
    for _ in 0..20 {
        assert!(cluster.append(0, 1, 100));
        while cluster.step(0) {}
        cluster.tick(100);
    }
    cluster.heal();
    for id in 1..=3 {
        cluster.lose_memory(id);
    }
    let ends = |cluster: &Cluster| -> Vec<i64> {
        let nodes = cluster.nodes.values();
        nodes.map(|n| n.files.stored().log_end_offset).collect()
    };
    assert!(ends(&cluster).iter().any(|&end| end > 0));
    cluster.heal();
    assert!(cluster.check_healed().is_ok() || !cluster.lost.is_empty());
    assert!(!cluster.lost.is_empty(), "it is reported");
    assert!(cluster.append(0, 1, 10));
}

/// Anything that may happen to three nodes, in any order. Memory is lost only while another member of the
/// ISR keeps its own.
fn interleave(seed: u64) -> Result<(), String> {
    let mut random = Random(seed | 1);
    let mut cluster = Cluster::new(3, 1 + random.next() % 2);
    for _ in 0..300 + random.next() % 900 {
        let detail = random.next();
        let id = 1 + u32::try_from(detail % 3).unwrap();
        let other = 1 + (id + u32::try_from(detail / 3 % 2).unwrap()) % 3;
        match random.next() % 200 {
            0..40 => {
                cluster.append(detail, 1 + detail % 3, detail % 300);
            }
            40..52 => cluster.connect((id, other)),
            52..55 => cluster.lose_lane((id, other), detail / 8),
            55 | 56 => cluster.kill(id, detail / 8),
            57 => cluster.expire(id, detail.is_multiple_of(2)),
            58 if cluster.can_spare(id) => cluster.lose_memory(id),
            59..63 => cluster.start(id),
            63..66 => cluster.renew(id),
            66..80 => cluster.tick(detail as u64 % 200),
            _ => {
                cluster.step(detail);
            }
        }
    }
    cluster.heal();
    cluster.check_healed()?;
    match cluster.lost.first() {
        Some(lost) => Err(format!("nothing is lost, and yet: {lost}")),
        None => Ok(()),
    }
}

proptest! {
    // A seed cannot be made smaller.
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn every_interleaving_keeps_what_is_acknowledged(seed: u64) {
        if let Err(cause) = interleave(seed) {
            return Err(TestCaseError::fail(cause));
        }
    }
}

/// A run in which the last member loses its memory after a shrink to it was proposed, and before it was agreed
/// on, would lose records: the model must not do that.
#[test]
fn what_has_failed_once_passes() {
    interleave(6_835_698_027_290_753_219).unwrap();
}

/// Where each fault is found; [`NOT_HERE`] lists those that need memory that is not zero, which this model
/// does not have.
const FOUND: [(Fault, u64); 7] = [
    (Fault::NoFence, 284),
    (Fault::GrantFirst, 1),
    (Fault::AckBeforeAllIsr, 204),
    (Fault::HwOnProposedShrink, 118),
    (Fault::NoTruncation, 1),
    (Fault::HwBeyondLeo, 1),
    (Fault::MemberWithoutMemoryElected, 58),
];
const NOT_HERE: [Fault; 1] = [Fault::ScanUnchecked];
/// Elsewhere it is looked for in this many seeds, since a change of the model changes what a seed does.
const FAULT_SEEDS: u64 = 1000;

fn spread(seed: u64) -> u64 {
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What is wrong with a run in which a rule is broken.
fn judge(fault: Fault, seed: u64) -> Option<String> {
    let run = || faults::inject(fault, || interleave(spread(seed)));
    match std::panic::catch_unwind(run) {
        Ok(verdict) => verdict.err(),
        Err(panic) => Some(match panic.downcast::<String>() {
            Ok(cause) => *cause,
            Err(other) => other.downcast_ref::<&str>().unwrap_or(&"?").to_string(),
        }),
    }
}

/// The checks bite: with any rule broken, some seed fails that does not fail otherwise.
#[test]
fn every_fault_is_found() {
    let is_covered =
        |fault: &Fault| FOUND.iter().any(|(found, _)| found == fault) || NOT_HERE.contains(fault);
    assert!(faults::ALL.iter().all(is_covered));
    for (fault, seed) in FOUND {
        let mut seeds = std::iter::once(seed).chain(1..FAULT_SEEDS);
        let found = seeds.find_map(|seed| Some((seed, judge(fault, seed)?)));
        let (seed, verdict) = found.unwrap_or_else(|| panic!("{fault:?} is not found"));
        eprintln!("{fault:?}: seed {seed}: {verdict}");
        interleave(spread(seed)).unwrap();
    }
}
