// The dense half of a decode step for 1 to 16 rows: q, k, v with norm, RoPE and append; the two projections back into
// the residual stream; gate and up with norm and SwiGLU; logits with norm.
//
// All are the product of product.cuh, 32 features a CTA, and differ in which features those are and in what happens to
// the sums. The two tiles of a CTA are features that belong together, so that it happens in one thread:
//
//   q, k, v     channels c and c + D/2 of a head: the pair that RoPE rotates
//   gate, up    the same features of both
//   others      32 features that follow each other
//
// An extra kernel, for models that normalise the heads of q and k (Qwen3): a head is more than a CTA's features, so
// they leave the product as they are, and a warp for each row and head does the rest.
//
// Grids are whole in one wave or many: what a wave leaves over does not matter as long as its CTAs still saturate
// memory (product.cuh, "Bytes in flight"). Loads of an epilogue go out before the barrier that it waits for anyway.
#include "product.cuh"
#include "rows.cuh"
#include "kernels.h"

namespace specache {

SPECACHE_DEVICE int least(int a, int b) { return a < b ? a : b; }

// The first row of W of a tile.
template <class T> SPECACHE_DEVICE const uint8_t* weight_row(uint64_t address, size_t row, uint32_t k) {
    return pointer<uint8_t>(address) + row * k * Operand<T>::kBytes;
}

// ---- q, k, v ----

// The 16 pairs of channels that a CTA computes.
struct QkvUnit {
    enum Kind { kQ, kK, kV } kind;
    int head;    // among those of its kind
    int first;   // channel of the first half
};

SPECACHE_DEVICE QkvUnit qkv_unit(const specache_qkv_params& p) {
    const int tiles = int(p.head_dim / 2 + kTileFeatures - 1) / kTileFeatures;   // of half a head
    const int block = int(block_index()), head = block / tiles, first = block % tiles * kTileFeatures;
    const int heads = int(p.n_heads), kv_heads = int(p.n_kv_heads);
    if (head < heads) return QkvUnit{QkvUnit::kQ, head, first};
    if (head < heads + kv_heads) return QkvUnit{QkvUnit::kK, head - heads, first};
    return QkvUnit{QkvUnit::kV, head - heads - kv_heads, first};
}

template <class T> SPECACHE_DEVICE Factors qkv_factors(const specache_qkv_params& p, const QkvUnit& unit) {
    const uint64_t weight = unit.kind == QkvUnit::kQ ? p.q_weight : unit.kind == QkvUnit::kK ? p.k_weight : p.v_weight;
    const int half = int(p.head_dim) / 2, features = least(kTileFeatures, half - unit.first);
    const size_t row = size_t(unit.head) * p.head_dim + unit.first;
    return Factors{{weight_row<T>(weight, row, p.hidden), weight_row<T>(weight, row + half, p.hidden)},
                   {features, features},
                   pointer<float>(p.x),
                   pointer<float>(p.norm),
                   int(p.n_rows),
                   int(p.hidden)};
}

template <class T, int N_TILES> SPECACHE_DEVICE void qkv(const specache_qkv_params& p) {
    SPECACHE_SHARED(ProductShared<N_TILES>, shared);
    SPECACHE_DYNAMIC_SHARED(queue);
    Product<T, N_TILES, true> product(qkv_factors<T>(p, qkv_unit(p)), queue);
    product.run();
    product.store(shared);

    const QkvUnit unit = qkv_unit(p);   // not kept: the loop needs its registers
    const Cell cell = cell_of_thread();
    const int channel = unit.first + cell.feature, half = int(p.head_dim) / 2;
    const bool mine = cell.row < int(p.n_rows) && channel < half;
    const bool raw = unit.kind != QkvUnit::kV && p.q_norm != 0;   // the other kernel goes on with it
    Pair bias{}, x;
    float2 cos_sin = make_float2(1, 0);
    uint64_t token = 0;
    if (mine) {
        const uint64_t of_kind = unit.kind == QkvUnit::kQ ? p.q_bias : unit.kind == QkvUnit::kK ? p.k_bias : p.v_bias;
        const size_t feature = size_t(unit.head) * p.head_dim + channel;
        bias = Pair{optional_f32(of_kind, feature), optional_f32(of_kind, feature + half)};
        if (unit.kind != QkvUnit::kV && !raw) cos_sin = cos_sin_of(p, cell.row, channel);
        if (unit.kind != QkvUnit::kQ) token = load_device(pointer<uint64_t>(p.append) + cell.row);
    }
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
    __syncthreads();
#endif
    if (!mine) return;
    const float squares = sum_squares(shared, cell.row), scale = inverse_rms(squares, int(p.hidden), p.eps);
    const float2 sum = sum_warps<T>(shared, cell);
    x = rotate(Pair{sum.x * scale + bias.a, sum.y * scale + bias.b}, cos_sin);
    if (unit.kind == QkvUnit::kQ || raw) {
        const uint64_t to = unit.kind == QkvUnit::kQ ? p.q : p.k;
        const int heads = int(unit.kind == QkvUnit::kQ ? p.n_heads : p.n_kv_heads);
        const size_t at = (size_t(cell.row) * heads + unit.head) * p.head_dim + channel;
        store_f32(to, at, x.a);
        store_f32(to, at + half, x.b);
    } else {
        // The real row weighs the V of a speculative row with 0, and 0 times NaN would be NaN.
        const bool of_bad_row = unit.kind == QkvUnit::kV && !is_finite(squares);
        append_pair(p, token, unit.head, unit.kind == QkvUnit::kV, channel, of_bad_row ? Pair{} : x);
    }
    // CTA 0 notes the rows whose residual stream stopped being finite.
    if (blockIdx.x == 0 && cell.feature == 0) note_bad_layer(p.bad_layer, cell.row, squares, p.layer);
}

// ---- heads of q and k that have a norm of their own ----

// RMS norm and RoPE of one head of one row; q stays in its place, k goes to the cache.
SPECACHE_DEVICE void head_norm(const specache_qkv_params& p) {
    follow_previous_kernel();
    const int warps = SPECACHE_HEAD_NORM_THREADS / 32, heads = int(p.n_heads + p.n_kv_heads);
    const int unit = int(blockIdx.x) * warps + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int row = unit / heads, head = unit % heads, half = int(p.head_dim) / 2;
    if (row >= int(p.n_rows)) return;
    const bool is_q = head < int(p.n_heads);
    const int own_head = is_q ? head : head - int(p.n_heads), own_heads = int(is_q ? p.n_heads : p.n_kv_heads);
    const uint64_t from = is_q ? p.q : p.k, norm = is_q ? p.q_norm : p.k_norm;
    const size_t at = (size_t(row) * own_heads + own_head) * p.head_dim;

    Pair x[kMostPairs];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kMostPairs; i++) {
        const int channel = lane + 32 * i;
        x[i] =
            channel < half ? Pair{optional_f32(from, at + channel), optional_f32(from, at + channel + half)} : Pair{};
        squares += x[i].a * x[i].a + x[i].b * x[i].b;
    }
    const float scale = inverse_rms(sum_lanes(squares), int(p.head_dim), p.eps);
    const uint64_t token = is_q ? 0 : load_device(pointer<uint64_t>(p.append) + row);
#pragma unroll
    for (int i = 0; i < kMostPairs; i++) {
        const int channel = lane + 32 * i;
        if (channel >= half) continue;
        const Pair normed{x[i].a * scale * optional_f32(norm, channel),
                          x[i].b * scale * optional_f32(norm, channel + half)};
        const Pair y = rotate(normed, cos_sin_of(p, row, channel));
        if (is_q) {
            store_f32(p.q, at + channel, y.a);
            store_f32(p.q, at + channel + half, y.b);
        } else {
            append_pair(p, token, own_head, 0, channel, y);
        }
    }
}

