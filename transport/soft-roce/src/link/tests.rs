//! Batches through real sockets, with every fallback and every fault.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::wire::icrc::Flow;
use crate::wire::{Headers, Opcode, Packet, Psn, Qpn, Reth};

/// Not the RoCE port, so that the tests run where rdma_rxe holds that one.
const PORT: u16 = 14_791;
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn udp() -> UdpLink {
    UdpLink::bind(None, PORT).unwrap()
}

/// Pushes one packet of a WRITE; the payload bytes all equal the PSN's lowest byte.
fn push(tx: &mut TxBuf, to: IpAddr, opcode: Opcode, psn: u32, payload_len: usize) -> bool {
    let mut headers = Headers::new(opcode, Qpn::new(0x11), Psn::new(psn));
    if matches!(opcode, Opcode::WriteFirst | Opcode::WriteOnly) {
        headers.reth = Some(Reth {
            va: 0x1000,
            rkey: 0x4242,
            dma_len: 1 << 16,
        });
    }
    let [.., byte] = psn.to_be_bytes();
    tx.push(to, &headers, payload_len, |payload| {
        payload.fill(byte);
        true
    })
}

/// Two messages at MTU 4096, the second with a short last packet: runs of 2, 14, 2 and 1 packets.
fn push_messages(tx: &mut TxBuf, to: IpAddr) -> u32 {
    let mut psns = 0..19;
    let mut next = |tx: &mut TxBuf, opcode, len| {
        assert!(push(tx, to, opcode, psns.next().unwrap(), len));
    };
    next(tx, Opcode::WriteFirst, 4096);
    (0..14).for_each(|_| next(tx, Opcode::WriteMiddle, 4096));
    next(tx, Opcode::WriteLast, 4096);
    next(tx, Opcode::WriteFirst, 4096);
    next(tx, Opcode::WriteMiddle, 4096);
    next(tx, Opcode::WriteLast, 1);
    assert!(psns.is_empty());
    19
}

/// Receives until `count` more packets came, good or bad, or none comes any more; returns the PSNs of
/// the good ones.
fn receive(link: &mut impl Link, rx: &mut RxBuf, count: u64) -> Vec<u32> {
    let target = rx.rcvd_pkts() + rx.icrc_err() + count;
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut psns = Vec::new();
    while rx.rcvd_pkts() + rx.icrc_err() < target && Instant::now() < deadline {
        link.recv(rx).unwrap();
        while let Some((_, bytes)) = rx.next_packet() {
            let packet = Packet::parse(bytes).unwrap();
            let [.., byte] = packet.headers.bth.psn.get().to_be_bytes();
            assert!(packet.payload.iter().all(|b| *b == byte), "{packet}");
            psns.push(packet.headers.bth.psn.get());
        }
        std::thread::yield_now();
    }
    psns
}

fn run_counts(tx: &TxBuf) -> Vec<u16> {
    tx.runs().map(|(run, _)| run.count).collect()
}

#[test]
fn equal_packets_to_one_place_form_runs_numbered_from_zero() {
    let [local, to, other] = [2, 3, 4].map(|host| IpAddr::from([127, 0, 0, host]));
    let local = SocketAddr::new(local, PORT);
    let mut tx = TxBuf::new(local);
    push_messages(&mut tx, to);
    push(&mut tx, to, Opcode::SendOnly, 19, 0);
    push(&mut tx, other, Opcode::SendOnly, 20, 0);
    push(&mut tx, other, Opcode::SendOnly, 21, 0);
    // First is longer than Middle, which thus ends First's run, as each shorter packet does.
    assert_eq!(run_counts(&tx), [2, 14, 2, 2, 2]);
    assert_eq!(tx.packet_count(), 22);
    for (to, identification, packet) in tx.numbered_packets() {
        let flow = Flow::new(local, SocketAddr::new(to, PORT));
        assert!(
            flow.is_exact(identification, packet),
            "identification {identification}"
        );
    }
    let psns = |tx: &TxBuf| -> Vec<u32> {
        tx.packets()
            .map(|(_, p)| Packet::parse(p).unwrap().headers.bth.psn.get())
            .collect()
    };
    assert_eq!(psns(&tx), (0..22).collect::<Vec<_>>());

    // The first run is sent, then the network turns out to cut nothing.
    tx.split_runs(1);
    assert_eq!(psns(&tx), (2..22).collect::<Vec<_>>());
    assert!(run_counts(&tx).iter().all(|count| *count == 1));
    for (to, packet) in tx.packets() {
        let flow = Flow::new(local, SocketAddr::new(to, PORT));
        assert!(flow.is_exact(0, packet));
    }
    tx.clear();
    push_messages(&mut tx, to);
    assert_eq!(tx.run_count(), 19, "packets stay apart");
}

