//! Address handles: where datagrams go, and where they came from.
//!
//! # Safety
//!
//! `AhInner` owns one `ibv_ah` until it is dropped, and holds its protection domain. A posted request holds
//! an `Arc` of it, so it is destroyed after the requests that name it.
#![allow(unsafe_code, reason = "calls the verbs table")]

use std::fmt;
use std::net::Ipv4Addr;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_core_bindings as ffi;

use crate::error::Result;
use crate::mr::LocalBuffer;
use crate::pd::{PdInner, ProtectionDomain};
use crate::qp::AddressVector;
use crate::types::{Gid, Qkey, Qpn};
use crate::work::Origin;

/// The bytes in front of the data of a received datagram: the global route header, on RoCE v2 the IP header.
pub const GRH_LEN: usize = 40;

/// The way to a port of the network, for datagrams to any of its queue pairs. Clones share it; it is
/// destroyed when the last one and the last request that names it are gone.
#[derive(Clone)]
pub struct AddressHandle(pub(crate) Arc<AhInner>);

pub(crate) struct AhInner {
    pub(crate) pd: Arc<PdInner>,
    ah: NonNull<ffi::ibv_ah>,
}

// SAFETY: libibverbs and the software device allow use from any thread (see `device`).
unsafe impl Send for AhInner {}
// SAFETY: as above.
unsafe impl Sync for AhInner {}

impl AddressHandle {
    /// Creates a handle for `path`, to be used by queue pairs of the same domain.
    ///
    /// On RoCE the kernel looks up the neighbour's Ethernet address: create a handle once for each peer, not
    /// for each message.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`](crate::Error::Verb): `EINVAL` for a port or GID index that does not exist, or without
    /// a GID on RoCE. That nobody is at the address is no error: datagrams may be lost.
    ///
    /// # References
    ///
    /// `ibv_create_ah(3)`.
    pub fn create(pd: &ProtectionDomain, path: &AddressVector) -> Result<AddressHandle> {
        let mut attr = path.to_ffi();
        let verbs = pd.0.context.verbs;
        // SAFETY: a live domain and plain attributes.
        let ah = unsafe { (verbs.create_ah)(pd.0.as_ptr(), &raw mut attr) };
        Self::own(pd, ah, "ibv_create_ah")
    }

    /// Creates the handle by which an answer reaches the sender of a datagram that arrived at `port`.
    ///
    /// # Errors
    ///
    /// As [`AddressHandle::create`]; `EPROTONOSUPPORT` if what stands in front of the data is no header.
    ///
    /// # References
    ///
    /// `ibv_create_ah_from_wc(3)`.
    pub fn from_completion(
        pd: &ProtectionDomain,
        port: u8,
        sender: &Sender,
    ) -> Result<AddressHandle> {
        let origin = &sender.origin;
        let mut wc = ffi::ibv_wc {
            src_qp: origin.src_qp.get(),
            wc_flags: if origin.has_grh { ffi::IBV_WC_GRH } else { 0 },
            slid: origin.slid,
            sl: origin.sl,
            dlid_path_bits: origin.dlid_path_bits,
            ..Default::default()
        };
        let mut grh = sender.grh;
        let verbs = pd.0.context.verbs;
        let grh = grh.0.as_mut_ptr().cast();
        // SAFETY: a live domain, a completion, and as many bytes, as well aligned, as a GRH has.
        let ah = unsafe { (verbs.create_ah_from_wc)(pd.0.as_ptr(), &raw mut wc, grh, port) };
        Self::own(pd, ah, "ibv_create_ah_from_wc")
    }

    fn own(
        pd: &ProtectionDomain,
        ah: *mut ffi::ibv_ah,
        verb: &'static str,
    ) -> Result<AddressHandle> {
        let ah = NonNull::new(ah).ok_or_else(|| pd.0.context.last_error(verb))?;
        let pd = Arc::clone(&pd.0);
        Ok(AddressHandle(Arc::new(AhInner { pd, ah })))
    }
}

impl fmt::Debug for AddressHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressHandle")
            .field("device", &self.0.pd.context.name())
            .finish_non_exhaustive()
    }
}

impl AhInner {
    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_ah {
        self.ah.as_ptr()
    }
}

impl Drop for AhInner {
    fn drop(&mut self) {
        let destroyed = self.pd.context.destroy_dropped(|| {
            // SAFETY: requests that name it held an `Arc` of it, so nobody uses it.
            let errno = unsafe { (self.pd.context.verbs.destroy_ah)(self.as_ptr()) };
            self.pd.context.check_destroyed("ibv_destroy_ah", errno)
        });
        if !destroyed {
            std::mem::forget(Arc::clone(&self.pd));
        }
    }
}

