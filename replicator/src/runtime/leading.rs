//! What a node remembers of a partition while it leads it: who waits for what.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use hdrhistogram::Histogram;

use super::events::{AppendRequest, ReplyTo};
use super::files::StorageFault;
use super::partition::Images;
use crate::control::{Acks, Appended, ErrorCode, ErrorReply};
use crate::leader::Leader;
use crate::partition::AppendError;

/// Batches that wait for an image at most, beside those in the queue.
const STALLED_MAX: usize = 64;
/// Batches that wait for their commit at most, per partition; more are refused.
const UNCOMMITTED_MAX: usize = 65_536;

#[derive(Debug)]
struct Uncommitted {
    base_offset: i64,
    end_offset: i64,
    received_at: Instant,
    /// Who waits for the commit.
    reply: Option<(u64, ReplyTo)>,
    /// It waits for the device, too.
    is_durable: bool,
}

/// An answer that must not be sent before the tail is written: a crash in between would lose the record.
#[derive(Debug)]
struct Accepted {
    reply_to: ReplyTo,
    correlation: u64,
    base_offset: i64,
}

/// Beside the engine: who waits for what, and what is wrong.
#[derive(Debug)]
pub(super) struct Leading {
    pub(super) stalled: VecDeque<AppendRequest>,
    uncommitted: VecDeque<Uncommitted>,
    accepted: Vec<Accepted>,
    pub(super) latency: Histogram<u64>,
    /// Why the last lane to each follower ended.
    pub(super) lane_errors: HashMap<u32, String>,
    /// Why the last attempt to make an image failed. Appends that need one are refused meanwhile.
    image_fault: Option<String>,
    /// Why the files do not take bytes, or do not keep them.
    pub(super) storage_fault: Option<StorageFault>,
}

impl Leading {
    pub(super) fn new() -> Self {
        let latency = Histogram::new(3).expect("three digits are allowed");
        Self {
            stalled: VecDeque::new(),
            uncommitted: VecDeque::new(),
            accepted: Vec::new(),
            latency,
            lane_errors: HashMap::new(),
            image_fault: None,
            storage_fault: None,
        }
    }

    /// What is wrong, if anything is.
    pub(super) fn fault(&self) -> Option<String> {
        let storage = self.storage_fault.as_ref().map(ToString::to_string);
        self.image_fault.clone().or(storage)
    }

    /// The files do not take bytes, or do not keep them. Who waits for the device hears it now if there is no
    /// hope.
    pub(super) fn storage_failed(&mut self, fault: StorageFault) {
        if self.storage_fault.as_ref() != Some(&fault) {
            tracing::error!(%fault, "segment files");
        }
        if let StorageFault::Poisoned(_) = fault {
            let waiting = self
                .uncommitted
                .iter_mut()
                .filter(|append| append.is_durable);
            for (correlation, reply_to) in waiting.filter_map(|append| append.reply.take()) {
                let cause = format!("whether the records will last is unknown: {fault}");
                refuse(&reply_to, correlation, ErrorCode::STORAGE, cause);
            }
        }
        self.storage_fault = Some(fault);
    }

    /// Bytes have been written; poison stays.
    pub(super) fn storage_works(&mut self) {
        if let Some(StorageFault::Full(_)) = self.storage_fault {
            self.storage_fault = None;
        }
    }

    pub(super) fn image_made(&mut self) {
        if self.image_fault.take().is_some() {
            tracing::warn!("the leader has an image again");
        }
    }

    /// Each attempt names another file: only the first failure of a row is logged.
    pub(super) fn image_failed(&mut self, cause: String) {
        if self.image_fault.is_none() {
            tracing::error!(%cause, "no image for the leader; it tries again every second");
        }
        self.image_fault = Some(cause);
    }

    /// It leads no more: nothing of what waits will be answered by it.
    pub(super) fn stop(&mut self, cause: &str) {
        for request in self.stalled.drain(..) {
            let cause = cause.to_owned();
            refuse(
                &request.reply_to,
                request.correlation,
                ErrorCode::NOT_LEADER,
                cause,
            );
        }
        for appended in self.uncommitted.drain(..) {
            if let Some((correlation, reply_to)) = appended.reply {
                let cause = format!("{cause}; whether the batch is in the log is unknown");
                refuse(&reply_to, correlation, ErrorCode::OUTCOME_UNKNOWN, cause);
            }
        }
        self.image_fault = None;
    }

    pub(super) fn append(
        &mut self,
        now: u64,
        engine: &mut Leader,
        images: &Images,
        request: AppendRequest,
    ) {
        if request.acks == Acks::Durable
            && let Some(fault) = &self.storage_fault
        {
            let (reply_to, correlation) = (&request.reply_to, request.correlation);
            refuse(reply_to, correlation, ErrorCode::STORAGE, fault.to_string());
            return;
        }
        if !self.stalled.is_empty() || self.is_full() {
            self.stall(request);
        } else if let Err(request) = self.try_append(now, engine, images, request) {
            self.stall(*request);
        }
    }

