/* Calls the inline functions of <infiniband/verbs.h> on a fake context and prints what happens.
 *
 * inlines.rs does the same with the Rust functions; the two outputs must be equal. The exported
 * functions that the inline ones call are fakes too, so this is not linked with libibverbs. */

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <infiniband/verbs.h>

static struct verbs_context vctx;
static struct ibv_context *const ctx = &vctx.context;
static struct ibv_pd pd, other_pd;
static struct ibv_mr mr, other_mr;
static struct ibv_mw mw;
static struct ibv_mw_bind mw_bind;
static struct ibv_qp qp;
static struct ibv_cq cq;
static struct ibv_srq srq;
static struct ibv_send_wr send_wr[2];
static struct ibv_recv_wr recv_wr[2];
static struct ibv_wc wc[2];
static struct ibv_port_attr port_attr;
static struct ibv_device_attr_ex device_attr;
static struct ibv_gid_entry gid_entry;
static char buffer[1];

/* What the fakes return; those that return a pointer give NULL and set errno unless it is 0. */
static int result;

static const char *name(const void *pointer)
{
	static const struct { const void *pointer; const char *name; } names[] = {
		{ NULL, "null" }, { &vctx, "vctx" }, { &vctx.context, "ctx" }, { &pd, "pd" },
		{ &other_pd, "other_pd" }, { &mr, "mr" }, { &other_mr, "other_mr" },
		{ &mw, "mw" }, { &mw_bind, "mw_bind" }, { &qp, "qp" }, { &cq, "cq" },
		{ &srq, "srq" }, { &send_wr[0], "send_wr0" }, { &send_wr[1], "send_wr1" },
		{ &recv_wr[0], "recv_wr0" }, { &recv_wr[1], "recv_wr1" }, { &wc, "wc" },
		{ &port_attr, "port_attr" }, { &device_attr, "device_attr" },
		{ &gid_entry, "gid_entry" }, { &buffer, "buffer" },
	};

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (names[i].pointer == pointer)
			return names[i].name;
	return "unknown";
}

static void *object(void *pointer)
{
	if (!result)
		return pointer;
	errno = result;
	return NULL;
}

/* Operations of the context. */

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad_wr)
{
	printf("post_send %s %s\n", name(qp), name(wr));
	if (result)
		*bad_wr = wr->next;
	return result;
}

static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad_wr)
{
	printf("post_recv %s %s\n", name(qp), name(wr));
	if (result)
		*bad_wr = wr->next;
	return result;
}

static int post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad_wr)
{
	printf("post_srq_recv %s %s\n", name(srq), name(wr));
	if (result)
		*bad_wr = wr->next;
	return result;
}

static int poll_cq(struct ibv_cq *cq, int num_entries, struct ibv_wc *wc)
{
	printf("poll_cq %s %d %s\n", name(cq), num_entries, name(wc));
	return result;
}

static int req_notify_cq(struct ibv_cq *cq, int solicited_only)
{
	printf("req_notify_cq %s %d\n", name(cq), solicited_only);
	return result;
}

static struct ibv_mw *alloc_mw(struct ibv_pd *pd, enum ibv_mw_type type)
{
	printf("alloc_mw %s %d\n", name(pd), type);
	return object(&mw);
}

static int dealloc_mw(struct ibv_mw *mw)
{
	printf("dealloc_mw %s\n", name(mw));
	return result;
}

static int bind_mw(struct ibv_qp *qp, struct ibv_mw *mw, struct ibv_mw_bind *mw_bind)
{
	printf("bind_mw %s %s %s\n", name(qp), name(mw), name(mw_bind));
	return result;
}

/* Extended operations. */

static int query_port_ex(struct ibv_context *context, uint8_t port_num, struct ibv_port_attr *attr,
			 size_t len)
{
	printf("query_port_ex %s %d %s whole %d\n", name(context), port_num, name(attr),
	       len == sizeof(*attr));
	if (!result)
		memset(attr, 0x5a, len);
	return result;
}

static int query_device_ex(struct ibv_context *context,
			   const struct ibv_query_device_ex_input *input,
			   struct ibv_device_attr_ex *attr, size_t len)
{
	printf("query_device_ex %s input %d %s whole %d\n", name(context), input != NULL,
	       name(attr), len == sizeof(*attr));
	if (!result)
		memset(attr, 0x5a, len);
	return result;
}

/* Exported functions; the parentheses keep the macros of the same names away. */

int (ibv_query_port)(struct ibv_context *context, uint8_t port_num,
		     struct _compat_ibv_port_attr *attr)
{
	printf("query_port %s %d %s\n", name(context), port_num, name(attr));
	((uint8_t *)attr)[0] = 4;
	return 0;
}

