// Quantises wide 16-bit pages into packed pages (KIVI): K per channel over g tokens, V per token over g channels.
//
// One CTA packs one KV head of one page. It stages the head's 64 rows in shared memory, finds the range of each group,
// builds the packed page (kv_layout.cuh) in shared memory and writes it out 16 bytes at a time: device memory is read
// once and written once. Bit for bit the arithmetic of the CPU form: zero and scale rounded to fp16 first, true
// division, half to even.
#include "kernels.h"
#include "kv_layout.cuh"
#include "ptx.cuh"

namespace specache {

constexpr int kPackThreads = SPECACHE_PACK_THREADS;
constexpr int kPackWarps = kPackThreads / 32;
constexpr int kSmallestGroup = 32;

template <int D, int B> struct PackShared {
    // A row is a token, a word a pair of channels: K pairs, then V pairs. The pitch of D + 4 words moves each row by
    // four banks: the eight rows times four pairs of a fragment touch all 32 banks once.
    alignas(16) uint32_t rows[kPage][D + 4];
    // The packed page as it will be stored.
    alignas(16) uint8_t page[PackedPage<D, B>::bytes(kSmallestGroup)];
    // Range of K over a slice of the tokens: every thread has two channels of one slice.
    float low[2 * kPackThreads / D][D];
    float high[2 * kPackThreads / D][D];
};

// Smallest and largest value seen so far.
struct Range {
    float low;
    float high;
};

SPECACHE_DEVICE Range empty_range() { return Range{bit_cast<float>(0x7F800000u), bit_cast<float>(0xFF800000u)}; }

SPECACHE_DEVICE Range join(Range r, float low, float high) { return Range{fminf(r.low, low), fmaxf(r.high, high)}; }

template <class T> SPECACHE_DEVICE Range range_of(uint4 values) {
    Range r = empty_range();
    const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = T::widen(pairs[i]);
        r = join(join(r, x.x, x.x), x.y, x.y);
    }
    return r;
}

// The range over `lanes` neighbouring lanes (a power of two, aligned), in all of them.
SPECACHE_DEVICE Range join_lanes(Range r, int lanes) {
    for (int distance = 1; distance < lanes; distance *= 2) {
        const float low = __shfl_xor_sync(~0u, r.low, distance);
        const float high = __shfl_xor_sync(~0u, r.high, distance);
        r = join(r, low, high);
    }
    return r;
}

// Zero and scale of a group. One bit: the levels sit in the middle of the two halves of the range. The products are
// exact (16-bit numbers times 3), so no rounding hides in them. Adding 0 turns -0 into +0: which of the two a minimum
// or a maximum returns is not defined, and the page must not depend on it.
template <int B> SPECACHE_DEVICE void write_params(Range r, uint8_t* scale_at, uint8_t* zero_at) {
    const float low = __fadd_rn(r.low, 0.0f), high = __fadd_rn(r.high, 0.0f), span = __fsub_rn(high, low);
    const float zero = B == 1 ? __fmul_rn(__fadd_rn(__fmul_rn(3.0f, low), high), 0.25f) : low;
    const float scale = B == 1 ? __fmul_rn(span, 0.5f) : __fdiv_rn(span, float((1 << B) - 1));
    *reinterpret_cast<uint16_t*>(scale_at) = uint16_t(Fp16::narrow(scale, 0.0f));
    *reinterpret_cast<uint16_t*>(zero_at) = uint16_t(Fp16::narrow(zero, 0.0f));
}

// The code of x; 0 where scale is 0, and for a NaN.
template <int B> SPECACHE_DEVICE uint32_t code_of(float x, float zero, float scale) {
    const float level = rintf(__fdiv_rn(__fsub_rn(x, zero), scale));
    const float code = fminf(fmaxf(level, 0.0f), float((1 << B) - 1));
    return scale == 0.0f ? 0u : uint32_t(code);
}

