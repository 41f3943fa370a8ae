//! Fills the table from libibverbs at run time, so that a program starts where it is not installed.
//!
//! # Safety
//!
//! A symbol of the library has the signature that rdma-core's headers give it, and each field of
//! [`Verbs`] is held against declarations generated from those headers (`functions.rs`). The
//! library is never unloaded, so the function pointers stay valid for the life of the process.
#![allow(
    unsafe_code,
    reason = "dlopen, and symbols turned into function pointers"
)]

use core::ffi::{CStr, c_void};
use core::ptr::NonNull;

use crate::{LoadError, Verbs};

/// The name under which every distribution installs the library.
const LIBIBVERBS: &CStr = c"libibverbs.so.1";

pub(crate) fn table() -> Result<Verbs, LoadError> {
    load(LIBIBVERBS)
}

fn load(soname: &CStr) -> Result<Verbs, LoadError> {
    let library = Library::open(soname)?;
    Ok(Verbs {
        get_device_list: library.required(c"ibv_get_device_list")?,
        free_device_list: library.required(c"ibv_free_device_list")?,
        get_device_name: library.required(c"ibv_get_device_name")?,
        get_device_guid: library.required(c"ibv_get_device_guid")?,
        open_device: library.required(c"ibv_open_device")?,
        close_device: library.required(c"ibv_close_device")?,
        get_async_event: library.required(c"ibv_get_async_event")?,
        ack_async_event: library.required(c"ibv_ack_async_event")?,
        query_device: library.required(c"ibv_query_device")?,
        query_port: library.required(c"ibv_query_port")?,
        query_gid: library.required(c"ibv_query_gid")?,
        query_pkey: library.required(c"ibv_query_pkey")?,
        resolve_eth_l2_from_gid: library.required(c"ibv_resolve_eth_l2_from_gid")?,
        alloc_pd: library.required(c"ibv_alloc_pd")?,
        dealloc_pd: library.required(c"ibv_dealloc_pd")?,
        reg_mr: library.required(c"ibv_reg_mr")?,
        rereg_mr: library.required(c"ibv_rereg_mr")?,
        dereg_mr: library.required(c"ibv_dereg_mr")?,
        create_comp_channel: library.required(c"ibv_create_comp_channel")?,
        destroy_comp_channel: library.required(c"ibv_destroy_comp_channel")?,
        create_cq: library.required(c"ibv_create_cq")?,
        resize_cq: library.required(c"ibv_resize_cq")?,
        destroy_cq: library.required(c"ibv_destroy_cq")?,
        get_cq_event: library.required(c"ibv_get_cq_event")?,
        ack_cq_events: library.required(c"ibv_ack_cq_events")?,
        create_srq: library.required(c"ibv_create_srq")?,
        modify_srq: library.required(c"ibv_modify_srq")?,
        query_srq: library.required(c"ibv_query_srq")?,
        destroy_srq: library.required(c"ibv_destroy_srq")?,
        create_qp: library.required(c"ibv_create_qp")?,
        modify_qp: library.required(c"ibv_modify_qp")?,
        query_qp: library.required(c"ibv_query_qp")?,
        destroy_qp: library.required(c"ibv_destroy_qp")?,
        attach_mcast: library.required(c"ibv_attach_mcast")?,
        detach_mcast: library.required(c"ibv_detach_mcast")?,
        create_ah: library.required(c"ibv_create_ah")?,
        init_ah_from_wc: library.required(c"ibv_init_ah_from_wc")?,
        create_ah_from_wc: library.required(c"ibv_create_ah_from_wc")?,
        destroy_ah: library.required(c"ibv_destroy_ah")?,
        fork_init: library.required(c"ibv_fork_init")?,
        node_type_str: library.required(c"ibv_node_type_str")?,
        port_state_str: library.required(c"ibv_port_state_str")?,
        event_type_str: library.required(c"ibv_event_type_str")?,
        wc_status_str: library.required(c"ibv_wc_status_str")?,
        rate_to_mult: library.required(c"ibv_rate_to_mult")?,
        mult_to_ibv_rate: library.required(c"mult_to_ibv_rate")?,
        rate_to_mbps: library.required(c"ibv_rate_to_mbps")?,
        mbps_to_ibv_rate: library.required(c"mbps_to_ibv_rate")?,
        get_pkey_index: library.young(c"ibv_get_pkey_index"),
        qp_to_qp_ex: library.young(c"ibv_qp_to_qp_ex"),
        reg_mr_iova: library.young(c"ibv_reg_mr_iova"),
        reg_mr_iova2: library.young(c"ibv_reg_mr_iova2"),
        get_device_index: library.young(c"ibv_get_device_index"),
        set_ece: library.young(c"ibv_set_ece"),
        query_ece: library.young(c"ibv_query_ece"),
        import_device: library.young(c"ibv_import_device"),
        import_pd: library.young(c"ibv_import_pd"),
        unimport_pd: library.young(c"ibv_unimport_pd"),
        import_mr: library.young(c"ibv_import_mr"),
        unimport_mr: library.young(c"ibv_unimport_mr"),
        query_gid_ex: library.young(c"_ibv_query_gid_ex"),
        query_gid_table: library.young(c"_ibv_query_gid_table"),
        reg_dmabuf_mr: library.young(c"ibv_reg_dmabuf_mr"),
        import_dm: library.young(c"ibv_import_dm"),
        unimport_dm: library.young(c"ibv_unimport_dm"),
        is_fork_initialized: library.young(c"ibv_is_fork_initialized"),
        query_qp_data_in_order: library.young(c"ibv_query_qp_data_in_order"),
    })
}

