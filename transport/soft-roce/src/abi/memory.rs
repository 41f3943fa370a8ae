//! Protection domains and memory regions.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex};

use rdma_core_bindings::{
    IBV_ACCESS_HUGETLB, IBV_ACCESS_OPTIONAL_RANGE, IBV_ACCESS_ZERO_BASED,
    IBV_REREG_MR_CHANGE_ACCESS, IBV_REREG_MR_CHANGE_PD, IBV_REREG_MR_CHANGE_TRANSLATION,
    IBV_REREG_MR_ERR_INPUT, IBV_REREG_MR_FLAGS_SUPPORTED, ibv_context, ibv_mr, ibv_pd,
};
use rustix::io::Errno;

use super::convention::{caught, errno_value, null, set_errno};
use super::objects::{Children, Context, Mr, Pd, hand_out, object, take_back};
use crate::device::lock;
use crate::mr_table::{AccessFlags, DeregisterError, Region, RegisterError, ReregisterError};

pub(super) unsafe extern "C" fn alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    // SAFETY: the caller passes an open context or NULL.
    let open = match unsafe { object::<Context>(context) } {
        Ok(open) => open,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&open.device), || {
        let number = open.device.allocate_pd();
        Ok(hand_out(Pd {
            public: UnsafeCell::new(ibv_pd {
                context,
                handle: number.0,
            }),
            device: Arc::clone(&open.device),
            events: Arc::clone(&open.events),
            context,
            number,
            children: Children::default(),
            _parent: open.children.adopt(),
        }))
    })
}

pub(super) unsafe extern "C" fn dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: the caller passes a live domain or NULL.
    let Ok(domain) = (unsafe { object::<Pd>(pd) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&domain.device);
    errno_value(&device, || {
        domain.children.check_none()?;
        // SAFETY: nothing belongs to the domain, and the caller gives it up once.
        drop(unsafe { take_back::<Pd>(pd) });
        Ok(())
    })
}

pub(super) unsafe extern "C" fn reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    let iova = addr.addr() as u64;
    // SAFETY: as for this function.
    unsafe { reg_mr_iova2(pd, addr, length, iova, access.cast_unsigned()) }
}

pub(super) unsafe extern "C" fn reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: as for this function.
    unsafe { reg_mr_iova2(pd, addr, length, iova, access.cast_unsigned()) }
}

pub(super) unsafe extern "C" fn reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller passes a live domain or NULL.
    let domain = match unsafe { object::<Pd>(pd) } {
        Ok(domain) => domain,
        Err(errno) => return null(None, || Err(errno)),
    };
    null(Some(&domain.device), || {
        let zero_based = access & IBV_ACCESS_ZERO_BASED != 0;
        let region = Region {
            pd: domain.number,
            base: addr.cast(),
            iova: if zero_based { 0 } else { iova },
            len: length as u64,
            access: rights(access)?,
        };
        check_mapped(addr, length)?;
        // SAFETY: by calling, the application promises that the memory stays mapped and is used as
        // shared memory until `ibv_dereg_mr` has returned.
        let key = unsafe { domain.device.engine().regions.register(region) }.map_err(errno_of)?;
        Ok(hand_out(Mr {
            public: UnsafeCell::new(ibv_mr {
                context: domain.context,
                pd,
                addr,
                length,
                handle: key.0 >> 8,
                lkey: key.0,
                rkey: key.0,
            }),
            device: Arc::clone(&domain.device),
            key,
            parent: Mutex::new(domain.children.adopt()),
        }))
    })
}

