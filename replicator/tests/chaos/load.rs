//! Clients that append, and what they were told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use replicator::cluster::Cluster;
use replicator::control::{Acks, Append, Connection, ErrorCode, Message};
use replicator::producer::{Producer, ProducerConfig};
use replicator::record::BatchBuilder;

use crate::check::{Attempt, Outcome, RecordId};
use crate::nodes::{connect, find_leader, patient};
use crate::random::Random;

/// Appends that wait for their answer on one connection.
const WINDOW: usize = 4;
/// Between two appends.
const PACE: Duration = Duration::from_millis(8);
/// A leader that has not answered for so long is left: it may be stopped or cut off.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(700);
/// Largest number of records in one append.
const RECORDS_MAX: u64 = 8;

/// What all clients look at.
#[derive(Debug, Default)]
pub(crate) struct Switch {
    /// No new appends.
    pub(crate) is_paused: AtomicBool,
    pub(crate) is_over: AtomicBool,
}

impl Switch {
    fn is_paused(&self) -> bool {
        self.is_paused.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

/// Appends to partition 0 of a topic, several at a time, each once.
pub(crate) struct Appender {
    pub(crate) topic: String,
    pub(crate) acks: Acks,
    history: Arc<Mutex<History>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct History {
    attempts: Vec<Attempt>,
    /// How many have no outcome yet.
    open: usize,
}

impl Appender {
    pub(crate) fn start(cluster: &Cluster, topic: &str, acks: Acks, switch: &Arc<Switch>) -> Self {
        let history = Arc::default();
        let client = Client {
            cluster: cluster.clone(),
            topic: topic.to_owned(),
            acks,
            history: Arc::clone(&history),
            link: None,
        };
        let switch = Arc::clone(switch);
        Self {
            topic: topic.to_owned(),
            acks,
            history,
            thread: Some(thread::spawn(move || client.run(&switch))),
        }
    }

    /// All appends, once each has its outcome: to be asked while there are no new ones.
    pub(crate) fn attempts(&self, patience: Duration) -> Vec<Attempt> {
        let until = Instant::now() + patience;
        loop {
            let history = self.history.lock().unwrap();
            if history.open == 0 {
                return history.attempts.clone();
            }
            assert!(
                Instant::now() < until,
                "{}: {} appends are open",
                self.topic,
                history.open
            );
            drop(history);
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn acknowledged_count(&self) -> usize {
        let history = self.history.lock().unwrap();
        let is_acknowledged =
            |attempt: &&Attempt| matches!(attempt.outcome, Outcome::Acknowledged(_));
        history.attempts.iter().filter(is_acknowledged).count()
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the appender of topic `{}` has panicked", self.topic);
        }
    }
}

struct Client {
    cluster: Cluster,
    topic: String,
    acks: Acks,
    history: Arc<Mutex<History>>,
    link: Option<Link>,
}

/// The connection to a leader.
struct Link {
    connection: Connection,
    /// The epoch that it leads in, or an earlier one.
    leader_epoch: i32,
    /// When the appends were sent that wait for an answer, by number.
    open: BTreeMap<u64, Instant>,
    /// It has refused something: nothing more is sent to it.
    is_barred: bool,
}

impl Client {
    fn run(mut self, switch: &Switch) {
        let mut next = Instant::now();
        while !switch.is_over() {
            let Some(link) = &mut self.link else {
                self.link = self.find_link();
                if self.link.is_none() {
                    thread::sleep(Duration::from_millis(10));
                }
                continue;
            };
            let is_due = Instant::now() >= next && !switch.is_paused();
            if is_due && !link.is_barred && link.open.len() < WINDOW {
                next = Instant::now() + PACE;
                self.append();
                continue;
            }
            self.take_answer(next);
        }
        self.leave();
    }

    fn find_link(&self) -> Option<Link> {
        let (leader, leader_epoch) = find_leader(&self.cluster, &self.topic)?;
        Some(Link {
            connection: connect(&self.cluster, leader)?,
            leader_epoch,
            open: BTreeMap::new(),
            is_barred: false,
        })
    }

    fn append(&mut self) {
        let Some(link) = &mut self.link else { return };
        let mut history = self.history.lock().unwrap();
        let number = history.attempts.len() as u64;
        let count = 1 + Random(number).below(RECORDS_MAX);
        let records_count = u32::try_from(count).unwrap();
        history.attempts.push(Attempt {
            records_count,
            leader_epoch: link.leader_epoch,
            outcome: Outcome::Unknown,
        });
        history.open += 1;
        drop(history);
        let mut builder = BatchBuilder::new(1 << 15);
        for index in 0..records_count {
            let value = RecordId {
                append: number,
                index,
            }
            .value();
            assert!(builder.append(1_700_000_000_000, None, Some(&value), &[]));
        }
        let append = Append {
            correlation: number,
            topic: self.topic.clone(),
            partition: 0,
            acks: self.acks,
            batch: builder.build().to_vec(),
        };
        link.open.insert(number, Instant::now());
        if link.connection.send(&append.into()).is_err() {
            self.leave();
        }
    }

    /// Waits for an answer, for a moment.
    fn take_answer(&mut self, until: Instant) {
        let Some(link) = &mut self.link else { return };
        let left = until.saturating_duration_since(Instant::now());
        let wait = left.max(Duration::from_millis(1));
        let (number, outcome) = match link.connection.receive_timeout(wait) {
            Ok(Some(Message::Appended(appended))) => (
                appended.correlation,
                Outcome::Acknowledged(appended.base_offset),
            ),
            Ok(Some(Message::Error(error))) => {
                link.is_barred = true;
                let is_unknown = error.code == ErrorCode::OUTCOME_UNKNOWN;
                let outcome = if is_unknown {
                    Outcome::Unknown
                } else {
                    Outcome::Refused
                };
                (error.correlation, outcome)
            }
            Ok(None) => {
                let oldest = link.open.values().next();
                let is_late = oldest.is_some_and(|sent| sent.elapsed() > patient(ANSWER_TIMEOUT));
                if is_late || link.is_barred && link.open.is_empty() {
                    self.leave();
                }
                return;
            }
            Ok(Some(other)) => panic!("message type {} answers an append", other.kind()),
            Err(_) => return self.leave(),
        };
        assert!(
            link.open.remove(&number).is_some(),
            "{number} is answered twice"
        );
        let mut history = self.history.lock().unwrap();
        history.attempts[usize::try_from(number).unwrap()].outcome = outcome;
        history.open -= 1;
    }

    /// Gives the connection up: what was not answered has an unknown outcome, as it had from the beginning.
    fn leave(&mut self) {
        if let Some(link) = self.link.take() {
            self.history.lock().unwrap().open -= link.open.len();
        }
    }
}

/// Sends records through the library's producer, again and again until each is acknowledged.
pub(crate) struct Persistent {
    pub(crate) topic: String,
    sent: Arc<Mutex<Sent>>,
    thread: Option<JoinHandle<Result<(), String>>>,
}

/// What the producer has sent and been told.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sent {
    pub(crate) count: u64,
    /// All that was sent is acknowledged up to this offset.
    pub(crate) acknowledged: Option<i64>,
    is_flushed: bool,
}

impl Persistent {
    pub(crate) fn start(cluster: &Cluster, topic: &str, switch: &Arc<Switch>) -> Self {
        let config = ProducerConfig {
            batch_size: 2048,
            request_timeout: Duration::from_secs(120),
            resends_unknown: true,
            ..ProducerConfig::default()
        };
        let mut producer = Producer::connect(cluster, topic, config).unwrap();
        let sent = Arc::new(Mutex::new(Sent::default()));
        let (told, switch) = (Arc::clone(&sent), Arc::clone(switch));
        let run = move || {
            while !switch.is_over() {
                if switch.is_paused() {
                    producer.flush().map_err(|error| error.to_string())?;
                    told.lock().unwrap().is_flushed = true;
                } else {
                    let append = told.lock().unwrap().count;
                    let value = RecordId { append, index: 0 }.value();
                    // It counts before it is sent: it may be there even if sending fails.
                    *told.lock().unwrap() = Sent {
                        count: append + 1,
                        ..Sent::default()
                    };
                    producer
                        .send(None, Some(&value))
                        .map_err(|error| error.to_string())?;
                }
                told.lock().unwrap().acknowledged = producer.acknowledged(0);
                thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        };
        Self {
            topic: topic.to_owned(),
            sent,
            thread: Some(thread::spawn(run)),
        }
    }

    /// What was sent, once all of it is acknowledged: to be asked while nothing more is sent.
    pub(crate) fn sent(&mut self, patience: Duration) -> Result<Sent, String> {
        let until = Instant::now() + patience;
        loop {
            let sent = *self.sent.lock().unwrap();
            if sent.is_flushed && sent.acknowledged.is_some() {
                return Ok(sent);
            }
            if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
                let ended = self.thread.take().map(JoinHandle::join);
                return Err(format!("the producer has ended: {ended:?}"));
            }
            if Instant::now() > until {
                return Err(format!("after {patience:?} the producer waits: {sent:?}"));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Persistent {
    fn drop(&mut self) {
        // What it says has been asked for before.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
