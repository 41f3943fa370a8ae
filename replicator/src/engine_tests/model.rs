//! Nodes made of plain bytes, which execute the engines' commands.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use crate::consumer::{Cursor, Granted, Plan};
use crate::control::Acks;
use crate::coordinator::{Member, MemoryId};
use crate::epoch::{Cut, EpochCache};
use crate::follower::{self, Fault, Follower};
use crate::image::{FilePlace, ImageId, ImageState, Mark};
use crate::leader::{self, GrantAsk, GrantReply, Leader, LeaderConfig, Membership, Post};
use crate::partition::{CheckedBatch, Log, LogConfig, Stored};
use crate::record::{BatchBuilder, BatchView};
use crate::scan::{self, LogEnd};
use crate::table::{Descriptor, ENTRY_LEN, Entry, ImageLocation, tail_byte_offset};

pub(super) const IMAGE_LEN: u32 = 4096;
pub(super) const SEGMENT_LEN: u64 = 3 * 4096;
pub(super) const MEMORY: MemoryId = MemoryId([1; 16]);
pub(super) const START: FilePlace = FilePlace {
    segment_base_offset: 0,
    file_position: 0,
};

pub(super) fn log_config() -> LogConfig {
    LogConfig {
        images_max: 4,
        retired_max: 2,
        grace_ns: 50,
        ..LogConfig::new(IMAGE_LEN, SEGMENT_LEN)
    }
}

pub(super) fn leader_config() -> LeaderConfig {
    LeaderConfig {
        window_len: 1000,
        chains_max: 3,
        chain_len_max: 500,
        watermark_delay_ns: 5,
        drain_delay_ns: 5,
        drain_len: 2000,
        retry_delay_ns: 20,
        lag_max_ns: u64::MAX,
        min_isr: 1,
    }
}

pub(super) fn batch(records: usize, value_len: usize) -> CheckedBatch {
    let mut builder = BatchBuilder::new(4096);
    for i in 0..records {
        assert!(builder.append(
            0,
            None,
            Some(&vec![u8::try_from(i % 256).unwrap(); value_len]),
            &[]
        ));
    }
    CheckedBatch::new(builder.build().to_vec(), IMAGE_LEN as usize / 2).unwrap()
}

/// Segment files as byte strings.
#[derive(Default, Clone)]
pub(super) struct Files(pub(super) BTreeMap<i64, Vec<u8>>);

impl Files {
    pub(super) fn append(&mut self, place: FilePlace, from: u32, bytes: &[u8]) {
        let file = self.0.entry(place.segment_base_offset).or_default();
        assert_eq!(file.len() as u64, place.file_position + u64::from(from));
        file.extend_from_slice(bytes);
    }

    /// Batches from `offset` on, as a cold image holds them, and where they are; `None` if the files do not
    /// reach so far.
    pub(super) fn load(&self, offset: i64, limit_offset: i64) -> Option<(FilePlace, Vec<u8>)> {
        let (&segment_base_offset, file) = self.0.range(..=offset).next_back()?;
        let mut at = 0;
        while batch_at(file, at)?.base_offset() < offset {
            at += batch_at(file, at)?.len();
        }
        let file_position = at as u64;
        let mut bytes = Vec::new();
        while let Some(batch) = batch_at(file, at) {
            let is_full = bytes.len() + batch.len() > IMAGE_LEN as usize;
            if is_full || batch.base_offset() >= limit_offset {
                break;
            }
            bytes.extend_from_slice(batch.as_bytes());
            at += batch.len();
        }
        let place = FilePlace {
            segment_base_offset,
            file_position,
        };
        Some((place, bytes))
    }

    pub(super) fn all(&self) -> Vec<u8> {
        self.0.values().flatten().copied().collect()
    }

