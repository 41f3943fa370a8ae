//! The send and receive queues: rings allocated with the queue pair.
//!
//! Positions only count up; the slot is the position modulo the capacity.
//!
//! ```text
//! head           done                tail        send queue
//!  | unreported   | outstanding, queued |
//!
//! head           next                tail        receive queue
//!  | in use, done | waiting for data    |
//! ```
//!
//! Completions are not stored: they are the requests between `head` and `done`, so each posted
//! request yields one at most, in order, and there is always room for it.

use super::{QpConfig, sge};
use crate::mr_table::{AccessError, Key, MrTable, Pd};
use crate::wire::{Psn, Qpn};
use crate::work::{
    Data, MAX_MESSAGE_LEN, PostError, RecvWr, SendFlags, SendOp, SendWr, Sge, Wc, WcOpcode,
    WcStatus,
};

const NO_SGE: Sge = Sge {
    addr: 0,
    length: 0,
    lkey: Key(0),
};

/// A send request in the ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SendWqe {
    pub(crate) wr_id: u64,
    pub(crate) op: SendOp,
    pub(crate) flags: SendFlags,
    /// Bytes of the message.
    pub(crate) len: u32,
    /// PSN of its first packet.
    pub(crate) first: Psn,
    /// PSN after its last packet (for READ, its last response).
    pub(crate) end: Psn,
    is_inline: bool,
    sge_count: usize,
}

impl SendWqe {
    /// The completion of this request of queue pair `qpn`, which is connected with `peer` if at all.
    pub(crate) fn wc(&self, status: WcStatus, qpn: Qpn, peer: Qpn) -> Wc {
        Wc {
            wr_id: self.wr_id,
            status,
            opcode: self.op.wc_opcode(),
            byte_len: self.len,
            imm: None,
            invalidated: None,
            qpn,
            src_qp: peer,
            has_grh: false,
            is_solicited: status != WcStatus::Success,
        }
    }
}

/// The send queue.
#[derive(Debug)]
pub(crate) struct SendQueue {
    ring: Box<[SendWqe]>,
    sges: Box<[Sge]>,
    inline: Box<[u8]>,
    capacity: usize,
    max_sge: usize,
    max_inline: usize,
    /// Every request is signalled, whatever it says.
    sig_all: bool,
    /// Oldest request whose completion was not taken yet.
    head: u64,
    /// Oldest request not complete.
    pub(crate) done: u64,
    /// Where the next request goes.
    pub(crate) tail: u64,
}

impl SendQueue {
    pub(crate) fn new(config: &QpConfig) -> Self {
        let (capacity, max_sge) = (config.max_send_wr, config.max_send_sge);
        let max_inline = config.max_inline;
        let slots = capacity.next_power_of_two();
        let empty = SendWqe {
            wr_id: 0,
            op: SendOp::Send { imm: None },
            flags: SendFlags::empty(),
            len: 0,
            first: Psn::new(0),
            end: Psn::new(0),
            is_inline: false,
            sge_count: 0,
        };
        SendQueue {
            ring: vec![empty; slots].into(),
            sges: vec![NO_SGE; slots * max_sge].into(),
            inline: vec![0; slots * max_inline].into(),
            capacity,
            max_sge,
            max_inline,
            sig_all: config.sq_sig_all,
            head: 0,
            done: 0,
            tail: 0,
        }
    }

    /// Forgets every request.
    pub(crate) fn clear(&mut self) {
        self.head = self.tail;
        self.done = self.tail;
    }

    /// The request at `position`, which lies between `head` and `tail`.
    pub(crate) fn wqe(&self, position: u64) -> &SendWqe {
        &self.ring[self.slot(position)]
    }

    /// Checks `wr` and takes it in; its packets get the PSNs from `first` at `mtu` bytes each.
    pub(crate) fn push(
        &mut self,
        wr: &SendWr<'_>,
        first: Psn,
        mtu: usize,
    ) -> Result<Psn, PostError> {
        let len = self.check(wr)?;
        let packets = if wr.op.is_local() {
            0
        } else {
            u32::try_from((len as usize).div_ceil(mtu).max(1)).expect("len is a u32")
        };
        let slot = self.slot(self.tail);
        let (is_inline, sge_count) = match wr.data {
            Data::Gather(sges) => {
                self.sges[slot * self.max_sge..][..sges.len()].copy_from_slice(sges);
                (false, sges.len())
            }
            Data::Inline(bytes) => {
                self.inline[slot * self.max_inline..][..bytes.len()].copy_from_slice(bytes);
                (true, 0)
            }
        };
        let end = first + packets;
        let SendWr {
            wr_id,
            op,
            mut flags,
            ..
        } = *wr;
        flags.set(
            SendFlags::SIGNALED,
            flags.contains(SendFlags::SIGNALED) || self.sig_all,
        );
        self.ring[slot] = SendWqe {
            wr_id,
            op,
            flags,
            len,
            first,
            end,
            is_inline,
            sge_count,
        };
        self.tail += 1;
        Ok(end)
    }

