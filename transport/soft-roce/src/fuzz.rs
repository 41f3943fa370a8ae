//! What is fuzzed: the codec, and a whole device.
//!
//! `scripts/fuzz` feeds these functions from libFuzzer, `cargo test` from the corpora it has found
//! (`fuzz/corpus`). They panic if a promise is broken.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

use crate::device::{CompletionQueue, Service};
use crate::link::Frame;
use crate::mr_table::{AccessFlags, Bind, Key, Pd, WindowType};
use crate::qp::{Attr, AttrMask, Mtu, QpConfig, QpState};
use crate::rc::AckTime;
use crate::srq::{SrqAttr, SrqAttrMask, SrqNumber, SrqRef};
use crate::ud::Port;
use crate::virtual_device::{CQE, RC_STEPS, REMOTE_RIGHTS, UD_STEPS, VirtualDevice};
use crate::wire::icrc::{Flow, ICRC_LEN};
use crate::wire::{
    Aeth, AtomicEth, Deth, ExtHeaders, Headers, Opcode, Packet, Psn, Qpn, ROCE_PORT, Reth,
    Syndrome, UDP_PAYLOAD_MAX, pad_count,
};
use crate::work::{Data, Destination, RecvWr, SendFlags, SendOp, SendWr};

/// Parses any bytes; what parses is written again and parses to the same.
pub fn codec(data: &[u8]) {
    let Ok(packet) = Packet::parse(data) else {
        return;
    };
    let mut bytes = vec![0; packet.headers.len()];
    assert_eq!(packet.headers.emit(&mut bytes), bytes.len());
    let pad = usize::from(packet.headers.bth.pad_count);
    bytes.extend_from_slice(packet.payload);
    bytes.resize(bytes.len() + pad + ICRC_LEN, 0);
    assert_eq!(Packet::parse(&bytes), Ok(packet), "emitted {bytes:02x?}");
    assert!(!packet.to_string().is_empty());
    if bytes.len() <= UDP_PAYLOAD_MAX {
        let flow = flow();
        flow.seal(7, &mut bytes);
        assert_eq!(flow.verify(0, &bytes), Some(7));
    }
}

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const FILL: u8 = 0xa5;
const PD: Pd = Pd(3);
const MEMORY_LEN: usize = 16 * 1024;
/// What peers may change.
const TARGET: Range<usize> = 1024..5120;
/// What peers may read only.
const READABLE: Range<usize> = 6000..7000;
/// Where receives and the device's own READs and atomics deliver.
const DELIVERY: Range<usize> = 8192..9192;
/// First PSN of the peer's requests, and of the device's own.
const PEER_PSN: Psn = Psn::new(0xff_fffc);
const OWN_PSN: Psn = Psn::new(0xff_fff8);
/// Two connections and two queue pairs for datagrams; the second of each takes from one shared receive
/// queue.
const QPS: usize = 4;
const QKEY: u32 = 0x1234;
const WR_MAX: usize = 8;
/// Steps of one input.
const STEPS_MAX: usize = 200;
/// Packets sent for one that comes in: a READ of all that is readable, and whatever it sets free.
const SENT_PER_STEP_MAX: usize = 400;

/// Lets a peer that knows every key, and keeps no rule, loose on a device with requests of its own.
///
/// Each step of the input is a packet with a right ICRC, structured or of any bytes, a pause, or
/// something that the application does. No byte may change but those that the peer may write and
/// those that receives, READs and atomics deliver to; no request completes twice; no packet makes
/// the device send without end.
pub fn device(data: &[u8]) {
    let mut bench = Bench::new();
    let mut input = Input(data);
    for _ in 0..STEPS_MAX {
        let Some(step) = input.byte() else { break };
        match step % 16 {
            0..=9 => bench.structured_packet(&mut input),
            10 => bench.raw_packet(&mut input),
            11 | 12 => bench.pause(&mut input),
            13 => bench.post_send(&mut input),
            14 => bench.post_recv(&mut input),
            _ => bench.manage(&mut input),
        }
        bench.drive();
    }
    bench.check_memory();
}

/// Bytes of the fuzzer, taken from the front; zeros at the end of a step.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    fn u8(&mut self) -> u8 {
        self.byte().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.u8()))
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

