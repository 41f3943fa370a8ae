//! The data path: the next chain for a follower, and what its completion says.

use super::progress::{Chain, Target, source};
use super::{Command, DataWrite, FollowerState, Leader, Post};
use crate::image::Mark;
use crate::table::{SEALED, Tail, tail_byte_offset};

impl Leader {
    /// The next chain for a follower; `None` until something happens or time passes.
    ///
    /// The caller must have room for two work requests on the lane.
    pub fn poll_post(&mut self, now: u64, follower: usize) -> Option<Post> {
        let f = &self.followers[follower];
        if f.state != FollowerState::Streaming || f.in_flight.len() >= self.config.chains_max {
            return None;
        }
        loop {
            let f = &self.followers[follower];
            let target = *f.targets.front()?;
            let image = source(&self.log, &f.cold, target.image_id)?;
            let room = self.config.window_len.saturating_sub(f.in_flight_len);
            let len_max = room.min(self.config.chain_len_max);
            let is_end = f.at == image.end();
            if !is_end {
                let cut = image.cut(f.at.byte_position, len_max, f.in_flight.is_empty())?;
                let is_sealed = image.is_sealed() && cut == image.end();
                return Some(self.chain(follower, target, cut, is_sealed));
            }
            if !image.is_sealed() {
                let is_due = f.watermark_due.is_some_and(|due| due <= now);
                let at = f.at;
                return is_due.then(|| self.chain(follower, target, at, false));
            }
            if !f.is_sealed_sent {
                let at = f.at;
                return Some(self.chain(follower, target, at, true));
            }
            self.next_target(follower)?;
        }
    }

    /// Moves on to the next image, if it has been granted.
    fn next_target(&mut self, follower: usize) -> Option<()> {
        let f = &mut self.followers[follower];
        let next = *f.targets.get(1)?;
        let base_offset = source(&self.log, &f.cold, next.image_id)?.base_offset();
        let done = f.targets.pop_front()?;
        f.at = Mark::start(base_offset);
        f.is_sealed_sent = false;
        if let Some(i) = f.cold.iter().position(|image| image.id() == done.image_id) {
            f.cold.swap_remove(i);
            self.commands
                .push_back(Command::ReleaseImage(done.image_id));
        }
        Some(())
    }

    fn chain(&mut self, follower: usize, target: Target, to: Mark, is_sealed: bool) -> Post {
        let told_log_start = self.told_log_start();
        let f = &mut self.followers[follower];
        let from = f.at.byte_position;
        let len = to.byte_position - from;
        let data = (len > 0).then(|| DataWrite {
            image_id: target.image_id,
            range: from..to.byte_position,
            remote_addr: target.addr + u64::from(from),
            rkey: target.rkey,
        });
        f.sequence = f.sequence.wrapping_add(1);
        let high_watermark = self.high_watermark.min(to.end_offset);
        let tail = Tail {
            image_id: target.image_id,
            session: f.session,
            leader_epoch: self.log.leader_epoch(),
            sequence: f.sequence,
            log_end_offset: to.end_offset,
            high_watermark,
            log_start_offset: told_log_start.min(high_watermark),
            byte_position: to.byte_position,
            header_crc: to.header_crc,
            flags: if is_sealed { SEALED } else { 0 },
        };
        f.at = to;
        f.is_sealed_sent |= is_sealed;
        f.in_flight.push_back(Chain {
            end_offset: to.end_offset,
            len,
        });
        f.in_flight_len += len;
        if high_watermark == self.high_watermark {
            f.watermark_due = None;
        }
        let post = Post {
            leader_epoch: tail.leader_epoch,
            data,
            tail: tail.encode(),
            tail_addr: f.entry.0 + tail_byte_offset(tail.sequence) as u64,
            tail_rkey: f.entry.1,
        };
        self.request_next(follower);
        post
    }

    /// The oldest chain of an epoch on its way to a follower has been acknowledged.
    ///
    /// Of another epoch, as of another session, it says nothing.
    pub fn handle_completion(
        &mut self,
        now: u64,
        follower: usize,
        session: u64,
        leader_epoch: i32,
    ) {
        let f = &mut self.followers[follower];
        if f.session != session || leader_epoch != self.log.leader_epoch() {
            return;
        }
        if f.void > 0 {
            f.void -= 1;
            return;
        }
        let Some(chain) = f.in_flight.pop_front() else {
            return;
        };
        f.in_flight_len -= chain.len;
        f.acked = f.acked.max(chain.end_offset);
        self.note_progress(now, follower);
        self.advance_high_watermark(now);
        self.request_syncs();
    }
}
