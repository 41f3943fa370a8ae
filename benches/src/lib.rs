//! Benchmarks of farlog.
