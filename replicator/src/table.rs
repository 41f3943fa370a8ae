//! The registered table: one 256-byte entry per partition, read and written by NICs.
//!
//! Each node has one table in registered memory. Line 0 of an entry, the *descriptor*, is written
//! by the replica's own CPU and says where the images of the partition are. Lines 1 and 2 are two
//! *tail slots*, used alternately by the parity of the tail's sequence, so that a torn tail leaves
//! the one before it intact: the leader's CPU writes its own, its NIC writes its followers'.
//!
//! Every field is little endian. The last four bytes of a line are the CRC-32C of the 60 before
//! them: a line that was torn, was never written, or is not a line at all fails it.
//!
//! ```text
//!        descriptor (line 0)                     tail (lines 1 and 2)
//!   0  magic F1 06                          0  image id              u64
//!   2  version 1                            8  session               u64
//!   3  log2 of the image size              16  leader epoch          i32
//!   4  sequence              u32           20  sequence              u32
//!   8  leader epoch          i32           24  log end offset        i64
//!  12  epoch start offset    i64           32  high watermark        i64
//!  20  current: address      u64           40  log start offset      i64
//!  28           base offset  i64           48  byte position         u32
//!  36           rkey         u32           52  header CRC            u32
//!  40  next:    address      u64           56  flags (1 = SEALED)    u32
//!  48           base offset  i64           60  CRC-32C of 0..60      u32
//!  56           rkey         u32
//!  60  CRC-32C of 0..60      u32         line 3 of the entry is zero, kept for later
//! ```
//!
//! An image that is absent has address 0; the base offset of a next image is -1 until it is known.
//! The *byte position* of a tail is the end of the log inside its image; the *header CRC* is the
//! running CRC-32C over bytes 0 to 20 of all batches before that position (a batch's own CRC does
//! not cover its base offset, length and leader epoch, this one does).

use bytemuck::{Pod, Zeroable};

use crate::image::{HeaderCrc, ImageId};

/// Bytes of one partition's entry.
pub const ENTRY_LEN: usize = 256;
/// Bytes of one line, the unit that has its own CRC.
pub const LINE_LEN: usize = 64;
/// Byte offset of the first tail slot in an entry.
pub const TAIL_BYTE_OFFSET: usize = LINE_LEN;
/// Set in [`Tail::flags`] when nothing will follow in the tail's image.
pub const SEALED: u32 = 1;
/// The base offset of a next image whose predecessor is not sealed yet.
pub const BASE_OFFSET_UNKNOWN: i64 = -1;

const MAGIC: [u8; 2] = [0xf1, 0x06];
const VERSION: u8 = 1;
const CRC_BYTE_OFFSET: usize = LINE_LEN - 4;

/// One line as bytes.
pub type Line = [u8; LINE_LEN];

/// Where the bytes of an image can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLocation {
    /// Address of the image's first byte under `rkey`.
    pub addr: u64,
    /// Log offset of the first record, [`BASE_OFFSET_UNKNOWN`] for a next image not begun.
    pub base_offset: i64,
    /// Key for RDMA READ.
    pub rkey: u32,
}

/// The line a replica's CPU writes: where its images are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Size of each image in bytes, as a power of two.
    pub image_len_log2: u8,
    /// Counts the descriptors written, wrapping.
    pub sequence: u32,
    /// The epoch the replica is in.
    pub leader_epoch: i32,
    /// Log offset at which that epoch starts.
    pub epoch_start_offset: i64,
    /// The image that is being appended to.
    pub current: Option<ImageLocation>,
    /// The image that follows it.
    pub next: Option<ImageLocation>,
}

/// A tail: where a replica's log ends, as its leader says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// The image in which the log ends.
    pub image_id: ImageId,
    /// The lane's session; grows with every connection of one leader to one follower.
    pub session: u64,
    /// The leader's epoch.
    pub leader_epoch: i32,
    /// Counts the tails of a session, wrapping; its parity names the slot.
    pub sequence: u32,
    /// One past the offset of the last record before `byte_position`.
    pub log_end_offset: i64,
    /// Records below this offset are committed; never above `log_end_offset`.
    pub high_watermark: i64,
    /// The first offset that can be read.
    pub log_start_offset: i64,
    /// Bytes of batches in the image.
    pub byte_position: u32,
    /// Running CRC over the headers of those batches.
    pub header_crc: HeaderCrc,
    /// [`SEALED`] or 0; unknown bits are ignored.
    pub flags: u32,
}

