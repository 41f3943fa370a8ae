//! The work of a simulation: what is posted, and what must come of it.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use super::random::Rng;
use super::receives::Receives;
use super::windows::{Access, WindowAct};
use super::words::WordOp;
use super::{Node, World, overlap};
use crate::mr_table::Key;
use crate::qp::QpState;
use crate::virtual_device::word_of;
use crate::wire::Qpn;
use crate::work::{Data, Remote, SendFlags, SendOp, SendWr, Sge, WcOpcode, WcStatus};

/// Requests that one queue pair may have outstanding, and receives posted.
pub(super) const SLOTS: usize = 8;
/// Pieces of one request.
pub(super) const SGE_MAX: usize = 4;
/// Inline bytes of one request.
pub(super) const INLINE_MAX: usize = 100;
/// Words on which all that connect to a node contend.
pub(super) const WORDS: usize = 4;

/// The requests of one queue pair, and what they do to the node at the other end.
pub(super) struct Direction {
    pub(super) from: usize,
    pub(super) to: usize,
    /// The queue pair at `from`, and the completion queues for its sends and receives.
    pub(super) qpn: Qpn,
    pub(super) cqs: [usize; 2],
    /// Bytes of the longest message.
    pub(super) len_max: usize,
    /// Where `from` keeps the requests' own buffers.
    pub(super) sources: usize,
    /// What this direction alone may change at `to`, and its key: of a region, or of a window to one.
    pub(super) target: Range<usize>,
    pub(super) key: Key,
    pub(super) is_window: bool,
    /// The region below the window.
    pub(super) below: Key,
    pub(super) access: Access,
    /// What the target held when its window was closed.
    pub(super) closed: Option<Vec<u8>>,
    /// Its end closes the window without asking.
    pub(super) is_revoking: bool,
    /// The target when everything posted so far is executed.
    pub(super) ahead: Vec<u8>,
    pub(super) posted: u64,
    pub(super) pending: VecDeque<Pending>,
    pub(super) receipts: VecDeque<Receipt>,
    /// What `to` has posted to hear of the requests, if the queue pair there has receives of its own.
    pub(super) receives: Receives,
    /// It takes from the receives that `to` shares between queue pairs; the last one it took.
    pub(super) is_shared: bool,
    pub(super) last_shared: u64,
    /// The first error that its send queue reported.
    pub(super) first_error: Option<WcStatus>,
    /// Requests that failed: nobody knows how much of them was executed.
    pub(super) doubtful: Vec<Pending>,
    /// What the target held when its key was revoked.
    pub(super) revoked: Option<Vec<u8>>,
    /// A request was posted that must be refused: nothing behind it is executed.
    pub(super) is_doomed: bool,
    /// How often it has begun anew.
    pub(super) resets: usize,
    /// The send queue is drained: requests from this one on wait for RTS.
    pub(super) held_from: Option<u64>,
    /// The event that tells so has not come.
    pub(super) is_drain_awaited: bool,
}

/// A request that has not completed.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) wr_id: u64,
    pub(super) posted_at: u64,
    pub(super) is_signaled: bool,
    pub(super) opcode: WcOpcode,
    /// It needs a receive at the other end.
    pub(super) takes_receive: bool,
    pub(super) len: usize,
    pub(super) outcome: Outcome,
    /// What it brings into its own buffer.
    pub(super) returns: Returns,
    /// What it writes into the target, and where.
    pub(super) change: Option<(usize, Vec<u8>)>,
    /// The target's bytes that it reads. Until it is complete only fenced requests may change them.
    pub(super) reads: Range<usize>,
    /// Whether it works on the target, whose key may be revoked.
    pub(super) needs_key: bool,
    pub(super) window: Option<WindowAct>,
}

impl fmt::Display for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            wr_id,
            opcode,
            len,
            outcome,
            ..
        } = self;
        write!(
            f,
            "request {wr_id} ({opcode:?} of {len} bytes, {outcome:?})"
        )
    }
}

/// What must come of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Success, unless the connection fails.
    Good,
    /// This error.
    Refused(WcStatus),
    /// It is posted behind an error and never executed.
    Unreached,
}

