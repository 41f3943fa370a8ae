//! The table of allowed transitions of an unreliable connection.

use crate::qp::{AttrMask, QpState, Transition};

/// The rows of the IBTA's table for UC that take attributes of their own, or `None`.
pub(super) fn transition(from: QpState, to: QpState) -> Option<Transition> {
    use QpState::{Err, Init, Reset, Rtr, Rts, Sqd, Sqe};
    type M = AttrMask;
    let row = |required, optional| Some(Transition { required, optional });
    let alternate = M::ALT_PATH.union(M::PATH_MIG_STATE);
    let steady = M::CUR_STATE.union(M::ACCESS_FLAGS).union(alternate);
    match (from, to) {
        (_, Reset | Err) => row(M::empty(), M::empty()),
        (Reset, Init) => row(M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS, M::empty()),
        (Init, Init) => row(M::empty(), M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS),
        (Init, Rtr) => row(
            M::AV | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN,
            M::ALT_PATH | M::ACCESS_FLAGS | M::PKEY_INDEX,
        ),
        (Rtr, Rts) => row(M::SQ_PSN, steady),
        (Rts | Sqd, Rts) => row(M::empty(), steady),
        (Sqe, Rts) => row(M::empty(), M::CUR_STATE | M::ACCESS_FLAGS),
        (Rts, Sqd) => row(M::empty(), M::EN_SQD_ASYNC_NOTIFY),
        (Sqd, Sqd) => row(
            M::empty(),
            M::AV | M::ACCESS_FLAGS | M::PKEY_INDEX | alternate,
        ),
        _ => None,
    }
}
