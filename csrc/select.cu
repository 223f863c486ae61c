// The pairs that the next step wants at 16 bits: exact top-k per KV head, and what must be fetched for it.
//
// A position's key is the sum of its probabilities over the KV head's query heads (the order of the mean), from the
// scores and the lse that attention left. Keys are not negative, so their bits are ordered as they are. The best k are
// those above a threshold, found digit by digit from histograms (radix select), and the first of those equal to it:
// ties go to the lower position, and what is taken comes out in ascending order.
//
// First a CTA for every 4096 candidates computes keys and keeps its best k; then a CTA per KV head takes the best k of
// those, compares them with the slots, and writes which pairs to fetch into which slots. A pair that is there already
// stays where it is: consecutive selections overlap by more than half. At 1M tokens and k = 64 the second CTA still has
// only 16384 keys to look at.
//
// Probabilities lie close together: most of a chunk's keys have one of a few first digits, and counting them would be a
// queue of atomic additions to a few bins. So a bound comes first (bound_of_best), and only keys above it are counted.
//
// On request it also says how good the selection before was: of row 0's own best k among what is read low-bit or
// prefetched, how many are in the slots. That is the same work for another row: the first kernel has twice the CTAs,
// side by side, and a CTA of the second kernel merges twice, row 0 first, while the slots are still the old ones.
#include "block.cuh"
#include "seq.cuh"
#include "attn_work.h"

namespace specache {

constexpr uint32_t kSelectThreads = SPECACHE_SELECT_THREADS;
static_assert(kMostTopK <= kSelectChunk, "every chunk but the last gives k");
constexpr int kDigitBits = 11;   // 32 bits in three digits of 11, 11 and 10
constexpr uint32_t kBins = 1u << kDigitBits;
constexpr uint32_t kBinsPerThread = kBins / kSelectThreads;
constexpr uint32_t kSelectWarps = kSelectThreads / 32;

constexpr uint32_t kKeys = kSelectChunk / kSelectThreads;   // of a thread
static_assert(kKeys * kSelectWarps <= kSelectThreads, "a thread for each 32 keys of a chunk");

struct ScanShared {
    uint32_t histogram[kBins];
    uint32_t warp_sums[kSelectWarps];
    uint32_t counts[kKeys * kSelectWarps];   // of each 32 keys that follow each other
    uint32_t digit, missing;
};

// What a candidate list holds: 8 bytes, by ascending position.
struct Candidate {
    uint32_t position, key;
};

// The candidates of a KV head of one sequence: positions [first, end).
struct Candidates {
    uint32_t first, end;

    SPECACHE_HOST_DEVICE uint32_t count() const { return end - first; }
};

// Whose best are looked for: the last row's, for the next step, or row 0's, to judge the step before by.
enum RankedRow { kLastRow, kFirstRow };

// What row 0 sees of the positions that were candidates before: those that are read low-bit or prefetched. Nothing
// where it is the last row: there was no selection before.
SPECACHE_DEVICE Candidates first_row_candidates(const specache_select_params& p, const specache_seq& seq) {
    if (seq.n_rows < 2) return Candidates{0, 0};
    const uint32_t first = first_seen(seq.n, p.window);
#if SPECACHE_INJECTED_BUG == 4   // the tests must see positions that nobody could have selected before
    return Candidates{first < seq.no ? first : seq.no, seq.no};
#else
    return Candidates{first < seq.nq ? first : seq.nq, seq.nq};
#endif
}

// Nothing where the entry is not in use.
SPECACHE_DEVICE Candidates last_row_candidates(const specache_select_params& p, const specache_seq& seq) {
    if (seq.n_rows == 0) return Candidates{0, 0};
    uint32_t first = first_seen(seq.n + seq.n_rows - 1, p.window);
#if SPECACHE_INJECTED_BUG == 2   // the tests must see a position that the row does not see
    if (first != 0) first--;
#endif
    return Candidates{first < seq.no ? first : seq.no, seq.no};
}

SPECACHE_DEVICE Candidates row_candidates(const specache_select_params& p, const specache_seq& seq, RankedRow row) {
    return row == kLastRow ? last_row_candidates(p, seq) : first_row_candidates(p, seq);
}

// The list of one chunk; lists of a head lie one after the other, and all but the last are full.
SPECACHE_DEVICE Candidate* candidate_list(const specache_select_params& p, RankedRow row, uint32_t seq_and_head,
                                          uint32_t chunk) {
    const uint64_t head = uint64_t(row) * p.n_seqs * p.n_kv_heads + seq_and_head;
    return reinterpret_cast<Candidate*>(p.candidates) + (head * most_chunks(&p) + chunk) * p.top_k;
}

SPECACHE_DEVICE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
SPECACHE_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }
SPECACHE_DEVICE uint32_t count_bits(uint32_t bits) { return uint32_t(__popc(bits)); }

