//! Memory windows as `<infiniband/verbs.h>` has them: allocation, both ways to bind, revocation; and regions
//! changed in place, which windows forbid.

use std::mem;
use std::ptr;

use rdma_core_bindings::*;

use crate::support::*;

const REMOTE: u32 = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;

/// Two ends whose regions take windows.
fn window_pair() -> (End, End) {
    pair(Options {
        mr_access: ALL | IBV_ACCESS_MW_BIND,
        ..Options::default()
    })
}

pub(crate) fn alloc(end: &End, mw_type: ibv_mw_type) -> Mw {
    alloc_mw(&end.pd, mw_type).unwrap()
}

/// Through the verb for windows of type 1.
fn bind_mw(end: &End, mw: &Mw, bind: &mut ibv_mw_bind) -> i32 {
    // SAFETY: a live queue pair, a live window and a description.
    unsafe { ibv_bind_mw(end.qp.ptr(), mw.ptr(), bind) }
}

/// `ibv_rereg_mr`: 0 or errno.
fn rereg(mr: &Mr, flags: u32, pd: *mut ibv_pd, addr: *mut u8, length: usize, access: u32) -> i32 {
    let rereg_mr = verbs().rereg_mr;
    let (flags, access) = (flags.cast_signed(), access.cast_signed());
    clear_errno();
    // SAFETY: a live region, and a live domain or none; the device itself checks the memory.
    match unsafe { rereg_mr(mr.ptr(), flags, pd, addr.cast(), length, access) } {
        0 => 0,
        IBV_REREG_MR_ERR_INPUT => errno(),
        other => panic!("{other}"),
    }
}

pub(crate) fn info(end: &End, byte_offset: usize, len: usize) -> ibv_mw_bind_info {
    ibv_mw_bind_info {
        mr: end.mr.ptr(),
        addr: end.at(byte_offset),
        length: len as u64,
        mw_access_flags: REMOTE,
    }
}

/// A request to bind a window of type 2 under its next key.
pub(crate) fn bind_wr(wr_id: u64, mw: &Mw, bind_info: ibv_mw_bind_info) -> (ibv_send_wr, u32) {
    let rkey = ibv_inc_rkey(mw.rkey);
    let mut request = wr(wr_id, IBV_WR_BIND_MW);
    request.__bindgen_anon_2.bind_mw = ibv_send_wr__bindgen_ty_4__bindgen_ty_1 {
        mw: mw.ptr(),
        rkey,
        bind_info,
    };
    (request, rkey)
}

pub(crate) fn invalidate_wr(wr_id: u64, opcode: ibv_wr_opcode, rkey: u32) -> ibv_send_wr {
    let mut request = wr(wr_id, opcode);
    request.__bindgen_anon_1.invalidate_rkey = rkey;
    request
}

/// A WRITE of 8 bytes to `byte_offset` of the peer's memory under another key; its status.
fn write_through(end: &End, peer: &End, byte_offset: usize, rkey: u32) -> ibv_wc_status {
    let mut request = rdma(77, IBV_WR_RDMA_WRITE, peer, byte_offset);
    request.wr.rdma.rkey = rkey;
    assert_eq!(end.post_one(request, 0, 8), 0);
    end.wait().status
}

#[test]
fn the_device_says_that_it_has_windows() {
    let (a, _b) = window_pair();
    let attr = device_attr(&a.context);
    let flags = IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    assert_eq!(attr.device_cap_flags & flags, flags);
    assert_eq!(attr.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2A, 0);
    assert!(attr.max_mw > 0);
}

#[test]
fn windows_come_and_go_by_their_conventions() {
    let (a, _b) = window_pair();
    for mw_type in [IBV_MW_TYPE_1, IBV_MW_TYPE_2] {
        let mw = alloc(&a, mw_type);
        assert_eq!((mw.context, mw.pd), (a.context.ptr(), a.pd.ptr()));
        assert_eq!(mw.type_, mw_type);
        assert_ne!(mw.rkey, a.rkey());
        let mut pd = alloc_pd(&a.context);
        let mut other = alloc_mw(&pd, mw_type).unwrap();
        assert_ne!(other.rkey, mw.rkey);
        assert_eq!(pd.destroy(), libc::EBUSY, "it has a window");
        assert_eq!(other.destroy(), 0);
        assert_eq!(pd.destroy(), 0);
    }
    assert_eq!(alloc_mw(&a.pd, 3).err(), Some(libc::EINVAL));
}

