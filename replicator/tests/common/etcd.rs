//! A real etcd server for a test, and a proxy before it that fails on demand.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A port that is free at this moment.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A server of one member with its data in a temporary directory; it ends when this is dropped.
pub(crate) struct Etcd {
    child: Child,
    host: String,
    port: u16,
    _dir: TempDir,
}

impl Etcd {
    /// `None`, with the reason printed, where etcd is not installed; `FARLOG_REQUIRE_ETCD` makes that an
    /// error.
    pub(crate) fn start() -> Option<Self> {
        Self::start_at("127.0.0.1", Command::new("etcd"))
    }

    /// As `start`, at an address that is perhaps not this machine's: `command` runs it there.
    pub(crate) fn start_at(host: &str, mut command: Command) -> Option<Self> {
        if let Err(error) = Command::new("etcd").arg("--version").output() {
            assert!(
                std::env::var_os("FARLOG_REQUIRE_ETCD").is_none(),
                "etcd cannot be started: {error}"
            );
            eprintln!("skipped: etcd cannot be started: {error} (Debian's package is etcd-server)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (port, peer_port) = (free_port(), free_port());
        let (url, peer_url) = (
            format!("http://{host}:{port}"),
            format!("http://{host}:{peer_port}"),
        );
        let child = command
            .args(["--name", "test", "--data-dir"])
            .arg(dir.path())
            .args([
                "--listen-client-urls",
                &url,
                "--advertise-client-urls",
                &url,
            ])
            .args(["--listen-peer-urls", &peer_url])
            .args(["--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("test={peer_url}")])
            .args(["--heartbeat-interval=50", "--election-timeout=500"])
            .args(["--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let etcd = Self {
            child,
            host: host.to_owned(),
            port,
            _dir: dir,
        };
        etcd.wait_until_it_serves();
        Some(etcd)
    }

    fn wait_until_it_serves(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while !self
            .get("/health")
            .is_some_and(|answer| answer.contains("true"))
        {
            assert!(Instant::now() < until, "etcd does not serve");
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}:{}", self.host, self.port)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Forgets what was before a revision.
    pub(crate) fn compact(&self, revision: i64) {
        let answer = self.post(
            "/v3/kv/compaction",
            &format!(r#"{{"revision":"{revision}"}}"#),
        );
        assert!(answer.contains("200 OK"), "{answer}");
    }

    pub(crate) fn put(&self, key: &str, value: &str) {
        let (key, value) = (base64(key), base64(value));
        let body = format!(r#"{{"key":"{key}","value":"{value}"}}"#);
        let answer = self.post("/v3/kv/put", &body);
        assert!(answer.contains("200 OK"), "{answer}");
    }

    fn get(&self, path: &str) -> Option<String> {
        self.exchange(&format!("GET {path} HTTP/1.0\r\n\r\n"))
    }

    fn post(&self, path: &str, body: &str) -> String {
        let len = body.len();
        let request = format!("POST {path} HTTP/1.0\r\nContent-Length: {len}\r\n\r\n{body}");
        self.exchange(&request).expect("etcd answers")
    }

    fn exchange(&self, request: &str) -> Option<String> {
        let mut stream = TcpStream::connect((self.host.as_str(), self.port)).ok()?;
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in text.as_bytes().chunks(3) {
        let mut group = [0; 3];
        group[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, group[0], group[1], group[2]]);
        for digit in 0..4 {
            let is_padding = digit > chunk.len();
            let index = (bits >> (18 - 6 * digit) & 63) as usize;
            out.push(if is_padding {
                '='
            } else {
                char::from(DIGITS[index])
            });
        }
    }
    out
}

const PASS: u8 = 0;
const SWALLOW_ANSWERS: u8 = 1;
const CUT: u8 = 2;

/// Forwards connections to a port of this machine, until it is told to fail.
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<ProxyShared>,
}

#[derive(Default)]
struct ProxyShared {
    mode: AtomicU8,
    connections: Mutex<HashMap<u64, [TcpStream; 2]>>,
    last: AtomicU64,
    is_over: AtomicBool,
}

impl Proxy {
    pub(crate) fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(ProxyShared::default());
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.is_over.load(Ordering::Relaxed) {
                    return;
                }
                if accepting.mode.load(Ordering::Relaxed) != CUT
                    && let Ok(server) = TcpStream::connect(("127.0.0.1", to))
                {
                    accepting.forward(stream, server);
                }
            }
        });
        Self { port, shared }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Closes all connections, and new ones at once.
    pub(crate) fn cut(&self) {
        self.shared.set(CUT);
        self.shared.close_all();
    }

    /// Forwards what the client says, and nothing that the server does.
    pub(crate) fn swallow_answers(&self) {
        self.shared.set(SWALLOW_ANSWERS);
    }

    /// Forwards again; connections with a gap are closed.
    pub(crate) fn mend(&self) {
        self.shared.close_all();
        self.shared.set(PASS);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        self.shared.close_all();
    }
}

impl ProxyShared {
    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::Relaxed);
    }

    fn close_all(&self) {
        for (_, streams) in self.connections.lock().unwrap().drain() {
            for stream in streams {
                // It may be closed already.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }

    fn forward(self: &Arc<Self>, client: TcpStream, server: TcpStream) {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let clone = |stream: &TcpStream| stream.try_clone().unwrap();
        let both = [clone(&client), clone(&server)];
        self.connections.lock().unwrap().insert(number, both);
        let (requests, answers) = (Arc::clone(self), Arc::clone(self));
        let (from, to) = (clone(&client), clone(&server));
        thread::spawn(move || requests.copy(number, from, to, false));
        thread::spawn(move || answers.copy(number, server, client, true));
    }

    fn copy(&self, number: u64, mut from: TcpStream, mut to: TcpStream, are_answers: bool) {
        let mut buffer = [0; 16 << 10];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            let is_swallowed = are_answers && self.mode.load(Ordering::Relaxed) == SWALLOW_ANSWERS;
            if !is_swallowed && to.write_all(&buffer[..len]).is_err() {
                break;
            }
        }
        for stream in [from, to] {
            // The other direction may have closed it.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.connections.lock().unwrap().remove(&number);
    }
}
