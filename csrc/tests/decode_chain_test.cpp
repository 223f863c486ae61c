// Pack, attention, combine, selection and a gather, step after step as the engine runs them (method.md), against plain
// attention in double over the same mixed cache. With k beyond the context every step equals 16-bit attention.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <vector>

#define SPECACHE_ATTN_KERNELS(X) X(64, 2, bf16, Bf16) X(128, 1, fp16, Fp16)
#include "../attn_combine.cu"
#include "../attn_decode.cu"
#include "../fetch.cu"
#include "../pack.cu"
#include "../select.cu"
#include "check.h"
#include "device.h"
#include "dtype.h"

using namespace specache;

template <class T> struct Array : device::Buffer {
    Array(const char* name, size_t n) : device::Buffer(name, n * sizeof(T), kWrite) {}
    T& operator[](size_t i) { return reinterpret_cast<T*>(data())[i]; }
    size_t size() const { return bytes() / sizeof(T); }
};

// Two sequences of up to 5 pages, two KV heads of three query heads.
constexpr uint32_t kSeqs = 2, kHeads = 2, kGroup = 3, kPages = 5, kCapacity = kPages * kPage, kResidual = 40;

struct Setup {
    uint32_t g, top_k, window, steps;
    uint32_t start[kSeqs];   // prompt lengths
};

// The twin's own: position i sees j > i - w.
static uint32_t first_visible(uint32_t i, uint32_t w) { return w == 0 || i < w ? 0 : i + 1 - w; }

