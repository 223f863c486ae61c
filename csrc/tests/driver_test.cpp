// The emulated driver: what it computes, and that it sees each mistake that it promises to see. Every case runs in a
// process of its own, with its own environment; those that must hold whatever the order, for several seeds.
#include <cuda.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../emu/driver/kernels.h"
#include "../ptx.cuh"
#include "check.h"

extern "C" int specache_emu_report(char* text, size_t bytes);
extern "C" void specache_emu_reset();

// ---- kernels of this test -------------------------------------------------------------------------------------------

struct Words {
    uint64_t from, to;
    uint32_t n;
};

static uint32_t thread_of_grid() { return blockIdx.x * blockDim.x + threadIdx.x; }

static void copy_word(const Words& p) {
    const uint32_t i = thread_of_grid();
    if (i >= p.n) return;
    const uint32_t value = specache::load_u32(reinterpret_cast<const uint32_t*>(p.from) + i);
    specache::store_device(reinterpret_cast<uint32_t*>(p.to) + i, value);
}

static void copy_words(Words p) {
    specache::wait_for_previous_kernel();
    copy_word(p);
}

// A programmatic launch of it reads what its predecessor may still write.
static void copy_words_early(Words p) {
    copy_word(p);
    specache::wait_for_previous_kernel();
}

static const emu::driver::Registered registered_copy("driver_test.cpp", "copy_words", copy_words);
static const emu::driver::Registered registered_early("driver_test.cpp", "copy_words_early", copy_words_early);

// ---- what a program does --------------------------------------------------------------------------------------------

#define OK(call)                                                         \
    do {                                                                 \
        const CUresult result = (call);                                  \
        const char* name = nullptr;                                      \
        cuGetErrorName(result, &name);                                   \
        CHECK(result == CUDA_SUCCESS, "%s, %s", name, report().c_str()); \
    } while (0)
