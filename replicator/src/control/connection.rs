//! A control connection: greeting, framing, and the two halves.

use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, sockopt};

use super::message::LENGTH_LEN;
use super::{
    ControlError, ErrorCode, ErrorReply, Hello, Malformed, Message, Role, VERSION_MAX, VERSION_MIN,
};

/// How long a TCP connection may take to come up, and then the peer to greet.
pub(super) const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the peer may leave our bytes unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// An idle connection is probed after this time, then every interval, and given up after the count.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_COUNT: u32 = 3;
/// The read buffer grows by this much, as bytes arrive and never by a length read from them.
const READ_CHUNK_LEN: usize = 64 << 10;

impl Hello {
    /// The greeting of a producer, a consumer or a tool.
    pub fn client(cluster_hash: u64) -> Self {
        Self {
            min_version: VERSION_MIN,
            max_version: VERSION_MAX,
            role: Role::Client,
            node: 0,
            memory_id: [0; 16],
            incarnation: 0,
            capabilities: 0,
            cluster_hash,
        }
    }

    /// The greeting of node `node` whose log memory is `memory_id`.
    pub fn node(node: u32, memory_id: [u8; 16], incarnation: u64, cluster_hash: u64) -> Self {
        Self {
            role: Role::Node,
            node,
            memory_id,
            incarnation,
            ..Self::client(cluster_hash)
        }
    }
}

/// A connection whose sides have greeted and agreed on a version.
#[derive(Debug)]
pub struct Connection {
    reader: MessageReader,
    writer: MessageWriter,
    hello: Hello,
}

impl Connection {
    /// Connects to `address` (`host:port`) and greets.
    ///
    /// # Errors
    ///
    /// [`ControlError::Connect`] if nobody listens, and whatever the greeting brings.
    pub fn connect(address: &str, hello: &Hello) -> Result<Self, ControlError> {
        Self::connect_within(address, hello, HELLO_TIMEOUT)
    }

    fn connect_within(
        address: &str,
        hello: &Hello,
        timeout: Duration,
    ) -> Result<Self, ControlError> {
        let stream = connect_any(address, timeout).map_err(|source| ControlError::Connect {
            address: address.to_owned(),
            source,
        })?;
        Self::greet(stream, hello, timeout)
    }

    /// As [`Connection::connect`], to a node of the cluster file.
    ///
    /// # Errors
    ///
    /// Also [`ControlError::WrongNode`] if another node answers at that address.
    pub fn connect_node(address: &str, node: u32, hello: &Hello) -> Result<Self, ControlError> {
        Self::connect_node_within(address, node, hello, HELLO_TIMEOUT)
    }

    /// As [`Connection::connect_node`], for those who have other nodes to try: neither the connection nor
    /// the greeting may take longer than `timeout`.
    ///
    /// # Errors
    ///
    /// As [`Connection::connect_node`].
    pub fn connect_node_within(
        address: &str,
        node: u32,
        hello: &Hello,
        timeout: Duration,
    ) -> Result<Self, ControlError> {
        let connection = Self::connect_within(address, hello, timeout)?;
        let found = connection.hello.node;
        if found != node {
            return Err(ControlError::WrongNode {
                address: address.to_owned(),
                expected: node,
                found,
            });
        }
        Ok(connection)
    }

    pub(super) fn greet(
        stream: TcpStream,
        hello: &Hello,
        timeout: Duration,
    ) -> Result<Self, ControlError> {
        let (mut reader, mut writer) = halves(stream)?;
        let peer = reader.peer;
        writer.send(&hello.clone().into())?;
        let theirs = match reader.receive_timeout(timeout)? {
            Some(Message::Hello(theirs)) => theirs,
            Some(Message::Error(ErrorReply { code, message, .. })) => {
                return Err(ControlError::Refused {
                    peer,
                    code,
                    message,
                });
            }
            Some(other) => {
                return Err(ControlError::NoHello {
                    peer,
                    kind: other.kind(),
                });
            }
            None => {
                return Err(ControlError::Timeout {
                    peer,
                    action: "greet",
                    timeout,
                });
            }
        };
        match agree(hello, &theirs, peer) {
            Ok(version) => writer.version = version,
            Err((code, error)) => {
                // The peer learns why; that it may be gone already changes nothing for us.
                let _ = writer.send(
                    &ErrorReply {
                        code,
                        correlation: 0,
                        message: error.to_string(),
                    }
                    .into(),
                );
                return Err(error);
            }
        }
        Ok(Self {
            reader,
            writer,
            hello: theirs,
        })
    }

