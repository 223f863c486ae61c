#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "../block.h"
#include "../memory.h"
#include "device.h"

namespace emu {

void check_access(const void* address, size_t bytes, bool write) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at % bytes != 0) fail("%s of %zu bytes at a misaligned address", write ? "write" : "read", bytes);
    driver::device().memory.access(at, bytes, write);
}

namespace driver {

// ---- regions --------------------------------------------------------------------------------------------------------

// Not 0 and not FF, which tables are initialised with. As fp16 a NaN, tiny, or a NaN; as bf16 and fp32 huge, tiny, huge.
static uint8_t poison() {
    static const uint8_t bytes[3] = {0x7F, 0xA5, 0xFE};
    return bytes[options().seed % 3];
}

constexpr size_t kPoisonBytes = 2 << 20;

// A file of poison, mapped privately: what nobody writes costs no memory.
static int poison_file() {
    static const int file = [] {
        const int fd = memfd_create("poison", MFD_CLOEXEC);
        const std::vector<uint8_t> bytes(kPoisonBytes, poison());
        return fd >= 0 && write(fd, bytes.data(), bytes.size()) == ssize_t(bytes.size()) ? fd : -1;
    }();
    return file;
}

uintptr_t Memory::allocate(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), mapped = (bytes + page - 1) / page * page;
    void* space = mmap(nullptr, mapped + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED || poison_file() < 0) return 0;
    uint8_t* start = static_cast<uint8_t*>(space) + page;
    for (size_t at = 0; at < mapped; at += kPoisonBytes)
        if (mmap(start + at, std::min(kPoisonBytes, mapped - at), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
                 poison_file(), 0) == MAP_FAILED)
            return 0;
    allocated_ += bytes;
    return insert(uintptr_t(start), bytes, kDevice, true).start;
}

