//! Shared receive queues: create, modify, query, destroy, post.
//!
//! A queue pair takes a request out of the shared queue when the first packet of a message arrives
//! (for a WRITE with immediate: the last), and reports its completion. When the queue pair goes to
//! ERR, the request of the message in progress is flushed and the others stay; then
//! `LAST_WQE_REACHED` is raised. A queue pair that is reset or destroyed before loses the request
//! that it has taken: go to ERR first and wait for that event.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::mem;
use std::sync::Arc;

use rdma_core_bindings::{ibv_pd, ibv_recv_wr, ibv_srq, ibv_srq_attr, ibv_srq_init_attr};
use rustix::io::Errno;

use super::convention::{errno_value, null};
use super::objects::{Pd, Srq, hand_out, object, take_back};
use super::post::{errno_of, scatter_list};
use crate::device::{SrqReports, limits};
use crate::srq::{SharedReceiveQueue, SrqAttr, SrqAttrMask};
use crate::work::RecvWr;

pub(super) unsafe extern "C" fn create_srq(
    pd: *mut ibv_pd,
    srq_init_attr: *mut ibv_srq_init_attr,
) -> *mut ibv_srq {
    // SAFETY: the caller passes a live domain or NULL.
    let domain = match unsafe { object::<Pd>(pd) } {
        Ok(domain) => domain,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&domain.device), || {
        if srq_init_attr.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the caller's attributes, which nobody changes during the call.
        let init = unsafe { *srq_init_attr };
        check_size(init.attr.max_wr)?;
        if init.attr.max_sge > limits::SGE_MAX {
            return Err(Errno::INVAL);
        }
        let queue = SharedReceiveQueue::new(init.attr.max_wr as usize, init.attr.max_sge as usize);
        let reports = SrqReports {
            events: Arc::clone(&domain.events),
            gate: Arc::default(),
            handle: 0,
        };
        let gate = Arc::clone(&reports.gate);
        let number = domain.device.engine().srqs.insert(queue, reports);
        // SAFETY: pointers, integers and pthread objects, whose initial values are all zero on Linux.
        let mut public: ibv_srq = unsafe { mem::zeroed() };
        public.context = domain.context;
        public.srq_context = init.srq_context;
        public.pd = pd;
        public.handle = number.0;
        let srq = hand_out(Srq {
            public: UnsafeCell::new(public),
            device: Arc::clone(&domain.device),
            number,
            pd: domain.number,
            max_sge: init.attr.max_sge,
            gate,
            children: Default::default(),
            _parent: domain.children.adopt(),
        });
        if let Some(slot) = domain.device.engine().srqs.get_mut(number) {
            slot.set_handle(srq.expose_provenance());
        }
        Ok(srq)
    })
}

pub(super) unsafe extern "C" fn modify_srq(
    srq: *mut ibv_srq,
    srq_attr: *mut ibv_srq_attr,
    srq_attr_mask: c_int,
) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Srq>(srq) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        if srq_attr.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the caller's attributes, which nobody changes during the call.
        let public = unsafe { *srq_attr };
        let mask = SrqAttrMask::from_bits_retain(srq_attr_mask.cast_unsigned());
        if mask.contains(SrqAttrMask::MAX_WR) {
            check_size(public.max_wr)?;
        }
        let attr = SrqAttr {
            max_wr: public.max_wr as usize,
            max_sge: public.max_sge as usize,
            limit: public.srq_limit as usize,
        };
        let mut engine = live.device.engine();
        let slot = engine.srqs.get_mut(live.number).ok_or(Errno::INVAL)?;
        slot.queue.modify(&attr, mask).map_err(|error| {
            tracing::debug!(%error, "shared receive queue not modified");
            Errno::INVAL
        })
    })
}

pub(super) unsafe extern "C" fn query_srq(srq: *mut ibv_srq, srq_attr: *mut ibv_srq_attr) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Srq>(srq) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        let mut engine = live.device.engine();
        let slot = engine.srqs.get_mut(live.number).ok_or(Errno::INVAL)?;
        let attr = *slot.queue.attr();
        // Each came in as 32 bits.
        let int = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        let public = ibv_srq_attr {
            max_wr: int(attr.max_wr),
            max_sge: int(attr.max_sge),
            srq_limit: int(attr.limit),
        };
        // SAFETY: the caller points to attributes for the result.
        unsafe { srq_attr.write(public) };
        Ok(())
    })
}

/// Returns only when all events of the queue are acknowledged. Requests that wait are forgotten.
pub(super) unsafe extern "C" fn destroy_srq(srq: *mut ibv_srq) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Srq>(srq) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&live.device);
    errno_value(&device, || {
        live.children.check_none()?;
        let reports = device.engine().srqs.remove(live.number);
        // Without the lock: the acknowledgement may take as long as the application likes.
        reports.ok_or(Errno::INVAL)?.gate.wait_all_acked();
        // SAFETY: no queue pair takes from it, its events are acknowledged, and the caller gives it
        // up once.
        drop(unsafe { take_back::<Srq>(srq) });
        Ok(())
    })
}

pub(super) unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    recv_wr: *mut ibv_recv_wr,
    bad_recv_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue or NULL.
    let Ok(live) = (unsafe { object::<Srq>(srq) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        // Sends nothing: a peer that was told to wait asks again by itself.
        let mut engine = live.device.engine();
        let slot = engine.srqs.get_mut(live.number).ok_or(Errno::INVAL)?;
        let mut next = recv_wr;
        while !next.is_null() {
            // SAFETY: a request of the caller's list, which nobody changes during the call.
            let request = unsafe { &*next };
            if let Err(errno) = post_one(&mut slot.queue, request) {
                // SAFETY: the caller points to a place for the request that failed.
                unsafe { bad_recv_wr.write(next) };
                return Err(errno);
            }
            next = request.next;
        }
        Ok(())
    })
}

fn post_one(queue: &mut SharedReceiveQueue, public: &ibv_recv_wr) -> Result<(), Errno> {
    // SAFETY: the caller's list has `num_sge` entries.
    let sges = unsafe { scatter_list(public.sg_list, public.num_sge) }?;
    let wr_id = public.wr_id;
    queue.post(&RecvWr { wr_id, sges }).map_err(errno_of)
}

fn check_size(max_wr: u32) -> Result<(), Errno> {
    if (1..=limits::SRQ_WR_MAX).contains(&max_wr) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}
