//! How many instructions does the software device's protocol take per packet?
//!
//! Two queue pairs without a socket: WRITEs, each posted, made into packets, checked, placed, acknowledged
//! and completed, one after the other. What a socket adds is the kernel's, which no user's tool counts.
//! The four steps are functions of their own, for valgrind to count the instructions below each:
//!
//! ```text
//! cargo build --release -p benches --bin packet_instructions
//! valgrind --tool=callgrind --callgrind-out-file=target/packets.out \
//!     target/release/packet_instructions LEN [COUNT]
//! callgrind_annotate --inclusive=yes --threshold=100 target/packets.out | grep packet_instructions::
//! ```
//!
//! divided by the messages, 1,000 unless COUNT says otherwise. Measured on x86-64 with AVX2, path MTU 4096:
//!
//! | WRITE of | send | receive | acknowledge | complete |
//! | --- | --- | --- | --- | --- |
//! | 0 B | 1,543 | 1,045 | 890 | 1,066 |
//! | 64 B | 1,668 | 1,302 | 890 | 1,066 |
//! | 4 KiB, one packet | 4,314 | 3,942 | 890 | 1,066 |
//! | 64 KiB, each of 16 packets | 3,872 | 3,749 | 911 in all | 1,074 in all |
//!
//! So a packet costs its sender some 1,500 instructions and its receiver 1,000 to 1,300, and copy and ICRC
//! take 42 per 64 bytes on either side.
#![allow(unsafe_code, reason = "registers the memory that is written")]

use std::env;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use soft_roce::link::TxBuf;
use soft_roce::mr_table::{AccessFlags, Key, MrTable, Pd, Region};
use soft_roce::qp::{Attr, AttrMask, Mtu, QpConfig, QpState};
use soft_roce::rc::{AckTime, Qp};
use soft_roce::wire::icrc::Flow;
use soft_roce::wire::{Packet, Psn, Qpn, ROCE_PORT};
use soft_roce::work::{Data, Remote, SendFlags, SendOp, SendWr, Sge, WcStatus};

const COUNT: u64 = 1_000;
const LEN_MAX: usize = 64 << 10;
const PD: Pd = Pd(1);
/// Where each end's memory starts for work requests and peers.
const IOVA: u64 = 0x1000_0000;
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)];
const QPNS: [Qpn; 2] = [Qpn::new(2), Qpn::new(3)];

/// A queue pair, the memory it reaches, and its packets on their way out.
struct End {
    local: SocketAddr,
    qp: Qp,
    regions: MrTable,
    key: Key,
    tx: TxBuf,
}

fn main() {
    let mut args = env::args().skip(1);
    let mut number = |default| args.next().map_or(Some(default), |text| text.parse().ok());
    let (Some(len), Some(count)) = (number(64), number(COUNT)) else {
        eprintln!("usage: packet_instructions [LEN [COUNT]]");
        std::process::exit(2);
    };
    let mut ends = [End::new(0), End::new(1)];
    let [sender, receiver] = &mut ends;
    let mut packet_count = 0;
    for message in 0..count {
        send(sender, receiver.key, len, message);
        packet_count += sender.tx.packet_count();
        receive(receiver, sender);
        acknowledge(receiver, message);
        complete(sender, receiver, message);
    }
    println!("{count} messages of {len} bytes in {packet_count} packets");
}

/// Posts a WRITE and makes its packets.
#[inline(never)]
fn send(end: &mut End, rkey: Key, len: u64, message: u64) {
    let sge = Sge {
        addr: IOVA,
        length: u32::try_from(len).expect("a message of this program is short"),
        lkey: end.key,
    };
    let remote = Remote { addr: IOVA, rkey };
    let posted = end.qp.post_send(&SendWr {
        wr_id: message,
        op: SendOp::Write { remote, imm: None },
        data: Data::Gather(&[sge]),
        flags: SendFlags::SIGNALED,
    });
    posted.expect("the send queue has room");
    end.transmit(message);
}

/// Checks the packets of `from` and takes them in.
#[inline(never)]
fn receive(end: &mut End, from: &mut End) {
    end.take_in(from);
}

/// Makes the ACK.
#[inline(never)]
fn acknowledge(end: &mut End, message: u64) {
    end.transmit(message);
}

