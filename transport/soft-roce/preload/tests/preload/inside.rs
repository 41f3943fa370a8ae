//! Programs with the library preloaded that do what few programs do: fork, and open libibverbs by name.
//!
//! Each program is this test binary again: a test runs itself, and plays its part where it finds the
//! library preloaded.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;

use rdma_core_bindings::*;

use crate::support::{file_of, library, lookup, open_library, preloaded, string, succeed};

/// Runs the test `name` of this binary with the library preloaded.
fn run_inside(name: &str) {
    let this = std::env::current_exe().expect("the system tells where this program is");
    let printed = succeed(
        preloaded(this)
            .args(["--exact", name, "--nocapture"])
            .env(INSIDE, "1"),
    );
    assert!(printed.contains("1 passed"), "{printed}");
    assert!(printed.contains("part played"), "{printed}");
}

const INSIDE: &str = "FARLOG_TEST_INSIDE";

fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// A function that the program finds under a name.
macro_rules! find {
    ($name:literal as $type:ty) => {{
        let function = lookup(libc::RTLD_DEFAULT, $name);
        // SAFETY: the type is that of the man page for this name.
        unsafe { std::mem::transmute::<*mut c_void, $type>(function) }
    }};
}

type GetDeviceList = unsafe extern "C" fn(*mut c_int) -> *mut *mut ibv_device;
type OpenDevice = unsafe extern "C" fn(*mut ibv_device) -> *mut ibv_context;
type AllocPd = unsafe extern "C" fn(*mut ibv_context) -> *mut ibv_pd;
type DeallocPd = unsafe extern "C" fn(*mut ibv_pd) -> c_int;
type CloseDevice = unsafe extern "C" fn(*mut ibv_context) -> c_int;

// The objects below are live, NULL, or the parent's, of whose memory a child has a copy; the library must
// refuse those of the last two kinds.

fn open_device(device: *mut ibv_device) -> *mut ibv_context {
    let open_device = find!("ibv_open_device" as OpenDevice);
    // SAFETY: as said above.
    unsafe { open_device(device) }
}

fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    let alloc_pd = find!("ibv_alloc_pd" as AllocPd);
    // SAFETY: as said above.
    unsafe { alloc_pd(context) }
}

fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    let dealloc_pd = find!("ibv_dealloc_pd" as DeallocPd);
    // SAFETY: as said above; the tests use it no more after a success.
    unsafe { dealloc_pd(pd) }
}

fn close(context: *mut ibv_context) -> c_int {
    let close = find!("ibv_close_device" as CloseDevice);
    // SAFETY: as said above; the tests use it no more after a success.
    unsafe { close(context) }
}

/// The name of the only device, and a context of it, NULL if there is not exactly one.
fn open_only() -> (String, *mut ibv_device, *mut ibv_context) {
    let mut count = 0;
    let get_device_list = find!("ibv_get_device_list" as GetDeviceList);
    // SAFETY: a place for the count.
    let list = unsafe { get_device_list(&raw mut count) };
    if list.is_null() || count != 1 {
        return (String::new(), ptr::null_mut(), ptr::null_mut());
    }
    // SAFETY: a list of one, which is never freed.
    let device = unsafe { *list };
    // SAFETY: live as long as the list.
    let name = unsafe { &raw const (*device).name };
    (string(name.cast()), device, open_device(device))
}

#[test]
fn a_forked_child_has_devices_of_its_own_and_none_of_the_parents() {
    if !is_inside() {
        return run_inside("inside::a_forked_child_has_devices_of_its_own_and_none_of_the_parents");
    }
    let (name, device, context) = open_only();
    assert!(!context.is_null());
    let pd = alloc_pd(context);
    assert!(!pd.is_null());

    // SAFETY: the child calls the library, which promises to work there, and ends without the harness.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork");
    if child == 0 {
        // Not a panic: the test harness's other thread is not here to report it.
        let refuses = dealloc_pd(pd) == libc::EINVAL
            && alloc_pd(context).is_null()
            && open_device(device).is_null()
            && close(context) == -1;
        let (own_name, _, own_context) = open_only();
        let own_pd = alloc_pd(own_context);
        let works = own_name != name
            && !own_pd.is_null()
            && dealloc_pd(own_pd) == 0
            && close(own_context) == 0;
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(c_int::from(!refuses) + 2 * c_int::from(!works)) };
    }
    let mut status = 0;
    // SAFETY: a place for the status of the own child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(
        status, 0,
        "1: it was not refused, 2: it has no device of its own"
    );

    assert_eq!(dealloc_pd(pd), 0, "the parent's objects are as they were");
    assert_eq!(close(context), 0);
    println!("part played");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn libibverbs_opened_by_name_is_this_library() {
    if !is_inside() {
        return run_inside("inside::libibverbs_opened_by_name_is_this_library");
    }
    let versioned = |handle, name: &CStr, version: &CStr| {
        // SAFETY: a handle that is never closed, and names that end.
        unsafe { libc::dlvsym(handle, name.as_ptr(), version.as_ptr()) }
    };
    for name in [
        c"libibverbs.so.1",
        c"libibverbs.so",
        c"/usr/lib/libibverbs.so.1.14.44",
    ] {
        let handle = open_library(Some(name));
        assert!(!handle.is_null(), "{name:?}");
        let open_device = lookup(handle, "ibv_open_device");
        assert_eq!(open_device, lookup(libc::RTLD_DEFAULT, "ibv_open_device"));
        // As NCCL asks.
        let versioned = versioned(handle, c"ibv_open_device", c"IBVERBS_1.1");
        assert_eq!(versioned, open_device);
        assert_eq!(std::path::Path::new(&file_of(open_device)), library());
    }
    let malloc = versioned(libc::RTLD_DEFAULT, c"malloc", c"GLIBC_2.2.5");
    assert_eq!(malloc, lookup(libc::RTLD_DEFAULT, "malloc"));
    // Everything else is opened as ever, and reports as ever.
    assert!(!open_library(Some(c"libm.so.6")).is_null());
    assert!(!open_library(None).is_null());
    assert!(open_library(Some(c"libnone.so.9")).is_null());
    // SAFETY: needs nothing.
    let error = string(unsafe { libc::dlerror() });
    assert!(error.contains("libnone.so.9"), "{error}");
    println!("part played");
}
