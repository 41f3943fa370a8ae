//! The software devices of this process.

use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};

use super::events::lock;
use super::{BindError, Process, SoftDevice};

static DEVICES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
/// Signalled when a device that was being dropped is gone, its socket included.
static DEVICE_GONE: Condvar = Condvar::new();

struct Entry {
    port: u16,
    address: IpAddr,
    device: Weak<SoftDevice>,
    process: Process,
}

/// A device's place in the registry, which ends with the device.
///
/// Made by [`Registration::new`] once nothing can fail any more: dropping one takes the lock that
/// [`find_or_insert`] holds.
#[derive(Debug)]
pub(super) struct Registration {
    address: IpAddr,
    port: u16,
}

/// The devices of this process that live now.
pub(crate) fn live_devices() -> Vec<Arc<SoftDevice>> {
    lock(&DEVICES)
        .iter()
        .filter(|entry| entry.process == Process::this())
        .filter_map(|entry| entry.device.upgrade())
        .collect()
}

/// The device at `address` and `port`, or the one that `start` makes.
pub(super) fn find_or_insert(
    address: Option<IpAddr>,
    port: u16,
    start: impl FnOnce() -> Result<SoftDevice, BindError>,
) -> Result<Arc<SoftDevice>, BindError> {
    let mut devices = lock(&DEVICES);
    devices.retain(|entry| entry.process == Process::this());
    while let Some(entry) = devices
        .iter()
        .find(|entry| Some(entry.address) == address && entry.port == port)
    {
        if let Some(device) = entry.device.upgrade() {
            return Ok(device);
        }
        // Its last user has gone and its socket is about to close: until then the address is taken.
        devices = DEVICE_GONE
            .wait(devices)
            .unwrap_or_else(PoisonError::into_inner);
    }
    let device = Arc::new(start()?);
    let address = device.address();
    devices.push(Entry {
        port,
        address,
        device: Arc::downgrade(&device),
        process: Process::this(),
    });
    Ok(device)
}

impl Registration {
    pub(super) fn new(address: IpAddr, port: u16) -> Self {
        Self { address, port }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&DEVICES).retain(|entry| (entry.address, entry.port) != (self.address, self.port));
        DEVICE_GONE.notify_all();
    }
}