// ---- what all threads of a block do together --------------------------------------------------------------------

// The keys that the best are looked for among. Key i is thread i % kSelectThreads's; the first of them stay in registers.
struct Keys {
    uint32_t n;
    uint32_t first[kKeys];
    const Candidate* list;   // all of them, where there are more

    SPECACHE_DEVICE uint32_t index(uint32_t start, uint32_t j) const {
        return start + j * kSelectThreads + threadIdx.x;
    }
    SPECACHE_DEVICE bool exists(uint32_t start, uint32_t j) const { return index(start, j) < n; }
    // Of any thread.
    SPECACHE_DEVICE bool any(uint32_t start, uint32_t j) const { return start + j * kSelectThreads < n; }
    SPECACHE_DEVICE uint32_t key(uint32_t start, uint32_t j) const {
        return start == 0 ? first[j] : exists(start, j) ? load_device(&list[index(start, j)].key) : 0;
    }
};

// A key that at least k keys are not below, k <= kSelectThreads: threads in at least k groups each have a best key, and
// the worst of those is it. Of 4096 random keys and k = 64 it leaves some 250: the rest need not be counted, and most of
// them would have been in the same few bins, one after the other.
SPECACHE_DEVICE uint32_t bound_of_best(ScanShared& shared, const Keys& keys, uint32_t k) {
    uint32_t best = 0;   // also where the thread has no key
#pragma unroll
    for (uint32_t j = 0; j < kKeys; j++) best = larger(best, keys.first[j]);
    for (uint32_t size = 1; size < 32 && 2 * size * k <= kSelectThreads; size *= 2)
        best = larger(best, __shfl_xor_sync(~0u, best, int(size)));
    for (int distance = 1; distance < 32; distance *= 2) best = smaller(best, __shfl_xor_sync(~0u, best, distance));
    if (threadIdx.x % 32 == 0) shared.warp_sums[threadIdx.x / 32] = best;
    __syncthreads();
#pragma unroll
    for (uint32_t w = 0; w < kSelectWarps; w++) best = smaller(best, shared.warp_sums[w]);
    return best;
}

// Which digit the k-th best key has: bins from the highest down, four a thread. `missing`: how many are still to be
// found among the keys with that digit.
SPECACHE_DEVICE void find_digit(ScanShared& shared, uint32_t k) {
    const uint32_t highest = kBins - 1 - threadIdx.x * kBinsPerThread;
    uint32_t own = 0, all;
    for (uint32_t b = 0; b < kBinsPerThread; b++) own += shared.histogram[highest - b];
    uint32_t above = block_scan(shared.warp_sums, own, all);
    if (above >= k || above + own < k) return;
    uint32_t bin = highest;
    while (above + shared.histogram[bin] < k) above += shared.histogram[bin--];
    shared.digit = bin;
    shared.missing = k - above;
}

struct Threshold {
    uint32_t key;    // the best are those above it,
    uint32_t ties;   // and as many of those equal to it, the first ones
};

// Of the k best keys, k <= n.
SPECACHE_DEVICE Threshold find_threshold(ScanShared& shared, const Keys& keys, uint32_t k) {
    if (k == keys.n) return Threshold{0, keys.n};
    const uint32_t bound = k <= kSelectThreads && keys.n > kSelectThreads ? bound_of_best(shared, keys, k) : 0;
    uint32_t prefix = 0;   // the digits found so far
#pragma unroll 1
    for (int high = 32;;) {   // bits [low, high) are the next digit
        const int low = high > kDigitBits ? high - kDigitBits : 0;
        for (uint32_t b = threadIdx.x; b < kBins; b += kSelectThreads) shared.histogram[b] = 0;
        __syncthreads();
#pragma unroll 1
        for (uint32_t start = 0; start < keys.n; start += kSelectChunk) {
#pragma unroll
            for (uint32_t j = 0; j < kKeys; j++) {
                if (!keys.any(start, j)) break;
                const uint32_t x = keys.key(start, j);
                const bool fits = keys.exists(start, j) && x >= bound && (high == 32 || x >> high == prefix);
                if (fits) shared_add(&shared.histogram[x >> low & ((1u << (high - low)) - 1)], 1);
            }
        }
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
        __syncthreads();
#endif
        find_digit(shared, k);
        __syncthreads();
        prefix = prefix << (high - low) | shared.digit;
        k = shared.missing;
        if (low == 0) return Threshold{prefix, k};
        high = low;
    }
}

