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

use crate::attr::{DeviceAttr, PortAttr, PortState};
use crate::error::{Error, Result};
use crate::gid::{self, GidEntry};
use crate::select::DeviceSelector;
use crate::types::{Gid, GidType};

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
    /// The process that opened it. A forked child has copies of all objects, and destroying one there would
    /// pull it down here.
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

    /// Event counts of the device by name, kernel rxe's names where it has them: packets, retries, what was
    /// dropped. Empty if the device does not tell. They may include those of other programs.
    ///
    /// # References
    ///
    /// `/sys/class/infiniband/DEVICE/ports/PORT/hw_counters`.
    pub fn counters(&self, port: u8) -> Vec<(String, u64)> {
        if let Some(soft) = &self.0.soft {
            let named = soft.counters().named();
            return named.map(|(name, value)| (name.to_owned(), value)).into();
        }
        let dir = format!(
            "/sys/class/infiniband/{}/ports/{port}/hw_counters",
            self.name()
        );
        let Ok(files) = std::fs::read_dir(dir) else {
            return Vec::new();
        };
        let counter = |file: std::fs::DirEntry| {
            let value = std::fs::read_to_string(file.path()).ok()?;
            Some((
                file.file_name().into_string().ok()?,
                value.trim().parse().ok()?,
            ))
        };
        files.flatten().filter_map(counter).collect()
    }

    /// The GID to connect with on `port`: RoCE v2 with an IPv4 address of an interface that is up, else
    /// the next best; on an InfiniBand port its first GID.
    ///
    /// # Errors
    ///
    /// [`Error::NoGid`] lists what the table holds instead.
    pub fn best_gid(&self, port: u8) -> Result<GidEntry> {
        Ok(self.best_gids(port)?.0)
    }

    /// The same, and the best of the other version of IP if there is one.
    pub(crate) fn best_gids(&self, port: u8) -> Result<(GidEntry, Option<GidEntry>)> {
        let link_layer = self.port(port)?.link_layer;
        let gids = self.gids(port)?;
        let best = gid::best(&gids, link_layer).ok_or_else(|| Error::NoGid {
            device: self.name().to_owned(),
            port,
            found: gid::describe(&gids),
        })?;
        let other = gid::other_than(best, &gids, link_layer);
        Ok((best.clone(), other.cloned()))
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

    /// Turns the result of a destroying verb into a result; on failure the object still exists.
    pub(crate) fn check_destroyed(&self, verb: &'static str, errno: i32) -> Result<()> {
        if errno == 0 {
            return Ok(());
        }
        Err(Error::Destroy {
            verb,
            device: self.name.clone(),
            source: io::Error::from_raw_os_error(errno),
        })
    }

    /// Destroys an object that is being dropped, and tells whether it is gone.
    ///
    /// If not, the failure is reported and counted, and the caller keeps for ever everything that the device
    /// might still touch. In a forked child nothing is destroyed and nothing is reported.
    pub(crate) fn destroy_dropped(&self, destroy: impl FnOnce() -> Result<()>) -> bool {
        if rustix::process::getpid() != self.owner {
            return false;
        }
        let destroyed = destroy();
        if let Err(error) = &destroyed {
            LEAKED.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%error, "kept for ever");
        }
        destroyed.is_ok()
    }
}

impl Drop for ContextInner {
    fn drop(&mut self) {
        let closed = self.destroy_dropped(|| {
            // SAFETY: every object made from the context held an `Arc` of it, so none is left.
            let ret = unsafe { (self.verbs.close_device)(self.as_ptr()) };
            // The function returns -1 and does not promise an errno.
            self.check_destroyed("ibv_close_device", if ret == 0 { 0 } else { libc::EBUSY })
        });
        if !closed {
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

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::connect::{ConnectConfig, Prepared};
    use crate::{
        AccessFlags, CompletionChannel, CompletionQueue, Mapping, ProtectionDomain, SendFlags,
        Source,
    };

    /// A child that drops its copies of everything must not destroy the parent's objects.
    #[test]
    fn a_forked_child_destroys_nothing() {
        let context = Context::open(&DeviceSelector::Soft(None)).unwrap();
        let pd = ProtectionDomain::alloc(&context).unwrap();
        let channel = CompletionChannel::create(&context).unwrap();
        let cq = CompletionQueue::create(&context, 512, Some(&channel)).unwrap();
        let image = Mapping::anonymous(4096).unwrap();
        let rights = AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE;
        let region = pd.register(&image, 0..4096, rights, None).unwrap();
        let config = ConnectConfig {
            access: rights,
            ..ConnectConfig::default()
        };
        let near = Prepared::create(&pd, &cq, &cq, &config).unwrap();
        let far = Prepared::create(&pd, &cq, &cq, &config).unwrap();
        let ends = (near.end_point(), far.end_point());
        let (mut near, far) = (
            near.connect(&ends.1).unwrap(),
            far.connect(&ends.0).unwrap(),
        );
        let weak = Arc::downgrade(&context.0);

        // SAFETY: the child only drops values and leaves by `_exit`; glibc keeps its allocator usable.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let everything = (near, far, region, image, cq, channel, pd, context);
            let dropped = catch_unwind(AssertUnwindSafe(|| drop(everything)));
            let is_kept = dropped.is_ok() && weak.strong_count() > 0 && leaked_objects() == 0;
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!is_kept)) };
        }
        let mut status = -1;
        // SAFETY: a child of this process, and a place for its status.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!((waited, status), (child, 0));

        let mut chain = near.start_send();
        chain
            .write(
                1,
                Source::Inline(b"alive"),
                region.remote(),
                SendFlags::SIGNALED,
            )
            .unwrap();
        chain.submit().unwrap();
        let mut completions = Vec::new();
        let timeout = std::time::Duration::from_secs(60);
        assert_eq!(cq.poll_or_wait(&mut completions, timeout).unwrap(), 1);
        assert!(near.complete(completions.remove(0)).unwrap().is_success());
        let mut bytes = [0; 5];
        image.read_at(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"alive");
    }
}
