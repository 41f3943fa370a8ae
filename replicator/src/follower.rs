//! The follower's side of replication.
//!
//! A [`Follower`] is a state machine without I/O for one partition. The leader's NIC writes its images
//! and its tails; the follower's CPU is asked for grants, and looks at the table entry from time to
//! time to drain what has arrived. Nothing it reads there is trusted before it fits what it granted.
//!
//! | in | out |
//! | --- | --- |
//! | `handle_lane`, `handle_grant_request` | `MakeImage`, `Grant`, `Refuse`, `CopyTail` |
//! | `handle_image_ready`, `handle_image_failed` | `Describe` |
//! | `handle_entry`, `handle_tick` | `Drain` |
//! | `handle_drained`, `handle_drain_failed` | `Release` |
//!
//! Images, oldest first. A third one is granted only when the first is drained, so a leader that is
//! faster than our disk waits for it:
//!
//! ```text
//!  done, readable for the grace period | being drained ... tail | granted, empty
//! ```

use std::collections::VecDeque;
use std::fmt;

use crate::control::ErrorCode;
use crate::image::{FilePlace, ImageId, Mark};
use crate::leader::GrantAsk;
use crate::partition::LogConfig;
use crate::table::{BASE_OFFSET_UNKNOWN, Tail};

/// How long tails may wait to be looked at while they move, in nanoseconds.
const LOOK_DELAY_MIN_NS: u64 = 20_000_000;
/// How long when they do not.
const LOOK_DELAY_MAX_NS: u64 = 500_000_000;
/// How long after a failure to write to the files it is tried again, in nanoseconds.
const RETRY_DELAY_NS: u64 = 1_000_000_000;

/// What the runtime shall do for a follower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Make and register an image, then call `handle_image_ready` or `handle_image_failed`.
    MakeImage {
        /// Its name.
        id: ImageId,
        /// Its size in bytes.
        len: u32,
        /// Bytes of our own files it starts with.
        fill: Option<Fill>,
        /// Whether it begins a segment.
        starts_segment: bool,
    },
    /// Answer the leader: the right to write an image, which exists unless `len` is 0.
    Grant {
        /// The image.
        image_id: ImageId,
        /// Its size; 0 if our log ends before it begins.
        len: u32,
        /// Our log end offset.
        log_end_offset: i64,
        /// Bytes of the image that we hold.
        byte_position: u32,
    },
    /// Answer the leader: no.
    Refuse {
        /// The image.
        image_id: ImageId,
        /// Why, as a code.
        code: ErrorCode,
        /// Why, in words.
        cause: String,
    },
    /// Write both tail slots, so that the first tail of a new session may overwrite either.
    CopyTail(Tail),
    /// Write the descriptor: consumers find the images by it.
    Describe {
        /// The image the log ends in, and its base offset.
        current: (ImageId, i64),
        /// The image granted after it.
        next: Option<ImageId>,
    },
    /// Check batches and copy them to the segment file, then call `handle_drained` or
    /// `handle_drain_failed`.
    Drain(Drain),
    /// Deregister an image and let it go.
    Release(ImageId),
}

/// A range of a segment file that an image starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// Where the image lies in the files.
    pub place: FilePlace,
    /// Offset of its first record.
    pub base_offset: i64,
    /// Bytes to be read.
    pub len: u32,
}

/// Batches to be copied to a segment file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// The image.
    pub image_id: ImageId,
    /// Where it lies in the files.
    pub place: FilePlace,
    /// What has been drained before.
    pub from: Mark,
    /// Where the leader says that the batches end; `None` for as far as there are batches.
    pub to: Option<Mark>,
}

/// What is wrong with a follower's partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A tail contradicts what was granted; it is not believed.
    Tail(String),
    /// The bytes in memory are not what the tail says; nothing further is drained.
    Corrupt(String),
    /// The files cannot be written; it is tried again.
    Files(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tail(cause) => write!(f, "a tail was refused: {cause}"),
            Self::Corrupt(cause) => write!(f, "replicated bytes are not a log: {cause}"),
            Self::Files(cause) => write!(f, "segment files cannot be written: {cause}"),
        }
    }
}

#[derive(Debug)]
struct Replica {
    id: ImageId,
    /// Base offset and place; known once its predecessor is drained.
    begin: Option<(i64, FilePlace)>,
    /// The segment it lies in; -1 if it begins a new one.
    segment_base_offset: i64,
    drained: Mark,
    /// Drained to its end, at this time.
    done_at: Option<u64>,
}