    /// Takes back the last `count` requests and returns the PSN that the first had.
    pub(crate) fn unpush(&mut self, count: usize) -> Psn {
        self.tail -= count as u64;
        debug_assert!(self.done <= self.tail, "none of them was begun");
        self.wqe(self.tail).first
    }

    fn check(&self, wr: &SendWr<'_>) -> Result<u32, PostError> {
        let len = match wr.data {
            Data::Gather(sges) if sges.len() > self.max_sge => {
                return Err(PostError::TooManySge {
                    count: sges.len(),
                    max: self.max_sge,
                });
            }
            Data::Inline(bytes) if bytes.len() > self.max_inline => {
                return Err(PostError::InlineTooLong {
                    len: bytes.len(),
                    max: self.max_inline,
                });
            }
            Data::Inline(_) if wr.op.is_rd_atomic() => return Err(PostError::InlineNotAllowed),
            Data::Gather(sges) => sge::total_len(sges),
            Data::Inline(bytes) => bytes.len() as u64,
        };
        if let SendOp::CompareSwap { remote, .. } | SendOp::FetchAdd { remote, .. } = wr.op
            && (len != 8 || remote.addr % 8 != 0)
        {
            return Err(PostError::BadAtomic {
                len,
                addr: remote.addr,
            });
        }
        if self.tail - self.head >= self.capacity as u64 {
            return Err(PostError::Full);
        }
        u32::try_from(len)
            .ok()
            .filter(|len| u64::from(*len) <= MAX_MESSAGE_LEN)
            .ok_or(PostError::MessageTooLong { len })
    }

    /// Fills `dst` from the bytes at `byte_offset` of the request's data.
    pub(crate) fn read(
        &self,
        position: u64,
        byte_offset: u64,
        dst: &mut [u8],
        mem: &MrTable,
        pd: Pd,
    ) -> Result<(), AccessError> {
        if self.wqe(position).is_inline {
            let start = self.slot(position) * self.max_inline
                + usize::try_from(byte_offset).expect("inline data is short");
            dst.copy_from_slice(&self.inline[start..][..dst.len()]);
            return Ok(());
        }
        sge::gather(self.sges(position), byte_offset, dst, mem, pd)
    }

    /// Places `src` at `byte_offset` of the request's buffers.
    pub(crate) fn write(
        &self,
        position: u64,
        byte_offset: u64,
        src: &[u8],
        mem: &MrTable,
        pd: Pd,
    ) -> Result<(), AccessError> {
        sge::scatter(self.sges(position), byte_offset, src, mem, pd)
    }

    /// Takes the next signalled request that is complete; unsignalled ones before it vanish.
    pub(crate) fn pop_done(&mut self) -> Option<SendWqe> {
        while self.head < self.done {
            let wqe = *self.wqe(self.head);
            self.head += 1;
            if wqe.flags.contains(SendFlags::SIGNALED) {
                return Some(wqe);
            }
        }
        None
    }

    /// Takes the oldest request, complete or not. Call after `pop_done` found nothing.
    pub(crate) fn pop_flushed(&mut self) -> Option<SendWqe> {
        debug_assert!(self.head >= self.done, "completed requests come first");
        if self.head == self.tail {
            return None;
        }
        let wqe = *self.wqe(self.head);
        self.head += 1;
        self.done = self.head;
        Some(wqe)
    }

    fn sges(&self, position: u64) -> &[Sge] {
        &self.sges[self.slot(position) * self.max_sge..][..self.wqe(position).sge_count]
    }

    fn slot(&self, position: u64) -> usize {
        slot(position, self.ring.len())
    }
}

/// How a receive request ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecvDone {
    pub(crate) status: WcStatus,
    pub(crate) opcode: WcOpcode,
    pub(crate) byte_len: u32,
    pub(crate) imm: Option<[u8; 4]>,
    pub(crate) invalidated: Option<Key>,
    /// The sender of a datagram, which is behind a GRH.
    pub(crate) datagram_from: Option<Qpn>,
    pub(crate) is_solicited: bool,
}

impl Default for RecvDone {
    /// A request that was flushed.
    fn default() -> Self {
        RecvDone {
            status: WcStatus::WrFlushErr,
            opcode: WcOpcode::Recv,
            byte_len: 0,
            imm: None,
            invalidated: None,
            datagram_from: None,
            is_solicited: false,
        }
    }
}

