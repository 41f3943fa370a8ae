//! Records from a file, a pipe or the bundled data: one per line.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use flate2::bufread::MultiGzDecoder;
use replicator::control::BATCH_LEN_MAX;

use crate::error::CliError;

/// All departures from New York City's airports in January 2013.
const BUNDLED: &[u8] = include_bytes!("../../../data/flights-2013-01.csv.gz");
/// Name of the bundled data in messages.
const BUNDLED_NAME: &str = "the bundled flights-2013-01.csv.gz";
/// The bundled data's column `tailnum`, counted from 1.
pub(crate) const BUNDLED_KEY_COLUMN: usize = 12;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Lines are handed over in lots of about this many bytes.
const LOT_LEN: usize = 64 << 10;
/// Most lots that wait to be taken.
const LOTS_MAX: usize = 16;

/// Lines on their way from the thread that reads them.
#[derive(Debug)]
pub(crate) struct Input {
    /// What is read, for messages.
    pub(crate) name: String,
    /// Lots of lines, without their line feeds. Ends with the input or with an error.
    pub(crate) lots: Receiver<Result<Lot, CliError>>,
}

/// Some lines, one after another.
#[derive(Debug, Default)]
pub(crate) struct Lot {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Lot {
    /// The lines in order.
    pub(crate) fn lines(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(&self.ends)
            .map(|(start, &end)| &self.bytes[start..end])
    }

    /// The line with this index.
    pub(crate) fn line(&self, index: usize) -> &[u8] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..self.ends[index]]
    }

    /// A lot of these lines.
    #[cfg(test)]
    pub(crate) fn of(lines: &[&str]) -> Self {
        let mut lot = Self::default();
        for line in lines {
            lot.bytes.extend(line.as_bytes());
            lot.ends.push(lot.bytes.len());
        }
        lot
    }
}

impl Input {
    /// Starts to read `path`, `-` for standard input. A gzip file is recognised by its first bytes.
    pub(crate) fn open(path: &Path) -> Result<Self, CliError> {
        if path == Path::new("-") {
            return Self::start("standard input".to_owned(), io::stdin());
        }
        let name = path.display().to_string();
        let is_dir = path.is_dir();
        match File::open(path) {
            Ok(_) if is_dir => Err(CliError::new(
                format!("cannot read {name}"),
                "it is a directory",
            )
            .help("name a file, or - for standard input")),
            Ok(file) => Self::start(name, file),
            Err(error) => Err(CliError::new(format!("cannot read {name}"), error)
                .help("name a readable file, or - for standard input")),
        }
    }

    /// Starts to read the bundled data.
    pub(crate) fn bundled() -> Result<Self, CliError> {
        Self::start(BUNDLED_NAME.to_owned(), BUNDLED)
    }

    fn start(name: String, source: impl Read + Send + 'static) -> Result<Self, CliError> {
        let (sender, lots) = bounded(LOTS_MAX);
        let what = format!("cannot read {name}");
        thread::Builder::new()
            .name("input".to_owned())
            .spawn(move || {
                if let Err(error) = read_all(source, &sender) {
                    let _ = sender.send(Err(error.explain(&what))); // nobody listens once the command has failed
                }
            })
            .map_err(|error| CliError::new("cannot start a thread", error))?;
        Ok(Self { name, lots })
    }
}

/// Hands over lots until the input ends or nobody takes them.
fn read_all(
    source: impl Read + Send + 'static,
    sender: &Sender<Result<Lot, CliError>>,
) -> Result<(), ReadError> {
    let mut lines = Lines::start(source).map_err(ReadError::Io)?;
    loop {
        let mut lot = Lot::default();
        let end = lines.fill(&mut lot);
        let is_last = lot.ends.is_empty();
        // The lines before an error are whole.
        if is_last || sender.send(Ok(lot)).is_err() {
            return end;
        }
        end?;
    }
}

/// Why the input ends before its end.
#[derive(Debug)]
enum ReadError {
    Io(io::Error),
    Gzip(io::Error),
    /// The line with this number exceeds [`BATCH_LEN_MAX`].
    LineTooLong(u64),
}

