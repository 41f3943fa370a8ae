//! Queue pairs: create, modify, query, destroy.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::mem;
use std::net::IpAddr;
use std::sync::Arc;

use rdma_core_bindings::{
    IBV_MIG_MIGRATED, IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD, ibv_ah_attr, ibv_pd, ibv_qp, ibv_qp_attr,
    ibv_qp_cap, ibv_qp_init_attr, ibv_qp_type,
};
use rustix::io::Errno;

use super::convention::{errno_value, null};
use super::objects::{Cq, Pd, Qp, Srq, hand_out, object, take_back};
use super::qp_ex;
use super::query::{gid_of, peer_of};
use super::session::Session;
use crate::device::{Reports, Service, SoftDevice, limits};
use crate::mr_table::AccessFlags;
use crate::qp::{Attr, AttrMask, Mtu, QpConfig, QpState};
use crate::srq::SrqRef;
use crate::ud;
use crate::wire::{Psn, Qpn};

/// Hop limit shown for the path; the operating system chooses the real one.
pub(super) const HOP_LIMIT: u8 = 64;

pub(super) unsafe extern "C" fn create_qp(
    pd: *mut ibv_pd,
    qp_init_attr: *mut ibv_qp_init_attr,
) -> *mut ibv_qp {
    // SAFETY: the caller passes a live domain or NULL.
    let domain = match unsafe { object::<Pd>(pd) } {
        Ok(domain) => domain,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&domain.device), || {
        if qp_init_attr.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the caller's attributes, which nobody else uses during the call.
        let mut init = unsafe { *qp_init_attr };
        // SAFETY: the caller names a live queue or NULL, which means none.
        let srq = unsafe { object::<Srq>(init.srq) }.ok();
        if let Some(srq) = srq {
            if !Arc::ptr_eq(&srq.device, &domain.device) {
                return Err(Errno::INVAL);
            }
            // Such a queue pair has no receive queue of its own.
            (init.cap.max_recv_wr, init.cap.max_recv_sge) = (0, 0);
        }
        init.cap = granted(init.cap)?;
        let service = service(&domain.device, init.qp_type)?;
        // SAFETY: the caller names a live queue or NULL.
        let send_cq = unsafe { object::<Cq>(init.send_cq) }?;
        // SAFETY: the caller names a live queue or NULL.
        let recv_cq = unsafe { object::<Cq>(init.recv_cq) }?;
        let reports = Reports {
            send_cq: Arc::clone(&send_cq.queue),
            recv_cq: Arc::clone(&recv_cq.queue),
            events: Arc::clone(&domain.events),
            gate: Arc::default(),
            handle: 0,
        };
        let gate = Arc::clone(&reports.gate);
        let qpn = domain
            .device
            .create_qp(service, config(domain, &init, srq), reports)?;
        // SAFETY: pointers, integers and pthread objects, whose initial values are all zero on Linux.
        let mut public: ibv_qp = unsafe { mem::zeroed() };
        public.context = domain.context;
        public.qp_context = init.qp_context;
        public.pd = pd;
        public.send_cq = init.send_cq;
        public.recv_cq = init.recv_cq;
        public.srq = init.srq;
        public.handle = qpn.get();
        public.qp_num = qpn.get();
        public.state = QpState::Reset as u32;
        public.qp_type = init.qp_type;
        let qp = hand_out(Qp {
            public: UnsafeCell::new(qp_ex::without_functions(public)),
            device: Arc::clone(&domain.device),
            qpn,
            init,
            gate,
            staged: Session::default(),
            _parents: (
                [
                    domain.children.adopt(),
                    send_cq.children.adopt(),
                    recv_cq.children.adopt(),
                ],
                srq.map(|srq| srq.children.adopt()),
            ),
        });
        domain
            .device
            .engine()
            .set_handle(qpn, qp.expose_provenance());
        // SAFETY: as for the read above; the granted capacities go back to the caller.
        unsafe { (*qp_init_attr).cap = init.cap };
        Ok(qp)
    })
}

