//! The preload library from outside: what it exports, and programs that run on it.
#![allow(unsafe_code, reason = "calls C functions that it looks up by name")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    clippy::undocumented_unsafe_blocks,
    reason = "verbs are a C interface; each test keeps the conditions of the man pages"
)]

mod inside;
mod programs;
mod support;
mod symbols;
