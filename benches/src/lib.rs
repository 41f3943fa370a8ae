//! Benchmarks of farlog, each beside the speed of light for its question.
//!
//! | run | question |
//! | --- | --- |
//! | `cargo bench -p benches --bench codec` | how fast are record batches written, checked and read? |
//! | `cargo bench -p benches --bench crc` | what do the checksums cost? |
//! | `cargo bench -p benches --bench post_poll` | what does a small WRITE cost through the safe layer, and raw? |
//! | `cargo bench -p benches --bench append_commit` | how long from an append to its commit? |
//! | `cargo bench -p benches --bench partitions` | what do a thousand partitions cost? |
//! | `cargo run --release -p benches --bin write_vs_tcp` | is the software device as fast as TCP on loopback? |
//! | `packet_instructions`, under valgrind | how many instructions does the device take per packet? |
//!
//! `-- --quick` makes the criterion groups take seconds. What only computes is measured in CPU time of
//! its thread ([`ThreadCpuTime`]), so that other work on the machine disturbs little; everything else
//! in elapsed time. Compare figures of one run only, as ratios: absolute times belong to one machine
//! and one moment.

pub mod machine;
pub mod pair;
pub mod raw;
pub mod stats;

mod cpu_time;

pub use cpu_time::{ThreadCpuTime, process_cpu_time};
