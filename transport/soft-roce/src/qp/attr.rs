//! Queue pair states and attributes, and how a transition table judges a change.

use std::net::{IpAddr, Ipv6Addr};

use bitflags::bitflags;
use thiserror::Error;

use crate::mr_table::AccessFlags;
use crate::wire::{Psn, Qpn};

/// State of a queue pair, numbered as `ibv_qp_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum QpState {
    /// As new.
    Reset = 0,
    /// Takes receive requests.
    Init = 1,
    /// Ready to receive: answers the peer.
    Rtr = 2,
    /// Ready to send.
    Rts = 3,
    /// Send queue draining: finishes what was begun.
    Sqd = 4,
    /// Send queue error, for datagrams only: sends are flushed, receives go on.
    Sqe = 5,
    /// Error: everything posted is flushed.
    Err = 6,
}

/// Path MTU: payload bytes of a full packet, numbered as `ibv_mtu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Mtu {
    /// 256 bytes.
    Mtu256 = 1,
    /// 512 bytes.
    Mtu512 = 2,
    /// 1024 bytes.
    Mtu1024 = 3,
    /// 2048 bytes.
    Mtu2048 = 4,
    /// 4096 bytes.
    Mtu4096 = 5,
}

impl Mtu {
    /// The variant that verbs number `value`.
    #[must_use]
    pub fn from_verbs(value: u32) -> Option<Self> {
        use Mtu::{Mtu256, Mtu512, Mtu1024, Mtu2048, Mtu4096};
        [Mtu256, Mtu512, Mtu1024, Mtu2048, Mtu4096]
            .into_iter()
            .find(|mtu| *mtu as u32 == value)
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        128 << self as usize
    }
}

impl QpState {
    /// The variant that verbs number `value`.
    #[must_use]
    pub fn from_verbs(value: u32) -> Option<Self> {
        use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
        [Reset, Init, Rtr, Rts, Sqd, Sqe, Err]
            .into_iter()
            .find(|state| *state as u32 == value)
    }
}

bitflags! {
    /// Which attributes a `modify` carries, numbered as `ibv_qp_attr_mask`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct AttrMask: u32 {
        /// `state`; the state stays as it is if absent.
        const STATE = 1;
        /// `cur_state`.
        const CUR_STATE = 1 << 1;
        /// `en_sqd_async_notify`.
        const EN_SQD_ASYNC_NOTIFY = 1 << 2;
        /// `access`.
        const ACCESS_FLAGS = 1 << 3;
        /// `pkey_index`.
        const PKEY_INDEX = 1 << 4;
        /// `port`.
        const PORT = 1 << 5;
        /// `qkey`; not for RC.
        const QKEY = 1 << 6;
        /// `remote`.
        const AV = 1 << 7;
        /// `path_mtu`.
        const PATH_MTU = 1 << 8;
        /// `timeout`.
        const TIMEOUT = 1 << 9;
        /// `retry_cnt`.
        const RETRY_CNT = 1 << 10;
        /// `rnr_retry`.
        const RNR_RETRY = 1 << 11;
        /// `rq_psn`.
        const RQ_PSN = 1 << 12;
        /// `max_rd_atomic`.
        const MAX_QP_RD_ATOMIC = 1 << 13;
        /// Accepted where the table lists it, and ignored: there is one path.
        const ALT_PATH = 1 << 14;
        /// `min_rnr_timer`.
        const MIN_RNR_TIMER = 1 << 15;
        /// `sq_psn`.
        const SQ_PSN = 1 << 16;
        /// `max_dest_rd_atomic`.
        const MAX_DEST_RD_ATOMIC = 1 << 17;
        /// Accepted where the table lists it, and ignored: there is one path.
        const PATH_MIG_STATE = 1 << 18;
        /// Not changeable.
        const CAP = 1 << 19;
        /// `dest_qpn`.
        const DEST_QPN = 1 << 20;
        /// Every other bit is refused.
        const _ = !0;
    }
}