pub(super) unsafe extern "C" fn modify_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    attr_mask: c_int,
) -> c_int {
    // SAFETY: the caller passes a live queue pair or NULL.
    let Ok(live) = (unsafe { object::<Qp>(qp) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        if attr.is_null() {
            return Err(Errno::INVAL);
        }
        let mask = AttrMask::from_bits_retain(attr_mask.cast_unsigned());
        // SAFETY: the caller's attributes, which nobody changes during the call.
        let attr = attributes(live.device.address(), unsafe { &*attr }, mask)?;
        live.device.modify_qp(live.qpn, &attr, mask)?;
        if mask.contains(AttrMask::STATE) {
            // SAFETY: the public part of a live object, which is in an `UnsafeCell`.
            unsafe { (*live.public.get()).qp_base.state = attr.state as u32 };
        }
        Ok(())
    })
}

pub(super) unsafe extern "C" fn query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _attr_mask: c_int,
    init_attr: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair or NULL.
    let Ok(live) = (unsafe { object::<Qp>(qp) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        let (present, is_draining) = live.device.query_qp(live.qpn)?;
        let mut public = public_attributes(&present, live.init.cap);
        public.sq_draining = is_draining.into();
        // SAFETY: the caller points to attributes for the result.
        unsafe { attr.write(public) };
        // SAFETY: the caller points to initial attributes for the result.
        unsafe { init_attr.write(live.init) };
        // SAFETY: the public part of a live object, which is in an `UnsafeCell`.
        unsafe { (*live.public.get()).qp_base.state = present.state as u32 };
        Ok(())
    })
}

/// Returns only when no thread touches anything that the queue pair's requests point to.
pub(super) unsafe extern "C" fn destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: the caller passes a live queue pair or NULL.
    let Ok(live) = (unsafe { object::<Qp>(qp) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&live.device);
    errno_value(&device, || {
        device.destroy_qp(live.qpn)?;
        // SAFETY: the device has forgotten the queue pair, its events are acknowledged, and the
        // caller gives it up once.
        drop(unsafe { take_back::<Qp>(qp) });
        Ok(())
    })
}

