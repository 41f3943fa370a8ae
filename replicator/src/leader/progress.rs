//! What a leader knows of one follower, and what it sends next.

use std::collections::VecDeque;
use std::fmt;

use super::{Command, DataWrite, GrantAsk, GrantReply, Leader, Post};
use crate::image::{FilePlace, ImageId, ImageState, Mark};
use crate::table::{BASE_OFFSET_UNKNOWN, SEALED, Tail, tail_byte_offset};

/// What a follower is doing, as its leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FollowerState {
    /// There is no lane to it.
    Down,
    /// There is a lane, and we have no image yet ourselves.
    Waiting,
    /// It has been asked for the image it shall continue in.
    Asked(GrantAsk),
    /// The image it needs is being read from the files.
    Loading(ImageId),
    /// It gets what is appended.
    Streaming,
    /// It cannot be served; it is asked again later.
    Stuck {
        /// Why.
        cause: Stuck,
        /// When it is asked again, in nanoseconds.
        retry_at: u64,
    },
}

/// Why a follower cannot be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stuck {
    /// It holds records that we do not: we have lost our memory, or it is not of this cluster.
    Ahead {
        /// Its log end offset.
        follower: i64,
        /// Ours.
        leader: i64,
    },
    /// What it holds of the image does not end where one of our batches ends.
    Diverged {
        /// Its log end offset.
        follower: i64,
    },
    /// It needs records that the log does not hold any more.
    BelowLogStart {
        /// Its log end offset.
        follower: i64,
    },
    /// It refused the grant.
    Refused(String),
    /// The records it needs cannot be read from our files.
    Unreadable(String),
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ahead { follower, leader } => write!(
                f,
                "it holds records up to offset {follower}, the leader only to {leader}: \
                 the leader has lost records, or the follower's data is of another cluster"
            ),
            Self::Diverged { follower } => write!(
                f,
                "its log ends at offset {follower}, inside a batch of the leader's"
            ),
            Self::BelowLogStart { follower } => write!(
                f,
                "its log ends at offset {follower}, below the leader's log start"
            ),
            Self::Refused(cause) => write!(f, "it refused the image: {cause}"),
            Self::Unreadable(cause) => write!(f, "the leader's files cannot be read: {cause}"),
        }
    }
}

impl fmt::Display for FollowerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("down"),
            Self::Waiting => f.write_str("waiting for the leader's first image"),
            Self::Asked(_) => f.write_str("asked for an image"),
            Self::Loading(_) => f.write_str("catching up from the files"),
            Self::Streaming => f.write_str("streaming"),
            Self::Stuck { cause, .. } => write!(f, "stuck: {cause}"),
        }
    }
}

/// An image that the follower has granted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    image_id: ImageId,
    addr: u64,
    rkey: u32,
}

/// A chain on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chain {
    end_offset: i64,
    len: u32,
}

/// One follower.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) node: u32,
    pub(super) state: FollowerState,
    /// One past the last offset it has in memory, as far as it has acknowledged.
    pub(super) acked: i64,
    /// The lane's session; tails carry it, and acks of another are void.
    session: u64,
    sequence: u32,
    entry: (u64, u32),
    /// The image being written and, once granted, the next one.
    targets: VecDeque<Target>,
    /// The next image, asked for and not granted yet.
    asked_next: Option<ImageId>,
    /// Images read from the files for this follower: the one being sent, and the next one.
    cold: Vec<ImageState>,
    loading_next: Option<ImageId>,
    /// Where in the first target's image the next chain starts.
    at: Mark,
    is_sealed_sent: bool,
    in_flight: VecDeque<Chain>,
    in_flight_len: u32,
    /// Chains still on their way that were posted before we started anew on the same lane.
    void: usize,
    pub(super) watermark_due: Option<u64>,
}

impl FollowerState {
    /// Whether a stuck follower is to be asked again.
    pub(super) fn is_due(&self, now: u64) -> bool {
        matches!(self, Self::Stuck { retry_at, .. } if *retry_at <= now)
    }
}