int (ibv_query_device)(struct ibv_context *context, struct ibv_device_attr *attr)
{
	printf("query_device %s %s\n", name(context), name(attr));
	((uint8_t *)attr)[0] = 4;
	return 0;
}

struct ibv_mr *(ibv_reg_mr)(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	printf("reg_mr %s %s %zu %d\n", name(pd), name(addr), length, access);
	return object(&mr);
}

struct ibv_mr *(ibv_reg_mr_iova)(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
				 int access)
{
	printf("reg_mr_iova %s %s %zu %s %d\n", name(pd), name(addr), length,
	       iova == (uintptr_t)addr ? "addr" : "iova", access);
	return object(&mr);
}

struct ibv_mr *(ibv_reg_mr_iova2)(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
				  unsigned int access)
{
	printf("reg_mr_iova2 %s %s %zu %s %u\n", name(pd), name(addr), length,
	       iova == (uintptr_t)addr ? "addr" : "iova", access);
	return object(&mr);
}

int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port_num, uint32_t gid_index,
		      struct ibv_gid_entry *entry, uint32_t flags, size_t entry_size)
{
	printf("query_gid_ex %s %u %u %s %u %zu\n", name(context), port_num, gid_index, name(entry),
	       flags, entry_size);
	return result;
}

ssize_t _ibv_query_gid_table(struct ibv_context *context, struct ibv_gid_entry *entries,
			     size_t max_entries, uint32_t flags, size_t entry_size)
{
	printf("query_gid_table %s %s %zu %u %zu\n", name(context), name(entries), max_entries,
	       flags, entry_size);
	return result;
}

/* The calls. */

static void returned(const char *call, long long value)
{
	printf("%s = %lld, errno %d\n", call, value, errno);
	errno = 0;
}

static void returned_object(const char *call, const void *pointer)
{
	printf("%s = %s, errno %d\n", call, name(pointer), errno);
	errno = 0;
}

static void queues(void)
{
	struct ibv_send_wr *bad_send = NULL;
	struct ibv_recv_wr *bad_recv = NULL;

	for (int i = 0; i < 2; i++) {
		result = i ? ENOMEM : 0;
		returned("ibv_post_send", ibv_post_send(&qp, &send_wr[0], &bad_send));
		printf("bad_wr %s\n", name(bad_send));
		returned("ibv_post_recv", ibv_post_recv(&qp, &recv_wr[0], &bad_recv));
		printf("bad_wr %s\n", name(bad_recv));
		bad_recv = NULL;
		returned("ibv_post_srq_recv", ibv_post_srq_recv(&srq, &recv_wr[0], &bad_recv));
		printf("bad_wr %s\n", name(bad_recv));
		bad_recv = NULL;
		returned("ibv_req_notify_cq", ibv_req_notify_cq(&cq, i));
	}
	for (result = -1; result <= 2; result++)
		returned("ibv_poll_cq", ibv_poll_cq(&cq, 2, wc));
}

static void bind(enum ibv_mw_type type, struct ibv_mr *region, uint64_t addr, uint64_t length)
{
	mw.type = type;
	mw_bind.bind_info.mr = region;
	mw_bind.bind_info.addr = addr;
	mw_bind.bind_info.length = length;
	returned("ibv_bind_mw", ibv_bind_mw(&qp, &mw, &mw_bind));
}

static void windows(void)
{
	for (int i = 0; i < 2; i++) {
		result = i ? ENOMEM : 0;
		returned_object("ibv_alloc_mw", ibv_alloc_mw(&pd, IBV_MW_TYPE_1));
		returned_object("ibv_alloc_mw", ibv_alloc_mw(&pd, IBV_MW_TYPE_2));
		returned("ibv_dealloc_mw", ibv_dealloc_mw(&mw));
		bind(IBV_MW_TYPE_1, &mr, 4096, 64);
		bind(IBV_MW_TYPE_1, &mr, 4096, 0);
		bind(IBV_MW_TYPE_1, NULL, 0, 0);
		bind(IBV_MW_TYPE_1, NULL, 4096, 0);
		bind(IBV_MW_TYPE_1, NULL, 0, 64);
		bind(IBV_MW_TYPE_1, &other_mr, 4096, 64);
		bind(IBV_MW_TYPE_2, &mr, 4096, 64);
	}
	ctx->ops.alloc_mw = NULL;
	returned_object("ibv_alloc_mw", ibv_alloc_mw(&pd, IBV_MW_TYPE_1));
	const uint32_t rkeys[] = { 0, 0xff, 0x1234, 0x12ff, 0xffffffff };
	for (size_t i = 0; i < sizeof(rkeys) / sizeof(rkeys[0]); i++)
		returned("ibv_inc_rkey", ibv_inc_rkey(rkeys[i]));
}

