// Causal attention of prompt rows: flash attention, with mma.m16n8k16 and an online softmax.
//
// A CTA has one KV head and 128 (or 256) queries of one sequence. A query is a pair of row and query head, in the order
// row * G + head: whatever G is, the heads that share K and V share the CTA, and a few rows fill it. Each of its warps
// has 32 queries; K and V pass by in tiles of 32 keys, through a ring of stages in shared memory (cp.async), and a
// barrier for each tile. CTAs of the last rows, which see the most, come first.
//
//   S[query][key]     = Q[query][channel] K^T[channel][key]       A: Q from shared memory, B: K as it lies there
//   O[query][channel] = P[query][key] V[key][channel]             A: P from the sums of S, B: V, transposed by ldmatrix
//
// Numbers. Scores are in units of log2: log2(e) / sqrt(D) goes into q, which is then rounded once to the cache's type:
// as exact as K, which was rounded to it before. p is rounded to it as well, and the rounded numbers are what is summed
// (on the tensor cores, as one more channel): a weight's error moves the result towards or away from that value, and no
// further. Rounding is by 2^-12 (fp16) or 2^-9 (bf16) of a number on average: what comes out is good to about 1e-4, or
// 1e-3. The decode kernel (attn_decode.cu) splits q and p into two numbers, which costs nothing there; here it would
// double the work. Numbers of packed pages are rounded to the cache's type too, after code * scale + zero.
//
// The maximum of a query follows its scores only when they rise above it by more than 2^8: p stays below 2^15, and
// products are rescaled a few times instead of with every tile. What a query gives depends on its own scores only, and
// tiles begin at multiples of 32 whatever the chunk: the same bits however a prompt is cut into chunks and batches.
//
// What to expect. A tile and warp at D = 128: 132 mma, 1056 clocks of a quarter's tensor cores on an A100; from shared
// memory four warps take 96 KB in 768 clocks of its port (Q again each time, a third of that, because 128 registers of
// O leave no room for it); 32 exponentials a lane are 256 clocks, and the other 350 of a usual tile's 530 instructions
// (sm_90a, four warps a CTA) are softmax, copies and addresses, which the second warp of the quarter hides. So 60 to 70 %
// of the peak where that is 2048 FLOP a clock and multiprocessor: about 200 TFLOP/s on an A100. sm_86 and sm_89 have
// half of it or less, and nothing but tensor cores to wait for. On Hopper mma.sync reaches two thirds of the peak of
// 4096, which needs wgmma, and the port of shared memory as much: 40 %, 400 TFLOP/s, is the most that can be hoped for.
// At the diagonal half of a tile is wasted for each query, 16 keys: with a thousand tokens 3 %.
// Measured on an H200, in the shape of Llama-3.1-8B: 206 TFLOP/s, when a usual tile was 740 instructions and chunks of
// 1,280 rows filled three fifths of two waves. Neither is so any more there; the kernel has not been timed since.
// The host chooses chunks that fill the last wave (specache_prefill_filled). A few rows behind a long history are not
// split by keys.
//
// Packed pages are read only by a continued kivi prefill: they are unpacked by every CTA that reads them, on its way
// to shared memory and without hiding it, at perhaps a third of the speed.
#include "kv_layout.cuh"
#include "seq.cuh"

#include "prefill_work.h"

