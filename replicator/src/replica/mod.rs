//! One partition on one node: which role it plays, and how it changes.
//!
//! A [`Replica`] is a state machine without I/O around a [`Leader`] or a [`Follower`]. What the cluster
//! agrees on comes in as coordinator events; what shall be agreed on goes out as proposals. At most one
//! proposal waits for its answer.
//!
//! | in | out |
//! | --- | --- |
//! | `handle_changed`, `handle_answered`, `handle_nodes`, `handle_session` | `Propose` |
//! | `handle_peer_up`, `handle_peer_down`: control connections | `StartedLeading`, `StoppedLeading` |
//! | `handle_lane_up`, `handle_lane_down`: our lanes to other nodes | `Leader(..)`, `Follower(..)` |
//! | `handle_revoke_request`, `handle_truncate_request`, `handle_grant_request`: a leader asks | |
//! | `handle_log_end`: what others' files hold | `AnnounceLogEnd` |
//! | `handle_revoked`, `handle_scanned`, `handle_cut`: of the follower's commands | `ReleaseImage` |
//! | `hand_over`, `elect_unclean`: the operator | `HandedOver`, `Lost` |
//! | `leader_mut`, `follower_mut`: everything else goes to the engine directly | |
//!
//! ```text
//!              vacancy, and we are in the ISR with this memory
//!   Follower ------------------------------------------------> Follower, proposed {me, epoch + 1}
//!     ^   ^                                                       |            |
//!     |   '------------------ somebody else was first ------------'            | agreed
//!     |                                                                        v
//!     |  higher epoch agreed                    revoked, own tail read      Follower, won: fencing itself
//!     |  or known to a follower,    Leader <----------------------------------'
//!     '------ handed over ----------'
//! ```
//!
//! A *vacancy* is a leader that is not alive as far as the coordinator's nodes or our control connection
//! say, none at all, or we ourselves after a restart. Nothing of that is proof; what is agreed by
//! compare-and-swap is. A proposal whose outcome is unknown stays in force, in the maximal ISR and as a
//! possible election, until the revision it was based on has passed.
//!
//! Rules that hold in every path:
//!
//! - It leads an epoch only if that was agreed on while it waited for it, once, after the fence of its own
//!   memory has been confirmed and its own tail been read. Until then nothing is appended or acknowledged.
//! - It obeys no epoch below the highest that it has seen.
//! - An election is won by a member of the ISR with the memory that is recorded there, or, loudly, by the
//!   operator's word, or by the one with most when all members have lost their memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::control::ErrorCode;
use crate::coordinator::{Agreed, Answer, Member, MemoryId, PartitionState};
use crate::epoch::Cut;
use crate::follower::{self, Fault, Fill, Follower};
use crate::image::{ImageId, ImageState, Mark};
use crate::leader::{self, GrantAsk, Leader, LeaderConfig};
use crate::partition::{LogConfig, Stored};
use crate::table::Tail;

mod election;
mod roles;

/// Why appends are refused while the session with the coordinator is lost.
const NO_SESSION: &str = "the node has no session with the coordinator";

/// What the runtime shall do for a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Of the leader that it is.
    Leader(leader::Command),
    /// Of the follower that it is.
    Follower(follower::Command),
    /// Propose a state to the coordinator; the answer goes to `handle_answered`.
    Propose {
        /// The proposal's number.
        ticket: u64,
        /// The revision it is based on.
        expected_revision: i64,
        /// The state.
        state: PartitionState,
    },
    /// It leads from now on: appends are taken.
    StartedLeading {
        /// In this epoch.
        leader_epoch: i32,
        /// Which starts at this offset.
        start_offset: i64,
    },
    /// It leads no more. Appends that wait are answered with `NOT_LEADER`: those that were appended have an
    /// unknown outcome.
    StoppedLeading {
        /// The leader now, if it is known.
        leader: Option<u32>,
        /// Why, in words.
        cause: String,
    },
    /// The leadership has been given to this node: a shutdown may go on.
    HandedOver(u32),
    /// Tell these nodes, by a `LogEnd` message, how far our files reach: all members have lost their memory.
    AnnounceLogEnd {
        /// The nodes.
        nodes: Vec<u32>,
        /// The epoch of our last record, -1 if there is none.
        last_epoch: i32,
        /// Our log end offset.
        log_end_offset: i64,
    },
    /// Records that may have been acknowledged are lost: say so loudly.
    Lost(String),
    /// Let an image of an earlier role go.
    ReleaseImage(ImageId),
}

