//! Memory windows: keys to parts of a region, given and revoked without registering anything.
//!
//! ```text
//!            bind                      type 1: bound again, or unbound by a bind of no bytes
//!   free ------------> bound           type 2: bound only when free, revoked by invalidation
//!        <------------
//!      unbind, invalidate
//! ```
//!
//! A bound window holds a [`Region`] of its own: the part of the region below with the window's rights.
//! So an access through it is checked exactly as one to a region, the queue pair besides. It does not
//! look at the region below again, which cannot go away: see [`DeregisterError::WindowsBound`].
//!
//! [`DeregisterError::WindowsBound`]: super::DeregisterError::WindowsBound

use thiserror::Error;

use super::{AccessError, AccessFlags, Key, MrTable, Pd, Region, RegisterError, Slice, Slot};
use crate::faults::{Fault, is_injected};
use crate::wire::Qpn;

/// How a window is bound and revoked, numbered as `ibv_mw_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WindowType {
    /// Serves every queue pair of its domain.
    Type1 = 1,
    /// Type 2B: serves the queue pair that it was bound on.
    Type2 = 2,
}

/// A request to bind a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind {
    /// The window's new key: the index says which window, the tag is chosen freely.
    pub rkey: Key,
    /// The region below.
    pub region: Key,
    /// Its first byte, in the region's own (iova) space.
    pub addr: u64,
    /// Its length in bytes; 0 unbinds a window of type 1.
    pub len: u64,
    /// What peers may do.
    pub access: AccessFlags,
    /// Whether peers name its first byte 0 instead of `addr`. Type 2 only.
    pub is_zero_based: bool,
}

/// Why a window was not bound; it stays as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BindError {
    /// No window has this index now.
    #[error("no window has the index of key {0:?}: it was never allocated, or freed")]
    UnknownWindow(Key),
    /// Window, region and queue pair are not of one protection domain (C10-72).
    #[error("the window, its region and the queue pair belong to different protection domains")]
    ForeignPd,
    /// A window of type 2 is bound already (o10-37.2.30).
    #[error("the window is bound: invalidate it first")]
    Bound,
    /// A window of type 2 is not revoked by binding no bytes (o10-37.2.40).
    #[error("a window of type 2 has at least one byte")]
    Empty,
    /// A window of type 1 cannot start at address 0 (o10-36.2.2).
    #[error("a window of type 1 cannot be zero based")]
    ZeroBased,
    /// No region has this key now.
    #[error("no region has key {0:?}: it was never registered, or deregistered")]
    UnknownRegion(Key),
    /// The region lacks a right: to be bound to (C10-73), or to be written (C10-74).
    #[error("the region lacks {missing:?}")]
    Denied {
        /// The rights that were needed and are not there.
        missing: AccessFlags,
    },
    /// The window would not lie inside the region (C10-75).
    #[error("{len} bytes at {addr:#x} are outside the region")]
    OutOfBounds {
        /// First address asked for.
        addr: u64,
        /// Bytes asked for.
        len: u64,
    },
}

/// Why a key was not invalidated; it holds as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InvalidateError {
    /// No window is bound under this key now.
    #[error("no bound window has key {0:?}")]
    UnknownKey(Key),
    /// The window belongs to another protection domain.
    #[error("the window of key {0:?} belongs to another protection domain")]
    ForeignPd(Key),
    /// The window was bound on another queue pair.
    #[error("the window of key {0:?} was bound on another queue pair")]
    ForeignQp(Key),
    /// Regions and windows of type 1 are revoked by other means (o10-37.2.26).
    #[error("what has key {0:?} cannot be invalidated: it is no window of type 2")]
    WrongType(Key),
}

/// A window in the table.
#[derive(Debug)]
pub(super) struct Window {
    pd: Pd,
    window_type: WindowType,
    binding: Option<Binding>,
}

/// What a window is bound to.
#[derive(Debug, Clone, Copy)]
struct Binding {
    /// The region below.
    region: Key,
    /// The part of it that the window opens.
    view: Region,
    /// The only queue pair it serves, for type 2.
    qpn: Option<Qpn>,
}

