//! What a broker appends, and why it may not be.

use thiserror::Error;

use crate::control::ErrorCode;
use crate::partition::{self, CheckedBatch};
use crate::record::BatchBuilder;

/// Why a batch was not acknowledged.
///
/// Only after [`OutcomeUnknown`](Self::OutcomeUnknown) and [`Storage`](Self::Storage) the batch may be in
/// the log all the same; after any other it is not.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AppendError {
    /// The bytes are not one valid record batch. It is the producer's fault, and never gets better.
    #[error("{0}")]
    Invalid(String),
    /// The batch is longer than the topic takes.
    #[error("{0}")]
    TooLarge(String),
    /// The node does not lead the partition, or must not act as its leader for the moment. Ask who leads.
    #[error("{0}")]
    NotLeader(String),
    /// Fewer replicas are in sync than the topic wants. It gets better when one comes back.
    #[error("{0}")]
    NotEnoughReplicas(String),
    /// The node has no memory for the log, or too much waits for it already. Try again later.
    #[error("{0}")]
    OutOfResources(String),
    /// A [`Reservation`](super::Reservation) was over before it was committed.
    #[error("the reservation was over before it was committed")]
    Expired,
    /// The segment files are full or their device failed, so that nothing can be acknowledged as durable.
    /// The batch may be in the memory of the in-sync replicas, if it was taken before that was noticed.
    #[error("{0}")]
    Storage(String),
    /// The node has lost the leadership, or ended, after it had taken the batch and before that was
    /// acknowledged: whether the batch stays in the log, nobody can say. Read the log to find out.
    #[error("{0}")]
    OutcomeUnknown(String),
    /// The node is shutting down, or has stopped.
    #[error("{0}")]
    Stopped(String),
}

impl AppendError {
    /// Whether nothing was appended, and another attempt may succeed, perhaps at another node.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        matches!(
            self,
            Self::NotLeader(_)
                | Self::NotEnoughReplicas(_)
                | Self::OutOfResources(_)
                | Self::Expired
                | Self::Stopped(_)
        )
    }

    pub(super) fn stopped() -> Self {
        Self::Stopped("the node has stopped".to_owned())
    }

    pub(super) fn refused(code: ErrorCode, cause: String) -> Self {
        match code {
            ErrorCode::BATCH_TOO_LARGE => Self::TooLarge(cause),
            ErrorCode::NOT_LEADER => Self::NotLeader(cause),
            ErrorCode::NOT_ENOUGH_REPLICAS => Self::NotEnoughReplicas(cause),
            ErrorCode::OUT_OF_RESOURCES => Self::OutOfResources(cause),
            ErrorCode::STORAGE => Self::Storage(cause),
            ErrorCode::OUTCOME_UNKNOWN => Self::OutcomeUnknown(cause),
            ErrorCode::SHUTTING_DOWN => Self::Stopped(cause),
            _ => Self::Invalid(cause),
        }
    }
}

impl From<partition::AppendError> for AppendError {
    fn from(error: partition::AppendError) -> Self {
        Self::refused(error_code(&error), error.to_string())
    }
}

/// Why an append was refused, as a code.
pub(super) fn error_code(error: &partition::AppendError) -> ErrorCode {
    use partition::AppendError as Cause;
    match error {
        Cause::TooLarge { .. } => ErrorCode::BATCH_TOO_LARGE,
        Cause::NoImage | Cause::Reserved => ErrorCode::OUT_OF_RESOURCES,
        Cause::NotEnoughReplicas { .. } => ErrorCode::NOT_ENOUGH_REPLICAS,
        Cause::NotLeader(_) => ErrorCode::NOT_LEADER,
        _ => ErrorCode::CORRUPT_BATCH,
    }
}

/// Why an append was not even queued.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TryAppendError {
    /// The node's queue is full; here is the batch, checked already, for another attempt.
    #[error("the node's queue of appends is full")]
    Full(CheckedBatch),
    /// It was refused.
    #[error(transparent)]
    Refused(#[from] AppendError),
}