/// Sizes, limits and delays of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaConfig {
    /// Of its log.
    pub log: LogConfig,
    /// Of it as a leader.
    pub leader: LeaderConfig,
    /// How much longer each next candidate waits before it proposes itself, in nanoseconds.
    pub stagger_ns: u64,
    /// After how long something that has had no outcome is tried again, in nanoseconds.
    pub retry_delay_ns: u64,
}

impl ReplicaConfig {
    /// Defaults for a log.
    #[must_use]
    pub fn new(log: LogConfig) -> Self {
        Self {
            log,
            leader: LeaderConfig::default(),
            stagger_ns: 20_000_000,
            retry_delay_ns: 500_000_000,
        }
    }
}

#[derive(Debug)]
enum Role {
    Leader(Box<Leader>),
    Follower(Box<Follower>),
}

/// What a proposal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// To lead, not being in sync if `is_unclean`.
    Lead { is_unclean: bool },
    /// To change the ISR.
    Isr,
    /// That this node leads.
    HandOver(u32),
}

#[derive(Debug)]
struct Proposal {
    ticket: u64,
    expected_revision: i64,
    state: PartitionState,
    aim: Aim,
    /// Its outcome is unknown; something is proposed again at this time.
    retry_at: Option<u64>,
}

/// How far the files of a node reach that has lost its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct NodeLogEnd {
    memory_id: MemoryId,
    last_epoch: i32,
    log_end_offset: i64,
}

/// One partition on one node.
#[derive(Debug)]
pub struct Replica {
    config: ReplicaConfig,
    me: Member,
    /// The incarnation of this process, which our own tails carry as their session.
    incarnation: u64,
    role: Role,
    agreed: Option<Agreed>,
    /// The nodes that are alive, with their memory; `None` until it is told.
    live: Option<Vec<Member>>,
    /// Nodes whose control connection has ended.
    dead: BTreeSet<u32>,
    has_session: bool,
    /// Our lanes: session and memory by node.
    lanes: BTreeMap<u32, (u64, MemoryId)>,
    proposal: Option<Proposal>,
    last_ticket: u64,
    /// The epoch that we are elected for, and whether as one that was not in sync.
    won: Option<(i32, bool)>,
    /// Since when there is a vacancy.
    vacant_since: Option<u64>,
    /// The operator wants us to lead, in sync or not.
    is_unclean: bool,
    /// Until when a successor is waited for.
    hand_over: Option<u64>,
    log_ends: BTreeMap<u32, NodeLogEnd>,
    announce_due: Option<u64>,
    /// Images of an earlier role, and when they go.
    retired: VecDeque<(u64, ImageId)>,
    commands: VecDeque<Command>,
}

impl Replica {
    /// A replica on a node with this memory; `leader_epoch` is the highest one on its disk and in its
    /// memory. It follows nobody until it is told what is agreed.
    #[must_use]
    pub fn new(
        config: ReplicaConfig,
        me: Member,
        incarnation: u64,
        leader_epoch: i32,
        stored: Stored,
    ) -> Self {
        let follower = Follower::new(config.log, leader_epoch, stored);
        Self {
            config,
            me,
            incarnation,
            role: Role::Follower(Box::new(follower)),
            agreed: None,
            live: None,
            dead: BTreeSet::new(),
            has_session: true,
            lanes: BTreeMap::new(),
            proposal: None,
            last_ticket: 0,
            won: None,
            vacant_since: None,
            is_unclean: false,
            hand_over: None,
            log_ends: BTreeMap::new(),
            announce_due: None,
            retired: VecDeque::new(),
            commands: VecDeque::new(),
        }
    }

