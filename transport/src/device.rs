//! An opened device: its limits, ports and GIDs.
//!
//! # Safety
//!
//! `ContextInner` owns one `ibv_context` from `ibv_open_device` until it is dropped. Every object made
//! from it holds an `Arc` of it, so it is closed last. libibverbs is thread safe (its functions may be
//! called on one object from several threads, except that nobody may use what is being destroyed), and
//! the software device promises the same.
#![allow(unsafe_code, reason = "calls the verbs table")]

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rdma_core_bindings as ffi;
use rdma_core_bindings::Verbs;
use soft_roce::SoftDevice;

use crate::error::{Error, Result};
use crate::gid::{self, GidEntry};
use crate::select::DeviceSelector;
use crate::types::{Gid, GidType, Mtu};

/// The most GID table entries that are read; tables of adapters have up to 256 per port.
const GIDS_MAX: usize = 1024;

/// An opened device. Clones share it; it is closed when the last object made from it is gone.
#[derive(Clone)]
pub struct Context(pub(crate) Arc<ContextInner>);

pub(crate) struct ContextInner {
    pub(crate) verbs: &'static Verbs,
    context: NonNull<ffi::ibv_context>,
    name: String,
    /// Keeps the software device alive for as long as it is open.
    soft: Option<Arc<SoftDevice>>,
    /// The process that opened it: a forked child must touch nothing.
    owner: rustix::process::Pid,
}

// SAFETY: libibverbs and the software device allow use from any thread (module docs).
unsafe impl Send for ContextInner {}
// SAFETY: as above.
unsafe impl Sync for ContextInner {}

impl Context {
    /// Opens the device that `selector` names.
    ///
    /// # Errors
    ///
    /// [`Error::Load`] if a real device is named and libibverbs is absent, [`Error::NoDevice`] if there is
    /// none of that name, [`Error::SoftBind`] if the software device's address is taken, and
    /// [`Error::Verb`] if the device cannot be opened.
    ///
    /// # References
    ///
    /// `ibv_open_device(3)`.
    pub fn open(selector: &DeviceSelector) -> Result<Context> {
        crate::select::open(selector)
    }

    pub(crate) fn open_soft(device: Arc<SoftDevice>) -> Result<Context> {
        let verbs = soft_roce::verbs();
        let name = device.name().to_owned();
        let found = with_devices(verbs, |devices| {
            devices
                .iter()
                .find(|found| device_name(verbs, **found) == name)
                .map(|found| open_device(verbs, *found, name.clone(), Some(device)))
        })?;
        found.unwrap_or_else(|| {
            Err(Error::NoDevice {
                name,
                available: "the software devices of this process".to_owned(),
            })
        })
    }

    pub(crate) fn open_real(verbs: &'static Verbs, name: &str) -> Result<Option<Context>> {
        with_devices(verbs, |devices| {
            devices
                .iter()
                .find(|found| device_name(verbs, **found) == name)
                .map(|found| open_device(verbs, *found, name.to_owned(), None))
                .transpose()
        })?
    }

    /// The device's name, such as `mlx5_0` or `soft@127.0.0.2`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// True for the software device.
    pub fn is_soft(&self) -> bool {
        self.0.soft.is_some()
    }

    /// Reads the device's limits.
    ///
    /// # Errors
    ///
    /// [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_query_device(3)`.
    pub fn attr(&self) -> Result<DeviceAttr> {
        let mut attr = ffi::ibv_device_attr::default();
        // SAFETY: an open context of this table, and a place for the result.
        let ret = unsafe { (self.0.verbs.query_device)(self.0.as_ptr(), &raw mut attr) };
        self.0.check("ibv_query_device", ret)?;
        Ok(DeviceAttr::from_ffi(&attr))
    }

    /// Reads the state of port `port`; ports count from 1.
    ///
    /// # Errors
    ///
    /// [`Error::NoPort`] or [`Error::Verb`].
    ///
    /// # References
    ///
    /// `ibv_query_port(3)`.
    pub fn port(&self, port: u8) -> Result<PortAttr> {
        let mut attr = ffi::ibv_port_attr::default();
        // SAFETY: an open context of this table, and a place for the result.
        let ret =
            unsafe { ffi::ibv_query_port(self.0.verbs, self.0.as_ptr(), port, &raw mut attr) };
        if ret == libc::EINVAL {
            let device = self.name().to_owned();
            let port_count = self.attr()?.phys_port_cnt;
            return Err(Error::NoPort {
                device,
                port,
                port_count,
            });
        }
        self.0.check("ibv_query_port", ret)?;
        Ok(PortAttr::from_ffi(port, &attr))
    }

