//! What a broker can see of its partitions at any time, and how it hears that something has changed.
//!
//! The I/O thread keeps one [`PartitionView`] per partition up to date. A subscription holds no views, only
//! which partitions have changed since it was asked last: so its queue is bounded by the number of
//! partitions, never full, and its owner may be as slow as it likes. It misses what has passed, never what is.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use super::files::StorageFault;
use super::handle::Partition;
use super::partition::Held;
use super::pending::Waiter;
use super::shared::PartitionInfo;
use super::status::StorageStatus;

/// What a node knows of a partition that it holds, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartitionView {
    /// Whether the node leads it, and takes appends.
    pub is_leader: bool,
    /// Who is agreed to lead it, as far as the node has heard; `None` while it is offline.
    pub leader: Option<u32>,
    /// The epoch of that leader; 0 as long as nobody has led it.
    pub leader_epoch: i32,
    /// The nodes agreed to be in sync, as far as the node has heard.
    pub isr: Vec<u32>,
    /// The nodes that hold it, the preferred leader first.
    pub replicas: Vec<u32>,
    /// Whether the files take bytes and keep them.
    pub storage: StorageStatus,
}

/// What of a replica decides whether its view is a new one: cheap to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shown {
    is_leader: bool,
    /// Of what is agreed.
    revision: Option<i64>,
    storage: StorageStatus,
}

impl PartitionView {
    fn new(info: &PartitionInfo) -> Self {
        Self {
            is_leader: false,
            leader: None,
            leader_epoch: 0,
            isr: Vec::new(),
            replicas: info.replicas.clone(),
            storage: StorageStatus::Works,
        }
    }

    fn of(held: &Held, shown: Shown, before: &Self) -> Self {
        let agreed = held.replica.agreed().map(|agreed| &agreed.state);
        let nodes = agreed.map(|state| state.isr.iter().map(|member| member.node).collect());
        Self {
            is_leader: shown.is_leader,
            leader: agreed.and_then(|state| state.leader),
            leader_epoch: agreed.map_or(0, |state| state.leader_epoch),
            isr: nodes.unwrap_or_default(),
            replicas: agreed.map_or_else(|| before.replicas.clone(), |s| s.replicas.clone()),
            storage: shown.storage,
        }
    }
}

/// The views of all partitions, and who has subscribed to them.
#[derive(Debug)]
pub(super) struct Views {
    views: Vec<Mutex<PartitionView>>,
    subscribers: Mutex<Vec<Weak<Subscriber>>>,
    /// The node has ended.
    is_ended: AtomicBool,
}

impl Views {
    pub(super) fn new(infos: &[PartitionInfo]) -> Self {
        let views = infos.iter().map(PartitionView::new);
        Self {
            views: views.map(Mutex::new).collect(),
            subscribers: Mutex::default(),
            is_ended: AtomicBool::new(false),
        }
    }

    pub(super) fn get(&self, partition: usize) -> PartitionView {
        lock(&self.views[partition]).clone()
    }

    /// Called by the I/O thread whenever something has happened to a partition; `shown` is what it has shown
    /// last.
    pub(super) fn show(&self, partition: usize, held: &Held, shown: &mut Option<Shown>) {
        let now = Shown {
            is_leader: held.replica.leader().is_some(),
            revision: held.replica.agreed().map(|agreed| agreed.revision),
            storage: StorageStatus::of(held.storage_fault()),
        };
        if shown.replace(now) == Some(now) {
            return;
        }
        let mut view = lock(&self.views[partition]);
        let newer = PartitionView::of(held, now, &view);
        let before = mem::replace(&mut *view, newer);
        let is_news = before != *view;
        drop(view);
        if is_news {
            self.with_subscribers(|subscriber| subscriber.note(partition));
        }
    }

    fn end(&self) {
        // Before the list is locked: a subscriber that is not in it yet looks at this afterwards.
        self.is_ended.store(true, Ordering::Relaxed);
        self.with_subscribers(Subscriber::end);
    }

    fn with_subscribers(&self, tell: impl Fn(&Subscriber)) {
        let mut all = lock(&self.subscribers);
        all.retain(|subscriber| subscriber.strong_count() > 0);
        let present: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
        drop(all);
        present.iter().for_each(|subscriber| tell(subscriber));
    }

