//! Filling a batch in place: in the image that followers are sent from and consumers read.

use std::fmt;
use std::io::{self, Write};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::Mapping;

use super::append::AppendError;
use super::events::{Event, Fill};
use super::handle::Partition;
use super::pending::{Pending, pending};
use crate::control::Acks;
use crate::partition::{CheckedBatch, FilledBatch};
use crate::record::{HEADER_LEN, InPlaceBuilder};

/// How long a reservation lasts. Nothing else is appended to its partition meanwhile.
pub const RESERVATION_TIME: Duration = Duration::from_millis(100);

/// Room for one batch at the end of a partition's log, to be filled where it will stay.
///
/// Its bytes go to the leader's log image itself, from which followers are sent and consumers read, without
/// another copy, and in the thread that fills it instead of on the node's I/O thread. Fill it either with
/// [records](Self::append), or, as a [`Write`], with a batch that is encoded already; then
/// [`commit`](Self::commit) it.
///
/// The partition appends nothing behind it until it is over. It is over when it has been committed or dropped,
/// after [`RESERVATION_TIME`] (also if it was forgotten), and when the leadership is lost; what is
/// written to it then goes nowhere, and a commit is refused with nothing appended. So have the bytes at hand
/// before you reserve: never wait for a client while you hold one.
///
/// Bytes of an image are written once, since they can be read all the time. So a reservation that was written
/// to and not committed costs the rest of its image: the log goes on in the next one. Without a write it costs
/// nothing. What a dropped one has left behind is not log: the header, without which it is no batch, is
/// written when it is committed, with its offset and leader epoch, after everything has been checked.
///
/// It pays for large batches; a small one is appended faster by [`Partition::append`], which needs one hand-over
/// to the I/O thread and not two.
#[must_use = "the partition appends nothing meanwhile"]
pub struct Reservation {
    partition: Partition,
    number: u64,
    acks: Acks,
    base_offset: i64,
    image: Arc<Mapping>,
    /// Where in the image it begins.
    byte_position: usize,
    len_max: usize,
    content: Content,
    /// Something was written to the image.
    is_touched: bool,
    is_committed: bool,
}

#[derive(Debug)]
enum Content {
    Empty,
    /// A batch that was encoded elsewhere: its header so far, and how many bytes have come.
    Encoded([u8; HEADER_LEN], usize),
    Records(InPlaceBuilder),
}

/// What the I/O thread grants.
#[derive(Debug)]
pub(super) struct Room {
    pub(super) number: u64,
    pub(super) acks: Acks,
    pub(super) base_offset: i64,
    pub(super) image: Arc<Mapping>,
    pub(super) byte_position: usize,
    pub(super) len_max: usize,
}

impl Reservation {
    pub(super) fn new(partition: Partition, room: Room) -> Self {
        let Room {
            number,
            acks,
            base_offset,
            image,
            byte_position,
            len_max,
        } = room;
        Self {
            partition,
            number,
            acks,
            base_offset,
            image,
            byte_position,
            len_max,
            content: Content::Empty,
            is_touched: false,
            is_committed: false,
        }
    }

    /// The offset that the first record will have.
    #[must_use]
    pub fn base_offset(&self) -> i64 {
        self.base_offset
    }

