//! Attributes of queue pairs, as named fields with the specification's units.

use rdma_core_bindings as ffi;

use super::transition::Diagnosis;
use crate::device::Context;
use crate::error::{Error, Result};
use crate::types::{AccessFlags, Gid, Mtu, Psn, Qkey, QpState, Qpn};

/// How many requests, parts and inline bytes a queue pair takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QpCapabilities {
    /// Most send requests outstanding.
    pub max_send_wr: u32,
    /// Most receives outstanding.
    pub max_recv_wr: u32,
    /// Most parts of one send request.
    pub max_send_sge: u32,
    /// Most parts of one receive.
    pub max_recv_sge: u32,
    /// Most inline bytes of one send request.
    pub max_inline_data: u32,
}

impl Default for QpCapabilities {
    /// 128 requests each way, 2 parts, 64 bytes inline: less than any device offers.
    fn default() -> QpCapabilities {
        QpCapabilities {
            max_send_wr: 128,
            max_recv_wr: 128,
            max_send_sge: 2,
            max_recv_sge: 2,
            max_inline_data: 64,
        }
    }
}

impl QpCapabilities {
    pub(super) fn to_ffi(self) -> ffi::ibv_qp_cap {
        ffi::ibv_qp_cap {
            max_send_wr: self.max_send_wr,
            max_recv_wr: self.max_recv_wr,
            max_send_sge: self.max_send_sge,
            max_recv_sge: self.max_recv_sge,
            max_inline_data: self.max_inline_data,
        }
    }

    /// Which capability exceeds the device's limits.
    pub(super) fn diagnose(&self, context: &Context) -> Diagnosis {
        let mut diagnosis = Diagnosis::default();
        let Ok(limits) = context.attr() else {
            return diagnosis;
        };
        for (name, asked, limit) in [
            ("max_send_wr", self.max_send_wr, limits.max_qp_wr),
            ("max_recv_wr", self.max_recv_wr, limits.max_qp_wr),
            ("max_send_sge", self.max_send_sge, limits.max_sge),
            ("max_recv_sge", self.max_recv_sge, limits.max_sge),
        ] {
            if asked > limit {
                diagnosis.add(format!("{name} {asked} exceeds the device's limit {limit}"));
            }
        }
        if diagnosis.is_empty() {
            let inline = self.max_inline_data;
            diagnosis.add(format!(
                "perhaps max_inline_data {inline} is more than it takes, or all {} queue pairs are in use",
                limits.max_qp
            ));
        }
        diagnosis
    }
}

/// Attributes of RESET to INIT.
#[derive(Debug, Clone)]
pub struct InitAttr {
    /// The port, from 1.
    pub port: u8,
    /// Index into the partition key table; 0 is the default partition.
    pub pkey_index: u16,
    /// What peers may do through this queue pair; keys limit it further.
    pub access: AccessFlags,
}

impl InitAttr {
    pub(super) fn attributes(&self) -> QpAttributes {
        QpAttributes {
            port: Some(self.port),
            pkey_index: Some(self.pkey_index),
            access: Some(self.access),
            ..QpAttributes::default()
        }
    }
}

/// The way to the peer: `ibv_ah_attr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressVector {
    /// The local port, from 1.
    pub port: u8,
    /// Which entry of the local GID table packets come from.
    pub sgid_index: u8,
    /// The peer's GID; `None` addresses by `dlid` alone, within an InfiniBand subnet.
    pub dgid: Option<Gid>,
    /// The peer's local identifier; 0 on RoCE.
    pub dlid: u16,
    /// Service level.
    pub sl: u8,
    /// Most routers on the way; the TTL on RoCE v2.
    pub hop_limit: u8,
    /// Traffic class; DSCP and ECN bits on RoCE v2.
    pub traffic_class: u8,
    /// Flow label; spreads flows over paths.
    pub flow_label: u32,
}

