//! State that an application works on over several calls, from one that begins to one that ends.
//!
//! Polling an extended completion queue and building requests on an extended queue pair are such
//! sessions: threads that begin one wait for the thread that is in one, as with other providers.

use std::cell::UnsafeCell;
use std::sync::{Condvar, Mutex};

use crate::device::lock;

/// A `T` that belongs to whoever is in the session.
#[derive(Default)]
pub(super) struct Session<T> {
    is_taken: Mutex<bool>,
    freed: Condvar,
    state: UnsafeCell<T>,
}

// SAFETY: the state is reached only inside a session, and one thread at a time is in one; the mutex
// orders one session's accesses before those of the next.
unsafe impl<T: Send> Sync for Session<T> {}

impl<T> Session<T> {
    /// Begins a session; waits while another thread is in one.
    pub(super) fn begin(&self) {
        let mut is_taken = lock(&self.is_taken);
        while *is_taken {
            is_taken = self
                .freed
                .wait(is_taken)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        *is_taken = true;
    }

    /// Ends the session and lets the next one begin.
    pub(super) fn end(&self) {
        *lock(&self.is_taken) = false;
        self.freed.notify_one();
    }

    /// What the session works on.
    ///
    /// # Safety
    ///
    /// The caller is between [`begin`](Self::begin) and [`end`](Self::end) on this thread, and
    /// keeps no earlier result of this function.
    #[allow(
        clippy::mut_from_ref,
        reason = "exclusive by the session, which the caller is in"
    )]
    pub(super) unsafe fn state(&self) -> &mut T {
        // SAFETY: exclusive, as the caller vouches.
        unsafe { &mut *self.state.get() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn sessions_of_several_threads_do_not_mix() {
        let session = Arc::<Session<u64>>::default();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let session = Arc::clone(&session);
                thread::spawn(move || {
                    for _ in 0..500 {
                        session.begin();
                        // SAFETY: inside the session, and used before it ends.
                        let count = unsafe { session.state() };
                        let seen = *count;
                        thread::yield_now();
                        *count = seen + 1;
                        session.end();
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("no thread panics");
        }
        session.begin();
        // SAFETY: inside the session.
        assert_eq!(*unsafe { session.state() }, 2000);
    }
}
