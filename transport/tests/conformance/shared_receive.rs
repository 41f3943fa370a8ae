//! Shared receive queues.

use std::time::{Duration, Instant};

use transport::connect::{ConnectConfig, Prepared};
use transport::{
    AsyncEvent, AsyncEvents, Completion, CompletionQueue, Context, Done, Error, LocalBuffer,
    ProtectionDomain, QpState, QueuePair, ReadyQp, SendFlags, SharedReceiveQueue, Source, WcStatus,
};

use crate::harness::{ALL, End, Half, PATIENCE, SIGNALED, SIZES, config, open, pattern};

/// One context with a shared queue and a queue pair on it for each client.
struct Server {
    qps: Vec<ReadyQp>,
    srq: SharedReceiveQueue,
    cq: CompletionQueue,
    pd: ProtectionDomain,
    context: Context,
    polled: Vec<Completion>,
}

/// A server whose queue holds `max_wr` requests, and its clients.
fn serve(client_count: usize, max_wr: u32) -> Option<(Server, Vec<End>)> {
    serve_with(client_count, max_wr, &config())
}

/// Waits for receives without end.
fn patient() -> ConnectConfig {
    ConnectConfig {
        rnr_retry: 7,
        ..config()
    }
}

fn serve_with(
    client_count: usize,
    max_wr: u32,
    config: &ConnectConfig,
) -> Option<(Server, Vec<End>)> {
    let context = open()?;
    let pd = ProtectionDomain::alloc(&context).unwrap();
    let cq = CompletionQueue::create(&context, 1024, None).unwrap();
    let srq = SharedReceiveQueue::create(&pd, max_wr, 4).unwrap();
    let mut server = Server {
        qps: Vec::new(),
        srq,
        cq,
        pd,
        context,
        polled: Vec::new(),
    };
    let mut clients = Vec::new();
    for _ in 0..client_count {
        let half = Half::new(open()?, config, ALL);
        let client_end = half.prepared.end_point();
        let prepared = server.prepare(config);
        clients.push(half.connect(&prepared.end_point()));
        server.qps.push(prepared.connect(&client_end).unwrap());
    }
    Some((server, clients))
}

impl Server {
    fn prepare(&self, config: &ConnectConfig) -> Prepared {
        Prepared::create_with_srq(&self.pd, &self.cq, &self.cq, &self.srq, config).unwrap()
    }

    fn post(&self, wr_id: u64, len: usize) {
        self.srq.post_recv(wr_id, self.buffer(len)).unwrap();
    }

    fn buffer(&self, len: usize) -> LocalBuffer {
        self.pd.alloc_local(len).unwrap()
    }

    /// Waits for the next completion; which queue pair it is from, and what it was.
    fn next(&mut self) -> (usize, Done) {
        assert!(self.has_completion(PATIENCE), "no completion");
        let completion = self.polled.remove(0);
        let index = self.owner_of(&completion);
        (index, self.qps[index].complete(completion).unwrap())
    }

    fn owner_of(&self, completion: &Completion) -> usize {
        let qpn = completion.qpn();
        let owner = self.qps.iter().position(|qp| qp.qpn() == qpn);
        owner.expect("a completion of one of the queue pairs")
    }

    fn has_completion(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.polled.is_empty() && Instant::now() < deadline {
            if self.cq.poll(&mut self.polled).unwrap() == 0 {
                std::thread::yield_now();
            }
        }
        !self.polled.is_empty()
    }

    fn expect_nothing(&mut self) {
        let is_quiet = !self.has_completion(Duration::from_millis(30));
        assert!(is_quiet, "unexpected: {:?}", self.polled);
    }
}

fn send(client: &mut End, wr_id: u64, bytes: &[u8]) {
    let source = Source::Local(client.buffer(bytes));
    let mut chain = client.qp.start_send();
    chain.send(wr_id, source, SIGNALED).unwrap();
    chain.submit().unwrap();
}

/// The first event that is not about a new connection; `None` after a while without one.
fn event(events: &AsyncEvents, timeout: Duration) -> Option<AsyncEvent> {
    loop {
        match events.wait(Some(timeout)).unwrap() {
            Some(AsyncEvent::CommEst(_)) => {}
            event => return event,
        }
    }
}