/// What can be appended as one record batch.
pub trait IntoBatch {
    /// The batch, of at most `batch_len_max` bytes and safe to be log.
    ///
    /// # Errors
    ///
    /// [`AppendError::TooLarge`], [`AppendError::Invalid`].
    fn into_batch(self, batch_len_max: usize) -> Result<CheckedBatch, AppendError>;
}

/// An encoded batch: header, CRC and every record are checked, in the thread that appends.
impl IntoBatch for Vec<u8> {
    fn into_batch(self, batch_len_max: usize) -> Result<CheckedBatch, AppendError> {
        Ok(CheckedBatch::new(self, batch_len_max)?)
    }
}

/// A batch that was checked before.
impl IntoBatch for CheckedBatch {
    fn into_batch(self, batch_len_max: usize) -> Result<CheckedBatch, AppendError> {
        let len = self.as_bytes().len();
        if len > batch_len_max {
            return Err(partition::AppendError::TooLarge { len, batch_len_max }.into());
        }
        Ok(self)
    }
}

/// The records of a builder, which is empty afterwards, unless they were refused.
impl IntoBatch for &mut BatchBuilder {
    fn into_batch(self, batch_len_max: usize) -> Result<CheckedBatch, AppendError> {
        if self.is_empty() {
            return Err(AppendError::Invalid("a batch has no record".to_owned()));
        }
        let len = self.len();
        if len > batch_len_max {
            return Err(partition::AppendError::TooLarge { len, batch_len_max }.into());
        }
        Ok(CheckedBatch::built(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder(value_len: usize) -> BatchBuilder {
        let mut builder = BatchBuilder::new(4096);
        assert!(builder.append(5, Some(b"key"), Some(&vec![b'v'; value_len]), &[]));
        builder
    }

    #[test]
    fn a_batch_is_the_same_however_it_comes() {
        let bytes = builder(100).build().to_vec();
        let checked = bytes.clone().into_batch(200).unwrap();
        assert_eq!(checked.as_bytes(), bytes);
        let mut same = builder(100);
        assert_eq!(same.into_batch(200).unwrap(), checked);
        assert!(same.is_empty());
        assert_eq!(checked.clone().into_batch(200).unwrap(), checked);
    }

    #[test]
    fn what_is_no_batch_or_too_long_is_told_apart() {
        let is_too_large = |result| matches!(result, Err(AppendError::TooLarge(_)));
        let mut long = builder(300);
        let bytes = long.build().to_vec();
        assert!(is_too_large(long.into_batch(200)) && !long.is_empty());
        assert!(is_too_large(bytes.clone().into_batch(200)));
        let checked = bytes.clone().into_batch(400).unwrap();
        assert!(is_too_large(checked.into_batch(200)));
        let is_invalid = |result| matches!(result, Err(AppendError::Invalid(_)));
        let mut damaged = bytes.clone();
        damaged[100] ^= 1;
        assert!(is_invalid(damaged.into_batch(400)));
        let two = [bytes.clone(), bytes].concat();
        assert!(is_invalid(two.into_batch(4000)));
        assert!(is_invalid(Vec::new().into_batch(400)));
        assert!(is_invalid(BatchBuilder::new(400).into_batch(400)));
    }

    #[test]
    fn who_may_try_again_knows_it() {
        let retriable = [
            ErrorCode::NOT_LEADER,
            ErrorCode::NOT_ENOUGH_REPLICAS,
            ErrorCode::OUT_OF_RESOURCES,
            ErrorCode::SHUTTING_DOWN,
        ];
        let not = [
            ErrorCode::OUTCOME_UNKNOWN,
            ErrorCode::STORAGE,
            ErrorCode::CORRUPT_BATCH,
            ErrorCode::BATCH_TOO_LARGE,
        ];
        let refused = |code| AppendError::refused(code, String::new());
        assert!(retriable.map(refused).iter().all(AppendError::is_retriable));
        assert!(!not.map(refused).iter().any(AppendError::is_retriable));
    }
}
