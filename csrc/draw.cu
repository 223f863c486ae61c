// The next token by chance: repeat penalty, temperature, top-k, top-p, min-p and a draw, in the order and with the
// definitions of src/sampler.rs. A CTA for each row; the argmax kernels (sample.cu) have been there before, which say
// whether a token can be chosen at all, and what the best one is.
//
// A weight is e^((score - best) / temperature), fp32, the probability up to a common factor. Sums of weights are sums
// of whole numbers of 2^-43: exact, so that no order of adding them matters and the same number draws the same token
// on every run. The CPU's weights are fp64; they agree to about 1e-6, and the token is another only if the random
// number falls that close to a border between two.
//
// All questions are one: going down a list of tokens from the best, with which one does the sum of what they count pass
// a target? The k-th score (each counts 1), the last token of top-p and the drawn one (each counts its weight). It is
// found digit by digit of a key, from histograms (as in select.cu, with sums instead of counts). Keys are the score,
// the token, or both: the score first, then the lower token.
//
// A row of 128 k logits takes one SM about 5 us to read. A penalty reads it once, top-k three times, the sum of weights
// once; with another reading, what can still be chosen becomes a short list in shared memory, and the rest looks at
// that. Five readings with top-k, two with top-p alone. Where the list is too short (top-p of a flat row, no limit at
// all) every question reads the row for each of its digits: 17 times at most.
#include "block.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace specache {

constexpr uint32_t kDrawThreads = SPECACHE_DRAW_THREADS;
constexpr uint32_t kDrawWarps = kDrawThreads / 32;
constexpr int kDrawDigit = 11;   // bits
constexpr uint32_t kDrawBins = 1u << kDrawDigit;
constexpr uint32_t kDrawBinsPerThread = kDrawBins / kDrawThreads;
constexpr uint32_t kMostListed = 2048;
constexpr int kTokenBits = 20;
static_assert(SPECACHE_DRAW_MOST_VOCAB == 1 << kTokenBits, "a token has so many bits");
// A weight of 1. 2^20 of them are below 2^64.
constexpr float kWeightOne = 8796093022208.0f;   // 2^43

struct Listed {
    uint32_t token;
    float score;
};

struct DrawShared {
    uint32_t low[kDrawBins], high[kDrawBins];   // of 64-bit sums: two 32-bit atomics are fast everywhere
    Listed list[kMostListed];
    uint32_t n_listed;   // above kMostListed: the list is not complete, and not used
    uint64_t warp_sums[kDrawWarps];
    uint64_t rest;
    uint32_t digit;
};

// A row, and what has been ruled out so far.
struct DrawRow {
    specache_draw draw;
    const float* logits;
    uint32_t vocab;
    float best;        // the highest score
    float least;       // scores below are ruled out: top-k
    float min_weight;
    uint64_t cut;      // keys below are ruled out: top-p
    bool listed;
};

SPECACHE_DEVICE float draw_minus_infinity() { return bit_cast<float>(0xFF800000u); }

// ---- scores, weights, keys --------------------------------------------------------------------------------------

// The penalty applies once to a token that has occurred; extreme ones do not make infinities of finite logits.
SPECACHE_DEVICE float penalised(float logit, float penalty) {
    const float most = bit_cast<float>(0x7F7FFFFFu), score = logit < 0.0f ? logit * penalty : logit / penalty;
    return logit < -most ? logit : fminf(fmaxf(score, -most), most);
}

SPECACHE_DEVICE float score_of(const DrawRow& row, uint32_t token) {
    float score = load_device(row.logits + token);
    if (row.draw.seen != 0 && row.draw.penalty != 1.0f) {
        const uint32_t word = load_device(reinterpret_cast<const uint32_t*>(row.draw.seen) + token / 32);
        if ((word >> token % 32 & 1) != 0) score = penalised(score, row.draw.penalty);
    }
    return score + 0.0f;   // -0 becomes 0: equal scores have equal keys
}

SPECACHE_DEVICE float weight_of(const DrawRow& row, float score) {
    return expf((score - row.best) / row.draw.temperature);
}

