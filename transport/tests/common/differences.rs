//! Where kernel rxe departs from the specification, as far as tests can see: the one list of them.
//!
//! A test that meets one asks [`Difference::is_expected`] of the device, or tells it what it saw
//! ([`Difference::check`]). Both print the difference with its reason, and neither lets one pass that the
//! device should not have, or that it has no longer.

use std::io::Write;
use std::sync::Mutex;

use transport::Context;

/// Who made a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    /// The software device, which follows the specification.
    Soft,
    /// Kernel rxe, which has the differences below.
    Rxe,
    /// Another device. What it does where the specification leaves room is not known.
    Other,
}

impl Maker {
    pub(crate) fn of(context: &Context) -> Maker {
        /// `RXE_VENDOR_ID` of the Linux kernel.
        const RXE_VENDOR_ID: u32 = 0x00ff_ffff;
        if context.is_soft() {
            return Maker::Soft;
        }
        match context.attr().map(|attr| attr.vendor_id) {
            Ok(RXE_VENDOR_ID) => Maker::Rxe,
            _ => Maker::Other,
        }
    }
}

/// A way in which kernel rxe (6.1) is not as the specification has it, and the software device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    dead_code,
    reason = "not each of the suites that share the list meets them all"
)]
pub(crate) enum Difference {
    /// See [`Difference::text`], as for all.
    LongSendIsOperationError,
    NoAccessEvent,
    ReceiveInErrLeftAlone,
    PostInResetTaken,
}

impl Difference {
    /// What rxe does, instead of what, and why.
    fn text(self) -> &'static str {
        match self {
            Difference::LongSendIsOperationError => {
                "a SEND longer than its receive: NAK 63, REM_OP_ERR and LOC_QP_OP_ERR, not NAK 61, \
                 REM_INV_REQ_ERR and LOC_LEN_ERR; rxe_resp.c takes a receive that is too small for a \
                 malformed one"
            }
            Difference::NoAccessEvent => {
                "a refused access: no asynchronous event at the responder, not QP_ACCESS_ERR; rxe raises no \
                 such event"
            }
            Difference::ReceiveInErrLeftAlone => {
                "a receive posted in ERR: not flushed until something else happens, not at once; \
                 ibv_post_recv of the rxe provider does not tell the kernel"
            }
            Difference::PostInResetTaken => {
                "a request posted in RESET: taken into the queue, and the call fails without naming it, not \
                 refused; the rxe provider queues requests before the kernel looks at the state"
            }
        }
    }

    /// Whether a device of this maker has the difference, which is printed then.
    #[allow(
        dead_code,
        reason = "for suites that know what to expect before they look"
    )]
    pub(crate) fn is_expected(self, maker: Maker) -> bool {
        let is_expected = maker == Maker::Rxe;
        if is_expected {
            self.print();
        }
        is_expected
    }

    /// Takes what a test saw of the device.
    #[allow(dead_code, reason = "for suites that look first")]
    pub(crate) fn check(self, maker: Maker, is_seen: bool) {
        match maker {
            Maker::Soft => assert!(!is_seen, "the software device departs: {}", self.text()),
            Maker::Rxe => assert!(
                is_seen,
                "rxe departs no longer; take it out of the list: {}",
                self.text()
            ),
            Maker::Other => {}
        }
        if is_seen {
            self.print();
        }
    }

    /// Prints it, once, past the test harness, which shows the output of failed tests only.
    fn print(self) {
        static PRINTED: Mutex<Vec<Difference>> = Mutex::new(Vec::new());
        let mut printed = PRINTED
            .lock()
            .expect("nothing panics while it holds the list");
        if printed.contains(&self) {
            return;
        }
        printed.push(self);
        let _ = writeln!(std::io::stderr(), "difference: {}", self.text());
    }
}
