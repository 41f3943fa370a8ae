//! The two threads that do what the I/O thread must not wait for.
//!
//! The *helper*, which is here, makes, registers and removes images and reads cold bytes from files. The
//! *writer* is in [`writer`](super::writer). Both take jobs from a bounded queue and answer with an
//! [`Event`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam::channel::Receiver;

use super::cold::{read_cold, read_fill};
use super::events::Event;
use super::memory::{Image, ImageSpec, Purpose, Table};
use super::shared::Shared;
use crate::epoch::Cut;
use crate::follower::Fill;
use crate::image::{ImageState, Mark};

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
    /// Deregister and remove an image once nobody else holds it: its bytes are not needed any more.
    Drop(Arc<Image>),
    /// Deregister an image once nobody else holds it. Those that do may need its bytes.
    LetGo(Arc<Image>),
    /// Withdraw what a leader was granted, whoever holds the images; `Event::Revoked` says when nobody can
    /// write to them any more.
    Revoke {
        partition: usize,
        images: Vec<Arc<Image>>,
    },
    /// Withdraw what consumers were granted, too, and remove the images; `Event::Withdrawn` says when nobody
    /// can read them, nor those that were dropped before.
    Withdraw {
        partition: usize,
        cut: Cut,
        images: Vec<Arc<Image>>,
    },
}

/// Which connection asked for a cold image.
#[derive(Debug, Clone, Copy)]
pub(super) struct ColdRequest {
    pub(super) connection: u64,
    pub(super) correlation: u64,
}

impl HelperJob {
    /// Whether appends wait for it, and not only those who read what is old.
    pub(super) fn is_for_appends(&self) -> bool {
        matches!(self, Self::Make { .. })
    }

    /// The image to be made, if it is about one.
    pub(super) fn spec(&self) -> Option<&ImageSpec> {
        match self {
            Self::Make { spec, .. }
            | Self::LoadSource { spec, .. }
            | Self::LoadRead { spec, .. } => Some(spec),
            Self::Drop(_) | Self::LetGo(_) | Self::Revoke { .. } | Self::Withdraw { .. } => None,
        }
    }

    /// What becomes of the job if there is no memory for it.
    pub(super) fn fail(self, cause: String) -> Option<Event> {
        match self {
            Self::Make { spec, .. } => Some(Event::ImageMade {
                partition: spec.partition,
                id: spec.id,
                made: Err(cause),
            }),
            Self::LoadSource { spec, follower, .. } => Some(Event::SourceLoaded {
                partition: spec.partition,
                follower,
                id: spec.id,
                loaded: Err(cause),
            }),
            Self::LoadRead { spec, request, .. } => Some(Event::ReadLoaded {
                partition: spec.partition,
                request,
                loaded: Err(cause),
            }),
            Self::Drop(_) | Self::LetGo(_) | Self::Revoke { .. } | Self::Withdraw { .. } => None,
        }
    }
}

/// Runs the helper until its queue is closed.
pub(super) fn run_helper(jobs: &Receiver<HelperJob>, shared: &Shared, shm_dir: &Path) {
    let (events, domains, table) = (&shared.events, &shared.domains, &shared.table);
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
        if let Some(spec) = job.spec()
            && !domains.books.has_room(spec.len)
        {
            let job = Box::new(job);
            if events.send(Event::MemoryShort { job }).is_err() {
                return;
            }
            continue;
        }
        let event = match job {
            HelperJob::Make { spec, fill, dir } => {
                let filled = fill.map(|fill| Ok((fill, read_fill(&dir, &fill)?)));
                let made = filled.transpose().and_then(|filled| {
                    let bytes = filled.as_ref().map_or(&[][..], |(_, (bytes, _))| bytes);
                    let image = make(&spec, bytes)?;
                    if spec.purpose == Purpose::Follower {
                        let granted = table.grant_entry(domains, spec.partition);
                        granted.map_err(|error| error.to_string())?;
                    }
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
            HelperJob::Revoke { partition, images } => Event::Revoked {
                partition,
                result: revoke(table, partition, &images),
            },
            HelperJob::Withdraw {
                partition,
                cut,
                images,
            } => {
                for image in images {
                    if let Err(cause) = patiently(|| image.withdraw()) {
                        tracing::error!(%cause, "an image stays readable");
                    }
                    image.retire();
                }
                Event::Withdrawn { partition, cut }
            }
            HelperJob::Drop(image) => {
                image.retire();
                drop(image);
                continue;
            }
            HelperJob::LetGo(image) => {
                drop(image);
                continue;
            }
        };
        if events.send(event).is_err() {
            return;
        }
    }
}

/// Withdraws what a leader was granted, whoever holds the images: once this has returned `Ok`, nobody writes to
/// them or to the partition's entry.
pub(super) fn revoke(table: &Table, partition: usize, images: &[Arc<Image>]) -> Result<(), String> {
    for image in images {
        patiently(|| image.revoke())?;
    }
    patiently(|| table.revoke_entry(partition))
}

/// How often a deregistration is tried while another thread has the registration in its hands.
const DEREGISTER_TRIES: usize = 1000;

fn patiently(deregister: impl Fn() -> transport::Result<()>) -> Result<(), String> {
    for _ in 0..DEREGISTER_TRIES {
        match deregister() {
            Err(transport::Error::InUse { .. }) => std::thread::yield_now(),
            result => return result.map_err(|error| error.to_string()),
        }
    }
    Err("the registration is in use".to_owned())
}

/// An image, and where the bytes of the files that it begins with end.
pub(super) type Made = Result<(Arc<Image>, Option<(Fill, Mark)>), String>;
/// A cold image and its batches.
pub(super) type Loaded = Result<(Arc<Image>, ImageState), String>;
