// What lies between the matrix products of a layer when cuBLASLt makes them: for the rows of a prefill, thousands of
// them, and for those of a decode step where the fused kernels (linear.cu) are not used.
//
//   norm16       x           -> 16-bit rows, operand of the products for q, k and v
//   finish_qkv   q k v       -> biases, norms of heads, RoPE; q stays fp32, K and V go to the cache
//   round16      attention   -> 16-bit rows, operand of W_o, whose product adds to x
//   norm16       x           -> 16-bit rows, operand of gate and up
//   swiglu16     gate, up    -> 16-bit rows, operand of W_down, whose product adds to x
//
// Products take 16-bit operands of the weights' type, x rounded to it once, and give fp32 sums: as Hugging Face has it,
// with 2^-12 (fp16) or 2^-9 (bf16) of error where the fused kernels have 2^-16. Weights of fp32 have no such products.
//
// All of it is bound by memory. norm16 reads a row twice, the second time from L1; lanes that follow each other read
// and write what follows each other, 8 to 32 bytes at a time.
#include "kernels.h"
#include "rows.cuh"

namespace specache {

constexpr uint32_t kDenseWarps = SPECACHE_DENSE_THREADS / 32;

SPECACHE_DEVICE float4 load_four(uint64_t address, size_t four) {
    return load_device(pointer<float4>(address) + four);
}

// Eight numbers, rounded.
template <class T> SPECACHE_DEVICE uint4 narrow_eight(const float4& a, const float4& b) {
    return make_uint4(T::narrow(a.x, a.y), T::narrow(a.z, a.w), T::narrow(b.x, b.y), T::narrow(b.z, b.w));
}

// ---- norm16: a CTA for each row ---------------------------------------------------------------------------------

struct NormShared {
    float squares[kDenseWarps];
};

SPECACHE_DEVICE float sum_block(NormShared& shared, float x) {
    x = sum_lanes(x);
    if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = x;
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
    __syncthreads();
#endif
    float sum = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < kDenseWarps; w++) sum += shared.squares[w];
    return sum;
}

template <class T> SPECACHE_DEVICE void norm16(const specache_norm16_params& p) {
    SPECACHE_SHARED(NormShared, shared);
    follow_previous_kernel();
    const uint32_t row = blockIdx.x, fours = p.hidden / 4;
    const size_t first = size_t(row) * fours;
    float squares = 0.0f;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < fours; i += SPECACHE_DENSE_THREADS) {
        const float4 x = load_four(p.x, first + i);
        squares = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, squares))));
    }
    squares = sum_block(shared, squares);
    if (threadIdx.x == 0 && p.bad_layer != 0) note_bad_layer(p.bad_layer, row, squares, p.layer);
    const float scale = inverse_rms(squares, int(p.hidden), p.eps);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < fours; i += SPECACHE_DENSE_THREADS) {
        const float4 x = load_four(p.x, first + i), w = load_four(p.norm, i);
        store_device(reinterpret_cast<uint2*>(p.y) + first + i,
                     make_uint2(T::narrow(x.x * scale * w.x, x.y * scale * w.y),
                                T::narrow(x.z * scale * w.z, x.w * scale * w.w)));
    }
}

// ---- finish_qkv: a warp for each row and head -------------------------------------------------------------------

SPECACHE_DEVICE void finish_qkv(const specache_finish_qkv_params& p) {
    follow_previous_kernel();
    const uint32_t heads = p.n_heads + 2 * p.n_kv_heads, unit = blockIdx.x * kDenseWarps + threadIdx.x / 32;
    const uint32_t row = unit / heads, head = unit % heads, lane = threadIdx.x % 32, half = p.head_dim / 2;
    if (row >= p.n_rows) return;
    const bool is_q = head < p.n_heads, is_v = head >= p.n_heads + p.n_kv_heads;
    const uint32_t own_head = is_q ? head : is_v ? head - p.n_heads - p.n_kv_heads : head - p.n_heads;
    const uint64_t bias = is_q ? p.q_bias : is_v ? p.v_bias : p.k_bias, norm = is_q ? p.q_norm : is_v ? 0 : p.k_norm;
    const size_t from = size_t(unit) * p.head_dim;

    Pair x[kMostPairs];
    float squares = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kMostPairs; i++) {
        const uint32_t channel = lane + 32 * i;
        x[i] = Pair{};
        if (channel >= half) continue;
        const size_t of_bias = size_t(own_head) * p.head_dim + channel;
        x[i] = Pair{optional_f32(p.products, from + channel) + optional_f32(bias, of_bias),
                    optional_f32(p.products, from + channel + half) + optional_f32(bias, of_bias + half)};
        squares += x[i].a * x[i].a + x[i].b * x[i].b;
    }
    const float scale = norm == 0 ? 1.0f : inverse_rms(sum_lanes(squares), int(p.head_dim), p.eps);
    const uint64_t token = is_q ? 0 : load_device(pointer<uint64_t>(p.append) + row);
    const size_t to = (size_t(row) * p.n_heads + own_head) * p.head_dim;
