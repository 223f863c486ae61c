// pack.cu against a plain twin: every (D, bits, g, dtype), edge inputs, wide pages in any order, outputs poisoned,
// several orders of the threads. The page is read through the documented places of kv_layout.cuh, which layout_test
// shows to tile it.
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../pack.cu"
#include "check.h"
#include "device.h"
#include "dtype.h"

using namespace specache;

using Kernel = void (*)(specache_pack_params);

static const std::map<std::string, Kernel>& kernels() {
#define ENTRY(D, B, dtype, T) {"specache_pack_d" #D "_b" #B "_" #dtype, specache_pack_d##D##_b##B##_##dtype},
    static const std::map<std::string, Kernel> all = {SPECACHE_PACK_KERNELS(ENTRY)};
#undef ENTRY
    return all;
}

// ---- the twin ---------------------------------------------------------------------------------------------------

struct Group {
    uint16_t zero, scale;   // fp16 bits
    std::vector<int> codes;
};

// method.md, "The cache": zero and scale rounded first, true division, half to even. -0 and +0 are one number.
static Group quantise(const std::vector<float>& values, int bits) {
    float low = INFINITY, high = -INFINITY;
    for (float x : values) {
        if (x < low) low = x;
        if (x > high) high = x;
    }
    low = low == 0 ? 0.0f : low;
    high = high == 0 ? 0.0f : high;
    const int top = (1 << bits) - 1;
    const float zero = bits == 1 ? (3.0f * low + high) / 4.0f : low;
    const float scale = bits == 1 ? (high - low) / 2.0f : (high - low) / float(top);
    Group out{uint16_t(narrow(SPECACHE_FP16, zero)), uint16_t(narrow(SPECACHE_FP16, scale)), {}};
    const float z = widen(SPECACHE_FP16, out.zero), s = widen(SPECACHE_FP16, out.scale);
    for (float x : values) {
        const float level = s == 0 ? 0 : nearbyintf((x - z) / s);
        out.codes.push_back(level >= top ? top : level > 0 ? int(level) : 0);
    }
    return out;
}

// ---- inputs -----------------------------------------------------------------------------------------------------

enum Kind { kNormal, kConstant, kSignedZeros, kTies, kLarge, kTiny, kKinds };

static float value(Kind kind, specache_dtype dtype, int bits, int token, int channel, std::mt19937& random) {
    static std::normal_distribution<float> normal;
    const int top = (1 << bits) - 1;
    switch (kind) {
        case kNormal:
            return normal(random) * (channel % 17 == 3 ? 20.0f : 1.0f);   // K has outlier channels
        case kConstant:
            return (token / 32 + channel / 32) % 2 ? -1.75f : 0.0f;
        case kSignedZeros:
            return random() % 2 ? -0.0f : random() % 3 ? 0.0f : -1e-8f;
        // Halves of a level between 0 and top (1 bit: quarters of 0 .. 4): every group holds both ends.
        case kTies:
            if ((token + channel) % 32 < 2) return (token + channel) % 32 ? float(bits == 1 ? 4 : top) : 0.0f;
            return 0.5f * float(random() % (bits == 1 ? 9 : 2 * top + 1));
        // bf16 reaches far beyond fp16: zero and scale become infinite there, and nothing may trap.
        case kLarge:
            return normal(random) * (dtype == SPECACHE_BF16 ? (channel % 2 ? 1e37f : 3e4f) : 2e4f);
        default:
            return normal(random) * (dtype == SPECACHE_BF16 && channel % 2 ? 1e-39f : 1e-7f);
    }
}

// ---- one launch and its comparison ------------------------------------------------------------------------------

struct Case {
    uint32_t d, bits, g;
    specache_dtype dtype;
    uint64_t seed;
};

// Three of five wide pages, anywhere, become the packed pages 1 to 3 of five.
constexpr uint32_t kHeads = 2, kListed = 3, kPages = 5, kFirstPacked = 1;
constexpr uint32_t kWideIndex[kListed] = {4, 0, 2};

static std::string name_of(const Case& c) {
    char text[80];
    std::snprintf(text, sizeof text, "D %u, %u bits, g %u, %s, seed %u", c.d, c.bits, c.g,
                  c.dtype == SPECACHE_BF16 ? "bf16" : "fp16", unsigned(c.seed));
    return text;
}

