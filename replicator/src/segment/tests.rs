//! A partition directory written, damaged in many ways, and recovered.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::record::{BatchBuilder, BatchError, HEADER_LEN, stamp};

pub(super) fn options() -> SegmentOptions {
    SegmentOptions {
        index_interval_bytes: 300,
        ..SegmentOptions::default()
    }
}

fn recover(dir: &Path) -> Result<Recovery, SegmentError> {
    super::recover(dir, 0, &options())
}

/// A batch of three records whose timestamps are 10, 11 and 12 times its base offset.
pub(super) fn batch(base_offset: i64, leader_epoch: i32) -> Vec<u8> {
    let mut builder = BatchBuilder::new(4096);
    for factor in 10..13 {
        let value = format!("value {base_offset} {factor}");
        assert!(builder.append(base_offset * factor, None, Some(value.as_bytes()), &[]));
    }
    let mut bytes = builder.build().to_vec();
    stamp(&mut bytes, base_offset, leader_epoch);
    bytes
}

pub(super) fn batches(offsets: std::ops::Range<i64>, leader_epoch: i32) -> Vec<u8> {
    offsets
        .step_by(3)
        .flat_map(|offset| batch(offset, leader_epoch))
        .collect()
}

/// Two segments, offsets 0 to 59 and 60 to 89, epochs 0 and 2.
pub(super) fn write_log(dir: &Path) {
    let mut writer = SegmentWriter::create(dir, 0, &options()).unwrap();
    assert_eq!(writer.append(&batches(0..30, 0)).unwrap(), 0);
    let position = writer.append(&batches(30..60, 0)).unwrap();
    assert_eq!(position, batches(0..30, 0).len() as u64);
    writer.seal().unwrap();
    let mut writer = SegmentWriter::create(dir, 60, &options()).unwrap();
    writer.append(&batches(60..90, 2)).unwrap();
    writer.sync().unwrap();
    let epochs = [(0, 0), (2, 60)].map(|(epoch, start_offset)| EpochEntry {
        epoch,
        start_offset,
    });
    write_leader_epochs(&Disk, &dir.join(LEADER_EPOCH_CHECKPOINT), &epochs).unwrap();
}

pub(super) fn log_path(dir: &Path, base_offset: i64) -> PathBuf {
    segment_path(dir, base_offset, SegmentFile::Log)
}

/// Every file of the directory with its bytes.
pub(super) fn snapshot(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

fn overwrite(path: &Path, position: u64, bytes: &[u8]) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(bytes, position)
        .unwrap();
}

fn flip(path: &Path, position: u64) {
    let at = usize::try_from(position).unwrap();
    let byte = fs::read(path).unwrap()[at];
    overwrite(path, position, &[byte ^ 0x10]);
}

/// Recovers, and checks that it is refused and that no file has changed.
fn refused(dir: &Path) -> SegmentError {
    let before = snapshot(dir);
    let error = recover(dir).unwrap_err();
    assert!(snapshot(dir) == before, "a refused directory is as it was");
    error
}

#[test]
fn a_whole_log_is_left_alone_and_continued() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let before = snapshot(dir.path());
    let mut recovery = recover(dir.path()).unwrap();
    assert_eq!(
        (recovery.log_start_offset, recovery.log_end_offset),
        (0, 90)
    );
    assert_eq!(recovery.torn, None);
    assert_eq!(recovery.rebuilt, Vec::<PathBuf>::new());
    assert!(snapshot(dir.path()) == before);

    // Continued after a restart, the indexes are those of a log that was never interrupted.
    let last = recovery.segments.pop().unwrap();
    let mut writer = SegmentWriter::resume(dir.path(), last, &options()).unwrap();
    writer.append(&batches(90..120, 2)).unwrap();
    let recovery = recover(dir.path()).unwrap();
    assert_eq!(recovery.log_end_offset, 120);
    assert_eq!(recovery.rebuilt, Vec::<PathBuf>::new());
}

