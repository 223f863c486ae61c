// Numbers and arrays of the kernel tests: 16-bit types as floats, typed buffers, random values, error bounds.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "device.h"

inline float widen(specache_dtype dtype, uint16_t bits) {
    if (dtype == SPECACHE_BF16) return specache::bit_cast<float>(uint32_t(bits) << 16);
    return __half2float(specache::bit_cast<__half>(bits));
}

inline uint16_t narrow(specache_dtype dtype, float x) {
    if (dtype == SPECACHE_BF16) return specache::bit_cast<uint16_t>(__float2bfloat16_rn(x));
    return specache::bit_cast<uint16_t>(__float2half_rn(x));
}

inline const char* dtype_name(specache_dtype dtype) { return dtype == SPECACHE_BF16 ? "bf16" : "fp16"; }

// A buffer of V: an input with its values, or an output full of poison.
template <class V> class Array : public device::Buffer {
public:
    Array(const std::string& name, const std::vector<V>& values) : Buffer(name, values.size() * sizeof(V), kRead) {
        std::memcpy(data(), values.data(), bytes());
        upload();
    }
    Array(const std::string& name, size_t count) : Buffer(name, count * sizeof(V), kWrite) { upload(); }

    // An output that begins with values.
    static void fill(Array& to, const std::vector<V>& values) {
        std::memcpy(to.data(), values.data(), to.bytes());
        to.upload();
    }

    size_t size() const { return bytes() / sizeof(V); }
    V operator[](size_t i) const {
        V value;
        std::memcpy(&value, data() + i * sizeof(V), sizeof(V));
        return value;
    }
};

using Random = std::mt19937;

inline std::vector<float> normals(Random& random, size_t count, float scale) {
    std::normal_distribution<float> normal;
    std::vector<float> out(count);
    for (float& x : out) x = scale * normal(random);
    return out;
}

inline std::vector<uint16_t> narrowed(specache_dtype dtype, const std::vector<float>& values) {
    std::vector<uint16_t> out;
    for (float x : values) out.push_back(narrow(dtype, x));
    return out;
}
