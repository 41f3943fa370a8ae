//! Base transport header: the first 12 bytes of every packet.

use super::{Malformed, Opcode, Psn, Qpn};

/// The partition key of an unpartitioned fabric, with full membership.
pub const DEFAULT_PKEY: u16 = 0xffff;

/// Whether two partition keys may talk: same non-zero partition, at least one full member.
pub const fn pkey_matches(a: u16, b: u16) -> bool {
    const FULL: u16 = 0x8000;
    let partition = a & !FULL;
    partition != 0 && partition == b & !FULL && (a | b) & FULL != 0
}

/// Base transport header.
///
/// Reserved bits are zero when sent and ignored when received.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bth {
    /// What the packet is.
    pub opcode: Opcode,
    /// Asks the receiver to raise a solicited event; means something on a message's last packet.
    pub is_solicited: bool,
    /// MigReq: the queue pair is on its present path for good. Sent as true, ignored by receivers.
    pub is_migrated: bool,
    /// Zero bytes between payload and ICRC, 0 to 3.
    pub pad_count: u8,
    /// Partition key.
    pub pkey: u16,
    /// Forward congestion notification, set by switches.
    pub fecn: bool,
    /// Backward congestion notification.
    pub becn: bool,
    /// Queue pair the packet is for.
    pub dest_qp: Qpn,
    /// Asks the responder to acknowledge this packet.
    pub ack_req: bool,
    /// Packet sequence number.
    pub psn: Psn,
}

impl Bth {
    /// Bytes on the wire.
    pub const LEN: usize = 12;

    /// A header with the flags of an ordinary packet: migrated, default partition, nothing asked.
    pub const fn new(opcode: Opcode, dest_qp: Qpn, psn: Psn) -> Self {
        Self {
            opcode,
            is_solicited: false,
            is_migrated: true,
            pad_count: 0,
            pkey: DEFAULT_PKEY,
            fecn: false,
            becn: false,
            dest_qp,
            ack_req: false,
            psn,
        }
    }

    pub(super) fn parse(raw: &[u8; Self::LEN]) -> Result<Self, Malformed> {
        let [op, flags, k0, k1, congestion, q0, q1, q2, ack, p0, p1, p2] = *raw;
        let version = flags & 0x0f;
        if version != 0 {
            return Err(Malformed::Version(version));
        }
        Ok(Self {
            opcode: Opcode::from_u8(op).ok_or(Malformed::Opcode(op))?,
            is_solicited: flags & 0x80 != 0,
            is_migrated: flags & 0x40 != 0,
            pad_count: flags >> 4 & 3,
            pkey: u16::from_be_bytes([k0, k1]),
            fecn: congestion & 0x80 != 0,
            becn: congestion & 0x40 != 0,
            dest_qp: Qpn::from_be_bytes([q0, q1, q2]),
            ack_req: ack & 0x80 != 0,
            psn: Psn::from_be_bytes([p0, p1, p2]),
        })
    }

    pub(super) fn emit(&self, raw: &mut [u8; Self::LEN]) {
        let flags = u8::from(self.is_solicited) << 7
            | u8::from(self.is_migrated) << 6
            | (self.pad_count & 3) << 4;
        let congestion = u8::from(self.fecn) << 7 | u8::from(self.becn) << 6;
        let [k0, k1] = self.pkey.to_be_bytes();
        let [q0, q1, q2] = self.dest_qp.to_be_bytes();
        let [p0, p1, p2] = self.psn.to_be_bytes();
        let ack = u8::from(self.ack_req) << 7;
        *raw = [
            self.opcode.to_u8(),
            flags,
            k0,
            k1,
            congestion,
            q0,
            q1,
            q2,
            ack,
            p0,
            p1,
            p2,
        ];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partition_keys_match_as_measured_with_rxe() {
        assert!(pkey_matches(0xffff, 0xffff));
        assert!(pkey_matches(0xffff, 0x7fff));
        assert!(!pkey_matches(0x7fff, 0x7fff), "two limited members");
        assert!(!pkey_matches(0xffff, 0x1234));
        assert!(!pkey_matches(0x8000, 0x8000), "partition zero");
    }
}