    /// The first ACTIVE port.
    ///
    /// # Errors
    ///
    /// [`Error::NoActivePort`] tells the state of each port and what to do about it.
    pub fn active_port(&self) -> Result<PortAttr> {
        let mut states = Vec::new();
        for port in 1..=self.attr()?.phys_port_cnt {
            let attr = self.port(port)?;
            if attr.state == PortState::Active {
                return Ok(attr);
            }
            states.push(format!("port {port} is {}", attr.state));
            states.extend(attr.remedy().map(str::to_owned));
        }
        Err(Error::NoActivePort {
            device: self.name().to_owned(),
            states: states.join(", "),
        })
    }

    /// Reads the filled entries of a port's GID table, in table order.
    ///
    /// # Errors
    ///
    /// [`Error::NoPort`] or [`Error::Verb`].
    pub fn gids(&self, port: u8) -> Result<Vec<GidEntry>> {
        let attr = self.port(port)?;
        let mut gids = Vec::new();
        for index in 0..attr.gid_tbl_len.min(GIDS_MAX) {
            gids.extend(self.gid(port, u32::try_from(index).unwrap_or(u32::MAX))?);
        }
        Ok(gids)
    }

    fn gid(&self, port: u8, index: u32) -> Result<Option<GidEntry>> {
        let mut entry = ffi::ibv_gid_entry::default();
        // SAFETY: an open context of this table, and a place for the result.
        let ret = unsafe {
            ffi::ibv_query_gid_ex(
                self.0.verbs,
                self.0.as_ptr(),
                u32::from(port),
                index,
                &raw mut entry,
                0,
            )
        };
        match ret {
            libc::ENODATA => return Ok(None),
            libc::EOPNOTSUPP => return self.gid_without_type(port, index),
            _ => self.0.check("ibv_query_gid_ex", ret)?,
        }
        let entry = GidEntry {
            index: entry.gid_index,
            // SAFETY: both views of the union are 16 plain bytes.
            gid: Gid(unsafe { entry.gid.raw }),
            gid_type: GidType::from_code(entry.gid_type),
            netdev: gid::netdev_name(entry.ndev_ifindex),
        };
        Ok((!entry.gid.is_zero()).then_some(entry))
    }

    /// For libraries older than rdma-core 32: the GID by verbs, its type and interface from sysfs.
    fn gid_without_type(&self, port: u8, index: u32) -> Result<Option<GidEntry>> {
        let mut gid = ffi::ibv_gid::default();
        let signed = i32::try_from(index).unwrap_or(i32::MAX);
        // SAFETY: an open context of this table, and a place for the result.
        let ret = unsafe { (self.0.verbs.query_gid)(self.0.as_ptr(), port, signed, &raw mut gid) };
        if ret != 0 {
            return Err(self.0.last_error("ibv_query_gid"));
        }
        // SAFETY: both views of the union are 16 plain bytes.
        let gid = Gid(unsafe { gid.raw });
        Ok((!gid.is_zero()).then(|| gid::from_sysfs(self.name(), port, index, gid)))
    }

    /// The GID to connect with on `port`: RoCE v2 with an IPv4 address of an interface that is up, else
    /// the next best; on an InfiniBand port its first GID.
    ///
    /// # Errors
    ///
    /// [`Error::NoGid`] lists what the table holds instead.
    pub fn best_gid(&self, port: u8) -> Result<GidEntry> {
        let link_layer = self.port(port)?.link_layer;
        let gids = self.gids(port)?;
        gid::best(&gids, link_layer)
            .cloned()
            .ok_or_else(|| Error::NoGid {
                device: self.name().to_owned(),
                port,
                found: gid::describe(&gids),
            })
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.0.name).finish()
    }
}

