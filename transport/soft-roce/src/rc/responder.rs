//! The responder: judges the peer's requests step by step, executes them, and answers.
//!
//! ```text
//! CheckPsn -> CheckOpSeq -> CheckOpValid -> CheckResource -> CheckLength -> CheckRkey -> Execute
//!    |  \_ Duplicate                                                                        |
//!    '- out of sequence: NAK 60                                                       Acknowledge
//! ```
//!
//! Each step is a function that lets the request pass or gives the [`Refusal`]; `refuse` alone
//! knows what each refusal means on the wire, for the receive request and for the queue pair.
//! Duplicates and everything that is sent are in [`answers`](super::answers).

use super::Context;
use super::resources::{Answer, Resource, Resources};
use crate::faults::{Fault, is_injected};
use crate::mr_table::{AccessFlags, Key, Pd};
use crate::qp::Attr;
use crate::qp::QpConfig;
use crate::qp::queue::{RecvDone, RecvQueue};
use crate::wire::{NakCode, Opcode, Operation, Packet, Psn, Reth, Syndrome};
use crate::work::{AsyncEvent, MAX_MESSAGE_LEN, WcOpcode, WcStatus};

/// The message that is being received, when it has more than one packet.
#[derive(Debug, Clone, Copy)]
enum Message {
    Send {
        position: u64,
        received: u32,
    },
    Write {
        va: u64,
        rkey: Key,
        total: u32,
        received: u32,
    },
}

