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
/* C99 has no static assertion; an array of negative size does not compile. */
#define SPECACHE_ASSERT_SIZE(type, bytes) typedef char type##_size[sizeof(type) == (bytes) ? 1 : -1]
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
 * packed page  [n_kv_heads] blocks in the format of kv_layout.cuh, contiguous
 *
 * Page i is read where wide_pages[i] says, and written as packed page i from `packed` on. */
typedef struct specache_pack_params {
    uint64_t wide_pages;  /* device, uint64_t [n_pages]: addresses, 16-byte aligned */
    uint64_t packed;      /* device, 128-byte aligned */
    uint32_t n_pages;     /* pages of this launch */
    uint32_t n_kv_heads;  /* Hkv */
    uint32_t head_dim;    /* D: 64, 128 */
    uint32_t bits;        /* b: 1, 2, 4 */
    uint32_t group_size;  /* g: 32, 64 */
    specache_dtype dtype; /* of the wide pages */
} specache_pack_params;
SPECACHE_ASSERT_SIZE(specache_pack_params, 40);

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
 * graph stays valid while sequences grow. The same for all layers. */
typedef struct specache_seq {
    uint32_t n;         /* tokens in the cache: the position of row 0; row 1 stands at n + 1 */
    uint32_t nq;        /* positions [0, nq) are read packed; a multiple of 64, <= no */
    uint32_t no;        /* positions [0, no) may be selected; <= n. fetch mode: nq */
    uint32_t n_rows;    /* 1, 2, in a prefill any number; 0: the entry is not in use */
    uint32_t first_row; /* index of row 0 in q and out */
    uint32_t reserved[3];
} specache_seq;
SPECACHE_ASSERT_SIZE(specache_seq, 32);

/* Where the cache of one sequence lies in one layer. In device memory, [n_layers][n_seqs], sequences in the order of
 * their specache_seq; what an entry that is not in use says is never looked at. Page i of every kind holds the
 * positions from 64 i on. Lists name the pages that are needed and change only when one is begun or offloaded: wide
 * pages from nq / 64 on that a row of this step sees or writes, host pages below no / 64. */
typedef struct specache_layer_cache {
    uint64_t packed;      /* packed pages, contiguous, 128-byte aligned; 0 if nq is 0 */
    uint64_t wide;        /* uint64_t [..]: addresses of wide pages, 16-byte aligned */
    uint64_t host;        /* uint64_t [..]: host pages as the device addresses them; 0 where nothing is fetched */
    uint64_t slots;       /* uint32_t [n_kv_heads][top_k]: the position whose pair each holds; 0 if top_k is 0 */
    uint64_t pairs;       /* [n_kv_heads][top_k][K | V] of dtype, 16-byte aligned; 0 if top_k is 0 */
    uint64_t skip;        /* uint64_t [n_kv_heads][skip_stride]: bit j % 64 of word j / 64 is set if a slot holds j */
    uint32_t skip_stride; /* words, at least no / 64 rounded up */
    uint32_t reserved[3];
} specache_layer_cache;
SPECACHE_ASSERT_SIZE(specache_layer_cache, 64);

/* attn_decode.cu: attention of all rows of a step over one layer's mixed cache; attn_combine.cu: then its parts become one.
 *
 * Position j of a sequence is read from
 *   its slot        if j < nq and a slot of the KV head holds j (then its skip bit is set as well)
 *   a packed page   if j < nq otherwise
 *   a wide page     if j >= nq, the pairs of this step's rows included
 * Row r sees j <= n + r, and with a window w > 0 only j > n + r - w. Pages that no row sees are not touched.
 * Modes full and offload: nq = 0 and a wide page for everything. */
