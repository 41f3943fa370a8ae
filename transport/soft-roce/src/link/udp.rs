//! The real link: one unprivileged UDP socket.
//!
//! The socket stays unconnected and forbids fragmentation, so that the kernel sends identification 0
//! (and 0, 1, 2, ... within one GSO call): only then is the ICRC known before the send. See
//! [`icrc`](crate::wire::icrc). IPv6 has no such field.

use std::ffi::c_int;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use thiserror::Error;

use super::rx_buf::{Datagram, SLOTS_MAX};
use super::sys::{self, Incoming, Outgoing};
use super::{Interface, Link, LinkCounters, RxBuf, TxBuf};
use crate::wire::ROCE_PORT;

/// Environment variable that moves all software devices to another port.
const PORT_VARIABLE: &str = "FARLOG_SOFT_PORT";
/// Bytes asked for in each direction; the kernel grants what `net.core.rmem_max` allows.
const SOCKET_BUFFER_LEN: c_int = 8 << 20;
/// Addresses tried before giving up on finding a free one.
const ADDRESS_TRIES: usize = 64;
/// Bytes of a receive slot: a run of joined packets, or one packet with room to spare.
const JOINED_SLOT_LEN: usize = 64 * 1024;
const SINGLE_SLOT_LEN: usize = 16 * 1024;

/// Why no socket could be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another process, or another device of this one, has the address.
    #[error(
        "UDP port {port} of {address} is in use by another software device: \
         name another address (soft@ADDRESS), or none (soft) to get a free one of 127.0.0.0/8"
    )]
    AddressInUse {
        /// Address asked for.
        address: IpAddr,
        /// Port asked for.
        port: u16,
    },
    /// The kernel's software RDMA driver has the port on all addresses.
    #[error(
        "UDP port {port} is held by the kernel's rdma_rxe on every address: use its device (for \
         example rxe0) instead, or unload rdma_rxe, or set {PORT_VARIABLE} to another port on \
         every node"
    )]
    HeldByRxe {
        /// Port asked for.
        port: u16,
    },
    /// The address belongs to no interface of this machine.
    #[error(
        "{address} is not an address of this machine: name one of its own (`ip address` lists \
         them), or one of 127.0.0.0/8"
    )]
    NotLocal {
        /// Address asked for.
        address: IpAddr,
    },
    /// The kernel runs without the address's version of IP.
    #[error(
        "this machine has no network of {address}'s kind: enable it in the kernel (for IPv6: boot \
         without ipv6.disable=1), or name an address of the other kind"
    )]
    NoSuchFamily {
        /// Address asked for.
        address: IpAddr,
    },
    /// Every address tried was in use.
    #[error(
        "UDP port {port} is in use on each of {ADDRESS_TRIES} addresses of 127.0.0.0/8: another \
         program has it on all of them (`ss -ulpn` names it); set {PORT_VARIABLE} to another port"
    )]
    NoFreeAddress {
        /// Port asked for.
        port: u16,
    },
    /// The environment variable holds no port.
    #[error("{PORT_VARIABLE} is {value:?}, not a UDP port: set it to 1..65535 or unset it")]
    BadPort {
        /// What it holds.
        value: String,
    },
    /// The operating system refused the socket for another reason.
    #[error("cannot open UDP port {port} of {address}")]
    Socket {
        /// Address asked for.
        address: IpAddr,
        /// Port asked for.
        port: u16,
        /// What the operating system said.
        source: io::Error,
    },
}

/// The port software devices use: [`ROCE_PORT`] unless `FARLOG_SOFT_PORT` names another.
///
/// # Errors
///
/// [`BindError::BadPort`] if the variable is set to anything else than a port.
pub fn port_from_env() -> Result<u16, BindError> {
    let value = std::env::var_os(PORT_VARIABLE);
    port_from(value.map(|value| value.to_string_lossy().into_owned()))
}

fn port_from(value: Option<String>) -> Result<u16, BindError> {
    let Some(value) = value else {
        return Ok(ROCE_PORT);
    };
    let port = value.parse().ok().filter(|port| *port != 0);
    port.ok_or(BindError::BadPort { value })
}

/// A UDP socket that carries RoCEv2 packets.
#[derive(Debug)]
pub struct UdpLink {
    socket: UdpSocket,
    /// For IPv6 with the interface, which link-local destinations need.
    local: SocketAddr,
    /// The kernel cuts runs into packets (UDP_SEGMENT).
    has_gso: bool,
    /// The kernel joins packets to runs (UDP_GRO).
    has_gro: bool,
    has_warned: bool,
    counters: LinkCounters,
}

impl UdpLink {
    /// Binds a socket to `address`, or to a free address of 127.0.0.0/8.
    ///
    /// # Errors
    ///
    /// [`BindError`] says what is in the way and what to do about it.
    pub fn bind(address: Option<IpAddr>, port: u16) -> Result<Self, BindError> {
        match address {
            Some(address) => Self::bind_to(address, port),
            None => Self::bind_anywhere(port),
        }
    }

