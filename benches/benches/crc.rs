//! What do the checksums cost?
//!
//! CRC-32C guards record batches, tails and table lines; the ICRC guards every packet of the software
//! device, once per side. Both beside `memcpy` of as many bytes, in cache. Expected on a CPU with
//! carry-less multiplication: 10 ns and 25 ns at 64 B, 20 GB/s and 40 GB/s at 64 KiB; the ICRC's
//! largest packet holds 4 KiB, so that is its figure that counts.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddrV4};

use benches::ThreadCpuTime;
use criterion::{BenchmarkId, Criterion, Throughput};
use soft_roce::wire::icrc::{Flow, ICRC_LEN};

const LENS: [usize; 3] = [64, 4 << 10, 64 << 10];
/// Some CPUs' string instructions take the slow path to a target that lies a few bytes further into
/// its page than the source does; this is further.
const GAP_LEN: usize = 64;
/// What IPv4 leaves for the bytes that an ICRC covers.
const COVERED_LEN_MAX: usize = (64 << 10) - 64;
const PORT: u16 = 4791;

fn main() {
    let mut criterion = Criterion::default()
        .with_measurement(ThreadCpuTime)
        .configure_from_args();
    let flow = Flow::V4 {
        src: SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 2), PORT),
        dst: SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 3), PORT),
    };
    let mut group = criterion.benchmark_group("crc");
    for len in LENS {
        let mut memory: Vec<u8> = (0..=u8::MAX).cycle().take(2 * len + GAP_LEN).collect();
        let (bytes, copy) = memory.split_at_mut(len + GAP_LEN);
        let bytes = &bytes[..len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("memcpy", len), |b| {
            b.iter(|| black_box(&mut copy[..]).copy_from_slice(black_box(bytes)));
        });
        group.bench_function(BenchmarkId::new("crc32c", len), |b| {
            b.iter(|| crc32c::crc32c(black_box(bytes)));
        });
        let covered = &bytes[..len.min(COVERED_LEN_MAX)];
        group.throughput(Throughput::Bytes(covered.len() as u64));
        group.bench_function(BenchmarkId::new("icrc", len), |b| {
            b.iter(|| flow.compute(0, black_box(covered)));
        });
        let packet = [covered, &flow.compute(7, covered).to_le_bytes()[..]].concat();
        assert_eq!(packet.len(), covered.len() + ICRC_LEN);
        group.bench_function(BenchmarkId::new("icrc verify, solved", len), |b| {
            b.iter(|| flow.verify(0, black_box(&packet)));
        });
    }
    group.finish();
    criterion.final_summary();
}
