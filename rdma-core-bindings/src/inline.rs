//! The inline functions of `<infiniband/verbs.h>` that farlog uses, one Rust function each.
//!
//! C compiles them into the program, so they are not in libibverbs: they call through the
//! operations that the context of the object carries. Those that also call an exported function
//! take the [`Verbs`] table first. Where C would jump to a NULL operation these return EOPNOTSUPP.
//!
//! # Safety
//!
//! Every function here requires its object pointers to be live objects of one device, made by the
//! table in use, and its other pointers to be valid as the man page of the same name says. Nothing
//! is checked that the C header does not check. `ibv_context::ops` is written only before
//! `ibv_open_device` returns, so reading it races with nothing.
#![allow(
    unsafe_code,
    reason = "dereferences verbs objects and calls the provider"
)]

use core::ffi::{c_int, c_uint, c_void};
use core::mem::{offset_of, size_of};
use core::ptr;

use crate::Verbs;
use crate::types::*;

/// Access flags that a library or kernel may ignore when it does not know them (bits 20 to 29).
pub const IBV_ACCESS_OPTIONAL_RANGE: c_uint = 0x3ff0_0000;

/// The value of `ibv_context::abi_compat` that says a `verbs_context` is around the context.
///
/// All bits set in the width of a pointer, which is 64 bits here: a comparison with 32 bits set
/// finds no extended verb on any device.
pub const VERBS_ABI_IS_EXTENDED: *mut c_void = ptr::without_provenance_mut(usize::MAX);

/// Finds the `verbs_context` around a context; NULL where the provider has none.
///
/// # Safety
///
/// `context` is a live context (module docs).
#[inline]
pub unsafe fn verbs_get_ctx(context: *mut ibv_context) -> *mut verbs_context {
    // SAFETY: the caller's context is live.
    let abi_compat = unsafe { (*context).abi_compat };
    if abi_compat != VERBS_ABI_IS_EXTENDED {
        return ptr::null_mut();
    }
    context
        .wrapping_byte_sub(offset_of!(verbs_context, context))
        .cast()
}

/// Finds the `verbs_context` if it is large enough to hold the field at `offset`.
///
/// The struct grows at its front, so `sz` counts from the end: an older provider's struct ends in
/// the same fields and lacks the first ones.
unsafe fn verbs_get_ctx_op(context: *mut ibv_context, offset: usize) -> Option<*mut verbs_context> {
    // SAFETY: the caller's context is live.
    let extended = unsafe { verbs_get_ctx(context) };
    if extended.is_null() {
        return None;
    }
    // SAFETY: the field before `context` exists in every `verbs_context`.
    let sz = unsafe { (*extended).sz };
    (sz >= size_of::<verbs_context>() - offset).then_some(extended)
}

/// The operations that the inline functions call.
///
/// # Safety
///
/// `context` is live for as long as the reference is used.
#[inline]
unsafe fn ops<'a>(context: *mut ibv_context) -> &'a ibv_context_ops {
    // SAFETY: live as the caller promises, and nobody writes `ops` any more (module docs).
    unsafe { &(*context).ops }
}

fn set_errno(errno: c_int) {
    // SAFETY: no preconditions; the pointer is to this thread's errno.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { *location = errno };
}

/// Posts a chain of send work requests.
///
/// Returns 0 or the errno value, and then `*bad_wr` is the first request that was not posted. A
/// full queue is ENOMEM; what the other values mean differs from provider to provider.
///
/// # Safety
///
/// `qp`, the chain at `wr` and `bad_wr` are valid. What the requests point to stays valid until
/// their completions were polled or the queue pair was destroyed.
#[inline]
pub unsafe fn ibv_post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller's queue pair is live.
    let context = unsafe { (*qp).context };
    // SAFETY: a context outlives its objects.
    match unsafe { ops(context) }.post_send {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(post_send) => unsafe { post_send(qp, wr, bad_wr) },
        None => {
            // SAFETY: valid for writes, as the caller promises.
            unsafe { *bad_wr = wr };
            libc::EOPNOTSUPP
        }
    }
}

