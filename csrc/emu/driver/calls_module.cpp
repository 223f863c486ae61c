// Calls that load modules and launch kernels.
#include <cstring>
#include <map>
#include <memory>
#include <set>

#include "../cuda.h"
#include "calls.h"
#include "image.h"
#include "kernels.h"

namespace emu::driver {

int shared_limit();

constexpr int kDefaultShared = 48 << 10;

struct Function {
    std::string name;
    const Kernel* kernel;
    int shared_limit = kDefaultShared;   // dynamic, bytes
};

// Holds the kernels of one source file, or of all.
struct Module {
    std::string source;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

static std::map<CUmodule, std::unique_ptr<Module>>& modules() {
    static auto* all = new std::map<CUmodule, std::unique_ptr<Module>>;
    return *all;
}

static Function* function_of(CUfunction handle) {
    for (const auto& module : modules())
        for (const auto& function : module.second->functions)
            if (reinterpret_cast<CUfunction>(function.second.get()) == handle) return function.second.get();
    return nullptr;
}

static bool is_known_source(const std::string& name) {
    for (const auto& kernel : kernels())
        if (name == kernel.second.source) return true;
    return false;
}

// ---- modules --------------------------------------------------------------------------------------------------------

// "sm_90a" on 9.0 only, "compute_80" on 8.0 and newer.
static bool runs_here(const std::string& arch) {
    const int here = options().major * 10 + options().minor;
    const size_t digits = arch.find_first_of("0123456789");
    const int wanted = digits == std::string::npos ? 0 : std::atoi(arch.c_str() + digits);
    return arch.rfind("compute_", 0) == 0 ? wanted <= here : wanted == here;
}

// fatbin (and its wrapper), ELF and PTX of a real compiler: the kernels that run are this library's own.
static bool is_real_image(const void* image) {
    uint32_t magic;
    std::memcpy(&magic, image, sizeof magic);
    return magic == 0xBA55ED50u || magic == 0x466243B1u || magic == 0x464C457Fu || std::memcmp(image, "//", 2) == 0 ||
           std::memcmp(image, ".ver", 4) == 0;
}

static CUresult load(CUmodule* out, const void* image) {
    if (!out || !image) return CUDA_ERROR_INVALID_VALUE;
    auto module = std::make_unique<Module>();
    if (std::strncmp(static_cast<const char*>(image), kImageMagic, std::strlen(kImageMagic)) == 0) {
        const std::string text = static_cast<const char*>(image), source = image_field(text, "source");
        if (!runs_here(image_field(text, "arch"))) return CUDA_ERROR_NO_BINARY_FOR_GPU;
        if (is_known_source(source)) module->source = source;
    } else if (!is_real_image(image)) {
        return CUDA_ERROR_INVALID_IMAGE;
    }
    log_call("module", "\"source\":\"%s\"", module->source.c_str());
    *out = reinterpret_cast<CUmodule>(module.get());
    modules()[*out] = std::move(module);
    return CUDA_SUCCESS;
}

static CUresult get_function(CUfunction* out, CUmodule handle, const char* name) {
    const auto module = modules().find(handle);
    if (!out || !name) return CUDA_ERROR_INVALID_VALUE;
    if (module == modules().end()) return CUDA_ERROR_INVALID_HANDLE;
    const auto kernel = kernels().find(name);
    const std::string& source = module->second->source;
    if (kernel == kernels().end() || (!source.empty() && source != kernel->second.source)) return CUDA_ERROR_NOT_FOUND;
    auto& function = module->second->functions[name];
    if (!function) function = std::make_unique<Function>(Function{name, &kernel->second});
    *out = reinterpret_cast<CUfunction>(function.get());
    return CUDA_SUCCESS;
}

static CUresult attribute(int* value, CUfunction_attribute which, const Function& function) {
    switch (which) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = 1024;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            *value = function.shared_limit;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_NUM_REGS:
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
            *value = 0;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}

static CUresult set_attribute(Function& function, CUfunction_attribute which, int value) {
    if (which == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) return CUDA_SUCCESS;
    if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || value > shared_limit())
        return CUDA_ERROR_INVALID_VALUE;
    function.shared_limit = value;
    return CUDA_SUCCESS;
}

// ---- launches -------------------------------------------------------------------------------------------------------

struct Launch {
    dim3 grid, block;
    unsigned shared_bytes;
    bool programmatic;
};

static CUresult check_launch(const Launch& l, const Function* function) {
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.x > 0x7FFFFFFFu || l.grid.y > 65535 ||
        l.grid.z > 65535)
        return CUDA_ERROR_INVALID_VALUE;
    const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
    if (threads == 0 || threads > 1024 || l.block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    if (l.shared_bytes > unsigned(function->shared_limit)) return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

static void log_launch(const Launch& l, const Function& function, const Stream& stream, void** parameters) {
    if (!is_logging()) return;
    std::string hex;
    for (size_t i = 0; i < function.kernel->parameter_bytes.size(); i++)
        for (size_t b = 0; b < function.kernel->parameter_bytes[i]; b++) {
            char digits[3];
            std::snprintf(digits, sizeof digits, "%02x", static_cast<const uint8_t*>(parameters[i])[b]);
            hex += digits;
        }
    log_call(
        "launch",
        "\"kernel\":\"%s\",\"grid\":[%u,%u,%u],\"block\":[%u,%u,%u],\"shared\":%u,\"stream\":%u,\"programmatic\":%s,"
        "\"parameters\":\"%s\"",
        function.name.c_str(), l.grid.x, l.grid.y, l.grid.z, l.block.x, l.block.y, l.block.z, l.shared_bytes,
        stream.index, l.programmatic ? "true" : "false", hex.c_str());
}

static CUresult launch(Device& d, const Launch& l, CUfunction handle, CUstream stream_handle, void** parameters) {
    const Function* function = function_of(handle);
    Stream* stream = d.stream_of(stream_handle);
    const CUresult result = check_launch(l, function);
    if (result != CUDA_SUCCESS) return result;
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (!parameters && !function->kernel->parameter_bytes.empty()) return CUDA_ERROR_INVALID_VALUE;
    log_launch(l, *function, *stream, parameters);
    Work work;
    work.name = function->name;
    work.kernel = true;
    work.programmatic = l.programmatic;
    work.run = [l, body = function->kernel->bind(parameters)] {
        run_grid(l.grid, l.block, l.shared_bytes, device().draw(), l.programmatic, body);
    };
    return enqueue(d, stream, std::move(work));
}

// Of the attributes, those that change nothing here are taken.
static CUresult read_attributes(const CUlaunchConfig& config, Launch& l) {
    for (unsigned i = 0; i < config.numAttrs; i++) {
        const CUlaunchAttribute& a = config.attrs[i];
        if (a.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            l.programmatic = a.value.programmaticStreamSerializationAllowed != 0;
        else if (a.id != CU_LAUNCH_ATTRIBUTE_IGNORE && a.id != CU_LAUNCH_ATTRIBUTE_PRIORITY &&
                 a.id != CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW)
            return CUDA_ERROR_NOT_SUPPORTED;
    }
    return CUDA_SUCCESS;
}

}   // namespace emu::driver

using namespace emu::driver;

CUresult CUDAAPI cuModuleLoadData(CUmodule* out, const void* image) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) { return load(out, image); });
}

