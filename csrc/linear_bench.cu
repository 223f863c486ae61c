// What the dense half of a decode step reaches on a GPU: Llama-3-8B's shape, bf16, one JSON line for each kernel and
// number of rows. GB/s counts the weights only, each once; the bound is what probe.cu's read kernel reaches.
//
//   usage: linear_bench [LAYERS]        default 8: 3.5 GB of weights, so that none is in L2 when its turn comes
//
// A measurement is a CUDA graph of all layers, the median of 20 runs. The line "step" is everything in its order but
// attention; with "pdl" the kernels are chained by programmatic dependent launch (sm_90 and later).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "embed.cu"
#include "linear.cu"
#include "sample.cu"

constexpr uint32_t kHidden = 4096, kHeads = 32, kKvHeads = 8, kDim = 128, kInner = 14336, kVocab = 128256;
constexpr int kRuns = 20;

static void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "linear_bench: %s: %s\n", what, cudaGetErrorString(status));
    std::exit(1);
}

// Noise between 2^-7 and 2^-6: zeros can be read faster than data.
static __global__ void fill(uint32_t* to, size_t n) {
    const size_t step = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
        uint32_t x = uint32_t(i) * 2654435761u + 12345u;
        x ^= x >> 15;
        to[i] = (x * 1664525u & 0x807F807Fu) | 0x3C003C00u;
    }
}

static uint64_t allocate(size_t bytes, bool noise) {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes), "cudaMalloc");
    if (noise) fill<<<1024, 256>>>(static_cast<uint32_t*>(p), bytes / 4);
    else check(cudaMemset(p, 0, bytes), "cudaMemset");
    return reinterpret_cast<uint64_t>(p);
}

static uint64_t weights(uint64_t n, uint64_t k) { return allocate(n * k * 2, true); }
static uint64_t floats(uint64_t n) { return allocate(n * 4, true); }

struct Layer {
    uint64_t q = weights(kHeads * kDim, kHidden), k = weights(kKvHeads * kDim, kHidden),
             v = weights(kKvHeads * kDim, kHidden), o = weights(kHidden, kHeads* kDim), gate = weights(kInner, kHidden),
             up = weights(kInner, kHidden), down = weights(kHidden, kInner);
};