namespace specache {

constexpr float kPrefillLog2e = 1.44269504f;
constexpr float kNoMaximum = -1e30f;   // finite, so that differences are numbers
constexpr float kRise = 8.0f;          // of a maximum that is let pass
constexpr float kPScaleLog2 = 7.0f;    // p is 2^7 times as large: small ones stay off the fp16 subnormals

// What a CTA works on.
struct PrefillTile {
    specache_seq seq;
    uint64_t packed, wide;   // of the sequence's cache: packed pages, and addresses of wide pages
    uint32_t found;
    uint32_t kv_head, group_heads;
    uint32_t first_query, end_query;   // in the sequence; queries beyond the end are nobody's
    uint32_t first_key, end_key;       // that any of its queries sees; the first is a multiple of 32
};

// A lane's four queries (two tiles, rows i and i + 8) and what they have so far.
template <int D> struct PrefillAccumulator {
    float out[2][D / 8 + 1][4];   // by octets of channels; the last octet's value is 1 everywhere: the sum of p
    float max[4];                 // 2 * tile + half
};

// Positions that a lane's queries see.
struct Seen {
    uint32_t first[4], last[4];
};

// ---- step 1: which queries --------------------------------------------------------------------------------------

SPECACHE_DEVICE uint32_t prefill_first_seen(uint32_t position, uint32_t window) {
    return window != 0 && position >= window ? position - window + 1 : 0;
}

SPECACHE_DEVICE uint32_t position_of(const PrefillTile& tile, uint32_t query) {
    return tile.seq.n + (query < tile.end_query ? query : tile.end_query - 1) / tile.group_heads;
}

// Blocks are KV heads within tiles within sequences, tiles from the last to the first.
SPECACHE_DEVICE PrefillTile find_prefill_tile(const specache_prefill_params& p) {
    PrefillTile tile;
    tile.found = 0;
    tile.kv_head = blockIdx.x % p.n_kv_heads;
    tile.group_heads = p.n_heads / p.n_kv_heads;
    uint32_t index = blockIdx.x / p.n_kv_heads;
    for (uint32_t s = 0; s < p.n_seqs; s++) {
        tile.seq = load_seq(p.seqs, s);
        const uint32_t queries = tile.seq.n_rows * tile.group_heads, tiles = (queries + blockDim.x - 1) / blockDim.x;
        if (index >= tiles) {
            index -= tiles;
            continue;
        }
        const specache_layer_cache cache = load_cache(p.caches, s);
        tile.packed = cache.packed, tile.wide = cache.wide;
        tile.found = 1;
        tile.first_query = (tiles - 1 - index) * blockDim.x;   // a warp of 32 threads has 32 queries
        const uint32_t end = tile.first_query + blockDim.x;
        tile.end_query = end < queries ? end : queries;
        tile.first_key = prefill_first_seen(position_of(tile, tile.first_query), p.window) / kTileKeys * kTileKeys;
        tile.end_key = position_of(tile, tile.end_query - 1) + 1;
        break;
    }
    return tile;
}

// ---- step 2: queries to shared memory ---------------------------------------------------------------------------

// Rows of 2 D bytes (queries) or 4 D bytes (keys: K, then V). The 16-byte pieces of a row are permuted by its number:
// eight rows of one piece, which is what ldmatrix reads at a time, fall into different banks.
SPECACHE_DEVICE uint32_t piece_place(uint32_t row, uint32_t row_bytes, uint32_t piece) {
    return row * row_bytes + (piece ^ row % 8) * 16;
}

// From the place of a piece that is 0 or 1 modulo 8 to that of the piece 2 * pair further in its row: one instruction for
// four pairs and none for the next four, because rows are multiples of 128 bytes and the permutation stays within them.
SPECACHE_DEVICE uint32_t piece_pair(uint32_t place, uint32_t pair) { return (place ^ pair % 4 * 32) + pair / 4 * 128; }

// A query's first channel in q and out.
template <int D>
SPECACHE_DEVICE uint64_t query_start(const specache_prefill_params& p, const PrefillTile& tile, uint32_t query) {
    const uint32_t row = tile.seq.first_row + query / tile.group_heads;
    return (uint64_t(row) * p.n_heads + tile.kv_head * tile.group_heads + query % tile.group_heads) * D;
}

template <class T, int D>
SPECACHE_DEVICE void copy_queries(const specache_prefill_params& p, const PrefillTile& tile, uint8_t* queries) {
    constexpr uint32_t kFours = D / 4;
    const float factor = kPrefillLog2e * (D == 128 ? 0.0883883476f : 0.125f);   // log2(e) / sqrt(D)
#pragma unroll 4
    for (uint32_t at = threadIdx.x; at < blockDim.x * kFours; at += blockDim.x) {
        const uint32_t row = at / kFours, four = at % kFours, query = tile.first_query + row;
        float4 q = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (query < tile.end_query)
            q = load_device(reinterpret_cast<const float4*>(p.q) + query_start<D>(p, tile, query) / 4 + four);
        uint2* to = reinterpret_cast<uint2*>(queries + piece_place(row, 2 * D, four / 2) + four % 2 * 8);
        *to = make_uint2(T::narrow(q.x * factor, q.y * factor), T::narrow(q.z * factor, q.w * factor));
    }
}

// ---- step 3: tiles of keys into the ring ------------------------------------------------------------------------

// Whether there is a tile from `start` on, with keys in a wide page.
SPECACHE_DEVICE bool is_wide(const PrefillTile& tile, uint32_t start) {
    return start < tile.end_key && start >= tile.seq.nq;
}

// That page.
SPECACHE_DEVICE uint64_t wide_page(const PrefillTile& tile, uint32_t start) {
    if (!is_wide(tile, start)) return 0;
    return load_device(reinterpret_cast<const uint64_t*>(tile.wide) + start / SPECACHE_PAGE);
}

// Keys beyond the last row become zeros: p is 0 there, and 0 times what lies in memory that nobody wrote might not be.
// A thread copies the same piece of every fourth row (D = 128 and 128 threads) or of every eighth.
template <int D>
SPECACHE_DEVICE void copy_wide_keys(const PrefillTile& tile, uint32_t start, uint64_t page, uint8_t* stage) {
    constexpr uint32_t kRow = 4 * D, kPieces = kRow / 16;
    static_assert(SPECACHE_PREFILL_THREADS(D) / kPieces * 4 <= kTileKeys, "four steps of the loop stay in the stage");
    const uint32_t there = tile.seq.n + tile.seq.n_rows - start;   // rows
    const uint8_t* from = reinterpret_cast<const uint8_t*>(page) +
                          (uint64_t(tile.kv_head) * SPECACHE_PAGE + start % SPECACHE_PAGE) * kRow + threadIdx.x * 16;
    const uint32_t step = blockDim.x / kPieces;
    uint32_t row = threadIdx.x / kPieces, to = piece_place(row, kRow, threadIdx.x % kPieces);
#pragma unroll 1
    do {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            copy_async_16(stage + to, from, row < there ? 16 : 0);
            to = (to + step * kRow) ^ step % 8 * 16;   // piece_place of the row `step` further down
            from += step * kRow, row += step;
        }
    } while (row < kTileKeys);
}

