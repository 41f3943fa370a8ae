//! A partition's files whose storage fails, fills up, and is cut.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use tempfile::TempDir;

use super::files::{FilesConfig, PartitionFiles, StorageFault};
use crate::cluster::{Flush, Retention};
use crate::epoch::Cut;
use crate::image::FilePlace;
use crate::record::{BatchBuilder, stamp};
use crate::segment::fault::{Fault, FaultyStorage};
use crate::segment::{
    EpochEntry, LEADER_EPOCH_CHECKPOINT, SegmentFile, SegmentOptions, Storage, list_segments,
    read_leader_epochs, segment_path,
};

/// Records of one batch, and of the length of a batch.
const RECORDS: i64 = 2;

fn batch(base_offset: i64, leader_epoch: i32, timestamp: i64) -> Vec<u8> {
    let mut builder = BatchBuilder::new(4096);
    for _ in 0..RECORDS {
        assert!(builder.append(timestamp, None, Some(&[b'x'; 100]), &[]));
    }
    let mut bytes = builder.build().to_vec();
    stamp(&mut bytes, base_offset, leader_epoch);
    bytes
}

struct Partition {
    root: TempDir,
    storage: Arc<FaultyStorage>,
    files: PartitionFiles,
}

fn config(root: &Path, flush: Flush, storage: &Arc<FaultyStorage>) -> FilesConfig {
    FilesConfig {
        dir: root.join("t-0"),
        marker: root.join("t-0.poisoned"),
        flush,
        options: SegmentOptions {
            storage: Arc::clone(storage) as Arc<dyn Storage>,
            ..SegmentOptions::default()
        },
    }
}

impl Partition {
    fn new(flush: Flush) -> Self {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::create_dir(root.path().join("t-0")).unwrap();
        let storage = FaultyStorage::new(&root.path().join("t-0"), None);
        let files = PartitionFiles::recover(config(root.path(), flush, &storage), 0).unwrap();
        Self {
            root,
            storage,
            files,
        }
    }

    /// Appends one batch where the files end, or as the first of a new segment.
    fn append(&mut self, epoch: i32, timestamp: i64, rolls: bool) -> Result<(), StorageFault> {
        let end = self.files.log_end_offset();
        let place = self.files.end_place().next(end, rolls);
        self.files.append(place, &batch(end, epoch, timestamp))
    }

    fn restart(self) -> Self {
        let Self {
            root,
            storage,
            files,
        } = self;
        let start = files.log_start_offset();
        drop(files);
        storage.heal();
        let files = config(root.path(), Flush::Never, &storage);
        let files = PartitionFiles::recover(files, start).unwrap();
        Self {
            root,
            storage,
            files,
        }
    }

    fn segments(&self) -> Vec<i64> {
        list_segments(&self.root.path().join("t-0")).unwrap()
    }
}

#[test]
fn each_write_is_on_the_device_if_the_policy_says_so() {
    for (flush, durable) in [(Flush::Each, 2), (Flush::Never, 0)] {
        let mut partition = Partition::new(flush);
        partition.append(1, 5, false).unwrap();
        assert_eq!(partition.files.log_end_offset(), 2);
        assert_eq!(partition.files.durable_offset(), durable);
        assert_eq!(partition.files.sync_due(), None);
        partition
            .storage
            .lose_power(&partition.root.path().join("t-0"));
        assert_eq!(partition.restart().files.log_end_offset(), durable);
    }
}

/// The power went right after a roll. Other replicas, which have not rolled, go on in the segment before, and
/// this one could not follow them if its log ended in another.
#[test]
fn a_segment_without_a_whole_batch_is_left_by_a_crash() {
    let mut partition = Partition::new(Flush::Never);
    partition.append(1, 5, false).unwrap();
    let end = partition.files.end_place();
    partition.append(1, 5, true).unwrap();
    assert_eq!(partition.segments(), [0, 2]);
    let dir = partition.root.path().join("t-0");
    let torn = segment_path(&dir, 2, SegmentFile::Log);
    let file = fs::OpenOptions::new().write(true).open(torn).unwrap();
    file.set_len(10).unwrap();
    let mut partition = partition.restart();
    assert_eq!(partition.segments(), [0]);
    assert_eq!(
        (
            partition.files.log_end_offset(),
            partition.files.end_place()
        ),
        (2, end)
    );
    partition.append(2, 6, false).unwrap();
    assert_eq!(partition.restart().files.log_end_offset(), 4);
}

