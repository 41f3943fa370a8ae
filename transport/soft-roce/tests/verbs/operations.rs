//! Every operation, with and without completions.

use std::mem;

use rdma_core_bindings::*;

use crate::support::*;

/// Lengths around every boundary of segmentation at path MTU 4096.
const LENGTHS: [usize; 10] = [0, 1, 3, 4, 64, 4095, 4096, 4097, 8192, 300_001];

#[test]
fn write_places_the_bytes_and_tells_only_the_writer() {
    let (a, b) = pair(Options::default());
    for (wr_id, len) in (1..).zip(LENGTHS) {
        let bytes = pattern(len, 7);
        a.memory.write(0, &bytes);
        assert_eq!(
            a.post_one(rdma(wr_id, IBV_WR_RDMA_WRITE, &b, 16), 0, len),
            0
        );
        let wc = a.wait_ok(wr_id);
        assert_eq!((wc.opcode, wc.qp_num), (IBV_WC_RDMA_WRITE, a.qpn()));
        assert_eq!(b.memory.read(16, len), bytes, "{len} bytes");
    }
    assert!(b.poll().is_none(), "a WRITE is silent at its target");
}

#[test]
fn read_fetches_the_bytes() {
    let (a, b) = pair(Options::default());
    for (wr_id, len) in (1..).zip(LENGTHS) {
        let bytes = pattern(len, 9);
        b.memory.write(8, &bytes);
        assert_eq!(a.post_one(rdma(wr_id, IBV_WR_RDMA_READ, &b, 8), 32, len), 0);
        let wc = a.wait_ok(wr_id);
        assert_eq!(wc.opcode, IBV_WC_RDMA_READ);
        assert_eq!(a.memory.read(32, len), bytes, "{len} bytes");
    }
}

#[test]
fn send_fills_receives_in_order() {
    let (a, b) = pair(Options::default());
    for (wr_id, len) in (1..).zip(LENGTHS) {
        let bytes = pattern(len, 11);
        a.memory.write(0, &bytes);
        assert_eq!(b.post_recv(100 + wr_id, 64, 400_000), 0);
        assert_eq!(a.post_one(wr(wr_id, IBV_WR_SEND), 0, len), 0);
        assert_eq!(a.wait_ok(wr_id).opcode, IBV_WC_SEND);
        let received = b.wait_ok(100 + wr_id);
        assert_eq!(
            (received.opcode, received.byte_len as usize),
            (IBV_WC_RECV, len)
        );
        assert_eq!((received.wc_flags, received.src_qp), (0, a.qpn()));
        assert_eq!(b.memory.read(64, len), bytes);
    }
}

#[test]
fn immediates_arrive_as_they_were_given() {
    let (a, b) = pair(Options::default());
    a.memory.write(0, &pattern(5000, 3));
    for opcode in [IBV_WR_SEND_WITH_IMM, IBV_WR_RDMA_WRITE_WITH_IMM] {
        assert_eq!(b.post_recv(5, 100_000, 8192), 0);
        let mut request = rdma(1, opcode, &b, 200_000);
        request.__bindgen_anon_1.imm_data = 0x0102_0304_u32.to_be();
        assert_eq!(a.post_one(request, 0, 5000), 0);
        a.wait_ok(1);
        let received = b.wait_ok(5);
        assert_eq!(received.wc_flags, IBV_WC_WITH_IMM);
        assert_eq!(imm_data(&received), 0x0102_0304_u32.to_be());
        assert_eq!(received.byte_len, 5000);
        let (place, expected) = match opcode {
            IBV_WR_SEND_WITH_IMM => (100_000, IBV_WC_RECV),
            _ => (200_000, IBV_WC_RECV_RDMA_WITH_IMM),
        };
        assert_eq!(received.opcode, expected);
        assert_eq!(b.memory.read(place, 5000), pattern(5000, 3));
    }
}

#[test]
fn atomics_return_what_was_there() {
    let (a, b) = pair(Options::default());
    b.memory.store(128, 40);
    let atomic = |wr_id, opcode, compare_add, swap| {
        let mut request = wr(wr_id, opcode);
        request.wr.atomic.remote_addr = b.at(128);
        request.wr.atomic.rkey = b.rkey();
        request.wr.atomic.compare_add = compare_add;
        request.wr.atomic.swap = swap;
        assert_eq!(a.post_one(request, 0, 8), 0);
        a.wait_ok(wr_id);
        a.memory.load(0)
    };
    assert_eq!(atomic(1, IBV_WR_ATOMIC_FETCH_AND_ADD, 2, 0), 40);
    assert_eq!(atomic(2, IBV_WR_ATOMIC_CMP_AND_SWP, 42, 7), 42);
    assert_eq!(
        atomic(3, IBV_WR_ATOMIC_CMP_AND_SWP, 42, 9),
        7,
        "compares and does not swap"
    );
    assert_eq!(b.memory.load(128), 7);
}

#[test]
fn pieces_are_gathered_and_scattered() {
    let (a, b) = pair(Options::default());
    a.memory.write(0, b"one");
    a.memory.write(100, b"two");
    a.memory.write(201, b"three");
    let mut pieces = [a.sge(0, 3), a.sge(100, 3), a.sge(201, 5)];
    let mut places = [b.sge(0, 4), b.sge(1000, 7)];
    assert_eq!(post_recv(&b.qp, &mut recv_wr(9, &mut places)), 0);
    let mut request = wr(1, IBV_WR_SEND);
    request.sg_list = pieces.as_mut_ptr();
    request.num_sge = 3;
    assert_eq!(a.post(&mut request), 0);
    a.wait_ok(1);
    b.wait_ok(9);
    assert_eq!(b.memory.read(0, 4), b"onet");
    assert_eq!(b.memory.read(1000, 7), b"wothree");
}

