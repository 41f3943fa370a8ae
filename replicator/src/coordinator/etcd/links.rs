//! Requests to whichever of etcd's end points answers.

use std::cell::Cell;
use std::fmt;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error};

use super::CoordinatorError;

/// How long a TCP connection to an end point may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A connection is probed this often, and given up when a probe is not answered in time: a watch would
/// else wait for ever on one that is cut.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// A request failed: where, what was asked, and why.
#[derive(Debug)]
pub(super) struct Fault(String);

impl Fault {
    pub(super) fn new(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Fault> for CoordinatorError {
    fn from(fault: Fault) -> Self {
        Self::Etcd(format!(
            "{fault}; see that etcd runs there, or correct --coordinator"
        ))
    }
}

/// One connection to each end point, made when it is first used and again after it broke.
pub(super) struct Links {
    clients: Vec<(String, Client)>,
    /// The end point that answered last.
    preferred: Cell<usize>,
}

impl Links {
    pub(super) async fn open(end_points: &[String]) -> Result<Self, CoordinatorError> {
        // Without `require_leader`, a watch on a member that is cut off from the others would stay silent.
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_keep_alive(PROBE_INTERVAL, PROBE_TIMEOUT)
            .with_require_leader(true);
        let mut clients = Vec::new();
        for url in end_points {
            let client = Client::connect([url], Some(options.clone()))
                .await
                .map_err(|error| CoordinatorError::EndPoint {
                    url: url.clone(),
                    cause: error.to_string(),
                })?;
            clients.push((url.clone(), client));
        }
        assert!(!clients.is_empty(), "there is at least one end point");
        Ok(Self {
            clients,
            preferred: Cell::new(0),
        })
    }

    /// Makes one request within `timeout`; after a failure the next one goes to another end point.
    ///
    /// Nothing is asked twice: whether a request that failed was carried out is unknown.
    pub(super) async fn call<T>(
        &self,
        what: &str,
        timeout: Duration,
        request: impl AsyncFnOnce(Client) -> Result<T, Error>,
    ) -> Result<T, Fault> {
        let index = self.preferred.get();
        let (url, client) = &self.clients[index];
        let cause = match tokio::time::timeout(timeout, request(client.clone())).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => cause_of(&error),
            Err(_) => format!("no answer within {timeout:?}"),
        };
        if self.preferred.get() == index {
            self.preferred.set((index + 1) % self.clients.len());
        }
        Err(Fault(format!("etcd at {url}: cannot {what}: {cause}")))
    }
}

/// The innermost cause, which names what a person can act on.
fn cause_of(error: &Error) -> String {
    let outermost: &dyn std::error::Error = match error {
        Error::GRpcStatus(status) => match std::error::Error::source(status) {
            Some(source) => source,
            None => return status.message().to_owned(),
        },
        Error::TransportError(error) => error,
        other => return other.to_string(),
    };
    let mut innermost = outermost;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
