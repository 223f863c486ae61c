// select.cu against a plain twin: ties, windows, counts around k and around the chunks, and sessions of selections
// whose slots, skip bits and fetch lists must agree after every step. Scores that are nobody's business are NaN.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../select.cu"
#include "check.h"
#include "device.h"

using namespace specache;

// More of them for an afternoon: -DSPECACHE_RANDOM_CASES=10000.
#ifndef SPECACHE_RANDOM_CASES
#define SPECACHE_RANDOM_CASES 40
#endif

// ---- a case -----------------------------------------------------------------------------------------------------

static uint64_t hits_seen = 0;

enum Scores { kDistinct, kTies, kEqual, kPeaks };

struct Length {
    uint32_t n, no, rows;
};

struct Case {
    uint32_t kv_heads, group_heads, top_k, window;
    Scores scores;
    std::vector<Length> seqs;
    uint32_t steps = 1;   // selections one after the other on the same slots; n grows by one each
    uint64_t seed = 0;
};

static std::string name_of(const Case& c) {
    char text[200];
    std::snprintf(text, sizeof text, "Hkv %u, G %u, k %u, w %u, scores %d, n %u, no %u, %zu sequences, seed %u",
                  c.kv_heads, c.group_heads, c.top_k, c.window, c.scores, c.seqs[0].n, c.seqs[0].no, c.seqs.size(),
                  unsigned(c.seed));
    return text;
}

template <class T> struct Array : device::Buffer {
    Array(const char* name, size_t n, Access access)
        : device::Buffer(name, std::max<size_t>(n, 1) * sizeof(T), access) {}
    T& operator[](size_t i) { return reinterpret_cast<T*>(data())[i]; }
    size_t size() const { return bytes() / sizeof(T); }
};

class World {
public:
    explicit World(const Case& c) : c(c), random(unsigned(c.seed * 31 + c.top_k)) {
        const auto kR = device::Buffer::kRead, kW = device::Buffer::kWrite;
        for (const Length& l : c.seqs) capacity = std::max(capacity, l.n + c.steps + 2);
        n_heads = c.kv_heads * c.group_heads;
        score_stride = capacity + 1;
        const size_t n = c.seqs.size(), heads = n * c.kv_heads;
        seqs = std::make_unique<Array<specache_seq>>("seqs", n, kR);
        scores = std::make_unique<Array<float>>("scores", n * n_heads * score_stride, kR);
        lse = std::make_unique<Array<float>>("lse", n * n_heads, kR);
        first_scores = std::make_unique<Array<float>>("first_scores", n * n_heads * score_stride, kR);
        first_lse = std::make_unique<Array<float>>("first_lse", n * n_heads, kR);
        hits = std::make_unique<Array<uint32_t>>("hits", heads, kW);
        tables = std::make_unique<Array<specache_layer_cache>>("caches", n, kR);
        selected = std::make_unique<Array<uint32_t>>("selected", heads * c.top_k, kW);
        fetches = std::make_unique<Array<specache_fetch>>("fetches", heads * c.top_k, kW);
        fetch_counts = std::make_unique<Array<uint32_t>>("fetch_counts", heads, kW);
        select_counts = std::make_unique<Array<uint32_t>>("select_counts", heads, kW);
        for (size_t s = 0; s < n; s++) {
            const Length& l = c.seqs[s];
            (*seqs)[s] = {l.n, l.no * 3 / 4, l.no, l.rows, 0, {}};
            caches.push_back(std::make_unique<SeqCache>(c, l));
            // Selection writes to slots and skip alone, and to an unused entry's not at all.
            const auto kNowhere = device::kNowhere;
            const bool used = l.rows != 0;
            (*tables)[s] = {kNowhere,
                            kNowhere,
                            kNowhere,
                            used ? caches[s]->slots.address() : kNowhere,
                            kNowhere,
                            used ? caches[s]->skip.address() : kNowhere,
                            used ? caches[s]->skip_stride : ~0u,
                            {}};
        }
    }

