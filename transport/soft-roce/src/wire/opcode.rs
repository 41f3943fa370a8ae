//! The operations of connections, reliable or not, and of unreliable datagrams, as a table.

use bitflags::bitflags;

use super::headers::{ATOMIC_ACK_LEN, IETH_LEN, IMM_LEN};
use super::{Aeth, AtomicEth, Bth, Deth, Reth};

bitflags! {
    /// Extended headers that follow the BTH, in wire order.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct ExtHeaders: u8 {
        /// Key and sender of a datagram.
        const DETH = 1 << 6;
        /// Remote address, key and length of a WRITE or READ.
        const RETH = 1;
        /// Remote address, key and operands of an atomic.
        const ATOMIC_ETH = 1 << 1;
        /// Syndrome and message sequence number of a response.
        const AETH = 1 << 2;
        /// The value an atomic found.
        const ATOMIC_ACK = 1 << 3;
        /// Immediate data.
        const IMM = 1 << 4;
        /// Key to invalidate.
        const IETH = 1 << 5;
    }
}

impl ExtHeaders {
    /// Bytes these headers take.
    pub const fn wire_len(self) -> usize {
        let mut len = 0;
        if self.contains(Self::DETH) {
            len += Deth::LEN;
        }
        if self.contains(Self::RETH) {
            len += Reth::LEN;
        }
        if self.contains(Self::ATOMIC_ETH) {
            len += AtomicEth::LEN;
        }
        if self.contains(Self::AETH) {
            len += Aeth::LEN;
        }
        if self.contains(Self::ATOMIC_ACK) {
            len += ATOMIC_ACK_LEN;
        }
        if self.contains(Self::IMM) {
            len += IMM_LEN;
        }
        if self.contains(Self::IETH) {
            len += IETH_LEN;
        }
        len
    }
}

/// What a packet belongs to, whatever its place in the message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operation {
    /// SEND, with or without immediate or invalidate.
    Send,
    /// RDMA WRITE, with or without immediate.
    Write,
    /// RDMA READ request.
    Read,
    /// RDMA READ response.
    ReadResponse,
    /// ACK or NAK.
    Acknowledge,
    /// Answer to an atomic.
    AtomicAcknowledge,
    /// Compare and swap, or fetch and add.
    Atomic,
}

impl Operation {
    /// Whether a requester sends it; responses are the others.
    pub const fn is_request(self) -> bool {
        matches!(self, Self::Send | Self::Write | Self::Read | Self::Atomic)
    }
}

/// How many payload bytes an opcode allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PayloadLen {
    /// No payload.
    Zero,
    /// Exactly the path MTU.
    Mtu,
    /// One byte to the path MTU.
    OneToMtu,
    /// Nothing to the path MTU.
    ZeroToMtu,
}

impl PayloadLen {
    /// Whether `len` bytes are allowed at path MTU `mtu`.
    pub const fn allows(self, len: usize, mtu: usize) -> bool {
        match self {
            Self::Zero => len == 0,
            Self::Mtu => len == mtu,
            Self::OneToMtu => len >= 1 && len <= mtu,
            Self::ZeroToMtu => len <= mtu,
        }
    }
}

/// One row of the opcode table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpcodeInfo {
    /// Name as the specification writes it.
    pub name: &'static str,
    /// What the packet belongs to.
    pub operation: Operation,
    /// Headers between BTH and payload.
    pub headers: ExtHeaders,
    /// Payload bytes allowed.
    pub payload: PayloadLen,
    /// First or Only packet of its message.
    pub is_first: bool,
    /// Last or Only packet of its message.
    pub is_last: bool,
    /// The packet needs a receive request that no earlier packet of the message has taken.
    pub takes_receive: bool,
}

/// The service that a packet is part of: the top three bits of its opcode.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Transport {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Unreliable datagrams.
    Ud,
}

/// Bits of an opcode below its transport.
const TRANSPORT_SHIFT: u32 = 5;

/// Opcodes of a reliable connection.
const RC_COUNT: usize = 23;

