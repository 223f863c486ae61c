// First facts about a GPU and its link, one JSON line per measurement on stdout: what the kernels' and the gather's
// design rests on. A probe that fails reports "error" and the others go on. About two minutes.
//
//   usage: probe [--only NAME] [FOOTPRINT_GIB ...]      default footprints: 1 16
//
// Times are medians over repetitions after a warm-up, by device events unless a name says host.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "ptx.cuh"

// ---- kernels ----------------------------------------------------------------------------------------------------

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

// ---- errors, output, time ---------------------------------------------------------------------------------------

static void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(cudaGetErrorName(status)) + ": " + what);
}
#define CUDA(call) check((call), #call)

// A launch's own error.
static void launched() { check(cudaGetLastError(), "kernel launch"); }

// One JSON object on one line; written when it goes out of scope.
class Line {
public:
    explicit Line(const char* probe) : text_(std::string("{\"probe\": \"") + probe + "\"") {}
    ~Line() { std::printf("%s}\n", text_.c_str()); }
    Line& text(const char* name, const std::string& value) {
        text_ += std::string(", \"") + name + "\": \"";
        for (char c : value) text_ += c == '"' || c == '\\' || c < ' ' ? ' ' : c;
        text_ += '"';
        return *this;
    }
    Line& number(const char* name, double value) {
        char digits[40];
        std::snprintf(digits, sizeof digits, "%.6g", value);
        text_ += std::string(", \"") + name + "\": " + (std::isfinite(value) ? digits : "null");
        return *this;
    }

private:
    std::string text_;
};

static double host_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

