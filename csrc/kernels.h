/* The entry points and the size of their CTAs: what kernels, launch plans and tests agree on. Macros only, for C, C++ and
 * CUDA. A list names for each entry point what is in its name, then what only its template needs. */
#ifndef SPECACHE_KERNELS_H
#define SPECACHE_KERNELS_H

#include "abi.h"

/* The number of a dtype from its part of a name: SPECACHE_DTYPE(bf16). */
#define SPECACHE_DTYPE(name) SPECACHE_DTYPE_##name
#define SPECACHE_DTYPE_fp16 SPECACHE_FP16
#define SPECACHE_DTYPE_bf16 SPECACHE_BF16
#define SPECACHE_DTYPE_fp32 SPECACHE_FP32

/* clang-format off */

/* ---- pack.cu: D x bits x dtype ---- */
#define SPECACHE_PACK_KERNELS(X)                                       \
    X(64, 1, fp16, Fp16) X(64, 2, fp16, Fp16) X(64, 4, fp16, Fp16)     \
    X(64, 1, bf16, Bf16) X(64, 2, bf16, Bf16) X(64, 4, bf16, Bf16)     \
    X(128, 1, fp16, Fp16) X(128, 2, fp16, Fp16) X(128, 4, fp16, Fp16)  \
    X(128, 1, bf16, Bf16) X(128, 2, bf16, Bf16) X(128, 4, bf16, Bf16)

/* 8 warps: 8 loads of 16 bytes in flight per thread at D = 128. */
#define SPECACHE_PACK_THREADS 256

/* ---- attn_decode.cu: D x bits x dtype; attn_combine.cu: specache_attn_combine. A test may build fewer. ---- */
#ifndef SPECACHE_ATTN_KERNELS
#define SPECACHE_ATTN_KERNELS(X)                                       \
    X(64, 1, fp16, Fp16) X(64, 2, fp16, Fp16) X(64, 4, fp16, Fp16)     \
    X(64, 1, bf16, Bf16) X(64, 2, bf16, Bf16) X(64, 4, bf16, Bf16)     \
    X(128, 1, fp16, Fp16) X(128, 2, fp16, Fp16) X(128, 4, fp16, Fp16)  \
    X(128, 1, bf16, Bf16) X(128, 2, bf16, Bf16) X(128, 4, bf16, Bf16)
#endif

#define SPECACHE_ATTN_THREADS 128
/* CTAs of a multiprocessor: what its shared memory has room for on sm_90, and registers must not forbid. */
#define SPECACHE_ATTN_CTAS(D, B) ((D) == 128 && (B) == 4 ? 2 : 3)

/* ---- select.cu: specache_select_chunks, specache_select_merge ---- */
#define SPECACHE_SELECT_THREADS 512

/* ---- embed.cu: dtype ---- */
#define SPECACHE_EMBED_KERNELS(X) X(fp16, Fp16) X(bf16, Bf16) X(fp32, Fp32)

/* A row of 4096 numbers is four loads of 8 bytes for each thread. */
#define SPECACHE_EMBED_THREADS 256

/* ---- linear.cu: qkv, residual, gate_up, logits for dtype x n-tiles of 8 rows, and specache_head_norm ---- */
#define SPECACHE_LINEAR_KERNELS(X)              \
    X(fp16, Fp16, 1) X(fp16, Fp16, 2)           \
    X(bf16, Bf16, 1) X(bf16, Bf16, 2)           \
    X(fp32, Fp32, 1) X(fp32, Fp32, 2)

/* Weights on their way wait in shared memory (product.cuh). */
#define SPECACHE_LINEAR_THREADS 256
#define SPECACHE_LINEAR_SHARED 65536

/* Of the kernel for the heads of q and k: a warp for each row and head. */
#define SPECACHE_HEAD_NORM_THREADS 128

/* ---- sample.cu: specache_argmax_slices; specache_argmax_merge has one warp ---- */
#define SPECACHE_ARGMAX_THREADS 256
#define SPECACHE_ARGMAX_MERGE_THREADS 32

/* ---- draw.cu: specache_draw_tokens ---- */
#define SPECACHE_DRAW_THREADS 1024

/* ---- dense.cu: norm16, round16, swiglu16 for dtype, and specache_finish_qkv ---- */
#define SPECACHE_DENSE_KERNELS(X) X(fp16, Fp16) X(bf16, Bf16)
#define SPECACHE_DENSE_THREADS 256

/* ---- attn_prefill.cu: D x dtype ---- */
#define SPECACHE_PREFILL_KERNELS(X) X(64, fp16, Fp16) X(64, bf16, Bf16) X(128, fp16, Fp16) X(128, bf16, Bf16)

/* The largest block (prefill_work.h), and how many CTAs of it registers must not forbid. */
#define SPECACHE_PREFILL_THREADS(D) ((D) == 64 ? 128 : 256)
#define SPECACHE_PREFILL_CTAS(D) ((D) == 64 ? 3 : 1)

/* ---- fetch.cu: specache_fetch_pairs ---- */
#define SPECACHE_FETCH_THREADS 128
/* One CTA for so many pairs that may be wanted, within bounds. */
#define SPECACHE_FETCH_CTA_PAIRS 256
#define SPECACHE_FETCH_MIN_CTAS 4
#define SPECACHE_FETCH_MAX_CTAS 16

/* ---- post.cu: specache_post_wanted ---- */
#define SPECACHE_POST_THREADS 512

/* ---- read.cu: specache_read ---- */
#define SPECACHE_READ_THREADS 256

/* clang-format on */

#endif