fn service(device: &SoftDevice, qp_type: ibv_qp_type) -> Result<Service, Errno> {
    match qp_type {
        IBV_QPT_RC => Ok(Service::Rc),
        IBV_QPT_UC => Ok(Service::Uc),
        IBV_QPT_UD => Ok(Service::Ud(ud::Port {
            address: device.address(),
            mtu: device.active_mtu(),
        })),
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// The capacities a queue pair gets: what was asked for, if the device has so much.
fn granted(asked: ibv_qp_cap) -> Result<ibv_qp_cap, Errno> {
    let fits = asked.max_send_wr <= limits::QP_WR_MAX
        && asked.max_recv_wr <= limits::QP_WR_MAX
        && asked.max_send_sge <= limits::SGE_MAX
        && asked.max_recv_sge <= limits::SGE_MAX
        && asked.max_inline_data <= limits::INLINE_LEN_MAX;
    if fits { Ok(asked) } else { Err(Errno::INVAL) }
}

fn config(domain: &Pd, init: &ibv_qp_init_attr, srq: Option<&Srq>) -> QpConfig {
    QpConfig {
        pd: domain.number,
        max_send_wr: init.cap.max_send_wr as usize,
        max_recv_wr: init.cap.max_recv_wr as usize,
        max_send_sge: init.cap.max_send_sge as usize,
        max_recv_sge: srq.map_or(init.cap.max_recv_sge, |srq| srq.max_sge) as usize,
        max_inline: init.cap.max_inline_data as usize,
        sq_sig_all: init.sq_sig_all != 0,
        window_max: limits::WINDOW_MAX,
        srq: srq.map(|srq| SrqRef {
            number: srq.number,
            pd: srq.pd,
        }),
    }
}

/// The attributes that `mask` names, for a device at `own`; the others are whatever the application left
/// there.
fn attributes(own: IpAddr, public: &ibv_qp_attr, mask: AttrMask) -> Result<Attr, Errno> {
    let mut attr = Attr::default();
    let given = |attribute| mask.contains(attribute);
    if given(AttrMask::STATE) {
        attr.state = QpState::from_verbs(public.qp_state).ok_or(Errno::INVAL)?;
    }
    if given(AttrMask::CUR_STATE) {
        attr.cur_state = QpState::from_verbs(public.cur_qp_state).ok_or(Errno::INVAL)?;
    }
    if given(AttrMask::PATH_MTU) {
        attr.path_mtu = Mtu::from_verbs(public.path_mtu).ok_or(Errno::INVAL)?;
    }
    if given(AttrMask::AV) {
        attr.remote = remote(own, &public.ah_attr)?;
    }
    // Rights of other transports and memory kinds mean nothing here, and are no error.
    attr.access = AccessFlags::from_bits_truncate(public.qp_access_flags);
    attr.pkey_index = public.pkey_index;
    attr.port = public.port_num;
    attr.qkey = public.qkey;
    attr.dest_qpn = Qpn::new(public.dest_qp_num);
    attr.rq_psn = Psn::new(public.rq_psn);
    attr.sq_psn = Psn::new(public.sq_psn);
    attr.max_rd_atomic = public.max_rd_atomic;
    attr.max_dest_rd_atomic = public.max_dest_rd_atomic;
    attr.min_rnr_timer = public.min_rnr_timer;
    attr.timeout = public.timeout;
    attr.retry_cnt = public.retry_cnt;
    attr.rnr_retry = public.rnr_retry;
    attr.en_sqd_async_notify = public.en_sqd_async_notify != 0;
    Ok(attr)
}

/// The peer's address: RoCE has a GRH always, and the device at `own` one port and one GID.
pub(super) fn remote(own: IpAddr, path: &ibv_ah_attr) -> Result<IpAddr, Errno> {
    if path.is_global == 0 || path.port_num != limits::PORT || path.grh.sgid_index != 0 {
        return Err(Errno::INVAL);
    }
    // SAFETY: every bit pattern of a GID is 16 bytes.
    peer_of(own, unsafe { path.grh.dgid.raw })
}

fn public_attributes(attr: &Attr, cap: ibv_qp_cap) -> ibv_qp_attr {
    // SAFETY: integers and GIDs, for which zero says "none".
    let mut public: ibv_qp_attr = unsafe { mem::zeroed() };
    public.qp_state = attr.state as u32;
    public.cur_qp_state = attr.cur_state as u32;
    public.path_mtu = attr.path_mtu as u32;
    public.path_mig_state = IBV_MIG_MIGRATED;
    public.qkey = attr.qkey;
    public.rq_psn = attr.rq_psn.get();
    public.sq_psn = attr.sq_psn.get();
    public.dest_qp_num = attr.dest_qpn.get();
    public.qp_access_flags = attr.access.bits();
    public.cap = cap;
    public.ah_attr.grh.dgid = gid_of(attr.remote);
    public.ah_attr.grh.hop_limit = HOP_LIMIT;
    public.ah_attr.is_global = 1;
    public.ah_attr.port_num = limits::PORT;
    public.pkey_index = attr.pkey_index;
    public.en_sqd_async_notify = attr.en_sqd_async_notify.into();
    public.max_rd_atomic = attr.max_rd_atomic;
    public.max_dest_rd_atomic = attr.max_dest_rd_atomic;
    public.min_rnr_timer = attr.min_rnr_timer;
    public.port_num = attr.port;
    public.timeout = attr.timeout;
    public.retry_cnt = attr.retry_cnt;
    public.rnr_retry = attr.rnr_retry;
    public
}
