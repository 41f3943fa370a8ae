//! Nodes, producers and consumers together, over the software device.

mod common;

use common::{TestCluster, batch, consume, eventually};
use replicator::consumer::StartOffset;
use replicator::control::Acks;

const ONE: &str = "[[topics]]\nname = \"t\"\npartitions = 1\nreplicas = [1, 2]\n";

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
