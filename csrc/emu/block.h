// One thread block: a fiber per thread, barriers, warp collectives, poisoned shared memory.
//
// A thread runs until it waits. Warps run to the next barrier one after the other and lanes within a warp in any order,
// both drawn from the seed, so a value that is read without the barrier that its writer needs is missing under some
// seed. A barrier that not every thread reaches, or a warp collective that not every lane reaches, is an error and not
// a hang.
#pragma once

#include <vector_types.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fail.h"
#include "fiber.h"

namespace emu {

constexpr int kLanes = 32;
constexpr int kOperands = 8;   // 32-bit operands that one lane may give to a collective

// What a lane gave to the collective of its warp. Two generations: a lane may already be in the next collective while
// a slower one still reads this one; it cannot be two ahead.
struct Warp {
    uint32_t operands[2][kLanes][kOperands];
    float sums[2][kLanes][4];   // what a matrix product of the operands gives each lane
    const char* operation = nullptr;
    unsigned generation = 0;
    int arrived = 0;
};

// A copy to shared memory under way (from null: zeros), or the end of a batch of them (to null).
constexpr int kCopyPoison = 0xC5;

struct AsyncCopy {
    void* to = nullptr;
    const void* from = nullptr;

    void arrive() const {
        const uint8_t* at = static_cast<const uint8_t*>(to);
        if (std::count(at, at + 16, kCopyPoison) != 16) fail("a write to where an asynchronous copy is under way");
        if (from != nullptr) std::memcpy(to, from, 16);
        else std::memset(to, 0, 16);
    }
};

struct Thread {
    Fiber fiber;
    uint3 index{};
    std::deque<AsyncCopy> copies;
    bool after_previous = true;        // whether the kernel before this one is known to be complete
    const char* waits_for = nullptr;   // null: it can run
};

class Block {
public:
    static Block& current() { return *current_; }

    // Runs one block of `body`. `shared_bytes` of dynamic shared memory.
    // `early`: the kernel before it may still run until a thread waits for it.
    void run(dim3 grid, dim3 block, uint3 block_index, size_t shared_bytes, uint64_t seed, bool early,
             const std::function<void()>& body) {
        current_ = this;
        grid_dim = grid;
        block_dim = block;
        this->block_index = block_index;
        body_ = &body;
        random_.seed(seed);
        poison_ = seed % 2 == 0 ? 0xC5 : 0x45;   // as a float, large and negative or positive: it wins a min or a max
        dynamic_shared.assign(shared_bytes, char(poison_));
        static_shared_.clear();
        start_threads(int(block.x * block.y * block.z), early);
        while (run_to_barrier()) {
        }
        for (const Thread& t : threads_)
            for (const AsyncCopy& copy : t.copies)
                if (copy.to != nullptr) fail("a thread ended with asynchronous copies under way");
        current_ = nullptr;
    }

    Thread& thread() { return threads_[running_]; }
    int lane() const { return running_ % kLanes; }

    // Waits for all threads of the block.
    void barrier() {
        thread().waits_for = "__syncthreads";
        Fiber::yield();
    }

    // Gives this lane's operands to the warp, waits for all lanes; the answer holds all lanes' operands.
    using Operands = uint32_t[kLanes][kOperands];
    const Operands& exchange(const char* operation, const uint32_t* operands, int count) {
        return meet(operation, operands, count, nullptr).operands[answered_];
    }

    // As exchange(), but the last lane to arrive multiplies for all: the answer is this lane's four sums.
    using Multiply = void (*)(const Operands&, float (&sums)[kLanes][4]);
    const float* product(const char* operation, const uint32_t* operands, int count, Multiply multiply) {
        return meet(operation, operands, count, multiply).sums[answered_][lane()];
    }

    // The shared struct named by the type: one per block and type, poisoned, from the heap so that a sanitizer sees
    // its ends.
    template <class T> T& shared() {
        static const char tag = 0;
        for (auto& s : static_shared_)
            if (s.tag == &tag) return *reinterpret_cast<T*>(s.bytes);
        static_shared_.push_back(Shared{&tag, sizeof(T), alignof(T), poison_});
        return *reinterpret_cast<T*>(static_shared_.back().bytes);
    }

    std::vector<char> dynamic_shared;
    dim3 grid_dim, block_dim;
    uint3 block_index{};

private:
    struct Shared {
        Shared(const void* tag, size_t size, size_t align, int poison) : tag(tag), align(align) {
            bytes = ::operator new(size, std::align_val_t(align));
            std::memset(bytes, poison, size);
        }
        Shared(Shared&& other) noexcept : tag(other.tag), align(other.align), bytes(other.bytes) {
            other.bytes = nullptr;
        }
        Shared(const Shared&) = delete;
        ~Shared() { ::operator delete(bytes, std::align_val_t(align)); }
        const void* tag;
        size_t align;
        void* bytes;
    };

