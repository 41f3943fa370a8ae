//! Connecting two queue pairs: each side prepares one, tells the other where it is, and connects.
//!
//! ```text
//!   prepare ── EndPoint ──▶ ◀── EndPoint ── prepare        (over any stream, see `exchange`)
//!   connect                                 connect
//! ```
//!
//! An end point on the wire, little endian but for the GID:
//!
//! ```text
//!   0      4         6        8      12     16      32     34    35        36
//!   "FLEP" version=2 len (52) qpn    psn    gid     lid    mtu   rd_atomic other_gid
//!   u8 x 4 u16       u16      u32    u32    u8 x 16 u16    u8    u8        u8 x 16
//! ```
//!
//! A later version may append fields and raises `version`; readers skip what they do not know. Version 1
//! ends before `other_gid`.
//!
//! The two sides talk by IPv4 or by IPv6, as they both can: if their first GIDs are of one kind, by these; else
//! one side takes its other GID, if it has one, and where both could, they take IPv4. A software device has
//! one address and so no other GID.
//!
//! Whoever connects may send requests at once; the other side answers as soon as it has connected too, and
//! what came too early is sent again. To be sure, tell each other when done.

use std::io::{Read, Write};

use crate::attr::LinkLayer;
use crate::cq::CompletionQueue;
use crate::device::Context;
use crate::error::{Error, Failed, Result};
use crate::gid::GidEntry;
use crate::pd::ProtectionDomain;
use crate::qp::{
    AddressVector, Init, InitAttr, QpCapabilities, QueuePair, ReadyQp, Reset, RtrAttr, RtsAttr,
};
use crate::srq::SharedReceiveQueue;
use crate::types::{AccessFlags, Gid, Mtu, Psn, Qpn};

const MAGIC: [u8; 4] = *b"FLEP";
const VERSION: u16 = 2;

/// The length of an encoded [`EndPoint`] in bytes.
pub const END_POINT_LEN: usize = 52;

const LEN: u16 = 52;
const _: () = assert!(LEN as usize == END_POINT_LEN);

/// The length of an end point of version 1.
const V1_LEN: usize = 36;

/// The longest end point that is read, for versions that append fields.
pub const END_POINT_LEN_MAX: usize = 256;

/// The part of an end point that tells how long it is.
const PREFIX_LEN: usize = 8;

/// What a peer must know to connect to a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndPoint {
    /// The queue pair.
    pub qpn: Qpn,
    /// Its starting sequence number.
    pub psn: Psn,
    /// The GID its packets come from.
    pub gid: Gid,
    /// Its port's local identifier; 0 on RoCE.
    pub lid: u16,
    /// The largest path MTU that it can use.
    pub mtu: Mtu,
    /// How many READs and atomics it answers at once.
    pub max_dest_rd_atomic: u8,
    /// A GID of its port that is of the other version of IP than `gid`, for peers that have none like `gid`.
    pub other_gid: Option<Gid>,
}

