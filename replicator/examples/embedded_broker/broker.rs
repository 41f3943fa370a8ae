//! The broker around one node: a protocol of its own for its clients.
//!
//! Lines over TCP, any number of them under way:
//!
//! | request | answer |
//! | --- | --- |
//! | `PUT value` | `+ offset` once it is committed, or `- reason` |
//! | `GET offset` | `= offset value` for each record that one read returns, then `.` |
//! | `WHO` | `+ node`, the leader, or `-` |

use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use replicator::control::Acks;
use replicator::record::{BatchBuilder, BatchView};
use replicator::runtime::{AppendError, Partition, Pending};

use super::executor::block_on;

/// Unanswered requests of a connection; then its client is read no further.
const IN_FLIGHT_MAX: usize = 64;
/// Most bytes of the records of one `GET`, or one larger batch.
const GET_LEN_MAX: usize = 64 << 10;

/// What a request has come to.
enum Reply {
    /// It waits for its commit.
    Put(Pending<i64>),
    Text(Vec<u8>),
}

/// Serves clients until the process ends; returns where.
pub(crate) fn serve(partition: Partition) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let partition = partition.clone();
            // A client that breaks its connection is gone; nothing is left to be said to it.
            thread::spawn(move || handle(&partition, client));
        }
    });
    Ok(address)
}

/// Two threads for a connection: this one reads requests, the other one waits for what they come to.
fn handle(partition: &Partition, client: TcpStream) -> io::Result<()> {
    let (replies, queue) = sync_channel(IN_FLIGHT_MAX);
    let answers = client.try_clone()?;
    thread::spawn(move || answer(&queue, answers));
    let mut records = BatchBuilder::new(partition.batch_len_max());
    for line in BufReader::new(client).lines() {
        let line = line?;
        let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let reply = match verb {
            "PUT" => put(partition, &mut records, rest).unwrap_or_else(refusal),
            "GET" => get(partition, rest),
            "WHO" => who(partition),
            _ => Reply::Text(b"- no such request\n".to_vec()),
        };
        if replies.send(reply).is_err() {
            break;
        }
    }
    Ok(())
}

fn put(
    partition: &Partition,
    records: &mut BatchBuilder,
    value: &str,
) -> Result<Reply, AppendError> {
    records.clear();
    if !records.append(-1, None, Some(value.as_bytes()), &[]) {
        return Ok(Reply::Text(b"- the value is too long\n".to_vec()));
    }
    Ok(Reply::Put(partition.append(records, Acks::Replicated)?))
}

fn refusal(error: AppendError) -> Reply {
    Reply::Text(format!("- {error}\n").into_bytes())
}

fn get(partition: &Partition, offset: &str) -> Reply {
    let mut text = Vec::new();
    if let Err(error) = write_records(partition, offset, &mut text) {
        text = format!("- {error}\n").into_bytes();
    } else {
        text.extend(b".\n");
    }
    Reply::Text(text)
}

/// Writes the records from an offset on: of the replica that this node has, whoever leads.
fn write_records(
    partition: &Partition,
    offset: &str,
    text: &mut Vec<u8>,
) -> Result<(), Box<dyn std::error::Error>> {
    let offset = offset.parse()?;
    let mut bytes = Vec::new();
    partition.read(offset, GET_LEN_MAX, &mut bytes)?;
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let (batch, behind) = BatchView::parse(rest)?;
        for record in batch.records()? {
            let record = record?;
            // The batch that holds the offset comes whole.
            if record.offset >= offset {
                write!(text, "= {} ", record.offset)?;
                text.extend(record.value.unwrap_or_default());
                text.push(b'\n');
            }
        }
        rest = behind;
    }
    Ok(())
}

fn who(partition: &Partition) -> Reply {
    let leader = partition.view().leader;
    let text = leader.map_or("-\n".to_owned(), |node| format!("+ {node}\n"));
    Reply::Text(text.into_bytes())
}

/// Answers in the order of the requests.
fn answer(queue: &Receiver<Reply>, client: TcpStream) -> io::Result<()> {
    let mut out = BufWriter::new(client);
    for reply in queue {
        match reply {
            Reply::Text(text) => out.write_all(&text)?,
            Reply::Put(pending) => match block_on(pending) {
                Ok(offset) => writeln!(out, "+ {offset}")?,
                Err(error) => writeln!(out, "- {error}")?,
            },
        }
        out.flush()?;
    }
    Ok(())
}
