//! What a process's two workers do, each one job after the other: one makes, reads and lets go images, the
//! other one writes files. A job does its work at the moment it is done.

use std::collections::VecDeque;

use super::events::ProcessEvent;
use super::process::Process;
use super::storage::{IMAGE_LEN, WriteError, walk};
use super::verbs::Backing;
use super::{Site, Violation, World, demand};
use crate::epoch::{Cut, EpochEntry};
use crate::faults::{Fault, is_injected};
use crate::follower::{self, Drain, Fill};
use crate::image::{ImageId, Mark};
use crate::partition::DrainJob;

/// The registrations of an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Registered {
    pub(super) write: Option<(u64, u32)>,
    pub(super) read: (u64, u32),
    /// Consumers that have been granted it.
    pub(super) pins: u32,
    /// Let go by the engine; it stays until nobody is granted it.
    pub(super) is_released: bool,
}

/// A job of the worker that makes images.
#[derive(Clone, Copy, Debug)]
pub(super) enum HelperJob {
    Make {
        id: ImageId,
        fill: Option<Fill>,
        starts_segment: bool,
    },
    LoadCold {
        follower: usize,
        id: ImageId,
        offset: i64,
        limit_offset: i64,
    },
    Release(ImageId),
    Revoke,
    /// Nothing that is readable is log any more; then the log is cut.
    Withdraw(Cut),
}

/// A job of the worker that writes files.
#[derive(Clone, Copy, Debug)]
pub(super) enum WriterJob {
    BeginEpoch(EpochEntry),
    Leader(DrainJob),
    Follower(Drain),
    LeaderSync(i64),
    FollowerSync(i64),
    Scan {
        leader_epoch: i32,
    },
    Cut(Cut),
    /// Retention removes what it may, of a log of which this is committed.
    Sweep {
        high_watermark: i64,
    },
    /// The leader's log starts here.
    StartAt(i64),
}

/// What the workers have to do, with the partition that it is for.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    helper: VecDeque<(usize, HelperJob)>,
    writer: VecDeque<(usize, WriterJob)>,
}

impl World {
    pub(super) fn help(&mut self, site: Site, p: &mut Process, job: HelperJob) {
        p.jobs.helper.push_back((site.partition, job));
        if p.jobs.helper.len() == 1 {
            self.start_job(site.node, p.incarnation, ProcessEvent::Helped);
        }
    }

    pub(super) fn write(&mut self, site: Site, p: &mut Process, job: WriterJob) {
        p.jobs.writer.push_back((site.partition, job));
        if p.jobs.writer.len() == 1 {
            self.start_job(site.node, p.incarnation, ProcessEvent::Written);
        }
    }

    fn start_job(&mut self, n: usize, incarnation: u64, done: ProcessEvent) {
        let most = if self.machines[n].is_disk_slow {
            800_000_000
        } else {
            3_000_000
        };
        let delay = self.rng.spread(20_000, most);
        self.tell_later(delay, (n, incarnation), done);
    }

    /// The process ends while a job is under way: of a write, some bytes are in the file.
    pub(super) fn tear_job(&mut self, n: usize, jobs: &Jobs) {
        if let Some(&(partition, job)) = jobs.writer.front() {
            self.tear(Site { node: n, partition }, job);
        }
    }

    fn tear(&mut self, site: Site, job: WriterJob) {
        let (id, mut place, from, to) = match job {
            WriterJob::Leader(job) => (job.image_id, job.place, job.from, job.to),
            WriterJob::Follower(job) => {
                let from = job.from.byte_position;
                let to = job.to.map_or(from, |to| to.byte_position);
                (job.image_id, job.place, from, to)
            }
            WriterJob::StartAt(offset) => {
                self.store_mut(site).disk.tear_start(offset);
                return;
            }
            _ => return,
        };
        let len = self.rng.below((to - from) as usize + 1);
        let store = self.store_mut(site);
        if len > 0
            && let Some(image) = store.memory.images.get(&id)
        {
            place.file_position += u64::from(from);
            let bytes = &image.bytes[from as usize..from as usize + len];
            store.disk.tear(place, bytes);
        }
    }

