//! Truncation and removal, also with a crash, a failure or a loss of power between every two steps.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::fault::{Fault, FaultyStorage};
use super::tests::{batch, batches, log_path, options, snapshot};
use super::*;

/// On tmpfs, where a sync costs nothing.
fn test_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// Four segments: offsets 0 to 29, 30 to 59, 60 to 89, 90 to 119; epochs 0, 2 from 45, 3 from 60, 7 from
/// 105, and 8, which has no record yet.
fn write_log(dir: &Path) {
    let parts = [
        (0, batches(0..30, 0)),
        (30, [batches(30..45, 0), batches(45..60, 2)].concat()),
        (60, batches(60..90, 3)),
        (90, [batches(90..105, 3), batches(105..120, 7)].concat()),
    ];
    for (base_offset, bytes) in parts {
        let mut writer = SegmentWriter::create(dir, base_offset, &options()).unwrap();
        writer.append(&bytes).unwrap();
        if base_offset < 90 {
            writer.seal().unwrap();
        }
        writer.sync().unwrap();
    }
    write_leader_epochs(&Disk, &dir.join(LEADER_EPOCH_CHECKPOINT), &EPOCHS).unwrap();
}

const fn epoch(epoch: i32, start_offset: i64) -> EpochEntry {
    EpochEntry {
        epoch,
        start_offset,
    }
}

const EPOCHS: [EpochEntry; 5] = [
    epoch(0, 0),
    epoch(2, 45),
    epoch(3, 60),
    epoch(7, 105),
    epoch(8, 120),
];

fn log_bytes(dir: &Path) -> Vec<u8> {
    let segments = list_segments(dir).unwrap().into_iter();
    segments
        .flat_map(|base| fs::read(log_path(dir, base)).unwrap())
        .collect()
}

fn faulty(dir: &Path, fault: Option<(usize, Fault)>) -> (Arc<FaultyStorage>, SegmentOptions) {
    let storage = FaultyStorage::new(dir, fault);
    let faulty = SegmentOptions {
        storage: Arc::clone(&storage) as Arc<dyn Storage>,
        ..options()
    };
    (storage, faulty)
}

/// Names and bytes, without the directory.
fn relative(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let files = snapshot(dir).into_iter();
    let named = files.map(|(path, bytes)| {
        (
            path.file_name().unwrap().to_str().unwrap().to_owned(),
            bytes,
        )
    });
    named.filter(|(name, _)| !name.ends_with(".tmp")).collect()
}

#[test]
fn a_truncated_log_is_as_one_that_was_never_longer() {
    for offset in 0..=125_i64 {
        let dir = test_dir();
        write_log(dir.path());
        let whole = log_bytes(dir.path());
        let truncated = truncate(dir.path(), 0, offset, &options()).unwrap();
        let end = truncated.log_end_offset;
        // A batch has three records and goes as a whole.
        assert_eq!(end, (offset / 3 * 3).min(120), "{offset}");
        let left = log_bytes(dir.path());
        assert!(whole.starts_with(&left));
        // Kafka's truncateFromEnd: entries that begin at the offset or later go, even behind the log's end.
        let epochs: Vec<_> = EPOCHS
            .into_iter()
            .filter(|entry| entry.start_offset < offset)
            .collect();
        assert_eq!(truncated.epochs, epochs, "{offset}");
        let mut last = truncated.last.unwrap();
        assert_eq!(
            last.base_offset,
            ((offset.min(119) - 1).max(0) / 30 * 30).min(90)
        );
        last = {
            let recovery = recover(dir.path(), 0, &options()).unwrap();
            assert_eq!((recovery.log_end_offset, recovery.torn), (end, None));
            assert_eq!(recovery.rebuilt.len(), 0, "{offset}");
            drop(last);
            recovery.segments.into_iter().last().unwrap()
        };
        // It goes on as if nothing had been there.
        let mut writer = SegmentWriter::resume(dir.path(), last, &options()).unwrap();
        writer.append(&batch(end, 9)).unwrap();
        let recovery = recover(dir.path(), 0, &options()).unwrap();
        assert_eq!(recovery.log_end_offset, end + 3);
        assert_eq!(recovery.epochs.last(), Some(&epoch(9, end)));
    }
}

#[test]
fn a_log_is_not_truncated_below_its_start() {
    let dir = test_dir();
    write_log(dir.path());
    remove_below(dir.path(), 30, &options()).unwrap();
    let before = snapshot(dir.path());
    for (log_start_offset, offset) in [(30, 29), (30, 0), (60, 59), (61, 61)] {
        let error = truncate(dir.path(), log_start_offset, offset, &options()).unwrap_err();
        assert!(
            matches!(error, SegmentError::BelowLogStart { .. }),
            "{error}"
        );
    }
    assert!(snapshot(dir.path()) == before);
    // To the start itself it is: the first segment stays, empty, and says where the log goes on.
    assert_eq!(
        truncate(dir.path(), 30, 30, &options())
            .unwrap()
            .log_end_offset,
        30
    );
    assert_eq!(list_segments(dir.path()).unwrap(), [30]);
    assert!(log_bytes(dir.path()).is_empty());
}

