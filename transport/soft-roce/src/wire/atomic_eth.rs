//! Atomic extended transport header: where and with what an atomic works.

use super::headers::{u32_at, u64_at};

/// Operands of a compare and swap or a fetch and add.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AtomicEth {
    /// Remote address of the eight bytes; must be a multiple of eight.
    pub va: u64,
    /// Key of the remote region.
    pub rkey: u32,
    /// Value to store (compare and swap) or to add (fetch and add).
    pub swap_add: u64,
    /// Value to compare with; unused by fetch and add.
    pub compare: u64,
}

impl AtomicEth {
    /// Bytes on the wire.
    pub const LEN: usize = 28;

    pub(super) fn parse(raw: &[u8; Self::LEN]) -> Self {
        Self {
            va: u64_at(raw, 0),
            rkey: u32_at(raw, 8),
            swap_add: u64_at(raw, 12),
            compare: u64_at(raw, 20),
        }
    }

    pub(super) fn emit(&self, raw: &mut [u8; Self::LEN]) {
        raw[..8].copy_from_slice(&self.va.to_be_bytes());
        raw[8..12].copy_from_slice(&self.rkey.to_be_bytes());
        raw[12..20].copy_from_slice(&self.swap_add.to_be_bytes());
        raw[20..].copy_from_slice(&self.compare.to_be_bytes());
    }
}
