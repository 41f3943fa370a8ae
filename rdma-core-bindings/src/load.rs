//! Where the table of the system's libibverbs comes from, and why it may be missing.

use std::sync::OnceLock;

use crate::Verbs;
#[cfg(not(feature = "rdma-sys"))]
use crate::dlopen as backend;
#[cfg(feature = "rdma-sys")]
use crate::link as backend;

/// Why the table could not be filled from libibverbs.
///
/// With feature `rdma-sys` it never fails: a program linked with the library does not start
/// without.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The library, or one that it needs, is not installed or cannot be loaded.
    #[error(
        "cannot load {library}: {reason}; to use RDMA devices install the package libibverbs1 \
         (Debian, Ubuntu) or libibverbs (Fedora, RHEL)"
    )]
    Library {
        /// The name that was looked up.
        library: String,
        /// What the dynamic linker says.
        reason: String,
    },
    /// The library lacks a symbol that every rdma-core exports.
    #[error("{library} does not export {symbol}: it is not rdma-core's libibverbs; install that")]
    Symbol {
        /// The name of the library.
        library: String,
        /// The missing symbol.
        symbol: String,
    },
}

impl Verbs {
    /// Gives the table of the system's libibverbs, which is loaded once per process.
    ///
    /// # Errors
    ///
    /// A [`LoadError`] if the library is missing or is not rdma-core's. The verdict is kept: a
    /// library installed later is found by the next process.
    pub fn load() -> Result<&'static Verbs, LoadError> {
        static TABLE: OnceLock<Result<Verbs, LoadError>> = OnceLock::new();
        TABLE
            .get_or_init(backend::table)
            .as_ref()
            .map_err(Clone::clone)
    }
}
