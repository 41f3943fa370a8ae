//! A device without socket, thread and clock, for simulations and fuzzing.
//!
//! It is the whole [`Engine`] on a [virtual link](VirtualLink), with one block of memory whose every
//! byte can be compared with what it should be.
//!
//! # Safety
//!
//! A [`VirtualDevice`] owns its memory until it is dropped, and drops its engine, whose regions lie in
//! that memory, first. The bytes are touched through [`copy`] only.
#![allow(
    unsafe_code,
    reason = "registers and inspects memory that the queue pairs write"
)]

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;

use crate::copy;
use crate::device::{
    AckGate, CompletionQueue, ContextEvent, Engine, EventQueue, Reports, Service, SrqReports,
};
use crate::link::{VirtualLink, VirtualPort};
use crate::mr_table::{AccessFlags, Key, Pd, Region};
use crate::qp::{Attr, AttrMask, QpConfig, QpState};
use crate::srq::{SharedReceiveQueue, SrqNumber};
use crate::wire::Qpn;
use crate::work::{Remote, Sge};

/// Where the memory starts in the address space of work requests.
const IOVA: u64 = 0x10_0000_0000;

/// What peers may be granted.
pub(crate) const REMOTE_RIGHTS: AccessFlags = AccessFlags::LOCAL_WRITE
    .union(AccessFlags::REMOTE_WRITE)
    .union(AccessFlags::REMOTE_READ)
    .union(AccessFlags::REMOTE_ATOMIC);

/// An engine and what it stands on.
pub(crate) struct VirtualDevice {
    pub(crate) engine: Engine,
    pub(crate) port: VirtualPort,
    reports: Reports,
    memory: Box<[u64]>,
}

impl VirtualDevice {
    /// A device at `address` with `memory_len` bytes of memory that all hold `fill`.
    pub(crate) fn new(address: IpAddr, seed: u64, memory_len: usize, fill: u8) -> Self {
        let port = VirtualPort::default();
        let link = VirtualLink::new(address, port.clone());
        let engine = Engine::new(Box::new(link), seed);
        let events = Arc::new(EventQueue::new().expect("an eventfd is to be had"));
        let cq = completion_queue(CQE, &events);
        let reports = Reports {
            send_cq: Arc::clone(&cq),
            recv_cq: cq,
            events,
            gate: Arc::new(AckGate::default()),
            handle: 0,
        };
        let memory = vec![word_of(&[fill; 8]); memory_len.div_ceil(8)];
        Self {
            engine,
            port,
            reports,
            memory: memory.into_boxed_slice(),
        }
    }

    /// Another completion queue, for `capacity` completions.
    pub(crate) fn completion_queue(&self, capacity: usize) -> Arc<CompletionQueue> {
        completion_queue(capacity, &self.reports.events)
    }

    /// A shared receive queue; events name it by its number.
    pub(crate) fn create_srq(&mut self, max_wr: usize, max_sge: usize) -> SrqNumber {
        let queue = SharedReceiveQueue::new(max_wr, max_sge);
        let reports = SrqReports {
            events: Arc::clone(&self.reports.events),
            gate: Arc::default(),
            handle: 0,
        };
        let number = self.engine.srqs.insert(queue, reports);
        if let Some(slot) = self.engine.srqs.get_mut(number) {
            slot.set_handle(number.0 as usize);
        }
        number
    }

    /// A shared receive queue that exists.
    pub(crate) fn srq(&mut self, number: SrqNumber) -> &mut SharedReceiveQueue {
        let slot = self.engine.srqs.get_mut(number);
        &mut slot.expect("nobody destroyed it").queue
    }

    /// A queue pair in RESET that reports to these queues; events name it by its number.
    pub(crate) fn create_qp(
        &mut self,
        service: Service,
        config: QpConfig,
        send_cq: &Arc<CompletionQueue>,
        recv_cq: &Arc<CompletionQueue>,
    ) -> Qpn {
        let reports = Reports {
            send_cq: Arc::clone(send_cq),
            recv_cq: Arc::clone(recv_cq),
            ..self.reports.clone()
        };
        let qpn = self.engine.create_qp(service, config, reports);
        let qpn = qpn.expect("far below the limit");
        self.engine.set_handle(qpn, qpn.get() as usize);
        qpn
    }

    /// Takes the oldest asynchronous event.
    #[cfg(test)]
    pub(crate) fn next_event(&self) -> Option<ContextEvent> {
        self.reports.events.try_next()
    }

    /// Registers a range of the memory.
    pub(crate) fn register(&mut self, range: Range<usize>, access: AccessFlags, pd: Pd) -> Key {
        let iova = IOVA + range.start as u64;
        self.register_at(range, iova, access, pd)
    }

