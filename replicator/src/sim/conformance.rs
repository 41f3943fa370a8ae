//! The same random programs on both models of verbs: what may happen on one may happen on the other.
//!
//! A program registers memory, writes to it over lanes, now and then where it must not, and ends
//! registrations, queue pairs and processes at any moment. Bytes are written once, so that memory tells which
//! requests have landed. What must hold for each model, at each moment:
//!
//! - Requests of a lane land in their order, each from its first byte on, and nothing behind one that is refused.
//! - Nothing lands by a key after `deregister`, on a lane after `end_receiver`, or in a process after `end`.
//! - What is acknowledged has landed, in order; after a failure nothing is acknowledged.
//! - A lane fails for a reason only, once, and if there is a reason that stays, it does.
//!
//! Of lanes that nothing has befallen, both models have acknowledged the same in the end, and it is the same
//! that has landed.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::operations::Operations;
use super::packets::Packets;
use super::plan::Weather;
use super::random::Rng;
use super::verbs::{Backing, Chain, Outcome, Verbs, WorkRequest};
use crate::image::ImageId;

const SEEDS: u64 = 100;
const STEPS: usize = 150;
const REGION_LEN: usize = 4096;
/// By then everything has happened that can.
const REST_NS: u64 = 30_000_000_000;

/// A registration at the target.
#[derive(Debug)]
struct Region {
    node: usize,
    addr: u64,
    key: u32,
    is_open: bool,
    /// How many of its bytes have been given to requests.
    used: usize,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Request {
    region: usize,
    at: usize,
    len: usize,
    value: u8,
    /// It must not land, nor anything behind it.
    is_refused: bool,
    is_landed: bool,
    signal: Option<Chain>,
}

#[derive(Debug)]
struct Lane {
    from: usize,
    to: usize,
    requests: Vec<Request>,
    acked: Vec<Chain>,
    has_failed: bool,
    /// Something may have ended it, or must have.
    can_fail: bool,
    must_fail: bool,
    has_sender: bool,
    has_receiver: bool,
}

struct Bench {
    verbs: Box<dyn Verbs>,
    now: u64,
    regions: Vec<Region>,
    lanes: Vec<Lane>,
    chains: i32,
}

const NODES: usize = 3;

impl Bench {
    fn new(mut verbs: Box<dyn Verbs>) -> Self {
        (0..NODES).for_each(|node| verbs.start(node));
        Self {
            verbs,
            now: 0,
            regions: Vec::new(),
            lanes: Vec::new(),
            chains: 0,
        }
    }

    /// One step; draws the same from `rng` whatever has happened.
    fn step(&mut self, rng: &mut Rng) {
        let (choice, a, b, c) = (rng.below(100), rng.next(), rng.next(), rng.next());
        let pick =
            |count: usize, from: u64| usize::try_from(from % count.max(1) as u64).expect("small");
        let node = pick(NODES, a);
        let other = (node + 1 + pick(NODES - 1, b)) % NODES;
        match choice {
            _ if self.regions.len() < 3 => self.register(node),
            _ if self.lanes.len() < 3 => self.connect(node, other),
            0..8 => self.register(node),
            8..14 => self.connect(node, other),
            14..18 => self.deregister(pick(self.regions.len(), a)),
            18..20 => self.end_receiver(pick(self.lanes.len(), a)),
            20..22 => self.end_sender(pick(self.lanes.len(), a)),
            22..24 => {
                let lane = pick(self.lanes.len(), a);
                self.lanes[lane].can_fail = true;
                self.verbs.lose(self.now, lane);
            }
            24 => self.kill(node),
            25..27 => self.cut(node, other, true),
            27..30 => self.cut(node, other, false),
            30..80 => self.post(pick(self.lanes.len(), a), b, c),
            _ => self.pass(a % 3_000_000),
        }
    }

    fn register(&mut self, node: usize) {
        let backing = backing_of(self.regions.len());
        let bytes = vec![0; REGION_LEN];
        let (addr, key) = self.verbs.register(node, backing, &bytes, true);
        self.regions.push(Region {
            node,
            addr,
            key,
            is_open: true,
            used: 0,
            bytes,
        });
    }

