//! Posting work requests.

use std::ffi::c_int;
use std::mem;
use std::ptr;
use std::slice;

use rdma_core_bindings::{
    IBV_QPT_UD, IBV_SEND_INLINE, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
    IBV_WR_BIND_MW, IBV_WR_LOCAL_INV, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE,
    IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, IBV_WR_SEND_WITH_INV, ibv_qp,
    ibv_recv_wr, ibv_send_wr, ibv_sge,
};
use rustix::io::Errno;

use super::ah::destination;
use super::convention::errno_value;
use super::mw;
use super::objects::{Qp, object};
use crate::copy;
use crate::device::Engine;
use crate::mr_table::Key;
use crate::wire::Qpn;
use crate::work::{Data, PostError, RecvWr, Remote, SendFlags, SendOp, SendWr, Sge};

const _: () = assert!(size_of::<Sge>() == size_of::<ibv_sge>());
const _: () = assert!(align_of::<Sge>() == align_of::<ibv_sge>());
const _: () = assert!(mem::offset_of!(Sge, lkey) == mem::offset_of!(ibv_sge, lkey));

pub(super) unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair or NULL.
    let Ok(live) = (unsafe { object::<Qp>(qp) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        live.device.post(|engine| {
            let mut next = wr;
            while !next.is_null() {
                // SAFETY: a request of the caller's list, which nobody changes during the call.
                let request = unsafe { &*next };
                if let Err(errno) = post_one_send(engine, live, request) {
                    // SAFETY: the caller points to a place for the request that failed.
                    unsafe { bad_wr.write(next) };
                    return Err(errno);
                }
                next = request.next;
            }
            Ok(())
        })
    })
}

pub(super) unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair or NULL.
    let Ok(live) = (unsafe { object::<Qp>(qp) }) else {
        return libc::EINVAL;
    };
    errno_value(&live.device, || {
        live.device.post(|engine| {
            let mut next = wr;
            while !next.is_null() {
                // SAFETY: a request of the caller's list, which nobody changes during the call.
                let request = unsafe { &*next };
                if let Err(errno) = post_one_recv(engine, live.qpn, request) {
                    // SAFETY: the caller points to a place for the request that failed.
                    unsafe { bad_wr.write(next) };
                    return Err(errno);
                }
                next = request.next;
            }
            Ok(())
        })
    })
}

/// Queues all of the requests or, with an error, none.
pub(super) fn post_all_sends<'a>(
    engine: &mut Engine,
    live: &Qp,
    requests: impl Iterator<Item = &'a ibv_send_wr>,
) -> Result<(), Errno> {
    for (posted, request) in requests.enumerate() {
        if let Err(errno) = post_one_send(engine, live, request) {
            engine.unpost_sends(live.qpn, posted);
            return Err(errno);
        }
    }
    Ok(())
}

fn post_one_send(engine: &mut Engine, live: &Qp, public: &ibv_send_wr) -> Result<(), Errno> {
    let qpn = live.qpn;
    let op = if live.init.qp_type == IBV_QPT_UD {
        datagram(public)?
    } else {
        // SAFETY: the caller's request names live objects.
        unsafe { operation(public) }?
    };
    let sges = if op.is_local() {
        &[]
    } else {
        // SAFETY: the caller's list has `num_sge` entries.
        unsafe { scatter_list(public.sg_list, public.num_sge) }?
    };
    let flags = SendFlags::from_bits_truncate(public.send_flags);
    let wr_id = public.wr_id;
    if op.is_local() || public.send_flags & IBV_SEND_INLINE == 0 {
        let wr = SendWr {
            wr_id,
            op,
            data: Data::Gather(sges),
            flags,
        };
        return engine.post_send(qpn, &wr).map_err(errno_of);
    }
    // Out of the engine while the engine takes the request; nothing between can return early.
    let mut bytes = mem::take(&mut engine.inline_buf);
    // SAFETY: the caller's elements lie in its own memory, registered or not.
    let result = unsafe { gather(sges, &mut bytes) }.and_then(|len| {
        let wr = SendWr {
            wr_id,
            op,
            data: Data::Inline(&bytes[..len]),
            flags,
        };
        engine.post_send(qpn, &wr).map_err(errno_of)
    });
    engine.inline_buf = bytes;
    result
}

fn post_one_recv(engine: &mut Engine, qpn: Qpn, public: &ibv_recv_wr) -> Result<(), Errno> {
    // SAFETY: the caller's list has `num_sge` entries.
    let sges = unsafe { scatter_list(public.sg_list, public.num_sge) }?;
    engine
        .post_recv(
            qpn,
            &RecvWr {
                wr_id: public.wr_id,
                sges,
            },
        )
        .map_err(errno_of)
}

