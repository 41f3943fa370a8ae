//! The verbs as safe functions on objects that own themselves, and two connected ends made of them.
//!
//! # Safety
//!
//! An [`Owned`] is an object of the software device's table, live until it is destroyed, which needs it alone.
//! The device refuses to destroy what others are still made of, so a pointer inside an object is live with it.
//! Pointers in attributes and requests are NULL or lead to objects, and to pieces and further requests, that
//! the test keeps during the call; memory to be read or written by the device is registered or inline.
//! Memory of tests is touched through `soft_roce::copy`, as the device does.

use std::ffi::{CStr, c_int};
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::ops::Deref;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rdma_core_bindings::*;
use soft_roce::wire::to_ipv6;
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

fn errno_location() -> *mut c_int {
    // SAFETY: needs nothing.
    unsafe { libc::__errno_location() }
}

pub(crate) fn errno() -> c_int {
    // SAFETY: this thread's own.
    unsafe { errno_location().read() }
}

pub(crate) fn clear_errno() {
    // SAFETY: this thread's own.
    unsafe { errno_location().write(0) };
}

/// What destroys a `T` and returns 0, or fails and leaves it as it is.
type Destroy<T> = unsafe extern "C" fn(*mut T) -> c_int;

/// An object of the table, destroyed when dropped.
pub(crate) struct Owned<T> {
    object: *mut T,
    destroy: Destroy<T>,
}

pub(crate) type Context = Owned<ibv_context>;
pub(crate) type Pd = Owned<ibv_pd>;
pub(crate) type Channel = Owned<ibv_comp_channel>;
pub(crate) type Cq = Owned<ibv_cq>;
pub(crate) type Srq = Owned<ibv_srq>;
pub(crate) type Qp = Owned<ibv_qp>;
pub(crate) type Mr = Owned<ibv_mr>;
pub(crate) type Mw = Owned<ibv_mw>;
pub(crate) type Ah = Owned<ibv_ah>;

// SAFETY: what the man pages allow: any thread may call verbs on any object.
unsafe impl<T> Send for Owned<T> {}
// SAFETY: as above; destroying needs `&mut`.
unsafe impl<T> Sync for Owned<T> {}

impl<T> Owned<T> {
    /// What `make` returns, or the errno that it leaves if that is NULL.
    fn new(make: impl FnOnce() -> *mut T, destroy: Destroy<T>) -> Result<Self, c_int> {
        clear_errno();
        match make() {
            object if object.is_null() => Err(errno()),
            object => Ok(Self { object, destroy }),
        }
    }

    /// For attributes and requests; NULL once it is destroyed.
    pub(crate) fn ptr(&self) -> *mut T {
        self.object
    }

    /// Destroys it, unless that fails.
    pub(crate) fn destroy(&mut self) -> c_int {
        // SAFETY: live or NULL, and nobody else has it (module docs).
        let result = unsafe { (self.destroy)(self.object) };
        if result == 0 {
            self.object = ptr::null_mut();
        }
        result
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // If the test has failed, what it made stays: another thread may still use it.
        if !self.object.is_null() && !std::thread::panicking() {
            assert_eq!(self.destroy(), 0, "destroying");
        }
    }
}

/// The public fields. The device changes them in verbs only, during which tests hold none of them.
impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: live unless it is NULL (module docs).
        unsafe { self.object.as_ref() }.expect("not destroyed")
    }
}

/// Destroys an object of which this event was taken and not acknowledged.
pub(crate) fn expect_destruction_to_wait_for<T>(event: impl Sized, object: &mut Owned<T>) {
    let is_destroyed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(object.destroy(), 0);
            is_destroyed.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            !is_destroyed.load(Ordering::SeqCst),
            "its event is not acknowledged yet"
        );
        drop(event);
    });
}

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

/// The devices listed at one time; they are live as long as the list.
struct DeviceList(*mut *mut ibv_device);

impl DeviceList {
    fn new() -> Self {
        let mut count = 0;
        // SAFETY: a place for the count.
        let list = Self(unsafe { (verbs().get_device_list)(&raw mut count) });
        assert_eq!(list.devices().count(), usize::try_from(count).unwrap());
        list
    }

