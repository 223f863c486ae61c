/* The launch plan of attn_prefill.cu. */
#include "../prefill_work.h"
#include "plan.h"

static const char *kernel_of(uint32_t head_dim, specache_dtype dtype) {
#define NAME(D, type, T) \
    if (head_dim == D && dtype == SPECACHE_DTYPE(type)) return "specache_prefill_d" #D "_" #type;
    SPECACHE_PREFILL_KERNELS(NAME)
#undef NAME
    return NULL;
}

static specache_status check_shape(const specache_prefill_params *p, specache_launch *launch) {
    TRY(check_packing("prefill", p->head_dim, p->bits, p->group_size, p->dtype, launch));
    TRY(check_heads("prefill", p->n_heads, p->n_kv_heads, 16, launch));
    /* The kernel counts queries, a row and a head each, in 32 bits. */
    const uint64_t queries = (uint64_t)p->n_rows * (p->n_heads / p->n_kv_heads);
    if (queries > MOST_CTAS || p->n_seqs > MOST_SEQS || p->n_heads > MOST_HEADS)
        return refuse(launch, SPECACHE_TOO_LARGE, "prefill: %u rows of %u sequences", p->n_rows, p->n_seqs);
    return SPECACHE_OK;
}

static specache_status check_memory(const specache_prefill_params *p, specache_launch *launch) {
    const Address all[] = {{"seqs", p->seqs, 16, REQUIRED},
                           {"caches", p->caches, 16, REQUIRED},
                           {"q", p->q, 16, REQUIRED},
                           {"out", p->out, 8, REQUIRED}};
    CHECK_ADDRESSES("prefill", all, launch);
    return SPECACHE_OK;
}

specache_status specache_prefill_plan(const specache_prefill_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_shape(p, launch));
    if (p->n_seqs == 0 || p->n_rows == 0) return SPECACHE_OK;
    TRY(check_memory(p, launch));
    const PrefillShape shape = prefill_shape(p->head_dim, p->shared_limit);
    if (shape.warps == 0)
        return refuse(launch, SPECACHE_TOO_MUCH_SHARED, "prefill: %u bytes of shared memory where %u are",
                      prefill_shared_bytes(p->head_dim, (PrefillShape){4, 2}), p->shared_limit);
    launch->shared_bytes = prefill_shared_bytes(p->head_dim, shape);
    /* Each entry may leave a tile that is not full. */
    const uint64_t queries = (uint64_t)p->n_rows * (p->n_heads / p->n_kv_heads);
    const uint64_t tiles = queries / (shape.warps * kWarpQueries) + (p->n_seqs < queries ? p->n_seqs : queries);
    return planned(launch, kernel_of(p->head_dim, p->dtype), tiles * p->n_kv_heads, shape.warps * 32);
}

uint32_t specache_prefill_filled(const specache_prefill_params *p, uint32_t n_sms) {
    specache_launch refusal;
    clear(&refusal);
    const PrefillShape shape = prefill_shape(p->head_dim, p->shared_limit);
    if (check_shape(p, &refusal) != SPECACHE_OK || shape.warps == 0 || p->n_rows == 0 || n_sms == 0) return 0;
    const uint64_t queries = (uint64_t)p->n_rows * (p->n_heads / p->n_kv_heads), tile = shape.warps * kWarpQueries;
    const uint64_t ctas = (queries + tile - 1) / tile * p->n_kv_heads;
    const uint64_t places = (uint64_t)n_sms * prefill_ctas_per_sm(p->head_dim, shape, p->shared_limit);
    return (uint32_t)(ctas * 1000 / ((ctas + places - 1) / places * places));
}