    pub(super) fn helped(&mut self, n: usize, p: &mut Process, now: u64) -> Result<(), Violation> {
        let (partition, job) = p.jobs.helper.pop_front().expect("a job is done");
        let site = Site { node: n, partition };
        if !p.jobs.helper.is_empty() {
            self.start_job(n, p.incarnation, ProcessEvent::Helped);
        }
        match job {
            HelperJob::Make {
                id,
                fill,
                starts_segment,
            } => {
                return self.make(site, p, now, id, fill, starts_segment);
            }
            HelperJob::LoadCold {
                follower,
                id,
                offset,
                limit_offset,
            } => {
                self.load_cold(site, p, now, (follower, id), offset, limit_offset);
            }
            HelperJob::Release(id) => self.release(site, p, id),
            HelperJob::Revoke => {
                self.revoke(site, p);
                p.held[partition].replica.handle_revoked(now, true);
            }
            HelperJob::Withdraw(cut) => {
                self.withdraw(site, p);
                let follower = p.held[partition].replica.follower();
                if follower.is_some_and(|follower| follower.is_cutting(cut)) {
                    self.write(site, p, WriterJob::Cut(cut));
                }
            }
        }
        Ok(())
    }

    /// Takes every image away, from whoever reads it.
    fn withdraw(&mut self, site: Site, p: &mut Process) {
        let held = &mut p.held[site.partition];
        held.granted.clear();
        for (id, image) in std::mem::take(&mut held.images) {
            let write = image.write.map(|(_, key)| key);
            for key in write.into_iter().chain([image.read.1]) {
                self.verbs.deregister(site.node, key);
            }
            self.store_mut(site).memory.release(id);
        }
    }

    /// Withdraws everything that a leader could write with: its keys, or the lane that it has to use them,
    /// whatever else that serves.
    fn revoke(&mut self, site: Site, p: &mut Process) {
        self.note(|| format!("{site} revokes"));
        let held = &mut p.held[site.partition];
        if self.plan.is_fence_of_keys {
            let images = held.images.values_mut();
            let keys = images.filter_map(|image| image.write.take());
            for (_, key) in keys.chain(held.table.take()) {
                self.verbs.deregister(site.node, key);
            }
            return;
        }
        let Some(lane) = held.granted_to.take() else {
            return;
        };
        if !is_injected(Fault::OldQueuePairKept) {
            self.verbs.end_receiver(lane.lane);
            self.close(lane.connection, site.node);
            p.incoming.retain(|_, present| present.lane != lane.lane);
        }
    }

    fn load_cold(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        (follower, id): (usize, ImageId),
        offset: i64,
        limit_offset: i64,
    ) {
        let is_short = self.machines[site.node].is_short_of_memory;
        let loaded = self.store(site).disk.load(id, offset, limit_offset);
        let replica = &mut p.held[site.partition].replica;
        let Some((state, bytes)) = loaded.filter(|_| !is_short) else {
            let leader = replica.leader_mut();
            if let Some(leader) = leader.filter(|l| follower < l.followers_count()) {
                let cause = format!("offset {offset} cannot be loaded");
                leader.handle_cold_failed(now, follower, id, cause);
            }
            return;
        };
        self.add_image(site, p, id, &bytes, None);
        let replica = &mut p.held[site.partition].replica;
        replica.handle_cold_loaded(follower, state);
    }

    /// Makes an image that can be read.
    pub(super) fn add_image(
        &mut self,
        site: Site,
        p: &mut Process,
        id: ImageId,
        bytes: &[u8],
        starts_segment: Option<bool>,
    ) {
        let Site { node, partition } = site;
        let memory = &mut self.machines[node].stores[partition].memory;
        let is_cold = starts_segment.is_none();
        memory.make(id, bytes, starts_segment.unwrap_or(false), is_cold);
        let len = if is_cold {
            bytes.len()
        } else {
            IMAGE_LEN as usize
        };
        let backing = Backing::Image { partition, id };
        let bytes = &memory.images[&id].bytes[..len];
        let read = self.verbs.register(node, backing, bytes, false);
        let image = Registered {
            write: None,
            read,
            pins: 0,
            is_released: false,
        };
        p.held[partition].images.insert(id, image);
    }

    fn make(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        id: ImageId,
        fill: Option<Fill>,
        starts_segment: bool,
    ) -> Result<(), Violation> {
        let is_short = self.machines[site.node].is_short_of_memory;
        let store = self.store(site);
        let bytes = fill.map_or(Some(Vec::new()), |fill| {
            store.disk.read(fill.place, fill.len)
        });
        let Some(bytes) = bytes.filter(|_| !is_short) else {
            let cause = format!("no memory, or not the bytes of {fill:?}");
            let replica = &mut p.held[site.partition].replica;
            replica.handle_image_failed(now, id, cause);
            return Ok(());
        };
        let filled = fill.map(|fill| {
            let end = walk(&bytes, Mark::start(fill.base_offset), None);
            end.map(|end| (fill, end))
        });
        let filled = filled.transpose().map_err(Violation)?;
        demand!(
            !store.memory.images.contains_key(&id),
            "{site} makes {id} twice"
        );
        self.add_image(site, p, id, &bytes, Some(starts_segment));
        let replica = &mut p.held[site.partition].replica;
        replica.handle_image_ready(now, id, filled);
        Ok(())
    }

