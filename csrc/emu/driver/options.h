// What the environment asks of the emulated driver, read once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emu::driver {

struct Options {
    uint64_t seed = 0;             // SPECACHE_EMU_SEED: order of execution, poison
    std::string log;               // SPECACHE_EMU_LOG: a file; one JSON line per call that matters
    std::string fail_function;     // SPECACHE_EMU_FAIL=function:countdown:CUresult
    uint64_t fail_countdown = 0;   // 1: the next call
    bool fail_lasts = false;       // countdown+: all calls from that one on
    int fail_result = 0;
    size_t vram = size_t(4) << 30;   // SPECACHE_EMU_VRAM: bytes
    int major = 9, minor = 0;        // SPECACHE_EMU_CC
    unsigned silence_ms = 10;        // SPECACHE_EMU_SILENCE_MS: without calls, until the GPU runs by itself
    std::string error;               // why the environment makes no sense; cuInit fails with it
};

Options& options();

}   // namespace emu::driver