static void bytes(const void *start, size_t middle, size_t size)
{
	const uint8_t *byte = start;

	printf("bytes %d %d %d\n", byte[0], byte[middle], byte[size - 1]);
}

static void query_port(void)
{
	memset(&port_attr, 0xa5, sizeof(port_attr));
	returned("ibv_query_port", ibv_query_port(ctx, 1, &port_attr));
	bytes(&port_attr, offsetof(struct ibv_port_attr, lid), sizeof(port_attr));
}

static void query_device(const struct ibv_query_device_ex_input *input)
{
	memset(&device_attr, 0xa5, sizeof(device_attr));
	returned("ibv_query_device_ex", ibv_query_device_ex(ctx, input, &device_attr));
	bytes(&device_attr, offsetof(struct ibv_device_attr_ex, comp_mask), sizeof(device_attr));
}

static void queries(void)
{
	const struct ibv_query_device_ex_input no_mask = { .comp_mask = 0 };
	const struct ibv_query_device_ex_input mask = { .comp_mask = 1 };
	const int results[] = { 0, EOPNOTSUPP, ENOSYS, ENODEV };

	for (size_t i = 0; i < sizeof(results) / sizeof(results[0]); i++) {
		result = results[i];
		query_port();
		query_device(NULL);
		query_device(&no_mask);
		query_device(&mask);
	}
	result = 0;
	vctx.query_port = NULL;
	query_port();
	vctx.query_device_ex = NULL;
	query_device(NULL);
	vctx.query_port = query_port_ex;
	vctx.query_device_ex = query_device_ex;

	/* A context of a provider that knows neither, and of one that knows the older alone. */
	vctx.sz = sizeof(vctx) - offsetof(struct verbs_context, ibv_destroy_flow);
	query_port();
	query_device(NULL);
	vctx.sz = sizeof(vctx) - offsetof(struct verbs_context, query_device_ex);
	query_port();
	query_device(NULL);
	vctx.sz = sizeof(vctx);

	/* Only all the bits of a pointer say that a context is extended. */
	const uintptr_t abis[] = { 0, UINT32_MAX, UINTPTR_MAX - 1, UINTPTR_MAX };
	for (size_t i = 0; i < sizeof(abis) / sizeof(abis[0]); i++) {
		ctx->abi_compat = (void *)abis[i];
		returned_object("verbs_get_ctx", verbs_get_ctx(ctx));
		query_port();
		query_device(NULL);
	}
	result = ENODATA;
	returned("ibv_query_gid_ex", ibv_query_gid_ex(ctx, 1, 3, &gid_entry, 0));
	result = -EINVAL;
	returned("ibv_query_gid_table", ibv_query_gid_table(ctx, &gid_entry, 1, 0));
}

static void registrations(void)
{
	/* The flags are constants, as they are in C programs: variable ones always take the way of
	 * the optional flags, to the same effect. */
	for (int i = 0; i < 2; i++) {
		result = i ? ENOMEM : 0;
		returned_object("ibv_reg_mr", ibv_reg_mr(&pd, buffer, 4096, 0));
		returned_object("ibv_reg_mr", ibv_reg_mr(&pd, buffer, 4096, 15));
		returned_object("ibv_reg_mr", ibv_reg_mr(&pd, buffer, 4096, 1 << 20 | 1));
		returned_object("ibv_reg_mr", ibv_reg_mr(&pd, buffer, 4096, 1 << 29));
		returned_object("ibv_reg_mr_iova", ibv_reg_mr_iova(&pd, buffer, 4096, 8192, 15));
		returned_object("ibv_reg_mr_iova",
				ibv_reg_mr_iova(&pd, buffer, 4096, 8192, 1 << 20 | 1));
	}
}

int main(void)
{
	vctx.sz = sizeof(vctx);
	vctx.query_port = query_port_ex;
	vctx.query_device_ex = query_device_ex;
	ctx->abi_compat = __VERBS_ABI_IS_EXTENDED;
	ctx->ops.post_send = post_send;
	ctx->ops.post_recv = post_recv;
	ctx->ops.post_srq_recv = post_srq_recv;
	ctx->ops.poll_cq = poll_cq;
	ctx->ops.req_notify_cq = req_notify_cq;
	ctx->ops.alloc_mw = alloc_mw;
	ctx->ops.dealloc_mw = dealloc_mw;
	ctx->ops.bind_mw = bind_mw;
	pd.context = qp.context = cq.context = srq.context = mw.context = ctx;
	mr.pd = mw.pd = &pd;
	other_mr.pd = &other_pd;
	send_wr[0].next = &send_wr[1];
	recv_wr[0].next = &recv_wr[1];
	queues();
	windows();
	queries();
	registrations();
	return 0;
}
