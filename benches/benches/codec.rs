//! How fast are record batches written, checked and read?
//!
//! 16 KiB batches of records of about 100 bytes, on one core, in cache. Expected: encode at least
//! 1 GB/s, verify at least 5 GB/s. `memcpy` of the same bytes is the speed of light; the
//! `kafka-protocol` crate does the same job with records it owns.

use std::hint::black_box;

use benches::ThreadCpuTime;
use bytes::{Bytes, BytesMut};
use criterion::{BenchmarkGroup, Criterion, Throughput};
use kafka_protocol::records::{
    Compression, NO_PARTITION_LEADER_EPOCH, NO_PRODUCER_EPOCH, NO_PRODUCER_ID, RecordBatchDecoder,
    RecordBatchEncoder, RecordEncodeOptions, TimestampType,
};
use replicator::record::{BatchBuilder, BatchView};

const BATCH_LEN_MAX: usize = 16 << 10;
const BASE_TIMESTAMP: i64 = 1_357_034_400_000;

/// Key and value of one record.
struct Entry {
    timestamp: i64,
    key: Vec<u8>,
    value: Vec<u8>,
}

fn main() {
    let mut criterion = Criterion::default()
        .with_measurement(ThreadCpuTime)
        .configure_from_args();
    let entries = entries();
    let batch = encode(&mut BatchBuilder::new(BATCH_LEN_MAX), &entries).to_vec();
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Bytes(batch.len() as u64));
    bench_memcpy(&mut group, &batch);
    bench_encode(&mut group, &entries, &batch);
    bench_decode(&mut group, &batch);
    group.finish();
    criterion.final_summary();
}

/// As many records as fill a batch, with tail numbers for keys and flights for values.
fn entries() -> Vec<Entry> {
    let mut builder = BatchBuilder::new(BATCH_LEN_MAX);
    let flights = (0..).map(|i| Entry {
        timestamp: BASE_TIMESTAMP + i * 7,
        key: format!("N{:05}", i * 7919 % 100_000).into_bytes(),
        value: format!(
            "2013,1,{},{},515,{},830,819,{},UA,{},N14228,EWR,IAH,227,1400,5,15,2013-01-01T10:00:00Z",
            i % 31,
            517 + i,
            i % 60,
            i % 20,
            1545 + i
        )
        .into_bytes(),
    });
    flights
        .take_while(|e| builder.append(e.timestamp, Some(&e.key), Some(&e.value), &[]))
        .collect()
}

fn encode<'a>(builder: &'a mut BatchBuilder, entries: &[Entry]) -> &'a [u8] {
    builder.clear();
    for entry in entries {
        let fits = builder.append(entry.timestamp, Some(&entry.key), Some(&entry.value), &[]);
        assert!(fits, "the entries were chosen to fit");
    }
    builder.build()
}

fn bench_memcpy(group: &mut BenchmarkGroup<'_, ThreadCpuTime>, batch: &[u8]) {
    let mut copy = vec![0; batch.len()];
    group.bench_function("memcpy", |b| {
        b.iter(|| black_box(&mut copy[..]).copy_from_slice(black_box(batch)));
    });
}

fn bench_encode(group: &mut BenchmarkGroup<'_, ThreadCpuTime>, entries: &[Entry], batch: &[u8]) {
    let mut builder = BatchBuilder::new(BATCH_LEN_MAX);
    group.bench_function("encode", |b| {
        b.iter(|| black_box(encode(&mut builder, black_box(entries))).len());
    });

    let records = kafka_records(entries);
    let options = RecordEncodeOptions {
        version: 2,
        compression: Compression::None,
    };
    let mut out = BytesMut::with_capacity(2 * BATCH_LEN_MAX);
    let mut run = || {
        out.clear();
        RecordBatchEncoder::encode(&mut out, black_box(&records), &options).expect("valid records");
        out.len()
    };
    assert_eq!(run(), batch.len(), "both codecs write the same batch");
    group.bench_function("encode kafka-protocol", |b| b.iter(&mut run));
}

fn bench_decode(group: &mut BenchmarkGroup<'_, ThreadCpuTime>, batch: &[u8]) {
    group.bench_function("parse", |b| b.iter(|| parse(black_box(batch)).len()));
    group.bench_function("verify", |b| {
        b.iter(|| parse(black_box(batch)).verify_crc().expect("a sound batch"));
    });
    let parsed = parse(batch);
    group.bench_function("iterate", |b| b.iter(|| values_len(black_box(&parsed))));
    group.bench_function("decode", |b| {
        b.iter(|| {
            let batch = parse(black_box(batch));
            batch.verify_crc().expect("a sound batch");
            values_len(&batch)
        });
    });

    let shared = Bytes::copy_from_slice(batch);
    group.bench_function("decode kafka-protocol", |b| {
        b.iter(|| {
            let mut bytes = black_box(&shared).clone();
            let set = RecordBatchDecoder::decode(&mut bytes).expect("a sound batch");
            set.records.len()
        });
    });
}

fn parse(bytes: &[u8]) -> BatchView<'_> {
    BatchView::parse(bytes).expect("a sound batch").0
}

/// Visits every record.
fn values_len(batch: &BatchView<'_>) -> usize {
    let records = batch.records().expect("not compressed");
    records
        .map(|record| record.expect("a sound batch").value.map_or(0, <[u8]>::len))
        .sum()
}

fn kafka_records(entries: &[Entry]) -> Vec<kafka_protocol::records::Record> {
    let records = entries.iter().zip(0i32..);
    records
        .map(|(entry, offset)| kafka_protocol::records::Record {
            transactional: false,
            control: false,
            delete_horizon: false,
            partition_leader_epoch: NO_PARTITION_LEADER_EPOCH,
            producer_id: NO_PRODUCER_ID,
            producer_epoch: NO_PRODUCER_EPOCH,
            timestamp_type: TimestampType::Creation,
            offset: i64::from(offset),
            // It begins a new batch where sequence and offset do not advance together.
            sequence: offset,
            timestamp: entry.timestamp,
            key: Some(Bytes::copy_from_slice(&entry.key)),
            value: Some(Bytes::copy_from_slice(&entry.value)),
            headers: Default::default(),
        })
        .collect()
}
