//! From a lane to the stream: fence, truncation, and the images that a follower grants.

use super::progress::{Progress, Stuck, Target, source};
use super::{Command, FollowerState, GrantAsk, GrantReply, Leader};
use crate::coordinator::MemoryId;
use crate::epoch::Report;
use crate::faults::{Fault, is_injected};
use crate::image::{FilePlace, ImageId, ImageState};
use crate::table::BASE_OFFSET_UNKNOWN;

impl Leader {
    /// The lowest base offset of our images that a follower still needs.
    pub(super) fn hold_from(&self) -> i64 {
        let wanted = self.followers.iter().flat_map(Progress::wanted);
        let bases = wanted
            .filter_map(|id| self.log.image(id))
            .map(ImageState::base_offset);
        bases.min().unwrap_or(i64::MAX)
    }

    /// When a follower needs attention without an event.
    pub(super) fn follower_due(&self, follower: usize) -> Option<u64> {
        let f = &self.followers[follower];
        match f.state {
            FollowerState::Stuck { retry_at, .. } => Some(retry_at),
            // With chains on their way the completion brings us back; in a sealed image the next
            // grant does.
            FollowerState::Streaming if f.in_flight.is_empty() => {
                let target = f.targets.front()?;
                let image = source(&self.log, &f.cold, target.image_id)?;
                f.watermark_due.filter(|_| !image.is_sealed())
            }
            _ => None,
        }
    }

    /// A lane to a follower is up, under a session that no earlier lane to it had. Its node has this memory.
    pub fn handle_lane_up(&mut self, follower: usize, session: u64, memory_id: MemoryId) {
        let f = &mut self.followers[follower];
        f.reset(&mut self.commands);
        f.void = 0;
        f.session = session;
        f.sequence = 0;
        f.sync_asked = 0;
        f.is_hung = false;
        f.is_lossy = false;
        if f.memory_id != Some(memory_id) {
            // What it had it has lost.
            f.memory_id = Some(memory_id);
            f.acked = 0;
            f.durable = 0;
        }
        self.isr.is_look_due = true;
        self.begin(follower);
    }

    /// The lane of this session is lost: whatever was on its way has an unknown outcome.
    pub fn handle_lane_down(&mut self, now: u64, follower: usize, session: u64) {
        self.note_caught_up(now);
        let f = &mut self.followers[follower];
        if f.session == session {
            f.reset(&mut self.commands);
            f.state = FollowerState::Down;
        }
    }

    /// Has a follower fence its log, so that the two can be compared.
    pub(super) fn begin(&mut self, follower: usize) {
        let f = &mut self.followers[follower];
        f.reset(&mut self.commands);
        f.state = FollowerState::Revoking;
        self.commands.push_back(Command::RequestRevoke { follower });
    }

    /// The follower has revoked, or has cut, and says what it holds.
    pub fn handle_report(&mut self, follower: usize, session: u64, report: &Report) {
        let log = &self.log;
        let cut = log
            .epochs()
            .cut_for(log.log_start_offset(), log.log_end_offset(), report);
        let f = &mut self.followers[follower];
        let is_asked = matches!(
            f.state,
            FollowerState::Revoking | FollowerState::Truncating(_)
        );
        if f.session != session || !is_asked {
            return;
        }
        // A member of the ISR has everything that is committed.
        f.is_lossy |= report.log_end_offset < self.high_watermark;
        f.acked = f.acked.min(report.log_end_offset);
        self.isr.is_look_due |= f.is_lossy;
        match cut.filter(|_| !is_injected(Fault::NoTruncation)) {
            Some(cut) => {
                f.state = FollowerState::Truncating(cut);
                self.commands
                    .push_back(Command::RequestTruncate { follower, cut });
            }
            None => self.ask_from_current(follower),
        }
    }

    /// The follower would not revoke or truncate.
    ///
    /// If it knows a higher epoch, so does the cluster: the caller must depose us.
    pub fn handle_refused(&mut self, now: u64, follower: usize, session: u64, cause: String) {
        let f = &mut self.followers[follower];
        let is_asked = matches!(
            f.state,
            FollowerState::Revoking | FollowerState::Truncating(_)
        );
        if f.session == session && is_asked {
            f.stuck(now, self.config.retry_delay_ns, Stuck::Refused(cause));
        }
    }

