//! The repair of a partition that a start has refused, while no node runs.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::checkpoints::{Checkpoints, PartitionName};
use super::error::NodeError;
use super::memory::{DirectoryLock, lock_directory};
use super::recovery::LOSS_ACCEPTED;
use crate::segment::{Salvage, SegmentOptions, partition_dir};

/// What the repair of a partition's directory would give up, and then gives up.
///
/// Its `Display` says it for a person. The data directory is locked meanwhile.
#[derive(Debug)]
pub struct PartitionSalvage {
    name: PartitionName,
    dir: PathBuf,
    salvage: Salvage,
    checkpoints: Checkpoints,
    _lock: DirectoryLock,
}

impl PartitionSalvage {
    /// Reads the partition's files and finds out what would have to be given up; changes nothing.
    ///
    /// # Errors
    ///
    /// [`NodeError::InUse`] while a node runs, [`NodeError::Directory`] if there is no such partition,
    /// [`NodeError::Segment`].
    pub fn plan(data_dir: &Path, topic: &str, partition: u32) -> Result<Self, NodeError> {
        let dir = partition_dir(data_dir, topic, partition);
        fs::metadata(&dir).map_err(|source| NodeError::directory(&dir, source))?;
        let lock = lock_directory(data_dir)?;
        Ok(Self {
            name: (topic.to_owned(), partition),
            salvage: Salvage::plan(&dir, &SegmentOptions::default())?,
            checkpoints: Checkpoints::read(data_dir)?,
            dir,
            _lock: lock,
        })
    }

    /// The offset that the files end with afterwards.
    #[must_use]
    pub fn log_end_offset(&self) -> i64 {
        self.salvage.log_end_offset
    }

    /// Committed records, as far as the checkpoint knows, that are not in the files then.
    #[must_use]
    pub fn committed_count(&self) -> i64 {
        (self.checkpoints.high_watermark(&self.name) - self.log_end_offset()).max(0)
    }

    /// Whether the files give no reason to refuse a start.
    #[must_use]
    pub fn is_needless(&self) -> bool {
        self.salvage.is_needless() && self.committed_count() == 0
    }

    /// Sets aside what stands in the way, lowers the high watermark, and lets the next start accept that
    /// log memory may hold less than its tail says.
    ///
    /// # Errors
    ///
    /// [`NodeError::Segment`]; a plan made anew continues what was interrupted.
    pub fn carry_out(self) -> Result<(), NodeError> {
        let Self {
            name,
            dir,
            salvage,
            mut checkpoints,
            ..
        } = self;
        let accepted = dir.join(LOSS_ACCEPTED);
        let file = File::create(&accepted);
        file.and_then(|file| file.sync_all())
            .map_err(|source| NodeError::directory(accepted, source))?;
        let log_start_offset = checkpoints.log_start_offset(&name);
        let recovery = salvage.carry_out(log_start_offset, &SegmentOptions::default())?;
        let end = recovery.log_end_offset;
        let high_watermark = checkpoints.high_watermark(&name);
        checkpoints.set_high_watermark(&name, high_watermark.min(end));
        Ok(checkpoints.write_all()?)
    }
}

impl fmt::Display for PartitionSalvage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.salvage)?;
        let end = self.log_end_offset();
        let count = self.committed_count();
        if count > 0 {
            writeln!(
                f,
                "records up to offset {} were committed: {count} of them would be lost here, unless the log \
                 memory still holds them",
                end + count
            )?;
        }
        if self.is_needless() {
            writeln!(
                f,
                "the files need no repair: they end at offset {end}. What the log memory is missing, as the \
                 node said when it refused to start, would be lost"
            )?;
        }
        Ok(())
    }
}
