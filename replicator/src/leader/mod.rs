//! The leader's side of replication.
//!
//! A [`Leader`] is a state machine without I/O for one partition in one epoch: events go in as method
//! calls, what is to be done comes out of [`Leader::poll_command`] and, on the data path,
//! [`Leader::poll_post`]. Time is a count of nanoseconds that the caller passes in. A
//! [`Replica`](crate::replica::Replica) makes it when its node is elected, and drops it when it is deposed.
//!
//! | in | out |
//! | --- | --- |
//! | `append`, `handle_completion`, `handle_tick` | `poll_post`: data and tail for one follower |
//! | `handle_lane_up`, `handle_lane_down`, `handle_report`, `handle_refused` | `RequestRevoke`, `RequestTruncate` |
//! | `handle_grant`, `handle_grant_refused` | `RequestGrant`, `LoadCold` |
//! | `handle_image_ready`, `handle_image_failed`, `handle_cold_loaded` | `MakeImage`, `ReleaseImage`, `Describe` |
//! | `handle_drained` | `Drain`, `PublishTail` |
//! | `handle_durable`, `handle_synced` | `RequestSync`, `Sync` |
//! | `set_isr`, `isr_proposed`, `set_suspended` | `wanted_isr` |
//!
//! One append costs a follower two work requests in one doorbell and one round trip: WRITE of the
//! bytes, WRITE of the 64-byte tail behind them, signalled once. Per follower at most
//! [`LeaderConfig::chains_max`] such chains with [`LeaderConfig::window_len`] bytes are on their way;
//! what is appended meanwhile gathers and leaves in one chain.
//!
//! A follower goes through these states, whether it is in sync or catches up. Each lane begins with a
//! fence at the follower, and with finding where the two logs part:
//!
//! ```text
//!        lane up            report, they part               lane lost, from every state
//!  Down ---------> Revoking ---------------> Truncating    -----------------------------> Down
//!                   ^   |  <----- report ---------'
//!     after a second|   | report: it is a prefix of ours
//!                   |   v          grant
//!              Stuck   Asked ---------------> Streaming
//!  (refused, diverged)  |   ^ \ holds less       |  ^
//!                       |   |  `--> Loading -----'--' (cold image, next image)
//!                       `---'
//! ```
//!
//! What is committed, and who is in sync: see the ISR's rules at [`Leader::wanted_isr`].

use std::collections::VecDeque;
use std::ops::Range;

use crate::control::Acks;
use crate::epoch::{Cut, EpochEntry};
use crate::faults::{Fault, is_injected};
use crate::image::{FilePlace, ImageId, ImageState};
use crate::partition::{AppendError, CheckedBatch, DrainJob, FilledBatch, Log, Placement};
use crate::table::{Line, Tail};

mod grants;
mod isr;
mod posts;
mod progress;

use isr::Isr;
pub use isr::Membership;
use progress::Progress;
pub use progress::{FollowerState, Stuck};

/// Limits and delays of a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderConfig {
    /// Most bytes on their way to one follower; one larger batch may travel alone.
    pub window_len: u32,
    /// Most chains on their way to one follower.
    pub chains_max: usize,
    /// Most bytes of one chain, so that several are on their way.
    pub chain_len_max: u32,
    /// How long an advanced high watermark may wait for a tail to ride in, in nanoseconds.
    pub watermark_delay_ns: u64,
    /// How long appended bytes may wait to be drained, in nanoseconds.
    pub drain_delay_ns: u64,
    /// As many undrained bytes are drained without delay; also the most of one job.
    pub drain_len: u32,
    /// How long a stuck follower waits before it is asked again, in nanoseconds.
    pub retry_delay_ns: u64,
    /// How long a member of the ISR may lag behind, or have no lane, before it is proposed out, in
    /// nanoseconds.
    pub lag_max_ns: u64,
    /// Fewest members of the ISR with which appends are taken that wait for the ISR, and with which
    /// anything is committed.
    pub min_isr: usize,
}

impl Default for LeaderConfig {
    fn default() -> Self {
        Self {
            window_len: 512 << 10,
            chains_max: 8,
            chain_len_max: 128 << 10,
            watermark_delay_ns: 500_000,
            drain_delay_ns: 20_000_000,
            drain_len: 1 << 20,
            retry_delay_ns: 1_000_000_000,
            lag_max_ns: 10_000_000_000,
            min_isr: 1,
        }
    }
}

/// A request to a follower for the right to write an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantAsk {
    /// The image.
    pub image_id: ImageId,
    /// Offset of its first record, for the image to start with;
    /// [`BASE_OFFSET_UNKNOWN`](crate::table::BASE_OFFSET_UNKNOWN) for the image after the present one.
    pub base_offset: i64,
    /// Where it lies in the files. Of the image after the present one only the segment counts: its
    /// base offset, or -1 if the image begins a new one.
    pub place: FilePlace,
    /// Its size in bytes.
    pub image_len: u32,
}

