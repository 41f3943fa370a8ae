//! The verbs C ABI: types, inline functions and the table of libibverbs' exported functions.

#[allow(
    missing_docs,
    missing_debug_implementations,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    unsafe_code,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "generated from C headers; the names are the C names"
)]
mod types;

mod inline;
mod load;
mod verbs;

pub use inline::*;
pub use load::LoadError;
pub use types::*;
pub use verbs::Verbs;