    fn bind_anywhere(port: u16) -> Result<Self, BindError> {
        for _ in 0..ADDRESS_TRIES {
            let address = random_loopback();
            match Self::bind_to(address, port) {
                Err(BindError::AddressInUse { .. }) => {}
                result => return result,
            }
        }
        Err(BindError::NoFreeAddress { port })
    }

    fn bind_to(address: IpAddr, port: u16) -> Result<Self, BindError> {
        if address.is_unspecified() || address.is_multicast() {
            return Err(BindError::NotLocal { address });
        }
        let local = socket_address(address, port);
        let refused = |source| BindError::Socket {
            address,
            port,
            source,
        };
        let socket = UdpSocket::bind(local).map_err(|source| match source.kind() {
            ErrorKind::AddrInUse if port == ROCE_PORT && is_rxe_loaded() => {
                BindError::HeldByRxe { port }
            }
            ErrorKind::AddrInUse => BindError::AddressInUse { address, port },
            ErrorKind::AddrNotAvailable => BindError::NotLocal { address },
            _ if source.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                BindError::NoSuchFamily { address }
            }
            _ => refused(source),
        })?;
        socket.set_nonblocking(true).map_err(refused)?;
        let fd = socket.as_fd();
        forbid_fragments(fd, local).map_err(refused)?;
        enlarge_buffers(fd);
        Ok(Self {
            has_gso: sys::set_option(fd, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok(),
            has_gro: sys::set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok(),
            has_warned: false,
            local,
            socket,
            counters: LinkCounters::default(),
        })
    }
}

impl Link for UdpLink {
    fn local_addr(&self) -> SocketAddr {
        self.local
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send(&mut self, tx: &mut TxBuf) -> io::Result<()> {
        let result = self.send_runs(tx);
        tx.clear();
        result
    }

    fn recv(&mut self, rx: &mut RxBuf) -> io::Result<usize> {
        let slot_len = if self.has_gro {
            JOINED_SLOT_LEN
        } else {
            SINGLE_SLOT_LEN
        };
        let mut datagrams = [Incoming::NONE; SLOTS_MAX];
        let count = match sys::recv(self.socket.as_fd(), rx.slots(slot_len), &mut datagrams) {
            Ok(count) => count,
            Err(error) if is_temporary(&error) => 0,
            Err(error) => return Err(error),
        };
        for Incoming {
            src,
            len,
            segment_len,
        } in &datagrams[..count]
        {
            let segment_len = segment_len.unwrap_or(*len);
            rx.fill_slot(Datagram {
                src: *src,
                len: *len,
                segment_len,
            });
        }
        Ok(count)
    }

    fn counters(&self) -> LinkCounters {
        self.counters
    }
}

impl UdpLink {
    /// Where the device at `address` receives.
    fn peer(&self, address: IpAddr) -> SocketAddr {
        match (self.local, address) {
            // Of the same interface.
            (SocketAddr::V6(mut peer), IpAddr::V6(address)) => {
                peer.set_ip(address);
                peer.into()
            }
            (local, address) => SocketAddr::new(address, local.port()),
        }
    }

    fn send_runs(&mut self, tx: &mut TxBuf) -> io::Result<()> {
        if !self.has_gso {
            tx.split_runs(0);
        }
        let mut done = 0;
        while done < tx.run_count() {
            let messages = tx.runs().skip(done).map(|(run, bytes)| Outgoing {
                to: self.peer(run.to),
                bytes,
                segment_len: (run.count > 1).then_some(run.segment_len),
            });
            match sys::send(self.socket.as_fd(), messages) {
                Ok(count) => {
                    self.counters.sent_pkts += tx.packets_in(done..done + count);
                    done += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The outgoing interface cannot cut runs: send packet by packet from here on.
                Err(error) if error.raw_os_error() == Some(libc::EIO) && self.has_gso => {
                    tracing::info!(local = %self.local, "no UDP segmentation here, sending singly");
                    self.has_gso = false;
                    tx.split_runs(done);
                    done = 0;
                }
                Err(error) if is_fatal(&error) => return Err(error),
                Err(error) => {
                    self.warn_once_if_too_long(&error);
                    self.counters.send_err += tx.packets_in(done..done + 1);
                    done += 1;
                }
            }
        }
        Ok(())
    }

    /// Names the cause of a connection that will never get a packet through.
    fn warn_once_if_too_long(&mut self, error: &io::Error) {
        // Some kernels say EINVAL when a segment of a run does not fit.
        let is_too_long = matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EINVAL));
        if is_too_long && !self.has_warned {
            self.has_warned = true;
            tracing::warn!(
                local = %self.local,
                "packets do not fit the MTU of the network: use a smaller path MTU \
                 (1024 on Ethernet with an MTU of 1500)"
            );
        }
    }
}

