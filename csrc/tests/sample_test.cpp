// sample.cu against a plain twin: slices that are full, short and of one logit; ties within and across lanes, warps and
// slices; NaN and infinities; outputs poisoned.
#include "../sample.cu"
#include "numbers.h"

using namespace specache;

constexpr float kInf = INFINITY;
static uint64_t seed = 0;

// src/sampler.rs: argmax and check_finite.
static specache_choice twin(const float* logits, uint32_t vocab) {
    specache_choice c{0, SPECACHE_NONE, -kInf, 0};
    bool any = false;
    for (uint32_t i = 0; i < vocab; i++) {
        const float x = logits[i];
        if (x > c.logit || (x == c.logit && !any)) c.token = i, c.logit = x, any = true;
        if (c.first_bad == SPECACHE_NONE && (std::isnan(x) || x == kInf)) c.first_bad = i;
    }
    return c;
}

static void test(const std::vector<float>& logits, uint32_t rows, bool with_tokens) {
    const uint32_t vocab = uint32_t(logits.size()) / rows,
                   slices = (vocab + SPECACHE_ARGMAX_SLICE - 1) / SPECACHE_ARGMAX_SLICE;
    Array<float> in("logits", logits);
    Array<specache_choice> scratch("scratch", rows * slices), choices("choices", rows);
    Array<uint32_t> tokens("tokens", rows);
    const specache_argmax_params p{
        in.address(), scratch.address(), choices.address(), with_tokens ? tokens.address() : 0, rows, vocab};
    specache_launch launch;
    CHECK(specache_argmax_slices_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    CHECK(launch.grid == rows * slices, "%u CTAs", launch.grid);
    device::launch(specache_argmax_slices, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    CHECK(specache_argmax_merge_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    device::launch(specache_argmax_merge, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    choices.download();
    tokens.download();
    for (uint32_t r = 0; r < rows; r++) {
        const specache_choice want = twin(&logits[size_t(r) * vocab], vocab), got = choices[r];
        CHECK(got.token == want.token, "token %u, not %u: row %u of %u, vocabulary %u", got.token, want.token, r, rows,
              vocab);
        CHECK(got.first_bad == want.first_bad, "first bad %u, not %u: row %u, vocabulary %u", got.first_bad,
              want.first_bad, r, vocab);
        CHECK(got.logit == want.logit, "logit %g, not %g: row %u, vocabulary %u", got.logit, want.logit, r, vocab);
        CHECK(tokens[r] == (with_tokens ? want.token : 0xA5A5A5A5u), "tokens[%u] is %u", r, tokens[r]);
    }
}

// Whole numbers, so that the highest occurs often; each row a fault of its own.
static std::vector<float> faulty(Random& random, uint32_t rows, uint32_t vocab) {
    std::vector<float> x(size_t(rows) * vocab);
    for (float& v : x) v = float(int(random() % 50)) - 25;
    for (uint32_t r = 0; r < rows; r++) {
        float* row = &x[size_t(r) * vocab];
        switch (r % 8) {
            case 1:
                row[random() % vocab] = NAN;
                break;
            case 2:
                row[vocab - 1] = kInf;
                break;
            case 3:
                std::fill_n(row, vocab, -kInf);
                break;
            case 4:
                std::fill_n(row, vocab, NAN);
                break;
            case 5:
                row[0] = -kInf, row[vocab - 1] = 100;
                break;
            case 6:
                std::fill_n(row, vocab, -kInf), row[0] = NAN;
                break;
            case 7:
                std::fill_n(row, vocab, 1.5f);
                break;
            default:
                break;
        }
    }
    return x;
}

static void plans() {
    constexpr uint64_t a = 1 << 20;
    const auto expect = [](specache_argmax_params p, specache_status want, const char* part) {
        specache_launch launch;
        for (const auto plan : {specache_argmax_slices_plan, specache_argmax_merge_plan}) {
            const specache_status got = plan(&p, &launch);
            CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
            CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
        }
    };
    expect({a, a, a, a, 2, 128256}, SPECACHE_OK, "");
    expect({0, 0, 0, 0, 0, 128256}, SPECACHE_OK, "");
    expect({a, a, a, a, 17, 128256}, SPECACHE_UNSUPPORTED_ROWS, "17");
    expect({a, a, a, a, 1, 0}, SPECACHE_UNSUPPORTED_WIDTH, "vocabulary");
    expect({a + 2, a, a, a, 1, 5}, SPECACHE_BAD_ADDRESS, "logits");
    expect({a, a + 8, a, a, 1, 5}, SPECACHE_BAD_ADDRESS, "scratch");
}

int main() {
    plans();
    Random random(3);
    int cases = 0;
    for (uint32_t rows : {1u, 2u, 9u, 16u})
        for (uint32_t vocab : {1u, 2u, 31u, 257u, 8192u, 8193u, 20011u}) {
            if (rows > 2 && vocab > 8193) continue;
            test(faulty(random, rows, vocab), rows, rows % 2 == 0);
            test(normals(random, size_t(rows) * vocab, 4), rows, true);
            cases += 2;
        }
    test(std::vector<float>(300000, 2.0f), 1, true);   // more slices than lanes
    std::printf("sample_test: %d cases equal the twin (%s)\n", cases + 1, device::kName);
}
