//! Lanes with their control connections: each process keeps one to every other node, and serves theirs.

use super::control::{Control, Matter};
use super::events::ProcessEvent;
use super::process::{Process, node_id};
use super::verbs::Outcome;
use super::{Site, Violation, World, demand};
use crate::coordinator::MemoryId;
use crate::faults::{Fault, is_injected};
use crate::image::ImageId;
use crate::leader::GrantReply;

/// How long a node may take to answer a lane.
const LANE_TIMEOUT_NS: u64 = 5_000_000_000;

/// Our lane to a node, or the attempt to get one.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: usize,
    pub(super) session: u64,
    pub(super) lane: Option<usize>,
}

/// A node's lane to us.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    pub(super) connection: usize,
    pub(super) session: u64,
    pub(super) lane: usize,
}

/// Whose the queue pairs of a lane are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    pub(super) from: usize,
    pub(super) to: usize,
    session: u64,
    /// The process that posts.
    sender: u64,
}

impl World {
    /// Something has happened on a lane.
    pub(super) fn land(&mut self, outcome: Outcome) -> Result<(), Violation> {
        match outcome {
            Outcome::Placed {
                node,
                backing,
                at,
                bytes,
            } => {
                let memory = self.bytes_of(node, backing);
                memory[at..at + bytes.len()].copy_from_slice(&bytes);
                Ok(())
            }
            Outcome::Acked { lane, chains } => {
                let Lane {
                    from,
                    to,
                    session,
                    sender,
                } = self.lanes[lane];
                let event = ProcessEvent::Completed {
                    to,
                    session,
                    chains,
                };
                self.tell((from, sender), event)
            }
            Outcome::Failed { lane } => {
                let Lane {
                    from,
                    to,
                    session,
                    sender,
                } = self.lanes[lane];
                self.note(|| format!("lane {from}->{to} has failed"));
                self.tell((from, sender), ProcessEvent::LaneFailed { to, session })
            }
        }
    }

    pub(super) fn connect(&mut self, n: usize, p: &mut Process, to: usize) {
        if p.links.contains_key(&to) {
            return;
        }
        let from = (n, p.incarnation);
        let Some(connection) = self.open(from, to) else {
            self.connect_later(n, p, to);
            return;
        };
        self.sessions += 1;
        let session = self.sessions;
        p.links.insert(
            to,
            Link {
                connection,
                session,
                lane: None,
            },
        );
        self.send(connection, n, Control::Lane { session });
        self.tell_later(
            LANE_TIMEOUT_NS,
            from,
            ProcessEvent::Unanswered { connection },
        );
    }

    pub(super) fn connect_later(&mut self, n: usize, p: &Process, to: usize) {
        let delay = self.rng.spread(50_000_000, 1_000_000_000);
        self.tell_later(delay, (n, p.incarnation), ProcessEvent::Connect { to });
    }

    /// We give up our lane to a node, and will try again.
    pub(super) fn lose_link(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        to: usize,
        session: u64,
    ) {
        let Some(link) = p.links.get(&to).filter(|link| link.session == session) else {
            return;
        };
        self.note(|| format!("node {n}: lane to {to}, session {session}, is lost"));
        self.close(link.connection, n);
        if let Some(lane) = link.lane {
            self.verbs.end_sender(self.now, lane);
            for held in &mut p.held {
                held.replica.handle_lane_down(now, node_id(to), session);
            }
        }
        p.links.remove(&to);
        self.connect_later(n, p, to);
    }

    /// A connection has not led to a lane.
    pub(super) fn unanswered(&mut self, n: usize, p: &mut Process, now: u64, connection: usize) {
        let mut links = p.links.iter();
        let found = links.find(|(_, link)| link.connection == connection && link.lane.is_none());
        if let Some((&to, link)) = found {
            let session = link.session;
            self.lose_link(n, p, now, to, session);
        }
    }

    pub(super) fn closed(&mut self, n: usize, p: &mut Process, now: u64, connection: usize) {
        let mut links = p.links.iter();
        if let Some((&to, link)) = links.find(|(_, link)| link.connection == connection) {
            let session = link.session;
            for held in &mut p.held {
                held.replica.handle_peer_down(now, node_id(to));
            }
            self.lose_link(n, p, now, to, session);
        }
        let mut incoming = p.incoming.iter();
        if let Some((&from, lane)) = incoming.find(|(_, lane)| lane.connection == connection) {
            self.verbs.end_receiver(lane.lane);
            p.incoming.remove(&from);
        }
    }

    pub(super) fn receive(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        connection: usize,
        message: Control,
    ) -> Result<(), Violation> {
        if let Control::Lane { session } = message {
            self.accept_lane(n, p, connection, session);
            return Ok(());
        }
        let mut links = p.links.iter();
        if let Some((&to, _)) = links.find(|(_, link)| link.connection == connection) {
            return self.receive_answer(n, p, now, to, message);
        }
        let mut incoming = p.incoming.values();
        if let Some(lane) = incoming.find(|lane| lane.connection == connection)
            && let Control::Of(partition, matter) = message
        {
            let (lane, site) = (*lane, Site { node: n, partition });
            self.receive_request(site, p, now, lane, matter)?;
        }
        Ok(())
    }