/// The address to bind: link-local ones are unique within an interface only, which is named beside them.
fn socket_address(address: IpAddr, port: u16) -> SocketAddr {
    match address {
        IpAddr::V4(_) => SocketAddr::new(address, port),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, Interface::of(address).index).into(),
    }
}

/// Has packets refused that do not fit the interface, whatever was learnt about the path.
///
/// Over IPv6 also takes packets whose UDP checksum is 0, as kernel rxe and hardware send them: the ICRC
/// covers more.
fn forbid_fragments(fd: BorrowedFd<'_>, local: SocketAddr) -> io::Result<()> {
    match local {
        SocketAddr::V4(_) => {
            let probe = libc::IP_PMTUDISC_PROBE;
            sys::set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, probe)
        }
        SocketAddr::V6(_) => {
            let probe = libc::IPV6_PMTUDISC_PROBE;
            sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, probe)?;
            sys::set_option(fd, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1)
        }
    }
}

/// Whether the kernel's driver is there, which opens the port on every address as it is loaded.
fn is_rxe_loaded() -> bool {
    Path::new("/sys/module/rdma_rxe").exists()
}

fn enlarge_buffers(fd: BorrowedFd<'_>) {
    let options = [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
    ];
    for (forced, plain) in options {
        // The forced form needs a privilege and passes the limit; the plain one is cut to it. Either
        // way the device works: congestion control adapts to the buffers there are.
        let set = |name| sys::set_option(fd, libc::SOL_SOCKET, name, SOCKET_BUFFER_LEN);
        if let Err(error) = set(forced).or_else(|_| set(plain)) {
            tracing::warn!(%error, "socket buffers stay at their default size");
        }
    }
}

/// A random address of 127.0.0.0/8, away from 127.0.0.x, which people choose by hand.
fn random_loopback() -> IpAddr {
    let mut random = [0; 3];
    getrandom::fill(&mut random).expect("the kernel hands out random bytes once it has booted");
    let host = |byte: u8| byte.clamp(1, 254);
    Ipv4Addr::new(127, host(random[0]), random[1], host(random[2])).into()
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn is_fatal(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBADF | libc::ENOTSOCK | libc::EFAULT)
    )
}

#[cfg(test)]
impl UdpLink {
    /// Behaves as on a kernel without UDP_SEGMENT, or one without UDP_GRO.
    pub(super) fn without(mut self, gso: bool, gro: bool) -> Self {
        self.has_gso &= !gso;
        if gro {
            sys::set_option(self.socket.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 0).unwrap();
            self.has_gro = false;
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: u16 = 24_791;

    #[test]
    fn an_address_in_use_is_named_with_the_remedy() {
        let first = UdpLink::bind(None, PORT).unwrap();
        let address = first.local_addr().ip();
        let error = UdpLink::bind(Some(address), PORT).unwrap_err();
        assert!(matches!(error, BindError::AddressInUse { .. }), "{error:?}");
        let text = error.to_string();
        assert!(
            text.contains(&address.to_string()) && text.contains("24791"),
            "{text}"
        );
        assert!(text.contains("soft@ADDRESS"), "{text}");
        drop(first);
        UdpLink::bind(Some(address), PORT).expect("the address is free again");
    }

    #[test]
    fn a_foreign_address_is_refused() {
        for address in [
            "192.0.2.1",
            "2001:db8::1",
            "fe80::dead:beef",
            "::",
            "0.0.0.0",
        ] {
            let error = UdpLink::bind(Some(address.parse().unwrap()), PORT).unwrap_err();
            let is_refused = matches!(
                error,
                BindError::NotLocal { .. } | BindError::NoSuchFamily { .. }
            );
            assert!(is_refused, "{address}: {error:?}");
        }
    }

    #[test]
    fn a_port_held_on_every_address_ends_the_search() {
        let all = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = all.local_addr().unwrap().port();
        let error = UdpLink::bind(None, port).unwrap_err();
        assert!(
            matches!(error, BindError::NoFreeAddress { .. }),
            "{error:?}"
        );
    }

    #[test]
    fn free_addresses_are_many() {
        let links: Vec<_> = (0..20)
            .map(|_| UdpLink::bind(None, PORT).unwrap())
            .collect();
        assert!(
            links
                .iter()
                .all(|link| link.local_addr().ip().is_loopback())
        );
    }

    #[test]
    fn the_port_variable_is_checked() {
        let port = |value: &str| port_from(Some(value.to_owned()));
        assert_eq!(port_from(None).unwrap(), ROCE_PORT);
        assert_eq!(port("4800").unwrap(), 4800);
        for bad in ["", "0", "65536", "-1", "roce"] {
            assert!(
                matches!(port(bad), Err(BindError::BadPort { .. })),
                "{bad:?}"
            );
        }
    }
}
