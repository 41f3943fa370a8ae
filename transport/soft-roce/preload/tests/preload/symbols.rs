//! What this library exports, compared with the installed libibverbs.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::support::{file_of, library, lookup, open_library, skip, succeed};

/// Functions left to libibverbs. None of them is given an object of a device.
const LEFT_TO_THE_LIBRARY: [(&str, &str); 8] = [
    ("ibv_copy_ah_attr_from_kern", "converts a plain struct"),
    ("ibv_copy_path_rec_from_kern", "converts a plain struct"),
    ("ibv_copy_path_rec_to_kern", "converts a plain struct"),
    ("ibv_copy_qp_attr_from_kern", "converts a plain struct"),
    (
        "ibv_dofork_range",
        "about memory, and idle unless its own ibv_fork_init ran",
    ),
    ("ibv_dontfork_range", "as ibv_dofork_range"),
    ("ibv_get_sysfs_path", "a constant"),
    ("ibv_read_sysfs_file", "reads a file by name"),
];
/// By this providers announce themselves to libibverbs; it belongs to the library they were built for.
const FOR_PROVIDERS: &str = "ibv_register_driver";
/// Private functions that programs call all the same, with our objects.
const PRIVATE_BUT_OURS: [&str; 1] = ["ibv_query_gid_type"];
/// Exported for another reason than to stand for a function of libibverbs.
const OUR_OWN: [&str; 2] = ["dlopen", "dlvsym"];

#[test]
fn every_public_function_of_libibverbs_is_defined_or_named_with_a_reason() {
    let Some(installed) = installed() else {
        return skip("libibverbs.so.1 is not installed: apt-get install libibverbs1");
    };
    let theirs = exported(Path::new(&installed));
    let public: BTreeSet<&str> = theirs
        .iter()
        .filter(|(_, version)| version.starts_with("IBVERBS_1."))
        .map(|(name, _)| name.as_str())
        .filter(|name| !name.starts_with("IBVERBS_"))
        .collect();
    assert!(public.len() > 60, "{installed}: {public:?}");
    let library_exports = exported(&library());
    let ours: BTreeSet<&str> = library_exports
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();

    let left: BTreeSet<&str> = LEFT_TO_THE_LIBRARY.iter().map(|(name, _)| *name).collect();
    for name in &public {
        let is_left = left.contains(name) || *name == FOR_PROVIDERS;
        assert_ne!(
            ours.contains(name),
            is_left,
            "{name}: define it, or name it with a reason"
        );
    }
    for name in &ours {
        let is_known =
            public.contains(name) || PRIVATE_BUT_OURS.contains(name) || OUR_OWN.contains(name);
        // A library older than the table lacks the youngest functions.
        let is_young = name.starts_with("ibv_") || name.starts_with("_ibv_");
        assert!(
            is_known || is_young,
            "{name} is nothing that a program asks libibverbs for"
        );
    }
}

/// A versioned definition would satisfy only references to its own version.
#[test]
fn no_definition_has_a_version() {
    for (name, version) in exported(&library()) {
        assert_eq!(version, "", "{name}");
    }
}

/// Exported names and versions.
fn exported(library: &Path) -> BTreeSet<(String, String)> {
    let listing = succeed(
        Command::new("nm")
            .args(["-D", "--defined-only"])
            .arg(library),
    );
    let symbols = listing
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    symbols
        .map(|symbol| {
            let (name, version) = symbol.split_once('@').unwrap_or((symbol, ""));
            (name.to_owned(), version.trim_start_matches('@').to_owned())
        })
        .collect()
}

/// The path of the installed library, as the loader finds it.
fn installed() -> Option<String> {
    let handle = open_library(Some(c"libibverbs.so.1"));
    (!handle.is_null()).then(|| file_of(lookup(handle, "ibv_open_device")))
}
