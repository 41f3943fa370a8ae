//! What two connected queue pairs need around them.

use std::sync::Arc;

use transport::connect::{ConnectConfig, Prepared};
use transport::{
    AccessFlags, Completion, CompletionQueue, Context, DeviceSelector, Error, Mapping,
    ProtectionDomain, QpCapabilities, ReadyQp, Result, SharedRegion,
};

/// Most requests outstanding on a queue pair of a benchmark.
pub const MAX_SEND_WR: u32 = 128;
/// Most bytes of an inline request.
pub const MAX_INLINE: u32 = 64;

/// A device, opened, with a protection domain and a completion queue.
#[derive(Debug)]
pub struct Side {
    /// The device.
    pub context: Context,
    /// The domain of all that is made here.
    pub pd: ProtectionDomain,
    /// Where all completions arrive.
    pub cq: CompletionQueue,
    completions: Vec<Completion>,
}

impl Side {
    /// Opens a device.
    ///
    /// # Errors
    ///
    /// As [`Context::open`].
    pub fn open(device: &DeviceSelector) -> Result<Side> {
        let context = Context::open(device)?;
        Ok(Side {
            pd: ProtectionDomain::alloc(&context)?,
            cq: CompletionQueue::create(&context, 4 * MAX_SEND_WR as usize, None)?,
            context,
            completions: Vec::with_capacity(transport::POLL_MAX),
        })
    }

    /// Registers `len` fresh bytes that a peer may write.
    ///
    /// # Errors
    ///
    /// As [`ProtectionDomain::register`].
    pub fn region(&self, len: usize) -> Result<Arc<SharedRegion>> {
        let access = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE;
        let mapping = Mapping::anonymous(len)?;
        Ok(Arc::new(self.pd.register(
            &mapping,
            0..len,
            access,
            None,
        )?))
    }

    /// Prepares a queue pair whose peer may write.
    ///
    /// # Errors
    ///
    /// As [`Prepared::create`].
    pub fn prepare(&self) -> Result<Prepared> {
        let config = ConnectConfig {
            access: AccessFlags::REMOTE_WRITE,
            capabilities: QpCapabilities {
                max_send_wr: MAX_SEND_WR,
                max_inline_data: MAX_INLINE,
                ..QpCapabilities::default()
            },
            ..ConnectConfig::default()
        };
        Prepared::create(&self.pd, &self.cq, &self.cq, &config)
    }

    /// Connects two queue pairs of this device with each other.
    ///
    /// # Errors
    ///
    /// As [`Prepared::create`] and [`Prepared::connect`].
    pub fn loopback(&self) -> Result<(ReadyQp, ReadyQp)> {
        let (near, far) = (self.prepare()?, self.prepare()?);
        let (near_end, far_end) = (near.end_point(), far.end_point());
        Ok((near.connect(&far_end)?, far.connect(&near_end)?))
    }

    /// Polls once, and hands what has completed to `qp`; returns how many.
    ///
    /// # Errors
    ///
    /// [`Error`] of the verbs.
    ///
    /// # Panics
    ///
    /// If a request failed: nothing in a benchmark may.
    #[inline]
    pub fn poll(&mut self, qp: &mut ReadyQp) -> Result<usize, Error> {
        let count = self.cq.poll(&mut self.completions)?;
        for completion in self.completions.drain(..) {
            let done = qp.complete(completion)?;
            assert!(done.is_success(), "a request failed: {}", done.status);
        }
        Ok(count)
    }
}
