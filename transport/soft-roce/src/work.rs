//! Work requests and completions, with the numbers that verbs give them.

use std::fmt;
use std::net::IpAddr;

use bitflags::bitflags;
use thiserror::Error;

use crate::mr_table::{Bind, Key, Pd};
use crate::wire::Qpn;

/// Longest message in bytes (IBTA: 2^31).
pub const MAX_MESSAGE_LEN: u64 = 1 << 31;

/// One piece of a scattered buffer; laid out as `ibv_sge`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Sge {
    /// Address in the region's own (iova) space.
    pub addr: u64,
    /// Length in bytes.
    pub length: u32,
    /// Key of the region.
    pub lkey: Key,
}

bitflags! {
    /// What else a send request asks for, numbered as `ibv_send_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct SendFlags: u32 {
        /// Waits for all earlier READs and atomics to complete.
        const FENCE = 1;
        /// Produces a completion on success too.
        const SIGNALED = 2;
        /// Marks the peer's receive completion as solicited.
        const SOLICITED = 4;
    }
}

/// The operation of a send request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendOp {
    /// SEND, with immediate data in network order if given.
    Send {
        /// Immediate data, opaque.
        imm: Option<[u8; 4]>,
    },
    /// SEND that also invalidates the peer's memory window of type 2 with this key.
    SendInvalidate {
        /// The peer's key.
        rkey: Key,
    },
    /// SEND to any queue pair, on a queue pair for datagrams; with immediate data if given.
    Datagram {
        /// Who gets it.
        to: Destination,
        /// Immediate data, opaque.
        imm: Option<[u8; 4]>,
    },
    /// RDMA WRITE, with immediate data in network order if given.
    Write {
        /// Where the peer's region takes the data.
        remote: Remote,
        /// Immediate data, opaque; consumes a receive request at the peer.
        imm: Option<[u8; 4]>,
    },
    /// RDMA READ.
    Read {
        /// Where the peer's region yields the data.
        remote: Remote,
    },
    /// Atomic compare and swap of 8 bytes.
    CompareSwap {
        /// The peer's word.
        remote: Remote,
        /// Value that it must hold.
        compare: u64,
        /// Value that it then gets.
        swap: u64,
    },
    /// Atomic fetch and add of 8 bytes.
    FetchAdd {
        /// The peer's word.
        remote: Remote,
        /// What is added, wrapping.
        add: u64,
    },
    /// Binds a memory window of this side. Makes no packet.
    BindWindow(Bind),
    /// Revokes a memory window of type 2 of this side, when all earlier requests have completed. Makes
    /// no packet.
    LocalInvalidate {
        /// The window's key.
        rkey: Key,
    },
}

impl SendOp {
    /// Whether it is a READ or an atomic, limited by `max_rd_atomic`.
    #[must_use]
    pub fn is_rd_atomic(&self) -> bool {
        self.is_atomic() || matches!(self, SendOp::Read { .. })
    }

    /// Whether it is an atomic.
    #[must_use]
    pub fn is_atomic(&self) -> bool {
        matches!(self, SendOp::CompareSwap { .. } | SendOp::FetchAdd { .. })
    }

    /// Whether this side executes it by itself.
    #[must_use]
    pub fn is_local(&self) -> bool {
        matches!(self, SendOp::BindWindow(_) | SendOp::LocalInvalidate { .. })
    }

    /// The opcode of its completion.
    #[must_use]
    pub fn wc_opcode(&self) -> WcOpcode {
        match self {
            SendOp::Send { .. } | SendOp::SendInvalidate { .. } | SendOp::Datagram { .. } => {
                WcOpcode::Send
            }
            SendOp::Write { .. } => WcOpcode::RdmaWrite,
            SendOp::Read { .. } => WcOpcode::RdmaRead,
            SendOp::CompareSwap { .. } => WcOpcode::CompSwap,
            SendOp::FetchAdd { .. } => WcOpcode::FetchAdd,
            SendOp::BindWindow(_) => WcOpcode::BindMw,
            SendOp::LocalInvalidate { .. } => WcOpcode::LocalInv,
        }
    }
}

/// A place in a peer's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// Address in the region's own (iova) space.
    pub addr: u64,
    /// The peer's key of the region.
    pub rkey: Key,
}

/// Who gets a datagram: what an address handle says, the queue pair and its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// Protection domain of the address handle.
    pub pd: Pd,
    /// Its device.
    pub address: IpAddr,
    /// Its queue pair.
    pub qpn: Qpn,
    /// The key of that queue pair; with the highest bit set, the sender's own stands for it.
    pub qkey: u32,
}

/// The local side of a send request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data<'a> {
    /// Registered memory; read when a packet is built, again when it is resent.
    Gather(&'a [Sge]),
    /// Bytes copied into the request at once (SEND and WRITE only).
    Inline(&'a [u8]),
}

/// A request for the send queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendWr<'a> {
    /// The application's name for it.
    pub wr_id: u64,
    /// What to do.
    pub op: SendOp,
    /// Local source, or destination for READ and atomics.
    pub data: Data<'a>,
    /// See [`SendFlags`].
    pub flags: SendFlags,
}

/// A request for the receive queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecvWr<'a> {
    /// The application's name for it.
    pub wr_id: u64,
    /// Where a SEND is placed.
    pub sges: &'a [Sge],
}

