/* The launch plans of sample.cu. */
#include "plan.h"

static specache_status check(const specache_argmax_params *p, specache_launch *launch) {
    clear(launch);
    TRY(check_rows("argmax", p->n_rows, launch));
    if (p->vocab == 0 || p->vocab > 1u << 24)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "argmax: a vocabulary of %u (1 to %u)", p->vocab, 1u << 24);
    if (p->n_rows == 0) return SPECACHE_OK;
    const Address all[] = {{"logits", p->logits, 4, REQUIRED},
                           {"tokens", p->tokens, 4, OPTIONAL},
                           {"scratch", p->scratch, 16, REQUIRED},
                           {"choices", p->choices, 16, REQUIRED}};
    CHECK_ADDRESSES("argmax", all, launch);
    return SPECACHE_OK;
}

specache_status specache_argmax_slices_plan(const specache_argmax_params *p, specache_launch *launch) {
    TRY(check(p, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    const uint64_t slices = (p->vocab + SPECACHE_ARGMAX_SLICE - 1) / SPECACHE_ARGMAX_SLICE;
    return planned(launch, "specache_argmax_slices", p->n_rows * slices, SPECACHE_ARGMAX_THREADS);
}

specache_status specache_argmax_merge_plan(const specache_argmax_params *p, specache_launch *launch) {
    TRY(check(p, launch));
    if (p->n_rows == 0) return SPECACHE_OK;
    return planned(launch, "specache_argmax_merge", p->n_rows, SPECACHE_ARGMAX_MERGE_THREADS);
}
