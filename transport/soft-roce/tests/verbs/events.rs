//! Completion channels and asynchronous events.

use std::time::{Duration, Instant};

use rdma_core_bindings::*;

use crate::support::*;

fn channelled() -> (End, End) {
    pair(Options {
        with_channel: true,
        rnr_retry: 7,
        ..Options::default()
    })
}

fn arm(end: &End, solicited_only: bool) {
    // SAFETY: a live queue.
    let result = unsafe { ibv_req_notify_cq(end.cq.ptr(), solicited_only.into()) };
    assert_eq!(result, 0);
}

fn channel(end: &End) -> &Channel {
    end.channel.as_ref().expect("asked for in the options")
}

/// Sleeps until an event comes, and acknowledges it.
fn sleep(end: &End) {
    CqEvent::wait(channel(end), &end.cq).unwrap();
}

fn set_nonblocking(fd: i32) {
    // SAFETY: a descriptor's flags.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) };
    assert_eq!(result, 0);
}

fn channel_fd(end: &End) -> i32 {
    channel(end).fd
}

/// Whether an event waits, for a channel that does not block.
fn has_event(end: &End) -> bool {
    match CqEvent::wait(channel(end), &end.cq) {
        Ok(_) => true,
        Err(libc::EAGAIN) => false,
        Err(error) => panic!("errno {error}"),
    }
}

/// Waits, without polling, until `fd` is readable.
fn readable(fd: i32, timeout_ms: i32) -> bool {
    let mut polled = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one descriptor to look at.
    unsafe { libc::poll(&raw mut polled, 1, timeout_ms) == 1 }
}

#[test]
fn a_sleeper_is_woken_by_each_completion() {
    let (a, b) = channelled();
    const ROUNDS: u64 = 2000;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                arm(&b, false);
                assert_eq!(b.post_recv(round, 0, 64), 0);
                // As the man page says: arm, look once more, only then sleep.
                let wc = b.poll().unwrap_or_else(|| {
                    sleep(&b);
                    b.wait()
                });
                assert_eq!((wc.wr_id, wc.status), (round, IBV_WC_SUCCESS));
                while has_leftover(&b) {}
            }
        });
        for round in 0..ROUNDS {
            assert_eq!(a.post_one(wr(round, IBV_WR_SEND), 0, 64), 0);
            a.wait_ok(round);
        }
    });
}

/// Takes an event that came although the completion had been polled already.
fn has_leftover(end: &End) -> bool {
    let is_waiting = readable(channel_fd(end), 0);
    if is_waiting {
        sleep(end);
    }
    is_waiting
}

#[test]
fn both_ends_asleep_wake_each_other() {
    let (a, b) = pair(Options {
        with_channel: true,
        rnr_retry: 7,
        max_send_wr: 512,
        max_recv_wr: 512,
        ..Options::default()
    });
    let start = Instant::now();
    std::thread::scope(|scope| {
        for (end, starts) in [(&a, true), (&b, false)] {
            scope.spawn(move || {
                for round in 0..300u64 {
                    assert_eq!(end.post_recv(round, 0, 64), 0);
                }
                let mut received = 0;
                if starts {
                    // The other end may not have posted yet: RNR retries for ever cover that.
                    assert_eq!(end.post_one(silent_send(), 0, 64), 0);
                }
                while received < 300 {
                    arm(end, false);
                    let mut completions = 0;
                    while let Some(wc) = end.poll() {
                        assert_eq!((wc.wr_id, wc.status), (received, IBV_WC_SUCCESS));
                        received += 1;
                        completions += 1;
                        if received < 300 || !starts {
                            assert_eq!(end.post_one(silent_send(), 0, 64), 0);
                        }
                    }
                    if completions == 0 {
                        assert!(readable(channel_fd(end), 20_000), "asleep for ever");
                        sleep(end);
                    }
                }
            });
        }
    });
    assert!(start.elapsed() < PATIENCE);
}

fn silent_send() -> ibv_send_wr {
    let mut request = wr(0, IBV_WR_SEND);
    request.send_flags = 0;
    request
}

#[test]
fn one_event_per_arming() {
    let (a, b) = channelled();
    set_nonblocking(channel_fd(&b));
    assert!(!has_event(&b));
    arm(&b, false);
    for wr_id in 0..3 {
        assert_eq!(b.post_recv(wr_id, 0, 64), 0);
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, 64), 0);
        a.wait_ok(wr_id);
    }
    assert!(readable(channel_fd(&b), 10_000));
    assert!(has_event(&b));
    assert!(!has_event(&b), "three completions, one arming, one event");
    for wr_id in 0..3 {
        b.wait_ok(wr_id);
    }
}