typedef struct specache_attn_params {
    uint64_t seqs;         /* device, specache_seq [n_seqs], 16-byte aligned */
    uint64_t caches;       /* device, specache_layer_cache [n_seqs] of this layer, 16-byte aligned */
    uint64_t q;            /* device, float [rows][n_heads][head_dim], after RoPE, unscaled; 8-byte aligned */
    uint64_t out;          /* device, float [rows][n_heads][head_dim] */
    uint64_t scores;       /* device, float [n_seqs][n_heads][score_stride], or 0: the last row's q k log2(e) /
                              sqrt(head_dim) at positions below no that it sees */
    uint64_t lse;          /* device, float [n_seqs][n_heads]: log2 of the last row's sum of 2^score */
    uint64_t first_scores; /* device, as scores, of row 0 where it is not the last; or 0 */
    uint64_t first_lse;    /* device, as lse, of row 0 where it is not the last; or 0 */
    uint64_t parts;        /* device scratch of specache_attn_part_bytes(), 16-byte aligned */
    uint64_t score_stride; /* floats, >= every no */
    uint32_t n_seqs;       /* B, entries of seqs in use or not */
    uint32_t n_heads;      /* H: at most 16 Hkv */
    uint32_t n_kv_heads;   /* Hkv */
    uint32_t head_dim;     /* D: 64, 128 */
    uint32_t bits;         /* b: 1, 2, 4 */
    uint32_t group_size;   /* g: 32, 64 */
    specache_dtype dtype;  /* of wide pages and pairs */
    uint32_t top_k;        /* slots per KV head; 0: nothing is replaced */
    uint32_t window;       /* w; 0: none */
    uint32_t capacity;     /* no sequence has n + n_rows above this: bounds grid and scratch */
    uint32_t n_sms;        /* multiprocessors of the GPU; 0 counts as 1 */
    uint32_t shared_limit; /* host: the most dynamic shared memory of a block, bytes */
} specache_attn_params;
SPECACHE_ASSERT_SIZE(specache_attn_params, 128);

/* select.cu: the pairs that each sequence's next step wants at 16 bits, and which of them must be fetched. Per KV head
 * the min(top_k, candidates) positions with the highest mean probability of the last row over the head's query heads,
 * among the positions below no that the row sees; ties to the lower position. */
typedef struct specache_fetch {
    uint32_t slot;     /* of the KV head */
    uint32_t position; /* whose pair goes there */
} specache_fetch;
SPECACHE_ASSERT_SIZE(specache_fetch, 8);

typedef struct specache_select_params {
    uint64_t seqs;          /* device, specache_seq [n_seqs], 16-byte aligned */
    uint64_t scores;        /* device, as attention wrote them */
    uint64_t lse;           /* device, as attention wrote them */
    uint64_t caches;        /* device, specache_layer_cache [n_seqs], 16-byte aligned: slots and skip are updated */
    uint64_t selected;      /* device, uint32_t [n_seqs][n_kv_heads][top_k], ascending; 0: not wanted */
    uint64_t fetches;       /* device, specache_fetch [n_seqs][n_kv_heads][top_k]: by ascending position */
    uint64_t fetch_counts;  /* device, uint32_t [n_seqs][n_kv_heads] */
    uint64_t select_counts; /* device, uint32_t [n_seqs][n_kv_heads]; 0: not wanted */
    uint64_t hits;          /* device, uint32_t [n_seqs][n_kv_heads]: of row 0's own best min(top_k, candidates) among
                               the positions below nq that it sees, how many the slots held before this launch; 0 where
                               there is no second row. Address 0: not wanted */
    uint64_t first_scores;  /* device, as attention wrote them: for hits */
    uint64_t first_lse;     /* device, as attention wrote them: for hits */
    uint64_t candidates;    /* device scratch of specache_select_scratch_bytes(), 8-byte aligned */
    uint64_t score_stride;  /* floats */
    uint32_t n_seqs;        /* B */
    uint32_t n_heads;       /* H */
    uint32_t n_kv_heads;    /* Hkv */
    uint32_t top_k;         /* k: at most 2048; with 0 there is nothing to launch */
    uint32_t window;        /* w; 0: none */
    uint32_t capacity;      /* as in attention */
    uint32_t forget;        /* 1: everything is fetched anew, also what the slots hold; 0: only the rest */
    uint32_t reserved;      /* 0 */
} specache_select_params;
SPECACHE_ASSERT_SIZE(specache_select_params, 136);

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

/* ---- the dense half of a decode step: embed.cu, linear.cu, sample.cu ------------------------------------------- */

