//! Everything that succeeds: each operation at each length, many at once, and those that have to wait.
//!
//! An [`Exchange`] is written for both of its sides, which take turns: the responder prepares, the
//! requester posts and waits for its completions, the responder looks at what has arrived.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use transport::connect::ConnectConfig;
use transport::{LocalBuffer, SendFlags, Source, WcOpcode};

use crate::Step;
use crate::end::{ALL, End, GUARD_LEN, SIGNALED, Side, pattern, psn_before_wrap};

const QUIET: SendFlags = SendFlags::empty();

/// Where bytes land: odd, so that nothing is aligned by accident.
const AT: usize = 1_001;
/// Where the word for atomics is.
const WORD: usize = 64;
/// Long enough for everything below.
const IMAGE_LEN: usize = 3 << 20;
/// The longest message of most exchanges.
const LONGEST: usize = (64 << 10) + 1;
/// Between what different requests of one exchange touch.
const STRIDE: usize = 72 << 10;

/// Something that one side does to the other.
struct Exchange {
    name: &'static str,
    prepare: fn(&mut End, Case),
    request: fn(&mut Side, &mut End, Case),
    verify: fn(&mut Side, &mut End, Case),
}

/// What both sides know of an exchange.
#[derive(Clone, Copy)]
struct Case {
    len: usize,
    seed: u64,
    mtu: usize,
}

impl Case {
    fn bytes(self) -> Vec<u8> {
        pattern(self.seed, self.len)
    }

    /// What the immediate says.
    fn imm(self) -> [u8; 4] {
        [0xff, 0, self.seed.to_le_bytes()[0], 7]
    }
}

/// Message lengths around everything that matters to segmentation and padding.
fn lengths(mtu: usize) -> [usize; 11] {
    [
        0,
        1,
        3,
        4,
        5,
        mtu - 1,
        mtu,
        mtu + 1,
        2 * mtu,
        2 * mtu + 1,
        LONGEST,
    ]
}

/// The exchanges that are done at every length.
const AT_EVERY_LENGTH: [Exchange; 5] = [
    Exchange {
        name: "SEND",
        prepare: post_one_receive,
        request: |_, end, case| {
            let source = Source::Local(end.buffer(&case.bytes()));
            end.post(|chain| chain.send(1, source, SIGNALED).unwrap());
            end.expect_sent(1, WcOpcode::Send);
        },
        verify: |_, end, case| expect_message(end, case, None),
    },
    Exchange {
        name: "SEND with immediate",
        prepare: post_one_receive,
        request: |_, end, case| {
            let source = Source::Local(end.buffer(&case.bytes()));
            end.post(|chain| chain.send_imm(1, source, case.imm(), SIGNALED).unwrap());
            end.expect_sent(1, WcOpcode::Send);
        },
        verify: |_, end, case| expect_message(end, case, Some(case.imm())),
    },
    Exchange {
        name: "WRITE",
        prepare: clear_target,
        request: |_, end, case| {
            let (source, remote) = (
                Source::Local(end.buffer(&case.bytes())),
                end.remote.at(AT as u64),
            );
            end.post(|chain| chain.write(1, source, remote, SIGNALED).unwrap());
            end.expect_sent(1, WcOpcode::RdmaWrite);
        },
        verify: |_, end, case| expect_placed(end, case),
    },
    Exchange {
        name: "WRITE with immediate",
        prepare: |end, case| {
            clear_target(end, case);
            end.post_recv(9, 0);
        },
        request: |_, end, case| {
            let (source, remote) = (
                Source::Local(end.buffer(&case.bytes())),
                end.remote.at(AT as u64),
            );
            end.post(|chain| {
                chain
                    .write_imm(1, source, remote, case.imm(), SIGNALED)
                    .unwrap();
            });
            end.expect_sent(1, WcOpcode::RdmaWrite);
        },
        verify: |_, end, case| {
            end.expect_received(9, WcOpcode::RecvRdmaWithImm, case.len, Some(case.imm()));
            expect_placed(end, case);
        },
    },
    Exchange {
        name: "READ",
        prepare: |end, case| end.fill_image(AT, &case.bytes()),
        request: |_, end, case| {
            let ([before, into, after], remote) = (end.guarded(case.len), end.remote.at(AT as u64));
            end.post(|chain| chain.read(1, into, remote, SIGNALED).unwrap());
            let done = end.expect_sent(1, WcOpcode::RdmaRead);
            expect_bytes(done.buffer.as_ref(), &case.bytes());
            for guard in [before, after] {
                assert_eq!(guard.as_slice(), [0xa5; GUARD_LEN], "bytes strayed");
            }
        },
        verify: |_, _, _| {},
    },
];