impl ReadError {
    /// The error for a person; `what` is the attempt.
    fn explain(self, what: &str) -> CliError {
        match self {
            Self::Io(cause) => CliError::new(what, cause),
            Self::Gzip(cause) => {
                CliError::new(what, cause).help("is the gzip file complete and not damaged?")
            }
            Self::LineTooLong(line) => CliError::new(
                what,
                format!("line {line} is longer than {BATCH_LEN_MAX} bytes, the largest batch"),
            )
            .help(
                "split the line: a record travels in one batch, which must fit one control frame and half an \
                 image of its topic",
            ),
        }
    }
}

struct Lines {
    reader: BufReader<Box<dyn Read + Send>>,
    is_gzip: bool,
    /// Lines read so far.
    count: u64,
}

impl Lines {
    /// Reads `source` as it is, or what a gzip stream decodes to.
    fn start(mut source: impl Read + Send + 'static) -> io::Result<Self> {
        let mut magic = Vec::new();
        source
            .by_ref()
            .take(GZIP_MAGIC.len() as u64)
            .read_to_end(&mut magic)?;
        let is_gzip = magic == GZIP_MAGIC;
        let whole = Cursor::new(magic).chain(source);
        let bytes: Box<dyn Read + Send> = if is_gzip {
            Box::new(MultiGzDecoder::new(BufReader::new(whole)))
        } else {
            Box::new(whole)
        };
        Ok(Self {
            reader: BufReader::with_capacity(LOT_LEN, bytes),
            is_gzip,
            count: 0,
        })
    }

    /// Reads the lines that are there, at least one; an empty lot is the end. What a person types is
    /// handed over line by line.
    fn fill(&mut self, lot: &mut Lot) -> Result<(), ReadError> {
        while self.next_line(lot)? && !self.reader.buffer().is_empty() && lot.bytes.len() < LOT_LEN
        {
        }
        Ok(())
    }

    fn next_line(&mut self, lot: &mut Lot) -> Result<bool, ReadError> {
        let start = lot.bytes.len();
        let mut limited = (&mut self.reader).take(BATCH_LEN_MAX as u64 + 1);
        let len = limited
            .read_until(b'\n', &mut lot.bytes)
            .map_err(if self.is_gzip {
                ReadError::Gzip
            } else {
                ReadError::Io
            })?;
        if len == 0 {
            return Ok(false);
        }
        self.count += 1;
        if lot.bytes.last() == Some(&b'\n') {
            lot.bytes.pop();
        }
        if lot.bytes.len() - start > BATCH_LEN_MAX {
            return Err(ReadError::LineTooLong(self.count));
        }
        lot.ends.push(lot.bytes.len());
        Ok(true)
    }
}

/// Takes one column of CSV lines as the record key.
#[derive(Debug)]
pub(crate) struct KeyColumn {
    /// Counted from 1; `None` leaves records without a key.
    column: Option<usize>,
    line: u64,
}

impl KeyColumn {
    pub(crate) fn new(column: Option<usize>) -> Self {
        Self { column, line: 0 }
    }

    /// Passes over lines that are no records.
    pub(crate) fn skip(&mut self, lines: usize) {
        self.line += lines as u64;
    }

    /// The key of the next line.
    pub(crate) fn key_of<'a>(&mut self, line: &'a [u8]) -> Result<Option<Cow<'a, [u8]>>, CliError> {
        self.line += 1;
        let Some(column) = self.column else {
            return Ok(None);
        };
        match csv_column(line, column) {
            Some(key) => Ok(Some(key)),
            None => Err(CliError::new(
                format!("line {}", self.line),
                format!("it has no column {column}"),
            )
            .help("--key-column counts the columns of comma-separated lines from 1")),
        }
    }
}

/// Column `column` (from 1) of a CSV line; quotes around a field and doubled quotes in it are removed.
fn csv_column(line: &[u8], column: usize) -> Option<Cow<'_, [u8]>> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let mut rest = Some(line);
    for _ in 1..column {
        rest = field_len(rest?).1;
    }
    let field = rest?;
    let field = &field[..field_len(field).0];
    match field
        .strip_prefix(b"\"")
        .and_then(|inner| inner.strip_suffix(b"\""))
    {
        Some(inner) => Some(Cow::Owned(undouble_quotes(inner))),
        None => Some(Cow::Borrowed(field)),
    }
}