// Calls take(i, key, rank) for the keys that pass, rank counting them in the order of i.
template <class Take>
SPECACHE_DEVICE void take_best(ScanShared& shared, const Keys& keys, Threshold threshold, Take take) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, lanes_before = (1u << lane) - 1;
    uint32_t above_before = 0, ties_before = 0;
#pragma unroll 1
    for (uint32_t start = 0; start < keys.n; start += kSelectChunk) {
        const auto passes = [&](uint32_t j, uint32_t& above, uint32_t& ties) {
            const uint32_t x = keys.key(start, j);
            above = __ballot_sync(~0u, keys.exists(start, j) && x > threshold.key);
            ties = __ballot_sync(~0u, keys.exists(start, j) && x == threshold.key);
        };
        uint32_t above, ties, all;
#pragma unroll
        for (uint32_t j = 0; j < kKeys; j++) {   // 32 keys that follow each other
            if (keys.any(start, j)) passes(j, above, ties);
            else above = ties = 0;
            // Two counts of at most kSelectChunk.
            if (lane == 0) shared.counts[j * kSelectWarps + warp] = count_bits(above) | count_bits(ties) << 16;
        }
        __syncthreads();
        const bool counts = threadIdx.x < kKeys * kSelectWarps;
        const uint32_t before = block_scan(shared.warp_sums, counts ? shared.counts[threadIdx.x] : 0u, all);
        if (counts) shared.counts[threadIdx.x] = before;
        __syncthreads();
#pragma unroll
        for (uint32_t j = 0; j < kKeys; j++) {
            if (!keys.any(start, j)) break;
            passes(j, above, ties);
            const uint32_t first = shared.counts[j * kSelectWarps + warp];
            const uint32_t rank_above = above_before + (first & 0xFFFF) + count_bits(above & lanes_before);
            const uint32_t rank_tie = ties_before + (first >> 16) + count_bits(ties & lanes_before);
            if ((above >> lane & 1) != 0 || ((ties >> lane & 1) != 0 && rank_tie < threshold.ties))
                take(keys.index(start, j), keys.key(start, j), rank_above + smaller(rank_tie, threshold.ties));
        }
        above_before += all & 0xFFFF;
        ties_before += all >> 16;
        __syncthreads();   // the counts have been read
    }
}

// ---- a chunk ----------------------------------------------------------------------------------------------------

// Keys of the chunk's n positions, `start` the first.
SPECACHE_DEVICE Keys load_keys(const specache_select_params& p, RankedRow row, uint32_t seq_and_head, uint32_t start,
                               uint32_t n) {
    const float* lse_of_row = reinterpret_cast<const float*>(row == kLastRow ? p.lse : p.first_lse);
    const float* scores = reinterpret_cast<const float*>(row == kLastRow ? p.scores : p.first_scores);
    const uint32_t group_heads = p.n_heads / p.n_kv_heads;
    const uint64_t first_head = uint64_t(seq_and_head) * group_heads;
    Keys keys{n, {}, nullptr};
    float sums[kKeys] = {};
    for (uint32_t h = 0; h < group_heads; h++) {
        const float lse = load_device(lse_of_row + first_head + h);
        const float* scores_of_head = scores + (first_head + h) * p.score_stride + start;
#pragma unroll
        for (uint32_t j = 0; j < kKeys; j++)
            if (keys.exists(0, j)) sums[j] += exp2_approx(load_device(scores_of_head + keys.index(0, j)) - lse);
    }
#pragma unroll
    for (uint32_t j = 0; j < kKeys; j++) keys.first[j] = bit_cast<uint32_t>(sums[j]);
    return keys;
}

