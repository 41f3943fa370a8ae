//! Accounting: signalling, full queues, order, ownership of what was posted.

use std::sync::Arc;

use transport::connect::ConnectConfig;
use transport::{
    CompletionQueue, Error, ProtectionDomain, QpCapabilities, QueuePair, SendFlags, Source,
    WcStatus,
};

use crate::harness::{ALL, Half, Pair, SIGNALED, config, open, pair, pair_with, pattern};

const QUIET: SendFlags = SendFlags::empty();

/// A connection with queues of four requests.
fn small_pair() -> Option<Pair> {
    let capabilities = QpCapabilities {
        max_send_wr: 4,
        max_recv_wr: 4,
        ..config().capabilities
    };
    let config = ConnectConfig {
        capabilities,
        ..config()
    };
    pair_with(&config, &config, ALL)
}

#[test]
fn one_signalled_completion_stands_for_those_before_it() {
    let Some(mut pair) = small_pair() else { return };
    for round in 0..20_u8 {
        let mut chain = pair.near.qp.start_send();
        for (index, flags) in (0..4).zip([QUIET, QUIET, QUIET, SIGNALED]) {
            let remote = pair.far.remote(usize::from(index));
            let bytes = [round + index];
            chain
                .write(index.into(), Source::Inline(&bytes), remote, flags)
                .unwrap();
        }
        assert_eq!((chain.len(), chain.room()), (4, 0));
        chain.submit().unwrap();
        pair.near.expect(3);
        assert_eq!(
            (pair.near.qp.send_room(), pair.near.qp.sends_outstanding()),
            (4, 0)
        );
        assert_eq!(
            pair.far.image_bytes(0, 4),
            [round, round + 1, round + 2, round + 3]
        );
    }
    pair.near.expect_nothing();
}