    void run() {
        for (uint32_t step = 0; step < c.steps; step++) {
            fill_scores();
            for (auto& cache : caches)
                cache->slots_before.assign(&cache->slots[0], &cache->slots[0] + cache->slots.size());
            launch(step);
            for (size_t s = 0; s < c.seqs.size(); s++)
                for (uint32_t h = 0; h < c.kv_heads; h++) compare(s, h);
            expect_untouched();
            for (size_t s = 0; s < c.seqs.size(); s++) (*seqs)[s].n++;
        }
    }

private:
    // What the cache of one sequence has for itself.
    struct SeqCache {
        SeqCache(const Case& c, const Length& l)
            : skip_stride(l.no / SPECACHE_PAGE + 1 + (l.n + l.rows) % 3),
              slots("slots", c.kv_heads * c.top_k, device::Buffer::kWrite),
              skip("skip", c.kv_heads * skip_stride, device::Buffer::kWrite) {
            std::memset(slots.data(), 0xFF, slots.bytes());
            std::memset(skip.data(), 0, skip.bytes());
        }

        uint32_t skip_stride;
        Array<uint32_t> slots;
        Array<uint64_t> skip;
        std::vector<uint32_t> slots_before;
    };

    static bool is_poison(uint32_t x) { return x == 0xA5A5A5A5u; }

    Candidates visible(uint32_t position, uint32_t end) {
        const uint32_t first = c.window && position >= c.window ? position - c.window + 1 : 0;
        return {std::min(first, end), end};
    }

    Candidates candidates(size_t s) {
        const specache_seq& seq = (*seqs)[s];
        return seq.n_rows == 0 ? Candidates{0, 0} : visible(seq.n + seq.n_rows - 1, seq.no);
    }

    // Of row 0 where it is not the last, for the hits.
    Candidates first_candidates(size_t s) {
        const specache_seq& seq = (*seqs)[s];
        return seq.n_rows < 2 ? Candidates{0, 0} : visible(seq.n, seq.nq);
    }

    // Quarters and few of them: equal keys are frequent, different ones differ by more than any rounding.
    float score() {
        switch (c.scores) {
            case kDistinct:
                return 0.25f * float(int(random() % 200) - 160);
            case kTies:
                return float(int(random() % 3)) - 8.0f;
            case kEqual:
                return -3.0f;
            default:
                return random() % 50 == 0 ? float(random() % 4) : -200.0f;   // the others' 2^-200 is 0
        }
    }

    // From the second step on, most stay as they were: selections overlap.
    void fill_scores() {
        for (size_t s = 0; s < c.seqs.size(); s++) {
            const Candidates range = candidates(s), first_range = first_candidates(s);
            for (uint32_t h = 0; h < n_heads; h++) {
                (*first_lse)[s * n_heads + h] = float(int(random() % 4));
                (*lse)[s * n_heads + h] = float(int(random() % 4));
                for (uint32_t j = 0; j < score_stride; j++) {
                    const size_t at = (s * n_heads + h) * score_stride + j;
                    float &x = (*scores)[at], &first = (*first_scores)[at];
                    first = j < first_range.first || j >= first_range.end ? NAN
                            : is_score(x) && random() % 4 != 0           ? x
                                                                          : score();
                    if (j < range.first || j >= range.end) x = NAN;
                    else if (!is_score(x) || random() % 10 == 0) x = score();
                }
            }
        }
    }

    static bool is_score(float x) { return !std::isnan(x) && !is_poison(bit_cast<uint32_t>(x)); }

