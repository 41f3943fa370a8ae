//! One partition's log on its leader: append, roll, what to drain and what to let go.
//!
//! A [`Log`] keeps the books of the images it consists of. It touches no memory and no file: a caller
//! copies an appended batch to the [`Placement`] it got, and tells which images exist and what has
//! been drained.
//!
//! ```text
//!  files                      images (oldest first)
//!  ... drained ...............| drained, retired | sealed, draining | current | next (empty, ready)
//!                                                                   ^ log end offset
//! ```

use std::collections::VecDeque;

use thiserror::Error;

use crate::epoch::EpochCache;
use crate::faults::{Fault, is_injected};
use crate::image::{FilePlace, ImageId, ImageState, Mark};
use crate::record::{BatchBuilder, BatchError, BatchView, HEADER_LEN, stamp};

/// Sizes and limits of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    /// Size of an image in bytes, a power of two.
    pub image_len: u32,
    /// Most bytes of a segment file.
    pub segment_len: u64,
    /// Most images with bytes that are not drained or that a follower has not got: an append that
    /// needs one more has to wait.
    pub images_max: usize,
    /// Most images kept for readers beyond those.
    pub retired_max: usize,
    /// How long an image stays readable after the table entry dropped it, in nanoseconds.
    pub grace_ns: u64,
}

impl LogConfig {
    /// Defaults for images and segments of these sizes.
    #[must_use]
    pub fn new(image_len: u32, segment_len: u64) -> Self {
        Self {
            image_len,
            segment_len,
            images_max: 8,
            retired_max: 8,
            grace_ns: 2_000_000_000,
        }
    }
}

/// What a replica holds when all of it is in the files: what a start finds, and a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The first offset.
    pub log_start_offset: i64,
    /// One past the last offset.
    pub log_end_offset: i64,
    /// Records below are known to be committed.
    pub high_watermark: i64,
    /// Which epoch wrote what.
    pub epochs: EpochCache,
    /// Where the files end.
    pub end_place: FilePlace,
}

impl Stored {
    /// A log without records.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            log_start_offset: 0,
            log_end_offset: 0,
            high_watermark: 0,
            epochs: EpochCache::default(),
            end_place: FilePlace {
                segment_base_offset: 0,
                file_position: 0,
            },
        }
    }
}

/// A batch whose bytes have been checked and that is ready to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedBatch {
    bytes: Vec<u8>,
    offsets_count: i64,
}

impl CheckedBatch {
    /// Checks that `bytes` are one whole batch of at most `batch_len_max` bytes: header, CRC, records.
    ///
    /// # Errors
    ///
    /// [`AppendError::TooLarge`], [`AppendError::Trailing`] or [`AppendError::Invalid`].
    pub fn new(bytes: Vec<u8>, batch_len_max: usize) -> Result<Self, AppendError> {
        let offsets_count = Self::check(&bytes, batch_len_max)?;
        Ok(Self {
            bytes,
            offsets_count,
        })
    }

    /// As [`CheckedBatch::new`], with the bytes left where they are; returns how many offsets the batch takes.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn check(bytes: &[u8], batch_len_max: usize) -> Result<i64, AppendError> {
        if bytes.len() > batch_len_max {
            let len = bytes.len();
            return Err(AppendError::TooLarge { len, batch_len_max });
        }
        let (batch, rest) = BatchView::parse(bytes)?;
        if !rest.is_empty() {
            return Err(AppendError::Trailing(rest.len()));
        }
        batch.check_appendable(DECOMPRESSED_LEN_MAX)?;
        Ok(batch.next_offset() - batch.base_offset())
    }

    /// The batch of a builder's records, which needs no check; the builder is empty afterwards.
    ///
    /// # Panics
    ///
    /// If the builder is empty before.
    pub fn built(builder: &mut BatchBuilder) -> Self {
        let offsets_count = i64::try_from(builder.records_count());
        let bytes = builder.build().to_vec();
        builder.clear();
        Self {
            bytes,
            offsets_count: offsets_count.expect("a batch counts its records in 32 bits"),
        }
    }

    /// The batch.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A batch that lies where room was reserved for it, apart from its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilledBatch {
    /// Its header, for the caller to write once it has a place.
    pub header: [u8; HEADER_LEN],
    /// All of its bytes.
    pub len: u32,
    /// How many offsets it takes.
    pub offsets_count: i64,
}

