//! Unreliable datagrams: one queue pair that sends to, and receives from, any number of others.
//!
//! Stated as absences: this module knows no socket, clock, thread, file or libibverbs, and nothing of
//! connections but the queues, attributes and requests that both kinds of queue pair have. Nothing is
//! allocated after [`Qp::new`].
//!
//! ```text
//!        post_send, post_recv, modify
//!                    |
//!  handle_packet -> Qp -> poll_transmit, poll_completion, poll_event
//! ```
//!
//! A message is one packet, which nobody acknowledges: a send is complete as soon as its packet is
//! written. What arrives is taken if it has the queue pair's Q_Key, a receive request waits, and
//! message and [GRH](crate::wire::GRH_LEN) fit its buffers; else it is dropped and counted, and the
//! receive request waits on, in a [shared queue](crate::srq) for whoever can use it.
//!
//! # Choices that the specification leaves open
//!
//! - A failed send, of which the causes are all local, moves to SQE: later sends are flushed, receives
//!   go on, and `modify` to RTS resumes. (Kernel rxe moves to ERR.)
//! - A receive request whose own buffers are not to be written to fails and moves to ERR, as on a
//!   connection.

mod attr;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use crate::faults::{Fault, is_injected};
use crate::link::{Note, TxBuf};
use crate::mr_table::{MrTable, Pd};
use crate::qp::events::Events;
use crate::qp::queue::{RecvDone, RecvQueue, SendWqe};
use crate::qp::unacked::UnackedSends;
use crate::qp::{Attr, AttrMask, InvalidTransition, Mtu, QpConfig, QpState, sge};
use crate::srq::SharedReceiveQueue;
use crate::wire::{
    DEFAULT_PKEY, Deth, GRH_LEN, Headers, Opcode, Packet, Psn, Qpn, grh, pkey_matches,
};
use crate::work::{
    AsyncEvent, Destination, PostError, Queue, RecvWr, SendFlags, SendOp, SendWr, Wc, WcOpcode,
    WcStatus,
};

/// Set in the Q_Key of a send request, it asks for the queue pair's own Q_Key instead.
const OWN_QKEY: u32 = 1 << 31;

/// What a queue pair for datagrams must know of its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// Its address.
    pub address: IpAddr,
    /// The longest message it carries.
    pub mtu: Mtu,
}

/// What happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Packets sent.
    pub sent_pkts: u64,
    /// Packets that reached the queue pair.
    pub rcvd_pkts: u64,
    /// Packets dropped for a wrong Q_Key.
    pub qkey_viol: u64,
    /// Packets dropped because no receive request was posted.
    pub no_receive: u64,
    /// Packets dropped because they do not fit the receive request.
    pub too_long: u64,
    /// Packets dropped for another reason.
    pub dropped_pkts: u64,
}

/// Why a packet is not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// It is no datagram, or not for this state, partition or port.
    Unexpected,
    QKey,
    NoReceive,
    TooLong,
    /// The receive request itself cannot be written to.
    ReceiveProtection,
}

/// A queue pair for datagrams.
///
/// After any call that takes `&mut self`, call [`poll_transmit`](Self::poll_transmit) (until it
/// returns false), [`poll_completion`](Self::poll_completion) and [`poll_event`](Self::poll_event)
/// (until they return `None`). With a shared receive queue there is one place for a completed receive:
/// take the completion before the next packet, or that may be dropped as if no request were posted.
#[derive(Debug)]
pub struct Qp {
    qpn: Qpn,
    config: QpConfig,
    port: Port,
    attr: Attr,
    sends: UnackedSends,
    /// With a shared receive queue: the one request taken from it and not yet reported.
    rq: RecvQueue,
    /// Where the buffers of receive requests are looked up.
    recv_pd: Pd,
    /// Number of the next packet.
    psn: Psn,
    counters: Counters,
    events: Events,
}

