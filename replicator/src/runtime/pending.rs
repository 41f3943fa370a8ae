//! Something that another thread will say: waited for, polled, or awaited.

use std::fmt;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crossbeam::utils::Backoff;

use super::append::AppendError;

/// Who waits for something; the last one that says so is the one that is woken.
#[derive(Debug, Default)]
pub(super) enum Waiter {
    #[default]
    Nobody,
    Task(Waker),
    Thread(Thread),
}

impl Waiter {
    /// Call it without any lock: it may run code of the broker's executor.
    pub(super) fn wake(self) {
        match self {
            Self::Nobody => {}
            Self::Task(waker) => waker.wake(),
            Self::Thread(thread) => thread.unpark(),
        }
    }
}

/// What the node will say to something that it was asked, such as the offset of an appended batch.
///
/// It is a blocking wait ([`wait`](Self::wait), [`wait_timeout`](Self::wait_timeout)), a poll
/// ([`try_result`](Self::try_result)) and a [`Future`], whichever suits; no runtime is needed. The answer
/// comes once. Dropping this only means that nobody will hear it: what was appended stays appended.
///
/// A waker is called on the node's I/O thread, on which every append of the node depends: it must return
/// at once, as those of the usual executors do. The last one that the future was polled with is called.
#[must_use = "without it nobody knows whether the batch was appended"]
pub struct Pending<T> {
    slot: Arc<Slot<T>>,
}

/// The other side of a [`Pending`]. Dropped without an answer it says that there will be none.
pub(super) struct Reply<T> {
    slot: Arc<Slot<T>>,
}

struct Slot<T> {
    /// The state is [`State::Done`] or was: published after it, so that who waits need not lock.
    is_done: AtomicBool,
    state: Mutex<State<T>>,
}

enum State<T> {
    Waiting(Waiter),
    /// `None` once it was taken.
    Done(Option<Result<T, AppendError>>),
}

/// A question and the way back.
pub(super) fn pending<T>() -> (Reply<T>, Pending<T>) {
    let slot = Arc::new(Slot {
        is_done: AtomicBool::new(false),
        state: Mutex::new(State::Waiting(Waiter::Nobody)),
    });
    let reply = Reply {
        slot: Arc::clone(&slot),
    };
    (reply, Pending { slot })
}

impl<T> Slot<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the answer, which is `None` if it was taken before; without one sets who waits for it.
    fn take_or_wait(&self, waiter: Waiter) -> Poll<Option<Result<T, AppendError>>> {
        // What was there before is dropped when the lock is gone: it may belong to a task that owns us.
        let _before = match &mut *self.state() {
            State::Done(result) => return Poll::Ready(result.take()),
            State::Waiting(before) => mem::replace(before, waiter),
        };
        Poll::Pending
    }
}

impl<T> Reply<T> {
    /// Answers. Only the first answer counts.
    pub(super) fn send(&self, result: Result<T, AppendError>) {
        let mut state = self.slot.state();
        let State::Waiting(waiter) = &mut *state else {
            return;
        };
        let waiter = mem::take(waiter);
        *state = State::Done(Some(result));
        drop(state);
        // Pairs with the loads of who waits: who sees it finds the state done.
        self.slot.is_done.store(true, Ordering::Release);
        waiter.wake();
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        self.send(Err(AppendError::OutcomeUnknown(
            "the node has ended before it answered".to_owned(),
        )));
    }
}

impl<T> Pending<T> {
    /// The answer, if it is there. It is given out once.
    pub fn try_result(&mut self) -> Option<Result<T, AppendError>> {
        if !self.slot.is_done.load(Ordering::Acquire) {
            return None;
        }
        match &mut *self.slot.state() {
            State::Done(result) => result.take(),
            State::Waiting(_) => None,
        }
    }

    /// Waits for the answer.
    ///
    /// # Errors
    ///
    /// [`AppendError`], which says whether anything was appended.
    ///
    /// # Panics
    ///
    /// If the answer was taken before.
    pub fn wait(mut self) -> Result<T, AppendError> {
        self.wait_until(None)
            .expect("without a deadline there is an answer")
    }

    /// Waits for the answer for so long; `None` if it has not come, or was taken before. It may be waited
    /// for again.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Option<Result<T, AppendError>> {
        self.wait_until(Instant::now().checked_add(timeout))
    }

    fn wait_until(&mut self, deadline: Option<Instant>) -> Option<Result<T, AppendError>> {
        // Most answers come within a round trip, which is shorter than it takes to sleep and be woken.
        let backoff = Backoff::new();
        while !backoff.is_completed() && !self.slot.is_done.load(Ordering::Acquire) {
            backoff.snooze();
        }
        loop {
            let waiter = Waiter::Thread(thread::current());
            if let Poll::Ready(result) = self.slot.take_or_wait(waiter) {
                return result;
            }
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => thread::park(),
                Some(Duration::ZERO) => return None,
                Some(left) => thread::park_timeout(left),
            }
        }
    }
}

