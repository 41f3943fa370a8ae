//! Every operation does what it says, at every length.

use transport::connect::ConnectConfig;
use transport::{LocalBuffer, Mtu, SendFlags, Source, WcOpcode};

use crate::harness::{SIGNALED, SIZES, config, pair, pair_with, pattern};

/// Where WRITEs of this module land: odd, so that nothing is aligned by accident.
const AT: usize = 1_001;

#[test]
fn write_places_exactly_its_bytes() {
    let Some(mut pair) = pair() else { return };
    for (seed, len) in (1..).zip(SIZES) {
        pair.far
            .image
            .write_at(AT - 1, &vec![0xa5; len + 2])
            .unwrap();
        let bytes = pattern(seed, len);
        let done = pair.near.write(&bytes, pair.far.remote(AT));
        assert!(done.is_success(), "{len}: {}", done.status);
        assert_eq!(done.opcode, WcOpcode::RdmaWrite);
        let placed = pair.far.image_bytes(AT - 1, len + 2);
        assert_eq!(
            (placed[0], placed[len + 1]),
            (0xa5, 0xa5),
            "{len} bytes strayed"
        );
        assert!(placed[1..=len] == bytes, "{len} bytes differ");
        assert_eq!(
            done.buffer.map(|buffer| buffer.as_slice().to_vec()),
            Some(bytes)
        );
    }
}

#[test]
fn the_device_counts_its_packets() {
    let Some(mut pair) = pair() else { return };
    let sent = |pair: &crate::harness::Pair| {
        let counters = pair.near.context.counters(1);
        let sent = counters.iter().find(|(name, _)| name == "sent_pkts");
        sent.map(|(_, count)| *count)
    };
    let Some(before) = sent(&pair) else {
        eprintln!("skipped: the device does not count packets");
        return;
    };
    let len = 3 * pair.near.qp.query().unwrap().path_mtu.unwrap().bytes();
    let bytes = pattern(1, len);
    assert!(pair.near.write(&bytes, pair.far.remote(AT)).is_success());
    assert!(sent(&pair).is_some_and(|after| after >= before + 3));
}

#[test]
fn write_from_a_shared_region() {
    let Some(mut pair) = pair() else { return };
    let bytes = pattern(1, 70_000);
    pair.near.image.write_at(333, &bytes).unwrap();
    let source = pair.near.region.clone();
    let mut chain = pair.near.qp.start_send();
    chain
        .write(
            5,
            Source::Shared(&source, 333..70_333),
            pair.far.remote(AT),
            SIGNALED,
        )
        .unwrap();
    chain.submit().unwrap();
    assert!(pair.near.expect(5).buffer.is_none());
    assert!(pair.far.image_bytes(AT, bytes.len()) == bytes);
}

#[test]
fn write_gathers_parts_of_odd_lengths() {
    let Some(mut pair) = pair() else { return };
    let bytes = pattern(1, 9_000);
    pair.near.image.write_at(0, &bytes).unwrap();
    let region = pair.near.region.clone();
    let (first, second) = (pair.near.buffer(b"first"), pair.near.buffer(b""));
    let parts = [
        Source::Local(first),
        Source::Shared(&region, 1..8_998),
        Source::Local(second),
        Source::Shared(&region, 3..4),
    ];
    let mut chain = pair.near.qp.start_send();
    chain
        .write(5, parts, pair.far.remote(AT), SIGNALED)
        .unwrap();
    chain.submit().unwrap();
    let done = pair.near.expect(5);
    assert_eq!(done.buffer.unwrap().as_slice(), b"first");
    assert!(done.more[0].as_ref().is_some_and(LocalBuffer::is_empty) && done.more[1].is_none());
    let mut expected = b"first".to_vec();
    expected.extend_from_slice(&bytes[1..8_998]);
    expected.push(bytes[3]);
    assert!(pair.far.image_bytes(AT, expected.len()) == expected);
}