#[test]
fn a_sync_is_due_after_an_interval_or_some_bytes() {
    let len = batch(0, 0, 0).len() as u64;
    let mut partition = Partition::new(Flush::Every {
        interval_ms: 3_600_000,
        bytes: 2 * len,
    });
    assert_eq!(partition.files.sync_due(), None);
    partition.append(1, 5, false).unwrap();
    let due = partition.files.sync_due().unwrap();
    assert!(due > std::time::Instant::now() + Duration::from_secs(3000));
    partition.append(1, 5, false).unwrap();
    assert!(partition.files.sync_due().unwrap() <= std::time::Instant::now());
    assert_eq!(partition.files.sync().unwrap(), 4);
    assert_eq!(partition.files.sync_due(), None);
    // A roll syncs the segment that it ends.
    partition.append(1, 5, false).unwrap();
    partition.append(1, 5, true).unwrap();
    assert_eq!(partition.files.durable_offset(), 6);
}

#[test]
fn without_room_nothing_is_lost_and_all_is_tried_again() {
    for errno in [Errno::NOSPC, Errno::DQUOT, Errno::FBIG] {
        // At every step of an append that begins an epoch and a segment.
        for step in 0.. {
            let mut partition = Partition::new(Flush::Never);
            partition.append(1, 5, false).unwrap();
            partition.storage.fail_in(step, Fault::FailsForGood(errno));
            match partition.append(2, 5, true) {
                Ok(()) => break,
                Err(StorageFault::Full(cause)) => assert!(cause.contains("cannot"), "{cause}"),
                Err(other) => panic!("{errno} at step {step}: {other}"),
            }
            assert_eq!(partition.files.log_end_offset(), 2, "step {step}");
            partition.storage.heal();
            partition.append(2, 5, true).unwrap();
            partition.append(2, 5, false).unwrap();
            let partition = partition.restart();
            assert_eq!(partition.files.log_end_offset(), 6);
            assert_eq!(partition.segments(), [0, 2]);
        }
    }
}

#[test]
fn a_device_that_fails_a_write_poisons_until_a_restart() {
    for step in 0.. {
        let mut partition = Partition::new(Flush::Never);
        partition.append(1, 5, false).unwrap();
        partition.files.sync().unwrap();
        partition.storage.fail_in(step, Fault::Fails(Errno::IO));
        match partition.append(2, 5, true) {
            Ok(()) => {
                assert!(step > 8, "an append that rolls has more steps");
                break;
            }
            Err(StorageFault::Poisoned(cause)) => {
                assert!(cause.contains("cannot"), "{cause}");
            }
            Err(other) => panic!("{other}"),
        }
        // The storage works again; the partition does not believe it.
        assert!(matches!(
            partition.append(2, 5, true),
            Err(StorageFault::Poisoned(_))
        ));
        assert!(matches!(
            partition.files.sync(),
            Err(StorageFault::Poisoned(_))
        ));
        assert!(partition.files.cut(Cut::TruncateTo(0)).is_err());
        assert_eq!(partition.files.durable_offset(), 2);
        let mut partition = partition.restart();
        assert_eq!(partition.files.log_end_offset(), 2);
        partition.append(2, 5, true).unwrap();
    }
}

/// A failed fdatasync leaves pages that the kernel calls clean: a second one would succeed and mean
/// nothing. A restart writes them again.
#[test]
fn what_could_not_be_synced_is_written_again_at_the_next_start() {
    let mut partition = Partition::new(Flush::Never);
    partition.append(1, 5, false).unwrap();
    partition.files.sync().unwrap();
    partition.append(1, 5, false).unwrap();
    partition.storage.fail_in(0, Fault::Fails(Errno::IO));
    assert!(matches!(
        partition.files.sync(),
        Err(StorageFault::Poisoned(_))
    ));
    assert_eq!(partition.files.durable_offset(), 2);
    assert!(matches!(
        partition.files.sync(),
        Err(StorageFault::Poisoned(_))
    ));
    let marker = partition.root.path().join("t-0.poisoned");
    assert!(marker.exists());
    let steps = partition.storage.steps_done();
    let partition = partition.restart();
    // Write, sync, and the sync of every start.
    assert_eq!(partition.storage.steps_done() - steps, 3);
    assert!(!marker.exists());
    assert_eq!(partition.files.durable_offset(), 4);
    partition
        .storage
        .lose_power(&partition.root.path().join("t-0"));
    assert_eq!(partition.restart().files.log_end_offset(), 4);
}

