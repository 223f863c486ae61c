// Calls that give, register, copy and fill memory.
#include <cstring>
#include <map>

#include "calls.h"

namespace emu::driver {

// Memory of cuMemHostAlloc, which the driver owns.
static std::map<void*, size_t>& host_allocations() {
    static auto* all = new std::map<void*, size_t>;
    return *all;
}

static CUresult allocate(Device& d, CUdeviceptr* out, size_t bytes) {
    if (!out || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (bytes > options().vram - d.memory.allocated()) return CUDA_ERROR_OUT_OF_MEMORY;
    const uintptr_t at = d.memory.allocate(bytes);
    if (at == 0) return CUDA_ERROR_OUT_OF_MEMORY;
    *out = at;
    log_call("alloc", "\"address\":\"%#zx\",\"bytes\":%zu", size_t(at), bytes);
    return CUDA_SUCCESS;
}

static CUresult enroll(Device& d, void* start, size_t bytes, unsigned flags) {
    if (!start || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    const bool writable = (flags & CU_MEMHOSTREGISTER_READ_ONLY) == 0;
    if (!d.memory.enroll(uintptr_t(start), bytes, writable)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    log_call("host_register", "\"address\":\"%p\",\"bytes\":%zu,\"flags\":%u", start, bytes, flags);
    return CUDA_SUCCESS;
}

static CUresult withdraw(Device& d, void* start) {
    if (!d.memory.withdraw(uintptr_t(start), d.host)) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    log_call("host_unregister", "\"address\":\"%p\"", start);
    return CUDA_SUCCESS;
}

// ---- copies ---------------------------------------------------------------------------------------------------------

enum Direction { kHtoD, kDtoH, kDtoD };

struct Copy {
    Direction direction;
    uintptr_t to, from;
    size_t bytes;

    const char* name() const {
        return direction == kHtoD ? "copy HtoD" : direction == kDtoH ? "copy DtoH" : "copy DtoD";
    }
    bool pageable(const Memory& memory) const {
        return direction != kDtoD && memory.kind(direction == kHtoD ? from : to, bytes) == nullptr;
    }
};

// The device's side must be one allocation (or registered memory by its device address); the host's side may be any.
static bool is_valid(const Memory& memory, const Copy& c) {
    if (c.direction != kHtoD && memory.kind(c.from, c.bytes) == nullptr) return false;
    if (c.direction != kDtoH && memory.kind(c.to, c.bytes) == nullptr) return false;
    return c.to != 0 && c.from != 0;
}

static Work copy_work(const Copy& c) {
    Work work;
    work.name = c.name();
    work.run = [c] {
        Memory& memory = device().memory;
        memory.access(c.from, c.bytes, false, c.direction == kHtoD);
        memory.access(c.to, c.bytes, true, c.direction == kDtoH);
        std::memmove(reinterpret_cast<void*>(c.to), reinterpret_cast<const void*>(c.from), c.bytes);
    };
    return work;
}

static void log_copy(const Copy& c, const Stream* stream, bool pageable) {
    log_call("copy", "\"kind\":\"%s\",\"to\":\"%#zx\",\"from\":\"%#zx\",\"bytes\":%zu,\"stream\":%u,\"pageable\":%s",
             c.name() + 5, size_t(c.to), size_t(c.from), c.bytes, stream->index, pageable ? "true" : "false");
}

static CUresult copy_async(const char* function, const Copy& c, CUstream handle) {
    return call(function, kContext, [&](Device& d, Device::Lock& lock) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (c.bytes == 0) return CUDA_SUCCESS;
        if (!is_valid(d.memory, c)) return CUDA_ERROR_INVALID_VALUE;
        const bool pageable = c.pageable(d.memory);
        log_copy(c, stream, pageable);
        const CUresult result = enqueue(d, stream, copy_work(c));
        if (result != CUDA_SUCCESS || !pageable) return result;
        report_note("%s of %zu bytes from or to pageable memory: it waits for stream %u", c.name(), c.bytes,
                    stream->index);
        return is_capturing(stream) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : d.wait(stream->tail, lock);
    });
}

static CUresult copy_now(const char* function, const Copy& c) {
    return call(function, kContext, [&](Device& d, Device::Lock& lock) {
        if (c.bytes == 0) return CUDA_SUCCESS;
        if (!is_valid(d.memory, c)) return CUDA_ERROR_INVALID_VALUE;
        log_copy(c, d.legacy(), c.pageable(d.memory));
        const CUresult result = enqueue(d, d.legacy(), copy_work(c));
        return result == CUDA_SUCCESS ? d.wait(d.legacy()->tail, lock) : result;
    });
}

template <class T> static CUresult fill(const char* function, CUdeviceptr to, T value, size_t count, CUstream handle) {
    return call(function, kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        if (count == 0) return CUDA_SUCCESS;
        if (to % sizeof(T) != 0 || d.memory.kind(to, count * sizeof(T)) == nullptr) return CUDA_ERROR_INVALID_VALUE;
        log_call("fill", "\"to\":\"%#zx\",\"bytes\":%zu,\"value\":%u,\"stream\":%u", size_t(to), count * sizeof(T),
                 unsigned(value), stream->index);
        Work work;
        work.name = "fill";
        work.run = [=] {
            device().memory.access(to, count * sizeof(T), true);
            std::fill_n(reinterpret_cast<T*>(to), count, value);
        };
        return enqueue(d, stream, std::move(work));
    });
}

}   // namespace emu::driver

using namespace emu::driver;

CUresult CUDAAPI cuMemGetInfo(size_t* free, size_t* total) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (!free || !total) return CUDA_ERROR_INVALID_VALUE;
        *total = options().vram;
        *free = options().vram - d.memory.allocated();
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* out, size_t bytes) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) { return allocate(d, out, bytes); });
}

