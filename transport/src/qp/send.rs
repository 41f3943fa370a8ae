//! Chains of send requests: collected, then handed to the device with one doorbell.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use rdma_core_bindings as ffi;

use super::queue::Held;
use super::staging::INLINE;
use super::{Connected, Connection, QpInner, QueuePair, Rts, Service};
use crate::error::{Error, Failed, Result};
use crate::mr::{LocalBuffer, MESSAGE_LEN_MAX};
use crate::types::{Remote, Rkey, SendFlags};
use crate::work::{Gather, LOCAL_BUFFERS_MAX, Scatter, Source, check_pd};

impl<T: Service> QueuePair<Rts, T> {
    /// Starts a chain of requests, to be posted together by [`SendChain::submit`].
    pub fn start_send(&mut self) -> SendChain<'_, T> {
        // A chain that was forgotten, not dropped, may have left requests that were never posted.
        self.inner.abandon();
        SendChain {
            qp: &mut self.inner,
            service: PhantomData,
        }
    }

    /// How many more send requests fit.
    pub fn send_room(&self) -> usize {
        self.inner.send.room()
    }

    /// How many send requests are posted and not yet released by a completion.
    pub fn sends_outstanding(&self) -> usize {
        self.inner.send.posted()
    }
}

/// Requests that wait for [`SendChain::submit`]. Dropping the chain posts none of them; buffers in it are
/// then dropped too.
///
/// Each method appends one request. `wr_id` comes back in [`Done`](crate::Done) if the request is
/// [`SIGNALED`](SendFlags::SIGNALED) or fails. Common errors, with which the chain stays as it was:
///
/// - [`Error::QueueFull`] if `max_send_wr` requests are outstanding: poll, and try again. An unsignalled
///   request takes its place until a later signalled one completes.
/// - [`Error::TooManySge`], [`Error::InlineTooLong`], [`Error::MixedInline`], [`Error::MessageTooLong`],
///   [`Error::OutOfBounds`], [`Error::WrongProtectionDomain`]: a request that could only fail.
///
/// A wrong key or address of the peer is no error here: it arrives as a
/// [`WcStatus`](crate::WcStatus), and ends the queue pair.
#[must_use = "nothing is posted until `submit`"]
pub struct SendChain<'qp, T: Service = Connected> {
    pub(super) qp: &'qp mut QpInner,
    service: PhantomData<T>,
}

impl<T: Connection> SendChain<'_, T> {
    /// Appends an RDMA WRITE of `source` to `remote`.
    ///
    /// Completes when the bytes are in the peer's memory; its CPU learns nothing of it. On an unreliable
    /// connection it completes when they are sent.
    ///
    /// # Errors
    ///
    /// See [`SendChain`]. A `LocalBuffer` in `source` is dropped then; ask [`SendChain::room`] first.
    pub fn write<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        remote: Remote,
        flags: SendFlags,
    ) -> Result<()> {
        self.qp.stage_gather(
            wr_id,
            ffi::IBV_WR_RDMA_WRITE,
            rdma(remote),
            ffi::ibv_send_wr__bindgen_ty_1::default(),
            source,
            flags,
        )
    }

    /// Appends an RDMA WRITE with an immediate, which takes a receive from the peer and tells its CPU.
    ///
    /// # Errors
    ///
    /// See [`SendChain::write`].
    pub fn write_imm<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        remote: Remote,
        imm: [u8; 4],
        flags: SendFlags,
    ) -> Result<()> {
        let opcode = ffi::IBV_WR_RDMA_WRITE_WITH_IMM;
        self.qp
            .stage_gather(wr_id, opcode, rdma(remote), immediate(imm), source, flags)
    }

    /// Appends a SEND into the peer's next receive.
    ///
    /// # Errors
    ///
    /// See [`SendChain::write`].
    pub fn send<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        flags: SendFlags,
    ) -> Result<()> {
        self.qp.stage_gather(
            wr_id,
            ffi::IBV_WR_SEND,
            ffi::ibv_send_wr__bindgen_ty_2::default(),
            ffi::ibv_send_wr__bindgen_ty_1::default(),
            source,
            flags,
        )
    }

    /// Appends a SEND with an immediate.
    ///
    /// # Errors
    ///
    /// See [`SendChain::write`].
    pub fn send_imm<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        imm: [u8; 4],
        flags: SendFlags,
    ) -> Result<()> {
        let target = ffi::ibv_send_wr__bindgen_ty_2::default();
        self.qp.stage_gather(
            wr_id,
            ffi::IBV_WR_SEND_WITH_IMM,
            target,
            immediate(imm),
            source,
            flags,
        )
    }
}

