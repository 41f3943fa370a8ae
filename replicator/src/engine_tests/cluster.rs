//! Several nodes and a compare-and-swap: replicas that elect, depose and truncate one another.
//!
//! Everything between nodes is a queue, and each step takes one thing from one of them. What is checked from
//! outside is what a user relies on: an acknowledged record is in the log for good, logs are equal up to the
//! high watermark, and one node at most leads in an epoch.

use std::collections::{BTreeMap, VecDeque};

use super::model::*;
use crate::control::{Acks, ErrorCode};
use crate::coordinator::{Agreed, Answer, Member, MemoryId, PartitionState};
use crate::epoch::Cut;
use crate::follower::{self, Fill};
use crate::image::{ImageId, Mark};
use crate::leader::{self, GrantReply, Post};
use crate::partition::DrainJob;
use crate::replica::{Command, Replica, ReplicaConfig};
use crate::table::{Entry, Tail};

/// How long a member may lag, in the model's nanoseconds.
const LAG_MAX_NS: u64 = 600;

fn config(min_isr: usize) -> ReplicaConfig {
    ReplicaConfig {
        leader: leader::LeaderConfig {
            lag_max_ns: LAG_MAX_NS,
            min_isr,
            ..leader_config()
        },
        stagger_ns: 50,
        retry_delay_ns: 100,
        ..ReplicaConfig::new(log_config())
    }
}

/// A job of the helper.
enum Helper {
    Make(ImageId, Option<Fill>),
    Revoke,
}

/// A job of the writer: done in order.
enum Writer {
    Leader(DrainJob),
    Follower(follower::Drain),
    Scan(i32),
    Cut(Cut),
}

/// What the coordinator, or another node, tells a node.
enum Told {
    Changed(Agreed),
    Answered(u64, Answer),
    Nodes(Vec<Member>),
    Session(bool),
    PeerDown(u32),
    LogEnd(Member, i32, i64),
}

pub(super) struct Node {
    pub(super) me: Member,
    incarnation: u64,
    /// `None` while the process is down.
    pub(super) replica: Option<Replica>,
    memory: Memory,
    pub(super) files: Files,
    helper: VecDeque<Helper>,
    writer: VecDeque<Writer>,
    loading: VecDeque<(usize, ImageId, i64, i64)>,
    told: VecDeque<Told>,
    /// Appended and not acknowledged: the offset after each, and its bytes.
    waiting: VecDeque<(i64, Vec<u8>)>,
    /// Whose request is answered next.
    asked_by: (u32, u64),
    high_watermark: i64,
    pub(super) handed_over: Option<u32>,
}

/// A lane, and the control connection that it belongs to.
#[derive(Default)]
struct Link {
    /// 0 while it is down.
    session: u64,
    requests: VecDeque<(i32, i64, Request)>,
    replies: VecDeque<(Option<ImageId>, follower::Command)>,
    posts: VecDeque<(Post, Vec<u8>)>,
    acks: VecDeque<i32>,
}

pub(super) struct Proposed {
    node: u32,
    ticket: u64,
    expected_revision: i64,
    state: PartitionState,
}

pub(super) struct Cluster {
    pub(super) now: u64,
    min_isr: usize,
    pub(super) nodes: BTreeMap<u32, Node>,
    links: BTreeMap<(u32, u32), Link>,
    sessions: u64,
    pub(super) agreed: Agreed,
    pub(super) proposals: VecDeque<Proposed>,
    /// Nodes whose session has not expired.
    live: Vec<u32>,
    memories: u8,
    /// What has been committed, as a leader had it.
    pub(super) truth: Vec<u8>,
    truth_end: i64,
    /// Acknowledged batches: the offset after each, and its bytes.
    pub(super) acknowledged: Vec<(i64, Vec<u8>)>,
    leaders: BTreeMap<i32, u32>,
    pub(super) lost: Vec<String>,
}

fn new_node(id: u32, memory: u8) -> Node {
    Node {
        me: Member {
            node: id,
            memory_id: MemoryId([memory; 16]),
        },
        incarnation: 0,
        replica: None,
        memory: Memory::new(),
        files: Files::default(),
        helper: VecDeque::new(),
        writer: VecDeque::new(),
        loading: VecDeque::new(),
        told: VecDeque::new(),
        waiting: VecDeque::new(),
        asked_by: (0, 0),
        high_watermark: 0,
        handed_over: None,
    }
}

