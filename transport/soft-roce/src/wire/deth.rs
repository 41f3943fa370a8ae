//! Datagram extended transport header: who may receive a datagram, and who sent it.

use super::Qpn;
use super::headers::u32_at;

/// Datagram extended transport header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Deth {
    /// The key that the receiving queue pair must have.
    pub qkey: u32,
    /// The queue pair that sent the packet, where an answer reaches it.
    pub src_qp: Qpn,
}

impl Deth {
    /// Bytes on the wire.
    pub const LEN: usize = 8;

    pub(super) fn parse(raw: &[u8; Self::LEN]) -> Self {
        // Byte 4 is reserved: sent as zero, ignored when received.
        let [.., q0, q1, q2] = *raw;
        Self {
            qkey: u32_at(raw, 0),
            src_qp: Qpn::from_be_bytes([q0, q1, q2]),
        }
    }

    pub(super) fn emit(&self, raw: &mut [u8; Self::LEN]) {
        let [k0, k1, k2, k3] = self.qkey.to_be_bytes();
        let [q0, q1, q2] = self.src_qp.to_be_bytes();
        *raw = [k0, k1, k2, k3, 0, q0, q1, q2];
    }
}