    /// Where the files of a log that ends at `log_end_offset` end.
    pub(super) fn end_place(&self, log_end_offset: i64) -> FilePlace {
        let last = self.0.last_key_value();
        last.map_or(
            FilePlace {
                segment_base_offset: log_end_offset,
                file_position: 0,
            },
            |(&segment_base_offset, bytes)| FilePlace {
                segment_base_offset,
                file_position: bytes.len() as u64,
            },
        )
    }

    /// What is in the files.
    pub(super) fn stored(&self) -> Stored {
        let mut epochs = EpochCache::default();
        let log_start_offset = self.0.keys().next().copied().unwrap_or(0);
        let mut log_end_offset = log_start_offset;
        for bytes in self.0.values() {
            let mut at = 0;
            while let Some(batch) = batch_at(bytes, at) {
                assert_eq!(batch.base_offset(), log_end_offset, "offsets are dense");
                epochs.note(batch.partition_leader_epoch(), batch.base_offset());
                log_end_offset = batch.next_offset();
                at += batch.len();
            }
        }
        Stored {
            log_start_offset,
            log_end_offset,
            high_watermark: 0,
            epochs,
            end_place: self.end_place(log_end_offset),
        }
    }

    pub(super) fn cut(&mut self, cut: Cut) {
        let to = match cut {
            Cut::RestartAt(at) => {
                self.0.clear();
                self.0.insert(at, Vec::new());
                return;
            }
            Cut::TruncateTo(to) => to,
        };
        self.0.retain(|&base, _| base < to || base == 0);
        if let Some(mut last) = self.0.last_entry() {
            let bytes = last.get_mut();
            let mut at = 0;
            while let Some(batch) = batch_at(bytes, at).filter(|b| b.next_offset() <= to) {
                at += batch.len();
            }
            bytes.truncate(at);
        }
    }
}

pub(super) fn batch_at(bytes: &[u8], at: usize) -> Option<BatchView<'_>> {
    BatchView::parse(bytes.get(at..)?)
        .ok()
        .map(|(batch, _)| batch)
}

/// The mark after the batches in `bytes` from `from` on: to their end, or to `to`.
pub(super) fn walk(bytes: &[u8], from: Mark, to: Option<u32>) -> Mark {
    let mut mark = from;
    while to.is_none_or(|to| mark.byte_position < to) {
        let Some(batch) = batch_at(bytes, mark.byte_position as usize) else {
            break;
        };
        if batch.base_offset() != mark.end_offset {
            break;
        }
        batch.verify_crc().unwrap();
        let len = u32::try_from(batch.len()).unwrap();
        mark = mark.after(batch.stamped_bytes(), len, batch.next_offset());
    }
    mark
}

pub(super) fn state_of(
    id: ImageId,
    base_offset: i64,
    place: FilePlace,
    bytes: &[u8],
) -> ImageState {
    let mut state = ImageState::new(id, base_offset, place, IMAGE_LEN);
    let mut at = 0;
    while let Some(batch) = batch_at(bytes, at) {
        at += batch.len();
        state.push(
            batch.stamped_bytes(),
            u32::try_from(batch.len()).unwrap(),
            batch.next_offset(),
        );
    }
    state.seal();
    state
}

