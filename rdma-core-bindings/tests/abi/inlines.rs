//! Calls the inline functions on a fake context, in Rust and in C, and compares what happens.
//!
//! inlines.c is the same program against the C header: same objects, same fakes, same calls in the
//! same order. Each fake writes down how it was called, each call what it returned, and errno.
//!
//! # Safety
//!
//! The objects are made once per test thread and never freed. They are touched through raw pointers
//! alone, from that thread alone.
#![allow(unsafe_code, reason = "fake verbs objects and functions")]

use core::cell::{Cell, RefCell};
use core::ffi::{c_int, c_uint, c_void};
use core::mem::{offset_of, transmute};
use core::ptr::null_mut;
use std::fmt::Write;

use rdma_core_bindings::*;

use crate::c_probe::run_c;

thread_local! {
    /// What happened so far.
    static TRACE: RefCell<String> = const { RefCell::new(String::new()) };
    /// Address and name of each object.
    static NAMES: RefCell<Vec<(usize, &'static str)>> = const { RefCell::new(Vec::new()) };
    /// What the fakes return; those that return a pointer give NULL and set errno unless it is 0.
    static RESULT: Cell<c_int> = const { Cell::new(0) };
}

macro_rules! trace {
    ($($argument:tt)*) => {
        TRACE.with_borrow_mut(|trace| writeln!(trace, $($argument)*).expect("a String grows"))
    };
}

/// One unsafe operation on the fake objects.
macro_rules! fake {
    ($operation:expr) => {
        // SAFETY: the objects and functions are those of this file (module docs).
        unsafe { $operation }
    };
}

#[test]
fn inline_functions_do_what_those_of_c_do() {
    let Some(c) = run_c("inlines", include_str!("inlines.c")) else {
        return;
    };
    let world = World::new();
    take_errno();
    queues(&world);
    windows(&world);
    queries(&world);
    registrations(&world);
    let rust = TRACE.take();
    for (line, (rust, c)) in core::iter::zip(rust.lines(), c.lines()).enumerate() {
        assert_eq!(rust, c, "line {line} of the two traces, Rust left, C right");
    }
    assert_eq!(rust.lines().count(), c.lines().count());
    println!("inlines: {} events agree", c.lines().count());
}

/// C would call NULL, or not link.
#[test]
fn what_a_provider_or_library_lacks_is_eopnotsupp() {
    let world = World::new();
    let World {
        ctx,
        pd,
        mw,
        qp,
        cq,
        srq,
        ..
    } = world;
    fake!((*ctx).ops = ibv_context_ops::default());
    let bad_send = &mut null_mut();
    let bad_recv = &mut null_mut();
    assert_eq!(
        fake!(ibv_post_send(qp, world.send_wr, bad_send)),
        libc::EOPNOTSUPP
    );
    assert_eq!(
        fake!(ibv_post_recv(qp, world.recv_wr, bad_recv)),
        libc::EOPNOTSUPP
    );
    assert_eq!(*bad_send, world.send_wr);
    assert_eq!(*bad_recv, world.recv_wr);
    *bad_recv = null_mut();
    assert_eq!(
        fake!(ibv_post_srq_recv(srq, world.recv_wr, bad_recv)),
        libc::EOPNOTSUPP
    );
    assert_eq!(*bad_recv, world.recv_wr);
    assert_eq!(fake!(ibv_poll_cq(cq, 2, world.wc)), -libc::EOPNOTSUPP);
    assert_eq!(fake!(ibv_req_notify_cq(cq, 0)), libc::EOPNOTSUPP);
    assert_eq!(fake!(ibv_dealloc_mw(mw)), libc::EOPNOTSUPP);
    fake!((*mw).type_ = IBV_MW_TYPE_1);
    assert_eq!(fake!(ibv_bind_mw(qp, mw, world.mw_bind)), libc::EOPNOTSUPP);

    let old = Verbs {
        reg_mr_iova: None,
        reg_mr_iova2: None,
        query_gid_ex: None,
        query_gid_table: None,
        ..world.verbs
    };
    let entry = world.gid_entry;
    assert_eq!(
        fake!(ibv_query_gid_ex(&old, ctx, 1, 3, entry, 0)),
        libc::EOPNOTSUPP
    );
    let entries = fake!(ibv_query_gid_table(&old, ctx, entry, 1, 0));
    assert_eq!(entries, -(libc::EOPNOTSUPP as isize));
    let mr = fake!(ibv_reg_mr_iova(&old, pd, world.buffer, 4096, 8192, 15));
    assert!(mr.is_null());
    assert_eq!(take_errno(), libc::EOPNOTSUPP);
    TRACE.take();
    // The library would leave the optional flag out; this old one does not know it.
    assert_eq!(
        fake!(ibv_reg_mr(&old, pd, world.buffer, 4096, 1 << 20 | 1)),
        world.mr
    );
    assert_eq!(TRACE.take(), "reg_mr pd buffer 4096 1\n");
}

/// The fake objects, all of them linked as a device would.
#[derive(Clone, Copy)]
struct World {
    verbs: Verbs,
    vctx: *mut verbs_context,
    ctx: *mut ibv_context,
    pd: *mut ibv_pd,
    mr: *mut ibv_mr,
    other_mr: *mut ibv_mr,
    mw: *mut ibv_mw,
    mw_bind: *mut ibv_mw_bind,
    qp: *mut ibv_qp,
    cq: *mut ibv_cq,
    srq: *mut ibv_srq,
    send_wr: *mut ibv_send_wr,
    recv_wr: *mut ibv_recv_wr,
    wc: *mut ibv_wc,
    port_attr: *mut ibv_port_attr,
    device_attr: *mut ibv_device_attr_ex,
    gid_entry: *mut ibv_gid_entry,
    buffer: *mut c_void,
}

impl World {
    fn new() -> World {
        let mut vctx = verbs_context {
            query_port: Some(query_port_ex),
            query_device_ex: Some(query_device_ex),
            sz: size_of::<verbs_context>(),
            ..Default::default()
        };
        vctx.context.abi_compat = VERBS_ABI_IS_EXTENDED;
        vctx.context.ops = ibv_context_ops {
            post_send: Some(post_send),
            post_recv: Some(post_recv),
            post_srq_recv: Some(post_srq_recv),
            poll_cq: Some(poll_cq),
            req_notify_cq: Some(req_notify_cq),
            alloc_mw: Some(alloc_mw),
            dealloc_mw: Some(dealloc_mw),
            bind_mw: Some(bind_mw),
            ..Default::default()
        };
        let vctx = object("vctx", vctx);
        let context: *mut ibv_context = vctx
            .wrapping_byte_add(offset_of!(verbs_context, context))
            .cast();
        name_it("ctx", context);
        let pd = object(
            "pd",
            ibv_pd {
                context,
                ..Default::default()
            },
        );
        let other_pd = object(
            "other_pd",
            ibv_pd {
                context,
                ..Default::default()
            },
        );
        let next = object("send_wr1", ibv_send_wr::default());
        let send_wr = object(
            "send_wr0",
            ibv_send_wr {
                next,
                ..Default::default()
            },
        );
        let next = object("recv_wr1", ibv_recv_wr::default());
        let recv_wr = object(
            "recv_wr0",
            ibv_recv_wr {
                next,
                ..Default::default()
            },
        );
        World {
            verbs: fake_verbs(),
            vctx,
            ctx: context,
            pd,
            mr: object(
                "mr",
                ibv_mr {
                    pd,
                    ..Default::default()
                },
            ),
            other_mr: object(
                "other_mr",
                ibv_mr {
                    pd: other_pd,
                    ..Default::default()
                },
            ),
            mw: object(
                "mw",
                ibv_mw {
                    context,
                    pd,
                    ..Default::default()
                },
            ),
            mw_bind: object("mw_bind", ibv_mw_bind::default()),
            qp: object(
                "qp",
                ibv_qp {
                    context,
                    ..Default::default()
                },
            ),
            cq: object(
                "cq",
                ibv_cq {
                    context,
                    ..Default::default()
                },
            ),
            srq: object(
                "srq",
                ibv_srq {
                    context,
                    ..Default::default()
                },
            ),
            send_wr,
            recv_wr,
            wc: object("wc", [ibv_wc::default(); 2]).cast(),
            port_attr: object("port_attr", ibv_port_attr::default()),
            device_attr: object("device_attr", ibv_device_attr_ex::default()),
            gid_entry: object("gid_entry", ibv_gid_entry::default()),
            buffer: object("buffer", 0_u8).cast(),
        }
    }
}

/// A table in which only the functions that inline ones call can be called.
fn fake_verbs() -> Verbs {
    let unexpected: extern "C" fn() = unexpected;
    let words = [unexpected as *const (); size_of::<Verbs>() / size_of::<*const ()>()];
    // SAFETY: a table holds function pointers alone. Called with whatever signature, this one ends
    // the process.
    let verbs = unsafe {
        transmute::<[*const (); size_of::<Verbs>() / size_of::<*const ()>()], Verbs>(words)
    };
    Verbs {
        query_port,
        query_device,
        reg_mr,
        reg_mr_iova: Some(reg_mr_iova),
        reg_mr_iova2: Some(reg_mr_iova2),
        query_gid_ex: Some(query_gid_ex),
        query_gid_table: Some(query_gid_table),
        ..verbs
    }
}

fn object<T>(name: &'static str, value: T) -> *mut T {
    let object = Box::into_raw(Box::new(value));
    name_it(name, object);
    object
}

fn name_it<T>(name: &'static str, object: *const T) {
    NAMES.with_borrow_mut(|names| names.push((object.expose_provenance(), name)));
}

/// The name of the newest object at that address.
fn name<T>(object: *const T) -> &'static str {
    if object.is_null() {
        return "null";
    }
    NAMES.with_borrow(|names| {
        let found = names
            .iter()
            .rev()
            .find(|(address, _)| *address == object.addr());
        found.map_or("unknown", |(_, name)| name)
    })
}

