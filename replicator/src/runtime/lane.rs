//! A lane to a follower, and what the I/O thread puts on it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crossbeam::channel::{Sender, TrySendError};
use transport::{ReadyQp, Remote, Rkey, SendFlags, Source, WcStatus};

use super::connections::ControlSender;
use super::shared::Shared;
use crate::control::{CutKind, GrantRequest, Revoke, Sync, Truncate};
use crate::epoch::Cut;
use crate::image::ImageId;
use crate::leader::{GrantAsk, Post};

/// What a leader asks a follower on the control connection of its lane.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ask {
    /// To revoke and report.
    Revoke,
    /// To cut its log.
    Truncate(Cut),
    /// To have everything below an offset on its device.
    Sync(i64),
    /// To grant an image.
    Grant(GrantAsk),
}

/// A lane to a follower.
pub(super) struct Lane {
    pub(super) node: u32,
    pub(super) session: u64,
    pub(super) qp: Box<ReadyQp>,
    pub(super) control: ControlSender,
    /// The partitions whose chains are on their way, with the epoch, in the order posted.
    pub(super) posted: VecDeque<(usize, i32)>,
    /// Which partition each request was for, and which image if it was one for a grant.
    pub(super) asked: HashMap<u64, (usize, Option<ImageId>)>,
    pub(super) last_correlation: u64,
    /// Partitions that had a chain to post and no room, first come first.
    pub(super) waiting: VecDeque<usize>,
}

/// Requests of one chain at most.
pub(super) const CHAIN_WR: usize = 2;

impl Lane {
    /// A partition has a chain to post, and there is no room.
    pub(super) fn wait(&mut self, partition: usize) {
        // Whoever is there twice is pumped once too often.
        if self.waiting.back() != Some(&partition) {
            self.waiting.push_back(partition);
        }
    }
}

/// Posts the bytes and the tail in one doorbell, signalled once.
pub(super) fn post_chain(
    lane: &mut Lane,
    partition: usize,
    post: &Post,
    source: Option<&Arc<transport::SharedRegion>>,
) -> Result<(), transport::Error> {
    let mut chain = lane.qp.start_send();
    if let Some(data) = &post.data {
        let region = source.expect("an image that is sent from is kept");
        let range = data.range.start as usize..data.range.end as usize;
        let remote = Remote {
            addr: data.remote_addr,
            rkey: Rkey(data.rkey),
        };
        chain.write(0, Source::Shared(region, range), remote, SendFlags::empty())?;
    }
    let remote = Remote {
        addr: post.tail_addr,
        rkey: Rkey(post.tail_rkey),
    };
    chain.write(0, Source::Inline(&post.tail), remote, SendFlags::SIGNALED)?;
    chain.submit()?;
    lane.posted.push_back((partition, post.leader_epoch));
    Ok(())
}

pub(super) fn ask_follower(
    lanes: &mut [Lane],
    shared: &Shared,
    partition: usize,
    node: u32,
    (leader_epoch, epoch_start_offset): (i32, i64),
    ask: Ask,
) {
    let Some(lane) = lanes.iter_mut().find(|lane| lane.node == node) else {
        return;
    };
    let image_id = match ask {
        Ask::Grant(ask) => Some(ask.image_id),
        Ask::Revoke | Ask::Truncate(_) => None,
        Ask::Sync(offset) => {
            let info = &shared.partitions[partition];
            lane.control.send(Sync {
                topic: info.topic.clone(),
                partition: info.number,
                session: lane.session,
                offset,
            });
            return;
        }
    };
    lane.last_correlation += 1;
    let correlation = lane.last_correlation;
    lane.asked.insert(correlation, (partition, image_id));
    let info = &shared.partitions[partition];
    let (topic, partition) = (info.topic.clone(), info.number);
    match ask {
        Ask::Revoke => lane.control.send(Revoke {
            correlation,
            topic,
            partition,
            leader_epoch,
            epoch_start_offset,
        }),
        Ask::Truncate(cut) => {
            let (kind, offset) = match cut {
                Cut::TruncateTo(to) => (CutKind::TruncateTo, to),
                Cut::RestartAt(at) => (CutKind::RestartAt, at),
            };
            lane.control.send(Truncate {
                correlation,
                topic,
                partition,
                leader_epoch,
                kind,
                offset,
            });
        }
        Ask::Sync(_) => {}
        Ask::Grant(ask) => lane.control.send(GrantRequest {
            correlation,
            topic,
            partition,
            leader_epoch,
            epoch_start_offset,
            image_id: ask.image_id.0,
            base_offset: ask.base_offset,
            file_position: ask.place.file_position,
            segment_base_offset: ask.place.segment_base_offset,
            image_len: ask.image_len,
        }),
    }
}

pub(super) fn lane_fault(status: WcStatus, partition: usize, shared: &Shared) -> String {
    let info = &shared.partitions[partition];
    let of = format!("partition {} of topic `{}`", info.number, info.topic);
    match status {
        WcStatus::RemAccessErr | WcStatus::RemInvReqErr => {
            format!("{status}: the follower has withdrawn its grant for {of}")
        }
        _ => format!("{status}, while writing {of}"),
    }
}

/// A queue to a worker. What does not fit waits here, so that the I/O thread never does; the engines
/// bound how much that can be.
pub(super) struct Outbox<T> {
    pub(super) sender: Sender<T>,
    pub(super) waiting: VecDeque<T>,
}

impl<T> Outbox<T> {
    pub(super) fn send(&mut self, job: T) {
        self.waiting.push_back(job);
        self.flush();
    }

    pub(super) fn flush(&mut self) {
        while let Some(job) = self.waiting.pop_front() {
            if let Err(TrySendError::Full(job)) = self.sender.try_send(job) {
                self.waiting.push_front(job);
                return;
            }
        }
    }
}