impl Node {
    fn tail(&self) -> Option<Tail> {
        Entry::decode(&self.memory.entry).tail
    }

    /// The log as a fence would find it.
    fn log(&self) -> Files {
        let mut files = self.files.clone();
        self.memory.scan(&mut files, i32::MAX);
        files
    }

    pub(super) fn is_leading(&self) -> bool {
        self.replica.as_ref().is_some_and(|r| r.leader().is_some())
    }
}

impl Cluster {
    pub(super) fn new(count: u32, min_isr: usize) -> Self {
        let replicas: Vec<u32> = (1..=count).collect();
        let links = replicas.iter().flat_map(|&a| {
            let others = (1..=count).filter(move |&b| a != b);
            others.map(move |b| ((a, b), Link::default()))
        });
        let mut cluster = Self {
            now: 0,
            min_isr,
            nodes: BTreeMap::new(),
            links: links.collect(),
            sessions: 0,
            agreed: Agreed {
                state: PartitionState {
                    leader: None,
                    leader_epoch: 0,
                    isr: Vec::new(),
                    replicas: replicas.clone(),
                },
                revision: 1,
            },
            proposals: VecDeque::new(),
            live: Vec::new(),
            memories: 0,
            truth: Vec::new(),
            truth_end: 0,
            acknowledged: Vec::new(),
            leaders: BTreeMap::new(),
            lost: Vec::new(),
        };
        for id in replicas {
            cluster.memories += 1;
            cluster.nodes.insert(id, new_node(id, cluster.memories));
            cluster.start(id);
        }
        cluster
    }

    fn members(&self) -> Vec<Member> {
        let live = self.live.iter();
        live.map(|id| self.nodes[id].me).collect()
    }

    fn tell_all(&mut self, told: impl Fn() -> Told) {
        for node in self.nodes.values_mut() {
            if node.replica.is_some() {
                node.told.push_back(told());
            }
        }
    }

    fn tell_nodes(&mut self) {
        let members = self.members();
        self.tell_all(|| Told::Nodes(members.clone()));
    }

    /// A process starts on what the last one has left.
    pub(super) fn start(&mut self, id: u32) {
        let min_isr = self.min_isr;
        let node = self.nodes.get_mut(&id).unwrap();
        if node.replica.is_some() {
            return;
        }
        let tail = node.tail();
        let seen = tail.map_or(0, |tail| tail.leader_epoch);
        let stored = node.memory.scan(&mut node.files, seen);
        let seen = seen.max(stored.epochs.latest_epoch().unwrap_or(0));
        node.memory = Memory {
            next_addr: node.memory.next_addr,
            ..Memory::new()
        };
        node.incarnation += 1;
        node.high_watermark = 0;
        node.handed_over = None;
        let replica = Replica::new(config(min_isr), node.me, node.incarnation, seen, stored);
        node.replica = Some(replica);
        node.told.push_back(Told::Changed(self.agreed.clone()));
        self.renew(id);
    }

    /// The process is killed; what is on its way to it is torn, what it has sent may arrive.
    pub(super) fn kill(&mut self, id: u32, torn: usize) {
        let others: Vec<u32> = self.nodes.keys().copied().filter(|&n| n != id).collect();
        for other in others {
            self.lose_lane((other, id), torn);
            for _ in 0..torn % 4 {
                self.deliver_post((id, other));
            }
            self.lose_lane((id, other), torn / 4);
            if !torn.is_multiple_of(3) {
                self.nodes
                    .get_mut(&other)
                    .unwrap()
                    .told
                    .push_back(Told::PeerDown(id));
            }
        }
        let node = self.nodes.get_mut(&id).unwrap();
        node.replica = None;
        node.helper.clear();
        node.writer.clear();
        node.loading.clear();
        node.told.clear();
        node.waiting.clear();
    }

