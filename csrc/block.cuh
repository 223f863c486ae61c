// What the threads of a block do together.
#pragma once

#include "common.cuh"

namespace specache {

// The sum of `value` over the threads before this one, and over all of them. `warp_sums` is a word of shared memory for
// each warp, free again afterwards.
template <class T, uint32_t WARPS> SPECACHE_DEVICE T block_scan(T (&warp_sums)[WARPS], T value, T& total) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    T through = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const T other = __shfl_up_sync(~0u, through, distance);
        through += int(lane) >= distance ? other : 0;
    }
    if (lane == 31) warp_sums[warp] = through;
    __syncthreads();
    T before = 0;
    total = 0;
#pragma unroll
    for (uint32_t w = 0; w < WARPS; w++) {
        if (w == warp) before = total;
        total += warp_sums[w];
    }
    __syncthreads();
    return before + through - value;
}

}   // namespace specache
