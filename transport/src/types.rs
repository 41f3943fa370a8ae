//! Numbers, keys, masks and states of verbs as types of their own, so that no two can be swapped.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use rdma_core_bindings as ffi;

/// A queue pair number: 24 bits, chosen by the device.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Qpn(u32);

impl Qpn {
    /// The queue pair number `value`, or `None` if it needs more than 24 bits.
    pub const fn new(value: u32) -> Option<Qpn> {
        if value < 1 << 24 {
            Some(Qpn(value))
        } else {
            None
        }
    }

    /// The number as verbs functions take it.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// A number that the device itself reported; what exceeds 24 bits is cut off.
    pub(crate) const fn from_device(value: u32) -> Qpn {
        Qpn(value & 0x00ff_ffff)
    }
}

impl fmt::Debug for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qpn({:#x})", self.0)
    }
}

impl fmt::Display for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#08x}", self.0)
    }
}

/// A packet sequence number: 24 bits, compared modulo 2^24 on the wire, here only carried.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Psn(u32);

impl Psn {
    /// The sequence number `value`, or `None` if it needs more than 24 bits.
    pub const fn new(value: u32) -> Option<Psn> {
        if value < 1 << 24 {
            Some(Psn(value))
        } else {
            None
        }
    }

    /// The number as verbs functions take it.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// A random starting sequence number, so that packets of an earlier connection, or of somebody
    /// who guesses, are unlikely to fall into the window of this one.
    ///
    /// # Errors
    ///
    /// [`Error::Random`](crate::Error::Random) if the operating system has no random bytes to give.
    pub fn random() -> crate::Result<Psn> {
        let value = getrandom::u32().map_err(|cause| crate::Error::Random {
            cause: cause.to_string(),
        })?;
        Ok(Psn(value & 0x00ff_ffff))
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Psn({:#x})", self.0)
    }
}

/// The key by which this side's work requests name a registration.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lkey(pub u32);

impl fmt::Debug for Lkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lkey({:#x})", self.0)
    }
}

/// The key by which a peer's requests name a registration of this side.
///
/// Whoever knows it, and has a queue pair in the same protection domain, has the rights that were
/// granted at registration.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rkey(pub u32);

impl fmt::Debug for Rkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rkey({:#x})", self.0)
    }
}

/// The key of a queue pair for datagrams, which its senders must know.
///
/// A sender that names a key with the highest bit set sends the key of its own queue pair instead. (Kernel rxe
/// sends the key as it was named.)
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Qkey(pub u32);

impl fmt::Debug for Qkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Qkey({:#x})", self.0)
    }
}

/// Where a one-sided operation lands: an address in the peer's registration, and its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Address as the peer registered it (its `iova`), not an offset.
    pub addr: u64,
    /// The key that the peer granted.
    pub rkey: Rkey,
}

impl Remote {
    /// The same grant, `byte_offset` bytes further; wraps like the address arithmetic of the wire, and
    /// the responder checks the bounds.
    #[must_use]
    pub const fn at(self, byte_offset: u64) -> Remote {
        Remote {
            addr: self.addr.wrapping_add(byte_offset),
            rkey: self.rkey,
        }
    }
}

/// A path MTU: the most payload bytes one packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Mtu {
    /// 256 bytes.
    Mtu256 = 1,
    /// 512 bytes.
    Mtu512 = 2,
    /// 1024 bytes; what fits an Ethernet MTU of 1500.
    Mtu1024 = 3,
    /// 2048 bytes.
    Mtu2048 = 4,
    /// 4096 bytes.
    Mtu4096 = 5,
}

impl Mtu {
    /// The MTU with the verbs code `code` (1 to 5).
    pub const fn from_code(code: u32) -> Option<Mtu> {
        match code {
            ffi::IBV_MTU_256 => Some(Mtu::Mtu256),
            ffi::IBV_MTU_512 => Some(Mtu::Mtu512),
            ffi::IBV_MTU_1024 => Some(Mtu::Mtu1024),
            ffi::IBV_MTU_2048 => Some(Mtu::Mtu2048),
            ffi::IBV_MTU_4096 => Some(Mtu::Mtu4096),
            _ => None,
        }
    }

    /// The verbs code, 1 to 5.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The size in bytes.
    pub const fn bytes(self) -> usize {
        128 << self as u8
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes())
    }
}

