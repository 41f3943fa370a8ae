//! The requester's ears: what ACKs, NAKs and responses do to outstanding requests.
//!
//! An answer at PSN p says that the peer has every packet before p, and p itself unless it is a NAK.
//! SENDs and WRITEs are done by that alone; READs and atomics only by their own responses, in order.
//! An answer beyond a READ or atomic whose response is missing is an *implied NAK*.

use super::Context;
use super::requester::{Requester, chunk_end};
use crate::faults::{Fault, is_injected};
use crate::qp::queue::SendWqe;
use crate::qp::segment::{byte_offset, byte_offset_after};
use crate::wire::{NakCode, Operation, Packet, Psn, Syndrome};
use crate::work::{SendOp, WcStatus};

impl Requester {
    /// Takes in an ACK, NAK, READ response or atomic acknowledge.
    pub(super) fn handle_response(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) {
        let headers = &packet.headers;
        let psn = headers.bth.psn;
        // Old news, and answers to what was never sent ("ghost ACKs"), mean nothing.
        if precedes(psn, self.una) || !precedes(psn, self.max) || self.has_failed() {
            ctx.counters.dropped_pkts += 1;
            return;
        }
        let syndrome = headers.aeth.map(|aeth| aeth.syndrome);
        match (headers.bth.opcode.info().operation, syndrome) {
            (Operation::Acknowledge, Some(Syndrome::Ack { .. })) => self.handle_ack(ctx, psn),
            (Operation::Acknowledge, Some(Syndrome::Rnr { timer })) => {
                self.handle_rnr(ctx, psn, timer);
            }
            (Operation::Acknowledge, Some(Syndrome::Nak(NakCode::PsnSequence))) => {
                self.handle_sequence_nak(ctx, psn);
            }
            (Operation::Acknowledge, Some(Syndrome::Nak(code))) => {
                self.handle_fatal_nak(ctx, psn, code);
            }
            (Operation::ReadResponse, None | Some(Syndrome::Ack { .. }))
            | (Operation::AtomicAcknowledge, Some(Syndrome::Ack { .. })) => {
                self.handle_data(ctx, psn, packet);
            }
            _ => ctx.counters.dropped_pkts += 1,
        }
    }

    fn handle_ack(&mut self, ctx: &mut Context<'_>, psn: Psn) {
        self.acknowledge_before(ctx, psn.next());
        if self.una.is_before(self.acked) {
            self.lose(ctx);
        }
    }

    fn handle_rnr(&mut self, ctx: &mut Context<'_>, psn: Psn, timer: u8) {
        ctx.counters.rcvd_rnr_err += 1;
        self.acknowledge_before(ctx, psn);
        if self.una != psn {
            return self.lose(ctx);
        }
        if self.timers.is_rnr_waiting() {
            return;
        }
        if self.timers.start_rnr_wait(ctx.now, timer, ctx.attr) {
            self.go_back();
        } else {
            ctx.counters.retry_rnr_exceeded_err += 1;
            self.fail(WcStatus::RnrRetryExcErr);
        }
    }

    fn handle_sequence_nak(&mut self, ctx: &mut Context<'_>, psn: Psn) {
        ctx.counters.rcvd_seq_err += 1;
        self.acknowledge_before(ctx, psn);
        self.lose(ctx);
    }

    /// The peer refused the packet at `psn` and is in ERR now.
    fn handle_fatal_nak(&mut self, ctx: &mut Context<'_>, psn: Psn, code: NakCode) {
        self.acknowledge_before(ctx, psn);
        if self.una != psn {
            return self.lose(ctx);
        }
        self.fail(match code {
            NakCode::InvalidRequest => WcStatus::RemInvReqErr,
            NakCode::RemoteAccess => WcStatus::RemAccessErr,
            _ => WcStatus::RemOpErr,
        });
    }

    /// A READ response, or the answer to an atomic.
    fn handle_data(&mut self, ctx: &mut Context<'_>, psn: Psn, packet: &Packet<'_>) {
        self.acknowledge_before(ctx, psn);
        if self.una != psn {
            return self.lose(ctx);
        }
        let wqe = *self.sq.wqe(self.sq.done);
        let delivered = match (wqe.op, packet.headers.atomic_ack) {
            (SendOp::Read { .. }, None) => self.deliver_read(ctx, &wqe, packet),
            (SendOp::CompareSwap { .. } | SendOp::FetchAdd { .. }, Some(value)) => {
                #[allow(clippy::host_endian_bytes, reason = "words in memory have host order")]
                let bytes = value.to_ne_bytes();
                self.deliver(ctx, 0, &bytes)
            }
            _ => Err(WcStatus::BadRespErr),
        };
        match delivered {
            Ok(()) => self.finish_response(ctx, &wqe, psn),
            Err(status) => self.fail(status),
        }
    }