impl AddressVector {
    pub(crate) fn to_ffi(self) -> ffi::ibv_ah_attr {
        let mut grh = ffi::ibv_global_route {
            sgid_index: self.sgid_index,
            hop_limit: self.hop_limit,
            traffic_class: self.traffic_class,
            flow_label: self.flow_label,
            ..Default::default()
        };
        if let Some(dgid) = self.dgid {
            grh.dgid.raw = dgid.0;
        }
        ffi::ibv_ah_attr {
            grh,
            dlid: self.dlid,
            sl: self.sl,
            src_path_bits: 0,
            static_rate: 0,
            is_global: u8::from(self.dgid.is_some()),
            port_num: self.port,
        }
    }
}

/// Attributes of INIT to RTR.
#[derive(Debug, Clone)]
pub struct RtrAttr {
    /// The way to the peer.
    pub path: AddressVector,
    /// Payload of full packets; equal on both sides.
    pub path_mtu: Mtu,
    /// The peer's queue pair.
    pub dest_qpn: Qpn,
    /// The peer's starting sequence number.
    pub rq_psn: Psn,
    /// How many READs and atomics of the peer are answered at once; 0 refuses them.
    pub max_dest_rd_atomic: u8,
    /// How long the peer waits after it met no receive, as a code of 5 bits: 12 is 0.64 ms, 1 is 0.01 ms,
    /// 31 is 492 ms, 0 is 655 ms.
    pub min_rnr_timer: u8,
}

impl RtrAttr {
    pub(super) fn attributes(&self) -> QpAttributes {
        QpAttributes {
            path: Some(self.path),
            path_mtu: Some(self.path_mtu),
            dest_qpn: Some(self.dest_qpn),
            rq_psn: Some(self.rq_psn),
            max_dest_rd_atomic: Some(self.max_dest_rd_atomic),
            min_rnr_timer: Some(self.min_rnr_timer),
            ..QpAttributes::default()
        }
    }
}

/// Attributes of RTR to RTS.
#[derive(Debug, Clone)]
pub struct RtsAttr {
    /// How long to wait for an answer: 4.096 us * 2^`timeout`, up to 31; 14 is 67 ms. 0 waits for ever.
    pub timeout: u8,
    /// How often to try again without an answer, 0 to 6. Not 7, which is for ever on some devices.
    pub retry_cnt: u8,
    /// How often to try again when the peer has no receive, 0 to 6; 7 is for ever.
    pub rnr_retry: u8,
    /// The own starting sequence number; see [`Psn::random`].
    pub sq_psn: Psn,
    /// How many own READs and atomics may be outstanding, at most what the peer answers at once.
    pub max_rd_atomic: u8,
}

/// The largest `retry_cnt` that ends on every device.
const RETRY_CNT_MAX: u8 = 6;

impl RtsAttr {
    pub(super) fn attributes(&self) -> QpAttributes {
        QpAttributes {
            timeout: Some(self.timeout),
            retry_cnt: Some(self.retry_cnt),
            rnr_retry: Some(self.rnr_retry),
            sq_psn: Some(self.sq_psn),
            max_rd_atomic: Some(self.max_rd_atomic),
            ..QpAttributes::default()
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.retry_cnt <= RETRY_CNT_MAX {
            return Ok(());
        }
        Err(Error::Parameter {
            name: "retry_cnt",
            value: u64::from(self.retry_cnt),
            reason: "0 to 6 are; 7 retries for ever on some devices, so a dead peer would never be noticed",
        })
    }
}

/// Any attributes, for transitions outside of the usual order. `None` is not part of the request.
#[derive(Debug, Clone, Default)]
#[expect(
    missing_docs,
    reason = "named and explained as in InitAttr, RtrAttr, RtsAttr and DatagramInitAttr"
)]
pub struct QpAttributes {
    pub port: Option<u8>,
    pub pkey_index: Option<u16>,
    pub access: Option<AccessFlags>,
    pub qkey: Option<Qkey>,
    pub path: Option<AddressVector>,
    pub path_mtu: Option<Mtu>,
    pub dest_qpn: Option<Qpn>,
    pub rq_psn: Option<Psn>,
    pub max_dest_rd_atomic: Option<u8>,
    pub min_rnr_timer: Option<u8>,
    pub timeout: Option<u8>,
    pub retry_cnt: Option<u8>,
    pub rnr_retry: Option<u8>,
    pub sq_psn: Option<Psn>,
    pub max_rd_atomic: Option<u8>,
    /// With a transition to SQD: raise [`SqDrained`](crate::AsyncEvent::SqDrained) when it is reached.
    pub en_sqd_async_notify: Option<bool>,
}

