//! Which leader epoch wrote which offsets, and where two logs part.
//!
//! An [`EpochCache`] lists the epochs of a log with the offset at which each one starts. An epoch has one
//! leader, so two logs that hold the same offset of the same epoch are equal up to there: comparing the
//! lists finds the offset at which two replicas diverge without comparing records (Kafka's KIP-101 and
//! KIP-279).
//!
//! ```text
//!   leader    | epoch 1      | epoch 2   | epoch 4 ...
//!             0              100         150
//!   follower  | epoch 1      | epoch 2      | epoch 3 |
//!             0              100            170       180
//!                                        ^ newest common epoch: 2, which ends at 150 or 170: part at 150
//! ```

pub use crate::segment::EpochEntry;

/// Most entries of one [`Report`]; a log with more of them is compared in several rounds.
pub const REPORT_ENTRIES_MAX: usize = 64;

/// The epochs of a log, oldest first. Epochs rise, start offsets do not fall.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EpochCache {
    entries: Vec<EpochEntry>,
}

/// What a follower holds, as it tells a leader: its log end offset and its newest epochs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// One past its last offset.
    pub log_end_offset: i64,
    /// Its newest epochs, oldest of them first; all of them if they are fewer than
    /// [`REPORT_ENTRIES_MAX`].
    pub epochs: Vec<EpochEntry>,
}

/// What a follower has to do before its log is a prefix of its leader's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Remove everything from this offset on.
    TruncateTo(i64),
    /// Remove everything, and go on at this offset, where the leader's log starts.
    RestartAt(i64),
}

impl EpochCache {
    /// A cache of entries as a checkpoint has them.
    ///
    /// An entry that does not rise above those before it is left out, as are negative ones.
    #[must_use]
    pub fn new(entries: impl IntoIterator<Item = EpochEntry>) -> Self {
        let mut cache = Self::default();
        for entry in entries {
            let last = cache.entries.last();
            let rises = last.is_none_or(|last| {
                entry.epoch > last.epoch && entry.start_offset >= last.start_offset
            });
            if rises && entry.epoch >= 0 && entry.start_offset >= 0 {
                cache.entries.push(entry);
            }
        }
        cache
    }

    /// The entries, oldest first.
    #[must_use]
    pub fn entries(&self) -> &[EpochEntry] {
        &self.entries
    }

    /// The newest epoch.
    #[must_use]
    pub fn latest_epoch(&self) -> Option<i32> {
        self.entries.last().map(|entry| entry.epoch)
    }

    /// An epoch starts at an offset: entries that claim this offset or a later one, or an epoch as high,
    /// are void.
    pub fn assign(&mut self, epoch: i32, start_offset: i64) {
        self.entries
            .retain(|entry| entry.epoch < epoch && entry.start_offset < start_offset);
        self.entries.push(EpochEntry {
            epoch,
            start_offset,
        });
    }

    /// A batch of an epoch has been found at an offset; older epochs change nothing.
    pub fn note(&mut self, epoch: i32, base_offset: i64) {
        if self.latest_epoch().is_none_or(|latest| epoch > latest) {
            self.assign(epoch, base_offset);
        }
    }

    /// The log ends at `offset` now.
    pub fn truncate_to(&mut self, offset: i64) {
        self.entries.retain(|entry| entry.start_offset < offset);
    }

    /// The log starts at `offset` now: the epoch that holds it starts there.
    pub fn start_at(&mut self, offset: i64) {
        let before = self
            .entries
            .partition_point(|entry| entry.start_offset <= offset);
        if before > 0 {
            self.entries.drain(..before - 1);
            self.entries[0].start_offset = offset;
        }
    }

    /// The newest epoch that is not above `epoch`, and the offset at which it ends.
    ///
    /// Of the newest epoch of all that is the log end offset. `None` if every epoch here is above.
    #[must_use]
    pub fn end_offset_for(&self, epoch: i32, log_end_offset: i64) -> Option<(i32, i64)> {
        let after = self.entries.partition_point(|entry| entry.epoch <= epoch);
        let found = self.entries[..after].last()?;
        let next = self.entries.get(after);
        Some((
            found.epoch,
            next.map_or(log_end_offset, |entry| entry.start_offset),
        ))
    }

    /// What a follower is told of a log that ends at `log_end_offset`.
    #[must_use]
    pub fn report(&self, log_end_offset: i64) -> Report {
        let first = self.entries.len().saturating_sub(REPORT_ENTRIES_MAX);
        Report {
            log_end_offset,
            epochs: self.entries[first..].to_vec(),
        }
    }

    /// What a follower must cut so that its log is a prefix of ours, which has these offsets; `None` if it
    /// is one already. After a cut it reports again.
    #[must_use]
    pub fn cut_for(
        &self,
        log_start_offset: i64,
        log_end_offset: i64,
        report: &Report,
    ) -> Option<Cut> {
        let end = report.log_end_offset;
        let common = self.common_end(log_end_offset, report);
        // Nothing of what it has told is ours: what is older, if there is anything, is compared next.
        let oldest = report.epochs.first().map_or(end, |e| e.start_offset);
        let to = common.unwrap_or(oldest).min(end);
        if to < log_start_offset || to > log_end_offset {
            Some(Cut::RestartAt(log_start_offset))
        } else if to < end || self.is_foreign_at(to, report) {
            Some(Cut::TruncateTo(to))
        } else {
            None
        }
    }

    /// Whether its newest epoch, without records, is none of ours: what we send must not look older than
    /// the log it continues.
    fn is_foreign_at(&self, offset: i64, report: &Report) -> bool {
        let newest = report.epochs.last();
        newest.is_some_and(|newest| newest.start_offset >= offset && !self.entries.contains(newest))
    }

