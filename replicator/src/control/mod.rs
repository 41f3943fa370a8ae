//! Control-plane messages over TCP.
