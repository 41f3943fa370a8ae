//! Against a real etcd server, where there is one.

use std::time::Instant;

use crossbeam::channel::{Receiver, unbounded};

use super::*;
use crate::coordinator::conformance::{self, Loss, Node, Place, Seat, led, member, registration};

#[path = "../../../tests/common/etcd.rs"]
#[allow(dead_code, reason = "tests with real nodes use more of it")]
mod server;

use server::{Etcd, Proxy};

/// An etcd server that each node reaches through a proxy of its own.
struct Cluster {
    etcd: Etcd,
    proxies: HashMap<u32, Proxy>,
}

impl Cluster {
    fn new() -> Option<Self> {
        Some(Self {
            etcd: Etcd::start()?,
            proxies: HashMap::new(),
        })
    }

    fn config(&mut self, node: u32) -> EtcdConfig {
        let port = self.etcd.port();
        let proxy = self
            .proxies
            .entry(node)
            .or_insert_with(|| Proxy::start(port));
        EtcdConfig::new(vec![proxy.url()])
    }
}

struct Joined {
    coordinator: EtcdCoordinator,
    events: Receiver<Event>,
}

fn join(config: &EtcdConfig, registration: Registration) -> Result<Joined, CoordinatorError> {
    let (sender, events) = unbounded();
    // Whoever listened may be gone before the thread is.
    let sink = move |event| drop(sender.send(event));
    Ok(Joined {
        coordinator: EtcdCoordinator::start(config, registration, sink)?,
        events,
    })
}

impl Place for Cluster {
    fn join(&mut self, registration: Registration) -> Box<dyn Seat> {
        let config = self.config(registration.member.node);
        Box::new(self::join(&config, registration).unwrap())
    }

    fn lose(&mut self, node: u32, what: Loss) {
        match what {
            Loss::Requests => self.proxies[&node].cut(),
            Loss::Answers => self.proxies[&node].swallow_answers(),
        }
    }

    fn mend(&mut self, node: u32) {
        self.proxies[&node].mend();
    }
}

impl Seat for Joined {
    fn coordinator(&mut self) -> &mut dyn Coordinator {
        &mut self.coordinator
    }

    fn next(&mut self, within: Duration) -> Option<Event> {
        self.events.recv_timeout(within).ok()
    }
}

/// Runs a case of the suite on a server of its own.
fn conforms(case: fn(&mut dyn Place)) {
    if let Some(mut cluster) = Cluster::new() {
        case(&mut cluster);
    }
}

#[test]
fn first_states_are_told() {
    conforms(conformance::first_states_are_told);
}

#[test]
fn one_proposal_wins() {
    conforms(conformance::one_proposal_wins);
}

#[test]
fn states_survive_a_restart() {
    conforms(conformance::states_survive_a_restart);
}

#[test]
fn a_lost_request_is_void() {
    conforms(conformance::a_lost_request_is_void);
}

#[test]
fn a_lost_answer_is_told_later() {
    conforms(conformance::a_lost_answer_is_told_later);
}

#[test]
fn two_nodes_agree() {
    conforms(conformance::two_nodes_agree);
}

#[test]
fn changes_reach_everyone_in_order() {
    conforms(conformance::changes_reach_everyone_in_order);
}

#[test]
fn a_node_that_does_not_beat_is_lost() {
    conforms(conformance::a_node_that_does_not_beat_is_lost);
}