/// The valid lines of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// The descriptor, if its line is whole.
    pub descriptor: Option<Descriptor>,
    /// The newer of the tails that are whole.
    pub tail: Option<Tail>,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RawLocation {
    addr: [u8; 8],
    base_offset: [u8; 8],
    rkey: [u8; 4],
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RawDescriptor {
    magic: [u8; 2],
    version: u8,
    image_len_log2: u8,
    sequence: [u8; 4],
    leader_epoch: [u8; 4],
    epoch_start_offset: [u8; 8],
    current: RawLocation,
    next: RawLocation,
    crc: [u8; 4],
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RawTail {
    image_id: [u8; 8],
    session: [u8; 8],
    leader_epoch: [u8; 4],
    sequence: [u8; 4],
    log_end_offset: [u8; 8],
    high_watermark: [u8; 8],
    log_start_offset: [u8; 8],
    byte_position: [u8; 4],
    header_crc: [u8; 4],
    flags: [u8; 4],
    crc: [u8; 4],
}

const _: () = assert!(size_of::<RawDescriptor>() == LINE_LEN);
const _: () = assert!(size_of::<RawTail>() == LINE_LEN);
const _: () = assert!(std::mem::offset_of!(RawDescriptor, current) == 20);
const _: () = assert!(std::mem::offset_of!(RawDescriptor, next) == 40);
const _: () = assert!(std::mem::offset_of!(RawDescriptor, crc) == CRC_BYTE_OFFSET);
const _: () = assert!(std::mem::offset_of!(RawTail, log_end_offset) == 24);
const _: () = assert!(std::mem::offset_of!(RawTail, byte_position) == 48);
const _: () = assert!(std::mem::offset_of!(RawTail, crc) == CRC_BYTE_OFFSET);
const _: () = assert!(ENTRY_LEN == 4 * LINE_LEN);

/// Byte offset of a partition's entry in the table.
#[must_use]
pub fn entry_byte_offset(partition_index: usize) -> usize {
    partition_index * ENTRY_LEN
}

/// Byte offset, in its entry, of the slot for a tail with this sequence.
#[must_use]
pub fn tail_byte_offset(sequence: u32) -> usize {
    TAIL_BYTE_OFFSET + (sequence % 2) as usize * LINE_LEN
}

fn seal(mut line: Line) -> Line {
    let crc = crc32c::crc32c(&line[..CRC_BYTE_OFFSET]);
    line[CRC_BYTE_OFFSET..].copy_from_slice(&crc.to_le_bytes());
    line
}

fn is_whole(line: &Line) -> bool {
    crc32c::crc32c(&line[..CRC_BYTE_OFFSET]).to_le_bytes() == line[CRC_BYTE_OFFSET..]
}

impl RawLocation {
    fn emit(location: Option<ImageLocation>) -> Self {
        location.map_or_else(Self::zeroed, |l| Self {
            addr: l.addr.to_le_bytes(),
            base_offset: l.base_offset.to_le_bytes(),
            rkey: l.rkey.to_le_bytes(),
        })
    }

    fn parse(&self) -> Option<ImageLocation> {
        let addr = u64::from_le_bytes(self.addr);
        (addr != 0).then(|| ImageLocation {
            addr,
            base_offset: i64::from_le_bytes(self.base_offset),
            rkey: u32::from_le_bytes(self.rkey),
        })
    }
}

impl Descriptor {
    /// The descriptor as a line with its CRC.
    #[must_use]
    pub fn encode(&self) -> Line {
        let raw = RawDescriptor {
            magic: MAGIC,
            version: VERSION,
            image_len_log2: self.image_len_log2,
            sequence: self.sequence.to_le_bytes(),
            leader_epoch: self.leader_epoch.to_le_bytes(),
            epoch_start_offset: self.epoch_start_offset.to_le_bytes(),
            current: RawLocation::emit(self.current),
            next: RawLocation::emit(self.next),
            crc: [0; 4],
        };
        seal(bytemuck::cast(raw))
    }

    /// Reads a line; `None` if it is torn, was never written, or is of another version.
    #[must_use]
    pub fn decode(line: &Line) -> Option<Self> {
        let raw: RawDescriptor = bytemuck::cast(*line);
        let is_ours = raw.magic == MAGIC && raw.version == VERSION && raw.image_len_log2 < 32;
        (is_ours && is_whole(line)).then(|| Self {
            image_len_log2: raw.image_len_log2,
            sequence: u32::from_le_bytes(raw.sequence),
            leader_epoch: i32::from_le_bytes(raw.leader_epoch),
            epoch_start_offset: i64::from_le_bytes(raw.epoch_start_offset),
            current: raw.current.parse(),
            next: raw.next.parse(),
        })
    }

    /// Size of each image in bytes.
    #[must_use]
    pub fn image_len(&self) -> u32 {
        1 << self.image_len_log2
    }
}

impl Tail {
    /// The tail as a line with its CRC.
    #[must_use]
    pub fn encode(&self) -> Line {
        let raw = RawTail {
            image_id: self.image_id.0.to_le_bytes(),
            session: self.session.to_le_bytes(),
            leader_epoch: self.leader_epoch.to_le_bytes(),
            sequence: self.sequence.to_le_bytes(),
            log_end_offset: self.log_end_offset.to_le_bytes(),
            high_watermark: self.high_watermark.to_le_bytes(),
            log_start_offset: self.log_start_offset.to_le_bytes(),
            byte_position: self.byte_position.to_le_bytes(),
            header_crc: self.header_crc.0.to_le_bytes(),
            flags: self.flags.to_le_bytes(),
            crc: [0; 4],
        };
        seal(bytemuck::cast(raw))
    }

    /// Reads a line; `None` if it is torn, was never written, or contradicts itself.
    #[must_use]
    pub fn decode(line: &Line) -> Option<Self> {
        if !is_whole(line) {
            return None;
        }
        let raw: RawTail = bytemuck::cast(*line);
        let tail = Self {
            image_id: ImageId(u64::from_le_bytes(raw.image_id)),
            session: u64::from_le_bytes(raw.session),
            leader_epoch: i32::from_le_bytes(raw.leader_epoch),
            sequence: u32::from_le_bytes(raw.sequence),
            log_end_offset: i64::from_le_bytes(raw.log_end_offset),
            high_watermark: i64::from_le_bytes(raw.high_watermark),
            log_start_offset: i64::from_le_bytes(raw.log_start_offset),
            byte_position: u32::from_le_bytes(raw.byte_position),
            header_crc: HeaderCrc(u32::from_le_bytes(raw.header_crc)),
            flags: u32::from_le_bytes(raw.flags),
        };
        tail.is_consistent().then_some(tail)
    }

    /// Whether nothing will follow in the tail's image.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.flags & SEALED != 0
    }

    fn is_consistent(&self) -> bool {
        self.leader_epoch >= 0
            && 0 <= self.log_start_offset
            && self.log_start_offset <= self.high_watermark
            && self.high_watermark <= self.log_end_offset
    }

    /// Whether this tail was written after `other`: by a later epoch, session or sequence.
    #[must_use]
    pub fn is_newer_than(&self, other: &Self) -> bool {
        let order = (self.leader_epoch, self.session).cmp(&(other.leader_epoch, other.session));
        let sequence = self.sequence.wrapping_sub(other.sequence).cast_signed();
        order.is_gt() || order.is_eq() && sequence > 0
    }
}

impl Entry {
    /// Reads the lines of an entry that are whole, and of two tails keeps the newer.
    #[must_use]
    pub fn decode(bytes: &[u8; ENTRY_LEN]) -> Self {
        let lines: [Line; 4] = bytemuck::cast(*bytes);
        let tail = match (Tail::decode(&lines[1]), Tail::decode(&lines[2])) {
            (Some(a), Some(b)) => Some(if b.is_newer_than(&a) { b } else { a }),
            (a, b) => a.or(b),
        };
        Self {
            descriptor: Descriptor::decode(&lines[0]),
            tail,
        }
    }

    /// The offset behind the last record that is known to be committed.
    ///
    /// `None` while the high watermark has not reached the start of the replica's epoch: leaders of before may
    /// have told a higher one, and it must not seem to fall (KIP-207).
    #[must_use]
    pub fn committed(&self) -> Option<i64> {
        let high_watermark = self.tail.map_or(0, |tail| tail.high_watermark);
        let start = self.descriptor?.epoch_start_offset;
        (high_watermark >= start).then_some(high_watermark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tail(session: u64, sequence: u32) -> Tail {
        Tail {
            image_id: ImageId(7),
            session,
            leader_epoch: 3,
            sequence,
            log_end_offset: 100,
            high_watermark: 90,
            log_start_offset: 5,
            byte_position: 4096,
            header_crc: HeaderCrc(0xdead_beef),
            flags: SEALED,
        }
    }

    fn descriptor() -> Descriptor {
        Descriptor {
            image_len_log2: 23,
            sequence: 9,
            leader_epoch: 3,
            epoch_start_offset: 50,
            current: Some(ImageLocation {
                addr: 1 << 40,
                base_offset: 60,
                rkey: 0x1234,
            }),
            next: None,
        }
    }

    fn entry(lines: [Line; 3]) -> [u8; ENTRY_LEN] {
        bytemuck::cast([lines[0], lines[1], lines[2], [0; LINE_LEN]])
    }

    #[test]
    fn bytes_are_where_the_drawing_says() {
        let line = tail(0x0102, 0x0304).encode();
        assert_eq!(line[8..10], [0x02, 0x01]);
        assert_eq!(line[20..22], [0x04, 0x03]);
        assert_eq!(line[24], 100);
        assert_eq!(line[48..52], 4096_u32.to_le_bytes());
        let line = descriptor().encode();
        assert_eq!(line[..4], [0xf1, 0x06, 1, 23]);
        assert_eq!(line[12], 50);
        assert_eq!(line[28], 60);
        assert_eq!(line[40..60], [0; 20]);
    }

    #[test]
    fn the_newer_whole_tail_wins() {
        let (old, new) = (tail(1, u32::MAX).encode(), tail(1, 0).encode());
        let found = Entry::decode(&entry([descriptor().encode(), new, old]));
        assert_eq!(found.tail.map(|t| t.sequence), Some(0));
        assert_eq!(found.descriptor, Some(descriptor()));
        let mut torn = new;
        torn[30] ^= 1;
        let found = Entry::decode(&entry([[0; LINE_LEN], torn, old]));
        assert_eq!(found.tail.map(|t| t.sequence), Some(u32::MAX));
        assert_eq!(found.descriptor, None);
    }

    #[test]
    fn a_later_session_or_epoch_beats_any_sequence() {
        let later_epoch = Tail {
            leader_epoch: 4,
            ..tail(1, 1)
        };
        assert!(tail(2, 1).is_newer_than(&tail(1, 500)));
        assert!(later_epoch.is_newer_than(&tail(2, 500)));
        assert!(!tail(1, 1).is_newer_than(&tail(1, 1)));
    }

    /// A node that has just started has no tail, and one that begins to lead not the newest high watermark: once
    /// both told how far the log was committed all the same.
    #[test]
    fn what_is_committed_is_told_once_it_is_known() {
        let entry = |tail, epoch_start_offset| Entry {
            tail,
            descriptor: Some(Descriptor {
                epoch_start_offset,
                ..descriptor()
            }),
        };
        let told = tail(1, 1);
        assert_eq!(entry(Some(told), 50).committed(), Some(90));
        assert_eq!(entry(Some(told), 90).committed(), Some(90));
        assert_eq!(entry(Some(told), 91).committed(), None);
        assert_eq!(entry(None, 50).committed(), None);
        assert_eq!(entry(None, 0).committed(), Some(0));
        assert_eq!(Entry::default().committed(), None);
    }

    #[test]
    fn zeros_and_contradictions_are_not_tails() {
        assert_eq!(Entry::decode(&[0; ENTRY_LEN]), Entry::default());
        let beyond = Tail {
            high_watermark: 101,
            ..tail(1, 1)
        };
        assert_eq!(Tail::decode(&beyond.encode()), None);
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in proptest::collection::vec(any::<u8>(), ENTRY_LEN)) {
            let bytes: [u8; ENTRY_LEN] = bytes.try_into().unwrap();
            let _ = Entry::decode(&bytes);
        }

        #[test]
        fn a_changed_byte_is_always_seen(at in 0..LINE_LEN, flip in 1..=255_u8) {
            let mut line = tail(4, 4).encode();
            line[at] ^= flip;
            prop_assert_eq!(Tail::decode(&line), None);
            let mut line = descriptor().encode();
            line[at] ^= flip;
            prop_assert_eq!(Descriptor::decode(&line), None);
        }

        #[test]
        fn what_was_encoded_is_decoded(session: u64, sequence: u32, position: u32) {
            let tail = Tail { byte_position: position, ..tail(session, sequence) };
            prop_assert_eq!(Tail::decode(&tail.encode()), Some(tail));
        }
    }
}