#define GIVES(expected, call)                                                                                     \
    do {                                                                                                          \
        const int result = int(call);                                                                             \
        CHECK(result == int(expected), "%s gave %d, not %d: %s", #call, result, int(expected), report().c_str()); \
    } while (0)

static std::string report() {
    std::vector<char> text(1 << 16);
    specache_emu_report(text.data(), text.size());
    return text.data();
}

static int errors() { return specache_emu_report(nullptr, 0); }

static void reported(const std::string& part) {
    CHECK(report().find(part) != std::string::npos, "no '%s' in '%s'", part.c_str(), report().c_str());
}

constexpr uint32_t kN = 1000;

// A context, two streams, and buffers of kN words.
struct Setup {
    CUstream compute, copies;
    CUevent event;
    CUmodule module;
    CUdeviceptr a, b;
    std::vector<uint32_t> pinned = std::vector<uint32_t>(kN), out = std::vector<uint32_t>(kN);

    Setup() {
        CUcontext context;
        OK(cuInit(0));
        OK(cuDevicePrimaryCtxRetain(&context, 0));
        OK(cuCtxSetCurrent(context));
        OK(cuStreamCreateWithPriority(&compute, CU_STREAM_NON_BLOCKING, 0));
        OK(cuStreamCreateWithPriority(&copies, CU_STREAM_NON_BLOCKING, 0));
        OK(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
        OK(cuModuleLoadData(&module, "// PTX stands for any real image"));
        OK(cuMemAlloc(&a, 4 * kN));
        OK(cuMemAlloc(&b, 4 * kN));
        OK(cuMemHostRegister(pinned.data(), 4 * kN, 0));
        OK(cuMemHostRegister(out.data(), 4 * kN, 0));
        for (uint32_t i = 0; i < kN; i++) pinned[i] = i + 1;
    }

    CUfunction function(const char* name) {
        CUfunction f;
        OK(cuModuleGetFunction(&f, module, name));
        return f;
    }
    CUresult try_launch(CUstream stream, Words p, const char* name = "copy_words", unsigned grid = 8,
                        unsigned block = 128, unsigned shared = 0) {
        void* parameters[] = {&p};
        return cuLaunchKernel(function(name), grid, 1, 1, block, 1, 1, shared, stream, parameters, nullptr);
    }
    void launch(CUstream stream, CUdeviceptr from, CUdeviceptr to) { OK(try_launch(stream, Words{from, to, kN})); }
    void launch_programmatic(CUstream stream, const char* name, CUdeviceptr from, CUdeviceptr to) {
        Words p{from, to, kN};
        void* parameters[] = {&p};
        CUlaunchAttribute attribute{};
        attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        const CUlaunchConfig config{8, 1, 1, 128, 1, 1, 0, stream, &attribute, 1};
        OK(cuLaunchKernelEx(&config, function(name), parameters, nullptr));
    }
    void upload(CUstream stream) { OK(cuMemcpyHtoDAsync(a, pinned.data(), 4 * kN, stream)); }
    void download(CUstream stream) { OK(cuMemcpyDtoHAsync(out.data(), b, 4 * kN, stream)); }
    void order(CUstream first, CUstream then) {
        OK(cuEventRecord(event, first));
        OK(cuStreamWaitEvent(then, event, 0));
    }
    bool arrived() const { return out == pinned; }
};

// ---- what must work -------------------------------------------------------------------------------------------------

static void streams_and_events() {
    Setup s;
    for (int round = 0; round < 3; round++) {
        for (uint32_t& w : s.pinned) w += 7;
        s.upload(s.copies);
        s.order(s.copies, s.compute);
        s.launch(s.compute, s.a, s.b);
        s.launch_programmatic(s.compute, "copy_words", s.b, s.b);
        s.download(s.compute);
        OK(cuStreamSynchronize(s.compute));
        CHECK(s.arrived(), "round %d", round);
        s.order(s.compute, s.copies);
    }
    CHECK(report().empty(), "%s", report().c_str());
}

static void queries_and_times() {
    Setup s;
    CUevent begin, end;
    float ms = -1;
    OK(cuEventCreate(&begin, 0));
    OK(cuEventCreate(&end, 0));
    OK(cuEventRecord(begin, s.compute));
    s.launch(s.compute, s.a, s.b);
    OK(cuEventRecord(end, s.compute));
    GIVES(CUDA_ERROR_NOT_READY, cuEventQuery(end));   // as late as possible: seed 0
    GIVES(CUDA_ERROR_NOT_READY, cuStreamQuery(s.compute));
    OK(cuEventSynchronize(end));
    OK(cuEventQuery(end));
    OK(cuStreamQuery(s.compute));
    OK(cuEventElapsedTime(&ms, begin, end));
    CHECK(ms >= 0, "%g ms", double(ms));
    GIVES(CUDA_ERROR_INVALID_HANDLE, cuEventElapsedTime(&ms, s.event, end));
    // The GPU also runs by itself when nobody waits.
    OK(cuEventRecord(end, s.compute));
    while (cuEventQuery(end) == CUDA_ERROR_NOT_READY) std::this_thread::sleep_for(std::chrono::milliseconds(250));
}

static void host_functions() {
    Setup s;
    static std::atomic<uint32_t> seen{0};
    static uint32_t* words = s.out.data();
    s.upload(s.compute);
    s.launch(s.compute, s.a, s.b);
    s.download(s.compute);
    OK(cuLaunchHostFunc(s.compute, [](void* add) { seen = words[3] + *static_cast<uint32_t*>(add); }, &s.pinned[0]));
    OK(cuStreamSynchronize(s.compute));
    CHECK(seen == 4 + 1, "%u", seen.load());
}

static void values() {
    Setup s;
    alignas(4) static uint32_t flags[2] = {0, 0};
    CUdeviceptr flag;
    OK(cuMemHostRegister(flags, sizeof flags, CU_MEMHOSTREGISTER_DEVICEMAP));
    OK(cuMemHostGetDevicePointer(&flag, flags, 0));
    // The host signals a stream, which signals another one.
    OK(cuStreamWaitValue32(s.copies, flag, 5, CU_STREAM_WAIT_VALUE_GEQ));
    s.upload(s.copies);
    OK(cuStreamWriteValue32(s.copies, flag + 4, 1, 0));
    OK(cuStreamWaitValue32(s.compute, flag + 4, 1, CU_STREAM_WAIT_VALUE_EQ));
    s.launch(s.compute, s.a, s.b);
    s.download(s.compute);
    std::thread host([] {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        __atomic_store_n(&flags[0], 5, __ATOMIC_RELEASE);
    });
    OK(cuStreamSynchronize(s.compute));
    host.join();
    CHECK(s.arrived() && errors() == 0, "%s", report().c_str());
}

// The host sees a kernel's word in its own memory and answers: that orders what came before the kernel.
static void mailbox() {
    Setup s;
    alignas(4) static uint32_t mail = 0;
    CUdeviceptr at;
    OK(cuMemHostRegister(&mail, 4, CU_MEMHOSTREGISTER_DEVICEMAP));
    OK(cuMemHostGetDevicePointer(&at, &mail, 0));
    s.upload(s.copies);
    OK(s.try_launch(s.copies, Words{s.a, at, 1}));
    while (__atomic_load_n(&mail, __ATOMIC_ACQUIRE) != 1) std::this_thread::yield();
    s.launch(s.compute, s.a, s.b);
    s.download(s.compute);
    OK(cuStreamSynchronize(s.compute));
    CHECK(s.arrived() && errors() == 0, "%s", report().c_str());
}

static void mapped_memory() {
    Setup s;
    CUdeviceptr from, to;
    OK(cuMemHostGetDevicePointer(&from, s.pinned.data(), 0));
    OK(cuMemHostGetDevicePointer(&to, s.out.data(), 0));
    s.launch(s.compute, from, to);
    OK(cuStreamSynchronize(s.compute));
    CHECK(s.arrived(), "mapped memory");
    uint32_t local;
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemHostGetDevicePointer(&from, &local, 0));
    GIVES(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister(s.pinned.data() + 1, 4, 0));
    OK(cuMemHostUnregister(s.pinned.data()));
    GIVES(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(s.pinned.data()));
}

static CUgraphExec captured(Setup& s) {
    CUgraph graph;
    CUgraphExec exec;
    OK(cuStreamBeginCapture(s.compute, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    s.order(s.compute, s.copies);
    s.upload(s.copies);
    s.order(s.copies, s.compute);
    GIVES(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamSynchronize(s.compute));
    s.launch(s.compute, s.a, s.b);
    OK(cuStreamEndCapture(s.compute, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphDestroy(graph));
    return exec;
}

static void graphs() {
    Setup s;
    const CUgraphExec exec = captured(s);
    for (int round = 0; round < 3; round++) {
        for (uint32_t& w : s.pinned) w += 3;
        OK(cuGraphLaunch(exec, s.compute));
        s.download(s.compute);
        OK(cuStreamSynchronize(s.compute));
        CHECK(s.arrived(), "round %d", round);
    }
    OK(cuGraphExecDestroy(exec));
    CHECK(report().empty(), "%s", report().c_str());
}

static void unjoined_capture() {
    Setup s;
    CUgraph graph;
    OK(cuStreamBeginCapture(s.compute, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    s.order(s.compute, s.copies);
    s.upload(s.copies);
    GIVES(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, cuStreamEndCapture(s.compute, &graph));
}

// Not even an event from before the capture may be waited for or asked in the middle of it.
static void broken_capture() {
    Setup s;
    for (const bool waits : {false, true}) {
        CUevent before;
        CUgraph graph;
        OK(cuEventCreate(&before, CU_EVENT_DISABLE_TIMING));
        OK(cuEventRecord(before, s.copies));
        OK(cuStreamBeginCapture(s.compute, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
        GIVES(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, waits ? cuEventSynchronize(before) : cuEventQuery(before));
        GIVES(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s.compute, &graph));
        OK(cuEventDestroy(before));
    }
}

// ---- missing order --------------------------------------------------------------------------------------------------

static void missing_wait() {
    Setup s;
    s.upload(s.copies);
    s.launch(s.compute, s.a, s.b);
    const CUresult first = cuStreamSynchronize(s.copies), second = cuStreamSynchronize(s.compute);
    CHECK(first != CUDA_SUCCESS || second != CUDA_SUCCESS, "both waits succeed");
    CHECK(errors() == 1, "%s", report().c_str());
    reported("race: ");
    reported("copy HtoD (stream 2)");
    reported("copy_words (stream 1)");
}

static void overwritten_too_early() {
    Setup s;
    s.upload(s.copies);
    s.order(s.copies, s.compute);
    s.launch(s.compute, s.a, s.b);
    s.upload(s.copies);   // nobody waits until the kernel has read the last one
    const CUresult first = cuStreamSynchronize(s.copies), second = cuStreamSynchronize(s.compute);
    CHECK(first != CUDA_SUCCESS || second != CUDA_SUCCESS, "both waits succeed");
    reported("race: ");
}

static void race_in_host_memory() {
    Setup s;
    CUdeviceptr from;
    OK(cuMemHostGetDevicePointer(&from, s.out.data(), 0));
    OK(cuMemsetD32Async(s.b, 1, kN, s.copies));
    s.download(s.copies);
    s.launch(s.compute, from, s.a);
    CHECK(cuStreamSynchronize(s.copies) != CUDA_SUCCESS || cuStreamSynchronize(s.compute) != CUDA_SUCCESS, "no race");
    reported("race: ");
}

static void neighbours_do_not_race() {
    Setup s;   // the two halves of one granule
    OK(cuMemsetD32Async(s.a, 1, 2, s.copies));
    OK(cuMemsetD32Async(s.a + 8, 2, 2, s.compute));
    OK(cuCtxSynchronize());
    CHECK(report().empty(), "%s", report().c_str());
}

static void programmatic_launch_without_wait() {
    Setup s;
    s.launch(s.compute, s.a, s.b);
    s.launch_programmatic(s.compute, "copy_words_early", s.b, s.a);
    GIVES(CUDA_ERROR_LAUNCH_FAILED, cuStreamSynchronize(s.compute));
    reported("copy_words_early (stream 1) reads");
}

// Seed 0: as late as possible.
static void source_changes_before_the_copy() {
    Setup s;
    s.upload(s.compute);
    s.pinned[0] = 77;
    s.launch(s.compute, s.a, s.b);
    s.download(s.compute);
    CHECK(s.out[5] != s.pinned[5], "the result is there before anyone waits");
    OK(cuStreamSynchronize(s.compute));
    CHECK(s.out[0] == 77, "%u", s.out[0]);
}

static void unordered_data_differ() {
    Setup s;
    s.launch(s.compute, s.a, s.b);   // what is in a: poison
    s.download(s.compute);
    OK(cuStreamSynchronize(s.compute));
    CHECK(s.out[0] != 0 && s.out[0] == s.out[1], "%x", s.out[0]);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

static void freed_too_early() {
    Setup s;
    s.launch(s.compute, s.a, s.b);
    const CUresult freed = cuMemFree(s.b), waited = cuStreamSynchronize(s.compute);
    CHECK(freed != CUDA_SUCCESS || waited != CUDA_SUCCESS, "nobody sees it");
    CHECK(errors() >= 1, "no error");
    reported("copy_words (stream 1)");
    reported("freed");
}

static void freed_in_time() {
    Setup s;
    size_t before, after, total;
    OK(cuMemGetInfo(&before, &total));
    s.launch(s.compute, s.a, s.b);
    OK(cuStreamSynchronize(s.compute));
    OK(cuMemFree(s.b));
    OK(cuMemGetInfo(&after, &total));
    CHECK(after == before + 4 * kN && errors() == 0, "%zu, %zu", before, after);
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemFree(s.b));
}

static void unregistered_too_early() {
    Setup s;
    s.upload(s.copies);
    const CUresult given_back = cuMemHostUnregister(s.pinned.data()), waited = cuStreamSynchronize(s.copies);
    if (given_back == CUDA_SUCCESS && waited == CUDA_SUCCESS) CHECK(errors() == 0, "%s", report().c_str());
    else reported("unregistered");
}

static void beyond_the_end() {
    Setup s;
    OK(s.try_launch(s.compute, Words{s.a, s.b, kN + 1}));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s.compute));
    reported("copy_words (stream 1): read of 4 bytes at offset 4000 of allocation 1, which has 4000");
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuMemFree(s.a));   // and nothing works any more
}

static void reset() {
    Setup s;
    OK(s.try_launch(s.compute, Words{s.a, s.b, kN + 1}));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s.compute));
    setenv("SPECACHE_EMU_FAIL", "cuMemGetInfo:1:999", 1);
    specache_emu_reset();
    size_t free, total;
    GIVES(CUDA_ERROR_UNKNOWN, cuMemGetInfo(&free, &total));
    s.upload(s.compute);
    s.launch(s.compute, s.a, s.b);
    s.download(s.compute);
    OK(cuStreamSynchronize(s.compute));
    CHECK(s.arrived() && errors() == 0, "%s", report().c_str());
}

static void copies_beyond_the_end() {
    Setup s;
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoDAsync(s.a + 4, s.pinned.data(), 4 * kN, s.copies));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoHAsync(s.out.data(), s.a + 4, 4 * kN, s.copies));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoDAsync(0, s.pinned.data(), 4, s.copies));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemsetD32Async(s.a + 2, 0, 1, s.copies));
}

