//! What the responder sends: READ and atomic responses, ACKs and NAKs; and what it repeats.
//!
//! Responses go out in PSN order, and an ACK or NAK only behind all of them: it would tell the
//! requester that they are lost.
//!
//! A plain ACK goes behind the requests of this side, if there are any, so that one send carries
//! both; see [`AckTime`] for when it waits for them.

use super::resources::{Answer, Resource};
use super::responder::{HELD_PACKETS_MAX, Reply, Responder, response_count};
use super::{AckTime, Context};
use crate::link::{Note, TxBuf};
use crate::mr_table::{AccessFlags, Key};
use crate::qp::Attr;
use crate::wire::{Aeth, Headers, NakCode, Opcode, Operation, Packet, Psn, Reth, Syndrome};
use crate::work::AsyncEvent;

impl Responder {
    /// Answers a request that was executed before. Nothing but what is to be sent changes.
    pub(super) fn repeat(&mut self, ctx: &mut Context<'_>, packet: &Packet<'_>) {
        ctx.counters.duplicate_request += 1;
        let psn = packet.headers.bth.psn;
        match packet.headers.bth.opcode.info().operation {
            Operation::Read => {
                if let Some(reth) = packet.headers.reth {
                    self.repeat_read(psn, reth, ctx.attr);
                }
            }
            Operation::Atomic => {
                if let Some(resource) = self.resources.find(psn)
                    && matches!(resource.answer, Answer::Atomic { .. })
                {
                    resource.replay(psn, psn.next(), 0);
                }
            }
            // C9-105: acknowledged again with the latest PSN. A NAK that is due says as much.
            _ => {
                let end = self.expected;
                let until = self.resources.first_between(psn, end).unwrap_or(end);
                self.acknowledge_again(until.prev());
            }
        }
    }

    /// A repeated request is covered by an ACK at `psn`, which is not past a READ or atomic: its response may
    /// be lost, and kernel rxe would take the ACK for it.
    fn acknowledge_again(&mut self, psn: Psn) {
        match self.reply {
            None => self.reply = Some(Reply::AckAgain(psn)),
            Some(Reply::AckAgain(due)) if due.is_before(psn) => {
                self.reply = Some(Reply::AckAgain(psn));
            }
            Some(_) => {}
        }
    }

    /// Sends part of a READ again if it lies inside what was asked for then.
    fn repeat_read(&mut self, psn: Psn, reth: Reth, attr: &Attr) {
        let Some(resource) = self.resources.find(psn) else {
            return;
        };
        let Answer::Read { va, rkey, len } = resource.answer else {
            return;
        };
        let skipped = byte_offset(resource, psn, attr);
        let until_byte = u64::from(skipped) + u64::from(reth.dma_len);
        let lies_inside = reth.va == va.wrapping_add(skipped.into()) && until_byte <= len.into();
        if let (true, Key(key), Ok(until_byte)) = (lies_inside, rkey, u32::try_from(until_byte))
            && key == reth.rkey
        {
            resource.replay(psn, psn + response_count(reth.dma_len, attr), until_byte);
        }
    }

    /// Writes all that cannot wait into `tx`; true if `tx` filled up before.
    pub(super) fn transmit(&mut self, ctx: &mut Context<'_>, tx: &mut TxBuf) -> bool {
        let msn = self.msn;
        while let Some(resource) = self.resources.active() {
            if tx.is_full() {
                return true;
            }
            if send_response(resource, msn, ctx, tx) {
                continue;
            }
            // The key was good when the request came, and is not any more. A repetition may be a
            // stray packet that nobody waits for, so it ends in silence.
            let (psn, is_replay) = (resource.next, resource.is_replay);
            resource.next = resource.until;
            if !is_replay {
                self.resources.deactivate();
                self.refuse_for_good(psn, NakCode::RemoteAccess, Some(AsyncEvent::QpAccessErr));
            }
        }
        if self.reply == Some(Reply::Ack) && self.unanswered < HELD_PACKETS_MAX {
            return false;
        }
        self.transmit_reply(ctx, tx)
    }

    /// Writes the ACK that is due, or holds it; true if `tx` filled up before.
    ///
    /// For a turn in which [`transmit`](Self::transmit) has written everything.
    pub(super) fn transmit_ack(
        &mut self,
        ctx: &mut Context<'_>,
        tx: &mut TxBuf,
        time: AckTime,
    ) -> bool {
        let may_wait = time == AckTime::WithNextTurn && self.reply == Some(Reply::Ack);
        if may_wait && tx.is_empty() && !self.is_ack_held {
            self.is_ack_held = true;
            return false;
        }
        self.transmit_reply(ctx, tx)
    }