impl MrTable {
    /// Allocates a window and returns its first key, which opens nothing yet.
    ///
    /// # Errors
    ///
    /// [`RegisterError::TableFull`].
    pub fn alloc_window(&mut self, pd: Pd, window_type: WindowType) -> Result<Key, RegisterError> {
        let window = Box::new(Window {
            pd,
            window_type,
            binding: None,
        });
        let key = self
            .insert(|key| Slot::Window(key, window))
            .ok_or(RegisterError::TableFull)?;
        self.windows.push(key.index());
        Ok(key)
    }

    /// Frees the window that has the index of `key`, bound or not; from now on its key is refused.
    ///
    /// # Errors
    ///
    /// [`BindError::UnknownWindow`] if there is none.
    pub fn free_window(&mut self, key: Key) -> Result<(), BindError> {
        self.window_mut(key).ok_or(BindError::UnknownWindow(key))?;
        self.unbind(key);
        self.remove(key);
        self.windows.retain(|index| *index != key.index());
        Ok(())
    }

    /// Binds a window through queue pair `qpn` of domain `pd`, or unbinds one of type 1.
    ///
    /// # Errors
    ///
    /// See [`BindError`]; the checks run in the order of its variants.
    pub fn bind_window(&mut self, bind: &Bind, pd: Pd, qpn: Qpn) -> Result<(), BindError> {
        let window_type = self.check_window(bind, pd)?;
        let view = match bind.len {
            0 => None,
            _ => Some(self.view(bind, pd)?),
        };
        self.unbind(bind.rkey);
        if let Some(below) = self.region_mut(bind.region).filter(|_| view.is_some()) {
            below.window_count += 1;
        }
        if let Some((key, window)) = self.window_mut(bind.rkey) {
            *key = bind.rkey;
            window.binding = view.map(|view| Binding {
                region: bind.region,
                view,
                qpn: (window_type == WindowType::Type2).then_some(qpn),
            });
        }
        Ok(())
    }

    /// Revokes the window of `key`, which was bound through queue pair `qpn` of domain `pd`.
    ///
    /// Once this has returned, no byte is touched through it and its key is refused.
    ///
    /// # Errors
    ///
    /// See [`InvalidateError`]; the checks run in the order of its variants.
    pub fn invalidate(&mut self, key: Key, pd: Pd, qpn: Qpn) -> Result<(), InvalidateError> {
        if self.region(key).is_some() {
            return Err(InvalidateError::WrongType(key));
        }
        let window = self.window(key).ok_or(InvalidateError::UnknownKey(key))?;
        if window.pd != pd {
            return Err(InvalidateError::ForeignPd(key));
        }
        if window.window_type == WindowType::Type1 {
            return Err(InvalidateError::WrongType(key));
        }
        match window.binding {
            None => Err(InvalidateError::UnknownKey(key)),
            Some(binding) if binding.qpn != Some(qpn) => Err(InvalidateError::ForeignQp(key)),
            Some(_) if is_injected(Fault::IgnoreRevokedWindow) => Ok(()),
            Some(_) => {
                self.unbind(key);
                Ok(())
            }
        }
    }

    /// Revokes every window that was bound through queue pair `qpn`, which is about to go.
    pub fn invalidate_all_of(&mut self, qpn: Qpn) {
        for index in 0..self.windows.len() {
            let key = Key(self.windows[index] << 8);
            let is_its = self
                .window_mut(key)
                .and_then(|(_, window)| window.binding)
                .is_some_and(|binding| binding.qpn == Some(qpn));
            if is_its {
                self.unbind(key);
            }
        }
    }

