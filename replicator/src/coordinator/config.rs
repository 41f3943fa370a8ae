//! The choice of a coordinator, as a command line has it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

#[cfg(feature = "etcd")]
use super::etcd::{EtcdConfig, EtcdCoordinator};
use super::{Coordinator, CoordinatorError, Event, Registration, StaticCoordinator};

/// Which coordinator a node uses. All nodes of a cluster must use the same one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CoordinatorConfig {
    /// A file in the data directory: `static`.
    #[default]
    Static,
    /// An etcd cluster: `etcd:URL[,URL...]`.
    #[cfg(feature = "etcd")]
    Etcd(EtcdConfig),
    /// One of the broker's, see [`CoordinatorConfig::own`].
    Own(OwnCoordinator),
}

/// Where a coordinator's events go. To be called from a thread of the coordinator's; it waits while the
/// node is busy.
pub type Sink = Box<dyn FnMut(Event) + Send>;

type StartOwn =
    dyn Fn(Registration, Sink) -> Result<Box<dyn Coordinator>, CoordinatorError> + Send + Sync;

/// How to start a coordinator of the broker's own.
#[derive(Clone)]
pub struct OwnCoordinator(Arc<StartOwn>);

impl fmt::Debug for OwnCoordinator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnCoordinator")
    }
}

impl PartialEq for OwnCoordinator {
    /// Whether it is the same function.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for OwnCoordinator {}

impl CoordinatorConfig {
    /// A coordinator of the broker's own: `start` is called whenever a node starts with it. It must tell the
    /// state of every partition through the sink, from a thread of its own, and may do so before it has
    /// returned.
    ///
    /// What the node relies on is written at [`Coordinator`], [`Answer`](super::Answer) and [`Event`].
    pub fn own<F>(start: F) -> Self
    where
        F: Fn(Registration, Sink) -> Result<Box<dyn Coordinator>, CoordinatorError>
            + Send
            + Sync
            + 'static,
    {
        Self::Own(OwnCoordinator(Arc::new(start)))
    }
}

impl CoordinatorConfig {
    /// Starts it for a node; `sink` is called from a thread of the coordinator's until it is dropped.
    ///
    /// # Errors
    ///
    /// [`CoordinatorError`]: a damaged file, or etcd not within reach.
    pub fn start(
        &self,
        data_dir: &Path,
        registration: Registration,
        sink: impl FnMut(Event) + Send + 'static,
    ) -> Result<Box<dyn Coordinator>, CoordinatorError> {
        Ok(match self {
            Self::Static => Box::new(StaticCoordinator::start(data_dir, &registration, sink)?),
            #[cfg(feature = "etcd")]
            Self::Etcd(config) => Box::new(EtcdCoordinator::start(config, registration, sink)?),
            Self::Own(own) => (own.0)(registration, Box::new(sink))?,
        })
    }
}

impl fmt::Display for CoordinatorConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Static => f.write_str("static"),
            #[cfg(feature = "etcd")]
            Self::Etcd(config) => write!(f, "etcd:{}", config.end_points.join(",")),
            Self::Own(_) => f.write_str("the broker's own"),
        }
    }
}

impl FromStr for CoordinatorConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "static" => Ok(Self::Static),
            Some(("etcd", end_points)) => etcd(end_points),
            _ => Err(format!(
                "`{text}` is neither static nor etcd:URL[,URL...], such as etcd:http://127.0.0.1:2379"
            )),
        }
    }
}

#[cfg(feature = "etcd")]
fn etcd(end_points: &str) -> Result<CoordinatorConfig, String> {
    let config = EtcdConfig::new(end_points.split(',').map(str::to_owned).collect());
    config.check().map_err(|error| error.to_string())?;
    Ok(CoordinatorConfig::Etcd(config))
}

#[cfg(not(feature = "etcd"))]
fn etcd(_: &str) -> Result<CoordinatorConfig, String> {
    Err(
        "this build cannot use etcd: build with `--features etcd`, which needs protobuf-compiler"
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_understood_or_explained() {
        assert_eq!("static".parse(), Ok(CoordinatorConfig::Static));
        assert_eq!(CoordinatorConfig::default().to_string(), "static");
        for wrong in ["", "Static", "static:", "zookeeper:h:1"] {
            let message = wrong.parse::<CoordinatorConfig>().unwrap_err();
            assert!(message.contains("neither static nor etcd:URL"), "{message}");
        }
    }

    #[cfg(feature = "etcd")]
    #[test]
    fn end_points_are_checked() {
        let text = "etcd:http://h1:2379,http://h2:2379";
        let config: CoordinatorConfig = text.parse().unwrap();
        assert_eq!(config.to_string(), text);
        let message = "etcd:h1:2379".parse::<CoordinatorConfig>().unwrap_err();
        assert!(message.contains("`h1:2379`"), "{message}");
    }

    #[cfg(not(feature = "etcd"))]
    #[test]
    fn a_build_without_etcd_says_so() {
        let message = "etcd:http://h:1".parse::<CoordinatorConfig>().unwrap_err();
        assert!(message.contains("--features etcd"), "{message}");
    }
}
