//! A queue pair of any service, as the engine drives it.

use std::net::IpAddr;

use crate::link::TxBuf;
use crate::mr_table::MrTable;
use crate::qp::{Attr, AttrMask, InvalidTransition, QpConfig, QpState};
use crate::rc::{self, AckTime};
use crate::srq::SharedReceiveQueue;
use crate::wire::{Packet, Qpn};
use crate::work::{AsyncEvent, PostError, Queue, RecvWr, SendWr, Wc};
use crate::{uc, ud};

/// What a queue pair does with packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// Reliable connection.
    Rc,
    /// Unreliable connection.
    Uc,
    /// Unreliable datagrams, by way of this port.
    Ud(ud::Port),
}

/// A queue pair. Each method is that of its protocol, or what it comes to where one has no need of it.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "the table of queue pairs boxes each"
)]
pub(crate) enum Qp {
    Rc(rc::Qp),
    Uc(uc::Qp),
    Ud(ud::Qp),
}

impl Qp {
    pub(super) fn new(qpn: Qpn, service: Service, config: QpConfig) -> Self {
        match service {
            Service::Rc => Self::Rc(rc::Qp::new(qpn, config)),
            Service::Uc => Self::Uc(uc::Qp::new(qpn, config)),
            Service::Ud(port) => Self::Ud(ud::Qp::new(qpn, config, port)),
        }
    }

    pub(crate) fn state(&self) -> QpState {
        self.attr().state
    }

    pub(crate) fn attr(&self) -> &Attr {
        match self {
            Self::Rc(qp) => qp.attr(),
            Self::Uc(qp) => qp.attr(),
            Self::Ud(qp) => qp.attr(),
        }
    }

    /// What happened so far, if it is a connection, reliable or not.
    pub(super) fn rc_counters(&self) -> rc::Counters {
        match self {
            Self::Rc(qp) => *qp.counters(),
            Self::Uc(qp) => as_of_rc(qp.counters()),
            Self::Ud(_) => rc::Counters::default(),
        }
    }

    pub(super) fn config(&self) -> &QpConfig {
        match self {
            Self::Rc(qp) => qp.config(),
            Self::Uc(qp) => qp.config(),
            Self::Ud(qp) => qp.config(),
        }
    }

    pub(crate) fn is_draining(&self) -> bool {
        match self {
            Self::Rc(qp) => qp.is_draining(),
            Self::Uc(qp) => qp.is_draining(),
            Self::Ud(_) => false,
        }
    }

    pub(super) fn modify(&mut self, attr: &Attr, mask: AttrMask) -> Result<(), InvalidTransition> {
        match self {
            Self::Rc(qp) => qp.modify(attr, mask),
            Self::Uc(qp) => qp.modify(attr, mask),
            Self::Ud(qp) => qp.modify(attr, mask),
        }
    }

    pub(super) fn fail(&mut self, event: AsyncEvent) {
        match self {
            Self::Rc(qp) => qp.fail(event),
            Self::Uc(qp) => qp.fail(event),
            Self::Ud(qp) => qp.fail(event),
        }
    }

    pub(super) fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        match self {
            Self::Rc(qp) => qp.post_send(wr),
            Self::Uc(qp) => qp.post_send(wr),
            Self::Ud(qp) => qp.post_send(wr),
        }
    }

    pub(super) fn unpost_sends(&mut self, count: usize) {
        match self {
            Self::Rc(qp) => qp.unpost_sends(count),
            Self::Uc(qp) => qp.unpost_sends(count),
            Self::Ud(qp) => qp.unpost_sends(count),
        }
    }

    pub(super) fn post_recv(&mut self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        match self {
            Self::Rc(qp) => qp.post_recv(wr),
            Self::Uc(qp) => qp.post_recv(wr),
            Self::Ud(qp) => qp.post_recv(wr),
        }
    }

    pub(super) fn handle_packet(
        &mut self,
        now: u64,
        source: IpAddr,
        packet: &Packet<'_>,
        mem: &mut MrTable,
        srq: Option<&mut SharedReceiveQueue>,
    ) {
        match self {
            Self::Rc(qp) => qp.handle_packet_sharing(now, source, packet, mem, srq),
            Self::Uc(qp) => qp.handle_packet(source, packet, mem, srq),
            Self::Ud(qp) => qp.handle_packet(source, packet, mem, srq),
        }
    }

    pub(super) fn handle_timeout(&mut self, now: u64) {
        match self {
            Self::Rc(qp) => qp.handle_timeout(now),
            Self::Uc(_) | Self::Ud(_) => {}
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<u64> {
        match self {
            Self::Rc(qp) => qp.poll_timeout(),
            Self::Uc(_) | Self::Ud(_) => None,
        }
    }

    pub(super) fn poll_transmit(
        &mut self,
        now: u64,
        mem: &mut MrTable,
        tx: &mut TxBuf,
        ack_time: AckTime,
    ) -> bool {
        match self {
            Self::Rc(qp) => qp.poll_transmit(now, mem, tx, ack_time),
            Self::Uc(qp) => qp.poll_transmit(mem, tx),
            Self::Ud(qp) => qp.poll_transmit(mem, tx),
        }
    }

    pub(super) fn set_window_share(&mut self, len: usize) {
        match self {
            Self::Rc(qp) => qp.set_window_share(len),
            Self::Uc(_) | Self::Ud(_) => {}
        }
    }

    pub(super) fn awaits_answers(&self) -> bool {
        match self {
            Self::Rc(qp) => qp.awaits_answers(),
            Self::Uc(_) | Self::Ud(_) => false,
        }
    }

    pub(super) fn holds_ack(&self) -> bool {
        match self {
            Self::Rc(qp) => qp.holds_ack(),
            Self::Uc(_) | Self::Ud(_) => false,
        }
    }

    pub(super) fn poll_completion(&mut self) -> Option<(Queue, Wc)> {
        match self {
            Self::Rc(qp) => qp.poll_completion(),
            Self::Uc(qp) => qp.poll_completion(),
            Self::Ud(qp) => qp.poll_completion(),
        }
    }

    pub(super) fn poll_event(&mut self) -> Option<AsyncEvent> {
        match self {
            Self::Rc(qp) => qp.poll_event(),
            Self::Uc(qp) => qp.poll_event(),
            Self::Ud(qp) => qp.poll_event(),
        }
    }
}

/// What an unreliable connection counts, under the names that reliable ones have for it.
fn as_of_rc(counters: &uc::Counters) -> rc::Counters {
    let uc::Counters {
        no_receive,
        too_long,
        access_viol,
        dropped_pkts,
        ..
    } = *counters;
    rc::Counters {
        sent_pkts: counters.sent_pkts,
        rcvd_pkts: counters.rcvd_pkts,
        out_of_seq_request: counters.out_of_seq_request,
        dropped_pkts: no_receive + too_long + access_viol + dropped_pkts,
        ..rc::Counters::default()
    }
}
