//! Reading committed batches out of the local replica, for a broker's own fetch path.
//!
//! The I/O thread only says where the bytes are; they are copied, from log memory or files, and checked in
//! the thread that reads. That is safe without a lock: the bytes of an image are written once, and committed
//! ones are never cut.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam::channel::bounded;
use thiserror::Error;
use transport::Mapping;

use super::events::Event;
use super::handle::Partition;
use super::memory::Image;
use super::partition::Held;
use crate::image::Mark;
use crate::record::{BatchHeader, BatchView, HEADER_LEN};
use crate::segment::{SegmentError, SegmentReader, list_segments};

/// Compressed records are expanded to at most this many bytes to find a timestamp.
const DECOMPRESSED_LEN_MAX: usize = 64 << 20;
/// Bytes read in one go to find a timestamp.
const SCAN_LEN: usize = 1 << 20;
/// How often records are looked for that the files should have.
const TRIES_MAX: usize = 100;
const RETRY_DELAY: Duration = Duration::from_millis(1);

/// How far a replica's log reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Offsets {
    /// The first offset there is.
    pub log_start_offset: i64,
    /// One past the last committed offset, as far as the replica knows.
    pub high_watermark: i64,
    /// One past the last offset.
    pub log_end_offset: i64,
}

/// Why the local replica cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The offset is below the log start, or beyond what is committed.
    #[error("offset {offset} is outside of the committed log, {earliest} to {latest}")]
    OffsetOutOfRange {
        /// The offset asked for.
        offset: i64,
        /// The first offset there is.
        earliest: i64,
        /// One past the last committed offset.
        latest: i64,
    },
    /// What is stored at an offset is no valid batch.
    #[error("what is stored at offset {offset} is no valid batch: {cause}")]
    Damaged {
        /// The offset.
        offset: i64,
        /// What is wrong.
        cause: String,
    },
    /// The segment files cannot be read.
    #[error(transparent)]
    Files(#[from] SegmentError),
    /// The node has stopped.
    #[error("the node has stopped")]
    Stopped,
}

/// Where the bytes at an offset are.
#[derive(Debug)]
pub(super) struct Located {
    pub(super) offsets: Offsets,
    pub(super) drained_offset: i64,
    /// The image, unless they are in the files: where its bytes can be read from, and up to.
    memory: Option<(Arc<Image>, Mark, u32)>,
}

impl Held {
    /// Where the bytes at an offset are.
    pub(super) fn locate(&self, offset: i64) -> Located {
        let (offsets, drained_offset, found) =
            match (self.replica.leader(), self.replica.follower()) {
                (Some(leader), _) => {
                    let log = leader.log();
                    let offsets = Offsets {
                        log_start_offset: log.log_start_offset(),
                        high_watermark: leader.high_watermark(),
                        log_end_offset: log.log_end_offset(),
                    };
                    let found = log.image_of_offset(offset).map(|state| {
                        let end = state.end().byte_position;
                        (state.id(), state.mark_for_offset(offset), end)
                    });
                    (offsets, log.drained_offset(), found)
                }
                (_, Some(follower)) => {
                    let log_end_offset = follower.log_end_offset();
                    let offsets = Offsets {
                        log_start_offset: follower.log_start_offset(),
                        high_watermark: follower.high_watermark().min(log_end_offset),
                        log_end_offset,
                    };
                    let found = follower.undrained_image_of(offset);
                    let found = found.map(|(id, mark)| (id, mark, follower.image_len()));
                    (offsets, follower.drained_offset(), found)
                }
                (None, None) => (Offsets::EMPTY, 0, None),
            };
        let memory = found.and_then(|(id, from, to)| {
            let image = self.images.get(&id)?;
            Some((Arc::clone(image), from, to))
        });
        Located {
            offsets,
            drained_offset,
            memory,
        }
    }
}

impl Offsets {
    const EMPTY: Self = Self {
        log_start_offset: 0,
        high_watermark: 0,
        log_end_offset: 0,
    };
}

