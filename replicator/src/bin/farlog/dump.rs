//! `farlog dump`: what a segment file holds, in the words of Kafka's own dump tool.

use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use replicator::record::{BatchError, BatchView, ControlRecord, Record, RecordIter, TimestampType};
use replicator::segment::{
    INDEX_ENTRY_LEN, IndexEntry, IoOp, SegmentError, SegmentFault, SegmentFile, SegmentReader,
    TIME_INDEX_ENTRY_LEN, TimeIndexEntry, parse_segment_path,
};
use serde::Serialize;

use crate::error::CliError;

/// Show the batches and records of a segment file, farlog's or Kafka's
///
/// Prints one line per batch: offsets, count, leader epoch, position in the file, timestamps, size,
/// codec and whether its CRC-32C is valid; or one line per entry of an index. Stops at the first
/// damage, says where and why, and exits with status 3.
#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    /// A .log, .index or .timeindex file
    #[arg(value_name = "SEGMENT")]
    segment: PathBuf,
    /// Show each record too: offset, timestamp, key, value, headers; compressed ones are decompressed
    #[arg(long)]
    records: bool,
    /// Print one JSON object a line, the last one a summary; text that is not UTF-8 as {"hex": ...}
    #[arg(long)]
    json: bool,
    /// Most bytes that one batch may decompress to
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 20)]
    decompressed_max: usize,
}

