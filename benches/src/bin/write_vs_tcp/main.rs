//! Is the software device as fast as TCP over the loopback interface?
//!
//! Two processes, each with a device and with TCP connections to the other, take turns at the same
//! work over both, round after round:
//!
//! - throughput: RDMA WRITEs of 64 KiB, a window of them outstanding, against a TCP stream in writes of
//!   64 KiB whose receiver copies each message from its buffer to its place, as the device does;
//! - round trip: WRITEs of 64 B into each other's polled memory, against 64 B over TCP with
//!   TCP_NODELAY and sockets that spin.
//!
//! Expected: at least 0.8 times the throughput, and at most 1.5 times the round trip. Each round
//! compares runs next to each other; what is reported is the median of those ratios, and their spread.
//! It is an experiment on any device, but the comparison is fair on one that also goes through the
//! kernel's loopback.

mod path;
mod rdma;
mod report;
mod tcp;

use std::env;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitCode};
use std::time::Duration;

use benches::machine::{Machine, pin};
use benches::process_cpu_time;
use clap::Parser;
use transport::DeviceSelector;

use path::{Path, RING_LEN, Result, STAMP_LEN, put_u64, round_trips, take_u64};
use rdma::Rdma;
use report::{Report, Round, Stream};
use tcp::Tcp;

/// How long one process waits for the other before it gives up.
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections between the processes: control, wake-ups of the device's user, TCP's bulk and pings.
const CONNECTIONS: usize = 4;

/// Compares RDMA WRITEs with TCP between two processes of this machine.
#[derive(Debug, Clone, Parser)]
struct Options {
    /// Device: soft, soft@ADDRESS, or the name of an RDMA device.
    #[arg(short, long, default_value = "soft")]
    device: DeviceSelector,
    /// Bytes per message of the throughput test; a power of two from 8 B to 16 MiB.
    #[arg(short, long, default_value_t = 64 << 10, value_parser = message_size)]
    size: usize,
    /// WRITEs outstanding in the throughput test, 1 to 64.
    #[arg(short = 't', long, default_value_t = 32)]
    tx_depth: usize,
    /// Rounds; each does everything once.
    #[arg(short = 'n', long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds that all rounds together take.
    #[arg(short = 'D', long, default_value_t = 20.0, value_parser = seconds)]
    duration: f64,
    /// Leave both processes to the scheduler instead of giving each a CPU.
    #[arg(long)]
    no_pin: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Be the other process, and connect to this address.
    #[arg(long, hide = true)]
    peer: Option<SocketAddr>,
}

/// What the peer is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Job {
    TcpSink = 1,
    WriteSink = 2,
    IdleSink = 3,
    TcpPong = 4,
    WritePong = 5,
    Stop = 6,
}

const JOBS: [Job; 6] = [
    Job::TcpSink,
    Job::WriteSink,
    Job::IdleSink,
    Job::TcpPong,
    Job::WritePong,
    Job::Stop,
];

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match options.peer {
        Some(address) => serve(&options, address),
        None => lead(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("write_vs_tcp: {error}");
            ExitCode::FAILURE
        }
    }
}

fn message_size(text: &str) -> std::result::Result<usize, String> {
    let size: usize = text.parse().map_err(|_| "not a number of bytes")?;
    if size.is_power_of_two() && (STAMP_LEN..=RING_LEN).contains(&size) {
        Ok(size)
    } else {
        Err(format!("not a power of two from {STAMP_LEN} to {RING_LEN}"))
    }
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    if (0.01..=86_400.0).contains(&seconds) {
        Ok(seconds)
    } else {
        Err("not between 0.01 and 86400 seconds".to_owned())
    }
}

/// The first process: starts the other, and measures.
fn lead(options: &Options) -> Result<()> {
    let machine = Machine::describe();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1));
    command.args(["--peer", &listener.local_addr()?.to_string()]);
    let _peer = Peer(command.spawn()?);
    // After the peer has started, which would inherit it, and before the device's thread does.
    let is_pinned = !options.no_pin && pin(0);
    let mut ends = Ends::open(options, || Ok(listener.accept()?.0))?;

    let mut report = Report::new(machine, ends.rdma.device(), options, is_pinned);
    // Streams of three kinds and pings of two, in each round and in one before to warm up.
    let share = Duration::from_secs_f64(options.duration / f64::from(5 * (options.rounds + 1)));
    for round in 0..=options.rounds {
        let measured = ends.round(share)?;
        if round > 0 {
            report.rounds.push(measured);
        }
    }
    put_job(&mut ends.control, Job::Stop)?;
    report.print(options.json)
}

