//! The reliable-connection protocol, without I/O.
