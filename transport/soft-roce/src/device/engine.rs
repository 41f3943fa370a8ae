//! The only loop: packets in, timers, packets out, completions and events to their queues.
//!
//! An [`Engine`] is the protocol state of one device. It knows no thread and no clock; whoever holds
//! the device's lock drives it.
//!
//! ```text
//! receive:  link --rx--> handle_packet of the queue pair addressed   |
//! expire:   timers due --> handle_timeout                            | mark queue pairs ready
//! post, modify                                                       |
//! serve:    each ready queue pair: poll_transmit --tx--> link,
//!           poll_completion --> completion queue, poll_event --> context, poll_timeout --> timers
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rdma_core_bindings::IBV_EVENT_DEVICE_FATAL;

use super::cq::CompletionQueue;
use super::events::{AckGate, ContextEvent, Element, EventQueue};
use super::limits;
use super::qp::{Qp, Service};
use super::qp_table::QpTable;
use super::srq_table::SrqTable;
use super::timers::{TimerSlot, Timers};
use crate::faults::{Fault, is_injected};
use crate::link::{Link, RxBuf, TxBuf};
use crate::mr_table::{MrTable, Pd};
use crate::qp::{Attr, AttrMask, InvalidTransition, QpConfig, QpState};
use crate::rc::{self, AckTime};
use crate::wire::{Packet, Qpn, pkey_matches};
use crate::work::{AsyncEvent, PostError, Queue, RecvWr, SendWr, Wc};

/// The protocol state of a device.
#[derive(Debug)]
pub(crate) struct Engine {
    /// The protection table.
    pub(crate) regions: MrTable,
    /// Where the bytes of an inline request are gathered while it is posted.
    pub(crate) inline_buf: Box<[u8]>,
    /// The queues that queue pairs share.
    pub(crate) srqs: SrqTable,
    qps: QpTable<QpSlot>,
    /// Queue pairs that may have something to hand over, each once.
    ready: Vec<Qpn>,
    /// Queue pairs that await answers: they share the window.
    awaiting: usize,
    timers: Timers,
    link: Box<dyn Link>,
    tx: TxBuf,
    rx: RxBuf,
    contexts: Vec<Arc<EventQueue<ContextEvent>>>,
    next_pd: u32,
    is_dead: bool,
    counters: Counters,
    /// What the connections that are gone have counted, reliable or not.
    past: rc::Counters,
}

/// Packets received in one turn after which no further batch is asked for: half of what one of runs that
/// the kernel has joined holds.
const BURST_PACKETS: u64 = 16;

/// Packets that reached no queue pair.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Packets that are no RoCEv2.
    pub(crate) malformed: u64,
    /// Packets to a queue pair number that is not in use.
    pub(crate) unknown_qpn: u64,
    /// Packets of another partition.
    pub(crate) bad_pkey: u64,
}

/// A queue pair and whom it reports to.
#[derive(Debug)]
struct QpSlot {
    qp: Qp,
    reports: Reports,
    timer: TimerSlot,
    is_ready: bool,
    /// Counted in [`Engine::awaiting`].
    is_awaiting: bool,
}

/// Where a queue pair's completions and events go.
#[derive(Clone, Debug)]
pub(crate) struct Reports {
    pub(crate) send_cq: Arc<CompletionQueue>,
    pub(crate) recv_cq: Arc<CompletionQueue>,
    pub(crate) events: Arc<EventQueue<ContextEvent>>,
    /// Asynchronous events handed out and not acknowledged.
    pub(crate) gate: Arc<AckGate>,
    /// The address by which the application knows the queue pair.
    pub(crate) handle: usize,
}

/// What a turn at driving found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// Datagrams that came in.
    pub(crate) received: usize,
    /// Whether queue pairs still have packets to send: drive again soon.
    pub(crate) has_more: bool,
}