/* Weights only. */
#define SPECACHE_FP32 2u

/* Rows of a launch of the fused kernels: two tokens of eight sequences. */
#define SPECACHE_MAX_ROWS 16

#define SPECACHE_UNSUPPORTED_ROWS 20  /* more than the kernel or its tables have room for */
#define SPECACHE_UNSUPPORTED_WIDTH 21 /* features that the kernels cannot divide, or too many */

/* No layer, no token. */
#define SPECACHE_NONE 0xFFFFFFFFu

/* embed.cu: begins a step, or a chunk of a prefill. Rows of the embedding become the residual stream, and what every
 * layer would otherwise work out again is worked out once: cosines and sines of the positions, and where each layer's K
 * and V of a row go. A row that is no sequence's only fills up a graph: at position 0, and kept nowhere. */
typedef struct specache_embed_params {
    uint64_t table;     /* device, dtype [vocab][hidden], 16-byte aligned */
    uint64_t tokens;    /* device, uint32_t [n_rows]; a token beyond the vocabulary gives NaN */
    uint64_t seqs;      /* device, specache_seq [n_seqs], 16-byte aligned */
    uint64_t caches;    /* device, specache_layer_cache [n_layers][n_seqs], 16-byte aligned */
    uint64_t inv_freq;  /* device, float [head_dim / 2]: RoPE, radians per position */
    uint64_t x;         /* out: device, float [n_rows][hidden] */
    uint64_t rope;      /* out: device, float [n_rows][head_dim / 2][cos, sin] */
    uint64_t append;    /* out: device, uint64_t [n_layers][append_stride]: address of K of head 0, or 0 */
    uint64_t bad_layer; /* out: device, uint32_t [n_rows]: SPECACHE_NONE */
    uint32_t n_rows;
    uint32_t n_seqs;
    uint32_t hidden; /* multiple of 8 */
    uint32_t vocab;
    uint32_t n_layers;
    uint32_t n_kv_heads;
    uint32_t head_dim;      /* D */
    float attention_factor; /* multiplies cos and sin: 1 but for YaRN */
    specache_dtype dtype;   /* of the table */
    uint32_t append_stride; /* rows, >= n_rows; 0: SPECACHE_MAX_ROWS */
} specache_embed_params;
SPECACHE_ASSERT_SIZE(specache_embed_params, 112);

/* linear.cu: matrices are [out][in] of dtype as safetensors files have them, 16-byte aligned; in a multiple of 8 and at
 * least 32. Everything else is float. An address of 0 says that there is no such bias or norm. */

/* RMS norm, q, k and v, RoPE; q is kept, K and V go to the cache. Two kernels where q and k have norms of their own. */
typedef struct specache_qkv_params {
    uint64_t x;         /* device, float [n_rows][hidden]: residual stream */
    uint64_t norm;      /* device, float [hidden] */
    uint64_t q_weight;  /* device, dtype [n_heads * head_dim][hidden] */
    uint64_t k_weight;  /* device, dtype [n_kv_heads * head_dim][hidden] */
    uint64_t v_weight;  /* device, dtype [n_kv_heads * head_dim][hidden] */
    uint64_t q_bias;    /* device, float [n_heads * head_dim], or 0 */
    uint64_t k_bias;    /* device, float [n_kv_heads * head_dim], or 0 */
    uint64_t v_bias;    /* device, float [n_kv_heads * head_dim], or 0 */
    uint64_t q_norm;    /* device, float [head_dim], or 0 */
    uint64_t k_norm;    /* device, float [head_dim]; 0 exactly if q_norm is */
    uint64_t k;         /* scratch: device, float [n_rows][n_kv_heads][head_dim]; used with q_norm and k_norm only */
    uint64_t rope;      /* device, float [n_rows][head_dim / 2][cos, sin]: of specache_embed */
    uint64_t append;    /* device, uint64_t [n_rows]: this layer's part of what specache_embed wrote */
    uint64_t q;         /* out: device, float [n_rows][n_heads][head_dim] */
    uint64_t bad_layer; /* in and out: device, uint32_t [n_rows]: the first layer whose input is not finite */
    uint32_t n_rows;
    uint32_t hidden;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim; /* even, at most 256 */
    uint32_t layer;
    float eps;
    specache_dtype dtype;    /* of the weights */
    specache_dtype kv_dtype; /* of the wide pages */
    uint32_t reserved;
} specache_qkv_params;
SPECACHE_ASSERT_SIZE(specache_qkv_params, 160);

