//! The preload library from outside: what it exports, and programs that run on it.
#![allow(unsafe_code, reason = "calls C functions that it looks up by name")]

mod inside;
mod programs;
mod support;
mod symbols;
