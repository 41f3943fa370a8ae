//! Nodes, producers and consumers together, over the software device.

mod common;

use std::collections::VecDeque;
use std::thread;
use std::time::Duration;

use common::{NodeExt, TestCluster, batch, consume, eventually};
use replicator::consumer::{Consumer, StartOffset};
use replicator::control::{Acks, ErrorCode};
use replicator::producer::{Producer, ProducerConfig, ProducerError};
use replicator::record::BatchView;
use replicator::runtime::{Node, NodeConfig, NodeError};
use transport::DeviceSelector;

/// A follower that is away stays in sync for as long as any test takes.
const ONE: &str =
    "[[topics]]\nname = \"t\"\npartitions = 1\nreplicas = [1, 2]\nlag_max_ms = 600_000\n";

#[test]
fn a_record_travels_from_leader_to_follower_to_consumer() {
    let cluster = TestCluster::start(2, ONE);
    let leader = cluster.node(1);
    assert_eq!(
        leader
            .append("t", 0, batch("a", 3, 0), Acks::Replicated)
            .unwrap(),
        0
    );
    assert_eq!(
        leader
            .append("t", 0, batch("b", 2, 0), Acks::Replicated)
            .unwrap(),
        3
    );
    for replica in [1, 2] {
        let mut consumer = cluster.consumer("t", StartOffset::Earliest, Some(replica));
        let got = consume(&mut consumer, 5);
        let values: Vec<_> = got
            .iter()
            .map(|(_, offset, value)| (*offset, String::from_utf8_lossy(value)))
            .collect();
        assert_eq!(
            values,
            [
                (0, "a-0-".into()),
                (1, "a-1-".into()),
                (2, "a-2-".into()),
                (3, "b-0-".into()),
                (4, "b-1-".into())
            ]
        );
    }
    eventually("draining", || {
        let ours = cluster.log_bytes(1, "t", 0);
        !ours.is_empty() && ours == cluster.log_bytes(2, "t", 0)
    });
}

/// A consumer that began while its leader was being replaced, or restarted, once failed at once.
#[test]
fn a_consumer_that_begins_before_its_leader_waits_for_it() {
    let mut cluster = TestCluster::prepare(
        1,
        "[[topics]]\nname = \"t\"\npartitions = 1\nreplicas = [1]\n",
    );
    let file = cluster.cluster.clone();
    let opened = thread::spawn(move || {
        let device = DeviceSelector::Soft(None);
        Consumer::open(&file, "t", &[], StartOffset::Latest, &device, None).map(drop)
    });
    thread::sleep(Duration::from_millis(300));
    cluster.start_node(1);
    opened.join().unwrap().unwrap();
}

/// Small images, so that everything rolls; four segments' worth of records.
const ROLLING: &str = "
[[topics]]
name = \"a\"
partitions = 3
replicas = [1, 2, 3]
min_isr = 3
lag_max_ms = 600_000
image_size = 65536
segment_size = 262144
[[topics]]
name = \"b\"
partitions = 2
partition_replicas = [[2, 1], [3, 2]]
image_size = 65536
segment_size = 131072
";

/// Appends `count` batches of 20 records to a partition, several at once; returns the values.
fn append_many(node: &Node, topic: &str, partition: u32, count: u32) -> Vec<Vec<u8>> {
    let mut pending = VecDeque::new();
    let mut values = Vec::new();
    for i in 0..count {
        let prefix = format!("{topic}-{partition}-{i}");
        let bytes = batch(&prefix, 20, 100);
        let (view, _) = BatchView::parse(&bytes).unwrap();
        values.extend(
            view.records()
                .unwrap()
                .map(|record| record.unwrap().value.unwrap().to_vec()),
        );
        pending.push_back(
            node.submit(topic, partition, bytes, Acks::Replicated)
                .unwrap(),
        );
        if pending.len() > 16 {
            pending.pop_front().unwrap().wait().unwrap();
        }
    }
    pending.into_iter().for_each(|pending| {
        pending.wait().unwrap();
    });
    values
}

