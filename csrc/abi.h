/* Parameters of the kernels, shared by C++ kernels and the host program: plain C, fixed-width types, sizes asserted on
 * both sides. Addresses are 64-bit numbers: device addresses unless a field says host. */
#ifndef SPECACHE_ABI_H
#define SPECACHE_ABI_H

#ifdef __CUDACC_RTC__
typedef int int32_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#ifdef __cplusplus
#define SPECACHE_ASSERT_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), "size of " #type)
extern "C" {
#else
#define SPECACHE_ASSERT_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "size of " #type)
#endif

/* Tokens of a page, everywhere. */
#define SPECACHE_PAGE 64

/* Number types of a wide page. */
typedef uint32_t specache_dtype;
#define SPECACHE_FP16 0u
#define SPECACHE_BF16 1u

/* What a launch plan answers. Everything but OK comes with a sentence in specache_launch.message. */
typedef int32_t specache_status;
#define SPECACHE_OK 0
#define SPECACHE_UNSUPPORTED_HEAD_DIM 1
#define SPECACHE_UNSUPPORTED_BITS 2
#define SPECACHE_UNSUPPORTED_GROUP_SIZE 3
#define SPECACHE_UNSUPPORTED_DTYPE 4
#define SPECACHE_BAD_ADDRESS 5 /* null, or not aligned */
#define SPECACHE_BAD_STRIDE 6  /* too small for what it steps over, or not aligned */
#define SPECACHE_TOO_LARGE 7   /* more CTAs than a grid holds */

/* How a kernel is launched: made by the plan function of each op, run by whoever holds the driver. */
typedef struct specache_launch {
    const char *kernel;    /* entry point, static storage */
    uint32_t grid;         /* CTAs; 0: there is nothing to do, launch nothing */
    uint32_t block;        /* threads */
    uint32_t shared_bytes; /* dynamic shared memory */
    char message[108];     /* why the status is not OK; empty if it is */
} specache_launch;
SPECACHE_ASSERT_SIZE(specache_launch, 128);

/* pack.cu: quantise n_pages wide pages (all KV heads of one layer) into packed pages.
 *
 * wide page    [n_kv_heads][64][K: head_dim | V: head_dim] of dtype, contiguous: 64 * 2 * head_dim * 2 bytes a head
 * packed page  one block for each KV head in the format of kv_layout.cuh, contiguous, 128-byte aligned
 *
 * Page i of the list is read at     wide + wide_ids[i] * wide_page_stride + head * (64 * 4 * head_dim)
 * and written at                    packed + packed_ids[i] * packed_page_stride + head * packed_head_stride. */
typedef struct specache_pack_params {
    uint64_t wide;               /* device, 16-byte aligned */
    uint64_t packed;             /* device, 128-byte aligned */
    uint64_t wide_ids;           /* device, uint32_t [n_pages]; 0: page i is at index i */
    uint64_t packed_ids;         /* device, uint32_t [n_pages], no duplicates; 0: page i goes to index i */
    uint64_t wide_page_stride;   /* bytes, multiple of 16 */
    uint64_t packed_page_stride; /* bytes, multiple of 128 */
    uint64_t packed_head_stride; /* bytes, multiple of 128 */
    uint32_t n_pages;            /* pages of this launch */
    uint32_t n_kv_heads;         /* Hkv */
    uint32_t head_dim;           /* D: 64, 128 */
    uint32_t bits;               /* b: 1, 2, 4 */
    uint32_t group_size;         /* g: 32, 64 */
    specache_dtype dtype;        /* of the wide pages */
} specache_pack_params;
SPECACHE_ASSERT_SIZE(specache_pack_params, 80);

#ifndef __CUDACC_RTC__
/* Checks the parameters and names kernel, grid and shared memory. Host only; touches no device. */
specache_status specache_pack_plan(const specache_pack_params *params, specache_launch *launch);
#endif

/* ---- Attention of a decode step: attn_decode.cu, select.cu ---- */

#define SPECACHE_UNSUPPORTED_HEADS 8
#define SPECACHE_UNSUPPORTED_TOP_K 9
#define SPECACHE_TOO_MUCH_SHARED 10 /* more shared memory than the GPU has */

/* A slot that holds no pair. Fill a new slot table with bytes FF, a new skip table with zeros. */
#define SPECACHE_EMPTY_SLOT 0xFFFFFFFFu

/* Where one sequence stands in this step. In device memory and read there by every kernel below, so that a captured
 * graph stays valid while sequences grow. The same for all layers: what differs between them is a base address in the
 * parameters. */
typedef struct specache_seq {
    uint32_t n;           /* tokens in the cache: the position of row 0; row 1 stands at n + 1 */
    uint32_t nq;          /* positions [0, nq) are read packed; a multiple of 64, <= no */
    uint32_t no;          /* positions [0, no) may be selected; <= n. fetch mode: nq */
    uint32_t n_rows;      /* 1, 2; 0: the entry is not in use */
    uint32_t first_row;   /* index of row 0 in q and out */
    uint32_t packed_page; /* index of page 0 in packed_ids */
    uint32_t wide_page;   /* index of page nq / 64 in wide_ids; the pages up to the last row's pair follow */
    uint32_t cache;       /* index of the sequence in slots, pairs and skip */
} specache_seq;
SPECACHE_ASSERT_SIZE(specache_seq, 32);

/* attn_decode.cu: attention of all rows of a step over one layer's mixed cache, then the combine of its parts.
 *
 * Position j of a sequence is read from
 *   its slot        if j < nq and a slot of the KV head holds j (then its skip bit is set as well)
 *   a packed page   if j < nq otherwise                               page j / 64 of the sequence's packed pages
 *   a wide page     if j >= nq, the pairs of this step's rows included page (j - nq) / 64 of its wide pages
 * Row r sees j <= n + r, and with a window w > 0 only j > n + r - w. Pages that no row sees are not touched.
 * Modes full and offload: nq = 0 and a wide page for everything.
 *
 * Ids and strides as in specache_pack_params: page i of a list lies at base + id * page_stride, KV head h of a packed
 * page at h * packed_head_stride, of a wide page at h * (64 * 4 * head_dim). Where ids is 0, an index is its own id. */
typedef struct specache_attn_params {
    uint64_t seqs;               /* device, specache_seq [n_seqs], 16-byte aligned */
    uint64_t q;                  /* device, float [rows][n_heads][head_dim], after RoPE, unscaled; 8-byte aligned */
    uint64_t out;                /* device, float [rows][n_heads][head_dim] */
    uint64_t packed;             /* device, 128-byte aligned; 0 if every nq is 0 */
    uint64_t packed_ids;         /* device, uint32_t, or 0 */
    uint64_t wide;               /* device, 16-byte aligned */
    uint64_t wide_ids;           /* device, uint32_t, or 0 */
    uint64_t slots;              /* device, uint32_t [caches][n_kv_heads][top_k] positions; 0: nothing is replaced */
    uint64_t pairs;              /* device, [caches][n_kv_heads][top_k][K | V] of dtype, 16-byte aligned */
    uint64_t skip;               /* device, uint64_t [caches][n_kv_heads][skip_stride], bit j % 64 of word j / 64 */
    uint64_t scores;             /* device, float [n_seqs][n_heads][score_stride], or 0: the last row's q k log2(e) /
                                    sqrt(head_dim) at positions below no that it sees */
    uint64_t lse;                /* device, float [n_seqs][n_heads]: log2 of the last row's sum of 2^score */
    uint64_t parts;              /* device scratch of specache_attn_part_bytes(), 16-byte aligned */
    uint64_t packed_page_stride; /* bytes, multiple of 128 */
    uint64_t packed_head_stride; /* bytes, multiple of 128 */
    uint64_t wide_page_stride;   /* bytes, multiple of 16 */
    uint64_t score_stride;       /* floats, >= every no */
    uint32_t skip_stride;        /* words, >= every nq / 64 */
    uint32_t n_seqs;             /* B, entries of seqs in use or not */
    uint32_t n_heads;            /* H: at most 16 Hkv */
    uint32_t n_kv_heads;         /* Hkv */
    uint32_t head_dim;           /* D: 64, 128 */
    uint32_t bits;               /* b: 1, 2, 4 */
    uint32_t group_size;         /* g: 32, 64 */
    specache_dtype dtype;        /* of wide pages and pairs */
    uint32_t top_k;              /* slots per KV head */
    uint32_t window;             /* w; 0: none */
    uint32_t capacity;           /* no sequence has n + n_rows above this: bounds grid and scratch */
    uint32_t n_sms;              /* host: multiprocessors of the GPU; 0 counts as 1 */
    uint32_t shared_limit;       /* host: the most dynamic shared memory of a block, bytes */
    uint32_t reserved;           /* 0 */
} specache_attn_params;
SPECACHE_ASSERT_SIZE(specache_attn_params, 192);

/* select.cu: the pairs that each sequence's next step wants at 16 bits, and which of them must be fetched. Per KV head
 * the min(top_k, candidates) positions with the highest mean probability of the last row over the head's query heads,
 * among the positions below no that the row sees; ties to the lower position. */
typedef struct specache_fetch {
    uint32_t slot;     /* of the KV head */
    uint32_t position; /* whose pair goes there */
} specache_fetch;
SPECACHE_ASSERT_SIZE(specache_fetch, 8);

typedef struct specache_select_params {
    uint64_t seqs;           /* device, specache_seq [n_seqs], 16-byte aligned */
    uint64_t scores;         /* device, as attention wrote them */
    uint64_t lse;            /* device, as attention wrote them */
    uint64_t slots;          /* device, uint32_t [caches][n_kv_heads][top_k]: read and updated */
    uint64_t skip;           /* device, uint64_t [caches][n_kv_heads][skip_stride]: updated */
    uint64_t selected;       /* device, uint32_t [n_seqs][n_kv_heads][top_k], ascending; 0: not wanted */
    uint64_t fetches;        /* device, specache_fetch [n_seqs][n_kv_heads][top_k]: by ascending position */
    uint64_t fetch_counts;   /* device, uint32_t [n_seqs][n_kv_heads] */
    uint64_t select_counts;  /* device, uint32_t [n_seqs][n_kv_heads]; 0: not wanted */
    uint64_t candidates;     /* device scratch of specache_select_scratch_bytes(), 8-byte aligned */
    uint64_t score_stride;   /* floats */
    uint32_t skip_stride;    /* words, >= every no / 64 */
    uint32_t n_seqs;         /* B */
    uint32_t n_heads;        /* H */
    uint32_t n_kv_heads;     /* Hkv */
    uint32_t top_k;          /* k: at most 2048; with 0 there is nothing to launch */
    uint32_t window;         /* w; 0: none */
    uint32_t capacity;       /* as in attention */
    uint32_t reserved;       /* 0 */
} specache_select_params;
SPECACHE_ASSERT_SIZE(specache_select_params, 120);

#ifndef __CUDACC_RTC__
/* In this order, on one stream: attention, its combine, then with top_k > 0 the two of the selection. */
specache_status specache_attn_plan(const specache_attn_params *params, specache_launch *launch);
specache_status specache_attn_combine_plan(const specache_attn_params *params, specache_launch *launch);
specache_status specache_select_plan(const specache_select_params *params, specache_launch *launch);
specache_status specache_select_merge_plan(const specache_select_params *params, specache_launch *launch);
/* Bytes of scratch, for any step of up to n_seqs sequences of up to capacity tokens; 0 if the shape is refused. */
uint64_t specache_attn_part_bytes(const specache_attn_params *params);
uint64_t specache_select_scratch_bytes(const specache_select_params *params);
#endif

#ifdef __cplusplus
}
#endif
#endif
