// Attention of a decode step: one or two rows a sequence over packed pages, prefetched pairs and wide pages.
//
// K and V are the A operand of mma.m16n8k16 and the query columns of one KV head the B operand (kv_layout.cuh), so that
// the G query heads of both rows share every byte that is read. A CTA of four warps takes a unit of work (attn_work.h):
// each warp streams items of its own through a ring of stages in shared memory (cp.async), keeps a softmax of its own,
// and at the end the four are merged to one part in device memory. A second kernel (attn_combine.cu) combines the parts of each row.
//
// Scores are in units of log2: the factor log2(e) / sqrt(D) goes into q, once, so that p = 2^(s - max). For the
// selection (select.cu) the last row's scores are stored as they are; the combine adds log2 of their sum. The same of
// row 0, if somebody wants to know how good the last selection was.
//
// Numbers. Sums are fp32, codes exact. Against zeros and 16-bit pairs q is the sum of two 16-bit numbers, 2^-16 or
// better: a key channel with a large bias, as Qwen2 has, must count the same in packed and in wide pages. Against codes
// q times K's scale is one fp16 number, 2^-12 of a code's range, which quantisation exceeds a hundred times. p, and p
// times V's scale, are fp16, 2^-12 of each product; for bf16 pairs p is the sum of two bf16 numbers. The second
// products cost nothing that a memory-bound kernel would notice. 2^(4-e) is folded into q and p beside the scales; the
// 4 keeps small numbers off the fp16 subnormals, and q times scale and V's scale must stay below 4094 for it.
#include "attn_units.cuh"
#include "kv_layout.cuh"

namespace specache {

constexpr float kLog2e = 1.44269504f;
// A code counts 2^(e-24), q and p carry 2^(4-e): sums of products with codes are 2^-20 of what they stand for.
constexpr float kPScale = 16.0f, kPScaleLog2 = 4.0f;
constexpr float kCodeUnit = 1048576.0f;
SPECACHE_DEVICE float minus_infinity() { return bit_cast<float>(0xFF800000u); }

// Into how many terms p is split where it meets 16-bit pairs of T.
template <class T> constexpr int kPTerms = 1;
template <> constexpr int kPTerms<Bf16> = 2;

// Two numbers as the sum of TERMS pairs of T: each term is what the ones before left over.
template <class T, int TERMS> SPECACHE_DEVICE void split_pair(float x, float y, uint32_t (&terms)[TERMS]) {
#pragma unroll
    for (int t = 0; t < TERMS; t++) {
        terms[t] = T::narrow(x, y);
        const float2 taken = T::widen(terms[t]);
        x -= taken.x;
        y -= taken.y;
    }
}

SPECACHE_DEVICE uint32_t half_pair(float x, float y) { return Fp16::narrow(x, y); }

// 2^-e as a pair of fp16 numbers.
SPECACHE_HOST_DEVICE constexpr uint32_t half_power(int e) { return uint32_t(15 - e) << 10 | uint32_t(15 - e) << 26; }

constexpr uint32_t kNoSeq = ~0u;

// Where the unit's KV head lies in the cache of its sequence.
struct HeadCache {
    uint64_t packed;   // its block of page 0
    uint64_t wide;     // addresses of wide pages
    uint64_t slots, pairs, skip;
};

// What a CTA works on.
struct Unit {
    HeadCache cache;
    specache_seq seq;
    SeqWork work;
    uint32_t index;       // among all units
    uint32_t seq_index;   // kNoSeq: there is no such unit, and all else is unset
    uint32_t kv_head, column_tile;
    uint32_t first_item, end_item;
};

// Queries, a word a pair of channels: as B operands lane 4i + j finds column i, pair j of four octets in 16 bytes. As the A
// operand that meets zeros, the two terms of two octets: the first terms are rows 0-7 and the second ones rows 8-15.
template <int D> struct AttnShared {
    static constexpr int kWords = int(kColumns) * D / 2;
    alignas(128) uint32_t code_q[kWords];   // times 2^(4-e): meets codes
    uint32_t zero_q[2 * kWords];            // meets zeros: fp16, a sum of two
    uint32_t pair_q[2][kWords];             // meets 16-bit K: of its type, a sum of two
};

// How the warps' results meet, where the rings were. Pitch D + 4: the columns 2j and rows i of a store fall into
// different banks.
template <int D> struct MergeShared {
    float out[kAttnWarps][kColumns][D + 4];
    float max[kAttnWarps][kColumns];
    float sum[kAttnWarps][kColumns];
};

// The warps' stages, in shared memory like what else a lane looks up.
struct Ring {
    uint32_t stage_bytes, stages;

