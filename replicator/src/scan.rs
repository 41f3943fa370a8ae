//! What of an image is log, once nobody can write to it any more.
//!
//! A tail says how far the log reached when it was written; a writer that was cut off may have placed more
//! behind it. Those bytes are log if they continue it, and the images of a partition are scanned for them
//! when a follower is fenced, when a leader has been deposed, and when a node starts.
//!
//! ```text
//!   image   | known: in the files | up to the tail | behind the tail    | 0 0 0
//!           '---- header CRC of the tail ---------'                     ^
//!                                 offsets continue, epochs do not fall, CRCs hold
//! ```
//!
//! A batch's own CRC covers neither its base offset nor its length nor its epoch. Up to the tail the running
//! CRC over the headers covers them. Behind it nothing does, but the bytes of an image are written once: what
//! is there was written by the leader that was granted it, or is zero.

use std::ops::Range;

use thiserror::Error;

use crate::faults::{Fault, is_injected};
use crate::image::{HeaderCrc, ImageId};
use crate::record::BatchView;
use crate::table::Tail;

/// Where a log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEnd {
    /// One past its last offset.
    pub offset: i64,
    /// The epoch of its last record, -1 if it has none.
    pub epoch: i32,
}

/// Batches of an image that continue a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// Where in the image they are, in bytes; empty if there are none.
    pub range: Range<usize>,
    /// Where the log ends with them.
    pub end: LogEnd,
}

/// An image is not what its tail says.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ScanError {
    /// It has fewer batches.
    #[error("the tail of {image_id} is at byte {expected}, its batches end at byte {found}")]
    Short {
        /// The image.
        image_id: ImageId,
        /// Where the tail is.
        expected: u32,
        /// Where the batches end.
        found: usize,
    },
    /// It has other batches.
    #[error(
        "the headers of {image_id} up to its tail at byte {byte_position} are not those it was written with"
    )]
    Headers {
        /// The image.
        image_id: ImageId,
        /// Where the tail is.
        byte_position: u32,
    },
    /// The log ends before its tail.
    #[error("the tail says offset {expected}, the log in memory and files ends at {found}")]
    Missing {
        /// The log end offset of the tail.
        expected: i64,
        /// What there is.
        found: i64,
    },
}

/// Finds the batches of an image that continue a log which ends at `log`.
///
/// `bytes` are a copy of the whole image: nothing may change them. `ceiling` is the highest epoch that was
/// granted the image, and `tail` the newest tail of the partition, whichever image it is of.
///
/// # Errors
///
/// [`ScanError`] if the tail is of this image and does not describe it.
pub fn continue_log(
    image_id: ImageId,
    bytes: &[u8],
    log: LogEnd,
    ceiling: i32,
    tail: Option<&Tail>,
) -> Result<Continuation, ScanError> {
    let is_lax = is_injected(Fault::ScanUnchecked);
    let tail = tail.filter(|tail| tail.image_id == image_id && !is_lax);
    let (mut at, mut from, mut end) = (0, None, log);
    let mut header_crc = HeaderCrc::default();
    loop {
        if let Some(tail) = tail.filter(|tail| tail.byte_position as usize == at)
            && tail.header_crc != header_crc
        {
            let byte_position = tail.byte_position;
            return Err(ScanError::Headers {
                image_id,
                byte_position,
            });
        }
        let Ok((batch, _)) = BatchView::parse(&bytes[at..]) else {
            break;
        };
        if from.is_none() && batch.base_offset() > log.offset {
            // The image before this one comes first.
            break;
        }
        let epoch = batch.partition_leader_epoch();
        let is_known = from.is_none() && batch.next_offset() <= log.offset;
        let is_next = batch.base_offset() == end.offset
            && (is_lax || (end.epoch..=ceiling).contains(&epoch))
            && batch.verify_crc().is_ok();
        if is_next {
            from.get_or_insert(at);
            end = LogEnd {
                offset: batch.next_offset(),
                epoch,
            };
        } else if !is_known {
            break;
        }
        header_crc = header_crc.extend(batch.stamped_bytes());
        at += batch.len();
    }
    let is_reached = from.is_some() || log.offset >= tail.map_or(0, |tail| tail.log_end_offset);
    if let Some(tail) = tail.filter(|tail| is_reached && at < tail.byte_position as usize) {
        return Err(ScanError::Short {
            image_id,
            expected: tail.byte_position,
            found: at,
        });
    }
    let range = from.map_or(at..at, |from| from..at);
    Ok(Continuation { range, end })
}

