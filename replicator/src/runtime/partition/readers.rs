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

/// Images that consumers asked for, so that they stay readable: by connection.
#[derive(Debug, Default)]
pub(super) struct Readers {
    waiting: HashMap<u64, ControlSender>,
    pub(super) granted: HashMap<u64, Arc<Image>>,
    /// The files hold what is about to be cut: nothing of them is granted.
    pub(super) is_closed: bool,
}

/// Why no image is granted for the moment.
const CUT: &str = "the log is being cut to its leader's";

impl Held {
    /// A consumer asks for the image that holds an offset: one in memory, or a copy of file bytes.
    pub(in crate::runtime) fn image_asked(
        &mut self,
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
                    let old = self.readers.granted.insert(connection, image);
                    jobs.helper.extend(old.map(HelperJob::Drop));
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
        request: ColdRequest,
        loaded: Loaded,
        jobs: &mut Jobs,
    ) {
        let readers = &mut self.readers;
        let Some(control) = readers.waiting.remove(&request.connection) else {
            jobs.helper
                .extend(loaded.ok().map(|(image, _)| HelperJob::Drop(image)));
            return;
        };
        let loaded = match loaded {
            // Its bytes may be those that the cut removes.
            Ok((image, _)) if readers.is_closed => {
                jobs.helper.push(HelperJob::Drop(image));
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
                let old = readers.granted.insert(request.connection, image);
                jobs.helper.extend(old.map(HelperJob::Drop));
            }
            Err(cause) => refuse_image(&control, request.correlation, &cause),
        }
    }

    /// Whether a connection has, or waits for, an image.
    pub(in crate::runtime) fn is_reader(&self, connection: u64) -> bool {
        let readers = &self.readers;
        readers.waiting.contains_key(&connection) || readers.granted.contains_key(&connection)
    }

    pub(in crate::runtime) fn disconnected(&mut self, connection: u64, jobs: &mut Jobs) {
        let readers = &mut self.readers;
        readers.waiting.remove(&connection);
        jobs.helper
            .extend(readers.granted.remove(&connection).map(HelperJob::Drop));
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