    /// The leader that it is.
    #[must_use]
    pub fn leader(&self) -> Option<&Leader> {
        match &self.role {
            Role::Leader(leader) => Some(leader),
            Role::Follower(_) => None,
        }
    }

    /// The leader that it is, for appends, completions and what followers answer.
    pub fn leader_mut(&mut self) -> Option<&mut Leader> {
        match &mut self.role {
            Role::Leader(leader) => Some(leader),
            Role::Follower(_) => None,
        }
    }

    /// The follower that it is.
    #[must_use]
    pub fn follower(&self) -> Option<&Follower> {
        match &self.role {
            Role::Leader(_) => None,
            Role::Follower(follower) => Some(follower),
        }
    }

    /// The follower that it is, for grants and what the files answer.
    pub fn follower_mut(&mut self) -> Option<&mut Follower> {
        match &mut self.role {
            Role::Leader(_) => None,
            Role::Follower(follower) => Some(follower),
        }
    }

    /// What is agreed on, as far as it has been told.
    #[must_use]
    pub fn agreed(&self) -> Option<&Agreed> {
        self.agreed.as_ref()
    }

    /// The highest epoch seen.
    #[must_use]
    pub fn leader_epoch(&self) -> i32 {
        match &self.role {
            Role::Leader(leader) => leader.log().leader_epoch(),
            Role::Follower(follower) => follower.leader_epoch(),
        }
    }

    /// The coordinator tells the newest state.
    pub fn handle_changed(&mut self, now: u64, agreed: Agreed) {
        self.adopt(now, agreed);
        self.advance(now);
    }

    /// The coordinator answers a proposal.
    pub fn handle_answered(&mut self, now: u64, ticket: u64, answer: Answer) {
        let proposal = self.proposal.take_if(|p| p.ticket == ticket);
        match (answer, proposal) {
            (Answer::Accepted { revision }, Some(proposal)) => {
                let state = proposal.state.clone();
                self.proposal = Some(proposal);
                self.adopt(now, Agreed { state, revision });
            }
            // Events come in order, so what it was about has been told since.
            (Answer::Accepted { .. } | Answer::Unknown { .. }, None) => {}
            (Answer::Conflict(agreed), proposal) => {
                self.proposal = proposal;
                self.adopt(now, agreed);
                // Refused for good, also if it was refused by a revision that we had been told before.
                let _ = self.proposal.take_if(|p| p.ticket == ticket);
            }
            (Answer::Unknown { .. }, Some(proposal)) => {
                let retry_at = Some(now + self.config.retry_delay_ns);
                self.proposal = Some(Proposal {
                    retry_at,
                    ..proposal
                });
            }
        }
        self.advance(now);
    }

    /// The coordinator tells which nodes are alive.
    pub fn handle_nodes(&mut self, now: u64, live: Vec<Member>) {
        self.live = Some(live);
        self.advance(now);
    }

    /// The session with the coordinator is lost, or back.
    pub fn handle_session(&mut self, now: u64, has_session: bool) {
        self.has_session = has_session;
        if let Role::Leader(leader) = &mut self.role {
            leader.set_suspended(now, (!has_session).then_some(NO_SESSION));
        }
        self.advance(now);
    }

    /// The control connection to a node is there.
    pub fn handle_peer_up(&mut self, now: u64, node: u32) {
        self.dead.remove(&node);
        self.advance(now);
    }

    /// The control connection to a node has ended: its process is gone, most likely.
    pub fn handle_peer_down(&mut self, now: u64, node: u32) {
        self.dead.insert(node);
        self.advance(now);
    }

    /// A lane of ours to a node is up, under a session that no earlier one had.
    pub fn handle_lane_up(&mut self, now: u64, node: u32, session: u64, memory_id: MemoryId) {
        self.lanes.insert(node, (session, memory_id));
        if let Some(leader) = self.leader_mut()
            && let Some(follower) = leader.follower_on(node)
        {
            leader.handle_lane_up(follower, session, memory_id);
        }
        self.advance(now);
    }