/// Opcode of a reliable (RC) or unreliable (UC) connection, or of an unreliable datagram (UD): byte 0 of
/// the BTH.
///
/// The reserved opcodes, other transports, FLUSH and ATOMIC WRITE have no value here: such a packet
/// does not parse.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the table gives each its name and meaning")]
pub enum Opcode {
    SendFirst = 0x00,
    SendMiddle = 0x01,
    SendLast = 0x02,
    SendLastImm = 0x03,
    SendOnly = 0x04,
    SendOnlyImm = 0x05,
    WriteFirst = 0x06,
    WriteMiddle = 0x07,
    WriteLast = 0x08,
    WriteLastImm = 0x09,
    WriteOnly = 0x0a,
    WriteOnlyImm = 0x0b,
    ReadRequest = 0x0c,
    ReadResponseFirst = 0x0d,
    ReadResponseMiddle = 0x0e,
    ReadResponseLast = 0x0f,
    ReadResponseOnly = 0x10,
    Acknowledge = 0x11,
    AtomicAcknowledge = 0x12,
    CompareSwap = 0x13,
    FetchAdd = 0x14,
    SendLastInvalidate = 0x16,
    SendOnlyInvalidate = 0x17,
    UcSendFirst = 0x20,
    UcSendMiddle = 0x21,
    UcSendLast = 0x22,
    UcSendLastImm = 0x23,
    UcSendOnly = 0x24,
    UcSendOnlyImm = 0x25,
    UcWriteFirst = 0x26,
    UcWriteMiddle = 0x27,
    UcWriteLast = 0x28,
    UcWriteLastImm = 0x29,
    UcWriteOnly = 0x2a,
    UcWriteOnlyImm = 0x2b,
    UdSendOnly = 0x64,
    UdSendOnlyImm = 0x65,
}

impl Opcode {
    /// Every opcode, in the order of its number.
    pub const ALL: [Self; 37] = [
        Self::SendFirst,
        Self::SendMiddle,
        Self::SendLast,
        Self::SendLastImm,
        Self::SendOnly,
        Self::SendOnlyImm,
        Self::WriteFirst,
        Self::WriteMiddle,
        Self::WriteLast,
        Self::WriteLastImm,
        Self::WriteOnly,
        Self::WriteOnlyImm,
        Self::ReadRequest,
        Self::ReadResponseFirst,
        Self::ReadResponseMiddle,
        Self::ReadResponseLast,
        Self::ReadResponseOnly,
        Self::Acknowledge,
        Self::AtomicAcknowledge,
        Self::CompareSwap,
        Self::FetchAdd,
        Self::SendLastInvalidate,
        Self::SendOnlyInvalidate,
        Self::UcSendFirst,
        Self::UcSendMiddle,
        Self::UcSendLast,
        Self::UcSendLastImm,
        Self::UcSendOnly,
        Self::UcSendOnlyImm,
        Self::UcWriteFirst,
        Self::UcWriteMiddle,
        Self::UcWriteLast,
        Self::UcWriteLastImm,
        Self::UcWriteOnly,
        Self::UcWriteOnlyImm,
        Self::UdSendOnly,
        Self::UdSendOnlyImm,
    ];

    /// The opcode with this number, if this device knows it.
    pub const fn from_u8(value: u8) -> Option<Self> {
        // 0x15 is the only hole among the connections' opcodes.
        match value {
            0x00..=0x14 => Some(Self::ALL[value as usize]),
            0x16 => Some(Self::SendLastInvalidate),
            0x17 => Some(Self::SendOnlyInvalidate),
            0x20..=0x2b => Some(Self::ALL[value as usize - 0x20 + RC_COUNT]),
            0x64 => Some(Self::UdSendOnly),
            0x65 => Some(Self::UdSendOnlyImm),
            _ => None,
        }
    }

    /// The number on the wire.
    pub const fn to_u8(self) -> u8 {
        self as u8
    }

    /// The transport it belongs to.
    pub const fn transport(self) -> Transport {
        match self.to_u8() >> TRANSPORT_SHIFT {
            0 => Transport::Rc,
            1 => Transport::Uc,
            _ => Transport::Ud,
        }
    }

    /// What stands for this operation on an unreliable connection, if those have it.
    pub const fn on_uc(self) -> Option<Self> {
        match self.transport() {
            Transport::Rc => Self::from_u8(self.to_u8() | 1 << TRANSPORT_SHIFT),
            Transport::Uc => Some(self),
            Transport::Ud => None,
        }
    }

