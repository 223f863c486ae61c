// draw.cu against the definitions of src/sampler.rs in double: all options alone and together, ties at every border,
// tokens that are ruled out, histories, vocabularies around a block's and a list's size, the ends of the random
// numbers; rows without a draw keep what the argmax said.
#include "../draw.cu"

#include <algorithm>
#include <cfloat>
#include <set>

#include "numbers.h"

using namespace specache;

static uint64_t seed = 0;
static int draws = 0, near_borders = 0;

struct Options {
    uint32_t top_k = 0;
    float temperature = 1, top_p = 1, min_p = 0, penalty = 1;
};

// ---- the twin ---------------------------------------------------------------------------------------------------

struct Candidate {
    uint32_t id;
    float score;
    double weight;
};

static uint32_t argmax(const std::vector<float>& xs) {
    return uint32_t(std::max_element(xs.begin(), xs.end()) - xs.begin());
}

static uint32_t twin(const std::vector<float>& logits, const std::set<uint32_t>& history, const Options& o, double u) {
    std::vector<float> scores = logits;
    for (uint32_t id : history) {
        const float logit = logits[id], score = logit < 0 ? logit * o.penalty : logit / o.penalty;
        if (o.penalty != 1 && std::isfinite(logit)) scores[id] = std::clamp(score, -FLT_MAX, FLT_MAX);
    }
    const float best = scores[argmax(scores)];
    if (o.temperature == 0) return argmax(scores);
    float least = -INFINITY;
    if (o.top_k != 0 && o.top_k < scores.size()) {
        std::vector<float> sorted = scores;
        std::nth_element(sorted.begin(), sorted.begin() + o.top_k - 1, sorted.end(), std::greater<float>());
        least = sorted[o.top_k - 1];
    }
    std::vector<Candidate> kept;
    double total = 0;
    for (uint32_t id = 0; id < scores.size(); id++) {
        if (scores[id] < least || scores[id] == -INFINITY) continue;
        kept.push_back({id, scores[id], std::exp((double(scores[id]) - best) / o.temperature)});
        total += kept.back().weight;
    }
    if (o.top_p < 1) {
        std::stable_sort(kept.begin(), kept.end(),
                         [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
        double before = 0;
        size_t count = 0;
        while (count < kept.size() && before < double(o.top_p) * total) before += kept[count++].weight;
        kept.resize(count);
    }
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Candidate& c) { return c.weight < o.min_p; }),
               kept.end());
    total = 0;
    for (const Candidate& c : kept) total += c.weight;
    double rest = u * total;
    for (const Candidate& c : kept)
        if ((rest -= c.weight) < 0) return c.id;
    while (kept.back().weight <= 0) kept.pop_back();
    return kept.back().id;
}

// The kernel's weights are fp32: next to a border the neighbour is right too.
static void expect_token(uint32_t got, const std::vector<float>& logits, const std::set<uint32_t>& history,
                         const Options& o, double u) {
    draws++;
    const uint32_t want = twin(logits, history, o, u);
    if (got == want) return;
    near_borders++;
    for (const double du : {-4e-6, 4e-6})
        for (const float dp : {0.0f, -4e-6f, 4e-6f}) {
            Options near = o;
            if (o.top_p < 1) near.top_p += dp;
            if (o.min_p > 0) near.min_p *= 1 + dp;
            if (twin(logits, history, near, std::clamp(u + du, 0.0, 1 - 0x1p-53)) == got) return;
        }
    CHECK(false, "token %u, not %u: vocabulary %zu, top-k %u, T %g, top-p %g, min-p %g, penalty %g, u %.17g", got, want,
          logits.size(), o.top_k, o.temperature, o.top_p, o.min_p, o.penalty, u);
}

// ---- launches ---------------------------------------------------------------------------------------------------

struct Row {
    std::vector<float> logits;
    std::set<uint32_t> history;
    bool seen, drawn;
    Options options;
    double u;
};

static void test(const std::vector<Row>& rows, bool with_tokens) {
    const uint32_t n = uint32_t(rows.size()), vocab = uint32_t(rows[0].logits.size()), words = (vocab + 31) / 32;
    std::vector<float> logits;
    std::vector<uint32_t> seen(n * words);
    std::vector<specache_choice> said;
    for (uint32_t r = 0; r < n; r++) {
        logits.insert(logits.end(), rows[r].logits.begin(), rows[r].logits.end());
        for (uint32_t id : rows[r].history) seen[r * words + id / 32] |= 1u << id % 32;
        const uint32_t best = argmax(rows[r].logits);
        said.push_back({best, SPECACHE_NONE, rows[r].logits[best], 77});
    }
    if (n > 3) said[3].first_bad = 0;
    Array<float> logits_in("logits", logits);
    Array<uint32_t> seen_in("seen", n * words), tokens("tokens", n);
    Array<uint32_t>::fill(seen_in, seen);
    Array<specache_choice> choices("choices", n);
    Array<specache_choice>::fill(choices, said);
    std::vector<specache_draw> entries;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t r = n - 1 - i;   // in another order
        const Row& row = rows[r];
        entries.push_back({row.seen ? seen_in.address() + uint64_t(r) * words * 4 : 0,
                           uint64_t(row.u * 0x1p53) << 11, row.drawn ? r : SPECACHE_NONE, row.options.top_k,
                           row.options.temperature, row.options.top_p, row.options.min_p, row.options.penalty});
    }
    Array<specache_draw> draws_in("draws", entries);
    const specache_draw_params p{draws_in.address(), logits_in.address(), choices.address(),
                                 with_tokens ? tokens.address() : 0, n, vocab};
    specache_launch launch;
    CHECK(specache_draw_plan(&p, &launch) == SPECACHE_OK, "%s", launch.message);
    device::launch(specache_draw_tokens, launch.grid, launch.block, launch.shared_bytes, seed++, p);
    for (device::Buffer* b : std::initializer_list<device::Buffer*>{&choices, &tokens, &seen_in}) b->download();
    for (uint32_t r = 0; r < n; r++) {
        const specache_choice got = choices[r];
        const bool drawn = rows[r].drawn && said[r].first_bad == SPECACHE_NONE && said[r].logit != -INFINITY;
        if (drawn) {
            expect_token(got.token, rows[r].logits, rows[r].seen ? rows[r].history : std::set<uint32_t>(),
                         rows[r].options, double(uint64_t(rows[r].u * 0x1p53)) * 0x1p-53);
            if (rows[r].seen) seen[r * words + got.token / 32] |= 1u << got.token % 32;
        } else {
            CHECK(got.token == said[r].token, "row %u was drawn", r);
        }
        CHECK(got.first_bad == said[r].first_bad && got.logit == said[r].logit && got.reserved == 77,
              "the rest of choice %u", r);
        const uint32_t token = drawn && with_tokens ? got.token : 0xA5A5A5A5u;
        CHECK(tokens[r] == token, "tokens[%u] is %u, not %u", r, tokens[r], token);
    }
    for (size_t i = 0; i < seen.size(); i++) CHECK(seen_in[i] == seen[i], "word %zu of a history", i);
}