// The parts of a packed page (kv_layout.cuh), bits and groups at run time.
struct PackedParts {
    uint32_t code_bytes, param_bytes;

    SPECACHE_DEVICE uint32_t k_scale() const { return code_bytes; }
    SPECACHE_DEVICE uint32_t v_codes() const { return code_bytes + 2 * param_bytes; }
    SPECACHE_DEVICE uint32_t v_scale() const { return 2 * code_bytes + 2 * param_bytes; }
    SPECACHE_DEVICE uint32_t bytes() const { return 2 * code_bytes + 4 * param_bytes; }
};

// Two numbers of an octet: code * scale + zero, from the pair of codes that `word` has from bit `bit` on.
template <class T>
SPECACHE_DEVICE uint32_t unpack_pair(uint32_t word, uint32_t bit, uint32_t mask, uint32_t scales, uint32_t zeros) {
    const float2 scale = Fp16::widen(scales), zero = Fp16::widen(zeros);
    const float low = float(word >> bit & mask), high = float(word >> (bit + 16) & mask);
    return T::narrow(low * scale.x + zero.x, high * scale.y + zero.y);
}

// The lane's word of codes that has octet `octet` of a row tile.
SPECACHE_DEVICE uint32_t load_codes(const uint8_t* codes, uint32_t tile, uint32_t tile_words, uint32_t octet,
                                    uint32_t octets_per_word, uint32_t lane) {
    return load_u32(codes + word_byte(int(tile * tile_words + octet / octets_per_word), int(lane)));
}