/// A follower's answer to a [`GrantAsk`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantReply {
    /// The image asked for.
    pub image_id: ImageId,
    /// Address of its first byte under `rkey`.
    pub addr: u64,
    /// Key for RDMA WRITE.
    pub rkey: u32,
    /// Bytes granted; 0 if the follower's log ends before the image begins.
    pub len: u32,
    /// Address of the partition's table entry.
    pub entry_addr: u64,
    /// Key of the table.
    pub entry_rkey: u32,
    /// The follower's log end offset.
    pub log_end_offset: i64,
    /// Bytes of the image that the follower holds.
    pub byte_position: u32,
}

/// What the runtime shall do for a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Make, register and zero an image, then call `handle_image_ready` or `handle_image_failed`.
    MakeImage {
        /// Its name.
        id: ImageId,
        /// Its size in bytes.
        len: u32,
        /// Whether it begins a segment.
        starts_segment: bool,
    },
    /// Let an image of ours, live or cold, go.
    ReleaseImage(ImageId),
    /// The epoch list has a new entry: write the checkpoint, before anything of the epoch is drained.
    BeginEpoch(EpochEntry),
    /// Ask a follower to revoke and to report; the answer goes to `handle_report` or `handle_refused`.
    RequestRevoke {
        /// Index of the follower.
        follower: usize,
    },
    /// Ask a follower to cut its log; the answer goes to `handle_report` or `handle_refused`.
    RequestTruncate {
        /// Index of the follower.
        follower: usize,
        /// What is to be cut.
        cut: Cut,
    },
    /// Ask a follower to have everything below this offset on its device; the answers go to
    /// `handle_durable`.
    RequestSync {
        /// Index of the follower.
        follower: usize,
        /// The offset.
        offset: i64,
    },
    /// Have everything below this offset, which is in the files, on our device; then call `handle_synced`.
    Sync(i64),
    /// Send a grant request; the answer goes to `handle_grant` or `handle_grant_refused`.
    RequestGrant {
        /// Index of the follower.
        follower: usize,
        /// What is asked.
        ask: GrantAsk,
    },
    /// Make a cold image from the files, then call `handle_cold_loaded` or `handle_cold_failed`.
    ///
    /// It holds whole batches from `offset` on, of one segment, and none at or beyond `limit_offset`.
    LoadCold {
        /// Index of the follower.
        follower: usize,
        /// Its name.
        id: ImageId,
        /// Offset of its first record.
        offset: i64,
        /// Offset at which it must end at the latest.
        limit_offset: i64,
    },
    /// Write our own descriptor: consumers find the images by it.
    Describe {
        /// The current image and its base offset.
        current: (ImageId, i64),
        /// The next image, if it is ready.
        next: Option<ImageId>,
    },
    /// Write our own tail.
    PublishTail(Tail),
    /// Copy bytes to the segment file, then call `handle_drained` or `handle_drain_failed`.
    Drain(DrainJob),
}

/// The bytes of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataWrite {
    /// The image they are read from.
    pub image_id: ImageId,
    /// Where in that image, in bytes.
    pub range: Range<u32>,
    /// Where they go.
    pub remote_addr: u64,
    /// Under which key.
    pub rkey: u32,
}

/// One chain of writes to one follower: the bytes, if any, and then the tail, signalled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Post {
    /// The epoch it is of: its completion must say so, since a lane outlives an epoch.
    pub leader_epoch: i32,
    /// The bytes; `None` if the tail travels alone.
    pub data: Option<DataWrite>,
    /// The tail's line.
    pub tail: Line,
    /// Where it goes.
    pub tail_addr: u64,
    /// Under which key.
    pub tail_rkey: u32,
}

/// The leader of one partition.
#[derive(Debug)]
pub struct Leader {
    config: LeaderConfig,
    log: Log,
    /// The session of our own tails: the incarnation of this process.
    session: u64,
    sequence: u32,
    high_watermark: i64,
    isr: Isr,
    followers: Vec<Progress>,
    commands: VecDeque<Command>,
    /// Our own tail or descriptor is older than the state.
    is_tail_due: bool,
    is_descriptor_due: bool,
    drain_due: Option<u64>,
    make_due: u64,
}