/// One node's memory: images by address, and a table entry.
pub(super) struct Memory {
    pub(super) images: HashMap<ImageId, (u64, Vec<u8>)>,
    pub(super) next_addr: u64,
    pub(super) entry: [u8; ENTRY_LEN],
    /// Images that a leader may not write any more.
    pub(super) revoked: HashSet<ImageId>,
    /// The key under which the entry is registered for a leader.
    pub(super) entry_key: u32,
    pub(super) descriptors: u32,
    /// The images that begin a segment.
    pub(super) starters: HashSet<ImageId>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self {
            images: HashMap::new(),
            next_addr: 1 << 20,
            entry: [0; ENTRY_LEN],
            revoked: HashSet::new(),
            entry_key: 7,
            descriptors: 0,
            starters: HashSet::new(),
        }
    }

    pub(super) fn make(&mut self, id: ImageId, fill: &[u8]) {
        let mut bytes = vec![0; IMAGE_LEN as usize];
        bytes[..fill.len()].copy_from_slice(fill);
        self.images.insert(id, (self.next_addr, bytes));
        self.revoked.remove(&id);
        self.next_addr += 2 * u64::from(IMAGE_LEN);
    }

    pub(super) fn describe(
        &mut self,
        (leader_epoch, epoch_start_offset): (i32, i64),
        current: Option<(ImageId, i64)>,
        next: Option<ImageId>,
    ) {
        self.descriptors += 1;
        let location = |id: ImageId, base_offset| ImageLocation {
            addr: self.images[&id].0,
            base_offset,
            rkey: u32::try_from(self.images[&id].0 >> 8).unwrap(),
        };
        let descriptor = Descriptor {
            image_len_log2: 12,
            sequence: self.descriptors,
            leader_epoch,
            epoch_start_offset,
            current: current.map(|(id, base_offset)| location(id, base_offset)),
            next: next.map(|id| location(id, -1)),
        };
        self.entry[..64].copy_from_slice(&descriptor.encode());
    }

    pub(super) fn put_tail(&mut self, slot: u32, line: &[u8]) {
        let at = tail_byte_offset(slot);
        self.entry[at..at + line.len()].copy_from_slice(line);
    }

    /// Where a leader's write goes, unless it has been revoked.
    pub(super) fn granted(&mut self, addr: u64) -> Option<&mut [u8]> {
        let mut granted = self.images.iter_mut();
        granted.find_map(|(id, (base, bytes))| {
            let from = usize::try_from(addr.checked_sub(*base)?).ok()?;
            let target = bytes.get_mut(from..)?;
            (!self.revoked.contains(id)).then_some(target)
        })
    }

    pub(super) fn revoke(&mut self) {
        self.revoked = self.images.keys().copied().collect();
        self.entry_key += 1;
    }

    /// Copies to the files what the images have beyond them.
    pub(super) fn scan(&self, files: &mut Files, leader_epoch: i32) -> Stored {
        let tail = Entry::decode(&self.entry).tail;
        let mut images: Vec<_> = self.images.iter().collect();
        images.sort_by_key(|(id, _)| std::cmp::Reverse(**id));
        loop {
            let stored = files.stored();
            let log = LogEnd {
                offset: stored.log_end_offset,
                epoch: stored.epochs.latest_epoch().unwrap_or(-1),
            };
            let continuation = |(id, (_, bytes)): &(&ImageId, &(u64, Vec<u8>))| {
                let found =
                    scan::continue_log(**id, bytes, log, leader_epoch, tail.as_ref()).unwrap();
                (!found.range.is_empty()).then(|| {
                    (
                        **id,
                        bytes[found.range.clone()].to_vec(),
                        found.range.start == 0,
                    )
                })
            };
            let Some((id, bytes, is_whole)) = images.iter().find_map(continuation) else {
                scan::check_end(log, tail.as_ref()).unwrap();
                let high_watermark = tail.map_or(0, |tail| tail.high_watermark);
                return Stored {
                    high_watermark,
                    ..stored
                };
            };
            let is_start = is_whole && self.starters.contains(&id);
            let place = stored.end_place.next(stored.log_end_offset, is_start);
            files.append(place, 0, &bytes);
        }
    }

    pub(super) fn at(&mut self, addr: u64) -> Option<&mut [u8]> {
        self.images.values_mut().find_map(|(base, bytes)| {
            let from = usize::try_from(addr.checked_sub(*base)?).ok()?;
            bytes.get_mut(from..)
        })
    }
}

/// What a leader asks a follower.
pub(super) enum Request {
    Revoke,
    Truncate(Cut),
    Grant(GrantAsk),
    Sync(i64),
}