static void fill_wide(const Case& c, device::Buffer& wide) {
    std::mt19937 random(unsigned(c.seed + c.d + 3 * c.bits + 7 * c.g));
    uint16_t* at = reinterpret_cast<uint16_t*>(wide.data());
    for (uint32_t page = 0; page < kPages; page++)
        for (uint32_t head = 0; head < kHeads; head++) {
            const Kind kind = Kind((page * kHeads + head + c.seed) % kKinds);
            for (int token = 0; token < kPage; token++)
                for (uint32_t i = 0; i < 2 * c.d; i++)
                    *at++ = uint16_t(narrow(c.dtype, value(kind, c.dtype, int(c.bits), token, int(i % c.d), random)));
        }
}

static uint16_t fp16_at(const uint8_t* page, int byte) {
    uint16_t bits;
    std::memcpy(&bits, page + byte, 2);
    return bits;
}

template <int B> static int code_at(const uint8_t* page, CodePlace at) {
    return page[at.byte] >> at.bit & ((1 << B) - 1);
}

template <int D, int B> static void compare_k(const Case& c, const uint8_t* wide, const uint8_t* page) {
    using Page = PackedPage<D, B>;
    const int g = int(c.g);
    for (int channel = 0; channel < D; channel++)
        for (int group = 0; group < kPage / g; group++) {
            std::vector<float> values;
            for (int t = 0; t < g; t++)
                values.push_back(widen(c.dtype, fp16_at(wide, ((group * g + t) * 2 * D + channel) * 2)));
            const Group want = quantise(values, B);
            const int scale = fp16_at(page, Page::k_param(Page::k_scale(g), group, channel));
            const int zero = fp16_at(page, Page::k_param(Page::k_zero(g), group, channel));
            CHECK(scale == want.scale, "K scale %04x, not %04x: channel %d (%s)", scale, want.scale, channel,
                  name_of(c).c_str());
            CHECK(zero == want.zero, "K zero %04x, not %04x: channel %d (%s)", zero, want.zero, channel,
                  name_of(c).c_str());
            for (int t = 0; t < g; t++) {
                const int code = code_at<B>(page, Page::k_code(group * g + t, channel));
                CHECK(code == want.codes[t], "K code %d, not %d: token %d, channel %d (%s)", code, want.codes[t],
                      group * g + t, channel, name_of(c).c_str());
            }
        }
}

template <int D, int B> static void compare_v(const Case& c, const uint8_t* wide, const uint8_t* page) {
    using Page = PackedPage<D, B>;
    const int g = int(c.g);
    for (int token = 0; token < kPage; token++)
        for (int group = 0; group < D / g; group++) {
            std::vector<float> values;
            for (int i = 0; i < g; i++)
                values.push_back(widen(c.dtype, fp16_at(wide, (token * 2 * D + D + group * g + i) * 2)));
            const Group want = quantise(values, B);
            const int scale = fp16_at(page, Page::v_param(Page::v_scale(g), group, token));
            const int zero = fp16_at(page, Page::v_param(Page::v_zero(g), group, token));
            CHECK(scale == want.scale, "V scale %04x, not %04x: token %d (%s)", scale, want.scale, token,
                  name_of(c).c_str());
            CHECK(zero == want.zero, "V zero %04x, not %04x: token %d (%s)", zero, want.zero, token,
                  name_of(c).c_str());
            for (int i = 0; i < g; i++) {
                const int code = code_at<B>(page, Page::v_code(g, token, group * g + i));
                CHECK(code == want.codes[i], "V code %d, not %d: token %d, channel %d (%s)", code, want.codes[i], token,
                      group * g + i, name_of(c).c_str());
            }
        }
}

static void expect_untouched(const device::Buffer& packed, const std::vector<bool>& written) {
    for (size_t i = 0; i < packed.bytes(); i++)
        CHECK(written[i] || packed.data()[i] == device::Buffer::kPoison, "byte %zu of a page that was not listed", i);
}

