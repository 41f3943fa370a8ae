//! The requester: turns posted requests into packets, and sends them again when they are lost.
//!
//! PSNs are given out when a request is posted, so the send queue is also a map of the sequence
//! space:
//!
//! ```text
//!   una           next           max              (a READ has the PSNs of its responses)
//! ---|-------------|--------------|----------->
//!    | unanswered  | to be resent | never sent
//!          acked somewhere in una..=max: the peer has every packet before it
//! ```
//!
//! Going back is `next = una`. Answers move `una`; see [`completer`](super::completer).

use std::ops::ControlFlow;

use super::timer::{Expired, Timers};
use super::window::Window;
use super::{Context, Counters};
use crate::faults::{Fault, is_injected};
use crate::link::{Note, TxBuf};
use crate::qp::queue::{SendQueue, SendWqe};
use crate::qp::segment::{byte_offset, byte_offset_after, data_headers};
use crate::qp::{Attr, Mtu, QpConfig, QpState};
use crate::wire::{AtomicEth, Headers, Opcode, Psn, Reth};
use crate::work::{PostError, Remote, SendFlags, SendOp, SendWr, WcStatus};

/// Response packets asked for by one READ request packet.
///
/// Pieces start at multiples of this from the start of the READ, in retries too: a peer answers a
/// repeated READ only if it lies inside one that it has seen.
pub const READ_CHUNK: u32 = 16;

/// Packets after which an ACK is asked for inside a message.
const ACK_EVERY: u32 = 16;

/// The sending half of a queue pair.
#[derive(Debug)]
pub(super) struct Requester {
    pub(super) sq: SendQueue,
    pub(super) timers: Timers,
    pub(super) window: Window,
    /// PSN of the next request to be posted.
    posted: Psn,
    /// Oldest PSN that is not done.
    pub(super) una: Psn,
    /// Next PSN to send.
    pub(super) next: Psn,
    /// One after the highest PSN sent so far.
    pub(super) max: Psn,
    /// One after the highest PSN that the peer is known to have.
    pub(super) acked: Psn,
    /// Position of the request that `next` belongs to.
    pub(super) sending: u64,
    /// One after the position of the last request of which anything was sent.
    pub(super) begun: u64,
    /// READ pieces and atomics sent and not answered.
    pub(super) rd_atomic_in_flight: u32,
    /// Packets since the last one that asked for an ACK.
    unasked: u32,
    /// One after a packet whose answer is timed, and when it was sent. None that was sent twice is: its
    /// answer may be to either (Karn's rule).
    timed: Option<(Psn, u64)>,
    /// Went back, and nothing has progressed since.
    pub(super) is_recovering: bool,
    /// A request that cannot be sent, and why. It fails when all before it are done.
    pub(super) local_error: Option<(u64, WcStatus)>,
    /// Why the request at `sq.done` failed.
    failure: Option<WcStatus>,
    /// SQD: `SqDrained` is due when everything begun is done.
    is_drain_awaited: bool,
}

impl Requester {
    pub(super) fn new(config: &QpConfig) -> Self {
        let zero = Psn::new(0);
        Requester {
            sq: SendQueue::new(config),
            timers: Timers::default(),
            window: Window::new(config.window_max),
            posted: zero,
            una: zero,
            next: zero,
            max: zero,
            acked: zero,
            sending: 0,
            begun: 0,
            rd_atomic_in_flight: 0,
            unasked: 0,
            timed: None,
            is_recovering: false,
            local_error: None,
            failure: None,
            is_drain_awaited: false,
        }
    }

    /// RTR to RTS: numbering starts at `sq_psn`.
    pub(super) fn start(&mut self, attr: &Attr, config: &QpConfig) {
        self.posted = attr.sq_psn;
        self.una = attr.sq_psn;
        self.next = attr.sq_psn;
        self.max = attr.sq_psn;
        self.acked = attr.sq_psn;
        self.timers.reset(attr);
        self.window = Window::new(config.window_max);
    }

