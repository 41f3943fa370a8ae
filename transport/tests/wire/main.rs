//! Two processes, one wire: every operation in both directions, every byte and every completion checked at
//! both ends.
//!
//! ```text
//!   wire                                                    two software devices of this machine
//!   wire listen  --device DEVICE --control ADDRESS:PORT
//!   wire connect --device DEVICE --control ADDRESS:PORT [--mtu BYTES] [--lossy] [--only PART]
//! ```
//!
//! The listening side is told by the connecting one what is done. DEVICE is as everywhere: `soft@ADDRESS`,
//! `rxe0`. The control connection is TCP, and should not be where packets are lost; the devices' own
//! addresses (IPv4 or IPv6) are theirs to choose. `--lossy` tells that the network loses packets: the answer
//! to a refused request may get lost then, and the requester gives up instead. `--only killed` ends the
//! listening side with SIGKILL in the middle of its work.
//!
//! `cargo test` runs the first form. `.ci/wire` runs the others between kernel rxe and the software device.

mod control;
#[path = "../common/differences.rs"]
mod differences;
mod end;
mod killed;
mod operations;
mod refusals;

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Instant;

use transport::{Context, DeviceSelector, Mtu};

use control::Control;
use differences::Maker;
use end::Side;

/// What is tested: the name that `--only` takes, and what each side runs.
type Part = (&'static str, fn(&mut Side));

const PARTS: [Part; 6] = [
    ("operations", operations::run),
    ("wraps", operations::run_wraps),
    ("at-once", operations::run_at_once),
    ("crowd", operations::run_crowd),
    ("refusals", refusals::run),
    (KILLED, killed::run),
];

/// The part that the listening side does not survive: it runs only if it is asked for.
const KILLED: &str = "killed";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some(role @ ("listen" | "connect")) => run_side(role == "connect", &args[1..]),
        _ => run_both(&args),
    }
}

/// What this process is doing, told if it fails.
pub(crate) struct Step(pub(crate) String);

impl Drop for Step {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("wire: failed at: {}", self.0);
        }
    }
}

struct Options {
    device: DeviceSelector,
    control: SocketAddr,
    mtu: Mtu,
    is_lossy: bool,
    only: Option<&'static str>,
}

fn parse(args: &[String]) -> Result<Options, String> {
    let (mut device, mut control) = (None, None);
    let (mut mtu, mut is_lossy, mut only) = (Mtu::Mtu1024, false, None);
    let mut args = args.iter();
    while let Some(name) = args.next() {
        let mut value = || args.next().ok_or(format!("{name} needs a value"));
        match name.as_str() {
            "--device" => device = Some(value()?.parse().map_err(|error| format!("{error}"))?),
            "--control" => control = Some(value()?.parse().map_err(|error| format!("{error}"))?),
            "--mtu" => mtu = parse_mtu(value()?)?,
            "--lossy" => is_lossy = true,
            "--only" => {
                let name = value()?;
                let part = PARTS.iter().find(|(part, _)| part == name);
                only = Some(part.ok_or(format!("there is no part {name}"))?.0);
            }
            _ => return Err(format!("unknown option {name}")),
        }
    }
    Ok(Options {
        device: device.ok_or("--device is missing")?,
        control: control.ok_or("--control is missing")?,
        mtu,
        is_lossy,
        only,
    })
}

fn parse_mtu(text: &str) -> Result<Mtu, String> {
    [
        Mtu::Mtu256,
        Mtu::Mtu512,
        Mtu::Mtu1024,
        Mtu::Mtu2048,
        Mtu::Mtu4096,
    ]
    .into_iter()
    .find(|mtu| mtu.bytes().to_string() == text)
    .ok_or(format!("no path MTU has {text} bytes"))
}

