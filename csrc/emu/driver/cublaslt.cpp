// The part of cuBLASLt that the engine calls: D = alpha op(A) op(B) + beta C of fp16, bf16 or fp32 matrices, summed in
// fp32, one product after the other in a batch; with a bias for each row of D where that is the epilogue. What is not here is refused, not ignored.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "calls.h"

namespace emu::driver {

// Numbers of cublas_api.h, cublasLt.h and library_types.h.
enum Status { kOk = 0, kNotInitialised = 1, kInvalidValue = 7, kArchMismatch = 8, kExecutionFailed = 13, kNotSupported = 15 };
enum DataType { kF32 = 0, kF16 = 2, kBf16 = 14 };
enum Compute { kCompute32F = 68, kFast16F = 74, kFast16Bf = 75, kFastTf32 = 77 };
enum Operation { kN = 0, kT = 1 };
enum Order { kColumns = 0, kRows = 1 };
enum DescAttribute { kComputeType = 0, kScaleType = 1, kPointerMode = 2, kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8 };
enum LayoutAttribute { kType = 0, kOrder = 1, kNRows = 2, kNCols = 3, kLd = 4, kBatchCount = 5, kBatchOffset = 6 };
enum Epilogue { kDefaultEpilogue = 1, kBias = 4 };

struct Matmul {
    int32_t compute, scale, trans_a = kN, trans_b = kN, epilogue = kDefaultEpilogue;
    uint64_t bias = 0;   // fp32, as long as a column of D
};

struct Layout {
    int32_t type, order = kColumns;
    uint64_t rows, cols;
    int64_t ld;
    int32_t batch = 1;
    int64_t batch_offset = 0;   // elements

    size_t element_bytes() const { return type == kF32 ? 4 : 2; }
    size_t index(uint64_t row, uint64_t col) const {
        return order == kColumns ? size_t(row + col * uint64_t(ld)) : size_t(row * uint64_t(ld) + col);
    }
    bool is_valid() const {
        const uint64_t least = order == kColumns ? rows : cols;
        return (type == kF32 || type == kF16 || type == kBf16) && (order == kColumns || order == kRows) &&
               ld >= int64_t(least) && batch >= 1;
    }
};

struct Preference {
    uint64_t workspace = 0;
};

// cublasLtMatmulHeuristicResult_t.
struct Heuristic {
    uint64_t algo[8];
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};

static float load(const uint8_t* base, int type, size_t index) {
    if (type == kF32) return reinterpret_cast<const float*>(base)[index];
    if (type == kF16) return __half2float(reinterpret_cast<const __half*>(base)[index]);
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(base)[index]);
}

static void store(uint8_t* base, int type, size_t index, float value) {
    if (type == kF32) reinterpret_cast<float*>(base)[index] = value;
    else if (type == kF16) reinterpret_cast<__half*>(base)[index] = __float2half_rn(value);
    else reinterpret_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
}

struct Product {
    Matmul desc;
    Layout a, b, c, d;
    uintptr_t at_a, at_b, at_c, at_d;
    float alpha, beta;

    uint64_t depth() const { return desc.trans_a == kN ? a.cols : a.rows; }
    bool is_valid() const {
        const uint64_t m = desc.trans_a == kN ? a.rows : a.cols, n = desc.trans_b == kN ? b.cols : b.rows;
        const uint64_t k = desc.trans_b == kN ? b.rows : b.cols;
        return a.is_valid() && b.is_valid() && c.is_valid() && d.is_valid() && a.type == b.type && k == depth() &&
               d.rows == m && d.cols == n && c.rows == m && c.cols == n && a.batch == d.batch && b.batch == d.batch;
    }
    void run_one(int batch) const;
};

// One matrix of a batch in memory.
class Matrix {
public:
    Matrix(const Layout& layout, uintptr_t at, int batch)
        : layout_(layout), at_(at + size_t(batch) * size_t(layout.batch_offset) * layout.element_bytes()) {}

    float operator()(uint64_t row, uint64_t col) const { return load(bytes(), layout_.type, layout_.index(row, col)); }
    void set(uint64_t row, uint64_t col, float value) { store(bytes(), layout_.type, layout_.index(row, col), value); }

