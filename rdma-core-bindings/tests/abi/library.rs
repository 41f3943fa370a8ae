//! Calls the library of this machine through the table.
#![allow(unsafe_code, reason = "calls libibverbs")]

use core::ffi::{CStr, c_char, c_int};
use std::io::Error;

use rdma_core_bindings::*;

use crate::c_probe::skip;

fn library() -> Option<&'static Verbs> {
    match Verbs::load() {
        Ok(verbs) => Some(verbs),
        Err(error) => {
            assert!(error.to_string().contains("libibverbs1"), "{error}");
            skip(&error.to_string());
            None
        }
    }
}

/// Without RDMA in the kernel the list is NULL, which `ibv_free_device_list` would dereference.
#[test]
fn device_list_is_null_with_errno_or_ends_with_null() {
    let Some(verbs) = library() else { return };
    let mut count: c_int = -1;
    // SAFETY: `count` is valid for writes.
    let list = unsafe { (verbs.get_device_list)(&mut count) };
    if list.is_null() {
        let errno = Error::last_os_error();
        assert_eq!(errno.raw_os_error(), Some(libc::ENOSYS), "{errno}");
        println!("no device list: {errno}");
        return;
    }
    let count = usize::try_from(count).expect("a list that is there has a length");
    println!("{count} devices");
    // SAFETY: the list has `count` devices and NULL after them, and is freed below.
    let devices = unsafe { core::slice::from_raw_parts(list, count + 1) };
    assert!(devices[count].is_null());
    for &device in &devices[..count] {
        // SAFETY: a device of the list, which is not freed yet.
        assert!(!unsafe { (verbs.get_device_name)(device) }.is_null());
    }
    // SAFETY: the list came from `get_device_list` and no device of it is in use.
    unsafe { (verbs.free_device_list)(list) };
}

#[test]
fn functions_without_objects_answer() {
    let Some(verbs) = library() else { return };
    // SAFETY: takes any value.
    let status = text(unsafe { (verbs.wc_status_str)(IBV_WC_SUCCESS) });
    assert_eq!(status, "success");
    // SAFETY: takes any value.
    let state = text(unsafe { (verbs.port_state_str)(IBV_PORT_ACTIVE) });
    assert!(state.to_ascii_lowercase().contains("active"), "{state}");
    // SAFETY: takes any value.
    assert!(!text(unsafe { (verbs.event_type_str)(IBV_EVENT_QP_FATAL) }).is_empty());
    // SAFETY: takes any value.
    assert!(!text(unsafe { (verbs.node_type_str)(IBV_NODE_CA) }).is_empty());
    // SAFETY: takes any value.
    assert_eq!(unsafe { (verbs.rate_to_mult)(IBV_RATE_10_GBPS) }, 4);
    // SAFETY: takes any value.
    assert_eq!(unsafe { (verbs.mult_to_ibv_rate)(4) }, IBV_RATE_10_GBPS);
    // SAFETY: takes any value.
    assert_eq!(unsafe { (verbs.rate_to_mbps)(IBV_RATE_10_GBPS) }, 10_000);
    // SAFETY: takes any value.
    let rate = unsafe { (verbs.mbps_to_ibv_rate)(10_000) };
    assert_eq!(rate, IBV_RATE_10_GBPS);
    // SAFETY: takes any value.
    assert_eq!(unsafe { (verbs.rate_to_mult)(IBV_RATE_MAX) }, -1);
    // SAFETY: takes any value.
    assert_eq!(unsafe { (verbs.mult_to_ibv_rate)(1000) }, IBV_RATE_MAX);
}

#[test]
fn loading_twice_gives_the_same_table() {
    let Some(verbs) = library() else { return };
    assert!(core::ptr::eq(
        verbs,
        Verbs::load().expect("it loaded a moment ago")
    ));
    println!("{verbs:?}");
}

fn text(string: *const c_char) -> &'static str {
    assert!(!string.is_null());
    // SAFETY: not NULL, and the strings of libibverbs are static and NUL terminated.
    unsafe { CStr::from_ptr(string) }.to_str().expect("ASCII")
}
