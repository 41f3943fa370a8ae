//! The `farlog` command.

fn main() {}
