//! The devices that the list shows.

use std::ffi::c_int;
use std::net::IpAddr;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use rdma_core_bindings::ibv_device;
use soft_roce::{SoftConfig, SoftDevice, verbs};

/// The environment variable that names the devices.
const DEVICE_ENV: &str = "FARLOG_DEVICE";

/// The devices of this process, and the process's number: a forked child starts its own.
static STARTED: Mutex<Option<(u32, Vec<Arc<SoftDevice>>)>> = Mutex::new(None);

/// Starts the devices at the first call, and lists them. Where they cannot be had, says why on the
/// standard error, for the caller only sees an errno.
pub(crate) fn list(num_devices: *mut c_int) -> *mut *mut ibv_device {
    if let Err(error) = start() {
        eprintln!("libsoft_roce_preload: {error}");
        if !num_devices.is_null() {
            // SAFETY: not NULL, so the caller points to an int for the result.
            unsafe { num_devices.write(0) };
        }
        set_errno(libc::ENODEV);
        return ptr::null_mut();
    }
    // SAFETY: the caller's argument.
    unsafe { (verbs().get_device_list)(num_devices) }
}

fn start() -> Result<(), Box<dyn std::error::Error>> {
    let mut started = STARTED.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if started.as_ref().is_some_and(|(of, _)| *of == process) {
        return Ok(());
    }
    let named = std::env::var_os(DEVICE_ENV).unwrap_or_default();
    let mut devices = Vec::new();
    for address in addresses(&named.to_string_lossy())? {
        devices.push(SoftDevice::bind(SoftConfig {
            address,
            ..SoftConfig::default()
        })?);
    }
    // Those of the parent process end with it.
    std::mem::forget(started.replace((process, devices)));
    Ok(())
}

/// The addresses in `FARLOG_DEVICE`; `None` stands for any free one.
fn addresses(named: &str) -> Result<Vec<Option<IpAddr>>, String> {
    let one = |name: &str| match name {
        "" | "auto" | "soft" => Ok(None),
        _ => match name.strip_prefix("soft@").map(str::parse) {
            Some(Ok(address)) => Ok(Some(address)),
            _ => Err(format!(
                "{DEVICE_ENV} names {name:?}, but only software devices are here: \
                 set it to soft@ADDRESS, for example soft@127.0.0.11, or unset it"
            )),
        },
    };
    named.split(',').map(|name| one(name.trim())).collect()
}

fn set_errno(errno: c_int) {
    // SAFETY: the location is the calling thread's own, as long as the thread lives.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: as above; nothing else refers to it during the store.
    unsafe { *location = errno };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_names_addresses() {
        let a = IpAddr::from([127, 0, 0, 11]);
        let b: IpAddr = "fd00::12".parse().unwrap();
        assert_eq!(addresses(""), Ok(vec![None]));
        assert_eq!(addresses("soft"), Ok(vec![None]));
        assert_eq!(addresses("soft@127.0.0.11"), Ok(vec![Some(a)]));
        assert_eq!(
            addresses("soft@127.0.0.11, soft@fd00::12"),
            Ok(vec![Some(a), Some(b)])
        );
    }

    #[test]
    fn what_it_cannot_name_is_refused_with_an_example() {
        for wrong in ["mlx5_0", "soft@", "soft@host", "127.0.0.11"] {
            let error = addresses(wrong).expect_err(wrong);
            assert!(error.contains("soft@127.0.0.11"), "{error}");
        }
    }
}