    // Of this thread's warp; `rings` is where the first warp's begin.
    SPECACHE_DEVICE uint8_t* stage(uint8_t* rings, uint32_t number) const {
        return rings + (threadIdx.x / 32 * stages + number) * stage_bytes;
    }
};

// What is known of the unit's columns, for lanes that look it up: in registers it would cost a CTA its place.
struct Columns {
    uint64_t scores[kColumns];   // of the column's row and head, if the selection wants them; else 0
    uint32_t last[kColumns];     // position that the column's row stands at
};
static_assert(sizeof(Unit) + sizeof(Columns) + sizeof(Ring) <= kUnitBytes, "what attn_fits counts");

// Running softmax of a warp over its items. Lane 4i + j: columns 2j, 2j + 1.
template <int D> struct Accumulator {
    float out[D / 16][4];   // p V^T as mma gives it: row = channel
    float zero[2][4];       // p times V's zeros: row = channel group, half of the tokens in rows 0-7 of the first, half in
                            // rows 8-15 of the second; the other rows are nobody's
    float max[2];           // the same in all i
    float sum[2];           // over this lane's rows
};

// ---- step 1: which unit -----------------------------------------------------------------------------------------

// Without slots (top_k 0) what the sequence says of them is never looked at.
SPECACHE_DEVICE HeadCache head_cache(const specache_attn_params& p, uint32_t seq_index, uint32_t kv_head) {
    const specache_layer_cache cache = load_cache(p.caches, seq_index);
    const uint64_t first_slot = uint64_t(kv_head) * p.top_k;
    return HeadCache{cache.packed + uint64_t(kv_head) * packed_block_bytes(&p), cache.wide,
                     cache.slots + first_slot * 4, cache.pairs + first_slot * (4 * p.head_dim),
                     cache.skip + uint64_t(kv_head) * cache.skip_stride * 8};
}

// The unit's place in its sequence. Column tiles vary fastest: CTAs that read the same pages run at the same time, and
// the second finds them in L2.
SPECACHE_DEVICE void place_unit(const specache_attn_params& p, uint32_t seq_index, uint32_t index, Unit& unit) {
    unit.seq = load_seq(p.seqs, seq_index);
    unit.work = seq_work(&p, &unit.seq);
    unit.column_tile = index % unit.work.column_tiles;
    const uint32_t part = index / unit.work.column_tiles % unit.work.parts;
    unit.kv_head = index / unit.work.column_tiles / unit.work.parts;
    unit.first_item = part * unit.work.unit_items;
    const uint32_t end = unit.first_item + unit.work.unit_items;
    unit.end_item = end < unit.work.items ? end : unit.work.items;
    unit.cache = head_cache(p, seq_index, unit.kv_head);
}

// One warp looks 32 sequences at a time for the one that unit `index` belongs to.
SPECACHE_DEVICE_CALL void find_unit(const specache_attn_params& p, uint32_t index, Unit& unit) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t before = 0, owner = kNoSeq;
    for (uint32_t first = 0; first < p.n_seqs && owner == kNoSeq; first += 32) {
        const uint32_t own = units_of(p, first + lane);
        uint32_t through = own;   // units up to and with this lane's sequence
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint32_t other = __shfl_up_sync(~0u, through, distance);
            through += int(lane) >= distance ? other : 0;
        }
        const uint32_t beyond = __ballot_sync(~0u, before + through > index);
        const int source = beyond == 0 ? 31 : __ffs(int(beyond)) - 1;
        before += __shfl_sync(~0u, beyond == 0 ? through : through - own, source);
        if (beyond != 0) owner = first + uint32_t(source);
    }
    if (lane != 0) return;
    unit.index = index;
    unit.seq_index = owner;
    if (owner != kNoSeq) place_unit(p, owner, index - before, unit);
}

// ---- step 2: the queries ----------------------------------------------------------------------------------------

template <class T, int D, int B>
SPECACHE_DEVICE void load_queries(const specache_attn_params& p, const Unit& unit, AttnShared<D>& shared) {
    const uint32_t group_heads = p.n_heads / p.n_kv_heads;
    const float factor = kLog2e * (D == 128 ? 0.0883883476f : 0.125f);   // log2(e) / sqrt(D)
    for (int at = int(threadIdx.x); at < AttnShared<D>::kWords; at += int(kAttnThreads)) {
        // Word `at`: octet 4c + x of lane 4i + j, in the order of 16-byte loads.
        const int x = at % 4, lane = at / 4 % 32, octet = at / 128 * 4 + x;
        const uint32_t column = unit.column_tile * kColumns + uint32_t(lane / 4), row = column / group_heads;
        const uint32_t head = unit.kv_head * group_heads + column % group_heads;
        float2 q = make_float2(0.0f, 0.0f);
        if (row < unit.seq.n_rows) {
            const uint64_t start = (uint64_t(unit.seq.first_row + row) * p.n_heads + head) * D;
            q = load_device(reinterpret_cast<const float2*>(p.q) + (start + uint64_t(8 * octet + lane % 4 * 2)) / 2);
        }
        q.x *= factor;
        q.y *= factor;
        const float fold = kPScale / float(1 << code_exponent<B>(octet));
        shared.code_q[at] = Fp16::narrow(q.x * fold, q.y * fold);
        uint32_t zero_terms[2], pair_terms[2];
        split_pair<Fp16>(q.x, q.y, zero_terms);
        split_pair<T>(q.x, q.y, pair_terms);
#pragma unroll
        for (int t = 0; t < 2; t++) {
            shared.zero_q[(octet / 2 * 32 + lane) * 4 + octet % 2 * 2 + t] = zero_terms[t];
            shared.pair_q[t][at] = pair_terms[t];
        }
    }
}

