// A whole step of the dense half, launched as the host program does, against a plain twin: embed, per layer q, k, v
// (and head norms), the projection back, gate and up, down; logits, argmax. Attention is left out: it gives q. Shows
// that what one kernel leaves is what the next one reads, and where K and V go when a sequence crosses a page border.
#include <algorithm>
#include <map>

#include "../embed.cu"
#include "../linear.cu"
#include "../sample.cu"
#include "dense_twin.h"

using namespace specache;

constexpr uint32_t kVocab = 90, kLayers = 2, kHidden = 64, kInner = 112, kHeads = 2, kKvHeads = 1, kDim = 64;
constexpr uint32_t kRows = 5, kPages = 4, kListed = 3;   // pages of the pool and of each list
constexpr float kEps = 1e-5f;
constexpr specache_dtype kType = SPECACHE_BF16;

// Weights as files have them.
struct Layer {
    Matrix q, k, v, o, gate, up, down;
    std::vector<float> input_norm, post_norm, q_norm, k_norm;

    Layer(Random& random, bool head_norm)
        : q(random, kType, kHeads * kDim, kHidden),
          k(random, kType, kKvHeads * kDim, kHidden),
          v(random, kType, kKvHeads * kDim, kHidden),
          o(random, kType, kHidden, kHeads * kDim),
          gate(random, kType, kInner, kHidden),
          up(random, kType, kInner, kHidden),
          down(random, kType, kHidden, kInner),
          input_norm(norm_weight(random, kHidden)),
          post_norm(norm_weight(random, kHidden)) {
        if (head_norm) q_norm = norm_weight(random, kDim), k_norm = norm_weight(random, kDim);
    }
};

struct Model {
    Matrix embed, lm_head;
    std::vector<float> final_norm, inv_freq;
    std::vector<Layer> layers;

    Model(Random& random, bool head_norm)
        : embed(random, kType, kVocab, kHidden),
          lm_head(random, kType, kVocab, kHidden),
          final_norm(norm_weight(random, kHidden)) {
        for (uint32_t l = 0; l < kLayers; l++) layers.emplace_back(random, head_norm);
        for (uint32_t i = 0; i < kDim / 2; i++) inv_freq.push_back(std::pow(1e4f, -float(2 * i) / kDim));
    }
};

// Two sequences of two rows, the first across a page border, and a row that fills up.
static const std::vector<uint32_t> kTokens = {5, 89, 0, 17, 3};
static const std::vector<specache_seq> kSeqs = {{127, 64, 64, 2, 0, {}}, {3, 0, 0, 2, 2, {}}};
static const uint32_t kPosition[kRows] = {127, 128, 3, 4, 0}, kPageOf[kRows] = {2, 0, 3, 3, 0};
constexpr uint32_t kFiller = 4;

constexpr uint64_t kPageNumbers = kKvHeads * SPECACHE_PAGE * 2 * kDim;   // of a wide page

static uint64_t seed = 0;