#[test]
fn a_cut_log_goes_on() {
    let mut partition = Partition::new(Flush::Never);
    for (epoch, rolls) in [(1, false), (1, true), (2, false), (2, true), (3, false)] {
        partition.append(epoch, 5, rolls).unwrap();
    }
    partition.files.sync().unwrap();
    assert_eq!(partition.segments(), [0, 2, 6]);
    assert_eq!(partition.files.cut(Cut::TruncateTo(6)).unwrap(), 6);
    assert_eq!(partition.segments(), [0, 2]);
    assert_eq!(
        (
            partition.files.leader_epoch(),
            partition.files.durable_offset()
        ),
        (2, 6)
    );
    partition.append(4, 5, false).unwrap();
    assert_eq!(partition.files.cut(Cut::TruncateTo(4)).unwrap(), 4);
    partition.append(5, 5, true).unwrap();
    let mut partition = partition.restart();
    assert_eq!(partition.files.log_end_offset(), 6);
    let epochs = read_leader_epochs(
        &partition
            .root
            .path()
            .join("t-0")
            .join(LEADER_EPOCH_CHECKPOINT),
    );
    let epoch = |epoch, start_offset| EpochEntry {
        epoch,
        start_offset,
    };
    assert_eq!(epochs.unwrap(), [epoch(1, 0), epoch(5, 4)]);

    assert_eq!(partition.files.cut(Cut::RestartAt(100)).unwrap(), 100);
    assert_eq!(
        partition.files.end_place(),
        FilePlace {
            segment_base_offset: 100,
            file_position: 0
        }
    );
    partition.append(6, 5, true).unwrap();
    let partition = partition.restart();
    assert_eq!(
        (
            partition.files.log_start_offset(),
            partition.files.log_end_offset()
        ),
        (100, 102)
    );
    assert_eq!(partition.segments(), [100]);
}

/// Kafka's rules: by size a segment goes if what stays without it is still enough, by age if its newest
/// record is too old; the oldest first, none behind one that stays, none that is not all committed, and
/// never the active one.
#[test]
fn retention_is_kafkas() {
    let at = |ms| UNIX_EPOCH + Duration::from_millis(ms);
    let mut partition = Partition::new(Flush::Never);
    // Segments of one batch each begin at 0, 2, 4, 6; the last is active.
    for (number, timestamp) in [1000, 5000, 2000, 3000].into_iter().enumerate() {
        partition.append(1, timestamp, number > 0).unwrap();
    }
    let len = batch(0, 1, 0).len() as u64;
    let by_size = |bytes| Retention {
        bytes: Some(bytes),
        ms: None,
    };
    let by_age = |ms| Retention {
        bytes: None,
        ms: Some(ms),
    };
    let point = |p: &Partition, retention, high_watermark, now| {
        p.files.retention_point(retention, high_watermark, now)
    };
    let p = &partition;
    let now = SystemTime::now();
    for (retention, high_watermark, expected) in [
        (Retention::default(), 8, 0),
        (by_size(4 * len), 8, 0),
        (by_size(3 * len + 1), 8, 0),
        (by_size(3 * len), 8, 2),
        (by_size(2 * len), 8, 4),
        (by_size(1), 8, 6),
        (by_size(0), 8, 6),
        (by_size(0), 5, 4),
        (by_size(0), 1, 0),
        (by_age(1), 8, 6),
        (by_age(1), 3, 2),
    ] {
        assert_eq!(
            point(p, retention, high_watermark, now),
            expected,
            "{retention:?} {high_watermark}"
        );
    }
    // The second segment is the youngest and holds the third back.
    for (now, expected) in [(1100, 0), (1101, 2), (4000, 2), (5100, 2), (5101, 6)] {
        assert_eq!(point(p, by_age(100), 8, at(now)), expected, "{now}");
    }
    // The same after a restart.
    let mut partition = partition.restart();
    assert_eq!(point(&partition, by_age(100), 8, at(4000)), 2);
    partition.files.start_at(4).unwrap();
    assert_eq!(partition.segments(), [4, 6]);
    assert_eq!(point(&partition, by_age(100), 8, at(2000)), 4);
    assert_eq!(point(&partition, by_age(100), 8, at(2101)), 6);
    let partition = partition.restart();
    assert_eq!(
        (
            partition.files.log_start_offset(),
            partition.files.log_end_offset()
        ),
        (4, 8)
    );
}
