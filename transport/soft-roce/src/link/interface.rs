//! The network interface that has a device's address.
//!
//! # Safety
//!
//! The list of `getifaddrs` lives until `freeifaddrs`, which is called once at the end of the only
//! function that walks it.

#![allow(
    unsafe_code,
    reason = "getifaddrs lists C structs that only pointers reach"
)]

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ptr;

/// What the GID table and the port attributes say about the network below.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interface {
    /// The interface's index, 0 if none was found.
    pub(crate) index: u32,
    /// Largest IP packet in bytes.
    pub(crate) mtu: u32,
}

/// What is assumed of an interface that cannot be asked: any Ethernet takes this.
const MTU_DEFAULT: u32 = 1500;

impl Interface {
    /// The interface that has `address`, or one whose subnet contains it: all of 127.0.0.0/8 is
    /// local, though the loopback interface lists 127.0.0.1 alone.
    pub(crate) fn of(address: IpAddr) -> Self {
        let found = Self::find(|own, _mask| own == address)
            .or_else(|| Self::find(|own, mask| is_in_subnet(address, own, mask)));
        found.unwrap_or(Self {
            index: 0,
            mtu: MTU_DEFAULT,
        })
    }

    fn find(matches: impl Fn(IpAddr, IpAddr) -> bool) -> Option<Self> {
        let mut first = ptr::null_mut();
        // SAFETY: writes the head of a list, or nothing and -1.
        if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
            return None;
        }
        let mut next = first;
        let mut found = None;
        while found.is_none() && !next.is_null() {
            // SAFETY: an entry of the list, which lives until `freeifaddrs`.
            let entry = unsafe { &*next };
            // SAFETY: the addresses of a list entry are NULL or socket addresses.
            let own = unsafe { ip(entry.ifa_addr) };
            // SAFETY: as above.
            let mask = unsafe { ip(entry.ifa_netmask) };
            if own.zip(mask).is_some_and(|(own, mask)| matches(own, mask)) {
                // SAFETY: the name of a list entry is a C string.
                let name = unsafe { CStr::from_ptr(entry.ifa_name) };
                found = Some(Self::named(name));
            }
            next = entry.ifa_next;
        }
        // SAFETY: the head of the list, not used any more.
        unsafe { libc::freeifaddrs(first) };
        found
    }

    fn named(name: &CStr) -> Self {
        // SAFETY: a C string; the function only reads it.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        let path = format!("/sys/class/net/{}/mtu", name.to_string_lossy());
        let mtu = std::fs::read_to_string(path)
            .ok()
            .and_then(|mtu| mtu.trim().parse().ok());
        Self {
            index,
            mtu: mtu.unwrap_or(MTU_DEFAULT),
        }
    }
}

fn is_in_subnet(address: IpAddr, own: IpAddr, mask: IpAddr) -> bool {
    match (address, own, mask) {
        (IpAddr::V4(address), IpAddr::V4(own), IpAddr::V4(mask)) => own & mask == address & mask,
        (IpAddr::V6(address), IpAddr::V6(own), IpAddr::V6(mask)) => own & mask == address & mask,
        _ => false,
    }
}

/// The IP address in a socket address.
///
/// # Safety
///
/// `address` is NULL or points to a socket address as long as its family says.
unsafe fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: not NULL, so at least a family is there.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: the family says so; the copy tolerates any alignment.
            let inet = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(Ipv4Addr::from_bits(u32::from_be(inet.sin_addr.s_addr)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let inet6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(Ipv6Addr::from(inet6.sin6_addr.s6_addr).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_loopback_address_is_on_the_loopback_interface() {
        let lo = Interface::of(Ipv4Addr::LOCALHOST.into());
        assert_ne!(lo.index, 0);
        assert_eq!(
            Interface::of(Ipv4Addr::new(127, 201, 3, 4).into()).index,
            lo.index
        );
        assert!(
            lo.mtu >= 16 * 1024,
            "the loopback interface takes large packets: {}",
            lo.mtu
        );
    }
}