fn take_errno() -> c_int {
    // SAFETY: no preconditions.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the errno of this thread.
    unsafe { errno.replace(0) }
}

fn returned(call: &str, value: impl Into<i64>) {
    trace!("{call} = {}, errno {}", value.into(), take_errno());
}

fn returned_object<T>(call: &str, object: *const T) {
    trace!("{call} = {}, errno {}", name(object), take_errno());
}

fn queues(world: &World) {
    let World {
        qp,
        cq,
        srq,
        send_wr,
        recv_wr,
        wc,
        ..
    } = *world;
    let bad_send = &mut null_mut();
    let bad_recv = &mut null_mut();
    for (result, solicited_only) in [(0, 0), (libc::ENOMEM, 1)] {
        RESULT.set(result);
        returned("ibv_post_send", fake!(ibv_post_send(qp, send_wr, bad_send)));
        trace!("bad_wr {}", name(*bad_send));
        returned("ibv_post_recv", fake!(ibv_post_recv(qp, recv_wr, bad_recv)));
        trace!("bad_wr {}", name(*bad_recv));
        *bad_recv = null_mut();
        returned(
            "ibv_post_srq_recv",
            fake!(ibv_post_srq_recv(srq, recv_wr, bad_recv)),
        );
        trace!("bad_wr {}", name(*bad_recv));
        *bad_recv = null_mut();
        returned(
            "ibv_req_notify_cq",
            fake!(ibv_req_notify_cq(cq, solicited_only)),
        );
    }
    for result in -1..=2 {
        RESULT.set(result);
        returned("ibv_poll_cq", fake!(ibv_poll_cq(cq, 2, wc)));
    }
}