    /// Bytes that have been written, the header of records included.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.content {
            Content::Empty => 0,
            Content::Encoded(_, len) => *len,
            Content::Records(builder) => builder.len(),
        }
    }

    /// Whether nothing has been written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends a record to the batch, as [`BatchBuilder::append`](crate::record::BatchBuilder::append) does;
    /// says whether there was room for it.
    ///
    /// # Panics
    ///
    /// If encoded bytes have been written.
    #[must_use]
    pub fn append(
        &mut self,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[(&[u8], Option<&[u8]>)],
    ) -> bool {
        if let Content::Empty = self.content {
            self.content = Content::Records(InPlaceBuilder::new(self.len_max.max(HEADER_LEN)));
        }
        let Content::Records(builder) = &mut self.content else {
            panic!("a batch is either encoded or made of records");
        };
        let mut at = self.byte_position + builder.len();
        let is_in = builder.append(timestamp, key, value, headers, |piece| {
            self.image
                .write_at(at, piece)
                .expect("what is reserved lies inside of its image");
            at += piece.len();
        });
        self.is_touched |= is_in;
        is_in
    }

    /// Has the batch become log. It is checked first, in this thread: of encoded bytes header, CRC and every
    /// record, for which they are read back.
    ///
    /// # Errors
    ///
    /// At once [`AppendError::Invalid`] if what was written is not one valid batch, and
    /// [`AppendError::Stopped`]. By what is returned [`AppendError::Expired`] if it came too late,
    /// [`AppendError::NotLeader`] and [`AppendError::NotEnoughReplicas`] if that has changed meanwhile: nothing
    /// is appended then; and whatever may become of an append afterwards.
    pub fn commit(mut self) -> Result<Pending<i64>, AppendError> {
        let batch = self.check()?;
        let (reply, pending) = pending();
        let fill = Fill {
            number: self.number,
            acks: self.acks,
            batch,
            reply,
            received_at: Instant::now(),
        };
        let partition = self.partition.index();
        let event = Event::Filled { partition, fill };
        let sent = self.partition.events().send(event);
        sent.map_err(|_| AppendError::stopped())?;
        self.is_committed = true;
        Ok(pending)
    }

    fn check(&mut self) -> Result<FilledBatch, AppendError> {
        let invalid = |cause: &str| Err(AppendError::Invalid(cause.to_owned()));
        match mem::replace(&mut self.content, Content::Empty) {
            Content::Empty => invalid("nothing was written to the reservation"),
            Content::Encoded(_, len) if len < HEADER_LEN => invalid("it has no whole header"),
            Content::Encoded(header, len) => {
                let mut bytes = vec![0; len];
                let (first, body) = bytes.split_at_mut(HEADER_LEN);
                first.copy_from_slice(&header);
                self.image
                    .read_at(self.byte_position + HEADER_LEN, body)
                    .expect("what is reserved lies inside of its image");
                let offsets_count = CheckedBatch::check(&bytes, self.len_max)?;
                Ok(filled(header, len, offsets_count))
            }
            Content::Records(builder) if builder.is_empty() => invalid("a batch has no record"),
            Content::Records(builder) => {
                let count = i64::try_from(builder.records_count());
                let count = count.expect("a batch counts its records in 32 bits");
                Ok(filled(builder.header(), builder.len(), count))
            }
        }
    }
}

fn filled(header: [u8; HEADER_LEN], len: usize, offsets_count: i64) -> FilledBatch {
    FilledBatch {
        header,
        len: u32::try_from(len).expect("a batch fits its image"),
        offsets_count,
    }
}

/// Writes a batch that is encoded already, in pieces of any size.
impl Write for Reservation {
    /// Returns 0 when the room is used up.
    ///
    /// # Panics
    ///
    /// If records have been appended.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Content::Empty = self.content {
            self.content = Content::Encoded([0; HEADER_LEN], 0);
        }
        let Content::Encoded(header, len) = &mut self.content else {
            panic!("a batch is either encoded or made of records");
        };
        let bytes = &bytes[..bytes.len().min(self.len_max - *len)];
        // The header stays here until the batch is committed.
        let of_header = bytes.len().min(HEADER_LEN.saturating_sub(*len));
        let (first, body) = bytes.split_at(of_header);
        if !first.is_empty() {
            header[*len..*len + of_header].copy_from_slice(first);
        }
        self.image
            .write_at(self.byte_position + *len + of_header, body)
            .expect("what is reserved lies inside of its image");
        self.is_touched |= !body.is_empty();
        *len += bytes.len();
        Ok(bytes.len())
    }

    /// There is nothing to be flushed.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.is_committed {
            return;
        }
        let event = Event::Unreserved {
            partition: self.partition.index(),
            number: self.number,
            is_touched: self.is_touched,
        };
        // This may be the I/O thread, which must not wait for itself. If there is no room, time does it.
        self.partition.events().try_send(event);
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation")
            .field("partition", &self.partition)
            .field("base_offset", &self.base_offset)
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
