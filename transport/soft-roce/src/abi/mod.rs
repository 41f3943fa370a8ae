//! The verbs ABI of the software device.
//!
//! Thin functions around [`SoftDevice`](crate::SoftDevice): each checks what the application
//! passed, calls the device, and reports in the convention of its man page. A panic inside stops
//! the device and becomes `EIO`.
//!
//! # Safety
//!
//! The functions are called by programs that follow the man pages: pointers are NULL or live
//! objects of this table, a pointer to a result may be written, and an object is not used during
//! or after the call that destroys it. [`objects`] says how the objects live.
#![allow(unsafe_code, reason = "the C ABI is raw pointers")]

mod ah;
mod convention;
mod cq;
mod cq_ex;
mod devices;
mod events;
mod memory;
mod mw;
mod names;
mod objects;
mod post;
mod qp;
mod qp_ex;
mod query;
mod session;
mod srq;
mod unsupported;

use rdma_core_bindings::Verbs;

/// The verbs of the software devices of this process.
///
/// The device list shows those that live: made by [`SoftDevice::bind`](crate::SoftDevice::bind) and
/// not yet dropped. Objects of this table and of libibverbs' do not mix.
#[must_use]
pub fn verbs() -> &'static Verbs {
    &VERBS
}

static VERBS: Verbs = Verbs {
    get_device_list: devices::get_device_list,
    free_device_list: devices::free_device_list,
    get_device_name: devices::get_device_name,
    get_device_guid: devices::get_device_guid,
    open_device: devices::open_device,
    close_device: devices::close_device,
    get_async_event: events::get_async_event,
    ack_async_event: events::ack_async_event,
    query_device: query::query_device,
    query_port: query::query_port,
    query_gid: query::query_gid,
    query_pkey: query::query_pkey,
    resolve_eth_l2_from_gid: query::resolve_eth_l2_from_gid,
    alloc_pd: memory::alloc_pd,
    dealloc_pd: memory::dealloc_pd,
    reg_mr: memory::reg_mr,
    rereg_mr: memory::rereg_mr,
    dereg_mr: memory::dereg_mr,
    create_comp_channel: cq::create_comp_channel,
    destroy_comp_channel: cq::destroy_comp_channel,
    create_cq: cq::create_cq,
    resize_cq: cq::resize_cq,
    destroy_cq: cq::destroy_cq,
    get_cq_event: cq::get_cq_event,
    ack_cq_events: cq::ack_cq_events,
    create_srq: srq::create_srq,
    modify_srq: srq::modify_srq,
    query_srq: srq::query_srq,
    destroy_srq: srq::destroy_srq,
    create_qp: qp::create_qp,
    modify_qp: qp::modify_qp,
    query_qp: qp::query_qp,
    destroy_qp: qp::destroy_qp,
    attach_mcast: unsupported::attach_mcast,
    detach_mcast: unsupported::detach_mcast,
    create_ah: ah::create_ah,
    init_ah_from_wc: ah::init_ah_from_wc,
    create_ah_from_wc: ah::create_ah_from_wc,
    destroy_ah: ah::destroy_ah,
    fork_init: unsupported::fork_init,
    node_type_str: names::node_type_str,
    port_state_str: names::port_state_str,
    event_type_str: names::event_type_str,
    wc_status_str: names::wc_status_str,
    rate_to_mult: names::rate_to_mult,
    mult_to_ibv_rate: names::mult_to_ibv_rate,
    rate_to_mbps: names::rate_to_mbps,
    mbps_to_ibv_rate: names::mbps_to_ibv_rate,
    get_pkey_index: Some(query::get_pkey_index),
    qp_to_qp_ex: Some(qp_ex::qp_to_qp_ex),
    reg_mr_iova: Some(memory::reg_mr_iova),
    reg_mr_iova2: Some(memory::reg_mr_iova2),
    get_device_index: Some(devices::get_device_index),
    set_ece: Some(unsupported::set_ece),
    query_ece: Some(unsupported::query_ece),
    import_device: Some(unsupported::import_device),
    import_pd: Some(unsupported::import_pd),
    unimport_pd: Some(unsupported::unimport_pd),
    import_mr: Some(unsupported::import_mr),
    unimport_mr: Some(unsupported::unimport_mr),
    query_gid_ex: Some(query::query_gid_ex),
    query_gid_table: Some(query::query_gid_table),
    reg_dmabuf_mr: Some(unsupported::reg_dmabuf_mr),
    import_dm: Some(unsupported::import_dm),
    unimport_dm: Some(unsupported::unimport_dm),
    is_fork_initialized: Some(unsupported::is_fork_initialized),
    query_qp_data_in_order: Some(unsupported::query_qp_data_in_order),
};
