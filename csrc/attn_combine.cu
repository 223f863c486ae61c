// The parts that attn_decode.cu has found of each row and query head become one: sums are weighted by 2^(maximum of the part
// - maximum of all) and divided by the sum of all p. The selection gets log2 of that sum besides.
//
// Few numbers, and three loads that wait for each other: what the pass is told is read before attention ends, and sums are
// loaded while they are weighed.
#include "attn_units.cuh"

namespace specache {

// Units of all sequences before this one, in every lane.
SPECACHE_DEVICE uint32_t units_before(const specache_attn_params& p, uint32_t seq_index) {
    uint32_t units = 0;
    for (uint32_t i = threadIdx.x % 32; i < seq_index; i += 32) units += units_of(p, i);
    for (int distance = 1; distance < 32; distance *= 2) units += __shfl_xor_sync(~0u, units, distance);
    return units;
}

constexpr uint32_t kCombineLoads = 8;   // of a thread, under way at a time

struct CombineShared {
    alignas(16) float out[kAttnWarps][128];
    float weights[kAttnWarps][kMaxParts];   // a copy of its own for each warp
};

// What a row and query head has in a part: lane l weighs the parts l and l + 32.
struct PartWeights {
    float max, total;
};

SPECACHE_DEVICE PartWeights weigh_parts(const float* columns, uint64_t step, uint32_t parts, float* weights) {
    static_assert(kMaxParts == 64, "two parts a lane");
    const uint32_t lane = threadIdx.x % 32;
    float weight[2] = {kNothingSeen, kNothingSeen}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) {
        const uint32_t part = lane + 32 * h;
        if (part >= parts) continue;
        const float2 of_part = load_device(reinterpret_cast<const float2*>(columns + part * step));
        weight[h] = of_part.x;
        sum[h] = of_part.y;
    }
    float max = fmaxf(weight[0], weight[1]), total = 0.0f;
    for (int distance = 1; distance < 32; distance *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, distance));
#pragma unroll
    for (uint32_t h = 0; h < 2; h++) {
        weights[lane + 32 * h] = exp2_approx(weight[h] - max);
        total += weights[lane + 32 * h] * sum[h];
    }
    for (int distance = 1; distance < 32; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
    __syncwarp();
    return PartWeights{max, total};
}

SPECACHE_DEVICE void add_weighted(float4& to, float weight, const float4& v) {
    to.x += weight * v.x, to.y += weight * v.y, to.z += weight * v.z, to.w += weight * v.w;
}

// One row and query head a CTA. Lanes share four channels each, the groups of as many lanes as have all channels share the
// parts; sums are loaded while they are weighed.
SPECACHE_DEVICE void combine(const specache_attn_params& p) {
    let_next_kernel_start();
    SPECACHE_SHARED(CombineShared, shared);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t head = blockIdx.x % p.n_heads, row = blockIdx.x / p.n_heads % 2;
    const uint32_t seq_index = blockIdx.x / p.n_heads / 2;
    const specache_seq seq = load_seq(p.seqs, seq_index);
    const SeqWork work = seq_work(&p, &seq);
    const uint32_t group_heads = p.n_heads / p.n_kv_heads, column = row * group_heads + head % group_heads;
    // Units of this head's columns: one in `column_tiles`.
    const uint64_t first = units_before(p, seq_index) + head / group_heads * work.parts * work.column_tiles;
    const float* parts =
        reinterpret_cast<const float*>(p.parts) + (first + column / kColumns) * part_floats(p.head_dim);
    const uint64_t step = uint64_t(work.column_tiles) * part_floats(p.head_dim);
    wait_for_previous_kernel();
    if (row >= seq.n_rows) return;

    const uint32_t lanes = p.head_dim / 4, groups = 32 / lanes, group = warp * groups + lane / lanes;
    const float* channels = parts + column % kColumns * p.head_dim + lane % lanes * 4;
    float4 sums[kCombineLoads], out = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto load = [&](uint32_t at) {
#pragma unroll
        for (uint32_t l = 0; l < kCombineLoads; l++) {
            const uint32_t part = at + l * kAttnWarps * groups;
            if (part < work.parts) sums[l] = load_device(reinterpret_cast<const float4*>(channels + part * step));
        }
    };
    load(group);
    const PartWeights all =
        weigh_parts(parts + kColumns * p.head_dim + 2 * (column % kColumns), step, work.parts, shared.weights[warp]);
#pragma unroll 1
    for (uint32_t at = group; at < work.parts;) {
#pragma unroll
        for (uint32_t l = 0; l < kCombineLoads; l++) {
            const uint32_t part = at + l * kAttnWarps * groups;
            if (part < work.parts) add_weighted(out, shared.weights[warp][part], sums[l]);
        }
        at += kCombineLoads * kAttnWarps * groups;
        load(at);
    }
    if (groups == 2) {   // of the same channels
        const float4 other = make_float4(__shfl_down_sync(~0u, out.x, 16), __shfl_down_sync(~0u, out.y, 16),
                                         __shfl_down_sync(~0u, out.z, 16), __shfl_down_sync(~0u, out.w, 16));
        add_weighted(out, 1.0f, other);
    }
    if (lane < lanes) *reinterpret_cast<float4*>(&shared.out[warp][4 * lane]) = out;
    __syncthreads();
    if (threadIdx.x < p.head_dim) {
        float sum = 0.0f;
        for (uint32_t w = 0; w < kAttnWarps; w++) sum += shared.out[w][threadIdx.x];
        const uint64_t at = (uint64_t(seq.first_row + row) * p.n_heads + head) * p.head_dim + threadIdx.x;
        store_device(reinterpret_cast<float*>(p.out) + at, sum / all.total);
    }
    const uint64_t lse = row == seq.n_rows - 1 ? p.lse : p.first_lse;
    if (lse != 0 && threadIdx.x == 0)
        store_device(reinterpret_cast<float*>(lse) + uint64_t(seq_index) * p.n_heads + head,
                     all.max + log2f(all.total));
}

}   // namespace specache

// registers: <= 80 specache_attn_combine
extern "C" __global__ void __launch_bounds__(SPECACHE_ATTN_THREADS)
    specache_attn_combine(const __grid_constant__ specache_attn_params p) {
    specache::combine(p);
}