static void pageable() {
    Setup s;
    std::vector<uint32_t> plain(kN, 9);
    OK(cuMemcpyHtoDAsync(s.a, plain.data(), 4 * kN, s.copies));
    reported("note: copy HtoD of 4000 bytes from or to pageable memory");
    CHECK(errors() == 0, "a note is no error");
    OK(cuMemcpyDtoH(s.out.data(), s.a, 4 * kN));
    CHECK(s.out == plain, "pageable");
}

static void read_only_host_memory() {
    Setup s;
    static uint32_t words[kN];
    CUdeviceptr to;
    OK(cuMemHostRegister(words, sizeof words, CU_MEMHOSTREGISTER_READ_ONLY | CU_MEMHOSTREGISTER_DEVICEMAP));
    OK(cuMemHostGetDevicePointer(&to, words, 0));
    s.launch(s.compute, s.a, to);
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s.compute));
    reported("read-only");
}

static void little_memory() {
    Setup s;
    CUdeviceptr at;
    GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc(&at, 3000));
    OK(cuMemFree(s.a));
    OK(cuMemAlloc(&at, 3000));
}

// ---- calls ----------------------------------------------------------------------------------------------------------

static void bad_launches() {
    Setup s;
    const Words p{s.a, s.b, kN};
    CUfunction f = s.function("copy_words");
    GIVES(CUDA_ERROR_INVALID_VALUE, s.try_launch(s.compute, p, "copy_words", 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, s.try_launch(s.compute, p, "copy_words", 1, 0));
    GIVES(CUDA_ERROR_INVALID_VALUE, s.try_launch(s.compute, p, "copy_words", 1, 1056));
    GIVES(CUDA_ERROR_INVALID_VALUE, s.try_launch(s.compute, p, "copy_words", 1, 32, 50 << 10));
    OK(cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 50 << 10));
    OK(s.try_launch(s.compute, p, "copy_words", 1, 32, 50 << 10));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 228 << 10));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, s.compute, nullptr, nullptr));
    GIVES(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&f, s.module, "no_such_kernel"));
    OK(cuStreamSynchronize(s.compute));
    OK(cuStreamDestroy(s.copies));
    GIVES(CUDA_ERROR_INVALID_HANDLE, s.try_launch(s.copies, p));
}

