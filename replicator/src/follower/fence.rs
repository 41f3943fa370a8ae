//! The fence: withdraw, confirm, read the own tail, report, cut, and only then grant.

use super::{Command, Fault, Follower, RETRY_DELAY_NS};
use crate::control::ErrorCode;
use crate::epoch::Cut;
use crate::faults::{self, is_injected};
use crate::image::{HeaderCrc, ImageId};
use crate::partition::Stored;
use crate::table::Tail;

/// Who may write to the partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nobody, and the log is what the last scan or cut found.
    Fenced,
    /// The leader of the session.
    Open,
    /// What was granted is being withdrawn.
    Revoking,
    /// Nobody; what has arrived is being read.
    Scanning,
    /// Nobody; the log is being cut.
    Cutting(Cut),
}

impl Follower {
    /// A follower that was a leader a moment ago. Nothing is granted, its images are read once more.
    ///
    /// `stored` is what it had when it began to lead, `images` are those it has now.
    #[must_use]
    pub fn after_leading(
        config: crate::partition::LogConfig,
        leader_epoch: i32,
        stored: Stored,
        images: impl IntoIterator<Item = ImageId>,
    ) -> Self {
        let mut follower = Self::new(config, leader_epoch, stored);
        follower
            .images
            .extend(images.into_iter().map(|id| super::Hosted {
                id,
                begin: None,
                segment_base_offset: 0,
                drained: crate::image::Mark::start(0),
                done_at: None,
            }));
        follower.granted = (leader_epoch, 0);
        follower.scan();
        follower
    }

    /// Whether nobody can write to the partition and its log is known, at this epoch.
    #[must_use]
    pub fn is_fenced_at(&self, leader_epoch: i32) -> bool {
        self.phase == Phase::Fenced && self.leader_epoch == leader_epoch
    }

    /// What it holds; exact while [`Follower::is_fenced_at`] an epoch.
    #[must_use]
    pub fn stored(&self) -> Stored {
        Stored {
            log_start_offset: self.log_start_offset,
            log_end_offset: self.log_end_offset,
            high_watermark: self.high_watermark,
            epochs: self.epochs.clone(),
            end_place: self.files.1,
        }
    }

    /// The images that are still readable, oldest first.
    pub fn image_ids(&self) -> impl Iterator<Item = ImageId> {
        self.images.iter().map(|image| image.id)
    }

    /// An epoch has begun: whoever was granted something earlier may not write any more.
    ///
    /// An epoch that is not higher than the one known changes nothing.
    pub fn fence(&mut self, leader_epoch: i32) {
        if leader_epoch > self.leader_epoch {
            self.leader_epoch = leader_epoch;
            self.close();
        }
    }

    /// Ends the session and withdraws what it was granted.
    fn close(&mut self) {
        self.session = 0;
        self.is_report_due = false;
        self.asked = None;
        self.sync_wanted = 0;
        if self.phase != Phase::Open {
            // Nothing has been granted since the last fence, or that one is still under way.
            return;
        }
        if is_injected(faults::Fault::GrantFirst) {
            self.phase = Phase::Fenced;
            self.log_end_offset = self.files.0;
            self.tail = None;
            self.is_draining = false;
        } else if is_injected(faults::Fault::NoFence) {
            self.scan();
        } else {
            self.phase = Phase::Revoking;
            self.commands.push_back(Command::Revoke);
        }
    }

    fn scan(&mut self) {
        self.phase = Phase::Scanning;
        let leader_epoch = self.granted.0;
        self.commands.push_back(Command::Scan { leader_epoch });
    }

    /// The leader of an epoch, which starts at an offset, asks on a new lane that we revoke and report. The
    /// lane before it has been destroyed.
    pub fn handle_revoke_request(
        &mut self,
        session: u64,
        (leader_epoch, epoch_start_offset): (i32, i64),
    ) {
        if leader_epoch < self.leader_epoch {
            self.refuse_epoch(leader_epoch, None);
            return;
        }
        self.leader_epoch = leader_epoch;
        self.close();
        self.session = session;
        self.next_granted = (leader_epoch, epoch_start_offset);
        self.is_report_due = true;
        self.report();
    }

    fn report(&mut self) {
        if self.phase == Phase::Fenced && std::mem::take(&mut self.is_report_due) {
            self.granted = self.next_granted;
            let report = self.epochs.report(self.log_end_offset);
            self.commands.push_back(Command::Report(report));
        }
    }

    /// What was granted is withdrawn, and nothing can arrive any more.
    pub fn handle_revoked(&mut self) {
        if self.phase == Phase::Revoking {
            self.scan();
        }
    }

    /// What was granted could not be withdrawn; it is tried again, and nothing is granted meanwhile.
    pub fn handle_revoke_failed(&mut self, now: u64) {
        self.retry_due = Some(now + RETRY_DELAY_NS);
    }