bool Memory::release(uintptr_t start, const Clock& host) {
    const auto found = regions_.find(start);
    if (found == regions_.end() || found->second.kind != kDevice || !found->second.alive) return false;
    Region& region = found->second;
    in_use(region, host, "freed");
    allocated_ -= region.bytes;
    region.alive = false;
    region.pages.clear();
    // The address stays taken, so that a late access is seen and not someone else's.
    mmap(reinterpret_cast<void*>(start), region.bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return true;
}

bool Memory::enroll(uintptr_t start, size_t bytes, bool writable) {
    const auto next = regions_.lower_bound(start + bytes);
    if (next != regions_.begin()) {
        const Region& before = std::prev(next)->second;
        if (before.start + before.bytes > start && before.alive) return false;
    }
    insert(start, bytes, kHost, writable);
    return true;
}

bool Memory::withdraw(uintptr_t start, const Clock& host) {
    const auto found = regions_.find(start);
    if (found == regions_.end() || found->second.kind != kHost) return false;
    in_use(found->second, host, "unregistered");
    regions_.erase(found);
    std::fill(cached_, cached_ + kCached, nullptr);
    return true;
}

Memory::Region& Memory::insert(uintptr_t start, size_t bytes, Kind kind, bool writable) {
    Region region{start, bytes, kind, writable, true, ++numbers_, {}};
    region.pages.resize((bytes + start % kGranule) / kGranule / kCells + 1);
    std::fill(cached_, cached_ + kCached, nullptr);
    return regions_.insert_or_assign(start, std::move(region)).first->second;
}

Memory::Region* Memory::find(uintptr_t at) {
    Region*& cached = cached_[at >> 12 & (kCached - 1)];
    if (cached && at >= cached->start && at < cached->start + cached->bytes) return cached;
    auto next = regions_.upper_bound(at);
    if (next == regions_.begin()) return nullptr;
    Region& region = std::prev(next)->second;
    if (at >= region.start + region.bytes) return nullptr;
    return cached = &region;
}

const Memory::Kind* Memory::kind(uintptr_t at, size_t bytes) const {
    Region* region = const_cast<Memory*>(this)->find(at);
    return region && region->alive && at + bytes <= region->start + region->bytes ? &region->kind : nullptr;
}

size_t Memory::allocations() const {
    return size_t(std::count_if(regions_.begin(), regions_.end(),
                                [](const auto& r) { return r.second.kind == kDevice && r.second.alive; }));
}

Memory::Cell& Memory::Region::cell(size_t index) {
    auto& page = pages[index / kCells];
    if (!page) page.reset(new Cell[kCells]());
    return page[index % kCells];
}

// Whoever has touched the region must be known to be complete.
void Memory::in_use(Region& region, const Clock& host, const char* verb) {
    uint32_t known = 0;
    for (const auto& page : region.pages)
        for (size_t i = 0; page && i < kCells; i++)
            for (uint32_t id : {page[i].writer, page[i].reader[0], page[i].reader[1]}) {
                if (id == known || id == 0) continue;
                const Operation& o = operations_[id];
                if (o.stream >= host.size() || host[o.stream] < o.count) {
                    report_error("allocation %u is %s while %s (stream %u) may still use it", region.number, verb,
                                 o.name.c_str(), o.stream);
                    return;
                }
                known = id;
            }
}

// ---- accesses -------------------------------------------------------------------------------------------------------

uint32_t Memory::begin(const std::string& name, uint32_t stream, uint32_t count) {
    operations_.push_back(Operation{name, stream, count});
    return uint32_t(operations_.size() - 1);
}

// Names the nearest allocation below.
void Memory::outside(uintptr_t at, size_t bytes, const char* verb) const {
    const auto next = regions_.upper_bound(at);
    if (next == regions_.begin()) fail("%s of %zu bytes at %#zx, outside every allocation", verb, bytes, size_t(at));
    const Region& below = std::prev(next)->second;
    const size_t offset = at - below.start;
    if (offset >= below.bytes + kNear)
        fail("%s of %zu bytes at %#zx, outside every allocation", verb, bytes, size_t(at));
    if (below.alive)
        fail("%s of %zu bytes at offset %zu of allocation %u, which has %zu", verb, bytes, offset, below.number,
             below.bytes);
    fail("%s of %zu bytes at offset %zu of allocation %u, which is freed", verb, bytes, offset, below.number);
}

void Memory::access(uintptr_t at, size_t bytes, bool write, bool unregistered_is_fine) {
    if (bytes == 0) return;
    const char* verb = write ? "write" : "read";
    Region* region = find(at);
    if (!region && unregistered_is_fine) return;
    if (!region || !region->alive || at + bytes > region->start + region->bytes) outside(at, bytes, verb);
    if (write && !region->writable) fail("write to allocation %u, which is read-only", region->number);
    if (actor_.id == 0) return;
    wrote_host_ |= write && region->kind == kHost;
    const bool early = actor_.programmatic && !Block::current().thread().after_previous;
    const uintptr_t first = at / kGranule, last = (at + bytes - 1) / kGranule, base = region->start / kGranule;
    for (uintptr_t g = first; g <= last; g++) {
        const uintptr_t from = std::max(at, g * kGranule), end = std::min(at + bytes, (g + 1) * kGranule);
        const uint32_t mask = ((1u << (end - from)) - 1) << (from - g * kGranule);
        touch(*region, g - base, uint16_t(mask), write, early);
    }
}

bool Memory::is_ordered(uint32_t earlier, bool early) const {
    if (earlier == 0 || earlier == actor_.id) return true;
    const Operation& o = operations_[earlier];
    if (early && o.stream == actor_.stream) return o.count <= actor_.early_count;
    return o.stream < actor_.clock->size() && (*actor_.clock)[o.stream] >= o.count;
}

void Memory::touch(Region& region, size_t index, uint16_t bytes, bool write, bool early) {
    Cell& c = region.cell(index);
    const uint32_t me = actor_.id;
    if ((c.written & bytes) != 0 && !is_ordered(c.writer, early)) race(region, index, c.writer, true, write);
    if (write) {
        for (int r = 0; r < 2; r++) {
            if ((c.read[r] & bytes) == 0) continue;
            if (!is_ordered(c.reader[r], early)) race(region, index, c.reader[r], false, write);
            c.read[r] &= uint16_t(~bytes);   // who is ordered after this write is ordered after that read
        }
        c.written = uint16_t(c.writer == me ? c.written | bytes : bytes);
        c.writer = me;
        return;
    }
    // Of two readers of one stream the later stands for both; a third one replaces the second.
    const auto stream_of = [&](uint32_t id) { return operations_[id].stream; };
    const int r = c.reader[0] == 0 || stream_of(c.reader[0]) == actor_.stream ? 0 : 1;
    c.read[r] = uint16_t(c.reader[r] == me ? c.read[r] | bytes : bytes);
    c.reader[r] = me;
}

void Memory::race(const Region& region, size_t index, uint32_t earlier, bool wrote, bool write) {
    if (!reported_.insert({earlier, actor_.id}).second) return;
    const Operation &a = operations_[earlier], &b = operations_[actor_.id];
    const uintptr_t offset = std::max(region.start, (region.start / kGranule + index) * kGranule) - region.start;
    report_error(
        "race: %s (stream %u) %s byte %zu of allocation %u, which %s (stream %u) %s, with no order between them",
        b.name.c_str(), b.stream, write ? "writes" : "reads", size_t(offset), region.number, a.name.c_str(), a.stream,
        wrote ? "writes" : "reads");
}

}   // namespace driver
}   // namespace emu
