//! Queue pairs by number.
//!
//! Numbers start at random and only go up, around the 24-bit space: packets of a queue pair's former
//! life find nothing, or nothing soon. The low bits of a number are its place, so that a lookup is
//! one comparison.

use crate::wire::Qpn;

/// Queue pairs one device holds, a power of two.
pub(crate) const QP_COUNT_MAX: u32 = 4096;
const PLACE_MASK: u32 = QP_COUNT_MAX - 1;
/// 0 and 1 are the special queue pairs of the management protocols.
const FIRST: u32 = 2;
/// The number that means multicast.
const END: u32 = 0xff_ffff;

/// A table of `T` by queue pair number.
#[derive(Debug)]
pub(crate) struct QpTable<T> {
    places: Vec<Option<Entry<T>>>,
    live: Vec<u32>,
    next: u32,
}

/// A number and what has it.
type Entry<T> = (u32, Box<T>);

impl<T> QpTable<T> {
    /// An empty table whose first number derives from `seed`.
    pub(crate) fn new(seed: u32) -> Self {
        Self {
            places: (0..QP_COUNT_MAX).map(|_| None).collect(),
            live: Vec::new(),
            next: FIRST + seed % (END - FIRST),
        }
    }

    /// Chooses a number and stores what `make` builds for it, or returns `None` if the table is full.
    pub(crate) fn insert(&mut self, make: impl FnOnce(Qpn) -> T) -> Option<Qpn> {
        if self.live.len() == self.places.len() {
            return None;
        }
        // Ends: some place is free, and consecutive numbers visit every place.
        loop {
            let number = self.next;
            self.next = if number + 1 == END { FIRST } else { number + 1 };
            let place = &mut self.places[place(number)];
            if place.is_none() {
                let qpn = Qpn::new(number);
                *place = Some((number, Box::new(make(qpn))));
                self.live.push(number);
                return Some(qpn);
            }
        }
    }

    /// Takes a queue pair out.
    pub(crate) fn remove(&mut self, qpn: Qpn) -> Option<T> {
        self.get_mut(qpn)?;
        self.live.retain(|number| *number != qpn.get());
        self.places[place(qpn.get())]
            .take()
            .map(|(_, entry)| *entry)
    }

    pub(crate) fn get_mut(&mut self, qpn: Qpn) -> Option<&mut T> {
        match &mut self.places[place(qpn.get())] {
            Some((number, entry)) if *number == qpn.get() => Some(entry),
            _ => None,
        }
    }

    /// The numbers in use, in no particular order.
    pub(crate) fn numbers(&self) -> Vec<Qpn> {
        self.live.iter().map(|number| Qpn::new(*number)).collect()
    }
}

fn place(number: u32) -> usize {
    (number & PLACE_MASK) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_not_reused_soon_and_never_special() {
        let mut table = QpTable::new(END - FIRST - 2);
        let first = table.insert(|_| 'a').expect("the table is empty");
        assert_eq!(first.get(), END - 2);
        assert_eq!(table.remove(first), Some('a'));
        assert_eq!(table.get_mut(first), None);
        let second = table.insert(|_| 'b').expect("the table is empty");
        assert_eq!(second.get(), END - 1);
        let third = table.insert(|_| 'c').expect("one place is taken");
        assert_eq!(third.get(), FIRST, "0, 1 and 0xffffff are left out");
        assert_eq!(table.get_mut(second), Some(&mut 'b'));
    }

    #[test]
    fn a_number_whose_place_holds_another_finds_nothing() {
        let mut table = QpTable::new(0);
        let qpn = table.insert(|_| ()).expect("the table is empty");
        assert!(table.get_mut(Qpn::new(qpn.get() + QP_COUNT_MAX)).is_none());
    }

    #[test]
    fn a_full_table_refuses_and_a_freed_place_serves_again() {
        let mut table = QpTable::new(12345);
        for _ in 0..QP_COUNT_MAX {
            table.insert(|_| ()).expect("not yet full");
        }
        assert!(table.insert(|_| ()).is_none());
        let qpn = table.numbers()[77];
        table.remove(qpn).expect("it is in use");
        let again = table.insert(|_| ()).expect("one place is free");
        assert_ne!(again, qpn);
    }
}
