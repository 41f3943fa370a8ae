//! Producers, which append and wait or not, and consumers, which read any replica's memory.

use std::collections::BTreeSet;

use super::events::{Happening, ProcessEvent};
use super::storage::IMAGE_LEN;
use super::verbs::Backing;
use super::{Violation, World, demand};
use crate::consumer::{Cursor, DataRead, Plan};
use crate::control::Acks;
use crate::partition::CheckedBatch;
use crate::record::BatchBuilder;
use crate::table::ENTRY_LEN;

/// How long a producer waits for an answer.
const ANSWER_TIMEOUT_NS: u64 = 2_000_000_000;
/// Batches of a producer that wait for their answer at most.
const OUTSTANDING_MAX: usize = 6;

/// A producer's batch on its way to a leader.
#[derive(Debug)]
pub(super) struct Append {
    pub(super) producer: usize,
    pub(super) number: u64,
    pub(super) acks: Acks,
    pub(super) batch: CheckedBatch,
}

#[derive(Debug)]
pub(super) struct Producer {
    acks: Acks,
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

#[derive(Debug)]
pub(super) struct Consumer {
    cursor: Cursor,
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
    pub(super) fn new(acks: Acks) -> Self {
        Self {
            acks,
            leader: 0,
            count: 0,
            outstanding: BTreeSet::new(),
            waiting_since: 0,
        }
    }
}

impl Consumer {
    pub(super) fn new(node: usize, is_faithful: bool) -> Self {
        Self {
            cursor: Cursor::new(0, 200, 1500),
            node,
            link: None,
            round: None,
            high_watermark: 0,
            is_faithful,
            pause: 0,
        }
    }

    pub(super) fn offset(&self) -> i64 {
        self.cursor.offset()
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
        let producer = &mut self.producers[i];
        producer.count += 1;
        let (number, acks, to) = (producer.count, producer.acks, producer.leader);
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
    pub(super) fn answer(&mut self, n: usize, append: &Append, result: Result<i64, ()>) {
        let delay = self.plan.weather.message(&mut self.rng);
        let (producer, number) = (append.producer, append.number);
        self.note(|| {
            format!("node {n} answers append {number} of producer {producer}: {result:?}")
        });
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
            Err(()) => producer.leader = self.rng.below(self.machines.len()),
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
        let node = self.consumers[i].node;
        let running = self.machines[node].process.as_ref();
        let incarnation = running.map(|process| process.incarnation);
        if self.consumers[i].link.is_none() || self.consumers[i].link != incarnation {
            return Ok(self.reconnect(i));
        }
        let is_paused = running.is_some_and(|process| process.is_paused);
        let now = self.now;
        if self.consumers[i].round.is_some() {
            return self.finish_round(i);
        }
        match self.consumers[i].cursor.plan(now) {
            Plan::NeedsImage(offset) => {
                if is_paused {
                    if self.rng.chance(5) {
                        self.leave(i);
                    }
                    return Ok(20_000_000);
                }
                let granted = self.grant_image(node, i, offset);
                self.note(|| {
                    format!("consumer {i} asks node {node} for offset {offset}: {granted:?}")
                });
                match granted {
                    Some(granted) => {
                        self.consumers[i].cursor.handle_image(&granted);
                        Ok(200_000)
                    }
                    None => {
                        if self.rng.chance(5) {
                            self.leave(i);
                        }
                        Ok(10_000_000)
                    }
                }
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

    /// One of the two READs of a round; false if it fails.
    fn read_half(&mut self, i: usize, round: &mut Round, is_first: bool) -> bool {
        let node = self.consumers[i].node;
        let machine = &self.machines[node];
        let Some(process) = &machine.process else {
            return false;
        };
        if is_first == round.is_entry_first {
            round.entry = Some(machine.memory.entry);
        } else if let Some(read) = round.read {
            let found = process
                .nic
                .resolve(read.rkey, read.addr, read.len as usize, false);
            let Some((Backing::Image(id), at)) = found else {
                return false;
            };
            let image = &machine.memory.images[&id];
            round.data = Some(image.bytes[at..at + read.len as usize].to_vec());
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
        let before = consumer.cursor.offset();
        let completed = match consumer.cursor.complete(now, &entry, &data) {
            Ok(completed) => completed,
            Err(fault) => {
                let node = consumer.node;
                return Err(Violation(format!("consumer {i} at node {node}: {fault}")));
            }
        };
        let batches = &data[completed.batches.clone()];

        let (node, after) = (consumer.node, consumer.cursor.offset());
        let (seen, high_watermark) = (consumer.high_watermark, consumer.cursor.high_watermark());
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
        let retries = consumer.cursor.retries();
        let pause = if retries > 2 {
            10_000_000
        } else {
            consumer.pause
        };
        if !batches.is_empty() {
            self.note(|| format!("consumer {i} gets offsets {before} to {after} from node {node}"));
            self.check_delivered(i, before, after, batches)?;
        }
        let turn = self.plan.consume_ns;
        Ok(pause + self.rng.spread(turn / 8 + 1, turn))
    }

    /// Other records may be where consumers have been: they begin again.
    pub(super) fn restart_consumers(&mut self) {
        for i in 0..self.consumers.len() {
            self.leave(i);
            let Consumer {
                node, is_faithful, ..
            } = self.consumers[i];
            self.consumers[i] = Consumer::new(node, is_faithful);
        }
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
        let node = self.consumers[i].node;
        self.forget_consumer(node, i);
        let consumer = &mut self.consumers[i];
        consumer.link = None;
        consumer.round = None;
        consumer.cursor.forget_image();
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
            self.consumers[i].cursor.forget_image();
            return 1_000_000;
        }
        200_000_000
    }
}
