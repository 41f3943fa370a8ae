//! Two queue pairs, a virtual clock, and a wire whose every packet a test may lose or damage.

#![allow(
    unsafe_code,
    reason = "registers and inspects memory that the queue pairs write"
)]

mod congestion;
mod edges;
mod errors;
mod flow;
mod hostile;
mod ipv6;
mod limits;
mod loss;
mod messages;
mod random;
mod shared;
mod states;
mod windows;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::*;
use crate::copy;
use crate::mr_table::{AccessFlags, Key, Region};
use crate::qp::Mtu;
use crate::srq::SrqRef;
use crate::wire::icrc::Flow;
use crate::wire::{Aeth, Headers, Opcode, Psn, ROCE_PORT, Syndrome};
use crate::work::{Data, MAX_MESSAGE_LEN, Remote, SendFlags, Sge, WcOpcode};

/// Time on the wire in one direction.
const LATENCY_NS: u64 = 2_000;
/// From the turn that held an ACK to the next one.
const HOLD_NS: u64 = 20_000;
/// Bytes of each node's registered memory.
const MEMORY_LEN: usize = 256 * 1024;
/// Where each node's registered memory starts in its iova space.
const IOVA: u64 = 0x10_0000_0000;
const ALL_RIGHTS: AccessFlags = AccessFlags::all();
const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 3)),
];
/// The requester's first PSN: two packets short of the wrap.
const FIRST_PSN: Psn = Psn::new(0xff_fffe);

const A: usize = 0;
const B: usize = 1;

/// A queue pair with memory of its own.
struct Node {
    qp: Qp,
    mem: MrTable,
    memory: Box<[u64]>,
    key: Key,
    tx: TxBuf,
    /// When its ACKs go out.
    ack_time: AckTime,
    /// Where its receive requests come from, if shared.
    srq: Option<SharedReceiveQueue>,
    completions: Vec<(Queue, Wc)>,
    events: Vec<AsyncEvent>,
}

impl Node {
    fn new(index: usize, address: IpAddr, config: QpConfig) -> Self {
        let mut mem = MrTable::new(0x1234_5678 + index as u64);
        let mut memory = vec![0u64; MEMORY_LEN / 8].into_boxed_slice();
        let region = Region {
            pd: config.pd,
            base: memory.as_mut_ptr().cast(),
            iova: IOVA,
            len: MEMORY_LEN as u64,
            access: ALL_RIGHTS,
        };
        // SAFETY: `memory` lives as long as `mem` and is touched through `copy` only.
        let key = unsafe { mem.register(region) }.unwrap();
        let qpn = Qpn::new(0x11 + u32::try_from(index).unwrap());
        let tx = TxBuf::new(SocketAddr::new(address, ROCE_PORT));
        let qp = Qp::new(qpn, config);
        Node {
            qp,
            mem,
            memory,
            key,
            tx,
            ack_time: AckTime::Now,
            srq: None,
            completions: Vec::new(),
            events: Vec::new(),
        }
    }

    /// Registers `len` bytes at `byte_offset` of the memory once more, with other rights.
    fn register(&mut self, byte_offset: usize, len: usize, access: AccessFlags, pd: Pd) -> Key {
        assert!(byte_offset + len <= MEMORY_LEN);
        let base = self
            .memory
            .as_mut_ptr()
            .cast::<u8>()
            .wrapping_add(byte_offset);
        let iova = IOVA + byte_offset as u64;
        let region = Region {
            pd,
            base,
            iova,
            len: len as u64,
            access,
        };
        // SAFETY: inside `memory`; see `new`.
        unsafe { self.mem.register(region) }.unwrap()
    }

    fn write(&mut self, byte_offset: usize, bytes: &[u8]) {
        assert!(byte_offset + bytes.len() <= MEMORY_LEN);
        let at = self
            .memory
            .as_mut_ptr()
            .cast::<u8>()
            .wrapping_add(byte_offset);
        // SAFETY: inside `memory`.
        unsafe { copy::write_shared(at, bytes) };
    }

    fn read(&self, byte_offset: usize, len: usize) -> Vec<u8> {
        assert!(byte_offset + len <= MEMORY_LEN);
        let at = self.memory.as_ptr().cast::<u8>().wrapping_add(byte_offset);
        let mut bytes = vec![0; len];
        // SAFETY: inside `memory`.
        unsafe { copy::read_shared(&mut bytes, at) };
        bytes
    }

