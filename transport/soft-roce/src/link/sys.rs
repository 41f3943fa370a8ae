//! The socket calls that the standard library does not have.
//!
//! # Safety
//!
//! Every pointer handed to the kernel comes from a slice or an array that outlives the call, and the
//! length beside it is that slice's or array's own. The kernel keeps no pointer after the call.
#![allow(
    unsafe_code,
    reason = "sendmmsg, recvmmsg and setsockopt are C functions"
)]

use std::io;
use std::mem::{size_of, size_of_val};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_uint, socklen_t};

use super::rx_buf::SLOTS_MAX;

/// Datagrams of one send at most: enough to make the call's own cost small.
const SEND_BATCH: usize = 16;

/// One datagram, or several of equal size, on their way out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outgoing<'a> {
    pub(super) to: SocketAddr,
    pub(super) bytes: &'a [u8],
    /// Asks the kernel to cut `bytes` into datagrams of this many bytes.
    pub(super) segment_len: Option<u16>,
}

/// One datagram, or several of equal size, that came in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    pub(super) src: SocketAddr,
    pub(super) len: usize,
    /// Bytes of each datagram but the last, if the kernel joined several.
    pub(super) segment_len: Option<usize>,
}

/// A control message with one value, laid out as `CMSG_SPACE` does.
#[repr(C)]
#[derive(Clone, Copy)]
struct Control<T> {
    header: libc::cmsghdr,
    value: T,
}

/// A socket address of either family, or none (family 0).
#[repr(C)]
#[derive(Clone, Copy)]
union Address {
    v6: libc::sockaddr_in6,
    v4: libc::sockaddr_in,
    family: libc::sa_family_t,
}

/// What one message header points to.
#[derive(Clone, Copy)]
struct Parts<T> {
    address: Address,
    bytes: libc::iovec,
    control: Control<T>,
}

/// Sets an integer socket option.
pub(super) fn set_option(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: c_int,
) -> io::Result<()> {
    let len = socklen(size_of_val(&value));
    // SAFETY: the pointer is to `value`, which lives until the call returns, and `len` is its size.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends the first [`SEND_BATCH`] of `messages` and returns how many of them the kernel took.
///
/// An error is the first message's.
pub(super) fn send<'a>(
    fd: BorrowedFd<'_>,
    messages: impl Iterator<Item = Outgoing<'a>>,
) -> io::Result<usize> {
    let mut parts = [EMPTY_SEND; SEND_BATCH];
    let mut headers = [empty_header(); SEND_BATCH];
    let mut count = 0;
    for ((message, parts), header) in messages.zip(&mut parts).zip(&mut headers) {
        parts.address = to_sockaddr(message.to);
        parts.bytes.iov_base = message.bytes.as_ptr().cast_mut().cast();
        parts.bytes.iov_len = message.bytes.len();
        let has_control = message.segment_len.is_some();
        parts.control.value = message.segment_len.unwrap_or(0);
        point_at(
            header,
            parts,
            if has_control {
                size_of::<Control<u16>>()
            } else {
                0
            },
        );
        count += 1;
    }
    // SAFETY: the first `count` headers point to the first `count` parts, which live until the call
    // returns; these point to `messages`' bytes, borrowed for 'a. The kernel only reads the bytes.
    let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), headers.as_mut_ptr(), count, 0) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into `slots`, one datagram or joined run each, and returns how many were filled.
///
/// `filled` is called for each in order. An error is the first datagram's.
pub(super) fn recv<'a>(
    fd: BorrowedFd<'_>,
    slots: impl Iterator<Item = &'a mut [u8]>,
    out: &mut [Incoming; SLOTS_MAX],
) -> io::Result<usize> {
    let mut parts = [EMPTY_RECV; SLOTS_MAX];
    let mut headers = [empty_header(); SLOTS_MAX];
    let mut count = 0;
    for ((slot, parts), header) in slots.zip(&mut parts).zip(&mut headers) {
        parts.bytes.iov_base = slot.as_mut_ptr().cast();
        parts.bytes.iov_len = slot.len();
        point_at(header, parts, size_of::<Control<c_int>>());
        count += 1;
    }
    let no_timeout = std::ptr::null_mut();
    // SAFETY: the first `count` headers point to the first `count` parts, which live until the call
    // returns; these point to the slots, borrowed exclusively for 'a, with their own lengths.
    let filled = unsafe {
        libc::recvmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT,
            no_timeout,
        )
    };
    let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
    for ((header, parts), out) in headers.iter().zip(&parts).zip(out).take(filled) {
        *out = Incoming {
            src: from_sockaddr(&parts.address),
            len: header.msg_len as usize,
            segment_len: segment_len(&parts.control),
        };
    }
    Ok(filled)
}