/// The exchanges that have a form of their own, with the length that suits them.
const SPECIAL: [(usize, Exchange); 9] = [
    (
        8,
        Exchange {
            name: "FETCH_ADD",
            prepare: |end, _| end.image.store_u64(WORD, u64::MAX, SeqCst).unwrap(),
            request: |_, end, _| {
                for (add, old) in [(0, u64::MAX), (3, u64::MAX), (1 << 40, 2)] {
                    let (into, remote) = (end.buffer(&[0; 8]), end.remote.at(WORD as u64));
                    end.post(|chain| chain.fetch_add(1, into, remote, add, SIGNALED).unwrap());
                    let done = end.expect_sent(1, WcOpcode::FetchAdd);
                    assert_eq!(done.buffer.unwrap().as_u64(), Some(old));
                }
            },
            verify: |_, end, _| {
                let value = end.image.load_u64(WORD, SeqCst).unwrap();
                assert_eq!(value, 2 + (1 << 40));
            },
        },
    ),
    (
        8,
        Exchange {
            name: "CMP_SWAP",
            prepare: |end, _| end.image.store_u64(WORD, 5, SeqCst).unwrap(),
            request: |_, end, _| {
                for (compare, swap, old) in
                    [(7, 8, 5), (5, u64::MAX, 5), (u64::MAX, 1 << 63, u64::MAX)]
                {
                    let (into, remote) = (end.buffer(&[0; 8]), end.remote.at(WORD as u64));
                    end.post(|chain| {
                        chain
                            .cmp_swap(1, into, remote, compare, swap, SIGNALED)
                            .unwrap();
                    });
                    let done = end.expect_sent(1, WcOpcode::CompSwap);
                    assert_eq!(done.buffer.unwrap().as_u64(), Some(old));
                }
            },
            verify: |_, end, _| assert_eq!(end.image.load_u64(WORD, SeqCst).unwrap(), 1 << 63),
        },
    ),
    (
        8,
        Exchange {
            name: "more atomics than may be in flight, each once",
            prepare: |end, _| end.image.store_u64(WORD, 0, SeqCst).unwrap(),
            request: |_, end, _| {
                let buffers: Vec<_> = (0..40).map(|_| end.buffer(&[0; 8])).collect();
                let remote = end.remote.at(WORD as u64);
                end.post(|chain| {
                    for (wr_id, into) in (0..).zip(buffers) {
                        chain.fetch_add(wr_id, into, remote, 3, SIGNALED).unwrap();
                    }
                });
                for wr_id in 0..40 {
                    let done = end.expect_sent(wr_id, WcOpcode::FetchAdd);
                    assert_eq!(done.buffer.unwrap().as_u64(), Some(3 * wr_id));
                }
            },
            verify: |_, end, _| assert_eq!(end.image.load_u64(WORD, SeqCst).unwrap(), 120),
        },
    ),
    (
        16_384,
        Exchange {
            name: "several parts gathered and scattered",
            prepare: |end, case| {
                clear_target(end, case);
                let parts = [1, case.mtu + 3, 20_000].map(|len| end.buffer(&vec![0; len]));
                end.qp.post_recv(9, parts).unwrap();
            },
            request: |_, end, case| {
                let bytes = case.bytes();
                end.fill_image(AT, &bytes);
                let region = end.region.clone();
                for wr_id in 1..=2 {
                    let (head, tail) =
                        (end.buffer(&bytes[..3]), end.buffer(&bytes[case.len - 1..]));
                    let parts = [
                        Source::Local(head),
                        Source::Shared(&region, AT + 3..AT + 4),
                        Source::Shared(&region, AT + 4..AT + case.len - 1),
                        Source::Local(tail),
                    ];
                    let remote = end.remote.at(AT as u64);
                    end.post(|chain| match wr_id {
                        1 => chain.write(wr_id, parts, remote, SIGNALED).unwrap(),
                        _ => chain.send(wr_id, parts, SIGNALED).unwrap(),
                    });
                }
                end.expect_sent(1, WcOpcode::RdmaWrite);
                end.expect_sent(2, WcOpcode::Send);
                let lens = [1, 4_095, 0, case.len - 4_096];
                let (parts, remote) = (
                    lens.map(|len| end.buffer(&vec![0; len])),
                    end.remote.at(AT as u64),
                );
                end.post(|chain| chain.read(3, parts, remote, SIGNALED).unwrap());
                let done = end.expect_sent(3, WcOpcode::RdmaRead);
                assert!(
                    joined(done.buffer.iter().chain(done.more.iter().flatten())) == bytes,
                    "the parts of the READ differ"
                );
            },
            verify: |_, end, case| {
                let done = end.expect_received(9, WcOpcode::Recv, case.len, None);
                let received = joined(done.buffer.iter().chain(done.more.iter().flatten()));
                assert!(
                    received[..case.len] == case.bytes(),
                    "the parts of the receive differ"
                );
                expect_placed(end, case);
            },
        },
    ),
    (
        0,
        Exchange {
            name: "inline",
            prepare: |end, _| {
                for (wr_id, len) in (0..).zip(INLINE_LENS) {
                    end.post_recv(wr_id, len);
                }
            },
            request: |_, end, case| {
                for (wr_id, len) in (0..).zip(INLINE_LENS) {
                    let bytes = pattern(case.seed, len);
                    let remote = end.remote.at(wr_id * STRIDE as u64);
                    end.post(|chain| {
                        let source = Source::Inline(&bytes);
                        chain.write(100, source, remote, QUIET).unwrap();
                        chain.send(wr_id, Source::Inline(&bytes), SIGNALED).unwrap();
                    });
                    end.expect_sent(wr_id, WcOpcode::Send);
                }
            },
            verify: |_, end, case| {
                for (wr_id, len) in (0..).zip(INLINE_LENS) {
                    let bytes = pattern(case.seed, len);
                    let done = end.expect_received(wr_id, WcOpcode::Recv, len, None);
                    expect_bytes(done.buffer.as_ref(), &bytes);
                    let byte_offset = usize::try_from(wr_id).unwrap() * STRIDE;
                    assert_eq!(end.image_bytes(byte_offset, len), bytes);
                }
            },
        },
    ),
    (
        320_000,
        Exchange {
            name: "many WRITEs in flight",
            prepare: clear_target,
            request: |_, end, case| {
                end.fill_image(0, &case.bytes());
                let (region, remote) = (end.region.clone(), end.remote.at(AT as u64));
                let part_len = case.len / 64;
                end.post(|chain| {
                    for index in 0..64 {
                        let part = index * part_len..(index + 1) * part_len;
                        let remote = remote.at(part.start as u64);
                        let flags = if index == 63 { SIGNALED } else { QUIET };
                        let source = Source::Shared(&region, part);
                        chain.write(index as u64, source, remote, flags).unwrap();
                    }
                });
                end.expect_sent(63, WcOpcode::RdmaWrite);
            },
            verify: |_, end, case| expect_placed(end, case),
        },
    ),
    (
        LONGEST,
        Exchange {
            name: "every operation in one chain",
            prepare: prepare_mixture,
            request: |_, end, case| {
                post_mixture(end, case);
                expect_mixture_sent(end, case);
            },
            verify: |_, end, case| expect_mixture_arrived(end, case),
        },
    ),
    (
        10_000,
        Exchange {
            name: "a SEND before its receive",
            prepare: |_, _| {},
            request: |side, end, case| {
                let source = Source::Local(end.buffer(&case.bytes()));
                end.post(|chain| chain.send(1, source, SIGNALED).unwrap());
                side.control.tell();
                end.expect_sent(1, WcOpcode::Send);
            },
            verify: |side, end, case| {
                come_late(end, case.len);
                side.control.wait();
                expect_message(end, case, None);
            },
        },
    ),
    (
        10_000,
        Exchange {
            name: "a WRITE with immediate before its receive",
            prepare: clear_target,
            request: |side, end, case| {
                let (source, remote) = (
                    Source::Local(end.buffer(&case.bytes())),
                    end.remote.at(AT as u64),
                );
                end.post(|chain| {
                    chain
                        .write_imm(1, source, remote, case.imm(), SIGNALED)
                        .unwrap();
                });
                side.control.tell();
                end.expect_sent(1, WcOpcode::RdmaWrite);
            },
            verify: |side, end, case| {
                come_late(end, 0);
                side.control.wait();
                end.expect_received(9, WcOpcode::RecvRdmaWithImm, case.len, Some(case.imm()));
                expect_placed(end, case);
            },
        },
    ),
];

