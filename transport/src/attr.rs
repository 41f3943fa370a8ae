//! Limits of a device and state of a port, as named fields.

use std::fmt;

use rdma_core_bindings as ffi;

use crate::types::Mtu;

/// Limits of a device; `ibv_device_attr`.
#[derive(Debug, Clone)]
pub struct DeviceAttr {
    /// Firmware version, as text.
    pub fw_ver: String,
    /// Identity of the device, in host byte order.
    pub node_guid: u64,
    /// Vendor number.
    pub vendor_id: u32,
    /// Vendor's part number.
    pub vendor_part_id: u32,
    /// Longest registration in bytes.
    pub max_mr_size: u64,
    /// Most queue pairs.
    pub max_qp: u32,
    /// Most work requests in one queue.
    pub max_qp_wr: u32,
    /// Most scatter/gather entries in one request.
    pub max_sge: u32,
    /// Most completion queues.
    pub max_cq: u32,
    /// Most entries in one completion queue.
    pub max_cqe: u32,
    /// Most registrations.
    pub max_mr: u32,
    /// Most protection domains.
    pub max_pd: u32,
    /// Most READs and atomics of one peer that a queue pair can answer at once.
    pub max_qp_rd_atom: u8,
    /// Most READs and atomics that a queue pair can have outstanding.
    pub max_qp_init_rd_atom: u8,
    /// True if FETCH_ADD and CMP_SWAP work, at least among themselves.
    pub has_atomics: bool,
    /// Most address handles; 0 where the device does not say.
    pub max_ah: u32,
    /// Most memory windows; 0 where there are none.
    pub max_mw: u32,
    /// Most shared receive queues; 0 where there are none.
    pub max_srq: u32,
    /// Most requests in one shared receive queue.
    pub max_srq_wr: u32,
    /// Most scatter/gather entries in one request of a shared receive queue.
    pub max_srq_sge: u32,
    /// Number of ports; they count from 1.
    pub phys_port_cnt: u8,
}

impl DeviceAttr {
    pub(crate) fn from_ffi(attr: &ffi::ibv_device_attr) -> DeviceAttr {
        let count = |value: i32| u32::try_from(value).unwrap_or(0);
        let depth = |value: i32| u8::try_from(value.max(0)).unwrap_or(u8::MAX);
        let fw_ver = attr.fw_ver.iter().take_while(|c| **c != 0);
        DeviceAttr {
            fw_ver: fw_ver.map(|c| char::from(c.cast_unsigned())).collect(),
            node_guid: u64::from_be(attr.node_guid),
            vendor_id: attr.vendor_id,
            vendor_part_id: attr.vendor_part_id,
            max_mr_size: attr.max_mr_size,
            max_qp: count(attr.max_qp),
            max_qp_wr: count(attr.max_qp_wr),
            max_sge: count(attr.max_sge),
            max_cq: count(attr.max_cq),
            max_cqe: count(attr.max_cqe),
            max_mr: count(attr.max_mr),
            max_pd: count(attr.max_pd),
            max_qp_rd_atom: depth(attr.max_qp_rd_atom),
            max_qp_init_rd_atom: depth(attr.max_qp_init_rd_atom),
            has_atomics: attr.atomic_cap != ffi::IBV_ATOMIC_NONE,
            max_ah: count(attr.max_ah),
            max_mw: count(attr.max_mw),
            max_srq: count(attr.max_srq),
            max_srq_wr: count(attr.max_srq_wr),
            max_srq_sge: count(attr.max_srq_sge),
            phys_port_cnt: attr.phys_port_cnt,
        }
    }
}