fn windows(world: &World) {
    let World {
        ctx,
        pd,
        mr,
        other_mr,
        mw,
        ..
    } = *world;
    for result in [0, libc::ENOMEM] {
        RESULT.set(result);
        returned_object("ibv_alloc_mw", fake!(ibv_alloc_mw(pd, IBV_MW_TYPE_1)));
        returned_object("ibv_alloc_mw", fake!(ibv_alloc_mw(pd, IBV_MW_TYPE_2)));
        returned("ibv_dealloc_mw", fake!(ibv_dealloc_mw(mw)));
        bind(world, IBV_MW_TYPE_1, mr, 4096, 64);
        bind(world, IBV_MW_TYPE_1, mr, 4096, 0);
        bind(world, IBV_MW_TYPE_1, null_mut(), 0, 0);
        bind(world, IBV_MW_TYPE_1, null_mut(), 4096, 0);
        bind(world, IBV_MW_TYPE_1, null_mut(), 0, 64);
        bind(world, IBV_MW_TYPE_1, other_mr, 4096, 64);
        bind(world, IBV_MW_TYPE_2, mr, 4096, 64);
    }
    fake!((*ctx).ops.alloc_mw = None);
    returned_object("ibv_alloc_mw", fake!(ibv_alloc_mw(pd, IBV_MW_TYPE_1)));
    for rkey in [0, 0xff, 0x1234, 0x12ff, 0xffff_ffff] {
        returned("ibv_inc_rkey", ibv_inc_rkey(rkey));
    }
}