#[test]
fn a_full_send_queue_says_whether_it_drains() {
    let Some(mut pair) = small_pair() else { return };
    let remote = pair.far.remote(0);
    let mut chain = pair.near.qp.start_send();
    chain
        .write(1, Source::Inline(b"a"), remote, SIGNALED)
        .unwrap();
    for _ in 0..3 {
        chain.write(2, Source::Inline(b"b"), remote, QUIET).unwrap();
    }
    let full = chain
        .write(3, Source::Inline(b"c"), remote, SIGNALED)
        .unwrap_err();
    assert!(
        matches!(
            full,
            Error::QueueFull {
                queue: "send",
                capacity: 4,
                drains: true
            }
        ),
        "{full}"
    );
    chain.submit().unwrap();
    pair.near.expect(1);

    // Three unsignalled requests are left, so one signalled one fits, and frees them all.
    assert_eq!(pair.near.qp.send_room(), 1);
    let mut chain = pair.near.qp.start_send();
    chain
        .write(4, Source::Inline(b"d"), remote, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    pair.near.expect(4);
    assert_eq!(pair.near.qp.send_room(), 4);

    let mut chain = pair.near.qp.start_send();
    for _ in 0..4 {
        chain.write(5, Source::Inline(b"e"), remote, QUIET).unwrap();
    }
    let stuck = chain
        .write(6, Source::Inline(b"f"), remote, SIGNALED)
        .unwrap_err();
    assert!(
        stuck.to_string().contains("nothing will ever make room"),
        "{stuck}"
    );
}

#[test]
fn a_full_receive_queue_gives_the_buffer_back() {
    let Some(mut pair) = small_pair() else { return };
    for wr_id in 0..4 {
        let buffer = pair.far.buffer(b"0123");
        pair.far.qp.post_recv(wr_id, buffer).unwrap();
    }
    assert_eq!(pair.far.qp.recv_room(), 0);
    let buffer = pair.far.buffer(b"mine");
    let failed = pair.far.qp.post_recv(4, buffer).unwrap_err();
    assert!(
        matches!(
            *failed.error,
            Error::QueueFull {
                queue: "receive",
                ..
            }
        ),
        "{failed}"
    );
    assert_eq!(failed.value.as_slice(), b"mine");
}

#[test]
fn completions_come_in_order() {
    let Some(mut pair) = pair() else { return };
    let region = pair.near.region.clone();
    for _ in 0..5 {
        let buffers: Vec<_> = (0..20).map(|_| pair.near.buffer(&[0; 300])).collect();
        let mut chain = pair.near.qp.start_send();
        for (index, buffer) in buffers.into_iter().enumerate() {
            let wr_id = 2 * index as u64;
            let len = 1 + 700 * (index % 5);
            let source = Source::Shared(&region, 0..len);
            chain
                .write(wr_id, source, pair.far.remote(0), SIGNALED)
                .unwrap();
            chain
                .read(wr_id + 1, buffer, pair.far.remote(0), SIGNALED)
                .unwrap();
        }
        chain.submit().unwrap();
        for wr_id in 0..40 {
            pair.near.expect(wr_id);
        }
    }
}

#[test]
fn a_dropped_or_forgotten_chain_posts_nothing() {
    let Some(mut pair) = pair() else { return };
    let remote = pair.far.remote(0);
    let buffer = pair.near.buffer(b"never");
    let mut chain = pair.near.qp.start_send();
    chain
        .write(1, Source::Local(buffer), remote, SIGNALED)
        .unwrap();
    drop(chain);
    let region = pair.near.region.clone();
    let mut chain = pair.near.qp.start_send();
    chain
        .write(2, Source::Shared(&region, 0..5), remote, SIGNALED)
        .unwrap();
    std::mem::forget(chain);
    pair.near.expect_nothing();
    assert_eq!(pair.near.qp.start_send().room(), 64);

    let mut chain = pair.near.qp.start_send();
    chain
        .write(3, Source::Inline(b"real"), remote, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    pair.near.expect(3);
    assert_eq!(pair.far.image_bytes(0, 5), b"real\0");
    // The forgotten request no longer holds the region.
    assert_eq!(Arc::strong_count(&region), 2);
}

#[test]
fn requests_that_could_only_fail_are_refused() {
    let Some(mut pair) = pair() else { return };
    let remote = pair.far.remote(0);
    let region = pair.near.region.clone();
    let len = region.len();
    let foreign_pd = ProtectionDomain::alloc(&pair.near.context).unwrap();
    let foreign = foreign_pd.alloc_local(8).unwrap();
    let five = [(); 5].map(|()| Source::Shared(&region, 0..1));
    let buffer = pair.near.buffer(&[0; 7]);

    let mut chain = pair.near.qp.start_send();
    let error = chain.write(1, five, remote, SIGNALED).unwrap_err();
    assert!(
        matches!(error, Error::TooManySge { count: 5, max: 4 }),
        "{error}"
    );
    let error = chain
        .write(1, Source::Inline(&[0; 65]), remote, SIGNALED)
        .unwrap_err();
    assert!(
        matches!(error, Error::InlineTooLong { len: 65, max: 64 }),
        "{error}"
    );
    let mixed = [Source::Inline(b"x"), Source::Shared(&region, 0..1)];
    let error = chain.write(1, mixed, remote, SIGNALED).unwrap_err();
    assert!(matches!(error, Error::MixedInline), "{error}");
    let error = chain
        .send(1, Source::Shared(&region, len - 1..len + 1), SIGNALED)
        .unwrap_err();
    assert!(matches!(error, Error::OutOfBounds { .. }), "{error}");
    let failed = chain.read(1, foreign, remote, SIGNALED).unwrap_err();
    assert!(
        matches!(*failed.error, Error::WrongProtectionDomain),
        "{failed}"
    );
    let failed = chain.fetch_add(1, buffer, remote, 1, SIGNALED).unwrap_err();
    assert!(
        matches!(*failed.error, Error::AtomicLength { len: 7 }),
        "{failed}"
    );
    assert_eq!(failed.value.len(), 7);
    assert!(chain.is_empty());
    chain.submit().unwrap();
    pair.near.expect_nothing();
}

/// The bit is that of `IBV_SEND_INLINE`; passed on, it would make a registered address an inline one.
#[test]
fn flags_without_a_name_change_nothing() {
    let Some(mut pair) = pair() else { return };
    let bytes = pattern(1, 5_000);
    let source = Source::Local(pair.near.buffer(&bytes));
    let flags = SendFlags::from_bits_retain(8) | SIGNALED;
    let mut chain = pair.near.qp.start_send();
    chain
        .write(
            1,
            Source::Inline(b"an inline part before it"),
            pair.far.remote(0),
            QUIET,
        )
        .unwrap();
    chain.write(2, source, pair.far.remote(0), flags).unwrap();
    chain.submit().unwrap();
    pair.near.expect(2);
    assert!(pair.far.image_bytes(0, bytes.len()) == bytes);
}

#[test]
fn a_completion_queue_cannot_be_overcommitted() {
    let Some(context) = open() else { return };
    let pd = ProtectionDomain::alloc(&context).unwrap();
    let cq = CompletionQueue::create(&context, 16, None).unwrap();
    let half = u32::try_from(cq.capacity() / 2).unwrap();
    let capabilities = QpCapabilities {
        max_send_wr: half,
        max_recv_wr: half,
        ..QpCapabilities::default()
    };
    let first = QueuePair::create(&pd, &cq, &cq, &capabilities).unwrap();
    let one = QpCapabilities {
        max_send_wr: 1,
        max_recv_wr: 1,
        ..QpCapabilities::default()
    };
    let error = QueuePair::create(&pd, &cq, &cq, &one).unwrap_err();
    assert!(
        matches!(error, Error::CompletionQueueTooSmall { needed: 1, .. }),
        "{error}"
    );
    first.destroy().unwrap();
    QueuePair::create(&pd, &cq, &cq, &one).unwrap();
}

#[test]
fn a_resized_completion_queue_keeps_its_completions_and_promises() {
    let Some(mut pair) = pair() else { return };
    let post = |pair: &mut Pair, wr_ids: std::ops::Range<u64>| {
        let mut chain = pair.near.qp.start_send();
        for wr_id in wr_ids {
            let source = Source::Inline(b"x");
            let remote = pair.far.remote(0);
            chain.write(wr_id, source, remote, SIGNALED).unwrap();
        }
        chain.submit().unwrap();
    };
    post(&mut pair, 0..20);
    let cq = pair.near.cq.clone();
    cq.resize(1000).unwrap();
    assert!(cq.capacity() >= 1000);
    post(&mut pair, 20..40);
    (0..30).for_each(|wr_id| drop(pair.near.expect(wr_id)));

    // 64 send requests and 64 receives.
    let error = cq.resize(127).unwrap_err();
    assert!(
        matches!(error, Error::Parameter { name: "cqe", .. }),
        "{error}"
    );
    cq.resize(128).unwrap();
    let create = || QueuePair::create(&pair.near.pd, &cq, &cq, &config().capabilities);
    if cq.capacity() < 256 {
        let error = create().unwrap_err();
        assert!(
            matches!(error, Error::CompletionQueueTooSmall { .. }),
            "{error}"
        );
    }
    cq.resize(256).unwrap();
    create().unwrap();
    (30..40).for_each(|wr_id| drop(pair.near.expect(wr_id)));
    pair.near.expect_nothing();

    let limits = pair.near.context.attr().unwrap();
    let error = cq.resize(limits.max_cqe as usize + 1).unwrap_err();
    assert!(matches!(error, Error::Verb { .. }), "{error}");
}

#[test]
fn completions_release_only_their_own_queue_pair() {
    let (Some(mut one), Some(mut two)) = (pair(), pair()) else {
        return;
    };
    for pair in [&mut one, &mut two] {
        let mut chain = pair.near.qp.start_send();
        chain
            .write(1, Source::Inline(b"x"), pair.far.remote(0), SIGNALED)
            .unwrap();
        chain.submit().unwrap();
    }
    let (of_one, of_two) = (one.near.next_completion(), two.near.next_completion());
    assert!(matches!(
        one.near.qp.complete(of_two),
        Err(Error::ForeignCompletion { .. })
    ));
    assert!(matches!(
        two.near.qp.complete(of_one),
        Err(Error::ForeignCompletion { .. })
    ));
    assert_eq!(
        (
            one.near.qp.sends_outstanding(),
            two.near.qp.sends_outstanding()
        ),
        (1, 1)
    );
}

#[test]
fn a_late_completion_releases_nothing_twice() {
    let Some(mut pair) = pair() else { return };
    let mut chain = pair.near.qp.start_send();
    for wr_id in 1..=3 {
        chain
            .write(wr_id, Source::Inline(b"x"), pair.far.remote(0), SIGNALED)
            .unwrap();
    }
    chain.submit().unwrap();
    let [first, second, third] = [(); 3].map(|()| pair.near.next_completion());
    assert_eq!(pair.near.qp.complete(second).unwrap().wr_id, 2);
    assert_eq!(pair.near.qp.sends_outstanding(), 1);
    assert!(matches!(
        pair.near.qp.complete(first),
        Err(Error::ForeignCompletion { .. })
    ));
    assert_eq!(pair.near.qp.complete(third).unwrap().wr_id, 3);
}

#[test]
fn an_unsignalled_request_that_fails_completes() {
    let Some(mut pair) = pair() else { return };
    let mut wrong = pair.far.remote(0);
    wrong.rkey.0 ^= 0x5a5a_5a00;
    let mut chain = pair.near.qp.start_send();
    chain
        .write(1, Source::Inline(b"x"), pair.far.remote(0), QUIET)
        .unwrap();
    chain.write(2, Source::Inline(b"x"), wrong, QUIET).unwrap();
    chain.submit().unwrap();
    pair.near.expect_error(2, &[WcStatus::RemAccessErr]);
    assert_eq!(pair.near.qp.sends_outstanding(), 0);
}

#[test]
fn everything_may_be_dropped_in_any_order() {
    let leaked = transport::leaked_objects();
    for round in 0..6 {
        let Some(mut pair) = pair() else { return };
        for wr_id in 0..4 {
            let buffer = pair.near.buffer(&pattern(round, 5_000));
            pair.near.qp.post_recv(wr_id, buffer).unwrap();
        }
        let region = pair.near.region.clone();
        let mut chain = pair.near.qp.start_send();
        for wr_id in 0..30 {
            let source = Source::Shared(&region, 0..100_000);
            chain
                .write(wr_id, source, pair.far.remote(0), QUIET)
                .unwrap();
        }
        chain.submit().unwrap();
        drop(region);
        let near = pair.near;
        match round % 3 {
            0 => {
                drop((near.context, near.pd, near.cq, near.region, near.image));
                drop(near.qp);
            }
            1 => {
                drop(near.qp);
                drop((near.image, near.region, near.cq, near.pd, near.context));
            }
            _ => {
                drop(pair.far);
                drop((near.region, near.qp, near.context));
                continue;
            }
        }
        drop(pair.far);
    }
    assert_eq!(
        transport::leaked_objects(),
        leaked,
        "something could not be destroyed"
    );
}

#[test]
fn a_region_is_held_by_the_requests_that_read_it() {
    let Some(context) = open() else { return };
    let near = Half::new(context, &config(), ALL);
    let Some(far) = open().map(|context| Half::new(context, &config(), ALL)) else {
        return;
    };
    let (near_end, far_end) = (near.prepared.end_point(), far.prepared.end_point());
    let (mut near, far) = (near.connect(&far_end), far.connect(&near_end));

    let extra = near.pd.register(&near.image, 0..4_096, ALL, None).unwrap();
    let extra = Arc::new(extra);
    let mut chain = near.qp.start_send();
    chain
        .write(1, Source::Shared(&extra, 0..4_096), far.remote(0), SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    let failed = extra.deregister_shared().unwrap_err();
    assert!(
        matches!(*failed.error, Error::InUse { holders: 1 }),
        "{failed}"
    );
    near.expect(1);
    failed.value.deregister_shared().unwrap();
}