/// A global identifier: 128 bits, on RoCE v2 an IPv6 or IPv4-mapped address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// The address that RoCE v2 puts into the IP header for this identifier.
    pub fn ip(self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.0);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }

    /// True for `::`, an empty slot of the table.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }

    /// True for an identifier made from an IPv4 address, `::ffff:a.b.c.d`.
    pub fn is_ipv4_mapped(self) -> bool {
        self.ip().is_ipv4()
    }

    /// True for `fe80::/10`, which reaches one link only.
    pub fn is_link_local(self) -> bool {
        self.0[0] == 0xfe && self.0[1] & 0xc0 == 0x80
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({})", Ipv6Addr::from(self.0))
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ipv6Addr::from(self.0).fmt(f)
    }
}

/// What a GID is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GidType {
    /// Native InfiniBand.
    Ib,
    /// RoCE v1: an Ethernet type of its own, not routable.
    RoceV1,
    /// RoCE v2: UDP port 4791.
    RoceV2,
    /// A type this version does not know.
    Unknown(u32),
}

impl GidType {
    pub(crate) const fn from_code(code: u32) -> GidType {
        match code {
            ffi::IBV_GID_TYPE_IB => GidType::Ib,
            ffi::IBV_GID_TYPE_ROCE_V1 => GidType::RoceV1,
            ffi::IBV_GID_TYPE_ROCE_V2 => GidType::RoceV2,
            other => GidType::Unknown(other),
        }
    }
}

impl fmt::Display for GidType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GidType::Ib => f.write_str("IB"),
            GidType::RoceV1 => f.write_str("RoCE v1"),
            GidType::RoceV2 => f.write_str("RoCE v2"),
            GidType::Unknown(code) => write!(f, "type {code}"),
        }
    }
}

bitflags::bitflags! {
    /// Rights of a registration or of a queue pair; `ibv_access_flags`.
    ///
    /// Local reading is always allowed. `REMOTE_WRITE` and `REMOTE_ATOMIC` need `LOCAL_WRITE` beside
    /// them at registration.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct AccessFlags: u32 {
        /// The device may write here for this side's own requests (receives, READ results).
        const LOCAL_WRITE = ffi::IBV_ACCESS_LOCAL_WRITE;
        /// Peers may write by RDMA WRITE.
        const REMOTE_WRITE = ffi::IBV_ACCESS_REMOTE_WRITE;
        /// Peers may read by RDMA READ.
        const REMOTE_READ = ffi::IBV_ACCESS_REMOTE_READ;
        /// Peers may use FETCH_ADD and CMP_SWAP.
        const REMOTE_ATOMIC = ffi::IBV_ACCESS_REMOTE_ATOMIC;
        /// Memory windows may be bound to the registration.
        const MW_BIND = ffi::IBV_ACCESS_MW_BIND;
    }

    /// Flags of a send work request; `ibv_send_flags`. Inline is chosen by the source, not here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct SendFlags: u32 {
        /// Wait until all earlier READs and atomics of this queue have completed.
        const FENCE = ffi::IBV_SEND_FENCE;
        /// Generate a completion on success. Failures always generate one.
        const SIGNALED = ffi::IBV_SEND_SIGNALED;
        /// Wake a peer that armed its completion queue for solicited events only.
        const SOLICITED = ffi::IBV_SEND_SOLICITED;
    }
}

/// State of a queue pair; `ibv_qp_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QpState {
    /// As created: nothing may be posted.
    Reset,
    /// Receives may be posted; nothing is processed.
    Init,
    /// Ready to receive: inbound requests are answered.
    Rtr,
    /// Ready to send.
    Rts,
    /// Send queue drained: new send requests are held back.
    Sqd,
    /// Send queue error, on queue pairs for datagrams: sends are flushed, receives go on.
    Sqe,
    /// Everything posted completes with [`WcStatus::WrFlushErr`].
    Err,
    /// A state this version does not know.
    Unknown(u32),
}

impl QpState {
    pub(crate) const fn from_code(code: u32) -> QpState {
        match code {
            ffi::IBV_QPS_RESET => QpState::Reset,
            ffi::IBV_QPS_INIT => QpState::Init,
            ffi::IBV_QPS_RTR => QpState::Rtr,
            ffi::IBV_QPS_RTS => QpState::Rts,
            ffi::IBV_QPS_SQD => QpState::Sqd,
            ffi::IBV_QPS_SQE => QpState::Sqe,
            ffi::IBV_QPS_ERR => QpState::Err,
            other => QpState::Unknown(other),
        }
    }

    pub(crate) const fn code(self) -> u32 {
        match self {
            QpState::Reset => ffi::IBV_QPS_RESET,
            QpState::Init => ffi::IBV_QPS_INIT,
            QpState::Rtr => ffi::IBV_QPS_RTR,
            QpState::Rts => ffi::IBV_QPS_RTS,
            QpState::Sqd => ffi::IBV_QPS_SQD,
            QpState::Sqe => ffi::IBV_QPS_SQE,
            QpState::Err => ffi::IBV_QPS_ERR,
            QpState::Unknown(other) => other,
        }
    }
}

