//! A node: its threads, from start to shutdown.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};
use transport::{
    CompletionChannel, CompletionQueue, Context, DeviceSelector, Mapping, ProtectionDomain,
};

use super::connector::run_connector;
use super::error::NodeError;
use super::events::{Event, EventReceiver, EventSender, StartedCoordinator, queues};
use super::handle::Partition;
use super::io::Io;
use super::limits::allow_open_files;
use super::memory::{
    AddressSpace, Books, DirectoryLock, Domains, MemoryState, Table, check_memory_id,
    lock_directory, map_table,
};
use super::partition::Held;
use super::recovery::{Recovered, Recovering, drain_all};
use super::serve::run_acceptor;
use super::shared::{LANE_SEND_WR, PartitionInfo, Shared, partitions, unix_ns};
use super::status::NodeStatus;
use super::views::{Changes, Views, ViewsEnd};
use super::watch::Ended;
use super::workers::run_helper;
use super::writer::Writer;
use crate::cluster::Cluster;
use crate::control::{Hello, Listener};
use crate::coordinator::{self, CoordinatorConfig, Member, MemoryId, Registration};
use crate::replica::{Replica, ReplicaConfig};

/// Jobs that wait for the helper or the writer at most, before they wait in the I/O thread.
const JOBS_MAX: usize = 1024;
/// Entries of the completion queue of those queue pairs that only answer.
const PASSIVE_CQE: usize = 4096;

/// How to run a node.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The cluster: all nodes read it from the same file, or build the same one.
    pub cluster: Cluster,
    /// Which of its nodes to be.
    pub node_id: u32,
    /// Directory of the segment files; made if need be.
    pub data_dir: PathBuf,
    /// Directory of the log memory, on tmpfs or hugetlbfs; made if need be. It belongs to `data_dir`: with
    /// another one the node has lost its memory.
    pub shm_dir: PathBuf,
    /// The device.
    pub device: DeviceSelector,
    /// Who decides which replica leads.
    pub coordinator: CoordinatorConfig,
}

/// A running node. Dropping it shuts it down.
#[derive(Debug)]
pub struct Node {
    shared: Arc<Shared>,
    control_addr: std::net::SocketAddr,
    ended: Ended,
    io: Option<JoinHandle<()>>,
    helper: Option<JoinHandle<()>>,
    writer: Option<JoinHandle<()>>,
    writer_done: Receiver<Writer>,
    others: Vec<JoinHandle<()>>,
    shm_dir: PathBuf,
    _locks: [DirectoryLock; 2],
}

impl Node {
    /// Starts a node: recovers its log from files and memory, opens the device, listens, and connects to
    /// its followers. Returns once it listens.
    ///
    /// With many partitions it raises the process's soft limit of open files to the hard one.
    ///
    /// # Errors
    ///
    /// [`NodeError`]: a directory in use or not usable, damaged segment files, no such device, no shared
    /// memory, an address in use.
    pub fn start(config: NodeConfig) -> Result<Self, NodeError> {
        let NodeConfig {
            cluster,
            node_id,
            data_dir,
            shm_dir,
            device,
            coordinator,
        } = config;
        let Some(spec) = cluster.node(node_id) else {
            let known: Vec<_> = cluster
                .nodes()
                .iter()
                .map(|node| node.id.to_string())
                .collect();
            return Err(NodeError::UnknownNode {
                node: node_id,
                known: known.join(", "),
            });
        };
        let locks = [lock_directory(&data_dir)?, lock_directory(&shm_dir)?];
        let listener = Listener::bind(&spec.address)?;
        let (memory_id, memory) = check_memory_id(&shm_dir, &data_dir)?;
        let is_memory_lost = memory == MemoryState::Lost;
        if is_memory_lost {
            tracing::warn!(shm_dir = %shm_dir.display(), "the log memory is not that of the last run");
        }
        let incarnation = unix_ns();
        let infos = partitions(&cluster, &data_dir);
        let held = infos.iter().filter(|info| info.replicas.contains(&node_id));
        allow_open_files(held.count())?;
        let registration = Registration {
            cluster: cluster.name().to_owned(),
            member: Member {
                node: node_id,
                memory_id: MemoryId(memory_id),
            },
            incarnation,
            address: spec.address.clone(),
            partitions: infos.iter().map(PartitionInfo::key).collect(),
        };
        let table = map_table(&shm_dir, infos.len())?;
        let mut recovery = Recovering {
            node_id,
            shm_dir: &shm_dir,
            memory,
            table: &table,
            infos: &infos,
        };
        let (writer, recovered) = recovery.run(&data_dir)?;
        let context = Context::open(&device)?;
        let (events, receiver) =
            queues().map_err(|source| NodeError::directory(&data_dir, source))?;
        let (shared, channel) = Setup {
            hello: Hello::node(node_id, memory_id, incarnation, cluster.hash()),
            context,
            events,
            table,
        }
        .share(node_id, cluster, infos, data_dir, is_memory_lost)?;
        let held = hold(&shared, &recovered);
        let node = Threads {
            shared,
            receiver,
            channel,
            held,
            writer,
            listener,
        }
        .start(shm_dir, locks)?;
        node.coordinate(&coordinator, registration)?;
        Ok(node)
    }