    // Column by column (or row by row): what lies between them is someone else's.
    void access(bool write) const {
        const bool by_column = layout_.order == kColumns;
        const uint64_t lines = by_column ? layout_.cols : layout_.rows,
                       length = by_column ? layout_.rows : layout_.cols;
        const size_t step = size_t(layout_.ld) * layout_.element_bytes();
        for (uint64_t l = 0; l < lines; l++)
            device().memory.access(at_ + l * step, length * layout_.element_bytes(), write);
    }

private:
    uint8_t* bytes() const { return reinterpret_cast<uint8_t*>(at_); }
    const Layout& layout_;
    uintptr_t at_;
};

void Product::run_one(int batch) const {
    const Matrix left(a, at_a, batch), right(b, at_b, batch), in(c, at_c, batch);
    Matrix out(d, at_d, batch);
    left.access(false);
    right.access(false);
    if (beta != 0) in.access(false);
    out.access(true);
    const float* bias = desc.epilogue == kBias ? reinterpret_cast<const float*>(desc.bias) : nullptr;
    if (bias) device().memory.access(desc.bias, d.rows * sizeof(float), false);
    // A row of the result at a time: its loop over columns is the one that the compiler turns into vectors.
    const uint64_t k = depth(), n = d.cols;
    std::vector<float> wide(k * n), sums(n);
    for (uint64_t i = 0; i < k; i++)
        for (uint64_t col = 0; col < n; col++) wide[i * n + col] = desc.trans_b == kN ? right(i, col) : right(col, i);
    for (uint64_t row = 0; row < d.rows; row++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (uint64_t i = 0; i < k; i++) {
            const float x = desc.trans_a == kN ? left(row, i) : left(i, row);
            for (uint64_t col = 0; col < n; col++) sums[col] += x * wide[i * n + col];
        }
        for (uint64_t col = 0; col < n; col++)
            out.set(row, col, alpha * sums[col] + (beta == 0 ? 0.0f : beta * in(row, col)) + (bias ? bias[row] : 0.0f));
    }
}

template <class T> static Status set(T& field, const void* from, size_t bytes) {
    if (bytes != sizeof(T)) return kInvalidValue;
    std::memcpy(&field, from, bytes);
    return kOk;
}

static Status set_desc(Matmul& m, int which, const void* from, size_t bytes) {
    int32_t must_be_default = 0;
    switch (which) {
        case kComputeType:
            return set(m.compute, from, bytes);
        case kScaleType:
            return set(m.scale, from, bytes);
        case kTransA:
            return set(m.trans_a, from, bytes);
        case kTransB:
            return set(m.trans_b, from, bytes);
        case kPointerMode:
            if (set(must_be_default, from, bytes) != kOk) return kInvalidValue;
            return must_be_default == 0 ? kOk : kNotSupported;
        case kEpilogue:
            return set(m.epilogue, from, bytes);
        case kBiasPointer:
            return set(m.bias, from, bytes);
        default:
            return kNotSupported;
    }
}

static Status set_layout(Layout& l, int which, const void* from, size_t bytes) {
    switch (which) {
        case kType:
            return set(l.type, from, bytes);
        case kOrder:
            return set(l.order, from, bytes);
        case kNRows:
            return set(l.rows, from, bytes);
        case kNCols:
            return set(l.cols, from, bytes);
        case kLd:
            return set(l.ld, from, bytes);
        case kBatchCount:
            return set(l.batch, from, bytes);
        case kBatchOffset:
            return set(l.batch_offset, from, bytes);
        default:
            return kNotSupported;
    }
}

static bool is_supported(const Matmul& m) {
    const bool sums =
        m.compute == kCompute32F || m.compute == kFast16F || m.compute == kFast16Bf || m.compute == kFastTf32;
    const bool epilogue = m.epilogue == kDefaultEpilogue || m.epilogue == kBias;
    return sums && epilogue && m.scale == kF32 && (m.trans_a == kN || m.trans_a == kT) && (m.trans_b == kN || m.trans_b == kT);
}

