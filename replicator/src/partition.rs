//! One partition's log: append, roll, offsets.
