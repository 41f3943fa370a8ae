//! ACK extended transport header: the responder's verdict.

use super::number::{u24_from_be_bytes, u24_to_be_bytes};

/// Why a responder refuses a request for good, or asks for it again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum NakCode {
    /// A packet is missing; the PSN of the NAK is the one expected.
    PsnSequence = 0,
    /// The operation is not allowed, not known or out of order.
    InvalidRequest = 1,
    /// The key, the range or the right does not hold.
    RemoteAccess = 2,
    /// The responder cannot complete the operation.
    RemoteOperational = 3,
    /// Reliable datagrams only.
    InvalidRdRequest = 4,
}

/// What an acknowledgement says: byte 0 of the AETH.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Syndrome {
    /// The request and all before it are done.
    Ack {
        /// Credit code, 0 to 31; 31 says that there is no end-to-end flow control.
        credit: u8,
    },
    /// No receive request was posted.
    Rnr {
        /// Code of the shortest wait before the retry, 0 to 31: see [`rnr_timer_ns`](super::rnr_timer_ns).
        timer: u8,
    },
    /// Refused.
    Nak(NakCode),
    /// A class or code without a meaning; a requester ignores it.
    Reserved(u8),
}

impl Syndrome {
    /// An ACK without end-to-end credits, the only kind this device sends.
    pub const ACK: Self = Self::Ack { credit: 0x1f };

    /// The syndrome with this byte.
    pub const fn from_u8(value: u8) -> Self {
        let code = value & 0x1f;
        match (value >> 5, code) {
            (0, _) => Self::Ack { credit: code },
            (1, _) => Self::Rnr { timer: code },
            (3, 0) => Self::Nak(NakCode::PsnSequence),
            (3, 1) => Self::Nak(NakCode::InvalidRequest),
            (3, 2) => Self::Nak(NakCode::RemoteAccess),
            (3, 3) => Self::Nak(NakCode::RemoteOperational),
            (3, 4) => Self::Nak(NakCode::InvalidRdRequest),
            _ => Self::Reserved(value),
        }
    }

    /// The byte on the wire.
    pub const fn to_u8(self) -> u8 {
        match self {
            Self::Ack { credit } => credit & 0x1f,
            Self::Rnr { timer } => 1 << 5 | timer & 0x1f,
            Self::Nak(code) => 3 << 5 | code as u8,
            Self::Reserved(value) => value,
        }
    }
}

/// ACK extended transport header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Aeth {
    /// The verdict.
    pub syndrome: Syndrome,
    /// Messages the responder has completed, modulo 2^24.
    pub msn: u32,
}

impl Aeth {
    /// Bytes on the wire.
    pub const LEN: usize = 4;

    pub(super) fn parse(raw: &[u8; Self::LEN]) -> Self {
        let [syndrome, a, b, c] = *raw;
        Self {
            syndrome: Syndrome::from_u8(syndrome),
            msn: u24_from_be_bytes([a, b, c]),
        }
    }

    pub(super) fn emit(&self, raw: &mut [u8; Self::LEN]) {
        let [a, b, c] = u24_to_be_bytes(self.msn);
        *raw = [self.syndrome.to_u8(), a, b, c];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_syndrome_byte_round_trips() {
        for value in 0..=u8::MAX {
            assert_eq!(Syndrome::from_u8(value).to_u8(), value);
        }
    }

    #[test]
    fn syndromes_have_the_meanings_rxe_gives_them() {
        assert_eq!(Syndrome::from_u8(0x1f), Syndrome::ACK);
        assert_eq!(Syndrome::from_u8(0x2c), Syndrome::Rnr { timer: 12 });
        assert_eq!(Syndrome::from_u8(0x60), Syndrome::Nak(NakCode::PsnSequence));
        assert_eq!(
            Syndrome::from_u8(0x62),
            Syndrome::Nak(NakCode::RemoteAccess)
        );
        for reserved in [0x40, 0x5f, 0x65, 0x7f, 0x80, 0xff] {
            assert_eq!(Syndrome::from_u8(reserved), Syndrome::Reserved(reserved));
        }
    }
}
