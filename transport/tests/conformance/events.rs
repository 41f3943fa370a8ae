//! Sleeping: completion channels and asynchronous events.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_getfd};
use transport::connect::Prepared;
use transport::{
    AsyncEvent, CompletionChannel, CompletionQueue, Context, Error, Mapping, ProtectionDomain,
    ReadyQp, SendFlags, SharedRegion, Source,
};

use crate::differences::{Difference, Maker};
use crate::harness::{ALL, PATIENCE, SIGNALED, config, open, pair};

/// One end whose completion queue has a channel.
struct Sleeper {
    qp: ReadyQp,
    cq: CompletionQueue,
    channel: CompletionChannel,
    pd: ProtectionDomain,
    region: SharedRegion,
}

fn sleepers() -> Option<[Sleeper; 2]> {
    let prepare = |context: &Context| {
        let pd = ProtectionDomain::alloc(context).unwrap();
        let channel = CompletionChannel::create(context).unwrap();
        let cq = CompletionQueue::create(context, 256, Some(&channel)).unwrap();
        let image = Mapping::anonymous(4096).unwrap();
        let region = pd.register(&image, 0..4096, ALL, None).unwrap();
        (
            Prepared::create(&pd, &cq, &cq, &config()).unwrap(),
            cq,
            channel,
            pd,
            region,
        )
    };
    let (one, two) = (prepare(&open()?), prepare(&open()?));
    let ends = [one.0.end_point(), two.0.end_point()];
    let connect = |(prepared, cq, channel, pd, region): (Prepared, _, _, _, _), peer| Sleeper {
        qp: prepared.connect(peer).unwrap(),
        cq,
        channel,
        pd,
        region,
    };
    Some([connect(one, &ends[1]), connect(two, &ends[0])])
}

fn send(from: &mut ReadyQp, flags: SendFlags) {
    let mut chain = from.start_send();
    chain.send(1, Source::Inline(b"wake up"), flags).unwrap();
    chain.submit().unwrap();
}

#[test]
fn an_armed_queue_wakes_its_channel_once() {
    let Some([mut near, mut far]) = sleepers() else {
        return;
    };
    for wr_id in 0..3 {
        far.qp
            .post_recv(wr_id, far.pd.alloc_local(16).unwrap())
            .unwrap();
    }
    far.cq.arm(false).unwrap();
    assert_eq!(
        far.channel.wait(Some(Duration::from_millis(20))).unwrap(),
        None
    );
    send(&mut near.qp, SIGNALED);
    assert_eq!(far.channel.wait(Some(PATIENCE)).unwrap(), Some(far.cq.id()));
    // Not armed again: the next one makes no event.
    send(&mut near.qp, SIGNALED);
    assert_eq!(
        far.channel.wait(Some(Duration::from_millis(50))).unwrap(),
        None
    );
    let mut completions = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while completions.len() < 2 {
        assert!(Instant::now() < deadline, "{completions:?}");
        far.cq.poll(&mut completions).unwrap();
    }
}

#[test]
fn only_what_is_solicited_wakes_who_asked_for_that() {
    let Some([mut near, mut far]) = sleepers() else {
        return;
    };
    for wr_id in 0..2 {
        far.qp
            .post_recv(wr_id, far.pd.alloc_local(16).unwrap())
            .unwrap();
    }
    far.cq.arm(true).unwrap();
    send(&mut near.qp, SIGNALED);
    assert_eq!(
        far.channel.wait(Some(Duration::from_millis(50))).unwrap(),
        None
    );
    send(&mut near.qp, SIGNALED | SendFlags::SOLICITED);
    assert_eq!(far.channel.wait(Some(PATIENCE)).unwrap(), Some(far.cq.id()));
}

