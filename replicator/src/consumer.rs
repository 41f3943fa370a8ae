//! Fetching committed records by RDMA READ.
//!
//! A [`Cursor`] is one partition's position in a replica's memory, without I/O. A round is: ask
//! [`Cursor::plan`] what to READ, post the READs of table entry and data in one doorbell, and give
//! both to [`Cursor::complete`], which says which of the bytes are committed batches, checked and in
//! order.
//!
//! ```text
//!  plan ---> NeedsImage ---- ImageRequest, handle_image ----.
//!   ^  `---> Read { data: None }     the entry alone (idle) |
//!   |  `---> Read { data: Some(..) } entry and data         |
//!   '------------------- complete <-------------------------'
//! ```
//!
//! The data are read without knowing how far they are committed. That is safe in any order of the two
//! READs, since the bytes under one key are written once: what arrives is final bytes or zeros. A
//! batch counts if its header continues the offsets, its CRC holds, its epoch does not fall, and it
//! ends at or below the high watermark of the entry.

use std::ops::Range;

use thiserror::Error;

use crate::record::{BATCH_LEN_PREFIX, BatchError, BatchView, HEADER_LEN};
use crate::table::{BASE_OFFSET_UNKNOWN, Descriptor, ENTRY_LEN, Entry, ImageLocation};

pub use crate::runtime::{Consumer, ConsumerError, Fetch, StartOffset};

/// An image that the entry described is read without asking for at most this long, in nanoseconds:
/// half the grace period for which a replica keeps it.
const DESCRIBED_FOR_NS: u64 = 1_000_000_000;
/// How often bytes that must be a committed batch are read again before they are called corrupt.
const RETRIES_MAX: u32 = 16;
/// After so many retries the replica is asked again where the batch is.
const ASK_AFTER_RETRIES: u32 = 4;
/// How many rounds without news are made before only the entry is read.
const IDLE_ROUNDS_MAX: u32 = 3;

/// Where and how much to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataRead {
    /// Address of the first byte.
    pub addr: u64,
    /// Key.
    pub rkey: u32,
    /// Bytes.
    pub len: u32,
}

/// What to do next for a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Ask the replica, by control message, for the image that holds this offset.
    NeedsImage(i64),
    /// Read the table entry, and these bytes in the same doorbell.
    Read(Option<DataRead>),
}

/// An image that a replica granted by control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Offset of the first record at `addr`.
    pub base_offset: i64,
    /// Address of the first readable byte.
    pub addr: u64,
    /// Key.
    pub rkey: u32,
    /// Readable bytes.
    pub len: u32,
}

/// The outcome of a round.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Completed {
    /// Which of the data are committed batches, back to back.
    pub batches: Range<usize>,
    /// Nothing can be expected before the replica appends or commits more.
    pub is_idle: bool,
}

/// A replica's memory cannot be a log.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FetchFault {
    /// Bytes below the high watermark are no batch, however often they are read.
    #[error(
        "offset {offset} is committed, but what is there is no valid batch: {cause}; \
         the replica's memory is damaged, read from another replica"
    )]
    Corrupt {
        /// The offset wanted.
        offset: i64,
        /// What is wrong.
        cause: String,
    },
    /// The offset was removed from the log.
    #[error(
        "offset {offset} is below the log start offset {log_start_offset}: start from earliest"
    )]
    BelowLogStart {
        /// The offset wanted.
        offset: i64,
        /// The first offset there is.
        log_start_offset: i64,
        /// One past the last committed offset.
        high_watermark: i64,
    },
}

/// An image, from the next byte to be read on.
#[derive(Debug, Clone, Copy)]
struct View {
    addr: u64,
    end: u64,
    rkey: u32,
    /// When an entry described it last; `None` if it was granted, which lasts until we ask again.
    described_at: Option<u64>,
}

/// What the data of a round ended with.
enum ScanEnd {
    /// Whole batches, or not enough bytes for the next.
    Partial { needed: usize },
    /// Nothing is written there.
    Zeros,
    /// A batch that is not committed yet.
    Uncommitted,
    /// No batch.
    Bad(String),
}

