//! RoCEv2 packets as bytes.
