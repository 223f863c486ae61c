// Numbers and arrays of the kernel tests: typed buffers, random values, error bounds.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "dtype.h"

// A buffer of V: an input with its values, or an output full of poison.
template <class V> class Array : public device::Buffer {
public:
    Array(const std::string& name, const std::vector<V>& values) : Buffer(name, values.size() * sizeof(V), kRead) {
        if (!values.empty()) std::memcpy(data(), values.data(), bytes());
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

// Numbers of a dtype, as bytes.
inline std::vector<uint8_t> narrowed(specache_dtype dtype, const std::vector<float>& values) {
    std::vector<uint8_t> out;
    for (float x : values) {
        const uint32_t bits = narrow(dtype, x);
        for (size_t i = 0; i < dtype_bytes(dtype); i++) out.push_back(uint8_t(bits >> (8 * i)));
    }
    return out;
}

// Number `index` among bytes.
inline float number_at(specache_dtype dtype, const std::vector<uint8_t>& bytes, size_t index) {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes[index * dtype_bytes(dtype)], dtype_bytes(dtype));
    return widen(dtype, bits);
}
