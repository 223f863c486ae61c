// linear.cu against plain twins in double: every entry point, rows 1 to 16, shapes that fill no tile, biases and norms
// on and off, numbers that are not finite; outputs poisoned, several orders of the threads. A row alone has the same
// bits as among fifteen others.
#include <initializer_list>
#include <map>

#include "../linear.cu"
#include "dense_twin.h"

using namespace specache;

#define QKV(dtype, T, N) {"specache_qkv_" #dtype "_n" #N, specache_qkv_##dtype##_n##N},
#define RESIDUAL(dtype, T, N) {"specache_residual_" #dtype "_n" #N, specache_residual_##dtype##_n##N},
#define GATE_UP(dtype, T, N) {"specache_gate_up_" #dtype "_n" #N, specache_gate_up_##dtype##_n##N},
#define LOGITS(dtype, T, N) {"specache_logits_" #dtype "_n" #N, specache_logits_##dtype##_n##N},
static const std::map<std::string, void (*)(specache_qkv_params)> qkv_kernels = {
    SPECACHE_LINEAR_KERNELS(QKV){"specache_head_norm", specache_head_norm}};
static const std::map<std::string, void (*)(specache_gate_up_params)> gate_up_kernels = {
    SPECACHE_LINEAR_KERNELS(GATE_UP)};
static const std::map<std::string, void (*)(specache_linear_params)> linear_kernels_by_name = {
    SPECACHE_LINEAR_KERNELS(RESIDUAL) SPECACHE_LINEAR_KERNELS(LOGITS)};

static uint64_t seed = 0;   // of the next launch
static int launches = 0;

template <class Params>
static void launch(const std::map<std::string, void (*)(Params)>& kernels,
                   specache_status (*plan)(const Params*, specache_launch*), const Params& p) {
    specache_launch l;
    CHECK(plan(&p, &l) == SPECACHE_OK, "%s", l.message);
    device::launch(kernels.at(l.kernel), l.grid, l.block, l.shared_bytes, seed++, p);
    launches++;
}

// ---- results ----------------------------------------------------------------------------------------------------

static void expect_near(double got, double want, double bound, const char* what, size_t row, size_t feature,
                        const std::string& of) {
    CHECK(std::fabs(got - want) <= bound, "%s %.9g, not %.9g (+- %.2g): row %zu, feature %zu (%s)", what, got, want,
          bound, row, feature, of.c_str());
}

// ---- inputs -----------------------------------------------------------------------------------------------------

// Rows of a residual stream: one channel far above the others, row 2 small, row 5 zero.
static std::vector<float> stream(Random& random, size_t rows, size_t width) {
    std::vector<float> x = normals(random, rows * width, 1);
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < width; i++) {
            float& v = x[r * width + i];
            if (i == 7) v *= 300;
            if (r == 2) v *= 0.05f;
            if (r == 5) v = 0;
        }
    return x;
}

// ---- residual and logits ----------------------------------------------------------------------------------------

struct LinearCase {
    specache_dtype dtype;
    size_t rows, k, n;
    bool bias, logits;
};

static std::string name_of(const LinearCase& c) {
    char text[96];
    std::snprintf(text, sizeof text, "%s %s, %zu rows, %zu -> %zu, bias %d", c.logits ? "logits" : "residual",
                  dtype_name(c.dtype), c.rows, c.k, c.n, c.bias);
    return text;
}

// Runs rows [first, first + count) of x; y is the stream before, and after.
static std::vector<float> run_linear(const LinearCase& c, const Matrix& w, const std::vector<float>& x,
                                     const std::vector<float>& norm, const std::vector<float>& bias,
                                     const std::vector<float>& y, size_t first, size_t count) {
    const auto rows = [&](const std::vector<float>& all, size_t width) {
        return std::vector<float>(all.begin() + ptrdiff_t(first * width),
                                  all.begin() + ptrdiff_t((first + count) * width));
    };
    Array<float> in("x", rows(x, c.k)), out("y", count * c.n);
    Array<uint8_t> weight("weight", w.bytes);
    Optional norm_in("norm", norm), bias_in("bias", bias);
    if (!c.logits) Array<float>::fill(out, rows(y, c.n));
    const specache_linear_params p{in.address(),
                                   norm_in.address(),
                                   weight.address(),
                                   bias_in.address(),
                                   out.address(),
                                   uint32_t(count),
                                   uint32_t(c.k),
                                   uint32_t(c.n),
                                   1e-5f,
                                   c.dtype,
                                   0};
    launch(linear_kernels_by_name, c.logits ? specache_logits_plan : specache_residual_plan, p);
    out.download();
    std::vector<float> result(out.size());
    std::memcpy(result.data(), out.data(), out.bytes());
    return result;
}

