//! Requests that bind and revoke memory windows.

use std::io;
use std::iter;
use std::ops::Range;
use std::sync::{Arc, Weak};

use rdma_core_bindings as ffi;

use super::queue::Held;
use super::send::{known_bits, request};
use super::{Connection, QpInner, QueuePair, Rts, SendChain};
use crate::error::{Error, Result};
use crate::mr::SharedRegion;
use crate::mw::{MemoryWindow, MwInner, Type1, Type2, WindowChange};
use crate::types::{AccessFlags, Remote, Rkey, SendFlags};
use crate::work::check_pd;

impl<T: Connection> SendChain<'_, T> {
    /// Appends the binding of `window` to a range of `region`, in bytes from its start, and returns what the
    /// peer needs to reach its first byte.
    ///
    /// Only the peer of this queue pair can use it, with the rights in `access`, once the request has been
    /// executed: a later SEND of this queue pair may carry the grant. The region needs
    /// [`MW_BIND`](AccessFlags::MW_BIND), and `LOCAL_WRITE` for a window that can be written. The window
    /// holds it until it is free again.
    ///
    /// # Errors
    ///
    /// See [`SendChain`]; [`Error::WindowRights`] if the region lacks a right, [`Error::WindowNotBound`]
    /// unless the window is free and the range has a byte.
    ///
    /// # References
    ///
    /// `ibv_post_send(3)`, `IBV_WR_BIND_MW`.
    pub fn bind_mw(
        &mut self,
        wr_id: u64,
        window: &MemoryWindow<Type2>,
        region: &Arc<SharedRegion>,
        range: Range<usize>,
        access: AccessFlags,
        flags: SendFlags,
    ) -> Result<Remote> {
        let (qp, window) = (&mut *self.qp, &window.inner);
        qp.check_window(window)?;
        let (remote, bind_info) = window.begin_bind(Some(qp.tag), region, &range, access)?;
        let mut wr = request(ffi::IBV_WR_BIND_MW, Default::default(), known_bits(flags));
        wr.__bindgen_anon_2.bind_mw = ffi::ibv_send_wr__bindgen_ty_4__bindgen_ty_1 {
            mw: window.as_ptr(),
            rkey: remote.rkey.0,
            bind_info,
        };
        qp.remember_window(window);
        qp.push_change(wr, wr_id, window, true);
        Ok(remote)
    }

    /// Appends the revocation of `window`, which was bound on this queue pair.
    ///
    /// It is executed when all earlier requests of this queue pair have completed. When it has completed
    /// itself, no peer changes or sees a byte through the window any more, and its key is refused; when its
    /// completion was given to the queue pair, the window is free.
    ///
    /// # Errors
    ///
    /// See [`SendChain`]; [`Error::WindowNotRevoked`] unless the window is bound on this queue pair.
    ///
    /// # References
    ///
    /// `ibv_post_send(3)`, `IBV_WR_LOCAL_INV`.
    pub fn invalidate(
        &mut self,
        wr_id: u64,
        window: &MemoryWindow<Type2>,
        flags: SendFlags,
    ) -> Result<()> {
        let (qp, window) = (&mut *self.qp, &window.inner);
        qp.check_window(window)?;
        let (rkey, _) = window.begin_revoke(Some(qp.tag))?;
        let mut wr = request(ffi::IBV_WR_LOCAL_INV, Default::default(), known_bits(flags));
        wr.__bindgen_anon_1.invalidate_rkey = rkey.0;
        qp.push_change(wr, wr_id, window, false);
        Ok(())
    }
}

impl<T: Connection> QueuePair<Rts, T> {
    /// Binds `window` to a range of `region`, in bytes from its start, and returns what peers need to reach
    /// its first byte: all that have a queue pair in the domain, with the rights in `access`.
    ///
    /// Posts one request on this queue pair, which is only the way to the device; grant the window when it
    /// has completed. The region needs [`MW_BIND`](AccessFlags::MW_BIND), and `LOCAL_WRITE` for a window
    /// that can be written. The window holds it until it is free again.
    ///
    /// # Errors
    ///
    /// As [`SendChain::bind_mw`], and [`Error::Post`].
    ///
    /// # References
    ///
    /// `ibv_bind_mw(3)`.
    pub fn bind_mw(
        &mut self,
        wr_id: u64,
        window: &MemoryWindow<Type1>,
        region: &Arc<SharedRegion>,
        range: Range<usize>,
        access: AccessFlags,
        flags: SendFlags,
    ) -> Result<Remote> {
        let (qp, window) = (&mut *self.inner, &window.inner);
        qp.abandon();
        qp.check_window(window)?;
        let (remote, info) = window.begin_bind(None, region, &range, access)?;
        let rkey = qp.post_bind(wr_id, window, info, true, flags)?;
        Ok(Remote { rkey, ..remote })
    }