SPECACHE_DEVICE uint64_t whole_weight(float weight) { return uint64_t(weight * kWeightOne); }

// Ordered as scores are.
SPECACHE_DEVICE uint32_t score_key(float score) {
    const uint32_t bits = bit_cast<uint32_t>(score);
    return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

SPECACHE_DEVICE float score_of_key(uint32_t key) {
    return bit_cast<float>(key >> 31 != 0 ? key & 0x7FFFFFFFu : ~key);
}

// Lower tokens come first.
SPECACHE_DEVICE uint32_t token_key(uint32_t token) { return SPECACHE_DRAW_MOST_VOCAB - 1 - token; }

SPECACHE_DEVICE uint32_t token_of_key(uint64_t key) {
    return SPECACHE_DRAW_MOST_VOCAB - 1 - (uint32_t(key) & (SPECACHE_DRAW_MOST_VOCAB - 1));
}

SPECACHE_DEVICE uint64_t full_key(float score, uint32_t token) {
    return uint64_t(score_key(score)) << kTokenBits | token_key(token);
}

SPECACHE_DEVICE bool may_be_drawn(const DrawRow& row, float score, uint32_t token, float weight) {
    return score >= row.least && score > draw_minus_infinity() && weight >= row.min_weight &&
           full_key(score, token) >= row.cut;
}

// ---- what all threads of a block do together --------------------------------------------------------------------

// Calls f(token, score) for this thread's tokens: those of the list, or all.
template <class F> SPECACHE_DEVICE void each_token(const DrawRow& row, const DrawShared& shared, F f) {
    if (row.listed) {
        for (uint32_t i = threadIdx.x; i < shared.n_listed; i += kDrawThreads)
            f(shared.list[i].token, shared.list[i].score);
        return;
    }
#pragma unroll 4
    for (uint32_t token = threadIdx.x; token < row.vocab; token += kDrawThreads) f(token, score_of(row, token));
}

// The same for those that may be drawn, with their weights as whole numbers.
template <class F> SPECACHE_DEVICE void each_candidate(const DrawRow& row, const DrawShared& shared, F f) {
    each_token(row, shared, [&](uint32_t token, float score) {
        const float weight = weight_of(row, score);
        if (may_be_drawn(row, score, token, weight)) f(token, score, whole_weight(weight));
    });
}

SPECACHE_DEVICE uint64_t highest_of_block(DrawShared& shared, uint64_t key) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const uint64_t other = __shfl_xor_sync(~0u, key, distance);
        key = other > key ? other : key;
    }
    if (threadIdx.x % 32 == 0) shared.warp_sums[threadIdx.x / 32] = key;
    __syncthreads();
    for (uint32_t w = 0; w < kDrawWarps; w++) key = shared.warp_sums[w] > key ? shared.warp_sums[w] : key;
    __syncthreads();
    return key;
}

// Adds up what keys count by one digit, bits [low, high) of those that begin with the digits found so far.
struct DigitSums {
    DrawShared& shared;
    uint64_t prefix;
    int low, high;

    SPECACHE_DEVICE void operator()(uint64_t key, uint64_t count) const {
        if (key >> high != prefix) return;
        const uint32_t bin = uint32_t(key >> low) & ((1u << (high - low)) - 1);
        const uint32_t low_half = uint32_t(count), before = shared_add(&shared.low[bin], low_half);
        const uint32_t high_half = uint32_t(count >> 32) + (before + low_half < low_half ? 1 : 0);
        if (high_half != 0) shared_add(&shared.high[bin], high_half);
    }
};

SPECACHE_DEVICE uint64_t bin_sum(const DrawShared& shared, uint32_t bin) {
    return uint64_t(shared.high[bin]) << 32 | shared.low[bin];
}

