//! Files and memory of a node: durability, retention, the limit for images, what a start refuses.

mod common;

use std::fs;
use std::process::Command;

use common::{NodeExt, PATIENCE, TestCluster, batch, consume, eventually};
use replicator::consumer::StartOffset;
use replicator::control::Acks;
use replicator::runtime::{
    ConsumerError, Node, NodeError, NodeStatus, PartitionStatus, StorageStatus,
};
use replicator::segment::{SegmentOptions, truncate};

fn of(status: &NodeStatus) -> &PartitionStatus {
    &status.partitions[0]
}

#[test]
fn a_durable_append_is_on_every_device_when_it_is_answered() {
    for nodes in [1, 2] {
        let replicas: Vec<_> = (1..=nodes).collect();
        let topic = format!("[[topics]]\nname = 't'\npartitions = 1\nreplicas = {replicas:?}\n");
        let cluster = TestCluster::start(nodes, &topic);
        let append = |acks| cluster.node(1).append("t", 0, batch("x", 1, 10), acks);
        append(Acks::Replicated).unwrap();
        for number in 1..20 {
            assert_eq!(append(Acks::Durable).unwrap(), number);
            for node in 1..=nodes {
                assert!(of(&cluster.status(node)).durable_offset > number);
            }
        }
        // Nobody has asked for more.
        append(Acks::Replicated).unwrap();
        for node in 1..=nodes {
            eventually("draining", || {
                of(&cluster.status(node)).drained_offset == 21
            });
            assert_eq!(of(&cluster.status(node)).durable_offset, 20);
            assert_eq!(of(&cluster.status(node)).storage, StorageStatus::Works);
        }
    }
}

#[test]
fn leader_and_follower_sync_as_the_policy_says() {
    for flush in ["'each'", "{ interval_ms = 50 }", "{ bytes = 1 }"] {
        let topic =
            format!("[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1, 2]\nflush = {flush}\n");
        let cluster = TestCluster::start(2, &topic);
        let append = || {
            let batch = batch("x", 1, 10);
            cluster.node(1).append("t", 0, batch, Acks::Replicated)
        };
        append().unwrap();
        for node in [1, 2] {
            eventually("a sync", || of(&cluster.status(node)).durable_offset == 1);
        }
    }
}

/// Segments of two images of 64 KiB.
const RETENTION: &str = "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1, 2]\n\
     image_size = 65536\nsegment_size = 131072\nretention_bytes = 300000\n";

#[test]
fn retention_moves_the_log_start_on_every_replica_and_consumers_hear_of_it() {
    let mut cluster = TestCluster::start(2, RETENTION);
    let node = cluster.node(1);
    node.append("t", 0, batch("x", 1, 10), Acks::Replicated)
        .unwrap();
    let mut early = cluster.consumer("t", StartOffset::Offset(0), None);
    for _ in 0..100 {
        node.append("t", 0, batch("x", 10, 1000), Acks::Replicated)
            .unwrap();
    }
    let starts =
        |cluster: &TestCluster| [1, 2].map(|node| of(&cluster.status(node)).log_start_offset);
    eventually("retention", || {
        let [leader, follower] = starts(&cluster);
        leader > 500 && leader == follower
    });
    let [start, _] = starts(&cluster);
    for node in [1, 2] {
        let data_dir = cluster.data_dir(node);
        eventually("a checkpoint", || {
            let text = fs::read_to_string(data_dir.join("log-start-offset-checkpoint")).unwrap();
            text == format!("0\n1\nt 0 {start}\n")
        });
        let first = data_dir.join(format!("t-0/{start:020}.log"));
        assert!(first.exists());
        // The checkpoint comes first.
        eventually("removal", || {
            let bytes = cluster.log_bytes(node, "t", 0).len();
            (300_000..300_000 + 2 * 131_072).contains(&bytes)
        });
    }

    // One that had begun is told, and so is one that begins.
    let error = early.poll(PATIENCE).unwrap_err();
    let latest = 1001;
    match error {
        ConsumerError::OffsetOutOfRange {
            offset: 0,
            earliest,
            latest: 1001,
            ..
        } => assert_eq!(earliest, start),
        other => panic!("{other}"),
    }
    let from_start = |cluster: &TestCluster, replica| {
        let mut consumer = cluster.consumer("t", StartOffset::Earliest, Some(replica));
        let count = usize::try_from(latest - start).unwrap();
        consume(&mut consumer, count)[0].1
    };
    assert_eq!([1, 2].map(|node| from_start(&cluster, node)), [start; 2]);

    // It does not come back.
    for node in [2, 1] {
        cluster.stop_node(node);
    }
    for node in [1, 2] {
        cluster.start_node(node);
    }
    assert_eq!(starts(&cluster), [start; 2]);
}

