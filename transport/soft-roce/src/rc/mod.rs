//! The reliable-connection protocol: one queue pair as a state machine.

mod attr;
mod counters;
mod work;

pub use attr::{Attr, AttrMask, InvalidTransition, MAX_RD_ATOMIC, Mtu, QpState};
pub use counters::Counters;
pub use work::{
    AsyncEvent, Data, MAX_MESSAGE_LEN, PostError, Queue, RecvWr, Remote, SendFlags, SendOp, SendWr,
    Sge, Wc, WcOpcode, WcStatus,
};

use crate::mr_table::Pd;

/// What a queue pair is created with; all limits are allocated at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QpConfig {
    /// Protection domain of the queue pair.
    pub pd: Pd,
    /// Send requests that may be posted and not yet completed.
    pub max_send_wr: usize,
    /// Receive requests that may be posted and not yet completed.
    pub max_recv_wr: usize,
    /// Pieces per send request.
    pub max_send_sge: usize,
    /// Pieces per receive request.
    pub max_recv_sge: usize,
    /// Inline bytes per send request.
    pub max_inline: usize,
    /// Whether every send request is signalled.
    pub sq_sig_all: bool,
    /// Most packets that may be unanswered, however well the path does.
    pub window_max: u32,
}
