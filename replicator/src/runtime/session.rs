//! A consumer's side of one replica: control connection, queue pair, and the partitions read there.

use std::ops::Range;
use std::time::{Duration, Instant};

use transport::connect::{ConnectConfig, EndPoint, Prepared};
use transport::{Completion, LocalBuffer, QpCapabilities, ReadyQp, Remote, Rkey, SendFlags};

use super::fetch::{ConsumerError, Device, PAUSE, StartOffset, send_wr};
use crate::cluster::Cluster;
use crate::consumer::{Cursor, FetchFault, Granted, Plan};
use crate::control::{
    Connection, ControlError, ErrorCode, ErrorReply, Hello, ImageRequest, Lane, ListOffsets,
    Message, Open, Purpose,
};
use crate::table::ENTRY_LEN;

/// Bytes read along with the entry when nothing is known to be there.
const READ_LEN_MIN: u32 = 16 << 10;
/// Most bytes of one READ, unless a batch is larger: of few partitions, and of all together.
const READ_LEN_MAX: u32 = 512 << 10;
const READ_LEN_SUM: u32 = 64 << 20;
/// Partitions that are read in one round at most.
pub(super) const ROUND_MAX: usize = 512;
/// How long a replica may take to answer a control message.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a replica may be out of reach before `poll` fails.
const OUTAGE_MAX: Duration = Duration::from_secs(15);
/// Between two attempts to reach a replica.
const RECONNECT_DELAY: Duration = Duration::from_millis(200);

/// All that is read from one node.
#[derive(Debug)]
pub(super) struct Session {
    node: u32,
    pub(super) partitions: Vec<Reading>,
    link: Option<Link>,
    /// When the link was lost, why, and when the next attempt is due.
    outage: Option<(Instant, String)>,
    retry_at: Instant,
    /// An attempt to reach the node again has failed.
    has_failed: bool,
    number: u64,
    /// Most bytes of one READ.
    read_len_max: u32,
    /// Where the next round begins, if there are more partitions than it takes.
    next_slot: usize,
}

/// A control connection with its queue pair; they end together.
#[derive(Debug)]
struct Link {
    connection: Connection,
    qp: ReadyQp,
    correlation: u64,
    outstanding: usize,
}

#[derive(Debug)]
pub(super) struct Reading {
    pub(super) partition: u32,
    pub(super) cursor: Cursor,
    entry: Remote,
    entry_buffer: Option<LocalBuffer>,
    pub(super) data_buffer: Option<LocalBuffer>,
    /// What of the data buffer is not part of the READ on its way.
    rest: Option<LocalBuffer>,
    /// Bytes asked for in this round, `None` if the partition is not part of it.
    asked: Option<usize>,
    /// The replica has no image for us yet: when to ask again.
    ask_at: Option<Instant>,
}

impl Session {
    /// Partitions of a node, of those that a consumer reads altogether.
    pub(super) fn new(node: u32, partitions: &[u32], all_count: usize) -> Self {
        let share = READ_LEN_SUM / u32::try_from(all_count.max(1)).unwrap_or(u32::MAX);
        let read_len_max = share.clamp(READ_LEN_MIN, READ_LEN_MAX);
        let reading = |&partition: &u32| Reading {
            partition,
            cursor: Cursor::new(0, READ_LEN_MIN, read_len_max),
            entry: Remote {
                addr: 0,
                rkey: Rkey(0),
            },
            entry_buffer: None,
            data_buffer: None,
            rest: None,
            asked: None,
            ask_at: None,
        };
        Self {
            node,
            partitions: partitions.iter().map(reading).collect(),
            link: None,
            outage: None,
            retry_at: Instant::now(),
            has_failed: false,
            number: 0,
            read_len_max,
            next_slot: 0,
        }
    }

    pub(super) fn node(&self) -> u32 {
        self.node
    }

    /// Whether another replica should be tried.
    pub(super) fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Goes on with partitions of this session on another node.
    pub(super) fn moved(&self, node: u32, partitions: Vec<Reading>) -> Self {
        Self {
            node,
            partitions,
            link: None,
            outage: self.outage.clone(),
            retry_at: Instant::now(),
            has_failed: false,
            number: self.number,
            read_len_max: self.read_len_max,
            next_slot: 0,
        }
    }

    fn failed(&self, cause: impl ToString) -> ConsumerError {
        ConsumerError::Replica {
            node: self.node,
            cause: cause.to_string(),
        }
    }

