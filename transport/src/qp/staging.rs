//! Send requests in the shape that the device reads.

use rdma_core_bindings as ffi;

use super::QpCapabilities;
use crate::work::Source;

/// Set beside the flags of the caller where the bytes are in `Staging::inline`.
pub(super) const INLINE: u32 = ffi::IBV_SEND_INLINE;

/// The staged requests as the device reads them. Nothing is allocated after creation.
pub(super) struct Staging {
    pub(super) wrs: Vec<ffi::ibv_send_wr>,
    pub(super) sges: Vec<ffi::ibv_sge>,
    /// Inline bytes; their entries hold byte offsets into it until the chain is linked.
    inline: Vec<u8>,
}

impl Staging {
    pub(super) fn new(capabilities: &QpCapabilities) -> Staging {
        let wrs = capabilities.max_send_wr as usize;
        Staging {
            wrs: Vec::with_capacity(wrs),
            sges: Vec::with_capacity(wrs * capabilities.max_send_sge.max(1) as usize),
            inline: Vec::with_capacity(wrs * capabilities.max_inline_data as usize),
        }
    }

    pub(super) fn clear(&mut self) {
        self.wrs.clear();
        self.sges.clear();
        self.inline.clear();
    }

    /// Adds one entry with all inline parts behind each other.
    pub(super) fn push_inline(&mut self, parts: &[Source<'_>]) {
        let addr = self.inline.len() as u64;
        for part in parts {
            if let Source::Inline(bytes) = part {
                self.inline.extend_from_slice(bytes);
            }
        }
        let length =
            u32::try_from(self.inline.len() as u64 - addr).expect("at most max_inline_data");
        self.sges.push(ffi::ibv_sge {
            addr,
            length,
            lkey: 0,
        });
    }

    /// Connects the requests, their entries and the inline bytes by pointers, which hold until something is
    /// added or cleared, and returns the first request.
    pub(super) fn link(&mut self) -> *mut ffi::ibv_send_wr {
        let inline = self.inline.as_ptr().expose_provenance() as u64;
        let mut sges = self.sges.as_mut_slice();
        for wr in &mut self.wrs {
            let count = usize::try_from(wr.num_sge).expect("set from a length");
            let (own, later) = sges.split_at_mut(count);
            if wr.send_flags & INLINE != 0 {
                own.iter_mut().for_each(|sge| sge.addr += inline);
            }
            wr.sg_list = own.as_mut_ptr();
            sges = later;
        }
        let first = self.wrs.as_mut_ptr();
        for index in 1..self.wrs.len() {
            let (wr, next) = (first.wrapping_add(index - 1), first.wrapping_add(index));
            // SAFETY: `index - 1` is an element of the vector, which nothing else borrows.
            unsafe { (*wr).next = next };
        }
        first
    }

    /// How many requests come before `bad_wr`, the first one that the device refused. A pointer to none of
    /// them counts all as accepted: then nothing is freed too early.
    pub(super) fn accepted(&self, bad_wr: *const ffi::ibv_send_wr) -> usize {
        let range = self.wrs.as_ptr_range();
        if !range.contains(&bad_wr) {
            return self.wrs.len();
        }
        (bad_wr.addr() - range.start.addr()) / size_of::<ffi::ibv_send_wr>()
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    #[test]
    fn what_was_accepted_when_a_chain_breaks() {
        let mut staging = Staging::new(&QpCapabilities::default());
        staging.wrs.resize(3, ffi::ibv_send_wr::default());
        let first = staging.link();
        for accepted in 0..3 {
            assert_eq!(staging.accepted(first.wrapping_add(accepted)), accepted);
        }
        assert_eq!(
            staging.accepted(ptr::null()),
            3,
            "in doubt the device has them all"
        );
        let chained: Vec<_> = staging.wrs.iter().map(|wr| wr.next).collect();
        assert_eq!(
            chained,
            [
                first.wrapping_add(1),
                first.wrapping_add(2),
                ptr::null_mut()
            ]
        );
    }
}