fn bind(world: &World, type_: ibv_mw_type, mr: *mut ibv_mr, addr: u64, length: u64) {
    let World {
        qp, mw, mw_bind, ..
    } = *world;
    fake!((*mw).type_ = type_);
    fake!(
        (*mw_bind).bind_info = ibv_mw_bind_info {
            mr,
            addr,
            length,
            mw_access_flags: 0
        }
    );
    returned("ibv_bind_mw", fake!(ibv_bind_mw(qp, mw, mw_bind)));
}

fn queries(world: &World) {
    let World {
        verbs,
        vctx,
        ctx,
        gid_entry,
        ..
    } = *world;
    for result in [0, libc::EOPNOTSUPP, libc::ENOSYS, libc::ENODEV] {
        RESULT.set(result);
        query_both(world);
        query_device_with(world, Some(0));
        query_device_with(world, Some(1));
    }
    RESULT.set(0);
    fake!((*vctx).query_port = None);
    query_port_of(world);
    fake!((*vctx).query_device_ex = None);
    query_device_with(world, None);
    fake!((*vctx).query_port = Some(query_port_ex));
    fake!((*vctx).query_device_ex = Some(query_device_ex));

    for first in [
        offset_of!(verbs_context, ibv_destroy_flow),
        offset_of!(verbs_context, query_device_ex),
    ] {
        fake!((*vctx).sz = size_of::<verbs_context>() - first);
        query_both(world);
    }
    fake!((*vctx).sz = size_of::<verbs_context>());

    for abi in [0, u32::MAX as usize, usize::MAX - 1, usize::MAX] {
        fake!((*ctx).abi_compat = core::ptr::without_provenance_mut(abi));
        returned_object("verbs_get_ctx", fake!(verbs_get_ctx(ctx)));
        query_both(world);
    }
    RESULT.set(libc::ENODATA);
    returned(
        "ibv_query_gid_ex",
        fake!(ibv_query_gid_ex(&verbs, ctx, 1, 3, gid_entry, 0)),
    );
    RESULT.set(-libc::EINVAL);
    let entries = fake!(ibv_query_gid_table(&verbs, ctx, gid_entry, 1, 0));
    returned("ibv_query_gid_table", entries as i64);
}

fn query_both(world: &World) {
    query_port_of(world);
    query_device_with(world, None);
}

fn query_port_of(world: &World) {
    let World {
        verbs,
        ctx,
        port_attr: attr,
        ..
    } = *world;
    fake!(attr.write_bytes(0xa5, 1));
    returned(
        "ibv_query_port",
        fake!(ibv_query_port(&verbs, ctx, 1, attr)),
    );
    bytes(attr, offset_of!(ibv_port_attr, lid));
}

fn query_device_with(world: &World, comp_mask: Option<u32>) {
    let World {
        verbs,
        ctx,
        device_attr: attr,
        ..
    } = *world;
    let input = comp_mask.map(|comp_mask| ibv_query_device_ex_input { comp_mask });
    let input = input
        .as_ref()
        .map_or(core::ptr::null(), core::ptr::from_ref);
    fake!(attr.write_bytes(0xa5, 1));
    returned(
        "ibv_query_device_ex",
        fake!(ibv_query_device_ex(&verbs, ctx, input, attr)),
    );
    bytes(attr, offset_of!(ibv_device_attr_ex, comp_mask));
}

/// Three bytes tell who filled the attributes: a compat function writes but the first one.
fn bytes<T>(attr: *mut T, middle: usize) {
    let [first, middle, last] = [0, middle, size_of::<T>() - 1]
        .map(|index| fake!(attr.cast::<u8>().wrapping_add(index).read()));
    trace!("bytes {first} {middle} {last}");
}

fn registrations(world: &World) {
    let World {
        verbs, pd, buffer, ..
    } = *world;
    for result in [0, libc::ENOMEM] {
        RESULT.set(result);
        for access in [0, 15, 1 << 20 | 1, 1 << 29] {
            returned_object(
                "ibv_reg_mr",
                fake!(ibv_reg_mr(&verbs, pd, buffer, 4096, access)),
            );
        }
        for access in [15, 1 << 20 | 1] {
            let mr = fake!(ibv_reg_mr_iova(&verbs, pd, buffer, 4096, 8192, access));
            returned_object("ibv_reg_mr_iova", mr);
        }
    }
}

extern "C" fn unexpected() {
    panic!("no inline function calls this");
}

