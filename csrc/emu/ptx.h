// ptx.cuh on the CPU: checked memory accesses, and the tensor-core instructions by their definition.
#pragma once

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

inline float emu_half(uint32_t pair, int element) {
    return __half2float(bit_cast<__half>(uint16_t(pair >> (16 * element))));
}

// Each lane computes its four sums from what all lanes gave: row g = lane / 4 (and g + 8), columns 2j, 2j + 1.
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto& all = emu::Block::current().exchange("mma.m16n8k16", mine, 6);
    const int lane = emu::Block::current().lane();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4, row_half = i / 2, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            const int octet = k / 8, pair = k % 8 / 2, element = k % 2;
            sum += emu_half(all[row * 4 + pair][2 * octet + row_half], element) *
                   emu_half(all[column * 4 + pair][4 + octet], element);
        }
        d[i] += sum;
    }
}

inline uint32_t transpose_8x8(uint32_t row) {
    const auto& all = emu::Block::current().exchange("movmatrix", &row, 1);
    const int lane = emu::Block::current().lane(), i = lane / 4, j = lane % 4;
    uint32_t column = 0;
    for (int e = 0; e < 2; e++) column |= (all[(2 * j + e) * 4 + i / 2][0] >> (16 * (i % 2)) & 0xFFFF) << (16 * e);
    return column;
}

// ---- the dense half of a step ----

inline uint4 load_weight(const void* from) { return load_streaming(from); }

template <class V> V load_value(const void* from) {
    emu::check_access(from, sizeof(V), false);
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
}

template <class V> void store_value(void* to, V value) {
    emu::check_access(to, sizeof(V), true);
    std::memcpy(to, &value, sizeof(V));
}

inline uint32_t block_index() { return blockIdx.x; }

inline float emu_bf16(uint32_t pair, int element) { return bit_cast<float>(pair >> (16 * element) << 16); }

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto& all = emu::Block::current().exchange("mma.m16n8k16.bf16", mine, 6);
    const int lane = emu::Block::current().lane();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4, row_half = i / 2, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            const int octet = k / 8, pair = k % 8 / 2, element = k % 2;
            sum += emu_bf16(all[row * 4 + pair][2 * octet + row_half], element) *
                   emu_bf16(all[column * 4 + pair][4 + octet], element);
        }
        d[i] += sum;
    }
}

// Kernels of the emulation run one after the other.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

}   // namespace specache