    /// What the peer said of itself.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.reader.peer
    }

    /// The version both sides speak.
    pub fn version(&self) -> u16 {
        self.writer.version
    }

    /// Sends one message; see [`MessageWriter::send`].
    ///
    /// # Errors
    ///
    /// As [`MessageWriter::send`].
    pub fn send(&mut self, message: &Message) -> Result<(), ControlError> {
        self.writer.send(message)
    }

    /// Waits for one message; see [`MessageReader::receive_timeout`].
    ///
    /// # Errors
    ///
    /// As [`MessageReader::receive_timeout`].
    pub fn receive_timeout(&mut self, timeout: Duration) -> Result<Option<Message>, ControlError> {
        self.reader.receive_timeout(timeout)
    }

    /// The two halves, for two threads. The connection closes when both are dropped, or by
    /// [`MessageWriter::close`].
    pub fn split(self) -> (MessageReader, MessageWriter) {
        (self.reader, self.writer)
    }
}

/// The version to speak, or why there is none.
fn agree(ours: &Hello, theirs: &Hello, peer: SocketAddr) -> Result<u16, (ErrorCode, ControlError)> {
    let version = ours.max_version.min(theirs.max_version);
    if version < ours.min_version.max(theirs.min_version) {
        let error = ControlError::UnsupportedVersion {
            peer,
            min: theirs.min_version,
            max: theirs.max_version,
        };
        return Err((ErrorCode::UNSUPPORTED_VERSION, error));
    }
    let both_know = ours.cluster_hash != 0 && theirs.cluster_hash != 0;
    if both_know && ours.cluster_hash != theirs.cluster_hash {
        return Err((
            ErrorCode::CLUSTER_MISMATCH,
            ControlError::ClusterMismatch { peer },
        ));
    }
    Ok(version)
}