/// A device, and what is known of it.
struct Bench {
    device: VirtualDevice,
    cq: Arc<CompletionQueue>,
    qps: [Qpn; QPS],
    srq: SrqNumber,
    /// Target, readable, all memory for local use, a window to the target, and one of nothing.
    keys: [Key; 5],
    now: u64,
    posted: u64,
    completed: HashSet<u64>,
}

impl Bench {
    fn new() -> Self {
        let mut device = VirtualDevice::new(OWN, 1, MEMORY_LEN, FILL);
        let target = device.register(TARGET, REMOTE_RIGHTS | AccessFlags::MW_BIND, PD);
        let readable = device.register(READABLE, AccessFlags::REMOTE_READ, PD);
        let local = device.register(0..MEMORY_LEN, AccessFlags::LOCAL_WRITE, PD);
        let window = device.engine.regions.alloc_window(PD, WindowType::Type2);
        let window = window.expect("the table is nearly empty");
        let cq = device.completion_queue(CQE);
        let srq = device.create_srq(WR_MAX, 1);
        let qps = std::array::from_fn(|index| {
            let service = if is_for_datagrams(index) {
                Service::Ud(Port {
                    address: OWN,
                    mtu: Mtu::Mtu1024,
                })
            } else {
                Service::Rc
            };
            let shared = SrqRef {
                number: srq,
                pd: PD,
            };
            let config = QpConfig {
                srq: is_sharing(index).then_some(shared),
                ..config()
            };
            device.create_qp(service, config, &cq, &cq)
        });
        let mut bench = Self {
            device,
            cq,
            qps,
            srq,
            keys: [target, readable, local, window, Key(0x77)],
            now: 1,
            posted: 0,
            completed: HashSet::new(),
        };
        for index in 0..QPS {
            bench.connect(index);
        }
        bench
    }

    fn connect(&mut self, index: usize) {
        let steps = if is_for_datagrams(index) {
            UD_STEPS
        } else {
            RC_STEPS
        };
        self.device.connect(self.qps[index], &attr(), &steps);
    }

    /// The queue pair that a step is about.
    fn index(choice: u8) -> usize {
        usize::from(choice & 3)
    }

    fn key(&self, choice: u8) -> Key {
        self.keys[usize::from(choice) % self.keys.len()]
    }

    /// A packet of any opcode, its numbers near what the queue pair expects.
    fn structured_packet(&mut self, input: &mut Input<'_>) {
        let opcode = Opcode::ALL[usize::from(input.u8()) % Opcode::ALL.len()];
        let choice = input.u8();
        let qpn = self.qps[Self::index(choice)];
        let base = if opcode.info().operation.is_request() {
            PEER_PSN
        } else {
            OWN_PSN
        };
        let psn = base + u32::from(input.u8());
        let has = opcode.info().headers;
        let place = self.device.remote(0, self.key(choice >> 1)).addr + u64::from(input.u16());
        let rkey = self.key(choice >> 1).0;
        let mut headers = Headers::new(opcode, qpn, psn);
        headers.bth.ack_req = choice & 8 != 0;
        headers.bth.is_solicited = choice & 16 != 0;
        let dma_len = if choice & 32 != 0 {
            input.u32()
        } else {
            input.u16().into()
        };
        headers.reth = has.contains(ExtHeaders::RETH).then_some(Reth {
            va: place,
            rkey,
            dma_len,
        });
        headers.atomic_eth = has.contains(ExtHeaders::ATOMIC_ETH).then_some(AtomicEth {
            va: place,
            rkey,
            swap_add: dma_len.into(),
            compare: u64::from_le_bytes([FILL; 8]),
        });
        headers.deth = has.contains(ExtHeaders::DETH).then_some(Deth {
            qkey: if choice & 64 == 0 { QKEY } else { 1 },
            src_qp: Qpn::new(0x11),
        });
        headers.aeth = has.contains(ExtHeaders::AETH).then(|| Aeth {
            syndrome: Syndrome::from_u8(input.u8()),
            msn: 0,
        });
        headers.atomic_ack = has.contains(ExtHeaders::ATOMIC_ACK).then_some(5);
        headers.imm = has.contains(ExtHeaders::IMM).then_some([1, 2, 3, 4]);
        headers.ieth = has.contains(ExtHeaders::IETH).then_some(rkey);
        let payload_len = match input.u8() {
            255 => 256,
            254 => usize::from(input.u16()) % 4097,
            len => usize::from(len),
        };
        let pad = pad_count(payload_len);
        headers.bth.pad_count = [0, 1, 2, 3][pad];
        let mut bytes = vec![0; headers.len()];
        headers.emit(&mut bytes);
        bytes.resize(bytes.len() + payload_len, choice);
        bytes.resize(bytes.len() + pad + ICRC_LEN, 0);
        self.deliver(bytes);
    }

