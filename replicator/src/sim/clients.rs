//! Producers, which append and wait or not, and consumers, which read any replica's memory.

use std::collections::BTreeSet;

use super::events::{Happening, ProcessEvent};
use super::readers::Answer;
use super::storage::IMAGE_LEN;
use super::{Site, Violation, World, demand};
use crate::consumer::{Cursor, DataRead, FetchFault, Plan};
use crate::control::Acks;
use crate::partition::CheckedBatch;
use crate::record::BatchBuilder;
use crate::table::ENTRY_LEN;

/// How long a producer waits for an answer.
const ANSWER_TIMEOUT_NS: u64 = 2_000_000_000;
const ACKS: [Acks; 3] = [Acks::Leader, Acks::Replicated, Acks::Durable];
/// Batches of a producer that wait for their answer at most.
const OUTSTANDING_MAX: usize = 6;

/// A producer's batch on its way to a leader.
#[derive(Debug)]
pub(super) struct Append {
    pub(super) partition: usize,
    pub(super) producer: usize,
    pub(super) number: u64,
    pub(super) acks: Acks,
    pub(super) batch: CheckedBatch,
}

#[derive(Debug)]
pub(super) struct Producer {
    partition: usize,
    /// `None` for now this, now that.
    acks: Option<Acks>,
    /// The node that it believes to lead.
    leader: usize,
    count: u64,
    outstanding: BTreeSet<u64>,
    waiting_since: u64,
}

/// The table entry and the data of a round, which are read one after the other.
#[derive(Debug, Default)]
struct Round {
    read: Option<DataRead>,
    is_entry_first: bool,
    entry: Option<[u8; ENTRY_LEN]>,
    data: Option<Vec<u8>>,
}

/// Where a consumer starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// With the first record that the replica has.
    Earliest,
    /// Behind the last one that it knows to be committed.
    Latest,
    /// Anywhere between, perhaps inside of a batch.
    Anywhere,
    /// At this offset, as the replica's answer to a start that was too early.
    At(i64),
}

#[derive(Debug)]
pub(super) struct Consumer {
    partition: usize,
    start: Start,
    /// `None` until a replica has said where it starts.
    cursor: Option<Cursor>,
    /// Nothing has been delivered since the start.
    is_first: bool,
    node: usize,
    /// The process that it is connected to.
    link: Option<u64>,
    round: Option<Round>,
    /// Highest watermark that it has seen.
    high_watermark: i64,
    /// Always the same replica.
    is_faithful: bool,
    pause: u64,
}

impl Producer {
    pub(super) fn new(partition: usize, acks: Option<Acks>) -> Self {
        Self {
            partition,
            acks,
            leader: 0,
            count: 0,
            outstanding: BTreeSet::new(),
            waiting_since: 0,
        }
    }
}

impl Consumer {
    pub(super) fn new(partition: usize, node: usize, is_faithful: bool, start: Start) -> Self {
        Self {
            partition,
            start,
            cursor: None,
            is_first: true,
            node,
            link: None,
            round: None,
            high_watermark: 0,
            is_faithful,
            pause: 0,
        }
    }

    pub(super) fn partition(&self) -> usize {
        self.partition
    }

    /// What it wants next, once it knows.
    pub(super) fn offset(&self) -> Option<i64> {
        self.cursor.as_ref().map(Cursor::offset)
    }

    fn site(&self) -> Site {
        Site {
            node: self.node,
            partition: self.partition,
        }
    }
}

impl World {
    /// A producer's turn.
    pub(super) fn produce(&mut self, i: usize) {
        let is_over = self.is_calm;
        let producer = &mut self.producers[i];
        if !producer.outstanding.is_empty() && self.now > producer.waiting_since + ANSWER_TIMEOUT_NS
        {
            // What became of them is not known; another node may lead.
            producer.outstanding.clear();
            producer.leader = self.rng.below(self.machines.len());
        }
        let producer = &self.producers[i];
        if !is_over && producer.outstanding.len() < OUTSTANDING_MAX {
            self.send_append(i);
        }
        if !is_over {
            let pace = self.plan.pace_ns;
            let delay = self.rng.spread(pace / 8 + 1, pace);
            self.schedule(delay, Happening::Producer { producer: i });
        }
    }

    fn send_append(&mut self, i: usize) {
        let producer = &self.producers[i];
        let to = producer.leader;
        let acks = producer.acks.unwrap_or_else(|| self.rng.pick(&ACKS));
        self.send_append_to(i, to, acks);
    }

    /// A producer sends a batch to a node.
    pub(super) fn send_append_to(&mut self, i: usize, to: usize, acks: Acks) {
        let producer = &mut self.producers[i];
        producer.count += 1;
        let (number, partition) = (producer.count, producer.partition);
        if producer.outstanding.is_empty() {
            producer.waiting_since = self.now;
        }
        producer.outstanding.insert(number);
        let batch = self.new_batch(i, number);
        let Some(process) = &self.machines[to].process else {
            return;
        };
        let to = (to, process.incarnation);
        let delay = self.plan.weather.message(&mut self.rng);
        let append = Append {
            partition,
            producer: i,
            number,
            acks,
            batch,
        };
        self.tell_later(delay, to, ProcessEvent::Append(append));
    }

