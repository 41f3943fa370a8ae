use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::epoch::EpochEntry;

const WAIT: Duration = Duration::from_secs(5);

fn text() -> impl Strategy<Value = String> {
    "[a-zäß0-9._-]{0,40}"
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..300)
}

prop_compose! {
    fn hello()(min_version in any::<u16>(), max_version in any::<u16>(), role in prop_oneof![Just(Role::Node), Just(Role::Client)],
               node in any::<u32>(), memory_id in any::<[u8; 16]>(), incarnation in any::<u64>(),
               capabilities in any::<u64>(), cluster_hash in any::<u64>()) -> Message {
        Hello { min_version, max_version, role, node, memory_id, incarnation, capabilities, cluster_hash }.into()
    }
}

prop_compose! {
    fn grant_request()(correlation in any::<u64>(), topic in text(), partition in any::<u32>(), leader_epoch in any::<i32>(),
                       (epoch_start_offset, base_offset) in any::<(i64, i64)>(), image_id in any::<u64>(), file_position in any::<u64>(),
                       segment_base_offset in any::<i64>(), image_len in any::<u32>()) -> Message {
        GrantRequest { correlation, topic, partition, leader_epoch, epoch_start_offset, image_id, base_offset, file_position, segment_base_offset, image_len }.into()
    }
}

prop_compose! {
    fn grant()(correlation in any::<u64>(), topic in text(), partition in any::<u32>(), leader_epoch in any::<i32>(),
               image_id in any::<u64>(), (addr, rkey, len) in any::<(u64, u32, u32)>(),
               (table_addr, table_rkey) in any::<(u64, u32)>(), log_end_offset in any::<i64>(),
               byte_position in any::<u64>()) -> Message {
        Grant { correlation, topic, partition, leader_epoch, image_id, addr, rkey, len, table_addr, table_rkey, log_end_offset, byte_position }.into()
    }
}

prop_compose! {
    fn opened()(correlation in any::<u64>(), entries in prop::collection::vec(any::<(u32, u64, u32, i32)>(), 0..20)) -> Message {
        let entries = entries
            .into_iter()
            .map(|(partition, entry_addr, rkey, leader_epoch)| OpenedEntry { partition, entry_addr, rkey, leader_epoch })
            .collect();
        Opened { correlation, entries }.into()
    }
}

prop_compose! {
    fn image_grant()(correlation in any::<u64>(), partition in any::<u32>(), image_id in any::<u64>(),
                     (base_offset, next_offset) in any::<(i64, i64)>(), (addr, rkey, len) in any::<(u64, u32, u32)>()) -> Message {
        ImageGrant { correlation, partition, image_id, base_offset, next_offset, addr, rkey, len }.into()
    }
}

prop_compose! {
    fn revoke()(correlation in any::<u64>(), topic in text(), partition in any::<u32>(), leader_epoch in any::<i32>(),
                epoch_start_offset in any::<i64>()) -> Message {
        Revoke { correlation, topic, partition, leader_epoch, epoch_start_offset }.into()
    }
}

prop_compose! {
    fn revoked()(correlation in any::<u64>(), topic in text(), partition in any::<u32>(), leader_epoch in any::<i32>(),
                 log_end_offset in any::<i64>(), epochs in prop::collection::vec(any::<(i32, i64)>(), 0..20)) -> Message {
        let epochs = epochs
            .into_iter()
            .map(|(epoch, start_offset)| EpochEntry { epoch, start_offset })
            .collect();
        Revoked { correlation, topic, partition, leader_epoch, log_end_offset, epochs }.into()
    }
}

prop_compose! {
    fn truncate()(correlation in any::<u64>(), topic in text(), partition in any::<u32>(), leader_epoch in any::<i32>(),
                  kind in prop_oneof![Just(CutKind::TruncateTo), Just(CutKind::RestartAt)], offset in any::<i64>()) -> Message {
        Truncate { correlation, topic, partition, leader_epoch, kind, offset }.into()
    }
}