const INLINE_LENS: [usize; 7] = [0, 1, 3, 4, 5, 63, 64];

/// All of it, each side against the other, on one connection whose sequence numbers start again at 0 soon.
pub(crate) fn run(side: &mut Side) {
    let mut config = side.config();
    config.psn = Some(psn_before_wrap(20));
    let mut end = side.connect(&config, IMAGE_LEN, ALL);
    let mtu = side.mtu.bytes();
    let mut seed = 0;
    let mut both_ways = |side: &mut Side, exchange: &Exchange, len: usize| {
        for is_requester in [side.is_connector, !side.is_connector] {
            seed += 1;
            let case = Case { len, seed, mtu };
            play(side, &mut end, exchange, case, is_requester);
        }
    };
    for exchange in &AT_EVERY_LENGTH {
        for len in lengths(mtu) {
            both_ways(side, exchange, len);
        }
    }
    for (len, exchange) in &SPECIAL {
        both_ways(side, exchange, *len);
    }
}

/// Sequence numbers start again at 0 in the middle of a message or of the responses to a READ.
pub(crate) fn run_wraps(side: &mut Side) {
    let mtu = side.mtu.bytes();
    for exchange in &AT_EVERY_LENGTH {
        for count in 1..=2 {
            let mut config = side.config();
            config.psn = Some(psn_before_wrap(count));
            let mut end = side.connect(&config, STRIDE, ALL);
            for is_requester in [side.is_connector, !side.is_connector] {
                let case = Case {
                    len: 2 * mtu + 1,
                    seed: count.into(),
                    mtu,
                };
                play(side, &mut end, exchange, case, is_requester);
            }
        }
    }
}

