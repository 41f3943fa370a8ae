//! Shared receive queues: receive requests that several queue pairs take from.
//!
//! Stated as absences: this module knows no queue pair and no protocol. Whoever receives a message
//! looks at the oldest request ([`peek`](SharedReceiveQueue::peek)), copies it to where it keeps the
//! message in progress, and takes it out ([`take`](SharedReceiveQueue::take)). From then on the
//! request is that receiver's, to complete or to flush; what is still in the queue belongs to nobody.
//!
//! ```text
//!            head               tail
//!   taken     | waiting, in order |      requests, oldest first
//! ```
//!
//! Nothing is allocated after [`SharedReceiveQueue::new`] but by [`modify`](SharedReceiveQueue::modify).

use bitflags::bitflags;
use thiserror::Error;

use crate::faults::{Fault, is_injected};
use crate::mr_table::{Key, Pd};
use crate::work::{PostError, RecvWr, Sge};

/// A device's number for a shared receive queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SrqNumber(pub u32);

/// The shared receive queue that a queue pair takes its receive requests from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SrqRef {
    /// Which one.
    pub number: SrqNumber,
    /// Its protection domain, in which the buffers of its requests are looked up.
    pub pd: Pd,
}

/// Sizes and limit, as `ibv_query_srq` reports them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SrqAttr {
    /// Requests that may wait.
    pub max_wr: usize,
    /// Pieces per request.
    pub max_sge: usize,
    /// When fewer requests than this wait, an event is raised; 0 is never.
    pub limit: usize,
}

bitflags! {
    /// Which attributes a `modify` carries, numbered as `ibv_srq_attr_mask`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct SrqAttrMask: u32 {
        /// `max_wr`.
        const MAX_WR = 1;
        /// `limit`.
        const LIMIT = 2;
        /// Every other bit is refused.
        const _ = !0;
    }
}

/// Why a `modify` was refused (`EINVAL`); the queue is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SrqModifyError {
    /// There are no such attributes.
    #[error("a shared receive queue has no attributes {0:?}")]
    UnknownAttributes(SrqAttrMask),
    /// More requests wait than would fit.
    #[error("{waiting} requests wait, and {max_wr} would fit")]
    TooSmall {
        /// Requests that wait.
        waiting: usize,
        /// The size asked for.
        max_wr: usize,
    },
    /// The limit would always be undercut.
    #[error("a limit of {limit} where {max_wr} requests fit")]
    LimitTooHigh {
        /// The limit.
        limit: usize,
        /// The size.
        max_wr: usize,
    },
}

/// A request that waits.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    wr_id: u64,
    sge_count: usize,
}

/// A queue of receive requests that belong to whoever needs one first.
#[derive(Debug)]
pub struct SharedReceiveQueue {
    ring: Box<[Waiting]>,
    sges: Box<[Sge]>,
    attr: SrqAttr,
    /// Position of the oldest request; the slot is the position modulo the ring's length.
    head: u64,
    /// Where the next request goes.
    tail: u64,
    is_limit_reached: bool,
}

impl SharedReceiveQueue {
    /// An empty queue for `max_wr` requests of `max_sge` pieces, without a limit.
    #[must_use]
    pub fn new(max_wr: usize, max_sge: usize) -> Self {
        let (ring, sges) = allocate(max_wr, max_sge);
        SharedReceiveQueue {
            ring,
            sges,
            attr: SrqAttr {
                max_wr,
                max_sge,
                limit: 0,
            },
            head: 0,
            tail: 0,
            is_limit_reached: false,
        }
    }

    /// Its sizes, and its limit if the event of the last arming was not raised yet.
    #[must_use]
    pub fn attr(&self) -> &SrqAttr {
        &self.attr
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        usize::try_from(self.tail - self.head).expect("at most max_wr")
    }

    /// Queues a receive request.
    ///
    /// # Errors
    ///
    /// [`PostError::Full`] or [`PostError::TooManySge`].
    pub fn post(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        let (count, max) = (wr.sges.len(), self.attr.max_sge);
        if count > max {
            return Err(PostError::TooManySge { count, max });
        }
        if self.waiting() >= self.attr.max_wr {
            return Err(PostError::Full);
        }
        let slot = self.slot(self.tail);
        self.sges[slot * max..][..count].copy_from_slice(wr.sges);
        self.ring[slot] = Waiting {
            wr_id: wr.wr_id,
            sge_count: count,
        };
        self.tail += 1;
        Ok(())
    }

