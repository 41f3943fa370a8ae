//! Fills the table at link time from the `rdma-sys` crate.
//!
//! Only the exported functions come from there: its inline functions compare `abi_compat` with 32
//! bits, so its extended verbs never reach a provider. The inline functions of this crate serve
//! both backends. The four functions that `rdma-sys` lacks come from our own declarations. All
//! young symbols are linked, so the library must be of rdma-core 36 or later.
//!
//! # Safety
//!
//! A function of `rdma-sys` is the library's symbol of the same name; its types are others than
//! ours, but of the same layout, as the assertions below check. Each field of [`Verbs`] is held
//! against declarations generated from the headers (`functions.rs`).
#![allow(
    unsafe_code,
    reason = "function pointers between two descriptions of one ABI"
)]

use crate::functions::{
    _ibv_query_gid_ex, _ibv_query_gid_table, mbps_to_ibv_rate, mult_to_ibv_rate,
};
use crate::{LoadError, Verbs};

pub(crate) fn table() -> Result<Verbs, LoadError> {
    Ok(Verbs {
        get_device_list: typed(rdma_sys::ibv_get_device_list as *const ()),
        free_device_list: typed(rdma_sys::ibv_free_device_list as *const ()),
        get_device_name: typed(rdma_sys::ibv_get_device_name as *const ()),
        get_device_guid: typed(rdma_sys::ibv_get_device_guid as *const ()),
        open_device: typed(rdma_sys::ibv_open_device as *const ()),
        close_device: typed(rdma_sys::ibv_close_device as *const ()),
        get_async_event: typed(rdma_sys::ibv_get_async_event as *const ()),
        ack_async_event: typed(rdma_sys::ibv_ack_async_event as *const ()),
        query_device: typed(rdma_sys::ibv_query_device as *const ()),
        query_port: typed(rdma_sys::ibv_query_port as *const ()),
        query_gid: typed(rdma_sys::ibv_query_gid as *const ()),
        query_pkey: typed(rdma_sys::ibv_query_pkey as *const ()),
        resolve_eth_l2_from_gid: typed(rdma_sys::ibv_resolve_eth_l2_from_gid as *const ()),
        alloc_pd: typed(rdma_sys::ibv_alloc_pd as *const ()),
        dealloc_pd: typed(rdma_sys::ibv_dealloc_pd as *const ()),
        reg_mr: typed(rdma_sys::ibv_reg_mr as *const ()),
        rereg_mr: typed(rdma_sys::ibv_rereg_mr as *const ()),
        dereg_mr: typed(rdma_sys::ibv_dereg_mr as *const ()),
        create_comp_channel: typed(rdma_sys::ibv_create_comp_channel as *const ()),
        destroy_comp_channel: typed(rdma_sys::ibv_destroy_comp_channel as *const ()),
        create_cq: typed(rdma_sys::ibv_create_cq as *const ()),
        resize_cq: typed(rdma_sys::ibv_resize_cq as *const ()),
        destroy_cq: typed(rdma_sys::ibv_destroy_cq as *const ()),
        get_cq_event: typed(rdma_sys::ibv_get_cq_event as *const ()),
        ack_cq_events: typed(rdma_sys::ibv_ack_cq_events as *const ()),
        create_srq: typed(rdma_sys::ibv_create_srq as *const ()),
        modify_srq: typed(rdma_sys::ibv_modify_srq as *const ()),
        query_srq: typed(rdma_sys::ibv_query_srq as *const ()),
        destroy_srq: typed(rdma_sys::ibv_destroy_srq as *const ()),
        create_qp: typed(rdma_sys::ibv_create_qp as *const ()),
        modify_qp: typed(rdma_sys::ibv_modify_qp as *const ()),
        query_qp: typed(rdma_sys::ibv_query_qp as *const ()),
        destroy_qp: typed(rdma_sys::ibv_destroy_qp as *const ()),
        attach_mcast: typed(rdma_sys::ibv_attach_mcast as *const ()),
        detach_mcast: typed(rdma_sys::ibv_detach_mcast as *const ()),
        create_ah: typed(rdma_sys::ibv_create_ah as *const ()),
        init_ah_from_wc: typed(rdma_sys::ibv_init_ah_from_wc as *const ()),
        create_ah_from_wc: typed(rdma_sys::ibv_create_ah_from_wc as *const ()),
        destroy_ah: typed(rdma_sys::ibv_destroy_ah as *const ()),
        fork_init: typed(rdma_sys::ibv_fork_init as *const ()),
        node_type_str: typed(rdma_sys::ibv_node_type_str as *const ()),
        port_state_str: typed(rdma_sys::ibv_port_state_str as *const ()),
        event_type_str: typed(rdma_sys::ibv_event_type_str as *const ()),
        wc_status_str: typed(rdma_sys::ibv_wc_status_str as *const ()),
        rate_to_mult: typed(rdma_sys::ibv_rate_to_mult as *const ()),
        mult_to_ibv_rate,
        rate_to_mbps: typed(rdma_sys::ibv_rate_to_mbps as *const ()),
        mbps_to_ibv_rate,
        get_pkey_index: Some(typed(rdma_sys::ibv_get_pkey_index as *const ())),
        qp_to_qp_ex: Some(typed(rdma_sys::ibv_qp_to_qp_ex as *const ())),
        reg_mr_iova: Some(typed(rdma_sys::ibv_reg_mr_iova as *const ())),
        reg_mr_iova2: Some(typed(rdma_sys::ibv_reg_mr_iova2 as *const ())),
        get_device_index: Some(typed(rdma_sys::ibv_get_device_index as *const ())),
        set_ece: Some(typed(rdma_sys::ibv_set_ece as *const ())),
        query_ece: Some(typed(rdma_sys::ibv_query_ece as *const ())),
        import_device: Some(typed(rdma_sys::ibv_import_device as *const ())),
        import_pd: Some(typed(rdma_sys::ibv_import_pd as *const ())),
        unimport_pd: Some(typed(rdma_sys::ibv_unimport_pd as *const ())),
        import_mr: Some(typed(rdma_sys::ibv_import_mr as *const ())),
        unimport_mr: Some(typed(rdma_sys::ibv_unimport_mr as *const ())),
        query_gid_ex: Some(_ibv_query_gid_ex),
        query_gid_table: Some(_ibv_query_gid_table),
        reg_dmabuf_mr: Some(typed(rdma_sys::ibv_reg_dmabuf_mr as *const ())),
        import_dm: Some(typed(rdma_sys::ibv_import_dm as *const ())),
        unimport_dm: Some(typed(rdma_sys::ibv_unimport_dm as *const ())),
        is_fork_initialized: Some(typed(rdma_sys::ibv_is_fork_initialized as *const ())),
        query_qp_data_in_order: Some(typed(rdma_sys::ibv_query_qp_data_in_order as *const ())),
    })
}