/// Posts a chain of receive work requests.
///
/// Returns 0 or the errno value, and then `*bad_wr` is the first request that was not posted.
///
/// # Safety
///
/// As for [`ibv_post_send`].
#[inline]
pub unsafe fn ibv_post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller's queue pair is live.
    let context = unsafe { (*qp).context };
    // SAFETY: a context outlives its objects.
    match unsafe { ops(context) }.post_recv {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(post_recv) => unsafe { post_recv(qp, wr, bad_wr) },
        None => {
            // SAFETY: valid for writes, as the caller promises.
            unsafe { *bad_wr = wr };
            libc::EOPNOTSUPP
        }
    }
}

/// Posts a chain of receive work requests to a shared receive queue.
///
/// Returns 0 or the errno value, and then `*bad_wr` is the first request that was not posted.
///
/// # Safety
///
/// As for [`ibv_post_send`].
#[inline]
pub unsafe fn ibv_post_srq_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller's shared receive queue is live.
    let context = unsafe { (*srq).context };
    // SAFETY: a context outlives its objects.
    match unsafe { ops(context) }.post_srq_recv {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(post_srq_recv) => unsafe { post_srq_recv(srq, wr, bad_wr) },
        None => {
            // SAFETY: valid for writes, as the caller promises.
            unsafe { *bad_wr = wr };
            libc::EOPNOTSUPP
        }
    }
}

/// Takes up to `num_entries` completions from a completion queue.
///
/// Returns how many it wrote to `wc`, fewer than asked for when the queue is empty, or a negative
/// value when the queue is broken, for instance overrun.
///
/// # Safety
///
/// `cq` is valid and `wc` has room for `num_entries` completions.
#[inline]
pub unsafe fn ibv_poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the caller's completion queue is live.
    let context = unsafe { (*cq).context };
    // SAFETY: a context outlives its objects.
    match unsafe { ops(context) }.poll_cq {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(poll_cq) => unsafe { poll_cq(cq, num_entries, wc) },
        None => -libc::EOPNOTSUPP,
    }
}

/// Asks for an event on the completion channel when the next completion arrives.
///
/// With `solicited_only` not 0, only for one that is solicited or has failed. Completions already
/// in the queue raise no event: poll once more after this. Returns 0 or the errno value.
///
/// # Safety
///
/// `cq` is valid and was created with a completion channel.
#[inline]
pub unsafe fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller's completion queue is live.
    let context = unsafe { (*cq).context };
    // SAFETY: a context outlives its objects.
    match unsafe { ops(context) }.req_notify_cq {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(req_notify_cq) => unsafe { req_notify_cq(cq, solicited_only) },
        None => libc::EOPNOTSUPP,
    }
}

/// Allocates a memory window. Returns NULL and sets errno on failure.
///
/// # Safety
///
/// `pd` is valid.
pub unsafe fn ibv_alloc_mw(pd: *mut ibv_pd, type_: ibv_mw_type) -> *mut ibv_mw {
    // SAFETY: the caller's protection domain is live.
    let context = unsafe { (*pd).context };
    // SAFETY: a context outlives its objects.
    match unsafe { ops(context) }.alloc_mw {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(alloc_mw) => unsafe { alloc_mw(pd, type_) },
        None => {
            set_errno(libc::EOPNOTSUPP);
            ptr::null_mut()
        }
    }
}

/// Frees a memory window, bound or not. Returns 0 or the errno value.
///
/// # Safety
///
/// `mw` is valid, and is not used again if this returns 0.
#[inline]
pub unsafe fn ibv_dealloc_mw(mw: *mut ibv_mw) -> c_int {
    // SAFETY: the caller's memory window is live.
    let context = unsafe { (*mw).context };
    // SAFETY: a context outlives its objects.
    match unsafe { ops(context) }.dealloc_mw {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(dealloc_mw) => unsafe { dealloc_mw(mw) },
        None => libc::EOPNOTSUPP,
    }
}

