//! The node's lease, and its key under it.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::{Client, PutOptions};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    BACK_OFF, BackOff, CoordinatorError, EtcdConfig, Event, Fault, Member, REQUEST_TIMEOUT,
    START_TIMEOUT, Seat,
};
use crate::coordinator::MemoryId;

/// Keep-alives in the time to live of a lease, so that two may be lost.
const KEEP_ALIVES: u32 = 3;
/// How often a node that does not beat is looked at.
const BEAT_INTERVAL: Duration = Duration::from_millis(50);

/// The value of a node's key.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NodeValue {
    memory_id: MemoryId,
    incarnation: u64,
    address: String,
}

impl NodeValue {
    pub(super) fn member(&self, node: u32) -> Member {
        Member {
            node,
            memory_id: self.memory_id,
        }
    }
}

/// A lease that the node's key is under.
pub(super) struct Session {
    seat: Rc<Seat>,
    ask_ttl: i64,
    lease: Lease,
}

struct Lease {
    id: i64,
    ttl: Duration,
    /// It may be gone after this.
    valid_until: Instant,
}

impl Session {
    /// Registers the node; tries again until the start's time is up.
    pub(super) async fn begin(
        seat: &Rc<Seat>,
        config: &EtcdConfig,
    ) -> Result<Self, CoordinatorError> {
        let ask_ttl = i64::try_from(config.lease_ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        let deadline = Instant::now() + START_TIMEOUT;
        let mut back_off = BackOff::new();
        let lease = loop {
            match register(seat, ask_ttl).await {
                Ok(lease) => break lease,
                Err(fault) if Instant::now() >= deadline => return Err(fault.into()),
                Err(fault) => back_off.report(&fault, "the node cannot register"),
            }
            back_off.wait().await;
        };
        Ok(Self {
            seat: Rc::clone(seat),
            ask_ttl,
            lease,
        })
    }

    /// Keeps the session, and begins another one whenever it has ended.
    pub(super) async fn keep(mut self) {
        loop {
            let cause = self.hold().await;
            tracing::warn!(%cause, "the session with etcd is lost");
            self.seat.tell(Event::SessionLost { cause });
            self.lease = self.renew().await;
            tracing::info!("the session with etcd is back");
            self.seat.tell(Event::SessionBack);
        }
    }

    /// Keeps the lease alive as long as the node beats and etcd answers; returns why it is lost.
    async fn hold(&mut self) -> String {
        let mut cause = "the node's main loop makes no progress".to_owned();
        let mut next = Instant::now() + self.lease.ttl / KEEP_ALIVES;
        loop {
            sleep_until(next.min(self.lease.valid_until)).await;
            if Instant::now() >= self.lease.valid_until {
                return cause;
            }
            if !self.has_beaten() {
                cause = "the node's main loop makes no progress".to_owned();
                next = Instant::now() + BEAT_INTERVAL;
                continue;
            }
            let sent = Instant::now();
            match self.keep_alive(self.lease.valid_until - sent).await {
                Ok(true) => {
                    self.lease.valid_until = sent + self.lease.ttl;
                    next = sent + self.lease.ttl / KEEP_ALIVES;
                }
                Ok(false) => return "etcd has let the lease expire".to_owned(),
                Err(fault) => {
                    cause = fault.to_string();
                    next = Instant::now() + BACK_OFF.0;
                    // The beat was not used.
                    self.seat.beat.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    /// Whether the lease still exists.
    async fn keep_alive(&self, timeout: Duration) -> Result<bool, Fault> {
        let id = self.lease.id;
        let send = async |mut client: Client| match client.lease_keep_alive(id).await {
            Ok(_) => Ok(true),
            // So the client says that the time to live is 0.
            Err(etcd_client::Error::LeaseKeepAliveError(_)) => Ok(false),
            Err(error) => Err(error),
        };
        let timeout = timeout.min(REQUEST_TIMEOUT);
        self.seat.links.call("keep the lease", timeout, send).await
    }

    async fn renew(&self) -> Lease {
        let mut back_off = BackOff::new();
        loop {
            while !self.has_beaten() {
                sleep(BEAT_INTERVAL).await;
            }
            match register(&self.seat, self.ask_ttl).await {
                Ok(lease) => return lease,
                Err(fault) => back_off.report(&fault, "there is no session with etcd"),
            }
            back_off.wait().await;
        }
    }

    /// Whether the node has beaten since the last look.
    fn has_beaten(&self) -> bool {
        self.seat.beat.swap(false, Ordering::Relaxed)
    }
}

/// Takes a lease and puts the node's key under it.
async fn register(seat: &Seat, ask_ttl: i64) -> Result<Lease, Fault> {
    let (key, ours) = (seat.node_key(), &seat.registration);
    let value = NodeValue {
        memory_id: ours.member.memory_id,
        incarnation: ours.incarnation,
        address: ours.address.clone(),
    };
    let get = async |mut client: Client| client.get(key.as_str(), None).await;
    let found = seat
        .links
        .call("read the node's key", REQUEST_TIMEOUT, get)
        .await?;
    let present: Option<NodeValue> = found
        .kvs()
        .first()
        .and_then(|kv| serde_json::from_slice(kv.value()).ok());
    // A key of an earlier start of ours may still have a lease for a moment, and is ours to replace.
    if let Some(other) = present.filter(|other| other.incarnation > ours.incarnation) {
        return Err(Fault::new(format!(
            "node {} of cluster `{}` has registered from another process with address {}: stop that one, or give \
             this one another id",
            ours.member.node, ours.cluster, other.address
        )));
    }
    let asked = Instant::now();
    let grant = async |mut client: Client| client.lease_grant(ask_ttl, None).await;
    let granted = seat
        .links
        .call("get a lease", REQUEST_TIMEOUT, grant)
        .await?;
    let text = serde_json::to_string(&value).expect("it has only numbers and strings");
    let put = async |mut client: Client| {
        let options = PutOptions::new().with_lease(granted.id());
        client.put(key.as_str(), text, Some(options)).await
    };
    seat.links
        .call("put the node's key", REQUEST_TIMEOUT, put)
        .await?;
    seat.lease.set(granted.id());
    let ttl = Duration::from_secs(granted.ttl().unsigned_abs());
    Ok(Lease {
        id: granted.id(),
        ttl,
        valid_until: asked + ttl,
    })
}
