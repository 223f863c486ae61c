// How the emulation stops: one line on stderr and an exit code that tests can tell from a crash; or an exception, where
// the emulated driver goes on and reports it.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace emu {

constexpr int kExitCode = 3;

struct Failure {
    std::string text;
};

#ifdef SPECACHE_EMU_DRIVER
constexpr bool kThrows = true;
#else
constexpr bool kThrows = false;
#endif

[[noreturn]] inline void fail(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (kThrows) throw Failure{text};
    std::fflush(stdout);
    std::fprintf(stderr, "emulation: %s\n", text);
    std::fflush(stderr);
    // Not exit(): this may run on a fiber's stack, where no destructor should.
    std::_Exit(kExitCode);
}

}   // namespace emu
