//! Memory that may be granted to peers: mapped here, touched only by copies and atomics.
//!
//! While a peer holds a key to some bytes they may change at any moment, so this crate never forms a
//! Rust reference to them. [`Mapping`] offers bounds-checked copies in and out and atomic words; the
//! software device, which may be the one that writes on the peer's behalf in this very process, uses
//! the same primitives ([`soft_roce::copy`]).
//!
//! A copy is not atomic: it may see half of a write that is under way, in any order of its words.
//! What was written before a `store_u64` with [`Ordering::Release`] is seen after the `load_u64` with
//! [`Ordering::Acquire`] that sees the stored value. For bytes that a *device* writes there is no such
//! promise from a word alone: rely on a polled completion, or on a checksum.
//!
//! # Safety
//!
//! A `Mapping` owns its pages from `mmap` until it is dropped, and every registration and posted request
//! that needs them holds an `Arc` of it. All access goes through `soft_roce::copy` or, for memory that is
//! never granted, through the one `LocalBuffer` that owns the range (see `mr`).
#![allow(
    unsafe_code,
    reason = "maps memory, and touches bytes that peers write"
)]

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use soft_roce::copy;

use crate::error::{Error, Result};

/// `f_type` of hugetlbfs in `statfs(2)`.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// `f_type` of tmpfs in `statfs(2)`.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What stands behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// Pages of this process; gone when it ends.
    Anonymous,
    /// Huge pages of this process, of so many bytes each.
    AnonymousHuge(usize),
    /// A file in a tmpfs such as `/dev/shm`; survives the process, not the machine.
    Shm(PathBuf),
    /// A file in a hugetlbfs with pages of so many bytes; survives the process, not the machine.
    Hugetlbfs(PathBuf, usize),
    /// A file in another file system. Current kernels refuse to register it for writing.
    OtherFile(PathBuf),
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backing::Anonymous => f.write_str("anonymous memory"),
            Backing::AnonymousHuge(page) => write!(f, "huge pages of {} KiB", page / 1024),
            Backing::Shm(path) => write!(f, "shared memory {}", path.display()),
            Backing::Hugetlbfs(path, _) => write!(f, "hugetlbfs file {}", path.display()),
            Backing::OtherFile(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// A range of memory of this process that can be registered and granted.
///
/// Bytes are zero at first, or what the file held. All pages exist from the start where the backing can
/// run out, so that no later access is met by `SIGBUS`; that holds as long as nobody truncates the file.
pub struct Mapping {
    addr: NonNull<u8>,
    len: usize,
    backing: Backing,
}

// SAFETY: the pages belong to the process and not to a thread, and shared access is by atomics and the
// copy primitive only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of anonymous memory.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]: `ENOMEM`, or `EINVAL` for a length of 0.
    pub fn anonymous(len: usize) -> Result<Arc<Mapping>> {
        Mapping::map_anonymous(len, MapFlags::SHARED, Backing::Anonymous)
    }

    /// Maps `len` bytes of anonymous huge pages of the system's default size (usually 2 MiB).
    ///
    /// # Errors
    ///
    /// [`Error::Memory`]: `EINVAL` unless `len` is a positive multiple of the page size, `ENOMEM` if not
    /// enough huge pages are reserved.
    pub fn hugetlb(len: usize) -> Result<Arc<Mapping>> {
        let page = default_huge_page_len();
        let backing = Backing::AnonymousHuge(page);
        if page == 0 || !len.is_multiple_of(page) {
            return Err(memory_error(
                &backing,
                len,
                io::Error::from_raw_os_error(libc::EINVAL),
            ));
        }
        Mapping::map_anonymous(len, MapFlags::SHARED | MapFlags::HUGETLB, backing)
    }

    fn map_anonymous(len: usize, flags: MapFlags, backing: Backing) -> Result<Arc<Mapping>> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let addr = unsafe { mmap_anonymous(ptr::null_mut(), len, prot, flags) };
        Mapping::adopt(addr, len, backing)
    }

    /// Creates the file `path`, which must not exist, and maps its `len` bytes.
    ///
    /// The directory decides the kind: a tmpfs such as `/dev/shm`, a hugetlbfs, or any other file system.
    /// All space is allocated now. The file stays when the mapping goes: remove it by name. If this fails
    /// the file does not exist either.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] names the file system's free space (`ENOSPC`) or the missing huge pages;
    /// [`Error::File`] if the file exists or cannot be created.
    pub fn create_shm(path: &Path, len: usize) -> Result<Arc<Mapping>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| file_error(path, create_reason(&error)))?;
        Mapping::map_file(&file, path, len).inspect_err(|_| {
            // The error already says what is wrong; a file that cannot be removed adds nothing.
            let _ = std::fs::remove_file(path);
        })
    }

    /// Maps the whole of the existing file `path`, made earlier by [`Mapping::create_shm`].
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it does not exist, is not a regular file, or is empty; [`Error::Memory`] as for
    /// creating it.
    pub fn open_shm(path: &Path) -> Result<Arc<Mapping>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| file_error(path, error.to_string()))?;
        let metadata = file
            .metadata()
            .map_err(|error| file_error(path, error.to_string()))?;
        if !metadata.is_file() {
            return Err(file_error(path, "it is not a regular file".to_owned()));
        }
        let len = usize::try_from(metadata.len())
            .map_err(|_| file_error(path, "it is larger than the address space".to_owned()))?;
        if len == 0 {
            return Err(file_error(path, "it is empty; remove it".to_owned()));
        }
        Mapping::map_file(&file, path, len)
    }

    fn map_file(file: &File, path: &Path, len: usize) -> Result<Arc<Mapping>> {
        let backing = file_backing(file, path)?;
        if let Backing::Hugetlbfs(_, page) = backing
            && !len.is_multiple_of(page)
        {
            return Err(memory_error(
                &backing,
                len,
                io::Error::from_raw_os_error(libc::EINVAL),
            ));
        }
        // Without this, a full file system would answer the first touch of a page with SIGBUS.
        fallocate(file, FallocateFlags::empty(), 0, len as u64)
            .map_err(|errno| memory_error(&backing, len, errno.into()))?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let addr = unsafe { mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0) };
        Mapping::adopt(addr, len, backing)
    }

    fn adopt(
        mapped: rustix::io::Result<*mut core::ffi::c_void>,
        len: usize,
        backing: Backing,
    ) -> Result<Arc<Mapping>> {
        let addr = mapped.map_err(|errno| memory_error(&backing, len, errno.into()))?;
        let addr = NonNull::new(addr.cast::<u8>()).ok_or_else(|| {
            memory_error(&backing, len, io::Error::from_raw_os_error(libc::ENOMEM))
        })?;
        let mapping = Mapping { addr, len, backing };
        // A forked child must not hold pages that a device writes. Not every mapping allows the advice;
        // shared pages are never copied on write, so nothing depends on it.
        // SAFETY: the range was mapped above and the advice changes nothing in this process.
        let _ = unsafe { madvise(addr.as_ptr().cast(), len, Advice::LinuxDontFork) };
        Ok(Arc::new(mapping))
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// False: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What stands behind it.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Where it lies in this process.
    pub(crate) fn addr(&self) -> NonNull<u8> {
        self.addr
    }

    /// Copies `bytes` to `byte_offset`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], and then nothing was copied.
    pub fn write_at(&self, byte_offset: usize, bytes: &[u8]) -> Result<()> {
        let target = self.checked(byte_offset, bytes.len())?;
        // SAFETY: `checked` keeps the range inside the mapping, which is writable while `self` lives;
        // no reference to its bytes exists (module docs), so `bytes` cannot overlap it.
        unsafe { copy::write_shared(target, bytes) };
        Ok(())
    }

    /// Copies the bytes at `byte_offset` to `out`.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], and then nothing was copied.
    pub fn read_at(&self, byte_offset: usize, out: &mut [u8]) -> Result<()> {
        let source = self.checked(byte_offset, out.len())?;
        // SAFETY: as in `write_at`.
        unsafe { copy::read_shared(out, source) };
        Ok(())
    }

    /// Sets `range` to zero.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], and then nothing was changed.
    pub fn zero(&self, range: Range<usize>) -> Result<()> {
        let len = range.end.saturating_sub(range.start);
        let target = self.checked(range.start, len)?;
        // SAFETY: as in `write_at`.
        unsafe { copy::zero_shared(target, len) };
        Ok(())
    }

    /// Reads the 8 bytes at `byte_offset` as one word in host byte order.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], or [`Error::Misaligned`] unless `byte_offset` is a multiple of 8.
    ///
    /// # Panics
    ///
    /// If `order` is `Release` or `AcqRel`, as loads of the standard library do.
    pub fn load_u64(&self, byte_offset: usize, order: Ordering) -> Result<u64> {
        let source = self.checked_word(byte_offset)?;
        // SAFETY: as in `write_at`, and aligned.
        Ok(unsafe { copy::load_u64(source, order) })
    }

    /// Writes the 8 bytes at `byte_offset` as one word in host byte order.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`], or [`Error::Misaligned`] unless `byte_offset` is a multiple of 8.
    ///
    /// # Panics
    ///
    /// If `order` is `Acquire` or `AcqRel`, as stores of the standard library do.
    pub fn store_u64(&self, byte_offset: usize, value: u64, order: Ordering) -> Result<()> {
        let target = self.checked_word(byte_offset)?;
        // SAFETY: as in `write_at`, and aligned.
        unsafe { copy::store_u64(target, value, order) };
        Ok(())
    }

    fn checked_word(&self, byte_offset: usize) -> Result<*mut u8> {
        let word = self.checked(byte_offset, 8)?;
        if !byte_offset.is_multiple_of(8) {
            return Err(Error::Misaligned { byte_offset });
        }
        Ok(word)
    }

    fn checked(&self, byte_offset: usize, len: usize) -> Result<*mut u8> {
        check_range("a mapping", self.len, byte_offset, len)?;
        Ok(self.addr.as_ptr().wrapping_add(byte_offset))
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("len", &self.len)
            .field("backing", &self.backing)
            .finish_non_exhaustive()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by this object with this length, and everything that used it is gone: posted
        // requests and registrations hold an `Arc`.
        let unmapped = unsafe { munmap(self.addr.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping fails");
    }
}

/// Refuses a range that does not lie inside of `available` bytes; sums cannot overflow.
pub(crate) fn check_range(
    what: &'static str,
    available: usize,
    byte_offset: usize,
    len: usize,
) -> Result<()> {
    if len <= available && byte_offset <= available - len {
        return Ok(());
    }
    Err(Error::OutOfBounds {
        what,
        byte_offset,
        len,
        available,
    })
}

fn file_backing(file: &File, path: &Path) -> Result<Backing> {
    let statfs = fstatfs(file).map_err(|errno| file_error(path, errno.to_string()))?;
    let path = path.to_owned();
    Ok(match statfs.f_type {
        TMPFS_MAGIC => Backing::Shm(path),
        HUGETLBFS_MAGIC => {
            let page = usize::try_from(statfs.f_bsize).unwrap_or(0).max(1);
            Backing::Hugetlbfs(path, page)
        }
        _ => Backing::OtherFile(path),
    })
}

fn file_error(path: &Path, reason: String) -> Error {
    Error::File {
        path: path.to_owned(),
        reason,
    }
}

fn create_reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AlreadyExists => {
            "it exists already; open it, or remove it if nothing uses it".to_owned()
        }
        _ => error.to_string(),
    }
}