/// A receive request in the ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecvWqe {
    pub(crate) wr_id: u64,
    /// Bytes its buffers hold.
    pub(crate) len: u64,
    pub(crate) done: Option<RecvDone>,
    sge_count: usize,
}

impl RecvWqe {
    /// The completion of this request of queue pair `qpn`, which is connected with `peer` if at all.
    pub(crate) fn wc(&self, qpn: Qpn, peer: Qpn) -> Wc {
        let done = self.done.unwrap_or_default();
        Wc {
            wr_id: self.wr_id,
            status: done.status,
            opcode: done.opcode,
            byte_len: done.byte_len,
            imm: done.imm,
            invalidated: done.invalidated,
            qpn,
            src_qp: done.datagram_from.unwrap_or(peer),
            has_grh: done.datagram_from.is_some(),
            is_solicited: done.is_solicited || done.status != WcStatus::Success,
        }
    }
}

/// The receive queue.
#[derive(Debug)]
pub(crate) struct RecvQueue {
    ring: Box<[RecvWqe]>,
    sges: Box<[Sge]>,
    capacity: usize,
    max_sge: usize,
    /// Oldest request whose completion was not taken yet.
    head: u64,
    /// Oldest request that no message has taken.
    next: u64,
    /// Where the next request goes.
    tail: u64,
}

impl RecvQueue {
    pub(crate) fn new(capacity: usize, max_sge: usize) -> Self {
        let slots = capacity.next_power_of_two();
        let empty = RecvWqe {
            wr_id: 0,
            len: 0,
            done: None,
            sge_count: 0,
        };
        RecvQueue {
            ring: vec![empty; slots].into(),
            sges: vec![NO_SGE; slots * max_sge].into(),
            capacity,
            max_sge,
            head: 0,
            next: 0,
            tail: 0,
        }
    }

    /// Forgets every request.
    pub(crate) fn clear(&mut self) {
        self.head = self.tail;
        self.next = self.tail;
    }

    /// Checks `wr` and takes it in.
    pub(crate) fn push(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        let count = wr.sges.len();
        if count > self.max_sge {
            return Err(PostError::TooManySge {
                count,
                max: self.max_sge,
            });
        }
        if self.tail - self.head >= self.capacity as u64 {
            return Err(PostError::Full);
        }
        let slot = self.slot(self.tail);
        self.sges[slot * self.max_sge..][..count].copy_from_slice(wr.sges);
        self.ring[slot] = RecvWqe {
            wr_id: wr.wr_id,
            len: sge::total_len(wr.sges),
            done: None,
            sge_count: count,
        };
        self.tail += 1;
        Ok(())
    }

    /// Position of the request that the next message takes, if one is posted.
    pub(crate) fn peek(&self) -> Option<u64> {
        (self.next < self.tail).then_some(self.next)
    }

    /// Takes the request that [`peek`](Self::peek) showed.
    pub(crate) fn take(&mut self) {
        debug_assert!(self.next < self.tail, "the caller peeked");
        self.next += 1;
    }

    /// Bytes that the buffers of the request at `position` hold.
    pub(crate) fn capacity_of(&self, position: u64) -> u64 {
        self.ring[self.slot(position)].len
    }

    /// Places `src` at `byte_offset` of the request's buffers.
    pub(crate) fn write(
        &self,
        position: u64,
        byte_offset: u64,
        src: &[u8],
        mem: &MrTable,
        pd: Pd,
    ) -> Result<(), AccessError> {
        let slot = self.slot(position);
        let sges = &self.sges[slot * self.max_sge..][..self.ring[slot].sge_count];
        sge::scatter(sges, byte_offset, src, mem, pd)
    }

    /// Completes the request at `position`.
    pub(crate) fn complete(&mut self, position: u64, done: RecvDone) {
        let slot = self.slot(position);
        self.ring[slot].done = Some(done);
    }

    /// Takes the oldest request if it is complete.
    pub(crate) fn pop_done(&mut self) -> Option<RecvWqe> {
        if self.head == self.tail || self.ring[self.slot(self.head)].done.is_none() {
            return None;
        }
        self.pop_flushed()
    }

    /// Takes the oldest request, complete or not.
    pub(crate) fn pop_flushed(&mut self) -> Option<RecvWqe> {
        if self.head == self.tail {
            return None;
        }
        let wqe = self.ring[self.slot(self.head)];
        self.head += 1;
        self.next = self.next.max(self.head);
        Some(wqe)
    }

    fn slot(&self, position: u64) -> usize {
        slot(position, self.ring.len())
    }
}

/// Slot of `position` in a ring of `slots`, a power of two.
#[allow(
    clippy::cast_possible_truncation,
    reason = "the mask keeps the low bits only"
)]
fn slot(position: u64, slots: usize) -> usize {
    position as usize & (slots - 1)
}
