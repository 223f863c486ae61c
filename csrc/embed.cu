// Begins a step, or a chunk of a prefill: rows of the embedding become the residual stream, fp32.
//
// A CTA has one row. On the way it works out what all layers would otherwise work out again: the cosines and sines of
// the row's position (fp32 angles, as Hugging Face has them), and for each layer the address at which the row's K and V
// go into the tail. What a layer reads of all this is one address and a pair of numbers for each thread. Sequences are
// read from device memory, so a captured graph stays valid from step to step.
#include "kernels.h"
#include "seq.cuh"

namespace specache {

// Where a row stands, if it is a sequence's and does not only fill up a graph.
struct RowPlace {
    bool known;
    uint32_t seq_index;
    uint32_t position;
};

SPECACHE_DEVICE RowPlace row_place(const specache_embed_params& p, uint32_t row) {
    RowPlace place{};
    for (uint32_t i = 0; i < p.n_seqs; i++) {
        const specache_seq seq = load_seq(p.seqs, i);
        const uint32_t of_seq = row - seq.first_row;   // beyond every n_rows if the row comes first
        if (of_seq < seq.n_rows) place = RowPlace{true, i, seq.n + of_seq};
    }
    return place;
}

// Four numbers of the table, as floats.
template <class T> struct Four {
    static constexpr int kBytes = 8;
    static SPECACHE_DEVICE float4 load(const uint8_t* from) {
        const uint2 bits = load_device(reinterpret_cast<const uint2*>(from));
        const float2 low = T::widen(bits.x), high = T::widen(bits.y);
        return make_float4(low.x, low.y, high.x, high.y);
    }
};

template <> struct Four<Fp32> {
    static constexpr int kBytes = 16;
    static SPECACHE_DEVICE float4 load(const uint8_t* from) {
        return load_device(reinterpret_cast<const float4*>(from));
    }
};

// Step 1: the row of the embedding. NaN for a token that does not exist: the first layer's finite check reports it.
template <class T> SPECACHE_DEVICE void widen_row(const specache_embed_params& p, uint32_t row) {
    const uint32_t token = load_device(reinterpret_cast<const uint32_t*>(p.tokens) + row);
    const bool exists = token < p.vocab;
    const uint32_t fours = p.hidden / 4;
    const uint8_t* from =
        reinterpret_cast<const uint8_t*>(p.table) + size_t(exists ? token : 0) * fours * Four<T>::kBytes;
    float4* to = reinterpret_cast<float4*>(p.x) + size_t(row) * fours;
    const float nan = bit_cast<float>(0x7FC00000u);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < fours; i += SPECACHE_EMBED_THREADS) {
        const float4 four = Four<T>::load(from + size_t(i) * Four<T>::kBytes);
        store_device(to + i, exists ? four : make_float4(nan, nan, nan, nan));
    }
}

// Step 2: cosine and sine of each frequency.
SPECACHE_DEVICE void rope_row(const specache_embed_params& p, uint32_t row, uint32_t position) {
    const uint32_t half = p.head_dim / 2;
    for (uint32_t i = threadIdx.x; i < half; i += SPECACHE_EMBED_THREADS) {
        const float angle = float(position) * load_device(reinterpret_cast<const float*>(p.inv_freq) + i);
        float sine, cosine;
        sincosf(angle, &sine, &cosine);
        store_device(reinterpret_cast<float2*>(p.rope) + size_t(row) * half + i,
                     make_float2(cosine * p.attention_factor, sine * p.attention_factor));
    }
}

// Where a layer's K of KV head 0 goes: [n_kv_heads][64][K: D | V: D] is a wide page.
SPECACHE_DEVICE uint64_t append_place(const specache_embed_params& p, uint32_t layer, const RowPlace& place) {
#if SPECACHE_INJECTED_BUG == 4   // the tests must see a page border in the wrong place
    const uint32_t page = (place.position - 1) / SPECACHE_PAGE;
#else
    const uint32_t page = place.position / SPECACHE_PAGE;
#endif
    const specache_layer_cache* caches = reinterpret_cast<const specache_layer_cache*>(p.caches);
    const uint64_t pages = load_device(&caches[size_t(layer) * p.n_seqs + place.seq_index].wide);
    return load_device(reinterpret_cast<const uint64_t*>(pages) + page) +
           uint64_t(place.position % SPECACHE_PAGE) * 4 * p.head_dim;
}

// Step 3: that place in every layer. 0: nowhere.
SPECACHE_DEVICE void append_places(const specache_embed_params& p, uint32_t row, const RowPlace& place) {
    const size_t stride = p.append_stride == 0 ? SPECACHE_MAX_ROWS : p.append_stride;
    for (uint32_t layer = threadIdx.x; layer < p.n_layers; layer += SPECACHE_EMBED_THREADS)
        store_device(reinterpret_cast<uint64_t*>(p.append) + layer * stride + row,
                     place.known ? append_place(p, layer, place) : 0);
}

template <class T> SPECACHE_DEVICE void embed(const specache_embed_params& p) {
    follow_previous_kernel();
    const uint32_t row = blockIdx.x;
    widen_row<T>(p, row);
    const RowPlace place = row_place(p, row);
    rope_row(p, row, place.position);
    append_places(p, row, place);
    if (threadIdx.x == 0) store_device(reinterpret_cast<uint32_t*>(p.bad_layer) + row, SPECACHE_NONE);
}

}   // namespace specache

// registers: <= 64 specache_embed_*   (a few CTAs: latency is all there is)
#define SPECACHE_EMBED_KERNEL(dtype, T)                                           \
    extern "C" __global__ void __launch_bounds__(SPECACHE_EMBED_THREADS)          \
        specache_embed_##dtype(const __grid_constant__ specache_embed_params p) { \
        specache::embed<specache::T>(p);                                          \
    }
SPECACHE_EMBED_KERNELS(SPECACHE_EMBED_KERNEL)
#undef SPECACHE_EMBED_KERNEL