    /// A packet of the fuzzer's own bytes.
    fn raw_packet(&mut self, input: &mut Input<'_>) {
        let len = usize::from(input.u8());
        let mut bytes = input.bytes(len).to_vec();
        bytes.resize(bytes.len() + ICRC_LEN, 0);
        self.deliver(bytes);
    }

    fn deliver(&mut self, mut udp_payload: Vec<u8>) {
        flow().seal(0, &mut udp_payload);
        self.device.port.deliver(Frame {
            src: PEER,
            dst: OWN,
            identification: 0,
            udp_payload,
        });
    }

    fn pause(&mut self, input: &mut Input<'_>) {
        self.now += 1000 * u64::from(input.u16());
    }

    /// The device sends something itself, so that answers mean something.
    fn post_send(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        let qpn = self.qps[Self::index(choice)];
        let remote = self.device.remote(0, self.keys[0]);
        let imm = (choice & 32 != 0).then_some([9; 4]);
        let (op, len) = match choice >> 2 & 7 {
            _ if is_for_datagrams(Self::index(choice)) => {
                let to = Destination {
                    pd: PD,
                    address: PEER,
                    qpn: Qpn::new(0x11),
                    qkey: QKEY,
                };
                (SendOp::Datagram { to, imm }, 500)
            }
            0 => (SendOp::Send { imm }, 300),
            1 => (SendOp::Write { remote, imm }, 700),
            2 | 3 => (SendOp::Read { remote }, 1000),
            4 => (SendOp::FetchAdd { remote, add: 1 }, 8),
            5 => {
                let (compare, swap) = (1, 2);
                let op = SendOp::CompareSwap {
                    remote,
                    compare,
                    swap,
                };
                (op, 8)
            }
            6 => (SendOp::SendInvalidate { rkey: self.keys[3] }, 0),
            _ if choice & 32 == 0 => (SendOp::LocalInvalidate { rkey: self.keys[3] }, 0),
            _ => {
                let bind = Bind {
                    rkey: self.keys[3],
                    region: self.keys[0],
                    addr: remote.addr + 100,
                    len: 1000,
                    access: REMOTE_RIGHTS,
                    is_zero_based: choice & 64 != 0,
                };
                (SendOp::BindWindow(bind), 0)
            }
        };
        let mut flags = SendFlags::SIGNALED;
        flags.set(SendFlags::FENCE, choice & 32 != 0);
        let sges = [self
            .device
            .sge(DELIVERY.start, len, self.key(2 + (choice >> 7)))];
        let wr = SendWr {
            wr_id: self.posted,
            op,
            data: Data::Gather(&sges),
            flags,
        };
        let result = self.device.engine.post_send(qpn, &wr);
        self.posted += u64::from(result.is_ok());
    }

    fn post_recv(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        let qpn = self.qps[Self::index(choice)];
        let len = usize::from(choice >> 1) * DELIVERY.len() / 127;
        let sges = [self.device.sge(DELIVERY.start, len, self.keys[2])];
        let wr = RecvWr {
            wr_id: self.posted,
            sges: &sges,
        };
        let result = if is_sharing(Self::index(choice)) {
            self.device.srq(self.srq).post(&wr)
        } else {
            self.device.engine.post_recv(qpn, &wr)
        };
        self.posted += u64::from(result.is_ok());
    }

