//! A link that records every packet in a file Wireshark reads.
//!
//! The file is pcapng with link type RAW: each packet starts with the IP header it had on the wire, as
//! far as a socket can know it (TTL, flow label and UDP checksum are not seen and not covered by the
//! ICRC). Outbound and inbound packets carry direction flags. A comment names the local queue pair, the
//! work request that an outbound packet belongs to, and whether it is a retry; an inbound packet with a
//! wrong ICRC is recorded too, with a comment that says so.
//!
//! # References
//!
//! draft-ietf-opsawg-pcapng; `tshark -r FILE`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Link, LinkCounters, RxBuf, TxBuf};
use crate::wire::icrc::Flow;
use crate::wire::{Packet, ROCE_PORT, ipv4_header, ipv6_header};

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const LINKTYPE_RAW: u16 = 101;

const OPT_COMMENT: u16 = 1;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

/// The file for one device when `path` is asked for: `dump.pcapng` gives `dump-127.0.0.2.pcapng`, or with
/// a port of its own `dump-127.0.0.2-7000.pcapng`.
///
/// One file per device, because several processes may be told the same path; `mergecap` joins them.
pub fn pcap_path_for(path: &Path, local: SocketAddr) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_os_string();
    name.push(format!("-{}", local.ip()));
    if local.port() != ROCE_PORT {
        name.push(format!("-{}", local.port()));
    }
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Where a full capture goes when another begins: `dump.pcapng` to `dump.previous.pcapng`.
fn previous_path(path: &Path) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_os_string();
    name.push(".previous");
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Wraps a link and records what it sends and receives.
///
/// Each batch is written to the file before the call returns, so that a crash loses nothing.
#[derive(Debug)]
pub struct PcapLink<L> {
    inner: L,
    file: File,
    path: PathBuf,
    /// Bytes in the file.
    file_len: u64,
    /// Bytes after which another file begins.
    file_len_max: u64,
    /// Blocks that are not yet in the file.
    blocks: Vec<u8>,
}

impl<L: Link> PcapLink<L> {
    /// Wraps `inner` and records to `path`, replacing the file.
    ///
    /// When the file would exceed `file_len_max` bytes it becomes `NAME.previous.EXTENSION`, in place of
    /// an earlier one, and recording goes on in a new file: what is kept is the newest one to two times
    /// `file_len_max` bytes. A batch of packets is never divided, so a file may be longer by one batch.
    ///
    /// # Errors
    ///
    /// The file cannot be created or written.
    pub fn create(inner: L, path: &Path, file_len_max: u64) -> io::Result<Self> {
        let mut link = Self {
            file: File::create(path)?,
            path: path.to_owned(),
            file_len: 0,
            file_len_max,
            blocks: Vec::new(),
            inner,
        };
        link.write_preamble()?;
        Ok(link)
    }

    fn write_preamble(&mut self) -> io::Result<()> {
        let preamble = preamble(&format!("soft@{}", self.inner.local_addr().ip()));
        self.file.write_all(&preamble)?;
        self.file_len = preamble.len() as u64;
        Ok(())
    }

    fn record(&mut self, packet: &Recorded<'_>) {
        let (src, dst) = (packet.src, packet.dst);
        let ip_udp = ip_udp_header(src, dst, packet.identification, packet.udp_payload.len());
        let captured_len = ip_udp.len() + packet.udp_payload.len();
        let captured_len = u32::try_from(captured_len).expect("datagrams are below 64 KiB");
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        let [_, _, high, low] = split_u128(now);
        let mut body = Vec::with_capacity(packet.udp_payload.len() + 128);
        for word in [0, high, low, captured_len, captured_len] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        body.extend_from_slice(&ip_udp);
        body.extend_from_slice(packet.udp_payload);
        align(&mut body);
        option(&mut body, EPB_FLAGS, &packet.direction.to_le_bytes());
        if !packet.comment.is_empty() {
            option(&mut body, OPT_COMMENT, packet.comment.as_bytes());
        }
        option(&mut body, 0, &[]);
        block(&mut self.blocks, ENHANCED_PACKET, &body);
    }

    /// Writes the blocks out. A full disk must not stop the device: recording ends with a warning.
    fn flush(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        if let Err(error) = self.try_flush() {
            tracing::warn!(%error, path = %self.path.display(), "packets are missing from the capture");
        }
        self.blocks.clear();
    }

    fn try_flush(&mut self) -> io::Result<()> {
        let len = self.blocks.len() as u64;
        if self.file_len.saturating_add(len) > self.file_len_max {
            fs::rename(&self.path, previous_path(&self.path))?;
            self.file = File::create(&self.path)?;
            self.write_preamble()?;
        }
        self.file.write_all(&self.blocks)?;
        self.file_len += len;
        Ok(())
    }
}

