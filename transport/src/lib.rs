//! Safe verbs.
