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
#ifndef SPECACHE_PLAN_ONLY
#include "product.cuh"
#endif
#include "abi.h"

// Entry points, dtype x n-tiles of 8 rows: the one list that kernels and plans are made from.
// clang-format off
#define SPECACHE_LINEAR_KERNELS(X)              \
    X(fp16, Fp16, 1) X(fp16, Fp16, 2)           \
    X(bf16, Bf16, 1) X(bf16, Bf16, 2)           \
    X(fp32, Fp32, 1) X(fp32, Fp32, 2)
// clang-format on

// Two CTAs share an SM. Where there are too few CTAs to fill the bus (product.cuh), each has twice the warps.
#define SPECACHE_LINEAR_THREADS 256
#define SPECACHE_LINEAR_FEW_CTAS 84
#define SPECACHE_LINEAR_FEW_THREADS 512

// Of the kernel for the heads of q and k: a warp for each row and head.
#define SPECACHE_HEAD_NORM_THREADS 128

#ifndef SPECACHE_PLAN_ONLY
namespace specache {

template <class V> SPECACHE_DEVICE const V* pointer(uint64_t address) { return reinterpret_cast<const V*>(address); }

// A float of device memory, or 0 where there is no such vector.
SPECACHE_DEVICE float optional_f32(uint64_t address, size_t index) {
    return address == 0 ? 0.0f : load_device(pointer<float>(address) + index);
}

SPECACHE_DEVICE void store_f32(uint64_t address, size_t index, float value) {
    store_device(reinterpret_cast<float*>(address) + index, value);
}

SPECACHE_DEVICE int least(int a, int b) { return a < b ? a : b; }

// The first row of W of a tile.
template <class T> SPECACHE_DEVICE const uint8_t* weight_row(uint64_t address, size_t row, uint32_t k) {
    return pointer<uint8_t>(address) + row * k * Operand<T>::kBytes;
}

// Two sums of a row, in the cell of this thread.
struct Pair {
    float a;
    float b;
};

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

// RoPE of channels c and c + D/2, halves against each other as Hugging Face has it.
SPECACHE_DEVICE Pair rotate(Pair x, float2 cos_sin) {
    return Pair{x.a * cos_sin.x - x.b * cos_sin.y, x.b * cos_sin.x + x.a * cos_sin.y};
}

SPECACHE_DEVICE float2 cos_sin_of(const specache_qkv_params& p, int row, int channel) {
    return load_device(pointer<float2>(p.rope) + size_t(row) * (p.head_dim / 2) + channel);
}

// Writes two channels of K (part 0) or V (part 1) of a token, rounded to the cache's type, at half a head's distance.
SPECACHE_DEVICE void append_pair(const specache_qkv_params& p, uint64_t token, int head, int part, int channel,
                                 Pair x) {
    if (token == 0) return;   // a row that is kept nowhere
    const size_t half = p.head_dim / 2;
    uint16_t* to = reinterpret_cast<uint16_t*>(token) + size_t(head) * SPECACHE_PAGE * 2 * p.head_dim +
                   size_t(part) * p.head_dim + channel;
    const bool bf16 = p.kv_dtype == SPECACHE_BF16;
    const uint32_t bits =
        bf16 ? Operand<Bf16>::narrow(make_float2(x.a, x.b)) : Operand<Fp16>::narrow(make_float2(x.a, x.b));
    store_device(to, uint16_t(bits & 0xFFFF));
    store_device(to + half, uint16_t(bits >> 16));
}

// CTA 0 notes the rows whose residual stream stopped being finite.
SPECACHE_DEVICE void note_bad_row(const specache_qkv_params& p, Cell cell, float squares) {
    const bool finite = squares < bit_cast<float>(0x7F800000u);   // neither inf nor NaN
    if (blockIdx.x != 0 || cell.feature != 0 || finite) return;
    uint32_t* bad = reinterpret_cast<uint32_t*>(p.bad_layer) + cell.row;
    if (load_device(bad) == SPECACHE_NONE) store_device(bad, p.layer);
}

template <class T, int N_TILES> SPECACHE_DEVICE void qkv(const specache_qkv_params& p) {
    SPECACHE_SHARED(ProductShared<N_TILES>, shared);
    Product<T, N_TILES, true> product(qkv_factors<T>(p, qkv_unit(p)));
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
        append_pair(p, token, unit.head, unit.kind == QkvUnit::kV, channel, x);
    }
    note_bad_row(p, cell, squares);
}