#[test]
fn an_empty_or_missing_directory_is_an_empty_log() {
    let dir = tempfile::tempdir().unwrap();
    for dir in [dir.path().to_owned(), dir.path().join("missing")] {
        let recovery = recover(&dir).unwrap();
        assert_eq!((recovery.segments.len(), recovery.log_end_offset), (0, 0));
    }
}

#[test]
fn a_torn_tail_is_cut_off_at_every_length() {
    let whole = batch(87, 2).len() as u64;
    for cut in 1..=whole {
        let dir = tempfile::tempdir().unwrap();
        write_log(dir.path());
        let path = log_path(dir.path(), 60);
        let len = fs::metadata(&path).unwrap().len();
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(len - cut)
            .unwrap();
        let recovery = recover(dir.path()).unwrap();
        assert_eq!(recovery.log_end_offset, 87);
        assert_eq!(fs::metadata(&path).unwrap().len(), len - whole);
        let torn = (cut < whole).then_some((path, len - whole, whole - cut));
        assert_eq!(
            recovery.torn.map(|t| (t.path, t.position, t.dropped_len)),
            torn
        );
    }
}

/// What a crashed machine may leave where the file has grown and the data never arrived.
#[test]
fn zeros_at_the_end_are_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let path = log_path(dir.path(), 60);
    let len = fs::metadata(&path).unwrap().len();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len + 5000)
        .unwrap();
    let recovery = recover(dir.path()).unwrap();
    let torn = recovery.torn.unwrap();
    assert_eq!((torn.position, torn.dropped_len), (len, 5000));
    assert_eq!(
        torn.fault,
        SegmentFault::Batch(BatchError::Magic { magic: 0 })
    );
    assert_eq!(recovery.log_end_offset, 90);
}

#[test]
fn any_flipped_bit_before_the_last_batch_is_refused() {
    let start = batches(60..69, 2).len() as u64;
    for byte in 0..batch(69, 2).len() as u64 {
        let dir = tempfile::tempdir().unwrap();
        write_log(dir.path());
        let path = log_path(dir.path(), 60);
        flip(&path, start + byte);
        let error = refused(dir.path());
        let message = error.to_string();
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        // The epoch is outside the CRC and may rise: the batch behind it then shows the fault.
        let at_next = (12..16).contains(&byte);
        let expected = if at_next {
            start + batch(69, 2).len() as u64
        } else {
            start
        };
        match error {
            SegmentError::Contradiction {
                position, fault, ..
            } => {
                assert_eq!(position, expected);
                assert_eq!(matches!(fault, SegmentFault::Epoch { .. }), at_next);
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn damage_in_an_earlier_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let path = log_path(dir.path(), 0);
    let len = fs::metadata(&path).unwrap().len();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(len - 1)
        .unwrap();
    let message = refused(dir.path()).to_string();
    assert!(
        message.contains("a segment follows that begins at offset 60"),
        "{message}"
    );
    assert!(message.contains("farlog recover --data-dir"), "{message}");
}

#[test]
fn a_missing_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    SegmentWriter::create(dir.path(), 93, &options()).unwrap();
    let error = refused(dir.path());
    let expected = SegmentFault::Offset {
        expected: 90,
        found: 93,
    };
    assert!(matches!(&error, SegmentError::Contradiction { fault, .. } if *fault == expected));
}

#[test]
fn a_falling_epoch_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let path = log_path(dir.path(), 60);
    let mut bytes = batch(87, 2);
    stamp(&mut bytes, 87, 1);
    overwrite(
        &path,
        fs::metadata(&path).unwrap().len() - bytes.len() as u64,
        &bytes,
    );
    let fault = SegmentFault::Epoch {
        previous: 2,
        found: 1,
    };
    assert!(
        matches!(refused(dir.path()), SegmentError::Contradiction { fault: f, .. } if f == fault)
    );
}

#[test]
fn an_epoch_checkpoint_is_continued_cut_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let path = dir.path().join(LEADER_EPOCH_CHECKPOINT);
    let whole = fs::read_to_string(&path).unwrap();
    assert_eq!(whole, "0\n2\n0 0\n2 60\n");
    fs::write(&path, "0\n1\n0 0\n").unwrap();
    let recovery = recover(dir.path()).unwrap();
    assert_eq!(recovery.rebuilt.as_slice(), std::slice::from_ref(&path));
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    // The log may go on in memory, up to this epoch: the caller knows.
    fs::write(&path, "0\n3\n0 0\n2 60\n3 91\n").unwrap();
    let recovery = recover(dir.path()).unwrap();
    assert_eq!((recovery.epochs.len(), recovery.rebuilt.len()), (2, 0));
    let beyond = EpochEntry {
        epoch: 3,
        start_offset: 91,
    };
    assert_eq!(recovery.epochs_beyond, [beyond]);
    fs::remove_file(&path).unwrap();
    assert_eq!(recover(dir.path()).unwrap().epochs.len(), 2);
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    // A leader's epoch begins before its first record is there.
    fs::write(&path, "0\n3\n0 0\n2 60\n3 90\n").unwrap();
    assert_eq!(recover(dir.path()).unwrap().rebuilt, Vec::<PathBuf>::new());
    for wrong in [
        "0\n2\n0 0\n2 57\n",
        "0\n2\n0 0\n2 63\n",
        "0\n3\n0 0\n1 60\n3 80\n",
    ] {
        fs::write(&path, wrong).unwrap();
        let error = refused(dir.path());
        assert!(
            matches!(error, SegmentError::EpochMismatch { .. }),
            "{wrong}: {error}"
        );
    }
}