// Every entry point of the three files, by name.
static const std::map<std::string, const void*>& kernels() {
#define NAMED(kernel) {#kernel, reinterpret_cast<const void*>(kernel)},
#define LINEAR(dtype, T, N)            \
    NAMED(specache_qkv_##dtype##_n##N) \
    NAMED(specache_residual_##dtype##_n##N) NAMED(specache_gate_up_##dtype##_n##N) NAMED(specache_logits_##dtype##_n##N)
    static const std::map<std::string, const void*> all = {SPECACHE_LINEAR_KERNELS(LINEAR) NAMED(
        specache_embed_bf16) NAMED(specache_argmax_slices) NAMED(specache_argmax_merge)};
    return all;
#undef LINEAR
#undef NAMED
}

class Bench {
public:
    explicit Bench(int n_layers) : layers_(n_layers) {
        check(cudaStreamCreate(&stream_), "cudaStreamCreate");
        check(cudaDeviceSynchronize(), "filling");
    }

    void embed(uint32_t rows) {
        // No sequence: the rows are kept nowhere.
        launch(specache_embed_plan,
               specache_embed_params{table_, zeros_, zeros_, zeros_, norm_, x_, rope_, append_, bad_layer_, rows, 0,
                                     kHidden, kVocab, uint32_t(layers_.size()), kKvHeads, kDim, 1, SPECACHE_BF16, 0});
    }
    void qkv(const Layer& l, uint32_t rows) {
        launch(specache_qkv_plan, specache_qkv_params{x_,
                                                      norm_,
                                                      l.q,
                                                      l.k,
                                                      l.v,
                                                      0,
                                                      0,
                                                      0,
                                                      0,
                                                      0,
                                                      0,
                                                      rope_,
                                                      append_,
                                                      q_,
                                                      bad_layer_,
                                                      rows,
                                                      kHidden,
                                                      kHeads,
                                                      kKvHeads,
                                                      kDim,
                                                      0,
                                                      1e-5f,
                                                      SPECACHE_BF16,
                                                      SPECACHE_BF16,
                                                      0});
    }
    void out(const Layer& l, uint32_t rows) { residual(q_, l.o, kHeads * kDim, rows); }
    void gate_up(const Layer& l, uint32_t rows) {
        launch(specache_gate_up_plan, specache_gate_up_params{x_, norm_, l.gate, l.up, 0, 0, inner_, rows, kHidden,
                                                              kInner, 1e-5f, SPECACHE_BF16, 0});
    }
    void down(const Layer& l, uint32_t rows) { residual(inner_, l.down, kInner, rows); }
    void logits(uint32_t rows) {
        launch(specache_logits_plan,
               specache_linear_params{x_, norm_, table_, 0, logits_, rows, kHidden, kVocab, 1e-5f, SPECACHE_BF16, 0});
    }
    void argmax(uint32_t rows) {
        const specache_argmax_params p{logits_, scratch_, choices_, 0, rows, kVocab};
        launch(specache_argmax_slices_plan, p);
        launch(specache_argmax_merge_plan, p);
    }
    void step(uint32_t rows) {
        embed(rows);
        for (const Layer& l : layers_) {
            qkv(l, rows);
            out(l, rows);
            gate_up(l, rows);
            down(l, rows);
        }
        logits(rows);
        argmax(rows);
    }
    void each(const std::function<void(const Layer&)>& op) {
        for (const Layer& l : layers_) op(l);
    }

    // Prints the median time of `work`, which reads `numbers` weights with `launches` launches.
    void measure(const char* name, uint32_t rows, bool pdl, double numbers, int launches,
                 const std::function<void()>& work) {
        pdl_ = pdl;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
        work();
        check(cudaStreamEndCapture(stream_, &graph), "capture");
        check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
        std::vector<float> times(kRuns);
        for (int run = -3; run < kRuns; run++) times[size_t(run < 0 ? 0 : run)] = run_once(exec);
        std::sort(times.begin(), times.end());
        const double us = times[kRuns / 2] * 1e3;
        std::printf(
            "{\"probe\":\"linear\",\"kernel\":\"%s\",\"rows\":%u,\"pdl\":%d,\"launches\":%d,\"us\":%.1f,"
            "\"us_each\":%.2f,\"GBps\":%.0f}\n",
            name, rows, pdl, launches, us, us / launches, numbers * 2 / us * 1e-3);
        check(cudaGraphExecDestroy(exec), "graph");
        check(cudaGraphDestroy(graph), "graph");
    }

    int n_layers() const { return int(layers_.size()); }

private:
    void residual(uint64_t x, uint64_t weight, uint32_t k, uint32_t rows) {
        launch(specache_residual_plan,
               specache_linear_params{x, 0, weight, 0, x_, rows, k, kHidden, 1e-5f, SPECACHE_BF16, 0});
    }

    template <class P> void launch(specache_status (*plan)(const P*, specache_launch*), P p) {
        specache_launch l;
        if (plan(&p, &l) != SPECACHE_OK) {
            std::fprintf(stderr, "linear_bench: %s\n", l.message);
            std::exit(1);
        }
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = l.grid;
        config.blockDim = l.block;
        config.stream = stream_;
        config.dynamicSmemBytes = l.shared_bytes;
        config.attrs = &attribute;
        config.numAttrs = pdl_;
        void* arguments[] = {&p};
        if (l.shared_bytes > 48 << 10)
            check(cudaFuncSetAttribute(kernels().at(l.kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       int(l.shared_bytes)),
                  "shared memory");
        check(cudaLaunchKernelExC(&config, kernels().at(l.kernel), arguments), l.kernel);
    }

    float run_once(cudaGraphExec_t exec) {
        cudaEvent_t begin, end;
        check(cudaEventCreate(&begin), "event");
        check(cudaEventCreate(&end), "event");
        check(cudaEventRecord(begin, stream_), "event");
        check(cudaGraphLaunch(exec, stream_), "cudaGraphLaunch");
        check(cudaEventRecord(end, stream_), "event");
        check(cudaStreamSynchronize(stream_), "graph");
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin, end), "event");
        cudaEventDestroy(begin);
        cudaEventDestroy(end);
        return ms;
    }

    cudaStream_t stream_ = nullptr;
    bool pdl_ = false;
    std::vector<Layer> layers_;
    uint64_t table_ = weights(kVocab, kHidden), norm_ = floats(kHidden), x_ = floats(SPECACHE_MAX_ROWS * kHidden),
             q_ = floats(SPECACHE_MAX_ROWS * kHeads * kDim), inner_ = floats(SPECACHE_MAX_ROWS * kInner),
             rope_ = floats(SPECACHE_MAX_ROWS * kDim), logits_ = floats(uint64_t(SPECACHE_MAX_ROWS) * kVocab);
    uint64_t zeros_ = allocate(4096, false), bad_layer_ = allocate(4096, false);
    uint64_t append_ = allocate(256 * SPECACHE_MAX_ROWS * 8, false);
    uint64_t scratch_ = allocate(1 << 20, false), choices_ = allocate(4096, false);
};

int main(int argc, char** argv) {
    const int layers = argc > 1 ? std::atoi(argv[1]) : 8;
    if (layers < 1 || layers > 256) {
        std::fprintf(stderr, "usage: linear_bench [LAYERS]    1 to 256, default 8\n");
        return 2;
    }
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "no GPU");
    Bench b(layers);
    const double hidden = kHidden, n = layers, inner = kInner, qkv = hidden * (kHeads + 2 * kKvHeads) * kDim,
                 out = hidden * kHeads * kDim, head = hidden * kVocab, layer = qkv + out + 3 * hidden * inner;
    for (uint32_t rows : {1u, 2u, 4u, 8u, 16u}) {
        b.measure("qkv", rows, false, n * qkv, layers, [&] { b.each([&](const Layer& l) { b.qkv(l, rows); }); });
        b.measure("out", rows, false, n * out, layers, [&] { b.each([&](const Layer& l) { b.out(l, rows); }); });
        b.measure("gate_up", rows, false, n * 2 * hidden * inner, layers,
                  [&] { b.each([&](const Layer& l) { b.gate_up(l, rows); }); });
        b.measure("down", rows, false, n * hidden * inner, layers,
                  [&] { b.each([&](const Layer& l) { b.down(l, rows); }); });
        b.measure("logits", rows, false, head, 1, [&] { b.logits(rows); });
        b.measure("argmax", rows, false, 0, 2, [&] { b.argmax(rows); });
        for (int pdl = 0; pdl <= (device.major >= 9); pdl++)
            b.measure("step", rows, pdl != 0, n * layer + head, 4 * layers + 4, [&] { b.step(rows); });
    }
}