/// Thousands of rolls: memory stays within its limit, nothing leaks, and what was evicted is loaded again.
#[test]
fn images_stay_within_the_nodes_limit() {
    const LIMIT: u64 = 6 * 65536;
    const APPENDS: i64 = 3000;
    let topics = "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1, 2]\nimage_size = 65536\n\
                  segment_size = 1048576\nretention_bytes = 10000000\n";
    let mut cluster = TestCluster::prepare_with(2, &format!("memory = {LIMIT}"), topics);
    cluster.start_node(1);
    cluster.start_node(2);
    cluster.wait_in_sync();
    let resident = || {
        let text = fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    };
    let mut resident_early = 0;
    // Two batches do not fit an image, so each append rolls.
    for number in 0..APPENDS {
        let batch = batch("x", 1, 32_000);
        let offset = cluster.node(1).append("t", 0, batch, Acks::Replicated);
        assert_eq!(offset.unwrap(), number);
        if number % 100 == 0 {
            for node in [1, 2] {
                let status = cluster.status(node);
                assert!(status.images_len <= LIMIT, "{status:?}");
                // Each is registered for the lane and for consumers.
                assert!(status.registered_len <= 2 * LIMIT, "{status:?}");
                let files = fs::read_dir(cluster.shm_dir(node)).unwrap().count();
                assert!(files <= 6 + 4, "{files} files");
            }
        }
        if number == 500 {
            resident_early = resident();
        }
    }
    let grown = resident().saturating_sub(resident_early);
    assert!(grown < 64 << 20, "{grown} bytes more are resident");
    // Retention follows the files.
    eventually("draining", || {
        of(&cluster.status(1)).drained_offset == APPENDS
    });
    // The grace period over, only what is in use is left.
    eventually("eviction", || cluster.status(1).images_len <= 3 * 65536);
    // From then on the start stays where it is.
    eventually("retention", || {
        let is_drained = of(&cluster.status(1)).drained_offset == APPENDS;
        is_drained && cluster.log_bytes(1, "t", 0).len() < 10_000_000 + 1_048_576
    });
    let start = of(&cluster.status(1)).log_start_offset;
    let mut consumer = cluster.consumer("t", StartOffset::Offset(start + 5), None);
    let records = consume(&mut consumer, 20);
    assert!(records.iter().any(|(_, offset, _)| *offset == start + 10));
    drop(consumer);
    eventually("the consumer's images go", || {
        cluster.status(1).images_len <= 3 * 65536
    });
}

fn refused(cluster: &TestCluster) -> String {
    match Node::start(cluster.config(1)) {
        Err(NodeError::Segment(error)) => error.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the node starts"),
    }
}

/// Runs the command that an error message names; returns its exit status and all that it printed.
fn recover(command: &str) -> (Option<i32>, String) {
    let mut words = command.split(' ');
    assert_eq!(words.next(), Some("farlog"));
    let mut farlog = Command::new(env!("CARGO_BIN_EXE_farlog"));
    let output = farlog.args(words).output().unwrap();
    let all = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(all).unwrap())
}

