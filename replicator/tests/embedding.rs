//! The crate as a broker links it: handles, futures, subscriptions, the local replica, an orderly end.

mod common;
#[path = "../examples/embedded_broker/executor.rs"]
mod executor;
#[path = "../examples/embedded_broker/registry.rs"]
mod registry;

use std::future::Future;
use std::io::Write;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use common::{NodeExt, PATIENCE, TestCluster, batch, consume, eventually};
use executor::block_on;
use registry::Registry;
use replicator::consumer::StartOffset;
use replicator::control::Acks;
use replicator::record::{BatchBuilder, BatchView};
use replicator::runtime::{
    AppendError, Change, Node, NodeConfig, Partition, Pending, RESERVATION_TIME, ReadError,
    Reservation, StorageStatus, TryAppendError,
};

/// A follower that is away stays in sync for as long as any test takes.
const ONE: &str =
    "[[topics]]\nname = \"t\"\npartitions = 1\nreplicas = [1, 2]\nlag_max_ms = 600_000\n";
/// The same with images that hold three batches of 20 kB.
const SMALL: &str =
    "[[topics]]\nname = \"t\"\npartitions = 1\nreplicas = [1, 2]\nlag_max_ms = 600_000
image_size = 65536\nsegment_size = 131072\n";

/// Handles cross threads, and what is pending crosses them too.
const _: () = {
    const fn is_shared<T: Clone + Send + Sync>() {}
    const fn is_sent<T: Send>() {}
    is_shared::<Partition>();
    is_sent::<Pending<i64>>();
    is_sent::<Node>();
};

/// The values in encoded batches, whose offsets must go on from `first`.
fn values(mut bytes: &[u8], first: i64) -> Vec<String> {
    let mut values = Vec::new();
    while !bytes.is_empty() {
        let (batch, rest) = BatchView::parse(bytes).unwrap();
        for record in batch.records().unwrap() {
            let record = record.unwrap();
            assert_eq!(record.offset, first + values.len() as i64);
            values.push(String::from_utf8_lossy(record.value.unwrap()).into_owned());
        }
        bytes = rest;
    }
    values
}

