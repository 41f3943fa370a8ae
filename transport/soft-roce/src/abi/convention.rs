//! The four ways in which verbs functions report failure, and what a panic becomes in each.
//!
//! Each function of the table resolves its objects, then runs its body in one of these. A panic
//! never crosses into C: it stops the device ([`SoftDevice::fatal`]) and is reported as `EIO`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use libc::c_int;
use rustix::io::Errno;

use crate::device::SoftDevice;

/// For functions that return 0 or the errno value.
pub(super) fn errno_value(device: &SoftDevice, body: impl FnOnce() -> Result<(), Errno>) -> c_int {
    match caught(Some(device), body) {
        Ok(()) => 0,
        Err(errno) => errno.raw_os_error(),
    }
}

/// For functions that return 0, or -1 with errno set.
pub(super) fn minus_one(device: &SoftDevice, body: impl FnOnce() -> Result<(), Errno>) -> c_int {
    match caught(Some(device), body) {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// For functions that return a pointer, or NULL with errno set. `device` is `None` where none is
/// known yet.
pub(super) fn null<T>(
    device: Option<&SoftDevice>,
    body: impl FnOnce() -> Result<*mut T, Errno>,
) -> *mut T {
    caught(device, body).unwrap_or_else(|errno| {
        set_errno(errno);
        ptr::null_mut()
    })
}

/// Runs `body`; a panic stops the device and becomes `EIO`.
pub(super) fn caught<T>(
    device: Option<&SoftDevice>,
    body: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    // Unwind safe: what the panic may have left half done lives in the device, and a device that
    // panicked only flushes and is torn down.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        if let Some(device) = device {
            device.fatal("a verbs call panicked");
        }
        Err(Errno::IO)
    })
}

/// Sets the calling thread's errno.
pub(super) fn set_errno(errno: Errno) {
    // SAFETY: the location is the calling thread's own, as long as the thread lives.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: as above; nothing else refers to it during the store.
    unsafe { *location = errno.raw_os_error() };
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rdma_core_bindings::IBV_EVENT_DEVICE_FATAL;

    use super::*;
    use crate::SoftConfig;
    use crate::device::{AckGate, CompletionQueue, Element, EventQueue, Reports, Service};
    use crate::qp::{Attr, AttrMask, QpConfig, QpState};
    use crate::work::{RecvWr, WcStatus};

    #[test]
    fn a_panic_stops_the_device_and_is_eio_by_each_convention() {
        let device = SoftDevice::bind(SoftConfig::default()).expect("a free loopback address");
        let events = Arc::new(EventQueue::new().expect("a descriptor"));
        device.attach(&events);
        let cq = Arc::new(CompletionQueue::new(4, None, Arc::clone(&events)));
        let gate = Arc::<AckGate>::default();
        let reports = Reports {
            send_cq: Arc::clone(&cq),
            recv_cq: Arc::clone(&cq),
            events: Arc::clone(&events),
            gate: Arc::clone(&gate),
            handle: 0,
        };
        let config = QpConfig {
            pd: device.allocate_pd(),
            max_send_wr: 1,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline: 0,
            sq_sig_all: false,
            window_max: 16,
            srq: None,
        };
        let qpn = device
            .create_qp(Service::Rc, config, reports)
            .expect("the table is empty");
        let init = Attr {
            state: QpState::Init,
            ..Attr::default()
        };
        let mask = AttrMask::STATE | AttrMask::PKEY_INDEX | AttrMask::PORT | AttrMask::ACCESS_FLAGS;
        device
            .modify_qp(qpn, &init, mask)
            .expect("RESET goes to INIT");
        device
            .post(|engine| {
                engine.post_recv(
                    qpn,
                    &RecvWr {
                        wr_id: 5,
                        sges: &[],
                    },
                )
            })
            .expect("there is room for one");

        let under_lock = || device.post(|_| panic!("on purpose, with the engine locked"));
        assert_eq!(errno_value(&device, under_lock), libc::EIO);
        assert_eq!(minus_one(&device, || panic!("on purpose")), -1);
        assert!(null::<u8>(Some(&device), || panic!("on purpose")).is_null());

        let (attr, _) = device.query_qp(qpn).expect("it still exists");
        assert_eq!(attr.state, QpState::Err);
        let mut flushed = Vec::new();
        device
            .poll(&cq, 4, |_, wc| flushed.push((wc.wr_id, wc.status)))
            .expect("no overrun");
        assert_eq!(flushed, [(5, WcStatus::WrFlushErr)]);
        let fatal = std::iter::from_fn(|| events.next().ok())
            .find(|event| event.element == Element::Device)
            .expect("the device's own event");
        assert_eq!(fatal.event_type, IBV_EVENT_DEVICE_FATAL);
        // The queue pair's own event was taken on the way.
        gate.ack(1);
        device.destroy_qp(qpn).expect("it still exists");
    }
}
