//! The network between the nodes: one namespace for each, and cuts between them.
//!
//! ```text
//!   this namespace: clients     10.X.Y.200 ...
//!        bridge  --- veth --- [ namespace of node 1: 10.X.Y.1 ]
//!          |-------- veth --- [ ...                           ]
//!          '-------- veth --- [ etcd: 10.X.Y.100              ]
//! ```
//!
//! What is cut is lost without a sign, like packets in a real network: the bridge drops it.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use transport::DeviceSelector;

use crate::plan::Cut;

/// What all names begin with; the test's process id follows.
const NAME: &str = "flc";
/// Last bytes of addresses.
const CLIENTS: u8 = 200;
const ETCD: u8 = 100;

/// Where nodes and clients are.
pub(crate) enum Network {
    /// All on the loopback interface of this namespace, on software devices.
    Loopback {
        /// Of the nodes' control connections.
        ports: Vec<u16>,
    },
    /// As the environment says: each node's address and device, the last one for clients.
    Given(Vec<(String, String)>),
    /// A namespace for each.
    Namespaces(Namespaces),
}

pub(crate) struct Namespaces {
    /// What all names begin with.
    name: String,
    /// The first three bytes of all addresses.
    subnet: String,
    nodes_count: u32,
    clients_count: u8,
    cuts: Vec<Cut>,
}

impl Network {
    /// The best that there is here. `FARLOG_CHAOS_NODES=ADDRESS/DEVICE,...` says where nodes are, and last the
    /// clients.
    pub(crate) fn new(nodes_count: u32) -> Self {
        if let Ok(text) = std::env::var("FARLOG_CHAOS_NODES") {
            let split = |place: &str| {
                let (address, device) = place.split_once('/').expect("it is ADDRESS/DEVICE");
                (address.to_owned(), device.to_owned())
            };
            let places: Vec<_> = text.split(',').map(split).collect();
            assert_eq!(places.len(), nodes_count as usize + 1, "{text}");
            return Self::Given(places);
        }
        match Namespaces::new(nodes_count) {
            Ok(namespaces) => Self::Namespaces(namespaces),
            Err(reason) if std::env::var_os("FARLOG_REQUIRE_NETNS").is_none() => {
                println!("nodes are not cut off from each other: {reason}");
                let listeners: Vec<_> = (0..nodes_count)
                    .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
                    .collect();
                let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
                Self::Loopback {
                    ports: listeners.iter().map(port).collect(),
                }
            }
            Err(reason) => panic!("{reason}"),
        }
    }

    pub(crate) fn has_cuts(&self) -> bool {
        matches!(self, Self::Namespaces(_))
    }

    /// A node's control address and device.
    pub(crate) fn node(&self, node: u32) -> (String, String) {
        match self {
            Self::Loopback { ports } => {
                let port = ports[node as usize - 1];
                (format!("127.0.0.1:{port}"), "soft".to_owned())
            }
            Self::Given(places) => {
                let (address, device) = &places[node as usize - 1];
                (format!("{address}:7001"), device.clone())
            }
            Self::Namespaces(namespaces) => {
                let address = namespaces.address(u8::try_from(node).unwrap());
                (format!("{address}:7001"), format!("soft@{address}"))
            }
        }
    }

    /// A device for one more client.
    pub(crate) fn client_device(&mut self) -> DeviceSelector {
        match self {
            Self::Loopback { .. } => DeviceSelector::Soft(None),
            Self::Given(places) => {
                let (_, device) = places.last().expect("clients come last");
                device.parse().unwrap()
            }
            Self::Namespaces(namespaces) => {
                let number = CLIENTS + namespaces.clients_count;
                namespaces.clients_count += 1;
                let address = namespaces.address(number);
                let bridge = &namespaces.name;
                run(
                    "ip",
                    &["addr", "add", &format!("{address}/24"), "dev", bridge],
                )
                .unwrap();
                DeviceSelector::Soft(Some(address.parse().unwrap()))
            }
        }
    }

    /// A program that will run where the node is.
    pub(crate) fn command_at_node(&self, node: u32, program: impl AsRef<Path>) -> Command {
        match self {
            Self::Namespaces(namespaces) => {
                namespaces.command_in(&namespaces.namespace(&node.to_string()), program.as_ref())
            }
            _ => Command::new(program.as_ref()),
        }
    }

    /// Where etcd is, and the command that runs it there.
    pub(crate) fn etcd(&self) -> (String, Command) {
        let program = Path::new("etcd");
        match self {
            Self::Namespaces(namespaces) => (
                namespaces.address(ETCD),
                namespaces.command_in(&namespaces.namespace("etcd"), program),
            ),
            _ => ("127.0.0.1".to_owned(), Command::new(program)),
        }
    }

    pub(crate) fn begin(&mut self, cut: Cut) {
        if let Self::Namespaces(namespaces) = self {
            namespaces.cuts.push(cut);
            namespaces.apply(cut);
        }
    }

    pub(crate) fn end(&mut self, cut: Cut) {
        if let Self::Namespaces(namespaces) = self {
            if let Some(index) = namespaces.cuts.iter().position(|other| *other == cut) {
                namespaces.cuts.swap_remove(index);
            }
            namespaces.apply(cut);
        }
    }
}

impl Namespaces {
    fn new(nodes_count: u32) -> Result<Self, String> {
        Self::remove_abandoned(nodes_count);
        let namespaces = Self::of_process(std::process::id(), nodes_count);
        // Dropped, it removes what has been made until then.
        namespaces.make().map(|()| namespaces)
    }