#[test]
fn a_window_of_type_1_is_bound_and_unbound_by_a_verb() {
    let (a, mut b) = window_pair();
    let mw = alloc(&b, IBV_MW_TYPE_1);
    let first = mw.rkey;
    let bind = |b: &End, wr_id, bind_info| {
        let mut bind = ibv_mw_bind {
            wr_id,
            send_flags: IBV_SEND_SIGNALED,
            bind_info,
        };
        bind_mw(b, &mw, &mut bind)
    };
    assert_eq!(bind(&b, 1, info(&b, 4096, 4096)), 0);
    let rkey = mw.rkey;
    assert_eq!((rkey >> 8, rkey == first), (first >> 8, false));
    assert_eq!(b.wait_ok(1).opcode, IBV_WC_BIND_MW);
    a.memory.write(0, b"windowed");
    assert_eq!(write_through(&a, &b, 4096, rkey), IBV_WC_SUCCESS);
    assert_eq!(b.memory.read(4096, 8), b"windowed");

    assert_eq!(b.mr.destroy(), libc::EBUSY, "a window is bound");
    let zero_based = ibv_mw_bind_info {
        mw_access_flags: REMOTE | IBV_ACCESS_ZERO_BASED,
        ..info(&b, 0, 8)
    };
    assert_eq!(bind(&b, 2, zero_based), libc::EINVAL);
    let unknown_right = ibv_mw_bind_info {
        mw_access_flags: 1 << 6,
        ..info(&b, 0, 8)
    };
    assert_eq!(bind(&b, 2, unknown_right), libc::EINVAL);
    assert_eq!(mw.rkey, rkey, "a refused bind changes no key");

    let nothing = ibv_mw_bind_info::default();
    assert_eq!(bind(&b, 3, nothing), 0);
    b.wait_ok(3);
    assert_eq!(write_through(&a, &b, 4096, rkey), IBV_WC_REM_ACCESS_ERR);
}

#[test]
fn a_window_of_type_2_is_bound_and_revoked_by_requests() {
    let (a, mut b) = window_pair();
    let mw = alloc(&b, IBV_MW_TYPE_2);
    let (mut bind, rkey) = bind_wr(1, &mw, info(&b, 4096, 4096));
    // Of the key only the tag is the application's.
    bind.__bindgen_anon_2.bind_mw.rkey = rkey & 0xff;
    assert_eq!(b.post(&mut bind), 0);
    assert_eq!(b.wait_ok(1).opcode, IBV_WC_BIND_MW);
    a.memory.write(0, b"windowed");
    assert_eq!(write_through(&a, &b, 4096, rkey), IBV_WC_SUCCESS);
    assert_eq!(b.memory.read(4096, 8), b"windowed");

    // Through the verb it is not to be had.
    let mut verb = ibv_mw_bind {
        wr_id: 2,
        send_flags: 0,
        bind_info: info(&b, 0, 8),
    };
    assert_eq!(bind_mw(&b, &mw, &mut verb), libc::EINVAL);
    let bind_mw = b.context.ops.bind_mw.unwrap();
    // SAFETY: as in the inline function.
    let past_the_inline = unsafe { bind_mw(b.qp.ptr(), mw.ptr(), &raw mut verb) };
    assert_eq!(past_the_inline, libc::EINVAL);

    let mut revoke = invalidate_wr(3, IBV_WR_LOCAL_INV, rkey);
    assert_eq!(b.post(&mut revoke), 0);
    assert_eq!(b.wait_ok(3).opcode, IBV_WC_LOCAL_INV);
    assert_eq!(write_through(&a, &b, 4096, rkey), IBV_WC_REM_ACCESS_ERR);
    assert_eq!(b.mr.destroy(), 0, "nothing is bound");
}

#[test]
fn a_posted_bind_is_for_windows_of_type_2_and_needs_its_objects() {
    let (_a, b) = window_pair();
    let type_1 = alloc(&b, IBV_MW_TYPE_1);
    let (mut bind, _) = bind_wr(1, &type_1, info(&b, 0, 8));
    assert_eq!(b.post(&mut bind), libc::EINVAL);
    let type_2 = alloc(&b, IBV_MW_TYPE_2);
    let without_region = ibv_mw_bind_info {
        mr: ptr::null_mut(),
        ..info(&b, 0, 8)
    };
    let (mut bind, _) = bind_wr(1, &type_2, without_region);
    assert_eq!(b.post(&mut bind), libc::EINVAL);
    assert!(b.poll().is_none());
    assert_eq!(b.state(), IBV_QPS_RTS);
}

