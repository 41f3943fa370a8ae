//! The software RDMA device under libibverbs' names, for `LD_PRELOAD`.
//!
//! ```text
//!   LD_PRELOAD=libsoft_roce_preload.so FARLOG_DEVICE=soft@127.0.0.11 ib_write_lat
//! ```
//!
//! A program linked against libibverbs finds these functions first, because a preloaded object comes
//! first in the search order and one without version definitions satisfies versioned references. Its
//! device list then shows software devices alone. What the program's headers made inline reaches the
//! device through the objects, as always. `scripts/with-soft-roce` sets both variables.
//!
//! # Which devices
//!
//! `FARLOG_DEVICE` names them: `soft@ADDRESS`, or several of these with commas between; each address is
//! a device. Without it, or with `soft` or `auto`, there is one on a free address of 127.0.0.0/8. They
//! start with the first device list and live as long as the process.
//!
//! # What is left to the library
//!
//! libibverbs is still loaded, for everything that is not defined here: functions that see no object of
//! a device, and those by which its providers register. `tests/symbols.rs` names them all.
//!
//! A program that asks `dlopen` for libibverbs, as NCCL and farlog do, gets this object too (on x86-64):
//! see the module `redirect`.
//!
//! # Fork
//!
//! A child has no thread to drive the devices of its parent, and would take packets from their
//! sockets. Objects made before the fork are therefore refused in the child (`EINVAL`), and its device
//! list starts devices of its own.
//!
//! # Safety
//!
//! Each function hands its arguments to the function of the same name in [`soft_roce::verbs`], whose
//! conditions are those of the man page.
#![allow(unsafe_code, reason = "exports a C library's functions")]
#![allow(
    missing_docs,
    clippy::missing_safety_doc,
    unreachable_pub,
    reason = "called by C under the conditions of their man pages, and by no Rust crate"
)]

mod devices;
#[cfg(target_arch = "x86_64")]
mod redirect;

use std::ffi::{c_char, c_int, c_uint, c_void};

use rdma_core_bindings::*;
use soft_roce::verbs;

/// Exports functions of the table under the names of libibverbs.
macro_rules! export {
    ($($symbol:ident = $field:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol($($arg: $type),*) $(-> $result)? {
            let function = verbs().$field;
            // SAFETY: the arguments of a caller that keeps the conditions of the man page.
            unsafe { function($($arg),*) }
        }
    )*};
}

/// The same for functions that some libraries lack, and this one has.
macro_rules! export_young {
    ($($symbol:ident = $field:ident($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol($($arg: $type),*) $(-> $result)? {
            let function = verbs().$field.expect("the software device's table has no gap");
            // SAFETY: as for the older functions.
            unsafe { function($($arg),*) }
        }
    )*};
}

/// Starts the devices if they have not been, and lists them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_get_device_list(num_devices: *mut c_int) -> *mut *mut ibv_device {
    devices::list(num_devices)
}

/// What `ibv_devinfo -v` asks about each GID; private to rdma-core, but given one of our objects.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ibv_query_gid_type(
    context: *mut ibv_context,
    port_num: u8,
    index: c_uint,
    gid_type: *mut c_uint,
) -> c_int {
    /// `IBV_GID_TYPE_SYSFS_ROCE_V2`, the only type of this device.
    const ROCE_V2: c_uint = 1;
    let mut gid = ibv_gid { raw: [0; 16] };
    let Ok(index) = c_int::try_from(index) else {
        return -1;
    };
    // SAFETY: the caller's context, and a place for the GID.
    let result = unsafe { ibv_query_gid(context, port_num, index, &raw mut gid) };
    if result == 0 {
        // SAFETY: the caller points to a place for the result.
        unsafe { gid_type.write(ROCE_V2) };
    }
    result
}

