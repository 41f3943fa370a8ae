//! The two threads that do what the I/O thread must not wait for.
//!
//! The *helper* makes, registers and removes images and reads cold bytes from files. The *writer* checks
//! and drains batches to segment files and writes the checkpoints. Both take jobs from a bounded queue
//! and answer with an [`Event`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::events::{Event, EventSender};
use super::files::{PartitionFiles, read_cold, read_fill, walk};
use super::memory::{Domains, Image, ImageSpec};
use crate::epoch::Cut;
use crate::follower::{Drain, Fault, Fill};
use crate::image::{ImageId, ImageState, Mark};
use crate::partition::DrainJob;
use crate::segment::{HIGH_WATERMARK_CHECKPOINT, HighWatermarks, write_high_watermarks};
use crate::table::Tail;

/// How often the high watermarks are checkpointed; Kafka's default.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);

/// A job for the helper.
#[derive(Debug)]
pub(super) enum HelperJob {
    /// Make an image of a leader or follower, which begins with bytes of the files in `dir`.
    Make {
        spec: ImageSpec,
        fill: Option<Fill>,
        dir: PathBuf,
    },
    /// Make a cold image for a leader's follower.
    LoadSource {
        spec: ImageSpec,
        follower: usize,
        offset: i64,
        limit_offset: i64,
        dir: PathBuf,
    },
    /// Make a cold image for a consumer.
    LoadRead {
        spec: ImageSpec,
        request: ColdRequest,
        offset: i64,
        dir: PathBuf,
    },
    /// Withdraw what a leader was granted.
    Revoke {
        partition: usize,
        images: Vec<Arc<Image>>,
    },
    /// Deregister and remove an image once nobody else holds it.
    Drop(Arc<Image>),
}

/// Which connection asked for a cold image.
#[derive(Debug, Clone, Copy)]
pub(super) struct ColdRequest {
    pub(super) connection: u64,
    pub(super) correlation: u64,
}

/// Runs the helper until its queue is closed.
pub(super) fn run_helper(
    jobs: &Receiver<HelperJob>,
    events: &EventSender,
    domains: &Domains,
    shm_dir: &Path,
) {
    let make = |spec: &ImageSpec, bytes: &[u8]| {
        Image::make(domains, shm_dir, spec, bytes)
            .map(Arc::new)
            .map_err(|error| error.to_string())
    };
    let load = |spec: &ImageSpec, dir: &Path, offset, limit_offset| {
        let cold = read_cold(dir, spec.id, offset, limit_offset, spec.len)?;
        Ok((make(spec, &cold.bytes)?, cold.state))
    };
    for job in jobs {
        let event = match job {
            HelperJob::Make { spec, fill, dir } => {
                let filled = fill.map(|fill| Ok((fill, read_fill(&dir, &fill)?)));
                let made = filled.transpose().and_then(|filled| {
                    let bytes = filled.as_ref().map_or(&[][..], |(_, (bytes, _))| bytes);
                    let image = make(&spec, bytes)?;
                    Ok((image, filled.map(|(fill, (_, end))| (fill, end))))
                });
                let (partition, id) = (spec.partition, spec.id);
                Event::ImageMade {
                    partition,
                    id,
                    made,
                }
            }
            HelperJob::LoadSource {
                spec,
                follower,
                offset,
                limit_offset,
                dir,
            } => Event::SourceLoaded {
                partition: spec.partition,
                follower,
                id: spec.id,
                loaded: load(&spec, &dir, offset, limit_offset),
            },
            HelperJob::LoadRead {
                spec,
                request,
                offset,
                dir,
            } => Event::ReadLoaded {
                partition: spec.partition,
                request,
                loaded: load(&spec, &dir, offset, i64::MAX),
            },
            HelperJob::Revoke { partition, images } => {
                let mut revoked = images.iter().map(|image| image.revoke());
                let result = revoked.try_for_each(|revoked| revoked);
                Event::Revoked {
                    partition,
                    result: result.map_err(|error| error.to_string()),
                }
            }
            HelperJob::Drop(image) => {
                image.retire();
                drop(image);
                continue;
            }
        };
        if events.send(event).is_err() {
            return;
        }
    }
}

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
    /// Copy to the files what the images have beyond them, when nobody writes to them any more.
    Scan {
        partition: usize,
        leader_epoch: i32,
        tail: Option<Tail>,
        images: Vec<(ImageId, Arc<Image>)>,
    },
    /// Cut the files.
    Cut { partition: usize, cut: Cut },
    /// Begin a leader epoch where the files end.
    BeginEpoch { partition: usize, epoch: i32 },
    /// Remember a high watermark for the next checkpoint.
    HighWatermark { partition: usize, offset: i64 },
}