    /// To RESET: forgets everything.
    pub(super) fn reset(&mut self) {
        if !is_injected(Fault::KeepPosted) {
            self.sq.clear();
        }
        self.stop();
        self.sending = self.sq.tail;
        self.begun = self.sq.tail;
        self.rd_atomic_in_flight = 0;
        self.unasked = 0;
        self.is_recovering = false;
        self.failure = None;
    }

    /// To ERR: nothing is sent or awaited any more; what is posted is left to be flushed.
    pub(super) fn stop(&mut self) {
        self.timers = Timers::default();
        self.timed = None;
        self.local_error = None;
        self.is_drain_awaited = false;
    }

    pub(super) fn post(&mut self, wr: &SendWr<'_>, mtu: Mtu) -> Result<(), PostError> {
        self.posted = self.sq.push(wr, self.posted, mtu.bytes())?;
        Ok(())
    }

    pub(super) fn unpost(&mut self, count: usize) {
        if count > 0 {
            self.posted = self.sq.unpush(count);
        }
    }

    /// Whether a request has failed, which ends the connection.
    pub(super) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// The status of the failed request, once.
    pub(super) fn take_failure(&mut self) -> Option<WcStatus> {
        self.failure.take()
    }

    /// To SQD: only what is begun goes on.
    pub(super) fn drain(&mut self, is_event_wanted: bool) {
        self.is_drain_awaited = is_event_wanted;
    }

    pub(super) fn is_draining(&self) -> bool {
        self.sq.done < self.begun
    }

    /// Whether the awaited end of draining has come; true once.
    pub(super) fn take_drained(&mut self) -> bool {
        let is_drained = self.is_drain_awaited && !self.is_draining();
        self.is_drain_awaited &= !is_drained;
        is_drained
    }

    pub(super) fn poll_timeout(&self) -> Option<u64> {
        self.timers.next()
    }

    pub(super) fn handle_timeout(&mut self, now: u64, counters: &mut Counters) {
        match self.timers.expire(now) {
            Some(Expired::Retransmit) => {
                counters.retry_timeout += 1;
                self.window.lost();
                self.is_recovering = false;
                self.retry(counters);
            }
            // `next` is `una` already; sending resumes.
            Some(Expired::RnrWait) | None => {}
        }
    }

    /// Goes back to the oldest unanswered packet, spending a retry, unless it has just done so.
    pub(super) fn retry(&mut self, counters: &mut Counters) {
        if self.is_recovering || self.timers.is_rnr_waiting() {
            return;
        }
        if !self.timers.spend_retry() {
            counters.retry_exceeded_err += 1;
            self.fail(WcStatus::RetryExcErr);
            return;
        }
        counters.completer_retry_err += 1;
        self.is_recovering = true;
        self.go_back();
    }

    /// The oldest unanswered packet is sent next.
    pub(super) fn go_back(&mut self) {
        self.next = self.una;
        self.sending = self.sq.done;
        self.rd_atomic_in_flight = 0;
        self.timed = None;
        self.timers.stop_retransmit();
    }

    /// Learns from the timed packet, if it is answered, how long answers take.
    pub(super) fn take_time(&mut self, now: u64) {
        if let Some((_, sent_at)) = self.timed.take_if(|(psn, _)| !self.una.is_before(*psn)) {
            self.timers.answered_after(now.saturating_sub(sent_at));
        }
    }

    /// The oldest request has failed with `status`.
    pub(super) fn fail(&mut self, status: WcStatus) {
        self.failure.get_or_insert(status);
    }

    /// The request at `position` cannot go on; it fails as soon as it is the oldest.
    pub(super) fn fail_locally(&mut self, position: u64, status: WcStatus) {
        self.local_error = Some((position, status));
        self.surface_local_error();
    }

    /// Makes a local error the failure once every request before it is done.
    pub(super) fn surface_local_error(&mut self) {
        if let Some((position, status)) = self.local_error
            && position == self.sq.done
        {
            self.fail(status);
        }
    }

