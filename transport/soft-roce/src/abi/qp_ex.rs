//! Extended queue pairs: `ibv_create_qp_ex` and posting by one function per request.
//!
//! Every queue pair of this device has the extended layout, whose beginning is the plain one; here
//! the functions are filled in. From `wr_start` to `wr_complete` or `wr_abort` one thread is in the
//! queue pair's [`Session`](super::session::Session) and stages requests; `wr_complete` posts all of
//! them or none.

use std::ffi::{c_int, c_void};
use std::mem;
use std::ptr;
use std::slice;

use rdma_core_bindings::{
    __be32, IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP, IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD,
    IBV_QP_EX_WITH_BIND_MW, IBV_QP_EX_WITH_LOCAL_INV, IBV_QP_EX_WITH_RDMA_READ,
    IBV_QP_EX_WITH_RDMA_WRITE, IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM, IBV_QP_EX_WITH_SEND,
    IBV_QP_EX_WITH_SEND_WITH_IMM, IBV_QP_EX_WITH_SEND_WITH_INV, IBV_QP_INIT_ATTR_CREATE_FLAGS,
    IBV_QP_INIT_ATTR_PD, IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD,
    IBV_SEND_INLINE, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_BIND_MW,
    IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND,
    IBV_WR_SEND_WITH_IMM, IBV_WR_SEND_WITH_INV, ibv_ah, ibv_context, ibv_data_buf, ibv_mw,
    ibv_mw_bind_info, ibv_qp, ibv_qp_cap, ibv_qp_ex, ibv_qp_init_attr_ex, ibv_send_wr,
    ibv_send_wr__bindgen_ty_2__bindgen_ty_1 as RemoteBytes,
    ibv_send_wr__bindgen_ty_2__bindgen_ty_2 as RemoteWord,
    ibv_send_wr__bindgen_ty_2__bindgen_ty_3 as Datagram,
    ibv_send_wr__bindgen_ty_4__bindgen_ty_1 as Bind, ibv_sge, ibv_wr_opcode,
};
use rustix::io::Errno;

use super::convention::{errno_value, null};
use super::objects::{Qp, object};
use super::{post, qp};
use crate::copy;

/// Requests of a reliable connection.
const RC_OPS: u32 = UC_OPS
    | IBV_QP_EX_WITH_RDMA_READ
    | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD
    | IBV_QP_EX_WITH_SEND_WITH_INV;
/// Requests of an unreliable connection.
const UC_OPS: u32 = UD_OPS
    | IBV_QP_EX_WITH_RDMA_WRITE
    | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | IBV_QP_EX_WITH_LOCAL_INV
    | IBV_QP_EX_WITH_BIND_MW;
/// Requests of datagrams.
const UD_OPS: u32 = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM;

/// Requests between `wr_start` and `wr_complete`, with what they point to. The memory is kept for the
/// next session.
#[derive(Default)]
pub(super) struct Staged {
    requests: Vec<Request>,
    sges: Vec<ibv_sge>,
    inline: Vec<u8>,
    /// The first mistake, which `wr_complete` reports.
    error: Option<Errno>,
}

/// A request whose list of elements is found by [`Staged::resolve`].
struct Request {
    wr: ibv_send_wr,
    /// Index of the first of its `num_sge` elements. That of inline data has a byte offset in
    /// `Staged::inline` for its address.
    first_sge: usize,
}

// SAFETY: the pointers in a request are the application's, to be used by whichever thread is in the
// session.
unsafe impl Send for Staged {}

