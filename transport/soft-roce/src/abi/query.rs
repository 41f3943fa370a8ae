//! Attributes of device, port, GID and partition tables.

use std::ffi::c_int;
use std::mem::{self, offset_of};
use std::net::IpAddr;
use std::ptr;

use rdma_core_bindings::{
    __be16, _compat_ibv_port_attr, IBV_ATOMIC_HCA, IBV_DEVICE_CURR_QP_STATE_MOD,
    IBV_DEVICE_MEM_MGT_EXTENSIONS, IBV_DEVICE_MEM_WINDOW, IBV_DEVICE_MEM_WINDOW_TYPE_2B,
    IBV_DEVICE_RC_RNR_NAK_GEN, IBV_DEVICE_SRQ_RESIZE, IBV_DEVICE_SYS_IMAGE_GUID,
    IBV_DEVICE_UD_AV_PORT_ENFORCE, IBV_GID_TYPE_ROCE_V2, IBV_LINK_LAYER_ETHERNET, IBV_MTU_4096,
    IBV_PORT_ACTIVE, IBV_PORT_IP_BASED_GIDS, ibv_ah_attr, ibv_context, ibv_device_attr,
    ibv_device_attr_ex, ibv_gid, ibv_gid_entry, ibv_port_attr, ibv_query_device_ex_input,
};
use rustix::io::Errno;

use super::convention::{caught, errno_value, minus_one, set_errno};
use super::objects::{Context, object};
use crate::device::{SoftDevice, limits};
use crate::mr_table::MAX_REGIONS;
use crate::wire::to_ipv6;

/// Link width 4X and speed 25 Gbit/s per lane: what programs print as 100 Gbit/s.
const WIDTH_4X: u8 = 2;
const SPEED_EDR: u8 = 32;
/// The vendor number of a device of no vendor, as kernel rxe has it: no IEEE OUI is all ones.
const NO_VENDOR: u32 = 0xff_ffff;
/// Physical state "link up" of the InfiniBand port info.
const PHYS_LINK_UP: u8 = 5;
/// The part of `ibv_port_attr` that programs of before rdma-core 20 know.
const COMPAT_PORT_ATTR_LEN: usize = offset_of!(ibv_port_attr, port_cap_flags2);