/// What a request brings into its own buffer.
#[derive(Clone, Debug)]
pub(super) enum Returns {
    Nothing,
    Bytes(Vec<u8>),
    /// The value of a contended word: the operation's number in the word's history.
    Word {
        word: usize,
        number: usize,
    },
}

/// What the other end must receive.
#[derive(Clone, Debug)]
pub(super) struct Receipt {
    /// The request that it comes of.
    pub(super) wr_id: u64,
    pub(super) opcode: WcOpcode,
    pub(super) byte_len: usize,
    pub(super) imm: Option<[u8; 4]>,
    pub(super) invalidated: Option<Key>,
    pub(super) is_solicited: bool,
    /// What lies in the receive buffer then.
    pub(super) bytes: Option<Vec<u8>>,
    /// What lies in the target then, and where.
    pub(super) placed: Option<(usize, Vec<u8>)>,
}

/// A request on the drawing board.
pub(super) struct Draft {
    op: SendOp,
    /// What its own buffer holds when it is posted; its length is the request's.
    bytes: Vec<u8>,
    outcome: Outcome,
    returns: Returns,
    change: Option<(usize, Vec<u8>)>,
    touches: Range<usize>,
    needs_key: bool,
    /// It waits for what it would else disturb.
    is_fenced: bool,
    window: Option<WindowAct>,
}

impl Draft {
    fn new(op: SendOp, bytes: Vec<u8>) -> Self {
        Self {
            op,
            bytes,
            outcome: Outcome::Good,
            returns: Returns::Nothing,
            change: None,
            touches: 0..0,
            needs_key: false,
            is_fenced: false,
            window: None,
        }
    }

    pub(super) fn on_window(op: SendOp, act: WindowAct) -> Self {
        Self {
            window: Some(act),
            ..Self::new(op, Vec::new())
        }
    }

    fn on_target(self, touches: Range<usize>) -> Self {
        Self {
            needs_key: !touches.is_empty(),
            touches,
            ..self
        }
    }
}

impl Direction {
    /// Where the buffer of a request lies.
    pub(super) fn source_slot(&self, wr_id: u64, len: usize) -> Range<usize> {
        let index = usize::try_from(wr_id).expect("few requests") % SLOTS;
        let start = self.sources + index * self.len_max.next_multiple_of(8);
        start..start + len
    }

    /// Whether requests may be refused for their key.
    pub(super) fn is_losing_key(&self) -> bool {
        self.is_revoking || self.revoked.is_some()
    }

    /// Nothing more is heard of the requests: nobody knows how much of them is executed.
    pub(super) fn abandon(&mut self, node: &mut Node) {
        for request in std::mem::take(&mut self.pending) {
            if request.is_rd_atomic() {
                node.adopt(self.source_slot(request.wr_id, request.len));
            }
            self.doubtful.push(request);
        }
    }

    fn word(&self, at: usize) -> u64 {
        word_of(&self.ahead[at..at + 8])
    }
}

/// Bytes that the buffers of one direction take at one end.
pub(super) fn slots_len(len_max: usize) -> usize {
    SLOTS * len_max.next_multiple_of(8)
}

impl World {
    /// Posts a random request in direction `d`, if there is room.
    pub(super) fn post_random(&mut self, d: usize) {
        let direction = &self.directions[d];
        let node = &mut self.nodes[direction.from];
        let is_closed = !node.is_alive
            || node.device.state(direction.qpn) == QpState::Reset
            || self.connections[d / 2].is_unheard;
        if direction.pending.len() == SLOTS || is_closed {
            return;
        }
        let draft = if self.rng.below(10_000) < self.plan.misdeeds && !direction.is_doomed {
            self.draft_misdeed(d)
        } else {
            self.draft(d)
        };
        self.post(d, draft);
    }

