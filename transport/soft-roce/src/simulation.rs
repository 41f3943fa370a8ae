//! Whole devices in a simulation of somebody else's: feature `simulation`.
//!
//! A [`Device`] is the engine that [`SoftDevice`](crate::SoftDevice) drives, without its socket, thread and
//! clock. Whoever holds it is the network and the clock: packets that [`Device::take_sent`] returns are
//! delivered, late, twice or not at all, and [`Device::drive`] says what time it is. What a seed and the
//! same calls did once they do again.
//!
//! | in | out |
//! | --- | --- |
//! | `register`, `deregister`, `create_qp`, `connect`, `destroy_qp` | |
//! | `post`, `deliver`, then `drive` | `take_sent`, `completions`, `next_deadline` |
//! | `write` | `read`: the device's memory |

use std::fmt;
use std::net::IpAddr;
use std::ops::Range;

use crate::device::{CompletionQueue, Service};
use crate::link::Frame;
use crate::mr_table::{AccessFlags, Key, Pd};
use crate::qp::{Attr, Mtu, QpConfig};
use crate::rc::AckTime;
use crate::virtual_device::{CQE, RC_STEPS, REMOTE_RIGHTS, VirtualDevice};
use crate::wire::{Psn, Qpn};
use crate::work::{Data, SendFlags, SendOp, SendWr, Wc};

const PD: Pd = Pd(3);

/// A packet between two devices.
#[derive(Clone, Debug)]
pub struct Packet(Frame);

impl Packet {
    /// The device that has sent it.
    #[must_use]
    pub fn src(&self) -> IpAddr {
        self.0.src
    }

    /// The device that it is for.
    #[must_use]
    pub fn dst(&self) -> IpAddr {
        self.0.dst
    }

    /// The queue pair that it is for.
    #[must_use]
    pub fn dst_qpn(&self) -> Qpn {
        // Bytes 5 to 7 of the base transport header.
        let [high, middle, low] = [5, 6, 7].map(|i| self.0.udp_payload[i]);
        Qpn::new(u32::from_be_bytes([0, high, middle, low]))
    }
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// The device.
    pub address: IpAddr,
    /// The queue pair.
    pub qpn: Qpn,
    /// The numbers of the first packets that go there, and come from there.
    pub psns: [Psn; 2],
}

/// A device with a block of memory.
pub struct Device {
    inner: VirtualDevice,
    cq: std::sync::Arc<CompletionQueue>,
    local_key: Key,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory_len = self.inner.memory_len();
        f.debug_struct("Device")
            .field("memory_len", &memory_len)
            .finish_non_exhaustive()
    }
}

impl Device {
    /// A device with zeroed memory; `seed` decides its keys and queue pair numbers.
    #[must_use]
    pub fn new(address: IpAddr, seed: u64, memory_len: usize) -> Self {
        let mut inner = VirtualDevice::new(address, seed, memory_len, 0);
        let local_key = inner.register(0..memory_len, AccessFlags::LOCAL_WRITE, PD);
        let cq = inner.completion_queue(CQE);
        Self {
            inner,
            cq,
            local_key,
        }
    }

    /// Grants peers a range of the memory, which they know by an address that the caller chooses.
    pub fn register(&mut self, range: Range<usize>, addr: u64, access: AccessFlags) -> Key {
        self.inner.register_at(range, addr, access, PD)
    }

    /// Withdraws it: once this has returned, nothing is read or written by the key any more. A key that does
    /// not exist is none of anybody's.
    pub fn deregister(&mut self, key: Key) {
        let _ = self.inner.engine.regions.deregister(key);
    }

    /// A reliable queue pair in RESET, for at most so many requests.
    pub fn create_qp(&mut self, max_send_wr: usize) -> Qpn {
        let config = QpConfig {
            pd: PD,
            max_send_wr,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline: 0,
            sq_sig_all: false,
            window_max: 16,
            srq: None,
        };
        self.inner
            .create_qp(Service::Rc, config, &self.cq, &self.cq)
    }

    /// Takes a queue pair in RESET to RTS. `timeout` and `retry_cnt` are the verbs attributes.
    pub fn connect(&mut self, qpn: Qpn, peer: Peer, timeout: u8, retry_cnt: u8) {
        let [sq_psn, rq_psn] = peer.psns;
        let attr = Attr {
            access: REMOTE_RIGHTS,
            path_mtu: Mtu::Mtu1024,
            max_rd_atomic: 4,
            max_dest_rd_atomic: 4,
            timeout,
            retry_cnt,
            dest_qpn: peer.qpn,
            remote: peer.address,
            sq_psn,
            rq_psn,
            ..Attr::default()
        };
        self.inner.connect(qpn, &attr, &RC_STEPS);
    }

    /// Destroys a queue pair: once this has returned, nothing is placed by it any more.
    pub fn destroy_qp(&mut self, qpn: Qpn) {
        self.inner.engine.destroy_qp(qpn);
    }

    /// Posts a request, which reads or fills `local`; false if the queue is full or the queue pair gone.
    pub fn post(
        &mut self,
        qpn: Qpn,
        wr_id: u64,
        op: SendOp,
        local: Range<usize>,
        is_signaled: bool,
    ) -> bool {
        let sges = [self.inner.sge(local.start, local.len(), self.local_key)];
        let mut flags = SendFlags::empty();
        flags.set(SendFlags::SIGNALED, is_signaled);
        let wr = SendWr {
            wr_id,
            op,
            flags,
            data: Data::Gather(&sges),
        };
        self.inner.engine.post_send(qpn, &wr).is_ok()
    }

    /// Lets the device see a packet with the next drive.
    pub fn deliver(&mut self, packet: Packet) {
        self.inner.port.deliver(packet.0);
    }

    /// Does all that can be done at this moment.
    pub fn drive(&mut self, now: u64) {
        loop {
            let turn = self.inner.engine.drive(now, AckTime::Now);
            if turn.received == 0 && !turn.has_more {
                return;
            }
        }
    }

    /// When it must be driven again, whatever comes.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        self.inner.engine.next_deadline()
    }

    /// Takes what it has sent.
    pub fn take_sent(&mut self) -> Vec<Packet> {
        self.inner
            .port
            .take_sent()
            .into_iter()
            .map(Packet)
            .collect()
    }

    /// Takes the completions.
    pub fn completions(&mut self) -> Vec<Wc> {
        let mut completions = Vec::new();
        self.cq.pop(CQE, |_, wc| completions.push(*wc));
        completions
    }

    /// Bytes of the memory.
    #[must_use]
    pub fn read(&self, range: Range<usize>) -> Vec<u8> {
        self.inner.read(range)
    }

    /// Writes to the memory, as the node's own CPU does.
    pub fn write(&mut self, byte_offset: usize, bytes: &[u8]) {
        self.inner.write(byte_offset, bytes);
    }
}
