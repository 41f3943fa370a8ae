//! Segments that another implementation wrote, read by the library and by `farlog dump`.
//!
//! Both files in `tests/data` hold the same 5,194 records in 70 batches, epoch 1: one plain, one
//! with every codec in turn.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use replicator::segment::{SegmentOptions, SegmentReader, SegmentWriter, recover};
use serde_json::Value;

const PLAIN: &str = "plain-00000000000000000000.log";
const MIXED_CODECS: &str = "mixed-codecs-00000000000000000000.log";
const LIMIT: usize = 16 << 20;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn dump(path: &Path, flags: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_farlog"))
        .arg("dump")
        .args(flags)
        .arg(path)
        .output()
        .unwrap()
}

/// The dump's JSON lines without the summary, and the summary.
fn dump_json(path: &Path, flags: &[&str]) -> (Vec<Value>, Value) {
    let output = dump(path, &[&["--json"], flags].concat());
    let lines = String::from_utf8(output.stdout).unwrap();
    let mut lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let summary = lines.pop().unwrap();
    assert_eq!(summary["type"], "summary");
    (lines, summary)
}

/// A partition's directory with one of the files as its first segment.
fn partition_with(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(data(name), dir.path().join("00000000000000000000.log")).unwrap();
    dir
}

#[test]
fn dump_agrees_with_both_segments() {
    let (plain, plain_summary) = dump_json(&data(PLAIN), &["--records"]);
    let (mixed, mixed_summary) = dump_json(&data(MIXED_CODECS), &["--records"]);
    for (summary, bytes) in [(plain_summary, 594_533), (mixed_summary, 241_032)] {
        assert_eq!(summary["batches"], 70);
        assert_eq!(summary["records"], 5194);
        assert_eq!(summary["bytes"], bytes);
        assert_eq!(summary["damage"], Value::Null);
    }
    let mut codecs = BTreeMap::new();
    let mut next_offset = 0;
    for (plain, mixed) in plain.iter().zip(&mixed) {
        assert_eq!(plain["base_offset"], next_offset);
        next_offset = plain["last_offset"].as_i64().unwrap() + 1;
        assert_eq!(plain["crc_is_valid"], true);
        assert_eq!(mixed["crc_is_valid"], true);
        assert_eq!(plain["partition_leader_epoch"], 1);
        assert_eq!(plain["compression"], "none");
        assert_eq!(plain["records"], mixed["records"]);
        *codecs
            .entry(mixed["compression"].as_str().unwrap())
            .or_insert(0) += 1;
    }
    assert_eq!(next_offset, 5194);
    let all = ["gzip", "lz4", "none", "snappy", "zstd"].map(|codec| (codec, 14));
    assert_eq!(codecs, BTreeMap::from(all));
    let first = &plain[0]["records"][0];
    assert_eq!(first["key"], "N14228");
    let value =
        "2013,1,1,517,515,2,830,819,11,UA,1545,N14228,EWR,IAH,227,1400,5,15,2013-01-01T10:00:00Z";
    assert_eq!(first["value"], value);
}

#[test]
fn dump_as_text_has_a_line_per_batch_and_record() {
    let output = dump(&data(MIXED_CODECS), &["--records"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let count = |prefix| text.lines().filter(|line| line.starts_with(prefix)).count();
    assert_eq!((count("baseOffset: "), count("| offset: ")), (70, 5194));
    assert_eq!(text.matches("isvalid: true").count(), 70);
    assert_eq!(
        text.lines().last(),
        Some("70 batches, 5194 records, 241032 bytes")
    );
}

#[test]
fn dump_of_a_flipped_bit_stops_there_and_fails() {
    let dir = partition_with(PLAIN);
    let path = dir.path().join("00000000000000000000.log");
    let mut bytes = std::fs::read(&path).unwrap();
    let (batches, _) = dump_json(&path, &[]);
    let position = batches[20]["position"].as_u64().unwrap();
    bytes[usize::try_from(position).unwrap() + 100] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    let (damaged, summary) = dump_json(&path, &["--records"]);
    assert_eq!(damaged.len(), 21);
    assert_eq!(damaged[20]["crc_is_valid"], false);
    assert_eq!(
        damaged[20].get("records"),
        None,
        "what the CRC disowns is not shown"
    );
    assert_eq!(
        (&summary["batches"], &summary["bytes"]),
        (&20.into(), &position.into())
    );
    let output = dump(&path, &[]);
    assert_eq!(output.status.code(), Some(3));
    let message = String::from_utf8(output.stderr).unwrap();
    let place = format!("{} at position {position}", path.display());
    assert!(
        message.contains(&place) && message.contains("CRC-32C"),
        "{message}"
    );
    assert!(message.contains("help:"), "{message}");
}

#[test]
fn dump_of_a_cut_segment_shows_what_is_whole() {
    let dir = partition_with(MIXED_CODECS);
    let path = dir.path().join("00000000000000000000.log");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let (batches, summary) = dump_json(&path, &[]);
    assert_eq!(batches.len(), 69);
    assert!(summary["damage"].as_str().unwrap().contains("cut off"));
    assert_eq!(dump(&path, &[]).status.code(), Some(3));
}

#[test]
fn dump_of_a_decompression_bomb_stops_at_the_limit() {
    let output = dump(
        &data(MIXED_CODECS),
        &["--records", "--decompressed-max", "100"],
    );
    assert_eq!(output.status.code(), Some(3));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("more than 100 bytes"), "{message}");
}

#[test]
fn dump_refuses_other_files() {
    let dir = tempfile::tempdir().unwrap();
    for (name, cause) in [
        ("notes.txt", "is not a segment"),
        ("00000000000000000000.log", "cannot open"),
    ] {
        let output = dump(&dir.path().join(name), &[]);
        assert_eq!(output.status.code(), Some(1));
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains(cause), "{message}");
    }
}

