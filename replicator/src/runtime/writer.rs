//! The writer thread: checks and drains batches to segment files, syncs them, and writes the checkpoints.
//!
//! A sync waits until no further job is queued, but not for more than a few: what was drained for several
//! requests is synced once. A request for durability that comes before its bytes is kept until they have
//! been drained.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::checkpoints::{Checkpoints, PartitionName};
use super::cold::walk;
use super::deadlines::Deadlines;
use super::events::{Event, EventSender};
use super::files::{PartitionFiles, StorageFault};
use super::memory::Image;
use crate::cluster::Retention;
use crate::epoch::Cut;
use crate::follower::{Drain, Fault};
use crate::image::{ImageId, Mark};
use crate::partition::{DrainJob, Stored};
use crate::table::Tail;

/// How often the checkpoints are written, and retention looked after; Kafka's default for the former.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);
/// A due sync waits for this many further jobs at most.
const JOBS_BEFORE_SYNC: usize = 32;

/// A job for the writer.
#[derive(Debug)]
pub(super) enum WriterJob {
    /// Drain bytes that a leader has appended.
    Leader {
        partition: usize,
        image: Arc<Image>,
        job: DrainJob,
    },
    /// Check and drain bytes that a leader's NIC has written.
    Follower {
        partition: usize,
        image: Arc<Image>,
        job: Drain,
    },
    /// Remember a high watermark for the next checkpoint. Retention is the leader's matter.
    HighWatermark {
        partition: usize,
        offset: i64,
        is_leader: bool,
    },
    /// Have everything below an offset on the device soon: `Event::Durable` follows.
    Sync { partition: usize, offset: i64 },
    /// The leader's log starts at this offset: segments below it may go.
    StartAt { partition: usize, offset: i64 },
    /// Copy to the files what the images have beyond them, when nobody writes to them any more;
    /// `Event::Stored` follows.
    Scan {
        partition: usize,
        leader_epoch: i32,
        tail: Option<Tail>,
        images: Vec<(ImageId, Arc<Image>)>,
    },
    /// Begin a leader epoch where the files end.
    BeginEpoch { partition: usize, epoch: i32 },
    /// Cut the log, which nobody can write to and of which all that memory held is in the files;
    /// `Event::Stored` follows.
    Cut { partition: usize, cut: Cut },
}

/// What the writer works on.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) files: HashMap<usize, PartitionFiles>,
    pub(super) checkpoints: Checkpoints,
    /// Of each partition by its index.
    names: Vec<PartitionName>,
    retentions: Vec<Retention>,
    leads: Vec<bool>,
    /// Up to where each partition is to be synced as soon as it has been drained.
    wanted: HashMap<usize, i64>,
    /// Partitions whose durable offset may have moved, or that may be due for a sync at another time.
    changed: BTreeSet<usize>,
    /// When each partition's policy wants the next sync.
    syncs: Deadlines<Instant>,
    /// The durable offsets that engines know.
    reported: HashMap<usize, i64>,
    /// Why the last job of a follower failed, to be told beside its result.
    failed: Option<(usize, StorageFault)>,
}

impl Writer {
    pub(super) fn new(
        files: HashMap<usize, PartitionFiles>,
        checkpoints: Checkpoints,
        names: Vec<PartitionName>,
        retentions: Vec<Retention>,
    ) -> Self {
        Self {
            files,
            checkpoints,
            leads: vec![false; names.len()],
            syncs: Deadlines::new(names.len()),
            names,
            retentions,
            wanted: HashMap::new(),
            changed: BTreeSet::new(),
            reported: HashMap::new(),
            failed: None,
        }
    }