/// Compressed records are expanded to at most this many bytes while they are checked.
const DECOMPRESSED_LEN_MAX: usize = 64 << 20;

/// A batch was not appended.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AppendError {
    /// It does not fit an image twice, which is the limit that rolling needs.
    #[error(
        "a record batch of {len} bytes is larger than the topic's limit of {batch_len_max}: \
         send smaller batches, or raise the topic's image_size"
    )]
    TooLarge {
        /// Bytes of the batch.
        len: usize,
        /// Most bytes that the topic takes.
        batch_len_max: usize,
    },
    /// More than one batch, or bytes behind it.
    #[error("{0} bytes follow the record batch: append one batch at a time")]
    Trailing(usize),
    /// The bytes are not a batch.
    #[error("not a valid record batch: {0}")]
    Invalid(#[from] BatchError),
    /// The next image is not there yet; try again when one is ready.
    #[error("the partition waits for its next image")]
    NoImage,
    /// Somebody fills what is reserved at the end of the log; try again when it is filled or given up.
    #[error("the partition waits until what is reserved at its end is filled")]
    Reserved,
    /// Fewer replicas are in sync than the topic wants for this acknowledgement; try again later.
    #[error("{in_sync} replicas are in sync, the topic wants {min_isr}: try again when more are")]
    NotEnoughReplicas {
        /// Members of the ISR.
        in_sync: usize,
        /// How many there must be.
        min_isr: usize,
    },
    /// The node does not lead, or must not act as if it did; ask the cluster who does.
    #[error("{0}: ask again who leads the partition")]
    NotLeader(&'static str),
}

/// Where an appended batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The image.
    pub image_id: ImageId,
    /// Where in the image, in bytes.
    pub byte_position: u32,
    /// Offset of the first record.
    pub base_offset: i64,
    /// One past the offset of the last record.
    pub end_offset: i64,
}

/// Bytes to be copied from an image to its segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainJob {
    /// The image.
    pub image_id: ImageId,
    /// Where the image lies in the files.
    pub place: FilePlace,
    /// First byte in the image.
    pub from: u32,
    /// One past the last byte in the image.
    pub to: u32,
}

/// An image of the log and what has become of it.
#[derive(Debug)]
struct Held {
    state: ImageState,
    drained: u32,
    retired_at: Option<u64>,
}

/// An image to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewImage {
    /// Its name.
    pub id: ImageId,
    /// Whether it begins a segment.
    pub starts_segment: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    None,
    Requested(NewImage),
    Ready(NewImage),
}

/// The leader's log.
#[derive(Debug)]
pub struct Log {
    config: LogConfig,
    leader_epoch: i32,
    epoch_start_offset: i64,
    epochs: EpochCache,
    log_start_offset: i64,
    log_end_offset: i64,
    /// Where the files end while there is no current image.
    first_place: FilePlace,
    images: VecDeque<Held>,
    next: Next,
    named_count: u32,
    is_draining: bool,
    /// So many bytes from the end of the current image on are somebody's to fill.
    reserved: Option<u32>,
}

impl Log {
    /// A log that continues what is stored, in a new epoch.
    #[must_use]
    pub fn new(config: LogConfig, leader_epoch: i32, stored: &Stored) -> Self {
        let mut epochs = stored.epochs.clone();
        epochs.assign(leader_epoch, stored.log_end_offset);
        Self {
            config,
            leader_epoch,
            epoch_start_offset: stored.log_end_offset,
            epochs,
            log_start_offset: stored.log_start_offset,
            log_end_offset: stored.log_end_offset,
            first_place: stored.end_place,
            images: VecDeque::new(),
            next: Next::None,
            named_count: 0,
            is_draining: false,
            reserved: None,
        }
    }

    /// Sizes and limits.
    #[must_use]
    pub fn config(&self) -> &LogConfig {
        &self.config
    }

