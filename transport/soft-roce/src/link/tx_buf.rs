//! Packets under construction, in the order and grouping they are sent.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use super::Note;
use crate::wire::icrc::{Flow, ICRC_LEN};
use crate::wire::{Headers, MTU_MAX, UDP_PAYLOAD_MAX, pad_count};

/// Bytes of a buffer: the packets of two messages of 64 KiB, so that runs begin and end with messages (a
/// sender of such messages spends a twentieth more CPU with 128 KiB). It shares a core's cache with the
/// memory that it is filled from and with the kernel's copy, so a larger one is slower.
///
/// A message's First packet is longer than those behind it, and makes a run of its own. Sending a WRITE as
/// many of one packet each, all of a size, was tried: 8 to 11 % less CPU, but then a WRITE that leaves its
/// region is not refused as a whole, and captures do not show what was posted.
const CAPACITY: usize = 132 * 1024;
/// Runs of a buffer.
const RUNS_MAX: usize = 512;
/// Segments of one GSO send; kernels before 6.9 take no more.
const SEGMENTS_MAX: usize = 64;
/// Bytes of one GSO send: the largest UDP payload over IPv4; over IPv6 it would be 20 bytes more.
const RUN_LEN_MAX: usize = 65_507;

/// Packets on their way out.
///
/// Consecutive packets to one destination form a *run* when a single GSO send can carry them: equal
/// sizes, the last one possibly shorter. The kernel numbers the segments of a run 0, 1, 2, ... in the
/// IPv4 header's identification, and each packet's ICRC is computed for its place. (IPv6 has none.)
///
/// Allocated once; pushing and clearing allocate nothing.
pub struct TxBuf {
    local: SocketAddr,
    bytes: Box<[u8]>,
    len: usize,
    runs: Vec<Run>,
    packet_count: usize,
    is_segmenting: bool,
    /// What is known about the packets in order, if somebody wants to know.
    notes: Option<Vec<Option<Note>>>,
}

/// Consecutive packets that one send carries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Destination address; the port is the sender's own.
    pub(super) to: IpAddr,
    start: usize,
    /// Bytes of all packets.
    pub(super) len: usize,
    /// Bytes of each packet but the last, which may have fewer.
    pub(super) segment_len: u16,
    /// Packets.
    pub(super) count: u16,
}

impl Run {
    fn takes(&self, to: IpAddr, len: usize) -> bool {
        self.to == to
            && len <= usize::from(self.segment_len)
            && usize::from(self.count) < SEGMENTS_MAX
            && self.len + len <= RUN_LEN_MAX
            // A shorter packet has already ended the run otherwise.
            && self.len == usize::from(self.segment_len) * usize::from(self.count)
    }
}

impl TxBuf {
    /// An empty buffer for packets from `local` to the same port of other addresses.
    pub fn new(local: SocketAddr) -> Self {
        Self {
            local,
            bytes: vec![0; CAPACITY].into_boxed_slice(),
            len: 0,
            runs: Vec::with_capacity(RUNS_MAX),
            packet_count: 0,
            is_segmenting: true,
            notes: None,
        }
    }

    /// Keeps what [`note`](Self::note) says from now on.
    pub(crate) fn keep_notes(&mut self) {
        self.notes = Some(Vec::new());
    }

    /// Says what the packet pushed last is. Costs nothing unless somebody wants to know.
    pub fn note(&mut self, note: Note) {
        if let Some(notes) = &mut self.notes {
            notes.resize(self.packet_count.saturating_sub(1), None);
            notes.push(Some(note));
        }
    }

    /// What was said about each packet, in order.
    pub(super) fn notes(&self) -> impl Iterator<Item = Option<Note>> {
        let said = self.notes.iter().flatten().copied();
        said.chain(std::iter::repeat(None))
    }

    /// Builds one packet in place: headers, `payload_len` bytes written by `fill`, pad and ICRC.
    ///
    /// `fill` gets exactly `payload_len` bytes of unspecified content. The pad count of `headers` is
    /// set here. Returns false, and leaves the buffer as it was, if `fill` does (the payload is not
    /// to be had) or if the buffer [is full](TxBuf::is_full).
    ///
    /// # Panics
    ///
    /// If the payload is longer than the largest MTU, or `headers` contradict their opcode.
    pub fn push(
        &mut self,
        to: IpAddr,
        headers: &Headers,
        payload_len: usize,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        if self.is_full() {
            return false;
        }
        assert!(payload_len <= MTU_MAX, "a payload is at most one MTU");
        let pad = pad_count(payload_len);
        let mut headers = *headers;
        headers.bth.pad_count = [0, 1, 2, 3][pad];
        let header_len = headers.len();
        let padded = header_len + payload_len..header_len + payload_len + pad;
        let packet = &mut self.bytes[self.len..][..padded.end + ICRC_LEN];
        if !fill(&mut packet[header_len..padded.start]) {
            return false;
        }
        headers.emit(packet);
        packet[padded.clone()].fill(0);
        self.append(to, padded.end + ICRC_LEN);
        true
    }

