//! Compiles and runs C programs against the rdma-core headers of this machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// With this set to 1 a test that cannot run its probe fails instead of skipping.
const REQUIRE: &str = "FARLOG_REQUIRE_C_PROBE";

/// Says why a test skips, or fails where skipping is not allowed.
pub(crate) fn skip(reason: &str) {
    assert!(
        std::env::var_os(REQUIRE).is_none_or(|value| value != "1"),
        "{REQUIRE}=1, but {reason}"
    );
    println!("skipped: {reason}");
}

/// Compiles `source` and returns what it prints, or skips where C or the headers are missing.
///
/// The program is not linked with libibverbs.
pub(crate) fn run_c(name: &str, source: &str) -> Option<String> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    if let Err(reason) = find_headers(directory) {
        skip(&reason);
        return None;
    }
    let program = directory.join(name);
    let source = write(directory, name, source);
    let output = compile(&source, &["-o", program.to_str().expect("UTF-8 path")])
        .expect("the compiler ran a moment ago");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let output = Command::new(program)
        .output()
        .expect("a program just compiled");
    assert!(
        output.status.success(),
        "{name} ended with {}",
        output.status
    );
    Some(String::from_utf8(output.stdout).expect("the probes print ASCII"))
}

fn find_headers(directory: &Path) -> Result<(), String> {
    // Not one file for all: tests run at the same time.
    let name = format!("headers-{:?}", std::thread::current().id());
    let source = write(directory, &name, "#include <infiniband/verbs.h>\n");
    let output = compile(&source, &["-fsyntax-only"])
        .map_err(|error| format!("there is no C compiler: {error}; install gcc or set CC"))?;
    if output.status.success() {
        return Ok(());
    }
    let cause = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "the verbs headers are missing; install libibverbs-dev: {cause}"
    ))
}

fn write(directory: &Path, name: &str, source: &str) -> PathBuf {
    let path = directory.join(format!("{name}-{}.c", std::process::id()));
    std::fs::write(&path, source).expect("cargo's temporary folder is writable");
    path
}

fn compile(source: &Path, arguments: &[&str]) -> std::io::Result<Output> {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(compiler).arg(source).args(arguments).output();
    std::fs::remove_file(source).expect("written above");
    output
}
