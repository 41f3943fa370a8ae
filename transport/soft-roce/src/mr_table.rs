//! The protection table: key to region or memory window, with rights and bounds.
//!
//! One table per device, shared by all its queue pairs. A [`Slice`] borrows the table, so none can
//! outlive a [`MrTable::deregister`], which needs the table exclusively: once it has returned, no
//! byte of the region is touched and its key is refused. That is the fence a log relies on, and
//! revoking a memory window ([`MrTable::invalidate`]) is the same fence.
//!
//! Regions and windows share one key space. A window is looked up only where no region has the key,
//! so that regions, which every packet needs, do not pay for windows.
//!
//! A key is a 24-bit index and an 8-bit tag. The index starts at random and only counts up, and the
//! tag changes whenever the index wraps, so a key recurs after 2^32 registrations and not before. Only
//! the tags of windows are their owner's to choose.
//!
//! # Safety
//!
//! Whoever registers promises that the memory stays mapped until `deregister` has returned. Its
//! bytes are touched through [`copy`] only; no reference to them is ever formed.
#![allow(unsafe_code, reason = "reads and writes registered memory by address")]

mod window;

use std::marker::PhantomData;

use bitflags::bitflags;
use thiserror::Error;

use crate::copy;
use crate::faults::{Fault, is_injected};

use window::Window;
pub use window::{Bind, BindError, InvalidateError, WindowType};

/// Largest number of regions and windows one table holds.
pub const MAX_REGIONS: usize = 1 << 20;

const INDEX_MASK: u32 = 0x00ff_ffff;
const MIN_SLOTS: usize = 64;

/// A protection domain's number; regions and queue pairs of different domains never meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pd(pub u32);

/// A local or remote key: index in the upper 24 bits, tag in the lower 8.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub u32);

impl Key {
    /// What stays of a window's key when it is bound anew: all but the tag.
    #[must_use]
    pub fn index(self) -> u32 {
        self.0 >> 8
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({:#010x})", self.0)
    }
}

bitflags! {
    /// Rights on a region or a queue pair, numbered as `ibv_access_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct AccessFlags: u32 {
        /// The local device may write (receives, READ and atomic results).
        const LOCAL_WRITE = 1;
        /// Peers may WRITE.
        const REMOTE_WRITE = 2;
        /// Peers may READ.
        const REMOTE_READ = 4;
        /// Peers may execute atomics.
        const REMOTE_ATOMIC = 8;
        /// Memory windows may be bound to the region. Means nothing on a queue pair.
        const MW_BIND = 16;
    }
}

/// A stretch of memory to register.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// The protection domain it belongs to.
    pub pd: Pd,
    /// Address of its first byte in this process.
    pub base: *mut u8,
    /// The address by which work requests and peers name its first byte.
    pub iova: u64,
    /// Its length in bytes.
    pub len: u64,
    /// What it may be used for, besides local reading, which is always allowed.
    pub access: AccessFlags,
}

/// Why a region was not registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RegisterError {
    /// A right to remote modification without `LOCAL_WRITE`.
    #[error("REMOTE_WRITE and REMOTE_ATOMIC need LOCAL_WRITE: add it to the access flags")]
    AccessFlags,
    /// The range wraps around the end of the address space.
    #[error("the region of {len} bytes does not fit the address space above its address")]
    Range {
        /// The length asked for.
        len: u64,
    },
    /// [`MAX_REGIONS`] exist, windows included.
    #[error("{MAX_REGIONS} memory regions and windows exist: deregister some first")]
    TableFull,
}

/// Why a region was not deregistered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DeregisterError {
    /// No region has this key now.
    #[error("no region has key {0:?}: it was never registered, or deregistered")]
    UnknownKey(Key),
    /// Memory windows are bound to it.
    #[error("{count} memory windows are bound to the region: invalidate or free them first")]
    WindowsBound {
        /// How many.
        count: u32,
    },
}

