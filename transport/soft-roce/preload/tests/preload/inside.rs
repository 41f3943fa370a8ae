//! Programs with the library preloaded that do what few programs do: fork, and open libibverbs by name.
//!
//! Each program is this test binary again: a test runs itself, and plays its part where it finds the
//! library preloaded.

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr;

use rdma_core_bindings::*;

use crate::support::{library, preloaded, succeed};

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
    ($name:literal as $type:ty) => {
        std::mem::transmute::<*mut c_void, $type>(lookup(libc::RTLD_DEFAULT, $name))
    };
}

fn lookup(handle: *mut c_void, name: &str) -> *mut c_void {
    let name = CString::new(name).expect("a name");
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?} is not defined");
    found
}

type GetDeviceList = unsafe extern "C" fn(*mut c_int) -> *mut *mut ibv_device;
type OpenDevice = unsafe extern "C" fn(*mut ibv_device) -> *mut ibv_context;
type AllocPd = unsafe extern "C" fn(*mut ibv_context) -> *mut ibv_pd;
type DeallocPd = unsafe extern "C" fn(*mut ibv_pd) -> c_int;
type CloseDevice = unsafe extern "C" fn(*mut ibv_context) -> c_int;

/// The name of the only device, and a context of it, NULL if there is not exactly one.
unsafe fn open_only() -> (String, *mut ibv_device, *mut ibv_context) {
    unsafe {
        let mut count = 0;
        let list = find!("ibv_get_device_list" as GetDeviceList)(&raw mut count);
        if list.is_null() || count != 1 {
            return (String::new(), ptr::null_mut(), ptr::null_mut());
        }
        let device = *list;
        let name = CStr::from_ptr((&raw const (*device).name).cast())
            .to_str()
            .expect("ASCII");
        let context = find!("ibv_open_device" as OpenDevice)(device);
        (name.to_owned(), device, context)
    }
}

#[test]
fn a_forked_child_has_devices_of_its_own_and_none_of_the_parents() {
    if !is_inside() {
        return run_inside("inside::a_forked_child_has_devices_of_its_own_and_none_of_the_parents");
    }
    unsafe {
        let alloc_pd = find!("ibv_alloc_pd" as AllocPd);
        let dealloc_pd = find!("ibv_dealloc_pd" as DeallocPd);
        let close = find!("ibv_close_device" as CloseDevice);
        let (name, device, context) = open_only();
        assert!(!context.is_null());
        let pd = alloc_pd(context);
        assert!(!pd.is_null());

        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            // Not a panic: the test harness's other thread is not here to report it.
            let refuses = dealloc_pd(pd) == libc::EINVAL
                && alloc_pd(context).is_null()
                && find!("ibv_open_device" as OpenDevice)(device).is_null()
                && close(context) == -1;
            let (own_name, _, own_context) = open_only();
            let own_pd = alloc_pd(own_context);
            let works = own_name != name
                && !own_pd.is_null()
                && dealloc_pd(own_pd) == 0
                && close(own_context) == 0;
            libc::_exit(c_int::from(!refuses) + 2 * c_int::from(!works));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        assert_eq!(
            status, 0,
            "1: it was not refused, 2: it has no device of its own"
        );

        assert_eq!(dealloc_pd(pd), 0, "the parent's objects are as they were");
        assert_eq!(close(context), 0);
    }
    println!("part played");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn libibverbs_opened_by_name_is_this_library() {
    if !is_inside() {
        return run_inside("inside::libibverbs_opened_by_name_is_this_library");
    }
    unsafe {
        for name in [
            c"libibverbs.so.1",
            c"libibverbs.so",
            c"/usr/lib/libibverbs.so.1.14.44",
        ] {
            let handle = libc::dlopen(name.as_ptr(), libc::RTLD_NOW);
            assert!(!handle.is_null(), "{name:?}");
            let open_device = lookup(handle, "ibv_open_device");
            assert_eq!(open_device, lookup(libc::RTLD_DEFAULT, "ibv_open_device"));
            // As NCCL asks.
            let version = c"IBVERBS_1.1".as_ptr();
            let versioned = libc::dlvsym(handle, c"ibv_open_device".as_ptr(), version);
            assert_eq!(versioned, open_device);
            let mut info: libc::Dl_info = std::mem::zeroed();
            assert_ne!(libc::dladdr(open_device, &raw mut info), 0);
            let file = CStr::from_ptr(info.dli_fname).to_str().expect("ASCII");
            assert_eq!(std::path::Path::new(file), library());
        }
        let versioned = libc::dlvsym(
            libc::RTLD_DEFAULT,
            c"malloc".as_ptr(),
            c"GLIBC_2.2.5".as_ptr(),
        );
        assert_eq!(versioned, lookup(libc::RTLD_DEFAULT, "malloc"));
        // Everything else is opened as ever, and reports as ever.
        assert!(!libc::dlopen(c"libm.so.6".as_ptr(), libc::RTLD_NOW).is_null());
        assert!(!libc::dlopen(ptr::null(), libc::RTLD_NOW).is_null());
        assert!(libc::dlopen(c"libnone.so.9".as_ptr(), libc::RTLD_NOW).is_null());
        let error = CStr::from_ptr(libc::dlerror()).to_str().expect("ASCII");
        assert!(error.contains("libnone.so.9"), "{error}");
    }
    println!("part played");
}
