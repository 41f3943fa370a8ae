//! Event counts of one queue pair.

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
