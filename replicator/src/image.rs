//! Images: the power-of-two pieces of a log that lie in registered memory.
//!
//! A segment file is a sequence of images, a batch never straddles two, and the bytes of an image are
//! written once. This module keeps the books (which offsets and positions, what is sealed); the
//! memory itself belongs to the [runtime](crate::runtime).
//!
//! ```text
//!  base_offset                      marks: batch ends, some way apart
//!  | batch | batch | batch | batch ...| 0 0 0 0 0 0 |
//!  0               ^mark              ^end          ^len
//! ```

use std::fmt;

/// Two marks of an image are at least this many bytes apart, or 1/512 of a small image.
///
/// A chain of writes ends at a mark, so this is also the grain of the replication window.
const MARK_SPACING_MAX: u32 = 16 << 10;

fn mark_spacing(image_len: u32) -> u32 {
    (image_len / 512).clamp(1, MARK_SPACING_MAX)
}

/// A leader's name for an image: the leader epoch in the upper half, a count in the lower.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ImageId(pub u64);

impl ImageId {
    /// The `count`-th image named in an epoch.
    #[must_use]
    pub fn new(leader_epoch: i32, count: u32) -> Self {
        Self(u64::from(leader_epoch.cast_unsigned()) << 32 | u64::from(count))
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {self}")
    }
}

/// Running CRC-32C over the headers (bytes 0 to 20) of the batches of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeaderCrc(pub u32);

impl HeaderCrc {
    /// The CRC after one more batch, whose first 21 bytes are given.
    #[must_use]
    pub fn extend(self, header: &[u8; crate::record::STAMPED_LEN]) -> Self {
        Self(crc32c::crc32c_append(self.0, header))
    }
}

/// A place between two batches of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Bytes of the image before this place.
    pub byte_position: u32,
    /// One past the offset of the last record before this place.
    pub end_offset: i64,
    /// Over the headers before this place.
    pub header_crc: HeaderCrc,
}

impl Mark {
    /// The start of an image.
    #[must_use]
    pub fn start(base_offset: i64) -> Self {
        Self {
            byte_position: 0,
            end_offset: base_offset,
            header_crc: HeaderCrc::default(),
        }
    }

    /// The place after a batch of `len` bytes that starts here.
    #[must_use]
    pub fn after(
        self,
        header: &[u8; crate::record::STAMPED_LEN],
        len: u32,
        end_offset: i64,
    ) -> Self {
        Self {
            byte_position: self.byte_position + len,
            end_offset,
            header_crc: self.header_crc.extend(header),
        }
    }
}

/// Where an image lies in the log's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePlace {
    /// Base offset of the segment, which names its file.
    pub segment_base_offset: i64,
    /// Where the image begins in that file, in bytes.
    pub file_position: u64,
}

/// What is known about one image whose batches are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageState {
    id: ImageId,
    base_offset: i64,
    place: FilePlace,
    len: u32,
    marks: Vec<Mark>,
    end: Mark,
    is_sealed: bool,
    /// What is behind its end is given up: it was written to, and is no log.
    is_closed: bool,
}

impl ImageState {
    /// An image of `len` bytes without batches.
    #[must_use]
    pub fn new(id: ImageId, base_offset: i64, place: FilePlace, len: u32) -> Self {
        let start = Mark::start(base_offset);
        let mut marks = Vec::with_capacity((len / mark_spacing(len)) as usize + 1);
        marks.push(start);
        Self {
            id,
            base_offset,
            place,
            len,
            marks,
            end: start,
            is_sealed: false,
            is_closed: false,
        }
    }

    /// The image's name.
    #[must_use]
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// Offset of its first record.
    #[must_use]
    pub fn base_offset(&self) -> i64 {
        self.base_offset
    }

    /// Where it lies in the files.
    #[must_use]
    pub fn place(&self) -> FilePlace {
        self.place
    }

    /// Where its batches end in the files.
    #[must_use]
    pub fn end_place(&self) -> FilePlace {
        let file_position = self.place.file_position + u64::from(self.end.byte_position);
        FilePlace {
            file_position,
            ..self.place
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it holds no batch.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end.byte_position == 0
    }

    /// The end of its batches.
    #[must_use]
    pub fn end(&self) -> Mark {
        self.end
    }

    /// Whether nothing will be added.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.is_sealed
    }

    /// Whether a batch of `len` bytes fits.
    #[must_use]
    pub fn has_room(&self, len: u32) -> bool {
        !self.is_sealed && !self.is_closed && len <= self.len - self.end.byte_position
    }

    /// Whether at least half of it is used, or given up.
    #[must_use]
    pub fn is_half_full(&self) -> bool {
        self.is_closed || self.end.byte_position >= self.len / 2
    }

    /// Gives up what is behind its end: bytes that were written there and are no log would be written twice.
    pub fn close(&mut self) {
        self.is_closed = true;
    }

    /// Adds a batch of which the first 21 bytes are given.
    ///
    /// # Panics
    ///
    /// If it does not fit: ask [`ImageState::has_room`] first.
    pub fn push(&mut self, header: &[u8; crate::record::STAMPED_LEN], len: u32, end_offset: i64) {
        assert!(
            self.has_room(len),
            "batch of {len} bytes does not fit {:?}",
            self.id
        );
        let last = self.marks.last().map_or(0, |m| m.byte_position);
        if self.end.byte_position - last >= mark_spacing(self.len) {
            self.marks.push(self.end);
        }
        self.end = self.end.after(header, len, end_offset);
    }