#[test]
fn a_completion_from_before_arming_raises_no_event() {
    let (a, b) = channelled();
    set_nonblocking(channel_fd(&a));
    assert_eq!(a.post_one(rdma(1, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
    // Let the completion come without polling for it.
    std::thread::sleep(Duration::from_millis(50));
    arm(&a, false);
    assert!(!has_event(&a));
    a.wait_ok(1);
}

#[test]
fn solicited_only_waits_for_a_solicited_or_failed_completion() {
    let (a, b) = channelled();
    set_nonblocking(channel_fd(&b));
    for wr_id in 0..3 {
        assert_eq!(b.post_recv(wr_id, 0, 64), 0);
    }
    arm(&b, true);
    assert_eq!(a.post_one(wr(0, IBV_WR_SEND), 0, 64), 0);
    a.wait_ok(0);
    b.wait_ok(0);
    assert!(!has_event(&b));
    let mut solicited = wr(1, IBV_WR_SEND);
    solicited.send_flags |= IBV_SEND_SOLICITED;
    assert_eq!(a.post_one(solicited, 0, 64), 0);
    a.wait_ok(1);
    assert!(readable(channel_fd(&b), 10_000));
    assert!(has_event(&b));
    arm(&b, true);
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_ERR;
    assert_eq!(b.modify(&mut attr, IBV_QP_STATE), 0);
    assert!(has_event(&b), "a flushed receive is a failed completion");
}

#[test]
fn an_overrun_raises_cq_err_and_fails_the_queue_pairs() {
    let (a, b) = pair(Options {
        cqe: 4,
        ..Options::default()
    });
    for wr_id in 0..5 {
        assert_eq!(a.post_one(rdma(wr_id, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
    }
    let event = AsyncEvent::wait(&a.context).unwrap();
    assert_eq!(event.event_type(), IBV_EVENT_CQ_ERR);
    assert!(event.is_about(&a.cq));
    drop(event);
    assert_eq!(a.state(), IBV_QPS_ERR);
    for wr_id in 0..4 {
        a.wait_ok(wr_id);
    }
    assert!(matches!(a.try_poll(), Err(..0)), "the queue cannot be used");
}

/// Completions that wait survive a change of size, which moves the bound of the queue.
#[test]
fn a_resized_queue_overruns_at_its_new_size() {
    let (a, b) = pair(Options {
        cqe: 4,
        with_channel: true,
        ..Options::default()
    });
    let post = |wr_id| {
        assert_eq!(a.post_one(rdma(wr_id, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
    };
    // Leaves the completion in the queue.
    let write = |wr_id| {
        arm(&a, false);
        post(wr_id);
        sleep(&a);
    };
    let resize = |cqe| resize_cq(&a.cq, cqe);
    (0..3).for_each(write);
    assert_eq!(resize(2), libc::EINVAL, "3 wait");
    assert_eq!(a.cq.cqe, 4);
    assert_eq!(resize(3), 0);
    a.wait_ok(0);
    assert_eq!(resize(6), 0);
    (3..7).for_each(write);
    assert_eq!(a.state(), IBV_QPS_RTS, "6 wait, and as many fit");
    post(7);
    assert_eq!(a.wait_event(), IBV_EVENT_CQ_ERR);
    assert_eq!(a.state(), IBV_QPS_ERR);
    for wr_id in 1..7 {
        a.wait_ok(wr_id);
    }
}

#[test]
fn a_peers_mistake_raises_an_event_that_names_the_queue_pair() {
    let (a, b) = pair(Options::default());
    set_nonblocking(b.context.async_fd);
    let none = AsyncEvent::wait(&b.context);
    assert_eq!(none.err(), Some(libc::EAGAIN));
    let mut request = rdma(1, IBV_WR_RDMA_WRITE, &b, 0);
    request.wr.rdma.rkey = b.rkey() ^ 0x5a00;
    assert_eq!(a.post_one(request, 0, 64), 0);
    a.wait();
    assert!(readable(b.context.async_fd, 10_000));
    let event = AsyncEvent::wait(&b.context).unwrap();
    assert_eq!(event.event_type(), IBV_EVENT_QP_ACCESS_ERR);
    assert!(event.is_about(&b.qp));
}

#[test]
fn destroying_waits_for_events_that_were_taken_and_forgets_the_others() {
    let (a, mut b) = pair(Options::default());
    let mut request = rdma(1, IBV_WR_RDMA_WRITE, &b, 0);
    request.wr.rdma.rkey = b.rkey() ^ 0x5a00;
    assert_eq!(a.post_one(request, 0, 64), 0);
    a.wait();
    let event = AsyncEvent::wait(&b.context).unwrap();
    expect_destruction_to_wait_for(event, &mut b.qp);
    set_nonblocking(b.context.async_fd);
    let none = AsyncEvent::wait(&b.context);
    assert_eq!(none.err(), Some(libc::EAGAIN), "nothing is left of it");
}

/// The same for the events of a completion channel.
#[test]
fn destroying_a_completion_queue_waits_for_its_acknowledgements() {
    let (mut a, b) = channelled();
    arm(&a, false);
    assert_eq!(a.post_one(rdma(1, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
    let event = CqEvent::wait(channel(&a), &a.cq).unwrap();
    assert_eq!(a.qp.destroy(), 0);
    expect_destruction_to_wait_for(event, &mut a.cq);
}
