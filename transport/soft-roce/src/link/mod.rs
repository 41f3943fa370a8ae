//! Where packets come from and go to.
//!
//! A [`Link`] moves whole batches: [`TxBuf`] holds packets on their way out, [`RxBuf`] those that
//! came in. Both are allocated once. A packet's payload is copied once into the `TxBuf`, and each
//! byte passes the ICRC once per side.
//!
//! ```text
//! queue pairs --push--> TxBuf --send--> Link ~~ network ~~ Link --recv--> RxBuf --next_packet-->
//! ```
//!
//! [`UdpLink`] is the real one; [`FaultLink`] and [`PcapLink`] wrap a link and are one. A link knows
//! packets as bytes with an address; it knows no queue pair and keeps no copy of what it sent.

mod fault;
mod interface;
mod note;
mod pcap;
mod rx_buf;
mod sys;
mod tx_buf;
mod udp;
#[cfg(any(test, fuzzing))]
mod virtual_link;

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

pub use fault::{FaultLink, FaultRates};
pub(crate) use interface::Interface;
pub use note::Note;
pub use pcap::{PcapLink, pcap_path_for};
pub use rx_buf::RxBuf;
pub use tx_buf::TxBuf;
pub use udp::{BindError, UdpLink, port_from_env};
#[cfg(any(test, fuzzing))]
pub(crate) use virtual_link::{Frame, VirtualLink, VirtualPort};

/// Sends and receives batches of packets without blocking.
pub trait Link: Debug + Send {
    /// The address and port packets are sent from and received at.
    fn local_addr(&self) -> SocketAddr;

    /// The descriptor that polls readable when packets wait.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Sends every packet of `tx` and empties it.
    ///
    /// A packet that the network refuses for now (a full queue) is dropped and counted, as a network
    /// may drop any packet: reliability is the queue pair's.
    ///
    /// # Errors
    ///
    /// A socket that no longer works. `tx` is emptied all the same.
    fn send(&mut self, tx: &mut TxBuf) -> io::Result<()>;

    /// Replaces the contents of `rx` by packets that wait, and returns how many datagrams came.
    ///
    /// Zero means that none waits. A datagram may hold several packets.
    ///
    /// # Errors
    ///
    /// A socket that no longer works.
    fn recv(&mut self, rx: &mut RxBuf) -> io::Result<usize>;

    /// Whether it makes use of what [`TxBuf::note`] tells about packets.
    fn wants_notes(&self) -> bool {
        false
    }

    /// What this link has counted since it was made.
    fn counters(&self) -> LinkCounters;
}

/// What a link has sent and lost. Received packets are counted by [`RxBuf`].
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct LinkCounters {
    /// Packets handed to the network.
    pub sent_pkts: u64,
    /// Packets dropped because the network refused them.
    pub send_err: u64,
}

#[cfg(test)]
mod tests;