    /// The lane of a session is lost.
    pub fn handle_lane_down(&mut self, now: u64, node: u32, session: u64) {
        if self.lanes.get(&node).is_some_and(|lane| lane.0 == session) {
            self.lanes.remove(&node);
        }
        if let Some(leader) = self.leader_mut()
            && let Some(follower) = leader.follower_on(node)
        {
            leader.handle_lane_down(now, follower, session);
        }
        self.advance(now);
    }

    /// A follower has refused a request of ours, which was for a grant if it names an image. If it knows
    /// a higher epoch, we are deposed.
    pub fn handle_refused(
        &mut self,
        now: u64,
        node: u32,
        session: u64,
        image_id: Option<ImageId>,
        (code, cause): (ErrorCode, String),
    ) {
        let Some(leader) = self.leader_mut() else {
            return;
        };
        let Some(follower) = leader.follower_on(node) else {
            return;
        };
        let is_present = self.lanes.get(&node).is_some_and(|lane| lane.0 == session);
        if code == ErrorCode::FENCED_LEADER_EPOCH && is_present {
            self.step_down(format!("node {node} knows a higher epoch: {cause}"));
        } else if let Some(leader) = self.leader_mut() {
            match image_id {
                Some(id) => leader.handle_grant_refused(now, follower, session, id, cause),
                None => leader.handle_refused(now, follower, session, cause),
            }
        }
        self.advance(now);
    }

    /// The leader of an epoch asks on a new lane that we revoke and report: see
    /// [`Follower::handle_revoke_request`].
    pub fn handle_revoke_request(&mut self, now: u64, session: u64, epoch: (i32, i64)) {
        if epoch.0 > self.leader_epoch() {
            self.step_down(format!("another node leads in epoch {}", epoch.0));
        }
        match &mut self.role {
            Role::Leader(_) => self.refuse_as_leader(None),
            Role::Follower(follower) => follower.handle_revoke_request(session, epoch),
        }
        self.advance(now);
    }

    /// The leader of the session has found where our logs part: see
    /// [`Follower::handle_truncate_request`].
    pub fn handle_truncate_request(&mut self, session: u64, leader_epoch: i32, cut: Cut) {
        match &mut self.role {
            Role::Leader(_) => self.refuse_as_leader(None),
            Role::Follower(follower) => {
                follower.handle_truncate_request(session, leader_epoch, cut);
            }
        }
    }

    /// The leader of the session asks for an image: see [`Follower::handle_grant_request`].
    pub fn handle_grant_request(
        &mut self,
        now: u64,
        session: u64,
        leader_epoch: i32,
        ask: GrantAsk,
        tail: Option<Tail>,
    ) {
        match &mut self.role {
            Role::Leader(_) => self.refuse_as_leader(Some(ask.image_id)),
            Role::Follower(follower) => {
                follower.handle_grant_request(now, session, leader_epoch, ask, tail);
            }
        }
    }

    fn refuse_as_leader(&mut self, image_id: Option<ImageId>) {
        let cause = format!("this node leads in epoch {}", self.leader_epoch());
        let refuse = follower::Command::Refuse {
            image_id,
            code: ErrorCode::FENCED_LEADER_EPOCH,
            cause,
        };
        self.commands.push_back(Command::Follower(refuse));
    }

    /// A node tells how far its files reach.
    pub fn handle_log_end(
        &mut self,
        now: u64,
        member: Member,
        last_epoch: i32,
        log_end_offset: i64,
    ) {
        let log_end = NodeLogEnd {
            memory_id: member.memory_id,
            last_epoch,
            log_end_offset,
        };
        self.log_ends.insert(member.node, log_end);
        self.advance(now);
    }

    /// The follower's grants are withdrawn, or could not be.
    pub fn handle_revoked(&mut self, now: u64, is_revoked: bool) {
        if let Some(follower) = self.follower_mut() {
            if is_revoked {
                follower.handle_revoked();
            } else {
                follower.handle_revoke_failed(now);
            }
        }
        self.advance(now);
    }

