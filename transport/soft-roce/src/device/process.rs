//! Telling a forked child from its parent.
//!
//! A child inherits the memory of its parent's devices but not their threads, locks that those may
//! hold, and sockets whose packets are the parent's. So what was made before a fork is refused after
//! it, in the child.
#![allow(unsafe_code, reason = "registers a function to run in forked children")]

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Forks between the first process that asked and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);
static WATCH: Once = Once::new();

/// The process that something was made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process(u32);

impl Process {
    /// The present process: a load of a counter, where `getpid` would be a system call.
    pub(crate) fn this() -> Self {
        // Relaxed: changes only in a child that has one thread.
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// Counts forks from now on; before that all of them look alike.
    pub(crate) fn watch_forks() {
        WATCH.call_once(|| {
            // SAFETY: the handler touches one atomic, which is allowed in a forked child.
            let result = unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
            assert_eq!(result, 0, "there is memory for one more fork handler");
        });
    }
}

extern "C" fn count_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}