impl EndPoint {
    /// The end point as bytes.
    pub fn encode(&self) -> [u8; END_POINT_LEN] {
        let mut bytes = [0; END_POINT_LEN];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&LEN.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.qpn.get().to_le_bytes());
        bytes[12..16].copy_from_slice(&self.psn.get().to_le_bytes());
        bytes[16..32].copy_from_slice(&self.gid.0);
        bytes[32..34].copy_from_slice(&self.lid.to_le_bytes());
        bytes[34] = self.mtu.code();
        bytes[35] = self.max_dest_rd_atomic;
        bytes[36..52].copy_from_slice(&self.other_gid.map_or([0; 16], |gid| gid.0));
        bytes
    }

    /// Reads an end point that a peer sent.
    ///
    /// # Errors
    ///
    /// [`Error::EndPoint`] for anything that is not one.
    pub fn decode(bytes: &[u8]) -> Result<EndPoint> {
        let len = encoded_len(bytes)?;
        let Some((bytes, later)) = bytes
            .split_first_chunk::<V1_LEN>()
            .filter(|_| bytes.len() == len)
        else {
            return Err(invalid(format!("{} bytes, and it says {len}", bytes.len())));
        };
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let (qpn, psn, mtu) = (word(8), word(12), u32::from(bytes[34]));
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[16..32]);
        let other_gid = later.first_chunk().map(|gid| Gid(*gid));
        // 0 and 1 are the management queue pairs, and the last number is multicast.
        let qpn = Qpn::new(qpn)
            .filter(|qpn| (2..0x00ff_ffff).contains(&qpn.get()))
            .ok_or_else(|| invalid(format!("queue pair number {qpn:#x}")))?;
        Ok(EndPoint {
            qpn,
            psn: Psn::new(psn).ok_or_else(|| invalid(format!("sequence number {psn:#x}")))?,
            gid: Gid(gid),
            lid: u16::from_le_bytes([bytes[32], bytes[33]]),
            mtu: Mtu::from_code(mtu).ok_or_else(|| invalid(format!("MTU code {mtu}")))?,
            max_dest_rd_atomic: bytes[35],
            other_gid: other_gid.filter(|gid| !gid.is_zero()),
        })
    }

    /// The GID by which this end point and `peer` reach each other; `None` if one has IPv4 and the other IPv6.
    ///
    /// Both sides come to the same kind.
    fn gid_towards(&self, peer: &EndPoint) -> Option<Gid> {
        if self.gid.is_ipv4_mapped() == peer.gid.is_ipv4_mapped() {
            return Some(self.gid);
        }
        let shared = |is_ipv4| {
            let gid = self.gid_of_kind(is_ipv4);
            gid.filter(|_| peer.gid_of_kind(is_ipv4).is_some())
        };
        shared(true).or_else(|| shared(false))
    }

    fn gid_of_kind(&self, is_ipv4: bool) -> Option<Gid> {
        let mut gids = [Some(self.gid), self.other_gid].into_iter().flatten();
        gids.find(|gid| gid.is_ipv4_mapped() == is_ipv4)
    }
}

fn invalid(reason: String) -> Error {
    Error::EndPoint { reason }
}

/// How long the end point is that begins with `bytes`.
fn encoded_len(bytes: &[u8]) -> Result<usize> {
    let Some(prefix) = bytes.first_chunk::<PREFIX_LEN>() else {
        return Err(invalid(format!("only {} bytes", bytes.len())));
    };
    let [m0, m1, m2, m3, v0, v1, l0, l1] = *prefix;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(invalid(
            "it does not begin with FLEP; is the other side farlog?".to_owned(),
        ));
    }
    let (version, len) = (
        u16::from_le_bytes([v0, v1]),
        usize::from(u16::from_le_bytes([l0, l1])),
    );
    if version == 0 || !(V1_LEN..=END_POINT_LEN_MAX).contains(&len) {
        return Err(invalid(format!("version {version} of {len} bytes")));
    }
    Ok(len)
}

/// Sends `local` over a stream and reads the peer's end point from it.
///
/// Give the stream timeouts: a peer that says nothing is waited for.
///
/// # Errors
///
/// [`Error::Exchange`] if the stream fails or ends, [`Error::EndPoint`] if the peer sends something else.
pub fn exchange(stream: &mut (impl Read + Write), local: &EndPoint) -> Result<EndPoint> {
    let failed = |source| Error::Exchange { source };
    stream.write_all(&local.encode()).map_err(failed)?;
    stream.flush().map_err(failed)?;
    let mut bytes = [0; END_POINT_LEN_MAX];
    stream
        .read_exact(&mut bytes[..PREFIX_LEN])
        .map_err(failed)?;
    let len = encoded_len(&bytes[..PREFIX_LEN])?;
    stream
        .read_exact(&mut bytes[PREFIX_LEN..len])
        .map_err(failed)?;
    EndPoint::decode(&bytes[..len])
}