    fn deregister(&mut self, region: usize) {
        let Region { node, key, .. } = self.regions[region];
        if std::mem::replace(&mut self.regions[region].is_open, false) {
            self.verbs.deregister(node, key);
            let has_target = |lane: &&mut Lane| {
                lane.requests
                    .iter()
                    .any(|r| r.region == region && !r.is_landed)
            };
            for lane in self.lanes.iter_mut().filter(has_target) {
                lane.can_fail = true;
            }
        }
    }

    fn connect(&mut self, from: usize, to: usize) {
        let lane = self.verbs.connect(from, to);
        assert_eq!(lane, self.lanes.len());
        self.lanes.push(Lane {
            from,
            to,
            requests: Vec::new(),
            acked: Vec::new(),
            has_failed: false,
            can_fail: false,
            must_fail: false,
            has_sender: true,
            has_receiver: true,
        });
    }

    fn end_receiver(&mut self, l: usize) {
        let lane = &mut self.lanes[l];
        lane.has_receiver = false;
        lane.can_fail = true;
        self.verbs.end_receiver(l);
    }

    fn end_sender(&mut self, l: usize) {
        let lane = &mut self.lanes[l];
        lane.has_sender = false;
        lane.can_fail = true;
        lane.must_fail = false;
        self.verbs.end_sender(self.now, l);
    }

    /// A node's process ends, and another one begins.
    fn kill(&mut self, node: usize) {
        for region in self.regions.iter_mut().filter(|r| r.node == node) {
            region.is_open = false;
        }
        for lane in &mut self.lanes {
            lane.can_fail |= lane.from == node || lane.to == node;
            lane.has_sender &= lane.from != node;
            lane.has_receiver &= lane.to != node;
            lane.must_fail &= lane.has_sender;
        }
        self.verbs.end(self.now, node);
        self.verbs.start(node);
    }

    fn cut(&mut self, a: usize, b: usize, is_cut: bool) {
        self.verbs.set_cut(a, b, is_cut);
        for lane in &mut self.lanes {
            lane.can_fail |= is_cut && [lane.from, lane.to].iter().all(|n| [a, b].contains(n));
        }
    }

    /// Posts a chain of two requests; now and then one that must be refused.
    fn post(&mut self, l: usize, target: u64, detail: u64) {
        let lane = &self.lanes[l];
        let to = lane.to;
        let mut regions = self.regions.iter().enumerate();
        let len = 1 + usize::try_from(detail % 1500).expect("small");
        let fits = |r: &Region| r.node == to && r.used + len + 8 <= REGION_LEN;
        let is_misdeed = target.is_multiple_of(29);
        let Some((region, _)) = regions.find(|(_, r)| fits(r) && (r.is_open || is_misdeed)) else {
            return;
        };
        self.chains += 1;
        let chain = Chain {
            partition: 0,
            leader_epoch: self.chains,
        };
        let value = u8::try_from(1 + self.chains % 255).expect("at most 255");
        let pieces = [(len, None), (8, Some(chain))];
        let requests =
            pieces.map(|(len, signal)| self.request(region, len, value, is_misdeed, signal));
        let lane = &mut self.lanes[l];
        if !lane.has_sender {
            return;
        }
        let works = requests.each_ref().map(|(work, _)| work.clone());
        let is_refused = requests.iter().any(|(_, request)| request.is_refused);
        lane.can_fail |= is_refused;
        lane.must_fail |= is_refused || !lane.has_receiver;
        if !lane.has_failed {
            lane.requests.extend(requests.map(|(_, request)| request));
        }
        self.verbs.post(self.now, l, works.into());
    }

    fn request(
        &mut self,
        r: usize,
        len: usize,
        value: u8,
        is_misdeed: bool,
        signal: Option<Chain>,
    ) -> (WorkRequest, Request) {
        let region = &mut self.regions[r];
        let at = region.used;
        region.used += len;
        let work = WorkRequest {
            // Beyond the region's end, or where it was.
            addr: region.addr + at as u64 + if is_misdeed { 1 << 16 } else { 0 },
            rkey: region.key,
            bytes: vec![value; len],
            signal,
        };
        let request = Request {
            region: r,
            at,
            len,
            value,
            is_refused: is_misdeed,
            is_landed: false,
            signal,
        };
        (work, request)
    }