CUresult CUDAAPI cuModuleLoadDataEx(CUmodule* out, const void* image, unsigned int, CUjit_option*, void**) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) { return load(out, image); });
}

CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) {
        return modules().erase(module) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    });
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* out, CUmodule module, const char* name) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) { return get_function(out, module, name); });
}

CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction handle) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) {
        const Function* function = function_of(handle);
        if (!function) return CUDA_ERROR_INVALID_HANDLE;
        return value ? attribute(value, which, *function) : CUDA_ERROR_INVALID_VALUE;
    });
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction handle, CUfunction_attribute which, int value) {
    return call(__func__, kContext, [&](Device&, Device::Lock&) {
        Function* function = function_of(handle);
        return function ? set_attribute(*function, which, value) : CUDA_ERROR_INVALID_HANDLE;
    });
}

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                                unsigned int block_x, unsigned int block_y, unsigned int block_z,
                                unsigned int shared_bytes, CUstream stream, void** parameters, void** extra) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (extra) return CUDA_ERROR_NOT_SUPPORTED;
        const Launch l{dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared_bytes, false};
        return launch(d, l, function, stream, parameters);
    });
}

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    return call(__func__, kContext, [&](Device& d, Device::Lock&) {
        if (!config) return CUDA_ERROR_INVALID_VALUE;
        if (extra) return CUDA_ERROR_NOT_SUPPORTED;
        Launch l{dim3(config->gridDimX, config->gridDimY, config->gridDimZ),
                 dim3(config->blockDimX, config->blockDimY, config->blockDimZ), config->sharedMemBytes, false};
        const CUresult result = read_attributes(*config, l);
        return result == CUDA_SUCCESS ? launch(d, l, function, config->hStream, parameters) : result;
    });
}