    /// The session of a node ends, and the others are told; the node itself may learn it later.
    pub(super) fn expire(&mut self, id: u32, is_told: bool) {
        self.live.retain(|&node| node != id);
        let node = self.nodes.get_mut(&id).unwrap();
        if is_told && node.replica.is_some() {
            node.told.push_back(Told::Session(false));
        }
        self.tell_nodes();
    }

    pub(super) fn renew(&mut self, id: u32) {
        if !self.live.contains(&id) {
            self.live.push(id);
        }
        let node = self.nodes.get_mut(&id).unwrap();
        node.told.push_back(Told::Changed(self.agreed.clone()));
        node.told.push_back(Told::Session(true));
        self.tell_nodes();
    }

    /// A machine restarts: its memory is gone, what was in its files is not.
    pub(super) fn lose_memory(&mut self, id: u32) {
        self.kill(id, 1);
        self.live.retain(|&node| node != id);
        self.memories += 1;
        let memory_id = MemoryId([self.memories; 16]);
        let node = self.nodes.get_mut(&id).unwrap();
        node.me.memory_id = memory_id;
        node.memory = Memory {
            next_addr: node.memory.next_addr,
            ..Memory::new()
        };
        self.tell_nodes();
    }

    /// Whether some other member of the ISR still has the memory that it is a member by.
    pub(super) fn can_spare(&self, id: u32) -> bool {
        let is_kept = |isr: &[Member]| {
            let mut others = isr.iter().filter(|member| member.node != id);
            isr.is_empty() || others.any(|member| self.nodes[&member.node].me == *member)
        };
        // What has been proposed may come to be agreed on, even after its proposer has died.
        let proposed = self.proposals.iter().map(|p| &p.state);
        let mut states = proposed.chain([&self.agreed.state]);
        states.all(|state| is_kept(&state.isr))
    }

    pub(super) fn connect(&mut self, (from, to): (u32, u32)) {
        let memory_id = self.nodes[&to].me.memory_id;
        let is_up = self.nodes[&to].replica.is_some();
        let link = self.links.get_mut(&(from, to)).unwrap();
        let Some(replica) = &mut self.nodes.get_mut(&from).unwrap().replica else {
            return;
        };
        if !is_up || link.session > 0 {
            return;
        }
        self.sessions += 1;
        link.session = self.sessions;
        replica.handle_peer_up(self.now, to);
        replica.handle_lane_up(self.now, to, self.sessions, memory_id);
        self.run(from);
    }

    /// A lane breaks; of the next chain a prefix has landed.
    pub(super) fn lose_lane(&mut self, (from, to): (u32, u32), torn: usize) {
        let link = self.links.get_mut(&(from, to)).unwrap();
        let session = std::mem::take(&mut link.session);
        if session == 0 {
            return;
        }
        let link = std::mem::take(link);
        if let Some((post, data)) = link.posts.front() {
            let memory = &mut self.nodes.get_mut(&to).unwrap().memory;
            let landed = torn % (data.len() + 64);
            let mut is_granted = true;
            if let Some(write) = &post.data {
                match memory.granted(write.remote_addr) {
                    Some(target) => {
                        let len = landed.min(data.len());
                        target[..len].copy_from_slice(&data[..len]);
                    }
                    None => is_granted = false,
                }
            }
            let of_tail = landed.saturating_sub(data.len());
            if is_granted && post.tail_rkey == memory.entry_key {
                let at = usize::try_from(post.tail_addr).unwrap();
                memory.entry[at..at + of_tail].copy_from_slice(&post.tail[..of_tail]);
            }
        }
        if let Some(replica) = &mut self.nodes.get_mut(&from).unwrap().replica {
            replica.handle_lane_down(self.now, to, session);
            self.run(from);
        }
    }

    /// Executes what a node wants, and looks at what it says.
    fn run(&mut self, id: u32) {
        while let Some(command) = self.poll(id) {
            self.execute(id, command);
        }
        let node = self.nodes.get_mut(&id).unwrap();
        if let Some(leader) = node.replica.as_mut().and_then(Replica::leader_mut) {
            for follower in 0..leader.followers_count() {
                let to = leader.follower(follower).0;
                while let Some(post) = leader.poll_post(self.now, follower) {
                    let data = post.data.as_ref().map_or(Vec::new(), |data| {
                        let (_, bytes) = &node.memory.images[&data.image_id];
                        bytes[data.range.start as usize..data.range.end as usize].to_vec()
                    });
                    let link = self.links.get_mut(&(id, to)).unwrap();
                    link.posts.push_back((post, data));
                }
            }
        }
        // Posting may have made something else due.
        while let Some(command) = self.poll(id) {
            self.execute(id, command);
        }
        self.observe(id);
    }