/// Sleeps between every two messages of a ping-pong: a wake-up lost once stops it.
#[test]
fn no_wake_up_is_lost() {
    const ROUNDS: usize = 200;
    let Some([mut near, mut far]) = sleepers() else {
        return;
    };
    // Before either begins: RNR makes up for a few milliseconds only.
    for end in [&mut near, &mut far] {
        for wr_id in 0..8 {
            let buffer = end.pd.alloc_local(16).unwrap();
            end.qp.post_recv(wr_id, buffer).unwrap();
        }
    }
    let play = |mut end: Sleeper, begins: bool| {
        let mut completions = Vec::new();
        let mut received = 0;
        if begins {
            send(&mut end.qp, SIGNALED);
        }
        while received < ROUNDS {
            let count = end.cq.poll_or_wait(&mut completions, PATIENCE).unwrap();
            assert!(count > 0, "slept through message {received}");
            for completion in completions.drain(..) {
                let is_receive = completion.is_receive();
                let done = end.qp.complete(completion).unwrap();
                assert!(done.is_success(), "{}", done.status);
                if is_receive {
                    received += 1;
                    end.qp.post_recv(0, done.buffer.unwrap()).unwrap();
                    if begins && received == ROUNDS {
                        return;
                    }
                    send(&mut end.qp, SIGNALED);
                }
            }
        }
        // The last answer has to arrive before this end goes.
        while end.qp.sends_outstanding() > 0 {
            end.cq.poll_or_wait(&mut completions, PATIENCE).unwrap();
            for completion in completions.drain(..) {
                end.qp.complete(completion).unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| play(near, true));
        scope.spawn(|| play(far, false));
    });
}

#[test]
fn waiting_without_a_channel_of_ones_own_is_refused() {
    let Some(context) = open() else { return };
    let without = CompletionQueue::create(&context, 16, None).unwrap();
    assert!(matches!(without.arm(false), Err(Error::CannotWait { .. })));
    let channel = CompletionChannel::create(&context).unwrap();
    let [one, _two] =
        [(); 2].map(|()| CompletionQueue::create(&context, 16, Some(&channel)).unwrap());
    let refused = one.poll_or_wait(&mut Vec::new(), PATIENCE);
    assert!(matches!(refused, Err(Error::CannotWait { .. })));
}

#[test]
fn waiting_ends_at_its_timeout() {
    let Some(context) = open() else { return };
    let channel = CompletionChannel::create(&context).unwrap();
    let cq = CompletionQueue::create(&context, 16, Some(&channel)).unwrap();
    let start = Instant::now();
    assert_eq!(
        cq.poll_or_wait(&mut Vec::new(), Duration::from_millis(30))
            .unwrap(),
        0
    );
    assert!(start.elapsed() >= Duration::from_millis(30));
}

#[test]
fn descriptors_are_closed_in_spawned_programs() {
    let Some(context) = open() else { return };
    let channel = CompletionChannel::create(&context).unwrap();
    let events = context.async_events();
    for fd in [channel.as_fd(), events.as_fd()] {
        assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
    }
}

#[test]
fn a_refused_access_is_an_event_where_the_device_has_it() {
    let Some(mut pair) = pair() else { return };
    let events = pair.far.context.async_events();
    assert_eq!(events.wait(Some(Duration::from_millis(1))).unwrap(), None);
    let mut wrong = pair.far.remote(0);
    wrong.rkey.0 ^= 0x1234_5600;
    assert!(!pair.near.write(b"x", wrong).is_success());
    let far = pair.far.qp.qpn();
    let event = events.wait(Some(Duration::from_secs(1))).unwrap();
    Difference::NoAccessEvent.check(Maker::of(&pair.far.context), event.is_none());
    assert!(
        event.is_none() || event == Some(AsyncEvent::QpAccessErr(far)),
        "{event:?}"
    );
}

#[test]
fn regions_wake_nobody() {
    let Some([mut near, far]) = sleepers() else {
        return;
    };
    far.cq.arm(false).unwrap();
    let mut chain = near.qp.start_send();
    chain
        .write(1, Source::Inline(b"silent"), far.region.remote(), SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    let mut completions = Vec::new();
    assert_eq!(near.cq.poll_or_wait(&mut completions, PATIENCE).unwrap(), 1);
    assert!(
        near.qp
            .complete(completions.remove(0))
            .unwrap()
            .is_success()
    );
    assert_eq!(
        far.channel.wait(Some(Duration::from_millis(30))).unwrap(),
        None
    );
}
