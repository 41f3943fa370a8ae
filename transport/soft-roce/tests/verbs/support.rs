//! Two connected ends, and short ways to post and poll.
//!
//! # Safety
//!
//! Every pointer in an [`End`] is to a live object of the software device's table until the `End` is
//! dropped, which destroys them children first. Registered memory is touched through
//! `soft_roce::copy`, as the device does.

use std::mem;
use std::net::Ipv4Addr;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rdma_core_bindings::*;
use soft_roce::{SoftConfig, SoftDevice, copy};

pub(crate) const LOCAL: u32 = IBV_ACCESS_LOCAL_WRITE;
pub(crate) const ALL: u32 = IBV_ACCESS_LOCAL_WRITE
    | IBV_ACCESS_REMOTE_WRITE
    | IBV_ACCESS_REMOTE_READ
    | IBV_ACCESS_REMOTE_ATOMIC;
/// Longer than any answer on this machine takes, shorter than a person waits.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn verbs() -> &'static Verbs {
    soft_roce::verbs()
}

pub(crate) fn errno() -> i32 {
    unsafe { *libc::__errno_location() }
}

/// A new device on a free address.
pub(crate) fn device() -> Arc<SoftDevice> {
    SoftDevice::bind(SoftConfig::default()).expect("a free loopback address")
}

/// Opens `device` through the device list.
pub(crate) fn open(device: &SoftDevice) -> *mut ibv_context {
    unsafe {
        let mut count = 0;
        let list = (verbs().get_device_list)(&raw mut count);
        let devices = std::slice::from_raw_parts(list, usize::try_from(count).unwrap());
        let wanted = devices
            .iter()
            .copied()
            .find(|listed| name_of(*listed) == device.name());
        let context = (verbs().open_device)(wanted.expect("the device is listed"));
        (verbs().free_device_list)(list);
        assert!(!context.is_null());
        context
    }
}

pub(crate) fn name_of(device: *mut ibv_device) -> String {
    let name = unsafe { std::ffi::CStr::from_ptr((verbs().get_device_name)(device)) };
    name.to_str().unwrap().to_owned()
}

/// Bytes on the heap that never move, reached by address only.
pub(crate) struct Memory {
    start: *mut u64,
    words: usize,
}

