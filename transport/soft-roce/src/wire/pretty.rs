//! One line per packet, for traces and failing tests.

use std::fmt;

use super::{Headers, Packet, Syndrome};

impl fmt::Display for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bth = &self.bth;
        write!(
            f,
            "{} qp={} psn={}",
            bth.opcode.info().name,
            bth.dest_qp,
            bth.psn
        )?;
        if let Some(d) = &self.deth {
            write!(f, " qkey={:#x} src_qp={}", d.qkey, d.src_qp)?;
        }
        if let Some(r) = &self.reth {
            write!(
                f,
                " va={:#x} rkey={:#x} dma_len={}",
                r.va, r.rkey, r.dma_len
            )?;
        }
        if let Some(a) = &self.atomic_eth {
            write!(
                f,
                " va={:#x} rkey={:#x} swap_add={:#x}",
                a.va, a.rkey, a.swap_add
            )?;
            write!(f, " compare={:#x}", a.compare)?;
        }
        if let Some(a) = &self.aeth {
            write!(f, " {} msn={}", a.syndrome, a.msn)?;
        }
        if let Some(value) = self.atomic_ack {
            write!(f, " original={value:#x}")?;
        }
        if let Some(imm) = self.imm {
            write!(f, " imm={:#010x}", u32::from_be_bytes(imm))?;
        }
        if let Some(rkey) = self.ieth {
            write!(f, " invalidate={rkey:#x}")?;
        }
        let flags = [
            (bth.ack_req, " ack_req"),
            (bth.is_solicited, " solicited"),
            (bth.fecn, " fecn"),
            (bth.becn, " becn"),
        ];
        flags
            .iter()
            .filter(|(set, _)| *set)
            .try_for_each(|(_, name)| f.write_str(name))
    }
}

impl fmt::Display for Packet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} len={}", self.headers, self.payload.len())
    }
}

impl fmt::Display for Syndrome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ack { credit: 0x1f } => f.write_str("ack"),
            Self::Ack { credit } => write!(f, "ack credit={credit}"),
            Self::Rnr { timer } => write!(f, "rnr timer={timer}"),
            Self::Nak(code) => write!(f, "nak {code:?}"),
            Self::Reserved(value) => write!(f, "reserved syndrome={value:#04x}"),
        }
    }
}