/// The other process: does as it is asked.
fn serve(options: &Options, leader: SocketAddr) -> Result<()> {
    if !options.no_pin {
        pin(1);
    }
    let mut ends = Ends::open(options, || Ok(TcpStream::connect(leader)?))?;
    loop {
        let cpu_before = process_cpu_time();
        match take_job(&mut ends.control)? {
            Job::Stop => return Ok(()),
            Job::TcpSink => ends.tcp.sink().map(drop),
            Job::TcpPong => ends.tcp.pong(),
            Job::WritePong => ends.rdma.pong(),
            job => {
                ends.rdma.polls = job == Job::WriteSink;
                ends.rdma.sink().map(drop)
            }
        }?;
        let cpu_time = process_cpu_time() - cpu_before;
        put_u64(&mut ends.control, u64::try_from(cpu_time.as_nanos())?)?;
    }
}

/// One process's ends of everything between the two.
struct Ends {
    control: TcpStream,
    tcp: Tcp,
    rdma: Rdma,
}

impl Ends {
    /// Opens everything over the streams that `next` yields in the same order on both sides.
    fn open(options: &Options, mut next: impl FnMut() -> Result<TcpStream>) -> Result<Ends> {
        let mut streams = Vec::new();
        for _ in 0..CONNECTIONS {
            let stream = next()?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            streams.push(stream);
        }
        let Ok([control, wake, bulk, pings]) = <[TcpStream; CONNECTIONS]>::try_from(streams) else {
            return Err("not all connections were made".into());
        };
        Ok(Ends {
            control,
            rdma: Rdma::connect(&options.device, wake, options.size, options.tx_depth)?,
            tcp: Tcp::new(bulk, pings, options.size)?,
        })
    }

    fn round(&mut self, share: Duration) -> Result<Round> {
        Ok(Round {
            tcp: self.stream(Job::TcpSink, share)?,
            write: self.stream(Job::WriteSink, share)?,
            write_idle_peer: self.stream(Job::IdleSink, share)?,
            tcp_round_trip: self.ping(Job::TcpPong, share)?,
            write_round_trip: self.ping(Job::WritePong, share)?,
        })
    }

    fn path(&mut self, job: Job) -> &mut dyn Path {
        match job {
            Job::TcpSink | Job::TcpPong => &mut self.tcp,
            _ => &mut self.rdma,
        }
    }

    fn stream(&mut self, job: Job, share: Duration) -> Result<Stream> {
        put_job(&mut self.control, job)?;
        let cpu_before = process_cpu_time();
        let streamed = self.path(job).stream(share)?;
        let cpu_time = process_cpu_time() - cpu_before;
        let peer_cpu_time = Duration::from_nanos(take_u64(&mut self.control)?);
        Ok(Stream::new(streamed, cpu_time, peer_cpu_time))
    }

    fn ping(&mut self, job: Job, share: Duration) -> Result<report::RoundTrip> {
        put_job(&mut self.control, job)?;
        let mut histogram = round_trips();
        self.path(job).ping(share, &mut histogram)?;
        take_u64(&mut self.control)?;
        Ok(report::RoundTrip::new(&histogram))
    }
}

fn put_job(control: &mut TcpStream, job: Job) -> Result<()> {
    Ok(control.write_all(&[job as u8])?)
}

fn take_job(control: &mut TcpStream) -> Result<Job> {
    let mut byte = [0];
    control.read_exact(&mut byte)?;
    let job = JOBS.into_iter().find(|&job| job as u8 == byte[0]);
    job.ok_or_else(|| format!("unknown job {}", byte[0]).into())
}

/// The other process; it does not outlive this one's interest.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself, and nothing is lost if it has not.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