/// Eight connections full of work at once.
pub(crate) fn run_crowd(side: &mut Side) {
    let mtu = side.mtu.bytes();
    let config = ConnectConfig {
        // Seven times 1.07 s: eight windows of rxe's are more than an emulated CPU works off in less.
        timeout: 18,
        ..side.config()
    };
    // What is lost, rxe sends again with all that is behind it. With long messages that work puts its
    // responder behind, in a capture at 5 % loss by 10.8 s: it acknowledged a packet so long after it had
    // been sent, and repeated six times. Nobody waits longer than that.
    let len = if side.is_lossy { 2 * mtu + 1 } else { LONGEST };
    let connect = |_| side.connect(&config, IMAGE_LEN, ALL);
    let mut ends: Vec<_> = (0..8).map(connect).collect();
    let case = |index| Case {
        len,
        seed: index as u64,
        mtu,
    };
    let _step = Step(format!("eight connections, {:?}", side.maker));
    for (index, end) in ends.iter_mut().enumerate() {
        prepare_mixture(end, case(index));
    }
    side.control.meet();
    for (index, end) in ends.iter_mut().enumerate() {
        post_mixture(end, case(index));
    }
    for (index, end) in ends.iter_mut().enumerate() {
        expect_mixture_sent(end, case(index));
    }
    side.control.meet();
    for (index, end) in ends.iter_mut().enumerate() {
        expect_mixture_arrived(end, case(index));
        end.expect_nothing();
        side.completions += end.take_completions();
    }
}

/// Both sides do the same to each other at the same time.
pub(crate) fn run_at_once(side: &mut Side) {
    let end = &mut side.connect_plain(IMAGE_LEN);
    let case = Case {
        len: LONGEST,
        seed: 1_000,
        mtu: side.mtu.bytes(),
    };
    let _step = Step(format!("both sides at once, {:?}", side.maker));
    prepare_mixture(end, case);
    side.control.meet();
    post_mixture(end, case);
    expect_mixture_sent(end, case);
    side.control.meet();
    expect_mixture_arrived(end, case);
    end.expect_nothing();
    side.completions += end.take_completions();
}

