//! The checks: what the outside may conclude from bytes and offsets.

use std::collections::{BTreeMap, BTreeSet};

use super::storage::batch_at;
use super::{Site, Violation, World};
use crate::control::Acks;

/// Fails with the text unless the claim holds.
macro_rules! demand {
    ($claim:expr, $($text:tt)+) => {
        if !$claim {
            return Err($crate::sim::Violation(format!($($text)+)));
        }
    };
}
pub(super) use demand;

/// Who acknowledges.
#[derive(Clone, Copy, Debug)]
pub(super) struct Acker {
    pub(super) site: Site,
    pub(super) epoch: i32,
}

/// A batch that may not be lost.
#[derive(Clone, Debug)]
struct Kept {
    bytes: Vec<u8>,
    next_offset: i64,
    is_durable: bool,
}

/// What the outside knows of a partition.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    /// Batches that producers have sent, by the part that a leader does not change.
    known: BTreeSet<Vec<u8>>,
    /// What was acknowledged as replicated or seen by a consumer, by base offset.
    kept: BTreeMap<i64, Kept>,
    /// Which node acknowledged in an epoch.
    ackers: BTreeMap<i32, usize>,
    /// Records below may be gone everywhere: some leader's retention has removed them.
    log_start: i64,
}

/// The part of a batch that its leader does not stamp.
fn unstamped(batch: &[u8]) -> &[u8] {
    &batch[16..]
}

impl Oracle {
    /// The first offset that must still be there.
    pub(super) fn log_start(&self) -> i64 {
        self.log_start
    }

    pub(super) fn appended(&mut self, batch: &[u8]) {
        self.known.insert(unstamped(batch).to_vec());
    }

    /// Everything that was not acknowledged as durable may be lost.
    pub(super) fn forget_what_was_in_memory(&mut self) {
        self.kept.retain(|_, kept| kept.is_durable);
    }

    /// A batch counts as committed from now on.
    fn keep(&mut self, batch: &[u8], is_durable: bool, who: &str) -> Result<bool, Violation> {
        let view = batch_at(batch, 0).ok_or_else(|| Violation(format!("{who}: no batch")))?;
        let (base_offset, next_offset) = (view.base_offset(), view.next_offset());
        demand!(
            self.known.contains(unstamped(batch)),
            "{who}: nobody has sent the batch at {base_offset}"
        );
        if let Some(kept) = self.kept.get_mut(&base_offset) {
            kept.is_durable |= is_durable;
            demand!(
                kept.bytes == batch,
                "{who}: offset {base_offset} is another batch than before"
            );
            return Ok(false);
        }
        let before = self.kept.range(..base_offset).next_back();
        let before = before.map_or(0, |(_, kept)| kept.next_offset);
        let after = self.kept.range(base_offset..).next();
        let after = after.map_or(i64::MAX, |(offset, _)| *offset);
        demand!(
            before <= base_offset && next_offset <= after,
            "{who}: offsets {base_offset} to {next_offset} overlap others, {before} and {after}"
        );
        let kept = Kept {
            bytes: batch.to_vec(),
            next_offset,
            is_durable,
        };
        self.kept.insert(base_offset, kept);
        Ok(true)
    }
}

impl World {
    /// A leader acknowledges a batch at this moment.
    pub(super) fn check_acked(
        &mut self,
        acker: Acker,
        base_offset: i64,
        acks: Acks,
        batch: &[u8],
    ) -> Result<(), Violation> {
        let Acker { site, epoch } = acker;
        self.check_started(site, epoch)?;
        let who = format!("{site}, epoch {epoch}, acknowledges");
        let log_start = self.oracles[site.partition].log_start;
        demand!(
            base_offset < log_start || self.store(site).holds(base_offset, batch, false),
            "{who} {base_offset}, which it has not"
        );
        if acks == Acks::Leader {
            return Ok(());
        }
        self.stats.committed += 1;
        let is_durable = acks == Acks::Durable;
        self.commit_batch(site.partition, base_offset, batch, is_durable, &who)
    }

    /// A batch is committed, as somebody says: every member must have it.
    fn commit_batch(
        &mut self,
        partition: usize,
        base_offset: i64,
        batch: &[u8],
        is_durable: bool,
        who: &str,
    ) -> Result<(), Violation> {
        let oracle = &mut self.oracles[partition];
        let is_news = oracle.keep(batch, is_durable, who)?;
        if !is_news && !is_durable || base_offset < oracle.log_start {
            return Ok(());
        }
        for node in 0..self.machines.len() {
            let site = Site { node, partition };
            demand!(
                !self.is_member(site) || self.store(site).holds(base_offset, batch, is_durable),
                "{who} offset {base_offset}, but {site}, a member of the ISR, has not got it"
            );
        }
        Ok(())
    }