impl Partition {
    /// How far the replica's log reaches now, as far as it knows: one that has just begun to lead may know a
    /// lower high watermark than the leader before it.
    ///
    /// # Errors
    ///
    /// [`ReadError::Stopped`].
    pub fn offsets(&self) -> Result<Offsets, ReadError> {
        // A tail is published before anything in it is acknowledged.
        match self.table_entry().tail {
            Some(tail) => Ok(Offsets {
                log_start_offset: tail.log_start_offset,
                high_watermark: tail.high_watermark,
                log_end_offset: tail.log_end_offset,
            }),
            None => Ok(self.locate(0)?.offsets),
        }
    }

    /// Reads whole committed batches from this node's replica, be it the leader or a follower, without RDMA:
    /// the one that holds `offset`, and as many that follow it as have at most `len_max` bytes with it. They
    /// are appended to `out`, which stays as it was if there is nothing new.
    ///
    /// Returns how far the log reaches. A follower may return nothing for a moment although records are
    /// committed that it has just received. It waits for files, not for records: poll
    /// [`offsets`](Self::offsets), which costs no more than a look at memory.
    ///
    /// # Errors
    ///
    /// [`ReadError`].
    pub fn read(
        &self,
        offset: i64,
        len_max: usize,
        out: &mut Vec<u8>,
    ) -> Result<Offsets, ReadError> {
        let before = out.len();
        for _ in 0..TRIES_MAX {
            let located = self.locate(offset)?;
            let offsets = located.offsets;
            let (earliest, latest) = (offsets.log_start_offset, offsets.high_watermark);
            if !(earliest..=latest).contains(&offset) {
                return Err(ReadError::OffsetOutOfRange {
                    offset,
                    earliest,
                    latest,
                });
            }
            if offset == latest {
                return Ok(offsets);
            }
            let wanted = Wanted {
                offset,
                high_watermark: latest,
                len_max,
            };
            match &located.memory {
                Some((image, from, to)) => wanted.copy(image.mapping(), *from, *to, out)?,
                None if offset < located.drained_offset => wanted.read_files(self.dir(), out)?,
                None => {}
            }
            if out.len() > before || offset >= located.drained_offset {
                return Ok(offsets);
            }
            // Retention has removed the file meanwhile, so the log begins later now.
            thread::sleep(RETRY_DELAY);
        }
        let cause = "the files do not have it".to_owned();
        Err(ReadError::Damaged { offset, cause })
    }

    /// The first committed record that is not older than `timestamp`, in milliseconds since 1970: its offset
    /// and its own timestamp; `None` if all are older. Kafka's ListOffsets.
    ///
    /// # Errors
    ///
    /// [`ReadError`].
    pub fn offset_of_timestamp(&self, timestamp: i64) -> Result<Option<(i64, i64)>, ReadError> {
        let Located {
            offsets,
            drained_offset,
            ..
        } = self.locate(i64::MAX)?;
        for base_offset in list_segments(self.dir())? {
            let reader = SegmentReader::open(self.dir(), base_offset)?;
            if let Some(found) = reader.find_timestamp(timestamp, DECOMPRESSED_LEN_MAX)? {
                // Those behind it are committed later still.
                return Ok(Some(found).filter(|(offset, _)| *offset < offsets.high_watermark));
            }
        }
        self.find_in_memory(drained_offset, timestamp)
    }

    fn find_in_memory(
        &self,
        mut offset: i64,
        timestamp: i64,
    ) -> Result<Option<(i64, i64)>, ReadError> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            if offset < self.offsets()?.high_watermark {
                self.read(offset, SCAN_LEN, &mut bytes)?;
            }
            if bytes.is_empty() {
                return Ok(None);
            }
            let mut rest = &bytes[..];
            while let Ok((batch, behind)) = BatchView::parse(rest) {
                if batch.max_timestamp() >= timestamp
                    && let Some(found) = first_at(&batch, timestamp)?
                {
                    return Ok(Some(found));
                }
                offset = batch.next_offset();
                rest = behind;
            }
        }
    }

    fn locate(&self, offset: i64) -> Result<Located, ReadError> {
        let (reply, located) = bounded(1);
        let partition = self.index();
        let event = Event::LocateAsked {
            partition,
            offset,
            reply,
        };
        self.events().send(event).map_err(|_| ReadError::Stopped)?;
        located.recv().map_err(|_| ReadError::Stopped)
    }
}

