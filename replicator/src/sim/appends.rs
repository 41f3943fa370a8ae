//! Appends: taken, stalled, answered or refused.

use std::collections::VecDeque;

use super::check::Acker;
use super::clients::Append;
use super::process::Process;
use super::verbs::Backing;
use super::{Site, Violation, World};
use crate::control::Acks;
use crate::partition::AppendError;

/// Appends that wait for an image at most.
const STALLED_MAX: usize = 8;

/// Appends that wait for an image.
pub(super) type Stalled = VecDeque<Append>;

/// A batch that is appended and not answered yet.
#[derive(Debug)]
pub(super) struct Waiting {
    append: Append,
    base_offset: i64,
    end_offset: i64,
}

impl World {
    pub(super) fn append(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        append: Append,
    ) -> Result<(), Violation> {
        let site = Site {
            node: n,
            partition: append.partition,
        };
        let is_poisoned = self.store(site).disk.is_poisoned;
        let stalled = &mut p.held[site.partition].stalled;
        if stalled.len() >= STALLED_MAX || is_poisoned && append.acks == Acks::Durable {
            self.answer(site, &append, Err(()));
        } else if stalled.is_empty() {
            self.try_append(site, p, now, append)?;
        } else {
            stalled.push_back(append);
        }
        Ok(())
    }

    /// Appends a batch, or stalls it until there is an image; says whether others may follow.
    fn try_append(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        mut append: Append,
    ) -> Result<bool, Violation> {
        let held = &mut p.held[site.partition];
        let Some(leader) = held.replica.leader_mut() else {
            self.answer(site, &append, Err(()));
            return Ok(true);
        };
        let placement = match leader.append(now, append.acks, &mut append.batch) {
            Ok(placement) => placement,
            Err(AppendError::NoImage) => {
                held.stalled.push_front(append);
                return Ok(false);
            }
            Err(AppendError::NotLeader(_) | AppendError::NotEnoughReplicas { .. }) => {
                self.answer(site, &append, Err(()));
                return Ok(true);
            }
            Err(error) => return Err(Violation(format!("an append failed: {error}"))),
        };
        let bytes = append.batch.as_bytes();
        let at = placement.byte_position as usize;
        let image = self
            .store_mut(site)
            .memory
            .images
            .get_mut(&placement.image_id)
            .expect("it is being appended to");
        image.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let backing = Backing::Image {
            partition: site.partition,
            id: placement.image_id,
        };
        self.verbs.store(site.node, backing, at, bytes);
        let (producer, number, offset) = (append.producer, append.number, placement.base_offset);
        self.note(|| format!("{site}: append {number} of producer {producer} at offset {offset}"));
        self.oracles[site.partition].appended(append.batch.as_bytes());
        held.waiting.push_back(Waiting {
            append,
            base_offset: placement.base_offset,
            end_offset: placement.end_offset,
        });
        Ok(true)
    }

    /// Answers those whose records are where they were asked to be.
    pub(super) fn commit(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
    ) -> Result<(), Violation> {
        loop {
            let held = &mut p.held[site.partition];
            let Some(leader) = held.replica.leader() else {
                return Ok(());
            };
            let (replicated, durable) = (leader.high_watermark(), leader.durable_offset());
            let acker = Acker {
                site,
                epoch: leader.log().leader_epoch(),
            };
            let is_done = |waiting: &Waiting| match waiting.append.acks {
                Acks::Leader => true,
                Acks::Replicated => waiting.end_offset <= replicated,
                Acks::Durable => waiting.end_offset <= durable,
            };
            while let Some(at) = held.waiting.iter().position(is_done) {
                let done = held.waiting.remove(at).expect("found above");
                let bytes = done.append.batch.as_bytes();
                self.check_acked(acker, done.base_offset, done.append.acks, bytes)?;
                self.answer(site, &done.append, Ok(done.base_offset));
            }
            let Some(append) = held.stalled.pop_front() else {
                return Ok(());
            };
            if !self.try_append(site, p, now, append)? {
                return Ok(());
            }
        }
    }

    /// The node leads no more: whoever waits is told so.
    pub(super) fn stop_leading(&mut self, site: Site, p: &mut Process) {
        let held = &mut p.held[site.partition];
        let waiting = held.waiting.drain(..).map(|waiting| waiting.append);
        for append in waiting.chain(held.stalled.drain(..)).collect::<Vec<_>>() {
            self.answer(site, &append, Err(()));
        }
    }

    /// The device has failed: whoever waits for it is told so.
    pub(super) fn refuse_durable(&mut self, site: Site, p: &mut Process) {
        let is_durable = |waiting: &Waiting| waiting.append.acks == Acks::Durable;
        let held = &mut p.held[site.partition];
        let (refused, kept): (VecDeque<_>, _) = held.waiting.drain(..).partition(is_durable);
        held.waiting = kept;
        for waiting in refused {
            self.answer(site, &waiting.append, Err(()));
        }
    }
}
