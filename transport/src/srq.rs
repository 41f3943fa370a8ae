//! Shared receive queues: receives that several queue pairs take from.
//!
//! # Safety
//!
//! `SrqInner` owns one `ibv_srq` until it is dropped, and holds its protection domain. Queue pairs on it hold an
//! `Arc` of it, so it is destroyed after them. Every posted request's memory is in `Requests` until its
//! completion has been polled and given to a queue pair, or until `ibv_destroy_srq` has returned 0, when no queue
//! pair is left that could have taken the request; if that fails it is kept for ever. Nothing but its number is
//! stored in `srq_context`.
#![allow(unsafe_code, reason = "calls the verbs table")]

use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdma_core_bindings as ffi;

use crate::cq::CqInner;
use crate::device::Context;
use crate::error::{Error, Failed, Result};
use crate::mr::LocalBuffer;
use crate::pd::{PdInner, ProtectionDomain};
use crate::qp::{Diagnosis, RECEIVE_BIT, RECV_SGE_MAX, Released, ScatterList, TAG_SHIFT, next_tag};
use crate::work::{LOCAL_BUFFERS_MAX, Scatter, check_pd};

/// Bits of a request's number that name its slot; the bits from there to the tag count the slot's uses.
const SLOT_BITS: u32 = 20;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;
const USE_MASK: u64 = (1 << (TAG_SHIFT - SLOT_BITS)) - 1;

/// The most requests one queue can hold; adapters have 2^15 to 2^18.
const MAX_WR: u32 = 1 << SLOT_BITS;

/// Numbers shared receive queues; 0 is none.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// Receives that belong to whichever queue pair needs one next. Clones share it; several threads may post.
///
/// A queue pair created on it ([`QueuePair::create_with_srq`](crate::QueuePair::create_with_srq),
/// [`QueuePair::create_unreliable_with_srq`](crate::UnreliableQp::create_unreliable_with_srq) or
/// [`QueuePair::create_datagram_with_srq`](crate::DatagramQp::create_datagram_with_srq)) has no receive queue of its
/// own: each message that arrives takes the oldest request, and the completion says which queue pair took it. Give
/// the completion to that queue pair, and it gives the buffers back. So a server posts as many receives as messages
/// may arrive at once, not as many for each of its clients.
///
/// Posting and completing lock the queue for a moment, since threads with different queue pairs may do both at
/// once.
///
/// ```
/// use transport::connect::{ConnectConfig, Prepared};
/// use transport::{
///     CompletionQueue, Context, ProtectionDomain, SendFlags, SharedReceiveQueue, Source,
/// };
///
/// let context = Context::open(&"soft".parse()?)?;
/// let pd = ProtectionDomain::alloc(&context)?;
/// let cq = CompletionQueue::create(&context, 1024, None)?;
/// let srq = SharedReceiveQueue::create(&pd, 16, 1)?;
/// srq.post_recv(7, pd.alloc_local(64)?)?;
///
/// let config = ConnectConfig::default();
/// let server = Prepared::create_with_srq(&pd, &cq, &cq, &srq, &config)?;
/// let client = Prepared::create(&pd, &cq, &cq, &config)?;
/// let (server_end, client_end) = (server.end_point(), client.end_point());
/// let mut server = server.connect(&client_end)?;
/// let mut client = client.connect(&server_end)?;
///
/// let mut chain = client.start_send();
/// chain.send(1, Source::Inline(b"hello"), SendFlags::empty())?;
/// chain.submit()?;
///
/// let mut completions = Vec::new();
/// while cq.poll(&mut completions)? == 0 {}
/// let done = server.complete(completions.remove(0))?;
/// let buffer = done.buffer.expect("a receive gives its buffer back");
/// assert_eq!((done.wr_id, &buffer.as_slice()[..5]), (7, &b"hello"[..]));
/// assert_eq!(srq.room(), 16);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct SharedReceiveQueue(pub(crate) Arc<SrqInner>);

pub(crate) struct SrqInner {
    pub(crate) pd: Arc<PdInner>,
    srq: NonNull<ffi::ibv_srq>,
    id: u64,
    max_sge: u32,
    state: Mutex<State>,
}

struct State {
    requests: Requests,
    users: Vec<User>,
}

