//! Who drives: pollers, the device's thread, and what an idle device costs.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdma_core_bindings::*;
use soft_roce::{SoftConfig, SoftDevice};

use crate::support::*;

/// CPU time of one thread of this process, by name, in clock ticks of 10 ms.
fn ticks_of_thread(name: &str) -> u64 {
    // The kernel keeps 15 bytes of a thread's name.
    let name = &name[..name.len().min(15)];
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let comm = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        if comm.trim() == name {
            let stat = std::fs::read_to_string(path.join("stat")).unwrap();
            let fields: Vec<_> = stat
                .rsplit(')')
                .next()
                .unwrap()
                .split_whitespace()
                .collect();
            // Fields 14 and 15 of proc(5), counted from the state, which is field 3.
            return fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    panic!("no thread {name}");
}

#[test]
fn an_idle_device_costs_nothing() {
    let (a, b) = pair(Options::default());
    // Not quite idle from the start: each has sent, received and polled.
    assert_eq!(a.post_one(rdma(1, IBV_WR_RDMA_WRITE, &b, 0), 0, 64), 0);
    a.wait_ok(1);
    std::thread::sleep(Duration::from_millis(300));
    let before = ticks_of_thread(&a.device.name()) + ticks_of_thread(&b.device.name());
    std::thread::sleep(Duration::from_secs(2));
    let after = ticks_of_thread(&a.device.name()) + ticks_of_thread(&b.device.name());
    assert!(
        after - before <= 1,
        "{} ms of CPU in 2 s of idling",
        (after - before) * 10
    );
}

#[test]
fn the_peer_of_a_sleeping_application_makes_progress() {
    let (a, b) = pair(Options::default());
    for wr_id in 0..200 {
        let opcode = if wr_id % 2 == 0 {
            IBV_WR_RDMA_WRITE
        } else {
            IBV_WR_RDMA_READ
        };
        assert_eq!(a.post_one(rdma(wr_id, opcode, &b, 0), 0, 10_000), 0);
        // This thread drives `a` alone: nobody polls `b`.
        a.wait_ok(wr_id);
    }
}

#[test]
fn a_request_completes_although_nobody_polls_at_either_end() {
    let (a, b) = pair(Options::default());
    a.memory.write(0, &pattern(500_000, 5));
    assert_eq!(a.post_one(rdma(1, IBV_WR_RDMA_WRITE, &b, 0), 0, 500_000), 0);
    let start = Instant::now();
    let last = pattern(500_000, 5)[499_992..].to_vec();
    while b.memory.read(499_992, 8) != last {
        assert!(start.elapsed() < PATIENCE, "the bytes did not arrive");
        std::thread::sleep(Duration::from_millis(1));
    }
    a.wait_ok(1);
}

#[test]
fn the_thread_takes_over_from_a_poller_that_stops() {
    let (a, b) = pair(Options::default());
    for round in 0..50 {
        // Poll in earnest, so that the device's thread withdraws ...
        let until = Instant::now() + Duration::from_millis(2);
        while Instant::now() < until {
            assert!(b.poll().is_none());
        }
        // ... and then no more.
        assert_eq!(a.post_one(rdma(round, IBV_WR_RDMA_READ, &b, 0), 0, 64), 0);
        a.wait_ok(round);
    }
}

#[test]
fn a_write_completes_although_its_poller_looks_and_leaves() {
    // Without a retransmission timer, an ACK that is held and forgotten is missed for good.
    let (a, b) = pair(Options {
        timeout: 0,
        ..Options::default()
    });
    for round in 1..200 {
        a.memory.store(0, round);
        let until = Instant::now() + Duration::from_micros(500);
        while Instant::now() < until {
            assert!(b.poll().is_none());
        }
        assert_eq!(a.post_one(rdma(round, IBV_WR_RDMA_WRITE, &b, 0), 0, 8), 0);
        let start = Instant::now();
        while b.memory.load(0) != round {
            assert!(b.poll().is_none());
            assert!(start.elapsed() < PATIENCE, "the word did not arrive");
        }
        a.wait_ok(round);
    }
}

#[test]
fn a_write_completes_although_its_target_is_destroyed_at_once() {
    for round in 0..50 {
        let (a, b) = pair(Options {
            timeout: 0,
            ..Options::default()
        });
        let until = Instant::now() + Duration::from_millis(1);
        while Instant::now() < until {
            assert!(b.poll().is_none());
        }
        a.memory.store(0, 1);
        assert_eq!(a.post_one(rdma(round, IBV_WR_RDMA_WRITE, &b, 0), 0, 8), 0);
        while b.memory.load(0) == 0 {
            assert!(b.poll().is_none());
        }
        drop(b);
        a.wait_ok(round);
    }
}

#[test]
fn two_threads_may_poll_one_queue() {
    let (a, b) = pair(Options {
        max_send_wr: 64,
        ..Options::default()
    });
    let is_done = AtomicBool::new(false);
    let other: u64 = std::thread::scope(|scope| {
        let poller = scope.spawn(|| {
            let mut taken = 0;
            while !is_done.load(Ordering::Relaxed) {
                taken += u64::from(a.poll().is_some());
            }
            taken
        });
        let (mut posted, mut taken) = (0, 0);
        let start = Instant::now();
        while posted < 5000 {
            match a.post_one(rdma(posted, IBV_WR_RDMA_WRITE, &b, 0), 0, 64) {
                0 => posted += 1,
                error => assert_eq!(error, libc::ENOMEM),
            }
            taken += u64::from(a.poll().is_some());
            assert!(start.elapsed() < PATIENCE);
        }
        // Let the rest complete, whoever takes it.
        std::thread::sleep(Duration::from_millis(200));
        is_done.store(true, Ordering::Relaxed);
        taken + poller.join().unwrap()
    });
    let mut rest = 0;
    while a.poll().is_some() {
        rest += 1;
    }
    assert_eq!(other + rest, 5000);
}

/// The fence that the log relies on: when `ibv_dereg_mr` has returned, no byte changes any more,
/// although the peer goes on writing.
#[test]
fn no_byte_changes_after_deregistration() {
    const LEN: usize = 256 * 1024;
    for round in 0..25u8 {
        let (a, mut b) = pair(Options {
            memory_len: LEN,
            ..Options::default()
        });
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (writer, target, is_done) = (&a, b.rkey(), &is_done);
            let at = b.at(0);
            scope.spawn(move || {
                // Each WRITE stores other bytes everywhere.
                for wr_id in 0u64.. {
                    let fill = vec![wr_id.to_le_bytes()[0]; LEN];
                    writer.memory.write(0, &fill);
                    let mut request = wr(wr_id, IBV_WR_RDMA_WRITE);
                    request.wr.rdma.remote_addr = at;
                    request.wr.rdma.rkey = target;
                    assert_eq!(writer.post_one(request, 0, LEN), 0);
                    if writer.wait().status != IBV_WC_SUCCESS || is_done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            std::thread::sleep(Duration::from_micros(500 + 370 * u64::from(round)));
            assert_eq!(b.mr.destroy(), 0);
            let at_return = b.memory.read(0, LEN);
            std::thread::sleep(Duration::from_millis(5));
            let later = b.memory.read(0, LEN);
            is_done.store(true, Ordering::Relaxed);
            assert!(
                at_return == later,
                "round {round}: bytes changed after deregistration"
            );
        });
    }
}

#[test]
fn objects_survive_threads_that_use_them_at_once() {
    let (a, b) = pair(Options {
        memory_len: 1 << 16,
        ..Options::default()
    });
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (a, b) = (&a, &b);
            scope.spawn(move || {
                for round in 0..200 {
                    let memory = Memory::new(4096);
                    let mr = reg_mr(&a.pd, memory.addr(), memory.len(), ALL);
                    let qp = create_qp(&a.pd, &mut a.init_attr());
                    assert!(mr.is_ok() && qp.is_ok(), "{thread} {round}");
                    a.poll();
                    b.poll();
                }
            });
        }
    });
}

