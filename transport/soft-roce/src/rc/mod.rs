//! The reliable-connection protocol: one queue pair as a state machine.
//!
//! Stated as absences: this module knows no socket, clock, thread, file or libibverbs. Time is an
//! argument in nanoseconds, packets come parsed and leave in a [`TxBuf`], memory is reached through
//! an [`MrTable`]. Nothing is allocated after [`Qp::new`].
//!
//! ```text
//!            post_send, post_recv, modify
//!                        |
//!  handle_packet --> +-------+ --> poll_transmit      packets
//!  handle_timeout -> |  Qp   | --> poll_completion    completions
//!                    +-------+ --> poll_event         asynchronous events
//!                        |
//!                   poll_timeout                      when to call handle_timeout
//! ```
//!
//! `requester` sends what was posted, `local` executes what needs no peer, and `completer` takes the
//! answers; `responder` answers the
//! peer's requests. They share nothing but the attributes, the counters and the fate of the queue
//! pair: when one fails, the queue pair goes to ERR and all that was posted is flushed.
//!
//! # Choices that the specification leaves open
//!
//! - ACKs are merged: [`Qp::handle_packet`] only notes that one is due, and the next
//!   [`Qp::poll_transmit`] sends the latest. Handle a whole receive batch, then transmit.
//! - A READ is asked for in pieces of [`READ_CHUNK`] packets, so that responses never exceed the
//!   congestion window; each piece counts as one against `max_rd_atomic`.
//! - A plain ACK may wait for one turn, so that an application that polls sees what came before the
//!   ACK costs it a send, and its answer takes the ACK along; see [`AckTime`].
//! - READ responses are read from memory when they are sent, and their key is checked again then. A
//!   request behind a READ does not wait for its responses, so a SEND that invalidates the READ's key
//!   cuts it off: such a SEND needs the fence.
//! - LOCAL_INV waits for everything before it, as rxe's does.
//! - Retransmission never repeats a SEND or WRITE packet that the peer is known to have.
//! - After a loss a single packet goes out first, and the window grows from there; repeated timeouts are
//!   spread, each between T and 2 T. Without either, one connection over a full buffer reached a tenth of
//!   what the receiver could take, and some of 64 ran out of retries.
//! - After going back, further sequence NAKs are ignored until something progresses or the timer
//!   fires: a responder sends one per gap, and answers to older transmissions are still on their way.

mod answers;
mod attr;
mod completer;
mod counters;
mod local;
mod requester;
mod resources;
mod responder;
#[cfg(test)]
mod tests;
mod timer;
mod window;

use std::net::IpAddr;

pub use counters::Counters;
pub use requester::READ_CHUNK;

use crate::faults::{Fault, is_injected};
use crate::link::TxBuf;
use crate::mr_table::{MrTable, Pd};
use crate::qp::events::Events;
use crate::qp::{Attr, AttrMask, InvalidTransition, QpConfig, QpState};
use crate::srq::SharedReceiveQueue;
use crate::wire::{Packet, Qpn, Transport};
use crate::work::{AsyncEvent, PostError, Queue, RecvWr, SendOp, SendWr, Wc, WcStatus};
use requester::Requester;
use responder::Responder;

/// When a plain ACK goes out. NAKs and responses never wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AckTime {
    /// In this turn.
    Now,
    /// In this turn if it sends anything else or the ACK stands for several packets, and otherwise in
    /// the next. The caller owes that turn soon: see [`Qp::holds_ack`].
    WithNextTurn,
}

/// What every step may look at, and the counters it may move.
struct Context<'a> {
    now: u64,
    qpn: Qpn,
    pd: Pd,
    attr: &'a Attr,
    mem: &'a mut MrTable,
    /// Where receive requests come from, if shared.
    srq: Option<&'a mut SharedReceiveQueue>,
    counters: &'a mut Counters,
}

/// A reliable-connection queue pair.
///
/// After any call that takes `&mut self`, call [`poll_transmit`](Self::poll_transmit) (until it
/// returns false), [`poll_completion`](Self::poll_completion) and [`poll_event`](Self::poll_event)
/// (until they return `None`), and see [`poll_timeout`](Self::poll_timeout) for when to come back.
/// Completions may be left for later: they wait in the queues, whose places they occupy. With a
/// shared receive queue there is one place: take the completion before the next packet, or that may
/// be answered as if no receive request were posted.
#[derive(Debug)]
pub struct Qp {
    qpn: Qpn,
    config: QpConfig,
    attr: Attr,
    requester: Requester,
    responder: Responder,
    counters: Counters,
    events: Events,
    /// A packet has arrived since the queue pair reached RTR.
    is_established: bool,
}

