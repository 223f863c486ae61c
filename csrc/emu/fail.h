// How the emulation stops: one line on stderr and an exit code that tests can tell from a crash.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace emu {

constexpr int kExitCode = 3;

[[noreturn]] inline void fail(const char* format, ...) {
    std::fflush(stdout);
    std::fputs("emulation: ", stderr);
    va_list args;
    va_start(args, format);
    std::vfprintf(stderr, format, args);
    va_end(args);
    std::fputc('\n', stderr);
    std::fflush(stderr);
    // Not exit(): this may run on a fiber's stack, where no destructor should.
    std::_Exit(kExitCode);
}

}   // namespace emu
