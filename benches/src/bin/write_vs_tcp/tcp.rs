//! TCP: a stream whose receiver copies each message to its place, and pings on a spinning socket.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::path::{
    LAST, PING_LEN, Path, RING_LEN, Result, STAMP_LEN, Streamed, check_ring, ping_loop, slot_of,
};

/// Copies between buffers that start alike in their pages avoid a slow path of some CPUs' string
/// instructions, in the kernel too.
const PAGE_LEN: usize = 4096;

/// Two connections between the processes.
pub(crate) struct Tcp {
    bulk: TcpStream,
    pings: TcpStream,
    size: usize,
    ring: Ring,
    /// Where the kernel puts what arrives, before it is copied to its place.
    arrived: Ring,
    sequence: u64,
}

impl Tcp {
    /// Prepares two connections: messages of `size` bytes on `bulk`, pings on `pings`.
    pub(crate) fn new(bulk: TcpStream, pings: TcpStream, size: usize) -> Result<Tcp> {
        bulk.set_nodelay(true)?;
        pings.set_nodelay(true)?;
        pings.set_nonblocking(true)?;
        Ok(Tcp {
            bulk,
            pings,
            size,
            ring: Ring::new(RING_LEN),
            arrived: Ring::new(size),
            sequence: 0,
        })
    }
}

impl Path for Tcp {
    fn stream(&mut self, duration: Duration) -> Result<Streamed> {
        let start = Instant::now();
        let mut count = 0;
        let mut is_last = false;
        while !is_last {
            is_last = start.elapsed() >= duration;
            let stamp = if is_last { count | LAST } else { count };
            let message = self.ring.slot(count, self.size);
            message[..STAMP_LEN].copy_from_slice(&stamp.to_le_bytes());
            self.bulk.write_all(message)?;
            count += 1;
        }
        self.bulk.read_exact(&mut [0])?;
        Ok(Streamed {
            bytes: count * self.size as u64,
            elapsed: start.elapsed(),
        })
    }

    fn sink(&mut self) -> Result<u64> {
        let mut count = 0;
        let mut stamp = 0;
        while stamp & LAST == 0 {
            let arrived = self.arrived.slot(0, self.size);
            self.bulk.read_exact(arrived)?;
            let place = self.ring.slot(count, self.size);
            place.copy_from_slice(arrived);
            stamp = stamp_of(place);
            count += 1;
        }
        self.bulk.write_all(&[0])?;
        check_ring(count, RING_LEN / self.size, |sequence| {
            Ok(stamp_of(self.ring.slot(sequence, self.size)))
        })?;
        Ok(count)
    }

    fn ping(&mut self, duration: Duration, round_trips: &mut Histogram<u64>) -> Result<()> {
        let mut message = [0; PING_LEN];
        let pings = &mut self.pings;
        ping_loop(&mut self.sequence, duration, round_trips, |stamp| {
            message[..STAMP_LEN].copy_from_slice(&stamp.to_le_bytes());
            pings.write_all(&message)?;
            spin_read(pings, &mut message)?;
            Ok(())
        })
    }

    fn pong(&mut self) -> Result<()> {
        let mut message = [0; PING_LEN];
        while stamp_of(&message) & LAST == 0 {
            spin_read(&mut self.pings, &mut message)?;
            self.pings.write_all(&message)?;
        }
        Ok(())
    }
}

/// Empty reads before a spinning reader lets others run: more than an undisturbed round trip takes.
const SPINS_PER_YIELD: u32 = 64;

/// Fills `out` without ever sleeping.
fn spin_read(stream: &mut TcpStream, out: &mut [u8]) -> Result<()> {
    let mut len = 0;
    let mut spins = 0u32;
    while len < out.len() {
        match stream.read(&mut out[len..]) {
            Ok(0) => return Err("the other process closed the connection".into()),
            Ok(more) => len += more,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                spins += 1;
                if spins.is_multiple_of(SPINS_PER_YIELD) {
                    thread::yield_now();
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn stamp_of(message: &[u8]) -> u64 {
    let stamp = message.first_chunk().expect("a message holds its stamp");
    u64::from_le_bytes(*stamp)
}

/// Places of messages, the first at the start of a page.
struct Ring {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Ring {
    fn new(len: usize) -> Ring {
        // Not zero, so that every page is in memory before the clock runs.
        let bytes = vec![0xa5; len + PAGE_LEN];
        let start = bytes.as_ptr().align_offset(PAGE_LEN);
        Ring { bytes, start, len }
    }

    /// The place of message number `sequence`.
    fn slot(&mut self, sequence: u64, size: usize) -> &mut [u8] {
        let slot = slot_of(sequence, self.len / size);
        &mut self.bytes[self.start + slot * size..][..size]
    }
}
