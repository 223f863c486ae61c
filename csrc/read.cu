// Reads memory once and keeps nothing but its parity: how fast this GPU reads is what a decode step is compared with.
//
// Each thread has four independent loads of 16 bytes in flight; the CTAs stride through the memory together.
#include "ptx.cuh"
#include "kernels.h"

namespace specache {

constexpr int kReadLoads = 4;
constexpr uint32_t kReadWarps = SPECACHE_READ_THREADS / 32;

SPECACHE_DEVICE uint32_t parity(const uint4& v) { return v.x ^ v.y ^ v.z ^ v.w; }

SPECACHE_DEVICE void read_all(const specache_read_params& p) {
    struct Shared {
        uint32_t parity[kReadWarps];
    };
    SPECACHE_SHARED(Shared, shared);
    follow_previous_kernel();
    const uint4* from = reinterpret_cast<const uint4*>(p.from);
    const uint64_t n = p.bytes / 16, step = uint64_t(gridDim.x) * SPECACHE_READ_THREADS;
    uint32_t sum = 0;
    uint64_t i = uint64_t(blockIdx.x) * SPECACHE_READ_THREADS + threadIdx.x;
    for (; i + (kReadLoads - 1) * step < n; i += kReadLoads * step) {
        uint4 loads[kReadLoads];
#pragma unroll
        for (int l = 0; l < kReadLoads; l++) loads[l] = load_weight(from + i + l * step);
#pragma unroll
        for (int l = 0; l < kReadLoads; l++) sum ^= parity(loads[l]);
    }
    for (; i < n; i += step) sum ^= parity(load_weight(from + i));
    for (int distance = 16; distance > 0; distance /= 2) sum ^= __shfl_xor_sync(~0u, sum, distance);
    if (threadIdx.x % 32 == 0) shared.parity[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t w = 1; w < kReadWarps; w++) sum ^= shared.parity[w];
    store_device(reinterpret_cast<uint32_t*>(p.parities) + blockIdx.x, sum);
}

}   // namespace specache

// registers: <= 40 specache_read
extern "C" __global__ void __launch_bounds__(SPECACHE_READ_THREADS)
    specache_read(const __grid_constant__ specache_read_params p) {
    specache::read_all(p);
}
