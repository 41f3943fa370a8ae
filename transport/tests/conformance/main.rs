//! One suite for every device: what the safe layer promises, and what a device must do for it.
//!
//! `FARLOG_TEST_DEVICE` names the device (default: the software device, each end one of its own). On a
//! real device, kernel rxe included, both ends are on it. A test that cannot run says why and passes;
//! with `FARLOG_REQUIRE_DEVICE=1` it fails.
//!
//! Devices differ in how they report some errors. Where the specification or a known device allows
//! several statuses, the test lists them and says whose they are.

mod datagrams;
mod errors;
mod events;
mod harness;
mod memory;
mod operations;
mod queues;
mod shared_receive;
mod states;
mod windows;
