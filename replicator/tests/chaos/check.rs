//! What the outside may conclude: pure functions of what was sent, answered and read.

use std::collections::HashMap;
use std::fmt;

use replicator::control::Acks;
use replicator::record::BatchView;

use crate::random::Random;

/// A broken promise.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation(pub(crate) String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Fails with the text unless the claim holds.
macro_rules! demand {
    ($claim:expr, $($text:tt)+) => {
        if !$claim {
            return Err(Violation(format!($($text)+)));
        }
    };
}

/// Names a record: which append of its partition, and which record of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RecordId {
    pub(crate) append: u64,
    pub(crate) index: u32,
}

impl RecordId {
    /// The record's value: its name, and a filler that follows from it.
    pub(crate) fn value(self) -> Vec<u8> {
        let Self { append, index } = self;
        let mut value = format!("{append}.{index}.").into_bytes();
        let mut random = Random(append << 8 | u64::from(index));
        for _ in 0..random.below(64) {
            value.extend(random.next().to_le_bytes());
        }
        value
    }

    pub(crate) fn parse(value: &[u8]) -> Result<Self, Violation> {
        let mut parts = value.split(|&byte| byte == b'.');
        let mut number = || str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
        let (Some(append), Some(index)) = (number(), number()) else {
            let text = String::from_utf8_lossy(value);
            return Err(Violation(format!("{text:.30} is no value of ours")));
        };
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let id = Self { append, index };
        demand!(id.value() == value, "the value of {id} is damaged");
        Ok(id)
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {}.{}", self.append, self.index)
    }
}

/// A record where it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) offset: i64,
    pub(crate) leader_epoch: i32,
    pub(crate) id: RecordId,
}

/// The records of a batch, behind those found before.
pub(crate) fn read_batch(batch: &BatchView<'_>, found: &mut Vec<Found>) -> Result<(), Violation> {
    let (offset, leader_epoch) = (batch.base_offset(), batch.partition_leader_epoch());
    let (due, epoch) = found
        .last()
        .map_or((0, 0), |last| (last.offset + 1, last.leader_epoch));
    demand!(offset == due, "offset {offset} where {due} is due");
    demand!(
        leader_epoch >= epoch,
        "offset {offset} is of epoch {leader_epoch}, the one before of {epoch}"
    );
    let broken = |error| Violation(format!("the batch at offset {offset}: {error}"));
    batch.verify_crc().map_err(broken)?;
    for record in batch.records().map_err(broken)? {
        let record = record.map_err(broken)?;
        let due = found.last().map_or(0, |last| last.offset + 1);
        demand!(
            record.offset == due,
            "record offset {} where {due} is due",
            record.offset
        );
        let id = RecordId::parse(record.value.unwrap_or_default())?;
        found.push(Found {
            offset: record.offset,
            leader_epoch,
            id,
        });
    }
    Ok(())
}

/// A replica's segment files, by name.
pub(crate) type Files = Vec<(String, Vec<u8>)>;

/// The log that segment files hold: batches back to back from offset 0 on.
pub(crate) fn read_log(files: &Files) -> Result<Vec<Found>, Violation> {
    let mut log = Vec::new();
    for (name, bytes) in files {
        let due = log.last().map_or(0, |last: &Found| last.offset + 1);
        demand!(
            name.trim_start_matches('0') == due.to_string().trim_start_matches('0'),
            "segment {name} where offset {due} is due"
        );
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (batch, behind) =
                BatchView::parse(rest).map_err(|error| Violation(format!("{name}: {error}")))?;
            read_batch(&batch, &mut log)?;
            rest = behind;
        }
    }
    Ok(log)
}

/// All replicas have the same segments with the same bytes.
pub(crate) fn check_replicas(replicas: &[(u32, Files)]) -> Result<(), Violation> {
    let Some(((first, expected), others)) = replicas.split_first() else {
        return Ok(());
    };
    for (node, files) in others {
        let names = |files: &Files| {
            let of = |(name, bytes): &(String, Vec<u8>)| format!("{name} of {}", bytes.len());
            files.iter().map(of).collect::<Vec<_>>().join(", ")
        };
        demand!(
            names(files) == names(expected),
            "nodes {first} and {node} have other segments: {}; {}",
            names(expected),
            names(files)
        );
        for ((name, bytes), (_, expected)) in files.iter().zip(expected) {
            let differs = bytes.iter().zip(expected).position(|(a, b)| a != b);
            demand!(
                differs.is_none(),
                "nodes {first} and {node} differ in {name} at byte {}",
                differs.unwrap_or_default()
            );
        }
    }
    Ok(())
}