#[test]
fn damage_before_the_offset_changes_nothing() {
    let dir = test_dir();
    write_log(dir.path());
    let path = log_path(dir.path(), 60);
    let mut bytes = fs::read(&path).unwrap();
    bytes[16] = 9;
    fs::write(&path, bytes).unwrap();
    let before = snapshot(dir.path());
    let error = truncate(dir.path(), 0, 75, &options()).unwrap_err();
    assert!(matches!(error, SegmentError::Damaged { .. }), "{error}");
    assert!(snapshot(dir.path()) == before);
    // Below the damage it does not matter.
    truncate(dir.path(), 0, 60, &options()).unwrap();
}

/// Runs `change` with a crash at each of its steps, once as if the process had been killed and once as
/// if the power had been lost; `check` sees the directory after recovery.
fn crash_everywhere(
    change: impl Fn(&Path, &SegmentOptions) -> Result<(), SegmentError>,
    check: impl Fn(&Path, &Recovery),
) {
    let uninterrupted = test_dir();
    write_log(uninterrupted.path());
    let (storage, counting) = faulty(uninterrupted.path(), None);
    change(uninterrupted.path(), &counting).unwrap();
    let steps = storage.steps_done();
    assert!(steps >= 5, "{steps}");
    for (step, is_power_lost) in (0..=steps).flat_map(|step| [(step, false), (step, true)]) {
        let dir = test_dir();
        write_log(dir.path());
        let (storage, crashing) = faulty(dir.path(), Some((step, Fault::Crash)));
        assert_eq!(change(dir.path(), &crashing).is_ok(), step == steps);
        if is_power_lost {
            storage.lose_power(dir.path());
        }
        let recovery = recover(dir.path(), 0, &options())
            .unwrap_or_else(|error| panic!("crash at step {step} of {steps}: {error}"));
        assert_eq!(recovery.torn, None, "step {step}");
        check(dir.path(), &recovery);
        // Again, to its end: the same as without the crash.
        change(dir.path(), &options()).unwrap();
        assert!(
            relative(dir.path()) == relative(uninterrupted.path()),
            "crash at step {step} of {steps}, power lost: {is_power_lost}"
        );
    }
}

#[test]
fn a_crash_between_any_two_steps_of_a_truncation_is_recovered_from() {
    for offset in [0, 3, 30, 44, 45, 60, 75, 105, 117, 120] {
        let whole = test_dir();
        write_log(whole.path());
        let whole = log_bytes(whole.path());
        crash_everywhere(
            |dir, options| truncate(dir, 0, offset, options).map(drop),
            |dir, recovery| {
                assert!(recovery.log_end_offset >= offset / 3 * 3);
                assert!(whole.starts_with(&log_bytes(dir)));
            },
        );
    }
}

#[test]
fn a_crash_between_any_two_steps_of_a_removal_is_recovered_from() {
    let whole = test_dir();
    write_log(whole.path());
    let whole = log_bytes(whole.path());
    for offset in [30, 60, 90] {
        crash_everywhere(
            |dir, options| remove_below(dir, offset, options).map(drop),
            |dir, recovery| {
                assert!(recovery.log_start_offset <= offset);
                assert_eq!(recovery.log_end_offset, 120);
                assert!(whole.ends_with(&log_bytes(dir)));
            },
        );
    }
}

#[test]
fn whole_segments_below_an_offset_are_removed_and_never_the_last() {
    for (offset, left, epochs) in [
        (29, vec![0, 30, 60, 90], [epoch(0, 29), EPOCHS[1]]),
        (30, vec![30, 60, 90], [epoch(0, 30), EPOCHS[1]]),
        (50, vec![30, 60, 90], [epoch(2, 50), EPOCHS[2]]),
        (60, vec![60, 90], [EPOCHS[2], EPOCHS[3]]),
        (119, vec![90], [epoch(7, 119), EPOCHS[4]]),
    ] {
        let dir = test_dir();
        write_log(dir.path());
        remove_below(dir.path(), offset, &options()).unwrap();
        assert_eq!(list_segments(dir.path()).unwrap(), left, "{offset}");
        let recovery = recover(dir.path(), offset, &options()).unwrap();
        assert_eq!(
            (recovery.log_start_offset, recovery.log_end_offset),
            (offset, 120)
        );
        // Kafka's truncateFromStart: the last entry at or before the offset begins there now.
        assert_eq!(recovery.epochs[..2], epochs, "{offset}");
    }
}

#[test]
fn a_log_that_starts_anew_is_empty_at_its_start() {
    let dir = test_dir();
    write_log(dir.path());
    start_anew(dir.path(), &options()).unwrap();
    let recovery = recover(dir.path(), 500, &options()).unwrap();
    assert_eq!(
        (recovery.log_start_offset, recovery.log_end_offset),
        (500, 500)
    );
    assert_eq!((recovery.segments.len(), recovery.epochs.len()), (0, 0));
}