    /// Declares that nothing will be added.
    pub fn seal(&mut self) {
        self.is_sealed = true;
    }

    /// The last mark at or before a byte position.
    #[must_use]
    pub fn mark_at_or_before(&self, byte_position: u32) -> Mark {
        if byte_position >= self.end.byte_position {
            return self.end;
        }
        let after = self
            .marks
            .partition_point(|m| m.byte_position <= byte_position);
        self.marks[after - 1]
    }

    /// The last mark whose offset is at or below `offset`.
    #[must_use]
    pub fn mark_for_offset(&self, offset: i64) -> Mark {
        if offset >= self.end.end_offset {
            return self.end;
        }
        let after = self.marks.partition_point(|m| m.end_offset <= offset);
        self.marks[after.saturating_sub(1)]
    }

    /// Where a chain that starts at `from` ends when it may carry `len_max` bytes.
    ///
    /// The furthest mark within reach; with `is_alone`, at least the next one, so that a batch larger
    /// than the window still travels. `None` if there is nothing to send or no room for it.
    #[must_use]
    pub fn cut(&self, from: u32, len_max: u32, is_alone: bool) -> Option<Mark> {
        if from >= self.end.byte_position {
            return None;
        }
        let furthest = self.mark_at_or_before(from.saturating_add(len_max));
        if furthest.byte_position > from {
            return Some(furthest);
        }
        let after = self.marks.partition_point(|m| m.byte_position <= from);
        is_alone.then(|| self.marks.get(after).copied().unwrap_or(self.end))
    }
}

impl FilePlace {
    /// Where an image begins whose predecessor ends here, at `end_offset` in the log.
    #[must_use]
    pub fn next(self, end_offset: i64, starts_segment: bool) -> Self {
        if starts_segment {
            Self {
                segment_base_offset: end_offset,
                file_position: 0,
            }
        } else {
            self
        }
    }

    /// Whether two images, the first of which begins here, might not fit the segment: then the second
    /// one starts a new one. Known as soon as the first image begins, so that it can be said when the
    /// second one is granted.
    #[must_use]
    pub fn next_starts_segment(self, image_len: u32, segment_len: u64) -> bool {
        self.file_position + 2 * u64::from(image_len) > segment_len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: FilePlace = FilePlace {
        segment_base_offset: 0,
        file_position: 0,
    };

    fn image(batch_lens: &[u32]) -> ImageState {
        let mut image = ImageState::new(ImageId::new(1, 1), 10, PLACE, 8 << 20);
        for (i, &len) in batch_lens.iter().enumerate() {
            image.push(
                &[u8::try_from(i).unwrap(); 21],
                len,
                11 + i64::try_from(i).unwrap(),
            );
        }
        image
    }

    #[test]
    fn chains_end_at_batch_ends_within_reach() {
        let image = image(&[10_000; 20]);
        let cut = image.cut(0, 45_000, false).unwrap();
        assert_eq!((cut.byte_position, cut.end_offset), (40_000, 14));
        assert_eq!(image.cut(0, 1 << 20, false), Some(image.end()));
        assert_eq!(image.cut(200_000, 1 << 20, true), None);
    }

    #[test]
    fn a_batch_larger_than_the_window_travels_alone() {
        let image = image(&[300_000, 300_000, 100]);
        assert_eq!(image.cut(0, 65_536, false), None);
        assert_eq!(image.cut(0, 65_536, true).unwrap().byte_position, 300_000);
        assert_eq!(
            image.cut(300_000, 65_536, true).unwrap().byte_position,
            600_000
        );
        assert_eq!(image.cut(600_000, 65_536, false), Some(image.end()));
    }

    #[test]
    fn marks_are_found_by_position_and_by_offset() {
        let image = image(&[10_000; 20]);
        assert_eq!(image.mark_at_or_before(0), Mark::start(10));
        assert_eq!(image.mark_at_or_before(39_999).byte_position, 20_000);
        assert_eq!(image.mark_for_offset(15).end_offset, 14);
        assert_eq!(image.mark_for_offset(30), image.end());
        assert_eq!(image.mark_for_offset(3), Mark::start(10));
    }

    #[test]
    fn the_crc_of_an_end_is_the_same_by_marks_or_by_batches() {
        let image = image(&[10_000; 20]);
        let mut crc = HeaderCrc::default();
        for i in 0..4 {
            crc = crc.extend(&[i; 21]);
        }
        assert_eq!(image.cut(0, 45_000, false).unwrap().header_crc, crc);
    }

    #[test]
    fn a_new_segment_starts_when_an_image_might_not_fit() {
        let place = |file_position| FilePlace {
            segment_base_offset: 5,
            file_position,
        };
        assert!(!place(1000).next_starts_segment(1024, 3048));
        assert!(place(1000).next_starts_segment(1024, 3047));
        assert_eq!(place(1900).next(77, false), place(1900));
        let new = place(1900).next(77, true);
        assert_eq!((new.segment_base_offset, new.file_position), (77, 0));
    }
}