#[test]
fn a_bind_that_the_region_does_not_allow_completes_in_error() {
    let (_a, b) = pair(Options::default());
    let mw = alloc(&b, IBV_MW_TYPE_2);
    let (mut bind, _) = bind_wr(1, &mw, info(&b, 0, 8));
    // Errors complete, signalled or not.
    bind.send_flags = 0;
    assert_eq!(b.post(&mut bind), 0);
    let wc = b.wait();
    assert_eq!((wc.wr_id, wc.status), (1, IBV_WC_MW_BIND_ERR));
    assert_eq!(b.state(), IBV_QPS_ERR);
}

#[test]
fn a_send_revokes_the_window_and_says_which() {
    let (a, b) = window_pair();
    let mw = alloc(&b, IBV_MW_TYPE_2);
    let (mut bind, rkey) = bind_wr(1, &mw, info(&b, 4096, 4096));
    assert_eq!(b.post(&mut bind), 0);
    b.wait_ok(1);
    assert_eq!(b.post_recv(2, 64, 64), 0);
    a.memory.write(0, b"done with");
    let send = invalidate_wr(3, IBV_WR_SEND_WITH_INV, rkey);
    assert_eq!(a.post_one(send, 0, 9), 0);
    assert_eq!(a.wait_ok(3).opcode, IBV_WC_SEND);
    let received = b.wait_ok(2);
    // SAFETY: either part of the union is an integer.
    let told = unsafe { received.__bindgen_anon_1.invalidated_rkey };
    assert_eq!((received.wc_flags, told), (IBV_WC_WITH_INV, rkey));
    assert_eq!((received.opcode, received.byte_len), (IBV_WC_RECV, 9));
    assert_eq!(b.memory.read(64, 9), b"done with");
    // Free again, so it may be bound again, under a key of its own.
    // SAFETY: the application's own field of a live window, which no verb uses now.
    unsafe { (*mw.ptr()).rkey = rkey };
    let (mut bind, next) = bind_wr(4, &mw, info(&b, 0, 8));
    assert_eq!(b.post(&mut bind), 0);
    b.wait_ok(4);
    assert_eq!(write_through(&a, &b, 0, next), IBV_WC_SUCCESS);
    assert_eq!(write_through(&a, &b, 0, rkey), IBV_WC_REM_ACCESS_ERR);
}

#[test]
fn windows_of_a_destroyed_queue_pair_are_free() {
    let (a, mut b) = window_pair();
    let mw = alloc(&b, IBV_MW_TYPE_2);
    let (mut bind, rkey) = bind_wr(1, &mw, info(&b, 4096, 4096));
    assert_eq!(b.post(&mut bind), 0);
    b.wait_ok(1);
    b.qp = b.create_qp();
    b.connect(a.device.address(), a.qpn());
    let revoke = &mut invalidate_wr(2, IBV_WR_LOCAL_INV, rkey);
    assert_eq!(b.post(revoke), 0);
    assert_eq!(b.wait().status, IBV_WC_LOC_QP_OP_ERR, "it is free already");
    assert_eq!(b.mr.destroy(), 0, "nothing is bound");
}

/// While a peer writes as fast as it can: once the revocation has completed, or the window is freed, no
/// byte changes any more.
#[test]
fn revocation_is_a_fence() {
    for is_freed in [false, true] {
        let (a, b) = window_pair();
        let mut mw = alloc(&b, IBV_MW_TYPE_2);
        let (mut bind, rkey) = bind_wr(1, &mw, info(&b, 0, 1 << 16));
        assert_eq!(b.post(&mut bind), 0);
        b.wait_ok(1);
        let after = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for value in (1..=255_u8).cycle() {
                    a.memory.write(0, &pattern(1 << 16, value));
                    let mut request = rdma(2, IBV_WR_RDMA_WRITE, &b, 0);
                    request.wr.rdma.rkey = rkey;
                    assert_eq!(a.post_one(request, 0, 1 << 16), 0);
                    let wc = a.wait();
                    if wc.status != IBV_WC_SUCCESS {
                        return wc.status;
                    }
                }
                unreachable!("the key is revoked soon")
            });
            let start = std::time::Instant::now();
            while b.memory.load(1 << 15) == 0 {
                assert!(start.elapsed() < PATIENCE, "the peer writes");
                std::thread::yield_now();
            }
            if is_freed {
                assert_eq!(mw.destroy(), 0);
            } else {
                assert_eq!(b.post(&mut invalidate_wr(3, IBV_WR_LOCAL_INV, rkey)), 0);
                b.wait_ok(3);
            }
            let then = b.memory.read(0, 1 << 16);
            let status = writer.join().unwrap();
            assert_eq!(status, IBV_WC_REM_ACCESS_ERR);
            then
        });
        assert!(
            b.memory.read(0, 1 << 16) == after,
            "a revoked window let bytes in"
        );
    }
}

