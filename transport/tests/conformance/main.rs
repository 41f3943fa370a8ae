//! One suite for every device: what the safe layer promises, and what a device must do for it.
//!
//! `FARLOG_TEST_DEVICE` names the device (default: the software device, each end one of its own). On a
//! real device, kernel rxe included, both ends are on it. A test that cannot run says why and passes;
//! with `FARLOG_REQUIRE_DEVICE=1` it fails.
//!
//! The software device and kernel rxe give the same results, but for the list of named differences in
//! `differences`: what differs is printed with its reason, and what differs no longer fails the test.

mod datagrams;
#[path = "../common/differences.rs"]
mod differences;
mod errors;
mod events;
mod harness;
mod memory;
mod operations;
mod queues;
mod shared_receive;
mod states;
mod unreliable;
mod windows;