fn first_at(batch: &BatchView<'_>, timestamp: i64) -> Result<Option<(i64, i64)>, ReadError> {
    let damaged = |error: crate::record::BatchError| ReadError::Damaged {
        offset: batch.base_offset(),
        cause: error.to_string(),
    };
    let body = batch.decompress(DECOMPRESSED_LEN_MAX).map_err(damaged)?;
    for record in batch.records_from(&body).map_err(damaged)? {
        let record = record.map_err(damaged)?;
        if record.timestamp >= timestamp {
            return Ok(Some((record.offset, record.timestamp)));
        }
    }
    Ok(None)
}

/// What is to be read.
struct Wanted {
    offset: i64,
    high_watermark: i64,
    len_max: usize,
}

impl Wanted {
    /// Copies batches of an image, of which bytes from a mark on and below `to` are known to be log or zero.
    fn copy(
        &self,
        image: &Mapping,
        from: Mark,
        to: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), ReadError> {
        let (mut at, mut expected) = (from.byte_position as usize, from.end_offset);
        let mut range = None;
        let to = to as usize;
        let mut first = [0; HEADER_LEN];
        while to - at >= HEADER_LEN {
            image
                .read_at(at, &mut first)
                .expect("a mark lies inside of its image");
            let header = BatchHeader::read(&first);
            let Ok(len) = header.check() else { break };
            let next = header.base_offset + i64::from(header.last_offset_delta) + 1;
            if header.base_offset != expected || next > self.high_watermark || len > to - at {
                break;
            }
            if next > self.offset {
                let (start, _) = *range.get_or_insert((at, at));
                if at > start && at + len - start > self.len_max {
                    break;
                }
                range = Some((start, at + len));
            }
            (at, expected) = (at + len, next);
        }
        let Some((start, end)) = range else {
            return Ok(());
        };
        let before = out.len();
        out.resize(before + end - start, 0);
        image
            .read_at(start, &mut out[before..])
            .expect("batches lie inside of their image");
        self.verify(out, before)
    }

    /// Reads batches of the segment file that holds the offset.
    fn read_files(&self, dir: &std::path::Path, out: &mut Vec<u8>) -> Result<(), ReadError> {
        let segments = list_segments(dir)?;
        let Some(&segment) = segments.iter().rev().find(|base| **base <= self.offset) else {
            return Ok(());
        };
        let reader = SegmentReader::open(dir, segment)?;
        let Some(found) = reader.position_of(self.offset)? else {
            return Ok(());
        };
        let before = out.len();
        let left = reader.len()?.saturating_sub(found.position);
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        out.resize(before + self.len_max.max(found.len).min(left), 0);
        let len = reader.read_at(found.position, &mut out[before..])?;
        out.truncate(before + len);
        let mut whole = 0;
        while let Ok((batch, _)) = BatchView::parse(&out[before + whole..])
            && batch.next_offset() <= self.high_watermark
        {
            whole += batch.len();
        }
        out.truncate(before + whole);
        self.verify(out, before)
    }

    /// Nothing damaged is given out.
    fn verify(&self, out: &mut Vec<u8>, before: usize) -> Result<(), ReadError> {
        let mut rest = &out[before..];
        while !rest.is_empty() {
            let checked = BatchView::parse(rest)
                .and_then(|(batch, behind)| batch.verify_crc().map(|()| behind));
            match checked {
                Ok(behind) => rest = behind,
                Err(error) => {
                    out.truncate(before);
                    return Err(ReadError::Damaged {
                        offset: self.offset,
                        cause: error.to_string(),
                    });
                }
            }
        }
        Ok(())
    }
}