// ---- gate and up ----

template <class T, int N_TILES> SPECACHE_DEVICE void gate_up(const specache_gate_up_params& p) {
    SPECACHE_SHARED(ProductShared<N_TILES>, shared);
    SPECACHE_DYNAMIC_SHARED(queue);
    const size_t first = size_t(blockIdx.x) * kTileFeatures;
    const int features = least(kTileFeatures, int(p.intermediate - first));
    Product<T, N_TILES, true> product(
        Factors{{weight_row<T>(p.gate_weight, first, p.hidden), weight_row<T>(p.up_weight, first, p.hidden)},
                {features, features},
                pointer<float>(p.x),
                pointer<float>(p.norm),
                int(p.n_rows),
                int(p.hidden)},
        queue);
    product.run();
    product.store(shared);

    const Cell cell = cell_of_thread();
    const bool mine = cell.row < int(p.n_rows) && cell.feature < features;
    const size_t feature = first + cell.feature;
    const Pair bias = mine ? Pair{optional_f32(p.gate_bias, feature), optional_f32(p.up_bias, feature)} : Pair{};
    __syncthreads();
    if (!mine) return;
    const float scale = inverse_rms(sum_squares(shared, cell.row), int(p.hidden), p.eps);
    const float2 sum = sum_warps<T>(shared, cell);
    const float gate = sum.x * scale + bias.a, up = sum.y * scale + bias.b;
    store_f32(p.y, cell.row * size_t(p.intermediate) + feature, silu(gate) * up);
}

