// The number types of the ABI on the host, for the tests' twins: widen and narrow, names, sizes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common.cuh"

inline float widen(specache_dtype dtype, uint32_t bits) {
    if (dtype == SPECACHE_FP32) return specache::bit_cast<float>(bits);
    if (dtype == SPECACHE_BF16) return specache::bit_cast<float>(bits << 16);
    return __half2float(specache::bit_cast<__half>(uint16_t(bits)));
}

inline uint32_t narrow(specache_dtype dtype, float x) {
    if (dtype == SPECACHE_FP32) return specache::bit_cast<uint32_t>(x);
    if (dtype == SPECACHE_BF16) return specache::bit_cast<uint16_t>(__float2bfloat16_rn(x));
    return specache::bit_cast<uint16_t>(__float2half_rn(x));
}

inline size_t dtype_bytes(specache_dtype dtype) { return dtype == SPECACHE_FP32 ? 4 : 2; }

inline const char* dtype_name(specache_dtype dtype) {
    return dtype == SPECACHE_FP32 ? "fp32" : dtype == SPECACHE_BF16 ? "bf16" : "fp16";
}