/// Prints the file and reports the first damage as an error.
pub(crate) fn run(args: &DumpArgs) -> Result<(), CliError> {
    let mut out = BufWriter::new(io::stdout().lock());
    let result = dump(args, &mut out);
    let flushed = out.flush().map_err(Stop::Output);
    match flushed.and(result) {
        Ok(()) => Ok(()),
        // Whoever reads the output has seen enough.
        Err(Stop::Output(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        Err(Stop::Output(error)) => Err(CliError::new("cannot write to standard output", error)),
        Err(Stop::Segment(error)) => Err(explain(&error)),
    }
}

fn explain(error: &SegmentError) -> CliError {
    match error {
        SegmentError::Damaged { .. } => CliError::new("damaged segment", error)
            .help(
                "what lies before that position is whole and shown above\n\
                 a node that starts cuts off what a crash left at the end of its log, and rebuilds \
                 indexes; other damage it refuses and changes nothing: another replica has \
                 the records",
            )
            .exit_code(CliError::MISMATCH),
        SegmentError::Io { source, .. } if source.kind() == ErrorKind::NotFound => CliError::new(
            "cannot dump",
            error,
        )
        .help(
            "segments lie in DATA_DIR/TOPIC-PARTITION, such as flights-0/00000000000000000000.log",
        ),
        _ => CliError::new("cannot dump", error),
    }
}

/// Why the dump ends early.
enum Stop {
    Segment(SegmentError),
    Output(io::Error),
}

impl From<SegmentError> for Stop {
    fn from(error: SegmentError) -> Self {
        Self::Segment(error)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

fn dump(args: &DumpArgs, out: &mut impl Write) -> Result<(), Stop> {
    let (base_offset, file) = parse_segment_path(&args.segment)?;
    let mut printer = Printer {
        out,
        json: args.json,
    };
    match file {
        SegmentFile::Log => dump_log(args, &mut printer),
        SegmentFile::Index => {
            let bytes = read(&args.segment)?;
            let entries = IndexEntry::read_all(&bytes);
            for &IndexEntry {
                relative_offset,
                position,
            } in &entries
            {
                let offset = base_offset + i64::from(relative_offset);
                printer.print(&Line::Index { offset, position })?;
            }
            check_rest(args, &bytes, entries.len() * INDEX_ENTRY_LEN)
        }
        SegmentFile::TimeIndex => {
            let bytes = read(&args.segment)?;
            let entries = TimeIndexEntry::read_all(&bytes);
            for &TimeIndexEntry {
                timestamp,
                relative_offset,
            } in &entries
            {
                let offset = base_offset + i64::from(relative_offset);
                printer.print(&Line::TimeIndex { timestamp, offset })?;
            }
            check_rest(args, &bytes, entries.len() * TIME_INDEX_ENTRY_LEN)
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, SegmentError> {
    fs::read(path).map_err(|source| SegmentError::Io {
        op: IoOp::Read,
        path: path.to_owned(),
        position: None,
        source,
    })
}

/// Behind the entries of an index there may be nothing but the zeros of a preallocated file.
fn check_rest(args: &DumpArgs, bytes: &[u8], len: usize) -> Result<(), Stop> {
    if bytes[len..].iter().all(|&byte| byte == 0) {
        return Ok(());
    }
    let (path, position) = (args.segment.clone(), len as u64);
    Err(SegmentError::Damaged {
        path,
        position,
        fault: SegmentFault::IndexEntry,
    }
    .into())
}

/// Prints batch after batch up to the end or the damage, then what it was in all.
fn dump_log(args: &DumpArgs, printer: &mut Printer<impl Write>) -> Result<(), Stop> {
    let reader = SegmentReader::open_file(&args.segment)?;
    let mut scanner = reader.batches(0)?;
    let (mut batches, mut records, mut bytes) = (0, 0, 0);
    let (mut next_offset, mut epoch) = (reader.base_offset(), -1);
    let result = loop {
        let (position, batch) = match scanner.next_batch() {
            Ok(Some(found)) => found,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        let is_whole = print_batch(args, position, &batch, printer)?;
        if let Err(fault) = is_whole.and_then(|()| follows(&batch, next_offset, epoch)) {
            break Err(SegmentError::Damaged {
                path: args.segment.clone(),
                position,
                fault,
            });
        }
        (next_offset, epoch) = (batch.next_offset(), batch.partition_leader_epoch());
        batches += 1;
        records += u64::from(batch.records_count());
        bytes += batch.len() as u64;
    };
    let damage = result.as_ref().err().map(ToString::to_string);
    printer.print(&Line::Summary {
        batches,
        records,
        bytes,
        damage,
    })?;
    result.map_err(Stop::Segment)
}

/// Compaction leaves gaps between batches; nothing makes offsets or epochs fall.
fn follows(batch: &BatchView<'_>, next_offset: i64, epoch: i32) -> Result<(), SegmentFault> {
    let (found, found_epoch) = (batch.base_offset(), batch.partition_leader_epoch());
    if found < next_offset {
        return Err(SegmentFault::Offset {
            expected: next_offset,
            found,
        });
    }
    if found_epoch < epoch {
        return Err(SegmentFault::Epoch {
            previous: epoch,
            found: found_epoch,
        });
    }
    Ok(())
}

/// Prints one batch; the inner result says whether it is whole.
fn print_batch(
    args: &DumpArgs,
    position: u64,
    batch: &BatchView<'_>,
    printer: &mut Printer<impl Write>,
) -> io::Result<Result<(), SegmentFault>> {
    let mut result = batch.verify_crc();
    let crc_is_valid = result.is_ok();
    let mut body = Cow::Borrowed(&[][..]);
    let mut records = None;
    if args.records && crc_is_valid {
        let read = batch
            .decompress(args.decompressed_max)
            .and_then(|decompressed| {
                body = decompressed;
                batch.records_from(&body)
            });
        match read {
            Ok(iter) => (records, result) = take_records(iter, batch.attributes().is_control()),
            Err(error) => result = Err(error),
        }
    }
    printer.print(&Line::Batch(BatchLine::new(
        position,
        batch,
        crc_is_valid,
        records,
    )))?;
    Ok(result.map_err(SegmentFault::Batch))
}

/// The records up to the first malformed one.
fn take_records(
    iter: RecordIter<'_>,
    is_control: bool,
) -> (Option<Vec<RecordLine<'_>>>, Result<(), BatchError>) {
    let mut records = Vec::new();
    for record in iter {
        match record {
            Ok(record) => records.push(RecordLine::new(&record, is_control)),
            Err(error) => return (Some(records), Err(error)),
        }
    }
    (Some(records), Ok(()))
}

struct Printer<W> {
    out: W,
    json: bool,
}

impl<W: Write> Printer<W> {
    fn print(&mut self, line: &Line<'_>) -> io::Result<()> {
        if self.json {
            serde_json::to_writer(&mut self.out, line)?;
            writeln!(self.out)
        } else {
            writeln!(self.out, "{line}")
        }
    }
}

/// One line of output; the names in JSON are the fields'.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line<'a> {
    Batch(BatchLine<'a>),
    #[serde(rename = "index")]
    Index {
        offset: i64,
        position: i32,
    },
    #[serde(rename = "timeindex")]
    TimeIndex {
        timestamp: i64,
        offset: i64,
    },
    Summary {
        batches: u64,
        records: u64,
        bytes: u64,
        damage: Option<String>,
    },
}

#[derive(Serialize)]
struct BatchLine<'a> {
    base_offset: i64,
    last_offset: i64,
    records_count: u32,
    partition_leader_epoch: i32,
    position: u64,
    len: usize,
    timestamp_type: &'static str,
    base_timestamp: i64,
    max_timestamp: i64,
    compression: String,
    crc: u32,
    crc_is_valid: bool,
    is_transactional: bool,
    is_control: bool,
    has_delete_horizon: bool,
    producer_id: i64,
    producer_epoch: i16,
    base_sequence: i32,
    magic: i8,
    #[serde(skip_serializing_if = "Option::is_none")]
    records: Option<Vec<RecordLine<'a>>>,
}

impl<'a> BatchLine<'a> {
    fn new(
        position: u64,
        batch: &BatchView<'_>,
        crc_is_valid: bool,
        records: Option<Vec<RecordLine<'a>>>,
    ) -> Self {
        let header = batch.header();
        let attributes = header.attributes;
        Self {
            base_offset: header.base_offset,
            last_offset: batch.last_offset(),
            records_count: batch.records_count(),
            partition_leader_epoch: header.partition_leader_epoch,
            position,
            len: batch.len(),
            timestamp_type: match attributes.timestamp_type() {
                TimestampType::CreateTime => "CreateTime",
                TimestampType::LogAppendTime => "LogAppendTime",
            },
            base_timestamp: header.base_timestamp,
            max_timestamp: header.max_timestamp,
            compression: attributes
                .compression()
                .map_or_else(|_| "unknown".to_owned(), |codec| codec.to_string()),
            crc: header.crc,
            crc_is_valid,
            is_transactional: attributes.is_transactional(),
            is_control: attributes.is_control(),
            has_delete_horizon: attributes.has_delete_horizon(),
            producer_id: header.producer_id,
            producer_epoch: header.producer_epoch,
            base_sequence: header.base_sequence,
            magic: header.magic,
            records,
        }
    }
}

#[derive(Serialize)]
struct RecordLine<'a> {
    offset: i64,
    timestamp: i64,
    key: Option<Text<'a>>,
    value: Option<Text<'a>>,
    headers: Vec<HeaderLine<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    control: Option<String>,
}

#[derive(Serialize)]
struct HeaderLine<'a> {
    key: Text<'a>,
    value: Option<Text<'a>>,
}

impl<'a> RecordLine<'a> {
    fn new(record: &Record<'a>, is_control: bool) -> Self {
        let control = is_control.then(|| match ControlRecord::from_key(record.key) {
            Some(ControlRecord::Abort) => "abort".to_owned(),
            Some(ControlRecord::Commit) => "commit".to_owned(),
            Some(ControlRecord::Other(kind)) => format!("type {kind}"),
            None => "malformed".to_owned(),
        });
        Self {
            offset: record.offset,
            timestamp: record.timestamp,
            key: record.key.map(Text::new),
            value: record.value.map(Text::new),
            headers: record
                .headers()
                .map(|header| HeaderLine {
                    key: Text::new(header.key),
                    value: header.value.map(Text::new),
                })
                .collect(),
            control,
        }
    }
}

/// Bytes for a person: as they are if they are text, else in hexadecimal.
#[derive(Serialize)]
#[serde(untagged)]
enum Text<'a> {
    Utf8(&'a str),
    Bytes { hex: String },
}

impl<'a> Text<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Utf8(text),
            Err(_) => Self::Bytes {
                hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
            },
        }
    }
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Batch(batch) => batch.fmt(f),
            Self::Index { offset, position } => write!(f, "offset: {offset} position: {position}"),
            Self::TimeIndex { timestamp, offset } => {
                write!(f, "timestamp: {timestamp} offset: {offset}")
            }
            Self::Summary {
                batches,
                records,
                bytes,
                ..
            } => {
                write!(f, "{batches} batches, {records} records, {bytes} bytes")
            }
        }
    }
}

