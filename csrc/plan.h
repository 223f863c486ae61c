// Helpers of the launch plans: plain host C++, no CUDA.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "abi.h"

namespace specache {

// Writes the sentence and passes the status on: `return refuse(launch, STATUS, "...", ...)`.
inline specache_status refuse(specache_launch* launch, specache_status status, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(launch->message, sizeof launch->message, format, args);
    va_end(args);
    return status;
}

// The number of a dtype that the kernel lists name fp16, bf16 or fp32.
constexpr specache_dtype dtype_named(const char* name) {
    return name[0] == 'b' ? SPECACHE_BF16 : name[2] == '1' ? SPECACHE_FP16 : SPECACHE_FP32;
}

}   // namespace specache