#pragma unroll
    for (uint32_t i = 0; i < kMostPairs; i++) {
        const uint32_t channel = lane + 32 * i;
        if (channel >= half) continue;
        Pair y = x[i];
        if (norm != 0)
            y = Pair{y.a * scale * optional_f32(norm, channel), y.b * scale * optional_f32(norm, channel + half)};
#if SPECACHE_INJECTED_BUG == 2   // the tests must see V that is rotated
        y = rotate(y, cos_sin_of(p, int(row), int(channel)));
#else
        if (!is_v) y = rotate(y, cos_sin_of(p, int(row), int(channel)));
#endif
        if (is_q) {
            store_f32(p.q, to + channel, y.a);
            store_f32(p.q, to + channel + half, y.b);
        } else {
            append_pair(p, token, int(own_head), is_v, int(channel), y);
        }
    }
}

// ---- round16, swiglu16: eight numbers a thread ------------------------------------------------------------------

template <class T> SPECACHE_DEVICE void round16(const specache_round16_params& p) {
    follow_previous_kernel();
    const size_t eight = size_t(blockIdx.x) * SPECACHE_DENSE_THREADS + threadIdx.x;
    if (eight >= p.count / 8) return;
    store_16(reinterpret_cast<uint4*>(p.y) + eight,
             narrow_eight<T>(load_four(p.x, 2 * eight), load_four(p.x, 2 * eight + 1)));
}

SPECACHE_DEVICE float4 add_bias(float4 x, uint64_t bias, size_t four) {
    if (bias == 0) return x;
    const float4 b = load_four(bias, four);
    return make_float4(x.x + b.x, x.y + b.y, x.z + b.z, x.w + b.w);
}

template <class T> SPECACHE_DEVICE void swiglu16(const specache_swiglu16_params& p) {
    follow_previous_kernel();
    const uint32_t eights = p.intermediate / 8;   // of a row
    const size_t index = size_t(blockIdx.x) * SPECACHE_DENSE_THREADS + threadIdx.x;
    const size_t row = index / eights, eight = index % eights;
    if (row >= p.n_rows) return;
    float4 y[2];
#pragma unroll
    for (size_t h = 0; h < 2; h++) {
        const size_t column = 2 * eight + h, at = row * (p.stride / 4) + column;
        const float4 gate = add_bias(load_four(p.gate, at), p.gate_bias, column);
        const float4 up = add_bias(load_four(p.up, at), p.up_bias, column);
        y[h] = make_float4(silu(gate.x) * up.x, silu(gate.y) * up.y, silu(gate.z) * up.z, silu(gate.w) * up.w);
    }
    store_16(reinterpret_cast<uint4*>(p.y) + index, narrow_eight<T>(y[0], y[1]));
}

}   // namespace specache

// registers: <= 64 specache_norm16_*     (4 CTAs of 256 threads an SM)
// registers: <= 64 specache_round16_*
// registers: <= 64 specache_swiglu16_*
#define SPECACHE_DENSE_KERNEL(dtype, T)                                                 \
    extern "C" __global__ void __launch_bounds__(SPECACHE_DENSE_THREADS)                \
        specache_norm16_##dtype(const __grid_constant__ specache_norm16_params p) {     \
        specache::norm16<specache::T>(p);                                               \
    }                                                                                   \
    extern "C" __global__ void __launch_bounds__(SPECACHE_DENSE_THREADS)                \
        specache_round16_##dtype(const __grid_constant__ specache_round16_params p) {   \
        specache::round16<specache::T>(p);                                              \
    }                                                                                   \
    extern "C" __global__ void __launch_bounds__(SPECACHE_DENSE_THREADS)                \
        specache_swiglu16_##dtype(const __grid_constant__ specache_swiglu16_params p) { \
        specache::swiglu16<specache::T>(p);                                             \
    }
SPECACHE_DENSE_KERNELS(SPECACHE_DENSE_KERNEL)
#undef SPECACHE_DENSE_KERNEL

// registers: <= 64 specache_finish_qkv
extern "C" __global__ void __launch_bounds__(SPECACHE_DENSE_THREADS)
    specache_finish_qkv(const __grid_constant__ specache_finish_qkv_params p) {
    specache::finish_qkv(p);
}
