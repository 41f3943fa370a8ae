//! Appends batches to one segment and its indexes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::record::BatchView;

use super::checkpoint::sync_dir;
use super::error::{IoOp, SegmentError, SegmentFault};
use super::index::IndexBuilder;
use super::layout::{SegmentFile, segment_path};
use super::recover::RecoveredSegment;
use super::storage::{Disk, OpenMode, Storage};

/// Settings of a partition's segments.
#[derive(Debug, Clone)]
pub struct SegmentOptions {
    /// Bytes of log between two index entries; Kafka's `index.interval.bytes`, 4096 by default.
    pub index_interval_bytes: u32,
    /// What files are changed through.
    pub storage: Arc<dyn Storage>,
}

impl Default for SegmentOptions {
    fn default() -> Self {
        Self {
            index_interval_bytes: 4096,
            storage: Arc::new(Disk),
        }
    }
}

/// The segment that a partition appends to.
///
/// After an error nothing counts as appended: the same bytes may be given again, and overwrite
/// what the failed attempt left.
#[derive(Debug)]
pub struct SegmentWriter {
    log: SizedFile,
    index: SizedFile,
    time_index: SizedFile,
    base_offset: i64,
    next_offset: i64,
    indexes: IndexBuilder,
}

impl SegmentWriter {
    /// Creates the files of an empty segment, and `dir` if need be.
    ///
    /// May be called again after an error: a log file created in vain is removed, or taken if it is empty.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`], also if the segment exists already: then [`recover`](super::recover)
    /// comes first.
    pub fn create(
        dir: &Path,
        base_offset: i64,
        options: &SegmentOptions,
    ) -> Result<Self, SegmentError> {
        fs::create_dir_all(dir).map_err(SegmentError::io(IoOp::Create, dir))?;
        let path = |file| segment_path(dir, base_offset, file);
        let storage = &options.storage;
        let is_left_over = fs::metadata(path(SegmentFile::Log)).is_ok_and(|file| file.len() == 0);
        let mode = match is_left_over {
            true => OpenMode::Existing,
            false => OpenMode::New,
        };
        let log = SizedFile::open(storage, path(SegmentFile::Log), mode, 0)?;
        let empty = |file| SizedFile::open(storage, path(file), OpenMode::Empty, 0);
        let indexes = empty(SegmentFile::Index)
            .and_then(|index| Ok((index, empty(SegmentFile::TimeIndex)?)))
            .and_then(|files| sync_dir(&**storage, dir).map(|()| files));
        let (index, time_index) = indexes.inspect_err(|_| {
            // Empty and ours. Should it stay, recovery takes it for an empty segment.
            let _ = storage.remove(&log.path);
        })?;
        Ok(Self {
            log,
            index,
            time_index,
            base_offset,
            next_offset: base_offset,
            indexes: IndexBuilder::new(base_offset, options.index_interval_bytes),
        })
    }

    /// Continues the segment that [`recover`](super::recover) found last.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`].
    pub fn resume(
        dir: &Path,
        segment: RecoveredSegment,
        options: &SegmentOptions,
    ) -> Result<Self, SegmentError> {
        let open = |file, len| {
            let path = segment_path(dir, segment.base_offset, file);
            SizedFile::open(&options.storage, path, OpenMode::Existing, len)
        };
        Ok(Self {
            log: open(SegmentFile::Log, segment.len)?,
            index: open(SegmentFile::Index, segment.index_len)?,
            time_index: open(SegmentFile::TimeIndex, segment.time_index_len)?,
            base_offset: segment.base_offset,
            next_offset: segment.next_offset,
            indexes: segment.indexes,
        })
    }

    /// Appends whole batches, which continue the segment's offsets, and returns where they begin.
    ///
    /// The bytes are in the file when this returns, on the device after [`sync`](Self::sync).
    /// Headers are checked and indexed; CRCs are the caller's matter.
    ///
    /// # Errors
    ///
    /// - [`SegmentError::Damaged`] if the bytes are not whole batches or leave a gap; `position` is
    ///   where the batch at fault would have been. Nothing is written.
    /// - [`SegmentError::Full`] if the segment must be rolled first. Nothing is written.
    /// - [`SegmentError::Io`] if the file system refuses; [`SegmentError::is_out_of_space`] says
    ///   whether freeing space helps.
    pub fn append(&mut self, bytes: &[u8]) -> Result<u64, SegmentError> {
        let (position, index_position) = (self.log.len, self.index.len);
        let mut indexes = self.indexes.clone();
        let next_offset = self.index_batches(bytes, &mut indexes)?;
        self.log.append(bytes)?;
        // An index is a hint: should it be short after a crash, recovery rebuilds it.
        let appended = self
            .index
            .append(&indexes.offsets)
            .and_then(|()| self.time_index.append(&indexes.times));
        if let Err(error) = appended {
            (self.log.len, self.index.len) = (position, index_position);
            return Err(error);
        }
        indexes.offsets.clear();
        indexes.times.clear();
        self.indexes = indexes;
        self.next_offset = next_offset;
        Ok(position)
    }