static void missing_context() {
    CUdeviceptr at;
    int count;
    GIVES(CUDA_ERROR_NOT_INITIALIZED, cuDeviceGetCount(&count));
    OK(cuInit(0));
    OK(cuDeviceGetCount(&count));
    GIVES(CUDA_ERROR_INVALID_CONTEXT, cuMemAlloc(&at, 16));
    CUcontext context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    OK(cuMemAlloc(&at, 16));
    std::thread([&] { GIVES(CUDA_ERROR_INVALID_CONTEXT, cuMemFree(at)); }).join();
    OK(cuDevicePrimaryCtxRelease(0));
    reported("note: 1 allocations are left");
}

static void never_recorded() {
    Setup s;
    OK(cuStreamWaitEvent(s.compute, s.event, 0));
    reported("note: stream 1 waits for event 1, which was never recorded");
    OK(cuStreamSynchronize(s.compute));
}

static void asked_fault_of_a_call() {
    CUdeviceptr at;
    Setup s;
    GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc(&at, 16));   // the third
    OK(cuMemAlloc(&at, 16));
    reported("cuMemAlloc_v2 failed with 2, as asked");
}

static void asked_fault_of_a_kernel() {
    Setup s;
    s.launch(s.compute, s.a, s.b);
    s.launch(s.compute, s.a, s.b);
    GIVES(CUDA_ERROR_ECC_UNCORRECTABLE, cuStreamSynchronize(s.compute));
}

