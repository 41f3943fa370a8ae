//! Which device: names, `auto`, and the list that a person chooses from.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use rdma_core_bindings::Verbs;
use soft_roce::{SoftConfig, SoftDevice};

use crate::attr::{DeviceAttr, PortAttr};
use crate::device::{Context, device_names};
use crate::error::{Error, Result};
use crate::gid::GidEntry;

/// The environment variable that [`DeviceSelector::from_env`] reads.
pub const DEVICE_ENV: &str = "FARLOG_DEVICE";

/// Which device to open.
///
/// ```
/// use transport::DeviceSelector;
/// let selector: DeviceSelector = "soft@127.0.0.9".parse()?;
/// assert_eq!(selector, DeviceSelector::Soft(Some("127.0.0.9".parse()?)));
/// assert_eq!(selector.to_string(), "soft@127.0.0.9");
/// assert_eq!("soft@fd00::2".parse::<DeviceSelector>()?.to_string(), "soft@fd00::2");
/// assert_eq!("mlx5_0".parse::<DeviceSelector>()?, DeviceSelector::Named("mlx5_0".into()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeviceSelector {
    /// The first real device (kernel rxe included) with an ACTIVE port and a usable GID, else the
    /// software device.
    #[default]
    Auto,
    /// The real device of this name.
    Named(String),
    /// The software device on this IPv4 or IPv6 address of the machine, or on a free one of 127.0.0.0/8.
    ///
    /// Its peers must have addresses of the same kind.
    Soft(Option<IpAddr>),
}

impl DeviceSelector {
    /// The selector in the environment variable `FARLOG_DEVICE`; [`DeviceSelector::Auto`] if it is not set.
    ///
    /// # Errors
    ///
    /// [`Error::Selector`] if it does not make sense.
    pub fn from_env() -> Result<DeviceSelector> {
        match std::env::var_os(DEVICE_ENV) {
            Some(text) => text.to_string_lossy().parse(),
            None => Ok(DeviceSelector::Auto),
        }
    }
}

impl FromStr for DeviceSelector {
    type Err = Error;

    fn from_str(text: &str) -> Result<DeviceSelector> {
        let malformed = || Error::Selector {
            text: text.to_owned(),
        };
        match text {
            "auto" => Ok(DeviceSelector::Auto),
            "soft" => Ok(DeviceSelector::Soft(None)),
            _ => match text.strip_prefix("soft@") {
                Some(address) => {
                    let address: IpAddr = address.parse().map_err(|_| malformed())?;
                    Ok(DeviceSelector::Soft(Some(address.to_canonical())))
                }
                None if is_device_name(text) => Ok(DeviceSelector::Named(text.to_owned())),
                None => Err(malformed()),
            },
        }
    }
}

fn is_device_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !text.is_empty() && text.len() < 64 && text.chars().all(allowed)
}

impl fmt::Display for DeviceSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceSelector::Auto => f.write_str("auto"),
            DeviceSelector::Named(name) => f.write_str(name),
            DeviceSelector::Soft(None) => f.write_str("soft"),
            DeviceSelector::Soft(Some(address)) => write!(f, "soft@{address}"),
        }
    }
}

pub(crate) fn open(selector: &DeviceSelector) -> Result<Context> {
    match selector {
        DeviceSelector::Soft(address) => open_soft(*address),
        DeviceSelector::Named(name) => open_named(name),
        DeviceSelector::Auto => match first_usable() {
            Ok(context) => Ok(context),
            Err(reason) => {
                tracing::info!(%reason, "no usable RDMA device, taking the software device");
                open_soft(None)
            }
        },
    }
}

fn open_soft(address: Option<IpAddr>) -> Result<Context> {
    let config = SoftConfig {
        address,
        ..SoftConfig::default()
    };
    Context::open_soft(SoftDevice::bind(config)?)
}

fn open_named(name: &str) -> Result<Context> {
    let verbs = Verbs::load()?;
    if let Some(context) = Context::open_real(verbs, name)? {
        return Ok(context);
    }
    let names = device_names(verbs)?;
    let available = if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    };
    Err(Error::NoDevice {
        name: name.to_owned(),
        available,
    })
}