#[test]
fn malformed_checkpoints_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    for (text, line) in [
        ("", 1),
        ("1\n0\n", 1),
        ("0\n", 2),
        ("0\n2\n0 0\n", 2),
        ("0\n1\n0 0 0\n", 3),
        ("0\n1\n0 x\n", 3),
        ("0\n2\n1 5\n0 9\n", 4),
        ("0\n2\n0 5\n1 4\n", 4),
    ] {
        fs::write(&path, text).unwrap();
        match read_leader_epochs(&path) {
            Err(SegmentError::Checkpoint { line: found, .. }) => assert_eq!(found, line, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    assert_eq!(read_leader_epochs(&dir.path().join("missing")).unwrap(), []);
}

#[test]
fn high_watermarks_round_trip_in_kafkas_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(HIGH_WATERMARK_CHECKPOINT);
    assert!(read_partition_offsets(&path).unwrap().is_empty());
    let entries = PartitionOffsets::from([
        (("flights".to_owned(), 0), 5194),
        (("flights".to_owned(), 1), 0),
    ]);
    write_partition_offsets(&Disk, &path, &entries).unwrap();
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "0\n2\nflights 0 5194\nflights 1 0\n"
    );
    assert_eq!(read_partition_offsets(&path).unwrap(), entries);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "no temporary file stays"
    );
    fs::write(&path, "0\n2\nflights 0 1\nflights 0 2\n").unwrap();
    assert!(matches!(
        read_partition_offsets(&path),
        Err(SegmentError::Checkpoint { line: 4, .. })
    ));
}

#[test]
fn lost_and_wrong_indexes_are_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let before = snapshot(dir.path());
    let index = segment_path(dir.path(), 0, SegmentFile::Index);
    let time_index = segment_path(dir.path(), 60, SegmentFile::TimeIndex);
    assert!(fs::metadata(&index).unwrap().len() >= 5 * INDEX_ENTRY_LEN as u64);
    fs::remove_file(&index).unwrap();
    flip(&time_index, 7);
    let recovery = recover(dir.path()).unwrap();
    assert_eq!(recovery.rebuilt, [index, time_index]);
    assert!(snapshot(dir.path()) == before);
}

