//! Which node leads which partition: asked of any node of the cluster.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::control::{
    Connection, ControlError, Hello, Message, MetadataRequest, PartitionMetadata, VERSION_FENCING,
};

/// How long a node may take to answer; there are others.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// How long it may take to take the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// The leaders of one topic's partitions, as far as they are known.
#[derive(Debug)]
pub(crate) struct Leaders {
    topic: String,
    /// Leader and epoch of each partition. An older epoch is never taken for a newer one.
    known: Vec<(Option<u32>, i32)>,
    /// Which node is asked next, as an index in the cluster file.
    next: usize,
}

impl Leaders {
    /// Begins with the preferred leaders, which are right unless something has happened.
    pub(crate) fn new(cluster: &Cluster, topic: &str) -> Self {
        let spec = cluster.topic(topic);
        let count = spec.map_or(0, |spec| spec.partition_count());
        let preferred = |partition| {
            (
                spec.and_then(|spec| spec.preferred_leader_of(partition)),
                -1,
            )
        };
        Self {
            topic: topic.to_owned(),
            known: (0..count).map(preferred).collect(),
            next: 0,
        }
    }

    /// The node that leads a partition, if one does.
    pub(crate) fn of(&self, partition: u32) -> Option<u32> {
        self.known.get(partition as usize)?.0
    }

    /// Asks one node, another one each time; says why nothing was learnt.
    pub(crate) fn refresh(&mut self, cluster: &Cluster) -> Result<(), ControlError> {
        let node = &cluster.nodes()[self.next % cluster.nodes().len()];
        self.next += 1;
        let hello = Hello::client(cluster.hash());
        let mut connection =
            Connection::connect_node_within(&node.address, node.id, &hello, CONNECT_TIMEOUT)?;
        if connection.version() < VERSION_FENCING {
            // Before that version the preferred leader is the only one there is.
            *self = Self {
                next: self.next,
                ..Self::new(cluster, &self.topic)
            };
            return Ok(());
        }
        connection.send(
            &MetadataRequest {
                correlation: 1,
                topic: self.topic.clone(),
            }
            .into(),
        )?;
        if let Some(Message::Metadata(metadata)) = connection.receive_timeout(ANSWER_TIMEOUT)? {
            metadata
                .partitions
                .iter()
                .for_each(|found| self.learn(found));
        }
        Ok(())
    }

    fn learn(&mut self, found: &PartitionMetadata) {
        let Some(known) = self.known.get_mut(found.partition as usize) else {
            return;
        };
        if found.leader_epoch >= known.1 {
            *known = (
                Some(found.leader).filter(|&node| node != 0),
                found.leader_epoch,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_newest_epoch_counts_whoever_tells_it() {
        let text = "[[nodes]]\nid=1\naddress='h:1'\n[[nodes]]\nid=2\naddress='h:2'\n[[topics]]\nname='t'\npartitions=1\n\
                    replicas=[1,2]";
        let cluster = Cluster::parse(text, Path::new("test")).unwrap();
        let mut leaders = Leaders::new(&cluster, "t");
        assert_eq!((leaders.of(0), leaders.of(1)), (Some(1), None));
        let mut learn = |leader, leader_epoch, then| {
            leaders.learn(&PartitionMetadata {
                partition: 0,
                leader,
                leader_epoch,
                isr: vec![],
                replicas: vec![1, 2],
            });
            assert_eq!(leaders.of(0), then);
        };
        learn(2, 5, Some(2));
        // A node that was cut off still believes in the old leader.
        learn(1, 4, Some(2));
        learn(0, 5, None);
        learn(1, 6, Some(1));
        // Nothing is known of a partition that the cluster file does not have.
        leaders.learn(&PartitionMetadata {
            partition: 7,
            leader: 1,
            leader_epoch: 9,
            isr: vec![],
            replicas: vec![],
        });
    }
}
