//! Segments exchanged with the Python package kafka-python, in both directions.
//!
//! `FARLOG_PYTHON` names a Python interpreter that has `kafka-python` (and `python-snappy`, `lz4`,
//! `zstandard` for all codecs); then these tests must run. Without it, `python3` is tried, and the
//! tests are skipped with the reason printed if it lacks the package.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use replicator::record::partitioner::murmur2;
use replicator::record::{BatchBuilder, Record, stamp};
use replicator::segment::{SegmentOptions, SegmentReader, SegmentWriter};
use serde_json::{Value, json};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kafka_python.py");
const LIMIT: usize = 16 << 20;

/// An interpreter with the package, or `None` after printing why there is none.
fn python() -> Option<String> {
    let named = std::env::var("FARLOG_PYTHON").ok();
    let python = named.clone().unwrap_or_else(|| "python3".to_owned());
    let cause = match Command::new(&python)
        .args(["-c", "import kafka.record"])
        .output()
    {
        Ok(output) if output.status.success() => return Some(python),
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(
        named.is_none(),
        "FARLOG_PYTHON={python} cannot import kafka.record: {cause}"
    );
    eprintln!("SKIPPED: {python} cannot import kafka.record (set FARLOG_PYTHON): {cause}");
    None
}

/// Runs the script and returns its lines.
fn run(python: &str, arguments: &[&Path], input: &str) -> Vec<String> {
    let mut child = Command::new(python)
        .arg(SCRIPT)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{python} {SCRIPT} {arguments:?}: {}",
        output.status
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A record as the script prints it.
fn line(record: &Record<'_>) -> Value {
    json!({
        "offset": record.offset,
        "timestamp": record.timestamp,
        "key": record.key.map(hex),
        "value": record.value.map(hex),
        "headers": record
            .headers()
            .map(|header| json!([hex(header.key), header.value.map(hex)]))
            .collect::<Vec<_>>(),
    })
}

/// Every record of a segment, after checking what a leader would check.
fn read_segment(path: &Path) -> Vec<Value> {
    let reader = SegmentReader::open_file(path).unwrap();
    let mut batches = reader.batches(0).unwrap();
    let mut lines = Vec::new();
    while let Some((_, batch)) = batches.next_batch().unwrap() {
        assert_eq!(batch.check_appendable(LIMIT), Ok(()));
        let body = batch.decompress(LIMIT).unwrap();
        lines.extend(
            batch
                .records_from(&body)
                .unwrap()
                .map(|record| line(&record.unwrap())),
        );
    }
    lines
}

#[test]
fn kafka_python_reads_what_we_write() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut writer = SegmentWriter::create(dir.path(), 1000, &SegmentOptions::default()).unwrap();
    let mut builder = BatchBuilder::new(64 << 10);
    let long = [0xa5; 20_000];
    let mut appended = 0;
    for batch in 0..50_usize {
        builder.clear();
        for i in 0..=batch % 7 {
            let key = format!("key {batch} {i}");
            let key = (i != 1).then_some(key.as_bytes());
            let value = [Some(&b""[..]), None, Some(&long[..batch]), Some(&long)][(batch + i) % 4];
            let headers: [(&[u8], Option<&[u8]>); 3] = [
                (b"trace", Some(b"\x00\xff")),
                (b"trace", None),
                (b"", Some(b"")),
            ];
            // Timestamps fall and rise, near and far from the first one.
            let timestamp = 1_700_000_000_000 + [0, 40, -7, 1 << 40][i % 4];
            if builder.append(timestamp, key, value, &headers[..i % 4]) {
                appended += 1;
            }
        }
        let mut bytes = builder.build().to_vec();
        stamp(&mut bytes, writer.next_offset(), 3);
        writer.append(&bytes).unwrap();
    }
    let expected = read_segment(writer.path());
    assert_eq!(expected.len(), appended);
    let theirs = run(&python, &["read".as_ref(), writer.path()], "");
    let theirs: Vec<Value> = theirs
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(theirs, expected);
}

#[test]
fn we_read_what_kafka_python_writes_with_every_codec() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut expected: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for line in run(&python, &["write".as_ref(), dir.path()], "") {
        let (codec, record): (String, Value) = serde_json::from_str(&line).unwrap();
        expected.entry(codec).or_default().push(record);
    }
    assert!(expected.contains_key("none") && expected.contains_key("gzip"));
    for codec in ["snappy", "lz4", "zstd"] {
        if !expected.contains_key(codec) {
            eprintln!("SKIPPED: kafka-python finds no {codec} here");
        }
    }
    for (codec, records) in expected {
        let path = dir.path().join(format!("{codec}-{:020}.log", 0));
        let reader = SegmentReader::open_file(&path).unwrap();
        let mut batches = reader.batches(0).unwrap();
        let mut with_codec = 0;
        while let Some((_, batch)) = batches.next_batch().unwrap() {
            with_codec += u32::from(batch.compression().unwrap().to_string() == codec);
        }
        assert!(
            with_codec > 10,
            "{codec}: {with_codec} of 20 batches use it"
        );
        assert_eq!(read_segment(&path), records, "{codec}");
    }
}

#[test]
fn the_partitioner_hashes_as_kafka_python() {
    let Some(python) = python() else { return };
    let keys: Vec<Vec<u8>> = (0..300_u16)
        .map(|len| (0..len).map(|i| (i * 37 + len).to_le_bytes()[0]).collect())
        .collect();
    let input: String = keys.iter().map(|key| hex(key) + "\n").collect();
    let theirs = run(&python, &["murmur2".as_ref()], &input);
    let ours: Vec<String> = keys.iter().map(|key| murmur2(key).to_string()).collect();
    assert_eq!(theirs, ours);
}
