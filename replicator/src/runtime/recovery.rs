//! What a start reads before anything runs, and what an orderly end leaves behind.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use transport::Mapping;

use super::error::NodeError;
use super::files::{PartitionFiles, Recovered};
use super::shared::{PartitionInfo, Shared};
use super::workers::Writer;
use crate::segment::{HIGH_WATERMARK_CHECKPOINT, HighWatermarks, read_high_watermarks};
use crate::table::ENTRY_LEN;

/// What a start reads before anything runs.
pub(super) struct Recovering<'a> {
    pub(super) node_id: u32,
    pub(super) shm_dir: &'a Path,
    pub(super) table: &'a Arc<Mapping>,
    pub(super) infos: &'a [PartitionInfo],
}

impl Recovering<'_> {
    /// Recovers every partition that the node holds.
    pub(super) fn run(
        &mut self,
        data_dir: &Path,
    ) -> Result<(Writer, HashMap<usize, Recovered>), NodeError> {
        let mut high_watermarks = read_high_watermarks(&data_dir.join(HIGH_WATERMARK_CHECKPOINT))?;
        let (mut all_files, mut all) = (HashMap::new(), HashMap::new());
        for (index, info) in self.infos.iter().enumerate() {
            if info.replicas.contains(&self.node_id) {
                let (files, recovered) = self.partition(index, info, &mut high_watermarks)?;
                all_files.insert(index, files);
                all.insert(index, recovered);
            }
        }
        let writer = Writer {
            files: all_files,
            data_dir: data_dir.to_owned(),
            names: self
                .infos
                .iter()
                .map(|info| (info.topic.clone(), info.number))
                .collect(),
            high_watermarks,
        };
        Ok((writer, all))
    }

    fn partition(
        &self,
        index: usize,
        info: &PartitionInfo,
        high_watermarks: &mut HighWatermarks,
    ) -> Result<(PartitionFiles, Recovered), NodeError> {
        let mut files = PartitionFiles::recover(&info.dir)?;
        let tail = files.drain_memory(self.shm_dir, self.table, index)?;
        clear_entry(self.table, index)?;
        let log_end_offset = files.log_end_offset();
        let known = high_watermarks
            .entry((info.topic.clone(), info.number))
            .or_insert(0);
        *known = (*known)
            .max(tail.map_or(0, |tail| tail.high_watermark))
            .min(log_end_offset);
        let seen_epoch = files
            .leader_epoch()
            .max(tail.map_or(0, |tail| tail.leader_epoch));
        let mut leader_epoch = seen_epoch;
        if info.leader() == self.node_id {
            // The same node starts leading again: its old tails and lanes must not be taken for new.
            leader_epoch = seen_epoch + 1;
            files.begin_epoch(leader_epoch)?;
        }
        let recovered = Recovered {
            stored: files.stored(*known),
            leader_epoch,
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
    for (&index, files) in &mut writer.files {
        let info = &shared.partitions[index];
        if let Some(tail) = files.drain_memory(shm_dir, table, index)? {
            let name = (info.topic.clone(), info.number);
            writer.high_watermarks.insert(name, tail.high_watermark);
        }
        files.sync()?;
        clear_entry(table, index)?;
    }
    writer.checkpoint();
    Ok(())
}

fn clear_entry(table: &Mapping, index: usize) -> Result<(), NodeError> {
    let at = crate::table::entry_byte_offset(index);
    Ok(table.zero(at..at + ENTRY_LEN)?)
}
