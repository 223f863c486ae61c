// One way to run a kernel test on two devices: the emulation (SPECACHE_EMU), or a GPU when nvcc builds the test.
//
// A Buffer has a host side, filled with a pattern, and an address for the kernel. upload() before the launch,
// download() after it; the emulation's two sides are one. hide_front(): the emulation refuses the kernel's accesses to
// the first bytes from then on; a GPU cannot.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"

namespace device {

// An address for what must not be looked at: in no buffer, and in nobody's memory on a GPU.
constexpr uint64_t kNowhere = 4096;

}   // namespace device

#ifdef SPECACHE_EMU
#include "../emu/cuda.h"
#include "../emu/memory.h"

namespace device {

class Buffer : public emu::Buffer {
public:
    using emu::Buffer::Buffer;
    ~Buffer() { emu::regions().erase(uintptr_t(address() + hidden_)); }
    void upload() {}
    void download() {}
    void hide_front(size_t bytes) {
        auto region = emu::regions().extract(uintptr_t(address() + hidden_));
        region.key() += bytes;
        region.mapped().bytes -= bytes;
        hidden_ += bytes;
        emu::regions().insert(std::move(region));
    }

private:
    size_t hidden_ = 0;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), uint32_t grid, uint32_t block, uint32_t shared_bytes, uint64_t seed,
            Arguments... arguments) {
    emu::launch(kernel, dim3(grid), dim3(block), shared_bytes, seed, arguments...);
}

// The shared memory that a test may plan with, where it would like `wanted` bytes.
inline uint32_t shared_limit(uint32_t wanted) { return wanted; }

constexpr const char* kName = "emulation";

}   // namespace device

#else
#include <cuda_runtime.h>

namespace device {

inline void check_cuda(cudaError_t status, const char* what) {
    CHECK(status == cudaSuccess, "%s: %s", what, cudaGetErrorString(status));
}

class Buffer {
public:
    enum Access { kRead, kWrite };
    static constexpr uint8_t kPoison = 0xA5;

    Buffer(const std::string& name, size_t bytes, Access) : name_(name), host_(bytes + 2 * kGuard, kPoison) {
        check_cuda(cudaMalloc(&device_, host_.size()), "cudaMalloc");
        upload();   // the guards, and the pattern where a kernel writes
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        for (size_t i = 0; i < kGuard; i++)
            CHECK(host_[i] == kPoison && host_[host_.size() - 1 - i] == kPoison, "something wrote outside of %s",
                  name_.c_str());
        cudaFree(device_);
    }
    void upload() { check_cuda(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice), "upload"); }
    void download() { check_cuda(cudaMemcpy(host_.data(), device_, host_.size(), cudaMemcpyDeviceToHost), "download"); }
    void hide_front(size_t) {}
    uint8_t* data() { return host_.data() + kGuard; }
    const uint8_t* data() const { return host_.data() + kGuard; }
    size_t bytes() const { return host_.size() - 2 * kGuard; }
    uint64_t address() const { return reinterpret_cast<uint64_t>(device_) + kGuard; }

private:
    static constexpr size_t kGuard = 256;   // keeps the alignment of cudaMalloc
    std::string name_;
    std::vector<uint8_t> host_;
    void* device_ = nullptr;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), uint32_t grid, uint32_t block, uint32_t shared_bytes, uint64_t,
            Arguments... arguments) {
    if (shared_bytes > 48 << 10)
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
                   "shared memory");
    // clang-format off
    kernel<<<grid, block, shared_bytes>>>(arguments...);
    // clang-format on
    check_cuda(cudaGetLastError(), "launch");
    check_cuda(cudaDeviceSynchronize(), "kernel");
}

inline uint32_t shared_limit(uint32_t wanted) {
    int most = 0;
    check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "attribute");
    return wanted < uint32_t(most) ? wanted : uint32_t(most);
}

constexpr const char* kName = "GPU";

}   // namespace device
#endif
