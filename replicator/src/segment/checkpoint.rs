//! Kafka's checkpoint files: text, replaced as a whole.
//!
//! The first line is the version, 0, the second the number of entries, then one entry a line.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use super::error::{IoOp, SegmentError};
use super::reader::read_if_exists;
use super::storage::{OpenMode, Storage};

/// An offset of each partition, by topic and partition number: high watermarks, or log start offsets.
pub type PartitionOffsets = BTreeMap<(String, u32), i64>;

/// Says with which offset a leader epoch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochEntry {
    /// The leader epoch.
    pub epoch: i32,
    /// The first offset of that epoch.
    pub start_offset: i64,
}

/// Reads a `leader-epoch-checkpoint`; no entries if the file does not exist.
///
/// # Errors
///
/// [`SegmentError::Checkpoint`] if it is malformed or its epochs or offsets fall,
/// [`SegmentError::Io`].
pub fn read_leader_epochs(path: &Path) -> Result<Vec<EpochEntry>, SegmentError> {
    let mut entries: Vec<EpochEntry> = Vec::new();
    for_each_entry(path, |fields| {
        let [epoch, start_offset] = fields else {
            return Err("not an epoch and an offset");
        };
        let epoch = parse::<i32>(epoch)?;
        let start_offset = parse::<i64>(start_offset)?;
        let rises = entries
            .last()
            .is_none_or(|last| epoch > last.epoch && start_offset >= last.start_offset);
        if !rises || epoch < 0 || start_offset < 0 {
            return Err("epochs and offsets must rise");
        }
        entries.push(EpochEntry {
            epoch,
            start_offset,
        });
        Ok(())
    })?;
    Ok(entries)
}

/// Replaces a `leader-epoch-checkpoint`: after a crash it has the old entries or the new ones.
///
/// # Errors
///
/// [`SegmentError::Io`]; the old file is then still in place.
pub fn write_leader_epochs(
    storage: &dyn Storage,
    path: &Path,
    entries: &[EpochEntry],
) -> Result<(), SegmentError> {
    let lines = entries
        .iter()
        .map(|e| format!("{} {}", e.epoch, e.start_offset));
    write_entries(storage, path, lines)
}

/// Reads a `replication-offset-checkpoint` or `log-start-offset-checkpoint`; no entries if the file does
/// not exist.
///
/// # Errors
///
/// [`SegmentError::Checkpoint`] if it is malformed or names a partition twice,
/// [`SegmentError::Io`].
pub fn read_partition_offsets(path: &Path) -> Result<PartitionOffsets, SegmentError> {
    let mut entries = PartitionOffsets::new();
    for_each_entry(path, |fields| {
        let [topic, partition, offset] = fields else {
            return Err("not a topic, a partition and an offset");
        };
        let offset = parse::<i64>(offset)?;
        if offset < 0 {
            return Err("an offset is not negative");
        }
        match entries.insert(((*topic).to_owned(), parse(partition)?), offset) {
            None => Ok(()),
            Some(_) => Err("the partition occurs twice"),
        }
    })?;
    Ok(entries)
}

/// Replaces such a file: after a crash it has the old entries or the new.
///
/// # Errors
///
/// [`SegmentError::Io`]; the old file is then still in place.
pub fn write_partition_offsets(
    storage: &dyn Storage,
    path: &Path,
    entries: &PartitionOffsets,
) -> Result<(), SegmentError> {
    let lines = entries
        .iter()
        .map(|((topic, partition), offset)| format!("{topic} {partition} {offset}"));
    write_entries(storage, path, lines)
}

fn parse<T: std::str::FromStr>(field: &str) -> Result<T, &'static str> {
    field
        .parse()
        .map_err(|_| "a number is malformed or out of range")
}

/// Hands each entry's fields to `each` after version and count have been checked.
fn for_each_entry(
    path: &Path,
    mut each: impl FnMut(&[&str]) -> Result<(), &'static str>,
) -> Result<(), SegmentError> {
    let bytes = read_if_exists(path)?;
    if bytes.is_empty() && !path.exists() {
        return Ok(());
    }
    let malformed = |line: usize, cause: &str| SegmentError::Checkpoint {
        path: path.to_owned(),
        line,
        cause: cause.to_owned(),
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| malformed(1, "it is not text"))?;
    let mut lines = text.lines();
    if lines.next() != Some("0") {
        return Err(malformed(1, "the version is not 0"));
    }
    let count = lines.next().and_then(|line| line.parse::<usize>().ok());
    let count = count.ok_or_else(|| malformed(2, "the number of entries is missing"))?;
    let mut found = 0;
    for (number, line) in (3..).zip(lines) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        each(&fields).map_err(|cause| malformed(number, cause))?;
        found += 1;
    }
    if found != count {
        return Err(malformed(
            2,
            &format!("it says {count} entries, there are {found}"),
        ));
    }
    Ok(())
}

fn write_entries(
    storage: &dyn Storage,
    path: &Path,
    lines: impl ExactSizeIterator<Item = String>,
) -> Result<(), SegmentError> {
    let mut text = format!("0\n{}\n", lines.len());
    for line in lines {
        writeln!(text, "{line}").expect("a String takes everything");
    }
    replace_file(storage, path, text.as_bytes())
}

/// Replaces a file so that a crash leaves the old bytes or the new ones, never a mixture.
pub(crate) fn replace_file(
    storage: &dyn Storage,
    path: &Path,
    bytes: &[u8],
) -> Result<(), SegmentError> {
    let mut tmp = path.as_os_str().to_owned();
    tmp.push(".tmp");
    let tmp = Path::new(&tmp);
    let file = storage
        .open(tmp, OpenMode::Empty)
        .map_err(SegmentError::io(IoOp::Create, tmp))?;
    storage
        .write_at(&file, bytes, 0)
        .map_err(SegmentError::io(IoOp::Write, tmp))?;
    storage
        .sync(&file)
        .map_err(SegmentError::io(IoOp::Sync, tmp))?;
    storage
        .rename(tmp, path)
        .map_err(SegmentError::io(IoOp::Rename, path))?;
    // A file without a directory in its name lies in the current one.
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => sync_dir(storage, dir),
        _ => sync_dir(storage, Path::new(".")),
    }
}

/// Waits until names created, renamed or removed in `dir` are on the device.
pub(super) fn sync_dir(storage: &dyn Storage, dir: &Path) -> Result<(), SegmentError> {
    storage
        .sync_dir(dir)
        .map_err(SegmentError::io(IoOp::Sync, dir))
}