    /// Images that were read from the files for followers.
    pub(crate) fn cold_image_ids(&self) -> Vec<ImageId> {
        let cold = self.followers.iter().flat_map(|f| &f.cold);
        cold.map(ImageState::id).collect()
    }

    pub(super) fn ask_from_current(&mut self, follower: usize) {
        match self.log.current().map(ImageState::id) {
            Some(id) => self.ask(follower, id),
            None => self.followers[follower].state = FollowerState::Waiting,
        }
    }

    /// Asks for an image of ours, live or cold, as the one to continue in.
    fn ask(&mut self, follower: usize, id: ImageId) {
        let f = &mut self.followers[follower];
        let image = source(&self.log, &f.cold, id).expect("asked for an image that exists");
        let ask = ask_for(image);
        f.state = FollowerState::Asked(ask);
        self.commands
            .push_back(Command::RequestGrant { follower, ask });
    }

    /// The follower's answer to a grant request.
    pub fn handle_grant(&mut self, now: u64, follower: usize, session: u64, reply: &GrantReply) {
        let f = &mut self.followers[follower];
        if f.session != session {
            return;
        }
        f.entry = (reply.entry_addr, reply.entry_rkey);
        match f.state.clone() {
            FollowerState::Asked(ask) if ask.image_id == reply.image_id => {
                self.start(now, follower, &ask, reply);
            }
            FollowerState::Streaming if f.asked_next == Some(reply.image_id) => {
                f.asked_next = None;
                if reply.len == self.log.config().image_len {
                    f.targets.push_back(Target::of(reply));
                } else {
                    self.begin(follower);
                }
            }
            _ => {}
        }
        self.advance_high_watermark(now);
    }

    /// The follower would not grant an image.
    pub fn handle_grant_refused(
        &mut self,
        now: u64,
        follower: usize,
        session: u64,
        image_id: ImageId,
        cause: String,
    ) {
        let f = &mut self.followers[follower];
        let is_asked = f.wanted().any(|id| id == image_id)
            && !f.targets.iter().any(|t| t.image_id == image_id);
        if f.session == session && is_asked {
            f.reset(&mut self.commands);
            f.stuck(now, self.config.retry_delay_ns, Stuck::Refused(cause));
        }
    }

    /// Starts to send where the follower's log ends, or lower at the last mark before.
    fn start(&mut self, now: u64, follower: usize, ask: &GrantAsk, reply: &GrantReply) {
        let retry_delay_ns = self.config.retry_delay_ns;
        let end = reply.log_end_offset;
        let f = &mut self.followers[follower];
        if reply.len == 0 {
            self.start_lower(now, follower, ask, end);
            return;
        }
        let Some(image) = source(&self.log, &f.cold, reply.image_id) else {
            self.begin(follower);
            return;
        };
        let mark = image.mark_at_or_before(reply.byte_position);
        let is_ours = reply.len == image.len()
            && reply.byte_position <= image.end().byte_position
            && mark.end_offset <= end;
        if !is_ours {
            f.stuck(now, retry_delay_ns, Stuck::Diverged { follower: end });
            return;
        }
        f.targets.push_back(Target::of(reply));
        f.at = mark;
        // What lies between the mark and its end is sent, and acknowledged, again.
        f.acked = mark.end_offset;
        f.watermark_due = Some(now);
        f.state = FollowerState::Streaming;
        self.note_progress(now, follower);
        self.request_next(follower);
    }

    /// The follower's log ends before the image begins: take an older one, or read it from the files.
    fn start_lower(&mut self, now: u64, follower: usize, ask: &GrantAsk, end: i64) {
        let retry_delay_ns = self.config.retry_delay_ns;
        let f = &mut self.followers[follower];
        if end >= ask.base_offset {
            let cause = "it has no room for the image".to_owned();
            f.stuck(now, retry_delay_ns, Stuck::Refused(cause));
        } else if end < self.log.log_start_offset() {
            // Retention has been faster than the follower; it is told where to start.
            self.begin(follower);
        } else if let Some(id) = self.log.image_of_offset(end).map(ImageState::id) {
            self.ask(follower, id);
        } else {
            let id = self.load(follower, end);
            self.followers[follower].state = FollowerState::Loading(id);
        }
    }