#[test]
fn runs_keep_to_the_kernel_s_limits() {
    let mut tx = TxBuf::new(SocketAddr::new(LOCALHOST, PORT));
    for psn in 0..200 {
        assert!(push(&mut tx, LOCALHOST, Opcode::SendOnly, psn, 8));
    }
    assert_eq!(run_counts(&tx), [64, 64, 64, 8]);
    tx.clear();
    let mut count = 0;
    while push(&mut tx, LOCALHOST, Opcode::WriteMiddle, count, 4096) {
        count += 1;
    }
    assert!(tx.is_full());
    assert_eq!(u64::from(count), tx.packets_in(0..tx.run_count()));
    assert!(
        tx.runs()
            .all(|(run, bytes)| bytes.len() == run.len && run.len <= 65_507)
    );
}

#[test]
fn an_abandoned_packet_leaves_no_trace() {
    let mut tx = TxBuf::new(SocketAddr::new(LOCALHOST, PORT));
    let headers = Headers::new(Opcode::SendOnly, Qpn::new(1), Psn::new(1));
    assert!(!tx.push(LOCALHOST, &headers, 5, |_| false));
    assert!(tx.is_empty() && tx.packets().next().is_none());
    assert!(push(&mut tx, LOCALHOST, Opcode::SendOnly, 7, 5));
    let (_, bytes) = tx.packets().next().unwrap();
    let packet = Packet::parse(bytes).unwrap();
    assert_eq!(packet.payload, [7; 5]);
    assert!(packet.is_padded_right());
}

#[test]
fn batches_arrive_whole_with_and_without_gso_and_gro() {
    for (no_gso, no_gro) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut sender = udp().without(no_gso, false);
        let mut receiver = udp().without(false, no_gro);
        let mut tx = TxBuf::new(sender.local_addr());
        let mut rx = RxBuf::new(receiver.local_addr());
        for _ in 0..3 {
            let count = push_messages(&mut tx, receiver.local_addr().ip());
            sender.send(&mut tx).unwrap();
            assert!(tx.is_empty());
            let psns = receive(&mut receiver, &mut rx, u64::from(count));
            assert_eq!(
                psns,
                (0..count).collect::<Vec<_>>(),
                "gso {no_gso}, gro {no_gro}"
            );
        }
        assert_eq!(
            sender.counters(),
            LinkCounters {
                sent_pkts: 57,
                send_err: 0
            }
        );
        assert_eq!((rx.rcvd_pkts(), rx.icrc_err()), (57, 0));
    }
}

