// Probes of the link: copies of each size, and rows gathered by SMs, by bulk copies, and by the CPU's threads.
#pragma once

#include <atomic>
#include <random>

#include "bench.cuh"
#include "pinned.cuh"

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