    /// This opcode's row of the table.
    pub const fn info(self) -> &'static OpcodeInfo {
        &TABLE[self as usize]
    }

    /// Bytes of BTH and extended headers.
    pub const fn header_len(self) -> usize {
        Bth::LEN + self.info().headers.wire_len()
    }
}

/// The rows by number. Reserved ones fill the gaps and are never looked up: no [`Opcode`] has their
/// number.
const TABLE: [OpcodeInfo; 0x66] = {
    let mut table = [RESERVED; 0x66];
    let mut number = 0;
    while number < RC_TABLE.len() {
        table[number] = RC_TABLE[number];
        number += 1;
    }
    // The same operations as on a reliable connection, in the same packets.
    number = 0;
    while number < UC_NAMES.len() {
        table[0x20 + number] = OpcodeInfo {
            name: UC_NAMES[number],
            ..RC_TABLE[number]
        };
        number += 1;
    }
    table[0x64] = row(
        "UD SEND Only",
        Operation::Send,
        ExtHeaders::DETH,
        PayloadLen::ZeroToMtu,
        F | L | W,
    );
    table[0x65] = row(
        "UD SEND Only w/ Immediate",
        Operation::Send,
        ExtHeaders::DETH.union(ExtHeaders::IMM),
        PayloadLen::ZeroToMtu,
        F | L | W,
    );
    table
};

const UC_NAMES: [&str; 12] = [
    "UC SEND First",
    "UC SEND Middle",
    "UC SEND Last",
    "UC SEND Last w/ Immediate",
    "UC SEND Only",
    "UC SEND Only w/ Immediate",
    "UC RDMA WRITE First",
    "UC RDMA WRITE Middle",
    "UC RDMA WRITE Last",
    "UC RDMA WRITE Last w/ Immediate",
    "UC RDMA WRITE Only",
    "UC RDMA WRITE Only w/ Immediate",
];

const RESERVED: OpcodeInfo = row(
    "Reserved",
    Operation::Acknowledge,
    ExtHeaders::empty(),
    PayloadLen::Zero,
    0,
);

const RC_TABLE: [OpcodeInfo; 0x18] = {
    use ExtHeaders as H;
    use Operation as O;
    use PayloadLen::{Mtu, OneToMtu, Zero, ZeroToMtu};
    const NONE: ExtHeaders = H::empty();
    const RETH_IMM: ExtHeaders = H::RETH.union(H::IMM);
    const AETH_VALUE: ExtHeaders = H::AETH.union(H::ATOMIC_ACK);
    [
        row("SEND First", O::Send, NONE, Mtu, F | W),
        row("SEND Middle", O::Send, NONE, Mtu, 0),
        row("SEND Last", O::Send, NONE, OneToMtu, L),
        row("SEND Last w/ Immediate", O::Send, H::IMM, OneToMtu, L),
        row("SEND Only", O::Send, NONE, ZeroToMtu, F | L | W),
        row(
            "SEND Only w/ Immediate",
            O::Send,
            H::IMM,
            ZeroToMtu,
            F | L | W,
        ),
        row("RDMA WRITE First", O::Write, H::RETH, Mtu, F),
        row("RDMA WRITE Middle", O::Write, NONE, Mtu, 0),
        row("RDMA WRITE Last", O::Write, NONE, OneToMtu, L),
        row(
            "RDMA WRITE Last w/ Immediate",
            O::Write,
            H::IMM,
            OneToMtu,
            L | W,
        ),
        row("RDMA WRITE Only", O::Write, H::RETH, ZeroToMtu, F | L),
        row(
            "RDMA WRITE Only w/ Immediate",
            O::Write,
            RETH_IMM,
            ZeroToMtu,
            F | L | W,
        ),
        row("RDMA READ Request", O::Read, H::RETH, Zero, F | L),
        row("RDMA READ Response First", O::ReadResponse, H::AETH, Mtu, F),
        row("RDMA READ Response Middle", O::ReadResponse, NONE, Mtu, 0),
        row(
            "RDMA READ Response Last",
            O::ReadResponse,
            H::AETH,
            OneToMtu,
            L,
        ),
        row(
            "RDMA READ Response Only",
            O::ReadResponse,
            H::AETH,
            ZeroToMtu,
            F | L,
        ),
        row("Acknowledge", O::Acknowledge, H::AETH, Zero, F | L),
        row(
            "Atomic Acknowledge",
            O::AtomicAcknowledge,
            AETH_VALUE,
            Zero,
            F | L,
        ),
        row("Compare & Swap", O::Atomic, H::ATOMIC_ETH, Zero, F | L),
        row("Fetch & Add", O::Atomic, H::ATOMIC_ETH, Zero, F | L),
        RESERVED,
        row("SEND Last w/ Invalidate", O::Send, H::IETH, OneToMtu, L),
        row(
            "SEND Only w/ Invalidate",
            O::Send,
            H::IETH,
            ZeroToMtu,
            F | L | W,
        ),
    ]
};