pub(super) struct FollowerNode {
    pub(super) engine: Follower,
    pub(super) memory: Memory,
    pub(super) files: Files,
    pub(super) session: u64,
    pub(super) is_up: bool,
    pub(super) requests: VecDeque<Request>,
    pub(super) replies: VecDeque<follower::Command>,
    pub(super) making: VecDeque<(ImageId, Option<follower::Fill>)>,
    pub(super) draining: Option<follower::Drain>,
    /// Of `Revoke`, `Scan` and `Cut`.
    pub(super) fencing: VecDeque<follower::Command>,
    pub(super) posts: VecDeque<(Post, Vec<u8>)>,
    pub(super) acks: usize,
}

pub(super) struct Model {
    pub(super) now: u64,
    pub(super) leader: Leader,
    pub(super) memory: Memory,
    pub(super) files: Files,
    pub(super) making: VecDeque<ImageId>,
    pub(super) draining: Option<crate::partition::DrainJob>,
    pub(super) loading: VecDeque<(usize, ImageId, i64, i64)>,
    pub(super) followers: Vec<FollowerNode>,
    pub(super) sessions: u64,
    /// Every byte appended, in order.
    pub(super) appended: Vec<u8>,
}

impl Model {
    pub(super) fn new(followers_count: usize) -> Self {
        let nodes: Vec<u32> = (2..).take(followers_count).collect();
        let log = Log::new(log_config(), 1, &Stored::empty());
        let member = |node| Member {
            node,
            memory_id: MEMORY,
        };
        let membership = Membership {
            me: member(1),
            isr: nodes.iter().copied().chain([1]).map(member).collect(),
            replicas: nodes.iter().copied().chain([1]).collect(),
        };
        let followers = nodes.iter().map(|_| FollowerNode {
            engine: Follower::new(log_config(), 0, Stored::empty()),
            memory: Memory::new(),
            files: Files::default(),
            session: 0,
            is_up: false,
            requests: VecDeque::new(),
            replies: VecDeque::new(),
            making: VecDeque::new(),
            draining: None,
            fencing: VecDeque::new(),
            posts: VecDeque::new(),
            acks: 0,
        });
        let mut model = Self {
            now: 0,
            leader: Leader::new(0, leader_config(), log, 1, 0, &membership),
            memory: Memory::new(),
            files: Files::default(),
            making: VecDeque::new(),
            draining: None,
            loading: VecDeque::new(),
            followers: followers.collect(),
            sessions: 1,
            appended: Vec::new(),
        };
        model.run_leader();
        model
    }

    pub(super) fn run_leader(&mut self) {
        while let Some(command) = self.leader.poll_command() {
            match command {
                leader::Command::MakeImage { id, .. } => self.making.push_back(id),
                leader::Command::ReleaseImage(id) => {
                    self.memory.images.remove(&id).expect("released once");
                }
                leader::Command::RequestRevoke { follower } => {
                    self.followers[follower].requests.push_back(Request::Revoke);
                }
                leader::Command::RequestTruncate { follower, cut } => {
                    let request = Request::Truncate(cut);
                    self.followers[follower].requests.push_back(request);
                }
                leader::Command::RequestGrant { follower, ask } => {
                    let request = Request::Grant(ask);
                    self.followers[follower].requests.push_back(request);
                }
                leader::Command::RequestSync { follower, offset } => {
                    let request = Request::Sync(offset);
                    self.followers[follower].requests.push_back(request);
                }
                leader::Command::Sync(offset) => {
                    assert!(offset <= self.files.stored().log_end_offset);
                    self.leader.handle_synced(offset);
                }
                leader::Command::BeginEpoch(_) => {}
                leader::Command::LoadCold {
                    follower,
                    id,
                    offset,
                    limit_offset,
                } => self.loading.push_back((follower, id, offset, limit_offset)),
                leader::Command::Describe { current, next } => {
                    self.memory.describe((1, 0), Some(current), next);
                }
                leader::Command::PublishTail(tail) => {
                    self.memory.put_tail(tail.sequence, &tail.encode());
                }
                leader::Command::Drain(job) => assert!(self.draining.replace(job).is_none()),
            }
        }
        for i in 0..self.followers.len() {
            while let Some(post) = self.leader.poll_post(self.now, i) {
                let data = post.data.as_ref().map_or(Vec::new(), |data| {
                    let (_, bytes) = &self.memory.images[&data.image_id];
                    bytes[data.range.start as usize..data.range.end as usize].to_vec()
                });
                self.followers[i].posts.push_back((post, data));
            }
        }
    }