/// One partition's position in a replica.
#[derive(Debug)]
pub struct Cursor {
    /// The first offset the caller has not got.
    offset: i64,
    /// The offset of the batch at the view's address; at most `offset`.
    batch_offset: i64,
    view: Option<View>,
    /// Where to go back to if the next image, whose base is not known yet, has not begun.
    fallback: Option<View>,
    /// The epoch of the last batch delivered, and of the one before the view's address.
    leader_epoch: i32,
    batch_epoch: i32,
    high_watermark: i64,
    /// The highest watermark that the replica being read has told. Others may have told a higher one:
    /// below that, this one may lack records, or have others that it is still to cut.
    committed_here: i64,
    read_len: u32,
    read_len_min: u32,
    read_len_max: u32,
    idle_rounds: u32,
    retries: u32,
}

impl Cursor {
    /// A cursor at `offset` that reads at least `read_len_min` bytes when it looks for news and at
    /// most `read_len_max` when there is much, or one larger batch.
    #[must_use]
    pub fn new(offset: i64, read_len_min: u32, read_len_max: u32) -> Self {
        Self {
            offset,
            batch_offset: offset,
            view: None,
            fallback: None,
            leader_epoch: -1,
            batch_epoch: -1,
            high_watermark: 0,
            committed_here: 0,
            read_len: read_len_max,
            read_len_min,
            read_len_max,
            idle_rounds: 0,
            retries: 0,
        }
    }

    /// The first offset that has not been delivered.
    #[must_use]
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// The highest watermark seen.
    #[must_use]
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// Forgets where the bytes are: the keys are void, or another replica is read from now on.
    pub fn forget_image(&mut self) {
        self.view = None;
        self.fallback = None;
        self.batch_offset = self.offset;
        self.committed_here = 0;
        self.retries = 0;
    }

    /// What to do next.
    #[must_use]
    pub fn plan(&self, now: u64) -> Plan {
        let Some(view) = self.view else {
            return Plan::NeedsImage(self.offset);
        };
        let is_fresh = view
            .described_at
            .is_none_or(|at| now < at + DESCRIBED_FOR_NS);
        let is_idle = self.idle_rounds > IDLE_ROUNDS_MAX;
        let left = u32::try_from(view.end - view.addr).unwrap_or(u32::MAX);
        let len = self.read_len.min(left);
        let is_data = is_fresh && !is_idle && len > 0;
        Plan::Read(is_data.then_some(DataRead {
            addr: view.addr,
            rkey: view.rkey,
            len,
        }))
    }

    /// The replica granted an image. One that cannot hold the offset is ignored.
    pub fn handle_image(&mut self, granted: &Granted) {
        if granted.base_offset > self.offset || granted.base_offset < 0 {
            return;
        }
        self.batch_offset = granted.base_offset;
        self.batch_epoch = -1;
        self.fallback = None;
        self.read_len = self.read_len_max;
        self.idle_rounds = 0;
        self.view = granted
            .addr
            .checked_add(granted.len.into())
            .map(|end| View {
                addr: granted.addr,
                end,
                rkey: granted.rkey,
                described_at: None,
            });
    }

    /// Takes the entry and the data of a round and says which batches may be delivered.
    ///
    /// # Errors
    ///
    /// [`FetchFault`]; the cursor is where it was.
    pub fn complete(
        &mut self,
        now: u64,
        entry: &[u8; ENTRY_LEN],
        data: &[u8],
    ) -> Result<Completed, FetchFault> {
        let entry = Entry::decode(entry);
        let Some(tail) = entry
            .tail
            .filter(|tail| tail.leader_epoch >= self.leader_epoch)
        else {
            return Ok(self.idle());
        };
        if self.offset < tail.log_start_offset {
            return Err(FetchFault::BelowLogStart {
                offset: self.offset,
                log_start_offset: tail.log_start_offset,
                high_watermark: tail.high_watermark,
            });
        }
        self.committed_here = self.committed_here.max(tail.high_watermark);
        self.high_watermark = self.high_watermark.max(tail.high_watermark);
        if let Some(descriptor) = &entry.descriptor {
            self.refresh(now, descriptor);
        }
        let (batches, end) = self.scan(data, entry.descriptor.as_ref());
        if !batches.is_empty() {
            self.retries = 0;
            self.fallback = None;
        }
        if self.offset >= self.committed_here {
            self.read_len = self.read_len_min;
            return Ok(if batches.is_empty() {
                self.idle()
            } else {
                self.idle_rounds = 0;
                Completed {
                    batches,
                    is_idle: false,
                }
            });
        }
        self.idle_rounds = 0;
        self.read_len = self.read_len_max;
        if batches.is_empty() {
            self.unblock(now, end, !data.is_empty(), entry.descriptor.as_ref())?;
        } else if let ScanEnd::Partial { needed } = end {
            self.grow(needed);
        }
        Ok(Completed {
            batches,
            is_idle: false,
        })
    }

