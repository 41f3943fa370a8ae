//! Datagrams of a simulation: each may be lost, and none may arrive twice, torn or at the wrong door.
//!
//! Each node may have one queue pair for datagrams, its mailbox. A letter starts with its number, by which
//! the receiver's completion is held against what was sent.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;

use super::build::PD;
use super::receives::{RECEIVE, Receives};
use super::work::{SLOTS, pieces};
use super::{Node, Violation, World};
use crate::device::Service;
use crate::mr_table::Key;
use crate::qp::{Attr, Mtu, QpConfig};
use crate::ud::Port;
use crate::virtual_device::UD_STEPS;
use crate::wire::{GRH_LEN, Psn, Qpn};
use crate::work::{Data, Destination, SendFlags, SendOp, SendWr, Sge, Wc, WcOpcode, WcStatus};

/// Bytes of the longest letter, which is what a mailbox's port carries.
pub(super) const LETTER_MAX: usize = 1024;
/// Bytes of a receive buffer.
pub(super) const BUFFER_LEN: usize = GRH_LEN + LETTER_MAX;

/// A queue pair for datagrams.
pub(super) struct Mailbox {
    pub(super) qpn: Qpn,
    /// What letters must carry to be let in.
    qkey: u32,
    sources: usize,
    pub(super) receives: Receives,
    pub(super) is_shared: bool,
    pub(super) cqs: [usize; 2],
    /// A completion queue has overrun: nobody learns what becomes of its requests.
    pub(super) is_unheard: bool,
    posted: u64,
    pending: VecDeque<Sent>,
}

/// A send request that has not completed.
#[derive(Clone, Copy, Debug)]
struct Sent {
    wr_id: u64,
    is_signaled: bool,
    len: usize,
}

/// A datagram that somebody has sent.
pub(super) struct Letter {
    from: usize,
    to: usize,
    /// With its number in front.
    bytes: Vec<u8>,
    imm: Option<[u8; 4]>,
    is_solicited: bool,
    /// It has the right key.
    is_welcome: bool,
    has_arrived: bool,
}

impl Mailbox {
    pub(super) fn new(sources: usize, receives: usize, is_shared: bool) -> Self {
        Self {
            qpn: Qpn::new(0),
            qkey: 0,
            sources,
            receives: Receives::new(receives, BUFFER_LEN),
            is_shared,
            cqs: [0; 2],
            is_unheard: false,
            posted: 0,
            pending: VecDeque::new(),
        }
    }

    /// Bytes of its send buffers.
    pub(super) const SOURCES_LEN: usize = SLOTS * LETTER_MAX;
    /// Bytes of its receive buffers.
    pub(super) const RECEIVES_LEN: usize = SLOTS * BUFFER_LEN.next_multiple_of(8);

    /// Expects no more of what has not completed, if its completions may be lost.
    pub(super) fn abandon(&mut self, node: &mut Node) {
        if self.is_unheard {
            self.pending.clear();
            self.receives
                .outstanding()
                .for_each(|buffer| node.adopt(buffer));
            self.receives.forget();
        }
    }

    fn source_slot(&self, wr_id: u64, len: usize) -> Range<usize> {
        let index = usize::try_from(wr_id).expect("few letters") % SLOTS;
        let start = self.sources + index * LETTER_MAX;
        start..start + len
    }
}

impl World {
    /// Creates the queue pair of node `n`'s mailbox.
    pub(super) fn open_mailbox(&mut self, n: usize, config: QpConfig, cqs: [usize; 2]) {
        let address = self.address(n);
        let node = &mut self.nodes[n];
        let Some(mailbox) = &mut node.mailbox else {
            return;
        };
        let srq = node.pool.as_ref().map(|pool| pool.srq);
        let config = QpConfig {
            srq: srq.filter(|_| mailbox.is_shared),
            ..config
        };
        let service = Service::Ud(Port {
            address,
            mtu: Mtu::Mtu1024,
        });
        let [send_cq, recv_cq] = cqs.map(|cq| &node.cqs[cq]);
        let qpn = node.device.create_qp(service, config, send_cq, recv_cq);
        // Not 2^31 and above, which stands for the sender's own.
        mailbox.qkey = u32::try_from(self.rng.below(1 << 31)).expect("below 2^31");
        mailbox.qpn = qpn;
        mailbox.cqs = cqs;
        let attr = Attr {
            qkey: mailbox.qkey,
            sq_psn: Psn::new(0xff_fff8),
            ..Attr::default()
        };
        node.device.connect(qpn, &attr, &UD_STEPS);
    }

