//! The log memory while records come and go, and consumers read new and old ones: bounded, and never taken
//! from a replica that still needs it.

mod common;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{NodeExt, TestCluster, batch, consume, eventually};
use replicator::consumer::{Consumer, StartOffset};
use replicator::control::Acks;
use replicator::runtime::ConsumerError;

const IMAGE_LEN: u64 = 65536;

/// What the process, both nodes and the consumers, takes.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    resident_mib: u64,
    files: usize,
}

impl Taken {
    fn now() -> Self {
        let statm = fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        Self {
            resident_mib: (pages * 4096) >> 20,
            files: fs::read_dir("/proc/self/fd").unwrap().count(),
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            resident_mib: self.resident_mib.max(other.resident_mib),
            files: self.files.max(other.files),
        }
    }
}

/// Reads from the first record on until it is over; every offset must come, but for those that retention has
/// removed. Returns how many batches there were.
fn read(
    cluster: &TestCluster,
    replica: Option<u32>,
    mut is_over: impl FnMut(&Consumer) -> bool,
) -> usize {
    let mut count = 0;
    let mut expected = None;
    let mut consumer = cluster.consumer("t", StartOffset::Earliest, replica);
    while !is_over(&consumer) {
        let fetch = match consumer.poll(Duration::from_millis(20)) {
            Ok(fetch) => fetch,
            Err(ConsumerError::OffsetOutOfRange { earliest, .. }) => {
                assert!(expected.is_some_and(|expected| expected < earliest));
                expected = None;
                consumer = cluster.consumer("t", StartOffset::Earliest, replica);
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        for (_, batch) in fetch.batches() {
            let found = batch.base_offset();
            assert_eq!(found, expected.unwrap_or(found), "offsets are dense");
            expected = Some(batch.next_offset());
            count += 1;
        }
    }
    count
}

/// Thousands of rolls, with a limit of a few images on each node: one consumer follows, another one reads from
/// the first record there is, again and again, on the other node.
#[test]
fn thousands_of_rolls_take_no_more_than_hundreds() {
    const LIMIT: u64 = 12 * IMAGE_LEN;
    const APPENDS: i64 = 2000;
    let topics = format!(
        "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1, 2]\nimage_size = {IMAGE_LEN}\n\
         segment_size = 524288\nretention_bytes = 2000000\n"
    );
    let mut cluster = TestCluster::prepare_with(2, &format!("memory = {LIMIT}"), &topics);
    cluster.start_node(1);
    cluster.start_node(2);
    cluster.wait_in_sync();
    let (cluster, done) = (&cluster, &AtomicBool::new(false));
    let is_done = move || done.load(Ordering::Relaxed);
    let (early, late) = thread::scope(|scope| {
        let follower = scope.spawn(move || read(cluster, None, |_| is_done()));
        let scanner = scope.spawn(move || {
            let mut scans = 0;
            while !is_done() {
                read(cluster, Some(2), |consumer| {
                    let end = consumer.high_watermark(0);
                    is_done() || end.is_some() && consumer.position(0) >= end
                });
                scans += 1;
            }
            scans
        });
        let (mut early, mut late) = (Taken::default(), Taken::default());
        for number in 0..APPENDS {
            // Two batches do not fit an image, so each append rolls.
            let batch = batch("x", 1, 32_000);
            let offset = cluster.node(1).append("t", 0, batch, Acks::Replicated);
            assert_eq!(offset.unwrap(), number);
            if number % 50 == 0 {
                for node in [1, 2] {
                    let status = cluster.status(node);
                    assert!(status.images_len <= LIMIT, "{status:?}");
                    assert!(status.registered_len <= 2 * LIMIT, "{status:?}");
                }
                match number < APPENDS / 3 {
                    true => early = early.max(Taken::now()),
                    false => late = late.max(Taken::now()),
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        let (records, scans) = (follower.join().unwrap(), scanner.join().unwrap());
        eprintln!("{records} records followed, {scans} scans, {early:?}, then {late:?}");
        assert!(records > 0 && scans > 1);
        (early, late)
    });
    assert!(
        late.resident_mib <= early.resident_mib + 16,
        "{early:?}, then {late:?}"
    );
    assert!(late.files <= early.files + 8, "{early:?}, then {late:?}");
    // The grace period over and the consumers gone, only what is in use is left.
    eventually("eviction", || {
        [1, 2]
            .iter()
            .all(|&node| cluster.status(node).images_len <= 3 * IMAGE_LEN)
    });
}

/// A consumer that goes away gives back the image that the leader appends to; what it still holds beyond the
/// files is there after an orderly restart.
#[test]
fn an_image_that_a_consumer_gave_back_is_still_the_leaders() {
    let topics = "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1]\nimage_size = 65536\n\
                  segment_size = 1048576\n";
    let mut cluster = TestCluster::start(1, topics);
    let append = |cluster: &TestCluster, prefix: &str| {
        let appended = cluster
            .node(1)
            .append("t", 0, batch(prefix, 1, 100), Acks::Replicated);
        appended.unwrap();
    };
    append(&cluster, "first");
    for _ in 0..2 {
        let mut consumer = cluster.consumer("t", StartOffset::Earliest, None);
        assert_eq!(consume(&mut consumer, 1).len(), 1);
    }
    // Long enough to give the image back, not for the leader to need another one.
    thread::sleep(Duration::from_millis(500));
    for _ in 0..20 {
        append(&cluster, "more");
    }
    cluster.stop_node(1);
    cluster.start_node(1);
    cluster.wait_in_sync();
    let mut consumer = cluster.consumer("t", StartOffset::Earliest, None);
    assert_eq!(consume(&mut consumer, 21).len(), 21);
}