export! {
    ibv_free_device_list = free_device_list(list: *mut *mut ibv_device);
    ibv_get_device_name = get_device_name(device: *mut ibv_device) -> *const c_char;
    ibv_get_device_guid = get_device_guid(device: *mut ibv_device) -> __be64;
    ibv_open_device = open_device(device: *mut ibv_device) -> *mut ibv_context;
    ibv_close_device = close_device(context: *mut ibv_context) -> c_int;
    ibv_get_async_event = get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
    ibv_ack_async_event = ack_async_event(event: *mut ibv_async_event);
    ibv_query_device = query_device(context: *mut ibv_context, device_attr: *mut ibv_device_attr) -> c_int;
    ibv_query_port = query_port(context: *mut ibv_context, port_num: u8, port_attr: *mut _compat_ibv_port_attr) -> c_int;
    ibv_query_gid = query_gid(context: *mut ibv_context, port_num: u8, index: c_int, gid: *mut ibv_gid) -> c_int;
    ibv_query_pkey = query_pkey(context: *mut ibv_context, port_num: u8, index: c_int, pkey: *mut __be16) -> c_int;
    ibv_resolve_eth_l2_from_gid = resolve_eth_l2_from_gid(context: *mut ibv_context, attr: *mut ibv_ah_attr, eth_mac: *mut u8, vid: *mut u16) -> c_int;
    ibv_alloc_pd = alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd = dealloc_pd(pd: *mut ibv_pd) -> c_int;
    ibv_reg_mr = reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr;
    ibv_rereg_mr = rereg_mr(mr: *mut ibv_mr, flags: c_int, pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> c_int;
    ibv_dereg_mr = dereg_mr(mr: *mut ibv_mr) -> c_int;
    ibv_create_comp_channel = create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel = destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
    ibv_create_cq = create_cq(context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel, comp_vector: c_int) -> *mut ibv_cq;
    ibv_resize_cq = resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int;
    ibv_destroy_cq = destroy_cq(cq: *mut ibv_cq) -> c_int;
    ibv_get_cq_event = get_cq_event(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, cq_context: *mut *mut c_void) -> c_int;
    ibv_ack_cq_events = ack_cq_events(cq: *mut ibv_cq, nevents: c_uint);
    ibv_create_srq = create_srq(pd: *mut ibv_pd, srq_init_attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
    ibv_modify_srq = modify_srq(srq: *mut ibv_srq, srq_attr: *mut ibv_srq_attr, srq_attr_mask: c_int) -> c_int;
    ibv_query_srq = query_srq(srq: *mut ibv_srq, srq_attr: *mut ibv_srq_attr) -> c_int;
    ibv_destroy_srq = destroy_srq(srq: *mut ibv_srq) -> c_int;
    ibv_create_qp = create_qp(pd: *mut ibv_pd, qp_init_attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_modify_qp = modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int) -> c_int;
    ibv_query_qp = query_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int, init_attr: *mut ibv_qp_init_attr) -> c_int;
    ibv_destroy_qp = destroy_qp(qp: *mut ibv_qp) -> c_int;
    ibv_attach_mcast = attach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    ibv_detach_mcast = detach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    ibv_create_ah = create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah;
    ibv_init_ah_from_wc = init_ah_from_wc(context: *mut ibv_context, port_num: u8, wc: *mut ibv_wc, grh: *mut ibv_grh, ah_attr: *mut ibv_ah_attr) -> c_int;
    ibv_create_ah_from_wc = create_ah_from_wc(pd: *mut ibv_pd, wc: *mut ibv_wc, grh: *mut ibv_grh, port_num: u8) -> *mut ibv_ah;
    ibv_destroy_ah = destroy_ah(ah: *mut ibv_ah) -> c_int;
    ibv_fork_init = fork_init() -> c_int;
    ibv_node_type_str = node_type_str(node_type: ibv_node_type) -> *const c_char;
    ibv_port_state_str = port_state_str(port_state: ibv_port_state) -> *const c_char;
    ibv_event_type_str = event_type_str(event: ibv_event_type) -> *const c_char;
    ibv_wc_status_str = wc_status_str(status: ibv_wc_status) -> *const c_char;
    ibv_rate_to_mult = rate_to_mult(rate: ibv_rate) -> c_int;
    mult_to_ibv_rate = mult_to_ibv_rate(mult: c_int) -> ibv_rate;
    ibv_rate_to_mbps = rate_to_mbps(rate: ibv_rate) -> c_int;
    mbps_to_ibv_rate = mbps_to_ibv_rate(mbps: c_int) -> ibv_rate;
}

export_young! {
    ibv_get_pkey_index = get_pkey_index(context: *mut ibv_context, port_num: u8, pkey: __be16) -> c_int;
    ibv_qp_to_qp_ex = qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex;
    ibv_reg_mr_iova = reg_mr_iova(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: c_int) -> *mut ibv_mr;
    ibv_reg_mr_iova2 = reg_mr_iova2(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: c_uint) -> *mut ibv_mr;
    ibv_get_device_index = get_device_index(device: *mut ibv_device) -> c_int;
    ibv_set_ece = set_ece(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int;
    ibv_query_ece = query_ece(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int;
    ibv_import_device = import_device(cmd_fd: c_int) -> *mut ibv_context;
    ibv_import_pd = import_pd(context: *mut ibv_context, pd_handle: u32) -> *mut ibv_pd;
    ibv_unimport_pd = unimport_pd(pd: *mut ibv_pd);
    ibv_import_mr = import_mr(pd: *mut ibv_pd, mr_handle: u32) -> *mut ibv_mr;
    ibv_unimport_mr = unimport_mr(mr: *mut ibv_mr);
    _ibv_query_gid_ex = query_gid_ex(context: *mut ibv_context, port_num: u32, gid_index: u32, entry: *mut ibv_gid_entry, flags: u32, entry_size: usize) -> c_int;
    _ibv_query_gid_table = query_gid_table(context: *mut ibv_context, entries: *mut ibv_gid_entry, max_entries: usize, flags: u32, entry_size: usize) -> isize;
    ibv_reg_dmabuf_mr = reg_dmabuf_mr(pd: *mut ibv_pd, offset: u64, length: usize, iova: u64, fd: c_int, access: c_int) -> *mut ibv_mr;
    ibv_import_dm = import_dm(context: *mut ibv_context, dm_handle: u32) -> *mut ibv_dm;
    ibv_unimport_dm = unimport_dm(dm: *mut ibv_dm);
    ibv_is_fork_initialized = is_fork_initialized() -> ibv_fork_status;
    ibv_query_qp_data_in_order = query_qp_data_in_order(qp: *mut ibv_qp, op: ibv_wr_opcode, flags: u32) -> c_int;
}