impl fmt::Display for QpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QpState::Reset => f.write_str("RESET"),
            QpState::Init => f.write_str("INIT"),
            QpState::Rtr => f.write_str("RTR"),
            QpState::Rts => f.write_str("RTS"),
            QpState::Sqd => f.write_str("SQD"),
            QpState::Sqe => f.write_str("SQE"),
            QpState::Err => f.write_str("ERR"),
            QpState::Unknown(code) => write!(f, "state {code}"),
        }
    }
}

/// How a work request ended; `ibv_wc_status`. What a failed request did to memory is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WcStatus {
    /// Done as asked.
    Success,
    /// 1: a message was longer than the receive buffer, or the request longer than a message may be.
    LocLenErr,
    /// 2: the local queue pair could not execute the request.
    LocQpOpErr,
    /// 4: a local key, range or right does not fit the request.
    LocProtErr,
    /// 5: the queue pair was in ERR before the request was executed; its outcome is unknown.
    WrFlushErr,
    /// 6: a memory window could not be bound.
    MwBindErr,
    /// 7: an unexpected response.
    BadRespErr,
    /// 8: a local access error while data were placed.
    LocAccessErr,
    /// 9: the responder refused the request as invalid: operation not enabled, length or order wrong.
    RemInvReqErr,
    /// 10: the responder refused the key: unknown, revoked, out of bounds, or without the right.
    RemAccessErr,
    /// 11: the responder could not execute the request.
    RemOpErr,
    /// 12: no answer after all retries: the peer or its queue pair is gone.
    RetryExcErr,
    /// 13: the peer had no receive posted, after all RNR retries.
    RnrRetryExcErr,
    /// 16: the responder aborted the request.
    RemAbortErr,
    /// 19: the device failed.
    FatalErr,
    /// 20: the response timed out.
    RespTimeoutErr,
    /// 21: another error.
    GeneralErr,
    /// A status this version has no name for.
    Unknown(u32),
}

const WC_STATUSES: [(u32, WcStatus); 17] = [
    (ffi::IBV_WC_SUCCESS, WcStatus::Success),
    (ffi::IBV_WC_LOC_LEN_ERR, WcStatus::LocLenErr),
    (ffi::IBV_WC_LOC_QP_OP_ERR, WcStatus::LocQpOpErr),
    (ffi::IBV_WC_LOC_PROT_ERR, WcStatus::LocProtErr),
    (ffi::IBV_WC_WR_FLUSH_ERR, WcStatus::WrFlushErr),
    (ffi::IBV_WC_MW_BIND_ERR, WcStatus::MwBindErr),
    (ffi::IBV_WC_BAD_RESP_ERR, WcStatus::BadRespErr),
    (ffi::IBV_WC_LOC_ACCESS_ERR, WcStatus::LocAccessErr),
    (ffi::IBV_WC_REM_INV_REQ_ERR, WcStatus::RemInvReqErr),
    (ffi::IBV_WC_REM_ACCESS_ERR, WcStatus::RemAccessErr),
    (ffi::IBV_WC_REM_OP_ERR, WcStatus::RemOpErr),
    (ffi::IBV_WC_RETRY_EXC_ERR, WcStatus::RetryExcErr),
    (ffi::IBV_WC_RNR_RETRY_EXC_ERR, WcStatus::RnrRetryExcErr),
    (ffi::IBV_WC_REM_ABORT_ERR, WcStatus::RemAbortErr),
    (ffi::IBV_WC_FATAL_ERR, WcStatus::FatalErr),
    (ffi::IBV_WC_RESP_TIMEOUT_ERR, WcStatus::RespTimeoutErr),
    (ffi::IBV_WC_GENERAL_ERR, WcStatus::GeneralErr),
];

impl WcStatus {
    pub(crate) fn from_code(code: u32) -> WcStatus {
        if code == ffi::IBV_WC_SUCCESS {
            return WcStatus::Success;
        }
        WC_STATUSES
            .iter()
            .find(|(known, _)| *known == code)
            .map_or(WcStatus::Unknown(code), |(_, status)| *status)
    }

    /// The verbs number.
    pub fn code(self) -> u32 {
        match self {
            WcStatus::Unknown(code) => code,
            known => WC_STATUSES
                .iter()
                .find(|(_, status)| *status == known)
                .map_or(u32::MAX, |(code, _)| *code),
        }
    }

    /// True for [`WcStatus::Success`].
    pub fn is_success(self) -> bool {
        self == WcStatus::Success
    }
}