/// What a fake that returns an object returns.
fn result_object<T>(wanted: &str) -> *mut T {
    let errno = RESULT.get();
    if errno == 0 {
        let address = NAMES.with_borrow(|names| {
            names
                .iter()
                .rev()
                .find(|(_, name)| *name == wanted)
                .expect("a name")
                .0
        });
        return core::ptr::with_exposed_provenance_mut(address);
    }
    // SAFETY: no preconditions.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: the errno of this thread.
    unsafe { *location = errno };
    null_mut()
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    trace!("post_send {} {}", name(qp), name(wr));
    if RESULT.get() != 0 {
        let next = fake!((*wr).next);
        fake!(*bad_wr = next);
    }
    RESULT.get()
}

unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    trace!("post_recv {} {}", name(qp), name(wr));
    if RESULT.get() != 0 {
        let next = fake!((*wr).next);
        fake!(*bad_wr = next);
    }
    RESULT.get()
}

unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    trace!("post_srq_recv {} {}", name(srq), name(wr));
    if RESULT.get() != 0 {
        let next = fake!((*wr).next);
        fake!(*bad_wr = next);
    }
    RESULT.get()
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, num_entries: c_int, wc: *mut ibv_wc) -> c_int {
    trace!("poll_cq {} {num_entries} {}", name(cq), name(wc));
    RESULT.get()
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    trace!("req_notify_cq {} {solicited_only}", name(cq));
    RESULT.get()
}

unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, type_: ibv_mw_type) -> *mut ibv_mw {
    trace!("alloc_mw {} {type_}", name(pd));
    result_object("mw")
}

unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    trace!("dealloc_mw {}", name(mw));
    RESULT.get()
}

unsafe extern "C" fn bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, mw_bind: *mut ibv_mw_bind) -> c_int {
    trace!("bind_mw {} {} {}", name(qp), name(mw), name(mw_bind));
    RESULT.get()
}

unsafe extern "C" fn query_port_ex(
    context: *mut ibv_context,
    port_num: u8,
    attr: *mut ibv_port_attr,
    len: usize,
) -> c_int {
    let whole = c_int::from(len == size_of::<ibv_port_attr>());
    trace!(
        "query_port_ex {} {port_num} {} whole {whole}",
        name(context),
        name(attr)
    );
    if RESULT.get() == 0 {
        fake!(attr.cast::<u8>().write_bytes(0x5a, len));
    }
    RESULT.get()
}

unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    len: usize,
) -> c_int {
    let whole = c_int::from(len == size_of::<ibv_device_attr_ex>());
    let input = c_int::from(!input.is_null());
    trace!(
        "query_device_ex {} input {input} {} whole {whole}",
        name(context),
        name(attr)
    );
    if RESULT.get() == 0 {
        fake!(attr.cast::<u8>().write_bytes(0x5a, len));
    }
    RESULT.get()
}

unsafe extern "C" fn query_port(
    context: *mut ibv_context,
    port_num: u8,
    attr: *mut _compat_ibv_port_attr,
) -> c_int {
    trace!("query_port {} {port_num} {}", name(context), name(attr));
    fake!(attr.cast::<u8>().write(4));
    0
}

unsafe extern "C" fn query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    trace!("query_device {} {}", name(context), name(attr));
    fake!(attr.cast::<u8>().write(4));
    0
}

unsafe extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    trace!("reg_mr {} {} {length} {access}", name(pd), name(addr));
    result_object("mr")
}

unsafe extern "C" fn reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    let at = if iova == addr.addr() as u64 {
        "addr"
    } else {
        "iova"
    };
    trace!(
        "reg_mr_iova {} {} {length} {at} {access}",
        name(pd),
        name(addr)
    );
    result_object("mr")
}

unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    let at = if iova == addr.addr() as u64 {
        "addr"
    } else {
        "iova"
    };
    trace!(
        "reg_mr_iova2 {} {} {length} {at} {access}",
        name(pd),
        name(addr)
    );
    result_object("mr")
}

unsafe extern "C" fn query_gid_ex(
    context: *mut ibv_context,
    port_num: u32,
    gid_index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    entry_size: usize,
) -> c_int {
    let (context, entry) = (name(context), name(entry));
    trace!("query_gid_ex {context} {port_num} {gid_index} {entry} {flags} {entry_size}");
    RESULT.get()
}

unsafe extern "C" fn query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
    entry_size: usize,
) -> isize {
    let (context, entries) = (name(context), name(entries));
    trace!("query_gid_table {context} {entries} {max_entries} {flags} {entry_size}");
    RESULT.get() as isize
}
