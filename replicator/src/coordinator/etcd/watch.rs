//! What changes below the cluster's prefix.

use std::collections::BTreeMap;
use std::rc::Rc;

use etcd_client::{
    Client, Compare, CompareOp, EventType, KeyValue, Txn, TxnOp, WatchOptions, WatchStream,
};

use super::session::NodeValue;
use super::{
    BackOff, CoordinatorError, Event, Fault, Member, REQUEST_TIMEOUT, Seat, decode, state,
};

/// Keys created in one transaction; etcd takes 128 operations by default.
const CREATE_MAX: usize = 100;

/// The watch, and what it goes on from.
pub(super) struct Watch {
    seat: Rc<Seat>,
    /// The first revision that has not been seen.
    next: i64,
    live: BTreeMap<u32, Member>,
}

/// What a key below the prefix is about.
enum Subject {
    Partition(usize),
    Node(u32),
}

impl Watch {
    /// Creates the partitions' keys that do not exist, and tells everything that there is.
    pub(super) async fn begin(seat: &Rc<Seat>) -> Result<Self, CoordinatorError> {
        let mut watch = Self {
            seat: Rc::clone(seat),
            next: 0,
            live: BTreeMap::new(),
        };
        watch.create_missing().await?;
        let (revision, kvs) = seat.read_all().await?;
        for kv in kvs.iter().filter(|kv| watch.partition_of(kv).is_some()) {
            decode(kv)?;
        }
        watch.take_all(revision, &kvs);
        Ok(watch)
    }

    async fn create_missing(&self) -> Result<(), Fault> {
        let (_, kvs) = self.seat.read_all().await?;
        let mut exists = vec![false; self.seat.registration.partitions.len()];
        for partition in kvs.iter().filter_map(|kv| self.partition_of(kv)) {
            exists[partition] = true;
        }
        let missing: Vec<usize> = (0..exists.len()).filter(|&p| !exists[p]).collect();
        for some in missing.chunks(CREATE_MAX) {
            // Another node may do the same at this moment: each key is created by one of us.
            let creates: Vec<TxnOp> = some.iter().map(|&p| self.create(p)).collect();
            let txn = Txn::new().and_then(creates);
            let send = async |mut client: Client| client.txn(txn).await;
            let call = self.seat.links.call("create keys", REQUEST_TIMEOUT, send);
            call.await?;
        }
        Ok(())
    }

    fn create(&self, partition: usize) -> TxnOp {
        let key = self.seat.partition_key(partition);
        let state = self.seat.registration.partitions[partition].offline();
        let is_absent = Compare::create_revision(key.as_str(), CompareOp::Equal, 0);
        let put = TxnOp::put(key, state::encode(&state), None);
        TxnOp::txn(Txn::new().when([is_absent]).and_then([put]))
    }

    /// Watches for ever.
    pub(super) async fn follow(mut self) {
        let mut back_off = BackOff::new();
        loop {
            let seen = self.next;
            let fault = match self.watch().await {
                Ok(()) => match self.read_again().await {
                    Ok(()) => continue,
                    Err(fault) => fault,
                },
                Err(fault) => fault,
            };
            if self.next != seen {
                back_off = BackOff::new();
            }
            back_off.report(&fault, "the watch has ended");
            back_off.wait().await;
        }
    }

    /// Watches from where the last watch ended; returns once that has been compacted.
    async fn watch(&mut self) -> Result<(), Fault> {
        let (prefix, next) = (self.seat.prefix.clone(), self.next);
        let begin = async |client: Client| {
            let options = WatchOptions::new().with_prefix().with_start_revision(next);
            let mut watch = client.watch_client().max_decoding_message_size(usize::MAX);
            watch.watch(prefix, Some(options)).await
        };
        let mut stream: WatchStream = self
            .seat
            .links
            .call("watch", REQUEST_TIMEOUT, begin)
            .await?;
        let broken = |cause: String| Fault::new(format!("the watch on etcd broke: {cause}"));
        loop {
            let response = match stream.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return Err(broken("etcd has ended it".to_owned())),
                Err(error) => return Err(broken(error.to_string())),
            };
            if response.compact_revision() > 0 {
                return Ok(());
            }
            if response.canceled() {
                return Err(broken(response.cancel_reason().to_owned()));
            }
            let mut has_nodes = false;
            for event in response.events() {
                let Some(kv) = event.kv() else { continue };
                self.next = self.next.max(kv.mod_revision() + 1);
                has_nodes |= self.take(kv, event.event_type() == EventType::Delete);
            }
            if has_nodes {
                self.tell_live();
            }
        }
    }

    async fn read_again(&mut self) -> Result<(), Fault> {
        let (revision, kvs) = self.seat.read_all().await?;
        tracing::info!(
            revision,
            "etcd has compacted what was missed: everything is read again"
        );
        self.take_all(revision, &kvs);
        Ok(())
    }

    fn take_all(&mut self, revision: i64, kvs: &[KeyValue]) {
        self.live.clear();
        for kv in kvs {
            self.take(kv, false);
        }
        self.tell_live();
        self.next = revision + 1;
    }

    /// Takes one key as it is now; returns whether it is a node's.
    fn take(&mut self, kv: &KeyValue, is_deleted: bool) -> bool {
        match self.subject_of(kv) {
            Some(Subject::Partition(_)) if is_deleted => {
                let key = String::from_utf8_lossy(kv.key()).into_owned();
                let remedy = self.seat.remedy(&key);
                tracing::error!(%key, %remedy, "a partition's key has been deleted: nothing can be changed until it is back");
                false
            }
            Some(Subject::Partition(partition)) => {
                match decode(kv) {
                    Ok(agreed) => self.seat.changed(partition, agreed),
                    Err(error) => tracing::error!(%error, "it is left as it was"),
                }
                false
            }
            Some(Subject::Node(node)) => {
                match serde_json::from_slice::<NodeValue>(kv.value()) {
                    Ok(value) if !is_deleted => {
                        self.live.insert(node, value.member(node));
                    }
                    _ => {
                        self.live.remove(&node);
                    }
                }
                true
            }
            None => false,
        }
    }

    fn tell_live(&self) {
        let live = self.live.values().copied().collect();
        self.seat.tell(Event::Nodes { live });
    }

    fn partition_of(&self, kv: &KeyValue) -> Option<usize> {
        match self.subject_of(kv)? {
            Subject::Partition(partition) => Some(partition),
            Subject::Node(_) => None,
        }
    }

    fn subject_of(&self, kv: &KeyValue) -> Option<Subject> {
        let path = kv.key_str().ok()?.strip_prefix(&self.seat.prefix)?;
        let mut parts = path.split('/');
        let subject = match (parts.next()?, parts.next()?, parts.next()) {
            ("nodes", node, None) => Subject::Node(node.parse().ok()?),
            ("partitions", topic, Some(number)) => {
                let name = (topic.to_owned(), number.parse().ok()?);
                Subject::Partition(*self.seat.index.get(&name)?)
            }
            _ => return None,
        };
        parts.next().is_none().then_some(subject)
    }
}