/// A completion queue to which queue pairs on the shared queue report their receives. Together they need as many
/// entries in it as there are requests, however many they are.
struct User {
    cq: Arc<CqInner>,
    qp_count: usize,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`).
unsafe impl Send for SrqInner {}
// SAFETY: as above; what changes is in a mutex.
unsafe impl Sync for SrqInner {}

/// A shared receive queue as the device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SrqStatus {
    /// Most requests that may wait in it; at least what was asked for.
    pub max_wr: u32,
    /// Most parts of one request; at least what was asked for.
    pub max_sge: u32,
    /// The limit that it is armed with, 0 if it is not, or not any more.
    pub limit: u32,
}

impl SharedReceiveQueue {
    /// Creates a queue for `max_wr` requests of up to `max_sge` parts.
    ///
    /// Exactly as many requests can be outstanding, even if the device would take more. A request is outstanding
    /// until its completion has been given to its queue pair, so leave room for those that are being received.
    ///
    /// # Errors
    ///
    /// [`Error::CreateSrq`] tells what is beyond the device's limits, or that it has no such queues.
    ///
    /// # References
    ///
    /// `ibv_create_srq(3)`.
    pub fn create(pd: &ProtectionDomain, max_wr: u32, max_sge: u32) -> Result<SharedReceiveQueue> {
        check_size(max_wr)?;
        let pd = Arc::clone(&pd.0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let mut init_attr = ffi::ibv_srq_init_attr {
            srq_context: ptr::without_provenance_mut(usize::try_from(id).unwrap_or(0)),
            attr: ffi::ibv_srq_attr {
                max_wr,
                max_sge,
                srq_limit: 0,
            },
        };
        // SAFETY: a live domain and well-formed attributes; the context word is only a number.
        let srq = unsafe { (pd.context.verbs.create_srq)(pd.as_ptr(), &raw mut init_attr) };
        let Some(srq) = NonNull::new(srq) else {
            let source = io::Error::last_os_error();
            let context = Context(Arc::clone(&pd.context));
            return Err(Error::CreateSrq {
                device: context.name().to_owned(),
                diagnosis: diagnose(&context, max_wr, max_sge),
                source,
            });
        };
        let state = State {
            requests: Requests::new(next_tag(), max_wr as usize),
            users: Vec::new(),
        };
        Ok(SharedReceiveQueue(Arc::new(SrqInner {
            pd,
            srq,
            id,
            max_sge,
            state: Mutex::new(state),
        })))
    }

    /// Its number, unique in this process; what [`AsyncEvent`](crate::AsyncEvent)s call it.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Posts a receive into one buffer or an array of them (none for messages without payload), for the queue
    /// pair that needs it next.
    ///
    /// The request owns the buffers until its completion, which is given to the queue pair that took it, gives
    /// them back. A request whose completion is lost keeps its buffers until the queue is destroyed: when a queue
    /// pair is destroyed or reset before its completions have been polled. To lose none, move it to ERR and go on
    /// completing until [`QpLastWqeReached`](crate::AsyncEvent::QpLastWqeReached), or for a while where the
    /// device has no such event.
    ///
    /// # Errors
    ///
    /// With the buffers: [`Error::QueueFull`] if as many as the queue holds are outstanding,
    /// [`Error::TooManySge`], [`Error::WrongProtectionDomain`], or [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_post_srq_recv(3)`.
    pub fn post_recv<B: Scatter>(&self, wr_id: u64, buffers: B) -> Result<(), Failed<B>> {
        self.0.post_recv(wr_id, buffers)
    }

    /// How many more receives fit.
    pub fn room(&self) -> usize {
        self.0.state().requests.room()
    }

    /// Arms it: when fewer than `limit` requests wait,
    /// [`SrqLimitReached`](crate::AsyncEvent::SrqLimitReached) is raised, once. 0 disarms it.
    ///
    /// Devices look when a request is taken, so a queue that is below the limit already raises the event with the
    /// next message.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if it is more than the queue holds, else [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_modify_srq(3)`.
    pub fn set_limit(&self, limit: u32) -> Result<()> {
        if limit as usize > self.0.state().requests.capacity {
            return Err(Error::Parameter {
                name: "limit",
                value: u64::from(limit),
                reason: "it may be as high as the queue holds requests, not higher",
            });
        }
        self.0.modify(0, limit, ffi::IBV_SRQ_LIMIT)
    }

