// The kernels of the probe.
#pragma once

#include "../ptx.cuh"

constexpr int kRowBytes = 512;                // a KV pair at head_dim 128
constexpr int kRowVectors = kRowBytes / 16;   // one 16-byte load for each lane of a warp

// registers: <= 32 probe_empty
extern "C" __global__ void probe_empty() {}

// One product with the operands that the lanes bring. registers: <= 32 probe_mma
extern "C" __global__ void probe_mma(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = int(threadIdx.x);
    const uint32_t rows[4] = {a[lane], a[32 + lane], a[64 + lane], a[96 + lane]};
    float sum[4] = {0, 0, 0, 0};
    specache::mma_m16n8k16(sum, rows, b[lane], b[32 + lane]);
    for (int i = 0; i < 4; i++) d[i * 32 + lane] = sum[i];
}

// Noise, since zeros can be read faster than data. registers: <= 32 probe_fill
extern "C" __global__ void probe_fill(uint4* to, size_t n) {
    const size_t step = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        uint32_t x = uint32_t(i) * 2654435761u + 12345u;
        x ^= x >> 15;
        to[i] = make_uint4(x, x * 1664525u, x * 22695477u, x * 1103515245u);
    }
}

// Reads everything once, LOADS independent 16-byte loads in flight per thread.
template <int LOADS> static __device__ void read_all(const uint4* from, size_t n, uint32_t* sink) {
    const size_t step = size_t(gridDim.x) * blockDim.x;
    uint32_t x = 0;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i + (LOADS - 1) * step < n; i += LOADS * step) {
        uint4 v[LOADS];
#pragma unroll
        for (int u = 0; u < LOADS; u++) v[u] = specache::load_streaming(from + i + u * step);
#pragma unroll
        for (int u = 0; u < LOADS; u++) x ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    if (x == 0x12345678) *sink = x;   // keeps the loads
}
// registers: <= 64 probe_read_*
extern "C" __global__ void __launch_bounds__(256) probe_read_2(const uint4* p, size_t n, uint32_t* s) {
    read_all<2>(p, n, s);
}
extern "C" __global__ void __launch_bounds__(256) probe_read_4(const uint4* p, size_t n, uint32_t* s) {
    read_all<4>(p, n, s);
}
extern "C" __global__ void __launch_bounds__(256) probe_read_8(const uint4* p, size_t n, uint32_t* s) {
    read_all<8>(p, n, s);
}

// Gathers rows straight from pinned host memory: a warp per row, ROWS rows in flight per warp.
template <int ROWS> static __device__ void gather_rows(const uint4* from, const uint32_t* ids, int n, uint4* to) {
    const int lane = int(threadIdx.x) % 32, warps = int(gridDim.x * blockDim.x) / 32;
    const int warp = int(blockIdx.x * blockDim.x + threadIdx.x) / 32;
    for (int first = warp * ROWS; first + ROWS <= n; first += warps * ROWS) {
        uint4 v[ROWS];
#pragma unroll
        for (int u = 0; u < ROWS; u++)
            v[u] = specache::load_streaming(from + size_t(ids[first + u]) * kRowVectors + lane);
#pragma unroll
        for (int u = 0; u < ROWS; u++) to[size_t(first + u) * kRowVectors + lane] = v[u];
    }
}
// registers: <= 64 probe_gather_*
extern "C" __global__ void __launch_bounds__(1024)
    probe_gather_4(const uint4* from, const uint32_t* ids, int n, uint4* to) {
    gather_rows<4>(from, ids, n, to);
}
extern "C" __global__ void __launch_bounds__(512)
    probe_gather_8(const uint4* from, const uint32_t* ids, int n, uint4* to) {
    gather_rows<8>(from, ids, n, to);
}

// The same with bulk copies (sm_90): one warp per CTA, 32 rows a batch, four batches in flight, each stored in one
// piece.
constexpr int kBulkStages = 4;
constexpr int kBulkStageBytes = 32 * kRowBytes;
constexpr int kBulkSharedBytes = kBulkStages * kBulkStageBytes;

// registers: <= 64 probe_bulk_gather
extern "C" __global__ void __launch_bounds__(32)
    probe_bulk_gather(const uint8_t* from, const uint32_t* ids, int n, uint8_t* to) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ uint64_t full[kBulkStages];
    const int lane = int(threadIdx.x), batches = n / 32;
    auto batch_of = [&](int turn) { return int(blockIdx.x) + turn * int(gridDim.x); };
    auto begin = [&](int turn) {
        const int stage = turn % kBulkStages;
        if (lane == 0) specache::barrier_expect(&full[stage], kBulkStageBytes);
        __syncwarp();
        specache::bulk_load(stages + stage * kBulkStageBytes + lane * kRowBytes,
                            from + size_t(ids[batch_of(turn) * 32 + lane]) * kRowBytes, kRowBytes, &full[stage]);
    };
    if (lane < kBulkStages) specache::barrier_init(&full[lane]);
    __syncwarp();
    for (int turn = 0; turn < kBulkStages && batch_of(turn) < batches; turn++) begin(turn);
    for (int turn = 0; batch_of(turn) < batches; turn++) {
        const int stage = turn % kBulkStages;
        specache::barrier_wait(&full[stage], uint32_t(turn / kBulkStages % 2));
        if (lane == 0) {
            specache::bulk_store(to + size_t(batch_of(turn)) * kBulkStageBytes, stages + stage * kBulkStageBytes,
                                 kBulkStageBytes);
            specache::bulk_stores_read();
        }
        __syncwarp();
        if (batch_of(turn + kBulkStages) < batches) begin(turn + kBulkStages);
    }
    if (lane == 0) specache::bulk_stores_done();
#endif
}

// Answers each value of `ping` in `pong`, for as long as about four seconds: a host that died must not leave it
// spinning. registers: <= 32 probe_pong
extern "C" __global__ void probe_pong(volatile uint32_t* ping, volatile uint32_t* pong, uint32_t n) {
    const long long start = clock64();
    for (uint32_t i = 1; i <= n; i++) {
        while (*ping != i) {
            if (clock64() - start > 8000000000ll) return;
        }
        *pong = i;
        __threadfence_system();
    }
}