/// One packet and what is known about it.
struct Recorded<'a> {
    src: SocketAddr,
    dst: SocketAddr,
    identification: u16,
    udp_payload: &'a [u8],
    direction: u32,
    comment: String,
}

impl<L: Link> Link for PcapLink<L> {
    fn local_addr(&self) -> SocketAddr {
        self.inner.local_addr()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }

    fn send(&mut self, tx: &mut TxBuf) -> io::Result<()> {
        let src = self.inner.local_addr();
        for ((to, identification, udp_payload), note) in tx.numbered_packets().zip(tx.notes()) {
            let dst = SocketAddr::new(to, src.port());
            let direction = OUTBOUND;
            self.record(&Recorded {
                src,
                dst,
                identification,
                udp_payload,
                direction,
                comment: note.map(|note| note.to_string()).unwrap_or_default(),
            });
        }
        self.flush();
        self.inner.send(tx)
    }

    fn recv(&mut self, rx: &mut RxBuf) -> io::Result<usize> {
        let count = self.inner.recv(rx)?;
        let dst = self.inner.local_addr();
        for (src, guess, udp_payload) in rx.packets() {
            let identification = Flow::new(src, dst).verify(guess, udp_payload);
            let comment = match (identification, Packet::parse(udp_payload)) {
                (None, _) => "wrong ICRC, dropped".to_owned(),
                (_, Err(malformed)) => format!("{malformed}, dropped"),
                (_, Ok(packet)) => format!("qp={:#08x}", packet.headers.bth.dest_qp.get()),
            };
            let identification = identification.unwrap_or(guess);
            let direction = INBOUND;
            self.record(&Recorded {
                src,
                dst,
                identification,
                udp_payload,
                direction,
                comment,
            });
        }
        self.flush();
        Ok(count)
    }

    fn wants_notes(&self) -> bool {
        true
    }

    fn counters(&self) -> LinkCounters {
        self.inner.counters()
    }
}

/// The IP and UDP headers of a packet, the latter without a checksum.
fn ip_udp_header(
    src: SocketAddr,
    dst: SocketAddr,
    identification: u16,
    payload_len: usize,
) -> Vec<u8> {
    let udp_len = u16::try_from(8 + payload_len).expect("datagrams are below 64 KiB");
    let mut out = match Flow::new(src, dst) {
        Flow::V4 { src, dst } => {
            ipv4_header(*src.ip(), *dst.ip(), identification, payload_len).to_vec()
        }
        Flow::V6 { src, dst } => ipv6_header(*src.ip(), *dst.ip(), payload_len).to_vec(),
    };
    for field in [src.port(), dst.port(), udp_len, 0] {
        out.extend_from_slice(&field.to_be_bytes());
    }
    out
}

/// Section header and the description of the one interface, named `name`, with nanosecond times.
fn preamble(name: &str) -> Vec<u8> {
    let mut section = Vec::new();
    section.extend_from_slice(&0x1a2b_3c4d_u32.to_le_bytes());
    section.extend_from_slice(&[1, 0, 0, 0]); // version 1.0
    section.extend_from_slice(&u64::MAX.to_le_bytes()); // section of unknown length
    let mut interface = Vec::new();
    interface.extend_from_slice(&u32::from(LINKTYPE_RAW).to_le_bytes());
    interface.extend_from_slice(&0_u32.to_le_bytes()); // no snap length
    option(&mut interface, IF_NAME, name.as_bytes());
    option(&mut interface, IF_TSRESOL, &[9]);
    option(&mut interface, 0, &[]);
    let mut out = Vec::new();
    block(&mut out, SECTION_HEADER, &section);
    block(&mut out, INTERFACE_DESCRIPTION, &interface);
    out
}

/// Appends a block: type, length, body, length.
fn block(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let len = u32::try_from(12 + body.len())
        .expect("blocks hold one packet")
        .to_le_bytes();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&len);
    out.extend_from_slice(body);
    out.extend_from_slice(&len);
}

/// Appends an option: code, length, value, aligned.
fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    let len = u16::try_from(value.len()).expect("options are short texts");
    out.extend_from_slice(&code.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(value);
    align(out);
}

/// Fills up with zeros to a multiple of four bytes.
fn align(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

/// The four 32-bit words of `value`, highest first.
fn split_u128(value: u128) -> [u32; 4] {
    let bytes = value.to_be_bytes();
    std::array::from_fn(|i| u32::from_be_bytes(std::array::from_fn(|j| bytes[4 * i + j])))
}