    /// Connects and learns where the table entries are.
    pub(super) fn connect(
        &mut self,
        device: &Device,
        cluster: &Cluster,
        topic: &str,
    ) -> Result<(), ConsumerError> {
        let spec = cluster.node(self.node);
        let spec = spec.ok_or_else(|| self.failed("it is not in the cluster file"))?;
        let hello = Hello::client(cluster.hash());
        let connection = Connection::connect_node(&spec.address, self.node, &hello)
            .map_err(|error| self.failed(error))?;
        let config = ConnectConfig {
            capabilities: QpCapabilities {
                max_send_wr: send_wr(self.partitions.len()),
                max_recv_wr: 1,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            ..ConnectConfig::default()
        };
        let prepared = Prepared::create(&device.pd, &device.cq, &device.cq, &config)?;
        self.number += 1;
        let lane = Lane {
            correlation: 1,
            session: self.number,
            purpose: Purpose::Consumer,
            end_point: prepared.end_point().encode().to_vec(),
        };
        let mut connection = connection;
        let remote = match ask(&mut connection, lane.into()) {
            Ok(Message::LaneReady(ready)) => EndPoint::decode(&ready.end_point)?,
            other => return Err(self.failed(unexpected(other))),
        };
        let qp = prepared.connect(&remote)?;
        let partitions = self
            .partitions
            .iter()
            .map(|reading| reading.partition)
            .collect();
        let open = Open {
            correlation: 2,
            topic: topic.to_owned(),
            partitions,
        };
        let opened = match ask(&mut connection, open.into()) {
            Ok(Message::Opened(opened)) if opened.entries.len() == self.partitions.len() => opened,
            other => return Err(self.failed(unexpected(other))),
        };
        for (reading, entry) in self.partitions.iter_mut().zip(opened.entries) {
            reading.entry = Remote {
                addr: entry.entry_addr,
                rkey: Rkey(entry.rkey),
            };
            reading.reset(device)?;
        }
        self.link = Some(Link {
            connection,
            qp,
            correlation: 2,
            outstanding: 0,
        });
        self.outage = None;
        self.has_failed = false;
        Ok(())
    }

    /// Places the cursors.
    pub(super) fn seek(&mut self, topic: &str, start: StartOffset) -> Result<(), ConsumerError> {
        for slot in 0..self.partitions.len() {
            let partition = self.partitions[slot].partition;
            let mut list = |timestamp| self.list_offset(topic, partition, timestamp);
            let offset = match start {
                StartOffset::Earliest => list(ListOffsets::EARLIEST)?,
                StartOffset::Latest => list(ListOffsets::LATEST)?,
                StartOffset::Timestamp(timestamp) => match list(timestamp.max(0))? {
                    found @ 0.. => found,
                    _ => list(ListOffsets::LATEST)?,
                },
                StartOffset::Offset(offset) => {
                    let (earliest, latest) =
                        (list(ListOffsets::EARLIEST)?, list(ListOffsets::LATEST)?);
                    if !(earliest..=latest).contains(&offset) {
                        return Err(ConsumerError::OffsetOutOfRange {
                            partition,
                            offset,
                            earliest,
                            latest,
                        });
                    }
                    offset
                }
            };
            self.partitions[slot].cursor = Cursor::new(offset, READ_LEN_MIN, self.read_len_max);
        }
        Ok(())
    }

    fn list_offset(
        &mut self,
        topic: &str,
        partition: u32,
        timestamp: i64,
    ) -> Result<i64, ConsumerError> {
        let correlation = self.next_correlation();
        let request = ListOffsets {
            correlation,
            topic: topic.to_owned(),
            partition,
            timestamp,
        };
        match self.ask(request.into()) {
            Ok(Message::ListOffsetsReply(reply)) => Ok(reply.offset),
            other => Err(self.failed(unexpected(other))),
        }
    }

    fn next_correlation(&mut self) -> u64 {
        self.link.as_mut().map_or(0, |link| {
            link.correlation += 1;
            link.correlation
        })
    }

    fn ask(&mut self, message: Message) -> Result<Message, Refusal> {
        match &mut self.link {
            Some(link) => ask(&mut link.connection, message),
            None => Err(Refusal::Lost("there is no connection".to_owned())),
        }
    }

    /// Gives up the link; the next rounds try to make a new one.
    pub(super) fn lose(&mut self, cause: &str) {
        if self.link.take().is_none() {
            return;
        }
        tracing::warn!(node = self.node, %cause, "the replica is lost");
        let since = self
            .outage
            .take()
            .map_or_else(Instant::now, |(since, _)| since);
        self.outage = Some((since, cause.to_owned()));
        self.retry_at = Instant::now() + RECONNECT_DELAY;
        for reading in &mut self.partitions {
            reading.cursor.forget_image();
            reading.asked = None;
        }
    }

    fn reconnect(
        &mut self,
        device: &Device,
        cluster: &Cluster,
        topic: &str,
    ) -> Result<(), ConsumerError> {
        if Instant::now() < self.retry_at {
            return Ok(());
        }
        let Err(error) = self.connect(device, cluster, topic) else {
            return Ok(());
        };
        self.retry_at = Instant::now() + RECONNECT_DELAY;
        self.has_failed = true;
        let since = self
            .outage
            .as_ref()
            .map_or_else(Instant::now, |(since, _)| *since);
        if since.elapsed() > OUTAGE_MAX {
            return Err(error);
        }
        self.outage = Some((since, error.to_string()));
        Ok(())
    }

    /// Asks for images that are needed, and posts the READs of a round.
    pub(super) fn prepare(
        &mut self,
        device: &Device,
        cluster: &Cluster,
        topic: &str,
    ) -> Result<(), ConsumerError> {
        if self.link.is_none() {
            self.reconnect(device, cluster, topic)?;
        }
        for slot in 0..self.partitions.len() {
            if let Plan::NeedsImage(offset) = self.partitions[slot].cursor.plan(device.now()) {
                self.ask_image(topic, slot, offset)?;
            }
        }
        match self.post(device) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.lose(&error.to_string());
                Ok(())
            }
        }
    }

    fn ask_image(&mut self, topic: &str, slot: usize, offset: i64) -> Result<(), ConsumerError> {
        let reading = &self.partitions[slot];
        if self.link.is_none() || reading.ask_at.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        let partition = reading.partition;
        let correlation = self.next_correlation();
        let request = ImageRequest {
            correlation,
            topic: topic.to_owned(),
            partition,
            offset,
        };
        let answer = self.ask(request.into());
        let reading = &mut self.partitions[slot];
        match answer {
            Ok(Message::ImageGrant(grant)) => {
                reading.ask_at = None;
                reading.cursor.handle_image(&Granted {
                    base_offset: grant.base_offset,
                    addr: grant.addr,
                    rkey: grant.rkey,
                    len: grant.len,
                });
            }
            // The replica does not hold the offset yet, or has it only in memory that it cannot grant.
            Err(Refusal::Error(error)) if error.code == ErrorCode::OFFSET_OUT_OF_RANGE => {
                reading.ask_at = Some(Instant::now() + PAUSE.1);
                return self.check_range(topic, partition, offset);
            }
            other => self.lose(&unexpected(other)),
        }
        Ok(())
    }

    /// Whether the offset has been removed. A replica that does not answer is lost elsewhere.
    fn check_range(
        &mut self,
        topic: &str,
        partition: u32,
        offset: i64,
    ) -> Result<(), ConsumerError> {
        let mut list = |timestamp| self.list_offset(topic, partition, timestamp);
        match list(ListOffsets::EARLIEST) {
            Ok(earliest) if offset < earliest => Err(ConsumerError::OffsetOutOfRange {
                partition,
                offset,
                earliest,
                // It may not be known for a moment.
                latest: list(ListOffsets::LATEST).unwrap_or(earliest),
            }),
            _ => Ok(()),
        }
    }

    fn post(&mut self, device: &Device) -> Result<(), transport::Error> {
        let Some(link) = &mut self.link else {
            return Ok(());
        };
        let now = device.now();
        let mut chain = link.qp.start_send();
        let count = self.partitions.len();
        let slots = (self.next_slot..count).chain(0..self.next_slot);
        self.next_slot = (self.next_slot + ROUND_MAX) % count.max(ROUND_MAX);
        for slot in slots.take(ROUND_MAX) {
            let reading = &mut self.partitions[slot];
            let Plan::Read(data) = reading.cursor.plan(now) else {
                continue;
            };
            let wr_id = 2 * slot as u64;
            let Some(entry) = reading.entry_buffer.take() else {
                continue;
            };
            chain
                .read(wr_id, entry, reading.entry, SendFlags::SIGNALED)
                .map_err(transport::Failed::into_error)?;
            link.outstanding += 1;
            reading.asked = Some(0);
            let Some(read) = data else { continue };
            let len_max = self.read_len_max as usize;
            let buffer = reading.take_data(device, read.len as usize, len_max)?;
            let remote = Remote {
                addr: read.addr,
                rkey: Rkey(read.rkey),
            };
            reading.asked = Some(buffer.len());
            chain
                .read(wr_id + 1, buffer, remote, SendFlags::SIGNALED)
                .map_err(transport::Failed::into_error)?;
            link.outstanding += 1;
        }
        if chain.is_empty() {
            Ok(())
        } else {
            chain.submit()
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.outstanding > 0)
    }

    pub(super) fn owns(&self, completion: &Completion) -> bool {
        self.link
            .as_ref()
            .is_some_and(|link| link.qp.qpn() == completion.qpn())
    }

    pub(super) fn complete(&mut self, completion: Completion) {
        let Some(link) = &mut self.link else { return };
        // A completion of an earlier queue pair with this number is refused here.
        let Ok(done) = link.qp.complete(completion) else {
            return;
        };
        link.outstanding -= 1;
        if !done.is_success() {
            self.lose(&format!("a read failed: {}", done.status));
            return;
        }
        let slot = usize::try_from(done.wr_id / 2).unwrap_or(usize::MAX);
        let Some(reading) = self.partitions.get_mut(slot) else {
            return;
        };
        match (done.wr_id % 2, done.buffer) {
            (0, buffer) => reading.entry_buffer = buffer,
            (_, Some(buffer)) => reading.give_back(buffer),
            (_, None) => {}
        }
    }

    /// Hands what was read to the cursors.
    pub(super) fn finish(
        &mut self,
        number: usize,
        device: &Device,
        ready: &mut Vec<(usize, usize, Range<usize>)>,
    ) -> Result<bool, ConsumerError> {
        let mut is_idle = true;
        for (slot, reading) in self.partitions.iter_mut().enumerate() {
            let Some(asked) = reading.asked.take() else {
                continue;
            };
            let (Some(entry), Some(data)) = (&reading.entry_buffer, &reading.data_buffer) else {
                continue;
            };
            let Some(entry) = entry.as_slice().first_chunk::<ENTRY_LEN>() else {
                continue;
            };
            let data = &data.as_slice()[..asked];
            let completed = reading
                .cursor
                .complete(device.now(), entry, data)
                .map_err(|fault| fetch_error(self.node, reading.partition, fault))?;
            is_idle &= completed.is_idle || reading.cursor.retries() > 2;
            if !completed.batches.is_empty() {
                ready.push((number, slot, completed.batches));
            }
        }
        Ok(is_idle)
    }
}