/// The first real device that `auto` may take, or why there is none.
fn first_usable() -> Result<Context> {
    let verbs = Verbs::load()?;
    let mut last = Error::NoDevice {
        name: "auto".to_owned(),
        available: "none".to_owned(),
    };
    for name in device_names(verbs)? {
        match open_named(&name).and_then(usable) {
            Ok(context) => return Ok(context),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn usable(context: Context) -> Result<Context> {
    let port = context.active_port()?;
    context.best_gid(port.port_num)?;
    Ok(context)
}

/// Everything there is to know about a device without using it.
#[derive(Debug)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Its limits and ports.
    pub details: Result<DeviceDetails>,
}

/// Limits and ports of a device.
#[derive(Debug)]
pub struct DeviceDetails {
    /// Its limits.
    pub attr: DeviceAttr,
    /// Its ports.
    pub ports: Vec<PortDetails>,
}

/// A port with its GIDs.
#[derive(Debug)]
pub struct PortDetails {
    /// Its state.
    pub attr: PortAttr,
    /// The filled entries of its GID table.
    pub gids: Vec<GidEntry>,
    /// The GID that a connection would use, or why there is none.
    pub best_gid: Result<GidEntry>,
}

/// The devices of this machine.
#[derive(Debug)]
pub struct DeviceList {
    /// The real devices, kernel rxe included, or why there can be none: libibverbs is absent, or the
    /// kernel has no RDMA.
    pub real: Result<Vec<DeviceInfo>>,
    /// The software device, as a process that asks for `soft` would get it.
    pub soft: DeviceInfo,
}

/// Lists the devices of this machine, opening each of them for a moment.
///
/// What fails, fails in its place in the list: a device that cannot be opened hides no other.
pub fn list() -> DeviceList {
    DeviceList {
        real: list_real(),
        soft: describe_as("soft", || open_soft(None)),
    }
}

fn list_real() -> Result<Vec<DeviceInfo>> {
    let names = device_names(Verbs::load()?)?;
    let infos = names
        .iter()
        .map(|name| describe_as(name, || open_named(name)));
    Ok(infos.collect())
}

fn describe_as(name: &str, open: impl FnOnce() -> Result<Context>) -> DeviceInfo {
    match open() {
        Ok(context) => describe(&context),
        Err(error) => DeviceInfo {
            name: name.to_owned(),
            details: Err(error),
        },
    }
}

/// Describes an open device.
pub fn describe(context: &Context) -> DeviceInfo {
    DeviceInfo {
        name: context.name().to_owned(),
        details: details(context),
    }
}

fn details(context: &Context) -> Result<DeviceDetails> {
    let attr = context.attr()?;
    let ports = (1..=attr.phys_port_cnt).map(|port| {
        Ok(PortDetails {
            attr: context.port(port)?,
            gids: context.gids(port)?,
            best_gid: context.best_gid(port),
        })
    });
    Ok(DeviceDetails {
        ports: ports.collect::<Result<_>>()?,
        attr,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_round_trip() {
        for text in [
            "auto",
            "soft",
            "soft@127.0.0.9",
            "soft@fd00::2",
            "rxe0",
            "mlx5_0",
            "rocep1s0f0",
        ] {
            assert_eq!(text.parse::<DeviceSelector>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn selectors_that_make_no_sense() {
        for text in [
            "",
            "soft@",
            "soft@here",
            "soft@fe80::1%eth0",
            "a b",
            "../x",
            "soft:1",
        ] {
            let error = text.parse::<DeviceSelector>().unwrap_err();
            assert!(error.to_string().contains("soft@ADDRESS"), "{error}");
        }
    }

    #[test]
    fn an_unknown_device_is_named_in_the_error() {
        let error = Context::open(&"no_such_rdma0".parse().unwrap()).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("no_such_rdma0") || text.contains("RDMA") || text.contains("libibverbs"),
            "{text}"
        );
    }
}