// Step 1: rows to shared memory; zero and scale of V on the way, since g channels of a token are g/8 neighbouring
// lanes.
template <class T, int D, int B> SPECACHE_DEVICE void stage_rows(PackShared<D, B>& shared, const uint8_t* wide, int g) {
    using Page = PackedPage<D, B>;
    constexpr int kPieces = 2 * D / 8;   // 16-byte pieces of a row
    constexpr int kLoads = kPage * kPieces / kPackThreads;
    const int thread = int(threadIdx.x);
    uint4 values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        values[i] = load_streaming(wide + size_t(i * kPackThreads + thread) * 16);
    }
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
        const int token = (i * kPackThreads + thread) / kPieces, piece = thread % kPieces;
        *reinterpret_cast<uint4*>(&shared.rows[token][4 * piece]) = values[i];
        const Range r = join_lanes(range_of<T>(values[i]), g / 8);
        const int channel = 8 * piece - D;
        if (channel >= 0 && channel % g == 0) {
            write_params<B>(r, shared.page + Page::v_param(Page::v_scale(g), channel / g, token),
                            shared.page + Page::v_param(Page::v_zero(g), channel / g, token));
        }
    }
}

// Step 2: the range of K, two channels and a slice of the tokens per thread; neighbouring lanes read neighbouring
// words.
template <class T, int D, int B> SPECACHE_DEVICE void range_k_slices(PackShared<D, B>& shared) {
    constexpr int kTokens = D / 8;   // 64 tokens over 2 * 256 / D slices
    const int pair = int(threadIdx.x) % (D / 2), slice = int(threadIdx.x) / (D / 2);
    Range even = empty_range(), odd = empty_range();
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
        const float2 x = T::widen(shared.rows[slice * kTokens + i][pair]);
        even = join(even, x.x, x.x);
        odd = join(odd, x.y, x.y);
    }
    *reinterpret_cast<float2*>(&shared.low[slice][2 * pair]) = make_float2(even.low, odd.low);
    *reinterpret_cast<float2*>(&shared.high[slice][2 * pair]) = make_float2(even.high, odd.high);
}

// Step 3: zero and scale of K, a thread for each channel and token group.
template <int D, int B> SPECACHE_DEVICE void params_k(PackShared<D, B>& shared, int g) {
    using Page = PackedPage<D, B>;
    static_assert(D * (kPage / kSmallestGroup) <= kPackThreads, "one pass");
    const int channel = int(threadIdx.x) % D, group = int(threadIdx.x) / D;
    if (group >= kPage / g) return;
    const int slices = g / (D / 8);   // slices of a group
    Range r = empty_range();
    for (int s = group * slices; s < (group + 1) * slices; s++) {
        r = join(r, shared.low[s][channel], shared.high[s][channel]);
    }
    write_params<B>(r, shared.page + Page::k_param(Page::k_scale(g), group, channel),
                    shared.page + Page::k_param(Page::k_zero(g), group, channel));
}

// Two fp16 numbers of the page in shared memory.
SPECACHE_DEVICE float2 param_pair(const uint8_t* at) { return Fp16::widen(*reinterpret_cast<const uint32_t*>(at)); }

// A word of K codes: row = token, k = channel.
template <class T, int D, int B>
SPECACHE_DEVICE uint32_t k_word(const PackShared<D, B>& shared, int word, int lane, int g) {
    using Page = PackedPage<D, B>;
    constexpr int kTile = kTileWords<D, B>, kOctets = kOctetsPerWord<B>;
    const int token = word / kTile * 16 + lane / 4, group = word / kTile * 16 / g;
    uint32_t bits = 0;
#pragma unroll 2   // all 8 octets of a 1-bit word at once would spill around the division
    for (int s = 0; s < kOctets; s++) {
        int channel = (word % kTile * kOctets + s) * 8 + lane % 4 * 2;
#if SPECACHE_INJECTED_BUG == 2   // the tests must see an octet out of order
        channel = (channel + 8) % D;
#endif
        const float2 scale = param_pair(shared.page + Page::k_param(Page::k_scale(g), group, channel));
        const float2 zero = param_pair(shared.page + Page::k_param(Page::k_zero(g), group, channel));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float2 x = T::widen(shared.rows[token + 8 * r][channel / 2]);
            bits |= code_of<B>(x.x, zero.x, scale.x) << (8 * r + B * s);
            bits |= code_of<B>(x.y, zero.y, scale.y) << (16 + 8 * r + B * s);
        }
    }
    return bits;
}

