//! What one software device holds, and what its attributes therefore say.

/// Work requests on one queue.
pub(crate) const QP_WR_MAX: u32 = 16 * 1024;
/// Work requests on one shared receive queue; more than on others, because many queue pairs use it.
pub(crate) const SRQ_WR_MAX: u32 = 4 * QP_WR_MAX;
/// Scatter/gather elements of one work request.
pub(crate) const SGE_MAX: u32 = 32;
/// Bytes of inline data.
pub(crate) const INLINE_LEN_MAX: u32 = 1024;
/// READs and atomics outstanding at one queue pair, in each direction.
pub(crate) const RD_ATOMIC_MAX: u8 = crate::qp::MAX_RD_ATOMIC;
/// Entries of one completion queue.
pub(crate) const CQE_MAX: u32 = 1 << 20;
/// Bytes of one message.
pub(crate) const MESSAGE_LEN_MAX: u32 = 1 << 31;
/// The one port.
pub(crate) const PORT: u8 = 1;
/// Places in the table of GIDs. The device's address is in the first and the others are empty, as most are
/// on real ports: programs must not take a place for filled.
pub(crate) const GID_TABLE_LEN: u32 = 16;
/// The one partition: the default one, full membership.
pub(crate) const PKEY: u16 = 0xffff;
/// Objects of kinds that only memory limits.
pub(crate) const OBJECT_COUNT_MAX: u32 = 1 << 20;
/// Packets that one queue pair may have unanswered, however well the path does.
pub(crate) const WINDOW_MAX: u32 = 256;
/// Bytes that one queue pair may have unanswered: what stays in the caches of both sides. Four times as
/// much moved 64 KiB WRITEs over the loopback interface at three quarters of the speed.
pub(crate) const WINDOW_LEN_MAX: usize = 256 << 10;
/// Bytes that all queue pairs of a device together may have unanswered, but for one packet each.
pub(crate) const WINDOW_BUDGET_LEN: usize = 512 << 10;