    fn idle(&mut self) -> Completed {
        self.idle_rounds = self.idle_rounds.saturating_add(1);
        Completed {
            batches: 0..0,
            is_idle: true,
        }
    }

    /// Notes that the image being read is still described.
    fn refresh(&mut self, now: u64, descriptor: &Descriptor) {
        let Some(view) = &mut self.view else { return };
        let len = u64::from(descriptor.image_len());
        let mut locations = [descriptor.current, descriptor.next].into_iter().flatten();
        if locations.any(|l| l.rkey == view.rkey && view.end == l.addr.wrapping_add(len)) {
            view.described_at = Some(now);
        }
    }

    /// Walks the batches; returns those to be delivered and what stopped the walk.
    fn scan(&mut self, data: &[u8], descriptor: Option<&Descriptor>) -> (Range<usize>, ScanEnd) {
        let mut at = 0;
        let mut batches = 0..0;
        let end = loop {
            let rest = &data[at..];
            let batch = match self.check(rest, descriptor) {
                Ok(batch) => batch,
                Err(end) => break end,
            };
            at += batch.len();
            self.batch_offset = batch.next_offset();
            self.batch_epoch = batch.partition_leader_epoch();
            // Batches before the offset are skipped: an image is entered at a mark.
            if batch.next_offset() > self.offset {
                self.leader_epoch = self.batch_epoch;
                self.offset = batch.next_offset();
                batches = if batches.is_empty() {
                    at - batch.len()..at
                } else {
                    batches.start..at
                };
            }
        };
        if let Some(view) = &mut self.view {
            view.addr += at as u64;
        }
        (batches, end)
    }