    /// Subscribes to the partitions of these handles; all are told once at the beginning.
    pub(super) fn subscribe(&self, partitions: Vec<Partition>) -> Changes {
        let mut changed = Changed {
            queue: VecDeque::new(),
            is_queued: vec![false; self.views.len()],
            waiter: Waiter::Nobody,
            is_ended: false,
        };
        partitions.iter().for_each(|p| changed.note(p.index()));
        let subscriber = Arc::new(Subscriber(Mutex::new(changed)));
        lock(&self.subscribers).push(Arc::downgrade(&subscriber));
        if self.is_ended.load(Ordering::Relaxed) {
            subscriber.end();
        }
        Changes {
            subscriber,
            partitions,
        }
    }
}

/// Ends the views, and so tells the subscribers, when it is dropped: the I/O thread's, however that ends.
pub(super) struct ViewsEnd(pub(super) Arc<Views>);

impl Drop for ViewsEnd {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl StorageStatus {
    pub(super) fn of(fault: Option<&StorageFault>) -> Self {
        match fault {
            None => Self::Works,
            Some(StorageFault::Full(_)) => Self::Full,
            Some(StorageFault::Poisoned(_)) => Self::Poisoned,
        }
    }
}

#[derive(Debug)]
struct Subscriber(Mutex<Changed>);

#[derive(Debug)]
struct Changed {
    queue: VecDeque<usize>,
    is_queued: Vec<bool>,
    waiter: Waiter,
    is_ended: bool,
}

impl Changed {
    fn note(&mut self, partition: usize) {
        if !mem::replace(&mut self.is_queued[partition], true) {
            self.queue.push_back(partition);
        }
    }

    fn take(&mut self) -> Option<usize> {
        let partition = self.queue.pop_front()?;
        self.is_queued[partition] = false;
        Some(partition)
    }
}

impl Subscriber {
    fn note(&self, partition: usize) {
        let mut changed = lock(&self.0);
        changed.note(partition);
        let waiter = mem::take(&mut changed.waiter);
        drop(changed);
        waiter.wake();
    }

    fn end(&self) {
        let mut changed = lock(&self.0);
        changed.is_ended = true;
        let waiter = mem::take(&mut changed.waiter);
        drop(changed);
        waiter.wake();
    }
}

/// A partition whose view has changed, and the view as it is now.
#[derive(Debug, Clone)]
pub struct Change {
    /// The partition.
    pub partition: Partition,
    /// What the node knows of it.
    pub view: PartitionView,
}

/// A subscription to what changes in the partitions that a node holds: leadership, in-sync replicas, the
/// state of the files.
///
/// It is a subscription and not a callback, so that no code of the broker runs on the node's threads: what
/// it does with a change, and how long that takes, cannot hold up the log. It begins with every
/// partition once. Afterwards a partition is told when its view is another one; whoever asks late gets the
/// present view only, and two changes that have passed meanwhile are one. A partition that was led, lost
/// and led again is seen by its leader epoch.
#[derive(Debug)]
pub struct Changes {
    subscriber: Arc<Subscriber>,
    /// In the order of their index.
    partitions: Vec<Partition>,
}

impl Changes {
    /// The next change, if there is one now.
    pub fn try_next(&mut self) -> Option<Change> {
        let index = lock(&self.subscriber.0).take()?;
        Some(self.change(index))
    }

    /// Waits for the next change; `None` if there is none within `timeout`, or if the node has ended.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Change> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let waiter = Waiter::Thread(thread::current());
            if let Poll::Ready(change) = self.poll_or_wait(waiter) {
                return change;
            }
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => thread::park(),
                Some(Duration::ZERO) => return None,
                Some(left) => thread::park_timeout(left),
            }
        }
    }

    /// As a future: the next change, or `None` once the node has ended. As for
    /// [`Pending`](super::Pending), the waker must return at once.
    pub async fn next(&mut self) -> Option<Change> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// What [`Changes::next`] polls, for those who write a stream of it.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        self.poll_or_wait(Waiter::Task(cx.waker().clone()))
    }

    fn poll_or_wait(&mut self, waiter: Waiter) -> Poll<Option<Change>> {
        let mut changed = lock(&self.subscriber.0);
        if let Some(index) = changed.take() {
            drop(changed);
            return Poll::Ready(Some(self.change(index)));
        }
        if changed.is_ended {
            return Poll::Ready(None);
        }
        let before = mem::replace(&mut changed.waiter, waiter);
        drop(changed);
        // It may own a task that owns us: not under the lock.
        drop(before);
        Poll::Pending
    }

    fn change(&self, index: usize) -> Change {
        let at = self
            .partitions
            .binary_search_by_key(&index, Partition::index);
        let partition = self.partitions[at.expect("only what is held changes")].clone();
        let view = partition.view();
        Change { partition, view }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