    Warp& meet(const char* operation, const uint32_t* operands, int count, Multiply multiply) {
        Warp& warp = warps_[running_ / kLanes];
        const unsigned generation = warp.generation % 2;
        std::memcpy(warp.operands[generation][lane()], operands, count * sizeof(uint32_t));
        if (warp.arrived > 0 && warp.operation != operation && std::strcmp(warp.operation, operation) != 0)
            fail("lanes of one warp meet in %s and %s (thread %d)", warp.operation, operation, running_);
        warp.operation = operation;
        if (++warp.arrived == kLanes) {
            if (multiply) multiply(warp.operands[generation], warp.sums[generation]);
            release(warp, running_ / kLanes);
        } else {
            thread().waits_for = operation;
            Fiber::yield();
        }
        answered_ = generation;
        return warp;
    }

    void start_threads(int count, bool early) {
        if (count % kLanes != 0) fail("a block of %d threads is not whole warps", count);
        threads_.resize(count);
        warps_.assign(count / kLanes, Warp{});
        order_.resize(count / kLanes);
        std::iota(order_.begin(), order_.end(), 0);
        for (int i = 0; i < count; i++) {
            const unsigned u = unsigned(i);
            Thread& t = threads_[i];
            t.index = uint3{u % block_dim.x, u / block_dim.x % block_dim.y, u / (block_dim.x * block_dim.y)};
            t.waits_for = nullptr;
            t.copies.clear();
            t.after_previous = !early;
            t.fiber.start(run_thread, this);
        }
    }

    // A failure must not leave the fiber's stack: the owner throws it again.
    static void run_thread(void* block) {
        Block& self = *static_cast<Block*>(block);
        try {
            (*self.body_)();
        } catch (const Failure& failure) {
            self.failure_ = failure.text;
        }
    }

    // Brings every warp to the next barrier, or to its end; false when all have ended. One warp after the other, in an
    // order of its own each time: with a barrier missing, a warp is as far ahead of another as it can ever be.
    bool run_to_barrier() {
        std::shuffle(order_.begin(), order_.end(), random_);
        for (int warp : order_)
            while (run_lanes(warp)) {
            }
        return open_barrier();
    }

    // Lets every lane that can run do so once, in any order; false when none can.
    bool run_lanes(int warp) {
        const auto& lanes = lane_orders()[random_() % kLaneOrders];
        bool progress = false;
        for (int lane : lanes) {
            const int i = warp * kLanes + lane;
            if (threads_[i].fiber.finished() || threads_[i].waits_for) continue;
            running_ = i;
            threads_[i].fiber.resume();
            progress = true;
            if (!failure_.empty()) throw Failure{std::exchange(failure_, {})};
        }
        return progress;
    }

    // Shuffling anew each time would take longer than what the lanes do.
    static constexpr int kLaneOrders = 256;
    using LaneOrders = std::array<std::array<uint8_t, kLanes>, kLaneOrders>;
    static const LaneOrders& lane_orders() {
        static const LaneOrders orders = [] {
            LaneOrders all;
            std::mt19937_64 random(1);
            for (auto& order : all) {
                std::iota(order.begin(), order.end(), uint8_t(0));
                std::shuffle(order.begin(), order.end(), random);
            }
            return all;
        }();
        return orders;
    }

    // Nobody can run: either all stand at the barrier, or all have ended, or the kernel would hang or is undefined.
    bool open_barrier() {
        size_t waiting = 0, ended = 0;
        for (Thread& t : threads_) {
            waiting += t.waits_for && std::strcmp(t.waits_for, "__syncthreads") == 0;
            ended += t.fiber.finished();
        }
        if (ended == threads_.size()) return false;
        if (waiting != threads_.size()) divergence(waiting, ended);
        for (Thread& t : threads_) t.waits_for = nullptr;
        return true;
    }

    [[noreturn]] void divergence(size_t waiting, size_t ended) {
        const char* other = "nothing else";
        for (Thread& t : threads_)
            if (t.waits_for && std::strcmp(t.waits_for, "__syncthreads") != 0) other = t.waits_for;
        fail(
            "divergence in block (%u, %u, %u): of %zu threads %zu wait at __syncthreads, %zu have ended, the others in "
            "%s",
            block_index.x, block_index.y, block_index.z, threads_.size(), waiting, ended, other);
    }

    void release(Warp& warp, int index) {
        warp.arrived = 0;
        warp.generation++;
        for (int l = 0; l < kLanes; l++) threads_[index * kLanes + l].waits_for = nullptr;
    }

    static inline Block* current_ = nullptr;
    const std::function<void()>* body_ = nullptr;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<Shared> static_shared_;
    std::vector<int> order_;   // of the warps
    std::mt19937_64 random_;
    std::string failure_;   // of the thread that just ran
    int running_ = 0;
    unsigned answered_ = 0;   // the generation that meet() answers with
    int poison_ = 0;
};

template <class T> T& block_shared() { return Block::current().shared<T>(); }

}   // namespace emu