    /// The oldest request.
    #[must_use]
    pub fn peek(&self) -> Option<RecvWr<'_>> {
        (self.head < self.tail).then(|| self.request(self.head))
    }

    /// Takes out the request that [`peek`](Self::peek) showed; it must have shown one.
    ///
    /// If fewer than the limit are left, there is an [event](Self::take_limit_event), and the limit
    /// is 0 until it is set again.
    pub fn take(&mut self) {
        assert!(self.head < self.tail, "taken from an empty queue");
        self.head += u64::from(!is_injected(Fault::ShareTwice));
        if self.waiting() < self.attr.limit {
            self.attr.limit = 0;
            self.is_limit_reached = true;
        }
    }

    /// Whether the limit was undercut (`IBV_EVENT_SRQ_LIMIT_REACHED`); once for each time it was set.
    pub fn take_limit_event(&mut self) -> bool {
        std::mem::take(&mut self.is_limit_reached)
    }

    /// Changes the size, sets the limit, or both, as `ibv_modify_srq` does. Requests stay.
    ///
    /// # Errors
    ///
    /// [`SrqModifyError`]; nothing has changed then.
    pub fn modify(&mut self, attr: &SrqAttr, mask: SrqAttrMask) -> Result<(), SrqModifyError> {
        let unknown = mask.difference(SrqAttrMask::MAX_WR | SrqAttrMask::LIMIT);
        if !unknown.is_empty() {
            return Err(SrqModifyError::UnknownAttributes(unknown));
        }
        let mut wanted = self.attr;
        if mask.contains(SrqAttrMask::MAX_WR) {
            wanted.max_wr = attr.max_wr;
        }
        if mask.contains(SrqAttrMask::LIMIT) {
            wanted.limit = attr.limit;
        }
        let SrqAttr { max_wr, limit, .. } = wanted;
        let waiting = self.waiting();
        if waiting > max_wr {
            return Err(SrqModifyError::TooSmall { waiting, max_wr });
        }
        if limit > max_wr {
            return Err(SrqModifyError::LimitTooHigh { limit, max_wr });
        }
        if max_wr != self.attr.max_wr {
            self.resize(max_wr);
        }
        self.attr = wanted;
        Ok(())
    }

    /// Moves the requests to the front of a ring of another size, where they fit.
    fn resize(&mut self, max_wr: usize) {
        let mut larger = SharedReceiveQueue::new(max_wr, self.attr.max_sge);
        for position in self.head..self.tail {
            larger
                .post(&self.request(position))
                .expect("the caller counted the requests");
        }
        larger.is_limit_reached = self.is_limit_reached;
        *self = larger;
    }

    fn request(&self, position: u64) -> RecvWr<'_> {
        let slot = self.slot(position);
        let Waiting { wr_id, sge_count } = self.ring[slot];
        let sges = &self.sges[slot * self.attr.max_sge..][..sge_count];
        RecvWr { wr_id, sges }
    }

    #[allow(
        clippy::cast_possible_truncation,
        reason = "the mask keeps the low bits only"
    )]
    fn slot(&self, position: u64) -> usize {
        position as usize & (self.ring.len() - 1)
    }
}

