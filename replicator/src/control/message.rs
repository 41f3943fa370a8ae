//! The messages and their encoding.

use std::fmt;

use super::codec::{Body, Field, Malformed, decode_list, encode_list, messages};
use super::{FRAME_LEN_MAX, VERSION_FENCING, VERSION_MAX, VERSION_MIN};
use crate::epoch::EpochEntry;

messages! {
    /// The first message of either side: who speaks, and which versions.
    ///
    /// Later versions add fields at its end only; bytes that follow the known ones are skipped.
    Hello {
        /// Oldest version spoken.
        min_version: u16,
        /// Newest version spoken.
        max_version: u16,
        /// What the sender is.
        role: Role,
        /// Node id of a node; 0 of a client.
        node: u32,
        /// Random name of the node's log memory: another one means that the memory was lost.
        memory_id: [u8; 16],
        /// Raised by every start of the node.
        incarnation: u64,
        /// Optional features, one bit each; none are defined yet.
        capabilities: u64,
        /// [`Cluster::hash`](crate::cluster::Cluster::hash) of the sender; 0 if it has no cluster file.
        cluster_hash: u64,
    }

    /// A request failed, or, with correlation 0, the connection is about to be closed.
    ErrorReply {
        /// Why.
        code: ErrorCode,
        /// The request's correlation; 0 if it concerns no request.
        correlation: u64,
        /// The cause in words.
        message: String,
    }

    /// Asks for a queue pair that will be connected to `end_point`.
    Lane {
        /// Echoed in the answer.
        correlation: u64,
        /// Which lane of this connection; a new session replaces the lane it had.
        session: u64,
        /// What the lane will carry.
        purpose: Purpose,
        /// The asker's end, as `transport` encodes it.
        end_point: Vec<u8>,
    }

    /// The answer to [`Lane`]: the other end is ready to receive.
    LaneReady {
        /// The request's correlation.
        correlation: u64,
        /// The request's session.
        session: u64,
        /// The answerer's end.
        end_point: Vec<u8>,
    }

    /// A leader asks a follower for the right to write an image.
    GrantRequest {
        /// Echoed in the answer.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The leader's epoch.
        leader_epoch: i32,
        /// Offset at which that epoch starts.
        epoch_start_offset: i64,
        /// The leader's name for the image.
        image_id: u64,
        /// Offset of the image's first record; -1 for the image that follows the one being written.
        base_offset: i64,
        /// Where the image begins in its segment file, in bytes.
        file_position: u64,
        /// Offset of the segment's first record, which names its file; -1 if that depends on where the
        /// image before ends.
        segment_base_offset: i64,
        /// Size of the image in bytes.
        image_len: u32,
    }

    /// The answer to [`GrantRequest`].
    Grant {
        /// The request's correlation.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The epoch the right is for.
        leader_epoch: i32,
        /// The request's image.
        image_id: u64,
        /// Address of the image's first byte.
        addr: u64,
        /// Key of the image.
        rkey: u32,
        /// Bytes granted.
        len: u32,
        /// Address of the partition's table entry.
        table_addr: u64,
        /// Key of the table entry.
        table_rkey: u32,
        /// The follower's log end offset.
        log_end_offset: i64,
        /// How many bytes of this image the follower already holds.
        byte_position: u64,
    }

    /// A leader tells a follower that it leads, before it asks for any grant: the follower withdraws what it
    /// has granted for the partition, to whomever, reads its own tail and answers [`Revoked`].
    Revoke {
        /// Echoed in the answer.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The leader's epoch.
        leader_epoch: i32,
        /// Offset at which that epoch starts.
        epoch_start_offset: i64,
    }

    /// The answer to [`Revoke`] and to [`Truncate`]: nobody can write to the partition, and this is what it
    /// holds.
    Revoked {
        /// The request's correlation.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The highest leader epoch the follower has seen.
        leader_epoch: i32,
        /// The follower's log end offset.
        log_end_offset: i64,
        /// The follower's newest epochs, at most
        /// [`REPORT_ENTRIES_MAX`](crate::epoch::REPORT_ENTRIES_MAX).
        epochs: Vec<EpochEntry>,
    }

    /// A leader tells a follower where their logs part; answered with [`Revoked`].
    Truncate {
        /// Echoed in the answer.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The leader's epoch.
        leader_epoch: i32,
        /// What becomes of the log.
        kind: CutKind,
        /// The offset that it ends at afterwards.
        offset: i64,
    }

    /// A leader asks a follower to have everything below an offset on its device; [`Durable`] follows.
    Sync {
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The lane's session.
        session: u64,
        /// The offset.
        offset: i64,
    }

    /// A follower has everything below an offset on its device.
    Durable {
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The lane's session.
        session: u64,
        /// The offset.
        offset: i64,
    }

    /// A replica tells another one how far its files reach, since the memory of every in-sync replica is
    /// lost: the one that has most will lead.
    LogEnd {
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The memory it has now.
        memory_id: [u8; 16],
        /// The leader epoch of its last record; -1 if it has none.
        last_epoch: i32,
        /// Its log end offset.
        log_end_offset: i64,
    }

    /// A consumer asks where the table entries of partitions are.
    Open {
        /// Echoed in the answer.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partitions; empty asks for all of the topic that the node holds.
        partitions: Vec<u32>,
    }

    /// The answer to [`Open`].
    Opened {
        /// The request's correlation.
        correlation: u64,
        /// One entry per partition, in the order asked.
        entries: Vec<OpenedEntry>,
    }

    /// Where one partition's table entry is.
    OpenedEntry {
        /// Partition.
        partition: u32,
        /// Address of the entry.
        entry_addr: u64,
        /// Key of the entry.
        rkey: u32,
        /// The leader epoch the node knows.
        leader_epoch: i32,
    }

    /// A consumer asks for the image that holds an offset the table entry no longer describes.
    ImageRequest {
        /// Echoed in the answer.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// The offset wanted.
        offset: i64,
    }

    /// The answer to [`ImageRequest`].
    ImageGrant {
        /// The request's correlation.
        correlation: u64,
        /// Partition.
        partition: u32,
        /// The image's name.
        image_id: u64,
        /// Offset of the image's first record.
        base_offset: i64,
        /// Offset after the image's last record; the log end offset so far if it is the current image.
        next_offset: i64,
        /// Address of the image's first byte.
        addr: u64,
        /// Key of the image.
        rkey: u32,
        /// Readable bytes.
        len: u32,
    }

    /// Asks for the offset of a time.
    ListOffsets {
        /// Echoed in the answer.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// Milliseconds since 1970, or one of [`ListOffsets::LATEST`] and [`ListOffsets::EARLIEST`].
        timestamp: i64,
    }

    /// The answer to [`ListOffsets`].
    ListOffsetsReply {
        /// The request's correlation.
        correlation: u64,
        /// The first offset whose record is not older than the time asked; -1 if there is none.
        offset: i64,
        /// That record's time in milliseconds since 1970; -1 if unknown.
        timestamp: i64,
    }

    /// Appends one record batch.
    Append {
        /// Echoed in the answer; answers come in the order in which batches commit.
        correlation: u64,
        /// Topic.
        topic: String,
        /// Partition.
        partition: u32,
        /// When to answer.
        acks: Acks,
        /// A record batch v2 with base offset and leader epoch not yet stamped.
        batch: Vec<u8>,
    }

    /// The answer to [`Append`].
    Appended {
        /// The request's correlation.
        correlation: u64,
        /// Offset given to the batch's first record.
        base_offset: i64,
        /// The leader's time of appending, in milliseconds since 1970; -1 if the batch keeps its own.
        log_append_time: i64,
    }

    /// Asks a node who leads the partitions of a topic, and who is in sync.
    MetadataRequest {
        /// Echoed in the answer.
        correlation: u64,
        /// Topic.
        topic: String,
    }

    /// The answer to [`MetadataRequest`]: what the node has heard last.
    Metadata {
        /// The request's correlation.
        correlation: u64,
        /// Each partition of the topic.
        partitions: Vec<PartitionMetadata>,
    }

    /// Who leads a partition, and who is in sync.
    PartitionMetadata {
        /// Partition.
        partition: u32,
        /// The node that leads it; 0 if none does, or the node has not heard yet.
        leader: u32,
        /// The leader epoch; -1 if the node has not heard yet.
        leader_epoch: i32,
        /// The nodes in sync.
        isr: Vec<u32>,
        /// The nodes that hold it, the preferred leader first.
        replicas: Vec<u32>,
    }

    /// Asks a node how it is doing.
    StatusRequest {
        /// Echoed in the answer.
        correlation: u64,
    }

    /// The answer to [`StatusRequest`].
    Status {
        /// The request's correlation.
        correlation: u64,
        /// The node's status as a JSON object.
        json: String,
    }
}

