//! Which images consumers are granted, and until when those stay.

use super::World;
use super::jobs::{Registered, reader_name};
use super::storage::IMAGE_LEN;
use super::verbs::Backing;
use crate::consumer::Granted;
use crate::image::{ImageId, Mark};

impl World {
    /// Grants a consumer the image that holds an offset: one in memory, or a copy of file bytes.
    pub(super) fn grant_image(
        &mut self,
        n: usize,
        consumer: usize,
        offset: i64,
    ) -> Option<Granted> {
        let p = self.machines[n].process.as_mut()?;
        let (range, live) = if let Some(leader) = p.replica.leader_mut() {
            let log = leader.log();
            let image = log.image_of_offset(offset);
            let mark = image.map(|image| (image.id(), image.mark_for_offset(offset)));
            (log.log_start_offset()..=log.log_end_offset(), mark)
        } else {
            let follower = p.replica.follower_mut()?;
            let image = follower.image_of_offset(offset);
            let mark = image.map(|(id, base_offset)| (id, Mark::start(base_offset)));
            (
                follower.log_start_offset()..=follower.log_end_offset(),
                mark,
            )
        };
        if !range.contains(&offset) {
            return None;
        }
        let live = live.filter(|(id, _)| p.images.contains_key(id));
        let (id, mark, len) = match live {
            Some((id, mark)) => (id, mark, IMAGE_LEN - mark.byte_position),
            None => self.load_for_reading(n, offset)?,
        };
        let p = self.machines[n].process.as_mut()?;
        let image = p.images.get_mut(&id)?;
        image.pins += 1;
        let (addr, rkey) = image.read;
        let before = p.granted.insert(consumer, id);
        self.unpin(n, before);
        Some(Granted {
            base_offset: mark.end_offset,
            addr: addr + u64::from(mark.byte_position),
            rkey,
            len,
        })
    }

    fn load_for_reading(&mut self, n: usize, offset: i64) -> Option<(ImageId, Mark, u32)> {
        let machine = &mut self.machines[n];
        let p = machine.process.as_mut()?;
        p.loaded_count += 1;
        let id = reader_name(p.loaded_count);
        let (state, bytes) = machine.disk.load(id, offset, i64::MAX)?;
        machine.memory.make(id, &bytes, false, true);
        let read = p
            .nic
            .register(Backing::Image(id), bytes.len() as u64, false);
        let image = Registered {
            write: None,
            read,
            pins: 0,
            is_released: true,
        };
        p.images.insert(id, image);
        Some((
            id,
            Mark::start(state.base_offset()),
            state.end().byte_position,
        ))
    }

    /// A consumer has gone, or reads elsewhere.
    pub(super) fn forget_consumer(&mut self, n: usize, consumer: usize) {
        let process = self.machines[n].process.as_mut();
        let before = process.and_then(|p| p.granted.remove(&consumer));
        self.unpin(n, before);
    }

    fn unpin(&mut self, n: usize, id: Option<ImageId>) {
        let Some(id) = id else { return };
        let Some(mut p) = self.machines[n].process.take() else {
            return;
        };
        if let Some(image) = p.images.get_mut(&id) {
            image.pins -= 1;
            if image.is_released {
                self.release(n, &mut p, id);
            }
        }
        self.machines[n].process = Some(p);
    }
}
