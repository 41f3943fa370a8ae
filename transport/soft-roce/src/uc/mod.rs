//! Unreliable connections: SEND and WRITE to one peer, which acknowledges nothing.
//!
//! Stated as absences: this module knows no socket, clock, thread, file or libibverbs, no timer and no
//! window. Nothing is allocated after [`Qp::new`].
//!
//! ```text
//!        post_send, post_recv, modify
//!                    |
//!  handle_packet -> Qp -> poll_transmit, poll_completion, poll_event
//! ```
//!
//! A message is cut into packets, and received, as on a [reliable connection](crate::rc). A send is
//! complete as soon as its last packet is written. What is lost stays lost:
//!
//! ```text
//!                     expected First or Only                 Last, or Only
//!   between messages ------------------------> in a message ---------------> complete
//!         ^  \___ others are dropped                |
//!         '-----------------------------------------'
//!            gap, or a packet that may not be executed
//! ```
//!
//! A First or Only starts a message whatever its PSN, and gives up the message before it. The bytes of
//! a message that was given up stay where they are, and its receive request waits for the next one. The
//! peer hears of nothing; [`Counters`] tell.
//!
//! # Choices that the specification leaves open
//!
//! - As on datagrams, a failed send moves to SQE, and `modify` to RTS resumes. (Kernel rxe moves to ERR.)
//!   The peer drops the message that was begun when the next one starts.
//! - Memory windows may be bound and invalidated by this side's requests. SEND with invalidate exists on
//!   reliable connections only.
//! - A request taken from a shared receive queue whose message is given up waits for the next one of this
//!   queue pair. (Kernel rxe completes it with an error.)
//! - Nothing slows the sender but the speed of the port: an application that sends more than the peer
//!   can take in loses messages.

mod attr;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use crate::link::{Note, TxBuf};
use crate::mr_table::{AccessFlags, MrTable};
use crate::qp::events::Events;
use crate::qp::inbound::{Inbound, Refusal, check_rkey};
use crate::qp::local;
use crate::qp::segment::{byte_offset, byte_offset_after, data_headers};
use crate::qp::unacked::UnackedSends;
use crate::qp::{Attr, AttrMask, InvalidTransition, QpConfig, QpState};
use crate::srq::SharedReceiveQueue;
use crate::wire::{Operation, Packet, Psn, Qpn, Transport};
use crate::work::{AsyncEvent, PostError, Queue, RecvWr, SendOp, SendWr, Wc, WcStatus};

/// What happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Packets sent.
    pub sent_pkts: u64,
    /// Packets that reached the queue pair.
    pub rcvd_pkts: u64,
    /// Packets that are not the one expected: something was lost, repeated or overtaken before them.
    pub out_of_seq_request: u64,
    /// Messages that were begun and given up.
    pub broken_msgs: u64,
    /// Packets dropped because no receive request was posted.
    pub no_receive: u64,
    /// Packets dropped because they do not fit the receive request.
    pub too_long: u64,
    /// Packets dropped because their key, right or range does not hold.
    pub access_viol: u64,
    /// Packets dropped for another reason, such as a message whose start was dropped.
    pub dropped_pkts: u64,
}

/// An unreliable-connection queue pair.
///
/// After any call that takes `&mut self`, call [`poll_transmit`](Self::poll_transmit) (until it
/// returns false), [`poll_completion`](Self::poll_completion) and [`poll_event`](Self::poll_event)
/// (until they return `None`). With a shared receive queue there is one place for a completed receive:
/// take the completion before the next packet, or that may be dropped as if no request were posted.
#[derive(Debug)]
pub struct Qp {
    qpn: Qpn,
    config: QpConfig,
    attr: Attr,
    sends: UnackedSends,
    /// PSN of the next request to be posted.
    posted: Psn,
    /// Packets of the request at `sends.sq.done` that are sent.
    sent_of_oldest: u32,
    inbound: Inbound,
    /// PSN expected next.
    expected: Psn,
    /// SQD: `SqDrained` is due when the message that was begun is sent.
    is_drain_awaited: bool,
    /// A packet has arrived since the queue pair reached RTR.
    is_established: bool,
    counters: Counters,
    events: Events,
}

