// y = W x for 1 to 16 rows of x, at the speed at which W comes from memory.
//
// Every number of W is used once per row and 16 rows are few, so nothing but the stream of W counts. A CTA has 32
// features (two tiles of 16 rows of W) and all of k; its eight warps share k, and their sums meet in shared memory
// once, in a fixed order: no atomics, and the bits of a row depend on the shape of W and on that row alone, not on how
// many there are beside it.
//
// Fragments
// ---------
// W is the A operand of mma.m16n8k16, x the B operand: eight rows of x fill n = 8, two n-tiles make 16. In A, lane
// 4i + j holds rows i and i + 8, and of k the pairs j and j + 4. Which k a pair stands for is free as long as W and x
// agree, so a lane's pairs are those it gets by loading 16 bytes:
//
//   chunk of 32 k:   lane 4i + j has k = 8j .. 8j + 7 of its rows      (64 contiguous bytes of a row: lanes j = 0 .. 3)
//   mma 0            pair j -> k = 8j, 8j + 1       pair j + 4 -> 8j + 2, 8j + 3
//   mma 1            pair j -> k = 8j + 4, 8j + 5   pair j + 4 -> 8j + 6, 8j + 7
//
// and of x, where i counts rows as well (columns of B), lane 4i + j reads the same 8 k. So a lane multiplies what it
// has loaded itself: no barrier and no shuffle in the loop. Two chunks that follow each other make the 128-byte lines
// of W; the same warp reads both. (fp32 weights: k = 4j .. 4j + 3 for mma 0, 16 more for mma 1.)
//
// Numbers
// -------
// x stays fp32. A lane splits it into hi + lo, two numbers of W's type, and multiplies both: the products are exact, x
// keeps 16 bits or more (an error of 2^-16 at most with bf16; fp16 see Operand), sums are fp32. That doubles the mma,
// which is free: at 16 rows a step of a warp (2 KiB of W) is 16 of them and about 240 instructions (8 and 120 up to 8
// rows), and memory brings such a step every 100 clocks and SM (H200; 160 A100, 400 A6000, 650 RTX 4090): a quarter of
// the tensor cores' rate, 60 % of the issue slots. RMS norm costs no pass of its own: every CTA sees all of x, so it
// adds up the squares on the way, and the sums are divided by the root at the very end.
//
// Bytes in flight
// ---------------
// Little's law: 4.8 TB/s (H200) x 0.8 us under load = 3.8 MB, 29 KB for each of 132 SMs; half of that on an A100.
// A step of a lane is 64 bytes of W (fp32: 128). They wait in shared memory, kDepth steps of each warp, as a queue of
// each lane's own: it copies 16 bytes at a time (cp.async) and reads back just what it has copied. 64 KB for a CTA of 8
// warps, of which 48 are on their way while a step is multiplied; two CTAs fit an SM (one on those with 100 KB), and 64
// CTAs are enough to fill the bus.
//
// Registers would do as well if the compiler let them: loads into registers are waited for by scoreboards, of which a
// warp has six, and nvcc 13.0 gave all loads of this loop the same one, so that every step waited for the loads that
// were issued last. An H200 read W at half its rate then. What is copied asynchronously is waited for by count.
//
// x comes from L1 and L2, kAhead steps ahead: per SM and 32 features 4 * n_rows bytes for 64 of W, a quarter of W's
// traffic at 4 rows and as much at 16. The loop has no branch, which would make the compiler wait for all of them.
#pragma once

#include "kernels.h"
#include "ptx.cuh"

namespace specache {

constexpr int kWarps = SPECACHE_LINEAR_THREADS / 32;   // of a CTA
constexpr int kTileFeatures = 16;   // rows of A
constexpr int kTiles = 2;           // of one CTA
constexpr int kCtaFeatures = kTiles * kTileFeatures;
constexpr int kTileRows = 8;   // columns of B
constexpr int kChunk = 32;     // k of one step

// How numbers of W's type T become operands: kParts numbers of 16 bits each, and x two of the same type. fp32 weights
// are split like x: for models that have no 16-bit form, at half the speed.
template <class T> struct Operand;

template <> struct Operand<Bf16> {
    static constexpr int kBytes = 2, kParts = 1;
    static constexpr float kScale = 1.0f;
    static SPECACHE_DEVICE uint32_t narrow(float2 x) { return Bf16::narrow(x.x, x.y); }
    static SPECACHE_DEVICE float2 widen(uint32_t pair) { return Bf16::widen(pair); }
    static SPECACHE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_m16n8k16_bf16(d, a, b0, b1);
    }
};

template <> struct Operand<Fp32> : Operand<Bf16> {
    static constexpr int kBytes = 4, kParts = 2;
};

