//! Which attributes each transition needs and allows.
//!
//! Devices answer a wrong request with `EINVAL` and no more. This table finds out what was meant by it:
//! IBTA vol. 1, 11.2.5.2 "Modify Queue Pair", as the Linux kernel has it for RC, UC and UD.

use std::fmt;

use rdma_core_bindings::*;

use crate::types::QpState;

/// What is wrong with a request to a queue pair, as far as can be told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnosis {
    problems: Vec<String>,
}

impl Diagnosis {
    pub(crate) fn add(&mut self, problem: String) {
        self.problems.push(problem);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// The findings, one each.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.problems.is_empty() {
            return f
                .write_str("every attribute looks right, so the device has reasons of its own");
        }
        f.write_str(&self.problems.join(", "))
    }
}

struct Transition {
    from: QpState,
    to: QpState,
    required: u32,
    optional: u32,
}

const RC_TRANSITIONS: [Transition; 8] = [
    Transition {
        from: QpState::Reset,
        to: QpState::Init,
        required: IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
        optional: 0,
    },
    Transition {
        from: QpState::Init,
        to: QpState::Init,
        required: 0,
        optional: IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
    },
    Transition {
        from: QpState::Init,
        to: QpState::Rtr,
        required: IBV_QP_AV
            | IBV_QP_PATH_MTU
            | IBV_QP_DEST_QPN
            | IBV_QP_RQ_PSN
            | IBV_QP_MAX_DEST_RD_ATOMIC
            | IBV_QP_MIN_RNR_TIMER,
        optional: IBV_QP_ALT_PATH | IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX,
    },
    Transition {
        from: QpState::Rtr,
        to: QpState::Rts,
        required: IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_SQ_PSN
            | IBV_QP_MAX_QP_RD_ATOMIC,
        optional: IBV_QP_CUR_STATE
            | IBV_QP_ALT_PATH
            | IBV_QP_ACCESS_FLAGS
            | IBV_QP_MIN_RNR_TIMER
            | IBV_QP_PATH_MIG_STATE,
    },
    Transition {
        from: QpState::Rts,
        to: QpState::Rts,
        required: 0,
        optional: IBV_QP_CUR_STATE
            | IBV_QP_ACCESS_FLAGS
            | IBV_QP_ALT_PATH
            | IBV_QP_PATH_MIG_STATE
            | IBV_QP_MIN_RNR_TIMER,
    },
    Transition {
        from: QpState::Rts,
        to: QpState::Sqd,
        required: 0,
        optional: IBV_QP_EN_SQD_ASYNC_NOTIFY,
    },
    Transition {
        from: QpState::Sqd,
        to: QpState::Sqd,
        required: 0,
        optional: IBV_QP_PORT
            | IBV_QP_AV
            | IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_MAX_QP_RD_ATOMIC
            | IBV_QP_MAX_DEST_RD_ATOMIC
            | IBV_QP_ALT_PATH
            | IBV_QP_ACCESS_FLAGS
            | IBV_QP_PKEY_INDEX
            | IBV_QP_MIN_RNR_TIMER
            | IBV_QP_PATH_MIG_STATE,
    },
    Transition {
        from: QpState::Sqd,
        to: QpState::Rts,
        required: 0,
        optional: IBV_QP_CUR_STATE
            | IBV_QP_ALT_PATH
            | IBV_QP_ACCESS_FLAGS
            | IBV_QP_MIN_RNR_TIMER
            | IBV_QP_PATH_MIG_STATE,
    },
];

const UC_TRANSITIONS: [Transition; 9] = [
    Transition {
        from: QpState::Reset,
        to: QpState::Init,
        required: IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
        optional: 0,
    },
    Transition {
        from: QpState::Init,
        to: QpState::Init,
        required: 0,
        optional: IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
    },
    Transition {
        from: QpState::Init,
        to: QpState::Rtr,
        required: IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN,
        optional: IBV_QP_ALT_PATH | IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX,
    },
    Transition {
        from: QpState::Rtr,
        to: QpState::Rts,
        required: IBV_QP_SQ_PSN,
        optional: UC_STEADY,
    },
    Transition {
        from: QpState::Rts,
        to: QpState::Rts,
        required: 0,
        optional: UC_STEADY,
    },
    Transition {
        from: QpState::Rts,
        to: QpState::Sqd,
        required: 0,
        optional: IBV_QP_EN_SQD_ASYNC_NOTIFY,
    },
    Transition {
        from: QpState::Sqd,
        to: QpState::Sqd,
        required: 0,
        optional: IBV_QP_AV
            | IBV_QP_ALT_PATH
            | IBV_QP_ACCESS_FLAGS
            | IBV_QP_PKEY_INDEX
            | IBV_QP_PATH_MIG_STATE,
    },
    Transition {
        from: QpState::Sqd,
        to: QpState::Rts,
        required: 0,
        optional: UC_STEADY,
    },
    Transition {
        from: QpState::Sqe,
        to: QpState::Rts,
        required: 0,
        optional: IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS,
    },
];

/// What may be given with every step to RTS but the one from SQE.
const UC_STEADY: u32 =
    IBV_QP_CUR_STATE | IBV_QP_ALT_PATH | IBV_QP_ACCESS_FLAGS | IBV_QP_PATH_MIG_STATE;