    pub(super) fn post(&mut self, d: usize, mut draft: Draft) {
        let direction = &mut self.directions[d];
        let node = &mut self.nodes[direction.from];
        let is_flushed = node.device.state(direction.qpn) == QpState::Err;
        if is_flushed || direction.is_doomed {
            draft.outcome = Outcome::Unreached;
        } else if direction.revoked.is_some() && draft.needs_key && draft.outcome == Outcome::Good {
            draft.outcome = Outcome::Refused(WcStatus::RemAccessErr);
        }
        direction.is_doomed |= draft.outcome != Outcome::Good;
        let rng = &mut self.rng;
        let wr_id = direction.posted;
        let len = draft.bytes.len();
        let is_read = matches!(draft.op, SendOp::Read { .. });
        let is_in_order = is_read
            || !direction
                .pending
                .iter()
                .any(|sent| overlap(&sent.reads, &draft.touches));
        let is_signaled = rng.chance(70) || direction.pending.len() + 2 >= SLOTS;
        let is_solicited = rng.chance(20);
        let mut flags = SendFlags::empty();
        flags.set(SendFlags::SIGNALED, is_signaled);
        flags.set(SendFlags::SOLICITED, is_solicited);
        let is_fenced = draft.is_fenced || !is_in_order || rng.chance(5);
        flags.set(SendFlags::FENCE, is_fenced);
        let at = direction.source_slot(wr_id, len);
        node.set(at.start, &draft.bytes);
        let lkey = match draft.outcome {
            Outcome::Refused(WcStatus::LocProtErr) => Key(node.local_key.0 ^ 1),
            _ => node.local_key,
        };
        let sges: Vec<Sge> = pieces(rng, at.start, len)
            .map(|(at, len)| node.device.sge(at, len, lkey))
            .collect();
        let is_inline = !draft.op.is_rd_atomic()
            && !draft.op.is_local()
            && len <= INLINE_MAX
            && draft.outcome == Outcome::Good
            && rng.chance(50);
        let data = if is_inline {
            Data::Inline(&draft.bytes)
        } else {
            Data::Gather(&sges)
        };
        let wr = SendWr {
            wr_id,
            op: draft.op,
            data,
            flags,
        };
        node.device
            .engine
            .post_send(direction.qpn, &wr)
            .expect("there is room, and the request is well formed");
        if is_inline {
            // The bytes were copied: what becomes of them now does not matter.
            node.set(at.start, &vec![0x77; len]);
        }
        if draft.outcome == Outcome::Good {
            direction.foresee(&draft, wr_id, is_solicited);
        }
        direction.posted += 1;
        let reads = if is_read { draft.touches } else { 0..0 };
        direction.pending.push_back(Pending {
            wr_id,
            posted_at: self.now,
            is_signaled,
            opcode: draft.op.wc_opcode(),
            takes_receive: matches!(
                draft.op,
                SendOp::Send { .. }
                    | SendOp::SendInvalidate { .. }
                    | SendOp::Write { imm: Some(_), .. }
            ),
            len,
            outcome: draft.outcome,
            returns: draft.returns,
            change: draft.change,
            reads,
            needs_key: draft.needs_key,
            window: draft.window,
        });
        let from = direction.from;
        self.serve(from);
    }

    /// A request that must succeed.
    fn draft(&mut self, d: usize) -> Draft {
        if self.will_execute(d)
            && let Some(draft) = self.draft_window_act(d)
        {
            return draft;
        }
        let rng = &mut self.rng;
        let direction = &self.directions[d];
        let len = match rng.below(4) {
            0 => rng.below(9),
            1 => rng.below(direction.len_max.min(600)),
            _ => rng.below(direction.len_max),
        };
        let bytes = rng.bytes(len);
        let at = rng.below(direction.target.len() - len + 1);
        let imm = rng.chance(40).then(|| rng.next().to_le_bytes());
        let imm = imm.map(|[a, b, c, d, ..]| [a, b, c, d]);
        let remote = self.target(d, at);
        let touches = at..at + len;
        let direction = &self.directions[d];
        let is_open = direction.access == Access::Open || direction.revoked.is_some();
        match rng_kind(&mut self.rng) {
            Kind::Send if self.may_close(d) => self.draft_send_invalidate(d, bytes),
            Kind::Write | Kind::Read | Kind::OwnAtomic if !is_open => self.draft_word(d),
            Kind::Send => Draft::new(SendOp::Send { imm }, bytes),
            Kind::Write => Draft {
                change: Some((at, bytes.clone())),
                ..Draft::new(SendOp::Write { remote, imm }, bytes).on_target(touches)
            },
            Kind::Read => Draft {
                returns: Returns::Bytes(self.directions[d].ahead[touches.clone()].to_vec()),
                ..Draft::new(SendOp::Read { remote }, bytes).on_target(touches)
            },
            Kind::OwnAtomic => self.draft_own_atomic(d),
            Kind::Word => self.draft_word(d),
        }
    }

