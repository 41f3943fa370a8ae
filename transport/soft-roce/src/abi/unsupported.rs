//! Verbs of kinds this device does not have, each failing by its own convention with `EOPNOTSUPP`.
//!
//! They exist so that no program finds an entry missing, or another library's behind it.

use std::ffi::c_int;
use std::ptr;

use rdma_core_bindings::{
    IBV_FORK_UNNEEDED, ibv_context, ibv_dm, ibv_ece, ibv_fork_status, ibv_gid, ibv_mr, ibv_pd,
    ibv_qp, ibv_wr_opcode,
};
use rustix::io::Errno;

use super::convention::set_errno;

/// Fails as functions do that return a pointer.
fn null<T>() -> *mut T {
    set_errno(Errno::OPNOTSUPP);
    ptr::null_mut()
}

// Multicast.

pub(super) extern "C" fn attach_mcast(_: *mut ibv_qp, _: *const ibv_gid, _: u16) -> c_int {
    libc::EOPNOTSUPP
}

pub(super) extern "C" fn detach_mcast(_: *mut ibv_qp, _: *const ibv_gid, _: u16) -> c_int {
    libc::EOPNOTSUPP
}

// Sharing registrations.

pub(super) extern "C" fn reg_dmabuf_mr(
    _: *mut ibv_pd,
    _: u64,
    _: usize,
    _: u64,
    _: c_int,
    _: c_int,
) -> *mut ibv_mr {
    null()
}

pub(super) extern "C" fn import_device(_: c_int) -> *mut ibv_context {
    null()
}

pub(super) extern "C" fn import_pd(_: *mut ibv_context, _: u32) -> *mut ibv_pd {
    null()
}

pub(super) extern "C" fn unimport_pd(_: *mut ibv_pd) {}

pub(super) extern "C" fn import_mr(_: *mut ibv_pd, _: u32) -> *mut ibv_mr {
    null()
}

pub(super) extern "C" fn unimport_mr(_: *mut ibv_mr) {}

pub(super) extern "C" fn import_dm(_: *mut ibv_context, _: u32) -> *mut ibv_dm {
    null()
}

pub(super) extern "C" fn unimport_dm(_: *mut ibv_dm) {}

// Enhanced connection establishment, and the order of bytes.

pub(super) extern "C" fn set_ece(_: *mut ibv_qp, _: *mut ibv_ece) -> c_int {
    libc::EOPNOTSUPP
}

pub(super) extern "C" fn query_ece(_: *mut ibv_qp, _: *mut ibv_ece) -> c_int {
    libc::EOPNOTSUPP
}

/// No promise beyond the verbs': the bytes of one message may become visible in any order.
pub(super) extern "C" fn query_qp_data_in_order(_: *mut ibv_qp, _: ibv_wr_opcode, _: u32) -> c_int {
    0
}

// Fork: the device's memory accesses go through the process's own page tables, where the parent
// keeps what it had. A child must not use the parent's objects, as with any verbs device.

pub(super) extern "C" fn fork_init() -> c_int {
    0
}

pub(super) extern "C" fn is_fork_initialized() -> ibv_fork_status {
    IBV_FORK_UNNEEDED
}