    /// The tail and the images have been read, and everything is in the files.
    pub fn handle_scanned(&mut self, now: u64, stored: Stored) {
        if self.phase != Phase::Scanning {
            return;
        }
        for image in &mut self.images {
            image.done_at.get_or_insert(now);
        }
        self.settle(stored);
    }

    /// The log is what is stored, and nobody can write to it.
    fn settle(&mut self, stored: Stored) {
        let end = stored.log_end_offset;
        self.high_watermark = self
            .high_watermark
            .max(stored.high_watermark)
            .min(end)
            .max(stored.log_start_offset);
        self.log_start_offset = stored.log_start_offset;
        self.log_end_offset = end;
        self.files = (end, stored.end_place);
        self.epochs = stored.epochs;
        self.durable = self.durable.min(end);
        self.is_draining = false;
        self.is_syncing = false;
        self.fault = None;
        self.retry_due = None;
        self.tail = None;
        // It replaces both tails of the entry, and must give way to the first one of whoever writes next,
        // whose session may be lower than those of other nodes before.
        let tail = Tail {
            image_id: ImageId::default(),
            session: 0,
            leader_epoch: self.leader_epoch,
            sequence: 0,
            log_end_offset: end,
            high_watermark: self.high_watermark,
            log_start_offset: self.log_start_offset,
            byte_position: 0,
            header_crc: HeaderCrc::default(),
            flags: 0,
        };
        self.commands.push_back(Command::WriteTail(tail));
        self.phase = Phase::Fenced;
        self.report();
    }

    /// The tail or the images could not be read. Bytes that are not a log stay so; files are tried again.
    pub fn handle_scan_failed(&mut self, now: u64, fault: Fault) {
        self.fail(now, fault);
    }

    /// The leader of the session has found where our logs part.
    pub fn handle_truncate_request(&mut self, session: u64, leader_epoch: i32, cut: Cut) {
        if self.refuse_stale(session, leader_epoch, None) {
            return;
        }
        if self.phase != Phase::Fenced {
            let cause = "the log is not fenced: revoke first".to_owned();
            self.refuse(None, ErrorCode::INVALID_REQUEST, cause);
            return;
        }
        let (Cut::TruncateTo(to) | Cut::RestartAt(to)) = cut;
        if to < self.high_watermark {
            self.commands
                .push_back(Command::Lost(to, self.high_watermark));
            self.high_watermark = to;
        }
        self.is_report_due = true;
        self.cut(match cut {
            // Nothing is left, and the leader's log starts somewhere below: its answer to our report says
            // where.
            Cut::TruncateTo(to) if to < self.log_start_offset => Cut::RestartAt(0),
            cut => cut,
        });
    }

    /// Has the log cut, and lets all images go.
    pub(super) fn cut(&mut self, cut: Cut) {
        // Also those that consumers read: what they show is not log any more.
        if !self.images.is_empty() {
            self.undescribe();
        }
        let images = self
            .images
            .drain(..)
            .map(|image| Command::Release(image.id));
        self.commands.extend(images);
        self.phase = Phase::Cutting(cut);
        self.commands.push_back(Command::Cut(cut));
    }

    /// Whether this cut is waited for.
    #[must_use]
    pub fn is_cutting(&self, cut: Cut) -> bool {
        self.phase == Phase::Cutting(cut)
    }

    /// The log has been cut.
    pub fn handle_cut(&mut self, now: u64, stored: Stored) {
        if matches!(self.phase, Phase::Cutting(_)) {
            self.settle(stored);
            if self.asked.is_some() {
                self.phase = Phase::Open;
                self.answer(now);
            }
        }
    }

    /// The log could not be cut.
    pub fn handle_cut_failed(&mut self, now: u64, fault: Fault) {
        self.fail(now, fault);
    }

    fn fail(&mut self, now: u64, fault: Fault) {
        if matches!(fault, Fault::Files(_)) {
            self.retry_due = Some(now + RETRY_DELAY_NS);
        }
        self.fault = Some(fault);
    }

    pub(super) fn retry(&mut self, now: u64) {
        if self.retry_due.is_none_or(|due| now < due) {
            return;
        }
        self.retry_due = None;
        match self.phase {
            Phase::Revoking => self.commands.push_back(Command::Revoke),
            Phase::Scanning => self.scan(),
            Phase::Cutting(cut) => self.commands.push_back(Command::Cut(cut)),
            Phase::Fenced | Phase::Open => {}
        }
    }

    /// Refuses a request of a leader that is not the present one, or of a session that we have not reported
    /// to.
    pub(super) fn refuse_stale(
        &mut self,
        session: u64,
        leader_epoch: i32,
        image_id: Option<ImageId>,
    ) -> bool {
        if leader_epoch < self.leader_epoch {
            self.refuse_epoch(leader_epoch, image_id);
            return true;
        }
        let is_reported = matches!(self.phase, Phase::Fenced | Phase::Open) && !self.is_report_due;
        let is_present = session == self.session && leader_epoch == self.granted.0 && is_reported;
        if !is_present {
            let cause = "the session has not been reported to: revoke first".to_owned();
            self.refuse(image_id, ErrorCode::INVALID_REQUEST, cause);
        }
        !is_present
    }

