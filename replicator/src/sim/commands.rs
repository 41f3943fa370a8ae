//! What engines want, executed.

use super::control::{Control, Matter};
use super::jobs::{HelperJob, WriterJob};
use super::process::{Process, node_id};
use super::verbs::{Backing, Chain, WorkRequest};
use super::{Site, Violation, World};
use crate::coordinator::Member;
use crate::follower;
use crate::image::{HeaderCrc, ImageId};
use crate::leader::{self, Post};
use crate::replica;
use crate::table::{BASE_OFFSET_UNKNOWN, ImageLocation, LINE_LEN, Tail, tail_byte_offset};

impl World {
    /// Posts what can be posted; says whether anything was.
    pub(super) fn post_all(&mut self, site: Site, p: &mut Process, now: u64) -> bool {
        let Some(leader) = p.held[site.partition].replica.leader_mut() else {
            return false;
        };
        let mut is_any = false;
        for (&to, link) in &p.links {
            let (Some(lane), Some(follower)) = (link.lane, leader.follower_on(node_id(to))) else {
                continue;
            };
            while let Some(post) = leader.poll_post(now, follower) {
                is_any = true;
                self.post_chain(site, lane, post);
            }
        }
        is_any
    }

    fn post_chain(&mut self, site: Site, lane: usize, post: Post) {
        let mut requests = Vec::with_capacity(2);
        if let Some(data) = post.data {
            let image = &self.store(site).memory.images[&data.image_id];
            let range = data.range.start as usize..data.range.end as usize;
            requests.push(WorkRequest {
                addr: data.remote_addr,
                rkey: data.rkey,
                bytes: image.bytes[range].to_vec(),
                signal: None,
            });
        }
        requests.push(WorkRequest {
            addr: post.tail_addr,
            rkey: post.tail_rkey,
            bytes: post.tail.to_vec(),
            signal: Some(Chain {
                partition: site.partition,
                leader_epoch: post.leader_epoch,
            }),
        });
        self.verbs.post(self.now, lane, requests);
    }

    pub(super) fn obey(
        &mut self,
        site: Site,
        p: &mut Process,
        command: replica::Command,
    ) -> Result<(), Violation> {
        match command {
            replica::Command::Leader(command) => self.obey_leader(site, p, command),
            replica::Command::Follower(command) => return self.obey_follower(site, p, command),
            replica::Command::Propose {
                ticket,
                expected_revision,
                state,
            } => {
                let number = (ticket, expected_revision);
                self.propose(site, p.incarnation, &mut p.client, number, state);
            }
            replica::Command::StartedLeading {
                leader_epoch,
                start_offset,
            } => {
                self.note(|| {
                    format!("{site} leads in epoch {leader_epoch} from offset {start_offset}")
                });
                self.check_started(site, leader_epoch)?;
            }
            replica::Command::StoppedLeading { cause, .. } => {
                self.note(|| format!("{site} leads no more: {cause}"));
                self.stop_leading(site, p);
            }
            replica::Command::AnnounceLogEnd {
                nodes,
                last_epoch,
                log_end_offset,
            } => self.announce(site, p, &nodes, (last_epoch, log_end_offset)),
            replica::Command::Lost(cause) => {
                self.note(|| format!("{site} has lost records: {cause}"));
                self.lose_records(site, &cause)?;
            }
            replica::Command::HandedOver(successor) => {
                self.note(|| format!("{site} has handed over to node {successor}"));
                self.stats.hand_overs += 1;
                if let Some(log_end) = p.held[site.partition].handed_at.take() {
                    self.check_handed_over(site, successor as usize, log_end)?;
                }
            }
            replica::Command::ReleaseImage(id) => self.help(site, p, HelperJob::Release(id)),
        }
        Ok(())
    }

    fn announce(
        &mut self,
        site: Site,
        p: &Process,
        nodes: &[u32],
        (last_epoch, log_end_offset): (i32, i64),
    ) {
        let member = Member {
            node: node_id(site.node),
            memory_id: self.machines[site.node].memory_id,
        };
        for to in nodes {
            if let Some(link) = p.links.get(&(*to as usize)) {
                let matter = Matter::LogEnd {
                    member,
                    last_epoch,
                    log_end_offset,
                };
                let message = Control::Of(site.partition, matter);
                self.send(link.connection, site.node, message);
            }
        }
    }