/// Changes a region in place: its keys stay. One that windows are bound to is not changed.
///
/// Every failure leaves the region as it was, which is what `IBV_REREG_MR_ERR_INPUT` says.
pub(super) unsafe extern "C" fn rereg_mr(
    mr: *mut ibv_mr,
    flags: c_int,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> c_int {
    // SAFETY: the caller passes a live region or NULL.
    let Ok(live) = (unsafe { object::<Mr>(mr) }) else {
        set_errno(Errno::INVAL);
        return IBV_REREG_MR_ERR_INPUT;
    };
    let flags = flags.cast_unsigned();
    let domain = match flags & IBV_REREG_MR_CHANGE_PD {
        0 => Ok(None),
        // SAFETY: the caller passes a live domain or NULL.
        _ => unsafe { object::<Pd>(pd) }.map(Some),
    };
    let result = caught(Some(&live.device), || {
        let domain = domain?;
        let is_moved = flags & IBV_REREG_MR_CHANGE_TRANSLATION != 0;
        if flags & !IBV_REREG_MR_FLAGS_SUPPORTED != 0 || is_moved && length == 0 {
            return Err(Errno::INVAL);
        }
        let mut engine = live.device.engine();
        let mut region = *engine.regions.get(live.key).ok_or(Errno::INVAL)?;
        if let Some(domain) = domain {
            region.pd = domain.number;
        }
        if flags & IBV_REREG_MR_CHANGE_ACCESS != 0 {
            region.access = rights(access.cast_unsigned())?;
        }
        if is_moved {
            check_mapped(addr, length)?;
            region.base = addr.cast();
            region.iova = addr.addr() as u64;
            region.len = length as u64;
        }
        // SAFETY: as in `reg_mr_iova2`.
        let changed = unsafe { engine.regions.reregister(live.key, region) };
        changed.map_err(|error| match error {
            ReregisterError::Old(error) => busy_or_invalid(error),
            ReregisterError::New(error) => errno_of(error),
        })?;
        if let Some(domain) = domain {
            *lock(&live.parent) = domain.children.adopt();
            // SAFETY: the public part of a live object, which is in an `UnsafeCell`.
            unsafe { (*live.public.get()).pd = pd };
        }
        if is_moved {
            // SAFETY: as above.
            unsafe { (*live.public.get()).addr = addr };
            // SAFETY: as above.
            unsafe { (*live.public.get()).length = length };
        }
        Ok(())
    });
    match result {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            IBV_REREG_MR_ERR_INPUT
        }
    }
}

/// The fence: the table changes under the device's lock, and every copy from or to a region runs
/// under that lock, so none is under way or begins after this has returned.
pub(super) unsafe extern "C" fn dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: the caller passes a live region or NULL.
    let Ok(region) = (unsafe { object::<Mr>(mr) }) else {
        return libc::EINVAL;
    };
    let device = Arc::clone(&region.device);
    errno_value(&device, || {
        device
            .engine()
            .regions
            .deregister(region.key)
            .map_err(busy_or_invalid)?;
        // SAFETY: the key is gone, and the caller gives the region up once.
        drop(unsafe { take_back::<Mr>(mr) });
        Ok(())
    })
}

/// `EFAULT` if a page of the range is not mapped, as a device says that cannot pin it: better now
/// than as a fault in whoever drives when a peer's packet comes.
fn check_mapped(addr: *mut c_void, length: usize) -> Result<(), Errno> {
    let into_page = addr.addr() % rustix::param::page_size();
    let Some(length) = length.checked_add(into_page) else {
        return Err(Errno::INVAL);
    };
    let start = addr.wrapping_byte_sub(into_page);
    // SAFETY: an asynchronous sync writes nothing and starts nothing; it only looks for holes.
    let result = unsafe { libc::msync(start, length, libc::MS_ASYNC) };
    match result {
        0 => Ok(()),
        _ => Err(Errno::FAULT),
    }
}

/// The rights among `ibv_access_flags`. Huge pages and zero base are ways of registering, and the
/// optional flags are hints that this device has no use for.
fn rights(access: c_uint) -> Result<AccessFlags, Errno> {
    let aside = IBV_ACCESS_HUGETLB | IBV_ACCESS_ZERO_BASED | IBV_ACCESS_OPTIONAL_RANGE;
    AccessFlags::from_bits(access & !aside).ok_or(Errno::INVAL)
}

fn busy_or_invalid(error: DeregisterError) -> Errno {
    match error {
        DeregisterError::UnknownKey(_) => Errno::INVAL,
        DeregisterError::WindowsBound { .. } => Errno::BUSY,
    }
}

fn errno_of(error: RegisterError) -> Errno {
    match error {
        RegisterError::AccessFlags | RegisterError::Range { .. } => Errno::INVAL,
        RegisterError::TableFull => Errno::NOMEM,
    }
}
