//! Device list, open and close, names.

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::{Arc, LazyLock, Mutex};

use rdma_core_bindings::{__be64, ibv_context, ibv_device, verbs_context};
use rustix::io::Errno;

use super::convention::{caught, minus_one, null};
use super::objects::{Children, Context, hand_out, object, take_back};
use super::{cq, cq_ex, mw, post, qp_ex, query, srq};
use crate::device::{EventQueue, SoftDevice, live_devices, lock};

/// The lists handed out and not yet freed, by the address of their first entry, with what keeps the
/// listed devices alive until then.
static LISTS: LazyLock<Mutex<HashMap<usize, DeviceList>>> = LazyLock::new(Mutex::default);

struct DeviceList {
    entries: *mut [*mut ibv_device],
    _devices: Vec<Arc<SoftDevice>>,
}

// SAFETY: the pointer is to a list of this process, which any thread may free.
unsafe impl Send for DeviceList {}

pub(super) extern "C" fn get_device_list(num_devices: *mut c_int) -> *mut *mut ibv_device {
    null(None, || {
        let devices = live_devices();
        let mut entries: Vec<_> = devices.iter().map(device_pointer).collect();
        entries.push(ptr::null_mut());
        let entries = Box::into_raw(entries.into_boxed_slice());
        if !num_devices.is_null() {
            let count = c_int::try_from(devices.len()).unwrap_or(c_int::MAX);
            // SAFETY: not NULL, so the caller points to an int for the result.
            unsafe { *num_devices = count };
        }
        let first = entries.cast::<*mut ibv_device>();
        lock(&LISTS).insert(
            first.addr(),
            DeviceList {
                entries,
                _devices: devices,
            },
        );
        Ok(first)
    })
}

pub(super) extern "C" fn free_device_list(list: *mut *mut ibv_device) {
    let _ = caught(None, || {
        // A list that is not ours, or freed before, is not found and nothing happens.
        if let Some(list) = lock(&LISTS).remove(&list.addr()) {
            // SAFETY: made by `Box::into_raw` in `get_device_list`, removed from LISTS exactly once.
            drop(unsafe { Box::from_raw(list.entries) });
        }
        Ok(())
    });
}

pub(super) unsafe extern "C" fn get_device_name(device: *mut ibv_device) -> *const c_char {
    if device.is_null() {
        return ptr::null();
    }
    // SAFETY: a listed or opened device is alive, and its name is never written after its start.
    unsafe { &raw const (*device).name }.cast()
}

pub(super) unsafe extern "C" fn get_device_guid(device: *mut ibv_device) -> __be64 {
    // SAFETY: as the man page demands, the device is listed or open.
    unsafe { soft_device(device) }.map_or(0, |device| device.node_guid())
}

pub(super) unsafe extern "C" fn get_device_index(_device: *mut ibv_device) -> c_int {
    -1
}

pub(super) unsafe extern "C" fn open_device(device: *mut ibv_device) -> *mut ibv_context {
    // SAFETY: as the man page demands, the device is listed or open.
    let Some(device) = (unsafe { soft_device(device) }) else {
        return null(None, || Err(Errno::INVAL));
    };
    null(Some(&device), || {
        let events = Arc::new(EventQueue::new()?);
        device.attach(&events);
        let verbs = UnsafeCell::new(verbs_context_of(&device, &events));
        let children = Children::default();
        Ok(hand_out(Context {
            verbs,
            device: Arc::clone(&device),
            events,
            children,
        }))
    })
}

/// Closes also while objects are left, as the kernel does when a descriptor is closed: perftest counts
/// on it. No peer reaches them any more; their memory stays, for the application may still hold them.
pub(super) unsafe extern "C" fn close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        super::convention::set_errno(Errno::INVAL);
        return -1;
    };
    let device = Arc::clone(&open.device);
    minus_one(&device, || {
        device.detach(&open.events);
        if open.children.check_none().is_ok() {
            // SAFETY: the context has no children, and the caller closes it once.
            drop(unsafe { take_back::<Context>(context) });
        } else {
            tracing::warn!(
                device = device.name(),
                "closed while objects of it are left"
            );
        }
        Ok(())
    })
}

/// The address of a device's public part, good for the whole [`SoftDevice`].
fn device_pointer(device: &Arc<SoftDevice>) -> *mut ibv_device {
    Arc::as_ptr(device).cast_mut().cast()
}

/// The device behind a pointer of the application, unless it is one of a parent process.
///
/// # Safety
///
/// `device` is NULL or came from [`device_pointer`], and a list or a context keeps it alive.
unsafe fn soft_device(device: *mut ibv_device) -> Option<Arc<SoftDevice>> {
    if device.is_null() {
        return None;
    }
    let device = device.cast_const().cast::<SoftDevice>();
    // SAFETY: the caller vouches that some `Arc` of the device exists during this call, and the
    // pointer came from `Arc::as_ptr`.
    unsafe { Arc::increment_strong_count(device) };
    // SAFETY: takes over the count added above.
    Some(unsafe { Arc::from_raw(device) }).filter(|device| device.is_ours())
}

fn verbs_context_of(
    device: &Arc<SoftDevice>,
    events: &EventQueue<crate::device::ContextEvent>,
) -> verbs_context {
    // SAFETY: the struct is C's, of integers, pointers and optional functions, where zero means none.
    let mut verbs: verbs_context = unsafe { mem::zeroed() };
    verbs.sz = size_of::<verbs_context>();
    verbs.query_port = Some(query::query_port_ex);
    verbs.query_device_ex = Some(query::query_device_ex);
    verbs.create_cq_ex = Some(cq_ex::create_cq_ex);
    verbs.create_qp_ex = Some(qp_ex::create_qp_ex);
    let context = &mut verbs.context;
    context.device = device_pointer(device);
    context.async_fd = events.as_fd().as_raw_fd();
    // There is nobody to write commands to, but programs duplicate the descriptor to share it.
    context.cmd_fd = context.async_fd;
    context.num_comp_vectors = 1;
    // The mark of a `verbs_context`: all ones, as wide as a pointer.
    context.abi_compat = ptr::without_provenance_mut::<c_void>(usize::MAX);
    context.ops.post_send = Some(post::post_send);
    context.ops.post_recv = Some(post::post_recv);
    context.ops.poll_cq = Some(cq::poll_cq);
    context.ops.req_notify_cq = Some(cq::req_notify_cq);
    context.ops.post_srq_recv = Some(srq::post_srq_recv);
    context.ops.alloc_mw = Some(mw::alloc_mw);
    context.ops.bind_mw = Some(mw::bind_mw);
    context.ops.dealloc_mw = Some(mw::dealloc_mw);
    verbs
}