    fn sge(&self, byte_offset: usize, len: usize) -> Sge {
        let length = u32::try_from(len).unwrap();
        Sge {
            addr: IOVA + byte_offset as u64,
            length,
            lkey: self.key,
        }
    }

    fn remote(&self, byte_offset: usize) -> Remote {
        Remote {
            addr: IOVA + byte_offset as u64,
            rkey: self.key,
        }
    }

    fn post_send(&mut self, wr_id: u64, op: SendOp, sges: &[Sge]) {
        let wr = SendWr {
            wr_id,
            op,
            data: Data::Gather(sges),
            flags: SendFlags::SIGNALED,
        };
        self.qp.post_send(&wr).unwrap();
    }

    fn post_recv(&mut self, wr_id: u64, sges: &[Sge]) {
        self.qp.post_recv(&RecvWr { wr_id, sges }).unwrap();
    }

    fn collect(&mut self) {
        while let Some(completion) = self.qp.poll_completion() {
            self.completions.push(completion);
        }
        while let Some(event) = self.qp.poll_event() {
            self.events.push(event);
        }
    }

    /// What completed so far on `queue`, as (wr_id, status); forgets all completions.
    fn statuses(&mut self, queue: Queue) -> Vec<(u64, WcStatus)> {
        let taken = std::mem::take(&mut self.completions);
        taken
            .iter()
            .filter(|(of, _)| *of == queue)
            .map(|(_, wc)| (wc.wr_id, wc.status))
            .collect()
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Deliver,
    Drop,
    Duplicate,
    Corrupt { bit: usize },
    Delay { ns: u64 },
}

/// A packet as it was sent.
#[derive(Debug, Clone, Copy)]
struct Sent {
    at: u64,
    from: usize,
    /// How many packets its sender had sent before.
    index: usize,
    headers: Headers,
    payload_len: usize,
}

impl Sent {
    fn opcode(&self) -> Opcode {
        self.headers.bth.opcode
    }

    fn psn(&self) -> Psn {
        self.headers.bth.psn
    }

    fn syndrome(&self) -> Option<Syndrome> {
        self.headers.aeth.map(|aeth| aeth.syndrome)
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = ["A", "B"][self.from];
        write!(
            f,
            "{:>9} {from} {:?} {:?}",
            self.at,
            self.psn(),
            self.opcode()
        )?;
        if let Some(syndrome) = self.syndrome() {
            write!(f, " {syndrome:?}")?;
        }
        write!(f, " {} bytes", self.payload_len)
    }
}

/// A packet on the wire.
struct Flight {
    due: u64,
    to: usize,
    bytes: Vec<u8>,
    identification: u16,
}

type Filter = Box<dyn FnMut(&Sent) -> Fate>;

/// Two connected nodes.
struct Pair {
    now: u64,
    addresses: [IpAddr; 2],
    nodes: [Node; 2],
    wire: Vec<Flight>,
    /// Every packet sent so far.
    sent: Vec<Sent>,
    filter: Filter,
    counts: [usize; 2],
}

fn config() -> QpConfig {
    QpConfig {
        pd: Pd(7),
        max_send_wr: 64,
        max_recv_wr: 64,
        max_send_sge: 4,
        max_recv_sge: 4,
        max_inline: 64,
        sq_sig_all: false,
        window_max: 64,
        srq: None,
    }
}

/// Attributes of node `index` once connected to the other.
fn attr(index: usize, mtu: Mtu) -> Attr {
    let psns = [FIRST_PSN, Psn::new(0x1000)];
    Attr {
        access: ALL_RIGHTS,
        path_mtu: mtu,
        dest_qpn: Qpn::new(0x12 - u32::try_from(index).unwrap()),
        remote: ADDRESSES[1 - index],
        rq_psn: psns[1 - index],
        sq_psn: psns[index],
        max_rd_atomic: 4,
        max_dest_rd_atomic: 4,
        min_rnr_timer: 12,
        timeout: 10,
        retry_cnt: 6,
        rnr_retry: 6,
        ..Attr::default()
    }
}

const TO_INIT: AttrMask = AttrMask::STATE
    .union(AttrMask::PKEY_INDEX)
    .union(AttrMask::PORT)
    .union(AttrMask::ACCESS_FLAGS);
const TO_RTR: AttrMask = AttrMask::STATE
    .union(AttrMask::AV)
    .union(AttrMask::PATH_MTU)
    .union(AttrMask::DEST_QPN)
    .union(AttrMask::RQ_PSN)
    .union(AttrMask::MAX_DEST_RD_ATOMIC)
    .union(AttrMask::MIN_RNR_TIMER);
const TO_RTS: AttrMask = AttrMask::STATE
    .union(AttrMask::TIMEOUT)
    .union(AttrMask::RETRY_CNT)
    .union(AttrMask::RNR_RETRY)
    .union(AttrMask::SQ_PSN)
    .union(AttrMask::MAX_QP_RD_ATOMIC);

fn move_to(qp: &mut Qp, attr: &Attr, state: QpState, mask: AttrMask) {
    qp.modify(&Attr { state, ..*attr }, mask).unwrap();
}

fn to_rts(qp: &mut Qp, attr: &Attr) {
    move_to(qp, attr, QpState::Init, TO_INIT);
    move_to(qp, attr, QpState::Rtr, TO_RTR);
    move_to(qp, attr, QpState::Rts, TO_RTS);
}

fn deliver_all() -> Filter {
    Box::new(|_| Fate::Deliver)
}

impl Pair {
    fn new() -> Self {
        Pair::with(config(), |_, attr| *attr)
    }