static void the_log() {
    const char* file = std::getenv("SPECACHE_EMU_LOG");
    {
        Setup s;
        s.upload(s.copies);
        s.order(s.copies, s.compute);
        OK(s.try_launch(s.compute, Words{s.a, s.b, 3}));
        OK(cuCtxSynchronize());
    }
    std::ifstream in(file);
    std::stringstream text;
    text << in.rdbuf();
    size_t at = 0;
    for (const char* part :
         {"\"call\":\"alloc\"", "\"call\":\"host_register\"", "\"kind\":\"HtoD\"", "\"call\":\"record\"",
          "\"call\":\"wait\"", "\"kernel\":\"copy_words\",\"grid\":[8,1,1],\"block\":[128,1,1]", "03000000",
          "\"call\":\"synchronize\""}) {
        at = text.str().find(part, at);
        CHECK(at != std::string::npos, "no %s, or out of order: %s", part, text.str().c_str());
    }
    std::remove(file);
}

// ---- NVRTC and cuBLASLt ---------------------------------------------------------------------------------------------

extern "C" {
int nvrtcCreateProgram(void**, const char*, const char*, int, const char* const*, const char* const*);
int nvrtcCompileProgram(void*, int, const char* const*);
int nvrtcGetProgramLogSize(void*, size_t*);
int nvrtcGetProgramLog(void*, char*);
int nvrtcGetCUBINSize(void*, size_t*);
int nvrtcGetCUBIN(void*, char*);
int nvrtcDestroyProgram(void**);
int cublasLtCreate(void**);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatmulPreferenceCreate(void**);
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int*);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, CUstream);
}