    /// Registers a range of the memory at an address that peers know it by.
    pub(crate) fn register_at(
        &mut self,
        range: Range<usize>,
        iova: u64,
        access: AccessFlags,
        pd: Pd,
    ) -> Key {
        assert!(range.end <= self.memory_len(), "a range of the memory");
        let base = self.memory.as_mut_ptr().cast::<u8>();
        let region = Region {
            pd,
            base: base.wrapping_add(range.start),
            iova,
            len: range.len() as u64,
            access,
        };
        // SAFETY: inside `memory`, which outlives the engine; see the module.
        let key = unsafe { self.engine.regions.register(region) };
        key.expect("few regions, with rights that go together")
    }

    pub(crate) fn write(&mut self, byte_offset: usize, bytes: &[u8]) {
        assert!(byte_offset + bytes.len() <= self.memory_len());
        let base = self.memory.as_mut_ptr().cast::<u8>();
        // SAFETY: inside `memory`.
        unsafe { copy::write_shared(base.wrapping_add(byte_offset), bytes) };
    }

    pub(crate) fn read(&self, range: Range<usize>) -> Vec<u8> {
        assert!(range.end <= self.memory_len());
        let base = self.memory.as_ptr().cast::<u8>();
        let mut bytes = vec![0; range.len()];
        // SAFETY: inside `memory`.
        unsafe { copy::read_shared(&mut bytes, base.wrapping_add(range.start)) };
        bytes
    }

    pub(crate) fn memory_len(&self) -> usize {
        self.memory.len() * 8
    }

    pub(crate) fn sge(&self, byte_offset: usize, len: usize, lkey: Key) -> Sge {
        Sge {
            addr: IOVA + byte_offset as u64,
            length: u32::try_from(len).expect("the memory is small"),
            lkey,
        }
    }

    /// A place as peers name it.
    pub(crate) fn remote(&self, byte_offset: usize, rkey: Key) -> Remote {
        Remote {
            addr: IOVA + byte_offset as u64,
            rkey,
        }
    }

    /// Takes a queue pair in RESET to RTS with the values of `attr`.
    pub(crate) fn connect(&mut self, qpn: Qpn, attr: &Attr, steps: &Steps) {
        for (state, mask) in *steps {
            self.engine
                .modify_qp(qpn, &Attr { state, ..*attr }, mask)
                .expect("the transitions of the specification");
        }
    }

    /// The state of a queue pair that exists.
    pub(crate) fn state(&mut self, qpn: Qpn) -> QpState {
        self.engine
            .qp(qpn)
            .expect("nobody destroyed it")
            .attr()
            .state
    }
}

/// The word that these 8 bytes of memory are.
#[allow(clippy::host_endian_bytes, reason = "words in memory have host order")]
pub(crate) fn word_of(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes.try_into().expect("a word has 8 bytes"))
}

/// Completions that one queue holds, more than all requests together need.
pub(crate) const CQE: usize = 4096;

fn completion_queue(
    capacity: usize,
    events: &Arc<EventQueue<ContextEvent>>,
) -> Arc<CompletionQueue> {
    Arc::new(CompletionQueue::new(capacity, None, Arc::clone(events)))
}

/// The way to RTS, and what each step takes.
pub(crate) type Steps = [(QpState, AttrMask); 3];

/// The way of a reliable connection.
pub(crate) const RC_STEPS: Steps = [
    (
        QpState::Init,
        AttrMask::STATE
            .union(AttrMask::PKEY_INDEX)
            .union(AttrMask::PORT)
            .union(AttrMask::ACCESS_FLAGS),
    ),
    (
        QpState::Rtr,
        AttrMask::STATE
            .union(AttrMask::AV)
            .union(AttrMask::PATH_MTU)
            .union(AttrMask::DEST_QPN)
            .union(AttrMask::RQ_PSN)
            .union(AttrMask::MAX_DEST_RD_ATOMIC)
            .union(AttrMask::MIN_RNR_TIMER),
    ),
    (
        QpState::Rts,
        AttrMask::STATE
            .union(AttrMask::TIMEOUT)
            .union(AttrMask::RETRY_CNT)
            .union(AttrMask::RNR_RETRY)
            .union(AttrMask::SQ_PSN)
            .union(AttrMask::MAX_QP_RD_ATOMIC),
    ),
];

/// The way of a queue pair for datagrams.
pub(crate) const UD_STEPS: Steps = [
    (
        QpState::Init,
        AttrMask::STATE
            .union(AttrMask::PKEY_INDEX)
            .union(AttrMask::PORT)
            .union(AttrMask::QKEY),
    ),
    (QpState::Rtr, AttrMask::STATE),
    (QpState::Rts, AttrMask::STATE.union(AttrMask::SQ_PSN)),
];
