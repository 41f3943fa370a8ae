//! Safe verbs: devices, memory, queues, connections, datagrams.
//!
//! The layer between an RDMA device and a program that must not think about its pitfalls. It speaks to
//! whatever fills the verbs table ([`rdma_core_bindings::Verbs`]): libibverbs with a real device or kernel
//! rxe, or the software device ([`soft_roce`]). It does not know which, and it knows nothing of logs.
//!
//! ```text
//!   Context ◀─── ProtectionDomain ◀──┬── SharedRegion ──▶ Mapping      granted to peers
//!      ▲                             ├── MemoryWindow ──▶ SharedRegion   a part of it, revocable
//!      │                             ├── LocalBuffer                   never granted
//!      │                             ├── SharedReceiveQueue ◀── QueuePairs that share receives
//!      ├── CompletionChannel ◀──┐    │
//!      ├── CompletionQueue ─────┘ ◀──┼── QueuePair<Reset → Init → Rtr → Rts>, DatagramQp ┐
//!      │                             └── AddressHandle ◀─────────────────────────────────┘
//!      └── AsyncEvents
//! ```
//!
//! Arrows point at what an object keeps alive, so everything may be dropped in any order.
//!
//! # Who owns memory when
//!
//! A device reads and writes memory behind the compiler's back, so ownership follows the requests:
//!
//! - A posted request owns its [`LocalBuffer`]s and shares its [`SharedRegion`]s. They are released when its
//!   completion, or that of a later request of the same queue, is given to [`QueuePair::complete`], or when
//!   the queue pair has been destroyed.
//! - A [`MemoryWindow`] holds its region while it may be bound; a queue pair frees the windows bound on it.
//! - What cannot be destroyed is kept for ever and reported ([`leaked_objects`]); what is forgotten
//!   ([`std::mem::forget`]) is never freed.
//! - Bytes that a peer may touch are never a slice; see [`memory`].
//! - A forked child must use nothing of this crate. Its copies of objects destroy nothing.
//!
//! # Example
//!
//! Two queue pairs on the software device, one WRITE. It runs on any Linux machine.
//!
//! ```
//! use std::sync::Arc;
//! use transport::connect::{ConnectConfig, Prepared};
//! use transport::{
//!     AccessFlags, CompletionQueue, Context, Mapping, ProtectionDomain, SendFlags, Source,
//! };
//!
//! let context = Context::open(&"soft".parse()?)?;
//! let pd = ProtectionDomain::alloc(&context)?;
//! let cq = CompletionQueue::create(&context, 1024, None)?;
//!
//! // The target: granted to the peer for writing.
//! let image = Mapping::anonymous(4096)?;
//! let access = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE;
//! let region = pd.register(&image, 0..4096, access, None)?;
//!
//! // Two ends; over a network they would exchange end points with `connect::exchange`.
//! let config = ConnectConfig { access: AccessFlags::REMOTE_WRITE, ..ConnectConfig::default() };
//! let near = Prepared::create(&pd, &cq, &cq, &config)?;
//! let far = Prepared::create(&pd, &cq, &cq, &config)?;
//! let (near_end, far_end) = (near.end_point(), far.end_point());
//! let mut near = near.connect(&far_end)?;
//! let _far = far.connect(&near_end)?;
//!
//! let mut chain = near.start_send();
//! chain.write(7, Source::Inline(b"hello"), region.remote().at(100), SendFlags::SIGNALED)?;
//! chain.submit()?;
//!
//! let mut completions = Vec::new();
//! while cq.poll(&mut completions)? == 0 {}
//! let done = near.complete(completions.remove(0))?;
//! assert!(done.wr_id == 7 && done.is_success(), "{}", done.status);
//!
//! let mut bytes = [0; 5];
//! image.read_at(100, &mut bytes)?;
//! assert_eq!(&bytes, b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod connect;
pub mod memory;

mod ah;
mod attr;
mod cq;
mod device;
mod error;
mod events;
mod gid;
mod mr;
mod mw;
mod pd;
mod qp;
mod select;
mod srq;
mod types;
mod work;

pub use ah::{AddressHandle, Destination, GRH_LEN, Sender};
pub use attr::{DeviceAttr, LinkLayer, PortAttr, PortState};
pub use cq::{CompletionQueue, POLL_MAX};
pub use device::{Context, leaked_objects};
pub use error::{Error, Failed, Result};
pub use events::{AsyncEvent, AsyncEvents, CompletionChannel};
pub use gid::GidEntry;
pub use memory::Mapping;
pub use mr::{LocalBuffer, SharedRegion};
pub use mw::{MemoryWindow, Type1, Type2, WindowType};
pub use pd::ProtectionDomain;
pub use qp::{
    AddressVector, CanReceive, Connected, Connection, Datagram, DatagramInitAttr, DatagramQp,
    Diagnosis, Init, InitAttr, QpAttributes, QpCapabilities, QpStatus, QueuePair, ReadyQp, Reset,
    Rtr, RtrAttr, Rts, RtsAttr, SendChain, Service, State, Unreliable, UnreliableQp,
    UnreliableRtrAttr,
};
pub use select::{
    DEVICE_ENV, DeviceDetails, DeviceInfo, DeviceList, DeviceSelector, PortDetails, describe, list,
};
pub use srq::{SharedReceiveQueue, SrqStatus};
pub use types::{
    AccessFlags, Gid, GidType, Lkey, Mtu, Psn, Qkey, QpState, Qpn, Remote, Rkey, SendFlags,
    WcOpcode, WcStatus,
};
pub use work::{Completion, Done, Gather, LOCAL_BUFFERS_MAX, Scatter, Source};
