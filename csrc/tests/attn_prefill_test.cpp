// attn_prefill.cu against a plain twin in double: chunks at any position, windows, 1 to 16 query heads per KV head,
// packed history, batches of different lengths; the same bits whatever the chunks, the batch and the CTAs. What nobody
// should read is NaN or lies outside every buffer; what nobody should write keeps its pattern.
#include "../attn_prefill.cu"

#include <map>
#include <memory>

#include "numbers.h"

using namespace specache;

using Kernel = void (*)(specache_prefill_params);

static const std::map<std::string, Kernel>& kernels() {
#define ENTRY(D, dtype, T) {"specache_prefill_d" #D "_" #dtype, specache_prefill_d##D##_##dtype},
    static const std::map<std::string, Kernel> all = {SPECACHE_PREFILL_KERNELS(ENTRY)};
#undef ENTRY
    return all;
}

// ---- a case -----------------------------------------------------------------------------------------------------

struct Length {
    uint32_t n, nq, rows;   // tokens before the chunk, those of them that are read packed, rows of the chunk
};

struct Case {
    uint32_t d, bits, g;
    specache_dtype dtype;
    uint32_t kv_heads, group_heads, window;
    std::vector<Length> seqs;
    float bias = 0;   // of one channel of K
};

static std::string name_of(const Case& c) {
    char text[400];
    int at = std::snprintf(text, sizeof text, "D %u, %u bits, g %u, %s, Hkv %u, G %u, w %u:", c.d, c.bits, c.g,
                           dtype_name(c.dtype), c.kv_heads, c.group_heads, c.window);
    for (const Length& l : c.seqs)
        at += std::snprintf(text + at, sizeof text - size_t(at), " (n %u, nq %u, %u rows)", l.n, l.nq, l.rows);
    return text;
}

static uint64_t seed = 0;

// Where a number of a packed page lies; bits at run time.
struct PageMap {
    int d, g, bits;

    template <class F> auto with(F f) const {
        if (bits == 1) return d == 64 ? f(PackedPage<64, 1>()) : f(PackedPage<128, 1>());
        if (bits == 2) return d == 64 ? f(PackedPage<64, 2>()) : f(PackedPage<128, 2>());
        return d == 64 ? f(PackedPage<64, 4>()) : f(PackedPage<128, 4>());
    }
    size_t bytes() const {
        return with([&](auto page) { return size_t(page.bytes(g)); });
    }
    // code * scale + zero of channel `i` of K, or of V.
    double value(const uint8_t* page, bool is_v, int token, int i) const {
        return with([&](auto p) {
            const CodePlace at = is_v ? p.v_code(g, token, i) : p.k_code(token, i);
            const auto param = [&](int part) {
                const int place = is_v ? p.v_param(part, i / g, token) : p.k_param(part, token / g, i);
                return double(number_at(SPECACHE_FP16, {page + place, page + place + 2}, 0));
            };
            const int code = page[at.byte] >> at.bit & ((1 << bits) - 1);
            return code * param(is_v ? p.v_scale(g) : p.k_scale(g)) + param(is_v ? p.v_zero(g) : p.k_zero(g));
        });
    }
    // Random codes; values spread over about -2 .. 2 at any width.
    void fill(Random& random, uint8_t* page, float bias) const {
        with([&](auto p) {
            std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
            for (int i = 0; i < p.bytes(g); i++) page[i] = uint8_t(random());
            const auto put = [&](int at, float x) {
                const uint16_t half = uint16_t(narrow(SPECACHE_FP16, x));
                std::memcpy(page + at, &half, 2);
            };
            for (int i = 0; i < kPage / g * d; i++) {
                put(p.k_param(p.k_scale(g), i / d, i % d), 3.0f / float(1 << bits) * uniform(random));
                put(p.k_param(p.k_zero(g), i / d, i % d), -uniform(random) + (i % d == 7 ? bias : 0));
            }
            for (int i = 0; i < d / g * kPage; i++) {
                put(p.v_param(p.v_scale(g), i / kPage, i % kPage), 3.0f / float(1 << bits) * uniform(random));
                put(p.v_param(p.v_zero(g), i / kPage, i % kPage), -uniform(random));
            }
            return 0;
        });
    }
};

// ---- what the kernel reads, and the same as plain numbers -------------------------------------------------------

// The cache of one sequence: [kv_heads][tokens][K | V] as numbers.
struct Cache {
    std::vector<double> numbers;
    const double* pair(const Case& c, uint32_t head, uint32_t tokens, uint32_t j) const {
        return &numbers[(size_t(head) * tokens + j) * 2 * c.d];
    }
};

