//! Two connected ends, made of the [objects](crate::objects) of the verbs.
//!
//! # Safety
//!
//! Memory of tests is touched through `soft_roce::copy`, as the device does, and outlives its regions.

use std::ffi::c_int;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdma_core_bindings::*;
use soft_roce::wire::to_ipv6;
use soft_roce::{SoftConfig, SoftDevice, copy};

pub(crate) use crate::objects::*;

pub(crate) const LOCAL: u32 = IBV_ACCESS_LOCAL_WRITE;
pub(crate) const ALL: u32 = IBV_ACCESS_LOCAL_WRITE
    | IBV_ACCESS_REMOTE_WRITE
    | IBV_ACCESS_REMOTE_READ
    | IBV_ACCESS_REMOTE_ATOMIC;
/// Longer than any answer on this machine takes, shorter than a person waits.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A new device on a free address.
pub(crate) fn device() -> Arc<SoftDevice> {
    SoftDevice::bind(SoftConfig::default()).expect("a free loopback address")
}

/// A new device on `::1` and a free port; `None`, with the reason printed, where there is no IPv6.
pub(crate) fn ipv6_device() -> Option<Arc<SoftDevice>> {
    let localhost = Ipv6Addr::LOCALHOST;
    let port = match UdpSocket::bind((localhost, 0)) {
        Ok(socket) => socket.local_addr().unwrap().port(),
        Err(error) => {
            eprintln!("skipped: this machine has no {localhost} ({error}); enable IPv6");
            return None;
        }
    };
    let config = SoftConfig {
        address: Some(localhost.into()),
        port: Some(port),
        ..SoftConfig::default()
    };
    Some(SoftDevice::bind(config).expect("the port is free"))
}

/// Bytes on the heap that never move, reached by address only.
pub(crate) struct Memory {
    start: *mut u64,
    words: usize,
}

// SAFETY: the bytes are its own, wherever it goes.
unsafe impl Send for Memory {}
// SAFETY: they are touched by shared copies and atomics only.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn new(len: usize) -> Self {
        let words = len.div_ceil(8);
        let start = Box::into_raw(vec![0u64; words].into_boxed_slice()).cast();
        Self { start, words }
    }

    pub(crate) fn addr(&self) -> *mut u8 {
        self.start.cast()
    }

    pub(crate) fn len(&self) -> usize {
        self.words * 8
    }

    pub(crate) fn write(&self, byte_offset: usize, bytes: &[u8]) {
        assert!(byte_offset + bytes.len() <= self.len());
        // SAFETY: inside, as just checked.
        unsafe { copy::write_shared(self.addr().wrapping_add(byte_offset), bytes) };
    }

    pub(crate) fn read(&self, byte_offset: usize, len: usize) -> Vec<u8> {
        assert!(byte_offset + len <= self.len());
        let mut bytes = vec![0; len];
        // SAFETY: inside, as just checked.
        unsafe { copy::read_shared(&mut bytes, self.addr().wrapping_add(byte_offset)) };
        bytes
    }

    pub(crate) fn load(&self, byte_offset: usize) -> u64 {
        // SAFETY: a word of the memory.
        unsafe { copy::load_u64(self.word(byte_offset), Ordering::Acquire) }
    }

    pub(crate) fn store(&self, byte_offset: usize, value: u64) {
        // SAFETY: a word of the memory.
        unsafe { copy::store_u64(self.word(byte_offset), value, Ordering::Release) };
    }

    fn word(&self, byte_offset: usize) -> *mut u8 {
        assert!(byte_offset.is_multiple_of(8) && byte_offset + 8 <= self.len());
        self.addr().wrapping_add(byte_offset)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // If the test has failed, the device may still write.
        if !std::thread::panicking() {
            let words = ptr::slice_from_raw_parts_mut(self.start, self.words);
            // SAFETY: the box that `new` made, of which no region is left.
            drop(unsafe { Box::from_raw(words) });
        }
    }
}

/// How to make an [`End`].
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) memory_len: usize,
    pub(crate) cqe: i32,
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) sq_sig_all: bool,
    pub(crate) mr_access: u32,
    pub(crate) qp_access: u32,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) with_channel: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_len: 1 << 20,
            cqe: 256,
            max_send_wr: 64,
            max_recv_wr: 64,
            sq_sig_all: false,
            mr_access: ALL,
            qp_access: ALL,
            timeout: 14,
            retry_cnt: 6,
            rnr_retry: 6,
            with_channel: false,
        }
    }
}