/// Attributes of a queue pair, as set by `modify` and seen by `query`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// State to move to, or the present one.
    pub state: QpState,
    /// The state the caller believes the queue pair is in.
    pub cur_state: QpState,
    /// Operations that peers may request on this queue pair.
    pub access: AccessFlags,
    /// Index in the partition key table; 0 is the only one.
    pub pkey_index: u16,
    /// Port; 1 is the only one.
    pub port: u8,
    /// Payload of a full packet.
    pub path_mtu: Mtu,
    /// What datagrams must carry to be received.
    pub qkey: u32,
    /// The peer's queue pair.
    pub dest_qpn: Qpn,
    /// The peer's address.
    pub remote: IpAddr,
    /// First PSN expected.
    pub rq_psn: Psn,
    /// First PSN sent.
    pub sq_psn: Psn,
    /// READs and atomics that may be outstanding here, at most [`MAX_RD_ATOMIC`].
    pub max_rd_atomic: u8,
    /// READs and atomics that the peer may have outstanding, at most [`MAX_RD_ATOMIC`].
    pub max_dest_rd_atomic: u8,
    /// Timer code sent with RNR NAKs, 0 to 31.
    pub min_rnr_timer: u8,
    /// Retransmission timeout 4.096 us * 2^n, n in 0 to 31, 0 meaning never.
    pub timeout: u8,
    /// Retries without progress, 0 to 7; 7 means seven.
    pub retry_cnt: u8,
    /// RNR retries, 0 to 6; 7 means without end.
    pub rnr_retry: u8,
    /// Whether moving to SQD raises `SqDrained`.
    pub en_sqd_async_notify: bool,
}

/// Largest `max_rd_atomic` and `max_dest_rd_atomic`, as kernel rxe has it: programs give each end of a
/// connection as many as their own device has, so less than the usual would be too little for the other.
pub const MAX_RD_ATOMIC: u8 = 128;

impl Default for Attr {
    /// A queue pair in RESET.
    fn default() -> Self {
        Attr {
            state: QpState::Reset,
            cur_state: QpState::Reset,
            access: AccessFlags::empty(),
            pkey_index: 0,
            port: 1,
            path_mtu: Mtu::Mtu4096,
            qkey: 0,
            dest_qpn: Qpn::new(0),
            remote: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            rq_psn: Psn::new(0),
            sq_psn: Psn::new(0),
            max_rd_atomic: 0,
            max_dest_rd_atomic: 0,
            min_rnr_timer: 0,
            timeout: 0,
            retry_cnt: 0,
            rnr_retry: 0,
            en_sqd_async_notify: false,
        }
    }
}

/// Why a `modify` was refused (`EINVAL`); the queue pair is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InvalidTransition {
    /// `cur_state` is not the present state.
    #[error("the queue pair is in {actual:?}, not {claimed:?}")]
    WrongCurrentState {
        /// The present state.
        actual: QpState,
        /// What the caller gave.
        claimed: QpState,
    },
    /// The table has no such transition.
    #[error("a queue pair cannot go from {from:?} to {to:?}")]
    NoSuchTransition {
        /// The present state.
        from: QpState,
        /// The state asked for.
        to: QpState,
    },
    /// Required attributes are missing.
    #[error("{from:?} to {to:?} needs {missing:?} too")]
    Missing {
        /// The present state.
        from: QpState,
        /// The state asked for.
        to: QpState,
        /// What must be added.
        missing: AttrMask,
    },
    /// Attributes that this transition does not take.
    #[error("{from:?} to {to:?} does not take {unexpected:?}")]
    Unexpected {
        /// The present state.
        from: QpState,
        /// The state asked for.
        to: QpState,
        /// What must be left out.
        unexpected: AttrMask,
    },
    /// An attribute is out of its range.
    #[error("the value of {0:?} is out of range")]
    OutOfRange(AttrMask),
}

/// One row of the transition table: what must, and what may, be given besides `STATE`.
pub(crate) struct Transition {
    pub(crate) required: AttrMask,
    pub(crate) optional: AttrMask,
}

/// A transition table: the row between two states, or `None`.
pub(crate) type TransitionTable = fn(QpState, QpState) -> Option<Transition>;

