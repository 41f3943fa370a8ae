//! Registered memory: [`SharedRegion`], which peers may be granted, and [`LocalBuffer`], which they never
//! are.
//!
//! | | `SharedRegion` | `LocalBuffer` |
//! | --- | --- | --- |
//! | granted to peers | yes | never: no remote right |
//! | its bytes | copies and atomics through its [`Mapping`] | `&[u8]` and `&mut [u8]` |
//! | while posted | shared by `Arc` | owned by the request |
//! | use | images, tables | receives, READ results, messages |
//!
//! # Safety
//!
//! `MrInner` owns one `ibv_mr` and holds the mapping below it. The mapping is freed only after
//! `ibv_dereg_mr` has returned 0; if it fails both are kept for ever. The mapping of a `LocalBuffer` is
//! private to this module: the pieces that share it own disjoint ranges, and a piece inside of a posted
//! request is in the hands of the device and of nobody else.
#![allow(unsafe_code, reason = "registers memory and lends slices of it")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_core_bindings as ffi;

use crate::error::{Error, Failed, Result};
use crate::memory::{Backing, Mapping, check_range};
use crate::pd::{PdInner, ProtectionDomain};
use crate::types::{AccessFlags, Lkey, Remote, Rkey};

struct MrInner {
    pd: Arc<PdInner>,
    mapping: Arc<Mapping>,
    mr: NonNull<ffi::ibv_mr>,
    lkey: Lkey,
    rkey: Rkey,
    /// False once `ibv_dereg_mr` has returned 0.
    is_live: bool,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`).
unsafe impl Send for MrInner {}
// SAFETY: as above.
unsafe impl Sync for MrInner {}

impl MrInner {
    fn register(
        pd: &Arc<PdInner>,
        mapping: &Arc<Mapping>,
        range: &Range<usize>,
        access: AccessFlags,
        iova: u64,
    ) -> Result<MrInner> {
        let verbs = pd.context.verbs;
        let addr = mapping.addr().as_ptr().wrapping_add(range.start);
        let natural = addr.expose_provenance() as u64 == iova;
        // Only the rights with a name: other bits change what an address means.
        let bits = access.intersection(AccessFlags::all()).bits();
        let (addr, len) = (addr.cast(), range.len());
        let mr = if natural {
            // SAFETY: the range is mapped (the caller checked it) and stays so while the registration
            // lives, and no reference to bytes that the device may write exists (module docs).
            unsafe { ffi::ibv_reg_mr(verbs, pd.as_ptr(), addr, len, bits) }
        } else {
            // SAFETY: as above.
            unsafe { ffi::ibv_reg_mr_iova(verbs, pd.as_ptr(), addr, len, iova, bits) }
        };
        let Some(mr) = NonNull::new(mr) else {
            return Err(register_error(
                pd,
                mapping,
                len,
                access,
                io::Error::last_os_error(),
            ));
        };
        // SAFETY: just made by the table; a copy of its public fields is read.
        let keys = unsafe { mr.read() };
        let (pd, mapping) = (Arc::clone(pd), Arc::clone(mapping));
        Ok(MrInner {
            pd,
            mapping,
            mr,
            lkey: Lkey(keys.lkey),
            rkey: Rkey(keys.rkey),
            is_live: true,
        })
    }

    /// Ends the registration; on failure it still exists, and so must everything below it.
    fn deregister(&mut self) -> Result<()> {
        let context = &self.pd.context;
        // SAFETY: the registration is live, and after success `is_live` keeps everybody from it.
        let errno = unsafe { (context.verbs.dereg_mr)(self.mr.as_ptr()) };
        context.check_destroyed("ibv_dereg_mr", errno)?;
        self.is_live = false;
        Ok(())
    }
}

impl Drop for MrInner {
    fn drop(&mut self) {
        let context = Arc::clone(&self.pd.context);
        if !self.is_live || context.destroy_dropped(|| self.deregister()) {
            return;
        }
        std::mem::forget(Arc::clone(&self.pd));
        std::mem::forget(Arc::clone(&self.mapping));
    }
}

pub(crate) fn register(
    pd: &ProtectionDomain,
    mapping: &Arc<Mapping>,
    range: Range<usize>,
    access: AccessFlags,
    iova: Option<u64>,
) -> Result<SharedRegion> {
    let len = range.end.saturating_sub(range.start);
    check_range("a mapping", mapping.len(), range.start, len)?;
    let natural = mapping
        .addr()
        .as_ptr()
        .wrapping_add(range.start)
        .expose_provenance() as u64;
    let iova = iova.unwrap_or(natural);
    if iova.checked_add(len as u64).is_none() {
        let reason = "the region would end beyond the 64-bit address space";
        return Err(Error::Parameter {
            name: "iova",
            value: iova,
            reason,
        });
    }
    let mr = MrInner::register(&pd.0, mapping, &range, access, iova)?;
    Ok(SharedRegion {
        mr,
        range,
        iova,
        access,
    })
}

pub(crate) fn alloc_local(pd: &ProtectionDomain, len: usize) -> Result<LocalBuffer> {
    let mapping = Mapping::anonymous(len)?;
    let iova = mapping.addr().as_ptr().expose_provenance() as u64;
    let mr = MrInner::register(&pd.0, &mapping, &(0..len), AccessFlags::LOCAL_WRITE, iova)?;
    Ok(LocalBuffer {
        mr: Arc::new(mr),
        start: 0,
        len,
    })
}

/// A registered range of a [`Mapping`] that can be granted to peers and sent from.
///
/// Its bytes may change at any moment, so they are reached only through [`SharedRegion::mapping`]. Put it
/// into an `Arc` to send from it: each posted request holds one.
pub struct SharedRegion {
    mr: MrInner,
    range: Range<usize>,
    iova: u64,
    access: AccessFlags,
}

impl SharedRegion {
    /// The key for this side's own requests.
    pub fn lkey(&self) -> Lkey {
        self.mr.lkey
    }

    /// The key to grant to a peer.
    pub fn rkey(&self) -> Rkey {
        self.mr.rkey
    }

    /// The address of its first byte in requests: the `iova` of the registration.
    pub fn addr(&self) -> u64 {
        self.iova
    }

    /// What a peer needs to reach its first byte.
    pub fn remote(&self) -> Remote {
        Remote {
            addr: self.iova,
            rkey: self.rkey(),
        }
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// True for a region of no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The rights it was registered with.
    pub fn access(&self) -> AccessFlags {
        self.access
    }

    /// The memory below, of which the region is the bytes [`SharedRegion::range`].
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mr.mapping
    }

    /// Which bytes of the mapping it is.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Ends the registration: when this has returned `Ok`, no peer changes or sees its bytes any more,
    /// and later requests with its key are refused. That is the fence of a revoked writer.
    ///
    /// # Errors
    ///
    /// [`Error::Destroy`], with the region, which is still registered and may be tried again.
    ///
    /// # References
    ///
    /// `ibv_dereg_mr(3)`.
    pub fn deregister(mut self) -> Result<(), Failed<SharedRegion>> {
        self.mr
            .deregister()
            .map_err(|error| Failed::new(self, error))
    }

    /// [`SharedRegion::deregister`] for a region that was sent from, once nobody shares it any more.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] while a posted request or another owner holds it, else as
    /// [`SharedRegion::deregister`]; the region comes back in both cases.
    pub fn deregister_shared(self: Arc<Self>) -> Result<(), Failed<Arc<SharedRegion>>> {
        match Arc::try_unwrap(self) {
            Ok(region) => region.deregister().map_err(|failed| Failed {
                value: Arc::new(failed.value),
                error: failed.error,
            }),
            Err(shared) => {
                let holders = Arc::strong_count(&shared).saturating_sub(1);
                Err(Failed::new(shared, Error::InUse { holders }))
            }
        }
    }

    pub(crate) fn pd(&self) -> &Arc<PdInner> {
        &self.mr.pd
    }

    pub(crate) fn mr_ptr(&self) -> *mut ffi::ibv_mr {
        self.mr.mr.as_ptr()
    }

    /// A range of it, which the caller has checked, as a scatter/gather entry.
    pub(crate) fn sge(&self, range: &Range<usize>) -> Result<ffi::ibv_sge> {
        let addr = self.iova + range.start as u64;
        Ok(ffi::ibv_sge {
            addr,
            length: sge_len(range.len())?,
            lkey: self.lkey().0,
        })
    }
}

/// The most bytes one message, and so one entry, may carry.
pub(crate) const MESSAGE_LEN_MAX: usize = 1 << 31;

fn sge_len(len: usize) -> Result<u32> {
    match u32::try_from(len) {
        Ok(len) if len as usize <= MESSAGE_LEN_MAX => Ok(len),
        _ => Err(Error::MessageTooLong {
            len,
            max: MESSAGE_LEN_MAX,
        }),
    }
}

impl fmt::Debug for SharedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedRegion")
            .field("addr", &format_args!("{:#x}", self.iova))
            .field("len", &self.len())
            .field("rkey", &self.rkey())
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

/// Registered memory that is never granted to a peer, and has exactly one owner.
///
/// Posting it moves it into the request; it comes back in [`Done`](crate::Done) with the completion.
pub struct LocalBuffer {
    mr: Arc<MrInner>,
    start: usize,
    len: usize,
}

impl LocalBuffer {
    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a buffer of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the range is inside of the mapping, whose pages live as long as `mr` and were zeroed by
        // the kernel; this is its only owner and it is not posted, so nobody writes it.
        unsafe { std::slice::from_raw_parts(self.addr(), self.len) }
    }

    /// Its bytes, to be filled.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` keeps other slices away.
        unsafe { std::slice::from_raw_parts_mut(self.addr(), self.len) }
    }

    /// Splits off and returns the first `len` bytes; `self` keeps the rest.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] if there are fewer, and then nothing changed.
    pub fn split_to(&mut self, len: usize) -> Result<LocalBuffer> {
        check_range("a buffer", self.len, 0, len)?;
        let front = LocalBuffer {
            mr: Arc::clone(&self.mr),
            start: self.start,
            len,
        };
        self.start += len;
        self.len -= len;
        Ok(front)
    }

    /// Splits into the first `len` bytes and the rest.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] with the whole buffer if there are fewer.
    pub fn split_at(
        mut self,
        len: usize,
    ) -> Result<(LocalBuffer, LocalBuffer), Failed<LocalBuffer>> {
        match self.split_to(len) {
            Ok(front) => Ok((front, self)),
            Err(error) => Err(Failed::new(self, error)),
        }
    }

    /// Joins two buffers of which `self` ends where `next` begins, as they came from a split.
    ///
    /// # Errors
    ///
    /// Both buffers, unchanged, if they are not neighbours in one registration.
    pub fn join(mut self, next: LocalBuffer) -> Result<LocalBuffer, (LocalBuffer, LocalBuffer)> {
        if !Arc::ptr_eq(&self.mr, &next.mr) || self.start + self.len != next.start {
            return Err((self, next));
        }
        self.len += next.len;
        Ok(self)
    }

    fn addr(&self) -> *mut u8 {
        self.mr.mapping.addr().as_ptr().wrapping_add(self.start)
    }

    /// The whole buffer as a scatter/gather entry.
    pub(crate) fn sge(&self) -> Result<ffi::ibv_sge> {
        let addr = self.addr().expose_provenance() as u64;
        Ok(ffi::ibv_sge {
            addr,
            length: sge_len(self.len)?,
            lkey: self.mr.lkey.0,
        })
    }

    /// Its first 8 bytes as the host's number, as an atomic operation leaves the old value in it; `None`
    /// if it is shorter.
    pub fn as_u64(&self) -> Option<u64> {
        let word = self.as_slice().first_chunk()?;
        #[expect(
            clippy::host_endian_bytes,
            reason = "atomic results are in host byte order"
        )]
        Some(u64::from_ne_bytes(*word))
    }

    pub(crate) fn pd(&self) -> &Arc<PdInner> {
        &self.mr.pd
    }
}

