// The next token from logits, greedily: the highest of each row, the lower token of equals, and whether every logit is
// a number that a token can be chosen by.
//
// Two kernels: a CTA for each slice of a row, then a warp for each row over its slices. A row of 128 k logits read by
// one SM would take 5 us; in slices of 1024 it is the latency of two small kernels (of 8192, 16 us: 32 comparisons, each
// of which waits for the one before).
#include "ptx.cuh"
#include "kernels.h"

namespace specache {

constexpr int kArgmaxWarps = SPECACHE_ARGMAX_THREADS / 32;

// NaN and +inf: with them no token can be chosen. -inf is a token that is ruled out.
SPECACHE_DEVICE bool is_bad(float logit) { return !(logit < bit_cast<float>(0x7F800000u)); }

SPECACHE_DEVICE specache_choice no_choice() {
    return specache_choice{SPECACHE_NONE, SPECACHE_NONE, bit_cast<float>(0xFF800000u), 0};
}

SPECACHE_DEVICE uint32_t lower(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Comparisons with NaN are false: it is never the highest.
SPECACHE_DEVICE specache_choice better(const specache_choice& a, const specache_choice& b) {
#if SPECACHE_INJECTED_BUG == 5   // the tests must see a tie that goes to whoever comes last
    const bool second = b.logit >= a.logit && b.token != SPECACHE_NONE;
#else
    const bool second = b.logit > a.logit || (b.logit == a.logit && b.token < a.token);
#endif
    return specache_choice{second ? b.token : a.token, lower(a.first_bad, b.first_bad), second ? b.logit : a.logit, 0};
}

SPECACHE_DEVICE specache_choice better_of_lanes(specache_choice mine) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const specache_choice other{__shfl_xor_sync(~0u, mine.token, distance),
                                    __shfl_xor_sync(~0u, mine.first_bad, distance),
                                    __shfl_xor_sync(~0u, mine.logit, distance), 0};
        mine = better(mine, other);
    }
    return mine;
}

SPECACHE_DEVICE uint32_t argmax_slices(const specache_argmax_params& p) {
    return (p.vocab + SPECACHE_ARGMAX_SLICE - 1) / SPECACHE_ARGMAX_SLICE;
}

SPECACHE_DEVICE void store_choice(uint64_t address, size_t index, const specache_choice& choice) {
    store_16(reinterpret_cast<uint4*>(address) + index,
             make_uint4(choice.token, choice.first_bad, bit_cast<uint32_t>(choice.logit), 0));
}

// Step 1: the best of one slice of one row.
SPECACHE_DEVICE void best_of_slice(const specache_argmax_params& p) {
    struct Shared {
        specache_choice best[kArgmaxWarps];
    };
    SPECACHE_SHARED(Shared, shared);
    follow_previous_kernel();
    const uint32_t slices = argmax_slices(p), row = blockIdx.x / slices, slice = blockIdx.x % slices;
    const float* logits = reinterpret_cast<const float*>(p.logits) + size_t(row) * p.vocab;
    const uint32_t first = slice * SPECACHE_ARGMAX_SLICE, end = lower(first + SPECACHE_ARGMAX_SLICE, p.vocab);
    specache_choice best = no_choice();
#pragma unroll 4
    for (uint32_t token = first + threadIdx.x; token < end; token += SPECACHE_ARGMAX_THREADS) {
        const float logit = load_device(logits + token);
        best = better(best, specache_choice{token, is_bad(logit) ? token : SPECACHE_NONE, logit, 0});
    }
    best = better_of_lanes(best);
    if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < kArgmaxWarps; w++) best = better(best, shared.best[w]);
    store_choice(p.scratch, blockIdx.x, best);
}

// Step 2: the best of a row's slices. Token 0 where all logits are NaN, as on the CPU.
SPECACHE_DEVICE void best_of_row(const specache_argmax_params& p) {
    follow_previous_kernel();
    const uint32_t slices = argmax_slices(p), row = blockIdx.x;
    specache_choice best = no_choice();
    for (uint32_t s = threadIdx.x; s < slices; s += 32) {
        const uint4 words = load_device(reinterpret_cast<const uint4*>(p.scratch) + size_t(row) * slices + s);
        best = better(best, specache_choice{words.x, words.y, bit_cast<float>(words.z), 0});
    }
    best = better_of_lanes(best);
    if (threadIdx.x != 0) return;
    if (best.token == SPECACHE_NONE) best.token = 0;
    store_choice(p.choices, row, best);
    if (p.tokens != 0) store_device(reinterpret_cast<uint32_t*>(p.tokens) + row, best.token);
}

}   // namespace specache

// registers: <= 48 specache_argmax_*   (4 loads in flight)
extern "C" __global__ void __launch_bounds__(SPECACHE_ARGMAX_THREADS)
    specache_argmax_slices(const __grid_constant__ specache_argmax_params p) {
    specache::best_of_slice(p);
}

extern "C" __global__ void __launch_bounds__(SPECACHE_ARGMAX_MERGE_THREADS)
    specache_argmax_merge(const __grid_constant__ specache_argmax_params p) {
    specache::best_of_row(p);
}