    /// Writes packets into `tx` until nothing may be sent; true if `tx` filled up before.
    pub(super) fn transmit(&mut self, ctx: &mut Context<'_>, tx: &mut TxBuf) -> bool {
        while self.may_go_on(ctx) {
            if tx.is_full() {
                return true;
            }
            if self.send_next(ctx, tx).is_break() {
                break;
            }
        }
        false
    }

    /// Executes what needs no packet, until there is a packet to send; false if there is none.
    fn may_go_on(&mut self, ctx: &mut Context<'_>) -> bool {
        self.skip_what_peer_has();
        self.execute_local(ctx);
        self.may_send(ctx.attr)
    }

    /// Whether there is a packet to send, window and timers permitting.
    fn may_send(&self, attr: &Attr) -> bool {
        if self.sending == self.sq.tail || self.has_failed() || self.timers.is_rnr_waiting() {
            return false;
        }
        if self.is_at_local_error() {
            return false;
        }
        let wqe = self.sq.wqe(self.sending);
        if wqe.op.is_local() {
            return false;
        }
        if self.next == wqe.first && !self.may_begin(wqe, attr) {
            return false;
        }
        if wqe.op.is_rd_atomic() && self.rd_atomic_in_flight >= attr.max_rd_atomic.into() {
            return false;
        }
        let needed = self.psns_of_next(wqe);
        let in_flight = self.in_flight();
        in_flight == 0
            || in_flight + needed <= self.window.size()
            // The window has shrunk, and no packet beyond it asks for the ACK that would open it.
            || needed == 1 && self.unasked > 0
    }

    /// Whether sending has come to a request that cannot go on.
    pub(super) fn is_at_local_error(&self) -> bool {
        self.local_error
            .is_some_and(|(position, _)| position <= self.sending)
    }

    /// Whether a request that was not begun, or is to be repeated from its start, may go out.
    pub(super) fn may_begin(&self, wqe: &SendWqe, attr: &Attr) -> bool {
        let is_held = attr.state == QpState::Sqd
            && self.sending >= self.begun
            && !is_injected(Fault::IgnoreDrain);
        let is_fenced = wqe.flags.contains(SendFlags::FENCE)
            && self.rd_atomic_in_flight > 0
            && !is_injected(Fault::IgnoreFence);
        !is_held && !is_fenced
    }

    /// PSNs between the oldest unanswered and the next packet.
    pub(super) fn in_flight(&self) -> u32 {
        self.next.distance(self.una).unsigned_abs()
    }

    /// Passes over SEND and WRITE packets that the peer is known to have.
    fn skip_what_peer_has(&mut self) {
        while self.sending < self.sq.tail && self.next.is_before(self.acked) {
            let wqe = self.sq.wqe(self.sending);
            if wqe.op.is_rd_atomic() {
                return;
            }
            let end = wqe.end;
            let reached = if end.is_after(self.acked) {
                self.acked
            } else {
                end
            };
            self.move_next(reached, end);
        }
    }

    /// How many PSNs the next packet takes: one, or all responses to a READ piece.
    fn psns_of_next(&self, wqe: &SendWqe) -> u32 {
        match wqe.op {
            SendOp::Read { .. } => chunk_end(wqe, self.next).distance(self.next).unsigned_abs(),
            _ => 1,
        }
    }

    /// Sends the packet at `next`. Breaks if it could not be built.
    fn send_next(&mut self, ctx: &mut Context<'_>, tx: &mut TxBuf) -> ControlFlow<()> {
        let position = self.sending;
        let wqe = *self.sq.wqe(position);
        let reached = self.next + self.psns_of_next(&wqe);
        let headers = self.headers(&wqe, reached, ctx.attr);
        let mtu = ctx.attr.path_mtu.bytes();
        let start = byte_offset(&wqe, self.next, mtu);
        let payload_len = if wqe.op.is_rd_atomic() {
            0
        } else {
            byte_offset_after(&wqe, reached, mtu) - start
        };
        let sq = &self.sq;
        let is_built = tx.push(ctx.attr.remote, &headers, payload_len, |payload| {
            sq.read(position, start as u64, payload, ctx.mem, ctx.pd)
                .is_ok()
        });
        if !is_built {
            self.fail_locally(position, WcStatus::LocProtErr);
            return ControlFlow::Break(());
        }
        tx.note(Note {
            qpn: ctx.qpn,
            wr_id: Some(wqe.wr_id),
            is_retry: self.next.is_before(self.max),
        });
        self.note_sent(&headers, reached, &wqe, ctx);
        ControlFlow::Continue(())
    }