// fp16 ends at 65504, and the residual stream of a large model comes near: x / 16 is finite up to a million, and the
// step of lo is still 2^-20 of x. Between 0.002 and a million the error is at most 2^-12 of x, less than rounding to
// fp16 alone gives; above 0.1 it is at most 2^-17.
template <> struct Operand<Fp16> {
    static constexpr int kBytes = 2, kParts = 1;
    static constexpr float kScale = 1.0f / 16;
    static SPECACHE_DEVICE uint32_t narrow(float2 x) { return Fp16::narrow(x.x, x.y); }
    static SPECACHE_DEVICE float2 widen(uint32_t pair) { return Fp16::widen(pair); }
    static SPECACHE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        mma_m16n8k16(d, a, b0, b1);
    }
};

// x as hi + lo, a pair of numbers at a time.
struct Split {
    uint32_t hi;
    uint32_t lo;
};

template <class T> SPECACHE_DEVICE Split split_pair(float2 x) {
    const uint32_t bits = Operand<T>::narrow(x);
    const float2 hi = Operand<T>::widen(bits);
    return Split{bits, Operand<T>::narrow(make_float2(x.x - hi.x, x.y - hi.y))};
}

// A lane's numbers of a chunk: where the first ones lie for j = 1, and the second four of eight.
template <class T> constexpr int kLaneNumbers = 16 / Operand<T>::kBytes;
template <class T> constexpr int kSecondFour = Operand<T>::kBytes == 2 ? 4 : kChunk / 2;

// Steps of W in shared memory: fp32 steps are twice as large.
template <class T> constexpr int kDepth = 8 / Operand<T>::kBytes;

// Steps of x in registers: there is room for two of up to 8 rows.
template <int N_TILES> constexpr int kAhead = N_TILES == 1 ? 2 : 1;

// CTAs of an SM that registers must not forbid: 128 a thread, or 255 for fp32.
template <class T> constexpr int kCtas = Operand<T>::kBytes == 2 ? 2 : 1;

// What one CTA multiplies.
struct Factors {
    const uint8_t* weight[kTiles];   // first row of W of each tile
    int n_features[kTiles];          // rows of W from there on; those beyond repeat the last and are nobody's
    const float* x;                  // [n_rows][k]
    const float* norm;               // [k]; null: x is taken as it is
    int n_rows;
    int k;   // multiple of 8, at least 32
};

// Where the warps' sums meet. A pitch of 36 words: a store by lanes (i, j) to row 2j, feature i touches all banks once.
template <int N_TILES> struct ProductShared {
    float sums[kWarps][N_TILES * kTileRows][kCtaFeatures + 4];
    float squares[kWarps][N_TILES * kTileRows];
};

// One step of W: 16 bytes (fp32: twice 16) of rows i and i + 8 of each tile.
template <class T> struct WeightStep {
    static constexpr int kLoads = Operand<T>::kBytes / 2;
    uint4 rows[kTiles][2][kLoads];

    // A of mma m: the parts of rows i, i + 8 of k pair j, then of pair j + 4.
    SPECACHE_DEVICE void fragment(int t, int m, uint32_t (&a)[Operand<T>::kParts][4]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (kLoads == 1) {
                const uint4& eight = rows[t][half][0];
                a[0][half] = m == 0 ? eight.x : eight.z;
                a[0][half + 2] = m == 0 ? eight.y : eight.w;
            } else {
                const float4 four = bit_cast<float4>(rows[t][half][m % kLoads]);
                const Split first = split_pair<T>(make_float2(four.x, four.y));
                const Split second = split_pair<T>(make_float2(four.z, four.w));
                a[0][half] = first.hi, a[0][half + 2] = second.hi;
                a[Operand<T>::kParts - 1][half] = first.lo, a[Operand<T>::kParts - 1][half + 2] = second.lo;
            }
        }
    }
};

// One step of x: 8 numbers of a row of each n-tile, and of the norm's weight.
template <int N_TILES> struct InputStep {
    float4 x[N_TILES][2];
    float4 norm[2];
};

// B for the two mma of a step.
template <int N_TILES> struct InputFragment {
    Split pairs[N_TILES][4];
};

