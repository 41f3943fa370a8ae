//! What does a small WRITE cost through the safe layer, and what through raw verbs?
//!
//! Inline WRITEs of 64 B between two queue pairs of one software device, so that one thread does
//! everything: post, send, receive, place, acknowledge, complete, poll. `post+poll` waits for each;
//! `chain of 16` posts sixteen with one doorbell and waits for the last, which alone is signalled.
//! Expected: the safe layer within 5 % of raw, and some ten microseconds of CPU time for one, nearly
//! all of it in the kernel's UDP. What the safe layer itself costs is the difference.

use std::time::Duration;

use benches::ThreadCpuTime;
use benches::pair::Side;
use benches::raw::{CHAIN_MAX, RawLoopback};
use criterion::{Criterion, Throughput};
use transport::{DeviceSelector, ReadyQp, Remote, Result, SendFlags, Source};

const LEN: usize = 64;

fn main() -> Result<()> {
    let mut criterion = Criterion::default()
        .with_measurement(ThreadCpuTime)
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let mut raw = RawLoopback::open();
    let mut side = Side::open(&DeviceSelector::Soft(None))?;
    let region = side.region(4096)?;
    let (mut qp, _peer) = side.loopback()?;
    let target = region.remote();
    let bytes = [0x5a; LEN];

    for count in [1, CHAIN_MAX] {
        let name = if count == 1 {
            "post+poll"
        } else {
            "chain of 16"
        };
        let mut group = criterion.benchmark_group(format!("post_poll/{name}"));
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function("safe", |b| {
            b.iter(|| write(&mut side, &mut qp, target, &bytes, count).expect("a sound loopback"));
        });
        group.bench_function("raw", |b| {
            b.iter(|| {
                raw.post_writes(&bytes, count);
                raw.wait();
            });
        });
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}

/// Posts `count` WRITEs with one doorbell, and waits for the last.
fn write(
    side: &mut Side,
    qp: &mut ReadyQp,
    target: Remote,
    bytes: &[u8],
    count: usize,
) -> Result<()> {
    let mut chain = qp.start_send();
    for index in 1..=count {
        let flags = if index == count {
            SendFlags::SIGNALED
        } else {
            SendFlags::empty()
        };
        chain.write(index as u64, Source::Inline(bytes), target, flags)?;
    }
    chain.submit()?;
    while side.poll(qp)? == 0 {}
    Ok(())
}
