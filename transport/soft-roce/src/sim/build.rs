//! Where a seed's devices, memory and connections come from.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::ops::Range;

use super::net::{Net, Weather};
use super::random::Rng;
use super::words::History;
use super::work::{Direction, INLINE_MAX, SGE_MAX, SLOTS, WORDS, bytes_of, slots_len};
use super::{Connection, Node, Plan, Stats, World};
use crate::device::Service;
use crate::mr_table::{AccessFlags, Bind, Key, Pd, WindowType};
use crate::qp::{Attr, Mtu, QpConfig};
use crate::virtual_device::{CQE, RC_STEPS, REMOTE_RIGHTS, VirtualDevice};
use crate::wire::{Psn, Qpn};

/// What untouched memory holds.
const FILL: u8 = 0xa5;
/// Bytes between any two stretches of memory that something may change.
const GUARD_LEN: usize = 64;
pub(super) const PD: Pd = Pd(3);
const MTUS: [Mtu; 5] = [
    Mtu::Mtu256,
    Mtu::Mtu512,
    Mtu::Mtu1024,
    Mtu::Mtu2048,
    Mtu::Mtu4096,
];

impl Plan {
    fn new(rng: &mut Rng) -> Self {
        let is_storm = rng.chance(10);
        let severity = if is_storm { 25 } else { 3 };
        let weather = Weather {
            loss: rng.below(severity + 1),
            duplication: rng.below(6),
            corruption: rng.below(3),
            delay: rng.below(11),
            delay_ns_max: rng.pick(&[5_000, 50_000, 400_000]),
            latency_ns: 500 + rng.next() % 5_000,
        };
        Self {
            weather,
            is_storm,
            misdeeds: rng.pick(&[0, 80]),
            disasters: rng.pick(&[0, 20]),
            len_max: rng.pick(&[64, 700, 3000, 10_000]),
            acts: 40 + rng.below(160),
        }
    }
}

/// Stretches of a node's memory, handed out one behind the other with guards between them.
#[derive(Clone, Copy, Debug)]
struct Layout(usize);

impl Layout {
    fn take(&mut self, len: usize) -> usize {
        let start = self.0;
        self.0 = (start + len).next_multiple_of(8) + GUARD_LEN;
        start
    }
}