// A thread a column.
SPECACHE_DEVICE void describe_columns(const specache_attn_params& p, const Unit& unit, Columns& columns) {
    if (threadIdx.x >= kColumns) return;
    const uint32_t group_heads = p.n_heads / p.n_kv_heads;
    const uint32_t column = unit.column_tile * kColumns + threadIdx.x, row = column / group_heads;
    const uint32_t head = unit.kv_head * group_heads + column % group_heads;
    const uint64_t scores = row == unit.seq.n_rows - 1 ? p.scores : row == 0 ? p.first_scores : 0;
    const uint64_t start = (uint64_t(unit.seq_index) * p.n_heads + head) * p.score_stride;
    columns.scores[threadIdx.x] = scores != 0 ? scores + 4 * start : 0;
    columns.last[threadIdx.x] = unit.seq.n + (row < unit.seq.n_rows ? row : unit.seq.n_rows - 1);
}

// The lane's column 2j + e.
SPECACHE_DEVICE uint32_t own_column(uint32_t e) { return threadIdx.x % 4 * 2 + e; }

SPECACHE_DEVICE float* scores_of(const Columns& columns, uint32_t e) {
    return reinterpret_cast<float*>(columns.scores[own_column(e)]);
}

// The positions that the column's row sees.
struct Seen {
    uint32_t first, last;
};

SPECACHE_DEVICE Seen seen_by(const Columns& columns, uint32_t window, uint32_t e) {
    const uint32_t last = columns.last[own_column(e)];
    return Seen{first_seen(last, window), last};
}

// ---- step 3: items into the ring --------------------------------------------------------------------------------

// Which position row `row` of a wide tile holds; SPECACHE_EMPTY_SLOT: none that is read from there.
SPECACHE_DEVICE uint32_t wide_position(const specache_attn_params& p, const Unit& unit, uint32_t tile, uint32_t row) {
    if (tile >= unit.work.slot_tiles) {
        const uint32_t position = unit.work.wide_start + (tile - unit.work.slot_tiles) * kWideTile + row;
        return position < unit.seq.n + unit.seq.n_rows ? position : SPECACHE_EMPTY_SLOT;
    }
    const uint32_t slot = tile * kWideTile + row;
    if (slot >= p.top_k) return SPECACHE_EMPTY_SLOT;
    const uint32_t position = load_device(reinterpret_cast<const uint32_t*>(unit.cache.slots) + slot);
    return position < unit.seq.nq ? position : SPECACHE_EMPTY_SLOT;
}

// Rows of 4 D bytes. The 16-byte pieces of a row are permuted by its number: eight rows of one piece, which is what
// ldmatrix reads at a time, fall into different banks. Rows without a position become zeros: p is 0 there, and 0 times
// what lies in memory that nobody wrote might not be.
template <int D>
SPECACHE_DEVICE void copy_wide_tile(const specache_attn_params& p, const Unit& unit, uint32_t tile, uint8_t* stage) {
    constexpr uint32_t kRow = 4 * D, kPieces = kRow / 16;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t rows = __ballot_sync(~0u, wide_position(p, unit, tile, lane % 16) != SPECACHE_EMPTY_SLOT);
    uint64_t from;
    if (tile < unit.work.slot_tiles) {
        from = unit.cache.pairs + uint64_t(tile) * (kWideTile * kRow);
    } else {
        const uint32_t position = unit.work.wide_start + (tile - unit.work.slot_tiles) * kWideTile;
        from = load_device(reinterpret_cast<const uint64_t*>(unit.cache.wide) + position / SPECACHE_PAGE) +
               (uint64_t(unit.kv_head) * SPECACHE_PAGE + position % SPECACHE_PAGE) * kRow;
    }
#pragma unroll 4
    for (uint32_t at = lane; at < kWideTile * kPieces; at += 32) {
        const uint32_t row = at / kPieces, piece = at % kPieces;
        copy_async_16(stage + row * kRow + (piece ^ row % 8) * 16, reinterpret_cast<const uint8_t*>(from) + at * 16,
                      (rows >> row & 1) != 0 ? 16 : 0);
    }
}

template <int D, int B>
SPECACHE_DEVICE void copy_page(const specache_attn_params& p, const Unit& unit, uint32_t page, uint8_t* stage) {
    const uint32_t bytes = uint32_t(PackedPage<D, B>::bytes(int(p.group_size)));
    const uint64_t from = unit.cache.packed + uint64_t(page) * (p.n_kv_heads * bytes);
#pragma unroll 4
    for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512)
        copy_async_16(stage + at, reinterpret_cast<const uint8_t*>(from) + at, 16);
}

