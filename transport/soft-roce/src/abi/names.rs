//! Names of states, events and statuses, and the table of rates.

use std::ffi::{CStr, c_char, c_int};

use rdma_core_bindings::{
    IBV_RATE_MAX, ibv_event_type, ibv_node_type, ibv_port_state, ibv_rate, ibv_wc_status,
};

const UNKNOWN: &CStr = c"unknown";

/// By `ibv_node_type`, from 1 on.
const NODE_TYPES: [&CStr; 7] = [
    c"InfiniBand channel adapter",
    c"InfiniBand switch",
    c"InfiniBand router",
    c"iWARP NIC",
    c"usNIC",
    c"usNIC UDP",
    c"unspecified",
];

/// By `ibv_port_state`.
const PORT_STATES: [&CStr; 6] = [
    c"NOP",
    c"down",
    c"init",
    c"armed",
    c"active",
    c"active defer",
];

/// By `ibv_event_type`.
const EVENT_TYPES: [&CStr; 20] = [
    c"completion queue error",
    c"queue pair fatal error",
    c"invalid request at queue pair",
    c"access violation at queue pair",
    c"communication established",
    c"send queue drained",
    c"path migrated",
    c"path migration error",
    c"device fatal error",
    c"port active",
    c"port error",
    c"LID change",
    c"P_Key change",
    c"SM change",
    c"SRQ error",
    c"SRQ limit reached",
    c"last WQE reached",
    c"client reregistration",
    c"GID table change",
    c"work queue fatal error",
];

/// By `ibv_wc_status`.
const WC_STATUSES: [&CStr; 24] = [
    c"success",
    c"local length error",
    c"local QP operation error",
    c"local EE context operation error",
    c"local protection error",
    c"work request flushed",
    c"memory window bind error",
    c"bad response",
    c"local access error",
    c"remote invalid request",
    c"remote access error",
    c"remote operation error",
    c"transport retries exceeded",
    c"RNR retries exceeded",
    c"local RDD violation",
    c"remote invalid RD request",
    c"remote aborted",
    c"invalid EE context number",
    c"invalid EE context state",
    c"fatal error",
    c"response timeout",
    c"general error",
    c"tag matching error",
    c"tag matching rendezvous incomplete",
];

/// Rate, multiple of 2.5 Gbit/s (-1: not a whole one), Mbit/s.
const RATES: [(ibv_rate, c_int, c_int); 23] = [
    (2, 1, 2_500),
    (5, 2, 5_000),
    (3, 4, 10_000),
    (6, 8, 20_000),
    (4, 12, 30_000),
    (7, 16, 40_000),
    (8, 24, 60_000),
    (9, 32, 80_000),
    (10, 48, 120_000),
    (11, -1, 14_062),
    (12, -1, 56_250),
    (13, -1, 112_500),
    (14, -1, 168_750),
    (15, -1, 25_781),
    (16, -1, 103_125),
    (17, -1, 206_250),
    (18, -1, 309_375),
    (19, 11, 28_125),
    (20, 20, 53_125),
    (21, 160, 425_000),
    (22, 240, 637_500),
    (23, 320, 850_000),
    (24, 480, 1_275_000),
];

pub(super) extern "C" fn node_type_str(node_type: ibv_node_type) -> *const c_char {
    name(&NODE_TYPES, i64::from(node_type) - 1)
}

pub(super) extern "C" fn port_state_str(port_state: ibv_port_state) -> *const c_char {
    name(&PORT_STATES, port_state.into())
}

pub(super) extern "C" fn event_type_str(event: ibv_event_type) -> *const c_char {
    name(&EVENT_TYPES, event.into())
}

pub(super) extern "C" fn wc_status_str(status: ibv_wc_status) -> *const c_char {
    name(&WC_STATUSES, status.into())
}

pub(super) extern "C" fn rate_to_mult(rate: ibv_rate) -> c_int {
    RATES
        .iter()
        .find(|row| row.0 == rate)
        .map_or(-1, |row| row.1)
}

pub(super) extern "C" fn rate_to_mbps(rate: ibv_rate) -> c_int {
    RATES
        .iter()
        .find(|row| row.0 == rate)
        .map_or(-1, |row| row.2)
}

pub(super) extern "C" fn mult_to_ibv_rate(mult: c_int) -> ibv_rate {
    RATES
        .iter()
        .find(|row| row.1 == mult && mult > 0)
        .map_or(IBV_RATE_MAX, |row| row.0)
}

pub(super) extern "C" fn mbps_to_ibv_rate(mbps: c_int) -> ibv_rate {
    RATES
        .iter()
        .find(|row| row.2 == mbps)
        .map_or(IBV_RATE_MAX, |row| row.0)
}

fn name(names: &[&'static CStr], index: i64) -> *const c_char {
    let named = usize::try_from(index)
        .ok()
        .and_then(|index| names.get(index));
    named.copied().unwrap_or(UNKNOWN).as_ptr()
}
