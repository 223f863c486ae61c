// The gather: pairs that the selection wants, from pinned pages of the host into the slots of the device.
//
// The selection (select.cu) leaves on the device which pairs of each sequence and KV head go into which slots; the host
// knows neither how many nor which, and needs not. All pairs of all heads are one list, found by the sums of the
// counts, of which the CTAs take 32 at a time in turn: a long list of one head is everybody's work.
//
// Bytes in flight
// ---------------
// A read over PCIe takes 2 us and more, so 50 GB/s (5.0 x16) need 100 KB and more under way, 25 GB/s (4.0) half of that.
// Where a pair lies takes three loads, each of which needs the one before. So a CTA is a pipeline: while 32 pairs come
// (16 KB at D = 128, copied asynchronously into shared memory), its first warp finds the places of the next 32. A pair is
// 256 or 512 bytes: whole requests of 128 bytes, by consecutive lanes.
//
// The kernel runs beside attention and projections, on a stream of its own: it is ordered behind the selection and
// before the layer's next attention. Those fill their SMs, so its CTAs find room when a kernel of theirs ends, and then
// keep it: the stream should have the higher priority. How many CTAs is measured, not understood. On an H200 one sequence
// (512 pairs a layer) decodes 4 % faster beside four of them than beside 16; eight sequences, whose products cuBLASLt
// makes in one CTA for each SM, 10 % faster beside 16, which reach 31 GB/s and are gone sooner.
//
// Where the host's threads gather (post.cu), the pairs lie one behind the other in the device's memory already, and the
// kernel only brings them into their slots.
#include "fetch_list.cuh"
#include "kernels.h"

