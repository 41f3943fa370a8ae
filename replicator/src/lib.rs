//! A Kafka-style replicated log over RDMA.
//!
//! A leader's NIC writes record batches into its followers' memory, and consumers' NICs read committed
//! ones out of any replica's. No CPU of the other side takes part in either.
//!
//! ```text
//!   producer --- control: Append ---> leader -- WRITE data, WRITE tail --> follower   one round trip
//!                                       ^                                    ^
//!                  consumer --- READ entry, READ data ------------------------'       one round trip
//! ```
//!
//! | module | what it knows |
//! | --- | --- |
//! | [`record`] | Kafka's record batch v2 |
//! | [`segment`] | Kafka's segment files, indexes and checkpoints |
//! | [`image`], [`table`] | the log's tail in registered memory: books of an image, bytes of the table |
//! | [`epoch`] | which leader epoch wrote which offsets, and where two logs part |
//! | [`scan`] | what of an image is log, once nobody writes to it |
//! | [`partition`], [`leader`], [`follower`], [`consumer`] | engines without I/O: events in, commands out |
//! | [`replica`] | which role a node plays for a partition, and how that changes |
//! | [`control`] | messages over TCP: end points, grants, a simple produce path |
//! | [`coordinator`] | who leads and who is in sync: agreed on elsewhere |
//! | [`cluster`], [`producer`] | the cluster file, and a client that appends |
//! | [`runtime`] | executes the engines on a device, a clock and files |
//!
//! What one append of `n` bytes costs a follower: two work requests, one doorbell, `n` + 64 bytes on the
//! wire, one acknowledgement, none of its CPU. What it costs later, off that path: one copy to the page
//! cache and one CRC.
//!
//! No engine knows a device, a thread, a socket or a file, and nothing here says `unsafe`.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod consumer;
pub mod control;
pub mod coordinator;
pub mod epoch;
mod faults;
pub mod follower;
pub mod image;
pub mod leader;
mod leaders;
pub mod partition;
pub mod producer;
pub mod record;
pub mod replica;
pub mod runtime;
pub mod scan;
pub mod segment;
pub mod table;

#[cfg(test)]
mod engine_tests;
#[cfg(test)]
mod sim;