/// Gives a function of `rdma-sys` the type of the field of the same name.
fn typed<F: Copy>(function: *const ()) -> F {
    const { assert!(size_of::<F>() == size_of::<*const ()>()) };
    // SAFETY: `F` is a function pointer type with the signature of that function (module docs).
    unsafe { core::mem::transmute_copy::<*const (), F>(&function) }
}

/// Asserts that both crates describe the same structs.
macro_rules! same_layout {
    ($($name:ident)*) => {$(
        const _: () = assert!(size_of::<rdma_sys::$name>() == size_of::<crate::$name>());
        const _: () = assert!(align_of::<rdma_sys::$name>() == align_of::<crate::$name>());
    )*};
}

same_layout! {
    ibv_device ibv_context ibv_context_ops ibv_device_attr ibv_gid ibv_gid_entry
    ibv_async_event ibv_pd ibv_mr ibv_mw ibv_comp_channel ibv_cq ibv_wc ibv_srq ibv_srq_attr
    ibv_srq_init_attr ibv_qp ibv_qp_attr ibv_qp_init_attr ibv_ah ibv_ah_attr ibv_grh ibv_sge
    ibv_send_wr ibv_recv_wr ibv_mw_bind ibv_dm ibv_ece
}

#[cfg(test)]
mod tests {
    use crate::Verbs;

    /// A name that does not belong to its field, here or in `dlopen.rs`, makes a difference.
    #[test]
    fn both_backends_fill_the_same_table() {
        let linked = super::table().expect("linking cannot fail at run time");
        let loaded = crate::dlopen::table().expect("the library this program is linked with");
        assert_eq!(addresses(linked), addresses(loaded));
    }

    fn addresses(verbs: Verbs) -> [*const (); size_of::<Verbs>() / size_of::<*const ()>()] {
        // SAFETY: a table holds function pointers alone, `None` being NULL.
        unsafe { core::mem::transmute(verbs) }
    }
}
