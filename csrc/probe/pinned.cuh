// Pinned host memory: what the link's probes read from.
#pragma once

#include <sys/mman.h>

#include <cstring>
#include <fstream>
#include <thread>

#include "kernels.cuh"
#include "measure.cuh"

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
