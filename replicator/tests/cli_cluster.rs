//! The parts by hand, as in several terminals: `serve`, `produce`, `consume` on the software device.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const TIMEOUT: Duration = Duration::from_secs(60);

fn farlog(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farlog"));
    command
        .args(args)
        .env_remove("FARLOG_DEVICE")
        .env_remove("FARLOG_LOG")
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Two nodes in a directory of their own; node 1 leads.
struct TwoNodes {
    dir: tempfile::TempDir,
    cluster_file: String,
}

/// A running node; killed if a test ends early.
struct Node(Child);

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended in order
        let _ = self.0.wait();
    }
}

impl TwoNodes {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let held = [0, 0].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
        let addresses = held
            .each_ref()
            .map(|listener| listener.local_addr().unwrap());
        let text = format!(
            "[[nodes]]\nid = 1\naddress = '{}'\ndevice = 'soft'\n\
             [[nodes]]\nid = 2\naddress = '{}'\ndevice = 'soft'\n\
             [[topics]]\nname = 't'\npartitions = 2\nreplicas = [1, 2]\nimage_size = 1048576\n",
            addresses[0], addresses[1]
        );
        let cluster_file = dir.path().join("cluster.toml");
        fs::write(&cluster_file, text).unwrap();
        Self {
            cluster_file: cluster_file.display().to_string(),
            dir,
        }
    }

    fn serve(&self, node: u32) -> Command {
        let path = |what: &str| {
            self.dir
                .path()
                .join(format!("{what}-{node}"))
                .display()
                .to_string()
        };
        // Log memory on disk would not do; a directory of this test on tmpfs does.
        let shm = format!("/dev/shm/farlog-test-{}-{node}", self.name());
        farlog(&[
            "serve",
            "--node",
            &node.to_string(),
            "--cluster",
            &self.cluster_file,
            "--data-dir",
            &path("data"),
            "--shm-dir",
            &shm,
        ])
    }

    fn name(&self) -> &str {
        self.dir.path().file_name().unwrap().to_str().unwrap()
    }

    /// Starts a node and waits until it says that it is ready.
    fn start(&self, node: u32) -> Node {
        let stderr = fs::File::create(self.dir.path().join(format!("stderr-{node}"))).unwrap();
        let mut child = self
            .serve(node)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(
            line.starts_with(&format!("node {node} is ready on 127.0.0.1:")),
            "{line:?}: {}",
            self.stderr(node)
        );
        Node(child)
    }

    fn stderr(&self, node: u32) -> String {
        fs::read_to_string(self.dir.path().join(format!("stderr-{node}"))).unwrap_or_default()
    }

    fn produce(&self, args: &[&str], input: &str) -> Output {
        let mut child = farlog(&["produce", "--cluster", &self.cluster_file, "--topic", "t"])
            .args(args)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    }

    fn consume(&self, args: &[&str]) -> Vec<String> {
        let output = farlog(&[
            "consume",
            "--cluster",
            &self.cluster_file,
            "--topic",
            "t",
            "--device",
            "soft",
        ])
        .args(args)
        .output()
        .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).lines().map(str::to_owned).collect()
    }
}

impl Drop for TwoNodes {
    fn drop(&mut self) {
        for node in 1..=2 {
            let _ = fs::remove_dir_all(format!("/dev/shm/farlog-test-{}-{node}", self.name()));
        }
    }
}

/// Sends a signal and expects an orderly end.
fn stop(mut node: Node, signal: Signal) {
    kill_process(Pid::from_child(&node.0), signal).unwrap();
    let started = Instant::now();
    loop {
        if let Some(status) = node.0.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return;
        }
        assert!(started.elapsed() < TIMEOUT, "the node does not shut down");
        thread::sleep(Duration::from_millis(10));
    }
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

