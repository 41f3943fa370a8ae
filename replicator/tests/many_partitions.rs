//! A thousand partitions on one pair of nodes, which have one lane in each direction.

mod common;

use std::collections::BTreeMap;

use common::{NodeExt, TestCluster, batch, consume};
use replicator::consumer::StartOffset;
use replicator::control::Acks;

const PARTITIONS: u32 = 1000;
const TOPIC: &str = "
[[topics]]
name = 'many'
partitions = 1000
replicas = [1, 2]
image_size = 65_536
segment_size = 1_048_576
";

/// Appends one record to every partition; all are on their way at once.
fn append_to_all(cluster: &TestCluster, round: u32) {
    let submit = |partition| {
        let batch = batch(&format!("{partition}/{round}"), 1, 100);
        cluster
            .node(1)
            .submit("many", partition, batch, Acks::Replicated)
            .unwrap()
    };
    let pending: Vec<_> = (0..PARTITIONS).map(submit).collect();
    for append in pending {
        assert_eq!(append.wait().unwrap(), i64::from(round));
    }
}

/// Every partition has the records of so many rounds, in order.
fn check(cluster: &TestCluster, rounds: u32, replica: Option<u32>) {
    let mut consumer = cluster.consumer("many", StartOffset::Earliest, replica);
    let mut found: BTreeMap<u32, u32> = BTreeMap::new();
    for (partition, offset, value) in consume(&mut consumer, (PARTITIONS * rounds) as usize) {
        let round = found.entry(partition).or_default();
        assert_eq!(offset, i64::from(*round));
        assert!(value.starts_with(format!("{partition}/{round}-").as_bytes()));
        *round += 1;
    }
    assert_eq!(found.len(), PARTITIONS as usize);
    assert!(found.values().all(|&count| count == rounds));
}

#[test]
fn a_thousand_partitions_keep_what_is_appended() {
    let mut cluster = TestCluster::start(2, TOPIC);
    for round in 0..3 {
        append_to_all(&cluster, round);
    }
    check(&cluster, 3, None);
    check(&cluster, 3, Some(2));

    cluster.stop_node(1);
    cluster.stop_node(2);
    for partition in [0, 499, 999] {
        let logs = [1, 2].map(|node| cluster.log_bytes(node, "many", partition));
        assert!(!logs[0].is_empty() && logs[0] == logs[1]);
    }

    cluster.start_node(2);
    cluster.start_node(1);
    cluster.wait_in_sync();
    append_to_all(&cluster, 3);
    check(&cluster, 4, None);
}
