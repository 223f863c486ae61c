// attn_decode.cu against a plain twin in double: lengths around every border, replaced positions, windows, one and two
// rows, 1 to 16 query heads per KV head, batches of different lengths. What nobody should read is NaN or lies outside
// every buffer; what nobody should write keeps its pattern.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../attn_combine.cu"
#include "../attn_decode.cu"
#include "check.h"
#include "device.h"
#include "dtype.h"

using namespace specache;

using Kernel = void (*)(specache_attn_params);

// More of them for an afternoon: -DSPECACHE_RANDOM_CASES=10000.
#ifndef SPECACHE_RANDOM_CASES
#define SPECACHE_RANDOM_CASES 60
#endif

static const std::map<std::string, Kernel>& kernels() {
#define ENTRY(D, B, dtype, T) {"specache_attn_d" #D "_b" #B "_" #dtype, specache_attn_d##D##_b##B##_##dtype},
    static const std::map<std::string, Kernel> all = {
        SPECACHE_ATTN_KERNELS(ENTRY){"specache_attn_combine", specache_attn_combine}};
#undef ENTRY
    return all;
}

// ---- a case -----------------------------------------------------------------------------------------------------

enum Replace { kNone, kSome, kFirstPage };   // which positions have slots: none, random ones, all of page 0

struct Length {
    uint32_t n, nq, no, rows;
};

struct Case {
    uint32_t d, bits, g;
    specache_dtype dtype;
    uint32_t kv_heads, group_heads, top_k, window;
    Replace replace;
    std::vector<Length> seqs;
    bool scores = true, first_scores = true;
    float bias = 0;   // of one channel of K, wherever it is read from
    uint64_t seed = 0;
};

static std::string name_of(const Case& c) {
    char text[300];
    int at = std::snprintf(text, sizeof text, "D %u, %u bits, g %u, %s, Hkv %u, G %u, k %u, w %u, seed %u:", c.d,
                           c.bits, c.g, c.dtype == SPECACHE_BF16 ? "bf16" : "fp16", c.kv_heads, c.group_heads, c.top_k,
                           c.window, unsigned(c.seed));
    for (const Length& l : c.seqs)
        at += std::snprintf(text + at, sizeof text - size_t(at), " (n %u, nq %u, %u rows)", l.n, l.nq, l.rows);
    return text;
}

// The twin's own: position i sees j > i - w.
static uint32_t first_visible(uint32_t i, uint32_t w) { return w == 0 || i < w ? 0 : i + 1 - w; }

// One position of one KV head.
struct Pair {
    std::vector<double> k, v;
};

// ---- what a kernel reads, and the same as plain numbers ---------------------------------------------------------

template <class T> struct Array : device::Buffer {
    Array(const char* name, size_t n, Access access)
        : device::Buffer(name, std::max<size_t>(n, 1) * sizeof(T), access) {}
    T& operator[](size_t i) { return reinterpret_cast<T*>(data())[i]; }
    size_t size() const { return bytes() / sizeof(T); }
};