    fn poll(&mut self, id: u32) -> Option<Command> {
        let replica = self.nodes.get_mut(&id)?.replica.as_mut()?;
        replica.poll_command(self.now)
    }

    fn execute(&mut self, id: u32, command: Command) {
        let node = self.nodes.get_mut(&id).unwrap();
        match command {
            Command::Leader(command) => self.execute_leader(id, command),
            Command::Follower(command) => self.execute_follower(id, command),
            Command::Propose {
                ticket,
                expected_revision,
                state,
            } => self.proposals.push_back(Proposed {
                node: id,
                ticket,
                expected_revision,
                state,
            }),
            Command::StartedLeading { leader_epoch, .. } => {
                let other = self.leaders.insert(leader_epoch, id);
                assert_eq!(other, None, "two leaders in epoch {leader_epoch}");
                node.high_watermark = 0;
            }
            Command::StoppedLeading { .. } => node.waiting.clear(),
            Command::HandedOver(to) => node.handed_over = Some(to),
            Command::AnnounceLogEnd {
                nodes,
                last_epoch,
                log_end_offset,
            } => {
                let me = node.me;
                for other in nodes {
                    let other = self.nodes.get_mut(&other).unwrap();
                    if other.replica.is_some() {
                        let told = Told::LogEnd(me, last_epoch, log_end_offset);
                        other.told.push_back(told);
                    }
                }
            }
            Command::Lost(what) => self.lost.push(what),
            Command::ReleaseImage(image) => {
                node.memory.images.remove(&image).expect("released once");
            }
        }
    }

    fn execute_leader(&mut self, id: u32, command: leader::Command) {
        let node = self.nodes.get_mut(&id).unwrap();
        let leader = node.replica.as_mut().and_then(Replica::leader_mut).unwrap();
        let epoch = (
            leader.log().leader_epoch(),
            leader.log().epoch_start_offset(),
        );
        let mut ask = |follower: usize, request| {
            let to = leader.follower(follower).0;
            let link = self.links.get_mut(&(id, to)).unwrap();
            link.requests.push_back((epoch.0, epoch.1, request));
        };
        match command {
            leader::Command::MakeImage {
                id, starts_segment, ..
            } => {
                node.memory.starters.extend(starts_segment.then_some(id));
                node.helper.push_back(Helper::Make(id, None));
            }
            leader::Command::ReleaseImage(image) => {
                node.memory.images.remove(&image).expect("released once");
            }
            leader::Command::RequestRevoke { follower } => ask(follower, Request::Revoke),
            leader::Command::RequestTruncate { follower, cut } => {
                ask(follower, Request::Truncate(cut));
            }
            leader::Command::RequestGrant {
                follower,
                ask: grant,
            } => {
                ask(follower, Request::Grant(grant));
            }
            leader::Command::LoadCold {
                follower,
                id,
                offset,
                limit_offset,
            } => node.loading.push_back((follower, id, offset, limit_offset)),
            leader::Command::Describe { current, next } => {
                node.memory.describe(epoch, Some(current), next);
            }
            leader::Command::PublishTail(tail) => {
                node.memory.put_tail(tail.sequence, &tail.encode());
            }
            leader::Command::Drain(job) => node.writer.push_back(Writer::Leader(job)),
            leader::Command::BeginEpoch(_)
            | leader::Command::RequestSync { .. }
            | leader::Command::Sync(_) => {}
        }
    }

