//! Deliberate faults: each breaks one rule of replication, so that a test can show that the simulation
//! notices.
//!
//! They exist in test builds only, are off there too unless the thread [`inject`]s one, and are constants
//! in every other build: there the compiler sees `if false`.

/// What may be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A follower reads its tail without having revoked what it granted.
    NoFence,
    /// A follower reports, and grants to a new leader, before it has revoked and read its tail.
    GrantFirst,
    /// A leader counts a record as committed when one member of the ISR has it.
    AckBeforeAllIsr,
    /// A leader lets a proposed shrink count before it is agreed.
    HwOnProposedShrink,
    /// A leader lets a follower keep what diverges.
    NoTruncation,
    /// A high watermark runs one record ahead of the log.
    HwBeyondLeo,
    /// A node that has lost its memory counts as the member it was.
    MemberWithoutMemoryElected,
    /// A scan beyond the tail takes whatever continues the offsets.
    ScanUnchecked,
    /// Consumers and followers are not told that the log starts later.
    LogStartUntold,
    /// An image is let go that is not in the files.
    EvictUndrained,
    /// The leadership goes to a member of the ISR before that has everything.
    HandOverUnready,
    /// Memory is used again for an image as it is: a fault of what executes the engines' commands.
    #[cfg(test)]
    RecycledNotZeroed,
    /// A lane is replaced while the queue pair before it still takes what arrives: likewise.
    #[cfg(test)]
    OldQueuePairKept,
    /// Retention removes what is not committed: likewise.
    #[cfg(test)]
    RetentionBeyondHw,
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) const fn is_injected(_fault: Fault) -> bool {
    false
}

#[cfg(test)]
pub(crate) use injection::{ALL, OF_EXECUTION, inject, is_injected};

#[cfg(test)]
mod injection {
    use std::cell::Cell;

    use super::Fault;

    /// Every fault of the engines.
    pub(crate) const ALL: [Fault; 11] = [
        Fault::NoFence,
        Fault::GrantFirst,
        Fault::AckBeforeAllIsr,
        Fault::HwOnProposedShrink,
        Fault::NoTruncation,
        Fault::HwBeyondLeo,
        Fault::MemberWithoutMemoryElected,
        Fault::ScanUnchecked,
        Fault::LogStartUntold,
        Fault::EvictUndrained,
        Fault::HandOverUnready,
    ];

    /// Those of what executes the engines' commands.
    pub(crate) const OF_EXECUTION: [Fault; 3] = [
        Fault::RecycledNotZeroed,
        Fault::OldQueuePairKept,
        Fault::RetentionBeyondHw,
    ];

    thread_local! {
        static INJECTED: Cell<Option<Fault>> = const { Cell::new(None) };
    }

    /// Breaks this thread's engines while `body` runs.
    pub(crate) fn inject<T>(fault: Fault, body: impl FnOnce() -> T) -> T {
        /// Ends the fault, also when the body panics.
        struct End;
        impl Drop for End {
            fn drop(&mut self) {
                INJECTED.set(None);
            }
        }
        INJECTED.set(Some(fault));
        let _end = End;
        body()
    }

    pub(crate) fn is_injected(fault: Fault) -> bool {
        INJECTED.get() == Some(fault)
    }
}
