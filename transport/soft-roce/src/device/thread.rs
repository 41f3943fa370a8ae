//! The device's own thread: it drives when nobody polls, and otherwise keeps out of the way.
//!
//! The thread is in one of two modes.
//!
//! - **Serving**: it sleeps on the socket, the wake descriptor and the nearest timer, and drives
//!   whenever one of them is up. An idle device sleeps here and costs nothing.
//! - **Watching**: an application polls, so the thread ignores the socket (each packet would wake it
//!   for nothing) and only looks every 50 to 200 us whether the polls go on. When an interval passes
//!   without one it serves.
//!
//! # Why no wakeup is lost
//!
//! Something to do is (1) a datagram in the socket, (2) a timer, (3) packets of a queue pair that did
//! not fit its turn. The claim: while there is one, some thread is driving, or will within a bounded
//! time without anyone's help.
//!
//! - Serving, the thread computes when it must wake (2, 3) and stores it in `sleep_until` under the
//!   engine's lock, after driving. The socket's readability is a level (1): a datagram that came after
//!   the drive, before the sleep, ends the sleep at once.
//! - Timers and unsent packets arise only under the lock. Whoever leaves the lock with one that is due
//!   before `sleep_until` writes the wake descriptor, whose readability is a level too: the thread
//!   cannot fall asleep past it.
//! - An application that drives may take a datagram whose arrival also woke the thread; the thread
//!   then finds nothing, which is harmless. It may not take the thread's *next* wake-up away: the
//!   thread drives after each sleep before it decides to watch, and from watching it returns within an
//!   interval to a drive of its own.
//! - While watching, `sleep_until` is 0: nobody needs to wake the thread, which looks at the engine in
//!   at most 200 us if the polls stop. If they do not stop, the pollers drive all three kinds.
//! - An application that arms a completion queue is about to sleep, and ends the watch at once.
//!
//! `app_drives` counts drives, not calls: an application that only finds completions in its queue, or
//! polls while another thread holds the engine, drives nothing and does not hold the thread off.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::thread::{sched_yield, set_current_timer_slack};

use super::engine::Turn;
use super::events::ONE;
use super::{Shared, name_of};

/// First and longest interval between two looks at a polling application.
const WATCH_NS_MIN: u64 = 50_000;
const WATCH_NS_MAX: u64 = 200_000;
/// Drives by applications between two of the thread's own that count as polling in earnest; an
/// application that sleeps on a channel makes one or two per event.
const APP_DRIVES_MIN: u64 = 8;
/// How long the thread goes on looking, yielding each time, after something arrived: a request
/// rarely comes alone, and sleeping costs more than this.
const LINGER_NS: u64 = 20_000;
const NS_PER_S: u64 = 1_000_000_000;

/// The running thread of a device.
#[derive(Debug)]
pub(super) struct DeviceThread(JoinHandle<()>);

impl DeviceThread {
    /// Starts the thread; `socket` tells when datagrams wait.
    pub(super) fn start(shared: Arc<Shared>, socket: OwnedFd) -> io::Result<Self> {
        let name = name_of(shared.address);
        let thread = Builder::new().name(name).spawn(move || {
            // The default slack of 50 us would double the shortest watch. Harmless if refused.
            let _ = set_current_timer_slack(NonZeroU64::new(1));
            let run = AssertUnwindSafe(|| shared.run(socket.as_fd()));
            if catch_unwind(run).is_err() {
                shared.fatal("the device's thread panicked");
            }
        })?;
        Ok(Self(thread))
    }

    /// Waits until the thread has ended, as told by `is_stopping`.
    pub(super) fn join(self) {
        // It catches its own panics.
        let _ = self.0.join();
    }
}