impl Engine {
    pub(crate) fn new(link: Box<dyn Link>, seed: u64) -> Self {
        let local = link.local_addr();
        let mut tx = TxBuf::new(local);
        if link.wants_notes() {
            tx.keep_notes();
        }
        Self {
            regions: MrTable::new(seed),
            inline_buf: vec![0; limits::INLINE_LEN_MAX as usize].into_boxed_slice(),
            srqs: SrqTable::default(),
            qps: QpTable::new((seed >> 32) as u32),
            ready: Vec::new(),
            awaiting: 0,
            timers: Timers::default(),
            tx,
            rx: RxBuf::new(local),
            link,
            contexts: Vec::new(),
            next_pd: 1,
            is_dead: false,
            counters: Counters::default(),
            past: rc::Counters::default(),
        }
    }

    /// Takes in what has arrived and hands out what results, timers included.
    pub(crate) fn drive(&mut self, now: u64, ack_time: AckTime) -> Turn {
        let received = self.receive_burst(now);
        self.expire(now);
        Turn {
            received,
            has_more: self.serve(now, ack_time),
        }
    }

    /// Gives each ready queue pair one turn: its packets go out, its completions and events to their
    /// queues. Returns whether some have more packets than fitted.
    ///
    /// With [`AckTime::WithNextTurn`], the caller owes another turn soon even if this returns false.
    pub(crate) fn serve(&mut self, now: u64, ack_time: AckTime) -> bool {
        let turns = self.ready.len();
        let mut has_more = false;
        for index in 0..turns {
            let qpn = self.ready[index];
            has_more |= self.serve_one(qpn, now, ack_time);
        }
        self.ready.drain(..turns);
        self.flush();
        has_more
    }

    /// What became of packets that reached no queue pair.
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Whether the device has stopped for good.
    pub(crate) fn is_dead(&self) -> bool {
        self.is_dead
    }

