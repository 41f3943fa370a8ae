//! What is measured on either path between the two processes.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// What goes wrong in a benchmark ends it.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Marks the last message of a round, in its stamp.
pub(crate) const LAST: u64 = 1 << 63;
/// Bytes of a stamp, which tells a message from the one before it in the same place.
pub(crate) const STAMP_LEN: usize = 8;
/// Bytes of a ping.
pub(crate) const PING_LEN: usize = 64;
/// Bytes that messages of a stream cycle through, in the source and in the target.
pub(crate) const RING_LEN: usize = 16 << 20;
/// Longest round trip that the histogram tells from longer ones.
const ROUND_TRIP_MAX: Duration = Duration::from_secs(10);

/// Bytes over time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streamed {
    pub(crate) bytes: u64,
    pub(crate) elapsed: Duration,
}

/// Both ends of one way to move bytes; the client calls the first of each pair, the peer the second.
pub(crate) trait Path {
    /// Sends messages for about `duration`, and waits until the last has arrived.
    fn stream(&mut self, duration: Duration) -> Result<Streamed>;
    /// Receives what `stream` sends, each message in its place, and returns how many they were.
    fn sink(&mut self) -> Result<u64>;
    /// Sends pings for about `duration`, each when the one before has come back, and records round trips.
    fn ping(&mut self, duration: Duration, round_trips: &mut Histogram<u64>) -> Result<()>;
    /// Returns the pings.
    fn pong(&mut self) -> Result<()>;
}

/// A histogram of nanoseconds.
pub(crate) fn round_trips() -> Histogram<u64> {
    let max = u64::try_from(ROUND_TRIP_MAX.as_nanos()).expect("seconds fit");
    let mut histogram = Histogram::new_with_max(max, 3).expect("valid bounds");
    histogram.auto(true);
    histogram
}

/// Calls `exchange` with one stamp after another until `duration` is over, and records each call.
///
/// The stamp of the last call has [`LAST`] set.
pub(crate) fn ping_loop(
    sequence: &mut u64,
    duration: Duration,
    round_trips: &mut Histogram<u64>,
    mut exchange: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut now = Instant::now();
    let deadline = now + duration;
    while now < deadline {
        *sequence += 1;
        exchange(*sequence)?;
        let after = Instant::now();
        let nanos = u64::try_from((after - now).as_nanos())?;
        round_trips.record(nanos)?;
        now = after;
    }
    *sequence += 1;
    exchange(*sequence | LAST)
}

/// Returns which of `slots` places message number `sequence` goes to.
pub(crate) fn slot_of(sequence: u64, slots: usize) -> usize {
    usize::try_from(sequence % slots as u64).expect("less than a usize")
}

/// Checks that each of `slots` places holds the last of `count` messages that went there.
pub(crate) fn check_ring(
    count: u64,
    slots: usize,
    mut stamp: impl FnMut(u64) -> Result<u64>,
) -> Result<()> {
    for sequence in count.saturating_sub(slots as u64)..count {
        let found = stamp(sequence)? & !LAST;
        if found != sequence {
            return Err(format!("message {found} lies where {sequence} should").into());
        }
    }
    Ok(())
}

/// Sends one number.
pub(crate) fn put_u64(stream: &mut impl Write, value: u64) -> io::Result<()> {
    stream.write_all(&value.to_le_bytes())
}

/// Receives one number.
pub(crate) fn take_u64(stream: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
