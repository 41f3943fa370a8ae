//! What other threads tell the I/O thread, and how they wake it.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, SendError, Sender, TrySendError, bounded};
use rustix::event::{EventfdFlags, eventfd};
use transport::ReadyQp;

use super::connections::ControlSender;
use super::files::StorageFault;
use super::handle::Partition;
use super::pending::Reply;
use super::read::Located;
use super::reserve::Reservation;
use super::status::NodeStatus;
use super::workers::{ColdRequest, HelperJob, Loaded, Made};
use crate::control::{
    Acks, Durable, ErrorReply, Grant, GrantRequest, ImageRequest, LogEnd, Revoke, Revoked, Sync,
    Truncate,
};
use crate::coordinator::{self, Coordinator, MemoryId};
use crate::epoch::Cut;
use crate::follower::{Drain, Fault};
use crate::image::{ImageId, Mark};
use crate::partition::{CheckedBatch, DrainJob, FilledBatch, Stored};

/// Events that wait for the I/O thread at most; a sender then waits.
const EVENTS_MAX: usize = 1024;
/// Appends that wait for the I/O thread at most; a producer's connection is then read no further.
const APPENDS_MAX: usize = 256;

/// Where the answer to an append goes.
#[derive(Debug)]
pub(super) enum ReplyTo {
    /// To a control connection.
    Connection(ControlSender),
    /// To a thread of this process.
    Local(Reply<i64>),
    /// To one that wants to fill a batch in place.
    Reservation(Reply<Reservation>),
}

/// What is to be appended.
#[derive(Debug)]
pub(super) enum Work {
    Batch(CheckedBatch),
    /// Room for a batch of at most so many bytes, to be answered with [`ReplyTo::Reservation`].
    Reserve {
        len: usize,
        partition: Partition,
    },
}

/// A batch that was filled in place.
#[derive(Debug)]
pub(super) struct Fill {
    pub(super) number: u64,
    pub(super) acks: Acks,
    pub(super) batch: FilledBatch,
    pub(super) reply: Reply<i64>,
    pub(super) received_at: Instant,
}

/// A batch to be appended, or room for one to be reserved.
#[derive(Debug)]
pub(super) struct AppendRequest {
    pub(super) partition: usize,
    pub(super) acks: Acks,
    pub(super) work: Work,
    pub(super) correlation: u64,
    pub(super) reply_to: ReplyTo,
    pub(super) received_at: Instant,
}

/// A coordinator that now belongs to the I/O thread.
pub(super) struct StartedCoordinator(pub(super) Box<dyn Coordinator>);

impl fmt::Debug for StartedCoordinator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StartedCoordinator")
    }
}

/// What has happened outside of the I/O thread.
#[derive(Debug)]
pub(super) enum Event {
    /// The helper has made an image, or could not.
    ImageMade {
        partition: usize,
        id: ImageId,
        made: Made,
    },
    /// The helper has made a cold image for a follower.
    SourceLoaded {
        partition: usize,
        follower: usize,
        id: ImageId,
        loaded: Loaded,
    },
    /// The helper has made a cold image for a consumer.
    ReadLoaded {
        partition: usize,
        request: ColdRequest,
        loaded: Loaded,
    },
    /// The writer is done with a leader's job.
    LeaderDrained {
        partition: usize,
        job: DrainJob,
        result: Result<(), StorageFault>,
    },
    /// The writer is done with a follower's job.
    FollowerDrained {
        partition: usize,
        job: Drain,
        result: Result<Mark, Fault>,
    },
    /// Everything of a partition below an offset is on the device.
    Durable { partition: usize, offset: i64 },
    /// A partition's files cannot be written or synced.
    StorageFailed {
        partition: usize,
        fault: StorageFault,
    },
    /// The log starts at this offset now; older segments are gone.
    LogStart { partition: usize, offset: i64 },
    /// The job would need more memory than the node may use.
    MemoryShort { job: Box<HelperJob> },
    /// A lane to a node is up; control messages go to `control`.
    LaneUp {
        node: u32,
        session: u64,
        memory_id: MemoryId,
        qp: Box<ReadyQp>,
        control: ControlSender,
    },
    /// The control connection of a lane has ended, or could not be made: perhaps because nobody listens
    /// there any more.
    LaneDown {
        node: u32,
        session: u64,
        cause: String,
        is_gone: bool,
    },
    /// A follower has granted an image.
    Granted {
        node: u32,
        session: u64,
        grant: Grant,
    },
    /// A replica tells how far its files reach.
    LogEndTold { node: u32, log_end: LogEnd },
    /// A follower has refused the image of this request.
    GrantRefused {
        node: u32,
        session: u64,
        error: ErrorReply,
    },
    /// A leader is about to connect a lane; the one before it is destroyed.
    LeaderLane {
        node: u32,
        session: u64,
        control: ControlSender,
    },
    /// A follower has revoked or cut, and says what it holds.
    Reported {
        node: u32,
        session: u64,
        revoked: Revoked,
    },
    /// A leader asks for the fence.
    RevokeAsked {
        node: u32,
        session: u64,
        request: Revoke,
    },
    /// A leader says where the logs part.
    TruncateAsked {
        node: u32,
        session: u64,
        request: Truncate,
    },
    /// A leader waits for what we have on our device.
    SyncAsked {
        node: u32,
        session: u64,
        request: Sync,
    },
    /// A follower says what it has on its device.
    FollowerDurable {
        node: u32,
        session: u64,
        durable: Durable,
    },
    /// The helper has withdrawn all grants of a partition, or could not.
    Revoked {
        partition: usize,
        result: Result<(), String>,
    },
    /// The helper has withdrawn what consumers could read of a partition that is about to be cut.
    Withdrawn { partition: usize, cut: Cut },
    /// The writer has scanned, or cut, a partition.
    Stored {
        partition: usize,
        is_cut: bool,
        result: Result<Stored, Fault>,
    },
    /// A leader asks for an image.
    GrantAsked {
        node: u32,
        session: u64,
        request: GrantRequest,
    },
    /// A consumer asks for an image.
    ImageAsked {
        connection: u64,
        control: ControlSender,
        partition: usize,
        request: ImageRequest,
    },
    /// What was reserved is filled.
    Filled { partition: usize, fill: Fill },
    /// A reservation is dropped.
    Unreserved {
        partition: usize,
        number: u64,
        is_touched: bool,
    },
    /// Somebody here asks where the bytes at an offset are.
    LocateAsked {
        partition: usize,
        offset: i64,
        reply: Sender<Located>,
    },
    /// A control connection has ended.
    Disconnected { connection: u64 },
    /// The coordinator, which is started once there is somebody to take what it tells.
    CoordinatorStarted(StartedCoordinator),
    /// The coordinator tells something.
    Coordinator(coordinator::Event),
    /// Somebody asks how the node is.
    Status(Sender<NodeStatus>),
    /// No more appends are taken, what was appended is waited for, and then others shall lead if there are
    /// elections; the sender is dropped when all that is done, or patience is at its end.
    Finish {
        patience: Duration,
        done: Sender<()>,
    },
    /// The node shall end.
    Shutdown,
}