    fn execute_follower(&mut self, id: u32, command: follower::Command) {
        let node = self.nodes.get_mut(&id).unwrap();
        match command {
            follower::Command::MakeImage {
                id,
                fill,
                starts_segment,
                ..
            } => {
                node.memory.starters.extend(starts_segment.then_some(id));
                node.helper.push_back(Helper::Make(id, fill));
            }
            follower::Command::Revoke => node.helper.push_back(Helper::Revoke),
            follower::Command::Scan { leader_epoch } => {
                node.writer.push_back(Writer::Scan(leader_epoch));
            }
            follower::Command::Cut(cut) => node.writer.push_back(Writer::Cut(cut)),
            follower::Command::Drain(job) => node.writer.push_back(Writer::Follower(job)),
            follower::Command::WriteTail(tail) => {
                node.memory.put_tail(0, &tail.encode());
                node.memory.put_tail(1, &tail.encode());
            }
            follower::Command::Describe { current, next } => {
                let replica = node.replica.as_ref();
                let follower = replica.and_then(Replica::follower);
                let epoch = follower.map_or((0, 0), |f| f.granted_epoch());
                node.memory.describe(epoch, current, next);
            }
            follower::Command::Release(image) => {
                node.memory.images.remove(&image).expect("released once");
            }
            follower::Command::Lost(from, to) => {
                self.lost.push(format!("node {id}: {from} to {to}"));
            }
            follower::Command::Sync(_) | follower::Command::Durable(_) => {}
            reply @ (follower::Command::Grant { .. }
            | follower::Command::Refuse { .. }
            | follower::Command::Report(_)) => {
                let image = match &reply {
                    follower::Command::Grant { image_id, .. } => Some(*image_id),
                    follower::Command::Refuse { image_id, .. } => *image_id,
                    _ => None,
                };
                let (leader, session) = node.asked_by;
                let link = self.links.get_mut(&(leader, id));
                if let Some(link) = link.filter(|link| link.session == session) {
                    link.replies.push_back((image, reply));
                }
            }
        }
    }

    /// What a leader says is committed must be so for good; what it acknowledges too.
    fn observe(&mut self, id: u32) {
        let node = self.nodes.get_mut(&id).unwrap();
        let Some(leader) = node.replica.as_ref().and_then(Replica::leader) else {
            return;
        };
        let high_watermark = leader.high_watermark();
        assert!(high_watermark >= node.high_watermark, "it has fallen");
        assert!(
            high_watermark <= leader.log().log_end_offset(),
            "it is beyond the log"
        );
        node.high_watermark = high_watermark;
        while let Some((end, _)) = node.waiting.front()
            && *end <= high_watermark
        {
            self.acknowledged.extend(node.waiting.pop_front());
        }
        if high_watermark > self.truth_end {
            let log = node.log().all();
            let committed = prefix(&log, high_watermark);
            assert!(
                committed.starts_with(&self.truth),
                "node {id} has not what was committed"
            );
            self.truth = committed.to_vec();
            self.truth_end = high_watermark;
        }
    }

    /// Appends at whoever thinks that it leads.
    pub(super) fn append(&mut self, choice: usize, records: usize, value_len: usize) -> bool {
        let leading = self.nodes.values().filter(|node| node.is_leading());
        let leading: Vec<u32> = leading.map(|node| node.me.node).collect();
        if leading.is_empty() {
            return false;
        }
        let id = leading[choice % leading.len()];
        let node = self.nodes.get_mut(&id).unwrap();
        let leader = node.replica.as_mut().and_then(Replica::leader_mut).unwrap();
        let mut batch = batch(records, value_len);
        let Ok(placement) = leader.append(self.now, Acks::Replicated, &mut batch) else {
            return false;
        };
        let bytes = batch.as_bytes();
        let at = placement.byte_position as usize;
        let (_, image) = node.memory.images.get_mut(&placement.image_id).unwrap();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        node.waiting
            .push_back((placement.end_offset, bytes.to_vec()));
        self.run(id);
        true
    }