    /// Starts the coordinator, which needs the I/O thread to take what it tells.
    fn coordinate(
        &self,
        config: &CoordinatorConfig,
        registration: Registration,
    ) -> Result<(), NodeError> {
        let shared = Arc::clone(&self.shared);
        let watch = self.ended.watch("coordinator");
        let sink = move |event| {
            let _watch = &watch;
            if let coordinator::Event::Changed { partition, agreed } = &event {
                shared.note_agreed(*partition, agreed);
            }
            // Fails only when the I/O thread has ended.
            let _ = shared.events.send(Event::Coordinator(event));
        };
        let started = config.start(&self.shared.data_dir, registration, sink)?;
        let event = Event::CoordinatorStarted(StartedCoordinator(started));
        let ended = |_| NodeError::Stopped("its I/O thread has ended".to_owned());
        self.shared.events.send(event).map_err(ended)
    }

    /// The name of the device in use.
    #[must_use]
    pub fn device(&self) -> &str {
        self.shared.context.name()
    }

    /// Where control connections are taken.
    #[must_use]
    pub fn control_addr(&self) -> std::net::SocketAddr {
        self.control_addr
    }

    /// How the node is.
    ///
    /// # Errors
    ///
    /// [`NodeError::Stopped`].
    pub fn status(&self) -> Result<NodeStatus, NodeError> {
        let (sender, receiver) = bounded(1);
        let stopped = || NodeError::Stopped("its I/O thread has ended".to_owned());
        self.shared
            .events
            .send(Event::Status(sender))
            .map_err(|_| stopped())?;
        receiver.recv().map_err(|_| stopped())
    }

    /// Whether the node has ended by itself, and why. It has when one of its threads has panicked, too.
    ///
    /// # Errors
    ///
    /// [`NodeError::Stopped`] with the cause.
    pub fn check(&self) -> Result<(), NodeError> {
        self.ended
            .get()
            .map_or(Ok(()), |cause| Err(NodeError::Stopped(cause.to_owned())))
    }

    /// Waits until the node has ended by itself.
    ///
    /// # Errors
    ///
    /// [`NodeError::Stopped`] with the cause.
    pub fn wait(&self) -> Result<(), NodeError> {
        Err(NodeError::Stopped(self.ended.wait().to_owned()))
    }

    /// A partition that the node holds, to append to it and to read it.
    ///
    /// # Errors
    ///
    /// [`NodeError::UnknownPartition`].
    pub fn partition(&self, topic: &str, number: u32) -> Result<Partition, NodeError> {
        let unknown = || NodeError::UnknownPartition {
            node: self.shared.node,
            topic: topic.to_owned(),
            partition: number,
        };
        let handle = self.shared.handle(topic, number);
        handle.cloned().ok_or_else(unknown)
    }

