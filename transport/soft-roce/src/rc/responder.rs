//! The responder: judges the peer's requests step by step, executes them, and answers.
//!
//! ```text
//! PSN ------> CheckOpSeq -> CheckOpValid -> CheckResource -> CheckLength -> CheckRkey -> Execute
//!    |  \_ duplicate                                                                        |
//!    '- out of sequence: NAK 60                                                       Acknowledge
//! ```
//!
//! Each step is a function that lets the request pass or gives the [`Refusal`]; `refuse` alone
//! knows what each refusal means on the wire, for the receive request and for the queue pair.
//! Duplicates and everything that is sent are in [`answers`](super::answers).

use super::Context;
use super::resources::{Answer, Resource, Resources};
use crate::faults::{Fault, is_injected};
use crate::mr_table::{AccessFlags, Key};
use crate::qp::inbound::{Inbound, Refusal, check_rkey};
use crate::qp::{Attr, QpConfig};
use crate::wire::{NakCode, Opcode, Operation, Packet, Psn, Reth, Syndrome};
use crate::work::{AsyncEvent, WcStatus};

/// An ACK or NAK that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// Everything before the expected PSN is done.
    Ack,
    /// Everything up to this PSN is done, as was said before.
    AckAgain(Psn),
    /// The packet at this PSN is refused.
    Nak(Psn, Syndrome),
}

/// Request packets whose ACK may wait: few enough that the requester's window stays open.
pub(super) const HELD_PACKETS_MAX: u32 = 4;

/// The answering half of a queue pair.
#[derive(Debug)]
pub(super) struct Responder {
    pub(super) inbound: Inbound,
    /// PSN expected next.
    pub(super) expected: Psn,
    /// Messages completed, modulo 2^24.
    pub(super) msn: u32,
    pub(super) resources: Resources,
    pub(super) reply: Option<Reply>,
    /// A plain ACK that is due was kept back once.
    pub(super) is_ack_held: bool,
    /// Request packets executed since the last answer, which stands for all before it.
    pub(super) unanswered: u32,
    /// The gap at `expected` was reported; say nothing until it closes.
    is_nak_sent: bool,
    /// A gap has closed since the last answer: an ACK is due even if a NAK is too.
    pub(super) has_closed_gap: bool,
    /// A request was refused for good, perhaps with an event to raise.
    failure: Option<Option<AsyncEvent>>,
}

impl Responder {
    pub(super) fn new(config: &QpConfig) -> Self {
        Responder {
            inbound: Inbound::new(config),
            expected: Psn::new(0),
            msn: 0,
            resources: Resources::new(),
            reply: None,
            is_ack_held: false,
            unanswered: 0,
            is_nak_sent: false,
            has_closed_gap: false,
            failure: None,
        }
    }

    /// INIT to RTR: the peer's numbering starts at `rq_psn`.
    pub(super) fn start(&mut self, attr: &Attr) {
        self.expected = attr.rq_psn;
    }

    /// To RESET: forgets everything.
    pub(super) fn reset(&mut self) {
        self.inbound.rq.clear();
        self.stop();
        self.msn = 0;
        self.resources.clear();
        self.is_nak_sent = false;
        self.failure = None;
    }

    /// To ERR: answers nothing more. The message in progress is left to be flushed.
    pub(super) fn stop(&mut self) {
        self.inbound.abandon();
        self.resources.deactivate();
        self.drop_reply();
    }

    /// Answers nothing at this point: something else does, or nobody is to hear it.
    pub(super) fn drop_reply(&mut self) {
        self.reply = None;
        self.is_ack_held = false;
        self.unanswered = 0;
        self.has_closed_gap = false;
    }

    /// Whether a request was refused for good, and the event that goes with it; once.
    pub(super) fn take_failure(&mut self) -> Option<Option<AsyncEvent>> {
        self.failure.take()
    }

    /// Takes in a request packet.
    pub(super) fn handle_request(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) {
        let psn = packet.headers.bth.psn;
        if psn.is_before(self.expected) {
            if injects_repetition(packet) {
                let _ = self.execute(ctx, packet);
            }
            return self.repeat(ctx, packet);
        }
        if psn != self.expected {
            return self.report_gap(ctx);
        }
        if matches!(self.reply, Some(Reply::Nak(..))) {
            self.reply = Some(Reply::Ack);
        }
        if let Err(refusal) = self.judge_and_execute(ctx, packet) {
            self.refuse(ctx, psn, refusal);
        }
    }