    fn transmit_reply(&mut self, ctx: &mut Context<'_>, tx: &mut TxBuf) -> bool {
        let Some(reply) = self.reply else {
            return false;
        };
        if matches!(reply, Reply::Nak(..)) && self.has_closed_gap {
            if !self.send_reply(Reply::Ack, ctx, tx) {
                return true;
            }
            self.has_closed_gap = false;
        }
        if !self.send_reply(reply, ctx, tx) {
            return true;
        }
        self.drop_reply();
        false
    }

    /// Sends an ACK or NAK; false if `tx` is full.
    fn send_reply(&self, reply: Reply, ctx: &mut Context<'_>, tx: &mut TxBuf) -> bool {
        if tx.is_full() {
            return false;
        }
        let (psn, syndrome) = match reply {
            Reply::Ack => (self.expected.prev(), Syndrome::ACK),
            Reply::AckAgain(psn) => (psn, Syndrome::ACK),
            Reply::Nak(psn, syndrome) => (psn, syndrome),
        };
        let mut headers = Headers::new(Opcode::Acknowledge, ctx.attr.dest_qpn, psn);
        headers.aeth = Some(Aeth {
            syndrome,
            msn: self.msn,
        });
        ctx.counters.sent_pkts += 1;
        tx.push(ctx.attr.remote, &headers, 0, |_| true);
        tx.note(answer_note(ctx, false));
        true
    }
}

fn answer_note(ctx: &Context<'_>, is_retry: bool) -> Note {
    Note {
        qpn: ctx.qpn,
        wr_id: None,
        is_retry,
    }
}

/// Sends the next response of `resource`; false if its bytes are not to be had.
fn send_response(resource: &mut Resource, msn: u32, ctx: &mut Context<'_>, tx: &mut TxBuf) -> bool {
    let attr = ctx.attr;
    let psn = resource.next;
    let aeth = Some(Aeth {
        syndrome: Syndrome::ACK,
        msn,
    });
    let is_sent = match resource.answer {
        Answer::Atomic { original } => {
            let mut headers = Headers::new(Opcode::AtomicAcknowledge, attr.dest_qpn, psn);
            headers.aeth = aeth;
            headers.atomic_ack = Some(original);
            tx.push(attr.remote, &headers, 0, |_| true)
        }
        Answer::Read { va, rkey, .. } => {
            let is_last = psn.next() == resource.until;
            let opcode = read_response_opcode(resource.is_stream_start, is_last);
            let mut headers = Headers::new(opcode, attr.dest_qpn, psn);
            headers.aeth = aeth.filter(|_| opcode != Opcode::ReadResponseMiddle);
            let start = byte_offset(resource, psn, attr);
            let len = (resource.until_byte - start) as usize;
            let len = len.min(attr.path_mtu.bytes());
            tx.push(attr.remote, &headers, len, |payload| {
                let at = va.wrapping_add(start.into());
                let access = AccessFlags::REMOTE_READ;
                // C9-88: a READ of no bytes needs no key.
                payload.is_empty()
                    || ctx
                        .mem
                        .check_remote(rkey, (ctx.pd, ctx.qpn), at, len as u64, access)
                        .is_ok_and(|slice| {
                            slice.copy_to(payload);
                            true
                        })
            })
        }
    };
    if is_sent {
        tx.note(answer_note(ctx, resource.is_replay));
        ctx.counters.sent_pkts += 1;
        resource.next = psn.next();
        resource.is_stream_start = false;
    }
    is_sent
}

fn read_response_opcode(is_first: bool, is_last: bool) -> Opcode {
    match (is_first, is_last) {
        (true, true) => Opcode::ReadResponseOnly,
        (true, false) => Opcode::ReadResponseFirst,
        (false, false) => Opcode::ReadResponseMiddle,
        (false, true) => Opcode::ReadResponseLast,
    }
}

/// Where the response at `psn` starts in the bytes of its READ.
fn byte_offset(resource: &Resource, psn: Psn, attr: &Attr) -> u32 {
    let mtu = u32::try_from(attr.path_mtu.bytes()).expect("an MTU is small");
    psn.distance(resource.first).unsigned_abs() * mtu
}
