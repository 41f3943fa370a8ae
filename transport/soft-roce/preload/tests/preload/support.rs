//! The library's file, programs that have it preloaded, and what the loader knows.

use std::ffi::{CStr, CString, c_void};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::ptr;
use std::time::{Duration, Instant};

/// Where cargo put the library: beside the tests.
pub(crate) fn library() -> PathBuf {
    let test = std::env::current_exe().expect("the system tells where this program is");
    let found = test
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join("libsoft_roce_preload.so"))
        .find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("no library near {}", test.display()))
}

/// A program with the library preloaded and a device on a free address.
pub(crate) fn preloaded(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .env("LD_PRELOAD", library())
        .env_remove("FARLOG_DEVICE")
        .stdin(Stdio::null());
    command
}

/// Runs a command and returns what it printed. Panics, with that, if it fails.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = finish(command);
    let text = text(&output);
    assert!(output.status.success(), "{command:?}: {text}");
    text
}

/// Runs a command to its end; one that hangs is killed.
pub(crate) fn finish(command: &mut Command) -> Output {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let start = Instant::now();
    while child.try_wait().expect("the child is ours").is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().expect("the child is ours");
            // Its output is not read: a child of its own may hold the pipes open.
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("its pipes are ours")
}

pub(crate) fn text(output: &Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout);
    stdout.into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Says why a test is not run; where `FARLOG_REQUIRE_VERBS_PROGRAMS` is set (CI), that is a failure.
pub(crate) fn skip(reason: &str) {
    assert!(
        std::env::var_os("FARLOG_REQUIRE_VERBS_PROGRAMS").is_none(),
        "{reason}"
    );
    println!("skipped: {reason}");
}

/// Opens a library, or with `None` the program itself; NULL if it is not to be had. It is never closed.
pub(crate) fn open_library(name: Option<&CStr>) -> *mut c_void {
    let name = name.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: a name that ends, or none; what these libraries run when loaded is meant for any program.
    unsafe { libc::dlopen(name, libc::RTLD_NOW) }
}

/// The address of a symbol, which `handle`, of an open library or `RTLD_DEFAULT`, must have.
pub(crate) fn lookup(handle: *mut c_void, name: &str) -> *mut c_void {
    let name = CString::new(name).expect("a name");
    // SAFETY: a handle that is never closed, and a name that ends.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?} is not defined");
    found
}

/// The file that a symbol is from.
pub(crate) fn file_of(symbol: *mut c_void) -> String {
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    // SAFETY: any address may be asked about; a place for the answer.
    assert_ne!(unsafe { libc::dladdr(symbol, &raw mut info) }, 0);
    string(info.dli_fname)
}

/// A copy of a string that ends.
pub(crate) fn string(text: *const std::ffi::c_char) -> String {
    assert!(!text.is_null());
    // SAFETY: the loader and the library give out strings that end, and keep them.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().expect("ASCII").to_owned()
}