    /// The epoch that appended batches get.
    #[must_use]
    pub fn leader_epoch(&self) -> i32 {
        self.leader_epoch
    }

    /// The offset at which that epoch starts.
    #[must_use]
    pub fn epoch_start_offset(&self) -> i64 {
        self.epoch_start_offset
    }

    /// Which epoch wrote what.
    #[must_use]
    pub fn epochs(&self) -> &EpochCache {
        &self.epochs
    }

    /// The names of the images in memory.
    pub fn image_ids(&self) -> impl Iterator<Item = ImageId> {
        let next = match self.next {
            Next::Ready(new) => Some(new.id),
            Next::None | Next::Requested(_) => None,
        };
        self.images.iter().map(|held| held.state.id()).chain(next)
    }

    /// Where the images, or without any the files, end.
    #[must_use]
    pub fn end_place(&self) -> FilePlace {
        self.current()
            .map_or(self.first_place, ImageState::end_place)
    }

    /// Records below `offset` have been given up: retention has removed them.
    pub fn start_at(&mut self, offset: i64) {
        if offset > self.log_start_offset {
            self.log_start_offset = offset.min(self.log_end_offset);
            self.epochs.start_at(self.log_start_offset);
        }
    }

    /// The first offset of the log.
    #[must_use]
    pub fn log_start_offset(&self) -> i64 {
        self.log_start_offset
    }

    /// The offset that the next record gets.
    #[must_use]
    pub fn log_end_offset(&self) -> i64 {
        self.log_end_offset
    }

    /// A name for an image that nobody has used.
    pub fn name_image(&mut self) -> ImageId {
        self.named_count += 1;
        ImageId::new(self.leader_epoch, self.named_count)
    }

    /// Appends a batch: gives it offsets and epoch, and says where its bytes go.
    ///
    /// Rolls to the next image if the current one has no room.
    ///
    /// # Errors
    ///
    /// [`AppendError::NoImage`] while the next image is not ready, [`AppendError::Reserved`] while somebody
    /// fills what is reserved at the end; nothing has changed then.
    pub fn append(&mut self, now: u64, batch: &mut CheckedBatch) -> Result<Placement, AppendError> {
        let len = self.make_room(now, batch.bytes.len())?;
        Ok(self.place(&mut batch.bytes, len, batch.offsets_count))
    }

    /// Keeps room for one batch of at most `len` bytes at the end of the log, and says where. Nothing else is
    /// appended until it is [filled](Log::fill) or [given up](Log::give_up).
    ///
    /// # Errors
    ///
    /// As [`Log::append`].
    pub fn reserve(&mut self, now: u64, len: usize) -> Result<Placement, AppendError> {
        let len = self.make_room(now, len)?;
        self.reserved = Some(len);
        let image = self.current().expect("rolled to an image");
        Ok(Placement {
            image_id: image.id(),
            byte_position: image.end().byte_position,
            base_offset: self.log_end_offset,
            end_offset: self.log_end_offset,
        })
    }

    /// The batch in the reserved room, not longer than that, becomes log, as if it were appended. Its header
    /// is to be written before anything else happens.
    ///
    /// # Panics
    ///
    /// If nothing is reserved, or less.
    pub fn fill(&mut self, batch: &mut FilledBatch) -> Placement {
        let reserved = self.reserved.take();
        assert!(
            reserved.is_some_and(|reserved| batch.len <= reserved),
            "a batch of {} bytes fills {reserved:?}",
            batch.len
        );
        self.place(&mut batch.header, batch.len, batch.offsets_count)
    }

    /// Gives up what is reserved. If it was written to, it stays as it is, and the log goes on in the next
    /// image: the bytes of an image are written once.
    pub fn give_up(&mut self, is_touched: bool) {
        if self.reserved.take().is_some()
            && is_touched
            && let Some(held) = self.images.back_mut()
        {
            held.state.close();
        }
    }

