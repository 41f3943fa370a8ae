//! Posting receives.

use rdma_core_bindings as ffi;

use super::queue::Held;
use super::{CanReceive, QpInner, QueuePair, Service};
use crate::error::{Error, Failed, Result};
use crate::mr::LocalBuffer;
use crate::work::{LOCAL_BUFFERS_MAX, Scatter, check_pd};

/// The most parts one receive can have.
pub(crate) const RECV_SGE_MAX: usize = LOCAL_BUFFERS_MAX;

impl<S: CanReceive, T: Service> QueuePair<S, T> {
    /// Posts a receive into one buffer or an array of them (none for messages without payload).
    ///
    /// The request owns the buffers until its completion gives them back. A SEND that does not fit is an
    /// error on both sides; a datagram that does not fit is dropped, and the receive waits on.
    ///
    /// # Errors
    ///
    /// With the buffers: [`Error::QueueFull`] if `max_recv_wr` are outstanding, [`Error::TooManySge`],
    /// [`Error::WrongProtectionDomain`], [`Error::SharedReceives`] if it takes its receives from a shared queue,
    /// or [`Error::Post`].
    ///
    /// # References
    ///
    /// `ibv_post_recv(3)`.
    pub fn post_recv<B: Scatter>(&mut self, wr_id: u64, buffers: B) -> Result<(), Failed<B>> {
        if let Err(error) = self.inner.check_recv(&buffers) {
            return Err(Failed::new(buffers, error));
        }
        self.inner.post_recv(wr_id, buffers)
    }

    /// How many more receives fit.
    pub fn recv_room(&self) -> usize {
        self.inner.recv.room()
    }
}

impl QpInner {
    fn check_recv(&self, buffers: &impl Scatter) -> Result<()> {
        if self.srq.is_some() {
            return Err(Error::SharedReceives);
        }
        let buffers = buffers.buffers();
        if self.recv.room() == 0 {
            let capacity = self.recv.capacity();
            return Err(Error::QueueFull {
                queue: "receive",
                capacity,
                drains: true,
            });
        }
        let max = RECV_SGE_MAX.min(self.capabilities.max_recv_sge as usize);
        if buffers.len() > max {
            return Err(Error::TooManySge {
                count: buffers.len(),
                max,
            });
        }
        buffers
            .iter()
            .try_for_each(|buffer| check_pd(&self.pd, buffer.pd()))
    }

    fn post_recv<B: Scatter>(&mut self, wr_id: u64, buffers: B) -> Result<(), Failed<B>> {
        let mut list = match ScatterList::new(buffers.buffers()) {
            Ok(list) => list,
            Err(error) => return Err(Failed::new(buffers, error)),
        };
        let mut wr = list.recv_wr(self.recv.next_number());
        let mut bad_wr = std::ptr::null_mut();
        // SAFETY: a live queue pair and one well-formed request, which the call copies. The memory it names
        // belongs to `buffers`, which either moves into `recv` below or was not accepted.
        let errno = unsafe { ffi::ibv_post_recv(self.as_ptr(), &raw mut wr, &raw mut bad_wr) };
        if errno != 0 {
            let source = std::io::Error::from_raw_os_error(errno);
            let error = Error::Post {
                qpn: self.qpn,
                accepted: 0,
                source,
            };
            return Err(Failed::new(buffers, error));
        }
        self.recv
            .stage(wr_id, true, buffers.into_buffers().map(Held::Local));
        self.recv.commit(1);
        Ok(())
    }
}

/// The parts of a receive in the shape that the device reads. Empty buffers are left out.
pub(crate) struct ScatterList {
    sges: [ffi::ibv_sge; RECV_SGE_MAX],
    count: usize,
}

impl ScatterList {
    /// The parts of at most [`RECV_SGE_MAX`] buffers.
    pub(crate) fn new(buffers: &[LocalBuffer]) -> Result<ScatterList> {
        let mut list = ScatterList {
            sges: [ffi::ibv_sge::default(); RECV_SGE_MAX],
            count: 0,
        };
        for buffer in buffers.iter().filter(|buffer| !buffer.is_empty()) {
            list.sges[list.count] = buffer.sge()?;
            list.count += 1;
        }
        Ok(list)
    }

    /// A request for them, good as long as the list stays where it is.
    pub(crate) fn recv_wr(&mut self, number: u64) -> ffi::ibv_recv_wr {
        ffi::ibv_recv_wr {
            wr_id: number,
            sg_list: self.sges.as_mut_ptr(),
            num_sge: i32::try_from(self.count).expect("at most RECV_SGE_MAX"),
            ..Default::default()
        }
    }
}