/// Why a request is not executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// It lies behind the expected one.
    OutOfSequence,
    /// No receive request is posted.
    NotReady,
    /// Its operation, order, length or alignment is wrong.
    Invalid,
    /// The key, right or range does not hold.
    Access,
    /// The SEND does not fit the receive request.
    TooLong,
    /// The receive request itself cannot be written to.
    ReceiveProtection,
    /// The key that the SEND is to invalidate names no window of this queue pair.
    Invalidation,
}

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
    /// With a shared receive queue: the one request taken from it and not yet reported.
    pub(super) rq: RecvQueue,
    /// Where the buffers of receive requests are looked up.
    recv_pd: Pd,
    /// PSN expected next.
    pub(super) expected: Psn,
    /// Messages completed, modulo 2^24.
    pub(super) msn: u32,
    message: Option<Message>,
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
        let (max_recv_wr, recv_pd) = config.receives();
        Responder {
            rq: RecvQueue::new(max_recv_wr, config.max_recv_sge),
            recv_pd,
            expected: Psn::new(0),
            msn: 0,
            message: None,
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
        self.rq.clear();
        self.stop();
        self.msn = 0;
        self.resources.clear();
        self.is_nak_sent = false;
        self.failure = None;
    }

    /// To ERR: answers nothing more. The message in progress is left to be flushed.
    pub(super) fn stop(&mut self) {
        self.message = None;
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
        if let Err(refusal) = self.judge_and_execute(ctx, packet) {
            self.refuse(ctx, psn, refusal);
        }
    }

    fn judge_and_execute(
        &mut self,
        ctx: &mut Context<'_>,
        packet: &Packet<'_>,
    ) -> Result<(), Refusal> {
        self.check_psn(packet)?;
        self.check_op_seq(packet)?;
        check_op_valid(packet, ctx.attr)?;
        self.check_resource(ctx, packet)?;
        self.check_length(packet, ctx.attr)?;
        check_rkey(ctx, packet)?;
        self.execute(ctx, packet)?;
        self.acknowledge(ctx, packet);
        Ok(())
    }

    /// Only the expected packet passes.
    fn check_psn(&mut self, packet: &Packet<'_>) -> Result<(), Refusal> {
        if packet.headers.bth.psn != self.expected {
            return Err(Refusal::OutOfSequence);
        }
        if matches!(self.reply, Some(Reply::Nak(..))) {
            self.reply = Some(Reply::Ack);
        }
        Ok(())
    }

    /// A message is not left before its last packet, and not entered but by its first.
    fn check_op_seq(&self, packet: &Packet<'_>) -> Result<(), Refusal> {
        let info = packet.headers.bth.opcode.info();
        let fits = match self.message {
            None => info.is_first,
            Some(Message::Send { .. }) => info.operation == Operation::Send && !info.is_first,
            Some(Message::Write { .. }) => info.operation == Operation::Write && !info.is_first,
        };
        if fits { Ok(()) } else { Err(Refusal::Invalid) }
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
        if info.takes_receive {
            self.take_shared(ctx);
            self.rq.peek().ok_or(Refusal::NotReady)?;
        }
        Ok(())
    }

    /// Makes the oldest shared receive request this queue pair's own, if there is one and it has
    /// room. All checks that follow end either in its use or in ERR, which completes it.
    fn take_shared(&mut self, ctx: &mut Context<'_>) {
        if let Some(srq) = &mut ctx.srq
            && let Some(wr) = srq.peek()
            && self.rq.push(&wr).is_ok()
        {
            srq.take();
        }
    }

    /// C9-88, C9-94: each packet has the length its place demands, and the sum is as announced.
    fn check_length(&self, packet: &Packet<'_>, attr: &Attr) -> Result<(), Refusal> {
        let info = packet.headers.bth.opcode.info();
        let len = packet.payload.len();
        if !info.payload.allows(len, attr.path_mtu.bytes()) || !packet.is_padded_right() {
            return Err(Refusal::Invalid);
        }
        let dma_len = packet.headers.reth.map(|reth| u64::from(reth.dma_len));
        if dma_len.is_some_and(|dma_len| dma_len > MAX_MESSAGE_LEN) {
            return Err(Refusal::Invalid);
        }
        let len = len as u64;
        match (info.operation, self.message) {
            (Operation::Send, _) => self.check_send_length(len),
            (
                Operation::Write,
                Some(Message::Write {
                    total, received, ..
                }),
            ) => check_write_length(u64::from(received) + len, total.into(), info.is_last),
            (Operation::Write, _) => check_write_length(len, dma_len.unwrap_or(0), info.is_last),
            _ => Ok(()),
        }
    }

    fn check_send_length(&self, len: u64) -> Result<(), Refusal> {
        let received = match self.message {
            Some(Message::Send { received, .. }) => received.into(),
            _ => 0,
        };
        let capacity = self
            .receive_position()
            .map_or(0, |position| self.rq.capacity_of(position));
        // A SEND does not announce its length, so the limit on messages is kept here too.
        if received + len > capacity.min(MAX_MESSAGE_LEN) {
            return Err(Refusal::TooLong);
        }
        Ok(())
    }

    /// The receive request of the SEND in progress, or of the next one.
    fn receive_position(&self) -> Option<u64> {
        match self.message {
            Some(Message::Send { position, .. }) => Some(position),
            _ => self.rq.peek(),
        }
    }

    fn execute(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) -> Result<(), Refusal> {
        match packet.headers.bth.opcode.info().operation {
            Operation::Send => self.execute_send(ctx, packet),
            Operation::Write => self.execute_write(ctx, packet),
            Operation::Read => {
                self.execute_read(ctx, packet);
                Ok(())
            }
            _ => self.execute_atomic(ctx, packet),
        }
    }

    fn execute_send(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) -> Result<(), Refusal> {
        let (position, received) = match self.message {
            Some(Message::Send { position, received }) => (position, received),
            _ => (self.rq.peek().ok_or(Refusal::NotReady)?, 0),
        };
        self.rq
            .write(
                position,
                received.into(),
                packet.payload,
                ctx.mem,
                self.recv_pd,
            )
            .map_err(|_| Refusal::ReceiveProtection)?;
        if self.message.is_none() {
            self.rq.take();
        }
        let received = received + payload_len(packet);
        self.message = Some(Message::Send { position, received });
        if packet.headers.bth.opcode.info().is_last {
            if let Some(rkey) = packet.headers.ieth {
                ctx.mem
                    .invalidate(Key(rkey), ctx.pd, ctx.qpn)
                    .map_err(|_| Refusal::Invalidation)?;
            }
            self.message = None;
            self.complete_receive(position, WcOpcode::Recv, received, packet);
        }
        Ok(())
    }

    fn execute_write(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) -> Result<(), Refusal> {
        let info = packet.headers.bth.opcode.info();
        let (va, rkey, total, received) = match (self.message, packet.headers.reth) {
            (
                Some(Message::Write {
                    va,
                    rkey,
                    total,
                    received,
                }),
                _,
            ) => (va, rkey, total, received),
            (_, Some(Reth { va, rkey, dma_len })) => (va, Key(rkey), dma_len, 0),
            _ => return Err(Refusal::Invalid),
        };
        if !packet.payload.is_empty() {
            let at = va.wrapping_add(received.into());
            let len = packet.payload.len() as u64;
            ctx.mem
                .check_remote(rkey, (ctx.pd, ctx.qpn), at, len, AccessFlags::REMOTE_WRITE)
                .map_err(|_| Refusal::Access)?
                .copy_from(packet.payload);
        }
        let received = received + payload_len(packet);
        self.message = (!info.is_last).then_some(Message::Write {
            va,
            rkey,
            total,
            received,
        });
        if info.takes_receive
            && let Some(position) = self.rq.peek()
        {
            self.rq.take();
            self.complete_receive(position, WcOpcode::RecvRdmaWithImm, total, packet);
        }
        Ok(())
    }

    fn complete_receive(
        &mut self,
        position: u64,
        opcode: WcOpcode,
        byte_len: u32,
        packet: &Packet<'_>,
    ) {
        let done = RecvDone {
            status: WcStatus::Success,
            opcode,
            byte_len,
            imm: packet.headers.imm,
            invalidated: packet.headers.ieth.map(Key),
            datagram_from: None,
            is_solicited: packet.headers.bth.is_solicited,
        };
        self.rq.complete(position, done);
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
            Refusal::OutOfSequence => {
                ctx.counters.out_of_seq_request += 1;
                if !std::mem::replace(&mut self.is_nak_sent, true) {
                    let syndrome = Syndrome::Nak(NakCode::PsnSequence);
                    self.reply = Some(Reply::Nak(self.expected, syndrome));
                }
            }
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
                self.fail_receive(WcStatus::LocLenErr);
                self.refuse_for_good(psn, NakCode::InvalidRequest, None);
            }
            Refusal::ReceiveProtection => {
                self.fail_receive(WcStatus::LocProtErr);
                self.refuse_for_good(psn, NakCode::RemoteOperational, None);
            }
            // The data have been placed, and no NAK is specified for what follows: as rxe, acknowledge the
            // SEND and end with it.
            Refusal::Invalidation => {
                self.fail_receive(WcStatus::RemInvReqErr);
                self.expected = psn.next();
                self.msn = (self.msn + 1) & 0x00ff_ffff;
                self.reply = Some(Reply::Ack);
                self.failure = Some(Some(AsyncEvent::QpAccessErr));
            }
        }
    }

    fn fail_receive(&mut self, status: WcStatus) {
        if let Some(position) = self.receive_position() {
            self.rq.complete(
                position,
                RecvDone {
                    status,
                    ..RecvDone::default()
                },
            );
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

/// The whole range of a WRITE or READ is accessible before anything of it is executed.
fn check_rkey(ctx: &Context<'_>, packet: &Packet<'_>) -> Result<(), Refusal> {
    let Some(Reth { va, rkey, dma_len }) = packet.headers.reth else {
        return Ok(());
    };
    let access = match packet.headers.bth.opcode.info().operation {
        Operation::Read => AccessFlags::REMOTE_READ,
        _ => AccessFlags::REMOTE_WRITE,
    };
    // C9-88: without bytes, neither key nor address is looked at.
    if dma_len == 0
        || ctx
            .mem
            .check_remote(Key(rkey), (ctx.pd, ctx.qpn), va, dma_len.into(), access)
            .is_ok()
    {
        Ok(())
    } else {
        Err(Refusal::Access)
    }
}

fn check_write_length(received: u64, total: u64, is_last: bool) -> Result<(), Refusal> {
    let fits = if is_last {
        received == total
    } else {
        received < total
    };
    if fits { Ok(()) } else { Err(Refusal::Invalid) }
}

/// Responses that a READ of `len` bytes gets.
pub(super) fn response_count(len: u32, attr: &Attr) -> u32 {
    let mtu = u32::try_from(attr.path_mtu.bytes()).expect("an MTU is small");
    len.div_ceil(mtu).max(1)
}

fn payload_len(packet: &Packet<'_>) -> u32 {
    u32::try_from(packet.payload.len()).expect("a packet is short")
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