/// The values of one partition, whose offsets must be 0, 1, 2, ...
fn of_partition(records: &[(u32, i64, Vec<u8>)], partition: u32) -> Vec<Vec<u8>> {
    let own = records.iter().filter(|(of, _, _)| *of == partition);
    let in_order = own.zip(0..).map(|((_, offset, value), expected)| {
        assert_eq!(*offset, expected);
        value.clone()
    });
    in_order.collect()
}

#[test]
fn topics_roll_over_images_and_segments_on_every_replica() {
    let cluster = TestCluster::start(3, ROLLING);
    let mut early = cluster.consumer("a", StartOffset::Earliest, Some(2));
    let mut expected = Vec::new();
    std::thread::scope(|scope| {
        let a: Vec<_> = (0..3)
            .map(|partition| scope.spawn(move_append(&cluster, 1, "a", partition)))
            .collect();
        let b = scope.spawn(move_append(&cluster, 2, "b", 0));
        let c = scope.spawn(move_append(&cluster, 3, "b", 1));
        // The early consumer reads along, from a follower.
        let got = consume(&mut early, 3 * 200 * 20);
        for (partition, handle) in (0..).zip(a) {
            let values = handle.join().unwrap();
            assert!(
                of_partition(&got, partition) == values,
                "partition {partition}"
            );
            expected.push(values);
        }
        expected.push(b.join().unwrap());
        expected.push(c.join().unwrap());
    });
    for replica in 1..=3 {
        let mut late = cluster.consumer("a", StartOffset::Earliest, Some(replica));
        let got = consume(&mut late, 3 * 200 * 20);
        for partition in 0..3 {
            assert!(of_partition(&got, partition) == expected[partition as usize]);
        }
    }
    let mut late = cluster.consumer("b", StartOffset::Earliest, None);
    let got = consume(&mut late, 2 * 200 * 20);
    assert!(of_partition(&got, 0) == expected[3] && of_partition(&got, 1) == expected[4]);
    eventually("draining", || {
        (0..3).all(|partition| {
            let ours = cluster.log_bytes(1, "a", partition);
            ours.len() > 400_000
                && ours == cluster.log_bytes(2, "a", partition)
                && ours == cluster.log_bytes(3, "a", partition)
        })
    });
    let status = cluster.status(1);
    assert!(
        status
            .partitions
            .iter()
            .all(|partition| partition.fault.is_none())
    );
    assert_eq!(status.commit_latency_us.unwrap().count, 600);
}

fn move_append<'a>(
    cluster: &'a TestCluster,
    node: u32,
    topic: &'a str,
    partition: u32,
) -> impl FnOnce() -> Vec<Vec<u8>> + Send + 'a {
    move || append_many(cluster.node(node), topic, partition, 200)
}

#[test]
fn consumers_start_where_they_are_told() {
    let cluster = TestCluster::start(2, ONE);
    append_many(cluster.node(1), "t", 0, 5);
    let mut latest = cluster.consumer("t", StartOffset::Latest, None);
    let mut middle = cluster.consumer("t", StartOffset::Offset(47), Some(2));
    assert!(latest.poll(Duration::from_millis(50)).unwrap().is_empty());
    assert_eq!(latest.position(0), Some(100));
    cluster
        .node(1)
        .append("t", 0, batch("new", 1, 0), Acks::Replicated)
        .unwrap();
    assert_eq!(consume(&mut latest, 1), [(0, 100, b"new-0-".to_vec())]);
    let got = consume(&mut middle, 61);
    assert_eq!(got[0].1, 40, "a batch comes whole");
    assert_eq!(got.last().unwrap().1, 100);
    let beyond = StartOffset::Offset(102);
    let device = DeviceSelector::Soft(None);
    let error = Consumer::open(&cluster.cluster, "t", &[], beyond, &device, None).unwrap_err();
    assert!(error.to_string().contains("0 to 101"), "{error}");
}

