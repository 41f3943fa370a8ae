//! The device's own thread: it drives when nobody polls, and otherwise keeps out of the way.
//!
//! The thread is in one of two modes.
//!
//! - **Serving**: it sleeps on the socket, the wake descriptor and the nearest timer, and drives
//!   whenever one of them is up. An idle device sleeps here and costs nothing.
//! - **Watching**: an application polls, so the thread ignores the socket (each packet would wake it
//!   for nothing) and only looks now and then whether the polls go on. When an interval passes without
//!   one it serves. Each look takes the core from the very application that polls, so the longer that
//!   has polled, the rarer the looks: every 50 us at first, every 1 ms after 16 ms of polling.
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
//! - A wake-up of the thread is not lost to a watch: the thread drives before it decides to watch, or
//!   finds the lock held. What it left undone then, and what comes while it watches, is driven by the
//!   polling application, or by the thread after the first interval without a poll: 1 ms at most.
//! - While watching, `sleep_until` is 0, so that nobody wakes the thread for nothing. It is written
//!   without the lock: who still sees the older time wakes the thread needlessly, which is harmless.
//! - An ACK is held for the next turn only in the drive of an application that sees `sleep_until` at
//!   0: then the thread watches, or is about to drive. So someone's next turn, which sends the ACK,
//!   comes as soon as for (2) and (3).
//! - An application that arms a completion queue is about to sleep, and ends the watch. If it comes a
//!   moment before the watch begins, the first interval ends it.
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
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::thread::{sched_yield, set_current_timer_slack};

use super::events::ONE;
use super::{Shared, name_of};
use crate::rc::AckTime;

/// First and longest interval between two looks at a polling application, and the part of the time
/// that it has polled between them. Looks every 200 us cost a sender of 64 KiB WRITEs a twentieth of
/// its core.
const WATCH_NS_MIN: u64 = 50_000;
const WATCH_NS_MAX: u64 = 1_000_000;
const WATCH_PART: u64 = 16;
/// Drives by applications between two sleeps of the thread that count as polling in earnest; an
/// application that sleeps on a channel makes two or three per event.
const APP_DRIVES_MIN: u64 = 8;
/// How long the thread goes on looking, yielding each time, after something arrived.
const LINGER_NS: u64 = 50_000;
/// The longest time between two arrivals after which lingering is expected to pay; sleeping and
/// waking up are part of it.
const LINGER_GAP_NS_MAX: u64 = 80_000;
const NS_PER_S: u64 = 1_000_000_000;

/// The running thread of a device.
#[derive(Debug)]
pub(super) struct DeviceThread(JoinHandle<()>);

/// What ended a sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WokenBy {
    Time,
    Socket,
    Call,
}

/// What the thread does after serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Sleep(u64),
    Watch,
    Stop,
}

/// How often things happen: whether an application polls, and whether the next datagram is worth
/// waiting for.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// Drives by applications, as counted before the last sleep.
    drives_seen: u64,
    /// When something last arrived.
    arrived_at: u64,
    /// Whether it came soon after what came before it.
    is_quick: bool,
}

impl Pace {
    fn is_polled(&mut self, drives: u64) -> bool {
        let is_polled = drives.wrapping_sub(self.drives_seen) >= APP_DRIVES_MIN;
        if is_polled {
            self.drives_seen = drives;
        }
        is_polled
    }

    fn arrived(&mut self, now: u64) {
        self.is_quick = now.saturating_sub(self.arrived_at) < LINGER_GAP_NS_MAX;
        self.arrived_at = now;
    }

    fn lingers(&self, now: u64) -> bool {
        self.is_quick && now.saturating_sub(self.arrived_at) < LINGER_NS
    }
}

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
        let mut pace = Pace::default();
        let mut woken_by = WokenBy::Time;
        loop {
            match self.serve(&mut pace, woken_by) {
                Next::Stop => return,
                Next::Watch => {
                    woken_by = self.watch();
                    pace.drives_seen = self.app_drives.load(Ordering::Relaxed);
                }
                Next::Sleep(until) => woken_by = self.sleep(Some(socket), until),
            }
        }
    }

    /// Drives until there is nothing to do, and says what then.
    fn serve(&self, pace: &mut Pace, woken_by: WokenBy) -> Next {
        let mut is_first = true;
        loop {
            self.let_others_in();
            if self.is_stopping.load(Ordering::Acquire) {
                return Next::Stop;
            }
            let Some(mut engine) = self.try_engine() else {
                // Someone drives, or changes something.
                return Next::Watch;
            };
            let now = self.clock.now();
            let turn = engine.drive(now, AckTime::Now);
            if engine.is_dead() {
                return Next::Stop;
            }
            let until = engine.next_deadline().unwrap_or(u64::MAX);
            self.sleep_until.store(until, Ordering::Relaxed);
            drop(engine);
            // Whatever was in the socket, a polling application was quicker.
            let is_beaten = is_first && woken_by == WokenBy::Socket && turn.received == 0;
            is_first = false;
            if is_beaten || pace.is_polled(self.app_drives.load(Ordering::Relaxed)) {
                return Next::Watch;
            }
            if turn.received > 0 {
                pace.arrived(now);
            }
            if !turn.has_more && !pace.lingers(now) {
                pace.drives_seen = self.app_drives.load(Ordering::Relaxed);
                return Next::Sleep(until);
            }
            // Where something came, more may wait in a socket that holds little.
            if turn.received == 0 {
                sched_yield();
            }
        }
    }

    /// Waits while applications drive.
    fn watch(&self) -> WokenBy {
        self.sleep_until.store(0, Ordering::Relaxed);
        let start = self.clock.now();
        let mut drives = self.app_drives.load(Ordering::Relaxed);
        loop {
            let now = self.clock.now();
            let interval = ((now - start) / WATCH_PART).clamp(WATCH_NS_MIN, WATCH_NS_MAX);
            let woken_by = self.sleep(None, now + interval);
            let drives_now = self.app_drives.load(Ordering::Relaxed);
            if woken_by == WokenBy::Call || drives_now == drives {
                return woken_by;
            }
            drives = drives_now;
        }
    }

    /// Sleeps until someone wakes the thread, the time has come, or the socket is readable, if one is
    /// given.
    fn sleep(&self, socket: Option<BorrowedFd<'_>>, until: u64) -> WokenBy {
        let wake = self.wake.as_fd();
        let mut fds =
            [wake, socket.unwrap_or(wake)].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let polled = if socket.is_some() {
            &mut fds[..]
        } else {
            &mut fds[..1]
        };
        let timeout = timespec(until.saturating_sub(self.clock.now()));
        match poll(polled, (until != u64::MAX).then_some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => return WokenBy::Time,
            Ok(_) => {}
            Err(_) => {
                // Cannot happen with valid descriptors; do not spin if it does.
                std::thread::sleep(Duration::from_millis(1));
                return WokenBy::Time;
            }
        }
        if fds[0].revents().is_empty() {
            return WokenBy::Socket;
        }
        // Resets the count; it does not block.
        let _ = read(&self.wake, &mut [0u8; 8]);
        WokenBy::Call
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