impl Qp {
    /// Creates a queue pair in RESET.
    #[must_use]
    pub fn new(qpn: Qpn, config: QpConfig) -> Self {
        Qp {
            qpn,
            config,
            attr: Attr::default(),
            sends: UnackedSends::new(&config),
            posted: Psn::new(0),
            sent_of_oldest: 0,
            inbound: Inbound::new(&config),
            expected: Psn::new(0),
            is_drain_awaited: false,
            is_established: false,
            counters: Counters::default(),
            events: Events::default(),
        }
    }

    /// What it was created with.
    #[must_use]
    pub fn config(&self) -> &QpConfig {
        &self.config
    }

    /// Its present state.
    #[must_use]
    pub fn state(&self) -> QpState {
        self.attr.state
    }

    /// Its present attributes, as `ibv_query_qp` reports them.
    #[must_use]
    pub fn attr(&self) -> &Attr {
        &self.attr
    }

    /// In SQD: whether the message that was begun is still unfinished (`sq_draining`).
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.attr.state == QpState::Sqd && self.is_in_message()
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Changes attributes and state as `ibv_modify_qp` does.
    ///
    /// Moving to RESET forgets everything posted without completions; moving to ERR flushes it.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] if the transition table does not allow it; nothing has changed then.
    pub fn modify(&mut self, attr: &Attr, mask: AttrMask) -> Result<(), InvalidTransition> {
        let from = self.attr.state;
        self.attr = self.attr.modified(attr::transition, attr, mask)?;
        match (from, self.attr.state) {
            (_, QpState::Reset) => self.reset(),
            (_, QpState::Err) => self.enter_error(),
            (QpState::Init, QpState::Rtr) => self.expected = self.attr.rq_psn,
            (QpState::Rtr, QpState::Rts) => self.posted = self.attr.sq_psn,
            (QpState::Rts, QpState::Sqd) => {
                self.is_drain_awaited = self.attr.en_sqd_async_notify;
                self.note_drained();
            }
            (QpState::Sqe, QpState::Rts) => self.sends.resume(),
            _ => {}
        }
        Ok(())
    }

    /// Moves to ERR because of something outside: its completion queue overran, the device failed.
    pub fn fail(&mut self, event: AsyncEvent) {
        if self.attr.state != QpState::Reset {
            self.events.raise(event);
            self.enter_error();
        }
    }