const UD_TRANSITIONS: [Transition; 9] = [
    Transition {
        from: QpState::Reset,
        to: QpState::Init,
        required: IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY,
        optional: 0,
    },
    Transition {
        from: QpState::Init,
        to: QpState::Init,
        required: 0,
        optional: IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY,
    },
    Transition {
        from: QpState::Init,
        to: QpState::Rtr,
        required: 0,
        optional: IBV_QP_PKEY_INDEX | IBV_QP_QKEY,
    },
    Transition {
        from: QpState::Rtr,
        to: QpState::Rts,
        required: IBV_QP_SQ_PSN,
        optional: IBV_QP_CUR_STATE | IBV_QP_QKEY,
    },
    Transition {
        from: QpState::Rts,
        to: QpState::Rts,
        required: 0,
        optional: IBV_QP_CUR_STATE | IBV_QP_QKEY,
    },
    Transition {
        from: QpState::Rts,
        to: QpState::Sqd,
        required: 0,
        optional: IBV_QP_EN_SQD_ASYNC_NOTIFY,
    },
    Transition {
        from: QpState::Sqd,
        to: QpState::Sqd,
        required: 0,
        optional: IBV_QP_PKEY_INDEX | IBV_QP_QKEY,
    },
    Transition {
        from: QpState::Sqd,
        to: QpState::Rts,
        required: 0,
        optional: IBV_QP_CUR_STATE | IBV_QP_QKEY,
    },
    Transition {
        from: QpState::Sqe,
        to: QpState::Rts,
        required: 0,
        optional: IBV_QP_CUR_STATE | IBV_QP_QKEY,
    },
];

fn transitions(qp_type: ibv_qp_type) -> &'static [Transition] {
    match qp_type {
        IBV_QPT_UC => &UC_TRANSITIONS,
        IBV_QPT_UD => &UD_TRANSITIONS,
        _ => &RC_TRANSITIONS,
    }
}

const ATTRIBUTES: [(u32, &str); 18] = [
    (IBV_QP_EN_SQD_ASYNC_NOTIFY, "EN_SQD_ASYNC_NOTIFY"),
    (IBV_QP_ACCESS_FLAGS, "ACCESS_FLAGS"),
    (IBV_QP_PKEY_INDEX, "PKEY_INDEX"),
    (IBV_QP_PORT, "PORT"),
    (IBV_QP_QKEY, "QKEY"),
    (IBV_QP_AV, "AV"),
    (IBV_QP_PATH_MTU, "PATH_MTU"),
    (IBV_QP_TIMEOUT, "TIMEOUT"),
    (IBV_QP_RETRY_CNT, "RETRY_CNT"),
    (IBV_QP_RNR_RETRY, "RNR_RETRY"),
    (IBV_QP_RQ_PSN, "RQ_PSN"),
    (IBV_QP_MAX_QP_RD_ATOMIC, "MAX_QP_RD_ATOMIC"),
    (IBV_QP_ALT_PATH, "ALT_PATH"),
    (IBV_QP_MIN_RNR_TIMER, "MIN_RNR_TIMER"),
    (IBV_QP_SQ_PSN, "SQ_PSN"),
    (IBV_QP_MAX_DEST_RD_ATOMIC, "MAX_DEST_RD_ATOMIC"),
    (IBV_QP_PATH_MIG_STATE, "PATH_MIG_STATE"),
    (IBV_QP_DEST_QPN, "DEST_QPN"),
];

/// Holds a request against the table.
pub(super) fn diagnose(qp_type: ibv_qp_type, from: QpState, to: QpState, mask: u32) -> Diagnosis {
    let mut diagnosis = Diagnosis::default();
    let (required, optional) = match to {
        QpState::Reset | QpState::Err => (0, 0),
        _ => match transitions(qp_type)
            .iter()
            .find(|known| known.from == from && known.to == to)
        {
            Some(known) => (known.required, known.optional),
            None => {
                diagnosis.add(format!("a queue pair cannot go from {from} to {to}"));
                return diagnosis;
            }
        },
    };
    let missing = names(required & !mask);
    if !missing.is_empty() {
        diagnosis.add(format!("{missing} missing"));
    }
    let surplus = names(mask & !(required | optional | IBV_QP_STATE));
    if !surplus.is_empty() {
        diagnosis.add(format!("{surplus} not allowed"));
    }
    diagnosis
}

fn names(mask: u32) -> String {
    let named = ATTRIBUTES
        .iter()
        .filter(|(bit, _)| mask & bit != 0)
        .map(|(_, name)| *name);
    named.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_and_what_is_too_much() {
        let mask = IBV_QP_STATE | IBV_QP_PORT | IBV_QP_TIMEOUT;
        let diagnosis = diagnose(IBV_QPT_RC, QpState::Reset, QpState::Init, mask);
        let text = diagnosis.to_string();
        assert_eq!(text, "ACCESS_FLAGS PKEY_INDEX missing, TIMEOUT not allowed");
    }

    #[test]
    fn forbidden_transitions_are_named() {
        let diagnosis = diagnose(IBV_QPT_RC, QpState::Reset, QpState::Rts, IBV_QP_STATE);
        assert_eq!(
            diagnosis.to_string(),
            "a queue pair cannot go from RESET to RTS"
        );
    }

    #[test]
    fn every_allowed_request_is_without_findings() {
        let all = [IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD]
            .into_iter()
            .flat_map(|qp_type| {
                transitions(qp_type)
                    .iter()
                    .map(move |known| (qp_type, known))
            });
        for (qp_type, known) in all {
            for mask in [known.required, known.required | known.optional] {
                let diagnosis = diagnose(qp_type, known.from, known.to, mask | IBV_QP_STATE);
                assert!(
                    diagnosis.is_empty(),
                    "{} to {}: {diagnosis}",
                    known.from,
                    known.to
                );
            }
        }
        for from in [
            QpState::Reset,
            QpState::Init,
            QpState::Rtr,
            QpState::Rts,
            QpState::Err,
        ] {
            for to in [QpState::Reset, QpState::Err] {
                assert!(diagnose(IBV_QPT_RC, from, to, IBV_QP_STATE).is_empty());
            }
        }
    }
}