impl Shared {
    fn run(&self, socket: BorrowedFd<'_>) {
        let mut drives_seen = self.app_drives.load(Ordering::Relaxed);
        while !self.is_stopping.load(Ordering::Acquire) {
            let Some(sleep_until) = self.drive_and_linger() else {
                return;
            };
            let drives = self.app_drives.load(Ordering::Relaxed);
            if drives.wrapping_sub(drives_seen) >= APP_DRIVES_MIN {
                drives_seen = self.watch();
            } else {
                drives_seen = drives;
                self.sleep(Some(socket), sleep_until);
            }
        }
    }

    /// Drives until nothing has arrived for a while, and returns when to wake at the latest. Leaves
    /// that to a polling application as soon as one holds the engine. `None` if the device has
    /// stopped: nothing is left to drive.
    fn drive_and_linger(&self) -> Option<u64> {
        let mut linger_until = 0;
        loop {
            self.let_others_in();
            let Some(mut engine) = self.try_engine() else {
                // Someone drives or changes something: come back soon.
                return Some(self.clock.now() + WATCH_NS_MIN);
            };
            let now = self.clock.now();
            let Turn { received, has_more } = engine.drive(now);
            if engine.is_dead() {
                return None;
            }
            if received > 0 {
                linger_until = now + LINGER_NS;
            }
            let sleep_until = engine.next_deadline().unwrap_or(u64::MAX);
            self.sleep_until.store(sleep_until, Ordering::Relaxed);
            drop(engine);
            if !has_more && now >= linger_until {
                return Some(sleep_until);
            }
            sched_yield();
        }
    }

    /// Waits while applications drive, and returns the last count of their drives.
    fn watch(&self) -> u64 {
        self.sleep_until.store(0, Ordering::Relaxed);
        let mut interval = WATCH_NS_MIN;
        let mut drives = self.app_drives.load(Ordering::Relaxed);
        loop {
            let was_woken = self.sleep(None, self.clock.now() + interval);
            let drives_now = self.app_drives.load(Ordering::Relaxed);
            if was_woken || drives_now == drives {
                return drives_now;
            }
            drives = drives_now;
            interval = (interval * 2).min(WATCH_NS_MAX);
        }
    }

    /// Sleeps until someone wakes the thread, the time has come, or the socket is readable, if one is
    /// given. Returns whether the thread was woken.
    fn sleep(&self, socket: Option<BorrowedFd<'_>>, until: u64) -> bool {
        let wake = PollFd::new(&self.wake, PollFlags::IN);
        let mut both = [
            wake.clone(),
            PollFd::from_borrowed_fd(socket.unwrap_or(self.wake.as_fd()), PollFlags::IN),
        ];
        let polled = if socket.is_some() {
            &mut both[..]
        } else {
            &mut both[..1]
        };
        let timeout = timespec(until.saturating_sub(self.clock.now()));
        match poll(polled, (until != u64::MAX).then_some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            // Cannot happen with valid descriptors; do not spin if it does.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
        // The descriptor does not block: reading says whether it was written.
        read(&self.wake, &mut [0u8; 8]).is_ok()
    }

    /// Lets threads that wait for the engine have it before the next turn: the mutex alone would
    /// mostly give it back to the thread that has just left it.
    fn let_others_in(&self) {
        while self.waiting.load(Ordering::Relaxed) > 0 {
            sched_yield();
        }
    }

    /// Wakes the thread, whatever it sleeps on.
    pub(super) fn wake_thread(&self) {
        // Fails only when 2^64 - 2 wakes are unread: then it is awake.
        let _ = write(&self.wake, &ONE);
    }

    /// Ends a watch, if there is one.
    pub(super) fn wake_watcher(&self) {
        if self.sleep_until.load(Ordering::Relaxed) == 0 {
            self.wake_thread();
        }
    }
}

fn timespec(ns: u64) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(ns / NS_PER_S).unwrap_or(i64::MAX),
        // Below 10^9.
        tv_nsec: i64::try_from(ns % NS_PER_S).unwrap_or(0),
    }
}