/// Tries each address that the name has.
fn connect_any(address: &str, timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for resolved in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&resolved, timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn halves(stream: TcpStream) -> Result<(MessageReader, MessageWriter), ControlError> {
    let broken = |address: &str, source| ControlError::Connect {
        address: address.to_owned(),
        source,
    };
    let peer = stream
        .peer_addr()
        .map_err(|source| broken("the peer", source))?;
    tune(&stream).map_err(|source| broken(&peer.to_string(), source))?;
    let stream = Arc::new(stream);
    let reader = MessageReader {
        stream: Arc::clone(&stream),
        peer,
        buffer: Vec::new(),
        filled: 0,
        consumed: 0,
    };
    Ok((
        reader,
        MessageWriter {
            stream,
            peer,
            version: VERSION_MIN,
            frame: Vec::new(),
        },
    ))
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
    Ok(())
}

/// The receiving half of a [`Connection`].
#[derive(Debug)]
pub struct MessageReader {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    /// Bytes `consumed..filled` are received and not yet decoded.
    buffer: Vec<u8>,
    filled: usize,
    consumed: usize,
}

impl MessageReader {
    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// Waits for the next message as long as the connection lives.
    ///
    /// # Errors
    ///
    /// [`ControlError::Closed`] at its end, [`ControlError::Malformed`] or [`ControlError::Io`] before.
    pub fn receive(&mut self) -> Result<Message, ControlError> {
        loop {
            if let Some(message) = self.decode_next()? {
                return Ok(message);
            }
            self.wait_readable(None)?;
            self.fill()?;
        }
    }

    /// Waits at most `timeout` for the next message; `None` when there is none. Part of a message that
    /// has arrived by then is kept. A zero timeout only looks.
    ///
    /// # Errors
    ///
    /// As [`MessageReader::receive`].
    pub fn receive_timeout(&mut self, timeout: Duration) -> Result<Option<Message>, ControlError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(message) = self.decode_next()? {
                return Ok(Some(message));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait_readable(Some(left))? {
                return Ok(None);
            }
            self.fill()?;
        }
    }

    fn decode_next(&mut self) -> Result<Option<Message>, ControlError> {
        let malformed = |source: Malformed| ControlError::Malformed {
            peer: self.peer,
            source,
        };
        let unread = &self.buffer[self.consumed..self.filled];
        let Some((length, rest)) = unread.split_first_chunk::<LENGTH_LEN>() else {
            return Ok(None);
        };
        let len = Message::frame_len(*length).map_err(malformed)?;
        let Some(frame) = rest.get(..len) else {
            return Ok(None);
        };
        let message = Message::decode(frame).map_err(malformed)?;
        self.consumed += LENGTH_LEN + len;
        Ok(Some(message))
    }

    fn wait_readable(&self, timeout: Option<Duration>) -> Result<bool, ControlError> {
        let timeout = timeout.map(|left| {
            Timespec::try_from(left).unwrap_or(Timespec {
                tv_sec: i64::MAX,
                tv_nsec: 0,
            })
        });
        let mut fds = [PollFd::new(&*self.stream, PollFlags::IN)];
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(count) => Ok(count > 0),
            Err(rustix::io::Errno::INTR) => Ok(true), // `fill` finds nothing and we come back
            Err(errno) => Err(ControlError::Io {
                peer: self.peer,
                source: errno.into(),
            }),
        }
    }

    fn fill(&mut self) -> Result<(), ControlError> {
        self.buffer.copy_within(self.consumed..self.filled, 0);
        self.filled -= self.consumed;
        self.consumed = 0;
        if self.buffer.len() - self.filled < READ_CHUNK_LEN / 2 {
            self.buffer.resize(self.filled + READ_CHUNK_LEN, 0);
        }
        match rustix::net::recv(
            &*self.stream,
            &mut self.buffer[self.filled..],
            RecvFlags::DONTWAIT,
        ) {
            Ok((0, _)) => Err(ControlError::Closed { peer: self.peer }),
            Ok((len, _)) => {
                self.filled += len;
                Ok(())
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
            // A peer that was killed resets what it had not read: for us that is its end, no other error.
            Err(rustix::io::Errno::CONNRESET) => Err(ControlError::Closed { peer: self.peer }),
            Err(errno) => Err(ControlError::Io {
                peer: self.peer,
                source: errno.into(),
            }),
        }
    }
}

impl AsFd for MessageReader {
    /// For polling; readable means that [`MessageReader::receive_timeout`] may have a message. Messages
    /// already buffered do not make it readable: receive until `None` first.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The sending half of a [`Connection`].
#[derive(Debug)]
pub struct MessageWriter {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    version: u16,
    frame: Vec<u8>,
}

impl MessageWriter {
    /// The peer's address.
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    /// Sends one message. Blocks while the peer's and our buffers are full, at most 10 s.
    ///
    /// # Errors
    ///
    /// [`ControlError::TooLarge`] leaves the connection usable; after any other it is closed.
    pub fn send(&mut self, message: &Message) -> Result<(), ControlError> {
        self.frame.clear();
        message
            .encode(self.version, &mut self.frame)
            .map_err(|error| match error {
                Malformed::FrameLen(len) => ControlError::TooLarge { len },
                source => ControlError::Malformed {
                    peer: self.peer,
                    source,
                },
            })?;
        (&*self.stream).write_all(&self.frame).map_err(|source| {
            self.close(); // part of the frame may be out: nothing sensible can follow it
            write_error(self.peer, source)
        })
    }

    /// Closes both directions; a thread that waits in [`MessageReader::receive`] returns.
    pub fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both); // fails only if the peer closed first
    }
}

fn write_error(peer: SocketAddr, source: io::Error) -> ControlError {
    match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ControlError::Timeout {
            peer,
            action: "read our messages",
            timeout: WRITE_TIMEOUT,
        },
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ControlError::Closed { peer },
        _ => ControlError::Io { peer, source },
    }
}
