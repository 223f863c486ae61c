// fetch.cu and post.cu against plain twins: counts from nothing to k, more heads than a CTA has threads, an entry that is
// not in use, any number of CTAs; pairs that nobody fetched must stay as they were. Each case fetches from the pages of the
// host, and again from where the host gathers what the post tells it.
#include "../fetch.cu"
#include "../post.cu"

#include <algorithm>
#include <array>
#include <numeric>

#include "numbers.h"

using namespace specache;

struct Case {
    uint32_t seqs, kv_heads, head_dim, top_k, pages, ctas;
    uint32_t fill;   // of 100 heads, how many want any
};

static uint64_t seed = 0;

// What the selection leaves: distinct slots and positions, and poison behind the count.
struct Lists {
    std::vector<specache_fetch> fetches;
    std::vector<uint32_t> counts;

    Lists(Random& random, const Case& c) {
        for (uint32_t head = 0; head < c.seqs * c.kv_heads; head++) {
            std::vector<uint32_t> slots(c.top_k), positions(c.pages * SPECACHE_PAGE);
            std::iota(slots.begin(), slots.end(), 0);
            std::iota(positions.begin(), positions.end(), 0);
            std::shuffle(slots.begin(), slots.end(), random);
            std::shuffle(positions.begin(), positions.end(), random);
            const uint32_t most = random() % 100 < c.fill ? std::min(c.top_k, c.pages * SPECACHE_PAGE) : 0;
            const uint32_t count = most == 0 ? 0 : random() % 3 == 0 ? most : random() % (most + 1);
            for (uint32_t i = 0; i < c.top_k; i++)
                fetches.push_back(i < count ? specache_fetch{slots[i], positions[i]} : specache_fetch{~0u, ~0u});
            counts.push_back(count);
        }
    }
};

