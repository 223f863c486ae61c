// Device buffers: registered, filled with a pattern, guarded; every access of a kernel is checked against them.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "fail.h"

namespace emu {

#ifdef SPECACHE_EMU_DRIVER
// The emulated driver knows all memory, and who touches it (driver/memory.cpp).
void check_access(const void* address, size_t bytes, bool write);
#else

struct Region {
    size_t bytes;
    bool writable;
    std::string name;
};

// The registered buffers by address.
inline std::map<uintptr_t, Region>& regions() {
    static std::map<uintptr_t, Region> all;
    return all;
}

// Fails unless [address, address + bytes) lies in one registered buffer and is aligned to its own size.
inline void check_access(const void* address, size_t bytes, bool write) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes != 0) fail("%s of %zu bytes at a misaligned address", write ? "write" : "read", bytes);
    auto next = regions().upper_bound(at);
    if (next == regions().begin()) fail("%s of %zu bytes outside every buffer", write ? "write" : "read", bytes);
    const auto& [start, region] = *std::prev(next);
    if (at + bytes > start + region.bytes)
        fail("%s of %zu bytes at offset %zu of %s, which has %zu", write ? "write" : "read", bytes, size_t(at - start),
             region.name.c_str(), region.bytes);
    if (write && !region.writable) fail("write to %s, which is read-only", region.name.c_str());
}

// Memory of a kernel: aligned to 128 bytes, filled with a pattern, with a guard on both sides that the destructor
// checks.
class Buffer {
public:
    enum Access { kRead, kWrite };
    static constexpr uint8_t kPoison = 0xA5;

    Buffer(const std::string& name, size_t bytes, Access access) : name_(name), bytes_(bytes) {
        storage_.assign(bytes + 2 * kGuard + 128, kPoison);
        const uintptr_t start = reinterpret_cast<uintptr_t>(storage_.data()) + kGuard;
        data_ = storage_.data() + kGuard + (128 - start % 128) % 128;
        regions()[address()] = Region{bytes, access == kWrite, name};
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        regions().erase(uintptr_t(address()));
        for (size_t i = 0; i < kGuard; i++)
            if (data_[-1 - ptrdiff_t(i)] != kPoison || data_[bytes_ + i] != kPoison)
                fail("something wrote %zu bytes outside of %s", i + 1, name_.c_str());
    }

    uint8_t* data() { return data_; }
    const uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    uint64_t address() const { return reinterpret_cast<uintptr_t>(data_); }

private:
    static constexpr size_t kGuard = 256;
    std::string name_;
    size_t bytes_;
    std::vector<uint8_t> storage_;
    uint8_t* data_;
};

#endif

}   // namespace emu
