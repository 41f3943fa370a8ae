//! Memory windows: whom they open to, how they are bound and revoked, and that a revoked one is shut.

use super::errors::{expect_nak, expect_refusal, ops};
use super::random::Rng;
use super::*;
use crate::mr_table::{Bind, BindError, DeregisterError, InvalidateError, WindowType};
use crate::wire::{NakCode, Reth};

/// Where the windows of these tests lie in B's memory.
const WINDOW: usize = 1024;
const WINDOW_LEN: usize = 1024;
const ALL_REMOTE: AccessFlags = AccessFlags::REMOTE_WRITE
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_ATOMIC);
const PD: Pd = Pd(7);
/// The queue pair of B, and one that does not exist.
const QPN: Qpn = Qpn::new(0x12);
const OTHER_QPN: Qpn = Qpn::new(0x13);

impl Node {
    fn alloc_window(&mut self, window_type: WindowType) -> Key {
        self.mem.alloc_window(PD, window_type).unwrap()
    }

    /// A request to bind the window of `key` anew, with the next tag.
    fn bind(&self, key: Key) -> Bind {
        Bind {
            rkey: Key(key.0 & !0xff | key.0.wrapping_add(1) & 0xff),
            region: self.key,
            addr: IOVA + WINDOW as u64,
            len: WINDOW_LEN as u64,
            access: ALL_REMOTE,
            is_zero_based: false,
        }
    }

    /// Allocates a window and posts its bind on the queue pair; its key once that is done.
    fn post_window(&mut self, wr_id: u64) -> Key {
        let key = self.alloc_window(WindowType::Type2);
        let bind = self.bind(key);
        self.post_send(wr_id, SendOp::BindWindow(bind), &[]);
        bind.rkey
    }
}

/// A pair of which B has bound a window.
fn pair_with_window() -> (Pair, Key) {
    let mut pair = Pair::new();
    let rkey = pair.nodes[B].post_window(1);
    pair.drive();
    let bound = pair.nodes[B].statuses(Queue::Send);
    assert_eq!((bound, pair.sent.len()), (vec![(1, SUCCESS)], 0));
    (pair, rkey)
}

fn at(byte_offset: usize, rkey: Key) -> Remote {
    Remote {
        addr: IOVA + byte_offset as u64,
        rkey,
    }
}

/// Asserts that B refuses every operation on the window of `rkey`, which `make` prepares.
#[track_caller]
fn expect_shut(make: impl Fn(&mut Pair) -> Key) {
    for index in 0..4 {
        let mut pair = Pair::new();
        let rkey = make(&mut pair);
        pair.nodes[B].completions.clear();
        let op = ops(at(WINDOW, rkey))[index];
        expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);
    }
}

#[test]
fn a_window_opens_its_part_of_the_region() {
    let (mut pair, rkey) = pair_with_window();
    let bytes = pattern(3, 700);
    let [a, b] = &mut pair.nodes;
    a.write(0, &bytes);
    let ends = [at(WINDOW, rkey), at(WINDOW + WINDOW_LEN - 700, rkey)];
    a.post_send(1, write_op(ends[0]), &[a.sge(0, 700)]);
    a.post_send(2, write_op(ends[1]), &[a.sge(0, 700)]);
    a.post_send(3, SendOp::Read { remote: ends[1] }, &[a.sge(8000, 700)]);
    b.write(WINDOW + 8, &5u64.to_le_bytes());
    let (remote, word) = (at(WINDOW + 8, rkey), a.sge(9000, 8));
    a.post_send(4, SendOp::FetchAdd { remote, add: 1 }, &[word]);
    pair.drive();
    pair.expect_sends(&[1, 2, 3, 4].map(|wr_id| (wr_id, SUCCESS)));
    assert_eq!(pair.nodes[A].read(8000, 700), bytes);
    assert_eq!(pair.nodes[B].read(WINDOW + WINDOW_LEN - 700, 700), bytes);
    assert_eq!(pair.nodes[B].read(WINDOW - 8, 8), [0; 8]);
    assert_eq!(pair.nodes[B].read(WINDOW + WINDOW_LEN, 8), [0; 8]);
}

#[test]
fn a_window_ends_where_it_ends() {
    let end = WINDOW + WINDOW_LEN;
    for byte_offset in [WINDOW - 8, WINDOW - 1, end - 7, end, end + 8, 0] {
        for index in 0..4 {
            // Atomics only go to multiples of 8.
            if index >= 2 && byte_offset % 8 != 0 {
                continue;
            }
            let (mut pair, rkey) = pair_with_window();
            let op = ops(at(byte_offset, rkey))[index];
            expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);
        }
    }
}