impl QpAttributes {
    /// The attributes and the mask that says which of them are meant.
    pub(super) fn to_ffi(&self, to: QpState) -> (ffi::ibv_qp_attr, u32) {
        let mut attr = ffi::ibv_qp_attr {
            qp_state: to.code(),
            ..Default::default()
        };
        let mut mask = ffi::IBV_QP_STATE;
        // Sets one field and its bit, if there is a value for it.
        fn set<T, U>(
            mask: &mut u32,
            bit: u32,
            field: &mut T,
            value: Option<U>,
            code: impl Fn(U) -> T,
        ) {
            if let Some(value) = value {
                *mask |= bit;
                *field = code(value);
            }
        }
        let m = &mut mask;
        set(m, ffi::IBV_QP_PORT, &mut attr.port_num, self.port, |v| v);
        set(
            m,
            ffi::IBV_QP_PKEY_INDEX,
            &mut attr.pkey_index,
            self.pkey_index,
            |v| v,
        );
        set(
            m,
            ffi::IBV_QP_ACCESS_FLAGS,
            &mut attr.qp_access_flags,
            self.access,
            |v| v.bits(),
        );
        set(m, ffi::IBV_QP_QKEY, &mut attr.qkey, self.qkey, |v| v.0);
        set(
            m,
            ffi::IBV_QP_AV,
            &mut attr.ah_attr,
            self.path,
            AddressVector::to_ffi,
        );
        set(
            m,
            ffi::IBV_QP_PATH_MTU,
            &mut attr.path_mtu,
            self.path_mtu,
            |v| u32::from(v.code()),
        );
        set(
            m,
            ffi::IBV_QP_DEST_QPN,
            &mut attr.dest_qp_num,
            self.dest_qpn,
            Qpn::get,
        );
        set(
            m,
            ffi::IBV_QP_RQ_PSN,
            &mut attr.rq_psn,
            self.rq_psn,
            Psn::get,
        );
        let bit = ffi::IBV_QP_MAX_DEST_RD_ATOMIC;
        set(
            m,
            bit,
            &mut attr.max_dest_rd_atomic,
            self.max_dest_rd_atomic,
            |v| v,
        );
        set(
            m,
            ffi::IBV_QP_MIN_RNR_TIMER,
            &mut attr.min_rnr_timer,
            self.min_rnr_timer,
            |v| v,
        );
        set(
            m,
            ffi::IBV_QP_TIMEOUT,
            &mut attr.timeout,
            self.timeout,
            |v| v,
        );
        set(
            m,
            ffi::IBV_QP_RETRY_CNT,
            &mut attr.retry_cnt,
            self.retry_cnt,
            |v| v,
        );
        set(
            m,
            ffi::IBV_QP_RNR_RETRY,
            &mut attr.rnr_retry,
            self.rnr_retry,
            |v| v,
        );
        set(
            m,
            ffi::IBV_QP_SQ_PSN,
            &mut attr.sq_psn,
            self.sq_psn,
            Psn::get,
        );
        set(
            m,
            ffi::IBV_QP_MAX_QP_RD_ATOMIC,
            &mut attr.max_rd_atomic,
            self.max_rd_atomic,
            |v| v,
        );
        let bit = ffi::IBV_QP_EN_SQD_ASYNC_NOTIFY;
        set(
            m,
            bit,
            &mut attr.en_sqd_async_notify,
            self.en_sqd_async_notify,
            u8::from,
        );
        (attr, mask)
    }

