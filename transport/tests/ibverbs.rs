//! A peer that others wrote: a queue pair of the published `ibverbs` crate and one of ours exchange SENDs.
//!
//! Needs a real device, kernel rxe included, since that crate talks to libibverbs: `FARLOG_TEST_DEVICE` names
//! it. Without one the test says so and passes; with `FARLOG_REQUIRE_DEVICE=1` it fails.

#![allow(
    unsafe_code,
    reason = "the ibverbs crate posts through unsafe functions"
)]

use std::time::{Duration, Instant};

use ibverbs::{QueuePairEndpoint, ibv_qp_type, ibv_wc};
use transport::connect::{ConnectConfig, EndPoint, Prepared};
use transport::{
    Completion, CompletionQueue, Context, DeviceSelector, Done, Mtu, ProtectionDomain, Psn, Qpn,
    ReadyQp, SendFlags, Source, WcOpcode,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Lengths around what matters to segmentation and padding. That crate has no message without bytes.
const LENGTHS: [usize; 8] = [1, 3, 4, 1_023, 1_024, 1_025, 2_049, 65_537];
const LENGTH_MAX: usize = 65_537;
/// That crate always starts to count at 0, and always uses port 1.
const FOREIGN_PSN: Psn = Psn::new(0).unwrap();
const PORT: u8 = 1;
const MTU: Mtu = Mtu::Mtu1024;

#[test]
fn sends_are_exchanged_with_the_ibverbs_crate() {
    let Some(name) = device_name() else { return };
    let context = Context::open(&DeviceSelector::Named(name.clone())).unwrap();
    let gid = context.best_gid(PORT).unwrap();
    let pd = ProtectionDomain::alloc(&context).unwrap();
    let cq = CompletionQueue::create(&context, 256, None).unwrap();
    let config = ConnectConfig {
        port: Some(PORT),
        gid_index: Some(u8::try_from(gid.index).unwrap()),
        path_mtu: Some(MTU),
        // A receive may be posted late: this one machine does everything.
        min_rnr_timer: 27,
        timeout: 16,
        ..ConnectConfig::default()
    };
    let ours = Prepared::create(&pd, &cq, &cq, &config).unwrap();
    let our_end = ours.end_point();

    let devices = ibverbs::devices().unwrap();
    let device = devices
        .iter()
        .find(|device| {
            device
                .name()
                .is_some_and(|found| found.to_bytes() == name.as_bytes())
        })
        .expect("both crates see the same devices");
    let foreign_context = device.open().unwrap();
    let foreign_cq = foreign_context.create_cq(16, 0).unwrap();
    let foreign_pd = foreign_context.alloc_pd().unwrap();
    let theirs = foreign_pd
        .create_qp(&foreign_cq, &foreign_cq, ibv_qp_type::IBV_QPT_RC)
        .set_gid_index(gid.index)
        .set_path_mtu(MTU.code().into())
        .set_rq_psn(our_end.psn.get())
        .set_timeout(16)
        .set_min_rnr_timer(27)
        .build()
        .unwrap();
    let their_end = theirs.endpoint();
    let mut ours = ours
        .connect(&EndPoint {
            qpn: Qpn::new(their_end.num).unwrap(),
            psn: FOREIGN_PSN,
            gid: gid.gid,
            other_gid: None,
            lid: their_end.lid,
            mtu: MTU,
            max_dest_rd_atomic: 1,
        })
        .unwrap();
    let mut our_gid = ibverbs::Gid::default();
    our_gid.as_mut().raw = our_end.gid.0;
    let mut theirs = theirs
        .handshake(QueuePairEndpoint {
            num: our_end.qpn.get(),
            lid: our_end.lid,
            gid: Some(our_gid),
        })
        .unwrap();

    let mut memory = foreign_pd.allocate::<u8>(LENGTH_MAX).unwrap();
    for (wr_id, len) in (1..).zip(LENGTHS) {
        // Theirs to ours.
        let bytes = pattern(wr_id, len);
        ours.post_recv(wr_id, pd.alloc_local(len + 3).unwrap())
            .unwrap();
        memory[..len].copy_from_slice(&bytes);
        // SAFETY: `memory` is not touched until the completion below.
        unsafe { theirs.post_send(&mut memory, ..len, wr_id) }.unwrap();
        expect_foreign(&foreign_cq, wr_id);
        let done = next(&cq, &mut ours);
        assert!(done.is_success(), "{len}: {}", done.status);
        assert_eq!((done.wr_id, done.opcode), (wr_id, WcOpcode::Recv));
        assert_eq!(done.byte_len as usize, len);
        assert!(
            done.buffer.unwrap().as_slice()[..len] == bytes,
            "{len} bytes differ"
        );

        // Ours to theirs.
        let bytes = pattern(wr_id + 100, len);
        memory.fill(0xa5);
        // SAFETY: as above.
        unsafe { theirs.post_receive(&mut memory, .., wr_id) }.unwrap();
        let mut source = pd.alloc_local(len).unwrap();
        source.as_mut_slice().copy_from_slice(&bytes);
        let mut chain = ours.start_send();
        chain
            .send(wr_id, Source::Local(source), SendFlags::SIGNALED)
            .unwrap();
        chain.submit().unwrap();
        let done = next(&cq, &mut ours);
        assert!(done.is_success(), "{len}: {}", done.status);
        assert_eq!((done.wr_id, done.opcode), (wr_id, WcOpcode::Send));
        assert_eq!(expect_foreign(&foreign_cq, wr_id), len);
        assert!(memory[..len] == bytes, "{len} bytes differ");
        assert!(
            memory[len..].iter().all(|byte| *byte == 0xa5),
            "bytes strayed"
        );
    }
    println!("{} SENDs in each direction on {name}", LENGTHS.len());
}

/// The device under test, or why there is none.
fn device_name() -> Option<String> {
    let name = std::env::var("FARLOG_TEST_DEVICE")
        .ok()
        .filter(|name| !name.starts_with("soft"));
    let is_required = std::env::var_os("FARLOG_REQUIRE_DEVICE").is_some_and(|value| value == "1");
    assert!(
        name.is_some() || !is_required,
        "FARLOG_TEST_DEVICE names no real device"
    );
    if name.is_none() {
        eprintln!("skipped: FARLOG_TEST_DEVICE names no real device");
    }
    name
}

/// Waits for the next completion of our queue pair.
fn next(cq: &CompletionQueue, qp: &mut ReadyQp) -> Done {
    let mut completions: Vec<Completion> = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while completions.is_empty() {
        assert!(Instant::now() < deadline, "our side waits for ever");
        // One request is outstanding, so one completion comes.
        cq.poll(&mut completions).unwrap();
        std::thread::yield_now();
    }
    qp.complete(completions.remove(0)).unwrap()
}

/// Waits for the foreign completion of `wr_id` in success, and tells its length.
fn expect_foreign(cq: &ibverbs::CompletionQueue<'_>, wr_id: u64) -> usize {
    let mut completions = [ibv_wc::default(); 1];
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "the other side waits for ever");
        if let [completion] = cq.poll(&mut completions).unwrap() {
            assert!(completion.is_valid(), "{:?}", completion.error());
            assert_eq!(completion.wr_id(), wr_id);
            return completion.len();
        }
        std::thread::yield_now();
    }
}

/// Bytes that differ from each other and for each `seed`.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|index| (index.wrapping_mul(167) ^ (index >> 8) ^ seed).to_le_bytes()[0])
        .collect()
}