/// Stalled appends were taken in although 65,536 batches waited for a follower already, without end.
#[test]
fn uncommitted_batches_are_bounded() {
    let mut cluster = TestCluster::start(2, ONE);
    append_many(cluster.node(1), "t", 0, 1);
    cluster.stop_node(2);
    let bytes = batch("x", 1, 0);
    let submit = |_| {
        cluster
            .node(1)
            .submit("t", 0, bytes.clone(), Acks::Replicated)
    };
    let pending: Vec<_> = (0..65_536 + 100).map(submit).map(Result::unwrap).collect();
    let log_end_offset = |cluster: &TestCluster| cluster.status(1).partitions[0].log_end_offset;
    eventually("appending", || log_end_offset(&cluster) >= 20 + 65_536);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(log_end_offset(&cluster), 20 + 65_536);
    cluster.start_node(2);
    for pending in pending {
        pending.wait().unwrap();
    }
    assert_eq!(log_end_offset(&cluster), 20 + 65_536 + 100);
}

#[test]
fn a_follower_that_was_away_catches_up() {
    let rolling = ROLLING.split("[[topics]]\nname = \"b\"").next().unwrap();
    let mut cluster = TestCluster::start(3, rolling);
    let mut expected = append_many(cluster.node(1), "a", 0, 20);
    cluster.stop_node(3);
    let (values, pending) = {
        // Without node 3 nothing commits, and the leader has to let images go.
        let node = cluster.node(1);
        let mut values = Vec::new();
        for i in 0..100 {
            let bytes = batch(&format!("away-{i}"), 20, 100);
            let (view, _) = BatchView::parse(&bytes).unwrap();
            let records = view.records().unwrap();
            values.extend(records.map(|record| record.unwrap().value.unwrap().to_vec()));
            node.append("a", 0, bytes, Acks::Leader).unwrap();
        }
        let last = batch("last", 1, 0);
        (values, node.submit("a", 0, last, Acks::Replicated).unwrap())
    };
    expected.extend(values);
    expected.push(b"last-0-".to_vec());
    let status = cluster.status(1);
    let down = &status.partitions[0].followers[1];
    assert!(
        down.node == 3 && !down.is_streaming && down.last_error.is_some(),
        "{down:?}"
    );
    assert_eq!(status.partitions[0].high_watermark, 400);
    cluster.start_node(3);
    assert_eq!(pending.wait().unwrap(), 2400);
    let mut consumer = cluster.consumer("a", StartOffset::Earliest, Some(3));
    assert!(of_partition(&consume(&mut consumer, expected.len()), 0) == expected);
    eventually("draining", || {
        cluster.log_bytes(1, "a", 0) == cluster.log_bytes(3, "a", 0)
    });
}