    /// The time at which a queue pair wants to be driven although nothing arrives.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.timers.next()
    }

    /// Number of a new protection domain.
    pub(crate) fn allocate_pd(&mut self) -> Pd {
        let pd = Pd(self.next_pd);
        self.next_pd = self.next_pd.wrapping_add(1);
        pd
    }

    pub(crate) fn attach(&mut self, events: Arc<EventQueue<ContextEvent>>) {
        self.contexts.push(events);
    }

    /// Ends a context, and with it the queue pairs that the application left: no region can be
    /// reached through it any more.
    pub(crate) fn detach(&mut self, events: &Arc<EventQueue<ContextEvent>>) {
        self.contexts
            .retain(|context| !Arc::ptr_eq(context, events));
        for qpn in self.qps.numbers() {
            let slot = self.qps.get_mut(qpn);
            if slot.is_some_and(|slot| Arc::ptr_eq(&slot.reports.events, events)) {
                self.destroy_qp(qpn);
            }
        }
    }

    /// Creates a queue pair in RESET, or returns `None` if the device holds its maximum.
    pub(crate) fn create_qp(
        &mut self,
        service: Service,
        config: QpConfig,
        reports: Reports,
    ) -> Option<Qpn> {
        let qpn = self.qps.insert(|qpn| QpSlot {
            qp: Qp::new(qpn, service, config),
            reports,
            timer: TimerSlot::default(),
            is_ready: false,
            is_awaiting: false,
        })?;
        // So that marking a queue pair ready never allocates.
        self.ready.reserve(self.qps.numbers().len());
        Some(qpn)
    }

    /// Tells by which address the application knows the queue pair, before it is used.
    pub(crate) fn set_handle(&mut self, qpn: Qpn, handle: usize) {
        if let Some(slot) = self.qps.get_mut(qpn) {
            slot.reports.handle = handle;
        }
    }

    /// Takes a queue pair out, with its completions, unread events and the windows bound on it, and
    /// returns where it reported.
    pub(crate) fn destroy_qp(&mut self, qpn: Qpn) -> Option<Reports> {
        let slot = self.qps.remove(qpn)?;
        self.past += &slot.qp.rc_counters();
        self.awaiting -= usize::from(slot.is_awaiting);
        self.regions.invalidate_all_of(qpn);
        self.ready.retain(|ready| *ready != qpn);
        slot.reports.forget_completions(qpn);
        slot.reports.events.forget(&slot.reports.gate);
        Some(slot.reports)
    }

    /// What all connections have counted, those that are gone too.
    pub(crate) fn rc_counters(&mut self) -> rc::Counters {
        let mut sum = self.past;
        for qpn in self.qps.numbers() {
            if let Some(slot) = self.qps.get_mut(qpn) {
                sum += &slot.qp.rc_counters();
            }
        }
        sum
    }

    /// The queue pair's protocol state.
    pub(crate) fn qp(&mut self, qpn: Qpn) -> Option<&Qp> {
        self.qps.get_mut(qpn).map(|slot| &slot.qp)
    }

    /// Changes attributes and state; [`serve`](Self::serve) hands out what results, such as flushed
    /// requests.
    pub(crate) fn modify_qp(
        &mut self,
        qpn: Qpn,
        attr: &Attr,
        mask: AttrMask,
    ) -> Result<(), InvalidTransition> {
        let Some(slot) = self.qps.get_mut(qpn) else {
            return Ok(());
        };
        slot.qp.modify(attr, mask)?;
        if slot.qp.state() == QpState::Reset {
            slot.reports.forget_completions(qpn);
        }
        self.mark_ready(qpn);
        Ok(())
    }

    /// Queues a send request; [`serve`](Self::serve) sends it.
    pub(crate) fn post_send(&mut self, qpn: Qpn, wr: &SendWr<'_>) -> Result<(), PostError> {
        let Some(slot) = self.qps.get_mut(qpn) else {
            return Err(PostError::InvalidState);
        };
        slot.qp.post_send(wr)?;
        self.mark_ready(qpn);
        Ok(())
    }

    /// Takes back the last `count` send requests, of which none has been served.
    pub(crate) fn unpost_sends(&mut self, qpn: Qpn, count: usize) {
        if let Some(slot) = self.qps.get_mut(qpn) {
            slot.qp.unpost_sends(count);
        }
    }

    /// Queues a receive request.
    pub(crate) fn post_recv(&mut self, qpn: Qpn, wr: &RecvWr<'_>) -> Result<(), PostError> {
        let Some(slot) = self.qps.get_mut(qpn) else {
            return Err(PostError::InvalidState);
        };
        slot.qp.post_recv(wr)?;
        self.mark_ready(qpn);
        Ok(())
    }

    /// Stops the device for good: every queue pair goes to ERR, every context learns of it, and no
    /// packet is sent or received any more.
    pub(crate) fn die(&mut self) {
        if std::mem::replace(&mut self.is_dead, true) {
            return;
        }
        for qpn in self.qps.numbers() {
            // What panicked may be this very queue pair, and may panic again.
            let fail = AssertUnwindSafe(|| self.fail_qp(qpn));
            if catch_unwind(fail).is_err() {
                tracing::error!(qp = qpn.get(), "queue pair cannot be flushed");
            }
        }
        for context in &self.contexts {
            let event = ContextEvent {
                event_type: IBV_EVENT_DEVICE_FATAL,
                element: Element::Device,
            };
            context.push(None, event);
        }
    }

    /// Receives again as long as batches are full, and hold few packets.
    ///
    /// Those of a peer without GSO fill a batch at once. Where more threads want to run than there are
    /// cores, what a turn leaves behind waits for as long as the others have the core, and the socket
    /// overflows: two packets a turn could not keep up with kernel rxe.
    fn receive_burst(&mut self, now: u64) -> usize {
        let before = self.rx.rcvd_pkts();
        let mut received = 0;
        loop {
            let more = self.receive(now);
            received += more;
            let packets = self.rx.rcvd_pkts() - before;
            if more == 0 || !self.rx.is_full() || packets >= BURST_PACKETS {
                return received;
            }
        }
    }

    fn receive(&mut self, now: u64) -> usize {
        if self.is_dead {
            return 0;
        }
        let received = match self.link.recv(&mut self.rx) {
            Ok(0) => return 0,
            Ok(received) => received,
            Err(error) => {
                tracing::error!(%error, "cannot receive: the device stops");
                self.die();
                return 0;
            }
        };
        while let Some((src, udp_payload)) = self.rx.next_packet() {
            let Ok(packet) = Packet::parse(udp_payload) else {
                self.counters.malformed += 1;
                continue;
            };
            let qpn = packet.headers.bth.dest_qp;
            let Some(slot) = self.qps.get_mut(qpn) else {
                self.counters.unknown_qpn += 1;
                continue;
            };
            if !pkey_matches(limits::PKEY, packet.headers.bth.pkey) {
                self.counters.bad_pkey += 1;
                continue;
            }
            let shared = slot.qp.config().srq.map(|srq| srq.number);
            let mut srq = shared.and_then(|number| self.srqs.get_mut(number));
            let queue = srq.as_deref_mut().map(|srq| &mut srq.queue);
            slot.qp
                .handle_packet(now, src, &packet, &mut self.regions, queue);
            if !std::mem::replace(&mut slot.is_ready, true) {
                self.ready.push(qpn);
            }
            if let Some(srq) = srq {
                srq.report();
                // Makes room for the next request out of the shared queue.
                if slot.collect() {
                    self.fail_unheard();
                }
            }
        }
        received
    }

    fn expire(&mut self, now: u64) {
        while let Some((deadline, qpn)) = self.timers.pop_due(now) {
            let Some(slot) = self.qps.get_mut(qpn) else {
                continue;
            };
            if !slot.timer.expire(deadline) {
                continue;
            }
            match slot.qp.poll_timeout() {
                Some(actual) if actual <= now => {
                    slot.qp.handle_timeout(now);
                    self.mark_ready(qpn);
                }
                // Moved meanwhile: wait on.
                later => self.timers.arm(qpn, &mut slot.timer, later),
            }
        }
    }

    /// Returns whether the queue pair has more packets than fitted.
    fn serve_one(&mut self, qpn: Qpn, now: u64, ack_time: AckTime) -> bool {
        if self.tx.is_full() {
            self.flush();
        }
        let Some(slot) = self.qps.get_mut(qpn) else {
            return false;
        };
        slot.is_ready = false;
        let sharers = self.awaiting + usize::from(!slot.is_awaiting);
        let share = limits::WINDOW_BUDGET_LEN / sharers;
        slot.qp.set_window_share(share.min(limits::WINDOW_LEN_MAX));
        let has_more = !self.is_dead
            && slot
                .qp
                .poll_transmit(now, &mut self.regions, &mut self.tx, ack_time);
        let is_awaiting = slot.qp.awaits_answers();
        self.awaiting -= usize::from(slot.is_awaiting);
        self.awaiting += usize::from(is_awaiting);
        slot.is_awaiting = is_awaiting;
        let has_turn = has_more || slot.qp.holds_ack();
        self.timers
            .arm(qpn, &mut slot.timer, slot.qp.poll_timeout());
        let is_overrun = slot.collect();
        if has_turn {
            self.mark_ready(qpn);
        }
        if is_overrun {
            self.fail_unheard();
        }
        has_more
    }

    fn mark_ready(&mut self, qpn: Qpn) {
        if let Some(slot) = self.qps.get_mut(qpn)
            && !std::mem::replace(&mut slot.is_ready, true)
        {
            self.ready.push(qpn);
        }
    }

    fn flush(&mut self) {
        if self.tx.is_empty() {
            return;
        }
        if let Err(error) = self.link.send(&mut self.tx) {
            tracing::error!(%error, "cannot send: the device stops");
            self.die();
        }
    }

    /// Moves every queue pair that reports to an overrun completion queue to ERR: what it reports is lost
    /// from now on. The requests flushed thereby may overrun another queue.
    fn fail_unheard(&mut self) {
        let is_unheard = |slot: &QpSlot| {
            slot.reports.is_lost() && !matches!(slot.qp.state(), QpState::Reset | QpState::Err)
        };
        let mut has_failed = true;
        while std::mem::take(&mut has_failed) {
            for qpn in self.qps.numbers() {
                if self.qps.get_mut(qpn).is_some_and(|slot| is_unheard(slot)) {
                    self.fail_qp(qpn);
                    has_failed = true;
                }
            }
        }
    }

    fn fail_qp(&mut self, qpn: Qpn) {
        let Some(slot) = self.qps.get_mut(qpn) else {
            return;
        };
        slot.qp.fail(AsyncEvent::QpFatal);
        // Whoever fails queue pairs looks at all of them.
        slot.collect();
    }
}