static std::string compiled(const char* source, int n_headers, int expected, const char* arch) {
    void* program;
    const char* const headers[] = {"#include \"abi.h\"\n", ""};
    const char* const names[] = {"ptx.cuh", "abi.h"};
    GIVES(0, nvrtcCreateProgram(&program, source, "sample.cu", n_headers, headers, names));
    const std::string option = std::string("--gpu-architecture=") + arch;
    const char* const options[] = {"--std=c++17", option.c_str()};
    GIVES(expected, nvrtcCompileProgram(program, 2, options));
    size_t bytes = 0;
    GIVES(0, expected == 0 ? nvrtcGetCUBINSize(program, &bytes) : nvrtcGetProgramLogSize(program, &bytes));
    std::vector<char> text(bytes);
    GIVES(0, expected == 0 ? nvrtcGetCUBIN(program, text.data()) : nvrtcGetProgramLog(program, text.data()));
    GIVES(0, nvrtcDestroyProgram(&program));
    return text.data();
}

static void nvrtc() {
    Setup s;
    CUmodule module;
    CUfunction f;
    const char* source = "#include <cuda_fp16.h>\n#include \"ptx.cuh\"\n";
    OK(cuModuleLoadData(&module, compiled(source, 2, 0, "sm_90a").c_str()));
    OK(cuModuleGetFunction(&f, module, "specache_argmax_merge"));
    GIVES(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&f, module, "specache_attn_combine"));   // of another source
    GIVES(CUDA_ERROR_NO_BINARY_FOR_GPU, cuModuleLoadData(&module, compiled(source, 2, 0, "sm_86").c_str()));
    GIVES(CUDA_ERROR_INVALID_IMAGE, cuModuleLoadData(&module, "something else"));
    const std::string log = compiled(source, 1, 6, "sm_90a");
    CHECK(log.find("ptx.cuh: error: cannot open source file \"abi.h\"") != std::string::npos, "%s", log.c_str());
}

