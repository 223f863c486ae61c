/* The launch plan of fetch.cu. */
#include "../attn_work.h"
#include "plan.h"

static specache_status check_shape(const specache_fetch_params *p, specache_launch *launch) {
    if (p->head_dim != 64 && p->head_dim != 128)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEAD_DIM, "fetch: head_dim %u (64 or 128)", p->head_dim);
    if (p->top_k > kMostTopK)
        return refuse(launch, SPECACHE_UNSUPPORTED_TOP_K, "fetch: top_k %u (at most %u)", p->top_k, kMostTopK);
    if (p->n_kv_heads == 0 || p->n_kv_heads > MOST_HEADS)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEADS, "fetch: %u KV heads (1 to %u)", p->n_kv_heads, MOST_HEADS);
    if (p->n_seqs > MOST_SEQS || (uint64_t)p->n_seqs * p->n_kv_heads > MOST_CTAS)
        return refuse(launch, SPECACHE_TOO_LARGE, "fetch: %u sequences of %u KV heads", p->n_seqs, p->n_kv_heads);
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
    TRY(check_shape(p, launch));
    if (p->n_seqs == 0 || p->top_k == 0) return SPECACHE_OK;
    const Address all[] = {{"seqs", p->seqs, 16, REQUIRED},
                           {"caches", p->caches, 16, REQUIRED},
                           {"fetches", p->fetches, 8, REQUIRED},
                           {"fetch_counts", p->fetch_counts, 4, REQUIRED},
                           {"fetched", p->fetched, 8, OPTIONAL}};
    CHECK_ADDRESSES("fetch", all, launch);
    return planned(launch, "specache_fetch_pairs", p->n_ctas == 0 ? own_ctas(p) : p->n_ctas, SPECACHE_FETCH_THREADS);
}