namespace specache {

constexpr uint32_t kFetchThreads = SPECACHE_FETCH_THREADS;
constexpr uint32_t kBatch = 32;           // pairs: a lane of the first warp finds one
constexpr uint32_t kMostPairBytes = 512;

struct FetchShared {
    alignas(128) uint8_t pairs[2][kBatch * kMostPairBytes];   // on their way
    uint64_t from[2][kBatch], to[2][kBatch];
    FetchList<kFetchThreads> list;
};

// ---- step 1: where pairs come from and go to --------------------------------------------------------------------

// Which of the two stages a batch takes: this CTA's batches take turns.
SPECACHE_DEVICE uint32_t stage_of(uint32_t batch) { return batch / gridDim.x % 2; }

// In the pages of the host.
SPECACHE_DEVICE uint64_t host_pair(const specache_layer_cache& cache, uint32_t kv_head, uint32_t position,
                                   uint64_t bytes) {
    const uint64_t page = load_device(reinterpret_cast<const uint64_t*>(cache.host) + position / SPECACHE_PAGE);
    return page + (kv_head * SPECACHE_PAGE + position % SPECACHE_PAGE) * bytes;
}

// Of batch `batch` of the heads from `first` on, of which `n` pairs are wanted, behind `before` of other heads.
SPECACHE_DEVICE void find_batch(const specache_fetch_params& p, uint32_t first, uint32_t batch, uint32_t n,
                                uint64_t before, FetchShared& shared) {
    const uint32_t pair = batch * kBatch + threadIdx.x;
    if (threadIdx.x >= kBatch || pair >= n) return;
    uint32_t in_head;
    const uint32_t head = first + head_of(shared.list, pair, in_head), kv_head = head % p.n_kv_heads;
    const uint2 fetch =   // slot, position
        load_device(reinterpret_cast<const uint2*>(p.fetches) + uint64_t(head) * p.top_k + in_head);
#if SPECACHE_INJECTED_BUG == 2   // the tests must see pairs of another sequence
    const specache_layer_cache cache = load_cache(p.caches, head / p.n_kv_heads / 2);
#else
    const specache_layer_cache cache = load_cache(p.caches, head / p.n_kv_heads);
#endif
    const uint64_t bytes = 4 * p.head_dim;
    shared.from[stage_of(batch)][threadIdx.x] =
        p.gathered == 0 ? host_pair(cache, kv_head, fetch.y, bytes) : p.gathered + (before + pair) * bytes;
    shared.to[stage_of(batch)][threadIdx.x] = cache.pairs + (uint64_t(kv_head) * p.top_k + fetch.x) * bytes;
}

// ---- step 2: the pairs ------------------------------------------------------------------------------------------

// Calls each(pair of the batch, byte of the pair, byte of the stage) for a thread's pieces of 16 bytes.
template <class Each>
SPECACHE_DEVICE void each_piece(const specache_fetch_params& p, uint32_t batch, uint32_t n, Each each) {
    const uint32_t pieces = p.head_dim / 4, left = n - batch * kBatch, pairs = left < kBatch ? left : kBatch;
#pragma unroll 4
    for (uint32_t at = threadIdx.x; at < pairs * pieces; at += kFetchThreads)
        each(at / pieces, at % pieces * 16, at * 16);
}

// What a thread copies into shared memory it takes from there itself: no barrier between the two.
SPECACHE_DEVICE void load_batch(const specache_fetch_params& p, uint32_t batch, uint32_t n, FetchShared& shared) {
    const uint32_t stage = stage_of(batch);
    if (batch * kBatch < n)
        each_piece(p, batch, n, [&](uint32_t pair, uint32_t offset, uint32_t at) {
            copy_async_16(shared.pairs[stage] + at,
                          reinterpret_cast<const uint8_t*>(shared.from[stage][pair]) + offset, 16);
        });
    copy_async_commit();
}

SPECACHE_DEVICE void store_batch(const specache_fetch_params& p, uint32_t batch, uint32_t n, FetchShared& shared) {
    const uint32_t stage = stage_of(batch);
    each_piece(p, batch, n, [&](uint32_t pair, uint32_t offset, uint32_t at) {
        store_16(reinterpret_cast<uint8_t*>(shared.to[stage][pair]) + offset,
                 *reinterpret_cast<const uint4*>(shared.pairs[stage] + at));
    });
}

// This CTA's batches of n pairs.
SPECACHE_DEVICE void copy_batches(const specache_fetch_params& p, uint32_t first, uint32_t n, uint64_t before,
                                  FetchShared& shared) {
    const uint32_t step = gridDim.x;
    if (blockIdx.x * kBatch >= n) return;
    find_batch(p, first, blockIdx.x, n, before, shared);
    __syncthreads();
    load_batch(p, blockIdx.x, n, shared);
#pragma unroll 1
    for (uint32_t batch = blockIdx.x; batch * kBatch < n; batch += step) {
        find_batch(p, first, batch + step, n, before, shared);
        __syncthreads();
        load_batch(p, batch + step, n, shared);
        copy_async_wait<1>();
        store_batch(p, batch, n, shared);
        __syncthreads();   // before its places are overwritten
    }
}

SPECACHE_DEVICE void fetch_pairs(const specache_fetch_params& p) {
    follow_previous_kernel();
    SPECACHE_SHARED(FetchShared, shared);
    uint64_t fetched = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < p.n_seqs * p.n_kv_heads; first += kFetchThreads) {
        const uint32_t pairs = sum_counts(p, first, shared.list);
        copy_batches(p, first, pairs, fetched, shared);
        fetched += pairs;
        __syncthreads();   // nobody looks for heads any more
    }
    if (p.fetched == 0 || blockIdx.x != 0 || threadIdx.x != 0) return;
    uint64_t* sum = reinterpret_cast<uint64_t*>(p.fetched);
    store_device(sum, load_device(sum) + fetched);
}

}   // namespace specache

// registers: <= 64 specache_fetch_pairs   (an eighth of an SM)
extern "C" __global__ void __launch_bounds__(SPECACHE_FETCH_THREADS)
    specache_fetch_pairs(const __grid_constant__ specache_fetch_params p) {
    specache::fetch_pairs(p);
}