fn records_in(segments: &Path) -> u64 {
    let files = fs::read_dir(segments)
        .unwrap()
        .map(|file| file.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let counts = logs.map(|log| {
        let output = farlog(&["dump", "--json", log.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let summary: serde_json::Value =
            serde_json::from_str(text(&output.stdout).lines().last().unwrap()).unwrap();
        summary["records"].as_u64().unwrap()
    });
    counts.sum()
}

#[test]
fn records_go_through_two_nodes_and_survive_a_restart() {
    let nodes = TwoNodes::new();
    let (first, second) = (nodes.start(1), nodes.start(2));
    let input: Vec<_> = (0..1000).map(|i| format!("k{},{i}", i % 10)).collect();
    let output = nodes.produce(&["--key-column", "1"], &(input.join("\n") + "\n"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(
        text(&output.stderr).contains("appended 1,000 records"),
        "{}",
        text(&output.stderr)
    );

    let all = nodes.consume(&["--offset", "earliest", "--max-records", "1000"]);
    assert_eq!(sorted(all), sorted(input.clone()));
    let replica = nodes.consume(&[
        "--offset",
        "earliest",
        "--max-records",
        "1000",
        "--from-replica",
        "2",
    ]);
    assert_eq!(sorted(replica), sorted(input.clone()));
    let ten = nodes.consume(&[
        "--offset",
        "5",
        "--max-records",
        "10",
        "--partition",
        "0",
        "--keys",
    ]);
    assert!(
        ten.len() == 10
            && ten
                .iter()
                .all(|line| line.starts_with('k') && line.contains('\t')),
        "{ten:?}"
    );

    let output = farlog(&["consume", "--cluster", &nodes.cluster_file, "--topic", "t"])
        .args(["--device", "soft", "--offset", "5000"])
        .output()
        .unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("offset 5000 of partition 0") && stderr.contains("help: start at"),
        "{stderr}"
    );

    stop(second, Signal::TERM);
    stop(first, Signal::INT);
    let per_node = |node: u32| -> u64 {
        (0..2)
            .map(|partition| {
                records_in(&nodes.dir.path().join(format!("data-{node}/t-{partition}")))
            })
            .sum()
    };
    assert_eq!(
        (per_node(1), per_node(2)),
        (1000, 1000),
        "what was committed is in the files after an orderly end"
    );

    let (first, second) = (nodes.start(1), nodes.start(2));
    let output = nodes.produce(&[], "one more\n");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let all = nodes.consume(&["--offset", "earliest", "--max-records", "1001"]);
    let mut expected = input;
    expected.push("one more".to_owned());
    assert_eq!(sorted(all), sorted(expected));
    stop(first, Signal::TERM);
    stop(second, Signal::TERM);
}

#[test]
fn what_is_typed_arrives_before_the_input_ends() {
    let nodes = TwoNodes::new();
    let _running = (nodes.start(1), nodes.start(2));
    let mut producer = farlog(&["produce", "--cluster", &nodes.cluster_file, "--topic", "t"])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = producer.stdin.take().unwrap();
    writeln!(stdin, "typed").unwrap();
    assert_eq!(
        nodes.consume(&["--offset", "earliest", "--max-records", "1"]),
        ["typed"]
    );
    drop(stdin);
    assert!(producer.wait().unwrap().success());
}

/// What was read before the record that is refused is not lost.
#[test]
fn a_record_too_large_spares_the_records_before_it() {
    let nodes = TwoNodes::new();
    let _running = (nodes.start(1), nodes.start(2));
    let output = nodes.produce(&[], &format!("one\ntwo\n{}\n", "x".repeat(600_000)));
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for part in [
        "600000 bytes",
        "524288 bytes",
        "help: raise",
        "help: the 2 records before it are appended",
    ] {
        assert!(stderr.contains(part), "{part:?} is missing in: {stderr}");
    }
    assert_eq!(
        sorted(nodes.consume(&["--offset", "earliest", "--max-records", "2"])),
        ["one", "two"]
    );
}

#[test]
fn a_node_that_runs_already_is_named() {
    let nodes = TwoNodes::new();
    let _running = nodes.start(1);
    let output = nodes.serve(1).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.starts_with("farlog: ")
            && stderr.contains("another process")
            && stderr.contains("stop that"),
        "{stderr}"
    );
}
