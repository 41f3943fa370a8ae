//! Whether the threads that a node cannot do without still run.

use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use super::connections;
use super::error::NodeError;

/// Why the node has ended by itself, once it has. The first cause counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Ended(Arc<OnceLock<String>>);

impl Ended {
    pub(super) fn set(&self, cause: String) {
        tracing::error!(%cause, "the node has ended");
        // Whoever comes first has said why.
        let _ = self.0.set(cause);
    }

    pub(super) fn get(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    pub(super) fn wait(&self) -> &str {
        self.0.wait()
    }

    /// Something that a thread owns, so that its panic ends the node.
    pub(super) fn watch(&self, name: &'static str) -> PanicWatch {
        PanicWatch {
            name,
            ended: self.clone(),
        }
    }

    /// Starts a thread whose panic ends the node.
    pub(super) fn spawn(
        &self,
        name: &'static str,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<JoinHandle<()>, NodeError> {
        let watch = self.watch(name);
        connections::spawn(name, move || {
            let _watch = watch;
            run();
        })
    }
}

/// Tells a panic of the thread that it belongs to.
pub(super) struct PanicWatch {
    name: &'static str,
    ended: Ended,
}

impl Drop for PanicWatch {
    fn drop(&mut self) {
        if thread::panicking() {
            let cause = format!("its {} thread has panicked", self.name);
            self.ended.set(cause);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_a_thread_ends_the_node() {
        let ended = Ended::default();
        ended.spawn("writer", || {}).unwrap().join().unwrap();
        assert_eq!(ended.get(), None);
        let panicking = ended.spawn("helper", || panic!("on purpose")).unwrap();
        assert_eq!(ended.wait(), "its helper thread has panicked");
        assert!(panicking.join().is_err());
        ended.set("later".to_owned());
        assert_eq!(ended.get(), Some("its helper thread has panicked"));
    }
}
