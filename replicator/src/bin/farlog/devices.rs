//! `farlog devices`: what `ibv_devinfo` would tell, and what to do about it.

use clap::Args;
use indicatif::HumanBytes;
use serde::Serialize;
use transport::{DeviceDetails, DeviceInfo, DeviceList, PortDetails};

use crate::error::CliError;

/// List the RDMA devices of this machine, with their ports, GIDs and limits
///
/// Shows real devices (InfiniBand, RoCE, iWARP), kernel soft-RoCE (rxe) and farlog's own software
/// device, says where libibverbs is absent, and what to do about a port that is not ACTIVE. The GID
/// that a connection would use is marked with an asterisk.
#[derive(Args)]
#[command(after_help = "\
Examples:
  farlog devices
  farlog devices --json | jq '.devices[].name'")]
pub(crate) struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &DevicesArgs) -> Result<(), CliError> {
    let report = Report::new(&transport::list());
    if args.json {
        let json = serde_json::to_string_pretty(&report)
            .map_err(|error| CliError::new("cannot write JSON", error))?;
        return crate::print(&format!("{json}\n"));
    }
    crate::print(&report.text())
}

#[derive(Serialize)]
struct Report {
    devices: Vec<Device>,
    /// Why there can be no real device.
    real_devices_error: Option<String>,
}

#[derive(Serialize)]
struct Device {
    name: String,
    error: Option<String>,
    limits: Option<Limits>,
    ports: Vec<Port>,
}

#[derive(Serialize)]
struct Limits {
    fw_ver: String,
    node_guid: String,
    vendor_id: u32,
    vendor_part_id: u32,
    max_mr: u32,
    max_mr_size: u64,
    max_qp: u32,
    max_qp_wr: u32,
    max_sge: u32,
    max_cq: u32,
    max_cqe: u32,
    max_pd: u32,
    max_qp_rd_atom: u8,
    max_qp_init_rd_atom: u8,
    atomics: bool,
    max_mw: u32,
}

#[derive(Serialize)]
struct Port {
    port: u8,
    state: String,
    link_layer: String,
    active_mtu: Option<usize>,
    max_mtu: Option<usize>,
    lid: u16,
    /// What to do about a port that is not ACTIVE.
    remedy: Option<&'static str>,
    gids: Vec<Gid>,
    /// Why no GID can be used.
    gid_error: Option<String>,
}

#[derive(Serialize)]
struct Gid {
    index: u32,
    gid: String,
    #[serde(rename = "type")]
    gid_type: String,
    netdev: Option<String>,
    up: bool,
    /// A connection would use this one.
    chosen: bool,
}

impl Report {
    fn new(list: &DeviceList) -> Self {
        let (real, error) = match &list.real {
            Ok(devices) => (devices.as_slice(), None),
            Err(error) => (&[][..], Some(error.to_string())),
        };
        let devices = real.iter().chain([&list.soft]).map(Device::new).collect();
        Self {
            devices,
            real_devices_error: error,
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        match &self.real_devices_error {
            Some(error) => text += &format!("no real RDMA devices: {error}\n\n"),
            None if self.devices.len() == 1 => {
                text += "no real RDMA devices: libibverbs is here and lists none (is the driver loaded?)\n\n";
            }
            None => {}
        }
        let devices: Vec<_> = self.devices.iter().map(Device::text).collect();
        text + &devices.join("\n")
    }
}

impl Device {
    fn new(info: &DeviceInfo) -> Self {
        let (error, details) = match &info.details {
            Ok(details) => (None, Some(details)),
            Err(error) => (Some(error.to_string()), None),
        };
        Self {
            name: info.name.clone(),
            error,
            limits: details.map(Limits::new),
            ports: details.map_or(Vec::new(), |details| {
                details.ports.iter().map(Port::new).collect()
            }),
        }
    }