/// Why a region was not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ReregisterError {
    /// It cannot be given up as it is.
    #[error(transparent)]
    Old(#[from] DeregisterError),
    /// It cannot be registered as asked for.
    #[error(transparent)]
    New(#[from] RegisterError),
}

/// Why an access was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum AccessError {
    /// No region or window has this key now.
    #[error("nothing has key {0:?}: it was never registered, or deregistered or invalidated")]
    UnknownKey(Key),
    /// The region belongs to another protection domain.
    #[error("the region of key {0:?} belongs to another protection domain")]
    ForeignPd(Key),
    /// The window was bound on another queue pair.
    #[error("the window of key {0:?} was bound on another queue pair")]
    ForeignQp(Key),
    /// The region lacks a right.
    #[error("the region of key {key:?} lacks {missing:?}")]
    Denied {
        /// The key used.
        key: Key,
        /// The rights that were needed and are not there.
        missing: AccessFlags,
    },
    /// The range is not inside the region.
    #[error("{len} bytes at {iova:#x} are outside the region of key {key:?}")]
    OutOfBounds {
        /// The key used.
        key: Key,
        /// First address asked for.
        iova: u64,
        /// Bytes asked for.
        len: u64,
    },
}

/// Registered regions and memory windows by key; see the [module](self).
#[derive(Debug)]
pub struct MrTable {
    /// Power-of-two sized; the slot of a key is its index modulo the size.
    slots: Vec<Slot>,
    /// Slots taken.
    count: usize,
    /// Indices of the windows.
    windows: Vec<u32>,
    next_index: u32,
    tag_salt: u8,
}

/// A place of the table.
#[derive(Debug)]
enum Slot {
    Free,
    Region(Key, Registered),
    /// The key is that of the last bind.
    Window(Key, Box<Window>),
}

/// A region, and how many windows are bound to it.
#[derive(Debug)]
struct Registered {
    region: Region,
    window_count: u32,
}

// SAFETY: the pointers in a `Region` are addresses of shared memory, valid in every thread until
// deregistration, and are only dereferenced by `copy`, which tolerates concurrent access.
unsafe impl Send for MrTable {}
// SAFETY: as for `Send`; the table itself changes through `&mut self` only.
unsafe impl Sync for MrTable {}