    /// Adds the values that exceed the limits of the device or port.
    pub(super) fn check_limits(&self, context: &Context, diagnosis: &mut Diagnosis) {
        let Ok(limits) = context.attr() else {
            return;
        };
        let port = self.port.or(self.path.map(|path| path.port));
        if port.is_some_and(|port| port == 0 || port > limits.phys_port_cnt) {
            diagnosis.add(format!(
                "the device has ports 1 to {}",
                limits.phys_port_cnt
            ));
        }
        for (name, value, limit) in [
            (
                "max_dest_rd_atomic",
                self.max_dest_rd_atomic,
                limits.max_qp_rd_atom,
            ),
            (
                "max_rd_atomic",
                self.max_rd_atomic,
                limits.max_qp_init_rd_atom,
            ),
            ("timeout", self.timeout, 31),
            ("min_rnr_timer", self.min_rnr_timer, 31),
            ("retry_cnt", self.retry_cnt, 7),
            ("rnr_retry", self.rnr_retry, 7),
        ] {
            if let Some(value) = value.filter(|value| *value > limit) {
                diagnosis.add(format!("{name} {value} exceeds {limit}"));
            }
        }
        let Some(port) = port.and_then(|port| context.port(port).ok()) else {
            return;
        };
        if self
            .pkey_index
            .is_some_and(|index| index >= port.pkey_tbl_len)
        {
            diagnosis.add(format!(
                "the partition key table has {} entries",
                port.pkey_tbl_len
            ));
        }
        if self.path_mtu > port.active_mtu && self.path_mtu.is_some() {
            diagnosis.add("path_mtu exceeds the port's active MTU".to_owned());
        }
        if self
            .path
            .is_some_and(|path| usize::from(path.sgid_index) >= port.gid_tbl_len)
        {
            diagnosis.add(format!("the GID table has {} entries", port.gid_tbl_len));
        }
    }
}

/// What [`QpStatus`] needs.
pub(super) const QUERY_MASK: u32 = ffi::IBV_QP_STATE
    | ffi::IBV_QP_ACCESS_FLAGS
    | ffi::IBV_QP_PORT
    | ffi::IBV_QP_QKEY
    | ffi::IBV_QP_PATH_MTU
    | ffi::IBV_QP_DEST_QPN
    | ffi::IBV_QP_RQ_PSN
    | ffi::IBV_QP_SQ_PSN
    | ffi::IBV_QP_TIMEOUT
    | ffi::IBV_QP_RETRY_CNT
    | ffi::IBV_QP_RNR_RETRY
    | ffi::IBV_QP_MIN_RNR_TIMER
    | ffi::IBV_QP_MAX_QP_RD_ATOMIC
    | ffi::IBV_QP_MAX_DEST_RD_ATOMIC;

/// A queue pair as the device sees it. What no transition has set yet is 0.
#[derive(Debug, Clone)]
#[expect(
    missing_docs,
    reason = "named and explained as in InitAttr, RtrAttr, RtsAttr and DatagramInitAttr"
)]
pub struct QpStatus {
    /// Its state now.
    pub state: QpState,
    pub access: AccessFlags,
    pub port: u8,
    pub qkey: Qkey,
    pub path_mtu: Option<Mtu>,
    pub dest_qpn: Qpn,
    /// The next sequence number that is expected.
    pub rq_psn: u32,
    /// The next sequence number that is sent.
    pub sq_psn: u32,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub min_rnr_timer: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
}

impl QpStatus {
    pub(super) fn from_ffi(attr: &ffi::ibv_qp_attr) -> QpStatus {
        QpStatus {
            state: QpState::from_code(attr.qp_state),
            access: AccessFlags::from_bits_truncate(attr.qp_access_flags),
            port: attr.port_num,
            qkey: Qkey(attr.qkey),
            path_mtu: Mtu::from_code(attr.path_mtu),
            dest_qpn: Qpn::from_device(attr.dest_qp_num),
            rq_psn: attr.rq_psn,
            sq_psn: attr.sq_psn,
            timeout: attr.timeout,
            retry_cnt: attr.retry_cnt,
            rnr_retry: attr.rnr_retry,
            min_rnr_timer: attr.min_rnr_timer,
            max_rd_atomic: attr.max_rd_atomic,
            max_dest_rd_atomic: attr.max_dest_rd_atomic,
        }
    }
}
