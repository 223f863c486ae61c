// The pairs that the selection has left to be fetched, as one list over all heads: how long it is, and whose its entries
// are.
#pragma once

#include "block.cuh"
#include "seq.cuh"

namespace specache {

// As many heads as a block has threads.
template <uint32_t THREADS> struct FetchList {
    uint32_t ends[THREADS];   // pairs of the heads up to and with each
    uint32_t warp_sums[THREADS / 32];
};

// Pairs of one head; none where the sequence's entry is not in use.
template <class Params> SPECACHE_DEVICE uint32_t count_of(const Params& p, uint32_t head) {
    if (head >= p.n_seqs * p.n_kv_heads || load_seq(p.seqs, head / p.n_kv_heads).n_rows == 0) return 0;
    return load_device(reinterpret_cast<const uint32_t*>(p.fetch_counts) + head);
}

// Lists the heads from `first` on. Returns how many pairs they want.
template <class Params, uint32_t THREADS>
SPECACHE_DEVICE uint32_t sum_counts(const Params& p, uint32_t first, FetchList<THREADS>& list) {
    const uint32_t own = count_of(p, first + threadIdx.x);
    uint32_t all;
    list.ends[threadIdx.x] = block_scan(list.warp_sums, own, all) + own;
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
    __syncthreads();
#endif
    return all;
}

// The first head of the list whose end is beyond `pair`, and which of that head's pairs it is.
template <uint32_t THREADS>
SPECACHE_DEVICE uint32_t head_of(const FetchList<THREADS>& list, uint32_t pair, uint32_t& in_head) {
    uint32_t low = 0;
#pragma unroll 1
    for (uint32_t step = THREADS / 2; step != 0; step /= 2)
        if (list.ends[low + step - 1] <= pair) low += step;
    in_head = pair - (low == 0 ? 0 : list.ends[low - 1]);
    return low;
}

}   // namespace specache