    /// Changes how many requests may be outstanding; those that are stay.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] if more are outstanding, [`Error::CompletionQueueTooSmall`] for a completion queue of
    /// its queue pairs, or [`Error::Verb`], `EINVAL` also if the limit is armed with more; nothing has changed.
    /// Not every device can do it.
    ///
    /// # References
    ///
    /// `ibv_modify_srq(3)`.
    pub fn resize(&self, max_wr: u32) -> Result<()> {
        self.0.resize(max_wr)
    }

    /// Asks the device for its sizes and limit.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_query_srq(3)`.
    pub fn query(&self) -> Result<SrqStatus> {
        self.0.query()
    }
}

impl fmt::Debug for SharedReceiveQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedReceiveQueue")
            .field("id", &self.0.id)
            .field("device", &self.0.pd.context.name())
            .finish_non_exhaustive()
    }
}

impl SrqInner {
    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_srq {
        self.srq.as_ptr()
    }

    /// Promises the queue's completions entries in `cq`, for one more queue pair that reports to it.
    pub(crate) fn attach(&self, cq: &Arc<CqInner>) -> Result<()> {
        let mut state = self.state();
        let capacity = state.requests.capacity;
        if let Some(user) = state.users.iter_mut().find(|user| user.is(cq)) {
            user.qp_count += 1;
            return Ok(());
        }
        cq.reserve(capacity)?;
        state.users.push(User {
            cq: Arc::clone(cq),
            qp_count: 1,
        });
        Ok(())
    }

    /// One queue pair less reports to `cq`.
    pub(crate) fn detach(&self, cq: &Arc<CqInner>) {
        let mut state = self.state();
        let capacity = state.requests.capacity;
        state.users.retain_mut(|user| {
            if !user.is(cq) {
                return true;
            }
            user.qp_count -= 1;
            if user.qp_count == 0 {
                cq.release(capacity);
            }
            user.qp_count > 0
        });
    }