template <int D, int B> class World {
public:
    explicit World(const Case& c) : c(c), random(unsigned(c.seed * 7919 + c.d + c.bits + c.top_k + c.seqs[0].n)) {
        n_heads = c.kv_heads * c.group_heads;
        head_bytes = size_t(Page::bytes(int(c.g)));
        count();
        allocate();
        for (size_t s = 0; s < c.seqs.size(); s++) fill_seq(s);
        for (size_t i = 0; i < q->size(); i++) (*q)[i] = 1.5f * normal(random);
    }

    specache_attn_params params() {
        specache_attn_params p{};
        p.seqs = seqs->address(), p.caches = tables->address(), p.q = q->address(), p.out = out->address();
        p.lse = lse->address();
        if (c.scores) p.scores = scores->address();
        if (c.first_scores) p.first_scores = first_scores->address(), p.first_lse = first_lse->address();
        p.score_stride = score_stride;
        p.n_seqs = uint32_t(c.seqs.size()), p.n_heads = n_heads, p.n_kv_heads = c.kv_heads;
        p.head_dim = D, p.bits = B, p.group_size = c.g, p.dtype = c.dtype;
        p.top_k = c.top_k, p.window = c.window, p.capacity = capacity;
        p.n_sms = c.seed % 4 == 3 ? 40 : 1 + unsigned(c.seed % 4), p.shared_limit = device::shared_limit(c.seed % 2 ? 99 << 10 : 227 << 10);
        return p;
    }

    void run() {
        specache_attn_params p = params();
        parts = std::make_unique<Array<float>>("parts", specache_attn_part_bytes(&p) / 4, device::Buffer::kWrite);
        p.parts = parts->address();
        specache_launch launch;
        for (device::Buffer* b : all()) b->upload();
        CHECK(specache_attn_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
        device::launch(kernels().at(launch.kernel), launch.grid, launch.block, launch.shared_bytes, c.seed, p);
        CHECK(specache_attn_combine_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
        device::launch(kernels().at(launch.kernel), launch.grid, launch.block, launch.shared_bytes, c.seed + 1, p);
        for (device::Buffer* b : all()) b->download();
        for (size_t s = 0; s < c.seqs.size(); s++)
            for (uint32_t head = 0; head < n_heads; head++)
                for (uint32_t row = 0; row < c.seqs[s].rows; row++) compare(s, head, row);
        for (uint32_t row : idle_rows)
            for (size_t i = 0; i < n_heads * D; i++)
                CHECK(is_poison((*out)[row * n_heads * D + i]), "a row of nobody was written (%s)", name_of(c).c_str());
    }

    double worst_out = 0, worst_score = 0;

private:
    using Page = PackedPage<D, B>;

    // What the cache of one sequence has for itself.
    struct SeqMemory {
        SeqMemory(const Case& c, const Length& l, size_t page_bytes)
            : skip_stride(l.no / kPage + unsigned(c.seed + l.n) % 3),
              packed("packed", l.nq / kPage * page_bytes, device::Buffer::kRead),
              wide("wide list", divide_up(l.n + l.rows, kPage), device::Buffer::kRead),
              slots("slots", c.kv_heads * c.top_k, device::Buffer::kRead),
              pairs("pairs", slots.size() * 2 * D, device::Buffer::kRead),
              skip("skip", c.kv_heads * skip_stride, device::Buffer::kRead) {
            std::memset(slots.data(), 0xFF, slots.bytes());
            std::memset(pairs.data(), 0xFF, pairs.bytes());   // NaN in both types
            std::memset(skip.data(), 0, skip.bytes());
            for (size_t i = 0; i < wide.size(); i++) wide[i] = device::kNowhere;
        }

        uint32_t skip_stride;
        Array<uint8_t> packed;
        Array<uint64_t> wide;
        Array<uint32_t> slots;
        Array<uint16_t> pairs;
        Array<uint64_t> skip;
    };

    void count() {
        for (const Length& l : c.seqs) {
            n_wide += divide_up(l.n + 2 - l.nq, kPage);
            capacity = std::max(capacity, l.n + 2);
        }
        score_stride = capacity + 3;
        idle_rows = {0, uint32_t(2 * c.seqs.size()) + 1};
    }

    void allocate() {
        const auto kR = device::Buffer::kRead, kW = device::Buffer::kWrite;
        const size_t n = c.seqs.size(), rows = 2 * n + 2;
        seqs = std::make_unique<Array<specache_seq>>("seqs", n, kR);
        tables = std::make_unique<Array<specache_layer_cache>>("caches", n, kR);
        q = std::make_unique<Array<float>>("q", rows * n_heads * D, kR);
        out = std::make_unique<Array<float>>("out", rows * n_heads * D, kW);
        wide = std::make_unique<Array<uint8_t>>("wide", n_wide * wide_bytes(), kR);
        scores = std::make_unique<Array<float>>("scores", n * n_heads * score_stride, kW);
        lse = std::make_unique<Array<float>>("lse", n * n_heads, kW);
        first_scores = std::make_unique<Array<float>>("first_scores", n * n_heads * score_stride, kW);
        first_lse = std::make_unique<Array<float>>("first_lse", n * n_heads, kW);
        std::memset(wide->data(), 0xFF, wide->bytes());   // NaN in both types
        for (uint32_t i = 0; i < n_wide; i++) free_wide.push_back(i);
        std::shuffle(free_wide.begin(), free_wide.end(), random);
        for (const Length& l : c.seqs) memory.push_back(std::make_unique<SeqMemory>(c, l, c.kv_heads * head_bytes));
    }

    size_t wide_bytes() const { return c.kv_heads * kPage * 4 * D + 16; }

    std::vector<device::Buffer*> all() {
        std::vector<device::Buffer*> all = {seqs.get(),         tables.get(), q.get(),   out.get(),
                                            wide.get(),         scores.get(), lse.get(), parts.get(),
                                            first_scores.get(), first_lse.get()};
        for (auto& m : memory)
            for (device::Buffer* b :
                 std::initializer_list<device::Buffer*>{&m->packed, &m->wide, &m->slots, &m->pairs, &m->skip})
                all.push_back(b);
        return all;
    }

    void fill_seq(size_t s) {
        const Length& l = c.seqs[s];
        SeqMemory& m = *memory[s];
        // Rows in another order than sequences.
        (*seqs)[s] = {l.n, l.nq, l.no, l.rows, uint32_t(1 + 2 * (c.seqs.size() - 1 - s)), {}};
        std::vector<uint32_t> pages;   // of the wide buffer, from nq on
        for (uint32_t j = l.nq; j < l.n + l.rows; j += kPage) pages.push_back(free_wide.back()), free_wide.pop_back();
        std::vector<std::vector<Pair>> heads;
        for (uint32_t h = 0; h < c.kv_heads; h++) {
            std::vector<Pair> cache;
            for (uint32_t page = 0; page < l.nq / kPage; page++) fill_packed(m, page, h, cache);
            for (uint32_t j = l.nq; j < l.n + l.rows; j++)
                cache.push_back(fill_wide(pages[(j - l.nq) / kPage], h, j % kPage));
            if (c.replace != kNone && l.rows != 0) replace((*seqs)[s], h, m, cache);
            heads.push_back(std::move(cache));
        }
        caches.push_back(std::move(heads));
        fill_table(s, pages);
    }

    // Pages that no row sees may be gone, and with them their addresses; so may all that an unused entry has.
    void fill_table(size_t s, const std::vector<uint32_t>& pages) {
        const Length& l = c.seqs[s];
        SeqMemory& m = *memory[s];
        const auto kNowhere = device::kNowhere;
        specache_layer_cache& table = (*tables)[s];
        table = {kNowhere, kNowhere, kNowhere, kNowhere, kNowhere, kNowhere, ~0u, {}};
        if (l.rows == 0) return;
        const uint32_t first_page = first_visible(l.n, c.window) / kPage, packed_pages = l.nq / kPage;
        for (uint32_t i = 0; i < pages.size(); i++)
            if (packed_pages + i >= first_page) m.wide[packed_pages + i] = wide->address() + pages[i] * wide_bytes();
        m.packed.hide_front(std::min(first_page, packed_pages) * c.kv_heads * head_bytes);
        table.packed = l.nq == 0 ? 0 : m.packed.address();
        table.wide = m.wide.address();
        if (c.top_k == 0) return;
        table.slots = m.slots.address(), table.pairs = m.pairs.address();
        table.skip = m.skip.address(), table.skip_stride = m.skip_stride;
    }

    void fill_packed(SeqMemory& m, uint32_t index, uint32_t head, std::vector<Pair>& cache) {
        const int g = int(c.g);
        uint8_t* page = m.packed.data() + (index * c.kv_heads + head) * head_bytes;
        for (size_t i = 0; i < head_bytes; i++) page[i] = uint8_t(random());
        const float level = 3.0f / (1 << B);   // values spread over about -2 .. 2 at any width
        const auto fill_param = [&](int at, float x) { *reinterpret_cast<__half*>(page + at) = __float2half_rn(x); };
        for (int i = 0; i < kPage / g * D; i++) {
            fill_param(Page::k_param(Page::k_scale(g), i / D, i % D), level * (0.5f + uniform(random)));
            fill_param(Page::k_param(Page::k_zero(g), i / D, i % D),
                       (i % 19 == 5 ? -6.0f : -1.0f) - uniform(random) + bias(i % D));
        }
        for (int i = 0; i < D / g * kPage; i++) {
            fill_param(Page::v_param(Page::v_scale(g), i / kPage, i % kPage), level * (0.5f + uniform(random)));
            fill_param(Page::v_param(Page::v_zero(g), i / kPage, i % kPage), -1.0f - uniform(random));
        }
        const auto param = [&](int at) { return double(__half2float(*reinterpret_cast<__half*>(page + at))); };
        const auto code = [&](CodePlace at) { return page[at.byte] >> at.bit & ((1 << B) - 1); };
        for (int t = 0; t < kPage; t++) {
            Pair pair{std::vector<double>(D), std::vector<double>(D)};
            for (int i = 0; i < D; i++) {
                pair.k[i] = code(Page::k_code(t, i)) * param(Page::k_param(Page::k_scale(g), t / g, i)) +
                            param(Page::k_param(Page::k_zero(g), t / g, i));
                pair.v[i] = code(Page::v_code(g, t, i)) * param(Page::v_param(Page::v_scale(g), i / g, t)) +
                            param(Page::v_param(Page::v_zero(g), i / g, t));
            }
            cache.push_back(pair);
        }
    }

    float bias(int channel) const { return channel == 7 ? c.bias : 0; }

    Pair random_pair(uint16_t* at) {
        Pair pair{std::vector<double>(D), std::vector<double>(D)};
        for (int i = 0; i < 2 * D; i++) {
            at[i] = uint16_t(narrow(c.dtype, normal(random) + (i < D ? bias(i) : 0)));
            (i < D ? pair.k : pair.v)[i % D] = widen(c.dtype, at[i]);
        }
        return pair;
    }

    Pair fill_wide(uint32_t index, uint32_t head, uint32_t token) {
        const size_t at = index * wide_bytes() + (head * kPage + token) * 4 * D;
        return random_pair(reinterpret_cast<uint16_t*>(wide->data() + at));
    }

    // Positions into slots in any order; a slot may also hold one that is not read low-bit yet, which does not count.
    void replace(const specache_seq& seq, uint32_t head, SeqMemory& m, std::vector<Pair>& cache) {
        std::vector<uint32_t> chosen, free_slots;
        for (uint32_t j = 0; j < seq.nq; j++)
            if (c.replace == kFirstPage ? j < kPage : random() % 5 == 0) chosen.push_back(j);
        std::shuffle(chosen.begin(), chosen.end(), random);
        for (uint32_t i = 0; i < c.top_k; i++) free_slots.push_back(i);
        std::shuffle(free_slots.begin(), free_slots.end(), random);
        if (c.replace == kSome && chosen.size() > c.top_k - c.top_k / 8) chosen.resize(c.top_k - c.top_k / 8);
        const size_t row = head * c.top_k;
        for (size_t i = 0; i < chosen.size() && i < c.top_k; i++) {
            const uint32_t j = chosen[i];
            m.slots[row + free_slots[i]] = j;
            m.skip[head * m.skip_stride + j / kPage] |= uint64_t(1) << (j % kPage);
            cache[j] = random_pair(&m.pairs[(row + free_slots[i]) * 2 * D]);
        }
        if (chosen.size() < c.top_k && seq.n > seq.nq) m.slots[row + free_slots[chosen.size()]] = seq.nq;
    }

    static bool is_poison(float x) { return bit_cast<uint32_t>(x) == 0xA5A5A5A5u; }

    void compare(size_t s, uint32_t head, uint32_t row) {
        const Length& l = c.seqs[s];
        const auto& cache = caches[s][head / c.group_heads];
        const float* query = &(*q)[(((*seqs)[s].first_row + row) * n_heads + head) * D];
        const uint32_t last = l.n + row, first = first_visible(last, c.window);
        std::vector<double> score(last + 1);
        double max = -INFINITY, sum = 0;
        for (uint32_t j = first; j <= last; j++) {
            for (int i = 0; i < D; i++) score[j] += query[i] * cache[j].k[i];
            score[j] *= 1.4426950408889634 / std::sqrt(double(D));
            max = std::max(max, score[j]);
        }
        std::vector<double> want(D);
        for (uint32_t j = first; j <= last; j++) {
            const double p = std::exp2(score[j] - max);
            sum += p;
            for (int i = 0; i < D; i++) want[i] += p * cache[j].v[i];
        }
        for (int i = 0; i < D; i++) {
            const float got = (*out)[(((*seqs)[s].first_row + row) * n_heads + head) * D + i];
            const double error = std::abs(got - want[i] / sum);
            worst_out = std::max(worst_out, error);
            CHECK(error < kOutTolerance, "out %g, not %g: sequence %zu, head %u, row %u, channel %d (%s)", got,
                  want[i] / sum, s, head, row, i, name_of(c).c_str());
        }
        const bool is_last = row == l.rows - 1;
        if (is_last) compare_scores(*scores, *lse, c.scores, s, head, score, first, max + std::log2(sum));
        if (row == 0)   // of nobody if it is the last
            compare_scores(*first_scores, *first_lse, c.first_scores && !is_last, s, head, score, first,
                           max + std::log2(sum));
    }

    // Of the last row, or of row 0 before it.
    void compare_scores(Array<float>& scores, Array<float>& lse, bool wanted, size_t s, uint32_t head,
                        const std::vector<double>& score, uint32_t first, double want_lse) {
        const float got_lse = lse[s * n_heads + head];
        const bool has_lse = wanted || &lse == this->lse.get();
        CHECK(has_lse ? std::abs(got_lse - want_lse) < kScoreTolerance : is_poison(got_lse),
              "lse %g, not %g: sequence %zu, head %u (%s)", got_lse, want_lse, s, head, name_of(c).c_str());
        for (uint32_t j = 0; j < score_stride; j++) {
            const float got = scores[(s * n_heads + head) * score_stride + j];
            const bool written = wanted && j >= first && j < c.seqs[s].no;
            const double error = written ? std::abs(got - score[j]) : is_poison(got) ? 0 : INFINITY;
            worst_score = std::max(worst_score, error);
            CHECK(error < kScoreTolerance, "score %g, not %g: sequence %zu, head %u, position %u (%s)", got,
                  written ? score[j] : NAN, s, head, j, name_of(c).c_str());
        }
    }

    // fp16 q and p (11 bits) against |q||k| of about 40 and |v| of about 2.
    static constexpr double kOutTolerance = 2e-3, kScoreTolerance = 1e-2;

    const Case& c;
    std::mt19937 random;
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    uint32_t n_heads, n_wide = 0, capacity = 0, score_stride;
    size_t head_bytes;
    std::vector<uint32_t> idle_rows, free_wide;   // free_wide: in any order
    std::unique_ptr<Array<specache_seq>> seqs;
    std::unique_ptr<Array<float>> q, out, scores, lse, first_scores, first_lse, parts;
    std::unique_ptr<Array<specache_layer_cache>> tables;
    std::unique_ptr<Array<uint8_t>> wide;
    std::vector<std::unique_ptr<SeqMemory>> memory;
    std::vector<std::vector<std::vector<Pair>>> caches;   // [sequence][KV head][position]
};

static double worst_out, worst_score;

template <int D, int B> static void run(const Case& c) {
    World<D, B> world(c);
    world.run();
    worst_out = std::max(worst_out, world.worst_out);
    worst_score = std::max(worst_score, world.worst_score);
}

static void run_any(const Case& c) {
#define RUN(D, B, dtype_name, T) \
    if (c.d == D && c.bits == B && c.dtype == SPECACHE_DTYPE(dtype_name)) return run<D, B>(c);
    SPECACHE_ATTN_KERNELS(RUN)
#undef RUN
}

// ---- cases ------------------------------------------------------------------------------------------------------

// Lengths around every border, with the low-bit boundary where the engine would have it, and where it would not.
static std::vector<Length> border_lengths(uint32_t g) {
    std::vector<Length> all;
    for (uint32_t n : {0u, 1u, 14u, 15u, 16u, g - 1, g, g + 1, 62u, 63u, 64u, 65u, 127u, 128u, 129u, 191u, 192u})
        for (uint32_t nq = 0; nq <= n; nq += kPage)
            all.push_back({n, nq, std::min(n / kPage * kPage, nq + kPage), 1 + (n + nq / kPage) % 2});
    return all;
}

static int cases = 0;

static void run_case(Case c) {
    c.seed = uint64_t(cases++);
    run_any(c);
}

static void all_cases() {
    const auto kF = SPECACHE_FP16, kB = SPECACHE_BF16;
    const std::vector<Length> two_rows = {{200, 128, 192, 2}}, one_row = {{200, 128, 192, 1}};
    // Every kernel and group size, replaced positions, both row counts.
    for (uint32_t d : {64, 128})
        for (uint32_t bits : {1, 2, 4})
            for (uint32_t g : {32, 64})
                for (specache_dtype dtype : {kF, kB})
                    run_case({d, bits, g, dtype, 1, 4, 40, 0, kSome, cases % 3 == 0 ? one_row : two_rows});
    // Borders, as batches: sequences that share a launch.
    for (uint32_t g : {32, 64}) {
        const std::vector<Length> lengths = border_lengths(g);
        for (size_t i = 0; i < lengths.size(); i += 6) {
            const std::vector<Length> batch(lengths.begin() + long(i),
                                            lengths.begin() + long(std::min(i + 6, lengths.size())));
            run_case({64, 2, g, i % 4 ? kB : kF, 1, 2, 24, 0, kSome, batch});
        }
    }
    // Query heads per KV head, and so column tiles.
    for (uint32_t group_heads : {1, 2, 3, 7, 8, 16})
        for (uint32_t rows : {1, 2}) run_case({64, 1, 32, kF, 2, group_heads, 20, 0, kSome, {{150, 128, 128, rows}}});
    // Caches of several sizes in one launch.
    run_case(
        {64, 2, 64, kB, 3, 4, 40, 0, kSome, {{200, 128, 192, 2}, {70, 64, 64, 1}, {0, 0, 0, 0}, {300, 256, 256, 2}}});
    // A page all of whose positions are replaced; more slots than positions; none.
    run_case({64, 2, 64, kB, 1, 4, 64, 0, kFirstPage, two_rows});
    run_case({64, 2, 64, kB, 1, 4, 64, 0, kFirstPage, {{64, 64, 64, 2}}});
    run_case({64, 2, 64, kF, 1, 4, 300, 0, kSome, two_rows});
    run_case({64, 2, 64, kF, 1, 4, 0, 0, kSome, two_rows});
    run_case({64, 2, 64, kF, 1, 4, 0, 0, kNone, two_rows, false});
    // Windows: borders within packed pages, between them, within and beyond the wide ones; nothing packed is seen.
    for (uint32_t window : {1, 2, 9, 64, 72, 73, 74, 136, 137, 138, 200, 201, 300})
        run_case({64, 2, 32, window % 2 ? kF : kB, 1, 2, 24, window, kSome, {{200, 128, 192, 2}, {70, 64, 64, 1}}});
    // The same with nothing replaced: the row's own border is all that hides a token of a page.
    for (uint32_t window : {73, 74, 75, 136, 137, 138, 139})
        run_case({64, 2, 64, kF, 1, 3, 0, window, kNone, {{200, 128, 192, 2}, {200, 192, 192, 1}}});
    // A channel of K with a large bias: every kind of page must give it the same weight.
    for (specache_dtype dtype : {kF, kB}) {
        Case c{64, 2, 64, dtype, 1, 4, 40, 0, kSome, two_rows};
        c.bias = 150;
        run_case(c);
    }
    // Everything wide (full, offload), long enough for several units; unused entries; more than 32 sequences.
    run_case({128, 2, 64, kB, 1, 4, 0, 0, kNone, {{700, 0, 640, 2}}});
    run_case({64,
              1,
              64,
              kF,
              1,
              1,
              16,
              0,
              kSome,
              {{0, 0, 0, 0}, {100, 64, 64, 2}, {130, 128, 128, 0}, {1300, 1216, 1216, 2}}});
    std::vector<Length> crowd;
    for (uint32_t i = 0; i < 70; i++) crowd.push_back({i % 9, 0, 0, i % 3});
    run_case({64, 1, 64, kB, 1, 1, 0, 0, kNone, crowd});
}

// Any shape with any state of the cache.
static void random_cases(int count) {
    std::mt19937 random(7);
    const auto pick = [&](std::initializer_list<uint32_t> from) { return *(from.begin() + random() % from.size()); };
    for (int i = 0; i < count; i++) {
        Case c{};
        c.d = pick({64, 64, 64, 128});
        c.bits = pick({1, 2, 4});
        c.g = pick({32, 64});
        c.dtype = pick({SPECACHE_FP16, SPECACHE_BF16});
        c.kv_heads = pick({1, 1, 2, 3});
        c.group_heads = pick({1, 2, 4, 5, 8});
        c.top_k = pick({0, 1, 15, 16, 17, 40});
        c.window = random() % 3 ? 0 : 1 + random() % 300;
        c.replace = Replace(random() % 3);
        c.scores = random() % 4;
        for (uint32_t s = 1 + random() % 3; s > 0; s--) {
            const uint32_t n = random() % 400, nq = n / kPage == 0 ? 0 : random() % (n / kPage + 1) * kPage;
            const uint32_t no = nq + random() % (n - nq + 1);
            c.seqs.push_back({n, nq, no, 1 + unsigned(random() % 2)});
        }
        // All of page 0 replaced needs slots for it.
        if (c.replace == kFirstPage && c.top_k < kPage) c.top_k = 64 + random() % 9;
        run_case(c);
    }
}

// ---- the plan ---------------------------------------------------------------------------------------------------

using Params = specache_attn_params;

static Params good_params() {
    Params p{};
    p.seqs = p.caches = p.q = p.out = p.scores = p.lse = p.parts = 1 << 20;
    p.score_stride = 4096, p.n_seqs = 3, p.n_heads = 32, p.n_kv_heads = 8;
    p.head_dim = 128, p.bits = 2, p.group_size = 64, p.dtype = SPECACHE_BF16;
    p.top_k = 64, p.capacity = 32768, p.n_sms = 132, p.shared_limit = 227 << 10;
    return p;
}

static void expect_status(specache_status want, const char* part, void (*change)(Params&)) {
    Params p = good_params();
    change(p);
    specache_launch launch;
    const specache_status got = specache_attn_plan(&p, &launch);
    CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
    CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
    if (want != SPECACHE_TOO_MUCH_SHARED)
        CHECK(specache_attn_combine_plan(&p, &launch) == want, "combine: %s", launch.message);
}

static void plans() {
    expect_status(SPECACHE_OK, "", [](Params&) {});
    expect_status(SPECACHE_OK, "", [](Params& p) { p.n_seqs = 0, p.q = 0; });
    expect_status(SPECACHE_OK, "", [](Params& p) { p.top_k = 0, p.scores = p.lse = 0; });
    expect_status(SPECACHE_OK, "", [](Params& p) { p.first_scores = p.first_lse = 1 << 20; });
    expect_status(SPECACHE_BAD_ADDRESS, "first_lse", [](Params& p) { p.first_scores = 1 << 20; });
    expect_status(SPECACHE_UNSUPPORTED_HEAD_DIM, "96", [](Params& p) { p.head_dim = 96; });
    expect_status(SPECACHE_UNSUPPORTED_BITS, "3 bits", [](Params& p) { p.bits = 3; });
    expect_status(SPECACHE_UNSUPPORTED_GROUP_SIZE, "128", [](Params& p) { p.group_size = 128; });
    expect_status(SPECACHE_UNSUPPORTED_DTYPE, "7", [](Params& p) { p.dtype = 7; });
    expect_status(SPECACHE_UNSUPPORTED_HEADS, "17 heads", [](Params& p) { p.n_heads = 17, p.n_kv_heads = 1; });
    expect_status(SPECACHE_UNSUPPORTED_HEADS, "0 KV", [](Params& p) { p.n_kv_heads = 0; });
    expect_status(SPECACHE_TOO_LARGE, "capacity", [](Params& p) { p.capacity = 1u << 31; });
    expect_status(SPECACHE_TOO_LARGE, "sequences", [](Params& p) { p.n_seqs = 1u << 25; });
    expect_status(SPECACHE_BAD_ADDRESS, "seqs", [](Params& p) { p.seqs += 8; });
    expect_status(SPECACHE_BAD_ADDRESS, "q ", [](Params& p) { p.q += 4; });
    expect_status(SPECACHE_BAD_ADDRESS, "out", [](Params& p) { p.out = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "caches", [](Params& p) { p.caches = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "caches", [](Params& p) { p.caches += 8; });
    expect_status(SPECACHE_BAD_ADDRESS, "lse", [](Params& p) { p.lse = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "parts", [](Params& p) { p.parts = 0; });
    expect_status(SPECACHE_TOO_MUCH_SHARED, "shared", [](Params& p) { p.shared_limit = 48 << 10; });
    // What each GPU gets: stages, CTAs.
    for (auto [limit, stages, ctas] : {std::array<uint32_t, 3>{99 << 10, 2, 1}, {163 << 10, 2, 2}, {227 << 10, 2, 3}}) {
        Params p = good_params();
        p.shared_limit = limit;
        specache_launch launch;
        CHECK(specache_attn_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
        CHECK(launch.grid == 132 * ctas && attn_stages(&p) == stages, "grid %u, %u stages", launch.grid,
              attn_stages(&p));
        CHECK(launch.shared_bytes == sizeof(AttnShared<128>) + 4 * stages * 8192, "%u bytes", launch.shared_bytes);
    }
}

int main() {
    plans();
    all_cases();
    random_cases(SPECACHE_RANDOM_CASES);
    std::printf("attn_decode_test: %d cases equal the twin, out within %.1e, scores within %.1e (%s)\n", cases,
                worst_out, worst_score, device::kName);
}