// A lane's share of the product. `queue`: kDepth steps of every warp, SPECACHE_LINEAR_SHARED bytes.
template <class T, int N_TILES, bool NORM> class Product {
    static constexpr int kBytes = Operand<T>::kBytes, kLoads = WeightStep<T>::kLoads;
    static constexpr int kPiece = 32 * 16;   // bytes of a warp's load
    static constexpr int kStep = kTiles * 2 * kLoads * kPiece;
    static_assert(kWarps * kDepth<T> * kStep == SPECACHE_LINEAR_SHARED, "the plan asks for as much");
    static_assert(kDepth<T> % 2 == 0, "steps come in pairs");

public:
    SPECACHE_DEVICE Product(const Factors& factors, uint8_t* queue)
        : queue_(queue + warp() * kDepth<T> * kStep + lane() * 16) {
        const int i = lane() / 4, first = kLaneNumbers<T> * (lane() % 4), k = warp() * 2 * kChunk;
        left_ = factors.k - first - k;
        for (int t = 0; t < kTiles; t++)
            for (int half = 0; half < 2; half++) {
                const int row = min_of(i + 8 * half, factors.n_features[t] - 1);
                weight_[t][half] = factors.weight[t] + (size_t(row) * factors.k + first + k) * kBytes;
            }
#if SPECACHE_INJECTED_BUG == 3   // the tests must see one row too many
        const int last = factors.n_rows;
#else
        const int last = factors.n_rows - 1;
#endif
        for (int n = 0; n < N_TILES; n++)
            x_[n] = factors.x + (size_t(min_of(row_of(n), last)) * factors.k + first + k);
        if (NORM) norm_ = factors.norm + first + k;
        // Of the first warp, so that all have as many: those beyond k read nothing and multiply zeros.
        steps_ = (factors.k + kSweep - 1) / kSweep * 2;
    }

    // The whole loop. What the previous kernel wrote is not read before its end.
    SPECACHE_DEVICE void run() {
        InputStep<N_TILES> input[kAhead<N_TILES>];
        int weights_left = left_, input_left = left_;
#pragma unroll
        for (int s = 0; s < kDepth<T>; s++) copy_weights(s, s % 2, weights_left);
        let_next_kernel_start();
        wait_for_previous_kernel();
#pragma unroll
        for (int s = 0; s < kAhead<N_TILES>; s++) load_input(input[s], s, input_left);
#pragma unroll 1
        for (int first = 0; first < steps_; first += 2) {
#pragma unroll(kAhead<N_TILES>)   // more would take more registers
            for (int i = 0; i < 2; i++) {
                const int s = first % kDepth<T> + i;
                InputStep<N_TILES>& x = input[i % kAhead<N_TILES>];
                const InputFragment<N_TILES> b = split(x);
                load_input(x, (i + kAhead<N_TILES>) % 2, input_left);
#if SPECACHE_INJECTED_BUG != 6   // the tests must see numbers that nobody waited for
                copy_async_wait<kDepth<T> - 1>();
#endif
                multiply(weights(s), b);
                copy_weights(s, i, weights_left);
            }
        }
        copy_async_wait<0>();
    }

    // Leaves the sums in shared memory; a barrier must follow.
    SPECACHE_DEVICE void store(ProductShared<N_TILES>& shared) const {
        const int i = lane() / 4, j = lane() % 4;
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int t = 0; t < kTiles; t++)
#pragma unroll
                for (int d = 0; d < 4; d++) {
                    const int row = n * kTileRows + 2 * j + d % 2, feature = t * kTileFeatures + i + 8 * (d / 2);
                    shared.sums[warp()][row][feature] = sums_[t][n][d];
                }
            if (!NORM) continue;
            float squares = squares_[n];
            squares += __shfl_xor_sync(~0u, squares, 1);
            squares += __shfl_xor_sync(~0u, squares, 2);
            if (j == 0) shared.squares[warp()][row_of(n)] = squares;
        }
    }

