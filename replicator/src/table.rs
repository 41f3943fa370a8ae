//! The registered table of descriptors and tails.
