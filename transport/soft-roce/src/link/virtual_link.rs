//! A link without a socket: what it sends waits for whoever plays the network.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::rx_buf::Datagram;
use super::{Link, LinkCounters, RxBuf, TxBuf};
use crate::wire::ROCE_PORT;

/// Bytes of a receive slot: the longest run of joined packets.
const SLOT_LEN: usize = 64 * 1024;

/// One packet between two devices.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    /// The IP header's identification: the packet's place in the run it was sent in.
    pub(crate) identification: u16,
    pub(crate) udp_payload: Vec<u8>,
}

/// The network's side of a [`VirtualLink`].
#[derive(Clone, Debug, Default)]
pub(crate) struct VirtualPort(Arc<Mutex<Queues>>);

#[derive(Debug, Default)]
struct Queues {
    incoming: VecDeque<Frame>,
    outgoing: Vec<Frame>,
}

/// The device's side: packets go to the [`VirtualPort`] and come from it.
#[derive(Debug)]
pub(crate) struct VirtualLink {
    address: IpAddr,
    port: VirtualPort,
}

impl VirtualPort {
    /// Lets `frame` wait for the device's next receive.
    pub(crate) fn deliver(&self, frame: Frame) {
        self.queues().incoming.push_back(frame);
    }

    /// Takes everything the device has sent.
    pub(crate) fn take_sent(&self) -> Vec<Frame> {
        std::mem::take(&mut self.queues().outgoing)
    }

    /// Whether a receive would find something.
    pub(crate) fn has_incoming(&self) -> bool {
        !self.queues().incoming.is_empty()
    }

    /// Forgets what no receive has taken.
    pub(crate) fn drop_incoming(&self) {
        self.queues().incoming.clear();
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtualLink {
    pub(crate) fn new(address: IpAddr, port: VirtualPort) -> Self {
        Self { address, port }
    }
}

impl Link for VirtualLink {
    fn local_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, ROCE_PORT)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        unreachable!("nothing sleeps on a virtual link")
    }

    fn send(&mut self, tx: &mut TxBuf) -> io::Result<()> {
        let sent = tx
            .numbered_packets()
            .map(|(dst, identification, udp_payload)| Frame {
                src: self.address,
                dst,
                identification,
                udp_payload: udp_payload.to_vec(),
            });
        self.port.queues().outgoing.extend(sent);
        tx.clear();
        Ok(())
    }

    fn recv(&mut self, rx: &mut RxBuf) -> io::Result<usize> {
        let mut queues = self.port.queues();
        let mut datagrams = Vec::new();
        for slot in rx.slots(SLOT_LEN) {
            let Some(datagram) = join(&mut queues.incoming, slot) else {
                break;
            };
            datagrams.push(datagram);
        }
        let count = datagrams.len();
        datagrams
            .into_iter()
            .for_each(|datagram| rx.fill_slot(datagram));
        Ok(count)
    }

    fn counters(&self) -> LinkCounters {
        LinkCounters::default()
    }
}

/// Moves the oldest packet into `slot`, and those behind it that were sent in one run with it, as a
/// kernel with GRO does.
fn join(incoming: &mut VecDeque<Frame>, slot: &mut [u8]) -> Option<Datagram> {
    let first = incoming.pop_front()?;
    let segment_len = first.udp_payload.len();
    let mut len = segment_len;
    slot[..len].copy_from_slice(&first.udp_payload);
    let mut identification = first.identification;
    while let Some(next) = incoming.front() {
        let next_len = next.udp_payload.len();
        let is_in_run = next.src == first.src
            && first.identification == 0
            && next.identification == identification + 1
            && len == segment_len * usize::from(next.identification)
            && next_len <= segment_len;
        if !is_in_run || len + next_len > slot.len() {
            break;
        }
        slot[len..][..next_len].copy_from_slice(&next.udp_payload);
        len += next_len;
        identification += 1;
        incoming.pop_front();
    }
    Some(Datagram {
        src: SocketAddr::new(first.src, ROCE_PORT),
        len,
        segment_len,
    })
}
