/* The launch plan of pack.cu. */
#include "plan.h"

static const char *kernel_of(const specache_pack_params *p) {
#define NAME(D, B, type, T)                                                   \
    if (p->head_dim == D && p->bits == B && p->dtype == SPECACHE_DTYPE(type)) \
        return "specache_pack_d" #D "_b" #B "_" #type;
    SPECACHE_PACK_KERNELS(NAME)
#undef NAME
    return NULL;
}

static specache_status check_memory(const specache_pack_params *p, specache_launch *launch) {
    const Address all[] = {{"wide", p->wide, 16, REQUIRED},
                           {"packed", p->packed, 128, REQUIRED},
                           {"wide_ids", p->wide_ids, 4, OPTIONAL},
                           {"packed_ids", p->packed_ids, 4, OPTIONAL}};
    CHECK_ADDRESSES("pack", all, launch);
    TRY(check_wide_stride("pack", "wide_page_stride", p->wide_page_stride, wide_page_bytes(p->n_kv_heads, p->head_dim),
                          launch));
    return check_packed_strides("pack", p->packed_page_stride, p->packed_head_stride,
                                packed_head_bytes(p->head_dim, p->bits, p->group_size), launch);
}

specache_status specache_pack_plan(const specache_pack_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_packing("pack", p->head_dim, p->bits, p->group_size, p->dtype, launch));
    const uint64_t ctas = (uint64_t)p->n_pages * p->n_kv_heads;
    if (ctas == 0) return SPECACHE_OK;
    TRY(check_memory(p, launch));
    return planned(launch, kernel_of(p), ctas, SPECACHE_PACK_THREADS);
}