    /// The engine has let an image go: nobody may write it, and those who were granted it read on.
    pub(super) fn release(&mut self, site: Site, p: &mut Process, id: ImageId) {
        let Site { node, partition } = site;
        let held = &mut p.held[partition];
        let Some(image) = held.images.get_mut(&id) else {
            return;
        };
        image.is_released = true;
        if let Some((_, key)) = image.write.take() {
            self.verbs.deregister(node, key);
        }
        let image = *image;
        if image.pins == 0 {
            self.verbs.deregister(node, image.read.1);
            held.images.remove(&id);
            self.store_mut(site).memory.release(id);
        } else if !is_reader_name(id) {
            // The name may be used again.
            held.loaded_count += 1;
            let name = reader_name(held.loaded_count);
            held.images.remove(&id);
            held.images.insert(name, image);
            let granted = held.granted.values_mut().filter(|of| **of == id);
            granted.for_each(|of| *of = name);
            let backing = Backing::Image {
                partition,
                id: name,
            };
            self.verbs.rename(node, image.read.1, backing);
            self.store_mut(site).memory.rename(id, name);
        }
    }

    pub(super) fn written(&mut self, n: usize, p: &mut Process, now: u64) -> Result<(), Violation> {
        let (partition, job) = p.jobs.writer.pop_front().expect("a job is done");
        let site = Site { node: n, partition };
        if !p.jobs.writer.is_empty() {
            self.start_job(n, p.incarnation, ProcessEvent::Written);
        }
        let is_poisoned = self.store(site).disk.is_poisoned;
        if is_poisoned {
            self.tear(site, job);
            self.refuse_durable(site, p);
        }
        let replica = &mut p.held[partition].replica;
        match job {
            WriterJob::BeginEpoch(entry) => {
                let disk = &mut self.store_mut(site).disk;
                if disk.check().is_ok() {
                    disk.begin_epoch(entry);
                }
            }
            WriterJob::Leader(job) => self.drain_leader(site, p, now, job)?,
            WriterJob::Follower(job) => self.drain_follower(site, p, now, &job)?,
            WriterJob::LeaderSync(offset) | WriterJob::FollowerSync(offset) => {
                self.store_mut(site).disk.sync();
                match (replica.leader_mut(), is_poisoned) {
                    (Some(leader), false) => leader.handle_synced(offset),
                    (Some(leader), true) => leader.handle_sync_failed(),
                    (None, _) => {
                        let follower = replica.follower_mut().expect("it is one or the other");
                        if is_poisoned {
                            follower.handle_sync_failed("the device has failed".to_owned());
                        } else {
                            follower.handle_synced(offset);
                        }
                    }
                }
            }
            WriterJob::Scan { leader_epoch } => self.scan(site, p, now, leader_epoch)?,
            WriterJob::Cut(cut) => self.cut_log(site, p, now, cut)?,
            WriterJob::Sweep { high_watermark } => self.retain(site, p, now, high_watermark)?,
            WriterJob::StartAt(offset) => {
                let log_start = self.oracles[partition].log_start();
                demand!(
                    offset <= log_start,
                    "{site} is told that the log starts at {offset}, it does at {log_start}"
                );
                self.start_log_at(site, p, now, offset);
            }
        }
        self.checkpoint(site, p);
        Ok(())
    }

    /// Removes what retention does not want any more.
    fn retain(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        high_watermark: i64,
    ) -> Result<(), Violation> {
        let disk = &self.store(site).disk;
        let point = disk.retention_point(self.plan.retention_len, high_watermark);
        if point > disk.log_start_offset() {
            self.note(|| format!("{site} removes what is below {point}"));
            self.stats.retentions += 1;
            self.check_retention(site, point)?;
            self.start_log_at(site, p, now, point);
        }
        Ok(())
    }

    fn start_log_at(&mut self, site: Site, p: &mut Process, now: u64, offset: i64) {
        let disk = &mut self.store_mut(site).disk;
        if disk.is_poisoned {
            // The checkpoint is written, and then the segments are not removed.
            disk.tear_start(offset);
            return;
        }
        disk.start_at(offset);
        let replica = &mut p.held[site.partition].replica;
        if let Some(leader) = replica.leader_mut() {
            leader.handle_log_start(now, offset);
        } else if let Some(follower) = replica.follower_mut() {
            follower.handle_log_start(offset);
        }
    }