// K: a row of a code tile is a token, an octet eight channels.
template <class T, int D>
SPECACHE_DEVICE void unpack_keys(const specache_prefill_params& p, const uint8_t* page, const PackedParts& parts,
                                 uint32_t first_token, uint8_t* stage) {
    const uint32_t octets = 8 / p.bits, mask = (1u << p.bits) - 1;
    for (uint32_t at = threadIdx.x; at < kTileKeys / 16 * (D / 8) * 32; at += blockDim.x) {
        const uint32_t lane = at % 32, octet = at / 32 % (D / 8), row = at / 32 / (D / 8) * 16 + lane / 4;
        const uint32_t channel = 8 * octet + lane % 4 * 2;
        const uint32_t word = load_codes(page, (first_token + row) / 16, D * p.bits / 64, octet, octets, lane);
        const uint32_t group = first_token / p.group_size;   // of all 32 tokens
        const uint8_t* scale = page + parts.k_scale() + 2 * (group * D + uint32_t(param_place(int(channel))));
        const uint32_t scales = load_u32(scale), zeros = load_u32(scale + parts.param_bytes);
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            uint8_t* to = stage + piece_place(row + 8 * half, 4 * D, octet) + lane % 4 * 4;
            *reinterpret_cast<uint32_t*>(to) =
                unpack_pair<T>(word, 8 * half + octet % octets * p.bits, mask, scales, zeros);
        }
    }
}

// V: a row of a code tile is a channel, an octet eight tokens.
template <class T, int D>
SPECACHE_DEVICE void unpack_values(const specache_prefill_params& p, const uint8_t* page, const PackedParts& parts,
                                   uint32_t first_token, uint8_t* stage) {
    const uint32_t octets = 8 / p.bits, mask = (1u << p.bits) - 1;
    for (uint32_t at = threadIdx.x; at < D / 16 * (kTileKeys / 8) * 32; at += blockDim.x) {
        const uint32_t lane = at % 32, row = at / 32 % (kTileKeys / 8) * 8 + lane % 4 * 2, tile = at / 32 / 4;
        const uint32_t token = first_token + row, octet = token / 8;
        const uint32_t word = load_codes(page + parts.v_codes(), tile, p.bits, octet, octets, lane);
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t channel = 16 * tile + 8 * half + lane / 4, group = channel / p.group_size;
            const uint8_t* scale =
                page + parts.v_scale() + 2 * (group * SPECACHE_PAGE + uint32_t(param_place(int(token))));
            const uint32_t pair = unpack_pair<T>(word, 8 * half + octet % octets * p.bits, mask, load_u32(scale),
                                                 load_u32(scale + parts.param_bytes));
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                uint8_t* to = stage + piece_place(row + e, 4 * D, D / 8 + channel / 8) + channel % 8 * 2;
                *reinterpret_cast<uint16_t*>(to) = uint16_t(pair >> (16 * e));
            }
        }
    }
}

// The tile from `start` on, if there is one, of which `page` is the wide page; a batch of copies in any case, because
// batches are counted.
template <class T, int D>
SPECACHE_DEVICE void copy_keys(const specache_prefill_params& p, const PrefillTile& tile, uint32_t start,
                               uint64_t page, uint8_t* stage) {
    if (is_wide(tile, start)) copy_wide_keys<D>(tile, start, page, stage);
    if (start < tile.end_key && start < tile.seq.nq) {
        const PackedParts parts{8 * D * p.bits, 128 * D / p.group_size};
        const uint64_t block = uint64_t(start / SPECACHE_PAGE) * p.n_kv_heads + tile.kv_head;
        const uint8_t* packed = reinterpret_cast<const uint8_t*>(tile.packed) + block * parts.bytes();
        unpack_keys<T, D>(p, packed, parts, start % SPECACHE_PAGE, stage);
        unpack_values<T, D>(p, packed, parts, start % SPECACHE_PAGE, stage);
    }
    copy_async_commit();
}

