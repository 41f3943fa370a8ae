//! The follower's side of replication.
//!
//! A [`Follower`] is a state machine without I/O for one partition. The leader's NIC writes its images
//! and its tails; the follower's CPU is asked for grants, and looks at the table entry from time to
//! time to drain what has arrived. Nothing it reads there is trusted before it fits what it granted.
//!
//! | in | out |
//! | --- | --- |
//! | `fence`, `handle_revoke_request`, `handle_truncate_request` | `Revoke`, `Scan`, `Cut`, `Report`, `Lost` |
//! | `handle_revoked`, `handle_scanned`, `handle_cut` and their failures | `WriteTail` |
//! | `handle_grant_request` | `MakeImage`, `Grant`, `Refuse` |
//! | `handle_image_ready`, `handle_image_failed` | `Describe` |
//! | `handle_entry`, `handle_tick` | `Drain` |
//! | `handle_drained`, `handle_drain_failed` | `Release` |
//! | `handle_sync_request`, `handle_synced` | `Sync`, `Durable` |
//!
//! The runtime executes `Drain`, `Sync`, `Scan` and `Cut` in the order in which they come out.
//!
//! Who may write to the partition changes like this. A new session of a leader, and a new epoch, always
//! begin with the fence: nothing is granted to anybody before everything granted earlier is withdrawn,
//! the withdrawal confirmed, and the own tail read. See [`fence`](Follower::fence).
//!
//! ```text
//!                 grant asked for, in the session that was reported to
//!    ,-> Fenced -----------------------------------------------------> Open
//!    |    |  ^                                                           |
//!    | cut|  | cut done: report          new session, or higher epoch    |
//!    |    v  |                                                           v
//!    |  Cutting          Scanning <------------- Revoking <--------------'
//!    |                      |      withdrawn
//!    '----------------------'
//!      tail read: report, if a leader waits for it
//! ```
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
use crate::epoch::{Cut, EpochCache, Report};
use crate::image::{FilePlace, ImageId, Mark};
use crate::leader::GrantAsk;
use crate::partition::{LogConfig, Stored};
use crate::table::{BASE_OFFSET_UNKNOWN, Tail};

mod drain;
mod fence;

use fence::Phase;

/// How long tails may wait to be looked at while they move, in nanoseconds.
const LOOK_DELAY_MIN_NS: u64 = 20_000_000;
/// How long after a failure to write to the files it is tried again, in nanoseconds.
const RETRY_DELAY_NS: u64 = 1_000_000_000;