pub(super) unsafe extern "C" fn query_device(
    context: *mut ibv_context,
    device_attr: *mut ibv_device_attr,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        return libc::EINVAL;
    };
    errno_value(&open.device, || {
        let attr = device_attributes(&open.device);
        // SAFETY: the caller's struct holds an `ibv_device_attr`.
        unsafe { device_attr.write(attr) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    attr_size: usize,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        return libc::EINVAL;
    };
    errno_value(&open.device, || {
        // SAFETY: not NULL, hence a query input of the caller.
        if !input.is_null() && unsafe { (*input).comp_mask } != 0 {
            return Err(Errno::INVAL);
        }
        if attr_size < size_of::<ibv_device_attr>() {
            return Err(Errno::INVAL);
        }
        // SAFETY: integers and fixed arrays, for which zero says "not supported".
        let mut whole: ibv_device_attr_ex = unsafe { mem::zeroed() };
        whole.orig_attr = device_attributes(&open.device);
        whole.device_cap_flags_ex = u64::from(whole.orig_attr.device_cap_flags);
        whole.phys_port_cnt_ex = u32::from(whole.orig_attr.phys_port_cnt);
        // SAFETY: the caller's struct is `attr_size` bytes long.
        unsafe { write_prefix(attr, attr_size, &whole) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn query_port(
    context: *mut ibv_context,
    port_num: u8,
    port_attr: *mut _compat_ibv_port_attr,
) -> c_int {
    // SAFETY: the caller's struct is the old one.
    unsafe { query_port_ex(context, port_num, port_attr.cast(), COMPAT_PORT_ATTR_LEN) }
}

pub(super) unsafe extern "C" fn query_port_ex(
    context: *mut ibv_context,
    port_num: u8,
    port_attr: *mut ibv_port_attr,
    port_attr_len: usize,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        return libc::EINVAL;
    };
    errno_value(&open.device, || {
        check_port(port_num.into())?;
        // SAFETY: the caller's struct is `port_attr_len` bytes long.
        unsafe { write_prefix(port_attr, port_attr_len, &port_attributes(&open.device)) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn query_gid(
    context: *mut ibv_context,
    port_num: u8,
    index: c_int,
    gid: *mut ibv_gid,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        set_errno(Errno::INVAL);
        return -1;
    };
    minus_one(&open.device, || {
        check_port(port_num.into())?;
        let is_inside = u32::try_from(index).is_ok_and(|index| index < limits::GID_TABLE_LEN);
        let value = match index {
            0 => gid_of(open.device.address()),
            // As the kernel has it for places that are empty.
            _ if is_inside => ibv_gid { raw: [0; 16] },
            _ => return Err(Errno::INVAL),
        };
        // SAFETY: the caller points to a GID for the result.
        unsafe { gid.write(value) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn query_pkey(
    context: *mut ibv_context,
    port_num: u8,
    index: c_int,
    pkey: *mut __be16,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        set_errno(Errno::INVAL);
        return -1;
    };
    minus_one(&open.device, || {
        check_port(port_num.into())?;
        if index != 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the caller points to a P_Key for the result.
        unsafe { pkey.write(limits::PKEY.to_be()) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn get_pkey_index(
    context: *mut ibv_context,
    port_num: u8,
    pkey: __be16,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(_open) = (unsafe { object::<Context>(context) }) else {
        return -1;
    };
    let is_ours = u16::from_be(pkey) == limits::PKEY;
    if check_port(port_num.into()).is_ok() && is_ours {
        0
    } else {
        -1
    }
}

pub(super) unsafe extern "C" fn query_gid_ex(
    context: *mut ibv_context,
    port_num: u32,
    gid_index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    entry_size: usize,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        return libc::EINVAL;
    };
    errno_value(&open.device, || {
        check_port(port_num)?;
        if flags != 0 || gid_index >= limits::GID_TABLE_LEN {
            return Err(Errno::INVAL);
        }
        if gid_index != 0 {
            return Err(Errno::NODATA);
        }
        // SAFETY: the caller's entry is `entry_size` bytes long.
        unsafe { write_prefix(entry, entry_size, &gid_entry(&open.device)) };
        Ok(())
    })
}

pub(super) unsafe extern "C" fn query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max_entries: usize,
    flags: u32,
    entry_size: usize,
) -> isize {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        return -(libc::EINVAL as isize);
    };
    let result = caught(Some(&open.device), || {
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        if max_entries == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the caller's first entry is `entry_size` bytes long.
        unsafe { write_prefix(entries, entry_size, &gid_entry(&open.device)) };
        Ok(1)
    });
    result.unwrap_or_else(|errno| -(errno.raw_os_error() as isize))
}

pub(super) unsafe extern "C" fn resolve_eth_l2_from_gid(
    context: *mut ibv_context,
    attr: *mut ibv_ah_attr,
    eth_mac: *mut u8,
    vid: *mut u16,
) -> c_int {
    // SAFETY: the caller passes an open context or NULL.
    let Ok(open) = (unsafe { object::<Context>(context) }) else {
        return libc::EINVAL;
    };
    errno_value(&open.device, || {
        // SAFETY: the caller passes address attributes, which nobody changes during the call.
        let gid = unsafe { (*attr).grh.dgid };
        // SAFETY: every bit pattern of a GID is 16 bytes.
        let address = peer_of(open.device.address(), unsafe { gid.raw })?;
        let mac = SoftDevice::mac_of(address);
        // SAFETY: `eth_mac` has room for the six bytes of an Ethernet address.
        unsafe { ptr::copy_nonoverlapping(mac.as_ptr(), eth_mac, mac.len()) };
        // SAFETY: `vid` points to the caller's VLAN; 0xffff says that there is none.
        unsafe { vid.write(0xffff) };
        Ok(())
    })
}

/// The address of the peer that has this GID, which a device at `own` can reach: one of its own family.
pub(super) fn peer_of(own: IpAddr, gid: [u8; 16]) -> Result<IpAddr, Errno> {
    let peer = IpAddr::from(gid).to_canonical();
    if peer.is_ipv4() == own.is_ipv4() && !peer.is_unspecified() {
        Ok(peer)
    } else {
        Err(Errno::INVAL)
    }
}

pub(super) fn gid_of(address: IpAddr) -> ibv_gid {
    ibv_gid {
        raw: to_ipv6(address).octets(),
    }
}

fn gid_entry(device: &SoftDevice) -> ibv_gid_entry {
    ibv_gid_entry {
        gid: gid_of(device.address()),
        gid_index: 0,
        port_num: limits::PORT.into(),
        gid_type: IBV_GID_TYPE_ROCE_V2,
        ndev_ifindex: device.interface_index(),
    }
}

fn check_port(port_num: u32) -> Result<(), Errno> {
    if port_num == u32::from(limits::PORT) {
        Ok(())
    } else {
        Err(Errno::INVAL)
    }
}

/// Writes as much of `value` as a caller with a struct of `len` bytes knows, and zeros beyond.
///
/// # Safety
///
/// `len` bytes at `to` are the caller's and writable.
unsafe fn write_prefix<T: Copy>(to: *mut T, len: usize, value: &T) {
    let known = len.min(size_of::<T>());
    // SAFETY: `known` is at most the length of both.
    unsafe { ptr::copy_nonoverlapping(ptr::from_ref(value).cast::<u8>(), to.cast(), known) };
    // SAFETY: the rest of the caller's `len` bytes, possibly none.
    unsafe { ptr::write_bytes(to.cast::<u8>().wrapping_add(known), 0, len - known) };
}

fn device_attributes(device: &SoftDevice) -> ibv_device_attr {
    // SAFETY: integers and a character array, for which zero says "none".
    let mut attr: ibv_device_attr = unsafe { mem::zeroed() };
    for (to, byte) in attr
        .fw_ver
        .iter_mut()
        .zip(env!("CARGO_PKG_VERSION").bytes())
    {
        *to = byte.cast_signed();
    }
    attr.node_guid = device.node_guid();
    attr.sys_image_guid = device.node_guid();
    attr.max_mr_size = u64::MAX;
    attr.vendor_id = NO_VENDOR;
    attr.page_size_cap = 0xffff_f000;
    attr.max_qp = int(crate::device::QP_COUNT_MAX);
    attr.max_qp_wr = int(limits::QP_WR_MAX);
    // As rxe: of the memory management extensions, programs get the invalidations.
    attr.device_cap_flags = IBV_DEVICE_CURR_QP_STATE_MOD
        | IBV_DEVICE_UD_AV_PORT_ENFORCE
        | IBV_DEVICE_SYS_IMAGE_GUID
        | IBV_DEVICE_RC_RNR_NAK_GEN
        | IBV_DEVICE_SRQ_RESIZE
        | IBV_DEVICE_MEM_WINDOW
        | IBV_DEVICE_MEM_MGT_EXTENSIONS
        | IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    attr.max_sge = int(limits::SGE_MAX);
    attr.max_sge_rd = int(limits::SGE_MAX);
    attr.max_cq = int(limits::OBJECT_COUNT_MAX);
    attr.max_cqe = int(limits::CQE_MAX);
    attr.max_mr = c_int::try_from(MAX_REGIONS).unwrap_or(c_int::MAX);
    attr.max_mw = attr.max_mr;
    attr.max_ah = int(limits::OBJECT_COUNT_MAX);
    attr.max_pd = int(limits::OBJECT_COUNT_MAX);
    attr.max_qp_rd_atom = limits::RD_ATOMIC_MAX.into();
    attr.max_qp_init_rd_atom = limits::RD_ATOMIC_MAX.into();
    attr.max_res_rd_atom = c_int::from(limits::RD_ATOMIC_MAX) * attr.max_qp;
    attr.atomic_cap = IBV_ATOMIC_HCA;
    attr.max_srq = int(limits::OBJECT_COUNT_MAX);
    attr.max_srq_wr = int(limits::SRQ_WR_MAX);
    attr.max_srq_sge = int(limits::SGE_MAX);
    attr.max_pkeys = 1;
    attr.phys_port_cnt = limits::PORT;
    attr
}

fn port_attributes(device: &SoftDevice) -> ibv_port_attr {
    // SAFETY: integers, for which zero says "none".
    let mut attr: ibv_port_attr = unsafe { mem::zeroed() };
    attr.state = IBV_PORT_ACTIVE;
    attr.max_mtu = IBV_MTU_4096;
    attr.active_mtu = device.active_mtu() as u32;
    attr.gid_tbl_len = int(limits::GID_TABLE_LEN);
    attr.port_cap_flags = IBV_PORT_IP_BASED_GIDS;
    attr.max_msg_sz = limits::MESSAGE_LEN_MAX;
    attr.pkey_tbl_len = 1;
    attr.bad_pkey_cntr = u32::try_from(device.engine().counters().bad_pkey).unwrap_or(u32::MAX);
    attr.max_vl_num = 1;
    attr.active_width = WIDTH_4X;
    attr.active_speed = SPEED_EDR;
    attr.phys_state = PHYS_LINK_UP;
    attr.link_layer = u8::try_from(IBV_LINK_LAYER_ETHERNET).unwrap_or(0);
    attr
}

fn int(value: u32) -> c_int {
    c_int::try_from(value).unwrap_or(c_int::MAX)
}