    fn obey_leader(&mut self, site: Site, p: &mut Process, command: leader::Command) {
        let leader = p.held[site.partition].replica.leader();
        let epoch = leader.map(|l| (l.log().leader_epoch(), l.log().epoch_start_offset()));
        let epoch = epoch.unwrap_or_default();
        match command {
            leader::Command::MakeImage {
                id, starts_segment, ..
            } => {
                let fill = None;
                let job = HelperJob::Make {
                    id,
                    fill,
                    starts_segment,
                };
                self.help(site, p, job);
            }
            leader::Command::ReleaseImage(id) => self.help(site, p, HelperJob::Release(id)),
            leader::Command::BeginEpoch(entry) => self.write(site, p, WriterJob::BeginEpoch(entry)),
            leader::Command::RequestRevoke { follower } => {
                self.ask(site, p, follower, Matter::RevokeRequest { epoch });
            }
            leader::Command::RequestTruncate { follower, cut } => {
                let leader_epoch = epoch.0;
                self.ask(
                    site,
                    p,
                    follower,
                    Matter::TruncateRequest { leader_epoch, cut },
                );
            }
            leader::Command::RequestSync { follower, offset } => {
                self.ask(site, p, follower, Matter::SyncRequest { offset });
            }
            leader::Command::RequestGrant { follower, ask } => {
                let leader_epoch = epoch.0;
                self.ask(
                    site,
                    p,
                    follower,
                    Matter::GrantRequest { leader_epoch, ask },
                );
            }
            leader::Command::Sync(offset) => self.write(site, p, WriterJob::LeaderSync(offset)),
            leader::Command::LoadCold {
                follower,
                id,
                offset,
                limit_offset,
            } => {
                let job = HelperJob::LoadCold {
                    follower,
                    id,
                    offset,
                    limit_offset,
                };
                self.help(site, p, job);
            }
            leader::Command::Describe { current, next } => {
                self.describe(site, p, epoch, Some(current), next);
            }
            leader::Command::PublishTail(tail) => self.put_tail(site, tail.sequence, &tail),
            leader::Command::Drain(job) => self.write(site, p, WriterJob::Leader(job)),
        }
    }

    fn ask(&mut self, site: Site, p: &Process, follower: usize, matter: Matter) {
        let Some(leader) = p.held[site.partition].replica.leader() else {
            return;
        };
        let to = leader.follower(follower).0 as usize;
        if let Some(link) = p.links.get(&to) {
            let message = Control::Of(site.partition, matter);
            self.send(link.connection, site.node, message);
        }
    }

    fn obey_follower(
        &mut self,
        site: Site,
        p: &mut Process,
        command: follower::Command,
    ) -> Result<(), Violation> {
        match command {
            follower::Command::Revoke => self.help(site, p, HelperJob::Revoke),
            follower::Command::Scan { leader_epoch } => {
                self.write(site, p, WriterJob::Scan { leader_epoch });
            }
            follower::Command::Cut(cut) => {
                // A crash in the middle of the cut must find no tail that says more than is left.
                let epoch = p.held[site.partition].replica.leader_epoch();
                self.put_both_tails(site, &empty_tail(epoch));
                p.held[site.partition].is_closed = true;
                self.help(site, p, HelperJob::Withdraw(cut));
            }
            follower::Command::Sync(offset) => self.write(site, p, WriterJob::FollowerSync(offset)),
            follower::Command::Report(report) => self.reply(site, p, Matter::Report(report)),
            follower::Command::Durable(offset) => self.reply(site, p, Matter::Durable(offset)),
            follower::Command::Lost(from, to) => {
                let cause = format!("offsets {from} to {to}");
                self.note(|| format!("{site} loses {cause}"));
                self.lose_records(site, &cause)?;
            }
            follower::Command::MakeImage {
                id,
                fill,
                starts_segment,
                ..
            } => {
                let job = HelperJob::Make {
                    id,
                    fill,
                    starts_segment,
                };
                self.help(site, p, job);
            }
            follower::Command::Grant {
                image_id,
                len,
                log_end_offset,
                byte_position,
            } => {
                let held = (log_end_offset, byte_position);
                return self.grant(site, p, image_id, len, held);
            }
            follower::Command::Refuse {
                image_id,
                code,
                cause,
            } => {
                let matter = Matter::Refused {
                    image_id,
                    code,
                    cause,
                };
                self.refuse(site, p, matter);
            }
            follower::Command::WriteTail(tail) => self.put_both_tails(site, &tail),
            follower::Command::Describe { current, next } => {
                let follower = p.held[site.partition].replica.follower();
                let epoch = follower.map(|f| f.granted_epoch()).unwrap_or_default();
                self.describe(site, p, epoch, current, next);
            }
            follower::Command::Drain(job) => self.write(site, p, WriterJob::Follower(job)),
            follower::Command::Release(id) => self.help(site, p, HelperJob::Release(id)),
        }
        Ok(())
    }