    /// Rolls to the next image unless there is room for so many bytes in the current one.
    fn make_room(&mut self, now: u64, len: usize) -> Result<u32, AppendError> {
        let batch_len_max = self.config.image_len as usize / 2;
        let too_large = || AppendError::TooLarge { len, batch_len_max };
        let len = u32::try_from(len).map_err(|_| too_large())?;
        if self.reserved.is_some() {
            return Err(AppendError::Reserved);
        }
        if !self.current().is_some_and(|image| image.has_room(len)) {
            self.roll(now)?;
        }
        Ok(len)
    }

    /// Gives a batch that begins with `bytes` its place at the end of the log, where there is room for it.
    fn place(&mut self, bytes: &mut [u8], len: u32, offsets_count: i64) -> Placement {
        let base_offset = self.log_end_offset;
        let end_offset = base_offset + offsets_count;
        stamp(bytes, base_offset, self.leader_epoch);
        let header = bytes.first_chunk().expect("a checked batch has a header");
        let image = &mut self.images.back_mut().expect("rolled to an image").state;
        let placement = Placement {
            image_id: image.id(),
            byte_position: image.end().byte_position,
            base_offset,
            end_offset,
        };
        image.push(header, len, end_offset);
        self.log_end_offset = end_offset;
        placement
    }

    fn roll(&mut self, now: u64) -> Result<(), AppendError> {
        let Next::Ready(new) = self.next else {
            return Err(AppendError::NoImage);
        };
        let last = self.images.back().map(|held| &held.state);
        let end = last.map_or(self.first_place, ImageState::end_place);
        let place = end.next(self.log_end_offset, new.starts_segment);
        if let Some(held) = self.images.back_mut() {
            held.state.seal();
            held.retired_at = Some(now);
        }
        let state = ImageState::new(new.id, self.log_end_offset, place, self.config.image_len);
        self.images.push_back(Held {
            state,
            drained: 0,
            retired_at: None,
        });
        self.next = Next::None;
        Ok(())
    }

    /// The image to be made now, if it is time and the limits allow: call after every change.
    ///
    /// Followers still need the images from base offset `hold_from` on.
    pub fn request_image(&mut self, hold_from: i64) -> Option<NewImage> {
        let is_time = self.current().is_none_or(ImageState::is_half_full);
        if self.next != Next::None || !is_time {
            return None;
        }
        let busy = self.images.iter().filter(|h| h.is_needed(hold_from));
        if busy.count() >= self.config.images_max {
            return None;
        }
        let LogConfig {
            image_len,
            segment_len,
            ..
        } = self.config;
        let starts_segment = match self.current() {
            Some(current) => current.place().next_starts_segment(image_len, segment_len),
            None => self.first_place.file_position + u64::from(image_len) > segment_len,
        };
        let new = NewImage {
            id: self.name_image(),
            starts_segment,
        };
        self.next = Next::Requested(new);
        Some(new)
    }

    /// The image that was requested exists; says whether it is the one waited for.
    pub fn image_ready(&mut self, now: u64, id: ImageId) -> bool {
        let Next::Requested(new) = self.next else {
            return false;
        };
        if new.id != id {
            return false;
        }
        self.next = Next::Ready(new);
        // The first image becomes current at once, so that consumers and followers find it.
        if self.images.is_empty() {
            self.roll(now).expect("an image is ready");
        }
        true
    }

    /// The image that was requested could not be made; it is requested again.
    pub fn image_failed(&mut self, id: ImageId) {
        if matches!(self.next, Next::Requested(new) if new.id == id) {
            self.next = Next::None;
        }
    }

    /// The image that is appended to; `None` only until the first one is ready.
    #[must_use]
    pub fn current(&self) -> Option<&ImageState> {
        self.images.back().map(|held| &held.state)
    }

    /// The image that comes next, once it is ready.
    #[must_use]
    pub fn next(&self) -> Option<NewImage> {
        match self.next {
            Next::Ready(new) => Some(new),
            Next::None | Next::Requested(_) => None,
        }
    }

    /// An image of the log by its name.
    #[must_use]
    pub fn image(&self, id: ImageId) -> Option<&ImageState> {
        self.images
            .iter()
            .map(|h| &h.state)
            .find(|state| state.id() == id)
    }