fn run_side(is_connector: bool, args: &[String]) -> ExitCode {
    let options = match parse(args) {
        Ok(options) => options,
        Err(reason) => {
            eprintln!("wire: {reason}");
            return ExitCode::from(2);
        }
    };
    let context = Context::open(&options.device).unwrap_or_else(|error| panic!("{error}"));
    let control = if is_connector {
        Control::connect(options.control)
    } else {
        let listener = TcpListener::bind(options.control).expect("the control address is free");
        let address = listener.local_addr().expect("it is bound");
        println!("{LISTENING}{address}");
        Control::accept(&listener)
    };
    let mut side = Side::new(context, control, is_connector);
    let only = agree(&mut side, &options);
    let (started, before) = (Instant::now(), counters(&side.context));
    for (name, run) in PARTS {
        if only.map_or(name == KILLED, |only| only != name) {
            continue;
        }
        let (part_started, completions) = (Instant::now(), side.completions);
        run(&mut side);
        println!(
            "wire: {} {name}: {} completions, {:.1} s",
            side.context.name(),
            side.completions - completions,
            part_started.elapsed().as_secs_f64()
        );
    }
    println!(
        "wire: {} ({:?}) against {:?}, path MTU {}: passed, {} completions, {}, {:.1} s",
        side.context.name(),
        side.maker,
        side.peer_maker,
        side.mtu,
        side.completions,
        since(&before, &counters(&side.context)),
        started.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}

/// What tells of retries, by the names of the device's counters.
const COUNTED: [&str; 8] = [
    "sent_pkts",
    "completer_retry_err",
    "rcvd_seq_err",
    "rcvd_rnr_err",
    "out_of_seq_request",
    "duplicate_request",
    "retry_exceeded_err",
    "retry_rnr_exceeded_err",
];

/// The device's counters, in that order.
fn counters(context: &Context) -> [u64; COUNTED.len()] {
    let counters = context.counters(1);
    COUNTED.map(|wanted| {
        let found = counters.iter().find(|(name, _)| name == wanted);
        found.map_or(0, |(_, value)| *value)
    })
}

/// How much they have grown.
fn since(before: &[u64], after: &[u64]) -> String {
    let grown = before
        .iter()
        .zip(after)
        .map(|(before, after)| after - before);
    let named = COUNTED
        .iter()
        .zip(grown)
        .map(|(name, count)| format!("{name} {count}"));
    named.collect::<Vec<_>>().join(", ")
}

/// The connecting side tells the other what is done; both learn whose device the other has. Returns the only
/// part that is wanted, if not all are.
fn agree(side: &mut Side, options: &Options) -> Option<&'static str> {
    const ALL_PARTS: u64 = u64::MAX;
    if !side.is_connector {
        let [mtu, is_lossy, part, maker] = side.control.receive();
        side.control.send([maker_code(side.maker)]);
        side.mtu = parse_mtu(&mtu.to_string()).expect("the other side has checked it");
        side.is_lossy = is_lossy == 1;
        side.peer_maker = maker_of(maker);
        let part = usize::try_from(part).ok()?;
        return PARTS.get(part).map(|(name, _)| *name);
    }
    side.mtu = options.mtu;
    side.is_lossy = options.is_lossy;
    let part = PARTS
        .iter()
        .position(|(name, _)| Some(*name) == options.only);
    side.control.send([
        options.mtu.bytes() as u64,
        options.is_lossy.into(),
        part.map_or(ALL_PARTS, |part| part as u64),
        maker_code(side.maker),
    ]);
    let [maker] = side.control.receive();
    side.peer_maker = maker_of(maker);
    options.only
}

const MAKERS: [Maker; 3] = [Maker::Soft, Maker::Rxe, Maker::Other];

fn maker_code(maker: Maker) -> u64 {
    MAKERS
        .iter()
        .position(|known| *known == maker)
        .map_or(u64::MAX, |code| code as u64)
}

fn maker_of(code: u64) -> Maker {
    let index = usize::try_from(code).unwrap_or(usize::MAX);
    MAKERS.get(index).copied().unwrap_or(Maker::Other)
}

/// What the listening side prints first, before its control address.
const LISTENING: &str = "wire: listening on ";

/// The name of the one test in the words of `cargo test`.
const TEST_NAME: &str = "two_processes";

/// Runs both sides on software devices of this machine, if the filters of `cargo test` ask for it.
fn run_both(args: &[String]) -> ExitCode {
    if args.iter().any(|arg| arg == "--list") {
        println!("{TEST_NAME}: test");
        return ExitCode::SUCCESS;
    }
    let mut filters = args.iter().filter(|arg| !arg.starts_with('-')).peekable();
    if filters.peek().is_some() && !filters.any(|filter| TEST_NAME.contains(filter.as_str())) {
        return ExitCode::SUCCESS;
    }
    let [listened, connected] = run_pair(&["--mtu", "4096"]);
    let [killed, survived] = run_pair(&["--only", KILLED]);
    if listened.success()
        && connected.success()
        && killed.signal() == Some(SIGKILL)
        && survived.success()
    {
        println!("test {TEST_NAME} ... ok");
        return ExitCode::SUCCESS;
    }
    println!("test {TEST_NAME} ... FAILED: {listened}, {connected}; {killed}, {survived}");
    ExitCode::FAILURE
}

const SIGKILL: i32 = 9;

/// Runs the listening and the connecting side, the latter with these options, and returns how they ended.
fn run_pair(options: &[&str]) -> [ExitStatus; 2] {
    let mut listen = spawn(&["listen", "--device", "soft", "--control", "127.0.0.1:0"]);
    let mut output = BufReader::new(listen.stdout.take().expect("piped"));
    let mut line = String::new();
    output
        .read_line(&mut line)
        .expect("the listening side runs");
    let address = line
        .trim_end()
        .strip_prefix(LISTENING)
        .expect("its first line");
    let connect = ["connect", "--device", "soft", "--control", address];
    let mut connect = spawn(&[&connect, options].concat());
    let mut lines = output.lines();
    let copied = std::thread::spawn(move || {
        while let Some(Ok(line)) = lines.next() {
            println!("{line}");
        }
    });
    let mut connect_output = BufReader::new(connect.stdout.take().expect("piped")).lines();
    while let Some(Ok(line)) = connect_output.next() {
        println!("{line}");
    }
    copied.join().expect("it only copies");
    [listen.wait(), connect.wait()].map(|status| status.expect("a child of ours"))
}

fn spawn(args: &[&str]) -> Child {
    Command::new(std::env::current_exe().expect("this program"))
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program starts again")
}