#[test]
fn a_log_that_contradicts_its_checkpoints_is_refused_until_it_is_repaired() {
    let topic = "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1]\n";
    let checkpoints = [
        ("replication-offset-checkpoint", "0\n1\nt 0 9\n", "up to 9"),
        ("t-0/leader-epoch-checkpoint", "0\n2\n1 0\n5 9\n", "epoch 5"),
    ];
    for (file, text, evidence) in checkpoints {
        let mut cluster = TestCluster::start(1, topic);
        let append = |cluster: &TestCluster| {
            let batch = batch("x", 3, 10);
            cluster.node(1).append("t", 0, batch, Acks::Replicated)
        };
        append(&cluster).unwrap();
        cluster.stop_node(1);
        let data_dir = cluster.data_dir(1);
        fs::write(data_dir.join(file), text).unwrap();
        let message = refused(&cluster);
        let command = format!(
            "farlog recover --data-dir {} --topic t --partition 0",
            data_dir.display()
        );
        assert!(
            message.contains("ends at offset 3") && message.contains(evidence),
            "{message}"
        );
        assert!(message.contains(&command), "{message}");
        assert_eq!(fs::read_to_string(data_dir.join(file)).unwrap(), text);

        let (code, text) = recover(&command);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("--yes"), "{text}");
        refused(&cluster);
        let (code, text) = recover(&format!("{command} --yes"));
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("end at offset 3"), "{text}");
        cluster.start_node(1);
        cluster.wait_in_sync();
        assert_eq!(append(&cluster).unwrap(), 3);
        // It was accepted once.
        cluster.stop_node(1);
        fs::write(
            data_dir.join("replication-offset-checkpoint"),
            "0\n1\nt 0 90\n",
        )
        .unwrap();
        refused(&cluster);
    }
}

/// The leader comes back with less than its follower has: the follower's files are cut to what the logs have
/// in common, its epochs too, and it goes on from there.
#[test]
fn a_follower_that_is_ahead_is_cut() {
    let topic = "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1, 2]\nimage_size = 65536\n\
                 segment_size = 131072\n";
    let mut cluster = TestCluster::start(2, topic);
    let append = |cluster: &TestCluster, prefix| {
        let batch = batch(prefix, 10, 1000);
        cluster.node(1).append("t", 0, batch, Acks::Durable)
    };
    for _ in 0..40 {
        append(&cluster, "old").unwrap();
    }
    cluster.stop_node(2);
    cluster.stop_node(1);
    let data_dir = cluster.data_dir(1);
    let dir = data_dir.join("t-0");
    let left = truncate(&dir, 0, 130, &SegmentOptions::default()).unwrap();
    assert_eq!(left.log_end_offset, 130);
    let checkpoint = data_dir.join("replication-offset-checkpoint");
    fs::write(checkpoint, "0\n1\nt 0 130\n").unwrap();
    cluster.start_node(1);
    cluster.start_node(2);
    cluster.wait_in_sync();
    assert_eq!(append(&cluster, "new").unwrap(), 130);
    append(&cluster, "new").unwrap();
    for node in [1, 2] {
        eventually("draining", || {
            of(&cluster.status(node)).drained_offset == 150
        });
        assert_eq!(of(&cluster.status(node)).fault, None);
    }
    assert!(cluster.log_bytes(1, "t", 0) == cluster.log_bytes(2, "t", 0));
    let epochs = |node| {
        let dir = cluster.data_dir(node).join("t-0");
        fs::read_to_string(dir.join("leader-epoch-checkpoint")).unwrap()
    };
    assert_eq!(epochs(1), "0\n2\n1 0\n2 130\n");
    assert_eq!(epochs(2), epochs(1));
    let mut consumer = cluster.consumer("t", StartOffset::Earliest, Some(2));
    let records = consume(&mut consumer, 150);
    let is_new =
        |(_, offset, value): &(u32, i64, Vec<u8>)| value.starts_with(b"new") == (*offset >= 130);
    assert!(records.iter().all(is_new));
}

/// After a loss of the memory the files may be behind the checkpoint: that is a loss, and no contradiction.
#[test]
fn a_node_that_lost_its_memory_starts_with_what_its_files_have() {
    let topic = "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1]\n";
    let mut cluster = TestCluster::start(1, topic);
    let batch = batch("x", 3, 10);
    cluster
        .node(1)
        .append("t", 0, batch, Acks::Replicated)
        .unwrap();
    cluster.stop_node(1);
    let checkpoint = cluster.data_dir(1).join("replication-offset-checkpoint");
    fs::write(checkpoint, "0\n1\nt 0 9\n").unwrap();
    fs::remove_dir_all(cluster.shm_dir(1)).unwrap();
    cluster.start_node(1);
    let status = cluster.status(1);
    assert!(status.is_memory_lost);
    assert_eq!(
        (of(&status).high_watermark, of(&status).log_end_offset),
        (3, 3)
    );
}