// ---- one matrix: y += W x (RESIDUAL), or y = W norm(x) ----

template <class T, int N_TILES, bool RESIDUAL> SPECACHE_DEVICE void linear(const specache_linear_params& p) {
    SPECACHE_SHARED(ProductShared<N_TILES>, shared);
    SPECACHE_DYNAMIC_SHARED(queue);
    const size_t first = size_t(blockIdx.x) * kCtaFeatures;
    const int features = least(kCtaFeatures, int(p.n - first));
    // Where there is no second tile it repeats the first.
    const size_t second = features > kTileFeatures ? first + kTileFeatures : first;
    const int of_first = least(kTileFeatures, features);
    const int of_second = features > kTileFeatures ? features - kTileFeatures : of_first;
    Product<T, N_TILES, !RESIDUAL> product(
        Factors{{weight_row<T>(p.weight, first, p.k), weight_row<T>(p.weight, second, p.k)},
                {of_first, of_second},
                pointer<float>(p.x),
                pointer<float>(p.norm),
                int(p.n_rows),
                int(p.k)},
        queue);
    product.run();
    product.store(shared);

    const Cell cell = cell_of_thread();
    const bool row = cell.row < int(p.n_rows);
    const bool mine[kTiles] = {row && cell.feature < features, row && cell.feature + kTileFeatures < features};
    float old[kTiles] = {};
#pragma unroll
    for (int t = 0; t < kTiles; t++)
        if (mine[t]) {
            const size_t feature = first + t * kTileFeatures + cell.feature;
            old[t] =
                optional_f32(p.bias, feature) + (RESIDUAL ? optional_f32(p.y, cell.row * size_t(p.n) + feature) : 0);
        }
    __syncthreads();
    if (!row) return;
    const float2 sum = sum_warps<T>(shared, cell);
    const float scale = RESIDUAL ? 1.0f : inverse_rms(sum_squares(shared, cell.row), int(p.k), p.eps);
#pragma unroll
    for (int t = 0; t < kTiles; t++)
        if (mine[t])
            store_f32(p.y, cell.row * size_t(p.n) + first + t * kTileFeatures + cell.feature,
                      (t == 0 ? sum.x : sum.y) * scale + old[t]);
}

}   // namespace specache

// registers: <= 208 specache_*_fp32_n*    (1 CTA an SM)
// registers: <= 128 specache_qkv_*        (2 CTAs an SM)
// registers: <= 128 specache_residual_*
// registers: <= 128 specache_gate_up_*
// registers: <= 128 specache_logits_*
#define SPECACHE_LINEAR_KERNEL(dtype, T, N_TILES)                                                  \
    extern "C" __global__ void __launch_bounds__(SPECACHE_LINEAR_THREADS, specache::kCtas<specache::T>)           \
        specache_qkv_##dtype##_n##N_TILES(const __grid_constant__ specache_qkv_params p) {         \
        specache::qkv<specache::T, N_TILES>(p);                                                    \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(SPECACHE_LINEAR_THREADS, specache::kCtas<specache::T>)           \
        specache_residual_##dtype##_n##N_TILES(const __grid_constant__ specache_linear_params p) { \
        specache::linear<specache::T, N_TILES, true>(p);                                           \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(SPECACHE_LINEAR_THREADS, specache::kCtas<specache::T>)           \
        specache_gate_up_##dtype##_n##N_TILES(const __grid_constant__ specache_gate_up_params p) { \
        specache::gate_up<specache::T, N_TILES>(p);                                                \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(SPECACHE_LINEAR_THREADS, specache::kCtas<specache::T>)           \
        specache_logits_##dtype##_n##N_TILES(const __grid_constant__ specache_linear_params p) {   \
        specache::linear<specache::T, N_TILES, false>(p);                                          \
    }
SPECACHE_LINEAR_KERNELS(SPECACHE_LINEAR_KERNEL)
#undef SPECACHE_LINEAR_KERNEL

// registers: <= 64 specache_head_norm   (a few thousand numbers: latency is all there is)
extern "C" __global__ void __launch_bounds__(SPECACHE_HEAD_NORM_THREADS)
    specache_head_norm(const __grid_constant__ specache_qkv_params p) {
    specache::head_norm(p);
}
