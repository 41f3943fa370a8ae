//! A small broker with farlog inside: three nodes, a protocol of its own, and a change of leaders.
//!
//! ```text
//!   client --- PUT, GET over TCP ---> broker: Partition::append, Partition::read
//!                                       |  node 1   --- RDMA WRITE --->  nodes 2 and 3
//!   consumer --- RDMA READ ------------------------------------------------'
//! ```
//!
//! All of it is in one process, on software devices, so that it runs anywhere:
//!
//! ```text
//! cargo run --release -p replicator --example embedded_broker
//! ```
//!
//! A client appends lines through the leader's broker and waits for their commits. Then the leader is shut
//! down: it hands over, and the client goes on with the next one. At the end what was appended is compared with
//! what a consumer has read by RDMA, and with what a follower's broker returns.

mod broker;
mod executor;
mod registry;

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use replicator::cluster::{Cluster, NodeSpec, TopicSpec};
use replicator::consumer::{Consumer, StartOffset};
use replicator::runtime::{Changes, Node, NodeConfig};
use transport::DeviceSelector;

use registry::Registry;

const TOPIC: &str = "greetings";
const NODES: [u32; 3] = [1, 2, 3];
/// Lines that are appended before the leader goes, and again after.
const LINES: usize = 1000;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a node waits for its appends and for a successor when it is shut down.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    println!("{}", run()?);
    Ok(())
}

/// Runs the whole example; returns what its check has found.
pub(crate) fn run() -> Result<String> {
    let name = format!("farlog-embedded-{}", std::process::id());
    let (data, memory) = (
        std::env::temp_dir().join(&name),
        Path::new("/dev/shm").join(&name),
    );
    let checked = run_in(&data, &memory);
    for dir in [data, memory] {
        // It may not have been made.
        let _ = std::fs::remove_dir_all(dir);
    }
    checked
}

fn run_in(data: &Path, memory: &Path) -> Result<String> {
    let cluster = cluster()?;
    let registry = Arc::new(Registry::default());
    let mut nodes = Vec::new();
    let mut brokers = Vec::new();
    for node_id in NODES {
        let node = Node::start(NodeConfig {
            cluster: cluster.clone(),
            node_id,
            data_dir: data.join(node_id.to_string()),
            shm_dir: memory.join(node_id.to_string()),
            device: DeviceSelector::Soft(None),
            coordinator: registry.coordinator(),
        })?;
        print_changes(node_id, node.changes());
        brokers.push((node_id, broker::serve(node.partition(TOPIC, 0)?)?));
        nodes.push((node_id, node));
    }

    let first = wait_for_leader(&nodes, &NODES)?;
    let mut sent = Vec::new();
    put_lines(address_of(&brokers, first), &mut sent)?;
    println!(
        "{} lines are committed; node {first} is shut down",
        sent.len()
    );

    let at = nodes.iter().position(|(id, _)| *id == first);
    let (_, leader) = nodes.swap_remove(at.ok_or("the leader runs")?);
    let begun = Instant::now();
    leader.shutdown(SHUTDOWN_PATIENCE)?;
    println!("it was gone after {} ms", begun.elapsed().as_millis());

    let rest: Vec<u32> = NODES.into_iter().filter(|&id| id != first).collect();
    let second = wait_for_leader(&nodes, &rest)?;
    put_lines(address_of(&brokers, second), &mut sent)?;
    println!("{} lines are committed; node {second} leads", sent.len());

    let follower = rest.iter().copied().find(|&id| id != second);
    let follower = follower.ok_or("one of the two follows")?;
    let by_rdma = consume(&cluster, follower, sent.len())?;
    let by_broker = get_lines(address_of(&brokers, follower), sent.len())?;
    for (_, node) in nodes {
        node.shutdown(SHUTDOWN_PATIENCE)?;
    }
    if by_rdma != sent {
        return Err("what the consumer has read is not what was appended".into());
    }
    if by_broker != sent {
        return Err("what the follower's broker returned is not what was appended".into());
    }
    Ok(format!(
        "{} lines, appended under two leaders, came back in order: by RDMA and from a follower's broker",
        sent.len()
    ))
}