#[test]
fn inline_bytes_are_taken_when_added() {
    let Some(mut pair) = pair() else { return };
    let max = pair.near.qp.capabilities().max_inline_data as usize;
    for (seed, len) in (1..).zip([0, 1, 3, 4, 5, max - 1, max]) {
        let mut bytes = pattern(seed, len);
        let expected = bytes.clone();
        let mut chain = pair.near.qp.start_send();
        let (head, tail) = bytes.split_at(len / 3);
        let parts = [Source::Inline(head), Source::Inline(tail)];
        chain
            .write(1, parts, pair.far.remote(AT), SendFlags::empty())
            .unwrap();
        bytes.fill(0);
        chain
            .write(
                2,
                Source::Inline(&expected),
                pair.far.remote(AT + 500),
                SIGNALED,
            )
            .unwrap();
        chain.submit().unwrap();
        pair.near.expect(2);
        assert_eq!(pair.far.image_bytes(AT, len), expected);
        assert_eq!(pair.far.image_bytes(AT + 500, len), expected);
    }
}

#[test]
fn write_with_immediate_tells_the_peer() {
    let Some(mut pair) = pair() else { return };
    for (seed, len) in (1..).zip(SIZES) {
        let bytes = pattern(seed, len);
        pair.far.qp.post_recv(9, []).unwrap();
        let source = Source::Local(pair.near.buffer(&bytes));
        let mut chain = pair.near.qp.start_send();
        let imm = seed.to_be_bytes();
        chain
            .write_imm(1, source, pair.far.remote(AT), imm, SIGNALED)
            .unwrap();
        chain.submit().unwrap();
        let done = pair.far.expect(9);
        assert_eq!(
            (done.opcode, done.imm),
            (WcOpcode::RecvRdmaWithImm, Some(imm))
        );
        assert_eq!(done.byte_len as usize, len);
        assert!(pair.far.image_bytes(AT, len) == bytes, "{len} bytes differ");
        pair.near.expect(1);
    }
}

#[test]
fn send_fills_the_receive() {
    let Some(mut pair) = pair() else { return };
    for (seed, len) in (1..).zip(SIZES) {
        let bytes = pattern(seed, len);
        let into = pair.far.buffer(&vec![0xa5; len + 3]);
        pair.far.qp.post_recv(9, into).unwrap();
        let source = Source::Local(pair.near.buffer(&bytes));
        let mut chain = pair.near.qp.start_send();
        if len.is_multiple_of(2) {
            chain.send(1, source, SIGNALED).unwrap();
        } else {
            chain
                .send_imm(1, source, [0xff, 0, 0, 7], SIGNALED)
                .unwrap();
        }
        chain.submit().unwrap();
        let done = pair.far.expect(9);
        assert_eq!((done.opcode, done.byte_len as usize), (WcOpcode::Recv, len));
        assert_eq!(done.imm, (len % 2 == 1).then_some([0xff, 0, 0, 7]));
        let buffer = done.buffer.unwrap();
        assert!(buffer.as_slice()[..len] == bytes, "{len} bytes differ");
        assert_eq!(&buffer.as_slice()[len..], [0xa5; 3], "{len} bytes strayed");
        assert_eq!(pair.near.expect(1).opcode, WcOpcode::Send);
    }
}

#[test]
fn receives_scatter_and_come_in_order() {
    let Some(mut pair) = pair() else { return };
    for wr_id in 0..4 {
        let parts = [1, 1_023, 7_000].map(|len| pair.far.buffer(&vec![0; len]));
        pair.far.qp.post_recv(wr_id, parts).unwrap();
    }
    let bytes = pattern(3, 5_000);
    let mut chain = pair.near.qp.start_send();
    for wr_id in 0..4_usize {
        let len = [5_000, 0, 1, 1_025][wr_id];
        pair.near.image.write_at(0, &bytes).unwrap();
        let source = Source::Shared(&pair.near.region, 0..len);
        chain.send(wr_id as u64, source, SIGNALED).unwrap();
    }
    chain.submit().unwrap();
    for (wr_id, len) in [5_000, 0, 1, 1_025].into_iter().enumerate() {
        let done = pair.far.expect(wr_id as u64);
        assert_eq!(done.byte_len, len);
        let mut received = Vec::new();
        for part in done.buffer.iter().chain(done.more.iter().flatten()) {
            received.extend_from_slice(part.as_slice());
        }
        assert!(
            received[..len as usize] == bytes[..len as usize],
            "{len} bytes differ"
        );
        pair.near.expect(wr_id as u64);
    }
}