    /// Does one thing that may happen next, at or after a place in the list of all; says whether there was
    /// any.
    pub(super) fn step(&mut self, choice: usize) -> bool {
        let ids: Vec<u32> = self.nodes.keys().copied().collect();
        let links: Vec<(u32, u32)> = self.links.keys().copied().collect();
        let count = 1 + 4 * ids.len() + 4 * links.len();
        (0..count).any(|k| {
            let k = (choice + k) % count;
            if k == 0 {
                return self.decide(choice);
            }
            let k = k - 1;
            if let Some(&id) = ids.get(k / 4) {
                return match k % 4 {
                    0 => self.deliver_told(id),
                    1 => self.help(id),
                    2 => self.write(id),
                    _ => self.load(id),
                };
            }
            let k = k - 4 * ids.len();
            match (k % 4, links[k / 4]) {
                (0, link) => self.deliver_request(link),
                (1, link) => self.deliver_reply(link),
                (2, link) => self.deliver_post(link),
                (_, link) => self.deliver_ack(link),
            }
        })
    }

    /// The coordinator decides on a proposal; its answer may be lost, or the proposal late.
    fn decide(&mut self, choice: usize) -> bool {
        let Some(proposed) = self.proposals.pop_front() else {
            return false;
        };
        let answer = if choice % 16 == 3 && self.proposals.len() < 4 {
            let (node, ticket) = (proposed.node, proposed.ticket);
            self.proposals.push_back(proposed);
            self.answer(node, ticket, unknown());
            return true;
        } else if proposed.expected_revision == self.agreed.revision {
            let epochs = (self.agreed.state.leader_epoch, proposed.state.leader_epoch);
            assert!(epochs.1 >= epochs.0, "an epoch falls");
            assert!(!proposed.state.isr.is_empty());
            let revision = self.agreed.revision + 1;
            self.agreed = Agreed {
                state: proposed.state,
                revision,
            };
            let agreed = self.agreed.clone();
            self.tell_all(|| Told::Changed(agreed.clone()));
            Answer::Accepted { revision }
        } else {
            Answer::Conflict(self.agreed.clone())
        };
        let is_lost = choice % 16 == 5;
        let answer = if is_lost { unknown() } else { answer };
        self.answer(proposed.node, proposed.ticket, answer);
        true
    }

    fn answer(&mut self, node: u32, ticket: u64, answer: Answer) {
        let node = self.nodes.get_mut(&node).unwrap();
        if node.replica.is_some() {
            node.told.push_back(Told::Answered(ticket, answer));
        }
    }

    fn deliver_told(&mut self, id: u32) -> bool {
        let now = self.now;
        let node = self.nodes.get_mut(&id).unwrap();
        let (Some(replica), Some(told)) = (&mut node.replica, node.told.pop_front()) else {
            return false;
        };
        match told {
            Told::Changed(agreed) => replica.handle_changed(now, agreed),
            Told::Answered(ticket, answer) => replica.handle_answered(now, ticket, answer),
            Told::Nodes(live) => replica.handle_nodes(now, live),
            Told::Session(has_session) => replica.handle_session(now, has_session),
            Told::PeerDown(node) => replica.handle_peer_down(now, node),
            Told::LogEnd(member, epoch, end) => replica.handle_log_end(now, member, epoch, end),
        }
        self.run(id);
        true
    }

    fn help(&mut self, id: u32) -> bool {
        let now = self.now;
        let node = self.nodes.get_mut(&id).unwrap();
        let (Some(replica), Some(job)) = (&mut node.replica, node.helper.pop_front()) else {
            return false;
        };
        match job {
            Helper::Revoke => {
                node.memory.revoke();
                replica.handle_revoked(now, true);
            }
            Helper::Make(image, fill) => {
                let mut bytes = Vec::new();
                let filled = fill.map(|fill| {
                    if fill.len > 0 {
                        let file = &node.files.0[&fill.place.segment_base_offset];
                        let from = usize::try_from(fill.place.file_position).unwrap();
                        bytes = file[from..from + fill.len as usize].to_vec();
                    }
                    (fill, walk(&bytes, Mark::start(fill.base_offset), None))
                });
                node.memory.make(image, &bytes);
                replica.handle_image_ready(now, image, filled);
            }
        }
        self.run(id);
        true
    }

