//! `farlog consume`: committed records to standard output.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use replicator::cluster::Cluster;
use replicator::record::Record;
use replicator::runtime::{Consumer, StartOffset};
use transport::DeviceSelector;

use crate::error::{CliError, load_topic};

/// How long a poll waits for records; what was written is shown at the latest then.
const POLL_TIMEOUT: Duration = Duration::from_millis(100);

/// Print the committed records of a topic, one value a line
///
/// Reads a replica's memory by RDMA READ; nothing is asked of the replica's CPU. Goes on until
/// --max-records are printed or Ctrl-C. Records of one partition come in order; several partitions are
/// interleaved. Values are printed as they are: one that contains a line feed takes several lines.
#[derive(Args)]
#[command(after_help = "\
Examples:
  farlog consume --cluster c.toml --topic flights --offset earliest --max-records 10
  farlog consume --cluster c.toml --topic flights --partition 2 --offset 1000 --keys")]
pub(crate) struct ConsumeArgs {
    /// Cluster file
    #[arg(long, value_name = "FILE")]
    cluster: PathBuf,
    /// Topic to read
    #[arg(long, value_name = "NAME")]
    topic: String,
    /// Only this partition
    #[arg(long, value_name = "P")]
    partition: Option<u32>,
    /// Where to start: earliest, latest, or an offset
    #[arg(long, value_name = "OFFSET", default_value = "latest", value_parser = parse_offset)]
    offset: StartOffset,
    /// Stop after this many records
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
    /// Print the key and a tab before each value
    #[arg(long)]
    keys: bool,
    /// Read from this replica and no other [default: the leader]
    #[arg(long, value_name = "ID")]
    from_replica: Option<u32>,
    /// Device: auto, soft, soft@ADDRESS, or a name that `farlog devices` shows
    #[arg(long, env = "FARLOG_DEVICE", default_value = "auto")]
    device: DeviceSelector,
}

fn parse_offset(text: &str) -> Result<StartOffset, String> {
    match (text, text.parse()) {
        ("earliest", _) => Ok(StartOffset::Earliest),
        ("latest", _) => Ok(StartOffset::Latest),
        (_, Ok(offset @ 0..)) => Ok(StartOffset::Offset(offset)),
        _ => Err("give earliest, latest, or an offset such as 1000".to_owned()),
    }
}

pub(crate) fn run(args: &ConsumeArgs) -> Result<(), CliError> {
    let cluster = load_topic(&args.cluster, &args.topic)?;
    let partitions = partitions(&cluster, args)?;
    let mut consumer = Consumer::open(
        &cluster,
        &args.topic,
        &partitions,
        args.offset,
        &args.device,
        args.from_replica,
    )?;
    let mut out = BufWriter::new(io::stdout().lock());
    match print_records(&mut consumer, args, &mut out) {
        // Whoever reads the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(Failure::Output(error)) => Err(CliError::new("cannot write to standard output", error)),
        Err(Failure::Fetch(error)) => Err(error),
        Ok(()) => Ok(()),
    }
}

enum Failure {
    Output(io::Error),
    Fetch(CliError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl<E: Into<CliError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Fetch(error.into())
    }
}

fn print_records(
    consumer: &mut Consumer,
    args: &ConsumeArgs,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let first_offset = match args.offset {
        StartOffset::Offset(offset) => offset,
        _ => 0,
    };
    let mut left = args.max_records.unwrap_or(u64::MAX);
    while left > 0 {
        for (_, batch) in consumer.poll(POLL_TIMEOUT)?.batches() {
            for record in batch.records()? {
                let record = record?;
                // The batch of the offset to start at may begin before it.
                if record.offset >= first_offset && left > 0 {
                    print_record(&record, args.keys, out)?;
                    left -= 1;
                }
            }
        }
        out.flush()?;
    }
    Ok(())
}

fn print_record(record: &Record<'_>, with_key: bool, out: &mut impl Write) -> io::Result<()> {
    if with_key {
        out.write_all(record.key.unwrap_or_default())?;
        out.write_all(b"\t")?;
    }
    out.write_all(record.value.unwrap_or_default())?;
    out.write_all(b"\n")
}

fn partitions(cluster: &Cluster, args: &ConsumeArgs) -> Result<Vec<u32>, CliError> {
    let count = cluster
        .topic(&args.topic)
        .map_or(0, |topic| topic.partition_count());
    match args.partition {
        None => Ok((0..count).collect()),
        Some(partition) if partition < count => Ok(vec![partition]),
        Some(partition) => Err(CliError::new(
            format!("partition {partition} of topic `{}`", args.topic),
            "there is no such partition",
        )
        .help(format!("the topic has partitions 0 to {}", count - 1))),
    }
}