#[test]
fn read_fetches_every_length() {
    let Some(mut pair) = pair() else { return };
    for (seed, len) in (1..).zip(SIZES) {
        let bytes = pattern(seed, len);
        pair.far.image.write_at(AT, &bytes).unwrap();
        let done = pair.near.read(len, pair.far.remote(AT));
        assert!(done.is_success(), "{len}: {}", done.status);
        assert_eq!(done.opcode, WcOpcode::RdmaRead);
        assert!(
            done.buffer.unwrap().as_slice() == bytes,
            "{len} bytes differ"
        );
    }
}

#[test]
fn read_scatters() {
    let Some(mut pair) = pair() else { return };
    let bytes = pattern(1, 10_000);
    pair.far.image.write_at(AT, &bytes).unwrap();
    let parts = [1, 4_095, 0, 5_904].map(|len| pair.near.buffer(&vec![0; len]));
    let mut chain = pair.near.qp.start_send();
    chain.read(4, parts, pair.far.remote(AT), SIGNALED).unwrap();
    chain.submit().unwrap();
    let done = pair.near.expect(4);
    let mut fetched = done.buffer.unwrap().as_slice().to_vec();
    for part in done.more.iter().flatten() {
        fetched.extend_from_slice(part.as_slice());
    }
    assert!(fetched == bytes);
}

#[test]
fn atomics_return_the_old_value() {
    let Some(mut pair) = pair() else { return };
    if !pair.near.context.attr().unwrap().has_atomics {
        eprintln!("skipped: the device has no atomics");
        return;
    }
    let order = std::sync::atomic::Ordering::SeqCst;
    pair.far.image.store_u64(64, u64::MAX, order).unwrap();
    let old =
        |pair: &mut crate::harness::Pair, wr_id| pair.near.expect(wr_id).buffer.unwrap().as_u64();

    for (add, before, after) in [
        (0, u64::MAX, u64::MAX),
        (3, u64::MAX, 2),
        (1 << 40, 2, 2 + (1 << 40)),
    ] {
        let into = pair.near.buffer(&[0; 8]);
        let mut chain = pair.near.qp.start_send();
        chain
            .fetch_add(1, into, pair.far.remote(64), add, SIGNALED)
            .unwrap();
        chain.submit().unwrap();
        assert_eq!(old(&mut pair, 1), Some(before));
        assert_eq!(pair.far.image.load_u64(64, order).unwrap(), after);
    }
    let held = 2 + (1_u64 << 40);
    for (compare, swap, before, after) in [(7, 8, held, held), (held, 8, held, 8), (8, 0, 8, 0)] {
        let into = pair.near.buffer(&[0; 8]);
        let mut chain = pair.near.qp.start_send();
        chain
            .cmp_swap(2, into, pair.far.remote(64), compare, swap, SIGNALED)
            .unwrap();
        chain.submit().unwrap();
        assert_eq!(old(&mut pair, 2), Some(before));
        assert_eq!(pair.far.image.load_u64(64, order).unwrap(), after);
    }
}

#[test]
fn a_read_sees_the_write_before_it() {
    let Some(mut pair) = pair() else { return };
    for round in 0..50 {
        let bytes = pattern(round, 6_000);
        let source = Source::Local(pair.near.buffer(&bytes));
        let into = pair.near.buffer(&[0; 6_000]);
        let mut chain = pair.near.qp.start_send();
        chain
            .write(1, source, pair.far.remote(AT), SendFlags::empty())
            .unwrap();
        chain.read(2, into, pair.far.remote(AT), SIGNALED).unwrap();
        chain.submit().unwrap();
        assert!(
            pair.near.expect(2).buffer.unwrap().as_slice() == bytes,
            "round {round}"
        );
    }
}