impl fmt::Display for WcStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            WcStatus::Success => "success",
            WcStatus::LocLenErr => "local length error",
            WcStatus::LocQpOpErr => "local queue pair operation error",
            WcStatus::LocProtErr => "local protection error",
            WcStatus::WrFlushErr => "flushed: the queue pair is in ERR",
            WcStatus::MwBindErr => "memory window bind error",
            WcStatus::BadRespErr => "unexpected response",
            WcStatus::LocAccessErr => "local access error",
            WcStatus::RemInvReqErr => "invalid request, says the peer",
            WcStatus::RemAccessErr => "access refused by the peer (key, range or right)",
            WcStatus::RemOpErr => "operation failed at the peer",
            WcStatus::RetryExcErr => "no answer after all retries",
            WcStatus::RnrRetryExcErr => "peer had no receive posted, after all retries",
            WcStatus::RemAbortErr => "aborted by the peer",
            WcStatus::FatalErr => "fatal device error",
            WcStatus::RespTimeoutErr => "response timeout",
            WcStatus::GeneralErr => "general error",
            WcStatus::Unknown(_) => "unknown error",
        };
        write!(f, "{text} (status {})", self.code())
    }
}

/// Which operation completed; `ibv_wc_opcode`. Valid in successful completions only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WcOpcode {
    /// A SEND, with or without immediate.
    Send,
    /// An RDMA WRITE, with or without immediate.
    RdmaWrite,
    /// An RDMA READ.
    RdmaRead,
    /// A CMP_SWAP.
    CompSwap,
    /// A FETCH_ADD.
    FetchAdd,
    /// The binding of a memory window, or the unbinding of one of type 1.
    BindMw,
    /// The revocation of a memory window of type 2.
    LocalInv,
    /// A receive consumed by a SEND.
    Recv,
    /// A receive consumed by an RDMA WRITE with immediate; the data are in the written region.
    RecvRdmaWithImm,
    /// An operation this version does not post.
    Unknown(u32),
}

impl WcOpcode {
    pub(crate) const fn from_code(code: u32) -> WcOpcode {
        match code {
            ffi::IBV_WC_SEND => WcOpcode::Send,
            ffi::IBV_WC_RDMA_WRITE => WcOpcode::RdmaWrite,
            ffi::IBV_WC_RDMA_READ => WcOpcode::RdmaRead,
            ffi::IBV_WC_COMP_SWAP => WcOpcode::CompSwap,
            ffi::IBV_WC_FETCH_ADD => WcOpcode::FetchAdd,
            ffi::IBV_WC_BIND_MW => WcOpcode::BindMw,
            ffi::IBV_WC_LOCAL_INV => WcOpcode::LocalInv,
            ffi::IBV_WC_RECV => WcOpcode::Recv,
            ffi::IBV_WC_RECV_RDMA_WITH_IMM => WcOpcode::RecvRdmaWithImm,
            other => WcOpcode::Unknown(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_24_bits() {
        assert_eq!(Qpn::new(0x00ff_ffff).map(Qpn::get), Some(0x00ff_ffff));
        assert_eq!(Qpn::new(0x0100_0000), None);
        assert_eq!(Psn::new(0x0100_0000), None);
        for _ in 0..64 {
            assert!(Psn::random().unwrap().get() < 1 << 24);
        }
    }

    #[test]
    fn mtu_codes_and_sizes() {
        for (code, bytes) in [(1, 256), (2, 512), (3, 1024), (4, 2048), (5, 4096)] {
            let mtu = Mtu::from_code(code).unwrap();
            assert_eq!((u32::from(mtu.code()), mtu.bytes()), (code, bytes));
        }
        assert_eq!(Mtu::from_code(0), None);
        assert_eq!(Mtu::from_code(6), None);
    }

    #[test]
    fn every_status_keeps_its_number() {
        for code in 0..64 {
            assert_eq!(WcStatus::from_code(code).code(), code);
        }
        assert_eq!(WcStatus::from_code(22), WcStatus::Unknown(22));
    }

    #[test]
    fn states_round_trip() {
        for code in 0..9 {
            assert_eq!(QpState::from_code(code).code(), code);
        }
    }

    #[test]
    fn gid_kinds() {
        let mapped = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 1, 2, 3]);
        assert!(mapped.is_ipv4_mapped());
        assert_eq!(mapped.ip().to_string(), "127.1.2.3");
        assert!(Gid([0; 16]).is_zero());
        let mut link_local = [0; 16];
        (link_local[0], link_local[1]) = (0xfe, 0x80);
        assert!(Gid(link_local).is_link_local());
        assert!(!Gid(link_local).is_ipv4_mapped());
    }
}
