//! Packets that no honest peer sends: whatever they say, nothing panics and nothing else is touched.

use proptest::prelude::*;

use super::*;
use crate::wire::{AtomicEth, Deth, ExtHeaders, PayloadLen, Reth};

/// What the peer may touch, and where B's own requests and receives deliver.
const TARGET_LEN: usize = 4096;
const DELIVERY_LEN: usize = 1000;

/// Headers of any opcode with PSNs around what the pair expects, keys and lengths good and bad.
///
/// A key of 0 stands for the target's own, which the test puts in.
fn headers() -> impl Strategy<Value = Headers> {
    let psn = prop_oneof![4 => 0u32..8, 1 => any::<u32>()];
    let len = prop_oneof![4 => 0u32..1200, 1 => any::<u32>(), 1 => Just(1u32 << 31)];
    let at = prop_oneof![4 => 0u64..4200, 1 => any::<u64>()];
    let opcode = prop::sample::select(&Opcode::ALL[..]);
    let syndrome =
        prop_oneof![2 => Just(Syndrome::ACK), 1 => any::<u8>().prop_map(Syndrome::from_u8)];
    (opcode, psn, len, at, syndrome, any::<u64>()).prop_map(
        |(opcode, psn, dma_len, at, syndrome, random)| {
            let is_request = opcode.info().operation.is_request();
            let base = if is_request {
                FIRST_PSN
            } else {
                Psn::new(0x1000)
            };
            let has = opcode.info().headers;
            let rkey = if random % 8 == 0 { 0x1234 } else { 0 };
            let va = IOVA.wrapping_add(at);
            let atomic = AtomicEth {
                va: va & !7,
                rkey,
                swap_add: random,
                compare: 0,
            };
            let mut headers = Headers::new(opcode, Qpn::new(0x12), base + psn);
            headers.deth = has.contains(ExtHeaders::DETH).then_some(Deth {
                qkey: rkey,
                src_qp: Qpn::new(0x11),
            });
            headers.reth = has
                .contains(ExtHeaders::RETH)
                .then_some(Reth { va, rkey, dma_len });
            headers.atomic_eth = has.contains(ExtHeaders::ATOMIC_ETH).then_some(atomic);
            headers.aeth = has
                .contains(ExtHeaders::AETH)
                .then_some(Aeth { syndrome, msn: 0 });
            headers.atomic_ack = has.contains(ExtHeaders::ATOMIC_ACK).then_some(random);
            headers.imm = has.contains(ExtHeaders::IMM).then_some([1; 4]);
            headers.ieth = has.contains(ExtHeaders::IETH).then_some(0);
            headers.bth.ack_req = random % 2 == 0;
            headers
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// B has requests of every kind outstanding, and receives posted, while forged packets arrive.
    #[test]
    fn any_packets_are_judged_without_a_panic(
        packets in prop::collection::vec((headers(), 0usize..1100), 1..40)
    ) {
        // What A and B send is lost, so B hears only what is forged.
        let mut pair = Pair::new().filtered(|_| Fate::Drop);
        let rkey = pair.nodes[B].register(0, TARGET_LEN, ALL_RIGHTS, Pd(7)).0;
        let sge = pair.nodes[B].sge(TARGET_LEN, DELIVERY_LEN);
        let word = pair.nodes[B].sge(TARGET_LEN, 8);
        let remote = pair.nodes[A].remote(0);
        pair.nodes[B].post_send(1, write_op(remote), &[sge]);
        pair.nodes[B].post_send(2, SendOp::Read { remote }, &[sge]);
        pair.nodes[B].post_send(3, SendOp::FetchAdd { remote, add: 1 }, &[word]);
        for wr_id in 0..5 {
            pair.nodes[B].post_recv(wr_id, &[sge]);
        }
        let behind = TARGET_LEN + DELIVERY_LEN;
        let before = pair.nodes[B].read(behind, MEMORY_LEN - behind);
        pair.transmit();
        for (mut headers, payload_len) in packets {
            if let Some(reth) = headers.reth.as_mut().filter(|reth| reth.rkey == 0) {
                reth.rkey = rkey;
            }
            if let Some(eth) = headers.atomic_eth.as_mut().filter(|eth| eth.rkey == 0) {
                eth.rkey = rkey;
            }
            let is_full = headers.bth.opcode.info().payload == PayloadLen::Mtu;
            let len = if is_full { 256 } else { payload_len };
            pair.inject_built(B, &headers, &pattern(1, len));
            pair.now += 1_000;
            pair.transmit();
        }
        pair.drive();
        prop_assert!(pair.nodes[B].read(behind, MEMORY_LEN - behind) == before);
        let completions = std::mem::take(&mut pair.nodes[B].completions);
        for queue in [Queue::Send, Queue::Recv] {
            let wr_ids: Vec<u64> =
                completions.iter().filter(|(of, _)| *of == queue).map(|(_, wc)| wc.wr_id).collect();
            let first = if queue == Queue::Send { 1 } else { 0 };
            let in_order: Vec<u64> = (first..).take(wr_ids.len()).collect();
            prop_assert_eq!(wr_ids, in_order, "each request completes once, in order");
        }
    }
}