    /// Checks that `key`, of a region or a window, grants a peer `access` on `len` bytes at `iova` through
    /// queue pair `qpn` of domain `pd`, and yields them.
    ///
    /// # Errors
    ///
    /// See [`AccessError`]; the checks run in the order of its variants.
    pub fn check_remote(
        &self,
        key: Key,
        (pd, qpn): (Pd, Qpn),
        iova: u64,
        len: u64,
        access: AccessFlags,
    ) -> Result<Slice<'_>, AccessError> {
        match self.region(key) {
            Some(registered) => registered.region.check(key, pd, iova, len, access),
            None => self.check_bound(key, (pd, qpn), iova, len, access),
        }
    }

    // Out of line, so that what regions need of `check_remote` stays as small as it is without windows.
    #[inline(never)]
    fn check_bound(
        &self,
        key: Key,
        (pd, qpn): (Pd, Qpn),
        iova: u64,
        len: u64,
        access: AccessFlags,
    ) -> Result<Slice<'_>, AccessError> {
        let binding = self
            .window(key)
            .and_then(|window| window.binding.as_ref())
            .ok_or(AccessError::UnknownKey(key))?;
        if binding.view.pd == pd && binding.qpn.is_some_and(|bound| bound != qpn) {
            return Err(AccessError::ForeignQp(key));
        }
        binding.view.check(key, pd, iova, len, access)
    }

    /// The checks of a bind that concern the window alone.
    fn check_window(&mut self, bind: &Bind, pd: Pd) -> Result<WindowType, BindError> {
        let (_, window) = self
            .window_mut(bind.rkey)
            .ok_or(BindError::UnknownWindow(bind.rkey))?;
        if window.pd != pd {
            return Err(BindError::ForeignPd);
        }
        match window.window_type {
            WindowType::Type2 if window.binding.is_some() => Err(BindError::Bound),
            WindowType::Type2 if bind.len == 0 => Err(BindError::Empty),
            WindowType::Type1 if bind.is_zero_based => Err(BindError::ZeroBased),
            window_type => Ok(window_type),
        }
    }

    /// The part of the region below that a window is to open.
    fn view(&self, bind: &Bind, pd: Pd) -> Result<Region, BindError> {
        let below = &self
            .region(bind.region)
            .ok_or(BindError::UnknownRegion(bind.region))?
            .region;
        if below.pd != pd {
            return Err(BindError::ForeignPd);
        }
        let mut needed = AccessFlags::MW_BIND;
        let writes = AccessFlags::REMOTE_WRITE | AccessFlags::REMOTE_ATOMIC;
        let is_writable = bind.access.intersects(writes);
        needed.set(AccessFlags::LOCAL_WRITE, is_writable);
        if !below.access.contains(needed) {
            let missing = needed.difference(below.access);
            return Err(BindError::Denied { missing });
        }
        let Bind { addr, len, .. } = *bind;
        let base = below
            .byte_at(addr, len)
            .ok_or(BindError::OutOfBounds { addr, len })?;
        // What a window grants, it grants to peers; that it may be written is how it is mapped.
        let remote = writes | AccessFlags::REMOTE_READ;
        let mut access = bind.access.intersection(remote);
        access.set(AccessFlags::LOCAL_WRITE, is_writable);
        Ok(Region {
            pd,
            base,
            iova: if bind.is_zero_based { 0 } else { addr },
            len,
            access,
        })
    }

    /// Takes the window with the index of `key` off its region, if it is bound.
    fn unbind(&mut self, key: Key) {
        let binding = self
            .window_mut(key)
            .and_then(|(_, window)| window.binding.take());
        if let Some(below) = binding.and_then(|binding| self.region_mut(binding.region)) {
            below.window_count -= 1;
        }
    }

    /// The window whose key, tag included, is `key`.
    fn window(&self, key: Key) -> Option<&Window> {
        match &self.slots[self.slot(key)] {
            Slot::Window(held, window) if *held == key => Some(window),
            _ => None,
        }
    }

    /// The window with the index of `key`.
    fn window_mut(&mut self, key: Key) -> Option<(&mut Key, &mut Window)> {
        let slot = self.slot(key);
        match &mut self.slots[slot] {
            Slot::Window(held, window) if held.index() == key.index() => Some((held, window)),
            _ => None,
        }
    }
}
