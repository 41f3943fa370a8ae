//! The requests of one queue that the device may still work on, and what they point to.
//!
//! Requests complete in the order posted, and a completion says that every earlier request of its queue is
//! done too: so this is a ring, released from its front up to the completed request.
//!
//! Each request has a number, which travels as the `wr_id` of verbs:
//!
//! ```text
//!   63        62 ........... 40   39 ............. 0
//!   receive?  tag of queue pair   sequence number
//! ```
//!
//! A completion is believed only if its number is outstanding in the queue, so an old one that was kept
//! releases nothing. The device never has two queue pairs of one number at once, and those that follow each
//! other have different tags.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::ah::AhInner;
use crate::mr::{LocalBuffer, SharedRegion};
use crate::mw::WindowChange;
use crate::types::WcStatus;
use crate::work::LOCAL_BUFFERS_MAX;

/// Set in the numbers of receive requests.
pub(crate) const RECEIVE_BIT: u64 = 1 << 63;

/// Where the tag begins in a request's number.
pub(crate) const TAG_SHIFT: u32 = 40;

/// What a posted request keeps from being freed.
pub(super) enum Held {
    Shared(#[expect(dead_code, reason = "held, not read")] Arc<SharedRegion>),
    Local(LocalBuffer),
    Window(WindowChange),
    Address(#[expect(dead_code, reason = "held, not read")] Arc<AhInner>),
}

struct Request {
    wr_id: u64,
    is_signaled: bool,
    held: usize,
}

/// A request given back.
pub(crate) struct Released {
    pub(crate) wr_id: u64,
    pub(crate) buffers: [Option<LocalBuffer>; LOCAL_BUFFERS_MAX],
    pub(crate) window: Option<WindowChange>,
}

/// The outstanding requests of one queue, oldest first; the last `staged` are not yet posted.
pub(super) struct Outstanding {
    requests: VecDeque<Request>,
    /// What the requests hold, in the same order, `Request::held` each.
    held: VecDeque<Held>,
    /// What requests held that vanished with a transition to RESET.
    retired: Vec<Held>,
    capacity: usize,
    staged: usize,
    signaled: usize,
    /// The number of the next request, without the receive bit.
    next: u64,
    receive_bit: u64,
}

impl Outstanding {
    /// Room for `capacity` requests that hold at most `held_max` things each; nothing is allocated later.
    pub(super) fn new(tag: u64, receive_bit: u64, capacity: usize, held_max: usize) -> Outstanding {
        Outstanding {
            requests: VecDeque::with_capacity(capacity),
            held: VecDeque::with_capacity(capacity.saturating_mul(held_max)),
            retired: Vec::new(),
            capacity,
            staged: 0,
            signaled: 0,
            next: (tag << TAG_SHIFT) & !RECEIVE_BIT,
            receive_bit,
        }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many more requests fit.
    pub(super) fn room(&self) -> usize {
        self.capacity - self.requests.len()
    }

    /// How many requests are posted and not yet released.
    pub(super) fn posted(&self) -> usize {
        self.requests.len() - self.staged
    }

    /// True if a completion is to be expected that makes room.
    pub(super) fn drains(&self) -> bool {
        self.signaled > 0
    }

    /// The number that the next request will have.
    pub(super) fn next_number(&self) -> u64 {
        self.next | self.receive_bit
    }

    /// Adds a request that holds `held`; the caller has checked that there is room. Returns its number.
    pub(super) fn stage(
        &mut self,
        wr_id: u64,
        is_signaled: bool,
        held: impl Iterator<Item = Held>,
    ) -> u64 {
        assert!(self.room() > 0, "a request is staged without room for it");
        let before = self.held.len();
        self.held.extend(held);
        let held = self.held.len() - before;
        self.requests.push_back(Request {
            wr_id,
            is_signaled,
            held,
        });
        self.staged += 1;
        self.signaled += usize::from(is_signaled);
        let number = self.next_number();
        self.next = self.next.wrapping_add(1) & !RECEIVE_BIT;
        number
    }

    /// The request staged last holds `held` too.
    pub(super) fn hold(&mut self, held: Held) {
        let request = self.requests.back_mut().expect("a request is staged");
        request.held += 1;
        self.held.push_back(held);
    }

    /// The first `accepted` staged requests were posted; the others never reached the device.
    pub(super) fn commit(&mut self, accepted: usize) {
        for _ in accepted..self.staged {
            let request = self
                .requests
                .pop_back()
                .expect("staged requests are in the ring");
            for held in self.held.drain(self.held.len() - request.held..) {
                if let Held::Window(change) = held {
                    change.undo();
                }
            }
            self.signaled -= usize::from(request.is_signaled);
            self.next = self.next.wrapping_sub(1) & !RECEIVE_BIT;
        }
        self.staged = 0;
    }

    /// Releases the request `number` and all before it, if it is posted.
    pub(super) fn release(&mut self, number: u64) -> Option<Released> {
        let age = self.next.wrapping_sub(number) & !RECEIVE_BIT;
        let back = usize::try_from(age).ok()?;
        let index = self.requests.len().checked_sub(back)?;
        if back <= self.staged {
            return None;
        }
        for _ in 0..index {
            let skipped = self.pop_front();
            for held in self.held.drain(..skipped.held) {
                // Requests that fail complete, signalled or not.
                if let Held::Window(change) = held {
                    change.finish(WcStatus::Success);
                }
            }
        }
        let request = self.pop_front();
        let mut released = Released {
            wr_id: request.wr_id,
            buffers: [const { None }; LOCAL_BUFFERS_MAX],
            window: None,
        };
        let mut places = released.buffers.iter_mut();
        for held in self.held.drain(..request.held) {
            match held {
                Held::Local(buffer) => {
                    if let Some(place) = places.next() {
                        *place = Some(buffer);
                    }
                }
                Held::Window(change) => released.window = Some(change),
                Held::Shared(_) | Held::Address(_) => {}
            }
        }
        Some(released)
    }

    fn pop_front(&mut self) -> Request {
        let request = self
            .requests
            .pop_front()
            .expect("the caller counted the requests");
        self.signaled -= usize::from(request.is_signaled);
        request
    }

    /// The posted requests vanish without completions; what they held is kept.
    pub(super) fn retire(&mut self) {
        self.commit(0);
        self.requests.clear();
        self.signaled = 0;
        for held in &self.held {
            if let Held::Window(change) = held {
                change.lose();
            }
        }
        self.retired.extend(self.held.drain(..));
    }

    /// Gives up ownership without freeing, because the device may still use it.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.held));
        std::mem::forget(std::mem::take(&mut self.retired));
        self.requests.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(capacity: usize) -> Outstanding {
        Outstanding::new(7, 0, capacity, 1)
    }

    fn post(ring: &mut Outstanding, wr_id: u64, is_signaled: bool) -> u64 {
        let number = ring.stage(wr_id, is_signaled, std::iter::empty());
        ring.commit(1);
        number
    }

    #[test]
    fn one_signalled_completion_frees_the_unsignalled_before_it() {
        let mut ring = ring(4);
        post(&mut ring, 10, false);
        post(&mut ring, 11, false);
        assert!(!ring.drains());
        let third = post(&mut ring, 12, true);
        let fourth = post(&mut ring, 13, true);
        assert_eq!((ring.room(), ring.drains()), (0, true));
        assert_eq!(ring.release(third).unwrap().wr_id, 12);
        assert_eq!(ring.room(), 3);
        assert_eq!(ring.release(fourth).unwrap().wr_id, 13);
        assert_eq!((ring.room(), ring.drains(), ring.posted()), (4, false, 0));
    }

    #[test]
    fn what_is_not_outstanding_releases_nothing() {
        let mut ring = ring(4);
        let first = post(&mut ring, 10, true);
        let second = post(&mut ring, 11, true);
        for foreign in [
            first.wrapping_sub(1),
            second + 1,
            0,
            u64::MAX,
            second ^ (1 << 50),
        ] {
            assert!(ring.release(foreign).is_none(), "{foreign:#x}");
        }
        assert!(ring.release(second).is_some());
        assert!(ring.release(first).is_none(), "released before");
        assert!(ring.release(second).is_none(), "released before");
    }

    #[test]
    fn staged_requests_are_not_released_and_may_be_taken_back() {
        let mut ring = ring(4);
        let posted = post(&mut ring, 10, true);
        let staged = ring.stage(11, true, std::iter::empty());
        assert!(ring.release(staged).is_none());
        ring.commit(0);
        assert_eq!((ring.room(), ring.posted()), (3, 1));
        let again = ring.stage(12, false, std::iter::empty());
        assert_eq!(
            again, staged,
            "numbers of requests that never were are used again"
        );
        ring.commit(1);
        assert_eq!(ring.release(posted).unwrap().wr_id, 10);
        assert_eq!(ring.release(again).unwrap().wr_id, 12);
    }

    #[test]
    fn numbers_wrap() {
        let mut ring = ring(4);
        ring.next = !RECEIVE_BIT - 1;
        let numbers: Vec<u64> = (0..4).map(|wr_id| post(&mut ring, wr_id, true)).collect();
        for (wr_id, number) in (0..).zip(numbers) {
            assert_eq!(ring.release(number).unwrap().wr_id, wr_id);
        }
    }

    #[test]
    fn retired_requests_do_not_complete() {
        let mut ring = ring(2);
        let number = post(&mut ring, 10, true);
        ring.retire();
        assert!(ring.release(number).is_none());
        assert_eq!((ring.room(), ring.drains()), (2, false));
    }

    /// What may happen to a send queue.
    #[derive(Debug, Clone)]
    enum Step {
        /// A chain of requests, signalled or not, of which the device accepts this many.
        Chain(Vec<bool>, usize),
        /// The completion of a request of this age, counted from the oldest.
        Complete(usize),
        Reset,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let chain = (proptest::collection::vec(any::<bool>(), 1..6), 0..6_usize);
        let step = prop_oneof![
            6 => chain.prop_map(|(signaled, accepted)| Step::Chain(signaled, accepted)),
            6 => (0..8_usize).prop_map(Step::Complete),
            1 => Just(Step::Reset),
        ];
        proptest::collection::vec(step, 0..80)
    }

    proptest! {
        /// Against a list of (number, wr_id, signalled), which is what the ring stands for.
        #[test]
        fn behaves_as_a_list(steps in steps(), start in 0..3_u64) {
            let mut ring = ring(8);
            ring.next = (!RECEIVE_BIT).wrapping_sub(start);
            let mut list: Vec<(u64, u64, bool)> = Vec::new();
            let mut wr_id = 0;
            for step in steps {
                match step {
                    Step::Chain(signaled, accepted) => {
                        let mut staged = Vec::new();
                        for is_signaled in signaled {
                            if ring.room() == 0 {
                                break;
                            }
                            wr_id += 1;
                            let number = ring.stage(wr_id, is_signaled, std::iter::empty());
                            prop_assert!(ring.release(number).is_none(), "staged, not posted");
                            staged.push((number, wr_id, is_signaled));
                        }
                        let accepted = accepted.min(staged.len());
                        ring.commit(accepted);
                        list.extend_from_slice(&staged[..accepted]);
                    }
                    Step::Complete(age) if age < list.len() => {
                        let (number, wr_id, _) = list[age];
                        let released = ring.release(number);
                        prop_assert_eq!(released.map(|released| released.wr_id), Some(wr_id));
                        prop_assert!(ring.release(number).is_none(), "released twice");
                        list.drain(..=age);
                    }
                    Step::Complete(_) => {}
                    Step::Reset => {
                        ring.retire();
                        list.clear();
                    }
                }
                prop_assert_eq!((ring.posted(), ring.room()), (list.len(), 8 - list.len()));
                prop_assert_eq!(ring.drains(), list.iter().any(|(_, _, signaled)| *signaled));
            }
        }
    }
}