fn memory_error(backing: &Backing, len: usize, source: io::Error) -> Error {
    let remedy = match (backing, source.raw_os_error()) {
        (Backing::Shm(path) | Backing::OtherFile(path), Some(libc::ENOSPC)) => space_remedy(path),
        (Backing::AnonymousHuge(page) | Backing::Hugetlbfs(_, page), Some(libc::EINVAL)) => {
            format!("; the length must be a positive multiple of the huge page size, {page} bytes")
        }
        (
            Backing::AnonymousHuge(page) | Backing::Hugetlbfs(_, page),
            Some(libc::ENOMEM | libc::ENOSPC),
        ) => format!(
            "; reserve {} huge pages more: raise /proc/sys/vm/nr_hugepages, or use ordinary pages",
            len.div_ceil((*page).max(1))
        ),
        (_, Some(libc::EINVAL)) if len == 0 => "; a mapping has at least one byte".to_owned(),
        (Backing::OtherFile(_), Some(libc::EOPNOTSUPP)) => {
            "; the file system cannot preallocate: use a tmpfs such as /dev/shm".to_owned()
        }
        _ => String::new(),
    };
    Error::Memory {
        what: backing.to_string(),
        len,
        source,
        remedy,
    }
}

fn space_remedy(path: &Path) -> String {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let free = rustix::fs::statvfs(dir).map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    let dir = dir.display();
    match free {
        Ok(free) => format!(
            "; {dir} has {free} bytes free: remove files there, use smaller images, or enlarge it \
             (mount -o remount,size=... {dir})"
        ),
        Err(_) => format!("; {dir} is full"),
    }
}