    /// A batch unlike any other.
    fn new_batch(&mut self, producer: usize, number: u64) -> CheckedBatch {
        let len_max = IMAGE_LEN as usize / 2;
        let mut builder = BatchBuilder::new(len_max);
        let mut value = Vec::new();
        value.extend_from_slice(&(producer as u64).to_le_bytes());
        value.extend_from_slice(&number.to_le_bytes());
        let (len, count) = if self.plan.is_uniform {
            (self.plan.value_len_max, 1)
        } else if self.rng.chance(4) {
            (1500, 1)
        } else {
            (
                self.rng.below(self.plan.value_len_max),
                1 + self.rng.below(3),
            )
        };
        value.resize(16 + len, 0xa5);
        for _ in 0..count {
            if !builder.append(0, None, Some(&value), &[]) {
                break;
            }
        }
        CheckedBatch::new(builder.build().to_vec(), len_max).expect("it is a batch")
    }

    /// A node answers a producer.
    pub(super) fn answer(&mut self, site: Site, append: &Append, result: Result<i64, ()>) {
        let delay = self.plan.weather.message(&mut self.rng);
        let (producer, number) = (append.producer, append.number);
        self.note(|| format!("{site} answers append {number} of producer {producer}: {result:?}"));
        self.schedule(
            delay,
            Happening::Answer {
                producer,
                number,
                result,
            },
        );
    }

    pub(super) fn answered(&mut self, i: usize, number: u64, result: Result<i64, ()>) {
        let producer = &mut self.producers[i];
        if producer.outstanding.remove(&number) {
            producer.waiting_since = self.now;
        }
        match result {
            Ok(_) => self.stats.answered += 1,
            Err(()) => {
                self.stats.refused += 1;
                producer.leader = self.rng.below(self.machines.len());
            }
        }
    }

    /// A consumer's turn.
    pub(super) fn consume(&mut self, i: usize) -> Result<(), Violation> {
        let pause = self.consume_round(i)?;
        self.schedule(pause, Happening::Consumer { consumer: i });
        Ok(())
    }

    /// Does the next step; says how long to wait for the one after it.
    fn consume_round(&mut self, i: usize) -> Result<u64, Violation> {
        let site = self.consumers[i].site();
        let running = self.machines[site.node].process.as_ref();
        let incarnation = running.map(|process| process.incarnation);
        if self.consumers[i].link.is_none() || self.consumers[i].link != incarnation {
            return Ok(self.reconnect(i));
        }
        let is_paused = running.is_some_and(|process| process.is_paused);
        let now = self.now;
        if self.consumers[i].round.is_some() {
            return self.finish_round(i);
        }
        let Some(cursor) = &self.consumers[i].cursor else {
            if is_paused {
                return Ok(20_000_000);
            }
            self.begin(i);
            return Ok(1_000_000);
        };
        match cursor.plan(now) {
            Plan::NeedsImage(_) if is_paused => {
                if self.rng.chance(5) {
                    self.leave(i);
                }
                Ok(20_000_000)
            }
            Plan::NeedsImage(offset) => {
                let answer = self.grant_image(site, i, offset);
                self.note(|| format!("consumer {i} asks {site} for offset {offset}: {answer:?}"));
                self.answered_with(i, answer)
            }
            Plan::Read(read) => {
                let is_entry_first = self.rng.chance(50);
                let mut round = Round {
                    read,
                    is_entry_first,
                    ..Round::default()
                };
                if !self.read_half(i, &mut round, true) {
                    return Ok(self.lose_consumer(i));
                }
                self.consumers[i].round = Some(round);
                Ok(self.plan.weather.flight(&mut self.rng))
            }
        }
    }

    fn answered_with(&mut self, i: usize, answer: Answer) -> Result<u64, Violation> {
        match answer {
            Answer::Granted(granted) => {
                if let Some(cursor) = &mut self.consumers[i].cursor {
                    cursor.handle_image(&granted);
                }
                Ok(200_000)
            }
            Answer::NotNow => {
                if self.rng.chance(5) {
                    self.leave(i);
                }
                Ok(10_000_000)
            }
            Answer::BelowStart(log_start) => self.start_anew(i, log_start),
        }
    }

    /// A replica says where a consumer starts.
    fn begin(&mut self, i: usize) {
        let Site { node, partition } = self.consumers[i].site();
        let process = self.machines[node].process.as_mut();
        let held = &mut process.expect("it is connected to").held[partition];
        let (earliest, latest) = (held.offsets().0, held.high_watermark());
        let start = self.consumers[i].start;
        let offset = match start {
            Start::Earliest => earliest,
            Start::Latest => latest,
            Start::Anywhere => {
                let count = usize::try_from(latest - earliest).unwrap_or(0) + 1;
                earliest + i64::try_from(self.rng.below(count)).expect("a small number")
            }
            Start::At(offset) => offset,
        };
        self.note(|| format!("consumer {i} starts at node {node}: {start:?}, offset {offset}"));
        self.consumers[i].cursor = Some(Cursor::new(offset, 200, 1500));
    }