/// How to connect; the default suits a data centre.
#[derive(Debug, Clone)]
pub struct ConnectConfig {
    /// The local port; `None` takes the first ACTIVE one.
    pub port: Option<u8>,
    /// The entry of the local GID table, whatever the peer has; `None` takes [`Context::best_gid`], or the best
    /// of the other version of IP if the peer has only that.
    pub gid_index: Option<u8>,
    /// What the peer may do, as far as keys allow it.
    pub access: AccessFlags,
    /// Sizes of the queues.
    pub capabilities: QpCapabilities,
    /// The largest path MTU to use; `None` is the port's.
    pub path_mtu: Option<Mtu>,
    /// The starting sequence number; `None` takes a [random](Psn::random) one, as everybody should who
    /// does not test what happens at a certain number.
    pub psn: Option<Psn>,
    /// Most own READs and atomics outstanding; less if the peer answers fewer at once.
    pub max_rd_atomic: u8,
    /// Most READs and atomics of the peer answered at once; less if the device answers fewer.
    pub max_dest_rd_atomic: u8,
    /// See [`RtrAttr::min_rnr_timer`].
    pub min_rnr_timer: u8,
    /// See [`RtsAttr::timeout`].
    pub timeout: u8,
    /// See [`RtsAttr::retry_cnt`].
    pub retry_cnt: u8,
    /// See [`RtsAttr::rnr_retry`].
    pub rnr_retry: u8,
    /// See [`AddressVector::hop_limit`].
    pub hop_limit: u8,
    /// See [`AddressVector::traffic_class`].
    pub traffic_class: u8,
}

impl Default for ConnectConfig {
    /// No rights for the peer; a dead peer is noticed after about half a second (7 x 67 ms).
    fn default() -> ConnectConfig {
        ConnectConfig {
            port: None,
            gid_index: None,
            access: AccessFlags::empty(),
            capabilities: QpCapabilities::default(),
            path_mtu: None,
            psn: None,
            max_rd_atomic: 16,
            max_dest_rd_atomic: 16,
            min_rnr_timer: 12,
            timeout: 14,
            retry_cnt: 6,
            rnr_retry: 6,
            hop_limit: 64,
            traffic_class: 0,
        }
    }
}

/// A queue pair in INIT that knows everything but its peer.
#[derive(Debug)]
pub struct Prepared {
    qp: QueuePair<Init>,
    local: EndPoint,
    port: u8,
    gid: GidEntry,
    other_gid: Option<GidEntry>,
    link_layer: LinkLayer,
    config: ConnectConfig,
}

impl Prepared {
    /// Creates a queue pair, chooses port, GID and a random starting sequence number, and brings it to INIT.
    ///
    /// # Errors
    ///
    /// [`Error::NoActivePort`], [`Error::NoGid`], or as the steps of [`QueuePair`].
    pub fn create(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        config: &ConnectConfig,
    ) -> Result<Prepared> {
        Self::prepare(pd, config, || {
            QueuePair::create(pd, send_cq, recv_cq, &config.capabilities)
        })
    }

    /// As [`create`](Prepared::create), with receives from `srq`.
    ///
    /// # Errors
    ///
    /// As [`create`](Prepared::create) and [`QueuePair::create_with_srq`].
    pub fn create_with_srq(
        pd: &ProtectionDomain,
        send_cq: &CompletionQueue,
        recv_cq: &CompletionQueue,
        srq: &SharedReceiveQueue,
        config: &ConnectConfig,
    ) -> Result<Prepared> {
        Self::prepare(pd, config, || {
            QueuePair::create_with_srq(pd, send_cq, recv_cq, srq, &config.capabilities)
        })
    }

    fn prepare(
        pd: &ProtectionDomain,
        config: &ConnectConfig,
        create: impl FnOnce() -> Result<QueuePair<Reset>>,
    ) -> Result<Prepared> {
        let context = pd.context();
        let port = match config.port {
            Some(port) => context.port(port)?,
            None => context.active_port()?,
        };
        let (gid, other_gid) = choose_gids(&context, port.port_num, config.gid_index)?;
        let limits = context.attr()?;
        let qp = create()?;
        let init = InitAttr {
            port: port.port_num,
            pkey_index: 0,
            access: config.access,
        };
        let qp = qp.init(&init).map_err(Failed::into_error)?;
        let active_mtu = port.active_mtu.unwrap_or(Mtu::Mtu1024);
        let local = EndPoint {
            qpn: qp.qpn(),
            psn: config.psn.map_or_else(Psn::random, Ok)?,
            gid: gid.gid,
            lid: port.lid,
            mtu: config
                .path_mtu
                .map_or(active_mtu, |mtu| mtu.min(active_mtu)),
            max_dest_rd_atomic: config.max_dest_rd_atomic.min(limits.max_qp_rd_atom),
            other_gid: other_gid.as_ref().map(|entry| entry.gid),
        };
        let max_rd_atomic = config.max_rd_atomic.min(limits.max_qp_init_rd_atom);
        Ok(Prepared {
            qp,
            local,
            port: port.port_num,
            gid,
            other_gid,
            link_layer: port.link_layer,
            config: ConnectConfig {
                max_rd_atomic,
                ..config.clone()
            },
        })
    }