/* RMS norm, then silu(gate) * up. */
typedef struct specache_gate_up_params {
    uint64_t x;           /* device, float [n_rows][hidden] */
    uint64_t norm;        /* device, float [hidden] */
    uint64_t gate_weight; /* device, dtype [intermediate][hidden] */
    uint64_t up_weight;   /* device, dtype [intermediate][hidden] */
    uint64_t gate_bias;   /* device, float [intermediate], or 0 */
    uint64_t up_bias;     /* device, float [intermediate], or 0 */
    uint64_t y;           /* out: device, float [n_rows][intermediate] */
    uint32_t n_rows;
    uint32_t hidden;
    uint32_t intermediate;
    float eps;
    specache_dtype dtype;
    uint32_t reserved;
} specache_gate_up_params;
SPECACHE_ASSERT_SIZE(specache_gate_up_params, 80);

/* y += W x + bias (residual: the projections of attention and MLP back into the stream), or y = W norm(x) + bias
 * (logits). */
typedef struct specache_linear_params {
    uint64_t x;      /* device, float [n_rows][k] */
    uint64_t norm;   /* device, float [k]: logits; 0: residual */
    uint64_t weight; /* device, dtype [n][k] */
    uint64_t bias;   /* device, float [n], or 0 */
    uint64_t y;      /* in and out (residual), out (logits): device, float [n_rows][n] */
    uint32_t n_rows;
    uint32_t k;
    uint32_t n;
    float eps;
    specache_dtype dtype;
    uint32_t reserved;
} specache_linear_params;
SPECACHE_ASSERT_SIZE(specache_linear_params, 64);

/* sample.cu: what a row's logits say; draw.cu puts another token in. */
typedef struct specache_choice {
    uint32_t token;     /* of the highest logit; of equal ones the lowest; NaN is never the highest */
    uint32_t first_bad; /* the first token whose logit is NaN or +inf, or SPECACHE_NONE */
    float logit;        /* the highest; -inf: there is none above */
    uint32_t reserved;
} specache_choice;
SPECACHE_ASSERT_SIZE(specache_choice, 16);

/* Greedy: two kernels, the second over what the first leaves in scratch. */
typedef struct specache_argmax_params {
    uint64_t logits;  /* device, float [n_rows][vocab] */
    uint64_t scratch; /* device, specache_choice [n_rows][ceil(vocab / SPECACHE_ARGMAX_SLICE)] */
    uint64_t choices; /* out: device, specache_choice [n_rows] */
    uint64_t tokens;  /* out: device, uint32_t [n_rows]: the same tokens, for the next specache_embed; or 0 */
    uint32_t n_rows;
    uint32_t vocab;
} specache_argmax_params;
SPECACHE_ASSERT_SIZE(specache_argmax_params, 40);

/* Logits of one CTA. */
#define SPECACHE_ARGMAX_SLICE 1024

#ifndef __CUDACC_RTC__
specache_status specache_embed_plan(const specache_embed_params *params, specache_launch *launch);
specache_status specache_qkv_plan(const specache_qkv_params *params, specache_launch *launch);
/* The second kernel of a model with q_norm and k_norm; a grid of 0 where there are none. */
specache_status specache_head_norm_plan(const specache_qkv_params *params, specache_launch *launch);
specache_status specache_residual_plan(const specache_linear_params *params, specache_launch *launch);
specache_status specache_gate_up_plan(const specache_gate_up_params *params, specache_launch *launch);
specache_status specache_logits_plan(const specache_linear_params *params, specache_launch *launch);
specache_status specache_argmax_slices_plan(const specache_argmax_params *params, specache_launch *launch);
specache_status specache_argmax_merge_plan(const specache_argmax_params *params, specache_launch *launch);
#endif

/* ---- the next token by chance: draw.cu --------------------------------------------------------------------------- */

