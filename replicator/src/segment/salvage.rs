//! Makes a directory that [`recover`](super::recover()) refuses one that it accepts, by giving up what
//! follows the first fault. Nothing is deleted: what is given up keeps its bytes under another name.

use std::fmt;
use std::path::{Path, PathBuf};

use super::checkpoint::sync_dir;
use super::error::{IoOp, SegmentError};
use super::layout::{LEADER_EPOCH_CHECKPOINT, SegmentFile, list_segments, segment_path};
use super::reader::SegmentReader;
use super::recover::{Obstacle, Recovery, cut_off, find_obstacle, keep_aside, recover};
use super::storage::Storage;
use super::writer::SegmentOptions;

/// What [`Salvage::carry_out`] gives up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Salvage {
    dir: PathBuf,
    obstacle: Option<Obstacle>,
    /// The offset that the files end with afterwards.
    pub log_end_offset: i64,
    /// Whether the checkpoint of leader epochs is rebuilt from the log.
    pub rebuilds_epochs: bool,
    /// Bytes that are set aside, in this many segments.
    pub dropped_len: u64,
    /// How many segments lose all or some of their bytes.
    pub segments_count: usize,
}

impl fmt::Display for Salvage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(obstacle) = &self.obstacle {
            writeln!(f, "{}", obstacle.cause)?;
            writeln!(
                f,
                "the log would end at offset {}: {} bytes in {} segment(s) would be set aside and no \
                 longer be part of it",
                self.log_end_offset, self.dropped_len, self.segments_count
            )?;
        }
        if self.rebuilds_epochs {
            writeln!(
                f,
                "{LEADER_EPOCH_CHECKPOINT} contradicts the log and would be rebuilt from it"
            )?;
        }
        Ok(())
    }
}

impl Salvage {
    /// Finds out what would have to be given up; changes nothing.
    ///
    /// # Errors
    ///
    /// [`SegmentError::Name`] for files in a foreign format, [`SegmentError::Io`].
    pub fn plan(dir: &Path, options: &SegmentOptions) -> Result<Self, SegmentError> {
        let (log_end_offset, obstacle) = find_obstacle(dir, options)?;
        let mut plan = Self {
            dir: dir.to_owned(),
            log_end_offset,
            obstacle,
            rebuilds_epochs: false,
            dropped_len: 0,
            segments_count: 0,
        };
        if let Some(obstacle) = &plan.obstacle {
            for (number, base_offset) in list_segments(dir)?.into_iter().enumerate() {
                let kept = match number.cmp(&obstacle.segment) {
                    std::cmp::Ordering::Less => continue,
                    std::cmp::Ordering::Equal => obstacle.position,
                    std::cmp::Ordering::Greater => 0,
                };
                plan.dropped_len += SegmentReader::open(dir, base_offset)?.len()? - kept;
                plan.segments_count += 1;
            }
        }
        plan.rebuilds_epochs = !super::recover::epochs_agree(dir, options, plan.log_end_offset)?;
        Ok(plan)
    }

    /// Whether nothing has to be given up.
    #[must_use]
    pub fn is_needless(&self) -> bool {
        self.obstacle.is_none() && !self.rebuilds_epochs
    }

    /// Sets aside what has been planned, and recovers the rest.
    ///
    /// # Errors
    ///
    /// As [`recover`](super::recover()). A plan made anew continues what was interrupted.
    pub fn carry_out(
        self,
        log_start_offset: i64,
        options: &SegmentOptions,
    ) -> Result<Recovery, SegmentError> {
        let storage = &*options.storage;
        if self.rebuilds_epochs {
            set_aside(storage, &self.dir.join(LEADER_EPOCH_CHECKPOINT))?;
        }
        if let Some(obstacle) = &self.obstacle {
            let base_offsets = list_segments(&self.dir)?;
            let log = |base_offset| segment_path(&self.dir, base_offset, SegmentFile::Log);
            let is_whole = obstacle.position == 0 && obstacle.segment > 0;
            let first_whole = obstacle.segment + usize::from(!is_whole);
            for &base_offset in base_offsets[first_whole..].iter().rev() {
                set_aside(storage, &log(base_offset))?;
            }
            if !is_whole {
                let log = log(base_offsets[obstacle.segment]);
                keep_aside(storage, &log, obstacle.position)?;
                cut_off(storage, &log, obstacle.position)?;
            }
        }
        recover(&self.dir, log_start_offset, options)
    }
}

/// Gives a file the name of one that is no part of the log.
fn set_aside(storage: &dyn Storage, path: &Path) -> Result<(), SegmentError> {
    let mut number = 0;
    let free = loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{number}.aside"));
        if !Path::new(&name).exists() {
            break PathBuf::from(name);
        }
        number += 1;
    };
    storage
        .rename(path, &free)
        .map_err(SegmentError::io(IoOp::Rename, path))?;
    sync_dir(storage, path.parent().unwrap_or(path))
}