    /// What the peer must know.
    pub fn end_point(&self) -> EndPoint {
        self.local
    }

    /// The queue pair, to post receives before the peer can send.
    pub fn qp_mut(&mut self) -> &mut QueuePair<Init> {
        &mut self.qp
    }

    /// Connects to the peer's queue pair.
    ///
    /// The path MTU is the smaller of the two sides', and no more READs are sent at once than the peer
    /// answers.
    ///
    /// # Errors
    ///
    /// [`Error::EndPoint`] if the two cannot reach each other, or [`Error::Modify`]. The queue pair is
    /// destroyed then: prepare another.
    pub fn connect(self, remote: &EndPoint) -> Result<ReadyQp> {
        let config = &self.config;
        let rtr = RtrAttr {
            path: self.path_to(remote)?,
            path_mtu: self.local.mtu.min(remote.mtu),
            dest_qpn: remote.qpn,
            rq_psn: remote.psn,
            max_dest_rd_atomic: self.local.max_dest_rd_atomic,
            min_rnr_timer: config.min_rnr_timer,
        };
        let rts = RtsAttr {
            timeout: config.timeout,
            retry_cnt: config.retry_cnt,
            rnr_retry: config.rnr_retry,
            sq_psn: self.local.psn,
            max_rd_atomic: config.max_rd_atomic.min(remote.max_dest_rd_atomic),
        };
        let qp = self.qp.ready_to_receive(&rtr).map_err(Failed::into_error)?;
        qp.ready_to_send(&rts).map_err(Failed::into_error)
    }

    fn index_of(&self, gid: Gid) -> Result<u8> {
        let other = self.other_gid.as_ref().filter(|entry| entry.gid == gid);
        let index = other.unwrap_or(&self.gid).index;
        u8::try_from(index).map_err(|_| Error::Parameter {
            name: "gid_index",
            value: u64::from(index),
            reason: "address vectors hold 0 to 255",
        })
    }

    fn path_to(&self, remote: &EndPoint) -> Result<AddressVector> {
        // Within one InfiniBand subnet (equal GID prefixes) the local identifier is the address.
        let is_same_subnet = self.link_layer != LinkLayer::Ethernet
            && remote.lid != 0
            && remote.gid.0[..8] == self.local.gid.0[..8];
        if !is_same_subnet && remote.gid.is_zero() {
            return Err(invalid(
                "it has no GID, and its port is not in this InfiniBand subnet".to_owned(),
            ));
        }
        let (gid, dgid) = if is_same_subnet {
            (self.local.gid, remote.gid)
        } else {
            let gids = self.local.gid_towards(remote);
            gids.zip(remote.gid_towards(&self.local)).ok_or_else(|| {
                invalid(format!(
                    "its GID is {}, the local one {}, and no packet goes between IPv4 and IPv6: give both \
                     sides addresses of one kind",
                    remote.gid, self.local.gid
                ))
            })?
        };
        Ok(AddressVector {
            port: self.port,
            sgid_index: self.index_of(gid)?,
            dgid: (!is_same_subnet).then_some(dgid),
            dlid: remote.lid,
            sl: 0,
            hop_limit: self.config.hop_limit,
            traffic_class: self.config.traffic_class,
            flow_label: 0,
        })
    }
}