// A word of V codes: row = channel, k = token.
template <class T, int D, int B>
SPECACHE_DEVICE uint32_t v_word(const PackShared<D, B>& shared, int word, int lane, int g) {
    using Page = PackedPage<D, B>;
    constexpr int kTile = kTileWords<kPage, B>, kOctets = kOctetsPerWord<B>;
    const int channel = word / kTile * 16 + lane / 4, group = word / kTile * 16 / g;
    uint32_t bits = 0;
#pragma unroll 2   // all 8 octets of a 1-bit word at once would spill around the division
    for (int s = 0; s < kOctets; s++) {
        const int token = (word % kTile * kOctets + s) * 8 + lane % 4 * 2;
        const float2 scale = param_pair(shared.page + Page::v_param(Page::v_scale(g), group, token));
        const float2 zero = param_pair(shared.page + Page::v_param(Page::v_zero(g), group, token));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // Of the pair that a word holds, the row's parity picks one: the same for both tokens and all octets.
            const int pair = (D + channel + 8 * r) / 2;
            const float2 even = T::widen(shared.rows[token][pair]), odd = T::widen(shared.rows[token + 1][pair]);
            const bool high = channel % 2 != 0;
            bits |= code_of<B>(high ? even.y : even.x, zero.x, scale.x) << (8 * r + B * s);
            bits |= code_of<B>(high ? odd.y : odd.x, zero.y, scale.y) << (16 + 8 * r + B * s);
        }
    }
    return bits;
}

// Step 4: codes, a word of K and a word of V per lane and turn; the number of words is the same for every warp.
template <class T, int D, int B> SPECACHE_DEVICE void write_codes(PackShared<D, B>& shared, int g) {
    using Page = PackedPage<D, B>;
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    static_assert(2 * Page::kLaneCodeWords % kPackWarps == 0, "warps share the words evenly");
#pragma unroll 1
    for (int i = warp; i < 2 * Page::kLaneCodeWords; i += kPackWarps) {
        const bool is_k = i < Page::kLaneCodeWords;
        const int word = is_k ? i : i - Page::kLaneCodeWords;
        const uint32_t bits = is_k ? k_word<T>(shared, word, lane, g) : v_word<T>(shared, word, lane, g);
        const int at = (is_k ? Page::k_codes() : Page::v_codes(g)) + word_byte(word, lane);
        *reinterpret_cast<uint32_t*>(shared.page + at) = bits;
    }
}

// Step 5: the finished page to device memory.
template <int D, int B> SPECACHE_DEVICE void store_page(const PackShared<D, B>& shared, uint8_t* packed, int g) {
    for (int at = int(threadIdx.x) * 16; at < PackedPage<D, B>::bytes(g); at += kPackThreads * 16) {
        store_16(packed + at, *reinterpret_cast<const uint4*>(shared.page + at));
    }
}

template <class T, int D, int B> SPECACHE_DEVICE void pack_head(const specache_pack_params& p) {
    follow_previous_kernel();
    using Shared = PackShared<D, B>;
    SPECACHE_SHARED(Shared, shared);
    const uint32_t page = blockIdx.x / p.n_kv_heads, head = blockIdx.x % p.n_kv_heads;
    const int g = int(p.group_size);
    const uint64_t wide =
        load_device(reinterpret_cast<const uint64_t*>(p.wide_pages) + page) + uint64_t(head) * (kPage * 4 * D);
    const uint64_t packed = p.packed + uint64_t(blockIdx.x) * uint32_t(PackedPage<D, B>::bytes(g));

    stage_rows<T>(shared, reinterpret_cast<const uint8_t*>(wide), g);
    __syncthreads();
    range_k_slices<T>(shared);
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
    __syncthreads();
#endif
    params_k(shared, g);
    __syncthreads();
    write_codes<T>(shared, g);
    __syncthreads();
    store_page(shared, reinterpret_cast<uint8_t*>(packed), g);
}

}   // namespace specache

// registers: <= 72 specache_pack_*   (3 CTAs of 256 threads an SM; shared memory allows 2 to 5)
#define SPECACHE_PACK_KERNEL(D, B, dtype, T)                                                  \
    extern "C" __global__ void __launch_bounds__(SPECACHE_PACK_THREADS)                       \
        specache_pack_d##D##_b##B##_##dtype(const __grid_constant__ specache_pack_params p) { \
        specache::pack_head<specache::T, D, B>(p);                                            \
    }
SPECACHE_PACK_KERNELS(SPECACHE_PACK_KERNEL)
#undef SPECACHE_PACK_KERNEL