    /// A node has a new lane to us; the one before it is destroyed first.
    fn accept_lane(&mut self, n: usize, p: &mut Process, connection: usize, session: u64) {
        let (from, sender) = self.peer(connection, n);
        if let Some(old) = p.incoming.remove(&from) {
            if !is_injected(Fault::OldQueuePairKept) {
                self.verbs.end_receiver(old.lane);
            }
            self.close(old.connection, n);
        }
        let lane = self.verbs.connect(from, n);
        self.lanes.push(Lane {
            from,
            to: n,
            session,
            sender,
        });
        p.incoming.insert(
            from,
            Incoming {
                connection,
                session,
                lane,
            },
        );
        let memory_id = self.machines[n].memory_id;
        self.send(connection, n, Control::LaneReady { session, memory_id });
    }

    /// What a node answers on our lane to it.
    fn receive_answer(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        to: usize,
        message: Control,
    ) -> Result<(), Violation> {
        let link = p.links.get_mut(&to).expect("found by the caller");
        let session = link.session;
        let (partition, matter) = match message {
            Control::Of(partition, matter) => (partition, matter),
            Control::LaneReady { session, memory_id } => {
                // The receiver made its end when it answered.
                link.lane = self.lanes.iter().position(|lane| lane.session == session);
                self.note(|| format!("node {n}: lane to {to}, session {session}, is up"));
                lane_up(p, now, to, session, memory_id);
                return Ok(());
            }
            other => return Err(Violation(format!("node {n} got {other:?}"))),
        };
        let replica = &mut p.held[partition].replica;
        if let Matter::Refused {
            image_id,
            code,
            cause,
        } = matter
        {
            let site = Site { node: n, partition };
            self.note(|| format!("{site}: {to} refuses {image_id:?}: {cause}"));
            replica.handle_refused(now, node_id(to), session, image_id, (code, cause));
            return Ok(());
        }
        let Some(leader) = replica.leader_mut() else {
            return Ok(());
        };
        let Some(follower) = leader.follower_on(node_id(to)) else {
            return Ok(());
        };
        match matter {
            Matter::Report(report) => leader.handle_report(follower, session, &report),
            Matter::Grant(reply) => leader.handle_grant(now, follower, session, &reply),
            Matter::Durable(offset) => leader.handle_durable(follower, session, offset),
            other => return Err(Violation(format!("a leader got {other:?}"))),
        }
        Ok(())
    }

    /// What a node asks on its lane to us.
    fn receive_request(
        &mut self,
        site: Site,
        p: &mut Process,
        now: u64,
        lane: Incoming,
        matter: Matter,
    ) -> Result<(), Violation> {
        let tail = self.store(site).memory.tail();
        let session = lane.session;
        let held = &mut p.held[site.partition];
        if let Matter::RevokeRequest { epoch } = matter {
            held.asker = Some(lane);
            if epoch.0 >= held.replica.leader_epoch() {
                held.leader = Some(lane);
            }
        } else if held.leader.is_none_or(|leader| leader.session != session)
            && !matches!(matter, Matter::LogEnd { .. })
        {
            // It was on its way when another leader, or another lane, came.
            return Ok(());
        }
        let replica = &mut held.replica;
        match matter {
            Matter::RevokeRequest { epoch } => {
                replica.handle_revoke_request(now, session, epoch);
            }
            Matter::TruncateRequest { leader_epoch, cut } => {
                replica.handle_truncate_request(session, leader_epoch, cut);
            }
            Matter::GrantRequest { leader_epoch, ask } => {
                replica.handle_grant_request(now, session, leader_epoch, ask, tail);
            }
            Matter::SyncRequest { offset } => {
                if let Some(follower) = replica.follower_mut() {
                    follower.handle_sync_request(now, session, offset, tail);
                }
            }
            Matter::LogEnd {
                member,
                last_epoch,
                log_end_offset,
            } => replica.handle_log_end(now, member, last_epoch, log_end_offset),
            other => return Err(Violation(format!("a follower got {other:?}"))),
        }
        Ok(())
    }

    /// Answers the leader.
    pub(super) fn reply(&mut self, site: Site, p: &Process, matter: Matter) {
        if let Some(lane) = p.held[site.partition].leader {
            let message = Control::Of(site.partition, matter);
            self.send(lane.connection, site.node, message);
        }
    }

    /// Refuses what was asked last.
    pub(super) fn refuse(&mut self, site: Site, p: &mut Process, matter: Matter) {
        let held = &mut p.held[site.partition];
        let asker = std::mem::replace(&mut held.asker, held.leader);
        if let Some(lane) = asker {
            let message = Control::Of(site.partition, matter);
            self.send(lane.connection, site.node, message);
        }
    }

    /// Grants an image to the leader.
    pub(super) fn grant(
        &mut self,
        site: Site,
        p: &mut Process,
        image_id: ImageId,
        len: u32,
        (log_end_offset, byte_position): (i64, u32),
    ) -> Result<(), Violation> {
        let write = self.register_for_writing(site, p, image_id);
        demand!(
            write.is_some() || len == 0,
            "{site} grants {image_id}, which it has not"
        );
        let (addr, rkey) = write.unwrap_or_default();
        let (entry_addr, entry_rkey) = self.register_table(site, p);
        let held = &mut p.held[site.partition];
        held.granted_to = held.leader;
        let reply = GrantReply {
            image_id,
            addr,
            rkey,
            len,
            entry_addr,
            entry_rkey,
            log_end_offset,
            byte_position,
        };
        self.reply(site, p, Matter::Grant(reply));
        Ok(())
    }
}

fn lane_up(p: &mut Process, now: u64, to: usize, session: u64, memory_id: MemoryId) {
    for held in &mut p.held {
        held.replica.handle_peer_up(now, node_id(to));
        held.replica
            .handle_lane_up(now, node_id(to), session, memory_id);
    }
}