SPECACHE_DEVICE void select_chunk(const specache_select_params& p) {
    follow_previous_kernel();
    SPECACHE_SHARED(ScanShared, shared);
    const uint32_t chunk = blockIdx.x % most_chunks(&p), head = blockIdx.x / most_chunks(&p);
    const uint32_t heads = p.n_seqs * p.n_kv_heads, seq_and_head = head % heads;
    const RankedRow row = head < heads ? kLastRow : kFirstRow;
    const Candidates range = row_candidates(p, load_seq(p.seqs, seq_and_head / p.n_kv_heads), row);
    if (chunk * kSelectChunk >= range.count()) return;
    const uint32_t start = range.first + chunk * kSelectChunk, n = smaller(kSelectChunk, range.end - start);
    const Keys keys = load_keys(p, row, seq_and_head, start, n);
    Candidate* list = candidate_list(p, row, seq_and_head, chunk);
    take_best(shared, keys, find_threshold(shared, keys, smaller(p.top_k, n)),
              [&](uint32_t i, uint32_t key, uint32_t rank) { store_device(list + rank, Candidate{start + i, key}); });
}

// ---- a KV head --------------------------------------------------------------------------------------------------

struct HeadShared {
    ScanShared scan;
    uint32_t positions[kMostTopK];    // selected, ascending
    uint32_t kept[kMostTopK];         // whether its pair is in a slot already
    uint32_t free_slots[kMostTopK];   // ascending
};

struct HeadTables {
    uint32_t* slots;
    uint32_t* skip;   // as 32-bit words: bit j % 32 of word j / 32
    specache_fetch* fetches;
};

SPECACHE_DEVICE HeadTables head_tables(const specache_select_params& p, uint32_t seq_and_head) {
    const specache_layer_cache cache = load_cache(p.caches, seq_and_head / p.n_kv_heads);
    const uint64_t head = seq_and_head % p.n_kv_heads;
    return HeadTables{reinterpret_cast<uint32_t*>(cache.slots) + head * p.top_k,
                      reinterpret_cast<uint32_t*>(cache.skip) + head * cache.skip_stride * 2,
                      reinterpret_cast<specache_fetch*>(p.fetches) + uint64_t(seq_and_head) * p.top_k};
}

// Step 1: the best of all chunks, to shared memory. Returns how many.
SPECACHE_DEVICE uint32_t merge_chunks(const specache_select_params& p, RankedRow row, const specache_seq& seq,
                                      uint32_t seq_and_head, HeadShared& shared) {
    const Candidates range = row_candidates(p, seq, row);
    const uint32_t full = range.count() / kSelectChunk, rest = range.count() % kSelectChunk;
    const uint32_t n = full * p.top_k + smaller(p.top_k, rest), count = smaller(p.top_k, n);
    Keys keys{n, {}, candidate_list(p, row, seq_and_head, 0)};
#pragma unroll
    for (uint32_t j = 0; j < kKeys; j++)
        if (keys.exists(0, j)) keys.first[j] = load_device(&keys.list[keys.index(0, j)].key);
    take_best(shared.scan, keys, find_threshold(shared.scan, keys, count), [&](uint32_t i, uint32_t, uint32_t rank) {
        shared.positions[rank] = load_device(&keys.list[i].position);
    });
    return count;
}

// Index of the first selected position that is not below this one.
SPECACHE_DEVICE uint32_t lower_bound(const uint32_t* positions, uint32_t count, uint32_t position) {
    uint32_t low = 0;
    while (count != 0) {
        const uint32_t half = count / 2;
        const bool right = positions[low + half] < position;
        low = right ? low + half + 1 : low;
        count = right ? count - half - 1 : half;
    }
    return low;
}

// Step 2: slots whose position is selected again stay, unless all is to be forgotten; the others are emptied, and listed.
SPECACHE_DEVICE void empty_slots(const specache_select_params& p, const HeadTables& tables, uint32_t count,
                                 HeadShared& shared) {
    uint32_t emptied = 0;
#pragma unroll 1
    for (uint32_t start = 0; start < p.top_k; start += kSelectThreads) {
        const uint32_t slot = start + threadIdx.x;
        const uint32_t position = slot < p.top_k ? load_device(tables.slots + slot) : SPECACHE_EMPTY_SLOT;
        const uint32_t index = lower_bound(shared.positions, count, position);
        const bool stays = p.forget == 0 && index < count && shared.positions[index] == position;
        const bool is_free = slot < p.top_k && !stays;
        if (stays) shared.kept[index] = 1;
        uint32_t all;
        const uint32_t rank = emptied + block_scan(shared.scan.warp_sums, uint32_t(is_free), all);
        emptied += all;
        if (!is_free) continue;
        shared.free_slots[rank] = slot;
        if (position == SPECACHE_EMPTY_SLOT) continue;
        store_device(tables.slots + slot, SPECACHE_EMPTY_SLOT);
#if SPECACHE_INJECTED_BUG != 3   // the tests must see a position that nobody replaces any more
        device_and(tables.skip + position / 32, ~(1u << position % 32));
#endif
    }
}