template <int D, int B> static void run(const Case& c) {
    const uint64_t wide_page = uint64_t(kHeads) * kPage * 4 * D, head = PackedPage<D, B>::bytes(int(c.g));
    device::Buffer wide("wide", kPages * wide_page, device::Buffer::kRead);
    device::Buffer packed("packed", kPages * kHeads * head, device::Buffer::kWrite);
    device::Buffer wide_pages("wide_pages", kListed * sizeof(uint64_t), device::Buffer::kRead);
    fill_wide(c, wide);
    for (uint32_t i = 0; i < kListed; i++)
        reinterpret_cast<uint64_t*>(wide_pages.data())[i] = wide.address() + kWideIndex[i] * wide_page;

    specache_pack_params p{};
    p.wide_pages = wide_pages.address();
    p.packed = packed.address() + kFirstPacked * kHeads * head;
    p.n_pages = kListed;
    p.n_kv_heads = kHeads;
    p.head_dim = c.d;
    p.bits = c.bits;
    p.group_size = c.g;
    p.dtype = c.dtype;
    specache_launch launch;
    CHECK(specache_pack_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    for (device::Buffer* b : {&wide, &wide_pages, &packed}) b->upload();
    device::launch(kernels().at(launch.kernel), launch.grid, launch.block, launch.shared_bytes, c.seed, p);
    packed.download();

    std::vector<bool> written(packed.bytes());
    for (uint32_t i = 0; i < kListed; i++)
        for (uint32_t h = 0; h < kHeads; h++) {
            const uint8_t* from = wide.data() + kWideIndex[i] * wide_page + h * (kPage * 4 * D);
            const size_t at = ((kFirstPacked + i) * kHeads + h) * head;
            compare_k<D, B>(c, from, packed.data() + at);
            compare_v<D, B>(c, from, packed.data() + at);
            std::fill_n(written.begin() + ptrdiff_t(at), head, true);
        }
    expect_untouched(packed, written);
}

static void run_any(const Case& c) {
#define RUN(D, B, dtype_name, T) \
    if (c.d == D && c.bits == B && c.dtype == SPECACHE_DTYPE(dtype_name)) return run<D, B>(c);
    SPECACHE_PACK_KERNELS(RUN)
#undef RUN
}

// ---- the plan ---------------------------------------------------------------------------------------------------

static void expect_status(specache_status want, const char* part, void (*change)(specache_pack_params&)) {
    specache_pack_params p{1 << 20, 1 << 20, 3, 2, 128, 2, 64, SPECACHE_BF16};
    change(p);
    specache_launch launch;
    const specache_status got = specache_pack_plan(&p, &launch);
    CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
    CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
}

static void plans() {
    using P = specache_pack_params;
    expect_status(SPECACHE_OK, "", [](P&) {});
    expect_status(SPECACHE_OK, "", [](P& p) { p.n_pages = 0, p.wide_pages = 0; });
    expect_status(SPECACHE_UNSUPPORTED_HEAD_DIM, "96", [](P& p) { p.head_dim = 96; });
    expect_status(SPECACHE_UNSUPPORTED_BITS, "3 bits", [](P& p) { p.bits = 3; });
    expect_status(SPECACHE_UNSUPPORTED_GROUP_SIZE, "128", [](P& p) { p.group_size = 128; });
    expect_status(SPECACHE_UNSUPPORTED_DTYPE, "7", [](P& p) { p.dtype = 7; });
    expect_status(SPECACHE_BAD_ADDRESS, "wide_pages", [](P& p) { p.wide_pages = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "wide_pages", [](P& p) { p.wide_pages += 4; });
    expect_status(SPECACHE_BAD_ADDRESS, "packed", [](P& p) { p.packed += 64; });
    expect_status(SPECACHE_TOO_LARGE, "CTAs", [](P& p) { p.n_pages = 1u << 30; });
}

int main() {
    plans();
    int cases = 0;
    for (uint64_t seed : {0, 1, 2})
        for (uint32_t d : {64, 128})
            for (uint32_t bits : {1, 2, 4})
                for (uint32_t g : {32, 64})
                    for (specache_dtype dtype : {SPECACHE_FP16, SPECACHE_BF16}) {
                        run_any(Case{d, bits, g, dtype, seed});
                        cases++;
                    }
    std::printf("pack_test: %d cases of %u pages x %u heads equal the twin (%s)\n", cases, kListed, kHeads,
                device::kName);
}
