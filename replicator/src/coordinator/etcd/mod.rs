//! A coordinator in etcd: one key per partition, one per node that is alive.
//!
//! ```text
//! /farlog/CLUSTER/partitions/TOPIC/NUMBER   {"version":1,"leader":1,"leader_epoch":5,"isr":[..],"replicas":[..]}
//! /farlog/CLUSTER/nodes/ID                  {"memory_id":"..","incarnation":..,"address":".."}   under a lease
//! ```
//!
//! - A proposal is one transaction: if `mod_revision` is the expected one, put the new value, else get
//!   what is there. The epoch is in the value; `mod_revision` is the comparison and nothing more.
//! - An answer that is lost leaves the proposal undecided: it may even be carried out later. It is decided
//!   by a second transaction, which puts the present value again if `mod_revision` is still the expected
//!   one. Whatever comes of that, the revision is another one afterwards, and the proposal is void or
//!   done.
//! - One watch on the cluster's prefix tells changes and nodes. It resumes behind the last revision seen; if
//!   that has been compacted, everything is read again.
//! - The lease is kept alive only while [`Coordinator::beat`] is called, so a node that hangs loses it. It
//!   counts as lost here when the last keep-alive that was answered is older than its time to live; etcd
//!   counts from when it received that one, so it is never later there. Asked for one second, etcd grants
//!   two with its usual election timeout.
//! - The first node to come creates the partitions' keys, unless they exist. Replicas in a key are those
//!   that count; the cluster file's are what a new key begins with.
//!
//! All of it runs on a thread of its own, which also calls the sink. What etcd costs: a keep-alive per node
//! in a third of the lease's time, a write per election or change of an in-sync set, nothing per append.

mod links;
mod session;
mod watch;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Sender, bounded};
use etcd_client::{
    Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{LocalSet, spawn_local};

use super::{
    Agreed, Answer, Coordinator, CoordinatorError, Event, Member, PartitionState, Registration,
    state,
};
use links::{Fault, Links};
use session::Session;
use watch::Watch;

/// How long etcd may take to answer one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the first contact may take before a start fails.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two attempts: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Transactions under way at once.
const TRANSACTIONS_MAX: usize = 128;

/// How to reach etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// End points of one etcd cluster, such as `http://127.0.0.1:2379`.
    pub end_points: Vec<String>,
    /// Time to live of the node's lease; etcd takes whole seconds, and at least its own minimum.
    pub lease_ttl: Duration,
}

impl EtcdConfig {
    /// The end points, and a lease of one second.
    pub fn new(end_points: Vec<String>) -> Self {
        Self {
            end_points,
            lease_ttl: Duration::from_secs(1),
        }
    }

    /// Whether the end points can be end points.
    ///
    /// # Errors
    ///
    /// [`CoordinatorError::EndPoint`] names the first that cannot.
    pub fn check(&self) -> Result<(), CoordinatorError> {
        self.end_points.iter().try_for_each(|url| check_url(url))
    }
}

/// See the [module](self). Dropping it ends the session at once.
#[derive(Debug)]
pub struct EtcdCoordinator {
    /// Holds one proposal for each partition at most, since a node awaits the answer before the next.
    proposals: Option<mpsc::UnboundedSender<Proposal>>,
    beat: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Proposal {
    partition: usize,
    ticket: u64,
    expected_revision: i64,
    state: PartitionState,
}

impl EtcdCoordinator {
    /// Registers the node, creates the partitions' keys that do not exist, and tells `sink` each
    /// partition's state and which nodes are alive; then it goes on telling changes.
    ///
    /// # Errors
    ///
    /// [`CoordinatorError::EndPoint`] for a URL that cannot be used, [`CoordinatorError::Etcd`] if etcd does
    /// not answer within 10 s or another process has registered as this node,
    /// [`CoordinatorError::Value`] if a key holds what is no state.
    pub fn start(
        config: &EtcdConfig,
        registration: Registration,
        sink: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, CoordinatorError> {
        config
            .end_points
            .iter()
            .try_for_each(|url| check_url(url))?;
        let config = config.clone();
        let beat = Arc::new(AtomicBool::new(true));
        let (proposals, queue) = mpsc::unbounded_channel();
        let (started, start) = bounded(1);
        let beaten = Arc::clone(&beat);
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => {
                    // `start` waits for it.
                    let _ = started.send(Err(CoordinatorError::Thread(error)));
                    return;
                }
            };
            let tasks = LocalSet::new();
            let run = run(config, registration, beaten, queue, started, Box::new(sink));
            tasks.block_on(&runtime, run);
        };
        let thread = thread::Builder::new()
            .name("coordinator".to_owned())
            .spawn(run)
            .map_err(CoordinatorError::Thread)?;
        let coordinator = Self {
            proposals: Some(proposals),
            beat,
            thread: Some(thread),
        };
        // Everything that the thread does until then has a time-out.
        let started = start.recv().unwrap_or_else(|_| {
            let cause = "the coordinator's thread has ended";
            Err(CoordinatorError::Etcd(cause.to_owned()))
        });
        started.map(|()| coordinator)
    }
}

