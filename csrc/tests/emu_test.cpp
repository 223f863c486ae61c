// The emulation itself: what it computes, and that it sees each fault it promises to see.
#include <sys/wait.h>
#include <unistd.h>

#include "../ptx.cuh"
#include "check.h"

static emu::Buffer* memory;

static void reverse_through_shared(uint32_t* out) {
    struct Shared {
        uint32_t x[64];
    };
    SPECACHE_SHARED(Shared, shared);
    shared.x[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = shared.x[63 - threadIdx.x];
}

static void warp_functions(uint32_t* out) {
    const uint32_t lane = threadIdx.x % 32;
    out[threadIdx.x] =
        __shfl_xor_sync(~0u, lane, 5) + 100 * __shfl_down_sync(~0u, lane, 1) + 10000 * __shfl_up_sync(~0u, lane, 2);
    const bool odd = lane % 2;
    if (__ballot_sync(~0u, odd) != 0xAAAAAAAAu || __all_sync(~0u, odd) || !__any_sync(~0u, odd)) out[threadIdx.x] = 0;
}

static void transpose_twice(uint32_t* out) {
    const uint32_t value = threadIdx.x * 0x00010003u + 7, once = specache::transpose_8x8(value);
    out[threadIdx.x] = (once != value) && specache::transpose_8x8(once) == value;
}

static void some_miss_the_barrier(int) {
    if (threadIdx.x != 3) __syncthreads();
}

static void half_a_warp_shuffles(int) {
    if (threadIdx.x < 16) __shfl_xor_sync(~0u, 1, 1);
}

static void lanes_disagree(int) {
    if (threadIdx.x % 2) __shfl_xor_sync(~0u, 1, 1);
    else __ballot_sync(~0u, true);
}

static void partial_mask(int) { __shfl_xor_sync(0xFFFFu, 1, 1); }
static void read_beyond(int) { specache::load_streaming(memory->data() + 112 + 16); }
static void read_misaligned(int) { specache::load_streaming(memory->data() + 8); }
static void write_read_only(int) { specache::store_16(memory->data(), uint4{}); }
static void write_around(int) { memory->data()[memory->bytes()] = 0; }

[[maybe_unused]] static void write_beyond_shared(int) {
    struct Shared {
        uint32_t x[64];
    };
    SPECACHE_SHARED(Shared, shared);
    uint32_t* x = shared.x;   // out of sight of the bounds checker
    x[threadIdx.x + 32] = 0;
}

static void without_barrier(uint32_t* out) {
    struct Shared {
        uint32_t x[64];
    };
    SPECACHE_SHARED(Shared, shared);
    shared.x[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared.x[63 - threadIdx.x];
}

struct CopyShared {
    alignas(16) uint32_t x[64][4];
};

// Copies of 16 bytes and of zeros, seen before and after the wait.
static void copy_two_batches(uint64_t from, uint32_t* out) {
    SPECACHE_SHARED(CopyShared, shared);
    const uint32_t t = threadIdx.x;
    specache::copy_async_16(shared.x[t], reinterpret_cast<const void*>(from), 16);
    specache::copy_async_commit();
    const uint32_t early = shared.x[t][1];
    specache::copy_async_commit();   // an empty batch counts
    specache::copy_async_wait<1>();
    const uint32_t arrived = shared.x[t][1];
    specache::copy_async_16(shared.x[t], nullptr, 0);
    specache::copy_async_commit();
    specache::copy_async_wait<0>();
    out[t] = (early == 0xC5C5C5C5u) + 2 * (arrived == 0xA5A5A5A5u) + 4 * (shared.x[t][1] == 0);
}

static void copy_without_wait(int) {
    SPECACHE_SHARED(CopyShared, shared);
    specache::copy_async_16(shared.x[threadIdx.x], memory->data(), 16);
    specache::copy_async_commit();
}

static void write_under_copy(int) {
    SPECACHE_SHARED(CopyShared, shared);
    specache::copy_async_16(shared.x[threadIdx.x], memory->data(), 16);
    specache::copy_async_commit();
    shared.x[threadIdx.x][2] = 1;
    specache::copy_async_wait<0>();
}

// Runs `kernel` in a child process: it must fail and say `part`.
static void expect_failure(const char* name, const char* part, void (*kernel)(int)) {
    int ends[2];
    CHECK(pipe(ends) == 0, "pipe");
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        {
            emu::Buffer small("small", 128, emu::Buffer::kRead);
            memory = &small;
            emu::launch(kernel, dim3(1), dim3(64), 0, 1, 0);
        }
        _exit(0);
    }
    close(ends[1]);
    std::string text;
    char part_read[512];
    for (ssize_t n; (n = read(ends[0], part_read, sizeof part_read)) > 0;) text.append(part_read, size_t(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) != 0, "%s was not seen: %s", name, text.c_str());
    CHECK(text.find(part) != std::string::npos, "%s: '%s' does not say '%s'", name, text.c_str(), part);
}

int main() {
    uint32_t out[64];
    int stale = 0;
    for (uint64_t seed = 0; seed < 4; seed++) {
        emu::launch(reverse_through_shared, dim3(1), dim3(64), 0, seed, &out[0]);
        for (uint32_t i = 0; i < 64; i++) CHECK(out[i] == 63 - i, "reverse");
        emu::launch(warp_functions, dim3(1), dim3(64), 0, seed, &out[0]);
        for (uint32_t i = 0; i < 64; i++) {
            const uint32_t l = i % 32, up = l < 2 ? l : l - 2, down = l == 31 ? l : l + 1;
            CHECK(out[i] == (l ^ 5) + 100 * down + 10000 * up, "warp functions: lane %u", l);
        }
        emu::launch(transpose_twice, dim3(1), dim3(32), 0, seed, &out[0]);
        for (uint32_t i = 0; i < 32; i++) CHECK(out[i] == 1, "transpose: lane %u", i);
        emu::Buffer source("source", 16, emu::Buffer::kRead);
        emu::launch(copy_two_batches, dim3(1), dim3(64), 0, seed, source.address(), &out[0]);
        for (uint32_t i = 0; i < 64; i++) CHECK(out[i] == 7, "copies: %u", out[i]);
        emu::launch(without_barrier, dim3(1), dim3(64), 0, seed, &out[0]);
        for (uint32_t i = 0; i < 64; i++) stale += out[i] != 63 - i;
    }
    CHECK(stale > 0, "a missing barrier went unseen");
    expect_failure("a barrier that one thread misses", "divergence", some_miss_the_barrier);
    expect_failure("a shuffle by half a warp", "__shfl_xor_sync", half_a_warp_shuffles);
    expect_failure("lanes in different collectives", "meet in", lanes_disagree);
    expect_failure("a partial mask", "mask", partial_mask);
    expect_failure("a read beyond a buffer", "small", read_beyond);
    expect_failure("a misaligned read", "misaligned", read_misaligned);
    expect_failure("a write to an input", "read-only", write_read_only);
    expect_failure("a copy that nobody waits for", "ended with asynchronous copies", copy_without_wait);
    expect_failure("a write to where a copy will arrive", "under way", write_under_copy);
    expect_failure("a plain write beside a buffer", "outside of small", write_around);
#ifdef __SANITIZE_ADDRESS__
    expect_failure("a write beyond shared memory", "heap-buffer-overflow", write_beyond_shared);
#endif
    std::printf("emu_test: results, and every promised fault is seen\n");
}