template <int D, int B>
SPECACHE_DEVICE void copy_item(const specache_attn_params& p, const Unit& unit, uint32_t item, uint8_t* stage) {
#if SPECACHE_INJECTED_BUG == 6   // the tests must see copies that nobody waits for
    const bool needed = true;
#else
    const bool needed = item < unit.end_item;
#endif
    if (needed && item < unit.work.pages) copy_page<D, B>(p, unit, unit.work.first_page + item, stage);
    else if (needed && item < unit.work.items) copy_wide_tile<D>(p, unit, item - unit.work.pages, stage);
    copy_async_commit();   // also without a copy: batches are counted
}

// All stages but one: the last is filled when the first is attended to. What this pass has not just appended, which is in
// one of the last two items, nobody writes any more: it is read before the previous kernel ends. So is what the pass is
// told. Pairs may be on their way still.
template <int D, int B>
SPECACHE_DEVICE void fill_ring(const specache_attn_params& p, const Unit& unit, const Ring& ring, uint8_t* rings) {
    const uint32_t first = unit.first_item + threadIdx.x / 32, last = first + (ring.stages - 2) * kAttnWarps;
    const bool pairs = unit.work.slot_tiles != 0 && last >= unit.work.pages;
    if (pairs || last + 2 >= unit.work.items) wait_for_previous_kernel();
    for (uint32_t s = 0; s + 1 < ring.stages; s++)
        copy_item<D, B>(p, unit, first + s * kAttnWarps, ring.stage(rings, s));
}

// Until at most `batches` are under way.
SPECACHE_DEVICE void wait_for_copies(uint32_t batches) {
    if (batches == 1) copy_async_wait<1>();
    else if (batches == 2) copy_async_wait<2>();
    else copy_async_wait<3>();
}

// ---- step 4: softmax --------------------------------------------------------------------------------------------

template <int D> SPECACHE_DEVICE void clear(Accumulator<D>& acc) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int m = 0; m < D / 16; m++) acc.out[m][e] = 0.0f;
        acc.zero[0][e] = acc.zero[1][e] = 0.0f;
        acc.max[e % 2] = kNothingSeen;
        acc.sum[e % 2] = 0.0f;
    }
}

template <int D> SPECACHE_DEVICE void raise_maximum(Accumulator<D>& acc, const float (&max)[2]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float factor = exp2_approx(acc.max[e % 2] - max[e % 2]);
#pragma unroll
        for (int m = 0; m < D / 16; m++) acc.out[m][e] *= factor;
        acc.zero[e / 2][e] *= factor;
        if (e < 2) acc.sum[e] *= factor;
    }
    acc.max[0] = max[0];
    acc.max[1] = max[1];
}

// Scores of TILES x 16 tokens become p times kPScale. The maximum seldom rises after the first pages: one vote decides whether the
// sums must follow.
template <int D, int TILES> SPECACHE_DEVICE void softmax(Accumulator<D>& acc, float (&s)[TILES][4]) {
    float max[2] = {acc.max[0], acc.max[1]};
#pragma unroll
    for (int i = 0; i < 4 * TILES; i++) max[i % 2] = fmaxf(max[i % 2], s[i / 4][i % 4]);
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
        max[0] = fmaxf(max[0], __shfl_xor_sync(~0u, max[0], distance));
        max[1] = fmaxf(max[1], __shfl_xor_sync(~0u, max[1], distance));
    }
    if (__any_sync(~0u, max[0] > acc.max[0] || max[1] > acc.max[1])) raise_maximum(acc, max);
    const float unit[2] = {acc.max[0] - kPScaleLog2, acc.max[1] - kPScaleLog2};
#pragma unroll
    for (int i = 0; i < 4 * TILES; i++) {
        float& x = s[i / 4][i % 4];
        x = exp2_approx(x - unit[i % 2]);
        acc.sum[i % 2] += x;
    }
}

// ---- step 5: a packed page --------------------------------------------------------------------------------------

SPECACHE_DEVICE uint4 load_shared_16(const void* from) { return *static_cast<const uint4*>(from); }

SPECACHE_DEVICE uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A lane's words one after the other; word numbers are constants after unrolling, and a chunk is read at its first.
struct LaneWords {
    const uint8_t* codes;
    uint4 chunk;

    SPECACHE_DEVICE uint32_t operator[](int word) {
        if (word % kLaneWords == 0)
            chunk = load_shared_16(codes + word / kLaneWords * kChunkBytes + threadIdx.x % 32 * kLaneBytes);
        return word_of(chunk, word % kLaneWords);
    }
};

