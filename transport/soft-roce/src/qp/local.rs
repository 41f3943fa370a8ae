//! Requests that a queue pair executes by itself: binding and revoking memory windows.

use crate::mr_table::{MrTable, Pd};
use crate::wire::Qpn;
use crate::work::{SendOp, WcStatus};

/// Executes a request of the queue pair `owner`.
pub(crate) fn execute(
    op: &SendOp,
    mem: &mut MrTable,
    (pd, qpn): (Pd, Qpn),
) -> Result<(), WcStatus> {
    match op {
        SendOp::BindWindow(bind) => mem.bind_window(bind, pd, qpn).map_err(|error| {
            tracing::debug!(qp = qpn.get(), %error, "window not bound");
            WcStatus::MwBindErr
        }),
        SendOp::LocalInvalidate { rkey } => mem.invalidate(*rkey, pd, qpn).map_err(|error| {
            tracing::debug!(qp = qpn.get(), %error, "key not invalidated");
            WcStatus::LocQpOpErr
        }),
        _ => Ok(()),
    }
}