    /// The follower's memory has been scanned.
    pub fn handle_scanned(&mut self, now: u64, result: Result<Stored, Fault>) {
        if let Some(follower) = self.follower_mut() {
            match result {
                Ok(stored) => follower.handle_scanned(now, stored),
                Err(fault) => follower.handle_scan_failed(now, fault),
            }
        }
        self.advance(now);
    }

    /// The follower's log has been cut.
    pub fn handle_cut(&mut self, now: u64, result: Result<Stored, Fault>) {
        if let Some(follower) = self.follower_mut() {
            match result {
                Ok(stored) => follower.handle_cut(now, stored),
                Err(fault) => follower.handle_cut_failed(now, fault),
            }
        }
        self.advance(now);
    }

    /// An image has been made, in whichever role it was asked for.
    pub fn handle_image_ready(&mut self, now: u64, id: ImageId, fill: Option<(Fill, Mark)>) {
        match &mut self.role {
            Role::Leader(leader) => leader.handle_image_ready(now, id),
            Role::Follower(follower) => follower.handle_image_ready(now, id, fill),
        }
    }

    /// An image could not be made.
    pub fn handle_image_failed(&mut self, now: u64, id: ImageId, cause: String) {
        match &mut self.role {
            Role::Leader(leader) => leader.handle_image_failed(now, id),
            Role::Follower(follower) => follower.handle_image_failed(now, id, cause),
        }
    }

    /// A cold image has been made, for a follower of the leader that we are or were.
    pub fn handle_cold_loaded(&mut self, follower: usize, image: ImageState) {
        match &mut self.role {
            Role::Leader(leader) if follower < leader.followers_count() => {
                leader.handle_cold_loaded(follower, image);
            }
            _ => self.commands.push_back(Command::ReleaseImage(image.id())),
        }
    }

    /// Does what is due; `tail` reads the newest tail of our entry. Call it at [`Replica::poll_timeout`].
    pub fn handle_tick(&mut self, now: u64, tail: impl FnOnce() -> Option<Tail>) {
        match &mut self.role {
            Role::Leader(leader) => leader.handle_tick(now),
            Role::Follower(follower) => {
                if follower.wants_entry(now) {
                    follower.handle_entry(now, tail());
                }
                follower.handle_tick(now);
            }
        }
        while let Some(&(due, id)) = self.retired.front()
            && due <= now
        {
            self.retired.pop_front();
            self.commands.push_back(Command::ReleaseImage(id));
        }
        self.advance(now);
    }

    /// When [`Replica::handle_tick`], or `poll_post` of the leader, must be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let engine = match &self.role {
            Role::Leader(leader) => leader.poll_timeout(),
            Role::Follower(follower) => follower.poll_timeout(),
        };
        let retired = self.retired.front().map(|(due, _)| *due);
        let dues = [engine, retired, self.hand_over, self.proposal_due()];
        dues.into_iter().flatten().min()
    }

    /// The next thing to do; call until `None` after every event, also one of the engines'.
    pub fn poll_command(&mut self, now: u64) -> Option<Command> {
        let is_due = self.leader().is_some_and(Leader::is_isr_look_due);
        if is_due || self.hand_over.is_some() {
            self.advance(now);
        }
        let command = self.commands.pop_front();
        command.or_else(|| match &mut self.role {
            Role::Leader(leader) => leader.poll_command().map(Command::Leader),
            Role::Follower(follower) => follower.poll_command().map(Command::Follower),
        })
    }

    fn propose(&mut self, now: u64, aim: Aim, state: PartitionState) {
        let Some(agreed) = &self.agreed else { return };
        self.last_ticket += 1;
        let (ticket, expected_revision) = (self.last_ticket, agreed.revision);
        if let (Role::Leader(leader), Aim::Isr) = (&mut self.role, aim) {
            leader.isr_proposed(now, &state.isr);
        }
        self.commands.push_back(Command::Propose {
            ticket,
            expected_revision,
            state: state.clone(),
        });
        self.proposal = Some(Proposal {
            ticket,
            expected_revision,
            state,
            aim,
            retry_at: None,
        });
    }
}