// What all tokens of a group share: q times the scales, and the sum of q times the zeros for columns 2j, 2j + 1. Zeros are all
// columns of B, so that lane 4i + j gets the sum of column i; the two octets of a chunk are chains of their own.
template <int D, int B>
SPECACHE_DEVICE void scale_queries(const AttnShared<D>& shared, const uint8_t* page, int g, int group,
                                   uint32_t (&q)[D / 8], float (&bias)[2]) {
    using Page = PackedPage<D, B>;
    const int lane = int(threadIdx.x) % 32, j = lane % 4;
    float sums[2][4] = {};
#pragma unroll
    for (int c = 0; c < D / 32; c++) {
        const int at = 2 * (group * D + 32 * c + 8 * j);
        const uint4 scale = load_shared_16(page + Page::k_scale(g) + at);
        const uint4 zero = load_shared_16(page + Page::k_zero(g) + at);
        const uint4 code_q = load_shared_16(&shared.code_q[(c * 32 + lane) * 4]);
#pragma unroll
        for (int x = 0; x < 4; x++) q[4 * c + x] = multiply_fp16(word_of(code_q, x), word_of(scale, x));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint4 zero_q = load_shared_16(&shared.zero_q[((2 * c + h) * 32 + lane) * 4]);
            const uint32_t a[4] = {zero_q.x, zero_q.y, zero_q.z, zero_q.w};
            mma_m16n8k16(sums[h], a, word_of(zero, 2 * h), word_of(zero, 2 * h + 1));
        }
    }
    const float of_column = sums[0][0] + sums[0][2] + (sums[1][0] + sums[1][2]);
    bias[0] = __shfl_sync(~0u, of_column, 8 * j);
    bias[1] = __shfl_sync(~0u, of_column, 8 * j + 4);
}

// The scores of a page.
template <int D, int B>
SPECACHE_DEVICE void page_scores(const AttnShared<D>& shared, const uint8_t* page, int g, float (&s)[4][4]) {
    uint32_t q[D / 8];
    float bias[2] = {};
    LaneWords words{page + PackedPage<D, B>::k_codes(), {}};
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
        if (tile == 0) scale_queries<D, B>(shared, page, g, 0, q, bias);
        if (tile == 2 && g == 32) scale_queries<D, B>(shared, page, g, 1, q, bias);
#pragma unroll
        for (int e = 0; e < 4; e++) s[tile][e] = 0.0f;
#pragma unroll
        for (int w = 0; w < kTileWords<D, B>; w++) {
            const uint32_t word = words[tile * kTileWords<D, B> + w];
#pragma unroll
            for (int step = 0; step < kOctetsPerWord<B> / 2; step++) {
                uint32_t a[4];
                code_fragment<B>(word, step, a);
                const int octet = w * kOctetsPerWord<B> + 2 * step;
#if SPECACHE_INJECTED_BUG == 2   // the tests must see a wrong fragment
                mma_m16n8k16(s[tile], a, q[octet + 1], q[octet]);
#else
                mma_m16n8k16(s[tile], a, q[octet], q[octet + 1]);
#endif
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) s[tile][e] = s[tile][e] * kCodeUnit + bias[e % 2];
    }
}

// Bits of the tokens of a page that begins at `start` from position `first` on.
SPECACHE_HOST_DEVICE constexpr uint64_t tokens_from(uint32_t first, uint32_t start) {
    return first <= start ? ~uint64_t(0) : first - start >= 64 ? 0 : ~uint64_t(0) << (first - start);
}

// Replaced tokens and those before the window get a score of minus infinity.
SPECACHE_DEVICE void hide_tokens(const Columns& columns, uint32_t window, uint32_t start, uint64_t skip,
                                 float (&s)[4][4]) {
    const int i = int(threadIdx.x) % 32 / 4;
    const uint64_t seen[2] = {(~skip & tokens_from(seen_by(columns, window, 0).first, start)) >> i,
                              (~skip & tokens_from(seen_by(columns, window, 1).first, start)) >> i};
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if ((seen[e % 2] >> (16 * tile + 8 * (e / 2)) & 1) == 0) s[tile][e] = minus_infinity();
}

// For the selection, of all tokens or of those that are not hidden. Lanes of one column write 32 bytes side by side.
template <bool ALL> SPECACHE_DEVICE void store_page_scores(const Columns& columns, uint32_t start, const float (&s)[4][4]) {
    const uint32_t token = start + threadIdx.x % 32 / 4;
#pragma unroll
    for (uint32_t e = 0; e < 2; e++) {
        float* scores = scores_of(columns, e);
        if (scores == nullptr) continue;
        scores += token;
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {   // tokens 8 apart
            const float x = s[i / 2][i % 2 * 2 + e];
            if (ALL || x != minus_infinity()) store_device(scores + i * 8, x);
        }
    }
}