    fn pass(&mut self, ns: u64) {
        let deadline = self.now + ns;
        while let Some(due) = self.verbs.next_due().filter(|due| *due <= deadline) {
            self.now = self.now.max(due);
            for outcome in self.verbs.advance(self.now) {
                self.note(outcome);
            }
        }
        self.now = deadline;
    }

    fn note(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Placed {
                node,
                backing,
                at,
                bytes,
            } => self.place(node, backing, at, &bytes),
            Outcome::Acked { lane, chains } => {
                let lane = &mut self.lanes[lane];
                assert!(
                    lane.has_sender && !lane.has_failed,
                    "{lane:?} acknowledges {chains:?}"
                );
                lane.acked.extend(chains);
                let signalled = lane.requests.iter().filter(|r| r.signal.is_some());
                let expected: Vec<_> = signalled.filter_map(|r| r.signal).collect();
                assert!(expected.starts_with(&lane.acked), "{lane:?}");
                let last = lane.acked.last().copied();
                let end = lane.requests.iter().position(|r| r.signal == last);
                let mut done = lane.requests[..=end.expect("it was posted")].iter();
                assert!(
                    done.all(|r| r.is_landed),
                    "acknowledged before it has landed: {lane:?}"
                );
            }
            Outcome::Failed { lane } => {
                let lane = &mut self.lanes[lane];
                if lane.has_sender {
                    assert!(lane.can_fail, "{lane:?} fails for no reason");
                    assert!(!lane.has_failed, "{lane:?} fails twice");
                    lane.has_failed = true;
                }
            }
        }
    }

    fn place(&mut self, node: usize, backing: Backing, at: usize, bytes: &[u8]) {
        let number = (0..self.regions.len()).find(|i| backing_of(*i) == backing);
        let r = number.expect("it is a backing of ours");
        let region = &mut self.regions[r];
        assert!(
            region.node == node && region.is_open,
            "bytes land in {r} after its end"
        );
        region.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        let bytes = &region.bytes;
        for lane in &mut self.lanes {
            let mut is_whole = true;
            for request in &mut lane.requests {
                if request.region != r {
                    is_whole &= request.is_landed;
                    continue;
                }
                let held = &bytes[request.at..request.at + request.len];
                let landed = held
                    .iter()
                    .take_while(|byte| **byte == request.value)
                    .count();
                assert!(
                    held[landed..].iter().all(|byte| *byte == 0),
                    "torn inside, {request:?}"
                );
                let is_news = landed == request.len && !request.is_landed;
                assert!(
                    landed == 0 || is_whole && !request.is_refused,
                    "{request:?} has landed before what was posted before it"
                );
                assert!(
                    !is_news || lane.has_receiver,
                    "{request:?} lands after its receiver's end"
                );
                request.is_landed |= is_news;
                is_whole &= request.is_landed;
            }
        }
    }

    /// Lets everything happen that can; returns what undisturbed lanes have acknowledged.
    fn finish(mut self) -> BTreeMap<usize, Vec<Chain>> {
        for a in 0..NODES {
            for b in 0..a {
                self.verbs.set_cut(a, b, false);
            }
        }
        self.verbs.calm();
        self.pass(REST_NS);
        for lane in &self.lanes {
            assert!(
                !lane.must_fail || lane.has_failed,
                "{lane:?} has not failed"
            );
            let is_done = lane.requests.iter().all(|r| r.is_landed);
            assert!(lane.can_fail || is_done, "{lane:?} has not landed");
        }
        let untouched = self
            .lanes
            .iter()
            .enumerate()
            .filter(|(_, lane)| !lane.can_fail);
        untouched.map(|(i, lane)| (i, lane.acked.clone())).collect()
    }
}

fn backing_of(region: usize) -> Backing {
    Backing::Image {
        partition: 0,
        id: ImageId(region as u64),
    }
}

fn run(seed: u64, verbs: Box<dyn Verbs>) -> BTreeMap<usize, Vec<Chain>> {
    let mut bench = Bench::new(verbs);
    let mut rng = Rng::new(seed);
    (0..STEPS).for_each(|_| bench.step(&mut rng));
    bench.finish()
}

/// Both models, for a seed.
fn models(seed: u64) -> [Box<dyn Verbs>; 2] {
    let mut rng = Rng::new(!seed);
    let weather = Weather::new(&mut rng);
    let [one, two] = [(); 2].map(|()| Rng::new(rng.next()));
    [
        Box::new(Operations::new(one, weather, NODES)),
        Box::new(Packets::new(two, weather, NODES)),
    ]
}