    /// Places the part of a READ that `packet` carries.
    ///
    /// The place in the stream follows from the PSN alone. First, Middle, Last and Only are not held
    /// against it beyond the end of the piece: rxe resumes a repeated READ with Middle or Last.
    fn deliver_read(
        &self,
        ctx: &Context<'_>,
        wqe: &SendWqe,
        packet: &Packet<'_>,
    ) -> Result<(), WcStatus> {
        let psn = packet.headers.bth.psn;
        let mtu = ctx.attr.path_mtu.bytes();
        let start = byte_offset(wqe, psn, mtu);
        let is_end = psn.next() == chunk_end(wqe, psn);
        let is_last = packet.headers.bth.opcode.info().is_last;
        let expected = byte_offset_after(wqe, psn.next(), mtu) - start;
        if packet.payload.len() != expected || is_last != is_end || !packet.is_padded_right() {
            return Err(WcStatus::LocLenErr);
        }
        self.deliver(ctx, start, packet.payload)
    }

    fn deliver(&self, ctx: &Context<'_>, byte_offset: usize, bytes: &[u8]) -> Result<(), WcStatus> {
        self.sq
            .write(self.sq.done, byte_offset as u64, bytes, ctx.mem, ctx.pd)
            .map_err(|_| WcStatus::LocProtErr)
    }

    /// The response at `psn`, the oldest awaited, is placed.
    fn finish_response(&mut self, ctx: &mut Context<'_>, wqe: &SendWqe, psn: Psn) {
        let reached = psn.next();
        let is_piece_done = wqe.op.is_atomic() || reached == chunk_end(wqe, psn);
        if is_piece_done && psn.is_before(self.next) {
            self.rd_atomic_in_flight = self.rd_atomic_in_flight.saturating_sub(1);
        }
        let in_flight = self.in_flight();
        self.una = reached;
        if reached == wqe.end {
            self.finish_oldest();
        }
        self.progressed(ctx, 1, in_flight);
        self.acknowledge_before(ctx, reached);
    }

    /// The peer has every packet before `psn`: completes SENDs and WRITEs as far as READs allow.
    fn acknowledge_before(&mut self, ctx: &mut Context<'_>, psn: Psn) {
        if psn.is_after(self.acked) {
            self.acked = psn;
        }
        let before = self.una;
        let in_flight = self.in_flight();
        while self.una.is_before(self.acked) && self.sq.done < self.sq.tail {
            let wqe = self.sq.wqe(self.sq.done);
            if wqe.op.is_rd_atomic() {
                break;
            }
            if wqe.end.is_after(self.acked) {
                self.una = self.acked;
                break;
            }
            self.una = wqe.end;
            self.finish_oldest();
        }
        let packets = self.una.distance(before).unsigned_abs();
        if packets > 0 {
            self.progressed(ctx, packets, in_flight);
        }
    }

    /// `packets` more are done: retries are reloaded, the window may grow, the timer starts afresh.
    fn progressed(&mut self, ctx: &mut Context<'_>, packets: u32, in_flight: u32) {
        if self.next.is_before(self.una) {
            self.next = self.una;
            self.sending = self.sq.done;
        }
        self.is_recovering = false;
        self.take_time(ctx.now);
        self.window.acknowledged(packets, in_flight);
        self.timers.reload(ctx.attr);
        if self.next == self.una {
            self.timers.stop_retransmit();
        } else {
            self.timers.restart_retransmit(ctx.now, ctx.attr);
        }
        self.surface_local_error();
    }

    /// Something before the latest answer was lost: goes back, once until there is progress.
    fn lose(&mut self, ctx: &mut Context<'_>) {
        if !self.is_recovering && !self.timers.is_rnr_waiting() {
            self.window.lost();
        }
        self.retry(ctx.counters);
    }
}

fn precedes(psn: Psn, other: Psn) -> bool {
    if is_injected(Fault::PlainPsnOrder) {
        return psn.get() < other.get();
    }
    psn.is_before(other)
}