impl Attr {
    /// The attributes that result from a `modify` of a queue pair with this transition table.
    ///
    /// # Errors
    ///
    /// [`InvalidTransition`] if the table or a range forbids it.
    pub(crate) fn modified(
        &self,
        table: TransitionTable,
        attr: &Attr,
        mask: AttrMask,
    ) -> Result<Attr, InvalidTransition> {
        let from = self.state;
        let to = if mask.contains(AttrMask::STATE) {
            attr.state
        } else {
            from
        };
        let row = table(from, to).ok_or(InvalidTransition::NoSuchTransition { from, to })?;
        let given = mask.difference(AttrMask::STATE);
        let missing = row.required.difference(given);
        if !missing.is_empty() {
            return Err(InvalidTransition::Missing { from, to, missing });
        }
        let unexpected = given.difference(row.required | row.optional);
        if !unexpected.is_empty() {
            return Err(InvalidTransition::Unexpected {
                from,
                to,
                unexpected,
            });
        }
        if mask.contains(AttrMask::CUR_STATE) && attr.cur_state != from {
            let claimed = attr.cur_state;
            return Err(InvalidTransition::WrongCurrentState {
                actual: from,
                claimed,
            });
        }
        let out_of_range = attr.out_of_range() & mask;
        if !out_of_range.is_empty() {
            return Err(InvalidTransition::OutOfRange(out_of_range));
        }
        if to == QpState::Reset {
            return Ok(Attr::default());
        }
        Ok(Attr {
            state: to,
            cur_state: to,
            ..self.overlaid(attr, mask)
        })
    }

    /// The attributes whose values are out of range, given or not.
    fn out_of_range(&self) -> AttrMask {
        let checks = [
            (self.port != 1, AttrMask::PORT),
            (self.pkey_index != 0, AttrMask::PKEY_INDEX),
            (self.timeout > 31, AttrMask::TIMEOUT),
            (self.retry_cnt > 7, AttrMask::RETRY_CNT),
            (self.rnr_retry > 7, AttrMask::RNR_RETRY),
            (self.min_rnr_timer > 31, AttrMask::MIN_RNR_TIMER),
            (
                self.max_rd_atomic > MAX_RD_ATOMIC,
                AttrMask::MAX_QP_RD_ATOMIC,
            ),
            (
                self.max_dest_rd_atomic > MAX_RD_ATOMIC,
                AttrMask::MAX_DEST_RD_ATOMIC,
            ),
        ];
        checks
            .into_iter()
            .filter_map(|(is_wrong, attribute)| is_wrong.then_some(attribute))
            .fold(AttrMask::empty(), AttrMask::union)
    }

    /// These attributes with those of `mask` taken from `new`.
    fn overlaid(&self, new: &Attr, mask: AttrMask) -> Attr {
        fn pick<T>(is_given: bool, new: T, old: T) -> T {
            if is_given { new } else { old }
        }
        let given = |attribute| mask.contains(attribute);
        Attr {
            state: self.state,
            cur_state: self.cur_state,
            access: pick(given(AttrMask::ACCESS_FLAGS), new.access, self.access),
            pkey_index: pick(given(AttrMask::PKEY_INDEX), new.pkey_index, self.pkey_index),
            port: pick(given(AttrMask::PORT), new.port, self.port),
            path_mtu: pick(given(AttrMask::PATH_MTU), new.path_mtu, self.path_mtu),
            qkey: pick(given(AttrMask::QKEY), new.qkey, self.qkey),
            dest_qpn: pick(given(AttrMask::DEST_QPN), new.dest_qpn, self.dest_qpn),
            remote: pick(given(AttrMask::AV), new.remote, self.remote),
            rq_psn: pick(given(AttrMask::RQ_PSN), new.rq_psn, self.rq_psn),
            sq_psn: pick(given(AttrMask::SQ_PSN), new.sq_psn, self.sq_psn),
            max_rd_atomic: pick(
                given(AttrMask::MAX_QP_RD_ATOMIC),
                new.max_rd_atomic,
                self.max_rd_atomic,
            ),
            max_dest_rd_atomic: pick(
                given(AttrMask::MAX_DEST_RD_ATOMIC),
                new.max_dest_rd_atomic,
                self.max_dest_rd_atomic,
            ),
            min_rnr_timer: pick(
                given(AttrMask::MIN_RNR_TIMER),
                new.min_rnr_timer,
                self.min_rnr_timer,
            ),
            timeout: pick(given(AttrMask::TIMEOUT), new.timeout, self.timeout),
            retry_cnt: pick(given(AttrMask::RETRY_CNT), new.retry_cnt, self.retry_cnt),
            rnr_retry: pick(given(AttrMask::RNR_RETRY), new.rnr_retry, self.rnr_retry),
            en_sqd_async_notify: pick(
                given(AttrMask::EN_SQD_ASYNC_NOTIFY),
                new.en_sqd_async_notify,
                self.en_sqd_async_notify,
            ),
        }
    }
}