    fn text(&self) -> String {
        let is_soft = self.name.starts_with("soft");
        let kind = if is_soft {
            "  (farlog's software device: RoCEv2 over UDP)"
        } else {
            ""
        };
        let mut text = format!("{}{kind}\n", self.name);
        if let Some(error) = &self.error {
            text += &format!("  cannot be used: {error}\n");
        }
        if let Some(limits) = &self.limits {
            text += &limits.text();
        }
        self.ports.iter().for_each(|port| text += &port.text());
        text
    }
}

impl Limits {
    fn new(details: &DeviceDetails) -> Self {
        let attr = &details.attr;
        Self {
            fw_ver: attr.fw_ver.clone(),
            node_guid: format!("{:016x}", attr.node_guid),
            vendor_id: attr.vendor_id,
            vendor_part_id: attr.vendor_part_id,
            max_mr: attr.max_mr,
            max_mr_size: attr.max_mr_size,
            max_qp: attr.max_qp,
            max_qp_wr: attr.max_qp_wr,
            max_sge: attr.max_sge,
            max_cq: attr.max_cq,
            max_cqe: attr.max_cqe,
            max_pd: attr.max_pd,
            max_qp_rd_atom: attr.max_qp_rd_atom,
            max_qp_init_rd_atom: attr.max_qp_init_rd_atom,
            atomics: attr.has_atomics,
            max_mw: attr.max_mw,
        }
    }

    fn text(&self) -> String {
        let atomics = if self.atomics { "yes" } else { "no" };
        let rows = [
            (
                "node guid",
                format!("{}, firmware {:?}", self.node_guid, self.fw_ver),
            ),
            (
                "memory",
                format!(
                    "{} registrations of up to {}",
                    self.max_mr,
                    HumanBytes(self.max_mr_size)
                ),
            ),
            (
                "queue pairs",
                format!(
                    "{} of {} requests, {} SGEs",
                    self.max_qp, self.max_qp_wr, self.max_sge
                ),
            ),
            (
                "completion queues",
                format!("{} of {} entries", self.max_cq, self.max_cqe),
            ),
            (
                "reads in flight",
                format!(
                    "{} answered, {} issued per queue pair",
                    self.max_qp_rd_atom, self.max_qp_init_rd_atom
                ),
            ),
            ("atomics, windows", format!("{atomics}, {}", self.max_mw)),
        ];
        rows.iter()
            .map(|(name, value)| format!("  {name:<18} {value}\n"))
            .collect()
    }
}

impl Port {
    fn new(port: &PortDetails) -> Self {
        let attr = &port.attr;
        let chosen = port.best_gid.as_ref().ok().map(|gid| gid.index);
        let gids = port.gids.iter().map(|entry| Gid {
            index: entry.index,
            gid: entry.gid.to_string(),
            gid_type: entry.gid_type.to_string(),
            netdev: entry.netdev.clone(),
            up: entry.is_up(),
            chosen: chosen == Some(entry.index),
        });
        Self {
            port: attr.port_num,
            state: attr.state.to_string(),
            link_layer: attr.link_layer.to_string(),
            active_mtu: attr.active_mtu.map(|mtu| mtu.bytes()),
            max_mtu: attr.max_mtu.map(|mtu| mtu.bytes()),
            lid: attr.lid,
            remedy: attr.remedy(),
            gids: gids.collect(),
            gid_error: port.best_gid.as_ref().err().map(ToString::to_string),
        }
    }

    fn text(&self) -> String {
        let mtu = |mtu: Option<usize>| mtu.map_or("unknown".to_owned(), |mtu| mtu.to_string());
        let mut text = format!(
            "  port {}             {}, {}, MTU {} of {}\n",
            self.port,
            self.state,
            self.link_layer,
            mtu(self.active_mtu),
            mtu(self.max_mtu)
        );
        if let Some(remedy) = self.remedy {
            text += &format!("    help: the port is {}: {remedy}\n", self.state);
        }
        for gid in &self.gids {
            let mark = if gid.chosen { "*" } else { " " };
            let netdev = gid
                .netdev
                .as_deref()
                .map(|netdev| format!(", {netdev}"))
                .unwrap_or_default();
            let down = if gid.up { "" } else { ", down" };
            text += &format!(
                "    {mark} GID {:<3} {} ({}{netdev}{down})\n",
                gid.index, gid.gid, gid.gid_type
            );
        }
        if let Some(error) = &self.gid_error {
            text += &format!("    help: {error}\n");
        }
        text
    }
}
