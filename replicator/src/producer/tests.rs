use std::path::Path;
use std::thread;

use super::*;
use crate::control::{Appended, Listener, Metadata, MetadataRequest, PartitionMetadata};
use crate::record::{BatchView, partitioner};

const WAIT: Duration = Duration::from_secs(5);

/// What the leader of the tests does with each batch.
type Answer = fn(&Append, base_offset: i64) -> Option<Message>;

fn accept_batch(append: &Append, base_offset: i64) -> Option<Message> {
    Some(
        Appended {
            correlation: append.correlation,
            base_offset,
            log_append_time: -1,
        }
        .into(),
    )
}

/// A cluster of one node that takes connections and answers as told, until its client leaves.
fn leader(answer: Answer) -> (Cluster, thread::JoinHandle<Vec<Append>>) {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let text = format!(
        "[[nodes]]\nid=1\naddress='{}'\n[[topics]]\nname='t'\npartitions=3\nreplicas=[1]\nimage_size=65536\nsegment_size=65536",
        listener.local_addr()
    );
    let cluster = Cluster::parse(&text, Path::new("test")).unwrap();
    let hello = Hello::node(1, [0; 16], 0, cluster.hash());
    let thread = thread::spawn(move || {
        let incoming = listener
            .accept_timeout(WAIT)
            .unwrap()
            .expect("the producer connects");
        let mut connection = incoming.handshake(&hello).unwrap();
        let mut appends: Vec<Append> = Vec::new();
        while let Ok(Some(Message::Append(append))) = connection.receive_timeout(WAIT) {
            let same = appends
                .iter()
                .filter(|earlier| earlier.partition == append.partition);
            let base_offset: i64 = same.map(record_count).sum();
            if let Some(message) = answer(&append, base_offset) {
                connection.send(&message).unwrap();
            }
            appends.push(append);
        }
        appends
    });
    (cluster, thread)
}

fn record_count(append: &Append) -> i64 {
    BatchView::parse(&append.batch)
        .unwrap()
        .0
        .records_count()
        .into()
}

fn values(appends: &[Append], partition: u32) -> Vec<Vec<u8>> {
    let mut values = Vec::new();
    for append in appends
        .iter()
        .filter(|append| append.partition == partition)
    {
        let (batch, rest) = BatchView::parse(&append.batch).unwrap();
        assert!(rest.is_empty());
        batch.verify_crc().unwrap();
        for record in batch.records().unwrap() {
            values.push(record.unwrap().value.unwrap().to_vec());
        }
    }
    values
}

#[test]
fn unkeyed_records_go_round_robin_and_keep_their_order() {
    let (cluster, leader) = leader(accept_batch);
    let config = ProducerConfig {
        batch_size: 200,
        ..ProducerConfig::default()
    };
    let mut producer = Producer::connect(&cluster, "t", config).unwrap();
    for i in 0..300u32 {
        assert_eq!(
            producer.send(None, Some(i.to_string().as_bytes())).unwrap(),
            i % 3
        );
    }
    producer.flush().unwrap();
    for partition in 0..3 {
        assert_eq!(producer.acknowledged(partition), Some(100));
    }
    drop(producer);
    let appends = leader.join().unwrap();
    assert!(appends.len() > 20, "{} batches", appends.len());
    for partition in 0..3 {
        let expected: Vec<_> = (0..300)
            .filter(|i| i % 3 == partition)
            .map(|i| i.to_string().into_bytes())
            .collect();
        assert_eq!(values(&appends, partition), expected);
    }
}

#[test]
fn keyed_records_follow_murmur2() {
    let (cluster, leader) = leader(accept_batch);
    let mut producer = Producer::connect(&cluster, "t", ProducerConfig::default()).unwrap();
    for key in ["N14228", "N24211", "N619AA", ""] {
        let expected = partitioner::partition_for_key(key.as_bytes(), 3);
        assert_eq!(
            producer.send(Some(key.as_bytes()), Some(b"v")).unwrap(),
            expected
        );
    }
    producer.flush().unwrap();
    drop(producer);
    assert_eq!(
        leader.join().unwrap().iter().map(record_count).sum::<i64>(),
        4
    );
}