#[test]
fn a_region_is_changed_under_its_key() {
    let (a, mut b) = window_pair();
    let rkey = b.rkey();
    let none = ptr::null_mut();
    let (to_access, to_place) = (IBV_REREG_MR_CHANGE_ACCESS, IBV_REREG_MR_CHANGE_TRANSLATION);
    // What is refused changes nothing.
    let writable = IBV_ACCESS_REMOTE_WRITE;
    assert_eq!(
        rereg(&b.mr, to_access, none, ptr::null_mut(), 0, writable),
        libc::EINVAL
    );
    assert_eq!(rereg(&b.mr, 8, none, ptr::null_mut(), 0, 0), libc::EINVAL);
    assert_eq!(
        rereg(&b.mr, to_place, none, b.memory.addr(), 0, 0),
        libc::EINVAL
    );
    let hole = ptr::without_provenance_mut(1 << 12);
    assert_eq!(rereg(&b.mr, to_place, none, hole, 8, 0), libc::EFAULT);
    assert_eq!(
        rereg(&b.mr, IBV_REREG_MR_CHANGE_PD, none, none.cast(), 0, 0),
        libc::EINVAL
    );
    let mw = alloc(&b, IBV_MW_TYPE_2);
    let (mut bind, bound) = bind_wr(1, &mw, info(&b, 0, 8));
    assert_eq!(b.post(&mut bind), 0);
    b.wait_ok(1);
    assert_eq!(
        rereg(&b.mr, to_access, none, ptr::null_mut(), 0, ALL),
        libc::EBUSY
    );
    assert_eq!(b.post(&mut invalidate_wr(2, IBV_WR_LOCAL_INV, bound)), 0);
    b.wait_ok(2);
    drop(mw);
    assert_eq!(write_through(&a, &b, 0, rkey), IBV_WC_SUCCESS);

    // Other memory under the same key.
    let moved = Memory::new(4096);
    let old = mem::replace(&mut b.memory, moved);
    assert_eq!(rereg(&b.mr, to_place, none, b.memory.addr(), 4096, 0), 0);
    drop(old);
    let (addr, length) = (b.mr.addr.cast(), b.mr.length);
    assert_eq!((addr, length), (b.memory.addr(), 4096));
    a.memory.write(0, b"moved on");
    assert_eq!(write_through(&a, &b, 4088, rkey), IBV_WC_SUCCESS);
    assert_eq!(b.memory.read(4088, 8), b"moved on");

    // Another domain: the queue pair's no longer, and the old domain has one child less.
    let mut pd = alloc_pd(&b.context);
    assert_eq!(
        rereg(
            &b.mr,
            IBV_REREG_MR_CHANGE_PD,
            pd.ptr(),
            ptr::null_mut(),
            0,
            0
        ),
        0
    );
    assert_eq!(b.mr.pd, pd.ptr());
    assert_eq!(pd.destroy(), libc::EBUSY);
    assert_eq!(write_through(&a, &b, 0, rkey), IBV_WC_REM_ACCESS_ERR);
    assert_eq!(
        rereg(
            &b.mr,
            IBV_REREG_MR_CHANGE_PD,
            b.pd.ptr(),
            ptr::null_mut(),
            0,
            0
        ),
        0
    );
    assert_eq!(pd.destroy(), 0);
}

#[test]
fn a_right_taken_from_a_region_is_gone() {
    let (a, b) = window_pair();
    let (flags, access) = (IBV_REREG_MR_CHANGE_ACCESS, IBV_ACCESS_REMOTE_READ);
    let (pd, addr) = (ptr::null_mut(), ptr::null_mut());
    assert_eq!(rereg(&b.mr, flags, pd, addr, 0, access), 0);
    assert_eq!(a.post_one(rdma(1, IBV_WR_RDMA_READ, &b, 0), 0, 8), 0);
    a.wait_ok(1);
    assert_eq!(write_through(&a, &b, 0, b.rkey()), IBV_WC_REM_ACCESS_ERR);
}