/// In the child process the variable names the address that the parent holds.
const CHILD_ADDRESS: &str = "SOFT_ROCE_TEST_ADDRESS";

#[test]
fn an_address_that_another_process_has_is_refused_with_the_remedy() {
    if let Ok(address) = std::env::var(CHILD_ADDRESS) {
        let config = SoftConfig {
            address: Some(address.parse().unwrap()),
            ..SoftConfig::default()
        };
        let error = SoftDevice::bind(config).expect_err("the parent has the address");
        println!("refused: {error}");
        return;
    }
    let device = device();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture"])
        .arg("progress::an_address_that_another_process_has_is_refused_with_the_remedy")
        .env(CHILD_ADDRESS, device.address().to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let said = text
        .lines()
        .find(|line| line.contains("refused: "))
        .expect("the child's error");
    assert!(
        said.contains(&device.address().to_string()),
        "names the address: {said}"
    );
    assert!(said.contains("soft@"), "names the remedy: {said}");
}

#[test]
fn a_capture_holds_the_packets() {
    let directory = tempfile::tempdir().unwrap();
    let config = SoftConfig {
        pcap: Some(directory.path().join("dump.pcapng")),
        ..SoftConfig::default()
    };
    let device = SoftDevice::bind(config).unwrap();
    let name = format!("dump-{}.pcapng", device.address());
    let captured = std::fs::read(directory.path().join(name)).expect("one file per device");
    assert_eq!(
        captured[..4],
        0x0a0d_0d0a_u32.to_le_bytes(),
        "a pcapng section header"
    );
    let missing = directory.path().join("no/such/directory/dump.pcapng");
    let config = SoftConfig {
        pcap: Some(missing),
        ..SoftConfig::default()
    };
    let error = SoftDevice::bind(config).expect_err("there is no such directory");
    assert!(error.to_string().contains("no/such/directory"), "{error}");
}