    void launch(uint32_t step) {
        specache_select_params p{};
        p.seqs = seqs->address(), p.scores = scores->address(), p.lse = lse->address();
        p.caches = tables->address();
        p.fetches = fetches->address(), p.fetch_counts = fetch_counts->address();
        p.selected = selected->address(), p.select_counts = select_counts->address();
        p.score_stride = score_stride;
        p.n_seqs = uint32_t(c.seqs.size()), p.n_heads = n_heads, p.n_kv_heads = c.kv_heads;
        p.top_k = c.top_k, p.window = c.window, p.capacity = capacity;
        if (wants_hits())
            p.hits = hits->address(), p.first_scores = first_scores->address(), p.first_lse = first_lse->address();
        Array<uint8_t> candidate_lists("candidates", specache_select_scratch_bytes(&p), device::Buffer::kWrite);
        p.candidates = candidate_lists.address();
        std::vector<device::Buffer*> all = {seqs.get(),         scores.get(),   lse.get(),          tables.get(),
                                            selected.get(),     fetches.get(),  fetch_counts.get(), select_counts.get(),
                                            first_scores.get(), first_lse.get(), hits.get()};
        for (auto& cache : caches) all.push_back(&cache->slots), all.push_back(&cache->skip);
        for (device::Buffer* b : all) b->upload();
        specache_launch launch;
        CHECK(specache_select_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
        if (launch.grid != 0) device::launch(specache_select_chunks, launch.grid, launch.block, 0, c.seed + step, p);
        CHECK(specache_select_merge_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
        if (launch.grid != 0) device::launch(specache_select_merge, launch.grid, launch.block, 0, c.seed + step + 9, p);
        for (device::Buffer* b : all) b->download();
    }

    // method.md, decode step 3.
    std::vector<uint32_t> twin(size_t s, uint32_t head, const Candidates& range, Array<float>& scores,
                               Array<float>& lse) {
        std::vector<std::pair<float, uint32_t>> order;
        for (uint32_t j = range.first; j < range.end; j++) {
            float sum = 0;
            for (uint32_t h = head * c.group_heads; h < (head + 1) * c.group_heads; h++) {
                const float p = std::exp2(scores[(s * n_heads + h) * score_stride + j] - lse[s * n_heads + h]);
                sum += p < 1.17549435e-38f ? 0.0f : p;
            }
            order.push_back({-sum, j});
        }
        std::sort(order.begin(), order.end());
        order.resize(std::min<size_t>(order.size(), c.top_k));
        std::vector<uint32_t> best;
        for (const auto& [_, j] : order) best.push_back(j);
        std::sort(best.begin(), best.end());
        return best;
    }

    void compare(size_t s, uint32_t head) {
        const std::string name = name_of(c);
        const size_t at = s * c.kv_heads + head;
        SeqCache& cache = *caches[s];
        if (c.top_k == 0) return;
        compare_hits(s, head);
        if ((*seqs)[s].n_rows == 0) {
            CHECK((*fetch_counts)[at] == 0 && (*select_counts)[at] == 0, "an unused entry fetches (%s)", name.c_str());
            return;
        }
        const std::vector<uint32_t> best = twin(s, head, candidates(s), *scores, *lse);
        CHECK((*select_counts)[at] == best.size(), "%u selected, not %zu (%s)", (*select_counts)[at], best.size(),
              name.c_str());
        for (size_t i = 0; i < c.top_k; i++) {
            const uint32_t got = (*selected)[at * c.top_k + i];
            if (i < best.size()) CHECK(got == best[i], "number %zu is %u, not %u (%s)", i, got, best[i], name.c_str());
        }
        // Pairs that are selected again stay where they are; the fetches are the others, ascending, one for each slot.
        const uint32_t *now = &cache.slots[head * c.top_k], *before = &cache.slots_before[head * c.top_k];
        std::set<uint32_t> held, fetched_slots;
        for (uint32_t i = 0; i < c.top_k; i++) {
            const uint32_t old = before[i];
            if (now[i] != SPECACHE_EMPTY_SLOT)
                CHECK(held.insert(now[i]).second, "two slots hold %u (%s)", now[i], name.c_str());
            const bool again = std::binary_search(best.begin(), best.end(), old);
            if (again) CHECK(now[i] == old, "slot %u had %u and has %u (%s)", i, old, now[i], name.c_str());
        }
        CHECK(std::equal(held.begin(), held.end(), best.begin(), best.end()), "slots hold something else (%s)",
              name.c_str());
        size_t fetched = 0;
        for (uint32_t j : best) {
            const uint32_t slot = uint32_t(std::find(now, now + c.top_k, j) - now);
            if (before[slot] == j) continue;
            const specache_fetch& fetch = (*fetches)[at * c.top_k + fetched++];
            CHECK(fetch.slot == slot && fetch.position == j, "fetch %zu is slot %u, position %u, not %u, %u (%s)",
                  fetched - 1, fetch.slot, fetch.position, slot, j, name.c_str());
        }
        CHECK((*fetch_counts)[at] == fetched, "%u fetches, not %zu (%s)", (*fetch_counts)[at], fetched, name.c_str());
        for (uint32_t j = 0; j < cache.skip_stride * SPECACHE_PAGE; j++) {
            const uint64_t word = cache.skip[head * cache.skip_stride + j / SPECACHE_PAGE];
            const bool bit = word >> (j % SPECACHE_PAGE) & 1;
            CHECK(bit == (held.count(j) != 0), "skip bit of %u is %d (%s)", j, bit, name.c_str());
        }
    }

    bool wants_hits() const { return c.seed % 3 != 0; }

    // method.md, "Quantities to report": row 0's own best among what was selected or could have been.
    void compare_hits(size_t s, uint32_t head) {
        const uint32_t got = (*hits)[s * c.kv_heads + head];
        if (!wants_hits()) {
            CHECK(is_poison(got), "%u hits that nobody wanted (%s)", got, name_of(c).c_str());
            return;
        }
        const uint32_t* held = &caches[s]->slots_before[head * c.top_k];
        uint32_t want = 0;
        for (uint32_t j : twin(s, head, first_candidates(s), *first_scores, *first_lse))
            want += uint32_t(std::count(held, held + c.top_k, j));
        CHECK(got == want, "%u hits, not %u (%s)", got, want, name_of(c).c_str());
        hits_seen += got;
    }

    // What lies beyond the counts of lists.
    void expect_untouched() {
        for (size_t at = 0; at < c.seqs.size() * c.kv_heads && c.steps == 1 && c.top_k != 0; at++)
            for (uint32_t i = (*select_counts)[at]; i < c.top_k; i++)
                CHECK(is_poison((*selected)[at * c.top_k + i]) && is_poison((*fetches)[at * c.top_k + i].slot),
                      "a list goes on beyond its count (%s)", name_of(c).c_str());
    }

    const Case& c;
    std::mt19937 random;
    uint32_t n_heads, capacity = 0, score_stride;
    std::unique_ptr<Array<specache_seq>> seqs;
    std::unique_ptr<Array<float>> scores, lse, first_scores, first_lse;
    std::unique_ptr<Array<specache_layer_cache>> tables;
    std::vector<std::unique_ptr<SeqCache>> caches;
    std::unique_ptr<Array<uint32_t>> selected, fetch_counts, select_counts, hits;
    std::unique_ptr<Array<specache_fetch>> fetches;
};

// ---- cases ------------------------------------------------------------------------------------------------------

static int cases = 0;

static void run_case(Case c) {
    c.seed = uint64_t(cases++);
    World(c).run();
}

static void all_cases() {
    // Candidates around k, around the block and around nothing.
    for (Scores scores : {kDistinct, kTies, kEqual, kPeaks})
        for (uint32_t k : {0, 1, 16, 64})
            run_case({2, 4, k, 0, scores, {{200, 128, 2}, {63, 0, 2}, {130, 64, 1}, {100, 64, 0}}});
    for (uint32_t no : {64, 448, 512, 576})
        for (uint32_t k : {no - 1, no, no + 1, 513u}) run_case({1, 2, k, 0, kTies, {{no + 70, no, 2}}});
    // Windows: within the candidates, at their ends, beyond them.
    for (uint32_t window : {1, 64, 72, 73, 74, 100, 200, 201, 202, 500})
        run_case({1, 3, 32, window, window % 2 ? kDistinct : kTies, {{200, 128, 2}, {135, 128, 1}}});
    // Sessions: slots fill, stay and change; with a window they also empty.
    run_case({2, 4, 16, 0, kDistinct, {{200, 128, 2}, {90, 64, 2}}, 6});
    run_case({1, 4, 64, 0, kPeaks, {{700, 640, 2}}, 6});
    run_case({1, 1, 64, 140, kTies, {{192, 128, 2}}, 12});
    // Several chunks, the largest k, ties across chunks.
    run_case({1, 1, 64, 0, kDistinct, {{20000, 19968, 2}}, 2});
    run_case({1, 1, 1024, 0, kEqual, {{20000, 19968, 2}}});
    run_case({1, 1, 2048, 0, kTies, {{9000, 8960, 2}}, 2});
    run_case({1, 1, 64, 8200, kTies, {{20000, 19968, 2}}});
    run_case({1, 16, 8, 0, kDistinct, {{8257, 8192, 2}, {8300, 8256, 1}}});
    // Around a chunk, with groups of threads of all sizes.
    for (uint32_t no : {4032, 4096, 4160})
        for (uint32_t k : {3, 16, 100, 256, 512}) run_case({1, 2, k, 0, k % 2 ? kTies : kPeaks, {{no + 66, no, 2}}});
}

static void random_cases(int count) {
    std::mt19937 random(7);
    for (int i = 0; i < count; i++) {
        Case c{};
        c.kv_heads = 1 + random() % 2;
        c.group_heads = 1 + random() % 4;
        c.top_k = random() % 2 ? random() % 100 : random() % 600;
        c.window = random() % 3 ? 0 : 1 + random() % 900;
        c.scores = Scores(random() % 4);
        c.steps = 1 + random() % 3;
        for (uint32_t s = 1 + random() % 3; s > 0; s--) {
            const uint32_t n = random() % 1000;
            c.seqs.push_back({n, uint32_t(random() % (n + 1)), uint32_t(random() % 3)});
        }
        run_case(c);
    }
}

// ---- the plan ---------------------------------------------------------------------------------------------------

using Params = specache_select_params;

static void expect_status(specache_status want, const char* part, void (*change)(Params&)) {
    Params p{};
    p.seqs = p.scores = p.lse = p.caches = p.selected = p.fetches = p.fetch_counts = p.candidates = 1 << 20;
    p.score_stride = 32768, p.n_seqs = 3, p.n_heads = 32, p.n_kv_heads = 8;
    p.top_k = 64, p.capacity = 32768;
    change(p);
    for (auto plan : {specache_select_plan, specache_select_merge_plan}) {
        specache_launch launch;
        const specache_status got = plan(&p, &launch);
        CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
        CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
    }
}

static void plans() {
    expect_status(SPECACHE_OK, "", [](Params&) {});
    expect_status(SPECACHE_OK, "", [](Params& p) { p.top_k = 0, p.seqs = 0; });
    expect_status(SPECACHE_OK, "", [](Params& p) { p.n_seqs = 0, p.seqs = 0; });
    expect_status(SPECACHE_OK, "", [](Params& p) { p.selected = p.select_counts = 0; });
    expect_status(SPECACHE_OK, "", [](Params& p) { p.hits = p.first_scores = p.first_lse = 1 << 20; });
    expect_status(SPECACHE_BAD_ADDRESS, "first_lse", [](Params& p) { p.hits = p.first_scores = 1 << 20; });
    expect_status(SPECACHE_BAD_ADDRESS, "hits", [](Params& p) { p.hits = 2; });
    expect_status(SPECACHE_UNSUPPORTED_TOP_K, "2049", [](Params& p) { p.top_k = 2049; });
    expect_status(SPECACHE_UNSUPPORTED_HEADS, "33 heads", [](Params& p) { p.n_heads = 33; });
    expect_status(SPECACHE_TOO_LARGE, "tokens", [](Params& p) { p.capacity = 1u << 31; });
    expect_status(SPECACHE_TOO_LARGE, "sequences",
                  [](Params& p) { p.n_seqs = p.n_kv_heads = 1u << 31, p.n_heads = p.n_kv_heads; });
    expect_status(SPECACHE_BAD_ADDRESS, "seqs", [](Params& p) { p.seqs += 8; });
    expect_status(SPECACHE_BAD_ADDRESS, "scores", [](Params& p) { p.scores = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "lse", [](Params& p) { p.lse = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "caches", [](Params& p) { p.caches = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "caches", [](Params& p) { p.caches += 8; });
    expect_status(SPECACHE_BAD_ADDRESS, "selected", [](Params& p) { p.selected += 2; });
    expect_status(SPECACHE_BAD_ADDRESS, "fetches", [](Params& p) { p.fetches += 4; });
    expect_status(SPECACHE_BAD_ADDRESS, "fetch_counts", [](Params& p) { p.fetch_counts = 0; });
    expect_status(SPECACHE_BAD_ADDRESS, "candidates", [](Params& p) { p.candidates += 4; });
}

int main() {
    plans();
    all_cases();
    random_cases(SPECACHE_RANDOM_CASES);
    CHECK(hits_seen > 1000, "%llu hits in all cases", (unsigned long long)hits_seen);
    std::printf("select_test: %d cases equal the twin (%s)\n", cases, device::kName);
}
