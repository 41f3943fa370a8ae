//! What queue pairs of every service have: attributes, states, queues and events.

mod attr;
pub(crate) mod events;
pub(crate) mod inbound;
pub(crate) mod local;
pub(crate) mod queue;
pub(crate) mod segment;
pub(crate) mod sge;
pub(crate) mod unacked;

pub(crate) use attr::Transition;
pub use attr::{Attr, AttrMask, InvalidTransition, MAX_RD_ATOMIC, Mtu, QpState};

use crate::mr_table::Pd;
use crate::srq::SrqRef;

/// What a queue pair is created with; all limits are allocated at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QpConfig {
    /// Protection domain of the queue pair.
    pub pd: Pd,
    /// Send requests that may be posted and not yet completed.
    pub max_send_wr: usize,
    /// Receive requests that may be posted and not yet completed; of no meaning with `srq`.
    pub max_recv_wr: usize,
    /// Pieces per send request.
    pub max_send_sge: usize,
    /// Pieces per receive request; with `srq`, per request of that queue.
    pub max_recv_sge: usize,
    /// Inline bytes per send request.
    pub max_inline: usize,
    /// Whether every send request is signalled.
    pub sq_sig_all: bool,
    /// Most packets that may be unanswered, however well the path does.
    pub window_max: u32,
    /// The shared receive queue that its receive requests come from, if it has none of its own.
    pub srq: Option<SrqRef>,
}

impl QpConfig {
    /// Receive requests that the queue pair itself has room for, and where their buffers are looked up.
    pub(crate) fn receives(&self) -> (usize, Pd) {
        match self.srq {
            Some(srq) => (1, srq.pd),
            None => (self.max_recv_wr, self.pd),
        }
    }
}
