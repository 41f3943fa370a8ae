//! Event counts of one queue pair, or of several.

use std::ops::AddAssign;

/// What happened so far, under the names of rxe's counters where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Packets sent.
    pub sent_pkts: u64,
    /// Packets that reached the queue pair.
    pub rcvd_pkts: u64,
    /// Requests seen before.
    pub duplicate_request: u64,
    /// Requests beyond the expected PSN.
    pub out_of_seq_request: u64,
    /// RNR NAKs received.
    pub rcvd_rnr_err: u64,
    /// RNR NAKs sent.
    pub send_rnr_err: u64,
    /// Sequence NAKs received.
    pub rcvd_seq_err: u64,
    /// ACKs merged into a later response.
    pub ack_deferred: u64,
    /// Times the requester went back, for whatever reason but RNR.
    pub completer_retry_err: u64,
    /// Times the retransmission timer fired.
    pub retry_timeout: u64,
    /// Requests given up after `retry_cnt`.
    pub retry_exceeded_err: u64,
    /// Requests given up after `rnr_retry`.
    pub retry_rnr_exceeded_err: u64,
    /// Packets dropped without an answer.
    pub dropped_pkts: u64,
}

impl Counters {
    /// Each count with its name.
    pub fn named(&self) -> [(&'static str, u64); 13] {
        [
            ("sent_pkts", self.sent_pkts),
            ("rcvd_pkts", self.rcvd_pkts),
            ("duplicate_request", self.duplicate_request),
            ("out_of_seq_request", self.out_of_seq_request),
            ("rcvd_rnr_err", self.rcvd_rnr_err),
            ("send_rnr_err", self.send_rnr_err),
            ("rcvd_seq_err", self.rcvd_seq_err),
            ("ack_deferred", self.ack_deferred),
            ("completer_retry_err", self.completer_retry_err),
            ("retry_timeout", self.retry_timeout),
            ("retry_exceeded_err", self.retry_exceeded_err),
            ("retry_rnr_exceeded_err", self.retry_rnr_exceeded_err),
            ("dropped_pkts", self.dropped_pkts),
        ]
    }
}

impl AddAssign<&Counters> for Counters {
    fn add_assign(&mut self, other: &Counters) {
        self.sent_pkts += other.sent_pkts;
        self.rcvd_pkts += other.rcvd_pkts;
        self.duplicate_request += other.duplicate_request;
        self.out_of_seq_request += other.out_of_seq_request;
        self.rcvd_rnr_err += other.rcvd_rnr_err;
        self.send_rnr_err += other.send_rnr_err;
        self.rcvd_seq_err += other.rcvd_seq_err;
        self.ack_deferred += other.ack_deferred;
        self.completer_retry_err += other.completer_retry_err;
        self.retry_timeout += other.retry_timeout;
        self.retry_exceeded_err += other.retry_exceeded_err;
        self.retry_rnr_exceeded_err += other.retry_rnr_exceeded_err;
        self.dropped_pkts += other.dropped_pkts;
    }
}
