//! The table of functions that libibverbs exports.
//!
//! A `Verbs` is filled by [`Verbs::load`] from the library, or by a software device with functions
//! of its own. Callers pass the objects of one table to no other table.

use crate::types::*;

/// The exported functions of libibverbs, with the signatures of C and the names without `ibv_`.
///
/// Each field tells how its function reports failure, as the man page of the same name does. All
/// of them dereference the pointers they are given: they must be live objects that came from this
/// same table. The functions are thread safe; an object must not be used while it is destroyed.
///
/// What `<infiniband/verbs.h>` defines as inline functions (posting, polling) is not exported by
/// the library and therefore not here: see [`ibv_post_send`](crate::ibv_post_send) and the other
/// functions of this crate.
#[derive(Clone, Copy)]
pub struct Verbs {
    // Devices.
    /// Lists the RDMA devices, NULL terminated.
    ///
    /// Returns NULL and sets errno on failure: ENOSYS where the kernel has no RDMA support.
    pub get_device_list:
        unsafe extern "C" fn(num_devices: *mut libc::c_int) -> *mut *mut ibv_device,
    /// Frees a list; devices not opened by then are gone.
    ///
    /// Must not be given NULL, which it dereferences.
    pub free_device_list: unsafe extern "C" fn(list: *mut *mut ibv_device),
    /// Names a device, such as `mlx5_0`; the string lives as long as the device.
    ///
    /// Returns NULL on failure.
    pub get_device_name: unsafe extern "C" fn(device: *mut ibv_device) -> *const libc::c_char,
    /// Tells the node GUID, in network byte order.
    ///
    /// Returns 0 on failure.
    pub get_device_guid: unsafe extern "C" fn(device: *mut ibv_device) -> __be64,
    /// Opens a device.
    ///
    /// Returns NULL on failure; errno is not always set.
    pub open_device: unsafe extern "C" fn(device: *mut ibv_device) -> *mut ibv_context,
    /// Closes a device; objects made from it must be destroyed first.
    ///
    /// Returns 0, or -1 on failure.
    pub close_device: unsafe extern "C" fn(context: *mut ibv_context) -> libc::c_int,
    /// Waits for the next asynchronous event, unless `async_fd` is non-blocking.
    ///
    /// Returns 0, or -1 with errno set.
    pub get_async_event:
        unsafe extern "C" fn(context: *mut ibv_context, event: *mut ibv_async_event) -> libc::c_int,
    /// Acknowledges an event; destroying the object it names waits for that.
    pub ack_async_event: unsafe extern "C" fn(event: *mut ibv_async_event),
    /// Reads the device attributes.
    ///
    /// Returns 0 or the errno value.
    pub query_device: unsafe extern "C" fn(
        context: *mut ibv_context,
        device_attr: *mut ibv_device_attr,
    ) -> libc::c_int,
    /// Fills the part of the port attributes that every version knows:
    /// [`ibv_query_port`](crate::ibv_query_port) is the whole verb.
    ///
    /// Returns 0 or the errno value.
    pub query_port: unsafe extern "C" fn(
        context: *mut ibv_context,
        port_num: u8,
        port_attr: *mut _compat_ibv_port_attr,
    ) -> libc::c_int,
    /// Reads one GID.
    ///
    /// Returns 0, or -1 with errno set.
    pub query_gid: unsafe extern "C" fn(
        context: *mut ibv_context,
        port_num: u8,
        index: libc::c_int,
        gid: *mut ibv_gid,
    ) -> libc::c_int,
    /// Reads one partition key, in network byte order.
    ///
    /// Returns 0, or -1 with errno set.
    pub query_pkey: unsafe extern "C" fn(
        context: *mut ibv_context,
        port_num: u8,
        index: libc::c_int,
        pkey: *mut __be16,
    ) -> libc::c_int,
    /// Resolves the Ethernet address and VLAN of an address handle's GID. `eth_mac` holds 6 bytes.
    ///
    /// Returns 0, or another value on failure.
    pub resolve_eth_l2_from_gid: unsafe extern "C" fn(
        context: *mut ibv_context,
        attr: *mut ibv_ah_attr,
        eth_mac: *mut u8,
        vid: *mut u16,
    ) -> libc::c_int,