impl Qp {
    /// Creates a queue pair in RESET.
    #[must_use]
    pub fn new(qpn: Qpn, config: QpConfig) -> Self {
        Qp {
            qpn,
            config,
            attr: Attr::default(),
            requester: Requester::new(&config),
            responder: Responder::new(&config),
            counters: Counters::default(),
            events: Events::default(),
            is_established: false,
        }
    }

    /// Its number.
    #[must_use]
    pub fn qpn(&self) -> Qpn {
        self.qpn
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

    /// In SQD: whether requests that were begun are still unfinished (`sq_draining`).
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.attr.state == QpState::Sqd && self.requester.is_draining()
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Caps the bytes that may be unanswered at `len`, for a budget that the queue pairs of a device
    /// share. One packet is always allowed, and never more than [`QpConfig::window_max`].
    pub fn set_window_share(&mut self, len: usize) {
        let packets = u32::try_from(len / self.attr.path_mtu.bytes()).unwrap_or(u32::MAX);
        let packets = packets.min(self.config.window_max);
        self.requester.window.set_max(packets);
    }

    /// Whether packets were sent that are not answered yet.
    #[must_use]
    pub fn awaits_answers(&self) -> bool {
        self.requester.in_flight() > 0
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
            (QpState::Init, QpState::Rtr) => self.responder.start(&self.attr),
            (QpState::Rtr, QpState::Rts) => self.requester.start(&self.attr, &self.config),
            (QpState::Rts, QpState::Sqd) => {
                self.requester.drain(self.attr.en_sqd_async_notify);
                self.settle();
            }
            // Retries may have changed.
            (QpState::Sqd, QpState::Sqd) => self.requester.timers.reload(&self.attr),
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
    /// Inline data are copied; other memory is read when packets are built, until the completion.
    /// In ERR the request is accepted and flushed, in SQD it waits for RTS.
    ///
    /// # Errors
    ///
    /// See [`PostError`]; wrong keys and ranges are no errors here but completions.
    pub fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        if !matches!(self.attr.state, QpState::Rts | QpState::Sqd | QpState::Err) {
            return Err(PostError::InvalidState);
        }
        if matches!(wr.op, SendOp::Datagram { .. }) {
            return Err(PostError::WrongService);
        }
        if wr.op.is_rd_atomic() && self.attr.max_rd_atomic == 0 && self.attr.state != QpState::Err {
            return Err(PostError::RdAtomicDisabled);
        }
        self.requester.post(wr, self.attr.path_mtu)
    }

    /// Takes back the last `count` send requests, queued since [`poll_transmit`](Self::poll_transmit)
    /// was last called.
    pub fn unpost_sends(&mut self, count: usize) {
        self.requester.unpost(count);
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
        self.responder.inbound.rq.push(wr)
    }

    /// Takes in a packet for this queue pair that came from `source` with a valid ICRC.
    ///
    /// Packets that the connection does not expect are dropped and counted. The P_Key is not looked at:
    /// partitions are the port's.
    pub fn handle_packet(
        &mut self,
        now: u64,
        source: IpAddr,
        packet: &Packet<'_>,
        mem: &mut MrTable,
    ) {
        self.handle_packet_sharing(now, source, packet, mem, None);
    }

    /// As [`handle_packet`](Self::handle_packet), with the shared receive queue that the
    /// configuration names.
    pub fn handle_packet_sharing(
        &mut self,
        now: u64,
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
        let (requester, responder, mut context) = self.parts(now, mem);
        context.srq = srq;
        if packet.headers.bth.opcode.info().operation.is_request() {
            responder.handle_request(&mut context, packet);
            if let Some(event) = responder.take_failure() {
                self.fail_by_peer(event);
            }
        } else {
            requester.handle_response(&mut context, packet);
            self.settle();
        }
    }

    /// Tells that time has come to `now`; call it at [`poll_timeout`](Self::poll_timeout), or any time.
    pub fn handle_timeout(&mut self, now: u64) {
        if matches!(self.attr.state, QpState::Rts | QpState::Sqd) {
            self.requester.handle_timeout(now, &mut self.counters);
            self.settle();
        }
    }

    /// Writes packets that are due into `tx`; true if `tx` filled up before all were written.
    pub fn poll_transmit(
        &mut self,
        now: u64,
        mem: &mut MrTable,
        tx: &mut TxBuf,
        ack_time: AckTime,
    ) -> bool {
        let state = self.attr.state;
        if matches!(state, QpState::Reset | QpState::Init) {
            return false;
        }
        let (requester, responder, mut context) = self.parts(now, mem);
        let mut is_more = responder.transmit(&mut context, tx);
        let failure = responder.take_failure();
        if !is_more {
            if matches!(state, QpState::Rts | QpState::Sqd) {
                is_more = requester.transmit(&mut context, tx);
            }
            is_more |= responder.transmit_ack(&mut context, tx, ack_time);
        }
        if let Some(event) = failure {
            self.fail_by_peer(event);
        }
        self.settle();
        is_more
    }

    /// Whether an ACK waits for the next [`poll_transmit`](Self::poll_transmit), whatever its time.
    ///
    /// There must be one soon, and before the queue pair is modified or dropped: the peer's requests
    /// complete with the ACK.
    #[must_use]
    pub fn holds_ack(&self) -> bool {
        self.responder.is_ack_held
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called, if nothing happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        self.requester.poll_timeout()
    }

    /// Takes the next completion.
    ///
    /// Completions of one queue come in the order in which its requests were posted.
    pub fn poll_completion(&mut self) -> Option<(Queue, Wc)> {
        if let Some(wqe) = self.requester.sq.pop_done() {
            return Some((
                Queue::Send,
                wqe.wc(WcStatus::Success, self.qpn, self.attr.dest_qpn),
            ));
        }
        let is_error = self.attr.state == QpState::Err && !is_injected(Fault::ForgetFlush);
        if is_error && let Some(wqe) = self.requester.sq.pop_flushed() {
            let status = self
                .requester
                .take_failure()
                .unwrap_or(WcStatus::WrFlushErr);
            return Some((Queue::Send, wqe.wc(status, self.qpn, self.attr.dest_qpn)));
        }
        let rq = &mut self.responder.inbound.rq;
        let wqe = if is_error {
            rq.pop_flushed()
        } else {
            rq.pop_done()
        }?;
        Some((Queue::Recv, wqe.wc(self.qpn, self.attr.dest_qpn)))
    }

    /// Takes the next asynchronous event.
    pub fn poll_event(&mut self) -> Option<AsyncEvent> {
        self.events.take()
    }

    /// Whether a packet belongs to this connection in its present state.
    fn expects(&self, source: IpAddr, packet: &Packet<'_>) -> bool {
        let bth = &packet.headers.bth;
        let state_takes_it = match self.attr.state {
            QpState::Rtr => bth.opcode.info().operation.is_request(),
            QpState::Rts | QpState::Sqd => true,
            QpState::Reset | QpState::Init | QpState::Sqe | QpState::Err => false,
        };
        let is_ours = bth.opcode.transport() == Transport::Rc;
        state_takes_it && source == self.attr.remote && is_ours
    }

    fn parts<'a>(
        &'a mut self,
        now: u64,
        mem: &'a mut MrTable,
    ) -> (&'a mut Requester, &'a mut Responder, Context<'a>) {
        let context = Context {
            now,
            qpn: self.qpn,
            pd: self.config.pd,
            attr: &self.attr,
            mem,
            srq: None,
            counters: &mut self.counters,
        };
        (&mut self.requester, &mut self.responder, context)
    }

    /// Draws the consequences of what the requester did: failure, or a drained queue.
    fn settle(&mut self) {
        if self.requester.has_failed() && self.attr.state != QpState::Err {
            self.enter_error();
        }
        if self.attr.state == QpState::Sqd && self.requester.take_drained() {
            self.events.raise(AsyncEvent::SqDrained);
        }
    }

    /// The peer's request was refused for good; the NAK is still to be sent.
    fn fail_by_peer(&mut self, event: Option<AsyncEvent>) {
        if let Some(event) = event {
            self.events.raise(event);
        }
        self.set_error();
        self.requester.stop();
    }

    fn enter_error(&mut self) {
        self.set_error();
        self.requester.stop();
        self.responder.stop();
    }

    fn set_error(&mut self) {
        self.attr.state = QpState::Err;
        self.attr.cur_state = QpState::Err;
        if self.config.srq.is_some() {
            self.events.raise_last_wqe_reached();
        }
    }

    fn reset(&mut self) {
        self.requester.reset();
        self.responder.reset();
        self.events.clear();
        self.is_established = false;
    }
}