private:
    static SPECACHE_DEVICE int lane() { return int(threadIdx.x) % 32; }
    static SPECACHE_DEVICE int warp() { return int(threadIdx.x) / 32; }
    static SPECACHE_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
    static SPECACHE_DEVICE int row_of(int n) { return n * kTileRows + lane() / 4; }

    // Warps take turns by two chunks, one line of each row of W: numbers of k from a pair of steps to the next.
    static constexpr int kSweep = kWarps * 2 * kChunk;

    // The copies of the next step, the first or the second of a pair, go to slot `s`: one batch. `left`: numbers of the row
    // from the lane's first one of this pair on; zeros come from beyond.
    SPECACHE_DEVICE void copy_weights(int s, int of_pair, int& left) {
        const int second = of_pair * kChunk;
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int load = 0; load < kLoads; load++) {
                    const int at = second + kSecondFour<T> * load;
                    copy_async_16(piece(s, t, half, load), weight_[t][half] + at * kBytes, at < left ? 16 : 0);
                }
        copy_async_commit();
        if (of_pair == 0) return;
        left -= kSweep;
        for (int t = 0; t < kTiles; t++)
            for (int half = 0; half < 2; half++) weight_[t][half] += kSweep * kBytes;
    }

    SPECACHE_DEVICE WeightStep<T> weights(int s) const {
        WeightStep<T> step;
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int load = 0; load < kLoads; load++)
                    step.rows[t][half][load] = *reinterpret_cast<const uint4*>(piece(s, t, half, load));
        return step;
    }

    SPECACHE_DEVICE uint8_t* piece(int s, int t, int half, int load) const {
        return queue_ + s * kStep + ((t * 2 + half) * kLoads + load) * kPiece;
    }

    static SPECACHE_DEVICE float4 load_four(const float* from) {
        return load_device(reinterpret_cast<const float4*>(from));
    }

    // The same of x, to registers.
    SPECACHE_DEVICE void load_input(InputStep<N_TILES>& to, int of_pair, int& left) {
        const float4 zero = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int four = 0; four < 2; four++) {
            const int at = of_pair * kChunk + kSecondFour<T> * four;
            const bool inside = at < left;
#pragma unroll
            for (int n = 0; n < N_TILES; n++) to.x[n][four] = inside ? load_four(x_[n] + at) : zero;
            if (NORM) to.norm[four] = inside ? load_four(norm_ + at) : zero;
        }
        if (of_pair == 0) return;
        left -= kSweep;
        for (int n = 0; n < N_TILES; n++) x_[n] += kSweep;
        if (NORM) norm_ += kSweep;
    }

    SPECACHE_DEVICE InputFragment<N_TILES> split(const InputStep<N_TILES>& input) {
        InputFragment<N_TILES> b;
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                float2 x = pair_of(input.x[n], pair);
                if (NORM) {
                    squares_[n] = fmaf(x.x, x.x, fmaf(x.y, x.y, squares_[n]));
                    const float2 weight = pair_of(input.norm, pair);
                    x = make_float2(x.x * weight.x, x.y * weight.y);
                }
                b.pairs[n][pair] = split_pair<T>(make_float2(x.x * Operand<T>::kScale, x.y * Operand<T>::kScale));
            }
        return b;
    }

    static SPECACHE_DEVICE float2 pair_of(const float4 (&eight)[2], int pair) {
        const float4& four = eight[pair / 2];
        return pair % 2 == 0 ? make_float2(four.x, four.y) : make_float2(four.z, four.w);
    }

    SPECACHE_DEVICE void multiply(const WeightStep<T>& weights, const InputFragment<N_TILES>& b) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
#if SPECACHE_INJECTED_BUG == 2   // the tests must see pairs of k out of order
            const int first = 2 * (1 - m);
#else
            const int first = 2 * m;
#endif
#pragma unroll
            for (int t = 0; t < kTiles; t++) {
                uint32_t a[Operand<T>::kParts][4];
                weights.fragment(t, m, a);
#pragma unroll
                for (int n = 0; n < N_TILES; n++) {
                    const Split &x = b.pairs[n][first], &y = b.pairs[n][first + 1];
                    Operand<T>::mma(sums_[t][n], a[0], x.hi, y.hi);
                    Operand<T>::mma(sums_[t][n], a[0], x.lo, y.lo);
                    if (Operand<T>::kParts == 2) Operand<T>::mma(sums_[t][n], a[Operand<T>::kParts - 1], x.hi, y.hi);
                }
            }
        }
    }

    uint8_t* const queue_;                  // this lane's pieces
    const uint8_t* weight_[kTiles][2];      // rows i and i + 8, at the pair of steps that is copied next
    const float* x_[N_TILES];               // the same of x; rows beyond the last repeat it and are nobody's
    const float* norm_ = nullptr;
    int left_;    // numbers of a row from this lane's first one on
    int steps_;
    float sums_[kTiles][N_TILES][4] = {};
    float squares_[N_TILES] = {};
};

// After the product, thread t has row t / 16 and feature t % 16 of both tiles; threads without a row rest.
struct Cell {
    int row;
    int feature;
};

SPECACHE_DEVICE Cell cell_of_thread() {
    return Cell{int(threadIdx.x) / kTileFeatures, int(threadIdx.x) % kTileFeatures};
}

// The sum over the warps for a cell: tile 0 in x, tile 1 in y. Behind a barrier.
template <class T, int N_TILES> SPECACHE_DEVICE float2 sum_warps(const ProductShared<N_TILES>& shared, Cell cell) {
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
        sum.x += shared.sums[w][cell.row][cell.feature];
        sum.y += shared.sums[w][cell.row][kTileFeatures + cell.feature];
    }
    return make_float2(sum.x / Operand<T>::kScale, sum.y / Operand<T>::kScale);
}

// The sum of squares of a row. Behind a barrier.
template <int N_TILES> SPECACHE_DEVICE float sum_squares(const ProductShared<N_TILES>& shared, int row) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += shared.squares[w][row];
    return sum;
}

}   // namespace specache
