// The part of NVRTC that the engine calls. Nothing is compiled: the sources are checked for headers that nobody gave, and
// the result names source, architecture and options (image.h).
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "device.h"
#include "image.h"

namespace emu::driver {

enum NvrtcResult { kSuccess = 0, kInvalidInput = 3, kInvalidProgram = 4, kInvalidOption = 5, kCompilation = 6 };

struct Program {
    std::string name, source;
    std::map<std::string, std::string> headers;
    std::string log, image;
};

// The quoted headers of a text.
static std::vector<std::string> includes(const std::string& text) {
    static const std::string kInclude = "#include \"";
    std::vector<std::string> found;
    for (size_t at = text.find(kInclude); at != std::string::npos; at = text.find(kInclude, at + 1)) {
        const size_t start = at + kInclude.size();
        found.push_back(text.substr(start, text.find('"', start) - start));
    }
    return found;
}

// Every header must be given, those that headers include as well. Those of the CPU emulation are not for a GPU.
static void check_headers(Program& p, const std::string& from, const std::string& text, std::set<std::string>& seen) {
    for (const std::string& header : includes(text)) {
        if (header.rfind("emu/", 0) == 0 || !seen.insert(header).second) continue;
        const auto found = p.headers.find(header);
        if (found == p.headers.end()) p.log += from + ": error: cannot open source file \"" + header + "\"\n";
        else check_headers(p, header, found->second, seen);
    }
}

static NvrtcResult compile(Program& p, const std::vector<std::string>& options) {
    std::string arch;
    p.log.clear();
    p.image = std::string(kImageMagic) + "source " + p.name + "\n";
    for (const std::string& option : options) {
        if (option.empty() || option[0] != '-') p.log += "error: unknown option '" + option + "'\n";
        for (const char* name : {"--gpu-architecture=", "-arch="})
            if (option.rfind(name, 0) == 0) arch = option.substr(std::strlen(name));
        p.image += "option " + option + "\n";
    }
    if (!p.log.empty()) return kInvalidOption;
    if (arch.rfind("sm_", 0) != 0 && arch.rfind("compute_", 0) != 0) {
        p.log = "error: no architecture, or '" + arch + "', which is none\n";
        return kInvalidOption;
    }
    p.image += "arch " + arch + "\n";
    std::set<std::string> seen;
    check_headers(p, p.name, p.source, seen);
    log_call("compile", "\"source\":\"%s\",\"arch\":\"%s\",\"headers\":%zu,\"ok\":%s", p.name.c_str(), arch.c_str(),
             p.headers.size(), p.log.empty() ? "true" : "false");
    return p.log.empty() ? kSuccess : kCompilation;
}

static NvrtcResult store(const std::string& text, char* out) {
    if (!out) return kInvalidInput;
    std::memcpy(out, text.c_str(), text.size() + 1);
    return kSuccess;
}

static NvrtcResult store_size(const std::string& text, size_t* out) {
    if (!out) return kInvalidInput;
    *out = text.size() + 1;
    return kSuccess;
}

static bool must_fail_here(const char* function, NvrtcResult* result) {
    CUresult code;
    if (!must_fail(function, &code)) return false;
    *result = NvrtcResult(code);
    return true;
}

}   // namespace emu::driver

using namespace emu::driver;

#define API extern "C" __attribute__((visibility("default")))

API NvrtcResult nvrtcVersion(int* major, int* minor) {
    if (!major || !minor) return kInvalidInput;
    *major = 13;
    *minor = 0;
    return kSuccess;
}

API const char* nvrtcGetErrorString(NvrtcResult result) {
    static const char* const names[] = {"NVRTC_SUCCESS",
                                        "NVRTC_ERROR_OUT_OF_MEMORY",
                                        "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
                                        "NVRTC_ERROR_INVALID_INPUT",
                                        "NVRTC_ERROR_INVALID_PROGRAM",
                                        "NVRTC_ERROR_INVALID_OPTION",
                                        "NVRTC_ERROR_COMPILATION"};
    return size_t(result) < sizeof names / sizeof *names ? names[result] : "NVRTC_ERROR unknown";
}

API NvrtcResult nvrtcCreateProgram(Program** out, const char* source, const char* name, int n_headers,
                                   const char* const* headers, const char* const* names) {
    if (!out || !source || n_headers < 0) return kInvalidInput;
    auto* program = new Program{name ? name : "default_program", source, {}, {}, {}};
    for (int i = 0; i < n_headers; i++) program->headers[names[i]] = headers[i];
    *out = program;
    return kSuccess;
}

API NvrtcResult nvrtcDestroyProgram(Program** program) {
    if (!program || !*program) return kInvalidProgram;
    delete *program;
    *program = nullptr;
    return kSuccess;
}

API NvrtcResult nvrtcCompileProgram(Program* program, int n_options, const char* const* options) {
    NvrtcResult result;
    std::lock_guard<std::mutex> lock(device().mutex);
    if (must_fail_here(__func__, &result)) return result;
    if (!program) return kInvalidProgram;
    return compile(*program, std::vector<std::string>(options, options + n_options));
}

API NvrtcResult nvrtcGetProgramLogSize(Program* program, size_t* bytes) { return store_size(program->log, bytes); }
API NvrtcResult nvrtcGetProgramLog(Program* program, char* out) { return store(program->log, out); }
API NvrtcResult nvrtcGetCUBINSize(Program* program, size_t* bytes) { return store_size(program->image, bytes); }
API NvrtcResult nvrtcGetCUBIN(Program* program, char* out) { return store(program->image, out); }
