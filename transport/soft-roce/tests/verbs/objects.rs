//! The verbs as safe functions on objects that own themselves.
//!
//! # Safety
//!
//! An [`Owned`] is an object of the software device's table, live until it is destroyed, which needs it alone.
//! The device refuses to destroy what others are still made of, so a pointer inside an object is live with it.
//! Pointers in attributes and requests are NULL or lead to objects, and to pieces and further requests, that
//! the test keeps during the call; memory to be read or written by the device is registered or inline.

use std::ffi::{CStr, c_int};
use std::ops::Deref;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rdma_core_bindings::*;
use soft_roce::SoftDevice;

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