// p as B operands for V, with V's zeros taken on the way: tokens are k, and octet o is folded with 2^-e.
template <int D, int B>
SPECACHE_DEVICE void page_probabilities(Accumulator<D>& acc, const uint8_t* page, int g, const float (&s)[4][4],
                                        uint32_t (&p)[8]) {
    const int lane = int(threadIdx.x) % 32, i = lane / 4, j = lane % 4;
#pragma unroll
    for (int o = 0; o < 8; o++)
        p[o] = transpose_8x8(Fp16::narrow(s[o / 2][o % 2 * 2], s[o / 2][o % 2 * 2 + 1]));
#pragma unroll
    for (int c = 0; c < 2; c++) {
        const uint8_t* zeros = page + PackedPage<D, B>::v_zero(g) + 2 * (i * kPage + 32 * c + 8 * j);
        const uint4 zero = i < groups_in(D, g) ? load_shared_16(zeros) : make_uint4(0, 0, 0, 0);
        // As loaded: octets 0 and 2 of the tokens are rows 0-7, octets 1 and 3 rows 8-15.
        const uint32_t a[4] = {zero.x, zero.y, zero.z, zero.w};
        mma_m16n8k16(acc.zero[0], a, p[4 * c], p[4 * c + 2]);
        mma_m16n8k16(acc.zero[1], a, p[4 * c + 1], p[4 * c + 3]);
    }
#pragma unroll
    for (int o = 0; o < 8; o++) p[o] = multiply_fp16(p[o], half_power(code_exponent<B>(o)));
}

template <int D, int B>
SPECACHE_DEVICE void add_page_values(Accumulator<D>& acc, const uint8_t* page, int g, const uint32_t (&p)[8]) {
    using Page = PackedPage<D, B>;
    const int j = int(threadIdx.x) % 4;
    uint32_t scaled[8];
    LaneWords words{page + Page::v_codes(g), {}};
#pragma unroll
    for (int m = 0; m < D / 16; m++) {
        if (m % 4 == 0 || (m % 2 == 0 && g == 32)) {   // a channel group begins
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int at = 2 * (groups_in(16 * m, g) * kPage + 32 * c + 8 * j);
                const uint4 scale = load_shared_16(page + Page::v_scale(g) + at);
#pragma unroll
                for (int x = 0; x < 4; x++) scaled[4 * c + x] = multiply_fp16(p[4 * c + x], word_of(scale, x));
            }
        }
#pragma unroll
        for (int w = 0; w < kTileWords<kPage, B>; w++) {
            const uint32_t word = words[m * kTileWords<kPage, B> + w];
#pragma unroll
            for (int step = 0; step < kOctetsPerWord<B> / 2; step++) {
                uint32_t a[4];
                code_fragment<B>(word, step, a);
                const int octet = w * kOctetsPerWord<B> + 2 * step;
                mma_m16n8k16(acc.out[m], a, scaled[octet], scaled[octet + 1]);
            }
        }
    }
}

template <int D, int B>
SPECACHE_DEVICE void attend_page(const specache_attn_params& p, const Unit& unit, const Columns& columns,
                                 const AttnShared<D>& shared, uint32_t page_index, const uint8_t* page,
                                 Accumulator<D>& acc) {
    const int g = int(p.group_size);
    const uint32_t start = page_index * SPECACHE_PAGE;
    uint64_t skip = 0;
#if SPECACHE_INJECTED_BUG != 4   // the tests must see a position that counts twice
    if (unit.work.slot_tiles != 0) skip = load_device(reinterpret_cast<const uint64_t*>(unit.cache.skip) + page_index);
#endif
    float s[4][4];
    page_scores<D, B>(shared, page, g, s);
    const bool hides = skip != 0 || first_seen(unit.seq.n + 1, p.window) > start;
    if (hides) hide_tokens(columns, p.window, start, skip, s);
    if (p.scores != 0 || p.first_scores != 0) {
        if (hides) store_page_scores<false>(columns, start, s);
        else store_page_scores<true>(columns, start, s);
    }
    softmax(acc, s);
    uint32_t probabilities[8];
    page_probabilities<D, B>(acc, page, g, s, probabilities);
    add_page_values<D, B>(acc, page, g, probabilities);
}

// ---- step 6: a tile of 16-bit pairs -----------------------------------------------------------------------------

// Where a lane finds piece `first` (0 or 1) of a row of a staged tile for ldmatrix. Two pieces further is an exclusive
// or with 32, and so on: constants that take no register.
template <int D> SPECACHE_DEVICE uint32_t wide_place(int row, int first) {
    return uint32_t(row * 4 * D + (first ^ row % 8) * 16);
}

template <class T, int D>
SPECACHE_DEVICE void wide_scores(const AttnShared<D>& shared, const uint8_t* stage, float (&s)[1][4]) {
    const int lane = int(threadIdx.x) % 32;
    const uint32_t place = wide_place<D>(lane % 16, lane / 16);
#pragma unroll
    for (int e = 0; e < 4; e++) s[0][e] = 0.0f;
#pragma unroll
    for (int c = 0; c < D / 32; c++) {
        // Tiles in the order of a0 .. a3: tokens 0-7 and 8-15 of one octet of channels, then of the next.
        uint32_t a[2][4];
        load_tiles(a[0], stage + (place ^ 16 * (4 * c)));
        load_tiles(a[1], stage + (place ^ 16 * (4 * c + 2)));
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const uint4 q = load_shared_16(&shared.pair_q[t][(c * 32 + lane) * 4]);
            mma_16(T{}, s[0], a[0], q.x, q.y);
            mma_16(T{}, s[0], a[1], q.z, q.w);
        }
    }
}

