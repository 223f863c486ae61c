// Calls that ask about the driver and its one device, and contexts.
#include <cstdio>
#include <cstring>

#include "calls.h"

namespace emu::driver {

bool initialised = false;
thread_local CUcontext current_context = nullptr;

static const CUcontext kPrimary = reinterpret_cast<CUcontext>(uintptr_t(0xC0));
static int primary_count = 0;

constexpr int kMultiprocessors = 4;

// The most dynamic shared memory of a block.
int shared_limit() {
    const int cc = options().major * 10 + options().minor;
    return (cc == 80 || cc == 87 ? 163 : cc == 86 || cc == 89 || cc >= 120 ? 99 : 227) << 10;
}

static int attribute(CUdevice_attribute which) {
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
            return 48 << 10;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            return shared_limit();
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
            return shared_limit() + 1024;
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
            return 1024;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            return 32;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            return kMultiprocessors;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
            return 2048;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
            return 0x7FFFFFFF;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
            return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
            return 65535;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
            return 50 << 20;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
            return 5120;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
            return 1000000;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
            return 1000000;
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
            return 2;
        case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
            return 1;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            return options().major;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            return options().minor;
        case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
        case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_MEM_OPS_V1:
        case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS:
        case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR_V1:
        case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR:
            return 1;
        default:
            return 0;   // what a GPU does not have
    }
}

struct ErrorText {
    CUresult code;
    const char *name, *text;
};

#define ERROR(code, text) {code, #code, text}
static const ErrorText kErrors[] = {
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    ERROR(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    ERROR(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    ERROR(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing stream"),
    ERROR(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

static CUresult error_text(CUresult code, const char** out, const char* ErrorText::* part) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = nullptr;
    for (const ErrorText& e : kErrors)
        if (e.code == code) *out = e.*part;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Stores an answer of a call.
template <class T> static CUresult answer(T* out, T value) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = value;
    return CUDA_SUCCESS;
}

static CUresult need_device(CUdevice device) { return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE; }

static CUresult uuid_of(CUuuid* out, CUdevice device) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(out->bytes, "specache emulate", sizeof out->bytes);
    return need_device(device);
}

static CUresult release_context(Device& d, Device::Lock& lock) {
    if (primary_count == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (--primary_count != 0) return CUDA_SUCCESS;
    d.wait_all(lock);
    if (const size_t left = d.memory.allocations()) report_note("%zu allocations are left at the context's end", left);
    return CUDA_SUCCESS;
}

}   // namespace emu::driver

using namespace emu::driver;

CUresult CUDAAPI cuInit(unsigned int flags) {
    if (!options().error.empty()) {
        std::fprintf(stderr, "emulated driver: %s\n", options().error.c_str());
        return CUDA_ERROR_UNKNOWN;
    }
    if (!options().log.empty() && !is_logging()) {
        std::fprintf(stderr, "emulated driver: cannot write SPECACHE_EMU_LOG, %s\n", options().log.c_str());
        return CUDA_ERROR_UNKNOWN;
    }
    return call(__func__, kNothing, [&](Device&, Device::Lock&) {
        if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
        initialised = true;
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuDriverGetVersion(int* version) {
    return call(__func__, kNothing, [&](Device&, Device::Lock&) { return answer(version, 13000); });
}

CUresult CUDAAPI cuGetErrorName(CUresult code, const char** name) { return error_text(code, name, &ErrorText::name); }
CUresult CUDAAPI cuGetErrorString(CUresult code, const char** text) { return error_text(code, text, &ErrorText::text); }

CUresult CUDAAPI cuDeviceGetCount(int* count) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) { return answer(count, 1); });
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
    return call(__func__, kInit,
                [&](Device&, Device::Lock&) { return ordinal == 0 ? answer(device, 0) : CUDA_ERROR_INVALID_DEVICE; });
}

CUresult CUDAAPI cuDeviceGetName(char* name, int bytes, CUdevice device) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) {
        if (!name || bytes <= 0) return CUDA_ERROR_INVALID_VALUE;
        std::snprintf(name, size_t(bytes), "Emulated GPU");
        return need_device(device);
    });
}

CUresult CUDAAPI cuDeviceTotalMem(size_t* bytes, CUdevice device) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) {
        return device == 0 ? answer(bytes, options().vram) : CUDA_ERROR_INVALID_DEVICE;
    });
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) {
        if (which <= 0 || which >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
        return device == 0 ? answer(value, attribute(which)) : CUDA_ERROR_INVALID_DEVICE;
    });
}

CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) { return uuid_of(uuid, device); });
}

// The name before version 13.
#undef cuDeviceGetUuid
extern "C" __attribute__((visibility("default"))) CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) { return uuid_of(uuid, device); });
}

CUresult CUDAAPI cuDeviceGetPCIBusId(char* id, int bytes, CUdevice device) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) {
        if (!id || bytes < 13) return CUDA_ERROR_INVALID_VALUE;
        std::snprintf(id, size_t(bytes), "0000:01:00.0");
        return need_device(device);
    });
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) {
        if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
        primary_count += context != nullptr;
        return answer(context, kPrimary);
    });
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) {
    return call(__func__, kInit, [&](Device& d, Device::Lock& lock) {
        return device == 0 ? release_context(d, lock) : CUDA_ERROR_INVALID_DEVICE;
    });
}

CUresult CUDAAPI cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) {
        if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
        if (const CUresult result = answer(flags, 0u); result != CUDA_SUCCESS) return result;
        return answer(active, int(primary_count > 0));
    });
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) {
        if (context != nullptr && (context != kPrimary || primary_count == 0)) return CUDA_ERROR_INVALID_CONTEXT;
        current_context = context;
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
    return call(__func__, kInit, [&](Device&, Device::Lock&) { return answer(context, current_context); });
}

CUresult CUDAAPI cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) {
        if (least) *least = 0;
        if (greatest) *greatest = -5;
        return CUDA_SUCCESS;
    });
}

CUresult CUDAAPI cuCtxSynchronize() {
    return call(__func__, kContext, [&](Device& d, Device::Lock& lock) {
        for (const auto& s : d.streams)
            if (is_capturing(s.second.get())) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        log_call("synchronize", "\"what\":\"context\"");
        return d.wait_all(lock);
    });
}
