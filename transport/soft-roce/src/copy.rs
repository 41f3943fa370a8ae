//! One bulk-copy primitive for memory that peers may touch at any time.