template <int D, int B, specache_dtype DTYPE> class Chain {
public:
    Chain(const Setup& setup, void (*attend)(specache_attn_params), void (*pack)(specache_pack_params))
        : setup(setup), attend(attend), pack(pack), random(setup.top_k + setup.window) {
        std::memset(wide.data(), 0xFF, wide.bytes());   // NaN until written
        for (uint32_t i = 0; i < kSeqs * kPages; i++) wide_index.push_back(i);
        std::shuffle(wide_index.begin(), wide_index.end(), random);
        for (uint32_t s = 0; s < kSeqs; s++) {
            caches.push_back(std::make_unique<SeqCache>(setup, kPages + s, kPages * kHeads * head_bytes()));
            const uint32_t n = setup.start[s], no = n > kResidual ? (n - kResidual) / kPage * kPage : 0;
            for (uint32_t j = 0; j < n; j++) write_pair(s, j);
            for (uint32_t page = 0; page < no / kPage; page++) pack_page(s, page);
            seqs[s] = specache_seq{n, no, no, 0, 2 * s, {}};
        }
    }

    void run() {
        step(1);   // pre-decode
        for (uint32_t i = 0; i < setup.steps; i++) {
            step(2);
            for (uint32_t s = 0; s < kSeqs; s++) advance(s);
        }
    }

    double worst = 0;

private:
    using Page = PackedPage<D, B>;
    static constexpr uint32_t kPairBytes = 4 * D, kWidePage = kHeads * kPage * kPairBytes;
    size_t head_bytes() const { return size_t(Page::bytes(int(setup.g))); }

    // What the cache of one sequence has for itself.
    struct SeqCache {
        SeqCache(const Setup& setup, uint32_t skip_stride, size_t packed_bytes)
            : skip_stride(skip_stride),
              packed("packed", packed_bytes),
              wide("wide list", kPages),
              host("host list", kPages),
              slots("slots", kHeads * setup.top_k),
              pairs("pairs", kHeads * setup.top_k * kPairBytes),
              skip("skip", kHeads * skip_stride) {
            std::memset(slots.data(), 0xFF, slots.bytes());
            std::memset(skip.data(), 0, skip.bytes());
            std::memset(pairs.data(), 0xFF, pairs.bytes());
        }

        uint32_t skip_stride;
        Array<uint8_t> packed;
        Array<uint64_t> wide, host;
        Array<uint32_t> slots;
        Array<uint8_t> pairs;
        Array<uint64_t> skip;
        std::vector<uint32_t> old_slots;   // what attention read
    };

    // Of a wide page in its buffer.
    size_t wide_at(uint32_t s, uint32_t page) const { return wide_index[s * kPages + page] * size_t(kWidePage); }

    uint16_t* pair_at(uint32_t s, uint32_t head, uint32_t j) {
        return reinterpret_cast<uint16_t*>(wide.data() + wide_at(s, j / kPage) +
                                           (head * kPage + j % kPage) * kPairBytes);
    }

    void write_pair(uint32_t s, uint32_t j) {
        for (uint32_t h = 0; h < kHeads; h++)
            for (int i = 0; i < D; i++) {
                pair_at(s, h, j)[D + i] = uint16_t(narrow(DTYPE, normal(random)));
                pair_at(s, h, j)[i] = uint16_t(narrow(DTYPE, normal(random) * (i % 17 == 3 ? 4.0f : 1.0f)));
            }
    }

    void pack_page(uint32_t s, uint32_t page) {
        Array<uint8_t>& packed = caches[s]->packed;
        Array<uint64_t> from("pages to pack", 1);
        from[0] = wide.address() + wide_at(s, page);
        specache_pack_params p{};
        p.wide_pages = from.address();
        p.packed = packed.address() + page * kHeads * head_bytes();
        p.n_pages = 1, p.n_kv_heads = kHeads, p.head_dim = D, p.bits = B, p.group_size = setup.g, p.dtype = DTYPE;
        specache_launch launch;
        CHECK(specache_pack_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
        wide.upload(), packed.upload(), from.upload();
        device::launch(pack, launch.grid, launch.block, 0, page, p);
        packed.download();
    }

    // method.md, "The cache": nq = no; n += 1; a page is offloaded when R + P tokens are not.
    void advance(uint32_t s) {
        specache_seq& seq = seqs[s];
        seq.nq = seq.no;
        seq.n += 1;
        if (seq.n - seq.no >= kResidual + kPage) {
            pack_page(s, seq.no / kPage);
            seq.no += kPage;
        }
    }

    // Only what this step may look at has an address. The same pages are those of the host.
    void fill_table(uint32_t s) {
        SeqCache& cache = *caches[s];
        const specache_seq& seq = seqs[s];
        for (uint32_t page = 0; page < kPages; page++) {
            const bool named = page >= seq.nq / kPage && page * kPage < seq.n + seq.n_rows;
            cache.wide[page] = named ? wide.address() + wide_at(s, page) : device::kNowhere;
            cache.host[page] = page < seq.no / kPage ? wide.address() + wide_at(s, page) : device::kNowhere;
        }
        tables[s] = {seq.nq == 0 ? 0 : cache.packed.address(),
                     cache.wide.address(),
                     cache.host.address(),
                     cache.slots.address(),
                     cache.pairs.address(),
                     cache.skip.address(),
                     cache.skip_stride,
                     {}};
    }

    void step(uint32_t rows) {
        for (uint32_t s = 0; s < kSeqs; s++) {
            seqs[s].n_rows = rows;
            for (uint32_t r = 0; r < rows; r++) write_pair(s, seqs[s].n + r);
            fill_table(s);
        }
        for (size_t i = 0; i < q.size(); i++) q[i] = 1.5f * normal(random);
        std::vector<device::Buffer*> all = {
            &seqs, &tables, &q, &out, &wide, &scores, &lse, &fetches, &fetch_counts, &select_counts, &selected};
        for (auto& cache : caches)
            for (device::Buffer* b : std::initializer_list<device::Buffer*>{&cache->packed, &cache->wide, &cache->host,
                                                                            &cache->slots, &cache->pairs, &cache->skip})
                all.push_back(b);
        for (device::Buffer* b : all) b->upload();
        launch_all();
        for (device::Buffer* b : all) b->download();
        for (uint32_t s = 0; s < kSeqs; s++)
            for (uint32_t h = 0; h < kHeads; h++) compare(s, h);
    }

    void launch_all() {
        specache_attn_params a{};
        a.seqs = seqs.address(), a.caches = tables.address(), a.q = q.address(), a.out = out.address();
        a.scores = scores.address(), a.lse = lse.address();
        a.score_stride = kCapacity, a.n_seqs = kSeqs, a.n_heads = kHeads * kGroup;
        a.n_kv_heads = kHeads, a.head_dim = D, a.bits = B, a.group_size = setup.g, a.dtype = DTYPE;
        a.top_k = setup.top_k, a.window = setup.window, a.capacity = kCapacity, a.n_sms = 2;
        a.shared_limit = device::shared_limit(227 << 10);
        Array<float> parts("parts", specache_attn_part_bytes(&a) / 4);
        a.parts = parts.address();
        specache_select_params b{};
        b.seqs = a.seqs, b.scores = a.scores, b.lse = a.lse, b.caches = a.caches;
        b.selected = selected.address(), b.fetches = fetches.address(), b.fetch_counts = fetch_counts.address();
        b.select_counts = select_counts.address(), b.score_stride = a.score_stride;
        b.n_seqs = kSeqs, b.n_heads = a.n_heads, b.n_kv_heads = kHeads, b.top_k = setup.top_k, b.window = setup.window;
        b.capacity = kCapacity;
        Array<uint8_t> candidates("candidates", specache_select_scratch_bytes(&b));
        b.candidates = candidates.address();
        specache_launch l;
        CHECK(specache_attn_plan(&a, &l) == SPECACHE_OK, "%s", l.message);
        device::launch(attend, l.grid, l.block, l.shared_bytes, seed++, a);
        CHECK(specache_attn_combine_plan(&a, &l) == SPECACHE_OK, "%s", l.message);
        device::launch(specache_attn_combine, l.grid, l.block, l.shared_bytes, seed++, a);
        for (auto& cache : caches) {
            cache->slots.download();
            cache->old_slots.assign(&cache->slots[0], &cache->slots[0] + cache->slots.size());
        }
        CHECK(specache_select_plan(&b, &l) == SPECACHE_OK, "%s", l.message);
        device::launch(specache_select_chunks, l.grid, l.block, l.shared_bytes, seed++, b);
        CHECK(specache_select_merge_plan(&b, &l) == SPECACHE_OK, "%s", l.message);
        device::launch(specache_select_merge, l.grid, l.block, l.shared_bytes, seed++, b);
        specache_fetch_params f{};
        f.seqs = a.seqs, f.caches = a.caches, f.fetches = b.fetches, f.fetch_counts = b.fetch_counts;
        f.n_seqs = kSeqs, f.n_kv_heads = kHeads, f.head_dim = D, f.top_k = setup.top_k, f.n_ctas = 2;
        CHECK(specache_fetch_plan(&f, &l) == SPECACHE_OK, "%s", l.message);
        device::launch(specache_fetch_pairs, l.grid, l.block, l.shared_bytes, seed++, f);
    }

    // Position j of the mixed cache: K, then V.
    std::vector<double> read(uint32_t s, uint32_t head, uint32_t j, const std::set<uint32_t>& replaced) {
        std::vector<double> x(2 * D);
        const int g = int(setup.g), t = int(j % kPage);
        if (j >= seqs[s].nq || replaced.count(j) != 0) {
            for (int i = 0; i < 2 * D; i++) x[size_t(i)] = widen(DTYPE, pair_at(s, head, j)[i]);
            return x;
        }
        const uint8_t* page = caches[s]->packed.data() + (j / kPage * kHeads + head) * head_bytes();
        const auto param = [&](int at) { return double(__half2float(*reinterpret_cast<const __half*>(page + at))); };
        const auto code = [&](CodePlace at) { return page[at.byte] >> at.bit & ((1 << B) - 1); };
        for (int i = 0; i < D; i++) {
            x[size_t(i)] = code(Page::k_code(t, i)) * param(Page::k_param(Page::k_scale(g), t / g, i)) +
                           param(Page::k_param(Page::k_zero(g), t / g, i));
            x[size_t(D + i)] = code(Page::v_code(g, t, i)) * param(Page::v_param(Page::v_scale(g), i / g, t)) +
                               param(Page::v_param(Page::v_zero(g), i / g, t));
        }
        return x;
    }

    void compare(uint32_t s, uint32_t head) {
        const specache_seq& seq = seqs[s];
        const uint32_t* held = &caches[s]->old_slots[head * setup.top_k];
        const std::set<uint32_t> replaced(held, held + setup.top_k);
        std::vector<std::vector<double>> cache;
        for (uint32_t j = 0; j < seq.n + seq.n_rows; j++) cache.push_back(read(s, head, j, replaced));
        std::vector<double> mean(seq.n + seq.n_rows);
        for (uint32_t row = 0; row < seq.n_rows; row++)
            for (uint32_t h = head * kGroup; h < (head + 1) * kGroup; h++)
                compare_row(s, h, row, cache, row + 1 == seq.n_rows ? &mean : nullptr);
        check_selection(s, head, mean);
    }

    void compare_row(uint32_t s, uint32_t h, uint32_t row, const std::vector<std::vector<double>>& cache,
                     std::vector<double>* mean) {
        const size_t at = ((seqs[s].first_row + row) * kHeads * kGroup + h) * D;
        const uint32_t last = seqs[s].n + row, first = first_visible(last, setup.window);
        std::vector<double> p(last + 1), want(D);
        double sum = 0;
        // After the pre-decode, with every packed position replaced, nothing is rounded to fp16.
        const bool exact = DTYPE == SPECACHE_BF16 && setup.top_k >= kCapacity && seqs[s].n_rows == 2;
        const double tolerance = exact ? 1e-4 : 1e-2;
        for (uint32_t j = first; j <= last; j++) {
            for (uint32_t i = 0; i < D; i++) p[j] += q[at + i] * cache[j][i];
            sum += p[j] = std::exp(p[j] / std::sqrt(double(D)));
        }
        for (uint32_t j = first; j <= last; j++) {
            for (uint32_t i = 0; i < D; i++) want[i] += p[j] / sum * cache[j][D + i];
            if (mean != nullptr) (*mean)[j] += p[j] / sum / kGroup;
        }
        for (uint32_t i = 0; i < D; i++) {
            const double error = std::abs(out[at + i] - want[i]);
            worst = std::max(worst, error);
            CHECK(error < tolerance, "out %g, not %g: n %u, nq %u, row %u, head %u, channel %u, k %u, w %u",
                  out[at + i], want[i], seqs[s].n, seqs[s].nq, row, h, i, setup.top_k, setup.window);
        }
    }

    // As many as there can be, ascending, and none outside that is clearly better than one inside.
    void check_selection(uint32_t s, uint32_t head, const std::vector<double>& mean) {
        const specache_seq& seq = seqs[s];
        const uint32_t first = std::min(first_visible(seq.n + seq.n_rows - 1, setup.window), seq.no);
        const uint32_t count = std::min(setup.top_k, seq.no - first);
        const uint32_t* begin = &selected[(s * kHeads + head) * setup.top_k];
        CHECK(select_counts[s * kHeads + head] == count, "%u selected, not %u", select_counts[s * kHeads + head],
              count);
        CHECK(std::is_sorted(begin, begin + count), "not ascending");
        double least = INFINITY;
        for (uint32_t i = 0; i < count; i++) {
            CHECK(begin[i] >= first && begin[i] < seq.no, "position %u of [%u, %u)", begin[i], first, seq.no);
            least = std::min(least, mean[begin[i]]);
        }
        for (uint32_t j = first; j < seq.no; j++)
            if (!std::binary_search(begin, begin + count, j))
                CHECK(mean[j] < least * 1.01, "%u is worth %g, the least selected one %g", j, mean[j], least);
    }

    const Setup& setup;
    void (*attend)(specache_attn_params);
    void (*pack)(specache_pack_params);
    std::mt19937 random;
    std::normal_distribution<float> normal;
    uint64_t seed = 0;
    std::vector<uint32_t> wide_index;   // of the pages of each sequence, in any order
    std::vector<std::unique_ptr<SeqCache>> caches;
    Array<specache_seq> seqs{"seqs", kSeqs};
    Array<specache_layer_cache> tables{"caches", kSeqs};
    Array<float> q{"q", 2 * kSeqs * kHeads * kGroup * D}, out{"out", 2 * kSeqs * kHeads * kGroup * D};
    Array<uint8_t> wide{"wide", kSeqs * kPages * kWidePage};
    Array<uint32_t> selected{"selected", kSeqs * kHeads * setup.top_k};
    Array<float> scores{"scores", kSeqs * kHeads * kGroup * kCapacity}, lse{"lse", kSeqs * kHeads * kGroup};
    Array<specache_fetch> fetches{"fetches", kSeqs * kHeads * setup.top_k};
    Array<uint32_t> fetch_counts{"fetch_counts", kSeqs * kHeads}, select_counts{"select_counts", kSeqs * kHeads};
};

static double worst;
static uint32_t steps;

template <int D, int B, specache_dtype DTYPE>
static void run(const Setup& setup, void (*attend)(specache_attn_params), void (*pack)(specache_pack_params)) {
    Chain<D, B, DTYPE> chain(setup, attend, pack);
    chain.run();
    worst = std::max(worst, chain.worst);
    steps += setup.steps;
}

int main() {
    const auto bf16 = [](const Setup& setup) {
        run<64, 2, SPECACHE_BF16>(setup, specache_attn_d64_b2_bf16, specache_pack_d64_b2_bf16);
    };
    const auto fp16 = [](const Setup& setup) {
        run<128, 1, SPECACHE_FP16>(setup, specache_attn_d128_b1_fp16, specache_pack_d128_b1_fp16);
    };
    bf16({32, 16, 0, 66, {40, 170}});
    bf16({64, 320, 0, 25, {60, 220}});
    bf16({32, 24, 90, 25, {160, 230}});
    fp16({64, 16, 0, 20, {90, 220}});
    std::printf("decode_chain_test: %u steps of %u sequences as the twin does them, out within %.1e (%s)\n", steps,
                kSeqs, worst, device::kName);
}