    fn put_tail(&mut self, site: Site, sequence: u32, tail: &Tail) {
        self.store_mut(site).memory.put_tail(sequence, tail);
        self.store_line(site, tail_byte_offset(sequence));
    }

    /// Tells verbs that the own CPU has written a line of the table entry.
    fn store_line(&mut self, site: Site, at: usize) {
        let Site { node, partition } = site;
        let line = at..at + LINE_LEN;
        let bytes = &self.machines[node].stores[partition].memory.entry[line];
        let backing = Backing::Table { partition };
        self.verbs.store(node, backing, at, bytes);
    }

    fn put_both_tails(&mut self, site: Site, tail: &Tail) {
        for sequence in 0..2 {
            self.put_tail(site, sequence, tail);
        }
    }

    fn describe(
        &mut self,
        site: Site,
        p: &Process,
        epoch: (i32, i64),
        current: Option<(ImageId, i64)>,
        next: Option<ImageId>,
    ) {
        let location = |id: ImageId, base_offset| {
            let (addr, rkey) = p.held[site.partition].images.get(&id)?.read;
            Some(ImageLocation {
                addr,
                base_offset,
                rkey,
            })
        };
        let current = current.and_then(|(id, base_offset)| location(id, base_offset));
        let next = next.and_then(|id| location(id, BASE_OFFSET_UNKNOWN));
        self.store_mut(site).memory.describe(epoch, current, next);
        self.store_line(site, 0);
    }

    /// The right to write an image, which a leader is granted.
    pub(super) fn register_for_writing(
        &mut self,
        site: Site,
        p: &mut Process,
        id: ImageId,
    ) -> Option<(u64, u32)> {
        let Site { node, partition } = site;
        let image = p.held[partition].images.get_mut(&id)?;
        let register = || {
            let bytes = &self.machines[node].stores[partition].memory.images[&id].bytes;
            let backing = Backing::Image { partition, id };
            self.verbs.register(node, backing, bytes, true)
        };
        Some(*image.write.get_or_insert_with(register))
    }

    pub(super) fn register_table(&mut self, site: Site, p: &mut Process) -> (u64, u32) {
        let Site { node, partition } = site;
        let register = || {
            let entry = &self.machines[node].stores[partition].memory.entry;
            let backing = Backing::Table { partition };
            self.verbs.register(node, backing, entry, true)
        };
        *p.held[partition].table.get_or_insert_with(register)
    }

    /// The memory that a key opens.
    pub(super) fn bytes_of(&mut self, node: usize, backing: Backing) -> &mut [u8] {
        let stores = &mut self.machines[node].stores;
        match backing {
            Backing::Table { partition } => &mut stores[partition].memory.entry[..],
            Backing::Image { partition, id } => {
                let image = stores[partition].memory.images.get_mut(&id);
                &mut image.expect("what is registered exists").bytes
            }
        }
    }
}

/// Claims nothing but the epoch.
fn empty_tail(leader_epoch: i32) -> Tail {
    Tail {
        image_id: ImageId::default(),
        session: 0,
        leader_epoch,
        sequence: 0,
        log_end_offset: 0,
        high_watermark: 0,
        log_start_offset: 0,
        byte_position: 0,
        header_crc: HeaderCrc::default(),
        flags: 0,
    }
}