static void test_linear(const LinearCase& c) {
    Random random(unsigned(c.rows + 31 * c.k + 97 * c.n + c.dtype));
    const Matrix w(random, c.dtype, c.n, c.k);
    const std::vector<float> x = stream(random, c.rows, c.k), y = normals(random, c.rows * c.n, 2);
    const std::vector<float> norm = c.logits ? norm_weight(random, c.k) : std::vector<float>();
    const std::vector<float> bias = maybe(c.bias, random, c.n);
    const std::vector<float> got = run_linear(c, w, x, norm, bias, y, 0, c.rows);
    for (size_t r = 0; r < c.rows; r++) {
        const std::vector<double> input = normed(row_of(x, r, c.k), norm, 1e-5f);
        for (size_t f = 0; f < c.n; f++) {
            Sum want = product(w, f, input, bias);
            if (!c.logits) want = Sum{want.value + y[r * c.n + f], want.size + std::fabs(y[r * c.n + f])};
            expect_near(got[r * c.n + f], want.value, tolerance(want.size), "y", r, f, name_of(c));
        }
    }
    const size_t last = c.rows - 1;
    const std::vector<float> alone = run_linear(c, w, x, norm, bias, y, last, 1);
    CHECK(std::memcmp(alone.data(), &got[last * c.n], c.n * 4) == 0, "a row alone differs (%s)", name_of(c).c_str());
}

// fp16 has a narrow range: a stream of 5e5 still gives numbers. A row of NaN leaves the others alone.
static void test_extremes(specache_dtype dtype) {
    const LinearCase c{dtype, 9, 96, 33, false, true};
    Random random(5);
    const Matrix w(random, dtype, c.n, c.k);
    std::vector<float> x = stream(random, c.rows, c.k);
    const std::vector<float> norm = norm_weight(random, c.k);
    x[3 * c.k + 50] = 5e5f;
    x[4 * c.k + 95] = NAN;
    x[8 * c.k] = INFINITY;
    const std::vector<float> got = run_linear(c, w, x, norm, {}, {}, 0, c.rows);
    for (size_t r = 0; r < c.rows; r++) {
        const std::vector<double> input = normed(row_of(x, r, c.k), norm, 1e-5f);
        for (size_t f = 0; f < c.n; f++) {
            const Sum want = product(w, f, input, {});
            const float y = got[r * c.n + f];
            if (r == 4 || r == 8) CHECK(!std::isfinite(y), "row %zu is %g (%s)", r, y, dtype_name(dtype));
            else expect_near(y, want.value, tolerance(want.size), "y", r, f, name_of(c));
        }
    }
}

// ---- gate and up ------------------------------------------------------------------------------------------------

struct GateUpCase {
    specache_dtype dtype;
    size_t rows, hidden, intermediate;
    bool bias;
};

