// The names of CUDA C++ that kernels use, on the CPU: built-in variables, barriers, warp functions, rounded arithmetic.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#define threadIdx (emu::Block::current().thread().index)
#define blockIdx (emu::Block::current().block_index)
#define blockDim (emu::Block::current().block_dim)
#define gridDim (emu::Block::current().grid_dim)

inline void __syncthreads() { emu::Block::current().barrier(); }

namespace emu {

inline void need_full_mask(unsigned mask) {
    if (mask != ~0u) fail("a warp function with mask %08x: kernels here use full masks only", mask);
}

// Gives `value` to the warp and takes lane `source`'s.
template <class T> T shuffle(const char* operation, T value, int source) {
    static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 4 * kOperands, "whole words");
    uint32_t words[sizeof(T) / 4];
    std::memcpy(words, &value, sizeof(T));
    const auto& all = Block::current().exchange(operation, words, sizeof(T) / 4);
    std::memcpy(&value, all[source], sizeof(T));
    return value;
}

inline uint32_t ballot(const char* operation, bool vote) {
    const uint32_t mine = vote;
    const auto& all = Block::current().exchange(operation, &mine, 1);
    uint32_t bits = 0;
    for (int l = 0; l < kLanes; l++) bits |= all[l][0] << l;
    return bits;
}

}   // namespace emu

inline void __syncwarp(unsigned mask = ~0u) {
    emu::need_full_mask(mask);
    emu::ballot("__syncwarp", true);
}

template <class T> T __shfl_sync(unsigned mask, T value, int source) {
    emu::need_full_mask(mask);
    return emu::shuffle("__shfl_sync", value, source % 32);
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int distance) {
    emu::need_full_mask(mask);
    return emu::shuffle("__shfl_xor_sync", value, emu::Block::current().lane() ^ distance);
}

template <class T> T __shfl_up_sync(unsigned mask, T value, int distance) {
    emu::need_full_mask(mask);
    const int lane = emu::Block::current().lane();
    return emu::shuffle("__shfl_up_sync", value, lane < distance ? lane : lane - distance);
}

template <class T> T __shfl_down_sync(unsigned mask, T value, int distance) {
    emu::need_full_mask(mask);
    const int lane = emu::Block::current().lane();
    return emu::shuffle("__shfl_down_sync", value, lane + distance > 31 ? lane : lane + distance);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
    emu::need_full_mask(mask);
    return emu::ballot("__ballot_sync", vote);
}

inline int __any_sync(unsigned mask, bool vote) {
    emu::need_full_mask(mask);
    return emu::ballot("__any_sync", vote) != 0;
}

inline int __all_sync(unsigned mask, bool vote) {
    emu::need_full_mask(mask);
    return emu::ballot("__all_sync", vote) == ~0u;
}

// Build with -ffp-contract=off: these promise one rounding each.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

// The upper half of a product.
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t(__extension__ (unsigned __int128)(a) * b >> 64); }

// Bits: the lowest set one, from 1 (0: none), and how many.
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace emu {

// Runs a grid, block after block, every block with an order of its own drawn from the seed.
inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed, bool early,
                     const std::function<void()>& body) {
    static Block runner;   // keeps the fibers' stacks
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++)
                runner.run(grid, block, uint3{x, y, z}, shared_bytes, seed++, early, body);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed,
            Arguments... arguments) {
    run_grid(grid, block, shared_bytes, seed, false, [&] { kernel(arguments...); });
}

}   // namespace emu
