//! Memory windows.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rdma_core_bindings::{
    IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_OPTIONAL_RANGE, IBV_ACCESS_REMOTE_ATOMIC,
    IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_WRITE, IBV_ACCESS_ZERO_BASED, ibv_inc_rkey, ibv_mw,
    ibv_mw_bind, ibv_mw_bind_info, ibv_mw_type, ibv_pd, ibv_qp, ibv_send_wr,
};
use rustix::io::Errno;

use super::convention::{errno_value, null};
use super::objects::{Mr, Mw, Pd, Qp, hand_out, object, take_back};
use super::post::errno_of;
use crate::mr_table::{AccessFlags, Bind, Key, WindowType};
use crate::work::{Data, SendFlags, SendOp, SendWr};

pub(super) unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, mw_type: ibv_mw_type) -> *mut ibv_mw {
    // SAFETY: the caller passes a live domain or NULL.
    let domain = match unsafe { object::<Pd>(pd) } {
        Ok(domain) => domain,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&domain.device), || {
        let window_type = window_type(mw_type)?;
        let key = domain
            .device
            .engine()
            .regions
            .alloc_window(domain.number, window_type)
            .map_err(|_| Errno::NOMEM)?;
        Ok(hand_out(Mw {
            public: UnsafeCell::new(ibv_mw {
                context: domain.context,
                pd,
                rkey: key.0,
                handle: key.index(),
                type_: mw_type,
            }),
            device: Arc::clone(&domain.device),
            window_type,
            rkey: AtomicU32::new(key.0),
            _parent: domain.children.adopt(),
        }))
    })
}

/// Bound or not. The same fence as `ibv_dereg_mr`.
pub(super) unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    // SAFETY: the caller passes a live window or NULL.
    let Ok(window) = (unsafe { object::<Mw>(mw) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&window.device);
    errno_value(&device, || {
        device
            .engine()
            .regions
            .free_window(window.key())
            .map_err(|_| Errno::INVAL)?;
        // SAFETY: the key is gone, and the caller gives the window up once.
        drop(unsafe { take_back::<Mw>(mw) });
        Ok(())
    })
}

/// Binds a window of type 1 by a request on the send queue. Its next key is in the window when this
/// returns; the application takes it back if the request fails.
pub(super) unsafe extern "C" fn bind_mw(
    qp: *mut ibv_qp,
    mw: *mut ibv_mw,
    mw_bind: *mut ibv_mw_bind,
) -> c_int {
    // SAFETY: the caller passes a live queue pair or NULL.
    let Ok(live) = (unsafe { object::<Qp>(qp) }) else {
        return libc::EINVAL;
    };
    // SAFETY: the caller passes a live window or NULL.
    let Ok(window) = (unsafe { object::<Mw>(mw) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        if mw_bind.is_null() || window.window_type != WindowType::Type1 {
            return Err(Errno::INVAL);
        }
        // SAFETY: not NULL, hence the caller's request, which nobody changes during the call.
        let request = unsafe { &*mw_bind };
        live.device.post(|engine| {
            // Relaxed: read and written under the device's lock only.
            let rkey = Key(ibv_inc_rkey(window.rkey.load(Ordering::Relaxed)));
            // SAFETY: the caller's request names a live region or NULL.
            let bind = unsafe { bind_of(rkey, &request.bind_info) }?;
            if bind.is_zero_based {
                return Err(Errno::INVAL);
            }
            let wr = SendWr {
                wr_id: request.wr_id,
                op: SendOp::BindWindow(bind),
                data: Data::Gather(&[]),
                flags: SendFlags::from_bits_truncate(request.send_flags),
            };
            engine.post_send(live.qpn, &wr).map_err(errno_of)?;
            window.rkey.store(rkey.0, Ordering::Relaxed);
            // SAFETY: the public part of a live object, which is in an `UnsafeCell`.
            unsafe { (*window.public.get()).rkey = rkey.0 };
            Ok(())
        })
    })
}

/// The operation of a posted `IBV_WR_BIND_MW`, which is for windows of type 2 only. Of the new key the
/// application chooses the tag; the index stays the window's.
///
/// # Safety
///
/// The request names a live window or NULL, and a live region or NULL.
pub(super) unsafe fn posted_bind(public: &ibv_send_wr) -> Result<SendOp, Errno> {
    // SAFETY: the opcode says that this alternative holds.
    let request = unsafe { public.__bindgen_anon_2.bind_mw };
    // SAFETY: the caller vouches for the window.
    let window = unsafe { object::<Mw>(request.mw) }?;
    if window.window_type != WindowType::Type2 {
        return Err(Errno::INVAL);
    }
    let rkey = Key(window.key().index() << 8 | request.rkey & 0xff);
    // SAFETY: the caller vouches for the region.
    unsafe { bind_of(rkey, &request.bind_info) }.map(SendOp::BindWindow)
}

/// # Safety
///
/// The region is live or NULL; NULL goes with length 0 only.
unsafe fn bind_of(rkey: Key, info: &ibv_mw_bind_info) -> Result<Bind, Errno> {
    let region = if info.mr.is_null() && info.length == 0 {
        Key(0)
    } else {
        // SAFETY: the caller vouches for the region.
        unsafe { object::<Mr>(info.mr) }?.key
    };
    Ok(Bind {
        rkey,
        region,
        addr: info.addr,
        len: info.length,
        access: rights(info.mw_access_flags)?,
        is_zero_based: info.mw_access_flags & IBV_ACCESS_ZERO_BASED != 0,
    })
}

/// The rights among `ibv_access_flags`. Local writing is the region's matter, and harmless to ask for; the
/// optional flags are hints that this device has no use for.
fn rights(access: u32) -> Result<AccessFlags, Errno> {
    let known = IBV_ACCESS_REMOTE_READ
        | IBV_ACCESS_REMOTE_WRITE
        | IBV_ACCESS_REMOTE_ATOMIC
        | IBV_ACCESS_LOCAL_WRITE
        | IBV_ACCESS_ZERO_BASED
        | IBV_ACCESS_OPTIONAL_RANGE;
    if access & !known != 0 {
        return Err(Errno::INVAL);
    }
    Ok(AccessFlags::from_bits_truncate(access))
}

fn window_type(mw_type: ibv_mw_type) -> Result<WindowType, Errno> {
    [WindowType::Type1, WindowType::Type2]
        .into_iter()
        .find(|window_type| *window_type as u32 == mw_type)
        .ok_or(Errno::INVAL)
}
