//! Deliberate faults: each breaks one promise of the device, so that a test can show that the
//! simulation notices.
//!
//! They exist in test builds only, are off there too unless the thread [`inject`]s one, and are
//! constants in every other build: there the compiler sees `if false`. (The other way would be to
//! patch a copy of the sources. It leaves no line in them, but patches rot unseen, and each takes a
//! build of its own.)

/// What may be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// An atomic that comes again is executed again.
    RepeatAtomic,
    /// A region ends one byte later than registered.
    OneByteBeyond,
    /// A WRITE is acknowledged, and placed some packets later.
    AckBeforeWrite,
    /// A queue pair in ERR keeps what was posted to itself.
    ForgetFlush,
    /// Responses are compared by their PSN as if numbers did not wrap.
    PlainPsnOrder,
    /// Deregistering leaves the key as it is.
    IgnoreRevocation,
    /// Invalidating leaves a window as it is.
    IgnoreRevokedWindow,
    /// A request does not wait for the READs before it.
    IgnoreFence,
    /// A SEND or WRITE packet that comes again is executed again.
    RepeatWrite,
    /// Datagrams are let in whatever their Q_Key.
    IgnoreQKey,
    /// A datagram loses its last four bytes.
    TearDatagram,
    /// What a queue pair takes from a shared receive queue stays there for others.
    ShareTwice,
    /// A queue pair in SQD begins what is posted.
    IgnoreDrain,
    /// RESET leaves posted requests in the send queue.
    KeepPosted,
    /// A completion queue that has overrun drops completions, and nobody is told.
    OverrunInSilence,
    /// After an RNR NAK the request is repeated at once.
    ShortRnrWait,
    /// A SEND that invalidates a key leaves it as it is.
    SendWithoutInvalidation,
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn is_injected(_fault: Fault) -> bool {
    false
}

#[cfg(test)]
pub(crate) use injection::{ALL, inject, is_injected};

#[cfg(test)]
mod injection {
    use std::cell::Cell;

    use super::Fault;

    /// Every fault there is.
    pub(crate) const ALL: [Fault; 17] = [
        Fault::RepeatAtomic,
        Fault::OneByteBeyond,
        Fault::AckBeforeWrite,
        Fault::ForgetFlush,
        Fault::PlainPsnOrder,
        Fault::IgnoreRevocation,
        Fault::IgnoreRevokedWindow,
        Fault::IgnoreFence,
        Fault::RepeatWrite,
        Fault::IgnoreQKey,
        Fault::TearDatagram,
        Fault::ShareTwice,
        Fault::IgnoreDrain,
        Fault::KeepPosted,
        Fault::OverrunInSilence,
        Fault::ShortRnrWait,
        Fault::SendWithoutInvalidation,
    ];

    thread_local! {
        static INJECTED: Cell<Option<Fault>> = const { Cell::new(None) };
    }

    /// Breaks this thread's devices while `body` runs.
    pub(crate) fn inject<T>(fault: Fault, body: impl FnOnce() -> T) -> T {
        INJECTED.set(Some(fault));
        let result = body();
        INJECTED.set(None);
        result
    }

    pub(crate) fn is_injected(fault: Fault) -> bool {
        INJECTED.get() == Some(fault)
    }
}
