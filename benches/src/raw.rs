//! Raw verbs, as a C program would use them: the yardstick for the safe layer.
//!
//! # Safety
//!
//! Every pointer in a [`RawLoopback`] is to a live object of the software device's table. They are
//! never destroyed: a benchmark makes one, and ends with its process. The registered bytes are leaked
//! for the same reason, and no reference to them exists.
#![allow(unsafe_code, reason = "calls the verbs table")]

use std::ffi::CStr;
use std::mem;
use std::net::IpAddr;
use std::ptr;
use std::slice;
use std::sync::Arc;

use rdma_core_bindings::*;
use soft_roce::wire::to_ipv6;
use soft_roce::{SoftConfig, SoftDevice};

const CQE: i32 = 512;
const MAX_SEND_WR: u32 = 128;
const MAX_INLINE: u32 = 64;
/// Most requests of one doorbell.
pub const CHAIN_MAX: usize = 16;
/// Bytes that may be written.
const TARGET_LEN: usize = 4096;
/// 67 ms, as the safe layer's default.
const TIMEOUT: u8 = 14;
const RETRY_CNT: u8 = 6;

/// Two queue pairs of one software device, connected with each other.
#[derive(Debug)]
pub struct RawLoopback {
    _device: Arc<SoftDevice>,
    qp: *mut ibv_qp,
    cq: *mut ibv_cq,
    target: u64,
    rkey: u32,
}

impl RawLoopback {
    /// Starts a device and connects two queue pairs on it.
    ///
    /// # Panics
    ///
    /// If a verb fails: the yardstick is broken.
    pub fn open() -> RawLoopback {
        let device = SoftDevice::bind(SoftConfig::default()).expect("a free loopback address");
        let verbs = soft_roce::verbs();
        let context = open(verbs, &device.name());
        // SAFETY: an open context.
        let pd = unsafe { (verbs.alloc_pd)(context) };
        // SAFETY: as above, without a channel.
        let cq = unsafe { (verbs.create_cq)(context, CQE, ptr::null_mut(), ptr::null_mut(), 0) };
        let memory = Box::leak(vec![0u8; TARGET_LEN].into_boxed_slice()).as_mut_ptr();
        let access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
        // SAFETY: the bytes are leaked, and no reference to them is used again.
        let mr = unsafe { ibv_reg_mr(verbs, pd, memory.cast(), TARGET_LEN, access) };
        assert!(!pd.is_null() && !cq.is_null() && !mr.is_null());
        let (qp, peer) = (create_qp(verbs, pd, cq), create_qp(verbs, pd, cq));
        connect(verbs, qp, device.address(), qpn(peer));
        connect(verbs, peer, device.address(), qpn(qp));
        RawLoopback {
            _device: device,
            qp,
            cq,
            target: memory.expose_provenance() as u64,
            // SAFETY: checked not to be null; a public field, set at registration.
            rkey: unsafe { (*mr).rkey },
        }
    }

    /// Posts `count` inline WRITEs with one doorbell; the last is signalled.
    ///
    /// # Panics
    ///
    /// If they are more than [`CHAIN_MAX`], or refused.
    #[inline]
    pub fn post_writes(&mut self, bytes: &[u8], count: usize) {
        let mut sge = ibv_sge {
            addr: bytes.as_ptr().expose_provenance() as u64,
            length: u32::try_from(bytes.len()).expect("inline bytes are few"),
            lkey: 0,
        };
        // SAFETY: integers, pointers and unions of them: all zeroes are a value.
        let mut wrs: [ibv_send_wr; CHAIN_MAX] = unsafe { mem::zeroed() };
        let mut next = ptr::null_mut();
        for (index, wr) in wrs[..count].iter_mut().enumerate().rev() {
            wr.wr_id = index as u64;
            wr.next = next;
            wr.sg_list = &raw mut sge;
            wr.num_sge = 1;
            wr.opcode = IBV_WR_RDMA_WRITE;
            wr.send_flags = IBV_SEND_INLINE;
            if next.is_null() {
                wr.send_flags |= IBV_SEND_SIGNALED;
            }
            wr.wr.rdma.remote_addr = self.target;
            wr.wr.rdma.rkey = self.rkey;
            next = wr;
        }
        let mut bad_wr = ptr::null_mut();
        // SAFETY: a connected queue pair; requests, entry and bytes live through the call, which copies
        // them.
        let errno = unsafe { ibv_post_send(self.qp, next, &raw mut bad_wr) };
        assert_eq!(errno, 0, "ibv_post_send");
    }