#[test]
fn a_fenced_write_comes_after_the_read() {
    let Some(mut pair) = pair() else { return };
    let mut before = pattern(1_000, 9_000);
    pair.far.image.write_at(AT, &before).unwrap();
    for round in 0..50 {
        let after = pattern(round, 9_000);
        let source = Source::Local(pair.near.buffer(&after));
        let into = pair.near.buffer(&[0; 9_000]);
        let mut chain = pair.near.qp.start_send();
        chain.read(1, into, pair.far.remote(AT), SIGNALED).unwrap();
        chain
            .write(2, source, pair.far.remote(AT), SIGNALED | SendFlags::FENCE)
            .unwrap();
        chain.submit().unwrap();
        assert!(
            pair.near.expect(1).buffer.unwrap().as_slice() == before,
            "round {round}"
        );
        pair.near.expect(2);
        before = after;
    }
    assert!(pair.far.image_bytes(AT, before.len()) == before);
}

#[test]
fn more_reads_than_may_be_outstanding() {
    let narrow = ConnectConfig {
        max_rd_atomic: 2,
        max_dest_rd_atomic: 2,
        ..config()
    };
    let Some(mut pair) = pair_with(&narrow, &narrow, crate::harness::ALL) else {
        return;
    };
    let bytes = pattern(1, 32 * 5_000);
    pair.far.image.write_at(0, &bytes).unwrap();
    let buffers: Vec<LocalBuffer> = (0..32).map(|_| pair.near.buffer(&[0; 5_000])).collect();
    let mut chain = pair.near.qp.start_send();
    for (index, into) in buffers.into_iter().enumerate() {
        chain
            .read(index as u64, into, pair.far.remote(index * 5_000), SIGNALED)
            .unwrap();
    }
    chain.submit().unwrap();
    for index in 0..32_usize {
        let fetched = pair.near.expect(index as u64).buffer.unwrap();
        assert!(
            fetched.as_slice() == &bytes[index * 5_000..][..5_000],
            "READ {index}"
        );
    }
}

#[test]
fn every_path_mtu() {
    for mtu in [
        Mtu::Mtu256,
        Mtu::Mtu512,
        Mtu::Mtu1024,
        Mtu::Mtu2048,
        Mtu::Mtu4096,
    ] {
        let config = ConnectConfig {
            path_mtu: Some(mtu),
            ..config()
        };
        let Some(mut pair) = pair_with(&config, &config, crate::harness::ALL) else {
            return;
        };
        let agreed = pair.near.qp.query().unwrap().path_mtu.unwrap();
        assert!(agreed <= mtu, "asked for at most {mtu}, got {agreed}");
        for (seed, len) in (1..).zip([
            mtu.bytes() - 1,
            mtu.bytes(),
            mtu.bytes() + 1,
            3 * mtu.bytes() + 1,
        ]) {
            let bytes = pattern(seed, len);
            assert!(pair.near.write(&bytes, pair.far.remote(AT)).is_success());
            let done = pair.near.read(len, pair.far.remote(AT));
            assert!(
                done.buffer.unwrap().as_slice() == bytes,
                "{len} bytes at MTU {mtu}"
            );
        }
    }
}

#[test]
fn both_directions_at_once() {
    let Some(mut pair) = pair() else { return };
    let len = 20_000;
    let bytes = pattern(5, 30 * len);
    pair.near.image.write_at(0, &bytes).unwrap();
    pair.far.image.write_at(0, &bytes).unwrap();
    // Each end writes its first half into the other's second half.
    let (near_target, far_target) = (pair.near.remote(2 << 20), pair.far.remote(2 << 20));
    for (end, target) in [(&mut pair.near, far_target), (&mut pair.far, near_target)] {
        let region = end.region.clone();
        let mut chain = end.qp.start_send();
        for index in 0..30_usize {
            let range = index * len..(index + 1) * len;
            let remote = target.at(range.start as u64);
            chain
                .write(
                    index as u64,
                    Source::Shared(&region, range),
                    remote,
                    SIGNALED,
                )
                .unwrap();
        }
        chain.submit().unwrap();
    }
    for index in 0..30 {
        pair.near.expect(index);
        pair.far.expect(index);
    }
    assert!(pair.near.image_bytes(2 << 20, bytes.len()) == bytes);
    assert!(pair.far.image_bytes(2 << 20, bytes.len()) == bytes);
}