    /// A packet lies behind the expected one.
    fn report_gap(&mut self, ctx: &mut Context<'_>) {
        ctx.counters.out_of_seq_request += 1;
        if !std::mem::replace(&mut self.is_nak_sent, true) {
            let syndrome = Syndrome::Nak(NakCode::PsnSequence);
            self.reply = Some(Reply::Nak(self.expected, syndrome));
        }
    }

    fn judge_and_execute(
        &mut self,
        ctx: &mut Context<'_>,
        packet: &Packet<'_>,
    ) -> Result<(), Refusal> {
        self.inbound.check_op_seq(packet)?;
        check_op_valid(packet, ctx.attr)?;
        self.check_resource(ctx, packet)?;
        self.inbound.check_length(packet, ctx.attr)?;
        check_rkey(packet, ctx.mem, (ctx.pd, ctx.qpn))?;
        self.execute(ctx, packet)?;
        self.acknowledge(ctx, packet);
        Ok(())
    }

    /// READs and atomics need a place to be remembered, some others a receive request.
    fn check_resource(
        &mut self,
        ctx: &mut Context<'_>,
        packet: &Packet<'_>,
    ) -> Result<(), Refusal> {
        let info = packet.headers.bth.opcode.info();
        let is_rd_atomic = matches!(info.operation, Operation::Read | Operation::Atomic);
        if is_rd_atomic && !self.resources.has_room(ctx.attr.max_dest_rd_atomic) {
            return Err(Refusal::Invalid);
        }
        self.inbound.check_receive(ctx.srq.as_deref_mut(), packet)
    }

    fn execute(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) -> Result<(), Refusal> {
        match packet.headers.bth.opcode.info().operation {
            Operation::Send => self
                .inbound
                .execute_send(packet, ctx.mem, (ctx.pd, ctx.qpn)),
            Operation::Write => self
                .inbound
                .execute_write(packet, ctx.mem, (ctx.pd, ctx.qpn)),
            Operation::Read => {
                self.execute_read(ctx, packet);
                Ok(())
            }
            _ => self.execute_atomic(ctx, packet),
        }
    }

    fn execute_read(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) {
        let Some(Reth { va, rkey, dma_len }) = packet.headers.reth else {
            return;
        };
        let answer = Answer::Read {
            va,
            rkey: Key(rkey),
            len: dma_len,
        };
        let psns = response_count(dma_len, ctx.attr);
        let resource = Resource::new(packet.headers.bth.psn, psns, answer);
        self.resources.push(resource, ctx.attr.max_dest_rd_atomic);
    }

    fn execute_atomic(
        &mut self,
        ctx: &mut Context<'_>,
        packet: &Packet<'_>,
    ) -> Result<(), Refusal> {
        let eth = packet.headers.atomic_eth.ok_or(Refusal::Invalid)?;
        let word = ctx
            .mem
            .check_remote(
                Key(eth.rkey),
                (ctx.pd, ctx.qpn),
                eth.va,
                8,
                AccessFlags::REMOTE_ATOMIC,
            )
            .map_err(|_| Refusal::Access)?;
        if eth.va % 8 != 0 || !word.is_word() {
            return Err(Refusal::Invalid);
        }
        let original = match packet.headers.bth.opcode {
            Opcode::CompareSwap => word.compare_swap(eth.compare, eth.swap_add),
            _ => word.fetch_add(eth.swap_add),
        };
        let resource = Resource::new(packet.headers.bth.psn, 1, Answer::Atomic { original });
        self.resources.push(resource, ctx.attr.max_dest_rd_atomic);
        Ok(())
    }