    fn write(&mut self, id: u32) -> bool {
        let now = self.now;
        let node = self.nodes.get_mut(&id).unwrap();
        let (Some(replica), Some(job)) = (&mut node.replica, node.writer.pop_front()) else {
            return false;
        };
        match job {
            Writer::Leader(job) => {
                if let Some((_, bytes)) = node.memory.images.get(&job.image_id) {
                    let bytes = &bytes[job.from as usize..job.to as usize];
                    node.files.append(job.place, job.from, bytes);
                }
                if let Some(leader) = replica.leader_mut() {
                    leader.handle_drained(now, job.image_id, job.to);
                }
            }
            Writer::Follower(job) => {
                let bytes = &node.memory.images[&job.image_id].1;
                let end = walk(bytes, job.from, job.to.map(|to| to.byte_position));
                assert!(
                    job.to.is_none_or(|to| to == end),
                    "{:?} is not {end:?}",
                    job.to
                );
                let range = job.from.byte_position as usize..end.byte_position as usize;
                node.files
                    .append(job.place, job.from.byte_position, &bytes[range]);
                if let Some(follower) = replica.follower_mut() {
                    follower.handle_drained(now, &job, end);
                }
            }
            Writer::Scan(leader_epoch) => {
                let stored = node.memory.scan(&mut node.files, leader_epoch);
                replica.handle_scanned(now, Ok(stored));
            }
            Writer::Cut(cut) => {
                node.files.cut(cut);
                replica.handle_cut(now, Ok(node.files.stored()));
            }
        }
        self.run(id);
        true
    }

    fn load(&mut self, id: u32) -> bool {
        let node = self.nodes.get_mut(&id).unwrap();
        let (Some(replica), Some(job)) = (&mut node.replica, node.loading.pop_front()) else {
            return false;
        };
        let (follower, image, offset, limit_offset) = job;
        let (place, bytes) = node.files.load(offset, limit_offset).unwrap();
        node.memory.make(image, &bytes);
        replica.handle_cold_loaded(follower, state_of(image, offset, place, &bytes));
        self.run(id);
        true
    }

    fn deliver_request(&mut self, (from, to): (u32, u32)) -> bool {
        let now = self.now;
        let link = self.links.get_mut(&(from, to)).unwrap();
        let node = self.nodes.get_mut(&to).unwrap();
        let (Some(replica), Some((epoch, start, request))) =
            (&mut node.replica, link.requests.pop_front())
        else {
            return false;
        };
        let session = link.session;
        node.asked_by = (from, session);
        match request {
            Request::Revoke => replica.handle_revoke_request(now, session, (epoch, start)),
            Request::Truncate(cut) => replica.handle_truncate_request(session, epoch, cut),
            Request::Sync(_) => {}
            Request::Grant(ask) => {
                let tail = Entry::decode(&node.memory.entry).tail;
                replica.handle_grant_request(now, session, epoch, ask, tail);
            }
        }
        self.run(to);
        true
    }

    fn deliver_reply(&mut self, (from, to): (u32, u32)) -> bool {
        let now = self.now;
        let link = self.links.get_mut(&(from, to)).unwrap();
        let Some((image, reply)) = link.replies.pop_front() else {
            return false;
        };
        let session = link.session;
        let memory = &self.nodes[&to].memory;
        let reply = match reply {
            follower::Command::Grant {
                image_id,
                len,
                log_end_offset,
                byte_position,
            } => Ok(GrantReply {
                image_id,
                addr: memory.images.get(&image_id).map_or(0, |(addr, _)| *addr),
                rkey: 7,
                len,
                entry_addr: 0,
                entry_rkey: memory.entry_key,
                log_end_offset,
                byte_position,
            }),
            other => Err(other),
        };
        let node = self.nodes.get_mut(&from).unwrap();
        let Some(replica) = &mut node.replica else {
            return true;
        };
        let follower = replica.leader().and_then(|leader| leader.follower_on(to));
        match (reply, replica.leader_mut().zip(follower)) {
            (Ok(grant), Some((leader, follower))) => {
                leader.handle_grant(now, follower, session, &grant);
            }
            (Err(follower::Command::Report(report)), Some((leader, follower))) => {
                leader.handle_report(follower, session, &report);
            }
            (Err(follower::Command::Refuse { code, cause, .. }), _) => {
                assert!(code != ErrorCode::INTERNAL, "{cause}");
                replica.handle_refused(now, to, session, image, (code, cause));
            }
            _ => {}
        }
        self.run(from);
        true
    }

