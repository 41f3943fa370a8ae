//! Which GID to connect with.
//!
//! A RoCE port's table mixes RoCE v1 and v2, link-local and IP addresses, and interfaces (VLANs, bonds)
//! that may be down; index 0 is seldom the right one. The choice is by type and interface.
//!
//! A RoCE v2 packet goes by IPv4 or by IPv6, as its GIDs say, so both ends must have GIDs of one kind. A port
//! that has both kinds tells its peer the best of each: see [`connect`](crate::connect).

use std::fs;

use crate::attr::LinkLayer;
use crate::types::{Gid, GidType};

/// One filled entry of a port's GID table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GidEntry {
    /// Its place in the table.
    pub index: u32,
    /// The identifier.
    pub gid: Gid,
    /// What it is good for.
    pub gid_type: GidType,
    /// The network interface it belongs to, where there is one.
    pub netdev: Option<String>,
}

impl GidEntry {
    /// False if the interface is known and is down.
    pub fn is_up(&self) -> bool {
        self.netdev.as_deref().is_none_or(netdev_is_up)
    }
}

/// The best entry of a port's table; the first one among equals.
pub(crate) fn best(gids: &[GidEntry], link_layer: LinkLayer) -> Option<&GidEntry> {
    gids.iter()
        .rev()
        .filter_map(|entry| Some((rank(entry, link_layer)?, entry)))
        .max_by_key(|(rank, _)| *rank)
        .map(|(_, entry)| entry)
}

/// The best RoCE v2 entry of the other version of IP than `chosen`'s; not a link-local one, by which few
/// peers are reached.
pub(crate) fn other_than<'a>(
    chosen: &GidEntry,
    gids: &'a [GidEntry],
    link_layer: LinkLayer,
) -> Option<&'a GidEntry> {
    let is_other = |entry: &&GidEntry| {
        entry.gid_type == GidType::RoceV2
            && entry.gid.is_ipv4_mapped() != chosen.gid.is_ipv4_mapped()
            && !entry.gid.is_link_local()
            && rank(entry, link_layer).is_some()
    };
    gids.iter().find(is_other)
}

fn rank(entry: &GidEntry, link_layer: LinkLayer) -> Option<u8> {
    if entry.gid.is_zero() || !entry.is_up() {
        return None;
    }
    match (link_layer, entry.gid_type) {
        (LinkLayer::Ethernet, GidType::RoceV2) if entry.gid.is_ipv4_mapped() => Some(3),
        (LinkLayer::Ethernet, GidType::RoceV2) if !entry.gid.is_link_local() => Some(2),
        (LinkLayer::Ethernet, GidType::RoceV2) => Some(1),
        (LinkLayer::Ethernet, _) => None,
        _ => Some(1),
    }
}

pub(crate) fn describe(gids: &[GidEntry]) -> String {
    if gids.is_empty() {
        return "nothing".to_owned();
    }
    let entries = gids.iter().map(|entry| {
        let netdev = entry.netdev.as_deref().unwrap_or("no interface");
        let state = if entry.is_up() { "" } else { ", down" };
        format!(
            "[{}] {} ({}, {netdev}{state})",
            entry.index, entry.gid, entry.gid_type
        )
    });
    entries.collect::<Vec<_>>().join(", ")
}

/// The name of the interface with this index; 0 is none.
pub(crate) fn netdev_name(ifindex: u32) -> Option<String> {
    if ifindex == 0 {
        return None;
    }
    fs::read_dir("/sys/class/net")
        .ok()?
        .flatten()
        .find_map(|netdev| {
            let index = fs::read_to_string(netdev.path().join("ifindex")).ok()?;
            (index.trim().parse() == Ok(ifindex))
                .then(|| netdev.file_name().to_string_lossy().into_owned())
        })
}

fn netdev_is_up(netdev: &str) -> bool {
    const IFF_UP: u32 = 1;
    let flags = fs::read_to_string(format!("/sys/class/net/{netdev}/flags"));
    let flags = flags
        .ok()
        .and_then(|text| u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
    // An interface of another network namespace cannot be asked, and is not ruled out.
    flags.is_none_or(|flags| flags & IFF_UP != 0)
}

/// The entry as the kernel describes it in sysfs.
pub(crate) fn from_sysfs(device: &str, port: u8, index: u32, gid: Gid) -> GidEntry {
    let attrs = format!("/sys/class/infiniband/{device}/ports/{port}/gid_attrs");
    let read = |what: &str| fs::read_to_string(format!("{attrs}/{what}/{index}"));
    let gid_type = match read("types").as_deref().map(str::trim) {
        Ok("RoCE v2") => GidType::RoceV2,
        Ok("IB/RoCE v1") if read("ndevs").is_ok() => GidType::RoceV1,
        _ => GidType::Ib,
    };
    let netdev = read("ndevs").ok().map(|name| name.trim().to_owned());
    GidEntry {
        index,
        gid,
        gid_type,
        netdev,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, gid: &str, gid_type: GidType, netdev: Option<&str>) -> GidEntry {
        let gid = Gid(gid.parse::<std::net::Ipv6Addr>().unwrap().octets());
        GidEntry {
            index,
            gid,
            gid_type,
            netdev: netdev.map(str::to_owned),
        }
    }

    /// The order in which kernel rxe fills its table: link-local first.
    #[test]
    fn index_0_is_not_it() {
        let gids = [
            entry(0, "fe80::1", GidType::RoceV1, None),
            entry(1, "fe80::1", GidType::RoceV2, None),
            entry(2, "::ffff:10.0.0.1", GidType::RoceV1, None),
            entry(3, "fd00::1", GidType::RoceV2, None),
            entry(4, "::ffff:10.0.0.1", GidType::RoceV2, None),
            entry(5, "::ffff:10.0.0.2", GidType::RoceV2, None),
        ];
        for (without, chosen) in [(6, Some(4)), (4, Some(3)), (3, Some(1)), (1, None)] {
            let best = best(&gids[..without], LinkLayer::Ethernet);
            assert_eq!(best.map(|entry| entry.index), chosen);
        }
    }

    #[test]
    fn the_other_kind_is_not_link_local() {
        let gids = [
            entry(0, "fe80::1", GidType::RoceV2, None),
            entry(1, "fd00::1", GidType::RoceV1, None),
            entry(2, "fd00::1", GidType::RoceV2, None),
            entry(3, "::ffff:10.0.0.1", GidType::RoceV2, None),
        ];
        let other = |chosen: usize, until| {
            other_than(&gids[chosen], &gids[..until], LinkLayer::Ethernet).map(|entry| entry.index)
        };
        assert_eq!(
            [other(3, 4), other(2, 4), other(3, 2)],
            [Some(2), Some(3), None]
        );
    }

    #[test]
    fn infiniband_takes_its_first() {
        let gids = [
            entry(0, "fe80::1", GidType::Ib, None),
            entry(1, "fe80::2", GidType::Ib, None),
        ];
        assert_eq!(best(&gids, LinkLayer::InfiniBand).unwrap().index, 0);
    }

    #[test]
    fn interfaces_by_index() {
        assert_eq!(netdev_name(0), None);
        assert_eq!(netdev_name(u32::MAX), None);
        if std::path::Path::new("/sys/class/net/lo/ifindex").exists() {
            assert_eq!(netdev_name(1).as_deref(), Some("lo"));
        } else {
            eprintln!("skipped: no /sys/class/net/lo here");
        }
    }
}
