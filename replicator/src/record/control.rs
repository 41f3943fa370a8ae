//! What a control record says.

/// The kind of a control record, read from its key.
///
/// # References
///
/// Kafka protocol guide, "Control Records"; KIP-98, KIP-595.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlRecord {
    /// The transaction of this producer ends: its records are void.
    Abort,
    /// The transaction of this producer ends: its records count.
    Commit,
    /// Another kind, such as the leader changes of a metadata log.
    Other(i16),
}

impl ControlRecord {
    /// Reads a control record's key: version and type, two bytes each.
    ///
    /// Returns `None` if the key is missing, too short, or of a negative version.
    pub fn from_key(key: Option<&[u8]>) -> Option<Self> {
        let (version, rest) = key?.split_first_chunk::<2>()?;
        let (kind, _) = rest.split_first_chunk::<2>()?;
        if i16::from_be_bytes(*version) < 0 {
            return None;
        }
        Some(match i16::from_be_bytes(*kind) {
            0 => Self::Abort,
            1 => Self::Commit,
            other => Self::Other(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let of = |key: &[u8]| ControlRecord::from_key(Some(key));
        assert_eq!(of(&[0, 0, 0, 0]), Some(ControlRecord::Abort));
        assert_eq!(of(&[0, 0, 0, 1]), Some(ControlRecord::Commit));
        assert_eq!(of(&[0, 1, 0, 2, 9]), Some(ControlRecord::Other(2)));
        assert_eq!(of(&[0xff, 0xff, 0, 1]), None);
        assert_eq!(of(&[0, 0, 0]), None);
        assert_eq!(ControlRecord::from_key(None), None);
    }
}