    /// The image that contains `offset`; the current one contains the log end offset.
    #[must_use]
    pub fn image_of_offset(&self, offset: i64) -> Option<&ImageState> {
        let found = self
            .images
            .iter()
            .rev()
            .find(|h| h.state.base_offset() <= offset)?;
        (offset <= self.log_end_offset).then_some(&found.state)
    }

    /// The oldest base offset in memory; everything below it is in the files.
    #[must_use]
    pub fn memory_start_offset(&self) -> i64 {
        self.images
            .front()
            .map_or(self.log_end_offset, |h| h.state.base_offset())
    }

    /// The next piece to be drained, at most `len_max` bytes or one chain of batches; one at a time.
    pub fn drain(&mut self, len_max: u32) -> Option<DrainJob> {
        if self.is_draining {
            return None;
        }
        let held = self
            .images
            .iter()
            .find(|h| h.drained < h.state.end().byte_position)?;
        let to = held.state.cut(held.drained, len_max, true)?.byte_position;
        self.is_draining = true;
        Some(DrainJob {
            image_id: held.state.id(),
            place: held.state.place(),
            from: held.drained,
            to,
        })
    }

    /// Bytes that [`Log::drain`] has not handed out or that are on their way to the file.
    #[must_use]
    pub fn undrained_len(&self) -> u64 {
        let undrained = |h: &Held| u64::from(h.state.end().byte_position - h.drained);
        self.images.iter().map(undrained).sum()
    }

    /// A job has been done: the file holds the image up to byte `to`.
    pub fn drained(&mut self, image_id: ImageId, to: u32) {
        self.is_draining = false;
        if let Some(held) = self.images.iter_mut().find(|h| h.state.id() == image_id) {
            held.drained = held.drained.max(to);
        }
    }

    /// A job has failed; it will be handed out again.
    pub fn drain_failed(&mut self) {
        self.is_draining = false;
    }

    /// One past the last offset known to be in the files.
    #[must_use]
    pub fn drained_offset(&self) -> i64 {
        let undrained = self.images.iter().find(|h| h.is_undrained());
        undrained.map_or(self.log_end_offset, |h| {
            h.state.mark_at_or_before(h.drained).end_offset
        })
    }

    /// Lets the oldest image go if nobody needs it: it is drained, no follower holds it (they need
    /// those from base offset `hold_from` on), and its grace period is over or too many are kept.
    pub fn evict(&mut self, now: u64, hold_from: i64) -> Option<ImageId> {
        let held = self.images.front()?;
        let is_over = now.saturating_sub(held.retired_at?) >= self.config.grace_ns;
        let retired = self.images.iter().filter(|h| !h.is_needed(hold_from));
        let is_crowded = retired.count() > self.config.retired_max;
        if held.is_needed(hold_from) || !(is_over || is_crowded) {
            return None;
        }
        self.images.pop_front().map(|held| held.state.id())
    }

    /// Since when the oldest image has been kept for readers only, if it is.
    #[must_use]
    pub fn retired_since(&self, hold_from: i64) -> Option<u64> {
        let held = self.images.front().filter(|h| !h.is_needed(hold_from))?;
        held.retired_at
    }

    /// Whether a drain job is out.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.is_draining
    }

    /// When [`Log::evict`] may have something to do, if time alone decides.
    #[must_use]
    pub fn evict_due(&self, hold_from: i64) -> Option<u64> {
        let held = self.images.front().filter(|h| !h.is_needed(hold_from))?;
        held.retired_at.map(|at| at + self.config.grace_ns)
    }

    /// The image after this one, if both are in memory.
    #[must_use]
    pub fn image_after(&self, id: ImageId) -> Option<&ImageState> {
        let mut states = self.images.iter().map(|h| &h.state);
        states.find(|state| state.id() == id)?;
        states.next()
    }

    /// The end of the log inside its current image.
    #[must_use]
    pub fn end(&self) -> Option<Mark> {
        self.current().map(ImageState::end)
    }
}

impl Held {
    fn is_undrained(&self) -> bool {
        self.drained < self.state.end().byte_position
    }

    fn is_needed(&self, hold_from: i64) -> bool {
        let is_busy =
            self.is_busy() && !(is_injected(Fault::EvictUndrained) && self.state.is_sealed());
        is_busy || self.state.base_offset() >= hold_from
    }