impl ListOffsets {
    /// Asks for the high watermark.
    pub const LATEST: i64 = -1;
    /// Asks for the log start offset.
    pub const EARLIEST: i64 = -2;
}

impl Field for Vec<OpenedEntry> {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_list(self, out);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        decode_list(body, field)
    }
}

impl Field for Vec<PartitionMetadata> {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_list(self, out);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        decode_list(body, field)
    }
}

impl Field for EpochEntry {
    fn encode(&self, out: &mut Vec<u8>) {
        self.epoch.encode(out);
        self.start_offset.encode(out);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        Ok(Self {
            epoch: Field::decode(body, field)?,
            start_offset: Field::decode(body, field)?,
        })
    }
}

impl Field for Vec<EpochEntry> {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_list(self, out);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        decode_list(body, field)
    }
}

/// Declares enums that travel as one byte.
macro_rules! byte_enums {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $value:literal),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant = $value),* }

        impl Field for $name {
            fn encode(&self, out: &mut Vec<u8>) {
                out.push(*self as u8);
            }
            fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
                match u8::decode(body, field)? {
                    $($value => Ok(Self::$variant),)*
                    _ => Err(Malformed::Value(field)),
                }
            }
        }
    )* };
}

byte_enums! {
    /// What the sender of a [`Hello`] is.
    Role {
        /// A replica of the cluster.
        Node = 1,
        /// A producer, a consumer or a tool.
        Client = 2,
    }

    /// What a lane carries.
    Purpose {
        /// A leader's writes into a follower.
        Replication = 1,
        /// A consumer's reads.
        Consumer = 2,
    }

    /// When an append is answered.
    Acks {
        /// Once the leader has it in its log.
        Leader = 1,
        /// Once every in-sync replica has it in memory.
        Replicated = 2,
        /// Once every in-sync replica has it on its device.
        Durable = 3,
    }

    /// What a [`Truncate`] asks for.
    CutKind {
        /// Remove everything from the offset on.
        TruncateTo = 1,
        /// Remove everything, and go on at the offset.
        RestartAt = 2,
    }
}