    /// All partitions that the node holds, in the order of the cluster.
    pub fn partitions(&self) -> impl Iterator<Item = Partition> {
        self.shared.handles.iter().flatten().cloned()
    }

    /// Subscribes to what changes in the partitions that the node holds.
    pub fn changes(&self) -> Changes {
        self.shared.views.subscribe(self.partitions().collect())
    }

    /// Ends the node in order. From now on appends are refused; those that were taken are waited for; what
    /// the node leads is handed over to replicas that are in sync, if the coordinator knows elections; lanes
    /// and connections are closed; and what the log memory holds is copied to the segment files.
    ///
    /// Appends and successors are waited for `patience` long at most. Without a successor by then, the others
    /// elect one as after a crash, and what has not been acknowledged is answered with
    /// [`AppendError::OutcomeUnknown`](super::AppendError::OutcomeUnknown). How long the files take is up to
    /// their device. Dropping the node instead is the same without any patience.
    ///
    /// # Errors
    ///
    /// [`NodeError::Segment`] if the files cannot be written; the memory is kept then, and the next start
    /// tries again.
    pub fn shutdown(mut self, patience: Duration) -> Result<(), NodeError> {
        let (done, finished) = bounded(1);
        let sent = self.shared.events.send(Event::Finish { patience, done });
        // It ends when the sender is dropped, also with the I/O thread.
        if sent.is_ok() {
            let _ = finished.recv();
        }
        self.stop()
    }

    fn stop(&mut self) -> Result<(), NodeError> {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
        let Some(io) = self.io.take() else {
            return Ok(());
        };
        // It may have ended by itself.
        let _ = self.shared.events.send(Event::Shutdown);
        let threads = std::iter::once(io)
            .chain(self.helper.take())
            .chain(self.writer.take());
        for thread in threads.chain(self.others.drain(..)) {
            if thread.join().is_err() {
                tracing::error!("a thread of the node has panicked");
            }
        }
        let Ok(mut writer) = self.writer_done.try_recv() else {
            return Err(NodeError::Stopped(
                "its writer thread has panicked".to_owned(),
            ));
        };
        drain_all(&mut writer, &self.shared, &self.shm_dir)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "shutdown");
        }
    }
}

/// What is put together for all threads.
struct Setup {
    hello: Hello,
    context: Context,
    events: EventSender,
    table: Arc<Mapping>,
}

impl Setup {
    fn share(
        self,
        node: u32,
        cluster: Cluster,
        partitions: Vec<PartitionInfo>,
        data_dir: PathBuf,
        is_memory_lost: bool,
    ) -> Result<(Arc<Shared>, CompletionChannel), NodeError> {
        let Self {
            hello,
            context,
            events,
            table,
        } = self;
        let limit = cluster.node(node).and_then(|spec| spec.memory);
        let memory_limit = limit.unwrap_or(u64::MAX);
        let domains = Domains {
            replication: ProtectionDomain::alloc(&context)?,
            consumer: ProtectionDomain::alloc(&context)?,
            addresses: Arc::new(AddressSpace::new()),
            books: Arc::new(Books::new(memory_limit)),
        };
        let channel = CompletionChannel::create(&context)?;
        // Twice as many as there are lanes: a new one may come up before the old one is gone.
        let cqe = cluster.nodes().len() * 2 * (LANE_SEND_WR as usize + 1);
        let index = partitions.iter().enumerate();
        let index = index
            .map(|(index, info)| ((info.topic.clone(), info.number), index))
            .collect();
        let views = Arc::new(Views::new(&partitions));
        let handle = |(index, info): (usize, &PartitionInfo)| {
            let is_held = info.replicas.contains(&node);
            is_held.then(|| Partition::new(node, (index, info), &events, &table, &views))
        };
        let handles = partitions.iter().enumerate().map(handle).collect();
        let shared = Shared {
            node,
            handles,
            views,
            cluster,
            data_dir,
            is_memory_lost,
            index,
            agreed: Mutex::new(vec![None; partitions.len()]),
            partitions,
            table: Table::register(&domains, table)?,
            domains,
            cq: CompletionQueue::create(&context, cqe, Some(&channel))?,
            passive_cq: CompletionQueue::create(&context, PASSIVE_CQE, None)?,
            events,
            passive_lanes: Mutex::new(HashMap::new()),
            is_stopping: AtomicBool::new(false),
            last_session: AtomicU64::new(hello.incarnation),
            started_at: Instant::now(),
            hello,
            context,
        };
        Ok((Arc::new(shared), channel))
    }
}