impl Coordinator for EtcdCoordinator {
    fn propose(
        &mut self,
        partition: usize,
        ticket: u64,
        expected_revision: i64,
        state: PartitionState,
    ) {
        let proposal = Proposal {
            partition,
            ticket,
            expected_revision,
            state,
        };
        // Without the thread there is no answer, and the sink's owner has seen it go.
        if let Some(proposals) = &self.proposals {
            let _ = proposals.send(proposal);
        }
    }

    fn beat(&mut self) {
        // Only the flag matters: no other memory is published by it.
        self.beat.store(true, Ordering::Relaxed);
    }
}

impl Drop for EtcdCoordinator {
    fn drop(&mut self) {
        self.proposals = None;
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the coordinator's thread has panicked");
        }
    }
}

fn check_url(url: &str) -> Result<(), CoordinatorError> {
    let refused = |cause: &str| CoordinatorError::EndPoint {
        url: url.to_owned(),
        cause: cause.to_owned(),
    };
    let authority = match url.split_once("://") {
        Some(("http", authority)) => authority,
        Some(("https", _)) => return Err(refused("this build speaks no TLS to etcd: use http://")),
        _ => return Err(refused("it does not begin with http://")),
    };
    let port = authority.trim_end_matches('/').rsplit_once(':');
    let is_valid = port.is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if is_valid {
        Ok(())
    } else {
        Err(refused("it is not http://HOST:PORT"))
    }
}