template <class T, int D>
SPECACHE_DEVICE void add_wide_values(Accumulator<D>& acc, const uint8_t* stage, const float (&s)[1][4]) {
    const int lane = int(threadIdx.x) % 32;
    const uint32_t place = wide_place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    uint32_t p[2][kPTerms<T>];   // tokens 0-7, 8-15
#pragma unroll
    for (int o = 0; o < 2; o++) {
        split_pair<T>(s[0][2 * o], s[0][2 * o + 1], p[o]);
#pragma unroll
        for (int t = 0; t < kPTerms<T>; t++) p[o][t] = transpose_8x8(p[o][t]);
    }
#pragma unroll
    for (int m = 0; m < D / 16; m++) {
        // a0, a1: two octets of channels at tokens 0-7; a2, a3: at tokens 8-15. In memory a token is a row: transposed.
        uint32_t a[4];
        load_tiles_transposed(a, stage + (place ^ 16 * (D / 8 + 2 * m)));
#pragma unroll
        for (int t = 0; t < kPTerms<T>; t++) mma_16(T{}, acc.out[m], a, p[0][t], p[1][t]);
    }
}

template <class T, int D>
SPECACHE_DEVICE void attend_wide_tile(const specache_attn_params& p, const Unit& unit, const Columns& columns,
                                      const AttnShared<D>& shared, uint32_t tile, const uint8_t* stage,
                                      Accumulator<D>& acc) {
    const uint32_t i = threadIdx.x % 32 / 4;
    const uint32_t positions[2] = {wide_position(p, unit, tile, i), wide_position(p, unit, tile, i + 8)};
    float s[1][4];
    wide_scores<T, D>(shared, stage, s);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const uint32_t position = positions[e / 2];   // an empty slot's is beyond every row's last
        const Seen by = seen_by(columns, p.window, uint32_t(e % 2));
        const bool seen = position >= by.first && position <= by.last;
        if (!seen) s[0][e] = minus_infinity();
        float* scores = scores_of(columns, uint32_t(e % 2));
        if (scores != nullptr && seen && position < unit.seq.no) store_device(scores + position, s[0][e]);
    }
    softmax(acc, s);
    add_wide_values<T, D>(acc, stage, s);
}

// Sums of products with codes are in another unit than those with numbers: packed pages come first, then this.
template <int D> SPECACHE_DEVICE void leave_code_unit(Accumulator<D>& acc) {
#pragma unroll
    for (int i = 0; i < D / 4; i++) acc.out[i / 4][i % 4] *= kCodeUnit * kPScale;
}

// ---- step 7: the items of a warp --------------------------------------------------------------------------------

// Whether an item that is no page, or the end, is the first that this warp comes to.
SPECACHE_DEVICE bool is_after_pages(const Unit& unit, uint32_t item) {
    return item < unit.work.pages + kAttnWarps || item < unit.first_item + kAttnWarps;
}