impl fmt::Debug for LocalBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalBuffer")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

fn register_error(
    pd: &PdInner,
    mapping: &Mapping,
    len: usize,
    access: AccessFlags,
    source: io::Error,
) -> Error {
    let remedy = match (source.raw_os_error(), mapping.backing()) {
        (Some(libc::ENOMEM), _) => memlock_remedy(),
        (Some(libc::EFAULT | libc::EOPNOTSUPP), Backing::OtherFile(_)) => {
            "; this kernel does not register memory of this file system for writing: use a tmpfs such as \
             /dev/shm, or hugetlbfs"
                .to_owned()
        }
        (Some(libc::EINVAL), _) if lacks_local_write(access) => {
            "; REMOTE_WRITE and REMOTE_ATOMIC need LOCAL_WRITE beside them".to_owned()
        }
        (Some(libc::EINVAL), _) if len == 0 => "; a registration has at least one byte".to_owned(),
        _ => String::new(),
    };
    let device = pd.context.name().to_owned();
    let what = mapping.backing().to_string();
    Error::Register {
        device,
        what,
        len,
        access,
        source,
        remedy,
    }
}

fn lacks_local_write(access: AccessFlags) -> bool {
    access.intersects(AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC)
        && !access.contains(AccessFlags::LOCAL_WRITE)
}

fn memlock_remedy() -> String {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match limit {
        Some(bytes) => format!(
            "; registered memory is locked, and RLIMIT_MEMLOCK allows {bytes} bytes: raise it (ulimit -l, \
             LimitMEMLOCK= of the systemd unit, or CAP_IPC_LOCK)"
        ),
        None => "; RLIMIT_MEMLOCK is unlimited, so the device or the machine is out of memory"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_locked_memory_is_named() {
        let remedy = memlock_remedy();
        assert!(remedy.contains("RLIMIT_MEMLOCK"), "{remedy}");
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        let shown = limit.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
        assert!(remedy.contains(&shown), "{remedy}");
    }

    #[test]
    fn entries_carry_up_to_two_gibibytes() {
        assert_eq!(sge_len(MESSAGE_LEN_MAX).unwrap(), 1 << 31);
        for len in [MESSAGE_LEN_MAX + 1, usize::MAX] {
            assert!(matches!(sge_len(len), Err(Error::MessageTooLong { .. })));
        }
    }
}