    // Protection domains and memory.
    /// Allocates a protection domain.
    ///
    /// Returns NULL and sets errno on failure.
    pub alloc_pd: unsafe extern "C" fn(context: *mut ibv_context) -> *mut ibv_pd,
    /// Frees a protection domain.
    ///
    /// Returns 0 or the errno value: EBUSY while something belongs to it.
    pub dealloc_pd: unsafe extern "C" fn(pd: *mut ibv_pd) -> libc::c_int,
    /// Registers memory: [`ibv_reg_mr`](crate::ibv_reg_mr) is the whole verb.
    ///
    /// Returns NULL and sets errno on failure.
    pub reg_mr: unsafe extern "C" fn(
        pd: *mut ibv_pd,
        addr: *mut libc::c_void,
        length: usize,
        access: libc::c_int,
    ) -> *mut ibv_mr,
    /// Changes a registration.
    ///
    /// Returns 0, or a negative `IBV_REREG_MR_ERR_*` that tells which registration is still valid,
    /// with errno set.
    pub rereg_mr: unsafe extern "C" fn(
        mr: *mut ibv_mr,
        flags: libc::c_int,
        pd: *mut ibv_pd,
        addr: *mut libc::c_void,
        length: usize,
        access: libc::c_int,
    ) -> libc::c_int,
    /// Ends a registration: once it returned 0 the device no longer touches the memory.
    ///
    /// Returns 0 or the errno value: EBUSY while a window is bound to it.
    pub dereg_mr: unsafe extern "C" fn(mr: *mut ibv_mr) -> libc::c_int,

    // Completion queues.
    /// Creates a completion channel.
    ///
    /// Returns NULL and sets errno on failure.
    pub create_comp_channel:
        unsafe extern "C" fn(context: *mut ibv_context) -> *mut ibv_comp_channel,
    /// Destroys a completion channel.
    ///
    /// Returns 0 or the errno value: EBUSY while a completion queue uses it.
    pub destroy_comp_channel: unsafe extern "C" fn(channel: *mut ibv_comp_channel) -> libc::c_int,
    /// Creates a completion queue of at least `cqe` entries.
    ///
    /// Returns NULL and sets errno on failure.
    pub create_cq: unsafe extern "C" fn(
        context: *mut ibv_context,
        cqe: libc::c_int,
        cq_context: *mut libc::c_void,
        channel: *mut ibv_comp_channel,
        comp_vector: libc::c_int,
    ) -> *mut ibv_cq,
    /// Changes the size of a completion queue.
    ///
    /// Returns 0 or the errno value.
    pub resize_cq: unsafe extern "C" fn(cq: *mut ibv_cq, cqe: libc::c_int) -> libc::c_int,
    /// Destroys a completion queue; waits until its events are acknowledged.
    ///
    /// Returns 0 or the errno value: EBUSY while a queue pair uses it.
    pub destroy_cq: unsafe extern "C" fn(cq: *mut ibv_cq) -> libc::c_int,
    /// Waits for the next completion event, unless the channel's `fd` is non-blocking.
    ///
    /// Returns 0, or -1 with errno set.
    pub get_cq_event: unsafe extern "C" fn(
        channel: *mut ibv_comp_channel,
        cq: *mut *mut ibv_cq,
        cq_context: *mut *mut libc::c_void,
    ) -> libc::c_int,
    /// Acknowledges `nevents` completion events.
    pub ack_cq_events: unsafe extern "C" fn(cq: *mut ibv_cq, nevents: libc::c_uint),

    // Shared receive queues.
    /// Creates a shared receive queue.
    ///
    /// Returns NULL and sets errno on failure.
    pub create_srq: unsafe extern "C" fn(
        pd: *mut ibv_pd,
        srq_init_attr: *mut ibv_srq_init_attr,
    ) -> *mut ibv_srq,
    /// Changes its size or arms its limit event.
    ///
    /// Returns 0 or the errno value.
    pub modify_srq: unsafe extern "C" fn(
        srq: *mut ibv_srq,
        srq_attr: *mut ibv_srq_attr,
        srq_attr_mask: libc::c_int,
    ) -> libc::c_int,
    /// Reads its attributes.
    ///
    /// Returns 0 or the errno value.
    pub query_srq:
        unsafe extern "C" fn(srq: *mut ibv_srq, srq_attr: *mut ibv_srq_attr) -> libc::c_int,
    /// Destroys a shared receive queue.
    ///
    /// Returns 0 or the errno value: EBUSY while a queue pair uses it.
    pub destroy_srq: unsafe extern "C" fn(srq: *mut ibv_srq) -> libc::c_int,

