// embed.cu against a plain twin: rows of both types, positions from 0 to a million, page borders, a row that fills up a
// graph, a token that does not exist; outputs poisoned.
#include <memory>

#include "../embed.cu"
#include "numbers.h"

using namespace specache;

struct Case {
    specache_dtype dtype;
    uint32_t rows, hidden, head_dim;
    float attention_factor;
};

constexpr uint32_t kVocab = 37, kLayers = 300, kHeads = 2, kNone = ~0u;
static uint64_t seed = 0;

// Rows 0 and 1 across a page border, in the second page of a tail; 2 at position 0; 3 of no sequence; from 4 on far
// away, two rows a sequence. An entry that is not in use names the same rows.
static std::vector<specache_seq> sequences() {
    std::vector<specache_seq> all = {{191, 64, 64, 2, 0, {}}, {0, 0, 0, 1, 2, {}}, {5, 0, 0, 0, 1, {}}};
    for (uint32_t first = 4; first < 16; first += 2) {
        const uint32_t n = 1000061 + first;
        all.push_back({n, n / 64 * 64 - 64, n / 64 * 64, 2, first, {}});
    }
    return all;
}

static uint32_t sequence_of(uint32_t row) { return row < 2 ? 0 : row == 2 ? 1 : row == 3 ? kNone : row / 2 + 1; }

// Where each layer keeps the pages of each sequence. Lists begin at nq, as far as there is anything to see, and have an
// address for the pages that rows append to; nobody reads there.
class Caches {
public:
    Caches(const std::vector<specache_seq>& seqs, Random& random) : n_seqs_(seqs.size()) {
        std::vector<size_t> starts;   // of a sequence's lists
        size_t words = 0;
        for (const specache_seq& seq : seqs) {
            starts.push_back(words);
            words += kLayers * pages(seq);
        }
        std::vector<uint64_t> addresses(words, device::kNowhere);
        lists_ = std::make_unique<Array<uint64_t>>("lists", words);
        std::vector<specache_layer_cache> tables;
        for (uint32_t layer = 0; layer < kLayers; layer++)
            for (size_t s = 0; s < n_seqs_; s++) {
                const size_t page0 = starts[s] + layer * pages(seqs[s]) - seqs[s].nq / SPECACHE_PAGE;   // may wrap
                for (uint32_t r = 0; r < seqs[s].n_rows; r++)
                    addresses[page0 + (seqs[s].n + r) / SPECACHE_PAGE] = uint64_t(1 + random() % (1u << 30)) << 14;
                constexpr uint64_t kNowhere = device::kNowhere;
                const uint64_t list = seqs[s].n_rows == 0 ? kNowhere : lists_->address() + 8 * page0;
                tables.push_back({kNowhere, list, kNowhere, kNowhere, kNowhere, kNowhere, ~0u, {}});
            }
        Array<uint64_t>::fill(*lists_, addresses);
        tables_ = std::make_unique<Array<specache_layer_cache>>("caches", tables);
    }

    uint64_t address() const { return tables_->address(); }

    uint64_t page(uint32_t layer, size_t s, uint32_t position) const {
        const uint64_t list = (*tables_)[layer * n_seqs_ + s].wide;
        return (*lists_)[(list + 8 * (position / SPECACHE_PAGE) - lists_->address()) / 8];
    }

private:
    // From nq to the last row's.
    static size_t pages(const specache_seq& seq) { return (seq.n + 1) / SPECACHE_PAGE + 1 - seq.nq / SPECACHE_PAGE; }

    size_t n_seqs_;
    std::unique_ptr<Array<uint64_t>> lists_;
    std::unique_ptr<Array<specache_layer_cache>> tables_;
};