    /// Unbinds `window`. When the request has completed, no peer changes or sees a byte through the window
    /// any more, and its key is refused; when its completion was given to the queue pair, the window is free.
    ///
    /// # Errors
    ///
    /// [`Error::QueueFull`], [`Error::WrongProtectionDomain`], [`Error::WindowNotRevoked`] unless the window
    /// is bound, and [`Error::Post`].
    ///
    /// # References
    ///
    /// `ibv_bind_mw(3)`, with length 0.
    pub fn unbind_mw(
        &mut self,
        wr_id: u64,
        window: &MemoryWindow<Type1>,
        flags: SendFlags,
    ) -> Result<()> {
        let (qp, window) = (&mut *self.inner, &window.inner);
        qp.abandon();
        qp.check_window(window)?;
        let (_, info) = window.begin_revoke(None)?;
        qp.post_bind(wr_id, window, info, false, flags)?;
        Ok(())
    }
}

impl QpInner {
    fn check_window(&self, window: &MwInner) -> Result<()> {
        self.check_send_room()?;
        check_pd(&self.pd, window.pd())
    }

    fn push_change(
        &mut self,
        wr: ffi::ibv_send_wr,
        wr_id: u64,
        window: &Arc<MwInner>,
        is_bind: bool,
    ) {
        let held = change(window, is_bind);
        self.push_wr(wr, wr_id, self.staging.sges.len(), iter::once(held));
    }

    /// Posts what `ibv_bind_mw` is for, and returns the window's key.
    fn post_bind(
        &mut self,
        wr_id: u64,
        window: &Arc<MwInner>,
        bind_info: ffi::ibv_mw_bind_info,
        is_bind: bool,
        flags: SendFlags,
    ) -> Result<Rkey> {
        let is_signaled = flags.contains(SendFlags::SIGNALED);
        let held = iter::once(change(window, is_bind));
        let mut bind = ffi::ibv_mw_bind {
            wr_id: self.send.stage(wr_id, is_signaled, held),
            send_flags: known_bits(flags),
            bind_info,
        };
        // SAFETY: a live queue pair and window; the region, if there is one, is held by the window.
        let errno = unsafe { ffi::ibv_bind_mw(self.as_ptr(), window.as_ptr(), &raw mut bind) };
        self.send.commit(usize::from(errno == 0));
        if errno == 0 {
            return Ok(window.take_key());
        }
        Err(Error::Post {
            qpn: self.qpn,
            accepted: 0,
            source: io::Error::from_raw_os_error(errno),
        })
    }

    /// Windows that this queue pair binds end with it.
    fn remember_window(&mut self, window: &Arc<MwInner>) {
        let tag = self.tag;
        self.windows
            .retain(|known| known.upgrade().is_some_and(|known| known.serves(tag)));
        self.windows.push(Arc::downgrade(window));
    }

    /// The peer has revoked a window of this queue pair.
    pub(super) fn window_revoked(&self, rkey: Rkey) {
        let windows = self.windows.iter().filter_map(Weak::upgrade);
        let _ = { windows }.any(|window| window.serves(self.tag) && window.was_revoked(rkey));
    }

    /// Frees every window that serves this queue pair, which is about to be destroyed: some devices do not
    /// let a queue pair go while a window refers to it.
    pub(super) fn free_windows(&self) -> Result<()> {
        let windows = self.windows.iter().filter_map(Weak::upgrade);
        windows
            .filter(|window| window.serves(self.tag))
            .try_for_each(|window| window.free())
    }
}

fn change(window: &Arc<MwInner>, is_bind: bool) -> Held {
    Held::Window(WindowChange {
        window: Arc::clone(window),
        is_bind,
    })
}
