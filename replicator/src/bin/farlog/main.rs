//! The `farlog` command: one subcommand per file.

mod consume;
mod demo;
mod devices;
mod dump;
mod error;
mod input;
mod produce;
mod progress;
mod recover;
mod serve;
mod signals;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use error::CliError;
use tracing_subscriber::EnvFilter;

/// A Kafka-style replicated log whose bytes travel by RDMA.
///
/// A leader's NIC writes the log into its followers' memory, and consumers read committed records
/// straight out of it. Where a machine has no RDMA hardware, a software device of farlog's own is used.
#[derive(Parser)]
#[command(name = "farlog", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  farlog demo                          see it all work: leader, followers, consumer, real data
  farlog devices                       which RDMA devices there are, and what ails them
  farlog serve --node 1 --cluster c.toml --data-dir /var/lib/farlog
  farlog produce --cluster c.toml --topic flights flights.csv.gz
  farlog consume --cluster c.toml --topic flights --offset earliest --max-records 10
  farlog dump --records flights-0/00000000000000000000.log

Environment:
  FARLOG_DEVICE   device to use where --device is not given: auto, soft, soft@ADDRESS, mlx5_0, ...
  FARLOG_LOG      what to log to standard error, as in FARLOG_LOG=debug or FARLOG_LOG=replicator=trace
  FARLOG_PCAP     file into which the software device writes every packet, for Wireshark

Exit status:
  0  success
  1  the command failed; standard error says why and what to do
  2  wrong usage
  3  data are not what they should be: a mismatch in the demo, a damaged segment
  4  a process of the demo died";

#[derive(Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    Devices(devices::DevicesArgs),
    Serve(serve::ServeArgs),
    Produce(produce::ProduceArgs),
    Consume(consume::ConsumeArgs),
    Dump(dump::DumpArgs),
    Recover(recover::RecoverArgs),
    #[command(hide = true)]
    DemoConsumer(demo::consumer::DemoConsumerArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("FARLOG_LOG").unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    let result = match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Produce(args) => produce::run(&args),
        Command::Consume(args) => consume::run(&args),
        Command::Dump(args) => dump::run(&args),
        Command::Recover(args) => recover::run(&args),
        Command::DemoConsumer(args) => demo::consumer::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

/// Writes text to standard output; a reader that has seen enough is no error.
fn print(text: &str) -> Result<(), CliError> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(CliError::new("cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}