    /// Posts receives for node `n`'s mailbox until `target` wait, or there is no room.
    pub(super) fn post_mailbox(&mut self, n: usize, target: usize) {
        let node = &mut self.nodes[n];
        let Some(mailbox) = usable(&mut node.mailbox, node.is_alive) else {
            return;
        };
        if mailbox.is_shared {
            return self.post_shared(n, target);
        }
        mailbox.receives.post(
            &mut node.device,
            mailbox.qpn,
            node.local_key,
            &mut self.rng,
            target,
        );
        self.serve(n);
    }

    /// Sends a random letter from node `n`, if there is room.
    pub(super) fn post_letter(&mut self, n: usize) {
        let to = self.rng.below(self.nodes.len());
        let is_welcome = !self.rng.chance(10);
        self.send_letter(n, to, is_welcome);
    }

    fn send_letter(&mut self, n: usize, to: usize, is_welcome: bool) {
        let address = self.address(to);
        let Some((qpn, qkey)) = self.nodes[to].mailbox.as_ref().map(|m| (m.qpn, m.qkey)) else {
            return;
        };
        let number = self.letters.len() as u64;
        let node = &mut self.nodes[n];
        let Some(mailbox) = usable(&mut node.mailbox, node.is_alive) else {
            return;
        };
        if mailbox.pending.len() == SLOTS {
            return;
        }
        let rng = &mut self.rng;
        let mut bytes = number.to_le_bytes().to_vec();
        let more = rng.below(LETTER_MAX - bytes.len() + 1);
        bytes.extend(rng.bytes(more));
        let imm = rng.chance(40).then_some([1, 2, 3, number.to_le_bytes()[0]]);
        let wr_id = mailbox.posted;
        let is_signaled = rng.chance(70) || mailbox.pending.len() + 2 >= SLOTS;
        let is_solicited = rng.chance(20);
        let mut flags = SendFlags::empty();
        flags.set(SendFlags::SIGNALED, is_signaled);
        flags.set(SendFlags::SOLICITED, is_solicited);
        let at = mailbox.source_slot(wr_id, bytes.len());
        let to_whom = Destination {
            pd: PD,
            address,
            qpn,
            qkey: if is_welcome { qkey } else { qkey ^ 1 },
        };
        mailbox.posted += 1;
        mailbox.pending.push_back(Sent {
            wr_id,
            is_signaled,
            len: bytes.len(),
        });
        let from_qpn = mailbox.qpn;
        let local_key: Key = node.local_key;
        let sges: Vec<Sge> = pieces(rng, at.start, at.len())
            .map(|(at, len)| node.device.sge(at, len, local_key))
            .collect();
        node.set(at.start, &bytes);
        let wr = SendWr {
            wr_id,
            op: SendOp::Datagram { to: to_whom, imm },
            data: Data::Gather(&sges),
            flags,
        };
        let posted = node.device.engine.post_send(from_qpn, &wr);
        posted.expect("there is room, and the request is well formed");
        self.letters.push(Letter {
            from: n,
            to,
            bytes,
            imm,
            is_solicited,
            is_welcome,
            has_arrived: false,
        });
        self.serve(n);
    }

    /// A completion of node `n`'s mailbox.
    pub(super) fn judge_letter(&mut self, n: usize, wc: &Wc) -> Result<(), Violation> {
        if wc.wr_id & RECEIVE == 0 {
            return self.judge_sent_letter(n, wc);
        }
        self.judge_received_letter(n, wc)
    }

    /// Letters are complete when they are sent, in order, and never fail.
    fn judge_sent_letter(&mut self, n: usize, wc: &Wc) -> Result<(), Violation> {
        let mailbox = self.nodes[n].mailbox.as_mut();
        let mailbox = mailbox.expect("the completion is its");
        let is_flushed = mailbox.is_unheard && wc.status == WcStatus::WrFlushErr;
        let pending = &mut mailbox.pending;
        let sent = loop {
            let Some(sent) = pending.pop_front() else {
                return Err(Violation("a completion too many".into()));
            };
            if sent.wr_id == wc.wr_id {
                break sent;
            }
            demand!(!sent.is_signaled, "letter {} comes first", sent.wr_id);
        };
        if is_flushed {
            return Ok(());
        }
        let told = (wc.status, wc.opcode, wc.byte_len as usize);
        let right = (WcStatus::Success, WcOpcode::Send, sent.len);
        demand!(
            sent.is_signaled && told == right,
            "it should be signalled, and {right:?}"
        );
        Ok(())
    }