#[test]
fn a_lone_record_is_sent_when_its_linger_is_over() {
    let (cluster, leader) = leader(accept_batch);
    let config = ProducerConfig {
        linger: Duration::from_millis(1),
        ..ProducerConfig::default()
    };
    let mut producer = Producer::connect(&cluster, "t", config).unwrap();
    producer.send(None, Some(b"one")).unwrap();
    let started = Instant::now();
    while producer.acknowledged(0).is_none() {
        assert!(started.elapsed() < WAIT);
        producer.poll().unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    drop(producer);
    assert_eq!(leader.join().unwrap().len(), 1);
}

#[test]
fn a_record_too_large_names_both_sizes_and_loses_nothing() {
    let (cluster, leader) = leader(accept_batch);
    let mut producer = Producer::connect(&cluster, "t", ProducerConfig::default()).unwrap();
    producer.send(None, Some(b"before")).unwrap();
    for _ in 0..3 {
        let error = producer
            .send(None, Some(&[b'x'; 40_000]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("40000") && error.contains("32768"),
            "{error}"
        );
    }
    producer.send(Some(b""), Some(b"after")).unwrap();
    producer.flush().unwrap();
    drop(producer);
    assert_eq!(
        leader.join().unwrap().iter().map(record_count).sum::<i64>(),
        2
    );
}

#[test]
fn at_most_so_many_batches_are_in_flight() {
    let (cluster, leader) = leader(|_, _| None);
    let config = ProducerConfig {
        batch_size: 1,
        in_flight_max: 4,
        request_timeout: Duration::from_millis(50),
        ..ProducerConfig::default()
    };
    let mut producer = Producer::connect(&cluster, "t", config).unwrap();
    for _ in 0..4 {
        producer.send(None, Some(b"v")).unwrap();
    }
    let error = producer.send(None, Some(b"v")).unwrap_err();
    assert!(
        matches!(error, ProducerError::Timeout { node: 1, .. }),
        "{error}"
    );
    drop(producer);
    assert_eq!(leader.join().unwrap().len(), 4);
}

#[test]
fn a_refused_batch_is_reported_with_its_partition() {
    let (cluster, leader) = leader(|append, _| {
        let code = ErrorCode::CORRUPT_BATCH;
        Some(
            ErrorReply {
                code,
                correlation: append.correlation,
                message: "torn".into(),
            }
            .into(),
        )
    });
    let mut producer = Producer::connect(&cluster, "t", ProducerConfig::default()).unwrap();
    producer.send(None, Some(b"v")).unwrap();
    let error = producer.flush().unwrap_err().to_string();
    assert_eq!(
        error,
        "node 1 refused a batch of partition 0: torn [corrupt batch (code 8)]"
    );
    drop(producer);
    leader.join().unwrap();
}

#[test]
fn a_leader_that_dies_ends_the_wait() {
    let (cluster, leader) = leader(|_, _| panic!("the leader dies on purpose"));
    let mut producer = Producer::connect(&cluster, "t", ProducerConfig::default()).unwrap();
    producer.send(None, Some(b"v")).unwrap();
    let error = producer.flush().unwrap_err();
    assert!(
        matches!(
            error,
            ProducerError::Unknown {
                node: 1,
                count: 1,
                source: ControlError::Closed { .. }
            }
        ),
        "{error}"
    );
    assert!(leader.join().is_err());
}

/// Two nodes that answer metadata requests and appends as told, each on its own thread, for ever.
fn pair(answers: [Answer; 2], leader: [u32; 2]) -> Cluster {
    let listeners = [(); 2].map(|()| Listener::bind("127.0.0.1:0").unwrap());
    let [one, two] = listeners.each_ref().map(Listener::local_addr);
    let text = format!(
        "[[nodes]]\nid=1\naddress='{one}'\n[[nodes]]\nid=2\naddress='{two}'\n[[topics]]\nname='t'\npartitions=1\n\
         replicas=[1,2]\nimage_size=65536\nsegment_size=65536"
    );
    let cluster = Cluster::parse(&text, Path::new("test")).unwrap();
    for (index, listener) in listeners.into_iter().enumerate() {
        let node = u32::try_from(index).unwrap() + 1;
        let hello = Hello::node(node, [0; 16], 0, cluster.hash());
        let (answer, leader) = (answers[index], leader[index]);
        thread::spawn(move || {
            loop {
                let Some(incoming) = listener.accept_timeout(WAIT).unwrap() else {
                    return;
                };
                let mut connection = incoming.handshake(&hello).unwrap();
                thread::spawn(move || {
                    while let Ok(Some(message)) = connection.receive_timeout(WAIT) {
                        let reply = match message {
                            Message::Append(append) => answer(&append, i64::from(node) * 100),
                            Message::MetadataRequest(request) => Some(metadata(&request, leader)),
                            other => panic!("{other:?}"),
                        };
                        match reply {
                            Some(reply) => connection.send(&reply).unwrap(),
                            // As a node that dies before it has answered.
                            None => return,
                        }
                    }
                });
            }
        });
    }
    cluster
}

fn metadata(request: &MetadataRequest, leader: u32) -> Message {
    Metadata {
        correlation: request.correlation,
        partitions: vec![PartitionMetadata {
            partition: 0,
            leader,
            leader_epoch: 5,
            isr: vec![1, 2],
            replicas: vec![1, 2],
        }],
    }
    .into()
}

fn refuse(append: &Append, _: i64) -> Option<Message> {
    Some(
        ErrorReply {
            code: ErrorCode::NOT_LEADER,
            correlation: append.correlation,
            message: "gone".into(),
        }
        .into(),
    )
}

/// A leader that had too few replicas for the first batch took those behind it: they came before it in the
/// log. Now it takes nothing behind a batch that it refused, and neither is anything sent there.
#[test]
fn batches_keep_their_order_when_one_is_not_taken() {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// As a node does: nothing is taken on the first connection, which begins with the first batch.
    fn refuse_first(append: &Append, node: i64) -> Option<Message> {
        static BEGUN: AtomicU32 = AtomicU32::new(0);
        static TAKEN: Mutex<Vec<u64>> = Mutex::new(Vec::new());
        if append.correlation == 1 {
            BEGUN.fetch_add(1, Ordering::Relaxed);
        }
        if BEGUN.load(Ordering::Relaxed) < 2 {
            return refuse(append, node);
        }
        let mut taken = TAKEN.lock().unwrap();
        taken.push(append.correlation);
        assert!(taken.is_sorted(), "{taken:?}");
        accept_batch(append, node)
    }
    let cluster = pair([refuse_first, accept_batch], [1, 1]);
    let config = ProducerConfig {
        batch_size: 1,
        in_flight_max: 4,
        ..ProducerConfig::default()
    };
    let mut producer = Producer::connect(&cluster, "t", config).unwrap();
    for _ in 0..20 {
        producer.send(None, Some(b"v")).unwrap();
    }
    producer.flush().unwrap();
    assert_eq!(producer.acknowledged(0), Some(101));
}

#[test]
fn a_batch_that_was_not_taken_goes_to_the_new_leader() {
    let cluster = pair([refuse, accept_batch], [2, 2]);
    let mut producer = Producer::connect(&cluster, "t", ProducerConfig::default()).unwrap();
    for _ in 0..3 {
        producer.send(None, Some(b"v")).unwrap();
        producer.flush().unwrap();
        assert_eq!(producer.acknowledged(0), Some(201));
    }
}

/// What may be in the log is sent again only by those who have asked for it.
#[test]
fn a_batch_of_unknown_outcome_is_resent_on_demand() {
    let cluster = pair([|_, _| None, accept_batch], [2, 2]);
    let mut producer = Producer::connect(&cluster, "t", ProducerConfig::default()).unwrap();
    producer.send(None, Some(b"v")).unwrap();
    let error = producer.flush().unwrap_err();
    assert!(
        matches!(error, ProducerError::Unknown { count: 1, .. }),
        "{error}"
    );
    let config = ProducerConfig {
        resends_unknown: true,
        ..ProducerConfig::default()
    };
    let mut producer = Producer::connect(&cluster, "t", config).unwrap();
    producer.send(None, Some(b"v")).unwrap();
    producer.flush().unwrap();
    assert_eq!(producer.acknowledged(0), Some(201));
}

#[test]
fn an_unknown_topic_is_named() {
    let (cluster, leader) = leader(accept_batch);
    let error = Producer::connect(&cluster, "nope", ProducerConfig::default()).unwrap_err();
    assert!(error.to_string().contains("`nope`"));
    drop(Producer::connect(&cluster, "t", ProducerConfig::default()).unwrap());
    leader.join().unwrap();
}
