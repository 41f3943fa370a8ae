//! Control connections: one thread that reads and one that writes each.
//!
//! The connection is the session: when it ends, the queue pairs that were set up over it are destroyed.
//! See [`serve`](super::serve) for those that peers open, [`connector`](super::connector) for those to
//! followers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use super::error::NodeError;
use super::shared::Shared;
use crate::control::{ControlError, ErrorCode, ErrorReply, Message, MessageReader, MessageWriter};

/// How often a thread that waits looks whether the node is stopping.
pub(super) const STOP_INTERVAL: Duration = Duration::from_millis(200);
/// Messages that wait to be sent on one connection at most; then it is closed.
const OUTGOING_MAX: usize = 4096;

#[derive(Debug)]
enum Outgoing {
    Message(Box<Message>),
    Close,
}

/// Sends on a control connection without ever waiting.
#[derive(Debug, Clone)]
pub(super) struct ControlSender {
    outgoing: Sender<Outgoing>,
    is_overrun: Arc<AtomicBool>,
    /// A batch was refused that its sender may send again: those behind it must not overtake it.
    is_barred: Arc<AtomicBool>,
}

impl ControlSender {
    /// Takes no more appends from this connection.
    pub(super) fn bar(&self) {
        // Set and read by the I/O thread alone.
        self.is_barred.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_barred(&self) -> bool {
        self.is_barred.load(Ordering::Relaxed)
    }

    /// Queues a message. A peer that does not read loses its connection.
    pub(super) fn send(&self, message: impl Into<Message>) {
        let message = Outgoing::Message(Box::new(message.into()));
        if let Err(TrySendError::Full(_)) = self.outgoing.try_send(message) {
            self.is_overrun.store(true, Ordering::Relaxed);
        }
    }

    /// Closes the connection behind what has been queued.
    pub(super) fn close(&self) {
        if self.outgoing.try_send(Outgoing::Close).is_err() {
            self.is_overrun.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn refuse(&self, correlation: u64, code: ErrorCode, cause: impl Into<String>) {
        self.send(ErrorReply {
            code,
            correlation,
            message: cause.into(),
        });
    }
}

pub(super) fn spawn_writer(mut writer: MessageWriter) -> Result<ControlSender, NodeError> {
    let (outgoing, queue) = bounded(OUTGOING_MAX);
    let is_overrun = Arc::new(AtomicBool::new(false));
    let overrun = Arc::clone(&is_overrun);
    let run = move || {
        write_messages(&mut writer, &queue, &overrun);
        writer.close();
    };
    spawn("control-writer", run)?;
    Ok(ControlSender {
        outgoing,
        is_overrun,
        is_barred: Arc::default(),
    })
}

fn write_messages(writer: &mut MessageWriter, queue: &Receiver<Outgoing>, overrun: &AtomicBool) {
    for outgoing in queue {
        let Outgoing::Message(message) = outgoing else {
            return;
        };
        if overrun.load(Ordering::Relaxed) || writer.send(&message).is_err() {
            return;
        }
    }
}

pub(super) fn spawn(
    name: &'static str,
    run: impl FnOnce() + Send + 'static,
) -> Result<thread::JoinHandle<()>, NodeError> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder
        .spawn(run)
        .map_err(|source| NodeError::Thread { name, source })
}

/// Waits for a message as long as the node runs.
pub(super) fn receive(
    shared: &Shared,
    reader: &mut MessageReader,
) -> Result<Option<Message>, ControlError> {
    while !shared.is_stopping() {
        if let Some(message) = reader.receive_timeout(STOP_INTERVAL)? {
            return Ok(Some(message));
        }
    }
    Ok(None)
}