impl Leader {
    /// A leader of `log`, among these members.
    ///
    /// `high_watermark` is what is known to be committed; `session` must grow with every start.
    #[must_use]
    pub fn new(
        now: u64,
        config: LeaderConfig,
        log: Log,
        session: u64,
        high_watermark: i64,
        membership: &Membership,
    ) -> Self {
        let begin = EpochEntry {
            epoch: log.leader_epoch(),
            start_offset: log.epoch_start_offset(),
        };
        let mut leader = Self {
            config,
            high_watermark: high_watermark.clamp(log.log_start_offset(), log.log_end_offset()),
            log,
            session,
            sequence: 0,
            isr: Isr::new(membership),
            followers: Vec::new(),
            commands: VecDeque::from([Command::BeginEpoch(begin)]),
            is_tail_due: false,
            is_descriptor_due: false,
            drain_due: None,
            make_due: 0,
        };
        leader.set_replicas(now, &membership.replicas);
        leader.advance_high_watermark(now);
        leader.request_image(now);
        leader
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Records below this offset are committed.
    #[must_use]
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// How many followers there are.
    #[must_use]
    pub fn followers_count(&self) -> usize {
        self.followers.len()
    }

    /// Which follower is on a node.
    #[must_use]
    pub fn follower_on(&self, node: u32) -> Option<usize> {
        self.followers.iter().position(|f| f.node == node)
    }

    /// The node, the state and the acknowledged offset of a follower.
    #[must_use]
    pub fn follower(&self, follower: usize) -> (u32, &FollowerState, i64) {
        let f = &self.followers[follower];
        (f.node, &f.state, f.acked)
    }

    /// Appends a batch that is to be acknowledged in this way; the caller copies its bytes to the placement
    /// before it polls again.
    ///
    /// # Errors
    ///
    /// As [`Log::append`]; [`AppendError::NotEnoughReplicas`] if the acknowledgement needs more members of
    /// the ISR than there are; [`AppendError::NotLeader`] while the leader is suspended.
    pub fn append(
        &mut self,
        now: u64,
        acks: Acks,
        batch: &mut CheckedBatch,
    ) -> Result<Placement, AppendError> {
        self.check_appendable(acks)?;
        let before = self.log.current().map(ImageState::id);
        self.note_caught_up(now);
        let placement = self.log.append(now, batch)?;
        self.note_rolled(before, &placement);
        self.appended(now, acks, &placement);
        Ok(placement)
    }

    /// Keeps room at the end of the log for a batch of at most `len` bytes that is to be acknowledged in this
    /// way. Nothing is appended until it is given to [`Leader::fill`] or [`Leader::give_up`].
    ///
    /// # Errors
    ///
    /// As [`Leader::append`].
    pub fn reserve(&mut self, now: u64, acks: Acks, len: usize) -> Result<Placement, AppendError> {
        self.check_appendable(acks)?;
        let before = self.log.current().map(ImageState::id);
        let placement = self.log.reserve(now, len)?;
        self.note_rolled(before, &placement);
        self.request_image(now);
        self.request_grants();
        Ok(placement)
    }

    /// The batch in the reserved room is appended; the caller writes its header before it polls again.
    ///
    /// # Errors
    ///
    /// [`AppendError::NotEnoughReplicas`] and [`AppendError::NotLeader`] as for [`Leader::append`]; the room is
    /// still reserved.
    ///
    /// # Panics
    ///
    /// As [`Log::fill`].
    pub fn fill(
        &mut self,
        now: u64,
        acks: Acks,
        batch: &mut FilledBatch,
    ) -> Result<Placement, AppendError> {
        self.check_appendable(acks)?;
        self.note_caught_up(now);
        let placement = self.log.fill(batch);
        self.appended(now, acks, &placement);
        Ok(placement)
    }

    /// Gives up what is reserved, see [`Log::give_up`].
    pub fn give_up(&mut self, now: u64, is_touched: bool) {
        self.log.give_up(is_touched);
        self.request_image(now);
        self.request_grants();
    }

    fn note_rolled(&mut self, before: Option<ImageId>, placement: &Placement) {
        if before != Some(placement.image_id) {
            self.is_descriptor_due = true;
            self.is_tail_due = true;
        }
    }

    fn appended(&mut self, now: u64, acks: Acks, placement: &Placement) {
        if acks == Acks::Durable {
            self.want_durable(now, placement.end_offset);
        }
        self.is_tail_due = true;
        self.request_drain(now);
        self.advance_high_watermark(now);
        self.request_image(now);
        self.request_grants();
    }

    /// An image that was asked for by [`Command::MakeImage`] exists.
    pub fn handle_image_ready(&mut self, now: u64, id: ImageId) {
        if !self.log.image_ready(now, id) {
            self.commands.push_back(Command::ReleaseImage(id));
            return;
        }
        self.is_descriptor_due = true;
        self.is_tail_due = true;
        for i in 0..self.followers.len() {
            if self.followers[i].state == FollowerState::Waiting {
                self.ask_from_current(i);
            }
        }
        self.request_image(now);
        self.request_grants();
    }

    /// An image could not be made; it is asked for again after a delay.
    pub fn handle_image_failed(&mut self, now: u64, id: ImageId) {
        self.log.image_failed(id);
        self.make_due = now + self.config.retry_delay_ns;
    }

    /// Retention has removed the records below an offset, which a segment begins with.
    pub fn handle_log_start(&mut self, now: u64, offset: i64) {
        self.log.start_at(offset);
        self.is_tail_due = true;
        for follower in &mut self.followers {
            let due = now + self.config.watermark_delay_ns;
            follower.watermark_due.get_or_insert(due);
        }
    }

    /// A drain job is done.
    pub fn handle_drained(&mut self, now: u64, image_id: ImageId, to: u32) {
        self.log.drained(image_id, to);
        self.handle_tick(now);
        self.request_syncs();
    }

    /// A drain job failed; it is handed out again after a delay.
    pub fn handle_drain_failed(&mut self, now: u64) {
        self.log.drain_failed();
        self.drain_due = Some(now + self.config.retry_delay_ns);
    }

    /// Since when the oldest image that nobody needs has been kept for readers only, if there is one.
    #[must_use]
    pub fn retired_since(&self) -> Option<u64> {
        self.log.retired_since(self.hold_from())
    }

    /// Lets that image go before its time, for want of memory.
    pub fn release_retired(&mut self) {
        let released = self.log.evict(u64::MAX, self.hold_from());
        self.commands.extend(released.map(Command::ReleaseImage));
    }

    /// Does what is due; call it at [`Leader::poll_timeout`].
    pub fn handle_tick(&mut self, now: u64) {
        self.request_drain(now);
        while let Some(id) = self.log.evict(now, self.hold_from()) {
            self.commands.push_back(Command::ReleaseImage(id));
        }
        for i in 0..self.followers.len() {
            if self.followers[i].state.is_due(now) {
                self.begin(i);
            }
        }
        self.request_image(now);
        self.request_grants();
    }

    /// When [`Leader::handle_tick`] or [`Leader::poll_post`] must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let followers = (0..self.followers.len())
            .filter_map(|i| self.follower_due(i))
            .min();
        let make = (self.make_due > 0 && self.log.next().is_none()).then_some(self.make_due);
        let drain = self.drain_due.filter(|_| !self.log.is_draining());
        let evict = self.log.evict_due(self.hold_from());
        [followers, drain, evict, make, self.isr_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next thing to do; call until `None` after every event.
    pub fn poll_command(&mut self) -> Option<Command> {
        if let Some(command) = self.commands.pop_front() {
            return Some(command);
        }
        let current = self.log.current()?;
        if std::mem::take(&mut self.is_descriptor_due) {
            let current = (current.id(), current.base_offset());
            let next = self.log.next().map(|new| new.id);
            return Some(Command::Describe { current, next });
        }
        if std::mem::take(&mut self.is_tail_due) {
            self.sequence = self.sequence.wrapping_add(1);
            let tail = Tail {
                image_id: current.id(),
                session: self.session,
                leader_epoch: self.log.leader_epoch(),
                sequence: self.sequence,
                log_end_offset: self.log.log_end_offset(),
                high_watermark: self.high_watermark,
                log_start_offset: self.told_log_start(),
                byte_position: current.end().byte_position,
                header_crc: current.end().header_crc,
                flags: 0,
            };
            return Some(Command::PublishTail(tail));
        }
        None
    }

    /// The log start offset as tails say it.
    pub(super) fn told_log_start(&self) -> i64 {
        if is_injected(Fault::LogStartUntold) {
            return 0;
        }
        self.log.log_start_offset()
    }

    fn request_drain(&mut self, now: u64) {
        let undrained = self.log.undrained_len();
        if undrained == 0 || self.log.is_draining() {
            return;
        }
        let due = *self
            .drain_due
            .get_or_insert(now + self.config.drain_delay_ns);
        if due <= now || undrained >= u64::from(self.config.drain_len) {
            self.drain_due = None;
            self.commands
                .extend(self.log.drain(self.config.drain_len).map(Command::Drain));
        }
    }

    fn request_image(&mut self, now: u64) {
        if now < self.make_due {
            return;
        }
        self.make_due = 0;
        let hold_from = self.hold_from();
        if let Some(new) = self.log.request_image(hold_from) {
            let len = self.log.config().image_len;
            self.commands.push_back(Command::MakeImage {
                id: new.id,
                len,
                starts_segment: new.starts_segment,
            });
        }
    }
}