// What the post says is wanted, gathered in that order as a thread of the host does it. `page(i)`: page i of all.
template <class Page>
static std::vector<uint8_t> gather(const Case& c, uint64_t seqs, uint64_t fetches, uint64_t counts, uint32_t pair, Page page) {
    const uint32_t room = c.seqs * c.kv_heads * c.top_k;
    Array<uint64_t> wanted("wanted", room);   // specache_wanted
    Array<uint32_t> bell("bell", 1);
    const specache_post_params p{seqs, fetches, counts, wanted.address(), bell.address(), c.seqs, c.kv_heads, c.top_k, 0};
    specache_launch launch;
    CHECK(specache_post_plan(&p, &launch) == SPECACHE_OK && launch.grid == 1, "%s", launch.message);
    device::launch(specache_post_wanted, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    wanted.download();
    bell.download();
    CHECK(bell[0] >= 1 && bell[0] <= 1 + room, "the bell says %u", bell[0]);
    std::vector<uint8_t> gathered;
    for (uint32_t i = 0; i + 1 < bell[0]; i++) {
        const uint32_t head = uint32_t(wanted[i]), position = uint32_t(wanted[i] >> 32), s = head / c.kv_heads;
        CHECK(s < c.seqs && position < c.pages * SPECACHE_PAGE, "pair %u: head %u, position %u", i, head, position);
        const uint8_t* from = page(s * c.pages + position / SPECACHE_PAGE);
        from += (head % c.kv_heads * SPECACHE_PAGE + position % SPECACHE_PAGE) * pair;
        gathered.insert(gathered.end(), from, from + pair);
    }
    for (uint32_t i = bell[0] - 1; i < room; i++) CHECK(wanted[i] == 0xA5A5A5A5A5A5A5A5, "more is posted than is wanted");
    gathered.resize(std::max<size_t>(gathered.size(), 16), 0xEE);
    return gathered;
}

static void test(const Case& c, bool by_host) {
    Random random(unsigned(c.seqs * 7 + c.top_k + c.pages));
    Lists lists(random, c);
    const uint32_t pair = 4 * c.head_dim, pages = c.seqs * c.pages;
    const uint64_t page_bytes = uint64_t(c.kv_heads) * SPECACHE_PAGE * pair, slot_bytes = c.kv_heads * c.top_k * pair;
    std::vector<uint8_t> host(pages * page_bytes);
    for (uint8_t& byte : host) byte = uint8_t(random());
    Array<uint8_t> host_in("host pages", host), pairs("pairs", c.seqs * slot_bytes);
    // Pages and slots of a sequence lie anywhere: here from the last to the first. The last entry is not in use.
    std::vector<uint64_t> addresses;
    for (uint32_t i = 0; i < pages; i++) addresses.push_back(host_in.address() + (pages - 1 - i) * page_bytes);
    Array<uint64_t> addresses_in("page lists", addresses), fetched("fetched", 1);
    Array<uint64_t>::fill(fetched, {1ull << 40});
    std::vector<specache_seq> seqs;
    std::vector<specache_layer_cache> caches;
    constexpr uint64_t kNowhere = device::kNowhere;
    for (uint32_t s = 0; s < c.seqs; s++) {
        seqs.push_back({0, 0, 0, s != 0 && s + 1 == c.seqs ? 0u : 2u, 0, {}});
        caches.push_back({kNowhere, kNowhere, addresses_in.address() + s * c.pages * 8, kNowhere,
                          pairs.address() + (c.seqs - 1 - s) * slot_bytes, kNowhere, ~0u, {}});
    }
    Array<specache_seq> seqs_in("seqs", seqs);
    Array<specache_layer_cache> caches_in("caches", caches);
    Array<specache_fetch> fetches_in("fetches", lists.fetches);
    Array<uint32_t> counts_in("fetch_counts", lists.counts);
    const auto page_at = [&](size_t page) { return &host[(pages - 1 - page) * page_bytes]; };
    Array<uint8_t> gathered("gathered", !by_host ? std::vector<uint8_t>(16)
                                                 : gather(c, seqs_in.address(), fetches_in.address(),
                                                          counts_in.address(), pair, page_at));
    const specache_fetch_params p{seqs_in.address(),
                                  caches_in.address(),
                                  fetches_in.address(),
                                  counts_in.address(),
                                  c.ctas % 2 == 1 ? fetched.address() : 0,
                                  by_host ? gathered.address() : 0,
                                  c.seqs,
                                  c.kv_heads,
                                  c.head_dim,
                                  c.top_k,
                                  c.ctas,
                                  0};
    specache_launch launch;
    CHECK(specache_fetch_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    CHECK(c.ctas == 0 ? launch.grid >= SPECACHE_FETCH_MIN_CTAS : launch.grid == c.ctas, "%u CTAs", launch.grid);
    device::launch(specache_fetch_pairs, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    pairs.download();
    fetched.download();

    std::vector<uint8_t> want(pairs.bytes(), 0xA5);
    uint64_t total = 0;
    for (uint32_t head = 0; head < c.seqs * c.kv_heads; head++) {
        const uint32_t s = head / c.kv_heads, kv_head = head % c.kv_heads;
        for (uint32_t i = 0; i < lists.counts[head] && seqs[s].n_rows != 0; i++, total++) {
            const specache_fetch fetch = lists.fetches[head * c.top_k + i];
            const uint8_t* from = page_at(s * c.pages + fetch.position / SPECACHE_PAGE);
            from += (kv_head * SPECACHE_PAGE + fetch.position % SPECACHE_PAGE) * pair;
            std::copy_n(from, pair, &want[(c.seqs - 1 - s) * slot_bytes + (kv_head * c.top_k + fetch.slot) * pair]);
        }
    }
    for (size_t i = 0; i < want.size(); i++)
        CHECK(pairs[i] == want[i], "byte %zu of slot %zu: B %u, Hkv %u, D %u, k %u, %u CTAs", i % pair, i / pair,
              c.seqs, c.kv_heads, c.head_dim, c.top_k, c.ctas);
    CHECK(fetched[0] == (1ull << 40) + (c.ctas % 2 == 1 ? total : 0), "%llu counted, not %llu",
          (unsigned long long)(fetched[0] - (1ull << 40)), (unsigned long long)total);
}

static void expect_status(specache_status want, const char* part, void (*change)(specache_fetch_params&)) {
    constexpr uint64_t a = 1 << 20;
    specache_fetch_params p{a, a, a, a, a, a, 3, 8, 128, 64, 4, 0};
    change(p);
    specache_launch launch;
    const specache_status got = specache_fetch_plan(&p, &launch);
    CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
    CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
}

static void plans() {
    using P = specache_fetch_params;
    expect_status(SPECACHE_OK, "", [](P&) {});
    expect_status(SPECACHE_OK, "", [](P& p) { p.n_ctas = 0, p.fetched = 0; });
    expect_status(SPECACHE_OK, "", [](P& p) { p.top_k = 0, p.seqs = 0; });
    expect_status(SPECACHE_OK, "", [](P& p) { p.n_seqs = 0, p.caches = 0; });
    expect_status(SPECACHE_UNSUPPORTED_HEAD_DIM, "96", [](P& p) { p.head_dim = 96; });
    expect_status(SPECACHE_UNSUPPORTED_TOP_K, "2049", [](P& p) { p.top_k = 2049; });
    expect_status(SPECACHE_UNSUPPORTED_HEADS, "0 KV heads", [](P& p) { p.n_kv_heads = 0; });
    expect_status(SPECACHE_TOO_LARGE, "sequences", [](P& p) { p.n_seqs = 1u << 20, p.n_kv_heads = 1u << 16; });
    expect_status(SPECACHE_BAD_ADDRESS, "caches", [](P& p) { p.caches += 8; });
    expect_status(SPECACHE_BAD_ADDRESS, "fetched", [](P& p) { p.fetched += 4; });
    expect_status(SPECACHE_BAD_ADDRESS, "gathered", [](P& p) { p.gathered += 8; });
    expect_status(SPECACHE_BAD_ADDRESS, "fetch_counts", [](P& p) { p.fetch_counts = 0; });
}

static void post_plans() {
    constexpr uint64_t a = 1 << 20;
    specache_launch launch;
    const specache_post_params good{a, a, a, a, a, 3, 8, 64, 0};
    specache_post_params p = good;
    p.n_seqs = 0;
    CHECK(specache_post_plan(&p, &launch) == SPECACHE_OK && launch.grid == 0, "no sequence: %u CTAs", launch.grid);
    p = good, p.top_k = 2049;
    CHECK(specache_post_plan(&p, &launch) == SPECACHE_UNSUPPORTED_TOP_K, "%s", launch.message);
    p = good, p.bell = 0;
    CHECK(specache_post_plan(&p, &launch) == SPECACHE_BAD_ADDRESS && std::strstr(launch.message, "bell"), "%s", launch.message);
    p = good, p.wanted += 4;
    CHECK(specache_post_plan(&p, &launch) == SPECACHE_BAD_ADDRESS && std::strstr(launch.message, "wanted"), "%s",
          launch.message);
}

// Few pairs are few CTAs' work.
static void own_ctas() {
    for (auto [seqs, ctas] : {std::array<uint32_t, 2>{1, 4}, {3, 6}, {8, 16}, {24, 16}}) {
        constexpr uint64_t a = 1 << 20;
        const specache_fetch_params p{a, a, a, a, a, 0, seqs, 8, 128, 64, 0, 0};
        specache_launch launch;
        CHECK(specache_fetch_plan(&p, &launch) == SPECACHE_OK && launch.grid == ctas, "%u CTAs for %u sequences", launch.grid,
              seqs);
    }
}

int main() {
    plans();
    post_plans();
    own_ctas();
    const Case cases[] = {{1, 1, 64, 1, 1, 1, 100},   {1, 8, 128, 64, 4, 0, 90},  {3, 2, 64, 64, 2, 3, 70},
                          {5, 4, 128, 33, 1, 5, 50},  {1, 3, 128, 200, 5, 2, 100}, {90, 8, 64, 3, 1, 4, 30},
                          {140, 8, 64, 2, 1, 7, 100}, {2, 2, 128, 7, 3, 61, 0}};
    for (const Case& c : cases) test(c, false), test(c, true);
    std::printf("fetch_test: %zu cases equal the twin (%s)\n", std::size(cases), device::kName);
}