    /// Where the newest epoch that both logs have ends in the one in which it ends first.
    fn common_end(&self, log_end_offset: i64, report: &Report) -> Option<i64> {
        let mut their_end = report.log_end_offset;
        for theirs in report.epochs.iter().rev() {
            let ours = self.end_offset_for(theirs.epoch, log_end_offset);
            if let Some((_, our_end)) = ours.filter(|(epoch, _)| *epoch == theirs.epoch) {
                return Some(their_end.min(our_end));
            }
            their_end = theirs.start_offset;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cache(entries: &[(i32, i64)]) -> EpochCache {
        EpochCache::new(entries.iter().map(|&(epoch, start_offset)| EpochEntry {
            epoch,
            start_offset,
        }))
    }

    #[test]
    fn the_lookup_answers_as_kafka_does() {
        let cache = cache(&[(1, 0), (2, 100), (4, 150)]);
        assert_eq!(cache.end_offset_for(0, 200), None);
        assert_eq!(cache.end_offset_for(1, 200), Some((1, 100)));
        assert_eq!(cache.end_offset_for(3, 200), Some((2, 150)));
        assert_eq!(cache.end_offset_for(9, 200), Some((4, 200)));
    }

    #[test]
    fn the_drawing_is_right() {
        let leader = cache(&[(1, 0), (2, 100), (4, 150)]);
        let follower = cache(&[(1, 0), (2, 100), (3, 170)]);
        assert_eq!(
            leader.cut_for(0, 200, &follower.report(180)),
            Some(Cut::TruncateTo(150))
        );
        assert_eq!(leader.cut_for(0, 200, &leader.report(160)), None);
    }

    #[test]
    fn an_epoch_without_records_gives_way() {
        let mut ours = cache(&[(1, 0), (2, 100)]);
        ours.assign(3, 100);
        assert_eq!(ours, cache(&[(1, 0), (3, 100)]));
        ours.note(2, 120);
        ours.note(5, 130);
        assert_eq!(ours.latest_epoch(), Some(5));
        ours.truncate_to(130);
        assert_eq!(ours.latest_epoch(), Some(3));
    }

    /// It began to lead and was deposed before it had appended anything.
    #[test]
    fn an_epoch_without_records_is_cut() {
        let leader = cache(&[(1, 0), (3, 150)]);
        let report = cache(&[(1, 0), (2, 100)]).report(100);
        let cut = leader.cut_for(0, 200, &report);
        assert_eq!(cut, Some(Cut::TruncateTo(100)));
        assert_eq!(leader.cut_for(0, 200, &cache(&[(1, 0)]).report(100)), None);
        let present = cache(&[(1, 0), (3, 150)]).report(150);
        assert_eq!(leader.cut_for(0, 200, &present), None);
    }

    #[test]
    fn a_log_with_another_past_starts_again() {
        let leader = cache(&[(7, 1000)]);
        let report = cache(&[(3, 0)]).report(500);
        assert_eq!(
            leader.cut_for(1000, 2000, &report),
            Some(Cut::RestartAt(1000))
        );
        let empty = Report::default();
        assert_eq!(
            leader.cut_for(1000, 2000, &empty),
            Some(Cut::RestartAt(1000))
        );
        assert_eq!(leader.cut_for(0, 2000, &empty), None);
        let beyond = Report {
            log_end_offset: 9000,
            epochs: Vec::new(),
        };
        assert_eq!(
            leader.cut_for(1000, 2000, &beyond),
            Some(Cut::RestartAt(1000))
        );
    }

    #[test]
    fn the_start_moves_into_an_epoch() {
        let mut ours = cache(&[(1, 0), (2, 100), (4, 150)]);
        ours.start_at(120);
        assert_eq!(ours, cache(&[(2, 120), (4, 150)]));
        ours.start_at(150);
        assert_eq!(ours, cache(&[(4, 150)]));
    }

    /// A log as the epoch of each record.
    fn cache_of(log: &[i32]) -> EpochCache {
        let mut cache = EpochCache::default();
        for (offset, &epoch) in (0..).zip(log) {
            cache.note(epoch, offset);
        }
        cache
    }

    /// Logs as replication makes them: each epoch continues a prefix of an earlier log.
    fn logs() -> impl Strategy<Value = Vec<Vec<i32>>> {
        proptest::collection::vec(
            (any::<prop::sample::Index>(), 0..40_usize, 0..6_usize),
            1..120,
        )
        .prop_map(|leaders| {
            let mut logs: Vec<Vec<i32>> = vec![Vec::new()];
            for (epoch, (from, keep, more)) in (0..).zip(leaders) {
                let mut log = logs[from.index(logs.len())].clone();
                log.truncate(log.len().saturating_sub(keep / 4));
                log.extend(std::iter::repeat_n(epoch, more));
                logs.push(log);
            }
            logs
        })
    }

    proptest! {
        /// Whatever two logs hold, the rounds end with the longest common prefix.
        #[test]
        fn the_rounds_find_where_two_logs_part(logs in logs(), a: prop::sample::Index, b: prop::sample::Index) {
            let (ours, theirs) = (&logs[a.index(logs.len())], &logs[b.index(logs.len())]);
            let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
            let (cache, end) = (cache_of(ours), i64::try_from(ours.len()).unwrap());
            let mut theirs = theirs.clone();
            for _ in 0..8 {
                let their_end = i64::try_from(theirs.len()).unwrap();
                let report = cache_of(&theirs).report(their_end);
                match cache.cut_for(0, end, &report) {
                    Some(Cut::TruncateTo(to)) => theirs.truncate(usize::try_from(to).unwrap()),
                    Some(Cut::RestartAt(_)) => theirs.clear(),
                    None => break,
                }
            }
            prop_assert_eq!(theirs.len(), same);
        }
    }
}
