//! Images for consumers that ask for one.

use std::collections::HashMap;
use std::sync::Arc;

use transport::Remote;

use super::{Held, Jobs};
use crate::control::{ErrorCode, ImageGrant, ImageRequest};
use crate::image::{ImageId, Mark};
use crate::runtime::connections::ControlSender;
use crate::runtime::memory::Image;
use crate::runtime::workers::{ColdRequest, HelperJob, Loaded};

/// How long an image stays readable for a consumer at most, in nanoseconds. One that needs longer loses its
/// queue pair, and asks again.
const LENT_MAX_NS: u64 = 60_000_000_000;

/// Images that consumers asked for, so that they stay readable: by connection.
#[derive(Debug, Default)]
pub(super) struct Readers {
    waiting: HashMap<u64, ControlSender>,
    lent: HashMap<u64, Lent>,
    /// When the one was lent that has been for longest.
    oldest: Option<u64>,
    /// The files hold what is about to be cut: nothing of them is granted.
    pub(super) is_closed: bool,
}

/// An image that stays readable for a consumer, whatever becomes of it otherwise.
#[derive(Debug)]
struct Lent {
    image: Arc<Image>,
    since: u64,
}

impl Readers {
    /// Lends an image instead of the one before.
    fn lend(&mut self, now: u64, connection: u64, image: Arc<Image>, jobs: &mut Jobs) {
        let lent = Lent { image, since: now };
        let old = self.lent.insert(connection, lent);
        jobs.helper
            .extend(old.map(|old| HelperJob::LetGo(old.image)));
        self.note_oldest();
    }

    fn take_back(&mut self, connection: u64, jobs: &mut Jobs) {
        let old = self.lent.remove(&connection);
        jobs.helper
            .extend(old.map(|old| HelperJob::LetGo(old.image)));
        self.note_oldest();
    }

    fn note_oldest(&mut self) {
        self.oldest = self.lent.values().map(|lent| lent.since).min();
    }

    /// Takes all back: they are about to be withdrawn.
    pub(super) fn take_all(&mut self) -> Vec<Arc<Image>> {
        self.oldest = None;
        self.lent.drain().map(|(_, lent)| lent.image).collect()
    }

    /// When something has been lent for too long.
    pub(super) fn due(&self) -> Option<u64> {
        self.oldest.map(|since| since + LENT_MAX_NS)
    }

    pub(super) fn take_back_overdue(&mut self, now: u64, jobs: &mut Jobs) {
        if self.due().is_some_and(|due| due <= now) {
            let is_overdue = |lent: &&Lent| lent.since + LENT_MAX_NS <= now;
            let overdue = self.lent.iter().filter(|(_, lent)| is_overdue(lent));
            for connection in overdue
                .map(|(connection, _)| *connection)
                .collect::<Vec<_>>()
            {
                self.take_back(connection, jobs);
            }
        }
    }
}

/// Why no image is granted for the moment.
const CUT: &str = "the log is being cut to its leader's";

impl Held {
    /// A consumer asks for the image that holds an offset: one in memory, or a copy of file bytes.
    pub(in crate::runtime) fn image_asked(
        &mut self,
        now: u64,
        connection: u64,
        control: ControlSender,
        request: &ImageRequest,
        jobs: &mut Jobs,
        load: impl FnOnce(ColdRequest, i64) -> HelperJob,
    ) {
        let correlation = request.correlation;
        let offset = request.offset;
        let (log_start, log_end) = self.offsets();
        if self.readers.is_closed {
            refuse_image(&control, correlation, CUT);
            return;
        }
        if !(log_start..=log_end).contains(&offset) {
            let cause = format!("offset {offset} is outside of the log, {log_start} to {log_end}");
            refuse_image(&control, correlation, &cause);
            return;
        }
        let live = self.image_of_offset(offset).and_then(|(id, mark)| {
            let image = self.images.get(&id)?;
            Some((id, mark, Arc::clone(image)))
        });
        match live {
            Some((id, mark, image)) => {
                let from = mark.byte_position;
                let grant = image.readable().map(|region| {
                    let len = u32::try_from(region.len()).unwrap_or(u32::MAX) - from;
                    let remote = region.remote().at(from.into());
                    image_grant(
                        correlation,
                        request.partition,
                        id,
                        (mark.end_offset, log_end),
                        remote,
                        len,
                    )
                });
                if let Some(grant) = grant {
                    control.send(grant);
                    self.readers.lend(now, connection, image, jobs);
                }
            }
            None => {
                self.readers.waiting.insert(connection, control);
                jobs.helper.push(load(
                    ColdRequest {
                        connection,
                        correlation,
                    },
                    offset,
                ));
            }
        }
    }