// The bin with which the sum of bins, from the highest down, passes the target.
SPECACHE_DEVICE void find_bin(DrawShared& shared, uint64_t target) {
    const uint32_t highest = kDrawBins - 1 - threadIdx.x * kDrawBinsPerThread;
    uint64_t own = 0, all;
    for (uint32_t b = 0; b < kDrawBinsPerThread; b++) own += bin_sum(shared, highest - b);
    uint64_t before = block_scan(shared.warp_sums, own, all);
    if (before > target || before + own <= target) return;
    uint32_t bin = highest;
    while (before + bin_sum(shared, bin) <= target) before += bin_sum(shared, bin--);
    shared.digit = bin;
    shared.rest = target - before;
}

// Of keys of `bits` bits, the one with which the sum of counts, from the highest key down, passes the target; the sum
// of all is above it. `each(count)` calls count(key, how much) for this thread's tokens.
template <class Each> SPECACHE_DEVICE uint64_t find_key(DrawShared& shared, int bits, uint64_t target, Each each) {
    uint64_t prefix = 0;   // the digits found so far
#pragma unroll 1
    for (int high = bits; high > 0;) {   // bits [low, high) are the next digit
        const int low = high > kDrawDigit ? high - kDrawDigit : 0;
        for (uint32_t b = threadIdx.x; b < kDrawBins; b += kDrawThreads) shared.low[b] = shared.high[b] = 0;
        __syncthreads();
        each(DigitSums{shared, prefix, low, high});
#if SPECACHE_INJECTED_BUG != 1   // the tests must see a missing barrier
        __syncthreads();
#endif
        find_bin(shared, target);
        __syncthreads();
        prefix = prefix << (high - low) | shared.digit;
        target = shared.rest;
        high = low;
    }
    return prefix;
}

// ---- the steps, in the CPU's order ------------------------------------------------------------------------------

// The best score and its token. Without a penalty the argmax knows both.
SPECACHE_DEVICE uint64_t best_key(const DrawRow& row, DrawShared& shared, const specache_choice& choice) {
    if (row.draw.seen == 0 || row.draw.penalty == 1.0f) return full_key(choice.logit + 0.0f, choice.token);
    uint64_t best = 0;
    each_token(row, shared, [&](uint32_t token, float score) {
        const uint64_t key = full_key(score, token);
        best = key > best ? key : best;
    });
    return highest_of_block(shared, best);
}

// The k-th score; tokens that tie with it stay.
SPECACHE_DEVICE float kth_score(const DrawRow& row, DrawShared& shared) {
    if (row.draw.top_k == 0 || row.draw.top_k >= row.vocab) return draw_minus_infinity();
    const uint64_t key = find_key(shared, 32, row.draw.top_k - 1, [&](const DigitSums& count) {
        each_token(row, shared, [&](uint32_t, float score) { count(score_key(score), 1); });
    });
    return score_of_key(uint32_t(key));
}

SPECACHE_DEVICE uint64_t sum_weights(const DrawRow& row, DrawShared& shared) {
    uint64_t sum = 0, total;
    each_candidate(row, shared, [&](uint32_t, float, uint64_t weight) { sum += weight; });
    block_scan(shared.warp_sums, sum, total);
    return total;
}

// Writes the list of what top-p and the draw can find. Tokens below 1 - p of the sum's mean add up to less than 1 - p:
// top-p needs none of them.
SPECACHE_DEVICE bool list_candidates(const DrawRow& row, DrawShared& shared, uint64_t total) {
    if (threadIdx.x == 0) shared.n_listed = 0;
    __syncthreads();
    const double needed = double(total) * (1.0 - double(row.draw.top_p)) / double(row.vocab) * 0.999;
    const uint64_t least = row.draw.top_p < 1.0f ? uint64_t(needed) : whole_weight(row.draw.min_p);
    each_candidate(row, shared, [&](uint32_t token, float score, uint64_t weight) {
        if (weight < least || weight == 0) return;
        const uint32_t at = shared_add(&shared.n_listed, 1);
        if (at < kMostListed) shared.list[at] = Listed{token, score};
    });
    __syncthreads();
    return shared.n_listed <= kMostListed;
}

