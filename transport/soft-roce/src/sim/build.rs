//! Where a seed's devices, memory and connections come from.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use super::letters::{BUFFER_LEN, Mailbox};
use super::net::{Net, Weather};
use super::random::Rng;
use super::receives::{POOL_SLOTS, Pool, Receives};
use super::windows::Access;
use super::words::History;
use super::work::{Direction, INLINE_MAX, SGE_MAX, SLOTS, WORDS, bytes_of, slots_len};
use super::{Connection, Node, Plan, Stats, World};
use crate::device::Service;
use crate::mr_table::{AccessFlags, Key, Pd, WindowType};
use crate::qp::{Attr, Mtu, QpConfig};
use crate::srq::SrqRef;
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
            unrest: rng.pick(&[0, 50]),
            has_small_cq: rng.chance(10),
            len_max: rng.pick(&[64, 700, 3000, 10_000]),
            has_mailboxes: rng.chance(50),
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

/// What a node has besides connections.
#[derive(Clone, Copy, Debug)]
struct Own {
    words: usize,
    pool: usize,
    pool_slot_len: usize,
    mailbox: Option<[usize; 2]>,
}

impl Own {
    fn new(layout: &mut Layout, plan: &Plan) -> Self {
        let pool_slot_len = plan.len_max.max(BUFFER_LEN);
        Self {
            words: layout.take(8 * WORDS),
            pool: layout.take(POOL_SLOTS * pool_slot_len.next_multiple_of(8)),
            pool_slot_len,
            mailbox: plan
                .has_mailboxes
                .then(|| [Mailbox::SOURCES_LEN, Mailbox::RECEIVES_LEN].map(|len| layout.take(len))),
        }
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
            ..Connection::default()
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
            letters: Vec::new(),
            routes: HashMap::new(),
            addresses: HashMap::new(),
            resets: 0,
            is_watchful: false,
            stats: Stats::default(),
        };
        let mut layouts = vec![Layout(GUARD_LEN); node_count];
        let own: Vec<Own> = layouts
            .iter_mut()
            .map(|layout| Own::new(layout, &world.plan))
            .collect();
        for _ in 0..connection_count {
            let [a, b] = world.choose_ends(node_count);
            for (from, to) in [(a, b), (b, a)] {
                let direction = lay_out(from, to, plan.len_max, &mut layouts);
                world.directions.push(direction);
            }
        }
        for (layout, own) in layouts.iter().zip(own) {
            world.add_node(layout.0, own);
        }
        for n in 0..node_count {
            let (config, cqs) = world.draw_qp(n);
            world.open_mailbox(n, config, cqs);
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

    fn add_node(&mut self, memory_len: usize, own: Own) {
        let words = own.words..own.words + 8 * WORDS;
        let n = self.nodes.len();
        let last = u8::try_from(n + 1).expect("few nodes");
        let address = IpAddr::from([10, 0, 0, last]);
        let mut device = VirtualDevice::new(address, self.rng.next(), memory_len, FILL);
        let local_key = device.register(0..memory_len, AccessFlags::LOCAL_WRITE, PD);
        let words_key = device.register(words.clone(), REMOTE_RIGHTS, PD);
        let has_small_cq = self.plan.has_small_cq && n == 0;
        let small = 2 + self.rng.below(10);
        let cqs = (0..1 + self.rng.below(3))
            .map(|cq| device.completion_queue(if has_small_cq && cq == 0 { small } else { CQE }))
            .collect();
        let has_pool = self.rng.chance(40) && !has_small_cq;
        let pool = has_pool.then(|| {
            let number = device.create_srq(POOL_SLOTS, SGE_MAX);
            let srq = SrqRef { number, pd: PD };
            Pool::new(srq, own.pool, own.pool_slot_len)
        });
        let mailbox = own.mailbox.map(|[sources, receives]| {
            let is_shared = pool.is_some() && self.rng.chance(50);
            Mailbox::new(sources, receives, is_shared)
        });
        let initial: Vec<u64> = (0..WORDS).map(|_| self.rng.next()).collect();
        let mut node = Node {
            model: vec![FILL; device.memory_len()],
            device,
            cqs,
            local_key,
            words,
            words_key,
            pool,
            mailbox,
            histories: initial.iter().copied().map(History::new).collect(),
            is_alive: true,
            owed_turn: None,
            has_small_cq,
            cq_errors: 0,
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
        let rnr_retry = if self.rng.chance(15) {
            u8::try_from(self.rng.below(7)).expect("below 7")
        } else {
            7
        };
        let connection = &mut self.connections[c];
        connection.rnr_retry = rnr_retry;
        connection.rnr_timer = self.rng.pick(&[1, 3, 7]);
        self.establish(c);
    }

    /// Connects the queue pairs of connection `c`, which are in RESET, under numbers far from those they
    /// had before.
    pub(super) fn establish(&mut self, c: usize) {
        let directions = [2 * c, 2 * c + 1];
        let rd_atomic = 1 + u8::try_from(self.rng.below(4)).expect("below 4");
        let psns = match self.connections[c].psns {
            None => [(); 2].map(|()| self.first_psn()),
            Some(psns) => psns.map(|psn| {
                let distance = (1 << 20) + self.rng.below(14 << 20);
                psn + u32::try_from(distance).expect("below 2^24")
            }),
        };
        let connection = &mut self.connections[c];
        connection.psns = Some(psns);
        let attr = Attr {
            access: REMOTE_RIGHTS,
            path_mtu: self.rng.pick(&MTUS),
            max_rd_atomic: rd_atomic,
            max_dest_rd_atomic: rd_atomic,
            timeout: 8,
            retry_cnt: 7,
            rnr_retry: connection.rnr_retry,
            min_rnr_timer: connection.rnr_timer,
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
        self.open_windows(c);
    }

    /// Registers the target of direction `d` for peers, or for a window that its queue pair opens.
    pub(super) fn grant(&mut self, d: usize) {
        let direction = &mut self.directions[d];
        let device = &mut self.nodes[direction.to].device;
        direction.ahead = device.read(direction.target.clone());
        direction.is_window = self.rng.chance(40);
        if !direction.is_window {
            direction.key = device.register(direction.target.clone(), REMOTE_RIGHTS, PD);
            direction.access = Access::Open;
            return;
        }
        let below = AccessFlags::LOCAL_WRITE | AccessFlags::MW_BIND;
        direction.below = device.register(direction.target.clone(), below, PD);
        let regions = &mut device.engine.regions;
        let window = regions.alloc_window(PD, WindowType::Type2);
        direction.key = window.expect("the table is nearly empty");
        direction.access = Access::Closed;
    }

    fn create_qp(&mut self, d: usize) {
        let n = self.directions[d].from;
        let (config, cqs) = self.draw_qp(n);
        let srq = self.nodes[n].pool.as_ref().map(|pool| pool.srq);
        let srq = srq.filter(|_| self.rng.chance(60));
        self.directions[d ^ 1].is_shared = srq.is_some();
        self.directions[d].cqs = cqs;
        let config = QpConfig { srq, ..config };
        let node = &mut self.nodes[n];
        let [send_cq, recv_cq] = cqs.map(|cq| &node.cqs[cq]);
        let qpn = node.device.create_qp(Service::Rc, config, send_cq, recv_cq);
        self.directions[d].qpn = qpn;
        self.routes.insert((n, qpn), d);
    }

    /// What a queue pair of node `n` is created with, and which queues it reports to.
    fn draw_qp(&mut self, n: usize) -> (QpConfig, [usize; 2]) {
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
        let cq_count = self.nodes[n].cqs.len();
        (config, [(); 2].map(|()| self.rng.below(cq_count)))
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

    pub(super) fn address(&self, n: usize) -> IpAddr {
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
        cqs: [0; 2],
        len_max,
        sources,
        receives: Receives::new(receives, len_max),
        is_shared: false,
        last_shared: 0,
        target: target..target + target_len,
        key: Key(0),
        is_window: false,
        below: Key(0),
        access: Access::Closed,
        closed: None,
        is_revoking: false,
        ahead: Vec::new(),
        posted: 0,
        pending: VecDeque::new(),
        receipts: VecDeque::new(),
        first_error: None,
        doubtful: Vec::new(),
        revoked: None,
        is_doomed: false,
        resets: 0,
        held_from: None,
        is_drain_awaited: false,
    }
}