    fn note_sent(&mut self, headers: &Headers, reached: Psn, wqe: &SendWqe, ctx: &mut Context<'_>) {
        ctx.counters.sent_pkts += 1;
        self.unasked = if headers.bth.ack_req {
            0
        } else {
            self.unasked + 1
        };
        let is_new = !self.next.is_before(self.max);
        if headers.bth.ack_req && is_new && self.timed.is_none() {
            self.timed = Some((self.next.next(), ctx.now));
        }
        if wqe.op.is_rd_atomic() {
            self.rd_atomic_in_flight += 1;
        }
        self.begun = self.begun.max(self.sending + 1);
        self.move_next(reached, wqe.end);
        self.timers.arm_retransmit(ctx.now, ctx.attr);
    }

    /// Moves `next` to `reached`, inside the request at `sending` or to its `end`.
    fn move_next(&mut self, reached: Psn, end: Psn) {
        self.next = reached;
        if reached.is_after(self.max) {
            self.max = reached;
        }
        if reached == end {
            self.sending += 1;
        }
    }

    /// Headers of the packet at `next`, behind which the sequence goes on at `reached`.
    fn headers(&self, wqe: &SendWqe, reached: Psn, attr: &Attr) -> Headers {
        let (opcode, remote, swap_add, compare) = match wqe.op {
            SendOp::Read { remote } => return self.read_headers(wqe, remote, reached, attr),
            SendOp::CompareSwap {
                remote,
                compare,
                swap,
            } => (Opcode::CompareSwap, remote, swap, compare),
            SendOp::FetchAdd { remote, add } => (Opcode::FetchAdd, remote, add, 0),
            _ => {
                let mut headers = data_headers(wqe, self.next, attr);
                headers.bth.ack_req = self.asks_for_ack(reached == wqe.end);
                return headers;
            }
        };
        let mut headers = Headers::new(opcode, attr.dest_qpn, self.next);
        headers.atomic_eth = Some(AtomicEth {
            va: remote.addr,
            rkey: remote.rkey.0,
            swap_add,
            compare,
        });
        headers.bth.ack_req = true;
        headers
    }

    /// Whether a SEND or WRITE packet asks for an ACK.
    fn asks_for_ack(&self, is_last: bool) -> bool {
        let closes_window = self.in_flight() + 1 >= self.window.size();
        is_last || closes_window || self.unasked + 1 >= ACK_EVERY
    }

    /// A READ of the bytes that the responses from `next` to before `reached` carry.
    fn read_headers(&self, wqe: &SendWqe, remote: Remote, reached: Psn, attr: &Attr) -> Headers {
        let mtu = attr.path_mtu.bytes();
        let start = byte_offset(wqe, self.next, mtu);
        let len = byte_offset_after(wqe, reached, mtu) - start;
        let mut headers = Headers::new(Opcode::ReadRequest, attr.dest_qpn, self.next);
        headers.reth = Some(Reth {
            va: remote.addr.wrapping_add(start as u64),
            rkey: remote.rkey.0,
            dma_len: u32::try_from(len).expect("a piece is shorter than its message"),
        });
        headers.bth.ack_req = true;
        headers
    }
}

/// PSN after the READ piece that `psn` belongs to.
pub(super) fn chunk_end(wqe: &SendWqe, psn: Psn) -> Psn {
    let index = psn.distance(wqe.first).unsigned_abs();
    let end = wqe.first + (index / READ_CHUNK + 1) * READ_CHUNK;
    if end.is_after(wqe.end) { wqe.end } else { end }
}