/// What the runtime shall do for a follower.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Withdraw everything that a leader may write with: the registrations of the images and of the table
    /// entry, and the queue pair of a lane that serves nothing else. Once that has returned, and not
    /// before, call `handle_revoked`; otherwise `handle_revoke_failed`.
    Revoke,
    /// Read the tail and the images, copy to the files what is missing there, and call `handle_scanned` or
    /// `handle_scan_failed`. See [`scan`](crate::scan) for what counts as log.
    Scan {
        /// The highest epoch that anything can be of.
        leader_epoch: i32,
    },
    /// Answer the leader's request to revoke or to truncate.
    Report(Report),
    /// Cut the files, indexes and epochs, then call `handle_cut` or `handle_cut_failed`. No image of the
    /// partition exists any more.
    Cut(Cut),
    /// Records that the cluster had committed are lost: those from the first to the second offset. A leader
    /// that does not have them was elected by an operator, or because all memory was lost.
    Lost(i64, i64),
    /// Have everything below this offset, which is in the files, on the device; then call `handle_synced`
    /// or `handle_sync_failed`.
    Sync(i64),
    /// Tell the leader that everything below this offset is on the device.
    Durable(i64),
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
        /// The image, if one was asked for.
        image_id: Option<ImageId>,
        /// Why, as a code.
        code: ErrorCode,
        /// Why, in words.
        cause: String,
    },
    /// Write both tail slots: it says what a scan or a cut has left, and the first tail of a new session
    /// may overwrite either.
    WriteTail(Tail),
    /// Write the descriptor: consumers find the images by it.
    Describe {
        /// The image the log ends in, and its base offset; `None` while nothing is granted.
        current: Option<(ImageId, i64)>,
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

/// An image of ours.
#[derive(Debug)]
struct Hosted {
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
    phase: Phase,
    /// The highest epoch seen: no lower one is obeyed.
    leader_epoch: i32,
    /// The epoch, and its start, of the leader that was last granted something: consumers are told.
    granted: (i32, i64),
    /// That of the leader that will be granted something next.
    next_granted: (i32, i64),
    /// The leader's lane; 0 while there is none that has been, or is to be, reported to.
    session: u64,
    /// A leader waits for our report.
    is_report_due: bool,
    /// As the last scan or cut found them.
    epochs: EpochCache,
    log_start_offset: i64,
    log_end_offset: i64,
    high_watermark: i64,
    /// Everything below this offset is in the files, which end at this place.
    files: (i64, FilePlace),
    images: VecDeque<Hosted>,
    tail: Option<Tail>,
    asked: Option<GrantAsk>,
    /// The image that is being made.
    making: Option<ImageId>,
    is_draining: bool,
    /// Below this offset everything is on the device, and should be.
    durable: i64,
    sync_wanted: i64,
    is_syncing: bool,
    fault: Option<Fault>,
    look_due: u64,
    look_delay: u64,
    /// When a fence or cut that failed is tried again.
    retry_due: Option<u64>,
    commands: VecDeque<Command>,
}

impl Follower {
    /// A follower of which everything is in the files; nobody can write to it.
    ///
    /// `leader_epoch` is the highest one on its disk and in its memory: no lower one is obeyed.
    #[must_use]
    pub fn new(config: LogConfig, leader_epoch: i32, stored: Stored) -> Self {
        let end = stored.log_end_offset;
        Self {
            config,
            phase: Phase::Fenced,
            leader_epoch,
            granted: (0, 0),
            next_granted: (0, 0),
            session: 0,
            is_report_due: false,
            epochs: stored.epochs,
            log_start_offset: stored.log_start_offset,
            log_end_offset: end,
            high_watermark: stored.high_watermark.clamp(stored.log_start_offset, end),
            files: (end, stored.end_place),
            images: VecDeque::new(),
            tail: None,
            asked: None,
            making: None,
            is_draining: false,
            durable: 0,
            sync_wanted: 0,
            is_syncing: false,
            fault: None,
            look_due: 0,
            look_delay: LOOK_DELAY_MIN_NS,
            retry_due: None,
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

    /// The epoch of the leader that writes, or wrote last, and the offset at which it starts.
    #[must_use]
    pub fn granted_epoch(&self) -> (i32, i64) {
        self.granted
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

    /// The image in memory that holds `offset` if it is not in the files yet, and where in it the files end.
    /// `None` also while it is in an image whose predecessor is still being drained.
    #[must_use]
    pub fn undrained_image_of(&self, offset: i64) -> Option<(ImageId, Mark)> {
        let image = self.images.iter().find(|image| image.done_at.is_none())?;
        image.begin?;
        let is_there = image.drained.end_offset <= offset && offset <= self.log_end_offset;
        is_there.then_some((image.id, image.drained))
    }

    /// The leader of an epoch asks, on the lane of a session, for an image; `tail` is the last one in our
    /// entry.
    pub fn handle_grant_request(
        &mut self,
        now: u64,
        session: u64,
        leader_epoch: i32,
        ask: GrantAsk,
        tail: Option<Tail>,
    ) {
        self.handle_entry(now, tail);
        let image_id = Some(ask.image_id);
        if self.refuse_stale(session, leader_epoch, image_id) {
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
        self.phase = Phase::Open;
        self.asked = Some(ask);
        self.answer(now);
    }

    fn refuse(&mut self, image_id: Option<ImageId>, code: ErrorCode, cause: String) {
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
        } else if let Some(image) = self.open_image(ask.image_id) {
            let held = self.tail.filter(|tail| tail.image_id == ask.image_id);
            let byte_position = held.map_or(image.drained.byte_position, |t| t.byte_position);
            self.grant(ask.image_id, self.config.image_len, byte_position);
        } else if self.making.is_some() {
            // The image being made is of an earlier request; its end brings us back.
        } else if ask.base_offset == BASE_OFFSET_UNKNOWN {
            self.make_next(now, ask);
        } else {
            self.make_first(now, ask);
        }
    }

    fn open_image(&self, id: ImageId) -> Option<&Hosted> {
        let mut images = self.images.iter();
        images.find(|image| image.id == id && image.done_at.is_none())
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
            self.refuse(Some(ask.image_id), ErrorCode::INVALID_REQUEST, cause);
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
            None if self.log_start_offset == files_end
                && (0..files_end).contains(&ask.place.segment_base_offset) =>
            {
                // Nothing is kept here, and no segment of the leader's begins at our offset: one below does.
                self.cut(Cut::RestartAt(ask.place.segment_base_offset));
                return;
            }
            None => {
                self.asked = None;
                let cause = format!(
                    "segments differ: offset {} is not at byte {} of segment {} here",
                    ask.base_offset, ask.place.file_position, ask.place.segment_base_offset
                );
                self.refuse(Some(ask.image_id), ErrorCode::INVALID_REQUEST, cause);
                return;
            }
        };
        self.make(ask.image_id, Some(fill), ask.place == segment);
    }

    fn make(&mut self, id: ImageId, fill: Option<Fill>, starts_segment: bool) {
        // What a fence closed is made anew, from the files.
        if let Some(closed) = self.images.iter().position(|image| image.id == id) {
            self.images.remove(closed);
            self.commands.push_back(Command::Release(id));
        }
        self.making = Some(id);
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
        let is_ours = self.end_making(id);
        let Some(ask) = self.asked.filter(|ask| is_ours && ask.image_id == id) else {
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
            self.refuse(Some(ask.image_id), ErrorCode::INTERNAL, cause);
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
        self.images.push_back(Hosted {
            id,
            begin: fill.map(|(fill, _)| (fill.base_offset, fill.place)),
            segment_base_offset: ask.place.segment_base_offset,
            drained: fill.map_or(Mark::start(BASE_OFFSET_UNKNOWN), |(_, end)| end),
            done_at: None,
        });
        self.begin_next();
        self.answer(now);
    }

    /// Whether it is the image waited for, and not one of an earlier role.
    fn end_making(&mut self, id: ImageId) -> bool {
        let is_ours = self.making == Some(id);
        if is_ours {
            self.making = None;
        }
        is_ours
    }

    /// An image could not be made.
    pub fn handle_image_failed(&mut self, now: u64, id: ImageId, cause: String) {
        let is_ours = self.end_making(id);
        if is_ours && self.asked.is_some_and(|ask| ask.image_id == id) {
            self.asked = None;
            self.refuse(Some(id), ErrorCode::OUT_OF_RESOURCES, cause);
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
            current: Some((id, base_offset)),
            next,
        });
    }

    /// No image is readable any more: consumers ask for one.
    fn undescribe(&mut self) {
        self.commands.push_back(Command::Describe {
            current: None,
            next: None,
        });
    }

    /// When the entry should be looked at again, and retired images let go.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let retired = self.images.front().and_then(|image| image.done_at);
        let look = self.is_looking().then_some(self.look_due);
        retired
            .map(|at| at + self.config.grace_ns)
            .into_iter()
            .chain(look)
            .chain(self.retry_due)
            .min()
    }

    /// Whether it is time to read the entry and call `handle_entry`.
    #[must_use]
    pub fn wants_entry(&self, now: u64) -> bool {
        self.is_looking() && self.look_due <= now
    }

    fn is_looking(&self) -> bool {
        self.phase == Phase::Open && !self.images.is_empty() && !self.is_draining
    }

    /// Lets images go whose grace period is over, and tries again what failed; call it at
    /// [`Follower::poll_timeout`].
    pub fn handle_tick(&mut self, now: u64) {
        self.retry(now);
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
            if self.images.is_empty() {
                self.undescribe();
            }
            self.commands.extend(id.map(Command::Release));
        }
    }

    /// Where the leader's log starts, as its tails say: what is below may be given up.
    #[must_use]
    pub fn leader_log_start_offset(&self) -> i64 {
        self.tail.map_or(0, |tail| tail.log_start_offset)
    }

    /// Records below `offset` are gone.
    pub fn handle_log_start(&mut self, offset: i64) {
        self.log_start_offset = self.log_start_offset.max(offset.min(self.log_end_offset));
        self.epochs.start_at(self.log_start_offset);
    }

    /// Since when the oldest image has been kept for readers only, if it is.
    #[must_use]
    pub fn retired_since(&self) -> Option<u64> {
        self.images.front().and_then(|image| image.done_at)
    }

    /// Lets that image go before its time, for want of memory.
    pub fn release_retired(&mut self) {
        if self.retired_since().is_some() {
            let id = self.images.pop_front().map(|image| image.id);
            self.commands.extend(id.map(Command::Release));
        }
    }

    /// The next thing to do; call until `None` after every event.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }
}
