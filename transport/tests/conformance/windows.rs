//! Memory windows: granted to one peer, revoked alone, and shut from then on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use transport::connect::{ConnectConfig, Prepared};
use transport::{
    AccessFlags, Done, Error, MemoryWindow, ProtectionDomain, QpState, ReadyQp, Remote, Rkey,
    SendFlags, Source, Type1, Type2, WcOpcode, WcStatus, leaked_objects,
};

use crate::harness::{ALL, End, IMAGE_LEN, Pair, SIGNALED, config, pair_with, pattern};

const BINDABLE: AccessFlags = ALL.union(AccessFlags::MW_BIND);
const REMOTE: AccessFlags = AccessFlags::REMOTE_WRITE
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_ATOMIC);
/// Where the windows of these tests lie.
const START: usize = 8192;
const LEN: usize = 4096;

/// A connection between ends whose regions take windows, if the device has any.
fn pair() -> Option<Pair> {
    let pair = pair_with(&config(), &config(), BINDABLE)?;
    if pair.far.context.attr().unwrap().max_mw == 0 {
        eprintln!("skipped: the device has no memory windows");
        return None;
    }
    Some(pair)
}

impl End {
    fn alloc_window(&self) -> MemoryWindow<Type2> {
        self.pd.alloc_mw().unwrap()
    }

    /// Binds a window of type 2 with these rights and waits until it is bound.
    fn bind(&mut self, window: &MemoryWindow<Type2>, access: AccessFlags) -> Remote {
        let range = START..START + LEN;
        let mut chain = self.qp.start_send();
        let remote = chain
            .bind_mw(10, window, &self.region, range, access, SIGNALED)
            .unwrap();
        chain.submit().unwrap();
        assert_eq!(self.expect(10).opcode, WcOpcode::BindMw);
        remote
    }

    fn bind_type_1(&mut self, window: &MemoryWindow<Type1>, start: usize) -> Remote {
        let range = start..start + LEN;
        let (region, qp) = (&self.region, &mut self.qp);
        let remote = qp
            .bind_mw(12, window, region, range, REMOTE, SIGNALED)
            .unwrap();
        assert_eq!(self.expect(12).opcode, WcOpcode::BindMw);
        remote
    }

    /// Revokes a window of type 2 and waits until it is revoked.
    fn revoke(&mut self, window: &MemoryWindow<Type2>) {
        let mut chain = self.qp.start_send();
        chain.invalidate(11, window, SIGNALED).unwrap();
        chain.submit().unwrap();
        assert_eq!(self.expect(11).opcode, WcOpcode::LocalInv);
        assert!(window.is_free());
    }
}

/// Another connection between the same domains, with the same completion queues.
fn connect_again(pair: &Pair) -> (ReadyQp, ReadyQp) {
    let prepare = |end: &End| Prepared::create(&end.pd, &end.cq, &end.cq, &config()).unwrap();
    let (near, far) = (prepare(&pair.near), prepare(&pair.far));
    let (near_end, far_end) = (near.end_point(), far.end_point());
    (
        near.connect(&far_end).unwrap(),
        far.connect(&near_end).unwrap(),
    )
}