    pub(super) fn run_follower(&mut self, i: usize) {
        let f = &mut self.followers[i];
        while let Some(command) = f.engine.poll_command() {
            match command {
                follower::Command::MakeImage {
                    id,
                    fill,
                    starts_segment,
                    ..
                } => {
                    f.memory.starters.extend(starts_segment.then_some(id));
                    f.making.push_back((id, fill));
                }
                fence @ (follower::Command::Revoke
                | follower::Command::Scan { .. }
                | follower::Command::Cut(_)) => f.fencing.push_back(fence),
                follower::Command::Sync(offset) => {
                    assert!(offset <= f.files.stored().log_end_offset);
                    f.engine.handle_synced(offset);
                }
                follower::Command::WriteTail(tail) => {
                    f.memory.put_tail(0, &tail.encode());
                    f.memory.put_tail(1, &tail.encode());
                }
                follower::Command::Describe { current, next } => {
                    f.memory.describe(f.engine.granted_epoch(), current, next);
                }
                follower::Command::Drain(job) => assert!(f.draining.replace(job).is_none()),
                follower::Command::Release(id) => {
                    f.memory.images.remove(&id).expect("released once");
                }
                reply => f.replies.push_back(reply),
            }
        }
    }

    pub(super) fn append(&mut self, batch: CheckedBatch) -> bool {
        self.append_with(Acks::Replicated, batch)
    }

    pub(super) fn append_with(&mut self, acks: Acks, mut batch: CheckedBatch) -> bool {
        let Ok(placement) = self.leader.append(self.now, acks, &mut batch) else {
            return false;
        };
        let bytes = batch.as_bytes();
        let at = placement.byte_position as usize;
        let (_, image) = self.memory.images.get_mut(&placement.image_id).unwrap();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        self.appended.extend_from_slice(bytes);
        self.run_leader();
        true
    }

    /// Does one thing that may happen next on the leader or in a follower; says whether there was any.
    pub(super) fn step(&mut self, choice: usize) -> bool {
        let per_follower = 6;
        let count = 3 + self.followers.len() * per_follower;
        (0..count).any(|k| {
            let k = (choice + k) % count;
            let is_done = match k {
                0 => self.make_leader_image(),
                1 => self.drain_leader(),
                2 => self.load_cold(),
                _ => {
                    let i = (k - 3) / per_follower;
                    let is_done = match (k - 3) % per_follower {
                        0 => self.deliver_request(i),
                        1 => self.deliver_reply(i),
                        2 => self.make_follower_image(i),
                        3 => self.drain_follower(i),
                        4 => self.fence_follower(i),
                        _ => self.deliver_post(i) || self.deliver_ack(i),
                    };
                    self.run_follower(i);
                    is_done
                }
            };
            self.run_leader();
            is_done
        })
    }

    pub(super) fn settle(&mut self) {
        for _ in 0..100_000 {
            if self.step(0) {
                continue;
            }
            let before = self.state();
            self.tick(1000);
            if before == self.state() && !self.step(0) {
                return;
            }
        }
        panic!("does not settle");
    }

    pub(super) fn state(&self) -> (i64, Vec<(i64, i64)>, i64) {
        let followers = self.followers.iter();
        let offsets = followers.map(|f| (f.engine.drained_offset(), f.engine.high_watermark()));
        let drained = self.leader.log().drained_offset();
        (self.leader.high_watermark(), offsets.collect(), drained)
    }

