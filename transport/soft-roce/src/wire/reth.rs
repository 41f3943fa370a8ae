//! RDMA extended transport header: the remote range of a WRITE or READ.

use super::headers::{u32_at, u64_at};

/// The remote range of a WRITE or READ, present in its first packet only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reth {
    /// First remote address.
    pub va: u64,
    /// Key of the remote region.
    pub rkey: u32,
    /// Bytes of the whole message.
    pub dma_len: u32,
}

impl Reth {
    /// Bytes on the wire.
    pub const LEN: usize = 16;

    pub(super) fn parse(raw: &[u8; Self::LEN]) -> Self {
        Self {
            va: u64_at(raw, 0),
            rkey: u32_at(raw, 8),
            dma_len: u32_at(raw, 12),
        }
    }

    pub(super) fn emit(&self, raw: &mut [u8; Self::LEN]) {
        raw[..8].copy_from_slice(&self.va.to_be_bytes());
        raw[8..12].copy_from_slice(&self.rkey.to_be_bytes());
        raw[12..].copy_from_slice(&self.dma_len.to_be_bytes());
    }
}