/* Tokens that can be drawn from. */
#define SPECACHE_DRAW_MOST_VOCAB (1u << 20)

/* What one row's token is drawn with; options as in src/sampler.rs. */
typedef struct specache_draw {
    uint64_t seen;     /* in and out: device, uint32_t [ceil(vocab / 32)]: bit t % 32 of word t / 32 for each token t of
                          the history, to which the drawn one is added; 0: no penalty, nothing added */
    uint64_t random;   /* u 2^64 of a random number u in [0, 1) */
    uint32_t row;      /* of logits; SPECACHE_NONE: the entry is not in use */
    uint32_t top_k;    /* 0: all */
    float temperature; /* 0: the best */
    float top_p;       /* above 0; 1: all */
    float min_p;       /* 0: all; below 1 */
    float penalty;     /* on tokens of the history: above 0; 1: none */
} specache_draw;
SPECACHE_ASSERT_SIZE(specache_draw, 40);

/* Behind the argmax kernels on the same logits. A row at which first_bad is a token, or the highest logit -inf, keeps
 * what they said. */
typedef struct specache_draw_params {
    uint64_t draws;   /* device, specache_draw [n_draws], 8-byte aligned, of different rows */
    uint64_t logits;  /* device, float [rows][vocab] */
    uint64_t choices; /* in and out: device, specache_choice [rows], of the argmax: token becomes the drawn one */
    uint64_t tokens;  /* out: device, uint32_t [rows]: the same tokens, for the next specache_embed; or 0 */
    uint32_t n_draws;
    uint32_t vocab;
} specache_draw_params;
SPECACHE_ASSERT_SIZE(specache_draw_params, 40);

#ifndef __CUDACC_RTC__
specache_status specache_draw_plan(const specache_draw_params *params, specache_launch *launch);
#endif

/* ---- between the products of cuBLASLt: dense.cu ------------------------------------------------------------------ */

/* Any number of rows, 16-bit outputs of the type of fp16 or bf16 weights, widths that are multiples of 8. A layer is
 *   norm16, products, finish_qkv, attention, round16, product that adds to x,
 *   norm16, two products, swiglu16, product that adds to x
 * where all products give fp32. */

/* RMS norm. */
typedef struct specache_norm16_params {
    uint64_t x;         /* device, float [n_rows][hidden], 16-byte aligned: residual stream */
    uint64_t norm;      /* device, float [hidden], 16-byte aligned */
    uint64_t y;         /* out: device, dtype [n_rows][hidden], 16-byte aligned */
    uint64_t bad_layer; /* in and out: device, uint32_t [n_rows]: the first layer whose input is not finite; or 0 */
    uint32_t n_rows;
    uint32_t hidden;
    uint32_t layer;
    float eps;
    specache_dtype dtype;
    uint32_t reserved;
} specache_norm16_params;
SPECACHE_ASSERT_SIZE(specache_norm16_params, 56);

/* Biases, norms of heads, RoPE and append, after the products for q, k and v. */
typedef struct specache_finish_qkv_params {
    uint64_t products; /* device, float [n_rows][n_heads + 2 n_kv_heads][head_dim]: q, k, v of each row */
    uint64_t q_bias;   /* device, float [n_heads * head_dim], or 0 */
    uint64_t k_bias;   /* device, float [n_kv_heads * head_dim], or 0 */
    uint64_t v_bias;   /* device, float [n_kv_heads * head_dim], or 0 */
    uint64_t q_norm;   /* device, float [head_dim], or 0 */
    uint64_t k_norm;   /* device, float [head_dim]; 0 exactly if q_norm is */
    uint64_t rope;     /* device, float [n_rows][head_dim / 2][cos, sin]: of specache_embed */
    uint64_t append;   /* device, uint64_t [n_rows]: this layer's part of what specache_embed wrote */
    uint64_t q;        /* out: device, float [n_rows][n_heads][head_dim] */
    uint32_t n_rows;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim; /* even, at most 256 */
    float eps;
    specache_dtype kv_dtype; /* of the wide pages */
} specache_finish_qkv_params;
SPECACHE_ASSERT_SIZE(specache_finish_qkv_params, 96);