impl Incoming {
    /// No datagram.
    pub(super) const NONE: Self = Self {
        src: SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)),
        len: 0,
        segment_len: None,
    };
}

/// The segment size, if the kernel reported one; otherwise `control` is as empty as it was.
fn segment_len(control: &Control<c_int>) -> Option<usize> {
    let kind = (control.header.cmsg_level, control.header.cmsg_type);
    let len = usize::try_from(control.value).ok().filter(|len| *len > 0);
    len.filter(|_| kind == (libc::SOL_UDP, libc::UDP_GRO))
}

/// Makes `header` describe `parts`, with `control_len` bytes of control message.
fn point_at<T>(header: &mut libc::mmsghdr, parts: &mut Parts<T>, control_len: usize) {
    let header = &mut header.msg_hdr;
    header.msg_name = (&raw mut parts.address).cast();
    header.msg_namelen = socklen(size_of::<Address>());
    header.msg_iov = &raw mut parts.bytes;
    header.msg_iovlen = 1;
    header.msg_control = if control_len == 0 {
        std::ptr::null_mut()
    } else {
        (&raw mut parts.control).cast()
    };
    header.msg_controllen = control_len as _;
}

const EMPTY_SEND: Parts<u16> = Parts {
    address: EMPTY_ADDRESS,
    bytes: EMPTY_BYTES,
    control: Control {
        header: libc::cmsghdr {
            cmsg_len: (size_of::<libc::cmsghdr>() + size_of::<u16>()) as _,
            cmsg_level: libc::SOL_UDP,
            cmsg_type: libc::UDP_SEGMENT,
        },
        value: 0,
    },
};

const EMPTY_RECV: Parts<c_int> = Parts {
    address: EMPTY_ADDRESS,
    bytes: EMPTY_BYTES,
    control: Control {
        header: libc::cmsghdr {
            cmsg_len: 0,
            cmsg_level: 0,
            cmsg_type: 0,
        },
        value: 0,
    },
};

const EMPTY_BYTES: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

const EMPTY_ADDRESS: Address = Address {
    v6: libc::sockaddr_in6 {
        sin6_family: 0,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
        sin6_scope_id: 0,
    },
};

fn empty_header() -> libc::mmsghdr {
    // SAFETY: a message header is made of integers and pointers (and, in some C libraries, of private
    // padding that a literal cannot name); all zeros is a value of each.
    unsafe { std::mem::zeroed() }
}

#[allow(clippy::cast_possible_truncation, reason = "the address family is 2")]
const INET: libc::sa_family_t = libc::AF_INET as libc::sa_family_t;
#[allow(clippy::cast_possible_truncation, reason = "the address family is 10")]
const INET6: libc::sa_family_t = libc::AF_INET6 as libc::sa_family_t;

fn to_sockaddr(address: SocketAddr) -> Address {
    let mut out = EMPTY_ADDRESS;
    match address {
        SocketAddr::V4(address) => {
            out.v4 = libc::sockaddr_in {
                sin_family: INET,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: address.ip().to_bits().to_be(),
                },
                sin_zero: [0; 8],
            };
        }
        SocketAddr::V6(address) => {
            out.v6 = libc::sockaddr_in6 {
                sin6_family: INET6,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: address.ip().octets(),
                },
                sin6_scope_id: address.scope_id(),
            };
        }
    }
    out
}

/// The address that the kernel wrote, which is of the socket's family.
fn from_sockaddr(address: &Address) -> SocketAddr {
    // SAFETY: every part of the union begins with the family, and all its bytes were initialised.
    if unsafe { address.family } == INET6 {
        // SAFETY: integers, all of them initialised.
        let v6 = unsafe { address.v6 };
        let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
        let port = u16::from_be(v6.sin6_port);
        SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into()
    } else {
        // SAFETY: integers, all of them initialised.
        let v4 = unsafe { address.v4 };
        let ip = Ipv4Addr::from_bits(u32::from_be(v4.sin_addr.s_addr));
        SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into()
    }
}

fn socklen(len: usize) -> socklen_t {
    c_uint::try_from(len).expect("socket structures are a few bytes long")
}
