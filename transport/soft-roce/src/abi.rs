//! The verbs table of the software device.