    /// Whether a SEND in direction `d` shall close the window that it uses.
    fn may_close(&mut self, d: usize) -> bool {
        let direction = &self.directions[d];
        let is_open = direction.is_window && direction.access == Access::Open;
        is_open && !direction.is_revoking && self.will_execute(d) && self.rng.chance(15)
    }

    /// A SEND that closes the window. It would cut off READs that go through it.
    fn draft_send_invalidate(&mut self, d: usize, bytes: Vec<u8>) -> Draft {
        let direction = &mut self.directions[d];
        direction.access = Access::Closing;
        let rkey = direction.key;
        Draft {
            is_fenced: true,
            ..Draft::new(SendOp::SendInvalidate { rkey }, bytes)
        }
    }

    /// An atomic on the target, whose words nobody else changes.
    fn draft_own_atomic(&mut self, d: usize) -> Draft {
        let at = 8 * self.rng.below(self.directions[d].target.len() / 8);
        let old = self.directions[d].word(at);
        let remote = self.target(d, at);
        let rng = &mut self.rng;
        let (op, new) = if rng.chance(50) {
            let add = rng.next();
            (SendOp::FetchAdd { remote, add }, old.wrapping_add(add))
        } else {
            let swap = rng.next();
            let compare = if rng.chance(50) { old } else { rng.next() };
            let op = SendOp::CompareSwap {
                remote,
                compare,
                swap,
            };
            (op, if compare == old { swap } else { old })
        };
        Draft {
            returns: Returns::Bytes(bytes_of(old).to_vec()),
            change: Some((at, bytes_of(new).to_vec())),
            ..Draft::new(op, rng.bytes(8)).on_target(at..at + 8)
        }
    }

    /// An atomic or READ on a word on which others work too.
    fn draft_word(&mut self, d: usize) -> Draft {
        let word = self.rng.below(WORDS);
        let node = &self.nodes[self.directions[d].to];
        let at = node.words.start + 8 * word;
        let remote = node.device.remote(at, node.words_key);
        let present = word_of(&node.device.read(at..at + 8));
        let rng = &mut self.rng;
        let (op, word_op) = match rng.below(5) {
            0 => (SendOp::Read { remote }, WordOp::Read),
            1 | 2 => {
                let (compare, swap) = (present, rng.next());
                let op = SendOp::CompareSwap {
                    remote,
                    compare,
                    swap,
                };
                (op, WordOp::Swap { compare, swap })
            }
            _ => {
                let add = rng.next();
                (SendOp::FetchAdd { remote, add }, WordOp::Add(add))
            }
        };
        let bytes = rng.bytes(8);
        let number = if self.will_execute(d) {
            let tick = self.tick();
            let to = self.directions[d].to;
            let queue = (d, self.directions[d].resets);
            self.nodes[to].histories[word].post(word_op, queue, tick)
        } else {
            usize::MAX
        };
        Draft {
            returns: Returns::Word { word, number },
            ..Draft::new(op, bytes)
        }
    }

    /// Whether a good request posted now may be executed.
    fn will_execute(&mut self, d: usize) -> bool {
        let direction = &self.directions[d];
        let state = self.nodes[direction.from].device.state(direction.qpn);
        !direction.is_doomed && state != QpState::Err
    }