/// Writes through another queue pair of the near end.
fn write_through(pair: &mut Pair, qp: &mut ReadyQp, remote: Remote) -> Done {
    let mut chain = qp.start_send();
    chain
        .write(20, Source::Inline(b"intruder"), remote, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    qp.complete(pair.near.next_completion()).unwrap()
}

#[track_caller]
fn expect_refused(done: &Done) {
    assert_eq!(done.status, WcStatus::RemAccessErr);
}

#[test]
fn a_window_opens_its_part_of_the_region() {
    let Some(mut pair) = pair() else { return };
    let window = pair.far.alloc_window();
    assert_eq!((window.rkey(), window.is_free()), (None, true));
    let remote = pair.far.bind(&window, REMOTE);
    assert_eq!(
        (window.rkey(), window.is_free()),
        (Some(remote.rkey), false)
    );
    assert_eq!(remote.addr, pair.far.remote(START).addr);
    assert_ne!(remote.rkey, pair.far.region.rkey());
    let bytes = pattern(1, LEN);
    assert!(pair.near.write(&bytes, remote).is_success());
    assert!(pair.far.image_bytes(START, LEN) == bytes);
    let done = pair.near.read(100, remote.at(LEN as u64 - 100));
    assert_eq!(done.buffer.unwrap().as_slice(), &bytes[LEN - 100..]);
    let into = pair.near.buffer(&[0; 8]);
    let mut chain = pair.near.qp.start_send();
    chain.fetch_add(3, into, remote, 1, SIGNALED).unwrap();
    chain.submit().unwrap();
    #[expect(clippy::host_endian_bytes, reason = "atomics are in host byte order")]
    let word = u64::from_ne_bytes(*bytes.first_chunk().unwrap());
    assert_eq!(pair.near.expect(3).buffer.unwrap().as_u64(), Some(word));
}

/// The grant travels behind the bind, in one chain: the peer never has it too early.
#[test]
fn a_grant_follows_its_bind() {
    let Some(mut pair) = pair() else { return };
    for round in 0..20 {
        let buffer = pair.near.buffer(&[0; 12]);
        pair.near.qp.post_recv(1, buffer).unwrap();
        let window = pair.far.alloc_window();
        let range = START..START + LEN;
        let mut chain = pair.far.qp.start_send();
        let region = &pair.far.region;
        let flags = SendFlags::empty();
        let remote = chain
            .bind_mw(10, &window, region, range, REMOTE, flags)
            .unwrap();
        let mut grant = [0; 12];
        grant[..8].copy_from_slice(&remote.addr.to_be_bytes());
        grant[8..].copy_from_slice(&remote.rkey.0.to_be_bytes());
        chain.send(11, Source::Inline(&grant), SIGNALED).unwrap();
        chain.submit().unwrap();
        let received = pair.near.expect(1).buffer.unwrap();
        assert_eq!(received.as_slice(), grant);
        let bytes = pattern(round, 64);
        assert!(pair.near.write(&bytes, remote).is_success());
        assert_eq!(pair.far.image_bytes(START, 64), bytes);
        pair.far.expect(11);
        pair.far.revoke(&window);
    }
}

#[test]
fn a_window_grants_its_own_rights_and_no_more() {
    for (access, may_write) in [
        (AccessFlags::REMOTE_READ, false),
        (AccessFlags::REMOTE_WRITE, true),
    ] {
        let Some(mut pair) = pair() else { return };
        let window = pair.far.alloc_window();
        let remote = pair.far.bind(&window, access);
        if may_write {
            assert!(pair.near.write(b"allowed", remote).is_success());
            expect_refused(&pair.near.read(7, remote));
        } else {
            assert!(pair.near.read(7, remote).is_success());
            expect_refused(&pair.near.write(b"refused", remote));
            assert_eq!(pair.far.image_bytes(START, 7), [0; 7]);
        }
    }
}

#[test]
fn a_window_ends_where_it_ends() {
    for start in [START - 1, START + LEN - 7] {
        let Some(mut pair) = pair() else { return };
        let window = pair.far.alloc_window();
        let remote = pair.far.bind(&window, REMOTE);
        let Remote { addr, .. } = pair.far.remote(start);
        let done = pair.near.write(b"8 bytes.", Remote { addr, ..remote });
        if pair.far.context.name().starts_with("rxe") && done.is_success() {
            // rxe (6.1) holds an access to the bounds of the region below, not to those of the window.
            continue;
        }
        expect_refused(&done);
        assert_eq!(pair.far.image_bytes(start, 8), [0; 8]);
    }
}

#[test]
fn a_window_of_type_2_serves_one_queue_pair() {
    let Some(mut pair) = pair() else { return };
    let (mut intruder, _far) = connect_again(&pair);
    let window = pair.far.alloc_window();
    let remote = pair.far.bind(&window, REMOTE);
    expect_refused(&write_through(&mut pair, &mut intruder, remote));
    assert_eq!(pair.far.image_bytes(START, 8), [0; 8]);
    assert!(pair.near.write(b"the peer", remote).is_success());
}

#[test]
fn a_window_of_type_1_serves_its_domain_until_it_is_unbound() {
    let Some(mut pair) = pair() else { return };
    let (mut other, _far) = connect_again(&pair);
    let window = pair.far.pd.alloc_mw::<Type1>().unwrap();
    let first = pair.far.bind_type_1(&window, START);
    assert!(pair.near.write(b"one peer", first).is_success());
    assert!(write_through(&mut pair, &mut other, first).is_success());
    assert_eq!(pair.far.image_bytes(START, 8), b"intruder");
    pair.far.qp.unbind_mw(13, &window, SIGNALED).unwrap();
    assert!(!window.is_free(), "not before its completion");
    pair.far.expect(13);
    assert!(window.is_free());
    // Bound again, elsewhere and under another key.
    let second = pair.far.bind_type_1(&window, 0);
    assert_ne!(first.rkey, second.rkey);
    assert!(pair.near.write(b"again", second).is_success());
    assert_eq!(pair.far.image_bytes(0, 5), b"again");
    expect_refused(&write_through(&mut pair, &mut other, first));
    assert_eq!(pair.far.image_bytes(START, 8), b"intruder");
}

#[test]
fn a_revoked_window_is_shut() {
    let Some(mut pair) = pair() else { return };
    let window = pair.far.alloc_window();
    let first = pair.far.bind(&window, REMOTE);
    assert!(pair.near.write(b"open", first).is_success());
    pair.far.revoke(&window);
    let second = pair.far.bind(&window, REMOTE);
    assert_ne!(first.rkey, second.rkey);
    assert!(pair.near.write(b"anew", second).is_success());
    expect_refused(&pair.near.write(b"shut", first));
    assert_eq!(pair.far.image_bytes(START, 4), b"anew");
}

#[test]
fn the_peer_s_send_revokes_the_window() {
    let Some(mut pair) = pair() else { return };
    let window = pair.far.alloc_window();
    let first = pair.far.bind(&window, REMOTE);
    for (seed, len) in [(1, 0), (2, 10), (3, 10_000)] {
        let rkey = window.rkey().unwrap();
        let buffer = pair.far.buffer(&vec![0; len]);
        pair.far.qp.post_recv(1, buffer).unwrap();
        let bytes = pattern(seed, len);
        let source = Source::Local(pair.near.buffer(&bytes));
        let mut chain = pair.near.qp.start_send();
        chain.send_invalidate(2, source, rkey, SIGNALED).unwrap();
        chain.submit().unwrap();
        assert_eq!(pair.near.expect(2).opcode, WcOpcode::Send);
        let completion = pair.far.next_completion();
        assert_eq!(completion.invalidated(), Some(rkey));
        let done = pair.far.qp.complete(completion).unwrap();
        assert_eq!((done.wr_id, done.status), (1, WcStatus::Success));
        assert_eq!(done.invalidated, Some(rkey));
        assert_eq!((done.opcode, done.imm), (WcOpcode::Recv, None));
        assert!(done.buffer.unwrap().as_slice() == bytes);
        assert!(window.is_free());
        pair.far.bind(&window, REMOTE);
    }
    expect_refused(&pair.near.write(b"shut", first));
}

/// What the peer may not revoke ends the queue pair that was asked to, after its data were placed.
#[test]
fn a_send_cannot_revoke_a_region() {
    let Some(mut pair) = pair() else { return };
    let buffer = pair.far.buffer(&[0; 8]);
    pair.far.qp.post_recv(1, buffer).unwrap();
    let rkey = pair.far.region.rkey();
    let mut chain = pair.near.qp.start_send();
    chain
        .send_invalidate(2, Source::Inline(b"data"), rkey, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    pair.far.expect_error(1, &[WcStatus::RemInvReqErr]);
    pair.near.expect(2);
    let state = pair.far.qp.query().unwrap().state;
    assert_eq!(state, QpState::Err);
}

/// While a peer writes as fast as it can: once the revocation has completed, no byte changes any more.
#[test]
fn revocation_is_a_fence() {
    for is_freed in [false, true] {
        let Some(Pair { mut near, mut far }) = pair() else {
            return;
        };
        let window = far.alloc_window();
        let remote = far.bind(&window, REMOTE);
        let has_written = AtomicBool::new(false);
        let then = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for seed in 1.. {
                    let done = near.write(&pattern(seed, LEN), remote);
                    if !done.is_success() {
                        return done;
                    }
                    has_written.store(true, Ordering::Relaxed);
                }
                unreachable!("the key is revoked soon")
            });
            while !has_written.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            if is_freed {
                window.free().unwrap();
            } else {
                far.revoke(&window);
            }
            let then = far.image_bytes(START, LEN);
            expect_refused(&writer.join().unwrap());
            then
        });
        let now = far.image_bytes(START, LEN);
        assert!(now == then, "a revoked window let bytes in");
    }
}