/// Takes in the ACK, and takes the completion.
#[inline(never)]
fn complete(end: &mut End, from: &mut End, message: u64) {
    end.take_in(from);
    let (_, completion) = end.qp.poll_completion().expect("the WRITE is acknowledged");
    assert_eq!(
        (completion.wr_id, completion.status),
        (message, WcStatus::Success)
    );
}

impl End {
    /// One of the two, connected with the other.
    fn new(index: usize) -> End {
        let memory = Box::leak(vec![0x5a_u8; LEN_MAX].into_boxed_slice());
        let region = Region {
            pd: PD,
            base: memory.as_mut_ptr(),
            iova: IOVA,
            len: LEN_MAX as u64,
            access: AccessFlags::LOCAL_WRITE | AccessFlags::REMOTE_WRITE,
        };
        let mut regions = MrTable::new(index as u64);
        // SAFETY: the bytes are leaked, and no reference to them is used again.
        let key = unsafe { regions.register(region) }.expect("the table is empty");
        let local = SocketAddr::from((ADDRESSES[index], ROCE_PORT));
        let mut qp = Qp::new(
            QPNS[index],
            QpConfig {
                pd: PD,
                max_send_wr: 16,
                max_recv_wr: 1,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline: 0,
                sq_sig_all: false,
                window_max: 64,
                srq: None,
            },
        );
        connect(&mut qp, 1 - index);
        End {
            local,
            qp,
            regions,
            key,
            tx: TxBuf::new(local),
        }
    }

    fn transmit(&mut self, now: u64) {
        let is_more = self
            .qp
            .poll_transmit(now, &mut self.regions, &mut self.tx, AckTime::Now);
        assert!(!is_more, "a message fits the buffer");
    }

    /// Checks each packet that the other end has made as the device does, and empties its buffer.
    fn take_in(&mut self, from: &mut End) {
        let flow = Flow::new(from.local, self.local);
        let mut segment_len = 0;
        let mut last_len = 0;
        let mut identification = 0;
        for (_, udp_payload) in from.tx.packets() {
            let len = udp_payload.len();
            // Those of a run are numbered. They have one length; only the last may be shorter.
            if last_len == segment_len && len <= segment_len {
                identification += 1;
            } else {
                segment_len = len;
                identification = 0;
            }
            last_len = len;
            assert!(
                flow.is_exact(identification, udp_payload),
                "numbered as predicted"
            );
            let packet = Packet::parse(black_box(udp_payload)).expect("made by the device");
            self.qp
                .handle_packet(0, from.local.ip(), &packet, &mut self.regions);
        }
        from.tx.clear();
    }
}

/// Takes `qp` from RESET to RTS, connected with the end `peer`.
fn connect(qp: &mut Qp, peer: usize) {
    let attr = Attr {
        access: AccessFlags::REMOTE_WRITE,
        path_mtu: Mtu::Mtu4096,
        dest_qpn: QPNS[peer],
        remote: IpAddr::V4(ADDRESSES[peer]),
        rq_psn: Psn::new(0),
        sq_psn: Psn::new(0),
        timeout: 14,
        retry_cnt: 7,
        rnr_retry: 7,
        ..Attr::default()
    };
    let steps = [
        (
            QpState::Init,
            AttrMask::PKEY_INDEX | AttrMask::PORT | AttrMask::ACCESS_FLAGS,
        ),
        (
            QpState::Rtr,
            AttrMask::AV
                | AttrMask::PATH_MTU
                | AttrMask::DEST_QPN
                | AttrMask::RQ_PSN
                | AttrMask::MAX_DEST_RD_ATOMIC
                | AttrMask::MIN_RNR_TIMER,
        ),
        (
            QpState::Rts,
            AttrMask::TIMEOUT
                | AttrMask::RETRY_CNT
                | AttrMask::RNR_RETRY
                | AttrMask::SQ_PSN
                | AttrMask::MAX_QP_RD_ATOMIC,
        ),
    ];
    for (state, mask) in steps {
        let attr = Attr { state, ..attr };
        let moved = qp.modify(&attr, AttrMask::STATE | mask);
        moved.expect("the steps are those of the table");
    }
}