// ---- step 4: scores and softmax ---------------------------------------------------------------------------------

// Of 32 queries and 32 keys; s[tile][octet of keys].
template <class T, int D>
SPECACHE_DEVICE void prefill_scores(const uint8_t* queries, const uint8_t* stage, float (&s)[2][4][4]) {
    const uint32_t lane = threadIdx.x % 32, q_row = threadIdx.x / 32 * kWarpQueries + lane % 16;
    const uint32_t q_place = piece_place(q_row, 2 * D, lane / 16);
    const uint32_t k_place = piece_place(lane % 8 + lane / 16 * 8, 4 * D, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < 32; i++) s[i / 16][i / 4 % 4][i % 4] = 0.0f;
#pragma unroll
    for (uint32_t c = 0; c < D / 16; c++) {
        uint32_t a[2][4], b[2][4];
#pragma unroll
        for (uint32_t m = 0; m < 2; m++)
            load_tiles(a[m], queries + piece_pair(q_place, c) + m * 32 * D);
#pragma unroll
        for (uint32_t n = 0; n < 2; n++)
            load_tiles(b[n], stage + piece_pair(k_place, c) + n * 64 * D);
#if SPECACHE_INJECTED_BUG == 2   // the tests must see a wrong fragment
        const int first = 1;
#else
        const int first = 0;
#endif
#pragma unroll
        for (int i = 0; i < 8; i++)
            mma_16(T{}, s[i / 4][i % 4], a[i / 4], b[i % 4 / 2][i % 2 * 2 + first],
                   b[i % 4 / 2][i % 2 * 2 + 1 - first]);
    }
}

// Keys that a query does not see get a score of minus infinity.
SPECACHE_DEVICE void hide_keys(const Seen& seen, uint32_t start, float (&s)[2][4][4]) {
    const uint32_t first = start + threadIdx.x % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) {
        const uint32_t query = i / 16 * 2 + i % 4 / 2, key = first + i / 4 % 4 * 8 + i % 2;
#if SPECACHE_INJECTED_BUG == 3   // the tests must see a row that looks ahead
        const bool visible = key >= seen.first[query] && key <= seen.last[query] + 1;
#else
        const bool visible = key >= seen.first[query] && key <= seen.last[query];
#endif
        if (!visible) s[i / 16][i / 4 % 4][i % 4] = bit_cast<float>(0xFF800000u);
    }
}

template <int D> SPECACHE_DEVICE void raise_maxima(PrefillAccumulator<D>& acc, const float (&max)[4]) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const float next = max[q] > acc.max[q] + kRise ? max[q] : acc.max[q];
        const float factor = exp2_approx(acc.max[q] - next);   // exactly 1 where the maximum stays
        acc.max[q] = next;
#pragma unroll
        for (int n = 0; n <= D / 8; n++) {
            acc.out[q / 2][n][q % 2 * 2] *= factor;
            acc.out[q / 2][n][q % 2 * 2 + 1] *= factor;
        }
    }
}

// Scores become p.
template <int D> SPECACHE_DEVICE void prefill_softmax(PrefillAccumulator<D>& acc, float (&s)[2][4][4]) {
    float max[4];
    bool rises = false;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        max[q] = s[q / 2][0][q % 2 * 2];
#pragma unroll
        for (int i = 1; i < 8; i++) max[q] = fmaxf(max[q], s[q / 2][i / 2][q % 2 * 2 + i % 2]);
        max[q] = fmaxf(max[q], __shfl_xor_sync(~0u, max[q], 1));
        max[q] = fmaxf(max[q], __shfl_xor_sync(~0u, max[q], 2));
        rises = rises || max[q] > acc.max[q] + kRise;
    }
    if (__any_sync(~0u, rises)) raise_maxima(acc, max);
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const float shift = kPScaleLog2 - acc.max[q];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float& x = s[q / 2][i / 2][q % 2 * 2 + i % 2];
            x = exp2_approx(x + shift);
        }
    }
}