/// The follower of one partition.
#[derive(Debug)]
pub struct Follower {
    config: LogConfig,
    leader_epoch: i32,
    epoch_start_offset: i64,
    session: u64,
    log_start_offset: i64,
    log_end_offset: i64,
    high_watermark: i64,
    /// Everything below this offset is in the files, which end at this place.
    files: (i64, FilePlace),
    images: VecDeque<Replica>,
    tail: Option<Tail>,
    asked: Option<GrantAsk>,
    is_making: bool,
    is_draining: bool,
    fault: Option<Fault>,
    look_due: u64,
    look_delay: u64,
    commands: VecDeque<Command>,
}

impl Follower {
    /// A follower whose files hold the log up to `log_end_offset`, which is at `place`.
    ///
    /// `leader_epoch` is the highest one on its disk: no lower one is obeyed.
    #[must_use]
    pub fn new(
        config: LogConfig,
        leader_epoch: i32,
        log_start_offset: i64,
        log_end_offset: i64,
        high_watermark: i64,
        place: FilePlace,
    ) -> Self {
        Self {
            config,
            leader_epoch,
            epoch_start_offset: 0,
            session: 0,
            log_start_offset,
            log_end_offset,
            high_watermark: high_watermark.clamp(log_start_offset, log_end_offset),
            files: (log_end_offset, place),
            images: VecDeque::new(),
            tail: None,
            asked: None,
            is_making: false,
            is_draining: false,
            fault: None,
            look_due: 0,
            look_delay: LOOK_DELAY_MIN_NS,
            commands: VecDeque::new(),
        }
    }

    /// Size of an image in bytes.
    #[must_use]
    pub fn image_len(&self) -> u32 {
        self.config.image_len
    }

    /// The highest epoch seen.
    #[must_use]
    pub fn leader_epoch(&self) -> i32 {
        self.leader_epoch
    }

    /// The offset at which the epoch starts, as its leader says.
    #[must_use]
    pub fn epoch_start_offset(&self) -> i64 {
        self.epoch_start_offset
    }

    /// The first offset of the log.
    #[must_use]
    pub fn log_start_offset(&self) -> i64 {
        self.log_start_offset
    }

    /// One past the last offset that the leader's tails, as last looked at, say we hold.
    #[must_use]
    pub fn log_end_offset(&self) -> i64 {
        self.log_end_offset
    }

    /// Records below this offset are committed, as far as the leader has told.
    #[must_use]
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// One past the last offset in the files.
    #[must_use]
    pub fn drained_offset(&self) -> i64 {
        self.files.0
    }

    /// Where the files end.
    #[must_use]
    pub fn end_place(&self) -> FilePlace {
        self.files.1
    }

    /// What is wrong, if anything is.
    #[must_use]
    pub fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// The image in memory that holds `offset`, and its base offset.
    #[must_use]
    pub fn image_of_offset(&self, offset: i64) -> Option<(ImageId, i64)> {
        let newest_first = self.images.iter().rev();
        let mut known = newest_first.filter_map(|image| Some((image.id, image.begin?.0)));
        known.find(|&(_, base_offset)| base_offset <= offset && offset <= self.log_end_offset)
    }

    /// A lane of the leader is about to come up, and the one before it has been destroyed: `tail` is
    /// the last it wrote.
    pub fn handle_lane(&mut self, now: u64, session: u64, tail: Option<Tail>) {
        self.handle_entry(now, tail);
        self.session = session;
        self.asked = None;
        self.commands.extend(self.tail.map(Command::CopyTail));
    }

    /// The leader of an epoch, which starts at an offset, asks for an image; `tail` is the last one in
    /// our entry.
    pub fn handle_grant_request(
        &mut self,
        now: u64,
        (leader_epoch, epoch_start_offset): (i32, i64),
        ask: GrantAsk,
        tail: Option<Tail>,
    ) {
        self.handle_entry(now, tail);
        let image_id = ask.image_id;
        if leader_epoch < self.leader_epoch {
            let cause = format!(
                "leader epoch {leader_epoch} is fenced: epoch {} is known here",
                self.leader_epoch
            );
            self.refuse(image_id, ErrorCode::FENCED_LEADER_EPOCH, cause);
            return;
        }
        if ask.image_len != self.config.image_len {
            let cause = format!(
                "images have {} bytes here, not {}: compare the cluster files",
                self.config.image_len, ask.image_len
            );
            self.refuse(image_id, ErrorCode::INVALID_REQUEST, cause);
            return;
        }
        self.leader_epoch = leader_epoch;
        self.epoch_start_offset = epoch_start_offset;
        self.asked = Some(ask);
        self.answer(now);
    }