    fn refuse_epoch(&mut self, leader_epoch: i32, image_id: Option<ImageId>) {
        let cause = format!(
            "leader epoch {leader_epoch} is fenced: epoch {} is known here",
            self.leader_epoch
        );
        self.refuse(image_id, ErrorCode::FENCED_LEADER_EPOCH, cause);
    }

    /// The leader of the session waits until everything below `offset` is on the device; `tail` is the last
    /// one in our entry.
    pub fn handle_sync_request(&mut self, now: u64, session: u64, offset: i64, tail: Option<Tail>) {
        if self.phase == Phase::Open && session == self.session {
            self.sync_wanted = self.sync_wanted.max(offset);
            self.handle_entry(now, tail);
            self.request_sync();
        }
    }

    pub(super) fn request_sync(&mut self) {
        let (in_files, _) = self.files;
        if self.phase != Phase::Open || self.is_syncing || self.sync_wanted > in_files {
            return;
        }
        if self.durable < self.sync_wanted {
            self.is_syncing = true;
            self.commands.push_back(Command::Sync(in_files));
        }
    }

    /// Everything below `offset` is on the device: asked for by [`Command::Sync`], or as the policy has it.
    pub fn handle_synced(&mut self, offset: i64) {
        self.is_syncing = false;
        let is_news = offset > self.durable;
        self.durable = self.durable.max(offset);
        if is_news && self.phase == Phase::Open {
            self.commands.push_back(Command::Durable(self.durable));
        }
        self.request_sync();
    }

    /// The device could not be written.
    pub fn handle_sync_failed(&mut self, cause: String) {
        self.is_syncing = false;
        self.fault = Some(Fault::Files(cause));
    }

    /// Everything below this offset is on the device, as far as is known.
    #[must_use]
    pub fn durable_offset(&self) -> i64 {
        self.durable
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::{EpochCache, EpochEntry};
    use crate::image::FilePlace;
    use crate::leader::GrantAsk;
    use crate::partition::LogConfig;

    /// All members have lost their memory, and the one with most has less than this one had removed: the log
    /// cannot be cut in the middle of what is gone.
    #[test]
    fn a_cut_below_the_log_start_begins_the_log_anew() {
        let entry = EpochEntry {
            epoch: 1,
            start_offset: 60,
        };
        let stored = Stored {
            log_start_offset: 60,
            log_end_offset: 70,
            high_watermark: 65,
            epochs: EpochCache::new([entry]),
            end_place: FilePlace {
                segment_base_offset: 60,
                file_position: 1000,
            },
        };
        let mut follower = Follower::new(LogConfig::new(4096, 3 * 4096), 1, stored);
        follower.handle_revoke_request(9, (2, 55));
        assert!(matches!(follower.poll_command(), Some(Command::Report(_))));
        follower.handle_truncate_request(9, 2, Cut::TruncateTo(55));
        assert_eq!(follower.poll_command(), Some(Command::Lost(55, 65)));
        assert_eq!(
            follower.poll_command(),
            Some(Command::Cut(Cut::RestartAt(0)))
        );
        follower.handle_cut(0, Stored::empty());
        let report = std::iter::from_fn(|| follower.poll_command()).find_map(|c| match c {
            Command::Report(report) => Some(report),
            _ => None,
        });
        assert_eq!(report.map(|report| report.log_end_offset), Some(0));
    }

    /// Its files were lost below the start that its checkpoint tells, and the leader goes on in a segment that
    /// begins lower.
    #[test]
    fn an_empty_log_begins_where_a_segment_of_the_leaders_does() {
        let at = |offset| Stored {
            log_start_offset: offset,
            log_end_offset: offset,
            high_watermark: offset,
            end_place: FilePlace {
                segment_base_offset: offset,
                file_position: 0,
            },
            ..Stored::empty()
        };
        let mut follower = Follower::new(LogConfig::new(4096, 3 * 4096), 1, at(41));
        follower.handle_revoke_request(9, (2, 50));
        assert!(matches!(follower.poll_command(), Some(Command::Report(_))));
        let ask = GrantAsk {
            image_id: ImageId::new(2, 1),
            base_offset: 41,
            place: FilePlace {
                segment_base_offset: 22,
                file_position: 9000,
            },
            image_len: 4096,
        };
        follower.handle_grant_request(0, 9, 2, ask, None);
        let cut = Command::Cut(Cut::RestartAt(22));
        assert_eq!(follower.poll_command(), Some(cut));
        follower.handle_cut(0, at(22));
        let grant = std::iter::from_fn(|| follower.poll_command())
            .find(|command| matches!(command, Command::Grant { .. }));
        let expected = Command::Grant {
            image_id: ask.image_id,
            len: 0,
            log_end_offset: 22,
            byte_position: 0,
        };
        assert_eq!(grant, Some(expected), "the leader is to begin lower");
    }
}