/* Rounding: of what attention gives. */
typedef struct specache_round16_params {
    uint64_t x;     /* device, float [count], 16-byte aligned */
    uint64_t y;     /* out: device, dtype [count], 16-byte aligned */
    uint64_t count; /* multiple of 8 */
    specache_dtype dtype;
    uint32_t reserved;
} specache_round16_params;
SPECACHE_ASSERT_SIZE(specache_round16_params, 32);

/* silu(gate) * up. */
typedef struct specache_swiglu16_params {
    uint64_t gate;      /* device, float [n_rows] rows, `stride` apart, 16-byte aligned */
    uint64_t up;        /* device, as gate */
    uint64_t gate_bias; /* device, float [intermediate], 16-byte aligned, or 0 */
    uint64_t up_bias;   /* device, float [intermediate], 16-byte aligned, or 0 */
    uint64_t y;         /* out: device, dtype [n_rows][intermediate], 16-byte aligned */
    uint32_t n_rows;
    uint32_t intermediate;
    uint32_t stride; /* floats, multiple of 4: intermediate, or twice that where one product gives gate and up */
    specache_dtype dtype;
} specache_swiglu16_params;
SPECACHE_ASSERT_SIZE(specache_swiglu16_params, 56);

#ifndef __CUDACC_RTC__
specache_status specache_norm16_plan(const specache_norm16_params *params, specache_launch *launch);
specache_status specache_finish_qkv_plan(const specache_finish_qkv_params *params, specache_launch *launch);
specache_status specache_round16_plan(const specache_round16_params *params, specache_launch *launch);
specache_status specache_swiglu16_plan(const specache_swiglu16_params *params, specache_launch *launch);
#endif

/* ---- attention of a prefill: attn_prefill.cu --------------------------------------------------------------------- */

/* attn_prefill.cu: causal attention of a chunk of prompt rows of one or more sequences, over one layer.
 *
 * A sequence's rows stand at n, n + 1, .. n + n_rows - 1 of specache_seq; row r sees j <= n + r, and with a window
 * w > 0 only j > n + r - w. Position j is read from its packed page if j < nq, else from its wide page; the chunk's own
 * K and V are in the wide pages already. nq is 0 but for a continued kivi prefill, and at most n; no is not used. Pages
 * that no row sees are not touched. */
typedef struct specache_prefill_params {
    uint64_t seqs;         /* device, specache_seq [n_seqs], 16-byte aligned: any n_rows */
    uint64_t caches;       /* device, specache_layer_cache [n_seqs] of this layer, 16-byte aligned */
    uint64_t q;            /* device, float [rows][n_heads][head_dim], after RoPE, unscaled; 16-byte aligned */
    uint64_t out;          /* device, float [rows][n_heads][head_dim], 8-byte aligned */
    uint32_t n_seqs;       /* entries of seqs in use or not */
    uint32_t n_rows;       /* host: at least the sum of n_rows over all entries: bounds the grid */
    uint32_t n_heads;      /* H: at most 16 Hkv */
    uint32_t n_kv_heads;   /* Hkv */
    uint32_t head_dim;     /* D: 64, 128 */
    uint32_t bits;         /* b: 1, 2, 4 */
    uint32_t group_size;   /* g: 32, 64 */
    specache_dtype dtype;  /* of wide pages */
    uint32_t window;       /* w; 0: none */
    uint32_t shared_limit; /* host: the most dynamic shared memory of a block, bytes */
} specache_prefill_params;
SPECACHE_ASSERT_SIZE(specache_prefill_params, 72);

#ifndef __CUDACC_RTC__
specache_status specache_prefill_plan(const specache_prefill_params *params, specache_launch *launch);

/* For rows of one sequence behind a long history, without a window, whose CTAs take about as long each: thousandths of the
 * GPU's places for CTAs that are taken on average, until the last wave ends. 0 for a shape that the plan refuses, no rows or
 * no multiprocessor. Looks at no address. */
uint32_t specache_prefill_filled(const specache_prefill_params *params, uint32_t n_sms);
#endif

/* ---- the gather on the device: fetch.cu -------------------------------------------------------------------------- */

