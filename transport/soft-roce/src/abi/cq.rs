//! Completion channels and completion queues.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_uint, c_void};
use std::mem;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::Arc;

use rdma_core_bindings::{
    IBV_WC_GRH, IBV_WC_WITH_IMM, IBV_WC_WITH_INV, ibv_comp_channel, ibv_context, ibv_cq, ibv_cq_ex,
    ibv_wc, ibv_wc__bindgen_ty_1,
};
use rustix::io::Errno;

use super::convention::{caught, errno_value, minus_one, null, set_errno};
use super::events::acknowledge;
use super::objects::{Children, CompChannel, Context, Cq, hand_out, object, take_back};
use super::session::Session;
use crate::device::{Armed, CompletionQueue, EventQueue, limits};
use crate::mr_table::Key;
use crate::work::Wc;

pub(super) unsafe extern "C" fn create_comp_channel(
    context: *mut ibv_context,
) -> *mut ibv_comp_channel {
    // SAFETY: the caller passes an open context or NULL.
    let open = match unsafe { object::<Context>(context) } {
        Ok(open) => open,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&open.device), || {
        let events = Arc::new(EventQueue::new()?);
        let fd = events.as_fd().as_raw_fd();
        Ok(hand_out(CompChannel {
            public: UnsafeCell::new(ibv_comp_channel {
                context,
                fd,
                refcnt: 0,
            }),
            device: Arc::clone(&open.device),
            events,
            children: Children::default(),
            _parent: open.children.adopt(),
        }))
    })
}

pub(super) unsafe extern "C" fn destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: the caller passes a live channel or NULL.
    let Ok(live) = (unsafe { object::<CompChannel>(channel) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&live.device);
    errno_value(&device, || {
        live.children.check_none()?;
        // SAFETY: no queue uses the channel, and the caller gives it up once.
        drop(unsafe { take_back::<CompChannel>(channel) });
        Ok(())
    })
}

pub(super) unsafe extern "C" fn create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: as for this function.
    unsafe { create(context, cqe, cq_context, channel, comp_vector, |_| {}) }
}

/// Creates a queue whose public part `extend` completes.
///
/// # Safety
///
/// As for `create_cq`.
pub(super) unsafe fn create(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
    extend: impl FnOnce(&mut ibv_cq_ex),
) -> *mut ibv_cq {
    // SAFETY: the caller passes an open context or NULL.
    let open = match unsafe { object::<Context>(context) } {
        Ok(open) => open,
        Err(errno) => return null(None, || Err(errno)),
    };
    // SAFETY: the caller passes a live channel or NULL, which means none.
    let live_channel = unsafe { object::<CompChannel>(channel) }.ok();
    null(Some(&open.device), || {
        let capacity = capacity(cqe)?;
        if comp_vector != 0 {
            return Err(Errno::INVAL);
        }
        let channel_events = live_channel.map(|channel| Arc::clone(&channel.events));
        let queue = CompletionQueue::new(capacity, channel_events, Arc::clone(&open.events));
        // SAFETY: pointers, integers, optional functions and pthread objects, whose initial values are
        // all zero on Linux.
        let mut public: ibv_cq_ex = unsafe { mem::zeroed() };
        public.context = context;
        public.channel = channel;
        public.cq_context = cq_context;
        public.cqe = cqe;
        extend(&mut public);
        let queue = Arc::new(queue);
        let cq = hand_out(Cq {
            public: UnsafeCell::new(public),
            device: Arc::clone(&open.device),
            queue: Arc::clone(&queue),
            cq_context,
            current: Session::default(),
            children: Children::default(),
            _parents: (
                open.children.adopt(),
                live_channel.map(|channel| channel.children.adopt()),
            ),
        });
        queue.set_handle(cq.expose_provenance());
        Ok(cq)
    })
}

