//! Reads one segment: by position, by offset, by timestamp.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::record::{BatchError, BatchHeader, BatchView, HEADER_LEN};

use super::error::{IoOp, SegmentError};
use super::index::{IndexEntry, TimeIndexEntry};
use super::layout::{SegmentFile, parse_segment_path, segment_path};
use super::storage::{OpenMode, Storage};

/// Where a batch lies in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPosition {
    /// Position of its first byte in the `.log` file.
    pub position: u64,
    /// Bytes of the batch.
    pub len: usize,
    /// Its first offset.
    pub base_offset: i64,
    /// Its last offset.
    pub last_offset: i64,
}

/// A segment open for reading; it may still grow.
///
/// The indexes are read once, when the segment is opened, and serve as a hint where to begin: an
/// index that is missing or short makes lookups slower, not wrong.
#[derive(Debug)]
pub struct SegmentReader {
    path: PathBuf,
    log: File,
    base_offset: i64,
    offsets: Vec<IndexEntry>,
    times: Vec<TimeIndexEntry>,
}

impl SegmentReader {
    /// Opens the segment of `dir` that begins at `base_offset`.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`] if the log cannot be opened, or an index exists and cannot be read.
    pub fn open(dir: &Path, base_offset: i64) -> Result<Self, SegmentError> {
        Self::open_file(&segment_path(dir, base_offset, SegmentFile::Log))
    }

    /// Opens the segment whose `.log` file is `path`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), and [`SegmentError::Name`] if the name gives no base offset.
    pub fn open_file(path: &Path) -> Result<Self, SegmentError> {
        let (base_offset, _) = parse_segment_path(path)?;
        let beside = |file: SegmentFile| path.with_extension(file.extension());
        Ok(Self {
            log: File::open(path).map_err(SegmentError::io(IoOp::Open, path))?,
            path: path.to_owned(),
            base_offset,
            offsets: IndexEntry::read_all(&read_if_exists(&beside(SegmentFile::Index))?),
            times: TimeIndexEntry::read_all(&read_if_exists(&beside(SegmentFile::TimeIndex))?),
        })
    }

    /// Returns the offset that the segment begins with.
    pub fn base_offset(&self) -> i64 {
        self.base_offset
    }

    /// Returns the path of the log file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the bytes in the log file now.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`].
    #[expect(clippy::len_without_is_empty, reason = "asks the file system")]
    pub fn len(&self) -> Result<u64, SegmentError> {
        let metadata = self
            .log
            .metadata()
            .map_err(SegmentError::io(IoOp::Read, &self.path))?;
        Ok(metadata.len())
    }

    /// Fills `out` from `position` on and returns how many bytes the file had there.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`].
    pub fn read_at(&self, position: u64, out: &mut [u8]) -> Result<usize, SegmentError> {
        read_up_to(&self.log, &self.path, position, out)
    }

    /// Writes the log's bytes over themselves and syncs them, so that what the page cache calls clean is on
    /// the device.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`].
    pub fn rewrite(&self, storage: &dyn Storage) -> Result<(), SegmentError> {
        let file = storage
            .open(&self.path, OpenMode::Existing)
            .map_err(SegmentError::io(IoOp::Open, &self.path))?;
        let (mut position, mut chunk) = (0, vec![0; 1 << 20]);
        loop {
            let len = self.read_at(position, &mut chunk)?;
            if len == 0 {
                break;
            }
            storage
                .write_at(&file, &chunk[..len], position)
                .map_err(SegmentError::io_at(IoOp::Write, &self.path, position))?;
            position += len as u64;
        }
        storage
            .sync(&file)
            .map_err(SegmentError::io(IoOp::Sync, &self.path))
    }