/// A link on `::1` that sends to itself; `None`, with the reason printed, where there is no IPv6.
fn udp_v6(port: u16) -> Option<UdpLink> {
    match UdpLink::bind(Some(Ipv6Addr::LOCALHOST.into()), port) {
        Ok(link) => Some(link),
        Err(error @ (BindError::NotLocal { .. } | BindError::NoSuchFamily { .. })) => {
            eprintln!("skipped: no IPv6 on this machine ({error})");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn ipv6_carries_the_same_batches() {
    for (port, no_gso, no_gro) in [(1, false, false), (2, false, true), (3, true, false)] {
        let Some(link) = udp_v6(PORT + port) else {
            return;
        };
        let mut link = link.without(no_gso, no_gro);
        let mut tx = TxBuf::new(link.local_addr());
        let mut rx = RxBuf::new(link.local_addr());
        let count = push_messages(&mut tx, link.local_addr().ip());
        // Of the other family: costs itself only.
        push(&mut tx, LOCALHOST, Opcode::SendOnly, 99, 8);
        link.send(&mut tx).unwrap();
        let psns = receive(&mut link, &mut rx, u64::from(count));
        assert_eq!(psns, (0..count).collect::<Vec<_>>());
        assert_eq!((rx.rcvd_pkts(), rx.icrc_err()), (u64::from(count), 0));
        assert_eq!(link.counters().send_err, 1);
    }
}

/// Kernel rxe and hardware send none.
#[test]
fn ipv6_packets_without_a_udp_checksum_are_received() {
    let Some(mut link) = udp_v6(PORT + 4) else {
        return;
    };
    let stranger = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    const UDP_NO_CHECK6_TX: i32 = 101;
    sys::set_option(stranger.as_fd(), libc::SOL_UDP, UDP_NO_CHECK6_TX, 1).unwrap();
    let mut tx = TxBuf::new(stranger.local_addr().unwrap());
    push(&mut tx, LOCALHOST, Opcode::SendOnly, 1, 8);
    let mut packet = tx.packets().next().unwrap().1.to_vec();
    Flow::new(stranger.local_addr().unwrap(), link.local_addr()).seal(0, &mut packet);
    stranger.send_to(&packet, link.local_addr()).unwrap();
    let mut rx = RxBuf::new(link.local_addr());
    assert_eq!(receive(&mut link, &mut rx, 1), [1]);
}

#[test]
fn a_receive_takes_more_datagrams_while_many_come() {
    let mut sender = udp().without(true, false);
    let mut receiver = udp().without(false, true);
    let to = receiver.local_addr().ip();
    let (mut tx, mut rx) = (
        TxBuf::new(sender.local_addr()),
        RxBuf::new(receiver.local_addr()),
    );
    for psn in 0..20 {
        assert!(push(&mut tx, to, Opcode::WriteOnly, psn, 8));
    }
    sender.send(&mut tx).unwrap();
    let counts = [0; 6].map(|_| receiver.recv(&mut rx).unwrap());
    assert_eq!(counts, [1, 2, 4, 8, 5, 0]);
}

#[test]
fn what_is_no_packet_is_counted_and_dropped() {
    let mut receiver = udp();
    let mut rx = RxBuf::new(receiver.local_addr());
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let garbage: [&[u8]; 5] = [&[], &[0], &[0; 15], &[0xff; 16], &[0x5a; 9000]];
    for bytes in garbage {
        stranger.send_to(bytes, receiver.local_addr()).unwrap();
    }
    assert!(receive(&mut receiver, &mut rx, 5).is_empty());
    assert_eq!((rx.rcvd_pkts(), rx.icrc_err()), (0, 5));
}

#[test]
fn an_unreachable_destination_costs_its_packets_only() {
    let mut sender = udp();
    let mut receiver = udp();
    let mut tx = TxBuf::new(sender.local_addr());
    // A socket bound to a loopback address may not send to the outside.
    push(
        &mut tx,
        IpAddr::from([240, 0, 0, 1]),
        Opcode::SendOnly,
        1,
        8,
    );
    push(&mut tx, receiver.local_addr().ip(), Opcode::SendOnly, 2, 8);
    sender.send(&mut tx).unwrap();
    let mut rx = RxBuf::new(receiver.local_addr());
    assert_eq!(receive(&mut receiver, &mut rx, 1), [2]);
    assert_eq!(
        sender.counters(),
        LinkCounters {
            sent_pkts: 1,
            send_err: 1
        }
    );
}

/// Sends 400 packets in batches of 20 through a link with these faults; returns the PSNs that
/// arrive and the number of packets with a wrong ICRC.
fn through_faults(rates: FaultRates, seed: u64) -> (Vec<u32>, u64) {
    let mut receiver = udp();
    let to = receiver.local_addr().ip();
    let mut sender = FaultLink::new(udp(), rates, seed);
    let mut tx = TxBuf::new(sender.local_addr());
    let mut rx = RxBuf::new(receiver.local_addr());
    let mut psns = Vec::new();
    for batch in 0..20 {
        for psn in batch * 20..batch * 20 + 20 {
            push(&mut tx, to, Opcode::WriteMiddle, psn, 256);
        }
        let before = sender.counters().sent_pkts;
        sender.send(&mut tx).unwrap();
        let sent = sender.counters().sent_pkts - before;
        psns.extend(receive(&mut receiver, &mut rx, sent));
    }
    (psns, rx.icrc_err())
}

fn rate(rate: u16) -> FaultRates {
    FaultRates {
        loss: rate,
        ..FaultRates::default()
    }
}

#[test]
fn faults_strike_as_often_as_asked() {
    let none = FaultRates::default();
    let all: Vec<u32> = (0..400).collect();
    assert_eq!(through_faults(none, 1), (all.clone(), 0));
    assert_eq!(through_faults(rate(1000), 1), (vec![], 0));

    let (psns, wrong) = through_faults(rate(200), 2);
    assert!(
        (280..360).contains(&psns.len()) && psns.is_sorted(),
        "{} arrived",
        psns.len()
    );
    assert_eq!(wrong, 0);

    let (psns, wrong) = through_faults(
        FaultRates {
            duplication: 1000,
            ..none
        },
        3,
    );
    assert_eq!((psns.len(), wrong), (800, 0));

    let (psns, wrong) = through_faults(
        FaultRates {
            reordering: 200,
            ..none
        },
        4,
    );
    assert_eq!(wrong, 0);
    assert!(
        !psns.is_sorted() && psns.len() >= 396,
        "{} arrived",
        psns.len()
    );

    let (psns, wrong) = through_faults(
        FaultRates {
            corruption: 200,
            ..none
        },
        5,
    );
    assert_eq!(psns.len() as u64 + wrong, 400);
    assert!((40..120).contains(&wrong), "{wrong} damaged");
}

#[test]
fn equal_seeds_strike_equal_packets() {
    let rates = FaultRates {
        loss: 100,
        duplication: 100,
        reordering: 100,
        corruption: 100,
    };
    assert_eq!(through_faults(rates, 7), through_faults(rates, 7));
    assert_ne!(through_faults(rates, 7), through_faults(rates, 8));
}

/// Devices on one address and different ports wrote one file.
#[test]
fn each_device_has_a_capture_of_its_own() {
    let name = |local: &str| pcap_path_for(Path::new("a/dump.pcapng"), local.parse().unwrap());
    assert_eq!(name("127.0.0.2:4791"), Path::new("a/dump-127.0.0.2.pcapng"));
    assert_eq!(name("[::1]:7000"), Path::new("a/dump-::1-7000.pcapng"));
}

#[test]
fn tshark_reads_the_capture_as_roce() {
    let directory = tempfile::tempdir().unwrap();
    let sender = udp();
    let path = pcap_path_for(&directory.path().join("dump.pcapng"), sender.local_addr());
    let mut sender = PcapLink::create(sender, &path, u64::MAX).unwrap();
    let receiver_path = directory.path().join("receiver.pcapng");
    let mut receiver = PcapLink::create(udp(), &receiver_path, u64::MAX).unwrap();

    let mut tx = TxBuf::new(sender.local_addr());
    tx.keep_notes();
    let count = push_messages(&mut tx, receiver.local_addr().ip());
    let note = Note {
        qpn: Qpn::new(0x12),
        wr_id: Some(0x2a),
        is_retry: true,
    };
    tx.note(note);
    sender.send(&mut tx).unwrap();
    let mut rx = RxBuf::new(receiver.local_addr());
    assert_eq!(
        receive(&mut receiver, &mut rx, u64::from(count)).len(),
        count as usize
    );
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.send_to(&[0; 20], receiver.local_addr()).unwrap();
    receive(&mut receiver, &mut rx, 1);

    let fields = [
        "ip.checksum.status",
        "infiniband.bth.opcode",
        "infiniband.bth.psn",
        "infiniband.bth.padcnt",
        "ip.id",
        "frame.packet_flags_direction",
        "_ws.malformed",
        "frame.comment",
    ];
    for (path, direction) in [(&path, "2"), (&receiver_path, "1")] {
        let Some(lines) = tshark(path, &sender, &fields) else {
            return;
        };
        let good: Vec<_> = lines
            .iter()
            .filter(|line| !line.ends_with("dropped"))
            .collect();
        assert_eq!(good.len(), count as usize, "{lines:#?}");
        for (psn, line) in good.iter().enumerate() {
            let (opcode, identification) = match psn {
                0 | 16 => ("6", 0),
                1 | 17 => ("7", 1),
                15 => ("8", 13),
                18 => ("8", 0),
                _ => ("7", psn - 2),
            };
            let pad = if psn == 18 { "3" } else { "0" };
            let identification = format!("0x{identification:04x}");
            let comment = match (direction, psn) {
                ("1", _) => "qp=0x000011",
                (_, 18) => "qp=0x000012 wr_id=0x2a retry",
                _ => "",
            };
            let expected = [
                "1",
                opcode,
                &psn.to_string(),
                pad,
                &identification,
                direction,
                "",
                comment,
            ];
            let mut fields: Vec<_> = line.split('|').collect();
            // Versions of tshark differ in how they print flags.
            fields[5] = fields[5].trim_start_matches("0x").trim_start_matches('0');
            assert_eq!(fields, expected, "packet {psn}");
        }
        let dropped = lines.len() - good.len();
        assert_eq!(
            dropped,
            usize::from(direction == "1"),
            "the stranger's packet is in the capture"
        );
    }
}

#[test]
fn tshark_reads_an_ipv6_capture_as_roce() {
    let Some(link) = udp_v6(PORT + 5) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump.pcapng");
    let mut link = PcapLink::create(link, &path, u64::MAX).unwrap();
    let to = link.local_addr().ip();
    let (mut tx, mut rx) = (TxBuf::new(link.local_addr()), RxBuf::new(link.local_addr()));
    let count = push_messages(&mut tx, to);
    link.send(&mut tx).unwrap();
    receive(&mut link, &mut rx, u64::from(count));
    let fields = [
        "ipv6.src",
        "ipv6.nxt",
        "infiniband.bth.psn",
        "_ws.malformed",
        "frame.comment",
    ];
    let Some(lines) = tshark(&path, &link, &fields) else {
        return;
    };
    let psns = || (0..count).map(|psn| psn.to_string());
    let sent = psns().map(|psn| format!("::1|17|{psn}||"));
    let received = psns().map(|psn| format!("::1|17|{psn}||qp=0x000011"));
    assert_eq!(lines, sent.chain(received).collect::<Vec<_>>());
}

#[test]
fn a_long_capture_goes_on_in_another_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump.pcapng");
    let mut sender = PcapLink::create(udp(), &path, 100 << 10).unwrap();
    let to = udp().local_addr().ip();
    let mut tx = TxBuf::new(sender.local_addr());
    for _ in 0..5 {
        // Some 60 KiB of packets each.
        push_messages(&mut tx, to);
        sender.send(&mut tx).unwrap();
    }
    let previous = directory.path().join("dump.previous.pcapng");
    for path in [&path, &previous] {
        let bytes = std::fs::read(path).unwrap();
        assert!(
            (60 << 10..100 << 10).contains(&bytes.len()),
            "{}",
            bytes.len()
        );
        assert_eq!(
            bytes[..4],
            [0x0a, 0x0d, 0x0d, 0x0a],
            "a section header first"
        );
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
}

/// One line per packet: what tshark finds in `fields`. `None`, with the reason printed, where there is no
/// tshark.
fn tshark(path: &std::path::Path, link: &impl Link, fields: &[&str]) -> Option<Vec<String>> {
    let port = format!("infiniband.rroce.port:{}", link.local_addr().port());
    let mut command = Command::new("tshark");
    command.args(["-n", "-o", "ip.check_checksum:TRUE", "-o", &port]);
    command.args([
        "--disable-protocol",
        "rpcordma",
        "-T",
        "fields",
        "-E",
        "separator=|",
    ]);
    command
        .args(fields.iter().flat_map(|field| ["-e", field]))
        .arg("-r")
        .arg(path);
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("skipped: tshark cannot be run ({error}); install tshark to check captures");
            return None;
        }
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect(),
    )
}
