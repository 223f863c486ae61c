/* How attention of a prefill is cut into CTAs, and what shared memory they need. Arithmetic only, for C, C++ and CUDA:
 * kernel and launch plan agree on it. Included after common.cuh where there are kernels. */
#ifndef SPECACHE_PREFILL_WORK_H
#define SPECACHE_PREFILL_WORK_H

#include "kernels.h"

#ifndef SPECACHE_HOST_DEVICE
#define SPECACHE_HOST_DEVICE static inline
#endif

#ifdef __cplusplus
namespace specache {
#endif

/* Query rows of a warp, two tiles of mma: each fragment of K and V that a warp loads is used twice. */
static const uint32_t kWarpQueries = 32;
/* Keys of a stage. A page has two such tiles. */
static const uint32_t kTileKeys = 32;

typedef struct PrefillShape {
    uint32_t warps; /* 0: not enough shared memory */
    uint32_t stages;
} PrefillShape;

SPECACHE_HOST_DEVICE uint32_t prefill_shared_bytes(uint32_t head_dim, PrefillShape shape) {
    return shape.warps * kWarpQueries * 2 * head_dim + shape.stages * kTileKeys * 4 * head_dim;
}

/* Whether a multiprocessor has room for this many CTAs: each costs 1 KB more, and there is that much more than a CTA
 * may take. */
SPECACHE_HOST_DEVICE int prefill_fits(uint32_t head_dim, PrefillShape shape, uint32_t ctas, uint32_t shared_limit) {
    return ctas * (prefill_shared_bytes(head_dim, shape) + 1024) <= shared_limit + 1024;
}

/* Eight warps for each multiprocessor, two to hide each other's latencies on each of its four quarters: in two CTAs of
 * four warps where that fits, else in one of eight. */
SPECACHE_HOST_DEVICE PrefillShape prefill_shape(uint32_t head_dim, uint32_t shared_limit) {
    PrefillShape shape = {4, 3};
    if (prefill_fits(head_dim, shape, 2, shared_limit)) return shape;
    shape.stages = 2;
    if (prefill_fits(head_dim, shape, 2, shared_limit)) return shape;
    shape.warps = SPECACHE_PREFILL_THREADS(head_dim) / 32;
    if (prefill_fits(head_dim, shape, 1, shared_limit)) return shape;
    shape.warps = 4;
    if (!prefill_fits(head_dim, shape, 1, shared_limit)) shape.warps = 0;
    return shape;
}

/* CTAs of a kernel on a multiprocessor: as many as its registers and shared memory hold. */
SPECACHE_HOST_DEVICE uint32_t prefill_ctas_per_sm(uint32_t head_dim, PrefillShape shape, uint32_t shared_limit) {
    const uint32_t most = SPECACHE_PREFILL_THREADS(head_dim) * SPECACHE_PREFILL_CTAS(head_dim) / (shape.warps * 32);
    uint32_t ctas = 1;
    while (ctas < most && prefill_fits(head_dim, shape, ctas + 1, shared_limit)) ctas++;
    return ctas;
}

#ifdef __cplusplus
}   // namespace specache
#endif

#endif