    fn devices(&self) -> impl Iterator<Item = *mut ibv_device> {
        // SAFETY: a list ends with NULL, at which the iterator ends.
        let devices = (0..).map(|index| unsafe { *self.0.wrapping_add(index) });
        devices.take_while(|device| !device.is_null())
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: made by the table and freed once.
        unsafe { (verbs().free_device_list)(self.0) };
    }
}

pub(crate) fn listed_names() -> Vec<String> {
    DeviceList::new().devices().map(name_of).collect()
}

/// Opens `device` through the device list.
pub(crate) fn open(device: &SoftDevice) -> Context {
    let list = DeviceList::new();
    let mut devices = list.devices();
    let wanted = devices.find(|listed| name_of(*listed) == device.name());
    let wanted = wanted.expect("the device is listed");
    // SAFETY: live as long as the list.
    let open = || unsafe { (verbs().open_device)(wanted) };
    Owned::new(open, verbs().close_device).unwrap()
}

/// The name of a device that a list or a context keeps alive.
pub(crate) fn name_of(device: *mut ibv_device) -> String {
    // SAFETY: live, as the caller knows.
    text(unsafe { (verbs().get_device_name)(device) }).to_owned()
}

/// A text of the table.
pub(crate) fn text<'a>(text: *const std::ffi::c_char) -> &'a str {
    assert!(!text.is_null());
    // SAFETY: a string that ends, and that lives as long as the device or for ever.
    unsafe { CStr::from_ptr(text) }.to_str().unwrap()
}

pub(crate) fn device_attr(context: &Context) -> ibv_device_attr {
    let mut attr = ibv_device_attr::default();
    // SAFETY: a live context and a place for the result.
    let result = unsafe { (verbs().query_device)(context.ptr(), &raw mut attr) };
    assert_eq!(result, 0);
    attr
}

pub(crate) fn port_attr(context: &Context, port: u8) -> Result<ibv_port_attr, c_int> {
    let mut attr = ibv_port_attr::default();
    // SAFETY: a live context and a place for the result.
    match unsafe { ibv_query_port(verbs(), context.ptr(), port, &raw mut attr) } {
        0 => Ok(attr),
        error => Err(error),
    }
}

pub(crate) fn alloc_pd(context: &Context) -> Pd {
    // SAFETY: a live context.
    let alloc = || unsafe { (verbs().alloc_pd)(context.ptr()) };
    Owned::new(alloc, verbs().dealloc_pd).unwrap()
}

/// Registers memory, which must outlive the region if there is any.
pub(crate) fn reg_mr(pd: &Pd, addr: *mut u8, len: usize, access: u32) -> Result<Mr, c_int> {
    // SAFETY: a live domain; the device itself checks what is there.
    let reg = || unsafe { ibv_reg_mr(verbs(), pd.ptr(), addr.cast(), len, access) };
    Owned::new(reg, verbs().dereg_mr)
}

/// The same under addresses from `iova`.
pub(crate) fn reg_mr_iova(
    pd: &Pd,
    addr: *mut u8,
    len: usize,
    iova: u64,
    access: u32,
) -> Result<Mr, c_int> {
    // SAFETY: as above.
    let reg = || unsafe { ibv_reg_mr_iova(verbs(), pd.ptr(), addr.cast(), len, iova, access) };
    Owned::new(reg, verbs().dereg_mr)
}

pub(crate) fn create_channel(context: &Context) -> Channel {
    // SAFETY: a live context.
    let create = || unsafe { (verbs().create_comp_channel)(context.ptr()) };
    Owned::new(create, verbs().destroy_comp_channel).unwrap()
}

pub(crate) fn create_cq(
    context: &Context,
    cqe: c_int,
    channel: Option<&Channel>,
    vector: c_int,
) -> Result<Cq, c_int> {
    let channel = channel.map_or(ptr::null_mut(), Owned::ptr);
    let create = verbs().create_cq;
    // SAFETY: a live context, and a live channel or none.
    let create = || unsafe { create(context.ptr(), cqe, ptr::null_mut(), channel, vector) };
    Owned::new(create, verbs().destroy_cq)
}