    /// Releases the request `number`, if it is outstanding.
    pub(crate) fn release(&self, number: u64) -> Option<Released> {
        self.state().requests.release(number)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post_recv<B: Scatter>(&self, wr_id: u64, buffers: B) -> Result<(), Failed<B>> {
        let mut state = self.state();
        let requests = &mut state.requests;
        let mut list = match self.check_recv(requests, &buffers) {
            Ok(list) => list,
            Err(error) => return Err(Failed::new(buffers, error)),
        };
        let mut wr = list.recv_wr(requests.next_number());
        let mut bad_wr = ptr::null_mut();
        // SAFETY: a live queue and one well-formed request, which the call copies. The memory it names belongs to
        // `buffers`, which either moves into `requests` below, before anybody can give a completion in, because
        // the state is locked, or was not accepted.
        let errno = unsafe { ffi::ibv_post_srq_recv(self.as_ptr(), &raw mut wr, &raw mut bad_wr) };
        if let Err(error) = self.pd.context.check("ibv_post_srq_recv", errno) {
            return Err(Failed::new(buffers, error));
        }
        requests.insert(wr_id, buffers.into_buffers());
        Ok(())
    }

    fn check_recv(&self, requests: &Requests, buffers: &impl Scatter) -> Result<ScatterList> {
        if requests.room() == 0 {
            return Err(Error::QueueFull {
                queue: "shared receive",
                capacity: requests.capacity,
                drains: true,
            });
        }
        let buffers = buffers.buffers();
        let max = RECV_SGE_MAX.min(self.max_sge as usize);
        if buffers.len() > max {
            let count = buffers.len();
            return Err(Error::TooManySge { count, max });
        }
        for buffer in buffers {
            check_pd(&self.pd, buffer.pd())?;
        }
        ScatterList::new(buffers)
    }

    fn resize(&self, max_wr: u32) -> Result<()> {
        check_size(max_wr)?;
        let mut state = self.state();
        let (old, new) = (state.requests.capacity, max_wr as usize);
        if state.requests.outstanding() > new {
            return Err(Error::Parameter {
                name: "max_wr",
                value: u64::from(max_wr),
                reason: "more requests are outstanding; complete some first",
            });
        }
        let (more, less) = (new.saturating_sub(old), old.saturating_sub(new));
        let mut result = Ok(());
        let mut reserved = 0;
        for user in &state.users {
            result = user.cq.reserve(more);
            if result.is_err() {
                break;
            }
            reserved += 1;
        }
        let result = result.and_then(|()| self.modify(max_wr, 0, ffi::IBV_SRQ_MAX_WR));
        // What was promised for nothing, or is not needed any more.
        let (users, count) = match result {
            Ok(()) => (&state.users[..], less),
            Err(_) => (&state.users[..reserved], more),
        };
        users.iter().for_each(|user| user.cq.release(count));
        result?;
        state.requests.resize(new);
        Ok(())
    }

    fn modify(&self, max_wr: u32, srq_limit: u32, mask: u32) -> Result<()> {
        let mut attr = ffi::ibv_srq_attr {
            max_wr,
            max_sge: 0,
            srq_limit,
        };
        let context = &self.pd.context;
        // SAFETY: a live queue; the attributes are plain values.
        let errno =
            unsafe { (context.verbs.modify_srq)(self.as_ptr(), &raw mut attr, mask.cast_signed()) };
        context.check("ibv_modify_srq", errno)
    }

    fn query(&self) -> Result<SrqStatus> {
        let mut attr = ffi::ibv_srq_attr::default();
        let context = &self.pd.context;
        // SAFETY: a live queue and a place for the result.
        let errno = unsafe { (context.verbs.query_srq)(self.as_ptr(), &raw mut attr) };
        context.check("ibv_query_srq", errno)?;
        Ok(SrqStatus {
            max_wr: attr.max_wr,
            max_sge: attr.max_sge,
            limit: attr.srq_limit,
        })
    }
}

impl User {
    fn is(&self, cq: &Arc<CqInner>) -> bool {
        Arc::ptr_eq(&self.cq, cq)
    }
}

impl Drop for SrqInner {
    fn drop(&mut self) {
        let context = &self.pd.context;
        let destroyed = context.destroy_dropped(|| {
            // SAFETY: the queue pairs on it held an `Arc` of it, and its events are acknowledged as soon as they
            // are read, so nobody uses it.
            let errno = unsafe { (context.verbs.destroy_srq)(self.as_ptr()) };
            context.check_destroyed("ibv_destroy_srq", errno)
        });
        if !destroyed {
            self.state().requests.leak();
            std::mem::forget(Arc::clone(&self.pd));
        }
    }
}

/// The outstanding requests. They complete in any order, since each queue pair has its own pace, so each has a
/// slot of its own, which its number names:
///
/// ```text
///   63       62 ..... 40   39 ............ 20   19 ... 0
///   receive  tag of queue  uses of the slot     slot
/// ```
///
/// A completion is believed only if its number is that of the slot's present use.
struct Requests {
    slots: Vec<Slot>,
    /// Slots without a request; the last is used next.
    free: Vec<u32>,
    capacity: usize,
    tag: u64,
}

struct Slot {
    uses: u64,
    posted: Option<Released>,
}

impl Requests {
    /// Room for `capacity` requests; nothing is allocated later but by `resize`.
    fn new(tag: u64, capacity: usize) -> Requests {
        let mut requests = Requests {
            slots: Vec::new(),
            free: Vec::new(),
            capacity: 0,
            tag: (tag << TAG_SHIFT) & !RECEIVE_BIT,
        };
        requests.resize(capacity);
        requests
    }

    /// Allows `capacity` requests, not less than are outstanding.
    fn resize(&mut self, capacity: usize) {
        for index in self.slots.len()..capacity {
            let posted = None;
            self.slots.push(Slot { uses: 0, posted });
            // A slot that is put back finds room.
            self.free.reserve(self.slots.len() - self.free.len());
            self.free
                .push(u32::try_from(index).expect("at most MAX_WR slots"));
        }
        self.capacity = capacity;
    }

    fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn room(&self) -> usize {
        self.capacity - self.outstanding()
    }

    /// The number that the next request will have; the caller has checked that there is room.
    fn next_number(&self) -> u64 {
        let index = *self.free.last().expect("there is room");
        self.number(index)
    }

    fn number(&self, index: u32) -> u64 {
        let uses = self.slots[index as usize].uses & USE_MASK;
        RECEIVE_BIT | self.tag | uses << SLOT_BITS | u64::from(index)
    }

    /// Adds the request of `next_number`.
    fn insert(&mut self, wr_id: u64, buffers: impl Iterator<Item = LocalBuffer>) {
        let index = self.free.pop().expect("there is room");
        let mut posted = Released {
            wr_id,
            buffers: [const { None }; LOCAL_BUFFERS_MAX],
            window: None,
        };
        for (place, buffer) in posted.buffers.iter_mut().zip(buffers) {
            *place = Some(buffer);
        }
        self.slots[index as usize].posted = Some(posted);
    }