#[test]
fn messages_of_all_clients_take_requests_in_order() {
    let Some((mut server, mut clients)) = serve(3, 64) else {
        return;
    };
    for wr_id in 0..SIZES.len() as u64 {
        server.post(wr_id, 1 << 20);
    }
    assert_eq!(server.srq.room(), 64 - SIZES.len());
    for (wr_id, len) in (0..).zip(SIZES) {
        let index = usize::try_from(wr_id).unwrap() % 3;
        let bytes = pattern(u32::try_from(wr_id).unwrap(), len);
        send(&mut clients[index], wr_id, &bytes);
        clients[index].expect(wr_id);
        let (from, done) = server.next();
        assert_eq!(
            (from, done.wr_id, done.status),
            (index, wr_id, WcStatus::Success)
        );
        assert_eq!(done.byte_len as usize, len);
        assert_eq!(done.buffer.unwrap().as_slice()[..len], bytes);
    }
    assert_eq!(server.srq.room(), 64);
}

/// Messages of several packets from several clients at once: requests complete in another order than they
/// were taken.
#[test]
fn many_messages_at_once_are_kept_apart() {
    const LEN: usize = 30_000;
    let Some((mut server, mut clients)) = serve(4, 32) else {
        return;
    };
    for wr_id in 0..32 {
        server.post(wr_id, LEN);
    }
    let mut received = [0_u32; 4];
    for round in 0..10 {
        for (index, client) in (0..).zip(&mut clients) {
            for count in 0..4 {
                let seed = index * 1000 + round * 4 + count;
                send(client, count.into(), &pattern(seed, LEN));
            }
        }
        for _ in 0..16 {
            let (from, done) = server.next();
            assert!(done.is_success(), "{}", done.status);
            // Each client's messages arrive in its own order.
            let seed = u32::try_from(from).unwrap() * 1000 + received[from];
            let buffer = done.buffer.unwrap();
            assert!(buffer.as_slice() == pattern(seed, LEN), "client {from}");
            received[from] += 1;
            server.srq.post_recv(done.wr_id, buffer).unwrap();
        }
        for client in &mut clients {
            (0..4).for_each(|count| drop(client.expect(count)));
        }
    }
    assert_eq!(received, [40; 4]);
}