    /// A consumer was given batches, from its offset to another one.
    pub(super) fn check_delivered(
        &mut self,
        i: usize,
        (from, is_first): (i64, bool),
        to: i64,
        batches: &[u8],
    ) -> Result<(), Violation> {
        let (mut at, mut due) = (0, from);
        let partition = self.consumers[i].partition();
        let who = format!("consumer {i} gets");
        while at < batches.len() {
            let batch =
                batch_at(batches, at).ok_or_else(|| Violation(format!("{who} no batch")))?;
            let base_offset = batch.base_offset();
            // A start inside of a batch brings the whole of it.
            let is_around =
                is_first && at == 0 && (base_offset..batch.next_offset()).contains(&due);
            demand!(
                base_offset == due || is_around,
                "{who} offset {base_offset} where {due} is due"
            );
            batch
                .verify_crc()
                .map_err(|error| Violation(format!("{who} {error}")))?;
            self.commit_batch(partition, base_offset, batch.as_bytes(), false, &who)?;
            due = batch.next_offset();
            at += batch.len();
            self.stats.delivered += 1;
        }
        demand!(due == to, "{who} offsets to {due}, and goes on at {to}");
        Ok(())
    }

    /// A consumer is told that what it wants is gone.
    pub(super) fn check_told(&self, i: usize, log_start: i64) -> Result<(), Violation> {
        let consumer = &self.consumers[i];
        let (offset, moved_to) = (
            consumer.offset(),
            self.oracles[consumer.partition()].log_start,
        );
        demand!(
            offset.is_none_or(|offset| offset < log_start) && log_start <= moved_to,
            "consumer {i} at {offset:?} is told that the log starts at {log_start}, it does at {moved_to}"
        );
        Ok(())
    }

    /// A node begins to lead, or acknowledges: nobody else does so in its epoch.
    pub(super) fn check_started(&mut self, site: Site, epoch: i32) -> Result<(), Violation> {
        let ackers = &mut self.oracles[site.partition].ackers;
        let other = *ackers.entry(epoch).or_insert(site.node);
        demand!(
            other == site.node,
            "node {other} and {site} both lead in epoch {epoch}"
        );
        Ok(())
    }

    /// A node is about to remove what is below an offset: every member has come so far.
    pub(super) fn check_retention(&mut self, site: Site, offset: i64) -> Result<(), Violation> {
        for node in 0..self.machines.len() {
            let member = Site { node, ..site };
            let reach = self.store(member).reach();
            demand!(
                !self.is_member(member) || offset <= reach,
                "{site} removes records below {offset}, {member} is in sync and ends at {reach}"
            );
        }
        let log_start = &mut self.oracles[site.partition].log_start;
        *log_start = offset.max(*log_start);
        Ok(())
    }

    /// A leader has given the partition to another node, which has all that it had.
    pub(super) fn check_handed_over(
        &self,
        site: Site,
        successor: usize,
        log_end: i64,
    ) -> Result<(), Violation> {
        let node = successor;
        let successor = Site { node, ..site };
        let reach = self.store(successor).reach();
        demand!(
            !self.is_member(successor) || log_end <= reach,
            "{site} hands over at {log_end} to {successor}, which ends at {reach}"
        );
        Ok(())
    }

    /// A node has read its files and its memory: what is committed must be there.
    pub(super) fn check_recovered(&self, site: Site) -> Result<(), Violation> {
        if !self.is_member(site) {
            return Ok(());
        }
        let (disk, oracle) = (&self.store(site).disk, &self.oracles[site.partition]);
        for (&offset, kept) in oracle.kept.range(oracle.log_start..) {
            demand!(
                disk.find(offset, false) == Some(&kept.bytes),
                "{site}, a member of the ISR, has lost offset {offset}"
            );
        }
        Ok(())
    }

    /// Everything has come to rest: all replicas are equal, and hold all that was promised.
    pub(super) fn check_end(&self) -> Result<(), Violation> {
        (0..self.oracles.len()).try_for_each(|partition| self.check_end_of(partition))
    }

    fn check_end_of(&self, partition: usize) -> Result<(), Violation> {
        let disks = self
            .machines
            .iter()
            .map(|machine| &machine.stores[partition].disk);
        let disks: Vec<_> = disks.collect();
        // A replica that follows a leader whose log starts lower keeps its own start.
        let start = disks.iter().map(|disk| disk.log_start_offset()).max();
        let start = start.unwrap_or(0);
        let first = disks[0].all_from(start);
        for (n, disk) in disks.iter().enumerate() {
            let bytes = disk.all_from(start);
            demand!(
                bytes == first,
                "partition {partition}: nodes 0 and {n} differ from {start} on: {} and {} bytes",
                first.len(),
                bytes.len()
            );
        }
        let (mut at, mut due) = (0, None);
        while at < first.len() {
            let batch = batch_at(&first, at)
                .ok_or_else(|| Violation(format!("no batch at byte {at} of the log")))?;
            let found = batch.base_offset();
            demand!(
                due.is_none_or(|due| due == found),
                "offset {found} in the log where {due:?} is due"
            );
            due = Some(batch.next_offset());
            at += batch.len();
        }
        let oracle = &self.oracles[partition];
        for (offset, kept) in oracle.kept.range(oracle.log_start..) {
            demand!(
                disks[0].find(*offset, false) == Some(&kept.bytes),
                "partition {partition}: offset {offset} is lost in the end"
            );
        }
        Ok(())
    }
}
