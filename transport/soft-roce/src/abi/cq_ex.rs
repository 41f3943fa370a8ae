//! Extended completion queues: `ibv_create_cq_ex` and the polling that goes through the queue itself.
//!
//! Every queue of this device has the extended layout, whose beginning is the plain one; here the
//! functions are filled in. From `start_poll` that finds a completion to `end_poll` one thread is in
//! the queue's [`Session`](super::session::Session), and the `read_*` functions show its completion.

use std::ffi::{c_int, c_uint};

use rdma_core_bindings::{
    __be32, IBV_CQ_INIT_ATTR_MASK_FLAGS, IBV_CREATE_CQ_ATTR_SINGLE_THREADED, IBV_WC_STANDARD_FLAGS,
    ibv_context, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_poll_cq_attr, ibv_wc, ibv_wc_opcode,
};
use rustix::io::Errno;

use super::convention::{errno_value, null};
use super::cq;
use super::objects::{Cq, object};

pub(super) unsafe extern "C" fn create_cq_ex(
    context: *mut ibv_context,
    init_attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    if init_attr.is_null() {
        return null(None, || Err(Errno::INVAL));
    }
    // SAFETY: the caller's attributes, which nobody changes during the call.
    let init = unsafe { *init_attr };
    if let Err(errno) = check(&init) {
        return null(None, || Err(errno));
    }
    let number = |value: u32| c_int::try_from(value).unwrap_or(-1);
    // SAFETY: as for this function.
    let cq = unsafe {
        cq::create(
            context,
            number(init.cqe),
            init.cq_context,
            init.channel,
            number(init.comp_vector),
            extend,
        )
    };
    // The extended struct is the whole of what begins with the plain one.
    cq.cast()
}

/// What completions of this device can tell is in the standard flags. There is no clock in them, no
/// VLAN and no flow tag.
fn check(init: &ibv_cq_init_attr_ex) -> Result<(), Errno> {
    let has_flags = init.comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS != 0;
    // That no two threads use the queue is a promise that nothing here needs.
    let unknown_flags = has_flags && init.flags & !IBV_CREATE_CQ_ATTR_SINGLE_THREADED != 0;
    if init.comp_mask & !IBV_CQ_INIT_ATTR_MASK_FLAGS != 0
        || init.wc_flags & !u64::from(IBV_WC_STANDARD_FLAGS) != 0
        || unknown_flags
    {
        return Err(Errno::OPNOTSUPP);
    }
    Ok(())
}

fn extend(public: &mut ibv_cq_ex) {
    public.start_poll = Some(start_poll);
    public.next_poll = Some(next_poll);
    public.end_poll = Some(end_poll);
    public.read_opcode = Some(read_opcode);
    public.read_vendor_err = Some(read_vendor_err);
    public.read_byte_len = Some(read_byte_len);
    public.read_imm_data = Some(read_imm_data);
    public.read_qp_num = Some(read_qp_num);
    public.read_src_qp = Some(read_src_qp);
    public.read_wc_flags = Some(read_wc_flags);
    public.read_slid = Some(read_slid);
    public.read_sl = Some(read_sl);
    public.read_dlid_path_bits = Some(read_dlid_path_bits);
}

/// Returns 0 with a completion to read, ENOENT without one; then no session has begun.
unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut ibv_poll_cq_attr) -> c_int {
    // SAFETY: the caller passes a live queue.
    let Ok(live) = (unsafe { object::<Cq>(plain(cq)) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        // SAFETY: not NULL, hence attributes of the caller.
        if !attr.is_null() && unsafe { (*attr).comp_mask } != 0 {
            return Err(Errno::INVAL);
        }
        live.current.begin();
        let mut wc = None;
        let polled = live.device.poll(&live.queue, 1, |_, completion| {
            wc = Some(cq::public_wc(completion));
        });
        let shown = polled.and_then(|_| show(live, wc));
        if shown.is_err() {
            live.current.end();
        }
        shown
    })
}

/// Returns 0 with the next completion to read, ENOENT without one; the session goes on.
unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: the caller passes a live queue.
    let Ok(live) = (unsafe { object::<Cq>(plain(cq)) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        let mut wc = None;
        // Without driving the device: what has come is taken in one batch.
        live.queue
            .pop(1, |_, completion| wc = Some(cq::public_wc(completion)));
        show(live, wc)
    })
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: the caller passes a live queue.
    if let Ok(live) = unsafe { object::<Cq>(plain(cq)) } {
        live.current.end();
    }
}

/// Makes `wc` the completion that the session shows.
fn show(live: &Cq, wc: Option<ibv_wc>) -> Result<(), Errno> {
    let wc = wc.ok_or(Errno::NOENT)?;
    let public = live.public.get();
    // SAFETY: in the session, whose owner alone reads and writes this field.
    unsafe { (*public).wr_id = wc.wr_id };
    // SAFETY: as above.
    unsafe { (*public).status = wc.status };
    // SAFETY: in the session; the reference ends here.
    *unsafe { live.current.state() } = Some(wc);
    Ok(())
}

/// The completion that the session shows, to `read`; 0 outside of a session.
///
/// # Safety
///
/// The caller's queue is live, and in a session of this thread.
unsafe fn current<T: Default>(cq: *mut ibv_cq_ex, read: impl FnOnce(&ibv_wc) -> T) -> T {
    // SAFETY: the caller passes a live queue.
    let Ok(live) = (unsafe { object::<Cq>(plain(cq)) }) else {
        return T::default();
    };
    // SAFETY: in the session; the reference ends with this function.
    let wc = unsafe { live.current.state() };
    wc.as_ref().map_or_else(T::default, read)
}

unsafe extern "C" fn read_opcode(cq: *mut ibv_cq_ex) -> ibv_wc_opcode {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.opcode) }
}

unsafe extern "C" fn read_vendor_err(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.vendor_err) }
}

unsafe extern "C" fn read_byte_len(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.byte_len) }
}

/// The immediate, or the key that the peer invalidated.
unsafe extern "C" fn read_imm_data(cq: *mut ibv_cq_ex) -> __be32 {
    // SAFETY: both alternatives are a 32-bit integer.
    let imm_data = |wc: &ibv_wc| unsafe { wc.__bindgen_anon_1.imm_data };
    // SAFETY: as for this function.
    unsafe { current(cq, imm_data) }
}

unsafe extern "C" fn read_qp_num(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.qp_num) }
}

unsafe extern "C" fn read_src_qp(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.src_qp) }
}

unsafe extern "C" fn read_wc_flags(cq: *mut ibv_cq_ex) -> c_uint {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.wc_flags) }
}

unsafe extern "C" fn read_slid(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.slid.into()) }
}

unsafe extern "C" fn read_sl(cq: *mut ibv_cq_ex) -> u8 {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.sl) }
}

unsafe extern "C" fn read_dlid_path_bits(cq: *mut ibv_cq_ex) -> u8 {
    // SAFETY: as for this function.
    unsafe { current(cq, |wc| wc.dlid_path_bits) }
}

fn plain(cq: *mut ibv_cq_ex) -> *mut ibv_cq {
    cq.cast()
}
