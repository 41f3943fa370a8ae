//! A software RDMA device: RoCEv2 in user space, behind the verbs ABI.
//!
//! It exists so that programs written against verbs run where no RDMA hardware and no kernel module
//! is: one UDP socket, no privilege. On the wire it speaks what kernel rxe and RoCEv2 adapters speak;
//! towards the program it is the table that libibverbs would be.
//!
//! ```text
//!   program: ibv_post_send, ibv_poll_cq, ...
//!        |  Verbs table: verbs()
//!   abi      extern "C" functions, objects handed out, error conventions
//!   device   queue pairs, completion queues, the lock, the thread: the only loop
//!   rc, uc   connections, reliable or not: a queue pair, no I/O  mr_table, copy   registered memory
//!   ud       datagrams: a queue pair, no I/O
//!   srq      receive requests that queue pairs share             qp, work  what all queue pairs have
//!   wire     packets as bytes                                    link             sockets, capture
//! ```
//!
//! One device has one IPv4 or IPv6 address, and any number of them live in one process or on one machine:
//!
//! ```
//! use soft_roce::{SoftConfig, SoftDevice};
//!
//! let device = SoftDevice::bind(SoftConfig::default())?;
//! assert!(device.name().starts_with("soft@127."));
//! let verbs = soft_roce::verbs();
//! // From here on as with libibverbs: (verbs.get_device_list)(..), (verbs.open_device)(..), ...
//! # let _ = verbs;
//! # Ok::<(), soft_roce::BindError>(())
//! ```
//!
//! This crate does not know who uses it: neither the safe layer above nor what is transported.

mod abi;
pub mod copy;
mod device;
mod faults;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod link;
pub mod mr_table;
pub mod qp;
pub mod rc;
#[cfg(test)]
mod sim;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod srq;
pub mod uc;
pub mod ud;
#[cfg(any(test, fuzzing, feature = "simulation"))]
#[cfg_attr(
    not(any(test, fuzzing)),
    allow(
        dead_code,
        reason = "tests do more with a device than simulations of others"
    )
)]
mod virtual_device;
pub mod wire;
pub mod work;

pub use abi::verbs;
pub use device::{BindError, SoftConfig, SoftDevice};
