/* The launch plans of fetch.cu and post.cu. */
#include "../attn_work.h"
#include "plan.h"

static specache_status check_lists(const char *who, uint32_t n_seqs, uint32_t n_kv_heads, uint32_t top_k,
                                   specache_launch *launch) {
    if (top_k > kMostTopK)
        return refuse(launch, SPECACHE_UNSUPPORTED_TOP_K, "%s: top_k %u (at most %u)", who, top_k, kMostTopK);
    if (n_kv_heads == 0 || n_kv_heads > MOST_HEADS)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEADS, "%s: %u KV heads (1 to %u)", who, n_kv_heads, MOST_HEADS);
    if (n_seqs > MOST_SEQS || (uint64_t)n_seqs * n_kv_heads > MOST_CTAS)
        return refuse(launch, SPECACHE_TOO_LARGE, "%s: %u sequences of %u KV heads", who, n_seqs, n_kv_heads);
    return SPECACHE_OK;
}

/* By what may be wanted: the host does not know what is. */
static uint64_t own_ctas(const specache_fetch_params *p) {
    const uint64_t ctas = (uint64_t)p->n_seqs * p->n_kv_heads * p->top_k / SPECACHE_FETCH_CTA_PAIRS;
    if (ctas < SPECACHE_FETCH_MIN_CTAS) return SPECACHE_FETCH_MIN_CTAS;
    return ctas < SPECACHE_FETCH_MAX_CTAS ? ctas : SPECACHE_FETCH_MAX_CTAS;
}

specache_status specache_fetch_plan(const specache_fetch_params *p, specache_launch *launch) {
    clear(launch);
    if (p->head_dim != 64 && p->head_dim != 128)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEAD_DIM, "fetch: head_dim %u (64 or 128)", p->head_dim);
    TRY(check_lists("fetch", p->n_seqs, p->n_kv_heads, p->top_k, launch));
    if (p->n_seqs == 0 || p->top_k == 0) return SPECACHE_OK;
    const Address all[] = {{"seqs", p->seqs, 16, REQUIRED},
                           {"caches", p->caches, 16, REQUIRED},
                           {"fetches", p->fetches, 8, REQUIRED},
                           {"fetch_counts", p->fetch_counts, 4, REQUIRED},
                           {"fetched", p->fetched, 8, OPTIONAL},
                           {"gathered", p->gathered, 16, OPTIONAL}};
    CHECK_ADDRESSES("fetch", all, launch);
    return planned(launch, "specache_fetch_pairs", p->n_ctas == 0 ? own_ctas(p) : p->n_ctas, SPECACHE_FETCH_THREADS);
}

specache_status specache_post_plan(const specache_post_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_lists("post", p->n_seqs, p->n_kv_heads, p->top_k, launch));
    if (p->n_seqs == 0 || p->top_k == 0) return SPECACHE_OK;
    const Address all[] = {{"seqs", p->seqs, 16, REQUIRED},
                           {"fetches", p->fetches, 8, REQUIRED},
                           {"fetch_counts", p->fetch_counts, 4, REQUIRED},
                           {"wanted", p->wanted, 8, REQUIRED},
                           {"bell", p->bell, 4, REQUIRED}};
    CHECK_ADDRESSES("post", all, launch);
    return planned(launch, "specache_post_wanted", 1, SPECACHE_POST_THREADS);
}