    /// Where the log starts and ends.
    fn offsets(&self) -> (i64, i64) {
        match (self.replica.leader(), self.replica.follower()) {
            (Some(leader), _) => {
                let log = leader.log();
                (log.log_start_offset(), log.log_end_offset())
            }
            (_, Some(follower)) => (follower.log_start_offset(), follower.log_end_offset()),
            (None, None) => (0, 0),
        }
    }

    /// The image in memory that holds an offset, and where in it to read from.
    fn image_of_offset(&self, offset: i64) -> Option<(ImageId, Mark)> {
        if let Some(leader) = self.replica.leader() {
            let state = leader.log().image_of_offset(offset)?;
            return Some((state.id(), state.mark_for_offset(offset)));
        }
        let (id, base_offset) = self.replica.follower()?.image_of_offset(offset)?;
        Some((id, Mark::start(base_offset)))
    }

    pub(in crate::runtime) fn read_loaded(
        &mut self,
        now: u64,
        request: ColdRequest,
        loaded: Loaded,
        jobs: &mut Jobs,
    ) {
        let readers = &mut self.readers;
        let Some(control) = readers.waiting.remove(&request.connection) else {
            jobs.helper
                .extend(loaded.ok().map(|(image, _)| HelperJob::LetGo(image)));
            return;
        };
        let loaded = match loaded {
            // Its bytes may be those that the cut removes.
            Ok((image, _)) if readers.is_closed => {
                jobs.helper.push(HelperJob::LetGo(image));
                Err(CUT.to_owned())
            }
            loaded => loaded,
        };
        match loaded {
            Ok((image, state)) => {
                let Some(region) = image.readable() else {
                    return;
                };
                let offsets = (state.base_offset(), state.end().end_offset);
                // Only the bytes read are granted: what follows them is in another image.
                let len = state.end().byte_position;
                let (id, remote) = (state.id(), region.remote());
                control.send(image_grant(
                    request.correlation,
                    0,
                    id,
                    offsets,
                    remote,
                    len,
                ));
                readers.lend(now, request.connection, image, jobs);
            }
            Err(cause) => refuse_image(&control, request.correlation, &cause),
        }
    }

    /// Whether a connection has, or waits for, an image.
    pub(in crate::runtime) fn is_reader(&self, connection: u64) -> bool {
        let readers = &self.readers;
        readers.waiting.contains_key(&connection) || readers.lent.contains_key(&connection)
    }

    pub(in crate::runtime) fn disconnected(&mut self, connection: u64, jobs: &mut Jobs) {
        self.readers.waiting.remove(&connection);
        self.readers.take_back(connection, jobs);
    }

    /// Since when the image has been lent that has been for longest, of those that are kept for consumers only.
    pub(in crate::runtime) fn lent_since(&self) -> Option<u64> {
        self.lent_only().map(|(_, since)| since).min()
    }

    /// Takes that image back before its time, for want of memory.
    pub(in crate::runtime) fn release_lent(&mut self, jobs: &mut Jobs) {
        let oldest = self.lent_only().min_by_key(|(_, since)| *since);
        if let Some((connection, _)) = oldest {
            self.readers.take_back(connection, jobs);
        }
    }

    fn lent_only(&self) -> impl Iterator<Item = (u64, u64)> {
        let is_ours = |image| self.images.values().any(|ours| Arc::ptr_eq(ours, image));
        let lent = self.readers.lent.iter();
        lent.filter(move |(_, lent)| !is_ours(&lent.image))
            .map(|(connection, lent)| (*connection, lent.since))
    }
}

/// The answer to a consumer that asked for an image.
fn image_grant(
    correlation: u64,
    partition: u32,
    id: ImageId,
    offsets: (i64, i64),
    remote: Remote,
    len: u32,
) -> ImageGrant {
    ImageGrant {
        correlation,
        partition,
        image_id: id.0,
        base_offset: offsets.0,
        next_offset: offsets.1,
        addr: remote.addr,
        rkey: remote.rkey.0,
        len,
    }
}

/// A consumer's request that cannot be met.
fn refuse_image(control: &ControlSender, correlation: u64, cause: &str) {
    control.refuse(correlation, ErrorCode::OFFSET_OUT_OF_RANGE, cause);
}