impl Qp {
    /// Creates a queue pair in RESET.
    #[must_use]
    pub fn new(qpn: Qpn, config: QpConfig, port: Port) -> Self {
        let (max_recv_wr, recv_pd) = config.receives();
        Qp {
            qpn,
            config,
            port,
            attr: Attr::default(),
            sends: UnackedSends::new(&config),
            rq: RecvQueue::new(max_recv_wr, config.max_recv_sge),
            recv_pd,
            psn: Psn::new(0),
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
            (QpState::Rtr, QpState::Rts) => self.psn = self.attr.sq_psn,
            // Whatever is begun is done, so the queue is drained at once.
            (QpState::Rts, QpState::Sqd) if self.attr.en_sqd_async_notify => {
                self.events.raise(AsyncEvent::SqDrained);
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
    /// Inline data are copied; other memory is read when the packet is built. In ERR and SQE the request
    /// is accepted and flushed, in SQD it waits for RTS.
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
        if !matches!(wr.op, SendOp::Datagram { .. }) {
            return Err(PostError::WrongService);
        }
        // The queue's own packet numbers are for messages of several packets.
        self.sends.sq.push(wr, Psn::new(0), usize::MAX)?;
        Ok(())
    }

    /// Takes back the last `count` send requests, queued since [`poll_transmit`](Self::poll_transmit)
    /// was last called.
    pub fn unpost_sends(&mut self, count: usize) {
        self.sends.sq.unpush(count);
    }

    /// Queues a receive request; in INIT it waits for RTR, in ERR it is flushed.
    ///
    /// Its buffers need room for the [GRH](crate::wire::GRH_LEN) and the message behind it.
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
        self.rq.push(wr)
    }

    /// Takes in a packet for this queue pair that came from `source` with a valid ICRC, and, if the
    /// configuration names one, the shared receive queue.
    pub fn handle_packet(
        &mut self,
        source: IpAddr,
        packet: &Packet<'_>,
        mem: &MrTable,
        srq: Option<&mut SharedReceiveQueue>,
    ) {
        self.counters.rcvd_pkts += 1;
        let count = match self.receive(source, packet, mem, srq) {
            Ok(()) => return,
            Err(Refusal::Unexpected) => &mut self.counters.dropped_pkts,
            Err(Refusal::QKey) => &mut self.counters.qkey_viol,
            Err(Refusal::NoReceive) => &mut self.counters.no_receive,
            Err(Refusal::TooLong) => &mut self.counters.too_long,
            Err(Refusal::ReceiveProtection) => return self.fail_receive(),
        };
        *count += 1;
    }

    /// Writes packets that are due into `tx`; true if `tx` filled up before all were written.
    pub fn poll_transmit(&mut self, mem: &MrTable, tx: &mut TxBuf) -> bool {
        while self.attr.state == QpState::Rts
            && let Some(position) = self.sends.next()
        {
            if tx.is_full() {
                return true;
            }
            match self.send(position, mem, tx) {
                Ok(()) => self.sends.sq.done += 1,
                Err(status) => {
                    self.sends.fail(status);
                    self.set_state(QpState::Sqe);
                }
            }
        }
        false
    }

    /// Takes the next completion.
    ///
    /// Completions of one queue come in the order in which its requests were posted.
    pub fn poll_completion(&mut self) -> Option<(Queue, Wc)> {
        if let Some((wqe, status)) = self.sends.poll_completion(self.attr.state) {
            return Some((Queue::Send, wqe.wc(status, self.qpn, self.attr.dest_qpn)));
        }
        let wqe = if self.attr.state == QpState::Err {
            self.rq.pop_flushed()
        } else {
            self.rq.pop_done()
        }?;
        Some((Queue::Recv, wqe.wc(self.qpn, self.attr.dest_qpn)))
    }

    /// Takes the next asynchronous event.
    pub fn poll_event(&mut self) -> Option<AsyncEvent> {
        self.events.take()
    }

    fn receive(
        &mut self,
        source: IpAddr,
        packet: &Packet<'_>,
        mem: &MrTable,
        srq: Option<&mut SharedReceiveQueue>,
    ) -> Result<(), Refusal> {
        let deth = self.expected(packet).ok_or(Refusal::Unexpected)?;
        if deth.qkey != self.attr.qkey && !is_injected(Fault::IgnoreQKey) {
            return Err(Refusal::QKey);
        }
        let payload = received(packet);
        let byte_len = GRH_LEN + payload.len();
        if let Some(srq) = srq {
            self.take_shared(srq, byte_len as u64)?;
        }
        let position = self.rq.peek().ok_or(Refusal::NoReceive)?;
        if byte_len as u64 > self.rq.capacity_of(position) {
            return Err(Refusal::TooLong);
        }
        let grh = grh(source, self.port.address, packet);
        let pd = self.recv_pd;
        self.rq
            .write(position, 0, &grh, mem, pd)
            .and_then(|()| self.rq.write(position, GRH_LEN as u64, payload, mem, pd))
            .map_err(|_| Refusal::ReceiveProtection)?;
        self.rq.take();
        let done = RecvDone {
            status: WcStatus::Success,
            opcode: WcOpcode::Recv,
            byte_len: u32::try_from(byte_len).expect("a packet is short"),
            imm: packet.headers.imm,
            invalidated: None,
            datagram_from: Some(deth.src_qp),
            is_solicited: packet.headers.bth.is_solicited,
        };
        self.rq.complete(position, done);
        Ok(())
    }

    /// Makes the oldest shared receive request this queue pair's own, if `byte_len` bytes fit it.
    fn take_shared(&mut self, srq: &mut SharedReceiveQueue, byte_len: u64) -> Result<(), Refusal> {
        let wr = srq.peek().ok_or(Refusal::NoReceive)?;
        if byte_len > sge::total_len(wr.sges) {
            return Err(Refusal::TooLong);
        }
        self.rq.push(&wr).map_err(|_| Refusal::NoReceive)?;
        srq.take();
        Ok(())
    }

    /// The datagram header of a packet that this queue pair may receive in its present state.
    fn expected(&self, packet: &Packet<'_>) -> Option<Deth> {
        let state_takes_it = match self.attr.state {
            QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe => true,
            QpState::Reset | QpState::Init | QpState::Err => false,
        };
        let fits = packet.payload.len() <= self.port.mtu.bytes() && packet.is_padded_right();
        packet.headers.deth.filter(|_| {
            state_takes_it && fits && pkey_matches(DEFAULT_PKEY, packet.headers.bth.pkey)
        })
    }

    fn fail_receive(&mut self) {
        if let Some(position) = self.rq.peek() {
            let done = RecvDone {
                status: WcStatus::LocProtErr,
                ..RecvDone::default()
            };
            self.rq.complete(position, done);
        }
        self.enter_error();
    }

    /// Sends the request at `position`, or tells why it fails.
    fn send(&mut self, position: u64, mem: &MrTable, tx: &mut TxBuf) -> Result<(), WcStatus> {
        let wqe = *self.sends.sq.wqe(position);
        let SendOp::Datagram { to, imm } = wqe.op else {
            return Err(WcStatus::LocQpOpErr);
        };
        if to.pd != self.config.pd {
            return Err(WcStatus::LocQpOpErr);
        }
        // C10-93.1.1: a message longer than the port's MTU is not sent, and that is no error.
        if wqe.len as usize <= self.port.mtu.bytes() {
            let headers = self.headers(&wqe, to, imm);
            let (sq, pd) = (&self.sends.sq, self.config.pd);
            let is_built = tx.push(to.address, &headers, wqe.len as usize, |payload| {
                sq.read(position, 0, payload, mem, pd).is_ok()
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
        }
        self.psn = self.psn.next();
        Ok(())
    }

    fn headers(&self, wqe: &SendWqe, to: Destination, imm: Option<[u8; 4]>) -> Headers {
        let opcode = match imm {
            None => Opcode::UdSendOnly,
            Some(_) => Opcode::UdSendOnlyImm,
        };
        let mut headers = Headers::new(opcode, to.qpn, self.psn);
        headers.bth.is_solicited = wqe.flags.contains(SendFlags::SOLICITED);
        headers.imm = imm;
        headers.deth = Some(Deth {
            qkey: if to.qkey & OWN_QKEY == 0 {
                to.qkey
            } else {
                self.attr.qkey
            },
            src_qp: self.qpn,
        });
        headers
    }

    fn enter_error(&mut self) {
        self.set_state(QpState::Err);
        if self.config.srq.is_some() {
            self.events.raise_last_wqe_reached();
        }
    }

    fn set_state(&mut self, state: QpState) {
        self.attr.state = state;
        self.attr.cur_state = state;
    }

    fn reset(&mut self) {
        self.sends.clear();
        self.rq.clear();
        self.events.clear();
    }
}

/// The message that a datagram brings, all of it unless a fault is injected.
fn received<'a>(packet: &Packet<'a>) -> &'a [u8] {
    let torn = if is_injected(Fault::TearDatagram) {
        4
    } else {
        0
    };
    &packet.payload[..packet.payload.len().saturating_sub(torn)]
}
