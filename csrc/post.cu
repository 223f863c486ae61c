// The post: which pairs the selection wants, told to threads of the host that gather them.
//
// The list goes straight into pinned memory, and behind it one word that a thread of the host polls: the way there takes
// about a microsecond, where a callback of the driver takes 26 (docs/design.md). It is short: 8 bytes a pair, 4 KB a layer
// for one sequence of 8 KV heads and k = 64, 98 KB for 24 of them. So one CTA does it, and nothing has to be agreed on
// before the bell rings.
#include "fetch_list.cuh"
#include "kernels.h"

namespace specache {

constexpr uint32_t kPostThreads = SPECACHE_POST_THREADS;

// The pairs of the heads from `first` on, of which there are `n`, behind those of other heads.
SPECACHE_DEVICE void post_heads(const specache_post_params& p, uint32_t first, uint32_t n, uint32_t before,
                                const FetchList<kPostThreads>& list) {
#pragma unroll 4
    for (uint32_t pair = threadIdx.x; pair < n; pair += kPostThreads) {
        uint32_t in_head;
        const uint32_t head = first + head_of(list, pair, in_head);
        const uint2 fetch =   // slot, position
            load_device(reinterpret_cast<const uint2*>(p.fetches) + uint64_t(head) * p.top_k + in_head);
#if SPECACHE_INJECTED_BUG == 3   // the tests must see pairs that overwrite those of other heads
        before = 0;
#endif
        store_device(reinterpret_cast<uint2*>(p.wanted) + before + pair, make_uint2(head, fetch.y));
    }
}

SPECACHE_DEVICE void post_wanted(const specache_post_params& p) {
    follow_previous_kernel();
    SPECACHE_SHARED(FetchList<kPostThreads>, list);
    uint32_t posted = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < p.n_seqs * p.n_kv_heads; first += kPostThreads) {
        const uint32_t pairs = sum_counts(p, first, list);
        post_heads(p, first, pairs, posted, list);
        posted += pairs;
        __syncthreads();   // nobody looks for heads any more, and all of them are posted
    }
    if (threadIdx.x == 0) store_release_system(reinterpret_cast<uint32_t*>(p.bell), 1 + posted);
}

}   // namespace specache

// registers: <= 64 specache_post_wanted
extern "C" __global__ void __launch_bounds__(SPECACHE_POST_THREADS)
    specache_post_wanted(const __grid_constant__ specache_post_params p) {
    specache::post_wanted(p);
}