    /// A connected pair whose attributes went through `adjust` (node, attributes) first.
    fn with(config: QpConfig, adjust: impl Fn(usize, &Attr) -> Attr) -> Self {
        Pair::between(ADDRESSES, config, adjust)
    }

    /// The same at other addresses.
    fn between(
        addresses: [IpAddr; 2],
        config: QpConfig,
        adjust: impl Fn(usize, &Attr) -> Attr,
    ) -> Self {
        let mut nodes = [A, B].map(|index| Node::new(index, addresses[index], config));
        for (index, node) in nodes.iter_mut().enumerate() {
            let attr = Attr {
                remote: addresses[1 - index],
                ..attr(index, Mtu::Mtu256)
            };
            to_rts(&mut node.qp, &adjust(index, &attr));
        }
        let filter = deliver_all();
        Pair {
            now: 0,
            addresses,
            nodes,
            wire: Vec::new(),
            sent: Vec::new(),
            filter,
            counts: [0; 2],
        }
    }

    fn filtered(mut self, filter: impl FnMut(&Sent) -> Fate + 'static) -> Self {
        self.filter = Box::new(filter);
        self
    }

    /// Loses the packets of `from` with these indices.
    fn losing(self, from: usize, indices: &'static [usize]) -> Self {
        self.filtered(move |sent| {
            if sent.from == from && indices.contains(&sent.index) {
                Fate::Drop
            } else {
                Fate::Deliver
            }
        })
    }

    /// Lets time pass until nothing is on the wire and no timer runs.
    fn drive(&mut self) {
        self.drive_until(u64::MAX);
    }

    /// Lets time pass until nothing can happen before `deadline`.
    fn drive_until(&mut self, deadline: u64) {
        for _ in 0..1_000_000 {
            self.transmit();
            let Some(next) = self.next_event().filter(|next| *next <= deadline) else {
                if deadline != u64::MAX {
                    self.now = deadline;
                }
                return;
            };
            self.now = self.now.max(next);
            self.deliver();
        }
        panic!("the pair does not come to rest:\n{}", self.trace());
    }

    fn next_event(&self) -> Option<u64> {
        let timers = self.nodes.iter().filter_map(|node| node.qp.poll_timeout());
        let is_held = self.nodes.iter().any(|node| node.qp.holds_ack());
        let held = is_held.then_some(self.now + HOLD_NS);
        self.wire
            .iter()
            .map(|flight| flight.due)
            .chain(timers)
            .chain(held)
            .min()
    }

    fn transmit(&mut self) {
        for from in [A, B] {
            loop {
                let node = &mut self.nodes[from];
                let is_more =
                    node.qp
                        .poll_transmit(self.now, &mut node.mem, &mut node.tx, node.ack_time);
                node.collect();
                self.send_off(from);
                if !is_more {
                    break;
                }
            }
        }
    }

    /// Moves what `from` wrote onto the wire, as the filter says.
    fn send_off(&mut self, from: usize) {
        let packets: Vec<Vec<u8>> = self.nodes[from]
            .tx
            .packets()
            .map(|(_, bytes)| bytes.to_vec())
            .collect();
        self.nodes[from].tx.clear();
        let mut identification = 0;
        for bytes in packets {
            let packet = Packet::parse(&bytes).expect("what is sent is well formed");
            let index = self.counts[from];
            self.counts[from] += 1;
            let payload_len = packet.payload.len();
            let sent = Sent {
                at: self.now,
                from,
                index,
                headers: packet.headers,
                payload_len,
            };
            self.sent.push(sent);
            // The next place in a run, or the first of another.
            let flow = self.flow(from);
            identification += 1;
            if !flow.is_exact(identification, &bytes) {
                identification = 0;
                assert!(flow.is_exact(0, &bytes), "the ICRC is right");
            }
            let due = self.now + LATENCY_NS;
            let flight = Flight {
                due,
                to: 1 - from,
                bytes,
                identification,
            };
            let fate = (self.filter)(&sent);
            self.launch(flight, fate);
        }
    }