/// READs as fast as they go, of memory that changes once the window is revoked: none that succeeds has
/// a byte from after the revocation.
#[test]
fn a_read_in_progress_sees_nothing_of_after_the_revocation() {
    const READ_LEN: usize = 1 << 20;
    let Some(Pair { mut near, mut far }) = pair() else {
        return;
    };
    far.image.write_at(0, &[1; READ_LEN]).unwrap();
    let window = far.alloc_window();
    let mut chain = far.qp.start_send();
    let remote = chain
        .bind_mw(1, &window, &far.region, 0..READ_LEN, REMOTE, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    far.expect(1);
    let has_read = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            loop {
                let done = near.read(READ_LEN, remote);
                if !done.is_success() {
                    return done;
                }
                let buffer = done.buffer.unwrap();
                let is_old = buffer.as_slice().iter().all(|byte| *byte == 1);
                assert!(is_old, "bytes from after the revocation");
                has_read.store(true, Ordering::Relaxed);
            }
        });
        while !has_read.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        far.revoke(&window);
        far.image.write_at(0, &[2; READ_LEN]).unwrap();
        expect_refused(&reader.join().unwrap());
    });
}

#[test]
fn a_bind_that_could_only_fail_is_refused_before_it_is_posted() {
    let Some(mut pair) = pair() else { return };
    let far = &mut pair.far;
    let window = far.alloc_window();
    let register = |access| {
        let region = far.pd.register(&far.image, 0..4096, access, None).unwrap();
        Arc::new(region)
    };
    let unbindable = register(ALL);
    let read_only = register(AccessFlags::MW_BIND | AccessFlags::REMOTE_READ);
    let other_pd = ProtectionDomain::alloc(&far.context).unwrap();
    let foreign = other_pd.register(&far.image, 0..4096, BINDABLE, None);
    let foreign = Arc::new(foreign.unwrap());
    let foreign_window = other_pd.alloc_mw::<Type2>().unwrap();
    let mut chain = far.qp.start_send();
    let mut refused = |window, region, range, access| {
        chain
            .bind_mw(1, window, region, range, access, SIGNALED)
            .unwrap_err()
    };

    let error = refused(&window, &unbindable, 0..8, REMOTE);
    let missing = AccessFlags::MW_BIND;
    assert!(
        matches!(error, Error::WindowRights { missing: m } if m == missing),
        "{error}"
    );
    let error = refused(&window, &read_only, 0..8, AccessFlags::REMOTE_ATOMIC);
    let missing = AccessFlags::LOCAL_WRITE;
    assert!(
        matches!(error, Error::WindowRights { missing: m } if m == missing),
        "{error}"
    );
    let error = refused(&window, &far.region, 1..IMAGE_LEN + 1, REMOTE);
    assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
    let error = refused(&window, &far.region, 8..8, REMOTE);
    assert!(matches!(error, Error::WindowNotBound { .. }), "{error}");
    let error = refused(&window, &foreign, 0..8, REMOTE);
    assert!(matches!(error, Error::WrongProtectionDomain), "{error}");
    let error = refused(&foreign_window, &far.region, 0..8, REMOTE);
    assert!(matches!(error, Error::WrongProtectionDomain), "{error}");
    assert!(chain.is_empty() && window.is_free());
    drop(chain);

    // A region that is only read takes a window that is only read.
    let mut chain = far.qp.start_send();
    let read = AccessFlags::REMOTE_READ;
    chain
        .bind_mw(2, &window, &read_only, 0..8, read, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    far.expect(2);
}

#[test]
fn a_window_is_bound_once_and_revoked_once() {
    let Some(mut pair) = pair() else { return };
    let (_near, mut other) = connect_again(&pair);
    let window = pair.far.alloc_window();
    let region = Arc::clone(&pair.far.region);
    let bind = |qp: &mut ReadyQp| {
        let mut chain = qp.start_send();
        let bound = chain.bind_mw(1, &window, &region, 0..8, REMOTE, SIGNALED);
        bound.map(|_| ())
    };
    let revoke = |qp: &mut ReadyQp| qp.start_send().invalidate(1, &window, SIGNALED);
    let is_not_bound = |result| matches!(result, Err(Error::WindowNotBound { .. }));
    let is_not_revoked = |result| matches!(result, Err(Error::WindowNotRevoked { .. }));

    assert!(is_not_revoked(revoke(&mut pair.far.qp)), "never bound");
    // A chain that is dropped has bound nothing.
    bind(&mut pair.far.qp).unwrap();
    assert!(window.is_free());
    pair.far.bind(&window, REMOTE);
    assert!(is_not_bound(bind(&mut pair.far.qp)), "bound");
    assert!(is_not_revoked(revoke(&mut other)), "not there");
    // Nor has it revoked anything.
    revoke(&mut pair.far.qp).unwrap();
    assert!(window.rkey().is_some());
    let mut chain = pair.far.qp.start_send();
    chain.invalidate(2, &window, SIGNALED).unwrap();
    chain.submit().unwrap();
    assert_eq!(window.rkey(), None);
    assert!(is_not_revoked(revoke(&mut pair.far.qp)), "on its way");
    assert!(
        is_not_bound(bind(&mut pair.far.qp)),
        "not before it is done"
    );
    pair.far.expect(2);
    assert!(is_not_revoked(revoke(&mut pair.far.qp)), "revoked");
    pair.far.bind(&window, REMOTE);
}

/// A bind and a revocation that are flushed leave a window that nobody knows: it can only be freed.
#[test]
fn a_flushed_window_can_only_be_freed() {
    let Some(mut pair) = pair() else { return };
    let (_near, mut other) = connect_again(&pair);
    let (bound, unbound) = (pair.far.alloc_window(), pair.far.alloc_window());
    pair.far.bind(&bound, REMOTE);
    pair.far.qp.to_error().unwrap();
    let range = START..START + LEN;
    let mut chain = pair.far.qp.start_send();
    let region = &pair.far.region;
    chain
        .bind_mw(1, &unbound, region, range, REMOTE, SIGNALED)
        .unwrap();
    chain.invalidate(2, &bound, SIGNALED).unwrap();
    chain.submit().unwrap();
    for wr_id in [1, 2] {
        pair.far.expect_error(wr_id, &[WcStatus::WrFlushErr]);
    }
    for window in [bound, unbound] {
        assert!(!window.is_free() && window.rkey().is_none());
        let mut chain = other.start_send();
        let error = chain.invalidate(3, &window, SIGNALED).unwrap_err();
        assert!(matches!(error, Error::WindowNotRevoked { .. }), "{error}");
        drop(chain);
        window.free().unwrap();
    }
}

#[test]
fn a_window_holds_its_region_and_goes_before_it() {
    let Some(mut pair) = pair() else { return };
    let leaked = leaked_objects();
    let window = pair.far.alloc_window();
    let remote = pair.far.bind(&window, REMOTE);
    // The last other owner goes; the window still opens what it holds.
    let replacement = pair.far.pd.register(&pair.far.image, 0..8, ALL, None);
    let region = std::mem::replace(&mut pair.far.region, Arc::new(replacement.unwrap()));
    let failed = region.deregister_shared().unwrap_err();
    assert!(matches!(*failed.error, Error::InUse { holders: 1 }));
    drop(failed.value);
    assert!(pair.near.write(b"held", remote).is_success());
    assert_eq!(pair.far.image_bytes(START, 4), b"held");
    drop(window);
    expect_refused(&pair.near.write(b"gone", remote));
    assert_eq!(leaked_objects(), leaked);
}

/// A queue pair takes the windows bound on it along, and whatever is dropped first, nothing is left.
#[test]
fn windows_and_queue_pairs_go_in_any_order() {
    let Some(pair) = pair() else { return };
    let leaked = leaked_objects();
    let Pair {
        near: _near,
        mut far,
    } = pair;
    let window = far.alloc_window();
    far.bind(&window, REMOTE);
    let (region, image) = (far.region, far.image);
    far.qp.destroy().unwrap();
    assert!(!window.is_free());
    region.deregister_shared().expect("nothing holds it");
    drop((far.cq, far.pd, far.context, image));
    window.free().unwrap();
    assert_eq!(leaked_objects(), leaked);
}

/// A key that the peer makes up is refused, whatever it resembles.
#[test]
fn every_other_tag_is_refused() {
    for tag in [1, 0x80, 0xff] {
        let Some(mut pair) = pair() else { return };
        let window = pair.far.alloc_window();
        let remote = pair.far.bind(&window, REMOTE);
        let rkey = Rkey(remote.rkey.0 ^ tag);
        expect_refused(&pair.near.write(b"guess", Remote { rkey, ..remote }));
    }
}

/// `max_send_wr` windows in one chain: a bind takes a place in the send queue and nothing else.
#[test]
fn a_chain_of_nothing_but_binds() {
    let deep = ConnectConfig {
        access: ALL,
        ..ConnectConfig::default()
    };
    let Some(mut pair) = pair_with(&deep, &deep, BINDABLE) else {
        return;
    };
    if pair.far.context.attr().unwrap().max_mw < 64 {
        return;
    }
    let windows: Vec<_> = (0..64).map(|_| pair.far.alloc_window()).collect();
    let mut chain = pair.far.qp.start_send();
    let mut grants = Vec::new();
    for (index, window) in windows.iter().enumerate() {
        let (range, flags) = (index * 64..index * 64 + 64, SendFlags::empty());
        let flags = if index == 63 { SIGNALED } else { flags };
        let region = &pair.far.region;
        grants.push(
            chain
                .bind_mw(index as u64, window, region, range, REMOTE, flags)
                .unwrap(),
        );
    }
    chain.submit().unwrap();
    pair.far.expect(63);
    for (index, grant) in grants.into_iter().enumerate() {
        let bytes = pattern(u32::try_from(index).unwrap(), 64);
        assert!(pair.near.write(&bytes, grant).is_success());
        assert_eq!(pair.far.image_bytes(index * 64, 64), bytes);
    }
}