    /// Appends a packet that was built elsewhere, with an ICRC for its new place.
    ///
    /// Returns false if the buffer [is full](TxBuf::is_full).
    pub(super) fn push_built(&mut self, to: IpAddr, udp_payload: &[u8]) -> bool {
        if self.is_full() {
            return false;
        }
        self.bytes[self.len..][..udp_payload.len()].copy_from_slice(udp_payload);
        self.append(to, udp_payload.len());
        true
    }

    /// The bytes of the packet pushed last.
    pub(super) fn last_packet_mut(&mut self) -> Option<&mut [u8]> {
        let run = self.runs.last()?;
        let earlier = usize::from(run.segment_len) * usize::from(run.count - 1);
        Some(&mut self.bytes[run.start + earlier..run.start + run.len])
    }

    /// Whether another packet of any size may not fit: send or clear first.
    pub fn is_full(&self) -> bool {
        self.bytes.len() - self.len < UDP_PAYLOAD_MAX || self.runs.len() == RUNS_MAX
    }

    /// Whether there is no packet.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// How many packets there are.
    pub fn packet_count(&self) -> usize {
        self.packet_count
    }

    /// The packets in order: destination and UDP payload.
    pub fn packets(&self) -> impl Iterator<Item = (IpAddr, &[u8])> {
        self.numbered_packets().map(|(to, _, packet)| (to, packet))
    }

    /// The packets in order: destination, identification and UDP payload.
    pub(super) fn numbered_packets(&self) -> impl Iterator<Item = (IpAddr, u16, &[u8])> {
        self.runs().flat_map(|(run, bytes)| {
            let packets = bytes.chunks(usize::from(run.segment_len));
            (0..)
                .zip(packets)
                .map(|(identification, packet)| (run.to, identification, packet))
        })
    }

    /// Forgets every packet.
    pub fn clear(&mut self) {
        self.len = 0;
        self.packet_count = 0;
        self.runs.clear();
        self.notes.iter_mut().for_each(Vec::clear);
    }

    /// The runs in order, each with its packets' bytes back to back.
    pub(super) fn runs(&self) -> impl Iterator<Item = (&Run, &[u8])> {
        self.runs
            .iter()
            .map(|run| (run, &self.bytes[run.start..][..run.len]))
    }

    /// How many runs there are.
    pub(super) fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// How many packets the runs with these indices hold.
    pub(super) fn packets_in(&self, runs: Range<usize>) -> u64 {
        self.runs[runs].iter().map(|run| u64::from(run.count)).sum()
    }

    /// Drops the first `sent` runs, makes each packet behind them a run of its own, and keeps packets
    /// apart from now on.
    ///
    /// For networks that cannot cut runs: sent alone, each packet has identification 0.
    pub(super) fn split_runs(&mut self, sent: usize) {
        self.is_segmenting = false;
        if sent == 0 && self.runs.iter().all(|run| run.count == 1) {
            return;
        }
        let runs = std::mem::replace(&mut self.runs, Vec::with_capacity(RUNS_MAX));
        for run in &runs[sent..] {
            let flow = flow(self.local, run.to);
            for (i, packet) in self.bytes[run.start..][..run.len]
                .chunks_mut(usize::from(run.segment_len))
                .enumerate()
            {
                flow.seal(0, packet);
                let start = run.start + i * usize::from(run.segment_len);
                let mut single = Run {
                    start,
                    len: packet.len(),
                    ..*run
                };
                single.count = 1;
                self.runs.push(single);
            }
        }
    }

    /// Takes the first `len` bytes behind the last packet as the next one: run and ICRC.
    fn append(&mut self, to: IpAddr, len: usize) {
        let start = self.len;
        let identification = match self.runs.last_mut() {
            Some(run) if self.is_segmenting && run.takes(to, len) => {
                run.len += len;
                run.count += 1;
                run.count - 1
            }
            _ => {
                let segment_len = u16::try_from(len).expect("a packet fits UDP_PAYLOAD_MAX");
                self.runs.push(Run {
                    to,
                    start,
                    len,
                    segment_len,
                    count: 1,
                });
                0
            }
        };
        flow(self.local, to).seal(identification, &mut self.bytes[start..][..len]);
        self.len += len;
        self.packet_count += 1;
    }
}

impl fmt::Debug for TxBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("TxBuf");
        out.field("local", &self.local)
            .field("packet_count", &self.packet_count);
        out.field("len", &self.len).finish_non_exhaustive()
    }
}

/// The flow of packets from `local` to the same port of `to`.
fn flow(local: SocketAddr, to: IpAddr) -> Flow {
    Flow::new(local, SocketAddr::new(to, local.port()))
}