    /// The batch at the front, if it may be delivered.
    fn check<'a>(
        &self,
        bytes: &'a [u8],
        descriptor: Option<&Descriptor>,
    ) -> Result<BatchView<'a>, ScanEnd> {
        match bytes.first_chunk::<BATCH_LEN_PREFIX>() {
            None => return Err(ScanEnd::Partial { needed: 0 }),
            // A length of zero is no batch's.
            Some(prefix) if prefix[8..] == [0; 4] => return Err(ScanEnd::Zeros),
            Some(_) => {}
        }
        let batch = match BatchView::parse(bytes) {
            Ok((batch, _)) => batch,
            Err(BatchError::Incomplete { needed, .. }) => {
                return Err(ScanEnd::Partial { needed });
            }
            Err(error) => return Err(ScanEnd::Bad(error.to_string())),
        };
        if batch.base_offset() != self.batch_offset {
            let found = batch.base_offset();
            let cause = format!(
                "a batch of offset {found} where {} is due",
                self.batch_offset
            );
            return Err(ScanEnd::Bad(cause));
        }
        if batch.next_offset() > self.committed_here {
            return Err(ScanEnd::Uncommitted);
        }
        let epoch = batch.partition_leader_epoch();
        let is_stale = descriptor
            .is_some_and(|d| batch.base_offset() >= d.epoch_start_offset && epoch < d.leader_epoch);
        let is_due = batch.next_offset() > self.offset;
        if epoch < self.batch_epoch || is_due && epoch < self.leader_epoch || is_stale {
            return Err(ScanEnd::Bad(format!(
                "leader epoch {epoch} is an old one there"
            )));
        }
        batch
            .verify_crc()
            .map_err(|error| ScanEnd::Bad(error.to_string()))?;
        Ok(batch)
    }

    fn grow(&mut self, needed: usize) {
        // The length comes from a peer: the image bounds it in `plan`.
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        self.read_len = self.read_len.max(needed);
    }

    /// Committed records are due and none came: find out why.
    fn unblock(
        &mut self,
        now: u64,
        end: ScanEnd,
        is_data: bool,
        descriptor: Option<&Descriptor>,
    ) -> Result<(), FetchFault> {
        let Some(view) = self.view else { return Ok(()) };
        let has_room = view.end - view.addr >= HEADER_LEN as u64;
        let is_exhausted = !has_room || matches!(end, ScanEnd::Zeros);
        let is_stale = view
            .described_at
            .is_some_and(|at| now >= at + DESCRIBED_FOR_NS);
        // A write that a fence has cut stays where it is; the log goes on in another image.
        let is_cut = matches!(end, ScanEnd::Bad(_));
        if let Some(next) = descriptor.and_then(|d| self.next_view(now, d))
            && (is_exhausted || is_cut)
        {
            self.view = Some(next);
            return Ok(());
        }
        if is_stale {
            self.forget_image();
            return Ok(());
        }
        match end {
            ScanEnd::Partial { needed } if !is_exhausted => {
                if needed as u64 > view.end - view.addr {
                    return self.retry("a batch reaches beyond the image");
                }
                self.grow(needed);
                Ok(())
            }
            // The next image was tried too early: what was zeros in the one before is there now.
            ScanEnd::Bad(_) if self.fallback.is_some() => self.try_next(now, descriptor),
            ScanEnd::Bad(cause) => {
                self.retry(&cause)?;
                if self.retries.is_multiple_of(ASK_AFTER_RETRIES) {
                    self.view = None;
                    self.batch_offset = self.offset;
                }
                Ok(())
            }
            _ if !is_data && !is_exhausted => Ok(()),
            _ => self.try_next(now, descriptor),
        }
    }

    /// The image that begins with the batch we want.
    fn next_view(&self, now: u64, descriptor: &Descriptor) -> Option<View> {
        let mut locations = [descriptor.current, descriptor.next].into_iter().flatten();
        let next = locations.find(|l| l.base_offset == self.batch_offset)?;
        let view = view_of(now, descriptor, &next)?;
        (view.rkey != self.view?.rkey).then_some(view)
    }

    /// The image is exhausted and its successor's base is not known: on a follower the next image may
    /// have begun before its CPU noticed. Else the image we want is not described any more.
    fn try_next(&mut self, now: u64, descriptor: Option<&Descriptor>) -> Result<(), FetchFault> {
        if let Some(back) = self.fallback.take() {
            self.view = Some(back);
            return self.retry("the image ends before the log does");
        }
        let next = descriptor.and_then(|d| Some((d, d.next?)));
        let next = next.filter(|(_, next)| next.base_offset == BASE_OFFSET_UNKNOWN);
        let view = next.and_then(|(d, next)| view_of(now, d, &next));
        let is_current = descriptor
            .and_then(|d| d.current)
            .is_some_and(|c| self.view.is_some_and(|view| c.rkey == view.rkey));
        match view.filter(|_| is_current) {
            Some(view) => {
                self.fallback = self.view.replace(view);
                Ok(())
            }
            None if is_current => self.retry("the image ends before the log does"),
            None => {
                self.forget_image();
                Ok(())
            }
        }
    }

    fn retry(&mut self, cause: &str) -> Result<(), FetchFault> {
        self.retries += 1;
        if self.retries <= RETRIES_MAX {
            return Ok(());
        }
        Err(FetchFault::Corrupt {
            offset: self.batch_offset,
            cause: cause.to_owned(),
        })
    }

    /// How often the same bytes have been read in vain; a caller pauses before it reads them again.
    #[must_use]
    pub fn retries(&self) -> u32 {
        self.retries
    }
}