    fn index_batches(&self, bytes: &[u8], indexes: &mut IndexBuilder) -> Result<i64, SegmentError> {
        let mut next_offset = self.next_offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let position = self.log.len + (bytes.len() - rest.len()) as u64;
            let damaged = |fault| SegmentError::Damaged {
                path: self.log.path.clone(),
                position,
                fault,
            };
            let (batch, behind) = BatchView::parse(rest).map_err(|e| damaged(e.into()))?;
            if batch.base_offset() != next_offset {
                let found = batch.base_offset();
                return Err(damaged(SegmentFault::Offset {
                    expected: next_offset,
                    found,
                }));
            }
            let end = position + batch.len() as u64;
            if i32::try_from(end).is_err() || indexes.relative(batch.next_offset()).is_none() {
                return Err(SegmentError::Full {
                    path: self.log.path.clone(),
                });
            }
            indexes.observe(batch.header(), position, batch.len());
            next_offset = batch.next_offset();
            rest = behind;
        }
        Ok(next_offset)
    }

    /// Waits until the log's bytes are on the device.
    ///
    /// The indexes are left to the page cache: recovery rebuilds them.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`]. The kernel may have dropped the bytes that it could not write, so a
    /// later success does not vouch for them: recover the segment before going on.
    pub fn sync(&self) -> Result<(), SegmentError> {
        self.log.sync()
    }

    /// Completes the segment before the next one is created: final time entry, everything synced.
    ///
    /// May be called again after an error.
    ///
    /// # Errors
    ///
    /// As [`append`](Self::append) and [`sync`](Self::sync).
    pub fn seal(&mut self) -> Result<(), SegmentError> {
        self.indexes.put_time_entry();
        self.time_index.append(&self.indexes.times)?;
        self.indexes.times.clear();
        self.log.sync()?;
        self.index.sync()?;
        self.time_index.sync()
    }

    /// Returns the offset that the segment begins with.
    pub fn base_offset(&self) -> i64 {
        self.base_offset
    }

    /// Returns the offset that the next batch must begin with.
    pub fn next_offset(&self) -> i64 {
        self.next_offset
    }

    /// Returns the bytes in the log file.
    pub fn len(&self) -> u64 {
        self.log.len
    }

    /// Says whether nothing has been appended yet.
    pub fn is_empty(&self) -> bool {
        self.log.len == 0
    }

    /// Returns the largest timestamp appended, -1 if there is none.
    pub fn max_timestamp(&self) -> i64 {
        self.indexes.max_timestamp()
    }

    /// Returns the path of the log file.
    pub fn path(&self) -> &Path {
        &self.log.path
    }
}

/// A file and how many of its bytes count.
#[derive(Debug)]
struct SizedFile {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    file: File,
    len: u64,
}

impl SizedFile {
    fn open(
        storage: &Arc<dyn Storage>,
        path: PathBuf,
        mode: OpenMode,
        len: u64,
    ) -> Result<Self, SegmentError> {
        let op = match mode {
            OpenMode::Existing => IoOp::Open,
            OpenMode::New | OpenMode::Empty => IoOp::Create,
        };
        let file = storage
            .open(&path, mode)
            .map_err(SegmentError::io(op, &path))?;
        Ok(Self {
            storage: Arc::clone(storage),
            path,
            file,
            len,
        })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), SegmentError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.storage
            .write_at(&self.file, bytes, self.len)
            .map_err(SegmentError::io_at(IoOp::Write, &self.path, self.len))?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn sync(&self) -> Result<(), SegmentError> {
        self.storage
            .sync(&self.file)
            .map_err(SegmentError::io(IoOp::Sync, &self.path))
    }
}