/// The default huge page size in bytes, or 0 where there is none.
fn default_huge_page_len() -> usize {
    std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|meminfo| {
            let line = meminfo
                .lines()
                .find(|line| line.starts_with("Hugepagesize:"))?;
            line.split_whitespace().nth(1)?.parse::<usize>().ok()
        })
        .map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_in_and_out_and_words() {
        let mapping = Mapping::anonymous(8192).unwrap();
        mapping.write_at(4090, b"across a page").unwrap();
        let mut out = [0xa5; 15];
        mapping.read_at(4089, &mut out).unwrap();
        assert_eq!(&out, b"\0across a page\0");
        mapping
            .store_u64(8, 0x0102_0304_0506_0708, Ordering::Release)
            .unwrap();
        assert_eq!(
            mapping.load_u64(8, Ordering::Acquire).unwrap(),
            0x0102_0304_0506_0708
        );
        mapping.zero(0..8192).unwrap();
        mapping.read_at(4089, &mut out).unwrap();
        assert_eq!(out, [0; 15]);
    }

    #[test]
    fn bounds_hold_at_both_ends_and_against_overflow() {
        let mapping = Mapping::anonymous(100).unwrap();
        assert!(mapping.write_at(100, &[]).is_ok());
        assert!(mapping.write_at(99, &[1]).is_ok());
        for (byte_offset, len) in [(100, 1), (101, 0), (99, 2), (usize::MAX, 2), (0, 101)] {
            let refused = mapping.write_at(byte_offset, &vec![0; len]);
            assert!(matches!(
                refused,
                Err(Error::OutOfBounds { available: 100, .. })
            ));
        }
        assert!(mapping.zero(50..101).is_err());
        assert!(matches!(
            mapping.load_u64(4, Ordering::Relaxed),
            Err(Error::Misaligned { .. })
        ));
        assert!(mapping.load_u64(96, Ordering::Relaxed).is_err());
        assert!(mapping.load_u64(usize::MAX - 7, Ordering::Relaxed).is_err());
    }

    #[test]
    fn shm_survives_its_mapping_and_is_never_overwritten() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("image");
        let mapping = Mapping::create_shm(&path, 10_000).unwrap();
        assert_eq!(mapping.backing(), &Backing::Shm(path.clone()));
        mapping.write_at(9_990, b"the tail!!").unwrap();
        drop(mapping);
        let again = Mapping::open_shm(&path).unwrap();
        assert_eq!(again.len(), 10_000);
        let mut out = [0; 10];
        again.read_at(9_990, &mut out).unwrap();
        assert_eq!(&out, b"the tail!!");
        let refused = Mapping::create_shm(&path, 10_000).unwrap_err();
        assert!(refused.to_string().contains("exists already"), "{refused}");
    }

    /// A tmpfs that is too full once answered the first touch with SIGBUS, long after the mapping.
    #[test]
    fn a_full_tmpfs_is_an_error_and_leaves_no_file() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("image");
        let total = rustix::fs::statvfs(dir.path()).unwrap();
        let total = usize::try_from(total.f_blocks * total.f_frsize).unwrap();
        if total == 0 {
            eprintln!("skipped: /dev/shm has no size limit here");
            return;
        }
        let refused = Mapping::create_shm(&path, total + (1 << 30)).unwrap_err();
        assert!(refused.to_string().contains("bytes free"), "{refused}");
        assert!(!path.exists());
    }

    #[test]
    fn what_cannot_be_memory_is_refused() {
        assert!(Mapping::anonymous(0).is_err());
        assert!(Mapping::hugetlb(4097).is_err());
        let missing = Mapping::open_shm(Path::new("/dev/shm/no/such/image")).unwrap_err();
        assert!(
            missing.to_string().contains("/dev/shm/no/such/image"),
            "{missing}"
        );
        let not_file = Mapping::open_shm(Path::new("/dev/null")).unwrap_err();
        assert!(
            not_file.to_string().contains("not a regular file"),
            "{not_file}"
        );
    }
}
