//! Memory regions by key.