fn view_of(now: u64, descriptor: &Descriptor, location: &ImageLocation) -> Option<View> {
    Some(View {
        addr: location.addr,
        end: location.addr.checked_add(descriptor.image_len().into())?,
        rkey: location.rkey,
        described_at: Some(now),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{HeaderCrc, ImageId};
    use crate::record::{BatchBuilder, stamp};
    use crate::table::{LINE_LEN, Tail};

    fn batch(base_offset: i64, epoch: i32) -> Vec<u8> {
        let mut builder = BatchBuilder::new(1000);
        assert!(builder.append(0, None, Some(b"value"), &[]));
        let mut bytes = builder.build().to_vec();
        stamp(&mut bytes, base_offset, epoch);
        bytes
    }

    fn entry(high_watermark: i64, epoch: i32, epoch_start_offset: i64) -> [u8; ENTRY_LEN] {
        let tail = Tail {
            image_id: ImageId(1),
            session: 1,
            leader_epoch: epoch,
            sequence: 1,
            log_end_offset: 100,
            high_watermark,
            log_start_offset: 0,
            byte_position: 0,
            header_crc: HeaderCrc(0),
            flags: 0,
        };
        let current = ImageLocation {
            addr: 1 << 20,
            base_offset: 0,
            rkey: 7,
        };
        let descriptor = Descriptor {
            image_len_log2: 16,
            sequence: 1,
            leader_epoch: epoch,
            epoch_start_offset,
            current: Some(current),
            next: None,
        };
        let mut entry = [0; ENTRY_LEN];
        entry[..LINE_LEN].copy_from_slice(&descriptor.encode());
        entry[LINE_LEN..2 * LINE_LEN].copy_from_slice(&tail.encode());
        entry
    }

    const IMAGE: Granted = Granted {
        base_offset: 0,
        addr: 1 << 20,
        rkey: 7,
        len: 1 << 16,
    };

    fn cursor() -> Cursor {
        let mut cursor = Cursor::new(0, 1000, 4000);
        assert_eq!(cursor.plan(0), Plan::NeedsImage(0));
        cursor.handle_image(&IMAGE);
        cursor
    }

    /// Reads the same bytes until the cursor gives them up.
    fn refusal(cursor: &mut Cursor, entry: &[u8; ENTRY_LEN], data: &[u8]) -> FetchFault {
        for now in 0..100 {
            if let Plan::NeedsImage(_) = cursor.plan(now) {
                cursor.handle_image(&IMAGE);
            }
            match cursor.complete(now, entry, data) {
                Ok(completed) => assert!(completed.batches.is_empty()),
                Err(fault) => return fault,
            }
        }
        panic!("it is read for ever");
    }

    #[test]
    fn only_committed_batches_are_delivered() {
        let mut cursor = cursor();
        let (one, two) = (batch(0, 1), batch(1, 1));
        let data = [&one[..], &two, &[0; 100]].concat();
        let completed = cursor.complete(0, &entry(1, 1, 0), &data).unwrap();
        assert_eq!(completed.batches, 0..one.len());
        assert_eq!(cursor.offset(), 1);
        let completed = cursor
            .complete(0, &entry(2, 1, 0), &data[one.len()..])
            .unwrap();
        assert_eq!(completed.batches, 0..two.len());
        let completed = cursor.complete(0, &entry(2, 1, 0), &[0; 100]).unwrap();
        assert!(completed.is_idle);
    }

    /// A replica that lags may hold records in the place of committed ones, until its leader cuts them.
    #[test]
    fn what_one_replica_tells_says_nothing_of_another() {
        let mut cursor = cursor();
        cursor.complete(0, &entry(2, 1, 0), &[0; 100]).unwrap();
        cursor.forget_image();
        cursor.handle_image(&IMAGE);
        let (one, two) = (batch(0, 1), batch(1, 1));
        let data = [&one[..], &two, &[0; 100]].concat();
        let completed = cursor.complete(0, &entry(1, 1, 0), &data).unwrap();
        assert_eq!(completed.batches, 0..one.len());
        assert_eq!(cursor.high_watermark(), 2);
        for now in 0..100 {
            let completed = cursor.complete(now, &entry(1, 1, 0), &[0; 100]).unwrap();
            assert!(completed.is_idle, "the replica has not got it yet");
        }
    }

    #[test]
    fn damaged_or_misplaced_bytes_are_never_delivered() {
        let mut damaged = batch(0, 1);
        *damaged.last_mut().unwrap() ^= 1;
        for data in [damaged, batch(5, 1), vec![0xff; 200]] {
            let fault = refusal(&mut cursor(), &entry(10, 1, 0), &data);
            assert!(
                matches!(fault, FetchFault::Corrupt { offset: 0, .. }),
                "{fault}"
            );
        }
    }

    #[test]
    fn a_batch_of_an_old_epoch_is_refused_where_a_new_one_has_begun() {
        let fault = refusal(&mut cursor(), &entry(10, 2, 0), &batch(0, 1));
        assert!(fault.to_string().contains("leader epoch 1"), "{fault}");
        let completed = cursor()
            .complete(0, &entry(10, 2, 1), &batch(0, 1))
            .unwrap();
        assert!(!completed.batches.is_empty());
    }

    #[test]
    fn a_torn_entry_is_read_again() {
        let mut torn = entry(10, 1, 0);
        torn[LINE_LEN + 3] ^= 1;
        let completed = cursor().complete(0, &torn, &batch(0, 1)).unwrap();
        assert!(completed.is_idle && completed.batches.is_empty());
    }

    #[test]
    fn an_idle_cursor_reads_the_entry_alone() {
        let mut cursor = cursor();
        for now in 0..10 {
            cursor.complete(now, &entry(0, 1, 0), &[0; 100]).unwrap();
        }
        assert_eq!(cursor.plan(10), Plan::Read(None));
        cursor.complete(10, &entry(1, 1, 0), &[]).unwrap();
        assert!(matches!(cursor.plan(11), Plan::Read(Some(_))));
    }

    /// An image is entered before the offset wanted, where batches of earlier epochs are.
    #[test]
    fn an_image_may_begin_in_an_earlier_epoch() {
        let mut cursor = cursor();
        let (one, two, three) = (batch(0, 1), batch(1, 2), batch(2, 2));
        let data = [&one[..], &two, &[0; 100]].concat();
        cursor.complete(0, &entry(2, 2, 1), &data).unwrap();
        cursor.forget_image();
        cursor.handle_image(&IMAGE);
        let data = [&one[..], &two, &three, &[0; 100]].concat();
        let completed = cursor.complete(1, &entry(3, 2, 1), &data).unwrap();
        assert_eq!(completed.batches.len(), three.len());
    }

    /// A fence has cut a write: the image keeps the torn batch, and the log goes on in the next one.
    #[test]
    fn a_torn_batch_is_left_behind() {
        let mut cursor = cursor();
        let mut torn = batch(0, 1);
        torn.truncate(70);
        torn.resize(200, 0);
        let mut entry = entry(1, 2, 0);
        let mut descriptor = Descriptor::decode(entry.first_chunk().unwrap()).unwrap();
        descriptor.current = Some(ImageLocation {
            addr: 1 << 30,
            base_offset: 0,
            rkey: 8,
        });
        entry[..LINE_LEN].copy_from_slice(&descriptor.encode());
        cursor.complete(0, &entry, &torn).unwrap();
        assert!(matches!(
            cursor.plan(1),
            Plan::Read(Some(DataRead { rkey: 8, .. }))
        ));
    }

    /// The data were read before a batch was placed, the entry after the log had rolled: the next image is
    /// tried, begins too high, and the batch is found where it was missed.
    #[test]
    fn a_roll_between_the_two_reads_skips_nothing() {
        let mut cursor = cursor();
        let mut rolled = entry(2, 1, 0);
        let mut descriptor = Descriptor::decode(rolled.first_chunk().unwrap()).unwrap();
        descriptor.next = Some(ImageLocation {
            addr: 1 << 30,
            base_offset: BASE_OFFSET_UNKNOWN,
            rkey: 8,
        });
        rolled[..LINE_LEN].copy_from_slice(&descriptor.encode());
        let rkey_of = |plan| match plan {
            Plan::Read(Some(read)) => read.rkey,
            other => panic!("{other:?}"),
        };
        let completed = cursor.complete(0, &rolled, &[0; 100]).unwrap();
        assert!(completed.batches.is_empty());
        assert_eq!(rkey_of(cursor.plan(1)), 8);
        cursor.complete(1, &rolled, &batch(1, 1)).unwrap();
        assert_eq!(rkey_of(cursor.plan(2)), 7);
        let completed = cursor.complete(2, &rolled, &batch(0, 1)).unwrap();
        assert!(!completed.batches.is_empty());
    }

    #[test]
    fn an_image_that_is_described_no_more_is_asked_for() {
        let mut cursor = cursor();
        cursor.complete(0, &entry(0, 1, 0), &[0; 100]).unwrap();
        let later = 2 * DESCRIBED_FOR_NS;
        assert_eq!(
            cursor.plan(later),
            Plan::Read(None),
            "its grace period may be over"
        );
        let mut elsewhere = Descriptor::decode(entry(1, 1, 0).first_chunk().unwrap()).unwrap();
        elsewhere.current = elsewhere.current.map(|l| ImageLocation {
            rkey: 8,
            base_offset: 9,
            ..l
        });
        let mut entry = entry(1, 1, 0);
        entry[..LINE_LEN].copy_from_slice(&elsewhere.encode());
        cursor.complete(later, &entry, &[]).unwrap();
        assert_eq!(cursor.plan(later), Plan::NeedsImage(0));
    }
}
