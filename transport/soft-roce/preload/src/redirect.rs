//! Programs that open libibverbs themselves, as NCCL and farlog do, get this library.
//!
//! A handle from `dlopen` searches the library it names and not what was preloaded, so such a program
//! would find the real devices, and half of them: libibverbs calls its own functions by name, and those
//! names lead here. Hence `dlopen` of libibverbs opens this library instead, and `dlvsym` in it looks
//! for the name alone, since there are no versions here.
//!
//! Calls go on to the C library by a jump, not by a call: it looks at the return address to learn who
//! asks, and searches the run path of that object.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Begins the file name of the library that this one stands for.
const LIBRARY: &[u8] = b"libibverbs.so";

/// The C library's `dlopen`; written before it is jumped to.
static NEXT_DLOPEN: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// `dlopen` with the name that [`target`] gives.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlopen(_name: *const c_char, _flags: libc::c_int) -> *mut c_void {
    std::arch::naked_asm!(
        // The name is in rdi and the flags in rsi. One word on the stack aligns it for the call.
        "push rsi",
        "call {target}",
        "pop rsi",
        "mov rdi, rax",
        "jmp qword ptr [rip + {next}]",
        target = sym target,
        next = sym NEXT_DLOPEN,
    )
}

/// `dlvsym`, or `dlsym` where [`lookup_in`] says so.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlvsym(
    _handle: *mut c_void,
    _symbol: *const c_char,
    _version: *const c_char,
) -> *mut c_void {
    std::arch::naked_asm!(
        // Handle, name and version are in rdi, rsi and rdx. Three words align the stack.
        "push rdi",
        "push rsi",
        "push rdx",
        "call {lookup_in}",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        lookup_in = sym lookup_in,
    )
}

/// The name to open for `name`.
extern "C" fn target(name: *const c_char) -> *const c_char {
    // Relaxed: the address is all there is to it, and every thread finds the same.
    NEXT_DLOPEN.store(next(c"dlopen"), Ordering::Relaxed);
    if name.is_null() {
        return name;
    }
    // SAFETY: not NULL, so the caller passes a C string.
    let asked = unsafe { CStr::from_ptr(name) }.to_bytes();
    let file = asked.rsplit(|byte| *byte == b'/').next();
    let is_library = file.is_some_and(|file| file.starts_with(LIBRARY));
    match own_path() {
        Some(path) if is_library => path.as_ptr(),
        _ => name,
    }
}

/// The function that finds a versioned symbol in `handle`.
extern "C" fn lookup_in(handle: *mut c_void) -> *mut c_void {
    let is_ours = own_path().is_some_and(|path| {
        // SAFETY: a C string. Already loaded, so this yields the handle that every `dlopen` got.
        let own = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        own == handle
    });
    next(if is_ours { c"dlsym" } else { c"dlvsym" })
}

/// The C library's function of this name.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: a C string; the search is for the next object that has the function.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    assert!(!next.is_null(), "the C library has a {name:?}");
    next
}

/// Where this library was loaded from.
fn own_path() -> Option<&'static CString> {
    static PATH: OnceLock<Option<CString>> = OnceLock::new();
    PATH.get_or_init(|| {
        let here: extern "C" fn(*const c_char) -> *const c_char = target;
        let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
        // SAFETY: any address may be asked about, and the result has room.
        let found = unsafe { libc::dladdr(here as *const c_void, info.as_mut_ptr()) };
        // SAFETY: pointers, for which zero is NULL.
        let info = unsafe { info.assume_init() };
        if found == 0 || info.dli_fname.is_null() {
            return None;
        }
        // SAFETY: the loader's name of a loaded object, which this one stays.
        Some(unsafe { CStr::from_ptr(info.dli_fname) }.to_owned())
    })
    .as_ref()
}
