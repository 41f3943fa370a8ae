//! What happens to the cluster in one round: decided by a seed alone.

use std::fmt;

use crate::random::Random;

/// How long faults begin in a round, in milliseconds.
const BEGIN_MS: u64 = 6000;
/// The longest fault, in milliseconds.
const FAULT_MS: u64 = 5000;

/// Nodes are numbered from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// SIGKILL, and a start on the same data.
    Kill(u32),
    /// SIGKILL of all nodes at once.
    KillAll,
    /// SIGTERM, and a start on the same data.
    End(u32),
    /// SIGKILL, loss of the log memory, and a start on the same files: the machine was off. It comes first in a
    /// round if at all, when the others are in sync and keep their memory.
    Reboot(u32),
    /// SIGSTOP and SIGCONT.
    Stop(u32),
    /// SIGSTOP and SIGCONT of etcd.
    StopEtcd,
    /// The network loses something.
    Cut(Cut),
}

/// What the network loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Everything between two nodes.
    Pair(u32, u32),
    /// Everything from one node to another.
    OneWay(u32, u32),
    /// What RDMA carries between two nodes: their control connections stay.
    Data(u32, u32),
    /// Everything between a node and etcd.
    Etcd(u32),
    /// Everything to and from a node, clients included: its cable is out.
    Cable(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    /// Since the beginning of the round.
    pub(crate) at_ms: u64,
    pub(crate) fault: Fault,
    pub(crate) is_begin: bool,
}

/// The steps of a round, in order; each fault that begins ends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan(pub(crate) Vec<Step>);

impl Plan {
    /// Without elections no node loses its memory: it alone could lead what it leads, and may not.
    pub(crate) fn new(seed: u64, nodes_count: u32, has_cuts: bool, has_elections: bool) -> Self {
        let mut random = Random(seed);
        let mut steps = Vec::new();
        let mut faults = Vec::new();
        if random.below(4) == 0 && has_elections {
            faults.push((0, Fault::Reboot(node(&mut random, nodes_count))));
        }
        for _ in 0..3 + random.below(5) {
            let begin = 1 + random.below(BEGIN_MS);
            faults.push((begin, Fault::random(&mut random, nodes_count, has_cuts)));
        }
        for (begin, fault) in faults {
            let end = begin + random.between(20, FAULT_MS);
            for (at_ms, is_begin) in [(begin, true), (end, false)] {
                steps.push(Step {
                    at_ms,
                    fault,
                    is_begin,
                });
            }
        }
        steps.sort_by_key(|step| step.at_ms);
        Self(steps)
    }
}

fn node(random: &mut Random, nodes_count: u32) -> u32 {
    1 + u32::try_from(random.below(nodes_count.into())).unwrap()
}

impl Fault {
    fn random(random: &mut Random, nodes_count: u32, has_cuts: bool) -> Self {
        let draw = random.below(if has_cuts { 16 } else { 8 });
        let node = node(random, nodes_count);
        let step = 1 + u32::try_from(random.below(u64::from(nodes_count) - 1)).unwrap();
        let other = 1 + (node - 1 + step) % nodes_count;
        match draw {
            0..3 => Self::Kill(node),
            3 => Self::KillAll,
            4 => Self::End(node),
            5..7 => Self::Stop(node),
            7 => Self::StopEtcd,
            8..10 => Self::Cut(Cut::Pair(node, other)),
            10 => Self::Cut(Cut::OneWay(node, other)),
            11..13 => Self::Cut(Cut::Data(node, other)),
            13 => Self::Cut(Cut::Etcd(node)),
            _ => Self::Cut(Cut::Cable(node)),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.is_begin { "begin" } else { "end" };
        write!(f, "{:5} ms {word} {:?}", self.at_ms, self.fault)
    }
}

#[test]
fn a_seed_decides_everything_and_what_begins_ends() {
    let plans = |has_cuts| (0..200).map(move |seed| Plan::new(seed, 3, has_cuts, has_cuts));
    assert!(plans(true).eq(plans(true)));
    for Plan(steps) in plans(true).chain(plans(false)) {
        assert!(steps.is_sorted_by_key(|step| step.at_ms));
        for step in &steps {
            let same = steps.iter().filter(|other| other.fault == step.fault);
            let (begins, ends) = same.partition::<Vec<&Step>, _>(|other| other.is_begin);
            assert_eq!(begins.len(), ends.len(), "{step}");
            let Fault::Cut(Cut::Pair(a, b) | Cut::OneWay(a, b) | Cut::Data(a, b)) = step.fault
            else {
                continue;
            };
            assert!(
                a != b && (1..=3).contains(&a) && (1..=3).contains(&b),
                "{step}"
            );
        }
    }
    let is_late =
        |step: &Step| matches!(step.fault, Fault::Reboot(_)) && step.is_begin && step.at_ms > 0;
    assert!(!plans(true).any(|Plan(steps)| steps.iter().any(is_late)));
    let is_cut = |step: &Step| matches!(step.fault, Fault::Cut(_));
    assert!(plans(true).any(|Plan(steps)| steps.iter().any(is_cut)));
    assert!(!plans(false).any(|Plan(steps)| steps.iter().any(is_cut)));
}
