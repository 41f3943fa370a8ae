//! The four ways in which verbs functions report failure, and what a panic becomes in each.
//!
//! Each function of the table resolves its objects, then runs its body in one of these. A panic
//! never crosses into C: it stops the device ([`SoftDevice::fatal`]) and is reported as `EIO`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use libc::c_int;
use rustix::io::Errno;

use crate::device::SoftDevice;

/// For functions that return 0 or the errno value.
pub(super) fn errno_value(device: &SoftDevice, body: impl FnOnce() -> Result<(), Errno>) -> c_int {
    match caught(Some(device), body) {
        Ok(()) => 0,
        Err(errno) => errno.raw_os_error(),
    }
}

/// For functions that return 0, or -1 with errno set.
pub(super) fn minus_one(device: &SoftDevice, body: impl FnOnce() -> Result<(), Errno>) -> c_int {
    match caught(Some(device), body) {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// For functions that return a pointer, or NULL with errno set. `device` is `None` where none is
/// known yet.
pub(super) fn null<T>(
    device: Option<&SoftDevice>,
    body: impl FnOnce() -> Result<*mut T, Errno>,
) -> *mut T {
    caught(device, body).unwrap_or_else(|errno| {
        set_errno(errno);
        ptr::null_mut()
    })
}

/// Runs `body`; a panic stops the device and becomes `EIO`.
pub(super) fn caught<T>(
    device: Option<&SoftDevice>,
    body: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    // Unwind safe: what the panic may have left half done lives in the device, and a device that
    // panicked only flushes and is torn down.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        if let Some(device) = device {
            device.fatal("a verbs call panicked");
        }
        Err(Errno::IO)
    })
}

/// Sets the calling thread's errno.
pub(super) fn set_errno(errno: Errno) {
    // SAFETY: the location is the calling thread's own, as long as the thread lives.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: as above; nothing else refers to it during the store.
    unsafe { *location = errno.raw_os_error() };
}