/// What the writer works on.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) files: HashMap<usize, PartitionFiles>,
    pub(super) data_dir: PathBuf,
    /// Topic and number of each partition by its index.
    pub(super) names: Vec<(String, u32)>,
    pub(super) high_watermarks: HighWatermarks,
}

impl Writer {
    /// Runs until the queue is closed.
    pub(super) fn run(mut self, jobs: &Receiver<WriterJob>, events: &EventSender) -> Self {
        let mut is_checkpoint_due = false;
        let mut buffer = Vec::new();
        loop {
            let event = match jobs.recv_timeout(CHECKPOINT_INTERVAL) {
                Ok(WriterJob::HighWatermark { partition, offset }) => {
                    self.note_high_watermark(partition, offset);
                    is_checkpoint_due = true;
                    continue;
                }
                Ok(WriterJob::Leader {
                    partition,
                    image,
                    job,
                }) => {
                    let result = self.drain_leader(partition, &image, &job, &mut buffer);
                    Event::LeaderDrained {
                        partition,
                        job,
                        result,
                    }
                }
                Ok(WriterJob::Follower {
                    partition,
                    image,
                    job,
                }) => {
                    let result = self.drain_follower(partition, &image, &job, &mut buffer);
                    Event::FollowerDrained {
                        partition,
                        job,
                        result,
                    }
                }
                Ok(WriterJob::Scan {
                    partition,
                    leader_epoch,
                    tail,
                    images,
                }) => {
                    let high_watermark = tail.map_or(0, |tail| tail.high_watermark);
                    let files = self.files(partition);
                    let scanned = files.scan(&images, leader_epoch, tail.as_ref());
                    let result = scanned.map(|()| files.stored(high_watermark));
                    Event::Stored {
                        partition,
                        is_cut: false,
                        result,
                    }
                }
                Ok(WriterJob::Cut { partition, cut }) => {
                    let files = self.files(partition);
                    let cut = files.cut(cut);
                    let result = cut.map(|()| files.stored(0));
                    Event::Stored {
                        partition,
                        is_cut: true,
                        result: result.map_err(Fault::Files),
                    }
                }
                Ok(WriterJob::BeginEpoch { partition, epoch }) => {
                    if let Err(error) = self.files(partition).begin_epoch(epoch) {
                        tracing::error!(%error, epoch, "the epoch is not checkpointed");
                    }
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {
                    if std::mem::take(&mut is_checkpoint_due) {
                        self.checkpoint();
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            };
            // Nobody listens during a shutdown; what is drained is drained.
            let _ = events.send(event);
        }
        self
    }

    fn note_high_watermark(&mut self, partition: usize, offset: i64) {
        let (topic, number) = self.names[partition].clone();
        self.high_watermarks.insert((topic, number), offset);
    }

    pub(super) fn checkpoint(&self) {
        let path = self.data_dir.join(HIGH_WATERMARK_CHECKPOINT);
        if let Err(error) = write_high_watermarks(&path, &self.high_watermarks) {
            tracing::error!(%error, "high watermarks are not checkpointed");
        }
    }

    fn files(&mut self, partition: usize) -> &mut PartitionFiles {
        self.files
            .get_mut(&partition)
            .expect("files of every partition held")
    }

    fn drain_leader(
        &mut self,
        partition: usize,
        image: &Image,
        job: &DrainJob,
        buffer: &mut Vec<u8>,
    ) -> Result<(), String> {
        let bytes = copy_out(image, job.from, job.to, buffer)?;
        let mut place = job.place;
        place.file_position += u64::from(job.from);
        self.files(partition)
            .append(place, bytes)
            .map_err(|error| error.to_string())
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
        appended.map_err(|error| Fault::Files(error.to_string()))?;
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

/// An image, and where the bytes of the files that it begins with end.
pub(super) type Made = Result<(Arc<Image>, Option<(Fill, Mark)>), String>;
/// A cold image and its batches.
pub(super) type Loaded = Result<(Arc<Image>, ImageState), String>;