/// A connection that is cut is a lost session here, and everything missed meanwhile is told afterwards, even
/// if etcd has compacted it.
#[test]
fn a_node_that_was_cut_off_learns_what_it_missed() {
    let Some(mut cluster) = Cluster::new() else {
        return;
    };
    let mut one = Node::new(cluster.join(registration(1)));
    let mut two = Node::new(cluster.join(registration(2)));
    let mut revision = one.changed().revision;
    two.changed();
    cluster.lose(2, Loss::Requests);
    two.wait("the end of the session", |event| {
        matches!(event, Event::SessionLost { cause } if cause.contains("127.0.0.1")).then_some(())
    });
    for epoch in 1..=10 {
        revision = one.accept(revision, led(epoch, &[1]));
    }
    cluster.etcd.compact(revision);
    cluster.mend(2);
    let (mut is_back, mut is_told) = (false, false);
    two.wait("a session and the newest state", |event| {
        is_back |= *event == Event::SessionBack;
        is_told |= matches!(event, Event::Changed { partition: 0, agreed } if agreed.state == led(10, &[1]));
        (is_back && is_told).then_some(())
    });
    one.wait("node 2", |event| match event {
        Event::Nodes { live } => live.contains(&member(2)).then_some(()),
        _ => None,
    });
}

/// The first of two end points is dead: the other one serves.
#[test]
fn another_end_point_takes_over() {
    let Some(etcd) = Etcd::start() else { return };
    let proxy = Proxy::start(etcd.port());
    let config = EtcdConfig::new(vec![proxy.url(), etcd.url()]);
    let mut node = Node::new(Box::new(join(&config, registration(1)).unwrap()));
    let first = node.changed().revision;
    let mut revision = node.accept(first, led(1, &[1]));
    proxy.cut();
    for epoch in 2..=5 {
        revision = match node.propose(revision, led(epoch, &[1])) {
            Answer::Accepted { revision } => revision,
            // The one that was under way when the end point died.
            Answer::Unknown { .. } => loop {
                let agreed = node.changed();
                if agreed.revision > revision {
                    break agreed.revision;
                }
            },
            Answer::Conflict(agreed) => panic!("{agreed:?}"),
        };
    }
}

/// What a person reads who has forgotten to start etcd, or has started the same node twice.
#[test]
fn a_start_without_etcd_names_end_point_and_remedy() {
    let config = |url: &str| EtcdConfig::new(vec![url.to_owned()]);
    for (url, cause) in [
        ("127.0.0.1:2379", "does not begin with http://"),
        ("https://127.0.0.1:2379", "no TLS"),
        ("http://127.0.0.1", "not http://HOST:PORT"),
        ("http://:2379/", "not http://HOST:PORT"),
    ] {
        let error = join(&config(url), registration(1)).map(drop).unwrap_err();
        assert!(error.to_string().contains(cause), "{url}: {error}");
        assert!(error.to_string().contains(url), "{url}: {error}");
    }
    let nobody = format!("http://127.0.0.1:{}", server::free_port());
    let begun = Instant::now();
    let error = join(&config(&nobody), registration(1))
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(begun.elapsed() < START_TIMEOUT + Duration::from_secs(5));
    for part in [&nobody, "refused", "see that etcd runs there"] {
        assert!(error.contains(part), "{part} is missing in: {error}");
    }
}

#[test]
fn the_same_node_twice_is_refused() {
    let Some(etcd) = Etcd::start() else { return };
    let config = EtcdConfig::new(vec![etcd.url()]);
    let mut newer = registration(1);
    newer.incarnation = 2;
    let mut running = join(&config, newer).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                running.coordinator.beat();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let error = join(&config, registration(1))
            .map(drop)
            .unwrap_err()
            .to_string();
        stop.store(true, Ordering::Relaxed);
        for part in [
            "node 1 of cluster `conformance`",
            "127.0.0.1:7001",
            "stop that one",
        ] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    });
}

#[test]
fn a_key_with_something_else_in_it_is_named() {
    let Some(etcd) = Etcd::start() else { return };
    let config = EtcdConfig::new(vec![etcd.url()]);
    etcd.put("/farlog/conformance/partitions/t/1", "7");
    let error = join(&config, registration(1)).map(drop).unwrap_err();
    let CoordinatorError::Value { key, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(key, "/farlog/conformance/partitions/t/1");
}
