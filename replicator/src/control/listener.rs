//! Taking control connections.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::connection::HELLO_TIMEOUT;
use super::{Connection, ControlError, Hello};

/// Waits for connections on one address.
#[derive(Debug)]
pub struct Listener {
    inner: TcpListener,
    local_addr: SocketAddr,
}

impl Listener {
    /// Listens on `address` (`host:port`; port 0 takes a free one).
    ///
    /// # Errors
    ///
    /// [`ControlError::AddressInUse`] if another socket listens there, else [`ControlError::Bind`].
    pub fn bind(address: &str) -> Result<Self, ControlError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ControlError::AddressInUse {
                address: address.to_owned(),
            },
            _ => ControlError::Bind {
                address: address.to_owned(),
                source,
            },
        };
        let inner = TcpListener::bind(address).map_err(failed)?;
        inner.set_nonblocking(true).map_err(failed)?;
        let local_addr = inner.local_addr().map_err(failed)?;
        Ok(Self { inner, local_addr })
    }

    /// The address listened on, with the port that port 0 became.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Waits at most `timeout` for somebody to connect.
    ///
    /// # Errors
    ///
    /// [`ControlError::Bind`] if accepting fails for want of descriptors or memory.
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<Incoming>, ControlError> {
        let failed = |source| ControlError::Bind {
            address: self.local_addr.to_string(),
            source,
        };
        let timeout = Timespec::try_from(timeout).unwrap_or(Timespec {
            tv_sec: i64::MAX,
            tv_nsec: 0,
        });
        let mut fds = [PollFd::new(&self.inner, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        match self.inner.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false).map_err(failed)?;
                Ok(Some(Incoming { stream, peer }))
            }
            Err(error) if is_transient(&error) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }
}

/// The connection went away between `poll` and `accept`.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

impl AsFd for Listener {
    /// For polling; readable means that somebody waits to be accepted.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// A connection that has not greeted yet.
#[derive(Debug)]
pub struct Incoming {
    stream: TcpStream,
    peer: SocketAddr,
}

impl Incoming {
    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// Greets. Waits up to 5 s for a silent peer, so call it outside the thread that accepts.
    ///
    /// # Errors
    ///
    /// As the greeting of [`Connection::connect`].
    pub fn handshake(self, hello: &Hello) -> Result<Connection, ControlError> {
        Connection::greet(self.stream, hello, HELLO_TIMEOUT)
    }
}