pub(super) unsafe extern "C" fn create_qp_ex(
    _context: *mut ibv_context,
    init_attr: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    if init_attr.is_null() {
        return null(None, || Err(Errno::INVAL));
    }
    // SAFETY: the caller's attributes, which nobody changes during the call.
    let init = unsafe { *init_attr };
    let ops = match send_ops(&init) {
        Ok(ops) => ops,
        Err(errno) => return null(None, || Err(errno)),
    };
    // SAFETY: as for this function; the extended attributes begin with the plain ones.
    let qp = unsafe { qp::create_qp(init.pd, init_attr.cast()) };
    // SAFETY: NULL, or a queue pair just made, of which nobody else knows.
    if let (Ok(live), Some(ops)) = (unsafe { object::<Qp>(qp) }, ops) {
        // SAFETY: the public part of a live object, which is in an `UnsafeCell`.
        extend(unsafe { &mut *live.public.get() }, ops);
    }
    qp
}

/// The extended queue pair, or NULL if it was created without send operations.
pub(super) unsafe extern "C" fn qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex {
    // SAFETY: the caller passes a live queue pair or NULL.
    let Ok(live) = (unsafe { object::<Qp>(qp) }) else {
        return ptr::null_mut();
    };
    let public = live.public.get();
    // SAFETY: written only before the queue pair was handed out.
    match unsafe { (*public).wr_start } {
        // The extended struct is the whole of what begins with the plain one.
        Some(_) => qp.cast(),
        None => ptr::null_mut(),
    }
}

/// A queue pair's public part without functions, as one created plainly has.
pub(super) fn without_functions(qp_base: ibv_qp) -> ibv_qp_ex {
    // SAFETY: integers, pointers, optional functions and pthread objects, for all of which zero
    // means none, or their initial value.
    let mut public: ibv_qp_ex = unsafe { mem::zeroed() };
    public.qp_base = qp_base;
    public
}

/// The send operations asked for, if any were.
fn send_ops(init: &ibv_qp_init_attr_ex) -> Result<Option<u32>, Errno> {
    let has = |mask| init.comp_mask & mask != 0;
    let known =
        IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
    let has_create_flags = has(IBV_QP_INIT_ATTR_CREATE_FLAGS) && init.create_flags != 0;
    if init.comp_mask & !known != 0 || has_create_flags {
        return Err(Errno::OPNOTSUPP);
    }
    if !has(IBV_QP_INIT_ATTR_PD) {
        return Err(Errno::INVAL);
    }
    if !has(IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) {
        return Ok(None);
    }
    let offered = match init.qp_type {
        IBV_QPT_RC => RC_OPS,
        IBV_QPT_UC => UC_OPS,
        IBV_QPT_UD => UD_OPS,
        _ => 0,
    };
    let ops = u32::try_from(init.send_ops_flags).map_err(|_| Errno::OPNOTSUPP)?;
    if ops & !offered != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    Ok(Some(ops))
}

fn extend(public: &mut ibv_qp_ex, ops: u32) {
    let has = |op| ops & op != 0;
    public.wr_start = Some(wr_start);
    public.wr_complete = Some(wr_complete);
    public.wr_abort = Some(wr_abort);
    public.wr_set_sge = Some(wr_set_sge);
    public.wr_set_sge_list = Some(wr_set_sge_list);
    public.wr_set_inline_data = Some(wr_set_inline_data);
    public.wr_set_inline_data_list = Some(wr_set_inline_data_list);
    if public.qp_base.qp_type == IBV_QPT_UD {
        public.wr_set_ud_addr = Some(wr_set_ud_addr);
    }
    if has(IBV_QP_EX_WITH_SEND) {
        public.wr_send = Some(wr_send);
    }
    if has(IBV_QP_EX_WITH_SEND_WITH_IMM) {
        public.wr_send_imm = Some(wr_send_imm);
    }
    if has(IBV_QP_EX_WITH_SEND_WITH_INV) {
        public.wr_send_inv = Some(wr_send_inv);
    }
    if has(IBV_QP_EX_WITH_RDMA_WRITE) {
        public.wr_rdma_write = Some(wr_rdma_write);
    }
    if has(IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM) {
        public.wr_rdma_write_imm = Some(wr_rdma_write_imm);
    }
    if has(IBV_QP_EX_WITH_RDMA_READ) {
        public.wr_rdma_read = Some(wr_rdma_read);
    }
    if has(IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP) {
        public.wr_atomic_cmp_swp = Some(wr_atomic_cmp_swp);
    }
    if has(IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD) {
        public.wr_atomic_fetch_add = Some(wr_atomic_fetch_add);
    }
    if has(IBV_QP_EX_WITH_LOCAL_INV) {
        public.wr_local_inv = Some(wr_local_inv);
    }
    if has(IBV_QP_EX_WITH_BIND_MW) {
        public.wr_bind_mw = Some(wr_bind_mw);
    }
}

