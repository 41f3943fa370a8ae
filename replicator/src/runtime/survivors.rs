//! Images that a run has left in shared memory: what they hold beyond the files is copied there.
//!
//! What of them is log, [`scan`](crate::scan) says. Without a tail there is nothing that was acknowledged.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use transport::Mapping;

use super::error::NodeError;
use super::files::{PartitionFiles, remove_if_exists};
use super::memory::{ImageFile, image_files, is_empty, read_entry};
use crate::follower::Fault;
use crate::segment::SegmentError;
use crate::table::Tail;

/// One partition's images and tail.
#[derive(Debug)]
pub(super) struct Survivors {
    tail: Option<Tail>,
    /// The one with the later name first: of two with batches of the same offsets, it is of the later
    /// epoch.
    images: Vec<(ImageFile, Arc<Mapping>)>,
}

/// The files of all images that a run has left, by partition.
#[derive(Debug)]
pub(super) struct Left(HashMap<usize, Vec<ImageFile>>);

impl Left {
    pub(super) fn find(shm_dir: &Path) -> Result<Self, NodeError> {
        let mut files: HashMap<_, Vec<_>> = HashMap::new();
        for file in image_files(shm_dir)? {
            files.entry(file.partition).or_default().push(file);
        }
        Ok(Self(files))
    }
}

impl Survivors {
    /// Takes what is left of one partition.
    pub(super) fn take(
        left: &mut Left,
        table: &Mapping,
        partition: usize,
    ) -> Result<Self, NodeError> {
        let mut images = Vec::new();
        for file in left.0.remove(&partition).unwrap_or_default() {
            if is_empty(&file.path) {
                remove_if_exists(&file.path)?;
            } else {
                let mapping = Mapping::open_shm(&file.path)?;
                images.push((file, mapping));
            }
        }
        images.sort_by(|(a, _), (b, _)| b.path.cmp(&a.path));
        Ok(Self {
            tail: read_entry(table, partition).tail,
            images,
        })
    }

    pub(super) fn tail(&self) -> Option<&Tail> {
        self.tail.as_ref()
    }

    /// Appends to the files what continues them. An image that its tail does not describe is left out.
    pub(super) fn drain(&self, files: &mut PartitionFiles) -> Result<(), NodeError> {
        let Some(tail) = &self.tail else {
            return Ok(());
        };
        let mut is_progress = true;
        while std::mem::take(&mut is_progress) {
            for (file, mapping) in &self.images {
                let place = (file.id, file.starts_segment);
                match files.continue_with(place, mapping, tail.leader_epoch, Some(tail)) {
                    Ok(true) => {
                        is_progress = true;
                        break;
                    }
                    Ok(false) => {}
                    Err(fault @ Fault::Files(_)) => {
                        return Err(NodeError::storage(files.dir(), &fault));
                    }
                    Err(fault) => {
                        tracing::error!(path = %file.path.display(), %fault, "an image is no log")
                    }
                }
            }
        }
        Ok(())
    }

    /// Refuses to go on with less than what tail and checkpoints say there is.
    pub(super) fn check(
        &self,
        files: &PartitionFiles,
        high_watermark: i64,
    ) -> Result<(), SegmentError> {
        let log_end_offset = files.log_end_offset();
        let mut evidence = Vec::new();
        if let Some(tail) = self
            .tail
            .filter(|tail| tail.log_end_offset > log_end_offset)
        {
            let end = tail.log_end_offset;
            evidence.push(format!(
                "the tail in the log memory says that it ends at {end}"
            ));
        }
        if high_watermark > log_end_offset {
            evidence.push(format!(
                "replication-offset-checkpoint says that records up to {high_watermark} are committed"
            ));
        }
        if let Some(entry) = files.epochs_beyond().first() {
            evidence.push(format!(
                "leader-epoch-checkpoint says that epoch {} begins at {}",
                entry.epoch, entry.start_offset
            ));
        }
        if evidence.is_empty() {
            return Ok(());
        }
        Err(SegmentError::Missing {
            dir: files.dir().to_owned(),
            log_end_offset,
            evidence: evidence.join(", "),
        })
    }

    /// Removes the images: all that is wanted of them is in the files.
    pub(super) fn remove(self) -> Result<(), NodeError> {
        for (ImageFile { path, .. }, _) in self.images {
            fs::remove_file(&path).map_err(|source| NodeError::directory(path, source))?;
        }
        Ok(())
    }
}
