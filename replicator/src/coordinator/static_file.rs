//! A coordinator without elections: the cluster file says who leads, a file says who is in sync.
//!
//! ```text
//! DATA_DIR/coordinator-state       of the node that leads; replaced as a whole, so that a crash leaves the
//!   crc32c=8f1c0d2a                old file or the new one
//!   { "version": 1, "cluster": "demo", "node": 1, "partitions": [ ... ] }
//! ```
//!
//! Only the first replica of a partition ever leads it, so nobody else proposes: the file needs no lock
//! beyond that of the data directory, and the revision only orders the leader's own changes. The other
//! nodes are told that the first replica leads, and learn the epoch from it. There are no leases and no
//! [`Event::Nodes`]: a leader that dies leads again when it comes back.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use serde::{Deserialize, Serialize};

use super::{
    Agreed, Answer, Coordinator, CoordinatorError, Event, Member, MemoryId, PartitionKey,
    PartitionState, Registration, state,
};
use crate::segment::{Disk, replace_file};

/// The file's name in the data directory.
const STATE_FILE: &str = "coordinator-state";
const VERSION: u32 = 1;
/// After a write error the file is tried again this often.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// See the [module](super) of coordinators.
#[derive(Debug)]
pub struct StaticCoordinator {
    /// Holds one proposal for each partition at most, since a node awaits the answer before the next.
    proposals: Option<Sender<Proposal>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Proposal {
    partition: usize,
    ticket: u64,
    expected_revision: i64,
    state: PartitionState,
}

impl StaticCoordinator {
    /// Reads the state file in `data_dir`, if there is one, and tells each partition's state to `sink`.
    ///
    /// # Errors
    ///
    /// [`CoordinatorError::StateFile`] if the file is damaged, or another node's or cluster's;
    /// [`CoordinatorError::Files`] if it cannot be read.
    pub fn start(
        data_dir: &Path,
        registration: &Registration,
        sink: impl FnMut(Event) + Send + 'static,
    ) -> Result<Self, CoordinatorError> {
        let path = data_dir.join(STATE_FILE);
        let agreed = load(&path, registration)?;
        let keeper = Keeper {
            path,
            cluster: registration.cluster.clone(),
            node: registration.member.node,
            keys: registration.partitions.clone(),
            agreed,
            undecided: Vec::new(),
            sink,
        };
        let (proposals, queue) = unbounded();
        let thread = thread::Builder::new()
            .name("coordinator".to_owned())
            .spawn(move || keeper.run(&queue))
            .map_err(CoordinatorError::Thread)?;
        Ok(Self {
            proposals: Some(proposals),
            thread: Some(thread),
        })
    }
}

impl Coordinator for StaticCoordinator {
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

    /// There is no session.
    fn beat(&mut self) {}