struct World {
    const Case& c;
    Random random;
    PageMap map;
    uint32_t heads, rows = 0, n_packed = 0, n_wide = 0;
    size_t wide_bytes, packed_bytes;   // of a page
    std::vector<Cache> caches;
    std::vector<uint8_t> wide, packed;               // pages of all sequences
    std::vector<uint32_t> first_wide, first_packed;   // page of each sequence; wide ones lie from the last to the first
    std::vector<specache_seq> seqs;
    std::vector<float> q;

    explicit World(const Case& c)
        : c(c), random(unsigned(c.d + c.bits + 3 * c.group_heads + c.seqs[0].n)), map{int(c.d), int(c.g), int(c.bits)} {
        heads = c.kv_heads * c.group_heads;
        wide_bytes = c.kv_heads * kPage * 4 * c.d + 16, packed_bytes = c.kv_heads * map.bytes();
        rows = 1;   // row 0 is nobody's
        for (const Length& l : c.seqs) {
            seqs.push_back({l.n, l.nq, ~0u, l.rows, rows, {}});
            first_packed.push_back(n_packed), first_wide.push_back(n_wide);
            rows += l.rows;
            n_packed += l.nq / kPage;
            n_wide += (l.n + l.rows - l.nq + kPage - 1) / kPage + 1;
        }
        wide.assign(n_wide * wide_bytes, 0xFF);   // NaN in both types
        packed.assign(n_packed * packed_bytes, 0xFF);
        for (size_t s = 0; s < c.seqs.size(); s++) fill(s);
        q = normals(random, size_t(rows) * heads * c.d, 1.2f);
    }

    void fill(size_t s) {
        const Length& l = c.seqs[s];
        const uint32_t tokens = l.n + l.rows;
        Cache cache;
        cache.numbers.resize(size_t(c.kv_heads) * tokens * 2 * c.d);
        for (uint32_t h = 0; h < c.kv_heads; h++)
            for (uint32_t j = 0; j < tokens; j++) {
                double* to = &cache.numbers[(size_t(h) * tokens + j) * 2 * c.d];
                if (j < l.nq) {
                    uint8_t* page = &packed[(first_packed[s] + j / kPage) * packed_bytes + h * map.bytes()];
                    if (j % kPage == 0) map.fill(random, page, c.bias);
                    for (uint32_t i = 0; i < 2 * c.d; i++) to[i] = map.value(page, i >= c.d, j % kPage, i % c.d);
                    continue;
                }
                uint8_t* at = &wide[wide_page(s, j) * wide_bytes + (h * kPage + j % kPage) * 4 * c.d];
                std::vector<float> pair = normals(random, 2 * c.d, 1);
                pair[7] += c.bias;
                const std::vector<uint8_t> bytes = narrowed(c.dtype, pair);
                std::copy(bytes.begin(), bytes.end(), at);
                for (uint32_t i = 0; i < 2 * c.d; i++) to[i] = number_at(c.dtype, bytes, i);
            }
        caches.push_back(std::move(cache));
    }

    uint32_t wide_page(size_t s, uint32_t position) const {
        return n_wide - 1 - first_wide[s] - (position - seqs[s].nq) / kPage;
    }