/// Binds a type 1 memory window to a part of a memory region, or unbinds it (length 0).
///
/// Returns 0 or the errno value: EINVAL for a window of another type (type 2 is bound by a send
/// work request) or for a range without a region, EPERM if window and region belong to different
/// protection domains.
///
/// # Safety
///
/// `qp`, `mw`, `mw_bind` and its region, if not NULL, are valid.
pub unsafe fn ibv_bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, mw_bind: *mut ibv_mw_bind) -> c_int {
    // SAFETY: the caller's window is live; a copy of its public fields is read.
    let window = unsafe { ptr::read(mw) };
    // SAFETY: the caller's request is valid.
    let info = unsafe { (*mw_bind).bind_info };
    if window.type_ != IBV_MW_TYPE_1 {
        return libc::EINVAL;
    }
    if info.mr.is_null() {
        if info.addr != 0 || info.length != 0 {
            return libc::EINVAL;
        }
    } else {
        // SAFETY: the caller's region is live.
        let region_pd = unsafe { (*info.mr).pd };
        if window.pd != region_pd {
            return libc::EPERM;
        }
    }
    // SAFETY: a context outlives its objects.
    match unsafe { ops(window.context) }.bind_mw {
        // SAFETY: the provider's own function, given what the caller vouches for.
        Some(bind_mw) => unsafe { bind_mw(qp, mw, mw_bind) },
        None => libc::EOPNOTSUPP,
    }
}

/// Gives the next key for a type 2 window: the tag, the lowest 8 bits, advances and wraps.
#[must_use]
pub fn ibv_inc_rkey(rkey: u32) -> u32 {
    (rkey & !0xff) | (rkey.wrapping_add(1) & 0xff)
}

/// Reads the port attributes. Returns 0 or the errno value.
///
/// A provider without the extended verb fills the part that it knows; the rest is 0.
///
/// # Safety
///
/// `context` is live and belongs to `verbs`; `port_attr` is valid for writes.
pub unsafe fn ibv_query_port(
    verbs: &Verbs,
    context: *mut ibv_context,
    port_num: u8,
    port_attr: *mut ibv_port_attr,
) -> c_int {
    let offset = offset_of!(verbs_context, query_port);
    // SAFETY: the caller's context is live.
    if let Some(extended) = unsafe { verbs_get_ctx_op(context, offset) } {
        // SAFETY: the struct holds the field.
        if let Some(query_port) = unsafe { (*extended).query_port } {
            let len = size_of::<ibv_port_attr>();
            // SAFETY: the provider's own function; it writes at most `len` bytes.
            return unsafe { query_port(context, port_num, port_attr, len) };
        }
    }
    // SAFETY: valid for writes, and zero is a valid value of every field.
    unsafe { ptr::write_bytes(port_attr, 0, 1) };
    // SAFETY: the compat attributes are a prefix of `ibv_port_attr`.
    unsafe { (verbs.query_port)(context, port_num, port_attr.cast()) }
}

/// Registers `length` bytes at `addr`. Returns NULL and sets errno on failure.
///
/// Flags of [`IBV_ACCESS_OPTIONAL_RANGE`] that the library or the kernel does not know are left
/// out.
///
/// # Safety
///
/// `pd` is live and belongs to `verbs`; the memory stays mapped until the region is deregistered,
/// and nobody relies on its bytes while the device may write them.
pub unsafe fn ibv_reg_mr(
    verbs: &Verbs,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_uint,
) -> *mut ibv_mr {
    match verbs.reg_mr_iova2 {
        Some(reg_mr_iova2) if access & IBV_ACCESS_OPTIONAL_RANGE != 0 => {
            let iova = addr.expose_provenance() as u64;
            // SAFETY: as the caller promises.
            unsafe { reg_mr_iova2(pd, addr, length, iova, access) }
        }
        // SAFETY: as the caller promises.
        _ => unsafe { (verbs.reg_mr)(pd, addr, length, required_access(access)) },
    }
}