unsafe impl Send for Memory {}
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
        unsafe { copy::write_shared(self.addr().add(byte_offset), bytes) };
    }

    pub(crate) fn read(&self, byte_offset: usize, len: usize) -> Vec<u8> {
        assert!(byte_offset + len <= self.len());
        let mut bytes = vec![0; len];
        unsafe { copy::read_shared(&mut bytes, self.addr().add(byte_offset)) };
        bytes
    }

    pub(crate) fn load(&self, byte_offset: usize) -> u64 {
        unsafe { copy::load_u64(self.addr().add(byte_offset), Ordering::Acquire) }
    }

    pub(crate) fn store(&self, byte_offset: usize, value: u64) {
        unsafe { copy::store_u64(self.addr().add(byte_offset), value, Ordering::Release) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let words = ptr::slice_from_raw_parts_mut(self.start, self.words);
        drop(unsafe { Box::from_raw(words) });
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

/// One end of a connection: a device with one of everything.
pub(crate) struct End {
    pub(crate) device: Arc<SoftDevice>,
    pub(crate) context: *mut ibv_context,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) channel: *mut ibv_comp_channel,
    pub(crate) cq: *mut ibv_cq,
    pub(crate) qp: *mut ibv_qp,
    pub(crate) mr: *mut ibv_mr,
    pub(crate) memory: Memory,
    pub(crate) options: Options,
}

// What the man pages allow: any thread may call verbs on any object.
unsafe impl Send for End {}
unsafe impl Sync for End {}

impl End {
    pub(crate) fn new(options: Options) -> Self {
        let device = device();
        let context = open(&device);
        let memory = Memory::new(options.memory_len);
        unsafe {
            let pd = (verbs().alloc_pd)(context);
            let channel = if options.with_channel {
                (verbs().create_comp_channel)(context)
            } else {
                ptr::null_mut()
            };
            let cq = (verbs().create_cq)(context, options.cqe, ptr::null_mut(), channel, 0);
            let addr = memory.addr().cast();
            let mr = ibv_reg_mr(verbs(), pd, addr, memory.len(), options.mr_access);
            assert!(!pd.is_null() && !cq.is_null() && !mr.is_null());
            let mut end = Self {
                device,
                context,
                pd,
                channel,
                cq,
                qp: ptr::null_mut(),
                mr,
                memory,
                options,
            };
            end.qp = end.create_qp();
            end
        }
    }

    /// Another queue pair on the same completion queue.
    pub(crate) fn create_qp(&self) -> *mut ibv_qp {
        let mut init = self.init_attr();
        let qp = unsafe { (verbs().create_qp)(self.pd, &raw mut init) };
        assert!(!qp.is_null(), "create_qp: errno {}", errno());
        qp
    }

    pub(crate) fn init_attr(&self) -> ibv_qp_init_attr {
        ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: self.cq,
            recv_cq: self.cq,
            srq: ptr::null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: self.options.max_send_wr,
                max_recv_wr: self.options.max_recv_wr,
                max_send_sge: 4,
                max_recv_sge: 4,
                max_inline_data: 256,
            },
            qp_type: IBV_QPT_RC,
            sq_sig_all: self.options.sq_sig_all.into(),
        }
    }

    pub(crate) fn modify(&self, attr: &mut ibv_qp_attr, mask: u32) -> i32 {
        unsafe { (verbs().modify_qp)(self.qp, attr, mask.cast_signed()) }
    }

    pub(crate) fn to_init(&self) {
        let mut attr = zeroed_attr();
        attr.qp_state = IBV_QPS_INIT;
        attr.port_num = 1;
        attr.qp_access_flags = self.options.qp_access;
        let mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
        assert_eq!(self.modify(&mut attr, mask), 0, "RESET to INIT");
    }

    pub(crate) fn to_rtr(&self, address: Ipv4Addr, qpn: u32) {
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
    pub(crate) fn connect(&self, address: Ipv4Addr, qpn: u32) {
        self.to_init();
        self.to_rtr(address, qpn);
        self.to_rts();
    }

    pub(crate) fn qpn(&self) -> u32 {
        unsafe { (*self.qp).qp_num }
    }

    pub(crate) fn state(&self) -> ibv_qp_state {
        let mut attr = zeroed_attr();
        let mut init = self.init_attr();
        let mask = IBV_QP_STATE.cast_signed();
        let result = unsafe { (verbs().query_qp)(self.qp, &raw mut attr, mask, &raw mut init) };
        assert_eq!(result, 0);
        attr.qp_state
    }

    pub(crate) fn rkey(&self) -> u32 {
        unsafe { (*self.mr).rkey }
    }

    /// The address by which peers name a byte of the memory.
    pub(crate) fn at(&self, byte_offset: usize) -> u64 {
        self.memory.addr().addr() as u64 + byte_offset as u64
    }

    pub(crate) fn sge(&self, byte_offset: usize, len: usize) -> ibv_sge {
        ibv_sge {
            addr: self.at(byte_offset),
            length: u32::try_from(len).unwrap(),
            lkey: unsafe { (*self.mr).lkey },
        }
    }

    pub(crate) fn post(&self, wr: &mut ibv_send_wr) -> i32 {
        let mut bad_wr = ptr::null_mut();
        unsafe { ibv_post_send(self.qp, wr, &raw mut bad_wr) }
    }

    /// Posts a request with one piece of this end's memory.
    pub(crate) fn post_one(&self, mut wr: ibv_send_wr, byte_offset: usize, len: usize) -> i32 {
        let mut sge = self.sge(byte_offset, len);
        wr.sg_list = &raw mut sge;
        wr.num_sge = 1;
        self.post(&mut wr)
    }

    pub(crate) fn post_recv(&self, wr_id: u64, byte_offset: usize, len: usize) -> i32 {
        let mut sge = self.sge(byte_offset, len);
        let mut wr = ibv_recv_wr {
            wr_id,
            next: ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: 1,
        };
        let mut bad_wr = ptr::null_mut();
        unsafe { ibv_post_recv(self.qp, &raw mut wr, &raw mut bad_wr) }
    }

    /// Takes what completions there are now, one at most.
    pub(crate) fn poll(&self) -> Option<ibv_wc> {
        let mut wc: ibv_wc = unsafe { mem::zeroed() };
        match unsafe { ibv_poll_cq(self.cq, 1, &raw mut wc) } {
            0 => None,
            1 => Some(wc),
            error => panic!("poll_cq: {error}"),
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
        let mut event: ibv_async_event = unsafe { mem::zeroed() };
        assert_eq!(
            unsafe { (verbs().get_async_event)(self.context, &raw mut event) },
            0
        );
        unsafe { (verbs().ack_async_event)(&raw mut event) };
        event.event_type
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Leave everything as it is: another thread of the test may still use it.
            mem::forget(mem::replace(&mut self.memory, Memory::new(0)));
            return;
        }
        unsafe {
            if !self.qp.is_null() {
                assert_eq!((verbs().destroy_qp)(self.qp), 0);
            }
            if !self.mr.is_null() {
                assert_eq!((verbs().dereg_mr)(self.mr), 0);
            }
            assert_eq!((verbs().destroy_cq)(self.cq), 0);
            if !self.channel.is_null() {
                assert_eq!((verbs().destroy_comp_channel)(self.channel), 0);
            }
            assert_eq!((verbs().dealloc_pd)(self.pd), 0);
            assert_eq!((verbs().close_device)(self.context), 0);
        }
    }
}

pub(crate) const RTR_MASK: u32 = IBV_QP_STATE
    | IBV_QP_AV
    | IBV_QP_PATH_MTU
    | IBV_QP_DEST_QPN
    | IBV_QP_RQ_PSN
    | IBV_QP_MAX_DEST_RD_ATOMIC
    | IBV_QP_MIN_RNR_TIMER;

pub(crate) fn rtr_attr(address: Ipv4Addr, qpn: u32) -> ibv_qp_attr {
    let mut attr = zeroed_attr();
    attr.qp_state = IBV_QPS_RTR;
    attr.path_mtu = IBV_MTU_4096;
    attr.dest_qp_num = qpn;
    attr.rq_psn = 0xff_fffe;
    attr.max_dest_rd_atomic = 8;
    attr.min_rnr_timer = 12;
    attr.ah_attr.is_global = 1;
    attr.ah_attr.port_num = 1;
    attr.ah_attr.grh.dgid.raw = address.to_ipv6_mapped().octets();
    attr
}

pub(crate) fn zeroed_attr() -> ibv_qp_attr {
    unsafe { mem::zeroed() }
}

/// Two connected ends on devices of their own.
pub(crate) fn pair(options: Options) -> (End, End) {
    let (a, b) = (End::new(options), End::new(options));
    a.connect(b.device.address(), b.qpn());
    b.connect(a.device.address(), a.qpn());
    (a, b)
}

/// A signalled request without data.
pub(crate) fn wr(wr_id: u64, opcode: ibv_wr_opcode) -> ibv_send_wr {
    let mut wr: ibv_send_wr = unsafe { mem::zeroed() };
    wr.wr_id = wr_id;
    wr.opcode = opcode;
    wr.send_flags = IBV_SEND_SIGNALED;
    wr
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