// ---- step 5: values ---------------------------------------------------------------------------------------------

template <class T, int D>
SPECACHE_DEVICE void add_values(PrefillAccumulator<D>& acc, const uint8_t* stage, const float (&p)[2][4][4]) {
    const uint32_t lane = threadIdx.x % 32, v_place = piece_place(lane % 16, 4 * D, D / 8 + lane / 16);
#pragma unroll
    for (uint32_t step = 0; step < kTileKeys / 16; step++) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float(&pair)[4] = p[i / 4][2 * step + i % 4 / 2];
            a[i / 4][i % 4] = T::narrow(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
        const uint32_t ones = T::narrow(1.0f, 1.0f);
#pragma unroll
        for (int m = 0; m < 2; m++) mma_16(T{}, acc.out[m][D / 8], a[m], ones, ones);
#pragma unroll
        for (uint32_t n = 0; n < D / 16; n++) {
            // Keys 0-7 and 8-15 of an octet of channels, then of the next. In memory a key is a row: transposed.
            uint32_t b[4];
            load_tiles_transposed(b, stage + piece_pair(v_place, n) + step * 64 * D);
#pragma unroll
            for (int i = 0; i < 4; i++)
                mma_16(T{}, acc.out[i / 2][2 * n + i % 2], a[i / 2], b[i % 2 * 2], b[i % 2 * 2 + 1]);
        }
    }
}

// ---- step 6: all keys of a warp ---------------------------------------------------------------------------------

// Until at most `batches` are under way.
SPECACHE_DEVICE void wait_for_keys(uint32_t batches) {
    if (batches == 0) copy_async_wait<0>();
    else copy_async_wait<1>();
}

// What the warp's queries see together, which decides whether it must look at a tile, and key by key.
struct WarpView {
    uint32_t low, high;               // positions of its first and last query
    uint32_t first_low, first_high;   // the first that they see
    bool has_queries;
};

SPECACHE_DEVICE WarpView warp_view(const specache_prefill_params& p, const PrefillTile& tile) {
    const uint32_t first = tile.first_query + threadIdx.x / 32 * kWarpQueries;
    WarpView view;
    view.has_queries = first < tile.end_query;
    view.low = position_of(tile, first);
    view.high = position_of(tile, first + kWarpQueries - 1);
    view.first_low = prefill_first_seen(view.low, p.window);
    view.first_high = prefill_first_seen(view.high, p.window);
    return view;
}

SPECACHE_DEVICE Seen seen_by_lane(const specache_prefill_params& p, const PrefillTile& tile) {
    Seen seen;
#pragma unroll
    for (uint32_t q = 0; q < 4; q++) {
        const uint32_t row = threadIdx.x / 32 * kWarpQueries + q / 2 * 16 + q % 2 * 8 + threadIdx.x % 32 / 4;
        seen.last[q] = position_of(tile, tile.first_query + row);
        seen.first[q] = prefill_first_seen(seen.last[q], p.window);
    }
    return seen;
}