const F: u8 = 1; // first of its message
const L: u8 = 2; // last of its message
const W: u8 = 4; // takes a receive WQE

const fn row(
    name: &'static str,
    operation: Operation,
    headers: ExtHeaders,
    payload: PayloadLen,
    flags: u8,
) -> OpcodeInfo {
    OpcodeInfo {
        name,
        operation,
        headers,
        payload,
        is_first: flags & F != 0,
        is_last: flags & L != 0,
        takes_receive: flags & W != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_holes_are_refused() {
        for value in 0..=u8::MAX {
            let known = matches!(value, 0..=0x14 | 0x16 | 0x17 | 0x20..=0x2b | 0x64 | 0x65);
            assert_eq!(
                Opcode::from_u8(value).map(Opcode::to_u8),
                known.then_some(value)
            );
        }
        assert!(
            Opcode::ALL
                .iter()
                .all(|o| Opcode::from_u8(o.to_u8()) == Some(*o))
        );
    }

    #[test]
    fn names_tell_place_and_headers() {
        for opcode in Opcode::ALL {
            let info = opcode.info();
            let has = |word| info.name.contains(word);
            if has("First") || has("Middle") || has("Last") {
                assert_eq!(info.is_first, has("First"), "{}", info.name);
                assert_eq!(info.is_last, has("Last"), "{}", info.name);
                assert_eq!(
                    info.payload == PayloadLen::Mtu,
                    !has("Last"),
                    "{}",
                    info.name
                );
            } else {
                assert!(info.is_first && info.is_last, "{}", info.name);
            }
            assert_eq!(info.headers.contains(ExtHeaders::IMM), has("Immediate"));
            assert_eq!(info.headers.contains(ExtHeaders::IETH), has("Invalidate"));
            assert_eq!(info.headers.contains(ExtHeaders::DETH), has("UD"));
            assert_eq!(opcode.transport() == Transport::Ud, has("UD"));
            assert_eq!(opcode.transport() == Transport::Uc, has("UC"));
            let takes = info.operation == Operation::Send && info.is_first
                || info.operation == Operation::Write && has("Immediate");
            assert_eq!(info.takes_receive, takes, "{}", info.name);
        }
    }

    #[test]
    fn unreliable_connections_have_send_and_write_only() {
        for opcode in Opcode::ALL {
            let info = opcode.info();
            let has = matches!(info.operation, Operation::Send | Operation::Write)
                && opcode.transport() != Transport::Ud
                && !info.headers.contains(ExtHeaders::IETH);
            assert_eq!(opcode.on_uc().is_some(), has, "{}", info.name);
            if let Some(unreliable) = opcode.on_uc() {
                assert!(unreliable.info().name.ends_with(info.name));
                assert_eq!(unreliable.info().headers, info.headers);
            }
        }
    }

    #[test]
    fn header_lengths_are_the_specification_s() {
        let lens = Opcode::ALL.map(Opcode::header_len);
        let expected = [
            12, 12, 12, 16, 12, 16, 28, 12, 12, 16, 28, 32, 28, 16, 12, 16, 16, 16, 24, 40, 40, 16,
            16, 12, 12, 12, 16, 12, 16, 28, 12, 12, 16, 28, 32, 20, 24,
        ];
        assert_eq!(lens, expected);
    }
}
