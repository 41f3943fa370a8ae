//! The checks: what the outside may conclude from bytes and offsets.

use std::collections::{BTreeMap, BTreeSet};

use super::storage::batch_at;
use super::{Machine, Violation, World};
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
    pub(super) node: usize,
    pub(super) epoch: i32,
}

/// A batch that may not be lost.
#[derive(Clone, Debug)]
struct Kept {
    bytes: Vec<u8>,
    next_offset: i64,
    is_durable: bool,
}

/// What the outside knows.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    /// Batches that producers have sent, by the part that a leader does not change.
    known: BTreeSet<Vec<u8>>,
    /// What was acknowledged as replicated or seen by a consumer, by base offset.
    kept: BTreeMap<i64, Kept>,
    /// Which node acknowledged in an epoch.
    ackers: BTreeMap<i32, usize>,
}

/// The part of a batch that its leader does not stamp.
fn unstamped(batch: &[u8]) -> &[u8] {
    &batch[16..]
}

impl Oracle {
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

impl Machine {
    /// Whether the batch is here: in memory, or in the files.
    fn holds(&self, base_offset: i64, batch: &[u8], is_durable: bool) -> bool {
        let on_disk = self.disk.find(base_offset, is_durable) == Some(batch);
        on_disk || !is_durable && self.memory.find(base_offset).any(|found| found == batch)
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
        let Acker { node, epoch } = acker;
        let other = *self.oracle.ackers.entry(epoch).or_insert(node);
        demand!(
            other == node,
            "nodes {other} and {node} both acknowledge in epoch {epoch}"
        );
        let who = format!("node {node}, epoch {epoch}, acknowledges");
        demand!(
            self.machines[node].holds(base_offset, batch, false),
            "{who} {base_offset}, which it has not"
        );
        if acks == Acks::Leader {
            return Ok(());
        }
        self.stats.committed += 1;
        self.commit_batch(base_offset, batch, acks == Acks::Durable, &who)
    }

    /// A batch is committed, as somebody says: every member must have it.
    fn commit_batch(
        &mut self,
        base_offset: i64,
        batch: &[u8],
        is_durable: bool,
        who: &str,
    ) -> Result<(), Violation> {
        if !self.oracle.keep(batch, is_durable, who)? && !is_durable {
            return Ok(());
        }
        for n in 0..self.machines.len() {
            demand!(
                !self.is_member(n) || self.machines[n].holds(base_offset, batch, is_durable),
                "{who} offset {base_offset}, but node {n}, a member of the ISR, has not got it"
            );
        }
        Ok(())
    }

    /// A consumer was given batches, from its offset to another one.
    pub(super) fn check_delivered(
        &mut self,
        i: usize,
        from: i64,
        to: i64,
        batches: &[u8],
    ) -> Result<(), Violation> {
        let (mut at, mut due) = (0, from);
        let who = format!("consumer {i} gets");
        while at < batches.len() {
            let batch =
                batch_at(batches, at).ok_or_else(|| Violation(format!("{who} no batch")))?;
            let base_offset = batch.base_offset();
            demand!(
                base_offset == due,
                "{who} offset {base_offset} where {due} is due"
            );
            batch
                .verify_crc()
                .map_err(|error| Violation(format!("{who} {error}")))?;
            self.commit_batch(base_offset, batch.as_bytes(), false, &who)?;
            due = batch.next_offset();
            at += batch.len();
            self.stats.delivered += 1;
        }
        demand!(due == to, "{who} offsets to {due}, and goes on at {to}");
        Ok(())
    }

    /// A node begins to lead: nobody has acknowledged in its epoch before.
    pub(super) fn check_started(&mut self, n: usize, epoch: i32) -> Result<(), Violation> {
        let other = *self.oracle.ackers.entry(epoch).or_insert(n);
        demand!(
            other == n,
            "nodes {other} and {n} both lead in epoch {epoch}"
        );
        Ok(())
    }

    /// A node has read its files and its memory: what is committed must be there.
    pub(super) fn check_recovered(&self, n: usize) -> Result<(), Violation> {
        let machine = &self.machines[n];
        if !self.is_member(n) {
            return Ok(());
        }
        for (&offset, kept) in &self.oracle.kept {
            demand!(
                machine.disk.find(offset, false) == Some(&kept.bytes),
                "node {n}, a member of the ISR, has lost offset {offset}"
            );
        }
        Ok(())
    }

    /// Everything has come to rest: all replicas are equal, and hold all that was promised.
    pub(super) fn check_end(&self) -> Result<(), Violation> {
        let first = self.machines[0].disk.all();
        for (n, machine) in self.machines.iter().enumerate() {
            let bytes = machine.disk.all();
            demand!(
                bytes == first,
                "nodes 0 and {n} differ in the end: {} and {} bytes",
                first.len(),
                bytes.len()
            );
        }
        let (mut at, mut due) = (0, self.machines[0].disk.log_start_offset());
        while at < first.len() {
            let batch = batch_at(&first, at)
                .ok_or_else(|| Violation(format!("no batch at byte {at} of the log")))?;
            demand!(
                batch.base_offset() == due,
                "offset {} in the log where {due} is due",
                batch.base_offset()
            );
            due = batch.next_offset();
            at += batch.len();
        }
        let disk = &self.machines[0].disk;
        for (offset, kept) in &self.oracle.kept {
            demand!(
                disk.find(*offset, false) == Some(&kept.bytes),
                "offset {offset} is lost in the end"
            );
        }
        for (i, consumer) in self.consumers.iter().enumerate() {
            let (got, end) = (consumer.offset(), disk.log_end_offset());
            demand!(got == end, "consumer {i} has come to offset {got} of {end}");
        }
        Ok(())
    }
}