pub(crate) fn resize_cq(cq: &Cq, cqe: c_int) -> c_int {
    // SAFETY: a live queue.
    unsafe { (verbs().resize_cq)(cq.ptr(), cqe) }
}

pub(crate) fn create_srq(pd: &Pd, max_wr: u32, max_sge: u32) -> Result<Srq, c_int> {
    let mut init = ibv_srq_init_attr::default();
    (init.attr.max_wr, init.attr.max_sge) = (max_wr, max_sge);
    // SAFETY: a live domain and attributes.
    let create = || unsafe { (verbs().create_srq)(pd.ptr(), &raw mut init) };
    Owned::new(create, verbs().destroy_srq)
}

pub(crate) fn create_qp(pd: &Pd, init: &mut ibv_qp_init_attr) -> Result<Qp, c_int> {
    // SAFETY: a live domain, and attributes with live queues.
    let create = || unsafe { (verbs().create_qp)(pd.ptr(), init) };
    Owned::new(create, verbs().destroy_qp)
}

pub(crate) fn query_qp(qp: &Qp, mask: u32) -> (ibv_qp_attr, ibv_qp_init_attr) {
    let (mut attr, mut init) = Default::default();
    let mask = mask.cast_signed();
    // SAFETY: a live queue pair and places for the results.
    let result = unsafe { (verbs().query_qp)(qp.ptr(), &raw mut attr, mask, &raw mut init) };
    assert_eq!(result, 0);
    (attr, init)
}

/// The operations of a context that programs call inline.
fn ops(context: &Context) -> &verbs_context {
    // SAFETY: a live context.
    let extended = unsafe { verbs_get_ctx(context.ptr()) };
    // SAFETY: live as long as the context, which is extended.
    unsafe { &*extended }
}

/// An extended queue, which begins as a plain one does.
pub(crate) fn create_cq_ex(context: &Context, attr: &mut ibv_cq_init_attr_ex) -> Result<Cq, c_int> {
    let create = ops(context).create_cq_ex.expect("it is offered");
    // SAFETY: a live context and attributes.
    let create = || unsafe { create(context.ptr(), attr) }.cast();
    Owned::new(create, verbs().destroy_cq)
}

pub(crate) fn create_qp_ex(context: &Context, attr: &mut ibv_qp_init_attr_ex) -> Result<Qp, c_int> {
    let create = ops(context).create_qp_ex.expect("it is offered");
    // SAFETY: a live context and attributes with live objects.
    let create = || unsafe { create(context.ptr(), attr) };
    Owned::new(create, verbs().destroy_qp)
}

pub(crate) fn create_ah(pd: &Pd, mut attr: ibv_ah_attr) -> Result<Ah, c_int> {
    // SAFETY: a live domain and attributes.
    let create = || unsafe { (verbs().create_ah)(pd.ptr(), &raw mut attr) };
    Owned::new(create, verbs().destroy_ah)
}

pub(crate) fn create_ah_from_wc(pd: &Pd, mut wc: ibv_wc, mut grh: ibv_grh) -> Result<Ah, c_int> {
    let create = verbs().create_ah_from_wc;
    // SAFETY: a live domain, a completion and a header.
    let create = || unsafe { create(pd.ptr(), &raw mut wc, &raw mut grh, 1) };
    Owned::new(create, verbs().destroy_ah)
}

pub(crate) fn alloc_mw(pd: &Pd, mw_type: ibv_mw_type) -> Result<Mw, c_int> {
    unsafe extern "C" fn dealloc(mw: *mut ibv_mw) -> c_int {
        // SAFETY: the caller's window is live.
        unsafe { ibv_dealloc_mw(mw) }
    }
    // SAFETY: a live domain.
    Owned::new(|| unsafe { ibv_alloc_mw(pd.ptr(), mw_type) }, dealloc)
}