pub(super) unsafe extern "C" fn resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Cq>(cq) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        if !live.queue.resize(capacity(cqe)?) {
            return Err(Errno::INVAL);
        }
        // SAFETY: the public part of a live object, which is in an `UnsafeCell`.
        unsafe { (*live.public.get()).cqe = cqe };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Cq>(cq) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&live.device);
    errno_value(&device, || {
        live.children.check_none()?;
        live.queue.retire();
        // SAFETY: no queue pair reports to it, its events are acknowledged, and the caller gives it
        // up once.
        drop(unsafe { take_back::<Cq>(cq) });
        Ok(())
    })
}

pub(super) unsafe extern "C" fn poll_cq(
    cq: *mut ibv_cq,
    num_entries: c_int,
    wc: *mut ibv_wc,
) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Cq>(cq) }) else {
        return -libc::EINVAL;
    };
    let result = caught(Some(&live.device), || {
        let count_max = usize::try_from(num_entries).map_err(|_| Errno::INVAL)?;
        let count = live
            .device
            .poll(&live.queue, count_max, |index, completion| {
                // SAFETY: `index` is below `num_entries`, the length of the caller's array.
                unsafe { wc.wrapping_add(index).write(public_wc(completion)) };
            })?;
        // At most `num_entries`, which is an int.
        Ok(c_int::try_from(count).unwrap_or(c_int::MAX))
    });
    result.unwrap_or_else(|errno| -errno.raw_os_error())
}

pub(super) unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Cq>(cq) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        live.queue.arm(if solicited_only == 0 {
            Armed::Any
        } else {
            Armed::Solicited
        });
        live.device.expect_sleep();
        Ok(())
    })
}

pub(super) unsafe extern "C" fn get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller passes a live channel or NULL.
    let Ok(live) = (unsafe { object::<CompChannel>(channel) }) else {
        set_errno(Errno::INVAL);
        return -1;
    };
    minus_one(&live.device, || {
        let named = ptr::with_exposed_provenance_mut::<ibv_cq>(live.events.next()?);
        // SAFETY: destroying the queue removes its events from the channel, and waits for the one
        // just taken to be acknowledged: it is alive.
        let queue = unsafe { object::<Cq>(named) }?;
        // SAFETY: the caller points to a place for the queue.
        unsafe { cq.write(named) };
        // SAFETY: the caller points to a place for the queue's context.
        unsafe { cq_context.write(queue.cq_context) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn ack_cq_events(cq: *mut ibv_cq, nevents: c_uint) {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Cq>(cq) }) else {
        return;
    };
    acknowledge(&live.device, &live.queue.comp_gate, nevents);
}

fn capacity(cqe: c_int) -> Result<usize, Errno> {
    match u32::try_from(cqe) {
        Ok(cqe) if (1..=limits::CQE_MAX).contains(&cqe) => Ok(cqe as usize),
        _ => Err(Errno::INVAL),
    }
}

pub(super) fn public_wc(wc: &Wc) -> ibv_wc {
    let (more, wc_flags) = match (wc.imm, wc.invalidated) {
        // The four bytes as they were on the wire, whatever the host's order.
        (Some(imm), _) => {
            let imm_data = u32::from_be_bytes(imm).to_be();
            (ibv_wc__bindgen_ty_1 { imm_data }, IBV_WC_WITH_IMM)
        }
        (None, Some(Key(invalidated_rkey))) => {
            (ibv_wc__bindgen_ty_1 { invalidated_rkey }, IBV_WC_WITH_INV)
        }
        (None, None) => (ibv_wc__bindgen_ty_1 { imm_data: 0 }, 0),
    };
    ibv_wc {
        wr_id: wc.wr_id,
        status: wc.status as u32,
        opcode: wc.opcode as u32,
        vendor_err: 0,
        byte_len: wc.byte_len,
        __bindgen_anon_1: more,
        qp_num: wc.qpn.get(),
        src_qp: wc.src_qp.get(),
        wc_flags: wc_flags | if wc.has_grh { IBV_WC_GRH } else { 0 },
        pkey_index: 0,
        slid: 0,
        sl: 0,
        dlid_path_bits: 0,
    }
}