#[test]
fn a_write_with_immediate_takes_a_request_without_touching_it() {
    let Some((mut server, mut clients)) = serve(1, 4) else {
        return;
    };
    let image = transport::Mapping::anonymous(4096).unwrap();
    let region = server.pd.register(&image, 0..4096, ALL, None).unwrap();
    server.post(5, 16);
    let client = &mut clients[0];
    let mut chain = client.qp.start_send();
    let source = Source::Inline(b"into the image");
    chain
        .write_imm(1, source, region.remote(), *b"imm!", SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    client.expect(1);
    let (_, done) = server.next();
    assert_eq!(
        (done.wr_id, done.byte_len, done.imm),
        (5, 14, Some(*b"imm!"))
    );
    assert_eq!(done.buffer.unwrap().as_slice(), [0; 16]);
}

#[test]
fn a_message_is_scattered_over_the_buffers_of_a_request() {
    let Some((mut server, mut clients)) = serve(1, 4) else {
        return;
    };
    let buffers = [3, 1000, 5000, 1].map(|len| server.buffer(len));
    server.srq.post_recv(1, buffers).unwrap();
    let bytes = pattern(1, 5_500);
    send(&mut clients[0], 1, &bytes);
    let (_, done) = server.next();
    let mut received = Vec::new();
    for buffer in [done.buffer].into_iter().chain(done.more) {
        received.extend_from_slice(buffer.unwrap().as_slice());
    }
    assert_eq!(received[..5_500], bytes);
}

#[test]
fn an_empty_queue_makes_the_peer_wait() {
    let Some((mut server, mut clients)) = serve_with(2, 4, &patient()) else {
        return;
    };
    send(&mut clients[0], 1, b"early");
    send(&mut clients[1], 1, &pattern(1, 9_000));
    server.expect_nothing();
    server.post(1, 10_000);
    server.post(2, 10_000);
    let mut lengths = [server.next().1, server.next().1].map(|done| done.byte_len);
    lengths.sort_unstable();
    assert_eq!(lengths, [5, 9_000]);
    clients.iter_mut().for_each(|client| drop(client.expect(1)));
}

#[test]
fn the_limit_raises_one_event_for_each_arming() {
    let Some((mut server, mut clients)) = serve(1, 8) else {
        return;
    };
    let events = server.context.async_events();
    let reached = Some(AsyncEvent::SrqLimitReached(server.srq.id()));
    for wr_id in 0..8 {
        server.post(wr_id, 8);
    }
    server.srq.set_limit(7).unwrap();
    assert_eq!(server.srq.query().unwrap().limit, 7);
    let mut receive = || {
        send(&mut clients[0], 1, b"x");
        clients[0].expect(1);
        server.next();
    };
    receive();
    // 7 are left, which is not below the limit.
    assert_eq!(event(&events, Duration::from_millis(30)), None);
    receive();
    assert_eq!(event(&events, PATIENCE), reached);
    receive();
    assert_eq!(event(&events, Duration::from_millis(30)), None);
    assert_eq!(
        server.srq.query().unwrap().limit,
        0,
        "disarmed by the event"
    );
    server.srq.set_limit(8).unwrap();
    assert_eq!(event(&events, Duration::from_millis(30)), None);
    send(&mut clients[0], 1, b"x");
    assert_eq!(event(&events, PATIENCE), reached);
}

/// A queue pair in ERR flushes nothing that waits in the shared queue: the other queue pairs take it.
#[test]
fn a_queue_pair_in_error_leaves_the_requests_to_others() {
    let Some((mut server, mut clients)) = serve(2, 8) else {
        return;
    };
    let events = server.context.async_events();
    (1..4).for_each(|wr_id| server.post(wr_id, 100));
    server.qps[0].to_error().unwrap();
    server.expect_nothing();
    let qpn = server.qps[0].qpn();
    match event(&events, Duration::from_secs(1)) {
        Some(event) => assert_eq!(event, AsyncEvent::QpLastWqeReached(qpn)),
        // Kernel rxe has the event from 6.2 on.
        None => assert!(!server.context.is_soft(), "no event"),
    }
    for wr_id in 1..4 {
        send(&mut clients[1], wr_id, b"still here");
        clients[1].expect(wr_id);
        let (from, done) = server.next();
        assert_eq!(
            (from, done.wr_id, done.status),
            (1, wr_id, WcStatus::Success)
        );
    }
}

#[test]
fn a_message_that_does_not_fit_costs_one_request() {
    let Some((mut server, mut clients)) = serve(2, 8) else {
        return;
    };
    (1..4).for_each(|wr_id| server.post(wr_id, 100));
    send(&mut clients[0], 1, &[0; 101]);
    // rxe answers with "remote operational error" and calls it a local operation error itself.
    clients[0].expect_error(1, &[WcStatus::RemInvReqErr, WcStatus::RemOpErr]);
    let (from, done) = server.next();
    assert_eq!((from, done.wr_id), (0, 1));
    let statuses = [WcStatus::LocLenErr, WcStatus::LocQpOpErr];
    assert!(statuses.contains(&done.status), "{}", done.status);
    assert_eq!(done.buffer.unwrap().len(), 100);
    server.expect_nothing();
    assert_eq!(server.qps[0].query().unwrap().state, QpState::Err);
    assert_eq!(server.srq.room(), 6);
    send(&mut clients[1], 2, &[0; 100]);
    let (from, done) = server.next();
    assert_eq!((from, done.wr_id, done.status), (1, 2, WcStatus::Success));
}

#[test]
fn a_full_queue_gives_the_buffer_back() {
    let Some((server, _clients)) = serve(1, 2) else {
        return;
    };
    (0..2).for_each(|wr_id| server.post(wr_id, 8));
    let mut buffer = server.buffer(4);
    buffer.as_mut_slice().copy_from_slice(b"mine");
    let failed = server.srq.post_recv(2, buffer).unwrap_err();
    assert!(
        matches!(*failed.error, Error::QueueFull { capacity: 2, .. }),
        "{failed}"
    );
    assert_eq!(failed.value.as_slice(), b"mine");
}

#[test]
fn requests_that_could_only_fail_are_refused() {
    let Some((mut server, _clients)) = serve(1, 8) else {
        return;
    };
    let other = ProtectionDomain::alloc(&server.context).unwrap();
    let failed = server
        .srq
        .post_recv(1, other.alloc_local(8).unwrap())
        .unwrap_err();
    assert!(
        matches!(*failed.error, Error::WrongProtectionDomain),
        "{failed}"
    );
    let five = [(); 5].map(|()| server.buffer(8));
    let failed = server.srq.post_recv(1, five).unwrap_err();
    let error = Error::TooManySge { count: 5, max: 4 };
    assert_eq!(failed.to_string(), error.to_string());
    let buffer = server.buffer(8);
    let failed = server.qps[0].post_recv(1, buffer).unwrap_err();
    assert!(matches!(*failed.error, Error::SharedReceives), "{failed}");
    let (cq, srq) = (&server.cq, &server.srq);
    let capabilities = config().capabilities;
    let refused = QueuePair::create_with_srq(&other, cq, cq, srq, &capabilities);
    assert!(matches!(refused, Err(Error::WrongProtectionDomain)));
    assert_eq!(server.srq.room(), 8);
}

#[test]
fn a_completion_is_for_the_queue_pair_that_took_the_request() {
    let Some((mut server, mut clients)) = serve(2, 8) else {
        return;
    };
    server.post(1, 8);
    server.post(2, 8);
    send(&mut clients[0], 1, b"for one");
    assert!(server.has_completion(PATIENCE));
    let completion = server.polled.remove(0);
    let refused = server.qps[1].complete(completion);
    assert!(matches!(refused, Err(Error::ForeignCompletion { .. })));
    assert_eq!(server.srq.room(), 6, "what it held is kept");
    send(&mut clients[0], 1, b"again");
    let (from, done) = server.next();
    assert_eq!(
        (from, done.wr_id),
        (0, 2),
        "the earlier one is not released with it"
    );
    assert_eq!(server.srq.room(), 7);
}

#[test]
fn sizes_are_checked() {
    let Some((server, _clients)) = serve(1, 8) else {
        return;
    };
    let limits = server.context.attr().unwrap();
    let too_many_sge = limits.max_srq_sge + 1;
    let error = SharedReceiveQueue::create(&server.pd, 8, too_many_sge).unwrap_err();
    assert!(
        error.to_string().contains("exceeds the device's limit"),
        "{error}"
    );
    let error = SharedReceiveQueue::create(&server.pd, limits.max_srq_wr + 1, 1).unwrap_err();
    // rxe has as many as this crate can number.
    let is_refused = matches!(error, Error::CreateSrq { .. } | Error::Parameter { .. });
    assert!(is_refused, "{error}");
    let error = SharedReceiveQueue::create(&server.pd, 0, 1).unwrap_err();
    assert!(
        matches!(error, Error::Parameter { name: "max_wr", .. }),
        "{error}"
    );
    let error = server.srq.set_limit(9).unwrap_err();
    assert!(
        matches!(error, Error::Parameter { name: "limit", .. }),
        "{error}"
    );
    let status = server.srq.query().unwrap();
    assert!(status.max_wr >= 8 && status.max_sge >= 4, "{status:?}");
    assert_eq!(status.limit, 0);
}

/// Each completion queue needs room for the shared requests once, however many queue pairs report to it.
#[test]
fn a_completion_queue_that_could_overflow_is_refused() {
    let Some((server, _clients)) = serve(1, 8) else {
        return;
    };
    // Twice the send requests, once the receives.
    let send_wr = config().capabilities.max_send_wr;
    let create = |cq: &CompletionQueue, send_cq: &CompletionQueue| {
        let (pd, srq) = (&server.pd, &server.srq);
        QueuePair::create_with_srq(pd, send_cq, cq, srq, &config().capabilities)
    };
    let send_cq = CompletionQueue::create(&server.context, 3 * send_wr as usize, None).unwrap();
    let cq = CompletionQueue::create(&server.context, 8, None).unwrap();
    let one = create(&cq, &send_cq).unwrap();
    let two = create(&cq, &send_cq).unwrap();
    // Devices may grant more entries than were asked for.
    if cq.capacity() == 8 {
        let error = server.srq.resize(9).unwrap_err();
        assert!(
            matches!(error, Error::CompletionQueueTooSmall { .. }),
            "{error}"
        );
        drop((one, two));
        server.srq.resize(9).unwrap();
        let error = create(&cq, &send_cq).unwrap_err();
        assert!(
            matches!(error, Error::CompletionQueueTooSmall { .. }),
            "{error}"
        );
    }
}

#[test]
fn a_resized_queue_keeps_its_requests() {
    let Some((mut server, mut clients)) = serve(1, 4) else {
        return;
    };
    (0..4).for_each(|wr_id| server.post(wr_id, 8));
    send(&mut clients[0], 1, b"0");
    clients[0].expect(1);
    server.srq.resize(40).unwrap();
    assert_eq!(server.srq.room(), 36);
    (4..40).for_each(|wr_id| server.post(wr_id, 8));
    assert_eq!(server.srq.room(), 0);
    assert!(matches!(
        server.srq.resize(39),
        Err(Error::Parameter { name: "max_wr", .. })
    ));
    for wr_id in 0..40 {
        if wr_id > 0 {
            send(&mut clients[0], 1, b"x");
            clients[0].expect(1);
        }
        let (_, done) = server.next();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::Success));
    }
    server.srq.resize(2).unwrap();
    assert_eq!(server.srq.room(), 2);
    server.post(1, 8);
    server.post(2, 8);
    assert_eq!(server.srq.room(), 0);
}