    /// The application polls, revokes the target, or changes the state of a queue pair or the sizes of the
    /// shared receive queue.
    fn manage(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        let qpn = self.qps[Self::index(choice)];
        let modify = |device: &mut VirtualDevice, state, mask| {
            let attr = Attr { state, ..attr() };
            // A transition that is not allowed is refused, and changes nothing.
            let _ = device.engine.modify_qp(qpn, &attr, mask);
        };
        match choice >> 2 & 7 {
            0 => {
                let _ = self.device.engine.regions.deregister(self.keys[0]);
                self.check_memory();
            }
            1 => modify(&mut self.device, QpState::Sqd, AttrMask::STATE),
            2 => modify(&mut self.device, QpState::Rts, AttrMask::STATE),
            3 => modify(&mut self.device, QpState::Err, AttrMask::STATE),
            4 | 5 => {
                modify(&mut self.device, QpState::Reset, AttrMask::STATE);
                self.connect(Self::index(choice));
            }
            6 => {
                let size = usize::from(input.u8());
                let attr = SrqAttr {
                    max_wr: 1 + size % 16,
                    max_sge: 1,
                    limit: size / 16,
                };
                let mask = SrqAttrMask::MAX_WR | SrqAttrMask::LIMIT;
                // What does not fit is refused, and changes nothing.
                let _ = self.device.srq(self.srq).modify(&attr, mask);
            }
            _ => self.poll(),
        }
    }

    fn poll(&mut self) {
        let (posted, completed) = (self.posted, &mut self.completed);
        self.cq.pop(usize::MAX, |_, wc| {
            assert!(wc.wr_id < posted, "{wc} was never posted");
            assert!(completed.insert(wc.wr_id), "{wc} comes twice");
        });
    }

    fn drive(&mut self) {
        let mut sent = 0;
        loop {
            let turn = self.device.engine.drive(self.now, AckTime::Now);
            for frame in self.device.port.take_sent() {
                sent += 1;
                let packet = Packet::parse(&frame.udp_payload);
                assert!(packet.is_ok_and(|packet| packet.is_padded_right()));
                assert_eq!(frame.dst, PEER);
            }
            assert!(
                sent <= SENT_PER_STEP_MAX,
                "one packet makes it send on and on"
            );
            if turn.received == 0 && !turn.has_more {
                break;
            }
        }
        self.poll();
    }

    fn check_memory(&self) {
        for range in [
            0..TARGET.start,
            TARGET.end..DELIVERY.start,
            DELIVERY.end..MEMORY_LEN,
        ] {
            let untouched = vec![FILL; range.len()];
            let held = self.device.read(range.clone());
            assert!(held == untouched, "bytes of {range:?} were changed");
        }
    }
}

fn is_for_datagrams(index: usize) -> bool {
    index >= 2
}

fn is_sharing(index: usize) -> bool {
    index % 2 == 1
}

fn flow() -> Flow {
    let [src, dst] = [PEER, OWN].map(|ip| SocketAddr::new(ip, ROCE_PORT));
    Flow::new(src, dst)
}

fn config() -> QpConfig {
    QpConfig {
        pd: PD,
        max_send_wr: WR_MAX,
        max_recv_wr: WR_MAX,
        max_send_sge: 1,
        max_recv_sge: 1,
        max_inline: 0,
        sq_sig_all: false,
        window_max: 16,
        srq: None,
    }
}

fn attr() -> Attr {
    Attr {
        access: REMOTE_RIGHTS,
        path_mtu: Mtu::Mtu256,
        dest_qpn: Qpn::new(0x11),
        remote: PEER,
        rq_psn: PEER_PSN,
        sq_psn: OWN_PSN,
        qkey: QKEY,
        max_rd_atomic: 2,
        max_dest_rd_atomic: 2,
        min_rnr_timer: 1,
        timeout: 8,
        retry_cnt: 3,
        rnr_retry: 3,
        ..Attr::default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Feeds every kept input to `target`.
    fn replay(name: &str, target: impl Fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(name);
        let mut count = 0;
        for entry in std::fs::read_dir(&corpus).expect("the corpus is in the repository") {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count > 10, "{} holds {count} inputs", corpus.display());
    }

    #[test]
    fn the_codec_holds_on_the_corpus() {
        replay("codec", super::codec);
    }

    #[test]
    fn the_device_holds_on_the_corpus() {
        replay("device", super::device);
    }
}
