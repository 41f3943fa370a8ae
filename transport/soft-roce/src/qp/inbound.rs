//! What connections receive: the message in progress, its checks, and where its bytes go.
//!
//! Each check is a step of a responder: it lets the packet pass or gives the [`Refusal`], of which
//! the responder knows what it means for the peer and for the queue pair.

use super::queue::{RecvDone, RecvQueue};
use super::{Attr, QpConfig};
use crate::faults::{Fault, is_injected};
use crate::mr_table::{AccessFlags, Key, MrTable, Pd};
use crate::srq::SharedReceiveQueue;
use crate::wire::{Operation, Packet, Qpn, Reth};
use crate::work::{MAX_MESSAGE_LEN, WcOpcode, WcStatus};

/// Why a request of the peer is not executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
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

/// The message that is being received, when it has more than one packet.
#[derive(Debug, Clone, Copy)]
enum Message {
    Send {
        received: u32,
    },
    Write {
        va: u64,
        rkey: Key,
        total: u32,
        received: u32,
    },
}

/// The receive requests of a connection and the message that fills them, or a region.
///
/// A SEND in progress fills the oldest receive request, which is taken when the message is complete.
#[derive(Debug)]
pub(crate) struct Inbound {
    /// With a shared receive queue: the one request taken from it and not yet reported.
    pub(crate) rq: RecvQueue,
    /// Where the buffers of receive requests are looked up.
    recv_pd: Pd,
    message: Option<Message>,
}

impl Inbound {
    pub(crate) fn new(config: &QpConfig) -> Self {
        let (max_recv_wr, recv_pd) = config.receives();
        Inbound {
            rq: RecvQueue::new(max_recv_wr, config.max_recv_sge),
            recv_pd,
            message: None,
        }
    }

    /// Whether a message was begun whose last packet has not come.
    pub(crate) fn is_in_message(&self) -> bool {
        self.message.is_some()
    }

    /// Gives the message in progress up. Its receive request waits for the next one, or to be flushed.
    pub(crate) fn abandon(&mut self) {
        self.message = None;
    }

    /// A message is not left before its last packet, and not entered but by its first.
    pub(crate) fn check_op_seq(&self, packet: &Packet<'_>) -> Result<(), Refusal> {
        let info = packet.headers.bth.opcode.info();
        let fits = match self.message {
            None => info.is_first,
            Some(Message::Send { .. }) => info.operation == Operation::Send && !info.is_first,
            Some(Message::Write { .. }) => info.operation == Operation::Write && !info.is_first,
        };
        if fits { Ok(()) } else { Err(Refusal::Invalid) }
    }

    /// Some packets need a receive request, their own or from the shared queue.
    pub(crate) fn check_receive(
        &mut self,
        srq: Option<&mut SharedReceiveQueue>,
        packet: &Packet<'_>,
    ) -> Result<(), Refusal> {
        if packet.headers.bth.opcode.info().takes_receive {
            self.take_shared(srq);
            self.rq.peek().ok_or(Refusal::NotReady)?;
        }
        Ok(())
    }

    /// Makes the oldest shared receive request this queue pair's own, if there is one and it has room.
    /// It ends in use by this queue pair, now or later, or in ERR, which completes it.
    fn take_shared(&mut self, srq: Option<&mut SharedReceiveQueue>) {
        if let Some(srq) = srq
            && let Some(wr) = srq.peek()
            && self.rq.push(&wr).is_ok()
        {
            srq.take();
        }
    }

    /// C9-88, C9-94: each packet has the length its place demands, and the sum is as announced.
    pub(crate) fn check_length(&self, packet: &Packet<'_>, attr: &Attr) -> Result<(), Refusal> {
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
            Some(Message::Send { received }) => received.into(),
            _ => 0,
        };
        let capacity = self
            .rq
            .peek()
            .map_or(0, |position| self.rq.capacity_of(position));
        // A SEND does not announce its length, so the limit on messages is kept here too.
        if received + len > capacity.min(MAX_MESSAGE_LEN) {
            return Err(Refusal::TooLong);
        }
        Ok(())
    }

    /// Places the bytes of a SEND. The last packet completes the receive request, and may invalidate
    /// a window of the queue pair `owner`.
    pub(crate) fn execute_send(
        &mut self,
        packet: &Packet<'_>,
        mem: &mut MrTable,
        (pd, qpn): (Pd, Qpn),
    ) -> Result<(), Refusal> {
        let position = self.rq.peek().ok_or(Refusal::NotReady)?;
        let received = match self.message {
            Some(Message::Send { received }) => received,
            _ => 0,
        };
        self.rq
            .write(position, received.into(), packet.payload, mem, self.recv_pd)
            .map_err(|_| Refusal::ReceiveProtection)?;
        let received = received + payload_len(packet);
        self.message = Some(Message::Send { received });
        if packet.headers.bth.opcode.info().is_last {
            if let Some(rkey) = packet.headers.ieth
                && !is_injected(Fault::SendWithoutInvalidation)
            {
                mem.invalidate(Key(rkey), pd, qpn)
                    .map_err(|_| Refusal::Invalidation)?;
            }
            self.message = None;
            self.complete_receive(position, WcOpcode::Recv, received, packet);
        }
        Ok(())
    }

    /// Places the bytes of a WRITE where the queue pair `owner` may be written through its key.
    pub(crate) fn execute_write(
        &mut self,
        packet: &Packet<'_>,
        mem: &MrTable,
        owner: (Pd, Qpn),
    ) -> Result<(), Refusal> {
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
            mem.check_remote(rkey, owner, at, len, AccessFlags::REMOTE_WRITE)
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
        self.rq.take();
        self.rq.complete(position, done);
    }

    /// Ends the receive request that the message fills, or the next one would, with an error.
    pub(crate) fn fail_receive(&mut self, status: WcStatus) {
        if let Some(position) = self.rq.peek() {
            self.rq.complete(
                position,
                RecvDone {
                    status,
                    ..RecvDone::default()
                },
            );
        }
    }
}

/// The whole range of a WRITE or READ is accessible before anything of it is executed.
pub(crate) fn check_rkey(
    packet: &Packet<'_>,
    mem: &MrTable,
    owner: (Pd, Qpn),
) -> Result<(), Refusal> {
    let Some(Reth { va, rkey, dma_len }) = packet.headers.reth else {
        return Ok(());
    };
    let access = match packet.headers.bth.opcode.info().operation {
        Operation::Read => AccessFlags::REMOTE_READ,
        _ => AccessFlags::REMOTE_WRITE,
    };
    // C9-88: without bytes, neither key nor address is looked at.
    if dma_len == 0
        || mem
            .check_remote(Key(rkey), owner, va, dma_len.into(), access)
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

fn payload_len(packet: &Packet<'_>) -> u32 {
    u32::try_from(packet.payload.len()).expect("a packet is short")
}
