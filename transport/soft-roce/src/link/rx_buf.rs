//! Packets that came in, checked as they are taken out.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use crate::wire::icrc::Flow;

/// Bytes of a buffer, divided into slots of one datagram each; see [`TxBuf`](super::TxBuf) for why it
/// is no larger.
const CAPACITY: usize = 128 * 1024;
/// Most datagrams of one batch.
pub(super) const SLOTS_MAX: usize = 8;

/// Packets that a link received in one batch.
///
/// [`next_packet`](RxBuf::next_packet) checks the ICRC right before it hands a packet out, so that its
/// bytes are in the cache when the queue pair copies them. A packet that fails is dropped and
/// counted.
pub struct RxBuf {
    local: SocketAddr,
    bytes: Box<[u8]>,
    slot_len: usize,
    /// Slots to offer next time: one while little comes, since each costs something even if it stays
    /// empty.
    slot_count: usize,
    datagrams: Vec<Datagram>,
    next: Place,
    rcvd_pkts: u64,
    icrc_err: u64,
}

/// What one receive put into one slot: one packet, or several of equal size (GRO).
#[derive(Clone, Copy, Debug)]
pub(super) struct Datagram {
    pub(super) src: SocketAddr,
    pub(super) len: usize,
    /// Bytes of each packet but the last.
    pub(super) segment_len: usize,
}

/// The packet to be taken next.
#[derive(Clone, Copy, Default, Debug)]
struct Place {
    slot: usize,
    byte_offset: usize,
    /// Index within its datagram: the identification a sender with GSO gave it.
    index: u16,
}

impl RxBuf {
    /// An empty buffer for packets to `local`.
    pub fn new(local: SocketAddr) -> Self {
        Self {
            local,
            bytes: vec![0; CAPACITY].into_boxed_slice(),
            slot_len: CAPACITY / SLOTS_MAX,
            slot_count: 1,
            datagrams: Vec::with_capacity(SLOTS_MAX),
            next: Place::default(),
            rcvd_pkts: 0,
            icrc_err: 0,
        }
    }

    /// Takes the next packet with a right ICRC: the sender's address and the UDP payload.
    pub fn next_packet(&mut self) -> Option<(IpAddr, &[u8])> {
        loop {
            let (src, guess, range) = self.advance()?;
            let flow = Flow::new(src, self.local);
            if flow.verify(guess, &self.bytes[range.clone()]).is_some() {
                self.rcvd_pkts += 1;
                return Some((src.ip(), &self.bytes[range]));
            }
            self.icrc_err += 1;
        }
    }

    /// Packets handed out since the buffer was made.
    pub fn rcvd_pkts(&self) -> u64 {
        self.rcvd_pkts
    }

    /// Packets dropped for a wrong ICRC, or for being too short to have one.
    pub fn icrc_err(&self) -> u64 {
        self.icrc_err
    }

    /// Forgets every packet and yields slots of `slot_len` bytes each, [`SLOTS_MAX`] at most.
    ///
    /// Their number doubles as long as all were filled the time before.
    pub(super) fn slots(&mut self, slot_len: usize) -> impl Iterator<Item = &mut [u8]> {
        let count_max = SLOTS_MAX.min(CAPACITY / slot_len);
        self.slot_count = if self.datagrams.len() == self.slot_count {
            (2 * self.slot_count).min(count_max)
        } else {
            1
        };
        self.datagrams.clear();
        self.next = Place::default();
        self.slot_len = slot_len;
        self.bytes.chunks_exact_mut(slot_len).take(self.slot_count)
    }

    /// Whether the batch had no room for more: likely more waits.
    pub fn is_full(&self) -> bool {
        self.datagrams.len() == SLOTS_MAX.min(CAPACITY / self.slot_len)
    }

    /// Says what the next slot holds.
    pub(super) fn fill_slot(&mut self, datagram: Datagram) {
        self.datagrams.push(datagram);
    }

    /// All packets of the batch, unchecked: sender, index within the datagram, UDP payload.
    pub(super) fn packets(&self) -> impl Iterator<Item = (SocketAddr, u16, &[u8])> {
        self.datagrams
            .iter()
            .zip(self.bytes.chunks(self.slot_len))
            .flat_map(|(datagram, slot)| {
                let packets = slot[..datagram.len].chunks(datagram.segment_len.max(1));
                (0..)
                    .zip(packets)
                    .map(|(index, packet)| (datagram.src, index, packet))
            })
    }

    /// Steps over one packet and says where it is.
    fn advance(&mut self) -> Option<(SocketAddr, u16, Range<usize>)> {
        let place = self.next;
        let datagram = self.datagrams.get(place.slot)?;
        let end = datagram.len.min(place.byte_offset + datagram.segment_len);
        self.next = if end == datagram.len {
            Place {
                slot: place.slot + 1,
                ..Place::default()
            }
        } else {
            Place {
                byte_offset: end,
                index: place.index + 1,
                ..place
            }
        };
        let start = place.slot * self.slot_len;
        Some((
            datagram.src,
            place.index,
            start + place.byte_offset..start + end,
        ))
    }
}

impl fmt::Debug for RxBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("RxBuf");
        out.field("local", &self.local)
            .field("datagrams", &self.datagrams);
        out.field("rcvd_pkts", &self.rcvd_pkts)
            .field("icrc_err", &self.icrc_err);
        out.finish_non_exhaustive()
    }
}
