// Errors as exceptions, results as JSON lines, time by device events, device memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

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
