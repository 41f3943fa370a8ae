//! The table of allowed transitions of a reliable connection.

use crate::qp::{AttrMask, QpState, Transition};

/// The rows of the IBTA's table for RC that take attributes of their own, or `None`.
pub(super) fn transition(from: QpState, to: QpState) -> Option<Transition> {
    use QpState::{Err, Init, Reset, Rtr, Rts, Sqd};
    type M = AttrMask;
    let row = |required, optional| Some(Transition { required, optional });
    let alternate = M::ALT_PATH.union(M::PATH_MIG_STATE);
    let steady = M::CUR_STATE
        .union(M::ACCESS_FLAGS)
        .union(M::MIN_RNR_TIMER)
        .union(alternate);
    match (from, to) {
        (_, Reset | Err) => row(M::empty(), M::empty()),
        (Reset, Init) => row(M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS, M::empty()),
        (Init, Init) => row(M::empty(), M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS),
        (Init, Rtr) => row(
            M::AV
                | M::PATH_MTU
                | M::DEST_QPN
                | M::RQ_PSN
                | M::MAX_DEST_RD_ATOMIC
                | M::MIN_RNR_TIMER,
            M::ALT_PATH | M::ACCESS_FLAGS | M::PKEY_INDEX,
        ),
        (Rtr, Rts) => row(
            M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::SQ_PSN | M::MAX_QP_RD_ATOMIC,
            steady,
        ),
        (Rts, Rts) | (Sqd, Rts) => row(M::empty(), steady),
        (Rts, Sqd) => row(M::empty(), M::EN_SQD_ASYNC_NOTIFY),
        (Sqd, Sqd) => row(
            M::empty(),
            M::PORT
                | M::AV
                | M::TIMEOUT
                | M::RETRY_CNT
                | M::RNR_RETRY
                | M::MAX_QP_RD_ATOMIC
                | M::MAX_DEST_RD_ATOMIC
                | M::ACCESS_FLAGS
                | M::PKEY_INDEX
                | M::MIN_RNR_TIMER
                | alternate,
        ),
        _ => None,
    }
}