static void test_gate_up(const GateUpCase& c) {
    Random random(unsigned(c.rows + 31 * c.hidden + 97 * c.intermediate + c.dtype));
    const Matrix gate(random, c.dtype, c.intermediate, c.hidden), up(random, c.dtype, c.intermediate, c.hidden);
    const std::vector<float> x = stream(random, c.rows, c.hidden), norm = norm_weight(random, c.hidden);
    const std::vector<float> gate_bias = maybe(c.bias, random, c.intermediate);
    const std::vector<float> up_bias = maybe(c.bias, random, c.intermediate);
    Array<float> in("x", x), norm_in("norm", norm), y("y", c.rows * c.intermediate);
    Array<uint8_t> gate_in("gate", gate.bytes), up_in("up", up.bytes);
    Optional gate_bias_in("gate_bias", gate_bias), up_bias_in("up_bias", up_bias);
    const specache_gate_up_params p{in.address(),
                                    norm_in.address(),
                                    gate_in.address(),
                                    up_in.address(),
                                    gate_bias_in.address(),
                                    up_bias_in.address(),
                                    y.address(),
                                    uint32_t(c.rows),
                                    uint32_t(c.hidden),
                                    uint32_t(c.intermediate),
                                    1e-6f,
                                    c.dtype,
                                    0};
    launch(gate_up_kernels, specache_gate_up_plan, p);
    y.download();
    char name[96];
    std::snprintf(name, sizeof name, "gate_up %s, %zu rows, %zu -> %zu, bias %d", dtype_name(c.dtype), c.rows, c.hidden,
                  c.intermediate, c.bias);
    for (size_t r = 0; r < c.rows; r++) {
        const std::vector<double> input = normed(row_of(x, r, c.hidden), norm, 1e-6f);
        for (size_t f = 0; f < c.intermediate; f++) {
            const Sum g = product(gate, f, input, gate_bias), u = product(up, f, input, up_bias);
            const double silu = g.value / (1 + std::exp(-g.value));
            // The slope of silu is at most 1.1; expf is good to a few last places.
            const double bound = 1.1 * tolerance(g.size) * std::fabs(u.value) +
                                 std::fabs(silu) * (tolerance(u.size) + 1e-6 * std::fabs(u.value));
            expect_near(y[r * c.intermediate + f], silu * u.value, bound + 1e-30, "y", r, f, name);
        }
    }
}

// ---- q, k, v ----------------------------------------------------------------------------------------------------

struct QkvCase {
    specache_dtype dtype, kv_dtype;
    size_t rows, hidden, heads, kv_heads, d;
    bool bias, head_norm;
};

constexpr size_t kPageTokens = SPECACHE_PAGE, kSlots = 5;   // wide pages of the pool

// Page and token of each row: rows of one sequence cross a page border; row 3 is kept nowhere.
static bool kept(size_t row) { return row != 3; }
static size_t slot_of(size_t row) { return (row * 3 + row / 4) % kSlots; }
static size_t token_of(size_t row) { return row % 2 == 0 ? 63 - row : row; }

