// Memory of the emulated GPU: allocations and registered host memory, and who has touched which of their bytes.
//
// Every byte that a kernel, a copy or a fill touches goes through access(). Per 16 bytes the last writer and two readers
// are kept; a conflicting access of an operation that is not ordered after them is a race. Order is what streams, events
// and the host's waits make (Clock), not the order in which the emulation happens to run things.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace emu::driver {

// By stream: how many of its operations are known to be complete.
using Clock = std::vector<uint32_t>;

inline void join(Clock& into, const Clock& other) {
    if (into.size() < other.size()) into.resize(other.size());
    for (size_t i = 0; i < other.size(); i++) into[i] = into[i] < other[i] ? other[i] : into[i];
}

// The operation that is running, as far as accesses must know it.
struct Actor {
    uint32_t id = 0;   // in Memory's list of operations; 0: nobody
    const Clock* clock = nullptr;
    uint32_t stream = 0;   // its index
    // A kernel that may start before its predecessors end: until a thread waits, operations of the stream after this
    // count are not known to be complete.
    uint32_t early_count = 0;
    bool programmatic = false;
};

class Memory {
public:
    enum Kind { kDevice, kHost };
    static constexpr size_t kGranule = 16;

    // Poisoned, page-aligned, with unmapped pages around it. Addresses are never given out twice.
    uintptr_t allocate(size_t bytes);
    // False if no allocation starts there. Reports operations that may still use it.
    bool release(uintptr_t start, const Clock& host);
    // False if a part of it is registered.
    bool enroll(uintptr_t start, size_t bytes, bool writable);
    bool withdraw(uintptr_t start, const Clock& host);

    // The kind of memory that [at, at + bytes) lies in as a whole; null: none, or only in part.
    const Kind* kind(uintptr_t at, size_t bytes) const;
    size_t allocated() const { return allocated_; }
    size_t allocations() const;

    // A new operation of a stream: its count in it. The answer is the operation's id.
    uint32_t begin(const std::string& name, uint32_t stream, uint32_t count);
    void set_actor(const Actor& actor) {
        actor_ = actor;
        wrote_host_ = false;
    }
    // Whether the actor has written to memory of the host.
    bool wrote_host() const { return wrote_host_; }

    // Fails unless the bytes lie in one region; reports a race. Memory of the host need not be registered for copies.
    void access(uintptr_t at, size_t bytes, bool write, bool unregistered_is_fine = false);

private:
    struct Cell {
        uint32_t writer, reader[2];
        uint16_t written, read[2];   // which bytes
    };
    static constexpr size_t kCells = 4096;     // of a page of them
    static constexpr size_t kNear = 1 << 20;   // beyond an allocation, but still said to be beyond it

    struct Region {
        uintptr_t start;
        size_t bytes;
        Kind kind;
        bool writable, alive;
        uint32_t number;
        std::vector<std::unique_ptr<Cell[]>> pages;   // made at the first access

        Cell& cell(size_t index);
    };

    struct Operation {
        std::string name;
        uint32_t stream, count;
    };

    Region* find(uintptr_t at);
    [[noreturn]] void outside(uintptr_t at, size_t bytes, const char* verb) const;
    Region& insert(uintptr_t start, size_t bytes, Kind kind, bool writable);
    void in_use(Region& region, const Clock& host, const char* verb);
    bool is_ordered(uint32_t earlier, bool early) const;
    void touch(Region& region, size_t index, uint16_t bytes, bool write, bool early);
    void race(const Region& region, size_t index, uint32_t earlier, bool wrote, bool write);

    std::map<uintptr_t, Region> regions_;
    std::vector<Operation> operations_{{"", 0, 0}};
    std::set<std::pair<uint32_t, uint32_t>> reported_;
    Actor actor_;
    bool wrote_host_ = false;
    size_t allocated_ = 0;
    uint32_t numbers_ = 0;
    static constexpr size_t kCached = 64;
    Region* cached_[kCached] = {};   // by page of the address
};

}   // namespace emu::driver
