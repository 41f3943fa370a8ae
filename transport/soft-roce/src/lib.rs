//! A software RDMA device: RoCEv2 reliable connections in user space, behind the verbs ABI.

pub mod copy;
pub mod link;
pub mod mr_table;
pub mod rc;
pub mod wire;

mod abi;
mod device;