    /// Whether the leader itself still needs the image.
    fn is_busy(&self) -> bool {
        !self.state.is_sealed() || self.is_undrained()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::InPlaceBuilder;

    const IMAGE_LEN: u32 = 64 << 10;

    fn log() -> Log {
        let mut log = Log::new(LogConfig::new(IMAGE_LEN, 1 << 20), 3, &Stored::empty());
        make_image(&mut log);
        log
    }

    fn make_image(log: &mut Log) {
        let new = log.request_image(0).expect("it is time");
        assert!(log.image_ready(0, new.id));
    }

    fn batch() -> CheckedBatch {
        let mut builder = BatchBuilder::new(1000);
        assert!(builder.append(7, None, Some(b"value"), &[]));
        CheckedBatch::built(&mut builder)
    }

    /// The same, filled in place.
    fn filled() -> FilledBatch {
        let mut builder = InPlaceBuilder::new(1000);
        assert!(builder.append(7, None, Some(b"value"), &[], |_| {}));
        FilledBatch {
            header: builder.header(),
            len: u32::try_from(builder.len()).unwrap(),
            offsets_count: 1,
        }
    }

    #[test]
    fn a_batch_filled_in_place_is_as_one_appended() {
        let (mut appended, mut reserved) = (log(), log());
        for _ in 0..3 {
            let (mut whole, mut in_place) = (batch(), filled());
            let room = reserved.reserve(0, 500).unwrap();
            assert!(matches!(
                reserved.append(0, &mut batch()),
                Err(AppendError::Reserved)
            ));
            assert!(matches!(reserved.reserve(0, 1), Err(AppendError::Reserved)));
            let placement = reserved.fill(&mut in_place);
            assert_eq!(appended.append(0, &mut whole).unwrap(), placement);
            assert_eq!(in_place.header, whole.as_bytes()[..HEADER_LEN]);
            assert_eq!(room.byte_position, placement.byte_position);
            assert_eq!(appended.end(), reserved.end(), "offsets and header CRC");
        }
        assert_eq!(reserved.log_end_offset(), 3);
    }

    #[test]
    fn room_is_made_before_it_is_reserved() {
        let mut log = log();
        let half = IMAGE_LEN as usize / 2;
        assert_eq!(log.reserve(0, half).unwrap().byte_position, 0);
        log.fill(&mut filled());
        log.reserve(0, half).unwrap();
        log.give_up(false);
        let mut long = FilledBatch {
            len: IMAGE_LEN / 2,
            ..filled()
        };
        log.reserve(0, half).unwrap();
        log.fill(&mut long);
        assert!(matches!(log.reserve(0, half), Err(AppendError::NoImage)));
        make_image(&mut log);
        let room = log.reserve(0, half).unwrap();
        assert_eq!((room.byte_position, room.base_offset), (0, 2));
    }

    /// What was written to and given up is never written to again.
    #[test]
    fn what_is_given_up_is_reused_only_if_it_was_not_touched() {
        let mut log = log();
        let place = log.append(0, &mut batch()).unwrap();
        let room = log.reserve(0, 500).unwrap();
        log.give_up(false);
        assert_eq!(
            log.append(0, &mut batch()).unwrap().byte_position,
            room.byte_position
        );
        assert!(log.request_image(0).is_none());
        log.reserve(0, 500).unwrap();
        log.give_up(true);
        assert!(matches!(
            log.append(0, &mut batch()),
            Err(AppendError::NoImage)
        ));
        make_image(&mut log);
        let next = log.append(0, &mut batch()).unwrap();
        assert_eq!((next.byte_position, next.base_offset), (0, 2));
        assert_ne!(next.image_id, place.image_id);
        // In the files nothing is left out.
        let job = log.drain(1 << 20).unwrap();
        log.drained(job.image_id, job.to);
        let end = job.place.file_position + u64::from(job.to);
        assert_eq!(log.drain(1 << 20).unwrap().place.file_position, end);
        // Once it is given up for good, nothing happens twice.
        log.give_up(true);
        assert!(log.append(0, &mut batch()).is_ok());
    }
}
