//! A peer that is killed at work: the survivor's requests end in time, and its device goes on.

use std::process::Command;
use std::time::{Duration, Instant};

use transport::connect::ConnectConfig;
use transport::{QpState, Source, WcOpcode, WcStatus};

use crate::Step;
use crate::end::{ALL, End, SIGNALED, Side, pattern};

const IMAGE_LEN: usize = 64 << 10;
/// Requests that wait at any time.
const DEPTH: u64 = 16;
/// Requests that complete before the peer is told to die.
const BEFORE: u64 = 100;
/// 4.096 us * 2^14, tried four times.
const TIMEOUT: u8 = 14;
const RETRY_CNT: u8 = 3;
/// A device may take four times the timeout to notice, and an emulated CPU has other things to do.
const SLACK: Duration = Duration::from_secs(2);

/// The listening side is killed, the connecting one survives.
pub(crate) fn run(side: &mut Side) {
    let config = ConnectConfig {
        timeout: TIMEOUT,
        retry_cnt: RETRY_CNT,
        ..side.config()
    };
    let mut end = side.connect(&config, IMAGE_LEN, ALL);
    side.control.meet();
    if side.is_connector {
        survive(side, &mut end);
    } else {
        side.control.wait();
        die();
    }
}

/// Not by a panic or an exit, which would close the device in good order.
fn die() -> ! {
    let own = std::process::id().to_string();
    let killed = Command::new("kill").args(["-9", &own]).status();
    unreachable!("this process is killed: {killed:?}")
}

fn survive(side: &mut Side, end: &mut End) {
    let _step = Step(format!("a killed peer, survived by {:?}", side.maker));
    let (mut posted, mut done) = (0, 0);
    let mut last_success = Instant::now();
    let failed = loop {
        while posted < done + DEPTH {
            post(end, posted);
            posted += 1;
        }
        if done == BEFORE {
            side.control.tell();
        }
        let sent = end.next_sent();
        assert_eq!(sent.wr_id, done, "completions are in order");
        if sent.status != WcStatus::Success {
            break sent;
        }
        last_success = Instant::now();
        done += 1;
    };
    let waited = last_success.elapsed();
    assert_eq!(failed.status, WcStatus::RetryExcErr);
    let timeout = Duration::from_nanos(4_096 << TIMEOUT);
    // One retry's wait at least: rxe's timer runs on from earlier packets, and its retries are not all left
    // when it is busy. What completed last may be seen late here, too.
    let shortest = timeout;
    let longest = 4 * timeout * (u32::from(RETRY_CNT) + 1) + SLACK;
    assert!(
        (shortest..longest).contains(&waited),
        "given up after {waited:?}, allowed are {shortest:?} to {longest:?}"
    );
    // What was posted behind it, and what is posted now, is flushed.
    post(end, posted);
    for wr_id in done + 1..=posted {
        let sent = end.next_sent();
        assert_eq!((sent.wr_id, sent.status), (wr_id, WcStatus::WrFlushErr));
    }
    end.expect_nothing();
    assert_eq!(end.qp.query().unwrap().state, QpState::Err);
    println!("wire: {done} requests, then silence, given up after {waited:?}");
    side.completions += end.take_completions();
    use_again(side);
}

/// WRITE, READ and FETCH_ADD by turns, so that it dies at any of them.
fn post(end: &mut End, wr_id: u64) {
    let remote = end.remote;
    let bytes = end.buffer(&pattern(wr_id, 5_000));
    let word = end.buffer(&[0; 8]);
    end.post(|chain| match wr_id % 3 {
        0 => chain
            .write(wr_id, Source::Local(bytes), remote, SIGNALED)
            .expect("a WRITE is posted"),
        1 => {
            let posted = chain.read(wr_id, bytes, remote, SIGNALED);
            posted.expect("a READ is posted");
        }
        _ => {
            let posted = chain.fetch_add(wr_id, word, remote, 1, SIGNALED);
            posted.expect("a FETCH_ADD is posted");
        }
    });
}

/// The device carries new connections as before.
fn use_again(side: &mut Side) {
    let [mut a, b] = side.connect_to_itself(IMAGE_LEN);
    let bytes = pattern(7, IMAGE_LEN);
    let (source, remote) = (a.buffer(&bytes), a.remote);
    a.post(|chain| {
        let written = chain.write(1, Source::Local(source), remote, SIGNALED);
        written.expect("a request is posted");
    });
    a.expect_sent(1, WcOpcode::RdmaWrite);
    assert!(b.image_bytes(0, IMAGE_LEN) == bytes, "memory changed");
    side.completions += a.take_completions();
}
