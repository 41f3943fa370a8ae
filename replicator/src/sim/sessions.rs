//! Lanes with their control connections: each process keeps one to every other node, and serves theirs.

use super::control::Control;
use super::events::ProcessEvent;
use super::process::{Process, node_id};
use super::verbs::Lane;
use super::{Violation, World, demand};
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

impl World {
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
            self.end_sender(lane);
            p.replica.handle_lane_down(now, node_id(to), session);
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
            p.replica.handle_peer_down(now, node_id(to));
            self.lose_link(n, p, now, to, session);
        }
        let mut incoming = p.incoming.iter();
        if let Some((&from, lane)) = incoming.find(|(_, lane)| lane.connection == connection) {
            self.end_receiver(lane.lane);
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
        if let Some((&to, _)) = p
            .links
            .iter()
            .find(|(_, link)| link.connection == connection)
        {
            return self.receive_answer(n, p, now, to, message);
        }
        let mut incoming = p.incoming.values();
        if let Some(lane) = incoming.find(|lane| lane.connection == connection) {
            let lane = *lane;
            self.receive_request(n, p, now, lane, message)?;
        }
        Ok(())
    }

    /// A node has a new lane to us; the one before it is destroyed first.
    fn accept_lane(&mut self, n: usize, p: &mut Process, connection: usize, session: u64) {
        let (from, sender) = self.peer(connection, n);
        if let Some(old) = p.incoming.remove(&from) {
            if !is_injected(Fault::OldQueuePairKept) {
                self.end_receiver(old.lane);
            }
            self.close(old.connection, n);
        }
        self.lanes
            .push(Lane::new((from, sender), (n, p.incarnation), session));
        let lane = self.lanes.len() - 1;
        p.incoming.insert(
            from,
            Incoming {
                connection,
                session,
                lane,
            },
        );
        let memory_id = self.machines[n].memory.id;
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
        if let Control::LaneReady { session, memory_id } = message {
            // The receiver made its end when it answered.
            link.lane = self.lanes.iter().position(|lane| lane.session == session);
            self.note(|| format!("node {n}: lane to {to}, session {session}, is up"));
            self.lane_up(p, now, to, session, memory_id);
            return Ok(());
        }
        if let Control::Refused {
            image_id,
            code,
            cause,
        } = message
        {
            self.note(|| format!("node {n}: {to} refuses {image_id:?}: {cause}"));
            p.replica
                .handle_refused(now, node_id(to), session, image_id, (code, cause));
            return Ok(());
        }
        let Some(leader) = p.replica.leader_mut() else {
            return Ok(());
        };
        let Some(follower) = leader.follower_on(node_id(to)) else {
            return Ok(());
        };
        match message {
            Control::Report(report) => leader.handle_report(follower, session, &report),
            Control::Grant(reply) => leader.handle_grant(now, follower, session, &reply),
            Control::Durable(offset) => leader.handle_durable(follower, session, offset),
            other => return Err(Violation(format!("a leader got {other:?}"))),
        }
        Ok(())
    }

    fn lane_up(&mut self, p: &mut Process, now: u64, to: usize, session: u64, memory_id: MemoryId) {
        p.replica.handle_peer_up(now, node_id(to));
        p.replica
            .handle_lane_up(now, node_id(to), session, memory_id);
    }

    /// What a node asks on its lane to us.
    fn receive_request(
        &mut self,
        n: usize,
        p: &mut Process,
        now: u64,
        lane: Incoming,
        message: Control,
    ) -> Result<(), Violation> {
        let tail = self.machines[n].memory.tail();
        let session = lane.session;
        if let Control::RevokeRequest { epoch } = message {
            p.asker = Some(lane);
            if epoch.0 >= p.replica.leader_epoch() {
                p.leader = Some(lane);
            }
        } else if p.leader.is_none_or(|leader| leader.session != session)
            && !matches!(message, Control::LogEnd { .. })
        {
            // It was on its way when another leader, or another lane, came.
            return Ok(());
        }
        match message {
            Control::RevokeRequest { epoch } => {
                p.replica.handle_revoke_request(now, session, epoch)
            }
            Control::TruncateRequest { leader_epoch, cut } => {
                p.replica
                    .handle_truncate_request(session, leader_epoch, cut);
            }
            Control::GrantRequest { leader_epoch, ask } => {
                p.replica
                    .handle_grant_request(now, session, leader_epoch, ask, tail);
            }
            Control::SyncRequest { offset } => {
                if let Some(follower) = p.replica.follower_mut() {
                    follower.handle_sync_request(now, session, offset, tail);
                }
            }
            Control::LogEnd {
                member,
                last_epoch,
                log_end_offset,
            } => {
                p.replica
                    .handle_log_end(now, member, last_epoch, log_end_offset);
            }
            other => return Err(Violation(format!("a follower got {other:?}"))),
        }
        Ok(())
    }

    /// Answers the leader.
    pub(super) fn reply(&mut self, n: usize, p: &Process, message: Control) {
        if let Some(lane) = p.leader {
            self.send(lane.connection, n, message);
        }
    }

    /// Refuses what was asked last.
    pub(super) fn refuse(&mut self, n: usize, p: &mut Process, message: Control) {
        let asker = std::mem::replace(&mut p.asker, p.leader);
        if let Some(lane) = asker {
            self.send(lane.connection, n, message);
        }
    }

    /// Grants an image to the leader.
    pub(super) fn grant(
        &mut self,
        n: usize,
        p: &mut Process,
        image_id: ImageId,
        len: u32,
        (log_end_offset, byte_position): (i64, u32),
    ) -> Result<(), Violation> {
        let write = self.register_for_writing(p, image_id);
        demand!(
            write.is_some() || len == 0,
            "node {n} grants {image_id}, which it has not"
        );
        let (addr, rkey) = write.unwrap_or_default();
        let (entry_addr, entry_rkey) = self.register_table(p);
        p.granted_to = p.leader;
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
        self.reply(n, p, Control::Grant(reply));
        Ok(())
    }
}
