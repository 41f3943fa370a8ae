//! What a leader knows of one follower.

use std::collections::VecDeque;
use std::fmt;

use super::{Command, GrantAsk, GrantReply};
use crate::coordinator::MemoryId;
use crate::epoch::Cut;
use crate::image::{ImageId, ImageState, Mark};

/// What a follower is doing, as its leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FollowerState {
    /// There is no lane to it.
    Down,
    /// It has been asked to revoke what it granted earlier, and to report what it holds.
    Revoking,
    /// It has been asked to cut what it holds and we do not.
    Truncating(Cut),
    /// It holds a prefix of our log, and we have no image yet ourselves.
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
    /// What it holds of the image does not end where one of our batches ends.
    Diverged {
        /// Its log end offset.
        follower: i64,
    },
    /// It refused a request.
    Refused(String),
    /// The records it needs cannot be read from our files.
    Unreadable(String),
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Diverged { follower } => write!(
                f,
                "its log ends at offset {follower}, inside a batch of the leader's"
            ),
            Self::Refused(cause) => write!(f, "it refused: {cause}"),
            Self::Unreadable(cause) => write!(f, "the leader's files cannot be read: {cause}"),
        }
    }
}

impl fmt::Display for FollowerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("down"),
            Self::Revoking => f.write_str("asked to revoke and report"),
            Self::Truncating(Cut::TruncateTo(to)) => write!(f, "truncating to offset {to}"),
            Self::Truncating(Cut::RestartAt(to)) => write!(f, "starting again at offset {to}"),
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
    pub(super) image_id: ImageId,
    pub(super) addr: u64,
    pub(super) rkey: u32,
}

impl Target {
    pub(super) fn of(reply: &GrantReply) -> Self {
        Self {
            image_id: reply.image_id,
            addr: reply.addr,
            rkey: reply.rkey,
        }
    }
}

/// A chain on its way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chain {
    pub(super) end_offset: i64,
    pub(super) len: u32,
}

/// One follower.
#[derive(Debug)]
pub(super) struct Progress {
    pub(super) node: u32,
    pub(super) state: FollowerState,
    /// Whether the partition still has a replica there.
    pub(super) is_replica: bool,
    /// The memory that it has acknowledged with.
    pub(super) memory_id: Option<MemoryId>,
    /// One past the last offset it has in memory, as far as it has acknowledged.
    pub(super) acked: i64,
    /// One past the last offset it has on its device, as far as it has told.
    pub(super) durable: i64,
    /// It has been asked, on this lane, to have everything below on its device.
    pub(super) sync_asked: i64,
    /// When it last had everything that we had then.
    pub(super) caught_up_at: u64,
    /// What it must have, to have caught up at this time.
    pub(super) goal: (i64, u64),
    /// Its CPU stands still, whatever its NIC acknowledges.
    pub(super) is_hung: bool,
    /// It lacks committed records, with the memory that had them.
    pub(super) is_lossy: bool,
    /// The lane's session; tails carry it, and acks of another are void.
    pub(super) session: u64,
    pub(super) sequence: u32,
    pub(super) entry: (u64, u32),
    /// The image being written and, once granted, the next one.
    pub(super) targets: VecDeque<Target>,
    /// The next image, asked for and not granted yet.
    pub(super) asked_next: Option<ImageId>,
    /// Images read from the files for this follower: the one being sent, and the next one.
    pub(super) cold: Vec<ImageState>,
    pub(super) loading_next: Option<ImageId>,
    /// Where in the first target's image the next chain starts.
    pub(super) at: Mark,
    pub(super) is_sealed_sent: bool,
    pub(super) in_flight: VecDeque<Chain>,
    pub(super) in_flight_len: u32,
    /// Chains still on their way that were posted before we started anew on the same lane.
    pub(super) void: usize,
    pub(super) watermark_due: Option<u64>,
}

impl FollowerState {
    /// Whether a stuck follower is to be asked again.
    pub(super) fn is_due(&self, now: u64) -> bool {
        matches!(self, Self::Stuck { retry_at, .. } if *retry_at <= now)
    }
}

impl Progress {
    pub(super) fn new(now: u64, node: u32) -> Self {
        Self {
            node,
            state: FollowerState::Down,
            is_replica: true,
            memory_id: None,
            acked: 0,
            durable: 0,
            sync_asked: 0,
            caught_up_at: now,
            goal: (0, now),
            is_hung: false,
            is_lossy: false,
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
    pub(super) fn reset(&mut self, commands: &mut VecDeque<Command>) {
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

    /// Whether it has everything up to an offset, and gets what follows.
    pub(super) fn has_caught_up(&self, log_end_offset: i64) -> bool {
        self.state == FollowerState::Streaming && self.acked >= log_end_offset
    }

    pub(super) fn stuck(&mut self, now: u64, retry_delay_ns: u64, cause: Stuck) {
        let retry_at = now + retry_delay_ns;
        self.state = FollowerState::Stuck { cause, retry_at };
    }

    /// The images this follower needs to stay in memory, apart from cold ones.
    pub(super) fn wanted(&self) -> impl Iterator<Item = ImageId> {
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
pub(super) fn source<'a>(
    log: &'a crate::partition::Log,
    cold: &'a [ImageState],
    id: ImageId,
) -> Option<&'a ImageState> {
    log.image(id)
        .or_else(|| cold.iter().find(|image| image.id() == id))
}