    fn refuse(&mut self, image_id: ImageId, code: ErrorCode, cause: String) {
        self.commands.push_back(Command::Refuse {
            image_id,
            code,
            cause,
        });
    }

    /// Answers the pending request, or starts what must happen first.
    fn answer(&mut self, now: u64) {
        let Some(ask) = self.asked else { return };
        let log_end_offset = self.log_end_offset;
        if ask.base_offset != BASE_OFFSET_UNKNOWN && log_end_offset < ask.base_offset {
            self.grant(ask.image_id, 0, 0);
        } else if let Some(image) = self.images.iter().find(|image| image.id == ask.image_id) {
            let held = self.tail.filter(|tail| tail.image_id == ask.image_id);
            let byte_position = held.map_or(image.drained.byte_position, |t| t.byte_position);
            if image.done_at.is_none() {
                self.grant(ask.image_id, self.config.image_len, byte_position);
            } else {
                self.asked = None;
                let cause = "the image is closed here".to_owned();
                self.refuse(ask.image_id, ErrorCode::INVALID_REQUEST, cause);
            }
        } else if self.is_making {
            // The image being made is of an earlier request; its end brings us back.
        } else if ask.base_offset == BASE_OFFSET_UNKNOWN {
            self.make_next(now, ask);
        } else {
            self.make_first(now, ask);
        }
    }

    fn grant(&mut self, image_id: ImageId, len: u32, byte_position: u32) {
        self.asked = None;
        self.commands.push_back(Command::Grant {
            image_id,
            len,
            log_end_offset: self.log_end_offset,
            byte_position,
        });
    }

    /// The image after the one the log ends in; waits until all before that one are drained.
    fn make_next(&mut self, now: u64, ask: GrantAsk) {
        let pending = self
            .images
            .iter()
            .filter(|image| image.done_at.is_none())
            .count();
        if self.images.is_empty() && self.tail.is_none() {
            self.asked = None;
            let cause = "there is no image that it could follow".to_owned();
            self.refuse(ask.image_id, ErrorCode::INVALID_REQUEST, cause);
        } else if pending <= 1 {
            self.make(ask.image_id, None, ask.place.segment_base_offset < 0);
        } else {
            self.drain(now);
        }
    }

    /// The image to continue in. What we hold of it comes from our files, so all must be drained.
    fn make_first(&mut self, now: u64, ask: GrantAsk) {
        let (files_end, place) = self.files;
        if files_end < self.log_end_offset {
            self.drain(now);
            return;
        }
        let segment = FilePlace {
            segment_base_offset: files_end,
            file_position: 0,
        };
        let is_at_end =
            ask.base_offset == files_end && (ask.place == place || ask.place == segment);
        let held = place.file_position.checked_sub(ask.place.file_position);
        let held = held.filter(|&held| {
            ask.place.segment_base_offset == place.segment_base_offset
                && ask.base_offset < files_end
                && (1..=u64::from(ask.image_len)).contains(&held)
        });
        let fill = match held.and_then(|held| u32::try_from(held).ok()) {
            _ if is_at_end => Fill {
                place: ask.place,
                base_offset: ask.base_offset,
                len: 0,
            },
            Some(len) => Fill {
                place: ask.place,
                base_offset: ask.base_offset,
                len,
            },
            None => {
                self.asked = None;
                let cause = format!(
                    "segments differ: offset {} is not at byte {} of segment {} here",
                    ask.base_offset, ask.place.file_position, ask.place.segment_base_offset
                );
                self.refuse(ask.image_id, ErrorCode::INVALID_REQUEST, cause);
                return;
            }
        };
        self.make(ask.image_id, Some(fill), ask.place == segment);
    }

    fn make(&mut self, id: ImageId, fill: Option<Fill>, starts_segment: bool) {
        self.is_making = true;
        let len = self.config.image_len;
        self.commands.push_back(Command::MakeImage {
            id,
            len,
            fill,
            starts_segment,
        });
    }