impl World {
    /// The world of a seed, before anything was posted.
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(&mut rng);
        let node_count = 2 + rng.below(4);
        let connection_count = 1 + rng.below(2 * node_count - 2);
        let connection = Connection {
            can_fail: plan.is_storm,
        };
        let mut world = World {
            now: 1,
            ticks: 0,
            net: Net::new(plan.weather, rng.fork()),
            rng,
            plan,
            nodes: Vec::new(),
            connections: vec![connection; connection_count],
            directions: Vec::new(),
            routes: HashMap::new(),
            addresses: HashMap::new(),
            is_watchful: false,
            stats: Stats::default(),
        };
        let mut layouts = vec![Layout(GUARD_LEN); node_count];
        let words: Vec<usize> = layouts
            .iter_mut()
            .map(|layout| layout.take(8 * WORDS))
            .collect();
        for _ in 0..connection_count {
            let [a, b] = world.choose_ends(node_count);
            for (from, to) in [(a, b), (b, a)] {
                let direction = lay_out(from, to, plan.len_max, &mut layouts);
                world.directions.push(direction);
            }
        }
        for (layout, words) in layouts.iter().zip(words) {
            world.add_node(layout.0, words..words + 8 * WORDS);
        }
        for c in 0..connection_count {
            world.connect(c);
        }
        world
    }

    /// Two devices, or now and then the same one twice.
    fn choose_ends(&mut self, node_count: usize) -> [usize; 2] {
        let a = self.rng.below(node_count);
        let other = (a + 1 + self.rng.below(node_count - 1)) % node_count;
        [a, if self.rng.chance(5) { a } else { other }]
    }

    fn add_node(&mut self, memory_len: usize, words: Range<usize>) {
        let n = self.nodes.len();
        let last = u8::try_from(n + 1).expect("few nodes");
        let address = IpAddr::from([10, 0, 0, last]);
        let mut device = VirtualDevice::new(address, self.rng.next(), memory_len, FILL);
        let local_key = device.register(0..memory_len, AccessFlags::LOCAL_WRITE, PD);
        let words_key = device.register(words.clone(), REMOTE_RIGHTS, PD);
        let cqs = (0..1 + self.rng.below(3))
            .map(|_| device.completion_queue(CQE))
            .collect();
        let initial: Vec<u64> = (0..WORDS).map(|_| self.rng.next()).collect();
        let mut node = Node {
            model: vec![FILL; device.memory_len()],
            device,
            cqs,
            local_key,
            words,
            words_key,
            histories: initial.iter().copied().map(History::new).collect(),
            is_alive: true,
            owed_turn: None,
        };
        for (index, value) in initial.iter().enumerate() {
            node.set(node.words.start + 8 * index, &bytes_of(*value));
        }
        self.addresses.insert(address, n);
        self.nodes.push(node);
    }

    /// Registers the targets of connection `c`, and creates and connects its queue pairs.
    fn connect(&mut self, c: usize) {
        let directions = [2 * c, 2 * c + 1];
        for d in directions {
            self.create_qp(d);
        }
        for d in directions {
            self.grant(d);
        }
        let rd_atomic = 1 + u8::try_from(self.rng.below(4)).expect("below 4");
        let psns = directions.map(|_| self.first_psn());
        let attr = Attr {
            access: REMOTE_RIGHTS,
            path_mtu: self.rng.pick(&MTUS),
            max_rd_atomic: rd_atomic,
            max_dest_rd_atomic: rd_atomic,
            timeout: 8,
            retry_cnt: 7,
            rnr_retry: 7,
            min_rnr_timer: self.rng.pick(&[1, 3, 7]),
            ..Attr::default()
        };
        for (own, peer) in [(0, 1), (1, 0)] {
            let to = self.directions[directions[own]].to;
            let remote = self.address(to);
            let attr = Attr {
                dest_qpn: self.directions[directions[peer]].qpn,
                remote,
                sq_psn: psns[own],
                rq_psn: psns[peer],
                ..attr
            };
            let direction = &self.directions[directions[own]];
            let device = &mut self.nodes[direction.from].device;
            device.connect(direction.qpn, &attr, &RC_STEPS);
        }
    }

    /// Registers the target of direction `d` for peers, or for a window that its queue pair opens.
    fn grant(&mut self, d: usize) {
        let qpn = self.directions[d ^ 1].qpn;
        let direction = &mut self.directions[d];
        let device = &mut self.nodes[direction.to].device;
        direction.ahead = device.read(direction.target.clone());
        direction.is_window = self.rng.chance(40);
        if !direction.is_window {
            direction.key = device.register(direction.target.clone(), REMOTE_RIGHTS, PD);
            return;
        }
        let below = AccessFlags::LOCAL_WRITE | AccessFlags::MW_BIND;
        let region = device.register(direction.target.clone(), below, PD);
        let addr = device.remote(direction.target.start, region).addr;
        let regions = &mut device.engine.regions;
        let window = regions.alloc_window(PD, WindowType::Type2);
        direction.key = window.expect("the table is nearly empty");
        let bind = Bind {
            rkey: direction.key,
            region,
            addr,
            len: direction.target.len() as u64,
            access: REMOTE_RIGHTS,
            is_zero_based: false,
        };
        let bound = regions.bind_window(&bind, PD, qpn);
        bound.expect("the window is free, and the region can be bound to");
    }

    fn create_qp(&mut self, d: usize) {
        let config = QpConfig {
            pd: PD,
            max_send_wr: SLOTS,
            max_recv_wr: SLOTS,
            max_send_sge: SGE_MAX,
            max_recv_sge: SGE_MAX,
            max_inline: INLINE_MAX,
            sq_sig_all: false,
            window_max: self.rng.pick(&[4, 16, 64, 256]),
            srq: None,
        };
        let direction = &mut self.directions[d];
        let node = &mut self.nodes[direction.from];
        let [send_cq, recv_cq] = [(); 2].map(|()| self.rng.below(node.cqs.len()));
        direction.qpn =
            node.device
                .create_qp(Service::Rc, config, &node.cqs[send_cq], &node.cqs[recv_cq]);
        let end = (direction.from, direction.qpn);
        self.routes.insert(end, d);
    }

    /// A few packets before the wrap, or anywhere.
    fn first_psn(&mut self) -> Psn {
        let number = if self.rng.chance(60) {
            (1 << 24) - self.rng.below(40)
        } else {
            self.rng.below(1 << 24)
        };
        Psn::new(u32::try_from(number).expect("at most 2^24"))
    }

    fn address(&self, n: usize) -> IpAddr {
        let mut known = self.addresses.iter();
        let (address, _) = known.find(|(_, of)| **of == n).expect("every node has one");
        *address
    }
}

/// A direction with memory at both ends, still without queue pair and key.
fn lay_out(from: usize, to: usize, len_max: usize, layouts: &mut [Layout]) -> Direction {
    let target_len = (2 * len_max).next_multiple_of(8);
    let sources = layouts[from].take(slots_len(len_max));
    let receives = layouts[to].take(slots_len(len_max));
    let target = layouts[to].take(target_len);
    Direction {
        from,
        to,
        qpn: Qpn::new(0),
        len_max,
        sources,
        receives,
        target: target..target + target_len,
        key: Key(0),
        is_window: false,
        ahead: Vec::new(),
        posted: 0,
        pending: VecDeque::new(),
        receipts: VecDeque::new(),
        receives_posted: 0,
        receives_done: 0,
        first_error: None,
        doubtful: Vec::new(),
        revoked: None,
        is_doomed: false,
    }
}
