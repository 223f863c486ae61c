/* The launch plans of attn_decode.cu and attn_combine.cu. */
#include "../attn_work.h"
#include "plan.h"

static const char *kernel_of(const specache_attn_params *p) {
#define NAME(D, B, type, T)                                                   \
    if (p->head_dim == D && p->bits == B && p->dtype == SPECACHE_DTYPE(type)) \
        return "specache_attn_d" #D "_b" #B "_" #type;
    SPECACHE_ATTN_KERNELS(NAME)
#undef NAME
    return NULL;
}

static specache_status check_shape(const specache_attn_params *p, specache_launch *launch) {
    TRY(check_packing("attention", p->head_dim, p->bits, p->group_size, p->dtype, launch));
    TRY(check_heads("attention", p->n_heads, p->n_kv_heads, 16, launch));
    if (p->capacity > MOST_TOKENS || p->top_k > MOST_TOKENS)
        return refuse(launch, SPECACHE_TOO_LARGE, "attention: capacity %u, top_k %u", p->capacity, p->top_k);
    const bool too_many = p->n_seqs > MOST_SEQS || p->n_heads > MOST_HEADS;
    if (too_many || most_units(p) > MOST_CTAS || 2 * (uint64_t)p->n_seqs * p->n_heads > MOST_CTAS)
        return refuse(launch, SPECACHE_TOO_LARGE, "attention: %u sequences of %u heads", p->n_seqs, p->n_heads);
    return SPECACHE_OK;
}

static specache_status check_memory(const specache_attn_params *p, specache_launch *launch) {
    const Address all[] = {{"seqs", p->seqs, 16, REQUIRED},
                           {"caches", p->caches, 16, REQUIRED},
                           {"q", p->q, 8, REQUIRED},
                           {"out", p->out, 4, REQUIRED},
                           {"parts", p->parts, 16, REQUIRED},
                           {"scores", p->scores, 4, OPTIONAL},
                           {"lse (scores need it)", p->lse, 4, p->scores == 0},
                           {"first_scores", p->first_scores, 4, OPTIONAL},
                           {"first_lse (first_scores need it)", p->first_lse, 4, p->first_scores == 0}};
    CHECK_ADDRESSES("attention", all, launch);
    return SPECACHE_OK;
}

uint64_t specache_attn_part_bytes(const specache_attn_params *p) {
    specache_launch launch;
    if (check_shape(p, &launch) != SPECACHE_OK) return 0;
    return most_units(p) * part_floats(p->head_dim) * 4;
}

specache_status specache_attn_plan(const specache_attn_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_shape(p, launch));
    if (p->n_seqs == 0) return SPECACHE_OK;
    TRY(check_memory(p, launch));
    const uint32_t stages = attn_stages(p);
    if (stages == 0)
        return refuse(launch, SPECACHE_TOO_MUCH_SHARED, "attention: %u bytes of shared memory where %u are",
                      attn_shared_bytes(p, 2), p->shared_limit);
    launch->shared_bytes = attn_shared_bytes(p, stages);
    const uint64_t ctas = attn_gpu_ctas(p), units = most_units(p);
    return planned(launch, kernel_of(p), ctas < units ? ctas : units, SPECACHE_ATTN_THREADS);
}

specache_status specache_attn_combine_plan(const specache_attn_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_shape(p, launch));
    if (p->n_seqs == 0) return SPECACHE_OK;
    TRY(check_memory(p, launch));
    return planned(launch, "specache_attn_combine", 2 * (uint64_t)p->n_seqs * p->n_heads, SPECACHE_ATTN_THREADS);
}