    /// What a consumer wants is gone: it goes on where the log starts.
    fn start_anew(&mut self, i: usize, log_start: i64) -> Result<u64, Violation> {
        self.note(|| format!("consumer {i} is told that the log starts at {log_start}"));
        self.check_told(i, log_start)?;
        self.stats.told += 1;
        self.restart_consumer(i, Start::At(log_start));
        Ok(1_000_000)
    }

    /// One of the two READs of a round; false if it fails.
    fn read_half(&mut self, i: usize, round: &mut Round, is_first: bool) -> bool {
        let site = self.consumers[i].site();
        if self.machines[site.node].process.is_none() {
            return false;
        }
        if is_first == round.is_entry_first {
            round.entry = Some(self.store(site).memory.entry);
        } else if let Some(read) = round.read {
            let len = read.len as usize;
            let found = self.verbs.resolve(site.node, read.rkey, read.addr, len);
            let Some((backing, at)) = found else {
                return false;
            };
            let bytes = self.bytes_of(site.node, backing);
            round.data = Some(bytes[at..at + len].to_vec());
        }
        true
    }

    fn finish_round(&mut self, i: usize) -> Result<u64, Violation> {
        let mut round = self.consumers[i].round.take().expect("it is under way");
        if !self.read_half(i, &mut round, false) {
            return Ok(self.lose_consumer(i));
        }
        let entry = round.entry.expect("both halves are read");
        let data = round.data.unwrap_or_default();
        let now = self.now;
        let consumer = &mut self.consumers[i];
        let (node, cursor) = (consumer.node, consumer.cursor.as_mut());
        let cursor = cursor.expect("a round has one");
        let before = cursor.offset();
        let completed = match cursor.complete(now, &entry, &data) {
            Ok(completed) => completed,
            Err(FetchFault::BelowLogStart {
                log_start_offset, ..
            }) => return self.start_anew(i, log_start_offset),
            Err(fault) => {
                return Err(Violation(format!("consumer {i} at node {node}: {fault}")));
            }
        };
        let batches = &data[completed.batches.clone()];

        let (after, retries) = (cursor.offset(), cursor.retries());
        let (seen, high_watermark) = (consumer.high_watermark, cursor.high_watermark());
        demand!(
            high_watermark >= seen,
            "consumer {i}: HW fell from {seen} to {high_watermark}"
        );
        consumer.high_watermark = high_watermark;
        consumer.pause = if batches.is_empty() {
            (consumer.pause * 2).clamp(50_000, 10_000_000)
        } else {
            0
        };
        let pause = if retries > 2 {
            10_000_000
        } else {
            consumer.pause
        };
        if !batches.is_empty() {
            self.note(|| format!("consumer {i} gets offsets {before} to {after} from node {node}"));
            let is_first = std::mem::take(&mut self.consumers[i].is_first);
            self.check_delivered(i, (before, is_first), after, batches)?;
        }
        let turn = self.plan.consume_ns;
        Ok(pause + self.rng.spread(turn / 8 + 1, turn))
    }

    /// Other records may be where the consumers of a partition have been: they begin again.
    pub(super) fn restart_consumers(&mut self, partition: usize) {
        for i in 0..self.consumers.len() {
            let Consumer {
                start,
                partition: its,
                ..
            } = self.consumers[i];
            if its == partition {
                self.restart_consumer(i, start);
            }
        }
    }

    /// A consumer begins again.
    pub(super) fn restart_consumer(&mut self, i: usize, start: Start) {
        self.leave(i);
        let Consumer {
            partition,
            node,
            is_faithful,
            ..
        } = self.consumers[i];
        self.consumers[i] = Consumer::new(partition, node, is_faithful, start);
    }

    /// A READ has failed, or the replica has gone.
    fn lose_consumer(&mut self, i: usize) -> u64 {
        let node = self.consumers[i].node;
        self.note(|| format!("consumer {i} loses node {node}"));
        self.leave(i);
        200_000_000
    }

    /// Gives up the link, and perhaps the replica.
    fn leave(&mut self, i: usize) {
        let site = self.consumers[i].site();
        self.forget_consumer(site, i);
        let consumer = &mut self.consumers[i];
        consumer.link = None;
        consumer.round = None;
        consumer.cursor.as_mut().map(Cursor::forget_image);
        if !consumer.is_faithful && self.rng.chance(40) {
            self.consumers[i].node = self.rng.below(self.machines.len());
        }
    }

    fn reconnect(&mut self, i: usize) -> u64 {
        if self.consumers[i].link.is_some() || self.rng.chance(20) {
            self.leave(i);
        }
        let node = self.consumers[i].node;
        if let Some(process) = &self.machines[node].process
            && !process.is_paused
        {
            self.consumers[i].link = Some(process.incarnation);
            return 1_000_000;
        }
        200_000_000
    }
}