impl SendChain<'_> {
    /// Appends a SEND that also revokes the window of type 2 that the peer has bound for this queue pair
    /// under `rkey`: when the peer's receive completes, the key is refused and the peer's window is free.
    ///
    /// READs through the window that have not completed by then may be cut off: fence it behind them. A
    /// key that is no such window's fails the peer's receive and ends its queue pair.
    ///
    /// # Errors
    ///
    /// See [`SendChain::write`].
    pub fn send_invalidate<'a>(
        &mut self,
        wr_id: u64,
        source: impl Gather<'a>,
        rkey: Rkey,
        flags: SendFlags,
    ) -> Result<()> {
        let target = ffi::ibv_send_wr__bindgen_ty_2::default();
        let more = ffi::ibv_send_wr__bindgen_ty_1 {
            invalidate_rkey: rkey.0,
        };
        let opcode = ffi::IBV_WR_SEND_WITH_INV;
        self.qp
            .stage_gather(wr_id, opcode, target, more, source, flags)
    }

    /// Appends an RDMA READ of as many bytes as `into` has, from `remote` into one buffer or several.
    ///
    /// The buffers come back with the completion; until then their bytes are garbage.
    ///
    /// # Errors
    ///
    /// See [`SendChain`]; with the buffers.
    pub fn read<B: Scatter>(
        &mut self,
        wr_id: u64,
        into: B,
        remote: Remote,
        flags: SendFlags,
    ) -> Result<(), Failed<B>> {
        self.qp
            .stage_scatter(wr_id, ffi::IBV_WR_RDMA_READ, rdma(remote), into, flags)
    }

    /// Appends an atomic addition to the 8 bytes at `remote`, whose address is a multiple of 8. `into` gets
    /// the value from before ([`LocalBuffer::as_u64`]).
    ///
    /// # Errors
    ///
    /// See [`SendChain`], and [`Error::AtomicLength`] unless `into` has 8 bytes; with the buffer.
    pub fn fetch_add(
        &mut self,
        wr_id: u64,
        into: LocalBuffer,
        remote: Remote,
        add: u64,
        flags: SendFlags,
    ) -> Result<(), Failed<LocalBuffer>> {
        let target = atomic(remote, add, 0);
        self.qp
            .stage_atomic(wr_id, ffi::IBV_WR_ATOMIC_FETCH_AND_ADD, target, into, flags)
    }

    /// Appends an atomic compare and swap of the 8 bytes at `remote`, whose address is a multiple of 8:
    /// `swap` is stored if they are `compare`. `into` gets the value from before.
    ///
    /// # Errors
    ///
    /// As [`SendChain::fetch_add`].
    pub fn cmp_swap(
        &mut self,
        wr_id: u64,
        into: LocalBuffer,
        remote: Remote,
        compare: u64,
        swap: u64,
        flags: SendFlags,
    ) -> Result<(), Failed<LocalBuffer>> {
        let target = atomic(remote, compare, swap);
        self.qp
            .stage_atomic(wr_id, ffi::IBV_WR_ATOMIC_CMP_AND_SWP, target, into, flags)
    }
}