// The session.

unsafe extern "C" fn wr_start(qp: *mut ibv_qp_ex) {
    // SAFETY: the caller passes a live queue pair.
    if let Ok(live) = unsafe { object::<Qp>(plain(qp)) } {
        live.staged.begin();
    }
}

/// Posts what was staged, all of it or, with an error returned, nothing.
unsafe extern "C" fn wr_complete(qp: *mut ibv_qp_ex) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let Ok(live) = (unsafe { object::<Qp>(plain(qp)) }) else {
        return libc::EINVAL;
    };
    // SAFETY: in the session, which ends below; the reference is not used after that.
    let staged = unsafe { live.staged.state() };
    let result = errno_value(&live.device, || match staged.error {
        Some(errno) => Err(errno),
        None => live
            .device
            .post(|engine| post::post_all_sends(engine, live, staged.resolve())),
    });
    staged.clear();
    live.staged.end();
    result
}

unsafe extern "C" fn wr_abort(qp: *mut ibv_qp_ex) {
    // SAFETY: the caller passes a live queue pair.
    if let Ok(live) = unsafe { object::<Qp>(plain(qp)) } {
        // SAFETY: in the session; the reference ends with the statement.
        unsafe { live.staged.state() }.clear();
        live.staged.end();
    }
}

// Requests.

unsafe extern "C" fn wr_send(qp: *mut ibv_qp_ex) {
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_SEND, |_| {}) };
}

unsafe extern "C" fn wr_send_imm(qp: *mut ibv_qp_ex, imm_data: __be32) {
    let fill = |wr: &mut ibv_send_wr| wr.__bindgen_anon_1.imm_data = imm_data;
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_SEND_WITH_IMM, fill) };
}

unsafe extern "C" fn wr_send_inv(qp: *mut ibv_qp_ex, invalidate_rkey: u32) {
    let fill = |wr: &mut ibv_send_wr| wr.__bindgen_anon_1.invalidate_rkey = invalidate_rkey;
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_SEND_WITH_INV, fill) };
}

unsafe extern "C" fn wr_rdma_write(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64) {
    let fill = |wr: &mut ibv_send_wr| wr.wr.rdma = RemoteBytes { remote_addr, rkey };
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_RDMA_WRITE, fill) };
}

unsafe extern "C" fn wr_rdma_write_imm(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    remote_addr: u64,
    imm_data: __be32,
) {
    let fill = |wr: &mut ibv_send_wr| {
        wr.wr.rdma = RemoteBytes { remote_addr, rkey };
        wr.__bindgen_anon_1.imm_data = imm_data;
    };
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_RDMA_WRITE_WITH_IMM, fill) };
}

unsafe extern "C" fn wr_rdma_read(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64) {
    let fill = |wr: &mut ibv_send_wr| wr.wr.rdma = RemoteBytes { remote_addr, rkey };
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_RDMA_READ, fill) };
}

unsafe extern "C" fn wr_atomic_cmp_swp(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    remote_addr: u64,
    compare: u64,
    swap: u64,
) {
    let fill = |wr: &mut ibv_send_wr| {
        wr.wr.atomic = RemoteWord {
            remote_addr,
            compare_add: compare,
            swap,
            rkey,
        };
    };
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_ATOMIC_CMP_AND_SWP, fill) };
}

unsafe extern "C" fn wr_atomic_fetch_add(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    remote_addr: u64,
    add: u64,
) {
    let fill = |wr: &mut ibv_send_wr| {
        wr.wr.atomic = RemoteWord {
            remote_addr,
            compare_add: add,
            swap: 0,
            rkey,
        };
    };
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_ATOMIC_FETCH_AND_ADD, fill) };
}

