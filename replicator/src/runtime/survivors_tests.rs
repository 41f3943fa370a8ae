//! What a start makes of the images that a killed process has left.

use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use transport::Mapping;

use super::files::{FilesConfig, PartitionFiles};
use super::memory::map_table;
use super::survivors::{Left, Survivors};
use crate::cluster::Flush;
use crate::image::{HeaderCrc, ImageId};
use crate::record::{BatchBuilder, BatchView, stamp};
use crate::segment::{SegmentError, SegmentOptions, list_segments};
use crate::table::{Tail, entry_byte_offset, tail_byte_offset};

const IMAGE_LEN: usize = 65536;

fn batch(base_offset: i64, leader_epoch: i32) -> Vec<u8> {
    let mut builder = BatchBuilder::new(4096);
    for _ in 0..2 {
        assert!(builder.append(7, None, Some(&[b'x'; 50]), &[]));
    }
    let mut bytes = builder.build().to_vec();
    stamp(&mut bytes, base_offset, leader_epoch);
    bytes
}

fn header_crc(mut bytes: &[u8]) -> HeaderCrc {
    let mut crc = HeaderCrc::default();
    while let Ok((batch, rest)) = BatchView::parse(bytes) {
        crc = crc.extend(batch.stamped_bytes());
        bytes = rest;
    }
    crc
}

struct Memory {
    dir: TempDir,
    table: Arc<Mapping>,
}

impl Memory {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        Self {
            table: map_table(dir.path(), 1).unwrap(),
            dir,
        }
    }

    fn image(&self, id: u64, starts_segment: bool, bytes: &[u8]) {
        let name = format!("0-{id:016x}-{}.image", u8::from(starts_segment));
        let mapping = Mapping::create_shm(&self.dir.path().join(name), IMAGE_LEN).unwrap();
        mapping.write_at(0, bytes).unwrap();
    }

    /// The tail of an image whose batches up to `bytes` it is about.
    fn tail(&self, id: u64, leader_epoch: i32, log_end_offset: i64, bytes: &[u8]) {
        let tail = Tail {
            image_id: ImageId(id),
            session: 1,
            leader_epoch,
            sequence: 1,
            log_end_offset,
            high_watermark: 0,
            log_start_offset: 0,
            byte_position: u32::try_from(bytes.len()).unwrap(),
            header_crc: header_crc(bytes),
            flags: 0,
        };
        let at = entry_byte_offset(0) + tail_byte_offset(1);
        self.table.write_at(at, &tail.encode()).unwrap();
    }

    fn files(&self) -> PartitionFiles {
        let config = FilesConfig {
            dir: self.dir.path().join("t-0"),
            marker: self.dir.path().join("t-0.poisoned"),
            flush: Flush::Never,
            options: SegmentOptions::default(),
        };
        PartitionFiles::recover(config, 0).unwrap()
    }

    /// Drains; returns where the log ends then, and whether all is there that should be.
    fn recover(&self) -> (i64, Result<(), SegmentError>) {
        let mut files = self.files();
        let mut left = Left::find(self.dir.path()).unwrap();
        let survivors = Survivors::take(&mut left, &self.table, 0).unwrap();
        survivors.drain(&mut files).unwrap();
        let checked = survivors.check(&files, 0);
        (files.log_end_offset(), checked)
    }

    fn segments(&self) -> Vec<i64> {
        list_segments(Path::new(&self.dir.path().join("t-0"))).unwrap()
    }
}

#[test]
fn images_continue_the_files_up_to_the_tail() {
    let memory = Memory::new();
    let first = [batch(0, 1), batch(2, 1), batch(4, 1)].concat();
    let second = [batch(6, 1), batch(8, 1)].concat();
    memory.image(2, true, &[&second[..], &batch(10, 1)].concat());
    memory.image(1, false, &first);
    // The last batch has landed, and its tail has not: it is log all the same.
    memory.tail(2, 1, 10, &second);
    let (end, checked) = memory.recover();
    checked.unwrap();
    assert_eq!(end, 12);
    assert_eq!(memory.segments(), [0, 6]);
    // A crash before the images were removed: nothing is appended twice.
    assert_eq!(memory.recover().0, 12);
}

/// A kill between making the file and giving it its size.
#[test]
fn an_image_that_was_never_used_is_removed() {
    let memory = Memory::new();
    let path = memory.dir.path().join("0-0000000100000001-0.image");
    std::fs::write(&path, []).unwrap();
    let (end, checked) = memory.recover();
    checked.unwrap();
    assert_eq!(end, 0);
    assert!(!path.exists());
    std::fs::write(memory.dir.path().join("table"), []).unwrap();
    map_table(memory.dir.path(), 1).unwrap();
}

#[test]
fn without_a_tail_nothing_is_believed() {
    let memory = Memory::new();
    memory.image(1, false, &batch(0, 1));
    let (end, checked) = memory.recover();
    checked.unwrap();
    assert_eq!(end, 0);
}

/// A new header in front of an old body has a valid CRC: offset, length and epoch are not covered by it.
#[test]
fn a_batch_that_the_tail_was_not_written_for_is_refused() {
    let said = [batch(0, 1), batch(2, 1)].concat();
    let mut torn = batch(2, 1);
    torn[40] ^= 1;
    for (second, epoch) in [(batch(2, 0), 1), (batch(2, 2), 2), (torn, 1)] {
        let memory = Memory::new();
        memory.image(1, false, &[batch(0, 1), second].concat());
        memory.tail(1, epoch, 4, &said);
        let (end, checked) = memory.recover();
        assert!(end < 4, "{end}");
        let message = checked.unwrap_err().to_string();
        assert!(
            message.contains("the tail in the log memory says that it ends at 4"),
            "{message}"
        );
    }
}

#[test]
fn of_two_images_with_the_same_offsets_the_later_epoch_counts() {
    let memory = Memory::new();
    let old = [batch(0, 1), batch(2, 1), batch(4, 1)].concat();
    let new = [batch(0, 1), batch(2, 3)].concat();
    memory.image(ImageId::new(1, 1).0, false, &old);
    memory.image(ImageId::new(3, 1).0, false, &new);
    memory.tail(ImageId::new(3, 1).0, 3, 4, &new);
    let (end, checked) = memory.recover();
    checked.unwrap();
    assert_eq!(end, 4);
    assert_eq!(memory.files().leader_epoch(), 3);
}

#[test]
fn what_is_missing_is_named() {
    let memory = Memory::new();
    memory.image(2, false, &batch(2, 1));
    memory.tail(2, 1, 4, &batch(2, 1));
    let (end, checked) = memory.recover();
    assert_eq!(end, 0);
    assert!(matches!(
        checked,
        Err(SegmentError::Missing {
            log_end_offset: 0,
            ..
        })
    ));
}