// The key of the last token of top-p: the one with which the sum reaches p of all.
SPECACHE_DEVICE uint64_t top_p_cut(const DrawRow& row, DrawShared& shared, uint64_t total) {
    const uint64_t reach = uint64_t(ceil(double(row.draw.top_p) * double(total)));
    const uint64_t target = reach == 0 ? 0 : reach < total ? reach - 1 : total - 1;
    return find_key(shared, 32 + kTokenBits, target, [&](const DigitSums& count) {
        each_candidate(row, shared,
                       [&](uint32_t token, float score, uint64_t weight) { count(full_key(score, token), weight); });
    });
}

// By likelihood after top-p, else by token: the order in which the CPU has them.
SPECACHE_DEVICE uint32_t drawn_token(const DrawRow& row, DrawShared& shared) {
    const uint64_t target = __umul64hi(row.draw.random, sum_weights(row, shared));
#if SPECACHE_INJECTED_BUG == 2   // the tests must see another order
    const bool by_score = false;
#else
    const bool by_score = row.draw.top_p < 1.0f;
#endif
    const uint64_t key = find_key(shared, by_score ? 32 + kTokenBits : kTokenBits, target, [&](const DigitSums& count) {
        each_candidate(row, shared, [&](uint32_t token, float score, uint64_t weight) {
            count(by_score ? full_key(score, token) : token_key(token), weight);
        });
    });
    return token_of_key(key);
}

SPECACHE_DEVICE uint32_t choose(DrawRow& row, DrawShared& shared, const specache_choice& choice) {
    const uint64_t best = best_key(row, shared, choice);
    row.best = score_of_key(uint32_t(best >> kTokenBits));
    if (row.draw.temperature == 0.0f) return token_of_key(best);
    row.least = kth_score(row, shared);
    const uint64_t total = sum_weights(row, shared);
    row.listed = list_candidates(row, shared, total);
    if (row.draw.top_p < 1.0f) row.cut = top_p_cut(row, shared, total);
    row.min_weight = row.draw.min_p;
    return drawn_token(row, shared);
}

SPECACHE_DEVICE specache_draw load_draw(uint64_t draws, uint32_t index) {
    constexpr uint32_t kWords = sizeof(specache_draw) / 8;
    uint64_t words[kWords];
#pragma unroll
    for (uint32_t w = 0; w < kWords; w++)
        words[w] = load_device(reinterpret_cast<const uint64_t*>(draws) + index * kWords + w);
    return bit_cast<specache_draw>(words);
}

SPECACHE_DEVICE void draw(const specache_draw_params& p) {
    SPECACHE_SHARED(DrawShared, shared);
    follow_previous_kernel();
    DrawRow row{};
    row.draw = load_draw(p.draws, blockIdx.x);
    if (row.draw.row == SPECACHE_NONE) return;
    row.logits = reinterpret_cast<const float*>(p.logits) + size_t(row.draw.row) * p.vocab;
    row.vocab = p.vocab;
    row.least = draw_minus_infinity();
    specache_choice* at = reinterpret_cast<specache_choice*>(p.choices) + row.draw.row;
    const specache_choice choice = load_device(at);
    // Nothing can be chosen: the argmax has said so, and nothing of it changes.
    if (choice.first_bad != SPECACHE_NONE || choice.logit == draw_minus_infinity()) return;
    const uint32_t token = choose(row, shared, choice);
    if (threadIdx.x != 0) return;
    store_device(&at->token, token);
    if (p.tokens != 0) store_device(reinterpret_cast<uint32_t*>(p.tokens) + row.draw.row, token);
    if (row.draw.seen != 0) device_or(reinterpret_cast<uint32_t*>(row.draw.seen) + token / 32, 1u << token % 32);
}

}   // namespace specache

// registers: <= 64 specache_draw_tokens   (1 CTA of 1024 threads an SM)
extern "C" __global__ void __launch_bounds__(SPECACHE_DRAW_THREADS)
    specache_draw_tokens(const __grid_constant__ specache_draw_params p) {
    specache::draw(p);
}
