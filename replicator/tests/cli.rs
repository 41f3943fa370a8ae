//! The `farlog` command as a person meets it when something is wrong: every error names the thing and
//! the remedy, on standard error, with an exit status that scripts can use.

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use replicator::cluster::Cluster;
use replicator::control::{ErrorCode, ErrorReply, Hello, Listener, Message};

fn farlog(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farlog"));
    command
        .args(args)
        .env_remove("FARLOG_DEVICE")
        .env_remove("FARLOG_LOG")
        .stdin(Stdio::null());
    command
}

/// Expects failure with `status` and all of `parts` on standard error; nothing may be on standard output.
fn expect_error(args: &[&str], status: i32, parts: &[&str]) {
    let output = farlog(args).output().unwrap();
    check_error(args, &output, status, parts);
}

fn check_error(args: &[&str], output: &Output, status: i32, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
    for part in parts {
        assert!(
            stderr.contains(part),
            "{args:?}: {part:?} is missing in:\n{stderr}"
        );
    }
    assert!(
        output.stdout.is_empty(),
        "{args:?} printed to standard output"
    );
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// A cluster file of one node at `address` with one topic `t` of small images.
fn cluster_file(dir: &Path, address: &str) -> String {
    let text = format!(
        "[[nodes]]\nid = 1\naddress = '{address}'\ndevice = 'soft'\n\
         [[topics]]\nname = 't'\npartitions = 2\nreplicas = [1]\nimage_size = 65536\n"
    );
    write(dir, "cluster.toml", &text)
}

#[test]
fn help_teaches_by_example() {
    for command in [
        &[][..],
        &["demo"],
        &["serve"],
        &["produce"],
        &["consume"],
        &["devices"],
    ] {
        let output = farlog(command).arg("--help").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(
            text.contains("farlog ") && text.contains("--"),
            "{command:?}: {text}"
        );
        assert!(
            text.contains("Example") || text.contains("A cluster file"),
            "{command:?}: {text}"
        );
        assert!(
            !text.contains("demo-consumer"),
            "an internal command is shown"
        );
    }
}

#[test]
fn an_unknown_key_in_the_cluster_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(
        dir.path(),
        "c.toml",
        "[[nodes]]\nid = 1\nadress = '127.0.0.1:1'\n",
    );
    for command in [
        &["produce", "--topic", "t", "--cluster", &file][..],
        &["consume", "--topic", "t", "--cluster", &file],
        &[
            "serve",
            "--node",
            "1",
            "--data-dir",
            "/nonexistent",
            "--cluster",
            &file,
        ],
    ] {
        expect_error(
            command,
            1,
            &[
                &file,
                "line 3",
                "`adress`",
                "`address`",
                "help: correct the file",
            ],
        );
    }
}

#[test]
fn what_does_not_exist_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = cluster_file(dir.path(), "127.0.0.1:1");
    let missing = dir.path().join("missing.toml").display().to_string();
    let input = dir.path().join("missing.csv").display().to_string();
    let directory = dir.path().display().to_string();
    expect_error(
        &["produce", "--topic", "t", "--cluster", &missing],
        1,
        &[&missing, "No such file", "help: --cluster"],
    );
    expect_error(
        &["produce", "--topic", "x", "--cluster", &file],
        1,
        &["topic `x`", "help: its topics are: t"],
    );
    expect_error(
        &["produce", "--topic", "t", "--cluster", &file, &input],
        1,
        &[&input, "No such file", "help:"],
    );
    expect_error(
        &["produce", "--topic", "t", "--cluster", &file, &directory],
        1,
        &["it is a directory"],
    );
    expect_error(
        &["demo", "--input", &input],
        1,
        &[&input, "No such file", "help:"],
    );
    let args = [
        "consume",
        "--topic",
        "t",
        "--cluster",
        &file,
        "--partition",
        "2",
    ];
    expect_error(
        &args,
        1,
        &["partition 2", "help: the topic has partitions 0 to 1"],
    );
    let args = [
        "serve",
        "--node",
        "7",
        "--cluster",
        &file,
        "--data-dir",
        &directory,
    ];
    expect_error(&args, 1, &["node 7", "help: its nodes are: 1"]);
}

#[test]
fn wrong_usage_has_its_own_status() {
    expect_error(
        &[
            "consume",
            "--topic",
            "t",
            "--cluster",
            "c",
            "--offset",
            "soon",
        ],
        2,
        &["earliest, latest, or an offset"],
    );
    expect_error(
        &[
            "produce",
            "--topic",
            "t",
            "--cluster",
            "c",
            "--key-column",
            "0",
        ],
        2,
        &["counted from 1"],
    );
    expect_error(&["demo", "--partitions", "0"], 2, &["--partitions"]);
    expect_error(
        &["demo", "--device", "soft@here"],
        2,
        &["soft@here", "--device"],
    );
    expect_error(
        &["demo", "--device", "soft@127.0.0.9"],
        1,
        &["soft@127.0.0.9", "help: use --device soft"],
    );
    expect_error(&["frobnicate"], 2, &["frobnicate"]);
}

#[test]
fn a_node_that_does_not_run_is_named() {
    let dir = tempfile::tempdir().unwrap();
    // A port that was free a moment ago: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let file = cluster_file(dir.path(), &address);
    let args = ["produce", "--topic", "t", "--cluster", &file];
    expect_error(
        &args,
        1,
        &[
            "node 1",
            &address,
            "refused",
            "help: start the node first (farlog serve",
        ],
    );
}