#[test]
fn both_models_do_what_verbs_promise() {
    for seed in 0..SEEDS {
        let [by_operations, by_packets] = models(seed).map(|verbs| run(seed, verbs));
        let in_both = by_operations
            .iter()
            .filter_map(|(lane, acked)| Some((lane, acked, by_packets.get(lane)?)));
        for (lane, one, other) in in_both {
            assert_eq!(one, other, "seed {seed}, lane {lane}");
        }
    }
}

/// A promise that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Breach {
    /// A key opens memory after its end.
    KeyKept,
    /// A queue pair takes what arrives after its end.
    ReceiverKept,
    /// A lane that is told to fail does not.
    FailureUntold,
    /// What is acknowledged has not landed.
    AckedBeforePlaced,
}

/// A model that breaks a promise.
#[derive(Debug)]
struct Broken {
    inner: Box<dyn Verbs>,
    breach: Breach,
}

impl Verbs for Broken {
    fn start(&mut self, node: usize) {
        self.inner.start(node);
    }

    fn end(&mut self, now: u64, node: usize) {
        self.inner.end(now, node);
    }

    fn register(
        &mut self,
        node: usize,
        backing: Backing,
        bytes: &[u8],
        is_writable: bool,
    ) -> (u64, u32) {
        self.inner.register(node, backing, bytes, is_writable)
    }

    fn store(&mut self, node: usize, backing: Backing, at: usize, bytes: &[u8]) {
        self.inner.store(node, backing, at, bytes);
    }

    fn deregister(&mut self, node: usize, key: u32) {
        if self.breach != Breach::KeyKept {
            self.inner.deregister(node, key);
        }
    }

    fn rename(&mut self, node: usize, key: u32, backing: Backing) {
        self.inner.rename(node, key, backing);
    }

    fn resolve(&self, node: usize, key: u32, addr: u64, len: usize) -> Option<(Backing, usize)> {
        self.inner.resolve(node, key, addr, len)
    }

    fn connect(&mut self, from: usize, to: usize) -> usize {
        self.inner.connect(from, to)
    }

    fn post(&mut self, now: u64, lane: usize, requests: Vec<WorkRequest>) {
        self.inner.post(now, lane, requests);
    }

    fn has_sender(&self, lane: usize) -> bool {
        self.inner.has_sender(lane)
    }

    fn end_sender(&mut self, now: u64, lane: usize) {
        self.inner.end_sender(now, lane);
    }

    fn end_receiver(&mut self, lane: usize) {
        if self.breach != Breach::ReceiverKept {
            self.inner.end_receiver(lane);
        }
    }

    fn lose(&mut self, now: u64, lane: usize) {
        self.inner.lose(now, lane);
    }

    fn set_cut(&mut self, a: usize, b: usize, is_cut: bool) {
        self.inner.set_cut(a, b, is_cut);
    }

    fn calm(&mut self) {
        self.inner.calm();
    }

    fn next_due(&self) -> Option<u64> {
        self.inner.next_due()
    }

    fn advance(&mut self, now: u64) -> Vec<Outcome> {
        let mut outcomes = self.inner.advance(now);
        outcomes.retain(|outcome| match (self.breach, outcome) {
            (Breach::FailureUntold, Outcome::Failed { .. }) => false,
            (Breach::AckedBeforePlaced, Outcome::Placed { bytes, .. }) => bytes.len() != 8,
            _ => true,
        });
        outcomes
    }
}

#[test]
fn a_promise_that_is_not_kept_is_noticed() {
    let breaches = [
        Breach::KeyKept,
        Breach::ReceiverKept,
        Breach::FailureUntold,
        Breach::AckedBeforePlaced,
    ];
    for breach in breaches {
        for model in 0..2 {
            let is_noticed = |seed| {
                let mut inner = models(seed).into_iter();
                let inner = inner.nth(model).expect("one of two");
                let broken = Box::new(Broken { inner, breach });
                catch_unwind(AssertUnwindSafe(|| run(seed, broken))).is_err()
            };
            assert!((0..SEEDS).any(is_noticed), "{breach:?} of model {model}");
        }
    }
}
