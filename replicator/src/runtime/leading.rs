//! What a node remembers of a partition while it leads it: who waits for what.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use hdrhistogram::Histogram;

use super::append::{AppendError as Refusal, error_code};
use super::events::{AppendRequest, Fill, ReplyTo, Work};
use super::files::StorageFault;
use super::partition::Images;
use super::reserve::{RESERVATION_TIME, Reservation, Room};
use crate::control::{Acks, Appended, ErrorCode};
use crate::leader::Leader;
use crate::partition::{AppendError, Placement};

/// Batches that wait for an image at most, beside those in the queue.
const STALLED_MAX: usize = 64;
/// Batches that wait for their commit at most, per partition; more are refused.
const UNCOMMITTED_MAX: usize = 65_536;

/// A reservation lasts this long at most, in nanoseconds.
const RESERVATION_TIME_NS: u64 =
    RESERVATION_TIME.as_secs() * 1_000_000_000 + RESERVATION_TIME.subsec_nanos() as u64;

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
    /// Who fills the end of the log in place, and until when at most.
    reservation: Option<(u64, u64)>,
    last_reservation: u64,
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
            reservation: None,
            last_reservation: 0,
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

    /// Whether no further append may wait for room.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.len() >= STALLED_MAX
    }

    /// Whether appends wait for their answer, be it for their commit or for room.
    pub(super) fn is_appending(&self) -> bool {
        !self.stalled.is_empty() || self.uncommitted.iter().any(|append| append.reply.is_some())
    }

    /// It leads no more: nothing of what waits will be answered by it.
    pub(super) fn stop(&mut self, cause: &str) {
        for request in self.stalled.drain(..) {
            request.refuse(ErrorCode::NOT_LEADER, cause.to_owned());
        }
        for appended in self.uncommitted.drain(..) {
            if let Some((correlation, reply_to)) = appended.reply {
                let cause = format!("{cause}; whether the batch is in the log is unknown");
                refuse(&reply_to, correlation, ErrorCode::OUTCOME_UNKNOWN, cause);
            }
        }
        self.reservation = None;
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
            request.refuse(ErrorCode::STORAGE, fault.to_string());
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
        request.refuse(ErrorCode::OUT_OF_RESOURCES, cause);
    }

    /// Appends and copies the bytes, or reserves room for them; gives the request back if it must wait.
    fn try_append(
        &mut self,
        now: u64,
        engine: &mut Leader,
        images: &Images,
        mut request: AppendRequest,
    ) -> Result<(), Box<AppendRequest>> {
        let placed = match &mut request.work {
            Work::Batch(batch) => engine.append(now, request.acks, batch),
            Work::Reserve { len, .. } => engine.reserve(now, request.acks, *len),
        };
        let placement = match placed {
            Ok(placement) => placement,
            Err(AppendError::NoImage) if self.image_fault.is_none() => {
                return Err(Box::new(request));
            }
            Err(AppendError::Reserved) => return Err(Box::new(request)),
            Err(error) => {
                let code = error_code(&error);
                let cause = match (&error, &self.image_fault) {
                    (AppendError::NoImage, Some(cause)) => cause.clone(),
                    _ => error.to_string(),
                };
                request.refuse(code, cause);
                return Ok(());
            }
        };
        let image = images[&placement.image_id].mapping();
        let AppendRequest {
            acks,
            work,
            correlation,
            reply_to,
            received_at,
            ..
        } = request;
        match work {
            Work::Batch(batch) => {
                image
                    .write_at(placement.byte_position as usize, batch.as_bytes())
                    .expect("a placement lies inside of its image");
                let reply = (correlation, reply_to);
                self.appended(&placement, acks, received_at, reply);
            }
            Work::Reserve { len, partition } => {
                self.last_reservation += 1;
                let number = self.last_reservation;
                self.reservation = Some((number, now + RESERVATION_TIME_NS));
                let room = Room {
                    number,
                    acks,
                    base_offset: placement.base_offset,
                    image: Arc::clone(image),
                    byte_position: placement.byte_position as usize,
                    len_max: len,
                };
                if let ReplyTo::Reservation(reply) = reply_to {
                    reply.send(Ok(Reservation::new(partition, room)));
                }
            }
        }
        Ok(())
    }

    /// A batch is in the log: it is answered, or waits for its commit.
    fn appended(
        &mut self,
        placement: &Placement,
        acks: Acks,
        received_at: Instant,
        reply: (u64, ReplyTo),
    ) {
        let mut reply = Some(reply);
        if acks == Acks::Leader {
            self.accept(reply.take(), placement.base_offset);
        }
        self.uncommitted.push_back(Uncommitted {
            base_offset: placement.base_offset,
            end_offset: placement.end_offset,
            received_at,
            reply,
            is_durable: acks == Acks::Durable,
        });
    }

    /// What was reserved is filled: it becomes log now, unless it comes too late.
    pub(super) fn fill(&mut self, now: u64, engine: &mut Leader, images: &Images, fill: Fill) {
        let Fill {
            number,
            acks,
            mut batch,
            reply,
            received_at,
        } = fill;
        if self.reservation.take_if(|(n, _)| *n == number).is_none() {
            reply.send(Err(Refusal::Expired));
            return;
        }
        let fault = self.storage_fault.as_ref();
        if let Some(fault) = fault.filter(|_| acks == Acks::Durable) {
            reply.send(Err(Refusal::Storage(fault.to_string())));
            engine.give_up(now, true);
            return;
        }
        match engine.fill(now, acks, &mut batch) {
            Ok(placement) => {
                images[&placement.image_id]
                    .mapping()
                    .write_at(placement.byte_position as usize, &batch.header)
                    .expect("a placement lies inside of its image");
                let reply = (0, ReplyTo::Local(reply));
                self.appended(&placement, acks, received_at, reply);
            }
            Err(error) => {
                engine.give_up(now, true);
                reply.send(Err(error.into()));
            }
        }
    }

    /// A reservation is dropped.
    pub(super) fn unreserve(
        &mut self,
        now: u64,
        engine: &mut Leader,
        number: u64,
        is_touched: bool,
    ) {
        if self.reservation.take_if(|(n, _)| *n == number).is_some() {
            engine.give_up(now, is_touched);
        }
    }

    /// When the present reservation is over, if there is one.
    pub(super) fn reservation_due(&self) -> Option<u64> {
        self.reservation.map(|(_, due)| due)
    }

    /// Ends a reservation that has lasted too long. Whoever has it may be writing to it.
    pub(super) fn expire_reservation(&mut self, now: u64, engine: &mut Leader) {
        if self.reservation.take_if(|(_, due)| *due <= now).is_some() {
            tracing::warn!("a reservation was neither filled nor dropped in time");
            engine.give_up(now, true);
        }
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

impl AppendRequest {
    /// Answers that it is not appended.
    pub(super) fn refuse(&self, code: ErrorCode, cause: String) {
        refuse(&self.reply_to, self.correlation, code, cause);
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
        ReplyTo::Local(reply) => reply.send(Ok(base_offset)),
        ReplyTo::Reservation(_) => unreachable!("what is reserved is no record"),
    }
}

fn refuse(reply_to: &ReplyTo, correlation: u64, code: ErrorCode, message: String) {
    match reply_to {
        ReplyTo::Connection(control) => {
            if code.is_retriable() {
                control.bar();
            }
            control.refuse(correlation, code, message);
        }
        ReplyTo::Local(reply) => reply.send(Err(Refusal::refused(code, message))),
        ReplyTo::Reservation(reply) => reply.send(Err(Refusal::refused(code, message))),
    }
}
