//! Consumers that read along through everything, and an observer of high watermarks.

use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use replicator::cluster::Cluster;
use replicator::consumer::{Consumer, ConsumerError, StartOffset};
use transport::DeviceSelector;

use crate::check::{Found, Violation, Watermark, read_batch};
use crate::nodes::{find_leader, high_watermark_of};

/// Reads partition 0 of a topic from its first record on.
pub(crate) struct Reader {
    pub(crate) topic: String,
    pub(crate) name: String,
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    read: Vec<Found>,
    violation: Option<Violation>,
    last_error: Option<String>,
    is_over: bool,
}

impl Reader {
    /// `replica` is the only node that is read; otherwise any may be, the leader first.
    pub(crate) fn start(
        cluster: &Cluster,
        topic: &str,
        replica: Option<u32>,
        device: &DeviceSelector,
    ) -> Self {
        let open = || Consumer::open(cluster, topic, &[], StartOffset::Earliest, device, replica);
        let mut consumer = open().unwrap();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let seen = Arc::clone(&shared);
        let run = move || {
            while !seen.lock().unwrap().is_over {
                if let Err(violation) = poll(&mut consumer, &seen) {
                    seen.lock().unwrap().violation.get_or_insert(violation);
                    return;
                }
            }
        };
        Self {
            topic: topic.to_owned(),
            name: match replica {
                Some(node) => format!("consumer of `{topic}` from node {node}"),
                None => format!("consumer of `{topic}`"),
            },
            shared,
            thread: Some(thread::spawn(run)),
        }
    }

    /// What it has read, once that reaches to an offset.
    pub(crate) fn read_to(&self, end: usize, patience: Duration) -> Result<Vec<Found>, Violation> {
        let until = Instant::now() + patience;
        loop {
            let shared = self.shared.lock().unwrap();
            if let Some(Violation(cause)) = &shared.violation {
                return Err(Violation(format!("{}: {cause}", self.name)));
            }
            if shared.read.len() >= end {
                return Ok(shared.read.clone());
            }
            if Instant::now() > until {
                return Err(Violation(format!(
                    "{} has come to {} of {end} records after {patience:?}; last error: {:?}",
                    self.name,
                    shared.read.len(),
                    shared.last_error
                )));
            }
            drop(shared);
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.lock().unwrap().is_over = true;
        // What it has found has been asked for before.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn poll(consumer: &mut Consumer, seen: &Mutex<Shared>) -> Result<(), Violation> {
    let fetch = match consumer.poll(Duration::from_millis(100)) {
        Ok(fetch) => fetch,
        // A replica may be out of reach for long; polling again tries again.
        Err(error @ ConsumerError::Replica { .. }) => {
            seen.lock().unwrap().last_error = Some(error.to_string());
            return Ok(());
        }
        Err(error) => return Err(Violation(error.to_string())),
    };
    for (_, batch) in fetch.batches() {
        read_batch(&batch, &mut seen.lock().unwrap().read)?;
    }
    Ok(())
}

/// Asks the leader of each topic for its high watermark, again and again.
pub(crate) struct Observer {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

impl Observer {
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (seen, cluster) = (Arc::clone(&shared), cluster.clone());
        let names = cluster.topics().iter().map(|topic| topic.name.clone());
        let mut topics: Vec<_> = names.map(|name| (name, 0, Watermark::default())).collect();
        let run = move || {
            while !seen.lock().unwrap().is_over {
                for (topic, epoch, watermark) in &mut topics {
                    if let Err(Violation(cause)) = observe(&cluster, topic, epoch, watermark) {
                        let violation = Violation(format!("topic `{topic}`: {cause}"));
                        seen.lock().unwrap().violation.get_or_insert(violation);
                        return;
                    }
                }
                thread::sleep(Duration::from_millis(50));
            }
        };
        Self {
            shared,
            thread: Some(thread::spawn(run)),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Violation> {
        let found = self.shared.lock().unwrap().violation.take();
        found.map_or(Ok(()), Err)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.shared.lock().unwrap().is_over = true;
        // As above.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A leader of an epoch that has passed may not have heard of it, and tells what was committed in its time.
fn observe(
    cluster: &Cluster,
    topic: &str,
    epoch: &mut i32,
    watermark: &mut Watermark,
) -> Result<(), Violation> {
    let Some((leader, leader_epoch)) = find_leader(cluster, topic) else {
        return Ok(());
    };
    if leader_epoch < *epoch {
        return Ok(());
    }
    *epoch = leader_epoch;
    high_watermark_of(cluster, leader, topic).map_or(Ok(()), |told| watermark.rise(told))
}