    pub(super) fn tick(&mut self, ns: u64) {
        self.now += ns;
        self.leader.handle_tick(self.now);
        self.run_leader();
        for i in 0..self.followers.len() {
            let f = &mut self.followers[i];
            if f.engine.wants_entry(self.now + 1_000_000_000) {
                f.engine
                    .handle_entry(self.now, Entry::decode(&f.memory.entry).tail);
            }
            f.engine.handle_tick(self.now);
            self.run_follower(i);
        }
    }

    pub(super) fn make_leader_image(&mut self) -> bool {
        let Some(id) = self.making.pop_front() else {
            return false;
        };
        self.memory.make(id, &[]);
        self.leader.handle_image_ready(self.now, id);
        true
    }

    pub(super) fn drain_leader(&mut self) -> bool {
        let Some(job) = self.draining.take() else {
            return false;
        };
        let bytes = &self.memory.images[&job.image_id].1[job.from as usize..job.to as usize];
        self.files.append(job.place, job.from, bytes);
        self.leader.handle_drained(self.now, job.image_id, job.to);
        true
    }

    pub(super) fn load_cold(&mut self) -> bool {
        let Some((i, id, offset, limit_offset)) = self.loading.pop_front() else {
            return false;
        };
        let (place, bytes) = self.files.load(offset, limit_offset).unwrap();
        self.memory.make(id, &bytes);
        self.leader
            .handle_cold_loaded(i, state_of(id, offset, place, &bytes));
        true
    }

    pub(super) fn deliver_request(&mut self, i: usize) -> bool {
        let f = &mut self.followers[i];
        let Some(request) = f.requests.pop_front() else {
            return false;
        };
        let (now, session) = (self.now, f.session);
        match request {
            Request::Revoke => f.engine.handle_revoke_request(session, (1, 0)),
            Request::Truncate(cut) => f.engine.handle_truncate_request(session, 1, cut),
            Request::Sync(offset) => {
                let tail = Entry::decode(&f.memory.entry).tail;
                f.engine.handle_sync_request(now, session, offset, tail);
            }
            Request::Grant(ask) => {
                let tail = Entry::decode(&f.memory.entry).tail;
                f.engine.handle_grant_request(now, session, 1, ask, tail);
            }
        }
        true
    }

    /// Revokes, scans or cuts; the last two in turn with draining.
    pub(super) fn fence_follower(&mut self, i: usize) -> bool {
        self.drain_follower(i);
        self.run_follower(i);
        let f = &mut self.followers[i];
        match f.fencing.pop_front() {
            Some(follower::Command::Revoke) => {
                f.memory.revoke();
                f.engine.handle_revoked();
            }
            Some(follower::Command::Scan { leader_epoch }) => {
                let stored = f.memory.scan(&mut f.files, leader_epoch);
                f.engine.handle_scanned(self.now, stored);
            }
            Some(follower::Command::Cut(cut)) => {
                f.files.cut(cut);
                f.engine.handle_cut(self.now, f.files.stored());
            }
            _ => return false,
        }
        true
    }

    pub(super) fn deliver_reply(&mut self, i: usize) -> bool {
        let f = &mut self.followers[i];
        let (now, session) = (self.now, f.session);
        match f.replies.pop_front() {
            Some(follower::Command::Grant {
                image_id,
                len,
                log_end_offset,
                byte_position,
            }) => {
                // The image is gone if a fence has come between.
                let addr = f.memory.images.get(&image_id).map_or(0, |(addr, _)| *addr);
                let reply = GrantReply {
                    image_id,
                    addr,
                    rkey: 7,
                    len,
                    entry_addr: 0,
                    entry_rkey: f.memory.entry_key,
                    log_end_offset,
                    byte_position,
                };
                self.leader.handle_grant(now, i, session, &reply);
                true
            }
            Some(follower::Command::Refuse {
                image_id, cause, ..
            }) => {
                match image_id {
                    Some(id) => self.leader.handle_grant_refused(now, i, session, id, cause),
                    None => self.leader.handle_refused(now, i, session, cause),
                }
                true
            }
            Some(follower::Command::Durable(offset)) => {
                self.leader.handle_durable(i, session, offset);
                true
            }
            Some(follower::Command::Report(report)) => {
                self.leader.handle_report(i, session, &report);
                true
            }
            _ => false,
        }
    }

