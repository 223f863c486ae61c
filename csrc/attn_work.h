// How attention of a decode step is cut into pieces of work. Arithmetic only: kernels and launch plans agree on it.
// Included after ptx.cuh where there are kernels.
//
// An item is what a warp takes in one go: a packed page (64 tokens, 3 to 10 KB) or a wide tile (16 pairs, 8 KB at
// D = 128): about the same bytes, which is what they cost. The items of a sequence and KV head, in this order:
//
//   packed pages that a row sees | tiles of slots | tiles of wide pages, up to the last row's own pair
//
// A unit is a run of items and eight query columns; a CTA takes unit after unit, and what it finds is one part of the
// result. How a sequence is cut depends on nothing but the sequence: the same numbers come out alone and in any batch.
#pragma once

#include "abi.h"

#ifndef SPECACHE_HOST_DEVICE
#define SPECACHE_HOST_DEVICE inline
#endif

namespace specache {

constexpr uint32_t kColumns = 8;     // n of mma.m16n8k16: column r * G + h is query head h of row r
constexpr uint32_t kWideTile = 16;   // m of K, k of V
constexpr uint32_t kAttnWarps = 4;
// Four items a warp: fewer, and filling the pipeline costs more than they do.
constexpr uint32_t kMinUnitItems = 4 * kAttnWarps;
// Eight KV heads then give 512 units, two for each CTA of an H100, and the parts of a head stay below 1 % of its cache.
constexpr uint32_t kMaxParts = 64;

// What plans accept: positions and what is added to them stay below 2^31, and products of counts below 2^64.
constexpr uint32_t kMostTokens = 1u << 30;
constexpr uint32_t kMostSeqs = 1u << 20;
constexpr uint32_t kMostHeads = 1u << 16;

SPECACHE_HOST_DEVICE constexpr uint32_t divide_up(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

// The first position that a row at `position` sees.
SPECACHE_HOST_DEVICE constexpr uint32_t first_seen(uint32_t position, uint32_t window) {
    return window != 0 && position >= window ? position - window + 1 : 0;
}

// The items of one sequence and KV head, and how many make a unit.
struct SeqWork {
    uint32_t first_page;   // that row 0 sees among the packed ones
    uint32_t pages;        // packed
    uint32_t slot_tiles;
    uint32_t wide_start;   // position of the first wide tile, a multiple of 16
    uint32_t wide_tiles;
    uint32_t column_tiles;   // of eight query columns
    uint32_t unit_items;
    uint32_t parts;   // units of one KV head and column tile

    SPECACHE_HOST_DEVICE uint32_t items() const { return pages + slot_tiles + wide_tiles; }
    SPECACHE_HOST_DEVICE uint32_t units(uint32_t n_kv_heads) const { return n_kv_heads * parts * column_tiles; }
};

SPECACHE_HOST_DEVICE SeqWork seq_work(const specache_attn_params& p, const specache_seq& seq) {
    SeqWork w{};
    if (seq.n_rows == 0) return w;
    const uint32_t first = first_seen(seq.n, p.window), packed_pages = seq.nq / SPECACHE_PAGE;
    w.first_page = first / SPECACHE_PAGE < packed_pages ? first / SPECACHE_PAGE : packed_pages;
    w.pages = packed_pages - w.first_page;
    w.slot_tiles = p.slots != 0 && packed_pages != 0 ? divide_up(p.top_k, kWideTile) : 0;
    w.wide_start = first > seq.nq ? first / kWideTile * kWideTile : seq.nq;
    w.wide_tiles = divide_up(seq.n + seq.n_rows - w.wide_start, kWideTile);
    w.column_tiles = divide_up(seq.n_rows * (p.n_heads / p.n_kv_heads), kColumns);
    const uint32_t even = divide_up(w.items(), kMaxParts);
    w.unit_items = even > kMinUnitItems ? even : kMinUnitItems;
    w.parts = divide_up(w.items(), w.unit_items);
    return w;
}

// An upper bound of units over all steps of a batch: every entry in use with two rows and as long as it may get, read
// wide.
SPECACHE_HOST_DEVICE uint64_t most_units(const specache_attn_params& p) {
    const uint32_t items = divide_up(p.capacity, kWideTile) + 1 + divide_up(p.top_k, kWideTile);
    const uint32_t parts = divide_up(items, kMinUnitItems) < kMaxParts ? divide_up(items, kMinUnitItems) : kMaxParts;
    return uint64_t(p.n_seqs) * p.n_kv_heads * parts * divide_up(2 * (p.n_heads / p.n_kv_heads), kColumns);
}

// Floats of a part: sums [8][D], then maximum and sum of each column.
SPECACHE_HOST_DEVICE constexpr uint32_t part_floats(uint32_t head_dim) { return kColumns * (head_dim + 2); }

#ifndef SPECACHE_PLAN_ONLY
SPECACHE_DEVICE specache_seq load_seq(uint64_t seqs, uint32_t index) {
    const uint4* at = reinterpret_cast<const uint4*>(seqs) + 2 * index;
    const uint4 halves[2] = {load_device(at), load_device(at + 1)};
    return bit_cast<specache_seq>(halves);
}
#endif

}   // namespace specache
