//! The software device through its verbs table alone, as a C program would use it.
//!
//! Two devices of one process talk over UDP on free addresses of 127.0.0.0/8. The inline verbs are
//! those of `rdma-core-bindings`, so posting and polling take the way through `ibv_context.ops`.
#![allow(unsafe_code, reason = "verbs are a C interface")]

mod conventions;
mod datagrams;
mod events;
mod extended;
mod failures;
mod ipv6;
mod objects;
mod operations;
mod packets;
mod progress;
mod shared_receive;
mod strangers;
mod support;
mod unreliable;
mod windows;