    fn judge_received_letter(&mut self, n: usize, wc: &Wc) -> Result<(), Violation> {
        let node = &mut self.nodes[n];
        let mailbox = node.mailbox.as_mut().expect("the completion is its");
        let taken = match (&mut node.pool, mailbox.is_shared) {
            (Some(pool), true) => pool.finish(wc.wr_id),
            _ => mailbox.receives.finish(wc.wr_id),
        };
        let Some(buffer) = taken else {
            return Err(Violation("another receive should have completed".into()));
        };
        if mailbox.is_unheard && wc.status == WcStatus::WrFlushErr {
            return Ok(());
        }
        let len = wc.byte_len as usize;
        demand!(
            wc.status == WcStatus::Success && (GRH_LEN + 8..=buffer.len()).contains(&len),
            "it is no letter"
        );
        let at = buffer.start..buffer.start + len;
        let found = node.device.read(at.clone());
        node.model[at].copy_from_slice(&found);
        let (header, body) = found.split_at(GRH_LEN);
        let number = usize::try_from(u64::from_le_bytes(body[..8].try_into().expect("8 bytes")));
        let letters = &mut self.letters;
        let Some(letter) = number.ok().and_then(|number| letters.get_mut(number)) else {
            return Err(Violation("a letter that nobody wrote".into()));
        };
        demand!(
            letter.to == n && letter.is_welcome,
            "it was not for this mailbox"
        );
        demand!(
            !std::mem::replace(&mut letter.has_arrived, true),
            "it comes twice"
        );
        demand!(letter.bytes == body, "it is torn");
        let (from, imm, is_solicited) = (letter.from, letter.imm, letter.is_solicited);
        let sender = self.nodes[from].mailbox.as_ref().map(|from| from.qpn);
        let told = (wc.imm, wc.is_solicited, Some(wc.src_qp), wc.has_grh);
        let right = (imm, is_solicited, sender, true);
        demand!(told == right, "it should be {right:?}");
        let packet_len = headers_len(imm) + body.len().next_multiple_of(4);
        demand!(
            is_ip_header(header, [self.address(from), self.address(n)], packet_len),
            "its header is not that of its packet"
        );
        self.stats.letters_received += 1;
        Ok(())
    }

    /// When all is at rest and the air still, each letter arrives.
    pub(super) fn send_last_letters(&mut self) -> Result<(), Violation> {
        self.net.calm();
        let first = self.letters.len();
        for n in 0..self.nodes.len() {
            for to in 0..self.nodes.len() {
                self.post_mailbox(to, SLOTS);
                self.send_letter(n, to, true);
            }
        }
        self.pass_until(u64::MAX)?;
        for n in 0..self.nodes.len() {
            self.poll(n)?;
        }
        // Not if one of the two has meanwhile been ended by an overrun completion queue.
        let nodes = &mut self.nodes;
        let mut is_usable = |n: usize| {
            let node = &mut nodes[n];
            usable(&mut node.mailbox, node.is_alive).is_some()
        };
        for letter in &self.letters[first..] {
            let is_due = is_usable(letter.from) && is_usable(letter.to);
            demand!(
                letter.has_arrived || !is_due,
                "a letter from node {} to node {} is lost in still air",
                letter.from,
                letter.to
            );
        }
        Ok(())
    }
}

fn usable(mailbox: &mut Option<Mailbox>, is_alive: bool) -> Option<&mut Mailbox> {
    mailbox.as_mut().filter(|it| is_alive && !it.is_unheard)
}

/// BTH, DETH, immediate and ICRC.
fn headers_len(imm: Option<[u8; 4]>) -> usize {
    12 + 8 + if imm.is_some() { 4 } else { 0 } + 4
}

/// Whether the last 20 of these 40 bytes are the IPv4 header of a packet of this length.
fn is_ip_header(header: &[u8], [from, to]: [IpAddr; 2], packet_len: usize) -> bool {
    let header = &header[20..];
    let address = |at: usize| {
        let octets: [u8; 4] = std::array::from_fn(|i| header[at + i]);
        IpAddr::V4(Ipv4Addr::from(octets))
    };
    let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let sum: u32 = header
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    header[0] == 0x45
        && header[9] == 17
        && total_len == 20 + 8 + packet_len
        && (sum & 0xffff) + (sum >> 16) == 0xffff
        && (address(12), address(16)) == (from, to)
}