impl fmt::Display for BatchLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "baseOffset: {} lastOffset: {} count: {} baseSequence: {} producerId: {} \
             producerEpoch: {} partitionLeaderEpoch: {} isTransactional: {} isControl: {} \
             deleteHorizon: {} position: {} {}: {} size: {} magic: {} compresscodec: {} crc: {} \
             isvalid: {}",
            self.base_offset,
            self.last_offset,
            self.records_count,
            self.base_sequence,
            self.producer_id,
            self.producer_epoch,
            self.partition_leader_epoch,
            self.is_transactional,
            self.is_control,
            self.has_delete_horizon,
            self.position,
            self.timestamp_type,
            self.max_timestamp,
            self.len,
            self.magic,
            self.compression,
            self.crc,
            self.crc_is_valid
        )?;
        let records = self.records.iter().flatten();
        records
            .into_iter()
            .try_for_each(|record| write!(f, "\n{record}"))
    }
}

impl fmt::Display for RecordLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "| offset: {} timestamp: {}", self.offset, self.timestamp)?;
        if let Some(control) = &self.control {
            write!(f, " control: {control}")?;
        }
        for (name, text) in [("key", &self.key), ("value", &self.value)] {
            match text {
                Some(text) => write!(f, " {name}: {text}")?,
                None => write!(f, " {name}: null")?,
            }
        }
        for header in &self.headers {
            match &header.value {
                Some(value) => write!(f, " header {}: {value}", header.key)?,
                None => write!(f, " header {}: null", header.key)?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Text<'_> {
    /// Control characters are escaped, so that a record cannot steer a terminal or fake a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Utf8(text) => text.chars().try_for_each(|c| match c.is_control() {
                true => write!(f, "{}", c.escape_default()),
                false => write!(f, "{c}"),
            }),
            Self::Bytes { hex } => write!(f, "0x{hex}"),
        }
    }
}