// y [rows][n] = x [rows][k] W^T, W [n][k]: as rows-major matrices are columns-major ones transposed.
static void matmul() {
    Setup s;
    constexpr uint32_t rows = 3, n = 5, k = 7;
    void *lt, *desc, *a, *b, *c, *preference;
    const int32_t transposed = 1;
    const float alpha = 2, beta = 1;
    for (uint32_t i = 0; i < n * k; i++) s.pinned[i] = specache::bit_cast<uint32_t>(0.25f * float(i % 11) - 1);
    s.upload(s.compute);
    OK(cuMemsetD32Async(s.b, 0, kN, s.compute));
    GIVES(0, cublasLtCreate(&lt));
    GIVES(0, cublasLtMatmulDescCreate(&desc, 68, 0));
    GIVES(0, cublasLtMatmulDescSetAttribute(desc, 3, &transposed, sizeof transposed));
    GIVES(0, cublasLtMatrixLayoutCreate(&a, 0, k, n, k));
    GIVES(0, cublasLtMatrixLayoutCreate(&b, 0, k, rows, k));
    GIVES(0, cublasLtMatrixLayoutCreate(&c, 0, n, rows, n));
    GIVES(0, cublasLtMatmulPreferenceCreate(&preference));
    uint64_t heuristic[16];
    int found = 0;
    GIVES(0, cublasLtMatmulAlgoGetHeuristic(lt, desc, a, b, c, c, preference, 1, heuristic, &found));
    CHECK(found == 1, "%d", found);
    GIVES(15,
          cublasLtMatmulAlgoGetHeuristic(lt, desc, b, a, c, c, preference, 1, heuristic, &found));   // no such shape
    const auto at = [](CUdeviceptr p) { return reinterpret_cast<void*>(p); };
    GIVES(0, cublasLtMatmul(lt, desc, &alpha, at(s.a), a, at(s.a), b, &beta, at(s.b), c, at(s.b), c, heuristic, nullptr,
                            0, s.compute));
    s.download(s.compute);
    OK(cuStreamSynchronize(s.compute));
    const auto value = [&](uint32_t i) { return 0.25f * float(i % 11) - 1; };
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < n; i++) {
            float want = 0;
            for (uint32_t j = 0; j < k; j++) want += 2 * value(i * k + j) * value(r * k + j);
            const float got = specache::bit_cast<float>(s.out[r * n + i]);
            CHECK(std::fabs(got - want) < 1e-5f, "%g, not %g: row %u, %u", double(got), double(want), r, i);
        }
}

// ---- the cases ------------------------------------------------------------------------------------------------------

using Environment = std::vector<std::pair<const char*, const char*>>;

static void run(const char* name, void (*test)(), int seeds = 1, const Environment& environment = {}) {
    for (int seed = 0; seed < seeds; seed++) {
        const pid_t child = fork();
        if (child == 0) {
            setenv("SPECACHE_EMU_SEED", std::to_string(seed).c_str(), 1);
            setenv("SPECACHE_EMU_SILENCE_MS", "200", 1);   // on a busy machine too
            for (const auto& e : environment) setenv(e.first, e.second, 1);
            test();
            std::fflush(stdout);
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s fails with seed %d (status %d)", name, seed, status);
    }
}

#define RUN(test, ...) run(#test, test, ##__VA_ARGS__)

int main() {
    constexpr int kSeeds = 6;
    RUN(streams_and_events, kSeeds);
    RUN(queries_and_times);
    RUN(host_functions, kSeeds);
    RUN(values, kSeeds);
    RUN(mailbox, kSeeds, {{"SPECACHE_EMU_SILENCE_MS", "1"}});
    RUN(mapped_memory, kSeeds);
    RUN(graphs, kSeeds);
    RUN(unjoined_capture);
    RUN(broken_capture);
    RUN(missing_wait, kSeeds);
    RUN(overwritten_too_early, kSeeds);
    RUN(race_in_host_memory, kSeeds);
    RUN(neighbours_do_not_race, kSeeds);
    RUN(programmatic_launch_without_wait, kSeeds);
    RUN(source_changes_before_the_copy);
    RUN(unordered_data_differ, kSeeds);
    RUN(freed_too_early, kSeeds);
    RUN(freed_in_time, kSeeds);
    RUN(unregistered_too_early, kSeeds);
    RUN(beyond_the_end, kSeeds);
    RUN(reset);
    RUN(copies_beyond_the_end);
    RUN(pageable, kSeeds);
    RUN(read_only_host_memory);
    RUN(little_memory, 1, {{"SPECACHE_EMU_VRAM", "9000"}});
    RUN(bad_launches);
    RUN(missing_context);
    RUN(never_recorded);
    RUN(asked_fault_of_a_call, 1, {{"SPECACHE_EMU_FAIL", "cuMemAlloc:3:2"}});
    RUN(asked_fault_of_a_kernel, 1, {{"SPECACHE_EMU_FAIL", "copy_words:2:214"}});
    RUN(the_log, 1, {{"SPECACHE_EMU_LOG", "target/emulated/driver_test.log"}});
    RUN(nvrtc);
    RUN(matmul, kSeeds);
    std::printf("driver_test: streams, events, graphs and memory behave, and every promised fault is seen\n");
}
