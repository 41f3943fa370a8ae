//! The TCP connection beside the wire: who may go on, and what the peer must know.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How long a side waits for the other to appear, or to say something.
const PATIENCE: Duration = Duration::from_secs(60);

/// Words and turns between the two sides.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) stream: TcpStream,
}

impl Control {
    /// Waits for one peer.
    pub(crate) fn accept(listener: &TcpListener) -> Control {
        let (stream, _) = listener.accept().expect("accept on the control address");
        Control::over(stream)
    }

    /// Connects to the listening side, which may not have started yet.
    pub(crate) fn connect(address: SocketAddr) -> Control {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect_timeout(&address, PATIENCE) {
                Ok(stream) => return Control::over(stream),
                Err(error) => assert!(Instant::now() < deadline, "connect to {address}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn over(stream: TcpStream) -> Control {
        stream.set_nodelay(true).expect("an option of TCP");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("an option of sockets");
        Control { stream }
    }

    /// Sends words that the peer [`receives`](Control::receive).
    pub(crate) fn send<const N: usize>(&mut self, words: [u64; N]) {
        for word in words {
            self.stream
                .write_all(&word.to_le_bytes())
                .expect("the other side listens");
        }
    }

    /// Waits for as many words.
    pub(crate) fn receive<const N: usize>(&mut self) -> [u64; N] {
        std::array::from_fn(|_| {
            let mut word = [0; 8];
            self.stream
                .read_exact(&mut word)
                .expect("the other side goes on; its output tells why it did not");
            u64::from_le_bytes(word)
        })
    }

    /// Lets the peer go on.
    pub(crate) fn tell(&mut self) {
        self.send([TURN]);
    }

    /// Waits until the peer lets this side go on.
    pub(crate) fn wait(&mut self) {
        assert_eq!(self.receive(), [TURN], "the sides are out of step");
    }

    /// Waits until both sides are here.
    pub(crate) fn meet(&mut self) {
        self.tell();
        self.wait();
    }
}

const TURN: u64 = 0x6e65_7874;