static void test(const Case& c) {
    Random random(unsigned(c.rows + c.hidden));
    const std::vector<uint8_t> table = narrowed(c.dtype, normals(random, kVocab * c.hidden, 1));
    std::vector<uint32_t> tokens;
    for (uint32_t r = 0; r < c.rows; r++) tokens.push_back(r == 1 ? kVocab : r == 0 ? kVocab - 1 : random() % kVocab);
    std::vector<float> inv_freq;
    for (uint32_t i = 0; i < c.head_dim / 2; i++) inv_freq.push_back(std::pow(5e5f, -float(2 * i) / float(c.head_dim)));

    Array<uint8_t> table_in("table", table);
    Array<uint32_t> tokens_in("tokens", tokens);
    const std::vector<specache_seq> all = sequences();
    Array<specache_seq> seqs("seqs", all);
    const Caches caches(all, random);
    Array<float> inv_freq_in("inv_freq", inv_freq), x("x", size_t(c.rows) * c.hidden),
        rope("rope", size_t(c.rows) * c.head_dim);
    Array<uint64_t> append("append", kLayers * SPECACHE_MAX_ROWS);
    Array<uint32_t> bad("bad_layer", c.rows);
    const specache_embed_params p{table_in.address(),
                                  tokens_in.address(),
                                  seqs.address(),
                                  caches.address(),
                                  inv_freq_in.address(),
                                  x.address(),
                                  rope.address(),
                                  append.address(),
                                  bad.address(),
                                  c.rows,
                                  uint32_t(all.size()),
                                  c.hidden,
                                  kVocab,
                                  kLayers,
                                  kHeads,
                                  c.head_dim,
                                  c.attention_factor,
                                  c.dtype,
                                  0};
    specache_launch launch;
    CHECK(specache_embed_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    const auto kernel = c.dtype == SPECACHE_BF16   ? specache_embed_bf16
                        : c.dtype == SPECACHE_FP16 ? specache_embed_fp16
                                                   : specache_embed_fp32;
    device::launch(kernel, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    for (device::Buffer* b : std::initializer_list<device::Buffer*>{&x, &rope, &append, &bad}) b->download();

    for (uint32_t r = 0; r < c.rows; r++) {
        for (uint32_t i = 0; i < c.hidden; i++) {
            const float got = x[size_t(r) * c.hidden + i];
            if (tokens[r] >= kVocab) CHECK(std::isnan(got), "a token beyond the vocabulary gives %g", got);
            else
                CHECK(got == number_at(c.dtype, table, tokens[r] * c.hidden + i), "row %u, number %u is %g", r, i, got);
        }
        const uint32_t s = sequence_of(r);
        const uint32_t position = s == kNone ? 0 : all[s].n + r - all[s].first_row;
        for (uint32_t i = 0; i < c.head_dim / 2; i++) {
            const double angle = float(position) * inv_freq[i], factor = c.attention_factor;   // an fp32 product
            const size_t at = size_t(r) * c.head_dim + 2 * i;
            // sincosf is good to two last places.
            CHECK(std::fabs(rope[at] - std::cos(angle) * factor) < 3e-7, "cos %u at %u is %g", i, position, rope[at]);
            CHECK(std::fabs(rope[at + 1] - std::sin(angle) * factor) < 3e-7, "sin %u at %u", i, position);
        }
        for (uint32_t l = 0; l < kLayers; l++) {
            const uint64_t want =
                s == kNone ? 0 : caches.page(l, s, position) + position % SPECACHE_PAGE * 4 * c.head_dim;
            const uint64_t got = append[l * SPECACHE_MAX_ROWS + r];
            CHECK(got == want, "row %u of layer %u goes to %llu, not %llu", r, l, (unsigned long long)got,
                  (unsigned long long)want);
        }
        CHECK(bad[r] == SPECACHE_NONE, "bad layer %u of row %u", bad[r], r);
    }
    for (uint32_t i = 0; i < append.size(); i++)
        CHECK(i % SPECACHE_MAX_ROWS < c.rows || append[i] == 0xA5A5A5A5A5A5A5A5u, "an address of row %u",
              i % SPECACHE_MAX_ROWS);
}

// A chunk of a prefill: more rows than a decode step has, for two sequences; only their places are looked at.
static void test_chunk() {
    constexpr uint32_t kRows = 150 + 37, kStride = 200, kHidden = 8, kDim = 4, kChunkLayers = 2, kPages = 5;
    const std::vector<specache_seq> all = {{100, 64, 64, 150, 0, {}}, {0, 0, 0, 37, 150, {}}};
    const std::vector<uint16_t> table(kVocab * kHidden, 0);
    std::vector<uint64_t> pages;   // [layers][sequences][pages]
    for (uint32_t i = 0; i < kChunkLayers * 2 * kPages; i++) pages.push_back(uint64_t(1000 + 7 * i) << 20);
    Array<uint64_t> pages_in("pages", pages);
    std::vector<specache_layer_cache> caches;
    for (uint32_t i = 0; i < kChunkLayers * 2; i++) {
        constexpr uint64_t kNowhere = device::kNowhere;
        const uint64_t list = pages_in.address() + 8 * i * kPages;
        caches.push_back({kNowhere, list, kNowhere, kNowhere, kNowhere, kNowhere, ~0u, {}});
    }
    Array<specache_layer_cache> caches_in("caches", caches);
    Array<uint16_t> table_in("table", table);
    Array<uint32_t> tokens("tokens", std::vector<uint32_t>(kRows, 1)), bad("bad_layer", kRows);
    Array<specache_seq> seqs("seqs", all);
    Array<float> inv_freq("inv_freq", std::vector<float>{0.01f, 0.001f}), x("x", kRows * kHidden),
        rope("rope", kRows * kDim);
    Array<uint64_t> append("append", kChunkLayers * kStride);
    const specache_embed_params p{table_in.address(), tokens.address(), seqs.address(),   caches_in.address(),
                                  inv_freq.address(), x.address(),      rope.address(),   append.address(),
                                  bad.address(),      kRows,            2,                kHidden,
                                  kVocab,             kChunkLayers,     kHeads,           kDim,
                                  1,                  SPECACHE_FP16,    kStride};
    specache_launch launch;
    CHECK(specache_embed_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    device::launch(specache_embed_fp16, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    for (device::Buffer* b : std::initializer_list<device::Buffer*>{&rope, &append}) b->download();
    for (uint32_t i = 0; i < append.size(); i++) {
        const uint32_t layer = i / kStride, r = i % kStride, s = r < 150 ? 0 : 1;
        const uint32_t position = all[s].n + r - all[s].first_row;
        const uint32_t page = r < kRows ? (layer * 2 + s) * kPages + position / SPECACHE_PAGE : 0;
        const uint64_t want = pages[page] + position % SPECACHE_PAGE * 4 * kDim;
        CHECK(append[i] == (r < kRows ? want : 0xA5A5A5A5A5A5A5A5u), "row %u of layer %u goes to %llu", r, layer,
              (unsigned long long)append[i]);
        if (r >= kRows || layer != 0) continue;
        CHECK(std::fabs(rope[r * kDim] - std::cos(double(position) * 0.01f)) < 3e-7, "cos at %u", position);
    }
}

static void expect_status(specache_status want, const char* part, void (*change)(specache_embed_params&)) {
    constexpr uint64_t a = 1 << 20;
    specache_embed_params p{a, a, a, a, a, a, a, a, a, 2, 1, 4096, 32000, 32, 8, 128, 1, SPECACHE_BF16, 0};
    change(p);
    specache_launch launch;
    const specache_status got = specache_embed_plan(&p, &launch);
    CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
    CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
}

static void plans() {
    using P = specache_embed_params;
    expect_status(SPECACHE_OK, "", [](P&) {});
    expect_status(SPECACHE_OK, "", [](P& p) { p.n_rows = 0, p.table = 0; });
    expect_status(SPECACHE_UNSUPPORTED_ROWS, "17", [](P& p) { p.n_rows = 17; });
    expect_status(SPECACHE_OK, "", [](P& p) { p.n_rows = p.append_stride = 4000; });
    expect_status(SPECACHE_UNSUPPORTED_ROWS, "4000", [](P& p) { p.n_rows = 4001, p.append_stride = 4000; });
    expect_status(SPECACHE_UNSUPPORTED_DTYPE, "3", [](P& p) { p.dtype = 3; });
    expect_status(SPECACHE_UNSUPPORTED_WIDTH, "100", [](P& p) { p.hidden = 100; });
    expect_status(SPECACHE_UNSUPPORTED_WIDTH, "vocabulary", [](P& p) { p.vocab = 0; });
    expect_status(SPECACHE_UNSUPPORTED_HEAD_DIM, "65", [](P& p) { p.head_dim = 65; });
    expect_status(SPECACHE_BAD_ADDRESS, "seqs", [](P& p) { p.seqs += 8; });
    expect_status(SPECACHE_BAD_ADDRESS, "caches", [](P& p) { p.caches = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "caches", [](P& p) { p.caches += 8; });
}

int main() {
    plans();
    constexpr specache_dtype h = SPECACHE_FP16, b = SPECACHE_BF16, f = SPECACHE_FP32;
    const Case cases[] = {{b, 1, 8, 2, 1},      {h, 2, 40, 64, 1},      {b, 3, 2056, 80, 1.25f},
                          {h, 6, 4096, 128, 1}, {b, 16, 64, 256, 0.5f}, {f, 4, 2056, 128, 1}};
    for (const Case& c : cases) test(c);
    test_chunk();
    std::printf("embed_test: %zu cases equal the twin (%s)\n", std::size(cases) + 1, device::kName);
}