    /// Queues a send request.
    ///
    /// Inline data are copied; other memory is read when packets are built, until the completion. In ERR
    /// and SQE the request is accepted and flushed, in SQD it waits for RTS.
    ///
    /// # Errors
    ///
    /// See [`PostError`]; wrong keys and ranges are no errors here but completions.
    pub fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        if matches!(
            self.attr.state,
            QpState::Reset | QpState::Init | QpState::Rtr
        ) {
            return Err(PostError::InvalidState);
        }
        if !(wr.op.is_local() || matches!(wr.op, SendOp::Send { .. } | SendOp::Write { .. })) {
            return Err(PostError::WrongService);
        }
        let mtu = self.attr.path_mtu.bytes();
        self.posted = self.sends.sq.push(wr, self.posted, mtu)?;
        Ok(())
    }

    /// Takes back the last `count` send requests, queued since [`poll_transmit`](Self::poll_transmit)
    /// was last called.
    pub fn unpost_sends(&mut self, count: usize) {
        if count > 0 {
            self.posted = self.sends.sq.unpush(count);
        }
    }

    /// Queues a receive request; in INIT it waits for RTR, in ERR it is flushed.
    ///
    /// # Errors
    ///
    /// See [`PostError`].
    pub fn post_recv(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        if self.config.srq.is_some() {
            return Err(PostError::SharedReceives);
        }
        if self.attr.state == QpState::Reset {
            return Err(PostError::InvalidState);
        }
        self.inbound.rq.push(wr)
    }

    /// Takes in a packet for this queue pair that came from `source` with a valid ICRC, and, if the
    /// configuration names one, the shared receive queue. The P_Key is not looked at: partitions are the
    /// port's.
    pub fn handle_packet(
        &mut self,
        source: IpAddr,
        packet: &Packet<'_>,
        mem: &mut MrTable,
        srq: Option<&mut SharedReceiveQueue>,
    ) {
        self.counters.rcvd_pkts += 1;
        if !self.expects(source, packet) {
            self.counters.dropped_pkts += 1;
            return;
        }
        if self.attr.state == QpState::Rtr && !std::mem::replace(&mut self.is_established, true) {
            self.events.raise(AsyncEvent::CommEst);
        }
        self.check_psn(packet);
        if let Err(refusal) = self.judge_and_execute(packet, mem, srq) {
            self.refuse(refusal);
        }
    }

    /// Writes packets that are due into `tx`; true if `tx` filled up before all were written.
    pub fn poll_transmit(&mut self, mem: &mut MrTable, tx: &mut TxBuf) -> bool {
        while self.may_send()
            && let Some(position) = self.sends.next()
        {
            if tx.is_full() {
                return true;
            }
            if let Err(status) = self.send_or_execute(position, mem, tx) {
                self.sends.fail(status);
                self.sent_of_oldest = 0;
                self.set_state(QpState::Sqe);
            }
        }
        self.note_drained();
        false
    }

    /// Takes the next completion.
    ///
    /// Completions of one queue come in the order in which its requests were posted.
    pub fn poll_completion(&mut self) -> Option<(Queue, Wc)> {
        let peer = self.attr.dest_qpn;
        if let Some((wqe, status)) = self.sends.poll_completion(self.attr.state) {
            return Some((Queue::Send, wqe.wc(status, self.qpn, peer)));
        }
        let wqe = if self.attr.state == QpState::Err {
            self.inbound.rq.pop_flushed()
        } else {
            self.inbound.rq.pop_done()
        }?;
        Some((Queue::Recv, wqe.wc(self.qpn, peer)))
    }

    /// Takes the next asynchronous event.
    pub fn poll_event(&mut self) -> Option<AsyncEvent> {
        self.events.take()
    }

    /// Whether a packet belongs to this connection in its present state.
    fn expects(&self, source: IpAddr, packet: &Packet<'_>) -> bool {
        let state_takes_it = match self.attr.state {
            QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe => true,
            QpState::Reset | QpState::Init | QpState::Err => false,
        };
        let transport = packet.headers.bth.opcode.transport();
        state_takes_it && source == self.attr.remote && transport == Transport::Uc
    }

    /// A gap ends the message in progress, and so does the start of another.
    fn check_psn(&mut self, packet: &Packet<'_>) {
        let bth = &packet.headers.bth;
        let is_expected = bth.psn == self.expected;
        self.counters.out_of_seq_request += u64::from(!is_expected);
        self.expected = bth.psn.next();
        if !is_expected || bth.opcode.info().is_first {
            self.give_up_message();
        }
    }

    fn judge_and_execute(
        &mut self,
        packet: &Packet<'_>,
        mem: &mut MrTable,
        srq: Option<&mut SharedReceiveQueue>,
    ) -> Result<(), Refusal> {
        let owner = (self.config.pd, self.qpn);
        let is_write = packet.headers.bth.opcode.info().operation == Operation::Write;
        self.inbound.check_op_seq(packet)?;
        if is_write && !self.attr.access.contains(AccessFlags::REMOTE_WRITE) {
            return Err(Refusal::Access);
        }
        self.inbound.check_receive(srq, packet)?;
        self.inbound.check_length(packet, &self.attr)?;
        check_rkey(packet, mem, owner)?;
        if is_write {
            self.inbound.execute_write(packet, mem, owner)
        } else {
            self.inbound.execute_send(packet, mem, owner)
        }
    }

    /// The peer hears nothing of a refusal. Only the receive request's own fault is this side's to know.
    fn refuse(&mut self, refusal: Refusal) {
        let count = match refusal {
            Refusal::NotReady => &mut self.counters.no_receive,
            Refusal::TooLong => &mut self.counters.too_long,
            Refusal::Access => &mut self.counters.access_viol,
            Refusal::Invalid | Refusal::Invalidation => &mut self.counters.dropped_pkts,
            Refusal::ReceiveProtection => {
                self.inbound.fail_receive(WcStatus::LocProtErr);
                return self.enter_error();
            }
        };
        *count += 1;
        self.give_up_message();
    }

    fn give_up_message(&mut self) {
        self.counters.broken_msgs += u64::from(self.inbound.is_in_message());
        self.inbound.abandon();
    }

    /// In SQD, what was begun is finished.
    fn may_send(&self) -> bool {
        self.attr.state == QpState::Rts || self.is_draining()
    }

    /// Whether a message was begun whose last packet is not sent.
    fn is_in_message(&self) -> bool {
        self.sent_of_oldest > 0
    }

    fn send_or_execute(
        &mut self,
        position: u64,
        mem: &mut MrTable,
        tx: &mut TxBuf,
    ) -> Result<(), WcStatus> {
        let op = self.sends.sq.wqe(position).op;
        if op.is_local() {
            local::execute(&op, mem, (self.config.pd, self.qpn))?;
            self.sends.sq.done += 1;
            return Ok(());
        }
        self.send_packet(position, mem, tx)
    }

    /// Sends the next packet of the request at `position`.
    fn send_packet(
        &mut self,
        position: u64,
        mem: &MrTable,
        tx: &mut TxBuf,
    ) -> Result<(), WcStatus> {
        let wqe = *self.sends.sq.wqe(position);
        let psn = wqe.first + self.sent_of_oldest;
        let mut headers = data_headers(&wqe, psn, &self.attr);
        let opcode = headers.bth.opcode.on_uc();
        headers.bth.opcode = opcode.expect("nothing else is posted");
        let mtu = self.attr.path_mtu.bytes();
        let start = byte_offset(&wqe, psn, mtu);
        let payload_len = byte_offset_after(&wqe, psn.next(), mtu) - start;
        let (sq, pd) = (&self.sends.sq, self.config.pd);
        let is_built = tx.push(self.attr.remote, &headers, payload_len, |payload| {
            sq.read(position, start as u64, payload, mem, pd).is_ok()
        });
        if !is_built {
            return Err(WcStatus::LocProtErr);
        }
        tx.note(Note {
            qpn: self.qpn,
            wr_id: Some(wqe.wr_id),
            is_retry: false,
        });
        self.counters.sent_pkts += 1;
        self.sent_of_oldest += 1;
        if psn.next() == wqe.end {
            self.sent_of_oldest = 0;
            self.sends.sq.done += 1;
        }
        Ok(())
    }

    fn note_drained(&mut self) {
        if self.is_drain_awaited && self.attr.state == QpState::Sqd && !self.is_in_message() {
            self.is_drain_awaited = false;
            self.events.raise(AsyncEvent::SqDrained);
        }
    }

    fn enter_error(&mut self) {
        self.set_state(QpState::Err);
        self.stop();
        if self.config.srq.is_some() {
            self.events.raise_last_wqe_reached();
        }
    }

    fn set_state(&mut self, state: QpState) {
        self.attr.state = state;
        self.attr.cur_state = state;
    }

    /// Neither sends nor receives go on. What is posted is left to be flushed.
    fn stop(&mut self) {
        self.sent_of_oldest = 0;
        self.inbound.abandon();
        self.is_drain_awaited = false;
    }

    fn reset(&mut self) {
        self.stop();
        self.sends.clear();
        self.inbound.rq.clear();
        self.events.clear();
        self.is_established = false;
    }
}