    fn acknowledge(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) {
        let info = packet.headers.bth.opcode.info();
        let psns = match (info.operation, packet.headers.reth) {
            (Operation::Read, Some(reth)) => response_count(reth.dma_len, ctx.attr),
            _ => 1,
        };
        self.expected = self.expected + psns;
        let closes_gap = std::mem::replace(&mut self.is_nak_sent, false);
        if info.is_last {
            self.msn = (self.msn + 1) & 0x00ff_ffff;
        }
        if matches!(info.operation, Operation::Read | Operation::Atomic) {
            // The response acknowledges everything before it.
            self.drop_reply();
            return;
        }
        if is_injected(Fault::AckBeforeWrite)
            && let Some(reth) = packet.headers.reth
        {
            let last = packet.headers.bth.psn + (response_count(reth.dma_len, ctx.attr) - 1);
            self.reply = Some(Reply::Nak(last, Syndrome::ACK));
            return;
        }
        self.unanswered += 1;
        self.has_closed_gap |= closes_gap;
        // Kernel rxe hears another NAK, and tries as often as before, only after an ACK; before the end of
        // a message it asks for none.
        if packet.headers.bth.ack_req || closes_gap {
            ctx.counters.ack_deferred += u64::from(self.reply.is_some());
            self.reply = Some(Reply::Ack);
        }
    }

    /// What each refusal means for the peer, the receive request and the queue pair.
    fn refuse(&mut self, ctx: &mut Context<'_>, psn: Psn, refusal: Refusal) {
        match refusal {
            Refusal::NotReady => {
                ctx.counters.send_rnr_err += 1;
                // Packets behind this one are of no use until it is repeated: no NAK 60 for them.
                self.is_nak_sent = true;
                let timer = ctx.attr.min_rnr_timer;
                self.reply = Some(Reply::Nak(psn, Syndrome::Rnr { timer }));
            }
            Refusal::Invalid => {
                self.refuse_for_good(psn, NakCode::InvalidRequest, Some(AsyncEvent::QpReqErr));
            }
            Refusal::Access => {
                self.refuse_for_good(psn, NakCode::RemoteAccess, Some(AsyncEvent::QpAccessErr));
            }
            Refusal::TooLong => {
                self.inbound.fail_receive(WcStatus::LocLenErr);
                self.refuse_for_good(psn, NakCode::InvalidRequest, None);
            }
            Refusal::ReceiveProtection => {
                self.inbound.fail_receive(WcStatus::LocProtErr);
                self.refuse_for_good(psn, NakCode::RemoteOperational, None);
            }
            // The data have been placed, and no NAK is specified for what follows: as rxe, acknowledge the
            // SEND and end with it.
            Refusal::Invalidation => {
                self.inbound.fail_receive(WcStatus::RemInvReqErr);
                self.expected = psn.next();
                self.msn = (self.msn + 1) & 0x00ff_ffff;
                self.reply = Some(Reply::Ack);
                self.failure = Some(Some(AsyncEvent::QpAccessErr));
            }
        }
    }

    /// Sends a NAK after which the connection is over.
    pub(super) fn refuse_for_good(&mut self, psn: Psn, code: NakCode, event: Option<AsyncEvent>) {
        self.reply = Some(Reply::Nak(psn, Syndrome::Nak(code)));
        self.failure = Some(event);
    }
}

/// The queue pair allows this operation.
fn check_op_valid(packet: &Packet<'_>, attr: &Attr) -> Result<(), Refusal> {
    let info = packet.headers.bth.opcode.info();
    let needed = match info.operation {
        Operation::Write => AccessFlags::REMOTE_WRITE,
        Operation::Read => AccessFlags::REMOTE_READ,
        Operation::Atomic => AccessFlags::REMOTE_ATOMIC,
        _ => AccessFlags::empty(),
    };
    let is_rd_atomic = matches!(info.operation, Operation::Read | Operation::Atomic);
    let is_enabled = attr.access.contains(needed) && (!is_rd_atomic || attr.max_dest_rd_atomic > 0);
    if is_enabled {
        Ok(())
    } else {
        Err(Refusal::Invalid)
    }
}

/// Responses that a READ of `len` bytes gets.
pub(super) fn response_count(len: u32, attr: &Attr) -> u32 {
    let mtu = u32::try_from(attr.path_mtu.bytes()).expect("an MTU is small");
    len.div_ceil(mtu).max(1)
}

/// Whether a fault has this request executed again; in normal builds none does.
fn injects_repetition(packet: &Packet<'_>) -> bool {
    let info = packet.headers.bth.opcode.info();
    match info.operation {
        Operation::Atomic => is_injected(Fault::RepeatAtomic),
        Operation::Send | Operation::Write => {
            info.is_first && info.is_last && is_injected(Fault::RepeatWrite)
        }
        _ => false,
    }
}
