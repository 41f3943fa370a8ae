//! Did the consumer get exactly the input, each partition in order, each key in one partition?

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::channel::{Receiver, Sender, unbounded};
use replicator::record::partitioner::partition_for_key;

use super::frames::FetchedRecord;
use crate::error::CliError;
use crate::input::{KeyColumn, Lot};

/// A record on its way: a line of a lot.
#[derive(Debug)]
struct Expected {
    lot: Arc<Lot>,
    index: usize,
    key: Option<Box<[u8]>>,
    /// Number of the record in the input, from 1.
    line: u64,
}

/// Decides where each line goes and remembers it until the consumer has it.
#[derive(Debug)]
pub(crate) struct Expectations {
    keys: KeyColumn,
    partitions: Vec<Sender<Expected>>,
    next_partition: u32,
    line: u64,
    on_the_way: Arc<OnTheWay>,
}

/// Bytes sent and not yet verified, and a count that grows with every record verified.
#[derive(Debug, Default)]
pub(crate) struct OnTheWay {
    bytes: AtomicU64,
    verified: AtomicU64,
}

impl OnTheWay {
    /// Bytes of lines that are sent or about to be sent, and not verified. A bound on memory only, so
    /// no order with other memory is needed.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Records verified so far, for progress only.
    pub(crate) fn verified(&self) -> u64 {
        self.verified.load(Ordering::Relaxed)
    }
}

/// A record about to be sent.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) partition: u32,
    pub(crate) key: Option<Box<[u8]>>,
    pub(crate) index: usize,
}

/// Compares what comes back.
#[derive(Debug)]
pub(crate) struct Verifier {
    partitions: Vec<Progress>,
    /// Where each key was seen: its partition and its last line.
    keys: HashMap<Box<[u8]>, (u32, u64)>,
    on_the_way: Arc<OnTheWay>,
}

#[derive(Debug)]
struct Progress {
    expected: Receiver<Expected>,
    next_offset: i64,
}

/// What was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verified {
    pub(crate) records: u64,
    pub(crate) keys: usize,
}

/// Two ends of the same expectations: one for the sender's thread, one for the receiver's.
pub(crate) fn expectations(
    key_column: Option<usize>,
    partition_count: u32,
) -> (Expectations, Verifier, Arc<OnTheWay>) {
    let on_the_way = Arc::new(OnTheWay::default());
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..partition_count).map(|_| unbounded()).unzip();
    let expectations = Expectations {
        keys: KeyColumn::new(key_column),
        partitions: senders,
        next_partition: 0,
        line: 0,
        on_the_way: Arc::clone(&on_the_way),
    };
    let partitions = receivers
        .into_iter()
        .map(|expected| Progress {
            expected,
            next_offset: 0,
        })
        .collect();
    let verifier = Verifier {
        partitions,
        keys: HashMap::new(),
        on_the_way: Arc::clone(&on_the_way),
    };
    (expectations, verifier, on_the_way)
}

impl Expectations {
    /// Notes the lines of a lot as expected. To be called before they are sent: a record may come back
    /// before the call that sent it returns.
    /// The first `skip` lines are no records.
    pub(crate) fn plan(&mut self, lot: &Arc<Lot>, skip: usize) -> Result<Vec<Planned>, CliError> {
        let count = u32::try_from(self.partitions.len()).expect("made of a u32");
        let mut planned = Vec::new();
        self.keys.skip(skip);
        for (index, line) in lot.lines().enumerate().skip(skip) {
            self.line += 1;
            let key: Option<Box<[u8]>> = self.keys.key_of(line)?.map(|key| key.into());
            let partition = match &key {
                Some(key) => partition_for_key(key, count),
                None => {
                    let partition = self.next_partition;
                    self.next_partition = (partition + 1) % count;
                    partition
                }
            };
            self.on_the_way
                .bytes
                .fetch_add(line.len() as u64, Ordering::Relaxed);
            let expected = Expected {
                lot: Arc::clone(lot),
                index,
                key: key.clone(),
                line: self.line,
            };
            // Fails only when the verifier has given up, and then its error ends the demo.
            let _ = self.partitions[partition as usize].send(expected);
            planned.push(Planned {
                partition,
                key,
                index,
            });
        }
        Ok(planned)
    }

    /// Lines planned so far.
    pub(crate) fn line_count(&self) -> u64 {
        self.line
    }
}

impl Verifier {
    /// Compares one record with what was sent.
    pub(crate) fn check(&mut self, record: &FetchedRecord) -> Result<(), CliError> {
        let place = format!("partition {} offset {}", record.partition, record.offset);
        let wrong = |cause: String| Err(mismatch(&place, &cause));
        let Some(progress) = self.partitions.get_mut(record.partition as usize) else {
            return wrong("the topic has no such partition".to_owned());
        };
        if record.offset != progress.next_offset {
            return wrong(format!("offset {} was due", progress.next_offset));
        }
        let Ok(expected) = progress.expected.try_recv() else {
            return wrong("a record came back that was not sent".to_owned());
        };
        progress.next_offset += 1;
        let line = expected.lot.line(expected.index);
        if record.value.as_deref() != Some(line) {
            return wrong(difference(
                "value",
                expected.line,
                Some(line),
                record.value.as_deref(),
            ));
        }
        if record.key.as_deref() != expected.key.as_deref() {
            return wrong(difference(
                "key",
                expected.line,
                expected.key.as_deref(),
                record.key.as_deref(),
            ));
        }
        self.on_the_way
            .bytes
            .fetch_sub(line.len() as u64, Ordering::Relaxed);
        self.on_the_way.verified.fetch_add(1, Ordering::Relaxed);
        match expected.key {
            Some(key) => self.check_key_order(key, record.partition, expected.line, &place),
            None => Ok(()),
        }
    }

