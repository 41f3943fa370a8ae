//! What can fail before a work request is posted. A work request that failed is data: see
//! [`Done::status`](crate::Done::status).

use std::fmt;
use std::io;
use std::path::PathBuf;

use rdma_core_bindings::LoadError;
use soft_roce::BindError;

use crate::qp::Diagnosis;
use crate::types::{AccessFlags, QpState, Qpn};

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed: the thing, the cause, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// libibverbs could not be loaded, so that only the software device exists.
    #[error(transparent)]
    Load(#[from] LoadError),

    /// The list of RDMA devices could not be read.
    #[error("cannot list RDMA devices: {source}{}", list_remedy(source))]
    DeviceList {
        /// What the library said; `ENOSYS` means a kernel without RDMA.
        source: io::Error,
    },

    /// No device of that name exists.
    #[error(
        "no RDMA device {name:?}; there are: {available}. Choose one of them, `auto`, or `soft` for the \
         software device"
    )]
    NoDevice {
        /// The name asked for.
        name: String,
        /// The names there are, or why there are none.
        available: String,
    },

    /// A device selector could not be understood.
    #[error(
        "device {text:?} is not `auto`, a device name such as `mlx5_0`, `soft`, or `soft@ADDRESS` with an \
         IPv4 or IPv6 address (no %interface)"
    )]
    Selector {
        /// The text.
        text: String,
    },

    /// The software device could not take its address.
    #[error(transparent)]
    SoftBind(#[from] BindError),

    /// A verb failed; its man page explains the error number.
    #[error("{verb} on {device}: {source}{}", verb_remedy(verb, source))]
    Verb {
        /// The verb, such as `ibv_create_cq`.
        verb: &'static str,
        /// The device.
        device: String,
        /// The error number.
        source: io::Error,
    },

    /// An object could not be destroyed. It is given back; if it is dropped, it and what it uses are kept for
    /// ever, because the device may still touch them.
    #[error("{verb} on {device}: {source}; the object still exists, and its memory is kept")]
    Destroy {
        /// The verb, such as `ibv_dereg_mr`.
        verb: &'static str,
        /// The device.
        device: String,
        /// The error number.
        source: io::Error,
    },

    /// A port does not exist.
    #[error("{device} has ports 1 to {port_count}, not {port}")]
    NoPort {
        /// The device.
        device: String,
        /// The port asked for.
        port: u8,
        /// How many it has.
        port_count: u8,
    },

    /// No port of the device is ACTIVE.
    #[error("no port of {device} is ACTIVE: {states}")]
    NoActivePort {
        /// The device.
        device: String,
        /// Each port with its state and what to do about it.
        states: String,
    },

    /// The port has no GID that this crate can connect with.
    #[error(
        "{device} port {port} has no usable GID (wanted: RoCE v2 with an IP address, of a network interface \
         that is up); it has: {found}. Give the interface an IP address and bring it up"
    )]
    NoGid {
        /// The device.
        device: String,
        /// The port.
        port: u8,
        /// What is in the table.
        found: String,
    },

    /// Memory could not be had.
    #[error("cannot get {len} bytes of {what}: {source}{remedy}")]
    Memory {
        /// What kind of memory, with its path if it has one.
        what: String,
        /// How much, in bytes.
        len: usize,
        /// The error.
        source: io::Error,
        /// What to do, beginning with a separator, or empty.
        remedy: String,
    },

    /// A file could not be opened as memory.
    #[error("cannot use {} as memory: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },

    /// Memory could not be registered.
    #[error("cannot register {len} bytes of {what} on {device} with {access:?}: {source}{remedy}")]
    Register {
        /// The device.
        device: String,
        /// What kind of memory.
        what: String,
        /// How much, in bytes.
        len: usize,
        /// The rights asked for.
        access: AccessFlags,
        /// The error.
        source: io::Error,
        /// What to do, beginning with a separator, or empty.
        remedy: String,
    },

    /// A range lies outside of what it is a range of.
    #[error("bytes {byte_offset}..{} are outside of {what} of {available} bytes", byte_offset.saturating_add(*len))]
    OutOfBounds {
        /// Of what.
        what: &'static str,
        /// First byte.
        byte_offset: usize,
        /// How many.
        len: usize,
        /// How many there are.
        available: usize,
    },

    /// An atomic access at an address that is not a multiple of 8.
    #[error("byte offset {byte_offset} is not a multiple of 8, which an atomic access needs")]
    Misaligned {
        /// The offset.
        byte_offset: usize,
    },

    /// A region is still the source of posted requests, so it cannot be deregistered yet.
    #[error(
        "the region is still shared with {holders} posted requests or other owners; complete them first"
    )]
    InUse {
        /// How many.
        holders: usize,
    },

    /// A completion queue is too small for the queue pairs on it; it must never overflow.
    #[error(
        "a completion queue of {capacity} entries has {free} left, and this queue pair may need {needed}; \
         create the completion queue with more entries"
    )]
    CompletionQueueTooSmall {
        /// Its size.
        capacity: usize,
        /// What is not yet promised to other queue pairs.
        free: usize,
        /// What this queue pair needs.
        needed: usize,
    },

    /// A queue pair could not be created.
    #[error("cannot create a queue pair on {device}: {source}; {diagnosis}")]
    CreateQp {
        /// The device.
        device: String,
        /// Which capability is wrong.
        diagnosis: Diagnosis,
        /// The error.
        source: io::Error,
    },

    /// A shared receive queue could not be created.
    #[error("cannot create a shared receive queue on {device}: {source}; {diagnosis}")]
    CreateSrq {
        /// The device.
        device: String,
        /// What is wrong with its size.
        diagnosis: Diagnosis,
        /// The error.
        source: io::Error,
    },

    /// A receive was posted on a queue pair that has no receive queue of its own.
    #[error("the queue pair takes its receives from a shared receive queue; post them there")]
    SharedReceives,

    /// Objects of different devices cannot work together.
    #[error("the completion queue and the protection domain are of different devices")]
    WrongDevice,

    /// A queue pair refused a transition or an attribute.
    #[error("queue pair {qpn} of {device}, {from} to {to}: {source}; {diagnosis}")]
    Modify {
        /// The device.
        device: String,
        /// The queue pair.
        qpn: Qpn,
        /// Its state, as the device tells.
        from: QpState,
        /// The state asked for.
        to: QpState,
        /// Which attribute is wrong.
        diagnosis: Diagnosis,
        /// The error.
        source: io::Error,
    },

    /// The send or receive queue has no room.
    #[error("the {queue} queue holds {capacity} requests and has room for no more{}", full_remedy(*drains))]
    QueueFull {
        /// `send`, `receive` or `shared receive`.
        queue: &'static str,
        /// `max_send_wr` or `max_recv_wr` as granted.
        capacity: usize,
        /// Whether a signalled request is outstanding, whose completion will make room.
        drains: bool,
    },

    /// A request has more parts than the queue pair was created for.
    #[error("{count} scatter/gather entries, and the queue pair was created for {max}")]
    TooManySge {
        /// How many.
        count: usize,
        /// How many are allowed.
        max: usize,
    },

    /// Inline data are longer than the queue pair was created for.
    #[error(
        "{len} bytes inline, and the queue pair takes {max}; use registered memory or ask for more max_inline_data"
    )]
    InlineTooLong {
        /// How many bytes.
        len: usize,
        /// How many are allowed.
        max: usize,
    },

    /// A request mixes inline data and registered memory.
    #[error("a request is either all inline or all registered memory")]
    MixedInline,

    /// A message is longer than one message may be.
    #[error("a message of {len} bytes, and one message carries at most {max}")]
    MessageTooLong {
        /// How many bytes.
        len: usize,
        /// How many are allowed: 2^31, or what the port says.
        max: usize,
    },

    /// The memory or address handle belongs to another protection domain than the queue pair.
    #[error(
        "the memory or address handle belongs to another protection domain than the queue pair; the device would \
         refuse it"
    )]
    WrongProtectionDomain,

    /// A memory window cannot be bound now.
    #[error("the memory window cannot be bound: {reason}")]
    WindowNotBound {
        /// Why not, and what to do.
        reason: &'static str,
    },

    /// A memory window cannot be revoked by this request.
    #[error("the memory window cannot be revoked: {reason}")]
    WindowNotRevoked {
        /// Why not.
        reason: &'static str,
    },

    /// A memory window cannot be bound to a region without these rights.
    #[error(
        "the region was registered without {missing:?}, which a memory window with these rights needs"
    )]
    WindowRights {
        /// The rights that are missing.
        missing: AccessFlags,
    },

    /// A destination has the wrong length for the operation.
    #[error("the result of an atomic operation takes 8 bytes, not {len}")]
    AtomicLength {
        /// The length given.
        len: usize,
    },

    /// The device refused a chain of requests.
    #[error(
        "posting on queue pair {qpn} failed after {accepted} requests: {source}{}",
        post_remedy(source)
    )]
    Post {
        /// The queue pair.
        qpn: Qpn,
        /// How many requests of the chain count as accepted. Those complete, unless the device queued
        /// them and then failed to start; their memory is kept in any case.
        accepted: usize,
        /// The error: `EINVAL` in a state that does not allow it, `ENOMEM` when the queue is full.
        source: io::Error,
    },

    /// A completion was given to a queue pair that it is not from, or that has already released it.
    #[error(
        "the completion is for queue pair {completion}, not for an outstanding request of {qpn}"
    )]
    ForeignCompletion {
        /// Whose it is.
        completion: Qpn,
        /// To which it was given.
        qpn: Qpn,
    },

    /// Waiting on a queue without a channel of its own.
    #[error("the completion queue cannot wait: {reason}")]
    CannotWait {
        /// Why.
        reason: &'static str,
    },

    /// An end point of the peer could not be understood.
    #[error("the peer's end point is invalid: {reason}")]
    EndPoint {
        /// What is wrong with it.
        reason: String,
    },

    /// The connection over which end points are exchanged failed.
    #[error("exchanging end points: {source}")]
    Exchange {
        /// The error.
        source: io::Error,
    },

    /// A connection parameter is out of its range.
    #[error("{name} = {value} is not allowed: {reason}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: u64,
        /// Why not, and what is.
        reason: &'static str,
    },

    /// The operating system gave no random bytes.
    #[error("no random bytes for a starting sequence number: {cause}")]
    Random {
        /// What it said.
        cause: String,
    },
}