#[test]
fn a_failed_step_of_a_truncation_can_be_tried_again() {
    let dir = test_dir();
    write_log(dir.path());
    let (storage, failing) = faulty(dir.path(), None);
    let mut failures = 0;
    for step in 0.. {
        storage.fail_in(step, Fault::Fails(Errno::IO));
        if truncate(dir.path(), 0, 48, &failing).is_ok() {
            break;
        }
        failures += 1;
        assert!(recover(dir.path(), 0, &options()).is_ok());
    }
    assert!(failures > 5);
    storage.heal();
    assert_eq!(
        truncate(dir.path(), 0, 48, &failing)
            .unwrap()
            .log_end_offset,
        48
    );
}

/// The bytes that a crash has torn are in a file of their own, also if recovery crashes in between.
#[test]
fn torn_bytes_are_kept_aside() {
    let torn = batch(120, 8);
    let torn = &torn[..torn.len() - 7];
    let steps = (0..).map(|step| {
        let dir = test_dir();
        write_log(dir.path());
        let mut bytes = fs::read(log_path(dir.path(), 90)).unwrap();
        let position = bytes.len() as u64;
        bytes.extend_from_slice(torn);
        fs::write(log_path(dir.path(), 90), bytes).unwrap();
        let (storage, crashing) = faulty(dir.path(), Some((step, Fault::Crash)));
        let is_done = recover(dir.path(), 0, &crashing).is_ok();
        storage.lose_power(dir.path());
        let recovery = recover(dir.path(), 0, &options()).unwrap();
        assert_eq!(recovery.log_end_offset, 120);
        let kept: Vec<_> = snapshot(dir.path())
            .into_iter()
            .filter(|(path, _)| path.extension().is_some_and(|e| e == "torn"))
            .collect();
        assert_eq!(kept.len(), 1, "crash at step {step}");
        assert_eq!(kept[0].1, torn);
        if let Some(tail) = recovery.torn {
            assert_eq!(
                (tail.position, tail.kept.as_ref()),
                (position, Some(&kept[0].0))
            );
            assert!(tail.to_string().contains(".torn"), "{tail}");
        }
        is_done
    });
    assert!(steps.take_while(|is_done| !is_done).count() >= 4);
}

#[test]
fn a_salvage_says_what_it_gives_up_and_deletes_nothing() {
    // Damage in the second segment; all behind it goes.
    let dir = test_dir();
    write_log(dir.path());
    let path = log_path(dir.path(), 30);
    let mut bytes = fs::read(&path).unwrap();
    let at = batches(30..36, 0).len();
    bytes[at + 70] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let total = |dir: &Path| snapshot(dir).iter().map(|(_, b)| b.len()).sum::<usize>();
    let (before, total_before) = (snapshot(dir.path()), total(dir.path()));
    recover(dir.path(), 0, &options()).unwrap_err();
    let plan = Salvage::plan(dir.path(), &options()).unwrap();
    assert!(snapshot(dir.path()) == before);
    let dropped = batches(36..45, 0).len()
        + batches(45..60, 2).len()
        + batches(60..105, 3).len()
        + batches(105..120, 7).len();
    assert_eq!(
        (plan.log_end_offset, plan.segments_count, plan.dropped_len),
        (36, 3, dropped as u64)
    );
    let text = plan.to_string();
    assert!(text.contains("would end at offset 36"), "{text}");
    let recovery = plan.carry_out(0, &options()).unwrap();
    assert_eq!(recovery.log_end_offset, 36);
    assert!(total(dir.path()) >= total_before - 1000, "indexes shrink");
    assert!(Salvage::plan(dir.path(), &options()).unwrap().is_needless());

    // A gap between segments.
    let dir = test_dir();
    write_log(dir.path());
    fs::remove_file(log_path(dir.path(), 30)).unwrap();
    recover(dir.path(), 0, &options()).unwrap_err();
    let plan = Salvage::plan(dir.path(), &options()).unwrap();
    assert_eq!((plan.log_end_offset, plan.segments_count), (30, 2));
    assert_eq!(plan.carry_out(0, &options()).unwrap().log_end_offset, 30);

    // A checkpoint of epochs that contradicts the log, or cannot be read.
    for wrong in ["0\n2\n0 0\n2 48\n", "garbage"] {
        let dir = test_dir();
        write_log(dir.path());
        fs::write(dir.path().join(LEADER_EPOCH_CHECKPOINT), wrong).unwrap();
        recover(dir.path(), 0, &options()).unwrap_err();
        let plan = Salvage::plan(dir.path(), &options()).unwrap();
        assert!(plan.rebuilds_epochs && plan.log_end_offset == 120);
        let recovery = plan.carry_out(0, &options()).unwrap();
        assert_eq!(
            (recovery.log_end_offset, &recovery.epochs[..]),
            (120, &EPOCHS[..4])
        );
    }
}