fn datagram(public: &ibv_send_wr) -> Result<SendOp, Errno> {
    let imm = match public.opcode {
        IBV_WR_SEND => None,
        IBV_WR_SEND_WITH_IMM => Some(immediate(public)),
        _ => return Err(Errno::INVAL),
    };
    Ok(SendOp::Datagram {
        to: destination(public)?,
        imm,
    })
}

/// # Safety
///
/// What the request points to, if its opcode says that it does, is live.
unsafe fn operation(public: &ibv_send_wr) -> Result<SendOp, Errno> {
    Ok(match public.opcode {
        IBV_WR_SEND => SendOp::Send { imm: None },
        IBV_WR_SEND_WITH_IMM => SendOp::Send {
            imm: Some(immediate(public)),
        },
        IBV_WR_RDMA_WRITE => SendOp::Write {
            remote: rdma(public),
            imm: None,
        },
        IBV_WR_RDMA_WRITE_WITH_IMM => SendOp::Write {
            remote: rdma(public),
            imm: Some(immediate(public)),
        },
        IBV_WR_RDMA_READ => SendOp::Read {
            remote: rdma(public),
        },
        IBV_WR_ATOMIC_CMP_AND_SWP => {
            let (remote, compare, swap) = atomic(public);
            SendOp::CompareSwap {
                remote,
                compare,
                swap,
            }
        }
        IBV_WR_ATOMIC_FETCH_AND_ADD => {
            let (remote, add, _) = atomic(public);
            SendOp::FetchAdd { remote, add }
        }
        IBV_WR_SEND_WITH_INV => SendOp::SendInvalidate {
            rkey: invalidated(public),
        },
        IBV_WR_LOCAL_INV => SendOp::LocalInvalidate {
            rkey: invalidated(public),
        },
        // SAFETY: the caller's request names live objects.
        IBV_WR_BIND_MW => return unsafe { mw::posted_bind(public) },
        _ => return Err(Errno::INVAL),
    })
}

/// The immediate as it goes on the wire: `imm_data` is in network order already.
fn immediate(public: &ibv_send_wr) -> [u8; 4] {
    // SAFETY: both alternatives are a 32-bit integer.
    let imm_data = unsafe { public.__bindgen_anon_1.imm_data };
    u32::from_be(imm_data).to_be_bytes()
}

fn invalidated(public: &ibv_send_wr) -> Key {
    // SAFETY: both alternatives are a 32-bit integer.
    Key(unsafe { public.__bindgen_anon_1.invalidate_rkey })
}

fn rdma(public: &ibv_send_wr) -> Remote {
    // SAFETY: the opcode says that this alternative holds; all of them are plain integers and
    // pointers, so that an application's mistake yields a wrong address, which the peer refuses.
    let rdma = unsafe { public.wr.rdma };
    Remote {
        addr: rdma.remote_addr,
        rkey: Key(rdma.rkey),
    }
}

fn atomic(public: &ibv_send_wr) -> (Remote, u64, u64) {
    // SAFETY: as in `rdma`.
    let atomic = unsafe { public.wr.atomic };
    let remote = Remote {
        addr: atomic.remote_addr,
        rkey: Key(atomic.rkey),
    };
    (remote, atomic.compare_add, atomic.swap)
}

/// The scatter/gather list of a request.
///
/// # Safety
///
/// `list` points to `count` elements that nobody changes during `'a`, or `count` is not positive.
pub(super) unsafe fn scatter_list<'a>(
    list: *const ibv_sge,
    count: c_int,
) -> Result<&'a [Sge], Errno> {
    let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
    if count == 0 {
        return Ok(&[]);
    }
    if list.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller vouches for `count` elements, and `Sge` is laid out as `ibv_sge`.
    Ok(unsafe { slice::from_raw_parts(list.cast::<Sge>(), count) })
}

/// Copies the bytes of all elements into `bytes` and returns how many they are.
///
/// # Safety
///
/// The elements are readable memory of this process.
unsafe fn gather(sges: &[Sge], bytes: &mut [u8]) -> Result<usize, Errno> {
    let mut filled = 0;
    for sge in sges {
        let end = filled + sge.length as usize;
        let room = bytes.get_mut(filled..end).ok_or(Errno::INVAL)?;
        let from = ptr::with_exposed_provenance::<u8>(usize::try_from(sge.addr).unwrap_or(0));
        // SAFETY: the caller vouches for the element, which may be shared memory: hence the copy
        // that tolerates concurrent writers.
        unsafe { copy::read_shared(room, from) };
        filled = end;
    }
    Ok(filled)
}

pub(super) fn errno_of(error: PostError) -> Errno {
    tracing::debug!(%error, "request not posted");
    match error {
        PostError::Full => Errno::NOMEM,
        _ => Errno::INVAL,
    }
}
