//! What has arrived: tails are looked at, and batches copied to the files.

use super::{Command, Drain, Fault, Follower, Hosted, LOOK_DELAY_MIN_NS, Phase, RETRY_DELAY_NS};
use crate::image::{FilePlace, Mark};
use crate::table::Tail;

/// How long tails that do not move wait to be looked at, in nanoseconds.
const LOOK_DELAY_MAX_NS: u64 = 500_000_000;

impl Follower {
    /// Looks at the newest whole tail of our table entry.
    ///
    /// It counts while the partition is open: what a fence finds is read by its scan.
    pub fn handle_entry(&mut self, now: u64, tail: Option<Tail>) {
        if self.phase != Phase::Open {
            return;
        }
        let is_news = tail.is_some() && tail != self.tail;
        self.look_delay = if is_news {
            LOOK_DELAY_MIN_NS
        } else {
            (self.look_delay * 2).min(LOOK_DELAY_MAX_NS)
        };
        // The followers of a node look at the same moments, so that it is woken once for all of them.
        self.look_due = (now / self.look_delay + 1) * self.look_delay;
        if let Some(tail) = tail.filter(|_| is_news) {
            match self.check_tail(&tail) {
                Ok(true) => self.accept(tail),
                Ok(false) => {}
                Err(cause) => self.fault = Some(Fault::Tail(cause)),
            }
        }
        self.drain(now);
    }

    /// Whether a tail is the present leader's (an old one is no fault), and fits what was granted.
    fn check_tail(&self, tail: &Tail) -> Result<bool, String> {
        if (tail.leader_epoch, tail.session) != (self.granted.0, self.session) {
            return Ok(false);
        }
        let position = |id| self.images.iter().position(|image| image.id == id);
        let Some(index) = position(tail.image_id) else {
            return Err(format!("{} is not granted", tail.image_id));
        };
        if self.images[index].done_at.is_some() {
            return Ok(false);
        }
        if tail.byte_position > self.config.image_len {
            return Err(format!(
                "byte position {} is outside the image",
                tail.byte_position
            ));
        }
        if tail.log_end_offset < self.log_end_offset {
            return Err(format!(
                "log end offset fell from {} to {}",
                self.log_end_offset, tail.log_end_offset
            ));
        }
        let before = self
            .tail
            .and_then(|before| Some((position(before.image_id)?, before)));
        let drained = self.images[index].drained.byte_position;
        let floor = before.map_or((index, drained), |(i, before)| (i, before.byte_position));
        if (index, tail.byte_position) < floor {
            return Err(format!("byte position {} lies behind", tail.byte_position));
        }
        Ok(true)
    }

    fn accept(&mut self, tail: Tail) {
        self.log_end_offset = tail.log_end_offset;
        self.high_watermark = self.high_watermark.max(tail.high_watermark);
        self.log_start_offset = self.log_start_offset.max(tail.log_start_offset);
        self.tail = Some(tail);
        if matches!(self.fault, Some(Fault::Tail(_))) {
            self.fault = None;
        }
    }

    /// Hands out the next piece to be drained, one at a time.
    pub(super) fn drain(&mut self, now: u64) {
        let is_stopped = matches!(self.fault, Some(Fault::Corrupt(_)));
        let is_free = self.phase == Phase::Open && !self.is_draining && !is_stopped;
        let Some(tail) = self.tail.filter(|_| is_free) else {
            return;
        };
        let mut images = self.images.iter().enumerate();
        let Some((index, image)) = images.find(|(_, image)| image.done_at.is_none()) else {
            return;
        };
        let Some((_, place)) = image.begin else {
            return;
        };
        let (image_id, from) = (image.id, image.drained);
        let is_tails = |image: &Hosted| image.id == tail.image_id;
        let to = match self.images.iter().position(is_tails) {
            Some(at) if at == index => Some(Mark {
                byte_position: tail.byte_position,
                end_offset: tail.log_end_offset,
                header_crc: tail.header_crc,
            }),
            // The log goes on in a later image, so this one is complete.
            Some(at) if at > index => None,
            // The log ends where this image begins.
            _ => return,
        };
        if to == Some(from) {
            if tail.is_sealed() {
                self.finish(now);
            }
            return;
        }
        self.is_draining = true;
        self.commands.push_back(Command::Drain(Drain {
            image_id,
            place,
            from,
            to,
        }));
    }

    /// A drain job is done: the batches end at `end`, and the files too.
    pub fn handle_drained(&mut self, now: u64, job: &Drain, end: Mark) {
        self.is_draining = false;
        if matches!(self.fault, Some(Fault::Files(_))) {
            self.fault = None;
        }
        let open = self
            .images
            .iter_mut()
            .find(|image| image.id == job.image_id);
        if let Some(image) = open.filter(|image| image.done_at.is_none()) {
            image.drained = end;
            let file_position = job.place.file_position + u64::from(end.byte_position);
            self.files = (
                end.end_offset,
                FilePlace {
                    file_position,
                    ..job.place
                },
            );
            if job.to.is_none() {
                self.finish(now);
            }
        }
        self.drain(now);
        self.answer(now);
        self.request_sync();
    }

    /// A drain job failed. If the bytes were not as the tail says, nothing further is drained.
    pub fn handle_drain_failed(&mut self, now: u64, fault: Fault) {
        self.is_draining = false;
        self.fault = Some(fault);
        self.look_due = now + RETRY_DELAY_NS;
    }

    /// The oldest open image is drained to its end.
    fn finish(&mut self, now: u64) {
        if let Some(done) = self.images.iter_mut().find(|image| image.done_at.is_none()) {
            done.done_at = Some(now);
        }
        self.begin_next();
    }

    /// Once all before it is drained, the oldest open image begins where the files end.
    pub(super) fn begin_next(&mut self) {
        let (files_end, end) = self.files;
        let mut open = self
            .images
            .iter_mut()
            .filter(|image| image.done_at.is_none());
        if let Some(image) = open.next()
            && image.begin.is_none()
        {
            let segment = image.segment_base_offset;
            if segment >= 0 && segment != end.segment_base_offset {
                let cause =
                    format!("the leader's image is in segment {segment}, our files end at {end:?}");
                self.fault = Some(Fault::Corrupt(cause));
                return;
            }
            let place = end.next(files_end, segment < 0);
            image.begin = Some((files_end, place));
            image.drained = Mark::start(files_end);
        }
        self.describe();
    }
}
