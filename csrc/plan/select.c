/* The launch plans of select.cu. */
#include "../attn_work.h"
#include "plan.h"

/* Of one row, or of two where hits are counted. */
static uint64_t candidate_lists(const specache_select_params *p) {
    return (uint64_t)p->n_seqs * p->n_kv_heads * most_chunks(p) * (p->hits != 0 ? 2 : 1);
}

static specache_status check_shape(const specache_select_params *p, specache_launch *launch) {
    if (p->top_k > kMostTopK)
        return refuse(launch, SPECACHE_UNSUPPORTED_TOP_K, "selection: top_k %u (at most %u)", p->top_k, kMostTopK);
    TRY(check_heads("selection", p->n_heads, p->n_kv_heads, MOST_HEADS, launch));
    if (p->capacity > MOST_TOKENS || p->n_seqs > MOST_SEQS || p->n_heads > MOST_HEADS || candidate_lists(p) > MOST_CTAS)
        return refuse(launch, SPECACHE_TOO_LARGE, "selection: %u sequences of %u tokens", p->n_seqs, p->capacity);
    return SPECACHE_OK;
}

static specache_status check_memory(const specache_select_params *p, specache_launch *launch) {
    const Address all[] = {{"seqs", p->seqs, 16, REQUIRED},
                           {"scores", p->scores, 4, REQUIRED},
                           {"lse", p->lse, 4, REQUIRED},
                           {"caches", p->caches, 16, REQUIRED},
                           {"selected", p->selected, 4, OPTIONAL},
                           {"fetches", p->fetches, 8, REQUIRED},
                           {"fetch_counts", p->fetch_counts, 4, REQUIRED},
                           {"select_counts", p->select_counts, 4, OPTIONAL},
                           {"candidates", p->candidates, 8, REQUIRED},
                           {"hits", p->hits, 4, OPTIONAL},
                           {"first_scores", p->first_scores, 4, p->hits == 0},
                           {"first_lse", p->first_lse, 4, p->hits == 0}};
    CHECK_ADDRESSES("selection", all, launch);
    return SPECACHE_OK;
}

static specache_status plan(const specache_select_params *p, const char *kernel, uint64_t grid,
                            specache_launch *launch) {
    clear(launch);
    TRY(check_shape(p, launch));
    if (grid == 0 || p->top_k == 0) return SPECACHE_OK;
    TRY(check_memory(p, launch));
    return planned(launch, kernel, grid, SPECACHE_SELECT_THREADS);
}

uint64_t specache_select_scratch_bytes(const specache_select_params *p) {
    specache_launch launch;
    if (check_shape(p, &launch) != SPECACHE_OK) return 0;
    return candidate_lists(p) * p->top_k * 8;
}

specache_status specache_select_plan(const specache_select_params *p, specache_launch *launch) {
    return plan(p, "specache_select_chunks", candidate_lists(p), launch);
}

specache_status specache_select_merge_plan(const specache_select_params *p, specache_launch *launch) {
    return plan(p, "specache_select_merge", (uint64_t)p->n_seqs * p->n_kv_heads, launch);
}
