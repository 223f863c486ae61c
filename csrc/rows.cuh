// What the kernels of the dense half do with a row: RMS, SwiGLU, RoPE, and where its K and V go.
#pragma once

#include "ptx.cuh"

namespace specache {

template <class V> SPECACHE_DEVICE const V* pointer(uint64_t address) { return reinterpret_cast<const V*>(address); }

// A float of device memory, or 0 where there is no such vector.
SPECACHE_DEVICE float optional_f32(uint64_t address, size_t index) {
    return address == 0 ? 0.0f : load_device(pointer<float>(address) + index);
}

SPECACHE_DEVICE void store_f32(uint64_t address, size_t index, float value) {
    store_device(reinterpret_cast<float*>(address) + index, value);
}

SPECACHE_DEVICE float sum_lanes(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// What RMS norm multiplies a row by.
SPECACHE_DEVICE float inverse_rms(float squares, int width, float eps) {
    return 1.0f / sqrtf(squares / float(width) + eps);
}

// Whether a row is finite, by its sum of squares: neither inf nor NaN.
SPECACHE_DEVICE bool is_finite(float squares) { return squares < bit_cast<float>(0x7F800000u); }

// Notes the layer if it is the first at which the row, by its sum of squares, is not finite.
SPECACHE_DEVICE void note_bad_layer(uint64_t bad_layer, size_t row, float squares, uint32_t layer) {
    uint32_t* bad = reinterpret_cast<uint32_t*>(bad_layer) + row;
    if (!is_finite(squares) && load_device(bad) == SPECACHE_NONE) store_device(bad, layer);
}

SPECACHE_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

// Two numbers that belong together: channels c and c + D/2 of a head, or gate and up.
struct Pair {
    float a;
    float b;
};

// RoPE of channels c and c + D/2, halves against each other as Hugging Face has it.
SPECACHE_DEVICE Pair rotate(Pair x, float2 cos_sin) {
    return Pair{x.a * cos_sin.x - x.b * cos_sin.y, x.b * cos_sin.x + x.a * cos_sin.y};
}

// P: parameters with rope and head_dim.
template <class P> SPECACHE_DEVICE float2 cos_sin_of(const P& p, int row, int channel) {
    return load_device(pointer<float2>(p.rope) + size_t(row) * (p.head_dim / 2) + channel);
}

// Writes two channels of K (part 0) or V (part 1) of a token, rounded to the cache's type, at half a head's distance.
// P: parameters with head_dim and kv_dtype.
template <class P>
SPECACHE_DEVICE void append_pair(const P& p, uint64_t token, int head, int part, int channel, Pair x) {
    if (token == 0) return;   // a row that is kept nowhere
    const size_t half = p.head_dim / 2;
    uint16_t* to = reinterpret_cast<uint16_t*>(token) + size_t(head) * SPECACHE_PAGE * 2 * p.head_dim +
                   size_t(part) * p.head_dim + channel;
    const uint32_t bits = p.kv_dtype == SPECACHE_BF16 ? Bf16::narrow(x.a, x.b) : Fp16::narrow(x.a, x.b);
    store_device(to, uint16_t(bits & 0xFFFF));
    store_device(to + half, uint16_t(bits >> 16));
}

// Pairs of a lane where a warp has a head: head_dim up to 256.
constexpr int kMostPairs = 4;

}   // namespace specache
