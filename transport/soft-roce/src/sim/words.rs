//! The judge of contended words: whether what atomics returned can have come of one order.
//!
//! Several queue pairs of several devices work on one word. Nobody knows the order in which their
//! atomics execute, but operands are random 64-bit numbers, so no value comes twice, and the values
//! returned give the order away: each value but the last is found by exactly one atomic that
//! replaces it.
//!
//! ```text
//! initial --op--> value --op--> value --op--> ... --op--> final      op found the value on its left
//! ```
//!
//! An atomic that was lost breaks the chain, one that was executed twice leaves a value that nobody
//! explains. The order must also agree with time: what had completed before another was posted comes
//! first, and so does what was posted first on the same queue pair. Only of atomics on a queue pair
//! that has failed is it unknown whether they were executed; they may fill gaps, in their order.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::Violation;

/// A direction and how often its queue pair was reset: what was posted before may be lost, whatever became
/// of what was posted since.
pub(super) type SendQueue = (usize, usize);

/// What an operation on a word does.
#[derive(Clone, Copy, Debug)]
pub(super) enum WordOp {
    Add(u64),
    Swap { compare: u64, swap: u64 },
    Read,
}

/// An operation posted, and what is known of it.
#[derive(Clone, Debug)]
struct Entry {
    op: WordOp,
    queue: SendQueue,
    posted: u64,
    /// When it was seen to be complete, and the value it found.
    found: Option<(u64, u64)>,
}

/// All operations on one word.
#[derive(Clone, Debug)]
pub(super) struct History {
    initial: u64,
    entries: Vec<Entry>,
}

impl WordOp {
    /// What the word holds after the operation has found `value`; `None` if it is left alone.
    fn result(self, value: u64) -> Option<u64> {
        match self {
            Self::Add(add) => Some(value.wrapping_add(add)),
            Self::Swap { compare, swap } => (value == compare).then_some(swap),
            Self::Read => None,
        }
    }
}

impl History {
    pub(super) fn new(initial: u64) -> Self {
        let entries = Vec::new();
        Self { initial, entries }
    }

    /// Notes an operation that is posted to `queue` at time `posted`; returns its number.
    pub(super) fn post(&mut self, op: WordOp, queue: SendQueue, posted: u64) -> usize {
        self.entries.push(Entry {
            op,
            queue,
            posted,
            found: None,
        });
        self.entries.len() - 1
    }

    /// Notes that an operation was seen at time `when` to have found `value`.
    pub(super) fn complete(&mut self, number: usize, when: u64, value: u64) {
        self.entries[number].found = Some((when, value));
    }

    /// Judges the history, at the end of which the word holds `last`.
    pub(super) fn check(&self, last: u64) -> Result<(), Violation> {
        let chain = self.chain(last)?;
        let states: HashMap<u64, usize> = chain.iter().copied().zip(0..).collect();
        let mut known = Vec::new();
        for entry in &self.entries {
            let Some((when, value)) = entry.found else {
                continue;
            };
            let at = states.get(&value).expect("the chain has what was found");
            let changes = entry.op.result(value).is_some();
            known.push((entry, when, *at, at + usize::from(changes)));
        }
        for (earlier, when, _, after) in &known {
            for (later, _, at, _) in &known {
                let is_ordered = *when < later.posted
                    || earlier.queue == later.queue
                        && earlier.posted < later.posted
                        && !matches!(earlier.op, WordOp::Read);
                if is_ordered && at < after {
                    return Err(Violation(format!(
                        "{later:?} found a value older than {earlier:?} left"
                    )));
                }
            }
        }
        Ok(())
    }

    /// The values the word held, first to last.
    fn chain(&self, last: u64) -> Result<Vec<u64>, Violation> {
        let mut next: HashMap<u64, u64> = HashMap::new();
        for entry in &self.entries {
            let Some((_, value)) = entry.found else {
                continue;
            };
            if let Some(result) = entry.op.result(value)
                && next.insert(value, result).is_some()
            {
                return Err(Violation(format!(
                    "two atomics found and replaced {value:#x}"
                )));
            }
        }
        let found = self.entries.iter().filter_map(|entry| entry.found);
        let search = Search {
            next: &next,
            doubtful: self.doubtful(),
            seen: found.map(|(_, value)| value).collect(),
            last,
        };
        let start = vec![0; search.doubtful.len()];
        // Few doubtful ones come between two that are known: looked for first, these are found soon.
        let gaps = 0..=search.doubtful.iter().map(Vec::len).sum();
        gaps.into_iter()
            .find_map(|gap_max| {
                let place = Place {
                    used: start.clone(),
                    gap: 0,
                };
                search.extend(vec![self.initial], place, gap_max, &mut HashSet::new())
            })
            .ok_or_else(|| {
                Violation(format!(
                    "no order of the operations leads from {:#x} to {last:#x}: {:#x?}",
                    self.initial, self.entries
                ))
            })
    }