    fn load(&mut self, follower: usize, offset: i64) -> ImageId {
        let id = self.log.name_image();
        let limit_offset = self.log.memory_start_offset();
        self.commands.push_back(Command::LoadCold {
            follower,
            id,
            offset,
            limit_offset,
        });
        id
    }

    /// A cold image has been made.
    pub fn handle_cold_loaded(&mut self, follower: usize, image: ImageState) {
        let id = image.id();
        let f = &mut self.followers[follower];
        if f.state == FollowerState::Loading(id) {
            f.cold.push(image);
            self.ask(follower, id);
        } else if f.loading_next == Some(id) {
            f.loading_next = None;
            f.asked_next = Some(id);
            let place = image.place();
            let ask = GrantAsk {
                base_offset: BASE_OFFSET_UNKNOWN,
                place: place_of_next(place.segment_base_offset, place.file_position == 0),
                ..ask_for(&image)
            };
            f.cold.push(image);
            self.commands
                .push_back(Command::RequestGrant { follower, ask });
        } else {
            self.commands.push_back(Command::ReleaseImage(id));
        }
    }

    /// A cold image cannot be made.
    pub fn handle_cold_failed(&mut self, now: u64, follower: usize, id: ImageId, cause: String) {
        let f = &mut self.followers[follower];
        if f.state == FollowerState::Loading(id) || f.loading_next == Some(id) {
            f.reset(&mut self.commands);
            f.stuck(now, self.config.retry_delay_ns, Stuck::Unreadable(cause));
        }
    }

    pub(super) fn request_grants(&mut self) {
        for follower in 0..self.followers.len() {
            self.request_next(follower);
        }
    }

    /// Asks for the image after the one being sent once half of that is behind us.
    pub(super) fn request_next(&mut self, follower: usize) {
        let f = &self.followers[follower];
        let is_settled = f.targets.len() > 1 || f.asked_next.is_some() || f.loading_next.is_some();
        if f.state != FollowerState::Streaming || is_settled {
            return;
        }
        let Some(image) = f
            .targets
            .front()
            .and_then(|t| source(&self.log, &f.cold, t.image_id))
        else {
            return;
        };
        if f.at.byte_position < image.len() / 2 && f.at != image.end() {
            return;
        }
        let end_offset = image.end().end_offset;
        // The follower learns the base offset when it gets there.
        let segment = image.place().segment_base_offset;
        let after = |id, starts_segment| GrantAsk {
            image_id: id,
            base_offset: BASE_OFFSET_UNKNOWN,
            place: place_of_next(segment, starts_segment),
            image_len: image.len(),
        };
        let ask = if image.is_sealed() {
            let next = self.log.image_of_offset(end_offset);
            let next = next.filter(|next| next.base_offset() == end_offset);
            next.map(|next| after(next.id(), next.place().file_position == 0))
        } else {
            let next = self.log.next().filter(|_| image.is_half_full());
            next.map(|new| after(new.id, new.starts_segment))
        };
        if let Some(ask) = ask {
            self.followers[follower].asked_next = Some(ask.image_id);
            self.commands
                .push_back(Command::RequestGrant { follower, ask });
        } else if image.is_sealed() {
            let id = self.load(follower, end_offset);
            self.followers[follower].loading_next = Some(id);
        }
    }
}

/// What is said of the place of an image that follows the present one.
fn place_of_next(segment_base_offset: i64, starts_segment: bool) -> FilePlace {
    FilePlace {
        segment_base_offset: if starts_segment {
            BASE_OFFSET_UNKNOWN
        } else {
            segment_base_offset
        },
        file_position: 0,
    }
}

fn ask_for(image: &ImageState) -> GrantAsk {
    GrantAsk {
        image_id: image.id(),
        base_offset: image.base_offset(),
        place: image.place(),
        image_len: image.len(),
    }
}
