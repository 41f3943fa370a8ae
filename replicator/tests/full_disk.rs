//! A node whose segment files reach a limit: a state to be seen, nothing lost, and on when there is room.
//!
//! Alone in its process: the limit is the process's.

mod common;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{NodeExt, TestCluster, batch, consume, eventually};
use replicator::consumer::StartOffset;
use replicator::control::Acks;
use replicator::runtime::StorageStatus;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const TOPIC: &str =
    "[[topics]]\nname = 't'\npartitions = 1\nreplicas = [1, 2]\nimage_size = 65536\n";

#[test]
fn without_room_the_node_says_so_and_goes_on_later() {
    // Handled, so that a write fails where it would kill.
    signal_hook::flag::register(
        signal_hook::consts::SIGXFSZ,
        Arc::new(AtomicBool::new(false)),
    )
    .unwrap();
    let cluster = TestCluster::start(2, TOPIC);
    let limits = getrlimit(Resource::Fsize);
    let limited = Rlimit {
        current: Some(200_000),
        ..limits
    };
    setrlimit(Resource::Fsize, limited).unwrap();
    let submit = |acks| cluster.node(1).submit("t", 0, batch("x", 1, 20_000), acks);
    // Images take 64 KiB each, so what does not fit the file stays in memory.
    let pending: Vec<_> = (0..12).map(|_| submit(Acks::Replicated).unwrap()).collect();
    let partition = |node| cluster.status(node).partitions[0].clone();
    for node in [2, 1] {
        let view = || cluster.node(node).partition("t", 0).unwrap().view();
        eventually("a full disk", || {
            partition(node).storage == StorageStatus::Full && view().storage == StorageStatus::Full
        });
    }
    let status = partition(1);
    let fault = status.fault.clone().unwrap_or_default();
    assert!(
        fault.contains("no room") && fault.contains("ulimit"),
        "{fault}"
    );
    assert!(status.drained_offset < 12 && status.durable_offset <= status.drained_offset);
    let error = submit(Acks::Durable)
        .unwrap()
        .wait()
        .unwrap_err()
        .to_string();
    assert!(error.contains("no room"), "{error}");

    setrlimit(Resource::Fsize, limits).unwrap();
    for (number, pending) in (0..).zip(pending) {
        assert_eq!(pending.wait().unwrap(), number);
    }
    for node in [1, 2] {
        eventually("draining", || partition(node).drained_offset == 12);
        assert_eq!(partition(node).storage, StorageStatus::Works);
        let view = || cluster.node(node).partition("t", 0).unwrap().view();
        eventually("news", || view().storage == StorageStatus::Works);
        assert_eq!(partition(node).fault, None);
    }
    assert_eq!(submit(Acks::Durable).unwrap().wait().unwrap(), 12);
    let mut consumer = cluster.consumer("t", StartOffset::Earliest, None);
    assert_eq!(consume(&mut consumer, 13).len(), 13);
}
