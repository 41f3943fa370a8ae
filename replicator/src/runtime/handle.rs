//! A partition as a broker holds it in its hands.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use transport::Mapping;

use super::append::{AppendError, IntoBatch, TryAppendError};
use super::events::{AppendRequest, EventSender, ReplyTo, Work};
use super::memory::read_entry;
use super::pending::{Pending, pending};
use super::reserve::Reservation;
use super::shared::PartitionInfo;
use super::views::{PartitionView, Views};
use crate::control::Acks;
use crate::partition;
use crate::table::Entry;

/// One partition that a node holds, as leader or as follower: append to it, read it, ask how it is.
///
/// It is cheap to clone, and may be used from any thread. It neither keeps the node running nor its device
/// open: once the node has stopped, it says so.
#[derive(Clone)]
pub struct Partition {
    inner: Arc<Inner>,
}

struct Inner {
    node: u32,
    topic: String,
    number: u32,
    index: usize,
    batch_len_max: usize,
    dir: PathBuf,
    events: EventSender,
    table: Arc<Mapping>,
    views: Arc<Views>,
}

impl Partition {
    pub(super) fn new(
        node: u32,
        (index, info): (usize, &PartitionInfo),
        events: &EventSender,
        table: &Arc<Mapping>,
        views: &Arc<Views>,
    ) -> Self {
        let inner = Inner {
            node,
            topic: info.topic.clone(),
            number: info.number,
            index,
            batch_len_max: info.batch_len_max(),
            dir: info.dir.clone(),
            events: events.clone(),
            table: Arc::clone(table),
            views: Arc::clone(views),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The node that holds it here.
    #[must_use]
    pub fn node(&self) -> u32 {
        self.inner.node
    }

    /// Its topic.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.inner.topic
    }

    /// Its number in the topic.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.inner.number
    }

    /// Most bytes of a batch.
    #[must_use]
    pub fn batch_len_max(&self) -> usize {
        self.inner.batch_len_max
    }

    /// What the node knows of it now: who leads, who is in sync, whether the files work.
    #[must_use]
    pub fn view(&self) -> PartitionView {
        self.inner.views.get(self.inner.index)
    }

    /// Appends one batch: encoded bytes, which are checked first, or a builder's records. What this returns
    /// tells the offset of the first record, once the batch is acknowledged as `acks` asks.
    ///
    /// Batches that one thread appends get their offsets in that order. None of them is there twice, and a
    /// batch that is refused leaves no gap.
    ///
    /// **Back-pressure.** The node takes 256 batches into its queue, and of each partition 64 more while that
    /// waits for memory or for its followers. When there is no room this blocks, for as long as that lasts:
    /// at most about as long as a follower in sync may lag ([`lag_max`](crate::cluster::TopicSpec::lag_max)).
    /// Use [`try_append`](Self::try_append) where that cannot be.
    ///
    /// # Errors
    ///
    /// At once [`AppendError::Invalid`], [`AppendError::TooLarge`] and [`AppendError::Stopped`]; any other by
    /// what is returned.
    pub fn append(&self, batch: impl IntoBatch, acks: Acks) -> Result<Pending<i64>, AppendError> {
        let batch = batch.into_batch(self.inner.batch_len_max)?;
        let (reply, pending) = pending();
        let request = self.request(Work::Batch(batch), acks, ReplyTo::Local(reply));
        let sent = self.inner.events.append(request);
        sent.map_err(|_| AppendError::stopped())?;
        Ok(pending)
    }

    /// As [`append`](Self::append), but never waits: gives the batch back if the node's queue is full.
    ///
    /// # Errors
    ///
    /// [`TryAppendError::Full`] with the batch, or why it was refused.
    pub fn try_append(
        &self,
        batch: impl IntoBatch,
        acks: Acks,
    ) -> Result<Pending<i64>, TryAppendError> {
        let batch = batch.into_batch(self.inner.batch_len_max)?;
        let (reply, pending) = pending();
        let request = self.request(Work::Batch(batch), acks, ReplyTo::Local(reply));
        match self.inner.events.try_append(request) {
            Ok(()) => Ok(pending),
            Err(Some(Work::Batch(batch))) => Err(TryAppendError::Full(batch)),
            Err(_) => Err(AppendError::stopped().into()),
        }
    }

    /// Reserves room for one batch of at most `len` bytes at the end of the log, to be filled in place and
    /// acknowledged as `acks` asks. It comes behind everything that this thread has appended before.
    ///
    /// Waits for room in the node's queue as [`append`](Self::append) does. Meanwhile nothing else is appended
    /// to the partition: see [`Reservation`] for how long that may be.
    ///
    /// # Errors
    ///
    /// At once [`AppendError::TooLarge`] and [`AppendError::Stopped`]; any other by what is returned.
    pub fn reserve(&self, len: usize, acks: Acks) -> Result<Pending<Reservation>, AppendError> {
        let batch_len_max = self.inner.batch_len_max;
        if len > batch_len_max {
            return Err(partition::AppendError::TooLarge { len, batch_len_max }.into());
        }
        let (reply, pending) = pending();
        let reply_to = ReplyTo::Reservation(reply);
        let partition = self.clone();
        let work = Work::Reserve { len, partition };
        let sent = self.inner.events.append(self.request(work, acks, reply_to));
        sent.map_err(|_| AppendError::stopped())?;
        Ok(pending)
    }

    fn request(&self, work: Work, acks: Acks, reply_to: ReplyTo) -> AppendRequest {
        AppendRequest {
            partition: self.inner.index,
            acks,
            work,
            correlation: 0,
            reply_to,
            received_at: Instant::now(),
        }
    }

    pub(super) fn index(&self) -> usize {
        self.inner.index
    }

    pub(super) fn dir(&self) -> &Path {
        &self.inner.dir
    }

    pub(super) fn events(&self) -> &EventSender {
        &self.inner.events
    }

    pub(super) fn table_entry(&self) -> Entry {
        read_entry(&self.inner.table, self.inner.index)
    }
}

impl fmt::Debug for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            node,
            topic,
            number,
            ..
        } = &*self.inner;
        f.debug_struct("Partition")
            .field("node", node)
            .field("topic", topic)
            .field("number", number)
            .finish_non_exhaustive()
    }
}