static void test_qkv(const QkvCase& c) {
    char name[128];
    std::snprintf(name, sizeof name, "qkv %s, cache %s, %zu rows, hidden %zu, heads %zu/%zu of %zu, bias %d, norm %d",
                  dtype_name(c.dtype), dtype_name(c.kv_dtype), c.rows, c.hidden, c.heads, c.kv_heads, c.d, c.bias,
                  c.head_norm);
    Random random(unsigned(c.rows + 31 * c.hidden + 97 * c.d + c.dtype));
    const Matrix wq(random, c.dtype, c.heads * c.d, c.hidden), wk(random, c.dtype, c.kv_heads * c.d, c.hidden),
        wv(random, c.dtype, c.kv_heads * c.d, c.hidden);
    std::vector<float> x = stream(random, c.rows, c.hidden);
    const std::vector<float> norm = norm_weight(random, c.hidden);
    const std::vector<float> bq = maybe(c.bias, random, wq.n), bk = maybe(c.bias, random, wk.n),
                             bv = maybe(c.bias, random, wv.n);
    const std::vector<float> nq = c.head_norm ? norm_weight(random, c.d) : std::vector<float>();
    const std::vector<float> nk = c.head_norm ? norm_weight(random, c.d) : std::vector<float>();
    if (c.rows > 6) x[6 * c.hidden + 11] = NAN;
    std::vector<float> rope;
    for (size_t r = 0; r < c.rows; r++)
        for (size_t i = 0; i < c.d / 2; i++) {
            const float angle = float(r * 1000) * std::pow(1e-4f, float(i) / float(c.d / 2));
            rope.push_back(std::cos(angle));
            rope.push_back(std::sin(angle));
        }
    const size_t pair = 2 * c.d, head = kPageTokens * pair, page = c.kv_heads * head;   // in 16-bit numbers
    Array<uint16_t> pool("wide pages", kSlots * page);
    std::vector<uint64_t> append;
    for (size_t r = 0; r < c.rows; r++)
        append.push_back(kept(r) ? pool.address() + 2 * (slot_of(r) * page + token_of(r) * pair) : 0);
    std::vector<uint32_t> noted(c.rows, SPECACHE_NONE);
    if (c.rows > 8) noted[8] = 2;   // of an earlier layer: it stays

    Array<float> in("x", x), norm_in("norm", norm), rope_in("rope", rope);
    Array<uint8_t> q_weight("q_weight", wq.bytes), k_weight("k_weight", wk.bytes), v_weight("v_weight", wv.bytes);
    Optional q_bias("q_bias", bq), k_bias("k_bias", bk), v_bias("v_bias", bv), q_norm("q_norm", nq),
        k_norm("k_norm", nk);
    Array<float> k_scratch("k", c.rows * wk.n), q("q", c.rows * wq.n);
    Array<uint64_t> append_in("append", append);
    Array<uint32_t> bad("bad_layer", c.rows);
    Array<uint32_t>::fill(bad, noted);
    const specache_qkv_params p{in.address(),
                                norm_in.address(),
                                q_weight.address(),
                                k_weight.address(),
                                v_weight.address(),
                                q_bias.address(),
                                k_bias.address(),
                                v_bias.address(),
                                q_norm.address(),
                                k_norm.address(),
                                c.head_norm ? k_scratch.address() : 0,
                                rope_in.address(),
                                append_in.address(),
                                q.address(),
                                bad.address(),
                                uint32_t(c.rows),
                                uint32_t(c.hidden),
                                uint32_t(c.heads),
                                uint32_t(c.kv_heads),
                                uint32_t(c.d),
                                7,
                                1e-6f,
                                c.dtype,
                                c.kv_dtype,
                                0};
    launch(qkv_kernels, specache_qkv_plan, p);
    if (c.head_norm) launch(qkv_kernels, specache_head_norm_plan, p);
    for (device::Buffer* b : std::initializer_list<device::Buffer*>{&q, &pool, &bad}) b->download();

    std::vector<bool> written(pool.size());
    for (size_t r = 0; r < c.rows; r++) {
        const bool nan = r == 6;
        const uint32_t want_bad = nan ? 7 : noted[r];
        CHECK(bad[r] == want_bad, "bad layer %u, not %u: row %zu (%s)", bad[r], want_bad, r, name);
        const std::vector<double> input = normed(row_of(x, r, c.hidden), norm, 1e-6f);
        const float* cos_sin = &rope[r * c.d];
        Heads want_q(wq, input, bq), want_k(wk, input, bk), want_v(wv, input, bv);
        want_q.norm(c.d, nq, 1e-6f);
        want_k.norm(c.d, nk, 1e-6f);
        want_q.rotate(c.d, cos_sin);
        want_k.rotate(c.d, cos_sin);
        for (size_t f = 0; f < wq.n; f++) {
            const float got = q[r * wq.n + f];
            if (nan) CHECK(std::isnan(got), "q of a row of NaN is %g (%s)", got, name);
            else expect_near(got, want_q.value[f], want_q.bound[f], "q", r, f, name);
        }
        for (size_t f = 0; f < wk.n && kept(r); f++)
            for (size_t part = 0; part < 2; part++) {
                const Heads& want = part == 0 ? want_k : want_v;
                const size_t at = slot_of(r) * page + f / c.d * head + token_of(r) * pair + part * c.d + f % c.d;
                const double value = want.value[f], unit = c.kv_dtype == SPECACHE_BF16 ? 0x1p-8 : 0x1p-11;
                const double bound = want.bound[f] + std::fabs(value) * unit * 1.01 + 0x1p-25;
                written[at] = true;
                if (!nan) expect_near(widen(c.kv_dtype, pool[at]), value, bound, part == 0 ? "k" : "v", r, f, name);
                else if (part == 0) CHECK(std::isnan(widen(c.kv_dtype, pool[at])), "k of a row of NaN (%s)", name);
                else CHECK(widen(c.kv_dtype, pool[at]) == 0, "v of a row of NaN is not 0 (%s)", name);
            }
    }
    for (size_t i = 0; i < pool.size(); i++)
        CHECK(written[i] || pool[i] == 0x0101 * device::Buffer::kPoison, "something was kept at number %zu (%s)", i,
              name);
}