    /// An image exists. With a fill, `end` is where the batches read from the files end.
    pub fn handle_image_ready(&mut self, now: u64, id: ImageId, fill: Option<(Fill, Mark)>) {
        self.is_making = false;
        let Some(ask) = self.asked.filter(|ask| ask.image_id == id) else {
            self.commands.push_back(Command::Release(id));
            self.answer(now);
            return;
        };
        if let Some((_, end)) = fill
            && end.end_offset != self.log_end_offset
        {
            self.asked = None;
            let cause = format!(
                "our files end at offset {} there, not {}",
                end.end_offset, self.log_end_offset
            );
            self.refuse(ask.image_id, ErrorCode::INTERNAL, cause);
            self.commands.push_back(Command::Release(id));
            return;
        }
        if fill.is_some() {
            // Whatever was granted before is over: it is drained, or was never written.
            self.images.iter_mut().for_each(|image| {
                image.done_at.get_or_insert(now);
            });
            self.tail = None;
        }
        self.images.push_back(Replica {
            id,
            begin: fill.map(|(fill, _)| (fill.base_offset, fill.place)),
            segment_base_offset: ask.place.segment_base_offset,
            drained: fill.map_or(Mark::start(BASE_OFFSET_UNKNOWN), |(_, end)| end),
            done_at: None,
        });
        self.begin_next();
        self.answer(now);
    }

    /// An image could not be made.
    pub fn handle_image_failed(&mut self, now: u64, id: ImageId, cause: String) {
        self.is_making = false;
        if self.asked.is_some_and(|ask| ask.image_id == id) {
            self.asked = None;
            self.refuse(id, ErrorCode::OUT_OF_RESOURCES, cause);
        }
        self.answer(now);
    }

    fn describe(&mut self) {
        let mut open = self.images.iter().filter(|image| image.done_at.is_none());
        let Some((id, Some((base_offset, _)))) = open.next().map(|image| (image.id, image.begin))
        else {
            return;
        };
        let next = open.next().map(|image| image.id);
        self.commands.push_back(Command::Describe {
            current: (id, base_offset),
            next,
        });
    }

    /// Looks at the newest whole tail of our table entry.
    pub fn handle_entry(&mut self, now: u64, tail: Option<Tail>) {
        let is_news = tail.is_some() && tail != self.tail;
        self.look_delay = if is_news {
            LOOK_DELAY_MIN_NS
        } else {
            (self.look_delay * 2).min(LOOK_DELAY_MAX_NS)
        };
        self.look_due = now + self.look_delay;
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
        if (tail.leader_epoch, tail.session) != (self.leader_epoch, self.session) {
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
        self.tail = Some(tail);
        if matches!(self.fault, Some(Fault::Tail(_))) {
            self.fault = None;
        }
    }

    /// Hands out the next piece to be drained, one at a time.
    fn drain(&mut self, now: u64) {
        let is_stopped = matches!(self.fault, Some(Fault::Corrupt(_)));
        let Some(tail) = self.tail.filter(|_| !self.is_draining && !is_stopped) else {
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
        let is_tails = |image: &Replica| image.id == tail.image_id;
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
    fn begin_next(&mut self) {
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

    /// When the entry should be looked at again, and retired images let go.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let retired = self.images.front().and_then(|image| image.done_at);
        let look = (!self.images.is_empty() && !self.is_draining).then_some(self.look_due);
        retired
            .map(|at| at + self.config.grace_ns)
            .into_iter()
            .chain(look)
            .min()
    }

    /// Whether it is time to read the entry and call `handle_entry`.
    #[must_use]
    pub fn wants_entry(&self, now: u64) -> bool {
        !self.images.is_empty() && !self.is_draining && self.look_due <= now
    }

    /// Lets images go whose grace period is over; call it at [`Follower::poll_timeout`].
    pub fn handle_tick(&mut self, now: u64) {
        loop {
            let retired = self
                .images
                .iter()
                .filter(|image| image.done_at.is_some())
                .count();
            let Some(done_at) = self.images.front().and_then(|image| image.done_at) else {
                return;
            };
            if now < done_at + self.config.grace_ns && retired <= self.config.retired_max {
                return;
            }
            let id = self.images.pop_front().map(|image| image.id);
            self.commands.extend(id.map(Command::Release));
        }
    }

    /// The next thing to do; call until `None` after every event.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }
}
