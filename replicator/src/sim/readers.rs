//! Which images consumers are granted, and until when those stay.

use super::jobs::reader_name;
use super::process::{Held, Process};
use super::storage::IMAGE_LEN;
use super::{Site, World};
use crate::consumer::Granted;
use crate::image::{ImageId, Mark};

/// A replica's answer to a consumer that asks for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Granted(Granted),
    /// Not now: it has not got the offset yet, or no memory.
    NotNow,
    /// The offset is gone; the log starts here.
    BelowStart(i64),
}

impl World {
    /// Grants a consumer the image that holds an offset: one in memory, or a copy of file bytes.
    pub(super) fn grant_image(&mut self, site: Site, consumer: usize, offset: i64) -> Answer {
        let Some(mut p) = self.machines[site.node].process.take() else {
            return Answer::NotNow;
        };
        let answer = self.grant_image_of(site, &mut p, consumer, offset);
        self.machines[site.node].process = Some(p);
        answer
    }

    fn grant_image_of(
        &mut self,
        site: Site,
        p: &mut Process,
        consumer: usize,
        offset: i64,
    ) -> Answer {
        let held = &mut p.held[site.partition];
        let (start, end) = held.offsets();
        if offset < start {
            return Answer::BelowStart(start);
        }
        if offset > end || held.is_closed {
            return Answer::NotNow;
        }
        let live = live_image(held, offset).filter(|(id, _)| held.images.contains_key(id));
        let found = match live {
            Some((id, mark)) => Some((id, mark, IMAGE_LEN - mark.byte_position)),
            None => self.load_for_reading(site, p, offset),
        };
        let Some((id, mark, len)) = found else {
            return Answer::NotNow;
        };
        let held = &mut p.held[site.partition];
        let image = held.images.get_mut(&id).expect("found above");
        image.pins += 1;
        let (addr, rkey) = image.read;
        let before = held.granted.insert(consumer, id);
        self.unpin(site, p, before);
        Answer::Granted(Granted {
            base_offset: mark.end_offset,
            addr: addr + u64::from(mark.byte_position),
            rkey,
            len,
        })
    }

    fn load_for_reading(
        &mut self,
        site: Site,
        p: &mut Process,
        offset: i64,
    ) -> Option<(ImageId, Mark, u32)> {
        if self.machines[site.node].is_short_of_memory {
            return None;
        }
        let held = &mut p.held[site.partition];
        let id = reader_name(held.loaded_count + 1);
        let (state, bytes) = self.store(site).disk.load(id, offset, i64::MAX)?;
        held.loaded_count += 1;
        self.stats.cold_reads += 1;
        self.add_image(site, p, id, &bytes, None);
        let image = p.held[site.partition].images.get_mut(&id)?;
        image.is_released = true;
        Some((
            id,
            Mark::start(state.base_offset()),
            state.end().byte_position,
        ))
    }

    /// A consumer has gone, or reads elsewhere.
    pub(super) fn forget_consumer(&mut self, site: Site, consumer: usize) {
        let Some(mut p) = self.machines[site.node].process.take() else {
            return;
        };
        let before = p.held[site.partition].granted.remove(&consumer);
        self.unpin(site, &mut p, before);
        self.machines[site.node].process = Some(p);
    }

    fn unpin(&mut self, site: Site, p: &mut Process, id: Option<ImageId>) {
        let Some(id) = id else { return };
        if let Some(image) = p.held[site.partition].images.get_mut(&id) {
            image.pins -= 1;
            if image.is_released {
                self.release(site, p, id);
            }
        }
    }
}

/// The image in memory that holds an offset, and where in it to read from.
fn live_image(held: &Held, offset: i64) -> Option<(ImageId, Mark)> {
    if let Some(leader) = held.replica.leader() {
        let image = leader.log().image_of_offset(offset)?;
        return Some((image.id(), image.mark_for_offset(offset)));
    }
    let (id, base_offset) = held.replica.follower()?.image_of_offset(offset)?;
    Some((id, Mark::start(base_offset)))
}
