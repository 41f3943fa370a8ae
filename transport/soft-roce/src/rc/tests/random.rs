//! Random work over a random wire, checked against an oracle.
//!
//! Node A is the oracle's author: it knows in which order its requests execute at B, so it can say
//! what each READ and atomic must return, what B's memory and receives must hold in the end, and in
//! which order everything completes. B works against A at the same time.

use std::collections::VecDeque;
use std::ops::Range;

use super::*;

/// SplitMix64: enough randomness for a schedule, and replayable.
#[derive(Clone)]
pub(super) struct Rng(pub(super) u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap()
    }

    pub(super) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let seed = self.next().to_le_bytes()[0];
        pattern(seed, len)
    }
}

/// The memory of a node: its requests' own buffers, what its peer may touch, and receive buffers.
const SOURCE: usize = 0;
const TARGET: usize = 64 * 1024;
const TARGET_LEN: usize = 16 * 1024;
const RECEIVE: usize = 128 * 1024;
const SLOT_LEN: usize = 4096;
const LEN_MAX: usize = 4000;
const SLOTS: usize = 16;

/// What must come of a request.
struct Expected {
    wr_id: u64,
    is_signaled: bool,
    opcode: WcOpcode,
    /// What the request's own buffer must hold in the end.
    buffer: Vec<u8>,
    slot: usize,
    /// The peer's bytes that it reads. Until it is complete, only fenced requests may change them.
    reads: Range<usize>,
}

/// What the peer must receive.
struct Receipt {
    bytes: Option<Vec<u8>>,
    byte_len: usize,
    imm: Option<[u8; 4]>,
}

/// One direction: requests of `from` and what must come of them.
struct Oracle {
    from: usize,
    /// The peer's target memory when all requests so far are executed.
    target: Vec<u8>,
    sends: VecDeque<Expected>,
    receipts: VecDeque<Receipt>,
    posted: u64,
    receives_posted: u64,
    receives_done: u64,
}

impl Oracle {
    fn new(from: usize) -> Self {
        Oracle {
            from,
            target: vec![0; TARGET_LEN],
            sends: VecDeque::new(),
            receipts: VecDeque::new(),
            posted: 0,
            receives_posted: 0,
            receives_done: 0,
        }
    }

    fn post_random(&mut self, pair: &mut Pair, rng: &mut Rng) {
        if self.sends.len() == SLOTS {
            return;
        }
        let slot = usize::try_from(self.posted).unwrap() % SLOTS;
        let len = match rng.below(4) {
            0 => rng.below(9),
            1 => rng.below(600),
            _ => rng.below(LEN_MAX),
        };
        let bytes = rng.bytes(len);
        let (op, buffer, touches) = self.choose(pair, rng, &bytes);
        let is_read = matches!(op, SendOp::Read { .. });
        let must_wait = !is_read && self.sends.iter().any(|sent| overlap(&sent.reads, &touches));
        let at = SOURCE + slot * SLOT_LEN;
        let is_signaled = rng.chance(70);
        let node = &mut pair.nodes[self.from];
        let mut source = bytes;
        source.resize(buffer.len(), 0);
        node.write(at, &source);
        let cut = rng.below(buffer.len() + 1);
        let sges = [node.sge(at, cut), node.sge(at + cut, buffer.len() - cut)];
        let mut flags = SendFlags::empty();
        flags.set(SendFlags::SIGNALED, is_signaled);
        flags.set(SendFlags::FENCE, must_wait || rng.chance(10));
        let is_inline = !op.is_rd_atomic() && source.len() <= 64 && rng.chance(50);
        let data = if is_inline {
            Data::Inline(&source)
        } else {
            Data::Gather(&sges)
        };
        let wr_id = self.posted;
        node.qp
            .post_send(&SendWr {
                wr_id,
                op,
                data,
                flags,
            })
            .unwrap();
        self.posted += 1;
        let opcode = op.wc_opcode();
        let reads = if is_read { touches } else { 0..0 };
        self.sends.push_back(Expected {
            wr_id,
            is_signaled,
            opcode,
            buffer,
            slot,
            reads,
        });
    }