    /// Syncs the files, or not yet.
    fn checkpoint(&mut self, site: Site, p: &Process) {
        let high_watermark = p.held[site.partition].high_watermark();
        if self.rng.chance(self.plan.sync_percent) {
            let disk = &mut self.store_mut(site).disk;
            disk.sync();
            disk.set_high_watermark(high_watermark);
        }
    }

    fn drain_leader(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        job: DrainJob,
    ) -> Result<(), Violation> {
        let store = self.store_mut(site);
        let Some(image) = store.memory.images.get(&job.image_id) else {
            let id = job.image_id;
            return Err(Violation(format!("{site}: {id} is drained and gone")));
        };
        let bytes = &image.bytes[job.from as usize..job.to as usize];
        let mut place = job.place;
        place.file_position += u64::from(job.from);
        let done = may_fail(site, store.disk.append(place, bytes))?;
        if let Some(leader) = p.held[site.partition].replica.leader_mut() {
            match done {
                Ok(()) => leader.handle_drained(now, job.image_id, job.to),
                Err(_) => leader.handle_drain_failed(now),
            }
        }
        Ok(())
    }

    fn drain_follower(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        job: &Drain,
    ) -> Result<(), Violation> {
        let store = self.store_mut(site);
        let Some(image) = store.memory.images.get(&job.image_id) else {
            let id = job.image_id;
            return Err(Violation(format!("{site}: {id} is drained and gone")));
        };
        let follower = p.held[site.partition].replica.follower_mut();
        let end = walk(&image.bytes, job.from, job.to.map(|to| to.byte_position));
        let end = match end {
            Ok(end) if job.to.is_none_or(|to| to == end) => end,
            other => {
                let cause = format!("{:?} is not {other:?}", job.to);
                if let Some(follower) = follower {
                    follower.handle_drain_failed(now, follower::Fault::Corrupt(cause));
                }
                return Ok(());
            }
        };
        let from = job.from.byte_position;
        let bytes = &image.bytes[from as usize..end.byte_position as usize];
        let mut place = job.place;
        place.file_position += u64::from(from);
        let done = if bytes.is_empty() {
            Ok(())
        } else {
            may_fail(site, store.disk.append(place, bytes))?
        };
        if let Some(follower) = follower {
            match done {
                Ok(()) => follower.handle_drained(now, job, end),
                Err(fault) => follower.handle_drain_failed(now, fault),
            }
        }
        Ok(())
    }

    fn scan(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        leader_epoch: i32,
    ) -> Result<(), Violation> {
        let store = self.store_mut(site);
        let tail = store.memory.tail();
        let before = store.disk.log_end_offset();
        let scanned = store
            .memory
            .scan(&mut store.disk, leader_epoch, tail.as_ref());
        let result = may_fail(site, scanned)?.map(|()| {
            let known = tail.map_or(0, |tail| tail.high_watermark);
            let disk = &mut store.disk;
            disk.set_high_watermark(disk.high_watermark.max(known));
            disk.stored()
        });
        let end = store.disk.log_end_offset();
        self.note(|| format!("{site} has scanned: offsets {before} to {end}"));
        let held = &mut p.held[site.partition];
        held.is_closed &= result.is_err();
        held.replica.handle_scanned(now, result);
        Ok(())
    }

    fn cut_log(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        cut: Cut,
    ) -> Result<(), Violation> {
        self.note(|| format!("{site} cuts its log: {cut:?}"));
        let disk = &mut self.store_mut(site).disk;
        let done = may_fail(site, disk.cut(cut))?;
        let result = done.map(|()| disk.stored());
        let held = &mut p.held[site.partition];
        held.is_closed &= result.is_err();
        held.replica.handle_cut(now, result);
        Ok(())
    }
}

/// What an engine is told of a write; what must not happen is a violation.
fn may_fail(
    site: Site,
    result: Result<(), WriteError>,
) -> Result<Result<(), follower::Fault>, Violation> {
    match result {
        Ok(()) => Ok(Ok(())),
        Err(WriteError::Wrong(cause)) => Err(Violation(format!("{site}: {cause}"))),
        Err(cause) => Ok(Err(follower::Fault::Files(cause.to_string()))),
    }
}

/// A name for an image that is there for consumers only.
pub(super) fn reader_name(count: u64) -> ImageId {
    ImageId(u64::MAX - count)
}

fn is_reader_name(id: ImageId) -> bool {
    id.0 > u64::MAX / 2
}

/// Whether memory let go is used again as it is. A scan without checks can only go wrong about old bytes.
pub(super) fn keeps_old_bytes() -> bool {
    is_injected(Fault::RecycledNotZeroed) || is_injected(Fault::ScanUnchecked)
}
