//! The responder's memory of READs and atomics, to answer them and to answer them again.
//!
//! The last `max_dest_rd_atomic` are kept. The requester may not have more outstanding, so an older
//! one is never asked for again.

use std::collections::VecDeque;

use crate::mr_table::Key;
use crate::qp::MAX_RD_ATOMIC;
use crate::wire::Psn;

/// A READ or atomic that was executed, with what is still to be answered of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resource {
    /// PSN of its first response.
    pub(super) first: Psn,
    /// PSN after its last response.
    pub(super) end: Psn,
    pub(super) answer: Answer,
    /// Responses to send: from here ...
    pub(super) next: Psn,
    /// ... to before here; none if equal.
    pub(super) until: Psn,
    /// READ: bytes of the whole that precede the end of what is to be sent.
    pub(super) until_byte: u32,
    /// The next response starts a stream: First or Only, whatever its place.
    pub(super) is_stream_start: bool,
    /// It was asked for again. Such a stream just stops when its key no longer holds.
    pub(super) is_replay: bool,
}

/// What the responses carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The bytes at `va`, read when they are sent.
    Read { va: u64, rkey: Key, len: u32 },
    /// The value that the atomic found.
    Atomic { original: u64 },
}

impl Resource {
    /// A resource all of whose `psns` responses from `first` are to be sent.
    pub(super) fn new(first: Psn, psns: u32, answer: Answer) -> Self {
        let end = first + psns;
        let until_byte = match answer {
            Answer::Read { len, .. } => len,
            Answer::Atomic { .. } => 0,
        };
        Resource {
            first,
            end,
            answer,
            next: first,
            until: end,
            until_byte,
            is_stream_start: true,
            is_replay: false,
        }
    }

    pub(super) fn is_active(&self) -> bool {
        self.next != self.until
    }

    /// Responses from `psn` to before `until`, or byte `until_byte`, are to be sent again.
    pub(super) fn replay(&mut self, psn: Psn, until: Psn, until_byte: u32) {
        if self.is_active() && !psn.is_before(self.next) {
            return;
        }
        self.next = psn;
        self.until = until;
        self.until_byte = until_byte;
        self.is_stream_start = true;
        self.is_replay = true;
    }
}

/// The ring of resources, oldest first, in PSN order.
#[derive(Debug)]
pub(super) struct Resources {
    ring: VecDeque<Resource>,
    /// How many of the oldest are known to be answered, so that they are not asked at each turn.
    answered: usize,
}

/// All a queue pair needs to remember, whatever its `max_dest_rd_atomic`.
const _: () = assert!(size_of::<Resource>() * MAX_RD_ATOMIC as usize <= 8 << 10);

impl Resources {
    pub(super) fn new() -> Self {
        Resources {
            ring: VecDeque::with_capacity(MAX_RD_ATOMIC.into()),
            answered: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.ring.clear();
        self.answered = 0;
    }

    /// Whether one more may be kept under `limit`: the one it would displace is answered, or is being
    /// answered again, for a stray request that came just before the new one.
    pub(super) fn has_room(&self, limit: u8) -> bool {
        let is_answered = |oldest: &Resource| !oldest.is_active() || oldest.is_replay;
        self.ring.len() < limit.into() || self.ring.front().is_some_and(is_answered)
    }

    /// Keeps `resource`, forgetting the oldest beyond `limit`.
    pub(super) fn push(&mut self, resource: Resource, limit: u8) {
        while self.ring.len() >= limit.into() {
            self.ring.pop_front();
            self.answered = self.answered.saturating_sub(1);
        }
        self.ring.push_back(resource);
    }

    /// The resource that `psn` is a response of.
    pub(super) fn find(&mut self, psn: Psn) -> Option<&mut Resource> {
        let place = self
            .ring
            .iter()
            .position(|resource| !psn.is_before(resource.first) && psn.is_before(resource.end))?;
        // It may be answered again.
        self.answered = self.answered.min(place);
        self.ring.get_mut(place)
    }

    /// Where the first READ or atomic after `psn` and before `end` starts. A very old one may look as if it
    /// came after `psn`, but not before `end` too.
    pub(super) fn first_between(&self, psn: Psn, end: Psn) -> Option<Psn> {
        let mut firsts = self.ring.iter().map(|resource| resource.first);
        firsts.find(|first| first.is_after(psn) && first.is_before(end))
    }

    /// The oldest resource with responses to send.
    pub(super) fn active(&mut self) -> Option<&mut Resource> {
        let is_answered = |resource: &Resource| !resource.is_active();
        while self.ring.get(self.answered).is_some_and(is_answered) {
            self.answered += 1;
        }
        self.ring.get_mut(self.answered)
    }

    /// Nothing is to be answered any more.
    pub(super) fn deactivate(&mut self) {
        for resource in &mut self.ring {
            resource.next = resource.until;
        }
    }
}