#[test]
fn inline_data_may_change_after_the_post() {
    let (a, b) = pair(Options::default());
    let mut text = *b"inline needs no region";
    let mut sge = ibv_sge {
        addr: text.as_ptr().addr() as u64,
        length: u32::try_from(text.len()).unwrap(),
        lkey: 0xdead,
    };
    // Exposes the address, which the device gets as a number.
    let _ = text.as_mut_ptr().expose_provenance();
    let mut request = rdma(1, IBV_WR_RDMA_WRITE, &b, 0);
    request.send_flags |= IBV_SEND_INLINE;
    request.sg_list = &raw mut sge;
    request.num_sge = 1;
    assert_eq!(a.post(&mut request), 0);
    text.fill(0);
    a.wait_ok(1);
    assert_eq!(b.memory.read(0, text.len()), b"inline needs no region");
}

#[test]
fn one_signalled_request_frees_the_silent_ones_before_it() {
    let options = Options {
        max_send_wr: 8,
        ..Options::default()
    };
    let (a, b) = pair(options);
    for round in 0..20u64 {
        for silent in 0..7 {
            let mut request = rdma(silent, IBV_WR_RDMA_WRITE, &b, 0);
            request.send_flags = 0;
            assert_eq!(a.post_one(request, 0, 64), 0, "round {round}");
        }
        assert_eq!(a.post_one(rdma(99, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
        a.wait_ok(99);
        assert!(a.poll().is_none(), "silent requests complete silently");
    }
}

#[test]
fn sq_sig_all_signals_every_request() {
    let (a, b) = pair(Options {
        sq_sig_all: true,
        ..Options::default()
    });
    let mut request = rdma(3, IBV_WR_RDMA_WRITE, &b, 0);
    request.send_flags = 0;
    assert_eq!(a.post_one(request, 0, 64), 0);
    a.wait_ok(3);
}

#[test]
fn a_full_send_queue_is_enomem_and_names_the_request() {
    let options = Options {
        max_send_wr: 4,
        rnr_retry: 7,
        ..Options::default()
    };
    let (a, b) = pair(options);
    // Without a receive at the peer nothing completes.
    let mut requests: Vec<_> = (0..6).map(|wr_id| wr(wr_id, IBV_WR_SEND)).collect();
    for index in 0..5 {
        let next = &raw mut requests[index + 1];
        requests[index].next = next;
    }
    let (result, bad_wr) = post_send(&a.qp, &raw mut requests[0]);
    assert_eq!(result, libc::ENOMEM);
    assert_eq!(bad_wr, &raw mut requests[4], "four fit");
    for wr_id in 0..5 {
        assert_eq!(b.post_recv(wr_id, 0, 64), 0);
    }
    for wr_id in 0..4 {
        a.wait_ok(wr_id);
    }
    assert_eq!(a.post(&mut wr(9, IBV_WR_SEND)), 0, "polling made room");
    a.wait_ok(9);
}

#[test]
fn a_full_receive_queue_is_enomem() {
    let (a, _b) = pair(Options {
        max_recv_wr: 3,
        ..Options::default()
    });
    for wr_id in 0..3 {
        assert_eq!(a.post_recv(wr_id, 0, 64), 0);
    }
    assert_eq!(a.post_recv(3, 0, 64), libc::ENOMEM);
}

#[test]
fn a_chosen_iova_is_what_peers_and_requests_use() {
    let (a, b) = pair(Options::default());
    let memory = Memory::new(4096);
    let iova = 0x7000_0000_0000;
    let mr = reg_mr_iova(&b.pd, memory.addr(), memory.len(), iova, ALL).unwrap();
    a.memory.write(0, b"by another name");
    let mut request = wr(1, IBV_WR_RDMA_WRITE);
    request.wr.rdma.remote_addr = iova + 40;
    request.wr.rdma.rkey = mr.rkey;
    assert_eq!(a.post_one(request, 0, 15), 0);
    a.wait_ok(1);
    assert_eq!(memory.read(40, 15), b"by another name");
}

#[test]
fn many_queue_pairs_of_two_devices_keep_their_bytes_apart() {
    let (mut a, mut b) = pair(Options {
        cqe: 4096,
        ..Options::default()
    });
    let mut pairs: Vec<_> = (0..40).map(|_| (a.create_qp(), b.create_qp())).collect();
    for (qa, qb) in &mut pairs {
        mem::swap(&mut a.qp, qa);
        mem::swap(&mut b.qp, qb);
        connect(&a, &b);
    }
    // Each pair has been exchanged for the one before it.
    for (index, (qa, _)) in pairs.iter_mut().enumerate() {
        mem::swap(&mut a.qp, qa);
        let bytes = pattern(20_000, u8::try_from(index).unwrap());
        a.memory.write(index * 20_000, &bytes);
        let request = rdma(index as u64, IBV_WR_RDMA_WRITE, &b, index * 20_000);
        assert_eq!(a.post_one(request, index * 20_000, 20_000), 0);
    }
    for _ in &pairs {
        assert_eq!(a.wait().status, IBV_WC_SUCCESS);
    }
    for index in 0..pairs.len() {
        let bytes = pattern(20_000, u8::try_from(index).unwrap());
        let read = b.memory.read(index * 20_000, 20_000);
        assert_eq!(read, bytes, "queue pair {index}");
    }
}