/// The log ends at the high watermark that its leader tells.
pub(crate) fn check_end(log: &[Found], high_watermark: Option<i64>) -> Result<(), Violation> {
    demand!(
        i64::try_from(log.len()).ok() == high_watermark,
        "the files have {} records, the high watermark is {high_watermark:?}",
        log.len()
    );
    Ok(())
}

/// What became of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Acknowledged, at this offset.
    Acknowledged(i64),
    /// Refused: it is not in the log and never will be.
    Refused,
    /// It may be in the log or not.
    Unknown,
}

/// One append of several records; its place in the history is its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) records_count: u32,
    /// It was sent to the leader of an epoch that is not below this one.
    pub(crate) leader_epoch: i32,
    pub(crate) outcome: Outcome,
}

/// Every append is in the log as its outcome says, and nothing else is. `leader_epoch` is the one in the end.
pub(crate) fn check_appends(
    acks: Acks,
    log: &[Found],
    attempts: &[Attempt],
    leader_epoch: i32,
) -> Result<(), Violation> {
    // Where each append was found: whole and in one piece, at most once.
    let mut places: Vec<Option<usize>> = vec![None; attempts.len()];
    let mut at = 0;
    while at < log.len() {
        let first = log[at].id;
        let number = usize::try_from(first.append).unwrap_or(usize::MAX);
        let Some(attempt) = attempts.get(number) else {
            return Err(Violation(format!("nobody has sent {first}")));
        };
        for index in 0..attempt.records_count {
            let found = log.get(at + index as usize).map(|found| found.id);
            let due = RecordId { index, ..first };
            demand!(
                found == Some(due),
                "{due} is due at offset {}, found is {found:?}",
                log[at].offset + i64::from(index)
            );
        }
        demand!(
            places[number].is_none(),
            "append {number} is there twice, also at offset {}",
            log[at].offset
        );
        places[number] = Some(at);
        at += attempt.records_count as usize;
    }
    for (number, (attempt, place)) in attempts.iter().zip(&places).enumerate() {
        let found = place.map(|at| log[at].offset);
        match attempt.outcome {
            Outcome::Unknown => {}
            Outcome::Refused => demand!(
                found.is_none(),
                "append {number} was refused, and is there at {found:?}"
            ),
            Outcome::Acknowledged(offset) => {
                if found == Some(offset) {
                    continue;
                }
                demand!(
                    found.is_none(),
                    "append {number} was acknowledged at {offset}, and is at {found:?}"
                );
                demand!(
                    acks == Acks::Leader,
                    "append {number}, acknowledged at {offset} as {acks:?}, is lost"
                );
                // Its leader alone has promised it: a later one may not have had it.
                demand!(
                    leader_epoch > attempt.leader_epoch,
                    "append {number}, acknowledged at {offset}, is lost, and its leader has led ever since"
                );
            }
        }
    }
    Ok(())
}

/// What a consumer has read along is the front of the log, or all of it.
pub(crate) fn check_read(log: &[Found], read: &[Found], is_all: bool) -> Result<(), Violation> {
    for (due, found) in log.iter().zip(read) {
        demand!(due == found, "read is {found:?}, the log has {due:?}");
    }
    demand!(
        read.len() <= log.len() && (!is_all || read.len() == log.len()),
        "{} records were read, the log has {}",
        read.len(),
        log.len()
    );
    Ok(())
}

/// Every record that was sent again until it was acknowledged is there, the first of each in the order in which
/// they were sent; `acknowledged` are the offsets behind the last one, as the producer was told.
pub(crate) fn check_resent(
    log: &[Found],
    sent_count: u64,
    acknowledged: Option<i64>,
) -> Result<(), Violation> {
    let mut due = 0;
    let mut last_place = HashMap::new();
    for found in log {
        let number = found.id.append;
        demand!(
            number <= due,
            "{} at offset {} comes before record {due}",
            found.id,
            found.offset
        );
        due = due.max(number + 1);
        last_place.insert(number, found.offset);
    }
    demand!(
        due == sent_count,
        "{due} of {sent_count} records are there that were sent until they were acknowledged"
    );
    let last = sent_count
        .checked_sub(1)
        .and_then(|last| last_place.get(&last));
    demand!(
        acknowledged.is_none_or(|next| last.is_some_and(|&last| last + 1 >= next)),
        "the last record is at {last:?}, acknowledged is all before {acknowledged:?}"
    );
    Ok(())
}