/// Who gets a datagram.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The way to its port.
    pub handle: AddressHandle,
    /// Its queue pair.
    pub qpn: Qpn,
    /// The key that the queue pair was given; a datagram with another is dropped without a word.
    pub qkey: Qkey,
}

/// Who sent a datagram.
#[derive(Clone, Copy)]
pub struct Sender {
    /// Its queue pair.
    pub qpn: Qpn,
    /// Its GID; `None` if the datagram came by local identifier alone, within an InfiniBand subnet.
    pub gid: Option<Gid>,
    origin: Origin,
    grh: Grh,
}

/// Aligned as `ibv_grh`.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Grh([u8; GRH_LEN]);

const _: () = assert!(size_of::<Grh>() == size_of::<ffi::ibv_grh>());
const _: () = assert!(align_of::<Grh>() >= align_of::<ffi::ibv_grh>());

impl Sender {
    /// Who sent the datagram that was received into `buffers`.
    pub(crate) fn read<'a>(
        origin: Origin,
        buffers: impl Iterator<Item = &'a LocalBuffer>,
    ) -> Sender {
        let mut grh = [0; GRH_LEN];
        let bytes = buffers.flat_map(|buffer| buffer.as_slice());
        for (to, byte) in grh.iter_mut().zip(bytes) {
            *to = *byte;
        }
        Sender {
            qpn: origin.src_qp,
            gid: origin.has_grh.then(|| source_gid(&grh)).flatten(),
            origin,
            grh: Grh(grh),
        }
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("qpn", &self.qpn)
            .field("gid", &self.gid)
            .finish_non_exhaustive()
    }
}

/// The source in a GRH or IPv6 header, or in an IPv4 header at the end of its place.
fn source_gid(grh: &[u8; GRH_LEN]) -> Option<Gid> {
    let (before, ipv4) = grh.split_at(20);
    // With IPv4, what stands before is undefined: if it looks like the start of an IPv6 header, the
    // checksum tells. Kernel rxe leaves that out within one device.
    let looks_like_ipv6 = before[0] >> 4 == 6;
    let is_ipv4 = ipv4[0] == 0x45 && (!looks_like_ipv6 || is_checksum_right(ipv4));
    if is_ipv4 {
        let address = Ipv4Addr::new(ipv4[12], ipv4[13], ipv4[14], ipv4[15]);
        return Some(Gid(address.to_ipv6_mapped().octets()));
    }
    looks_like_ipv6.then(|| Gid(std::array::from_fn(|i| grh[8 + i])))
}

/// Whether the one's complement sum over an IPv4 header is all ones (RFC 1071).
fn is_checksum_right(header: &[u8]) -> bool {
    let words = header.chunks_exact(2);
    let sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    (sum & 0xffff) + (sum >> 16) == 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From kernel rxe, as it was on the wire.
    const IPV4: [u8; 20] = [
        0x45, 0, 0, 0x30, 0xe0, 0x89, 0x40, 0, 0x40, 0x11, 0x46, 0x1f, 10, 9, 0, 1, 10, 9, 0, 2,
    ];

    #[test]
    fn an_ipv4_header_is_found_behind_anything() {
        for before in [0, 0x60, 0xff] {
            let mut grh = [before; GRH_LEN];
            grh[20..].copy_from_slice(&IPV4);
            let gid = source_gid(&grh).unwrap();
            assert_eq!(gid.to_string(), "::ffff:10.9.0.1");
        }
        // Within one device of kernel rxe.
        let mut grh = [0; GRH_LEN];
        grh[20..].copy_from_slice(&IPV4);
        grh[30..32].fill(0);
        assert!(source_gid(&grh).unwrap().is_ipv4_mapped());
    }

    #[test]
    fn an_ipv6_header_is_taken_whole() {
        let mut grh = [0; GRH_LEN];
        grh[0] = 0x60;
        grh[8..10].copy_from_slice(&[0xfd, 0]);
        grh[23] = 1;
        // The middle of the addresses looks like IPv4, but for the checksum.
        grh[20] = 0x45;
        assert_eq!(source_gid(&grh).unwrap().to_string(), "fd00::4500:1");
    }

    #[test]
    fn garbage_has_no_source() {
        assert_eq!(source_gid(&[0; GRH_LEN]), None);
        assert_eq!(source_gid(&[0xff; GRH_LEN]), None);
    }
}