unsafe extern "C" fn wr_local_inv(qp: *mut ibv_qp_ex, invalidate_rkey: u32) {
    let fill = |wr: &mut ibv_send_wr| wr.__bindgen_anon_1.invalidate_rkey = invalidate_rkey;
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_LOCAL_INV, fill) };
}

unsafe extern "C" fn wr_bind_mw(
    qp: *mut ibv_qp_ex,
    mw: *mut ibv_mw,
    rkey: u32,
    bind_info: *const ibv_mw_bind_info,
) {
    // SAFETY: the caller's description, which nobody changes during the call.
    let bind_info = unsafe { *bind_info };
    let fill = |wr: &mut ibv_send_wr| {
        wr.__bindgen_anon_2.bind_mw = Bind {
            mw,
            rkey,
            bind_info,
        };
    };
    // SAFETY: as for this function.
    unsafe { stage(qp, IBV_WR_BIND_MW, fill) };
}

// What the latest request takes along.

unsafe extern "C" fn wr_set_ud_addr(
    qp: *mut ibv_qp_ex,
    ah: *mut ibv_ah,
    remote_qpn: u32,
    remote_qkey: u32,
) {
    let ud = Datagram {
        ah,
        remote_qpn,
        remote_qkey,
    };
    // SAFETY: as for this function.
    unsafe { amend(qp, |staged, _| staged.address(ud)) };
}

unsafe extern "C" fn wr_set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    let sge = ibv_sge { addr, length, lkey };
    // SAFETY: as for this function.
    unsafe { amend(qp, |staged, _| staged.gather(&[sge])) };
}

unsafe extern "C" fn wr_set_sge_list(qp: *mut ibv_qp_ex, num_sge: usize, sg_list: *const ibv_sge) {
    // SAFETY: the caller's list has `num_sge` elements.
    let sges = unsafe { list(sg_list, num_sge) };
    // SAFETY: as for this function.
    unsafe { amend(qp, |staged, _| staged.gather(sges)) };
}

unsafe extern "C" fn wr_set_inline_data(qp: *mut ibv_qp_ex, addr: *mut c_void, length: usize) {
    let bytes = ibv_data_buf { addr, length };
    // SAFETY: as for this function.
    unsafe { wr_set_inline_data_list(qp, 1, &raw const bytes) };
}

unsafe extern "C" fn wr_set_inline_data_list(
    qp: *mut ibv_qp_ex,
    num_buf: usize,
    buf_list: *const ibv_data_buf,
) {
    // SAFETY: the caller's list has `num_buf` elements.
    let pieces = unsafe { list(buf_list, num_buf) };
    let copy = |staged: &mut Staged, cap: &ibv_qp_cap| {
        // SAFETY: the pieces are readable memory of the caller.
        unsafe { staged.copy_in(pieces, cap.max_inline_data as usize) }
    };
    // SAFETY: as for this function.
    unsafe { amend(qp, copy) };
}

/// Adds a request with the identity and flags that the application has written to the queue pair.
///
/// # Safety
///
/// The queue pair is live and in a session of this thread.
unsafe fn stage(qp: *mut ibv_qp_ex, opcode: ibv_wr_opcode, fill: impl FnOnce(&mut ibv_send_wr)) {
    // SAFETY: in the session only this thread writes the field.
    let wr_id = unsafe { (*qp).wr_id };
    // SAFETY: as above.
    let wr_flags = unsafe { (*qp).wr_flags };
    // SAFETY: integers and pointers, for which zero means none.
    let mut wr: ibv_send_wr = unsafe { mem::zeroed() };
    wr.wr_id = wr_id;
    wr.opcode = opcode;
    wr.send_flags = wr_flags & !IBV_SEND_INLINE;
    fill(&mut wr);
    // SAFETY: as for this function.
    unsafe { amend(qp, |staged, cap| staged.add(wr, cap.max_send_wr as usize)) };
}