    /// Reads batch after batch from `position` to the present end of the file.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`].
    pub fn batches(&self, position: u64) -> Result<BatchScanner<'_>, SegmentError> {
        Ok(BatchScanner {
            log: &self.log,
            path: &self.path,
            position,
            end: self.len()?,
            buffer: Vec::new(),
            buffer_position: position,
        })
    }

    /// Finds the first batch whose last offset is `offset` or more: the one that holds it.
    ///
    /// Returns `None` if the segment ends before `offset`.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Io`], or [`SegmentError::Damaged`] if the way there is not made of batches.
    pub fn position_of(&self, offset: i64) -> Result<Option<BatchPosition>, SegmentError> {
        let relative = offset.saturating_sub(self.base_offset);
        let behind = self
            .offsets
            .partition_point(|e| i64::from(e.relative_offset) <= relative);
        let start = match behind.checked_sub(1) {
            Some(index) => u64::from(self.offsets[index].position.cast_unsigned()),
            None => 0,
        };
        let mut batches = self.batches(start)?;
        while let Some(batch) = batches.next_position()? {
            if batch.last_offset >= offset {
                return Ok(Some(batch));
            }
        }
        Ok(None)
    }

    /// Finds the first record with `timestamp` or a later one; returns its offset and timestamp.
    ///
    /// Compressed batches are decompressed to at most `limit` bytes. Returns `None` if every
    /// record is earlier.
    ///
    /// # Errors
    ///
    /// As [`position_of`](Self::position_of), and [`SegmentError::Damaged`] if the batch that must
    /// hold the record cannot be read.
    pub fn find_timestamp(
        &self,
        timestamp: i64,
        limit: usize,
    ) -> Result<Option<(i64, i64)>, SegmentError> {
        let behind = self
            .times
            .partition_point(|entry| entry.timestamp <= timestamp);
        let start_offset = match behind.checked_sub(1) {
            Some(index) => self.base_offset + i64::from(self.times[index].relative_offset),
            None => self.base_offset,
        };
        let Some(start) = self.position_of(start_offset)? else {
            return Ok(None);
        };
        let mut batches = self.batches(start.position)?;
        while let Some((position, batch)) = batches.next_batch()? {
            if batch.max_timestamp() < timestamp {
                continue;
            }
            let found = first_record_at(&batch, timestamp, limit)
                .map_err(|error| damaged(&self.path, position, error))?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

fn first_record_at(
    batch: &BatchView<'_>,
    timestamp: i64,
    limit: usize,
) -> Result<Option<(i64, i64)>, BatchError> {
    let body = batch.decompress(limit)?;
    for record in batch.records_from(&body)? {
        let record = record?;
        if record.timestamp >= timestamp {
            return Ok(Some((record.offset, record.timestamp)));
        }
    }
    Ok(None)
}

/// Reads batch after batch; lends each until the next is asked for.
///
/// Stops for good at the first error, with [`position`](Self::position) where it is. The buffer
/// holds one batch, never more than the file has.
#[derive(Debug)]
pub struct BatchScanner<'f> {
    log: &'f File,
    path: &'f Path,
    /// Where the next batch begins.
    position: u64,
    end: u64,
    /// Bytes of the file from `buffer_position` on.
    buffer: Vec<u8>,
    buffer_position: u64,
}

impl BatchScanner<'_> {
    /// Least bytes of one read.
    const READ_LEN: usize = 256 * 1024;

    /// Returns where the next batch begins, or where the last error is.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Returns the end of the file as it was when the scan began.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Reads the next batch; its header is checked, its CRC is not.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Damaged`] if the bytes are no batch or it is cut off, [`SegmentError::Io`].
    pub fn next_batch(&mut self) -> Result<Option<(u64, BatchView<'_>)>, SegmentError> {
        let position = self.position;
        let Some((_, len)) = self.next_header()? else {
            return Ok(None);
        };
        let available = self.fill(len)?.len();
        let start = self.buffered(position);
        let (batch, _) = BatchView::parse(&self.buffer[start..start + available])
            .map_err(|error| damaged(self.path, position, error))?;
        self.position += len as u64;
        Ok(Some((position, batch)))
    }

    /// Reads the next batch's header only, and says where the batch lies.
    ///
    /// # Errors
    ///
    /// As [`next_batch`](Self::next_batch).
    pub fn next_position(&mut self) -> Result<Option<BatchPosition>, SegmentError> {
        let position = self.position;
        let Some((header, len)) = self.next_header()? else {
            return Ok(None);
        };
        self.position += len as u64;
        Ok(Some(BatchPosition {
            position,
            len,
            base_offset: header.base_offset,
            last_offset: header.base_offset + i64::from(header.last_offset_delta),
        }))
    }

    /// The checked header at the position, of a batch that the file is long enough for.
    fn next_header(&mut self) -> Result<Option<(BatchHeader, usize)>, SegmentError> {
        let (path, position) = (self.path, self.position);
        let remaining = self.end.saturating_sub(position);
        if remaining == 0 {
            return Ok(None);
        }
        let bytes = self.fill(HEADER_LEN)?;
        let available = bytes.len();
        let Some(first) = bytes.first_chunk() else {
            let error = BatchError::Incomplete {
                needed: HEADER_LEN,
                available,
            };
            return Err(damaged(path, position, error));
        };
        let header = BatchHeader::read(first);
        let needed = header
            .check()
            .map_err(|error| damaged(path, position, error))?;
        if needed as u64 > remaining {
            let available = usize::try_from(remaining).unwrap_or(usize::MAX);
            let error = BatchError::Incomplete { needed, available };
            return Err(damaged(path, position, error));
        }
        Ok(Some((header, needed)))
    }

    /// The bytes from the position on: `needed` of them, or as many as the file has.
    fn fill(&mut self, needed: usize) -> Result<&[u8], SegmentError> {
        let buffer_end = self.buffer_position + self.buffer.len() as u64;
        let is_buffered =
            self.position >= self.buffer_position && self.position + needed as u64 <= buffer_end;
        if !is_buffered {
            let remaining = self.end.saturating_sub(self.position);
            let wanted = (needed.max(Self::READ_LEN) as u64).min(remaining);
            self.buffer
                .resize(usize::try_from(wanted).unwrap_or(usize::MAX), 0);
            self.buffer_position = self.position;
            let len = read_up_to(self.log, self.path, self.position, &mut self.buffer)?;
            self.buffer.truncate(len);
        }
        let start = self.buffered(self.position);
        let available = self.buffer.len() - start;
        Ok(&self.buffer[start..start + needed.min(available)])
    }

    /// The place in the buffer of a position that `fill` has just been asked for.
    fn buffered(&self, position: u64) -> usize {
        usize::try_from(position - self.buffer_position).expect("the buffer is in memory")
    }
}

pub(super) fn damaged(path: &Path, position: u64, error: BatchError) -> SegmentError {
    SegmentError::Damaged {
        path: path.to_owned(),
        position,
        fault: error.into(),
    }
}

/// Reads until `out` is full or the file ends.
fn read_up_to(
    file: &File,
    path: &Path,
    position: u64,
    out: &mut [u8],
) -> Result<usize, SegmentError> {
    let mut len = 0;
    while len < out.len() {
        let at = position + len as u64;
        match file.read_at(&mut out[len..], at) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(SegmentError::io_at(IoOp::Read, path, at)(error)),
        }
    }
    Ok(len)
}

/// The bytes of a file, none if it does not exist.
pub(super) fn read_if_exists(path: &Path) -> Result<Vec<u8>, SegmentError> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(SegmentError::io(IoOp::Read, path)),
    }
}