// ---- heads of q and k that have a norm of their own ----

constexpr int kMostPairs = 4;   // of a lane: head_dim up to 256

SPECACHE_DEVICE float sum_lanes(float x) {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// RMS norm and RoPE of one head of one row; q stays in its place, k goes to the cache.
SPECACHE_DEVICE void head_norm(const specache_qkv_params& p) {
    let_next_kernel_start();
    wait_for_previous_kernel();
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

SPECACHE_DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

template <class T, int N_TILES> SPECACHE_DEVICE void gate_up(const specache_gate_up_params& p) {
    SPECACHE_SHARED(ProductShared<N_TILES>, shared);
    const size_t first = size_t(blockIdx.x) * kTileFeatures;
    const int features = least(kTileFeatures, int(p.intermediate - first));
    Product<T, N_TILES, true> product(
        Factors{{weight_row<T>(p.gate_weight, first, p.hidden), weight_row<T>(p.up_weight, first, p.hidden)},
                {features, features},
                pointer<float>(p.x),
                pointer<float>(p.norm),
                int(p.n_rows),
                int(p.hidden)});
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
                int(p.k)});
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

// registers: <= 192 specache_*_fp32_n*    (1 CTA of 256 threads an SM)
// registers: <= 128 specache_qkv_*        (512 threads an SM, in 1 or 2 CTAs)
// registers: <= 128 specache_residual_*
// registers: <= 128 specache_gate_up_*
// registers: <= 128 specache_logits_*
#define SPECACHE_LINEAR_KERNEL(dtype, T, N_TILES)                                                  \
    extern "C" __global__ void __launch_bounds__(specache::kMostThreads<specache::T>, 1)           \
        specache_qkv_##dtype##_n##N_TILES(const __grid_constant__ specache_qkv_params p) {         \
        specache::qkv<specache::T, N_TILES>(p);                                                    \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(specache::kMostThreads<specache::T>, 1)           \
        specache_residual_##dtype##_n##N_TILES(const __grid_constant__ specache_linear_params p) { \
        specache::linear<specache::T, N_TILES, true>(p);                                           \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(specache::kMostThreads<specache::T>, 1)           \
        specache_gate_up_##dtype##_n##N_TILES(const __grid_constant__ specache_gate_up_params p) { \
        specache::gate_up<specache::T, N_TILES>(p);                                                \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(specache::kMostThreads<specache::T>, 1)           \
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
#endif   // SPECACHE_PLAN_ONLY

// The plans: plain host code. With SPECACHE_PLAN_ONLY this file is ordinary C++ and needs no CUDA header.
#ifndef __CUDACC_RTC__
#include "plan.h"

namespace specache {

// Room for 32-bit arithmetic on features; models end at 65536 (intermediate) and 262144 (vocabulary).
constexpr uint32_t kMostInputs = 1u << 20, kMostOutputs = 1u << 24;

// The entry points of one dtype and number of n-tiles.
struct LinearKernels {
    const char *qkv, *residual, *gate_up, *logits;
};

// A shape that check_linear has accepted.
static LinearKernels linear_kernels(specache_dtype dtype, uint32_t n_rows) {
#define SPECACHE_LINEAR_NAMES(type, T, N_TILES)                                                \
    if (dtype == dtype_named(#type) && (n_rows + 7) / 8 == N_TILES)                            \
        return {"specache_qkv_" #type "_n" #N_TILES, "specache_residual_" #type "_n" #N_TILES, \
                "specache_gate_up_" #type "_n" #N_TILES, "specache_logits_" #type "_n" #N_TILES};
    SPECACHE_LINEAR_KERNELS(SPECACHE_LINEAR_NAMES)
#undef SPECACHE_LINEAR_NAMES
    return {};
}

static specache_status check_linear(const char* op, uint32_t n_rows, specache_dtype dtype, uint32_t k, uint32_t n,
                                    specache_launch* launch) {
    if (n_rows > SPECACHE_MAX_ROWS)
        return refuse(launch, SPECACHE_UNSUPPORTED_ROWS, "%s: %u rows (1 to %u)", op, n_rows, SPECACHE_MAX_ROWS);
    if (dtype != SPECACHE_FP16 && dtype != SPECACHE_BF16 && dtype != SPECACHE_FP32)
        return refuse(launch, SPECACHE_UNSUPPORTED_DTYPE, "%s: weights of dtype %u (fp16, bf16 or fp32)", op, dtype);
    if (k % 8 != 0 || k < 32 || k > kMostInputs)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "%s: %u input features (multiples of 8 from 32 to %u)", op, k,
                      kMostInputs);
    if (n == 0 || n > kMostOutputs)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "%s: %u output features (1 to %u)", op, n, kMostOutputs);
    return SPECACHE_OK;
}

// A buffer and what it must be aligned to. Optional ones may be absent.
struct Address {
    const char* name;
    uint64_t at;
    uint32_t align;
    bool optional;
};

template <size_t N>
static specache_status check_addresses(const char* op, const Address (&all)[N], specache_launch* launch) {
    for (const Address& a : all)
        if ((a.at == 0 && !a.optional) || a.at % a.align != 0)
            return refuse(launch, SPECACHE_BAD_ADDRESS, "%s: %s is null or not %u-byte aligned", op, a.name, a.align);
    return SPECACHE_OK;
}

static uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

static specache_status planned(specache_launch* launch, const char* kernel, uint32_t grid, uint32_t block) {
    launch->kernel = kernel;
    launch->grid = grid;
    launch->block = block;
    return SPECACHE_OK;
}

// Matrices of fp32 have twice the bytes, and no registers for more warps.
static specache_status planned_product(specache_launch* launch, const char* kernel, specache_dtype dtype,
                                       uint32_t grid) {
    const bool few = grid < SPECACHE_LINEAR_FEW_CTAS && dtype != SPECACHE_FP32;
    return planned(launch, kernel, grid, few ? SPECACHE_LINEAR_FEW_THREADS : SPECACHE_LINEAR_THREADS);
}

static specache_status check_qkv(const specache_qkv_params& p, specache_launch* launch) {
    if (p.head_dim == 0 || p.head_dim % 2 != 0 || p.head_dim > 256)
        return refuse(launch, SPECACHE_UNSUPPORTED_HEAD_DIM, "qkv: head_dim %u (even, at most 256)", p.head_dim);
    if (p.n_kv_heads == 0 || p.n_heads > 4096 || p.n_kv_heads > p.n_heads)
        return refuse(launch, SPECACHE_UNSUPPORTED_WIDTH, "qkv: %u heads, %u KV heads", p.n_heads, p.n_kv_heads);
    if (p.kv_dtype != SPECACHE_FP16 && p.kv_dtype != SPECACHE_BF16)
        return refuse(launch, SPECACHE_UNSUPPORTED_DTYPE, "qkv: a cache of dtype %u (fp16 or bf16)", p.kv_dtype);
    if ((p.q_norm == 0) != (p.k_norm == 0))
        return refuse(launch, SPECACHE_BAD_ADDRESS, "qkv: q_norm without k_norm, or the other way round");
    const specache_status status = check_linear("qkv", p.n_rows, p.dtype, p.hidden, p.n_heads * p.head_dim, launch);
    if (status != SPECACHE_OK || p.n_rows == 0) return status;
    const Address all[] = {{"x", p.x, 16, false},
                           {"norm", p.norm, 16, false},
                           {"q_weight", p.q_weight, 16, false},
                           {"k_weight", p.k_weight, 16, false},
                           {"v_weight", p.v_weight, 16, false},
                           {"q_bias", p.q_bias, 4, true},
                           {"k_bias", p.k_bias, 4, true},
                           {"v_bias", p.v_bias, 4, true},
                           {"q_norm", p.q_norm, 4, true},
                           {"k_norm", p.k_norm, 4, true},
                           {"k", p.k, 4, p.q_norm == 0},
                           {"rope", p.rope, 8, false},
                           {"append", p.append, 8, false},
                           {"q", p.q, 4, false},
                           {"bad_layer", p.bad_layer, 4, false}};
    return check_addresses("qkv", all, launch);
}

static specache_status check_gate_up(const specache_gate_up_params& p, specache_launch* launch) {
    const specache_status status = check_linear("gate_up", p.n_rows, p.dtype, p.hidden, p.intermediate, launch);
    if (status != SPECACHE_OK || p.n_rows == 0) return status;
    const Address all[] = {{"x", p.x, 16, false},
                           {"norm", p.norm, 16, false},
                           {"gate_weight", p.gate_weight, 16, false},
                           {"up_weight", p.up_weight, 16, false},
                           {"gate_bias", p.gate_bias, 4, true},
                           {"up_bias", p.up_bias, 4, true},
                           {"y", p.y, 4, false}};
    return check_addresses("gate_up", all, launch);
}

static specache_status check_matrix(const char* op, const specache_linear_params& p, bool norm,
                                    specache_launch* launch) {
    const specache_status status = check_linear(op, p.n_rows, p.dtype, p.k, p.n, launch);
    if (status != SPECACHE_OK || p.n_rows == 0) return status;
    if (!norm && p.norm != 0) return refuse(launch, SPECACHE_BAD_ADDRESS, "%s: takes no norm", op);
    if (p.x == p.y) return refuse(launch, SPECACHE_BAD_ADDRESS, "%s: x and y are one buffer", op);
    const Address all[] = {{"x", p.x, 16, false},
                           {"norm", p.norm, 16, !norm},
                           {"weight", p.weight, 16, false},
                           {"bias", p.bias, 4, true},
                           {"y", p.y, 4, false}};
    return check_addresses(op, all, launch);
}

}   // namespace specache

extern "C" specache_status specache_qkv_plan(const specache_qkv_params* params, specache_launch* launch) {
    const specache_qkv_params& p = *params;
    *launch = specache_launch{};
    const specache_status status = specache::check_qkv(p, launch);
    if (status != SPECACHE_OK || p.n_rows == 0) return status;
    const uint32_t tiles = specache::ceil_div(p.head_dim / 2, 16), heads = p.n_heads + 2 * p.n_kv_heads;
    return specache::planned_product(launch, specache::linear_kernels(p.dtype, p.n_rows).qkv, p.dtype, heads * tiles);
}

extern "C" specache_status specache_head_norm_plan(const specache_qkv_params* params, specache_launch* launch) {
    const specache_qkv_params& p = *params;
    *launch = specache_launch{};
    const specache_status status = specache::check_qkv(p, launch);
    if (status != SPECACHE_OK || p.n_rows == 0 || p.q_norm == 0) return status;
    const uint32_t warps = p.n_rows * (p.n_heads + p.n_kv_heads);
    return specache::planned(launch, "specache_head_norm", specache::ceil_div(warps, SPECACHE_HEAD_NORM_THREADS / 32),
                             SPECACHE_HEAD_NORM_THREADS);
}

extern "C" specache_status specache_residual_plan(const specache_linear_params* params, specache_launch* launch) {
    const specache_linear_params& p = *params;
    *launch = specache_launch{};
    const specache_status status = specache::check_matrix("residual", p, false, launch);
    if (status != SPECACHE_OK || p.n_rows == 0) return status;
    return specache::planned_product(launch, specache::linear_kernels(p.dtype, p.n_rows).residual, p.dtype,
                                     specache::ceil_div(p.n, 32));
}

extern "C" specache_status specache_gate_up_plan(const specache_gate_up_params* params, specache_launch* launch) {
    const specache_gate_up_params& p = *params;
    *launch = specache_launch{};
    const specache_status status = specache::check_gate_up(p, launch);
    if (status != SPECACHE_OK || p.n_rows == 0) return status;
    return specache::planned_product(launch, specache::linear_kernels(p.dtype, p.n_rows).gate_up, p.dtype,
                                     specache::ceil_div(p.intermediate, 16));
}

extern "C" specache_status specache_logits_plan(const specache_linear_params* params, specache_launch* launch) {
    const specache_linear_params& p = *params;
    *launch = specache_launch{};
    const specache_status status = specache::check_matrix("logits", p, true, launch);
    if (status != SPECACHE_OK || p.n_rows == 0) return status;
    return specache::planned_product(launch, specache::linear_kernels(p.dtype, p.n_rows).logits, p.dtype,
                                     specache::ceil_div(p.n, 32));
}
#endif