template <class T, int D, int B>
SPECACHE_DEVICE void attend_items(const specache_attn_params& p, const Unit& unit, const Columns& columns,
                                  const AttnShared<D>& shared, const Ring& ring, uint8_t* rings,
                                  Accumulator<D>& acc) {
    uint32_t stage = 0;
    clear(acc);
    uint32_t item = unit.first_item + threadIdx.x / 32;
#pragma unroll 1
    for (; item < unit.end_item; item += kAttnWarps) {
        const uint32_t last = ring.stages - 1, free_stage = stage == 0 ? last : stage - 1;
        copy_item<D, B>(p, unit, item + last * kAttnWarps, ring.stage(rings, free_stage));
        wait_for_copies(last);
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
        __syncwarp();            // lanes read what other lanes copied
#endif
        const uint8_t* at = ring.stage(rings, stage);
#if SPECACHE_INJECTED_BUG == 3   // the tests must see a page too many
        if (item <= unit.work.pages) {
#else
        if (item < unit.work.pages) {
#endif
            attend_page<D, B>(p, unit, columns, shared, unit.work.first_page + item, at, acc);
        } else {
            if (is_after_pages(unit, item)) leave_code_unit(acc);
            attend_wide_tile<T, D>(p, unit, columns, shared, item - unit.work.pages, at, acc);
        }
        __syncwarp();   // before the stage is overwritten
        stage = stage + 1 == ring.stages ? 0 : stage + 1;
    }
    if (is_after_pages(unit, item)) leave_code_unit(acc);
}

// ---- step 8: one part of four warps' results --------------------------------------------------------------------

// The warp's result to shared memory, V's zeros added. Row `group` of them is in the lanes 4 * group + j.
template <int D> SPECACHE_DEVICE void offer(const Accumulator<D>& acc, int g, MergeShared<D>& merge) {
    const int warp = int(threadIdx.x) / 32, i = int(threadIdx.x) % 32 / 4, j = int(threadIdx.x) % 4;
    const float zeros[2] = {acc.zero[0][0] + acc.zero[1][2], acc.zero[0][1] + acc.zero[1][3]};
#pragma unroll
    for (int m = 0; m < D / 16; m++) {
        const int source = groups_in(16 * m, g) * 4 + j;
        const float zero[2] = {__shfl_sync(~0u, zeros[0], source), __shfl_sync(~0u, zeros[1], source)};
#pragma unroll
        for (int e = 0; e < 4; e++)
            merge.out[warp][2 * j + e % 2][16 * m + i + e / 2 * 8] = (acc.out[m][e] + zero[e % 2]) * (1.0f / kPScale);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float sum = acc.sum[e] * (1.0f / kPScale);
        for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        if (i == 0) merge.max[warp][2 * j + e] = acc.max[e], merge.sum[warp][2 * j + e] = sum;
    }
}

template <int D> SPECACHE_DEVICE void store_part(const MergeShared<D>& merge, float* part) {
    for (uint32_t at = threadIdx.x; at < kColumns * (D + 2); at += kAttnThreads) {
        // The sums, then the maximum and the sum of p of each column: those are weighted the same way.
        const bool is_out = at < kColumns * D;
        const uint32_t column = is_out ? at / D : (at - kColumns * D) / 2, channel = at % D;
        float max = merge.max[0][column], sum = 0.0f;
#pragma unroll
        for (uint32_t w = 1; w < kAttnWarps; w++) max = fmaxf(max, merge.max[w][column]);
#pragma unroll
        for (uint32_t w = 0; w < kAttnWarps; w++) {
            const float weight = exp2_approx(merge.max[w][column] - max);
            sum += weight * (is_out ? merge.out[w][column][channel] : merge.sum[w][column]);
        }
        store_device(part + at, is_out || at % 2 == 1 ? sum : max);
    }
}

template <class T, int D, int B> SPECACHE_DEVICE void attend(const specache_attn_params& p) {
    let_next_kernel_start();
    SPECACHE_DYNAMIC_SHARED(memory);
    SPECACHE_SHARED(Unit, unit);
    SPECACHE_SHARED(Columns, columns);
    SPECACHE_SHARED(Ring, ring);
    AttnShared<D>& shared = *reinterpret_cast<AttnShared<D>*>(memory);
    uint8_t* rings = memory + sizeof(AttnShared<D>);
    if (threadIdx.x == 0) ring.stage_bytes = stage_bytes(&p), ring.stages = attn_stages(&p);
    MergeShared<D>& merge = *reinterpret_cast<MergeShared<D>*>(rings);
#pragma unroll 1
    for (uint32_t index = blockIdx.x;; index += gridDim.x) {   // in between it is where it takes no register
        if (threadIdx.x < 32) find_unit(p, index, unit);
        __syncthreads();
        if (unit.seq_index == kNoSeq) return;
        fill_ring<D, B>(p, unit, ring, rings);   // first, so that the queries hide its latency
        wait_for_previous_kernel();
        load_queries<T, D, B>(p, unit, shared);
        describe_columns(p, unit, columns);
        __syncthreads();
        Accumulator<D> acc;
        attend_items<T, D, B>(p, unit, columns, shared, ring, rings, acc);
#if SPECACHE_INJECTED_BUG != 5   // the tests must see a missing barrier
        __syncthreads();         // nobody reads a ring any more
#endif
        offer(acc, int(p.group_size), merge);
        index = unit.index;
        __syncthreads();
        store_part(merge, reinterpret_cast<float*>(p.parts) + uint64_t(index) * part_floats(D));
        // The barrier behind find_unit comes before the rings are filled again.
    }
}

}   // namespace specache

// As many CTAs of an SM as registers must not forbid: only data center GPUs from sm_90 on have the shared memory for three
// with D = 128.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
#define SPECACHE_ATTN_BOUND(D, B) ((D) == 128 ? 2 : SPECACHE_ATTN_CTAS(D, B))
#else
#define SPECACHE_ATTN_BOUND(D, B) SPECACHE_ATTN_CTAS(D, B)
#endif

// registers: <= 168 specache_attn_d64_*    (3 CTAs of 128 threads an SM)
// registers: <= 224 specache_attn_d128_*   (2, or 168 for 3)
#define SPECACHE_ATTN_KERNEL(D, B, dtype, T)                                                   \
    extern "C" __global__ void __launch_bounds__(SPECACHE_ATTN_THREADS, SPECACHE_ATTN_BOUND(D, B)) \
        specache_attn_d##D##_b##B##_##dtype(const __grid_constant__ specache_attn_params p) {  \
        specache::attend<specache::T, D, B>(p);                                                \
    }
SPECACHE_ATTN_KERNELS(SPECACHE_ATTN_KERNEL)
#undef SPECACHE_ATTN_KERNEL
