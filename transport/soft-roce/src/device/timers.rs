//! When which queue pair wants to be called again.
//!
//! A queue pair moves its deadline with every packet, nearly always further away. So the heap is not
//! told: an entry that turns out to be early asks the queue pair and goes back in. Each queue pair
//! has one entry that counts (the one named in its [`TimerSlot`]); others are skipped when they
//! surface, and one is left behind only when a deadline came nearer.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::wire::Qpn;

/// The deadline under which a queue pair waits in the heap, if any.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TimerSlot(Option<u64>);

/// The deadlines of a device's queue pairs.
#[derive(Debug, Default)]
pub(crate) struct Timers(BinaryHeap<Reverse<(u64, u32)>>);

impl Timers {
    /// Makes sure that `qpn` surfaces at `deadline` or earlier.
    pub(crate) fn arm(&mut self, qpn: Qpn, slot: &mut TimerSlot, deadline: Option<u64>) {
        let Some(deadline) = deadline else { return };
        if slot.0.is_none_or(|armed| deadline < armed) {
            slot.0 = Some(deadline);
            self.0.push(Reverse((deadline, qpn.get())));
        }
    }

    /// The time before which nothing surfaces.
    pub(crate) fn next(&self) -> Option<u64> {
        self.0.peek().map(|Reverse((deadline, _))| *deadline)
    }

    /// Takes an entry that is due, with its deadline: it counts if [`TimerSlot::expire`] says so.
    pub(crate) fn pop_due(&mut self, now: u64) -> Option<(u64, Qpn)> {
        if self.next()? > now {
            return None;
        }
        let Reverse((deadline, qpn)) = self.0.pop()?;
        Some((deadline, Qpn::new(qpn)))
    }
}

impl TimerSlot {
    /// Whether the entry with `deadline` was the one that counts; it is out of the heap now.
    pub(crate) fn expire(&mut self, deadline: u64) -> bool {
        let counts = self.0 == Some(deadline);
        if counts {
            self.0 = None;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_deadline_adds_no_entry_and_a_nearer_one_surfaces_first() {
        let (mut timers, mut slot) = (Timers::default(), TimerSlot::default());
        timers.arm(Qpn::new(7), &mut slot, Some(100));
        timers.arm(Qpn::new(7), &mut slot, Some(900));
        assert_eq!(timers.0.len(), 1);
        timers.arm(Qpn::new(7), &mut slot, Some(50));
        assert_eq!(timers.next(), Some(50));
        assert_eq!(timers.pop_due(49), None);
        assert_eq!(timers.pop_due(200), Some((50, Qpn::new(7))));
        assert!(slot.expire(50));
        // The entry left behind surfaces without meaning anything.
        assert_eq!(timers.pop_due(200), Some((100, Qpn::new(7))));
        assert!(!slot.expire(100));
        assert_eq!(timers.next(), None);
    }
}