template <class T, int D>
SPECACHE_DEVICE void attend_keys(const specache_prefill_params& p, const PrefillTile& tile, const uint8_t* queries,
                                 uint8_t* ring, uint32_t stages, PrefillAccumulator<D>& acc) {
    constexpr uint32_t kStage = kTileKeys * 4 * D;
    const WarpView view = warp_view(p, tile);
    uint32_t stage = 0;
#pragma unroll 1
    for (uint32_t start = tile.first_key; start < tile.end_key; start += kTileKeys) {
        const uint32_t next = start + (stages - 1) * kTileKeys;
        const uint64_t next_page = wide_page(tile, next);   // arrives while copies are waited for
        wait_for_keys(stages - 2);
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
        __syncthreads();         // all threads' copies are there, and nobody reads the stage before this one any more
#endif
        const uint32_t free_stage = stage == 0 ? stages - 1 : stage - 1;
        copy_keys<T, D>(p, tile, next, next_page, ring + free_stage * kStage);
        const uint8_t* keys = ring + stage * kStage;
        stage = stage + 1 == stages ? 0 : stage + 1;
        const uint32_t last = start + kTileKeys - 1;
        if (!view.has_queries || start > view.high || last < view.first_low) continue;
        float s[2][4][4];
        prefill_scores<T, D>(queries, keys, s);
        if (last > view.low || start < view.first_high) hide_keys(seen_by_lane(p, tile), start, s);
        prefill_softmax(acc, s);
        add_values<T, D>(acc, keys, s);
    }
}

template <int D>
SPECACHE_DEVICE void store_queries(const specache_prefill_params& p, const PrefillTile& tile,
                                   const PrefillAccumulator<D>& acc) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t q = 0; q < 4; q++) {
        const uint32_t query =
            tile.first_query + threadIdx.x / 32 * kWarpQueries + q / 2 * 16 + q % 2 * 8 + lane / 4;
        if (query >= tile.end_query) continue;
        float2* to = reinterpret_cast<float2*>(p.out) + query_start<D>(p, tile, query) / 2 + lane % 4;
        const float by = 1.0f / acc.out[q / 2][D / 8][q % 2 * 2];
#pragma unroll
        for (uint32_t n = 0; n < D / 8; n++) {
            const float(&out)[4] = acc.out[q / 2][n];
            store_device(to + 4 * n, make_float2(out[q % 2 * 2] * by, out[q % 2 * 2 + 1] * by));
        }
    }
}

template <class T, int D> SPECACHE_DEVICE void attend_prefill(const specache_prefill_params& p) {
    follow_previous_kernel();
    SPECACHE_DYNAMIC_SHARED(memory);
    const PrefillTile tile = find_prefill_tile(p);
    if (tile.found == 0) return;
    const uint32_t stages = prefill_shape(D, p.shared_limit).stages;
    uint8_t* ring = memory + blockDim.x * 2 * D;
    for (uint32_t s = 0; s + 1 < stages; s++) {
        const uint32_t start = tile.first_key + s * kTileKeys;
        copy_keys<T, D>(p, tile, start, wide_page(tile, start), ring + s * kTileKeys * 4 * D);
    }
    copy_queries<T, D>(p, tile, memory);   // behind the first copies, whose latency it hides
    PrefillAccumulator<D> acc;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        acc.max[q] = kNoMaximum;
#pragma unroll
        for (int n = 0; n < D / 4 + 2; n++) acc.out[q / 2][n / 2][q % 2 * 2 + n % 2] = 0.0f;
    }
    attend_keys<T, D>(p, tile, memory, ring, stages, acc);
    copy_async_wait<0>();   // of batches without copies
    store_queries<D>(p, tile, acc);
}

}   // namespace specache

// registers: <= 168 specache_prefill_d64_*    (3 CTAs of 128 threads an SM)
// registers: <= 255 specache_prefill_d128_*   (256 threads an SM, in 1 or 2 CTAs)
#define SPECACHE_PREFILL_KERNEL(D, dtype, T)                                                            \
    extern "C" __global__ void __launch_bounds__(SPECACHE_PREFILL_THREADS(D), SPECACHE_PREFILL_CTAS(D)) \
        specache_prefill_d##D##_##dtype(const __grid_constant__ specache_prefill_params p) {            \
        specache::attend_prefill<specache::T, D>(p);                                                    \
    }
SPECACHE_PREFILL_KERNELS(SPECACHE_PREFILL_KERNEL)
#undef SPECACHE_PREFILL_KERNEL
