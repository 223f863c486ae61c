// Probes of the GPU itself: what it is, its tensor cores, memory, launches, and how fast it answers the host.
#pragma once

#include <cuda_fp16.h>

#include <cstring>
#include <random>
#include <thread>

#include "bench.cuh"

static void probe_device(Bench& bench) {
    cudaDeviceProp p;
    int driver = 0, runtime = 0, clock_kHz = 0;
    CUDA(cudaGetDeviceProperties(&p, 0));
    CUDA(cudaDriverGetVersion(&driver));
    CUDA(cudaRuntimeGetVersion(&runtime));
    CUDA(cudaDeviceGetAttribute(&clock_kHz, cudaDevAttrClockRate, 0));
    Line("device")
        .text("name", p.name)
        .number("capability", bench.capability)
        .number("sms", p.multiProcessorCount)
        .number("l2_MB", p.l2CacheSize / 1e6)
        .number("memory_GB", double(p.totalGlobalMem) / 1e9)
        .number("shared_per_sm", double(p.sharedMemPerMultiprocessor))
        .number("clock_MHz", clock_kHz / 1e3)
        .number("driver", driver)
        .number("runtime", runtime)
        .number("host_threads", std::thread::hardware_concurrency());
}

// Do the tensor cores take fp16 subnormals exactly? Dequantisation by AND depends on it.
static void probe_subnormals(Bench& bench) {
    std::mt19937 random(1);
    uint16_t a[16][16], b[16][8];
    const uint16_t masks[4] = {0x3, 0xC, 0x30, 0xC0};
    for (auto& row : a)
        for (uint16_t& x : row) x = uint16_t(random() & masks[random() % 4]);
    for (auto& row : b)
        for (uint16_t& x : row) x = __half_as_ushort(__float2half_rn(float(random() % 2001) / 500.0f - 2.0f));
    auto pair = [](uint16_t low, uint16_t high) { return uint32_t(low) | uint32_t(high) << 16; };
    uint32_t fragment[6 * 32];
    for (int lane = 0; lane < 32; lane++) {
        const int i = lane / 4, k = lane % 4 * 2;
        for (int r = 0; r < 4; r++) {
            const int row = i + r % 2 * 8, at = k + r / 2 * 8;
            fragment[r * 32 + lane] = pair(a[row][at], a[row][at + 1]);
        }
        for (int h = 0; h < 2; h++) fragment[(4 + h) * 32 + lane] = pair(b[k + 8 * h][i], b[k + 8 * h + 1][i]);
    }
    uint32_t* in = bench.target.as<uint32_t>();
    float* out = reinterpret_cast<float*>(in + 1024);
    float got[4 * 32];
    CUDA(cudaMemcpy(in, fragment, sizeof fragment, cudaMemcpyHostToDevice));
    probe_mma<<<1, 32>>>(in, in + 128, out);
    launched();
    CUDA(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    double error = 0, largest = 0;
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < 4; e++) {
            const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
            double want = 0;
            for (int k = 0; k < 16; k++)
                want += std::ldexp(double(a[row][k]), -24) * double(__half2float(__ushort_as_half(b[k][column])));
            error = std::max(error, std::fabs(want - double(got[e * 32 + lane])));
            largest = std::max(largest, std::fabs(want));
        }
    // Sums of 16 exact products: at most a few units of fp32, as with normal numbers.
    Line("mma_subnormals")
        .number("max_abs", largest)
        .number("max_error", error)
        .number("relative", error / largest)
        .number("exact", error / largest < 1e-6);
}

static void probe_bandwidth(Bench& bench) {
    double best = 0;
    int best_ctas = 8, best_loads = 4;
    for (int ctas : {2, 4, 8, 16, 32})
        for (int loads : {2, 4, 8}) {
            bench.ctas_per_sm = ctas;
            bench.loads = loads;
            const double rate =
                double(bench.device.bytes()) / device_seconds(bench.stream, 7, [&] { bench.read(bench.stream); });
            Line("read_variant")
                .number("ctas_per_sm", ctas)
                .number("loads_in_flight", loads)
                .number("TBps", rate / 1e12);
            if (rate > best) best = rate, best_ctas = ctas, best_loads = loads;
        }
    bench.ctas_per_sm = best_ctas;
    bench.loads = best_loads;
    Line("read").number("TBps", best / 1e12).number("ctas_per_sm", best_ctas).number("loads_in_flight", best_loads);
    const double copy = device_seconds(bench.stream, 7, [&] {
        CUDA(cudaMemcpyAsync(bench.target.as<void>(), bench.device.as<void>(), bench.device.bytes(),
                             cudaMemcpyDeviceToDevice, bench.stream));
    });
    Line("copy_on_device").number("TBps_read_plus_write", 2 * double(bench.device.bytes()) / copy / 1e12);
}

static void probe_launch(Bench& bench) {
    constexpr int n = 2000;
    const double seconds = device_seconds(bench.stream, 5, [&] {
        for (int i = 0; i < n; i++) probe_empty<<<1, 32, 0, bench.stream>>>();
    });
    Line("launch").number("us_each", seconds / n * 1e6);
}

static void probe_graph(Bench& bench) {
    constexpr int n = 500;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    CUDA(cudaStreamBeginCapture(bench.stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < n; i++) probe_empty<<<1, 32, 0, bench.stream>>>();
    CUDA(cudaStreamEndCapture(bench.stream, &graph));
    CUDA(cudaGraphInstantiate(&executable, graph, 0));
    const double seconds = device_seconds(bench.stream, 20, [&] { CUDA(cudaGraphLaunch(executable, bench.stream)); });
    Line("graph_node").number("us_each", seconds / n * 1e6);
    CUDA(cudaGraphExecDestroy(executable));
    CUDA(cudaGraphDestroy(graph));
}

static void probe_host_function(Bench& bench) {
    constexpr int n = 200;
    const double seconds = device_seconds(bench.stream, 5, [&] {
        for (int i = 0; i < n; i++) CUDA(cudaLaunchHostFunc(bench.stream, [](void*) {}, nullptr));
    });
    Line("host_function").number("us_each", seconds / n * 1e6);
}

// CPU writes a flag in pinned memory, the GPU answers in another.
static void probe_flag(Bench& bench) {
    constexpr uint32_t n = 2000;
    uint32_t* memory = nullptr;
    CUDA(cudaHostAlloc(reinterpret_cast<void**>(&memory), 256, cudaHostAllocMapped));
    std::memset(memory, 0, 256);
    volatile uint32_t *ping = memory, *pong = memory + 32;   // a cache line each
    probe_pong<<<1, 1, 0, bench.stream>>>(ping, pong, n);
    launched();
    const double start = host_seconds();
    uint32_t answered = 0;
    for (uint32_t i = 1; i <= n && host_seconds() - start < 3; i++) {
        *ping = i;
        while (*pong != i && host_seconds() - start < 3) {
        }
        answered += *pong == i;
    }
    const double seconds = host_seconds() - start;
    CUDA(cudaStreamSynchronize(bench.stream));
    CUDA(cudaFreeHost(memory));
    if (answered != n) throw std::runtime_error("the GPU did not answer");
    Line("flag_round_trip").number("us_host", seconds / n * 1e6);
}