// Step 3: selected positions that are in no slot go into the free ones. Returns how many.
SPECACHE_DEVICE uint32_t fill_slots(const HeadTables& tables, uint32_t count, HeadShared& shared) {
    uint32_t filled = 0;
#pragma unroll 1
    for (uint32_t start = 0; start < count; start += kSelectThreads) {
        const uint32_t i = start + threadIdx.x;
        const bool missing = i < count && shared.kept[i] == 0;
        uint32_t all;
        const uint32_t rank = filled + block_scan(shared.scan.warp_sums, uint32_t(missing), all);
        filled += all;
        if (!missing) continue;
        const uint32_t slot = shared.free_slots[rank], position = shared.positions[i];
        store_device(tables.slots + slot, position);
        store_device(tables.fetches + rank, specache_fetch{slot, position});
        device_or(tables.skip + position / 32, 1u << position % 32);
    }
    return filled;
}

// Before all that: how many of row 0's best are in slots.
SPECACHE_DEVICE void count_hits(const specache_select_params& p, const specache_seq& seq, const HeadTables& tables,
                                uint32_t seq_and_head, HeadShared& shared) {
    const uint32_t count = merge_chunks(p, kFirstRow, seq, seq_and_head, shared);
    __syncthreads();
    uint32_t own = 0, hits;
    for (uint32_t slot = threadIdx.x; slot < p.top_k; slot += kSelectThreads) {
        const uint32_t position = load_device(tables.slots + slot);
        const uint32_t index = lower_bound(shared.positions, count, position);
        own += index < count && shared.positions[index] == position;
    }
    block_scan(shared.scan.warp_sums, own, hits);
    if (threadIdx.x == 0) store_device(reinterpret_cast<uint32_t*>(p.hits) + seq_and_head, hits);
}

SPECACHE_DEVICE void select_merge(const specache_select_params& p) {
    follow_previous_kernel();
    SPECACHE_SHARED(HeadShared, shared);
    const uint32_t seq_and_head = blockIdx.x;
    const specache_seq seq = load_seq(p.seqs, seq_and_head / p.n_kv_heads);
    uint32_t count = 0, fetches = 0;
    if (seq.n_rows != 0) {
        const HeadTables tables = head_tables(p, seq_and_head);
        if (p.hits != 0) count_hits(p, seq, tables, seq_and_head, shared);
        count = merge_chunks(p, kLastRow, seq, seq_and_head, shared);
        for (uint32_t i = threadIdx.x; i < count; i += kSelectThreads) shared.kept[i] = 0;
        __syncthreads();
        empty_slots(p, tables, count, shared);
        __syncthreads();
        fetches = fill_slots(tables, count, shared);
    } else if (p.hits != 0 && threadIdx.x == 0) {
        store_device(reinterpret_cast<uint32_t*>(p.hits) + seq_and_head, 0u);
    }
    for (uint32_t i = threadIdx.x; i < count && p.selected != 0; i += kSelectThreads)
        store_device(reinterpret_cast<uint32_t*>(p.selected) + uint64_t(seq_and_head) * p.top_k + i,
                     shared.positions[i]);
    if (threadIdx.x != 0) return;
    store_device(reinterpret_cast<uint32_t*>(p.fetch_counts) + seq_and_head, fetches);
    if (p.select_counts != 0) store_device(reinterpret_cast<uint32_t*>(p.select_counts) + seq_and_head, count);
}

}   // namespace specache

// registers: <= 64 specache_select_*   (2 CTAs of 512 threads an SM, so that one fits beside others' CTAs)
extern "C" __global__ void __launch_bounds__(SPECACHE_SELECT_THREADS, 2)
    specache_select_chunks(const __grid_constant__ specache_select_params p) {
    specache::select_chunk(p);
}

extern "C" __global__ void __launch_bounds__(SPECACHE_SELECT_THREADS, 2)
    specache_select_merge(const __grid_constant__ specache_select_params p) {
    specache::select_merge(p);
}