/// Posts a list of requests; the result, and the one that failed.
pub(crate) fn post_send(qp: &Qp, wr: *mut ibv_send_wr) -> (c_int, *mut ibv_send_wr) {
    let mut bad_wr = ptr::null_mut();
    // SAFETY: a live queue pair and requests that the test keeps (module docs).
    let result = unsafe { ibv_post_send(qp.ptr(), wr, &raw mut bad_wr) };
    (result, bad_wr)
}

/// A receive into pieces, which must outlive the posting.
pub(crate) fn recv_wr(wr_id: u64, sges: &mut [ibv_sge]) -> ibv_recv_wr {
    ibv_recv_wr {
        wr_id,
        next: ptr::null_mut(),
        sg_list: sges.as_mut_ptr(),
        num_sge: i32::try_from(sges.len()).unwrap(),
    }
}

pub(crate) fn post_recv(qp: &Qp, wr: *mut ibv_recv_wr) -> c_int {
    let mut bad_wr = ptr::null_mut();
    // SAFETY: a live queue pair and requests that the test keeps (module docs).
    unsafe { ibv_post_recv(qp.ptr(), wr, &raw mut bad_wr) }
}

/// Posts a list of requests; the result, and the one that failed.
pub(crate) fn post_srq_recv(srq: &Srq, wr: *mut ibv_recv_wr) -> (c_int, *mut ibv_recv_wr) {
    let mut bad_wr = ptr::null_mut();
    // SAFETY: a live queue and requests that the test keeps (module docs).
    let result = unsafe { ibv_post_srq_recv(srq.ptr(), wr, &raw mut bad_wr) };
    (result, bad_wr)
}

/// The immediate of a completion, in network order.
pub(crate) fn imm_data(wc: &ibv_wc) -> u32 {
    // SAFETY: either part of the union is an integer.
    unsafe { wc.__bindgen_anon_1.imm_data }
}

pub(crate) fn gid_bytes(gid: ibv_gid) -> [u8; 16] {
    // SAFETY: every GID is 16 bytes.
    unsafe { gid.raw }
}

/// An asynchronous event, acknowledged when dropped.
pub(crate) struct AsyncEvent(ibv_async_event);

impl AsyncEvent {
    /// Waits for the next one, or returns errno.
    pub(crate) fn wait(context: &Context) -> Result<Self, c_int> {
        let mut event = ibv_async_event::default();
        clear_errno();
        // SAFETY: a live context and a place for the event.
        match unsafe { (verbs().get_async_event)(context.ptr(), &raw mut event) } {
            0 => Ok(Self(event)),
            -1 => Err(errno()),
            other => panic!("get_async_event: {other}"),
        }
    }

    pub(crate) fn event_type(&self) -> ibv_event_type {
        self.0.event_type
    }

    /// Whether it is about this object.
    pub(crate) fn is_about<T>(&self, object: &Owned<T>) -> bool {
        // SAFETY: whichever object it is about, the union holds its address.
        ptr::addr_eq(unsafe { self.0.element.qp }, object.ptr())
    }
}

impl Drop for AsyncEvent {
    fn drop(&mut self) {
        // SAFETY: taken, and acknowledged once.
        unsafe { (verbs().ack_async_event)(&raw mut self.0) };
    }
}

/// An event of a completion channel, acknowledged when dropped.
pub(crate) struct CqEvent(*mut ibv_cq);

impl CqEvent {
    /// Waits for the next one, which must be of `cq`, or returns errno.
    pub(crate) fn wait(channel: &Channel, expected: &Cq) -> Result<Self, c_int> {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        clear_errno();
        let get = verbs().get_cq_event;
        // SAFETY: a live channel and places for the results.
        match unsafe { get(channel.ptr(), &raw mut cq, &raw mut context) } {
            0 => {
                assert_eq!((cq, context), (expected.ptr(), ptr::null_mut()));
                Ok(Self(cq))
            }
            -1 => Err(errno()),
            other => panic!("get_cq_event: {other}"),
        }
    }
}

impl Drop for CqEvent {
    fn drop(&mut self) {
        // SAFETY: its queue is live until it is acknowledged, which happens once.
        unsafe { (verbs().ack_cq_events)(self.0, 1) };
    }
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