    /// Runs until the queue is closed.
    pub(super) fn run(mut self, jobs: &Receiver<WriterJob>, events: &EventSender) -> Self {
        let mut buffer = Vec::new();
        let mut checkpoint_due = Instant::now() + CHECKPOINT_INTERVAL;
        let mut jobs_since_sync = 0;
        self.changed.extend(self.files.keys().copied());
        self.sync_what_is_due(events);
        loop {
            let now = Instant::now();
            let sync_due = self.syncs.first();
            let due = sync_due.map_or(checkpoint_due, |due| due.min(checkpoint_due));
            match jobs.recv_timeout(due.saturating_duration_since(now)) {
                Ok(job) => {
                    if let Some(event) = self.execute(job, &mut buffer, events) {
                        // Nobody listens during a shutdown; what is drained is drained.
                        let _ = events.send(event);
                    }
                    if let Some((partition, fault)) = self.failed.take() {
                        let _ = events.send(Event::StorageFailed { partition, fault });
                    }
                    jobs_since_sync += 1;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if jobs.is_empty() || jobs_since_sync >= JOBS_BEFORE_SYNC {
                jobs_since_sync = 0;
                self.sync_what_is_due(events);
            }
            if checkpoint_due <= Instant::now() {
                self.checkpoint(events);
                checkpoint_due = Instant::now() + CHECKPOINT_INTERVAL;
            }
        }
        self
    }

    fn execute(
        &mut self,
        job: WriterJob,
        buffer: &mut Vec<u8>,
        events: &EventSender,
    ) -> Option<Event> {
        match job {
            WriterJob::HighWatermark {
                partition,
                offset,
                is_leader,
            } => {
                self.leads[partition] = is_leader;
                self.checkpoints
                    .set_high_watermark(&self.names[partition], offset);
                None
            }
            WriterJob::Leader {
                partition,
                image,
                job,
            } => {
                let result = self.drain_leader(partition, &image, &job, buffer);
                self.changed.insert(partition);
                Some(Event::LeaderDrained {
                    partition,
                    job,
                    result,
                })
            }
            WriterJob::Follower {
                partition,
                image,
                job,
            } => {
                let result = self.drain_follower(partition, &image, &job, buffer);
                self.changed.insert(partition);
                Some(Event::FollowerDrained {
                    partition,
                    job,
                    result,
                })
            }
            WriterJob::Sync { partition, offset } => {
                let wanted = self.wanted.entry(partition).or_insert(offset);
                *wanted = offset.max(*wanted);
                None
            }
            WriterJob::StartAt { partition, offset } => {
                self.start_at(&[(partition, offset)], events);
                None
            }
            WriterJob::Scan {
                partition,
                leader_epoch,
                tail,
                images,
            } => {
                let scanned = self
                    .files(partition)
                    .scan(&images, leader_epoch, tail.as_ref());
                self.changed.insert(partition);
                let told = tail.map_or(0, |tail| tail.high_watermark);
                Some(Event::Stored {
                    partition,
                    is_cut: false,
                    result: scanned.map(|()| self.stored(partition, told)),
                })
            }
            WriterJob::Cut { partition, cut } => {
                let result = self.cut(partition, cut);
                self.changed.insert(partition);
                Some(Event::Stored {
                    partition,
                    is_cut: true,
                    result: result.map_err(|fault| Fault::Files(fault.to_string())),
                })
            }
            WriterJob::BeginEpoch { partition, epoch } => {
                if let Err(error) = self.files(partition).begin_epoch(epoch) {
                    tracing::error!(%error, epoch, "the epoch is not checkpointed");
                }
                None
            }
        }
    }

    fn files(&mut self, partition: usize) -> &mut PartitionFiles {
        self.files
            .get_mut(&partition)
            .expect("files of every partition held")
    }

    /// Syncs the partitions that somebody waits for, or whose policy says so.
    fn sync_what_is_due(&mut self, events: &EventSender) {
        let now = Instant::now();
        self.note_changed(events);
        let files = &self.files;
        let drained = |(partition, wanted): (&usize, &i64)| {
            (files[partition].log_end_offset() >= *wanted).then_some(*partition)
        };
        let mut due: BTreeSet<usize> = self.wanted.iter().filter_map(drained).collect();
        due.extend(std::iter::from_fn(|| self.syncs.pop(now)));
        for partition in due {
            self.wanted.remove(&partition);
            if let Err(fault) = self.files(partition).sync() {
                let _ = events.send(Event::StorageFailed { partition, fault });
            }
            self.changed.insert(partition);
        }
        self.note_changed(events);
    }

    /// Looks at the partitions that something happened to.
    fn note_changed(&mut self, events: &EventSender) {
        for partition in std::mem::take(&mut self.changed) {
            self.report_durable(partition, events);
            self.syncs.set(partition, self.files[&partition].sync_due());
        }
    }

    /// Tells the engine how far the device has the log, if that is news.
    fn report_durable(&mut self, partition: usize, events: &EventSender) {
        let offset = self.files[&partition].durable_offset();
        if self.reported.insert(partition, offset) != Some(offset) {
            // Nobody listens during a shutdown.
            let _ = events.send(Event::Durable { partition, offset });
        }
    }

    /// Writes the checkpoints, and lets go what retention does not want any more.
    fn checkpoint(&mut self, events: &EventSender) {
        let now = SystemTime::now();
        let starts = (0..self.names.len()).filter_map(|partition| {
            let retention = self.retentions[partition];
            if !self.leads[partition] || retention == Retention::default() {
                return None;
            }
            let high_watermark = self.checkpoints.high_watermark(&self.names[partition]);
            let files = &self.files[&partition];
            let point = files.retention_point(retention, high_watermark, now);
            (point > files.log_start_offset()).then_some((partition, point))
        });
        let starts: Vec<_> = starts.collect();
        self.start_at(&starts, events);
    }

    /// Moves the start of logs; first in the checkpoint, so that what is removed never comes back.
    fn start_at(&mut self, starts: &[(usize, i64)], events: &EventSender) {
        for &(partition, offset) in starts {
            let name = &self.names[partition];
            self.checkpoints.set_log_start_offset(name, offset);
        }
        if let Err(error) = self.checkpoints.write_all() {
            tracing::error!(%error, "offsets cannot be checkpointed, so no segment is removed");
            return;
        }
        for &(partition, offset) in starts {
            let event = match self.files(partition).start_at(offset) {
                Ok(()) => Event::LogStart { partition, offset },
                Err(fault) => Event::StorageFailed { partition, fault },
            };
            // Nobody listens during a shutdown.
            let _ = events.send(event);
        }
    }

    /// Cuts a log; first in the checkpoints, so that a crash leaves no high watermark beyond the log.
    fn cut(&mut self, partition: usize, cut: Cut) -> Result<Stored, StorageFault> {
        let name = &self.names[partition];
        self.wanted.remove(&partition);
        let end = match cut {
            Cut::TruncateTo(offset) => offset,
            Cut::RestartAt(offset) => {
                self.checkpoints.set_log_start_offset(name, offset);
                offset
            }
        };
        let high_watermark = self.checkpoints.high_watermark(name);
        self.checkpoints
            .set_high_watermark(name, high_watermark.min(end));
        self.checkpoints
            .write_all()
            .map_err(|error| StorageFault::Full(error.to_string()))?;
        self.files(partition).cut(cut)?;
        Ok(self.stored(partition, 0))
    }

    fn stored(&self, partition: usize, high_watermark: i64) -> Stored {
        let known = self.checkpoints.high_watermark(&self.names[partition]);
        self.files[&partition].stored(known.max(high_watermark))
    }

    fn drain_leader(
        &mut self,
        partition: usize,
        image: &Image,
        job: &DrainJob,
        buffer: &mut Vec<u8>,
    ) -> Result<(), StorageFault> {
        let bytes = copy_out(image, job.from, job.to, buffer).map_err(StorageFault::Poisoned)?;
        let mut place = job.place;
        place.file_position += u64::from(job.from);
        self.files(partition).append(place, bytes)
    }

    fn drain_follower(
        &mut self,
        partition: usize,
        image: &Image,
        job: &Drain,
        buffer: &mut Vec<u8>,
    ) -> Result<Mark, Fault> {
        let from = job.from.byte_position;
        let image_len = u32::try_from(image.mapping().len()).unwrap_or(u32::MAX);
        let to = job.to.map_or(image_len, |to| to.byte_position);
        let bytes = copy_out(image, from, to, buffer).map_err(Fault::Corrupt)?;
        let end = walk(bytes, job.from).map_err(Fault::Corrupt)?;
        if let Some(to) = job.to.filter(|to| *to != end) {
            return Err(Fault::Corrupt(format!(
                "the tail says offset {} at byte {}, the batches end with offset {} at byte {}",
                to.end_offset, to.byte_position, end.end_offset, end.byte_position
            )));
        }
        let bytes = &bytes[..(end.byte_position - from) as usize];
        if bytes.is_empty() {
            return Ok(end);
        }
        let mut place = job.place;
        place.file_position += u64::from(from);
        let appended = self.files(partition).append(place, bytes);
        appended.map_err(|fault| {
            let told = Fault::Files(fault.to_string());
            self.failed = Some((partition, fault));
            told
        })?;
        Ok(end)
    }
}

/// Copies part of an image to `buffer`, where nobody changes it any more.
fn copy_out<'b>(
    image: &Image,
    from: u32,
    to: u32,
    buffer: &'b mut Vec<u8>,
) -> Result<&'b [u8], String> {
    let len = to.saturating_sub(from) as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let bytes = &mut buffer[..len];
    let copied = image.mapping().read_at(from as usize, bytes);
    copied.map_err(|error| error.to_string())?;
    Ok(bytes)
}
