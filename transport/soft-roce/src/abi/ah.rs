//! Address handles: where datagrams go.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::mem;
use std::net::IpAddr;
use std::sync::Arc;

use rdma_core_bindings::{
    IBV_WC_GRH, ibv_ah, ibv_ah_attr, ibv_context, ibv_grh, ibv_pd, ibv_send_wr, ibv_wc,
};
use rustix::io::Errno;

use super::convention::{errno_value, minus_one, null, set_errno};
use super::objects::{Ah, Context, Pd, hand_out, object, take_back};
use super::qp::{HOP_LIMIT, remote};
use super::query::gid_of;
use crate::device::limits;
use crate::wire::{GRH_LEN, Qpn, grh_addresses, to_ipv6};
use crate::work::Destination;

const _: () = assert!(size_of::<ibv_grh>() == GRH_LEN);

pub(super) unsafe extern "C" fn create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    // SAFETY: the caller passes a live domain or NULL.
    let domain = match unsafe { object::<Pd>(pd) } {
        Ok(domain) => domain,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&domain.device), || {
        if attr.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: not NULL, hence the caller's attributes, which nobody changes during the call.
        create(pd, domain, unsafe { &*attr })
    })
}

/// Requests that were posted with the handle go on: they have what they need of it.
pub(super) unsafe extern "C" fn destroy_ah(ah: *mut ibv_ah) -> c_int {
    // SAFETY: the caller passes a live handle or NULL.
    let Ok(live) = (unsafe { object::<Ah>(ah) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&live.device);
    errno_value(&device, || {
        // SAFETY: the caller gives the handle up once.
        drop(unsafe { take_back::<Ah>(ah) });
        Ok(())
    })
}

pub(super) unsafe extern "C" fn init_ah_from_wc(
    context: *mut ibv_context,
    port_num: u8,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    ah_attr: *mut ibv_ah_attr,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        set_errno(Errno::INVAL);
        return -1;
    };
    minus_one(&open.device, || {
        let own = open.device.address();
        // SAFETY: the caller passes a completion and the bytes in front of its data.
        let attr = unsafe { answer_to(own, port_num, wc, grh) }?;
        // SAFETY: the caller points to attributes for the result.
        unsafe { ah_attr.write(attr) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn create_ah_from_wc(
    pd: *mut ibv_pd,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    port_num: u8,
) -> *mut ibv_ah {
    // SAFETY: the caller passes a live domain or NULL.
    let domain = match unsafe { object::<Pd>(pd) } {
        Ok(domain) => domain,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&domain.device), || {
        // SAFETY: the caller passes a completion and the bytes in front of its data.
        let attr = unsafe { answer_to(domain.device.address(), port_num, wc, grh) }?;
        create(pd, domain, &attr)
    })
}

fn create(pd: *mut ibv_pd, domain: &Pd, attr: &ibv_ah_attr) -> Result<*mut ibv_ah, Errno> {
    let address = remote(domain.device.address(), attr)?;
    let [.., a, b, c, d] = to_ipv6(address).octets();
    Ok(hand_out(Ah {
        public: UnsafeCell::new(ibv_ah {
            context: domain.context,
            pd,
            handle: u32::from_be_bytes([a, b, c, d]),
        }),
        device: Arc::clone(&domain.device),
        pd: domain.number,
        address,
        _parent: domain.children.adopt(),
    }))
}

/// The way back to the sender of a datagram that was received at `own`.
///
/// # Safety
///
/// `wc` is NULL or a completion, and `grh` points to the bytes in front of its data if it has any.
unsafe fn answer_to(
    own: IpAddr,
    port_num: u8,
    wc: *const ibv_wc,
    grh: *const ibv_grh,
) -> Result<ibv_ah_attr, Errno> {
    // SAFETY: not NULL, hence a completion of the caller.
    if wc.is_null() || grh.is_null() || unsafe { (*wc).wc_flags } & IBV_WC_GRH == 0 {
        return Err(Errno::INVAL);
    }
    // SAFETY: the flag says that the bytes are there; they need no alignment.
    let grh = unsafe { grh.cast::<[u8; GRH_LEN]>().read_unaligned() };
    let (src, dst) = grh_addresses(&grh).ok_or(Errno::PROTONOSUPPORT)?;
    if dst != own || port_num != limits::PORT {
        return Err(Errno::INVAL);
    }
    // SAFETY: integers and a GID, for which zero says "none".
    let mut attr: ibv_ah_attr = unsafe { mem::zeroed() };
    attr.grh.dgid = gid_of(src);
    attr.grh.hop_limit = HOP_LIMIT;
    attr.is_global = 1;
    attr.port_num = port_num;
    Ok(attr)
}

/// The destination that a request on a queue pair for datagrams names.
pub(super) fn destination(public: &ibv_send_wr) -> Result<Destination, Errno> {
    // SAFETY: on such a queue pair this alternative holds; all of them are plain integers and pointers.
    let ud = unsafe { public.wr.ud };
    // SAFETY: the application names a live handle or NULL.
    let ah = unsafe { object::<Ah>(ud.ah) }?;
    Ok(Destination {
        pd: ah.pd,
        address: ah.address,
        qpn: Qpn::new(ud.remote_qpn),
        qkey: ud.remote_qkey,
    })
}