impl MrTable {
    /// Creates an empty table whose first key derives from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let bytes = seed.to_le_bytes();
        MrTable {
            slots: free_slots(MIN_SLOTS),
            count: 0,
            windows: Vec::new(),
            next_index: u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]),
            tag_salt: bytes[3],
        }
    }

    /// Registers `region` and returns its key, which serves as `lkey` and `rkey`.
    ///
    /// # Errors
    ///
    /// See [`RegisterError`].
    ///
    /// # Safety
    ///
    /// `region.len` bytes at `region.base` stay mapped, readable and (with `LOCAL_WRITE`) writable,
    /// and are used as [`copy`] demands of shared memory, until
    /// [`deregister`](Self::deregister) has returned or the table is dropped.
    pub unsafe fn register(&mut self, region: Region) -> Result<Key, RegisterError> {
        region.validate()?;
        let registered = Registered {
            region,
            window_count: 0,
        };
        self.insert(|key| Slot::Region(key, registered))
            .ok_or(RegisterError::TableFull)
    }

    /// What the region of `key` is now.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&Region> {
        self.region(key).map(|registered| &registered.region)
    }

    /// Makes the region of `key` another one under the same key, and returns what it was: from now on no
    /// byte of that is touched.
    ///
    /// # Errors
    ///
    /// See [`ReregisterError`]; the region stays as it is.
    ///
    /// # Safety
    ///
    /// As [`register`](Self::register).
    pub unsafe fn reregister(
        &mut self,
        key: Key,
        region: Region,
    ) -> Result<Region, ReregisterError> {
        self.check_unbound(key)?;
        region.validate()?;
        let registered = self
            .region_mut(key)
            .ok_or(DeregisterError::UnknownKey(key))?;
        Ok(std::mem::replace(&mut registered.region, region))
    }

    /// Forgets the region of `key` and returns it; from now on the key is refused.
    ///
    /// # Errors
    ///
    /// See [`DeregisterError`]; the region stays as it is.
    pub fn deregister(&mut self, key: Key) -> Result<Region, DeregisterError> {
        let region = *self.check_unbound(key)?;
        if !is_injected(Fault::IgnoreRevocation) {
            self.remove(key);
        }
        Ok(region)
    }

    /// Number of regions and windows that exist now.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is no region and no window.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Checks that the region of `key` grants `access` on `len` bytes at `iova` within `pd`, and yields
    /// them. Windows are for peers only: see [`check_remote`](Self::check_remote).
    ///
    /// # Errors
    ///
    /// See [`AccessError`]; the checks run in the order of its variants.
    pub fn check(
        &self,
        key: Key,
        pd: Pd,
        iova: u64,
        len: u64,
        access: AccessFlags,
    ) -> Result<Slice<'_>, AccessError> {
        match self.region(key) {
            Some(registered) => registered.region.check(key, pd, iova, len, access),
            None => Err(AccessError::UnknownKey(key)),
        }
    }

    /// The region of `key`, unless windows are bound to it.
    fn check_unbound(&self, key: Key) -> Result<&Region, DeregisterError> {
        match self.region(key) {
            None => Err(DeregisterError::UnknownKey(key)),
            Some(registered) if registered.window_count > 0 => {
                let count = registered.window_count;
                Err(DeregisterError::WindowsBound { count })
            }
            Some(registered) => Ok(&registered.region),
        }
    }

    #[inline]
    fn region(&self, key: Key) -> Option<&Registered> {
        match &self.slots[self.slot(key)] {
            Slot::Region(held, registered) if *held == key => Some(registered),
            _ => None,
        }
    }

    fn region_mut(&mut self, key: Key) -> Option<&mut Registered> {
        let slot = self.slot(key);
        match &mut self.slots[slot] {
            Slot::Region(held, registered) if *held == key => Some(registered),
            _ => None,
        }
    }

    /// Gives what `make` builds a new key, or returns `None` if the table is full.
    fn insert(&mut self, make: impl FnOnce(Key) -> Slot) -> Option<Key> {
        if self.count == MAX_REGIONS {
            return None;
        }
        if self.count * 2 >= self.slots.len() {
            self.grow();
        }
        let key = self.free_key();
        let slot = self.slot(key);
        self.slots[slot] = make(key);
        self.count += 1;
        Some(key)
    }

    /// Frees the slot of `key`, which is taken.
    fn remove(&mut self, key: Key) {
        let slot = self.slot(key);
        self.slots[slot] = Slot::Free;
        self.count -= 1;
    }

    fn slot(&self, key: Key) -> usize {
        (key.0 >> 8) as usize & (self.slots.len() - 1)
    }

    /// The next key whose slot is free; at most half the slots are taken, so one is near.
    fn free_key(&mut self) -> Key {
        loop {
            let key = self.next_key();
            if matches!(self.slots[self.slot(key)], Slot::Free) {
                return key;
            }
        }
    }

    /// Index 0 is left out, so that no key is ever 0.
    fn next_key(&mut self) -> Key {
        let index = self.next_index;
        self.next_index = (index + 1) & INDEX_MASK;
        if index == 0 {
            self.tag_salt = self.tag_salt.wrapping_add(1);
            return self.next_key();
        }
        let mixed = index.wrapping_mul(0x9e37_79b1).to_le_bytes()[3];
        Key(index << 8 | u32::from(mixed.wrapping_add(self.tag_salt)))
    }

    /// Doubles the slots. Indices that differ modulo n differ modulo 2n, so nothing collides.
    fn grow(&mut self) {
        let doubled = free_slots(self.slots.len() * 2);
        for entry in std::mem::replace(&mut self.slots, doubled) {
            let (Slot::Region(key, _) | Slot::Window(key, _)) = entry else {
                continue;
            };
            let slot = self.slot(key);
            self.slots[slot] = entry;
        }
    }
}

fn free_slots(count: usize) -> Vec<Slot> {
    std::iter::repeat_with(|| Slot::Free).take(count).collect()
}

impl Region {
    /// The checks of [`MrTable::register`] that concern the region alone.
    fn validate(&self) -> Result<(), RegisterError> {
        let remote_change = AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC;
        if self.access.intersects(remote_change) && !self.access.contains(AccessFlags::LOCAL_WRITE)
        {
            return Err(RegisterError::AccessFlags);
        }
        let fits = usize::try_from(self.len)
            .ok()
            .and_then(|len| self.base.addr().checked_add(len))
            .and(self.iova.checked_add(self.len));
        if fits.is_none() {
            return Err(RegisterError::Range { len: self.len });
        }
        Ok(())
    }