    /// A random operation, executed on the model; returns what its buffer will hold, and which of
    /// the peer's bytes it touches.
    fn choose(
        &mut self,
        pair: &Pair,
        rng: &mut Rng,
        bytes: &[u8],
    ) -> (SendOp, Vec<u8>, Range<usize>) {
        let peer = &pair.nodes[1 - self.from];
        let at = rng.below(TARGET_LEN - LEN_MAX);
        let remote = peer.remote(TARGET + at);
        let touches = at..at + bytes.len();
        let word = at & !7;
        let remote_word = peer.remote(TARGET + word);
        let imm = rng
            .chance(50)
            .then(|| rng.next().to_le_bytes()[..4].try_into().unwrap());
        match rng.below(10) {
            0 | 1 => {
                let (received, byte_len) = (Some(bytes.to_vec()), bytes.len());
                self.receipts.push_back(Receipt {
                    bytes: received,
                    byte_len,
                    imm,
                });
                (SendOp::Send { imm }, bytes.to_vec(), 0..0)
            }
            2..=4 => {
                self.target[at..at + bytes.len()].copy_from_slice(bytes);
                if imm.is_some() {
                    let byte_len = bytes.len();
                    self.receipts.push_back(Receipt {
                        bytes: None,
                        byte_len,
                        imm,
                    });
                }
                (SendOp::Write { remote, imm }, bytes.to_vec(), touches)
            }
            5..=7 => {
                let found = self.target[touches.clone()].to_vec();
                (SendOp::Read { remote }, found, touches)
            }
            8 => {
                let add = rng.next();
                let old = self.word(word);
                self.set_word(word, old.wrapping_add(add));
                let op = SendOp::FetchAdd {
                    remote: remote_word,
                    add,
                };
                (op, old.to_le_bytes().to_vec(), word..word + 8)
            }
            _ => {
                let (old, swap) = (self.word(word), rng.next());
                let compare = if rng.chance(50) { old } else { rng.next() };
                if compare == old {
                    self.set_word(word, swap);
                }
                let op = SendOp::CompareSwap {
                    remote: remote_word,
                    compare,
                    swap,
                };
                (op, old.to_le_bytes().to_vec(), word..word + 8)
            }
        }
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.target[at..at + 8].try_into().unwrap())
    }

    fn set_word(&mut self, at: usize, value: u64) {
        self.target[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Keeps up to a few receives posted at the peer, not always enough.
    fn post_receives(&mut self, pair: &mut Pair, rng: &mut Rng, at_least: u64) {
        let target = self.receives_done + at_least.max(rng.below(4) as u64);
        while self.receives_posted < target {
            let slot = usize::try_from(self.receives_posted).unwrap() % SLOTS;
            let node = &mut pair.nodes[1 - self.from];
            let cut = rng.below(SLOT_LEN);
            let at = RECEIVE + slot * SLOT_LEN;
            let sges = [node.sge(at, cut), node.sge(at + cut, SLOT_LEN - cut)];
            node.post_recv(self.receives_posted, &sges);
            self.receives_posted += 1;
        }
    }

    fn check_completions(&mut self, pair: &mut Pair) {
        let from = std::mem::take(&mut pair.nodes[self.from].completions);
        let (sends, other) = from
            .into_iter()
            .partition(|(queue, _)| *queue == Queue::Send);
        pair.nodes[self.from].completions = other;
        for (_, wc) in sends {
            self.check_send(pair, &wc);
        }
        let to = std::mem::take(&mut pair.nodes[1 - self.from].completions);
        let (receives, other) = to.into_iter().partition(|(queue, _)| *queue == Queue::Recv);
        pair.nodes[1 - self.from].completions = other;
        for (_, wc) in receives {
            self.check_receive(pair, &wc);
        }
    }

    fn check_send(&mut self, pair: &Pair, wc: &Wc) {
        loop {
            let expected = self
                .sends
                .pop_front()
                .expect("a completion for each request at most");
            self.check_buffer(pair, &expected);
            if expected.is_signaled {
                let ended = (expected.wr_id, WcStatus::Success, expected.opcode);
                assert_eq!((wc.wr_id, wc.status, wc.opcode), ended);
                return;
            }
        }
    }

    fn check_buffer(&self, pair: &Pair, expected: &Expected) {
        let at = SOURCE + expected.slot * SLOT_LEN;
        let held = pair.nodes[self.from].read(at, expected.buffer.len());
        assert!(
            held == expected.buffer,
            "buffer of request {}:\n{}",
            expected.wr_id,
            pair.trace()
        );
    }

    fn check_receive(&mut self, pair: &Pair, wc: &Wc) {
        let receipt = self
            .receipts
            .pop_front()
            .expect("a receive for each message at most");
        assert_eq!(
            (wc.wr_id, wc.status),
            (self.receives_done, WcStatus::Success)
        );
        assert_eq!(
            (wc.byte_len as usize, wc.imm),
            (receipt.byte_len, receipt.imm)
        );
        if let Some(bytes) = receipt.bytes {
            assert_eq!(wc.opcode, WcOpcode::Recv);
            let at = RECEIVE + usize::try_from(self.receives_done).unwrap() % SLOTS * SLOT_LEN;
            let held = pair.nodes[1 - self.from].read(at, bytes.len());
            assert!(
                held == bytes,
                "bytes of receive {}:\n{}",
                wc.wr_id,
                pair.trace()
            );
        } else {
            assert_eq!(wc.opcode, WcOpcode::RecvRdmaWithImm);
        }
        self.receives_done += 1;
    }

    fn check_end(&mut self, pair: &Pair) {
        for expected in std::mem::take(&mut self.sends) {
            assert!(
                !expected.is_signaled,
                "request {} never completed",
                expected.wr_id
            );
            self.check_buffer(pair, &expected);
        }
        assert!(self.receipts.is_empty(), "messages were not received");
        let held = pair.nodes[1 - self.from].read(TARGET, TARGET_LEN);
        assert!(held == self.target, "the peer's memory:\n{}", pair.trace());
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// A wire that loses, repeats, damages and delays up to so many percent of the packets.
fn random_wire(mut rng: Rng) -> impl FnMut(&Sent) -> Fate {
    let [drop, duplicate, corrupt, delay] = [5, 5, 3, 10].map(|max| rng.below(max + 1));
    move |_| {
        if rng.chance(drop) {
            Fate::Drop
        } else if rng.chance(duplicate) {
            Fate::Duplicate
        } else if rng.chance(corrupt) {
            Fate::Corrupt {
                bit: rng.below(40_000),
            }
        } else if rng.chance(delay) {
            Fate::Delay {
                ns: rng.next() % 20_000,
            }
        } else {
            Fate::Deliver
        }
    }
}

fn run(seed: u64) {
    let mut rng = Rng(seed);
    let mtus = [
        Mtu::Mtu256,
        Mtu::Mtu512,
        Mtu::Mtu1024,
        Mtu::Mtu2048,
        Mtu::Mtu4096,
    ];
    let path_mtu = mtus[rng.below(mtus.len())];
    let rd_atomic = u8::try_from(1 + rng.below(4)).unwrap();
    let mut pair = Pair::with(config(), |_, attr| Attr {
        path_mtu,
        max_rd_atomic: rd_atomic,
        max_dest_rd_atomic: rd_atomic,
        retry_cnt: 7,
        rnr_retry: 7,
        min_rnr_timer: 3,
        timeout: 8,
        ..*attr
    })
    .filtered(random_wire(Rng(rng.next())));
    for node in &mut pair.nodes {
        if rng.chance(50) {
            node.ack_time = AckTime::WithNextTurn;
        }
    }
    let mut oracles = [A, B].map(Oracle::new);
    for _ in 0..60 {
        for oracle in &mut oracles {
            for _ in 0..rng.below(4) {
                oracle.post_random(&mut pair, &mut rng);
            }
            oracle.post_receives(&mut pair, &mut rng, 0);
        }
        let pause = rng.next() % 50_000;
        pair.drive_until(pair.now + pause);
        oracles
            .iter_mut()
            .for_each(|oracle| oracle.check_completions(&mut pair));
    }
    while oracles.iter().any(|oracle| !oracle.receipts.is_empty()) {
        for oracle in &mut oracles {
            oracle.post_receives(&mut pair, &mut rng, 4);
        }
        pair.drive_until(pair.now + 1_000_000);
        oracles
            .iter_mut()
            .for_each(|oracle| oracle.check_completions(&mut pair));
        pair.expect_states(QpState::Rts, QpState::Rts);
    }
    pair.drive();
    oracles
        .iter_mut()
        .for_each(|oracle| oracle.check_completions(&mut pair));
    oracles
        .iter_mut()
        .for_each(|oracle| oracle.check_end(&pair));
    pair.expect_states(QpState::Rts, QpState::Rts);
}

/// Runs seeds 0 to 299, or the one that `FARLOG_SEED` names.
#[test]
fn random_work_over_a_random_wire_is_exact() {
    let seeds = match std::env::var("FARLOG_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("FARLOG_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..300,
    };
    for seed in seeds {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!(
                "seed {seed} failed; replay it with\n  FARLOG_SEED={seed} cargo test -p soft-roce \
                 random_work_over_a_random_wire"
            );
            std::panic::resume_unwind(panic);
        }
    }
}