/// A failed operation on `value`, which is given back as it was.
pub struct Failed<T> {
    /// The thing, unchanged.
    pub value: T,
    /// Why the operation failed.
    pub error: Box<Error>,
}

impl<T> Failed<T> {
    pub(crate) fn new(value: T, error: Error) -> Failed<T> {
        let error = Box::new(error);
        Failed { value, error }
    }

    /// The error alone; the value is dropped.
    pub fn into_error(self) -> Error {
        *self.error
    }
}

impl<T> fmt::Debug for Failed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failed")
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

impl<T> fmt::Display for Failed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<T> std::error::Error for Failed<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}

impl<T> From<Failed<T>> for Error {
    fn from(failed: Failed<T>) -> Error {
        failed.into_error()
    }
}

fn list_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOSYS) => "; this kernel has no RDMA support (module ib_uverbs)",
        _ => "",
    }
}

fn verb_remedy(verb: &str, source: &io::Error) -> &'static str {
    match (verb, source.raw_os_error()) {
        ("ibv_open_device", Some(libc::EACCES | libc::EPERM)) => {
            "; /dev/infiniband/uverbs* must be readable and writable (often: group rdma)"
        }
        (_, Some(libc::EMFILE)) => "; too many open files: raise ulimit -n",
        (_, Some(libc::ENOMEM)) => {
            "; the device is out of such objects, or RLIMIT_MEMLOCK (ulimit -l) is too low for its queues"
        }
        _ => "",
    }
}

fn full_remedy(drains: bool) -> &'static str {
    if drains {
        "; poll the completion queue and try again"
    } else {
        "; nothing outstanding is signalled, so nothing will ever make room: signal at least one request \
         in every max_send_wr"
    }
}

fn post_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EINVAL) => {
            "; the queue pair's state does not allow it, or the request is malformed"
        }
        Some(libc::ENOMEM) => "; the device's queue is full",
        _ => "",
    }
}
