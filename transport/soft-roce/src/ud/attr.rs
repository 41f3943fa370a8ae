//! The table of allowed transitions of a queue pair for datagrams.

use crate::qp::{AttrMask, QpState, Transition};

/// The rows of the IBTA's table for UD that take attributes of their own, or `None`.
pub(super) fn transition(from: QpState, to: QpState) -> Option<Transition> {
    use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
    type M = AttrMask;
    let row = |required, optional| Some(Transition { required, optional });
    match (from, to) {
        (_, Reset | Err) => row(M::empty(), M::empty()),
        (Reset, Init) => row(M::PKEY_INDEX | M::PORT | M::QKEY, M::empty()),
        (Init, Init) => row(M::empty(), M::PKEY_INDEX | M::PORT | M::QKEY),
        (Init, Rtr) => row(M::empty(), M::PKEY_INDEX | M::QKEY),
        (Rtr, Rts) => row(M::SQ_PSN, M::CUR_STATE | M::QKEY),
        (Rts | Sqd | Sqe, Rts) => row(M::empty(), M::CUR_STATE | M::QKEY),
        (Rts, Sqd) => row(M::empty(), M::EN_SQD_ASYNC_NOTIFY),
        (Sqd, Sqd) => row(M::empty(), M::PKEY_INDEX | M::QKEY),
        _ => None,
    }
}
