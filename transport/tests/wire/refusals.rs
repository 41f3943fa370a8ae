//! Everything that is refused: with which status at which side, and what it did not do.

use std::time::{Duration, Instant};

use transport::{AccessFlags, QpState, Remote, Rkey, SendFlags, Source, WcStatus};

use crate::Step;
use crate::differences::Difference;
use crate::end::{ALL, End, SIGNALED, Side, pattern};

const QUIET: SendFlags = SendFlags::empty();
const IMAGE_LEN: usize = 64 << 10;

/// What one side asks of the other, which must not be granted.
#[derive(Clone, Copy)]
enum Request {
    /// These operations touch `len` bytes that begin `byte_offset` bytes into the image.
    Write {
        byte_offset: u64,
        len: usize,
    },
    Read {
        byte_offset: u64,
        len: usize,
    },
    FetchAdd {
        byte_offset: u64,
    },
    /// Into a receive of 100 bytes.
    Send {
        len: usize,
    },
}

/// How a request fails.
struct Refusal {
    name: &'static str,
    request: Request,
    /// The key is one that the responder never gave out.
    has_wrong_key: bool,
    /// What the responder's queue pair and its region grant.
    qp_access: AccessFlags,
    region_access: AccessFlags,
    status: WcStatus,
    /// How the receive ends that the responder has posted.
    receive: WcStatus,
}

/// A refusal of a request that a key alone decides on.
const BY_KEY: Refusal = Refusal {
    name: "",
    request: Request::Write {
        byte_offset: 0,
        len: 5_000,
    },
    has_wrong_key: false,
    qp_access: ALL,
    region_access: ALL,
    status: WcStatus::RemAccessErr,
    receive: WcStatus::WrFlushErr,
};

/// A refusal of a request that is not allowed at all.
const BY_QUEUE_PAIR: Refusal = Refusal {
    status: WcStatus::RemInvReqErr,
    ..BY_KEY
};

const READ: Request = Request::Read {
    byte_offset: 0,
    len: 5_000,
};
const FETCH_ADD: Request = Request::FetchAdd { byte_offset: 0 };
const BEYOND: u64 = (IMAGE_LEN - 4_999) as u64;

const REFUSALS: [Refusal; 15] = [
    Refusal {
        name: "WRITE with a wrong key",
        has_wrong_key: true,
        ..BY_KEY
    },
    Refusal {
        name: "READ with a wrong key",
        request: READ,
        has_wrong_key: true,
        ..BY_KEY
    },
    Refusal {
        name: "FETCH_ADD with a wrong key",
        request: FETCH_ADD,
        has_wrong_key: true,
        ..BY_KEY
    },
    Refusal {
        name: "WRITE one byte out of bounds",
        request: Request::Write {
            byte_offset: BEYOND,
            len: 5_000,
        },
        ..BY_KEY
    },
    Refusal {
        name: "READ one byte out of bounds",
        request: Request::Read {
            byte_offset: BEYOND,
            len: 5_000,
        },
        ..BY_KEY
    },
    Refusal {
        name: "WRITE before the first byte",
        request: Request::Write {
            byte_offset: u64::MAX,
            len: 2,
        },
        ..BY_KEY
    },
    Refusal {
        name: "FETCH_ADD behind the last byte",
        request: Request::FetchAdd {
            byte_offset: IMAGE_LEN as u64,
        },
        ..BY_KEY
    },
    Refusal {
        name: "WRITE without the region's right",
        region_access: ALL.difference(AccessFlags::REMOTE_WRITE),
        ..BY_KEY
    },
    Refusal {
        name: "READ without the region's right",
        request: READ,
        region_access: ALL.difference(AccessFlags::REMOTE_READ),
        ..BY_KEY
    },
    Refusal {
        name: "FETCH_ADD without the region's right",
        request: FETCH_ADD,
        region_access: ALL.difference(AccessFlags::REMOTE_ATOMIC),
        ..BY_KEY
    },
    Refusal {
        name: "WRITE without the queue pair's right",
        qp_access: ALL.difference(AccessFlags::REMOTE_WRITE),
        ..BY_QUEUE_PAIR
    },
    Refusal {
        name: "READ without the queue pair's right",
        request: READ,
        qp_access: ALL.difference(AccessFlags::REMOTE_READ),
        ..BY_QUEUE_PAIR
    },
    Refusal {
        name: "FETCH_ADD without the queue pair's right",
        request: FETCH_ADD,
        qp_access: ALL.difference(AccessFlags::REMOTE_ATOMIC),
        ..BY_QUEUE_PAIR
    },
    Refusal {
        name: "SEND of a packet longer than the receive",
        request: Request::Send { len: 101 },
        receive: WcStatus::LocLenErr,
        ..BY_QUEUE_PAIR
    },
    Refusal {
        name: "SEND of several packets longer than the receive",
        request: Request::Send { len: 9_000 },
        receive: WcStatus::LocLenErr,
        ..BY_QUEUE_PAIR
    },
];

/// All of it, each side against the other, each on a connection of its own: it is the last that a
/// connection does.
pub(crate) fn run(side: &mut Side) {
    for refusal in &REFUSALS {
        for is_requester in [side.is_connector, !side.is_connector] {
            let role = if is_requester {
                "requester"
            } else {
                "responder"
            };
            let _step = Step(format!("{}, {role}", refusal.name));
            let mut end = connect(side, refusal, is_requester);
            if is_requester {
                ask(side, &mut end, refusal);
            } else {
                refuse(side, &mut end, refusal);
            }
            end.expect_nothing();
            side.completions += end.take_completions();
        }
    }
    for is_requester in [side.is_connector, !side.is_connector] {
        without_receive(side, is_requester);
    }
}