    /// The checks of [`MrTable::check`], once `key` has led here.
    #[inline]
    fn check(
        &self,
        key: Key,
        pd: Pd,
        iova: u64,
        len: u64,
        access: AccessFlags,
    ) -> Result<Slice<'_>, AccessError> {
        if self.pd != pd {
            return Err(AccessError::ForeignPd(key));
        }
        if !self.access.contains(access) {
            let missing = access.difference(self.access);
            return Err(AccessError::Denied { key, missing });
        }
        let start = self
            .byte_at(iova, len)
            .ok_or(AccessError::OutOfBounds { key, iova, len })?;
        Ok(Slice {
            start,
            // At most `self.len`, which fitted when the region was registered.
            len: usize::try_from(len).unwrap_or(0),
            is_writable: self.access.contains(AccessFlags::LOCAL_WRITE),
            table: PhantomData,
        })
    }

    /// Where the byte at `iova` is in this process, if `len` bytes from there are in the region.
    #[inline]
    fn byte_at(&self, iova: u64, len: u64) -> Option<*mut u8> {
        let byte_offset = iova.checked_sub(self.iova)?;
        let end = self.len + u64::from(is_injected(Fault::OneByteBeyond));
        if len > end || byte_offset > end - len {
            return None;
        }
        Some(self.base.wrapping_add(usize::try_from(byte_offset).ok()?))
    }
}

/// Checked bytes of a region, usable while the table is borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    start: *mut u8,
    len: usize,
    is_writable: bool,
    table: PhantomData<&'a MrTable>,
}