class Stream {
public:
    Stream() { CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    operator cudaStream_t() const { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
};

// Two events around work on a stream.
class Stopwatch {
public:
    Stopwatch() {
        CUDA(cudaEventCreate(&begin_));
        CUDA(cudaEventCreate(&end_));
    }
    ~Stopwatch() {
        cudaEventDestroy(begin_);
        cudaEventDestroy(end_);
    }
    Stopwatch(const Stopwatch&) = delete;
    void start(cudaStream_t stream) { CUDA(cudaEventRecord(begin_, stream)); }
    void stop(cudaStream_t stream) { CUDA(cudaEventRecord(end_, stream)); }
    double seconds() {
        CUDA(cudaEventSynchronize(end_));
        float ms = 0;
        CUDA(cudaEventElapsedTime(&ms, begin_, end_));
        return ms * 1e-3;
    }

private:
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// Median device time of `work`, after one warm-up.
static double device_seconds(cudaStream_t stream, int repetitions, const std::function<void()>& work) {
    Stopwatch watch;
    std::vector<double> times;
    for (int i = 0; i <= repetitions; i++) {
        watch.start(stream);
        work();
        launched();
        watch.stop(stream);
        const double seconds = watch.seconds();
        if (i > 0) times.push_back(seconds);
    }
    return median(times);
}

// ---- memory -----------------------------------------------------------------------------------------------------

class DeviceMemory {
public:
    explicit DeviceMemory(size_t bytes) : bytes_(bytes) { CUDA(cudaMalloc(&data_, bytes)); }
    ~DeviceMemory() { cudaFree(data_); }
    DeviceMemory(const DeviceMemory&) = delete;
    template <class T> T* as() const { return static_cast<T*>(data_); }
    size_t bytes() const { return bytes_; }

private:
    void* data_ = nullptr;
    size_t bytes_;
};

// Runs body(i, n) on n threads and waits.
static void on_threads(int n, const std::function<void(int, int)>& body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < n; i++) threads.emplace_back(body, i, n);
    for (std::thread& t : threads) t.join();
}

// Pinned host memory of rows that begin with their own number, in the two ways there are.
class PinnedRows {
public:
    static constexpr size_t kRegistration = size_t(16) << 30;   // larger calls are known to fail somewhere

    PinnedRows(size_t bytes, bool registered) : bytes_(bytes), registered_(registered) {
        if (bytes > available_bytes() / 10 * 6) throw std::runtime_error("not enough host memory for this footprint");
        try {
            if (registered) map_and_touch();
            const double start = host_seconds();
            if (registered) register_chunks();
            else CUDA(cudaHostAlloc(reinterpret_cast<void**>(&data_), bytes, cudaHostAllocPortable));
            pin_seconds = host_seconds() - start;
            if (!registered) number_rows();
        } catch (...) {
            release();
            throw;
        }
    }
    ~PinnedRows() { release(); }
    PinnedRows(const PinnedRows&) = delete;

    uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    size_t rows() const { return bytes_ / kRowBytes; }
    const char* how() const { return registered_ ? "mmap_register" : "host_alloc"; }
    double gib() const { return double(bytes_) / (1u << 30); }
    double pin_seconds = 0;   // without the touching
    double touch_seconds = 0;

private:
    // MemAvailable: free pages and what caches would give back.
    static size_t available_bytes() {
        std::ifstream file("/proc/meminfo");
        for (std::string key; file >> key;) {
            size_t kib = 0;
            if (key == "MemAvailable:" && file >> kib) return kib << 10;
        }
        throw std::runtime_error("/proc/meminfo has no MemAvailable");
    }

    void release() {
        if (data_ == nullptr) return;
        if (!registered_) {
            cudaFreeHost(data_);
            return;
        }
        for (size_t at = 0; at < registered_bytes_; at += kRegistration) cudaHostUnregister(data_ + at);
        munmap(data_, bytes_);
    }

    void map_and_touch() {
        void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) throw std::runtime_error("mmap failed");
        data_ = static_cast<uint8_t*>(at);
        madvise(data_, bytes_, MADV_HUGEPAGE);   // a hint: pinning and IOMMU walks are cheaper with large pages
        const double start = host_seconds();
        number_rows();
        touch_seconds = host_seconds() - start;
    }

    void register_chunks() {
        for (size_t at = 0; at < bytes_; at += kRegistration) {
            const size_t bytes = std::min(bytes_ - at, kRegistration);
            CUDA(cudaHostRegister(data_ + at, bytes, cudaHostRegisterPortable));
            registered_bytes_ += bytes;
        }
    }

    void number_rows() {
        const int n = std::max(1u, std::thread::hardware_concurrency());
        on_threads(n, [this](int i, int threads) {
            for (uint64_t row = rows() * size_t(i) / size_t(threads); row < rows() * size_t(i + 1) / size_t(threads);
                 row++)
                std::memcpy(data_ + row * kRowBytes, &row, sizeof row);
        });
    }

    uint8_t* data_ = nullptr;
    size_t bytes_;
    bool registered_;
    size_t registered_bytes_ = 0;
};

// ---- what the probes share --------------------------------------------------------------------------------------

constexpr int kGatherRows = 65536;   // 32 MiB: long enough that launch costs vanish

struct Bench {
    Bench() : device(size_t(8) << 30), target(size_t(8) << 30), ids(kGatherRows * 4), sink(4) {
        cudaDeviceProp properties;
        CUDA(cudaGetDeviceProperties(&properties, 0));
        sms = properties.multiProcessorCount;
        capability = properties.major * 10 + properties.minor;
        probe_fill<<<sms * 8, 256>>>(device.as<uint4>(), device.bytes() / 16);
        launched();
        CUDA(cudaDeviceSynchronize());
    }

    // The best of the read kernels found so far; `probe_bandwidth` tunes it.
    void read(cudaStream_t s) const {
        const dim3 grid(unsigned(sms * ctas_per_sm));
        const uint4* from = device.as<uint4>();
        const size_t n = device.bytes() / 16;
        if (loads == 2) probe_read_2<<<grid, 256, 0, s>>>(from, n, sink.as<uint32_t>());
        else if (loads == 4) probe_read_4<<<grid, 256, 0, s>>>(from, n, sink.as<uint32_t>());
        else probe_read_8<<<grid, 256, 0, s>>>(from, n, sink.as<uint32_t>());
    }

