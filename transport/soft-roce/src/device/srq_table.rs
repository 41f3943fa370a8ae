//! Shared receive queues by number, and whom each reports to.

use std::sync::Arc;

use rdma_core_bindings::IBV_EVENT_SRQ_LIMIT_REACHED;

use super::events::{AckGate, ContextEvent, Element, EventQueue};
use crate::srq::{SharedReceiveQueue, SrqNumber};

/// The shared receive queues of a device.
#[derive(Debug, Default)]
pub(crate) struct SrqTable {
    /// The place is the number. Numbers are used again: they are on no wire, and a queue is destroyed
    /// after the queue pairs that know its number.
    places: Vec<Option<Box<SrqSlot>>>,
}

/// A shared receive queue and where its events go.
#[derive(Debug)]
pub(crate) struct SrqSlot {
    pub(crate) queue: SharedReceiveQueue,
    reports: SrqReports,
}

/// Where a shared receive queue's events go.
#[derive(Clone, Debug)]
pub(crate) struct SrqReports {
    pub(crate) events: Arc<EventQueue<ContextEvent>>,
    /// Asynchronous events handed out and not acknowledged.
    pub(crate) gate: Arc<AckGate>,
    /// The address by which the application knows the queue.
    pub(crate) handle: usize,
}

impl SrqTable {
    /// Takes a queue in and gives it a number.
    pub(crate) fn insert(&mut self, queue: SharedReceiveQueue, reports: SrqReports) -> SrqNumber {
        let free = self.places.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.places[place] = Some(Box::new(SrqSlot { queue, reports }));
        SrqNumber(u32::try_from(place).expect("memory is full before numbers run out"))
    }

    pub(crate) fn get_mut(&mut self, number: SrqNumber) -> Option<&mut SrqSlot> {
        self.places.get_mut(number.0 as usize)?.as_deref_mut()
    }

    /// Takes a queue out, with its unread events, and returns where it reported.
    pub(crate) fn remove(&mut self, number: SrqNumber) -> Option<SrqReports> {
        let slot = self.places.get_mut(number.0 as usize)?.take()?;
        slot.reports.events.forget(&slot.reports.gate);
        Some(slot.reports)
    }
}

impl SrqSlot {
    /// Tells by which address the application knows the queue, before it is used.
    pub(crate) fn set_handle(&mut self, handle: usize) {
        self.reports.handle = handle;
    }

    /// Hands out the event of the limit, if it was undercut.
    pub(crate) fn report(&mut self) {
        if self.queue.take_limit_event() {
            let SrqReports {
                events,
                gate,
                handle,
            } = &self.reports;
            let event = ContextEvent {
                event_type: IBV_EVENT_SRQ_LIMIT_REACHED,
                element: Element::Srq(*handle),
            };
            events.push(Some(Arc::clone(gate)), event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_finds_its_queue_until_it_is_removed() {
        let mut table = SrqTable::default();
        let reports = SrqReports {
            events: Arc::new(EventQueue::new().expect("a descriptor")),
            gate: Arc::default(),
            handle: 7,
        };
        let numbers = [1, 2, 3]
            .map(|max_wr| table.insert(SharedReceiveQueue::new(max_wr, 1), reports.clone()));
        assert!(table.remove(numbers[1]).is_some());
        assert!(table.remove(numbers[1]).is_none());
        assert!(table.get_mut(numbers[1]).is_none());
        let max_wr = |table: &mut SrqTable, number| {
            table.get_mut(number).map(|slot| slot.queue.attr().max_wr)
        };
        assert_eq!(max_wr(&mut table, numbers[2]), Some(3));
        let again = table.insert(SharedReceiveQueue::new(4, 1), reports);
        assert_eq!(again, numbers[1]);
        assert_eq!(max_wr(&mut table, again), Some(4));
        assert_eq!(max_wr(&mut table, numbers[0]), Some(1));
    }
}