// ---- the plans --------------------------------------------------------------------------------------------------

template <class P>
static void expect_status(specache_status (*plan)(const P*, specache_launch*), P p, specache_status want,
                          const char* part, void (*change)(P&)) {
    change(p);
    specache_launch l;
    const specache_status got = plan(&p, &l);
    CHECK(got == want, "status %d, not %d: %s", got, want, l.message);
    CHECK(std::strstr(l.message, part), "'%s' does not name '%s'", l.message, part);
}

static void plans() {
    constexpr uint64_t a = 1 << 20;
    const specache_linear_params linear{a, 0, a, 0, 2 * a, 2, 4096, 4096, 1e-5f, SPECACHE_BF16, 0};
    const auto refuse_linear = [&](specache_status want, const char* part, void (*change)(specache_linear_params&)) {
        expect_status(specache_residual_plan, linear, want, part, change);
    };
    using L = specache_linear_params;
    refuse_linear(SPECACHE_OK, "", [](L&) {});
    refuse_linear(SPECACHE_OK, "", [](L& p) { p.n_rows = 0, p.x = 0; });
    refuse_linear(SPECACHE_OK, "", [](L& p) { p.k = 65536, p.n = 262144 - 1; });
    refuse_linear(SPECACHE_UNSUPPORTED_ROWS, "17 rows", [](L& p) { p.n_rows = 17; });
    refuse_linear(SPECACHE_UNSUPPORTED_WIDTH, "100 input", [](L& p) { p.k = 100; });
    refuse_linear(SPECACHE_UNSUPPORTED_WIDTH, "24 input", [](L& p) { p.k = 24; });
    refuse_linear(SPECACHE_UNSUPPORTED_WIDTH, "0 output", [](L& p) { p.n = 0; });
    refuse_linear(SPECACHE_UNSUPPORTED_DTYPE, "dtype 3", [](L& p) { p.dtype = 3; });
    refuse_linear(SPECACHE_BAD_ADDRESS, "weight", [](L& p) { p.weight += 8; });
    refuse_linear(SPECACHE_BAD_ADDRESS, "one buffer", [](L& p) { p.y = p.x; });
    refuse_linear(SPECACHE_BAD_ADDRESS, "no norm", [](L& p) { p.norm = p.x; });
    refuse_linear(SPECACHE_BAD_ADDRESS, "bias", [](L& p) { p.bias = 2; });
    expect_status(specache_logits_plan, linear, SPECACHE_BAD_ADDRESS, "norm", +[](L&) {});

    using G = specache_gate_up_params;
    const G gate_up{a, a, a, a, 0, 0, a, 2, 4096, 14336, 1e-5f, SPECACHE_FP16, 0};
    expect_status(specache_gate_up_plan, gate_up, SPECACHE_OK, "", +[](G&) {});
    expect_status(specache_gate_up_plan, gate_up, SPECACHE_BAD_ADDRESS, "up_weight", +[](G& p) { p.up_weight = 0; });

    using Q = specache_qkv_params;
    const Q qkv{
        a, a, a, a, a, 0, 0, 0, 0, 0, 0, a, a, a, a, 2, 4096, 32, 8, 128, 0, 1e-5f, SPECACHE_BF16, SPECACHE_BF16, 0};
    expect_status(specache_qkv_plan, qkv, SPECACHE_OK, "", +[](Q&) {});
    expect_status(specache_head_norm_plan, qkv, SPECACHE_OK, "", +[](Q&) {});
    expect_status(specache_qkv_plan, qkv, SPECACHE_UNSUPPORTED_HEAD_DIM, "257", +[](Q& p) { p.head_dim = 257; });
    expect_status(specache_qkv_plan, qkv, SPECACHE_UNSUPPORTED_HEAD_DIM, "512", +[](Q& p) { p.head_dim = 512; });
    expect_status(specache_qkv_plan, qkv, SPECACHE_UNSUPPORTED_WIDTH, "heads", +[](Q& p) { p.n_kv_heads = 64; });
    expect_status(specache_qkv_plan, qkv, SPECACHE_UNSUPPORTED_DTYPE, "cache", +[](Q& p) { p.kv_dtype = 5; });
    expect_status(specache_qkv_plan, qkv, SPECACHE_BAD_ADDRESS, "k_norm", +[](Q& p) { p.q_norm = p.x; });
    expect_status(specache_qkv_plan, qkv, SPECACHE_BAD_ADDRESS, "k is", +[](Q& p) { p.q_norm = p.k_norm = p.x; });
    expect_status(specache_qkv_plan, qkv, SPECACHE_BAD_ADDRESS, "append", +[](Q& p) { p.append = 0; });
    specache_launch l;
    specache_residual_plan(&linear, &l);
    CHECK(l.grid == 128 && l.block == 256 && l.shared_bytes == 65536, "%u CTAs of %u threads, %u bytes", l.grid, l.block,
          l.shared_bytes);
    specache_head_norm_plan(&qkv, &l);
    CHECK(l.grid == 0, "a launch for norms that are not there");
}