/// Why a request was not posted; the queue is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PostError {
    /// The queue holds its maximum of requests (`ENOMEM`).
    #[error("the queue is full: poll completions, then post again")]
    Full,
    /// The queue pair's state does not allow posting (`EINVAL`).
    #[error("the queue pair does not take such requests in this state")]
    InvalidState,
    /// More pieces than the queue pair was created for (`EINVAL`).
    #[error("{count} scatter/gather elements where the queue pair allows {max}")]
    TooManySge {
        /// Pieces given.
        count: usize,
        /// Pieces allowed.
        max: usize,
    },
    /// More inline bytes than the queue pair was created for (`EINVAL`).
    #[error("{len} bytes inline where the queue pair allows {max}")]
    InlineTooLong {
        /// Bytes given.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// READ or atomic with inline data (`EINVAL`).
    #[error("READ and atomics cannot be inline: they deliver into registered memory")]
    InlineNotAllowed,
    /// More than [`MAX_MESSAGE_LEN`] bytes (`EINVAL`).
    #[error("a message of {len} bytes exceeds {MAX_MESSAGE_LEN}")]
    MessageTooLong {
        /// Bytes in all pieces together.
        len: u64,
    },
    /// An atomic whose local length is not 8 or whose address is no multiple of 8 (`EINVAL`).
    #[error("an atomic works on 8 aligned bytes: local length {len}, remote address {addr:#x}")]
    BadAtomic {
        /// Local bytes.
        len: u64,
        /// Remote address.
        addr: u64,
    },
    /// A receive request on a queue pair with a shared receive queue (`EINVAL`).
    #[error("the queue pair takes its receives from a shared queue: post them there")]
    SharedReceives,
    /// A datagram on a connection, anything else on a queue pair for datagrams, or what needs answers on an
    /// unreliable connection (`EINVAL`).
    #[error("the queue pair's service does not have this operation")]
    WrongService,
    /// READ or atomic on a queue pair whose `max_rd_atomic` is 0 (`EINVAL`).
    #[error("READ and atomics need max_rd_atomic above 0: set it when moving to RTS")]
    RdAtomicDisabled,
}

/// The queue that a completion belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queue {
    /// The send queue.
    Send,
    /// The receive queue.
    Recv,
}

/// How a request ended, numbered as `ibv_wc_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WcStatus {
    /// Done.
    Success = 0,
    /// A receive buffer too small, or a READ response of another length than asked.
    LocLenErr = 1,
    /// The queue pair could not process the request.
    LocQpOpErr = 2,
    /// A local key, right or range is wrong.
    LocProtErr = 4,
    /// The queue pair is in ERR; the request was not executed, or its outcome is unknown.
    WrFlushErr = 5,
    /// A memory window could not be bound.
    MwBindErr = 6,
    /// The peer answered something that makes no sense here.
    BadRespErr = 7,
    /// The peer found the request invalid.
    RemInvReqErr = 9,
    /// The peer refused the access.
    RemAccessErr = 10,
    /// The peer could not complete the request.
    RemOpErr = 11,
    /// No answer after all retries.
    RetryExcErr = 12,
    /// The peer had no receive request after all retries.
    RnrRetryExcErr = 13,
}

/// What a completion reports on, numbered as `ibv_wc_opcode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WcOpcode {
    /// SEND.
    Send = 0,
    /// RDMA WRITE.
    RdmaWrite = 1,
    /// RDMA READ.
    RdmaRead = 2,
    /// Compare and swap.
    CompSwap = 3,
    /// Fetch and add.
    FetchAdd = 4,
    /// A memory window was bound or unbound.
    BindMw = 5,
    /// A memory window was revoked.
    LocalInv = 6,
    /// A SEND arrived.
    Recv = 128,
    /// A WRITE with immediate arrived.
    RecvRdmaWithImm = 129,
}

/// A completion.
///
/// With a status other than success only `wr_id`, `status` and `qpn` mean anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wc {
    /// The request's name.
    pub wr_id: u64,
    /// How it ended.
    pub status: WcStatus,
    /// What it was.
    pub opcode: WcOpcode,
    /// Bytes received, read or written by the peer's WRITE with immediate.
    pub byte_len: u32,
    /// Immediate data in network order.
    pub imm: Option<[u8; 4]>,
    /// The key of this side that the peer's SEND has invalidated.
    pub invalidated: Option<Key>,
    /// The local queue pair.
    pub qpn: Qpn,
    /// The peer's queue pair.
    pub src_qp: Qpn,
    /// Whether the received data are behind a [GRH](crate::wire::GRH_LEN).
    pub has_grh: bool,
    /// Whether it wakes a completion queue armed for solicited events only.
    pub is_solicited: bool,
}

impl fmt::Display for Wc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Wc {
            wr_id,
            status,
            opcode,
            byte_len,
            qpn,
            ..
        } = self;
        write!(
            f,
            "qp={qpn:?} wr_id={wr_id:#x} {opcode:?} {status:?} len={byte_len}"
        )
    }
}

/// Something that happened to a queue pair, numbered as `ibv_event_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum AsyncEvent {
    /// The queue pair failed without a request to blame.
    QpFatal = 1,
    /// A peer's request was invalid; the queue pair is in ERR.
    QpReqErr = 2,
    /// A peer's request violated protection; the queue pair is in ERR.
    QpAccessErr = 3,
    /// The first packet arrived in RTR.
    CommEst = 4,
    /// In SQD, all begun requests have completed.
    SqDrained = 5,
    /// In ERR, the last receive request taken from the shared receive queue has completed.
    LastWqeReached = 16,
}
