//! A SEND or WRITE as packets: headers, and which bytes of the message each carries.

use super::Attr;
use super::queue::SendWqe;
use crate::mr_table::Key;
use crate::wire::{Headers, Opcode, Psn, Reth};
use crate::work::{SendFlags, SendOp};

/// Headers of the packet at `psn` of a SEND or WRITE on a reliable connection.
pub(crate) fn data_headers(wqe: &SendWqe, psn: Psn, attr: &Attr) -> Headers {
    let (remote, tail) = match wqe.op {
        SendOp::Write { remote, imm } => (Some(remote), imm.map(Tail::Immediate)),
        SendOp::Send { imm } => (None, imm.map(Tail::Immediate)),
        SendOp::SendInvalidate { rkey } => (None, Some(Tail::Invalidate(rkey))),
        _ => unreachable!("the caller sends nothing else this way"),
    };
    let is_first = psn == wqe.first;
    let is_last = psn.next() == wqe.end;
    let tail = tail.filter(|_| is_last);
    let opcode = data_opcode(remote.is_some(), is_first, is_last, tail);
    let mut headers = Headers::new(opcode, attr.dest_qpn, psn);
    match tail {
        Some(Tail::Immediate(imm)) => headers.imm = Some(imm),
        Some(Tail::Invalidate(rkey)) => headers.ieth = Some(rkey.0),
        None => {}
    }
    headers.reth = remote.filter(|_| is_first).map(|remote| Reth {
        va: remote.addr,
        rkey: remote.rkey.0,
        dma_len: wqe.len,
    });
    headers.bth.is_solicited = is_last && wqe.flags.contains(SendFlags::SOLICITED);
    headers
}

/// Where the bytes of packet `psn` start in the message.
pub(crate) fn byte_offset(wqe: &SendWqe, psn: Psn, mtu: usize) -> usize {
    psn.distance(wqe.first).unsigned_abs() as usize * mtu
}

/// Where the bytes before packet `psn` end in the message.
pub(crate) fn byte_offset_after(wqe: &SendWqe, psn: Psn, mtu: usize) -> usize {
    byte_offset(wqe, psn, mtu).min(wqe.len as usize)
}

/// What the last packet of a message carries besides its data.
#[derive(Debug, Clone, Copy)]
enum Tail {
    Immediate([u8; 4]),
    Invalidate(Key),
}

fn data_opcode(is_write: bool, is_first: bool, is_last: bool, tail: Option<Tail>) -> Opcode {
    match (is_write, is_first, is_last, tail) {
        (false, true, true, None) => Opcode::SendOnly,
        (false, true, true, Some(Tail::Immediate(_))) => Opcode::SendOnlyImm,
        (false, true, true, Some(Tail::Invalidate(_))) => Opcode::SendOnlyInvalidate,
        (false, true, false, _) => Opcode::SendFirst,
        (false, false, false, _) => Opcode::SendMiddle,
        (false, false, true, None) => Opcode::SendLast,
        (false, false, true, Some(Tail::Immediate(_))) => Opcode::SendLastImm,
        (false, false, true, Some(Tail::Invalidate(_))) => Opcode::SendLastInvalidate,
        (true, true, true, None) => Opcode::WriteOnly,
        (true, true, true, Some(_)) => Opcode::WriteOnlyImm,
        (true, true, false, _) => Opcode::WriteFirst,
        (true, false, false, _) => Opcode::WriteMiddle,
        (true, false, true, None) => Opcode::WriteLast,
        (true, false, true, Some(_)) => Opcode::WriteLastImm,
    }
}