    pub(super) fn make_follower_image(&mut self, i: usize) -> bool {
        let f = &mut self.followers[i];
        let Some((id, fill)) = f.making.pop_front() else {
            return false;
        };
        let mut bytes = Vec::new();
        let filled = fill.map(|fill| {
            if fill.len > 0 {
                let file = &f.files.0[&fill.place.segment_base_offset];
                let from = usize::try_from(fill.place.file_position).unwrap();
                bytes = file[from..from + fill.len as usize].to_vec();
            }
            (fill, walk(&bytes, Mark::start(fill.base_offset), None))
        });
        f.memory.make(id, &bytes);
        f.engine.handle_image_ready(self.now, id, filled);
        true
    }

    pub(super) fn drain_follower(&mut self, i: usize) -> bool {
        let f = &mut self.followers[i];
        let Some(job) = f.draining.take() else {
            return false;
        };
        let bytes = &f.memory.images[&job.image_id].1;
        let end = walk(bytes, job.from, job.to.map(|to| to.byte_position));
        if job.to.is_some_and(|to| to != end) {
            let fault = Fault::Corrupt(format!("{:?} is not {end:?}", job.to));
            f.engine.handle_drain_failed(self.now, fault);
            return true;
        }
        let range = job.from.byte_position as usize..end.byte_position as usize;
        f.files
            .append(job.place, job.from.byte_position, &bytes[range]);
        f.engine.handle_drained(self.now, &job, end);
        true
    }

    pub(super) fn deliver_post(&mut self, i: usize) -> bool {
        let f = &mut self.followers[i];
        let Some((post, data)) = f.posts.pop_front() else {
            return false;
        };
        if let Some(write) = &post.data {
            let Some(target) = f.memory.granted(write.remote_addr) else {
                self.lose_lane(i, 0);
                return true;
            };
            target[..data.len()].copy_from_slice(&data);
        }
        let at = usize::try_from(post.tail_addr).unwrap();
        f.memory.entry[at..at + 64].copy_from_slice(&post.tail);
        f.acks += 1;
        true
    }

    pub(super) fn deliver_ack(&mut self, i: usize) -> bool {
        let f = &mut self.followers[i];
        if f.acks == 0 {
            return false;
        }
        f.acks -= 1;
        self.leader.handle_completion(self.now, i, f.session, 1);
        true
    }

    /// The lane breaks; of the next chain a prefix has landed, torn in data or tail.
    pub(super) fn lose_lane(&mut self, i: usize, torn: usize) {
        let f = &mut self.followers[i];
        if !std::mem::take(&mut f.is_up) {
            return;
        }
        if let Some((post, data)) = f.posts.front() {
            let landed = torn % (data.len() + 64);
            if let Some(write) = &post.data {
                let len = landed.min(data.len());
                if let Some(target) = f.memory.granted(write.remote_addr) {
                    target[..len].copy_from_slice(&data[..len]);
                }
            }
            let of_tail = landed.saturating_sub(data.len());
            let at = usize::try_from(post.tail_addr).unwrap();
            f.memory.entry[at..at + of_tail].copy_from_slice(&post.tail[..of_tail]);
        }
        f.posts.clear();
        f.acks = 0;
        f.requests.clear();
        f.replies.clear();
        self.leader.handle_lane_down(self.now, i, f.session);
        self.run_leader();
    }

    pub(super) fn connect(&mut self, i: usize) {
        let f = &mut self.followers[i];
        if std::mem::replace(&mut f.is_up, true) {
            return;
        }
        self.sessions += 1;
        f.session = self.sessions;
        self.leader.handle_lane_up(i, self.sessions, MEMORY);
        self.run_leader();
    }