/// Checks that a log which has been continued as far as possible has all that its newest tail says.
///
/// # Errors
///
/// [`ScanError::Missing`].
pub fn check_end(end: LogEnd, tail: Option<&Tail>) -> Result<(), ScanError> {
    match tail {
        Some(tail) if tail.log_end_offset > end.offset => Err(ScanError::Missing {
            expected: tail.log_end_offset,
            found: end.offset,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{BatchBuilder, stamp};

    const IMAGE: ImageId = ImageId(9);

    fn batch(base_offset: i64, epoch: i32) -> Vec<u8> {
        let mut builder = BatchBuilder::new(4096);
        assert!(builder.append(0, None, Some(b"value"), &[]));
        let mut bytes = builder.build().to_vec();
        stamp(&mut bytes, base_offset, epoch);
        bytes
    }

    /// An image of batches with one record each, and a tail behind the first `tail_count` of them.
    fn image(batches: &[(i64, i32)], tail_count: usize) -> (Vec<u8>, Tail) {
        let mut bytes = Vec::new();
        let (mut header_crc, mut byte_position, mut end) = (HeaderCrc::default(), 0, 0);
        for (i, &(base_offset, epoch)) in batches.iter().enumerate() {
            let batch = batch(base_offset, epoch);
            if i < tail_count {
                header_crc = header_crc.extend(batch.first_chunk().unwrap());
                byte_position += u32::try_from(batch.len()).unwrap();
                end = base_offset + 1;
            }
            bytes.extend(batch);
        }
        bytes.extend([0; 200]);
        let tail = Tail {
            image_id: IMAGE,
            session: 1,
            leader_epoch: 3,
            sequence: 1,
            log_end_offset: end,
            high_watermark: 0,
            log_start_offset: 0,
            byte_position,
            header_crc,
            flags: 0,
        };
        (bytes, tail)
    }

    fn scan(bytes: &[u8], tail: &Tail, log: (i64, i32)) -> Result<LogEnd, ScanError> {
        let log = LogEnd {
            offset: log.0,
            epoch: log.1,
        };
        Ok(continue_log(IMAGE, bytes, log, 3, Some(tail))?.end)
    }

    fn end(offset: i64, epoch: i32) -> Result<LogEnd, ScanError> {
        Ok(LogEnd { offset, epoch })
    }

    #[test]
    fn what_landed_behind_the_tail_is_log() {
        let (bytes, tail) = image(&[(0, 1), (1, 1), (2, 3)], 1);
        assert_eq!(scan(&bytes, &tail, (0, -1)), end(3, 3));
        // Part of it is in the files already.
        assert_eq!(scan(&bytes, &tail, (2, 1)), end(3, 3));
        let (_, piece) = (
            0,
            continue_log(
                IMAGE,
                &bytes,
                LogEnd {
                    offset: 2,
                    epoch: 1,
                },
                3,
                None,
            ),
        );
        assert_eq!(piece.unwrap().range.len(), batch(2, 3).len());
    }

    #[test]
    fn what_does_not_continue_is_not_log() {
        for (offset, epoch) in [(3, 2), (2, 1), (2, 4)] {
            let (bytes, tail) = image(&[(0, 1), (1, 2), (offset, epoch)], 1);
            assert_eq!(scan(&bytes, &tail, (0, -1)), end(2, 2), "{offset} {epoch}");
        }
        let (mut bytes, tail) = image(&[(0, 1), (1, 2)], 1);
        let len = bytes.len() - 201;
        bytes[len] ^= 1;
        assert_eq!(scan(&bytes, &tail, (0, -1)), end(1, 1), "a torn body");
    }

    /// What a broker fills in place gets its header when it is committed, whatever its records look like.
    #[test]
    fn what_was_filled_and_not_committed_is_not_log() {
        let (mut bytes, tail) = image(&[(0, 1)], 1);
        bytes.truncate(batch(0, 1).len());
        bytes.extend([0; crate::record::HEADER_LEN]);
        bytes.extend(batch(1, 1));
        bytes.extend([0; 200]);
        assert_eq!(scan(&bytes, &tail, (0, -1)), end(1, 1));
    }

    #[test]
    fn a_header_that_has_changed_is_noticed() {
        let (mut bytes, tail) = image(&[(0, 1), (1, 1)], 2);
        // The epoch is not covered by the batch's own CRC.
        let len = batch(0, 1).len();
        stamp(&mut bytes[len..2 * len], 1, 2);
        assert!(matches!(
            scan(&bytes, &tail, (0, -1)),
            Err(ScanError::Headers { .. })
        ));
        bytes[len..].fill(0);
        assert!(matches!(
            scan(&bytes, &tail, (0, -1)),
            Err(ScanError::Short { .. })
        ));
        let short = LogEnd {
            offset: 1,
            epoch: 1,
        };
        assert!(check_end(short, Some(&tail)).is_err());
    }
}
