// What the probes share.
#pragma once

#include "kernels.cuh"
#include "measure.cuh"

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