/// Why a request failed. Codes a peer knows and we do not are kept as they are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ErrorCode(pub u16);

impl ErrorCode {
    /// The receiver failed for a reason of its own.
    pub const INTERNAL: Self = Self(1);
    /// The two sides speak no common protocol version.
    pub const UNSUPPORTED_VERSION: Self = Self(2);
    /// The two sides read different cluster files.
    pub const CLUSTER_MISMATCH: Self = Self(3);
    /// No such topic or partition on this node.
    pub const UNKNOWN_TOPIC_OR_PARTITION: Self = Self(4);
    /// The node does not lead the partition.
    pub const NOT_LEADER: Self = Self(5);
    /// The request's leader epoch is older than one the node has seen.
    pub const FENCED_LEADER_EPOCH: Self = Self(6);
    /// The offset is below the log start or beyond the log end.
    pub const OFFSET_OUT_OF_RANGE: Self = Self(7);
    /// The bytes are not a valid record batch.
    pub const CORRUPT_BATCH: Self = Self(8);
    /// The batch does not fit an image.
    pub const BATCH_TOO_LARGE: Self = Self(9);
    /// The request makes no sense in the present state.
    pub const INVALID_REQUEST: Self = Self(10);
    /// The node lacks memory, keys or queue pairs.
    pub const OUT_OF_RESOURCES: Self = Self(11);
    /// The node is shutting down.
    pub const SHUTTING_DOWN: Self = Self(12);
    /// Fewer replicas are in sync than the topic asks for: try again.
    pub const NOT_ENOUGH_REPLICAS: Self = Self(13);
    /// The segment files cannot be written, or the device failed to keep what was.
    pub const STORAGE: Self = Self(14);
    /// The node stopped leading before the batch was committed: it may be in the log or not.
    pub const OUTCOME_UNKNOWN: Self = Self(15);

