//! Holds this crate against rdma-core: its headers, its inline functions and its library.
//!
//! The tests that need a C compiler, `<infiniband/verbs.h>` or libibverbs print why they skip where
//! one is missing. With `FARLOG_REQUIRE_C_PROBE=1` that is a failure.

mod c_probe;
mod inlines;
mod layout;
mod library;