    fn stall(&mut self, request: AppendRequest) {
        if self.stalled.len() < STALLED_MAX {
            self.stalled.push_back(request);
            return;
        }
        let cause = "the partition waits for its followers".to_owned();
        refuse(
            &request.reply_to,
            request.correlation,
            ErrorCode::OUT_OF_RESOURCES,
            cause,
        );
    }

    /// Appends and copies the bytes; gives the request back if its image is still being made.
    fn try_append(
        &mut self,
        now: u64,
        engine: &mut Leader,
        images: &Images,
        mut request: AppendRequest,
    ) -> Result<(), Box<AppendRequest>> {
        let placement = match engine.append(now, request.acks, &mut request.batch) {
            Ok(placement) => placement,
            Err(AppendError::NoImage) if self.image_fault.is_none() => {
                return Err(Box::new(request));
            }
            Err(error) => {
                let code = super::serve::append_error_code(&error);
                let cause = match (&error, &self.image_fault) {
                    (AppendError::NoImage, Some(cause)) => cause.clone(),
                    _ => error.to_string(),
                };
                refuse(&request.reply_to, request.correlation, code, cause);
                return Ok(());
            }
        };
        let image = &images[&placement.image_id];
        image
            .mapping()
            .write_at(placement.byte_position as usize, request.batch.as_bytes())
            .expect("a placement lies inside of its image");
        let mut reply = Some((request.correlation, request.reply_to));
        if request.acks == Acks::Leader {
            self.accept(reply.take(), placement.base_offset);
        }
        let is_durable = request.acks == Acks::Durable;
        self.uncommitted.push_back(Uncommitted {
            base_offset: placement.base_offset,
            end_offset: placement.end_offset,
            received_at: request.received_at,
            reply,
            is_durable,
        });
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.uncommitted.len() >= UNCOMMITTED_MAX
    }

    fn unstall(&mut self, now: u64, engine: &mut Leader, images: &Images) {
        while !self.is_full()
            && let Some(request) = self.stalled.pop_front()
        {
            if let Err(request) = self.try_append(now, engine, images, request) {
                self.stalled.push_front(*request);
                return;
            }
        }
    }

    /// Answers those whose records are committed now.
    fn commit(&mut self, engine: &Leader) {
        let high_watermark = engine.high_watermark();
        let durable_offset = engine.durable_offset();
        while let Some(first) = self.uncommitted.front()
            && first.end_offset <= high_watermark
            && (!first.is_durable || first.end_offset <= durable_offset)
        {
            let Some(done) = self.uncommitted.pop_front() else {
                return;
            };
            let elapsed = u64::try_from(done.received_at.elapsed().as_nanos()).unwrap_or(u64::MAX);
            // It grows as it needs to, which `saturating_record` would not let it.
            let _ = self.latency.record(elapsed);
            self.accept(done.reply, done.base_offset);
        }
    }

    fn accept(&mut self, reply: Option<(u64, ReplyTo)>, base_offset: i64) {
        self.accepted
            .extend(reply.map(|(correlation, reply_to)| Accepted {
                reply_to,
                correlation,
                base_offset,
            }));
    }

    /// Finds out who is to be answered, and takes what has waited for room.
    pub(super) fn settle(&mut self, now: u64, engine: &mut Leader, images: &Images) {
        // What is committed makes room for what waits, which may be committed at once.
        self.commit(engine);
        self.unstall(now, engine, images);
        self.commit(engine);
    }

    /// Answers them; the tail has been written.
    pub(super) fn answer(&mut self) {
        for done in self.accepted.drain(..) {
            accept(&done.reply_to, done.correlation, done.base_offset);
        }
    }
}

fn accept(reply_to: &ReplyTo, correlation: u64, base_offset: i64) {
    match reply_to {
        ReplyTo::Connection(control) => {
            control.send(Appended {
                correlation,
                base_offset,
                log_append_time: -1,
            });
        }
        // Whoever asked may have gone.
        ReplyTo::Local(sender) => drop(sender.try_send(Ok(base_offset))),
    }
}

pub(super) fn refuse(reply_to: &ReplyTo, correlation: u64, code: ErrorCode, message: String) {
    match reply_to {
        ReplyTo::Connection(control) => {
            if code.is_retriable() {
                control.bar();
            }
            control.refuse(correlation, code, message);
        }
        ReplyTo::Local(sender) => {
            drop(sender.try_send(Err(ErrorReply {
                code,
                correlation,
                message,
            })));
        }
    }
}