prop_compose! {
    fn partition_metadata()(partition in any::<u32>(), leader in any::<u32>(), leader_epoch in any::<i32>(),
                            isr in prop::collection::vec(any::<u32>(), 0..5),
                            replicas in prop::collection::vec(any::<u32>(), 0..5)) -> PartitionMetadata {
        PartitionMetadata { partition, leader, leader_epoch, isr, replicas }
    }
}

prop_compose! {
    fn metadata()(correlation in any::<u64>(), partitions in prop::collection::vec(partition_metadata(), 0..4)) -> Message {
        Metadata { correlation, partitions }.into()
    }
}

prop_compose! {
    fn log_end()(topic in text(), partition in any::<u32>(), memory_id in any::<[u8; 16]>(), last_epoch in any::<i32>(),
                 log_end_offset in any::<i64>()) -> Message {
        LogEnd { topic, partition, memory_id, last_epoch, log_end_offset }.into()
    }
}

fn message() -> impl Strategy<Value = Message> {
    let purpose = prop_oneof![Just(Purpose::Replication), Just(Purpose::Consumer)];
    let acks = prop_oneof![
        Just(Acks::Leader),
        Just(Acks::Replicated),
        Just(Acks::Durable)
    ];
    prop_oneof![
        hello(),
        grant_request(),
        grant(),
        opened(),
        image_grant(),
        revoke(),
        revoked(),
        truncate(),
        log_end(),
        metadata(),
        (any::<u64>(), text()).prop_map(|(correlation, topic)| MetadataRequest {
            correlation,
            topic
        }
        .into()),
        (text(), any::<u32>(), any::<(u64, i64)>()).prop_map(
            |(topic, partition, (session, offset))| Sync {
                topic,
                partition,
                session,
                offset
            }
            .into()
        ),
        (text(), any::<u32>(), any::<(u64, i64)>()).prop_map(
            |(topic, partition, (session, offset))| Durable {
                topic,
                partition,
                session,
                offset
            }
            .into()
        ),
        (any::<u16>(), any::<u64>(), text()).prop_map(|(code, correlation, message)| ErrorReply {
            code: ErrorCode(code),
            correlation,
            message
        }
        .into()),
        (any::<(u64, u64)>(), purpose, bytes()).prop_map(
            |((correlation, session), purpose, end_point)| Lane {
                correlation,
                session,
                purpose,
                end_point
            }
            .into()
        ),
        (any::<(u64, u64)>(), bytes()).prop_map(|((correlation, session), end_point)| LaneReady {
            correlation,
            session,
            end_point
        }
        .into()),
        (
            any::<u64>(),
            text(),
            prop::collection::vec(any::<u32>(), 0..50)
        )
            .prop_map(|(correlation, topic, partitions)| Open {
                correlation,
                topic,
                partitions
            }
            .into()),
        (any::<u64>(), text(), any::<u32>(), any::<i64>()).prop_map(
            |(correlation, topic, partition, offset)| ImageRequest {
                correlation,
                topic,
                partition,
                offset
            }
            .into()
        ),
        (any::<u64>(), text(), any::<u32>(), any::<i64>()).prop_map(
            |(correlation, topic, partition, timestamp)| ListOffsets {
                correlation,
                topic,
                partition,
                timestamp
            }
            .into()
        ),
        any::<(u64, i64, i64)>().prop_map(|(correlation, offset, timestamp)| ListOffsetsReply {
            correlation,
            offset,
            timestamp
        }
        .into()),
        (any::<u64>(), text(), any::<u32>(), acks, bytes()).prop_map(
            |(correlation, topic, partition, acks, batch)| Append {
                correlation,
                topic,
                partition,
                acks,
                batch
            }
            .into()
        ),
        any::<(u64, i64, i64)>().prop_map(|(correlation, base_offset, log_append_time)| {
            Appended {
                correlation,
                base_offset,
                log_append_time,
            }
            .into()
        }),
        any::<u64>().prop_map(|correlation| StatusRequest { correlation }.into()),
        (any::<u64>(), text()).prop_map(|(correlation, json)| Status { correlation, json }.into()),
    ]
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut frame = Vec::new();
    message.encode(VERSION_MAX, &mut frame).unwrap();
    frame
}