/// Changes what is staged; the first mistake is kept for `wr_complete`.
///
/// # Safety
///
/// The queue pair is live and in a session of this thread.
unsafe fn amend(
    qp: *mut ibv_qp_ex,
    change: impl FnOnce(&mut Staged, &ibv_qp_cap) -> Result<(), Errno>,
) {
    // SAFETY: the caller passes a live queue pair.
    let Ok(live) = (unsafe { object::<Qp>(plain(qp)) }) else {
        return;
    };
    // SAFETY: in the session; the reference ends with this function.
    let staged = unsafe { live.staged.state() };
    if let Err(errno) = change(staged, &live.init.cap) {
        staged.error.get_or_insert(errno);
    }
}

impl Staged {
    fn add(&mut self, wr: ibv_send_wr, count_max: usize) -> Result<(), Errno> {
        if self.requests.len() == count_max {
            return Err(Errno::NOMEM);
        }
        self.requests.push(Request { wr, first_sge: 0 });
        Ok(())
    }

    fn address(&mut self, ud: Datagram) -> Result<(), Errno> {
        self.last()?.wr.wr.ud = ud;
        Ok(())
    }

    fn gather(&mut self, sges: &[ibv_sge]) -> Result<(), Errno> {
        let first_sge = self.sges.len();
        let num_sge = c_int::try_from(sges.len()).map_err(|_| Errno::INVAL)?;
        let request = self.last()?;
        request.first_sge = first_sge;
        request.wr.num_sge = num_sge;
        request.wr.send_flags &= !IBV_SEND_INLINE;
        self.sges.extend_from_slice(sges);
        Ok(())
    }

    /// Copies inline data in.
    ///
    /// # Safety
    ///
    /// The pieces are readable memory.
    unsafe fn copy_in(&mut self, pieces: &[ibv_data_buf], len_max: usize) -> Result<(), Errno> {
        let start = self.inline.len();
        for piece in pieces {
            let from = self.inline.len();
            let len = (from - start).saturating_add(piece.length);
            if len > len_max {
                return Err(Errno::INVAL);
            }
            self.inline.resize(start + len, 0);
            // SAFETY: the caller vouches for the piece, which may be shared memory.
            unsafe { copy::read_shared(&mut self.inline[from..], piece.addr.cast()) };
        }
        let length = u32::try_from(self.inline.len() - start).map_err(|_| Errno::INVAL)?;
        self.gather(&[ibv_sge {
            addr: start as u64,
            length,
            lkey: 0,
        }])?;
        self.last()?.wr.send_flags |= IBV_SEND_INLINE;
        Ok(())
    }

    /// The request that was begun last; `EINVAL` if none was.
    fn last(&mut self) -> Result<&mut Request, Errno> {
        self.requests.last_mut().ok_or(Errno::INVAL)
    }

    /// The requests, with their lists of elements. Called once, after the last change.
    fn resolve(&mut self) -> impl Iterator<Item = &ibv_send_wr> {
        let inline = self.inline.as_ptr().expose_provenance() as u64;
        for request in &mut self.requests {
            if request.wr.send_flags & IBV_SEND_INLINE != 0 {
                self.sges[request.first_sge].addr += inline;
            }
            request.wr.sg_list = self.sges.as_mut_ptr().wrapping_add(request.first_sge);
        }
        self.requests.iter().map(|request| &request.wr)
    }

    fn clear(&mut self) {
        self.requests.clear();
        self.sges.clear();
        self.inline.clear();
        self.error = None;
    }
}

/// A list of the caller.
///
/// # Safety
///
/// `first` points to `count` elements that nobody changes during `'a`, or `count` is 0.
unsafe fn list<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: the caller vouches for `count` elements.
    unsafe { slice::from_raw_parts(first, count) }
}

fn plain(qp: *mut ibv_qp_ex) -> *mut ibv_qp {
    qp.cast()
}
