//! What a figure was measured on.

use std::fmt;
use std::fs;
use std::process::Command;
use std::thread;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

/// The machine, the commit, and how busy the machine was.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Release of the kernel.
    pub kernel: String,
    /// Name of the CPU as it gives it.
    pub cpu: String,
    /// How many CPUs this process may use.
    pub cores: usize,
    /// Runnable threads over the last minute. More than `cores` makes every elapsed time doubtful.
    pub load: f64,
    /// Commit of the checkout, `+` behind it if files differ from it.
    pub commit: String,
}

impl Machine {
    /// Looks around; what cannot be found out is `unknown` or 0.
    pub fn describe() -> Machine {
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
        let cpu = model.and_then(|line| line.split_once(": "));
        let load = read("/proc/loadavg");
        Machine {
            kernel: known(read("/proc/sys/kernel/osrelease").trim()),
            cpu: known(cpu.map_or("", |(_, name)| name)),
            cores: thread::available_parallelism().map_or(0, usize::from),
            load: load
                .split(' ')
                .next()
                .and_then(|first| first.parse().ok())
                .unwrap_or(0.0),
            commit: known(&commit()),
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine {
            kernel,
            cpu,
            cores,
            load,
            commit,
        } = self;
        write!(
            f,
            "Linux {kernel}, {cores} x {cpu}, load {load}, commit {commit}"
        )
    }
}

/// Binds the calling thread, and threads that it starts later, to the `index`th CPU that it may use.
///
/// Returns whether it did: not where there are fewer CPUs.
pub fn pin(index: usize) -> bool {
    let Ok(allowed) = sched_getaffinity(None) else {
        return false;
    };
    let cpu = (0..CpuSet::MAX_CPU)
        .filter(|&cpu| allowed.is_set(cpu))
        .nth(index);
    cpu.is_some_and(|cpu| {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one).is_ok()
    })
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        command
            .args(["-C", env!("CARGO_MANIFEST_DIR")])
            .args(arguments);
        let output = command.output().ok().filter(|o| o.status.success());
        output.map_or_else(String::new, |o| {
            String::from_utf8_lossy(&o.stdout).into_owned()
        })
    };
    let differs = !git(&["status", "--porcelain"]).is_empty();
    let hash = git(&["rev-parse", "--short", "HEAD"]);
    format!("{}{}", hash.trim(), if differs { "+" } else { "" })
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn known(text: &str) -> String {
    if text.is_empty() { "unknown" } else { text }.to_owned()
}
