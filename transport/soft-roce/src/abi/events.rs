//! Asynchronous events.

use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;

use rdma_core_bindings::{
    IBV_EVENT_COMM_EST, IBV_EVENT_CQ_ERR, IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_FATAL,
    IBV_EVENT_QP_LAST_WQE_REACHED, IBV_EVENT_QP_REQ_ERR, IBV_EVENT_SQ_DRAINED,
    IBV_EVENT_SRQ_LIMIT_REACHED, ibv_async_event, ibv_async_event__bindgen_ty_1, ibv_context,
};
use rustix::io::Errno;

use super::convention::{caught, minus_one, set_errno};
use super::objects::{Context, Cq, Qp, Srq, object};
use crate::device::{AckGate, Element, SoftDevice};

pub(super) unsafe extern "C" fn get_async_event(
    context: *mut ibv_context,
    event: *mut ibv_async_event,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        set_errno(Errno::INVAL);
        return -1;
    };
    minus_one(&open.device, || {
        let taken = open.events.next()?;
        let element = match taken.element {
            Element::Cq(handle) => ibv_async_event__bindgen_ty_1 {
                cq: ptr::with_exposed_provenance_mut(handle),
            },
            Element::Qp(handle) => ibv_async_event__bindgen_ty_1 {
                qp: ptr::with_exposed_provenance_mut(handle),
            },
            Element::Srq(handle) => ibv_async_event__bindgen_ty_1 {
                srq: ptr::with_exposed_provenance_mut(handle),
            },
            Element::Device => ibv_async_event__bindgen_ty_1 { port_num: 0 },
        };
        // SAFETY: the caller points to an event for the result.
        unsafe {
            event.write(ibv_async_event {
                element,
                event_type: taken.event_type,
            })
        };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn ack_async_event(event: *mut ibv_async_event) {
    if event.is_null() {
        return;
    }
    // SAFETY: the caller passes an event that `get_async_event` filled.
    let event = unsafe { *event };
    match event.event_type {
        IBV_EVENT_CQ_ERR => {
            // SAFETY: the type says that this alternative holds.
            let cq = unsafe { event.element.cq };
            // SAFETY: a queue is not destroyed before its events are acknowledged.
            if let Ok(live) = unsafe { object::<Cq>(cq) } {
                acknowledge(&live.device, &live.queue.async_gate, 1);
            }
        }
        IBV_EVENT_QP_FATAL
        | IBV_EVENT_QP_REQ_ERR
        | IBV_EVENT_QP_ACCESS_ERR
        | IBV_EVENT_COMM_EST
        | IBV_EVENT_SQ_DRAINED
        | IBV_EVENT_QP_LAST_WQE_REACHED => {
            // SAFETY: the type says that this alternative holds.
            let qp = unsafe { event.element.qp };
            // SAFETY: a queue pair is not destroyed before its events are acknowledged.
            if let Ok(live) = unsafe { object::<Qp>(qp) } {
                acknowledge(&live.device, &live.gate, 1);
            }
        }
        IBV_EVENT_SRQ_LIMIT_REACHED => {
            // SAFETY: the type says that this alternative holds.
            let srq = unsafe { event.element.srq };
            // SAFETY: a queue is not destroyed before its events are acknowledged.
            if let Ok(live) = unsafe { object::<Srq>(srq) } {
                acknowledge(&live.device, &live.gate, 1);
            }
        }
        // Events of the device belong to no object that could wait for them.
        _ => {}
    }
}

/// Takes back events of an object, which may be destroyed as soon as the last one is: so nothing of
/// it is borrowed meanwhile.
pub(super) fn acknowledge(device: &Arc<SoftDevice>, gate: &Arc<AckGate>, count: u32) {
    let (device, gate) = (Arc::clone(device), Arc::clone(gate));
    let _ = caught(Some(&device), || {
        gate.ack(count);
        Ok(())
    });
}