    fn of_process(pid: u32, nodes_count: u32) -> Self {
        Self {
            name: format!("{NAME}{pid}"),
            subnet: format!("10.{}.{}", 64 + pid / 256 % 64, pid % 256),
            nodes_count,
            clients_count: 0,
            cuts: Vec::new(),
        }
    }

    /// Removes what tests that were killed have left, and the processes in it.
    fn remove_abandoned(nodes_count: u32) {
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            let owner = name
                .strip_prefix(NAME)
                .and_then(|rest| rest.split_once('-'));
            let Some(owner) = owner.and_then(|(pid, _)| pid.parse().ok()) else {
                continue;
            };
            if Path::new(&format!("/proc/{owner}")).exists() {
                continue;
            }
            let pids = Command::new("ip").args(["netns", "pids", &name]).output();
            let pids = pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            for pid in pids.iter().flat_map(|pids| pids.split_whitespace()) {
                if let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) {
                    // It may have ended meanwhile.
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            drop(Self::of_process(owner, nodes_count));
        }
    }

    fn make(&self) -> Result<(), String> {
        let bridge = &self.name;
        run("ip", &["link", "add", bridge, "type", "bridge"])?;
        run("ip", &["link", "set", bridge, "mtu", "9000", "up"])?;
        let place = format!("{}/24", self.address(CLIENTS - 1));
        run("ip", &["addr", "add", &place, "dev", bridge])?;
        for (name, number) in self.members() {
            let (namespace, cable) = (self.namespace(&name), self.cable(&name));
            run("ip", &["netns", "add", &namespace])?;
            let peer = ["peer", "name", "data", "netns", &namespace];
            run(
                "ip",
                &[&["link", "add", &cable, "type", "veth"][..], &peer].concat(),
            )?;
            run(
                "ip",
                &["link", "set", &cable, "mtu", "9000", "master", bridge, "up"],
            )?;
            let place = format!("{}/24", self.address(number));
            let inside = |args: &[&str]| run("ip", &[&["-n", &namespace], args].concat());
            inside(&["link", "set", "lo", "up"])?;
            inside(&["addr", "add", &place, "dev", "data"])?;
            inside(&["link", "set", "data", "mtu", "9000", "up"])?;
        }
        self.filter()
    }

    /// Namespaces by name, and the last byte of their addresses.
    fn members(&self) -> Vec<(String, u8)> {
        let nodes =
            (1..=self.nodes_count).map(|node| (node.to_string(), u8::try_from(node).unwrap()));
        nodes.chain([("etcd".to_owned(), ETCD)]).collect()
    }

    fn namespace(&self, member: &str) -> String {
        format!("{}-{member}", self.name)
    }

    fn cable(&self, member: &str) -> String {
        format!("{}{member}", self.name)
    }

    fn address(&self, number: u8) -> String {
        format!("{}.{number}", self.subnet)
    }

    fn command_in(&self, namespace: &str, program: &Path) -> Command {
        // It becomes the program, so that signals go to that.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program);
        command
    }

    fn apply(&self, cut: Cut) {
        let Cut::Cable(node) = cut else {
            return self.filter().unwrap();
        };
        let is_out = self.cuts.contains(&cut);
        let state = if is_out { "down" } else { "up" };
        run(
            "ip",
            &["link", "set", &self.cable(&node.to_string()), state],
        )
        .unwrap();
    }

    /// Has the bridge drop what is cut, and nothing else.
    fn filter(&self) -> Result<(), String> {
        let table = &self.name;
        let mut rules = format!("table bridge {table} {{}}\nflush table bridge {table}\n");
        let _ = writeln!(
            rules,
            "table bridge {table} {{\n chain cuts {{\n  type filter hook forward priority 0;"
        );
        let of = |node: u32| self.address(u8::try_from(node).unwrap());
        let etcd = self.address(ETCD);
        for cut in &self.cuts {
            let drops = match *cut {
                Cut::Pair(a, b) => vec![(of(a), of(b), ""), (of(b), of(a), "")],
                Cut::OneWay(from, to) => vec![(of(from), of(to), "")],
                Cut::Data(a, b) => {
                    let udp = "ip protocol udp";
                    vec![(of(a), of(b), udp), (of(b), of(a), udp)]
                }
                Cut::Etcd(node) => {
                    vec![(of(node), etcd.clone(), ""), (etcd.clone(), of(node), "")]
                }
                Cut::Cable(_) => continue,
            };
            for (from, to, what) in drops {
                let _ = writeln!(rules, "  ip saddr {from} ip daddr {to} {what} drop");
            }
        }
        rules += " }\n}\n";
        run_with("nft", &["-f", "-"], &rules)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // Some of it may not have been made.
        let _ = run("nft", &["delete", "table", "bridge", &self.name]);
        for (member, _) in self.members() {
            let _ = run("ip", &["link", "del", &self.cable(&member)]);
            let _ = run("ip", &["netns", "del", &self.namespace(&member)]);
        }
        let _ = run("ip", &["link", "del", &self.name]);
    }
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    run_with(program, args, "")
}

fn run_with(program: &str, args: &[&str], input: &str) -> Result<(), String> {
    let failed = |cause: &str| format!("{program} {}: {}", args.join(" "), cause.trim());
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(&error.to_string()))?;
    // It may have ended without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    output
        .status
        .success()
        .then_some(())
        .ok_or_else(|| failed(&said))
}