    fn has_elections(&self) -> bool {
        false
    }
}

impl Drop for StaticCoordinator {
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

/// The thread's state.
struct Keeper<S> {
    path: PathBuf,
    cluster: String,
    node: u32,
    keys: Vec<PartitionKey>,
    agreed: Vec<Agreed>,
    /// Partitions whose last proposal may be in the file or not, since writing it has failed.
    undecided: Vec<usize>,
    sink: S,
}

impl<S: FnMut(Event)> Keeper<S> {
    fn run(mut self, queue: &Receiver<Proposal>) {
        for partition in 0..self.keys.len() {
            self.tell(partition);
        }
        loop {
            let first = if self.undecided.is_empty() {
                queue.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                queue.recv_timeout(RETRY_INTERVAL)
            };
            match first {
                // One write of the file for all that wait.
                Ok(first) => self.decide(std::iter::once(first).chain(queue.try_iter())),
                Err(RecvTimeoutError::Timeout) => self.decide(std::iter::empty()),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn decide(&mut self, proposals: impl Iterator<Item = Proposal>) {
        let before = self.agreed.clone();
        let mut answers = Vec::new();
        for proposal in proposals {
            let (partition, ticket) = (proposal.partition, proposal.ticket);
            answers.push((partition, ticket, self.apply(proposal)));
        }
        let is_news = self.agreed != before || !self.undecided.is_empty();
        let written = if is_news { self.write() } else { Ok(()) };
        match &written {
            Ok(()) => {
                for partition in std::mem::take(&mut self.undecided) {
                    self.tell(partition);
                }
            }
            Err(error) => {
                tracing::error!(%error, "the coordinator's file is not written; it is tried again");
                self.agreed = before;
            }
        }
        for (partition, ticket, answer) in answers {
            let answer = match (&written, answer) {
                (Ok(()), answer) => answer,
                (Err(error), Answer::Accepted { .. }) => {
                    // The next write has the old state under a revision that the proposal has not: then
                    // that one is void, whether it has reached the disk or not.
                    self.agreed[partition].revision += 2;
                    self.undecided.push(partition);
                    let cause = error.to_string();
                    Answer::Unknown { cause }
                }
                // It may have quoted what is undone now.
                (Err(_), _) => Answer::Conflict(self.agreed[partition].clone()),
            };
            let is_accepted = matches!(answer, Answer::Accepted { .. });
            (self.sink)(Event::Answered {
                partition,
                ticket,
                answer,
            });
            if is_accepted {
                self.tell(partition);
            }
        }
    }

    fn apply(&mut self, proposal: Proposal) -> Answer {
        let agreed = &mut self.agreed[proposal.partition];
        let key = &self.keys[proposal.partition];
        let is_ours = key.replicas.first() == Some(&self.node);
        let is_allowed = is_ours
            && proposal
                .state
                .leader
                .is_none_or(|leader| leader == self.node);
        if !is_allowed || agreed.revision != proposal.expected_revision {
            return Answer::Conflict(agreed.clone());
        }
        *agreed = Agreed {
            state: proposal.state,
            revision: agreed.revision + 1,
        };
        Answer::Accepted {
            revision: agreed.revision,
        }
    }

    fn tell(&mut self, partition: usize) {
        let agreed = self.agreed[partition].clone();
        (self.sink)(Event::Changed { partition, agreed });
    }

    fn write(&self) -> Result<(), CoordinatorError> {
        let ours = |(key, agreed): (&PartitionKey, &Agreed)| {
            (key.replicas.first() == Some(&self.node)).then(|| Kept {
                topic: key.topic.clone(),
                partition: key.number,
                revision: agreed.revision,
                state: agreed.state.clone(),
            })
        };
        let file = StateFile {
            version: VERSION,
            cluster: self.cluster.clone(),
            node: self.node,
            partitions: self
                .keys
                .iter()
                .zip(&self.agreed)
                .filter_map(ours)
                .collect(),
        };
        Ok(replace_file(&Disk, &self.path, &encode(&file))?)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    version: u32,
    cluster: String,
    node: u32,
    partitions: Vec<Kept>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    topic: String,
    partition: u32,
    revision: i64,
    #[serde(flatten)]
    state: PartitionState,
}

fn encode(file: &StateFile) -> Vec<u8> {
    let body = serde_json::to_string_pretty(file).expect("it has only numbers, strings and lists");
    format!("crc32c={:08x}\n{body}\n", crc32c::crc32c(body.as_bytes())).into_bytes()
}

fn decode(text: &str) -> Result<StateFile, String> {
    let damaged = |what: &str| format!("{what}; {REPAIR}");
    let (crc, body) = text
        .split_once('\n')
        .and_then(|(first, body)| Some((first.strip_prefix("crc32c=")?, body.strip_suffix('\n')?)))
        .ok_or_else(|| damaged("its first line or its end is missing"))?;
    if u32::from_str_radix(crc, 16) != Ok(crc32c::crc32c(body.as_bytes())) {
        return Err(damaged("its checksum is wrong"));
    }
    let file: StateFile =
        serde_json::from_str(body).map_err(|error| damaged(&error.to_string()))?;
    if file.version != VERSION {
        let version = file.version;
        return Err(format!(
            "it has version {version}, this build reads {VERSION}: start the build that wrote it"
        ));
    }
    Ok(file)
}

const REPAIR: &str = "put a copy back, or remove it: the node then leads in a new epoch, and its followers \
                      are in sync again once they have caught up";

/// What is agreed on each partition.
fn load(path: &Path, registration: &Registration) -> Result<Vec<Agreed>, CoordinatorError> {
    let refused = |cause| CoordinatorError::StateFile {
        path: path.to_owned(),
        cause,
    };
    let node = registration.member.node;
    let mut kept = HashMap::new();
    match fs::read_to_string(path) {
        Ok(text) => {
            let file = decode(&text).map_err(refused)?;
            if (file.cluster.as_str(), file.node) != (registration.cluster.as_str(), node) {
                return Err(refused(format!(
                    "it belongs to node {} of cluster `{}`, this is node {node} of cluster `{}`: give each node \
                     a data directory of its own",
                    file.node, file.cluster, registration.cluster
                )));
            }
            for entry in file.partitions {
                state::check(&entry.state).map_err(|cause| {
                    refused(format!(
                        "partition {} of topic `{}`: {cause}; {REPAIR}",
                        entry.partition, entry.topic
                    ))
                })?;
                kept.insert((entry.topic.clone(), entry.partition), entry);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(refused(error.to_string())),
    }
    let agreed = |key: &PartitionKey| {
        let entry = kept.remove(&(key.topic.clone(), key.number));
        begin(key, node, entry)
    };
    Ok(registration.partitions.iter().map(agreed).collect())
}

/// The cluster file decides who leads and who replicates, the state file the rest.
fn begin(key: &PartitionKey, node: u32, entry: Option<Kept>) -> Agreed {
    let preferred = key.replicas.first().copied();
    let mut agreed = Agreed {
        state: key.offline(),
        revision: 0,
    };
    match entry {
        _ if preferred != Some(node) => {
            // Which memory it has is not known here, nor who else is in sync.
            let leader = preferred.map(|node| Member {
                node,
                memory_id: MemoryId([0; 16]),
            });
            agreed.state.leader = preferred;
            agreed.state.isr = leader.into_iter().collect();
        }
        Some(entry) => {
            agreed.revision = entry.revision;
            agreed.state.leader_epoch = entry.state.leader_epoch;
            agreed.state.isr = entry.state.isr;
            agreed.state.isr.retain(|m| key.replicas.contains(&m.node));
            let leader = entry.state.leader;
            agreed.state.leader =
                leader.filter(|&leader| agreed.state.isr.iter().any(|m| m.node == leader));
        }
        None => {}
    }
    agreed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coordinator::conformance::{self, Loss, Node, Place, Seat, led, registration};

    struct Directory(tempfile::TempDir);

    impl Directory {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn obstacle(&self) -> PathBuf {
            self.0.path().join(format!("{STATE_FILE}.tmp"))
        }

        fn file(&self) -> PathBuf {
            self.0.path().join(STATE_FILE)
        }

        fn start(&self, registration: &Registration) -> Result<Joined, CoordinatorError> {
            let (sender, events) = unbounded();
            let sink = move |event| sender.send(event).unwrap();
            let coordinator = StaticCoordinator::start(self.0.path(), registration, sink)?;
            Ok(Joined {
                coordinator,
                events,
            })
        }
    }

    struct Joined {
        coordinator: StaticCoordinator,
        events: Receiver<Event>,
    }

    impl Place for Directory {
        fn join(&mut self, registration: Registration) -> Box<dyn Seat> {
            Box::new(self.start(&registration).unwrap())
        }

        fn lose(&mut self, _: u32, what: Loss) {
            assert_eq!(
                what,
                Loss::Requests,
                "a file gives no answer that could be lost"
            );
            fs::create_dir(self.obstacle()).unwrap();
        }

        fn mend(&mut self, _: u32) {
            fs::remove_dir(self.obstacle()).unwrap();
        }
    }

    impl Seat for Joined {
        fn coordinator(&mut self) -> &mut dyn Coordinator {
            &mut self.coordinator
        }

        fn next(&mut self, within: Duration) -> Option<Event> {
            self.events.recv_timeout(within).ok()
        }
    }

    #[test]
    fn it_keeps_to_what_coordinators_do() {
        conformance::first_states_are_told(&mut Directory::new());
        conformance::one_proposal_wins(&mut Directory::new());
        conformance::states_survive_a_restart(&mut Directory::new());
        conformance::a_lost_request_is_void(&mut Directory::new());
    }

    #[test]
    fn others_are_told_that_the_first_replica_leads() {
        let directory = Directory::new();
        let mut node = Node::new(Box::new(directory.start(&registration(2)).unwrap()));
        let told = node.changed();
        assert_eq!(told.state.leader, Some(1));
        // And they cannot take over.
        let takes = PartitionState {
            leader: Some(2),
            ..led(1, &[1, 2])
        };
        assert_eq!(node.propose(told.revision, takes), Answer::Conflict(told));
    }

    #[test]
    fn the_cluster_file_decides_about_replicas() {
        let directory = Directory::new();
        let mut node = Node::new(Box::new(directory.start(&registration(1)).unwrap()));
        let first = node.changed().revision;
        node.accept(first, led(1, &[1, 2]));
        drop(node);
        let mut smaller = registration(1);
        smaller.partitions[0].replicas = vec![1, 3];
        let mut node = Node::new(Box::new(directory.start(&smaller).unwrap()));
        let state = node.changed().state;
        assert_eq!(state.replicas, [1, 3]);
        assert_eq!(state.isr, led(1, &[1]).isr);
    }

    /// Damage anywhere is found, and said to be what it is; nothing is changed by the attempt.
    #[test]
    fn a_damaged_file_is_refused() {
        let directory = Directory::new();
        let mut node = Node::new(Box::new(directory.start(&registration(1)).unwrap()));
        let first = node.changed().revision;
        node.accept(first, led(1, &[1, 2]));
        drop(node);
        let good = fs::read(directory.file()).unwrap();
        for byte in 0..good.len() {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            fs::write(directory.file(), &bad).unwrap();
            let message = directory
                .start(&registration(1))
                .map(drop)
                .unwrap_err()
                .to_string();
            assert!(message.contains(STATE_FILE), "byte {byte}: {message}");
            assert!(
                message.contains("put a copy back"),
                "byte {byte}: {message}"
            );
            assert_eq!(fs::read(directory.file()).unwrap(), bad);
        }
        for len in 0..good.len() {
            fs::write(directory.file(), &good[..len]).unwrap();
            assert!(directory.start(&registration(1)).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn a_file_of_another_node_or_cluster_is_refused() {
        let directory = Directory::new();
        let mut node = Node::new(Box::new(directory.start(&registration(1)).unwrap()));
        let first = node.changed().revision;
        node.accept(first, led(1, &[1, 2]));
        drop(node);
        let mut other = registration(1);
        other.cluster = "another".to_owned();
        for wrong in [registration(2), other] {
            let message = directory.start(&wrong).map(drop).unwrap_err().to_string();
            assert!(
                message.contains("node 1 of cluster `conformance`"),
                "{message}"
            );
        }
    }
}