    /// Atomics whose outcome is unknown, by queue pair, in their order.
    fn doubtful(&self) -> Vec<Vec<WordOp>> {
        let mut by_queue: BTreeMap<SendQueue, Vec<WordOp>> = BTreeMap::new();
        for entry in &self.entries {
            if entry.found.is_none() && !matches!(entry.op, WordOp::Read) {
                by_queue.entry(entry.queue).or_default().push(entry.op);
            }
        }
        by_queue.into_values().collect()
    }
}

/// The search for an order.
struct Search<'a> {
    /// What replaced each value that a completed atomic found.
    next: &'a HashMap<u64, u64>,
    doubtful: Vec<Vec<WordOp>>,
    /// Every value that an operation found: all must have been held.
    seen: BTreeSet<u64>,
    last: u64,
}

/// How far a search has come.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    /// Doubtful ones executed, by queue.
    used: Vec<usize>,
    /// Doubtful ones executed since the last value that is known of.
    gap: usize,
}

impl Search<'_> {
    /// Extends `chain` to the end, with no more than `gap_max` doubtful ones in a row. What was `tried` is
    /// not tried again.
    fn extend(
        &self,
        mut chain: Vec<u64>,
        mut place: Place,
        gap_max: usize,
        tried: &mut HashSet<(u64, Place, BTreeSet<u64>)>,
    ) -> Option<Vec<u64>> {
        let mut value = *chain.last()?;
        // Nothing else can have come here: a value does not come back.
        while let Some(result) = self.next.get(&value) {
            value = *result;
            place.gap = 0;
            chain.push(value);
            if chain.len() > self.next.len() + self.doubtful.iter().map(Vec::len).sum::<usize>() + 1
            {
                return None;
            }
        }
        let held: BTreeSet<u64> = chain.iter().copied().collect();
        if value == self.last && self.seen.is_subset(&held) {
            return Some(chain);
        }
        if self.seen.contains(&value) {
            place.gap = 0;
        }
        let met = held.intersection(&self.seen).copied().collect();
        if place.gap == gap_max || !tried.insert((value, place.clone(), met)) {
            return None;
        }
        for (queue, ops) in self.doubtful.iter().enumerate() {
            let Some(op) = ops.get(place.used[queue]) else {
                continue;
            };
            let mut place = place.clone();
            place.used[queue] += 1;
            place.gap += 1;
            let mut chain = chain.clone();
            chain.extend(op.result(value));
            if let Some(found) = self.extend(chain, place, gap_max, tried) {
                return Some(found);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(ops: &[(WordOp, usize, Option<u64>)]) -> History {
        let mut history = History::new(100);
        for (time, (op, direction, found)) in (0..).zip(ops) {
            let number = history.post(*op, (*direction, 0), 2 * time);
            if let Some(value) = found {
                history.complete(number, 1000, *value);
            }
        }
        history
    }

    #[test]
    fn any_order_that_explains_all_is_good() {
        let ops = [
            (WordOp::Add(5), 0, Some(107)),
            (WordOp::Add(7), 1, Some(100)),
            (
                WordOp::Swap {
                    compare: 112,
                    swap: 3,
                },
                0,
                Some(112),
            ),
            (
                WordOp::Swap {
                    compare: 9,
                    swap: 4,
                },
                1,
                Some(112),
            ),
            (WordOp::Read, 2, Some(100)),
        ];
        history(&ops).check(3).unwrap();
        history(&ops).check(112).unwrap_err();
    }

    #[test]
    fn what_was_seen_tells_the_order_of_doubtful_ones() {
        for seen in [105, 107, 112] {
            let ops = [
                (WordOp::Add(5), 0, None),
                (WordOp::Add(7), 1, None),
                (WordOp::Read, 2, Some(seen)),
            ];
            history(&ops).check(112).unwrap();
        }
        let never = [(WordOp::Add(5), 0, None), (WordOp::Read, 2, Some(7))];
        history(&never).check(105).unwrap_err();
    }

    #[test]
    fn lost_and_double_executions_are_found() {
        let lost = [
            (WordOp::Add(5), 0, Some(100)),
            (WordOp::Add(7), 1, Some(100)),
        ];
        history(&lost).check(107).unwrap_err();
        let double = [(WordOp::Add(5), 0, Some(100))];
        history(&double).check(110).unwrap_err();
        let unknown = [(WordOp::Add(5), 0, Some(100)), (WordOp::Add(7), 1, None)];
        history(&unknown).check(105).unwrap();
        history(&unknown).check(112).unwrap();
        history(&unknown).check(119).unwrap_err();
    }

    #[test]
    fn time_and_queue_order_hold() {
        let on_one_queue = [
            (WordOp::Add(5), 0, Some(107)),
            (WordOp::Add(7), 0, Some(100)),
        ];
        history(&on_one_queue).check(112).unwrap_err();
        let mut in_time = History::new(100);
        let first = in_time.post(WordOp::Add(5), (0, 0), 1);
        in_time.complete(first, 2, 100);
        let stale = in_time.post(WordOp::Read, (1, 0), 3);
        in_time.complete(stale, 4, 100);
        in_time.check(105).unwrap_err();
    }
}
