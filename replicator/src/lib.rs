//! A Kafka-style replicated log over RDMA.

pub mod cluster;
pub mod consumer;
pub mod control;
pub mod follower;
pub mod image;
pub mod leader;
pub mod partition;
pub mod producer;
pub mod record;
pub mod runtime;
pub mod segment;
pub mod table;

#[cfg(test)]
mod engine_tests;