proptest! {
    #[test]
    fn every_message_survives_encoding(message in message()) {
        let frame = encoded(&message);
        let (length, rest) = frame.split_first_chunk().unwrap();
        prop_assert_eq!(Message::frame_len(*length), Ok(rest.len()));
        prop_assert_eq!(Message::decode(rest), Ok(message));
    }

    /// The first two bytes are kept small so that most cases reach a body.
    #[test]
    fn any_bytes_are_a_message_or_an_error(kind in 0u16..26, version in 0u16..3, body in bytes()) {
        let mut frame = kind.to_le_bytes().to_vec();
        frame.extend(version.to_le_bytes());
        frame.extend(body);
        if let Ok(message) = Message::decode(&frame) {
            prop_assert_eq!(message.kind(), kind);
        }
    }

    #[test]
    fn every_truncation_is_an_error(message in message(), cut in any::<prop::sample::Index>()) {
        let frame = &encoded(&message)[4..];
        prop_assert!(Message::decode(&frame[..cut.index(frame.len())]).is_err());
    }
}

#[test]
fn hostile_counts_are_refused_before_they_are_believed() {
    let mut frame = encoded(
        &Open {
            correlation: 1,
            topic: "t".into(),
            partitions: vec![7],
        }
        .into(),
    );
    let count = frame.len() - 8;
    frame[count..count + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(
        Message::decode(&frame[4..]),
        Err(Malformed::Truncated("partitions"))
    );
    assert_eq!(
        Message::frame_len(u32::MAX.to_le_bytes()),
        Err(Malformed::FrameLen(u32::MAX as usize))
    );
    assert_eq!(
        Message::frame_len(3u32.to_le_bytes()),
        Err(Malformed::FrameLen(3))
    );
}

#[test]
fn trailing_bytes_are_refused_but_in_a_greeting() {
    let mut frame = encoded(&StatusRequest { correlation: 1 }.into());
    frame.push(0);
    assert_eq!(Message::decode(&frame[4..]), Err(Malformed::Trailing(1)));
    let mut frame = encoded(&Hello::client(9).into());
    frame.extend([1, 2, 3]);
    assert_eq!(Message::decode(&frame[4..]), Ok(Hello::client(9).into()));
}

#[test]
fn a_greeting_of_a_later_version_is_understood() {
    let mut frame = Vec::new();
    Message::from(Hello::client(9))
        .encode(VERSION_MAX + 7, &mut frame)
        .unwrap();
    assert!(Message::decode(&frame[4..]).is_ok());
    frame.clear();
    Message::from(StatusRequest { correlation: 1 })
        .encode(VERSION_MAX + 7, &mut frame)
        .unwrap();
    assert_eq!(
        Message::decode(&frame[4..]),
        Err(Malformed::Version {
            kind: 15,
            version: VERSION_MAX + 7
        })
    );
}

#[test]
fn a_batch_of_the_largest_size_fits_a_frame() {
    let topic = "t".repeat(249);
    let append = |len| Append {
        correlation: 1,
        topic: topic.clone(),
        partition: 1,
        acks: Acks::Leader,
        batch: vec![0; len],
    };
    let mut frame = Vec::new();
    assert_eq!(
        Message::from(append(BATCH_LEN_MAX)).encode(1, &mut frame),
        Ok(())
    );
    frame.clear();
    let too_large = Message::from(append(FRAME_LEN_MAX)).encode(1, &mut frame);
    assert!(matches!(too_large, Err(Malformed::FrameLen(_))));
    assert!(frame.is_empty());
}

/// Listens, greets one peer with `ours` on a thread of its own, and connects with `theirs`.
fn pair(
    ours: Hello,
    theirs: Hello,
) -> (
    Result<Connection, ControlError>,
    Result<Connection, ControlError>,
) {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().to_string();
    let server = thread::spawn(move || {
        listener
            .accept_timeout(WAIT)
            .unwrap()
            .unwrap()
            .handshake(&ours)
    });
    let client = Connection::connect(&address, &theirs);
    (server.join().unwrap(), client)
}

fn connected() -> (Connection, Connection) {
    let (server, client) = pair(Hello::node(3, [5; 16], 8, 77), Hello::client(77));
    (server.unwrap(), client.unwrap())
}

#[test]
fn both_sides_learn_who_the_other_is() {
    let (server, client) = connected();
    assert_eq!(client.hello(), &Hello::node(3, [5; 16], 8, 77));
    assert_eq!(server.hello().role, Role::Client);
    assert_eq!(
        (server.version(), client.version()),
        (VERSION_MAX, VERSION_MAX)
    );
}

#[test]
fn different_cluster_files_are_told_apart() {
    let (server, client) = pair(Hello::node(3, [0; 16], 0, 1), Hello::client(2));
    assert!(
        matches!(server, Err(ControlError::ClusterMismatch { .. })),
        "{server:?}"
    );
    assert!(
        matches!(client, Err(ControlError::ClusterMismatch { .. })),
        "{client:?}"
    );
}

#[test]
fn a_peer_without_a_cluster_file_is_welcome() {
    let (server, client) = pair(Hello::node(3, [0; 16], 0, 1), Hello::client(0));
    assert!(server.is_ok() && client.is_ok());
}

/// A rolling upgrade: what this build adds is not sent to one that does not know it, and not taken from it.
#[test]
fn an_older_build_gets_no_newer_messages() {
    let older = Hello {
        max_version: VERSION_FENCING - 1,
        ..Hello::client(0)
    };
    let (server, client) = pair(Hello::node(1, [0; 16], 0, 0), older);
    let (mut server, mut client) = (server.unwrap(), client.unwrap());
    assert_eq!((server.version(), client.version()), (1, 1));
    let ask = |correlation| StatusRequest { correlation }.into();
    client.send(&ask(1)).unwrap();
    assert_eq!(server.receive_timeout(WAIT).unwrap(), Some(ask(1)));
    let newer: Message = MetadataRequest {
        correlation: 2,
        topic: "t".into(),
    }
    .into();
    assert!(matches!(
        server.send(&newer),
        Err(ControlError::Malformed {
            source: Malformed::Version {
                kind: 23,
                version: 1
            },
            ..
        })
    ));
    // Nothing of it was sent: the connection goes on.
    server.send(&ask(3)).unwrap();
    assert_eq!(client.receive_timeout(WAIT).unwrap(), Some(ask(3)));
    let mut frame = encoded(&newer);
    frame[6..8].copy_from_slice(&1u16.to_le_bytes());
    assert_eq!(
        Message::decode(&frame[4..]),
        Err(Malformed::Version {
            kind: 23,
            version: 1
        })
    );
}

#[test]
fn versions_without_overlap_are_refused() {
    let later = Hello {
        min_version: VERSION_MAX + 1,
        max_version: VERSION_MAX + 2,
        ..Hello::client(0)
    };
    let (server, client) = pair(Hello::node(1, [0; 16], 0, 0), later);
    let Err(ControlError::UnsupportedVersion { min, .. }) = server else {
        panic!("{server:?}")
    };
    assert_eq!(min, VERSION_MAX + 1);
    assert!(client.is_err());
}

#[test]
fn another_node_at_the_address_is_named() {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().to_string();
    let server = thread::spawn(move || {
        listener
            .accept_timeout(WAIT)
            .unwrap()
            .unwrap()
            .handshake(&Hello::node(4, [0; 16], 0, 0))
    });
    let error = Connection::connect_node(&address, 3, &Hello::client(0)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is node 4, the cluster file says node 3"),
        "{error}"
    );
    assert!(server.join().unwrap().is_ok());
}

#[test]
fn messages_pass_in_order_in_both_directions() {
    let (server, client) = connected();
    let (mut server_reader, mut server_writer) = server.split();
    let (mut client_reader, mut client_writer) = client.split();
    let batch: Vec<u8> = (0..=250).cycle().take(BATCH_LEN_MAX).collect();
    let sender = thread::spawn(move || {
        for correlation in 0..20 {
            let append = Append {
                correlation,
                topic: "t".into(),
                partition: 1,
                acks: Acks::Replicated,
                batch: batch.clone(),
            };
            client_writer.send(&append.into()).unwrap();
        }
        (client_writer, batch)
    });
    let mut lens = Vec::new();
    for correlation in 0..20 {
        let Message::Append(append) = server_reader.receive().unwrap() else {
            panic!("not an append")
        };
        assert_eq!(append.correlation, correlation);
        lens.push(append.batch);
        server_writer
            .send(
                &Appended {
                    correlation,
                    base_offset: 0,
                    log_append_time: -1,
                }
                .into(),
            )
            .unwrap();
    }
    let (writer, batch) = sender.join().unwrap();
    assert!(lens.iter().all(|got| *got == batch));
    for _ in 0..20 {
        assert!(matches!(
            client_reader.receive_timeout(WAIT).unwrap(),
            Some(Message::Appended(_))
        ));
    }
    drop((writer, client_reader));
    assert!(matches!(
        server_reader.receive(),
        Err(ControlError::Closed { .. })
    ));
}

#[test]
fn a_timeout_keeps_the_part_that_arrived() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let client = thread::spawn(move || Connection::connect(&address, &Hello::client(0)).unwrap());
    let (mut raw, _) = listener.accept().unwrap();
    raw.write_all(&encoded(&Hello::node(1, [0; 16], 0, 0).into()))
        .unwrap();
    let mut client = client.join().unwrap();
    let frame = encoded(&StatusRequest { correlation: 42 }.into());
    raw.write_all(&frame[..7]).unwrap();
    assert!(
        client
            .receive_timeout(Duration::from_millis(20))
            .unwrap()
            .is_none()
    );
    raw.write_all(&frame[7..]).unwrap();
    assert_eq!(
        client.receive_timeout(WAIT).unwrap(),
        Some(StatusRequest { correlation: 42 }.into())
    );
}