/// Registers `length` bytes at `addr`, which peers and work requests address from `iova` on.
///
/// Returns NULL and sets errno on failure: EOPNOTSUPP if the library is older than rdma-core 25.
/// Optional flags are treated as by [`ibv_reg_mr`].
///
/// # Safety
///
/// As for [`ibv_reg_mr`].
pub unsafe fn ibv_reg_mr_iova(
    verbs: &Verbs,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    match (verbs.reg_mr_iova2, verbs.reg_mr_iova) {
        (Some(reg_mr_iova2), _) if access & IBV_ACCESS_OPTIONAL_RANGE != 0 => {
            // SAFETY: as the caller promises.
            unsafe { reg_mr_iova2(pd, addr, length, iova, access) }
        }
        (_, Some(reg_mr_iova)) => {
            // SAFETY: as the caller promises.
            unsafe { reg_mr_iova(pd, addr, length, iova, required_access(access)) }
        }
        _ => {
            set_errno(libc::EOPNOTSUPP);
            ptr::null_mut()
        }
    }
}

/// The flags without the optional ones, as the older functions take them.
fn required_access(access: c_uint) -> c_int {
    (access & !IBV_ACCESS_OPTIONAL_RANGE).cast_signed()
}

/// Reads one GID table entry, with its type and network device.
///
/// Returns 0 or the errno value: ENODATA for an empty entry, EOPNOTSUPP if the library is older
/// than rdma-core 32. `flags` is 0.
///
/// # Safety
///
/// `context` is live and belongs to `verbs`; `entry` is valid for writes.
pub unsafe fn ibv_query_gid_ex(
    verbs: &Verbs,
    context: *mut ibv_context,
    port_num: u32,
    gid_index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
) -> c_int {
    match verbs.query_gid_ex {
        Some(query_gid_ex) => {
            let entry_size = size_of::<ibv_gid_entry>();
            // SAFETY: as the caller promises; the function writes at most `entry_size` bytes.
            unsafe { query_gid_ex(context, port_num, gid_index, entry, flags, entry_size) }
        }
        None => libc::EOPNOTSUPP,
    }
}

/// Reads the valid GID table entries of all ports, at most `max_entries`.
///
/// Returns their number or a negative errno value: EOPNOTSUPP if the library is older than
/// rdma-core 32. `flags` is 0.
///
/// # Safety
///
/// `context` is live and belongs to `verbs`; `entries` has room for `max_entries`.
pub unsafe fn ibv_query_gid_table(
    verbs: &Verbs,
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
) -> isize {
    match verbs.query_gid_table {
        Some(query_gid_table) => {
            let entry_size = size_of::<ibv_gid_entry>();
            // SAFETY: as the caller promises.
            unsafe { query_gid_table(context, entries, max_entries, flags, entry_size) }
        }
        None => -(libc::EOPNOTSUPP as isize),
    }
}

/// Reads the extended device attributes. Returns 0 or the errno value.
///
/// Where the provider or the kernel lacks the extended verb, `orig_attr` is filled and the rest is
/// 0.
///
/// # Safety
///
/// `context` is live and belongs to `verbs`; `input` is NULL or valid; `attr` is valid for writes.
pub unsafe fn ibv_query_device_ex(
    verbs: &Verbs,
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
) -> c_int {
    // SAFETY: NULL or valid, as the caller promises.
    if unsafe { input.as_ref() }.is_some_and(|input| input.comp_mask != 0) {
        return libc::EINVAL;
    }
    let offset = offset_of!(verbs_context, query_device_ex);
    // SAFETY: the caller's context is live.
    if let Some(extended) = unsafe { verbs_get_ctx_op(context, offset) } {
        // SAFETY: the struct holds the field.
        if let Some(query_device_ex) = unsafe { (*extended).query_device_ex } {
            let len = size_of::<ibv_device_attr_ex>();
            // SAFETY: the provider's own function; it writes at most `len` bytes.
            let ret = unsafe { query_device_ex(context, input, attr, len) };
            if ret != libc::EOPNOTSUPP && ret != libc::ENOSYS {
                return ret;
            }
        }
    }
    // SAFETY: valid for writes, and zero is a valid value of every field.
    unsafe { ptr::write_bytes(attr, 0, 1) };
    // SAFETY: valid for writes.
    let orig_attr = unsafe { &raw mut (*attr).orig_attr };
    // SAFETY: as the caller promises.
    unsafe { (verbs.query_device)(context, orig_attr) }
}