enum Logits { kNormal, kTies, kFlat, kHoles, kPeak, kNone };

static std::vector<float> some_logits(Random& random, Logits kind, uint32_t vocab) {
    std::vector<float> x = normals(random, vocab, kind == kFlat ? 0.1f : 3);
    for (float& v : x) {
        if (kind == kTies) v = std::round(v);
        if ((kind == kHoles && random() % 3 == 0) || kind == kNone) v = -INFINITY;
    }
    if (kind == kHoles) x[random() % vocab] = 0;
    if (kind == kPeak) x[random() % vocab] = 200;
    return x;
}

static Row some_row(Random& random, uint32_t vocab) {
    std::uniform_real_distribution<double> uniform(0, 1);
    Row row;
    row.logits = some_logits(random, Logits(random() % 6), vocab);
    for (uint32_t i = random() % 20; i > 0; i--) row.history.insert(random() % vocab);
    row.seen = random() % 4 != 0, row.drawn = random() % 8 != 0;
    const uint32_t ks[] = {0, 0, 1, 3, 40, vocab, vocab - 1, 3000};
    const float temperatures[] = {1, 0.7f, 1.5f, 0, 1e-30f, 0.3f}, ps[] = {1, 1, 0.9f, 0.5f, 0.001f, 0.99f},
                mins[] = {0, 0, 0.05f, 0.5f}, penalties[] = {1, 1.1f, 0.8f, 30, 1e38f};
    row.options = {ks[random() % 8], temperatures[random() % 6], ps[random() % 6], mins[random() % 4],
                   penalties[random() % 5]};
    row.u = random() % 10 == 0 ? 0 : random() % 10 == 0 ? 1 - 0x1p-53 : uniform(random);
    return row;
}

static void plans() {
    constexpr uint64_t a = 1 << 20;
    const auto expect = [](specache_draw_params p, specache_status want, const char* part) {
        specache_launch launch;
        const specache_status got = specache_draw_plan(&p, &launch);
        CHECK(got == want, "status %d, not %d: %s", got, want, launch.message);
        CHECK(std::strstr(launch.message, part), "'%s' does not name '%s'", launch.message, part);
    };
    expect({a, a, a, a, 8, 128256}, SPECACHE_OK, "");
    expect({0, 0, 0, 0, 0, 128256}, SPECACHE_OK, "");
    expect({a, a, a, 0, 17, 128256}, SPECACHE_UNSUPPORTED_ROWS, "17");
    expect({a, a, a, 0, 1, 0}, SPECACHE_UNSUPPORTED_WIDTH, "vocabulary");
    expect({a, a, a, 0, 1, (1u << 20) + 1}, SPECACHE_UNSUPPORTED_WIDTH, "1048577");
    expect({a + 4, a, a, 0, 1, 5}, SPECACHE_BAD_ADDRESS, "draws");
    expect({a, a, a + 8, 0, 1, 5}, SPECACHE_BAD_ADDRESS, "choices");
}

int main() {
    plans();
    Random random(5);
    for (uint32_t vocab : {1u, 2u, 33u, 1000u, 2048u, 2049u, 5000u, 40000u})
        for (int i = 0; i < (vocab > 5000 ? 4 : 12); i++) {
            std::vector<Row> rows;
            for (uint32_t r = 1 + random() % 6; r > 0; r--) rows.push_back(some_row(random, vocab));
            test(rows, i % 2 == 0);
        }
    // Every option at the vocabulary of Gemma: 256 k.
    Row row = some_row(random, 256000);
    row.logits = some_logits(random, kNormal, 256000);
    row.seen = row.drawn = true, row.options = {50, 0.8f, 0.95f, 0.01f, 1.1f}, row.u = 0.4;
    test({row}, true);
    row.options = {0, 1, 1, 0, 1};
    test({row}, true);
    // As often as luck has it, and no more.
    CHECK(near_borders * 200 <= draws, "%d of %d draws differ from the twin's", near_borders, draws);
    std::printf("draw_test: %d draws equal the twin's, %d of them next to a border (%s)\n", draws, near_borders,
                device::kName);
}
