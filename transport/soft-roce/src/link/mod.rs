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
//!
//! # How fast this can be
//!
//! A sender of 64 KiB messages over the loopback interface is bound by its core, and most of its time is the
//! kernel's: copying in, and the way of each datagram through the stack to the receiver's socket, which
//! runs on the sender's core. A bare sender and receiver without any protocol, in C, show what is left to
//! gain. Two cores, kernel 6.18, a ring of 16 MiB at both ends, rounds interleaved; CPU time of the sender
//! per gigabyte, least and median:
//!
//! | sender | with ICRC | without |
//! | --- | --- | --- |
//! | TCP, writes of 64 KiB | | 0.33 to 0.41, 0.42 to 0.46 s |
//! | GSO out of a buffer like [`TxBuf`] | 0.37, 0.51 s | 0.38, 0.44 s |
//! | GSO out of the payloads where they lie (`iovec`s) | 0.37, 0.53 s | 0.38, 0.43 s |
//! | GSO out of spliced pages (below) | 0.73 to 0.76 s beside 0.42 to 0.55 of the first | |
//!
//! So without ICRC and protocol UDP is about as fast as TCP (0.95 of its throughput in that run), and no way
//! of filling the buffer makes it faster: copying into `TxBuf` brings the payload into the cache, where the
//! ICRC and the kernel find it.
//!
//! Sending without a copy: the loopback interface copies what `MSG_ZEROCOPY` pins, but not pages spliced into
//! the socket. `vmsplice` of payloads and of a scratch with ICRCs and headers, then `sendmsg` with `MSG_MORE`
//! and `splice` for each run, does it; a run is then eight packets of 4 KiB, since a socket buffer has 17
//! fragments. It costs the sender 40 % more and the receiver 30 to 50 %: looking up pages (a sixth of the
//! sender's time), three system calls a run, twice the runs, and the ICRC that now waits for memory, while
//! the receiver gathers fragments of 16 bytes. Also tried without gain: fewer ACKs, windows that wait for
//! whole runs, the ICRC in pieces while copying, `prefetchnta`.

mod fault;
mod interface;
mod note;
mod pcap;
mod rx_buf;
mod sys;
mod tx_buf;
mod udp;
#[cfg(any(test, fuzzing, feature = "simulation"))]
#[cfg_attr(
    not(any(test, fuzzing)),
    allow(
        dead_code,
        reason = "tests do more with a link than simulations of others"
    )
)]
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
#[cfg(any(test, fuzzing, feature = "simulation"))]
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
