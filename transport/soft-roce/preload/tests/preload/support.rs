//! The library's file, and programs that have it preloaded.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
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
