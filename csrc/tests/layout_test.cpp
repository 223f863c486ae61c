// kv_layout.cuh: the places of codes and parameters tile a page, and what a lane loads is an A operand of mma.m16n8k16.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "../kv_layout.cuh"
#include "../ptx.cuh"
#include "check.h"
#include "device.h"

using namespace specache;

// Every bit of the page is one code's bit or one parameter's, and nobody's twice.
template <int D, int B> static void tiles_the_page(int g) {
    using Page = PackedPage<D, B>;
    std::vector<int> uses(size_t(Page::bytes(g)) * 8);
    auto use = [&](int byte, int bit, int bits) {
        for (int i = 0; i < bits; i++) uses.at(size_t(byte * 8 + bit + i))++;
    };
    for (int token = 0; token < kPage; token++)
        for (int channel = 0; channel < D; channel++) {
            const CodePlace k = Page::k_code(token, channel), v = Page::v_code(g, token, channel);
            CHECK(k.bit + B <= 8 && v.bit + B <= 8, "a code crosses a byte");
            use(k.byte, k.bit, B);
            use(v.byte, v.bit, B);
        }
    for (int part : {Page::k_scale(g), Page::k_zero(g)})
        for (int i = 0; i < kPage / g * D; i++) use(Page::k_param(part, i / D, i % D), 0, 16);
    for (int part : {Page::v_scale(g), Page::v_zero(g)})
        for (int i = 0; i < D / g * kPage; i++) use(Page::v_param(part, i / kPage, i % kPage), 0, 16);
    for (size_t i = 0; i < uses.size(); i++)
        CHECK(uses[i] == 1, "bit %zu is used %d times (D %d, b %d, g %d)", i, uses[i], D, B, g);
}

// out[row][8] = sum over k of code[row][k] * b[k][8] for `tiles` tiles of 16 rows; one warp. b: [8][K_LEN] integers.
template <int K_LEN, int B>
__global__ void product(uint64_t codes, uint64_t b_address, uint64_t out_address, int tiles) {
    const float* b = reinterpret_cast<const float*>(b_address);
    float* out = reinterpret_cast<float*>(out_address);
    const int lane = int(threadIdx.x), i = lane / 4, j = lane % 4;
    for (int tile = 0; tile < tiles; tile++) {
        float sum[4] = {0, 0, 0, 0};
        for (int w = 0; w < kTileWords<K_LEN, B>; w++) {
            const int at_byte = word_byte(tile * kTileWords<K_LEN, B> + w, lane);
            const uint32_t word = load_u32(reinterpret_cast<const uint8_t*>(codes) + at_byte);
            for (int step = 0; step < kOctetsPerWord<B> / 2; step++) {
                uint32_t a[4], operand[2];
                code_fragment<B>(word, step, a);
                for (int h = 0; h < 2; h++) {
                    const int octet = w * kOctetsPerWord<B> + 2 * step + h;
                    // 2^-e goes into B, with 2^4 to keep it among the normal numbers.
                    const float fold = ldexpf(1.0f, 4 - code_exponent<B>(octet));
                    const float* at = b + i * K_LEN + octet * 8 + 2 * j;
                    operand[h] = Fp16::narrow(at[0] * fold, at[1] * fold);
                }
                mma_m16n8k16(sum, a, operand[0], operand[1]);
            }
        }
        for (int e = 0; e < 4; e++)
            out[(tile * 16 + i + e / 2 * 8) * 8 + 2 * j + e % 2] = sum[e] * 1048576.0f;   // 2^(24 - 4)
    }
}

struct Floats : device::Buffer {
    Floats(const char* name, int n) : device::Buffer(name, size_t(n) * 4, kWrite) {}
    float& operator[](int i) { return reinterpret_cast<float*>(data())[i]; }
};

// Random codes put where kv_layout says; small integers keep every sum exact.
template <int D, int B> static void is_an_a_operand() {
    using Page = PackedPage<D, B>;
    std::mt19937 random(D + B);
    device::Buffer page("page", size_t(Page::bytes(64)), device::Buffer::kRead);
    std::memset(page.data(), 0, page.bytes());
    std::vector<int> k(kPage * D), v(kPage * D);
    auto put = [&](CodePlace at, int code) { page.data()[at.byte] = uint8_t(page.data()[at.byte] | code << at.bit); };
    for (int token = 0; token < kPage; token++)
        for (int c = 0; c < D; c++) {
            put(Page::k_code(token, c), k[size_t(token * D + c)] = int(random() % (1 << B)));
            put(Page::v_code(64, token, c), v[size_t(token * D + c)] = int(random() % (1 << B)));
        }
    Floats q("q", 8 * D), p("p", 8 * kPage), scores("scores", kPage * 8), out("out", 8 * D);
    for (int i = 0; i < 8 * D; i++) q[i] = float(int(random() % 17) - 8);
    for (int i = 0; i < 8 * kPage; i++) p[i] = float(int(random() % 17) - 8);
    page.upload(), q.upload(), p.upload();
    device::launch(product<D, B>, 1, 32, 0, 1, page.address() + Page::k_codes(), q.address(), scores.address(),
                   kPage / 16);
    device::launch(product<kPage, B>, 1, 32, 0, 1, page.address() + Page::v_codes(64), p.address(), out.address(),
                   D / 16);
    scores.download(), out.download();
    for (int column = 0; column < 8; column++) {
        for (int token = 0; token < kPage; token++) {
            int want = 0;
            for (int c = 0; c < D; c++) want += k[size_t(token * D + c)] * int(q[column * D + c]);
            CHECK(scores[token * 8 + column] == float(want), "K token %d: %g, not %d", token,
                  scores[token * 8 + column], want);
        }
        for (int c = 0; c < D; c++) {
            int want = 0;
            for (int token = 0; token < kPage; token++)
                want += v[size_t(token * D + c)] * int(p[column * kPage + token]);
            CHECK(out[c * 8 + column] == float(want), "V channel %d: %g, not %d", c, out[c * 8 + column], want);
        }
    }
}

// Lane j's pairs of four octets are 16 contiguous bytes: what attention loads at once.
static void params_are_lane_vectors() {
    for (int i = 0; i < 128; i++) {
        const int octet = i / 8 % 4, j = i % 8 / 2;
        CHECK(param_place(i) / 8 * 8 == i / 32 * 32 + 8 * j, "value %d is not in lane %d's 16 bytes", i, j);
        CHECK(param_place(i) % 8 == 2 * octet + i % 2, "value %d is out of order", i);
    }
}

template <int D, int B> static void all() {
    tiles_the_page<D, B>(32);
    tiles_the_page<D, B>(64);
    is_an_a_operand<D, B>();
}

int main() {
    all<64, 1>(), all<64, 2>(), all<64, 4>();
    all<128, 1>(), all<128, 2>(), all<128, 4>();
    params_are_lane_vectors();
    std::printf("layout_test: places tile the page; K and V words are A operands (%s)\n", device::kName);
}