#[test]
fn appends_are_futures_polls_and_waits() {
    let cluster = TestCluster::start(2, ONE);
    let partition = cluster.node(1).partition("t", 0).unwrap();
    let append = |name| {
        partition
            .append(batch(name, 1, 0), Acks::Replicated)
            .unwrap()
    };
    let (first, second, mut third) = (append("a"), append("b"), append("c"));
    // The later one is awaited first; both are resolved by one executor.
    block_on(async {
        assert_eq!(second.await, Ok(1));
        assert_eq!(first.await, Ok(0));
    });
    eventually("the third", || third.try_result() == Some(Ok(2)));
    let mut records = BatchBuilder::new(1000);
    for value in [&b"d"[..], b"e"] {
        assert!(records.append(7, Some(b"key"), Some(value), &[]));
    }
    let mut fourth = partition.append(&mut records, Acks::Durable).unwrap();
    assert_eq!(fourth.wait_timeout(PATIENCE), Some(Ok(3)));
    assert_eq!(partition.offsets().unwrap().log_end_offset, 5);
    // From many threads at once, by clones.
    let offsets: Vec<i64> = thread::scope(|scope| {
        let spawn = |i: usize| {
            let partition = partition.clone();
            scope.spawn(move || {
                let append = partition.append(batch(&i.to_string(), 1, 0), Acks::Leader);
                block_on(append.unwrap()).unwrap()
            })
        };
        let threads: Vec<_> = (0..8).map(spawn).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut sorted = offsets.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (5..13).collect::<Vec<_>>());
}

#[test]
fn refusals_are_typed() {
    let mut cluster = TestCluster::start(2, SMALL);
    let leader = cluster.node(1).partition("t", 0).unwrap();
    let follower = cluster.node(2).partition("t", 0).unwrap();
    let refused = |partition: &Partition, bytes, acks| match partition.append(bytes, acks) {
        Ok(pending) => pending.wait().unwrap_err(),
        Err(error) => error,
    };
    let mut damaged = batch("x", 1, 0);
    damaged[70] ^= 1;
    let error = refused(&leader, damaged, Acks::Leader);
    assert!(matches!(error, AppendError::Invalid(_)), "{error:?}");
    let error = refused(&leader, batch("x", 1, 40_000), Acks::Leader);
    assert!(matches!(error, AppendError::TooLarge(_)), "{error:?}");
    assert!(!error.is_retriable());
    let error = refused(&follower, batch("x", 1, 0), Acks::Leader);
    assert!(matches!(error, AppendError::NotLeader(_)), "{error:?}");
    assert!(error.is_retriable());
    cluster.stop_node(1);
    let error = refused(&leader, batch("x", 1, 0), Acks::Leader);
    assert!(matches!(error, AppendError::Stopped(_)), "{error:?}");
    assert!(matches!(
        leader.read(0, 1, &mut Vec::new()),
        Err(ReadError::Stopped)
    ));
}

/// Without room `append` blocks and `try_append` gives the batch back; everything that was taken keeps its
/// order. A partition that waits does not keep the others of its node waiting before the queue is full.
#[test]
fn a_full_queue_is_felt() {
    let topics = format!("{ONE}[[topics]]\nname = \"u\"\npartitions = 1\nreplicas = [1]\n");
    let mut cluster = TestCluster::start(2, &topics);
    let partition = cluster.node(1).partition("t", 0).unwrap();
    cluster.stop_node(2);
    let bytes = batch("x", 1, 0);
    let append = |_| partition.append(bytes.clone(), Acks::Replicated).unwrap();
    // As many wait for their commit as may, and some more for room.
    let mut pending: Vec<_> = (0..65_536 + 10).map(append).collect();
    eventually("stalling", || {
        cluster.status(1).partitions[0].stalled_appends == 10
    });
    let other = cluster
        .node(1)
        .append("u", 0, batch("y", 1, 0), Acks::Replicated);
    assert_eq!(other, Ok(0));
    let begun = Instant::now();
    let given_back = loop {
        assert!(begun.elapsed() < PATIENCE, "{} batches", pending.len());
        match partition.try_append(bytes.clone(), Acks::Replicated) {
            Ok(append) => pending.push(append),
            Err(TryAppendError::Full(batch)) => {
                // Before that, the I/O thread is only slow.
                if pending.len() == 65_536 + 64 + 256 {
                    break batch;
                }
                thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    };
    let blocked = {
        let partition = partition.clone();
        thread::spawn(move || partition.append(given_back, Acks::Replicated).unwrap())
    };
    thread::sleep(Duration::from_millis(100));
    assert!(!blocked.is_finished());
    cluster.start_node(2);
    pending.push(blocked.join().unwrap());
    for (offset, append) in (0..).zip(pending) {
        assert_eq!(append.wait(), Ok(offset));
    }
}

#[test]
fn the_local_replica_is_read_whoever_leads() {
    let cluster = TestCluster::start(2, SMALL);
    let partitions = [1, 2].map(|node| cluster.node(node).partition("t", 0).unwrap());
    let leader = &partitions[0];
    assert_eq!(
        leader
            .read(0, 1000, &mut Vec::new())
            .unwrap()
            .high_watermark,
        0
    );
    let mut expected = Vec::new();
    for i in 0..200 {
        let mut records = BatchBuilder::new(20_000);
        let value = format!("{i}-{}", "x".repeat(2000));
        assert!(records.append(1000 + i, None, Some(value.as_bytes()), &[]));
        expected.push(value);
        let append = leader.append(&mut records, Acks::Replicated).unwrap();
        assert_eq!(append.wait(), Ok(i));
        // The newest record is in memory, and what is committed can be read at once.
        let mut bytes = Vec::new();
        let offsets = leader.read(i, 1, &mut bytes).unwrap();
        assert_eq!(
            (offsets.high_watermark, values(&bytes, i).len()),
            (i + 1, 1)
        );
    }
    for partition in &partitions {
        eventually("the watermark", || {
            partition.offsets().unwrap().high_watermark == 200
        });
        let mut bytes = Vec::new();
        let mut got = Vec::new();
        eventually("reading", || {
            let before = bytes.len();
            let next = got.len() as i64;
            if next < 200 {
                partition.read(next, 10_000, &mut bytes).unwrap();
                let news = values(&bytes[before..], next);
                // Four batches fit; the first one comes in any case.
                assert!(news.len() <= 4, "{}", news.len());
                got.extend(news);
            }
            got.len() == 200
        });
        assert!(got == expected);
        assert_eq!(partition.offset_of_timestamp(0).unwrap(), Some((0, 1000)));
        assert_eq!(
            partition.offset_of_timestamp(1050).unwrap(),
            Some((50, 1050))
        );
        assert_eq!(partition.offset_of_timestamp(1200).unwrap(), None);
        eventually("the newest by its time", || {
            partition.offset_of_timestamp(1199).unwrap() == Some((199, 1199))
        });
        let error = partition.read(201, 1, &mut Vec::new()).unwrap_err();
        assert!(
            matches!(error, ReadError::OffsetOutOfRange { latest: 200, .. }),
            "{error:?}"
        );
    }
}

/// Reserves, patiently: an image may have to be made first.
fn reserve(partition: &Partition, len: usize) -> Reservation {
    let reserved = partition.reserve(len, Acks::Replicated);
    reserved.unwrap().wait().unwrap()
}

#[test]
fn what_is_reserved_is_filled_in_place() {
    let cluster = TestCluster::start(2, SMALL);
    let partition = cluster.node(1).partition("t", 0).unwrap();
    let append = |name| {
        partition
            .append(batch(name, 1, 0), Acks::Replicated)
            .unwrap()
    };
    assert_eq!(append("a").wait(), Ok(0));
    // Records, one by one; what is appended meanwhile comes behind them.
    let mut room = reserve(&partition, 30_000);
    assert_eq!(room.base_offset(), 1);
    let mut behind = append("c");
    for value in ["b0", "b1"] {
        assert!(room.append(9, None, Some(value.as_bytes()), &[(b"h", None)]));
    }
    assert!(
        !room.append(9, None, Some(&[0; 30_000]), &[]),
        "there is no room for it"
    );
    assert_eq!(behind.try_result(), None);
    assert_eq!(partition.offsets().unwrap().log_end_offset, 1);
    assert_eq!(room.commit().unwrap().wait(), Ok(1));
    assert_eq!(behind.wait(), Ok(3));
    // A batch that is encoded, in pieces of any size.
    let encoded = batch("d", 2, 5000);
    let mut room = reserve(&partition, encoded.len());
    for piece in encoded.chunks(37) {
        room.write_all(piece).unwrap();
    }
    assert_eq!(room.write(b"more").unwrap(), 0, "there is no room for it");
    assert_eq!(block_on(room.commit().unwrap()), Ok(4));
    // Many more, so that it rolls.
    for i in 0..30 {
        let mut room = reserve(&partition, 20_100);
        assert!(room.append(9, None, Some(&vec![b'e'; 20_000]), &[]));
        assert_eq!(room.commit().unwrap().wait(), Ok(6 + i));
    }
    for node in [1, 2] {
        let mut consumer = cluster.consumer("t", StartOffset::Earliest, Some(node));
        let got = consume(&mut consumer, 36);
        let names = got
            .iter()
            .map(|(_, _, value)| String::from_utf8_lossy(&value[..2]));
        let mut names: Vec<_> = names.collect();
        names.dedup();
        assert_eq!(names, ["a-", "b0", "b1", "c-", "d-", "ee"]);
    }
    eventually("draining", || {
        let ours = cluster.log_bytes(1, "t", 0);
        ours.len() > 600_000 && ours == cluster.log_bytes(2, "t", 0)
    });
}

/// A reservation that comes to nothing delays what is behind it, and leaves no trace in the log.
#[test]
fn what_is_reserved_may_come_to_nothing() {
    let cluster = TestCluster::start(2, SMALL);
    let partition = cluster.node(1).partition("t", 0).unwrap();
    let mut next = 0;
    let mut append = || {
        let append = partition.append(batch("x", 1, 1000), Acks::Replicated);
        assert_eq!(append.unwrap().wait(), Ok(next));
        next += 1;
    };
    append();
    // Not a byte was written: it costs nothing.
    let newest_image = || {
        let files = std::fs::read_dir(cluster.shm_dir(1)).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".image")).max().unwrap()
    };
    let before = newest_image();
    drop(reserve(&partition, 1000));
    drop(partition.reserve(1000, Acks::Replicated).unwrap());
    append();
    assert_eq!(newest_image(), before);
    // Dropped, refused and forgotten: the log goes on in another image.
    let due = batch("evil", 1, 1000);
    for _ in 0..3 {
        let before = newest_image();
        let mut room = reserve(&partition, 2000);
        room.write_all(&due).unwrap();
        drop(room);
        append();
        assert!(newest_image() > before);
        let before = newest_image();
        let mut room = reserve(&partition, 2000);
        room.write_all(&due[..due.len() - 1]).unwrap();
        let error = room.commit().unwrap_err();
        assert!(matches!(error, AppendError::Invalid(_)), "{error:?}");
        append();
        assert!(newest_image() > before);
    }
    let mut room = reserve(&partition, 2000);
    room.write_all(&due).unwrap();
    let begun = Instant::now();
    std::mem::forget(room);
    append();
    assert!(
        begun.elapsed() >= RESERVATION_TIME / 2,
        "{:?}",
        begun.elapsed()
    );
    // It came too late, and goes on writing: nobody reads that.
    let mut late = reserve(&partition, 2000);
    append();
    late.write_all(&due).unwrap();
    append();
    let error = late.commit().unwrap().wait().unwrap_err();
    assert_eq!(error, AppendError::Expired);
    append();
    for node in [1, 2] {
        let mut consumer = cluster.consumer("t", StartOffset::Earliest, Some(node));
        let got = consume(&mut consumer, 12);
        assert!(got.iter().all(|(_, _, value)| value.starts_with(b"x-0-")));
    }
    eventually("draining", || {
        let ours = cluster.log_bytes(1, "t", 0);
        values(&ours, 0).len() == 12 && ours == cluster.log_bytes(2, "t", 0)
    });
}

/// Nodes with a coordinator that knows elections.
struct Elected {
    cluster: TestCluster,
    registry: Arc<Registry>,
}

impl Elected {
    fn start(topics: &str) -> Self {
        let mut elected = Self {
            cluster: TestCluster::prepare(3, topics),
            registry: Arc::default(),
        };
        (1..=3).for_each(|node| elected.start_node(node));
        elected.cluster.wait_in_sync();
        elected
    }

    fn start_node(&mut self, node: u32) {
        let config = NodeConfig {
            coordinator: self.registry.coordinator(),
            ..self.cluster.config(node)
        };
        self.cluster.nodes[node as usize - 1] = Some(Node::start(config).unwrap());
    }

    fn take(&mut self, node: u32) -> Node {
        self.cluster.nodes[node as usize - 1].take().unwrap()
    }

    fn partition(&self, node: u32) -> Partition {
        self.cluster.node(node).partition("t", 0).unwrap()
    }

    fn leader(&self, among: &[u32]) -> u32 {
        let mut found = None;
        eventually("an election", || {
            let mut leading = among
                .iter()
                .filter(|&&node| self.partition(node).view().is_leader);
            found = leading.next().copied();
            found.is_some()
        });
        found.unwrap()
    }
}

const THREE: &str = "[[topics]]\nname = \"t\"\npartitions = 1\nreplicas = [1, 2, 3]\nmin_isr = 2\n";

/// Whatever was acknowledged before and during an orderly end is there after it, and nothing is of unknown
/// outcome.
#[test]
fn a_shutdown_hands_over_and_loses_nothing() {
    let mut elected = Elected::start(THREE);
    let first = elected.leader(&[1, 2, 3]);
    let partition = elected.partition(first);
    let epoch = partition.view().leader_epoch;
    let appending = thread::spawn(move || {
        let mut acknowledged = Vec::new();
        let mut pending = Vec::new();
        for i in 0.. {
            match partition.append(batch(&i.to_string(), 1, 0), Acks::Replicated) {
                Ok(append) => pending.push((format!("{i}-0-"), append)),
                Err(error) => {
                    assert!(matches!(error, AppendError::Stopped(_)), "{error:?}");
                    break;
                }
            }
        }
        let mut is_over = false;
        for (value, append) in pending {
            match append.wait() {
                Ok(offset) => {
                    assert!(!is_over, "refused ones come last");
                    acknowledged.push((offset, value));
                }
                Err(error) => {
                    assert!(error.is_retriable(), "{error:?}");
                    is_over = true;
                }
            }
        }
        acknowledged
    });
    let partition = elected.partition(first);
    eventually("appending", || {
        partition.offsets().unwrap().high_watermark > 100
    });
    let begun = Instant::now();
    elected.take(first).shutdown(PATIENCE).unwrap();
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    let rest: Vec<u32> = (1..=3).filter(|&node| node != first).collect();
    let second = elected.leader(&rest);
    let acknowledged = appending.join().unwrap();
    assert!(!acknowledged.is_empty());
    let partition = elected.partition(second);
    assert!(partition.view().leader_epoch > epoch);
    let mut bytes = Vec::new();
    // It knows how far the log is committed once its follower has answered.
    let end = acknowledged.len() as i64;
    eventually("the watermark", || {
        partition.offsets().unwrap().high_watermark >= end
    });
    assert_eq!(partition.offsets().unwrap().log_end_offset, end);
    partition.read(0, usize::MAX, &mut bytes).unwrap();
    let found = (0..).zip(values(&bytes, 0));
    assert!(found.eq(acknowledged));
    // It takes appends, and the one that went comes back as a follower.
    elected.start_node(first);
    let appended = elected
        .cluster
        .node(second)
        .append("t", 0, batch("z", 1, 0), Acks::Replicated);
    assert_eq!(appended, Ok(end));
    elected.cluster.wait_in_sync();
}

/// A leader that has lost its followers takes appends with a small `acks`, and cannot say what becomes of
/// those that wait when it ends.
#[test]
fn what_cannot_be_known_is_called_unknown() {
    let mut cluster = TestCluster::start(2, ONE);
    let partition = cluster.node(1).partition("t", 0).unwrap();
    cluster.stop_node(2);
    let mut appends: Vec<_> = (0..3)
        .map(|_| {
            partition
                .append(batch("x", 1, 0), Acks::Replicated)
                .unwrap()
        })
        .collect();
    // A future that nobody will hear, and one that was never polled.
    drop(appends.pop());
    let task = Waker::noop();
    let mut polled = pin!(appends.pop().unwrap());
    let poll = polled.as_mut().poll(&mut Context::from_waker(task));
    assert!(poll.is_pending());
    eventually("appending", || {
        partition.offsets().unwrap().log_end_offset == 3
    });
    let node = cluster.nodes[0].take().unwrap();
    let begun = Instant::now();
    node.shutdown(Duration::from_millis(300)).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    let error = appends.pop().unwrap().wait().unwrap_err();
    assert!(matches!(error, AppendError::OutcomeUnknown(_)), "{error:?}");
    let Poll::Ready(Err(error)) = polled.as_mut().poll(&mut Context::from_waker(task)) else {
        panic!("it is resolved");
    };
    assert!(matches!(error, AppendError::OutcomeUnknown(_)) && !error.is_retriable());
}

#[test]
fn changes_tell_what_is() {
    let mut elected = Elected::start(THREE);
    let first = elected.leader(&[1, 2, 3]);
    let watching = (1..=3).find(|&node| node != first).unwrap();
    let mut changes = elected.cluster.node(watching).changes();
    let until = |changes: &mut replicator::runtime::Changes,
                 is_wanted: &dyn Fn(&Change) -> bool| {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PATIENCE);
            match changes.next_timeout(Duration::from_secs(1)) {
                Some(change) if is_wanted(&change) => return change,
                _ => {}
            }
        }
    };
    // It begins with what is, once.
    let change = block_on(changes.next()).unwrap();
    assert_eq!(
        (change.partition.topic(), change.partition.number()),
        ("t", 0)
    );
    assert_eq!(change.view.leader, Some(first));
    assert_eq!(change.view.isr.len(), 3);
    let epoch = change.view.leader_epoch;
    assert_eq!(change.view.storage, StorageStatus::Works);
    assert!(changes.try_next().is_none());
    assert!(changes.next_timeout(Duration::from_millis(1)).is_none());
    let node = elected.take(first);
    let mut of_first = node.changes();
    node.shutdown(PATIENCE).unwrap();
    // Of the node that has gone: it leads no more, and then it tells no more.
    let mut last = None;
    while let Some(change) = block_on(of_first.next()) {
        last = Some(change.view);
    }
    assert!(last.is_some_and(|view| !view.is_leader));
    // In one or several changes: whoever asks late sees the last of them only.
    until(&mut changes, &|change| {
        let view = &change.view;
        let is_led = view.leader.is_some_and(|leader| leader != first);
        is_led && view.leader_epoch > epoch && view.isr.len() == 2
    });
    elected.start_node(first);
    until(&mut changes, &|change| change.view.isr.len() == 3);
}

#[test]
fn a_coordinator_that_does_not_start_is_an_error() {
    use replicator::coordinator::{CoordinatorConfig, CoordinatorError};
    let cluster = TestCluster::prepare(1, "");
    let config = NodeConfig {
        coordinator: CoordinatorConfig::own(|registration, _| {
            assert_eq!(registration.member.node, 1);
            Err(CoordinatorError::Own("the quorum is away".to_owned()))
        }),
        ..cluster.config(1)
    };
    let error = Node::start(config).unwrap_err();
    assert!(error.to_string().contains("the quorum is away"), "{error}");
}