    // Runs the kernel over these entries, of sequences `first` and those behind it; `out` keeps its pattern where
    // nobody writes.
    void run(const std::vector<specache_seq>& entries, size_t first, uint32_t shared_limit, std::vector<float>& out) {
        Array<specache_seq> seqs_in("seqs", entries);
        Array<float> q_in("q", q), out_array("out", q.size());
        Array<float>::fill(out_array, out);
        Array<uint8_t> wide_in("wide", wide), packed_in("packed", packed);
        // Lists of pages by position: nobody looks at those that are read packed, nor at what no row sees.
        std::vector<std::unique_ptr<Array<uint64_t>>> lists_in;
        std::vector<specache_layer_cache> tables;
        uint32_t n_rows = 0;
        constexpr uint64_t kNowhere = device::kNowhere;
        for (size_t i = 0; i < entries.size(); i++) {
            const size_t s = first + i;
            const specache_seq& entry = entries[i];
            const uint32_t end = entry.n + entry.n_rows;
            const uint32_t seen = c.window == 0 || entry.n < c.window ? 0 : entry.n + 1 - c.window;
            std::vector<uint64_t> list(end / kPage + 1, kNowhere);
            for (uint32_t j = std::max(entry.nq, seen / kPage * kPage); j < end; j += kPage)
                list[j / kPage] = wide_in.address() + wide_page(s, j) * wide_bytes;
            lists_in.push_back(std::make_unique<Array<uint64_t>>("list of pages", list));
            const uint64_t at = entry.n_rows == 0 ? kNowhere : lists_in.back()->address();
            tables.push_back({entry.nq == 0 ? 0 : packed_in.address() + first_packed[s] * packed_bytes, at, kNowhere,
                              kNowhere, kNowhere, kNowhere, ~0u, {}});
            n_rows += entry.n_rows;
        }
        Array<specache_layer_cache> tables_in("caches", tables);
        const specache_prefill_params p{seqs_in.address(),
                                        tables_in.address(),
                                        q_in.address(),
                                        out_array.address(),
                                        uint32_t(entries.size()),
                                        n_rows,
                                        heads,
                                        c.kv_heads,
                                        c.d,
                                        c.bits,
                                        c.g,
                                        c.dtype,
                                        c.window,
                                        device::shared_limit(shared_limit)};
        specache_launch launch;
        CHECK(specache_prefill_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
        device::launch(kernels().at(launch.kernel), launch.grid, launch.block, launch.shared_bytes, seed++, p);
        out_array.download();
        for (size_t i = 0; i < out.size(); i++) out[i] = out_array[i];
    }

    std::vector<float> poison() const { return std::vector<float>(q.size(), bit_cast<float>(0xA5A5A5A5u)); }
};

// ---- the comparison ---------------------------------------------------------------------------------------------

// By fp16 and bf16.
static double worst[2] = {0, 0}, squared_errors[2] = {0, 0}, outputs[2] = {0, 0};

// One query. Rounding is by u = 2^-11 (fp16) or 2^-8 (bf16) of a number at most, and by chance: q's errors move score j
// by a deviation of u / sqrt(3) * |q k_j| (over channels), or twice that from a packed page, whose K is rounded too; p
// adds u. Through the softmax that arrives as w_j |v_j - out|; V of a packed page adds u |v_j|. Four deviations and a
// half are allowed (about one in 100000 beyond them, if all were rounded in the worst place, which none is).
static void compare(const World& w, const std::vector<float>& out, size_t s, uint32_t row, uint32_t head) {
    const Case& c = w.c;
    const specache_seq& seq = w.seqs[s];
    const uint32_t tokens = seq.n + seq.n_rows, last = seq.n + row;
    const uint32_t first = c.window == 0 || last < c.window ? 0 : last + 1 - c.window;
    const size_t at = (size_t(seq.first_row + row) * w.heads + head) * c.d;
    const double u = c.dtype == SPECACHE_BF16 ? 0x1p-8 : 0x1p-11, scale = 1 / std::sqrt(double(c.d));
    std::vector<double> weight(last + 1), deviation(last + 1), want(c.d);
    double max = -INFINITY, sum = 0;
    for (uint32_t j = first; j <= last; j++) {
        const double* k = w.caches[s].pair(c, head / c.group_heads, tokens, j);
        double squares = 0;
        for (uint32_t i = 0; i < c.d; i++) {
            const double term = w.q[at + i] * k[i] * scale;
            weight[j] += term;
            squares += term * term;
        }
        deviation[j] = u * std::sqrt(squares / 3) * (j < seq.nq ? 2 : 1);
        max = std::max(max, weight[j]);
    }
    for (uint32_t j = first; j <= last; j++) sum += weight[j] = std::exp(weight[j] - max);
    for (uint32_t j = first; j <= last; j++) {
        const double* v = w.caches[s].pair(c, head / c.group_heads, tokens, j) + c.d;
        weight[j] /= sum;
        for (uint32_t i = 0; i < c.d; i++) want[i] += weight[j] * v[i];
    }
    for (uint32_t i = 0; i < c.d; i++) {
        double squares = 0, size = 0;
        for (uint32_t j = first; j <= last; j++) {
            const double v = w.caches[s].pair(c, head / c.group_heads, tokens, j)[c.d + i], third = u * u / 3;
            const double moved = weight[j] * (v - want[i]), number = j < seq.nq ? weight[j] * v : 0;
            squares += moved * moved * (deviation[j] * deviation[j] + third) + number * number * third;
            size += weight[j] * std::fabs(v);
        }
        const double error = std::fabs(out[at + i] - want[i]), bound = 4.5 * std::sqrt(squares) + 1e-5 * size + 1e-7;
        worst[c.dtype] = std::max(worst[c.dtype], error);
        squared_errors[c.dtype] += error * error, outputs[c.dtype]++;
        CHECK(error <= bound, "out %g, not %g (+- %g): sequence %zu, row %u, head %u, channel %u (%s)", out[at + i],
              want[i], bound, s, row, head, i, name_of(c).c_str());
    }
}

static void expect_same(const std::vector<float>& a, const std::vector<float>& b, const char* what, const Case& c) {
    for (size_t i = 0; i < a.size(); i++)
        CHECK(bit_cast<uint32_t>(a[i]) == bit_cast<uint32_t>(b[i]), "%s: number %zu is %g and %g (%s)", what, i, a[i],
              b[i], name_of(c).c_str());
}

// In one launch; then each sequence in two chunks of its own, with the CTAs that a smaller GPU gets.
static void test(const Case& c) {
    World w(c);
    std::vector<float> out = w.poison(), again = w.poison();
    w.run(w.seqs, 0, 227 << 10, out);
    for (size_t s = 0; s < w.seqs.size(); s++)
        for (uint32_t row = 0; row < w.seqs[s].n_rows; row++)
            for (uint32_t head = 0; head < w.heads; head++) compare(w, out, s, row, head);
    for (size_t i = 0; i < size_t(w.heads) * c.d; i++)
        CHECK(bit_cast<uint32_t>(out[i]) == 0xA5A5A5A5u, "a row of nobody was written (%s)", name_of(c).c_str());
    for (size_t s = 0; s < w.seqs.size(); s++) {
        if (w.seqs[s].n_rows == 0) continue;
        specache_seq first = w.seqs[s], second = w.seqs[s];
        first.n_rows = (first.n_rows + 1) / 3;
        second.n += first.n_rows, second.n_rows -= first.n_rows, second.first_row += first.n_rows;
        if (first.n_rows != 0) w.run({first}, s, 99 << 10, again);
        w.run({second}, s, 99 << 10, again);
    }
    expect_same(out, again, "in other chunks", c);
}

// ---- cases ------------------------------------------------------------------------------------------------------

static int cases = 0;

static void run_case(const Case& c) {
    test(c);
    cases++;
}

static void all_cases() {
    constexpr specache_dtype h = SPECACHE_FP16, b = SPECACHE_BF16;
    // Rows around tiles and pages, from the start and behind a history.
    for (uint32_t rows : {1u, 15u, 33u, 64u, 70u}) run_case({64, 2, 64, rows % 2 ? b : h, 1, 2, 0, {{0, 0, rows}}});
    run_case({128, 2, 64, h, 2, 4, 0, {{0, 0, 45}}});
    run_case({128, 2, 64, b, 1, 4, 0, {{37, 0, 60}}});
    run_case({64, 2, 64, h, 1, 1, 0, {{63, 0, 130}}});
    // All numbers of heads, those that do not divide a tile included.
    for (uint32_t g : {3u, 7u, 16u}) run_case({64, 2, 32, g % 2 ? h : b, 1, g, 0, {{10, 0, 21}}});
    // Windows: within a tile, around tiles, wider than everything.
    for (uint32_t window : {1u, 5u, 32u, 33u, 64u, 1000u}) run_case({64, 2, 64, h, 1, 2, window, {{70, 0, 50}}});
    run_case({128, 2, 64, b, 1, 1, 40, {{100, 0, 100}}});
    // Packed history, every width and group.
    for (uint32_t bits : {1u, 2u, 4u})
        for (uint32_t g : {32u, 64u}) run_case({64, bits, g, bits == 2 ? b : h, 2, 2, 0, {{150, 128, 20}}});
    run_case({128, 1, 64, b, 1, 4, 0, {{64, 64, 17}}});
    run_case({128, 2, 32, h, 1, 2, 0, {{135, 128, 17}}});
    run_case({128, 4, 64, h, 1, 2, 90, {{200, 192, 30}}});
    // Batches, with an entry that is not in use.
    run_case({64, 2, 64, b, 2, 4, 0, {{0, 0, 40}, {5, 0, 0}, {100, 64, 9}, {0, 0, 1}}});
    run_case({64, 1, 32, h, 1, 8, 50, {{65, 0, 34}, {128, 128, 20}}});
    // A key channel of 40, as Qwen2 has: scores of dozens, which all keys share.
    run_case({64, 2, 64, h, 1, 2, 0, {{70, 64, 33}}, 40});
}

static void plans() {
    using P = specache_prefill_params;
    const auto plan = [](specache_status want, const char* part, void (*change)(P&)) {
        constexpr uint64_t a = 1 << 20;
        P p{a, a, a, a, 2, 1000, 32, 8, 128, 2, 64, SPECACHE_BF16, 0, 227 << 10};
        change(p);
        specache_launch launch;
        const specache_status got = specache_prefill_plan(&p, &launch);
        CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
        CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
        return launch;
    };
    // 4000 queries are 31 tiles of 128 and one that is not full for each entry.
    specache_launch launch = plan(SPECACHE_OK, "", [](P&) {});
    CHECK(launch.grid == 33 * 8 && launch.block == 128 && launch.shared_bytes == 80 << 10, "%u CTAs", launch.grid);
    launch = plan(SPECACHE_OK, "", [](P& p) { p.shared_limit = 99 << 10; });
    CHECK(launch.grid == 17 * 8 && launch.block == 256 && launch.shared_bytes == 96 << 10, "%u CTAs", launch.grid);
    launch = plan(SPECACHE_OK, "", [](P& p) { p.shared_limit = 99 << 10, p.head_dim = 64; });
    CHECK(launch.block == 128 && launch.shared_bytes == 40 << 10, "%u bytes", launch.shared_bytes);
    launch = plan(SPECACHE_OK, "", [](P& p) { p.n_rows = 0, p.q = 0; });
    CHECK(launch.grid == 0, "%u CTAs", launch.grid);
    plan(SPECACHE_UNSUPPORTED_HEAD_DIM, "96", [](P& p) { p.head_dim = 96; });
    plan(SPECACHE_UNSUPPORTED_BITS, "3 bits", [](P& p) { p.bits = 3; });
    plan(SPECACHE_UNSUPPORTED_GROUP_SIZE, "128", [](P& p) { p.group_size = 128; });
    plan(SPECACHE_UNSUPPORTED_DTYPE, "2", [](P& p) { p.dtype = SPECACHE_FP32; });
    plan(SPECACHE_UNSUPPORTED_HEADS, "136 heads", [](P& p) { p.n_heads = 136; });
    plan(SPECACHE_TOO_LARGE, "rows", [](P& p) { p.n_rows = 1u << 29; });
    plan(SPECACHE_TOO_MUCH_SHARED, "65536", [](P& p) { p.shared_limit = 48 << 10; });
    plan(SPECACHE_BAD_ADDRESS, "q is", [](P& p) { p.q += 8; });
    plan(SPECACHE_BAD_ADDRESS, "caches is", [](P& p) { p.caches += 8; });
    plan(SPECACHE_BAD_ADDRESS, "out is", [](P& p) { p.out = 0; });
}

// Llama-3.1-8B on an H200 (132 multiprocessors with two CTAs each), and on smaller cards; worked by hand.
static void waves() {
    specache_prefill_params p{};
    p.n_heads = 32, p.n_kv_heads = 8, p.head_dim = 128, p.bits = 2, p.group_size = 64, p.dtype = SPECACHE_BF16;
    const auto filled = [&](uint32_t rows, uint32_t sms, uint32_t kib) {
        p.n_rows = rows, p.shared_limit = kib << 10;
        return specache_prefill_filled(&p, sms);
    };
    CHECK(filled(1024, 132, 227) == 969, "256 of 264");
    CHECK(filled(1280, 132, 227) == 606, "320 of 528");
    CHECK(filled(2048, 132, 227) == 969, "512 of 528");
    CHECK(filled(1056, 132, 227) == 1000 && filled(1057, 132, 227) == 515, "264, and 272 of 528");
    CHECK(filled(768, 108, 163) == 888, "192 of 216");
    CHECK(filled(1280, 84, 99) == 952, "160 CTAs of 256 queries, one each: 160 of 168");
    CHECK(filled(0, 132, 227) == 0 && filled(1024, 0, 227) == 0 && filled(1024, 132, 32) == 0, "nothing");
    p.head_dim = 64;
    CHECK(filled(1024, 132, 227) == 646, "256 of 396: registers hold three");
    CHECK(filled(1024, 128, 99) == 1000, "256 of 256: shared memory holds two");
    p.head_dim = 96;
    CHECK(filled(1024, 132, 227) == 0, "no such kernel");
}

int main() {
    plans();
    waves();
    all_cases();
    const auto rms = [](specache_dtype t) { return std::sqrt(squared_errors[t] / outputs[t]); };
    std::printf("attn_prefill_test: %d cases equal the twin, errors %.0e rms, %.0e at most (fp16), %.0e, %.0e (bf16) "
                "(%s)\n",
                cases, rms(SPECACHE_FP16), worst[SPECACHE_FP16], rms(SPECACHE_BF16), worst[SPECACHE_BF16],
                device::kName);
}