/// One end of a connection: a device with one of everything, children first.
pub(crate) struct End {
    pub(crate) qp: Qp,
    /// Where queue pairs made from now on take their receives from, if a test puts one here.
    pub(crate) srq: Option<Srq>,
    pub(crate) mr: Mr,
    pub(crate) cq: Cq,
    pub(crate) channel: Option<Channel>,
    pub(crate) pd: Pd,
    pub(crate) context: Context,
    pub(crate) device: Arc<SoftDevice>,
    pub(crate) memory: Memory,
    pub(crate) options: Options,
}

impl End {
    pub(crate) fn new(options: Options) -> Self {
        Self::on(device(), options)
    }

    pub(crate) fn on(device: Arc<SoftDevice>, options: Options) -> Self {
        let context = open(&device);
        let memory = Memory::new(options.memory_len);
        let pd = alloc_pd(&context);
        let channel = options.with_channel.then(|| create_channel(&context));
        let cq = create_cq(&context, options.cqe, channel.as_ref(), 0).unwrap();
        let mr = reg_mr(&pd, memory.addr(), memory.len(), options.mr_access).unwrap();
        let qp = create_qp(&pd, &mut init_attr(&options, &cq)).unwrap();
        Self {
            qp,
            srq: None,
            mr,
            cq,
            channel,
            pd,
            context,
            device,
            memory,
            options,
        }
    }

    /// Another queue pair on the same completion queue.
    pub(crate) fn create_qp(&self) -> Qp {
        create_qp(&self.pd, &mut self.init_attr()).unwrap()
    }

    pub(crate) fn init_attr(&self) -> ibv_qp_init_attr {
        ibv_qp_init_attr {
            srq: self.srq.as_ref().map_or(ptr::null_mut(), Owned::ptr),
            ..init_attr(&self.options, &self.cq)
        }
    }

    pub(crate) fn modify(&self, attr: &mut ibv_qp_attr, mask: u32) -> i32 {
        // SAFETY: a live queue pair and attributes.
        unsafe { (verbs().modify_qp)(self.qp.ptr(), attr, mask.cast_signed()) }
    }

    pub(crate) fn to_init(&self) {
        let mut attr = zeroed_attr();
        attr.qp_state = IBV_QPS_INIT;
        attr.port_num = 1;
        attr.qp_access_flags = self.options.qp_access;
        let mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
        assert_eq!(self.modify(&mut attr, mask), 0, "RESET to INIT");
    }

    pub(crate) fn to_rtr(&self, address: IpAddr, qpn: u32) {
        let mut attr = rtr_attr(address, qpn);
        assert_eq!(self.modify(&mut attr, RTR_MASK), 0, "INIT to RTR");
    }

    pub(crate) fn to_rts(&self) {
        let mut attr = zeroed_attr();
        attr.qp_state = IBV_QPS_RTS;
        attr.sq_psn = 0xff_fffe;
        attr.timeout = self.options.timeout;
        attr.retry_cnt = self.options.retry_cnt;
        attr.rnr_retry = self.options.rnr_retry;
        attr.max_rd_atomic = 8;
        let mask = IBV_QP_STATE
            | IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_SQ_PSN
            | IBV_QP_MAX_QP_RD_ATOMIC;
        assert_eq!(self.modify(&mut attr, mask), 0, "RTR to RTS");
    }

    /// Connects the queue pair to one at `address`.
    pub(crate) fn connect(&self, address: IpAddr, qpn: u32) {
        self.to_init();
        self.to_rtr(address, qpn);
        self.to_rts();
    }

    pub(crate) fn qpn(&self) -> u32 {
        self.qp.qp_num
    }

    pub(crate) fn state(&self) -> ibv_qp_state {
        query_qp(&self.qp, IBV_QP_STATE).0.qp_state
    }

    pub(crate) fn rkey(&self) -> u32 {
        self.mr.rkey
    }

    /// The address by which peers name a byte of the memory.
    pub(crate) fn at(&self, byte_offset: usize) -> u64 {
        self.memory.addr().addr() as u64 + byte_offset as u64
    }

    pub(crate) fn sge(&self, byte_offset: usize, len: usize) -> ibv_sge {
        ibv_sge {
            addr: self.at(byte_offset),
            length: u32::try_from(len).unwrap(),
            lkey: self.mr.lkey,
        }
    }

    pub(crate) fn post(&self, wr: &mut ibv_send_wr) -> i32 {
        post_send(&self.qp, wr).0
    }

    /// Posts a request with one piece of this end's memory.
    pub(crate) fn post_one(&self, mut wr: ibv_send_wr, byte_offset: usize, len: usize) -> i32 {
        let mut sge = self.sge(byte_offset, len);
        wr.sg_list = &raw mut sge;
        wr.num_sge = 1;
        self.post(&mut wr)
    }