static Status enqueue_product(const Product& p, CUstream handle) {
    const CUresult result = call("cublasLtMatmul", kContext, [&](Device& d, Device::Lock&) {
        Stream* stream = d.stream_of(handle);
        if (!stream) return CUDA_ERROR_INVALID_HANDLE;
        log_call("matmul", "\"m\":%zu,\"n\":%zu,\"k\":%zu,\"batch\":%d,\"stream\":%u", size_t(p.d.rows),
                 size_t(p.d.cols), size_t(p.depth()), p.d.batch, stream->index);
        Work work;
        work.name = "product";   // not as the call: faults are counted by name, and when it runs is chance
        work.kernel = true;
        work.run = [p] {
            for (int i = 0; i < p.d.batch; i++) p.run_one(i);
        };
        return enqueue(d, stream, std::move(work));
    });
    return result == CUDA_SUCCESS ? kOk : result == CUDA_ERROR_INVALID_HANDLE ? kInvalidValue : kExecutionFailed;
}

}   // namespace emu::driver

using namespace emu::driver;

#define API extern "C" __attribute__((visibility("default")))

API Status cublasLtCreate(void** handle) {
    if (CUresult result; must_fail(__func__, &result)) return kNotInitialised;
    if (!handle) return kInvalidValue;
    static int any;
    *handle = &any;
    return kOk;
}

API Status cublasLtDestroy(void*) { return kOk; }
API size_t cublasLtGetVersion() { return 130000; }

API Status cublasLtMatmulDescCreate(Matmul** out, int compute, int scale) {
    if (!out) return kInvalidValue;
    *out = new Matmul{compute, scale};
    return kOk;
}

API Status cublasLtMatmulDescDestroy(Matmul* desc) {
    delete desc;
    return kOk;
}

API Status cublasLtMatmulDescSetAttribute(Matmul* desc, int which, const void* from, size_t bytes) {
    return desc && from ? set_desc(*desc, which, from, bytes) : kInvalidValue;
}

API Status cublasLtMatrixLayoutCreate(Layout** out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    if (!out) return kInvalidValue;
    *out = new Layout{type, kColumns, rows, cols, ld};
    return kOk;
}

API Status cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return kOk;
}

API Status cublasLtMatrixLayoutSetAttribute(Layout* layout, int which, const void* from, size_t bytes) {
    return layout && from ? set_layout(*layout, which, from, bytes) : kInvalidValue;
}

API Status cublasLtMatmulPreferenceCreate(Preference** out) {
    if (!out) return kInvalidValue;
    *out = new Preference;
    return kOk;
}

API Status cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return kOk;
}

// Which algorithms are wanted makes no difference here.
API Status cublasLtMatmulPreferenceSetAttribute(Preference* preference, int, const void* from, size_t) {
    return preference && from ? kOk : kInvalidValue;
}

API Status cublasLtMatmulAlgoGetHeuristic(void*, Matmul* desc, Layout* a, Layout* b, Layout* c, Layout* d, Preference*,
                                          int wanted, Heuristic* out, int* found) {
    if (!desc || !a || !b || !c || !d || !out || !found || wanted < 1) return kInvalidValue;
    *found = 0;
    if (CUresult result; must_fail(__func__, &result)) return kNotSupported;
    const Product product{*desc, *a, *b, *c, *d, 0, 0, 0, 0, 1, 0};
    if (!is_supported(*desc) || !product.is_valid()) return kNotSupported;
    *out = Heuristic{{1}, 0, kOk, 1, {}};
    *found = 1;
    return kOk;
}

API Status cublasLtMatmul(void*, Matmul* desc, const void* alpha, const void* a, Layout* layout_a, const void* b,
                          Layout* layout_b, const void* beta, const void* c, Layout* layout_c, void* d,
                          Layout* layout_d, const void*, void*, size_t, CUstream stream) {
    if (!desc || !alpha || !beta || !layout_a || !layout_b || !layout_c || !layout_d) return kInvalidValue;
    Product p{*desc,        *layout_a,    *layout_b,    *layout_c, *layout_d, uintptr_t(a),
              uintptr_t(b), uintptr_t(c), uintptr_t(d), 0,         0};
    std::memcpy(&p.alpha, alpha, sizeof p.alpha);
    std::memcpy(&p.beta, beta, sizeof p.beta);
    if (!is_supported(*desc)) return kNotSupported;
    if (desc->epilogue == kBias && (desc->bias == 0 || p.d.type != kF32 || p.d.order != kColumns)) return kInvalidValue;
    return p.is_valid() ? enqueue_product(p, stream) : kInvalidValue;
}
