//! What a start reads before anything runs, and what an orderly end leaves behind.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use transport::Mapping;

use super::checkpoints::Checkpoints;
use super::error::NodeError;
use super::files::{FilesConfig, PartitionFiles, remove_if_exists};
use super::memory::MemoryState;
use super::shared::{PartitionInfo, Shared};
use super::survivors::{Left, Survivors};
use super::writer::Writer;
use crate::partition::Stored;
use crate::segment::SegmentOptions;
use crate::table::ENTRY_LEN;

/// In a partition's directory: the operator has accepted that records are missing, until the next start
/// has succeeded.
pub(super) const LOSS_ACCEPTED: &str = "loss-accepted";

/// What a start found of one partition.
#[derive(Debug, Clone)]
pub(super) struct Recovered {
    pub(super) stored: Stored,
    /// The highest leader epoch seen, 0 if there is none.
    pub(super) leader_epoch: i32,
}

/// What a start reads before anything runs.
pub(super) struct Recovering<'a> {
    pub(super) node_id: u32,
    pub(super) shm_dir: &'a Path,
    pub(super) memory: MemoryState,
    pub(super) table: &'a Arc<Mapping>,
    pub(super) infos: &'a [PartitionInfo],
}

impl Recovering<'_> {
    /// Recovers every partition that the node holds.
    pub(super) fn run(
        &mut self,
        data_dir: &Path,
    ) -> Result<(Writer, HashMap<usize, Recovered>), NodeError> {
        let mut checkpoints = Checkpoints::read(data_dir)?;
        let mut left = Left::find(self.shm_dir)?;
        let (mut all_files, mut all) = (HashMap::new(), HashMap::new());
        for (index, info) in self.infos.iter().enumerate() {
            if info.replicas.contains(&self.node_id) {
                let (files, recovered) =
                    self.partition(index, info, &mut left, &mut checkpoints)?;
                all_files.insert(index, files);
                all.insert(index, recovered);
            }
        }
        // Before anything runs: what is known now must not be forgotten by a crash.
        checkpoints.write_all()?;
        let names = self.infos.iter().map(PartitionInfo::name).collect();
        let retentions = self.infos.iter().map(|info| info.retention).collect();
        Ok((Writer::new(all_files, checkpoints, names, retentions), all))
    }

    fn partition(
        &self,
        index: usize,
        info: &PartitionInfo,
        left: &mut Left,
        checkpoints: &mut Checkpoints,
    ) -> Result<(PartitionFiles, Recovered), NodeError> {
        let config = FilesConfig {
            dir: info.dir.clone(),
            marker: poison_marker(self.shm_dir, info),
            flush: info.flush,
            options: SegmentOptions::default(),
        };
        let name = info.name();
        let stored_start = checkpoints.log_start_offset(&name);
        let mut files = PartitionFiles::recover(config, stored_start)?;
        let survivors = Survivors::take(left, self.table, index)?;
        survivors.drain(&mut files)?;
        let tail = survivors.tail().copied();
        let known = checkpoints
            .high_watermark(&name)
            .max(tail.map_or(0, |tail| tail.high_watermark));
        let accepted = info.dir.join(LOSS_ACCEPTED);
        if let Err(missing) = survivors.check(&files, known) {
            if self.memory == MemoryState::Kept && !accepted.exists() {
                return Err(missing.into());
            }
            tracing::error!(%missing, "records are lost");
        }
        files.settle_epochs()?;
        survivors.remove()?;
        clear_entry(self.table, index)?;
        let log_start_offset = files.log_start_offset();
        let high_watermark = known.clamp(log_start_offset, files.log_end_offset());
        checkpoints.set_high_watermark(&name, high_watermark);
        checkpoints.set_log_start_offset(&name, log_start_offset);
        let seen_epoch = files
            .leader_epoch()
            .max(tail.map_or(0, |tail| tail.leader_epoch));
        remove_if_exists(&accepted)?;
        let recovered = Recovered {
            stored: files.stored(high_watermark),
            leader_epoch: seen_epoch,
        };
        tracing::info!(topic = %info.topic, partition = info.number, ?recovered, "recovered");
        Ok((files, recovered))
    }
}

/// Copies what is left in memory to the files, and removes it.
pub(super) fn drain_all(
    writer: &mut Writer,
    shared: &Shared,
    shm_dir: &Path,
) -> Result<(), NodeError> {
    let table = shared.table.mapping();
    let mut left = Left::find(shm_dir)?;
    for (&index, files) in &mut writer.files {
        let survivors = Survivors::take(&mut left, table, index)?;
        survivors.drain(files)?;
        let tail = survivors.tail().copied();
        survivors.check(files, 0)?;
        files
            .sync()
            .map_err(|fault| NodeError::storage(files.dir(), &fault))?;
        survivors.remove()?;
        if let Some(tail) = tail {
            let name = shared.partitions[index].name();
            writer
                .checkpoints
                .set_high_watermark(&name, tail.high_watermark);
        }
        clear_entry(table, index)?;
    }
    Ok(writer.checkpoints.write_all()?)
}

fn clear_entry(table: &Mapping, index: usize) -> Result<(), NodeError> {
    let at = crate::table::entry_byte_offset(index);
    Ok(table.zero(at..at + ENTRY_LEN)?)
}

fn poison_marker(shm_dir: &Path, info: &PartitionInfo) -> PathBuf {
    shm_dir.join(format!("{}-{}.poisoned", info.topic, info.number))
}