    /// The process of a follower ends and starts again: memory and table survive, engines do not.
    pub(super) fn restart_follower(&mut self, i: usize, torn: usize) {
        self.lose_lane(i, torn);
        let f = &mut self.followers[i];
        let stored = f.memory.scan(&mut f.files, 1);
        let engine = Follower::new(log_config(), 1, stored);
        let files = f.files.clone();
        *f = FollowerNode {
            engine,
            memory: Memory {
                next_addr: f.memory.next_addr,
                ..Memory::new()
            },
            files,
            session: 0,
            is_up: false,
            requests: VecDeque::new(),
            replies: VecDeque::new(),
            making: VecDeque::new(),
            draining: None,
            fencing: VecDeque::new(),
            posts: VecDeque::new(),
            acks: 0,
        };
    }

    pub(super) fn check(&self) {
        let hw = self.leader.high_watermark();
        for f in &self.followers {
            assert!(f.engine.fault().is_none(), "{:?}", f.engine.fault());
            assert!(f.engine.high_watermark() <= hw);
            let drained = f.files.all();
            let same = drained
                .iter()
                .zip(&self.appended)
                .take_while(|(a, b)| a == b);
            assert_eq!(same.count(), drained.len(), "files differ");
        }
    }
}

/// A consumer of one node's memory, which may be torn between its two reads.
pub(super) struct Reader {
    pub(super) cursor: Cursor,
    pub(super) got: Vec<u8>,
}

impl Reader {
    pub(super) fn new() -> Self {
        Self {
            cursor: Cursor::new(0, 200, 1500),
            got: Vec::new(),
        }
    }

    /// One round against a node; `image_of` is its answer to an image request. A key error, as a read of
    /// a released image meets, makes the cursor forget.
    pub(super) fn round(
        &mut self,
        now: u64,
        memory: &mut Memory,
        image_of: impl FnOnce(i64) -> Option<(ImageId, i64)>,
        files: &Files,
    ) {
        let data = match self.cursor.plan(now) {
            Plan::NeedsImage(offset) => {
                let granted = image_of(offset).map(|(id, base_offset)| Granted {
                    base_offset,
                    addr: memory.images[&id].0,
                    rkey: u32::try_from(memory.images[&id].0 >> 8).unwrap(),
                    len: IMAGE_LEN,
                });
                let granted = granted.or_else(|| {
                    // A follower that restarted may have less than its reader has read already.
                    let (_, bytes) = files.load(offset, i64::MAX)?;
                    let id = ImageId(1 << 60 | memory.next_addr);
                    memory.make(id, &bytes);
                    Some(Granted {
                        base_offset: offset,
                        addr: memory.images[&id].0,
                        rkey: u32::try_from(memory.images[&id].0 >> 8).unwrap(),
                        len: u32::try_from(bytes.len()).unwrap(),
                    })
                });
                if let Some(granted) = granted {
                    self.cursor.handle_image(&granted);
                }
                return;
            }
            Plan::Read(None) => Vec::new(),
            Plan::Read(Some(read)) => match memory.at(read.addr) {
                Some(bytes) => bytes[..read.len as usize].to_vec(),
                None => {
                    self.cursor.forget_image();
                    return;
                }
            },
        };
        let done = self.cursor.complete(now, &memory.entry, &data).unwrap();
        self.got.extend_from_slice(&data[done.batches]);
    }
}

pub(super) fn leader_round(model: &mut Model, reader: &mut Reader) {
    let leader = &model.leader;
    let image_of = |offset| {
        let image = leader.log().image_of_offset(offset)?;
        Some((image.id(), image.base_offset()))
    };
    reader.round(model.now, &mut model.memory, image_of, &model.files);
}

pub(super) fn follower_round(model: &mut Model, i: usize, reader: &mut Reader) {
    let f = &mut model.followers[i];
    let image_of = |offset| f.engine.image_of_offset(offset);
    reader.round(model.now, &mut f.memory, image_of, &f.files);
}
