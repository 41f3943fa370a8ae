//! What a run found, for people and for machines.

use std::io::{Write, stdout};
use std::time::Duration;

use benches::machine::Machine;
use benches::stats::Summary;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::Options;
use crate::path::{PING_LEN, Result, Streamed};

/// Throughput of WRITEs over that of TCP that is expected at least.
const THROUGHPUT_TARGET: f64 = 0.8;
/// Round trip of WRITEs over that of TCP that is expected at most.
const ROUND_TRIP_TARGET: f64 = 1.5;

/// One stream of messages.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Stream {
    gb_per_s: f64,
    /// CPU seconds of the sender per 10^9 bytes.
    cpu_s_per_gb: f64,
    /// The same of the receiver.
    peer_cpu_s_per_gb: f64,
}

impl Stream {
    pub(crate) fn new(streamed: Streamed, cpu_time: Duration, peer_cpu_time: Duration) -> Stream {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a run moves less than 2^53 bytes"
        )]
        let gigabytes = streamed.bytes as f64 / 1e9;
        Stream {
            gb_per_s: gigabytes / streamed.elapsed.as_secs_f64(),
            cpu_s_per_gb: cpu_time.as_secs_f64() / gigabytes,
            peer_cpu_s_per_gb: peer_cpu_time.as_secs_f64() / gigabytes,
        }
    }
}

/// Round trips in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct RoundTrip {
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
    count: u64,
}

impl RoundTrip {
    pub(crate) fn new(histogram: &Histogram<u64>) -> RoundTrip {
        let us = |quantile| Duration::from_nanos(histogram.value_at_quantile(quantile));
        let us = |quantile| us(quantile).as_secs_f64() * 1e6;
        RoundTrip {
            p50_us: us(0.5),
            p99_us: us(0.99),
            p999_us: us(0.999),
            count: histogram.len(),
        }
    }
}

/// Everything once.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Round {
    pub(crate) tcp: Stream,
    pub(crate) write: Stream,
    pub(crate) write_idle_peer: Stream,
    pub(crate) tcp_round_trip: RoundTrip,
    pub(crate) write_round_trip: RoundTrip,
}

/// A run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    machine: Machine,
    device: String,
    size: usize,
    tx_depth: usize,
    is_pinned: bool,
    pub(crate) rounds: Vec<Round>,
}

/// A line of the table.
struct Line(&'static str, Summary);

impl Report {
    pub(crate) fn new(
        machine: Machine,
        device: &str,
        options: &Options,
        is_pinned: bool,
    ) -> Report {
        Report {
            machine,
            device: device.to_owned(),
            size: options.size,
            tx_depth: options.tx_depth,
            is_pinned,
            rounds: Vec::new(),
        }
    }

    fn over(&self, value: impl Fn(&Round) -> f64) -> Summary {
        Summary::of(self.rounds.iter().map(value))
    }

    fn throughput(&self) -> Summary {
        self.over(|r| r.write.gb_per_s / r.tcp.gb_per_s)
    }

    fn round_trip(&self) -> Summary {
        self.over(|r| r.write_round_trip.p50_us / r.tcp_round_trip.p50_us)
    }

    pub(crate) fn print(&self, as_json: bool) -> Result<()> {
        let mut out = stdout().lock();
        if as_json {
            let ratios = serde_json::json!({
                "report": self,
                "throughput_ratio": self.throughput(),
                "round_trip_ratio": self.round_trip(),
            });
            writeln!(out, "{ratios:#}")?;
            return Ok(());
        }
        let Report {
            machine,
            device,
            size,
            tx_depth,
            is_pinned,
            rounds,
        } = self;
        writeln!(out, "{machine}")?;
        let pinned = if *is_pinned { "pinned" } else { "not pinned" };
        let rounds = rounds.len();
        writeln!(out, "{device}, two processes, {pinned}, {rounds} rounds\n")?;
        let columns = format!("{:>9} {:>9} {:>9}", "median", "min", "max");
        writeln!(
            out,
            "{:44} {columns}",
            format!("throughput, {size} B, depth {tx_depth}")
        )?;
        print_lines(&mut out, &self.throughput_lines())?;
        let met = verdict(self.throughput().median >= THROUGHPUT_TARGET);
        writeln!(out, "  target: at least {THROUGHPUT_TARGET}, {met}\n")?;
        writeln!(
            out,
            "{:44} {columns}",
            format!("round trip, {PING_LEN} B, both spin")
        )?;
        print_lines(&mut out, &self.round_trip_lines())?;
        let met = verdict(self.round_trip().median <= ROUND_TRIP_TARGET);
        writeln!(out, "  target: at most {ROUND_TRIP_TARGET}, {met}")?;
        Ok(())
    }

    fn throughput_lines(&self) -> [Line; 8] {
        let idle = self.over(|r| r.write_idle_peer.gb_per_s / r.tcp.gb_per_s);
        [
            Line("TCP, GB/s", self.over(|r| r.tcp.gb_per_s)),
            Line("WRITE, GB/s", self.over(|r| r.write.gb_per_s)),
            Line(
                "WRITE, peer asleep, GB/s",
                self.over(|r| r.write_idle_peer.gb_per_s),
            ),
            Line("TCP, CPU s/GB, both sides", self.over(|r| cpu(&r.tcp))),
            Line("WRITE, CPU s/GB, both sides", self.over(|r| cpu(&r.write))),
            Line(
                "WRITE, peer asleep, CPU s/GB",
                self.over(|r| cpu(&r.write_idle_peer)),
            ),
            Line("WRITE, peer asleep / TCP", idle),
            Line("WRITE / TCP", self.throughput()),
        ]
    }

    fn round_trip_lines(&self) -> [Line; 5] {
        [
            Line("TCP, p50 us", self.over(|r| r.tcp_round_trip.p50_us)),
            Line("WRITE, p50 us", self.over(|r| r.write_round_trip.p50_us)),
            Line("TCP, p99 us", self.over(|r| r.tcp_round_trip.p99_us)),
            Line("WRITE, p99 us", self.over(|r| r.write_round_trip.p99_us)),
            Line("WRITE / TCP, p50", self.round_trip()),
        ]
    }
}

fn cpu(stream: &Stream) -> f64 {
    stream.cpu_s_per_gb + stream.peer_cpu_s_per_gb
}

fn print_lines(out: &mut impl Write, lines: &[Line]) -> Result<()> {
    for Line(name, summary) in lines {
        writeln!(out, "  {name:42} {summary}")?;
    }
    Ok(())
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "not met" }
}