int main() {
    constexpr specache_dtype h = SPECACHE_FP16, b = SPECACHE_BF16, f = SPECACHE_FP32;
    plans();
    // Steps: none for some warps (32), a chunk that ends early (40, 72, 264), more than are in flight (2600, 5160).
    for (const LinearCase& c : {LinearCase{b, 1, 32, 16, false, false},
                                {h, 2, 40, 32, true, false},
                                {b, 3, 72, 17, true, true},
                                {h, 7, 264, 33, false, true},
                                {b, 8, 512, 48, false, false},
                                {h, 9, 528, 31, true, false},
                                {b, 16, 2600, 32, true, true},
                                {h, 16, 1024, 1, false, false},
                                {b, 2, 2600, 64, false, false},
                                {h, 1, 2600, 100, false, true},
                                {b, 9, 5160, 20, false, false},
                                {b, 2, 136, 2700, true, false},
                                {h, 16, 520, 2688, false, true},
                                {f, 3, 40, 33, true, true},
                                {f, 8, 2600, 32, false, false},
                                {f, 16, 1032, 20, false, true}})
        test_linear(c);
    test_extremes(b);
    test_extremes(h);
    test_extremes(f);
    for (const GateUpCase& c : {GateUpCase{b, 1, 64, 16, false},
                                {h, 2, 104, 40, true},
                                {b, 8, 1056, 17, false},
                                {h, 9, 512, 16, false},
                                {b, 16, 72, 33, true},
                                {f, 9, 552, 17, true},
                                {b, 3, 72, 1350, false}})
        test_gate_up(c);
    for (const QkvCase& c : {QkvCase{b, b, 1, 64, 2, 1, 64, false, false},
                             {b, h, 2, 104, 4, 2, 32, true, false},
                             {h, h, 3, 64, 2, 2, 128, false, true},
                             {h, b, 7, 512, 2, 1, 48, true, false},
                             {b, b, 8, 136, 3, 1, 64, true, true},
                             {h, h, 9, 72, 1, 1, 80, false, false},
                             {b, b, 16, 264, 2, 1, 128, true, true},
                             {b, b, 16, 1056, 2, 1, 32, false, false},
                             {b, b, 2, 40, 1, 1, 256, false, true},
                             {h, b, 1, 32, 1, 1, 2, true, true},
                             {f, b, 2, 136, 2, 1, 64, true, false},
                             {f, h, 9, 72, 1, 1, 32, true, true},
                             {b, b, 2, 40, 12, 6, 128, false, false}})
        test_qkv(c);
    std::printf("linear_test: %d launches equal the twins (%s)\n", launches, device::kName);
}
