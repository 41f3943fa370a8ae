//! The checkpoints that all partitions of a data directory share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::segment::{
    Disk, HIGH_WATERMARK_CHECKPOINT, LOG_START_CHECKPOINT, PartitionOffsets, SegmentError, Storage,
    read_partition_offsets, write_partition_offsets,
};

/// Topic and number of a partition.
pub(super) type PartitionName = (String, u32);

/// High watermarks and log start offsets: as they are, and as they were last written.
#[derive(Debug)]
pub(super) struct Checkpoints {
    storage: Arc<dyn Storage>,
    high_watermarks: Checkpoint,
    log_starts: Checkpoint,
}

#[derive(Debug)]
struct Checkpoint {
    path: PathBuf,
    offsets: PartitionOffsets,
    is_changed: bool,
}

impl Checkpoints {
    pub(super) fn read(data_dir: &Path) -> Result<Self, SegmentError> {
        Ok(Self {
            storage: Arc::new(Disk),
            high_watermarks: Checkpoint::read(data_dir.join(HIGH_WATERMARK_CHECKPOINT))?,
            log_starts: Checkpoint::read(data_dir.join(LOG_START_CHECKPOINT))?,
        })
    }

    pub(super) fn high_watermark(&self, name: &PartitionName) -> i64 {
        self.high_watermarks.offset(name)
    }

    pub(super) fn set_high_watermark(&mut self, name: &PartitionName, offset: i64) {
        self.high_watermarks.set(name, offset);
    }

    pub(super) fn log_start_offset(&self, name: &PartitionName) -> i64 {
        self.log_starts.offset(name)
    }

    pub(super) fn set_log_start_offset(&mut self, name: &PartitionName, offset: i64) {
        self.log_starts.set(name, offset);
    }

    /// Writes what has changed.
    pub(super) fn write_all(&mut self) -> Result<(), SegmentError> {
        self.log_starts.write(&*self.storage)?;
        self.high_watermarks.write(&*self.storage)
    }
}

impl Checkpoint {
    fn read(path: PathBuf) -> Result<Self, SegmentError> {
        Ok(Self {
            offsets: read_partition_offsets(&path)?,
            path,
            is_changed: false,
        })
    }

    /// 0 if none is known.
    fn offset(&self, name: &PartitionName) -> i64 {
        self.offsets.get(name).copied().unwrap_or(0)
    }

    fn set(&mut self, name: &PartitionName, offset: i64) {
        if self.offsets.get(name) != Some(&offset) {
            self.offsets.insert(name.clone(), offset);
            self.is_changed = true;
        }
    }

    fn write(&mut self, storage: &dyn Storage) -> Result<(), SegmentError> {
        if self.is_changed {
            write_partition_offsets(storage, &self.path, &self.offsets)?;
            self.is_changed = false;
        }
        Ok(())
    }
}