CUresult CUDAAPI cuMemFree(CUdeviceptr at) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (at == 0) return CUDA_SUCCESS;
        if (!d.memory.release(at, d.host)) return CUDA_ERROR_INVALID_VALUE;
        log_call("free", "\"address\":\"%#zx\"", size_t(at));
        return d.broken;
    });
}

CUresult CUDAAPI cuMemHostRegister(void* start, size_t bytes, unsigned int flags) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) { return enroll(d, start, bytes, flags); });
}

CUresult CUDAAPI cuMemHostUnregister(void* start) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (host_allocations().count(start)) return CUDA_ERROR_INVALID_VALUE;
        const CUresult result = withdraw(d, start);
        return result == CUDA_SUCCESS ? d.broken : result;
    });
}

CUresult CUDAAPI cuMemHostGetDevicePointer(CUdeviceptr* out, void* at, unsigned int flags) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        const Memory::Kind* kind = d.memory.kind(uintptr_t(at), 1);
        if (!out || flags != 0 || !kind || *kind != Memory::kHost) return CUDA_ERROR_INVALID_VALUE;
        *out = uintptr_t(at);
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuMemHostAlloc(void** out, size_t bytes, unsigned int flags) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (!out || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        void* at = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
        if (!at) return CUDA_ERROR_OUT_OF_MEMORY;
        std::memset(at, 0xA5, bytes);
        host_allocations()[at] = bytes;
        *out = at;
        return enroll(d, at, bytes, flags & ~unsigned(CU_MEMHOSTREGISTER_READ_ONLY));
    });
}

CUresult CUDAAPI cuMemFreeHost(void* at) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (host_allocations().erase(at) == 0) return CUDA_ERROR_INVALID_VALUE;
        withdraw(d, at);
        if (d.broken == CUDA_SUCCESS) std::free(at);   // else something may still use it
        return d.broken;
    });
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return copy_async(__func__, Copy{kHtoD, uintptr_t(to), uintptr_t(from), bytes}, stream);
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy_async(__func__, Copy{kDtoH, uintptr_t(to), uintptr_t(from), bytes}, stream);
}

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy_async(__func__, Copy{kDtoD, uintptr_t(to), uintptr_t(from), bytes}, stream);
}

CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    return copy_now(__func__, Copy{kHtoD, uintptr_t(to), uintptr_t(from), bytes});
}

CUresult CUDAAPI cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
    return copy_now(__func__, Copy{kDtoH, uintptr_t(to), uintptr_t(from), bytes});
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return fill(__func__, to, uint8_t(value), count, stream);
}

CUresult CUDAAPI cuMemsetD32Async(CUdeviceptr to, unsigned int value, size_t count, CUstream stream) {
    return fill(__func__, to, uint32_t(value), count, stream);
}