impl ContextInner {
    pub(crate) fn as_ptr(&self) -> *mut ffi::ibv_context {
        self.context.as_ptr()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn async_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, and `async_fd` is written only before `ibv_open_device` returns.
        let fd = unsafe { (*self.as_ptr()).async_fd };
        // SAFETY: the descriptor is open for as long as the context, which `self` keeps.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Turns a returned errno value into a result.
    pub(crate) fn check(&self, verb: &'static str, errno: i32) -> Result<()> {
        if errno == 0 {
            return Ok(());
        }
        Err(self.verb_error(verb, io::Error::from_raw_os_error(errno)))
    }

    /// The error of a verb that sets `errno`.
    pub(crate) fn last_error(&self, verb: &'static str) -> Error {
        self.verb_error(verb, io::Error::last_os_error())
    }

    fn verb_error(&self, verb: &'static str, source: io::Error) -> Error {
        Error::Verb {
            verb,
            device: self.name.clone(),
            source,
        }
    }

    /// True in the process that opened the device. A forked child has a copy of every object, whose
    /// destruction would pull the parent's device down; it leaks them.
    pub(crate) fn is_owner(&self) -> bool {
        rustix::process::getpid() == self.owner
    }

    /// Turns the result of a destroying verb into a result, and reports and counts a failure.
    ///
    /// The caller must then keep, for ever, everything that the device might still touch.
    pub(crate) fn check_destroyed(&self, verb: &'static str, errno: i32) -> Result<()> {
        if errno == 0 {
            return Ok(());
        }
        LEAKED.fetch_add(1, Ordering::Relaxed);
        let error = Error::Destroy {
            verb,
            device: self.name.clone(),
            source: io::Error::from_raw_os_error(errno),
        };
        tracing::error!(%error, "verbs object leaked");
        Err(error)
    }
}

impl Drop for ContextInner {
    fn drop(&mut self) {
        let closed = self.is_owner().then(|| {
            // SAFETY: every object made from the context held an `Arc` of it, so none is left.
            let ret = unsafe { (self.verbs.close_device)(self.as_ptr()) };
            let errno = if ret == 0 { 0 } else { libc::EBUSY };
            self.check_destroyed("ibv_close_device", errno)
        });
        if !matches!(closed, Some(Ok(()))) {
            // The context is still open and needs its device.
            std::mem::forget(self.soft.take());
        }
    }
}

/// Counts objects that could not be destroyed; pairs with nothing, it is a statistic.
static LEAKED: AtomicU64 = AtomicU64::new(0);

/// How many verbs objects this process could not destroy and therefore keeps for ever, with the memory
/// that their devices might still touch. Each was also reported by `tracing` as an error.
pub fn leaked_objects() -> u64 {
    LEAKED.load(Ordering::Relaxed)
}

/// Calls `f` with the devices of the table; they live until it returns.
fn with_devices<T>(verbs: &Verbs, f: impl FnOnce(&[*mut ffi::ibv_device]) -> T) -> Result<T> {
    let mut count = 0;
    // SAFETY: a place for the count.
    let list = unsafe { (verbs.get_device_list)(&raw mut count) };
    let Some(list) = NonNull::new(list) else {
        return Err(Error::DeviceList {
            source: io::Error::last_os_error(),
        });
    };
    // SAFETY: the library returned `count` devices and a NULL behind them.
    let devices =
        unsafe { std::slice::from_raw_parts(list.as_ptr(), usize::try_from(count).unwrap_or(0)) };
    let result = f(devices);
    // SAFETY: the list came from `get_device_list`, is not NULL, and is not used again.
    unsafe { (verbs.free_device_list)(list.as_ptr()) };
    Ok(result)
}

/// The names of the devices of a table.
pub(crate) fn device_names(verbs: &Verbs) -> Result<Vec<String>> {
    with_devices(verbs, |devices| {
        devices
            .iter()
            .map(|device| device_name(verbs, *device))
            .collect()
    })
}

fn device_name(verbs: &Verbs, device: *mut ffi::ibv_device) -> String {
    // SAFETY: a device of a list that has not been freed.
    let name = unsafe { (verbs.get_device_name)(device) };
    if name.is_null() {
        return String::new();
    }
    // SAFETY: the library returns a NUL terminated string that lives as long as the device.
    unsafe { CStr::from_ptr(name) }
        .to_string_lossy()
        .into_owned()
}

fn open_device(
    verbs: &'static Verbs,
    device: *mut ffi::ibv_device,
    name: String,
    soft: Option<Arc<SoftDevice>>,
) -> Result<Context> {
    // SAFETY: a device of a list that has not been freed.
    let context = unsafe { (verbs.open_device)(device) };
    let Some(context) = NonNull::new(context) else {
        let source = io::Error::last_os_error();
        return Err(Error::Verb {
            verb: "ibv_open_device",
            device: name,
            source,
        });
    };
    let owner = rustix::process::getpid();
    let inner = ContextInner {
        verbs,
        context,
        name,
        soft,
        owner,
    };
    crate::events::prepare_descriptor(&inner, inner.async_fd())?;
    Ok(Context(Arc::new(inner)))
}

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
    /// Most memory windows; 0 where there are none.
    pub max_mw: u32,
    /// Number of ports; they count from 1.
    pub phys_port_cnt: u8,
}

impl DeviceAttr {
    fn from_ffi(attr: &ffi::ibv_device_attr) -> DeviceAttr {
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
            max_mw: count(attr.max_mw),
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
    fn from_ffi(port_num: u8, attr: &ffi::ibv_port_attr) -> PortAttr {
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