/* Copies the pairs that the selection left in fetches into their slots: from pinned host memory, where a page is a wide
 * page and all pages below no / 64 are there, or from where the host's threads have gathered them (post.cu). */
typedef struct specache_fetch_params {
    uint64_t seqs;         /* device, specache_seq [n_seqs], 16-byte aligned */
    uint64_t caches;       /* device, specache_layer_cache [n_seqs] of this layer, 16-byte aligned: host pages are read,
                              pairs are written */
    uint64_t fetches;      /* device, specache_fetch [n_seqs][n_kv_heads][top_k], as the selection wrote them */
    uint64_t fetch_counts; /* device, uint32_t [n_seqs][n_kv_heads]; of entries that are not in use not looked at */
    uint64_t fetched;      /* in and out: device, uint64_t: how many pairs were copied is added; 0: not wanted */
    uint64_t gathered;     /* device, [pairs][4 D] bytes, 16-byte aligned: the pairs of all heads, one head's behind the
                              other's, in the order of fetches; 0: they come from the pages of the host */
    uint32_t n_seqs;       /* B, entries of seqs in use or not */
    uint32_t n_kv_heads;   /* Hkv */
    uint32_t head_dim;     /* D: 64, 128 */
    uint32_t top_k;        /* k: at most 2048; with 0 there is nothing to launch */
    uint32_t n_ctas;       /* host: how many CTAs share the work; 0: by what may be wanted */
    uint32_t reserved;     /* 0 */
} specache_fetch_params;
SPECACHE_ASSERT_SIZE(specache_fetch_params, 72);

#ifndef __CUDACC_RTC__
specache_status specache_fetch_plan(const specache_fetch_params *params, specache_launch *launch);
#endif

/* ---- what the host's threads are to gather: post.cu -------------------------------------------------------------- */

/* One pair that is wanted. */
typedef struct specache_wanted {
    uint32_t head; /* sequence * n_kv_heads + KV head */
    uint32_t position;
} specache_wanted;
SPECACHE_ASSERT_SIZE(specache_wanted, 8);

/* Tells the host which pairs the selection left in fetches, in the order in which specache_fetch_pairs takes them from
 * `gathered`. */
typedef struct specache_post_params {
    uint64_t seqs;         /* device, specache_seq [n_seqs], 16-byte aligned */
    uint64_t fetches;      /* device, specache_fetch [n_seqs][n_kv_heads][top_k], as the selection wrote them */
    uint64_t fetch_counts; /* device, uint32_t [n_seqs][n_kv_heads]; of entries that are not in use not looked at */
    uint64_t wanted;       /* out: pinned, specache_wanted [n_seqs * n_kv_heads * top_k]: as many as there are */
    uint64_t bell;         /* out: pinned, uint32_t: 1 + how many there are, once they can be seen */
    uint32_t n_seqs;       /* B, entries of seqs in use or not */
    uint32_t n_kv_heads;   /* Hkv */
    uint32_t top_k;        /* k: at most 2048; with 0 there is nothing to launch */
    uint32_t reserved;     /* 0 */
} specache_post_params;
SPECACHE_ASSERT_SIZE(specache_post_params, 56);

#ifndef __CUDACC_RTC__
specache_status specache_post_plan(const specache_post_params *params, specache_launch *launch);
#endif

/* ---- how fast memory is read: read.cu ---------------------------------------------------------------------------- */

/* Reads memory once, for the time that it takes. */
typedef struct specache_read_params {
    uint64_t from;     /* device, 16-byte aligned */
    uint64_t parities; /* out: device, uint32_t [n_ctas]: together the XOR of all that was read */
    uint64_t bytes;    /* a multiple of 16 */
    uint32_t n_ctas;   /* host: how many CTAs share the work; with 0 there is nothing to launch */
    uint32_t reserved; /* 0 */
} specache_read_params;
SPECACHE_ASSERT_SIZE(specache_read_params, 32);

#ifndef __CUDACC_RTC__
specache_status specache_read_plan(const specache_read_params *params, specache_launch *launch);
#endif

#ifdef __cplusplus
}
#endif
#endif