#[test]
fn close_wakes_a_waiting_reader() {
    let (_server, client) = connected();
    let (mut reader, writer) = client.split();
    let waiting = thread::spawn(move || reader.receive());
    writer.close();
    assert!(matches!(
        waiting.join().unwrap(),
        Err(ControlError::Closed { .. })
    ));
}

#[test]
fn garbage_instead_of_a_greeting_is_an_error() {
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let mut raw = TcpStream::connect(listener.local_addr()).unwrap();
    raw.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let started = Instant::now();
    let error = listener
        .accept_timeout(WAIT)
        .unwrap()
        .unwrap()
        .handshake(&Hello::client(0))
        .unwrap_err();
    assert!(matches!(error, ControlError::Malformed { .. }), "{error}");
    assert!(started.elapsed() < WAIT);
    let mut seen = Vec::new();
    let _ = raw.read_to_end(&mut seen); // the greeting, then the end or a reset
}

#[test]
fn a_taken_port_is_named() {
    let first = Listener::bind("127.0.0.1:0").unwrap();
    let address = first.local_addr().to_string();
    let error = Listener::bind(&address).unwrap_err();
    assert!(
        matches!(error, ControlError::AddressInUse { .. }),
        "{error}"
    );
    assert!(error.to_string().contains(&address));
}