/// Wakes the I/O thread when it sleeps.
#[derive(Debug)]
pub(super) struct Waker {
    event: OwnedFd,
    is_sleeping: AtomicBool,
}

impl Waker {
    fn wake(&self) {
        // Pairs with the store in `announce_sleep`: either this sees the sleeper, or the sleeper's
        // look at the queues, which comes after its store, sees what was sent before this load.
        if self.is_sleeping.swap(false, Ordering::SeqCst) {
            #[expect(
                clippy::host_endian_bytes,
                reason = "an eventfd counts in host byte order"
            )]
            let one = 1_u64.to_ne_bytes();
            // A full counter means that the thread is awake already.
            let _ = rustix::io::write(&self.event, &one);
        }
    }

    /// The I/O thread is about to sleep: look at the queues once more after this.
    pub(super) fn announce_sleep(&self) {
        self.is_sleeping.store(true, Ordering::SeqCst);
    }

    /// The I/O thread is awake.
    pub(super) fn clear(&self) {
        self.is_sleeping.store(false, Ordering::SeqCst);
        let mut count = [0; 8];
        // Nothing to read means that nobody had to wake us.
        let _ = rustix::io::read(&self.event, &mut count);
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The senders' side of the I/O thread's queues.
#[derive(Debug, Clone)]
pub(super) struct EventSender {
    events: Sender<Event>,
    appends: Sender<AppendRequest>,
    waker: Arc<Waker>,
}

/// The I/O thread's side.
#[derive(Debug)]
pub(super) struct EventReceiver {
    pub(super) events: Receiver<Event>,
    pub(super) appends: Receiver<AppendRequest>,
    pub(super) waker: Arc<Waker>,
}

/// Makes the queues of an I/O thread.
pub(super) fn queues() -> std::io::Result<(EventSender, EventReceiver)> {
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let waker = Arc::new(Waker {
        event,
        is_sleeping: AtomicBool::new(false),
    });
    let (events, events_rx) = bounded(EVENTS_MAX);
    let (appends, appends_rx) = bounded(APPENDS_MAX);
    let sender = EventSender {
        events,
        appends,
        waker: Arc::clone(&waker),
    };
    Ok((
        sender,
        EventReceiver {
            events: events_rx,
            appends: appends_rx,
            waker,
        },
    ))
}

impl EventSender {
    /// Hands an event over; waits while the queue is full. Fails once the I/O thread has ended.
    pub(super) fn send(&self, event: Event) -> Result<(), SendError<()>> {
        let sent = self.events.send(event).map_err(|_| SendError(()));
        self.waker.wake();
        sent
    }

    /// Hands an event over unless the queue is full.
    pub(super) fn try_send(&self, event: Event) {
        if self.events.try_send(event).is_ok() {
            self.waker.wake();
        }
    }

    /// Hands a batch over unless the queue is full: then it is given back. Fails without it once the I/O thread
    /// has ended.
    pub(super) fn try_append(&self, request: AppendRequest) -> Result<(), Option<Work>> {
        match self.appends.try_send(request) {
            Ok(()) => {
                self.waker.wake();
                Ok(())
            }
            Err(TrySendError::Full(request)) => Err(Some(request.work)),
            Err(TrySendError::Disconnected(_)) => Err(None),
        }
    }

    /// Hands a batch over; waits while the queue is full. Fails once the I/O thread has ended.
    pub(super) fn append(&self, request: AppendRequest) -> Result<(), SendError<()>> {
        let sent = self.appends.send(request).map_err(|_| SendError(()));
        self.waker.wake();
        sent
    }
}
