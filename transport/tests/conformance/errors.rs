//! Every way in which a request fails: which status, at which end, and what it did not do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use transport::connect::ConnectConfig;
use transport::{
    AccessFlags, Error, ProtectionDomain, QpState, Remote, Rkey, SendFlags, Source, WcStatus,
};

use crate::differences::{Difference, Maker};
use crate::harness::{ALL, End, PATIENCE, Pair, SIGNALED, config, pair, pair_with, pattern};

const QUIET: SendFlags = SendFlags::empty();

/// Waits until the queue pair has moved itself to ERR.
fn expect_err_state(end: &End) {
    let deadline = Instant::now() + PATIENCE;
    while end.qp.query().unwrap().state != QpState::Err {
        assert!(
            Instant::now() < deadline,
            "the queue pair stays in {:?}",
            end.qp.query()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A WRITE that must be refused, at both ends, without a byte changed.
fn expect_write_refused(pair: &mut Pair, remote: Remote, status: WcStatus) {
    let before = pair.far.image_bytes(0, 1 << 16);
    let done = pair.near.write(&pattern(9, 5_000), remote);
    assert_eq!(done.status, status);
    expect_err_state(&pair.near);
    expect_err_state(&pair.far);
    assert!(
        pair.far.image_bytes(0, 1 << 16) == before,
        "a refused WRITE changed memory"
    );
}

#[test]
fn a_key_that_never_was() {
    let Some(mut pair) = pair() else { return };
    let mut remote = pair.far.remote(0);
    remote.rkey = Rkey(remote.rkey.0 ^ 0x1234_5600);
    expect_write_refused(&mut pair, remote, WcStatus::RemAccessErr);
}

#[test]
fn a_key_with_another_tag() {
    let Some(mut pair) = pair() else { return };
    let mut remote = pair.far.remote(0);
    remote.rkey = Rkey(remote.rkey.0 ^ 1);
    expect_write_refused(&mut pair, remote, WcStatus::RemAccessErr);
}

#[test]
fn out_of_bounds_at_both_ends_and_around_the_address_space() {
    let len = crate::harness::IMAGE_LEN as u64;
    for byte_offset in [len - 4_999, len, u64::MAX, u64::MAX - 4_998] {
        let Some(mut pair) = pair() else { return };
        let remote = pair.far.region.remote().at(byte_offset);
        expect_write_refused(&mut pair, remote, WcStatus::RemAccessErr);
    }
    let Some(mut pair) = pair() else { return };
    let remote = Remote {
        addr: u64::MAX - 100,
        rkey: pair.far.region.rkey(),
    };
    expect_write_refused(&mut pair, remote, WcStatus::RemAccessErr);
}

#[test]
fn an_end_that_just_fits() {
    let Some(mut pair) = pair() else { return };
    let bytes = pattern(1, 5_000);
    let at = crate::harness::IMAGE_LEN - bytes.len();
    assert!(pair.near.write(&bytes, pair.far.remote(at)).is_success());
    assert!(pair.far.image_bytes(at, bytes.len()) == bytes);
}

#[test]
fn rights_missing_on_the_region() {
    for (missing, operation) in [
        (AccessFlags::REMOTE_WRITE, "WRITE"),
        (AccessFlags::REMOTE_READ, "READ"),
        (AccessFlags::REMOTE_ATOMIC, "FETCH_ADD"),
    ] {
        let Some(mut pair) = pair_with(&config(), &config(), ALL - missing) else {
            return;
        };
        let done = operate(&mut pair, operation).unwrap();
        assert_eq!(done, WcStatus::RemAccessErr, "{operation}");
        expect_err_state(&pair.near);
        expect_err_state(&pair.far);
    }
}

#[test]
fn rights_missing_on_the_queue_pair() {
    for (missing, operation) in [
        (AccessFlags::REMOTE_WRITE, "WRITE"),
        (AccessFlags::REMOTE_READ, "READ"),
        (AccessFlags::REMOTE_ATOMIC, "FETCH_ADD"),
    ] {
        let far = ConnectConfig {
            access: ALL - missing,
            ..config()
        };
        let Some(mut pair) = pair_with(&config(), &far, ALL) else {
            return;
        };
        let done = operate(&mut pair, operation).unwrap();
        assert_eq!(done, WcStatus::RemInvReqErr, "{operation}");
        expect_err_state(&pair.near);
        expect_err_state(&pair.far);
    }
}

/// Does one operation on the far image and tells how it ended.
fn operate(pair: &mut Pair, operation: &str) -> Result<WcStatus, Error> {
    let remote = pair.far.remote(64);
    let into = pair.near.buffer(&[0; 8]);
    let mut chain = pair.near.qp.start_send();
    match operation {
        "WRITE" => chain.write(1, Source::Inline(b"12345678"), remote, SIGNALED)?,
        "READ" => chain.read(1, into, remote, SIGNALED)?,
        _ => chain.fetch_add(1, into, remote, 1, SIGNALED)?,
    }
    chain.submit()?;
    Ok(pair.near.next().status)
}

#[test]
fn a_key_of_another_protection_domain() {
    let Some(mut pair) = pair() else { return };
    let other = ProtectionDomain::alloc(&pair.far.context).unwrap();
    let region = other
        .register(&pair.far.image, 0..1 << 16, ALL, None)
        .unwrap();
    expect_write_refused(&mut pair, region.remote(), WcStatus::RemAccessErr);
}

#[test]
fn a_key_after_deregistration_and_registration_again() {
    let Some(mut pair) = pair() else { return };
    let region = pair
        .far
        .pd
        .register(&pair.far.image, 0..1 << 16, ALL, Some(1 << 44))
        .unwrap();
    let stale = region.remote();
    assert!(pair.near.write(b"fresh", stale).is_success());
    region.deregister().unwrap();
    let again = pair
        .far
        .pd
        .register(&pair.far.image, 0..1 << 16, ALL, Some(1 << 44))
        .unwrap();
    assert_ne!(again.rkey(), stale.rkey, "a key is used again at once");
    expect_write_refused(&mut pair, stale, WcStatus::RemAccessErr);
}

/// The fence that the log relies on: not one byte after `deregister` has returned.
#[test]
fn no_byte_moves_after_deregistration() {
    let Some(mut pair) = pair() else { return };
    let len = 1 << 20;
    let region = pair
        .far
        .pd
        .register(&pair.far.image, 0..len, ALL, None)
        .unwrap();
    let remote = region.remote();
    for (wr_id, seed) in (0..16).zip(1..) {
        pair.near.image.write_at(0, &pattern(seed, len)).unwrap();
        let source = pair.near.region.clone();
        let mut chain = pair.near.qp.start_send();
        chain
            .write(wr_id, Source::Shared(&source, 0..len), remote, QUIET)
            .unwrap();
        chain.submit().unwrap();
    }
    // Let some of it arrive, wherever that leaves the rest.
    let deadline = Instant::now() + Duration::from_millis(20);
    while Instant::now() < deadline {
        let _ = pair.near.cq.poll(&mut Vec::new()).unwrap();
    }
    region.deregister().unwrap();
    let fenced = pair.far.image_bytes(0, len);
    let until = Instant::now() + Duration::from_millis(200);
    while Instant::now() < until {
        let _ = pair.near.cq.poll(&mut Vec::new()).unwrap();
        assert!(
            pair.far.image_bytes(0, len) == fenced,
            "written after the fence"
        );
    }
}

/// The same for READs: what is written after `deregister` has returned, nobody reads.
#[test]
fn no_byte_leaves_after_deregistration() {
    const LATER: u8 = 0xee;
    let Some(mut pair) = pair() else { return };
    let len = 1 << 20;
    let region = pair
        .far
        .pd
        .register(&pair.far.image, 0..len, ALL, None)
        .unwrap();
    let remote = region.remote();
    for wr_id in 0..16 {
        let into = pair.near.buffer(&vec![0; len]);
        let mut chain = pair.near.qp.start_send();
        chain.read(wr_id, into, remote, SIGNALED).unwrap();
        chain.submit().unwrap();
    }
    // Let some of it arrive, wherever that leaves the rest.
    pair.near.expect(0);
    region.deregister().unwrap();
    pair.far.image.write_at(0, &vec![LATER; len]).unwrap();
    for wr_id in 1..16 {
        let done = pair.near.next();
        assert_eq!(done.wr_id, wr_id);
        let buffer = done.buffer.unwrap();
        let has_leaked = buffer.as_slice().contains(&LATER);
        assert!(!has_leaked, "request {wr_id}, {}", done.status);
    }
}

#[test]
fn a_message_of_no_bytes_needs_no_key() {
    let Some(mut pair) = pair() else { return };
    let nowhere = Remote {
        addr: 0,
        rkey: Rkey(0),
    };
    assert_eq!(pair.near.write(b"", nowhere).status, WcStatus::Success);
    assert_eq!(pair.near.read(0, nowhere).status, WcStatus::Success);
}

#[test]
fn a_misaligned_atomic() {
    let Some(mut pair) = pair() else { return };
    let into = pair.near.buffer(&[0; 8]);
    let mut chain = pair.near.qp.start_send();
    chain
        .fetch_add(1, into, pair.far.remote(65), 1, SIGNALED)
        .unwrap();
    match chain.submit() {
        Ok(()) => {
            pair.near.expect_error(1, &[WcStatus::RemInvReqErr]);
        }
        // rxe and the software device look at the address when the request is posted.
        Err(error) => assert!(matches!(error, Error::Post { accepted: 0, .. }), "{error}"),
    }
    assert_eq!(pair.far.image_bytes(64, 16), [0; 16]);
}

#[test]
fn no_receive_posted() {
    let impatient = ConnectConfig {
        rnr_retry: 2,
        min_rnr_timer: 1,
        ..config()
    };
    let Some(mut pair) = pair_with(&impatient, &impatient, ALL) else {
        return;
    };
    let mut chain = pair.near.qp.start_send();
    let remote = pair.far.remote(0);
    chain
        .write_imm(1, Source::Inline(b"early"), remote, [0; 4], SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    pair.near.expect_error(1, &[WcStatus::RnrRetryExcErr]);
    expect_err_state(&pair.near);
    // The peer did nothing wrong, and nothing was placed before there was a receive.
    assert_eq!(pair.far.qp.query().unwrap().state, QpState::Rts);
    assert_eq!(pair.far.image_bytes(0, 5), [0; 5]);
}

/// Each retry waits at least as long as the peer's timer says.
#[test]
fn rnr_retries_take_their_time() {
    // The first NAK and three more, with 10.24 ms between.
    let impatient = ConnectConfig {
        rnr_retry: 3,
        min_rnr_timer: 20,
        ..config()
    };
    let Some(mut pair) = pair_with(&impatient, &impatient, ALL) else {
        return;
    };
    let mut chain = pair.near.qp.start_send();
    chain.send(1, Source::Inline(b"early"), SIGNALED).unwrap();
    chain.send(2, Source::Inline(b"later"), SIGNALED).unwrap();
    chain.submit().unwrap();
    let start = Instant::now();
    pair.near.expect_error(1, &[WcStatus::RnrRetryExcErr]);
    let took = start.elapsed();
    pair.near.expect_error(2, &[WcStatus::WrFlushErr]);
    assert!(
        took >= Duration::from_micros(3 * 10_240),
        "gave up after {took:?}"
    );
}

/// `rnr_retry` 7 is without end: 100 waits of 1.28 ms (of 4 ms on rxe) spend nothing.
#[test]
fn infinite_rnr_retries_outlast_any_number() {
    let patient = ConnectConfig {
        rnr_retry: 7,
        min_rnr_timer: 14,
        // 4.3 s: on an emulated CPU an RNR NAK may come later than the usual timeout, which rxe counts too.
        timeout: 20,
        ..config()
    };
    let Some(mut pair) = pair_with(&patient, &patient, ALL) else {
        return;
    };
    let mut chain = pair.near.qp.start_send();
    chain.send(1, Source::Inline(b"hello"), SIGNALED).unwrap();
    chain.submit().unwrap();
    assert!(!pair.near.has_completion(Duration::from_millis(500)));
    let into = pair.far.buffer(&[0; 5]);
    pair.far.qp.post_recv(9, into).unwrap();
    assert_eq!(pair.far.expect(9).buffer.unwrap().as_slice(), b"hello");
    pair.near.expect(1);
}

#[test]
fn a_receive_that_comes_late_is_in_time() {
    // 6 retries of 123 ms.
    let patient = ConnectConfig {
        rnr_retry: 6,
        min_rnr_timer: 27,
        ..config()
    };
    let Some(mut pair) = pair_with(&patient, &patient, ALL) else {
        return;
    };
    let mut chain = pair.near.qp.start_send();
    chain.send(1, Source::Inline(b"hello"), SIGNALED).unwrap();
    chain.submit().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let into = pair.far.buffer(&[0; 5]);
    pair.far.qp.post_recv(9, into).unwrap();
    assert_eq!(pair.far.expect(9).buffer.unwrap().as_slice(), b"hello");
    pair.near.expect(1);
}

#[test]
fn a_peer_that_is_gone() {
    let impatient = ConnectConfig {
        timeout: 12,
        retry_cnt: 2,
        ..config()
    };
    let Some(mut pair) = pair_with(&impatient, &impatient, ALL) else {
        return;
    };
    let remote = pair.far.remote(0);
    pair.far.qp.destroy().unwrap();
    let source = pair.near.region.clone();
    let mut chain = pair.near.qp.start_send();
    chain
        .write(1, Source::Shared(&source, 0..10_000), remote, QUIET)
        .unwrap();
    chain
        .write(2, Source::Inline(b"x"), remote, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    let start = Instant::now();
    pair.near.expect_error(1, &[WcStatus::RetryExcErr]);
    pair.near.expect_error(2, &[WcStatus::WrFlushErr]);
    // Three times 16.8 ms on the wire; a device may take up to four times that for each.
    assert!(
        start.elapsed() > Duration::from_millis(30),
        "gave up after {:?}",
        start.elapsed()
    );
}

/// A timeout of 0 never fires: nothing tells that the peer is gone, and moving to ERR gives everything back.
#[test]
fn a_timeout_of_zero_waits_for_ever() {
    let endless = ConnectConfig {
        timeout: 0,
        retry_cnt: 0,
        ..config()
    };
    let Some(mut pair) = pair_with(&endless, &endless, ALL) else {
        return;
    };
    let remote = pair.far.remote(0);
    pair.far.qp.destroy().unwrap();
    let mut chain = pair.near.qp.start_send();
    chain
        .write(1, Source::Inline(b"x"), remote, SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    assert!(!pair.near.has_completion(Duration::from_millis(500)));
    assert_eq!(pair.near.qp.query().unwrap().state, QpState::Rts);
    pair.near.qp.to_error().unwrap();
    pair.near.expect_error(1, &[WcStatus::WrFlushErr]);
}

#[test]
fn a_peer_in_err_does_not_answer() {
    let impatient = ConnectConfig {
        timeout: 10,
        retry_cnt: 1,
        ..config()
    };
    let Some(mut pair) = pair_with(&impatient, &impatient, ALL) else {
        return;
    };
    pair.far.qp.to_error().unwrap();
    let done = pair.near.read(100, pair.far.remote(0));
    assert_eq!(done.status, WcStatus::RetryExcErr);
    assert_eq!(done.buffer.map(|buffer| buffer.len()), Some(100));
}

#[test]
fn a_message_longer_than_the_receive() {
    for len in [11, 9_000] {
        let Some(mut pair) = pair() else { return };
        let into = pair.far.buffer(&[0; 10]);
        pair.far.qp.post_recv(9, into).unwrap();
        let source = pair.near.region.clone();
        let mut chain = pair.near.qp.start_send();
        chain
            .send(1, Source::Shared(&source, 0..len), SIGNALED)
            .unwrap();
        chain.submit().unwrap();
        let statuses = (pair.near.next().status, pair.far.next().status);
        let differs = statuses == (WcStatus::RemOpErr, WcStatus::LocQpOpErr);
        Difference::LongSendIsOperationError.check(Maker::of(&pair.far.context), differs);
        assert!(
            differs || statuses == (WcStatus::RemInvReqErr, WcStatus::LocLenErr),
            "{statuses:?}"
        );
        expect_err_state(&pair.far);
    }
}

#[test]
fn the_failed_request_first_then_all_others_flushed_once() {
    let Some(mut pair) = pair() else { return };
    for wr_id in 100..110 {
        let buffer = pair.near.buffer(&[0; 16]);
        pair.near.qp.post_recv(wr_id, buffer).unwrap();
    }
    let mut wrong = pair.far.remote(0);
    wrong.rkey.0 ^= 0x1234_5600;
    let good = pair.far.remote(0);
    let mut chain = pair.near.qp.start_send();
    chain.write(0, Source::Inline(b"x"), good, QUIET).unwrap();
    chain
        .write(1, Source::Inline(b"x"), good, SIGNALED)
        .unwrap();
    chain.write(2, Source::Inline(b"x"), wrong, QUIET).unwrap();
    for wr_id in 3..20 {
        let flags = if wr_id % 3 == 0 { SIGNALED } else { QUIET };
        chain
            .write(wr_id, Source::Inline(b"x"), good, flags)
            .unwrap();
    }
    chain.submit().unwrap();

    let (mut sends, mut receives) = (Vec::new(), Vec::new());
    for _ in 0..1 + 18 + 10 {
        let completion = pair.near.next_completion();
        let is_receive = completion.is_receive();
        let done = pair.near.qp.complete(completion).unwrap();
        let list = if is_receive {
            &mut receives
        } else {
            &mut sends
        };
        list.push((done.wr_id, done.status));
        assert_eq!(done.buffer.is_some(), is_receive);
    }
    let mut expected = vec![(1, WcStatus::Success), (2, WcStatus::RemAccessErr)];
    expected.extend((3..20).map(|wr_id| (wr_id, WcStatus::WrFlushErr)));
    assert_eq!(sends, expected);
    let expected: Vec<_> = (100..110)
        .map(|wr_id| (wr_id, WcStatus::WrFlushErr))
        .collect();
    assert_eq!(receives, expected);
    pair.near.expect_nothing();
}

#[test]
fn sends_posted_in_err_are_flushed() {
    let Some(mut pair) = pair() else { return };
    pair.near.qp.to_error().unwrap();
    let mut chain = pair.near.qp.start_send();
    for wr_id in 1..=3 {
        chain
            .write(wr_id, Source::Inline(b"x"), pair.far.remote(0), QUIET)
            .unwrap();
    }
    chain.submit().unwrap();
    for wr_id in 1..=3 {
        pair.near.expect_error(wr_id, &[WcStatus::WrFlushErr]);
    }
    pair.near.expect_nothing();
}

#[test]
fn receives_posted_in_err_are_flushed() {
    let Some(mut pair) = pair() else { return };
    pair.near.qp.to_error().unwrap();
    let buffer = pair.near.buffer(b"mine");
    pair.near.qp.post_recv(7, buffer).unwrap();
    let is_left_alone = !pair.near.has_completion(Duration::from_millis(500));
    Difference::ReceiveInErrLeftAlone.check(Maker::of(&pair.near.context), is_left_alone);
    if is_left_alone {
        return;
    }
    let done = pair.near.expect_error(7, &[WcStatus::WrFlushErr]);
    assert_eq!(done.buffer.unwrap().as_slice(), b"mine");
    pair.near.expect_nothing();
}

#[test]
fn a_failed_read_gives_its_buffer_back() {
    let Some(mut pair) = pair() else { return };
    let mut wrong = pair.far.remote(0);
    wrong.rkey.0 ^= 0x1234_5600;
    let done = pair.near.read(5_000, wrong);
    assert_eq!(done.status, WcStatus::RemAccessErr);
    assert_eq!(done.buffer.map(|buffer| buffer.len()), Some(5_000));
}

#[test]
fn destroyed_with_work_outstanding() {
    for _ in 0..10 {
        let Some(mut pair) = pair() else { return };
        let buffers: Vec<_> = (0..10).map(|_| pair.near.buffer(&[0; 50_000])).collect();
        let region = pair.near.region.clone();
        let mut chain = pair.near.qp.start_send();
        for (wr_id, buffer) in (0..).zip(buffers) {
            chain
                .read(wr_id, buffer, pair.far.remote(0), SIGNALED)
                .unwrap();
            let source = Source::Shared(&region, 0..100_000);
            chain
                .write(100 + wr_id, source, pair.far.remote(0), QUIET)
                .unwrap();
        }
        chain.submit().unwrap();
        assert_eq!(Arc::strong_count(&region), 2 + 10);
        pair.near.qp.destroy().unwrap();
        assert_eq!(
            Arc::strong_count(&region),
            2,
            "a destroyed queue pair holds memory"
        );
    }
}
