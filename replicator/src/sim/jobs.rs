//! What a process's two workers do, each one job after the other: one makes, reads and lets go images, the
//! other one writes files. A job does its work at the moment it is done.

use std::collections::VecDeque;

use super::events::ProcessEvent;
use super::process::Process;
use super::storage::{IMAGE_LEN, walk};
use super::verbs::Backing;
use super::{Machine, Violation, World, demand};
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
    /// Nothing that is readable is log any more.
    Withdraw,
}

/// A job of the worker that writes files.
#[derive(Clone, Copy, Debug)]
pub(super) enum WriterJob {
    BeginEpoch(EpochEntry),
    Leader(DrainJob),
    Follower(Drain),
    LeaderSync(i64),
    FollowerSync(i64),
    Scan { leader_epoch: i32 },
    Cut(Cut),
}

#[derive(Debug, Default)]
pub(super) struct Jobs {
    helper: VecDeque<HelperJob>,
    writer: VecDeque<WriterJob>,
}

impl World {
    pub(super) fn help(&mut self, n: usize, p: &mut Process, job: HelperJob) {
        p.jobs.helper.push_back(job);
        if p.jobs.helper.len() == 1 {
            self.start_job(n, p.incarnation, ProcessEvent::Helped);
        }
    }

    pub(super) fn write(&mut self, n: usize, p: &mut Process, job: WriterJob) {
        p.jobs.writer.push_back(job);
        if p.jobs.writer.len() == 1 {
            self.start_job(n, p.incarnation, ProcessEvent::Written);
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
        let Machine { disk, memory, .. } = &mut self.machines[n];
        let (id, mut place, from, to) = match jobs.writer.front() {
            Some(WriterJob::Leader(job)) => (job.image_id, job.place, job.from, job.to),
            Some(WriterJob::Follower(job)) => {
                let from = job.from.byte_position;
                (
                    job.image_id,
                    job.place,
                    from,
                    job.to.map_or(from, |to| to.byte_position),
                )
            }
            _ => return,
        };
        let len = self.rng.below((to - from) as usize + 1);
        if len > 0
            && let Some(image) = memory.images.get(&id)
        {
            place.file_position += u64::from(from);
            disk.tear(place, &image.bytes[from as usize..from as usize + len]);
        }
    }

    pub(super) fn helped(&mut self, n: usize, p: &mut Process, now: u64) -> Result<(), Violation> {
        let job = p.jobs.helper.pop_front().expect("a job is done");
        if !p.jobs.helper.is_empty() {
            self.start_job(n, p.incarnation, ProcessEvent::Helped);
        }
        match job {
            HelperJob::Make {
                id,
                fill,
                starts_segment,
            } => {
                return self.make(n, p, now, id, fill, starts_segment);
            }
            HelperJob::LoadCold {
                follower,
                id,
                offset,
                limit_offset,
            } => {
                self.load_cold(n, p, now, (follower, id), offset, limit_offset);
            }
            HelperJob::Release(id) => self.release(n, p, id),
            HelperJob::Revoke => {
                self.revoke(n, p);
                p.replica.handle_revoked(now, true);
            }
            HelperJob::Withdraw => self.withdraw(n, p),
        }
        Ok(())
    }

    /// Takes every image away, from whoever reads it.
    fn withdraw(&mut self, n: usize, p: &mut Process) {
        p.granted.clear();
        for (id, image) in std::mem::take(&mut p.images) {
            let write = image.write.map(|(_, key)| key);
            for key in write.into_iter().chain([image.read.1]) {
                p.nic.deregister(key);
            }
            self.machines[n].memory.release(id);
        }
    }

    /// Withdraws everything that a leader could write with: its keys, or the lane that it has to use them.
    fn revoke(&mut self, n: usize, p: &mut Process) {
        self.note(|| format!("node {n} revokes"));
        if self.plan.is_fence_of_keys {
            let images = p.images.values_mut().filter_map(|image| image.write.take());
            let keys = images.chain(p.table.take());
            keys.for_each(|(_, key)| p.nic.deregister(key));
            return;
        }
        let Some(lane) = p.granted_to.take() else {
            return;
        };
        if !is_injected(Fault::OldQueuePairKept) {
            self.end_receiver(lane.lane);
            self.close(lane.connection, n);
            p.incoming.retain(|_, present| present.lane != lane.lane);
        }
    }

    fn load_cold(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        (follower, id): (usize, ImageId),
        offset: i64,
        limit_offset: i64,
    ) {
        let loaded = self.machines[n].disk.load(id, offset, limit_offset);
        let Some((state, bytes)) = loaded else {
            if let Some(leader) = p.replica.leader_mut() {
                let cause = format!("offset {offset} is not in the files");
                leader.handle_cold_failed(now, follower, id, cause);
            }
            return;
        };
        self.machines[n].memory.make(id, &bytes, false, true);
        let read = p
            .nic
            .register(Backing::Image(id), bytes.len() as u64, false);
        let image = Registered {
            write: None,
            read,
            pins: 0,
            is_released: false,
        };
        p.images.insert(id, image);
        p.replica.handle_cold_loaded(follower, state);
    }

    fn make(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        id: ImageId,
        fill: Option<Fill>,
        starts_segment: bool,
    ) -> Result<(), Violation> {
        let Machine { disk, memory, .. } = &mut self.machines[n];
        let bytes = fill.map_or(Some(Vec::new()), |fill| disk.read(fill.place, fill.len));
        let Some(bytes) = bytes else {
            let cause = format!("the files have not the bytes of {fill:?}");
            p.replica.handle_image_failed(now, id, cause);
            return Ok(());
        };
        let filled = fill.map(|fill| {
            let end = walk(&bytes, Mark::start(fill.base_offset), None);
            end.map(|end| (fill, end))
        });
        let filled = filled.transpose().map_err(Violation)?;
        demand!(
            !memory.images.contains_key(&id),
            "node {n} makes {id} twice"
        );
        memory.make(id, &bytes, starts_segment, false);
        let read = p
            .nic
            .register(Backing::Image(id), u64::from(IMAGE_LEN), false);
        let image = Registered {
            write: None,
            read,
            pins: 0,
            is_released: false,
        };
        p.images.insert(id, image);
        p.replica.handle_image_ready(now, id, filled);
        Ok(())
    }

    /// The engine has let an image go: nobody may write it, and those who were granted it read on.
    pub(super) fn release(&mut self, n: usize, p: &mut Process, id: ImageId) {
        let Some(image) = p.images.get_mut(&id) else {
            return;
        };
        image.is_released = true;
        if let Some((_, key)) = image.write.take() {
            p.nic.deregister(key);
        }
        let image = *image;
        if image.pins == 0 {
            p.nic.deregister(image.read.1);
            p.images.remove(&id);
            self.machines[n].memory.release(id);
        } else if !is_reader_name(id) {
            // The name may be used again.
            p.loaded_count += 1;
            let name = reader_name(p.loaded_count);
            p.images.remove(&id);
            p.images.insert(name, image);
            p.nic.rename(image.read.1, Backing::Image(name));
            p.granted
                .values_mut()
                .filter(|of| **of == id)
                .for_each(|of| *of = name);
            self.machines[n].memory.rename(id, name);
        }
    }

    pub(super) fn written(&mut self, n: usize, p: &mut Process, now: u64) -> Result<(), Violation> {
        let job = p.jobs.writer.pop_front().expect("a job is done");
        if !p.jobs.writer.is_empty() {
            self.start_job(n, p.incarnation, ProcessEvent::Written);
        }
        let done = match job {
            WriterJob::BeginEpoch(entry) => {
                self.machines[n].disk.begin_epoch(entry);
                Ok(())
            }
            WriterJob::Leader(job) => self.drain_leader(n, p, now, job),
            WriterJob::Follower(job) => self.drain_follower(n, p, now, &job),
            WriterJob::LeaderSync(offset) => {
                self.machines[n].disk.sync();
                if let Some(leader) = p.replica.leader_mut() {
                    leader.handle_synced(offset);
                }
                Ok(())
            }
            WriterJob::FollowerSync(offset) => {
                self.machines[n].disk.sync();
                if let Some(follower) = p.replica.follower_mut() {
                    follower.handle_synced(offset);
                }
                Ok(())
            }
            WriterJob::Scan { leader_epoch } => self.scan(n, p, now, leader_epoch),
            WriterJob::Cut(cut) => self.cut_log(n, p, now, cut),
        };
        done.map_err(|cause| Violation(format!("node {n}: {cause}")))?;
        self.checkpoint(n, p);
        Ok(())
    }

    /// Syncs the files, or not yet.
    fn checkpoint(&mut self, n: usize, p: &mut Process) {
        let leader = p.replica.leader_mut().map(|leader| leader.high_watermark());
        let high_watermark = leader.or(p.replica.follower_mut().map(|f| f.high_watermark()));
        if self.rng.chance(self.plan.sync_percent) {
            let disk = &mut self.machines[n].disk;
            disk.sync();
            disk.high_watermark = high_watermark.unwrap_or(0).min(disk.log_end_offset());
        }
    }

    fn drain_leader(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        job: DrainJob,
    ) -> Result<(), String> {
        let Machine { disk, memory, .. } = &mut self.machines[n];
        let Some(image) = memory.images.get(&job.image_id) else {
            return Err(format!("{} is drained and gone", job.image_id));
        };
        let bytes = &image.bytes[job.from as usize..job.to as usize];
        let mut place = job.place;
        place.file_position += u64::from(job.from);
        disk.append(place, bytes)?;
        if let Some(leader) = p.replica.leader_mut() {
            leader.handle_drained(now, job.image_id, job.to);
        }
        Ok(())
    }

    fn drain_follower(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        job: &Drain,
    ) -> Result<(), String> {
        let Machine { disk, memory, .. } = &mut self.machines[n];
        let Some(image) = memory.images.get(&job.image_id) else {
            return Err(format!("{} is drained and gone", job.image_id));
        };
        let follower = p.replica.follower_mut();
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
        if !bytes.is_empty() {
            disk.append(place, bytes)?;
        }
        if let Some(follower) = follower {
            follower.handle_drained(now, job, end);
        }
        Ok(())
    }

    fn scan(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        leader_epoch: i32,
    ) -> Result<(), String> {
        let Machine { disk, memory, .. } = &mut self.machines[n];
        let tail = memory.tail();
        let before = disk.log_end_offset();
        match memory.scan(disk, leader_epoch, tail.as_ref()) {
            Ok(()) => {
                let known = tail.map_or(0, |tail| tail.high_watermark);
                disk.high_watermark = disk.high_watermark.max(known).min(disk.log_end_offset());
                let stored = disk.stored();
                let end = stored.log_end_offset;
                self.note(|| format!("node {n} has scanned: offsets {before} to {end}"));
                p.replica.handle_scanned(now, Ok(stored));
                Ok(())
            }
            Err(cause) => Err(format!("a scan failed: {cause}")),
        }
    }

    fn cut_log(&mut self, n: usize, p: &mut Process, now: u64, cut: Cut) -> Result<(), String> {
        self.note(|| format!("node {n} cuts its log: {cut:?}"));
        let disk = &mut self.machines[n].disk;
        disk.cut(cut)?;
        let stored = disk.stored();
        p.replica.handle_cut(now, Ok(stored));
        Ok(())
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