    /// A request that must be refused, and ends the connection.
    fn draft_misdeed(&mut self, d: usize) -> Draft {
        let direction = &self.directions[d];
        let len = 1 + self.rng.below(direction.len_max - 1);
        let end = direction.target.len();
        let to = &self.nodes[direction.to];
        let inside = self.target(d, 0);
        // Not a tag that a bind under way may give.
        let unknown = Key(direction.key.0 ^ 0x80);
        let is_closed = direction.access == Access::Closed;
        let choice = match direction.access {
            Access::Open => self.rng.below(6),
            Access::Closed => self.rng.below(3),
            Access::Opening | Access::Closing => 3 + self.rng.below(2),
        };
        let (remote, status) = match choice {
            _ if is_closed => (inside, WcStatus::RemAccessErr),
            0 | 1 => (self.target(d, end - len + 1), WcStatus::RemAccessErr),
            2 => {
                let before = inside.addr - 1;
                (
                    Remote {
                        addr: before,
                        ..inside
                    },
                    WcStatus::RemAccessErr,
                )
            }
            3 => {
                let rkey = to.local_key;
                (Remote { rkey, ..inside }, WcStatus::RemAccessErr)
            }
            4 => {
                let rkey = unknown;
                (Remote { rkey, ..inside }, WcStatus::RemAccessErr)
            }
            _ => (inside, WcStatus::LocProtErr),
        };
        let bytes = self.rng.bytes(len);
        // A READ into a wrong place fails with its response: requests behind it are executed.
        let is_write = self.rng.chance(50) || status == WcStatus::LocProtErr;
        let op = if is_write {
            SendOp::Write { remote, imm: None }
        } else {
            SendOp::Read { remote }
        };
        self.connections[d / 2].can_fail = true;
        Draft {
            outcome: Outcome::Refused(status),
            needs_key: true,
            ..Draft::new(op, bytes)
        }
    }

    fn target(&self, d: usize, at: usize) -> Remote {
        let direction = &self.directions[d];
        let device = &self.nodes[direction.to].device;
        device.remote(direction.target.start + at, direction.key)
    }
}

impl Direction {
    /// Executes a request on the model, and says what the other end must receive.
    fn foresee(&mut self, draft: &Draft, wr_id: u64, is_solicited: bool) {
        if let Some((at, bytes)) = &draft.change {
            self.ahead[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let receipt = Receipt {
            wr_id,
            opcode: WcOpcode::Recv,
            byte_len: draft.bytes.len(),
            imm: None,
            invalidated: None,
            is_solicited,
            bytes: None,
            placed: None,
        };
        match draft.op {
            SendOp::Send { imm } => self.receipts.push_back(Receipt {
                imm,
                bytes: Some(draft.bytes.clone()),
                ..receipt
            }),
            SendOp::SendInvalidate { rkey } => self.receipts.push_back(Receipt {
                invalidated: Some(rkey),
                bytes: Some(draft.bytes.clone()),
                ..receipt
            }),
            SendOp::Write { imm: Some(imm), .. } => self.receipts.push_back(Receipt {
                imm: Some(imm),
                opcode: WcOpcode::RecvRdmaWithImm,
                placed: draft.change.clone(),
                ..receipt
            }),
            _ => {}
        }
    }
}

/// Consecutive pieces that make up `len` bytes from `start`.
pub(super) fn pieces(
    rng: &mut Rng,
    start: usize,
    len: usize,
) -> impl Iterator<Item = (usize, usize)> + use<> {
    rng.cut(len, SGE_MAX).into_iter().scan(start, |at, len| {
        Some((std::mem::replace(at, *at + len), len))
    })
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Send,
    Write,
    Read,
    OwnAtomic,
    Word,
}

fn rng_kind(rng: &mut Rng) -> Kind {
    match rng.below(100) {
        0..20 => Kind::Send,
        20..45 => Kind::Write,
        45..65 => Kind::Read,
        65..75 => Kind::OwnAtomic,
        _ => Kind::Word,
    }
}

/// The bytes of a word in memory.
#[allow(clippy::host_endian_bytes, reason = "words in memory have host order")]
pub(super) fn bytes_of(word: u64) -> [u8; 8] {
    word.to_ne_bytes()
}