/// The engines of the partitions that the node holds.
fn hold(shared: &Shared, recovered: &HashMap<usize, Recovered>) -> Vec<Option<Held>> {
    let hold = |(index, info): (usize, &PartitionInfo)| {
        let found = recovered.get(&index)?;
        let me = Member {
            node: shared.node,
            memory_id: MemoryId(shared.hello.memory_id),
        };
        let mut config = ReplicaConfig::new(info.config);
        config.leader.min_isr = info.min_isr as usize;
        config.leader.lag_max_ns = u64::try_from(info.lag_max.as_nanos()).unwrap_or(u64::MAX);
        let (epoch, stored) = (found.leader_epoch, found.stored.clone());
        let replica = Replica::new(config, me, shared.hello.incarnation, epoch, stored);
        let min_isr = info.min_isr as usize;
        Some(Held::new(replica, min_isr, info.dir.clone()))
    };
    shared.partitions.iter().enumerate().map(hold).collect()
}

struct Threads {
    shared: Arc<Shared>,
    receiver: EventReceiver,
    channel: CompletionChannel,
    held: Vec<Option<Held>>,
    writer: Writer,
    listener: Listener,
}

impl Threads {
    fn start(self, shm_dir: PathBuf, locks: [DirectoryLock; 2]) -> Result<Node, NodeError> {
        let Self {
            shared,
            receiver,
            channel,
            held,
            writer,
            listener,
        } = self;
        let (helper_jobs, helper_queue) = bounded(JOBS_MAX);
        let (writer_jobs, writer_queue) = bounded(JOBS_MAX);
        let ended = Ended::default();
        let (done, writer_done) = bounded(1);
        let mut node = Node {
            control_addr: listener.local_addr(),
            ended: ended.clone(),
            io: None,
            helper: None,
            writer: None,
            writer_done,
            others: Vec::new(),
            shm_dir: shm_dir.clone(),
            _locks: locks,
            shared: Arc::clone(&shared),
        };
        let helping = Arc::clone(&shared);
        node.helper = Some(ended.spawn("helper", move || {
            run_helper(&helper_queue, &helping, &shm_dir);
        })?);
        let events = shared.events.clone();
        node.writer = Some(ended.spawn("writer", move || {
            // The node waits for this.
            let _ = done.send(writer.run(&writer_queue, &events));
        })?);
        let io = Io::new(
            Arc::clone(&shared),
            receiver,
            channel,
            held,
            helper_jobs,
            writer_jobs,
        );
        let end = ended.clone();
        let views_end = ViewsEnd(Arc::clone(&shared.views));
        node.io = Some(ended.spawn("io", move || {
            let _views_end = views_end;
            run_io(io, &end);
        })?);
        let accepting = Arc::clone(&shared);
        node.others
            .push(ended.spawn("acceptor", move || run_acceptor(&accepting, &listener))?);
        for peer in shared.peer_nodes() {
            let shared = Arc::clone(&shared);
            node.others
                .push(ended.spawn("connector", move || run_connector(&shared, peer))?);
        }
        Ok(node)
    }
}

fn run_io(io: Io, ended: &Ended) {
    // Without an error it was told to shut down.
    if let Err(error) = io.run() {
        ended.set(error.to_string());
    }
}