#[test]
fn offsets_and_timestamps_are_found_with_and_without_indexes() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    for without_indexes in [false, true] {
        if without_indexes {
            fs::remove_file(segment_path(dir.path(), 0, SegmentFile::Index)).unwrap();
            fs::remove_file(segment_path(dir.path(), 0, SegmentFile::TimeIndex)).unwrap();
        }
        let reader = SegmentReader::open(dir.path(), 0).unwrap();
        for offset in 0..60 {
            let found = reader.position_of(offset).unwrap().unwrap();
            assert_eq!(found.base_offset, offset / 3 * 3);
            let mut bytes = vec![0; found.len];
            assert_eq!(
                reader.read_at(found.position, &mut bytes).unwrap(),
                found.len
            );
            assert_eq!(bytes, batch(found.base_offset, 0));
        }
        assert_eq!(reader.position_of(60).unwrap(), None);
        assert_eq!(reader.find_timestamp(i64::MIN, 0).unwrap(), Some((0, 0)));
        for timestamp in 1..=57 * 12 {
            // The first record that is late enough, found by looking at all of them.
            let all = (0..60).map(|offset| (offset, offset / 3 * 3 * (10 + offset % 3)));
            let expected = all.clone().find(|&(_, t)| t >= timestamp);
            assert_eq!(reader.find_timestamp(timestamp, 0).unwrap(), expected);
        }
        assert_eq!(reader.find_timestamp(57 * 12 + 1, 0).unwrap(), None);
    }
}

/// The bytes of both indexes, worked out by hand from Kafka's rule.
#[test]
fn index_bytes_are_kafkas() {
    let dir = tempfile::tempdir().unwrap();
    let len = i32::try_from(batch(100, 0).len()).unwrap();
    assert_eq!(len, 61 + 19 + 2 * 20);
    let options = SegmentOptions {
        index_interval_bytes: 150,
        ..SegmentOptions::default()
    };
    let mut writer = SegmentWriter::create(dir.path(), 100, &options).unwrap();
    writer.append(&batches(100..115, 0)).unwrap();
    writer.seal().unwrap();
    // More than 150 bytes have passed before the third and the fifth batch.
    let entries = |file| fs::read(segment_path(dir.path(), 100, file)).unwrap();
    let offsets: Vec<u8> = [8, 2 * len, 14, 4 * len].map(i32::to_be_bytes).concat();
    assert_eq!(entries(SegmentFile::Index), offsets);
    let mut times = Vec::new();
    for (timestamp, offset) in [(106 * 12_i64, 8_i32), (112 * 12, 14)] {
        times.extend_from_slice(&timestamp.to_be_bytes());
        times.extend_from_slice(&offset.to_be_bytes());
    }
    assert_eq!(entries(SegmentFile::TimeIndex), times);
}

#[test]
fn appends_that_do_not_continue_the_log_write_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = SegmentWriter::create(dir.path(), 0, &options()).unwrap();
    writer.append(&batches(0..6, 0)).unwrap();
    let mut gap = batches(6..9, 0);
    gap.extend(batch(12, 0));
    match writer.append(&gap).unwrap_err() {
        SegmentError::Damaged {
            position, fault, ..
        } => {
            assert_eq!(position, batches(0..9, 0).len() as u64);
            assert_eq!(
                fault,
                SegmentFault::Offset {
                    expected: 9,
                    found: 12
                }
            );
        }
        other => panic!("{other}"),
    }
    let cut = &batch(6, 0)[..HEADER_LEN + 1];
    assert!(matches!(
        writer.append(cut).unwrap_err(),
        SegmentError::Damaged {
            fault: SegmentFault::Batch(BatchError::Incomplete { .. }),
            ..
        }
    ));
    assert_eq!(fs::read(writer.path()).unwrap(), batches(0..6, 0));
    assert_eq!(
        (writer.next_offset(), writer.len()),
        (6, batches(0..6, 0).len() as u64)
    );
    writer.append(&batches(6..9, 0)).unwrap();
}

