// dense.cu against plain twins in double: rows that are few, many and not whole blocks, widths around a block's; biases
// and norms or none; rows that are kept nowhere; residual streams that are not finite; outputs poisoned.
#include "../dense.cu"

#include <memory>

#include "numbers.h"

using namespace specache;

static uint64_t seed = 0;
static int launches = 0;

// Half a step of the last place of a result, what fp32 arithmetic before it may add, and half a subnormal step of fp16.
static double bound(specache_dtype dtype, double value, double size) {
    return std::fabs(value) * (dtype == SPECACHE_BF16 ? 0x1p-8 : 0x1p-11) + 4e-6 * size + 0x1p-25;
}

template <class P> static void run(void (*kernel)(P), specache_status (*plan)(const P*, specache_launch*), const P& p) {
    specache_launch launch;
    CHECK(plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    if (launch.grid != 0) device::launch(kernel, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    launches++;
}

// An input that may be absent.
static std::unique_ptr<Array<float>> maybe(bool is, Random& random, const char* name, std::vector<float>& values,
                                           size_t count) {
    values = is ? normals(random, count, 0.5f) : std::vector<float>();
    return is ? std::make_unique<Array<float>>(name, values) : nullptr;
}

static uint64_t address_of(const std::unique_ptr<Array<float>>& array) { return array ? array->address() : 0; }

// ---- norm16 -----------------------------------------------------------------------------------------------------

static void norm(specache_dtype dtype, uint32_t rows, uint32_t hidden, bool noted) {
    Random random(rows + hidden);
    std::vector<float> x = normals(random, size_t(rows) * hidden, 3), w = normals(random, hidden, 1);
    // Rows 1 and 2 are not finite, row 2 was so before, row 3 is all zeros.
    if (rows > 1) x[hidden + hidden / 2] = NAN;
    if (rows > 2) x[3 * size_t(hidden) - 1] = INFINITY;
    if (rows > 3) std::fill_n(x.begin() + 3 * hidden, hidden, 0.0f);
    std::vector<uint32_t> bad(rows, SPECACHE_NONE);
    if (rows > 2) bad[2] = 4;
    Array<float> x_in("x", x), w_in("norm", w);
    Array<uint16_t> y("y", x.size());
    Array<uint32_t> bad_layer("bad_layer", rows);
    Array<uint32_t>::fill(bad_layer, bad);
    const specache_norm16_params p{x_in.address(), w_in.address(), y.address(), noted ? bad_layer.address() : 0,
                                   rows,           hidden,         9,           1e-5f,
                                   dtype,          0};
    run(dtype == SPECACHE_BF16 ? specache_norm16_bf16 : specache_norm16_fp16, specache_norm16_plan, p);
    y.download();
    bad_layer.download();
    for (uint32_t r = 0; r < rows; r++) {
        double squares = 0;
        for (uint32_t i = 0; i < hidden; i++) squares += double(x[r * hidden + i]) * x[r * hidden + i];
        const uint32_t want = !noted || r == 2 ? bad[r] : r == 1 ? 9 : SPECACHE_NONE;
        CHECK(bad_layer[r] == want, "bad layer %u of row %u, not %u", bad_layer[r], r, want);
        for (uint32_t i = 0; i < hidden && std::isfinite(squares); i++) {
            const double v = x[r * hidden + i] / std::sqrt(squares / hidden + 1e-5f) * w[i];
            const float got = widen(dtype, y[r * hidden + i]);
            CHECK(std::fabs(got - v) <= bound(dtype, v, std::fabs(v)), "norm %g, not %g: row %u, %u of %u", got, v, r,
                  i, hidden);
        }
    }
}

// ---- finish_qkv -------------------------------------------------------------------------------------------------

struct Heads {
    specache_dtype dtype;
    uint32_t rows, heads, kv_heads, d;
    bool bias, norm;
};

static void finish(const Heads& c) {
    Random random(c.rows + c.d + c.heads);
    const uint32_t all_heads = c.heads + 2 * c.kv_heads, half = c.d / 2;
    const uint32_t row_bytes = c.kv_heads * SPECACHE_PAGE * 4 * c.d;
    const std::vector<float> products = normals(random, size_t(c.rows) * all_heads * c.d, 2);
    std::vector<float> q_bias, k_bias, v_bias, q_norm, k_norm, rope;
    Array<float> products_in("products", products), q("q", size_t(c.rows) * c.heads * c.d);
    const auto qb = maybe(c.bias, random, "q_bias", q_bias, c.heads * c.d),
               kb = maybe(c.bias, random, "k_bias", k_bias, c.kv_heads * c.d),
               vb = maybe(c.bias, random, "v_bias", v_bias, c.kv_heads * c.d),
               qn = maybe(c.norm, random, "q_norm", q_norm, c.d), kn = maybe(c.norm, random, "k_norm", k_norm, c.d);
    for (uint32_t i = 0; i < c.rows * half; i++)
        rope.push_back(std::cos(0.7f * float(i))), rope.push_back(std::sin(0.7f * float(i)));
    Array<float> rope_in("rope", rope);
    // Rows go to a page each, at tokens of their own; every fifth is kept nowhere.
    Array<uint8_t> pages("pages", size_t(c.rows) * row_bytes);
    std::vector<uint64_t> append;
    const auto token_of = [&](uint32_t r) { return r * 7 % SPECACHE_PAGE; };
    for (uint32_t r = 0; r < c.rows; r++)
        append.push_back(r % 5 == 4 ? 0 : pages.address() + size_t(r) * row_bytes + token_of(r) * 4 * c.d);
    Array<uint64_t> append_in("append", append);
    const specache_finish_qkv_params p{products_in.address(),
                                       address_of(qb),
                                       address_of(kb),
                                       address_of(vb),
                                       address_of(qn),
                                       address_of(kn),
                                       rope_in.address(),
                                       append_in.address(),
                                       q.address(),
                                       c.rows,
                                       c.heads,
                                       c.kv_heads,
                                       c.d,
                                       1e-6f,
                                       c.dtype};
    run(specache_finish_qkv, specache_finish_qkv_plan, p);
    q.download();
    pages.download();

    const std::vector<uint8_t> poison(pages.bytes(), 0xA5);
    std::vector<uint8_t> written(pages.bytes(), 0);
    for (uint32_t r = 0; r < c.rows; r++)
        for (uint32_t h = 0; h < all_heads; h++) {
            const bool is_q = h < c.heads, is_v = h >= c.heads + c.kv_heads;
            const uint32_t own = is_q ? h : is_v ? h - c.heads - c.kv_heads : h - c.heads;
            const std::vector<float>&bias = is_q ? q_bias : is_v ? v_bias : k_bias, &norm = is_q ? q_norm : k_norm;
            std::vector<double> x(c.d);
            double squares = 0;
            for (uint32_t i = 0; i < c.d; i++) {
                x[i] = products[(size_t(r) * all_heads + h) * c.d + i] + (c.bias ? bias[own * c.d + i] : 0);
                squares += x[i] * x[i];
            }
            for (uint32_t i = 0; i < c.d && c.norm && !is_v; i++) x[i] *= norm[i] / std::sqrt(squares / c.d + 1e-6f);
            for (uint32_t i = 0; i < c.d; i++) {
                const double cos = rope[(r * half + i % half) * 2], sin = rope[(r * half + i % half) * 2 + 1];
                const double other = i < half ? -x[i + half] : x[i - half];
                const double want = is_v ? x[i] : x[i] * cos + other * sin, size = std::fabs(x[i]) + std::fabs(other);
                double got, error = 2e-6 * size + 1e-9;
                if (is_q) {
                    got = q[(size_t(r) * c.heads + own) * c.d + i];
                } else {
                    const size_t at = size_t(r) * row_bytes + (own * SPECACHE_PAGE + token_of(r)) * 4 * c.d +
                                      (is_v ? 2 * c.d : 0) + 2 * i;
                    if (append[r] == 0) continue;
                    got = widen(c.dtype, pages[at] | uint32_t(pages[at + 1]) << 8);
                    error = bound(c.dtype, want, size);
                    written[at] = written[at + 1] = 1;
                }
                CHECK(std::fabs(got - want) <= error, "%g, not %g: row %u, head %u, channel %u of %u", got, want, r, h,
                      i, c.d);
            }
        }
    for (size_t i = 0; i < written.size(); i++)
        CHECK(written[i] != 0 || pages[i] == 0xA5, "byte %zu of a page was written", i);
}

// ---- round16, swiglu16 ------------------------------------------------------------------------------------------

static void rounding(specache_dtype dtype, uint32_t count) {
    Random random(count);
    const std::vector<float> x = normals(random, count, 5);
    Array<float> in("x", x);
    Array<uint16_t> y("y", count);
    const specache_round16_params p{in.address(), y.address(), count, dtype, 0};
    run(dtype == SPECACHE_BF16 ? specache_round16_bf16 : specache_round16_fp16, specache_round16_plan, p);
    y.download();
    for (uint32_t i = 0; i < count; i++)
        CHECK(y[i] == narrow(dtype, x[i]), "%g became %g", x[i], widen(dtype, y[i]));
}

static void swiglu(specache_dtype dtype, uint32_t rows, uint32_t width, bool together, bool biases) {
    Random random(rows + width);
    const uint32_t stride = together ? 2 * width : width;
    std::vector<float> gate = normals(random, size_t(rows) * stride, 3), up = normals(random, size_t(rows) * stride, 3);
    if (together) up = gate;
    std::vector<float> gate_bias, up_bias;
    Array<float> gate_in("gate", gate), up_in("up", up);
    const auto gb = maybe(biases, random, "gate_bias", gate_bias, width),
               ub = maybe(biases, random, "up_bias", up_bias, width);
    Array<uint16_t> y("y", size_t(rows) * width);
    const specache_swiglu16_params p{gate_in.address(), together ? gate_in.address() + 4 * width : up_in.address(),
                                     address_of(gb),    address_of(ub),
                                     y.address(),       rows,
                                     width,             stride,
                                     dtype};
    run(dtype == SPECACHE_BF16 ? specache_swiglu16_bf16 : specache_swiglu16_fp16, specache_swiglu16_plan, p);
    y.download();
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < width; i++) {
            const double g = gate[size_t(r) * stride + i] + (biases ? gate_bias[i] : 0);
            const double u = up[size_t(r) * stride + i + (together ? width : 0)] + (biases ? up_bias[i] : 0);
            const double want = g / (1 + std::exp(-g)) * u, got = widen(dtype, y[size_t(r) * width + i]);
            const double size = std::fabs(want) + 0.1 * std::fabs(g) + 0.1 * std::fabs(u);
            CHECK(std::fabs(got - want) <= bound(dtype, want, size), "swiglu %g, not %g: row %u, %u of %u", got, want,
                  r, i, width);
        }
}

// ---- the plans --------------------------------------------------------------------------------------------------

template <class P>
static void expect(specache_status (*plan)(const P*, specache_launch*), P p, void (*change)(P&), specache_status want,
                   const char* part) {
    change(p);
    specache_launch launch;
    const specache_status got = plan(&p, &launch);
    CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
    CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
}

static void plans() {
    constexpr uint64_t a = 1 << 20;
    using N = specache_norm16_params;
    const N n{a, a, a, a, 2000, 4096, 3, 1e-5f, SPECACHE_BF16, 0};
    expect<N>(specache_norm16_plan, n, [](N& p) { p.bad_layer = 0; }, SPECACHE_OK, "");
    expect<N>(specache_norm16_plan, n, [](N& p) { p.n_rows = 0, p.x = 0; }, SPECACHE_OK, "");
    expect<N>(specache_norm16_plan, n, [](N& p) { p.dtype = SPECACHE_FP32; }, SPECACHE_UNSUPPORTED_DTYPE, "fused");
    expect<N>(specache_norm16_plan, n, [](N& p) { p.dtype = 7; }, SPECACHE_UNSUPPORTED_DTYPE, "7");
    expect<N>(specache_norm16_plan, n, [](N& p) { p.hidden = 100; }, SPECACHE_UNSUPPORTED_WIDTH, "100");
    expect<N>(specache_norm16_plan, n, [](N& p) { p.n_rows = ~0u; }, SPECACHE_UNSUPPORTED_ROWS, "rows");
    expect<N>(specache_norm16_plan, n, [](N& p) { p.y += 8; }, SPECACHE_BAD_ADDRESS, "y is");
    using F = specache_finish_qkv_params;
    const F f{a, a, a, a, a, a, a, a, a, 2000, 32, 8, 128, 1e-5f, SPECACHE_BF16};
    expect<F>(specache_finish_qkv_plan, f, [](F& p) { p.q_bias = p.q_norm = p.k_norm = 0; }, SPECACHE_OK, "");
    expect<F>(specache_finish_qkv_plan, f, [](F& p) { p.k_norm = 0; }, SPECACHE_BAD_ADDRESS, "k_norm");
    expect<F>(specache_finish_qkv_plan, f, [](F& p) { p.head_dim = 258; }, SPECACHE_UNSUPPORTED_HEAD_DIM, "258");
    expect<F>(specache_finish_qkv_plan, f, [](F& p) { p.n_kv_heads = 0; }, SPECACHE_UNSUPPORTED_HEADS, "0 KV heads");
    expect<F>(specache_finish_qkv_plan, f, [](F& p) { p.kv_dtype = 2; }, SPECACHE_UNSUPPORTED_DTYPE, "2");
    expect<F>(specache_finish_qkv_plan, f, [](F& p) { p.n_rows = ~0u; }, SPECACHE_TOO_LARGE, "rows");
    expect<F>(specache_finish_qkv_plan, f, [](F& p) { p.append += 4; }, SPECACHE_BAD_ADDRESS, "append");
    using R = specache_round16_params;
    const R r{a, a, 4096, SPECACHE_FP16, 0};
    expect<R>(specache_round16_plan, r, [](R& p) { p.count = 0, p.x = 0; }, SPECACHE_OK, "");
    expect<R>(specache_round16_plan, r, [](R& p) { p.count = 12; }, SPECACHE_UNSUPPORTED_WIDTH, "12");
    expect<R>(specache_round16_plan, r, [](R& p) { p.count = 1ull << 50; }, SPECACHE_TOO_LARGE, "CTAs");
    expect<R>(specache_round16_plan, r, [](R& p) { p.x += 4; }, SPECACHE_BAD_ADDRESS, "x is");
    using S = specache_swiglu16_params;
    const S s{a, a, a, a, a, 2000, 14336, 28672, SPECACHE_BF16};
    expect<S>(specache_swiglu16_plan, s, [](S& p) { p.gate_bias = p.up_bias = 0; }, SPECACHE_OK, "");
    expect<S>(specache_swiglu16_plan, s, [](S& p) { p.stride = 14332; }, SPECACHE_BAD_STRIDE, "14332");
    expect<S>(specache_swiglu16_plan, s, [](S& p) { p.stride += 2; }, SPECACHE_BAD_STRIDE, "28674");
    expect<S>(specache_swiglu16_plan, s, [](S& p) { p.dtype = SPECACHE_FP32; }, SPECACHE_UNSUPPORTED_DTYPE, "fused");
    expect<S>(specache_swiglu16_plan, s, [](S& p) { p.up = 0; }, SPECACHE_BAD_ADDRESS, "up is");
}

int main() {
    plans();
    constexpr specache_dtype h = SPECACHE_FP16, b = SPECACHE_BF16;
    for (uint32_t rows : {1u, 5u, 40u})
        for (uint32_t hidden : {8u, 40u, 1024u, 2056u})
            norm(hidden % 16 ? h : b, rows, hidden, rows % 2 == 1 || hidden > 99);
    const Heads all[] = {{h, 1, 1, 1, 2, false, false},  {b, 19, 4, 2, 64, true, false}, {h, 9, 6, 1, 128, false, true},
                         {b, 33, 3, 3, 256, true, true}, {h, 70, 8, 2, 80, true, false}, {b, 6, 2, 2, 66, false, true}};
    for (const Heads& c : all) finish(c);
    for (uint32_t count : {8u, 2048u, 5000u}) rounding(count % 16 ? b : h, count);
    swiglu(h, 1, 8, false, false);
    swiglu(b, 7, 1000, true, true);
    swiglu(h, 40, 264, true, false);
    swiglu(b, 3, 4096, false, true);
    std::printf("dense_test: %d launches equal the twins (%s)\n", launches, device::kName);
}
