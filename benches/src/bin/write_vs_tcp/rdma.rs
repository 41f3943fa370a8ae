//! RDMA WRITEs: a window of them for throughput, inline ones into the other's mailbox as pings.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use benches::pair::{MAX_SEND_WR, Side};
use hdrhistogram::Histogram;
use transport::connect::exchange;
use transport::{DeviceSelector, ReadyQp, Remote, Rkey, SendFlags, SharedRegion, Source};

use crate::path::{
    LAST, PING_LEN, Path, RING_LEN, Result, STAMP_LEN, Streamed, check_ring, ping_loop, put_u64,
    slot_of, take_u64,
};

/// Behind the ring: how many messages the last stream had.
const COUNT_AT: usize = RING_LEN;
/// In a cache line of its own: where the other side's pings land.
const MAILBOX_AT: usize = COUNT_AT + 64;
/// The last bytes of a ping are placed last, so they tell that it is there.
const MAILBOX_STAMP_AT: usize = MAILBOX_AT + PING_LEN - STAMP_LEN;
const REGION_LEN: usize = RING_LEN + 4096;
/// One of so many pings asks for a completion.
const PINGS_PER_SIGNAL: u64 = 16;

/// A connected queue pair, and memory that its peer may write.
pub(crate) struct Rdma {
    side: Side,
    qp: ReadyQp,
    region: Arc<SharedRegion>,
    remote: Remote,
    /// Tells a sleeping peer that a stream has ended.
    wake: TcpStream,
    size: usize,
    window: usize,
    /// Whether the receiving process polls, or leaves the device to itself and sleeps.
    pub(crate) polls: bool,
    sequence: u64,
}

impl Rdma {
    /// Connects with the other process, which does the same, over `stream`.
    pub(crate) fn connect(
        device: &DeviceSelector,
        mut stream: TcpStream,
        size: usize,
        window: usize,
    ) -> Result<Rdma> {
        let side = Side::open(device)?;
        let region = side.region(REGION_LEN)?;
        // Brings every page into memory before the clock runs.
        region.mapping().zero(0..REGION_LEN)?;
        let prepared = side.prepare()?;
        let end_point = exchange(&mut stream, &prepared.end_point())?;
        let qp = prepared.connect(&end_point)?;
        let own = region.remote();
        put_u64(&mut stream, own.addr)?;
        put_u64(&mut stream, u64::from(own.rkey.0))?;
        let remote = Remote {
            addr: take_u64(&mut stream)?,
            rkey: Rkey(u32::try_from(take_u64(&mut stream)?)?),
        };
        Ok(Rdma {
            side,
            qp,
            region,
            remote,
            wake: stream,
            size,
            window: window.clamp(1, MAX_SEND_WR as usize / 2),
            polls: true,
            sequence: 0,
        })
    }

    /// The name of the device.
    pub(crate) fn device(&self) -> &str {
        self.side.context.name()
    }

    fn post_message(&mut self, count: u64) -> Result<()> {
        let at = slot_of(count, RING_LEN / self.size) * self.size;
        self.region
            .mapping()
            .store_u64(at, count, Ordering::Relaxed)?;
        let signals_every = (self.window as u64).div_ceil(4);
        let flags = if count.is_multiple_of(signals_every) {
            SendFlags::SIGNALED
        } else {
            SendFlags::empty()
        };
        let source = Source::Shared(&self.region, at..at + self.size);
        let mut chain = self.qp.start_send();
        chain.write(count, source, self.remote.at(at as u64), flags)?;
        Ok(chain.submit()?)
    }

    fn wait_below(&mut self, outstanding: usize) -> Result<()> {
        while self.qp.sends_outstanding() >= outstanding {
            self.side.poll(&mut self.qp)?;
        }
        Ok(())
    }

    /// Tells the peer how many messages there were, and waits until they are all there.
    fn finish(&mut self, count: u64) -> Result<()> {
        let bytes = count.to_le_bytes();
        let mut chain = self.qp.start_send();
        let remote = self.remote.at(COUNT_AT as u64);
        chain.write(count, Source::Inline(&bytes), remote, SendFlags::SIGNALED)?;
        chain.submit()?;
        self.wait_below(1)
    }

    fn post_ping(&mut self, stamp: u64) -> Result<()> {
        let mut ping = [0; PING_LEN];
        ping[PING_LEN - STAMP_LEN..].copy_from_slice(&stamp.to_le_bytes());
        let flags = if stamp & LAST != 0 || stamp.is_multiple_of(PINGS_PER_SIGNAL) {
            SendFlags::SIGNALED
        } else {
            SendFlags::empty()
        };
        let mut chain = self.qp.start_send();
        let remote = self.remote.at(MAILBOX_AT as u64);
        chain.write(stamp, Source::Inline(&ping), remote, flags)?;
        Ok(chain.submit()?)
    }

    /// Polls memory, and the queue, which is what drives a software device, until the `sequence`th
    /// ping is there, and returns its stamp.
    fn await_ping(&mut self, sequence: u64) -> Result<u64> {
        loop {
            let stamp = self.load(MAILBOX_STAMP_AT)?;
            if stamp & !LAST == sequence {
                return Ok(stamp);
            }
            self.side.poll(&mut self.qp)?;
        }
    }

    fn load(&self, byte_offset: usize) -> Result<u64> {
        Ok(self
            .region
            .mapping()
            .load_u64(byte_offset, Ordering::Acquire)?)
    }
}

impl Path for Rdma {
    fn stream(&mut self, duration: Duration) -> Result<Streamed> {
        let start = Instant::now();
        let mut count = 0;
        while start.elapsed() < duration {
            self.wait_below(self.window)?;
            self.post_message(count)?;
            count += 1;
        }
        self.finish(count)?;
        let elapsed = start.elapsed();
        put_u64(&mut self.wake, count)?;
        Ok(Streamed {
            bytes: count * self.size as u64,
            elapsed,
        })
    }

    fn sink(&mut self) -> Result<u64> {
        let mapping = Arc::clone(self.region.mapping());
        while self.polls && self.load(COUNT_AT)? == 0 {
            self.side.poll(&mut self.qp)?;
        }
        let count = take_u64(&mut self.wake)?;
        if self.load(COUNT_AT)? != count {
            return Err("the count of messages was not written".into());
        }
        mapping.store_u64(COUNT_AT, 0, Ordering::Release)?;
        let slots = RING_LEN / self.size;
        check_ring(count, slots, |sequence| {
            self.load(slot_of(sequence, slots) * self.size)
        })?;
        Ok(count)
    }

    fn ping(&mut self, duration: Duration, round_trips: &mut Histogram<u64>) -> Result<()> {
        let mut sequence = self.sequence;
        ping_loop(&mut sequence, duration, round_trips, |stamp| {
            self.post_ping(stamp)?;
            self.await_ping(stamp & !LAST).map(drop)
        })?;
        self.sequence = sequence;
        self.wait_below(1)
    }

    fn pong(&mut self) -> Result<()> {
        let mut stamp = 0;
        while stamp & LAST == 0 {
            self.sequence += 1;
            stamp = self.await_ping(self.sequence)?;
            self.post_ping(stamp)?;
        }
        self.wait_below(1)
    }
}
