/* How attention and selection of a decode step are cut into pieces of work. Arithmetic only, for C, C++ and CUDA:
 * kernels and launch plans agree on it. Included after common.cuh where there are kernels.
 *
 * An item is what a warp takes in one go: a packed page (64 tokens, 3 to 10 KB) or a wide tile (16 pairs, 8 KB at
 * D = 128): about the same bytes, which is what they cost. The items of a sequence and KV head, in this order:
 *
 *   packed pages that a row sees | tiles of slots | tiles of wide pages, up to the last row's own pair
 *
 * A unit is a run of items and eight query columns; a CTA takes unit after unit, and what it finds is one part of the
 * result. A long sequence is cut so that alone, with eight columns, it gives every CTA of the GPU one unit, as two of them
 * would take twice as long as one. But for the GPU and the shape nothing matters but the sequence: the same numbers come out
 * alone and in any batch, with one row and with two. */
#ifndef SPECACHE_ATTN_WORK_H
#define SPECACHE_ATTN_WORK_H

#include "kernels.h"
#ifndef __cplusplus
#include <stdbool.h>
#endif

#ifndef SPECACHE_HOST_DEVICE
#define SPECACHE_HOST_DEVICE static inline
#endif

#ifdef __cplusplus
namespace specache {
#endif

static const uint32_t kColumns = 8;   /* n of mma.m16n8k16: column r * G + h is query head h of row r */
static const uint32_t kWideTile = 16; /* m of K, k of V */
static const uint32_t kAttnWarps = SPECACHE_ATTN_THREADS / 32;
/* Two items a warp: fewer, and beginning costs more than they do. */
static const uint32_t kMinUnitItems = 2 * (SPECACHE_ATTN_THREADS / 32);
/* The parts of a head stay below 1 % of its cache. */
static const uint32_t kMaxParts = 64;

SPECACHE_HOST_DEVICE uint32_t divide_up(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

/* The first position that a row at `position` sees. */
SPECACHE_HOST_DEVICE uint32_t first_seen(uint32_t position, uint32_t window) {
    return window != 0 && position >= window ? position - window + 1 : 0;
}

/* ---- shared memory of attention ---- */

static const uint32_t kMostStages = 4;
/* A CTA's own 256 bytes (Unit, Columns), and the 1 KB that every CTA costs; a multiprocessor has that much more than a CTA may
 * take. */
static const uint32_t kUnitBytes = 256;
static const uint32_t kCtaBytes = 1024;

/* Bytes of one KV head of a packed page. */
SPECACHE_HOST_DEVICE uint32_t packed_block_bytes(const specache_attn_params *p) {
    return SPECACHE_PAGE * (2 * p->head_dim * p->bits / 8 + (8 * p->head_dim >> (p->group_size == 64 ? 6 : 5)));
}

/* Bytes of one stage: the larger of the two kinds of item. */
SPECACHE_HOST_DEVICE uint32_t stage_bytes(const specache_attn_params *p) {
    const uint32_t page = packed_block_bytes(p), tile = kWideTile * 4 * p->head_dim;
    return page > tile ? page : tile;
}

/* Bytes of the queries as B operands, in five forms (AttnShared). */
SPECACHE_HOST_DEVICE uint32_t query_bytes(const specache_attn_params *p) { return 5 * kColumns * 2 * p->head_dim; }

SPECACHE_HOST_DEVICE uint32_t attn_shared_bytes(const specache_attn_params *p, uint32_t stages) {
    return query_bytes(p) + kAttnWarps * stages * stage_bytes(p);
}

/* Whether a multiprocessor has room for so many CTAs with so many stages. */
SPECACHE_HOST_DEVICE bool attn_fits(const specache_attn_params *p, uint32_t stages, uint32_t ctas) {
    return ctas * (attn_shared_bytes(p, stages) + kUnitBytes + kCtaBytes) <= p->shared_limit + kCtaBytes;
}

/* CTAs of a multiprocessor: as many as have room with two stages. Warps count for more than stages: a page keeps a warp
 * busy for longer than the next one takes to come, most of that time waiting for its own results. */
SPECACHE_HOST_DEVICE uint32_t attn_ctas(const specache_attn_params *p) {
    uint32_t ctas = SPECACHE_ATTN_CTAS(p->head_dim, p->bits);
    while (ctas > 1 && !attn_fits(p, 2, ctas)) ctas--;
    return ctas;
}

/* CTAs of the GPU. */
SPECACHE_HOST_DEVICE uint32_t attn_gpu_ctas(const specache_attn_params *p) {
    return attn_ctas(p) * (p->n_sms == 0 ? 1 : p->n_sms);
}

/* Stages of each warp's ring: as many as there is room for beside so many CTAs, at least two; 0 if two do not fit. */
SPECACHE_HOST_DEVICE uint32_t attn_stages(const specache_attn_params *p) {
    const uint32_t ctas = attn_ctas(p);
    for (uint32_t stages = kMostStages; stages >= 2; stages--)
        if (attn_fits(p, stages, ctas)) return stages;
    return 0;
}

/* ---- units of attention ---- */

/* Of a KV head and column tile. */
SPECACHE_HOST_DEVICE uint32_t most_parts(const specache_attn_params *p) {
    const uint32_t parts = attn_gpu_ctas(p) / p->n_kv_heads;
    return parts < 1 ? 1 : parts < kMaxParts ? parts : kMaxParts;
}

/* The items of one sequence and KV head, and how many make a unit. */
typedef struct SeqWork {
    uint32_t first_page; /* that row 0 sees among the packed ones */
    uint32_t pages;      /* packed */
    uint32_t slot_tiles;
    uint32_t wide_start; /* position of the first wide tile, a multiple of 16 */
    uint32_t wide_tiles;
    uint32_t items;        /* pages, slot tiles and wide tiles */
    uint32_t column_tiles; /* of eight query columns */
    uint32_t unit_items;
    uint32_t parts; /* units of one KV head and column tile */
} SeqWork;

SPECACHE_HOST_DEVICE SeqWork seq_work(const specache_attn_params *p, const specache_seq *seq) {
    SeqWork w = {0, 0, 0, 0, 0, 0, 0, 0, 0};
    if (seq->n_rows == 0) return w;
    const uint32_t first = first_seen(seq->n, p->window), packed_pages = seq->nq / SPECACHE_PAGE;
    w.first_page = first / SPECACHE_PAGE < packed_pages ? first / SPECACHE_PAGE : packed_pages;
    w.pages = packed_pages - w.first_page;
    w.slot_tiles = packed_pages != 0 ? divide_up(p->top_k, kWideTile) : 0;
    w.wide_start = first > seq->nq ? first / kWideTile * kWideTile : seq->nq;
    w.wide_tiles = divide_up(seq->n + seq->n_rows - w.wide_start, kWideTile);
    w.items = w.pages + w.slot_tiles + w.wide_tiles;
    w.column_tiles = divide_up(seq->n_rows * (p->n_heads / p->n_kv_heads), kColumns);
    /* Each warp as many. */
    const uint32_t even = divide_up(divide_up(w.items, most_parts(p)), kAttnWarps) * kAttnWarps;
    w.unit_items = even > kMinUnitItems ? even : kMinUnitItems;
    w.parts = divide_up(w.items, w.unit_items);
    return w;
}

/* Of all KV heads. */
SPECACHE_HOST_DEVICE uint32_t seq_units(const SeqWork *w, uint32_t n_kv_heads) {
    return n_kv_heads * w->parts * w->column_tiles;
}

/* An upper bound of units over all steps of a batch: every entry in use with two rows and as long as it may get, read
 * wide. */
SPECACHE_HOST_DEVICE uint64_t most_units(const specache_attn_params *p) {
    const uint32_t items = divide_up(p->capacity, kWideTile) + 1 + divide_up(p->top_k, kWideTile);
    const uint32_t needed = divide_up(items, kMinUnitItems), most = most_parts(p);
    const uint32_t tiles = divide_up(2 * (p->n_heads / p->n_kv_heads), kColumns);
    return (uint64_t)p->n_seqs * p->n_kv_heads * (needed < most ? needed : most) * tiles;
}

/* Floats of a part: sums [8][D], then maximum and sum of each column. */
SPECACHE_HOST_DEVICE uint32_t part_floats(uint32_t head_dim) { return kColumns * (head_dim + 2); }

/* ---- selection ---- */

static const uint32_t kSelectChunk = 4096; /* candidates of a CTA: eight keys a thread */
static const uint32_t kMostTopK = 2048;    /* every chunk but the last gives k */

SPECACHE_HOST_DEVICE uint32_t most_chunks(const specache_select_params *p) {
    return divide_up(p->capacity, kSelectChunk);
}

#ifdef __cplusplus
} /* namespace specache */
#endif
#endif