/// The offsets that one observer was told as committed never fall.
#[derive(Debug, Default)]
pub(crate) struct Watermark(i64);

impl Watermark {
    pub(crate) fn rise(&mut self, told: i64) -> Result<(), Violation> {
        demand!(
            told >= self.0,
            "the high watermark falls from {} to {told}",
            self.0
        );
        self.0 = told;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use replicator::record::BatchBuilder;

    use super::*;

    fn batch(base_offset: i64, leader_epoch: i32, append: u64, count: u32) -> Vec<u8> {
        let mut builder = BatchBuilder::new(1 << 16);
        for index in 0..count {
            let value = RecordId { append, index }.value();
            assert!(builder.append(1_700_000_000_000, None, Some(&value), &[]));
        }
        let mut bytes = builder.build().to_vec();
        bytes[..8].copy_from_slice(&base_offset.to_be_bytes());
        bytes[12..16].copy_from_slice(&leader_epoch.to_be_bytes());
        bytes
    }

    fn name(offset: u32) -> String {
        format!("{offset:020}")
    }

    /// Two segments: appends 0, 1 and 3 of 2, 1 and 3 records, the last one of a later epoch.
    fn files() -> Files {
        let first = [batch(0, 1, 0, 2), batch(2, 1, 1, 1)].concat();
        vec![(name(0), first), (name(3), batch(3, 4, 3, 3))]
    }

    fn attempts() -> Vec<Attempt> {
        let attempt = |records_count, outcome| Attempt {
            records_count,
            leader_epoch: 1,
            outcome,
        };
        vec![
            attempt(2, Outcome::Acknowledged(0)),
            attempt(1, Outcome::Unknown),
            attempt(5, Outcome::Refused),
            attempt(3, Outcome::Acknowledged(3)),
            attempt(1, Outcome::Unknown),
        ]
    }

    fn fails<T: fmt::Debug>(result: Result<T, Violation>, with: &str) {
        let Violation(text) = result.unwrap_err();
        assert!(text.contains(with), "{text}");
    }

    #[test]
    fn a_good_log_is_good() {
        let log = read_log(&files()).unwrap();
        assert_eq!(log.len(), 6);
        check_replicas(&[(1, files()), (2, files()), (3, files())]).unwrap();
        for acks in [Acks::Leader, Acks::Replicated, Acks::Durable] {
            check_appends(acks, &log, &attempts(), 4).unwrap();
        }
        check_end(&log, Some(6)).unwrap();
        fails(check_end(&log, Some(7)), "6 records");
        check_read(&log, &log[..4], false).unwrap();
        check_read(&log, &log, true).unwrap();
    }

    /// Every byte of a segment that is another one is noticed: by what holds for one log, or else by comparing.
    #[test]
    fn a_changed_byte_is_noticed() {
        for file in 0..2 {
            for byte in 0..files()[file].1.len() {
                let mut changed = files();
                changed[file].1[byte] ^= 0x41;
                fails(
                    check_replicas(&[(1, files()), (2, changed.clone())]),
                    "differ in",
                );
                // The epoch of the first batch may be any one that is not above the next one's.
                let is_free = byte == 15 || file == 1 && (12..16).contains(&byte);
                let log = read_log(&changed);
                assert!(is_free || log.is_err(), "file {file} byte {byte}: {log:?}");
            }
        }
    }

    #[test]
    fn a_log_with_gaps_or_falling_epochs_is_refused() {
        let of = |batches: &[Vec<u8>]| read_log(&vec![(name(0), batches.concat())]);
        fails(of(&[batch(1, 1, 0, 1)]), "offset 1 where 0 is due");
        fails(
            of(&[batch(0, 1, 0, 2), batch(3, 1, 1, 1)]),
            "offset 3 where 2 is due",
        );
        fails(
            of(&[batch(0, 1, 0, 2), batch(1, 1, 1, 1)]),
            "offset 1 where 2 is due",
        );
        fails(of(&[batch(0, 2, 0, 1), batch(1, 1, 1, 1)]), "of epoch 1");
        let mut torn = batch(0, 1, 0, 2);
        torn.truncate(torn.len() - 1);
        assert!(of(&[torn]).is_err());
        let mut renamed = files();
        renamed[1].0 = name(4);
        fails(read_log(&renamed), "where offset 3 is due");
    }

    #[test]
    fn replicas_that_differ_are_refused() {
        let mut shorter = files();
        shorter.pop();
        fails(
            check_replicas(&[(1, files()), (2, shorter)]),
            "other segments",
        );
        let mut longer = files();
        longer[1].1.push(0);
        fails(
            check_replicas(&[(1, files()), (2, files()), (3, longer)]),
            "nodes 1 and 3",
        );
    }

    #[test]
    fn lost_moved_doubled_and_unwanted_appends_are_refused() {
        let log = read_log(&files()).unwrap();
        let check = |acks, log: &[Found], number: usize, outcome| {
            let mut attempts = attempts();
            attempts[number].outcome = outcome;
            check_appends(acks, log, &attempts, 4)
        };
        let replicated = Acks::Replicated;
        // Lost at the end, and in the middle.
        fails(
            check(replicated, &log, 4, Outcome::Acknowledged(6)),
            "is lost",
        );
        fails(
            check(replicated, &log, 4, Outcome::Acknowledged(2)),
            "is lost",
        );
        fails(
            check(Acks::Durable, &log, 4, Outcome::Acknowledged(6)),
            "is lost",
        );
        fails(
            check(replicated, &log, 0, Outcome::Acknowledged(2)),
            "and is at Some(0)",
        );
        fails(check(replicated, &log, 1, Outcome::Refused), "was refused");
        // What one leader alone has promised may be lost with it, and only then.
        check(Acks::Leader, &log, 4, Outcome::Acknowledged(6)).unwrap();
        fails(
            check(Acks::Leader, &log, 0, Outcome::Acknowledged(2)),
            "and is at Some(0)",
        );
        let mut never = attempts();
        never[4].outcome = Outcome::Acknowledged(6);
        fails(
            check_appends(Acks::Leader, &log, &never, 1),
            "has led ever since",
        );

        let id = |append, index| RecordId { append, index };
        let mut doubled = log.clone();
        doubled.extend([log[0], log[1]]);
        fails(check_appends(replicated, &doubled, &attempts(), 4), "twice");
        let mut foreign = log.clone();
        foreign[2].id = id(9, 0);
        fails(
            check_appends(replicated, &foreign, &attempts(), 4),
            "nobody has sent record 9.0",
        );
        // A batch in pieces.
        fails(
            check_appends(replicated, &log[..5], &attempts(), 4),
            "record 3.2 is due",
        );
        fails(
            check_appends(replicated, &log[1..], &attempts(), 4),
            "record 0.0 is due",
        );
    }

    #[test]
    fn a_consumer_that_saw_something_else_is_refused() {
        let log = read_log(&files()).unwrap();
        fails(check_read(&log, &log[1..], false), "read is");
        fails(check_read(&log, &log[..5], true), "5 records were read");
        fails(check_read(&log[..5], &log, false), "6 records were read");
        let mut other = log.clone();
        other[4].leader_epoch = 3;
        fails(check_read(&log, &other, false), "read is");
        let twice = [&log[..2], &log[1..]].concat();
        fails(check_read(&log, &twice, false), "read is");
    }

    #[test]
    fn records_sent_again_may_be_there_twice_but_neither_lost_nor_overtaken() {
        let log = |numbers: &[u64]| -> Vec<Found> {
            let found = |(offset, &append): (usize, &u64)| Found {
                offset: i64::try_from(offset).unwrap(),
                leader_epoch: 1,
                id: RecordId { append, index: 0 },
            };
            numbers.iter().enumerate().map(found).collect()
        };
        check_resent(&log(&[0, 1, 2, 1, 2, 3]), 4, Some(6)).unwrap();
        check_resent(&[], 0, None).unwrap();
        fails(check_resent(&log(&[0, 1, 2]), 4, Some(3)), "3 of 4 records");
        fails(
            check_resent(&log(&[0, 2, 1, 2]), 3, Some(4)),
            "comes before record 1",
        );
        fails(
            check_resent(&log(&[0, 1]), 2, Some(3)),
            "acknowledged is all before",
        );
    }

    #[test]
    fn a_watermark_that_falls_is_refused() {
        let mut watermark = Watermark::default();
        watermark.rise(3).unwrap();
        watermark.rise(3).unwrap();
        fails(watermark.rise(2), "falls from 3 to 2");
    }

    #[test]
    fn values_are_ours_or_damaged() {
        let id = RecordId {
            append: 70,
            index: 3,
        };
        assert_eq!(RecordId::parse(&id.value()), Ok(id));
        fails(RecordId::parse(b"70.3.x"), "damaged");
        fails(RecordId::parse(b""), "no value of ours");
    }
}