/// Plays one part of an exchange.
fn play(side: &mut Side, end: &mut End, exchange: &Exchange, case: Case, is_requester: bool) {
    let role = if is_requester {
        "requester"
    } else {
        "responder"
    };
    let _step = Step(format!("{} of {} bytes, {role}", exchange.name, case.len));
    if is_requester {
        side.control.wait();
        (exchange.request)(side, end, case);
        side.control.tell();
    } else {
        (exchange.prepare)(end, case);
        side.control.tell();
        side.control.wait();
        (exchange.verify)(side, end, case);
    }
    end.expect_nothing();
    side.completions += end.take_completions();
}

fn post_one_receive(end: &mut End, case: Case) {
    end.post_recv(9, case.len + GUARD_LEN);
}

/// Posts the receive that the requester's peer asks for again and again.
fn come_late(end: &mut End, len: usize) {
    std::thread::sleep(Duration::from_millis(20));
    end.post_recv(9, len + GUARD_LEN);
}

fn clear_target(end: &mut End, case: Case) {
    end.fill_image(
        AT - GUARD_LEN,
        &vec![0xa5; GUARD_LEN + case.len + GUARD_LEN],
    );
}

/// A receive has exactly the message, and what is behind it is untouched.
fn expect_message(end: &mut End, case: Case, imm: Option<[u8; 4]>) {
    let done = end.expect_received(9, WcOpcode::Recv, case.len, imm);
    let buffer = done.buffer.expect("a receive gives its buffer back");
    let (message, guard) = buffer.as_slice().split_at(case.len);
    assert!(message == case.bytes(), "{} bytes differ", case.len);
    assert_eq!(guard, [0xa5; GUARD_LEN], "bytes strayed");
}

/// The image has exactly the bytes, and what is around them is untouched.
fn expect_placed(end: &mut End, case: Case) {
    let placed = end.image_bytes(AT - GUARD_LEN, GUARD_LEN + case.len + GUARD_LEN);
    let (before, rest) = placed.split_at(GUARD_LEN);
    let (bytes, after) = rest.split_at(case.len);
    assert!(bytes == case.bytes(), "{} bytes differ", case.len);
    assert_eq!(
        (before, after),
        (&[0xa5; GUARD_LEN][..], &[0xa5; GUARD_LEN][..]),
        "bytes strayed"
    );
}

fn expect_bytes(buffer: Option<&LocalBuffer>, bytes: &[u8]) {
    let buffer = buffer.expect("a request gives its buffer back");
    assert!(buffer.as_slice() == bytes, "{} bytes differ", bytes.len());
}

fn joined<'a>(parts: impl Iterator<Item = &'a LocalBuffer>) -> Vec<u8> {
    parts.flat_map(LocalBuffer::as_slice).copied().collect()
}

/// Requests of the mixture, and the kinds that they take turns in.
const MIXTURE: usize = 36;

/// One request of the mixture.
#[derive(Clone, Copy)]
enum Mixed {
    Write,
    /// Of what the WRITE before it wrote.
    Read,
    Send,
    WriteImm,
    FetchAdd,
    SendImm,
}

/// Request `index` of a mixture with messages of up to `case.len` bytes: what it is, and its bytes.
fn mixed(case: Case, index: usize) -> (Mixed, Case) {
    use Mixed::{FetchAdd, Read, Send, SendImm, Write, WriteImm};
    let kind = [Write, Read, Send, WriteImm, FetchAdd, SendImm][index % 6];
    let source = if matches!(kind, Read) {
        index - 1
    } else {
        index
    };
    let lengths = lengths(case.mtu);
    let count = lengths.partition_point(|len| *len <= case.len);
    let case = Case {
        len: lengths[source * 5 % count],
        seed: case.seed * 100 + source as u64,
        ..case
    };
    (kind, case)
}

/// Where the bytes of request `index` lie.
fn mixed_at(index: usize) -> usize {
    AT + index * STRIDE
}