/// Indexes built from the foreign log, dumped, searched, and damaged.
#[test]
fn foreign_segments_are_recovered_indexed_and_searched() {
    for name in [PLAIN, MIXED_CODECS] {
        let dir = partition_with(name);
        let recovery = recover(dir.path(), 0, &SegmentOptions::default()).unwrap();
        assert_eq!(
            (recovery.log_start_offset, recovery.log_end_offset),
            (0, 5194)
        );
        assert_eq!(recovery.torn, None);
        assert_eq!(
            recovery.rebuilt.len(),
            3,
            "two indexes and the epochs: {:?}",
            recovery.rebuilt
        );

        let (batches, _) = dump_json(&dir.path().join("00000000000000000000.log"), &["--records"]);
        let reader = SegmentReader::open(dir.path(), 0).unwrap();
        for batch in &batches {
            for end in ["base_offset", "last_offset"] {
                let found = reader
                    .position_of(batch[end].as_i64().unwrap())
                    .unwrap()
                    .unwrap();
                assert_eq!(batch["position"], found.position);
            }
        }
        let records: Vec<(i64, i64)> = batches
            .iter()
            .flat_map(|batch| batch["records"].as_array().unwrap())
            .map(|r| {
                (
                    r["offset"].as_i64().unwrap(),
                    r["timestamp"].as_i64().unwrap(),
                )
            })
            .collect();
        for timestamp in records.iter().step_by(97).map(|&(_, timestamp)| timestamp) {
            let expected = records.iter().copied().find(|&(_, t)| t >= timestamp);
            assert_eq!(reader.find_timestamp(timestamp, LIMIT).unwrap(), expected);
        }

        let index = dir.path().join("00000000000000000000.index");
        let text = String::from_utf8(dump(&index, &[]).stdout).unwrap();
        let expected: Vec<String> = reader_index(&batches);
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
        let time_index = dir.path().join("00000000000000000000.timeindex");
        assert!(dump(&time_index, &[]).status.success());
        let mut bytes = std::fs::read(&index).unwrap();
        bytes.extend_from_slice(&[0; 8]);
        std::fs::write(&index, &bytes).unwrap();
        assert!(
            dump(&index, &[]).status.success(),
            "preallocated zeros are no damage"
        );
        bytes.push(1);
        std::fs::write(&index, &bytes).unwrap();
        assert_eq!(dump(&index, &[]).status.code(), Some(3));
    }
}

/// The index entries of a log by Kafka's rule, from the dumped batches.
fn reader_index(batches: &[Value]) -> Vec<String> {
    let mut passed = 0;
    let mut entries = Vec::new();
    for batch in batches {
        if passed > 4096 {
            entries.push(format!(
                "offset: {} position: {}",
                batch["last_offset"], batch["position"]
            ));
            passed = 0;
        }
        passed += batch["len"].as_u64().unwrap();
    }
    entries
}

/// Copied batch by batch through the writer, a segment is the same file.
#[test]
fn a_copied_segment_is_identical() {
    let source = SegmentReader::open_file(&data(MIXED_CODECS)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut writer = SegmentWriter::create(dir.path(), 0, &SegmentOptions::default()).unwrap();
    let mut batches = source.batches(0).unwrap();
    while let Some((position, batch)) = batches.next_batch().unwrap() {
        assert_eq!(batch.check_appendable(LIMIT), Ok(()));
        assert_eq!(writer.append(batch.as_bytes()).unwrap(), position);
    }
    let copy = std::fs::read(writer.path()).unwrap();
    assert!(copy == std::fs::read(data(MIXED_CODECS)).unwrap());
}