impl Progress {
    pub(super) fn new(node: u32) -> Self {
        Self {
            node,
            state: FollowerState::Down,
            acked: 0,
            session: 0,
            sequence: 0,
            entry: (0, 0),
            targets: VecDeque::new(),
            asked_next: None,
            cold: Vec::new(),
            loading_next: None,
            at: Mark::start(0),
            is_sealed_sent: false,
            in_flight: VecDeque::new(),
            in_flight_len: 0,
            void: 0,
            watermark_due: None,
        }
    }

    /// Forgets images and chains: the next thing is to ask where to continue.
    fn reset(&mut self, commands: &mut VecDeque<Command>) {
        commands.extend(
            self.cold
                .drain(..)
                .map(|image| Command::ReleaseImage(image.id())),
        );
        self.targets.clear();
        self.asked_next = None;
        self.loading_next = None;
        self.void += self.in_flight.len();
        self.in_flight.clear();
        self.in_flight_len = 0;
        self.is_sealed_sent = false;
    }

    fn stuck(&mut self, now: u64, retry_delay_ns: u64, cause: Stuck) {
        let retry_at = now + retry_delay_ns;
        self.state = FollowerState::Stuck { cause, retry_at };
    }

    /// The images this follower needs to stay in memory, apart from cold ones.
    fn wanted(&self) -> impl Iterator<Item = ImageId> {
        let asked = match &self.state {
            FollowerState::Asked(ask) => Some(ask.image_id),
            _ => None,
        };
        self.targets
            .iter()
            .map(|t| t.image_id)
            .chain(self.asked_next)
            .chain(asked)
    }
}

/// An image by its name, live or read for this follower.
fn source<'a>(
    log: &'a crate::partition::Log,
    cold: &'a [ImageState],
    id: ImageId,
) -> Option<&'a ImageState> {
    log.image(id)
        .or_else(|| cold.iter().find(|image| image.id() == id))
}

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

    /// A lane to a follower is up, under a session that no earlier lane to it had.
    pub fn handle_lane_up(&mut self, follower: usize, session: u64) {
        let f = &mut self.followers[follower];
        f.reset(&mut self.commands);
        f.void = 0;
        f.session = session;
        f.sequence = 0;
        self.ask_from_current(follower);
    }

    /// The lane of this session is lost: whatever was on its way has an unknown outcome.
    pub fn handle_lane_down(&mut self, follower: usize, session: u64) {
        let f = &mut self.followers[follower];
        if f.session == session {
            f.reset(&mut self.commands);
            f.state = FollowerState::Down;
        }
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
                    self.restart(follower);
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

    fn restart(&mut self, follower: usize) {
        self.followers[follower].reset(&mut self.commands);
        self.ask_from_current(follower);
    }

    /// Starts to send where the follower's log ends, or lower at the last mark before.
    fn start(&mut self, now: u64, follower: usize, ask: &GrantAsk, reply: &GrantReply) {
        let leader = self.log.log_end_offset();
        let retry_delay_ns = self.config.retry_delay_ns;
        let end = reply.log_end_offset;
        let f = &mut self.followers[follower];
        if end > leader {
            f.stuck(
                now,
                retry_delay_ns,
                Stuck::Ahead {
                    follower: end,
                    leader,
                },
            );
            return;
        }
        if reply.len == 0 {
            self.start_lower(now, follower, ask, end);
            return;
        }
        let Some(image) = source(&self.log, &f.cold, reply.image_id) else {
            self.restart(follower);
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
            f.stuck(now, retry_delay_ns, Stuck::BelowLogStart { follower: end });
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
    fn request_next(&mut self, follower: usize) {
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
            log_start_offset: self.log.log_start_offset().min(high_watermark),
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
            data,
            tail: tail.encode(),
            tail_addr: f.entry.0 + tail_byte_offset(tail.sequence) as u64,
            tail_rkey: f.entry.1,
        };
        self.request_next(follower);
        post
    }

    /// The oldest chain on its way to a follower has been acknowledged.
    pub fn handle_completion(&mut self, now: u64, follower: usize, session: u64) {
        let f = &mut self.followers[follower];
        if f.session != session {
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
        self.advance_high_watermark(now);
    }
}

impl Target {
    fn of(reply: &GrantReply) -> Self {
        Self {
            image_id: reply.image_id,
            addr: reply.addr,
            rkey: reply.rkey,
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