fn connect(side: &mut Side, refusal: &Refusal, is_requester: bool) -> End {
    let mut config = side.config();
    let mut access = ALL;
    if !is_requester {
        config.access = refusal.qp_access;
        access = refusal.region_access;
    }
    let mut end = side.connect(&config, IMAGE_LEN, access);
    end.fill_image(0, &pattern(1, IMAGE_LEN));
    end.post_recv(9, 100);
    side.control.meet();
    end
}

/// The requester's part: the refused request fails as it should, everything behind it is flushed.
fn ask(side: &mut Side, end: &mut End, refusal: &Refusal) {
    post(end, refusal);
    let remote = end.remote;
    end.post(|chain| {
        chain.write(2, Source::Inline(b"x"), remote, QUIET).unwrap();
        chain
            .write(3, Source::Inline(b"x"), remote, SIGNALED)
            .unwrap();
    });
    let done = end.next_sent();
    // The answer may have been lost, and a queue pair in ERR gives no other.
    let is_silence = side.is_lossy && done.status == WcStatus::RetryExcErr;
    assert!(
        done.wr_id == 1 && (done.status == requester_status(side, refusal) || is_silence),
        "request {} ended with {}",
        done.wr_id,
        done.status
    );
    for wr_id in 2..=3 {
        let done = end.next_sent();
        assert_eq!((done.wr_id, done.status), (wr_id, WcStatus::WrFlushErr));
    }
    let done = end.next_received();
    assert_eq!((done.wr_id, done.status), (9, WcStatus::WrFlushErr));
    expect_state(end, QpState::Err);
    side.control.tell();
}

/// The responder's part: it is in ERR, its receive has ended as it should, and not a byte has changed.
fn refuse(side: &mut Side, end: &mut End, refusal: &Refusal) {
    side.control.wait();
    assert!(
        end.image_bytes(0, IMAGE_LEN) == pattern(1, IMAGE_LEN),
        "memory changed"
    );
    let done = end.next_received();
    assert_eq!(
        (done.wr_id, done.status),
        (9, receive_status(side, refusal))
    );
    expect_state(end, QpState::Err);
}

/// What the requester is told.
fn requester_status(side: &Side, refusal: &Refusal) -> WcStatus {
    match refusal.request {
        Request::Send { .. }
            if Difference::LongSendIsOperationError.is_expected(side.peer_maker) =>
        {
            WcStatus::RemOpErr
        }
        _ => refusal.status,
    }
}

/// How the responder's receive ends.
fn receive_status(side: &Side, refusal: &Refusal) -> WcStatus {
    match refusal.request {
        Request::Send { .. } if Difference::LongSendIsOperationError.is_expected(side.maker) => {
            WcStatus::LocQpOpErr
        }
        _ => refusal.receive,
    }
}

/// Posts the request as number 1.
fn post(end: &mut End, refusal: &Refusal) {
    let mut target = end.remote;
    if refusal.has_wrong_key {
        target.rkey = Rkey(target.rkey.0 ^ 0x1234_5600);
    }
    let at = |byte_offset| Remote::at(target, byte_offset);
    let buffer = match refusal.request {
        Request::Write { len, .. } | Request::Send { len } => end.buffer(&pattern(2, len)),
        Request::Read { len, .. } => end.buffer(&vec![0; len]),
        Request::FetchAdd { .. } => end.buffer(&[0; 8]),
    };
    let mut chain = end.qp.start_send();
    match refusal.request {
        Request::Write { byte_offset, .. } => chain
            .write(1, Source::Local(buffer), at(byte_offset), SIGNALED)
            .unwrap(),
        Request::Read { byte_offset, .. } => {
            chain.read(1, buffer, at(byte_offset), SIGNALED).unwrap();
        }
        Request::FetchAdd { byte_offset } => {
            chain
                .fetch_add(1, buffer, at(byte_offset), 1, SIGNALED)
                .unwrap();
        }
        Request::Send { .. } => chain.send(1, Source::Local(buffer), SIGNALED).unwrap(),
    }
    chain.submit().expect("it is the peer who refuses");
}

/// A SEND for which there is no receive, and no patience: the requester gives up, the responder did
/// nothing wrong and goes on.
fn without_receive(side: &mut Side, is_requester: bool) {
    let _step = Step("SEND without a receive".to_owned());
    let mut config = side.config();
    // Waits of 0.64 ms; devices may take longer.
    config.min_rnr_timer = 12;
    config.rnr_retry = 2;
    let mut end = side.connect(&config, IMAGE_LEN, ALL);
    side.control.meet();
    if is_requester {
        end.post(|chain| chain.send(1, Source::Inline(b"early"), QUIET).unwrap());
        let done = end.next_sent();
        assert_eq!((done.wr_id, done.status), (1, WcStatus::RnrRetryExcErr));
        expect_state(&mut end, QpState::Err);
        side.control.tell();
    } else {
        side.control.wait();
        assert_eq!(end.qp.query().unwrap().state, QpState::Rts);
    }
    end.expect_nothing();
    side.completions += end.take_completions();
}

/// Waits until the queue pair has moved itself.
fn expect_state(end: &mut End, state: QpState) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while end.qp.query().unwrap().state != state {
        assert!(
            Instant::now() < deadline,
            "it is in {:?}",
            end.qp.query().unwrap().state
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