    /// A batch sent before it on the same connection was not taken, so this one was not, either: send both
    /// again, on another connection.
    pub const OUT_OF_ORDER: Self = Self(16);
    /// The node does not know yet how far the log is committed: try again.
    pub const OFFSET_NOT_AVAILABLE: Self = Self(17);

    /// Whether nothing was appended and another attempt may succeed, perhaps with another node.
    #[must_use]
    pub fn is_retriable(self) -> bool {
        matches!(
            self,
            Self::NOT_LEADER | Self::NOT_ENOUGH_REPLICAS | Self::SHUTTING_DOWN | Self::OUT_OF_ORDER
        )
    }

    fn name(self) -> &'static str {
        match self {
            Self::INTERNAL => "internal error",
            Self::UNSUPPORTED_VERSION => "unsupported version",
            Self::CLUSTER_MISMATCH => "cluster mismatch",
            Self::UNKNOWN_TOPIC_OR_PARTITION => "unknown topic or partition",
            Self::NOT_LEADER => "not the leader",
            Self::FENCED_LEADER_EPOCH => "fenced leader epoch",
            Self::OFFSET_OUT_OF_RANGE => "offset out of range",
            Self::CORRUPT_BATCH => "corrupt batch",
            Self::BATCH_TOO_LARGE => "batch too large",
            Self::INVALID_REQUEST => "invalid request",
            Self::OUT_OF_RESOURCES => "out of resources",
            Self::SHUTTING_DOWN => "shutting down",
            Self::NOT_ENOUGH_REPLICAS => "not enough replicas",
            Self::STORAGE => "storage failed",
            Self::OUTCOME_UNKNOWN => "outcome unknown",
            Self::OUT_OF_ORDER => "out of order",
            Self::OFFSET_NOT_AVAILABLE => "offset not available",
            _ => "unknown error",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.name(), self.0)
    }
}

impl fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Field for ErrorCode {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }
    fn decode(body: &mut Body<'_>, field: &'static str) -> Result<Self, Malformed> {
        u16::decode(body, field).map(Self)
    }
}

/// Declares [`Message`] and the table of type numbers that both directions follow.
macro_rules! message_types {
    ($($variant:ident($body:ident) = $kind:literal),* $(,)?) => {
        /// Any control message. The variants are documented at the structs they hold.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[allow(missing_docs, reason = "each variant holds a documented struct")]
        pub enum Message { $($variant($body)),* }

        impl Message {
            /// The number that names this message on the wire.
            pub fn kind(&self) -> u16 {
                match self { $(Self::$variant(_) => $kind),* }
            }

            fn encode_body(&self, out: &mut Vec<u8>) {
                match self { $(Self::$variant(body) => body.encode(out)),* }
            }

            fn decode_body(kind: u16, body: &mut Body<'_>) -> Result<Self, Malformed> {
                match kind {
                    $($kind => $body::decode(body, stringify!($body)).map(Self::$variant),)*
                    _ => Err(Malformed::UnknownType(kind)),
                }
            }
        }

        $(impl From<$body> for Message {
            fn from(body: $body) -> Self {
                Self::$variant(body)
            }
        })*
    };
}

