//! The batch codec against the `kafka-protocol` crate, in both directions.
//!
//! That crate keeps headers in a map, so header keys are distinct here; and it splits batches where
//! offsets have gaps, so offsets rise by one.

use kafka_protocol::indexmap::IndexMap;
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records::{
    Compression, Record, RecordBatchDecoder, RecordBatchEncoder, RecordEncodeOptions, TimestampType,
};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use replicator::record::{BatchBuilder, BatchView, stamp};

#[derive(Debug, Clone, PartialEq)]
struct AnyRecord {
    timestamp: i64,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<(String, Option<Vec<u8>>)>,
}

prop_compose! {
    fn any_record()(
        timestamp in 0..1_i64 << 45,
        key in option::of(vec(any::<u8>(), 0..20)),
        value in option::of(vec(any::<u8>(), 0..300)),
        headers in btree_map("[a-zé]{0,5}", option::of(vec(any::<u8>(), 0..9)), 0..4),
    ) -> AnyRecord {
        AnyRecord { timestamp, key, value, headers: headers.into_iter().collect() }
    }
}

fn ours(records: &[AnyRecord], base_offset: i64, leader_epoch: i32) -> Vec<u8> {
    let mut builder = BatchBuilder::new(1 << 20);
    for record in records {
        let headers: Vec<_> = record
            .headers
            .iter()
            .map(|(k, v)| (k.as_bytes(), v.as_deref()))
            .collect();
        let (key, value) = (record.key.as_deref(), record.value.as_deref());
        assert!(builder.append(record.timestamp, key, value, &headers));
    }
    let mut bytes = builder.build().to_vec();
    stamp(&mut bytes, base_offset, leader_epoch);
    bytes
}

fn theirs(records: &[AnyRecord], base_offset: i64, leader_epoch: i32) -> Vec<u8> {
    let records: Vec<Record> = (0..)
        .zip(records)
        .map(|(delta, record)| Record {
            transactional: true,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: leader_epoch,
            producer_id: 77,
            producer_epoch: 3,
            timestamp_type: TimestampType::Creation,
            offset: base_offset + i64::from(delta),
            sequence: 500 + delta,
            timestamp: record.timestamp,
            key: record.key.clone().map(Into::into),
            value: record.value.clone().map(Into::into),
            headers: record
                .headers
                .iter()
                .map(|(k, v)| (StrBytes::from(k.clone()), v.clone().map(Into::into)))
                .collect::<IndexMap<_, _>>(),
        })
        .collect();
    let options = RecordEncodeOptions {
        version: 2,
        compression: Compression::None,
    };
    let mut bytes = Vec::new();
    RecordBatchEncoder::encode(&mut bytes, &records, &options).unwrap();
    bytes
}

proptest! {
    #[test]
    fn they_read_what_we_write(
        records in vec(any_record(), 1..20),
        base_offset in 0..1_i64 << 50,
        leader_epoch in 0..i32::MAX,
    ) {
        let bytes = ours(&records, base_offset, leader_epoch);
        let read = RecordBatchDecoder::decode_all(&mut bytes.as_slice()).unwrap();
        prop_assert_eq!(read.len(), 1);
        let read = &read[0].records;
        prop_assert_eq!(read.len(), records.len());
        for (offset, (theirs, ours)) in (base_offset..).zip(read.iter().zip(&records)) {
            prop_assert_eq!(theirs.offset, offset);
            prop_assert_eq!(theirs.partition_leader_epoch, leader_epoch);
            prop_assert_eq!(theirs.timestamp, ours.timestamp);
            prop_assert_eq!(theirs.key.as_deref(), ours.key.as_deref());
            prop_assert_eq!(theirs.value.as_deref(), ours.value.as_deref());
            let headers: Vec<_> = theirs
                .headers
                .iter()
                .map(|(k, v)| (k.to_string(), v.as_deref().map(<[u8]>::to_vec)))
                .collect();
            prop_assert_eq!(&headers, &ours.headers);
        }
    }

    #[test]
    fn we_read_what_they_write(
        records in vec(any_record(), 1..20),
        base_offset in 0..1_i64 << 50,
        leader_epoch in 0..i32::MAX,
    ) {
        let bytes = theirs(&records, base_offset, leader_epoch);
        let (batch, rest) = BatchView::parse(&bytes).unwrap();
        prop_assert!(rest.is_empty());
        prop_assert_eq!(batch.check_appendable(0), Ok(()));
        prop_assert_eq!(batch.base_offset(), base_offset);
        prop_assert_eq!(batch.partition_leader_epoch(), leader_epoch);
        prop_assert_eq!(batch.max_timestamp(), records.iter().map(|r| r.timestamp).max().unwrap());
        prop_assert!(batch.attributes().is_transactional());
        let header = batch.header();
        prop_assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence), (77, 3, 500));
        let read: Vec<_> = batch
            .records()
            .unwrap()
            .map(|record| {
                let record = record.unwrap();
                AnyRecord {
                    timestamp: record.timestamp,
                    key: record.key.map(<[u8]>::to_vec),
                    value: record.value.map(<[u8]>::to_vec),
                    headers: record
                        .headers()
                        .map(|h| {
                            let key = String::from_utf8(h.key.to_vec()).unwrap();
                            (key, h.value.map(<[u8]>::to_vec))
                        })
                        .collect(),
                }
            })
            .collect();
        prop_assert_eq!(read, records);
    }
}
