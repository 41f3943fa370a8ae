//! Executes the engines' commands on a device and a clock.