/// State of a port; `ibv_port_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// No link: cable, driver or port type.
    Down,
    /// Link, but no subnet manager has configured it (InfiniBand).
    Init,
    /// Configured, about to be ACTIVE.
    Armed,
    /// Traffic flows.
    Active,
    /// ACTIVE, with a link error being repaired.
    ActiveDefer,
    /// A state this version does not know.
    Unknown(u32),
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortState::Down => f.write_str("DOWN"),
            PortState::Init => f.write_str("INIT"),
            PortState::Armed => f.write_str("ARMED"),
            PortState::Active => f.write_str("ACTIVE"),
            PortState::ActiveDefer => f.write_str("ACTIVE_DEFER"),
            PortState::Unknown(code) => write!(f, "state {code}"),
        }
    }
}

/// What runs below a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// Not told; treated as InfiniBand, as old libraries mean it.
    Unspecified,
    /// InfiniBand.
    InfiniBand,
    /// Ethernet, so RoCE (or iWARP).
    Ethernet,
}

impl fmt::Display for LinkLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LinkLayer::Unspecified => "unspecified",
            LinkLayer::InfiniBand => "InfiniBand",
            LinkLayer::Ethernet => "Ethernet",
        })
    }
}

/// A port's state; `ibv_port_attr`.
#[derive(Debug, Clone)]
pub struct PortAttr {
    /// Its number, from 1.
    pub port_num: u8,
    /// Its state.
    pub state: PortState,
    /// Largest path MTU it could have.
    pub max_mtu: Option<Mtu>,
    /// Largest path MTU in effect.
    pub active_mtu: Option<Mtu>,
    /// Size of the GID table; most entries are empty.
    pub gid_tbl_len: usize,
    /// Size of the partition key table.
    pub pkey_tbl_len: u16,
    /// Longest message in bytes.
    pub max_msg_sz: u32,
    /// Local identifier; 0 on RoCE.
    pub lid: u16,
    /// What runs below.
    pub link_layer: LinkLayer,
    /// Bit mask of the link width, as the subnet manager encodes it.
    pub active_width: u8,
    /// Link speed, as the subnet manager encodes it.
    pub active_speed: u8,
    /// State of the physical link, as the subnet manager encodes it; 5 is link up.
    pub phys_state: u8,
}

impl PortAttr {
    pub(crate) fn from_ffi(port_num: u8, attr: &ffi::ibv_port_attr) -> PortAttr {
        PortAttr {
            port_num,
            state: match attr.state {
                ffi::IBV_PORT_DOWN => PortState::Down,
                ffi::IBV_PORT_INIT => PortState::Init,
                ffi::IBV_PORT_ARMED => PortState::Armed,
                ffi::IBV_PORT_ACTIVE => PortState::Active,
                ffi::IBV_PORT_ACTIVE_DEFER => PortState::ActiveDefer,
                other => PortState::Unknown(other),
            },
            max_mtu: Mtu::from_code(attr.max_mtu),
            active_mtu: Mtu::from_code(attr.active_mtu),
            gid_tbl_len: usize::try_from(attr.gid_tbl_len).unwrap_or(0),
            pkey_tbl_len: attr.pkey_tbl_len,
            max_msg_sz: attr.max_msg_sz,
            lid: attr.lid,
            link_layer: match u32::from(attr.link_layer) {
                ffi::IBV_LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
                ffi::IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
                _ => LinkLayer::Unspecified,
            },
            active_width: attr.active_width,
            active_speed: attr.active_speed,
            phys_state: attr.phys_state,
        }
    }

    /// What to do about a port that is not ACTIVE.
    pub fn remedy(&self) -> Option<&'static str> {
        match (self.state, self.link_layer) {
            (PortState::Active | PortState::ActiveDefer, _) => None,
            (PortState::Init | PortState::Armed, LinkLayer::Ethernet) => {
                Some("wait, or bring its network interface up (ip link set ... up)")
            }
            (PortState::Init | PortState::Armed, _) => Some(
                "no subnet manager has configured it: start one (opensm) or check the switch's",
            ),
            (_, LinkLayer::Ethernet) => {
                Some("bring its network interface up (ip link set ... up), check cable and driver")
            }
            _ => Some("check cable, driver and port type (InfiniBand or Ethernet)"),
        }
    }
}
