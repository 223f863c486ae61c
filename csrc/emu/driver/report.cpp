// What a test asks of the driver, and what it can see of it: the environment, the log, the report, injected faults.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace emu::driver {

// ---- the environment ------------------------------------------------------------------------------------------------

static bool parse_fault(const char* text, Options& o) {
    const char* colon = std::strchr(text, ':');
    if (!colon) return false;
    o.fail_function.assign(text, colon);
    unsigned long long countdown;
    o.fail_lasts = std::sscanf(colon, ":%llu+:%d", &countdown, &o.fail_result) == 2;
    if (!o.fail_lasts && std::sscanf(colon, ":%llu:%d", &countdown, &o.fail_result) != 2) return false;
    o.fail_countdown = countdown;
    return countdown > 0 && o.fail_result > 0;
}

static Options read_options() {
    Options o;
    if (const char* seed = std::getenv("SPECACHE_EMU_SEED")) o.seed = std::strtoull(seed, nullptr, 0);
    if (const char* log = std::getenv("SPECACHE_EMU_LOG")) o.log = log;
    if (const char* vram = std::getenv("SPECACHE_EMU_VRAM")) o.vram = std::strtoull(vram, nullptr, 0);
    if (const char* ms = std::getenv("SPECACHE_EMU_SILENCE_MS")) o.silence_ms = unsigned(std::strtoul(ms, nullptr, 0));
    const char *cc = std::getenv("SPECACHE_EMU_CC"), *fault = std::getenv("SPECACHE_EMU_FAIL");
    if (cc && std::sscanf(cc, "%d.%d", &o.major, &o.minor) != 2) o.error = "SPECACHE_EMU_CC is not major.minor";
    if (fault && !parse_fault(fault, o)) o.error = "SPECACHE_EMU_FAIL is not function:countdown[+]:CUresult";
    if (o.vram == 0) o.error = "SPECACHE_EMU_VRAM is not a number of bytes";
    return o;
}

Options& options() {
    static Options* all = new Options(read_options());
    return *all;
}

// ---- faults ---------------------------------------------------------------------------------------------------------

// cuMemAlloc names cuMemAlloc_v2 as well.
static bool is_named(const char* function, const std::string& name) {
    if (std::strncmp(function, name.c_str(), name.size()) != 0) return false;
    const char* rest = function + name.size();
    return *rest == 0 || (rest[0] == '_' && rest[1] == 'v' && rest[2] >= '0' && rest[2] <= '9');
}

bool must_fail(const char* function, CUresult* result) {
    Options& o = options();
    if (o.fail_countdown == 0 || !is_named(function, o.fail_function) || --o.fail_countdown != 0) return false;
    if (o.fail_lasts) o.fail_countdown = 1;
    *result = CUresult(o.fail_result);
    report_note("%s failed with %d, as asked", function, o.fail_result);
    return true;
}

// ---- the report -----------------------------------------------------------------------------------------------------

struct Report {
    std::string text;
    int errors = 0, lines = 0;
};

static Report& report() {
    static Report* the_report = new Report;
    return *the_report;
}

static void add_line(const char* kind, const char* format, va_list args) {
    char line[512];
    std::vsnprintf(line, sizeof line, format, args);
    if (kind[0] == 'e') std::fprintf(stderr, "emulated driver: %s%s\n", kind, line);
    if (report().lines++ < 100) report().text += std::string(kind) + line + "\n";
    log_call(kind[0] == 'e' ? "error" : "note", "\"text\":\"%s\"", line);
}

void report_error(const char* format, ...) {
    va_list args;
    va_start(args, format);
    add_line("error: ", format, args);
    va_end(args);
    report().errors++;
    if (device().broken == CUDA_SUCCESS) device().broken = CUDA_ERROR_LAUNCH_FAILED;
}

void report_note(const char* format, ...) {
    va_list args;
    va_start(args, format);
    add_line("note: ", format, args);
    va_end(args);
}

// ---- the log --------------------------------------------------------------------------------------------------------

// Null: nobody asked for it, or it cannot be written (cuInit says so).
static FILE*& log_file() {
    static FILE* file = options().log.empty() ? nullptr : std::fopen(options().log.c_str(), "w");
    return file;
}

bool is_logging() { return log_file() != nullptr; }

void log_call(const char* call, const char* format, ...) {
    if (!is_logging()) return;
    std::fprintf(log_file(), "{\"call\":\"%s\",", call);
    va_list args;
    va_start(args, format);
    std::vfprintf(log_file(), format, args);
    va_end(args);
    std::fputs("}\n", log_file());
    std::fflush(log_file());
}

}   // namespace emu::driver

// For tests: waits for everything, forgets errors, and reads the environment again. Memory, streams and events stay.
extern "C" __attribute__((visibility("default"))) void specache_emu_reset() {
    using namespace emu::driver;
    Device& d = device();
    Device::Lock lock(d.mutex);
    d.wait_all(lock);
    if (FILE* file = log_file()) std::fclose(file);
    options() = read_options();
    log_file() = options().log.empty() ? nullptr : std::fopen(options().log.c_str(), "w");
    report() = Report{};
    d.broken = CUDA_SUCCESS;
    d.seed(options().seed);
}

// For tests: copies what was found wrong, a line each ("error: ..." or "note: ..."), and returns the number of errors.
// Errors are races, faults of operations and memory that is freed too early; notes are what is slow or was asked for.
extern "C" __attribute__((visibility("default"))) int specache_emu_report(char* text, size_t bytes) {
    std::lock_guard<std::mutex> lock(emu::driver::device().mutex);
    const auto& r = emu::driver::report();
    if (bytes != 0) std::snprintf(text, bytes, "%s", r.text.c_str());
    return r.errors;
}