#[test]
fn a_port_in_use_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap().to_string();
    let file = cluster_file(dir.path(), &address);
    let data_dir = dir.path().join("data").display().to_string();
    let shm_dir = format!("/dev/shm/farlog-test-port-{}", std::process::id());
    let args = [
        "serve",
        "--node",
        "1",
        "--cluster",
        &file,
        "--data-dir",
        &data_dir,
        "--shm-dir",
        &shm_dir,
    ];
    expect_error(
        &args,
        1,
        &[
            &address,
            "another process holds this port",
            "help: stop that process",
        ],
    );
    let _ = std::fs::remove_dir_all(shm_dir); // where the node made it before it found the port taken
}

#[test]
fn a_device_that_does_not_exist_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = cluster_file(dir.path(), "127.0.0.1:1");
    let data_dir = dir.path().join("data").display().to_string();
    let shm_dir = format!("/dev/shm/farlog-test-device-{}", std::process::id());
    let args = [
        "serve",
        "--node",
        "1",
        "--cluster",
        &file,
        "--data-dir",
        &data_dir,
        "--shm-dir",
        &shm_dir,
        "--device",
        "nope0",
    ];
    // Where there is no libibverbs, or no RDMA in the kernel, that is the cause.
    expect_error(
        &args,
        1,
        &[
            "farlog: cannot serve: ",
            "help: `farlog devices`",
            "--device soft",
        ],
    );
    let _ = std::fs::remove_dir_all(shm_dir);
}

#[test]
fn a_service_that_is_no_node_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = cluster_file(dir.path(), &listener.local_addr().unwrap().to_string());
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"220 mail.example ESMTP\r\n").unwrap();
        thread::sleep(Duration::from_millis(200)); // lets the client read it before the end
    });
    let args = ["produce", "--topic", "t", "--cluster", &file];
    expect_error(
        &args,
        1,
        &[
            "node 1",
            "malformed",
            "help: see that the address in the cluster file",
        ],
    );
    server.join().unwrap();
}

/// The refusal happens before anything is sent, so that a greeting is all a leader has to do here.
#[test]
fn a_record_too_large_names_both_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let file = cluster_file(dir.path(), &listener.local_addr().to_string());
    let hello = Hello::node(1, [0; 16], 0, Cluster::load(&file).unwrap().hash());
    let leader = thread::spawn(move || {
        let incoming = listener
            .accept_timeout(Duration::from_secs(10))
            .unwrap()
            .unwrap();
        let mut connection = incoming.handshake(&hello).unwrap();
        matches!(
            connection.receive_timeout(Duration::from_secs(10)),
            Ok(Some(Message::Append(_)))
        )
    });
    let input = write(dir.path(), "large.txt", &"x".repeat(50_000));
    let args = ["produce", "--topic", "t", "--cluster", &file, &input];
    expect_error(
        &args,
        1,
        &[
            "50000 bytes",
            "32768 bytes",
            "help: raise the topic's image_size",
        ],
    );
    assert!(!leader.join().unwrap(), "part of the record was sent");
}

/// A refused record was once among those said to be appended.
#[test]
fn a_refused_batch_is_not_said_to_be_appended() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let file = cluster_file(dir.path(), &listener.local_addr().to_string());
    let hello = Hello::node(1, [0; 16], 0, Cluster::load(&file).unwrap().hash());
    let leader = thread::spawn(move || {
        let patience = Duration::from_secs(10);
        let incoming = listener.accept_timeout(patience).unwrap().unwrap();
        let mut connection = incoming.handshake(&hello).unwrap();
        let Ok(Some(Message::Append(append))) = connection.receive_timeout(patience) else {
            panic!("no append");
        };
        let refusal = ErrorReply {
            code: ErrorCode::OUT_OF_RESOURCES,
            correlation: append.correlation,
            message: "no room; make some".to_owned(),
        };
        connection.send(&refusal.into()).unwrap();
        // The connection stays until the producer has ended.
        let _ = connection.receive_timeout(patience);
    });
    let input = write(dir.path(), "line.txt", "one\n");
    let args = ["produce", "--topic", "t", "--cluster", &file, &input];
    let output = farlog(&args).output().unwrap();
    check_error(
        &args,
        &output,
        1,
        &["cannot append: node 1", "no room; make some"],
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains("are appended"), "{stderr}");
    leader.join().unwrap();
}

#[test]
fn a_line_without_the_key_column_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let file = cluster_file(dir.path(), &listener.local_addr().to_string());
    let leader = thread::spawn(move || {
        let incoming = listener
            .accept_timeout(Duration::from_secs(10))
            .unwrap()
            .unwrap();
        drop(incoming.handshake(&Hello::node(1, [0; 16], 0, 0)).unwrap());
    });
    let input = write(dir.path(), "short.csv", "a,b,c\nd\n");
    let args = [
        "produce",
        "--topic",
        "t",
        "--cluster",
        &file,
        "--key-column",
        "3",
        &input,
    ];
    expect_error(
        &args,
        1,
        &["line 2", "no column 3", "help: --key-column counts"],
    );
    leader.join().unwrap();
}

#[test]
fn a_data_directory_in_use_is_refused_by_the_demo() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "something", "");
    let path = dir.path().display().to_string();
    expect_error(
        &["demo", "--data-dir", &path],
        1,
        &["is not empty", "help: the demo compares a whole log"],
    );
}
