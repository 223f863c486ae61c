// The gather: pairs that the selection wants, from pinned pages of the host into the slots of the device.
//
// The selection (select.cu) leaves on the device which pairs of each sequence and KV head go into which slots; the host
// knows neither how many nor which, and needs not. All pairs of all heads are one list of 16-byte pieces, found by the
// sums of the counts, and the threads of all CTAs take pieces in turn: a long list of one head is everybody's work.
//
// Bytes in flight
// ---------------
// A read over PCIe takes 1 to 2 us, so 50 GB/s (5.0 x16) need 50 to 100 KB under way, 25 GB/s (4.0) half of that. A
// thread asks for 4 pieces before it waits for the first: 64 bytes, 32 KB a CTA of 512 threads, 128 KB for the four
// CTAs that are the default. More of them take SMs from attention and gain nothing; fewer leave the link idle. A pair
// is 256 or 512 bytes: whole requests of 128 bytes, by consecutive lanes.
//
// The kernel runs beside attention and projections, on a stream of its own: it is ordered behind the selection and
// before the layer's next attention. Those fill their SMs, so its CTAs find room when a kernel of theirs ends, and then
// keep it: the stream should have the higher priority.
#include "seq.cuh"
#include "kernels.h"

namespace specache {

constexpr uint32_t kFetchThreads = SPECACHE_FETCH_THREADS;
constexpr uint32_t kFetchWarps = kFetchThreads / 32;
constexpr uint32_t kFetchLoads = 4;   // of a thread, under way at a time

struct FetchShared {
    uint32_t ends[kFetchThreads];   // pairs of the heads up to and with each
    uint32_t warp_sums[kFetchWarps];
};

// ---- step 1: how many pairs the heads [first, first + kFetchThreads) want ---------------------------------------

// Of one head; nothing where the sequence's entry is not in use.
SPECACHE_DEVICE uint32_t count_of(const specache_fetch_params& p, uint32_t head) {
    if (head >= p.n_seqs * p.n_kv_heads || load_seq(p.seqs, head / p.n_kv_heads).n_rows == 0) return 0;
    return load_device(reinterpret_cast<const uint32_t*>(p.fetch_counts) + head);
}

SPECACHE_DEVICE uint32_t sum_counts(const specache_fetch_params& p, uint32_t first, FetchShared& shared) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t through = count_of(p, first + threadIdx.x);
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, through, distance);
        through += int(lane) >= distance ? other : 0;
    }
    if (lane == 31) shared.warp_sums[warp] = through;
    __syncthreads();
    uint32_t before = 0, all = 0;
#pragma unroll
    for (uint32_t w = 0; w < kFetchWarps; w++) {
        if (w == warp) before = all;
        all += shared.warp_sums[w];
    }
    shared.ends[threadIdx.x] = before + through;
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
    __syncthreads();
#endif
    return all;
}

// ---- step 2: where a piece comes from and goes to ---------------------------------------------------------------

// A piece, as far as the counts tell.
struct Piece {
    uint32_t offset;    // bytes, in its pair
    uint32_t head;      // sequence * n_kv_heads + KV head
    uint32_t in_head;   // number of the pair in the head's list
};

// The first head whose end is beyond `pair`.
SPECACHE_DEVICE uint32_t head_of(const FetchShared& shared, uint32_t pair) {
    uint32_t low = 0;
#pragma unroll 1
    for (uint32_t step = kFetchThreads / 2; step != 0; step /= 2)
        if (shared.ends[low + step - 1] <= pair) low += step;
    return low;
}

SPECACHE_DEVICE Piece find_piece(const specache_fetch_params& p, uint32_t first, const FetchShared& shared,
                                 uint32_t index) {
    const uint32_t pieces = p.head_dim / 4, pair = index / pieces, local = head_of(shared, pair);
    return Piece{index % pieces * 16, first + local, pair - (local == 0 ? 0 : shared.ends[local - 1])};
}

// Its entry in the list: slot, position.
SPECACHE_DEVICE uint2 load_fetch(const specache_fetch_params& p, const Piece& piece) {
    return load_device(reinterpret_cast<const uint2*>(p.fetches) + uint64_t(piece.head) * p.top_k + piece.in_head);
}

// What the piece's sequence says of itself in this layer.
struct FetchCache {
    uint64_t host, pairs;
};