/// Length of the first field, and what follows its comma.
fn field_len(line: &[u8]) -> (usize, Option<&[u8]>) {
    let mut is_quoted = false;
    for (at, &byte) in line.iter().enumerate() {
        match byte {
            b'"' => is_quoted = !is_quoted,
            b',' if !is_quoted => return (at, Some(&line[at + 1..])),
            _ => {}
        }
    }
    (line.len(), None)
}

fn undouble_quotes(inner: &[u8]) -> Vec<u8> {
    let mut field = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter().peekable();
    while let Some(&byte) = bytes.next() {
        field.push(byte);
        if byte == b'"' {
            bytes.next_if(|&&next| next == b'"');
        }
    }
    field
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn lines_of(source: &[u8]) -> Result<Vec<Vec<u8>>, CliError> {
        let input = Input::start("test".to_owned(), Cursor::new(source.to_vec())).unwrap();
        let mut lines = Vec::new();
        for lot in input.lots {
            lines.extend(lot?.lines().map(<[u8]>::to_vec));
        }
        Ok(lines)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_line_is_a_record_also_an_empty_and_an_unfinished_one() {
        assert_eq!(
            lines_of(b"a\n\nb\r\n\xff").unwrap(),
            [&b"a"[..], b"", b"b\r", b"\xff"]
        );
        assert!(lines_of(b"").unwrap().is_empty());
        assert_eq!(lines_of(b"x").unwrap(), [b"x"]);
    }

    #[test]
    fn a_line_that_is_typed_is_handed_over_before_the_next() {
        let (reader, mut writer) = io::pipe().unwrap();
        let input = Input::start("test".to_owned(), reader).unwrap();
        for line in ["one", "two"] {
            writeln!(writer, "{line}").unwrap();
            let lot = input
                .lots
                .recv_timeout(std::time::Duration::from_secs(5))
                .unwrap()
                .unwrap();
            assert_eq!(lot.lines().collect::<Vec<_>>(), [line.as_bytes()]);
        }
    }

    #[test]
    fn gzip_is_recognised_also_in_several_members() {
        let mut bytes = gzip(b"a\nb");
        bytes.extend(gzip(b"c\n"));
        assert_eq!(lines_of(&bytes).unwrap(), [&b"a"[..], b"bc"]);
    }

    #[test]
    fn truncated_gzip_is_an_error_and_not_an_end() {
        let bytes = gzip(&b"some words\n".repeat(10_000));
        let error = format!("{:?}", lines_of(&bytes[..bytes.len() / 2]).unwrap_err());
        assert!(error.contains("complete and not damaged"), "{error}");
    }

    #[test]
    fn a_line_too_long_is_refused_by_number_after_those_before_it() {
        let mut bytes = b"one\n".to_vec();
        bytes.resize(BATCH_LEN_MAX + 100, b'x');
        let input = Input::start("test".to_owned(), Cursor::new(bytes)).unwrap();
        let lot = input.lots.recv().unwrap().unwrap();
        assert_eq!(lot.lines().collect::<Vec<_>>(), [b"one"]);
        let error = format!("{:?}", input.lots.recv().unwrap().unwrap_err());
        for part in ["line 2 is longer than 1044480 bytes", "split the line"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("damaged"), "{error}");
        assert!(input.lots.recv().is_err());
    }

    #[test]
    fn bundled_data_are_there() {
        let count: usize = Input::bundled()
            .unwrap()
            .lots
            .iter()
            .map(|lot| lot.unwrap().lines().count())
            .sum();
        assert_eq!(count, 27_005);
    }

    #[test]
    fn columns_follow_csv_rules() {
        let column =
            |line: &'static str, column| csv_column(line.as_bytes(), column).map(Cow::into_owned);
        assert_eq!(column("a,b,c", 1).as_deref(), Some(&b"a"[..]));
        assert_eq!(column("a,b,c", 3).as_deref(), Some(&b"c"[..]));
        assert_eq!(column("a,b,c\r", 3).as_deref(), Some(&b"c"[..]));
        assert_eq!(column("a,b,c", 4), None);
        assert_eq!(column("a,,c", 2).as_deref(), Some(&b""[..]));
        assert_eq!(column(r#""x,y",b"#, 2).as_deref(), Some(&b"b"[..]));
        assert_eq!(
            column(r#"a,"x, ""y""",c"#, 2).as_deref(),
            Some(&br#"x, "y""#[..])
        );
        assert_eq!(column("", 1).as_deref(), Some(&b""[..]));
    }
}