impl Slice<'_> {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether an atomic may operate on it: 8 bytes, 8-byte aligned in this process.
    #[must_use]
    pub fn is_word(&self) -> bool {
        self.len == 8 && self.start.addr().is_multiple_of(8)
    }

    /// Copies the bytes out to `dst`, which must be exactly as long.
    pub fn copy_to(&self, dst: &mut [u8]) {
        assert_eq!(dst.len(), self.len, "a checked slice is copied whole");
        // SAFETY: `check` found `len` bytes inside a region whose registrant keeps them mapped.
        unsafe { copy::read_shared(dst, self.start) }
    }

    /// Overwrites the bytes with `src`, which must be exactly as long.
    ///
    /// The slice must have been checked for a right that implies `LOCAL_WRITE`: only then did its
    /// registrant promise writable memory.
    pub fn copy_from(&self, src: &[u8]) {
        assert_eq!(src.len(), self.len, "a checked slice is copied whole");
        assert!(self.is_writable, "the access checked for includes writing");
        // SAFETY: as in `copy_to`; `src` is private to the device and overlaps no region.
        unsafe { copy::write_shared(self.start, src) }
    }

    /// Adds to the word, wrapping, and returns its old value. The slice must be a word.
    #[must_use]
    pub fn fetch_add(&self, add: u64) -> u64 {
        assert!(
            self.is_word() && self.is_writable,
            "atomics work on aligned, writable words"
        );
        // SAFETY: mapped as in `copy_to`, aligned as asserted.
        unsafe { copy::fetch_add_u64(self.start, add) }
    }

    /// Replaces the word by `swap` if it equals `compare`; returns its old value. Must be a word.
    #[must_use]
    pub fn compare_swap(&self, compare: u64, swap: u64) -> u64 {
        assert!(
            self.is_word() && self.is_writable,
            "atomics work on aligned, writable words"
        );
        // SAFETY: mapped as in `copy_to`, aligned as asserted.
        unsafe { copy::compare_swap_u64(self.start, compare, swap) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PD: Pd = Pd(1);
    const LOCAL: AccessFlags = AccessFlags::LOCAL_WRITE;

    fn region(memory: &mut [u64], iova: u64, access: AccessFlags) -> Region {
        let len = size_of_val(memory) as u64;
        Region {
            pd: PD,
            base: memory.as_mut_ptr().cast(),
            iova,
            len,
            access,
        }
    }

    fn register(table: &mut MrTable, region: Region) -> Key {
        // SAFETY: the tests keep their memory until the table is gone, and touch it through it only.
        unsafe { table.register(region) }.unwrap()
    }

    #[test]
    fn bounds_are_exact_and_do_not_overflow() {
        let mut memory = [0u64; 8];
        for iova in [0, 0x1000, u64::MAX - 64] {
            let mut table = MrTable::new(1);
            let key = register(&mut table, region(&mut memory, iova, LOCAL));
            let is_ok = |at, len| table.check(key, PD, at, len, LOCAL).is_ok();
            assert!(is_ok(iova, 64) && is_ok(iova + 63, 1) && is_ok(iova + 64, 0));
            assert!(!is_ok(iova, 65) && !is_ok(iova + 64, 1) && !is_ok(iova + 1, 64));
            assert!(!is_ok(iova.wrapping_sub(1), 1) && !is_ok(iova.wrapping_add(65), 0));
            assert!(!is_ok(iova + 8, u64::MAX) && !is_ok(iova + 8, u64::MAX - 7));
        }
    }

    #[test]
    fn each_check_has_its_error() {
        let mut memory = [0u64; 8];
        let mut table = MrTable::new(2);
        let key = register(&mut table, region(&mut memory, 0, LOCAL));
        let other = Key(key.0 ^ 1);
        let check = |key, pd, access| table.check(key, pd, 0, 8, access).map(|_| ());
        assert_eq!(check(other, PD, LOCAL), Err(AccessError::UnknownKey(other)));
        assert_eq!(check(key, Pd(2), LOCAL), Err(AccessError::ForeignPd(key)));
        let missing = AccessFlags::REMOTE_READ;
        assert_eq!(
            check(key, PD, missing),
            Err(AccessError::Denied { key, missing })
        );
        assert_eq!(check(key, PD, AccessFlags::empty()), Ok(()));
    }

    #[test]
    fn registration_is_checked() {
        let mut memory = [0u64; 8];
        let mut table = MrTable::new(3);
        for access in [AccessFlags::REMOTE_WRITE, AccessFlags::REMOTE_ATOMIC] {
            // SAFETY: refused before anything is touched.
            let refused = unsafe { table.register(region(&mut memory, 0, access)) };
            assert_eq!(refused, Err(RegisterError::AccessFlags));
        }
        let wrapping = Region {
            iova: u64::MAX - 62,
            ..region(&mut memory, 0, LOCAL)
        };
        // SAFETY: as above.
        let refused = unsafe { table.register(wrapping) };
        assert_eq!(refused, Err(RegisterError::Range { len: 64 }));
        assert!(table.is_empty());
    }

    #[test]
    fn a_key_never_returns_while_the_table_grows_and_shrinks() {
        let mut memory = [0u64; 8];
        let mut seen = std::collections::HashSet::new();
        // The index starts shortly before its wrap.
        let mut table = MrTable::new(0x00ff_fff0);
        let mut live = std::collections::VecDeque::new();
        for round in 0..5000u64 {
            let key = register(&mut table, region(&mut memory, round * 64, LOCAL));
            assert!(
                key.0 >> 8 != 0 && seen.insert(key.0),
                "{key:?} in round {round}"
            );
            live.push_back((key, round));
            if live.len() > 300 {
                let (stale, _) = live.pop_front().unwrap();
                table.deregister(stale).unwrap();
                assert_eq!(
                    table.deregister(stale).unwrap_err(),
                    DeregisterError::UnknownKey(stale)
                );
            }
        }
        assert_eq!(table.len(), live.len());
        for (key, round) in live {
            assert!(table.check(key, PD, round * 64, 64, LOCAL).is_ok());
            assert!(table.check(key, PD, round * 64 + 1, 64, LOCAL).is_err());
        }
    }

    #[test]
    fn slices_copy_and_calculate() {
        let mut memory = [0u64; 8];
        let mut table = MrTable::new(4);
        let key = register(&mut table, region(&mut memory, 0x100, AccessFlags::all()));
        let slice = |at, len| table.check(key, PD, at, len, LOCAL).unwrap();
        slice(0x103, 5).copy_from(b"hello");
        let mut bytes = [1; 7];
        slice(0x102, 7).copy_to(&mut bytes);
        assert_eq!(bytes, [0, b'h', b'e', b'l', b'l', b'o', 0]);
        assert_eq!(slice(0x110, 8).fetch_add(5), 0);
        assert_eq!(slice(0x110, 8).compare_swap(5, 9), 5);
        assert_eq!(slice(0x110, 8).fetch_add(0), 9);
        assert!(slice(0x118, 8).is_word() && !slice(0x114, 8).is_word());
    }
}
