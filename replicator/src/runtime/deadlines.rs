//! Which of many partitions is due first.

use std::collections::BTreeSet;

/// One deadline, or none, for each partition. Asking for the first costs the same however many there are.
#[derive(Debug)]
pub(super) struct Deadlines<T> {
    queue: BTreeSet<(T, usize)>,
    of_partition: Vec<Option<T>>,
}

impl<T: Ord + Copy> Deadlines<T> {
    pub(super) fn new(partitions_count: usize) -> Self {
        Self {
            queue: BTreeSet::new(),
            of_partition: vec![None; partitions_count],
        }
    }

    /// Sets, moves or takes away the deadline of a partition.
    pub(super) fn set(&mut self, partition: usize, due: Option<T>) {
        let before = std::mem::replace(&mut self.of_partition[partition], due);
        if before == due {
            return;
        }
        if let Some(before) = before {
            self.queue.remove(&(before, partition));
        }
        self.queue.extend(due.map(|due| (due, partition)));
    }

    /// The first deadline of all.
    pub(super) fn first(&self) -> Option<T> {
        self.queue.first().map(|(due, _)| *due)
    }

    /// Takes the deadline away that is first, if it has come; returns whose it was.
    pub(super) fn pop(&mut self, now: T) -> Option<usize> {
        let (due, partition) = *self.queue.first()?;
        if due > now {
            return None;
        }
        self.set(partition, None);
        Some(partition)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_come_in_order_and_can_be_moved() {
        let mut deadlines = Deadlines::new(4);
        assert_eq!(deadlines.first(), None);
        deadlines.set(0, Some(30));
        deadlines.set(1, Some(20));
        deadlines.set(2, Some(20));
        deadlines.set(3, Some(10));
        deadlines.set(3, Some(40));
        deadlines.set(2, None);
        assert_eq!(deadlines.first(), Some(20));
        assert_eq!(deadlines.pop(19), None);
        assert_eq!(deadlines.pop(30), Some(1));
        assert_eq!(deadlines.pop(30), Some(0));
        assert_eq!(deadlines.pop(30), None);
        assert_eq!(deadlines.first(), Some(40));
    }
}