/// The cluster, built in code; a broker has it from its own configuration.
fn cluster() -> Result<Cluster> {
    // Ports are taken all at once, so that they differ.
    let ports = NODES
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .into_iter()
        .collect::<std::io::Result<Vec<_>>>()?;
    let mut nodes = Vec::new();
    for (id, port) in NODES.into_iter().zip(&ports) {
        nodes.push(NodeSpec::new(id, port.local_addr()?.to_string()));
    }
    let mut topic = TopicSpec::new(TOPIC, vec![NODES.to_vec()]);
    topic.image_size = 1 << 20;
    topic.segment_size = 8 << 20;
    Ok(Cluster::new("embedded", nodes, vec![topic])?)
}

/// Prints what a node tells of its partitions, until it ends.
fn print_changes(node: u32, mut changes: Changes) {
    thread::spawn(move || {
        while let Some(change) = executor::block_on(changes.next()) {
            let (view, topic) = (change.view, change.partition.topic());
            let role = if view.is_leader { "leads" } else { "follows" };
            println!(
                "node {node} {role} {topic} in epoch {}: leader {:?}, in sync {:?}",
                view.leader_epoch, view.leader, view.isr
            );
        }
        println!("node {node} has ended");
    });
}

/// Waits until one of the nodes leads, and others are in sync with it.
fn wait_for_leader(nodes: &[(u32, Node)], in_sync: &[u32]) -> Result<u32> {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        for (id, node) in nodes {
            let view = node.partition(TOPIC, 0)?.view();
            if view.is_leader && in_sync.iter().all(|id| view.isr.contains(id)) {
                return Ok(*id);
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err("nobody leads".into())
}

fn address_of(brokers: &[(u32, SocketAddr)], node: u32) -> SocketAddr {
    let found = brokers.iter().find(|(id, _)| *id == node);
    found.expect("every node has a broker").1
}

/// A client: appends more lines, without waiting for one before it sends the next, and notes them.
fn put_lines(address: SocketAddr, sent: &mut Vec<String>) -> Result<()> {
    let mut client = TcpStream::connect(address)?;
    let mut answers = BufReader::new(client.try_clone()?).lines();
    let from = sent.len();
    let lines: Vec<_> = (from..from + LINES).map(|i| format!("line {i}")).collect();
    let text: String = lines.iter().map(|line| format!("PUT {line}\n")).collect();
    let writing = thread::spawn(move || client.write_all(text.as_bytes()));
    for (offset, line) in (from..).zip(lines) {
        let answer = answers.next().ok_or("the broker has hung up")??;
        if answer != format!("+ {offset}") {
            return Err(format!("`{line}` was answered with `{answer}`").into());
        }
        sent.push(line);
    }
    writing.join().map_err(|_| "the client has panicked")??;
    Ok(())
}

/// A client: reads so many lines from the beginning.
fn get_lines(address: SocketAddr, count: usize) -> Result<Vec<String>> {
    let mut client = TcpStream::connect(address)?;
    let mut answers = BufReader::new(client.try_clone()?).lines();
    let mut lines = Vec::new();
    let begun = Instant::now();
    while lines.len() < count {
        if begun.elapsed() > PATIENCE {
            return Err(format!("{} of {count} lines", lines.len()).into());
        }
        writeln!(client, "GET {}", lines.len())?;
        loop {
            let answer = answers.next().ok_or("the broker has hung up")??;
            if answer == "." {
                break;
            }
            let record = answer.strip_prefix(&format!("= {} ", lines.len()));
            lines.push(
                record
                    .ok_or_else(|| format!("answer `{answer}`"))?
                    .to_owned(),
            );
        }
    }
    Ok(lines)
}

/// Reads so many records out of a replica's memory.
fn consume(cluster: &Cluster, replica: u32, count: usize) -> Result<Vec<String>> {
    let device = DeviceSelector::Soft(None);
    let start = StartOffset::Earliest;
    let mut consumer = Consumer::open(cluster, TOPIC, &[], start, &device, Some(replica))?;
    let mut lines = Vec::new();
    let begun = Instant::now();
    while lines.len() < count {
        if begun.elapsed() > PATIENCE {
            return Err(format!("{} of {count} records", lines.len()).into());
        }
        let fetch = consumer.poll(Duration::from_millis(100))?;
        for (_, batch) in fetch.batches() {
            for record in batch.records()? {
                lines.push(String::from_utf8(
                    record?.value.unwrap_or_default().to_vec(),
                )?);
            }
        }
    }
    Ok(lines)
}