SPECACHE_DEVICE FetchCache fetch_cache(const specache_fetch_params& p, const Piece& piece) {
#if SPECACHE_INJECTED_BUG == 2   // the tests must see pairs of another sequence
    const specache_layer_cache cache = load_cache(p.caches, piece.head / p.n_kv_heads / 2);
#else
    const specache_layer_cache cache = load_cache(p.caches, piece.head / p.n_kv_heads);
#endif
    return FetchCache{cache.host, cache.pairs};
}

SPECACHE_DEVICE uint64_t host_address(const specache_fetch_params& p, const Piece& piece, const FetchCache& cache,
                                      uint32_t position) {
    const uint64_t page = load_device(reinterpret_cast<const uint64_t*>(cache.host) + position / SPECACHE_PAGE);
    const uint32_t token = piece.head % p.n_kv_heads * SPECACHE_PAGE + position % SPECACHE_PAGE;
    return page + uint64_t(token) * 4 * p.head_dim + piece.offset;
}

SPECACHE_DEVICE uint64_t slot_address(const specache_fetch_params& p, const Piece& piece, const FetchCache& cache,
                                      uint32_t slot) {
    const uint64_t place = uint64_t(piece.head % p.n_kv_heads) * p.top_k + slot;
    return cache.pairs + place * 4 * p.head_dim + piece.offset;
}

// ---- step 3: a few pieces of each thread at a time ---------------------------------------------------------------

// Where they are is three loads, each of which needs the one before: all pieces make each step together, so that it is
// waited for once. A piece beyond the end is the last one, found but not copied.
SPECACHE_DEVICE void copy_pieces(const specache_fetch_params& p, uint32_t first, const FetchShared& shared,
                                 uint32_t pieces) {
    const uint32_t step = gridDim.x * kFetchThreads;
#pragma unroll 1
    for (uint32_t index = blockIdx.x * kFetchThreads + threadIdx.x; index < pieces; index += kFetchLoads * step) {
        Piece piece[kFetchLoads];
        uint2 fetch[kFetchLoads];   // slot, position
        FetchCache cache[kFetchLoads];
        uint64_t from[kFetchLoads], to[kFetchLoads];
        uint4 bytes[kFetchLoads];
#pragma unroll
        for (uint32_t l = 0; l < kFetchLoads; l++) {
            const uint32_t at = index + l * step;
            piece[l] = find_piece(p, first, shared, at < pieces ? at : pieces - 1);
            fetch[l] = load_fetch(p, piece[l]);
            cache[l] = fetch_cache(p, piece[l]);
        }
#pragma unroll
        for (uint32_t l = 0; l < kFetchLoads; l++) {
            from[l] = host_address(p, piece[l], cache[l], fetch[l].y);
            to[l] = slot_address(p, piece[l], cache[l], fetch[l].x);
        }
#pragma unroll
        for (uint32_t l = 0; l < kFetchLoads; l++)
            if (index + l * step < pieces) bytes[l] = load_streaming(reinterpret_cast<const void*>(from[l]));
#pragma unroll
        for (uint32_t l = 0; l < kFetchLoads; l++)
            if (index + l * step < pieces) store_16(reinterpret_cast<void*>(to[l]), bytes[l]);
    }
}

SPECACHE_DEVICE void fetch_pairs(const specache_fetch_params& p) {
    follow_previous_kernel();
    SPECACHE_SHARED(FetchShared, shared);
    uint64_t fetched = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < p.n_seqs * p.n_kv_heads; first += kFetchThreads) {
        const uint32_t pairs = sum_counts(p, first, shared);
        copy_pieces(p, first, shared, pairs * (p.head_dim / 4));
        fetched += pairs;
        __syncthreads();   // nobody looks for heads any more
    }
    if (p.fetched == 0 || blockIdx.x != 0 || threadIdx.x != 0) return;
    uint64_t* sum = reinterpret_cast<uint64_t*>(p.fetched);
    store_device(sum, load_device(sum) + fetched);
}

}   // namespace specache

// registers: <= 80 specache_fetch_pairs   (a CTA of 512 threads leaves a third of its SM to others)
extern "C" __global__ void __launch_bounds__(SPECACHE_FETCH_THREADS, 1)
    specache_fetch_pairs(const __grid_constant__ specache_fetch_params p) {
    specache::fetch_pairs(p);
}