impl<T> Future for Pending<T> {
    type Output = Result<T, AppendError>;

    /// # Panics
    ///
    /// If the answer was taken before.
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let waiter = Waiter::Task(cx.waker().clone());
        let result = self.slot.take_or_wait(waiter);
        result.map(|result| result.expect("the answer was taken before"))
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        // The waker may keep a task alive; the answer may take long.
        let _ = self.slot.take_or_wait(Waiter::Nobody);
    }
}

impl<T> fmt::Debug for Pending<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_done = self.slot.is_done.load(Ordering::Relaxed);
        f.debug_struct("Pending")
            .field("is_done", &is_done)
            .finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;

    /// Counts how often it is woken; its `Arc`s count who still knows it.
    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Counter {
        fn count(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Wake for Counter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn poll<T>(pending: &mut Pending<T>, task: &Arc<Counter>) -> Poll<Result<T, AppendError>> {
        let waker = Waker::from(Arc::clone(task));
        Pin::new(pending).poll(&mut Context::from_waker(&waker))
    }

    #[test]
    fn an_answer_is_given_once_however_it_is_asked_for() {
        let (reply, mut pending) = pending();
        assert_eq!(pending.try_result(), None);
        assert_eq!(pending.wait_timeout(Duration::from_millis(1)), None);
        reply.send(Ok(7));
        reply.send(Ok(8));
        drop(reply);
        assert_eq!(pending.try_result(), Some(Ok(7)));
        assert_eq!(pending.try_result(), None);
        assert_eq!(pending.wait_timeout(Duration::ZERO), None);
    }

    #[test]
    fn the_last_waker_is_woken_once() {
        let (reply, mut pending) = pending();
        let (first, last) = (Arc::default(), Arc::default());
        assert!(poll(&mut pending, &first).is_pending());
        assert!(poll(&mut pending, &last).is_pending());
        assert_eq!(Arc::strong_count(&first), 1, "it is forgotten at once");
        reply.send(Ok(1));
        reply.send(Ok(1));
        assert_eq!((first.count(), last.count()), (0, 1));
        assert_eq!(Arc::strong_count(&last), 1);
        assert_eq!(poll(&mut pending, &first), Poll::Ready(Ok(1)));
    }

    #[test]
    fn a_dropped_future_leaves_nothing_behind() {
        let (reply, mut pending) = pending();
        let task = Arc::default();
        assert!(poll(&mut pending, &task).is_pending());
        drop(pending);
        assert_eq!(Arc::strong_count(&task), 1);
        let answer = Arc::new(());
        reply.send(Ok(Arc::clone(&answer)));
        assert_eq!(task.count(), 0);
        drop(reply);
        assert_eq!(Arc::strong_count(&answer), 1);
    }

    /// A task that owns its future is dropped with its waker, inside of a poll.
    #[test]
    fn a_waker_may_own_the_future_itself() {
        struct Owner(Mutex<Option<Pending<i64>>>);
        impl Wake for Owner {
            fn wake(self: Arc<Self>) {}
        }
        let (reply, pending) = pending();
        let owner = Arc::new(Owner(Mutex::new(Some(pending))));
        let waker = Waker::from(Arc::clone(&owner));
        let mut pending = owner.0.lock().unwrap().take().unwrap();
        assert!(
            Pin::new(&mut pending)
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
        );
        *owner.0.lock().unwrap() = Some(pending);
        let weak = Arc::downgrade(&owner);
        drop((owner, waker));
        reply.send(Ok(0));
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn a_reply_that_is_dropped_is_an_answer() {
        let (reply, pending) = pending::<i64>();
        let waiting = thread::spawn(move || pending.wait());
        thread::sleep(Duration::from_millis(20));
        drop(reply);
        let result = waiting.join().unwrap();
        assert!(matches!(result, Err(AppendError::OutcomeUnknown(_))));
    }

    #[test]
    fn a_waiting_thread_is_woken() {
        for delay in [0, 1, 20] {
            let (reply, mut pending) = pending();
            let waiting = thread::spawn(move || pending.wait_timeout(Duration::from_secs(60)));
            thread::sleep(Duration::from_millis(delay));
            reply.send(Ok(3));
            assert_eq!(waiting.join().unwrap(), Some(Ok(3)));
        }
    }
}