#[test]
fn offsets_beyond_the_indexes_reach_ask_for_a_roll() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = SegmentWriter::create(dir.path(), 0, &options()).unwrap();
    let mut far = batch(0, 0);
    let delta = i32::MAX;
    far[23..27].copy_from_slice(&delta.to_be_bytes());
    let error = writer.append(&far).unwrap_err();
    assert!(matches!(error, SegmentError::Full { .. }), "{error}");
    assert!(writer.is_empty());
}

#[test]
fn a_segment_is_not_created_over_another() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let message = SegmentWriter::create(dir.path(), 60, &options())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("cannot create") && message.contains("exists"),
        "{message}"
    );
}

#[test]
fn creating_a_segment_can_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let in_the_way = segment_path(dir.path(), 0, SegmentFile::TimeIndex);
    fs::create_dir(&in_the_way).unwrap();
    let message = SegmentWriter::create(dir.path(), 0, &options())
        .unwrap_err()
        .to_string();
    assert!(message.contains(in_the_way.to_str().unwrap()), "{message}");
    fs::remove_dir(&in_the_way).unwrap();
    SegmentWriter::create(dir.path(), 0, &options()).unwrap();
}

/// A full device: nothing counts as appended, and the error says where and what to do.
#[test]
fn out_of_space_names_file_position_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    write_log(dir.path());
    let segment = recover(dir.path()).unwrap().segments.pop().unwrap();
    let (path, kept) = (log_path(dir.path(), 60), dir.path().join("kept"));
    fs::rename(&path, &kept).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let mut writer = SegmentWriter::resume(dir.path(), segment, &options()).unwrap();
    let len = writer.len();
    let error = writer.append(&batches(90..120, 2)).unwrap_err();
    assert!(error.is_out_of_space(), "{error}");
    let message = error.to_string();
    let place = format!("cannot write {} at position {len}", path.display());
    assert!(
        message.contains(&place) && message.contains("Free space"),
        "{message}"
    );
    assert_eq!((writer.len(), writer.next_offset()), (len, 90));

    fs::rename(&kept, &path).unwrap();
    let recovery = recover(dir.path()).unwrap();
    assert_eq!((recovery.log_end_offset, recovery.torn), (90, None));
    assert_eq!(recovery.rebuilt, Vec::<PathBuf>::new());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the last segment: recovered to whole batches or refused, never a panic.
    #[test]
    fn any_damage_is_cut_off_or_refused(
        at in 0_u64..1500,
        bytes in proptest::collection::vec(any::<u8>(), 1..300),
    ) {
        let dir = tempfile::tempdir().unwrap();
        write_log(dir.path());
        let path = log_path(dir.path(), 60);
        let original = fs::read(&path).unwrap();
        overwrite(&path, at, &bytes);
        let before = snapshot(dir.path());
        match recover(dir.path()) {
            Ok(recovery) => {
                let whole = batches(60..recovery.log_end_offset, 2);
                prop_assert!(original.starts_with(&whole));
                prop_assert_eq!(fs::metadata(&path).unwrap().len(), whole.len() as u64);
                let again = recover(dir.path()).unwrap();
                prop_assert!(again.torn.is_none() && again.rebuilt.is_empty());
            }
            Err(error) => {
                prop_assert!(snapshot(dir.path()) == before, "{}", error);
            }
        }
    }

    #[test]
    fn any_bytes_are_scanned_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let dir = tempfile::tempdir().unwrap();
        for file in [SegmentFile::Log, SegmentFile::Index, SegmentFile::TimeIndex] {
            fs::write(segment_path(dir.path(), 0, file), &bytes).unwrap();
        }
        let reader = SegmentReader::open(dir.path(), 0).unwrap();
        let _ = reader.position_of(5);
        let _ = reader.find_timestamp(5, 1000);
        let _ = recover(dir.path());
    }
}