    fn check_key_order(
        &mut self,
        key: Box<[u8]>,
        partition: u32,
        line: u64,
        place: &str,
    ) -> Result<(), CliError> {
        let name = String::from_utf8_lossy(&key).into_owned();
        match self.keys.insert(key, (partition, line)) {
            Some((other, _)) if other != partition => Err(mismatch(
                place,
                &format!("key {name:?} was in partition {other} before"),
            )),
            Some((_, earlier)) if earlier >= line => Err(mismatch(
                place,
                &format!("key {name:?}: line {line} came after line {earlier}"),
            )),
            _ => Ok(()),
        }
    }

    /// Checks that nothing is left, once the consumer is done.
    pub(crate) fn finish(self) -> Result<Verified, CliError> {
        for (partition, progress) in self.partitions.iter().enumerate() {
            if let Ok(expected) = progress.expected.try_recv() {
                let place = format!("partition {partition} offset {}", progress.next_offset);
                let cause = format!(
                    "line {} and {} more did not come back",
                    expected.line,
                    progress.expected.len()
                );
                return Err(mismatch(&place, &cause));
            }
        }
        Ok(Verified {
            records: self.on_the_way.verified(),
            keys: self.keys.len(),
        })
    }
}

fn mismatch(place: &str, cause: &str) -> CliError {
    CliError::new(format!("mismatch at {place}"), cause)
        .help("this must not happen: please report it with the segment files and the logs of the nodes")
        .exit_code(CliError::MISMATCH)
}

fn difference(what: &str, line: u64, sent: Option<&[u8]>, fetched: Option<&[u8]>) -> String {
    let show = |bytes: Option<&[u8]>| match bytes {
        Some(bytes) => {
            let head = String::from_utf8_lossy(&bytes[..bytes.len().min(100)]);
            format!("{head:?} ({} bytes)", bytes.len())
        }
        None => "nothing".to_owned(),
    };
    format!(
        "the {what} of line {line} was sent as {} and came back as {}",
        show(sent),
        show(fetched)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(partition: u32, offset: i64, key: Option<&str>, value: &str) -> FetchedRecord {
        FetchedRecord {
            partition,
            offset,
            key: key.map(|key| key.as_bytes().to_vec()),
            value: Some(value.as_bytes().to_vec()),
        }
    }

    /// Three lines keyed by their first column, planned into one partition.
    fn planned() -> (Verifier, Arc<OnTheWay>) {
        let (mut expectations, verifier, on_the_way) = expectations(Some(1), 1);
        let planned = expectations
            .plan(&Arc::new(Lot::of(&["a,1", "b,2", "a,3"])), 0)
            .unwrap();
        assert_eq!(planned.len(), 3);
        assert_eq!(expectations.line_count(), 3);
        assert_eq!(on_the_way.bytes(), 9);
        (verifier, on_the_way)
    }

    fn complaint(result: Result<impl Sized, CliError>) -> String {
        format!("{:?}", result.err().expect("the verifier complains"))
    }

    #[test]
    fn the_same_records_in_order_are_accepted() {
        let (mut verifier, on_the_way) = planned();
        verifier.check(&fetched(0, 0, Some("a"), "a,1")).unwrap();
        verifier.check(&fetched(0, 1, Some("b"), "b,2")).unwrap();
        verifier.check(&fetched(0, 2, Some("a"), "a,3")).unwrap();
        assert_eq!(on_the_way.bytes(), 0);
        assert_eq!(
            verifier.finish().unwrap(),
            Verified {
                records: 3,
                keys: 2
            }
        );
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        for (record, cause) in [
            (fetched(0, 0, Some("a"), "a,2"), "the value of line 1"),
            (fetched(0, 0, Some("b"), "a,1"), "the key of line 1"),
            (fetched(0, 0, None, "a,1"), "came back as nothing"),
            (fetched(0, 1, Some("a"), "a,1"), "offset 0 was due"),
            (fetched(1, 0, Some("a"), "a,1"), "no such partition"),
        ] {
            assert!(
                complaint(planned().0.check(&record)).contains(cause),
                "{cause}"
            );
        }
    }

    #[test]
    fn a_lost_record_is_found() {
        let (mut verifier, _) = planned();
        verifier.check(&fetched(0, 0, Some("a"), "a,1")).unwrap();
        assert!(complaint(verifier.finish()).contains("line 2 and 1 more did not come back"));
    }

    #[test]
    fn a_record_too_many_is_found() {
        let (mut expectations, mut verifier, _) = expectations(None, 2);
        expectations.plan(&Arc::new(Lot::of(&["x"])), 0).unwrap();
        verifier.check(&fetched(0, 0, None, "x")).unwrap();
        assert!(complaint(verifier.check(&fetched(0, 1, None, "x"))).contains("was not sent"));
    }
}