    fn release(&mut self, number: u64) -> Option<Released> {
        let index = u32::try_from(number & SLOT_MASK).expect("20 bits");
        self.slots.get(index as usize)?;
        if self.number(index) != number {
            return None;
        }
        let slot = &mut self.slots[index as usize];
        let posted = slot.posted.take()?;
        slot.uses += 1;
        self.free.push(index);
        Some(posted)
    }

    /// Gives up ownership without freeing, because the device may still use it.
    fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.slots));
    }
}

fn check_size(max_wr: u32) -> Result<()> {
    if (1..=MAX_WR).contains(&max_wr) {
        return Ok(());
    }
    Err(Error::Parameter {
        name: "max_wr",
        value: u64::from(max_wr),
        reason: "1 to 2^20 are",
    })
}

/// What the device has against a queue of this size.
fn diagnose(context: &Context, max_wr: u32, max_sge: u32) -> Diagnosis {
    let mut diagnosis = Diagnosis::default();
    let Ok(limits) = context.attr() else {
        return diagnosis;
    };
    if limits.max_srq == 0 {
        diagnosis.add("the device has no shared receive queues".to_owned());
        return diagnosis;
    }
    for (name, asked, limit) in [
        ("max_wr", max_wr, limits.max_srq_wr),
        ("max_sge", max_sge, limits.max_srq_sge),
    ] {
        if asked > limit {
            diagnosis.add(format!("{name} {asked} exceeds the device's limit {limit}"));
        }
    }
    diagnosis
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn post(requests: &mut Requests, wr_id: u64) -> u64 {
        let number = requests.next_number();
        requests.insert(wr_id, std::iter::empty());
        number
    }

    #[test]
    fn a_number_releases_its_request_once() {
        let mut requests = Requests::new(5, 2);
        let (one, two) = (post(&mut requests, 1), post(&mut requests, 2));
        assert_eq!(requests.room(), 0);
        assert_eq!(requests.release(one).unwrap().wr_id, 1);
        assert!(requests.release(one).is_none(), "released before");
        let three = post(&mut requests, 3);
        assert!(requests.release(one).is_none(), "the slot's former use");
        assert_ne!(one, three);
        for foreign in [0, u64::MAX, two ^ RECEIVE_BIT, two ^ (1 << TAG_SHIFT)] {
            assert!(requests.release(foreign).is_none(), "{foreign:#x}");
        }
        assert_eq!(requests.release(three).unwrap().wr_id, 3);
        assert_eq!(requests.release(two).unwrap().wr_id, 2);
        assert_eq!(requests.room(), 2);
    }

    #[test]
    fn the_count_of_uses_wraps() {
        let mut requests = Requests::new(5, 1);
        requests.slots[0].uses = USE_MASK;
        let last = post(&mut requests, 1);
        assert!(requests.release(last).is_some());
        let first = post(&mut requests, 2);
        assert_eq!(first & (USE_MASK << SLOT_BITS), 0);
        assert_eq!(requests.release(first).unwrap().wr_id, 2);
    }

    proptest! {
        /// Against a map from number to wr_id, which is what the slots stand for.
        #[test]
        fn behaves_as_a_map(steps in proptest::collection::vec((0..5_u8, 0..12_usize), 0..200)) {
            let mut requests = Requests::new(9, 4);
            let mut map = HashMap::new();
            let mut order = Vec::new();
            let mut capacity = 4;
            for (wr_id, (kind, value)) in (0..).zip(steps) {
                match kind {
                    0 if value >= map.len() => {
                        requests.resize(value);
                        capacity = value;
                    }
                    1 | 2 if map.len() < capacity => {
                        let number = post(&mut requests, wr_id);
                        prop_assert!(map.insert(number, wr_id).is_none());
                        order.push(number);
                    }
                    3 | 4 if value < order.len() => {
                        let number = order[value];
                        let released = requests.release(number).map(|posted| posted.wr_id);
                        prop_assert_eq!(released, map.remove(&number));
                    }
                    _ => {}
                }
                prop_assert_eq!(requests.outstanding(), map.len());
                prop_assert_eq!(requests.room(), capacity - map.len());
            }
        }
    }
}