    /// Polls until something completes.
    ///
    /// # Panics
    ///
    /// If it has failed.
    #[inline]
    pub fn wait(&mut self) {
        // SAFETY: integers and unions of them: all zeroes are a value.
        let mut wc: ibv_wc = unsafe { mem::zeroed() };
        // SAFETY: a live queue, and room for one entry.
        while unsafe { ibv_poll_cq(self.cq, 1, &raw mut wc) } == 0 {}
        assert_eq!(wc.status, IBV_WC_SUCCESS, "completion");
    }
}

fn open(verbs: &Verbs, name: &str) -> *mut ibv_context {
    let mut count = 0;
    // SAFETY: `count` is a place for the number of devices.
    let list = unsafe { (verbs.get_device_list)(&raw mut count) };
    let count = usize::try_from(count).expect("not negative");
    // SAFETY: the list has `count` entries until it is freed.
    let devices = unsafe { slice::from_raw_parts(list, count) };
    let found = devices.iter().copied().find(|&device| {
        // SAFETY: an entry of the list.
        let found = unsafe { (verbs.get_device_name)(device) };
        // SAFETY: names are terminated strings that live as long as the list.
        unsafe { CStr::from_ptr(found) }.to_bytes() == name.as_bytes()
    });
    // SAFETY: an entry of the list.
    let context = unsafe { (verbs.open_device)(found.expect("a live device is listed")) };
    // SAFETY: made above, and not used any more.
    unsafe { (verbs.free_device_list)(list) };
    assert!(!context.is_null(), "ibv_open_device");
    context
}

fn create_qp(verbs: &Verbs, pd: *mut ibv_pd, cq: *mut ibv_cq) -> *mut ibv_qp {
    let mut init = ibv_qp_init_attr {
        qp_context: ptr::null_mut(),
        send_cq: cq,
        recv_cq: cq,
        srq: ptr::null_mut(),
        cap: ibv_qp_cap {
            max_send_wr: MAX_SEND_WR,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: MAX_INLINE,
        },
        qp_type: IBV_QPT_RC,
        sq_sig_all: 0,
    };
    // SAFETY: a live domain and queue, and attributes that live through the call.
    let qp = unsafe { (verbs.create_qp)(pd, &raw mut init) };
    assert!(!qp.is_null(), "ibv_create_qp");
    qp
}

fn qpn(qp: *mut ibv_qp) -> u32 {
    // SAFETY: a live queue pair; a public field, set at creation.
    unsafe { (*qp).qp_num }
}

/// RESET to RTS, towards queue pair `dest_qpn` of the device at `address`.
fn connect(verbs: &Verbs, qp: *mut ibv_qp, address: IpAddr, dest_qpn: u32) {
    let modify = |change: &dyn Fn(&mut ibv_qp_attr), mask: u32| {
        // SAFETY: integers and unions of them: all zeroes are a value.
        let mut attr: ibv_qp_attr = unsafe { mem::zeroed() };
        change(&mut attr);
        let mask = (mask | IBV_QP_STATE).cast_signed();
        // SAFETY: a live queue pair, and attributes that live through the call.
        let errno = unsafe { (verbs.modify_qp)(qp, &raw mut attr, mask) };
        assert_eq!(errno, 0, "ibv_modify_qp to state {}", attr.qp_state);
    };
    modify(
        &|attr| {
            attr.qp_state = IBV_QPS_INIT;
            attr.port_num = 1;
            attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
        },
        IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
    );
    modify(
        &|attr| {
            attr.qp_state = IBV_QPS_RTR;
            attr.path_mtu = IBV_MTU_4096;
            attr.dest_qp_num = dest_qpn;
            attr.min_rnr_timer = 12;
            attr.ah_attr.port_num = 1;
            attr.ah_attr.is_global = 1;
            attr.ah_attr.grh.hop_limit = 64;
            attr.ah_attr.grh.dgid.raw = to_ipv6(address).octets();
        },
        IBV_QP_AV
            | IBV_QP_PATH_MTU
            | IBV_QP_DEST_QPN
            | IBV_QP_RQ_PSN
            | IBV_QP_MAX_DEST_RD_ATOMIC
            | IBV_QP_MIN_RNR_TIMER,
    );
    modify(
        &|attr| {
            attr.qp_state = IBV_QPS_RTS;
            attr.timeout = TIMEOUT;
            attr.retry_cnt = RETRY_CNT;
            attr.rnr_retry = RETRY_CNT;
        },
        IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_SQ_PSN
            | IBV_QP_MAX_QP_RD_ATOMIC,
    );
}