    fn deliver_post(&mut self, (from, to): (u32, u32)) -> bool {
        let link = self.links.get_mut(&(from, to)).unwrap();
        let Some((post, data)) = link.posts.pop_front() else {
            return false;
        };
        let memory = &mut self.nodes.get_mut(&to).unwrap().memory;
        if let Some(write) = &post.data {
            let Some(target) = memory.granted(write.remote_addr) else {
                self.lose_lane((from, to), 0);
                return true;
            };
            target[..data.len()].copy_from_slice(&data);
        }
        if post.tail_rkey != memory.entry_key {
            self.lose_lane((from, to), 0);
            return true;
        }
        let at = usize::try_from(post.tail_addr).unwrap();
        memory.entry[at..at + 64].copy_from_slice(&post.tail);
        link.acks.push_back(post.leader_epoch);
        true
    }

    fn deliver_ack(&mut self, (from, to): (u32, u32)) -> bool {
        let link = self.links.get_mut(&(from, to)).unwrap();
        let Some(epoch) = link.acks.pop_front() else {
            return false;
        };
        let session = link.session;
        let replica = self.nodes.get_mut(&from).unwrap().replica.as_mut();
        if let Some(leader) = replica.and_then(Replica::leader_mut)
            && let Some(follower) = leader.follower_on(to)
        {
            leader.handle_completion(self.now, follower, session, epoch);
        }
        self.run(from);
        true
    }

    pub(super) fn tick(&mut self, ns: u64) {
        self.now += ns;
        let ids: Vec<u32> = self.nodes.keys().copied().collect();
        for id in ids {
            let node = self.nodes.get_mut(&id).unwrap();
            let tail = Entry::decode(&node.memory.entry).tail;
            if let Some(replica) = &mut node.replica {
                if let Some(follower) = replica.follower_mut()
                    && follower.wants_entry(self.now + 1_000_000_000)
                {
                    follower.handle_entry(self.now, tail);
                }
                replica.handle_tick(self.now, || tail);
            }
            self.run(id);
        }
    }

    /// Everything comes back, and goes on until nothing is left to do.
    pub(super) fn heal(&mut self) {
        let ids: Vec<u32> = self.nodes.keys().copied().collect();
        let links: Vec<(u32, u32)> = self.links.keys().copied().collect();
        for &id in &ids {
            self.start(id);
            self.renew(id);
        }
        for round in 1..400 {
            for &link in &links {
                self.connect(link);
            }
            for k in 0..20_000 {
                // Answers are lost no more.
                if !self.step(k * 16) {
                    break;
                }
            }
            self.tick(200);
            if round % 10 == 0 && self.check_healed().is_ok() {
                return;
            }
        }
    }

    /// What must hold when everything has come back.
    pub(super) fn check_healed(&self) -> Result<(), String> {
        let leading = self.nodes.values().filter(|node| node.is_leading());
        let leading: Vec<_> = leading.collect();
        let &[leader] = &leading[..] else {
            return Err(format!("{} leaders: {:?}", leading.len(), self.agreed));
        };
        if self.agreed.state.isr.len() < self.nodes.len() {
            return Err(format!("not all are in sync: {:?}", self.agreed));
        }
        let log = leader.log().all();
        if !log.starts_with(&self.truth) {
            let lost = &self.lost;
            return Err(format!(
                "the leader has not what was committed; reported: {lost:?}"
            ));
        }
        for node in self.nodes.values() {
            if node.log().all() != log {
                return Err(format!("node {} has another log", node.me.node));
            }
        }
        for (end, bytes) in &self.acknowledged {
            if !prefix(&log, *end).ends_with(bytes) {
                return Err(format!("the acknowledged batch before {end} is lost"));
            }
        }
        Ok(())
    }
}

fn unknown() -> Answer {
    Answer::Unknown {
        cause: "lost".to_owned(),
    }
}

/// The batches of a log below an offset.
fn prefix(log: &[u8], offset: i64) -> &[u8] {
    let mut at = 0;
    while let Some(batch) = batch_at(log, at).filter(|batch| batch.next_offset() <= offset) {
        at += batch.len();
    }
    &log[..at]
}