#define ENTRIES(dtype, T, N)                                                            \
    {"specache_qkv_" #dtype "_n" #N, (void*)specache_qkv_##dtype##_n##N},               \
        {"specache_residual_" #dtype "_n" #N, (void*)specache_residual_##dtype##_n##N}, \
        {"specache_gate_up_" #dtype "_n" #N, (void*)specache_gate_up_##dtype##_n##N},   \
        {"specache_logits_" #dtype "_n" #N, (void*)specache_logits_##dtype##_n##N},
static const std::map<std::string, void*> kernels = {
    SPECACHE_LINEAR_KERNELS(ENTRIES){"specache_embed_bf16", (void*)specache_embed_bf16},
    {"specache_head_norm", (void*)specache_head_norm},
    {"specache_argmax_slices", (void*)specache_argmax_slices},
    {"specache_argmax_merge", (void*)specache_argmax_merge}};

// What the host does for every kernel.
template <class Params> static void launch(specache_status (*plan)(const Params*, specache_launch*), const Params& p) {
    specache_launch l;
    CHECK(plan(&p, &l) == SPECACHE_OK, "%s", l.message);
    if (l.grid == 0) return;
    device::launch((void (*)(Params))kernels.at(l.kernel), l.grid, l.block, l.shared_bytes, seed++, p);
}

// Inputs of one layer on the device.
struct LayerInputs {
    Array<uint8_t> q, k, v, o, gate, up, down;
    Optional input_norm, post_norm, q_norm, k_norm;

    explicit LayerInputs(const Layer& l)
        : q("q", l.q.bytes),
          k("k", l.k.bytes),
          v("v", l.v.bytes),
          o("o", l.o.bytes),
          gate("gate", l.gate.bytes),
          up("up", l.up.bytes),
          down("down", l.down.bytes),
          input_norm("input_norm", l.input_norm),
          post_norm("post_norm", l.post_norm),
          q_norm("q_norm", l.q_norm),
          k_norm("k_norm", l.k_norm) {}
};

// Buffers of a step.
struct Step {
    Array<float> x{"x", kRows * kHidden}, rope{"rope", kRows * kDim}, q{"q", kRows * kHeads * kDim},
        k{"k", kRows * kKvHeads * kDim}, inner{"inner", kRows * kInner}, logits{"logits", kRows * kVocab};
    Array<uint64_t> append{"append", kLayers * SPECACHE_MAX_ROWS};
    Array<uint32_t> bad_layer{"bad_layer", kRows}, next{"next tokens", kRows};
    Array<uint16_t> pool{"wide pages", kLayers * kPages * kPageNumbers};
    Array<specache_choice> scratch{"scratch", kRows}, choices{"choices", kRows};
    Array<uint64_t> lists{"lists", kLayers * kSeqs.size() * kListed};
    Array<specache_layer_cache> caches{"caches", kLayers * kSeqs.size()};

    // Addresses for the pages that rows append to, and for nothing else.
    Step() {
        constexpr uint64_t kNowhere = device::kNowhere;
        std::vector<uint64_t> addresses(lists.size(), kNowhere);
        std::vector<specache_layer_cache> tables;
        for (uint32_t layer = 0; layer < kLayers; layer++)
            for (size_t s = 0; s < kSeqs.size(); s++) {
                const size_t list = tables.size() * kListed;
                for (uint32_t row = kSeqs[s].first_row; row < kSeqs[s].first_row + kSeqs[s].n_rows; row++)
                    addresses[list + kPosition[row] / SPECACHE_PAGE] =
                        pool.address() + 2 * (layer * kPages + kPageOf[row]) * kPageNumbers;
                tables.push_back(
                    {kNowhere, lists.address() + 8 * list, kNowhere, kNowhere, kNowhere, kNowhere, ~0u, {}});
            }
        Array<uint64_t>::fill(lists, addresses);
        Array<specache_layer_cache>::fill(caches, tables);
    }
};

static void run_layer(const LayerInputs& in, const Step& s, uint32_t layer) {
    const specache_qkv_params qkv{s.x.address(),
                                  in.input_norm.address(),
                                  in.q.address(),
                                  in.k.address(),
                                  in.v.address(),
                                  0,
                                  0,
                                  0,
                                  in.q_norm.address(),
                                  in.k_norm.address(),
                                  s.k.address(),
                                  s.rope.address(),
                                  s.append.address() + layer * SPECACHE_MAX_ROWS * 8,
                                  s.q.address(),
                                  s.bad_layer.address(),
                                  kRows,
                                  kHidden,
                                  kHeads,
                                  kKvHeads,
                                  kDim,
                                  layer,
                                  kEps,
                                  kType,
                                  kType,
                                  0};
    launch(specache_qkv_plan, qkv);
    launch(specache_head_norm_plan, qkv);
    launch(specache_residual_plan, specache_linear_params{s.q.address(), 0, in.o.address(), 0, s.x.address(), kRows,
                                                          kHeads * kDim, kHidden, kEps, kType, 0});
    launch(specache_gate_up_plan,
           specache_gate_up_params{s.x.address(), in.post_norm.address(), in.gate.address(), in.up.address(), 0, 0,
                                   s.inner.address(), kRows, kHidden, kInner, kEps, kType, 0});
    launch(specache_residual_plan, specache_linear_params{s.inner.address(), 0, in.down.address(), 0, s.x.address(),
                                                          kRows, kInner, kHidden, kEps, kType, 0});
}

static void run(const Model& m, Step& s) {
    Array<uint8_t> table("embed", m.embed.bytes), lm_head("lm_head", m.lm_head.bytes);
    Array<uint32_t> tokens("tokens", kTokens);
    Array<specache_seq> seqs("seqs", kSeqs);
    Array<float> inv_freq("inv_freq", m.inv_freq), final_norm("final_norm", m.final_norm);
    launch(
        specache_embed_plan,
        specache_embed_params{table.address(), tokens.address(), seqs.address(), s.caches.address(), inv_freq.address(),
                              s.x.address(), s.rope.address(), s.append.address(), s.bad_layer.address(), kRows,
                              uint32_t(kSeqs.size()), kHidden, kVocab, kLayers, kKvHeads, kDim, 1, kType, 0});
    for (uint32_t l = 0; l < kLayers; l++) run_layer(LayerInputs(m.layers[l]), s, l);
    launch(specache_logits_plan, specache_linear_params{s.x.address(), final_norm.address(), lm_head.address(), 0,
                                                        s.logits.address(), kRows, kHidden, kVocab, kEps, kType, 0});
    const specache_argmax_params argmax{
        s.logits.address(), s.scratch.address(), s.choices.address(), s.next.address(), kRows, kVocab};
    launch(specache_argmax_slices_plan, argmax);
    launch(specache_argmax_merge_plan, argmax);
    for (device::Buffer* b : std::initializer_list<device::Buffer*>{&s.logits, &s.pool, &s.next, &s.bad_layer})
        b->download();
}

// ---- the twin ---------------------------------------------------------------------------------------------------

static std::vector<double> times(const Matrix& w, const std::vector<double>& x) {
    std::vector<double> y;
    for (size_t f = 0; f < w.n; f++) y.push_back(product(w, f, x, {}).value);
    return y;
}

static void add(std::vector<double>& x, const std::vector<double>& y) {
    for (size_t i = 0; i < x.size(); i++) x[i] += y[i];
}

// K and V of a row in the pool; the second layer's input is the first one's output, so errors have grown.
static void compare_pairs(const Step& s, uint32_t row, uint32_t layer, const Heads& k, const Heads& v) {
    if (row == kFiller) return;
    const size_t page = layer * kPages + kPageOf[row];
    const size_t at = page * kPageNumbers + kPosition[row] % SPECACHE_PAGE * 2 * kDim;
    for (uint32_t i = 0; i < kDim; i++) {
        const float got_k = widen(kType, s.pool[at + i]), got_v = widen(kType, s.pool[at + kDim + i]);
        CHECK(std::fabs(got_k - k.value[i]) < std::fabs(k.value[i]) * 0x1p-8 + 1e-3, "k %g, not %g: row %u, layer %u",
              got_k, k.value[i], row, layer);
        CHECK(std::fabs(got_v - v.value[i]) < std::fabs(v.value[i]) * 0x1p-8 + 1e-3, "v %g, not %g: row %u, layer %u",
              got_v, v.value[i], row, layer);
    }
}

static std::vector<double> twin_logits(const Model& m, const Step& s, uint32_t row) {
    std::vector<double> x;
    std::vector<float> cos_sin;
    for (uint32_t i = 0; i < kHidden; i++) x.push_back(m.embed.at(kTokens[row], i));
    for (float f : m.inv_freq) {
        const float angle = float(kPosition[row]) * f;
        cos_sin.push_back(std::cos(angle));
        cos_sin.push_back(std::sin(angle));
    }
    for (uint32_t l = 0; l < kLayers; l++) {
        const Layer& layer = m.layers[l];
        const std::vector<double> input = normed(x, layer.input_norm, kEps);
        Heads q(layer.q, input, {}), k(layer.k, input, {}), v(layer.v, input, {});
        q.norm(kDim, layer.q_norm, kEps);
        k.norm(kDim, layer.k_norm, kEps);
        q.rotate(kDim, cos_sin.data());
        k.rotate(kDim, cos_sin.data());
        compare_pairs(s, row, l, k, v);
        add(x, times(layer.o, q.value));
        const std::vector<double> post = normed(x, layer.post_norm, kEps), up = times(layer.up, post);
        std::vector<double> inner = times(layer.gate, post);
        for (uint32_t i = 0; i < kInner; i++) inner[i] = silu_mul(inner[i], up[i]);
        add(x, times(layer.down, inner));
    }
    return times(m.lm_head, normed(x, m.final_norm, kEps));
}

static void test(bool head_norm) {
    Random random(head_norm);
    const Model model(random, head_norm);
    Step step;
    run(model, step);
    for (uint32_t r = 0; r < kRows; r++) {
        const std::vector<double> want = twin_logits(model, step, r);
        for (uint32_t i = 0; i < kVocab; i++)   // logits are about 1
            CHECK(std::fabs(step.logits[r * kVocab + i] - want[i]) < 1e-4, "logit %g, not %g: row %u, token %u",
                  step.logits[r * kVocab + i], want[i], r, i);
        const uint32_t best = uint32_t(std::max_element(want.begin(), want.end()) - want.begin());
        CHECK(step.next[r] == best, "token %u, not %u: row %u", step.next[r], best, r);
        CHECK(step.bad_layer[r] == SPECACHE_NONE, "bad layer %u: row %u", step.bad_layer[r], r);
    }
}

int main() {
    test(false);
    test(true);
    std::printf("step_test: two steps of %u layers equal the twin (%s)\n", kLayers, device::kName);
}