    // Queue pairs.
    /// Creates a queue pair in RESET; writes the granted capacities back into the attributes.
    ///
    /// Returns NULL and sets errno on failure.
    pub create_qp:
        unsafe extern "C" fn(pd: *mut ibv_pd, qp_init_attr: *mut ibv_qp_init_attr) -> *mut ibv_qp,
    /// Changes attributes and state; on failure nothing has changed.
    ///
    /// Returns 0 or the errno value.
    pub modify_qp: unsafe extern "C" fn(
        qp: *mut ibv_qp,
        attr: *mut ibv_qp_attr,
        attr_mask: libc::c_int,
    ) -> libc::c_int,
    /// Reads the attributes of the mask, and perhaps more.
    ///
    /// Returns 0 or the errno value.
    pub query_qp: unsafe extern "C" fn(
        qp: *mut ibv_qp,
        attr: *mut ibv_qp_attr,
        attr_mask: libc::c_int,
        init_attr: *mut ibv_qp_init_attr,
    ) -> libc::c_int,
    /// Destroys a queue pair: once it returned 0 the device no longer touches what its requests
    /// point to.
    ///
    /// Returns 0 or the errno value: EBUSY while it is attached to a multicast group.
    pub destroy_qp: unsafe extern "C" fn(qp: *mut ibv_qp) -> libc::c_int,
    /// Joins a UD queue pair to a multicast group.
    ///
    /// Returns 0 or the errno value.
    pub attach_mcast:
        unsafe extern "C" fn(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> libc::c_int,
    /// Removes a UD queue pair from a multicast group.
    ///
    /// Returns 0 or the errno value.
    pub detach_mcast:
        unsafe extern "C" fn(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> libc::c_int,

    // Address handles.
    /// Creates an address handle.
    ///
    /// Returns NULL and sets errno on failure.
    pub create_ah: unsafe extern "C" fn(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah,
    /// Fills address attributes for an answer to a received datagram.
    ///
    /// Returns 0, or -1 with errno set.
    pub init_ah_from_wc: unsafe extern "C" fn(
        context: *mut ibv_context,
        port_num: u8,
        wc: *mut ibv_wc,
        grh: *mut ibv_grh,
        ah_attr: *mut ibv_ah_attr,
    ) -> libc::c_int,
    /// Creates an address handle for an answer to a received datagram.
    ///
    /// Returns NULL and sets errno on failure.
    pub create_ah_from_wc: unsafe extern "C" fn(
        pd: *mut ibv_pd,
        wc: *mut ibv_wc,
        grh: *mut ibv_grh,
        port_num: u8,
    ) -> *mut ibv_ah,
    /// Destroys an address handle.
    ///
    /// Returns 0 or the errno value.
    pub destroy_ah: unsafe extern "C" fn(ah: *mut ibv_ah) -> libc::c_int,

    // Process, names and rates.
    /// Makes registered memory safe across `fork`.
    ///
    /// Returns 0 or the errno value: EINVAL when called too late.
    pub fork_init: unsafe extern "C" fn() -> libc::c_int,
    /// Names a node type.
    ///
    /// Never NULL; the string is static.
    pub node_type_str: unsafe extern "C" fn(node_type: ibv_node_type) -> *const libc::c_char,
    /// Names a port state.
    ///
    /// Never NULL; the string is static.
    pub port_state_str: unsafe extern "C" fn(port_state: ibv_port_state) -> *const libc::c_char,
    /// Names an asynchronous event.
    ///
    /// Never NULL; the string is static.
    pub event_type_str: unsafe extern "C" fn(event: ibv_event_type) -> *const libc::c_char,
    /// Names a completion status.
    ///
    /// Never NULL; the string is static.
    pub wc_status_str: unsafe extern "C" fn(status: ibv_wc_status) -> *const libc::c_char,
    /// Converts a rate to a multiple of 2.5 Gbit/s.
    ///
    /// Returns -1 for a rate it does not know.
    pub rate_to_mult: unsafe extern "C" fn(rate: ibv_rate) -> libc::c_int,
    /// Converts a multiple of 2.5 Gbit/s to a rate.
    ///
    /// Returns `IBV_RATE_MAX` for one it does not know.
    pub mult_to_ibv_rate: unsafe extern "C" fn(mult: libc::c_int) -> ibv_rate,
    /// Converts a rate to Mbit/s.
    ///
    /// Returns -1 for a rate it does not know.
    pub rate_to_mbps: unsafe extern "C" fn(rate: ibv_rate) -> libc::c_int,
    /// Converts Mbit/s to a rate.
    ///
    /// Returns `IBV_RATE_MAX` for one it does not know.
    pub mbps_to_ibv_rate: unsafe extern "C" fn(mbps: libc::c_int) -> ibv_rate,

    // Young symbols: `None` where the library is older than the version named.
    /// Finds the index of a partition key, given in network byte order.
    ///
    /// Returns the index, or -1 on failure. Since rdma-core 20.
    pub get_pkey_index: Option<
        unsafe extern "C" fn(context: *mut ibv_context, port_num: u8, pkey: __be16) -> libc::c_int,
    >,
    /// Gives the extended view of a queue pair that was created with `send_ops_flags`.
    ///
    /// Returns NULL for another queue pair. Since rdma-core 24.
    pub qp_to_qp_ex: Option<unsafe extern "C" fn(qp: *mut ibv_qp) -> *mut ibv_qp_ex>,
    /// Registers memory at a chosen address: [`ibv_reg_mr_iova`](crate::ibv_reg_mr_iova) is the
    /// whole verb.
    ///
    /// Returns NULL and sets errno on failure. Since rdma-core 25.
    pub reg_mr_iova: Option<
        unsafe extern "C" fn(
            pd: *mut ibv_pd,
            addr: *mut libc::c_void,
            length: usize,
            iova: u64,
            access: libc::c_int,
        ) -> *mut ibv_mr,
    >,
    /// Registers memory; flags of [`IBV_ACCESS_OPTIONAL_RANGE`](crate::IBV_ACCESS_OPTIONAL_RANGE)
    /// that the kernel does not know are left out.
    ///
    /// Returns NULL and sets errno on failure. Since rdma-core 28.
    pub reg_mr_iova2: Option<
        unsafe extern "C" fn(
            pd: *mut ibv_pd,
            addr: *mut libc::c_void,
            length: usize,
            iova: u64,
            access: libc::c_uint,
        ) -> *mut ibv_mr,
    >,
    /// Tells the kernel's index of the device.
    ///
    /// Returns -1 where the kernel cannot tell. Since rdma-core 30.
    pub get_device_index: Option<unsafe extern "C" fn(device: *mut ibv_device) -> libc::c_int>,
    /// Sets the enhanced connection establishment options of a queue pair.
    ///
    /// Returns 0 or the errno value. Since rdma-core 31.
    pub set_ece: Option<unsafe extern "C" fn(qp: *mut ibv_qp, ece: *mut ibv_ece) -> libc::c_int>,
    /// Reads the enhanced connection establishment options.
    ///
    /// Returns 0 or the errno value. Since rdma-core 31.
    pub query_ece: Option<unsafe extern "C" fn(qp: *mut ibv_qp, ece: *mut ibv_ece) -> libc::c_int>,
    /// Opens a device by a command descriptor that another process shared.
    ///
    /// Returns NULL and sets errno on failure. Since rdma-core 31.
    pub import_device: Option<unsafe extern "C" fn(cmd_fd: libc::c_int) -> *mut ibv_context>,
    /// Imports a protection domain of the same device.
    ///
    /// Returns NULL and sets errno on failure. Since rdma-core 31.
    pub import_pd:
        Option<unsafe extern "C" fn(context: *mut ibv_context, pd_handle: u32) -> *mut ibv_pd>,
    /// Forgets an imported protection domain.
    /// Since rdma-core 31.
    pub unimport_pd: Option<unsafe extern "C" fn(pd: *mut ibv_pd)>,
    /// Imports a memory region.
    ///
    /// Returns NULL and sets errno on failure. Since rdma-core 31.
    pub import_mr: Option<unsafe extern "C" fn(pd: *mut ibv_pd, mr_handle: u32) -> *mut ibv_mr>,
    /// Forgets an imported memory region.
    /// Since rdma-core 31.
    pub unimport_mr: Option<unsafe extern "C" fn(mr: *mut ibv_mr)>,
    /// Reads one GID table entry with its type and network device. `entry_size` is
    /// `size_of::<ibv_gid_entry>()`.
    ///
    /// Returns 0 or the errno value: ENODATA for an empty entry. Since rdma-core 32.
    pub query_gid_ex: Option<
        unsafe extern "C" fn(
            context: *mut ibv_context,
            port_num: u32,
            gid_index: u32,
            entry: *mut ibv_gid_entry,
            flags: u32,
            entry_size: usize,
        ) -> libc::c_int,
    >,
    /// Reads all valid GID table entries. `entry_size` is `size_of::<ibv_gid_entry>()`.
    ///
    /// Returns their number, or the negative errno value. Since rdma-core 32.
    pub query_gid_table: Option<
        unsafe extern "C" fn(
            context: *mut ibv_context,
            entries: *mut ibv_gid_entry,
            max_entries: usize,
            flags: u32,
            entry_size: usize,
        ) -> isize,
    >,
    /// Registers a part of a dma-buf.
    ///
    /// Returns NULL and sets errno on failure. Since rdma-core 34.
    pub reg_dmabuf_mr: Option<
        unsafe extern "C" fn(
            pd: *mut ibv_pd,
            offset: u64,
            length: usize,
            iova: u64,
            fd: libc::c_int,
            access: libc::c_int,
        ) -> *mut ibv_mr,
    >,
    /// Imports device memory.
    ///
    /// Returns NULL and sets errno on failure. Since rdma-core 35.
    pub import_dm:
        Option<unsafe extern "C" fn(context: *mut ibv_context, dm_handle: u32) -> *mut ibv_dm>,
    /// Forgets imported device memory.
    /// Since rdma-core 35.
    pub unimport_dm: Option<unsafe extern "C" fn(dm: *mut ibv_dm)>,
    /// Tells whether `fork` is safe, see `ibv_fork_init`.
    ///
    /// Returns an `IBV_FORK_*` value. Since rdma-core 35.
    pub is_fork_initialized: Option<unsafe extern "C" fn() -> ibv_fork_status>,
    /// Tells whether data of an operation become visible in order. `flags` is 0.
    ///
    /// Returns 1 or 0. Since rdma-core 36.
    pub query_qp_data_in_order:
        Option<unsafe extern "C" fn(qp: *mut ibv_qp, op: ibv_wr_opcode, flags: u32) -> libc::c_int>,
}

impl core::fmt::Debug for Verbs {
    /// Shows which young symbols are there, the one thing in which two tables differ visibly.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Verbs")
            .field("get_pkey_index", &self.get_pkey_index.is_some())
            .field("qp_to_qp_ex", &self.qp_to_qp_ex.is_some())
            .field("reg_mr_iova", &self.reg_mr_iova.is_some())
            .field("reg_mr_iova2", &self.reg_mr_iova2.is_some())
            .field("get_device_index", &self.get_device_index.is_some())
            .field("set_ece", &self.set_ece.is_some())
            .field("query_ece", &self.query_ece.is_some())
            .field("import_device", &self.import_device.is_some())
            .field("import_pd", &self.import_pd.is_some())
            .field("unimport_pd", &self.unimport_pd.is_some())
            .field("import_mr", &self.import_mr.is_some())
            .field("unimport_mr", &self.unimport_mr.is_some())
            .field("query_gid_ex", &self.query_gid_ex.is_some())
            .field("query_gid_table", &self.query_gid_table.is_some())
            .field("reg_dmabuf_mr", &self.reg_dmabuf_mr.is_some())
            .field("import_dm", &self.import_dm.is_some())
            .field("unimport_dm", &self.unimport_dm.is_some())
            .field("is_fork_initialized", &self.is_fork_initialized.is_some())
            .field(
                "query_qp_data_in_order",
                &self.query_qp_data_in_order.is_some(),
            )
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::Verbs;
    use crate::functions::*;

    /// Compiles only if every field has the signature of the C declaration.
    ///
    /// Generic and never called, so no code is made of it and nothing links with the library.
    #[allow(dead_code, reason = "it is the type check that counts")]
    fn signatures<T>(_: T) -> Verbs {
        Verbs {
            get_device_list: ibv_get_device_list,
            free_device_list: ibv_free_device_list,
            get_device_name: ibv_get_device_name,
            get_device_guid: ibv_get_device_guid,
            open_device: ibv_open_device,
            close_device: ibv_close_device,
            get_async_event: ibv_get_async_event,
            ack_async_event: ibv_ack_async_event,
            query_device: ibv_query_device,
            query_port: ibv_query_port,
            query_gid: ibv_query_gid,
            query_pkey: ibv_query_pkey,
            resolve_eth_l2_from_gid: ibv_resolve_eth_l2_from_gid,
            alloc_pd: ibv_alloc_pd,
            dealloc_pd: ibv_dealloc_pd,
            reg_mr: ibv_reg_mr,
            rereg_mr: ibv_rereg_mr,
            dereg_mr: ibv_dereg_mr,
            create_comp_channel: ibv_create_comp_channel,
            destroy_comp_channel: ibv_destroy_comp_channel,
            create_cq: ibv_create_cq,
            resize_cq: ibv_resize_cq,
            destroy_cq: ibv_destroy_cq,
            get_cq_event: ibv_get_cq_event,
            ack_cq_events: ibv_ack_cq_events,
            create_srq: ibv_create_srq,
            modify_srq: ibv_modify_srq,
            query_srq: ibv_query_srq,
            destroy_srq: ibv_destroy_srq,
            create_qp: ibv_create_qp,
            modify_qp: ibv_modify_qp,
            query_qp: ibv_query_qp,
            destroy_qp: ibv_destroy_qp,
            attach_mcast: ibv_attach_mcast,
            detach_mcast: ibv_detach_mcast,
            create_ah: ibv_create_ah,
            init_ah_from_wc: ibv_init_ah_from_wc,
            create_ah_from_wc: ibv_create_ah_from_wc,
            destroy_ah: ibv_destroy_ah,
            fork_init: ibv_fork_init,
            node_type_str: ibv_node_type_str,
            port_state_str: ibv_port_state_str,
            event_type_str: ibv_event_type_str,
            wc_status_str: ibv_wc_status_str,
            rate_to_mult: ibv_rate_to_mult,
            mult_to_ibv_rate,
            rate_to_mbps: ibv_rate_to_mbps,
            mbps_to_ibv_rate,
            get_pkey_index: Some(ibv_get_pkey_index),
            qp_to_qp_ex: Some(ibv_qp_to_qp_ex),
            reg_mr_iova: Some(ibv_reg_mr_iova),
            reg_mr_iova2: Some(ibv_reg_mr_iova2),
            get_device_index: Some(ibv_get_device_index),
            set_ece: Some(ibv_set_ece),
            query_ece: Some(ibv_query_ece),
            import_device: Some(ibv_import_device),
            import_pd: Some(ibv_import_pd),
            unimport_pd: Some(ibv_unimport_pd),
            import_mr: Some(ibv_import_mr),
            unimport_mr: Some(ibv_unimport_mr),
            query_gid_ex: Some(_ibv_query_gid_ex),
            query_gid_table: Some(_ibv_query_gid_table),
            reg_dmabuf_mr: Some(ibv_reg_dmabuf_mr),
            import_dm: Some(ibv_import_dm),
            unimport_dm: Some(ibv_unimport_dm),
            is_fork_initialized: Some(ibv_is_fork_initialized),
            query_qp_data_in_order: Some(ibv_query_qp_data_in_order),
        }
    }
}