#[test]
fn a_leader_that_restarts_continues_its_log() {
    let mut cluster = TestCluster::start(2, ONE);
    let mut consumer = cluster.consumer("t", StartOffset::Earliest, None);
    let mut expected = append_many(cluster.node(1), "t", 0, 10);
    assert_eq!(consume(&mut consumer, 200).len(), 200);
    cluster.stop_node(1);
    assert!(
        std::fs::read_dir(cluster.shm_dir(1))
            .unwrap()
            .all(|entry| { entry.unwrap().path().extension().is_none() }),
        "an orderly end leaves no image"
    );
    cluster.start_node(1);
    cluster.wait_in_sync();
    expected.extend(append_many(cluster.node(1), "t", 0, 10));
    assert_eq!(cluster.status(1).partitions[0].leader_epoch, 2);
    assert_eq!(
        consume(&mut consumer, 200)[0].1,
        200,
        "the consumer finds the leader again"
    );
    for replica in [1, 2] {
        let mut consumer = cluster.consumer("t", StartOffset::Earliest, Some(replica));
        assert!(of_partition(&consume(&mut consumer, 400), 0) == expected);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let mut cluster = TestCluster::start(2, ONE);
    let node = cluster.node(1);
    let error = node.append("t", 0, vec![1; 100], Acks::Leader).unwrap_err();
    assert!(
        error.to_string().contains("not a valid record batch"),
        "{error}"
    );
    let mut damaged = batch("x", 1, 0);
    damaged[62] ^= 1;
    assert!(node.append("t", 0, damaged, Acks::Leader).is_err());
    let error = node.partition("t", 7).unwrap_err();
    assert!(matches!(
        error,
        NodeError::UnknownPartition { partition: 7, .. }
    ));
    let error = cluster
        .node(2)
        .append("t", 0, batch("x", 1, 0), Acks::Leader)
        .unwrap_err();
    assert!(error.to_string().contains("follows"), "{error}");
    // A second process may use neither the directories nor the address.
    let error = Node::start(cluster.config(1)).unwrap_err();
    assert!(
        error.to_string().contains("in use by another process"),
        "{error}"
    );
    cluster.stop_node(2);
    let config = NodeConfig {
        shm_dir: cluster.shm_dir(9),
        ..cluster.config(2)
    };
    let node = Node::start(config).unwrap();
    assert!(node.status().unwrap().is_memory_lost);
    let device = DeviceSelector::Soft(None);
    let error = Consumer::open(
        &cluster.cluster,
        "u",
        &[],
        StartOffset::Latest,
        &device,
        None,
    );
    assert!(error.unwrap_err().to_string().contains("`u`"));
    let error = Consumer::open(
        &cluster.cluster,
        "t",
        &[0],
        StartOffset::Latest,
        &device,
        Some(5),
    );
    assert!(error.unwrap_err().to_string().contains("[1, 2]"));
}

#[test]
fn a_directory_that_cannot_be_is_named() {
    let cluster = TestCluster::prepare(2, ONE);
    let config = NodeConfig {
        shm_dir: "/proc/farlog".into(),
        ..cluster.config(1)
    };
    let error = Node::start(config).unwrap_err();
    assert!(error.to_string().contains("/proc/farlog"), "{error}");
}

/// A producer once waited for its own timeout, and only the node's log knew why.
#[test]
fn a_leader_without_memory_refuses_until_it_has_some() {
    const TOPIC: &str =
        "[[topics]]\nname = \"t\"\npartitions = 1\nreplicas = [1]\nimage_size = 65536\n";
    let cluster = TestCluster::start(1, TOPIC);
    let append = || {
        let mut producer =
            Producer::connect(&cluster.cluster, "t", ProducerConfig::default()).unwrap();
        producer.send(None, Some(&[b'x'; 5000]))?;
        producer.flush()
    };
    append().unwrap();
    // From here on no image can be made: where its file belongs there is no directory.
    let away = cluster.shm_dir(1).with_extension("away");
    std::fs::rename(cluster.shm_dir(1), &away).unwrap();
    let mut appended = 1;
    let mut refused = None;
    while refused.is_none() {
        match append() {
            Ok(()) => appended += 1,
            Err(error) => refused = Some(error),
        }
    }
    for error in refused.into_iter().chain(append().err()) {
        assert!(
            matches!(&error, ProducerError::Refused { code: ErrorCode::OUT_OF_RESOURCES, message, .. }
                if message.contains(".image")),
            "{error}"
        );
    }
    assert!(cluster.status(1).partitions[0].fault.is_some());
    std::fs::rename(&away, cluster.shm_dir(1)).unwrap();
    eventually("an append", || append().is_ok());
    assert!(cluster.status(1).partitions[0].fault.is_none());
    let mut consumer = cluster.consumer("t", StartOffset::Earliest, None);
    let got = consume(&mut consumer, appended + 1);
    assert_eq!(of_partition(&got, 0).len(), appended + 1);
}