/// A ring of at least `max_wr` slots, a power of two, and room for the pieces of each.
fn allocate(max_wr: usize, max_sge: usize) -> (Box<[Waiting]>, Box<[Sge]>) {
    let slots = max_wr.next_power_of_two();
    let empty = Waiting {
        wr_id: 0,
        sge_count: 0,
    };
    let no_sge = Sge {
        addr: 0,
        length: 0,
        lkey: Key(0),
    };
    (
        vec![empty; slots].into(),
        vec![no_sge; slots * max_sge].into(),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn sges(count: u32) -> Vec<Sge> {
        let sge = |length| Sge {
            addr: 0x1000 * u64::from(length),
            length,
            lkey: Key(9),
        };
        (0..count).map(sge).collect()
    }

    fn post(queue: &mut SharedReceiveQueue, wr_id: u64) -> Result<(), PostError> {
        queue.post(&RecvWr { wr_id, sges: &[] })
    }

    fn take(queue: &mut SharedReceiveQueue) -> u64 {
        let wr_id = queue.peek().unwrap().wr_id;
        queue.take();
        wr_id
    }

    fn set_limit(queue: &mut SharedReceiveQueue, limit: usize) -> Result<(), SrqModifyError> {
        let attr = SrqAttr {
            limit,
            ..*queue.attr()
        };
        queue.modify(&attr, SrqAttrMask::LIMIT)
    }

    fn resize(queue: &mut SharedReceiveQueue, max_wr: usize) -> Result<(), SrqModifyError> {
        let attr = SrqAttr {
            max_wr,
            ..*queue.attr()
        };
        queue.modify(&attr, SrqAttrMask::MAX_WR)
    }

    #[test]
    fn what_is_too_much_is_refused() {
        let mut queue = SharedReceiveQueue::new(3, 2);
        let refused = queue.post(&RecvWr {
            wr_id: 1,
            sges: &sges(3),
        });
        assert_eq!(refused, Err(PostError::TooManySge { count: 3, max: 2 }));
        for wr_id in 0..3 {
            post(&mut queue, wr_id).unwrap();
        }
        assert_eq!(
            post(&mut queue, 3),
            Err(PostError::Full),
            "3, not the 4 of the ring"
        );
        assert_eq!(take(&mut queue), 0);
        post(&mut queue, 3).unwrap();
    }

    #[test]
    fn one_event_for_each_arming() {
        let mut queue = SharedReceiveQueue::new(8, 1);
        for wr_id in 0..6 {
            post(&mut queue, wr_id).unwrap();
        }
        set_limit(&mut queue, 5).unwrap();
        take(&mut queue);
        assert!(!queue.take_limit_event(), "5 are left");
        assert_eq!(queue.attr().limit, 5);
        take(&mut queue);
        assert_eq!(queue.attr().limit, 0, "disarmed");
        assert!(queue.take_limit_event());
        assert!(!queue.take_limit_event(), "once");
        take(&mut queue);
        assert!(!queue.take_limit_event(), "not armed again");
        set_limit(&mut queue, 8).unwrap();
        assert!(!queue.take_limit_event(), "nothing was taken yet");
        take(&mut queue);
        assert!(queue.take_limit_event());
        set_limit(&mut queue, 2).unwrap();
        set_limit(&mut queue, 0).unwrap();
        take(&mut queue);
        assert!(!queue.take_limit_event(), "disarmed by a limit of 0");
    }

    #[test]
    fn a_modification_happens_whole_or_not_at_all() {
        let mut queue = SharedReceiveQueue::new(4, 1);
        for wr_id in 0..3 {
            post(&mut queue, wr_id).unwrap();
        }
        assert!(set_limit(&mut queue, 5).is_err());
        assert!(resize(&mut queue, 2).is_err(), "3 wait");
        set_limit(&mut queue, 4).unwrap();
        assert!(resize(&mut queue, 3).is_err(), "below the limit");
        let both = SrqAttrMask::MAX_WR | SrqAttrMask::LIMIT;
        let wanted = SrqAttr {
            max_wr: 9,
            max_sge: 0,
            limit: 10,
        };
        assert!(queue.modify(&wanted, both).is_err());
        let old = SrqAttr {
            max_wr: 4,
            max_sge: 1,
            limit: 4,
        };
        assert_eq!(*queue.attr(), old);
        let unknown = SrqAttrMask::from_bits_retain(4);
        assert_eq!(
            queue.modify(&wanted, unknown),
            Err(SrqModifyError::UnknownAttributes(unknown))
        );
        let wanted = SrqAttr { limit: 9, ..wanted };
        queue.modify(&wanted, both).unwrap();
        assert_eq!((queue.attr().max_wr, queue.attr().max_sge), (9, 1));
        assert_eq!(
            (0..3).map(|_| take(&mut queue)).collect::<Vec<_>>(),
            [0, 1, 2]
        );
    }

    #[derive(Debug, Clone)]
    enum Step {
        Post(u32),
        Take,
        Resize(usize),
        Limit(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..4_u32).prop_map(Step::Post),
            3 => Just(Step::Take),
            1 => (1..12_usize).prop_map(Step::Resize),
            1 => (0..12_usize).prop_map(Step::Limit),
        ];
        proptest::collection::vec(step, 0..120)
    }

    proptest! {
        /// Against a list of (wr_id, pieces), which is what the queue stands for.
        #[test]
        fn behaves_as_a_list(steps in steps()) {
            let mut queue = SharedReceiveQueue::new(5, 3);
            let mut list = VecDeque::new();
            let (mut max_wr, mut limit) = (5, 0);
            for (wr_id, step) in (0..).zip(steps) {
                match step {
                    Step::Post(count) => {
                        let sges = sges(count);
                        let result = queue.post(&RecvWr { wr_id, sges: &sges });
                        let fits = count <= 3 && list.len() < max_wr;
                        prop_assert_eq!(result.is_ok(), fits);
                        if fits {
                            list.push_back((wr_id, sges));
                        }
                    }
                    Step::Take => {
                        let shown = queue.peek().map(|wr| (wr.wr_id, wr.sges.to_vec()));
                        prop_assert_eq!(&shown, &list.pop_front());
                        if shown.is_some() {
                            queue.take();
                            let is_reached = list.len() < limit;
                            prop_assert_eq!(queue.take_limit_event(), is_reached);
                            if is_reached {
                                limit = 0;
                            }
                        }
                    }
                    Step::Resize(wanted) => {
                        let fits = wanted >= list.len() && wanted >= limit;
                        prop_assert_eq!(resize(&mut queue, wanted).is_ok(), fits);
                        if fits {
                            max_wr = wanted;
                        }
                    }
                    Step::Limit(wanted) => {
                        let fits = wanted <= max_wr;
                        prop_assert_eq!(set_limit(&mut queue, wanted).is_ok(), fits);
                        if fits {
                            limit = wanted;
                        }
                    }
                }
                prop_assert_eq!(queue.waiting(), list.len());
                prop_assert_eq!((queue.attr().max_wr, queue.attr().limit), (max_wr, limit));
            }
        }
    }
}
