//! One partition on one node: which role it plays, and how it changes.
//!
//! A [`Replica`] is a state machine without I/O around a [`Leader`](crate::leader::Leader) or a
//! [`Follower`](crate::follower::Follower). What the cluster agrees on comes in as coordinator events; what
//! shall be agreed on goes out as proposals. At most one proposal is under way.
//!
//! | in | out |
//! | --- | --- |
//! | `handle_changed`, `handle_answered`, `handle_nodes`, `handle_session` | `Propose` |
//! | `handle_peer_up`, `handle_peer_down`: control connections | `StartedLeading`, `StoppedLeading` |
//! | `handle_lane_up`, `handle_lane_down`: our lanes to other nodes | `Leader(..)`, `Follower(..)` |
//! | `handle_log_end`: what others' files hold | `AnnounceLogEnd` |
//! | `handle_revoked`, `handle_scanned`, `handle_truncated`: of the follower's commands | `ReleaseImage` |
//! | `hand_over`, `elect_unclean`: the operator | `HandedOver`, `Lost` |
//! | `leader_mut`, `follower_mut`: everything else goes to the engine directly | |

use crate::coordinator::PartitionState;
use crate::image::ImageId;
use crate::{follower, leader};

/// What the runtime shall do for a replica.
#[derive(Debug, Clone, PartialEq)]
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