/// A loaded library; its handle is never closed.
struct Library {
    handle: NonNull<c_void>,
    name: String,
}

impl Library {
    fn open(soname: &CStr) -> Result<Library, LoadError> {
        let name = soname.to_string_lossy().into_owned();
        // SAFETY: `soname` is NUL terminated. Initialisers run by loading are those of the
        // system's libibverbs, as if the program were linked with it.
        let handle = unsafe { libc::dlopen(soname.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Library { handle, name }),
            None => Err(LoadError::Library {
                library: name,
                reason: dl_error(),
            }),
        }
    }

    /// Looks up the default (newest) version of a symbol.
    fn symbol(&self, symbol: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the handle came from `dlopen` and was not closed; `symbol` is NUL terminated.
        let address = unsafe { libc::dlsym(self.handle.as_ptr(), symbol.as_ptr()) };
        NonNull::new(address)
    }

    fn required<F: Copy>(&self, symbol: &CStr) -> Result<F, LoadError> {
        self.young(symbol).ok_or_else(|| LoadError::Symbol {
            library: self.name.clone(),
            symbol: symbol.to_string_lossy().into_owned(),
        })
    }

    fn young<F: Copy>(&self, symbol: &CStr) -> Option<F> {
        const { assert!(size_of::<F>() == size_of::<NonNull<c_void>>()) };
        let address = self.symbol(symbol)?;
        // SAFETY: `F` is the type of the field of that name, a function pointer, and the symbol is
        // the function of that signature (module docs). The sizes are equal.
        Some(unsafe { core::mem::transmute_copy::<NonNull<c_void>, F>(&address) })
    }
}

/// What the dynamic linker says about the call that failed last on this thread.
fn dl_error() -> String {
    // SAFETY: no preconditions.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "unknown reason".into();
    }
    // SAFETY: not NULL, so a NUL terminated string, valid until the next dl call of this thread.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::load;
    use crate::LoadError;

    #[test]
    fn missing_library_is_named_with_the_remedy() {
        let soname = c"libibverbs-that-is-not-there.so.1";
        let error = load(soname).expect_err("no such library");
        let LoadError::Library { library, reason } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(library, "libibverbs-that-is-not-there.so.1");
        assert!(reason.contains("No such file"), "{reason}");
        assert!(
            error
                .to_string()
                .contains("install the package libibverbs1"),
            "{error}"
        );
    }

    #[test]
    fn library_of_another_kind_is_refused() {
        let error = load(c"libc.so.6").expect_err("libc exports no verbs");
        let LoadError::Symbol { library, symbol } = error else {
            panic!("{error:?}")
        };
        assert_eq!(
            (library.as_str(), symbol.as_str()),
            ("libc.so.6", "ibv_get_device_list")
        );
    }
}
