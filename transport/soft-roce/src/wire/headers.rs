//! All headers of one packet.

use super::{Aeth, AtomicEth, Bth, Deth, ExtHeaders, Malformed, Opcode, Psn, Qpn, Reth};

/// Bytes of an AtomicAckETH.
pub(super) const ATOMIC_ACK_LEN: usize = 8;
/// Bytes of an ImmDt.
pub(super) const IMM_LEN: usize = 4;
/// Bytes of an IETH.
pub(super) const IETH_LEN: usize = 4;

/// The BTH and the extended headers its opcode calls for.
///
/// A header is `Some` exactly when [`OpcodeInfo::headers`](super::OpcodeInfo::headers) has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers {
    /// Base transport header.
    pub bth: Bth,
    /// Key and sender of a datagram.
    pub deth: Option<Deth>,
    /// Remote range of a WRITE or READ.
    pub reth: Option<Reth>,
    /// Operands of an atomic.
    pub atomic_eth: Option<AtomicEth>,
    /// Verdict of a response.
    pub aeth: Option<Aeth>,
    /// The value an atomic found.
    pub atomic_ack: Option<u64>,
    /// Immediate data, as it stands on the wire and in `ibv_wc.imm_data`.
    pub imm: Option<[u8; 4]>,
    /// Key to invalidate.
    pub ieth: Option<u32>,
}

impl Headers {
    /// The headers of an opcode that has only a BTH, or the start of another's.
    pub const fn new(opcode: Opcode, dest_qp: Qpn, psn: Psn) -> Self {
        Self {
            bth: Bth::new(opcode, dest_qp, psn),
            deth: None,
            reth: None,
            atomic_eth: None,
            aeth: None,
            atomic_ack: None,
            imm: None,
            ieth: None,
        }
    }

    /// Bytes of all headers on the wire.
    #[allow(clippy::len_without_is_empty, reason = "headers are never empty")]
    pub const fn len(&self) -> usize {
        self.bth.opcode.header_len()
    }

    /// Writes the headers to the front of `out` and returns how many bytes they take.
    ///
    /// # Panics
    ///
    /// If `out` is shorter than [`Headers::len`], or if a header is present or absent against the
    /// opcode: both are mistakes of the sender's code.
    pub fn emit(&self, out: &mut [u8]) -> usize {
        assert_eq!(
            self.present(),
            self.bth.opcode.info().headers,
            "headers against the opcode"
        );
        let out = &mut Cursor {
            rest: &mut out[..self.len()],
        };
        self.bth.emit(out.take());
        if let Some(deth) = &self.deth {
            deth.emit(out.take());
        }
        if let Some(reth) = &self.reth {
            reth.emit(out.take());
        }
        if let Some(atomic_eth) = &self.atomic_eth {
            atomic_eth.emit(out.take());
        }
        if let Some(aeth) = &self.aeth {
            aeth.emit(out.take());
        }
        if let Some(value) = self.atomic_ack {
            *out.take() = value.to_be_bytes();
        }
        if let Some(imm) = self.imm {
            *out.take() = imm;
        }
        if let Some(rkey) = self.ieth {
            *out.take() = rkey.to_be_bytes();
        }
        self.len()
    }

    /// Reads the headers at the front of `bytes`; returns them and the bytes behind them.
    pub(super) fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let truncated = |need| Malformed::Truncated {
            need,
            have: bytes.len(),
        };
        let (raw, rest) = bytes.split_first_chunk().ok_or(truncated(Bth::LEN))?;
        let bth = Bth::parse(raw)?;
        let mut headers = Self {
            bth,
            ..Self::new(bth.opcode, bth.dest_qp, bth.psn)
        };
        let rest = headers
            .parse_extended(rest)
            .ok_or(truncated(headers.len()))?;
        Ok((headers, rest))
    }

    fn parse_extended<'a>(&mut self, mut rest: &'a [u8]) -> Option<&'a [u8]> {
        let has = self.bth.opcode.info().headers;
        if has.contains(ExtHeaders::DETH) {
            self.deth = Some(Deth::parse(take(&mut rest)?));
        }
        if has.contains(ExtHeaders::RETH) {
            self.reth = Some(Reth::parse(take(&mut rest)?));
        }
        if has.contains(ExtHeaders::ATOMIC_ETH) {
            self.atomic_eth = Some(AtomicEth::parse(take(&mut rest)?));
        }
        if has.contains(ExtHeaders::AETH) {
            self.aeth = Some(Aeth::parse(take(&mut rest)?));
        }
        if has.contains(ExtHeaders::ATOMIC_ACK) {
            self.atomic_ack = Some(u64::from_be_bytes(*take(&mut rest)?));
        }
        if has.contains(ExtHeaders::IMM) {
            self.imm = Some(*take(&mut rest)?);
        }
        if has.contains(ExtHeaders::IETH) {
            self.ieth = Some(u32::from_be_bytes(*take(&mut rest)?));
        }
        Some(rest)
    }

    fn present(&self) -> ExtHeaders {
        let mut set = ExtHeaders::empty();
        set.set(ExtHeaders::DETH, self.deth.is_some());
        set.set(ExtHeaders::RETH, self.reth.is_some());
        set.set(ExtHeaders::ATOMIC_ETH, self.atomic_eth.is_some());
        set.set(ExtHeaders::AETH, self.aeth.is_some());
        set.set(ExtHeaders::ATOMIC_ACK, self.atomic_ack.is_some());
        set.set(ExtHeaders::IMM, self.imm.is_some());
        set.set(ExtHeaders::IETH, self.ieth.is_some());
        set
    }
}

/// The part of an output buffer that is still to be written.
struct Cursor<'a> {
    rest: &'a mut [u8],
}

impl<'a> Cursor<'a> {
    fn take<const N: usize>(&mut self) -> &'a mut [u8; N] {
        let (chunk, rest) = std::mem::take(&mut self.rest)
            .split_first_chunk_mut()
            .expect("emit sliced the buffer to the sum of these headers");
        self.rest = rest;
        chunk
    }
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (chunk, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(chunk)
}

/// The big-endian `u32` at `at`, which must lie within the fixed-size header `raw`.
pub(super) fn u32_at<const N: usize>(raw: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| raw[at + i]))
}

/// The big-endian `u64` at `at`, which must lie within the fixed-size header `raw`.
pub(super) fn u64_at<const N: usize>(raw: &[u8; N], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| raw[at + i]))
}
