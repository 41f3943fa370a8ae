//! What only the sender knows about a packet, for a capture to say.

use std::fmt;

use crate::wire::Qpn;

/// Whose packet it is, and why it is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Note {
    /// The local queue pair, which the packet does not name.
    pub qpn: Qpn,
    /// The work request that it belongs to; `None` for what answers the peer.
    pub wr_id: Option<u64>,
    /// It was sent before: a retransmission, or the answer to one.
    pub is_retry: bool,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qp={:#08x}", self.qpn.get())?;
        if let Some(wr_id) = self.wr_id {
            write!(f, " wr_id={wr_id:#x}")?;
        }
        if self.is_retry {
            f.write_str(" retry")?;
        }
        Ok(())
    }
}
