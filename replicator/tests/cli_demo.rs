//! `farlog demo` end to end on the software device: what goes in comes out, and the death of any
//! process ends it with a report and leaves no process behind.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A report has to come well within this time after a death; the machine may be busy.
const REPORT_TIMEOUT: Duration = Duration::from_secs(8);
const START_TIMEOUT: Duration = Duration::from_secs(60);

fn demo(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farlog"));
    command.args(["demo", "--device", "soft"]).args(args);
    command
        .env_remove("FARLOG_DEVICE")
        .env_remove("FARLOG_LOG")
        .stdin(Stdio::null());
    command
}

fn stderr_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run_json(args: &[&str], input: &str, data_dir: &Path) -> serde_json::Value {
    let input_file = data_dir.with_extension("input");
    fs::write(&input_file, input).unwrap();
    let output = demo(args)
        .args([
            "--json",
            "--input",
            input_file.to_str().unwrap(),
            "--data-dir",
            data_dir.to_str().unwrap(),
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr_of(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_consumer_gets_exactly_the_input() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    let input: String = (0..5000)
        .map(|i| format!("key-{},line {i},\"quoted, text\"\n", i % 97))
        .collect();
    let report = run_json(
        &["--key-column", "1", "--partitions", "2", "--followers", "1"],
        &input,
        &data_dir,
    );
    assert_eq!(report["records"], 5000);
    assert_eq!(report["bytes"], input.len() - 5000);
    assert_eq!(report["keys"], 97);
    let fetches = report["fetches"].as_array().unwrap();
    assert_eq!(
        fetches.len(),
        2,
        "leader and follower are read again: {report}"
    );
    assert!(fetches.iter().all(|fetch| fetch["records"] == 5000));
    let latency = &report["commit_latency_us"];
    assert!(
        latency["p50"].as_f64().unwrap() > 0.0
            && latency["p50"].as_f64() <= latency["p999"].as_f64()
    );
    assert!(
        report["devices"]
            .as_array()
            .unwrap()
            .iter()
            .all(|device| { device["device"].as_str().unwrap().starts_with("soft@127.") })
    );
    // What the report calls a segment is one: the log of both partitions holds all records.
    let records: u64 = report["segments"]
        .as_array()
        .unwrap()
        .iter()
        .map(|segment| dump_count(segment.as_str().unwrap()))
        .sum();
    assert_eq!(records, 5000);
}

/// Counts the records that `farlog dump` finds in a segment file.
fn dump_count(segment: &str) -> u64 {
    let output = Command::new(env!("CARGO_BIN_EXE_farlog"))
        .args(["dump", "--json", segment])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr_of(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let summary: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    summary["records"].as_u64().unwrap()
}

#[test]
fn records_without_keys_and_odd_lines_survive() {
    let dir = tempfile::tempdir().unwrap();
    let input = "first\n\n\tthird \r\n\u{0}\u{7f}ünïcödé\nlast without line feed";
    let report = run_json(
        &["--partitions", "3", "--acks", "leader"],
        input,
        &dir.path().join("data"),
    );
    assert_eq!(report["records"], 5);
    assert_eq!(report["keys"], serde_json::Value::Null);
}

#[test]
fn a_header_is_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["--header", "--key-column", "2", "--followers", "0"];
    let report = run_json(&args, "name,number\na,1\nb,2\n", &dir.path().join("data"));
    assert_eq!(
        (&report["records"], &report["keys"]),
        (&2.into(), &2.into())
    );
}

#[test]
fn an_empty_input_is_an_error_and_leaves_no_process() {
    let dir = tempfile::tempdir().unwrap();
    let output = demo(&["--input", "-", "--followers", "0"])
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .output()
        .unwrap();
    let stderr = stderr_of(&output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("standard input: it has no record") && stderr.contains("help:"),
        "{stderr}"
    );
    assert_eq!(processes_with(dir.path()), Vec::<Pid>::new());
}

/// A demo that waits for more input, with all its processes up and records under way.
fn running_demo(dir: &Path) -> Child {
    let stderr = fs::File::create(dir.join("stderr")).unwrap();
    let mut child = demo(&["--input", "-"])
        .arg("--data-dir")
        .arg(dir.join("data"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    writeln!(child.stdin.as_mut().unwrap(), "a first record").unwrap();
    let started = Instant::now();
    while !said(dir).contains("nodes are up") {
        assert!(started.elapsed() < START_TIMEOUT, "{}", said(dir));
        assert!(child.try_wait().unwrap().is_none(), "{}", said(dir));
        thread::sleep(Duration::from_millis(20));
    }
    child
}

fn said(dir: &Path) -> String {
    fs::read_to_string(dir.join("stderr")).unwrap_or_default()
}

/// Pids of the demo's children, which all are told the demo's own directory.
fn processes_with(dir: &Path) -> Vec<Pid> {
    let dir = dir.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|process| {
        let pid: i32 = process.file_name().to_str()?.parse().ok()?;
        let cmdline = fs::read_to_string(process.path().join("cmdline")).ok()?;
        let is_child = cmdline.contains(dir) && cmdline.split('\0').nth(1) != Some("demo");
        is_child.then(|| Pid::from_raw(pid))?
    });
    pids.collect()
}

fn child_with(dir: &Path, argument: &str) -> Pid {
    let pids = processes_with(dir).into_iter();
    let mut found = pids.filter(|pid| {
        let cmdline = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        cmdline.contains(argument)
    });
    found
        .next()
        .unwrap_or_else(|| panic!("no process has {argument:?}: {}", said(dir)))
}

fn wait(child: &mut Child, timeout: Duration) -> Option<i32> {
    let started = Instant::now();
    while started.elapsed() < timeout {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    panic!("the demo still runs after {timeout:?}");
}

fn expect_report_of_death(argument: &str, name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut child = running_demo(dir.path());
    let pid = child_with(dir.path(), argument);
    kill_process(pid, Signal::KILL).unwrap();
    let status = wait(&mut child, REPORT_TIMEOUT);
    let stderr = said(dir.path());
    assert_eq!(status, Some(4), "{stderr}");
    let expected = format!("farlog: {name} (pid {pid}): it was killed by signal 9 (SIGKILL)");
    assert!(
        stderr.contains(&expected),
        "{expected:?} is missing in: {stderr}"
    );
    assert!(stderr.contains("help: "), "{stderr}");
    assert_eq!(
        processes_with(dir.path()),
        Vec::<Pid>::new(),
        "processes are left"
    );
}

#[test]
fn a_killed_consumer_is_reported() {
    expect_report_of_death("demo-consumer", "the consumer");
}

#[test]
fn a_killed_follower_is_reported() {
    expect_report_of_death("--node\u{0}2", "the follower, node 2");
}

#[test]
fn a_killed_leader_is_reported() {
    expect_report_of_death("--node\u{0}1", "the leader, node 1");
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = running_demo(dir.path());
    let log_memory = format!("/dev/shm/farlog-demo-{}", child.id());
    assert!(Path::new(&log_memory).exists());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(wait(&mut child, REPORT_TIMEOUT), Some(1));
    let stderr = said(dir.path());
    assert!(stderr.contains("it was interrupted by SIGINT"), "{stderr}");
    assert_eq!(processes_with(dir.path()), Vec::<Pid>::new());
    assert!(!Path::new(&log_memory).exists(), "log memory is left");
}

#[test]
fn no_process_outlives_a_killed_demo() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = running_demo(dir.path());
    assert_eq!(processes_with(dir.path()).len(), 4);
    child.kill().unwrap();
    child.wait().unwrap();
    let started = Instant::now();
    while !processes_with(dir.path()).is_empty() {
        assert!(
            started.elapsed() < REPORT_TIMEOUT,
            "processes outlive the demo"
        );
        thread::sleep(Duration::from_millis(20));
    }
    // The killed demo could not remove its log memory.
    let _ = fs::remove_dir_all(format!("/dev/shm/farlog-demo-{}", child.id()));
}