#[test]
fn everything_may_be_dropped_in_any_order() {
    let leaked = transport::leaked_objects();
    for round in 0..4 {
        let Some((server, mut clients)) = serve(2, 16) else {
            return;
        };
        (0..8).for_each(|wr_id| server.post(wr_id, 20_000));
        for client in &mut clients {
            let source = Source::Shared(&client.region, 0..20_000);
            let mut chain = client.qp.start_send();
            chain.send(1, source, SendFlags::empty()).unwrap();
            chain.submit().unwrap();
        }
        let Server {
            qps,
            srq,
            cq,
            pd,
            context,
            ..
        } = server;
        match round {
            0 => drop((srq, qps, cq, pd, context)),
            1 => drop((context, pd, cq, srq, qps)),
            2 => drop((qps, srq, pd, cq, context)),
            _ => drop((cq, qps, context, srq, pd, clients)),
        }
    }
    assert_eq!(
        transport::leaked_objects(),
        leaked,
        "something could not be destroyed"
    );
}

/// One thread posts while one for each queue pair completes.
#[test]
fn threads_may_post_and_complete_at_once() {
    const CLIENTS: usize = 3;
    const COUNT: usize = 200;
    let patient = patient();
    let Some((mut server, clients)) = serve_with(0, 16, &patient) else {
        return;
    };
    assert!(clients.is_empty());
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            let half = Half::new(open().unwrap(), &patient, ALL);
            let client_end = half.prepared.end_point();
            let cq = CompletionQueue::create(&server.context, 256, None).unwrap();
            let (pd, srq) = (&server.pd, server.srq.clone());
            let prepared = Prepared::create_with_srq(pd, &cq, &cq, &srq, &patient).unwrap();
            let mut client = half.connect(&prepared.end_point());
            let mut qp = prepared.connect(&client_end).unwrap();
            scope.spawn(move || {
                for count in 0..COUNT {
                    send(&mut client, count as u64, &count.to_le_bytes());
                    client.expect(count as u64);
                }
            });
            scope.spawn(move || {
                let mut completions = Vec::new();
                let mut received = 0_usize;
                let deadline = Instant::now() + PATIENCE;
                while received < COUNT {
                    assert!(Instant::now() < deadline, "{received} of {COUNT}");
                    cq.poll(&mut completions).unwrap();
                    for completion in completions.drain(..) {
                        let done = qp.complete(completion).unwrap();
                        assert!(done.is_success(), "{}", done.status);
                        let buffer = done.buffer.unwrap();
                        assert_eq!(buffer.as_slice()[..8], received.to_le_bytes());
                        received += 1;
                    }
                    std::thread::yield_now();
                }
            });
        }
        let mut posted = 0;
        let deadline = Instant::now() + PATIENCE;
        while posted < CLIENTS * COUNT {
            assert!(Instant::now() < deadline, "posted {posted}");
            if server.srq.room() > 0 {
                server.post(posted as u64, 8);
                posted += 1;
            } else {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(server.srq.room(), 16);
    server.expect_nothing();
}
