//! Names of files and directories.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::{IoOp, SegmentError};

/// Name of the file of leader epochs in a partition's directory.
pub const LEADER_EPOCH_CHECKPOINT: &str = "leader-epoch-checkpoint";
/// Name of the file of high watermarks in the data directory.
pub const HIGH_WATERMARK_CHECKPOINT: &str = "replication-offset-checkpoint";
/// Name of the file of log start offsets in the data directory.
pub const LOG_START_CHECKPOINT: &str = "log-start-offset-checkpoint";

/// The files of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentFile {
    /// Record batches.
    Log,
    /// Offsets to positions.
    Index,
    /// Timestamps to offsets.
    TimeIndex,
}

impl SegmentFile {
    /// Returns the file name's extension.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Index => "index",
            Self::TimeIndex => "timeindex",
        }
    }
}

/// Returns the directory of a partition: `DATA_DIR/TOPIC-PARTITION`.
pub fn partition_dir(data_dir: &Path, topic: &str, partition: u32) -> PathBuf {
    data_dir.join(format!("{topic}-{partition}"))
}

/// Returns topic and partition of a partition's directory, `None` for other names.
pub fn parse_partition_dir(dir: &Path) -> Option<(&str, u32)> {
    let (topic, partition) = dir.file_name()?.to_str()?.rsplit_once('-')?;
    (!topic.is_empty()).then_some((topic, partition.parse().ok()?))
}

/// Returns the path of a segment's file: its base offset in 20 digits and an extension.
///
/// # Panics
///
/// If `base_offset` is negative: no segment begins there.
pub fn segment_path(dir: &Path, base_offset: i64, file: SegmentFile) -> PathBuf {
    assert!(base_offset >= 0, "a segment begins at offset 0 or later");
    dir.join(format!("{base_offset:020}.{}", file.extension()))
}

/// Returns base offset and kind of a segment's file.
///
/// A prefix before the 20 digits is accepted if a `-` ends it, as in `backup-00000000000000000000.log`.
///
/// # Errors
///
/// [`SegmentError::Name`] for any other name.
pub fn parse_segment_path(path: &Path) -> Result<(i64, SegmentFile), SegmentError> {
    let parse = || {
        let file = match path.extension()?.to_str()? {
            "log" => SegmentFile::Log,
            "index" => SegmentFile::Index,
            "timeindex" => SegmentFile::TimeIndex,
            _ => return None,
        };
        let stem = path.file_stem()?.to_str()?;
        let digits = stem.rsplit_once('-').map_or(stem, |(_, digits)| digits);
        let is_offset = digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit());
        Some((is_offset.then(|| digits.parse().ok())??, file))
    };
    parse().ok_or_else(|| SegmentError::Name {
        path: path.to_owned(),
    })
}

/// Returns the base offsets of the segments in `dir`, ascending; none if `dir` does not exist.
///
/// # Errors
///
/// [`SegmentError::Io`] if the directory cannot be read; [`SegmentError::Name`] for a `.log` file
/// with another name, which may hold records that somebody misses.
pub fn list_segments(dir: &Path) -> Result<Vec<i64>, SegmentError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.map_err(SegmentError::io(IoOp::Open, dir))?,
    };
    let mut base_offsets = Vec::new();
    for entry in entries {
        let path = entry.map_err(SegmentError::io(IoOp::Read, dir))?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            let (base_offset, file) = parse_segment_path(&path)?;
            if segment_path(dir, base_offset, file) != path {
                return Err(SegmentError::Name { path });
            }
            base_offsets.push(base_offset);
        }
    }
    base_offsets.sort_unstable();
    Ok(base_offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        let dir = partition_dir(Path::new("data"), "a-b", 7);
        assert_eq!(dir, Path::new("data/a-b-7"));
        assert_eq!(parse_partition_dir(&dir), Some(("a-b", 7)));
        assert_eq!(parse_partition_dir(Path::new("data/-7")), None);
        let path = segment_path(&dir, 5194, SegmentFile::TimeIndex);
        assert_eq!(path, Path::new("data/a-b-7/00000000000000005194.timeindex"));
        assert_eq!(
            parse_segment_path(&path).unwrap(),
            (5194, SegmentFile::TimeIndex)
        );
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "1.log",
            "00000000000000000000.txt",
            "99999999999999999999.log",
            ".log",
        ] {
            assert!(parse_segment_path(Path::new(name)).is_err(), "{name}");
        }
        let prefixed = Path::new("plain-00000000000000000003.log");
        assert_eq!(parse_segment_path(prefixed).unwrap(), (3, SegmentFile::Log));
    }
}