    fn launch(&mut self, mut flight: Flight, fate: Fate) {
        match fate {
            Fate::Drop => return,
            Fate::Deliver => {}
            Fate::Duplicate => {
                let due = flight.due + 1;
                self.wire.push(Flight {
                    due,
                    bytes: flight.bytes.clone(),
                    ..flight
                });
            }
            Fate::Corrupt { bit } => {
                let bit = bit % (flight.bytes.len() * 8);
                flight.bytes[bit / 8] ^= 1 << (bit % 8);
            }
            Fate::Delay { ns } => flight.due += ns,
        }
        self.wire.push(flight);
    }

    /// Hands over what is due, in the order of arrival, then lets due timers fire.
    fn deliver(&mut self) {
        self.wire.sort_by_key(|flight| flight.due);
        let later = self.wire.partition_point(|flight| flight.due <= self.now);
        let due: Vec<Flight> = self.wire.drain(..later).collect();
        for flight in due {
            if self
                .flow(1 - flight.to)
                .is_exact(flight.identification, &flight.bytes)
            {
                self.inject(flight.to, &flight.bytes);
            }
        }
        for node in &mut self.nodes {
            node.qp.handle_timeout(self.now);
            node.collect();
        }
    }

    /// Hands a UDP payload to node `to` as if it came from the other one.
    fn inject(&mut self, to: usize, bytes: &[u8]) {
        let Ok(packet) = Packet::parse(bytes) else {
            return;
        };
        let node = &mut self.nodes[to];
        node.qp.handle_packet_sharing(
            self.now,
            self.addresses[1 - to],
            &packet,
            &mut node.mem,
            node.srq.as_mut(),
        );
        node.collect();
    }

    /// Builds a packet and hands it to node `to`.
    fn inject_built(&mut self, to: usize, headers: &Headers, payload: &[u8]) {
        let mut tx = TxBuf::new(SocketAddr::new(self.addresses[1 - to], ROCE_PORT));
        assert!(
            tx.push(self.addresses[to], headers, payload.len(), |bytes| {
                bytes.copy_from_slice(payload);
                true
            })
        );
        let bytes = tx.packets().next().unwrap().1.to_vec();
        self.inject(to, &bytes);
    }

    fn flow(&self, from: usize) -> Flow {
        let at = |index: usize| SocketAddr::new(self.addresses[index], ROCE_PORT);
        Flow::new(at(from), at(1 - from))
    }

    /// Opcodes sent by `from` so far.
    fn opcodes(&self, from: usize) -> Vec<Opcode> {
        self.sent
            .iter()
            .filter(|sent| sent.from == from)
            .map(Sent::opcode)
            .collect()
    }

    /// Every packet so far, one a line.
    fn trace(&self) -> String {
        self.sent.iter().map(|sent| format!("{sent}\n")).collect()
    }

    /// Asserts what completed on A's send queue since the last look.
    #[track_caller]
    fn expect_sends(&mut self, expected: &[(u64, WcStatus)]) {
        let statuses = self.nodes[A].statuses(Queue::Send);
        assert_eq!(statuses, expected, "trace:\n{}", self.trace());
    }

    /// Asserts what completed on B's receive queue since the last look.
    #[track_caller]
    fn expect_receives(&mut self, expected: &[(u64, WcStatus)]) {
        let statuses = self.nodes[B].statuses(Queue::Recv);
        assert_eq!(statuses, expected, "trace:\n{}", self.trace());
    }

    #[track_caller]
    fn expect_states(&self, a: QpState, b: QpState) {
        let states = [self.nodes[A].qp.state(), self.nodes[B].qp.state()];
        assert_eq!(states, [a, b], "trace:\n{}", self.trace());
    }
}

/// `len` bytes that depend on `seed` and their place.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i * 7 + i / 251) % 256).unwrap() ^ seed)
        .collect()
}

fn write_op(remote: Remote) -> SendOp {
    SendOp::Write { remote, imm: None }
}

const SUCCESS: WcStatus = WcStatus::Success;
const FLUSHED: WcStatus = WcStatus::WrFlushErr;
