//! The verbs C ABI: types, inline functions and the table of libibverbs' exported functions.
//!
//! A verbs program calls two kinds of functions. The exported ones are in the [`Verbs`] table,
//! which [`Verbs::load`] fills from libibverbs; a software device fills one of its own. The inline
//! ones ([`ibv_post_send`], [`ibv_poll_cq`], ...) call through the operations in the context of the
//! object they are given, so they work on whatever device made it.
//!
//! ```
//! match rdma_core_bindings::Verbs::load() {
//!     Ok(verbs) => println!("{verbs:?}"),
//!     Err(error) => println!("{error}"),
//! }
//! ```
//!
//! The crate knows nothing above the ABI: no ownership, no devices of its own, no errors but those
//! of loading. The types are those of rdma-core 44 and serve older and newer libraries: public
//! structs only grow at their end, and what is young is optional. By default nothing of RDMA is
//! needed to build; with feature `rdma-sys` the table is filled at link time from the crate of that
//! name.

#[cfg(any(test, not(feature = "rdma-sys")))]
mod dlopen;
#[cfg(any(test, feature = "rdma-sys"))]
#[allow(
    dead_code,
    unreachable_pub,
    unsafe_code,
    reason = "generated from C headers: every exported function, to check signatures with"
)]
mod functions;
mod inline;
#[cfg(feature = "rdma-sys")]
mod link;
mod load;
#[allow(
    missing_docs,
    missing_debug_implementations,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    unsafe_code,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "generated from C headers; the names are the C names"
)]
mod types;
mod verbs;

pub use inline::*;
pub use load::LoadError;
pub use types::*;
pub use verbs::Verbs;