impl QpSlot {
    /// Hands completions and events to their queues, and tells whether a completion queue had no room.
    fn collect(&mut self) -> bool {
        let mut is_overrun = false;
        while let Some((queue, wc)) = self.qp.poll_completion() {
            let cq = self.reports.queue(queue);
            if !push(cq, wc) {
                is_overrun = true;
            }
        }
        while let Some(event) = self.qp.poll_event() {
            let element = Element::Qp(self.reports.handle);
            let event = ContextEvent {
                event_type: event as u32,
                element,
            };
            self.reports
                .events
                .push(Some(Arc::clone(&self.reports.gate)), event);
        }
        is_overrun && !is_injected(Fault::OverrunInSilence)
    }
}

impl Reports {
    fn queue(&self, queue: Queue) -> &Arc<CompletionQueue> {
        match queue {
            Queue::Send => &self.send_cq,
            Queue::Recv => &self.recv_cq,
        }
    }

    /// Whether one of the completion queues has overrun.
    fn is_lost(&self) -> bool {
        self.send_cq.is_overrun() || self.recv_cq.is_overrun()
    }

    fn forget_completions(&self, qpn: Qpn) {
        self.send_cq.forget_qp(qpn);
        self.recv_cq.forget_qp(qpn);
    }
}

fn push(cq: &CompletionQueue, wc: Wc) -> bool {
    tracing::trace!(%wc, "completion");
    cq.push(wc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mr_table::Pd;
    use crate::virtual_device::{RC_STEPS, VirtualDevice};

    const CONFIG: QpConfig = QpConfig {
        pd: Pd(1),
        max_send_wr: 4,
        max_recv_wr: 4,
        max_send_sge: 1,
        max_recv_sge: 1,
        max_inline: 0,
        sq_sig_all: false,
        window_max: 16,
        srq: None,
    };

    fn device() -> VirtualDevice {
        VirtualDevice::new([10, 0, 0, 1].into(), 1, 64, 0)
    }

    /// A queue pair in RTS with `receives` posted.
    fn qp(device: &mut VirtualDevice, cqs: [&Arc<CompletionQueue>; 2], receives: u64) -> Qpn {
        let qpn = device.create_qp(Service::Rc, CONFIG, cqs[0], cqs[1]);
        let remote = [10, 0, 0, 2].into();
        device.connect(
            qpn,
            &Attr {
                remote,
                ..Attr::default()
            },
            &RC_STEPS,
        );
        for wr_id in 0..receives {
            let posted = device.engine.post_recv(qpn, &RecvWr { wr_id, sges: &[] });
            posted.expect("there is room");
        }
        qpn
    }

    fn fail(device: &mut VirtualDevice, qpn: Qpn) {
        let attr = Attr {
            state: QpState::Err,
            ..Attr::default()
        };
        let moved = device.engine.modify_qp(qpn, &attr, AttrMask::STATE);
        moved.expect("ERR is open from every state");
        device.engine.serve(1, AckTime::Now);
    }

    /// The overrun was overlooked if the queue pair that caused it was in ERR: the others went on, and
    /// their completions were lost.
    #[test]
    fn flushed_requests_that_overrun_a_queue_end_all_its_queue_pairs() {
        let mut device = device();
        let cq = device.completion_queue(2);
        let failing = qp(&mut device, [&cq, &cq], 3);
        let other = qp(&mut device, [&cq, &cq], 0);
        fail(&mut device, failing);
        assert!(cq.is_overrun());
        assert_eq!(device.state(other), QpState::Err);
    }

    /// Only the last queue that overran was looked at, and not those that failing for it overran.
    #[test]
    fn an_overrun_that_leads_to_another_ends_the_queue_pairs_of_both() {
        let mut device = device();
        let [first, second] = [(); 2].map(|()| device.completion_queue(1));
        let failing = qp(&mut device, [&first, &first], 2);
        let both = qp(&mut device, [&first, &second], 2);
        let last = qp(&mut device, [&second, &second], 0);
        fail(&mut device, failing);
        assert!(first.is_overrun() && second.is_overrun());
        for qpn in [both, last] {
            assert_eq!(device.state(qpn), QpState::Err);
        }
    }
}