    pub(crate) fn post_recv(&self, wr_id: u64, byte_offset: usize, len: usize) -> i32 {
        let mut sges = [self.sge(byte_offset, len)];
        post_recv(&self.qp, &mut recv_wr(wr_id, &mut sges))
    }

    /// Takes what completions there are now, one at most.
    pub(crate) fn poll(&self) -> Option<ibv_wc> {
        self.try_poll().expect("the queue can be used")
    }

    /// The same, or the result below 0.
    pub(crate) fn try_poll(&self) -> Result<Option<ibv_wc>, c_int> {
        let mut wc = ibv_wc::default();
        // SAFETY: a live queue and a place for one completion.
        match unsafe { ibv_poll_cq(self.cq.ptr(), 1, &raw mut wc) } {
            0 => Ok(None),
            1 => Ok(Some(wc)),
            error => Err(error),
        }
    }

    /// Polls until there is a completion.
    pub(crate) fn wait(&self) -> ibv_wc {
        let start = Instant::now();
        loop {
            if let Some(wc) = self.poll() {
                return wc;
            }
            assert!(start.elapsed() < PATIENCE, "no completion");
        }
    }

    /// Waits for a completion of `wr_id` with success.
    pub(crate) fn wait_ok(&self, wr_id: u64) -> ibv_wc {
        let wc = self.wait();
        assert_eq!((wc.wr_id, wc.status), (wr_id, IBV_WC_SUCCESS));
        wc
    }

    /// Waits for an asynchronous event, acknowledges it and returns its type.
    pub(crate) fn wait_event(&self) -> ibv_event_type {
        AsyncEvent::wait(&self.context).unwrap().event_type()
    }
}

fn init_attr(options: &Options, cq: &Cq) -> ibv_qp_init_attr {
    ibv_qp_init_attr {
        send_cq: cq.ptr(),
        recv_cq: cq.ptr(),
        cap: ibv_qp_cap {
            max_send_wr: options.max_send_wr,
            max_recv_wr: options.max_recv_wr,
            max_send_sge: 4,
            max_recv_sge: 4,
            max_inline_data: 256,
        },
        qp_type: IBV_QPT_RC,
        sq_sig_all: options.sq_sig_all.into(),
        ..Default::default()
    }
}

pub(crate) const RTR_MASK: u32 = IBV_QP_STATE
    | IBV_QP_AV
    | IBV_QP_PATH_MTU
    | IBV_QP_DEST_QPN
    | IBV_QP_RQ_PSN
    | IBV_QP_MAX_DEST_RD_ATOMIC
    | IBV_QP_MIN_RNR_TIMER;

pub(crate) fn rtr_attr(address: IpAddr, qpn: u32) -> ibv_qp_attr {
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_RTR;
    attr.path_mtu = IBV_MTU_4096;
    attr.dest_qp_num = qpn;
    attr.rq_psn = 0xff_fffe;
    attr.max_dest_rd_atomic = 8;
    attr.min_rnr_timer = 12;
    attr.ah_attr.is_global = 1;
    attr.ah_attr.port_num = 1;
    attr.ah_attr.grh.dgid.raw = to_ipv6(address).octets();
    attr
}

pub(crate) fn zeroed_attr() -> ibv_qp_attr {
    ibv_qp_attr::default()
}

/// Two connected ends on devices of their own.
pub(crate) fn pair(options: Options) -> (End, End) {
    connected(End::new(options), End::new(options))
}

pub(crate) fn connected(a: End, b: End) -> (End, End) {
    connect(&a, &b);
    (a, b)
}

/// Connects the queue pairs of two ends.
pub(crate) fn connect(a: &End, b: &End) {
    a.connect(b.device.address(), b.qpn());
    b.connect(a.device.address(), a.qpn());
}

/// A signalled request without data.
pub(crate) fn wr(wr_id: u64, opcode: ibv_wr_opcode) -> ibv_send_wr {
    ibv_send_wr {
        wr_id,
        opcode,
        send_flags: IBV_SEND_SIGNALED,
        ..Default::default()
    }
}

/// A signalled one-sided request on `byte_offset` of the peer's memory.
pub(crate) fn rdma(
    wr_id: u64,
    opcode: ibv_wr_opcode,
    peer: &End,
    byte_offset: usize,
) -> ibv_send_wr {
    let mut wr = wr(wr_id, opcode);
    wr.wr.rdma.remote_addr = peer.at(byte_offset);
    wr.wr.rdma.rkey = peer.rkey();
    wr
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i.wrapping_mul(31) ^ (i >> 8)).to_le_bytes()[0] ^ seed)
        .collect()
}