fn fetch_error(node: u32, partition: u32, fault: FetchFault) -> ConsumerError {
    match fault {
        FetchFault::BelowLogStart {
            offset,
            log_start_offset,
            high_watermark,
        } => ConsumerError::OffsetOutOfRange {
            partition,
            offset,
            earliest: log_start_offset,
            latest: high_watermark,
        },
        fault => ConsumerError::Fetch {
            node,
            partition,
            fault,
        },
    }
}

impl Reading {
    fn reset(&mut self, device: &Device) -> Result<(), transport::Error> {
        self.entry_buffer = Some(device.pd.alloc_local(ENTRY_LEN)?);
        self.data_buffer = Some(device.pd.alloc_local(READ_LEN_MIN as usize)?);
        self.rest = None;
        self.asked = None;
        self.ask_at = None;
        Ok(())
    }

    /// A buffer of `len` bytes: the front of the data buffer, which is replaced if it is too small.
    fn take_data(
        &mut self,
        device: &Device,
        len: usize,
        len_max: usize,
    ) -> Result<LocalBuffer, transport::Error> {
        let whole = match self.data_buffer.take() {
            Some(buffer) if buffer.len() >= len => buffer,
            _ => device
                .pd
                .alloc_local(len.next_power_of_two().max(len_max))?,
        };
        let (front, rest) = whole.split_at(len).map_err(transport::Failed::into_error)?;
        self.rest = Some(rest);
        Ok(front)
    }

    fn give_back(&mut self, front: LocalBuffer) {
        self.data_buffer = match self.rest.take() {
            Some(rest) => front.join(rest).ok(),
            None => Some(front),
        };
    }
}

/// Why a control request has no answer.
#[derive(Debug)]
enum Refusal {
    /// The replica says no.
    Error(ErrorReply),
    /// The connection is of no use any more.
    Lost(String),
}

impl From<ControlError> for Refusal {
    fn from(error: ControlError) -> Self {
        Self::Lost(error.to_string())
    }
}

fn ask(connection: &mut Connection, message: Message) -> Result<Message, Refusal> {
    connection.send(&message)?;
    match connection.receive_timeout(ANSWER_TIMEOUT)? {
        Some(Message::Error(error)) => Err(Refusal::Error(error)),
        Some(answer) => Ok(answer),
        None => Err(Refusal::Lost(format!(
            "no answer within {ANSWER_TIMEOUT:?}"
        ))),
    }
}

fn unexpected(answer: Result<Message, Refusal>) -> String {
    match answer {
        Ok(message) => format!("unexpected message type {}", message.kind()),
        Err(Refusal::Error(error)) => error.message,
        Err(Refusal::Lost(cause)) => cause,
    }
}
