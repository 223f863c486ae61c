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
    const Address all[] = {{"wide_pages", p->wide_pages, 8, REQUIRED}, {"packed", p->packed, 128, REQUIRED}};
    CHECK_ADDRESSES("pack", all, launch);
    return SPECACHE_OK;
}

specache_status specache_pack_plan(const specache_pack_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_packing("pack", p->head_dim, p->bits, p->group_size, p->dtype, launch));
    const uint64_t ctas = (uint64_t)p->n_pages * p->n_kv_heads;
    if (ctas == 0) return SPECACHE_OK;
    TRY(check_memory(p, launch));
    return planned(launch, kernel_of(p), ctas, SPECACHE_PACK_THREADS);
}