    DeviceMemory device;   // noise
    DeviceMemory target;   // what copies write to
    DeviceMemory ids;      // row numbers of a gather
    DeviceMemory sink;
    Stream stream, other;
    int sms = 0, capability = 0, ctas_per_sm = 8, loads = 4;
    std::vector<double> footprints_gib;
};

// ---- probes -----------------------------------------------------------------------------------------------------

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

// Copies of one size after another over at least 64 MiB.
static void memcpy_of_size(Bench& bench, const PinnedRows& host, size_t size) {
    const size_t copies = std::clamp<size_t>((size_t(64) << 20) / size, 1, 1000);
    auto rate = [&](bool up) {
        return device_seconds(bench.stream, 5, [&] {
            for (size_t i = 0; i < copies; i++) {
                uint8_t *h = host.data() + i * size % (host.bytes() - size + 1),
                        *d = bench.target.as<uint8_t>() + i * size;
                CUDA(cudaMemcpyAsync(up ? d : h, up ? h : d, size, up ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost,
                                     bench.stream));
            }
        });
    };
    const double up = rate(true), down = rate(false), bytes = double(copies * size);
    Line("memcpy")
        .text("how", host.how())
        .number("bytes", double(size))
        .number("h2d_GBps", bytes / up / 1e9)
        .number("d2h_GBps", bytes / down / 1e9)
        .number("h2d_us_each", up / double(copies) * 1e6)
        .number("d2h_us_each", down / double(copies) * 1e6);
}

static std::vector<uint32_t> random_rows(Bench& bench, const PinnedRows& host) {
    std::mt19937_64 random(2);
    std::vector<uint32_t> ids(kGatherRows);
    for (uint32_t& id : ids) id = uint32_t(random() % host.rows());
    CUDA(cudaMemcpy(bench.ids.as<void>(), ids.data(), ids.size() * 4, cudaMemcpyHostToDevice));
    return ids;
}

// Every row begins with its number: was the right one fetched?
static void check_gathered(Bench& bench, const std::vector<uint32_t>& ids) {
    std::vector<uint8_t> rows(size_t(kGatherRows) * kRowBytes);
    CUDA(cudaMemcpy(rows.data(), bench.target.as<void>(), rows.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < ids.size(); i++) {
        uint64_t got;
        std::memcpy(&got, rows.data() + i * kRowBytes, sizeof got);
        if (got != ids[i]) throw std::runtime_error("row " + std::to_string(i) + " of a gather is wrong");
    }
}

using Work = std::function<void(cudaStream_t)>;

static double gather_GBps(double seconds) { return double(kGatherRows) * kRowBytes / seconds / 1e9; }

// The gather beside a read of the whole device memory by all SMs: what does each lose?
static void beside_read(Bench& bench, const Work& gather, double* gather_seconds, double* read_slowdown) {
    const double alone = device_seconds(bench.other, 5, [&] { bench.read(bench.other); });
    Stopwatch gather_watch, read_watch;
    std::vector<double> gathers, reads;
    for (int i = 0; i < 5; i++) {
        CUDA(cudaDeviceSynchronize());
        gather_watch.start(bench.stream);
        gather(bench.stream);
        launched();
        gather_watch.stop(bench.stream);
        read_watch.start(bench.other);
        bench.read(bench.other);
        launched();
        read_watch.stop(bench.other);
        gathers.push_back(gather_watch.seconds());
        reads.push_back(read_watch.seconds());
    }
    *gather_seconds = median(gathers);
    *read_slowdown = median(reads) / alone;
}

static void gather_line(Bench& bench, const PinnedRows& host, const char* variant, int ctas, const Work& gather) {
    const double alone = device_seconds(bench.stream, 5, [&] { gather(bench.stream); });
    double beside = 0, slowdown = 0;
    beside_read(bench, gather, &beside, &slowdown);
    Line("gpu_gather")
        .text("variant", variant)
        .text("how", host.how())
        .number("GiB", host.gib())
        .number("ctas", ctas)
        .number("GBps", gather_GBps(alone))
        .number("GBps_beside_read", gather_GBps(beside))
        .number("read_slowdown", slowdown);
}

static void gpu_gathers(Bench& bench, const PinnedRows& host, const std::vector<uint32_t>& ids) {
    const uint4* from = reinterpret_cast<const uint4*>(host.data());
    const uint32_t* rows = bench.ids.as<uint32_t>();
    uint4* to = bench.target.as<uint4>();
    const bool bulk = bench.capability >= 90;
    if (bulk)
        CUDA(cudaFuncSetAttribute(probe_bulk_gather, cudaFuncAttributeMaxDynamicSharedMemorySize, kBulkSharedBytes));
    for (int ctas : {1, 2, 4, 8, 16, 32}) {
        const unsigned grid = unsigned(ctas);
        const Work four = [=](cudaStream_t s) { probe_gather_4<<<grid, 1024, 0, s>>>(from, rows, kGatherRows, to); };
        const Work eight = [=](cudaStream_t s) { probe_gather_8<<<grid, 512, 0, s>>>(from, rows, kGatherRows, to); };
        const Work copies = [=, bytes = host.data()](cudaStream_t s) {
            probe_bulk_gather<<<grid, 32, kBulkSharedBytes, s>>>(bytes, rows, kGatherRows,
                                                                 reinterpret_cast<uint8_t*>(to));
        };
        gather_line(bench, host, "1024_threads_4_rows", ctas, four);
        gather_line(bench, host, "512_threads_8_rows", ctas, eight);
        check_gathered(bench, ids);
        if (!bulk) continue;
        CUDA(cudaMemset(to, 0, size_t(kGatherRows) * kRowBytes));
        gather_line(bench, host, "bulk_copy_32_threads", ctas, copies);
        check_gathered(bench, ids);
    }
}

// Threads that spin for the start copy rows into staging memory; then one copy to the device.
static void cpu_gather(Bench& bench, const PinnedRows& host, const std::vector<uint32_t>& ids, uint8_t* staging,
                       int threads, int rows) {
    std::vector<double> gather_times, total_times;
    for (int repetition = 0; repetition < 5; repetition++) {
        std::atomic<bool> go{false};
        std::atomic<int> ready{0}, done{0};
        std::thread crew([&] {
            on_threads(threads, [&](int i, int n) {
                ready++;
                while (!go) {
                }
                for (int r = int(int64_t(rows) * i / n); r < int(int64_t(rows) * (i + 1) / n); r++)
                    std::memcpy(staging + size_t(r) * kRowBytes, host.data() + size_t(ids[size_t(r)]) * kRowBytes,
                                kRowBytes);
                done++;
            });
        });
        while (ready < threads) {
        }
        const double start = host_seconds();
        go = true;
        while (done < threads) {
        }
        gather_times.push_back(host_seconds() - start);
        const cudaError_t copied = cudaMemcpyAsync(bench.target.as<void>(), staging, size_t(rows) * kRowBytes,
                                                   cudaMemcpyHostToDevice, bench.stream);
        const cudaError_t waited = cudaStreamSynchronize(bench.stream);
        total_times.push_back(host_seconds() - start);
        crew.join();
        CUDA(copied);
        CUDA(waited);
    }
    const double bytes = double(rows) * kRowBytes;
    Line("cpu_gather")
        .text("how", host.how())
        .number("GiB", host.gib())
        .number("threads", threads)
        .number("rows", rows)
        .number("GBps_gather", bytes / median(gather_times) / 1e9)
        .number("GBps_with_copy", bytes / median(total_times) / 1e9)
        .number("us_with_copy", median(total_times) * 1e6);
}

static void cpu_gathers(Bench& bench, const PinnedRows& host, const std::vector<uint32_t>& ids) {
    const PinnedRows staging(size_t(kGatherRows) * kRowBytes, false);
    // More threads than cores would spin against each other.
    const int cores = int(std::max(2u, std::thread::hardware_concurrency()));
    for (int threads : {1, 4, 8, 15})
        for (int rows : {2048, 16384, 65536})
            if (threads < cores) cpu_gather(bench, host, ids, staging.data(), threads, rows);
}

// Everything that needs pinned memory of one footprint: pinned once.
static void link_of(Bench& bench, double gib, bool registered, bool with_memcpy) {
    const PinnedRows host(size_t(gib * double(1u << 30)) / kRowBytes * kRowBytes, registered);
    Line("pin")
        .text("how", host.how())
        .number("GiB", host.gib())
        .number("s_per_GiB", host.pin_seconds / host.gib())
        .number("touch_s_per_GiB", host.touch_seconds / host.gib());
    if (with_memcpy)
        for (size_t size : {size_t(4) << 10, size_t(64) << 10, size_t(256) << 10, size_t(1) << 20, size_t(8) << 20,
                            size_t(256) << 20})
            if (size <= host.bytes()) memcpy_of_size(bench, host, size);
    const std::vector<uint32_t> ids = random_rows(bench, host);
    gpu_gathers(bench, host, ids);
    cpu_gathers(bench, host, ids);
}

// ---- the run ----------------------------------------------------------------------------------------------------

// Runs one probe; an exception becomes its line.
static bool attempt(const std::string& only, const char* name, const std::function<void()>& probe) {
    if (!only.empty() && only != name) return true;
    try {
        probe();
        return true;
    } catch (const std::exception& e) {
        Line(name).text("error", e.what());
        return false;
    }
}

static bool run_all(Bench& bench, const std::string& only) {
    bool ok = attempt(only, "device", [&] { probe_device(bench); });
    ok &= attempt(only, "mma_subnormals", [&] { probe_subnormals(bench); });
    ok &= attempt(only, "bandwidth", [&] { probe_bandwidth(bench); });
    ok &= attempt(only, "launch", [&] { probe_launch(bench); });
    ok &= attempt(only, "graph_node", [&] { probe_graph(bench); });
    ok &= attempt(only, "host_function", [&] { probe_host_function(bench); });
    ok &= attempt(only, "flag_round_trip", [&] { probe_flag(bench); });
    for (double gib : bench.footprints_gib) {
        const bool first = gib == bench.footprints_gib.front();
        // cudaHostAlloc is slow to allocate: only where it is small.
        if (gib <= 4) ok &= attempt(only, "link", [&] { link_of(bench, gib, false, first); });
        ok &= attempt(only, "link", [&] { link_of(bench, gib, true, first); });
    }
    return ok;
}

static int usage() {
    std::fprintf(stderr,
                 "usage: probe [--only NAME] [FOOTPRINT_GIB ...]\n"
                 "names: device mma_subnormals bandwidth launch graph_node host_function flag_round_trip link\n");
    return 2;
}

int main(int argc, char** argv) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    std::string only;
    std::vector<double> footprints;
    for (int i = 1; i < argc; i++) {
        char* end = nullptr;
        if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
            only = argv[++i];
            continue;
        }
        footprints.push_back(std::strtod(argv[i], &end));
        if (*end != '\0' || !(footprints.back() > 0)) return usage();
    }
    std::unique_ptr<Bench> bench;
    if (!attempt("", "setup", [&] { bench = std::make_unique<Bench>(); })) return 1;
    bench->footprints_gib = footprints.empty() ? std::vector<double>{1, 16} : footprints;
    return run_all(*bench, only) ? 0 : 1;
}
