// The dense half of a step in double, with error bounds: what linear_test and step_test compare with. And its inputs.
#pragma once

#include <memory>

#include "numbers.h"

// A sum, and the sum of the absolute values of its terms: what its error is measured by.
struct Sum {
    double value = 0;
    double size = 0;
};

// Two numbers of bf16 carry x to 2^-16 of each product at worst, to a fraction of that in a sum of many, and fp32 sums
// add less. fp16 has an absolute step of 2^-20 for x: inputs stay away from it.
inline double tolerance(double size) { return size * 0x1p-16 + 1e-30; }

// [n][k] weights.
struct Matrix {
    specache_dtype dtype;
    size_t n, k;
    std::vector<uint8_t> bytes;

    Matrix(Random& random, specache_dtype dtype, size_t n, size_t k)
        : dtype(dtype), n(n), k(k), bytes(narrowed(dtype, normals(random, n * k, 1 / std::sqrt(float(k))))) {}
    double at(size_t row, size_t column) const { return number_at(dtype, bytes, row * k + column); }
};

// W x + b of one feature of one row.
inline Sum product(const Matrix& w, size_t feature, const std::vector<double>& x, const std::vector<float>& bias) {
    Sum sum;
    for (size_t k = 0; k < w.k; k++) {
        const double term = w.at(feature, k) * x[k];
        sum.value += term;
        sum.size += std::fabs(term);
    }
    if (!bias.empty()) sum = Sum{sum.value + bias[feature], sum.size + std::fabs(bias[feature])};
    return sum;
}

// RMS norm; x itself where there is no weight.
inline std::vector<double> normed(std::vector<double> x, const std::vector<float>& weight, double eps) {
    if (weight.empty()) return x;
    double squares = 0;
    for (double v : x) squares += v * v;
    for (size_t i = 0; i < x.size(); i++) x[i] *= weight[i] / std::sqrt(squares / double(x.size()) + eps);
    return x;
}

// A row of [rows][width] numbers.
inline std::vector<double> row_of(const std::vector<float>& x, size_t row, size_t width) {
    return {x.begin() + ptrdiff_t(row * width), x.begin() + ptrdiff_t((row + 1) * width)};
}

inline std::vector<float> norm_weight(Random& random, size_t width) {
    std::vector<float> w = normals(random, width, 0.3f);
    for (float& v : w) v += 1;
    return w;
}

inline std::vector<float> maybe(bool is, Random& random, size_t width) {
    return is ? normals(random, width, 0.5f) : std::vector<float>();
}

// An input that may be absent: address 0 then.
struct Optional {
    Optional(const char* name, const std::vector<float>& values) {
        if (!values.empty()) array.reset(new Array<float>(name, values));
    }
    uint64_t address() const { return array ? array->address() : 0; }
    std::unique_ptr<Array<float>> array;
};

// A row's values of all heads of q, k or v, with their error bounds.
struct Heads {
    std::vector<double> value, bound;

    Heads(const Matrix& w, const std::vector<double>& x, const std::vector<float>& bias) {
        for (size_t f = 0; f < w.n; f++) {
            const Sum sum = product(w, f, x, bias);
            value.push_back(sum.value);
            bound.push_back(tolerance(sum.size));
        }
    }

    // RMS norm of each head of d channels.
    void norm(size_t d, const std::vector<float>& weight, double eps) {
        for (size_t first = 0; first < value.size() && !weight.empty(); first += d) {
            double squares = 0, error = 0;
            for (size_t i = first; i < first + d; i++) {
                squares += value[i] * value[i];
                error += std::fabs(value[i]) * bound[i];
            }
            const double scale = 1 / std::sqrt(squares / double(d) + eps);
            for (size_t c = 0; c < d; c++) {
                double& v = value[first + c];
                v *= scale * weight[c];
                // The value's own error, and that of the root.
                bound[first + c] = bound[first + c] * scale * std::fabs(weight[c]) +
                                   std::fabs(v) * (error * scale * scale / double(d) + 1e-6);
            }
        }
    }

    // RoPE with [d / 2][cos, sin].
    void rotate(size_t d, const float* cos_sin) {
        for (size_t i = 0; i < value.size(); i++) {
            if (i % d >= d / 2) continue;
            const size_t k = i + d / 2, c = i % d;
            const double cos = cos_sin[2 * c], sin = cos_sin[2 * c + 1], a = value[i], b = value[k];
            value[i] = a * cos - b * sin;
            value[k] = b * cos + a * sin;
            bound[i] = bound[k] = bound[i] + bound[k] + 1e-6 * (std::fabs(a) + std::fabs(b));
        }
    }
};

inline double silu_mul(double gate, double up) { return gate / (1 + std::exp(-gate)) * up; }