impl<T: Service> SendChain<'_, T> {
    /// How many more requests fit behind those in the chain.
    pub fn room(&self) -> usize {
        self.qp.send.room()
    }

    /// How many requests the chain has.
    pub fn len(&self) -> usize {
        self.qp.staging.wrs.len()
    }

    /// True if the chain has no request.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Posts the chain with one doorbell; an empty chain posts nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Post`] tells how many requests were accepted: those complete. The others never reached the
    /// device, and their buffers are dropped.
    ///
    /// # References
    ///
    /// `ibv_post_send(3)`.
    pub fn submit(self) -> Result<()> {
        self.qp.post_staged()
    }
}

impl<T: Service> fmt::Debug for SendChain<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendChain")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl<T: Service> Drop for SendChain<'_, T> {
    fn drop(&mut self) {
        self.qp.abandon();
    }
}

pub(super) fn immediate(imm: [u8; 4]) -> ffi::ibv_send_wr__bindgen_ty_1 {
    ffi::ibv_send_wr__bindgen_ty_1 {
        imm_data: u32::from_be_bytes(imm).to_be(),
    }
}

fn rdma(remote: Remote) -> ffi::ibv_send_wr__bindgen_ty_2 {
    ffi::ibv_send_wr__bindgen_ty_2 {
        rdma: ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 {
            remote_addr: remote.addr,
            rkey: remote.rkey.0,
        },
    }
}

fn atomic(remote: Remote, compare_add: u64, swap: u64) -> ffi::ibv_send_wr__bindgen_ty_2 {
    ffi::ibv_send_wr__bindgen_ty_2 {
        atomic: ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_2 {
            remote_addr: remote.addr,
            compare_add,
            swap,
            rkey: remote.rkey.0,
        },
    }
}