async fn run(
    config: EtcdConfig,
    registration: Registration,
    beat: Arc<AtomicBool>,
    mut queue: mpsc::UnboundedReceiver<Proposal>,
    started: Sender<Result<(), CoordinatorError>>,
    sink: Box<dyn FnMut(Event)>,
) {
    let begun = async {
        let links = Links::open(&config.end_points).await?;
        let seat = Rc::new(Seat {
            links,
            prefix: format!("/farlog/{}/", registration.cluster),
            index: registration
                .partitions
                .iter()
                .enumerate()
                .map(|(index, key)| ((key.topic.clone(), key.number), index))
                .collect(),
            told: RefCell::new(Told {
                sink,
                states: vec![None; registration.partitions.len()],
            }),
            registration,
            beat,
            lease: Cell::new(0),
        });
        let session = Session::begin(&seat, &config).await?;
        let watch = Watch::begin(&seat).await?;
        Ok((seat, session, watch))
    };
    let (seat, session, watch) = match begun.await {
        Ok(begun) => begun,
        Err(error) => {
            // `start` waits for it.
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(()));
    spawn_local(session.keep());
    spawn_local(watch.follow());
    let room = Rc::new(Semaphore::new(TRANSACTIONS_MAX));
    while let Some(proposal) = queue.recv().await {
        let (seat, room) = (Rc::clone(&seat), Rc::clone(&room));
        spawn_local(async move {
            let _permit = room.acquire().await.expect("it is never closed");
            seat.propose(proposal).await;
        });
    }
    // Others need not wait until the lease has run out.
    let lease = seat.lease.get();
    let revoke = async |mut client: etcd_client::Client| client.lease_revoke(lease).await;
    if let Err(fault) = seat
        .links
        .call("end the lease", REQUEST_TIMEOUT, revoke)
        .await
    {
        tracing::warn!(%fault, "others see this node leave only when its lease has run out");
    }
}

/// What all tasks of the thread share.
struct Seat {
    links: Links,
    prefix: String,
    registration: Registration,
    /// Each partition's index, by topic and number.
    index: HashMap<(String, u32), usize>,
    told: RefCell<Told>,
    beat: Arc<AtomicBool>,
    /// The lease that the node's key is under.
    lease: Cell<i64>,
}

/// The sink, and the newest state that it has been told of each partition.
struct Told {
    sink: Box<dyn FnMut(Event)>,
    states: Vec<Option<Agreed>>,
}

impl Seat {
    fn partition_key(&self, partition: usize) -> String {
        let key = &self.registration.partitions[partition];
        format!("{}partitions/{}/{}", self.prefix, key.topic, key.number)
    }

    fn node_key(&self) -> String {
        format!("{}nodes/{}", self.prefix, self.registration.member.node)
    }

    /// Tells a state, unless a newer one has been told.
    fn changed(&self, partition: usize, agreed: Agreed) {
        let told = &mut *self.told.borrow_mut();
        let newest = &mut told.states[partition];
        if newest
            .as_ref()
            .is_some_and(|told| told.revision > agreed.revision)
        {
            return;
        }
        *newest = Some(agreed.clone());
        (told.sink)(Event::Changed { partition, agreed });
    }

    fn tell(&self, event: Event) {
        (self.told.borrow_mut().sink)(event);
    }

    fn answer(&self, partition: usize, ticket: u64, answer: Answer) {
        let told = &mut *self.told.borrow_mut();
        if let Answer::Conflict(agreed) = &answer {
            // From now on nothing older may be told.
            told.states[partition] = Some(agreed.clone());
        }
        (told.sink)(Event::Answered {
            partition,
            ticket,
            answer,
        });
    }

    async fn propose(&self, proposal: Proposal) {
        let Proposal {
            partition,
            ticket,
            expected_revision,
            state,
        } = proposal;
        let key = self.partition_key(partition);
        let put = TxnOp::put(key.clone(), state::encode(&state), None);
        match self.compare(&key, expected_revision, put).await {
            Ok(agreed) if agreed.is_ours => {
                let revision = agreed.agreed.revision;
                self.answer(partition, ticket, Answer::Accepted { revision });
            }
            Ok(agreed) => self.answer(partition, ticket, Answer::Conflict(agreed.agreed)),
            Err(fault) => {
                let cause = fault.to_string();
                tracing::warn!(%key, %cause, "a proposal is undecided");
                self.answer(partition, ticket, Answer::Unknown { cause });
                self.decide(partition, &key, expected_revision).await;
            }
        }
    }

    /// Sees to it that the key's revision is another one than `expected_revision`, so that a transaction
    /// which compares with that is carried out or void, and tells what is there.
    async fn decide(&self, partition: usize, key: &str, expected_revision: i64) {
        let mut back_off = BackOff::new();
        loop {
            back_off.wait().await;
            let keep = Some(PutOptions::new().with_ignore_value());
            let put = TxnOp::put(key, "", keep);
            match self.compare(key, expected_revision, put).await {
                Ok(decided) => return self.changed(partition, decided.agreed),
                Err(fault) => back_off.report(&fault, "a proposal is still undecided"),
            }
        }
    }

    /// Puts if the key's revision is the expected one, and gets what is there then.
    async fn compare(
        &self,
        key: &str,
        expected_revision: i64,
        put: TxnOp,
    ) -> Result<Compared, Fault> {
        let is_unchanged = Compare::mod_revision(key, CompareOp::Equal, expected_revision);
        let get = || TxnOp::get(key, None);
        let txn = Txn::new()
            .when([is_unchanged])
            .and_then([put, get()])
            .or_else([get()]);
        let send = async |client: etcd_client::Client| client.kv_client().txn(txn).await;
        let answer = self
            .links
            .call("change a partition", REQUEST_TIMEOUT, send)
            .await?;
        let found = answer.op_responses().into_iter().find_map(|op| match op {
            TxnOpResponse::Get(get) => get.kvs().first().cloned(),
            _ => None,
        });
        let Some(found) = found else {
            return Err(Fault::new(format!(
                "etcd key {key} has been deleted; put it back: {}",
                self.remedy(key)
            )));
        };
        let agreed = decode(&found).map_err(|error| Fault::new(error.to_string()))?;
        Ok(Compared {
            is_ours: answer.succeeded(),
            agreed,
        })
    }

    /// The command that puts back what was last seen of a deleted key.
    fn remedy(&self, key: &str) -> String {
        let told = self.told.borrow();
        let mut states = told.states.iter().enumerate();
        let newest = states.find(|(partition, _)| self.partition_key(*partition) == key);
        match newest {
            Some((_, Some(agreed))) => {
                format!("etcdctl put {key} '{}'", state::encode(&agreed.state))
            }
            _ => format!("restart a node that reads {key}"),
        }
    }

    /// Reads everything below the prefix: the revision that it was read at, and the keys.
    async fn read_all(&self) -> Result<(i64, Vec<KeyValue>), Fault> {
        let get = async |client: etcd_client::Client| {
            let mut kv = client.kv_client().max_decoding_message_size(usize::MAX);
            let options = GetOptions::new().with_prefix();
            kv.get(self.prefix.as_str(), Some(options)).await
        };
        let mut answer = self
            .links
            .call("read all keys", REQUEST_TIMEOUT, get)
            .await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok((revision, answer.take_kvs()))
    }
}

struct Compared {
    is_ours: bool,
    agreed: Agreed,
}

fn decode(kv: &KeyValue) -> Result<Agreed, CoordinatorError> {
    let state = state::decode(kv.value()).map_err(|cause| CoordinatorError::Value {
        key: String::from_utf8_lossy(kv.key()).into_owned(),
        cause,
    })?;
    Ok(Agreed {
        state,
        revision: kv.mod_revision(),
    })
}

/// Waits longer after each failure, and logs the first of a row.
struct BackOff {
    delay: Duration,
    is_reported: bool,
}

impl BackOff {
    fn new() -> Self {
        Self {
            delay: BACK_OFF.0,
            is_reported: false,
        }
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.delay).await;
        self.delay = (self.delay * 2).min(BACK_OFF.1);
    }

    fn report(&mut self, fault: &Fault, what: &str) {
        if !std::mem::replace(&mut self.is_reported, true) {
            tracing::warn!(%fault, "{what}; it is tried again");
        }
    }
}

#[cfg(test)]
mod tests;