fn prepare_mixture(end: &mut End, case: Case) {
    end.image.store_u64(WORD, 0, SeqCst).unwrap();
    for index in 0..MIXTURE {
        match mixed(case, index) {
            (Mixed::Send | Mixed::SendImm, case) => end.post_recv(index as u64, case.len),
            (Mixed::WriteImm, _) => end.post_recv(index as u64, 0),
            _ => {}
        }
    }
}

/// Posts the whole mixture with one doorbell. WRITEs and SENDs without immediate are not signalled.
fn post_mixture(end: &mut End, case: Case) {
    let mut buffers: Vec<_> = (0..MIXTURE)
        .map(|index| match mixed(case, index) {
            (Mixed::FetchAdd, _) => end.buffer(&[0; 8]),
            (Mixed::Read, case) => end.buffer(&vec![0; case.len]),
            (_, case) => end.buffer(&case.bytes()),
        })
        .collect();
    let remote = end.remote;
    end.post(|chain| {
        for (index, buffer) in buffers.drain(..).enumerate() {
            let (wr_id, (kind, case)) = (index as u64, mixed(case, index));
            let target = remote.at(mixed_at(index) as u64);
            match kind {
                Mixed::Write => chain
                    .write(wr_id, Source::Local(buffer), target, QUIET)
                    .unwrap(),
                Mixed::Read => {
                    let target = remote.at(mixed_at(index - 1) as u64);
                    chain.read(wr_id, buffer, target, SIGNALED).unwrap();
                }
                Mixed::Send => chain.send(wr_id, Source::Local(buffer), QUIET).unwrap(),
                Mixed::WriteImm => chain
                    .write_imm(wr_id, Source::Local(buffer), target, case.imm(), SIGNALED)
                    .unwrap(),
                Mixed::FetchAdd => chain
                    .fetch_add(wr_id, buffer, remote.at(WORD as u64), 1, SIGNALED)
                    .unwrap(),
                Mixed::SendImm => chain
                    .send_imm(wr_id, Source::Local(buffer), case.imm(), SIGNALED)
                    .unwrap(),
            }
        }
    });
}

fn expect_mixture_sent(end: &mut End, case: Case) {
    let mut added = 0;
    for index in 0..MIXTURE {
        let (kind, case) = mixed(case, index);
        let opcode = match kind {
            Mixed::Write | Mixed::Send => continue,
            Mixed::Read => WcOpcode::RdmaRead,
            Mixed::WriteImm => WcOpcode::RdmaWrite,
            Mixed::FetchAdd => WcOpcode::FetchAdd,
            Mixed::SendImm => WcOpcode::Send,
        };
        let done = end.expect_sent(index as u64, opcode);
        match kind {
            Mixed::Read => expect_bytes(done.buffer.as_ref(), &case.bytes()),
            Mixed::FetchAdd => {
                let old = done.buffer.unwrap().as_u64();
                assert_eq!(old, Some(added), "FETCH_ADD {index}");
                added += 1;
            }
            _ => {}
        }
    }
}

fn expect_mixture_arrived(end: &mut End, case: Case) {
    for index in 0..MIXTURE {
        let (kind, case) = mixed(case, index);
        let wr_id = index as u64;
        match kind {
            Mixed::Write => {}
            Mixed::Send => {
                let done = end.expect_received(wr_id, WcOpcode::Recv, case.len, None);
                expect_bytes(done.buffer.as_ref(), &case.bytes());
                continue;
            }
            Mixed::SendImm => {
                let imm = Some(case.imm());
                let done = end.expect_received(wr_id, WcOpcode::Recv, case.len, imm);
                expect_bytes(done.buffer.as_ref(), &case.bytes());
                continue;
            }
            Mixed::WriteImm => {
                let imm = Some(case.imm());
                end.expect_received(wr_id, WcOpcode::RecvRdmaWithImm, case.len, imm);
            }
            Mixed::Read | Mixed::FetchAdd => continue,
        }
        let placed = end.image_bytes(mixed_at(index), case.len);
        assert!(
            placed == case.bytes(),
            "{} bytes of WRITE {index} differ",
            case.len
        );
    }
    let adds = (MIXTURE / 6) as u64;
    assert_eq!(
        end.image.load_u64(WORD, SeqCst).unwrap(),
        adds,
        "additions lost or repeated"
    );
}