message_types! {
    Hello(Hello) = 1,
    Error(ErrorReply) = 2,
    Lane(Lane) = 3,
    LaneReady(LaneReady) = 4,
    GrantRequest(GrantRequest) = 5,
    Grant(Grant) = 6,
    Open(Open) = 7,
    Opened(Opened) = 8,
    ImageRequest(ImageRequest) = 9,
    ImageGrant(ImageGrant) = 10,
    ListOffsets(ListOffsets) = 11,
    ListOffsetsReply(ListOffsetsReply) = 12,
    Append(Append) = 13,
    Appended(Appended) = 14,
    StatusRequest(StatusRequest) = 15,
    Status(Status) = 16,
    Revoke(Revoke) = 17,
    Revoked(Revoked) = 18,
    Truncate(Truncate) = 19,
    Sync(Sync) = 20,
    Durable(Durable) = 21,
    LogEnd(LogEnd) = 22,
    MetadataRequest(MetadataRequest) = 23,
    Metadata(Metadata) = 24,
}

const HELLO_KIND: u16 = 1;
/// From this type number on, messages came with [`VERSION_FENCING`].
const FENCING_KIND: u16 = 17;
/// Bytes of a frame's length field.
pub(super) const LENGTH_LEN: usize = 4;
/// Bytes of type and version.
const KIND_LEN: usize = 4;

impl Message {
    /// Appends the whole frame, in protocol version `version`, to `out`.
    ///
    /// # Errors
    ///
    /// [`Malformed::FrameLen`] if the message exceeds [`FRAME_LEN_MAX`], [`Malformed::Version`] if there is
    /// no such message in that version; `out` is then unchanged.
    pub fn encode(&self, version: u16, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let kind = self.kind();
        if version < oldest_version(kind) {
            return Err(Malformed::Version { kind, version });
        }
        let start = out.len();
        out.extend_from_slice(&[0; LENGTH_LEN]);
        self.kind().encode(out);
        version.encode(out);
        self.encode_body(out);
        let len = out.len() - start - LENGTH_LEN;
        match u32::try_from(len) {
            Ok(length) if len <= FRAME_LEN_MAX => {
                out[start..start + LENGTH_LEN].copy_from_slice(&length.to_le_bytes());
                Ok(())
            }
            _ => {
                out.truncate(start);
                Err(Malformed::FrameLen(len))
            }
        }
    }

    /// Decodes what follows a frame's length field.
    ///
    /// # Errors
    ///
    /// [`Malformed`] says which field is wrong.
    pub fn decode(frame: &[u8]) -> Result<Self, Malformed> {
        let mut body = Body(frame);
        let kind = u16::decode(&mut body, "type")?;
        let version = u16::decode(&mut body, "version")?;
        let is_hello = kind == HELLO_KIND;
        if !is_hello && !(oldest_version(kind)..=VERSION_MAX).contains(&version) {
            return Err(Malformed::Version { kind, version });
        }
        let message = Self::decode_body(kind, &mut body)?;
        match body.0.len() {
            0 => Ok(message),
            _ if is_hello => Ok(message),
            len => Err(Malformed::Trailing(len)),
        }
    }

    /// Reads a length field: how many bytes the rest of the frame takes.
    ///
    /// # Errors
    ///
    /// [`Malformed::FrameLen`] if that is too short for a frame or more than [`FRAME_LEN_MAX`].
    pub fn frame_len(length: [u8; LENGTH_LEN]) -> Result<usize, Malformed> {
        let len = u32::from_le_bytes(length) as usize;
        if (KIND_LEN..=FRAME_LEN_MAX).contains(&len) {
            Ok(len)
        } else {
            Err(Malformed::FrameLen(len))
        }
    }
}

/// The version that brought a message.
fn oldest_version(kind: u16) -> u16 {
    if kind >= FENCING_KIND {
        VERSION_FENCING
    } else {
        VERSION_MIN
    }
}