impl QpInner {
    pub(super) fn stage_gather<'a>(
        &mut self,
        wr_id: u64,
        opcode: ffi::ibv_wr_opcode,
        target: ffi::ibv_send_wr__bindgen_ty_2,
        more: ffi::ibv_send_wr__bindgen_ty_1,
        source: impl Gather<'a>,
        flags: SendFlags,
    ) -> Result<()> {
        let parts = source.sources();
        self.check_send_room()?;
        let is_inline = self.check_gather(parts)?;
        let sges_before = self.staging.sges.len();
        let mut flags = known_bits(flags);
        if is_inline {
            flags |= INLINE;
            self.staging.push_inline(parts);
        } else {
            let sges = parts
                .iter()
                .filter(|part| !part.is_empty())
                .map(Source::sge);
            self.push_sges(sges)?;
        }
        let held = source.into_sources().filter_map(|part| match part {
            Source::Shared(region, _) => Some(Held::Shared(Arc::clone(region))),
            Source::Local(buffer) => Some(Held::Local(buffer)),
            Source::Inline(_) => None,
        });
        let mut wr = request(opcode, target, flags);
        wr.__bindgen_anon_1 = more;
        self.push_wr(wr, wr_id, sges_before, held);
        Ok(())
    }

    fn stage_scatter<B: Scatter>(
        &mut self,
        wr_id: u64,
        opcode: ffi::ibv_wr_opcode,
        target: ffi::ibv_send_wr__bindgen_ty_2,
        into: B,
        flags: SendFlags,
    ) -> Result<(), Failed<B>> {
        let sges_before = self.staging.sges.len();
        if let Err(error) = self.push_scatter(into.buffers()) {
            return Err(Failed::new(into, error));
        }
        let wr = request(opcode, target, known_bits(flags));
        self.push_wr(wr, wr_id, sges_before, into.into_buffers().map(Held::Local));
        Ok(())
    }

    fn stage_atomic(
        &mut self,
        wr_id: u64,
        opcode: ffi::ibv_wr_opcode,
        target: ffi::ibv_send_wr__bindgen_ty_2,
        into: LocalBuffer,
        flags: SendFlags,
    ) -> Result<(), Failed<LocalBuffer>> {
        let len = into.len();
        if len != 8 {
            return Err(Failed::new(into, Error::AtomicLength { len }));
        }
        self.stage_scatter(wr_id, opcode, target, into, flags)
    }

    pub(super) fn check_send_room(&self) -> Result<()> {
        if self.send.room() > 0 {
            return Ok(());
        }
        let (capacity, drains) = (self.send.capacity(), self.send.drains());
        Err(Error::QueueFull {
            queue: "send",
            capacity,
            drains,
        })
    }

    /// Refuses parts that cannot make one request; tells whether they are inline.
    fn check_gather(&self, parts: &[Source<'_>]) -> Result<bool> {
        parts.iter().try_for_each(|part| part.check(&self.pd))?;
        let len = parts.iter().map(Source::len).fold(0, usize::saturating_add);
        let max = self.message_len_max;
        if len > max {
            return Err(Error::MessageTooLong { len, max });
        }
        let inline_count = parts
            .iter()
            .filter(|part| matches!(part, Source::Inline(_)))
            .count();
        if inline_count > 0 {
            let max = self.capabilities.max_inline_data as usize;
            return match (inline_count == parts.len(), len <= max) {
                (false, _) => Err(Error::MixedInline),
                (true, false) => Err(Error::InlineTooLong { len, max }),
                // An inline request of no bytes is a request of no bytes.
                (true, true) => Ok(len > 0),
            };
        }
        let local_count = parts
            .iter()
            .filter(|part| matches!(part, Source::Local(_)))
            .count();
        check_count(local_count, LOCAL_BUFFERS_MAX)?;
        check_count(parts.len(), self.capabilities.max_send_sge as usize)?;
        Ok(false)
    }

    fn push_scatter(&mut self, buffers: &[LocalBuffer]) -> Result<()> {
        self.check_send_room()?;
        check_count(
            buffers.len(),
            LOCAL_BUFFERS_MAX.min(self.capabilities.max_send_sge as usize),
        )?;
        buffers
            .iter()
            .try_for_each(|buffer| check_pd(&self.pd, buffer.pd()))?;
        let len = buffers
            .iter()
            .map(LocalBuffer::len)
            .fold(0, usize::saturating_add);
        if len > MESSAGE_LEN_MAX {
            return Err(Error::MessageTooLong {
                len,
                max: MESSAGE_LEN_MAX,
            });
        }
        // An entry of length 0 would mean 2^31 bytes to some devices, so there is none.
        self.push_sges(
            buffers
                .iter()
                .filter(|buffer| !buffer.is_empty())
                .map(LocalBuffer::sge),
        )
    }

    fn push_sges(&mut self, sges: impl Iterator<Item = Result<ffi::ibv_sge>>) -> Result<()> {
        let before = self.staging.sges.len();
        for sge in sges {
            match sge {
                Ok(sge) => self.staging.sges.push(sge),
                Err(error) => {
                    self.staging.sges.truncate(before);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Appends a request whose entries are those from `sges_before` on.
    pub(super) fn push_wr(
        &mut self,
        mut wr: ffi::ibv_send_wr,
        wr_id: u64,
        sges_before: usize,
        held: impl Iterator<Item = Held>,
    ) {
        let num_sge = self.staging.sges.len() - sges_before;
        wr.num_sge = i32::try_from(num_sge).expect("at most max_send_sge");
        let is_signaled = wr.send_flags & ffi::IBV_SEND_SIGNALED != 0;
        wr.wr_id = self.send.stage(wr_id, is_signaled, held);
        self.staging.wrs.push(wr);
    }

    fn post_staged(&mut self) -> Result<()> {
        if self.staging.wrs.is_empty() {
            return Ok(());
        }
        let first = self.staging.link();
        let mut bad_wr = ptr::null_mut();
        // SAFETY: a live queue pair and a well-formed chain, which the call copies. The memory that it names
        // is held in `send` until completions or the end of the queue pair release it.
        let errno = unsafe { ffi::ibv_post_send(self.as_ptr(), first, &raw mut bad_wr) };
        let count = self.staging.wrs.len();
        let accepted = if errno == 0 {
            count
        } else {
            self.staging.accepted(bad_wr)
        };
        self.send.commit(accepted);
        self.staging.clear();
        if errno == 0 {
            return Ok(());
        }
        let source = io::Error::from_raw_os_error(errno);
        Err(Error::Post {
            qpn: self.qpn,
            accepted,
            source,
        })
    }

    /// Forgets requests that were staged and not posted.
    pub(super) fn abandon(&mut self) {
        self.send.commit(0);
        self.staging.clear();
    }
}

/// The flags with a name. Another bit, `IBV_SEND_INLINE` above all, would change what the entries mean.
pub(super) fn known_bits(flags: SendFlags) -> u32 {
    flags.intersection(SendFlags::all()).bits()
}

fn check_count(count: usize, max: usize) -> Result<()> {
    if count <= max {
        return Ok(());
    }
    Err(Error::TooManySge { count, max })
}

pub(super) fn request(
    opcode: ffi::ibv_wr_opcode,
    target: ffi::ibv_send_wr__bindgen_ty_2,
    send_flags: u32,
) -> ffi::ibv_send_wr {
    ffi::ibv_send_wr {
        opcode,
        send_flags,
        wr: target,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::{ConnectConfig, Prepared};
    use crate::{
        AccessFlags, CompletionQueue, Context, DeviceSelector, Mapping, ProtectionDomain,
        QpCapabilities, Rkey,
    };

    /// To some devices an entry of length 0 means 2^31 bytes.
    #[test]
    fn empty_parts_make_no_entries() {
        let context = Context::open(&DeviceSelector::Soft(None)).unwrap();
        let pd = ProtectionDomain::alloc(&context).unwrap();
        let cq = CompletionQueue::create(&context, 512, None).unwrap();
        let config = ConnectConfig {
            capabilities: QpCapabilities {
                max_send_sge: 4,
                ..QpCapabilities::default()
            },
            ..ConnectConfig::default()
        };
        let end = Prepared::create(&pd, &cq, &cq, &config).unwrap();
        let itself = end.end_point();
        let mut qp = end.connect(&itself).unwrap();
        let mapping = Mapping::anonymous(64).unwrap();
        let region = pd
            .register(&mapping, 0..64, AccessFlags::empty(), None)
            .unwrap();
        let region = Arc::new(region);
        let mut buffer = pd.alloc_local(8).unwrap();
        let empty = [buffer.split_to(0).unwrap(), buffer.split_to(0).unwrap()];
        let nowhere = Remote {
            addr: 0,
            rkey: Rkey(0),
        };
        let flags = SendFlags::SIGNALED;

        let mut chain = qp.start_send();
        let parts = [Source::Shared(&region, 7..7), Source::Shared(&region, 7..9)];
        chain.write(1, parts, nowhere, flags).unwrap();
        chain
            .write(2, Source::Shared(&region, 64..64), nowhere, flags)
            .unwrap();
        chain.write(3, Source::Inline(b""), nowhere, flags).unwrap();
        chain.read(4, empty, nowhere, flags).unwrap();
        chain
            .write(
                5,
                [Source::Inline(b"in"), Source::Inline(b"line")],
                nowhere,
                flags,
            )
            .unwrap();
        let staging = &chain.qp.staging;
        let counts: Vec<i32> = staging.wrs.iter().map(|wr| wr.num_sge).collect();
        assert_eq!(counts, [1, 0, 0, 0, 1]);
        let lens: Vec<u32> = staging.sges.iter().map(|sge| sge.length).collect();
        assert_eq!(lens, [2, 6]);
    }
}