#[test]
fn a_window_grants_its_own_rights_and_no_more() {
    let rights = [
        AccessFlags::REMOTE_WRITE,
        AccessFlags::REMOTE_READ,
        AccessFlags::REMOTE_ATOMIC,
        AccessFlags::REMOTE_ATOMIC,
    ];
    for (index, right) in rights.into_iter().enumerate() {
        for is_granted in [true, false] {
            let mut pair = Pair::new();
            let b = &mut pair.nodes[B];
            let key = b.alloc_window(WindowType::Type2);
            let access = if is_granted {
                right
            } else {
                ALL_REMOTE - right
            };
            let bind = Bind {
                access,
                ..b.bind(key)
            };
            b.mem.bind_window(&bind, PD, QPN).unwrap();
            let op = ops(at(WINDOW, bind.rkey))[index];
            if is_granted {
                let sge = pair.nodes[A].sge(0, 8);
                pair.nodes[A].post_send(1, op, &[sge]);
                pair.drive();
                pair.expect_sends(&[(1, SUCCESS)]);
            } else {
                expect_refusal(&mut pair, op, 8, NakCode::RemoteAccess);
            }
        }
    }
}

#[test]
fn a_zero_based_window_starts_at_0() {
    let mut pair = Pair::new();
    let [a, b] = &mut pair.nodes;
    let key = b.alloc_window(WindowType::Type2);
    let bind = Bind {
        is_zero_based: true,
        ..b.bind(key)
    };
    b.post_send(1, SendOp::BindWindow(bind), &[]);
    a.write(0, b"tail");
    let rkey = bind.rkey;
    let remote = |addr| Remote { addr, rkey };
    a.post_send(1, write_op(remote(WINDOW_LEN as u64 - 4)), &[a.sge(0, 4)]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    assert_eq!(pair.nodes[B].read(WINDOW + WINDOW_LEN - 4, 4), b"tail");
    pair.nodes[B].completions.clear();
    let behind = write_op(remote(WINDOW_LEN as u64 - 3));
    let sge = pair.nodes[A].sge(0, 4);
    pair.nodes[A].post_send(2, behind, &[sge]);
    pair.drive();
    pair.expect_sends(&[(2, WcStatus::RemAccessErr)]);
}

#[test]
fn a_window_is_shut_unless_it_is_bound_for_this_queue_pair_under_this_key() {
    // Never bound.
    expect_shut(|pair| pair.nodes[B].alloc_window(WindowType::Type2));
    expect_shut(|pair| pair.nodes[B].alloc_window(WindowType::Type1));
    // Bound on another queue pair.
    expect_shut(|pair| {
        let b = &mut pair.nodes[B];
        let bind = b.bind(b.key);
        let key = b.alloc_window(WindowType::Type2);
        let bind = Bind {
            rkey: b.bind(key).rkey,
            ..bind
        };
        b.mem.bind_window(&bind, PD, OTHER_QPN).unwrap();
        bind.rkey
    });
    // Of another protection domain.
    for window_type in [WindowType::Type1, WindowType::Type2] {
        expect_shut(move |pair| {
            let b = &mut pair.nodes[B];
            let region = b.register(0, 4096, ALL_RIGHTS, Pd(8));
            let key = b.mem.alloc_window(Pd(8), window_type).unwrap();
            let bind = Bind {
                region,
                ..b.bind(key)
            };
            b.mem.bind_window(&bind, Pd(8), QPN).unwrap();
            bind.rkey
        });
    }
    // Every tag but the right one.
    for tag in [1, 0x80, 0xff] {
        expect_shut(move |pair| {
            let rkey = pair.nodes[B].post_window(1);
            pair.drive();
            Key(rkey.0 ^ tag)
        });
    }
    // Revoked, and bound again under the next tag.
    for is_bound_again in [false, true] {
        expect_shut(move |pair| {
            let rkey = pair.nodes[B].post_window(1);
            let b = &mut pair.nodes[B];
            b.post_send(2, SendOp::LocalInvalidate { rkey }, &[]);
            if is_bound_again {
                b.post_send(3, SendOp::BindWindow(b.bind(rkey)), &[]);
            }
            pair.drive();
            assert!(
                pair.nodes[B]
                    .statuses(Queue::Send)
                    .iter()
                    .all(|(_, status)| *status == SUCCESS)
            );
            rkey
        });
    }
    // Freed while bound.
    expect_shut(|pair| {
        let rkey = pair.nodes[B].post_window(1);
        pair.drive();
        pair.nodes[B].mem.free_window(rkey).unwrap();
        rkey
    });
    // Its queue pair was destroyed, and the number given to another.
    expect_shut(|pair| {
        let rkey = pair.nodes[B].post_window(1);
        pair.drive();
        pair.nodes[B].mem.invalidate_all_of(QPN);
        rkey
    });
}

#[test]
fn a_window_of_type_1_serves_its_domain_until_it_is_bound_anew() {
    let mut pair = Pair::new();
    let [a, b] = &mut pair.nodes;
    let key = b.alloc_window(WindowType::Type1);
    // Through a queue pair that is not A's peer.
    let first = b.bind(key);
    b.mem.bind_window(&first, PD, OTHER_QPN).unwrap();
    a.write(0, b"type 1");
    a.post_send(1, write_op(at(WINDOW, first.rkey)), &[a.sge(0, 6)]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    assert_eq!(pair.nodes[B].read(WINDOW, 6), b"type 1");

    // Bound again without being unbound: the place and the key move on together.
    let [a, b] = &mut pair.nodes;
    let second = Bind {
        addr: IOVA + 8192,
        ..b.bind(first.rkey)
    };
    b.post_send(2, SendOp::BindWindow(second), &[]);
    a.post_send(2, write_op(at(8192, second.rkey)), &[a.sge(0, 6)]);
    pair.drive();
    pair.expect_sends(&[(2, SUCCESS)]);
    let b = &mut pair.nodes[B];
    let [(_, wc)] = b.completions[..] else {
        panic!("one completion: {:?}", b.completions);
    };
    assert_eq!((wc.opcode, wc.status), (WcOpcode::BindMw, SUCCESS));
    let is_open = |b: &Node, key| {
        let access = AccessFlags::REMOTE_READ;
        let through = (PD, QPN);
        b.mem
            .check_remote(key, through, IOVA + 8192, 8, access)
            .is_ok()
    };
    assert!(is_open(b, second.rkey) && !is_open(b, first.rkey));

    // It is not invalidated, but unbound by a bind of no bytes, which needs no region.
    assert_eq!(
        b.mem.invalidate(second.rkey, PD, QPN),
        Err(InvalidateError::WrongType(second.rkey))
    );
    let unbind = Bind {
        len: 0,
        region: Key(0),
        ..b.bind(second.rkey)
    };
    b.mem.bind_window(&unbind, PD, QPN).unwrap();
    assert!(!is_open(b, second.rkey) && !is_open(b, unbind.rkey));
    let region = b.key;
    b.mem.deregister(region).unwrap();
}

#[test]
fn a_bind_that_breaks_a_rule_fails_alone_and_ends_the_queue_pair() {
    let refused = |prepare: &dyn Fn(&mut Node) -> Bind, expected: BindError| {
        let mut pair = Pair::new();
        let b = &mut pair.nodes[B];
        let bind = prepare(b);
        // The table says why; it is asked first, and must not have changed by it.
        assert_eq!(b.mem.bind_window(&bind, PD, QPN), Err(expected));
        let sge = b.sge(0, 8);
        let behind = write_op(pair.nodes[A].remote(0));
        let b = &mut pair.nodes[B];
        b.post_send(1, SendOp::BindWindow(bind), &[]);
        b.post_send(2, behind, &[sge]);
        pair.drive();
        let statuses = pair.nodes[B].statuses(Queue::Send);
        let expected = [(1, WcStatus::MwBindErr), (2, FLUSHED)];
        assert_eq!((&statuses[..], pair.sent.len()), (&expected[..], 0));
        pair.expect_states(QpState::Rts, QpState::Err);
    };
    let window = |b: &mut Node| {
        let key = b.alloc_window(WindowType::Type2);
        b.bind(key)
    };
    let nothing = Key(0x00ff_ff01);
    let unknown = |b: &mut Node| Bind {
        rkey: nothing,
        ..b.bind(nothing)
    };
    refused(&unknown, BindError::UnknownWindow(nothing));
    let foreign_window = |b: &mut Node| {
        let key = b.mem.alloc_window(Pd(8), WindowType::Type2).unwrap();
        b.bind(key)
    };
    refused(&foreign_window, BindError::ForeignPd);
    let foreign_region = |b: &mut Node| Bind {
        region: b.register(0, 4096, ALL_RIGHTS, Pd(8)),
        ..window(b)
    };
    refused(&foreign_region, BindError::ForeignPd);
    let bound = |b: &mut Node| {
        let bind = window(b);
        b.mem.bind_window(&bind, PD, QPN).unwrap();
        b.bind(bind.rkey)
    };
    refused(&bound, BindError::Bound);
    let empty = |b: &mut Node| Bind {
        len: 0,
        ..window(b)
    };
    refused(&empty, BindError::Empty);
    let zero_based = |b: &mut Node| {
        let key = b.alloc_window(WindowType::Type1);
        Bind {
            is_zero_based: true,
            ..b.bind(key)
        }
    };
    refused(&zero_based, BindError::ZeroBased);
    let unknown_region = |b: &mut Node| Bind {
        region: nothing,
        ..window(b)
    };
    refused(&unknown_region, BindError::UnknownRegion(nothing));
    let missing = AccessFlags::MW_BIND;
    let unbindable = |b: &mut Node| Bind {
        region: b.register(0, 4096, ALL_RIGHTS - AccessFlags::MW_BIND, PD),
        ..window(b)
    };
    refused(&unbindable, BindError::Denied { missing });
    let missing = AccessFlags::LOCAL_WRITE;
    for access in [AccessFlags::REMOTE_WRITE, AccessFlags::REMOTE_ATOMIC] {
        let read_only = |b: &mut Node| Bind {
            region: b.register(0, 4096, AccessFlags::MW_BIND, PD),
            access,
            ..window(b)
        };
        refused(&read_only, BindError::Denied { missing });
    }
    for (addr, len) in [
        (IOVA - 1, 8),
        (IOVA + MEMORY_LEN as u64 - 7, 8),
        (IOVA, MEMORY_LEN as u64 + 1),
        (IOVA + 8, u64::MAX),
        (u64::MAX, 8),
    ] {
        let outside = |b: &mut Node| Bind {
            addr,
            len,
            ..window(b)
        };
        refused(&outside, BindError::OutOfBounds { addr, len });
    }
}

#[test]
fn a_read_only_region_takes_a_window_to_read() {
    let mut pair = Pair::new();
    let b = &mut pair.nodes[B];
    let key = b.alloc_window(WindowType::Type2);
    let bind = Bind {
        region: b.register(0, 4096, AccessFlags::MW_BIND, PD),
        access: AccessFlags::REMOTE_READ,
        ..b.bind(key)
    };
    b.mem.bind_window(&bind, PD, QPN).unwrap();
    let (remote, sge) = (at(WINDOW, bind.rkey), pair.nodes[A].sge(0, 8));
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
}

#[test]
fn a_window_is_no_local_key() {
    for is_source in [true, false] {
        let (mut pair, lkey) = pair_with_window();
        let [a, b] = &mut pair.nodes;
        let addr = IOVA + WINDOW as u64;
        let sge = Sge {
            addr,
            length: 8,
            lkey,
        };
        let remote = a.remote(0);
        let op = if is_source {
            write_op(remote)
        } else {
            SendOp::Read { remote }
        };
        b.post_send(2, op, &[sge]);
        pair.drive();
        let statuses = pair.nodes[B].statuses(Queue::Send);
        assert_eq!(statuses, [(2, WcStatus::LocProtErr)]);
    }
}

#[test]
fn a_region_outlasts_its_windows() {
    let (mut pair, rkey) = pair_with_window();
    let b = &mut pair.nodes[B];
    let second = b.alloc_window(WindowType::Type1);
    b.mem.bind_window(&b.bind(second), PD, QPN).unwrap();
    let region = b.key;
    let bound = |count| Err(DeregisterError::WindowsBound { count });
    assert_eq!(b.mem.deregister(region).map(|_| ()), bound(2));
    b.mem.invalidate(rkey, PD, QPN).unwrap();
    assert_eq!(b.mem.deregister(region).map(|_| ()), bound(1));
    b.mem.free_window(second).unwrap();
    b.mem.deregister(region).unwrap();
    // The window of type 2 still exists, free.
    b.mem.free_window(rkey).unwrap();
    assert!(b.mem.is_empty());
}

/// A's window is bound and revoked between WRITEs. Neither takes a PSN, and the revocation waits until
/// everything before it is acknowledged.
#[test]
fn local_requests_keep_their_place_and_make_no_packet() {
    let mut pair = Pair::new();
    let op = write_op(pair.nodes[B].remote(0));
    let a = &mut pair.nodes[A];
    let sge = a.sge(0, 300);
    a.post_send(1, op, &[sge]);
    let rkey = a.post_window(2);
    a.post_send(3, op, &[sge]);
    a.post_send(4, SendOp::LocalInvalidate { rkey }, &[]);
    a.post_send(5, op, &[sge]);
    let is_open = |pair: &Pair| {
        let a = &pair.nodes[A];
        let through = (PD, a.qp.qpn());
        let access = AccessFlags::REMOTE_READ;
        let opened = a
            .mem
            .check_remote(rkey, through, IOVA + WINDOW as u64, 8, access);
        opened.is_ok()
    };
    pair.transmit();
    let psns: Vec<Psn> = pair.sent.iter().map(Sent::psn).collect();
    assert_eq!(psns, [0, 1, 2, 3].map(|i| FIRST_PSN + i));
    assert!(is_open(&pair), "a bind does not wait");
    pair.expect_sends(&[]);
    pair.drive();
    assert!(!is_open(&pair));
    pair.expect_sends(&[1, 2, 3, 4, 5].map(|wr_id| (wr_id, SUCCESS)));
    let psns: Vec<Psn> = pair
        .sent
        .iter()
        .filter(|sent| sent.from == A)
        .map(Sent::psn)
        .collect();
    assert_eq!(psns, [0, 1, 2, 3, 4, 5].map(|i| FIRST_PSN + i));
}

/// Binds and revocations among requests of every kind, on a wire that loses and doubles packets: each is
/// executed once and in its place, and everything completes in order.
#[test]
fn local_requests_are_executed_once_whatever_is_lost() {
    for seed in 0..300 {
        let mut rng = Rng(seed);
        let mut wire = rng.clone();
        let mut pair = Pair::new().filtered(move |_| match wire.below(100) {
            0..8 => Fate::Drop,
            8..16 => Fate::Duplicate,
            _ => Fate::Deliver,
        });
        let [a, b] = &mut pair.nodes;
        let mut rkey = a.alloc_window(WindowType::Type2);
        let mut is_bound = false;
        let source = a.sge(0, 700);
        for wr_id in 0..24 {
            let op = match rng.below(6) {
                // Bound twice or revoked twice, each would fail.
                0..=2 if is_bound => SendOp::LocalInvalidate { rkey },
                0..=2 => {
                    let bind = a.bind(rkey);
                    rkey = bind.rkey;
                    SendOp::BindWindow(bind)
                }
                3 => write_op(b.remote(0)),
                4 => SendOp::Send { imm: None },
                _ => SendOp::Read {
                    remote: b.remote(0),
                },
            };
            is_bound ^= op.is_local();
            let sges: &[Sge] = if op.is_local() { &[] } else { &[source] };
            if matches!(op, SendOp::Send { .. }) {
                b.post_recv(wr_id, &[b.sge(4096, 700)]);
            }
            let mut flags = SendFlags::SIGNALED;
            flags.set(SendFlags::FENCE, rng.chance(20));
            let data = Data::Gather(sges);
            let wr = SendWr {
                wr_id,
                op,
                data,
                flags,
            };
            a.qp.post_send(&wr).unwrap();
        }
        pair.drive();
        let a = &mut pair.nodes[A];
        let expected: Vec<_> = (0..24).map(|wr_id| (wr_id, SUCCESS)).collect();
        assert_eq!(a.statuses(Queue::Send), expected, "seed {seed}");
        let revoked = a.mem.invalidate(rkey, PD, a.qp.qpn());
        assert_eq!(revoked.is_ok(), is_bound, "seed {seed}");
    }
}

#[test]
fn a_fenced_bind_waits_for_reads() {
    for is_fenced in [true, false] {
        let mut pair = Pair::new();
        let remote = pair.nodes[B].remote(0);
        let a = &mut pair.nodes[A];
        let sge = a.sge(0, 300);
        a.post_send(1, SendOp::Read { remote }, &[sge]);
        let key = a.alloc_window(WindowType::Type2);
        let bind = a.bind(key);
        let mut flags = SendFlags::SIGNALED;
        flags.set(SendFlags::FENCE, is_fenced);
        let wr = SendWr {
            wr_id: 2,
            op: SendOp::BindWindow(bind),
            data: Data::Gather(&[]),
            flags,
        };
        a.qp.post_send(&wr).unwrap();
        pair.transmit();
        let a = &mut pair.nodes[A];
        let is_bound = a.mem.invalidate(bind.rkey, PD, a.qp.qpn()).is_ok();
        assert_eq!(is_bound, !is_fenced);
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
    }
}

#[test]
fn in_sqd_and_err_nothing_new_is_executed() {
    let mut pair = Pair::new();
    let node_attr = attr(A, Mtu::Mtu256);
    let a = &mut pair.nodes[A];
    move_to(&mut a.qp, &node_attr, QpState::Sqd, AttrMask::STATE);
    let first = a.post_window(1);
    pair.drive();
    pair.expect_sends(&[]);
    let a = &mut pair.nodes[A];
    move_to(&mut a.qp, &node_attr, QpState::Rts, AttrMask::STATE);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    let a = &mut pair.nodes[A];
    move_to(&mut a.qp, &node_attr, QpState::Err, AttrMask::STATE);
    let second = a.post_window(2);
    a.post_send(3, SendOp::LocalInvalidate { rkey: first }, &[]);
    pair.drive();
    pair.expect_sends(&[(2, FLUSHED), (3, FLUSHED)]);
    let a = &mut pair.nodes[A];
    let qpn = a.qp.qpn();
    assert!(a.mem.invalidate(second, PD, qpn).is_err(), "never bound");
    assert!(a.mem.invalidate(first, PD, qpn).is_ok(), "never revoked");
}

#[test]
fn what_is_no_window_of_this_queue_pair_cannot_be_revoked() {
    let region = |b: &mut Node| b.key;
    let free = |b: &mut Node| b.alloc_window(WindowType::Type2);
    let type_1 = |b: &mut Node| {
        let key = b.alloc_window(WindowType::Type1);
        let bind = b.bind(key);
        b.mem.bind_window(&bind, PD, QPN).unwrap();
        bind.rkey
    };
    let bound_on_other = |b: &mut Node| {
        let key = b.alloc_window(WindowType::Type2);
        let bind = b.bind(key);
        b.mem.bind_window(&bind, PD, OTHER_QPN).unwrap();
        bind.rkey
    };
    let foreign = |b: &mut Node| {
        let region = b.register(0, 4096, ALL_RIGHTS, Pd(8));
        let key = b.mem.alloc_window(Pd(8), WindowType::Type2).unwrap();
        let bind = Bind {
            region,
            ..b.bind(key)
        };
        b.mem.bind_window(&bind, Pd(8), QPN).unwrap();
        bind.rkey
    };
    let nothing = |_: &mut Node| Key(0xdead_beef);
    let makes: [&dyn Fn(&mut Node) -> Key; 6] =
        [&region, &free, &type_1, &bound_on_other, &foreign, &nothing];
    for make in makes {
        // By B itself.
        let mut pair = Pair::new();
        let rkey = make(&mut pair.nodes[B]);
        pair.nodes[B].post_send(1, SendOp::LocalInvalidate { rkey }, &[]);
        pair.drive();
        let statuses = pair.nodes[B].statuses(Queue::Send);
        assert_eq!(statuses, [(1, WcStatus::LocQpOpErr)]);
        pair.expect_states(QpState::Rts, QpState::Err);

        // By A. The SEND has arrived; what comes after it has not.
        let mut pair = Pair::new();
        let rkey = make(&mut pair.nodes[B]);
        let [a, b] = &mut pair.nodes;
        a.write(0, b"first");
        a.post_send(1, SendOp::SendInvalidate { rkey }, &[a.sge(0, 5)]);
        a.post_send(2, SendOp::Send { imm: None }, &[a.sge(0, 5)]);
        b.post_recv(1, &[b.sge(4096, 64)]);
        b.post_recv(2, &[]);
        pair.drive();
        pair.expect_sends(&[(1, SUCCESS), (2, WcStatus::RetryExcErr)]);
        pair.expect_receives(&[(1, WcStatus::RemInvReqErr), (2, FLUSHED)]);
        pair.expect_states(QpState::Err, QpState::Err);
        assert_eq!(pair.nodes[B].events, [AsyncEvent::QpAccessErr]);
        assert_eq!(pair.nodes[B].read(4096, 5), b"first");
        assert_eq!(pair.opcodes(B), [Opcode::Acknowledge], "{}", pair.trace());
    }
}

/// SEND with Invalidate of one packet and of several, with each packet of either side lost or doubled.
#[test]
fn a_send_revokes_once_whatever_is_lost() {
    for (len, packets) in [(5, 1), (700, 3)] {
        for (from, index) in [(A, 0), (A, 1), (A, 2), (A, 3), (B, 0), (B, 1)] {
            for fate in [Fate::Drop, Fate::Duplicate, Fate::Delay { ns: 50_000 }] {
                send_and_revoke(len, packets, move |sent| {
                    if (sent.from, sent.index) == (from, index) {
                        fate
                    } else {
                        Fate::Deliver
                    }
                });
            }
        }
    }
}

fn send_and_revoke(len: usize, packets: usize, filter: impl FnMut(&Sent) -> Fate + 'static) {
    let (pair, rkey) = pair_with_window();
    let mut pair = pair.filtered(filter);
    let [a, b] = &mut pair.nodes;
    a.write(0, &pattern(4, 700));
    // The WRITE comes before the revocation, and so gets through.
    a.post_send(1, write_op(at(WINDOW, rkey)), &[a.sge(0, 8)]);
    a.post_send(2, SendOp::SendInvalidate { rkey }, &[a.sge(0, len)]);
    b.post_recv(1, &[b.sge(8192, 1024)]);
    b.post_recv(2, &[b.sge(16_384, 1024)]);
    pair.drive();
    let trace = pair.trace();
    pair.expect_sends(&[(1, SUCCESS), (2, SUCCESS)]);
    let b = &mut pair.nodes[B];
    let [(Queue::Recv, wc)] = b.completions[..] else {
        panic!("one receive: {:?}\n{trace}", b.completions);
    };
    let received = (wc.wr_id, wc.opcode, wc.byte_len as usize);
    assert_eq!(received, (1, WcOpcode::Recv, len), "{trace}");
    assert_eq!((wc.imm, wc.invalidated), (None, Some(rkey)), "{trace}");
    assert_eq!(b.read(8192, len), pattern(4, len), "{trace}");
    assert_eq!(b.read(WINDOW, 8), pattern(4, 8), "{trace}");
    let last = if packets == 1 {
        Opcode::SendOnlyInvalidate
    } else {
        Opcode::SendLastInvalidate
    };
    assert!(pair.opcodes(A).contains(&last), "{trace}");

    pair.filter = deliver_all();
    let sge = pair.nodes[A].sge(0, 8);
    pair.nodes[A].post_send(3, write_op(at(WINDOW, rkey)), &[sge]);
    pair.drive();
    pair.expect_sends(&[(3, WcStatus::RemAccessErr)]);
}

/// A SEND with Invalidate that arrives again must not revoke what was bound under the same key since.
#[test]
fn a_repeated_send_revokes_nothing() {
    let (pair, rkey) = pair_with_window();
    // The repetition arrives long after the original.
    let mut pair = pair.filtered(|sent| match sent.opcode() {
        Opcode::SendOnlyInvalidate => Fate::Duplicate,
        _ => Fate::Deliver,
    });
    let [a, b] = &mut pair.nodes;
    a.post_send(1, SendOp::SendInvalidate { rkey }, &[]);
    b.post_recv(1, &[]);
    pair.transmit();
    let late = pair.wire.pop().expect("the SEND is on the wire, twice");
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    let b = &mut pair.nodes[B];
    let bind = Bind {
        rkey,
        ..b.bind(rkey)
    };
    b.mem.bind_window(&bind, PD, QPN).unwrap();
    pair.inject(B, &late.bytes);
    pair.drive();
    assert_eq!(pair.nodes[B].qp.counters().duplicate_request, 1);
    let b = &mut pair.nodes[B];
    b.mem.invalidate(rkey, PD, QPN).expect("still bound");
}

/// Nothing of a SEND is executed before there is a receive for it: neither is the revocation.
#[test]
fn a_send_without_a_receive_revokes_nothing_yet() {
    let (mut pair, rkey) = pair_with_window();
    pair.nodes[A].post_send(1, SendOp::SendInvalidate { rkey }, &[]);
    pair.drive_until(100_000);
    let b = &pair.nodes[B];
    assert_eq!(b.qp.counters().send_rnr_err, 1);
    let through = (PD, QPN);
    let access = AccessFlags::REMOTE_READ;
    let opened = b
        .mem
        .check_remote(rkey, through, IOVA + WINDOW as u64, 8, access);
    assert!(opened.is_ok());
    pair.nodes[B].post_recv(1, &[]);
    pair.drive();
    pair.expect_sends(&[(1, SUCCESS)]);
    pair.expect_receives(&[(1, SUCCESS)]);
    assert!(pair.nodes[B].mem.invalidate(rkey, PD, QPN).is_err());
}

/// The revocation comes between two packets of a WRITE. What came before is there, what comes after is
/// refused.
#[test]
fn a_write_in_progress_stops_at_the_revocation() {
    let (pair, rkey) = pair_with_window();
    let mut pair = pair.filtered(|sent| match sent.opcode() {
        Opcode::WriteLast => Fate::Delay { ns: 100_000 },
        _ => Fate::Deliver,
    });
    let a = &mut pair.nodes[A];
    a.write(0, &pattern(5, 700));
    a.post_send(1, write_op(at(WINDOW, rkey)), &[a.sge(0, 700)]);
    pair.drive_until(50_000);
    pair.nodes[B].post_send(9, SendOp::LocalInvalidate { rkey }, &[]);
    pair.drive_until(60_000);
    assert_eq!(pair.nodes[B].statuses(Queue::Send), [(9, SUCCESS)]);
    pair.drive();
    pair.expect_sends(&[(1, WcStatus::RemAccessErr)]);
    expect_nak(&pair, NakCode::RemoteAccess, FIRST_PSN + 2);
    let b = &pair.nodes[B];
    assert_eq!(b.read(WINDOW, 512), pattern(5, 700)[..512]);
    assert_eq!(b.read(WINDOW + 512, 188), [0; 188]);
}

/// A READ whose responses do not fit one turn is cut off between two of them.
#[test]
fn a_read_in_progress_stops_at_the_revocation() {
    let mut pair = Pair::with(config(), |_, attr| Attr {
        path_mtu: Mtu::Mtu4096,
        ..*attr
    });
    let b = &mut pair.nodes[B];
    let key = b.alloc_window(WindowType::Type2);
    let bind = Bind {
        addr: IOVA,
        len: MEMORY_LEN as u64,
        ..b.bind(key)
    };
    b.mem.bind_window(&bind, PD, QPN).unwrap();
    let mut headers = Headers::new(Opcode::ReadRequest, QPN, FIRST_PSN);
    headers.reth = Some(Reth {
        va: IOVA,
        rkey: bind.rkey.0,
        dma_len: u32::try_from(MEMORY_LEN).unwrap(),
    });
    pair.inject_built(B, &headers, &[]);
    let b = &mut pair.nodes[B];
    let is_more = b.qp.poll_transmit(0, &mut b.mem, &mut b.tx, AckTime::Now);
    assert!(is_more, "{MEMORY_LEN} bytes do not fit");
    b.mem.invalidate(bind.rkey, PD, QPN).unwrap();
    pair.send_off(B);
    let before = pair.sent.len();
    pair.transmit();
    let after: Vec<Opcode> = pair.sent[before..].iter().map(Sent::opcode).collect();
    assert_eq!(after, [Opcode::Acknowledge]);
    expect_nak(
        &pair,
        NakCode::RemoteAccess,
        FIRST_PSN + u32::try_from(before).unwrap(),
    );
}

/// A READ is asked for in pieces; a revocation between two of them ends it.
#[test]
fn a_long_read_ends_with_the_revocation() {
    let (pair, rkey) = pair_with_window();
    let mut pair = pair.filtered(|sent| match sent.opcode() {
        Opcode::ReadResponseLast => Fate::Delay { ns: 50_000 },
        _ => Fate::Deliver,
    });
    let b = &mut pair.nodes[B];
    b.mem.free_window(rkey).unwrap();
    let key = b.alloc_window(WindowType::Type2);
    let bind = Bind {
        addr: IOVA,
        len: MEMORY_LEN as u64,
        ..b.bind(key)
    };
    b.mem.bind_window(&bind, PD, QPN).unwrap();
    let (remote, sge) = (at(0, bind.rkey), pair.nodes[A].sge(0, 100_000));
    pair.nodes[A].post_send(1, SendOp::Read { remote }, &[sge]);
    pair.drive_until(60_000);
    let rkey = bind.rkey;
    pair.nodes[B].post_send(9, SendOp::LocalInvalidate { rkey }, &[]);
    pair.drive_until(60_001);
    assert_eq!(pair.nodes[B].statuses(Queue::Send), [(9, SUCCESS)]);
    let revoked = pair.sent.len();
    pair.drive();
    pair.expect_sends(&[(1, WcStatus::RemAccessErr)]);
    let from_b: Vec<Opcode> = pair.sent[revoked..]
        .iter()
        .filter(|sent| sent.from == B)
        .map(Sent::opcode)
        .collect();
    assert_eq!(from_b, [Opcode::Acknowledge], "{}", pair.trace());
}