/// The GID to be known by, and one of the other version of IP if the choice is free.
fn choose_gids(
    context: &Context,
    port: u8,
    index: Option<u8>,
) -> Result<(GidEntry, Option<GidEntry>)> {
    let Some(index) = index else {
        return context.best_gids(port);
    };
    let gids = context.gids(port)?;
    let found = gids
        .iter()
        .find(|entry| entry.index == u32::from(index))
        .cloned();
    let found = found.ok_or_else(|| Error::NoGid {
        device: context.name().to_owned(),
        port,
        found: format!(
            "nothing at index {index}, but {}",
            crate::gid::describe(&gids)
        ),
    })?;
    Ok((found, None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V4: Gid = Gid([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 2]);
    const V6: Gid = Gid([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);

    fn end_point() -> EndPoint {
        EndPoint {
            qpn: Qpn::new(0x11).unwrap(),
            psn: Psn::new(0xff_fffe).unwrap(),
            gid: V4,
            lid: 7,
            mtu: Mtu::Mtu4096,
            max_dest_rd_atomic: 16,
            other_gid: Some(V6),
        }
    }

    /// A stream whose reads are prepared.
    struct Peer(std::io::Cursor<Vec<u8>>, Vec<u8>);

    impl Read for Peer {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            // One byte at a time, as a stream may.
            let len = out.len().min(1);
            self.0.read(&mut out[..len])
        }
    }

    impl Write for Peer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn layout() {
        let bytes = end_point().encode();
        assert_eq!(&bytes[..16], b"FLEP\x02\0\x34\0\x11\0\0\0\xfe\xff\xff\0");
        assert_eq!(&bytes[28..36], b"\x7f\0\0\x02\x07\0\x05\x10");
        assert_eq!(bytes[36..], V6.0);
    }

    #[test]
    fn version_1_has_one_gid() {
        let mut bytes = end_point().encode();
        (bytes[4], bytes[6]) = (1, 36);
        let expected = EndPoint {
            other_gid: None,
            ..end_point()
        };
        assert_eq!(EndPoint::decode(&bytes[..36]).unwrap(), expected);
        let none = EndPoint::decode(&expected.encode()).unwrap();
        assert_eq!(none.other_gid, None);
    }

    #[test]
    fn both_sides_take_gids_of_one_kind() {
        let choices = [(V4, None), (V6, None), (V4, Some(V6)), (V6, Some(V4))];
        let ends = choices.map(|(gid, other_gid)| EndPoint {
            gid,
            other_gid,
            ..end_point()
        });
        let chosen = ends.map(|a| ends.map(|b| a.gid_towards(&b)));
        let expected = [
            [Some(V4), None, Some(V4), Some(V4)],
            [None, Some(V6), Some(V6), Some(V6)],
            [Some(V4), Some(V6), Some(V4), Some(V4)],
            [Some(V4), Some(V6), Some(V4), Some(V6)],
        ];
        assert_eq!(chosen, expected);
    }

    #[test]
    fn exchange_in_pieces_and_with_fields_of_the_future() {
        let mut future = end_point().encode().to_vec();
        future.extend_from_slice(b"more");
        (future[4], future[6]) = (3, 56);
        for sent in [end_point().encode().to_vec(), future] {
            let mut peer = Peer(std::io::Cursor::new(sent), Vec::new());
            assert_eq!(exchange(&mut peer, &end_point()).unwrap(), end_point());
            assert_eq!(peer.1, end_point().encode());
        }
    }

    #[test]
    fn another_protocol_is_told_apart() {
        let mut peer = Peer(
            std::io::Cursor::new(b"HTTP/1.1 400 Bad Request".to_vec()),
            Vec::new(),
        );
        let error = exchange(&mut peer, &end_point()).unwrap_err();
        assert!(
            error.to_string().contains("is the other side farlog"),
            "{error}"
        );
        let mut ends = Peer(std::io::Cursor::new(b"FLEP".to_vec()), Vec::new());
        assert!(matches!(
            exchange(&mut ends, &end_point()),
            Err(Error::Exchange { .. })
        ));
    }

    #[test]
    fn values_out_of_range() {
        for (at, value) in [
            (8, 1),
            (11, 1),
            (15, 1),
            (34, 0),
            (34, 6),
            (0, b'f'),
            (4, 0),
            (6, 35),
            (7, 2),
        ] {
            let mut bytes = end_point().encode();
            bytes[at] = value;
            let is_refused = matches!(EndPoint::decode(&bytes), Err(Error::EndPoint { .. }));
            assert!(is_refused, "byte {at} = {value}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = EndPoint::decode(&bytes);
        }

        #[test]
        fn damaged_end_points_are_refused_or_round_trip(at in 0..END_POINT_LEN, value: u8) {
            let mut bytes = end_point().encode();
            bytes[at] = value;
            if let Ok(decoded) = EndPoint::decode(&bytes) {
                prop_assert_eq!(EndPoint::decode(&decoded.encode()).unwrap(), decoded);
            }
        }
    }
}
