// ptx.cuh on the CPU: checked memory accesses, and the tensor-core instructions by their definition.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda.h"
#include "memory.h"

namespace specache {

inline uint4 load_streaming(const void* from) {
    emu::check_access(from, 16, false);
    uint4 v;
    std::memcpy(&v, from, 16);
    return v;
}

inline uint32_t load_u32(const void* from) {
    emu::check_access(from, 4, false);
    uint32_t v;
    std::memcpy(&v, from, 4);
    return v;
}

inline void store_16(void* to, uint4 v) {
    emu::check_access(to, 16, true);
    std::memcpy(to, &v, 16);
}

inline float2 widen_fp16(uint32_t pair) { return __half22float2(bit_cast<__half2>(pair)); }
inline uint32_t narrow_fp16(float x, float y) { return bit_cast<uint32_t>(__floats2half2_rn(x, y)); }
inline uint32_t narrow_bf16(float x, float y) { return bit_cast<uint32_t>(__floats2bfloat162_rn(x, y)); }

inline uint32_t multiply_fp16(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
}

// Widening by the headers' function takes longer than all the rest of a product.
inline float emu_half(uint32_t pair, int element) {
    static const std::vector<float> widened = [] {
        std::vector<float> all(1 << 16);
        for (uint32_t bits = 0; bits < all.size(); bits++) all[bits] = __half2float(bit_cast<__half>(uint16_t(bits)));
        return all;
    }();
    return widened[pair >> (16 * element) & 0xFFFF];
}

inline float emu_bf16(uint32_t pair, int element) {
    return bit_cast<float>(element == 0 ? pair << 16 : pair & 0xFFFF0000u);
}

// A warp's product from what its lanes i, j (lane = 4i + j) gave: rows i and i + 8 of A, column i of B.
template <float (*kWiden)(uint32_t, int)>
void emu_multiply(const emu::Block::Operands& all, float (&sums)[emu::kLanes][4]) {
    float a[16][16], b[16][8], d[16][8] = {};
    for (int lane = 0; lane < emu::kLanes; lane++)
        for (int octet = 0; octet < 2; octet++)
            for (int e = 0; e < 2; e++) {
                const int i = lane / 4, k = 8 * octet + lane % 4 * 2 + e;
                for (int half = 0; half < 2; half++) a[i + 8 * half][k] = kWiden(all[lane][2 * octet + half], e);
                b[k][i] = kWiden(all[lane][4 + octet], e);
            }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < emu::kLanes; lane++)
        for (int i = 0; i < 4; i++) sums[lane][i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <float (*kWiden)(uint32_t, int)>
void emu_mma(const char* operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const float* sums = emu::Block::current().product(operation, mine, 6, emu_multiply<kWiden>);
    for (int i = 0; i < 4; i++) d[i] += sums[i];
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu_mma<emu_half>("mma.m16n8k16", d, a, b0, b1);
}

inline uint32_t transpose_8x8(uint32_t row) {
    const auto& all = emu::Block::current().exchange("movmatrix", &row, 1);
    const int lane = emu::Block::current().lane(), i = lane / 4, j = lane % 4;
    uint32_t column = 0;
    for (int e = 0; e < 2; e++) column |= (all[(2 * j + e) * 4 + i / 2][0] >> (16 * (i % 2)) & 0xFFFF) << (16 * e);
    return column;
}

// ---- attention and selection ----

template <class T> T load_device(const T* from) {
    emu::check_access(from, sizeof(T), false);
    return *from;
}

inline void store_release_system(uint32_t* to, uint32_t v) {
    emu::check_access(to, 4, true);
    __atomic_store_n(to, v, __ATOMIC_RELEASE);
}

template <class T> void store_device(T* to, T v) {
    emu::check_access(to, sizeof(T), true);
    *to = v;
}

// A copy shows only when it is waited for: until then its destination holds poison, and must still hold it then.
inline void copy_async_16(void* to, const void* from, uint32_t bytes) {
    if (uintptr_t(to) % 16 != 0 || (bytes != 0 && bytes != 16)) emu::fail("cp.async of %u bytes, or misaligned", bytes);
    if (bytes != 0) emu::check_access(from, 16, false);
    std::memset(to, emu::kCopyPoison, 16);
    emu::Block::current().thread().copies.push_back(emu::AsyncCopy{to, bytes == 0 ? nullptr : from});
}

inline void copy_async_commit() { emu::Block::current().thread().copies.push_back(emu::AsyncCopy{}); }

template <int N> void copy_async_wait() {
    auto& copies = emu::Block::current().thread().copies;
    auto ends_batch = [](const emu::AsyncCopy& c) { return c.to == nullptr; };
    for (auto batches = std::count_if(copies.begin(), copies.end(), ends_batch); batches > N;) {
        const emu::AsyncCopy copy = copies.front();
        copies.pop_front();
        if (ends_batch(copy)) batches--;
        else copy.arrive();
    }
}

// The pair at row `row`, columns 2j, 2j+1 of tile t, or of its transpose.
inline void emu_load_tiles(const char* operation, uint32_t (&tiles)[4], const void* row, bool transposed) {
    uint32_t address[2];
    std::memcpy(address, &row, sizeof address);
    const auto& all = emu::Block::current().exchange(operation, address, 2);
    const int lane = emu::Block::current().lane(), i = lane / 4, j = lane % 4;
    for (int t = 0; t < 4; t++) {
        uint16_t pair[2];
        for (int e = 0; e < 2; e++) {
            const int r = transposed ? 2 * j + e : i, column = transposed ? i : 2 * j + e;
            const uint16_t* at;
            std::memcpy(&at, all[8 * t + r], sizeof at);
            if (uintptr_t(at) % 16 != 0) emu::fail("%s of a misaligned row", operation);
            pair[e] = at[column];
        }
        tiles[t] = pair[0] | uint32_t(pair[1]) << 16;
    }
}

inline void load_tiles(uint32_t (&tiles)[4], const void* row) { emu_load_tiles("ldmatrix", tiles, row, false); }

inline void load_tiles_transposed(uint32_t (&tiles)[4], const void* row) {
    emu_load_tiles("ldmatrix.trans", tiles, row, true);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emu_mma<emu_bf16>("mma.m16n8k16.bf16", d, a, b0, b1);
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

inline uint32_t shared_add(uint32_t* to, uint32_t v) {
    const uint32_t before = *to;
    *to += v;
    return before;
}

inline void device_or(uint32_t* to, uint32_t v) {
    emu::check_access(to, 4, true);
    *to |= v;
}

inline void device_and(uint32_t* to, uint32_t v) {
    emu::check_access(to, 4, true);
    *to &= v;
}

// ---- the dense half of a step ----

inline uint4 load_weight(const void* from) { return load_streaming(from); }

inline uint32_t block_index() { return blockIdx.x; }

// Kernels of the emulation run one after the other; the emulated driver asks who has waited.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() { emu::Block::current().thread().after_previous = true; }

}   // namespace specache
